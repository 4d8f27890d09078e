//! Questions ready for the model: images decoded and resized once, prompts and targets in tokens.

use super::config::{RecipeName, RunConfig, TargetName};
use super::progress::Progress;
use super::run::Stop;
use crate::data::prompt::PromptTemplate;
use crate::data::{Dataset, DatasetConfig, ImageCheck, Problem, Sample};
use crate::error::{Error, Result};
use crate::model::assistant::Assistant;
use crate::model::generate::Prompt;
use crate::model::processor::ProcessedImage;
use crate::nn::rows;
use crate::pixels::gray::GrayReading;
use crate::pixels::{RgbImage8, decode};
use candle_core::Tensor;
use rayon::prelude::*;
use std::collections::{BTreeMap, BTreeSet, HashMap};
use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex, PoisonError};

/// Bytes of decoded images kept in memory.
pub const CACHE_BYTES: usize = 2 << 30;

/// Decoded and processed images of a data set.
#[derive(Debug)]
pub struct Images {
    root: PathBuf,
    gray: GrayReading,
    /// How each image's numbers became eight bits.
    readings: Mutex<HashMap<PathBuf, String>>,
    cache: Mutex<(HashMap<PathBuf, Arc<ProcessedImage>>, usize)>,
    hashes: Mutex<HashMap<PathBuf, String>>,
}

impl Images {
    /// The images of `dataset`.
    pub fn new(dataset: &Dataset) -> Self {
        Self {
            root: dataset.root.clone(),
            gray: dataset.gray,
            readings: Mutex::default(),
            cache: Mutex::default(),
            hashes: Mutex::default(),
        }
    }

    /// The file as it is, in eight bits.
    ///
    /// # Errors
    /// When it is missing or damaged.
    pub fn original(&self, image: &Path) -> Result<RgbImage8> {
        let decoded = decode::read_file(&self.root.join(image), self.gray)?;
        let mut readings = self.readings.lock().unwrap_or_else(PoisonError::into_inner);
        readings.insert(image.to_path_buf(), decoded.reading);
        Ok(decoded.image)
    }

    /// SHA-256 of the picture in the file, as [`RgbImage8::sha256`] has it: what certificates call `image_sha256`.
    ///
    /// # Errors
    /// When it is missing or damaged.
    pub fn sha256(&self, image: &Path) -> Result<String> {
        let locked = || self.hashes.lock().unwrap_or_else(PoisonError::into_inner);
        if let Some(found) = locked().get(image) {
            return Ok(found.clone());
        }
        let hash = self.original(image)?.sha256();
        locked().insert(image.to_path_buf(), hash.clone());
        Ok(hash)
    }

    /// How the image's numbers became eight bits, in words; it has been read before.
    pub fn reading(&self, image: &Path) -> String {
        let readings = self.readings.lock().unwrap_or_else(PoisonError::into_inner);
        readings.get(image).cloned().unwrap_or_default()
    }

    /// The file `image`, decoded already, as the network takes it.
    ///
    /// # Errors
    /// When it cannot be resized: the file is named.
    pub fn process(
        &self,
        assistant: &Assistant,
        image: &Path,
        decoded: &RgbImage8,
    ) -> Result<ProcessedImage> {
        assistant.process(decoded).map_err(|error| match error {
            Error::Data(what) if !what.contains("-->") => {
                Error::data(format!("{what}\n  --> {}", self.root.join(image).display()))
            }
            other => other,
        })
    }

    /// The image at the model's resolution.
    ///
    /// # Errors
    /// When it is missing, damaged, or cannot be resized.
    pub fn processed(&self, assistant: &Assistant, image: &Path) -> Result<Arc<ProcessedImage>> {
        let locked = || self.cache.lock().unwrap_or_else(PoisonError::into_inner);
        if let Some(found) = locked().0.get(image) {
            return Ok(found.clone());
        }
        let processed = Arc::new(self.process(assistant, image, &self.original(image)?)?);
        let mut cache = locked();
        if cache.1 + processed.resized.data.len() <= CACHE_BYTES {
            cache.1 += processed.resized.data.len();
            cache.0.insert(image.to_path_buf(), processed.clone());
        }
        Ok(processed)
    }

