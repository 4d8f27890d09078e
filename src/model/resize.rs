//! The processor's resize as a differentiable operation, so that attacks reach the original image's pixels.
//!
//! Unrounded: the processor itself rounds to eight bits, which is how attacked images are scored in the end.

use crate::nn::kernel::{slice, with_slice};
use crate::pixels::resize::ResizeOperator;
use candle_core::{CpuStorage, CustomOp1, DType, Device, Layout, Result, Shape, Tensor};

/// Resizes each image to `size` (`[height, width]`); images already of that size pass unchanged.
///
/// # Shapes
/// - `pixels`: `[batch, 3, height, width]`
/// - returns: `[batch, 3, size[0], size[1]]`
///
/// # Errors
/// When a size is zero.
pub fn resize(pixels: &Tensor, size: [usize; 2]) -> Result<Tensor> {
    let (_, _, height, width) = pixels.dims4()?;
    if [height, width] == size {
        return Ok(pixels.clone());
    }
    let operator = ResizeOperator::new([height, width], size).map_err(candle_core::Error::wrap)?;
    let on_cpu = pixels.to_device(&Device::Cpu)?.to_dtype(DType::F32)?.contiguous()?;
    let resized = on_cpu.apply_op1(Resize(operator))?;
    resized.to_device(pixels.device())?.to_dtype(pixels.dtype())
}

struct Resize(ResizeOperator);

impl CustomOp1 for Resize {
    fn name(&self) -> &'static str {
        "resize"
    }

    fn cpu_fwd(&self, storage: &CpuStorage, layout: &Layout) -> Result<(CpuStorage, Shape)> {
        let (batch, channels, ..) = layout.shape().dims4()?;
        let [height, width] = self.0.output_size();
        let planes = self.0.apply_clipped(slice(storage, layout)?).map_err(candle_core::Error::wrap)?;
        Ok((CpuStorage::F32(planes), Shape::from((batch, channels, height, width))))
    }

    fn bwd(&self, pixels: &Tensor, _resized: &Tensor, grad: &Tensor) -> Result<Option<Tensor>> {
        let planes = with_slice(grad, |grad| {
            with_slice(pixels, |pixels| self.0.clipped_gradient(pixels, grad))?
                .map_err(candle_core::Error::wrap)
        })??;
        Ok(Some(Tensor::from_vec(planes, pixels.shape(), pixels.device())?))
    }
}
