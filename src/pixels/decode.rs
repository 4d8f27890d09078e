//! Image files to 8-bit RGB, with the conventions of Pillow and transformers.
//!
//! The format is told by content, never by the name. Gray is repeated, palettes are looked up, transparency is laid
//! over white. Sixteen-bit gray is *clipped* at 255, as `convert("RGB")` does, unless another [`GrayReading`] is asked
//! for. Sixteen-bit colour keeps its high bytes. EXIF orientation is applied, as transformers' `load_image` does and
//! every viewer shows it. JPEG decoders differ by a level, and by up to four where colour is stored at half resolution. DICOM files
//! are shown as they say.

use super::gray::{self, GrayReading};
use super::{RgbImage8, dicom};
use crate::error::{Error, Result};
use crate::files;
use image::codecs::png::PngEncoder;
use image::metadata::Orientation;
use image::{DynamicImage, ExtendedColorType, ImageDecoder, ImageEncoder, ImageFormat, ImageReader, Limits};
use std::io::Cursor;
use std::path::Path;

/// Most pixels an image may have; Pillow's limit for a decompression bomb.
const MAX_PIXELS: u64 = 178_956_970;

/// Most pixels for each byte of the file: the emptiest picture of one bit a pixel takes more as a PNG.
const MAX_PIXELS_PER_BYTE: u64 = 10_000;

/// A picture, and how its numbers became eight bits.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Decoded {
    /// The picture.
    pub image: RgbImage8,
    /// `8-bit` for what was so already; otherwise what was done, in words.
    pub reading: String,
}

/// Reads and decodes an image file, deep gray as transformers reads it.
///
/// # Errors
/// As [`read_file`].
pub fn decode_file(path: &Path) -> Result<RgbImage8> {
    Ok(read_file(path, GrayReading::default())?.image)
}

/// Reads and decodes an image file.
///
/// # Errors
/// A data error with the path when the content is no supported image, truncated, empty or absurdly large; an I/O
/// error when it cannot be read.
pub fn read_file(path: &Path, reading: GrayReading) -> Result<Decoded> {
    let bytes = files::read(path, "cannot read the image")?;
    read_bytes(&bytes, reading).map_err(|error| match error {
        Error::Data(message) => Error::data(match message.split_once("\n   = help") {
            Some((what, help)) => format!("{what}\n  --> {}\n   = help{help}", path.display()),
            None => format!("{message}\n  --> {}", path.display()),
        }),
        other => other,
    })
}

/// Width and height of an image file as [`read_file`] gives it, from its header alone where the format allows.
///
/// # Errors
/// As [`read_file`], for what the header shows.
pub fn file_size(path: &Path) -> Result<(usize, usize)> {
    let whole = || read_file(path, GrayReading::default()).map(|read| (read.image.width, read.image.height));
    let Ok(reader) = ImageReader::open(path).and_then(ImageReader::with_guessed_format) else {
        return whole();
    };
    let Some(mut decoder) = reader.format().and_then(|_| reader.into_decoder().ok()) else { return whole() };
    let (width, height) = decoder.dimensions();
    let (width, height) = (width as usize, height as usize);
    if width == 0 || height == 0 {
        return whole();
    }
    Ok(match decoder.orientation().unwrap_or(Orientation::NoTransforms) {
        Orientation::Rotate90
        | Orientation::Rotate270
        | Orientation::Rotate90FlipH
        | Orientation::Rotate270FlipH => (height, width),
        _ => (width, height),
    })
}

