//! What a step of GRPO says about itself: its metrics under TRL's names, and completions to read along.

use super::group::Group;
use super::judge::{Column, Judge};
use super::update::UpdateOutcome;
use crate::recipes::config::LossType;
use crate::recipes::lesson::{Lesson, Questions};
use crate::recipes::sft::StepReport;
use serde_json::{Map, Value, json};

pub(super) fn describe(
    report: &mut StepReport,
    lesson: &Lesson<'_>,
    judge: &Judge,
    groups: &[Group],
    outcome: &UpdateOutcome,
) {
    let completions = || groups.iter().flat_map(|group| &group.completions);
    let num_flat = groups.iter().filter(|group| group.is_flat()).count();
    let mut put = |key: &str, value: f64| {
        report.metrics.insert(key.to_owned(), json!(value));
    };
    put("loss", outcome.loss);
    put("learning_rate", outcome.learning_rate);
    put("grad_norm", outcome.grad_norm);
    put_rewards(&mut put, judge, groups);
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

/// Mean and spread of each reward over the completions of the step that were given one, and the share that was given
/// none of those that a command gives. Where none was given, none is logged.
fn put_rewards(put: &mut impl FnMut(&str, f64), judge: &Judge, groups: &[Group]) {
    let given = |of: &dyn Fn(&Group) -> Vec<f64>| -> (Vec<f64>, f64) {
        let all: Vec<f64> = groups.iter().flat_map(of).collect();
        let given: Vec<f64> = all.iter().copied().filter(|reward| !reward.is_nan()).collect();
        let missing = 1.0 - given.len() as f64 / all.len() as f64;
        (given, missing)
    };
    let (total, _) = given(&|group| group.total.clone());
    if !total.is_empty() {
        put("reward", mean(total.iter().copied()));
        put("reward_std", standard_deviation(&total));
    }
    for (k, Column { name, is_external, .. }) in judge.columns().iter().enumerate() {
        let (rewards, missing) = given(&|group| group.column(k).to_vec());
        if !rewards.is_empty() {
            put(&format!("rewards/{name}/mean"), mean(rewards.iter().copied()));
            put(&format!("rewards/{name}/std"), standard_deviation(&rewards));
        }
        if *is_external {
            put(&format!("rewards/{name}/missing"), missing);
        }
    }
}

pub(super) fn write_down(
    report: &mut StepReport,
    questions: &Questions,
    judge: &Judge,
    groups: &[Group],
    advantages: &[Vec<f64>],
    num_attacked: usize,
) {
    // One question a step is enough to read along; every completion of it.
    if let (Some(sample), Some(group)) = (questions.samples.first(), groups.first()) {
        for (g, text) in group.texts.iter().enumerate() {
            let mut line = json!({
                "id": sample.id,
                "attacked": num_attacked > 0,
                "answer": sample.answer_letter().to_string(),
                "completion": text,
                "reward": group.total[g],
                "accuracy": group.accuracy[g],
                "format": group.format[g],
                "advantage": advantages[0][g],
            });
            let others = judge.columns().iter().enumerate().skip(2);
            let others: Map<String, Value> =
                others.map(|(k, column)| (column.name.clone(), json!(group.column(k)[g]))).collect();
            if !others.is_empty() {
                line["rewards"] = Value::Object(others);
            }
            report.completions.push(line);
        }
    }
}

pub(super) fn mean(values: impl Iterator<Item = f64>) -> f64 {
    let (sum, count) = values.fold((0.0, 0usize), |(sum, count), value| (sum + value, count + 1));
    if count == 0 { 0.0 } else { sum / count as f64 }
}

/// Sample standard deviation.
fn standard_deviation(values: &[f64]) -> f64 {
    let centre = mean(values.iter().copied());
    let squares: f64 = values.iter().map(|v| (v - centre).powi(2)).sum();
    if values.len() < 2 { 0.0 } else { (squares / (values.len() - 1) as f64).sqrt() }
}
