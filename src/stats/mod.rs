//! Statistics with error bounds that hold: exact binomial confidence bounds, bounds that hold at every number of trials,
//! and the normal distribution.
//!
//! Plain numbers in, plain numbers out: no tensors, no domain words. Everything is `f64`, and a probability near one
//! travels with its complement ([`Probability`]), because `1 - p` cannot give back what rounding took.

pub mod binomial;
pub mod interval;
pub mod normal;
pub mod prior;
pub mod sequential;

/// A probability and its complement, each to full relative precision.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct Probability {
    /// The probability itself, in [0, 1].
    pub value: f64,
    /// One minus it, in [0, 1].
    pub complement: f64,
}

impl Probability {
    /// A probability given by its value alone.
    pub fn new(value: f64) -> Self {
        Self { value, complement: 1.0 - value }
    }

    /// The probability of the opposite event.
    #[must_use]
    pub fn opposite(self) -> Self {
        Self { value: self.complement, complement: self.value }
    }
}
