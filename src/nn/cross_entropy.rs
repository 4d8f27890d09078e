//! Log-probabilities of given tokens, without ever holding the logits of all rows at once.

use super::kernel::gemm::{Right, View, gemm, product};
use super::kernel::math::{self, for_each_isa};
use super::kernel::{is_fused, slice, with_slice, zeros};
use super::linear::{Linear, input_gradient, with_forward_panels};
use super::plain;
use candle_core::{CpuStorage, CustomOp1, CustomOp2, Layout, Result, Shape, Tensor};
use rayon::prelude::*;

/// Logits held at a time: rows are taken in chunks of about this many,
const CHUNK_LOGITS: usize = 2 * 1024 * 1024;
/// but not of fewer rows than this: each chunk reads the whole head, twice.
const CHUNK_ROWS: usize = 64;

/// Log-probability in nats of `targets[r]` under `softmax(head(hidden[r]) / temperature)`, row by row.
///
/// # Shapes
/// - `hidden`: `[rows, hidden]`
/// - `head`: `[vocab, hidden]`, frozen or trainable, without bias
/// - `targets`: one token id per row
/// - returns: `[rows]`, float32
///
/// # Errors
/// When a target is not below the vocabulary's size, or counts differ.
pub fn log_probs_of(hidden: &Tensor, head: &Linear, targets: &[u32], temperature: f64) -> Result<Tensor> {
    let (rows, _) = hidden.dims2()?;
    let (frozen, weight, bias) = head.parts();
    let vocab = match (frozen, weight) {
        (Some(packed), _) => packed.n,
        (None, Some(weight)) => weight.dims2()?.0,
        (None, None) => 0,
    };
    if rows != targets.len() || bias.is_some() || targets.iter().any(|&target| target as usize >= vocab) {
        candle_core::bail!(
            "log-probabilities of {} targets for {rows} rows over {vocab} tokens (a head with bias is not supported)",
            targets.len()
        );
    }
    if !is_fused(hidden) {
        let logits = head.forward(hidden)?;
        return plain::log_probs_of(&logits, &Tensor::new(targets, hidden.device())?, temperature);
    }
    let op = LogProbs { head: head.clone(), targets: targets.to_vec(), temperature: temperature as f32 };
    match weight {
        Some(weight) => hidden.contiguous()?.apply_op2(&weight.contiguous()?, op),
        None => hidden.contiguous()?.apply_op1(op),
    }
}

struct LogProbs {
    head: Linear,
    targets: Vec<u32>,
    temperature: f32,
}

for_each_isa! {
    /// Log-probability of each row's target; with `gradients`, turns each row of logits into
    /// `gradients[r] / temperature · (onehot - softmax)`.
    fn finish_rows(logits: &mut [f32], targets: &[u32], temperature: f32, gradients: Option<&[f32]>, out: &mut [f32]) {
        let vocab = logits.len() / targets.len();
        for (r, (row, &target)) in logits.chunks_exact_mut(vocab).zip(targets).enumerate() {
            let largest = math::max(row);
            let chosen = row[target as usize];
            for value in row.iter_mut() {
                *value = math::exp((*value - largest) / temperature);
            }
            let sum = math::sum(row);
            out[r] = (chosen - largest) / temperature - sum.ln();
            if let Some(gradients) = gradients {
                let scale = gradients[r] / temperature;
                let factor = -scale / sum;
                for value in row.iter_mut() {
                    *value *= factor;
                }
                row[target as usize] += scale;
            }
        }
    }
}

/// Rows of `logits` logits each that are held at a time.
pub(super) fn chunk_rows(logits: usize) -> usize {
    (CHUNK_LOGITS / logits.max(1)).clamp(CHUNK_ROWS, 4096)
}

impl LogProbs {
    fn forward(&self, hidden: &[f32]) -> Result<Vec<f32>> {
        let rows = self.targets.len();
        let mut out = zeros(rows);
        with_forward_panels(&self.head, |panels| {
            let (width, vocab) = (panels.k, panels.n);
            let step = chunk_rows(vocab);
            let mut logits = zeros(step.min(rows) * vocab);
            for start in (0..rows).step_by(step) {
                let count = step.min(rows - start);
                let x = View::new(&hidden[start * width..(start + count) * width], count, width);
                let logits = &mut logits[..count * vocab];
                product(x, Right::Packed(panels), logits, vocab, false, true);
                finish(
                    logits,
                    &self.targets[start..start + count],
                    self.temperature,
                    None,
                    &mut out[start..start + count],
                );
            }
        })?;
        Ok(out)
    }

