//! Differentiable operations on packed sequences.
//!
//! Everything is two-dimensional, `[rows, width]`: the tokens (or patches) of all sequences of a batch stand one
//! after another, without padding, and [`attention::Layout`] says which row sees which.
//!
//! The rule of this floor: an operation is differentiable in every tensor it takes, or takes it as plain data.
//! On the CPU each operation is fused, with its own backward; elsewhere it is the composition in [`plain`], which
//! the fused one is tested against. On the CPU each element of a result is summed in an order that depends on
//! neither the number of rows nor of threads: a row's result is the same bytes in any batch.

pub mod activation;
pub mod attention;
pub mod convolution;
pub mod cross_entropy;
pub mod divergence;
pub mod dropout;
pub(crate) mod kernel;
pub mod linear;
pub mod norm;
pub mod plain;
pub mod recompute;
pub mod rotary;
pub mod rows;

#[cfg(test)]
mod tests;
