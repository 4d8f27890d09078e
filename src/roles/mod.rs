//! The model dressed for each part: as policy ([`policy`]), as attack target ([`target`]) and as base classifier
//! ([`classifier`]); and what it saw before ([`features`]). The only code that knows both sides.
//!
//! Adversarial training attacks more than likelihoods: the expected reward ([`expected_reward`]), the divergence from what the
//! model says about the clean image ([`divergence`]), and any of them in the mean over noise ([`noisy`]).

pub mod classifier;
pub mod divergence;
pub mod expected_reward;
pub mod features;
pub mod noisy;
pub mod policy;
pub mod target;
