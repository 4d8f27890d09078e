//! The GRPO family of policy losses over packed completions, with the exact gradient.
//!
//! The loss is a function of the log-probabilities of the sampled tokens alone, so it is computed here in double
//! precision without a tensor; the caller sends `d_log_probs` back through its model. Also: importance ratios by
//! token or sequence, two-sided clipping, the k3 estimate of the divergence from a reference policy, aggregation
//! that does not depend on how a batch is cut into micro-batches, and what a log says about all this.
//! Sampling, rewards and advantages are elsewhere.

use crate::error::{ConfigError, Error, Result};
use serde::{Deserialize, Serialize};
use std::ops::Range;

/// Temperatures of the SAPO gate for positive and for other advantages.
const SAPO_TEMPERATURES: (f64, f64) = (1.0, 1.05);

/// What a token's loss is and how the tokens' losses are added up.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum LossType {
    /// Clipped; mean over each completion's tokens, then over completions (Shao et al. 2024).
    #[default]
    Grpo,
    /// Clipped; mean over the tokens of the micro-batch.
    Bnpo,
    /// Clipped; sum divided by completions times the longest allowed length (Liu et al. 2025).
    DrGrpo,
    /// Clipped; mean over all tokens of the generation batch (Yu et al. 2025).
    Dapo,
    /// The ratio is a constant weight, capped at `clip_high`; added up as `dapo` (MiniMax 2025).
    Cispo,
    /// A smooth gate in place of the clip; added up as `grpo`.
    Sapo,
    /// Clipped; sum over each completion's tokens, mean over completions. Only with ratios of sequences.
    Luspo,
}

/// Whether a ratio belongs to a token or to a whole completion.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum ImportanceLevel {
    /// exp(log_prob − old_log_prob) of each token.
    #[default]
    Token,
    /// exp of its mean over the completion's tokens (GSPO).
    Sequence,
}

/// Constants of the loss.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct GrpoConfig {
    /// What is added up, and how.
    pub loss_type: LossType,
    /// What a ratio belongs to.
    pub importance_level: ImportanceLevel,
    /// Ratios below 1 − `clip_low` stop being pushed down, in [0, 1].
    pub clip_low: f64,
    /// Ratios above 1 + `clip_high` stop being pushed up, >= 0. For `cispo` the cap of the ratio itself.
    pub clip_high: f64,
    /// Absolute cap of the unclipped ratio, above 1 + `clip_high`; bounds the loss where the advantage is negative.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub delta: Option<f64>,
    /// Weight of the divergence from the reference policy, >= 0; 0 needs no reference.
    pub kl_coef: f64,
    /// Multiplies the divergence by the ratio, which makes its estimate unbiased off policy.
    pub kl_bias_correction: bool,
}

impl Default for GrpoConfig {
    fn default() -> Self {
        Self {
            loss_type: LossType::Grpo,
            importance_level: ImportanceLevel::Token,
            clip_low: 0.2,
            clip_high: 0.2,
            delta: None,
            kl_coef: 0.0,
            kl_bias_correction: false,
        }
    }
}

impl GrpoConfig {
    /// Every value out of its range.
    pub fn check(&self) -> Vec<ConfigError> {
        let mut errors = Vec::new();
        if !(0.0..=1.0).contains(&self.clip_low) {
            let message = format!("clip_low must lie in [0, 1], got {}", self.clip_low);
            errors
                .push(ConfigError::new("clip_low", message).with_help("set clip_low = 0.2, which is usual"));
        }
        for (key, value, help) in [
            (
                "clip_high",
                self.clip_high,
                "set clip_high = 0.2, which is usual, or 5.0 for loss_type `cispo`",
            ),
            ("kl_coef", self.kl_coef, "set kl_coef = 0.0 for no reference, or 0.04, which is usual with one"),
        ] {
            if !(value >= 0.0 && value.is_finite()) {
                let message = format!("{key} must be a finite number of at least 0, got {value}");
                errors.push(ConfigError::new(key, message).with_help(help));
            }
        }
        if self.loss_type == LossType::Luspo && self.importance_level == ImportanceLevel::Token {
            let error = ConfigError::new("importance_level", "luspo is defined for ratios of sequences only");
            errors.push(error.with_help("set importance_level = \"sequence\""));
        }
        if let Some(delta) = self.delta
            && !(delta > 1.0 + self.clip_high && delta.is_finite())
        {
            let message = format!("delta must exceed 1 + clip_high = {}, got {delta}", 1.0 + self.clip_high);
            let help = "delta caps the ratio beyond the clip; leave it out for no cap";
            errors.push(ConfigError::new("delta", message).with_help(help));
        }
        errors
    }
}

