//! The mathematics of training: optimiser, learning-rate schedule, advantages, policy loss.
//!
//! Everything here works on plain numbers: flat slices, lengths and counts. Models, tensors, files and checkpoints
//! belong to the floors above.

pub mod advantage;
pub mod grpo;
pub mod optimizer;
pub mod schedule;

#[cfg(test)]
pub(crate) mod test_support;
