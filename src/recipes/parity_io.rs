//! Comparing tokens, prompts, positions and pictures with reference numbers exported from transformers.
//!
//! Reads the layout of an export: `checkpoints/NAME/`, `expected/NAME.{json,safetensors}`, `images/`,
//! `tokenizer/NAME/` with `tokenizer/NAME_cases.json`, `chat_cases.json`, `image_processor.{json,safetensors}`. What an
//! export does not hold is not checked. Checks that run the network live elsewhere and use [`ReferenceCheckpoint`].
//! Discrete quantities report the number of entries that disagree.

use crate::error::{Error, Result};
use crate::files;
use crate::model::chat::{ChatTemplate, RenderOptions, expand_image_tokens};
use crate::model::config::VlmConfig;
use crate::model::positions::{Grid, image_tokens, prompt_positions};
use crate::model::processor::{ImageProcessorConfig, ProcessedImage, smart_resize};
use crate::model::tokenizer::Tokenizer;
use crate::model::weights::TensorFile;
use crate::pixels::RgbImage8;
use crate::pixels::decode::decode_file;
use serde::de::DeserializeOwned;
use serde::{Deserialize, Serialize};
use serde_json::Value;
use std::collections::BTreeMap;
use std::path::{Path, PathBuf};

/// Largest difference of resized pictures, in 8-bit levels.
const RESIZED_PIXELS_TOLERANCE: f64 = 1.0;
/// Largest difference of normalised patches, given the same resized picture.
const PIXEL_VALUES_TOLERANCE: f64 = 1e-5;

/// One comparison with the reference.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct Check {
    /// `CHECKPOINT/CASE/QUANTITY`, `-` where one does not apply.
    pub name: String,
    /// The largest difference, or the number of entries that disagree.
    pub max_abs_diff: f64,
    /// The largest difference allowed.
    pub tolerance: f64,
    /// Whether it is within.
    pub pass: bool,
}

impl Check {
    /// A comparison of `quantity`; a difference that is not finite becomes the largest number, and does not pass.
    pub fn new(checkpoint: &str, case: &str, quantity: &str, max_abs_diff: f64, tolerance: f64) -> Self {
        // JSON has no infinity.
        let max_abs_diff = if max_abs_diff.is_finite() { max_abs_diff } else { f64::MAX };
        Self {
            name: format!("{checkpoint}/{case}/{quantity}"),
            max_abs_diff,
            tolerance,
            pass: max_abs_diff <= tolerance,
        }
    }

    pub(super) fn exact(checkpoint: &str, case: &str, quantity: &str, disagreements: usize) -> Self {
        Self::new(checkpoint, case, quantity, disagreements as f64, 0.0)
    }
}

/// Largest absolute difference of two lists; infinite when their lengths differ or a number is not finite.
pub fn max_abs_diff(found: &[f32], wanted: &[f32]) -> f64 {
    if found.len() != wanted.len() {
        return f64::INFINITY;
    }
    found.iter().zip(wanted).fold(0.0, |worst: f64, (&a, &b)| {
        let difference = (f64::from(a) - f64::from(b)).abs();
        if difference.is_nan() { f64::INFINITY } else { worst.max(difference) }
    })
}

/// Entries that differ, counting those that one list has more.
pub(super) fn disagreements<T: PartialEq>(found: &[T], wanted: &[T]) -> usize {
    found.iter().zip(wanted).filter(|(a, b)| a != b).count() + found.len().abs_diff(wanted.len())
}

/// One prompt of an export.
#[derive(Debug, Clone, PartialEq)]
pub struct ReferenceCase {
    /// Its name.
    pub name: String,
    /// Paths of its images.
    pub images: Vec<PathBuf>,
    /// The rendered prompt, one placeholder per image.
    pub prompt: String,
    /// Its tokens, placeholders expanded.
    pub input_ids: Vec<u32>,
    /// Patches of each image.
    pub grids: Vec<Grid>,
    /// Rotary positions, absent for text alone (which counts up).
    pub position_ids: Option<[Vec<i64>; 3]>,
    /// What later tokens add to their index.
    pub rope_delta: i64,
}

/// One checkpoint of an export and what is expected of it.
#[derive(Debug)]
pub struct ReferenceCheckpoint {
    /// Its name.
    pub name: String,
    /// Its directory.
    pub dir: PathBuf,
    /// `expected/NAME.json`.
    pub expected: Value,
    /// `expected/NAME.safetensors`.
    pub tensors: TensorFile,
    /// The prompts, in the file's order.
    pub cases: Vec<ReferenceCase>,
}

