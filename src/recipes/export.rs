//! `safemed export`: a checkpoint as a directory of its own, an adapter merged into it, in the layout that it had.
//!
//! Tensors keep their names, their order and their files; every other file is copied as it is. One tensor at a time is
//! in memory. What nothing changes is written byte for byte.

use super::config::Dtype as StoredAs;
use super::inputs;
use super::job::Outcome;
use super::progress::Progress;
use super::run::Stop;
use crate::error::{Error, Result};
use crate::model::config::VlmConfig;
use crate::model::loader::{self, Processor};
use crate::model::lora::Adapter;
use crate::model::tensor_file::{Entry, TensorFile, write_tensors};
use crate::model::tokenizer::write_json;
use crate::model::vlm::Vlm;
use crate::model::weights::{Weights, canonical_name};
use safetensors::tensor::Dtype;
use serde_json::{Map, Value, json};
use std::borrow::Cow;
use std::fs;
use std::path::{Path, PathBuf};

/// Files of a directory that hold weights or a training's state, by their end: they are not copied.
const NOT_COPIED: [&str; 12] = [
    ".safetensors",
    ".index.json",
    ".bin",
    ".pt",
    ".pth",
    ".ckpt",
    ".gguf",
    ".onnx",
    ".msgpack",
    ".h5",
    "state.json",
    "adapter_config.json",
];

/// What is exported, and where to.
#[derive(Debug, Clone)]
pub struct Export<'a> {
    /// Directory or hub id of the checkpoint.
    pub model: &'a str,
    /// Branch, tag or commit of a hub id.
    pub revision: Option<&'a str>,
    /// An adapter to be added to its weights.
    pub adapter: Option<&'a Path>,
    /// Type of the weights; `auto` keeps the checkpoint's, but writes float32 once an adapter is added.
    pub dtype: StoredAs,
    /// A new or empty directory.
    pub out: &'a Path,
}

/// Writes the checkpoint `export.model`, with its adapter added, to `export.out`.
///
/// # Errors
/// A usage error when the directory holds something; whatever is wrong with the checkpoint or the adapter; a
/// non-finite error when a weight is no finite number.
pub fn export(export: &Export<'_>, progress: &dyn Progress) -> Result<Outcome> {
    refuse_occupied(export.out)?;
    let location = inputs::locate_model(export.model, export.revision, &Stop::default(), progress)?;
    let source = Source::open(&location.dir, export.adapter)?;
    let dtype = match (export.dtype, &source.adapter) {
        (StoredAs::Auto, None) => None,
        (StoredAs::Auto, Some(_)) | (StoredAs::F32, _) => Some(Dtype::F32),
        (StoredAs::Bf16, _) => Some(Dtype::BF16),
    };
    let partial = partial_of(export.out);
    let written = write(export, &source, dtype, &partial);
    let (tensors, parameters) = written.inspect_err(|_| drop(fs::remove_dir_all(&partial)))?;
    let summary = json!({
        "command": "export",
        "model": export.model,
        "model_revision": location.commit,
        "adapter": export.adapter.map(|dir| dir.display().to_string()),
        "adapted_modules": source.adapter.as_ref().map(|adapter| adapter.modules().count()),
        "out": export.out.display().to_string(),
        "dtype": dtype.map_or("auto", |dtype| if dtype == Dtype::F32 { "f32" } else { "bf16" }),
        "tensors": tensors,
        "parameters": parameters,
        "model_sha256": inputs::model_sha256(export.out)?,
    });
    let text = format!("{}: {tensors} tensors, {parameters} parameters\n", export.out.display());
    Ok(Outcome::new(summary, text))
}

/// Where an export grows: beside its place, which it takes once it is whole.
fn partial_of(out: &Path) -> PathBuf {
    let name = out.file_name().unwrap_or_default().to_string_lossy();
    out.with_file_name(format!(".{name}.partial-{}", std::process::id()))
}

/// Writes everything to `partial` and moves it to its place; returns the number of tensors and of parameters.
fn write(
    export: &Export<'_>,
    source: &Source,
    dtype: Option<Dtype>,
    partial: &Path,
) -> Result<(usize, usize)> {
    let failed = |error| Error::io("cannot create the directory", export.out, error);
    fs::create_dir_all(partial).map_err(failed)?;
    let (mut tensors, mut parameters, mut bytes) = (0usize, 0usize, 0usize);
    let mut index = Map::new();
    for file in source.weights.files() {
        let name = file.path().file_name().unwrap_or_default().to_string_lossy().into_owned();
        for entry in write_shard(file, source.adapter.as_ref(), dtype, &partial.join(&name))? {
            tensors += 1;
            parameters += entry.shape.iter().product::<usize>();
            bytes += entry.size();
            index.insert(entry.name, json!(name));
        }
    }
    if !partial.join("model.safetensors").exists() {
        index.sort_keys();
        let value = json!({"metadata": {"total_size": bytes}, "weight_map": index});
        write_json(&partial.join("model.safetensors.index.json"), &value)?;
    }
    copy_others(source.weights.dir(), partial)?;
    write_config(source.config.raw.clone(), dtype, partial)?;
    fs::rename(partial, export.out).map_err(failed)?;
    Ok((tensors, parameters))
}

