//! The records of one file of questions, whichever of two layouts it has: a JSON array, or JSON lines (one record a line).
//!
//! The layout shows in the first character, not in the file's name. What a record means is no business of this module.

use std::collections::HashSet;
use std::path::{Path, PathBuf};

use serde_json::Value;

use super::problem::{self, Problem};
use crate::error::{Error, Result};
use crate::files;

/// So many unreadable lines of one file are told one by one; the rest are counted.
const LINES_TOLD: usize = 200;

/// The records of one file, with what it takes to find their lines.
#[derive(Debug)]
pub struct Records {
    /// The file.
    pub file: PathBuf,
    /// In order; null where a line could not be read.
    values: Vec<Value>,
    /// Places of those.
    unreadable: HashSet<usize>,
    lines: Lines,
}

/// Where records start.
#[derive(Debug)]
enum Lines {
    /// To be found in the text of an array: only problems need them.
    In(String),
    /// The one-based line of each record.
    Known(Vec<usize>),
}

impl Records {
    /// Every readable record with its zero-based place in the file.
    pub fn iter(&self) -> impl Iterator<Item = (usize, &Value)> {
        self.values.iter().enumerate().filter(|(index, _)| !self.unreadable.contains(index))
    }

    /// The record at a zero-based place.
    pub fn get(&self, index: usize) -> Option<&Value> {
        self.values.get(index)
    }

    /// Whether any record has a field `key`.
    pub fn has(&self, key: &str) -> bool {
        self.values.iter().any(|record| record.get(key).is_some())
    }

    /// The one-based line on which each record starts.
    pub fn lines(&self) -> Vec<usize> {
        match &self.lines {
            Lines::In(text) => record_lines(text),
            Lines::Known(lines) => lines.clone(),
        }
    }
}

/// Reads one file. What is wrong with the file as a whole, or with single lines, is left in `problems`; `None` when there
/// is no record to go on with.
///
/// # Errors
/// [`Error::Io`] when the file cannot be read at all.
pub fn read(file: &Path, problems: &mut Vec<Problem>) -> Result<Option<Records>> {
    let bytes = files::read(file, "cannot read the questions")?;
    let bytes = match String::from_utf8(bytes) {
        Ok(text) => return of_text(file, text, problems),
        Err(error) => error.into_bytes(),
    };
    // What is no text spoils the records that hold it, not the file.
    let mut own = Vec::new();
    let found = of_text(file, marked(&bytes), &mut own)?;
    let Some(mut records) = found.filter(|records| records.iter().any(|(_, record)| is_marked(record)))
    else {
        let good = bytes.utf8_chunks().next().map_or(0, |chunk| chunk.valid().len());
        let line = bytes[..good].split(|byte| *byte == b'\n').count();
        problems.push(Problem { line: Some(line), ..Problem::of_file(file, NO_TEXT) });
        return Ok(None);
    };
    problems.append(&mut own);
    let lines = records.lines();
    let spoilt: Vec<usize> = records.iter().filter(|(_, record)| is_marked(record)).map(|(i, _)| i).collect();
    for index in spoilt {
        let (record, line) = (Some(index + 1), lines.get(index).copied());
        problems.push(Problem { record, line, ..Problem::of_file(file, NO_TEXT) });
        records.unreadable.insert(index);
    }
    Ok(Some(records))
}

const NO_TEXT: &str = "not UTF-8 text";

/// Stands for bytes that are no text: a code point that no text holds.
const MARK: char = '\u{fdd0}';

/// The text of `bytes`, with the mark in the place of whatever is none.
fn marked(bytes: &[u8]) -> String {
    let mut text = String::with_capacity(bytes.len());
    for chunk in bytes.utf8_chunks() {
        text.push_str(chunk.valid());
        if !chunk.invalid().is_empty() {
            text.push(MARK);
        }
    }
    text
}

