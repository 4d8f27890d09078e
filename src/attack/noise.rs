//! Gaussian noise for attacks on smoothed models: named draws, so that a bank is the same at every step.

use crate::rng;
use rayon::prelude::*;

/// A fixed set of noise vectors for each item.
#[derive(Debug, Clone, PartialEq)]
pub struct NoiseBank {
    /// What the draws are for; banks of different purposes are independent.
    pub purpose: &'static str,
    /// Standard deviation, for pixels in [0, 1].
    pub sigma: f64,
    /// Draws for each item.
    pub draws: usize,
    /// Seed of all draws.
    pub seed: u64,
}

impl NoiseBank {
    /// The draws `from..from + count` of the item named `key`, each of `len` values, one after another.
    pub fn draws(&self, key: u64, from: usize, count: usize, len: usize) -> Vec<f32> {
        let mut noise = rng::normal_draws(self.seed, self.purpose, key, from as u64, count, len);
        noise.par_iter_mut().for_each(|value| *value *= self.sigma as f32);
        noise
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn draws_are_the_same_in_any_batch_and_differ_by_item_draw_and_purpose() {
        let bank = NoiseBank { purpose: "test", sigma: 0.5, draws: 4, seed: 3 };
        let all = bank.draws(7, 0, 4, 30);
        assert_eq!(bank.draws(7, 2, 1, 30), all[60..90]);
        assert_ne!(all[..30], all[30..60]);
        assert_ne!(bank.draws(8, 0, 1, 30), all[..30]);
        assert_ne!(NoiseBank { purpose: "other", ..bank.clone() }.draws(7, 0, 1, 30), all[..30]);
        let many = bank.draws(1, 0, 50, 1000);
        let variance = many.iter().map(|v| f64::from(*v).powi(2)).sum::<f64>() / many.len() as f64;
        assert!((variance - 0.25).abs() < 0.01, "{variance}");
    }
}
