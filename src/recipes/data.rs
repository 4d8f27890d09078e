//! `safemed data`: check questions and images, count them, split them, draw phantoms, convert between formats.
//!
//! What the formats are stands in `data`; here is what each command reads, says and writes.

use super::export::refuse_occupied;
use super::items;
use super::job::{Job, Outcome};
use super::merge::link_or_copy;
use super::progress::Progress;
use super::run::write_atomic;
use crate::data::phantom::{self, PhantomConfig};
use crate::data::problem::{self, Problem};
use crate::data::prompt::PromptTemplate;
use crate::data::split::{self, LeakReport, Part};
use crate::data::stats::{self as counts, Blind, DataStats};
use crate::data::{self, Dataset, ImageCheck, Sample, letter, select};
use crate::error::{Error, Result};
use crate::pixels::decode;
use serde_json::{Map, Value, json};
use std::collections::{BTreeMap, BTreeSet};
use std::fmt::Write as _;
use std::path::{Path, PathBuf};

/// Reads all questions and decodes all their images; every problem is told at once, in the summary too.
///
/// # Errors
/// When nothing can be read at all.
pub fn check(job: &Job<'_>) -> Result<Outcome> {
    let dataset = items::survey(&job.config.data.dataset(), &job.stop, job.progress)?;
    let images: BTreeSet<&PathBuf> = dataset.samples.iter().map(|sample| &sample.image).collect();
    let summary = json!({
        "command": "data check",
        "n": dataset.samples.len(),
        "images": images.len(),
        "restricted": dataset.restricted,
        "problems": dataset.skipped.iter().map(problem_summary).collect::<Vec<Value>>(),
        "pass": dataset.skipped.is_empty(),
    });
    if let Err(refused) = problem::refuse_all(&dataset.skipped) {
        return Ok(Outcome { data_refused: Some(refused.to_string()), ..Outcome::new(summary, "") });
    }
    items::require_some(&dataset, "check")?;
    let text = format!(
        "{} questions and {} images: no problem found\n{}",
        dataset.samples.len(),
        images.len(),
        restricted_text(dataset.restricted)
    );
    Ok(Outcome::new(summary, text))
}

fn problem_summary(problem: &Problem) -> Value {
    json!({
        "file": problem.file.display().to_string(),
        "line": problem.line,
        "record": problem.record,
        "id": problem.id,
        "message": problem.message,
    })
}

fn restricted_text(count: usize) -> String {
    if count == 0 {
        return String::new();
    }
    format!("{count} questions of the restricted-access part are counted only: it comes without images\n")
}

/// Counts, and how far one gets without the images. `train`, questions or a list of ids, gives the priors their counts.
///
/// # Errors
/// Those of reading either.
pub fn stats(job: &Job<'_>, train: Option<&Path>) -> Result<Outcome> {
    let mut config = job.config.data.dataset();
    let train = match train {
        Some(file) if !file.is_dir() && (!file.exists() || select::read_split(file).is_ok()) => {
            config.train_split = Some(file.to_path_buf());
            config.load_train()?
        }
        Some(path) => Some(data::load(path)?),
        None => config.load_train()?,
    };
    let dataset = config.load(ImageCheck::Ignore)?;
    let stats = counts::describe(&dataset, train.as_ref());
    let mut summary = json!({"command": "data stats"});
    if let (Value::Object(summary), Value::Object(numbers)) =
        (&mut summary, serde_json::to_value(&stats).map_err(anyhow::Error::from)?)
    {
        summary.extend(numbers);
    }
    Ok(Outcome::new(summary, stats_text(&stats)))
}

fn stats_text(stats: &DataStats) -> String {
    let mut text = format!("questions {}, images {}\n", stats.n, stats.images);
    let _ = writeln!(text, "with a reasoning of their own {}", stats.reasonings);
    text.push_str(&restricted_text(stats.restricted));
    let groups = [
        ("modality", &stats.by_modality),
        ("question type", &stats.by_question_type),
        ("data set", &stats.by_dataset),
        ("right letter", &stats.by_letter),
    ];
    for (title, counts) in groups {
        let _ = writeln!(text, "\nby {title}");
        for (name, count) in counts {
            let _ = writeln!(text, "  {name:<28} {count:>7}");
        }
    }
    let source = match stats.option_prior.source {
        crate::stats::prior::PriorSource::Train => "counted in the training questions",
        crate::stats::prior::PriorSource::LeaveOneOut => {
            "counted in the other questions; below chance on balanced ones"
        }
    };
    let _ = writeln!(text, "\nright without the images ({source})");
    let _ = writeln!(text, "  {:<28} {:.4}", "chance", stats.chance);
    let _ = writeln!(text, "  {:<28} {:.4}", "commonest letter", stats.letter_prior.all.accuracy);
    let _ = writeln!(text, "  {:<28} {:.4}", "option prior", stats.option_prior.all.accuracy);
    let _ = writeln!(
        text,
        "  {:<28} {:.4}",
        "option prior, modality known", stats.option_prior_within_modality.all.accuracy
    );
    prior_text(&mut text, &stats.option_prior);
    text
}