/// Completions of one micro-batch, packed one after another without padding.
///
/// All slices of tokens have the length `lengths.iter().sum()`.
#[derive(Debug, Clone, Copy)]
pub struct Completions<'a> {
    /// Tokens per completion.
    pub lengths: &'a [usize],
    /// False for tokens that take no part (such as those of a completion cut off by its length limit).
    pub completion_mask: Option<&'a [bool]>,
    /// Log-probabilities under the policy being trained.
    pub log_probs: &'a [f64],
    /// Under the policy that sampled; `None` means the same policy: all ratios are 1, with their gradient.
    pub old_log_probs: Option<&'a [f64]>,
    /// Under the reference policy; needed when `kl_coef` is not 0.
    pub ref_log_probs: Option<&'a [f64]>,
    /// One advantage per completion.
    pub advantages: &'a [f64],
}

/// Where a micro-batch stands in its optimiser step and in the batch of generated completions.
///
/// With these the gradients of the micro-batches of one optimiser step add up to that of the undivided batch
/// (`bnpo` alone weighs micro-batches equally, by definition; training here never lets it, see `train.grpo.loss_type`).
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Accumulation {
    /// Micro-batches per optimiser step, at least 1.
    pub gradient_accumulation_steps: usize,
    /// Micro-batches per generated batch, at least 1.
    pub steps_per_generation: usize,
    /// Unmasked tokens of the whole generated batch (`dapo`, `cispo`).
    pub num_items_in_batch: usize,
    /// Longest completion that sampling allows, in tokens (`dr_grpo`).
    pub max_completion_length: usize,
}

/// The loss of a micro-batch.
#[derive(Debug, Clone, PartialEq)]
pub struct GrpoLoss {
    /// To be minimised; already scaled for accumulation.
    pub loss: f64,
    /// Its derivative by each packed log-probability; 0 where masked.
    pub d_log_probs: Vec<f64>,
    /// What to log.
    pub stats: GrpoStats,
}

/// What a log says about a loss. Means go over unmasked tokens (over completions for ratios of sequences).
#[derive(Debug, Clone, Copy, PartialEq, Serialize)]
pub struct GrpoStats {
    /// Unmasked tokens: the weight of `kl` when micro-batches are averaged.
    pub num_tokens: usize,
    /// Ratios, of tokens or of completions: the weight of the shares that were clipped.
    pub num_ratios: usize,
    /// Mean divergence from the reference, as it enters the loss; `None` without a reference.
    pub kl: Option<f64>,
    /// Share of ratios below the clip with a negative advantage.
    pub clip_low_mean: f64,
    /// Least such share of any completion.
    pub clip_low_min: f64,
    /// Share of ratios above the clip with a positive advantage.
    pub clip_high_mean: f64,
    /// Greatest such share of any completion.
    pub clip_high_max: f64,
    /// Share of ratios clipped either way.
    pub clip_region_mean: f64,
}

/// The loss, its gradient and its statistics.
///
/// With A the advantage, r the ratio, l the log-probability and d = ref − l, a token's loss is
/// −min(min(r, delta)·A, clamp(r, 1−clip_low, 1+clip_high)·A) for the clipped types, −min(r, clip_high)·A·l with a
/// constant ratio for `cispo`, −(4/τ)·σ(τ(r − 1))·A for `sapo`; plus kl_coef·(exp(d) − d − 1), times r when
/// corrected. [`LossType`] and [`Accumulation`] say how tokens are weighted.
pub fn grpo_loss(batch: &Completions, config: &GrpoConfig, accumulation: &Accumulation) -> Result<GrpoLoss> {
    check_shapes(batch, config, accumulation)?;
    let total_tokens = (0..batch.log_probs.len()).filter(|&t| batch.takes_part(t)).count();
    let mut out =
        GrpoLoss { loss: 0.0, d_log_probs: vec![0.0; batch.log_probs.len()], stats: GrpoStats::empty() };
    let mut tally = Tally::new();
    let mut start = 0;
    for (i, &length) in batch.lengths.iter().enumerate() {
        let tokens = start..start + length;
        start += length;
        let tokens: Vec<usize> = tokens.filter(|&t| batch.takes_part(t)).collect();
        let weight =
            token_weight(config.loss_type, tokens.len(), total_tokens, batch.lengths.len(), accumulation);
        let sequence = Sequence { batch, config, tokens: &tokens, advantage: batch.advantages[i], weight };
        let loss = sequence.add_to(&mut out.d_log_probs, &mut tally);
        let finite = loss.is_finite() && tokens.iter().all(|&t| out.d_log_probs[t].is_finite());
        if !finite {
            return Err(Error::NonFinite(format!(
                "the policy loss of completion {i} of {} is {loss} (largest ratio {})",
                batch.lengths.len(),
                sequence.ratios().into_iter().fold(f64::NAN, f64::max)
            )));
        }
        out.loss += loss;
    }
    out.stats = tally.finish(total_tokens, batch.ref_log_probs.is_some() && config.kl_coef != 0.0);
    Ok(out)
}

