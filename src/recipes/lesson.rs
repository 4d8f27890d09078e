//! What every training recipe shares: which questions a step takes, their images and targets.

use super::config::{NormName, ObjectiveName, TargetName, TrainConfig};
use super::failure::{Evidence, Noted};
use super::fit::{Fit, Student};
use super::items::{self, Images};
use super::run::Stop;
use crate::attack::{NoiseBank, Norm};
use crate::data::Sample;
use crate::data::prompt::PromptTemplate;
use crate::error::{Error, Result};
use crate::model::assistant::Assistant;
use crate::model::generate::Prompt;
use crate::model::processor::ProcessedImage;
use crate::model::vlm::Features;
use crate::nn::dropout::{Active, Draw};
use crate::reward::Format;
use crate::rng;
use crate::roles::features::FeatureCache;
use crate::roles::policy::{self, Scoring};
use candle_core::Tensor;
use rand::seq::SliceRandom;
use std::cell::Cell;
use std::sync::Arc;

/// A training run's material.
#[derive(Debug)]
pub struct Lesson<'a> {
    /// The questions.
    pub samples: &'a [Sample],
    /// Their images.
    pub images: &'a Images,
    /// How they are asked.
    pub template: PromptTemplate,
    /// The settings.
    pub config: &'a TrainConfig,
    /// Seed of every stream.
    pub seed: u64,
    /// What a vision tower that does not train said about clean images; none when it trains.
    pub features: Option<FeatureCache>,
    /// What the present step works on, for the report of its failure.
    pub evidence: Evidence,
    /// Whether the present step may be left.
    pub exit: Exit,
}

/// The way out of a step that someone asks to stop: open until its first update, for nothing has moved until then, and a step
/// that is left begins anew when the run goes on.
#[derive(Debug, Default)]
pub struct Exit {
    stop: Stop,
    is_closed: Cell<bool>,
}

impl Exit {
    /// An open one.
    pub fn new(stop: Stop) -> Self {
        Self { stop, is_closed: Cell::new(false) }
    }

    /// Nothing has moved.
    pub fn open(&self) {
        self.is_closed.set(false);
    }

    /// From here on the step goes on to its end.
    pub fn close(&self) {
        self.is_closed.set(true);
    }

    /// Whether the step is to be left now.
    pub fn is_wanted(&self) -> bool {
        self.stop.requested() && !self.is_closed.get()
    }

    /// [`Error::Stopped`] when the step is to be left now.
    pub fn check(&self) -> Result<()> {
        if self.is_wanted() { Err(Error::Stopped) } else { Ok(()) }
    }
}

/// The questions of one step.
#[derive(Debug)]
pub struct Questions {
    /// With their options in this step's order.
    pub samples: Vec<Sample>,
    /// In tokens.
    pub prompts: Vec<Prompt>,
    /// The right completion of each, in tokens.
    pub targets: Vec<Vec<u32>>,
    /// At the model's resolution; none when captions stand in.
    pub images: Vec<Arc<ProcessedImage>>,
}

