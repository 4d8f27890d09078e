//! `safemed audit`: what the auditor found, in words.

use super::job::Outcome;
use crate::certify::audit::{AuditOptions, AuditReport, audit_file};
use crate::error::Result;
use std::fmt::Write as _;
use std::path::Path;

/// Recomputes every certificate of `file`; a run directory stands for its records.
///
/// # Errors
/// A data error when nothing can be audited, a usage error when the noise level is not known or an option makes no
/// sense. A file that does not hold is no error but a failed check.
pub fn audit(file: &Path, options: &AuditOptions) -> Result<Outcome> {
    let records = file.join("records.jsonl");
    let report = audit_file(if file.is_dir() { &records } else { file }, options)?;
    let summary = serde_json::to_value(&report).map_err(anyhow::Error::from)?;
    let mut outcome = Outcome::new(summary, render(&report));
    if !report.pass {
        outcome.check_failed = Some(format!(
            "{} of {} certificates do not recompute\n  --> {}",
            report.rows - report.exact,
            report.rows,
            file.display()
        ));
    }
    Ok(outcome)
}

fn render(report: &AuditReport) -> String {
    let mut text = format!("{} of {} rows recompute", report.exact, report.rows);
    if let Some(sigma) = report.sigma {
        let _ = write!(text, " at sigma {sigma}");
    }
    text.push('\n');
    for pair in &report.consistent {
        let _ = writeln!(text, "consistent: n {:<9} alpha {}", pair.n, pair.alpha);
    }
    for problem in &report.problems {
        let _ = writeln!(text, "wrong: {problem}");
    }
    for note in &report.notes {
        let _ = writeln!(text, "note: {note}");
    }
    text
}
