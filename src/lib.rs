//! safemed trains, attacks, certifies and evaluates medical vision-language models.
//!
//! # Bird's eye
//!
//! One binary, one library. A command is words ([`cli`]), a checked configuration and a run directory ([`recipes`]);
//! the mathematics lives in parts that do not know each other, and one small floor ([`roles`]) dresses the model for
//! them. It implements the experiment of SafeMed-R1 (arXiv 2512.19317) end to end and keeps an image-blind control
//! beside every accuracy.
//!
//! # Floors
//!
//! Imports go down only, and neighbours on a floor never import each other; a test holds this.
//!
//! | floor | module | what it knows |
//! |---|---|---|
//! | 5 | [`cli`] | words and people; the only place that prints |
//! | 4 | [`recipes`] | what a run does, one file for each run, read top to bottom |
//! | 3 | [`roles`] | the model as policy, as attack target, as base classifier |
//! | 2 | [`attack`] | pixels and a loss |
//! | 2 | [`certify`] | noise and counts |
//! | 2 | [`train`] | advantages, policy losses, optimiser, schedule: plain numbers |
//! | 2 | [`model`] | checkpoints, tokens, positions, the network |
//! | 2 | [`data`], [`reward`], [`eval`] | questions; the answer parser; shares with intervals |
//! | 1 | [`nn`], [`pixels`], [`stats`] | differentiable operations; images; exact bounds |
//! | 0 | [`error`], [`files`], [`backend`], [`rng`] | failures and exit statuses; files of strangers; devices and threads; named random streams |
//!
//! # What must stay true
//!
//! 1. Pixels are in [0, 1] until [`model::patches`]; normalisation happens only there.
//! 2. No operation between pixels and loss drops a gradient: `nn` is the only way to build one, lints ban candle's
//!    operations that cut the graph, and tests compare every gradient with finite differences and with transformers.
//! 3. Sequences stand packed one after another, without padding; [`nn::attention::Layout`] says who sees whom. A
//!    prompt is computed once and seen by its whole group, in training as in decoding.
//! 4. On the CPU every element of a result is summed in one fixed order: a row is the same bytes alone, in any batch,
//!    on any number of threads, cached or not. Resuming, sharding and batch size therefore change no byte.
//! 5. `attack`, `certify`, `train`, `reward`, `eval` and `stats` do not know that a vision-language model exists.
//! 6. All randomness comes from [`rng`] streams named by (seed, purpose, indices).
//! 7. Every printed number can be computed again from `records.jsonl` and `config.toml` of its run.
//! 8. Checkpoint families differ only in [`model::config`], as features; forward code never asks for a family.
//! 9. Abstention and "no answer" are variants, never sentinels.
//!
//! # Axis names in shapes
//!
//! `batch, rows, prompt, completion, vocab, hidden, heads, kv_heads, head_dim, patches, merged, channels, height, width`.
//! `rows` are the tokens (or patches) of all sequences of a batch, one after another.

pub mod attack;
pub mod backend;
pub mod certify;
pub mod cli;
pub mod data;
pub mod error;
pub mod eval;
pub mod files;
pub mod model;
pub mod nn;
pub mod pixels;
pub mod recipes;
pub mod reward;
pub mod rng;
pub mod roles;
pub mod stats;
pub mod train;
