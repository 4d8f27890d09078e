//! One step of supervised fine-tuning, on clean images (`sft`) or on attacked ones (`at_sft`).
//!
//! The loss is the mean negative log-likelihood over the tokens of the right completions, the token that ends the turn
//! included; prompt and image tokens are never learnt.

use super::adversary::Adversary;
use super::fit::{Fit, Student};
use super::items;
use super::lesson::{Lesson, Questions};
use super::pictures;
use super::step::StepReport;
use crate::error::{Error, Result};
use crate::nn::recompute::{Gradients, Stage, loss_and_gradients};
use crate::roles::policy::{self, Scoring};
use candle_core::Tensor;
use serde_json::json;
use std::time::Instant;

/// Trains on the questions of the fit's current step.
///
/// # Errors
/// When a loss or gradient is not finite; [`Lesson::located`] adds the questions.
pub fn step(lesson: &Lesson<'_>, fit: &mut Fit<Student>, is_adversarial: bool) -> Result<StepReport> {
    let mut report = StepReport::default();
    let questions = lesson.questions(&fit.learner.frozen, fit.step)?;
    let started = Instant::now();
    let (pixels, attacked) = if is_adversarial {
        let adversary = Adversary { lesson, questions: &questions, step: fit.step, sampling: None };
        let attacked = adversary.attack(&fit.learner.frozen)?;
        (attacked.pixels.clone(), Some(attacked))
    } else {
        (items::stack(&fit.learner.frozen, &questions.images)?, None)
    };
    let pixels = lesson.with_noise(&pixels, fit.step)?;
    lesson.evidence.note(|noted| (noted.phase, noted.pixels) = ("update", pixels.clone()));
    let phase = if is_adversarial { "attack" } else { "images" };
    report.phases.push((phase, started.elapsed().as_secs_f64()));

    let started = Instant::now();
    let is_new = is_adversarial || lesson.config.noise_sigma > 0.0;
    let (loss, gradients) = loss_of(lesson, fit, &questions, &pixels, is_new)?;
    if !loss.is_finite() {
        return Err(Error::NonFinite(format!("the loss is {loss}")));
    }
    let update = fit.update(&gradients, lesson.config)?;
    report.phases.push(("update", started.elapsed().as_secs_f64()));

    report.pictures = pictures::of_attack(lesson, &questions, attacked.as_ref(), fit.step)?;
    let metrics = &mut report.metrics;
    metrics.insert("loss".into(), json!(loss));
    metrics.insert("learning_rate".into(), json!(update.learning_rate));
    metrics.insert("grad_norm".into(), json!(update.grad_norm));
    let num_tokens = questions.prompts.iter().map(|prompt| prompt.ids.len()).sum::<usize>()
        + questions.targets.iter().map(Vec::len).sum::<usize>();
    report.num_tokens = num_tokens as u64;
    if let Some(attacked) = attacked {
        attacked.describe(lesson, metrics);
    }
    Ok(report)
}

/// The loss of all questions and its gradients, added up over passes of `micro_batch_size` questions. Each pass has
/// the weight of its target tokens, so that the sum is the mean over all of them. `is_new`: the pixels were made for this step.
fn loss_of(
    lesson: &Lesson<'_>,
    fit: &Fit<Student>,
    questions: &Questions,
    pixels: &[Tensor],
    is_new: bool,
) -> Result<(f64, Gradients)> {
    let vlm = &fit.learner.assistant.vlm;
    let num_targets: usize = questions.targets.iter().map(Vec::len).sum();
    // Pixels that never come back are not worth remembering.
    let cache = lesson.features.as_ref().filter(|_| !is_new);
    let (mut total, mut gradients) = (0.0, Gradients::default());
    let all: Vec<usize> = (0..questions.prompts.len()).collect();
    for part in all.chunks(lesson.micro_batch_size()) {
        lesson.exit.check()?;
        let pixels = if part.len() == all.len() { pixels.to_vec() } else { items::pick(pixels, part)? };
        let completions: Vec<Vec<Vec<u32>>> =
            part.iter().map(|&i| vec![questions.targets[i].clone()]).collect();
        let prompts = &questions.prompts[part[0]..part[0] + part.len()];
        let scoring = Scoring::new(&fit.learner.assistant, prompts, &completions)?;
        let grids = policy::grids_of(&fit.learner.assistant, &pixels)?;
        let (vision, inputs) = match cache {
            _ if pixels.is_empty() => (None, pixels),
            Some(cache) => (None, cache.encode(&fit.learner.frozen, &pixels)?.into_state()),
            None => (Some(vlm.vision_plan(&grids)?), pixels),
        };
        let _dropout = lesson.dropout(fit, &scoring, part, &grids);
        let mut stages: Vec<Stage<'_>> =
            vision.as_ref().map(|plan| vlm.vision_stages(plan)).unwrap_or_default();
        stages.extend(scoring.stages(&fit.learner.assistant));
        let loss = |state: &[Tensor]| {
            scoring.log_probs(&fit.learner.assistant, &state[0], 1.0)?.sum_all()?
                * (-1.0 / num_targets as f64)
        };
        let (loss, own) = loss_and_gradients(&stages, &inputs, loss, &fit.wanted(), lesson.config.memory())?;
        total += f64::from(loss.to_scalar::<f32>()?);
        gradients.add(own)?;
    }
    Ok((total, gradients))
}
