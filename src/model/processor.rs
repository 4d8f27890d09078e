//! What a checkpoint does to a picture before its vision tower sees it: how large it becomes, how it is cut into
//! patches, and what is subtracted and divided.
//!
//! Read from `processor_config.json` or `preprocessor_config.json` in any of their forms. The differentiable version
//! of the same steps is built elsewhere from [`ImageProcessorConfig`] and `pixels::resize`; [`ImageProcessorConfig::pixel_values`] is the
//! plain reference that it is checked against.

use super::positions::Grid;
use super::tokenizer::{optional_json, write_json};
use crate::error::{Error, Result};
use crate::pixels::RgbImage8;
use crate::pixels::resize::resize_u8;
use serde_json::{Map, Value, json};
use std::path::Path;

/// Pillow's number for bicubic interpolation.
const BICUBIC: u64 = 3;

/// Largest ratio of an image's sides.
const MAX_ASPECT_RATIO: f64 = 200.0;

/// How pictures are prepared.
#[derive(Debug, Clone, PartialEq)]
pub struct ImageProcessorConfig {
    /// Fewest pixels after resizing.
    pub min_pixels: usize,
    /// Most pixels after resizing.
    pub max_pixels: usize,
    /// Side of a patch in pixels.
    pub patch_size: usize,
    /// Side, in patches, of the block that becomes one token.
    pub merge_size: usize,
    /// Frames per patch; a picture is repeated.
    pub temporal_patch_size: usize,
    /// Subtracted from values in [0, 1], per channel.
    pub image_mean: [f32; 3],
    /// Divides the difference, per channel.
    pub image_std: [f32; 3],
    /// Factor from 8-bit levels to values, 1/255 as a rule.
    pub rescale_factor: f64,
    /// Whether pictures are resized; if not, their sides must already fit.
    pub do_resize: bool,
}

impl Default for ImageProcessorConfig {
    /// transformers' defaults of `Qwen2VLImageProcessor`.
    fn default() -> Self {
        Self {
            min_pixels: 56 * 56,
            max_pixels: 28 * 28 * 1280,
            patch_size: 14,
            merge_size: 2,
            temporal_patch_size: 2,
            image_mean: [0.481_454_66, 0.457_827_5, 0.408_210_73],
            image_std: [0.268_629_54, 0.261_302_6, 0.275_777_1],
            rescale_factor: 1.0 / 255.0,
            do_resize: true,
        }
    }
}

/// A picture at the model's size.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct ProcessedImage {
    /// The resized 8-bit picture.
    pub resized: RgbImage8,
    /// `[1, rows, columns]` in patches.
    pub grid: Grid,
}

impl ImageProcessorConfig {
    /// Reads the image processor of `dir`: `processor_config.json` when it holds one, else `preprocessor_config.json`.
    ///
    /// # Errors
    /// A data error when there is none, or it asks for something unsupported.
    pub fn load(dir: &Path) -> Result<Self> {
        let whole = optional_json(&dir.join("processor_config.json"))?;
        let (name, value) = match whole.get("image_processor") {
            Some(value) if value.is_object() => ("processor_config.json", value.clone()),
            _ => ("preprocessor_config.json", optional_json(&dir.join("preprocessor_config.json"))?),
        };
        if value.is_null() {
            return Err(Error::data(format!(
                "no preprocessor_config.json\n  --> {}\n   = help: the checkpoint must say how pictures are resized",
                dir.display()
            )));
        }
        Self::from_json(&value).map_err(|error| match error {
            Error::Data(message) => Error::data(format!("{message}\n  --> {}", dir.join(name).display())),
            other => other,
        })
    }

