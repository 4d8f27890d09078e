//! Divergence between the token distributions of two lists of rows, without ever holding the logits of all rows at once.

use super::cross_entropy::chunk_rows;
use super::kernel::gemm::{Right, View, gemm, product};
use super::kernel::math::{self, for_each_isa};
use super::kernel::{is_fused, slice, with_slices, zeros};
use super::linear::{Linear, input_gradient, with_forward_panels};
use super::plain;
use candle_core::{CpuStorage, CustomOp2, CustomOp3, Layout, Result, Shape, Tensor};
use rayon::prelude::*;

/// `KL(softmax(head(p)) || softmax(head(q)))` in nats, row by row: the sum over the vocabulary of
/// `p_v (log p_v - log q_v)`, at least 0.
///
/// # Shapes
/// - `p`, `q`: `[rows, hidden]`
/// - `head`: `[vocab, hidden]`, frozen or trainable, without bias
/// - returns: `[rows]`, float32
///
/// # Errors
/// When `p` and `q` differ in shape.
pub fn divergence_of(p: &Tensor, q: &Tensor, head: &Linear) -> Result<Tensor> {
    let (rows, _) = p.dims2()?;
    let (_, weight, bias) = head.parts();
    if p.dims() != q.dims() || bias.is_some() || rows == 0 {
        candle_core::bail!(
            "the divergence of rows {:?} from {:?} (a head with bias is not supported)",
            p.shape(),
            q.shape()
        );
    }
    if !is_fused(p) {
        return plain::divergence_of(&head.forward(p)?, &head.forward(q)?);
    }
    let op = Divergence { head: head.clone() };
    let (p, q) = (p.contiguous()?, q.contiguous()?);
    match weight {
        Some(weight) => p.apply_op3(&q, &weight.contiguous()?, op),
        None => p.apply_op2(&q, op),
    }
}

struct Divergence {
    head: Linear,
}

for_each_isa! {
    /// Divergence of each row of logits `p` from that of `q`; with `gradients`, turns the rows into the gradients by their
    /// logits times `gradients[r]`: `p (log p - log q - divergence)` and `q - p`.
    fn finish_rows(p: &mut [f32], q: &mut [f32], gradients: Option<&[f32]>, out: &mut [f32]) {
        let vocab = p.len() / out.len();
        for (r, (p, q)) in p.chunks_exact_mut(vocab).zip(q.chunks_exact_mut(vocab)).enumerate() {
            let log_sum = |row: &[f32]| {
                let most = math::max(row);
                most + math::sum_by(row, row, |value, _| math::exp(value - most)).ln()
            };
            let (log_p, log_q) = (log_sum(p), log_sum(q));
            let shift = log_p - log_q;
            out[r] = math::sum_by(p, q, |p, q| {
                term(math::exp(p - log_p), math::exp(q - log_q), p - q - shift)
            });
            if let Some(gradients) = gradients {
                let scale = gradients[r];
                // The divergence once more, of the same roundings as what it is taken from: they cancel.
                let mean = math::sum_by(p, q, |p, q| math::exp(p - log_p) * (p - q - shift));
                for (p, q) in p.iter_mut().zip(q.iter_mut()) {
                    let (p_share, q_share) = (math::exp(*p - log_p), math::exp(*q - log_q));
                    *p = scale * p_share * (*p - *q - shift - mean);
                    *q = scale * (q_share - p_share);
                }
            }
        }
    }
}

/// `p log(p / q) - p + q` of shares `p` and `q` whose log-quotient is `log_ratio`: what a token adds to the divergence. None
/// of these terms is negative, so that a small divergence is no small difference of large sums.
#[inline(always)]
fn term(p: f32, q: f32, log_ratio: f32) -> f32 {
    let d = log_ratio;
    let series = 0.5 - d * (1.0 / 6.0 - d * (1.0 / 24.0 - d * (1.0 / 120.0 - d / 720.0)));
    if d.abs() < 0.25 { p * d * d * series } else { (q - p + p * d).max(0.0) }
}

/// As `finish_rows`, by all threads.
fn finish(p: &mut [f32], q: &mut [f32], gradients: Option<&[f32]>, out: &mut [f32]) {
    let vocab = p.len() / out.len().max(1);
    let rows = (16 * 1024 / vocab.max(1)).max(1);
    p.par_chunks_mut(rows * vocab)
        .zip(q.par_chunks_mut(rows * vocab))
        .zip(out.par_chunks_mut(rows))
        .enumerate()
        .for_each(|(i, ((p, q), out))| {
            let gradients = gradients.map(|g| &g[i * rows..i * rows + out.len()]);
            finish_rows(p, q, gradients, out);
        });
}

/// Gradients of `p`, `q` and the head's weight, of those that are wanted.
type Slopes = (Option<Tensor>, Option<Tensor>, Option<Tensor>);

