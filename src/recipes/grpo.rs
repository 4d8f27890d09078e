//! One step of group-relative policy optimisation, on clean images (`grpo`) or with PGD inside (`at_grpo`).
//!
//! For each question: PGD on the image's pixels maximises the loss of the right completion under the current policy;
//! a group of completions is sampled on the attacked image; rewards are accuracy and format; advantages are relative
//! to the group; the clipped surrogate is taken on the image the group was sampled on.
//!
//! Deviation: the paper does not say what its attack maximises, whether groups share one image, or what the reference
//! policy sees; each is an option here.
//! Deviation: groups whose rewards are all equal carry no gradient and, without a KL term, are not run through the
//! update; they count in every denominator, so the result is the same.
//! Deviation: `entropy` is that of the distribution each token was sampled from, so of the policy before the update.

use super::config::{GrpoSettings, KlImage, LossType, ScaleRewards};
use super::fit::{Fit, Student};
use super::items;
use super::lesson::{Lesson, Questions, attack_batch};
use super::sft::StepReport;
use crate::data::Sample;
use crate::error::Result;
use crate::model::assistant::Assistant;
use crate::model::generate::{Completion, Prompt};
use crate::model::sampling::SamplingConfig;
use crate::model::vision::VisionPlan;
use crate::model::vlm::Features;
use crate::nn::recompute::{Gradients, Stage, loss_and_gradients};
use crate::rng;
use crate::roles::policy::{self, Scoring};
use crate::train::advantage::{self, AdvantageConfig};
use crate::train::grpo::{Accumulation, Completions, GrpoLoss, GrpoStats, grpo_loss};
use candle_core::Tensor;
use rand::RngCore;
use serde_json::json;
use std::cell::RefCell;
use std::time::Instant;

/// The group of one question.
struct Group {
    completions: Vec<Completion>,
    texts: Vec<String>,
    accuracy: Vec<f64>,
    format: Vec<f64>,
    total: Vec<f64>,
}

/// How the groups of a step come about.
#[derive(Debug, Clone, Copy)]
pub struct Sampling<'a> {
    /// The frozen policy of the KL term.
    pub reference: Option<&'a Assistant>,
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
    let attacked = if sampling.is_adversarial {
        Some(attack_batch(lesson, &fit.learner.frozen, &questions, fit.step)?)
    } else {
        None
    };
    let pixels =
        &lesson.with_noise(attacked.as_ref().map_or(&clean, |attacked| &attacked.pixels), fit.step)?;
    report.phases.push(("attack", started.elapsed().as_secs_f64()));

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
    let rewards: Vec<Vec<f64>> = groups.iter().map(|group| group.total.clone()).collect();
    let advantages = advantages_of(&rewards, settings)?;
    // Of a vision tower that does not train they hold for the update too, and for the reference.
    let features = lesson.features.is_some().then_some(features);
    let seen = Seen { pixels, clean: &clean, features, sampling };
    let outcome = update(lesson, fit, &questions, &groups, &advantages, &seen)?;
    report.phases.push(("update", started.elapsed().as_secs_f64()));

    describe(&mut report, lesson, &groups, &outcome);
    let prompt_tokens: usize = questions.prompts.iter().map(|prompt| prompt.ids.len()).sum();
    let completion_tokens: usize =
        groups.iter().flat_map(|group| &group.completions).map(|c| c.ids.len()).sum();
    report.num_tokens = (prompt_tokens * settings.group_size + completion_tokens) as u64;
    if settings.max_resamples > 0 {
        report.metrics.insert("groups_resampled".into(), json!(num_resampled));
    }
    let num_attacked = attacked.as_ref().map_or(0, |_| lesson.num_attacked(groups.len()));
    let share = |groups: &[Group]| mean(groups.iter().flat_map(|group| group.accuracy.iter().copied()));
    let metrics = &mut report.metrics;
    if num_attacked > 0 {
        metrics.insert("rewards/accuracy_adversarial/mean".into(), json!(share(&groups[..num_attacked])));
    }
    if num_attacked < groups.len() {
        metrics.insert("rewards/accuracy_clean/mean".into(), json!(share(&groups[num_attacked..])));
    }
    if let Some(attacked) = &attacked {
        metrics.insert("epsilon".into(), json!(attacked.epsilon));
        if let Some((clean, adversarial)) = attacked.losses {
            metrics.insert("loss_clean".into(), json!(clean));
            metrics.insert("loss_adversarial".into(), json!(adversarial));
            metrics.insert("pgd_gain".into(), json!(adversarial - clean));
        }
    }
    write_down(&mut report, &questions, &groups, &advantages, num_attacked);
    Ok(report)
}

