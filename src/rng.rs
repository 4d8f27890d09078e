//! Named random streams from one seed.
//!
//! A stream is named by (seed, purpose, indices), so that what is drawn for an item never depends on the order,
//! the batch, the thread or the shard in which the item is processed. There is no global generator.

use rand::SeedableRng;
use rand_chacha::ChaCha8Rng;
use rand_distr::{Distribution, StandardNormal};
use rayon::prelude::*;

/// The generator behind every stream: counter-based, the same on every platform.
pub type Stream = ChaCha8Rng;

/// The stream named `purpose` and `indices` under `seed`.
pub fn stream(seed: u64, purpose: &str, indices: &[u64]) -> Stream {
    let mut hasher = blake3::Hasher::new();
    hasher.update(&seed.to_le_bytes());
    hasher.update(&(purpose.len() as u64).to_le_bytes());
    hasher.update(purpose.as_bytes());
    for index in indices {
        hasher.update(&index.to_le_bytes());
    }
    ChaCha8Rng::from_seed(*hasher.finalize().as_bytes())
}

/// A stable 64-bit key for a text, such as an item's id.
pub fn key_of(text: &str) -> u64 {
    let hash = blake3::hash(text.as_bytes());
    let mut bytes = [0; 8];
    bytes.copy_from_slice(&hash.as_bytes()[..8]);
    u64::from_le_bytes(bytes)
}

/// Fills `out` with independent standard normal values from `stream`.
pub fn fill_standard_normal(stream: &mut Stream, out: &mut [f32]) {
    for value in out {
        *value = StandardNormal.sample(stream);
    }
}

/// The standard normal draws `from..from + count` of the item named `key`, each of `len` values, one after another:
/// the same values in any batch, order and number of threads.
pub fn normal_draws(seed: u64, purpose: &str, key: u64, from: u64, count: usize, len: usize) -> Vec<f32> {
    let mut draws = vec![0f32; count * len];
    draws.par_chunks_mut(len.max(1)).enumerate().for_each(|(i, out)| {
        fill_standard_normal(&mut stream(seed, purpose, &[key, from + i as u64]), out);
    });
    draws
}

#[cfg(test)]
mod tests {
    use super::*;
    use rand::RngCore;

    #[test]
    fn streams_differ_by_seed_purpose_and_index_and_repeat_exactly() {
        let draw = |seed, purpose, indices: &[u64]| stream(seed, purpose, indices).next_u64();
        let reference = draw(1, "noise", &[2, 3]);
        assert_eq!(reference, draw(1, "noise", &[2, 3]));
        for other in [draw(2, "noise", &[2, 3]), draw(1, "noisf", &[2, 3]), draw(1, "noise", &[3, 2])] {
            assert_ne!(reference, other);
        }
    }

    #[test]
    fn normal_draws_have_the_moments_and_tails_of_a_normal() {
        let mut values = vec![0f32; 400_000];
        fill_standard_normal(&mut stream(7, "moments", &[]), &mut values);
        let n = values.len() as f64;
        let moment = |p: i32| values.iter().map(|&v| f64::from(v).powi(p)).sum::<f64>() / n;
        assert!(moment(1).abs() < 5.0 / n.sqrt());
        assert!((moment(2) - 1.0).abs() < 5.0 * (2.0 / n).sqrt());
        assert!((moment(4) - 3.0).abs() < 5.0 * (96.0 / n).sqrt());
        let beyond = values.iter().filter(|v| v.abs() > 4.0).count() as f64;
        assert!((beyond - n * 6.334e-5).abs() < 5.0 * (n * 6.334e-5).sqrt());
    }
}