fn is_marked(value: &Value) -> bool {
    match value {
        Value::String(text) => text.contains(MARK),
        Value::Array(values) => values.iter().any(is_marked),
        Value::Object(fields) => fields.iter().any(|(key, value)| key.contains(MARK) || is_marked(value)),
        _ => false,
    }
}

/// As [`read`], of the text of the file.
fn of_text(file: &Path, text: String, problems: &mut Vec<Problem>) -> Result<Option<Records>> {
    let mut refuse = |message: String, line: Option<usize>| {
        problems.push(Problem { line, ..Problem::of_file(file, message) });
        Ok(None)
    };
    let text = text.strip_prefix('\u{feff}').map(str::to_owned).unwrap_or(text);
    let start = text.trim_start();
    if start.is_empty() {
        return refuse("empty file: a JSON array of records, or JSON lines, was expected".into(), None);
    }
    if !start.starts_with('[') {
        return Ok(read_lines(file, &text, problems));
    }
    match serde_json::from_str(&text) {
        Ok(Value::Array(values)) if values.is_empty() => {
            refuse("no record in the file: its array is empty".into(), None)
        }
        Ok(Value::Array(values)) => Ok(Some(Records {
            file: file.to_path_buf(),
            values,
            unreadable: HashSet::new(),
            lines: Lines::In(text),
        })),
        Ok(other) => refuse(unexpected(&other), None),
        Err(error) => refuse(format!("not JSON: {error}"), Some(error.line())),
    }
}

/// One record a line, blank lines aside. A file without any object in a line of its own is no JSON lines: one problem says
/// what it is instead.
fn read_lines(file: &Path, text: &str, problems: &mut Vec<Problem>) -> Option<Records> {
    let (mut values, mut lines, mut unreadable) = (Vec::new(), Vec::new(), HashSet::new());
    let mut broken = Vec::new();
    for (number, line) in (1..).zip(text.lines()).filter(|(_, line)| !line.trim().is_empty()) {
        let value = serde_json::from_str(line).unwrap_or_else(|error| {
            if unreadable.len() < LINES_TOLD {
                broken.push(Problem {
                    record: Some(values.len() + 1),
                    line: Some(number),
                    ..Problem::of_file(file, format!("not JSON: {}", in_line(&error)))
                });
            }
            unreadable.insert(values.len());
            Value::Null
        });
        values.push(value);
        lines.push(number);
    }
    if !values.iter().any(Value::is_object) {
        let (message, line) = match serde_json::from_str::<Value>(text) {
            Ok(whole) => (unexpected(&whole), None),
            Err(error) => (format!("not JSON: {error}"), Some(error.line())),
        };
        problems.push(Problem { line, ..Problem::of_file(file, message) });
        return None;
    }
    problems.append(&mut broken);
    if unreadable.len() > LINES_TOLD {
        let message = format!("{} further lines are not JSON", unreadable.len() - LINES_TOLD);
        problems.push(Problem::of_file(file, message));
    }
    Some(Records { file: file.to_path_buf(), values, unreadable, lines: Lines::Known(lines) })
}

fn unexpected(value: &Value) -> String {
    format!("an array of records, or one record in each line, was expected, found {}", problem::kind(value))
}

/// The words of an error about a single line: its own count of lines would mislead.
fn in_line(error: &serde_json::Error) -> String {
    let text = error.to_string();
    let words = text.rsplit_once(" at line ").map_or(text.as_str(), |(words, _)| words);
    format!("{words} at column {}", error.column())
}

/// The `.json` and `.jsonl` files directly in `folder`, sorted by name.
///
/// # Errors
/// [`Error::Io`] when the folder cannot be listed.
pub fn files_in(folder: &Path) -> Result<Vec<PathBuf>> {
    let entries =
        std::fs::read_dir(folder).map_err(|error| Error::io("cannot list the folder", folder, error))?;
    let mut files = Vec::new();
    for entry in entries {
        let path = entry.map_err(|error| Error::io("cannot list the folder", folder, error))?.path();
        let hidden = path.file_name().is_some_and(|name| name.to_string_lossy().starts_with('.'));
        let is_ours =
            |end: &std::ffi::OsStr| ["json", "jsonl"].iter().any(|own| end.eq_ignore_ascii_case(own));
        if !hidden && path.extension().is_some_and(is_ours) {
            files.push(path);
        }
    }
    files.sort();
    Ok(files)
}

