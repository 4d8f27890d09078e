//! This build's own numbers for one prompt, for `scripts/check_with_transformers.py` to hold against transformers.
//!
//! Where [`super::network`] needs an export that exists, this checks any checkpoint, such as one saved here.

use crate::error::{Error, Result};
use crate::model::generate::prompt_batch;
use crate::model::loader::{Adaptation, Precision, load_vlm};
use crate::model::lora::Adapter;
use crate::model::tokenizer::write_json;
use crate::model::weights::save_file;
use crate::pixels::decode::decode_file;
use crate::recipes::export::refuse_occupied;
use crate::recipes::inputs;
use crate::recipes::job::Outcome;
use crate::recipes::progress::Progress;
use crate::recipes::run::Stop;
use candle_core::{Device, Tensor};
use serde_json::{Value, json};
use std::path::{Path, PathBuf};

/// One question to a model.
#[derive(Debug, Clone, Copy)]
pub struct Subject<'a> {
    /// Hugging Face directory, or an id on the hub.
    pub model: &'a str,
    /// Branch, tag or commit of a model on the hub.
    pub revision: Option<&'a str>,
    /// LoRA adapter directory.
    pub adapter: Option<&'a Path>,
    /// Pictures, before the question.
    pub images: &'a [PathBuf],
    /// The question.
    pub question: &'a str,
}

/// `safemed parity --dump`.
///
/// # Errors
/// As [`dump_logits`].
pub fn dump(subject: &Subject<'_>, out: &Path, device: &Device, progress: &dyn Progress) -> Result<Outcome> {
    let mut content: Vec<Value> = subject.images.iter().map(|_| json!({"type": "image"})).collect();
    content.push(json!({"type": "text", "text": subject.question}));
    let messages = json!([{"role": "user", "content": content}]);
    refuse_occupied(out)?;
    let location = inputs::locate_model(subject.model, subject.revision, &Stop::default(), progress)?;
    dump_logits(&location.dir, subject.adapter, &messages, subject.images, out, device)?;
    let summary = json!({
        "command": "parity", "model": location.dir, "model_revision": location.commit, "adapter": subject.adapter, "dump": out,
    });
    Ok(Outcome::new(summary, format!("written: {}\n", out.display())))
}

/// Writes `prompt.json` and `numbers.safetensors` to `out`: the rendered prompt of `messages` (in the form of
/// transformers' `apply_chat_template`, placeholders for `images` in order), its tokens, the pictures' patches
/// (`pixel_values`) and the logits of every row (`[rows, vocab]`), computed from the checkpoint in `model` with `adapter` active.
///
/// # Errors
/// What is wrong with the checkpoint, the conversation or a picture; an I/O error.
pub fn dump_logits(
    model: &Path,
    adapter: Option<&Path>,
    messages: &Value,
    images: &[PathBuf],
    out: &Path,
    device: &Device,
) -> Result<()> {
    let adapter = adapter.map(Adapter::load).transpose()?;
    let adaptation = adapter.as_ref().map_or(Adaptation::None, Adaptation::Active);
    let (vlm, processor) = load_vlm(model, adaptation, Precision::AsStored, &|_| false, device)?;
    let (mut grids, mut pixels, mut patches, mut paths) = (Vec::new(), Vec::new(), Vec::new(), Vec::new());
    for path in images {
        let picture = processor.image_processor.process(&decode_file(path)?)?;
        patches.extend(processor.image_processor.pixel_values(&picture));
        pixels.push(picture.resized.to_tensor(device)?.unsqueeze(0)?);
        grids.push(picture.grid);
        let absolute = path.canonicalize();
        paths.push(absolute.map_err(|error| Error::io("cannot find the picture", path, error))?);
    }
    let (text, prompt) = processor.prompt(vlm.config(), messages, &grids)?;
    let features =
        if pixels.is_empty() { None } else { Some(vlm.encode_images(&pixels, &vlm.vision_plan(&grids)?)?) };
    let (batch, _) = prompt_batch(&vlm, std::slice::from_ref(&prompt))?;
    let logits = vlm.logits(&vlm.forward(features.as_ref(), &batch)?)?;
    if logits.flatten_all()?.to_vec1::<f32>()?.iter().any(|logit| !logit.is_finite()) {
        return Err(Error::NonFinite(format!("the logits are not all finite\n  --> {}", model.display())));
    }
    let mut tensors = vec![("logits".to_string(), logits)];
    if !patches.is_empty() {
        let rows: usize = grids.iter().map(|[frames, rows, columns]| frames * rows * columns).sum();
        let shape = (rows, patches.len() / rows);
        tensors.push(("pixel_values".to_string(), Tensor::from_vec(patches, shape, &Device::Cpu)?));
    }
    std::fs::create_dir_all(out).map_err(|error| Error::io("cannot create the directory", out, error))?;
    let description = json!({
        "messages": messages,
        "images": paths,
        "prompt": text,
        "input_ids": prompt.ids,
        "image_grid_thw": grids,
        "position_ids": prompt.positions,
    });
    write_json(&out.join("prompt.json"), &description)?;
    save_file(&out.join("numbers.safetensors"), &tensors, &[])
}
