//! `safemed merge`: the parts of a sharded run joined into the run that was not sharded, byte for byte.
//!
//! The parts are run directories directly inside the one that is named; the joined files are written beside them.
//! Nothing is written unless the parts are complete and of one run.

use super::config::{Command, RunConfig};
use super::job::Outcome;
use super::progress::Progress;
use super::report::{self, ReportOptions};
use super::run::{JsonLines, write_atomic};
use super::{attack, certify, eval};
use crate::data::Shard;
use crate::error::{Error, Result};
use serde_json::{Map, Value, json};
use std::collections::BTreeMap;
use std::path::{Path, PathBuf};

/// Facts of `run.json` that must be the same in all parts.
const SHARED_FACTS: [&str; 10] = [
    "version",
    "command",
    "items",
    "data_sha256",
    "train_data_sha256",
    "model_sha256",
    "model_revision",
    "model_files",
    "prompt_sha256",
    "chat_template_sha256",
];

/// One part, read.
struct Part {
    dir: PathBuf,
    shard: Shard,
    config: RunConfig,
    facts: Map<String, Value>,
    /// The identity of its configuration without the shard.
    identity: String,
    summary: Option<Value>,
    records: Vec<Value>,
}

/// Joins the parts in `dir`. What does not fit makes the outcome a failed check, and nothing is written.
///
/// # Errors
/// A data error when there are no parts or their files cannot be read; a usage error for parts of a command whose
/// records cannot be joined.
pub fn merge(dir: &Path, progress: &dyn Progress) -> Result<Outcome> {
    let mut parts = read_parts(dir)?;
    parts.sort_by_key(|part| part.shard.index);
    let command = command_of(&parts[0])?;
    let mut problems = headers(&parts);
    let records = if problems.is_empty() { joined(&parts, &mut problems) } else { Vec::new() };
    let names: Vec<String> = parts.iter().map(|part| part.dir.display().to_string()).collect();
    if !problems.is_empty() {
        let summary = json!({"command": "merge", "parts": names, "problems": problems, "pass": false});
        let text = problems.join("\n") + "\n";
        let failed = format!("the parts do not make one whole run\n  --> {}", dir.display());
        return Ok(Outcome { check_failed: Some(failed), ..Outcome::new(summary, text) });
    }
    let seconds = parts.iter().filter_map(|part| part.summary.as_ref()?["seconds"].as_f64()).sum();
    let summary = summarize(command, &records, seconds)?;
    link_images(&parts, dir, &records)?;
    write(dir, command, &parts, &records, &summary)?;
    let options = ReportOptions { images: parts[0].config.images, ..ReportOptions::default() };
    report::report(&[dir.to_path_buf()], &options, progress)?;
    progress.note(&format!("{} parts, {} records", parts.len(), records.len()));
    let text = format!("{}: {} records of {} parts\n", dir.display(), records.len(), parts.len());
    let outcome = json!({
        "command": "merge", "parts": names, "n": records.len(), "summary": summary, "problems": [], "pass": true,
    });
    Ok(Outcome::new(outcome, text))
}

fn read_parts(dir: &Path) -> Result<Vec<Part>> {
    let entries = std::fs::read_dir(dir).map_err(|error| Error::io("cannot list the parts", dir, error))?;
    let mut parts = Vec::new();
    for entry in entries {
        let path = entry.map_err(|error| Error::io("cannot list the parts", dir, error))?.path();
        let file = path.join("config.toml");
        if !file.is_file() {
            continue;
        }
        let config = RunConfig::load_any(Some(&file), &[])?;
        if let Some(shard) = config.data.shard {
            parts.push(read_part(path, shard, config)?);
        }
    }
    if parts.is_empty() {
        return Err(Error::data(format!(
            "the directory holds no part of a sharded run\n  --> {}\n   = help: run the parts with `--shard 0/N --out {0}/0` and so on, then merge {0}",
            dir.display()
        )));
    }
    Ok(parts)
}

fn read_part(dir: PathBuf, shard: Shard, mut config: RunConfig) -> Result<Part> {
    config.data.shard = None;
    let Some(Value::Object(facts)) = read_json(&dir.join("run.json"))? else {
        let file = dir.join("run.json");
        return Err(Error::data(format!("the part has no provenance\n  --> {}", file.display())));
    };
    let command = command_word(&facts, &dir)?;
    Ok(Part {
        identity: config.identity(command)?,
        summary: read_json(&dir.join("summary.json"))?,
        records: JsonLines::new(dir.join("records.jsonl")).read()?,
        dir,
        shard,
        config,
        facts,
    })
}

fn read_json(path: &Path) -> Result<Option<Value>> {
    match std::fs::read(path) {
        Ok(bytes) => serde_json::from_slice(&bytes)
            .map(Some)
            .map_err(|error| Error::data(format!("the file is no JSON: {error}\n  --> {}", path.display()))),
        Err(error) if error.kind() == std::io::ErrorKind::NotFound => Ok(None),
        Err(error) => Err(Error::io("cannot read", path, error)),
    }
}

fn command_word(facts: &Map<String, Value>, dir: &Path) -> Result<Command> {
    let word = facts.get("command").and_then(Value::as_str).unwrap_or_default();
    let all = [Command::Eval, Command::Attack, Command::Certify];
    all.into_iter().find(|command| command.word() == word).ok_or_else(|| {
        Error::data(format!("a run of `{word}` has no parts to join\n  --> {}", dir.display()))
    })
}

fn command_of(part: &Part) -> Result<Command> {
    command_word(&part.facts, &part.dir)
}