/// How many records a file has, whatever is in them; 0 when it is not of either layout.
pub fn count(file: &Path) -> usize {
    let Ok(bytes) = files::read(file, "cannot read the questions") else { return 0 };
    if let Ok(records) = serde_json::from_slice::<Vec<serde::de::IgnoredAny>>(&bytes) {
        return records.len();
    }
    let lines = bytes.split(|byte| *byte == b'\n').filter(|line| !line.trim_ascii().is_empty());
    lines.filter(|line| serde_json::from_slice::<serde::de::IgnoredAny>(line).is_ok()).count()
}

/// The one-based line on which each element of a JSON array starts. The text is known to be valid JSON.
fn record_lines(text: &str) -> Vec<usize> {
    let (mut lines, mut line, mut depth) = (Vec::new(), 1, 0usize);
    let (mut in_string, mut escaped, mut awaiting) = (false, false, true);
    for byte in text.bytes() {
        if byte == b'\n' {
            line += 1;
        }
        if depth == 1 && awaiting && !in_string && !byte.is_ascii_whitespace() && byte != b']' {
            lines.push(line);
            awaiting = false;
        }
        match byte {
            _ if escaped => escaped = false,
            b'\\' if in_string => escaped = true,
            b'"' => in_string = !in_string,
            _ if in_string => {}
            b'[' | b'{' => depth += 1,
            b']' | b'}' => depth = depth.saturating_sub(1),
            b',' if depth == 1 => awaiting = true,
            _ => {}
        }
    }
    lines
}

#[cfg(test)]
mod tests {
    use super::*;
    use serde_json::json;

    /// Places and values of what is readable, lines of all, and the problems.
    fn read_text(text: &str) -> (Vec<(usize, Value)>, Vec<usize>, Vec<String>) {
        let folder = tempfile::tempdir().unwrap();
        let file = folder.path().join("q.jsonl");
        std::fs::write(&file, text).unwrap();
        let mut problems = Vec::new();
        let records = read(&file, &mut problems).unwrap();
        let told =
            problems.iter().map(|p| p.to_string().split_once("q.jsonl").unwrap().1.to_owned()).collect();
        let Some(records) = records else { return (Vec::new(), Vec::new(), told) };
        let values = records.iter().map(|(index, value)| (index, value.clone())).collect();
        (values, records.lines(), told)
    }

    #[test]
    fn the_line_of_each_record_is_found_whatever_the_layout() {
        let text = "[\n {\"a\": \"x,[{\\\"\"},\n\n {\"a\": [1,\n 2]}, {\"b\": {}},\n 7\n]";
        assert!(serde_json::from_str::<Value>(text).is_ok());
        assert_eq!(record_lines(text), [2, 4, 5, 6]);
        let (values, lines, problems) = read_text("\u{feff}\r\n{\"a\": 1}\r\n\n  {\"a\": [2]}\n");
        assert_eq!(values, [(0, json!({"a": 1})), (1, json!({"a": [2]}))]);
        assert_eq!((lines, problems.len()), (vec![2, 4], 0));
    }

    #[test]
    fn a_broken_line_keeps_its_place_and_the_others_stay() {
        let (values, lines, problems) = read_text("{\"a\": 1}\n\n{\"a\": \"tor\n7\n{\"a\": 4}");
        assert_eq!(values, [(0, json!({"a": 1})), (2, json!(7)), (3, json!({"a": 4}))]);
        assert_eq!(lines, [1, 3, 4, 5]);
        assert_eq!(problems, [":3: record 2: not JSON: EOF while parsing a string at column 10"]);
        // Many are counted, not listed.
        let (values, _, problems) = read_text(&format!("{{\"a\": 1}}\n{}", "?\n".repeat(250)));
        assert_eq!((values.len(), problems.len()), (1, 201));
        assert_eq!(problems[200], ": 50 further lines are not JSON");
    }

