//! What a run does: one file per run, read top to bottom; and what every run shares (settings, run directory, progress).
//!
//! Recipes never print and know no command line: they report through `progress` and leave their numbers in the run
//! directory.

pub mod config;
pub mod progress;
pub mod run;