/// Refuses slices of different lengths, a missing reference and empty divisors.
fn check_shapes(batch: &Completions, config: &GrpoConfig, accumulation: &Accumulation) -> Result<()> {
    let tokens: usize = batch.lengths.iter().sum();
    let slices = [
        ("log_probs", Some(batch.log_probs.len())),
        ("old_log_probs", batch.old_log_probs.map(<[f64]>::len)),
        ("ref_log_probs", batch.ref_log_probs.map(<[f64]>::len)),
        ("completion_mask", batch.completion_mask.map(<[bool]>::len)),
    ];
    for (name, len) in slices {
        if len.is_some_and(|len| len != tokens) {
            return Err(anyhow::anyhow!("grpo: {name} has length {}, not {tokens}", len.unwrap_or(0)).into());
        }
    }
    if batch.advantages.len() != batch.lengths.len() {
        let (advantages, completions) = (batch.advantages.len(), batch.lengths.len());
        return Err(anyhow::anyhow!("grpo: {advantages} advantages for {completions} completions").into());
    }
    if config.kl_coef != 0.0 && batch.ref_log_probs.is_none() {
        return Err(anyhow::anyhow!("grpo: kl_coef is {} but there is no reference", config.kl_coef).into());
    }
    let Accumulation { gradient_accumulation_steps, steps_per_generation, .. } = *accumulation;
    let divides = match config.loss_type {
        LossType::Dapo | LossType::Cispo => accumulation.num_items_in_batch > 0 || tokens == 0,
        LossType::DrGrpo => accumulation.max_completion_length > 0,
        LossType::Grpo | LossType::Bnpo | LossType::Sapo | LossType::Luspo => true,
    };
    if !divides || gradient_accumulation_steps == 0 || steps_per_generation == 0 {
        return Err(anyhow::anyhow!("grpo: {accumulation:?} has a zero that is divided by").into());
    }
    Ok(())
}

/// What each token of a completion of `tokens` tokens is multiplied with.
fn token_weight(
    loss_type: LossType,
    tokens: usize,
    total_tokens: usize,
    completions: usize,
    accumulation: &Accumulation,
) -> f64 {
    let micro_batches = accumulation.gradient_accumulation_steps as f64;
    let divisor = match loss_type {
        LossType::Grpo | LossType::Sapo => (completions * tokens.max(1)) as f64 * micro_batches,
        LossType::Luspo => completions as f64 * micro_batches,
        LossType::Bnpo => total_tokens.max(1) as f64 * micro_batches,
        LossType::DrGrpo => (completions * accumulation.max_completion_length) as f64 * micro_batches,
        // The generated batch may serve several optimiser steps: each sees its share of the tokens, so the mean
        // over all of them is taken per step, not per batch.
        LossType::Dapo | LossType::Cispo => {
            let steps = accumulation.steps_per_generation as f64 / micro_batches;
            accumulation.num_items_in_batch.max(1) as f64 / steps
        }
    };
    1.0 / divisor
}

impl Completions<'_> {
    fn takes_part(&self, token: usize) -> bool {
        self.completion_mask.is_none_or(|mask| mask[token])
    }

    fn log_ratio(&self, token: usize) -> f64 {
        self.old_log_probs.map_or(0.0, |old| self.log_probs[token] - old[token])
    }
}

/// One completion's part of the loss.
struct Sequence<'a> {
    batch: &'a Completions<'a>,
    config: &'a GrpoConfig,
    /// Its unmasked tokens, as packed positions.
    tokens: &'a [usize],
    advantage: f64,
    /// Weight of each of them.
    weight: f64,
}

