//! Bounds that hold at every number of trials at once, so that one may stop whenever one likes.
//!
//! The e-value of `count` successes in `n` trials against "the success probability is at most `p`" is the mean
//! likelihood ratio of the probabilities above `p`, weighed by Krichevsky and Trofimov's prior Beta(½, ½) cut off at `p`:
//!
//! `e = ∫_p^1 (t/p)^count ((1-t)/(1-p))^(n-count) w(t) dt / ∫_p^1 w(t) dt`, `w(t) = 1/sqrt(t (1-t))`
//!
//! A ratio with `t > p` grows with each success, so under any probability up to `p` its mean never rises: `e` is a
//! supermartingale that begins at 1, and reaches `1/alpha` with probability `alpha` at most, however often one looks
//! (Ville 1939). Values agree with a table of 40 digits to 5e-14 relative for n up to 1e7.
//!
//! References: Krichevsky and Trofimov 1981; Ville 1939; Voráček 2024 (arXiv 2406.17830), without the cut.

use super::Probability;
use super::binomial::{beta_fraction, deviance, from_log_odds, stirling_error};
use crate::error::{Error, Result};
use std::f64::consts::{E, LN_2, PI};

/// The largest failure probability of an [`anytime_lower_bound`].
pub const MAX_ALPHA: f64 = 1.0 / E;

/// Natural logarithm of the e-value of `count` successes in `n >= 1` trials against every success probability up to `p`,
/// for `0 < p < 1`.
pub fn log_e_value(count: u64, n: u64, p: Probability) -> f64 {
    let (hits, misses, total) = (count as f64, (n - count) as f64, n as f64);
    let (a, b) = (hits + 0.5, misses + 0.5);
    let root = (p.value * p.complement).sqrt();
    // The integral of the prior beyond p.
    let prior = 2.0 * p.complement.sqrt().atan2(p.value.sqrt());
    if (total + 1.0) * p.value >= a {
        return (root / (beta_fraction(b, a, p.opposite()) * prior)).ln();
    }
    // The integral from 0 to 1, which is B(a, b) / (p^count (1-p)^(n-count)), less the small one from 0 to p.
    let whole = deviance(hits, total * p.value)
        + deviance(misses, total * p.complement)
        + gamma_correction(count)
        + gamma_correction(n - count)
        - stirling_error(n)
        + 0.5 * (2.0 * PI / total).ln();
    let below = (root / beta_fraction(a, b, p)).ln();
    whole + (-(below - whole).exp()).ln_1p() - prior.ln()
}

/// Lower bound of the success probability that holds at every `n` together with confidence `1 - alpha`: the least `p`
/// against which the e-value is below `1/alpha`. 0 at `count = 0`.
///
/// The bounds of one sequence of trials hold together, so the largest of them holds too.
///
/// # Why there is one such `p`
/// With `N(Â-p) = count - n p`: the derivative of `ln e` in `p` is `-N(Â-p)/(p(1-p)) + h (1 - 1/e)`, where the prior's
/// hazard `h = 1/(2 sqrt(p(1-p)) asin(sqrt(1-p)))` is at most `1/(2 sqrt(p) (1-p))`: `e` falls wherever `N(Â-p) >= 1/2`.
/// Elsewhere `e` is at most the largest likelihood ratio, `exp(N KL(Â, p)) <= exp(N(Â-p)²/(p(1-p))) <= e¹`, because
/// there `(Â-p)/(p(1-p)) <= 2`. So for `alpha <= 1/e` the e-value reaches `1/alpha` up to one point and nowhere beyond.
///
/// # Errors
/// `n = 0`, `count > n`, or `alpha` not in (0, 1/e].
pub fn anytime_lower_bound(count: u64, n: u64, alpha: f64) -> Result<Probability> {
    if n == 0 || count > n {
        return Err(Error::usage(format!("a count of {count} in n = {n} draws is impossible")));
    }
    if !(alpha > 0.0 && alpha <= MAX_ALPHA) {
        return Err(Error::usage(format!("alpha must lie above 0 and be at most {MAX_ALPHA:.4}: {alpha}")));
    }
    if count == 0 {
        return Ok(Probability { value: 0.0, complement: 1.0 });
    }
    let target = -alpha.ln();
    let log_e = |log_odds: f64| log_e_value(count, n, from_log_odds(log_odds));
    // The unknown is the log-odds of p; beyond `high` the e-value is too small, as shown above.
    let mut high = ((count as f64 - 0.5) / ((n - count) as f64 + 0.5)).ln();
    let mut width = 1.0;
    while log_e(high - width) < target {
        width *= 2.0;
    }
    let mut low = high - width;
    let mut at = low;
    for _ in 0..200 {
        let value = log_e(at);
        if value >= target {
            low = at;
        } else {
            high = at;
        }
        let newton = at + (target - value) / slope(count, n, from_log_odds(at), value);
        let next = if newton > low && newton < high { newton } else { 0.5 * (low + high) };
        let step = next - at;
        at = next;
        if step.abs() <= 4e-16 * at.abs().max(1.0) {
            break;
        }
    }
    Ok(from_log_odds(at))
}

