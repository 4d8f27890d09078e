//! The model dressed for each part: as policy ([`policy`]), as attack target ([`target`]) and as base classifier
//! ([`classifier`]); and what it saw before ([`features`]). The only code that knows both sides.

pub mod classifier;
pub mod features;
pub mod policy;
pub mod target;
