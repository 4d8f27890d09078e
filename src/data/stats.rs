//! What a set of questions is made of, and how far one gets in it without the images.
//!
//! Four blind baselines: guessing, the commonest letter, the option that was most often right (the option prior),
//! and the same counted strictly within modalities. They need no model and no images.

use std::collections::BTreeMap;

use serde::Serialize;

use super::sample::Sample;
use super::{Dataset, letter};
use crate::stats::prior::{Choice, PriorSource, predict_all};

/// Right answers out of `n`.
#[derive(Debug, Clone, Copy, PartialEq, Default, Serialize)]
pub struct Score {
    /// Questions.
    pub n: usize,
    /// Right ones.
    pub correct: usize,
    /// Their share, in [0, 1].
    pub accuracy: f64,
}

impl Score {
    fn add(&mut self, right: bool) {
        self.n += 1;
        self.correct += usize::from(right);
        self.accuracy = self.correct as f64 / self.n as f64;
    }
}

/// The score of one blind rule.
#[derive(Debug, Clone, PartialEq, Serialize)]
pub struct Blind {
    /// Over all questions.
    #[serde(flatten)]
    pub all: Score,
    /// What was counted.
    pub source: PriorSource,
    /// By modality.
    pub by_modality: BTreeMap<String, Score>,
    /// By question type.
    pub by_question_type: BTreeMap<String, Score>,
}

/// Everything `safemed data stats` tells.
#[derive(Debug, Clone, PartialEq, Serialize)]
pub struct DataStats {
    /// Questions.
    pub n: usize,
    /// Different images, by path.
    pub images: usize,
    /// Questions of the restricted part, not loaded.
    pub restricted: usize,
    /// Problems of records that were left out.
    pub skipped: usize,
    /// Questions that come with a reasoning of their own.
    pub reasonings: usize,
    /// Questions per modality.
    pub by_modality: BTreeMap<String, usize>,
    /// Questions per question type.
    pub by_question_type: BTreeMap<String, usize>,
    /// Questions per source dataset.
    pub by_dataset: BTreeMap<String, usize>,
    /// Questions per number of options.
    pub by_num_options: BTreeMap<usize, usize>,
    /// Right answers per letter.
    pub by_letter: BTreeMap<String, usize>,
    /// Accuracy of uniform guessing: the mean of 1 / number of options.
    pub chance: f64,
    /// Always the letter that is right most often.
    pub letter_prior: Blind,
    /// The option that was most often right in the question's group ([`Sample::prior_group`]).
    pub option_prior: Blind,
    /// The same with the group always the modality. Questions that ask for the modality are then given away by
    /// their group: a bound for a reader who knows the modality, no measure of the questions.
    pub option_prior_within_modality: Blind,
}

/// Describes `data`. Priors are counted in `train`, or in `data` itself with each question left out.
pub fn describe(data: &Dataset, train: Option<&Dataset>) -> DataStats {
    let samples = &data.samples;
    let images: std::collections::HashSet<_> = samples.iter().map(|sample| &sample.image).collect();
    DataStats {
        n: samples.len(),
        images: images.len(),
        restricted: data.restricted,
        skipped: data.skipped.len(),
        reasonings: samples.iter().filter(|sample| sample.reasoning.is_some()).count(),
        by_modality: count(samples, |sample| sample.modality.clone()),
        by_question_type: count(samples, |sample| sample.question_type.clone()),
        by_dataset: count(samples, |sample| sample.dataset.clone()),
        by_num_options: count(samples, |sample| sample.options.len()),
        by_letter: count(samples, |sample| sample.answer_letter().to_string()),
        chance: samples.iter().map(|sample| 1.0 / sample.options.len() as f64).sum::<f64>()
            / samples.len().max(1) as f64,
        letter_prior: letter_prior(samples, train),
        option_prior: option_prior(samples, train, Sample::prior_group),
        option_prior_within_modality: option_prior(samples, train, |sample| &sample.modality),
    }
}

fn count<K: Ord>(samples: &[Sample], key: impl Fn(&Sample) -> K) -> BTreeMap<K, usize> {
    let mut counts = BTreeMap::new();
    for sample in samples {
        *counts.entry(key(sample)).or_default() += 1;
    }
    counts
}

/// The samples as choices, grouped by `group`.
pub fn choices(samples: &[Sample], group: impl Fn(&Sample) -> &str) -> Vec<Choice<'_>> {
    samples
        .iter()
        .map(|sample| Choice { group: group(sample), candidates: &sample.options, right: sample.answer })
        .collect()
}

fn option_prior(samples: &[Sample], train: Option<&Dataset>, group: fn(&Sample) -> &str) -> Blind {
    let train = train.map(|train| choices(&train.samples, group));
    let (predictions, source) = predict_all(train.as_deref(), &choices(samples, group));
    blind(samples, &predictions, source)
}

/// The option prior with letters in place of texts, over one common group.
fn letter_prior(samples: &[Sample], train: Option<&Dataset>) -> Blind {
    let letters: Vec<String> = (0..26).map(|index| letter(index).to_string()).collect();
    let as_letters = |samples: &[Sample]| -> Vec<Choice<'_>> {
        samples
            .iter()
            .map(|sample| Choice {
                group: "",
                candidates: &letters[..sample.options.len().min(letters.len())],
                right: sample.answer,
            })
            .collect()
    };
    let train = train.map(|train| as_letters(&train.samples));
    let (predictions, source) = predict_all(train.as_deref(), &as_letters(samples));
    blind(samples, &predictions, source)
}

fn blind(samples: &[Sample], predictions: &[usize], source: PriorSource) -> Blind {
    let mut blind = Blind {
        all: Score::default(),
        source,
        by_modality: BTreeMap::new(),
        by_question_type: BTreeMap::new(),
    };
    for (sample, &prediction) in samples.iter().zip(predictions) {
        let right = prediction == sample.answer;
        blind.all.add(right);
        blind.by_modality.entry(sample.modality.clone()).or_default().add(right);
        blind.by_question_type.entry(sample.question_type.clone()).or_default().add(right);
    }
    blind
}