pub(super) fn read_json(path: &Path) -> Result<Value> {
    let bytes = files::read(path, "cannot read the reference numbers")?;
    serde_json::from_slice(&bytes)
        .map_err(|error| Error::data(format!("not valid JSON: {error}\n  --> {}", path.display())))
}

/// A typed value of a reference file.
pub(super) fn typed<T: DeserializeOwned>(value: &Value, what: &str) -> Result<T> {
    T::deserialize(value)
        .map_err(|error| Error::data(format!("the reference's `{what}` cannot be read: {error}")))
}

/// An entry that may be absent.
pub(super) fn optional<T: DeserializeOwned>(values: &Value, key: &str) -> Result<Option<T>> {
    values.get(key).filter(|value| !value.is_null()).map(|value| typed(value, key)).transpose()
}

/// Names of the export's checkpoints, sorted.
///
/// # Errors
/// An I/O error.
pub fn checkpoint_names(dir: &Path) -> Result<Vec<String>> {
    let root = dir.join("checkpoints");
    if !root.is_dir() {
        return Ok(Vec::new());
    }
    let failed = |error| Error::io("cannot list the checkpoints", &root, error);
    let mut names = Vec::new();
    for entry in std::fs::read_dir(&root).map_err(failed)? {
        let entry = entry.map_err(failed)?;
        if entry.path().join("config.json").exists() {
            names.push(entry.file_name().to_string_lossy().into_owned());
        }
    }
    names.sort_unstable();
    Ok(names)
}

impl ReferenceCheckpoint {
    /// The expectations for checkpoint `name`; none when the export has no numbers for it. A `NAME_legacy` without
    /// its own is the same model in an older layout, and is held to `NAME`'s.
    ///
    /// # Errors
    /// A data error when they cannot be read.
    pub fn load(dir: &Path, name: &str) -> Result<Option<Self>> {
        let known = |name: &str| dir.join(format!("expected/{name}.json")).exists();
        let Some(source) =
            [Some(name), name.strip_suffix("_legacy")].into_iter().flatten().find(|name| known(name))
        else {
            return Ok(None);
        };
        let expected = read_json(&dir.join(format!("expected/{source}.json")))?;
        let tensors = TensorFile::open(&dir.join(format!("expected/{source}.safetensors")))?;
        let mut cases = Vec::new();
        for (case, row) in expected["cases"].as_object().into_iter().flatten() {
            let images: Vec<String> = optional(row, "images")?.unwrap_or_default();
            cases.push(ReferenceCase {
                name: case.clone(),
                images: images.iter().map(|image| dir.join("images").join(image)).collect(),
                prompt: typed(&row["prompt"], "prompt")?,
                input_ids: typed(&row["input_ids"], "input_ids")?,
                grids: optional(row, "image_grid_thw")?.unwrap_or_default(),
                position_ids: optional(row, "position_ids")?,
                rope_delta: optional(row, "rope_delta")?.unwrap_or(0),
            });
        }
        let dir = dir.join("checkpoints").join(name);
        Ok(Some(Self { name: name.to_string(), dir, expected, tensors, cases }))
    }

    /// The reference's resized picture `index` of `case`.
    ///
    /// # Errors
    /// A data error when it is missing or no picture.
    pub fn resized(&self, case: &str, index: usize) -> Result<RgbImage8> {
        let name = format!("{case}.resized_u8.{index}");
        let planes = self.tensors.bytes_u8(&name)?;
        match self.tensors.shape(&name) {
            Some(&[3, height, width]) => {
                let pixels = height * width;
                let data = (0..3 * pixels).map(|i| planes[i % 3 * pixels + i / 3]).collect();
                RgbImage8::new(width, height, data)
            }
            _ => Err(Error::data(format!(
                "tensor `{name}` is no picture\n  --> {}",
                self.tensors.path().display()
            ))),
        }
    }

