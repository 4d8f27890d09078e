//! Row selection and placement: token embedding, image features into the text, rows out for the head.

use super::kernel::{computed, is_fused, slice, with_slice, zeros};
use candle_core::{CpuStorage, CustomOp1, CustomOp2, InplaceOp2, Layout, Result, Shape, Tensor};
use std::sync::Arc;

fn index(rows: &[u32], like: &Tensor) -> Result<Tensor> {
    Tensor::new(rows, like.device())
}

pub(super) fn check(rows: &[u32], n: usize) -> Result<()> {
    match rows.iter().find(|&&row| row as usize >= n) {
        Some(row) => candle_core::bail!("row {row} of a matrix of {n} rows"),
        None => Ok(()),
    }
}

/// Rows `rows` of `x`, in that order; a row may be taken more than once.
///
/// # Shapes
/// - `x`: `[n, width]`
/// - returns: `[rows.len(), width]`
///
/// # Errors
/// When a row does not exist.
pub fn select(x: &Tensor, rows: &[u32]) -> Result<Tensor> {
    check(rows, x.dims2()?.0)?;
    if !is_fused(x) {
        return x.index_select(&index(rows, x)?, 0);
    }
    x.contiguous()?.apply_op1(Select(rows.into()))
}

/// Cuts each row into consecutive parts of these widths.
///
/// # Shapes
/// - `x`: `[rows, sum of widths]`
/// - returns: `[rows, width]` for each width
///
/// # Errors
/// When the widths do not add up.
pub fn split_columns<const N: usize>(x: &Tensor, widths: [usize; N]) -> Result<[Tensor; N]> {
    let (_, total) = x.dims2()?;
    if widths.iter().sum::<usize>() != total {
        candle_core::bail!("columns {widths:?} do not add up to {total}");
    }
    let mut parts = Vec::with_capacity(N);
    let mut start = 0;
    for width in widths {
        parts.push(if is_fused(x) {
            x.contiguous()?.apply_op1(Columns { start, width })?
        } else {
            x.narrow(1, start, width)?.contiguous()?
        });
        start += width;
    }
    parts.try_into().map_err(|_| candle_core::Error::Msg("a split lost a part".into()))
}

/// `x` with `values[i]` added to row `rows[i]`; `rows` are distinct.
///
/// # Shapes
/// - `x`: `[n, width]`, `values`: `[rows.len(), width]`
/// - returns: as `x`
///
/// # Errors
/// When a row does not exist or shapes differ.
pub fn add(x: &Tensor, rows: &[u32], values: &Tensor) -> Result<Tensor> {
    place(x, rows, values, true)
}

/// `x` with row `rows[i]` replaced by `values[i]`; `rows` are distinct.
///
/// # Shapes
/// - `x`: `[n, width]`, `values`: `[rows.len(), width]`
/// - returns: as `x`
///
/// # Errors
/// When a row does not exist or shapes differ.
pub fn replace(x: &Tensor, rows: &[u32], values: &Tensor) -> Result<Tensor> {
    place(x, rows, values, false)
}

fn place(x: &Tensor, rows: &[u32], values: &Tensor, is_sum: bool) -> Result<Tensor> {
    let (n, width) = x.dims2()?;
    if values.dims2()? != (rows.len(), width) {
        candle_core::bail!("{} rows of {:?} cannot take {:?}", rows.len(), x.shape(), values.shape());
    }
    check(rows, n)?;
    if is_fused(x) {
        return x.contiguous()?.apply_op2(&values.contiguous()?, Place { rows: rows.into(), is_sum });
    }
    if is_sum {
        return x.index_add(&index(rows, x)?, values, 0);
    }
    let mut keep = vec![1f32; n];
    for &row in rows {
        keep[row as usize] = 0.0;
    }
    let keep = Tensor::from_vec(keep, (n, 1), x.device())?.to_dtype(x.dtype())?;
    x.broadcast_mul(&keep)?.index_add(&index(rows, x)?, values, 0)
}

/// Writes `values[i]` into row `rows[i]` of `x` in place. Not differentiable: for key-value caches.
///
/// # Errors
/// When a row does not exist or shapes differ.
pub fn write(x: &Tensor, rows: &[u32], values: &Tensor) -> Result<()> {
    let (n, width) = x.dims2()?;
    if values.dims2()? != (rows.len(), width) {
        candle_core::bail!("{} rows of {:?} cannot take {:?}", rows.len(), x.shape(), values.shape());
    }
    check(rows, n)?;
    if is_fused(x) {
        return x.inplace_op2(&values.contiguous()?, &Write(rows.into()));
    }
    // Rows that follow one another at once: elsewhere than on the CPU each copy is a launch.
    let mut done = 0;
    while let Some(&first) = rows.get(done) {
        let count = rows[done..].iter().zip(first..).take_while(|(row, next)| *row == next).count();
        x.slice_set(&values.narrow(0, done, count)?.contiguous()?, 0, first as usize)?;
        done += count;
    }
    Ok(())
}

fn gather(x: &[f32], rows: &[u32], width: usize) -> Vec<f32> {
    let mut y = Vec::with_capacity(rows.len() * width);
    for &row in rows {
        y.extend_from_slice(&x[row as usize * width..][..width]);
    }
    y
}

