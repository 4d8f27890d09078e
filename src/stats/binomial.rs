//! Exact binomial statistics: tails, one-sided Clopper-Pearson bounds, and the two-sided test at one half.
//!
//! Probabilities are built on Loader's saddle-point form of the binomial probability (every term small, so nothing
//! cancels even at ten million trials) and on the continued fraction of the incomplete beta function; bounds are
//! Newton's method on the logarithm of the tail. Measured against a table of 50 digits: better than 1e-13 relative,
//! of the bound and of its complement, for n up to 1e7 and alpha down to 1e-6.
//!
//! References: Clopper and Pearson 1934; Loader 2000, "Fast and accurate computation of binomial probabilities";
//! DiDonato and Morris 1992 (ACM TOMS 18), the fraction.

use super::{Probability, normal};
use crate::error::{Error, Result};
use std::f64::consts::PI;

/// The largest number of trials whose tail at one half is summed in whole numbers.
const EXACT_TRIALS: u64 = 120;

/// Lower end of the one-sided Clopper-Pearson interval: the `p` at which `count` or more successes in `n` trials
/// have probability `alpha`. 0 at `count = 0`, `alpha^(1/n)` at `count = n`.
///
/// With confidence `1 - alpha` the true success probability is at least this. On which side of one half the bound
/// falls is decided by the tail at one half itself, not by the rounding of the answer.
///
/// # Errors
/// `n = 0`, `count > n`, or `alpha` outside (0, 1).
pub fn lower_bound(count: u64, n: u64, alpha: f64) -> Result<Probability> {
    if n == 0 || count > n {
        return Err(Error::usage(format!("a count of {count} in n = {n} draws is impossible")));
    }
    if !(alpha > 0.0 && alpha < 1.0) {
        return Err(Error::usage(format!("alpha must lie strictly between 0 and 1: {alpha}")));
    }
    if count == 0 {
        return Ok(Probability { value: 0.0, complement: 1.0 });
    }
    let bound = if count == n {
        Probability { value: alpha.powf(1.0 / n as f64), complement: -(alpha.ln() / n as f64).exp_m1() }
    } else if alpha <= 0.5 {
        solve_tail(count, n, alpha)
    } else {
        // The opposite event is the small one: fewer than `count` successes, at probability 1 - alpha.
        solve_tail(n - count + 1, n, 1.0 - alpha).opposite()
    };
    Ok(settle_half(bound, count, n, alpha))
}

/// Upper end of the one-sided Clopper-Pearson interval: one minus the lower end for the failures.
///
/// # Errors
/// As [`lower_bound`].
pub fn upper_bound(count: u64, n: u64, alpha: f64) -> Result<Probability> {
    if count > n {
        return Err(Error::usage(format!("a count of {count} in n = {n} draws is impossible")));
    }
    Ok(lower_bound(n - count, n, alpha)?.opposite())
}

/// Probability of `count` or more successes in `n` trials of success probability `p`.
pub fn upper_tail(count: u64, n: u64, p: Probability) -> f64 {
    if count == 0 || (count <= n && p.complement == 0.0) {
        return 1.0;
    }
    if count > n || p.value == 0.0 {
        return 0.0;
    }
    if count as f64 >= (n + 1) as f64 * p.value {
        log_tail(count, n, p).0.exp()
    } else {
        1.0 - log_tail(n - count + 1, n, p.opposite()).0.exp()
    }
}

/// P-value of the two-sided exact test that two classes seen `first` and `second` times are equally likely.
///
/// At one half the distribution is symmetric: twice the tail beyond the larger count, at most 1. Exact (rounded
/// once) up to 120 trials and for unanimous counts.
pub fn two_sided_test(first: u64, second: u64) -> f64 {
    let trials = first + second;
    if trials == 0 { 1.0 } else { (2.0 * tail_at_half(first.max(second), trials)).min(1.0) }
}

