//! What many certificates say together: certified accuracy by radius, average certified radius, abstentions.

use serde::{Deserialize, Serialize};

/// One item's certificate, as far as the summary needs it.
#[derive(Debug, Clone, Copy, PartialEq, Serialize, Deserialize)]
pub struct Outcome {
    /// Whether the smoothed classifier abstained.
    pub abstained: bool,
    /// Whether it answered, and rightly.
    pub correct: bool,
    /// Certified L2 radius, 0 when abstained.
    pub radius: f64,
}

/// The outcomes of a set of items.
#[derive(Debug, Clone, Default, PartialEq)]
pub struct Curve {
    outcomes: Vec<Outcome>,
}

impl Curve {
    /// A curve over all items, abstained and wrong ones included.
    pub fn new(outcomes: Vec<Outcome>) -> Self {
        Self { outcomes }
    }

    /// Number of items.
    pub fn len(&self) -> usize {
        self.outcomes.len()
    }

    /// Whether there is no item.
    pub fn is_empty(&self) -> bool {
        self.outcomes.is_empty()
    }

    /// Number of items answered rightly with a radius of at least `radius`.
    pub fn num_certified(&self, radius: f64) -> usize {
        self.outcomes.iter().filter(|o| certified(o) && o.radius >= radius).count()
    }

    /// Share of all items answered rightly with a radius of at least `radius`; 0 without items.
    pub fn certified_accuracy(&self, radius: f64) -> f64 {
        self.share(self.num_certified(radius))
    }

    /// `(radius, certified accuracy)` at each of `radii`.
    pub fn points(&self, radii: &[f64]) -> Vec<(f64, f64)> {
        radii.iter().map(|&radius| (radius, self.certified_accuracy(radius))).collect()
    }

    /// Mean radius over all items, where a wrong answer or an abstention counts 0; 0 without items.
    pub fn average_certified_radius(&self) -> f64 {
        let sum: f64 = self.outcomes.iter().filter(|o| certified(o)).map(|o| o.radius).sum();
        if self.is_empty() { 0.0 } else { sum / self.len() as f64 }
    }

    /// Share of items on which the smoothed classifier abstained; 0 without items.
    pub fn abstention_rate(&self) -> f64 {
        self.share(self.outcomes.iter().filter(|o| o.abstained).count())
    }

    /// A lower bound, with confidence `1 - rho`, of the certified accuracy that certificates without failure would
    /// have given on these items: each certificate fails with probability up to `alpha`.
    /// `accuracy - alpha - sqrt(alpha (1 - alpha) ln(1/rho) / m) - ln(1/rho) / (3 m)`, by Bernstein's inequality;
    /// may be negative. [Cohen 2019, appendix]
    pub fn high_probability_accuracy(&self, radius: f64, alpha: f64, rho: f64) -> f64 {
        let m = self.len().max(1) as f64;
        let log = (1.0 / rho).ln();
        self.certified_accuracy(radius) - alpha - (alpha * (1.0 - alpha) * log / m).sqrt() - log / (3.0 * m)
    }

    fn share(&self, count: usize) -> f64 {
        if self.is_empty() { 0.0 } else { count as f64 / self.len() as f64 }
    }
}

fn certified(outcome: &Outcome) -> bool {
    outcome.correct && !outcome.abstained
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_curve_counts_all_items_and_falls() {
        let outcome = |abstained, correct, radius| Outcome { abstained, correct, radius };
        let curve = Curve::new(vec![
            outcome(false, true, 0.5),
            outcome(false, true, 0.0),
            outcome(false, false, 0.9),
            outcome(true, false, 0.0),
        ]);
        assert_eq!(
            curve.points(&[0.0, 0.25, 0.5, 0.51]),
            [(0.0, 0.5), (0.25, 0.25), (0.5, 0.25), (0.51, 0.0)]
        );
        assert_eq!(curve.average_certified_radius(), 0.125);
        assert_eq!(curve.abstention_rate(), 0.25);
        assert!(curve.high_probability_accuracy(0.0, 0.001, 0.001) < 0.5);
        assert_eq!(Curve::default().certified_accuracy(0.0), 0.0);
        assert_eq!(Curve::default().average_certified_radius(), 0.0);
    }
}