/// Derivative of the e-value's logarithm in the log-odds of `p`.
fn slope(count: u64, n: u64, p: Probability, log_e: f64) -> f64 {
    // count - n p, from the smaller of the two probabilities.
    let lead = if p.value < 0.5 {
        count as f64 - n as f64 * p.value
    } else {
        n as f64 * p.complement - (n - count) as f64
    };
    let angle = p.complement.sqrt().atan2(p.value.sqrt());
    0.5 * (p.value * p.complement).sqrt() * -(-log_e).exp_m1() / angle - lead
}

/// `ln Γ(z + ½) - (z ln z - z + ½ ln 2π)`: what Stirling's formula leaves out at a half, by Legendre's duplication.
fn gamma_correction(z: u64) -> f64 {
    if z == 0 { -0.5 * LN_2 } else { stirling_error(2 * z) - stirling_error(z) }
}

#[cfg(test)]
mod tests {
    use super::*;
    use serde_json::Value;

    /// The table of `scripts/golden/sequential.py`.
    fn golden() -> Value {
        let path = concat!(env!("CARGO_MANIFEST_DIR"), "/tests/golden/sequential.json");
        serde_json::from_str(&std::fs::read_to_string(path).unwrap()).unwrap()
    }

    fn rows(table: &str, check: impl Fn(u64, u64, &dyn Fn(&str) -> f64)) {
        let golden = golden();
        let rows = golden[table].as_array().unwrap();
        assert!(rows.len() > 50);
        for row in rows {
            let [count, n] = ["count", "n"].map(|key| row[key].as_u64().unwrap());
            check(count, n, &|key| row[key].as_f64().unwrap());
        }
    }

    #[test]
    fn e_values_equal_the_high_precision_table() {
        // Relative, where a logarithm near zero counts as one.
        rows("log_e_value", |count, n, float| {
            let p = Probability { value: float("p"), complement: float("q") };
            let (got, want) = (log_e_value(count, n, p), float("log_e"));
            let error = (got - want).abs() / want.abs().max(1.0);
            assert!(error < 5e-14, "{count} of {n} at {}: {got} instead of {want}", p.value);
        });
    }

    #[test]
    fn bounds_equal_the_high_precision_table() {
        rows("anytime_lower_bound", |count, n, float| {
            let bound = anytime_lower_bound(count, n, float("alpha")).unwrap();
            for (got, want) in [(bound.value, float("p")), (bound.complement, float("q"))] {
                assert!((got / want - 1.0).abs() < 1e-13, "{count} of {n}: {got} instead of {want}");
            }
        });
    }

    #[test]
    fn the_e_value_falls_in_p_wherever_it_matters() {
        // What the proof says: beyond a first point below e the e-value never comes back to e.
        for n in [1u64, 2, 3, 10, 77] {
            for count in 0..=n {
                let mut is_below = false;
                for step in 1..2000 {
                    let log_e = log_e_value(count, n, Probability::new(f64::from(step) / 2000.0));
                    assert!(!(is_below && log_e >= 1.0), "{count} of {n} at {step}/2000");
                    is_below |= log_e < 1.0;
                }
            }
        }
    }

    #[test]
    fn a_success_raises_and_a_failure_lowers_the_e_value_and_its_mean_never_rises() {
        for p in [0.5, 0.8, 0.99, 0.9999].map(Probability::new) {
            for n in [1u64, 5, 40, 300] {
                for count in 0..=n {
                    let now = log_e_value(count, n, p);
                    let (success, failure) = (log_e_value(count + 1, n + 1, p), log_e_value(count, n + 1, p));
                    assert!(success > now && failure < now, "{count} of {n} at {}", p.value);
                    let mean = p.value * (success - now).exp() + p.complement * (failure - now).exp();
                    assert!((mean - 1.0).abs() < 1e-12, "{count} of {n} at {}: {mean}", p.value);
                }
            }
        }
    }

    #[test]
    fn bounds_are_monotone_and_below_the_fixed_ones() {
        for alpha in [1e-6, 0.001, 0.05, MAX_ALPHA] {
            for n in [1u64, 2, 9, 60] {
                let bound = |count, n| anytime_lower_bound(count, n, alpha).unwrap().value;
                for count in 1..=n {
                    assert!(bound(count, n) > bound(count - 1, n), "{count} of {n} at {alpha}");
                    assert!(
                        bound(count, n + 1) < bound(count, n) && bound(count + 1, n + 1) > bound(count, n)
                    );
                    assert!(
                        bound(count, n) < super::super::binomial::lower_bound(count, n, alpha).unwrap().value
                    );
                }
            }
        }
        for (count, n, alpha) in [(2, 1, 0.1), (0, 0, 0.1), (1, 2, 0.0), (1, 2, 0.4), (1, 2, f64::NAN)] {
            assert!(anytime_lower_bound(count, n, alpha).is_err());
        }
    }
}
