//! What is wrong with a record, where it stands, and how all of it is said at once.

use std::collections::HashSet;
use std::fmt::{self, Write as _};
use std::path::{Path, PathBuf};
use std::sync::Arc;

use serde_json::Value;

use super::records::Records;
use crate::error::{Error, Result};

/// So many problems are listed by whatever wants to do something else with the data; the rest are counted.
const LISTED: usize = 200;

/// One thing wrong with one record (or one file).
#[derive(Debug, Clone, PartialEq, Eq, Hash)]
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

/// `1 problem`, `2 problems`.
pub fn counted(count: usize) -> String {
    format!("{count} problem{}", if count == 1 { "" } else { "s" })
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
    let mut text = format!("{} in the data", counted(problems.len()));
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

/// Each of these problems once, in order: data sets that are made of the same files all tell those of the files.
pub fn distinct<'a>(problems: impl IntoIterator<Item = &'a Problem>) -> Vec<Problem> {
    let mut seen = HashSet::new();
    problems.into_iter().filter(|problem| seen.insert(*problem)).cloned().collect()
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
    match (optional_text(record, key)?, record.get(key)) {
        (Some(text), _) => Ok(text),
        (None, Some(Value::Null)) => Err(format!("`{key}` is null, a text was expected")),
        (None, Some(_)) => Err(format!("`{key}` is blank")),
        (None, None) => Err(format!("`{key}` is missing{}", near_miss(record, key))),
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

/// A name in the record that `key`, which it lacks, may be meant by.
fn near_miss(record: &Value, key: &str) -> String {
    let keys = record.as_object().into_iter().flat_map(|map| map.keys());
    keys.map(|found| (strsim::damerau_levenshtein(found, key), found))
        .filter(|(distance, _)| (1..=2).contains(distance))
        .min()
        .map_or_else(String::new, |(_, found)| format!(" (did you mean `{key}` by `{found}`?)"))
}

/// The id that a record gives itself, whatever its format calls it; numbers count. None where it is absent, null or blank.
///
/// # Errors
/// When it is something else than a text or a number: an invented one in its place would go unseen.
pub fn id_field(record: &Value) -> std::result::Result<Option<String>, String> {
    for key in ["question_id", "id"] {
        match record.get(key) {
            Some(Value::String(text)) if !text.trim().is_empty() => return Ok(Some(text.clone())),
            Some(Value::Number(number)) => return Ok(Some(number.to_string())),
            None | Some(Value::Null | Value::String(_)) => {}
            Some(other) => {
                return Err(format!("`{key}` is {}, a text or a number was expected", kind(other)));
            }
        }
    }
    Ok(None)
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
        let id = self.records.get(index).and_then(|record| id_field(record).ok().flatten());
        Problem { id, ..self.place(index).problem(message) }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use serde_json::json;

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

    #[test]
    fn a_field_that_is_there_is_told_by_what_it_is_and_another_name_only_where_it_lacks() {
        for (record, expected) in [
            (json!({"gt_answer": null}), "`gt_answer` is null, a text was expected"),
            (json!({"gt_answer": null, "gt_answers": "x"}), "`gt_answer` is null, a text was expected"),
            (json!({"gt_answer": 7}), "`gt_answer` is a number, a text was expected"),
            (json!({"gt_answer": " "}), "`gt_answer` is blank"),
            (
                json!({"gt_answers": "x"}),
                "`gt_answer` is missing (did you mean `gt_answer` by `gt_answers`?)",
            ),
            (json!({"question": "x"}), "`gt_answer` is missing"),
        ] {
            assert_eq!(text_field(&record, "gt_answer").unwrap_err(), expected, "{record}");
        }
    }

    #[test]
    fn an_id_is_a_text_or_a_number() {
        for (record, expected) in [
            (json!({"id": "q"}), Ok(Some("q"))),
            (json!({"id": 7}), Ok(Some("7"))),
            (json!({"question_id": null, "id": "q"}), Ok(Some("q"))),
            (json!({"id": null}), Ok(None)),
            (json!({"id": " "}), Ok(None)),
            (json!({}), Ok(None)),
            (json!({"id": {"a": 1}}), Err("`id` is an object, a text or a number was expected")),
            (json!({"id": ["q"]}), Err("`id` is an array, a text or a number was expected")),
            (
                json!({"question_id": true, "id": "q"}),
                Err("`question_id` is true or false, a text or a number was expected"),
            ),
        ] {
            let expected = expected.map(|id| id.map(str::to_owned)).map_err(str::to_owned);
            assert_eq!(id_field(&record), expected, "{record}");
        }
    }

    #[test]
    fn what_two_sets_tell_of_one_file_is_one_problem() {
        let of = |name: &str, line| Problem { line, ..Problem::of_file(Path::new(name), "p") };
        let (a, b, c) = (of("f.json", Some(1)), of("f.json", Some(2)), of("g.json", Some(1)));
        assert_eq!(distinct([&b, &a, &b, &c, &a]), [b, a, c]);
    }
}
