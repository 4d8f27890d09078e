//! What every training recipe shares: which questions a step takes, their images and targets, and the adversary.

use super::aims::{self, Asked};
use super::config::{AdversaryConfig, NormName, ObjectiveName, TargetName, TrainConfig};
use super::failure::{Evidence, Noted};
use super::fit::{Fit, Student};
use super::items::{self, Images};
use crate::attack::{self, Fraction, NoiseBank, Norm, PgdOutput, Problem, pgd};
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
use crate::roles::target::{Aim, Target};
use candle_core::Tensor;
use rand::seq::SliceRandom;
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
        let (count, size) = (self.samples.len(), self.config.batch_size);
        let mut picked: Vec<usize> = Vec::with_capacity(size);
        let mut order: (u64, Vec<usize>) = (u64::MAX, Vec::new());
        for at in step * size as u64..(step + 1) * size as u64 {
            let epoch = at / count as u64;
            if order.0 != epoch {
                let mut permutation: Vec<usize> = (0..count).collect();
                permutation.shuffle(&mut rng::stream(self.seed, "order", &[epoch]));
                order = (epoch, permutation);
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

    /// The budget of step `step`: rises linearly from its first value to the full one.
    pub fn epsilon_at(&self, step: u64) -> f64 {
        let AdversaryConfig { epsilon, epsilon_start_fraction, ramp_fraction, .. } = self.config.adversary;
        let ramp = (ramp_fraction * self.config.num_steps as f64).max(1.0);
        let share = ((step + 1) as f64 / ramp).min(1.0);
        epsilon * (epsilon_start_fraction + (1.0 - epsilon_start_fraction) * share)
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

    /// How many of a step's questions are attacked: the first so many, the rest stay clean.
    pub fn num_attacked(&self, count: usize) -> usize {
        (count as f64 * (1.0 - self.config.adversary.clean_fraction)).round() as usize
    }
}

/// What the adversary did to a batch.
#[derive(Debug)]
pub struct Attacked {
    /// All pixels of the batch, attacked ones first, in the batch's order.
    pub pixels: Vec<Tensor>,
    /// Budget.
    pub epsilon: f64,
    /// Mean loss before and after, over the attacked questions; none when none was.
    pub losses: Option<(f64, f64)>,
}

/// Attacks the first questions of a batch at the model's resolution with the current weights.
///
/// # Errors
/// When a gradient is not a number.
pub fn attack_batch(
    lesson: &Lesson<'_>,
    assistant: &Assistant,
    questions: &Questions,
    step: u64,
) -> Result<Attacked> {
    let epsilon = lesson.epsilon_at(step);
    lesson.evidence.note(|noted| (noted.phase, noted.epsilon) = ("attack", Some(epsilon)));
    let settings = &lesson.config.adversary;
    let attacked = lesson.num_attacked(questions.samples.len());
    let mut pixels = Vec::new();
    let (mut before, mut after) = (Vec::new(), Vec::new());
    let mut start = 0;
    while start < attacked {
        // Attacked together: neighbours of one size, as many as one pass may hold.
        let size = |i: usize| (questions.images[i].resized.height, questions.images[i].resized.width);
        let is_next = |i: &usize| size(*i) != size(start) || i - start == lesson.micro_batch_size();
        let end = (start..attacked).find(is_next).unwrap_or(attacked);
        let range = start..end;
        let clean = items::stack(assistant, &questions.images[range.clone()])?.remove(0);
        let target = Target {
            assistant,
            aims: range.clone().map(|i| aim_of(lesson, assistant, questions, i)).collect::<Result<_>>()?,
            answers: &|_, _| Err(anyhow::anyhow!("training never asks whether an attack succeeded").into()),
            noise: None,
            draws_at_once: 1,
            memory: lesson.config.memory(),
        };
        let config = attack::AttackConfig {
            norm: norm_of(settings.norm),
            epsilon: Fraction(epsilon),
            step_size: settings.step_size.map(Fraction),
            num_steps: settings.num_steps,
            random_start: settings.random_start,
            early_stop: false,
            output: PgdOutput::Last,
            seed: lesson.seed,
            ..attack::AttackConfig::default()
        };
        let keys: Vec<u64> = range.clone().map(|i| step << 20 | i as u64).collect();
        let indices: Vec<usize> = (0..range.len()).collect();
        let problem = Problem { clean: &clean, items: &indices, keys: &keys, start: None, judge_8bit: false };
        let adversarial = pgd(&target, &problem, &config, &mut |_| Ok(()))?;
        before.extend(adversarial.loss_clean);
        after.extend(adversarial.loss);
        pixels.push(adversarial.pixels);
        start = end;
    }
    pixels.extend(items::stack(assistant, &questions.images[attacked..])?);
    let mean = |values: &[f32]| values.iter().map(|v| f64::from(*v)).sum::<f64>() / values.len() as f64;
    let losses = (!before.is_empty()).then(|| (mean(&before), mean(&after)));
    Ok(Attacked { pixels, epsilon, losses })
}

fn aim_of(lesson: &Lesson<'_>, assistant: &Assistant, questions: &Questions, i: usize) -> Result<Aim> {
    let (sample, image) = (&questions.samples[i], &questions.images[i]);
    let asked = Asked {
        template: lesson.template,
        is_cot: lesson.is_cot(),
        objective: lesson.config.adversary.objective,
        target: 1,
        own: None,
    };
    let size = [image.resized.height, image.resized.width];
    aims::aim(assistant, sample, asked, questions.prompts[i].clone(), size)
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
