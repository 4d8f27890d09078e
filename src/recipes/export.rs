//! `safemed export`: a checkpoint written anew as a directory that transformers loads: float32 weights, one file.

use super::inputs;
use super::job::Outcome;
use crate::backend::Backend;
use crate::error::{Error, Result};
use crate::model::assistant::Assistant;
use crate::model::weights;
use serde_json::json;
use std::path::Path;

/// Loads `model` and writes it to `out`, which must be empty or absent.
///
/// # Errors
/// A usage error for an adapter or when `out` holds something; whatever is wrong with the checkpoint.
pub fn export(model: &str, adapter: Option<&Path>, out: &Path) -> Result<Outcome> {
    inputs::refuse_adapter(adapter)?;
    refuse_occupied(out)?;
    let dir = weights::locate(model)?;
    let assistant = Assistant::load(&dir, &|_| false, &Backend::Cpu.device()?)?;
    assistant.save(out)?;
    let tensors = assistant.vlm.parameters().tensors()?;
    let parameters: usize = tensors.iter().map(|(_, tensor)| tensor.elem_count()).sum();
    let summary = json!({
        "command": "export",
        "model": model,
        "out": out.display().to_string(),
        "tensors": tensors.len(),
        "parameters": parameters,
        "model_sha256": inputs::model_sha256(out)?,
    });
    let text = format!("{}: {} tensors, {parameters} parameters\n", out.display(), tensors.len());
    Ok(Outcome::new(summary, text))
}

/// Refuses a directory that holds something, and a file.
///
/// # Errors
/// A usage error for either.
pub(super) fn refuse_occupied(out: &Path) -> Result<()> {
    let is_free = match std::fs::read_dir(out) {
        Ok(mut entries) => entries.next().is_none(),
        Err(error) if error.kind() == std::io::ErrorKind::NotFound => true,
        Err(error) if error.kind() == std::io::ErrorKind::NotADirectory => false,
        Err(error) => return Err(Error::io("cannot read the output directory", out, error)),
    };
    if is_free {
        return Ok(());
    }
    Err(Error::usage(format!(
        "the output directory is not empty\n  --> {}\n   = help: name a new one with `--out`",
        out.display()
    )))
}
