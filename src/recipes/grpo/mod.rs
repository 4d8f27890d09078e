//! One step of group-relative policy optimisation, on clean images (`grpo`) or with PGD inside (`at_grpo`).
//!
//! For each question: PGD on the image's pixels maximises the loss of the right completion under the current policy;
//! a group of completions is sampled on the attacked image; rewards are accuracy, format and what else is asked for;
//! advantages are relative to the group; the clipped surrogate is taken on the image the group was sampled on.
//!
//! Deviation: the paper does not say what its attack maximises, whether groups share one image, or what the reference
//! policy sees; each is an option here.
//! Groups whose rewards are all equal carry no gradient and, without a KL term, are not run through the update; they count in
//! every denominator, and a step in which there are no others still steps by a gradient of zero, so the result is the same.
//! With `refresh = "each_update"` the attack is warmed up again before each further update on the same completions: old
//! log-probabilities stay those of the image sampled on, so that a ratio is the weight of a sample for the new policy on the
//! new image, and the clip bounds the two changes together.
//! `sampling/sampling_logp_difference` is between what tokens were drawn with and what the first update makes of them. Image
//! placeholders, which are never drawn, and `lora_dropout`, which sampling leaves out, set the two apart by right.
//! Deviation: `entropy` is that of the distribution each token was sampled from, so of the policy before the update. Its mean
//! goes over the tokens that take part in the loss.

mod group;
mod judge;
mod log;
mod update;

use super::adversary::Adversary;
use super::config::{GrpoSettings, RefreshName, RewardAggregation, ScaleRewards};
use super::fit::{Fit, Student};
use super::items;
use super::lesson::Lesson;
use super::pictures;
use super::step::StepReport;
use crate::error::Result;
use crate::model::assistant::Assistant;
use crate::roles::policy;
use crate::train::advantage::{self, AdvantageConfig, Advantages};
pub(super) use group::rewards_of;
use group::{Group, Round, resample, roll_out};
pub use judge::{Column, Judge, Said};
use log::{describe, each_update, mean, write_down};
use serde_json::json;
use std::time::Instant;
use update::{Seen, update};

/// How the groups of a step come about.
#[derive(Debug, Clone, Copy)]
pub struct Sampling<'a> {
    /// The frozen policy of the KL term.
    pub reference: Option<&'a Assistant>,
    /// What completions are worth.
    pub judge: &'a Judge,
    /// Longest completion, in tokens.
    pub max_new_tokens: usize,
    /// Whether images are attacked first.
    pub is_adversarial: bool,
    /// What an estimate takes for granted; nothing in training.
    pub assumed: Assumed,
}

/// What an estimate of cost takes for granted about samples that it cannot know.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub struct Assumed {
    /// No completion ends before it is as long as it may be.
    pub longest: bool,
    /// Every group goes through the update, whatever its rewards.
    pub all_groups: bool,
}