    /// Gradients of hidden and, where the head is trained, of its weight.
    fn backward(
        &self,
        hidden: &Tensor,
        weight: Option<&Tensor>,
        grad: &Tensor,
    ) -> Result<(Tensor, Option<Tensor>)> {
        let (rows, width) = hidden.dims2()?;
        let mut d_hidden = zeros(rows * width);
        let d_weight = with_slice(hidden, |hidden| {
            with_slice(grad, |grad| {
                with_forward_panels(&self.head, |panels| -> Result<Vec<f32>> {
                    let vocab = panels.n;
                    let step = chunk_rows(vocab);
                    let mut logits = zeros(step.min(rows) * vocab);
                    let mut discarded = zeros(step.min(rows));
                    let mut d_weight = zeros(if weight.is_some() { vocab * width } else { 0 });
                    for start in (0..rows).step_by(step) {
                        let count = step.min(rows - start);
                        let range = start * width..(start + count) * width;
                        let x = View::new(&hidden[range.clone()], count, width);
                        let logits = &mut logits[..count * vocab];
                        product(x, Right::Packed(panels), logits, vocab, false, true);
                        let targets = &self.targets[start..start + count];
                        let gradients = Some(&grad[start..start + count]);
                        finish(logits, targets, self.temperature, gradients, &mut discarded[..count]);
                        input_gradient(&self.head, logits, count, &mut d_hidden[range])?;
                        if weight.is_some() {
                            let d_logits = View::new(logits, count, vocab).transposed();
                            gemm(d_logits, x, &mut d_weight, width, true);
                        }
                    }
                    Ok(d_weight)
                })
            })
        })????;
        let d_weight = match weight {
            Some(weight) => Some(Tensor::from_vec(d_weight, weight.shape(), weight.device())?),
            None => None,
        };
        Ok((Tensor::from_vec(d_hidden, (rows, width), hidden.device())?, d_weight))
    }
}

fn finish(logits: &mut [f32], targets: &[u32], temperature: f32, gradients: Option<&[f32]>, out: &mut [f32]) {
    let vocab = logits.len() / targets.len().max(1);
    let rows = (16 * 1024 / vocab.max(1)).max(1);
    logits
        .par_chunks_mut(rows * vocab)
        .zip(targets.par_chunks(rows))
        .zip(out.par_chunks_mut(rows))
        .enumerate()
        .for_each(|(i, ((logits, targets), out))| {
            let gradients = gradients.map(|g| &g[i * rows..i * rows + targets.len()]);
            finish_rows(logits, targets, temperature, gradients, out);
        });
}

impl CustomOp1 for LogProbs {
    fn name(&self) -> &'static str {
        "log-probs"
    }

    fn cpu_fwd(&self, hidden: &CpuStorage, layout: &Layout) -> Result<(CpuStorage, Shape)> {
        let out = self.forward(slice(hidden, layout)?)?;
        Ok((CpuStorage::F32(out), Shape::from(self.targets.len())))
    }

    fn bwd(&self, hidden: &Tensor, _out: &Tensor, grad: &Tensor) -> Result<Option<Tensor>> {
        Ok(Some(self.backward(hidden, None, grad)?.0))
    }
}

impl CustomOp2 for LogProbs {
    fn name(&self) -> &'static str {
        "log-probs-trained-head"
    }

    fn cpu_fwd(
        &self,
        hidden: &CpuStorage,
        layout: &Layout,
        _weight: &CpuStorage,
        _weight_layout: &Layout,
    ) -> Result<(CpuStorage, Shape)> {
        let out = self.forward(slice(hidden, layout)?)?;
        Ok((CpuStorage::F32(out), Shape::from(self.targets.len())))
    }

    fn bwd(
        &self,
        hidden: &Tensor,
        weight: &Tensor,
        _out: &Tensor,
        grad: &Tensor,
    ) -> Result<(Option<Tensor>, Option<Tensor>)> {
        let trained = weight.track_op().then_some(weight);
        let (d_hidden, d_weight) = self.backward(hidden, trained, grad)?;
        Ok((Some(d_hidden), d_weight))
    }
}