    /// Compares what this build makes of every prompt and picture before the network: image_grid, resized_size,
    /// resized_pixels, pixel_values, input_ids, position_ids, and chat_prompt where `messages` has the case.
    ///
    /// # Errors
    /// A data error when the checkpoint or the reference cannot be read.
    pub fn check_inputs(&self, messages: &BTreeMap<String, Value>) -> Result<Vec<Check>> {
        let config = VlmConfig::load(&self.dir)?;
        let tokenizer = Tokenizer::load(&self.dir)?;
        let template = ChatTemplate::load(&self.dir)?;
        let processor = ImageProcessorConfig::load(&self.dir)?;
        let merge = config.vision.spatial_merge_size;
        let mut checks = Vec::new();
        for case in &self.cases {
            let exact = |quantity: &str, count: usize| Check::exact(&self.name, &case.name, quantity, count);
            if let Some(messages) = messages.get(&case.name) {
                let options = RenderOptions { add_generation_prompt: true, add_vision_id: false };
                let prompt = template.render_json(messages, options)?;
                checks.push(exact("chat_prompt", usize::from(prompt != case.prompt)));
            }
            let grids = self.check_pictures(case, &processor, &mut checks)?;
            let counts: Vec<usize> = grids.iter().map(|&grid| image_tokens(grid, merge)).collect();
            let ids = expand_image_tokens(&tokenizer.encode(&case.prompt)?, config.image_token_id, &counts)?;
            checks.push(exact("input_ids", disagreements(&ids, &case.input_ids)));
            if let Some(wanted) = &case.position_ids {
                // From the reference's tokens and grids, so that one difference is not counted twice.
                let found = prompt_positions(&case.input_ids, config.image_token_id, &case.grids, merge)?;
                let mut count = usize::from(found.rope_delta != case.rope_delta);
                for (found, wanted) in found.ids.iter().zip(wanted) {
                    count += disagreements(found, wanted);
                }
                checks.push(exact("position_ids", count));
            }
        }
        Ok(checks)
    }

    /// Compares the pictures of `case`; returns the grids this build finds.
    fn check_pictures(
        &self,
        case: &ReferenceCase,
        processor: &ImageProcessorConfig,
        checks: &mut Vec<Check>,
    ) -> Result<Vec<Grid>> {
        if case.images.is_empty() {
            return Ok(Vec::new());
        }
        let mut grids = Vec::new();
        let (mut sizes, mut worst) = (0, 0f64);
        let mut patches = Vec::new();
        for (index, path) in case.images.iter().enumerate() {
            let found = processor.process(&decode_file(path)?)?;
            let wanted = self.resized(&case.name, index)?;
            let (size, pixels) = compare_pictures(&found.resized, &wanted);
            sizes += size;
            worst = worst.max(pixels);
            let grid = [1, wanted.height / processor.patch_size, wanted.width / processor.patch_size];
            patches.extend(processor.pixel_values(&ProcessedImage { resized: wanted, grid }));
            grids.push(found.grid);
        }
        let (checkpoint, name) = (self.name.as_str(), case.name.as_str());
        checks.push(Check::exact(checkpoint, name, "image_grid", disagreements(&grids, &case.grids)));
        checks.push(Check::exact(checkpoint, name, "resized_size", sizes));
        checks.push(Check::new(checkpoint, name, "resized_pixels", worst, RESIZED_PIXELS_TOLERANCE));
        let key = format!("{name}.pixel_values");
        if self.tensors.shape(&key).is_some() {
            let difference = max_abs_diff(&patches, &self.tensors.floats(&key)?);
            checks.push(Check::new(checkpoint, name, "pixel_values", difference, PIXEL_VALUES_TOLERANCE));
        }
        Ok(grids)
    }
}

/// Whether the sizes differ (0 or 1), and the largest difference of levels (of the whole range when they do).
fn compare_pictures(found: &RgbImage8, wanted: &RgbImage8) -> (usize, f64) {
    if (found.height, found.width) != (wanted.height, wanted.width) {
        return (1, 255.0);
    }
    let worst = found.data.iter().zip(&wanted.data).map(|(&a, &b)| a.abs_diff(b)).max();
    (0, f64::from(worst.unwrap_or(0)))
}