    /// Bytes of the images that are kept at the model's resolution.
    pub fn kept_bytes(&self) -> usize {
        self.cache.lock().unwrap_or_else(PoisonError::into_inner).1
    }

    /// The images of `samples`, in order, decoded in parallel.
    ///
    /// # Errors
    /// As [`Images::processed`], for the first sample that fails.
    pub fn of_samples<'a>(
        &self,
        assistant: &Assistant,
        samples: impl IntoParallelIterator<Item = &'a Sample, Iter: IndexedParallelIterator>,
    ) -> Result<Vec<Arc<ProcessedImage>>> {
        samples.into_par_iter().map(|sample| self.processed(assistant, &sample.image)).collect()
    }
}

/// The questions that `config` names whose records and images are sound; in `skipped` all that is wrong with the others, from
/// records that cannot be read to images that cannot be decoded.
///
/// # Errors
/// Those of [`DatasetConfig::survey`]; when asked to stop.
pub fn survey(config: &DatasetConfig, stop: &Stop, progress: &dyn Progress) -> Result<Dataset> {
    let mut dataset = config.survey(ImageCheck::Exist)?;
    leave_out_damaged(&mut [&mut dataset], |_| (), stop, progress)?;
    Ok(dataset)
}

/// Image files that were decoded, by what came of it.
#[derive(Debug)]
pub struct Decoded<T> {
    /// What was seen in those that show something.
    pub seen: BTreeMap<PathBuf, T>,
    /// Those that cannot be read.
    pub damaged: BTreeSet<PathBuf>,
}

/// Leaves out the questions whose images cannot be read, each image with its problem: a run of days must not find them on its
/// way. An image that several of the sets show is decoded once; `look` is shown it.
///
/// # Errors
/// When asked to stop.
pub fn leave_out_damaged<T: Send>(
    datasets: &mut [&mut Dataset],
    look: impl Fn(&RgbImage8) -> T + Sync,
    stop: &Stop,
    progress: &dyn Progress,
) -> Result<Decoded<T>> {
    let mut seen = BTreeMap::new();
    let mut damaged = BTreeMap::new();
    for (image, found) in decode_all(datasets, look, stop, progress)? {
        match found {
            Ok(what) => drop(seen.insert(image, what)),
            Err(problem) => drop(damaged.insert(image, problem)),
        }
    }
    for dataset in datasets {
        let gone = leave_out(dataset, |image| damaged.contains_key(image));
        dataset.skipped.extend(gone.iter().filter_map(|image| damaged.get(image)).cloned());
    }
    Ok(Decoded { seen, damaged: damaged.into_keys().collect() })
}

/// Leaves out the questions about image files that `is_gone` names; gives those files.
pub fn leave_out(dataset: &mut Dataset, is_gone: impl Fn(&PathBuf) -> bool) -> BTreeSet<PathBuf> {
    let mut gone = BTreeSet::new();
    let root = dataset.root.clone();
    dataset.samples.retain(|sample| {
        let image = root.join(&sample.image);
        let stays = !is_gone(&image);
        if !stays {
            gone.insert(image);
        }
        stays
    });
    gone
}

/// The first question about an image, of its data set, and how many there are.
type Shown<'a> = (&'a Dataset, &'a Sample, usize);

/// What was seen in an image file, or why nothing was.
type Looked<T> = std::result::Result<T, Problem>;

