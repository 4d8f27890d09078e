//! Dropout whose mask belongs to the rows' names: the same when a row is computed again, in another batch, or by another
//! number of threads.
//!
//! An entry is kept with probability 1 - `rate` and divided by it (inverted dropout), so that its expectation is the entry.
//! Nothing is dropped unless a caller has begun a [`Draw`] on the layers' common [`Dropout`].

use crate::rng;
use candle_core::{Result, Tensor};
use rand::RngCore;
use rayon::prelude::*;
use std::sync::{Arc, PoisonError, RwLock};

/// What tells a row from every other row of its kind in one draw.
pub type RowName = [u64; 3];

/// Rows that go through layers together: their kind, and their names in order.
pub type NamedRows = (usize, Vec<RowName>);

/// One draw of masks.
#[derive(Debug, Clone, PartialEq)]
pub struct Draw {
    /// Probability that an entry is dropped, in [0, 1).
    pub rate: f64,
    /// Seed of every stream.
    pub seed: u64,
    /// What tells this draw from others of the seed.
    pub index: u64,
    /// The rows that layers will see. Of one kind there may be several lists, each of its own length.
    pub rows: Vec<NamedRows>,
}

/// What several layers drop; nothing until [`Dropout::begin`].
#[derive(Debug, Default)]
pub struct Dropout(RwLock<Option<Arc<Draw>>>);

impl Dropout {
    /// Drops by `draw` until what is returned goes out of scope.
    #[must_use = "nothing is dropped once this is gone"]
    pub fn begin(self: &Arc<Self>, draw: Draw) -> Active {
        *self.0.write().unwrap_or_else(PoisonError::into_inner) = Some(Arc::new(draw));
        Active(self.clone())
    }

    fn draw(&self) -> Option<Arc<Draw>> {
        self.0.read().unwrap_or_else(PoisonError::into_inner).clone()
    }
}

/// While it lives, entries are dropped.
#[derive(Debug)]
pub struct Active(Arc<Dropout>);

impl Drop for Active {
    fn drop(&mut self) {
        *self.0.0.write().unwrap_or_else(PoisonError::into_inner) = None;
    }
}

/// The dropout before one layer.
#[derive(Debug, Clone)]
pub struct LayerDropout {
    /// Shared with the other layers.
    pub dropout: Arc<Dropout>,
    /// What tells this layer from the others.
    pub layer: u64,
    /// The kind of rows it sees.
    pub kind: usize,
}

impl LayerDropout {
    /// `x` with entries dropped; none when nothing is.
    ///
    /// # Shapes
    /// - `x`, returns: `[rows, width]`
    ///
    /// # Errors
    /// When the draw has no names for that many rows.
    pub(super) fn apply(&self, x: &Tensor) -> Result<Option<Tensor>> {
        let Some(draw) = self.dropout.draw() else { return Ok(None) };
        let (count, width) = x.dims2()?;
        let names = draw.rows.iter().find(|(kind, names)| *kind == self.kind && names.len() == count);
        let Some((_, names)) = names else {
            candle_core::bail!("dropout: no names for {count} rows of kind {}", self.kind)
        };
        let mask = Tensor::from_vec(draw.mask(self.layer, names, width), (count, width), x.device())?;
        Ok(Some((x * mask.to_dtype(x.dtype())?)?))
    }
}

