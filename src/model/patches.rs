//! Pixels in [0, 1] to normalised patches: the only place where normalisation happens.

use crate::nn::kernel::{computed, is_fused, slice, with_slice};
use candle_core::{CpuStorage, CustomOp1, Layout, Result, Shape, Tensor};

/// How pixels become patches.
#[derive(Debug, Clone, PartialEq)]
pub struct Patchify {
    /// Side of a patch in pixels.
    pub patch_size: usize,
    /// Frames in a patch; an image is repeated that often.
    pub temporal_patch_size: usize,
    /// Patches along each side that are merged into one token.
    pub spatial_merge_size: usize,
    /// Mean of each channel, in [0, 1].
    pub mean: [f32; 3],
    /// Standard deviation of each channel, in [0, 1].
    pub std: [f32; 3],
}

impl Patchify {
    /// Normalises and cuts images into patches, in the order of the merged tokens: row by row of merge blocks, and row
    /// by row inside a block.
    ///
    /// # Shapes
    /// - `pixels`: `[batch, 3, height, width]`, in [0, 1], sides multiples of `patch_size · spatial_merge_size`
    /// - returns: `[batch · patches, 3 · temporal_patch_size · patch_size²]`
    ///
    /// # Errors
    /// When the sides do not fit.
    pub fn apply(&self, pixels: &Tensor) -> Result<Tensor> {
        let (batch, channels, height, width) = pixels.dims4()?;
        let block = self.patch_size * self.spatial_merge_size;
        if channels != 3 || !height.is_multiple_of(block) || !width.is_multiple_of(block) {
            candle_core::bail!(
                "an image of {channels}x{height}x{width} cannot be cut into merged patches of {block} pixels"
            );
        }
        if is_fused(pixels) {
            return pixels.contiguous()?.apply_op1(self.clone());
        }
        let (p, m) = (self.patch_size, self.spatial_merge_size);
        let mean =
            Tensor::new(&self.mean, pixels.device())?.reshape((1, 3, 1, 1))?.to_dtype(pixels.dtype())?;
        let std = Tensor::new(&self.std, pixels.device())?.reshape((1, 3, 1, 1))?.to_dtype(pixels.dtype())?;
        let normal = pixels.broadcast_sub(&mean)?.broadcast_div(&std)?;
        let (rows, columns) = (height / block, width / block);
        let patches = normal
            .reshape(vec![batch, 3, rows, m, p, columns, m, p])?
            .permute(vec![0, 2, 5, 3, 6, 1, 4, 7])?
            .reshape((batch * rows * columns * m * m, 3, 1, p * p))?
            .repeat((1, 1, self.temporal_patch_size, 1))?;
        patches.reshape((batch * rows * columns * m * m, 3 * self.temporal_patch_size * p * p))
    }

    /// For patch `index` of an image of `columns` merged blocks a row: its first pixel's row and column.
    fn origin(&self, index: usize, columns: usize) -> (usize, usize) {
        let m = self.spatial_merge_size;
        let (block, inner) = (index / (m * m), index % (m * m));
        let row = block / columns * m + inner / m;
        let column = block % columns * m + inner % m;
        (row * self.patch_size, column * self.patch_size)
    }
}

impl CustomOp1 for Patchify {
    fn name(&self) -> &'static str {
        "patchify"
    }

    fn cpu_fwd(&self, storage: &CpuStorage, layout: &Layout) -> Result<(CpuStorage, Shape)> {
        let (batch, _, height, width) = layout.shape().dims4()?;
        let pixels = slice(storage, layout)?;
        let (p, t) = (self.patch_size, self.temporal_patch_size);
        let patches = height * width / (p * p);
        let len = 3 * t * p * p;
        let columns = width / (p * self.spatial_merge_size);
        let out = computed(batch * patches * len, patches * len, |image, out| {
            for (index, patch) in out.chunks_exact_mut(len).enumerate() {
                let (row, column) = self.origin(index, columns);
                for (c, channel) in patch.chunks_exact_mut(t * p * p).enumerate() {
                    let (first, copies) = channel.split_at_mut(p * p);
                    for (y, line) in first.chunks_exact_mut(p).enumerate() {
                        let start = ((image * 3 + c) * height + row + y) * width + column;
                        for (value, pixel) in line.iter_mut().zip(&pixels[start..start + p]) {
                            *value = (pixel - self.mean[c]) / self.std[c];
                        }
                    }
                    for copy in copies.chunks_exact_mut(p * p) {
                        copy.copy_from_slice(first);
                    }
                }
            }
        });
        Ok((CpuStorage::F32(out), Shape::from((batch * patches, len))))
    }

    fn bwd(&self, pixels: &Tensor, _patches: &Tensor, grad: &Tensor) -> Result<Option<Tensor>> {
        let (batch, _, height, width) = pixels.dims4()?;
        let (p, t) = (self.patch_size, self.temporal_patch_size);
        let patches = height * width / (p * p);
        let len = 3 * t * p * p;
        let columns = width / (p * self.spatial_merge_size);
        let image_len = 3 * height * width;
        let dx = with_slice(grad, |grad| {
            computed(batch * image_len, image_len, |image, dx| {
                let grads = grad[image * patches * len..(image + 1) * patches * len].chunks_exact(len);
                for (index, patch) in grads.enumerate() {
                    let (row, column) = self.origin(index, columns);
                    for (c, channel) in patch.chunks_exact(t * p * p).enumerate() {
                        for y in 0..p {
                            let start = (c * height + row + y) * width + column;
                            for (x, value) in dx[start..start + p].iter_mut().enumerate() {
                                let frames = (0..t).map(|frame| channel[frame * p * p + y * p + x]);
                                *value = frames.sum::<f32>() / self.std[c];
                            }
                        }
                    }
                }
            })
        })?;
        Ok(Some(Tensor::from_vec(dx, pixels.shape(), pixels.device())?))
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::rng;
    use candle_core::{Device, Var};

    #[test]
    fn fused_patches_equal_the_composition_with_gradients() {
        let patchify = Patchify {
            patch_size: 4,
            temporal_patch_size: 2,
            spatial_merge_size: 2,
            mean: [0.4, 0.5, 0.3],
            std: [0.2, 0.3, 0.25],
        };
        let mut values = vec![0f32; 2 * 3 * 16 * 24];
        rng::fill_standard_normal(&mut rng::stream(1, "patches", &[]), &mut values);
        let pixels = Tensor::from_vec(values, (2, 3, 16, 24), &Device::Cpu).unwrap();
        // Double precision takes the composed path.
        let single = Var::from_tensor(&pixels).unwrap();
        let double = Var::from_tensor(&pixels.to_dtype(candle_core::DType::F64).unwrap()).unwrap();
        let (ours, theirs) = (patchify.apply(&single).unwrap(), patchify.apply(&double).unwrap());
        let list = |t: &Tensor| -> Vec<f64> {
            t.to_dtype(candle_core::DType::F64).unwrap().flatten_all().unwrap().to_vec1().unwrap()
        };
        let close = |a: &Tensor, b: &Tensor| {
            assert_eq!(a.dims(), b.dims());
            assert!(list(a).iter().zip(list(b)).all(|(a, b)| (a - b).abs() < 1e-5 * b.abs().max(1.0)));
        };
        close(&ours, &theirs);
        let loss = |t: &Tensor| (t * t).unwrap().sum_all().unwrap().backward().unwrap();
        close(loss(&ours).get(&single).unwrap(), loss(&theirs).get(&double).unwrap());
        assert!(patchify.apply(&pixels.narrow(3, 0, 20).unwrap()).is_err());
    }
}
