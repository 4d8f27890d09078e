//! DICOM files to 8-bit RGB: what a viewer shows first.
//!
//! The data set and its compressed pixel data are read by dicom-rs. Here: stored values from their bits, rescaled to
//! the modality's units, through the file's window or table to gray, inverted for `MONOCHROME1`; palettes and
//! luminance-chrominance colour. Of several frames the first is read; overlays are not drawn.

use super::decode::Decoded;
use super::gray::{Curve, GrayReading, GrayRule, Window, extremes, level, stretched};
use super::{RgbImage8, dicom_scan};
use crate::error::{Error, Result};
use crate::files;
use dicom_object::file::ReadPreamble;
use dicom_object::{DefaultDicomObject, OpenFileOptions, Tag};
use dicom_pixeldata::{
    DecodedPixelData, PhotometricInterpretation, PixelDecoder, PixelRepresentation, PlanarConfiguration,
    VoiLutFunction,
};
use std::io::Cursor;

const ROWS: Tag = Tag(0x0028, 0x0010);
const COLUMNS: Tag = Tag(0x0028, 0x0011);
const SAMPLES: Tag = Tag(0x0028, 0x0002);
const FRAMES: Tag = Tag(0x0028, 0x0008);
const PADDING: Tag = Tag(0x0028, 0x0120);
const PALETTE_DESCRIPTORS: [Tag; 3] = [Tag(0x0028, 0x1101), Tag(0x0028, 0x1102), Tag(0x0028, 0x1103)];
const PALETTE_TABLES: [Tag; 3] = [Tag(0x0028, 0x1201), Tag(0x0028, 0x1202), Tag(0x0028, 0x1203)];
const PIXEL_DATA: Tag = Tag(0x7fe0, 0x0010);

/// Run-length encoding, which keeps the colour space of what it encodes.
const RLE: &str = "1.2.840.10008.1.2.5";

/// Whether a file's content begins as DICOM files do.
pub(super) fn is_dicom(bytes: &[u8]) -> bool {
    bytes.get(128..132) == Some(b"DICM")
}

/// Decodes a DICOM file's content; no picture may have more than `max_pixels`.
///
/// # Errors
/// A data error when the file holds no picture, is damaged or truncated, or is compressed in a way that is not read.
pub(super) fn decode(bytes: &[u8], reading: GrayReading, max_pixels: u64) -> Result<Decoded> {
    let damaged = |error: String| Error::data(format!("the DICOM file cannot be decoded: {error}"));
    // Decoders of third parties read files of strangers here: whatever goes wrong in them is the file's fault.
    let result = files::guarded(|| -> Result<Decoded> {
        dicom_scan::check(bytes).map_err(|why| damaged(why.to_owned()))?;
        let object = OpenFileOptions::new()
            .read_preamble(ReadPreamble::Always)
            .from_reader(Cursor::new(bytes))
            .map_err(|error| damaged(chain(&error)))?;
        let stored = Stored::read(&object, max_pixels)?;
        stored.show(&object, reading)
    });
    result.unwrap_or_else(|| Err(damaged("its pixel data are damaged".to_owned())))
}

/// An error with its causes.
fn chain(error: &dyn std::error::Error) -> String {
    let mut text = error.to_string();
    let mut cause = error.source();
    while let Some(inner) = cause {
        let more = inner.to_string();
        if !text.contains(&more) {
            text = format!("{text}: {more}");
        }
        cause = inner.source();
    }
    text
}

/// The first number of an element.
fn number(object: &DefaultDicomObject, tag: Tag) -> Option<f64> {
    object.element(tag).ok()?.to_multi_float64().ok()?.first().copied()
}

/// Pixels as the file stores them, without meaning.
#[derive(Debug)]
struct Stored<'a> {
    width: usize,
    height: usize,
    samples: usize,
    /// Row by row, the samples of a pixel together.
    values: Vec<i32>,
    data: DecodedPixelData<'a>,
}

