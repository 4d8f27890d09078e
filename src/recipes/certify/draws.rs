//! The draws of the item in work, kept batch by batch: a killed run goes on inside the item.
//!
//! One line a batch, `{"id", "from", "classes"}`: a letter for each draw, `-` for an answer that cannot be read. The file
//! is gone once the item's record is written; lines of an item that has a record are of no account.

use crate::error::{Error, Result};
use crate::recipes::run::{JsonLines, Run};
use serde_json::{Value, json};
use std::fs;

/// Beside the records, while an item is in work.
const FILE: &str = "draws.jsonl";
/// An answer that cannot be read.
const UNREADABLE: u8 = b'-';

/// Draws of items without a record.
#[derive(Debug)]
pub(super) struct KeptDraws {
    file: JsonLines,
    lines: Vec<Value>,
}

impl KeptDraws {
    /// What an earlier process left; a torn last line is cut off.
    pub(super) fn recover(run: &Run) -> Result<Self> {
        let mut file = JsonLines::new(run.path(FILE));
        let lines = file.recover()?;
        Ok(Self { file, lines })
    }

    /// The classes of an item's first draws, of which `num_options` is the unreadable one.
    ///
    /// # Errors
    /// A data error when draws are missing between others, or a class is none of the item's.
    pub(super) fn of_item(&self, id: &str, num_options: usize) -> Result<Vec<u8>> {
        let mut known = Vec::new();
        for line in self.lines.iter().filter(|line| line["id"] == id) {
            let classes: Option<Vec<u8>> = line["classes"].as_str().and_then(|letters| {
                letters.bytes().map(|letter| class_of(letter, num_options as u8)).collect()
            });
            match classes {
                Some(classes) if line["from"] == known.len() => known.extend(classes),
                _ => {
                    let path = self.file.path().display();
                    return Err(Error::data(format!(
                        "the draws of item `{id}` from {} on do not continue the {} before\n  --> {path}\n   = help: remove the file: the item is then begun again",
                        line["from"],
                        known.len()
                    )));
                }
            }
        }
        Ok(known)
    }

    /// Appends the next draws of an item.
    pub(super) fn append(&mut self, id: &str, from: usize, classes: &[u8], num_options: usize) -> Result<()> {
        let letter = |&class: &u8| {
            char::from(if usize::from(class) < num_options { b'A' + class } else { UNREADABLE })
        };
        let classes: String = classes.iter().map(letter).collect();
        self.file.append(&json!({"id": id, "from": from, "classes": classes}))
    }

    /// Forgets everything: the item has its record.
    pub(super) fn clear(&mut self) -> Result<()> {
        let path = self.file.path().to_path_buf();
        self.lines.clear();
        self.file = JsonLines::new(path.clone());
        match fs::remove_file(&path) {
            Err(error) if error.kind() != std::io::ErrorKind::NotFound => {
                Err(Error::io("cannot remove", &path, error))
            }
            _ => Ok(()),
        }
    }
}

fn class_of(letter: u8, num_options: u8) -> Option<u8> {
    let class = if letter == UNREADABLE { num_options } else { letter.checked_sub(b'A')? };
    (letter == UNREADABLE || class < num_options).then_some(class)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn draws_come_back_as_they_were_kept_and_gaps_are_refused() {
        let dir = tempfile::tempdir().unwrap();
        let mut kept = KeptDraws { file: JsonLines::new(dir.path().join(FILE)), lines: Vec::new() };
        kept.append("done", 0, &[1, 1], 4).unwrap();
        kept.append("x", 0, &[0, 3, 4], 4).unwrap();
        kept.append("x", 3, &[2], 4).unwrap();
        let text = fs::read_to_string(kept.file.path()).unwrap();
        assert_eq!(text.lines().nth(1).unwrap(), r#"{"id":"x","from":0,"classes":"AD-"}"#);
        kept.lines = kept.file.recover().unwrap();
        assert_eq!(kept.of_item("x", 4).unwrap(), [0, 3, 4, 2]);
        assert!(kept.of_item("y", 4).unwrap().is_empty());
        assert!(kept.of_item("x", 3).is_err(), "D is no class of three options");
        kept.lines.remove(1);
        assert!(kept.of_item("x", 4).is_err());
        kept.clear().unwrap();
        kept.clear().unwrap();
        assert!(!kept.file.path().exists() && kept.of_item("x", 4).unwrap().is_empty());
        kept.append("z", 0, &[1], 4).unwrap();
        assert_eq!(fs::read_to_string(kept.file.path()).unwrap().lines().count(), 1);
    }
}
