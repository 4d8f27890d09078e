//! One token from its logits: greedy, or drawn after the filters of transformers in their order: repetition penalty,
//! temperature, top-k, top-p, min-p.
//!
//! What is drawn depends on the seed and the logits alone, so that no neighbour in a batch changes it.

use crate::error::{Error, Result};
use rand::SeedableRng;
use rand::distr::Distribution;
use rand::distr::weighted::WeightedIndex;
use rand::rngs::StdRng;
use std::collections::BTreeSet;

/// How tokens are chosen.
#[derive(Debug, Clone, PartialEq)]
pub struct Decoding {
    /// Longest completion, stop token included.
    pub max_new_tokens: usize,
    /// Tokens that end a completion.
    pub stop_ids: Vec<u32>,
    /// Tokens that are never chosen: vision placeholders.
    pub suppressed_ids: Vec<u32>,
    /// Which of the others.
    pub sampling: SamplingConfig,
}

/// The filters between logits and a token.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct SamplingConfig {
    /// Zero is greedy; otherwise logits are divided by this before the softmax.
    pub temperature: f64,
    /// Keep only so many most likely tokens.
    pub top_k: Option<usize>,
    /// Keep the most likely tokens that together have at least this probability (Holtzman et al. 2020).
    pub top_p: Option<f64>,
    /// Keep the tokens that have at least this share of the most likely one's probability (Nguyen et al. 2024).
    pub min_p: Option<f64>,
    /// Divides positive and multiplies negative logits of every token that stands in the prompt or in the completion so
    /// far, before the temperature, as transformers does; 1 changes nothing (Keskar et al. 2019).
    pub repetition_penalty: f64,
}

impl Default for SamplingConfig {
    /// The most likely token.
    fn default() -> Self {
        Self { temperature: 0.0, top_k: None, top_p: None, min_p: None, repetition_penalty: 1.0 }
    }
}

impl SamplingConfig {
    /// Draws from the model's own distribution at `temperature`, or greedy at zero.
    pub fn at(temperature: f64) -> Self {
        Self { temperature, ..Self::default() }
    }

    /// Refuses what no sampler can do.
    ///
    /// # Errors
    /// A usage error that names the setting.
    pub fn check(&self) -> Result<()> {
        let is_share = |share: Option<f64>| share.is_none_or(|share| share > 0.0 && share <= 1.0);
        let rules = [
            (
                self.temperature >= 0.0 && self.temperature.is_finite(),
                "the temperature must be a number from 0 on, and 0 is greedy",
            ),
            (self.top_k != Some(0), "`top_k` must be at least 1"),
            (is_share(self.top_p), "`top_p` must be above 0 and at most 1"),
            (self.min_p.is_none_or(|share| (0.0..=1.0).contains(&share)), "`min_p` must be from 0 to 1"),
            (
                self.repetition_penalty > 0.0 && self.repetition_penalty.is_finite(),
                "the repetition penalty must be a positive number, and 1 switches it off",
            ),
        ];
        match rules.iter().find(|(holds, _)| !holds) {
            None => Ok(()),
            Some((_, rule)) => Err(Error::usage(*rule)),
        }
    }
}

impl Decoding {
    /// The best token at each step.
    pub fn greedy(max_new_tokens: usize, stop_ids: Vec<u32>) -> Self {
        Self { max_new_tokens, stop_ids, suppressed_ids: Vec::new(), sampling: SamplingConfig::default() }
    }
}

/// A token, and how open the choice was.
#[derive(Debug, Clone, Copy, PartialEq)]
pub(super) struct Chosen {
    pub(super) token: u32,
    /// Entropy of the distribution at the temperature, in nats; none when greedy.
    pub(super) entropy: Option<f32>,
    /// The token's log-probability in it, in nats; none when greedy.
    pub(super) log_prob: Option<f32>,
}

/// Chooses the tokens of one completion.
#[derive(Debug, Clone)]
pub(super) struct Sampler {
    config: SamplingConfig,
    stream: StdRng,
}

impl Sampler {
    pub(super) fn new(config: SamplingConfig, seed: u64) -> Self {
        Self { config, stream: StdRng::seed_from_u64(seed) }
    }

    /// A token of finite `logits` (or minus infinity for one that is never chosen); `seen` stand in the prompt or before.
    pub(super) fn choose(&mut self, mut logits: Vec<f32>, seen: impl Iterator<Item = u32>) -> Result<Chosen> {
        let config = self.config;
        if config.repetition_penalty != 1.0 {
            penalize(&mut logits, seen, config.repetition_penalty as f32);
        }
        if config.temperature <= 0.0 {
            return Ok(Chosen { token: most_likely(&logits), entropy: None, log_prob: None });
        }
        let probabilities = softmax(&logits, config.temperature);
        let entropy = entropy(&logits, config.temperature, &probabilities);
        let probabilities = kept(probabilities, &config);
        let drawn = WeightedIndex::new(&probabilities)
            .map_err(|error| Error::NonFinite(format!("no token can be drawn: {error}")))?;
        let token = drawn.sample(&mut self.stream);
        // Filters leave what they keep as it was.
        let log_prob = probabilities[token].ln();
        Ok(Chosen { token: token as u32, entropy: Some(entropy), log_prob: Some(log_prob) })
    }
}

