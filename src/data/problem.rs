//! What is wrong with a record, where it stands, and how all of it is said at once.

use std::fmt::{self, Write as _};
use std::path::{Path, PathBuf};
use std::sync::Arc;

use serde_json::Value;

use super::records::Records;
use crate::error::{Error, Result};

/// So many problems are listed by whatever wants to do something else with the data; the rest are counted.
const LISTED: usize = 200;

/// One thing wrong with one record (or one file).
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Problem {
    /// The file it is in.
    pub file: PathBuf,
    /// One-based position of the record in its file.
    pub record: Option<usize>,
    /// One-based line.
    pub line: Option<usize>,
    /// The record's question id, when it has one.
    pub id: Option<String>,
    /// What is wrong, lower case, no full stop.
    pub message: String,
}

impl Problem {
    /// A problem of a whole file.
    pub fn of_file(file: &Path, message: impl Into<String>) -> Self {
        Self { file: file.to_path_buf(), record: None, line: None, id: None, message: message.into() }
    }
}

impl fmt::Display for Problem {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}", self.file.display())?;
        if let Some(line) = self.line {
            write!(f, ":{line}")?;
        }
        if let Some(record) = self.record {
            write!(f, ": record {record}")?;
        }
        if let Some(id) = &self.id {
            write!(f, " (`{id}`)")?;
        }
        write!(f, ": {}", self.message)
    }
}

/// Where a record stands.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Place {
    /// The file it is in: the same for all of its records.
    pub file: Arc<Path>,
    /// One-based position of the record in its file.
    pub record: usize,
    /// One-based line.
    pub line: Option<usize>,
}

impl Place {
    /// The problem `message` of the record that stands here.
    pub fn problem(&self, message: impl Into<String>) -> Problem {
        Problem { record: Some(self.record), line: self.line, ..Problem::of_file(&self.file, message) }
    }
}

/// Refuses data that has problems, listing the first of them.
///
/// # Errors
/// [`Error::Data`] when `problems` is not empty.
pub fn refuse(problems: &[Problem]) -> Result<()> {
    refuse_listing(problems, LISTED)
}

/// As [`refuse`], listing all of them.
///
/// # Errors
/// [`Error::Data`] when `problems` is not empty.
pub fn refuse_all(problems: &[Problem]) -> Result<()> {
    refuse_listing(problems, problems.len())
}

fn refuse_listing(problems: &[Problem], most: usize) -> Result<()> {
    if problems.is_empty() {
        return Ok(());
    }
    let mut text = match problems.len() {
        1 => "1 problem in the data".to_owned(),
        n => format!("{n} problems in the data"),
    };
    for problem in problems.iter().take(most) {
        let _ = write!(text, "\n  --> {problem}");
    }
    if problems.len() > most {
        let more = problems.len() - most;
        let _ = write!(text, "\n  and {more} more: `safemed data check` lists all of them");
    }
    text.push_str(
        "\n   = help: repair the files, or set `skip_invalid` to leave these records out and count them",
    );
    Err(Error::data(text))
}

/// What a JSON value is, in words.
pub fn kind(value: &Value) -> &'static str {
    match value {
        Value::Null => "null",
        Value::Bool(_) => "true or false",
        Value::Number(_) => "a number",
        Value::String(_) => "a text",
        Value::Array(_) => "an array",
        Value::Object(_) => "an object",
    }
}

/// A required text field of a record, not blank.
///
/// # Errors
/// What is wrong with it.
pub fn text_field<'a>(record: &'a Value, key: &str) -> std::result::Result<&'a str, String> {
    match optional_text(record, key)? {
        Some(text) => Ok(text),
        None if record.get(key).is_some_and(|value| !value.is_null()) => Err(format!("`{key}` is blank")),
        None => Err(format!("`{key}` is missing{}", near_miss(record, key))),
    }
}

/// A text field that may be absent, null or blank.
///
/// # Errors
/// When it is something else than a text.
pub fn optional_text<'a>(record: &'a Value, key: &str) -> std::result::Result<Option<&'a str>, String> {
    match record.get(key) {
        None | Some(Value::Null) => Ok(None),
        Some(Value::String(text)) => Ok((!text.trim().is_empty()).then_some(text)),
        Some(other) => Err(format!("`{key}` is {}, a text was expected", kind(other))),
    }
}

fn near_miss(record: &Value, key: &str) -> String {
    let keys = record.as_object().into_iter().flat_map(|map| map.keys());
    keys.map(|found| (strsim::damerau_levenshtein(found, key), found))
        .filter(|(distance, _)| *distance <= 2)
        .min()
        .map_or_else(String::new, |(_, found)| format!(" (did you mean `{key}` by `{found}`?)"))
}

/// The id that a record gives itself, whatever its format calls it; numbers count.
pub fn id_of(record: &Value) -> Option<String> {
    ["question_id", "id"].into_iter().find_map(|key| match record.get(key)? {
        Value::String(text) if !text.trim().is_empty() => Some(text.clone()),
        Value::Number(number) => Some(number.to_string()),
        _ => None,
    })
}

/// An image path that stays inside the root.
///
/// # Errors
/// When it is absolute or climbs out with `..`.
pub fn image_field(record: &Value, key: &str) -> std::result::Result<PathBuf, String> {
    match record.get(key).and_then(Value::as_array).map(Vec::as_slice) {
        // Writers whose format knows several images put the one into a list.
        Some([Value::String(only)]) if !only.trim().is_empty() => image_path(only, key),
        _ => image_path(text_field(record, key)?, key),
    }
}

/// As [`image_field`], for the text that stands in field `key`.
///
/// # Errors
/// When it is absolute or climbs out with `..`.
pub fn image_path(text: &str, key: &str) -> std::result::Result<PathBuf, String> {
    let path = Path::new(text);
    let inside = path
        .components()
        .all(|part| matches!(part, std::path::Component::Normal(_) | std::path::Component::CurDir));
    if inside { Ok(path.to_path_buf()) } else { Err(format!("`{key}` leaves the data root: `{text}`")) }
}

/// Tells places and problems of the records of one file; finds their lines once, when the first is asked for.
#[derive(Debug)]
pub struct Collector<'a> {
    records: &'a Records,
    file: Arc<Path>,
    lines: Option<Vec<usize>>,
}

impl<'a> Collector<'a> {
    /// For the records of one file.
    pub fn new(records: &'a Records) -> Self {
        Self { records, file: Arc::from(records.file.as_path()), lines: None }
    }

    /// Where the record at zero-based `index` stands.
    pub fn place(&mut self, index: usize) -> Place {
        let lines = self.lines.get_or_insert_with(|| self.records.lines());
        Place { file: self.file.clone(), record: index + 1, line: lines.get(index).copied() }
    }

    /// The problem `message` of the record at zero-based `index`.
    pub fn problem(&mut self, index: usize, message: String) -> Problem {
        Problem { id: self.records.get(index).and_then(id_of), ..self.place(index).problem(message) }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_long_list_is_cut_but_counted() {
        let problems: Vec<_> =
            (0..250).map(|n| Problem::of_file(Path::new("f.json"), format!("p{n}"))).collect();
        let text = refuse(&problems).unwrap_err().to_string();
        assert!(
            text.starts_with("250 problems")
                && text.contains("f.json: p199\n")
                && text.contains("and 50 more: `safemed data check` lists all of them\n")
        );
        assert!(!text.contains("p200"));
        let text = refuse_all(&problems).unwrap_err().to_string();
        assert!(text.starts_with("250 problems") && text.contains("f.json: p249\n"), "{text}");
        assert!(!text.contains(" more"), "{text}");
    }
}
