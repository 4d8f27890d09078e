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
//! Deviation: `entropy` is estimated by minus the mean log-probability of the sampled tokens.

use super::config::{GrpoSettings, KlImage, ScaleRewards};
use super::fit::{Fit, Student};
use super::items;
use super::lesson::{Lesson, Questions, attack_batch};
use super::sft::StepReport;
use crate::error::Result;
use crate::model::assistant::Assistant;
use crate::model::generate::Completion;
use crate::model::sampling::SamplingConfig;
use crate::nn::recompute::{Stage, loss_and_gradients};
use crate::reward::RewardConfig;
use crate::rng;
use crate::roles::policy::{self, Scoring};
use crate::train::advantage::{self, AdvantageConfig};
use crate::train::grpo::{Accumulation, Completions, GrpoConfig, LossType, grpo_loss};
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
    let groups = roll_out(lesson, &fit.learner.frozen, &questions, pixels, fit.step, sampling)?;
    report.phases.push(("rollout", started.elapsed().as_secs_f64()));

    let started = Instant::now();
    let rewards: Vec<Vec<f64>> = groups.iter().map(|group| group.total.clone()).collect();
    let advantages = advantages_of(&rewards, settings)?;
    let seen = Seen { pixels, clean: &clean, sampling };
    let outcome = update(lesson, fit, &questions, &groups, &advantages, &seen)?;
    report.phases.push(("update", started.elapsed().as_secs_f64()));

    describe(&mut report, lesson, &groups, &rewards, &outcome);
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

fn roll_out(
    lesson: &Lesson<'_>,
    frozen: &Assistant,
    questions: &Questions,
    pixels: &[Tensor],
    step: u64,
    sampling: &Sampling<'_>,
) -> Result<Vec<Group>> {
    let settings = &lesson.config.grpo;
    let seeds: Vec<Vec<u64>> = (0..questions.prompts.len() as u64)
        .map(|q| {
            (0..settings.group_size as u64)
                .map(|g| rng::stream(lesson.seed, "rollout", &[step, q, g]).next_u64())
                .collect()
        })
        .collect();
    let mut decoding = frozen.decoding(sampling.max_new_tokens, SamplingConfig::at(settings.temperature));
    if sampling.assumed.longest {
        decoding.stop_ids.clear();
    }
    let sampled = policy::sample(frozen, &questions.prompts, pixels, &seeds, &decoding)?;
    let rewards = RewardConfig {
        accuracy_weight: settings.accuracy_weight,
        format_weight: settings.format_weight,
        graded: settings.graded,
    };
    sampled
        .into_iter()
        .zip(&questions.samples)
        .map(|(completions, sample)| {
            let texts = completions
                .iter()
                .map(|completion| frozen.text_of(completion))
                .collect::<Result<Vec<_>>>()?;
            let scores: Vec<_> = texts
                .iter()
                .zip(&completions)
                .map(|(text, completion)| {
                    let score = rewards.score(text, sample.answer, sample.options.len(), lesson.is_cot());
                    // A completion that never ended is not well-formed, whatever its text.
                    let format = if completion.is_finished { score.format } else { 0.0 };
                    let total = settings.accuracy_weight * score.accuracy + settings.format_weight * format;
                    (score.accuracy, format, total)
                })
                .collect();
            Ok(Group {
                accuracy: scores.iter().map(|s| s.0).collect(),
                format: scores.iter().map(|s| s.1).collect(),
                total: scores.iter().map(|s| s.2).collect(),
                completions,
                texts,
            })
        })
        .collect()
}

/// The images the policies see, and how the groups came about.
struct Seen<'a> {
    pixels: &'a [Tensor],
    clean: &'a [Tensor],
    sampling: &'a Sampling<'a>,
}

/// What the updates of one step came to.
#[derive(Default)]
struct UpdateOutcome {
    loss: f64,
    kl: f64,
    entropy: f64,
    grad_norm: f64,
    learning_rate: f64,
    clip_low: f64,
    clip_high: f64,
    num_groups_updated: usize,
}

