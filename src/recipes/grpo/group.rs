//! Groups of completions: sampled, rewarded, and sampled again where they teach nothing.

use super::Sampling;
use super::update::image_rows;
use crate::data::Sample;
use crate::error::Result;
use crate::model::assistant::Assistant;
use crate::model::generate::{Completion, Prompt};
use crate::model::sampling::SamplingConfig;
use crate::model::vlm::Features;
use crate::recipes::config::{GrpoSettings, ImportanceName};
use crate::recipes::lesson::{Lesson, Questions};
use crate::rng;
use crate::roles::policy;
use rand::RngCore;

/// The group of one question.
pub(super) struct Group {
    pub(super) completions: Vec<Completion>,
    pub(super) texts: Vec<String>,
    /// Of the stream that each completion was drawn from.
    pub(super) seeds: Vec<u64>,
    pub(super) accuracy: Vec<f64>,
    pub(super) format: Vec<f64>,
    /// Of each further column of the judge; NaN where none was given.
    pub(super) others: Vec<Vec<f64>>,
    /// Weighted sums; NaN where no column with a weight has a reward.
    pub(super) total: Vec<f64>,
    /// Whether all completions are worth the same, so that none is better than its group.
    pub(super) is_flat: bool,
}

impl Group {
    /// The rewards of the judge's column `k`.
    pub(super) fn column(&self, k: usize) -> &[f64] {
        match k {
            0 => &self.accuracy,
            1 => &self.format,
            other => &self.others[other - 2],
        }
    }

    /// Whether completion `c` takes part in the loss.
    pub(super) fn counts(&self, c: usize, settings: &GrpoSettings) -> bool {
        self.completions[c].is_finished || !settings.mask_truncated
    }

    /// Ratios of the loss: one for each token or for each completion that takes part in it.
    pub(super) fn num_ratios(&self, settings: &GrpoSettings) -> usize {
        match settings.importance_level {
            ImportanceName::Token => self.num_tokens(settings),
            ImportanceName::Sequence => {
                let is_there = |&c: &usize| self.counts(c, settings) && !self.completions[c].ids.is_empty();
                (0..self.completions.len()).filter(is_there).count()
            }
        }
    }

    /// Tokens that take part in the loss.
    pub(super) fn num_tokens(&self, settings: &GrpoSettings) -> usize {
        let counted = (0..self.completions.len()).filter(|&c| self.counts(c, settings));
        counted.map(|c| self.completions[c].ids.len()).sum()
    }
}

/// What completions about `sample` are worth, each by itself, for an adversary. A reward that was not given counts as the mean
/// of the others, so that it has no say.
pub(in crate::recipes) fn rewards_of(
    sampling: &Sampling<'_>,
    lesson: &Lesson<'_>,
    frozen: &Assistant,
    step: u64,
    sample: &Sample,
    completions: &[Completion],
) -> Result<Vec<f64>> {
    let groups = sampling.judge.groups(lesson, frozen, step, &[sample], vec![completions.to_vec()])?;
    let total: Vec<f64> = groups.into_iter().flat_map(|group| group.total).collect();
    let given = total.iter().filter(|reward| !reward.is_nan());
    let mean = given.clone().sum::<f64>() / given.count().max(1) as f64;
    Ok(total.into_iter().map(|reward| if reward.is_nan() { mean } else { reward }).collect())
}

/// Which groups are sampled, and for which time.
#[derive(Clone, Copy)]
pub(super) struct Round<'a> {
    pub(super) places: &'a [usize],
    pub(super) step: u64,
    pub(super) attempt: u64,
    pub(super) sampling: &'a Sampling<'a>,
}

impl Round<'_> {
    /// One for each completion of question `q`.
    fn seeds(&self, lesson: &Lesson<'_>, q: usize) -> Vec<u64> {
        let named = |g: u64| match self.attempt {
            0 => rng::stream(lesson.seed, "rollout", &[self.step, q as u64, g]).next_u64(),
            attempt => {
                rng::stream(lesson.seed, "rollout again", &[self.step, q as u64, g, attempt]).next_u64()
            }
        };
        (0..lesson.config.grpo.group_size as u64).map(named).collect()
    }
}

/// Samples the groups at `places`, a pass of `micro_batch_size` questions at a time; `attempt` counts how often they were
/// sampled before in this step.
pub(super) fn roll_out(
    lesson: &Lesson<'_>,
    frozen: &Assistant,
    questions: &Questions,
    features: &Features,
    round: Round<'_>,
) -> Result<Vec<Group>> {
    let settings = &lesson.config.grpo;
    let sampling = round.sampling;
    let mut decoding = frozen.decoding(sampling.max_new_tokens, SamplingConfig::at(settings.temperature));
    if sampling.assumed.longest {
        decoding.stop_ids.clear();
    }
    let mut completions = Vec::with_capacity(round.places.len());
    let mut seeds = Vec::with_capacity(round.places.len());
    for part in round.places.chunks(lesson.micro_batch_size()) {
        lesson.exit.check()?;
        let of_part: Vec<Vec<u64>> = part.iter().map(|&q| round.seeds(lesson, q)).collect();
        let prompts: Vec<Prompt> = part.iter().map(|&q| questions.prompts[q].clone()).collect();
        let features = features.select(&image_rows(&questions.prompts, part))?;
        let sampled = policy::sample(frozen, &prompts, Some(&features), &of_part, &decoding)?;
        completions.extend(sampled);
        seeds.extend(of_part);
    }
    let samples: Vec<&Sample> = round.places.iter().map(|&q| &questions.samples[q]).collect();
    let mut groups = sampling.judge.groups(lesson, frozen, round.step, &samples, completions)?;
    for (group, seeds) in groups.iter_mut().zip(seeds) {
        group.seeds = seeds;
    }
    Ok(groups)
}

/// Samples groups that teach nothing anew, each until it does or the limit is reached; returns how many were replaced.
pub(super) fn resample(
    lesson: &Lesson<'_>,
    frozen: &Assistant,
    questions: &Questions,
    features: &Features,
    groups: &mut [Group],
    first: Round<'_>,
) -> Result<usize> {
    let mut replaced = 0;
    for attempt in 1..=lesson.config.grpo.max_resamples as u64 {
        let flat: Vec<usize> = (0..groups.len()).filter(|&g| groups[g].is_flat).collect();
        if flat.is_empty() {
            break;
        }
        let round = Round { places: &flat, attempt, ..first };
        for (group, &place) in roll_out(lesson, frozen, questions, features, round)?.into_iter().zip(&flat) {
            if !group.is_flat {
                groups[place] = group;
                replaced += 1;
            }
        }
    }
    Ok(replaced)
}