impl Sequence<'_> {
    /// The ratio of each unmasked token (all equal when ratios belong to sequences).
    fn ratios(&self) -> Vec<f64> {
        let logs = self.tokens.iter().map(|&t| self.batch.log_ratio(t));
        match self.config.importance_level {
            ImportanceLevel::Token => logs.map(f64::exp).collect(),
            ImportanceLevel::Sequence => {
                let mean = logs.sum::<f64>() / self.tokens.len().max(1) as f64;
                vec![mean.exp(); self.tokens.len()]
            }
        }
    }

    /// Gives the loss; adds the gradient to `d_log_probs` and the observations to `tally`.
    fn add_to(&self, d_log_probs: &mut [f64], tally: &mut Tally) -> f64 {
        let ratios = self.ratios();
        let mut loss = 0.0;
        // d loss / d log ratio of each token, before it is shared out to the log-probabilities
        let mut d_log_ratios = Vec::with_capacity(ratios.len());
        for (&token, &ratio) in self.tokens.iter().zip(&ratios) {
            let policy = self.policy_term(ratio, self.batch.log_probs[token]);
            let mut d_log_ratio = policy.d_ratio * ratio;
            loss += self.weight * policy.value;
            d_log_probs[token] += self.weight * policy.d_log_prob;
            if let Some(reference) = self.batch.ref_log_probs.filter(|_| self.config.kl_coef != 0.0) {
                let d = reference[token] - self.batch.log_probs[token];
                let correction = if self.config.kl_bias_correction { ratio } else { 1.0 };
                // exp(d) − 1 − d without cancellation for close policies
                let kl = (d.exp_m1() - d) * correction;
                let weight = self.weight * self.config.kl_coef;
                loss += weight * kl;
                d_log_probs[token] -= weight * d.exp_m1() * correction;
                if self.config.kl_bias_correction {
                    d_log_ratio += self.config.kl_coef * kl;
                }
                tally.kl += kl;
            }
            d_log_ratios.push(self.weight * d_log_ratio);
        }
        if self.config.importance_level == ImportanceLevel::Sequence && !d_log_ratios.is_empty() {
            let shared = d_log_ratios.iter().sum::<f64>() / d_log_ratios.len() as f64;
            d_log_ratios.fill(shared);
        }
        for (&token, d) in self.tokens.iter().zip(&d_log_ratios) {
            d_log_probs[token] += d;
        }
        let observed = match self.config.importance_level {
            ImportanceLevel::Sequence => 0..ratios.len().min(1),
            ImportanceLevel::Token => 0..ratios.len(),
        };
        self.observe(&ratios, observed, tally);
        loss
    }

    /// A token's policy loss and its derivatives by the ratio and (directly) by the log-probability.
    fn policy_term(&self, ratio: f64, log_prob: f64) -> PolicyTerm {
        let Self { config, advantage, .. } = *self;
        match config.loss_type {
            LossType::Cispo => {
                let weight = ratio.min(config.clip_high) * advantage;
                PolicyTerm { value: -weight * log_prob, d_ratio: 0.0, d_log_prob: -weight }
            }
            LossType::Sapo => {
                let tau = if advantage > 0.0 { SAPO_TEMPERATURES.0 } else { SAPO_TEMPERATURES.1 };
                let gate = 1.0 / (1.0 + (-tau * (ratio - 1.0)).exp());
                let value = -(4.0 / tau) * gate * advantage;
                PolicyTerm { value, d_ratio: -4.0 * gate * (1.0 - gate) * advantage, d_log_prob: 0.0 }
            }
            LossType::Grpo | LossType::Bnpo | LossType::DrGrpo | LossType::Dapo | LossType::Luspo => {
                let (low, high) = (1.0 - config.clip_low, 1.0 + config.clip_high);
                let delta = config.delta.unwrap_or(f64::INFINITY);
                let (free, clipped) = (ratio.min(delta) * advantage, ratio.clamp(low, high) * advantage);
                // Inside the clip both are the same function; outside, the smaller one decides.
                let flows = if free < clipped { ratio <= delta } else { (low..=high).contains(&ratio) };
                let d_ratio = if flows { -advantage } else { 0.0 };
                PolicyTerm { value: -free.min(clipped), d_ratio, d_log_prob: 0.0 }
            }
        }
    }

    fn observe(&self, ratios: &[f64], observed: Range<usize>, tally: &mut Tally) {
        let Self { config, advantage, .. } = *self;
        let (low, high) = match config.loss_type {
            LossType::Cispo => (f64::NEG_INFINITY, config.clip_high),
            LossType::Sapo => (f64::NEG_INFINITY, f64::INFINITY),
            _ => (1.0 - config.clip_low, 1.0 + config.clip_high),
        };
        let observed = &ratios[observed];
        let below = observed.iter().filter(|&&ratio| ratio < low && advantage < 0.0).count();
        let above = observed.iter().filter(|&&ratio| ratio > high && advantage > 0.0).count();
        tally.add(observed.len(), below, above);
    }
}

