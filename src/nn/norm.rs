//! Root-mean-square and layer normalisation over the last axis.

use super::kernel::math::{self, for_each_isa};
use super::kernel::{buffer, is_fused, slice, with_slice};
use super::linear::sum_rows;
use super::plain;
use candle_core::{CpuStorage, CustomOp2, CustomOp3, Layout, Result, Shape, Tensor};
use rayon::prelude::*;

/// Elements that one task normalises at a time.
const CHUNK: usize = 16 * 1024;

/// `weight · x / sqrt(mean(x²) + rms_norm_eps)`, over consecutive runs of `weight`'s length.
///
/// Runs shorter than a row normalise each attention head by itself (`q_norm`, `k_norm`).
///
/// # Shapes
/// - `x`: `[rows, n · width]`
/// - `weight`: `[width]`
/// - returns: as `x`
pub fn rms_norm(x: &Tensor, weight: &Tensor, rms_norm_eps: f64) -> Result<Tensor> {
    if !is_fused(x) {
        return plain::rms_norm(x, weight, rms_norm_eps);
    }
    x.contiguous()?.apply_op2(weight, RmsNorm { eps: rms_norm_eps as f32 })
}

/// `weight · (x - mean) / sqrt(variance + eps) + bias` over the last axis.
///
/// # Shapes
/// - `x`: `[rows, width]`
/// - `weight`, `bias`: `[width]`
/// - returns: as `x`
pub fn layer_norm(x: &Tensor, weight: &Tensor, bias: &Tensor, eps: f64) -> Result<Tensor> {
    if !is_fused(x) {
        return plain::layer_norm(x, weight, bias, eps);
    }
    x.contiguous()?.apply_op3(weight, bias, LayerNorm { eps: eps as f32 })
}

for_each_isa! {
    fn rms_rows(x: &[f32], weight: &[f32], eps: f32, y: &mut [f32]) {
        let width = weight.len();
        for (x, y) in x.chunks_exact(width).zip(y.chunks_exact_mut(width)) {
            let inverse = 1.0 / (math::dot(x, x) / width as f32 + eps).sqrt();
            for i in 0..width {
                y[i] = x[i] * inverse * weight[i];
            }
        }
    }
}

for_each_isa! {
    fn rms_rows_backward(x: &[f32], weight: &[f32], grad: &[f32], eps: f32, dx: &mut [f32]) {
        let width = weight.len();
        let rows = x.chunks_exact(width).zip(grad.chunks_exact(width)).zip(dx.chunks_exact_mut(width));
        for ((x, grad), dx) in rows {
            let inverse = 1.0 / (math::dot(x, x) / width as f32 + eps).sqrt();
            for i in 0..width {
                dx[i] = grad[i] * weight[i];
            }
            let mean = math::dot(dx, x) * inverse * inverse / width as f32;
            for i in 0..width {
                dx[i] = inverse * (dx[i] - x[i] * mean);
            }
        }
    }
}

for_each_isa! {
    /// `grad · x / rms(x)`, whose sum over rows is the weight's gradient.
    fn rms_rows_weight(x: &[f32], grad: &[f32], width: usize, eps: f32, out: &mut [f32]) {
        let rows = x.chunks_exact(width).zip(grad.chunks_exact(width)).zip(out.chunks_exact_mut(width));
        for ((x, grad), out) in rows {
            let inverse = 1.0 / (math::dot(x, x) / width as f32 + eps).sqrt();
            for i in 0..width {
                out[i] = grad[i] * x[i] * inverse;
            }
        }
    }
}

for_each_isa! {
    fn layer_rows(x: &[f32], weight: &[f32], bias: &[f32], eps: f32, y: &mut [f32]) {
        let width = weight.len();
        for (x, y) in x.chunks_exact(width).zip(y.chunks_exact_mut(width)) {
            let mean = math::sum(x) / width as f32;
            for i in 0..width {
                y[i] = x[i] - mean;
            }
            let inverse = 1.0 / (math::dot(y, y) / width as f32 + eps).sqrt();
            for i in 0..width {
                y[i] = y[i] * inverse * weight[i] + bias[i];
            }
        }
    }
}

for_each_isa! {
    /// `dx` gets the input's gradient, `scaled` gets `grad · normalised(x)`, whose sum over rows is the weight's.
    fn layer_rows_backward(x: &[f32], weight: &[f32], grad: &[f32], eps: f32, dx: &mut [f32], scaled: &mut [f32]) {
        let width = weight.len();
        let n = width as f32;
        let rows = x.chunks_exact(width).zip(grad.chunks_exact(width));
        let outputs = dx.chunks_exact_mut(width).zip(scaled.chunks_exact_mut(width));
        for ((x, grad), (dx, normal)) in rows.zip(outputs) {
            let mean = math::sum(x) / n;
            for i in 0..width {
                normal[i] = x[i] - mean;
            }
            let inverse = 1.0 / (math::dot(normal, normal) / n + eps).sqrt();
            for i in 0..width {
                normal[i] *= inverse;
                dx[i] = grad[i] * weight[i];
            }
            let (shift, slope) = (math::sum(dx) / n, math::dot(dx, normal) / n);
            for i in 0..width {
                dx[i] = inverse * (dx[i] - shift - normal[i] * slope);
                normal[i] *= grad[i];
            }
        }
    }
}

