//! Randomised smoothing: noise and counts in, a certificate with its evidence out.
//!
//! A [`BaseClassifier`] answers noisy pixels; [`smooth`] counts its answers under Gaussian noise and turns counts
//! into a prediction with an L2 radius; [`radius`] is that step alone; [`sequential`] decides how many draws are enough;
//! [`curve`] summarises many certificates; [`audit`] recomputes certificates, ours and Cohen-style files, from their own
//! counts.
//!
//! What a class is, and that a vision-language model answers, is not known here. A certificate speaks of the
//! smoothed classifier, never of the base one. Theorem and algorithms: Cohen, Rosenfeld and Kolter 2019,
//! arXiv 1902.02918.

pub mod audit;
pub mod curve;
pub mod radius;
pub mod sequential;
pub mod smooth;

use crate::error::Result;
use candle_core::Tensor;
use std::ops::Range;

pub use curve::{Curve, Outcome};
pub use radius::{RadiusRow, radius, transport};
pub use sequential::{Procedure, Rule, Sequential, Stop};
pub use smooth::{Certificate, Draws, Prediction, SmoothingConfig, certify, count_draws};

/// What is smoothed: an answer to each noisy image by itself.
///
/// The answer to one row must not depend on the other rows of the batch, or no certificate holds. It may be random where
/// the randomness follows from the index of the draw: the certificate is then about noise and decoding together.
pub trait BaseClassifier {
    /// Number of classes; an unreadable answer is a class of its own.
    fn num_classes(&self) -> usize;

    /// The class of each row, below [`BaseClassifier::num_classes`]; the rows are the `draws` in order.
    ///
    /// # Shapes
    /// - `noisy`: `[batch, 3, height, width]`, pixels in [0, 1] plus noise, not clipped
    fn classify(&self, noisy: &Tensor, draws: Range<u64>) -> Result<Vec<usize>>;
}