fn prior_text(text: &mut String, prior: &Blind) {
    for (title, scores) in [("modality", &prior.by_modality), ("question type", &prior.by_question_type)] {
        let _ = writeln!(text, "\noption prior by {title}");
        for (name, score) in scores {
            let _ = writeln!(text, "  {name:<28} {:.4}  n {}", score.accuracy, score.n);
        }
    }
}

/// Splits the questions by image and writes the lists of ids to `--out`, by default `splits` under the data root.
///
/// # Errors
/// A usage error for shares that make no sense, or when a list of that name is there already.
pub fn split(job: &Job<'_>, test_share: f64, validation_share: f64) -> Result<Outcome> {
    let shares = [
        ("train", 1.0 - test_share - validation_share),
        ("validation", validation_share),
        ("test", test_share),
    ];
    let parts: Vec<Part> = shares
        .into_iter()
        .filter(|(name, share)| *name == "train" || *share != 0.0)
        .map(|(name, share)| Part::new(name, share))
        .collect();
    let dataset = job.config.data.dataset().load(ImageCheck::Ignore)?;
    let out = job.config.out.clone().unwrap_or_else(|| dataset.root.join("splits"));
    let files: Vec<PathBuf> = parts.iter().map(|part| out.join(format!("{}.json", part.name))).collect();
    if let Some(file) = files.iter().find(|file| file.exists()) {
        return Err(Error::usage(format!(
            "there is a split of this name already\n  --> {}\n   = help: name another folder with `--out`",
            file.display()
        )));
    }
    let ids = split::image_grouped(&dataset.samples, &parts, job.config.seed)?;
    let leak = leak_between(&dataset, &ids)?;
    split::write(&out, &ids)?;
    let sizes: Map<String, Value> = ids.iter().map(|(name, ids)| (name.clone(), json!(ids.len()))).collect();
    let mut text = String::new();
    for ((name, ids), file) in ids.iter().zip(&files) {
        let _ = writeln!(text, "{name:<12} {:>7} questions  {}", ids.len(), file.display());
    }
    match leak.all.shared_pixels {
        Some(0) => text.push_str("no test image has the pixels of an image elsewhere\n"),
        Some(count) => {
            let _ = writeln!(
                text,
                "{count} of {} test images have the very pixels of an image elsewhere under another name",
                leak.all.test_images
            );
        }
        None => text.push_str("pixels were not compared: not all images are there\n"),
    }
    let summary = json!({
        "command": "data split", "out": out.display().to_string(), "n": dataset.samples.len(), "parts": sizes, "leak": leak,
    });
    Ok(Outcome::new(summary, text))
}

/// How many images of the last part any other part has too; by pixels when all images are there.
fn leak_between(dataset: &Dataset, ids: &[split::NamedIds]) -> Result<LeakReport> {
    let last: BTreeSet<&str> =
        ids.last().into_iter().flat_map(|(_, ids)| ids.iter().map(String::as_str)).collect();
    let (test, rest): (Vec<Sample>, Vec<Sample>) = dataset
        .samples
        .iter()
        .cloned()
        .partition(|sample| ids.len() > 1 && last.contains(sample.id.as_str()));
    let hash = |path: &Path| -> Result<[u8; 32]> {
        let image = decode::decode_file(path)?;
        let mut hash = [0; 32];
        for (byte, pair) in hash.iter_mut().zip(image.sha256().as_bytes().chunks_exact(2)) {
            let digits = std::str::from_utf8(pair).map_err(anyhow::Error::from)?;
            *byte = u8::from_str_radix(digits, 16).map_err(anyhow::Error::from)?;
        }
        Ok(hash)
    };
    let are_there = select::missing_images(&dataset.root, &dataset.samples).is_empty();
    let of = |samples| Dataset::new(&dataset.root, samples);
    split::leak(&of(rest), &of(test), are_there.then_some(&hash))
}

