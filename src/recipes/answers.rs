//! Asking a model questions about images, and reading what it answers: by free generation and the shared parser, or by
//! the likelihood of each option's letter.

use super::config::{RunConfig, Scoring};
use super::{items, records};
use crate::attack::NoiseBank;
use crate::data::Sample;
use crate::data::prompt::PromptTemplate;
use crate::error::{Error, Result};
use crate::model::assistant::Assistant;
use crate::model::generate::{Completion, Prompt};
use crate::model::processor::ProcessedImage;
use crate::model::sampling::SamplingConfig;
use crate::model::vlm::Features;
use crate::reward::answer::parse_answer;
use crate::rng;
use crate::roles::classifier::{Reading, most_likely};
use crate::roles::features::FeatureCache;
use crate::roles::policy;
use candle_core::Tensor;
use rand::RngCore;
use std::ops::Range;
use std::sync::Arc;

/// How questions are put and answers read.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct Asking {
    /// The words around a question.
    pub template: PromptTemplate,
    /// How the answer is obtained.
    pub scoring: Scoring,
    /// Longest completion, in tokens.
    pub max_new_tokens: usize,
    /// How its tokens are chosen.
    pub sampling: SamplingConfig,
    /// Names the random numbers, with the item's id.
    pub seed: u64,
    /// Where answers are given only to see what they cost.
    pub feigned: Option<Feigned>,
}

/// Answers that all count as right, whatever they say: whoever stops at a wrong one does the most that there could be to do.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Feigned {
    /// Whether each is of the longest length allowed, wherever the model would end it.
    pub is_longest: bool,
}

/// What a model answers.
#[derive(Debug, Clone, PartialEq)]
pub struct Answer {
    /// Index of the option; `None` when the completion cannot be read.
    pub prediction: Option<usize>,
    /// Its words; with likelihoods, the completion that is most likely.
    pub completion: String,
    /// Its tokens; `None` with likelihoods.
    pub tokens: Option<Completion>,
    /// Probability of each option's completion among the options', in order; `None` after free generation.
    pub probabilities: Option<Vec<f64>>,
}

impl Asking {
    /// As a configuration says.
    ///
    /// # Errors
    /// A usage error when there is no such prompt.
    pub fn of(config: &RunConfig) -> Result<Self> {
        Ok(Self {
            template: config.prompt.parse()?,
            scoring: config.scoring,
            max_new_tokens: config.max_new_tokens,
            sampling: config.generation.sampling(),
            seed: config.seed,
            feigned: None,
        })
    }

    /// The answers about one image each.
    ///
    /// # Errors
    /// As [`Self::about_pixels`].
    pub fn about_images(
        &self,
        assistant: &Assistant,
        samples: &[&Sample],
        images: &[Arc<ProcessedImage>],
    ) -> Result<Vec<Answer>> {
        self.about_pixels(assistant, samples, &items::stack(assistant, images)?)
    }

    /// The answers about pixels, one image for each sample, in order.
    ///
    /// # Shapes
    /// - `pixels`: each `[n, 3, height, width]` in [0, 1], at the model's resolution
    ///
    /// # Errors
    /// A data error when a question holds an image placeholder; a non-finite error when the model's output does.
    pub fn about_pixels(
        &self,
        assistant: &Assistant,
        samples: &[&Sample],
        pixels: &[Tensor],
    ) -> Result<Vec<Answer>> {
        self.about(assistant, samples, pixels, None)
    }

    /// The same, with features that are remembered.
    fn about(
        &self,
        assistant: &Assistant,
        samples: &[&Sample],
        pixels: &[Tensor],
        cache: Option<&FeatureCache>,
    ) -> Result<Vec<Answer>> {
        let grids = policy::grids_of(assistant, pixels)?;
        let prompts = samples
            .iter()
            .zip(grids)
            .map(|(sample, grid)| {
                let prompt = assistant.prompt(&self.template.user_text(sample), Some(grid));
                prompt.map_err(|error| with_items(error, &[sample]))
            })
            .collect::<Result<Vec<Prompt>>>()?;
        let features = match cache {
            Some(cache) => cache.encode(assistant, pixels),
            None => policy::encode(assistant, pixels),
        };
        let answers = features.and_then(|features| match self.scoring {
            Scoring::Generate => self.generated(assistant, samples, &prompts, &features),
            Scoring::Likelihood => self.likeliest(assistant, samples, &prompts, &features),
        });
        let mut answers = answers.map_err(|error| with_items(error, samples))?;
        if self.feigned.is_some() {
            for (answer, sample) in answers.iter_mut().zip(samples) {
                answer.prediction = Some(sample.answer);
            }
        }
        Ok(answers)
    }

