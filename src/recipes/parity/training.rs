//! Advantages, policy losses and the optimiser against numbers of TRL and PyTorch: `grpo*.json` and `optim.json`.
//!
//! These need no checkpoint. A curve or table is one comparison, relative to its largest magnitude where that exceeds
//! one.

use super::golden;
use super::{Unchecked, unchecked};
use crate::error::{Error, Result};
use crate::recipes::parity_io::{Check, optional, read_json, typed};
use crate::train::advantage::{AdvantageConfig, RewardAggregation, group_relative};
use crate::train::grpo::{Accumulation, Completions, GrpoConfig, grpo_loss};
use crate::train::optimizer::{AdamWConfig, Moments, clip_global_norm};
use crate::train::schedule::{Schedule, ScheduleKind};
use serde_json::Value;
use std::path::{Path, PathBuf};

/// Largest difference of every quantity here.
const TOLERANCE: f64 = 1e-6;

/// The checks of the export's training numbers, as far as it has any. Files called `grpo….json` hold the numbers of a trainer or
/// golden vectors, whatever the rest of their names; metrics that are not known are named in `not_checked`.
///
/// # Errors
/// A data error when a file cannot be read.
pub fn check(dir: &Path, not_checked: &mut Vec<Unchecked>) -> Result<Vec<Check>> {
    let mut checks = Vec::new();
    for path in policy_files(dir) {
        let report = read_json(&path)?;
        let mut compare = || {
            if golden::is_golden(&report) {
                return golden::check(&report, &mut checks, not_checked);
            }
            check_advantages(&report, &mut checks)?;
            check_losses(&report["loss"], &mut checks, not_checked)
        };
        compare().map_err(|error| error.at(&path.display().to_string()))?;
    }
    let path = dir.join("optim.json");
    if path.exists() {
        let report = read_json(&path)?;
        check_runs(&report, &mut checks)?;
        check_schedules(&report["schedules"], &mut checks)?;
        check_clipping(&report["clip"], &mut checks)?;
    }
    Ok(checks)
}

/// Files of advantages and policy losses, sorted.
fn policy_files(dir: &Path) -> Vec<PathBuf> {
    let Ok(entries) = std::fs::read_dir(dir) else { return Vec::new() };
    let is_one = |path: &PathBuf| {
        let name = path.file_name().and_then(|name| name.to_str()).unwrap_or_default();
        name.starts_with("grpo") && path.extension().is_some_and(|end| end == "json")
    };
    let mut found: Vec<PathBuf> = entries.flatten().map(|entry| entry.path()).filter(is_one).collect();
    found.sort_unstable();
    found
}

pub(super) fn training_check(case: &str, quantity: &str, found: &[f64], wanted: &[f64]) -> Check {
    Check::new("-", case, quantity, difference(found, wanted), TOLERANCE)
}

/// Largest difference, relative to the largest wanted magnitude where that exceeds one; infinite when the lengths
/// differ or a number is none.
fn difference(found: &[f64], wanted: &[f64]) -> f64 {
    if found.len() != wanted.len() {
        return f64::INFINITY;
    }
    let scale = wanted.iter().fold(1.0, |largest: f64, value| largest.max(value.abs()));
    found.iter().zip(wanted).fold(0.0, |worst: f64, (found, wanted)| {
        let difference = (found - wanted).abs() / scale;
        if difference.is_nan() { f64::INFINITY } else { worst.max(difference) }
    })
}

fn entries(value: &Value) -> impl Iterator<Item = &Value> {
    value.as_array().into_iter().flatten()
}

fn named(value: &Value) -> impl Iterator<Item = (&str, &Value)> {
    value.as_object().into_iter().flatten().map(|(name, value)| (name.as_str(), value))
}

fn check_advantages(report: &Value, checks: &mut Vec<Check>) -> Result<()> {
    for row in entries(&report["advantages"]) {
        let functions: Vec<Vec<Option<f64>>> = typed(&row["rewards"], "rewards")?;
        let wanted: Vec<f64> = typed(&row["advantages"], "advantages")?;
        let reward =
            |function: &Vec<Option<f64>>, i: usize| function.get(i).copied().flatten().unwrap_or(f64::NAN);
        let rewards: Vec<Vec<f64>> = (0..wanted.len())
            .map(|i| functions.iter().map(|function| reward(function, i)).collect())
            .collect();
        let config = AdvantageConfig {
            group_size: typed(&row["num_generations"], "num_generations")?,
            scale_rewards: typed(&row["scale_rewards"], "scale_rewards")?,
            aggregation: RewardAggregation::SumThenNormalize,
            reward_weights: typed(&row["reward_weights"], "reward_weights")?,
        };
        let found = group_relative(&rewards, &config)?.advantages;
        let case: String = typed(&row["name"], "name")?;
        checks.push(training_check(&case, "grpo_advantages", &found, &wanted));
    }
    Ok(())
}

/// A padded table of one row per completion, and the mask that says how much of each row counts.
pub(super) struct Padded {
    mask: Vec<Vec<bool>>,
    pub(super) lengths: Vec<usize>,
}