/// Decodes an image file's content.
///
/// # Errors
/// As [`read_file`], without the path.
pub fn read_bytes(bytes: &[u8], reading: GrayReading) -> Result<Decoded> {
    let damaged = |error: image::ImageError| Error::data(format!("the image cannot be decoded: {error}"));
    if bytes.is_empty() {
        return Err(Error::data("the image file is empty"));
    }
    let max_pixels = MAX_PIXELS.min((bytes.len() as u64 * MAX_PIXELS_PER_BYTE).max(1 << 20));
    if dicom::is_dicom(bytes) {
        return dicom::decode(bytes, reading, max_pixels);
    }
    let format = image::guess_format(bytes).map_err(|_| {
        Error::data(
            "the file is not a known image\n   = help: PNG, JPEG, BMP, TIFF, GIF, WebP, PNM and DICOM are",
        )
    })?;
    if format == ImageFormat::Jpeg && is_truncated_jpeg(bytes) {
        return Err(Error::data("the JPEG file is truncated"));
    }
    let mut reader = ImageReader::with_format(Cursor::new(bytes), format);
    let mut limits = Limits::default();
    // Room for sixteen-bit RGBA at the pixel limit.
    limits.max_alloc = Some(max_pixels * 8);
    reader.limits(limits);
    let mut decoder = reader.into_decoder().map_err(damaged)?;
    let (width, height) = decoder.dimensions();
    if width == 0 || height == 0 {
        return Err(Error::data("the image has no pixels"));
    }
    if u64::from(width) * u64::from(height) > max_pixels {
        return Err(Error::data(format!(
            "the image claims {width} by {height} pixels, more than the {max_pixels} allowed in a file of {} bytes",
            bytes.len()
        )));
    }
    // An orientation that cannot be read is none, as everywhere.
    let orientation = decoder.orientation().unwrap_or(Orientation::NoTransforms);
    let mut image = DynamicImage::from_decoder(decoder).map_err(damaged)?;
    image.apply_orientation(orientation);
    let (width, height) = (image.width() as usize, image.height() as usize);
    let (levels, reading) = rgb_levels(image, reading);
    Ok(Decoded { image: RgbImage8::new(width, height, levels)?, reading })
}

/// Whether the entropy-coded data of the last scan goes on to the end of the file; the decoder would fill up with gray.
fn is_truncated_jpeg(bytes: &[u8]) -> bool {
    let last = |marker: [u8; 2]| bytes.windows(2).rposition(|pair| pair == marker);
    match (last([0xff, 0xda]), last([0xff, 0xd9])) {
        (Some(scan), Some(end)) => end < scan,
        _ => true,
    }
}

/// Levels, and how deep numbers became eight bits.
fn rgb_levels(image: DynamicImage, reading: GrayReading) -> (Vec<u8>, String) {
    let high = |level: u16| (level >> 8) as u8;
    let eight = "8-bit";
    let (levels, said) = match image {
        DynamicImage::ImageRgb8(image) => (image.into_raw(), eight),
        DynamicImage::ImageLuma8(image) => {
            (image.into_raw().into_iter().flat_map(|level| [level; 3]).collect(), eight)
        }
        DynamicImage::ImageLumaA8(image) => {
            (image.pixels().flat_map(|pixel| over_white([pixel.0[0]; 3], pixel.0[1])).collect(), eight)
        }
        DynamicImage::ImageRgba8(image) => {
            let pixels = image.pixels();
            (
                pixels
                    .flat_map(|pixel| over_white([pixel.0[0], pixel.0[1], pixel.0[2]], pixel.0[3]))
                    .collect(),
                eight,
            )
        }
        DynamicImage::ImageLuma16(image) => {
            let (gray, said) = gray::read_gray16(&image.into_raw(), reading);
            return (gray.into_iter().flat_map(|level| [level; 3]).collect(), said);
        }
        DynamicImage::ImageLumaA16(image) => {
            let pixels = image.pixels();
            (
                pixels.flat_map(|pixel| over_white([high(pixel.0[0]); 3], high(pixel.0[1]))).collect(),
                "16-bit, high bytes",
            )
        }
        DynamicImage::ImageRgb16(image) => {
            (image.into_raw().into_iter().map(high).collect(), "16-bit, high bytes")
        }
        DynamicImage::ImageRgba16(image) => {
            let over = |pixel: &image::Rgba<u16>| {
                over_white([high(pixel.0[0]), high(pixel.0[1]), high(pixel.0[2])], high(pixel.0[3]))
            };
            (image.pixels().flat_map(over).collect(), "16-bit, high bytes")
        }
        // Float pictures, from TIFF: clipped like sixteen-bit gray.
        other => {
            let values = other.to_rgb32f().into_raw();
            (values.into_iter().map(|value| value.clamp(0.0, 255.0) as u8).collect(), "float, clipped at 255")
        }
    };
    (levels, said.to_owned())
}

