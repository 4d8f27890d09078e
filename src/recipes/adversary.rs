//! The adversary in training: what it does to the images of a step, by the settings of `[train.adversary]`.

use super::aims::{self, Asked};
use super::config::{AdversaryObjective, ObjectiveName, RecipeName};
use super::grpo::{Sampling, rewards_of};
use super::items;
use super::lesson::{Lesson, Questions, norm_of};
use crate::attack::{self, Adversarial, Checked, Fraction, NoiseBank, Objective, PgdOutput, Problem, pgd};
use crate::error::Result;
use crate::model::assistant::Assistant;
use crate::model::generate::Completion;
use crate::model::sampling::SamplingConfig;
use crate::rng;
use crate::roles::divergence::DivergenceTarget;
use crate::roles::expected_reward::{RewardTarget, Tally};
use crate::roles::noisy::{self, Noisy};
use crate::roles::target::{Aim, Target};
use candle_core::Tensor;
use rand::Rng;
use serde_json::{Map, Value, json};
use std::ops::Range;

/// Standard deviation of the noise that the adversary of TRADES begins with (Zhang et al. 2019, their code).
const BESIDE: f64 = 1e-3;

/// The adversary of one step.
#[derive(Debug, Clone, Copy)]
pub struct Adversary<'a> {
    /// The run.
    pub lesson: &'a Lesson<'a>,
    /// The step's questions.
    pub questions: &'a Questions,
    /// The step, from 0.
    pub step: u64,
    /// How completions are sampled; none in a recipe that samples none.
    pub sampling: Option<&'a Sampling<'a>>,
}

/// What the adversary did to a batch.
#[derive(Debug)]
pub struct Attacked {
    /// All pixels of the batch, attacked ones first, in the batch's order.
    pub pixels: Vec<Tensor>,
    /// Budget.
    pub epsilon: f64,
    /// Gradient steps.
    pub num_steps: usize,
    /// Mean loss before and after, over the attacked questions; none when none was.
    pub losses: Option<(f64, f64)>,
    /// Of the gradients of an expected reward the share taken of the likelihood instead.
    pub fallback_share: Option<f64>,
}

impl Attacked {
    /// Writes down budget and losses. The number of steps is written where it changes from step to step.
    pub fn describe(&self, lesson: &Lesson<'_>, metrics: &mut Map<String, Value>) {
        metrics.insert("epsilon".into(), json!(self.epsilon));
        if let Some((clean, adversarial)) = self.losses {
            metrics.insert("loss_clean".into(), json!(clean));
            metrics.insert("loss_adversarial".into(), json!(adversarial));
            metrics.insert("pgd_gain".into(), json!(adversarial - clean));
        }
        if lesson.config.adversary.num_steps_start.is_some() {
            metrics.insert("attack/num_steps".into(), json!(self.num_steps));
        }
        if let Some(share) = self.fallback_share {
            metrics.insert("attack/fallback_share".into(), json!(share));
        }
    }
}

/// Images attacked together.
struct Pass<'a> {
    assistant: &'a Assistant,
    /// Their places in the batch.
    places: Range<usize>,
    /// Name their random numbers.
    keys: Vec<u64>,
    clean: Tensor,
    /// Where the attack begins, if it is told.
    start: Option<Tensor>,
}

