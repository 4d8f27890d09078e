//! safemed trains, attacks, certifies and evaluates medical vision-language models.

pub mod attack;
pub mod backend;
pub mod certify;
pub mod cli;
pub mod data;
pub mod error;
pub mod eval;
pub mod model;
pub mod nn;
pub mod pixels;
pub mod recipes;
pub mod reward;
pub mod rng;
pub mod roles;
pub mod stats;
pub mod train;
