//! Row selection and placement: token embedding, image features into the text, rows out for the head.

use candle_core::{Result, Tensor};

fn index(rows: &[u32], like: &Tensor) -> Result<Tensor> {
    Tensor::new(rows, like.device())
}

/// Rows `rows` of `x`, in that order; a row may be taken more than once.
///
/// # Shapes
/// - `x`: `[n, width]`
/// - returns: `[rows.len(), width]`
pub fn select(x: &Tensor, rows: &[u32]) -> Result<Tensor> {
    x.index_select(&index(rows, x)?, 0)
}

/// `x` with `values[i]` added to row `rows[i]`; `rows` are distinct.
///
/// # Shapes
/// - `x`: `[n, width]`, `values`: `[rows.len(), width]`
/// - returns: as `x`
pub fn add(x: &Tensor, rows: &[u32], values: &Tensor) -> Result<Tensor> {
    x.index_add(&index(rows, x)?, values, 0)
}

/// `x` with row `rows[i]` replaced by `values[i]`; `rows` are distinct.
///
/// # Shapes
/// - `x`: `[n, width]`, `values`: `[rows.len(), width]`
/// - returns: as `x`
pub fn replace(x: &Tensor, rows: &[u32], values: &Tensor) -> Result<Tensor> {
    let mut keep = vec![1f32; x.dims2()?.0];
    for &row in rows {
        keep[row as usize] = 0.0;
    }
    let keep = Tensor::from_vec(keep, (x.dims2()?.0, 1), x.device())?.to_dtype(x.dtype())?;
    add(&x.broadcast_mul(&keep)?, rows, values)
}