/// What is wrong with the parts as such: missing, twice, unfinished, or of different runs.
fn headers(parts: &[Part]) -> Vec<String> {
    let mut problems = Vec::new();
    let first = &parts[0];
    let count = first.shard.count;
    for index in 0..count {
        let found: Vec<String> = parts
            .iter()
            .filter(|part| part.shard.index == index)
            .map(|part| part.dir.display().to_string())
            .collect();
        match found.len() {
            0 => problems.push(format!("part {index}/{count} is missing")),
            1 => {}
            _ => problems.push(format!("part {index}/{count} is there twice: {}", found.join(", "))),
        }
    }
    for part in parts {
        let name = part.dir.display();
        if part.shard.count != count {
            problems.push(format!(
                "{name}: shard {}, but {} is one of {count}",
                part.shard,
                first.dir.display()
            ));
        }
        if part.identity != first.identity {
            problems.push(format!("{name}: its configuration differs from that of {}", first.dir.display()));
        }
        for fact in SHARED_FACTS.iter().filter(|fact| part.facts.get(**fact) != first.facts.get(**fact)) {
            problems
                .push(format!("{name}: `{fact}` in run.json differs from that of {}", first.dir.display()));
        }
        if part.summary.is_none() {
            problems.push(format!(
                "{name}: unfinished, {} records so far; continue it with `--resume`",
                part.records.len()
            ));
        }
    }
    problems
}

/// The records of all parts by id. Every N-th id belongs to one part, so that a missing or foreign record shows.
fn joined(parts: &[Part], problems: &mut Vec<String>) -> Vec<Value> {
    let mut by_id: BTreeMap<&str, (&Part, &Value)> = BTreeMap::new();
    for part in parts {
        for record in &part.records {
            let name = part.dir.display();
            match record["id"].as_str() {
                None => problems.push(format!("{name}: a record has no text field `id`")),
                Some(id) => {
                    if let Some((other, _)) = by_id.insert(id, (part, record)) {
                        problems.push(format!("{name}: item `{id}` is in {} too", other.dir.display()));
                    }
                }
            }
        }
    }
    let items = parts[0].facts.get("items").and_then(Value::as_u64);
    if let Some(items) = items.filter(|items| *items != by_id.len() as u64) {
        problems.push(format!("{} records, but the run has {items} items", by_id.len()));
    }
    let misplaced =
        by_id.iter().enumerate().find(|(place, (_, (part, _)))| place % part.shard.count != part.shard.index);
    if let Some((_, (id, (part, _)))) = misplaced {
        problems.push(format!(
            "{}: item `{id}` does not belong to shard {}; records before it are missing or foreign",
            part.dir.display(),
            part.shard
        ));
    }
    by_id.into_values().map(|(_, record)| record.clone()).collect()
}

fn summarize(command: Command, records: &[Value], seconds: f64) -> Result<Value> {
    match command {
        Command::Eval => eval::summarize(records, seconds),
        Command::Attack => attack::summarize(records, seconds),
        Command::Certify => certify::summarize(records, seconds),
        other => Err(Error::usage(format!("runs of `{other}` cannot be joined by this build"))),
    }
}

/// Makes the files that records name by a path in their part available under the same path in `dir`.
fn link_images(parts: &[Part], dir: &Path, records: &[Value]) -> Result<()> {
    for name in records.iter().filter_map(|record| record["adversarial_image"].as_str()) {
        let Some(from) = parts.iter().map(|part| part.dir.join(name)).find(|path| path.is_file()) else {
            return Err(Error::data(format!(
                "the attacked image `{name}` is in no part\n  --> {}",
                dir.display()
            )));
        };
        link_or_copy(&from, &dir.join(name))?;
    }
    Ok(())
}

/// Makes `to` another name of the file `from`, or a copy where names cannot be shared. What is there already stays.
///
/// # Errors
/// When neither can be made.
pub(super) fn link_or_copy(from: &Path, to: &Path) -> Result<()> {
    if to.exists() {
        return Ok(());
    }
    if let Some(parent) = to.parent() {
        std::fs::create_dir_all(parent)
            .map_err(|error| Error::io("cannot create the directory", parent, error))?;
    }
    std::fs::hard_link(from, to)
        .or_else(|_| std::fs::copy(from, to).map(drop))
        .map_err(|error| Error::io(format!("cannot copy {}", from.display()), to, error))
}

fn write(dir: &Path, command: Command, parts: &[Part], records: &[Value], summary: &Value) -> Result<()> {
    let config = RunConfig { out: Some(dir.to_path_buf()), ..parts[0].config.clone() };
    let mut facts = parts[0].facts.clone();
    for own in ["images_sha256", "command_line", "continued"] {
        facts.remove(own);
    }
    let joined = parts.iter().map(|part| {
        json!({
            "shard": part.shard.to_string(),
            "command_line": part.facts.get("command_line"),
            "images_sha256": part.facts.get("images_sha256"),
        })
    });
    facts.insert("parts".to_owned(), joined.collect());
    write_atomic(&dir.join("config.toml"), config.to_toml(command)?.as_bytes())?;
    write_json(&dir.join("run.json"), &Value::Object(facts))?;
    JsonLines::new(dir.join("records.jsonl")).replace(records)?;
    write_json(&dir.join("summary.json"), summary)
}

fn write_json(path: &Path, value: &Value) -> Result<()> {
    let text = serde_json::to_string_pretty(value).map_err(anyhow::Error::from)?;
    write_atomic(path, (text + "\n").as_bytes())
}
