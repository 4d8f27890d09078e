//! A checkpoint small enough for tests, made from scratch, and questions about drawn images for it.

use candle_core::{Device, Tensor};
use safemed::data::phantom::{self, PhantomConfig};
use safemed::model::assistant::Assistant;
use safemed::model::chat::ChatTemplate;
use safemed::model::config::{ModelSizes, SpecialIds, VlmConfig};
use safemed::model::initialise::initial_value;
use safemed::model::parameters::Build;
use safemed::model::processor::ImageProcessorConfig;
use safemed::model::tokenizer::{IMAGE_PAD, Tokenizer, train_bpe};
use std::path::Path;

/// Whole answers that are single tokens of the tiny model, so that untrained weights often answer readably.
const ANSWERS: [&str; 4] =
    ["<answer> A</answer>", "<answer> B</answer>", "<answer> C</answer>", "<answer> D</answer>"];

/// Sizes of the tiny model: 32 x 32 pixels are four image tokens.
pub(crate) fn sizes(vocab_size: usize) -> ModelSizes {
    ModelSizes {
        vocab_size,
        hidden_size: 32,
        intermediate_size: 48,
        num_layers: 2,
        num_heads: 2,
        num_kv_heads: 1,
        head_dim: 16,
        vision_depth: 2,
        vision_hidden_size: 32,
        vision_intermediate_size: 48,
        vision_num_heads: 2,
        patch_size: 8,
        spatial_merge_size: 2,
        position_side: 4,
        deepstack_layers: vec![0],
        window_size: 32,
        full_attention_blocks: vec![1],
        max_position_embeddings: 512,
        tie_word_embeddings: false,
    }
}

/// A byte-level tokenizer without a single merge, but with whole answers.
pub(crate) fn tiny_tokenizer() -> Tokenizer {
    train_bpe(&[], 256 + 8 + ANSWERS.len(), &ANSWERS).unwrap()
}

/// Which of the two architectures that can be made from scratch.
#[derive(Debug, Clone, Copy, PartialEq)]
pub(crate) enum Kind {
    Qwen3,
    Qwen25,
}

/// What the weights are like.
#[derive(Debug, Clone, Copy, PartialEq)]
pub(crate) enum Weights {
    /// As drawn for training.
    Fresh,
    /// Untrained too, but words depend on the image; mostly it answers with a letter.
    Loud,
}

/// An untrained model of the Qwen3-VL kind whose words depend on the image; mostly it answers with a letter.
pub(crate) fn tiny_assistant() -> Assistant {
    assistant_of(Kind::Qwen3, Weights::Loud, false)
}

/// A tiny model; every parameter `trains`, or none.
pub(crate) fn assistant_of(kind: Kind, weights: Weights, trains: bool) -> Assistant {
    let tokenizer = tiny_tokenizer();
    let id = |token: &str| tokenizer.require(token).unwrap();
    let ids = SpecialIds {
        image: id(IMAGE_PAD),
        video: id("<|video_pad|>"),
        vision_start: id("<|vision_start|>"),
        vision_end: id("<|vision_end|>"),
        turn_end: id("<|im_end|>"),
        document_end: id("<|endoftext|>"),
    };
    let config = match kind {
        Kind::Qwen3 => VlmConfig::new_qwen3_vl(&sizes(tokenizer.len()), ids),
        Kind::Qwen25 => VlmConfig::new_qwen2_5_vl(&sizes(tokenizer.len()), ids),
    }
    .unwrap();
    let loud: Vec<u32> = ANSWERS.iter().map(|answer| id(answer)).chain([ids.turn_end]).collect();
    let tensor = |name: &str, shape: &[usize]| -> safemed::error::Result<Tensor> {
        let value = initial_value(7, name, shape)?;
        if weights == Weights::Fresh {
            return Ok(value);
        }
        // Blocks of a fresh model hardly differ from the identity, and attention is uniform: what it sees must reach
        // what it says.
        if ["o_proj", "down_proj", "attn.proj", "linear_fc2"].iter().any(|part| name.contains(part)) {
            return Ok((value * 30.0)?);
        }
        if name.contains("q_norm") || name.contains("k_norm") {
            return Ok((value * 3.0)?);
        }
        if name.contains("embed_tokens") {
            return Ok((value * 0.1)?);
        }
        if name != "lm_head.weight" {
            return Ok(value);
        }
        let factor: Vec<f32> =
            (0..shape[0] as u32).map(|row| if loud.contains(&row) { 20.0 } else { 1.0 }).collect();
        Ok(value.broadcast_mul(&Tensor::from_vec(factor, (shape[0], 1), &Device::Cpu)?)?)
    };
    let source = |name: &str, shape: &[usize]| Ok((&tensor(name, shape)?).try_into()?);
    let processor = ImageProcessorConfig {
        min_pixels: 32 * 32,
        max_pixels: 64 * 64,
        patch_size: 8,
        merge_size: 2,
        image_mean: [0.5; 3],
        image_std: [0.25; 3],
        ..ImageProcessorConfig::default()
    };
    let chat = ChatTemplate::default_template().unwrap();
    Assistant::new(&config, tokenizer, chat, processor, Build::plain(&source, &|_| trains), &Device::Cpu)
        .unwrap()
}

/// Writes the tiny model as a Hugging Face directory.
pub(crate) fn tiny_checkpoint(dir: &Path) {
    tiny_assistant().save(dir).unwrap();
}

/// Draws 40 training and 160 test questions about images of 32 x 32 pixels.
pub(crate) fn phantoms(dir: &Path) {
    let config = PhantomConfig { size: 32, train: 40, validation: 0, test: 160, ..PhantomConfig::default() };
    phantom::generate(&config, dir, &mut |_, _| {}).unwrap();
}
