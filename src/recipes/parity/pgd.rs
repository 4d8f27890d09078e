//! This build's attack against torchattacks: the loss at every step and the adversarial picture.
//!
//! `pgd.json` says how: objective (the negative log-likelihood of one token after the prompt), budget and step of an
//! L-infinity and an L2 run, both without a random start. The first step is compared in [`super::network`], on the
//! stored gradient of a whole answer's loss, as the runs here store no picture after one step.

use super::network::share_of_pixels;
use crate::attack::{AttackConfig, Fraction, Method, Norm, Objective, PgdOutput, Problem, pgd};
use crate::error::{Error, Result};
use crate::model::generate::{Prompt, prompt_batch};
use crate::model::loader::{Adaptation, Precision, load_vlm};
use crate::model::positions::Grid;
use crate::model::vision::VisionPlan;
use crate::model::vlm::{Batch, Vlm};
use crate::model::weights::TensorFile;
use crate::nn::recompute::{Memory, Stage, loss_and_gradients};
use crate::nn::rows;
use crate::recipes::parity_io::{Check, ReferenceCheckpoint, read_json, typed};
use candle_core::{Device, Tensor, Var};
use serde_json::Value;
use std::path::Path;

/// Largest relative difference of the loss at any step.
const LOSS_TOLERANCE: f64 = 1e-2;
/// Share of the final picture's pixels that may differ: where a gradient is nearly zero its sign is chance.
const IMAGE_TOLERANCE: f64 = 0.05;

/// The negative log-likelihood of one token after a prompt about one picture, as a function of the picture.
struct TokenLoss<'a> {
    vlm: &'a Vlm,
    plan: VisionPlan,
    batch: Batch,
    token: u32,
}

impl<'a> TokenLoss<'a> {
    fn new(vlm: &'a Vlm, report: &Value) -> Result<Self> {
        let grids: Vec<Grid> = typed(&report["image_grid_thw"], "image_grid_thw")?;
        let prompt = Prompt::of_ids(vlm.config(), typed(&report["input_ids"], "input_ids")?, &grids)?;
        Ok(Self {
            vlm,
            plan: vlm.vision_plan(&grids)?,
            batch: prompt_batch(vlm, &[prompt])?.0,
            token: typed(&report["answer_token"], "answer_token")?,
        })
    }

    /// The loss of a decoder's last state.
    fn of_state(&self, state: &[Tensor]) -> candle_core::Result<Tensor> {
        let last = rows::select(&state[0], &[self.batch.input_ids.len() as u32 - 1])?;
        self.vlm.log_probs(&last, &[self.token], 1.0)?.sum_all()?.neg()
    }
}

impl Objective for TokenLoss<'_> {
    fn loss_and_gradient(&self, pixels: &Tensor, _items: &[usize]) -> Result<(Vec<f32>, Tensor)> {
        let picture = Var::from_tensor(&pixels.detach())?;
        let vision = self.vlm.vision_stages(&self.plan).into_iter();
        let stages: Vec<Stage<'_>> = vision.chain(self.vlm.decoder_stages(&self.batch)).collect();
        let inputs = [picture.as_tensor().clone()];
        let of_state = |state: &[Tensor]| self.of_state(state);
        let (loss, gradients) = loss_and_gradients(&stages, &inputs, of_state, &[], Memory::Keep)?;
        let gradient = gradients.get(picture.as_tensor()).cloned();
        let gradient =
            gradient.ok_or_else(|| Error::NonFinite("no gradient reached the pixels".to_string()))?;
        Ok((vec![loss.to_scalar()?], gradient))
    }

    fn loss(&self, pixels: &Tensor, _items: &[usize]) -> Result<Vec<f32>> {
        let features = self.vlm.encode_images(&[pixels.detach()], &self.plan)?;
        let hidden = self.vlm.forward(Some(&features), &self.batch)?;
        Ok(vec![self.of_state(&[hidden])?.to_scalar()?])
    }

    fn is_broken(&self, _pixels: &Tensor, items: &[usize]) -> Result<Vec<bool>> {
        // The reference's runs do not ask: they take every step.
        Ok(vec![false; items.len()])
    }
}