/// Compares every tokenizer table: text to ids, ids to text. One check `-/NAME/tokens` each.
///
/// # Errors
/// A data error when a tokenizer or a table cannot be read.
pub fn check_tokenizers(dir: &Path) -> Result<Vec<Check>> {
    let root = dir.join("tokenizer");
    let mut names: Vec<String> = match std::fs::read_dir(&root) {
        Ok(entries) => entries
            .flatten()
            .filter_map(|entry| entry.file_name().to_str()?.strip_suffix("_cases.json").map(String::from))
            .collect(),
        Err(_) => Vec::new(),
    };
    names.sort_unstable();
    let mut checks = Vec::new();
    for name in names {
        let tokenizer = Tokenizer::load(&root.join(&name))?;
        let table = read_json(&root.join(format!("{name}_cases.json")))?;
        let mut wrong = 0;
        for row in table["cases"].as_array().into_iter().flatten() {
            let ids: Vec<u32> = typed(&row["ids"], "ids")?;
            let text: String = typed(&row["text"], "text")?;
            wrong += usize::from(tokenizer.encode(&text)? != ids);
            wrong += usize::from(row["decoded"] != tokenizer.decode(&ids, false)?);
            wrong += usize::from(row["decoded_skip_special"] != tokenizer.decode(&ids, true)?);
        }
        for row in table["decode_only"].as_array().into_iter().flatten() {
            wrong += usize::from(
                row["decoded"] != tokenizer.decode(&typed::<Vec<u32>>(&row["ids"], "ids")?, false)?,
            );
        }
        checks.push(Check::exact("-", &name, "tokens", wrong));
    }
    Ok(checks)
}

/// The conversations of `chat_cases.json`, by name.
///
/// # Errors
/// A data error when the file cannot be read.
pub fn conversations(dir: &Path) -> Result<BTreeMap<String, Value>> {
    let path = dir.join("chat_cases.json");
    if !path.exists() {
        return Ok(BTreeMap::new());
    }
    let rows = read_json(&path)?;
    let named = |row: &Value| Some((row["case"].as_str()?.to_string(), row["messages"].clone()));
    Ok(rows.as_array().into_iter().flatten().filter_map(named).collect())
}

/// Compares every rendered prompt of `chat_cases.json`, through a checkpoint of the row's family: one check
/// `FAMILY/CASE/chat_prompt` over all options.
///
/// # Errors
/// A data error when the file or a template cannot be read.
pub fn check_chat(dir: &Path) -> Result<Vec<Check>> {
    let path = dir.join("chat_cases.json");
    if !path.exists() {
        return Ok(Vec::new());
    }
    let mut templates = BTreeMap::new();
    for name in checkpoint_names(dir)? {
        let checkpoint = dir.join("checkpoints").join(&name);
        let family = VlmConfig::load(&checkpoint)?.model_type;
        templates.entry(family).or_insert(ChatTemplate::load(&checkpoint)?);
    }
    let mut wrong: BTreeMap<(String, String), usize> = BTreeMap::new();
    for row in read_json(&path)?.as_array().into_iter().flatten() {
        let family: String = typed(&row["family"], "family")?;
        let Some(template) = templates.get(&family) else { continue };
        let options = RenderOptions {
            add_generation_prompt: typed(&row["add_generation_prompt"], "add_generation_prompt")?,
            add_vision_id: typed(&row["add_vision_id"], "add_vision_id")?,
        };
        let text = template.render_json(&row["messages"], options)?;
        *wrong.entry((family, typed(&row["case"], "case")?)).or_default() += usize::from(row["text"] != text);
    }
    Ok(wrong
        .into_iter()
        .map(|((family, case), count)| Check::exact(&family, &case, "chat_prompt", count))
        .collect())
}

/// Compares the image processor on its own: every picture at every setting, and the table of sizes.
///
/// # Errors
/// A data error when the file or a picture cannot be read.
pub fn check_image_processor(dir: &Path) -> Result<Vec<Check>> {
    let path = dir.join("image_processor.json");
    if !path.exists() {
        return Ok(Vec::new());
    }
    let report = read_json(&path)?;
    let tensors = TensorFile::open(&dir.join("image_processor.safetensors"))?;
    let mut checks = Vec::new();
    for row in report["cases"].as_array().into_iter().flatten() {
        check_processed(dir, &report, row, &tensors, &mut checks)?;
    }
    let mut wrong = 0;
    let rows: Vec<Vec<Option<usize>>> = optional(&report["smart_resize"], "rows")?.unwrap_or_default();
    for row in &rows {
        let [Some(height), Some(width), Some(factor), Some(low), Some(high), out_height, out_width] = row[..]
        else {
            return Err(Error::data(format!(
                "a row of `smart_resize` is not understood\n  --> {}",
                path.display()
            )));
        };
        let wanted = out_height.zip(out_width);
        wrong += usize::from(smart_resize(height, width, factor, low, high).ok() != wanted);
    }
    if !rows.is_empty() {
        checks.push(Check::exact("-", "smart_resize", "resized_size", wrong));
    }
    Ok(checks)
}

