//! Phantoms: drawn images of eight modalities with questions that only the image answers, in OmniMedVQA's layout.
//!
//! They are made so that looking away scores at chance: within each question type and split every value stands
//! under every letter equally often, distractors are uniform, and ids, file names and order are drawn without
//! regard to the answers. The images are drawings for trying methods out and say nothing about medicine.
//! The same configuration gives the same bytes, whatever the number of threads.

mod draw;
mod modality;
mod plan;
mod scene;

use std::path::Path;

use image::ImageEncoder;
use image::codecs::png::{CompressionType, FilterType, PngEncoder};
use rayon::prelude::*;
use serde::{Deserialize, Serialize};
use serde_json::{Value, json};

use super::sample::{MODALITIES, reasoning_for};
use super::split;
use crate::error::{ConfigError, Error, Result};
use plan::{Picture, Question};
pub use plan::{TEST_MULTIPLE, question_text, values};

/// The one source name that all phantoms carry, so that no name tells a modality.
pub const DATASET: &str = "Phantom";

/// OmniMedVQA's own spellings, in the order of [`MODALITIES`].
const RAW_MODALITIES: [&str; 8] = [
    "CT(Computed Tomography)",
    "MR (Mag-netic Resonance Imaging)",
    "X-Ray",
    "ultrasound",
    "Dermoscopy",
    "Fundus Photography",
    "OCT (Optical Coherence Tomography",
    "Microscopy Images",
];

/// The file that says which configuration a folder of phantoms was made with.
const MARKER: &str = "phantom.json";

/// Images drawn between two reports of progress.
const CHUNK: usize = 256;

/// What to draw.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct PhantomConfig {
    /// Seed of everything.
    pub seed: u64,
    /// Height and width of the images in pixels: 16 to 2048.
    pub size: usize,
    /// How far lesions stand out: 1.5 is about half of the grey scale; above 0, at most 3.
    pub contrast: f32,
    /// Questions of the train split. Values and letters are exactly balanced for multiples of [`TEST_MULTIPLE`].
    pub train: usize,
    /// Questions of the validation split, balanced as the train split.
    pub validation: usize,
    /// Questions of the test split: a multiple of [`TEST_MULTIPLE`].
    pub test: usize,
}

impl Default for PhantomConfig {
    fn default() -> Self {
        Self { seed: 0, size: 64, contrast: 1.5, train: 6400, validation: 320, test: 320 }
    }
}

impl PhantomConfig {
    /// Everything that is wrong with the values; empty when nothing is.
    pub fn check(&self) -> Vec<ConfigError> {
        let mut problems = Vec::new();
        let mut refuse = |key: &str, message: String| problems.push(ConfigError::new(key, message));
        if !(16..=2048).contains(&self.size) {
            refuse("size", format!("size is {}, it must be from 16 to 2048 pixels", self.size));
        }
        if !(self.contrast > 0.0 && self.contrast <= 3.0) {
            refuse("contrast", format!("contrast is {}, it must be above 0 and at most 3", self.contrast));
        }
        if self.train + self.validation + self.test == 0 {
            refuse("train", "no question is asked for: train, validation and test are all 0".into());
        }
        if !self.test.is_multiple_of(TEST_MULTIPLE) {
            let down = self.test / TEST_MULTIPLE * TEST_MULTIPLE;
            let near = if down == 0 {
                format!("{TEST_MULTIPLE}")
            } else {
                format!("{down} or {}", down + TEST_MULTIPLE)
            };
            problems.push(
                ConfigError::new(
                    "test",
                    format!(
                        "test is {}, it must be a multiple of {TEST_MULTIPLE}: 5 question types, 8 modalities, 4 letters",
                        self.test
                    ),
                )
                .with_help(format!("use {near}")),
            );
        }
        problems
    }

