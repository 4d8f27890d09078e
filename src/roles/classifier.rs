//! The model as base classifier: pixels, and the index of the draw, to an option.
//!
//! The class is what the model's own generation says, read by the same parser as everywhere else; "no answer" is the
//! last class. Or, faster and named as such, the option letter of highest likelihood. Where tokens are drawn, their seed
//! follows from (seed, item, draw) alone: the answers to two draws are independent, and the same in any batch.

use super::policy::{self, Scoring};
use crate::certify::BaseClassifier;
use crate::error::Result;
use crate::model::assistant::Assistant;
use crate::model::generate::Prompt;
use crate::model::sampling::SamplingConfig;
use crate::rng;
use candle_core::Tensor;
use rand::RngCore;
use std::ops::Range;

/// How the class of an image is read off the model.
pub enum Reading<'a> {
    /// From a free generation of at most `max_new_tokens`, by `parse` (text and number of options to option).
    Generation {
        /// Longest completion.
        max_new_tokens: usize,
        /// How its tokens are chosen.
        sampling: SamplingConfig,
        /// Names the random numbers, with the index of the draw: the run's seed and the item's key.
        seed: [u64; 2],
        /// The answer parser.
        parse: &'a (dyn Fn(&str, usize) -> Option<usize> + Sync),
    },
    /// From the likelihood of each of these completions, one for each option.
    Likelihood {
        /// Tokens of each option's completion.
        completions: Vec<Vec<u32>>,
    },
}

impl std::fmt::Debug for Reading<'_> {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str(match self {
            Self::Generation { .. } => "Generation",
            Self::Likelihood { .. } => "Likelihood",
        })
    }
}

/// The model asked one question about whatever image it is shown.
#[derive(Debug)]
pub struct QuestionClassifier<'a> {
    /// The model.
    pub assistant: &'a Assistant,
    /// The question.
    pub prompt: &'a Prompt,
    /// Options it has.
    pub num_options: usize,
    /// How the class is read.
    pub reading: Reading<'a>,
}

impl BaseClassifier for QuestionClassifier<'_> {
    /// The options, and "none".
    fn num_classes(&self) -> usize {
        self.num_options + 1
    }

    fn classify(&self, noisy: &Tensor, draws: Range<u64>) -> Result<Vec<usize>> {
        let count = noisy.dim(0)?;
        let prompts = vec![self.prompt.clone(); count];
        let features = policy::encode(self.assistant, std::slice::from_ref(noisy))?;
        match &self.reading {
            Reading::Generation { max_new_tokens, sampling, seed: [seed, item], parse } => {
                let decoding = self.assistant.decoding(*max_new_tokens, *sampling);
                let seed_of = |draw| rng::stream(*seed, "smoothed answer", &[*item, draw]).next_u64();
                let seeds: Vec<u64> = draws.map(seed_of).collect();
                let completions =
                    policy::answers(self.assistant, &prompts, Some(&features), &decoding, &seeds)?;
                completions
                    .iter()
                    .map(|completion| {
                        let text = self.assistant.text_of(completion)?;
                        Ok(parse(&text, self.num_options).unwrap_or(self.num_options))
                    })
                    .collect()
            }
            Reading::Likelihood { completions } => {
                let scoring = Scoring::new(self.assistant, &prompts, &vec![completions.clone(); count])?;
                let log_probs = scoring.evaluate(self.assistant, Some(&features), 1.0)?;
                Ok(scoring.spans.iter().map(|spans| most_likely(spans, &log_probs)).collect())
            }
        }
    }
}

/// The completion of highest mean log-probability for each token; the first of equals.
pub(crate) fn most_likely(spans: &[std::ops::Range<usize>], log_probs: &[f32]) -> usize {
    let score = |span: &std::ops::Range<usize>| {
        log_probs[span.clone()].iter().map(|v| f64::from(*v)).sum::<f64>() / span.len() as f64
    };
    let mut best = 0;
    for candidate in 1..spans.len() {
        if score(&spans[candidate]) > score(&spans[best]) {
            best = candidate;
        }
    }
    best
}
