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
use crate::recipes::lesson::Lesson;
use rayon::prelude::*;
use std::collections::{HashMap, HashSet};
use std::path::PathBuf;

/// Steps that are looked at; of a longer run, as many of its steps evenly spread.
const MOST_STEPS: u64 = 2000;

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
        let train = &config.train;
        let template: PromptTemplate = config.prompt.parse()?;
        let is_grpo = train.recipe.is_grpo();
        let group = if is_grpo { train.grpo.group_size } else { 1 };
        let images = if train.captions { HashMap::new() } else { sizes(subject, dataset)? };
        let is_cot = train.target == TargetName::Cot;
        let items: Vec<Item> = dataset
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
                let (image, image_bytes) = found.unwrap_or_default();
                let completion = match completion {
                    Some(length) if is_grpo => length,
                    _ => tokens(&template.target(sample, is_cot))? + 1,
                };
                // The rendered prompt holds one placeholder for each image.
                Ok(Item { prompt: rendered + image.saturating_sub(1), image, completion, image_bytes })
            })
            .collect::<Result<_>>()?;
        Self::of_items(config, subject, dataset, items, group)
    }

    fn of_items(
        config: &RunConfig,
        subject: &Subject,
        dataset: &Dataset,
        items: Vec<Item>,
        group: usize,
    ) -> Result<Self> {
        let train = &config.train;
        let images = Images::new(dataset);
        let lesson = Lesson {
            samples: &dataset.samples,
            images: &images,
            template: config.prompt.parse()?,
            config: train,
            seed: config.seed,
            features: None,
            evidence: Evidence::default(),
        };
        let (all, vision, tables) = count_parameters(&subject.config)?;
        let unit = subject.config.vision.merge_unit() as f64;
        let work = |item: &Item| match train.recipe {
            RecipeName::Denoiser => 1.0,
            _ => {
                item.rows(group) as f64 * (all - vision - tables) as f64
                    + item.image as f64 * unit * vision as f64
            }
        };
        let total = train.num_steps as u64;
        let stride = total.div_ceil(MOST_STEPS).max(1);
        let mut steps: Vec<(u64, f64)> = Vec::new();
        let (mut heaviest, mut most, mut rows) = (0, -1.0, 0);
        for step in (0..total).step_by(stride as usize) {
            let picked = lesson.picked(step);
            for part in picked.chunks(lesson.micro_batch_size()) {
                let load: f64 = part.iter().map(|&index| work(&items[index])).sum();
                if load > most {
                    (heaviest, most) = (step, load);
                }
            }
            // TRADES shows its attacked questions twice.
            let is_twice = train.recipe == RecipeName::Trades;
            let again = if is_twice { &picked[..lesson.num_attacked(step, picked.len())] } else { &[] };
            rows += picked.iter().chain(again).map(|&index| items[index].rows(group)).sum::<usize>();
            steps.push((step, picked.iter().map(|&index| work(&items[index])).sum()));
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
        let (text, deep) = (&subject.config.text, subject.config.vision.deepstack_layers.len());
        let most_tokens = items.iter().map(|item| item.image).max().unwrap_or(0);
        let feature_bytes = unique.len() * most_tokens * text.hidden_size * size_of::<f32>() * (1 + deep);
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
        let group = if config.train.recipe.is_grpo() { config.train.grpo.group_size } else { 1 };
        Self::of_items(config, subject, dataset, self.items.clone(), group)
    }

    /// The median and the largest of a count over the questions.
    pub fn median_and_most(&self, count: impl Fn(&Item) -> usize) -> (usize, usize) {
        let mut counts: Vec<usize> = self.items.iter().map(count).collect();
        counts.sort_unstable();
        (counts.get(counts.len() / 2).copied().unwrap_or(0), counts.last().copied().unwrap_or(0))
    }
}

/// Tokens of each image, and its bytes at the model's resolution; read from headers.
fn sizes(subject: &Subject, dataset: &Dataset) -> Result<HashMap<PathBuf, (usize, usize)>> {
    let unique: HashSet<&PathBuf> = dataset.samples.iter().map(|sample| &sample.image).collect();
    let unique: Vec<&PathBuf> = unique.into_iter().collect();
    let processor = &subject.processor.image_processor;
    let merge = subject.config.vision.spatial_merge_size;
    let size = |image: &PathBuf| -> Result<(PathBuf, (usize, usize))> {
        let path = dataset.root.join(image);
        let (width, height) = decode::file_size(&path)?;
        let place = |error: Error| error.at(&path.display().to_string());
        let (height, width) = processor.resized_size(height, width).map_err(place)?;
        let grid = [1, height / processor.patch_size, width / processor.patch_size];
        Ok((image.clone(), (image_tokens(grid, merge), 3 * height * width)))
    };
    unique.into_par_iter().map(size).collect()
}