impl Lesson<'_> {
    /// Whether completions carry a reasoning.
    pub fn is_cot(&self) -> bool {
        self.config.target == TargetName::Cot
    }

    /// The form of a right completion.
    pub fn format(&self) -> Format {
        match (self.template, self.is_cot()) {
            (PromptTemplate::Plain, false) => Format::Letter,
            (_, false) => Format::AnswerOnly,
            (PromptTemplate::ThinkAfter, true) => Format::AnswerThenThink,
            (_, true) => Format::ThinkThenAnswer,
        }
    }

    /// The questions of step `step` (from 0): each epoch is a permutation of its own, so that a step is a function of
    /// its number alone.
    ///
    /// # Errors
    /// When an image is missing or damaged.
    pub fn questions(&self, assistant: &Assistant, step: u64) -> Result<Questions> {
        let samples: Vec<Sample> = self
            .picked(step)
            .into_iter()
            .enumerate()
            .map(|(place, index)| {
                let sample = &self.samples[index];
                if !self.config.permute_options {
                    return sample.clone();
                }
                let mut permutation: Vec<usize> = (0..sample.options.len()).collect();
                permutation.shuffle(&mut rng::stream(self.seed, "options", &[step, place as u64]));
                sample.with_options_permuted(&permutation)
            })
            .collect();
        let images = if self.config.captions {
            Vec::new()
        } else {
            self.images.of_samples(assistant, samples.as_slice())?
        };
        let prompts = samples
            .iter()
            .enumerate()
            .map(|(i, sample)| match images.get(i) {
                Some(image) => items::prompt_of(assistant, self.template, sample, image),
                None => items::caption_prompt_of(assistant, self.template, sample),
            })
            .collect::<Result<_>>()?;
        let targets = samples
            .iter()
            .map(|sample| assistant.target(&self.template.target(sample, self.is_cot())))
            .collect::<Result<_>>()?;
        let questions = Questions { samples, prompts, targets, images };
        self.evidence.note(|noted| {
            *noted = Noted {
                phase: "data",
                samples: questions.samples.clone(),
                prompts: questions.prompts.clone(),
                targets: questions.targets.clone(),
                images: questions.images.clone(),
                ..Noted::default()
            };
        });
        Ok(questions)
    }

    /// The images of the questions of step `step`.
    ///
    /// # Errors
    /// When an image is missing or damaged.
    pub fn images_of(&self, assistant: &Assistant, step: u64) -> Result<Vec<Arc<ProcessedImage>>> {
        let picked: Vec<&Sample> = self.picked(step).into_iter().map(|index| &self.samples[index]).collect();
        self.images.of_samples(assistant, picked)
    }

    /// Indices of the questions of step `step`.
    pub fn picked(&self, step: u64) -> Vec<usize> {
        self.picked_by(step, &mut (u64::MAX, Vec::new()))
    }

    /// The same for each of the first `steps` steps, with the order of an epoch drawn once for all of its steps.
    pub fn picked_in_all(&self, steps: u64) -> impl Iterator<Item = Vec<usize>> {
        let mut order = (u64::MAX, Vec::new());
        (0..steps).map(move |step| self.picked_by(step, &mut order))
    }

    /// The same for one step; `order` is the last epoch whose order was drawn, and that order.
    fn picked_by(&self, step: u64, order: &mut (u64, Vec<usize>)) -> Vec<usize> {
        let (count, size) = (self.samples.len(), self.config.batch_size);
        let mut picked: Vec<usize> = Vec::with_capacity(size);
        for at in step * size as u64..(step + 1) * size as u64 {
            let epoch = at / count as u64;
            if order.0 != epoch {
                let mut permutation: Vec<usize> = (0..count).collect();
                permutation.shuffle(&mut rng::stream(self.seed, "order", &[epoch]));
                *order = (epoch, permutation);
            }
            picked.push(order.1[(at % count as u64) as usize]);
        }
        picked
    }

    /// Features of images that come back, remembered where the vision tower does not train.
    ///
    /// # Errors
    /// When a size does not fit.
    pub fn features_of(&self, assistant: &Assistant, pixels: &[Tensor]) -> Result<Features> {
        match &self.features {
            Some(cache) => cache.encode(assistant, pixels),
            None => policy::encode(assistant, pixels),
        }
    }

    /// Adds to an error of data or numbers which step (from 0) and questions it is about.
    pub fn located(&self, error: Error, step: u64) -> Error {
        let ids: Vec<String> =
            self.picked(step).into_iter().map(|index| format!("`{}`", self.samples[index].id)).collect();
        error.at(&format!("step {}, questions {}", step + 1, ids.join(", ")))
    }

    /// Questions of one forward pass.
    pub fn micro_batch_size(&self) -> usize {
        self.config.micro_batch_size.unwrap_or(self.config.batch_size)
    }

    /// The adversary's budget at step `step`.
    pub fn epsilon_at(&self, step: u64) -> f64 {
        self.config.adversary.epsilon_at(step, self.config.num_steps)
    }

    /// The images of step `step` with `noise_sigma` added, each place with noise of its own.
    ///
    /// # Errors
    /// When the device has no room.
    pub fn with_noise(&self, pixels: &[Tensor], step: u64) -> Result<Vec<Tensor>> {
        let sigma = self.config.noise_sigma;
        if sigma <= 0.0 {
            return Ok(pixels.to_vec());
        }
        let bank =
            NoiseBank { purpose: "train_noise", sigma, draws: self.config.batch_size, seed: self.seed };
        let mut place = 0;
        pixels
            .iter()
            .map(|tensor| {
                let (count, channels, height, width) = tensor.dims4()?;
                let noise = bank.draws(step, place, count, channels * height * width);
                place += count;
                Ok((tensor + Tensor::from_vec(noise, tensor.shape(), tensor.device())?)?)
            })
            .collect()
    }

    /// Begins the adapter's dropout for one pass of the learner over the questions at `places` of the step, laid out as in
    /// `scoring`, with images of `grids` where the vision tower is part of it; none where nothing is dropped.
    pub fn dropout(
        &self,
        fit: &Fit<Student>,
        scoring: &Scoring,
        places: &[usize],
        grids: &[[usize; 3]],
    ) -> Option<Active> {
        let vlm = &fit.learner.assistant.vlm;
        (self.config.lora_dropout > 0.0).then(|| {
            vlm.parameters().dropout().begin(Draw {
                rate: self.config.lora_dropout,
                seed: self.seed,
                // Fresh at each update, of which a step may have several.
                index: fit.updates,
                rows: scoring.row_names(places, grids, vlm.config().vision.merge_unit()),
            })
        })
    }

    /// How many of the `count` questions of step `step` are attacked: the first so many, the rest stay clean.
    pub fn num_attacked(&self, step: u64, count: usize) -> usize {
        attacked_of(1.0 - self.config.adversary.clean_fraction, step, count)
    }
}

