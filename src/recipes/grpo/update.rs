//! The policy's update on groups that were sampled: passes of groups, their loss and gradients, one or several steps.

use super::Sampling;
use super::group::Group;
use crate::error::Result;
use crate::model::assistant::Assistant;
use crate::model::generate::Prompt;
use crate::model::vision::VisionPlan;
use crate::model::vlm::Features;
use crate::nn::recompute::{Gradients, Stage, loss_and_gradients};
use crate::recipes::adversary::{Adversary, Attacked};
use crate::recipes::config::{KlImage, LossType};
use crate::recipes::fit::{self, Fit, Student};
use crate::recipes::items;
use crate::recipes::lesson::{Lesson, Questions};
use crate::roles::policy::{self, Scoring};
use crate::train::grpo::{Accumulation, Completions, GrpoLoss, GrpoStats, grpo_loss};
use candle_core::Tensor;
use std::cell::RefCell;
use std::time::Instant;

/// The images the policies see, and how the groups came about.
pub(super) struct Seen<'a> {
    pub(super) pixels: &'a [Tensor],
    pub(super) clean: &'a [Tensor],
    /// What the vision tower says about `pixels`, where it does not train.
    pub(super) features: Option<Features>,
    pub(super) sampling: &'a Sampling<'a>,
    /// Who attacks the images again before each further update, and what came of the attack before; none: nobody does.
    pub(super) adversary: Option<(&'a Adversary<'a>, &'a Attacked)>,
}

/// What the updates of one step came to.
pub(super) struct UpdateOutcome {
    pub(super) loss: f64,
    pub(super) grad_norm: f64,
    pub(super) learning_rate: f64,
    pub(super) num_groups_updated: usize,
    /// How far the log-probabilities of the first update are from those that the tokens were sampled with.
    pub(super) sampling_gap: SamplingGap,
    /// Over all groups, of the last update.
    pub(super) stats: GrpoStats,
    /// Loss, gradient norm and statistics of each update.
    pub(super) each: Vec<(f64, f64, GrpoStats)>,
    /// The last attack between two updates.
    pub(super) attacked: Option<Attacked>,
    /// Seconds of all of them.
    pub(super) refresh_seconds: f64,
}

/// Distances between two log-probabilities of the same tokens, those that take part in the loss.
#[derive(Debug, Clone, Copy, PartialEq, Default)]
pub(super) struct SamplingGap {
    sum: f64,
    pub(super) max: f64,
    count: usize,
}

impl SamplingGap {
    /// Adds tokens; without a mask all of them take part.
    fn add(&mut self, sampled: impl Iterator<Item = f32>, scored: &[f64], mask: Option<&[bool]>) {
        for (i, (sampled, scored)) in sampled.zip(scored).enumerate() {
            if mask.is_none_or(|mask| mask[i]) {
                let gap = (f64::from(sampled) - scored).abs();
                self.sum += gap;
                self.max = self.max.max(gap);
                self.count += 1;
            }
        }
    }

    /// None where no token took part.
    pub(super) fn mean(&self) -> Option<f64> {
        (self.count > 0).then(|| self.sum / self.count as f64)
    }
}