/// Samples the groups at `places`, a pass of `micro_batch_size` questions at a time; `attempt` counts how often they were
/// sampled before in this step.
fn roll_out(
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
    let mut groups = Vec::with_capacity(round.places.len());
    for part in round.places.chunks(lesson.micro_batch_size()) {
        let seeds: Vec<Vec<u64>> = part.iter().map(|&q| round.seeds(lesson, q)).collect();
        let prompts: Vec<Prompt> = part.iter().map(|&q| questions.prompts[q].clone()).collect();
        let features = features.select(&image_rows(&questions.prompts, part))?;
        let sampled = policy::sample(frozen, &prompts, Some(&features), &seeds, &decoding)?;
        for (completions, &q) in sampled.into_iter().zip(part) {
            groups.push(Group::judged(lesson, frozen, &questions.samples[q], completions)?);
        }
    }
    Ok(groups)
}

/// Which groups are sampled, and for which time.
#[derive(Clone, Copy)]
struct Round<'a> {
    places: &'a [usize],
    step: u64,
    attempt: u64,
    sampling: &'a Sampling<'a>,
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

impl Group {
    fn judged(
        lesson: &Lesson<'_>,
        frozen: &Assistant,
        sample: &Sample,
        completions: Vec<Completion>,
    ) -> Result<Self> {
        let rewards = lesson.config.grpo.rewards();
        let texts =
            completions.iter().map(|completion| frozen.text_of(completion)).collect::<Result<Vec<_>>>()?;
        let scores: Vec<_> = texts
            .iter()
            .zip(&completions)
            .map(|(text, completion)| {
                let score = rewards.score(text, sample.answer, sample.options.len(), lesson.format());
                // A completion that never ended is not well-formed, whatever its text.
                let format = if completion.is_finished { score.format } else { 0.0 };
                (
                    score.accuracy,
                    format,
                    rewards.accuracy_weight * score.accuracy + rewards.format_weight * format,
                )
            })
            .collect();
        Ok(Self {
            accuracy: scores.iter().map(|s| s.0).collect(),
            format: scores.iter().map(|s| s.1).collect(),
            total: scores.iter().map(|s| s.2).collect(),
            completions,
            texts,
        })
    }

    /// Whether all completions are worth the same, so that none is better than its group.
    fn is_flat(&self) -> bool {
        self.total.iter().all(|total| *total == self.total[0])
    }

    /// Whether completion `c` takes part in the loss.
    fn counts(&self, c: usize, settings: &GrpoSettings) -> bool {
        self.completions[c].is_finished || !settings.mask_truncated
    }

    /// Tokens that take part in the loss.
    fn num_tokens(&self, settings: &GrpoSettings) -> usize {
        let counted = (0..self.completions.len()).filter(|&c| self.counts(c, settings));
        counted.map(|c| self.completions[c].ids.len()).sum()
    }
}

/// Samples groups that teach nothing anew, each until it does or the limit is reached; returns how many were replaced.
fn resample(
    lesson: &Lesson<'_>,
    frozen: &Assistant,
    questions: &Questions,
    features: &Features,
    groups: &mut [Group],
    first: Round<'_>,
) -> Result<usize> {
    let mut replaced = 0;
    for attempt in 1..=lesson.config.grpo.max_resamples as u64 {
        let flat: Vec<usize> = (0..groups.len()).filter(|&g| groups[g].is_flat()).collect();
        if flat.is_empty() {
            break;
        }
        let round = Round { places: &flat, attempt, ..first };
        for (group, &place) in roll_out(lesson, frozen, questions, features, round)?.into_iter().zip(&flat) {
            if !group.is_flat() {
                groups[place] = group;
                replaced += 1;
            }
        }
    }
    Ok(replaced)
}

/// The images the policies see, and how the groups came about.
struct Seen<'a> {
    pixels: &'a [Tensor],
    clean: &'a [Tensor],
    /// What the vision tower says about `pixels`, where it does not train.
    features: Option<Features>,
    sampling: &'a Sampling<'a>,
}

/// What the updates of one step came to.
#[derive(Default)]
struct UpdateOutcome {
    loss: f64,
    grad_norm: f64,
    learning_rate: f64,
    num_groups_updated: usize,
    /// Over the tokens of all passes of the last update; none when no group was updated.
    stats: Option<GrpoStats>,
}