    /// Reads the contents of a `preprocessor_config.json`, of whichever age.
    ///
    /// # Errors
    /// A data error that names the key.
    pub fn from_json(value: &Value) -> Result<Self> {
        let values =
            value.as_object().ok_or_else(|| Error::data("the image processor must be a JSON object"))?;
        let default = Self::default();
        let empty = Map::new();
        let size = values.get("size").and_then(Value::as_object).unwrap_or(&empty);
        let limit = |newer: &str, older: &str, default: usize| -> Result<usize> {
            // The oldest notation wins where both stand, as in transformers.
            let value = [values.get(older), size.get(newer), size.get(older)]
                .into_iter()
                .flatten()
                .find(|v| !v.is_null());
            value.map_or(Ok(default), |value| whole_number(older, value))
        };
        let count = |key: &str, default: usize| {
            values.get(key).filter(|v| !v.is_null()).map_or(Ok(default), |value| whole_number(key, value))
        };
        let flag = |key: &str| values.get(key).and_then(Value::as_bool).unwrap_or(true);
        let resample = values.get("resample").and_then(Value::as_u64).unwrap_or(BICUBIC);
        if resample != BICUBIC {
            return Err(Error::data(format!(
                "`resample` is {resample}; only {BICUBIC} (bicubic) is supported"
            )));
        }
        let (image_mean, image_std) = if flag("do_normalize") {
            (three(values, "image_mean", default.image_mean)?, three(values, "image_std", default.image_std)?)
        } else {
            ([0.0; 3], [1.0; 3])
        };
        let config = Self {
            min_pixels: limit("shortest_edge", "min_pixels", default.min_pixels)?,
            max_pixels: limit("longest_edge", "max_pixels", default.max_pixels)?,
            patch_size: count("patch_size", default.patch_size)?,
            merge_size: count("merge_size", default.merge_size)?,
            temporal_patch_size: count("temporal_patch_size", default.temporal_patch_size)?,
            image_mean,
            image_std,
            rescale_factor: if flag("do_rescale") {
                values.get("rescale_factor").and_then(Value::as_f64).unwrap_or(default.rescale_factor)
            } else {
                1.0
            },
            do_resize: flag("do_resize"),
        };
        config.check()?;
        Ok(config)
    }

    /// Checks that the numbers make sense.
    ///
    /// # Errors
    /// A data error that names the rule.
    pub fn check(&self) -> Result<()> {
        let small = |size: usize, most: usize| (1..=most).contains(&size);
        let rules = [
            (small(self.patch_size, 256), "`patch_size` must be between 1 and 256"),
            (small(self.merge_size, 16), "`merge_size` must be between 1 and 16"),
            (small(self.temporal_patch_size, 16), "`temporal_patch_size` must be between 1 and 16"),
            (
                self.patch_size.saturating_mul(self.merge_size) <= 512,
                "`patch_size` times `merge_size` must be 512 at most",
            ),
            (
                (1..=1 << 24).contains(&self.min_pixels),
                "`min_pixels` must be between 1 and 2^24: pictures are blown up to it",
            ),
            (self.min_pixels <= self.max_pixels, "`min_pixels` must not exceed `max_pixels`"),
            (self.max_pixels <= 1 << 30, "`max_pixels` is absurdly large"),
            (
                self.image_std.iter().all(|std| (1e-6..=1e6).contains(std))
                    && self.image_mean.iter().all(|mean| mean.abs() <= 1e6),
                "`image_std` must be between 1e-6 and 1e6, `image_mean` within 1e6 of 0",
            ),
            ((1e-9..=1e9).contains(&self.rescale_factor), "`rescale_factor` must be between 1e-9 and 1e9"),
        ];
        match rules.iter().find(|(holds, _)| !holds) {
            Some((_, rule)) => Err(Error::data(format!("the image processor's {rule}"))),
            None => Ok(()),
        }
    }

    /// This configuration as a `preprocessor_config.json` that transformers loads.
    pub fn to_json(&self) -> Value {
        // The shortest decimal that gives the same float32 reads better than the float32's own digits.
        let plain = |values: [f32; 3]| {
            values.map(|value| value.to_string().parse::<f64>().unwrap_or(f64::from(value)))
        };
        json!({
            "do_convert_rgb": true,
            "do_normalize": true,
            "do_rescale": true,
            "do_resize": self.do_resize,
            "image_mean": plain(self.image_mean),
            "image_processor_type": "Qwen2VLImageProcessor",
            "image_std": plain(self.image_std),
            "merge_size": self.merge_size,
            "patch_size": self.patch_size,
            "resample": BICUBIC,
            "rescale_factor": self.rescale_factor,
            "size": {"longest_edge": self.max_pixels, "shortest_edge": self.min_pixels},
            "temporal_patch_size": self.temporal_patch_size,
        })
    }

