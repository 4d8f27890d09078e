//! The model as a policy whose expected reward is attacked: completions are sampled on the image, rewarded, and those worth
//! more than their group are made less likely.
//!
//! The gradient of an expectation over samples is the score function's (REINFORCE, Williams 1992):
//! `d E[R] = E[(R - b) d log p(o | pixels)]` with the group's mean reward as `b`. It holds for samples of the image it is taken
//! at, so completions are drawn anew at each step; kept from the first image they would go on lowering the likelihood of
//! what the model no longer says.

use super::policy::{self, Scoring};
use super::target::{PixelPass, Target};
use crate::attack::Objective;
use crate::error::Result;
use crate::model::generate::{Completion, Prompt};
use crate::model::sampling::Decoding;
use crate::rng;
use candle_core::Tensor;
use rand::RngCore;
use std::cell::{Cell, RefCell};

/// What completions about an item are worth.
pub type Rewards<'a> = &'a dyn Fn(usize, &[Completion]) -> Result<Vec<f64>>;

/// A batch of items whose expected reward an attack lowers. The loss of an item is the negative mean reward of a sample.
pub struct RewardTarget<'a> {
    /// The items at the likelihood of their right completions: climbed instead where the rewards of a sample are all equal,
    /// which say nothing about the direction.
    pub likelihood: Target<'a>,
    /// What completions are worth.
    pub rewards: Rewards<'a>,
    /// How completions are drawn; log-probabilities are those of the tempered distribution.
    pub decoding: Decoding,
    /// Completions of one item on one image, at least 2.
    pub samples: usize,
    /// Names the random numbers.
    pub seed: u64,
    /// Names those of each item.
    pub keys: Vec<u64>,
    /// Whether equal rewards are taken as they are, without a gradient: for a measurement of what a sample costs.
    pub keeps_flat: bool,
    /// How it went so far.
    pub tally: Tally,
}

/// Counts over the gradients of an attack.
#[derive(Debug, Default)]
pub struct Tally {
    /// Gradients asked for of each item.
    rounds: RefCell<Vec<u64>>,
    /// Samples drawn for gradients, and how many of them were worth the same throughout.
    counts: Cell<[usize; 2]>,
}

impl Tally {
    /// Samples drawn for gradients, and how many of them were worth the same throughout.
    pub fn counts(&self) -> [usize; 2] {
        self.counts.get()
    }

    /// The number of this gradient of `item`, from 0.
    fn next_round(&self, item: usize) -> u64 {
        let mut rounds = self.rounds.borrow_mut();
        if rounds.len() <= item {
            rounds.resize(item + 1, 0);
        }
        rounds[item] += 1;
        rounds[item] - 1
    }
}

impl std::fmt::Debug for RewardTarget<'_> {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("RewardTarget").field("samples", &self.samples).finish_non_exhaustive()
    }
}

/// What an item's completions are worth, less their mean.
pub fn advantages(rewards: &[f64]) -> Vec<f64> {
    let mean = rewards.iter().sum::<f64>() / rewards.len().max(1) as f64;
    rewards.iter().map(|reward| reward - mean).collect()
}

/// Whether a sample says nothing about where its reward falls.
fn is_flat(rewards: &[f64]) -> bool {
    rewards.iter().all(|reward| *reward == rewards[0])
}

