//! Pointwise non-linearities, alone and gated.

use super::plain;
use candle_core::{Result, Tensor};

/// A pointwise non-linearity, named as in Hugging Face's `hidden_act`.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Activation {
    /// `x · sigmoid(x)`.
    Silu,
    /// GELU with the hyperbolic tangent (`gelu_pytorch_tanh`).
    GeluTanh,
    /// GELU with the error function (`gelu`).
    GeluErf,
    /// `x · sigmoid(1.702 x)` (`quick_gelu`).
    QuickGelu,
}

/// Applies `activation` to every element.
pub fn activate(x: &Tensor, activation: Activation) -> Result<Tensor> {
    plain::activate(x, activation)
}

/// `activation(gate) · up`, the middle of a gated MLP.
///
/// # Shapes
/// - `gate`, `up`: `[rows, width]`
/// - returns: same
pub fn gated(gate: &Tensor, up: &Tensor, activation: Activation) -> Result<Tensor> {
    plain::gated(gate, up, activation)
}
