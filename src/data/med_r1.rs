//! Med-R1's split files: an array of `{"image", "problem", "solution"}` with the options inside the problem's text.
//!
//! The files carry neither ids, nor modality, nor question type: ids are made from the file's name and the record's
//! place, and the modality or the type is taken from the file's name (`CT(Computed Tomography)_test.json`,
//! `Lesion Grading_train.json`). What the name does not tell is `unknown`.

use serde_json::Value;

use super::answer;
use super::problem::{self, Collector, image_field, text_field};
use super::sample::{self, MODALITIES, QUESTION_TYPES, UNKNOWN};
use super::{Reading, Records, Sample, choices, index_of_letter, letter};

/// What a file's name says about all its records.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) struct FileName {
    pub(super) stem: String,
    pub(super) modality: String,
    pub(super) modality_raw: String,
    pub(super) question_type: String,
}

/// Adds the records of one file to `reading`.
pub fn read_records(records: &Records, reading: &mut Reading) {
    let stem = records.file.file_stem().map(|stem| stem.to_string_lossy().into_owned()).unwrap_or_default();
    let name = FileName::parse(&stem);
    let mut collector = Collector::new(records);
    for (index, record) in records.iter() {
        reading.take(index, parse(record, index, &name), &mut collector);
    }
}

impl FileName {
    pub(super) fn parse(stem: &str) -> Self {
        let mut subject = stem;
        for suffix in ["_train", "_test", "_validation", "_val", "_filtered"] {
            subject = subject.strip_suffix(suffix).unwrap_or(subject);
        }
        let modality = sample::modality_name(subject);
        let known_modality = MODALITIES.contains(&modality.as_str());
        let question_type = QUESTION_TYPES.iter().find(|name| name.eq_ignore_ascii_case(subject));
        Self {
            stem: stem.to_owned(),
            modality: if known_modality { modality } else { UNKNOWN.into() },
            modality_raw: if known_modality { subject.to_owned() } else { UNKNOWN.into() },
            question_type: question_type.map_or(UNKNOWN, |name| name).to_owned(),
        }
    }

    /// The id of a record that has none: the file's name and the record's zero-based place.
    pub(super) fn id(&self, index: usize) -> String {
        format!("{}_{index:06}", self.stem)
    }
}

fn parse(record: &Value, index: usize, name: &FileName) -> std::result::Result<Sample, Vec<String>> {
    if !record.is_object() {
        return Err(vec![format!("an object was expected, found {}", problem::kind(record))]);
    }
    let image = image_field(record, "image");
    // Med-R1's own layout first; MedVLM-R1 and others put the options in lines of their own.
    let split = text_field(record, "problem")
        .and_then(|text| split_options(text).or_else(|why| choices::split(text).map_err(|_| why)));
    let solution = text_field(record, "solution");
    let answer = solution.clone().and_then(letter_of_solution);
    let reasoning = answer::reasoning_of(record, &[("`solution`", solution.ok())]);
    let mut problems: Vec<String> =
        [image.as_ref().err(), split.as_ref().err(), answer.as_ref().err(), reasoning.as_ref().err()]
            .into_iter()
            .flatten()
            .cloned()
            .collect();
    if let (Ok(image), Ok((question, options)), Ok(answer), Ok(reasoning)) = (image, split, answer, reasoning)
    {
        if answer < options.len() {
            let dataset =
                image.components().nth(1).map(|part| part.as_os_str().to_string_lossy().into_owned());
            return Ok(Sample {
                id: name.id(index),
                dataset: dataset.unwrap_or_else(|| name.stem.clone()),
                modality: name.modality.clone(),
                modality_raw: name.modality_raw.clone(),
                question_type: name.question_type.clone(),
                question,
                options,
                answer,
                image,
                reasoning: reasoning.map(|text| sample::with_placeholder(&text, answer)),
            });
        }
        problems.push(format!("`solution` is {}, but there are {} options", letter(answer), options.len()));
    }
    Err(problems)
}

/// Splits `QUESTION A)x, B)y, C)z`. Options may hold commas and brackets of their own: the text is cut only at the
/// first place where the next letter follows `, `.
fn split_options(text: &str) -> std::result::Result<(String, Vec<String>), String> {
    let cut = text
        .match_indices(" A)")
        .find(|(at, _)| text[at + 3..].contains(", B)"))
        .ok_or("`problem` has no options of the form ` A)..., B)...`")?;
    let question = text[..cut.0].trim().to_owned();
    let mut rest = &text[cut.0 + 3..];
    let mut options = Vec::new();
    for next in 1..26 {
        let Some((option, after)) = rest.split_once(&format!(", {})", letter(next))) else { break };
        options.push(option.trim().to_owned());
        rest = after;
    }
    options.push(rest.trim().to_owned());
    match options.iter().position(String::is_empty) {
        _ if question.is_empty() => Err("`problem` has options but no question".into()),
        Some(empty) => Err(format!("option {} in `problem` is blank", letter(empty))),
        None => Ok((question, options)),
    }
}

/// The letter inside `<answer> C </answer>`, or a bare letter.
fn letter_of_solution(text: &str) -> std::result::Result<usize, String> {
    let inside = text
        .split_once("<answer>")
        .and_then(|(_, rest)| rest.split_once("</answer>"))
        .map(|(inside, _)| inside);
    let mut letters = inside.unwrap_or(text).trim().chars();
    match (letters.next().and_then(index_of_letter), letters.next()) {
        (Some(index), None) => Ok(index),
        _ => Err(format!("`solution` holds no single option letter: `{text}`")),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn options_are_cut_only_at_the_next_letter() {
        let (question, options) =
            split_options("Seen in (Fig. 1)? A)Adenoma, benign, B)x (type C) y, C)No, It's normal., D)z")
                .unwrap();
        assert_eq!(question, "Seen in (Fig. 1)?");
        assert_eq!(options, ["Adenoma, benign", "x (type C) y", "No, It's normal.", "z"]);
        assert_eq!(split_options("Q? A)x, B)y").unwrap().1.len(), 2);
        for broken in ["Q?", "Q? A)x", " A)x, B)y", "Q? A), B)y"] {
            assert!(split_options(broken).is_err(), "{broken}");
        }
    }

    #[test]
    fn the_file_name_tells_modality_or_type() {
        let of = |stem| {
            let name = FileName::parse(stem);
            (name.modality, name.question_type)
        };
        let pair = |a: &str, b: &str| (a.to_owned(), b.to_owned());
        assert_eq!(of("OCT (Optical Coherence Tomography_test"), pair("OCT", UNKNOWN));
        assert_eq!(of("CT_test"), pair("CT", UNKNOWN));
        assert_eq!(of("Lesion Grading_train"), pair(UNKNOWN, "Lesion Grading"));
        assert_eq!(of("ISIC2019_filtered_test"), pair(UNKNOWN, UNKNOWN));
    }

    #[test]
    fn a_solution_is_one_letter_in_a_tag() {
        assert_eq!(letter_of_solution("<answer> C </answer>"), Ok(2));
        assert_eq!(letter_of_solution("D"), Ok(3));
        for broken in ["<answer> CD </answer>", "", "<answer></answer>", "<answer> c </answer>"] {
            assert!(letter_of_solution(broken).is_err(), "{broken}");
        }
    }
}