    /// Writes what transformers' `AutoProcessor` needs beside the tokenizer: `preprocessor_config.json`,
    /// `processor_config.json` and `chat_template.jinja`, for a model of `model_type`.
    ///
    /// # Errors
    /// An I/O error.
    pub fn save(&self, dir: &Path, model_type: &str, chat_template: &str) -> Result<()> {
        let (class, video) = match model_type {
            "qwen2_vl" => ("Qwen2VLProcessor", "Qwen2VLVideoProcessor"),
            "qwen2_5_vl" => ("Qwen2_5_VLProcessor", "Qwen2VLVideoProcessor"),
            _ => ("Qwen3VLProcessor", "Qwen3VLVideoProcessor"),
        };
        let mut image_processor = self.to_json();
        let mut video_processor = self.to_json();
        if let Some(values) = video_processor.as_object_mut() {
            values.shift_remove("image_processor_type");
            values.insert("video_processor_type".to_string(), json!(video));
        }
        let whole = json!({
            "image_processor": image_processor,
            "processor_class": class,
            "video_processor": video_processor,
        });
        write_json(&dir.join("processor_config.json"), &whole)?;
        image_processor["processor_class"] = json!(class);
        write_json(&dir.join("preprocessor_config.json"), &image_processor)?;
        super::tokenizer::write_text(&dir.join("chat_template.jinja"), chat_template)
    }

    /// Pixels that both sides are multiples of: `patch_size · merge_size`.
    pub fn factor(&self) -> usize {
        self.patch_size * self.merge_size
    }

    /// Height and width that a picture of this height and width is resized to.
    ///
    /// # Errors
    /// As [`smart_resize`]; without resizing, a data error when a side is no multiple of [`Self::factor`].
    pub fn resized_size(&self, height: usize, width: usize) -> Result<(usize, usize)> {
        let factor = self.factor();
        if self.do_resize {
            return smart_resize(height, width, factor, self.min_pixels, self.max_pixels);
        }
        if height == 0 || width == 0 || !height.is_multiple_of(factor) || !width.is_multiple_of(factor) {
            return Err(Error::data(format!(
                "this checkpoint does not resize pictures, and {height} by {width} is no multiple of {factor}"
            )));
        }
        Ok((height, width))
    }

    /// Patches of a picture of this (original) height and width: `[1, rows, columns]`.
    ///
    /// # Errors
    /// As [`Self::resized_size`].
    pub fn grid_of(&self, height: usize, width: usize) -> Result<Grid> {
        let (height, width) = self.resized_size(height, width)?;
        Ok([1, height / self.patch_size, width / self.patch_size])
    }

    /// Resizes a picture to the model's size.
    ///
    /// # Errors
    /// As [`Self::resized_size`].
    pub fn process(&self, image: &RgbImage8) -> Result<ProcessedImage> {
        let (height, width) = self.resized_size(image.height, image.width)?;
        let resized = resize_u8(image, height, width)?;
        Ok(ProcessedImage { resized, grid: [1, height / self.patch_size, width / self.patch_size] })
    }

    /// The normalised patches of a processed picture, `[patches, channels · frames · patch_size²]` row-major, patches
    /// in merge-block order: transformers' `pixel_values`.
    pub fn pixel_values(&self, image: &ProcessedImage) -> Vec<f32> {
        let inverse = (1.0 / self.rescale_factor) as f32;
        let (mean, std) = (self.image_mean.map(|m| m * inverse), self.image_std.map(|s| s * inverse));
        let [_, rows, columns] = image.grid;
        let side = self.patch_size;
        let width = image.resized.width;
        let mut out = Vec::with_capacity(rows * columns * 3 * self.temporal_patch_size * side * side);
        for [row, column] in super::positions::patch_coordinates([1, rows, columns], self.merge_size) {
            for channel in 0..3 {
                for _ in 0..self.temporal_patch_size {
                    for y in row * side..(row + 1) * side {
                        for x in column * side..(column + 1) * side {
                            let level = f32::from(image.resized.data[3 * (y * width + x) + channel]);
                            out.push((level - mean[channel]) / std[channel]);
                        }
                    }
                }
            }
        }
        out
    }
}

