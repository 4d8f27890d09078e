//! Rotary position embedding, half-rotation form, angles given per row.

use super::kernel::math::for_each_isa;
use super::kernel::{computed, is_fused, slice, with_slice};
use super::plain;
use candle_core::{CpuStorage, CustomOp1, Layout, Result, Shape, Tensor};

/// Rotates each head's pairs `(x[i], x[i + head_dim/2])` by the row's angles.
///
/// # Shapes
/// - `x`: `[rows, heads · head_dim]`
/// - `cos`, `sin`: `[rows, head_dim / 2]`, plain data: no gradient flows to them
/// - returns: as `x`
pub fn rotary(x: &Tensor, cos: &Tensor, sin: &Tensor) -> Result<Tensor> {
    if !is_fused(x) {
        return plain::rotary(x, cos, sin);
    }
    if cos.dims2()? != sin.dims2()? || cos.dims2()?.0 != x.dims2()?.0 {
        candle_core::bail!("rotary angles {:?} do not fit {:?}", cos.shape(), x.shape());
    }
    x.contiguous()?.apply_op1(Rotary { cos: cos.contiguous()?, sin: sin.contiguous()? })
}

for_each_isa! {
    /// Rotates `rows` by their angles; by minus their angles when `sign` is -1, which is the backward.
    fn rotate(x: &[f32], cos: &[f32], sin: &[f32], width: usize, half: usize, sign: f32, y: &mut [f32]) {
        let rows = x.chunks_exact(width).zip(y.chunks_exact_mut(width));
        let angles = cos.chunks_exact(half).zip(sin.chunks_exact(half));
        for ((x, y), (cos, sin)) in rows.zip(angles) {
            for (x, y) in x.chunks_exact(2 * half).zip(y.chunks_exact_mut(2 * half)) {
                let ((x1, x2), (y1, y2)) = (x.split_at(half), y.split_at_mut(half));
                for i in 0..half {
                    let s = sin[i] * sign;
                    y1[i] = x1[i] * cos[i] - x2[i] * s;
                    y2[i] = x2[i] * cos[i] + x1[i] * s;
                }
            }
        }
    }
}

struct Rotary {
    cos: Tensor,
    sin: Tensor,
}

impl Rotary {
    fn run(&self, x: &[f32], width: usize, sign: f32) -> Result<Vec<f32>> {
        let half = self.cos.dims2()?.1;
        let rows = (16 * 1024 / width).max(1);
        let part = |data: &[f32], i: usize, chunk: usize| i * chunk..data.len().min((i + 1) * chunk);
        with_slice(&self.cos, |cos| {
            with_slice(&self.sin, |sin| {
                computed(x.len(), rows * width, |i, y| {
                    let angles = part(cos, i, rows * half);
                    let x = &x[part(x, i, rows * width)];
                    rotate(x, &cos[angles.clone()], &sin[angles], width, half, sign, y);
                })
            })
        })?
    }
}

impl CustomOp1 for Rotary {
    fn name(&self) -> &'static str {
        "rotary"
    }

    fn cpu_fwd(&self, x: &CpuStorage, layout: &Layout) -> Result<(CpuStorage, Shape)> {
        let (_, width) = layout.shape().dims2()?;
        Ok((CpuStorage::F32(self.run(slice(x, layout)?, width, 1.0)?), layout.shape().clone()))
    }

    fn bwd(&self, x: &Tensor, _y: &Tensor, grad: &Tensor) -> Result<Option<Tensor>> {
        let (_, width) = x.dims2()?;
        let dx = with_slice(grad, |grad| self.run(grad, width, -1.0))??;
        Ok(Some(Tensor::from_vec(dx, x.shape(), x.device())?))
    }
}