/// Trains on the questions of the fit's current step.
///
/// # Errors
/// When a loss or gradient is not finite.
pub fn step(lesson: &Lesson<'_>, fit: &mut Fit<Student>, sampling: &Sampling<'_>) -> Result<StepReport> {
    let settings = &lesson.config.grpo;
    let mut report = StepReport::default();
    let questions = lesson.questions(&fit.learner.frozen, fit.step)?;

    let started = Instant::now();
    let clean = items::stack(&fit.learner.frozen, &questions.images)?;
    let adversary = Adversary { lesson, questions: &questions, step: fit.step, sampling: Some(sampling) };
    let attacked = if sampling.is_adversarial { Some(adversary.attack(&fit.learner.frozen)?) } else { None };
    let pixels =
        &lesson.with_noise(attacked.as_ref().map_or(&clean, |attacked| &attacked.pixels), fit.step)?;
    lesson.evidence.note(|noted| {
        (noted.phase, noted.pixels, noted.temperature) = ("rollout", pixels.clone(), settings.temperature);
    });
    let phase = if sampling.is_adversarial { "attack" } else { "images" };
    report.phases.push((phase, started.elapsed().as_secs_f64()));

    let started = Instant::now();
    let is_new = sampling.is_adversarial || lesson.config.noise_sigma > 0.0;
    let features = if is_new {
        policy::encode(&fit.learner.frozen, pixels)?
    } else {
        lesson.features_of(&fit.learner.frozen, pixels)?
    };
    let places: Vec<usize> = (0..questions.prompts.len()).collect();
    let round = Round { places: &places, step: fit.step, attempt: 0, sampling };
    let frozen = &fit.learner.frozen;
    let mut groups = roll_out(lesson, frozen, &questions, &features, round)?;
    let num_resampled = resample(lesson, frozen, &questions, &features, &mut groups, round)?;
    report.phases.push(("rollout", started.elapsed().as_secs_f64()));

    let started = Instant::now();
    lesson.evidence.note(|noted| {
        let ids = |group: &Group| group.completions.iter().map(|c| c.ids.clone()).collect();
        (noted.phase, noted.completions) = ("update", groups.iter().map(ids).collect());
        noted.rewards = groups.iter().map(|group| group.total.clone()).collect();
    });
    let relative = advantages_of(&groups, sampling.judge, settings)?;
    let advantages: Vec<Vec<f64>> =
        relative.advantages.chunks(settings.group_size).map(<[f64]>::to_vec).collect();
    lesson.evidence.note(|noted| noted.advantages.clone_from(&advantages));
    // Of a vision tower that does not train they hold for the update too, and for the reference.
    let features = lesson.features.is_some().then_some(features);
    let refreshes = lesson.config.adversary.refresh == RefreshName::EachUpdate;
    let adversary = attacked.as_ref().filter(|_| refreshes).map(|attacked| (&adversary, attacked));
    let seen = Seen { pixels, clean: &clean, features, sampling, adversary };
    let outcome = update(lesson, fit, &questions, &groups, &advantages, &seen)?;
    report.phases.push(("update", started.elapsed().as_secs_f64() - outcome.refresh_seconds));
    if adversary.is_some() {
        report.phases.push(("refresh", outcome.refresh_seconds));
    }

    describe(&mut report, lesson, sampling.judge, &groups, &relative, &outcome);
    let prompt_tokens: usize = questions.prompts.iter().map(|prompt| prompt.ids.len()).sum();
    let completion_tokens: usize =
        groups.iter().flat_map(|group| &group.completions).map(|c| c.ids.len()).sum();
    report.num_tokens = (prompt_tokens * settings.group_size + completion_tokens) as u64;
    if settings.max_resamples > 0 {
        report.metrics.insert("groups_resampled".into(), json!(num_resampled));
    }
    let num_attacked = attacked.as_ref().map_or(0, |_| lesson.num_attacked(fit.step, groups.len()));
    let share = |groups: &[Group]| mean(groups.iter().flat_map(|group| group.accuracy.iter().copied()));
    let metrics = &mut report.metrics;
    if num_attacked > 0 {
        metrics.insert("rewards/accuracy_adversarial/mean".into(), json!(share(&groups[..num_attacked])));
    }
    if num_attacked < groups.len() {
        metrics.insert("rewards/accuracy_clean/mean".into(), json!(share(&groups[num_attacked..])));
    }
    if let Some(attacked) = outcome.attacked.as_ref().or(attacked.as_ref()) {
        attacked.describe(lesson, metrics);
    }
    report.updates = each_update(lesson, &outcome);
    report.pictures = pictures::of_attack(lesson, &questions, attacked.as_ref(), fit.step)?;
    let shown = (pixels.as_slice(), num_attacked);
    write_down(&mut report, lesson, &questions, sampling.judge, &groups, &advantages, shown)?;
    Ok(report)
}

