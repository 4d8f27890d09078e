//! What a step of GRPO says about itself: its metrics under TRL's names where they mean what TRL's mean, and completions to
//! read along.
//!
//! Deviation: TRL's `step_time` is not among the metrics, which are the same bytes each time; `timings.jsonl` has it as `seconds`.

use super::group::Group;
use super::judge::{Column, Judge};
use super::update::UpdateOutcome;
use crate::error::Result;
use crate::recipes::config::{GrpoSettings, LossType};
use crate::recipes::items;
use crate::recipes::lesson::{Lesson, Questions};
use crate::recipes::step::StepReport;
use crate::train::advantage::{Advantages, RewardSummary, summary};
use crate::train::grpo::GrpoStats;
use candle_core::Tensor;
use serde_json::{Map, Value, json};
use sha2::{Digest as _, Sha256};

pub(super) fn describe(
    report: &mut StepReport,
    lesson: &Lesson<'_>,
    judge: &Judge,
    groups: &[Group],
    advantages: &Advantages,
    outcome: &UpdateOutcome,
) {
    let completions = || groups.iter().flat_map(|group| &group.completions);
    let mut put = |key: &str, value: f64| {
        report.metrics.insert(key.to_owned(), json!(value));
    };
    put("loss", outcome.loss);
    put("learning_rate", outcome.learning_rate);
    put("grad_norm", outcome.grad_norm);
    put_rewards(&mut put, judge, groups, advantages.reward);
    put("frac_reward_zero_std", advantages.frac_reward_zero_std);
    put("frac_groups_zero_std", advantages.frac_groups_zero_std);
    put("groups_updated", outcome.num_groups_updated as f64);
    put("entropy", entropy(groups, &lesson.config.grpo));
    if let Some(mean) = outcome.sampling_gap.mean() {
        put("sampling/sampling_logp_difference/mean", mean);
        put("sampling/sampling_logp_difference/max", outcome.sampling_gap.max);
    }
    for (key, value) in figures_of(&outcome.stats, lesson.config.grpo.loss_type) {
        put(key, value);
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

/// Mean entropy of the tokens that take part in the loss, as TRL takes its masked mean; 0 where none does.
fn entropy(groups: &[Group], settings: &GrpoSettings) -> f64 {
    let mut all = Vec::new();
    for group in groups {
        for (c, completion) in group.completions.iter().enumerate() {
            if group.counts(c, settings) {
                all.extend(completion.entropies.iter().map(|entropy| f64::from(*entropy)));
            }
        }
    }
    mean(all.into_iter())
}

/// What the loss says about one update.
fn figures_of(stats: &GrpoStats, loss_type: LossType) -> Vec<(&'static str, f64)> {
    let mut figures: Vec<(&'static str, f64)> = stats.kl.map(|kl| ("kl", kl)).into_iter().collect();
    if loss_type == LossType::Cispo {
        figures.push(("cispo_clip_ratio", stats.clip_high_mean));
    } else {
        figures.extend([
            ("clip_ratio/low_mean", stats.clip_low_mean),
            ("clip_ratio/low_min", stats.clip_low_min),
            ("clip_ratio/high_mean", stats.clip_high_mean),
            ("clip_ratio/high_max", stats.clip_high_max),
            ("clip_ratio/region_mean", stats.clip_region_mean),
        ]);
    }
    figures
}

/// What is each update's own, where the settings want several. Their number counts from 1.
pub(super) fn each_update(lesson: &Lesson<'_>, outcome: &UpdateOutcome) -> Vec<Map<String, Value>> {
    let settings = &lesson.config.grpo;
    if settings.num_updates == 1 {
        return Vec::new();
    }
    let own = |(index, (loss, grad_norm, stats)): (usize, &(f64, f64, GrpoStats))| {
        let mut own = Map::from_iter([("update".to_owned(), json!(index + 1))]);
        let figures = figures_of(stats, settings.loss_type);
        for (key, value) in figures.into_iter().chain([("loss", *loss), ("grad_norm", *grad_norm)]) {
            own.insert(key.to_owned(), json!(value));
        }
        own
    };
    outcome.each.iter().enumerate().map(own).collect()
}

/// Mean and spread of each reward over the completions of the step that were given one, where there are any, and the share that
/// was given none of those that a command gives.
fn put_rewards(put: &mut impl FnMut(&str, f64), judge: &Judge, groups: &[Group], total: RewardSummary) {
    let mut put_summary = |mean_key: &str, std_key: &str, of: RewardSummary| {
        for (key, value) in [(mean_key, of.mean), (std_key, of.std)] {
            if !value.is_nan() {
                put(key, value);
            }
        }
    };
    put_summary("reward", "reward_std", total);
    for (k, Column { name, .. }) in judge.columns().iter().enumerate() {
        let all: Vec<f64> = groups.iter().flat_map(|group| group.column(k)).copied().collect();
        put_summary(&format!("rewards/{name}/mean"), &format!("rewards/{name}/std"), summary(&all));
    }
    for (k, Column { name, .. }) in judge.columns().iter().enumerate().filter(|(_, c)| c.is_external) {
        let all = || groups.iter().flat_map(|group| group.column(k));
        let missing = all().filter(|reward| reward.is_nan()).count() as f64 / all().count() as f64;
        put(&format!("rewards/{name}/missing"), missing);
    }
}

/// Notes every completion of the first `log_questions` questions. Of a step's `pixels` the first `num_attacked` images are
/// attacked.
///
/// `group` is the question's place in the step, `seed` that of the stream the tokens were drawn from, `length` in tokens.
/// `image_sha256` is that of the file's picture, as in certificates; `pixels_sha256` that of what the completion was sampled on,
/// attacked and noisy where it was: the float32 values of `[3, height, width]` in [0, 1], little-endian. It equals what the
/// resized picture itself gives where the image was left as it is.
pub(super) fn write_down(
    report: &mut StepReport,
    lesson: &Lesson<'_>,
    questions: &Questions,
    judge: &Judge,
    groups: &[Group],
    advantages: &[Vec<f64>],
    (pixels, num_attacked): (&[Tensor], usize),
) -> Result<()> {
    for (q, group) in groups.iter().enumerate().take(lesson.config.grpo.log_questions) {
        let sample = &questions.samples[q];
        let image_sha256 = lesson.images.sha256(&sample.image)?;
        let pixels_sha256 = sha256_of(&items::pick(pixels, &[q])?)?;
        for (g, text) in group.texts.iter().enumerate() {
            let mut line = json!({
                "id": sample.id,
                "attacked": q < num_attacked,
                "answer": sample.answer_letter().to_string(),
                "completion": text,
                "reward": group.total[g],
                "accuracy": group.accuracy[g],
                "format": group.format[g],
                "advantage": advantages[q][g],
                "group": q,
                "seed": group.seeds[g],
                "is_finished": group.completions[g].is_finished,
                "length": group.completions[g].ids.len(),
                "prompt": lesson.template.user_text(sample),
                "image_sha256": image_sha256,
                "pixels_sha256": pixels_sha256,
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
    Ok(())
}

/// SHA-256 of the values of tensors as little-endian float32, in hexadecimal.
fn sha256_of(tensors: &[Tensor]) -> Result<String> {
    let mut hasher = Sha256::new();
    for tensor in tensors {
        let values = tensor.flatten_all()?.to_vec1::<f32>()?;
        hasher.update(values.iter().flat_map(|value| value.to_le_bytes()).collect::<Vec<u8>>());
    }
    Ok(format!("{:x}", hasher.finalize()))
}

pub(super) fn mean(values: impl Iterator<Item = f64>) -> f64 {
    let (sum, count) = values.fold((0.0, 0usize), |(sum, count), value| (sum + value, count + 1));
    if count == 0 { 0.0 } else { sum / count as f64 }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::model::generate::Completion;

    #[test]
    fn the_entropy_is_that_of_the_tokens_in_the_loss() {
        let completion = |is_finished: bool, entropies: &[f32]| Completion {
            ids: vec![1; entropies.len()],
            is_finished,
            entropies: entropies.to_vec(),
            log_probs: Vec::new(),
        };
        let group = |completions: Vec<Completion>| Group {
            texts: vec![String::new(); completions.len()],
            seeds: vec![0; completions.len()],
            accuracy: vec![0.0; completions.len()],
            format: vec![0.0; completions.len()],
            others: Vec::new(),
            total: vec![0.0; completions.len()],
            is_flat: true,
            completions,
        };
        let groups = [
            group(vec![completion(true, &[1.0, 2.0]), completion(false, &[7.0, 7.0, 7.0])]),
            group(vec![completion(false, &[9.0]), completion(true, &[3.0])]),
        ];
        let of = |groups: &[Group], mask_truncated: bool| {
            entropy(groups, &GrpoSettings { mask_truncated, ..GrpoSettings::default() })
        };
        assert_eq!(of(&groups, false), 36.0 / 7.0);
        assert_eq!(of(&groups, true), 2.0);
        assert_eq!(of(&[group(vec![completion(false, &[5.0])])], true), 0.0);
    }
}
