//! The vision-language model: files, tokens, positions, pixels and the network itself.

pub mod chat;
pub mod config;
pub mod positions;
pub mod tokenizer;
pub mod weights;

#[cfg(test)]
pub(crate) mod test_support;