struct Select(Arc<[u32]>);

impl CustomOp1 for Select {
    fn name(&self) -> &'static str {
        "select-rows"
    }

    fn cpu_fwd(&self, x: &CpuStorage, layout: &Layout) -> Result<(CpuStorage, Shape)> {
        let (_, width) = layout.shape().dims2()?;
        let y = gather(slice(x, layout)?, &self.0, width);
        Ok((CpuStorage::F32(y), Shape::from((self.0.len(), width))))
    }

    fn bwd(&self, x: &Tensor, _y: &Tensor, grad: &Tensor) -> Result<Option<Tensor>> {
        let (n, width) = x.dims2()?;
        let mut dx = zeros(n * width);
        with_slice(grad, |grad| {
            for (row, grad) in self.0.iter().zip(grad.chunks_exact(width)) {
                for (sum, value) in dx[*row as usize * width..][..width].iter_mut().zip(grad) {
                    *sum += value;
                }
            }
        })?;
        Ok(Some(Tensor::from_vec(dx, (n, width), x.device())?))
    }
}

struct Columns {
    start: usize,
    width: usize,
}

impl CustomOp1 for Columns {
    fn name(&self) -> &'static str {
        "columns"
    }

    fn cpu_fwd(&self, x: &CpuStorage, layout: &Layout) -> Result<(CpuStorage, Shape)> {
        let (rows, total) = layout.shape().dims2()?;
        let x = slice(x, layout)?;
        let y = computed(rows * self.width, 256 * self.width, |chunk, y| {
            for (r, y) in y.chunks_exact_mut(self.width).enumerate() {
                y.copy_from_slice(&x[(chunk * 256 + r) * total + self.start..][..self.width]);
            }
        });
        Ok((CpuStorage::F32(y), Shape::from((rows, self.width))))
    }

    fn bwd(&self, x: &Tensor, _y: &Tensor, grad: &Tensor) -> Result<Option<Tensor>> {
        let (rows, total) = x.dims2()?;
        let dx = with_slice(grad, |grad| {
            computed(rows * total, 256 * total, |chunk, dx| {
                for (r, dx) in dx.chunks_exact_mut(total).enumerate() {
                    let grad = &grad[(chunk * 256 + r) * self.width..][..self.width];
                    dx[..self.start].fill(0.0);
                    dx[self.start..self.start + self.width].copy_from_slice(grad);
                    dx[self.start + self.width..].fill(0.0);
                }
            })
        })?;
        Ok(Some(Tensor::from_vec(dx, x.shape(), x.device())?))
    }
}

struct Place {
    rows: Arc<[u32]>,
    is_sum: bool,
}

impl CustomOp2 for Place {
    fn name(&self) -> &'static str {
        "place-rows"
    }

    fn cpu_fwd(
        &self,
        x: &CpuStorage,
        layout: &Layout,
        values: &CpuStorage,
        values_layout: &Layout,
    ) -> Result<(CpuStorage, Shape)> {
        let (_, width) = layout.shape().dims2()?;
        let mut y = slice(x, layout)?.to_vec();
        for (row, values) in self.rows.iter().zip(slice(values, values_layout)?.chunks_exact(width)) {
            let y = &mut y[*row as usize * width..][..width];
            if self.is_sum {
                for (y, value) in y.iter_mut().zip(values) {
                    *y += value;
                }
            } else {
                y.copy_from_slice(values);
            }
        }
        Ok((CpuStorage::F32(y), layout.shape().clone()))
    }

    fn bwd(
        &self,
        x: &Tensor,
        values: &Tensor,
        _y: &Tensor,
        grad: &Tensor,
    ) -> Result<(Option<Tensor>, Option<Tensor>)> {
        let (_, width) = x.dims2()?;
        let d_values = if values.track_op() {
            let rows = with_slice(grad, |grad| gather(grad, &self.rows, width))?;
            Some(Tensor::from_vec(rows, values.shape(), x.device())?)
        } else {
            None
        };
        if !x.track_op() {
            return Ok((None, d_values));
        }
        let dx = if self.is_sum {
            grad.clone()
        } else {
            let mut dx = with_slice(grad, <[f32]>::to_vec)?;
            for row in self.rows.iter() {
                dx[*row as usize * width..][..width].fill(0.0);
            }
            Tensor::from_vec(dx, x.shape(), x.device())?
        };
        Ok((Some(dx), d_values))
    }
}

struct Write(Arc<[u32]>);

impl InplaceOp2 for Write {
    fn name(&self) -> &'static str {
        "write-rows"
    }

    fn cpu_fwd(
        &self,
        x: &mut CpuStorage,
        layout: &Layout,
        values: &CpuStorage,
        values_layout: &Layout,
    ) -> Result<()> {
        let (_, width) = layout.shape().dims2()?;
        let Some((start, end)) = layout.contiguous_offsets() else {
            candle_core::bail!("a cache must be contiguous");
        };
        let CpuStorage::F32(x) = x else { candle_core::bail!("a cache on the CPU holds float32") };
        let x = &mut x[start..end];
        for (row, values) in self.0.iter().zip(slice(values, values_layout)?.chunks_exact(width)) {
            x[*row as usize * width..][..width].copy_from_slice(values);
        }
        Ok(())
    }
}
