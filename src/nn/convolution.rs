//! Convolution over images whose pixels stand as rows, `[batch · height · width, channels]`.

use super::kernel::{computed, is_fused, slice, with_slice};
use super::linear::Linear;
use super::plain;
use candle_core::{CpuStorage, CustomOp1, Layout, Result, Shape, Tensor};

/// Images of one size whose pixels stand as rows, row by row.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Planes {
    /// Images.
    pub batch: usize,
    /// Rows of pixels in an image.
    pub height: usize,
    /// Pixels in a row.
    pub width: usize,
}

impl Planes {
    fn rows(self) -> usize {
        self.batch * self.height * self.width
    }

    /// The row that stands at offset `k` (of the nine, row by row) from pixel (`y`, `x`) of `image`; none outside.
    fn neighbour(self, image: usize, y: usize, x: usize, k: usize) -> Option<usize> {
        let (y, x) = ((y + k / 3).checked_sub(1)?, (x + k % 3).checked_sub(1)?);
        (y < self.height && x < self.width).then(|| (image * self.height + y) * self.width + x)
    }
}

/// Each pixel's neighbourhood of 3 x 3, zeros outside the image: column `9 · channel + k` is offset `k`, row by row.
///
/// # Shapes
/// - `x`: `[batch · height · width, channels]`
/// - returns: `[batch · height · width, 9 · channels]`
///
/// # Errors
/// When the rows are not those of `planes`.
pub fn neighbourhoods(x: &Tensor, planes: Planes) -> Result<Tensor> {
    let (rows, _) = x.dims2()?;
    if rows != planes.rows() {
        candle_core::bail!("{rows} rows are not the pixels of {planes:?}");
    }
    if !is_fused(x) {
        return plain::neighbourhoods(x, planes);
    }
    x.contiguous()?.apply_op1(Neighbourhoods(planes))
}

/// A convolution of 3 x 3 that keeps the size. `layer` is a PyTorch `Conv2d` weight `[out, channels, 3, 3]`, flattened to
/// `[out, 9 · channels]`.
///
/// # Shapes
/// - `x`: `[batch · height · width, channels]`
/// - returns: `[batch · height · width, out]`
///
/// # Errors
/// As [`neighbourhoods`]; when the layer takes another number of channels.
pub fn convolve(x: &Tensor, planes: Planes, layer: &Linear) -> Result<Tensor> {
    layer.forward(&neighbourhoods(x, planes)?)
}

struct Neighbourhoods(Planes);

impl CustomOp1 for Neighbourhoods {
    fn name(&self) -> &'static str {
        "neighbourhoods"
    }

    fn cpu_fwd(&self, x: &CpuStorage, layout: &Layout) -> Result<(CpuStorage, Shape)> {
        let (rows, channels) = layout.shape().dims2()?;
        let (x, planes) = (slice(x, layout)?, self.0);
        let line = 9 * channels * planes.width;
        let y = computed(rows * 9 * channels, line.max(1), |chunk, out| {
            let (image, row) = (chunk / planes.height, chunk % planes.height);
            for (column, out) in out.chunks_exact_mut(9 * channels).enumerate() {
                for k in 0..9 {
                    let values = planes.neighbour(image, row, column, k).map(|at| &x[at * channels..]);
                    for channel in 0..channels {
                        out[9 * channel + k] = values.map_or(0.0, |values| values[channel]);
                    }
                }
            }
        });
        Ok((CpuStorage::F32(y), Shape::from((rows, 9 * channels))))
    }

    fn bwd(&self, x: &Tensor, _y: &Tensor, grad: &Tensor) -> Result<Option<Tensor>> {
        let (rows, channels) = x.dims2()?;
        let planes = self.0;
        let dx = with_slice(grad, |grad| {
            computed(rows * channels, (channels * planes.width).max(1), |chunk, dx| {
                let (image, row) = (chunk / planes.height, chunk % planes.height);
                for (column, dx) in dx.chunks_exact_mut(channels).enumerate() {
                    dx.fill(0.0);
                    for k in 0..9 {
                        // Who sees this pixel at offset k stands at the opposite offset.
                        let Some(at) = planes.neighbour(image, row, column, 8 - k) else { continue };
                        let grad = &grad[at * 9 * channels..][..9 * channels];
                        for (dx, grad) in dx.iter_mut().zip(grad.chunks_exact(9)) {
                            *dx += grad[k];
                        }
                    }
                }
            })
        })?;
        Ok(Some(Tensor::from_vec(dx, x.shape(), x.device())?))
    }
}
