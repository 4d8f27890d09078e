//! From rewards to group-relative advantages.
//!
//! A group is the set of completions of one prompt. An advantage says how much better a completion scored than its
//! group, in units of a spread. A reward that could not be given is NaN; its completion takes no part in mean and
//! spread and gets advantage zero.

use crate::error::{Error, Result};
use serde::{Deserialize, Serialize};

/// Added to the standard deviation that is divided by (TRL's constant).
const STD_EPSILON: f64 = 1e-4;

/// A standard deviation up to this counts as none (the absolute tolerance of `torch.isclose`).
const ZERO_STD: f64 = 1e-8;

/// Which standard deviation the centred rewards are divided by.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum ScaleRewards {
    /// The group's.
    #[default]
    Group,
    /// That of all rewards of the batch.
    Batch,
    /// None: rewards are only centred (Dr. GRPO).
    None,
}

/// How several reward functions become one advantage.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum RewardAggregation {
    /// The weighted sum of the rewards is normalised.
    #[default]
    SumThenNormalize,
    /// Each function is normalised in its group, and their weighted sum over the batch (GDPO).
    NormalizeThenSum,
}

/// How advantages are made.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct AdvantageConfig {
    /// Completions per prompt, at least 2.
    pub group_size: usize,
    /// What the centred rewards are divided by. Without meaning for `normalize_then_sum`.
    pub scale_rewards: ScaleRewards,
    /// In which order rewards are added up and normalised.
    pub aggregation: RewardAggregation,
    /// One weight per reward function; empty means 1 for each.
    pub reward_weights: Vec<f64>,
}

impl Default for AdvantageConfig {
    fn default() -> Self {
        Self {
            group_size: 8,
            scale_rewards: ScaleRewards::Group,
            aggregation: RewardAggregation::SumThenNormalize,
            reward_weights: Vec::new(),
        }
    }
}

/// Mean and spread of one reward function over a batch.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct RewardSummary {
    /// Mean of the rewards that were given; NaN when none was.
    pub mean: f64,
    /// Their sample standard deviation; NaN with fewer than two.
    pub std: f64,
}

/// Advantages of a batch and what a log says about them.
#[derive(Debug, Clone, PartialEq)]
pub struct Advantages {
    /// One per completion, in the order of the rewards.
    pub advantages: Vec<f64>,
    /// The weighted sum of each completion's rewards; NaN where no function gave one.
    pub rewards: Vec<f64>,
    /// Mean and spread of `rewards` over the batch.
    pub reward: RewardSummary,
    /// Mean and spread of each reward function over the batch.
    pub per_function: Vec<RewardSummary>,
    /// As TRL logs it: the share of completions whose advantage is divided by no spread. The share of groups where that is the
    /// group's, else 1 or 0 by that of the batch.
    pub frac_reward_zero_std: f64,
    /// Share of groups without any spread, which teach nothing. As in TRL a group that was given fewer than two rewards is not
    /// counted: its spread is no number.
    pub frac_groups_zero_std: f64,
}

