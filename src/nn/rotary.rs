//! Rotary position embedding, half-rotation form, angles given per row.

use super::plain;
use candle_core::{Result, Tensor};

/// Rotates each head's pairs `(x[i], x[i + head_dim/2])` by the row's angles.
///
/// # Shapes
/// - `x`: `[rows, heads · head_dim]`
/// - `cos`, `sin`: `[rows, head_dim / 2]`, plain data: no gradient flows to them
/// - returns: as `x`
pub fn rotary(x: &Tensor, cos: &Tensor, sin: &Tensor) -> Result<Tensor> {
    plain::rotary(x, cos, sin)
}
