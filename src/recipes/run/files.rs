//! Files that survive a kill at any moment: whole-file replacement, and JSON lines with a possibly torn end.

use crate::error::{Error, Result};
use serde_json::Value;
use std::fs::{self, File, OpenOptions};
use std::io::{ErrorKind, Write as _};
use std::path::{Path, PathBuf};

/// Replaces `path` by `bytes` as a whole: a reader, or a kill, sees the old content or the new, never a part.
pub fn write_atomic(path: &Path, bytes: &[u8]) -> Result<()> {
    if let Some(parent) = path.parent() {
        fs::create_dir_all(parent)
            .map_err(|error| Error::io("cannot create the directory", parent, error))?;
    }
    let mut name = path.file_name().unwrap_or_default().to_os_string();
    name.push(".tmp");
    let temporary = path.with_file_name(name);
    let written = File::create(&temporary).and_then(|mut file| {
        file.write_all(bytes)?;
        file.sync_all()
    });
    let replaced = written.and_then(|()| fs::rename(&temporary, path)).map_err(|error| {
        // What could not be written whole is of no use to anyone; the error is what matters.
        let _ = fs::remove_file(&temporary);
        Error::io("cannot write", path, error)
    });
    // The new name is on the disk once the directory is; not every file system lets one open a directory.
    if let (Ok(()), Some(Ok(parent))) = (&replaced, path.parent().map(File::open)) {
        let _ = parent.sync_all();
    }
    replaced
}

/// A file of JSON objects, one a line, appended and flushed one by one.
#[derive(Debug)]
pub struct JsonLines {
    path: PathBuf,
    file: Option<File>,
}

impl JsonLines {
    /// The file at `path`; it is created by the first line.
    pub fn new(path: PathBuf) -> Self {
        Self { path, file: None }
    }

    /// Where it lies.
    pub fn path(&self) -> &Path {
        &self.path
    }

    /// Appends one object. A kill during the call leaves at most one torn line, at the end.
    pub fn append(&mut self, value: &Value) -> Result<()> {
        self.append_all(std::slice::from_ref(value))
    }

    /// Appends several objects in one write.
    pub fn append_all(&mut self, values: &[Value]) -> Result<()> {
        let lines: String = values.iter().map(|value| value.to_string() + "\n").collect();
        let file = match &mut self.file {
            Some(file) => file,
            empty => {
                let opened = OpenOptions::new().create(true).append(true).open(&self.path);
                empty.insert(opened.map_err(|error| Error::io("cannot open", &self.path, error))?)
            }
        };
        file.write_all(lines.as_bytes()).map_err(|error| unwritten(&self.path, error))
    }

    /// Brings the lines so far to the disk: a power cut cannot take them back.
    pub fn sync(&self) -> Result<()> {
        let Some(file) = &self.file else { return Ok(()) };
        file.sync_all().map_err(|error| Error::io("cannot bring to the disk", &self.path, error))
    }

    /// Every whole line. A last line without its end, or that is no JSON, is torn and left out.
    ///
    /// # Errors
    /// A data error for a broken line anywhere else.
    pub fn read(&self) -> Result<Vec<Value>> {
        Ok(self.read_measured()?.0.into_iter().map(|(value, _)| value).collect())
    }

    /// Cuts a torn last line off and returns the whole ones.
    pub fn recover(&mut self) -> Result<Vec<Value>> {
        self.keep_while(|_| true)?;
        self.read()
    }

    /// Keeps the lines before the first for which `keep` is false, and cuts off the rest.
    pub fn keep_while(&mut self, keep: impl Fn(&Value) -> bool) -> Result<()> {
        let (lines, all_bytes) = self.read_measured()?;
        let kept = lines.iter().take_while(|(value, _)| keep(value)).map(|(_, bytes)| bytes).sum();
        if kept != all_bytes {
            self.truncate(kept)?;
        }
        Ok(())
    }

    /// Replaces the whole content.
    pub fn replace(&mut self, values: &[Value]) -> Result<()> {
        let mut text = String::new();
        for value in values {
            text.push_str(&value.to_string());
            text.push('\n');
        }
        self.file = None;
        write_atomic(&self.path, text.as_bytes())
    }

    fn truncate(&mut self, bytes: usize) -> Result<()> {
        self.file = None;
        OpenOptions::new()
            .write(true)
            .open(&self.path)
            .and_then(|file| {
                file.set_len(bytes as u64)?;
                file.sync_all()
            })
            .map_err(|error| Error::io("cannot cut off unfinished lines", &self.path, error))
    }