    #[test]
    fn what_is_neither_array_nor_lines_is_one_problem() {
        for (text, expected) in [
            ("", ": empty file"),
            ("\n \n", ": empty file"),
            (
                "{\n \"a\": 1\n}",
                ": an array of records, or one record in each line, was expected, found an object",
            ),
            ("\"x\"", ": an array of records, or one record in each line, was expected, found a text"),
            ("<html>\n<p>\n", ":1: not JSON: expected value"),
            ("[{\"a\": 1},\n {]", ":2: not JSON"),
            ("[]", ": no record in the file"),
        ] {
            let (values, _, problems) = read_text(text);
            assert!(values.is_empty() && problems.len() == 1, "{text}: {problems:?}");
            assert!(problems[0].starts_with(expected), "{text}: {problems:?}");
        }
        let folder = tempfile::tempdir().unwrap();
        let file = folder.path().join("q.json");
        std::fs::write(&file, b"{\"a\": 1}\n{\"a\": \"\xff\"}\n").unwrap();
        let mut problems = Vec::new();
        let records = read(&file, &mut problems).unwrap().unwrap();
        assert_eq!(records.iter().map(|(index, _)| index).collect::<Vec<_>>(), [0]);
        assert!(problems[0].to_string().ends_with("q.json:2: record 2: not UTF-8 text"), "{problems:?}");
    }

    #[test]
    fn what_is_no_text_spoils_the_records_that_hold_it() {
        let folder = tempfile::tempdir().unwrap();
        let file = folder.path().join("q.json");
        let told = |bytes: &[u8]| -> (Vec<usize>, Vec<String>) {
            std::fs::write(&file, bytes).unwrap();
            let mut problems = Vec::new();
            let records = read(&file, &mut problems).unwrap();
            let left = records.iter().flat_map(|records| records.iter().map(|(index, _)| index)).collect();
            let name = file.display().to_string();
            (left, problems.iter().map(|problem| problem.to_string().replace(&name, "")).collect())
        };
        let [text, wrong] = ["not UTF-8 text", "not JSON: "];
        // In an array: in a value, in a key, in two records of one line; what is not JSON is told beside it.
        let (left, problems) =
            told(b"[{\"a\": 1},\n{\"a\": [\"\xe9\"]}, {\"\xff\": 2},\n{\"a\": \"\xef\xbf\xbd\"}]");
        assert_eq!(left, [0, 3]);
        assert_eq!(problems, [format!(":2: record 2: {text}"), format!(":2: record 3: {text}")]);
        let (left, problems) = told(b"{\"a\": \"\xe9\xe8\"}\n{\"a\": 1}\n{torn\n");
        assert_eq!(left, [1]);
        assert!(problems[0].starts_with(&format!(":3: record 3: {wrong}")), "{problems:?}");
        assert_eq!(problems[1..], [format!(":1: record 1: {text}")]);
        // Where nothing can be read, that it is no text is the reason.
        for bytes in [&b"\xff\xfe{\0}\0"[..], b"[{\"a\": 1},\n \xe9]", b"\n\xe9"] {
            let (left, problems) = told(bytes);
            assert_eq!((left.len(), problems.len()), (0, 1), "{problems:?}");
            assert!(problems[0].ends_with(text), "{problems:?}");
        }
    }

    #[test]
    fn records_are_counted_in_both_layouts() {
        let folder = tempfile::tempdir().unwrap();
        let file = folder.path().join("q");
        for (text, expected) in [("[{}, {}]", 2), ("{}\n\n{}\n{}", 3), ("no", 0), ("", 0)] {
            std::fs::write(&file, text).unwrap();
            assert_eq!(count(&file), expected, "{text}");
        }
    }
}