/// The image files of the sets, each decoded once: what `look` sees in it, or the problem of one that cannot be read, at the
/// place of the first question about it.
fn decode_all<T: Send>(
    datasets: &[&mut Dataset],
    look: impl Fn(&RgbImage8) -> T + Sync,
    stop: &Stop,
    progress: &dyn Progress,
) -> Result<Vec<(PathBuf, Looked<T>)>> {
    let mut files: BTreeMap<PathBuf, Shown<'_>> = BTreeMap::new();
    for dataset in datasets {
        let dataset: &Dataset = dataset;
        for sample in &dataset.samples {
            files.entry(dataset.image_path(sample)).or_insert((dataset, sample, 0)).2 += 1;
        }
    }
    let mut found = Vec::with_capacity(files.len());
    if files.is_empty() {
        return Ok(found);
    }
    let files: Vec<_> = files.into_iter().collect();
    let decode = |(file, (dataset, first, count)): &(PathBuf, Shown<'_>)| {
        let seen = decode::decode_file(file).map(|image| look(&image)).map_err(|error| {
            let text = error.to_string();
            let what = text.lines().next().unwrap_or_default();
            let more = match *count {
                1 => String::new(),
                n => format!(", the image of {n} questions"),
            };
            dataset.problem(first, format!("{what} ({}{more})", file.display()))
        });
        (file.clone(), seen)
    };
    progress.start(files.len(), 0, "decode images");
    for (done, chunk) in files.chunks(256).enumerate() {
        stop.check()?;
        found.par_extend(chunk.par_iter().map(decode));
        progress.tick((256 * done + chunk.len()).min(files.len()), &[]);
    }
    progress.finish();
    Ok(found)
}

/// Pixels of images in order, neighbours of one size in one tensor `[n, 3, height, width]` in [0, 1].
///
/// # Errors
/// When the device has no room.
pub fn stack(assistant: &Assistant, images: &[Arc<ProcessedImage>]) -> Result<Vec<Tensor>> {
    let mut tensors = Vec::new();
    for run in images.chunk_by(|a, b| same_size(a, b)) {
        let (height, width) = (run[0].resized.height, run[0].resized.width);
        let plane = height * width;
        let mut values = vec![0f32; run.len() * 3 * plane];
        values.par_chunks_mut(3 * plane).zip(run).for_each(|(out, image)| {
            for (i, rgb) in image.resized.data.chunks_exact(3).enumerate() {
                for (c, value) in rgb.iter().enumerate() {
                    out[c * plane + i] = f32::from(*value) / 255.0;
                }
            }
        });
        tensors.push(Tensor::from_vec(values, (run.len(), 3, height, width), assistant.vlm.device())?);
    }
    Ok(tensors)
}

/// The images at the places `keep` (ascending) of a list of tensors `[n, 3, height, width]`, in order.
///
/// # Errors
/// When the device has no room.
pub fn pick(pixels: &[Tensor], keep: &[usize]) -> Result<Vec<Tensor>> {
    let mut picked = Vec::new();
    let mut start = 0;
    for tensor in pixels {
        let count = tensor.dim(0)?;
        let own: Vec<u32> = keep
            .iter()
            .filter(|&&g| (start..start + count).contains(&g))
            .map(|&g| (g - start) as u32)
            .collect();
        if !own.is_empty() {
            let (_, channels, height, width) = tensor.dims4()?;
            let flat = rows::select(&tensor.reshape((count, ()))?, &own)?;
            picked.push(flat.reshape((own.len(), channels, height, width))?);
        }
        start += count;
    }
    Ok(picked)
}

fn same_size(a: &ProcessedImage, b: &ProcessedImage) -> bool {
    (a.resized.height, a.resized.width) == (b.resized.height, b.resized.width)
}

/// The prompt of a sample about its image.
///
/// # Errors
/// When the question contains an image placeholder.
pub fn prompt_of(
    assistant: &Assistant,
    template: PromptTemplate,
    sample: &Sample,
    image: &ProcessedImage,
) -> Result<Prompt> {
    assistant.prompt(&template.user_text(sample), Some(image.grid))
}