/// The checks of `pgd.json`; none when the export has no such file.
///
/// # Errors
/// A data error when the file, its checkpoint or its pictures cannot be read.
pub fn check(dir: &Path, device: &Device) -> Result<Vec<Check>> {
    let path = dir.join("pgd.json");
    if !path.exists() {
        return Ok(Vec::new());
    }
    let report = read_json(&path)?;
    let tensors = TensorFile::open(&dir.join("pgd.safetensors"))?;
    let name: String = typed(&report["checkpoint"], "checkpoint")?;
    let case: String = typed(&report["case"], "case")?;
    let reference = ReferenceCheckpoint::load(dir, &name)?
        .ok_or_else(|| Error::data(format!("pgd.json names the unknown checkpoint `{name}`")))?;
    let (vlm, _) = load_vlm(&reference.dir, Adaptation::None, Precision::AsStored, &|_| false, device)?;
    let objective = TokenLoss::new(&vlm, &report)?;
    let levels: Vec<f32> = tensors.bytes_u8("x0_u8")?.iter().map(|&level| f32::from(level) / 255.0).collect();
    let clean = Tensor::from_vec(levels, tensors.shape("x0_u8").unwrap_or_default(), device)?.unsqueeze(0)?;
    let mut checks = Vec::new();
    for (key, norm) in [("linf", Norm::Linf), ("l2", Norm::L2)] {
        if report.get(key).is_none() {
            continue;
        }
        let config = settings(&report[key], norm)?;
        let losses: Vec<f64> =
            typed(&report[key]["loss_before_each_step_and_final"], "loss_before_each_step_and_final")?;
        let wanted = tensors.floats(&format!("{key}.adversarial"))?;
        let (curve, picture) = run(&objective, &clean, &config)?;
        checks.push(Check::new(&name, &case, "pgd_loss", curve_difference(&curve, &losses), LOSS_TOLERANCE));
        let share = share_of_pixels(&picture, &wanted, threshold(&config));
        checks.push(Check::new(&name, &case, "pgd_image", share, IMAGE_TOLERANCE));
    }
    Ok(checks)
}

/// The attack that torchattacks runs with these settings.
fn settings(run: &Value, norm: Norm) -> Result<AttackConfig> {
    Ok(AttackConfig {
        momentum: 0.0,
        method: Method::Pgd,
        norm,
        epsilon: Fraction(typed(&run["eps"], "eps")?),
        step_size: Some(Fraction(typed(&run["alpha"], "alpha")?)),
        num_steps: typed(&run["steps"], "steps")?,
        num_restarts: 1,
        random_start: false,
        early_stop: false,
        check_every: 0,
        output: PgdOutput::Last,
        seed: 0,
    })
}

/// The loss before each step and at the end, and the attacked picture, row-major.
fn run(objective: &TokenLoss<'_>, clean: &Tensor, config: &AttackConfig) -> Result<(Vec<f32>, Vec<f32>)> {
    let problem = Problem { clean, items: &[0], keys: &[0], start: None, judge_8bit: false };
    let mut curve = Vec::new();
    let found = pgd(objective, &problem, config, &mut |iterate| {
        curve.extend_from_slice(iterate.loss);
        Ok(())
    })?;
    Ok((curve, found.pixels.flatten_all()?.to_vec1()?))
}

/// Worst relative difference; infinite when the lengths differ or a loss is no number.
fn curve_difference(found: &[f32], wanted: &[f64]) -> f64 {
    if found.len() != wanted.len() {
        return f64::INFINITY;
    }
    found.iter().zip(wanted).fold(0.0, |worst: f64, (&found, &wanted)| {
        let relative = (f64::from(found) - wanted).abs() / wanted.abs().max(f64::MIN_POSITIVE);
        if relative.is_nan() { f64::INFINITY } else { worst.max(relative) }
    })
}

/// By how much a value must be off to count as another one: half an 8-bit level, or half a step where that is less
/// and every step has the same length.
fn threshold(config: &AttackConfig) -> f32 {
    let level = 0.5f32 / 255.0;
    match config.norm {
        Norm::Linf => level.min(config.effective_step_size() as f32 / 2.0),
        Norm::L2 => level,
    }
}
