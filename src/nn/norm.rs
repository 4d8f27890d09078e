//! Root-mean-square and layer normalisation over the last axis.

use super::plain;
use candle_core::{Result, Tensor};

/// `weight · x / sqrt(mean(x²) + rms_norm_eps)`, over consecutive runs of `weight`'s length.
///
/// Runs shorter than a row normalise each attention head by itself (`q_norm`, `k_norm`).
///
/// # Shapes
/// - `x`: `[rows, n · width]`
/// - `weight`: `[width]`
/// - returns: as `x`
pub fn rms_norm(x: &Tensor, weight: &Tensor, rms_norm_eps: f64) -> Result<Tensor> {
    plain::rms_norm(x, weight, rms_norm_eps)
}

/// `weight · (x - mean) / sqrt(variance + eps) + bias` over the last axis.
///
/// # Shapes
/// - `x`: `[rows, width]`
/// - `weight`, `bias`: `[width]`
/// - returns: as `x`
pub fn layer_norm(x: &Tensor, weight: &Tensor, bias: &Tensor, eps: f64) -> Result<Tensor> {
    plain::layer_norm(x, weight, bias, eps)
}