/// Elements of a chunk: whole rows, about [`CHUNK`] elements.
fn chunk_of(width: usize) -> usize {
    width * (CHUNK / width).max(1)
}

struct RmsNorm {
    eps: f32,
}

impl CustomOp2 for RmsNorm {
    fn name(&self) -> &'static str {
        "rms-norm"
    }

    fn cpu_fwd(
        &self,
        x: &CpuStorage,
        x_layout: &Layout,
        weight: &CpuStorage,
        weight_layout: &Layout,
    ) -> Result<(CpuStorage, Shape)> {
        let (x, weight) = (slice(x, x_layout)?, slice(weight, weight_layout)?);
        let mut y = buffer(x.len());
        let chunk = chunk_of(weight.len());
        y.par_chunks_mut(chunk).zip(x.par_chunks(chunk)).for_each(|(y, x)| rms_rows(x, weight, self.eps, y));
        Ok((CpuStorage::F32(y), x_layout.shape().clone()))
    }

    fn bwd(
        &self,
        x: &Tensor,
        weight: &Tensor,
        _y: &Tensor,
        grad: &Tensor,
    ) -> Result<(Option<Tensor>, Option<Tensor>)> {
        let width = weight.dims1()?;
        let chunk = chunk_of(width);
        let mut out = buffer(x.elem_count());
        let dw = if weight.track_op() {
            with_slice(x, |x| with_slice(grad, |grad| rms_rows_weight(x, grad, width, self.eps, &mut out)))??;
            Some(sum_rows(&Tensor::from_slice(&out, (out.len() / width, width), x.device())?)?)
        } else {
            None
        };
        if !x.track_op() {
            return Ok((None, dw));
        }
        with_slice(x, |x| {
            with_slice(grad, |grad| {
                with_slice(weight, |weight| {
                    out.par_chunks_mut(chunk)
                        .zip(x.par_chunks(chunk))
                        .zip(grad.par_chunks(chunk))
                        .for_each(|((dx, x), grad)| rms_rows_backward(x, weight, grad, self.eps, dx));
                })
            })
        })???;
        Ok((Some(Tensor::from_vec(out, x.shape(), x.device())?), dw))
    }
}

struct LayerNorm {
    eps: f32,
}

impl CustomOp3 for LayerNorm {
    fn name(&self) -> &'static str {
        "layer-norm"
    }

    fn cpu_fwd(
        &self,
        x: &CpuStorage,
        x_layout: &Layout,
        weight: &CpuStorage,
        weight_layout: &Layout,
        bias: &CpuStorage,
        bias_layout: &Layout,
    ) -> Result<(CpuStorage, Shape)> {
        let x = slice(x, x_layout)?;
        let (weight, bias) = (slice(weight, weight_layout)?, slice(bias, bias_layout)?);
        let mut y = buffer(x.len());
        let chunk = chunk_of(weight.len());
        y.par_chunks_mut(chunk)
            .zip(x.par_chunks(chunk))
            .for_each(|(y, x)| layer_rows(x, weight, bias, self.eps, y));
        Ok((CpuStorage::F32(y), x_layout.shape().clone()))
    }

    fn bwd(
        &self,
        x: &Tensor,
        weight: &Tensor,
        bias: &Tensor,
        _y: &Tensor,
        grad: &Tensor,
    ) -> Result<(Option<Tensor>, Option<Tensor>, Option<Tensor>)> {
        let width = weight.dims1()?;
        let chunk = chunk_of(width);
        let (mut dx, mut scaled) = (buffer(x.elem_count()), buffer(x.elem_count()));
        with_slice(x, |x| {
            with_slice(grad, |grad| {
                with_slice(weight, |weight| {
                    dx.par_chunks_mut(chunk)
                        .zip(scaled.par_chunks_mut(chunk))
                        .zip(x.par_chunks(chunk))
                        .zip(grad.par_chunks(chunk))
                        .for_each(|(((dx, scaled), x), grad)| {
                            layer_rows_backward(x, weight, grad, self.eps, dx, scaled);
                        });
                })
            })
        })???;
        let dw = if weight.track_op() {
            Some(sum_rows(&Tensor::from_vec(scaled, x.shape(), x.device())?)?)
        } else {
            None
        };
        let db = if bias.track_op() { Some(sum_rows(grad)?) } else { None };
        let dx = if x.track_op() { Some(Tensor::from_vec(dx, x.shape(), x.device())?) } else { None };
        Ok((dx, dw, db))
    }
}