/// The first of the largest.
fn most_likely(logits: &[f32]) -> u32 {
    let mut best = 0;
    for (token, value) in logits.iter().enumerate() {
        if *value > logits[best] {
            best = token;
        }
    }
    best as u32
}

/// Makes the tokens `seen` less likely (more likely below 1): once each, however often they occur.
fn penalize(logits: &mut [f32], seen: impl Iterator<Item = u32>, penalty: f32) {
    let seen: BTreeSet<u32> = seen.collect();
    for id in seen {
        if let Some(value) = logits.get_mut(id as usize) {
            *value = if *value < 0.0 { *value * penalty } else { *value / penalty };
        }
    }
}

fn softmax(logits: &[f32], temperature: f64) -> Vec<f32> {
    let inverse = (1.0 / temperature) as f32;
    let largest = logits.iter().fold(f32::NEG_INFINITY, |largest, value| largest.max(value * inverse));
    let mut shares: Vec<f32> = logits.iter().map(|value| (value * inverse - largest).exp()).collect();
    let total: f32 = shares.iter().sum();
    for share in &mut shares {
        *share /= total;
    }
    shares
}

/// Entropy, in nats, of the softmax `probabilities` of `logits`: the logarithm of its sum less the mean exponent.
fn entropy(logits: &[f32], temperature: f64, probabilities: &[f32]) -> f32 {
    let inverse = 1.0 / temperature;
    let largest = f64::from(logits.iter().fold(f32::NEG_INFINITY, |a, b| a.max(*b)));
    let most = f64::from(probabilities.iter().fold(0f32, |a, b| a.max(*b)));
    let term = |(p, logit): (&f32, &f32)| {
        if *p > 0.0 { f64::from(*p) * (f64::from(*logit) - largest) * inverse } else { 0.0 }
    };
    (-most.ln() - probabilities.iter().zip(logits).map(term).sum::<f64>()) as f32
}