impl<'a> Stored<'a> {
    fn read(object: &'a DefaultDicomObject, max_pixels: u64) -> Result<Self> {
        let count = |tag: Tag, what: &str| -> Result<usize> {
            let value = number(object, tag).ok_or_else(|| {
                Error::data(format!(
                    "the DICOM file holds no picture: it has no {what}\n   = help: reports, structures and plans are no images"
                ))
            })?;
            Ok(value as usize)
        };
        let (height, width) = (count(ROWS, "rows")?, count(COLUMNS, "columns")?);
        let samples = number(object, SAMPLES).unwrap_or(1.0) as usize;
        if object.element(PIXEL_DATA).is_err() {
            return Err(Error::data("the DICOM file holds no picture: it has no pixel data"));
        }
        if height == 0 || width == 0 {
            return Err(Error::data("the image has no pixels"));
        }
        if (height as u64).saturating_mul(width as u64) > max_pixels {
            return Err(Error::data(format!(
                "the image claims {width} by {height} pixels, more than the {max_pixels} allowed"
            )));
        }
        check_codestream(object, [height, width])?;
        let data = object.decode_pixel_data_frame(0).map_err(|error| refused(object, &error))?;
        let bytes = data.data();
        let width_of_sample = usize::from(data.bits_allocated().div_ceil(8));
        let is_expanded = data.bits_allocated() == 1;
        let step = if is_expanded { 1 } else { width_of_sample };
        if !matches!(step, 1 | 2 | 4) || !matches!(samples, 1 | 3) {
            return Err(Error::data(format!(
                "DICOM pixels of {samples} samples of {} bits are not read",
                data.bits_allocated()
            )));
        }
        let wanted = height * width * samples;
        if bytes.len() < wanted * step {
            return Err(Error::data(format!(
                "the DICOM file is truncated: {} bytes of pixel data where {} are promised",
                bytes.len(),
                wanted * step
            )));
        }
        let is_signed = data.pixel_representation() == PixelRepresentation::Signed;
        let bits = if is_expanded { 8 } else { u32::from(data.bits_stored()).clamp(1, 8 * step as u32) };
        let high =
            if is_expanded { 7 } else { u32::from(data.high_bit()).clamp(bits - 1, 8 * step as u32 - 1) };
        let values = bytes
            .chunks_exact(step)
            .take(wanted)
            .map(|bytes| {
                let mut word = [0u8; 4];
                word[..step].copy_from_slice(bytes);
                // The sample's bits to the top, then down with or without their sign.
                let top = u32::from_le_bytes(word) << (31 - high);
                if is_signed { top.cast_signed() >> (32 - bits) } else { (top >> (32 - bits)).cast_signed() }
            })
            .collect();
        Ok(Self { width, height, samples, values, data })
    }

    fn show(&self, object: &DefaultDicomObject, reading: GrayReading) -> Result<Decoded> {
        let frames = match number(object, FRAMES) {
            Some(count) if count > 1.0 => format!(", frame 1 of {count}"),
            _ => String::new(),
        };
        let (levels, said) = match self.data.photometric_interpretation() {
            PhotometricInterpretation::Monochrome1 | PhotometricInterpretation::Monochrome2
                if self.samples == 1 =>
            {
                self.gray(object, reading)?
            }
            PhotometricInterpretation::PaletteColor if self.samples == 1 => {
                (self.palette(object)?, "palette".to_owned())
            }
            _ if self.samples == 3 => (self.colour(object)?, "colour".to_owned()),
            other => {
                return Err(Error::data(format!(
                    "DICOM pictures of {} samples of kind {} are not read",
                    self.samples,
                    other.as_str()
                )));
            }
        };
        let image = RgbImage8::new(self.width, self.height, levels)?;
        Ok(Decoded { image, reading: format!("DICOM, {said}{frames}") })
    }