/// Attacked questions of step `step`: what a share of a small batch leaves over counts for later steps, so that the share holds
/// over all of them.
fn attacked_of(share: f64, step: u64, count: usize) -> usize {
    // A hair more than the product, which may fall short of a whole number by its rounding.
    let until = |step: u64| (step as f64 * count as f64 * share + 1e-6).floor() as usize;
    until(step + 1) - until(step)
}

/// The norm that a setting names.
pub fn norm_of(name: NormName) -> Norm {
    match name {
        NormName::Linf => Norm::Linf,
        NormName::L2 => Norm::L2,
    }
}

/// The objectives an attack tries, in order.
pub fn objectives_of(name: ObjectiveName) -> Vec<ObjectiveName> {
    match name {
        ObjectiveName::All => vec![
            ObjectiveName::Completion,
            ObjectiveName::Finding,
            ObjectiveName::Answer,
            ObjectiveName::Margin,
        ],
        one => vec![one],
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::data::Dataset;

    #[test]
    fn steps_looked_at_together_are_those_looked_at_one_by_one() {
        let samples: Vec<Sample> = (0..7).map(Sample::for_test).collect();
        let images = Images::new(&Dataset::new("r", samples.clone()));
        for batch_size in [1, 3, 7, 16] {
            let config = TrainConfig { batch_size, ..TrainConfig::default() };
            let lesson = Lesson {
                samples: &samples,
                images: &images,
                template: PromptTemplate::Plain,
                config: &config,
                seed: 5,
                features: None,
                evidence: Evidence::default(),
                exit: Exit::default(),
            };
            let alone: Vec<Vec<usize>> = (0..30).map(|step| lesson.picked(step)).collect();
            assert_eq!(lesson.picked_in_all(30).collect::<Vec<_>>(), alone, "{batch_size}");
        }
    }

    #[test]
    fn the_share_of_attacked_questions_holds_over_the_steps_of_any_batch() {
        for share in [0.0, 0.1, 0.25, 0.4, 0.75, 0.9, 1.0] {
            for count in [1, 2, 3, 5, 16, 24, 30] {
                let steps: Vec<usize> = (0..1000).map(|step| attacked_of(share, step, count)).collect();
                let wanted = share * count as f64;
                assert!(
                    steps.iter().all(|&n| (n as f64 - wanted).abs() < 1.0 && n <= count),
                    "{share} {count}"
                );
                let total: usize = steps.iter().sum();
                assert_eq!(total, (1000.0 * wanted).round() as usize, "{share} {count}");
            }
        }
        assert!((0..100_000).all(|step| attacked_of(0.75, step, 24) == 18));
        let alone: Vec<usize> = (0..8).map(|step| attacked_of(0.75, step, 1)).collect();
        assert_eq!(alone, [0, 1, 1, 1, 0, 1, 1, 1]);
    }
}