/// Advantages of a batch whose groups lie one after another.
///
/// `rewards[completion][function]`, NaN where a function gave no reward; the number of completions is a multiple of
/// `group_size`. With μ the group's mean and s the chosen sample standard deviation: A = (R − μ) / (s + 1e-4), or
/// R − μ without scaling. Groups in which all rewards are equal get exactly zero.
///
/// # Errors
/// When rewards, weights and groups do not go together; [`Error::NonFinite`] for a reward that is not finite, and for rewards so
/// large that their sum or spread is not: divided by it every advantage would be zero, and nothing would be learnt.
pub fn group_relative(rewards: &[Vec<f64>], config: &AdvantageConfig) -> Result<Advantages> {
    let weights = checked_weights(rewards, config)?;
    let sums = weighted_sums(rewards, &weights, config.group_size)?;
    let column = |k: usize| rewards.iter().map(|row| row[k]).collect::<Vec<f64>>();
    // The one spread of the whole batch, where the groups' own are not what is divided by.
    let divided_by;
    let mut advantages = match config.aggregation {
        RewardAggregation::SumThenNormalize => {
            let batch_std = summary(&sums).std;
            divided_by = (config.scale_rewards == ScaleRewards::Batch).then_some(batch_std);
            normalize_groups(&sums, config.group_size, |group_std| match config.scale_rewards {
                ScaleRewards::Group => group_std + STD_EPSILON,
                ScaleRewards::Batch => batch_std + STD_EPSILON,
                ScaleRewards::None => 1.0,
            })?
        }
        RewardAggregation::NormalizeThenSum => {
            let columns: Vec<Vec<f64>> = (0..weights.len())
                .map(|k| normalize_groups(&column(k), config.group_size, |std| std + STD_EPSILON))
                .collect::<Result<_>>()?;
            // A reward alone in its group is neither above nor below it; only a completion without any has no part in the batch.
            let score_of = |i: usize| {
                let of_row: Vec<f64> = columns.iter().map(|column| column[i]).collect();
                let score = weighted_sum(&of_row, &weights);
                if score.is_nan() && !sums[i].is_nan() { 0.0 } else { score }
            };
            let scores: Vec<f64> = (0..rewards.len()).map(score_of).collect();
            let RewardSummary { mean, std } = summary(&scores);
            divided_by = Some(std);
            scores.iter().map(|score| (score - mean) / (std + STD_EPSILON)).collect()
        }
    };
    // Groups may have a spread each, and none all together.
    let reward = finite_summary(&sums, "the step", 0)?;
    for advantage in &mut advantages {
        if advantage.is_nan() {
            *advantage = 0.0;
        }
    }
    let groups = sums.chunks(config.group_size);
    let flat = groups.clone().filter(|group| summary(group).std <= ZERO_STD).count();
    let frac_groups_zero_std = flat as f64 / groups.len().max(1) as f64;
    Ok(Advantages {
        advantages,
        reward,
        per_function: (0..weights.len()).map(|k| summary(&column(k))).collect(),
        frac_reward_zero_std: match divided_by {
            Some(std) => f64::from(u8::from(std <= ZERO_STD)),
            None => frac_groups_zero_std,
        },
        frac_groups_zero_std,
        rewards: sums,
    })
}

/// The weights of the reward functions, after the shape of `rewards` was found right.
fn checked_weights(rewards: &[Vec<f64>], config: &AdvantageConfig) -> Result<Vec<f64>> {
    let functions = rewards.first().map_or(config.reward_weights.len(), Vec::len);
    let weights =
        if config.reward_weights.is_empty() { vec![1.0; functions] } else { config.reward_weights.clone() };
    if weights.len() != functions || rewards.iter().any(|row| row.len() != functions) {
        let message = format!("{functions} reward functions, but {} reward weights", weights.len());
        return Err(Error::usage(format!("{message}\n   = help: give one weight per reward function")));
    }
    if config.group_size == 0 || !rewards.len().is_multiple_of(config.group_size) {
        return Err(Error::usage(format!(
            "{} completions do not divide into groups of {}\n   = help: make the batch a multiple of group_size",
            rewards.len(),
            config.group_size
        )));
    }
    for (i, row) in rewards.iter().enumerate() {
        if let Some(k) = row.iter().position(|reward| reward.is_infinite()) {
            return Err(Error::NonFinite(format!("reward {k} of completion {i} is {}", row[k])));
        }
    }
    Ok(weights)
}

/// The sum over the functions that gave a reward, of reward x weight; NaN when none did.
pub fn weighted_sum(row: &[f64], weights: &[f64]) -> f64 {
    if row.iter().all(|reward| reward.is_nan()) {
        return f64::NAN;
    }
    row.iter()
        .zip(weights)
        .filter(|(reward, _)| !reward.is_nan())
        .map(|(reward, weight)| reward * weight)
        .sum()
}

