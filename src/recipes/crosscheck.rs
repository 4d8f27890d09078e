//! Certificates put to the test: each certified item is attacked inside its own radius, through the smoothed model.
//!
//! A certificate says that no change shorter than its radius alters the smoothed answer. An attack that finds one anyway,
//! more often than the certificates' own failure probability allows, has found a mistake in the certificates.

use super::aims::{Asked, aim};
use super::answers::Asking;
use super::config::ObjectiveName;
use crate::attack::{AttackConfig, Fraction, Method, NoiseBank, Norm, PgdOutput, Problem, attack};
use crate::certify::{BaseClassifier, Certificate, Prediction, SmoothingConfig, count_draws};
use crate::data::Sample;
use crate::error::Result;
use crate::model::assistant::Assistant;
use crate::model::generate::Prompt;
use crate::nn::recompute::Memory;
use crate::roles::target::Target;
use candle_core::Tensor;
use serde::{Deserialize, Serialize};

/// Gradient steps inside the radius.
const STEPS: usize = 20;
/// Noise of each gradient.
const BANK: usize = 16;
/// Noisy copies in one pass with gradients; no setting, since sums over passes round as the passes are cut.
const AT_ONCE: usize = 8;
/// The first of the draws that judge: none of them made the certificate.
const FRESH: u64 = 1 << 40;

/// An item beside itself: clean, attacked inside its radius, certified.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct CrossCheck {
    /// Whether the base model is right on the clean image.
    pub clean_correct: bool,
    /// Whether the base model, without noise, is right on the attacked image.
    pub attacked_correct: bool,
    /// Length of the change, at most the radius.
    pub l2: f64,
    /// Negative log of the certified class's mean share under noise, before and after.
    pub losses: [f64; 2],
    /// P-value of the smoothed model's answer to the attacked image.
    pub p_value: f64,
    /// Whether that answer is another one than certified; an abstention is none.
    pub broken: bool,
}

/// One certified item.
pub(super) struct Certified<'a> {
    pub(super) assistant: &'a Assistant,
    pub(super) sample: &'a Sample,
    pub(super) asking: Asking,
    pub(super) prompt: &'a Prompt,
    /// `[3, height, width]` in [0, 1], at the model's resolution.
    pub(super) pixels: &'a Tensor,
    pub(super) key: u64,
    pub(super) classifier: &'a dyn BaseClassifier,
    pub(super) smoothing: &'a SmoothingConfig,
    pub(super) certificate: &'a Certificate,
}

impl Certified<'_> {
    /// Attacks the item inside its radius; nothing where it has none, or where "none" is what is certified.
    ///
    /// # Errors
    /// When a loss or gradient is not finite.
    pub(super) fn check(&self) -> Result<Option<CrossCheck>> {
        let Some(class) = self.certificate.prediction else { return Ok(None) };
        let radius = self.certificate.radius;
        if class >= self.sample.options.len() || radius <= 0.0 {
            return Ok(None);
        }
        let (attacked, losses) = self.attack(class, radius)?;
        let smoothing = self.smoothing;
        let draws = FRESH..FRESH + smoothing.n;
        let counts = count_draws(
            self.classifier,
            &attacked,
            smoothing.sigma,
            smoothing.seed,
            self.key,
            draws,
            smoothing.batch_size,
        )?;
        let found = Prediction::from_counts(counts, smoothing.alpha)?;
        let base = |pixels: &Tensor| -> Result<bool> {
            let classes = self.classifier.classify(&pixels.unsqueeze(0)?, 0..1)?;
            Ok(classes.first() == Some(&self.sample.answer))
        };
        let change = (&attacked - self.pixels)?.flatten_all()?.to_vec1::<f32>()?;
        Ok(Some(CrossCheck {
            clean_correct: base(self.pixels)?,
            attacked_correct: base(&attacked)?,
            l2: change.iter().map(|d| f64::from(*d).powi(2)).sum::<f64>().sqrt(),
            losses,
            p_value: found.p_value,
            broken: found.prediction.is_some_and(|prediction| prediction != class),
        }))
    }

    /// PGD on the smoothed model (Salman et al. 2019): the pixels, and the loss before and after.
    fn attack(&self, class: usize, radius: f64) -> Result<(Tensor, [f64; 2])> {
        let (_, height, width) = self.pixels.dims3()?;
        // What the certificate says is to be changed, right or wrong.
        let certified = Sample { answer: class, ..self.sample.clone() };
        let asked = Asked {
            template: self.asking.template,
            is_cot: self.asking.reasons(),
            objective: ObjectiveName::CrossEntropy,
            target: 1,
            own: None,
        };
        let target = Target {
            assistant: self.assistant,
            aims: vec![aim(self.assistant, &certified, asked, self.prompt.clone(), [height, width])?],
            answers: &|_, items| Ok(vec![None; items.len()]),
            noise: Some(NoiseBank {
                purpose: "cross_check",
                sigma: self.smoothing.sigma,
                draws: BANK,
                seed: self.smoothing.seed,
            }),
            draws_at_once: AT_ONCE,
            memory: Memory::Keep,
        };
        let config = AttackConfig {
            method: Method::Pgd,
            norm: Norm::L2,
            // Strictly inside, rounding errors included.
            epsilon: Fraction(radius * (1.0 - 1e-6)),
            num_steps: STEPS,
            early_stop: false,
            output: PgdOutput::Best,
            seed: self.smoothing.seed,
            ..AttackConfig::default()
        };
        let clean = self.pixels.unsqueeze(0)?;
        let problem =
            Problem { clean: &clean, items: &[0], keys: &[self.key], start: None, judge_8bit: false };
        let found = attack(&target, &problem, &config)?;
        let losses = [found.loss_clean[0], found.loss[0]].map(f64::from);
        Ok((found.pixels.squeeze(0)?, losses))
    }
}
