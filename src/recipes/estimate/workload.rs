//! How much a training run has to do, counted before anything is computed: tokens of every question, and of every step.

use super::subject::Subject;
use crate::data::Dataset;
use crate::data::prompt::PromptTemplate;
use crate::error::{Error, Result};
use crate::model::chat::{Message, RenderOptions};
use crate::model::positions::image_tokens;
use crate::model::truncate::count_parameters;
use crate::pixels::decode;
use crate::recipes::config::{RecipeName, RunConfig, TargetName};
use crate::recipes::failure::Evidence;
use crate::recipes::items::{CACHE_BYTES, Images};
use crate::recipes::lesson::{Exit, Lesson};
use rayon::prelude::*;
use std::collections::{HashMap, HashSet};
use std::path::{Path, PathBuf};

/// Questions that are looked at, in the order in which the steps take them: all of a run, but for one so long that it has
/// shown them many times over.
const MOST_PICKED: usize = 4_000_000;

/// One question, counted.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub struct Item {
    /// Tokens of the prompt, those of the image included.
    pub prompt: usize,
    /// Tokens of the image.
    pub image: usize,
    /// Tokens of one completion: the right one, or for GRPO the longest that is assumed.
    pub completion: usize,
    /// Bytes of the image at the model's resolution.
    pub image_bytes: usize,
    /// Height and width of the image in its file.
    pub size: [usize; 2],
}

impl Item {
    /// Rows of the decoder for `group` completions.
    pub fn rows(&self, group: usize) -> usize {
        self.prompt + group * self.completion
    }
}

/// A run, counted.
#[derive(Debug, Clone)]
pub struct Workload {
    /// Every question.
    pub items: Vec<Item>,
    /// Completions of one question.
    pub group: usize,
    /// The step (from 0) that holds the heaviest pass.
    pub heaviest: u64,
    /// Steps nearest to the mean, with what they have to do as a share of the mean.
    pub typical: Vec<(u64, f64)>,
    /// Bytes of images that the run comes to keep.
    pub image_bytes: usize,
    /// Images that it decodes.
    pub decoded: usize,
    /// Bytes of features that the run comes to keep, where its vision tower does not train.
    pub feature_bytes: usize,
    /// Whether most steps show images, untouched, whose features are known from a step before, if they are kept.
    pub repeats: bool,
    /// Tokens of all sequences of a mean step.
    pub rows_per_step: f64,
}

impl Workload {
    /// Counts the run of `config`. `completion` is the length assumed of sampled completions.
    ///
    /// # Errors
    /// When an image is missing or damaged.
    pub fn count(
        config: &RunConfig,
        subject: &Subject,
        dataset: &Dataset,
        completion: Option<usize>,
    ) -> Result<Self> {
        let items = Self::items(config, subject, dataset, completion)?;
        Self::of_items(config, subject, dataset, items)
    }

    /// Counts the questions alone, in their order.
    ///
    /// # Errors
    /// As [`Workload::count`].
    pub fn items(
        config: &RunConfig,
        subject: &Subject,
        dataset: &Dataset,
        completion: Option<usize>,
    ) -> Result<Vec<Item>> {
        let train = &config.train;
        let template: PromptTemplate = config.prompt.parse()?;
        let is_grpo = train.recipe.is_grpo();
        let images = if train.captions {
            HashMap::new()
        } else {
            let unique: HashSet<&PathBuf> = dataset.samples.iter().map(|sample| &sample.image).collect();
            pictures(subject, &dataset.root, &unique.into_iter().collect::<Vec<_>>())?
        };
        let is_cot = train.target == TargetName::Cot;
        dataset
            .samples
            .par_iter()
            .map(|sample| {
                let found = images.get(&sample.image).copied();
                let text = match found {
                    Some(_) => template.user_text(sample),
                    None => format!("{}\n{}", sample.caption(), template.user_text(sample)),
                };
                let message = match found {
                    Some(_) => Message::image_question(&text),
                    None => Message::text("user", &text),
                };
                let options = RenderOptions { add_generation_prompt: true, add_vision_id: false };
                let tokens = |text: &str| Ok::<_, Error>(subject.processor.tokenizer.encode(text)?.len());
                let rendered = tokens(&subject.processor.chat.render(&[message], options)?)?;
                let Picture { tokens: image, bytes: image_bytes, size } = found.unwrap_or_default();
                let completion = match completion {
                    Some(length) if is_grpo => length,
                    _ => tokens(&template.target(sample, is_cot))? + 1,
                };
                // The rendered prompt holds one placeholder for each image.
                Ok(Item { prompt: rendered + image.saturating_sub(1), image, completion, image_bytes, size })
            })
            .collect()
    }