fn update(
    lesson: &Lesson<'_>,
    fit: &mut Fit<Student>,
    questions: &Questions,
    groups: &[Group],
    advantages: &[Vec<f64>],
    seen: &Seen<'_>,
) -> Result<UpdateOutcome> {
    let Sampling { reference, max_new_tokens, assumed, .. } = *seen.sampling;
    let settings = &lesson.config.grpo;
    let keep: Vec<usize> = (0..groups.len())
        .filter(|&g| reference.is_some() || assumed.all_groups || advantages[g].iter().any(|a| *a != 0.0))
        .collect();
    let mut outcome = UpdateOutcome {
        num_groups_updated: keep.len(),
        learning_rate: super::fit::learning_rate_at(lesson.config, fit.step),
        ..UpdateOutcome::default()
    };
    if keep.is_empty() {
        return Ok(outcome);
    }
    let pixels = items::pick(seen.pixels, &keep)?;
    let prompts: Vec<_> = keep.iter().map(|&g| questions.prompts[g].clone()).collect();
    let completions: Vec<Vec<Vec<u32>>> =
        keep.iter().map(|&g| groups[g].completions.iter().map(|c| c.ids.clone()).collect()).collect();
    let scoring = Scoring::new(&fit.learner.assistant, &prompts, &completions)?;
    let ref_log_probs = match reference {
        Some(reference) => {
            let images = match settings.kl_image {
                KlImage::Adversarial => pixels.clone(),
                KlImage::Clean => items::pick(seen.clean, &keep)?,
            };
            let features = policy::encode(reference, &images)?;
            Some(to_f64(&scoring.evaluate(reference, Some(&features), settings.temperature)?))
        }
        None => None,
    };
    let lengths: Vec<usize> = scoring.spans.iter().flatten().map(ExactSizeIterator::len).collect();
    let kept_advantages: Vec<f64> = keep.iter().flat_map(|&g| advantages[g].iter().copied()).collect();
    let config = grpo_config(settings);
    let kept_tokens: usize = lengths.iter().sum();
    let all_tokens: usize = groups.iter().flat_map(|g| &g.completions).map(|c| c.ids.len()).sum();
    let all_completions = groups.len() * settings.group_size;
    // Groups without a gradient are left out of the pass, not out of the denominators.
    let share = match config.loss_type {
        LossType::Dapo | LossType::Cispo => 1.0,
        LossType::Bnpo => kept_tokens as f64 / all_tokens as f64,
        _ => lengths.len() as f64 / all_completions as f64,
    };
    let accumulation = Accumulation {
        gradient_accumulation_steps: 1,
        steps_per_generation: 1,
        num_items_in_batch: all_tokens,
        max_completion_length: max_new_tokens,
    };
    let mut old_log_probs: Option<Vec<f64>> = None;
    for _ in 0..settings.num_updates {
        let plan =
            fit.learner.assistant.vlm.vision_plan(&policy::grids_of(&fit.learner.assistant, &pixels)?)?;
        let mut stages: Vec<Stage<'_>> = fit.learner.assistant.vlm.vision_stages(&plan);
        stages.extend(scoring.stages(&fit.learner.assistant));
        let (result, refusal) = (RefCell::new(None), RefCell::new(None));
        let loss = |state: &[Tensor]| {
            let log_probs = scoring.log_probs(&fit.learner.assistant, &state[0], settings.temperature)?;
            let values = to_f64(&log_probs.to_vec1::<f32>()?);
            let batch = Completions {
                lengths: &lengths,
                completion_mask: None,
                log_probs: &values,
                old_log_probs: old_log_probs.as_deref(),
                ref_log_probs: ref_log_probs.as_deref(),
                advantages: &kept_advantages,
            };
            let loss = grpo_loss(&batch, &config, &accumulation).map_err(|error| {
                let text = error.to_string();
                *refusal.borrow_mut() = Some(error);
                candle_core::Error::msg(text)
            })?;
            let slopes: Vec<f32> = loss.d_log_probs.iter().map(|d| (*d * share) as f32).collect();
            *result.borrow_mut() = Some((loss, values));
            // The surrogate's own gradient, in closed form, is the slope of this sum.
            let slopes = Tensor::from_vec(slopes, log_probs.dims1()?, log_probs.device())?;
            (log_probs * slopes)?.sum_all()
        };
        let gradients = loss_and_gradients(&stages, &pixels, loss, &fit.wanted(), lesson.config.memory());
        drop(stages);
        // What the loss refused keeps its kind, and with it the exit status.
        if let Some(refusal) = refusal.into_inner() {
            return Err(refusal);
        }
        let (_, gradients) = gradients?;
        let Some((loss, values)) = result.into_inner() else { continue };
        outcome.loss = loss.loss * share;
        outcome.kl = loss.stats.kl.unwrap_or(0.0);
        outcome.clip_low = loss.stats.clip_low_mean;
        outcome.clip_high = loss.stats.clip_high_mean;
        outcome.entropy = -mean(values.iter().copied());
        let applied = fit.update(&gradients, lesson.config)?;
        outcome.grad_norm = applied.grad_norm;
        old_log_probs.get_or_insert(values);
    }
    Ok(outcome)
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

fn grpo_config(settings: &GrpoSettings) -> GrpoConfig {
    use super::config::LossType as Name;
    GrpoConfig {
        loss_type: match settings.loss_type {
            Name::Grpo => LossType::Grpo,
            Name::Bnpo => LossType::Bnpo,
            Name::DrGrpo => LossType::DrGrpo,
            Name::Dapo => LossType::Dapo,
            Name::Cispo => LossType::Cispo,
        },
        clip_low: settings.clip_low,
        clip_high: settings.clip_high,
        kl_coef: settings.kl_coef,
        ..GrpoConfig::default()
    }
}

fn describe(
    report: &mut StepReport,
    lesson: &Lesson<'_>,
    groups: &[Group],
    rewards: &[Vec<f64>],
    outcome: &UpdateOutcome,
) {
    let all = |part: fn(&Group) -> &Vec<f64>| -> Vec<f64> {
        groups.iter().flat_map(|group| part(group).iter().copied()).collect()
    };
    let (accuracy, format, total) = (all(|g| &g.accuracy), all(|g| &g.format), all(|g| &g.total));
    let lengths: Vec<f64> =
        groups.iter().flat_map(|g| &g.completions).map(|completion| completion.ids.len() as f64).collect();
    let clipped = groups.iter().flat_map(|g| &g.completions).filter(|c| !c.is_finished).count();
    let zero_variance = rewards.iter().filter(|group| group.iter().all(|r| *r == group[0])).count();
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
    put("frac_reward_zero_std", zero_variance as f64 / groups.len() as f64);
    put("groups_updated", outcome.num_groups_updated as f64);
    if lesson.config.grpo.kl_coef > 0.0 {
        put("kl", outcome.kl);
    }
    put("entropy", outcome.entropy);
    put("clip_ratio/low_mean", outcome.clip_low);
    put("clip_ratio/high_mean", outcome.clip_high);
    put("completions/mean_length", mean(lengths.iter().copied()));
    put("completions/max_length", lengths.iter().copied().fold(0.0, f64::max));
    put("completions/clipped_ratio", clipped as f64 / lengths.len() as f64);
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