impl Padded {
    pub(super) fn read(mask: &Value) -> Result<Self> {
        let mask: Vec<Vec<f64>> = typed(mask, "completion_mask")?;
        let mask: Vec<Vec<bool>> =
            mask.iter().map(|row| row.iter().map(|&kept| kept != 0.0).collect()).collect();
        let lengths = mask.iter().map(|row| row.iter().filter(|&&kept| kept).count()).collect();
        Ok(Self { mask, lengths })
    }

    /// The entries that count, one row after another.
    pub(super) fn pack(&self, table: &Value, what: &str) -> Result<Vec<f64>> {
        let rows: Vec<Vec<f64>> = typed(table, what)?;
        let is_as_wide = |(row, mask): (&Vec<f64>, &Vec<bool>)| row.len() == mask.len();
        if rows.len() != self.mask.len() || !rows.iter().zip(&self.mask).all(is_as_wide) {
            return Err(Error::data(format!("the reference's `{what}` has another shape than its mask")));
        }
        let kept = |(row, mask): (&Vec<f64>, &Vec<bool>)| {
            row.iter().zip(mask).filter(|(_, kept)| **kept).map(|(value, _)| *value).collect::<Vec<_>>()
        };
        Ok(rows.iter().zip(&self.mask).flat_map(kept).collect())
    }

    /// The whole table of packed entries, zero where nothing counts.
    pub(super) fn unpack(&self, packed: &[f64]) -> Vec<f64> {
        let mut packed = packed.iter();
        let entry = |kept: &bool| if *kept { packed.next().copied().unwrap_or(f64::NAN) } else { 0.0 };
        self.mask.iter().flatten().map(entry).collect()
    }
}

fn check_losses(table: &Value, checks: &mut Vec<Check>, not_checked: &mut Vec<Unchecked>) -> Result<()> {
    if table.is_null() {
        return Ok(());
    }
    let padded = Padded::read(&table["completion_mask"])?;
    let log_probs = padded.pack(&table["per_token_logps"], "per_token_logps")?;
    let old = padded.pack(&table["old_per_token_logps"], "old_per_token_logps")?;
    let references = padded.pack(&table["ref_per_token_logps"], "ref_per_token_logps")?;
    let advantages: Vec<f64> = typed(&table["advantages"], "advantages")?;
    for row in entries(&table["cases"]) {
        let batch = Completions {
            lengths: &padded.lengths,
            completion_mask: None,
            log_probs: &log_probs,
            old_log_probs: typed::<bool>(&row["uses_old_logps"], "uses_old_logps")?.then_some(&old[..]),
            ref_log_probs: Some(&references),
            advantages: &advantages,
        };
        let (config, accumulation) = loss_settings(row)?;
        let found = grpo_loss(&batch, &config, &accumulation)?;
        let case: String = typed(&row["loss_type"], "loss_type")?;
        checks.push(training_check(&case, "grpo_loss", &[found.loss], &[typed(&row["loss"], "loss")?]));
        let wanted: Vec<Vec<f64>> = typed(&row["grad_logps"], "grad_logps")?;
        let gradient = padded.unpack(&found.d_log_probs);
        checks.push(training_check(&case, "grpo_gradient", &gradient, &wanted.concat()));
        for (key, wanted) in named(&row["metrics"]) {
            let quantity = "grpo_metrics";
            match golden::metric(&found.stats, key) {
                Some(found) => {
                    checks.push(training_check(&case, quantity, &[found], &[typed(wanted, key)?]));
                }
                None => not_checked.push(unchecked("-", &case, quantity, &format!("`{key}` is not known"))),
            }
        }
    }
    Ok(())
}

fn loss_settings(row: &Value) -> Result<(GrpoConfig, Accumulation)> {
    let count = |key: &str| typed::<usize>(&row[key], key);
    let config = GrpoConfig {
        loss_type: typed(&row["loss_type"], "loss_type")?,
        importance_level: typed(&row["importance_sampling_level"], "importance_sampling_level")?,
        clip_low: typed(&row["epsilon"], "epsilon")?,
        clip_high: typed(&row["epsilon_high"], "epsilon_high")?,
        delta: optional(row, "delta")?,
        kl_coef: typed(&row["beta"], "beta")?,
        kl_bias_correction: typed(&row["use_bias_correction_kl"], "use_bias_correction_kl")?,
    };
    let accumulation = Accumulation {
        gradient_accumulation_steps: count("gradient_accumulation_steps")?,
        steps_per_generation: count("steps_per_generation")?,
        num_items_in_batch: count("num_items_in_batch")?,
        max_completion_length: count("max_completion_length")?,
    };
    Ok((config, accumulation))
}

/// The schedule that transformers calls `kind`.
fn schedule_of(kind: &str, warmup_steps: u64) -> Result<Schedule> {
    let kind = match kind {
        "cosine" => ScheduleKind::Cosine,
        "linear" => ScheduleKind::Linear,
        "constant" | "constant_with_warmup" => ScheduleKind::Constant,
        other => return Err(Error::data(format!("optim.json has the unknown schedule `{other}`"))),
    };
    Ok(Schedule { kind, warmup_steps, final_fraction: 0.0 })
}