    /// Gray by the window asked for, else by the file's own table or window, else from least to largest.
    fn gray(&self, object: &DefaultDicomObject, reading: GrayReading) -> Result<(Vec<u8>, String)> {
        let failed =
            |error: dicom_pixeldata::Error| Error::data(format!("the DICOM file is damaged: {error}"));
        let rescale = self.data.rescale().map_err(failed)?.first().copied();
        let rescaled =
            |value: i32| rescale.map_or(f64::from(value), |rescale| rescale.apply(f64::from(value)));
        let numbers = || self.values.iter().map(|&value| rescaled(value));
        let windowed = |window: Window, curve: Curve| -> Vec<u8> {
            numbers().map(|value| level(window.apply(curve, value))).collect()
        };
        let table = self.data.voi_lut_sequence().map_err(failed)?.and_then(<[_]>::first);
        let own = self.data.window().map_err(failed)?.and_then(<[_]>::first);
        let curve = match self.data.voi_lut_function().map_err(failed)?.and_then(<[_]>::first) {
            Some(VoiLutFunction::LinearExact) => Curve::LinearExact,
            Some(VoiLutFunction::Sigmoid) => Curve::Sigmoid,
            _ => Curve::Linear,
        };
        let bits = self.data.bits_stored();
        let (mut levels, said) = if let Some(window) = reading.window {
            (windowed(window, Curve::Linear), format!("window {window}"))
        } else if reading.rule == GrayRule::FullRange {
            let is_signed = self.data.pixel_representation() == PixelRepresentation::Signed;
            let low = if is_signed { -(1i64 << (bits.max(1) - 1)) } else { 0 };
            let ends = [low, low + (1i64 << bits) - 1].map(|value| rescaled(value as i32));
            let (low, high) = (ends[0].min(ends[1]), ends[0].max(ends[1]));
            (stretched(numbers(), low, high), format!("range {low} to {high}"))
        } else if let (GrayRule::AsStored, Some(table)) = (reading.rule, table) {
            let white = f64::from((1u32 << table.bits_stored.clamp(1, 16)) - 1);
            let last = table.data.len().saturating_sub(1) as f64;
            let share = |value: f64| {
                let place = (value - f64::from(table.min_pixel_value)).clamp(0.0, last) as usize;
                f64::from(table.data.get(place).copied().unwrap_or(0)) / white
            };
            (numbers().map(|value| level(share(value))).collect(), "its table".to_owned())
        } else if let (GrayRule::AsStored, Some(own)) = (reading.rule, own) {
            let window = Window { center: own.center, width: own.width.max(1.0) };
            (windowed(window, curve), format!("its window {window}"))
        } else if bits <= 8
            && rescale.is_none_or(|rescale| rescale.apply(1.0) == 1.0 && rescale.apply(0.0) == 0.0)
        {
            (self.values.iter().map(|&value| value.clamp(0, 255) as u8).collect(), "8-bit".to_owned())
        } else {
            let padding = number(object, PADDING).map(|value| value as i32);
            let shown = self.values.iter().filter(|&&value| Some(value) != padding);
            let (low, high) = extremes(shown.map(|&value| rescaled(value)));
            (stretched(numbers(), low, high), format!("range {low} to {high}"))
        };
        if *self.data.photometric_interpretation() == PhotometricInterpretation::Monochrome1 {
            for level in &mut levels {
                *level = 255 - *level;
            }
        }
        Ok((levels.into_iter().flat_map(|level| [level; 3]).collect(), said))
    }

    /// Colours by the file's tables (PS3.3, C.7.6.3.1.5).
    fn palette(&self, object: &DefaultDicomObject) -> Result<Vec<u8>> {
        let wrong = || Error::data("the DICOM file's palette is missing, segmented or damaged");
        let mut levels = vec![0; self.values.len() * 3];
        for (channel, (descriptor, table)) in PALETTE_DESCRIPTORS.into_iter().zip(PALETTE_TABLES).enumerate()
        {
            let descriptor = object.element(descriptor).map_err(|_| wrong())?;
            let descriptor: Vec<i32> = descriptor.to_multi_int().map_err(|_| wrong())?;
            let &[entries, first, bits] = descriptor.as_slice() else { return Err(wrong()) };
            let entries = if entries == 0 { 65536 } else { entries as usize & 0xffff };
            let bytes = object.element(table).map_err(|_| wrong())?.to_bytes().map_err(|_| wrong())?;
            let table: Vec<u8> = if bytes.len() >= 2 * entries {
                let words: Vec<u16> =
                    bytes.chunks_exact(2).map(|b| u16::from_le_bytes([b[0], b[1]])).collect();
                // Some writers claim sixteen bits and use eight.
                let is_deep = bits > 8 && words.iter().any(|&word| word > 255);
                words.into_iter().map(|word| (if is_deep { word >> 8 } else { word }) as u8).collect()
            } else {
                bytes.into_owned()
            };
            if table.is_empty() {
                return Err(wrong());
            }
            let last = table.len().min(entries) - 1;
            for (value, pixel) in self.values.iter().zip(levels.chunks_exact_mut(3)) {
                let place = (i64::from(*value) - i64::from(first)).clamp(0, last as i64);
                pixel[channel] = table[place as usize];
            }
        }
        Ok(levels)
    }

