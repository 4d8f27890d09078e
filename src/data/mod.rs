//! Questions about images: the one [`Sample`] type, the readers that make it, and what is done with a set of them.
//!
//! [`DatasetConfig::load`] is the way in for every command: it detects the format, collects every problem with its
//! file and record before any expensive work, filters, and takes this process's shard. Runs that may leave out damaged images
//! take theirs themselves, after [`DatasetConfig::survey`]. Nothing here decodes an image or knows tokens: images stay paths, and
//! prompts stay text.

pub mod answer;
pub mod choices;
pub mod conversation;
pub mod med_r1;
pub mod omnimedvqa;
pub mod phantom;
pub mod problem;
pub mod prompt;
pub mod records;
pub mod sample;
pub mod select;
pub mod split;
pub mod stats;

use std::collections::HashMap;
use std::path::{Path, PathBuf};

use serde::{Deserialize, Serialize};

use crate::error::{Error, Result};
use crate::pixels::gray::GrayReading;
use problem::Place;
pub use problem::Problem;
pub use records::Records;
pub use sample::Sample;
pub use select::Shard;

/// Options have letters of one alphabet.
pub const MOST_OPTIONS: usize = 26;

/// The letter of an option: 0 is `A`. There are never more than [`MOST_OPTIONS`].
pub fn letter(index: usize) -> char {
    char::from(b'A' + (index % MOST_OPTIONS) as u8)
}

/// The index that an option letter stands for: `A` is 0; `None` for anything but `A` to `Z`.
pub fn index_of_letter(letter: char) -> Option<usize> {
    letter.is_ascii_uppercase().then(|| (letter as u8 - b'A') as usize)
}

/// A set of questions with the folder that their images lie under.
#[derive(Debug, Clone, PartialEq, Default)]
pub struct Dataset {
    /// Folder that every sample's `image` is relative to.
    pub root: PathBuf,
    /// The questions to work on, in the deterministic order of the source (files sorted, then file order).
    pub samples: Vec<Sample>,
    /// Questions of the restricted-access part, which comes without images: counted, never loaded.
    pub restricted: usize,
    /// How gray deeper than eight bits is read in its images.
    pub gray: GrayReading,
    /// What is wrong with the records that were left out, one or more problems each.
    pub skipped: Vec<Problem>,
    /// The selected questions before sharding; `None` when this is no shard.
    unsharded: Option<Vec<Sample>>,
    /// Where the record of each id stands, for what turns out to be wrong later. A sample itself does not say: its
    /// hash must not depend on the file's layout.
    places: HashMap<String, Place>,
}

impl Dataset {
    /// A set made elsewhere than by a reader.
    pub fn new(root: impl Into<PathBuf>, samples: Vec<Sample>) -> Self {
        Self { root: root.into(), samples, ..Self::default() }
    }

    /// Every selected question of the run, whichever shard this is: what pairs items with one another (shuffled
    /// images, a prior with one item left out) must look here, so that shards agree.
    pub fn population(&self) -> &[Sample] {
        self.unsharded.as_deref().unwrap_or(&self.samples)
    }

    /// Keeps of the selected questions those of one shard.
    pub fn take_shard(&mut self, shard: Shard) {
        let part = shard.of(&self.samples);
        self.unsharded = Some(std::mem::replace(&mut self.samples, part));
    }

    /// Refuses a selection of nothing; one shard of many may be empty.
    ///
    /// # Errors
    /// A data error.
    pub fn require_population(&self) -> Result<()> {
        if self.population().is_empty() {
            return Err(Error::data(format!(
                "no question is left after selection\n  --> {}\n   = help: check --split, --modality and --question-type against `safemed data stats`",
                self.root.display()
            )));
        }
        Ok(())
    }

    /// Where a sample's image lies.
    pub fn image_path(&self, sample: &Sample) -> PathBuf {
        self.root.join(&sample.image)
    }

    /// The problem `message` of a sample, at the place of its record; of a set that no reader made, at its image.
    pub fn problem(&self, sample: &Sample, message: impl Into<String>) -> Problem {
        let problem = match self.places.get(&sample.id) {
            Some(place) => place.problem(message),
            None => Problem::of_file(&self.image_path(sample), message),
        };
        Problem { id: Some(sample.id.clone()), ..problem }
    }

    /// Leaves out the samples whose image is no file, each with its problem.
    fn leave_out_missing_images(&mut self) {
        let missing = select::missing_images(&self.root, &self.samples);
        let (gone, there): (Vec<Sample>, Vec<Sample>) =
            std::mem::take(&mut self.samples).into_iter().partition(|sample| missing.contains(&sample.image));
        for sample in &gone {
            let message = format!("image file is missing: {}", self.image_path(sample).display());
            let problem = self.problem(sample, message);
            self.skipped.push(problem);
        }
        self.samples = there;
    }
}

/// What loading does about image files.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum ImageCheck {
    /// Every selected image must be there: a missing one is a problem of its record.
    Exist,
    /// Images are not needed (statistics, priors).
    Ignore,
}

