//! Recomputes certificates from their own counts, and finds out under which settings a foreign file was made.
//!
//! A file is either our `records.jsonl` of `certify` (each row carries its counts: everything is recomputed) or a
//! Cohen-style TSV (`idx label predict radius correct time`), which has only printed radii: there a pair (n, alpha)
//! is consistent when every radius is that of a whole count, to the very same string.
//!
//! Rendering and exit statuses are left to the caller.

mod foreign;
mod records;

pub use records::check_record;

use crate::error::{Error, Result};
use serde::Serialize;
use std::path::Path;

pub use foreign::{RadiusFormat, counts_printing};

/// Numbers of draws that a foreign file is tried against.
pub const CANDIDATE_N: [u64; 5] = [100, 1000, 10_000, 100_000, 1_000_000];
/// Failure probabilities that a foreign file is tried against.
pub const CANDIDATE_ALPHA: [f64; 4] = [0.05, 0.01, 0.001, 0.0001];
/// How many problems are told one by one.
const MAX_PROBLEMS: usize = 20;

/// What the auditor is told beside the file. Matters only to foreign files: ours carry all of it.
#[derive(Debug, Clone, Default, PartialEq)]
pub struct AuditOptions {
    /// Standard deviation of the noise; otherwise taken from `sigma_X` in the path.
    pub sigma: Option<f64>,
    /// Numbers of draws to try instead of [`CANDIDATE_N`]; empty means those.
    pub n: Vec<u64>,
    /// Failure probabilities to try instead of [`CANDIDATE_ALPHA`]; empty means those.
    pub alpha: Vec<f64>,
}

/// A number of draws and a failure probability.
#[derive(Debug, Clone, Copy, PartialEq, Serialize)]
pub struct Pair {
    /// Number of estimation draws.
    pub n: u64,
    /// Failure probability.
    pub alpha: f64,
}

/// What an audit found.
#[derive(Debug, Clone, PartialEq, Serialize)]
pub struct AuditReport {
    /// Rows of the file.
    pub rows: usize,
    /// Rows that recompute: for a foreign file, under the candidate pair that explains most rows.
    pub exact: usize,
    /// The pairs under which every row recomputes, smallest n first; for our records, those that the rows state.
    pub consistent: Vec<Pair>,
    /// Whether the file holds: every row recomputes (ours), or some pair explains every row (foreign).
    pub pass: bool,
    /// The smallest n of the consistent pairs, where a larger one would fit as well.
    pub smallest_n: Option<u64>,
    /// Noise level used, for a foreign file.
    pub sigma: Option<f64>,
    /// What does not hold, at most twenty sentences.
    pub problems: Vec<String>,
    /// What the file cannot tell apart, and other remarks.
    pub notes: Vec<String>,
}

/// Audits a file: reads it, finds out which of the two kinds it is, and recomputes every row.
///
/// # Errors
/// A file that cannot be read or has no rows (data); no noise level for a foreign file (usage).
pub fn audit_file(path: &Path, options: &AuditOptions) -> Result<AuditReport> {
    let text = std::fs::read_to_string(path).map_err(|source| match source.kind() {
        std::io::ErrorKind::InvalidData => {
            Error::data(format!("nothing to audit: the file is no text\n  --> {}", path.display()))
        }
        _ => Error::io("cannot read the file to audit", path, source),
    })?;
    audit_text(&text, path, options)
}

/// [`audit_file`] on a text that is already there; `path` is for messages and for `sigma_X`.
///
/// # Errors
/// As [`audit_file`].
pub fn audit_text(text: &str, path: &Path, options: &AuditOptions) -> Result<AuditReport> {
    let first = text.lines().map(str::trim).find(|line| !line.is_empty());
    match first {
        None => Err(Error::data(format!("nothing to audit: the file is empty\n  --> {}", path.display()))),
        Some(line) if line.starts_with('{') => {
            let mut report = records::audit(text, path)?;
            if *options != AuditOptions::default() {
                report
                    .notes
                    .push("our own records state sigma, n and alpha: the options have no effect".to_owned());
            }
            Ok(report)
        }
        Some(_) => foreign::audit(text, path, options),
    }
}
