//! The standard normal distribution function and its inverse, to a few units in the last place.
//!
//! Near the centre the area is a series of positive terms; in the tail it is the density times Mills' ratio, a
//! continued fraction. The inverse is Newton's method on the same two forms (on the logarithm in the tail), so it
//! is as exact as they are. The density's normalisation, the series and the fraction: Abramowitz and Stegun,
//! 26.2.1, 26.2.11 and 26.2.14.

use super::Probability;
use std::f64::consts::PI;

/// Where the central series gives way to the continued fraction, in standard deviations.
const TAIL_START: f64 = 2.0;
/// A tail beyond this is answered by the fraction: the area outside 2.04 standard deviations.
const TAIL_AREA: f64 = 0.02;

/// The standard normal density.
pub fn density(x: f64) -> f64 {
    (-0.5 * x * x).exp() / (2.0 * PI).sqrt()
}

/// The area below `x`, with its complement; both keep their relative precision far into the tails.
pub fn distribution(x: f64) -> Probability {
    if x.abs() < TAIL_START {
        let area = central_area(x);
        return Probability { value: 0.5 + area, complement: 0.5 - area };
    }
    let tail = density(x) * mills_ratio(x.abs());
    let upper = Probability { value: 1.0 - tail, complement: tail };
    if x > 0.0 { upper } else { upper.opposite() }
}

/// The `x` below which the area is `p`: minus infinity at 0, plus infinity at 1, NaN outside [0, 1].
///
/// The smaller of the two halves of `p` is what counts, so that a probability close to one answers exactly too.
pub fn quantile(p: Probability) -> f64 {
    let (small, sign) = if p.value <= p.complement { (p.value, -1.0) } else { (p.complement, 1.0) };
    if small.is_nan() || small < 0.0 {
        return f64::NAN;
    }
    if small == 0.0 {
        return sign * f64::INFINITY;
    }
    sign * if small > TAIL_AREA {
        central_quantile(0.5 * (p.value - p.complement).abs())
    } else {
        tail_quantile(small)
    }
}

/// The area between 0 and `x`, by the series `density(x) · (x + x³/3 + x⁵/(3·5) + …)`.
fn central_area(x: f64) -> f64 {
    let (mut term, mut sum, mut divisor) = (x, x, 1.0);
    while term.abs() > sum.abs() * 1e-18 {
        divisor += 2.0;
        term *= x * x / divisor;
        sum += term;
    }
    density(x) * sum
}

/// Mills' ratio `tail(x) / density(x)` for `x >= 2`: the fraction `1/(x + 1/(x + 2/(x + 3/(x + …))))`.
fn mills_ratio(x: f64) -> f64 {
    // Modified Lentz: all partial quotients are positive, so no step divides by zero.
    let (mut value, mut numerator, mut denominator) = (x, x, 0.0);
    for k in 1..2000 {
        let k = f64::from(k);
        denominator = 1.0 / (x + k * denominator);
        numerator = x + k / numerator;
        let factor = numerator * denominator;
        value *= factor;
        if (factor - 1.0).abs() < 1e-16 {
            break;
        }
    }
    1.0 / value
}

/// The positive `x` with the given area between 0 and `x`. Newton from the left of a concave function.
fn central_quantile(area: f64) -> f64 {
    let mut x = area * (2.0 * PI).sqrt();
    for _ in 0..50 {
        let step = (area - central_area(x)) / density(x);
        x += step;
        if step.abs() <= 1e-16 * x.abs() {
            break;
        }
    }
    x
}

/// The positive `x` with the given small area above it. Newton on the logarithm, which is concave.
fn tail_quantile(tail: f64) -> f64 {
    let target = tail.ln() + 0.5 * (2.0 * PI).ln();
    let mut x = (-2.0 * tail.ln()).sqrt();
    for _ in 0..50 {
        // The approach is from the right; the fraction below wants at least TAIL_START.
        let ratio = mills_ratio(x.max(TAIL_START));
        let step = (ratio.ln() - 0.5 * x * x - target) * ratio;
        x += step;
        if step.abs() <= 1e-16 * x {
            break;
        }
    }
    x
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::stats::binomial::tests::golden;

    #[test]
    fn quantile_and_distribution_equal_the_high_precision_table() {
        for row in golden()["normal"].as_array().unwrap() {
            let [p, q, x] = ["p", "q", "x"].map(|k| row[k].as_f64().unwrap());
            let error = |got: f64, want: f64| if want == 0.0 { got.abs() } else { (got / want - 1.0).abs() };
            let answer = quantile(Probability { value: p, complement: q });
            assert!(error(answer, x) < 2e-15, "quantile({p}): {answer} instead of {x}");
        }
        for row in golden()["normal_distribution"].as_array().unwrap() {
            let [x, p, q] = ["x", "p", "q"].map(|k| row[k].as_f64().unwrap());
            let got = distribution(x);
            for (got, want) in [(got.value, p), (got.complement, q)] {
                assert!((got / want - 1.0).abs() < 2e-14, "distribution({x}): {got} instead of {want}");
            }
        }
    }

    #[test]
    fn quantile_answers_its_edges() {
        assert_eq!(quantile(Probability::new(0.0)), f64::NEG_INFINITY);
        assert_eq!(quantile(Probability::new(1.0)), f64::INFINITY);
        assert_eq!(quantile(Probability::new(0.5)), 0.0);
        assert!(quantile(Probability::new(-0.1)).is_nan());
        assert!(quantile(Probability::new(f64::NAN)).is_nan());
    }
}