/// `colour` of opacity `alpha` over white, rounded as Pillow's `alpha_composite` does.
fn over_white(colour: [u8; 3], alpha: u8) -> [u8; 3] {
    let alpha = u32::from(alpha);
    colour.map(|level| {
        let sum = ((u32::from(level) * alpha + 255 * (255 - alpha)) << 7) + (0x80 << 7);
        ((((sum >> 8) + sum) >> 8) >> 7) as u8
    })
}

/// The image as a PNG file: lossless, the same bytes for the same image.
///
/// # Errors
/// An unexpected error when the encoder fails.
pub fn encode_png(image: &RgbImage8) -> Result<Vec<u8>> {
    let mut bytes = Vec::new();
    PngEncoder::new(&mut bytes)
        .write_image(&image.data, image.width as u32, image.height as u32, ExtendedColorType::Rgb8)
        .map_err(|error| Error::Other(anyhow::anyhow!("the image cannot be written as PNG: {error}")))?;
    Ok(bytes)
}

#[cfg(test)]
mod tests {
    use super::*;
    use image::{GrayAlphaImage, GrayImage, ImageBuffer, Luma, Rgb, RgbaImage};

    fn written(image: impl Into<DynamicImage>, format: ImageFormat) -> Vec<u8> {
        let mut bytes = Cursor::new(Vec::new());
        image.into().write_to(&mut bytes, format).unwrap();
        bytes.into_inner()
    }

    /// A little-endian EXIF block whose only entry is the orientation.
    fn exif(orientation: u8) -> Vec<u8> {
        let entry = [0x12, 0x01, 3, 0, 1, 0, 0, 0, orientation, 0, 0, 0];
        [&b"II*\0\x08\0\0\0\x01\0"[..], &entry, &[0; 4]].concat()
    }

    #[test]
    fn exif_orientation_turns_the_picture_as_viewers_do() {
        let stored = picture();
        let pixel = |image: &RgbImage8, x: usize, y: usize| {
            let at = 3 * (y * image.width + x);
            [image.data[at], image.data[at + 1], image.data[at + 2]]
        };
        for (orientation, size) in [(1, [9, 7]), (3, [9, 7]), (6, [7, 9]), (8, [7, 9])] {
            let mut bytes = Vec::new();
            let mut encoder = PngEncoder::new(&mut bytes);
            encoder.set_exif_metadata(exif(orientation)).unwrap();
            encoder.write_image(&stored.data, 9, 7, ExtendedColorType::Rgb8).unwrap();
            let shown = decode_bytes(&bytes).unwrap();
            assert_eq!([shown.width, shown.height], size, "{orientation}");
            // Where the stored picture's pixel (2, 1) is shown.
            let (x, y) = match orientation {
                3 => (9 - 1 - 2, 7 - 1 - 1),
                6 => (7 - 1 - 1, 2),
                8 => (1, 9 - 1 - 2),
                _ => (2, 1),
            };
            assert_eq!(pixel(&shown, x, y), pixel(&stored, 2, 1), "{orientation}");
        }
    }

    fn picture() -> RgbImage8 {
        let data = (0..9 * 7 * 3).map(|index| (index * 37 % 256) as u8).collect();
        RgbImage8::new(9, 7, data).unwrap()
    }

    fn decode_bytes(bytes: &[u8]) -> Result<RgbImage8> {
        Ok(read_bytes(bytes, GrayReading::default())?.image)
    }

    fn failure(bytes: &[u8]) -> String {
        let error = decode_bytes(bytes).unwrap_err();
        assert!(matches!(error, Error::Data(_)), "{error}");
        error.to_string()
    }

    #[test]
    fn png_gives_back_every_level_and_the_same_bytes() {
        let image = picture();
        let bytes = encode_png(&image).unwrap();
        assert_eq!(decode_bytes(&bytes).unwrap(), image);
        assert_eq!(encode_png(&image).unwrap(), bytes);
    }