    fn of_items(config: &RunConfig, subject: &Subject, dataset: &Dataset, items: Vec<Item>) -> Result<Self> {
        let train = &config.train;
        let group = group_of(config);
        let images = Images::new(dataset);
        let lesson = Lesson {
            samples: &dataset.samples,
            images: &images,
            template: config.prompt.parse()?,
            config: train,
            seed: config.seed,
            features: None,
            evidence: Evidence::default(),
            exit: Exit::default(),
        };
        let loads = if train.recipe == RecipeName::Denoiser {
            vec![1.0; items.len()]
        } else {
            loads(subject, &items, group)?
        };
        let total = train.num_steps.min((MOST_PICKED / train.batch_size).max(1)) as u64;
        let mut steps: Vec<(u64, f64)> = Vec::with_capacity(total as usize);
        let (mut heaviest, mut most, mut rows) = (0, -1.0, 0);
        for (step, picked) in (0..total).zip(lesson.picked_in_all(total)) {
            for part in picked.chunks(lesson.micro_batch_size()) {
                let load: f64 = part.iter().map(|&index| loads[index]).sum();
                if load > most {
                    (heaviest, most) = (step, load);
                }
            }
            // TRADES shows its attacked questions twice.
            let is_twice = train.recipe == RecipeName::Trades;
            let again = if is_twice { &picked[..lesson.num_attacked(step, picked.len())] } else { &[] };
            rows += picked.iter().chain(again).map(|&index| items[index].rows(group)).sum::<usize>();
            steps.push((step, picked.iter().map(|&index| loads[index]).sum()));
        }
        let count = steps.len() as f64;
        let mean = steps.iter().map(|(_, load)| load).sum::<f64>() / count;
        for (_, load) in &mut steps {
            *load /= mean;
        }
        steps.sort_by(|a, b| (a.1 - 1.0).abs().total_cmp(&(b.1 - 1.0).abs()));
        steps.truncate(16);
        let mut known = HashSet::new();
        let unique: Vec<usize> = dataset
            .samples
            .iter()
            .zip(&items)
            .filter(|(sample, item)| item.image > 0 && known.insert(&sample.image))
            .map(|(_, item)| item.image_bytes)
            .collect();
        let bytes: usize = unique.iter().sum();
        let seen = train.num_steps.saturating_mul(train.batch_size);
        let share = (seen as f64 / items.len() as f64).min(1.0);
        let is_kept = (bytes as f64 * share) as usize <= CACHE_BYTES;
        let is_untouched = !train.recipe.is_adversarial() && train.noise_sigma == 0.0;
        let most_tokens = items.iter().map(|item| item.image).max().unwrap_or(0);
        let feature_bytes = unique.len() * most_tokens * feature_bytes_of_token(subject);
        let repeats = is_untouched && feature_bytes <= config.feature_bytes() && 2 * unique.len() < seen;
        let decoded = if is_kept { (unique.len() as f64 * share) as usize } else { seen };
        Ok(Self {
            heaviest,
            typical: steps,
            image_bytes: ((bytes as f64 * share) as usize).min(CACHE_BYTES),
            decoded: if unique.is_empty() { 0 } else { decoded },
            feature_bytes: if is_untouched { feature_bytes.min(config.feature_bytes()) } else { 0 },
            repeats,
            rows_per_step: rows as f64 / count,
            items,
            group,
        })
    }

    /// The same questions under another configuration of the same recipe.
    ///
    /// # Errors
    /// As [`Workload::count`].
    pub fn under(&self, config: &RunConfig, subject: &Subject, dataset: &Dataset) -> Result<Self> {
        Self::of_items(config, subject, dataset, self.items.clone())
    }

    /// The median and the largest of a count over the questions.
    pub fn median_and_most(&self, count: impl Fn(&Item) -> usize) -> (usize, usize) {
        let mut counts: Vec<usize> = self.items.iter().map(count).collect();
        counts.sort_unstable();
        (counts.get(counts.len() / 2).copied().unwrap_or(0), counts.last().copied().unwrap_or(0))
    }
}

