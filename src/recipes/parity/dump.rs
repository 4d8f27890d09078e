//! This build's own numbers for one prompt, for `scripts/check_with_transformers.py` to hold against transformers.
//!
//! Where [`super::network`] needs an export that exists, this checks any checkpoint, such as one saved here.

use crate::error::{Error, Result};
use crate::model::generate::prompt_batch;
use crate::model::loader::{Adaptation, load_vlm};
use crate::model::tokenizer::write_json;
use crate::model::weights::save_file;
use crate::pixels::decode::decode_file;
use candle_core::{Device, Tensor};
use serde_json::{Value, json};
use std::path::{Path, PathBuf};

/// Writes `prompt.json` and `numbers.safetensors` to `out`: the rendered prompt of `messages` (in the form of
/// transformers' `apply_chat_template`, placeholders for `images` in order), its tokens, the pictures' patches
/// (`pixel_values`) and the logits of every row (`[rows, vocab]`), computed from the checkpoint in `model`.
///
/// # Errors
/// What is wrong with the checkpoint, the conversation or a picture; an I/O error.
pub fn dump_logits(
    model: &Path,
    messages: &Value,
    images: &[PathBuf],
    out: &Path,
    device: &Device,
) -> Result<()> {
    let (vlm, processor) = load_vlm(model, Adaptation::None, &|_| false, device)?;
    std::fs::create_dir_all(out).map_err(|error| Error::io("cannot create the directory", out, error))?;
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
    let mut tensors = vec![("logits".to_string(), vlm.logits(&vlm.forward(features.as_ref(), &batch)?)?)];
    if !patches.is_empty() {
        let rows: usize = grids.iter().map(|[frames, rows, columns]| frames * rows * columns).sum();
        let shape = (rows, patches.len() / rows);
        tensors.push(("pixel_values".to_string(), Tensor::from_vec(patches, shape, &Device::Cpu)?));
    }
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
