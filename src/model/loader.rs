//! A checkpoint directory to a model and what prepares its input.
//!
//! This is the one place where `config.json`, the weights and the processor's files meet, and where they are checked
//! against each other. Where a directory comes from (a path or a hub id) is [`super::hub::locate`]'s business.

use super::chat::{ChatTemplate, RenderOptions, expand_image_tokens};
use super::config::VlmConfig;
use super::generate::Prompt;
use super::lora::{self, Adapter, LoraConfig};
use super::parameters::Build;
use super::patches::Patchify;
use super::positions::{Grid, image_tokens};
use super::processor::ImageProcessorConfig;
use super::tokenizer::Tokenizer;
use super::truncate::{Depths, Truncation};
use super::vlm::Vlm;
use super::weights::{Numbers, Weights};
use crate::error::{Error, Result};
use crate::nn::linear::Arithmetic;
use candle_core::Device;
use serde_json::Value;
use std::cell::RefCell;
use std::collections::BTreeSet;
use std::path::Path;

/// What turns conversations and pictures into a model's input.
#[derive(Debug, Clone)]
pub struct Processor {
    /// Text to tokens.
    pub tokenizer: Tokenizer,
    /// Conversations to text.
    pub chat: ChatTemplate,
    /// Pictures to the model's size.
    pub image_processor: ImageProcessorConfig,
}

impl Processor {
    /// Reads the processor of a checkpoint directory.
    ///
    /// # Errors
    /// A data error when a file is missing or damaged.
    pub fn load(dir: &Path) -> Result<Self> {
        Ok(Self {
            tokenizer: Tokenizer::load(dir)?,
            chat: ChatTemplate::load(dir)?,
            image_processor: ImageProcessorConfig::load(dir)?,
        })
    }

    /// The rendered text and the prompt of a conversation (in the form of transformers' `apply_chat_template`) about
    /// pictures of these grids, the assistant's turn opened.
    ///
    /// # Errors
    /// A data error when the template refuses the conversation, or placeholders and pictures do not match.
    pub fn prompt(&self, config: &VlmConfig, messages: &Value, grids: &[Grid]) -> Result<(String, Prompt)> {
        let options = RenderOptions { add_generation_prompt: true, add_vision_id: false };
        let text = self.chat.render_json(messages, options)?;
        let prompt = expanded_prompt(&self.tokenizer, config, &text, grids)?;
        Ok((text, prompt))
    }
}

/// The prompt of a rendered text about pictures of these grids: tokens, each picture's placeholder repeated.
///
/// # Errors
/// A data error when placeholders and pictures do not match.
pub fn expanded_prompt(
    tokenizer: &Tokenizer,
    config: &VlmConfig,
    text: &str,
    grids: &[Grid],
) -> Result<Prompt> {
    let merge = config.vision.spatial_merge_size;
    let counts: Vec<usize> = grids.iter().map(|&grid| image_tokens(grid, merge)).collect();
    let ids = expand_image_tokens(&tokenizer.encode(text)?, config.image_token_id, &counts)?;
    Prompt::of_ids(config, ids, grids)
}

/// What stands over a checkpoint's weights.
#[derive(Debug, Clone, Copy, Default)]
pub enum Adaptation<'a> {
    /// Nothing.
    #[default]
    None,
    /// An adapter, beside the weights, as PEFT runs it.
    Active(&'a Adapter),
    /// An adapter, added to the weights.
    Merged(&'a Adapter),
    /// A new adapter that changes nothing yet.
    New {
        /// Where, and of which rank.
        config: &'a LoraConfig,
        /// Names its random numbers.
        seed: u64,
    },
}

/// How frozen weights are held, and multiplied: in float32 but for the last.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub enum Precision {
    /// As the checkpoint holds them: float32, or bfloat16, which is widened exactly as it is used; float16 in float32.
    #[default]
    AsStored,
    /// In float32; the same results as from bfloat16, to the byte.
    Single,
    /// Rounded to bfloat16.
    Half,
    /// Rounded to bfloat16, and so are the rows that the layers between patch embedding and output layer multiply with them
    /// ([`Arithmetic::Half`]).
    HalfProducts,
}