/// One picture at one setting: grid, size, levels (whole or sampled), and some rows of patches.
fn check_processed(
    dir: &Path,
    report: &Value,
    row: &Value,
    tensors: &TensorFile,
    checks: &mut Vec<Check>,
) -> Result<()> {
    let key: String = typed(&row["key"], "key")?;
    let mut settings = report["kinds"][key.split('.').next().unwrap_or_default()].clone();
    for limit in ["min_pixels", "max_pixels"] {
        settings[limit] = row[limit].clone();
    }
    let config = ImageProcessorConfig::from_json(&settings)?;
    let image: String = typed(&row["image"], "image")?;
    let processed = config.process(&decode_file(&dir.join("images").join(image))?)?;
    let grid: Grid = typed(&row["grid_thw"], "grid_thw")?;
    checks.push(Check::exact("-", &key, "image_grid", usize::from(processed.grid != grid)));
    let size: [usize; 3] = typed(&row["resized_chw"], "resized_chw")?;
    let resized = &processed.resized;
    let same_size = size == [3, resized.height, resized.width];
    checks.push(Check::exact("-", &key, "resized_size", usize::from(!same_size)));
    if !same_size {
        return Ok(());
    }
    let rows: Option<Vec<usize>> = optional(row, "sample_rows")?;
    let columns: Option<Vec<usize>> = optional(row, "sample_cols")?;
    let kind = if rows.is_some() { "sample_u8" } else { "resized_u8" };
    let rows = rows.unwrap_or_else(|| (0..resized.height).collect());
    let columns = columns.unwrap_or_else(|| (0..resized.width).collect());
    let mut wanted = tensors.bytes_u8(&format!("{key}.torchvision.{kind}"))?.iter();
    let mut worst = 0u8;
    for channel in 0..3 {
        for &y in &rows {
            for &x in &columns {
                let is_inside = y < resized.height && x < resized.width;
                let level = is_inside.then(|| &resized.data[3 * (y * resized.width + x) + channel]);
                worst = worst.max(level.zip(wanted.next()).map_or(255, |(a, b)| a.abs_diff(*b)));
            }
        }
    }
    checks.push(Check::new("-", &key, "resized_pixels", f64::from(worst), RESIZED_PIXELS_TOLERANCE));
    let name = format!("{key}.torchvision.pixel_values_rows");
    if worst == 0 && tensors.shape(&name).is_some() {
        let width = 3 * config.temporal_patch_size * config.patch_size * config.patch_size;
        let values = config.pixel_values(&processed);
        let mut found = Vec::new();
        for patch in typed::<Vec<usize>>(&row["pixel_rows"], "pixel_rows")? {
            found.extend_from_slice(values.chunks_exact(width).nth(patch).unwrap_or_default());
        }
        let difference = max_abs_diff(&found, &tensors.floats(&name)?);
        checks.push(Check::new("-", &key, "pixel_values", difference, PIXEL_VALUES_TOLERANCE));
    }
    Ok(())
}

/// Every check of this file on the export in `dir`.
///
/// # Errors
/// A data error when something cannot be read, or `dir` holds no reference numbers at all.
pub fn check_all(dir: &Path) -> Result<Vec<Check>> {
    let checks = collect(dir)?;
    if checks.is_empty() {
        return Err(no_numbers(dir));
    }
    Ok(merge_by_name(checks))
}

/// The error of a directory without reference numbers.
pub(super) fn no_numbers(dir: &Path) -> Error {
    Error::data(format!(
        "no reference numbers found\n  --> {}\n   = help: pass the directory that holds `checkpoints` and `expected`",
        dir.display()
    ))
}

/// Every check of this file, none when the export holds nothing for it.
pub(super) fn collect(dir: &Path) -> Result<Vec<Check>> {
    let mut checks = check_tokenizers(dir)?;
    checks.extend(check_chat(dir)?);
    checks.extend(check_image_processor(dir)?);
    let messages = conversations(dir)?;
    for name in checkpoint_names(dir)? {
        if let Some(checkpoint) = ReferenceCheckpoint::load(dir, &name)? {
            checks.extend(checkpoint.check_inputs(&messages)?);
        }
    }
    Ok(checks)
}