/// Groups of one forward and backward pass.
struct Pass {
    scoring: Scoring,
    /// Tokens of each completion.
    lengths: Vec<usize>,
    /// Whether each token takes part; none when all do.
    mask: Option<Vec<bool>>,
    advantages: Vec<f64>,
    /// What the stages begin with.
    inputs: Vec<Tensor>,
    /// Of the vision tower, where it trains.
    vision: Option<VisionPlan>,
    ref_log_probs: Option<Vec<f64>>,
    /// Under the policy that sampled, known after the first update.
    old_log_probs: Option<Vec<f64>>,
    /// What the loss of these groups alone counts for in the loss of the step.
    share: f64,
}

fn passes_of(
    lesson: &Lesson<'_>,
    assistant: &Assistant,
    questions: &Questions,
    groups: &[Group],
    advantages: &[Vec<f64>],
    seen: &Seen<'_>,
) -> Result<Vec<Pass>> {
    let settings = &lesson.config.grpo;
    let Sampling { reference, assumed, .. } = *seen.sampling;
    let is_wanted = reference.is_some() || assumed.all_groups;
    let is_useful = |&g: &usize| is_wanted || advantages[g].iter().any(|a| *a != 0.0);
    let keep: Vec<usize> =
        (0..groups.len()).filter(is_useful).filter(|&g| groups[g].num_tokens(settings) > 0).collect();
    let all_tokens: usize = groups.iter().map(|group| group.num_tokens(settings)).sum();
    let all_completions = groups.len() * settings.group_size;
    keep.chunks(lesson.micro_batch_size())
        .map(|part| {
            let pixels = items::pick(seen.pixels, part)?;
            let prompts: Vec<Prompt> = part.iter().map(|&g| questions.prompts[g].clone()).collect();
            let ids = |g: usize| groups[g].completions.iter().map(|c| c.ids.clone()).collect();
            let completions: Vec<Vec<Vec<u32>>> = part.iter().map(|&g| ids(g)).collect();
            let scoring = Scoring::new(assistant, &prompts, &completions)?;
            let features = match &seen.features {
                Some(features) => Some(features.select(&image_rows(&questions.prompts, part))?),
                None => None,
            };
            let ref_log_probs = match reference {
                Some(reference) => {
                    let features = match (settings.kl_image, &features) {
                        (KlImage::Adversarial, Some(features)) => features.clone(),
                        (KlImage::Adversarial, None) => policy::encode(reference, &pixels)?,
                        (KlImage::Clean, _) => {
                            lesson.features_of(reference, &items::pick(seen.clean, part)?)?
                        }
                    };
                    Some(to_f64(&scoring.evaluate(reference, Some(&features), settings.temperature)?))
                }
                None => None,
            };
            let mask = settings.mask_truncated.then(|| {
                let of = |g: usize| {
                    let group = &groups[g];
                    let tokens = |c: usize| vec![group.counts(c, settings); group.completions[c].ids.len()];
                    (0..group.completions.len()).flat_map(tokens).collect::<Vec<bool>>()
                };
                part.iter().flat_map(|&g| of(g)).collect()
            });
            let lengths: Vec<usize> = scoring.spans.iter().flatten().map(ExactSizeIterator::len).collect();
            let own_tokens: usize = part.iter().map(|&g| groups[g].num_tokens(settings)).sum();
            // Groups of other passes, and those without a gradient, are left out of the pass, not out of the denominators.
            let share = match settings.loss_type {
                LossType::Dapo | LossType::Cispo => 1.0,
                LossType::Bnpo => own_tokens as f64 / all_tokens as f64,
                _ => lengths.len() as f64 / all_completions as f64,
            };
            let (vision, inputs) = match features {
                Some(features) => (None, features.into_state()),
                None => (Some(assistant.vlm.vision_plan(&policy::grids_of(assistant, &pixels)?)?), pixels),
            };
            Ok(Pass {
                lengths,
                mask,
                advantages: part.iter().flat_map(|&g| advantages[g].iter().copied()).collect(),
                inputs,
                vision,
                ref_log_probs,
                old_log_probs: None,
                share,
                scoring,
            })
        })
        .collect()
}