impl Precision {
    fn apply(self, numbers: Numbers<'_>) -> Numbers<'_> {
        match self {
            Self::AsStored => numbers,
            Self::Single => numbers.widened(),
            Self::Half | Self::HalfProducts => numbers.rounded(),
        }
    }

    fn arithmetic(self) -> Arithmetic {
        match self {
            Self::AsStored | Self::Single | Self::Half => Arithmetic::Single,
            Self::HalfProducts => Arithmetic::Half,
        }
    }
}

/// Loads a checkpoint directory; parameters whose canonical name `trains` accepts get gradients.
///
/// # Errors
/// A data error when something is missing, damaged, or does not fit the rest; a non-finite error when a weight is no
/// finite number.
pub fn load_vlm(
    dir: &Path,
    adaptation: Adaptation<'_>,
    precision: Precision,
    trains: &dyn Fn(&str) -> bool,
    device: &Device,
) -> Result<(Vlm, Processor)> {
    load_part(dir, None, adaptation, precision, trains, device)
}

/// The same with the first so many blocks of each kind only: see [`Truncation`].
///
/// # Errors
/// As [`load_vlm`]; a data error when too little is kept for a legal model.
pub fn load_part(
    dir: &Path,
    depths: Option<Depths>,
    adaptation: Adaptation<'_>,
    precision: Precision,
    trains: &dyn Fn(&str) -> bool,
    device: &Device,
) -> Result<(Vlm, Processor)> {
    let whole = VlmConfig::load(dir)?;
    let truncation = Truncation::new(&whole, depths.unwrap_or(Depths::of(&whole)));
    let config = if depths.is_some() { truncation.config(&whole)? } else { whole };
    let processor = Processor::load(dir)?;
    let patchify = patchify_of(&config, &processor.image_processor).map_err(|error| match error {
        Error::Data(message) => Error::data(format!("{message}\n  --> {}", dir.display())),
        other => other,
    })?;
    let weights = Weights::open(dir)?;
    let used = RefCell::new(BTreeSet::new());
    let source = |name: &str, shape: &[usize]| {
        let name = &*truncation.original(name);
        used.borrow_mut().insert(name.to_owned());
        let base = weights.get(name, shape)?;
        let numbers = match adaptation {
            Adaptation::Active(adapter) => adapter.replacement(name, shape)?.map_or(base, Numbers::from),
            Adaptation::Merged(adapter) => adapter.merged(name, shape, base)?,
            Adaptation::None | Adaptation::New { .. } => base,
        };
        Ok(precision.apply(numbers))
    };
    let low_rank = |module: &str, shape: [usize; 2]| match adaptation {
        Adaptation::Active(adapter) => adapter.layer(&truncation.original(module), shape),
        Adaptation::New { config, seed } => {
            lora::new_layer(config, &truncation.original(module), shape, seed)
        }
        Adaptation::None | Adaptation::Merged(_) => Ok(None),
    };
    let arithmetic = precision.arithmetic();
    let build = Build { source: &source, trains, low_rank: &low_rank, arithmetic };
    let vlm = Vlm::new(&config, patchify, build, device)?;
    if depths.is_some() {
        return Ok((vlm, processor));
    }
    if let Adaptation::Active(adapter) | Adaptation::Merged(adapter) = adaptation {
        adapter.check_used()?;
    }
    // A tied output layer is often stored all the same.
    let is_tied = |name: &str| config.tie_word_embeddings && name == "lm_head.weight";
    let used = used.into_inner();
    let unused: Vec<&str> = weights.names().filter(|name| !used.contains(*name) && !is_tied(name)).collect();
    if let Some(first) = unused.first() {
        tracing::warn!("{} tensors of {} are not used, such as `{first}`", unused.len(), dir.display());
    }
    Ok((vlm, processor))
}

/// How pixels in [0, 1] become patches: the processor's numbers for the network's geometry.
///
/// # Errors
/// A data error when processor and network disagree about the geometry.
pub fn patchify_of(config: &VlmConfig, processor: &ImageProcessorConfig) -> Result<Patchify> {
    let vision = &config.vision;
    let network = [vision.patch_size, vision.temporal_patch_size, vision.spatial_merge_size];
    let pictures = [processor.patch_size, processor.temporal_patch_size, processor.merge_size];
    if network != pictures {
        return Err(Error::data(format!(
            "config.json has (patch size, temporal patch size, merge size) {network:?}, the image processor {pictures:?}\n   = help: config.json and preprocessor_config.json may be of different models"
        )));
    }
    // A processor may scale levels by another factor than 1/255: (level · factor - mean) / std.
    let scale = 255.0 * processor.rescale_factor;
    let scaled = |values: [f32; 3]| values.map(|value| (f64::from(value) / scale) as f32);
    Ok(Patchify {
        patch_size: vision.patch_size,
        temporal_patch_size: vision.temporal_patch_size,
        spatial_merge_size: vision.spatial_merge_size,
        mean: scaled(processor.image_mean),
        std: scaled(processor.image_std),
    })
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::model::test_support::fixtures;
    use crate::model::weights::{TensorFile, save_file};
    use candle_core::Tensor;
    use serde_json::json;

    fn copy_of(name: &str) -> Option<tempfile::TempDir> {
        let dir = tempfile::tempdir().unwrap();
        for entry in std::fs::read_dir(fixtures()?.join("checkpoints").join(name)).unwrap() {
            let path = entry.unwrap().path();
            std::fs::write(dir.path().join(path.file_name().unwrap()), std::fs::read(&path).unwrap())
                .unwrap();
        }
        Some(dir)
    }

    #[test]
    fn a_rescale_factor_is_folded_into_mean_and_deviation() {
        let Some(dir) = copy_of("qwen2_vl") else { return };
        let config = VlmConfig::load(dir.path()).unwrap();
        let mut processor = ImageProcessorConfig::load(dir.path()).unwrap();
        assert_eq!(patchify_of(&config, &processor).unwrap().mean, processor.image_mean);
        processor.rescale_factor = 1.0 / 127.5;
        let patchify = patchify_of(&config, &processor).unwrap();
        let (level, mean, std) = (200f32, processor.image_mean[1], processor.image_std[1]);
        let wanted = (level / 127.5 - mean) / std;
        assert!(((level / 255.0 - patchify.mean[1]) / patchify.std[1] - wanted).abs() < 1e-5);
        processor.patch_size += 2;
        let message = patchify_of(&config, &processor).unwrap_err().to_string();
        assert!(message.contains("patch size"), "{message}");
    }

    #[test]
    fn a_weight_that_is_no_number_is_refused_by_name() {
        let Some(dir) = copy_of("qwen2_vl") else { return };
        let path = dir.path().join("model.safetensors");
        let file = TensorFile::open(&path).unwrap();
        let broken = "model.norm.weight";
        let tensors: Vec<(String, Tensor)> = file
            .names()
            .into_iter()
            .map(|name| {
                let mut values = file.floats(&name).unwrap();
                if name == broken {
                    values[3] = f32::NAN;
                }
                let shape = file.shape(&name).unwrap().to_vec();
                (name, Tensor::from_vec(values, shape, &Device::Cpu).unwrap())
            })
            .collect();
        save_file(&path, &tensors, &[]).unwrap();
        let error = load_vlm(dir.path(), Adaptation::None, Precision::AsStored, &|_| false, &Device::Cpu)
            .unwrap_err();
        assert!(matches!(error, Error::NonFinite(_)), "{error}");
        assert!(
            error.to_string().contains("model.language_model.norm.weight") && error.to_string().contains('3')
        );
    }

    #[test]
    fn a_prompt_holds_a_placeholder_for_every_merged_patch() {
        let Some(dir) = copy_of("qwen3_vl") else { return };
        let (vlm, processor) = load_vlm(
            dir.path(),
            Adaptation::None,
            Precision::AsStored,
            &|name| name == "lm_head.weight",
            &Device::Cpu,
        )
        .unwrap();
        assert_eq!(vlm.parameters().trained().len(), 1);
        let messages =
            json!([{"role": "user", "content": [{"type": "image"}, {"type": "text", "text": "Normal?"}]}]);
        let (text, prompt) = processor.prompt(vlm.config(), &messages, &[[1, 4, 6]]).unwrap();
        assert!(text.contains("Normal?") && text.ends_with("assistant\n"));
        assert_eq!(prompt.image_rows.len(), 6);
        assert!(processor.prompt(vlm.config(), &messages, &[]).is_err());
    }
}
