//! The vision-language model: files, tokens, positions, pixels and the network itself.

pub mod assistant;
pub mod chat;
pub mod config;
pub mod denoiser;
pub mod generate;
pub mod hub;
pub mod initialise;
pub mod kv_cache;
pub mod loader;
pub mod lora;
pub mod parameters;
pub mod patches;
pub mod positions;
pub mod processor;
pub mod resize;
pub mod sampling;
pub mod tensor_file;
pub mod text;
pub mod tokenizer;
pub mod truncate;
pub mod vision;
pub mod vlm;
pub mod weights;

#[cfg(test)]
pub(crate) mod test_support;
#[cfg(test)]
mod vlm_tests;