impl Adversary<'_> {
    /// Attacks the first questions of the batch at the model's resolution with the weights of `assistant`.
    ///
    /// # Errors
    /// When a gradient is not a number.
    pub fn attack(&self, assistant: &Assistant) -> Result<Attacked> {
        self.attack_from(assistant, 0, None)
    }

    /// Attacks them once more before update `update` (from 0) of the step, from what an earlier attack made of them and in the
    /// same ball around the clean images.
    ///
    /// # Errors
    /// As [`Adversary::attack`].
    pub fn attack_again(&self, assistant: &Assistant, update: usize, before: &Attacked) -> Result<Attacked> {
        self.attack_from(assistant, update, Some(before))
    }

    fn attack_from(
        &self,
        assistant: &Assistant,
        update: usize,
        before: Option<&Attacked>,
    ) -> Result<Attacked> {
        let (lesson, questions) = (self.lesson, self.questions);
        let num_steps = lesson.config.adversary.num_steps_at(self.step, lesson.config.num_steps);
        let epsilon = lesson.epsilon_at(self.step);
        lesson.evidence.note(|noted| (noted.phase, noted.epsilon) = ("attack", Some(epsilon)));
        let attacked = lesson.num_attacked(self.step, questions.samples.len());
        let mut pixels = Vec::new();
        let (mut losses, mut counts) = ([Vec::new(), Vec::new()], [0, 0]);
        for (number, places) in self.passes(attacked).into_iter().enumerate() {
            let clean = items::stack(assistant, &questions.images[places.clone()])?.remove(0);
            let keys: Vec<u64> =
                places.clone().map(|i| (update as u64) << 52 | self.step << 20 | i as u64).collect();
            let start = match before {
                Some(before) => Some(before.pixels[number].clone()),
                None if lesson.config.recipe == RecipeName::Trades => {
                    let bank =
                        NoiseBank { purpose: "trades_start", sigma: BESIDE, draws: 1, seed: lesson.seed };
                    Some(noisy::with_draw(&bank, &keys, 0, &clean)?)
                }
                None => None,
            };
            let pass = Pass { assistant, places, keys, clean, start };
            let (adversarial, tally) = self.run(&pass, epsilon, num_steps)?;
            losses[0].extend(adversarial.loss_clean);
            losses[1].extend(adversarial.loss);
            counts = [counts[0] + tally[0], counts[1] + tally[1]];
            pixels.push(adversarial.pixels);
        }
        pixels.extend(items::stack(assistant, &questions.images[attacked..])?);
        let mean = |values: &[f32]| values.iter().map(|v| f64::from(*v)).sum::<f64>() / values.len() as f64;
        let [clean, adversarial] = losses;
        let losses = (!clean.is_empty()).then(|| (mean(&clean), mean(&adversarial)));
        let fallback_share = (counts[0] > 0).then(|| counts[1] as f64 / counts[0] as f64);
        Ok(Attacked { pixels, epsilon, num_steps, losses, fallback_share })
    }

    /// The places attacked together: neighbours of one size, as many as one pass may hold.
    fn passes(&self, attacked: usize) -> Vec<Range<usize>> {
        let images = &self.questions.images;
        let size = |i: usize| (images[i].resized.height, images[i].resized.width);
        let (mut passes, mut start) = (Vec::new(), 0);
        while start < attacked {
            let is_next = |i: &usize| size(*i) != size(start) || i - start == self.lesson.micro_batch_size();
            let end = (start..attacked).find(is_next).unwrap_or(attacked);
            passes.push(start..end);
            start = end;
        }
        passes
    }

    /// The attack on one pass, and what it counted (see [`Tally`]).
    fn run(&self, pass: &Pass<'_>, epsilon: f64, num_steps: usize) -> Result<(Adversarial, [usize; 2])> {
        let (lesson, settings) = (self.lesson, &self.lesson.config.adversary);
        let config = attack::AttackConfig {
            norm: norm_of(settings.norm),
            epsilon: Fraction(epsilon),
            step_size: settings.step_size_within(epsilon).map(Fraction),
            num_steps,
            random_start: settings.random_start,
            early_stop: false,
            output: PgdOutput::Last,
            seed: lesson.seed,
            ..attack::AttackConfig::default()
        };
        let indices: Vec<usize> = (0..pass.keys.len()).collect();
        let problem = Problem {
            clean: &pass.clean,
            items: &indices,
            keys: &pass.keys,
            start: pass.start.as_ref(),
            judge_8bit: false,
        };
        let bank = settings.smoothing_sigma.map(|sigma| NoiseBank {
            purpose: "train_eot",
            sigma,
            draws: settings.eot_samples,
            seed: lesson.seed,
        });
        let ascend = |objective: &dyn Objective| {
            let objective = Checked { objective, check: &|| lesson.exit.check() };
            pgd(&objective, &problem, &config, &mut |_| Ok(()))
        };
        let ascend_mean = |objective: &dyn Objective| match &bank {
            Some(bank) => ascend(&Noisy { of_draw: &|_| objective, bank, keys: &pass.keys }),
            None => ascend(objective),
        };
        if lesson.config.recipe == RecipeName::Trades {
            return Ok((self.diverge(pass, bank.as_ref(), &ascend)?, [0, 0]));
        }
        let target = self.target(pass)?;
        match settings.objective {
            AdversaryObjective::ExpectedReward => self.lower_reward(pass, target, &ascend_mean),
            AdversaryObjective::CrossEntropy => {
                Ok((ascend(&Target { noise: bank.clone(), ..target })?, [0, 0]))
            }
            _ => Ok((ascend_mean(&target)?, [0, 0])),
        }
    }

    /// What each question of a pass is attacked on.
    fn target<'b>(&self, pass: &Pass<'b>) -> Result<Target<'b>> {
        let aims = pass.places.clone().zip(&pass.keys);
        Ok(Target {
            assistant: pass.assistant,
            aims: aims.map(|(i, &key)| self.aim(pass.assistant, i, key)).collect::<Result<_>>()?,
            answers: &|_, _| Err(anyhow::anyhow!("training never asks whether an attack succeeded").into()),
            noise: None,
            draws_at_once: self.lesson.micro_batch_size(),
            memory: self.lesson.config.memory(),
        })
    }

    fn aim(&self, assistant: &Assistant, i: usize, key: u64) -> Result<Aim> {
        let (lesson, questions) = (self.lesson, self.questions);
        let (sample, image) = (&questions.samples[i], &questions.images[i]);
        let objective = lesson.config.adversary.objective;
        let asked = Asked {
            template: lesson.template,
            is_cot: lesson.is_cot(),
            objective: objective.of_likelihood().unwrap_or(ObjectiveName::Completion),
            target: wrong_option(lesson.seed, self.step, i, sample.options.len()),
            own: None,
        };
        let size = [image.resized.height, image.resized.width];
        Ok(Aim { key, ..aims::aim(assistant, sample, asked, questions.prompts[i].clone(), size)? })
    }

    /// Climbs the divergence from what the model says about the clean image, under noise about the clean one with the same
    /// noise.
    fn diverge(
        &self,
        pass: &Pass<'_>,
        bank: Option<&NoiseBank>,
        ascend: &dyn Fn(&dyn Objective) -> Result<Adversarial>,
    ) -> Result<Adversarial> {
        let (prompts, targets) = (&self.questions.prompts, &self.questions.targets);
        let places = pass.places.clone();
        let seen_from = |clean: &Tensor| {
            let (prompts, targets) = (&prompts[places.clone()], &targets[places.clone()]);
            DivergenceTarget::new(pass.assistant, prompts, targets, clean, self.lesson.config.memory())
        };
        let Some(bank) = bank else { return ascend(&seen_from(&pass.clean)?) };
        let of_draws: Vec<DivergenceTarget<'_>> = (0..bank.draws)
            .map(|draw| seen_from(&noisy::with_draw(bank, &pass.keys, draw, &pass.clean)?))
            .collect::<Result<_>>()?;
        ascend(&Noisy { of_draw: &|draw| &of_draws[draw], bank, keys: &pass.keys })
    }

    /// Lowers the expected reward of completions sampled as for the update.
    fn lower_reward(
        &self,
        pass: &Pass<'_>,
        likelihood: Target<'_>,
        ascend: &dyn Fn(&dyn Objective) -> Result<Adversarial>,
    ) -> Result<(Adversarial, [usize; 2])> {
        let (lesson, settings) = (self.lesson, self.lesson.config);
        let sampling = self
            .sampling
            .ok_or_else(|| anyhow::anyhow!("an expected reward of a recipe that samples no completions"))?;
        let temperature = SamplingConfig::at(settings.grpo.temperature);
        let mut decoding = pass.assistant.decoding(sampling.max_new_tokens, temperature);
        if sampling.assumed.longest {
            decoding.stop_ids.clear();
        }
        let rewards = |item: usize, completions: &[Completion]| {
            let sample = &self.questions.samples[pass.places.start + item];
            rewards_of(sampling, lesson, pass.assistant, self.step, sample, completions)
        };
        let target = RewardTarget {
            likelihood,
            rewards: &rewards,
            decoding,
            samples: settings.adversary.expected_reward_samples,
            seed: lesson.seed,
            keys: pass.keys.clone(),
            keeps_flat: sampling.assumed.all_groups,
            tally: Tally::default(),
        };
        let adversarial = ascend(&target)?;
        Ok((adversarial, target.tally.counts()))
    }
}

/// The wrong option, from 1, that a targeted attack on the question at `place` aims at: another one each time.
fn wrong_option(seed: u64, step: u64, place: usize, num_options: usize) -> usize {
    let mut drawn = rng::stream(seed, "train_target", &[step, place as u64]);
    drawn.random_range(1..num_options.max(2))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_wrong_option_is_aimed_at_and_the_same_one_again_in_the_same_step() {
        for num_options in 1..=5 {
            let drawn: Vec<usize> = (0..400).map(|step| wrong_option(3, step, 7, num_options)).collect();
            for option in 1..num_options.max(2) {
                let share = drawn.iter().filter(|&&other| other == option).count() as f64 / 400.0;
                let fair = 1.0 / (num_options.max(2) - 1) as f64;
                assert!((share - fair).abs() < 0.1, "{num_options} options: {option} is {share}");
            }
            assert!(drawn.iter().all(|option| (1..num_options.max(2)).contains(option)));
            assert_eq!(wrong_option(3, 5, 7, num_options), drawn[5]);
        }
        let places: Vec<usize> = (0..50).map(|place| wrong_option(3, 0, place, 5)).collect();
        assert!(places.iter().any(|option| *option != places[0]));
    }
}
