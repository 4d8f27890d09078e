//! One step of TRADES (Zhang et al. 2019): supervised fine-tuning on clean images, with a penalty on how far PGD images move
//! what the model says.
//!
//! The loss is the mean negative log-likelihood over the tokens of the right completions on the clean images, plus `trades_beta`
//! times the mean over the tokens of the attacked questions of `KL(p_clean || p_adversarial)` between the distributions of
//! the next token, each given the right tokens before it. Gradients go through both branches. The adversary maximises the
//! same divergence, from clean pixels with Gaussian noise of 0.001, as the paper's code does.
//!
//! Deviation: the paper divides the divergence by the images of a batch, of one label each; here a label is a completion,
//! and tokens are counted as they are in the likelihood.

use super::adversary::Adversary;
use super::fit::{Fit, Student};
use super::items;
use super::lesson::Lesson;
use super::pictures;
use super::step::StepReport;
use crate::error::{Error, Result};
use crate::model::assistant::Assistant;
use crate::model::generate::Prompt;
use crate::nn::recompute::{self, Gradients, Memory, Stage};
use crate::roles::policy::{self, Scoring};
use candle_core::Tensor;
use serde_json::json;
use std::cell::RefCell;
use std::time::Instant;

/// Questions of one pass, each shown clean, and the first of them attacked too.
#[derive(Debug)]
pub struct Branches<'a> {
    /// The questions.
    pub prompts: &'a [Prompt],
    /// The right completion of each.
    pub targets: &'a [Vec<u32>],
    /// Clean images, one for each question, `[n, 3, height, width]` each.
    pub clean: &'a [Tensor],
    /// Attacked images of the first questions.
    pub adversarial: &'a [Tensor],
    /// What the sum of the clean tokens' losses is multiplied with.
    pub clean_weight: f64,
    /// What the sum of the attacked tokens' divergences is multiplied with.
    pub divergence_weight: f64,
}

/// Sums over the tokens of a pass.
#[derive(Debug, Clone, Copy, PartialEq, Default)]
pub struct Sums {
    /// What is minimised.
    pub loss: f64,
    /// Negative log-likelihood on the clean images.
    pub clean: f64,
    /// The same of the attacked questions alone.
    pub clean_of_attacked: f64,
    /// Negative log-likelihood on the attacked images.
    pub adversarial: f64,
    /// Divergence between the two.
    pub divergence: f64,
}

impl Sums {
    fn add(&mut self, other: Self) {
        self.loss += other.loss;
        self.clean += other.clean;
        self.clean_of_attacked += other.clean_of_attacked;
        self.adversarial += other.adversarial;
        self.divergence += other.divergence;
    }
}

fn total(values: &[f32]) -> f64 {
    values.iter().map(|value| f64::from(*value)).sum()
}

/// The loss of a pass and its gradients by `wanted`. Clean and attacked copies go through the model together, so that what is
/// recomputed is recomputed once.
///
/// # Errors
/// When images and prompts do not match.
pub fn loss_and_gradients(
    assistant: &Assistant,
    branches: &Branches<'_>,
    wanted: &[Tensor],
    memory: Memory,
) -> Result<(Sums, Gradients)> {
    let Branches { prompts, targets, clean_weight, divergence_weight, .. } = *branches;
    let mut num_attacked = 0;
    for tensor in branches.adversarial {
        num_attacked += tensor.dim(0)?;
    }
    let copies: Vec<Prompt> = prompts.iter().chain(&prompts[..num_attacked]).cloned().collect();
    let completions: Vec<Vec<Vec<u32>>> =
        targets.iter().chain(&targets[..num_attacked]).map(|target| vec![target.clone()]).collect();
    let scoring = Scoring::new(assistant, &copies, &completions)?;
    let inputs: Vec<Tensor> = branches.clean.iter().chain(branches.adversarial).cloned().collect();
    let plan = assistant.vlm.vision_plan(&policy::grids_of(assistant, &inputs)?)?;
    let mut stages: Vec<Stage<'_>> = assistant.vlm.vision_stages(&plan);
    stages.extend(scoring.stages(assistant));
    let (all, pair) = (scoring.targets_of(0..prompts.len()), scoring.targets_of(0..num_attacked));
    let attacked = scoring.targets_of(prompts.len()..copies.len());
    let sums = RefCell::new(Sums::default());
    let loss = |state: &[Tensor]| {
        let clean = scoring.predicting(&state[0], all.clone())?;
        let clean_log_probs = scoring.log_probs_from(assistant, &clean, all.clone())?;
        let mut loss = (clean_log_probs.sum_all()? * -clean_weight)?;
        let values = clean_log_probs.to_vec1::<f32>()?;
        let mut sums = sums.borrow_mut();
        *sums = Sums { clean: -total(&values), ..Sums::default() };
        if num_attacked > 0 {
            let moved = scoring.predicting(&state[0], attacked.clone())?;
            let divergence = assistant.vlm.divergence(&clean.narrow(0, 0, pair.len())?, &moved)?;
            loss = (loss + (divergence.sum_all()? * divergence_weight)?)?;
            // Looked at, not learnt from.
            let log_probs = scoring.log_probs_from(assistant, &moved.detach(), attacked.clone())?;
            sums.clean_of_attacked = -total(&values[..pair.len()]);
            sums.adversarial = -total(&log_probs.to_vec1::<f32>()?);
            sums.divergence = total(&divergence.to_vec1::<f32>()?);
        }
        sums.loss = clean_weight * sums.clean + divergence_weight * sums.divergence;
        Ok(loss)
    };
    let (_, gradients) = recompute::loss_and_gradients(&stages, &inputs, loss, wanted, memory)?;
    Ok((sums.into_inner(), gradients))
}