fn whole_number(key: &str, value: &Value) -> Result<usize> {
    value
        .as_u64()
        .or_else(|| {
            value
                .as_f64()
                .filter(|number| number.fract() == 0.0 && *number >= 0.0)
                .map(|number| number as u64)
        })
        .and_then(|number| usize::try_from(number).ok())
        .ok_or_else(|| {
            Error::data(format!("the image processor's `{key}` must be a whole number, found `{value}`"))
        })
}

fn three(values: &Map<String, Value>, key: &str, default: [f32; 3]) -> Result<[f32; 3]> {
    let wrong = |value: &Value| {
        Error::data(format!("the image processor's `{key}` must be three numbers, found `{value}`"))
    };
    match values.get(key) {
        None | Some(Value::Null) => Ok(default),
        Some(value) => value
            .as_array()
            .and_then(|list| list.iter().map(|v| v.as_f64().map(|v| v as f32)).collect::<Option<Vec<_>>>())
            .and_then(|list| <[f32; 3]>::try_from(list).ok())
            .ok_or_else(|| wrong(value)),
    }
}

/// Height and width near the given ones: multiples of `factor`, between `min_pixels` and `max_pixels` together, the
/// ratio of sides kept as well as that allows. The rule of Qwen2-VL's image processor, in double precision with
/// halves rounded to even.
///
/// # Errors
/// A data error when a side is zero or one is more than 200 times the other.
pub fn smart_resize(
    height: usize,
    width: usize,
    factor: usize,
    min_pixels: usize,
    max_pixels: usize,
) -> Result<(usize, usize)> {
    if height == 0 || width == 0 || factor == 0 {
        return Err(Error::data(format!("a picture of {height} by {width} pixels cannot be resized")));
    }
    let (h, w, step) = (height as f64, width as f64, factor as f64);
    if h.max(w) / h.min(w) > MAX_ASPECT_RATIO {
        return Err(Error::data(format!(
            "a picture of {height} by {width} pixels is too narrow: one side may be {MAX_ASPECT_RATIO} times the other at most"
        )));
    }
    let nearest = |side: f64| (side / step).round_ties_even() * step;
    let (near_h, near_w) = (nearest(h), nearest(w));
    let (new_h, new_w) = if near_h * near_w > max_pixels as f64 {
        let shrink = (h * w / max_pixels as f64).sqrt();
        let below = |side: f64| ((side / shrink / step).floor() * step).max(step);
        (below(h), below(w))
    } else if near_h * near_w < min_pixels as f64 {
        let stretch = (min_pixels as f64 / (h * w)).sqrt();
        let above = |side: f64| (side * stretch / step).ceil() * step;
        (above(h), above(w))
    } else {
        (near_h, near_w)
    };
    Ok((new_h as usize, new_w as usize))
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::model::test_support::{fixture_json, fixtures, numbers, read_tensors};
    use crate::pixels::decode::decode_file;

    #[test]
    fn every_notation_of_the_limits_is_read() {
        let of = |value: Value| {
            let config = ImageProcessorConfig::from_json(&value).unwrap();
            (config.min_pixels, config.max_pixels)
        };
        assert_eq!(of(json!({})), (3136, 1_003_520));
        assert_eq!(of(json!({"size": {"shortest_edge": 4096, "longest_edge": 8192}})), (4096, 8192));
        assert_eq!(of(json!({"min_pixels": 100, "max_pixels": 200})), (100, 200));
        assert_eq!(of(json!({"size": {"min_pixels": 100, "max_pixels": 200}})), (100, 200));
        assert_eq!(
            of(json!({"min_pixels": 50, "size": {"shortest_edge": 60, "longest_edge": 99}})),
            (50, 99)
        );
        assert_eq!(
            of(json!({"min_pixels": null, "size": {"shortest_edge": 60, "longest_edge": 99}})),
            (60, 99)
        );
    }

    #[test]
    fn switched_off_steps_and_nonsense_are_understood() {
        let config =
            ImageProcessorConfig::from_json(&json!({"do_normalize": false, "do_resize": false})).unwrap();
        assert_eq!((config.image_mean, config.image_std), ([0.0; 3], [1.0; 3]));
        assert_eq!(config.resized_size(56, 28).unwrap(), (56, 28));
        assert!(config.resized_size(56, 30).is_err());
        for (value, part) in [
            (json!({"resample": 2}), "bicubic"),
            (json!({"image_std": [0.5, 0.0, 0.5]}), "image_std"),
            (json!({"image_mean": [0.5]}), "three numbers"),
            (json!({"patch_size": 0}), "patch_size"),
            (json!({"patch_size": "14"}), "patch_size"),
            (json!({"min_pixels": 10, "max_pixels": 5}), "min_pixels"),
            (json!({"rescale_factor": 0}), "rescale_factor"),
            (json!([]), "object"),
        ] {
            let error = ImageProcessorConfig::from_json(&value).unwrap_err();
            assert!(matches!(error, Error::Data(_)) && error.to_string().contains(part), "{value} {error}");
        }
    }

    #[test]
    fn a_saved_processor_is_read_back() {
        let dir = tempfile::tempdir().unwrap();
        let config = ImageProcessorConfig { patch_size: 16, max_pixels: 20_000, ..Default::default() };
        assert!(
            ImageProcessorConfig::load(dir.path())
                .unwrap_err()
                .to_string()
                .contains("preprocessor_config.json")
        );
        config.save(dir.path(), "qwen3_vl", "template").unwrap();
        assert_eq!(ImageProcessorConfig::load(dir.path()).unwrap(), config);
        std::fs::remove_file(dir.path().join("processor_config.json")).unwrap();
        assert_eq!(ImageProcessorConfig::load(dir.path()).unwrap(), config);
    }

    #[test]
    fn patches_are_channel_frame_row_column_in_merge_blocks() {
        let data: Vec<u8> = (0..3 * 32).map(|index| index as u8).collect();
        let image = ProcessedImage { resized: RgbImage8::new(8, 4, data).unwrap(), grid: [1, 2, 4] };
        let config = ImageProcessorConfig {
            patch_size: 2,
            image_mean: [0.0, 0.5, 1.0],
            image_std: [1.0, 1.0, 2.0],
            ..Default::default()
        };
        let values = config.pixel_values(&image);
        assert_eq!(values.len(), 8 * 3 * 2 * 4);
        // Patch 2 is the lower left of the first block: rows 2-3, columns 0-1.
        let level = |y: usize, x: usize, channel: usize| (3 * (8 * y + x) + channel) as f32 / 255.0;
        let patch = &values[2 * 24..3 * 24];
        for frame in 0..2 {
            for (index, (y, x)) in [(2, 0), (2, 1), (3, 0), (3, 1)].into_iter().enumerate() {
                let at = |channel: usize| patch[8 * channel + 4 * frame + index];
                assert!((at(0) - level(y, x, 0)).abs() < 1e-6);
                assert!((at(1) - (level(y, x, 1) - 0.5)).abs() < 1e-6);
                assert!((at(2) - (level(y, x, 2) - 1.0) / 2.0).abs() < 1e-6);
            }
        }
    }

    #[test]
    fn narrow_and_empty_pictures_are_refused() {
        assert!(smart_resize(1, 200, 28, 3136, 12544).is_ok());
        assert!(smart_resize(1, 201, 28, 3136, 12544).unwrap_err().to_string().contains("narrow"));
        assert!(smart_resize(0, 5, 28, 3136, 12544).is_err());
        assert_eq!(smart_resize(42, 70, 28, 1, 1 << 20).unwrap(), (56, 56), "halves go to the even multiple");
    }

    #[test]
    fn the_reference_table_of_sizes_is_equal() {
        let Some(dir) = fixtures() else { return };
        let rows = fixture_json(&dir.join("image_processor.json"))["smart_resize"]["rows"].clone();
        for row in rows.as_array().unwrap() {
            let [height, width, factor, low, high] =
                [0, 1, 2, 3, 4].map(|i| row[i].as_u64().unwrap() as usize);
            let want = row[5].as_u64().map(|h| (h as usize, row[6].as_u64().unwrap() as usize));
            assert_eq!(smart_resize(height, width, factor, low, high).ok(), want, "{row}");
        }
    }

    #[test]
    fn decoded_images_are_equal_to_what_the_reference_resizes() {
        let Some(dir) = fixtures() else { return };
        let tensors = read_tensors(&dir.join("image_processor.safetensors"));
        for name in ["bilevel", "gray16", "la", "palette_trns", "rgba", "tiny"] {
            let image = decode_file(&dir.join(format!("images/{name}.png"))).unwrap();
            let planes = tensors.bytes_u8(&format!("rgb.{name}")).unwrap();
            assert_eq!(tensors.shape(&format!("rgb.{name}")).unwrap(), [3, image.height, image.width]);
            let found: Vec<u8> = (0..3)
                .flat_map(|c| image.data.iter().skip(c).step_by(3).copied().collect::<Vec<_>>())
                .collect();
            assert!(found == planes, "{name}");
        }
    }

    #[test]
    fn resized_images_and_patches_are_equal_to_the_reference() {
        let Some(dir) = fixtures() else { return };
        let report = fixture_json(&dir.join("image_processor.json"));
        let tensors = read_tensors(&dir.join("image_processor.safetensors"));
        for case in report["cases"].as_array().unwrap() {
            let key = case["key"].as_str().unwrap();
            let kind = &report["kinds"][key.split('.').next().unwrap()];
            let mut value = kind.clone();
            value["min_pixels"] = case["min_pixels"].clone();
            value["max_pixels"] = case["max_pixels"].clone();
            let config = ImageProcessorConfig::from_json(&value).unwrap();
            let image = decode_file(&dir.join("images").join(case["image"].as_str().unwrap())).unwrap();
            let processed = config.process(&image).unwrap();
            assert_eq!(processed.grid.to_vec(), numbers::<usize>(&case["grid_thw"]), "{key}");
            assert_eq!(config.grid_of(image.height, image.width).unwrap(), processed.grid);
            let resized = &processed.resized;
            let level = |c: usize, y: usize, x: usize| resized.data[3 * (y * resized.width + x) + c];
            let axis = |name: &str, all: usize| -> Vec<usize> {
                case.get(name).map_or_else(|| (0..all).collect(), numbers)
            };
            let (rows, columns) = (axis("sample_rows", resized.height), axis("sample_cols", resized.width));
            let what = if case.get("sample_rows").is_some() { "sample_u8" } else { "resized_u8" };
            let want = tensors.bytes_u8(&format!("{key}.torchvision.{what}")).unwrap();
            let mut wanted = want.iter();
            for c in 0..3 {
                for &y in &rows {
                    for &x in &columns {
                        assert_eq!(Some(&level(c, y, x)), wanted.next(), "{key} {c} {y} {x}");
                    }
                }
            }
            let name = format!("{key}.torchvision.pixel_values_rows");
            if tensors.shape(&name).is_some() {
                let width = 3 * 2 * config.patch_size * config.patch_size;
                let values = config.pixel_values(&processed);
                let rows: Vec<usize> = numbers(&case["pixel_rows"]);
                let found: Vec<f32> =
                    rows.iter().flat_map(|r| values[r * width..(r + 1) * width].to_vec()).collect();
                let want = tensors.floats(&name).unwrap();
                let worst = found.iter().zip(&want).map(|(a, b)| (a - b).abs()).fold(0.0, f32::max);
                assert!(found.len() == want.len() && worst < 1e-6, "{key} {worst}");
            }
        }
    }
}