/// The prompt of a sample with what is seen in words instead of the image.
///
/// # Errors
/// As [`prompt_of`].
pub fn caption_prompt_of(assistant: &Assistant, template: PromptTemplate, sample: &Sample) -> Result<Prompt> {
    assistant.prompt(&format!("{}\n{}", sample.caption(), template.user_text(sample)), None)
}

/// How far a training has reasonings to go by.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Reasonings {
    /// Whether they are learnt; otherwise they are what an adversary aims at.
    is_learnt: bool,
    /// Questions whose reasoning is a made-up sentence ([`Sample::reasoning_text`]).
    made_up: usize,
    /// Questions whose reasoning gives way to one whenever their options change places.
    replaced: usize,
    /// Questions.
    total: usize,
}

impl Reasonings {
    /// Counts what `config` would train with; nothing where no reasoning has a part in it.
    pub fn of(config: &RunConfig, samples: &[Sample]) -> Self {
        let train = &config.train;
        let is_learnt = matches!(train.recipe, RecipeName::Sft | RecipeName::AtSft);
        let is_aim = train.recipe == RecipeName::AtGrpo;
        let counts = train.target == TargetName::Cot && (is_learnt || is_aim);
        let count =
            |is_one: fn(&Sample) -> bool| samples.iter().filter(|sample| counts && is_one(sample)).count();
        Self {
            is_learnt,
            made_up: count(|sample| sample.reasoning.is_none()),
            replaced: if train.permute_options { count(Sample::reasons_with_letters) } else { 0 },
            total: samples.len(),
        }
    }

    /// What a reader should know before the training.
    pub fn notes(&self, samples: &[Sample]) -> Vec<String> {
        let Self { is_learnt, made_up, replaced, total } = *self;
        let mut notes = Vec::new();
        if made_up > 0 {
            let example = samples.iter().find(|sample| sample.reasoning.is_none());
            let example = example.map_or_else(String::new, Sample::reasoning_text);
            let use_of_it = if is_learnt { "is learnt" } else { "is what the adversary aims at" };
            notes.push(format!(
                "{made_up} of {total} questions have no reasoning of their own: a made-up sentence {use_of_it}, such as `{example}`, which says what is right and not why; give them a field `reasoning` (or `think`, `cot`), or set `train.target = \"instruct\"`"
            ));
        }
        if replaced > 0 {
            notes.push(format!(
                "{replaced} of {total} reasonings hold single letters that may name options (the article `A` counts): wherever `permute_options` moves the options of such a question, a made-up sentence takes the place of its reasoning"
            ));
        }
        notes
    }

    /// What provenance keeps: names and counts that are not 0.
    pub fn counts(&self) -> impl Iterator<Item = (&'static str, usize)> {
        [("made_up_reasonings", self.made_up), ("replaceable_reasonings", self.replaced)]
            .into_iter()
            .filter(|(_, count)| *count > 0)
    }
}