impl Draw {
    /// What the entries of the rows `names` before the layer are multiplied with, row by row: 0 or 1 / (1 - rate).
    fn mask(&self, layer: u64, names: &[RowName], width: usize) -> Vec<f32> {
        let dropped = (self.rate * 2f64.powi(32)) as u64;
        let kept = (1.0 / (1.0 - self.rate)) as f32;
        let mut mask = vec![0f32; names.len() * width];
        mask.par_chunks_mut(width.max(1)).zip(names).for_each(|(row, [a, b, c])| {
            let mut stream = rng::stream(self.seed, "lora_dropout", &[self.index, layer, *a, *b, *c]);
            for value in row {
                if u64::from(stream.next_u32()) >= dropped {
                    *value = kept;
                }
            }
        });
        mask
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::nn::linear::{Linear, LowRank};
    use crate::nn::recompute::{Memory, Stage, loss_and_gradients};
    use candle_core::{Device, Var};

    fn draw(rate: f64, index: u64, rows: &[u64]) -> Draw {
        Draw { rate, seed: 5, index, rows: vec![(0, rows.iter().map(|&row| [row, 0, 1]).collect())] }
    }

    fn layer(dropout: &Arc<Dropout>, layer: u64) -> LayerDropout {
        LayerDropout { dropout: dropout.clone(), layer, kind: 0 }
    }

    fn values(tensor: &Tensor) -> Vec<f32> {
        tensor.flatten_all().unwrap().to_vec1().unwrap()
    }

    #[test]
    fn entries_are_kept_as_often_as_the_rate_says_and_keep_their_expectation() {
        for rate in [0.1, 0.5, 0.9] {
            let names: Vec<u64> = (0..500).collect();
            let mask = draw(rate, 0, &names).mask(3, &draw(rate, 0, &names).rows[0].1, 400);
            let kept = (1.0 / (1.0 - rate)) as f32;
            assert!(mask.iter().all(|&value| value == 0.0 || value == kept));
            let n = mask.len() as f64;
            let share = mask.iter().filter(|value| **value > 0.0).count() as f64 / n;
            let deviation = (rate * (1.0 - rate) / n).sqrt();
            assert!((share - (1.0 - rate)).abs() < 5.0 * deviation, "{rate}: {share}");
            let mean = mask.iter().map(|&value| f64::from(value)).sum::<f64>() / n;
            assert!((mean - 1.0).abs() < 5.0 * deviation / (1.0 - rate), "{rate}: {mean}");
            // Neighbours do not know of each other: both are kept as often as chance has it.
            for other in [1, 400] {
                let pairs = mask.windows(other + 1).filter(|w| w[0] > 0.0 && w[other] > 0.0).count() as f64;
                let wanted = (1.0 - rate).powi(2);
                assert!((pairs / (n - other as f64) - wanted).abs() < 6.0 * (wanted / n).sqrt(), "{rate}");
            }
        }
    }

    #[test]
    fn a_mask_belongs_to_draw_layer_and_row_and_to_nothing_else() {
        let dropout = Arc::new(Dropout::default());
        let ones = |rows: usize| Tensor::ones((rows, 64), candle_core::DType::F32, &Device::Cpu).unwrap();
        let masks = |index: u64, at: u64, rows: &[u64]| -> Vec<Vec<f32>> {
            let _active = dropout.begin(draw(0.5, index, rows));
            let dropped = layer(&dropout, at).apply(&ones(rows.len())).unwrap().unwrap();
            dropped.to_vec2::<f32>().unwrap()
        };
        let whole = masks(0, 1, &[10, 11, 12]);
        // In another batch, at another place.
        assert_eq!(masks(0, 1, &[12, 10]), [whole[2].clone(), whole[0].clone()]);
        for other in [masks(1, 1, &[10]), masks(0, 2, &[10]), masks(0, 1, &[13])] {
            assert_ne!(other[0], whole[0]);
        }
        // Once the guard is gone nothing is dropped; rows without names are an error.
        assert!(layer(&dropout, 1).apply(&ones(3)).unwrap().is_none());
        let _active = dropout.begin(draw(0.5, 0, &[1, 2]));
        let message = layer(&dropout, 1).apply(&ones(3)).unwrap_err().to_string();
        assert!(message.contains("3 rows"), "{message}");
    }

    #[test]
    fn value_and_gradients_are_those_of_the_closed_form_kept_or_recomputed() {
        let random = |shape: &[usize], index: u64| {
            let mut values = vec![0f32; shape.iter().product()];
            rng::fill_standard_normal(&mut rng::stream(1, "dropout test", &[index]), &mut values);
            Tensor::from_vec(values, shape, &Device::Cpu).unwrap()
        };
        let names: Vec<u64> = (0..6).collect();
        let own = draw(0.4, 7, &names);
        let mask = Tensor::from_vec(own.mask(9, &own.rows[0].1, 5), (6, 5), &Device::Cpu).unwrap();
        let weight = random(&[4, 5], 0);
        let [x, a, b] = [(&[6, 5][..], 1), (&[2, 5], 2), (&[4, 2], 3)]
            .map(|(shape, index)| Var::from_tensor(&random(shape, index)).unwrap());
        let (slopes, scaling) = (random(&[6, 4], 4), 0.7);
        let dropout = Arc::new(Dropout::default());
        let low_rank = LowRank { a: a.as_tensor().clone(), b: b.as_tensor().clone(), scaling };
        let linear =
            Linear::frozen(&weight, None).unwrap().with_low_rank(low_rank).with_dropout(layer(&dropout, 9));
        let wanted = [a.as_tensor().clone(), b.as_tensor().clone()];
        let active = dropout.begin(own);
        for memory in [Memory::Keep, Memory::Recompute] {
            // The stage is run twice with recomputation, and must drop the same entries.
            let stages: Vec<Stage<'_>> = vec![Box::new(|state| Ok(vec![linear.forward(&state[0])?]))];
            let inputs = [x.as_tensor().clone()];
            let (loss, gradients) =
                loss_and_gradients(&stages, &inputs, |s| (&s[0] * &slopes)?.sum_all(), &wanted, memory)
                    .unwrap();
            // y = x Wᵀ + s (x∘m) Aᵀ Bᵀ, so with slopes G: dB = s Gᵀ (x∘m) Aᵀ, dA = s Bᵀ Gᵀ (x∘m),
            // dx = G W + s (G B A)∘m.
            let t = |tensor: &Tensor| tensor.t().unwrap().contiguous().unwrap();
            let masked = (x.as_tensor() * &mask).unwrap();
            let product = |a: &Tensor, b: &Tensor| a.matmul(b).unwrap();
            let scaled = |tensor: Tensor| (tensor * scaling).unwrap();
            let inner = product(&masked, &t(&a));
            let value = (product(&x, &t(&weight)) + scaled(product(&inner, &t(&b)))).unwrap();
            let dropped = (scaled(product(&product(&slopes, &b), &a)) * &mask).unwrap();
            let expected = [
                ("loss", loss, (value * &slopes).unwrap().sum_all().unwrap()),
                (
                    "A",
                    gradients.get(&a).unwrap().clone(),
                    scaled(product(&product(&t(&b), &t(&slopes)), &masked)),
                ),
                ("B", gradients.get(&b).unwrap().clone(), scaled(product(&t(&slopes), &inner))),
                ("x", gradients.get(&x).unwrap().clone(), (product(&slopes, &weight) + dropped).unwrap()),
            ];
            for (what, found, expected) in expected {
                for (found, expected) in values(&found).iter().zip(values(&expected)) {
                    assert!((found - expected).abs() < 1e-4, "{what} {memory:?}: {found} {expected}");
                }
            }
        }
        // Copies for sampling, attacks and evaluation drop nothing.
        let plain = linear.map(&|tensor| Ok(tensor.detach())).unwrap();
        drop(active);
        let (without, undropped) = (linear.forward(&x).unwrap(), plain.forward(&x).unwrap());
        let _active = dropout.begin(draw(0.4, 7, &names));
        assert_eq!(values(&plain.forward(&x).unwrap()), values(&undropped));
        assert_eq!(values(&without), values(&undropped));
        assert_ne!(values(&linear.forward(&x).unwrap()), values(&undropped));
    }
}