/// Which questions to work on.
#[derive(Debug, Clone, PartialEq, Default, Serialize, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct DatasetConfig {
    /// Root of OmniMedVQA (or a folder with one inside). Beside `data` it is the root of that file's images.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub omnimedvqa: Option<PathBuf>,
    /// A file or folder of any supported format, each file a JSON array or JSON lines, detected by its content.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub data: Option<PathBuf>,
    /// JSON list of question ids to keep; looked up as given, then under the data root.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub split: Option<PathBuf>,
    /// JSON list of the ids that count for the option prior; looked up like `split`.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub train_split: Option<PathBuf>,
    /// Keep one modality: a name such as `CT`, or the file's own spelling.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub modality: Option<String>,
    /// Keep one question type, such as `Disease Diagnosis`.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub question_type: Option<String>,
    /// Keep the first so many questions of what is left. At least 1.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub limit: Option<usize>,
    /// Keep part `I/N` of what is left, `I` from 0 to `N - 1`: every N-th question by order of id.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub shard: Option<Shard>,
    /// Leave out records that have a problem, and count them, instead of refusing the data.
    #[serde(skip_serializing_if = "std::ops::Not::not")]
    pub skip_invalid: bool,
    /// How gray deeper than eight bits is read in images.
    #[serde(skip)]
    pub gray: GrayReading,
}

impl DatasetConfig {
    /// Reads, checks and selects.
    ///
    /// Order: records with problems go first, then `split`, `modality`, `question_type`, images that are missing,
    /// `limit`, and last `shard`. What is wrong is refused as a whole, or left out with `skip_invalid`.
    ///
    /// # Errors
    /// [`Error::Usage`] when no source is named or a filter matches nothing there is; [`Error::Data`] with every
    /// problem of the files and of the images at once.
    pub fn load(&self, images: ImageCheck) -> Result<Dataset> {
        let dataset = self.survey(images)?;
        if !self.skip_invalid {
            problem::refuse(&dataset.skipped)?;
        }
        dataset.require_population()?;
        Ok(dataset)
    }

    /// As [`Self::load`], but what is wrong is only left out and told in `skipped`, even without `skip_invalid`, and no
    /// question need be left: for callers that look for more before they refuse.
    ///
    /// # Errors
    /// [`Error::Usage`] when no source is named or a filter matches nothing there is; [`Error::Data`] when the split
    /// is wrong; of either, without `skip_invalid`, first the problems of the records, which may be the reason.
    pub fn survey(&self, images: ImageCheck) -> Result<Dataset> {
        if self.limit == Some(0) {
            return Err(Error::usage(
                "`limit` is 0: no question would be left\n   = help: leave it out to take all",
            ));
        }
        let mut dataset = self.read_source()?;
        if let Err(error) = self.select(&mut dataset) {
            if !self.skip_invalid {
                problem::refuse(&dataset.skipped)?;
            }
            return Err(error);
        }
        if images == ImageCheck::Exist {
            dataset.leave_out_missing_images();
        }
        if let Some(limit) = self.limit {
            dataset.samples.truncate(limit);
        }
        if let Some(shard) = self.shard {
            dataset.take_shard(shard);
        }
        Ok(dataset)
    }

    /// The questions of `train_split` from the same source, for the option prior; `None` when none is named.
    ///
    /// # Errors
    /// As [`Self::load`].
    pub fn load_train(&self) -> Result<Option<Dataset>> {
        let Some(split) = &self.train_split else { return Ok(None) };
        let config = Self {
            split: Some(split.clone()),
            train_split: None,
            modality: None,
            question_type: None,
            limit: None,
            shard: None,
            ..self.clone()
        };
        config.load(ImageCheck::Ignore).map(Some)
    }

    fn read_source(&self) -> Result<Dataset> {
        let images_root = self.omnimedvqa.as_deref();
        let reading = match (&self.data, images_root) {
            (Some(data), _) => read(data, images_root)?,
            (None, Some(root)) => read(root, None)?,
            (None, None) => {
                return Err(Error::usage(
                    "no data is named\n   = help: give `--omnimedvqa ROOT` or `--data PATH`; `safemed data phantom --out DIR` makes some",
                ));
            }
        };
        Ok(Dataset {
            root: reading.root,
            samples: reading.samples,
            restricted: reading.restricted,
            gray: self.gray,
            skipped: reading.problems,
            unsharded: None,
            places: reading.places,
        })
    }

    fn select(&self, dataset: &mut Dataset) -> Result<()> {
        if let Some(split) = &self.split {
            let samples = std::mem::take(&mut dataset.samples);
            dataset.samples = select::by_split(samples, &locate(split, &dataset.root), &dataset.skipped)?;
        }
        select::by_modality(&mut dataset.samples, self.modality.as_deref())?;
        select::by_question_type(&mut dataset.samples, self.question_type.as_deref())
    }
}

/// A file as it is given, else under the data root.
fn locate(file: &Path, root: &Path) -> PathBuf {
    let under_root = root.join(file);
    if !file.exists() && under_root.exists() { under_root } else { file.to_path_buf() }
}

