//! Golden vectors of GRPO: one batch of completions with every loss, gradient, advantage and metric it has.
//!
//! Tables have one row per completion and one column per token: `mask`, `logps`, `old_logps`, `ref_logps`, `entropies`, and
//! `grad` of each case. Policy losses take the advantages of `group`.

use super::training::{Padded, training_check};
use super::{Unchecked, unchecked};
use crate::error::{Error, Result};
use crate::recipes::parity_io::{Check, optional, typed};
use crate::train::advantage::{AdvantageConfig, Advantages, RewardAggregation, group_relative};
use crate::train::grpo::{
    Accumulation, Completions, GrpoConfig, GrpoStats, ImportanceLevel, LossType, grpo_loss,
};
use serde_json::Value;

/// Whether a file of numbers is of this kind.
pub(super) fn is_golden(report: &Value) -> bool {
    report.get("logps").is_some() && report.get("cases").is_some()
}

/// The checks of one file; metrics that this build does not know are named in `not_checked`.
pub(super) fn check(report: &Value, checks: &mut Vec<Check>, not_checked: &mut Vec<Unchecked>) -> Result<()> {
    let batch = Batch::read(report)?;
    let mut of_group = None;
    for (name, wanted) in report["advantages"].as_object().into_iter().flatten() {
        let found = advantages(report, name)?;
        let wanted: Vec<f64> = typed(wanted, "advantages")?;
        checks.push(training_check(name, "grpo_advantages", &found.advantages, &wanted));
        if name == "group" {
            of_group = Some(found);
        }
    }
    let of_group = of_group.ok_or_else(|| Error::data("the golden vectors have no `advantages.group`"))?;
    for case in report["cases"].as_array().into_iter().flatten() {
        let config = loss_config(report, case)?;
        let is_on_policy: bool = typed(&case["on_policy"], "on_policy")?;
        let loss = batch.loss(&config, is_on_policy, &of_group.advantages, report)?;
        let name = name_of(case, is_on_policy)?;
        checks.push(training_check(&name, "grpo_loss", &[loss.loss], &[typed(&case["loss"], "loss")?]));
        let wanted: Vec<Vec<f64>> = typed(&case["grad"], "grad")?;
        let gradient = batch.padded.unpack(&loss.d_log_probs);
        checks.push(training_check(&name, "grpo_gradient", &gradient, &wanted.concat()));
    }
    check_metrics(report, &batch, &of_group, checks, not_checked)
}

/// What tells a case from the others of its file.
fn name_of(case: &Value, is_on_policy: bool) -> Result<String> {
    let text = |key: &str| typed::<String>(&case[key], key);
    let delta = optional::<f64>(case, "delta")?.map(|delta| format!(".delta{delta}")).unwrap_or_default();
    let policy = if is_on_policy { ".on_policy" } else { "" };
    Ok(format!("{}.{}.beta{}{delta}{policy}", text("loss_type")?, text("level")?, case["beta"]))
}

fn advantages(report: &Value, name: &str) -> Result<Advantages> {
    let rewards: Vec<Vec<Option<f64>>> = typed(&report["rewards"], "rewards")?;
    let rewards: Vec<Vec<f64>> = rewards
        .into_iter()
        .map(|row| row.into_iter().map(|reward| reward.unwrap_or(f64::NAN)).collect())
        .collect();
    let mut config = AdvantageConfig {
        group_size: typed(&report["G"], "G")?,
        reward_weights: optional(report, "reward_weights")?.unwrap_or_default(),
        ..AdvantageConfig::default()
    };
    if name == "normalize_then_sum" {
        config.aggregation = RewardAggregation::NormalizeThenSum;
    } else {
        config.scale_rewards = typed(&Value::from(name), "advantages")?;
    }
    group_relative(&rewards, &config)
}

/// The settings of a case; what it does not say itself, the file says for all.
fn loss_config(report: &Value, case: &Value) -> Result<GrpoConfig> {
    let loss_type: LossType = typed(&case["loss_type"], "loss_type")?;
    let number = |key: &str| -> Result<f64> {
        match optional(case, key)? {
            Some(number) => Ok(number),
            None => typed(&report[key], key),
        }
    };
    Ok(GrpoConfig {
        loss_type,
        importance_level: typed(&case["level"], "level")?,
        clip_low: number("epsilon")?,
        clip_high: number(if loss_type == LossType::Cispo { "cispo_epsilon_high" } else { "epsilon_high" })?,
        delta: optional(case, "delta")?,
        kl_coef: typed(&case["beta"], "beta")?,
        kl_bias_correction: optional(case, "use_bias_correction_kl")?.unwrap_or(false),
    })
}