/// Draws phantoms into `out`.
///
/// # Errors
/// Those of [`phantom::generate`].
pub fn phantom(config: &PhantomConfig, out: &Path, progress: &dyn Progress) -> Result<Outcome> {
    let mut started = false;
    phantom::generate(config, out, &mut |done, total| {
        if !started {
            progress.start(total, 0, "draw phantoms");
            started = true;
        }
        progress.tick(done, &[]);
    })?;
    progress.finish();
    let dataset = data::load(out)?;
    let images: BTreeSet<&PathBuf> = dataset.samples.iter().map(|sample| &sample.image).collect();
    let summary = json!({
        "command": "data phantom",
        "out": out.display().to_string(),
        "config": config,
        "n": dataset.samples.len(),
        "images": images.len(),
    });
    let text = format!(
        "{}: {} questions about {} drawn images (not for any clinical use)\n",
        out.display(),
        dataset.samples.len(),
        images.len()
    );
    Ok(Outcome::new(summary, text))
}

/// Writes the selected questions to `--out` in another format: `omnimedvqa` (a whole tree, images included where they
/// are there), `med_r1` (one file for each modality; ids, question types and reasoning have no place in it), `llava` (one JSON
/// array of conversations, images included) or `messages` (the same as chat messages, one record in each line).
///
/// # Errors
/// A usage error without `--out`, for an unknown format or an occupied directory; a data error for questions that the
/// format cannot hold.
pub fn convert(job: &Job<'_>, to: Option<&str>) -> Result<Outcome> {
    let Some(out) = &job.config.out else {
        return Err(Error::usage(
            "where to write is not said\n   = help: name a new directory with `--out DIR`",
        ));
    };
    let to = to.unwrap_or("omnimedvqa");
    let write = match to {
        "omnimedvqa" => omnimedvqa_files,
        "med_r1" => med_r1_files,
        "llava" => llava_files,
        "messages" => messages_files,
        other => {
            return Err(Error::usage(format!(
                "unknown format `{other}`\n   = help: there are omnimedvqa, med_r1, llava and messages"
            )));
        }
    };
    refuse_occupied(out)?;
    let dataset = job.config.data.dataset().load(ImageCheck::Ignore)?;
    let files = write(&dataset.samples);
    for (file, (records, _)) in &files {
        let is_lines = file.extension().is_some_and(|end| end == "jsonl");
        let text = if is_lines {
            records.iter().map(|record| format!("{record}\n")).collect::<Vec<_>>().concat()
        } else {
            format!("{:#}\n", Value::from(records.clone()))
        };
        write_atomic(&out.join(file), text.as_bytes())?;
    }
    for (file, (_, samples)) in &files {
        read_back(&out.join(file), samples, to != "med_r1")?;
    }
    let mut images = 0;
    if to != "med_r1" {
        images = take_images(&dataset, out, job.progress)?;
    }
    let summary = json!({
        "command": "data convert", "to": to, "out": out.display().to_string(), "n": dataset.samples.len(),
        "files": files.keys().map(|file| file.display().to_string()).collect::<Vec<_>>(), "images": images,
    });
    let text = format!(
        "{}: {} questions in {} files, {images} images\n",
        out.display(),
        dataset.samples.len(),
        files.len()
    );
    Ok(Outcome::new(summary, text))
}

/// Per file, relative to the output, its records and the samples they were made of.
type Files<'a> = BTreeMap<PathBuf, (Vec<Value>, Vec<&'a Sample>)>;

fn omnimedvqa_files(samples: &[Sample]) -> Files<'_> {
    let mut files = Files::new();
    for sample in samples {
        let name = format!("QA_information/Open-access/{}.json", plain_name(&sample.dataset));
        let mut record = json!({
            "dataset": sample.dataset,
            "question_id": sample.id,
            "question_type": sample.question_type,
            "question": sample.question,
            "gt_answer": sample.answer_text(),
            "image_path": sample.image,
            "modality_type": sample.modality_raw,
        });
        for (index, option) in sample.options.iter().enumerate() {
            record[format!("option_{}", letter(index))] = json!(option);
        }
        if let Some(reasoning) = &sample.reasoning {
            record["reasoning"] = json!(reasoning);
        }
        let file = files.entry(name.into()).or_default();
        file.0.push(record);
        file.1.push(sample);
    }
    files
}

fn med_r1_files(samples: &[Sample]) -> Files<'_> {
    let mut files = Files::new();
    for sample in samples {
        let options: Vec<String> = sample
            .options
            .iter()
            .enumerate()
            .map(|(index, text)| format!("{}){text}", letter(index)))
            .collect();
        let record = json!({
            "image": sample.image,
            "problem": format!("{} {}", sample.question, options.join(", ")),
            "solution": format!("<answer> {} </answer>", sample.answer_letter()),
        });
        let file = files.entry(format!("{}.json", plain_name(&sample.modality_raw)).into()).or_default();
        file.0.push(record);
        file.1.push(sample);
    }
    files
}