    /// The whole lines, each with its length in bytes, and the length of the file.
    fn read_measured(&self) -> Result<(Vec<(Value, usize)>, usize)> {
        let bytes = match fs::read(&self.path) {
            Ok(bytes) => bytes,
            Err(error) if error.kind() == ErrorKind::NotFound => return Ok((Vec::new(), 0)),
            Err(error) => return Err(Error::io("cannot read", &self.path, error)),
        };
        let mut values = Vec::new();
        let mut rest = bytes.as_slice();
        for (number, line) in bytes.split_inclusive(|byte| *byte == b'\n').enumerate() {
            rest = &rest[line.len()..];
            match serde_json::from_slice::<Value>(line) {
                Ok(value) if line.ends_with(b"\n") => values.push((value, line.len())),
                _ if rest.is_empty() => break,
                result => {
                    let reason = result.err().map_or_else(String::new, |error| format!(": {error}"));
                    return Err(Error::data(format!(
                        "line {} is no JSON object{reason}\n  --> {}",
                        number + 1,
                        self.path.display()
                    )));
                }
            }
        }
        Ok((values, bytes.len()))
    }
}

/// The error of a line that could not be written; where there was no room for it, with what is kept and how to go on.
fn unwritten(path: &Path, error: std::io::Error) -> Error {
    match error.kind() {
        ErrorKind::StorageFull | ErrorKind::QuotaExceeded | ErrorKind::FileTooLarge => {
            Error::Other(anyhow::anyhow!(
                "cannot append a line: {error}\n  --> {}\n   = help: what was written before is kept, of a training the last checkpoint. Make room (or raise the quota or limit), then run the same command with --resume",
                path.display()
            ))
        }
        _ => Error::io("cannot append a line", path, error),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use serde_json::json;

    fn lines(content: &str) -> (tempfile::TempDir, JsonLines) {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("x.jsonl");
        fs::write(&path, content).unwrap();
        (dir, JsonLines::new(path))
    }

    #[test]
    fn a_torn_last_line_is_cut_off_and_appending_goes_on() {
        for torn in ["{\"id\":\"c\"", "{\"id\":\"c\"}", "\u{0}\u{0}\n", "{"] {
            let (_dir, mut file) = lines(&format!("{{\"id\":\"a\"}}\n{{\"id\":\"b\"}}\n{torn}"));
            assert_eq!(file.recover().unwrap().len(), 2, "{torn:?}");
            file.append(&json!({"id": "c"})).unwrap();
            assert_eq!(
                fs::read_to_string(file.path()).unwrap(),
                "{\"id\":\"a\"}\n{\"id\":\"b\"}\n{\"id\":\"c\"}\n"
            );
        }
    }

    #[test]
    fn a_broken_line_in_the_middle_is_an_error_with_its_number() {
        let (_dir, file) = lines("{\"id\":\"a\"}\n{oops\n{\"id\":\"b\"}\n");
        let error = file.read().unwrap_err();
        assert!(error.to_string().starts_with("line 2 is no JSON object"), "{error}");
        assert_eq!(error.status(), crate::error::ExitStatus::Data);
    }

    #[test]
    fn steps_after_a_checkpoint_are_cut_off() {
        let (_dir, mut file) =
            lines("{\"step\":1,\"loss\":0.1}\n{\"step\":2,\"loss\":1e-9}\n{\"step\":3,\"loss\":0.3}\n{\"st");
        file.keep_while(|value| value["step"].as_u64() <= Some(2)).unwrap();
        let text = fs::read_to_string(file.path()).unwrap();
        assert_eq!(text, "{\"step\":1,\"loss\":0.1}\n{\"step\":2,\"loss\":1e-9}\n");
    }

    #[test]
    fn a_line_that_finds_no_room_is_told_with_what_is_kept_and_how_to_go_on() {
        for (kind, is_full) in [
            (ErrorKind::StorageFull, true),
            (ErrorKind::QuotaExceeded, true),
            (ErrorKind::FileTooLarge, true),
            (ErrorKind::PermissionDenied, false),
        ] {
            let error = unwritten(Path::new("metrics.jsonl"), kind.into());
            assert_eq!(error.status(), crate::error::ExitStatus::Unexpected, "{error}");
            let text = error.to_string();
            assert!(text.contains("cannot append a line") && text.contains("--> metrics.jsonl"), "{text}");
            assert_eq!(text.contains("the last checkpoint") && text.contains("--resume"), is_full, "{text}");
        }
        if cfg!(target_os = "linux") {
            let error = JsonLines::new(PathBuf::from("/dev/full")).append(&json!({"step": 1})).unwrap_err();
            assert!(error.to_string().contains("--resume"), "{error}");
        }
    }

    #[test]
    fn a_refused_write_leaves_the_old_content() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("summary.json");
        write_atomic(&path, b"old").unwrap();
        fs::create_dir(dir.path().join("summary.json.tmp")).unwrap();
        assert!(write_atomic(&path, b"new").is_err());
        assert_eq!(fs::read(&path).unwrap(), b"old");
    }
}
