//! Whether this build computes what Hugging Face transformers computes: every number of an export, compared.
//!
//! Inputs (tokens, prompts, pictures) are compared in [`super::parity_io`], the network in [`network`], adapters
//! in [`lora`], attacks in [`pgd`], losses and optimiser in [`training`] and `golden`; [`dump`] writes this build's own numbers for the opposite direction. What an export holds and this build
//! does not compare is named in [`ParityReport::not_checked`], so that a pass says no more than it should.

pub mod dump;
mod golden;
pub mod lora;
pub mod network;
pub mod pgd;
pub mod render;
pub mod training;

use super::parity_io::{self, Check, ReferenceCheckpoint};
use crate::error::Result;
use candle_core::Device;
use serde::{Deserialize, Serialize};
use std::path::Path;

/// A quantity of the export that was not compared.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Unchecked {
    /// `CHECKPOINT/CASE/QUANTITY`, `-` where one does not apply.
    pub name: String,
    /// Why.
    pub reason: String,
}

/// The outcome of every comparison.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct ParityReport {
    /// Every comparison made, each name once.
    pub checks: Vec<Check>,
    /// Whether every comparison made is within its tolerance.
    pub pass: bool,
    /// What the export holds but was not compared; it does not count as passed.
    pub not_checked: Vec<Unchecked>,
}

/// Compares this build, computing on `device`, with the export in `dir`; `progress` is told what comes next.
///
/// # Errors
/// A data error when `dir` holds no reference numbers, or something in it cannot be read.
pub fn parity(dir: &Path, device: &Device, progress: &mut dyn FnMut(&str)) -> Result<ParityReport> {
    progress("tokens, prompts and pictures");
    let mut checks = parity_io::collect(dir)?;
    let mut not_checked = Vec::new();
    for name in parity_io::checkpoint_names(dir)? {
        match ReferenceCheckpoint::load(dir, &name)? {
            Some(reference) => {
                progress(&format!("{name}: network"));
                checks.extend(network::check(&reference, device)?);
            }
            None => {
                not_checked.push(unchecked(
                    &name,
                    "-",
                    "logits",
                    "the export has no numbers for this checkpoint",
                ));
            }
        }
    }
    progress("adapters");
    checks.extend(lora::check(dir, device)?);
    progress("training");
    checks.extend(training::check(dir, &mut not_checked)?);
    progress("attacks");
    checks.extend(pgd::check(dir, device)?);
    if checks.is_empty() {
        return Err(parity_io::no_numbers(dir));
    }
    let checks = parity_io::merge_by_name(checks);
    let pass = checks.iter().all(|check| check.pass);
    Ok(ParityReport { checks, pass, not_checked })
}

fn unchecked(checkpoint: &str, case: &str, quantity: &str, reason: &str) -> Unchecked {
    Unchecked { name: format!("{checkpoint}/{case}/{quantity}"), reason: reason.to_string() }
}

#[cfg(test)]
mod tests;