    #[test]
    fn every_format_is_told_by_content_whatever_the_name() {
        let dir = tempfile::tempdir().unwrap();
        let image = picture();
        let rgb = image::RgbImage::from_raw(9, 7, image.data.clone()).unwrap();
        let path = dir.path().join("SCAN.JPG");
        let formats =
            [ImageFormat::Png, ImageFormat::Bmp, ImageFormat::Tiff, ImageFormat::WebP, ImageFormat::Pnm];
        for format in formats {
            std::fs::write(&path, written(rgb.clone(), format)).unwrap();
            assert_eq!(decode_file(&path).unwrap(), image, "{format:?}");
        }
        let smooth = image::RgbImage::from_fn(32, 32, |x, y| Rgb([x as u8 * 4, y as u8 * 4, 90]));
        std::fs::write(&path, written(smooth.clone(), ImageFormat::Jpeg)).unwrap();
        let found = decode_file(&path).unwrap();
        let worst = found.data.iter().zip(smooth.as_raw()).map(|(&a, &b)| a.abs_diff(b)).max();
        assert!(worst < Some(12), "{worst:?}");
    }

    #[test]
    fn gray_is_repeated_and_sixteen_bits_follow_pillow() {
        let gray = GrayImage::from_raw(2, 1, vec![7, 200]).unwrap();
        assert_eq!(decode_bytes(&written(gray, ImageFormat::Png)).unwrap().data, [7, 7, 7, 200, 200, 200]);
        let deep = ImageBuffer::<Luma<u16>, _>::from_raw(3, 1, vec![9u16, 255, 4000]).unwrap();
        let found = decode_bytes(&written(deep, ImageFormat::Png)).unwrap();
        assert_eq!(found.data, [9, 9, 9, 255, 255, 255, 255, 255, 255]);
        let colour = ImageBuffer::<Rgb<u16>, _>::from_raw(1, 1, vec![0x12ffu16, 0x8000, 0xffff]).unwrap();
        assert_eq!(decode_bytes(&written(colour, ImageFormat::Png)).unwrap().data, [0x12, 0x80, 0xff]);
    }

    #[test]
    fn transparency_is_laid_over_white() {
        let rgba = RgbaImage::from_raw(3, 1, vec![10, 20, 30, 255, 10, 20, 30, 0, 0, 100, 200, 128]).unwrap();
        let found = decode_bytes(&written(rgba, ImageFormat::Png)).unwrap();
        // 0·128/255 + 255·127/255 = 127, 100 -> 177.2, 200 -> 227.4
        assert_eq!(found.data, [10, 20, 30, 255, 255, 255, 127, 177, 227]);
        let gray = GrayAlphaImage::from_raw(1, 1, vec![50, 0]).unwrap();
        assert_eq!(decode_bytes(&written(gray, ImageFormat::Png)).unwrap().data, [255; 3]);
        for level in 0..=255u8 {
            for alpha in 0..=255u8 {
                let exact = (f64::from(level) * f64::from(alpha) + 255.0 * f64::from(255 - alpha)) / 255.0;
                assert!((f64::from(over_white([level; 3], alpha)[0]) - exact).abs() <= 0.5 + 1e-9);
            }
        }
    }

    #[test]
    fn what_is_no_image_or_only_part_of_one_is_refused() {
        let png = encode_png(&picture()).unwrap();
        for length in [8, 20, 40, png.len() / 2, png.len() - 20] {
            assert!(failure(&png[..length]).contains("decoded"), "{length}");
        }
        let jpeg =
            written(image::RgbImage::from_fn(64, 64, |x, y| Rgb([(x * y) as u8, 3, 9])), ImageFormat::Jpeg);
        assert!(decode_bytes(&jpeg).is_ok());
        assert!(failure(&jpeg[..jpeg.len() / 2]).contains("truncated"));
        assert!(failure(b"").contains("empty"));
        assert!(failure(b"<html>not found</html>").contains("known image"));
    }

    #[test]
    fn absurd_and_empty_sizes_are_refused_before_decoding() {
        let sized = |width: u32, height: u32| format!("P6\n{width} {height}\n255\n").into_bytes();
        let text = failure(&sized(60_000, 60_000));
        assert!(text.contains("60000"), "{text}");
        decode_bytes(&sized(0, 4)).unwrap_err();
    }

    #[test]
    fn errors_of_files_name_the_path() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("x.png");
        let text = decode_file(&path).unwrap_err().to_string();
        assert!(text.contains("x.png"), "{text}");
        std::fs::write(&path, "nonsense").unwrap();
        let text = decode_file(&path).unwrap_err().to_string();
        assert!(text.contains("x.png\n   = help"), "{text}");
    }
}
