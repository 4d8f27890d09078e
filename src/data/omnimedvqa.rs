//! OmniMedVQA as it lies on disk: `QA_information/Open-access/<Dataset>.json` beside `Images/<Dataset>/...`.
//!
//! The files' known dirt is accepted where its meaning is plain (a doubled root folder, `modality` for
//! `modality_type`, absent or null options, odd spellings of modalities, an answer that differs from its option in
//! case or outer blanks) and a located problem where it is not. The restricted-access part has no images and is
//! only counted. A chain of thought is no part of it: a column `reasoning` (or another of the names that [`answer::reasoning_of`] knows), or a `solution` of
//! `<think>...</think><answer>...</answer>`, is taken where it is there. The format is described in arXiv 2402.09181.

use std::path::{Path, PathBuf};

use serde_json::Value;

use super::answer;
use super::problem::{self, Collector, Problem, image_field, optional_text, text_field};
use super::{MOST_OPTIONS, Reading, Records, Sample, choices, letter, records, sample};
use crate::error::Result;

/// `option_A` and so on: five in the published files, as many as there are letters elsewhere.
fn option_keys() -> impl Iterator<Item = String> {
    (0..MOST_OPTIONS).map(|index| format!("option_{}", letter(index)))
}

/// The folder that holds `QA_information`: `path` itself, an `OmniMedVQA` folder inside it (unpacking the archive
/// often doubles the name), or the one around when `path` is the `QA_information` folder.
pub fn find_root(path: &Path) -> Option<PathBuf> {
    if path.join("QA_information").is_dir() {
        return Some(path.to_path_buf());
    }
    if path.ends_with("QA_information") && path.is_dir() {
        return path.parent().map(Path::to_path_buf);
    }
    let doubled = path.join("OmniMedVQA");
    if doubled.is_dir() { find_root(&doubled) } else { None }
}

/// Reads the open-access questions under `root`, files sorted by name; counts the restricted ones.
///
/// # Errors
/// When a folder or file cannot be read at all; what is wrong inside files is in the result's problems.
pub fn read(root: &Path) -> Result<Reading> {
    let information = root.join("QA_information");
    let mut reading = Reading { root: root.to_path_buf(), ..Reading::default() };
    let open = information.join("Open-access");
    let files = if open.is_dir() { records::files_in(&open)? } else { Vec::new() };
    if files.is_empty() {
        reading.problems.push(Problem::of_file(&open, "no `.json` or `.jsonl` file of questions here"));
    }
    for file in &files {
        if let Some(found) = records::read(file, &mut reading.problems)? {
            read_records(&found, &mut reading);
        }
    }
    let restricted = information.join("Restricted-access");
    if restricted.is_dir() {
        for file in records::files_in(&restricted)? {
            reading.restricted += records::count(&file);
        }
    }
    Ok(reading)
}

/// Adds the records of one file to `reading`.
pub fn read_records(records: &Records, reading: &mut Reading) {
    let stem = records.file.file_stem().map(|stem| stem.to_string_lossy().into_owned()).unwrap_or_default();
    let mut collector = Collector::new(records);
    for (index, record) in records.iter() {
        reading.take(index, parse(record, &stem), &mut collector);
    }
}

/// One record, or everything that is wrong with it.
fn parse(record: &Value, file_stem: &str) -> std::result::Result<Sample, Vec<String>> {
    if !record.is_object() {
        return Err(vec![format!("an object was expected, found {}", problem::kind(record))]);
    }
    let mut problems = Vec::new();
    let mut text = |key: &str| match text_field(record, key) {
        Ok(text) => text.to_owned(),
        Err(problem) => {
            problems.push(problem);
            String::new()
        }
    };
    let (id, question, question_type) = (text("question_id"), text("question"), text("question_type"));
    let gold = text("gt_answer");
    let modality_raw = match optional_text(record, "modality_type") {
        Ok(Some(found)) => found.to_owned(),
        Ok(None) if record.get("modality").is_some() => text("modality"),
        _ => text("modality_type"),
    };
    let image = image_field(record, "image_path").unwrap_or_else(|problem| {
        problems.push(problem);
        PathBuf::new()
    });
    let options = options_of(record, &mut problems);
    let mut optional = |key: &str| {
        optional_text(record, key).unwrap_or_else(|problem| {
            problems.push(problem);
            None
        })
    };
    let dataset = optional("dataset").unwrap_or(file_stem).to_owned();
    let answer = match find_answer(&gold, &options) {
        Ok(None) if !gold.is_empty() && options.len() > 1 => {
            let there = quoted(&options);
            problems.push(format!("`gt_answer` is none of the options: `{gold}`, options are {there}"));
            None
        }
        Ok(answer) => answer,
        Err(why) => {
            problems.push(format!("`gt_answer`: {why}"));
            None
        }
    };
    let solution = record.get("solution").and_then(Value::as_str);
    let reasoning = answer::reasoning_of(record, &[("`solution`", solution)]).unwrap_or_else(|problem| {
        problems.push(problem);
        None
    });
    // Letters count the options as they stand in the file, which is known here only without a gap.
    let is_gapless =
        option_keys().take(options.len()).all(|key| matches!(optional_text(record, &key), Ok(Some(_))));
    if let (Some(right), Some(Ok(stated))) = (answer, solution.map(|text| answer::stated(text, &options)))
        && stated != right
        && is_gapless
    {
        problems.push(format!(
            "`solution` answers option {}, but `gt_answer` is option {}",
            letter(stated),
            letter(right)
        ));
    }
    match answer {
        Some(answer) if problems.is_empty() => Ok(Sample {
            id,
            dataset,
            modality: sample::modality_name(&modality_raw),
            modality_raw,
            question_type: question_type.trim().to_owned(),
            question,
            options,
            answer,
            image,
            reasoning: reasoning.map(|text| sample::with_placeholder(&text, answer)),
        }),
        _ => Err(problems),
    }
}

/// The options that are there, in order. Absent, null and blank ones are left out: the answer is found by its text,
/// so a gap moves no meaning.
fn options_of(record: &Value, problems: &mut Vec<String>) -> Vec<String> {
    let problems_before = problems.len();
    let mut options = Vec::new();
    for key in option_keys() {
        match optional_text(record, &key) {
            Ok(Some(text)) => options.push(text.to_owned()),
            Ok(None) => {}
            Err(problem) => problems.push(problem),
        }
    }
    if options.len() < 2 && problems.len() == problems_before {
        problems.push(format!(
            "{} option(s), two or more were expected in `option_A`, `option_B`, ...",
            options.len()
        ));
    }
    options
}

/// The option that the answer's text names: the same text, else the same after trimming and case folding. Wrong options may be
/// alike, as some are in the published files.
///
/// # Errors
/// When the text is that of several options.
fn find_answer(gold: &str, options: &[String]) -> std::result::Result<Option<usize>, String> {
    let folded = gold.trim().to_lowercase();
    match choices::only(gold, options, |option| option == gold)? {
        None => choices::only(gold, options, |option| option.trim().to_lowercase() == folded),
        found => Ok(found),
    }
}

fn quoted(options: &[String]) -> String {
    options.iter().map(|option| format!("`{option}`")).collect::<Vec<_>>().join(", ")
}
