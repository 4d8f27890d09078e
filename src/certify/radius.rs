//! From one count to one radius: the step that everything else in `certify` rests on.

use crate::error::{Error, Result};
use crate::pixels::resize::ResizeOperator;
use crate::stats::{Probability, binomial, normal};

/// One certified radius with the bound behind it.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct RadiusRow {
    /// Lower confidence bound of the class's probability under noise, in [0, 1].
    pub p_lower: f64,
    /// Whether the bound is below one half, so that nothing is certified.
    pub abstain: bool,
    /// Radius in the L2 norm of pixels in [0, 1]: `sigma · Φ⁻¹(p_lower)`, 0 when abstained.
    pub radius: f64,
}

impl RadiusRow {
    /// The radius that a lower bound of the class's probability certifies.
    pub fn of_bound(bound: Probability, sigma: f64) -> Self {
        let abstain = bound.value < 0.5;
        let radius = if abstain { 0.0 } else { sigma * normal::quantile(bound) };
        Self { p_lower: bound.value, abstain, radius }
    }
}

/// The L2 radius within which a class seen `count` times in `n` noisy draws is certain with confidence `1 - alpha`.
///
/// `radius = sigma · Φ⁻¹(p_lower)`, `p_lower` the one-sided Clopper-Pearson bound. A bound of exactly one half is
/// a radius of 0, not an abstention. [Cohen 2019, Theorem 1 and section 3.2.2]
///
/// # Errors
/// `n = 0`, `count > n`, `alpha` outside (0, 1), or `sigma` not a positive finite number.
pub fn radius(count: u64, n: u64, alpha: f64, sigma: f64) -> Result<RadiusRow> {
    if !(sigma > 0.0 && sigma.is_finite()) {
        return Err(Error::usage(format!("sigma must be a positive finite number: {sigma}")));
    }
    Ok(RadiusRow::of_bound(binomial::lower_bound(count, n, alpha)?, sigma))
}

/// A radius in the pixels of the original image, `[height, width]`: what the resize to `model` cannot stretch beyond
/// `radius`. It holds for the linear resize without rounding; a processor that rounds to eight bits is not covered.
///
/// # Errors
/// When a side is zero.
pub fn transport(radius: f64, original: [usize; 2], model: [usize; 2]) -> Result<f64> {
    if original == model {
        return Ok(radius);
    }
    Ok(radius / ResizeOperator::new(original, model)?.norm())
}

/// The smallest `n` at which a unanimous vote is certified: `ceil(ln alpha / ln ½)`, exactly.
pub fn smallest_certifying_n(alpha: f64) -> u64 {
    // 0.5^n is exact down to 2^-1074, below every positive f64.
    (1..=1074).find(|&n| 0.5f64.powi(n) <= alpha).map_or(1075, |n| n as u64)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_radius_is_linear_in_sigma_and_never_above_a_unanimous_vote() {
        for n in [10u64, 100, 1000] {
            for alpha in [0.05, 0.001] {
                let unit = |count| radius(count, n, alpha, 1.0).unwrap();
                for count in 0..=n {
                    let (row, scaled) = (unit(count), radius(count, n, alpha, 0.25).unwrap());
                    assert_eq!(scaled.radius, 0.25 * row.radius);
                    assert!(row.radius <= unit(n).radius);
                    assert_eq!(row.abstain, row.p_lower < 0.5);
                    assert!(!row.abstain || row.radius == 0.0);
                }
            }
        }
    }

    #[test]
    fn unanimous_radii_equal_known_values() {
        // Multiples of sigma at alpha 0.001.
        for (n, known) in [(100, 1.5005), (1000, 2.4633), (10_000, 3.1986), (100_000, 3.8115)] {
            assert!((radius(n, n, 0.001, 1.0).unwrap().radius - known).abs() < 5e-5);
        }
    }

    #[test]
    fn a_bound_of_one_half_is_a_radius_of_zero_and_no_abstention() {
        let row = radius(10, 10, 0.5f64.powi(10), 0.25).unwrap();
        assert_eq!(row, RadiusRow { p_lower: 0.5, abstain: false, radius: 0.0 });
        assert!(radius(10, 10, 0.5f64.powi(10).next_down(), 0.25).unwrap().abstain);
    }

    #[test]
    fn the_smallest_certifying_n_is_the_first_that_answers() {
        assert_eq!(smallest_certifying_n(0.001), 10);
        for alpha in [0.9, 0.5, 0.25, 0.05, 0.01, 1e-6, 1e-12] {
            let n = smallest_certifying_n(alpha);
            assert!(!radius(n, n, alpha, 1.0).unwrap().abstain);
            assert!(n == 1 || radius(n - 1, n - 1, alpha, 1.0).unwrap().abstain);
        }
    }

    #[test]
    fn impossible_sigmas_are_refused() {
        for sigma in [0.0, -1.0, f64::NAN, f64::INFINITY] {
            assert!(radius(9, 10, 0.1, sigma).is_err());
        }
    }
}