impl Divergence {
    fn forward(&self, p: &[f32], q: &[f32]) -> Result<Vec<f32>> {
        with_forward_panels(&self.head, |panels| {
            let (width, vocab) = (panels.k, panels.n);
            let rows = p.len() / width;
            let step = chunk_rows(2 * vocab);
            let mut out = zeros(rows);
            let (mut p_logits, mut q_logits) = (zeros(step.min(rows) * vocab), zeros(step.min(rows) * vocab));
            for start in (0..rows).step_by(step) {
                let count = step.min(rows - start);
                let range = start * width..(start + count) * width;
                let (p_logits, q_logits) = (&mut p_logits[..count * vocab], &mut q_logits[..count * vocab]);
                for (x, logits) in [(p, &mut *p_logits), (q, &mut *q_logits)] {
                    let x = View::new(&x[range.clone()], count, width);
                    product(x, Right::Packed(panels), logits, vocab, false, true);
                }
                finish(p_logits, q_logits, None, &mut out[start..start + count]);
            }
            out
        })
    }

    fn backward(&self, p: &Tensor, q: &Tensor, weight: Option<&Tensor>, grad: &Tensor) -> Result<Slopes> {
        let (rows, width) = p.dims2()?;
        let wants = [p.track_op(), q.track_op()];
        let mut d_inputs = wants.map(|is_wanted| is_wanted.then(|| zeros(rows * width)));
        let d_weight = with_slices([p, q, grad], |[p, q, grad]| {
            with_forward_panels(&self.head, |panels| -> Result<Vec<f32>> {
                let vocab = panels.n;
                let step = chunk_rows(2 * vocab);
                let mut both = [zeros(step.min(rows) * vocab), zeros(step.min(rows) * vocab)];
                let mut discarded = zeros(step.min(rows));
                let mut d_weight = zeros(if weight.is_some() { vocab * width } else { 0 });
                for start in (0..rows).step_by(step) {
                    let count = step.min(rows - start);
                    let range = start * width..(start + count) * width;
                    let inputs = [p, q].map(|x| View::new(&x[range.clone()], count, width));
                    let [p_logits, q_logits] = &mut both;
                    let (p_logits, q_logits) =
                        (&mut p_logits[..count * vocab], &mut q_logits[..count * vocab]);
                    product(inputs[0], Right::Packed(panels), p_logits, vocab, false, true);
                    product(inputs[1], Right::Packed(panels), q_logits, vocab, false, true);
                    let gradients = Some(&grad[start..start + count]);
                    finish(p_logits, q_logits, gradients, &mut discarded[..count]);
                    for ((logits, x), d_input) in
                        [p_logits, q_logits].into_iter().zip(inputs).zip(&mut d_inputs)
                    {
                        if let Some(d_input) = d_input {
                            input_gradient(&self.head, logits, count, &mut d_input[range.clone()])?;
                        }
                        if weight.is_some() {
                            let d_logits = View::new(logits, count, vocab).transposed();
                            gemm(d_logits, x, &mut d_weight, width, true);
                        }
                    }
                }
                Ok(d_weight)
            })
        })???;
        let d_weight = match weight {
            Some(weight) => Some(Tensor::from_vec(d_weight, weight.shape(), weight.device())?),
            None => None,
        };
        let [d_p, d_q] = d_inputs.map(|values| {
            values.map(|values| Tensor::from_vec(values, (rows, width), p.device())).transpose()
        });
        Ok((d_p?, d_q?, d_weight))
    }
}

impl CustomOp2 for Divergence {
    fn name(&self) -> &'static str {
        "divergence"
    }

    fn cpu_fwd(
        &self,
        p: &CpuStorage,
        p_layout: &Layout,
        q: &CpuStorage,
        q_layout: &Layout,
    ) -> Result<(CpuStorage, Shape)> {
        let out = self.forward(slice(p, p_layout)?, slice(q, q_layout)?)?;
        let rows = out.len();
        Ok((CpuStorage::F32(out), Shape::from(rows)))
    }

    fn bwd(
        &self,
        p: &Tensor,
        q: &Tensor,
        _out: &Tensor,
        grad: &Tensor,
    ) -> Result<(Option<Tensor>, Option<Tensor>)> {
        let (d_p, d_q, _) = self.backward(p, q, None, grad)?;
        Ok((d_p, d_q))
    }
}

impl CustomOp3 for Divergence {
    fn name(&self) -> &'static str {
        "divergence-trained-head"
    }

    fn cpu_fwd(
        &self,
        p: &CpuStorage,
        p_layout: &Layout,
        q: &CpuStorage,
        q_layout: &Layout,
        _weight: &CpuStorage,
        _weight_layout: &Layout,
    ) -> Result<(CpuStorage, Shape)> {
        CustomOp2::cpu_fwd(self, p, p_layout, q, q_layout)
    }

    fn bwd(&self, p: &Tensor, q: &Tensor, weight: &Tensor, _out: &Tensor, grad: &Tensor) -> Result<Slopes> {
        self.backward(p, q, weight.track_op().then_some(weight), grad)
    }
}