/// Natural logarithm of the probability of exactly `count` successes in `n` trials, for `0 < p < 1`.
pub fn log_probability(count: u64, n: u64, p: Probability) -> f64 {
    if count > n {
        return f64::NEG_INFINITY;
    }
    let ln_complement = if p.value < 0.5 { (-p.value).ln_1p() } else { p.complement.ln() };
    let ln_value = if p.complement < 0.5 { (-p.complement).ln_1p() } else { p.value.ln() };
    if count == 0 {
        return n as f64 * ln_complement;
    }
    if count == n {
        return n as f64 * ln_value;
    }
    let (k, rest, total) = (count as f64, (n - count) as f64, n as f64);
    stirling_error(n)
        - stirling_error(count)
        - stirling_error(n - count)
        - deviance(k, total * p.value)
        - deviance(rest, total * p.complement)
        + 0.5 * (total / (2.0 * PI * k * rest)).ln()
}

/// Probability of `count` or more successes in `n` fair coin tosses (`1 <= count <= n`).
fn tail_at_half(count: u64, n: u64) -> f64 {
    if count == n {
        return 0.5f64.powi(i32::try_from(n).unwrap_or(i32::MAX));
    }
    if n > EXACT_TRIALS {
        return upper_tail(count, n, Probability { value: 0.5, complement: 0.5 });
    }
    // Binomial coefficients from the top: n choose n, n choose n - 1, ...; below 2^120, so in whole numbers.
    let (mut coefficient, mut sum) = (1u128, 1u128);
    for successes in (count..n).rev() {
        coefficient = coefficient * u128::from(successes + 1) / u128::from(n - successes);
        sum += coefficient;
    }
    sum as f64 * 0.5f64.powi(n as i32)
}

/// Puts a bound that lies within rounding of one half on the side where it belongs.
fn settle_half(bound: Probability, count: u64, n: u64, alpha: f64) -> Probability {
    if (bound.value - 0.5).abs() > 1e-9 {
        return bound;
    }
    let tail = tail_at_half(count, n);
    if tail == alpha {
        Probability { value: 0.5, complement: 0.5 }
    } else if tail < alpha && bound.value <= 0.5 {
        Probability::new(0.5f64.next_up())
    } else if tail > alpha && bound.value >= 0.5 {
        Probability::new(0.5f64.next_down())
    } else {
        bound
    }
}

/// The `p` at which `log_tail(count, n, p)` is `ln(tail)`, for `0 < tail <= 1/2` and `1 <= count < n`, or
/// `count = n` with a tail that is not small.
///
/// The unknown is the log-odds of `p`: both halves of `p` come out precise, and the logarithm of the tail is concave
/// in it, so Newton's method converges from any start.
fn solve_tail(count: u64, n: u64, tail: f64) -> Probability {
    if count == n {
        let value = tail.powf(1.0 / n as f64);
        return Probability { value, complement: -(tail.ln() / n as f64).exp_m1() };
    }
    let (a, b) = (count as f64, (n - count + 1) as f64);
    let deviations = normal::quantile(Probability { value: tail, complement: 1.0 - tail });
    // The median of the beta distribution lies between its mean and its mode, so no root lies beyond both.
    let ceiling = (a / b).ln().max(((a - 1.0) / (b - 1.0)).ln()) + 1e-6;
    let mut log_odds = ((a / b).ln() + deviations * (1.0 / a + 1.0 / b).sqrt()).min(ceiling);
    for _ in 0..200 {
        let (value, slope) = log_tail(count, n, from_log_odds(log_odds));
        let step = (tail.ln() - value) / slope;
        log_odds = (log_odds + step).min(ceiling);
        if step.abs() <= 2e-16 * log_odds.abs().max(1.0) {
            break;
        }
    }
    from_log_odds(log_odds)
}

/// The probability with the given log-odds.
pub(super) fn from_log_odds(log_odds: f64) -> Probability {
    Probability { value: 1.0 / (1.0 + (-log_odds).exp()), complement: 1.0 / (1.0 + log_odds.exp()) }
}

/// Logarithm of the probability of `count` or more successes, and its derivative in the log-odds of `p`.
/// Meant for `count >= (n + 1) p`, `count >= 1`, where the fraction converges fast.
fn log_tail(count: u64, n: u64, p: Probability) -> (f64, f64) {
    let fraction = beta_fraction(count as f64, (n - count + 1) as f64, p);
    let leading = (count as f64 * p.complement / fraction).ln();
    (log_probability(count, n, p) + leading, fraction)
}

