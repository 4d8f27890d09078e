//! Root-mean-square and layer normalisation over the last axis.

use super::kernel::math::{self, for_each_isa};
use super::kernel::{computed, computed_together, is_fused, slice, with_slice};
use super::linear::sum_rows;
use super::plain;
use candle_core::{CpuStorage, CustomOp2, CustomOp3, Layout, Result, Shape, Tensor};

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

/// The `i`-th chunk of `data`.
fn part(data: &[f32], i: usize, chunk: usize) -> &[f32] {
    &data[i * chunk..data.len().min((i + 1) * chunk)]
}

fn tensor(values: Option<Vec<f32>>, like: &Tensor) -> Result<Option<Tensor>> {
    values.map(|values| Tensor::from_vec(values, like.shape(), like.device())).transpose()
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
        let chunk = chunk_of(weight.len());
        let y = computed(x.len(), chunk, |i, y| rms_rows(part(x, i, chunk), weight, self.eps, y));
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
        let len = x.elem_count();
        with_slice(x, |xs| {
            with_slice(grad, |grad| {
                with_slice(weight, |weights| {
                    let dw = weight.track_op().then(|| {
                        let scaled = computed(len, chunk, |i, out| {
                            rms_rows_weight(part(xs, i, chunk), part(grad, i, chunk), width, self.eps, out);
                        });
                        sum_rows(&scaled, width)
                    });
                    let dx = x.track_op().then(|| {
                        computed(len, chunk, |i, dx| {
                            rms_rows_backward(
                                part(xs, i, chunk),
                                weights,
                                part(grad, i, chunk),
                                self.eps,
                                dx,
                            );
                        })
                    });
                    Ok((tensor(dx, x)?, tensor(dw, weight)?))
                })
            })
        })???
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
        let chunk = chunk_of(weight.len());
        let y = computed(x.len(), chunk, |i, y| layer_rows(part(x, i, chunk), weight, bias, self.eps, y));
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
        let len = x.elem_count();
        with_slice(x, |xs| {
            with_slice(grad, |grad| {
                with_slice(weight, |weights| {
                    let [dx, scaled] = computed_together([len, len], [chunk, chunk], |i, [dx, scaled]| {
                        let (x, grad) = (part(xs, i, chunk), part(grad, i, chunk));
                        layer_rows_backward(x, weights, grad, self.eps, dx, scaled);
                    });
                    let dw = weight.track_op().then(|| sum_rows(&scaled, width));
                    let db = bias.track_op().then(|| sum_rows(grad, width));
                    Ok((tensor(Some(dx), x)?, tensor(dw, weight)?, tensor(db, bias)?))
                })
            })
        })???
    }
}