    fn generated(
        &self,
        assistant: &Assistant,
        samples: &[&Sample],
        prompts: &[Prompt],
        features: &Features,
    ) -> Result<Vec<Answer>> {
        let mut decoding = assistant.decoding(self.max_new_tokens, self.sampling);
        if self.feigned.is_some_and(|feigned| feigned.is_longest) {
            decoding.stop_ids.clear();
        }
        // Of the item alone, so that neither its neighbours nor the order of items changes what is drawn.
        let seed = |sample: &&Sample| rng::stream(self.seed, "answer", &[rng::key_of(&sample.id)]).next_u64();
        let seeds: Vec<u64> = samples.iter().map(seed).collect();
        let completions = policy::answers(assistant, prompts, Some(features), &decoding, &seeds)?;
        let answer = |(tokens, sample): (Completion, &&Sample)| {
            let completion = assistant.text_of(&tokens)?;
            let prediction = parse_answer(&completion, sample.options.as_slice());
            Ok(Answer { prediction, completion, tokens: Some(tokens), probabilities: None })
        };
        completions.into_iter().zip(samples).map(answer).collect()
    }

    /// Scores `<answer> X</answer>` (or whatever the template takes as an answer without reasoning) for every option.
    fn likeliest(
        &self,
        assistant: &Assistant,
        samples: &[&Sample],
        prompts: &[Prompt],
        features: &Features,
    ) -> Result<Vec<Answer>> {
        let texts: Vec<Vec<String>> = samples.iter().map(|sample| self.option_completions(sample)).collect();
        let completions = samples
            .iter()
            .map(|sample| self.option_targets(assistant, sample))
            .collect::<Result<Vec<Vec<Vec<u32>>>>>()?;
        let scoring = policy::Scoring::new(assistant, prompts, &completions)?;
        let log_probs = scoring.evaluate(assistant, Some(features), 1.0)?;
        if let Some(bad) = log_probs.iter().find(|value| !value.is_finite()) {
            return Err(Error::NonFinite(format!(
                "a log-probability is {bad} while scoring options\n   = help: the weights or the image's pixels hold numbers that are not finite"
            )));
        }
        let answer = |(spans, mut texts): (&Vec<Range<usize>>, Vec<String>)| {
            let best = most_likely(spans, &log_probs);
            Answer {
                prediction: Some(best),
                completion: texts.swap_remove(best),
                tokens: None,
                probabilities: Some(shares(spans, &log_probs)),
            }
        };
        Ok(scoring.spans.iter().zip(texts).map(answer).collect())
    }

    /// How the class of a noisy image is read: as answers are, with drawn tokens named by `seed`, `key` and the draw.
    ///
    /// # Errors
    /// When the tokenizer lacks the token that ends a turn.
    pub fn reading(&self, assistant: &Assistant, sample: &Sample, key: u64) -> Result<Reading<'static>> {
        Ok(match self.scoring {
            Scoring::Generate => Reading::Generation {
                max_new_tokens: self.max_new_tokens,
                sampling: self.sampling,
                seed: [self.seed, key],
                parse: &parse_answer,
            },
            Scoring::Likelihood => {
                Reading::Likelihood { completions: self.option_targets(assistant, sample)? }
            }
        })
    }

    /// Whether what is scored carries a reasoning: likelihoods are those of answers alone.
    pub fn reasons(&self) -> bool {
        self.scoring == Scoring::Generate && self.template.asks_for_reasoning()
    }

    /// The completion that would answer with each option.
    pub fn option_completions(&self, sample: &Sample) -> Vec<String> {
        let with = |answer| self.template.target(&Sample { answer, ..sample.clone() }, false);
        (0..sample.options.len()).map(with).collect()
    }

    /// The same in tokens.
    fn option_targets(&self, assistant: &Assistant, sample: &Sample) -> Result<Vec<Vec<u32>>> {
        self.option_completions(sample).iter().map(|text| assistant.target(text)).collect()
    }
}