/// The denominator `d` in `I_x(a, b) = x^a y^b / (B(a, b) d)`, by DiDonato and Morris' fraction (modified Lentz).
pub(super) fn beta_fraction(a: f64, b: f64, p: Probability) -> f64 {
    let (x, y) = (p.value, p.complement);
    let lambda = a * y - b * x;
    let partial_denominator = |m: f64| {
        m + m * (b - m) * x / (a + 2.0 * m - 1.0)
            + (a + m) * (lambda + 1.0 + m * (1.0 + y)) / (a + 2.0 * m + 1.0)
    };
    let mut value = a * (lambda + 1.0) / (a + 1.0);
    let (mut numerator, mut denominator) = (value, 0.0);
    for m in 1..100_000 {
        let m = f64::from(m);
        let last = a + 2.0 * m - 1.0;
        let partial_numerator = (a + m - 1.0) * ((a + b + m - 1.0) / last) * (m * (b - m) / last) * x * x;
        if partial_numerator == 0.0 {
            break;
        }
        let next = partial_denominator(m);
        denominator = 1.0 / (next + partial_numerator * denominator);
        numerator = next + partial_numerator / numerator;
        let factor = numerator * denominator;
        value *= factor;
        if (factor - 1.0).abs() < 1e-16 {
            break;
        }
    }
    value
}

/// `ln n! - ln(sqrt(2 π n) (n/e)^n)`: what Stirling's formula leaves out.
pub(super) fn stirling_error(n: u64) -> f64 {
    // Below 16 the series is too short: step up with the difference of neighbours.
    let mut correction = 0.0;
    let mut at = n.max(1) as f64;
    while at < 16.0 {
        correction += (at + 0.5) * (1.0 / at).ln_1p() - 1.0;
        at += 1.0;
    }
    let r = 1.0 / (at * at);
    let series = 1.0 / 12.0
        - r * (1.0 / 360.0
            - r * (1.0 / 1260.0 - r * (1.0 / 1680.0 - r * (1.0 / 1188.0 - r * (691.0 / 360_360.0)))));
    correction + series / at
}

/// `x ln(x / mean) + mean - x` without cancellation (Loader's deviance term), for `x >= 0` and a positive mean.
pub(super) fn deviance(x: f64, mean: f64) -> f64 {
    if x == 0.0 {
        return mean;
    }
    let difference = x - mean;
    if difference.abs() >= 0.1 * (x + mean) {
        return x * (x / mean).ln() + mean - x;
    }
    // With v = (x - mean)/(x + mean), ln(x/mean) = 2 (v + v³/3 + v⁵/5 + ...).
    let v = difference / (x + mean);
    let mut sum = difference * v;
    let mut power = 2.0 * x * v;
    let mut odd = 1.0;
    loop {
        power *= v * v;
        odd += 2.0;
        let next = sum + power / odd;
        if next == sum {
            return sum;
        }
        sum = next;
    }
}

#[cfg(test)]
pub(crate) mod tests {
    use super::*;
    use serde_json::Value;

    /// The table of `scripts/golden/binomial.py`.
    pub(crate) fn golden() -> Value {
        serde_json::from_str(include_str!(concat!(env!("CARGO_MANIFEST_DIR"), "/tests/golden/binomial.json")))
            .unwrap()
    }

    fn float(row: &Value, key: &str) -> f64 {
        row[key].as_f64().unwrap()
    }

    fn check_close(what: &str, got: f64, want: f64, tolerance: f64) {
        assert!((got / want - 1.0).abs() < tolerance, "{what}: {got:e} instead of {want:e}");
    }

    #[test]
    fn bounds_equal_the_high_precision_table() {
        // The contract asks for 1e-12; what is reached is tighter, and held here.
        for row in golden()["lower_bound"].as_array().unwrap() {
            let [count, n] = ["count", "n"].map(|k| row[k].as_u64().unwrap());
            let alpha = float(row, "alpha");
            let what = format!("count {count}, n {n}, alpha {alpha}");
            let bound = lower_bound(count, n, alpha).unwrap();
            check_close(&what, bound.value, float(row, "p"), 1e-13);
            check_close(&what, bound.complement, float(row, "q"), 1e-13);
            let mirrored = upper_bound(n - count, n, alpha).unwrap();
            assert_eq!((mirrored.complement, mirrored.value), (bound.value, bound.complement), "{what}");
        }
    }