impl Pass {
    /// The loss, already multiplied by its share, its statistics and gradients.
    fn run(
        &mut self,
        lesson: &Lesson<'_>,
        fit: &Fit<Student>,
        accumulation: &Accumulation,
    ) -> Result<(GrpoLoss, Gradients)> {
        let settings = &lesson.config.grpo;
        let assistant = &fit.learner.assistant;
        let config = settings.loss();
        let mut stages: Vec<Stage<'_>> =
            self.vision.as_ref().map(|plan| assistant.vlm.vision_stages(plan)).unwrap_or_default();
        stages.extend(self.scoring.stages(assistant));
        let (result, refusal) = (RefCell::new(None), RefCell::new(None));
        let loss = |state: &[Tensor]| {
            let log_probs = self.scoring.log_probs(assistant, &state[0], settings.temperature)?;
            let values = to_f64(&log_probs.to_vec1::<f32>()?);
            let batch = Completions {
                lengths: &self.lengths,
                completion_mask: self.mask.as_deref(),
                log_probs: &values,
                old_log_probs: self.old_log_probs.as_deref(),
                ref_log_probs: self.ref_log_probs.as_deref(),
                advantages: &self.advantages,
            };
            let mut loss = grpo_loss(&batch, &config, accumulation).map_err(|error| {
                let text = error.to_string();
                *refusal.borrow_mut() = Some(error);
                candle_core::Error::msg(text)
            })?;
            loss.loss *= self.share;
            let slopes: Vec<f32> = loss.d_log_probs.iter().map(|d| (*d * self.share) as f32).collect();
            *result.borrow_mut() = Some((loss, values));
            // The surrogate's own gradient, in closed form, is the slope of this sum.
            let slopes = Tensor::from_vec(slopes, log_probs.dims1()?, log_probs.device())?;
            (log_probs * slopes)?.sum_all()
        };
        let gradients =
            loss_and_gradients(&stages, &self.inputs, loss, &fit.wanted(), lesson.config.memory());
        drop(stages);
        // What the loss refused keeps its kind, and with it the exit status.
        if let Some(refusal) = refusal.into_inner() {
            return Err(refusal);
        }
        let (_, gradients) = gradients?;
        let (loss, values) = result
            .into_inner()
            .ok_or_else(|| anyhow::anyhow!("a pass of the policy ended without a loss"))?;
        self.old_log_probs.get_or_insert(values);
        Ok((loss, gradients))
    }
}

fn update(
    lesson: &Lesson<'_>,
    fit: &mut Fit<Student>,
    questions: &Questions,
    groups: &[Group],
    advantages: &[Vec<f64>],
    seen: &Seen<'_>,
) -> Result<UpdateOutcome> {
    let settings = &lesson.config.grpo;
    let mut passes = passes_of(lesson, &fit.learner.assistant, questions, groups, advantages, seen)?;
    let num_completions: usize = passes.iter().map(|pass| pass.lengths.len()).sum();
    let mut outcome = UpdateOutcome {
        num_groups_updated: num_completions / settings.group_size,
        learning_rate: super::fit::learning_rate_at(lesson.config, fit.step),
        ..UpdateOutcome::default()
    };
    if passes.is_empty() {
        return Ok(outcome);
    }
    let accumulation = Accumulation {
        gradient_accumulation_steps: 1,
        steps_per_generation: 1,
        num_items_in_batch: groups.iter().map(|group| group.num_tokens(settings)).sum(),
        max_completion_length: seen.sampling.max_new_tokens,
    };
    for _ in 0..settings.num_updates {
        let mut gradients = Gradients::default();
        let (mut loss, mut stats) = (0.0, Vec::with_capacity(passes.len()));
        for pass in &mut passes {
            let (own, own_gradients) = pass.run(lesson, fit, &accumulation)?;
            gradients.add(own_gradients)?;
            loss += own.loss;
            stats.push(own.stats);
        }
        outcome.loss = loss;
        outcome.stats = Some(GrpoStats::joined(&stats));
        outcome.grad_norm = fit.update(&gradients, lesson.config)?.grad_norm;
    }
    Ok(outcome)
}

/// Where the image tokens of the prompts at `keep` stand among those of all prompts.
fn image_rows(prompts: &[Prompt], keep: &[usize]) -> Vec<u32> {
    let starts: Vec<u32> = prompts
        .iter()
        .scan(0, |next, prompt| {
            let start = *next;
            *next += prompt.image_rows.len() as u32;
            Some(start)
        })
        .collect();
    keep.iter().flat_map(|&g| (starts[g]..).take(prompts[g].image_rows.len())).collect()
}

fn advantages_of(rewards: &[Vec<f64>], settings: &GrpoSettings) -> Result<Vec<Vec<f64>>> {
    let rows: Vec<Vec<f64>> = rewards.iter().flatten().map(|reward| vec![*reward]).collect();
    let config = AdvantageConfig {
        group_size: settings.group_size,
        scale_rewards: match settings.scale_rewards {
            ScaleRewards::Group => advantage::ScaleRewards::Group,
            ScaleRewards::Batch => advantage::ScaleRewards::Batch,
            ScaleRewards::None => advantage::ScaleRewards::None,
        },
        ..AdvantageConfig::default()
    };
    let advantages = advantage::group_relative(&rows, &config)?.advantages;
    Ok(advantages.chunks(settings.group_size).map(<[f64]>::to_vec).collect())
}