/// The quadratic ½ (x - b)ᵀ A (x - b).
struct Quadratic {
    a: Vec<Vec<f64>>,
    b: Vec<f64>,
}

impl Quadratic {
    fn gradient(&self, x: &[f32]) -> Vec<f32> {
        let offset: Vec<f64> = x.iter().zip(&self.b).map(|(&x, b)| f64::from(x) - b).collect();
        let entry = |row: &Vec<f64>| row.iter().zip(&offset).map(|(a, d)| a * d).sum::<f64>() as f32;
        self.a.iter().map(entry).collect()
    }
}

/// AdamW on a quadratic: the parameters after each step, the learning rate of each, the gradient's norm before it.
fn check_runs(report: &Value, checks: &mut Vec<Check>) -> Result<()> {
    let quadratic = Quadratic { a: typed(&report["A"], "A")?, b: typed(&report["b"], "b")? };
    for (name, run) in named(&report["runs"]) {
        let settings = &run["settings"];
        let betas: [f64; 2] = typed(&settings["betas"], "betas")?;
        let config = AdamWConfig {
            beta1: betas[0],
            beta2: betas[1],
            adam_epsilon: typed(&settings["eps"], "eps")?,
            weight_decay: typed(&settings["weight_decay"], "weight_decay")?,
        };
        let schedule = match optional::<String>(run, "schedule")? {
            Some(kind) => schedule_of(&kind, typed(&run["warmup"], "warmup")?)?,
            None => schedule_of("constant", 0)?,
        };
        let (peak, max_norm) = (typed::<f64>(&settings["lr"], "lr")?, optional(run, "max_norm")?);
        let mut x: Vec<f32> = typed(&report["x0"], "x0")?;
        let mut moments = Moments::zeros(x.len());
        let (mut found, mut wanted): ([Vec<f64>; 3], [Vec<f64>; 3]) = Default::default();
        let total = entries(&run["steps"]).count() as u64;
        for (step, row) in (0u64..).zip(entries(&run["steps"])) {
            let mut gradient = quadratic.gradient(&x);
            found[2].push(clip_global_norm(&mut [("x", &mut gradient)], max_norm)?);
            let rate = peak * schedule.factor(step, total);
            config.step(step + 1, rate, &mut x, &gradient, &mut moments)?;
            found[1].push(rate);
            found[0].extend(x.iter().map(|&value| f64::from(value)));
            wanted[0].extend(typed::<Vec<f64>>(&row["x"], "x")?);
            wanted[1].push(typed(&row["lr"], "lr")?);
            wanted[2].push(typed(&row["grad_norm_before_clip"], "grad_norm_before_clip")?);
        }
        for (i, quantity) in ["adamw", "schedule", "clipping"].into_iter().enumerate() {
            checks.push(training_check(name, quantity, &found[i], &wanted[i]));
        }
    }
    Ok(())
}

/// Learning rates as a share of the peak; a curve is called `KIND.warmupN.totalM`.
fn check_schedules(curves: &Value, checks: &mut Vec<Check>) -> Result<()> {
    for (name, curve) in named(curves) {
        let mut parts = name.split('.');
        let mut number = |prefix: &str| parts.next_back()?.strip_prefix(prefix)?.parse::<u64>().ok();
        let (total, warmup) = (number("total"), number("warmup"));
        let (Some(kind), Some(warmup), Some(total)) = (parts.next(), warmup, total) else {
            return Err(Error::data(format!(
                "optim.json has a schedule called `{name}`, which is not understood"
            )));
        };
        let schedule = schedule_of(kind, warmup)?;
        let wanted: Vec<f64> = typed(curve, "schedules")?;
        let found: Vec<f64> = (0u64..).zip(&wanted).map(|(step, _)| schedule.factor(step, total)).collect();
        checks.push(training_check(name, "schedule", &found, &wanted));
    }
    Ok(())
}

/// One clipping of several tensors by their common norm.
fn check_clipping(clip: &Value, checks: &mut Vec<Check>) -> Result<()> {
    if clip.is_null() {
        return Ok(());
    }
    let mut tensors: Vec<Vec<f32>> = entries(&clip["before"]).map(flat).collect();
    let mut views: Vec<(&str, &mut [f32])> =
        tensors.iter_mut().map(|tensor| ("gradient", &mut tensor[..])).collect();
    let norm = clip_global_norm(&mut views, Some(typed(&clip["max_norm"], "max_norm")?))?;
    let mut found = vec![norm];
    found.extend(tensors.iter().flatten().map(|&value| f64::from(value)));
    let mut wanted = vec![typed(&clip["total_norm"], "total_norm")?];
    wanted.extend(flat(&clip["after"]).into_iter().map(f64::from));
    checks.push(training_check("-", "clipping", &found, &wanted));
    Ok(())
}

/// The numbers of a nested list in reading order.
fn flat(value: &Value) -> Vec<f32> {
    match value {
        Value::Array(items) => items.iter().flat_map(flat).collect(),
        other => vec![other.as_f64().map_or(f32::NAN, |number| number as f32)],
    }
}
