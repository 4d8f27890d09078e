//! `safemed export`: a checkpoint written anew, an adapter merged into it, as a directory that transformers loads:
//! float32 weights, one file.

use super::inputs;
use super::job::Outcome;
use super::progress::Progress;
use super::run::Stop;
use crate::backend::Backend;
use crate::error::{Error, Result};
use crate::model::assistant::Assistant;
use crate::model::loader::Adaptation;
use crate::model::lora::Adapter;
use serde_json::json;
use std::path::Path;

/// Loads `model`, at `revision` when it is on the hub, adds `adapter` to its weights and writes it to `out`, which must be empty or absent.
///
/// # Errors
/// A usage error when `out` holds something; whatever is wrong with the checkpoint or the adapter.
pub fn export(
    model: &str,
    revision: Option<&str>,
    adapter: Option<&Path>,
    out: &Path,
    progress: &dyn Progress,
) -> Result<Outcome> {
    refuse_occupied(out)?;
    let location = inputs::locate_model(model, revision, &Stop::default(), progress)?;
    let loaded = adapter.map(Adapter::load).transpose()?;
    let adaptation = loaded.as_ref().map_or(Adaptation::None, Adaptation::Merged);
    let assistant = Assistant::load_adapted(&location.dir, adaptation, &|_| false, &Backend::Cpu.device()?)?;
    assistant.save(out)?;
    let tensors = assistant.vlm.parameters().tensors()?;
    let parameters: usize = tensors.iter().map(|(_, tensor)| tensor.elem_count()).sum();
    let summary = json!({
        "command": "export",
        "model": model,
        "model_revision": location.commit,
        "adapter": adapter.map(|dir| dir.display().to_string()),
        "adapted_modules": loaded.as_ref().map(|adapter| adapter.modules().count()),
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