/// Questions and images of a data set, or a clear refusal of an empty one.
///
/// # Errors
/// When there is no question.
pub fn require_some(dataset: &Dataset, what: &str) -> Result<()> {
    if dataset.samples.is_empty() {
        return Err(Error::data(format!(
            "no question to {what}\n  --> {}\n   = help: loosen --split, --modality, --question-type or --limit",
            dataset.root.display()
        )));
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::data::problem;
    use crate::pixels::decode::encode_png;
    use serde_json::json;
    use std::fs;

    /// How many images each bar was begun for.
    #[derive(Default)]
    struct Bars(Mutex<Vec<usize>>);

    impl Progress for Bars {
        fn start(&self, total: usize, _done: usize, _what: &str) {
            self.0.lock().unwrap().push(total);
        }
        fn tick(&self, _done: usize, _figures: &[(&str, f64)]) {}
        fn note(&self, _text: &str) {}
        fn row(&self, _cells: &[String]) {}
    }

    #[test]
    fn bad_records_missing_images_and_damaged_ones_are_told_in_one_list_with_their_places() {
        let dir = tempfile::tempdir().unwrap();
        let record = |id: &str, image: &str, answer: &str| {
            json!({
                "question_id": id, "question": "What?", "question_type": "Disease Diagnosis", "modality_type": "CT",
                "image_path": image, "gt_answer": answer, "option_A": "cyst", "option_B": "None",
            })
            .to_string()
        };
        let records = [
            record("q0", "sound.png", "cyst"),
            record("q1", "torn.png", "cyst"),
            record("q2", "sound.png", "mass"),
            record("q3", "gone.png", "cyst"),
            record("q4", "torn.png", "None"),
        ];
        let questions = dir.path().join("q.json");
        fs::write(&questions, format!("[\n{}\n]", records.join(",\n"))).unwrap();
        let png = encode_png(&RgbImage8::filled(8, 8, [9; 3]).unwrap()).unwrap();
        fs::write(dir.path().join("sound.png"), &png).unwrap();
        fs::write(dir.path().join("torn.png"), &png[..png.len() / 2]).unwrap();

        let config = DatasetConfig { data: Some(questions), ..DatasetConfig::default() };
        let bars = Bars::default();
        let left = survey(&config, &Stop::default(), &bars).unwrap();
        assert_eq!((left.samples.len(), left.skipped.len()), (1, 3));
        assert_eq!(*bars.0.lock().unwrap(), [2]);
        let text = problem::refuse(&left.skipped).unwrap_err().to_string();
        assert!(text.starts_with("3 problems in the data"), "{text}");
        let torn = format!("({}, the image of 2 questions)", dir.path().join("torn.png").display());
        for words in [
            "q.json:4: record 3 (`q2`): `gt_answer` is none of the options",
            "q.json:5: record 4 (`q3`): image file is missing: ",
            "q.json:3: record 2 (`q1`): the image cannot be decoded",
            torn.as_str(),
        ] {
            assert!(text.contains(words), "{words}\n---\n{text}");
        }
        // Nothing may be left: whoever asks says what that means. No bar is drawn for no image.
        fs::remove_file(dir.path().join("sound.png")).unwrap();
        fs::remove_file(dir.path().join("torn.png")).unwrap();
        let bars = Bars::default();
        let left = survey(&config, &Stop::default(), &bars).unwrap();
        assert_eq!((left.samples.len(), left.skipped.len()), (0, 5));
        assert_eq!(*bars.0.lock().unwrap(), [0; 0]);
    }

    #[test]
    fn a_damaged_image_of_two_sets_is_decoded_once_and_its_questions_leave_both() {
        let dir = tempfile::tempdir().unwrap();
        fs::write(dir.path().join("0.png"), "none").unwrap();
        let png = encode_png(&RgbImage8::filled(8, 8, [9; 3]).unwrap()).unwrap();
        fs::write(dir.path().join("1.png"), png).unwrap();
        let [mut trained, mut asked] =
            [[0, 1], [1, 0]].map(|of| Dataset::new(dir.path(), of.map(Sample::for_test).to_vec()));
        let bars = Bars::default();
        let decoded =
            leave_out_damaged(&mut [&mut trained, &mut asked], |image| image.width, &Stop::default(), &bars);
        let Decoded { seen, damaged } = decoded.unwrap();
        assert_eq!(*bars.0.lock().unwrap(), [2]);
        assert_eq!(
            (seen, damaged),
            ([(dir.path().join("1.png"), 8)].into(), [dir.path().join("0.png")].into())
        );
        for left in [&trained, &asked] {
            assert_eq!(left.samples, [Sample::for_test(1)]);
            let [problem] = left.skipped.as_slice() else { panic!("{:?}", left.skipped) };
            assert!(problem.message.contains("the image of 2 questions"), "{problem}");
        }
        assert_eq!(trained.skipped, asked.skipped);
    }
}