/// Groups of one forward and backward pass.
struct Pass {
    /// Of their questions in the step.
    places: Vec<usize>,
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
    grids: Vec<[usize; 3]>,
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
            let grids = policy::grids_of(assistant, &pixels)?;
            let (vision, inputs) = match features {
                Some(features) => (None, features.into_state()),
                None => (Some(assistant.vlm.vision_plan(&grids)?), pixels),
            };
            Ok(Pass {
                places: part.to_vec(),
                lengths,
                mask,
                advantages: part.iter().flat_map(|&g| advantages[g].iter().copied()).collect(),
                inputs,
                vision,
                grids,
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
        let _dropout = lesson.dropout(fit, &self.scoring, &self.places, &self.grids);
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

pub(super) fn update(
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
    let is_run = |g: &usize| passes.iter().any(|pass| pass.places.contains(g));
    let idle = (0..groups.len()).filter(|g| !is_run(g)).map(|g| groups[g].num_ratios(settings)).sum();
    let mut outcome = UpdateOutcome {
        loss: 0.0,
        grad_norm: 0.0,
        learning_rate: fit::learning_rate_at(lesson.config, fit.step),
        num_groups_updated: num_completions / settings.group_size,
        sampling_gap: SamplingGap::default(),
        stats: GrpoStats::of_idle(idle),
        each: Vec::new(),
        attacked: None,
        refresh_seconds: 0.0,
    };
    let accumulation = Accumulation {
        gradient_accumulation_steps: 1,
        steps_per_generation: 1,
        num_items_in_batch: groups.iter().map(|group| group.num_tokens(settings)).sum(),
        max_completion_length: seen.sampling.max_new_tokens,
    };
    for number in 0..settings.num_updates {
        if number > 0
            && !passes.is_empty()
            && let Some((adversary, first)) = seen.adversary
        {
            let started = Instant::now();
            let last = outcome.attacked.as_ref().unwrap_or(first);
            let again = adversary.attack_again(&fit.learner.frozen, number, last)?;
            passes = renewed(lesson, fit, (questions, groups, advantages), seen, &again, passes)?;
            outcome.attacked = Some(again);
            outcome.refresh_seconds += started.elapsed().as_secs_f64();
        }
        // Where no group teaches anything the update is one by a gradient of zero: the optimiser's memory goes on.
        let mut gradients =
            if passes.is_empty() { Gradients::zero(&fit.wanted())? } else { Gradients::default() };
        let (mut loss, mut stats) = (0.0, vec![GrpoStats::of_idle(idle)]);
        for pass in &mut passes {
            lesson.exit.check()?;
            let (own, own_gradients) = pass.run(lesson, fit, &accumulation)?;
            gradients.add(own_gradients)?;
            loss += own.loss;
            stats.push(own.stats);
            if let (0, Some(scored)) = (number, &pass.old_log_probs) {
                let completions = pass.places.iter().flat_map(|&g| &groups[g].completions);
                let sampled = completions.flat_map(|completion| completion.log_probs.iter().copied());
                outcome.sampling_gap.add(sampled, scored, pass.mask.as_deref());
            }
        }
        let stats = GrpoStats::joined(&stats);
        outcome.loss = loss;
        outcome.stats = stats;
        lesson.exit.close();
        outcome.grad_norm = fit.update(&gradients, lesson.config)?.grad_norm;
        outcome.each.push((loss, outcome.grad_norm, stats));
    }
    Ok(outcome)
}

/// The passes of the same groups on images that were attacked again, each with its old log-probabilities: those of the
/// images that were sampled on. The reference sees the new images if it saw the old ones.
fn renewed(
    lesson: &Lesson<'_>,
    fit: &Fit<Student>,
    (questions, groups, advantages): (&Questions, &[Group], &[Vec<f64>]),
    seen: &Seen<'_>,
    attacked: &Attacked,
    passes: Vec<Pass>,
) -> Result<Vec<Pass>> {
    let pixels = lesson.with_noise(&attacked.pixels, fit.step)?;
    lesson.evidence.note(|noted| (noted.phase, noted.pixels) = ("update", pixels.clone()));
    let features = match lesson.features {
        Some(_) => Some(policy::encode(&fit.learner.frozen, &pixels)?),
        None => None,
    };
    let seen =
        Seen { pixels: &pixels, clean: seen.clean, features, sampling: seen.sampling, adversary: None };
    let mut new = passes_of(lesson, &fit.learner.assistant, questions, groups, advantages, &seen)?;
    for (new, old) in new.iter_mut().zip(passes) {
        new.old_log_probs = old.old_log_probs;
    }
    Ok(new)
}

/// Where the image tokens of the prompts at `keep` stand among those of all prompts.
pub(super) fn image_rows(prompts: &[Prompt], keep: &[usize]) -> Vec<u32> {
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

fn to_f64(values: &[f32]) -> Vec<f64> {
    values.iter().map(|value| f64::from(*value)).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_gap_of_sampling_is_over_the_tokens_in_the_loss() {
        let mut gap = SamplingGap::default();
        assert_eq!(gap.mean(), None);
        gap.add([-1.0, -2.0, -9.0].into_iter(), &[-1.5, -1.75, -1.0], Some(&[true, true, false]));
        gap.add([-0.25].into_iter(), &[-0.25], None);
        assert_eq!((gap.mean(), gap.max), (Some(0.25), 0.5));
    }
}
