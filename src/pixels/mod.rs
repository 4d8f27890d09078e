//! Pictures as numbers: 8-bit RGB images, their float form in [0, 1], decoding and resizing.
//!
//! Floats are always in [0, 1]; what a model subtracts and divides by is not known here.

pub mod decode;
mod dicom;
mod dicom_scan;
pub mod gray;
pub mod resize;

use crate::error::{Error, Result};
use candle_core::{DType, Device, Tensor};
use sha2::{Digest, Sha256};

/// An 8-bit RGB image.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct RgbImage8 {
    /// Columns.
    pub width: usize,
    /// Rows.
    pub height: usize,
    /// `3 · width · height` levels, row by row, red, green and blue of a pixel together.
    pub data: Vec<u8>,
}

impl RgbImage8 {
    /// An image from its levels.
    ///
    /// # Errors
    /// A data error when a side is zero or `data` is not `3 · width · height` long.
    pub fn new(width: usize, height: usize, data: Vec<u8>) -> Result<Self> {
        let wanted = width.checked_mul(height).and_then(|pixels| pixels.checked_mul(3));
        if wanted == Some(data.len()) && !data.is_empty() {
            Ok(Self { width, height, data })
        } else {
            Err(Error::data(format!(
                "an image of {width} by {height} pixels cannot have {} levels",
                data.len()
            )))
        }
    }

    /// An image of one colour.
    ///
    /// # Errors
    /// A data error when a side is zero.
    pub fn filled(width: usize, height: usize, colour: [u8; 3]) -> Result<Self> {
        Self::new(width, height, colour.repeat(width * height))
    }

    /// Levels divided by 255, `[3, height, width]`, values in [0, 1].
    ///
    /// # Errors
    /// A tensor error of `device`.
    pub fn to_tensor(&self, device: &Device) -> Result<Tensor> {
        let pixels = self.width * self.height;
        let mut planes = vec![0f32; 3 * pixels];
        for (index, pixel) in self.data.chunks_exact(3).enumerate() {
            for (channel, &level) in pixel.iter().enumerate() {
                planes[channel * pixels + index] = f32::from(level) / 255.0;
            }
        }
        Ok(Tensor::from_vec(planes, (3, self.height, self.width), device)?)
    }

    /// The nearest 8-bit image: values times 255, rounded half up, clamped.
    ///
    /// # Shapes
    /// - `tensor`: `[3, height, width]`, values meant to be in [0, 1]
    ///
    /// # Errors
    /// A non-finite error when a value is not finite; a tensor error for another shape.
    pub fn from_tensor(tensor: &Tensor) -> Result<Self> {
        let (channels, height, width) = tensor.dims3()?;
        if channels != 3 {
            return Err(Error::data(format!("an image has 3 channels, not {channels}")));
        }
        let planes = tensor.to_dtype(DType::F32)?.to_device(&Device::Cpu)?.flatten_all()?.to_vec1::<f32>()?;
        if planes.iter().any(|value| !value.is_finite()) {
            return Err(Error::NonFinite("an image holds a value that is not finite".to_string()));
        }
        let pixels = height * width;
        let data = (0..3 * pixels)
            .map(|index| {
                let value = planes[index % 3 * pixels + index / 3];
                (f64::from(value) * 255.0 + 0.5).floor().clamp(0.0, 255.0) as u8
            })
            .collect();
        Self::new(width, height, data)
    }

    /// SHA-256 of width, height (little-endian 64-bit) and levels, in hexadecimal: the same for the same picture,
    /// whatever file it came from.
    pub fn sha256(&self) -> String {
        let mut hasher = Sha256::new();
        hasher.update((self.width as u64).to_le_bytes());
        hasher.update((self.height as u64).to_le_bytes());
        hasher.update(&self.data);
        format!("{:x}", hasher.finalize())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_level_survives_the_float_form() {
        let data: Vec<u8> = (0..=255).flat_map(|level| [level, 255 - level, level / 2]).collect();
        let image = RgbImage8::new(64, 4, data).unwrap();
        let tensor = image.to_tensor(&Device::Cpu).unwrap();
        assert_eq!(tensor.dims(), [3, 4, 64]);
        assert_eq!(RgbImage8::from_tensor(&tensor).unwrap(), image);
        let green = tensor.get(1).unwrap().get(2).unwrap().get(5).unwrap().to_scalar::<f32>().unwrap();
        assert_eq!(green, (255.0 - 133.0) / 255.0);
    }

    #[test]
    fn rounding_is_half_up_and_clamped_and_nan_is_refused() {
        let of = |value: f32| {
            let tensor = Tensor::new(&[[[value]], [[0.0]], [[0.0]]], &Device::Cpu).unwrap();
            RgbImage8::from_tensor(&tensor).map(|image| image.data[0])
        };
        for (value, level) in
            [(-3.0, 0), (7.0, 255), (0.5, 128), (0.49 / 255.0, 0), (0.51 / 255.0, 1), (254.6 / 255.0, 255)]
        {
            assert_eq!(of(value).unwrap(), level, "{value}");
        }
        for value in [f32::NAN, f32::INFINITY] {
            assert!(matches!(of(value), Err(Error::NonFinite(_))));
        }
    }

    #[test]
    fn sizes_must_fit_and_the_hash_knows_them() {
        assert!(RgbImage8::new(2, 2, vec![0; 11]).is_err());
        assert!(RgbImage8::new(0, 2, vec![]).is_err());
        assert!(RgbImage8::new(usize::MAX, 2, vec![0; 6]).is_err());
        let (wide, tall) =
            (RgbImage8::filled(2, 1, [1, 2, 3]).unwrap(), RgbImage8::filled(1, 2, [1, 2, 3]).unwrap());
        assert_ne!(wide.sha256(), tall.sha256());
        assert_eq!(wide.sha256().len(), 64);
    }
}