fn advantages_of(groups: &[Group], judge: &Judge, settings: &GrpoSettings) -> Result<Advantages> {
    let rows = |group| (0..settings.group_size).map(move |c| judge.row(group, c));
    let rows: Vec<Vec<f64>> = groups.iter().flat_map(rows).collect();
    let config = AdvantageConfig {
        group_size: settings.group_size,
        scale_rewards: match settings.scale_rewards {
            ScaleRewards::Group => advantage::ScaleRewards::Group,
            ScaleRewards::Batch => advantage::ScaleRewards::Batch,
            ScaleRewards::None => advantage::ScaleRewards::None,
        },
        aggregation: match settings.reward_aggregation {
            RewardAggregation::SumThenNormalize => advantage::RewardAggregation::SumThenNormalize,
            RewardAggregation::NormalizeThenSum => advantage::RewardAggregation::NormalizeThenSum,
        },
        reward_weights: judge.weights(),
    };
    advantage::group_relative(&rows, &config)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::data::Sample;
    use crate::model::generate::Completion;
    use crate::recipes::config::{Command, Override, RunConfig};
    use crate::train::test_support::assert_close;

    fn configured(settings: &[(&str, &str)]) -> RunConfig {
        let own = [("train.recipe", "grpo"), ("train.grpo.group_size", "2")];
        let settings = [&own[..], settings].concat();
        let settings: Vec<Override> =
            settings.iter().map(|(key, value)| Override::new(*key, *value, "--set")).collect();
        RunConfig::load(Command::Train, None, &settings).unwrap()
    }

    fn judge(config: &RunConfig) -> Judge {
        Judge::open(config, &Sample::for_test(0)).unwrap()
    }

    /// A group whose completions have these rewards for accuracy and for format.
    fn group(accuracy: [f64; 2], format: [f64; 2]) -> Group {
        Group {
            completions: vec![Completion::default(); 2],
            texts: vec![String::new(); 2],
            seeds: vec![0; 2],
            accuracy: accuracy.to_vec(),
            format: format.to_vec(),
            others: Vec::new(),
            total: accuracy.iter().zip(&format).map(|(a, f)| a + f).collect(),
            is_flat: false,
        }
    }

    #[test]
    fn advantages_are_divided_by_what_the_configuration_says() {
        // Their sums are 1 and 0, 2 and 0: half of it from the mean of the first group, 1 from that of the second.
        let groups = [group([1.0, 0.0], [0.0, 0.0]), group([1.0, 0.0], [1.0, 0.0])];
        // Around 0.75, the mean of all four: 0.0625 + 0.5625 + 1.5625 + 0.5625.
        let of_all = (2.75f64 / 3.0).sqrt() + 1e-4;
        let of_groups = [0.5f64.sqrt() + 1e-4, 2f64.sqrt() + 1e-4];
        for (word, [first, second]) in [("group", of_groups), ("batch", [of_all; 2]), ("none", [1.0; 2])] {
            let config = configured(&[("train.grpo.scale_rewards", word)]);
            let found = advantages_of(&groups, &judge(&config), &config.train.grpo).unwrap();
            let wanted = [0.5 / first, -0.5 / first, 1.0 / second, -1.0 / second];
            assert_close(&found.advantages, &wanted, 1e-12, word);
        }
    }

    #[test]
    fn rewards_normalised_one_by_one_are_those_of_the_configuration() {
        let groups = [group([1.0, 0.0], [0.0, 0.0]), group([1.0, 0.0], [1.0, 0.0])];
        let config = configured(&[
            ("train.grpo.reward_aggregation", "normalize_then_sum"),
            ("train.grpo.format_weight", "0.5"),
        ]);
        let found = advantages_of(&groups, &judge(&config), &config.train.grpo).unwrap();
        // Each column is z or 0 in its group, a half of it for the format; then all four are normalised about their mean, 0.
        let z = 0.5 / (0.5f64.sqrt() + 1e-4);
        let sums = [z, -z, 1.5 * z, -1.5 * z];
        let std = (sums.iter().map(|sum| sum * sum).sum::<f64>() / 3.0).sqrt() + 1e-4;
        assert_close(&found.advantages, &sums.map(|sum| sum / std), 1e-12, "by column");
    }
}