/// What a reader found: good records and problems side by side.
#[derive(Debug, Clone, Default)]
pub struct Reading {
    /// Folder that images are relative to.
    pub root: PathBuf,
    /// The records without a problem.
    pub samples: Vec<Sample>,
    /// Restricted-access questions, counted only.
    pub restricted: usize,
    /// Everything that is wrong with the other records.
    pub problems: Vec<Problem>,
    /// Where each id was met first.
    places: HashMap<String, Place>,
}

impl Reading {
    /// Takes what became of the record at zero-based `index`: a sample whose id is new, or problems.
    fn take(
        &mut self,
        index: usize,
        result: std::result::Result<Sample, Vec<String>>,
        collector: &mut problem::Collector<'_>,
    ) {
        let sample = match result {
            Ok(sample) => sample,
            Err(messages) => {
                self.problems.extend(messages.into_iter().map(|message| collector.problem(index, message)));
                return;
            }
        };
        if let Some(Place { file, record, .. }) = self.places.get(&sample.id) {
            let message = format!("id stands twice: also {}: record {record}", file.display());
            self.problems.push(collector.problem(index, message));
            return;
        }
        self.places.insert(sample.id.clone(), collector.place(index));
        self.samples.push(sample);
    }
}

/// Reads `path` in any supported format, refusing data with problems; images are not looked at.
///
/// # Errors
/// [`Error::Data`] when the path or format is unknown, or any record has a problem.
pub fn load(path: &Path) -> Result<Dataset> {
    DatasetConfig { data: Some(path.to_path_buf()), ..DatasetConfig::default() }.load(ImageCheck::Ignore)
}

/// Reads `path` in any supported format: an OmniMedVQA root, one of its files, a Med-R1 split file, a file of conversations
/// or chat messages, or a folder of such files, each a JSON array or JSON lines. `images_root` says where images lie when the path itself does not tell.
///
/// # Errors
/// [`Error::Data`] when nothing of a supported format is there.
pub fn read(path: &Path, images_root: Option<&Path>) -> Result<Reading> {
    if !path.exists() {
        return Err(Error::data(format!(
            "there is no such data\n  --> {}\n   = help: name an OmniMedVQA folder (it holds `QA_information` and `Images`) or a JSON file",
            path.display()
        )));
    }
    let root_of_images = images_root.map(|root| omnimedvqa::find_root(root).unwrap_or(root.to_path_buf()));
    if path.is_file() {
        return read_files(&[path.to_path_buf()], root_of_images.unwrap_or_else(|| guess_root(path)));
    }
    if let Some(root) = omnimedvqa::find_root(path) {
        return omnimedvqa::read(&root);
    }
    let files = records::files_in(path)?;
    if files.is_empty() {
        return Err(Error::data(format!(
            "no supported data in this folder: neither `QA_information/Open-access` nor any `.json` or `.jsonl` file\n  --> {}\n   = help: name the folder that holds `QA_information` and `Images`",
            path.display()
        )));
    }
    read_files(&files, root_of_images.unwrap_or_else(|| guess_root(&files[0])))
}

fn read_files(files: &[PathBuf], root: PathBuf) -> Result<Reading> {
    let mut reading = Reading { root, ..Reading::default() };
    for file in files {
        let Some(records) = records::read(file, &mut reading.problems)? else { continue };
        let has = |key: &str| records.has(key);
        if has("conversations") || has("messages") || (has("prompt") && has("completion")) {
            conversation::read_records(&records, &mut reading);
        } else if has("problem") && has("solution") {
            med_r1::read_records(&records, &mut reading);
        } else if has("gt_answer") || has("question_id") {
            omnimedvqa::read_records(&records, &mut reading);
        } else {
            let keys = records.iter().next().and_then(|(_, record)| record.as_object());
            let keys = keys.map(|map| map.keys().map(String::as_str).collect::<Vec<_>>().join(", "));
            reading.problems.push(Problem::of_file(
                file,
                format!(
                    "format not recognised: its first record has the keys [{}]; supported are OmniMedVQA (`question_id`, `gt_answer`, ...), Med-R1 splits (`image`, `problem`, `solution`), LLaVA or ShareGPT (`image`, `conversations`) and chat messages (`messages`, or `prompt` and `completion`, with `images`)",
                    keys.unwrap_or_default()
                ),
            ));
        }
    }
    Ok(reading)
}

/// The folder that a question file's images are most likely relative to: the root around `QA_information`, else the
/// nearest ancestor with an `Images` folder, else the file's own folder.
fn guess_root(file: &Path) -> PathBuf {
    let parent = file.parent().unwrap_or(Path::new("."));
    let own = if parent.as_os_str().is_empty() { Path::new(".") } else { parent };
    let around = own.ancestors().find(|folder| folder.ends_with("QA_information")).and_then(Path::parent);
    around
        .or_else(|| own.ancestors().find(|folder| folder.join("Images").is_dir()))
        .unwrap_or(own)
        .to_path_buf()
}

#[cfg(test)]
mod tests;