/// Probabilities with those of filtered tokens at zero, not normalised again: each filter looks at shares of what the
/// ones before it kept.
fn kept(mut probabilities: Vec<f32>, config: &SamplingConfig) -> Vec<f32> {
    let is_all = |share: f64| share >= 1.0;
    if config.top_k.is_some() || config.top_p.is_some_and(|p| !is_all(p)) {
        let mut order: Vec<usize> = (0..probabilities.len()).collect();
        order.sort_by(|&a, &b| probabilities[b].total_cmp(&probabilities[a]).then(a.cmp(&b)));
        order.truncate(config.top_k.unwrap_or(usize::MAX));
        if let Some(top_p) = config.top_p.filter(|&p| !is_all(p)) {
            let total: f64 = order.iter().map(|&token| f64::from(probabilities[token])).sum();
            let mut above = 0.0;
            let enough = order.iter().position(|&token| {
                above += f64::from(probabilities[token]);
                above >= top_p * total
            });
            order.truncate(enough.map_or(order.len(), |last| last + 1));
        }
        let mut filtered = vec![0.0; probabilities.len()];
        for token in order {
            filtered[token] = probabilities[token];
        }
        probabilities = filtered;
    }
    if let Some(min_p) = config.min_p {
        let largest = probabilities.iter().fold(0f32, |largest, &value| largest.max(value));
        let least = (f64::from(largest) * min_p) as f32;
        for value in &mut probabilities {
            if *value < least {
                *value = 0.0;
            }
        }
    }
    probabilities
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Logits whose softmax at temperature 1 is 0.4, 0.3, 0.2, 0.1, and one token that is never chosen.
    fn logits() -> Vec<f32> {
        let mut logits: Vec<f32> = [0.1f32, 0.4, 0.2, 0.3].map(f32::ln).to_vec();
        logits.push(f32::NEG_INFINITY);
        logits
    }

    fn survivors(config: SamplingConfig) -> Vec<usize> {
        let kept = kept(softmax(&logits(), config.temperature), &config);
        (0..kept.len()).filter(|&token| kept[token] > 0.0).collect()
    }

    #[test]
    fn a_penalty_counts_each_token_once_and_moves_it_away_from_being_chosen() {
        let mut logits = [2.0, -2.0, 3.0, f32::NEG_INFINITY, 0.0];
        penalize(&mut logits, [0, 1, 0, 3, 4, 99].into_iter(), 1.25);
        assert_eq!(logits, [1.6, -2.5, 3.0, f32::NEG_INFINITY, 0.0]);
        penalize(&mut logits, [2, 2, 2].into_iter(), 0.5);
        assert_eq!(logits[2], 6.0);
    }

    #[test]
    fn filters_keep_what_their_definitions_say() {
        let at = SamplingConfig::at(1.0);
        assert_eq!(survivors(at), [0, 1, 2, 3]);
        assert_eq!(survivors(SamplingConfig { top_k: Some(2), ..at }), [1, 3]);
        // 0.4 is not yet half; 0.4 + 0.3 is.
        assert_eq!(survivors(SamplingConfig { top_p: Some(0.5), ..at }), [1, 3]);
        assert_eq!(survivors(SamplingConfig { top_p: Some(0.39), ..at }), [1]);
        assert_eq!(survivors(SamplingConfig { top_p: Some(0.95), ..at }), [0, 1, 2, 3]);
        assert_eq!(survivors(SamplingConfig { top_p: Some(1.0), ..at }), [0, 1, 2, 3]);
        // Of 0.4 and 0.3 alone the first has 4/7.
        assert_eq!(survivors(SamplingConfig { top_k: Some(2), top_p: Some(0.55), ..at }), [1]);
        assert_eq!(survivors(SamplingConfig { min_p: Some(0.6), ..at }), [1, 3]);
        assert_eq!(survivors(SamplingConfig { min_p: Some(0.0), ..at }), [0, 1, 2, 3]);
        assert_eq!(survivors(SamplingConfig { min_p: Some(1.0), ..at }), [1]);
        // A low temperature makes the rest rare: squared shares, 0.16 to 0.09 is 0.5625.
        assert_eq!(survivors(SamplingConfig { min_p: Some(0.57), ..SamplingConfig::at(0.5) }), [1]);
    }

    #[test]
    fn a_log_probability_is_that_at_the_temperature_before_any_filter() {
        for (temperature, shares) in [(1.0, [0.1, 0.4, 0.2, 0.3]), (0.5, [0.01, 0.16, 0.04, 0.09])] {
            let total: f64 = shares.iter().sum();
            for top_k in [None, Some(2)] {
                let config = SamplingConfig { top_k, ..SamplingConfig::at(temperature) };
                for seed in 0..20 {
                    let chosen = Sampler::new(config, seed).choose(logits(), std::iter::empty()).unwrap();
                    let wanted = (shares[chosen.token as usize] / total).ln();
                    let found = f64::from(chosen.log_prob.unwrap());
                    assert!((found - wanted).abs() < 1e-6, "{config:?}: {found}, not {wanted}");
                }
            }
        }
        let greedy = Sampler::new(SamplingConfig::at(0.0), 1).choose(logits(), std::iter::empty()).unwrap();
        assert_eq!((greedy.entropy, greedy.log_prob), (None, None));
    }

    #[test]
    fn tokens_are_drawn_as_often_as_they_are_likely_and_a_seed_repeats_them() {
        let drawn = |config: SamplingConfig, seed: u64| {
            Sampler::new(config, seed).choose(logits(), std::iter::empty()).unwrap().token
        };
        let mut counts = [0u32; 5];
        for seed in 0..4000 {
            counts[drawn(SamplingConfig::at(1.0), seed) as usize] += 1;
        }
        for (count, share) in counts.iter().zip([0.1, 0.4, 0.2, 0.3, 0.0]) {
            // Four standard deviations.
            let wanted = 4000.0 * share;
            assert!(
                (f64::from(*count) - wanted).abs() <= 4.0 * (wanted * (1.0 - share)).sqrt(),
                "{counts:?}"
            );
        }
        let narrow = SamplingConfig { top_k: Some(2), ..SamplingConfig::at(1.0) };
        assert!((0..200).all(|seed| matches!(drawn(narrow, seed), 1 | 3)));
        assert!(
            (0..20).all(|seed| drawn(SamplingConfig::at(1.0), seed) == drawn(SamplingConfig::at(1.0), seed))
        );
        assert_eq!(drawn(SamplingConfig::default(), 3), 1);
        let penalised = SamplingConfig { repetition_penalty: 2.0, ..SamplingConfig::default() };
        let token = Sampler::new(penalised, 0).choose(vec![1.0, 3.0, 2.0], [1].into_iter()).unwrap();
        assert_eq!(token.token, 2);
        assert_eq!(token.entropy, None);
        let drawn = Sampler::new(SamplingConfig::at(1.0), 0).choose(logits(), std::iter::empty()).unwrap();
        let expected: f32 = [0.1f32, 0.4, 0.2, 0.3].iter().map(|p| -p * p.ln()).sum();
        assert!((drawn.entropy.unwrap() - expected).abs() < 1e-6, "{drawn:?}");
    }

    #[test]
    fn impossible_settings_are_refused() {
        let base = SamplingConfig::at(1.0);
        for wrong in [
            SamplingConfig { temperature: -1.0, ..base },
            SamplingConfig { temperature: f64::NAN, ..base },
            SamplingConfig { top_k: Some(0), ..base },
            SamplingConfig { top_p: Some(0.0), ..base },
            SamplingConfig { top_p: Some(1.5), ..base },
            SamplingConfig { min_p: Some(-0.1), ..base },
            SamplingConfig { repetition_penalty: 0.0, ..base },
            SamplingConfig { repetition_penalty: f64::INFINITY, ..base },
        ] {
            assert!(matches!(wrong.check(), Err(Error::Usage(_))), "{wrong:?}");
        }
        assert!(base.check().is_ok() && SamplingConfig::default().check().is_ok());
    }
}