fn llava_files(samples: &[Sample]) -> Files<'_> {
    one_file("questions.json", samples, |record, question, completion| {
        record["conversations"] = json!([
            {"from": "human", "value": format!("<image>\n{question}")},
            {"from": "gpt", "value": completion},
        ]);
    })
}

fn messages_files(samples: &[Sample]) -> Files<'_> {
    one_file("questions.jsonl", samples, |record, question, completion| {
        record["messages"] = json!([
            {"role": "user", "content": [{"type": "image"}, {"type": "text", "text": question}]},
            {"role": "assistant", "content": [{"type": "text", "text": completion}]},
        ]);
        // Readers of this form know a list of images only.
        record["images"] = json!([record["image"]]);
        if let Some(fields) = record.as_object_mut() {
            fields.shift_remove("image");
        }
    })
}

/// All samples in one file. What the turns cannot tell for certain stands in fields of its own, which other programs ignore:
/// above all the reasoning with a placeholder where its turn has the letter.
fn one_file<'a>(name: &str, samples: &'a [Sample], add_turns: fn(&mut Value, &str, &str)) -> Files<'a> {
    let records = samples.iter().map(|sample| {
        let options = sample.options.iter().enumerate();
        let lines: Vec<String> =
            options.map(|(index, text)| format!("\n{}) {text}", letter(index))).collect();
        let completion = PromptTemplate::MedR1Think.target(sample, sample.reasoning.is_some());
        let mut record = json!({"id": sample.id, "image": sample.image});
        add_turns(&mut record, &format!("{}{}", sample.question, lines.concat()), &completion);
        record["options"] = json!(sample.options);
        record["answer"] = json!(sample.answer_letter().to_string());
        record["dataset"] = json!(sample.dataset);
        record["modality"] = json!(sample.modality_raw);
        record["question_type"] = json!(sample.question_type);
        if let Some(reasoning) = &sample.reasoning {
            record["reasoning"] = json!(reasoning);
        }
        record
    });
    Files::from([(name.into(), (records.collect(), samples.iter().collect()))])
}

/// A text as a file's name: what separates folders, or hides a file, is replaced.
fn plain_name(text: &str) -> String {
    let name: String = text.trim().replace(['/', '\\', '\0', ':'], "_");
    if name.is_empty() || name.starts_with('.') { format!("_{name}") } else { name }
}

/// Reads a written file and compares: a question that the format cannot hold must not be lost quietly. `is_whole`: the format
/// has a place for everything.
fn read_back(file: &Path, samples: &[&Sample], is_whole: bool) -> Result<()> {
    let reading = data::read(file, None)?;
    let mut problems = reading.problems;
    let key = |sample: &Sample| {
        let options: Vec<String> = sample.options.iter().map(|text| text.trim().to_owned()).collect();
        let answer = sample.answer_text().trim().to_lowercase();
        let about = is_whole.then(|| {
            let texts = [&sample.id, &sample.dataset, &sample.modality_raw, &sample.question_type];
            (texts.map(|text| text.trim().to_owned()), sample.reasoning.clone())
        });
        (sample.question.trim().to_owned(), options, answer, sample.image.clone(), about)
    };
    if problems.is_empty() {
        for (written, read) in samples.iter().zip(&reading.samples).filter(|(a, b)| key(a) != key(b)) {
            let message = format!(
                "the format cannot hold this question: it reads back as `{}` with the options {:?}",
                read.question, read.options
            );
            problems.push(Problem { id: Some(written.id.clone()), ..Problem::of_file(file, message) });
        }
    }
    problem::refuse_all(&problems)
}

/// Puts the images into the tree as further names of the same files, or copies; returns how many.
fn take_images(dataset: &Dataset, out: &Path, progress: &dyn Progress) -> Result<usize> {
    let missing = select::missing_images(&dataset.root, &dataset.samples);
    let images: BTreeSet<&PathBuf> = dataset
        .samples
        .iter()
        .map(|sample| &sample.image)
        .filter(|image| !missing.contains(*image))
        .collect();
    progress.start(images.len(), 0, "images");
    for (done, image) in images.iter().enumerate() {
        link_or_copy(&dataset.root.join(image), &out.join(image))?;
        progress.tick(done + 1, &[]);
    }
    progress.finish();
    if !missing.is_empty() {
        progress.note(&format!(
            "{} images are not under {}: put them into {} under the same paths",
            missing.len(),
            dataset.root.display(),
            out.display()
        ));
    }
    Ok(images.len())
}