fn describe(report: &mut StepReport, lesson: &Lesson<'_>, groups: &[Group], outcome: &UpdateOutcome) {
    let all = |part: fn(&Group) -> &Vec<f64>| -> Vec<f64> {
        groups.iter().flat_map(|group| part(group).iter().copied()).collect()
    };
    let (accuracy, format, total) = (all(|g| &g.accuracy), all(|g| &g.format), all(|g| &g.total));
    let completions = || groups.iter().flat_map(|group| &group.completions);
    let num_flat = groups.iter().filter(|group| group.is_flat()).count();
    let mut put = |key: &str, value: f64| {
        report.metrics.insert(key.to_owned(), json!(value));
    };
    put("loss", outcome.loss);
    put("learning_rate", outcome.learning_rate);
    put("grad_norm", outcome.grad_norm);
    put("reward", mean(total.iter().copied()));
    put("reward_std", standard_deviation(&total));
    put("rewards/accuracy/mean", mean(accuracy.iter().copied()));
    put("rewards/accuracy/std", standard_deviation(&accuracy));
    put("rewards/format/mean", mean(format.iter().copied()));
    put("rewards/format/std", standard_deviation(&format));
    put("frac_reward_zero_std", num_flat as f64 / groups.len() as f64);
    put("groups_updated", outcome.num_groups_updated as f64);
    put("entropy", mean(completions().flat_map(|c| c.entropies.iter().map(|h| f64::from(*h)))));
    if let Some(stats) = &outcome.stats {
        if let Some(kl) = stats.kl {
            put("kl", kl);
        }
        if lesson.config.grpo.loss_type == LossType::Cispo {
            put("cispo_clip_ratio", stats.clip_high_mean);
        } else {
            put("clip_ratio/low_mean", stats.clip_low_mean);
            put("clip_ratio/low_min", stats.clip_low_min);
            put("clip_ratio/high_mean", stats.clip_high_mean);
            put("clip_ratio/high_max", stats.clip_high_max);
            put("clip_ratio/region_mean", stats.clip_region_mean);
        }
    }
    let lengths = |only_finished: bool| -> Vec<f64> {
        let counted = completions().filter(|c| c.is_finished || !only_finished);
        counted.map(|c| c.ids.len() as f64).collect()
    };
    let (all_lengths, terminated) = (lengths(false), lengths(true));
    for (words, lengths) in [("length", &all_lengths), ("terminated_length", &terminated)] {
        put(&format!("completions/mean_{words}"), mean(lengths.iter().copied()));
        let least = lengths.iter().copied().reduce(f64::min).unwrap_or(0.0);
        put(&format!("completions/min_{words}"), least);
        put(&format!("completions/max_{words}"), lengths.iter().copied().fold(0.0, f64::max));
    }
    put("completions/clipped_ratio", 1.0 - terminated.len() as f64 / all_lengths.len() as f64);
}

fn write_down(
    report: &mut StepReport,
    questions: &Questions,
    groups: &[Group],
    advantages: &[Vec<f64>],
    num_attacked: usize,
) {
    // One question a step is enough to read along; every completion of it.
    if let (Some(sample), Some(group)) = (questions.samples.first(), groups.first()) {
        for (g, text) in group.texts.iter().enumerate() {
            report.completions.push(json!({
                "id": sample.id,
                "attacked": num_attacked > 0,
                "answer": sample.answer_letter().to_string(),
                "completion": text,
                "reward": group.total[g],
                "accuracy": group.accuracy[g],
                "format": group.format[g],
                "advantage": advantages[0][g],
            }));
        }
    }
}

fn mean(values: impl Iterator<Item = f64>) -> f64 {
    let (sum, count) = values.fold((0.0, 0usize), |(sum, count), value| (sum + value, count + 1));
    if count == 0 { 0.0 } else { sum / count as f64 }
}

/// Sample standard deviation.
fn standard_deviation(values: &[f64]) -> f64 {
    let centre = mean(values.iter().copied());
    let squares: f64 = values.iter().map(|v| (v - centre).powi(2)).sum();
    if values.len() < 2 { 0.0 } else { (squares / (values.len() - 1) as f64).sqrt() }
}

fn to_f64(values: &[f32]) -> Vec<f64> {
    values.iter().map(|value| f64::from(*value)).collect()
}