/// The completions, packed.
struct Batch {
    padded: Padded,
    log_probs: Vec<f64>,
    old_log_probs: Vec<f64>,
    ref_log_probs: Vec<f64>,
}

impl Batch {
    fn read(report: &Value) -> Result<Self> {
        let padded = Padded::read(&report["mask"])?;
        Ok(Self {
            log_probs: padded.pack(&report["logps"], "logps")?,
            old_log_probs: padded.pack(&report["old_logps"], "old_logps")?,
            ref_log_probs: padded.pack(&report["ref_logps"], "ref_logps")?,
            padded,
        })
    }

    fn loss(
        &self,
        config: &GrpoConfig,
        is_on_policy: bool,
        advantages: &[f64],
        report: &Value,
    ) -> Result<crate::train::grpo::GrpoLoss> {
        let completions = Completions {
            lengths: &self.padded.lengths,
            completion_mask: None,
            log_probs: &self.log_probs,
            old_log_probs: (!is_on_policy).then_some(&self.old_log_probs[..]),
            ref_log_probs: Some(&self.ref_log_probs),
            advantages,
        };
        let accumulation = Accumulation {
            gradient_accumulation_steps: 1,
            steps_per_generation: 1,
            num_items_in_batch: self.log_probs.len(),
            max_completion_length: typed(&report["max_completion_length"], "max_completion_length")?,
        };
        grpo_loss(&completions, config, &accumulation)
    }
}

/// Metrics of the batch off policy, with ratios of tokens.
fn check_metrics(
    report: &Value,
    batch: &Batch,
    advantages: &Advantages,
    checks: &mut Vec<Check>,
    not_checked: &mut Vec<Unchecked>,
) -> Result<()> {
    let config = GrpoConfig {
        importance_level: ImportanceLevel::Token,
        clip_low: typed(&report["epsilon"], "epsilon")?,
        clip_high: typed(&report["epsilon_high"], "epsilon_high")?,
        kl_coef: 1.0,
        ..GrpoConfig::default()
    };
    let stats = batch.loss(&config, false, &advantages.advantages, report)?.stats;
    for (key, wanted) in report["metrics"].as_object().into_iter().flatten() {
        let found = match key.as_str() {
            "entropy" => {
                let entropies = batch.padded.pack(&report["entropies"], "entropies")?;
                Some(entropies.iter().sum::<f64>() / entropies.len() as f64)
            }
            key => metric(&stats, key).or_else(|| reward_metric(advantages, key)),
        };
        match found {
            Some(found) => {
                // A spread of nothing is null.
                let wanted = wanted.as_f64().unwrap_or(f64::NAN);
                let is_same_nothing = found.is_nan() && wanted.is_nan();
                let difference = if is_same_nothing { (vec![], vec![]) } else { (vec![found], vec![wanted]) };
                checks.push(training_check(key, "grpo_metrics", &difference.0, &difference.1));
            }
            None => not_checked.push(unchecked("-", key, "grpo_metrics", "the metric is not known")),
        }
    }
    Ok(())
}

/// A metric of the policy loss by TRL's name; none when the loss has none of that name.
pub(super) fn metric(stats: &GrpoStats, key: &str) -> Option<f64> {
    match key {
        "kl" => stats.kl,
        "clip_ratio/low_mean" => Some(stats.clip_low_mean),
        "clip_ratio/low_min" => Some(stats.clip_low_min),
        "clip_ratio/high_mean" | "cispo_clip_ratio" => Some(stats.clip_high_mean),
        "clip_ratio/high_max" => Some(stats.clip_high_max),
        "clip_ratio/region_mean" => Some(stats.clip_region_mean),
        _ => None,
    }
}

/// A metric of the rewards by TRL's name; reward functions are called `f0`, `f1` and so on.
fn reward_metric(advantages: &Advantages, key: &str) -> Option<f64> {
    match key {
        "reward" => Some(advantages.reward.mean),
        "reward_std" => Some(advantages.reward.std),
        "frac_reward_zero_std" => Some(advantages.frac_reward_zero_std),
        _ => {
            let (function, kind) = key.strip_prefix("rewards/f")?.split_once('/')?;
            let summary = advantages.per_function.get(function.parse::<usize>().ok()?)?;
            match kind {
                "mean" => Some(summary.mean),
                "std" => Some(summary.std),
                _ => None,
            }
        }
    }
}