/// The weighted sum of each completion's rewards; NaN where none was given.
fn weighted_sums(rewards: &[Vec<f64>], weights: &[f64], group_size: usize) -> Result<Vec<f64>> {
    let sums: Vec<f64> = rewards.iter().map(|row| weighted_sum(row, weights)).collect();
    for (i, (row, sum)) in rewards.iter().zip(&sums).enumerate() {
        // NaN of given rewards is of infinities that take each other away.
        if !sum.is_finite() && row.iter().any(|reward| !reward.is_nan()) {
            let group = i / group_size;
            return Err(too_large(
                &format!("completion {i} in group {group}"),
                &format!("weighted sum is {sum}"),
            ));
        }
    }
    Ok(sums)
}

/// (value − group mean) / divisor(group std); NaN where the value is.
fn normalize_groups(values: &[f64], group_size: usize, divisor: impl Fn(f64) -> f64) -> Result<Vec<f64>> {
    let mut normalized = Vec::with_capacity(values.len());
    for (number, group) in values.chunks(group_size).enumerate() {
        let name = format!("group {number}");
        let RewardSummary { mean, std } = finite_summary(group, &name, number * group_size)?;
        let divisor = divisor(std);
        normalized.extend(group.iter().map(|value| (value - mean) / divisor));
    }
    Ok(normalized)
}

/// [`summary`] of the rewards of `whose`, which begin with completion `first`; an error where they are too large for one.
fn finite_summary(values: &[f64], whose: &str, first: usize) -> Result<RewardSummary> {
    let found = summary(values);
    let given = || values.iter().enumerate().filter(|(_, value)| !value.is_nan());
    // Of no value there is no mean, and of one no spread.
    let has_mean = found.mean.is_finite() || given().count() == 0;
    let has_spread = found.std.is_finite() || given().count() < 2;
    match given().max_by(|a, b| a.1.abs().total_cmp(&b.1.abs())) {
        Some((place, value)) if !(has_mean && has_spread) => {
            let what = format!(
                "mean is {:e} and their standard deviation {:e}; the largest is {value:e}, of completion {}",
                found.mean,
                found.std,
                first + place
            );
            Err(too_large(whose, &what))
        }
        _ => Ok(found),
    }
}

fn too_large(whose: &str, what: &str) -> Error {
    Error::NonFinite(format!(
        "the rewards of {whose} are too large: their {what}\n   = help: let `train.grpo.reward_command` answer smaller numbers, null where it has none to give, or lower the `train.grpo.*_weight` that makes them so large"
    ))
}

