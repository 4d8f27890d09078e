//! Adversarial perturbations of pixels: budgets, projected gradient steps, rounding to eight bits.
//!
//! An attack knows pixels in [0, 1], a loss and its gradient ([`Objective`]); what the loss says of which model is
//! the business of the floors above. So is measuring robust accuracy, and leaving out items that are wrong anyway.

pub mod apgd;
pub mod ball;
pub mod config;
pub mod lattice;
pub mod loss;
pub mod noise;
pub mod pgd;
pub mod search;
pub mod square;

pub use apgd::apgd;
pub use ball::{Ball, Norm};
pub use config::{AttackConfig, Fraction, Method, PgdOutput};
pub use loss::OptionLoss;
pub use noise::NoiseBank;
pub use pgd::pgd;
pub use search::{Adversarial, Iterate, Problem, Rounding};
pub use square::square;

use crate::error::Result;
use candle_core::Tensor;

/// What an attack drives up.
///
/// Rows must not influence one another: then an image's result depends neither on the batch nor on its place in it.
pub trait Objective {
    /// Loss per item (higher is worse for the model) and its gradient by the pixels, of the pixels' shape.
    ///
    /// `pixels` [b, 3, h, w] in [0, 1] are candidates for the rows `items` of the problem.
    fn loss_and_gradient(&self, pixels: &Tensor, items: &[usize]) -> Result<(Vec<f32>, Tensor)>;

    /// Loss per item without the gradient.
    fn loss(&self, pixels: &Tensor, items: &[usize]) -> Result<Vec<f32>>;

    /// Whether the model's own answer on these pixels is wrong, per item.
    fn is_broken(&self, pixels: &Tensor, items: &[usize]) -> Result<Vec<bool>>;
}

/// An objective that ends the attack with the error of `check`, as when someone asks to stop: an attack may take many minutes.
pub struct Checked<'a> {
    /// What is driven up.
    pub objective: &'a dyn Objective,
    /// Asked before each look at the model.
    pub check: &'a dyn Fn() -> Result<()>,
}

impl Objective for Checked<'_> {
    fn loss_and_gradient(&self, pixels: &Tensor, items: &[usize]) -> Result<(Vec<f32>, Tensor)> {
        (self.check)()?;
        self.objective.loss_and_gradient(pixels, items)
    }

    fn loss(&self, pixels: &Tensor, items: &[usize]) -> Result<Vec<f32>> {
        (self.check)()?;
        self.objective.loss(pixels, items)
    }

    fn is_broken(&self, pixels: &Tensor, items: &[usize]) -> Result<Vec<bool>> {
        (self.check)()?;
        self.objective.is_broken(pixels, items)
    }
}

impl std::fmt::Debug for Checked<'_> {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Checked").finish_non_exhaustive()
    }
}

/// Attacks all rows of `problem` by the method that `config` names.
///
/// # Errors
/// Settings that make no sense; losses and gradients that are not finite.
pub fn attack(objective: &dyn Objective, problem: &Problem, config: &AttackConfig) -> Result<Adversarial> {
    match config.method {
        Method::Noise | Method::Fgsm | Method::Pgd => pgd(objective, problem, config, &mut |_| Ok(())),
        Method::Apgd => apgd(objective, problem, config),
        Method::Square => square(objective, problem, config),
    }
}

#[cfg(test)]
mod tests;
