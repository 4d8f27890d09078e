//! The model dressed for each part: as policy ([`policy`]), as attack target ([`target`]) and as base classifier
//! ([`classifier`]). The only code that knows both sides.

pub mod classifier;
pub mod policy;
pub mod target;
