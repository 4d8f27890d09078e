//! Rotary position embedding, half-rotation form, angles given per row.

use super::kernel::math::for_each_isa;
use super::kernel::{computed, is_fused, slice, with_slice, with_slices};
use super::plain;
use candle_core::{CpuStorage, CustomOp1, Layout, Result, Shape, Tensor};
use rayon::prelude::*;

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
    let (rows, width) = x.dims2()?;
    x.contiguous()?.apply_op1(Rotary(Angles::new(cos, sin, rows, width)?))
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

/// Angles of each row, `[rows, head_dim / 2]`, constants.
#[derive(Debug)]
pub(super) struct Angles {
    cos: Tensor,
    sin: Tensor,
    half: usize,
}

/// Rows that one task rotates at a time, of `width` elements.
fn rows_at_once(width: usize) -> usize {
    (16 * 1024 / width).max(1)
}

impl Angles {
    /// For `rows` rows of heads that together are `width` wide.
    ///
    /// # Errors
    /// When the shapes do not fit.
    pub(super) fn new(cos: &Tensor, sin: &Tensor, rows: usize, width: usize) -> Result<Self> {
        let (angles, half) = cos.dims2()?;
        if sin.dims2()? != (angles, half) || angles != rows || half == 0 || !width.is_multiple_of(2 * half) {
            candle_core::bail!("rotary angles {:?} do not fit [{rows}, {width}]", cos.shape());
        }
        Ok(Self { cos: cos.contiguous()?, sin: sin.contiguous()?, half })
    }

    /// Runs `f` on all angles.
    fn with<R>(&self, f: impl FnOnce(&[f32], &[f32]) -> R) -> Result<R> {
        with_slices([&self.cos, &self.sin], |[cos, sin]| f(cos, sin))
    }

    /// Columns `column..column + width` of rows of `stride` elements, rotated, without the rest.
    pub(super) fn rotated(&self, x: &[f32], stride: usize, column: usize, width: usize) -> Result<Vec<f32>> {
        let (rows, half) = (x.len() / stride, self.half);
        let at_once = rows_at_once(width);
        self.with(|cos, sin| {
            computed(rows * width, at_once * width, |i, y| {
                for (row, y) in (i * at_once..).zip(y.chunks_exact_mut(width)) {
                    let angles = row * half..(row + 1) * half;
                    let x = &x[row * stride + column..][..width];
                    rotate(x, &cos[angles.clone()], &sin[angles], width, half, 1.0, y);
                }
            })
        })
    }

    /// Rotates the rows of `dy` back, into columns `column..` of rows of `stride` elements: the backward.
    pub(super) fn turn_back(&self, dy: &[f32], dx: &mut [f32], stride: usize, column: usize) -> Result<()> {
        let half = self.half;
        let width = dy.len() / (dx.len() / stride);
        let at_once = rows_at_once(width);
        self.with(|cos, sin| {
            dx.par_chunks_mut(at_once * stride).enumerate().for_each(|(i, dx)| {
                for (row, dx) in (i * at_once..).zip(dx.chunks_exact_mut(stride)) {
                    let angles = row * half..(row + 1) * half;
                    let dx = &mut dx[column..column + width];
                    let dy = &dy[row * width..(row + 1) * width];
                    rotate(dy, &cos[angles.clone()], &sin[angles], width, half, -1.0, dx);
                }
            });
        })
    }
}

struct Rotary(Angles);

impl Rotary {
    fn run(&self, x: &[f32], width: usize, sign: f32) -> Result<Vec<f32>> {
        let half = self.0.half;
        let rows = rows_at_once(width);
        let part = |data: &[f32], i: usize, chunk: usize| i * chunk..data.len().min((i + 1) * chunk);
        self.0.with(|cos, sin| {
            computed(x.len(), rows * width, |i, y| {
                let angles = part(cos, i, rows * half);
                let x = &x[part(x, i, rows * width)];
                rotate(x, &cos[angles.clone()], &sin[angles], width, half, sign, y);
            })
        })
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