    fn splits(&self) -> [(&'static str, usize); 3] {
        [("train", self.train), ("validation", self.validation), ("test", self.test)]
    }
}

/// Draws the phantoms into `out`: `Images/Phantom/*.png`, `QA_information/Open-access/Phantom.json` and
/// `splits/{train,validation,test}.json` (those that are not empty). `progress` hears how many images of how many
/// are done. A folder that was begun with the same configuration is completed; a complete one is left as it is.
///
/// # Errors
/// [`Error::Config`] for values out of range; [`Error::Usage`] when `out` holds anything else;
/// [`Error::Io`] when a file cannot be written.
pub fn generate(config: &PhantomConfig, out: &Path, progress: &mut dyn FnMut(usize, usize)) -> Result<()> {
    let problems = config.check();
    if !problems.is_empty() {
        return Err(Error::Config(problems));
    }
    let questions_file = out.join("QA_information/Open-access").join(format!("{DATASET}.json"));
    if claim(config, out)? && questions_file.is_file() {
        return Ok(());
    }
    let image_folder = out.join("Images").join(DATASET);
    for folder in [&image_folder, &out.join("QA_information/Open-access")] {
        std::fs::create_dir_all(folder)
            .map_err(|error| Error::io("cannot make the folder", folder, error))?;
    }
    let (mut pictures, mut parts, mut records) = (Vec::new(), Vec::new(), Vec::new());
    for (split_index, (name, count)) in config.splits().into_iter().enumerate() {
        let mut ids = Vec::new();
        for picture in plan::pictures(config.seed, split_index as u64, count) {
            for question in &picture.questions {
                ids.push(format!("{DATASET}_{:06}", records.len()));
                records.push(record(records.len(), pictures.len(), &picture, question));
            }
            pictures.push(picture);
        }
        if !ids.is_empty() {
            parts.push((name.to_owned(), ids));
        }
    }
    let total = pictures.len();
    for (chunk_index, chunk) in pictures.chunks(CHUNK).enumerate() {
        let first = chunk_index * CHUNK;
        progress(first, total);
        chunk.par_iter().enumerate().try_for_each(|(offset, picture)| {
            let file = out.join(image_name(first + offset));
            let png = encode(config.size, &picture.render(config))?;
            std::fs::write(&file, png).map_err(|error| Error::io("cannot write the image", &file, error))
        })?;
    }
    progress(total, total);
    split::write(&out.join("splits"), &parts)?;
    // The questions come last and in one piece: whoever finds them finds everything.
    let unfinished = questions_file.with_extension("json.part");
    let text = format!("{:#}\n", Value::from(records));
    std::fs::write(&unfinished, text)
        .map_err(|error| Error::io("cannot write the questions", &unfinished, error))?;
    std::fs::rename(&unfinished, &questions_file)
        .map_err(|error| Error::io("cannot write the questions", &questions_file, error))
}

/// Whether `out` was begun with this very configuration; a fresh folder is marked with it.
fn claim(config: &PhantomConfig, out: &Path) -> Result<bool> {
    let marker = out.join(MARKER);
    let mark = format!("{:#}\n", serde_json::to_value(config).map_err(anyhow::Error::from)?);
    if marker.is_file() {
        let found =
            std::fs::read_to_string(&marker).map_err(|error| Error::io("cannot read", &marker, error))?;
        if found == mark {
            return Ok(true);
        }
        return Err(Error::usage(format!(
            "the folder holds phantoms of another configuration\n  --> {}\n   = help: name another folder, or remove this one",
            marker.display()
        )));
    }
    std::fs::create_dir_all(out).map_err(|error| Error::io("cannot make the folder", out, error))?;
    let mut entries =
        std::fs::read_dir(out).map_err(|error| Error::io("cannot list the folder", out, error))?;
    if entries.next().is_some() {
        return Err(Error::usage(format!(
            "the folder is not empty, and what it holds are no phantoms\n  --> {}\n   = help: name an empty or new folder",
            out.display()
        )));
    }
    std::fs::write(&marker, mark).map_err(|error| Error::io("cannot write", &marker, error))?;
    Ok(false)
}

fn image_name(index: usize) -> String {
    format!("Images/{DATASET}/{index:06}.png")
}

fn record(number: usize, image: usize, picture: &Picture, question: &Question) -> Value {
    let answer = question.options[question.answer];
    json!({
        "dataset": DATASET,
        "question_id": format!("{DATASET}_{number:06}"),
        "question_type": question.kind(),
        "question": question_text(question.kind_index),
        "gt_answer": answer,
        "image_path": image_name(image),
        "option_A": question.options[0],
        "option_B": question.options[1],
        "option_C": question.options[2],
        "option_D": question.options[3],
        "modality_type": RAW_MODALITIES[picture.modality],
        "reasoning": reasoning_for(MODALITIES[picture.modality], answer),
    })
}

impl Picture {
    /// The image as 8-bit RGB, row by row.
    fn render(&self, config: &PhantomConfig) -> Vec<u8> {
        modality::render(self.modality, &self.scene, config.size, config.contrast, &mut self.stream())
    }
}

fn encode(size: usize, rgb: &[u8]) -> Result<Vec<u8>> {
    encode_rectangle(size, size, rgb)
}

fn encode_rectangle(width: usize, height: usize, rgb: &[u8]) -> Result<Vec<u8>> {
    let mut png = Vec::new();
    PngEncoder::new_with_quality(&mut png, CompressionType::Fast, FilterType::Sub)
        .write_image(rgb, width as u32, height as u32, image::ExtendedColorType::Rgb8)
        .map_err(|error| Error::Other(anyhow::Error::from(error)))?;
    Ok(png)
}

/// A contact sheet as a PNG file's bytes: one row per modality, one column per value of the four lesion questions.
///
/// # Errors
/// [`Error::Config`] for values out of range.
pub fn contact_sheet(config: &PhantomConfig) -> Result<Vec<u8>> {
    let problems = config.check();
    if !problems.is_empty() {
        return Err(Error::Config(problems));
    }
    let (size, columns, rows) = (config.size, 16, MODALITIES.len());
    let width = size * columns;
    let mut sheet = vec![0; 3 * width * size * rows];
    for cell in 0..rows * columns {
        let (row, column) = (cell / columns, cell % columns);
        let picture = Picture::example(config.seed, row, 1 + column / 4, column % 4);
        let pixels = picture.render(config);
        for y in 0..size {
            let from = 3 * y * size;
            let to = 3 * ((row * size + y) * width + column * size);
            sheet[to..to + 3 * size].copy_from_slice(&pixels[from..from + 3 * size]);
        }
    }
    encode_rectangle(width, size * rows, &sheet)
}

#[cfg(test)]
mod tests;