    #[test]
    fn tails_equal_the_high_precision_table() {
        for row in golden()["upper_tail"].as_array().unwrap() {
            let [count, n] = ["count", "n"].map(|k| row[k].as_u64().unwrap());
            let p = Probability { value: float(row, "p"), complement: float(row, "q") };
            check_close(
                &format!("tail {count} {n} {p:?}"),
                upper_tail(count, n, p),
                float(row, "tail"),
                2e-12,
            );
        }
        for row in golden()["two_sided"].as_array().unwrap() {
            let [first, second] = ["first", "second"].map(|k| row[k].as_u64().unwrap());
            for got in [two_sided_test(first, second), two_sided_test(second, first)] {
                check_close(&format!("two-sided {first} {second}"), got, float(row, "p"), 1e-13);
            }
        }
    }

    #[test]
    fn closed_forms_hold() {
        for (n, alpha) in [(1, 0.3), (10, 0.001), (1000, 0.05), (10_000_000, 1e-6)] {
            assert_eq!(lower_bound(0, n, alpha).unwrap().value, 0.0);
            assert_eq!(upper_bound(n, n, alpha).unwrap().value, 1.0);
            check_close(
                "unanimous",
                lower_bound(n, n, alpha).unwrap().value,
                alpha.powf(1.0 / n as f64),
                1e-15,
            );
            let single = -((-alpha).ln_1p() / n as f64).exp_m1();
            check_close("one of n", lower_bound(1, n, alpha).unwrap().value, single, 1e-13);
        }
        assert_eq!(two_sided_test(0, 0), 1.0);
        assert_eq!(two_sided_test(7, 7), 1.0);
        assert_eq!(two_sided_test(10, 0), 2.0 * 0.5f64.powi(10));
    }

    #[test]
    fn bounds_on_one_half_fall_on_the_right_side() {
        for n in 1..=60u64 {
            for count in n / 2 + 1..=n {
                let tail = tail_at_half(count, n);
                let half = |alpha: f64| lower_bound(count, n, alpha).unwrap().value;
                assert_eq!(half(tail), 0.5, "count {count} of {n} at its own tail");
                assert!(half(tail.next_up()) > 0.5, "count {count} of {n}");
                assert!(half(tail.next_down()) < 0.5, "count {count} of {n}");
            }
        }
    }

    #[test]
    fn bounds_are_monotone_in_count_alpha_and_n() {
        let value = |count, n, alpha| lower_bound(count, n, alpha).unwrap().value;
        for n in [1, 2, 7, 40] {
            for alpha in [1e-6, 0.001, 0.2, 0.5, 0.7, 0.999] {
                for count in 1..=n {
                    assert!(value(count, n, alpha) > value(count - 1, n, alpha), "{count} of {n} at {alpha}");
                    assert!(
                        value(count, n, alpha) > value(count, n, alpha * 0.9),
                        "{count} of {n} at {alpha}"
                    );
                }
            }
        }
        for factor in [10, 100, 1000] {
            assert!(value(9 * factor * 10, 10 * factor * 10, 0.001) > value(9 * factor, 10 * factor, 0.001));
        }
    }

    #[test]
    fn coverage_is_at_least_the_confidence_for_every_p() {
        // Exact, not simulated: the probability that the bound exceeds p, summed over all counts.
        for (n, alpha) in [(12u64, 0.001), (50, 0.05), (200, 0.01)] {
            let bounds: Vec<f64> = (0..=n).map(|k| lower_bound(k, n, alpha).unwrap().value).collect();
            for step in 1..200 {
                let p = Probability::new(f64::from(step) / 200.0);
                let missed: f64 = (0..=n)
                    .filter(|&k| bounds[k as usize] > p.value)
                    .map(|k| log_probability(k, n, p).exp())
                    .sum();
                assert!(missed <= alpha * (1.0 + 1e-12), "n {n}, p {}: {missed}", p.value);
            }
        }
    }

    #[test]
    fn impossible_questions_are_refused() {
        for (count, n, alpha) in [(2, 1, 0.1), (0, 0, 0.1), (1, 2, 0.0), (1, 2, 1.0), (1, 2, f64::NAN)] {
            assert!(lower_bound(count, n, alpha).is_err());
            assert!(upper_bound(count, n, alpha).is_err());
        }
    }
}