    /// Three samples as red, green and blue.
    fn colour(&self, object: &DefaultDicomObject) -> Result<Vec<u8>> {
        let bits = u32::from(self.data.bits_stored()).clamp(1, 16);
        let eight = |value: i32| {
            if bits <= 8 { value.clamp(0, 255) as u8 } else { (value >> (bits - 8)).clamp(0, 255) as u8 }
        };
        let plane = self.width * self.height;
        let mut levels: Vec<u8> = match self.data.planar_configuration() {
            PlanarConfiguration::PixelFirst => {
                (0..3 * plane).map(|at| eight(self.values[at % 3 * plane + at / 3])).collect()
            }
            PlanarConfiguration::Standard => self.values.iter().map(|&value| eight(value)).collect(),
        };
        // What JPEG and JPEG 2000 decode to is red, green and blue already; others keep what the file names.
        let syntax = object.meta().transfer_syntax().trim_end_matches(['\0', ' ']).to_owned();
        let is_encoded =
            self.data.photometric_interpretation() == &PhotometricInterpretation::Rgb && syntax != RLE;
        let named = object
            .element(Tag(0x0028, 0x0004))
            .ok()
            .and_then(|element| element.to_str().ok().map(|text| text.trim().to_owned()))
            .unwrap_or_default();
        match named.as_str() {
            "YBR_FULL" if !is_encoded => {
                for pixel in levels.chunks_exact_mut(3) {
                    let [y, blue, red] = [pixel[0], pixel[1], pixel[2]].map(f64::from);
                    let (blue, red) = (blue - 128.0, red - 128.0);
                    let rgb = [y + 1.402 * red, y - 0.344_136 * blue - 0.714_136 * red, y + 1.772 * blue];
                    pixel.copy_from_slice(&rgb.map(|value| level(value / 255.0)));
                }
            }
            "RGB" | "YBR_FULL" => {}
            _ if is_encoded => {}
            other => return Err(Error::data(format!("DICOM colour of kind {other} is not read"))),
        }
        Ok(levels)
    }
}

/// Refuses compressed pixel data whose own size is not the data set's: a decoder would make room for whatever it claims.
fn check_codestream(object: &DefaultDicomObject, size: [usize; 2]) -> Result<()> {
    let Some(fragment) =
        object.element(PIXEL_DATA).ok().and_then(|element| element.value().fragments()?.first().cloned())
    else {
        return Ok(());
    };
    match codestream_size(&fragment) {
        Some(found) if found != size => Err(Error::data(format!(
            "the DICOM file is damaged: {} by {} pixels inside, {} by {} promised",
            found[1], found[0], size[1], size[0]
        ))),
        _ => Ok(()),
    }
}

/// Height and width that a JPEG or JPEG 2000 stream claims.
fn codestream_size(bytes: &[u8]) -> Option<[usize; 2]> {
    let word = |at: usize| Some(usize::from(u16::from_be_bytes([*bytes.get(at)?, *bytes.get(at + 1)?])));
    let long = |at: usize| Some((word(at)? << 16) + word(at + 2)?);
    if bytes.starts_with(&[0xff, 0x4f, 0xff, 0x51]) {
        // SIZ: length, capabilities, then the grid's right and lower end, then its left and upper one.
        return Some([long(12)?.checked_sub(long(20)?)?, long(8)?.checked_sub(long(16)?)?]);
    }
    if !bytes.starts_with(&[0xff, 0xd8]) {
        return None;
    }
    let mut at = 2;
    loop {
        let marker = word(at)?;
        match marker {
            0xffff => at += 1,
            // Start of frame, but not the tables that share its range.
            0xffc0..=0xffcf if !matches!(marker, 0xffc4 | 0xffc8 | 0xffcc) => {
                return Some([word(at + 5)?, word(at + 7)?]);
            }
            0xff01..=0xfffe => at += 2 + word(at + 2)?,
            _ => return None,
        }
    }
}

/// What a decoder refused, with what the file is compressed as.
fn refused(object: &DefaultDicomObject, error: &dicom_pixeldata::Error) -> Error {
    let syntax = object.meta().transfer_syntax().trim_end_matches(['\0', ' ']).to_owned();
    let name = match syntax.as_str() {
        "1.2.840.10008.1.2" | "1.2.840.10008.1.2.1" | "1.2.840.10008.1.2.2" => "uncompressed",
        "1.2.840.10008.1.2.1.99" => "deflated",
        "1.2.840.10008.1.2.4.50" => "JPEG baseline",
        "1.2.840.10008.1.2.4.51" => "JPEG extended",
        "1.2.840.10008.1.2.4.57" | "1.2.840.10008.1.2.4.70" => "JPEG lossless",
        "1.2.840.10008.1.2.4.80" | "1.2.840.10008.1.2.4.81" => "JPEG-LS",
        "1.2.840.10008.1.2.4.90" | "1.2.840.10008.1.2.4.91" => "JPEG 2000",
        "1.2.840.10008.1.2.4.110" | "1.2.840.10008.1.2.4.111" | "1.2.840.10008.1.2.4.112" => "JPEG XL",
        RLE => "run-length encoded",
        _ => "of an unknown kind",
    };
    Error::data(format!(
        "the DICOM file's pixel data ({name}, {syntax}) cannot be decoded: {}\n   = help: uncompressed, deflated, RLE, 8-bit JPEG, lossless JPEG and JPEG 2000 are read; convert others, or export the window you want as an 8-bit PNG",
        chain(error)
    ))
}

#[cfg(test)]
#[path = "dicom_tests.rs"]
mod tests;