/// Trains on the questions of the fit's current step.
///
/// # Errors
/// When a loss or gradient is not finite; [`Lesson::located`] adds the questions.
pub fn step(lesson: &Lesson<'_>, fit: &mut Fit<Student>) -> Result<StepReport> {
    let mut report = StepReport::default();
    let questions = lesson.questions(&fit.learner.frozen, fit.step)?;
    let started = Instant::now();
    let adversary = Adversary { lesson, questions: &questions, step: fit.step, sampling: None };
    let attacked = adversary.attack(&fit.learner.frozen)?;
    // One noise for both: their divergence is the adversary's work alone.
    let clean = lesson.with_noise(&items::stack(&fit.learner.frozen, &questions.images)?, fit.step)?;
    let adversarial = lesson.with_noise(&attacked.pixels, fit.step)?;
    lesson.evidence.note(|noted| {
        (noted.phase, noted.pixels, noted.clean) = ("update", adversarial.clone(), clean.clone());
    });
    report.phases.push(("attack", started.elapsed().as_secs_f64()));

    let started = Instant::now();
    let num_attacked = lesson.num_attacked(fit.step, questions.samples.len());
    let tokens = |count: usize| questions.targets[..count].iter().map(Vec::len).sum::<usize>();
    let (all_tokens, attacked_tokens) = (tokens(questions.targets.len()), tokens(num_attacked));
    let divergence_weight = lesson.config.adversary.trades_beta / attacked_tokens.max(1) as f64;
    let (mut sums, mut gradients) = (Sums::default(), Gradients::default());
    let places: Vec<usize> = (0..questions.prompts.len()).collect();
    for part in places.chunks(lesson.micro_batch_size()) {
        let own = part[0]..part[0] + part.len();
        let own_attacked = &part[..num_attacked.clamp(own.start, own.end) - own.start];
        let branches = Branches {
            prompts: &questions.prompts[own.clone()],
            targets: &questions.targets[own],
            clean: &items::pick(&clean, part)?,
            adversarial: &items::pick(&adversarial, own_attacked)?,
            clean_weight: 1.0 / all_tokens as f64,
            divergence_weight,
        };
        let (own, own_gradients) =
            loss_and_gradients(&fit.learner.assistant, &branches, &fit.wanted(), lesson.config.memory())?;
        sums.add(own);
        gradients.add(own_gradients)?;
    }
    if !sums.loss.is_finite() {
        return Err(Error::NonFinite(format!("the loss is {}", sums.loss)));
    }
    let update = fit.update(&gradients, lesson.config)?;
    report.phases.push(("update", started.elapsed().as_secs_f64()));

    report.pictures = pictures::of_attack(lesson, &questions, Some(&attacked), fit.step)?;
    let metrics = &mut report.metrics;
    metrics.insert("loss".into(), json!(sums.loss));
    metrics.insert("learning_rate".into(), json!(update.learning_rate));
    metrics.insert("grad_norm".into(), json!(update.grad_norm));
    attacked.describe(lesson, metrics);
    if num_attacked > 0 {
        // In the units of the other recipes, nats per completion; the attack's own loss is the divergence, from 0.
        let of_one = |sum: f64| sum / num_attacked as f64;
        metrics.insert("loss_clean".into(), json!(of_one(sums.clean_of_attacked)));
        metrics.insert("loss_adversarial".into(), json!(of_one(sums.adversarial)));
        metrics.insert("pgd_gain".into(), json!(of_one(sums.adversarial - sums.clean_of_attacked)));
        let divergence = sums.divergence / attacked_tokens as f64;
        metrics.insert("kl_clean_adversarial".into(), json!(divergence));
    }
    let rows = |count: usize| -> usize {
        tokens(count) + questions.prompts[..count].iter().map(|prompt| prompt.ids.len()).sum::<usize>()
    };
    report.num_tokens = (rows(questions.prompts.len()) + rows(num_attacked)) as u64;
    Ok(report)
}