impl RewardTarget<'_> {
    /// Completions of each item on its image, drawn from the streams named by `purpose`, the item and its round.
    ///
    /// # Errors
    /// When a logit is not a number.
    pub fn sampled(
        &self,
        pixels: &Tensor,
        items: &[usize],
        purpose: &str,
        rounds: &[u64],
    ) -> Result<Vec<Vec<Completion>>> {
        let assistant = self.likelihood.assistant;
        let features = policy::encode(assistant, &[pixels.detach()])?;
        let prompts = self.prompts(items);
        let seeds: Vec<Vec<u64>> = items
            .iter()
            .zip(rounds)
            .map(|(&item, &round)| {
                let seed = |k| rng::stream(self.seed, purpose, &[self.keys[item], round, k]).next_u64();
                (0..self.samples as u64).map(seed).collect()
            })
            .collect();
        policy::sample(assistant, &prompts, Some(&features), &seeds, &self.decoding)
    }

    fn prompts(&self, items: &[usize]) -> Vec<Prompt> {
        items.iter().map(|&item| self.likelihood.aims[item].prompt.clone()).collect()
    }

    fn rewards_of(&self, items: &[usize], sampled: &[Vec<Completion>]) -> Result<Vec<Vec<f64>>> {
        items.iter().zip(sampled).map(|(&item, completions)| (self.rewards)(item, completions)).collect()
    }

    /// The gradient by `pixels` of `-sum_k A_k log p(o_k | pixels) / K`, summed over items; `weights` are the `A_k`.
    ///
    /// # Errors
    /// When no gradient reaches the pixels.
    pub fn score_gradient(
        &self,
        pixels: &Tensor,
        items: &[usize],
        sampled: &[Vec<Completion>],
        weights: &[Vec<f64>],
    ) -> Result<Tensor> {
        let assistant = self.likelihood.assistant;
        let ids: Vec<Vec<Vec<u32>>> =
            sampled.iter().map(|own| own.iter().map(|completion| completion.ids.clone()).collect()).collect();
        let scoring = Scoring::new(assistant, &self.prompts(items), &ids)?;
        let mut slopes = vec![0f32; scoring.num_targets()];
        for (spans, weights) in scoring.spans.iter().zip(weights) {
            for (span, weight) in spans.iter().zip(weights) {
                slopes[span.clone()].fill((-weight / weights.len() as f64) as f32);
            }
        }
        let pass = PixelPass {
            assistant,
            scoring: &scoring,
            count: items.len(),
            model_size: self.likelihood.aims[items[0]].model_size,
            memory: self.likelihood.memory,
        };
        pass.gradient(pixels, &|pixels| Ok(pixels.clone()), &|hidden| {
            let log_probs = scoring.log_probs(assistant, hidden, self.decoding.sampling.temperature)?;
            let slopes = Tensor::from_slice(&slopes, log_probs.dims1()?, log_probs.device())?;
            (log_probs * slopes)?.sum_all()
        })
    }
}

fn mean_loss(rewards: &[f64]) -> f32 {
    (-rewards.iter().sum::<f64>() / rewards.len().max(1) as f64) as f32
}

impl Objective for RewardTarget<'_> {
    fn loss_and_gradient(&self, pixels: &Tensor, items: &[usize]) -> Result<(Vec<f32>, Tensor)> {
        let rounds: Vec<u64> = items.iter().map(|&item| self.tally.next_round(item)).collect();
        let sampled = self.sampled(pixels, items, "expected_reward", &rounds)?;
        let rewards = self.rewards_of(items, &sampled)?;
        let (flat, useful): (Vec<usize>, Vec<usize>) =
            (0..items.len()).partition(|&row| !self.keeps_flat && is_flat(&rewards[row]));
        let [all, flat_before] = self.tally.counts.get();
        self.tally.counts.set([all + items.len(), flat_before + flat.len()]);
        let part = |rows: &[usize]| -> Result<(Tensor, Vec<usize>)> {
            let index: Vec<u32> = rows.iter().map(|&row| row as u32).collect();
            let index = Tensor::from_vec(index, rows.len(), pixels.device())?;
            Ok((pixels.index_select(&index, 0)?, rows.iter().map(|&row| items[row]).collect()))
        };
        let mut gradients: Vec<Option<Tensor>> = vec![None; items.len()];
        if !useful.is_empty() {
            let (pixels, own) = part(&useful)?;
            let sampled: Vec<Vec<Completion>> = useful.iter().map(|&row| sampled[row].clone()).collect();
            let weights: Vec<Vec<f64>> = useful.iter().map(|&row| advantages(&rewards[row])).collect();
            let gradient = self.score_gradient(&pixels, &own, &sampled, &weights)?;
            for (place, &row) in useful.iter().enumerate() {
                gradients[row] = Some(gradient.narrow(0, place, 1)?);
            }
        }
        if !flat.is_empty() {
            let (pixels, own) = part(&flat)?;
            let (_, gradient) = self.likelihood.loss_and_gradient(&pixels, &own)?;
            for (place, &row) in flat.iter().enumerate() {
                gradients[row] = Some(gradient.narrow(0, place, 1)?);
            }
        }
        let gradients: Vec<Tensor> = gradients.into_iter().flatten().collect();
        Ok((rewards.iter().map(|own| mean_loss(own)).collect(), Tensor::cat(&gradients, 0)?))
    }

    /// From the same random numbers whatever the pixels, so that two losses differ by what the pixels do to the sample.
    fn loss(&self, pixels: &Tensor, items: &[usize]) -> Result<Vec<f32>> {
        let sampled = self.sampled(pixels, items, "expected_reward_loss", &vec![0; items.len()])?;
        Ok(self.rewards_of(items, &sampled)?.iter().map(|own| mean_loss(own)).collect())
    }

    fn is_broken(&self, pixels: &Tensor, items: &[usize]) -> Result<Vec<bool>> {
        self.likelihood.is_broken(pixels, items)
    }
}
