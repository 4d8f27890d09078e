//! What a run does: one file per run, read top to bottom; and what every run shares (settings, run directory, progress).
//!
//! Recipes never print and know no command line: they report through `progress` and leave their numbers in the run
//! directory.

pub mod adapter;
pub mod adversary;
pub mod aims;
pub mod answers;
pub mod attack;
pub mod audit;
mod blind;
mod board;
pub mod certify;
pub mod checkpoint;
pub mod config;
pub mod crosscheck;
pub mod data;
pub mod demo;
pub mod denoise;
pub mod doctor;
pub mod estimate;
pub mod eval;
pub mod export;
pub mod failure;
pub mod fit;
pub mod grpo;
pub mod inputs;
pub mod items;
pub mod job;
pub mod lesson;
pub mod merge;
pub mod parity;
pub mod parity_io;
pub mod pictures;
pub mod predict;
pub mod presets;
pub mod progress;
pub mod questions;
pub mod radius;
pub mod records;
pub mod report;
mod room;
pub mod run;
pub mod scratch;
pub mod sft;
pub mod step;
pub mod trades;
pub mod train;
pub mod validation;
pub mod verdict;
pub mod watch;