/// One check per name: of several of one name, the worst.
pub(super) fn merge_by_name(checks: Vec<Check>) -> Vec<Check> {
    let mut places: BTreeMap<String, usize> = BTreeMap::new();
    let mut merged: Vec<Check> = Vec::with_capacity(checks.len());
    for check in checks {
        match places.get(&check.name) {
            Some(&place) if check.max_abs_diff > merged[place].max_abs_diff => merged[place] = check,
            Some(_) => {}
            None => {
                places.insert(check.name.clone(), merged.len());
                merged.push(check);
            }
        }
    }
    merged
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::model::test_support::fixtures;
    use serde_json::json;

    #[test]
    fn differences_that_are_no_numbers_do_not_pass() {
        assert!(Check::new("a", "b", "c", 1.0, 1.0).pass);
        assert!(!Check::new("a", "b", "c", 1.1, 1.0).pass);
        assert!(!Check::new("a", "b", "c", f64::NAN, 1.0).pass);
        let infinite = Check::new("a", "b", "c", f64::INFINITY, 1.0);
        assert_eq!(serde_json::from_str::<Check>(&json!(infinite).to_string()).unwrap(), infinite);
        let merged = merge_by_name(vec![
            Check::new("a", "b", "c", 0.5, 1.0),
            infinite.clone(),
            Check::new("a", "b", "c", 0.5, 1.0),
        ]);
        assert_eq!(merged, [infinite]);
        assert_eq!(max_abs_diff(&[1.0, 5.0], &[1.5, 4.0]), 1.0);
        assert_eq!(max_abs_diff(&[1.0], &[1.0, 2.0]), f64::INFINITY);
        assert_eq!(max_abs_diff(&[f32::NAN, 1.0], &[1.0, 1.0]), f64::INFINITY);
        assert_eq!(disagreements(&[1, 2, 3], &[1, 3]), 2);
    }

    #[test]
    fn an_empty_directory_is_no_reference() {
        let dir = tempfile::tempdir().unwrap();
        assert!(check_all(dir.path()).unwrap_err().to_string().contains("no reference numbers"));
    }

    #[test]
    fn a_wrong_reference_fails_its_check_and_only_that() {
        let Some(source) = fixtures() else { return };
        let dir = tempfile::tempdir().unwrap();
        let tokenizer = dir.path().join("tokenizer");
        std::fs::create_dir_all(tokenizer.join("tiny")).unwrap();
        for file in ["tokenizer.json", "tokenizer_config.json"] {
            std::fs::copy(source.join("tokenizer/tiny").join(file), tokenizer.join("tiny").join(file))
                .unwrap();
        }
        let mut table = read_json(&source.join("tokenizer/tiny_cases.json")).unwrap();
        table["cases"][2]["ids"][0] = json!(1);
        table["decode_only"] = json!([]);
        std::fs::write(tokenizer.join("tiny_cases.json"), table.to_string()).unwrap();
        let checks = check_all(dir.path()).unwrap();
        assert_eq!(checks.len(), 1);
        // The ids, the text they give, and that without special tokens.
        assert_eq!(
            (checks[0].name.as_str(), checks[0].max_abs_diff, checks[0].pass),
            ("-/tiny/tokens", 3.0, false)
        );
    }

    #[test]
    fn the_whole_reference_is_matched_without_any_difference_in_discrete_things() {
        let Some(dir) = fixtures() else { return };
        let checks = check_all(&dir).unwrap();
        let failed: Vec<&Check> = checks.iter().filter(|check| !check.pass).collect();
        assert!(failed.is_empty(), "{failed:#?}");
        let names: std::collections::BTreeSet<&str> =
            checks.iter().map(|check| check.name.as_str()).collect();
        assert_eq!(names.len(), checks.len(), "every name once");
        for quantity in ["tokens", "chat_prompt", "input_ids", "position_ids", "image_grid", "resized_size"] {
            assert!(
                checks.iter().any(|check| check.name.ends_with(quantity) && check.tolerance == 0.0),
                "{quantity}"
            );
        }
        for name in ["qwen3_vl/two_images/resized_pixels", "qwen2_5_vl_legacy/single/pixel_values"] {
            assert!(names.contains(name), "{name}");
        }
        let worst =
            checks.iter().filter(|check| check.name.ends_with("resized_pixels")).map(|c| c.max_abs_diff);
        assert_eq!(worst.fold(0.0, f64::max), 0.0, "resizing is exact");
    }
}