/// Softmax of the completions' log-probabilities.
fn shares(spans: &[Range<usize>], log_probs: &[f32]) -> Vec<f64> {
    let sums: Vec<f64> =
        spans.iter().map(|span| log_probs[span.clone()].iter().map(|v| f64::from(*v)).sum()).collect();
    let largest = sums.iter().copied().fold(f64::NEG_INFINITY, f64::max);
    let weights: Vec<f64> = sums.iter().map(|sum| (sum - largest).exp()).collect();
    let total: f64 = weights.iter().sum();
    weights.iter().map(|weight| weight / total).collect()
}

/// How a model answers that may be smoothed: by majority over noisy copies of the image.
#[derive(Debug)]
pub struct Asker<'a> {
    /// The model.
    pub assistant: &'a Assistant,
    /// How it is asked.
    pub asking: Asking,
    /// The noise of the copies; `None` asks about the image itself.
    pub votes: Option<&'a NoiseBank>,
    /// Noisy copies in one pass.
    pub batch_size: usize,
    /// Images seen before; none where images do not come back.
    pub features: Option<&'a FeatureCache>,
}

impl Asker<'_> {
    /// The answers about one image each.
    ///
    /// # Errors
    /// As [`Asking::about_pixels`].
    pub fn about_images(&self, samples: &[&Sample], images: &[Arc<ProcessedImage>]) -> Result<Vec<Answer>> {
        self.about_pixels(samples, &items::stack(self.assistant, images)?)
    }

    /// The answers about pixels as [`Asking::about_pixels`] takes them. Of a smoothed model: the option of most votes,
    /// none where two lead; `completion` lists the votes.
    ///
    /// # Errors
    /// As [`Asking::about_pixels`].
    pub fn about_pixels(&self, samples: &[&Sample], pixels: &[Tensor]) -> Result<Vec<Answer>> {
        let Some(bank) = self.votes else {
            return self.asking.about(self.assistant, samples, pixels, self.features);
        };
        let mut answers = Vec::with_capacity(samples.len());
        let mut samples = samples.iter();
        for tensor in pixels {
            for (row, sample) in (0..tensor.dim(0)?).zip(&mut samples) {
                answers.push(self.by_majority(bank, sample, &tensor.narrow(0, row, 1)?)?);
            }
        }
        Ok(answers)
    }

    fn by_majority(&self, bank: &NoiseBank, sample: &Sample, pixels: &Tensor) -> Result<Answer> {
        let (_, channels, height, width) = pixels.dims4()?;
        let key = rng::key_of(&sample.id);
        let mut votes = vec![0u64; sample.options.len() + 1];
        for from in (0..bank.draws).step_by(self.batch_size) {
            let count = self.batch_size.min(bank.draws - from);
            let noise = bank.draws(key, from, count, channels * height * width);
            let noise = Tensor::from_vec(noise, (count, channels, height, width), pixels.device())?;
            let noisy = pixels.broadcast_add(&noise)?;
            for answer in self.asking.about_pixels(self.assistant, &vec![sample; count], &[noisy])? {
                votes[answer.prediction.unwrap_or(sample.options.len())] += 1;
            }
        }
        let most = votes.iter().copied().max().unwrap_or(0);
        let leaders: Vec<usize> = (0..sample.options.len()).filter(|&option| votes[option] == most).collect();
        Ok(Answer {
            prediction: if leaders.len() == 1 { Some(leaders[0]) } else { None },
            completion: format!("votes {}", serde_json::json!(records::counts_by_letter(&votes))),
            tokens: None,
            probabilities: None,
        })
    }
}

/// Adds to an error of data or numbers which items it is about.
pub(super) fn with_items(error: Error, samples: &[&Sample]) -> Error {
    match &error {
        Error::Data(text) | Error::NonFinite(text) if !text.contains("--> items") => {
            let ids: Vec<String> = samples.iter().map(|sample| format!("`{}`", sample.id)).collect();
            error.at(&format!("items {}", ids.join(", ")))
        }
        _ => error,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn shares_are_probabilities_even_of_very_unlikely_completions() {
        let log_probs = [-1000.0, -1.0, -1000.0, -1.0, -1002.0, -1.0];
        let shares = shares(&[0..2, 2..4, 4..6], &log_probs);
        assert!((shares.iter().sum::<f64>() - 1.0).abs() < 1e-15);
        assert_eq!(shares[0], shares[1]);
        assert!((shares[2] / shares[0] - (-2.0f64).exp()).abs() < 1e-12);
    }
}
