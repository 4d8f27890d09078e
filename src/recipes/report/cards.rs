//! Single items of attack runs: the image, its adversarial twin, the amplified difference, question and both answers.

use super::source::RunDir;
use crate::error::Result;
use crate::eval::report::{Answer, Card, Picture};
use crate::pixels::RgbImage8;
use crate::pixels::decode::{decode_file, encode_png, read_file};
use crate::recipes::progress::Progress;
use serde_json::Value;
use std::path::PathBuf;

/// Cards of one run: answers that the attack turned, and answers that held.
const TURNED: usize = 4;
const HELD: usize = 2;
/// Cards of a report: pictures weigh.
const MOST: usize = 18;

/// Cards with pictures, where the files are there.
pub(super) fn cards(runs: &[RunDir], progress: &dyn Progress) -> Vec<Card> {
    let mut cards = Vec::new();
    for (run, record) in chosen(runs) {
        let pictures = match pictures(run, record) {
            Ok(pictures) => pictures,
            Err(reason) => {
                let id = record["id"].as_str().unwrap_or_default();
                progress.note(&format!("no picture of `{id}`: {}", reason.replace('\n', " ")));
                Vec::new()
            }
        };
        cards.push(Card { pictures, ..card(run, record) });
    }
    cards
}

/// The same without pictures.
pub(super) fn without_pictures(runs: &[RunDir]) -> Vec<Card> {
    chosen(runs).map(|(run, record)| card(run, record)).collect()
}

/// The first items of each attack run that the attack turned, then the first that held.
fn chosen(runs: &[RunDir]) -> impl Iterator<Item = (&RunDir, &Value)> {
    let of_run = |run: &RunDir, robust: bool, most: usize| -> Vec<usize> {
        let is_one = |record: &Value| {
            record["clean_correct"] == true
                && record["robust_correct"] == robust
                && record["adversarial_image"].is_string()
        };
        (0..run.records.len()).filter(|index| is_one(&run.records[*index])).take(most).collect()
    };
    runs.iter()
        .filter(|run| run.command == "attack")
        .flat_map(move |run| {
            let indices = [of_run(run, false, TURNED), of_run(run, true, HELD)].concat();
            indices.into_iter().map(move |index| (run, &run.records[index]))
        })
        .take(MOST)
}

fn text(record: &Value, names: &[&str]) -> String {
    names.iter().find_map(|name| record[*name].as_str()).unwrap_or_default().to_owned()
}

fn card(run: &RunDir, record: &Value) -> Card {
    let letter = text(record, &["answer"]);
    let answer = letter.bytes().next().map(|byte| usize::from(byte.wrapping_sub(b'A')));
    let details = ["modality", "question_type", "id"].map(|name| text(record, &[name]));
    let parts: Vec<&str> = std::iter::once(run.name.as_str())
        .chain(details.iter().map(String::as_str))
        .filter(|part| !part.is_empty())
        .collect();
    let side = |label: &str, prediction: &str, correct: bool, completion: &[&str]| Answer {
        label: label.to_owned(),
        prediction: text(record, &[prediction]),
        correct,
        completion: text(record, completion),
    };
    let options: Vec<String> = record["options"]
        .as_array()
        .into_iter()
        .flatten()
        .map(|option| option.as_str().unwrap_or_default().to_owned())
        .collect();
    Card {
        question: text(record, &["question", "id"]),
        detail: parts.join(" · "),
        options,
        answer,
        pictures: Vec::new(),
        answers: vec![
            side(
                "clean",
                "clean_prediction",
                record["clean_correct"] == true,
                &["clean_completion", "completion"],
            ),
            side(
                "under attack",
                "adversarial_prediction",
                record["robust_correct"] == true,
                &["adversarial_completion"],
            ),
        ],
    }
}

fn pictures(run: &RunDir, record: &Value) -> std::result::Result<Vec<Picture>, String> {
    let show = |error: crate::error::Error| error.to_string();
    let adversarial = decode_file(&run.dir.join(text(record, &["adversarial_image"]))).map_err(show)?;
    let mut pictures = Vec::new();
    if let Some(path) = clean_path(run, &text(record, &["image"])) {
        let clean = read_file(&path, run.config.data.gray()).map_err(show)?.image;
        pictures.push(Picture { caption: "clean".to_owned(), png: encode_png(&clean).map_err(show)? });
        pictures.push(attacked(&adversarial).map_err(show)?);
        if let Some((image, factor)) = amplified_difference(&clean, &adversarial) {
            let caption = format!("difference × {factor}");
            pictures.push(Picture { caption, png: encode_png(&image).map_err(show)? });
        }
    } else {
        pictures.push(attacked(&adversarial).map_err(show)?);
    }
    Ok(pictures)
}

fn attacked(image: &RgbImage8) -> Result<Picture> {
    Ok(Picture { caption: "attacked".to_owned(), png: encode_png(image)? })
}

/// The clean image: under the data root that the run noted, or that its configuration names.
fn clean_path(run: &RunDir, image: &str) -> Option<PathBuf> {
    let noted = run.facts["data_root"].as_str().map(PathBuf::from);
    let named = [&run.config.data.omnimedvqa, &run.config.data.data].into_iter().flatten().cloned();
    let roots = noted.into_iter().chain(named.flat_map(|root| {
        let doubled = root.file_name().map(|name| root.join(name));
        let folder = root.parent().map(PathBuf::from);
        std::iter::once(root).chain(doubled).chain(folder)
    }));
    roots.chain(std::iter::once(run.dir.clone())).map(|root| root.join(image)).find(|path| path.is_file())
}

/// The change around middle grey, times the largest whole factor that clips nothing; `None` for images of other sizes.
pub fn amplified_difference(clean: &RgbImage8, other: &RgbImage8) -> Option<(RgbImage8, i32)> {
    if (clean.width, clean.height) != (other.width, other.height) {
        return None;
    }
    let changes: Vec<i32> = clean
        .data
        .iter()
        .zip(&other.data)
        .map(|(before, after)| i32::from(*after) - i32::from(*before))
        .collect();
    let largest = changes.iter().map(|change| change.abs()).max().unwrap_or(0).max(1);
    let factor = (127 / largest).max(1);
    let data = changes.iter().map(|change| (128 + change * factor).clamp(0, 255) as u8).collect();
    Some((RgbImage8 { width: clean.width, height: clean.height, data }, factor))
}
