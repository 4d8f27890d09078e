//! The linear layer: frozen (input gradient only) or trainable, with or without bias.

use super::plain;
use candle_core::{Result, Tensor, Var};

/// A matrix that multiplies from the right, transposed: `y = x · weightᵀ + bias`.
#[derive(Debug, Clone)]
pub struct Linear {
    weight: Tensor,
    bias: Option<Tensor>,
}

impl Linear {
    /// A layer whose weights never get a gradient.
    ///
    /// # Shapes
    /// - `weight`: `[out, in]`, `bias`: `[out]`
    pub fn frozen(weight: &Tensor, bias: Option<&Tensor>) -> Result<Self> {
        Ok(Self { weight: weight.detach(), bias: bias.map(Tensor::detach) })
    }

    /// A layer whose weight and bias are trained.
    ///
    /// # Shapes
    /// - `weight`: `[out, in]`, `bias`: `[out]`
    pub fn trainable(weight: &Var, bias: Option<&Var>) -> Self {
        Self { weight: weight.as_tensor().clone(), bias: bias.map(|bias| bias.as_tensor().clone()) }
    }

    /// `x · weightᵀ + bias`.
    ///
    /// # Shapes
    /// - `x`: `[rows, in]`
    /// - returns: `[rows, out]`
    pub fn forward(&self, x: &Tensor) -> Result<Tensor> {
        plain::linear(x, &self.weight, self.bias.as_ref())
    }

    /// The weight as a tensor `[out, in]`, for export.
    pub fn weight(&self) -> Result<Tensor> {
        Ok(self.weight.clone())
    }
}