/// Completions of one question.
pub(in crate::recipes) fn group_of(config: &RunConfig) -> usize {
    if config.train.recipe.is_grpo() { config.train.grpo.group_size } else { 1 }
}

/// What each question costs, with `group` completions: rows times the parameters that they meet.
///
/// # Errors
/// When the model's configuration contradicts itself.
pub(super) fn loads(subject: &Subject, items: &[Item], group: usize) -> Result<Vec<f64>> {
    let (all, vision, tables) = count_parameters(&subject.config)?;
    let unit = subject.config.vision.merge_unit() as f64;
    let load = |item: &Item| {
        item.rows(group) as f64 * (all - vision - tables) as f64 + item.image as f64 * unit * vision as f64
    };
    Ok(items.iter().map(load).collect())
}

/// Bytes of what the vision tower says about one token of an image.
pub(super) fn feature_bytes_of_token(subject: &Subject) -> usize {
    let (text, deep) = (&subject.config.text, subject.config.vision.deepstack_layers.len());
    text.hidden_size * size_of::<f32>() * (1 + deep)
}

/// What the header of an image's file tells.
#[derive(Debug, Clone, Copy, Default)]
pub(in crate::recipes) struct Picture {
    /// Tokens of it.
    pub(in crate::recipes) tokens: usize,
    /// Its bytes at the model's resolution.
    bytes: usize,
    /// Height and width in the file.
    size: [usize; 2],
}

/// Looks at the headers of `images` below `root`.
///
/// # Errors
/// When one is missing, damaged, or cannot be resized.
pub(in crate::recipes) fn pictures(
    subject: &Subject,
    root: &Path,
    images: &[&PathBuf],
) -> Result<HashMap<PathBuf, Picture>> {
    let processor = &subject.processor.image_processor;
    let merge = subject.config.vision.spatial_merge_size;
    let look = |image: &&PathBuf| -> Result<(PathBuf, Picture)> {
        let path = root.join(image);
        let (width, height) = decode::file_size(&path)?;
        let place = |error: Error| error.at(&path.display().to_string());
        let size = [height, width];
        let (height, width) = processor.resized_size(height, width).map_err(place)?;
        let grid = [1, height / processor.patch_size, width / processor.patch_size];
        let tokens = image_tokens(grid, merge);
        Ok(((*image).clone(), Picture { tokens, bytes: 3 * height * width, size }))
    };
    images.par_iter().map(look).collect()
}

#[cfg(test)]
pub(in crate::recipes) mod tests {
    use super::*;
    use crate::data::Sample;
    use crate::recipes::progress::Silent;
    use crate::recipes::run::Stop;
    use crate::recipes::scratch;

    /// Questions that differ in nothing but their ids.
    pub(in crate::recipes) fn questions(count: usize) -> Vec<Sample> {
        (0..count).map(Sample::for_test).collect()
    }

    /// The model from scratch.
    pub(in crate::recipes) fn subject(samples: &[Sample]) -> Subject {
        let about = (samples, PromptTemplate::Phantom);
        Subject::open(scratch::TINY, None, about, &Stop::default(), &Silent).unwrap()
    }

    #[test]
    fn the_heaviest_step_of_a_long_run_is_found_wherever_it_stands() {
        let dataset = Dataset::new("r", questions(5001));
        let subject = subject(&dataset.samples[..10]);
        let mut config = RunConfig { prompt: "phantom".to_owned(), ..RunConfig::default() };
        config.train.num_steps = 5001;
        config.train.batch_size = 1;
        let plain = Item { prompt: 20, image: 16, completion: 4, image_bytes: 1, size: [64, 64] };
        for step in [1, 2, 3000, 4999, 5000] {
            let images = Images::new(&dataset);
            let lesson = Lesson {
                samples: &dataset.samples,
                images: &images,
                template: PromptTemplate::Phantom,
                config: &config.train,
                seed: config.seed,
                features: None,
                evidence: Evidence::default(),
                exit: Exit::default(),
            };
            let mut items = vec![plain; 5001];
            items[lesson.picked(step)[0]].prompt = 400;
            let work = Workload::of_items(&config, &subject, &dataset, items).unwrap();
            assert_eq!(work.heaviest, step);
            assert!(work.typical.iter().all(|(at, _)| *at != step));
        }
    }
}
