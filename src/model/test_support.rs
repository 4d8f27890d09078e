//! Reading reference numbers in tests; absent numbers skip a test.

use super::weights::TensorFile;
use serde::de::DeserializeOwned;
use serde_json::Value;
use std::path::{Path, PathBuf};

/// The directory of reference numbers, when there is one.
pub(crate) fn fixtures() -> Option<PathBuf> {
    let shared = std::env::var("SAFEMED_SHARED")
        .unwrap_or_else(|_| concat!(env!("CARGO_MANIFEST_DIR"), "/../shared").to_string());
    Some(Path::new(&shared).join("reference/fixtures")).filter(|dir| dir.is_dir())
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