/// Mean and sample standard deviation (n − 1) of the values that are not NaN. Equal values have exactly no spread.
pub fn summary(values: &[f64]) -> RewardSummary {
    let given: Vec<f64> = values.iter().copied().filter(|value| !value.is_nan()).collect();
    let n = given.len() as f64;
    match given.first() {
        // Rounding of the mean must not turn into an advantage.
        Some(&first) if given.iter().all(|&value| value == first) => {
            RewardSummary { mean: first, std: if n > 1.0 { 0.0 } else { f64::NAN } }
        }
        _ => {
            let mean = given.iter().sum::<f64>() / n;
            let squares: f64 = given.iter().map(|value| (value - mean).powi(2)).sum();
            // Of no values at all the quotient would be -0.
            RewardSummary { mean, std: if n > 1.0 { (squares / (n - 1.0)).sqrt() } else { f64::NAN } }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::train::test_support::{assert_close, numbers, reference};

    fn one_function(rewards: &[f64]) -> Vec<Vec<f64>> {
        rewards.iter().map(|&reward| vec![reward]).collect()
    }

    fn with(scale_rewards: ScaleRewards, group_size: usize) -> AdvantageConfig {
        AdvantageConfig { group_size, scale_rewards, ..AdvantageConfig::default() }
    }

    #[test]
    fn a_pair_of_right_and_wrong_gets_the_closed_form() {
        let rewards = one_function(&[1.0, 0.0, 3.0, 1.0]);
        let group = group_relative(&rewards, &with(ScaleRewards::Group, 2)).unwrap().advantages;
        let (s1, s2) = (0.5f64.sqrt() + 1e-4, 2f64.sqrt() + 1e-4);
        assert_close(&group, &[0.5 / s1, -0.5 / s1, 1.0 / s2, -1.0 / s2], 1e-14, "group");
        let none = group_relative(&rewards, &with(ScaleRewards::None, 2)).unwrap().advantages;
        assert_eq!(none, [0.5, -0.5, 1.0, -1.0]);
        let batch = group_relative(&rewards, &with(ScaleRewards::Batch, 2)).unwrap().advantages;
        let s = (4.75f64 / 3.0).sqrt() + 1e-4; // around the mean 1.25: 0.0625 + 1.5625 + 3.0625 + 0.0625
        assert_close(&batch, &[0.5 / s, -0.5 / s, 1.0 / s, -1.0 / s], 1e-14, "batch");
    }

    #[test]
    fn equal_rewards_give_exactly_zero_whatever_their_rounding() {
        // 0.1 six times does not sum to 0.6, so a mean by division is off by a rounding error
        let rewards = one_function(&[0.1, 0.1, 0.1, 0.1, 0.1, 0.1, 0.1, 0.9, 0.1, 0.1, 0.1, 0.1]);
        for scale in [ScaleRewards::Group, ScaleRewards::Batch, ScaleRewards::None] {
            let result = group_relative(&rewards, &with(scale, 6)).unwrap();
            assert_eq!(result.advantages[..6], [0.0; 6]);
            assert!(result.advantages[7] > 0.0);
            assert_eq!(result.frac_groups_zero_std, 0.5);
        }
    }

    #[test]
    fn a_reward_not_given_counts_for_nothing() {
        let nan = f64::NAN;
        let with_gap = group_relative(
            &[vec![1.0, nan], vec![nan, nan], vec![nan, 4.0], vec![0.0, 0.0]],
            &AdvantageConfig { reward_weights: vec![1.0, 0.5], ..with(ScaleRewards::Group, 4) },
        )
        .unwrap();
        assert!(with_gap.rewards[1].is_nan());
        assert_eq!([with_gap.rewards[0], with_gap.rewards[2], with_gap.rewards[3]], [1.0, 2.0, 0.0]);
        assert_close(&with_gap.advantages, &[0.0, 0.0, 1.0 / 1.0001, -1.0 / 1.0001], 1e-14, "gap");
        // one scorable completion has nothing to be compared with
        let alone = group_relative(&one_function(&[nan, 5.0]), &with(ScaleRewards::Group, 2)).unwrap();
        assert_eq!(alone.advantages, [0.0, 0.0]);
        assert_eq!(alone.frac_reward_zero_std, 0.0);
    }

    #[test]
    fn advantages_do_not_depend_on_shifts_or_on_other_groups() {
        let config = with(ScaleRewards::Group, 4);
        let base = [0.3, 1.7, 0.0, -2.0, 5.0, 5.0, 6.0, 8.0];
        let shifted: Vec<f64> =
            base.iter().enumerate().map(|(i, r)| if i < 4 { r + 10.0 } else { *r }).collect();
        let a = group_relative(&one_function(&base), &config).unwrap().advantages;
        let b = group_relative(&one_function(&shifted), &config).unwrap().advantages;
        assert_close(&a, &b, 1e-13, "shift");
        let second = group_relative(&one_function(&base[4..]), &config).unwrap().advantages;
        assert_eq!(a[4..], second);
        assert!(a[..4].iter().sum::<f64>().abs() < 1e-14);
    }

    #[test]
    fn wrong_shapes_and_infinite_rewards_are_refused() {
        let config = with(ScaleRewards::Group, 2);
        assert!(group_relative(&one_function(&[1.0, 2.0, 3.0]), &config).is_err());
        assert!(group_relative(&[vec![1.0], vec![1.0, 2.0]], &config).is_err());
        let weights = AdvantageConfig { reward_weights: vec![1.0; 3], ..config.clone() };
        assert!(group_relative(&one_function(&[1.0, 2.0]), &weights).is_err());
        let infinite = group_relative(&one_function(&[1.0, f64::INFINITY]), &config).unwrap_err();
        assert!(infinite.to_string().contains("completion 1"), "{infinite}");
    }

    #[test]
    fn rewards_too_large_to_be_compared_are_refused_by_group_and_completion() {
        let nan = f64::NAN;
        let refused = |rewards: &[Vec<f64>], config: &AdvantageConfig| {
            let error = group_relative(rewards, config).unwrap_err();
            assert!(matches!(error, Error::NonFinite(_)), "{error}");
            error.to_string()
        };
        for scale in [ScaleRewards::Group, ScaleRewards::Batch, ScaleRewards::None] {
            for aggregation in [RewardAggregation::SumThenNormalize, RewardAggregation::NormalizeThenSum] {
                let config = AdvantageConfig { aggregation, ..with(scale, 3) };
                // The first is too large in its squares, the second in its sum.
                for (large, words) in [
                    ([-1e300, 1e300, nan], ["of group 1 ", "1e300, of completion 4"]),
                    ([f64::MAX, 1.5e308, 0.0], ["of group 1 ", "e308, of completion 3"]),
                ] {
                    let text = refused(&one_function(&[&[1.0, nan, 0.0][..], &large].concat()), &config);
                    for word in words {
                        assert!(text.contains(word) && text.contains("\n   = help: "), "{word}: {text}");
                    }
                }
                // Each group by itself is flat, and all of them together have no spread that is a number.
                let flat = one_function(&[1e200, 1e200, nan, 0.0, 0.0, 0.0]);
                assert!(refused(&flat, &config).contains("of the step "));
                // No spread is asked of equal rewards, of one or of none.
                for rewards in [[1e300, 1e300, 1e300], [nan, 1e300, nan], [nan, nan, nan]] {
                    let found = group_relative(&one_function(&rewards), &config).unwrap();
                    assert_eq!(found.advantages, [0.0; 3], "{rewards:?}");
                }
                let found = group_relative(&one_function(&[1e150, -1e150, nan]), &config).unwrap();
                assert!(found.advantages[0] > 0.5 && found.advantages[1] < -0.5, "{:?}", found.advantages);
            }
        }
        // A sum over the functions of one completion; infinities of both signs are no reward that is missing.
        for (row, weight) in [([1e308, 1e308], 1.0), ([1e308, -1e308], 10.0), ([nan, 1e308], 10.0)] {
            let config = AdvantageConfig { reward_weights: vec![weight; 2], ..with(ScaleRewards::Group, 2) };
            let text = refused(&[vec![0.0, 1.0], row.to_vec()], &config);
            assert!(text.contains("of completion 1 in group 0 "), "{text}");
        }
    }

    #[test]
    fn equal_to_the_reference_trainer() {
        let Some(reference) = reference("fixtures/grpo.json") else { return };
        for case in reference["advantages"].as_array().unwrap() {
            let functions: Vec<Vec<f64>> = case["rewards"].as_array().unwrap().iter().map(numbers).collect();
            let rewards: Vec<Vec<f64>> =
                (0..functions[0].len()).map(|i| functions.iter().map(|f| f[i]).collect()).collect();
            let config = AdvantageConfig {
                group_size: case["num_generations"].as_u64().unwrap() as usize,
                scale_rewards: serde_json::from_value(case["scale_rewards"].clone()).unwrap(),
                reward_weights: numbers(&case["reward_weights"]),
                aggregation: RewardAggregation::SumThenNormalize,
            };
            let got = group_relative(&rewards, &config).unwrap().advantages;
            assert_close(&got, &numbers(&case["advantages"]), 1e-6, &case["name"].to_string());
        }
    }

    #[test]
    fn equal_to_the_golden_vectors_with_their_metrics() {
        let Some(golden) = reference("grpo_golden.json") else { return };
        let rewards: Vec<Vec<f64>> = golden["rewards"].as_array().unwrap().iter().map(numbers).collect();
        for (name, want) in golden["advantages"].as_object().unwrap() {
            let mut config = AdvantageConfig {
                group_size: 4,
                reward_weights: numbers(&golden["reward_weights"]),
                ..AdvantageConfig::default()
            };
            match name.as_str() {
                "normalize_then_sum" => config.aggregation = RewardAggregation::NormalizeThenSum,
                scale => config.scale_rewards = serde_json::from_value(scale.into()).unwrap(),
            }
            let got = group_relative(&rewards, &config).unwrap();
            assert_close(&got.advantages, &numbers(want), 1e-9, name);
            let metrics = [
                ("reward", got.reward.mean),
                ("reward_std", got.reward.std),
                // The golden metrics are those of groups scaled by themselves.
                ("frac_reward_zero_std", got.frac_groups_zero_std),
                ("rewards/f0/mean", got.per_function[0].mean),
                ("rewards/f0/std", got.per_function[0].std),
                ("rewards/f1/mean", got.per_function[1].mean),
                ("rewards/f1/std", got.per_function[1].std),
            ];
            for (key, value) in metrics {
                assert_close(&[value], &[golden["metrics"][key].as_f64().unwrap()], 1e-9, key);
            }
        }
    }

    #[test]
    fn a_reward_alone_in_its_group_scores_zero_and_counts_in_the_batch() {
        let nan = f64::NAN;
        let config = AdvantageConfig {
            group_size: 2,
            aggregation: RewardAggregation::NormalizeThenSum,
            ..AdvantageConfig::default()
        };
        // Only the first function has two rewards in the first group; nobody scored the last completion.
        let rewards = [vec![1.0, nan], vec![0.0, nan], vec![nan, 3.0], vec![nan, nan]];
        let found = group_relative(&rewards, &config).unwrap();
        let z = 0.5 / (0.5f64.sqrt() + 1e-4);
        // Of z, -z and 0 the mean is 0 and the sample standard deviation z.
        let wanted = [z / (z + 1e-4), -z / (z + 1e-4), 0.0, 0.0];
        assert_close(&found.advantages, &wanted, 1e-12, "alone");
        // With two of the four the spread would be that of z and -z alone.
        assert!((found.advantages[0] - z / (z * 2f64.sqrt() + 1e-4)).abs() > 0.2);
    }

    #[test]
    fn a_spread_of_the_batch_is_there_or_not_for_all_while_groups_are_counted_too() {
        let rewards = one_function(&[1.0, 1.0, 0.0, 0.0, 1.0, 0.0, 0.5, 0.5]);
        for (scale, fraction) in
            [(ScaleRewards::Group, 0.75), (ScaleRewards::None, 0.75), (ScaleRewards::Batch, 0.0)]
        {
            let found = group_relative(&rewards, &with(scale, 2)).unwrap();
            assert_eq!(
                (found.frac_reward_zero_std, found.frac_groups_zero_std),
                (fraction, 0.75),
                "{scale:?}"
            );
        }
        let found = group_relative(&one_function(&[2.0; 4]), &with(ScaleRewards::Batch, 2)).unwrap();
        assert_eq!((found.frac_reward_zero_std, found.frac_groups_zero_std), (1.0, 1.0));
    }
}
