//! Run directories as a report reads them.

use crate::error::{Error, Result};
use crate::recipes::attack;
use crate::recipes::config::RunConfig;
use crate::recipes::run::JsonLines;
use serde_json::Value;
use std::fs;
use std::path::{Path, PathBuf};

/// One run, read.
#[derive(Debug, Clone, Default)]
pub struct RunDir {
    /// Short name, unique in the report.
    pub name: String,
    /// Where it lies.
    pub dir: PathBuf,
    /// `eval`, `attack`, `certify`, `train` or `demo`.
    pub command: String,
    /// Its configuration; defaults when this version refuses the file.
    pub config: RunConfig,
    /// Why this version refuses the file, if it does.
    pub config_refused: Option<String>,
    /// `run.json`.
    pub facts: Value,
    /// `summary.json`; absent while the run is unfinished.
    pub summary: Option<Value>,
    /// `records.jsonl`.
    pub records: Vec<Value>,
    /// `metrics.jsonl`.
    pub metrics: Vec<Value>,
    /// `completions.jsonl`.
    pub completions: Vec<Value>,
    /// `validation.jsonl`.
    pub validation: Vec<Value>,
    /// `timings.jsonl` of training.
    pub timings: Vec<Value>,
    /// `warnings.jsonl`.
    pub warnings: Vec<Value>,
}

/// Reads the runs at `dirs`; a directory that holds `runs/` stands for itself and for every run in there.
pub(super) fn read_all(dirs: &[PathBuf]) -> Result<Vec<RunDir>> {
    let mut all = Vec::new();
    for dir in dirs {
        let inner = dir.join("runs");
        if inner.is_dir() {
            let entries = fs::read_dir(&inner).map_err(|error| Error::io("cannot read", &inner, error))?;
            let mut found: Vec<PathBuf> =
                entries.filter_map(|entry| entry.ok().map(|entry| entry.path())).collect();
            found.retain(|path| path.join("run.json").exists());
            found.sort_by_key(|path| natural_key(&path.to_string_lossy()));
            if dir.join("summary.json").exists() {
                all.push(read(dir)?);
            }
            for path in found {
                all.push(read(&path)?);
            }
        } else {
            all.push(read(dir)?);
        }
    }
    name_apart(&mut all);
    Ok(all)
}

fn read(dir: &Path) -> Result<RunDir> {
    if !dir.is_dir() {
        return Err(Error::data(format!(
            "there is no such run directory\n  --> {}\n   = help: name the `--out` of an earlier run",
            dir.display()
        )));
    }
    let facts = read_json(&dir.join("run.json"))?;
    let summary = read_json(&dir.join("summary.json"))?;
    if facts.is_none() && summary.is_none() {
        return Err(Error::data(format!(
            "the directory holds no run: neither `run.json` nor `summary.json` is there\n  --> {}",
            dir.display()
        )));
    }
    let facts = facts.unwrap_or(Value::Null);
    let command = facts["command"].as_str().or_else(|| summary.as_ref()?["command"].as_str());
    let (config, config_refused) = read_config(&dir.join("config.toml"))?;
    let records = JsonLines::new(dir.join("records.jsonl")).read()?;
    if matches!(command, Some("eval" | "attack" | "certify")) && records.is_empty() {
        return Err(Error::data(format!(
            "the run has no records: there is nothing to report\n  --> {}",
            dir.display()
        )));
    }
    let lines = |name: &str| JsonLines::new(dir.join(name)).read();
    let timings = if command == Some("train") { lines("timings.jsonl")? } else { Vec::new() };
    if command == Some("attack") {
        attack::check_records(&records)?;
    }
    Ok(RunDir {
        name: dir
            .file_name()
            .map_or_else(|| dir.display().to_string(), |name| name.to_string_lossy().into_owned()),
        command: command.unwrap_or("run").to_owned(),
        config,
        config_refused,
        facts,
        summary,
        records,
        metrics: lines("metrics.jsonl")?,
        completions: lines("completions.jsonl")?,
        validation: lines("validation.jsonl")?,
        warnings: lines("warnings.jsonl")?,
        timings,
        dir: dir.to_path_buf(),
    })
}

/// The configuration, or defaults with the reason why this version refuses it: keys come and go, records stay.
fn read_config(file: &Path) -> Result<(RunConfig, Option<String>)> {
    if !file.exists() {
        return Ok((RunConfig::default(), None));
    }
    match RunConfig::load_any(Some(file), &[]) {
        Ok(config) => Ok((config, None)),
        Err(Error::Config(problems)) => {
            let first = problems.first().map_or("", |problem| problem.message.as_str());
            let more = match problems.len() {
                0 | 1 => String::new(),
                n => format!(", and {} more", n - 1),
            };
            Ok((RunConfig::default(), Some(format!("{first}{more}"))))
        }
        Err(error) => Err(error),
    }
}

fn read_json(path: &Path) -> Result<Option<Value>> {
    let bytes = match fs::read(path) {
        Ok(bytes) => bytes,
        Err(error) if error.kind() == std::io::ErrorKind::NotFound => return Ok(None),
        Err(error) => return Err(Error::io("cannot read", path, error)),
    };
    serde_json::from_slice(&bytes)
        .map(Some)
        .map_err(|error| Error::data(format!("the file is no JSON: {error}\n  --> {}", path.display())))
}

/// Orders numbers within names as numbers: `attack_4` before `attack_16`.
fn natural_key(name: &str) -> Vec<(String, u64)> {
    let mut parts: Vec<(String, u64)> = vec![(String::new(), 0)];
    let mut in_number = false;
    for character in name.chars() {
        let digit = character.to_digit(10).map(u64::from);
        if digit.is_none() && in_number {
            parts.push((String::new(), 0));
        }
        in_number = digit.is_some();
        if let Some((text, number)) = parts.last_mut() {
            match digit {
                Some(digit) => *number = number.saturating_mul(10).saturating_add(digit),
                None => text.push(character),
            }
        }
    }
    parts
}

/// Runs of one name are told apart by their parent, then by number.
fn name_apart(runs: &mut [RunDir]) {
    for rename in [parent_and_name, numbered] {
        let names: Vec<String> = runs.iter().map(|run| run.name.clone()).collect();
        for (index, run) in runs.iter_mut().enumerate() {
            if names.iter().filter(|name| **name == run.name).count() > 1 {
                run.name = rename(run, index);
            }
        }
    }
}

fn parent_and_name(run: &RunDir, _index: usize) -> String {
    let parent = run.dir.parent().and_then(Path::file_name).map(|name| name.to_string_lossy().into_owned());
    parent.map_or_else(|| run.name.clone(), |parent| format!("{parent}/{}", run.name))
}

fn numbered(run: &RunDir, index: usize) -> String {
    format!("{} ({})", run.name, index + 1)
}