/// A checkpoint, opened and checked.
#[derive(Debug)]
struct Source {
    config: VlmConfig,
    weights: Weights,
    adapter: Option<Adapter>,
}

impl Source {
    fn open(dir: &Path, adapter: Option<&Path>) -> Result<Self> {
        let config = VlmConfig::load(dir)?;
        loader::patchify_of(&config, &Processor::load(dir)?.image_processor)?;
        let weights = Weights::open(dir)?;
        for (name, shape) in Vlm::outline(&config)? {
            weights.check(&name, &shape)?;
        }
        let adapter = adapter.map(Adapter::load).transpose()?;
        if let Some(adapter) = &adapter {
            check_places(adapter, &weights)?;
        }
        Ok(Self { config, weights, adapter })
    }
}

/// Refuses an adapter for modules that the checkpoint does not have, before anything is written.
fn check_places(adapter: &Adapter, weights: &Weights) -> Result<()> {
    for name in weights.names() {
        let Some(shape) = weights.shape(name) else { continue };
        adapter.replacement(name, shape)?;
        if let (Some(module), [out, input]) = (name.strip_suffix(".weight"), shape) {
            adapter.layer(module, [*out, *input])?;
        }
    }
    adapter.check_used()
}

/// Writes one file's tensors; returns what it wrote.
fn write_shard(
    file: &TensorFile,
    adapter: Option<&Adapter>,
    dtype: Option<Dtype>,
    path: &Path,
) -> Result<Vec<Entry>> {
    let is_number = |dtype| matches!(dtype, Dtype::F32 | Dtype::F16 | Dtype::BF16);
    let stored = file.entries();
    let mut entries = stored.clone();
    for entry in entries.iter_mut().filter(|entry| is_number(entry.dtype)) {
        entry.dtype = dtype.unwrap_or(entry.dtype);
    }
    write_tensors(path, &entries, &file.metadata(), &mut |index| {
        let (before, after) = (&stored[index], &entries[index]);
        if !is_number(before.dtype) {
            return Ok(Cow::Borrowed(file.bytes(&before.name)?));
        }
        let mut numbers = file.numbers(&before.name)?;
        numbers.check_finite(&before.name)?;
        if let Some(adapter) = adapter {
            numbers = adapter.merged(&canonical_name(&before.name), &before.shape, numbers)?;
        } else if before.dtype == after.dtype {
            return Ok(Cow::Borrowed(file.bytes(&before.name)?));
        }
        Ok(Cow::Owned(numbers.to_bytes(after.dtype)))
    })?;
    Ok(entries)
}

/// Copies every file of `dir` that holds no weights: tokenizer, processor, templates, licence.
fn copy_others(dir: &Path, out: &Path) -> Result<()> {
    let failed = |error| Error::io("cannot read the model's directory", dir, error);
    let mut paths: Vec<PathBuf> = Vec::new();
    for entry in fs::read_dir(dir).map_err(failed)? {
        paths.push(entry.map_err(failed)?.path());
    }
    paths.sort();
    for path in paths {
        let name = path.file_name().unwrap_or_default().to_string_lossy();
        if name.starts_with('.') || NOT_COPIED.iter().any(|end| name.ends_with(end)) || !path.is_file() {
            continue;
        }
        let target = out.join(&*name);
        fs::copy(&path, &target).map_err(|error| Error::io("cannot copy to", &target, error))?;
    }
    Ok(())
}

/// The configuration with the weights' type as it is now; copied as it is when that did not change.
fn write_config(mut config: Value, dtype: Option<Dtype>, out: &Path) -> Result<()> {
    let Some(dtype) = dtype else { return Ok(()) };
    let word = if dtype == Dtype::F32 { "float32" } else { "bfloat16" };
    let before = config.clone();
    if let Some(top) = config.as_object_mut() {
        name_type(top, word);
        for key in ["text_config", "vision_config"] {
            if let Some(section) = top.get_mut(key).and_then(Value::as_object_mut) {
                name_type(section, word);
            }
        }
    }
    if config == before {
        return Ok(());
    }
    write_json(&out.join("config.json"), &config)
}

/// Both generations' key for the type of the weights, where the section has it.
fn name_type(section: &mut Map<String, Value>, word: &str) {
    for key in ["dtype", "torch_dtype"] {
        if let Some(value) = section.get_mut(key)
            && !value.is_null()
        {
            *value = json!(word);
        }
    }
}

/// Refuses a directory that holds something, and a file.
///
/// # Errors
/// A usage error for either.
pub(super) fn refuse_occupied(out: &Path) -> Result<()> {
    let is_free = match fs::read_dir(out) {
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
