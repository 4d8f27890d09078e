//! Intervals for a share of successes. One-sided exact bounds are with the binomial distribution, not here.

/// Standard normal quantile of a two-sided 95 % interval.
pub const Z_95: f64 = 1.959_963_984_540_054;

/// Wilson's score interval for `successes` of `n` at `z` standard deviations: `[low, high]` in `[0, 1]`.
///
/// With `n = 0` nothing is known: `[0, 1]`. `successes` above `n` count as `n`.
///
/// # References
/// Wilson 1927, J. Am. Stat. Assoc. 22(158):209-212.
pub fn wilson(successes: u64, n: u64, z: f64) -> [f64; 2] {
    if n == 0 {
        return [0.0, 1.0];
    }
    let successes = successes.min(n);
    let (k, total) = (successes as f64, n as f64);
    let share = k / total;
    let z2 = z * z;
    let centre = share + z2 / (2.0 * total);
    let half = z * (share * (1.0 - share) / total + z2 / (4.0 * total * total)).sqrt();
    let scale = 1.0 + z2 / total;
    // At the ends the bound is exactly 0 or 1; rounding must not move it inside.
    let low = if successes == 0 { 0.0 } else { ((centre - half) / scale).max(0.0) };
    let high = if successes == n { 1.0 } else { ((centre + half) / scale).min(1.0) };
    [low, high]
}

#[cfg(test)]
mod tests {
    use super::*;

    /// The bounds are the shares at which the score test just rejects: |share - p| = z sqrt(p(1-p)/n).
    #[test]
    fn bounds_solve_the_score_equation() {
        for (k, n) in [(1, 10), (5, 10), (81, 263), (9_526, 10_000), (1, 1_000_000)] {
            let share = k as f64 / n as f64;
            for p in wilson(k, n, Z_95) {
                let deviation = Z_95 * (p * (1.0 - p) / n as f64).sqrt();
                assert!(((share - p).abs() - deviation).abs() < 1e-12, "{k}/{n}: {p}");
            }
        }
    }

    #[test]
    fn published_values_and_ends() {
        // Newcombe 1998, Stat. Med. 17:857-872, table I, method 3.
        for (k, n, low, high) in [
            (81, 263, 0.2553, 0.3662),
            (15, 148, 0.0624, 0.1605),
            (0, 20, 0.0, 0.1611),
            (1, 29, 0.0061, 0.1718),
        ] {
            let [found_low, found_high] = wilson(k, n, Z_95);
            assert!((found_low - low).abs() < 5e-5 && (found_high - high).abs() < 5e-5, "{k}/{n}");
        }
        assert_eq!(wilson(7, 7, Z_95)[1], 1.0);
        assert_eq!(wilson(0, 0, Z_95), [0.0, 1.0]);
    }
}