struct PolicyTerm {
    value: f64,
    d_ratio: f64,
    d_log_prob: f64,
}

/// Sums behind [`GrpoStats`].
struct Tally {
    kl: f64,
    ratios: usize,
    below: usize,
    above: usize,
    below_min: f64,
    above_max: f64,
}

impl Tally {
    fn new() -> Self {
        Self {
            kl: 0.0,
            ratios: 0,
            below: 0,
            above: 0,
            below_min: f64::INFINITY,
            above_max: f64::NEG_INFINITY,
        }
    }

    /// How many ratios one completion has, and how many of them were clipped below and above.
    fn add(&mut self, ratios: usize, below: usize, above: usize) {
        if ratios == 0 {
            return;
        }
        self.ratios += ratios;
        self.below += below;
        self.above += above;
        self.below_min = self.below_min.min(below as f64 / ratios as f64);
        self.above_max = self.above_max.max(above as f64 / ratios as f64);
    }

    fn finish(&self, num_tokens: usize, with_kl: bool) -> GrpoStats {
        if self.ratios == 0 {
            return GrpoStats::empty();
        }
        let share = |count: usize| count as f64 / self.ratios as f64;
        GrpoStats {
            num_tokens,
            num_ratios: self.ratios,
            kl: with_kl.then(|| self.kl / num_tokens as f64),
            clip_low_mean: share(self.below),
            clip_low_min: self.below_min,
            clip_high_mean: share(self.above),
            clip_high_max: self.above_max,
            clip_region_mean: share(self.below + self.above),
        }
    }
}

impl GrpoStats {
    /// Of several micro-batches as one: each mean weighs them by what it is a mean over.
    pub fn joined(parts: &[Self]) -> Self {
        let parts = || parts.iter().filter(|part| part.num_ratios > 0);
        let num_tokens: usize = parts().map(|part| part.num_tokens).sum();
        let num_ratios: usize = parts().map(|part| part.num_ratios).sum();
        if num_ratios == 0 {
            return Self::empty();
        }
        let share = |value: fn(&Self) -> f64| {
            parts().map(|part| value(part) * part.num_ratios as f64).sum::<f64>() / num_ratios as f64
        };
        // Completions that were left out have no divergence, and no weight in it.
        let kl: Option<f64> = parts()
            .filter(|part| part.num_tokens > 0)
            .map(|part| part.kl.map(|kl| kl * part.num_tokens as f64))
            .sum();
        Self {
            num_tokens,
            num_ratios,
            kl: kl.filter(|_| num_tokens > 0).map(|sum| sum / num_tokens as f64),
            clip_low_mean: share(|part| part.clip_low_mean),
            clip_low_min: parts().map(|part| part.clip_low_min).fold(f64::INFINITY, f64::min),
            clip_high_mean: share(|part| part.clip_high_mean),
            clip_high_max: parts().map(|part| part.clip_high_max).fold(f64::NEG_INFINITY, f64::max),
            clip_region_mean: share(|part| part.clip_region_mean),
        }
    }

    /// Of completions with so many ratios that have no part in the loss, for their advantages are zero: nothing is ever
    /// clipped there.
    pub const fn of_idle(num_ratios: usize) -> Self {
        Self { num_ratios, ..Self::empty() }
    }

    /// Of a micro-batch without any unmasked token: nothing measured, nothing clipped.
    const fn empty() -> Self {
        Self {
            num_tokens: 0,
            num_ratios: 0,
            kl: None,
            clip_low_mean: 0.0,
            clip_low_min: 0.0,
            clip_high_mean: 0.0,
            clip_high_max: 0.0,
            clip_region_mean: 0.0,
        }
    }
}

#[cfg(test)]
#[path = "grpo_tests.rs"]
mod tests;
