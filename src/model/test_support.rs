//! For tests: reading reference numbers, whose absence skips a test, and the shape of a small model.

use super::config::{ModelSizes, SpecialIds};
use super::weights::TensorFile;
use serde::de::DeserializeOwned;
use serde_json::Value;
use std::path::{Path, PathBuf};

/// The directory of reference numbers, when there is one.
pub(crate) fn fixtures() -> Option<PathBuf> {
    Some(crate::files::shared()?.join("reference/fixtures")).filter(|dir| dir.is_dir())
}

/// A JSON file.
pub(crate) fn fixture_json(path: &Path) -> Value {
    serde_json::from_slice(&std::fs::read(path).unwrap()).unwrap()
}

/// A safetensors file.
pub(crate) fn read_tensors(path: &Path) -> TensorFile {
    TensorFile::open(path).unwrap()
}

/// A JSON list of numbers.
pub(crate) fn numbers<T: DeserializeOwned>(value: &Value) -> Vec<T> {
    serde_json::from_value(value.clone()).unwrap()
}

/// A small model with several blocks of every kind.
pub(crate) fn sizes() -> ModelSizes {
    ModelSizes {
        vocab_size: 64,
        hidden_size: 32,
        intermediate_size: 48,
        num_layers: 6,
        num_heads: 2,
        num_kv_heads: 1,
        head_dim: 16,
        vision_depth: 8,
        vision_hidden_size: 32,
        vision_intermediate_size: 48,
        vision_num_heads: 2,
        patch_size: 8,
        spatial_merge_size: 2,
        position_side: 4,
        deepstack_layers: vec![2, 5],
        window_size: 32,
        full_attention_blocks: vec![3, 7],
        max_position_embeddings: 512,
        tie_word_embeddings: false,
    }
}

/// Its special tokens.
pub(crate) fn ids() -> SpecialIds {
    SpecialIds { image: 1, video: 2, vision_start: 3, vision_end: 4, turn_end: 5, document_end: 6 }
}
