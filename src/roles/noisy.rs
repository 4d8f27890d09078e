//! Any objective in the mean over Gaussian noise: what an attack on a smoothed model climbs (expectation over
//! transformation, Athalye et al. 2018; SmoothAdv, Salman et al. 2019).
//!
//! The mean is of losses. [`super::target::Target::noise`] is the other form, the negative log of a mean probability, which is
//! SmoothAdv's own; it needs probabilities of options, where a loss over the tokens of a whole completion would be ruled by
//! the luckiest draw.

use crate::attack::{NoiseBank, Objective};
use crate::error::Result;
use candle_core::Tensor;

/// The mean of an objective over a fixed bank of noise.
pub struct Noisy<'a> {
    /// The objective of each draw; the same one for all where it does not depend on the noise.
    pub of_draw: &'a dyn Fn(usize) -> &'a dyn Objective,
    /// The noise.
    pub bank: &'a NoiseBank,
    /// Names each item's noise.
    pub keys: &'a [u64],
}

impl std::fmt::Debug for Noisy<'_> {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Noisy").field("bank", self.bank).finish_non_exhaustive()
    }
}

/// `pixels`, `[n, 3, height, width]`, with draw `draw` of the noise that each of `keys` names; not clipped.
///
/// # Errors
/// When the device has no room.
pub fn with_draw(bank: &NoiseBank, keys: &[u64], draw: usize, pixels: &Tensor) -> Result<Tensor> {
    let (_, channels, height, width) = pixels.dims4()?;
    let noise: Vec<f32> =
        keys.iter().flat_map(|&key| bank.draws(key, draw, 1, channels * height * width)).collect();
    Ok((pixels + Tensor::from_vec(noise, pixels.shape(), pixels.device())?)?)
}

impl Noisy<'_> {
    fn pixels_of(&self, draw: usize, pixels: &Tensor, items: &[usize]) -> Result<Tensor> {
        let keys: Vec<u64> = items.iter().map(|&item| self.keys[item]).collect();
        with_draw(self.bank, &keys, draw, pixels)
    }

    fn mean(&self, sums: &[f64]) -> Vec<f32> {
        sums.iter().map(|sum| (sum / self.bank.draws as f64) as f32).collect()
    }
}

fn add(sums: &mut [f64], losses: &[f32]) {
    for (sum, loss) in sums.iter_mut().zip(losses) {
        *sum += f64::from(*loss);
    }
}

impl Objective for Noisy<'_> {
    fn loss_and_gradient(&self, pixels: &Tensor, items: &[usize]) -> Result<(Vec<f32>, Tensor)> {
        let mut sums = vec![0.0; items.len()];
        let mut total = pixels.zeros_like()?;
        for draw in 0..self.bank.draws {
            let noisy = self.pixels_of(draw, pixels, items)?;
            let (losses, gradient) = (self.of_draw)(draw).loss_and_gradient(&noisy, items)?;
            add(&mut sums, &losses);
            total = (total + gradient)?;
        }
        Ok((self.mean(&sums), (total * (1.0 / self.bank.draws as f64))?))
    }

    fn loss(&self, pixels: &Tensor, items: &[usize]) -> Result<Vec<f32>> {
        let mut sums = vec![0.0; items.len()];
        for draw in 0..self.bank.draws {
            let noisy = self.pixels_of(draw, pixels, items)?;
            add(&mut sums, &(self.of_draw)(draw).loss(&noisy, items)?);
        }
        Ok(self.mean(&sums))
    }

    fn is_broken(&self, pixels: &Tensor, items: &[usize]) -> Result<Vec<bool>> {
        (self.of_draw)(0).is_broken(pixels, items)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use candle_core::Device;

    /// The sum of squares of an item's pixels, times a factor.
    struct Squares(f64);

    impl Objective for Squares {
        fn loss_and_gradient(&self, pixels: &Tensor, items: &[usize]) -> Result<(Vec<f32>, Tensor)> {
            Ok((self.loss(pixels, items)?, (pixels * (2.0 * self.0))?))
        }

        fn loss(&self, pixels: &Tensor, _items: &[usize]) -> Result<Vec<f32>> {
            Ok((pixels.sqr()?.flatten_from(1)?.sum(1)? * self.0)?.to_vec1()?)
        }

        fn is_broken(&self, _pixels: &Tensor, items: &[usize]) -> Result<Vec<bool>> {
            Ok(vec![false; items.len()])
        }
    }

    #[test]
    fn losses_and_gradients_are_means_over_the_draws_of_each_item() {
        let bank = NoiseBank { purpose: "test", sigma: 0.3, draws: 5, seed: 2 };
        let keys = [11, 22, 33];
        let values: Vec<f32> = (0..24).map(|i| 0.01 * i as f32).collect();
        let pixels = Tensor::from_vec(values.clone(), (2, 3, 2, 2), &Device::Cpu).unwrap();
        // Each draw has a factor of its own, so that a draw left out or taken twice shows.
        let squares = [1.0, 2.0, 3.0, 4.0, 5.0].map(Squares);
        let of_draw = |draw: usize| -> &dyn Objective { &squares[draw] };
        let noisy = Noisy { of_draw: &of_draw, bank: &bank, keys: &keys };
        // Items in another order than their keys.
        let (losses, gradient) = noisy.loss_and_gradient(&pixels, &[2, 0]).unwrap();
        assert_eq!(noisy.loss(&pixels, &[2, 0]).unwrap(), losses);
        let gradient: Vec<f32> = gradient.flatten_all().unwrap().to_vec1().unwrap();
        for (row, key) in [33, 11].into_iter().enumerate() {
            let (mut loss, mut slope) = (0.0, [0.0; 12]);
            for draw in 0..5 {
                for (i, noise) in bank.draws(key, draw, 1, 12).into_iter().enumerate() {
                    let value = f64::from(values[12 * row + i]) + f64::from(noise);
                    loss += (draw + 1) as f64 * value * value / 5.0;
                    slope[i] += (draw + 1) as f64 * 2.0 * value / 5.0;
                }
            }
            assert!((f64::from(losses[row]) - loss).abs() < 1e-5, "{losses:?} {loss}");
            for (found, expected) in gradient[12 * row..].iter().zip(slope) {
                assert!((f64::from(*found) - expected).abs() < 1e-5, "{found} {expected}");
            }
        }
    }
}
