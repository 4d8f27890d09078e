//! `safemed report`: from the records of any number of runs to `report.md` and `report.html`.
//!
//! Every number is computed from `records.jsonl`, `metrics.jsonl` and the other lines of training; `source` reads runs, `tables` and `figures` count,
//! `cards` shows single items, `training` all about training runs. How a report looks is `eval::report`'s business.

mod cards;
mod figures;
mod source;
mod tables;
mod training;

pub use cards::amplified_difference;
pub use source::RunDir;

use super::job::Outcome;
use super::progress::Progress;
use super::run::write_atomic;
use crate::error::{Error, Result};
use crate::eval::report::{ReportData, to_html, to_markdown};
use serde_json::{Value, json};
use std::path::{Path, PathBuf};

/// How a report is made.
#[derive(Debug, Clone, Default)]
pub struct ReportOptions {
    /// Where `report.md` and `report.html` go; absent: the run directory, or `report` for several.
    pub out: Option<PathBuf>,
    /// Heading; absent: made from the runs.
    pub title: Option<String>,
    /// Whether pictures are shown.
    pub images: bool,
}

/// Reads the runs, writes the report, and returns its tables.
///
/// # Errors
/// A data error when a directory is no run or its files are damaged.
pub fn report(dirs: &[PathBuf], options: &ReportOptions, progress: &dyn Progress) -> Result<Outcome> {
    let runs = source::read_all(dirs)?;
    let data = report_data(&runs, options, progress)?;
    let out = match (&options.out, dirs) {
        (Some(out), _) => out.clone(),
        (None, [only]) => only.clone(),
        (None, _) => PathBuf::from("report"),
    };
    write_report(&out, &data)?;
    progress.note(&format!("report: {}", out.join("report.html").display()));
    let summary = json!({
        "command": "report",
        "out": out.display().to_string(),
        "runs": runs.iter().map(numbers).collect::<Vec<_>>(),
    });
    let text = to_markdown(&ReportData { provenance: Vec::new(), ..data });
    Ok(Outcome::new(summary, text))
}

/// Writes `report.md` and `report.html` into a directory.
pub fn write_report(out: &Path, data: &ReportData) -> Result<()> {
    write_atomic(&out.join("report.md"), to_markdown(data).as_bytes())?;
    write_atomic(&out.join("report.html"), to_html(data)?.as_bytes())
}

/// What the report of these runs says.
pub fn report_data(runs: &[RunDir], options: &ReportOptions, progress: &dyn Progress) -> Result<ReportData> {
    if runs.is_empty() {
        return Err(Error::usage("there is no run to report on"));
    }
    let mut notes = Vec::new();
    for run in runs {
        if run.summary.is_none() {
            let (done, what) = if run.records.is_empty() {
                (run.metrics.len(), "steps")
            } else {
                (run.records.len(), "records")
            };
            notes.push(format!("{} is unfinished: {done} {what} so far", run.name));
        }
        if let Some(reason) = &run.config_refused {
            notes.push(format!(
                "{}: this version refuses its `config.toml` ({reason}): what stands nowhere else is missing, or taken to be the default",
                run.name
            ));
        }
    }
    notes.extend(runs.iter().flat_map(training_warnings));
    let mut tables = tables::tables(runs);
    notes.append(&mut tables.notes);
    let mut cards = if options.images { cards::cards(runs, progress) } else { cards::without_pictures(runs) };
    cards.extend(training::cards(runs, options.images.then_some(progress)));
    let names: Vec<&str> = runs.iter().map(|run| run.name.as_str()).collect();
    Ok(ReportData {
        title: options.title.clone().unwrap_or_else(|| match names[..] {
            [only] => format!("safemed {}: {only}", runs[0].command),
            _ => "safemed: comparison of runs".to_owned(),
        }),
        subtitle: match names.len() {
            0..=6 => names.join(" · "),
            count => format!("{count} runs"),
        },
        headlines: Vec::new(),
        notes,
        tables: tables.main,
        details: tables.details,
        figures: figures::figures(runs),
        cards,
        provenance: runs.iter().flat_map(provenance).collect(),
    })
}

/// What was warned of while a run trained: the first warning of each kind, and how many there were.
fn training_warnings(run: &RunDir) -> Vec<String> {
    let mut kinds: Vec<(&str, &Value, usize)> = Vec::new();
    for warning in &run.warnings {
        let kind = warning["kind"].as_str().unwrap_or_default();
        match kinds.iter_mut().find(|(known, ..)| *known == kind) {
            Some((_, _, count)) => *count += 1,
            None => kinds.push((kind, warning, 1)),
        }
    }
    let told = |(kind, first, count): (&str, &Value, usize)| {
        let times = if count > 1 { format!(" ({count} times)") } else { String::new() };
        let message = first["message"].as_str().unwrap_or_default();
        format!("{}: warning `{kind}`{times} at step {}: {message}", run.name, first["step"])
    };
    kinds.into_iter().map(told).collect()
}

/// The facts of `run.json` that a reader may ask for.
fn provenance(run: &RunDir) -> Vec<(String, String)> {
    let hidden = ["command", "crates", "continued", "instruction_sets"];
    run.facts
        .as_object()
        .into_iter()
        .flatten()
        .filter(|(name, _)| !hidden.contains(&name.as_str()))
        .map(|(name, value)| {
            let text = match value {
                Value::String(text) => text.clone(),
                Value::Array(parts) => parts
                    .iter()
                    .map(|part| part.as_str().map_or_else(|| part.to_string(), str::to_owned))
                    .collect::<Vec<_>>()
                    .join(" "),
                other => other.to_string(),
            };
            (format!("{} · {name}", run.name), text)
        })
        .collect()
}

/// One run in the summary.
fn numbers(run: &RunDir) -> Value {
    json!({"name": run.name, "command": run.command, "n": run.records.len(), "steps": run.metrics.len(), "summary": run.summary})
}

#[cfg(test)]
mod tests;
