//! `[train.adversary]`: the attack inside adversarial training, and what does not go together in it.

use super::keys::{Range, section, words};
use super::{NormName, ObjectiveName, RecipeName, RunConfig};
use crate::error::ConfigError;

words! {
    /// How the adversary's budget grows from `epsilon_start_fraction` to all of `epsilon`.
    pub enum RampName = Linear {
        /// Not at all: the full budget from the first step on.
        Constant = "constant",
        /// In a straight line.
        Linear = "linear",
        /// Along half a cosine: slowly at both ends.
        Cosine = "cosine",
        /// In `ramp_stages` equal stairs, the first at the bottom; full behind the last.
        Steps = "steps",
    }
}

words! {
    /// What an adversary in training maximises.
    pub enum AdversaryObjective = Completion {
        /// Negative log-likelihood of the whole right completion, reasoning included.
        Completion = "completion",
        /// Negative log-likelihood of the answer letter alone, behind the data's reasoning.
        Answer = "answer",
        /// Negative log-likelihood of the right reasoning: the tokens that carry what is seen.
        Finding = "finding",
        /// Best wrong option minus the right one.
        Margin = "margin",
        /// Negative log of the right option's share among the options.
        CrossEntropy = "cross_entropy",
        /// The margin divided by best minus third option.
        Dlr = "dlr",
        /// A wrong option, drawn anew for each question of each step, minus the right one.
        Targeted = "targeted",
        /// Negative expected reward of the policy.
        ExpectedReward = "expected_reward",
    }
}

words! {
    /// How often the images of a step are attacked.
    pub enum RefreshName = Once {
        /// Once, before completions are sampled.
        Once = "once",
        /// Again before each further update.
        EachUpdate = "each_update",
    }
}

section! {
    /// `[train.adversary]`: the attack inside adversarial training. A gradient step costs a forward and a backward pass of the
    /// attacked questions; the loss before and after is a forward pass each. What does not say what it costs changes no cost.
    pub struct AdversaryConfig {
        /// The norm that bounds the change; both cost the same.
        norm: NormName = NormName::Linf,
        /// Full budget, in units of pixel values in [0, 1]. Absent: 8/255 for `linf`, 0.5 for `l2`, the customary one of 32 x 32
        /// pixels (Croce and Hein 2020) and a radius that smoothing with `sigma` 0.25 certifies; it is not scaled with the image:
        /// the same change of every value needs `epsilon` x sqrt(3 x height x width) in `l2` as `epsilon` in `linf`.
        epsilon: f64 = 8.0 / 255.0 => Range::at_least(0.0),
        /// Length of one step, in the units of `epsilon`; absent: 2.5 x the current budget / the current number of steps, and at
        /// most the budget. While the budget grows it is cut to twice the current one.
        step_size: Option<f64> = None => Range::at_least(0.0),
        /// Gradient steps of one start: each costs a forward and a backward pass of the attacked questions, and beside them two
        /// forward passes find the loss before and after.
        num_steps: usize = 3,
        /// Gradient steps at the bottom of the ramp (see `epsilon_start_fraction`), which grow to `num_steps` as the budget grows
        /// (rounded); absent: `num_steps` throughout. Fewer steps while the budget is small cost less and find nearly as much.
        num_steps_start: Option<usize> = None,
        /// Whether it begins at a random point of the ball, which costs no pass. The recipe `trades` always begins beside the
        /// image, as its paper does.
        random_start: bool = true,
        /// What is maximised; the recipe `trades` has an objective of its own. `completion`: the negative log-likelihood of the
        /// whole right completion; `finding`: that of its reasoning alone, the tokens that carry what is seen; `answer`: that of
        /// the letter alone, behind the data's reasoning (`safemed attack` puts it behind the model's own); `margin`: the best
        /// wrong option minus the right one; `cross_entropy`: the negative log of the right option's share among all; `dlr`: the
        /// margin divided by best minus third option; `targeted`: a wrong option, drawn anew each time, minus the right one;
        /// `expected_reward`: the negative expected reward of the policy. `answer` and `finding` cost what `completion` does.
        /// `margin`, `cross_entropy`, `dlr` and `targeted` score one completion for each option, behind one image and prompt: so
        /// many times the rows that `completion` has behind them. `expected_reward` (recipe `at_grpo`) samples
        /// `expected_reward_samples` completions of every attacked question at every gradient step, and for the loss before and
        /// after too: `num_steps` + 2 rollouts, which cost far more than the gradients.
        objective: AdversaryObjective = AdversaryObjective::Completion,
        /// Completions that `expected_reward` samples of one question for one gradient; where all are worth the same the gradient
        /// is that of `completion`, and `attack/fallback_share` says how often.
        expected_reward_samples: usize = 4 => Range::at_least(2.0),
        /// Attack the mean over Gaussian noise of this standard deviation instead (SmoothAdv, Salman et al. 2019): of
        /// `cross_entropy` the negative log of the right option's mean share, of all else the mean loss. `noise_sigma` then adds
        /// noise of its own draws to the attacked images that are trained on. Absent: no noise in the attack.
        smoothing_sigma: Option<f64> = None => Range::above(0.0),
        /// Draws of that noise, the same at each gradient step of one attack and new ones for the next; the attack costs so many
        /// times as much.
        eot_samples: usize = 4 => Range::at_least(1.0),
        /// Whether images are attacked `once` a step, or, of `at_grpo` with `num_updates` above 1, again before `each_update` but
        /// the first: with the current weights, from the present image, in the same ball, at the cost of one attack each. The
        /// policy's probabilities are then of the new image and the old ones stay those of the image sampled on: the ratio
        /// weighs the samples for the new policy on the new image, the rewards are of completions drawn on the old one, and a
        /// token that the new image alone moves beyond the clip is cut off as if the weights had moved it.
        refresh: RefreshName = RefreshName::Once,
        /// Share of questions left clean, which cost no attack. Absent: 0.25, of the recipe `trades` 0: it shows every question
        /// clean as well.
        clean_fraction: f64 = 0.25 => Range::closed(0.0, 1.0),
        /// How the budget grows; it changes no cost.
        epsilon_schedule: RampName = RampName::Linear,
        /// Share of `epsilon` at the bottom of the ramp. The schedule `steps` begins with it; of `linear` and `cosine` the first
        /// step is one step up the ramp already.
        epsilon_start_fraction: f64 = 0.25 => Range::closed(0.0, 1.0),
        /// Share of the steps over which the budget grows to `epsilon`. Where that is one step or less, `linear` and `cosine` have
        /// all of it from the first step on.
        ramp_fraction: f64 = 0.3 => Range::closed(0.0, 1.0),
        /// Stairs of the schedule `steps`.
        ramp_stages: usize = 4 => Range::at_least(1.0),
        /// Weight of the divergence in the recipe `trades` (`beta`, 1/lambda in Zhang et al. 2019): more trades clean accuracy
        /// for robustness.
        trades_beta: f64 = 6.0 => Range::at_least(0.0),
    }
}

/// What `epsilon` is for the norm, where it is not set.
const fn default_epsilon(norm: NormName) -> f64 {
    match norm {
        NormName::Linf => 8.0 / 255.0,
        NormName::L2 => 0.5,
    }
}

/// Whole 8-bit levels that are taken for a slip as a length of L2; larger ones may be meant.
const LEVELS: f64 = 16.0;

impl AdversaryObjective {
    /// The same of a measured attack; none of what is no likelihood.
    pub const fn of_likelihood(self) -> Option<ObjectiveName> {
        Some(match self {
            Self::Completion => ObjectiveName::Completion,
            Self::Answer => ObjectiveName::Answer,
            Self::Finding => ObjectiveName::Finding,
            Self::Margin => ObjectiveName::Margin,
            Self::CrossEntropy => ObjectiveName::CrossEntropy,
            Self::Dlr => ObjectiveName::Dlr,
            Self::Targeted => ObjectiveName::Targeted,
            Self::ExpectedReward => return None,
        })
    }
}

impl AdversaryConfig {
    /// Gives settings that were left out the values that depend on others.
    pub(super) fn resolve(&mut self, recipe: RecipeName, is_set: &dyn Fn(&str) -> bool) {
        if !is_set("epsilon") {
            self.epsilon = default_epsilon(self.norm);
        }
        if !is_set("clean_fraction") && recipe == RecipeName::Trades {
            self.clean_fraction = 0.0;
        }
    }

    /// How far up the ramp step `step` (from 0) of `num_steps` is: 0 at its bottom, where `steps` begins, 1 from its end on. Of
    /// the other schedules the first step is one up already, so that the last step of the ramp is at its end.
    fn share_at(&self, step: u64, num_steps: usize) -> f64 {
        let ramp = (self.ramp_fraction * num_steps as f64).max(1.0);
        let share = ((step + 1) as f64 / ramp).min(1.0);
        match self.epsilon_schedule {
            RampName::Constant => 1.0,
            RampName::Linear => share,
            RampName::Cosine => 0.5 * (1.0 - (std::f64::consts::PI * share).cos()),
            RampName::Steps => {
                let stages = self.ramp_stages as f64;
                // A hair more than the quotient, which may fall short of a whole number by its rounding.
                ((stages * step as f64 / ramp + 1e-9).floor() / stages).min(1.0)
            }
        }
    }

    /// The budget at step `step` (from 0) of `num_steps`.
    pub fn epsilon_at(&self, step: u64, num_steps: usize) -> f64 {
        if self.epsilon_schedule == RampName::Constant {
            return self.epsilon;
        }
        let start = self.epsilon_start_fraction;
        self.epsilon * (start + (1.0 - start) * self.share_at(step, num_steps))
    }

    /// Gradient steps at step `step` (from 0) of `num_steps`.
    pub fn num_steps_at(&self, step: u64, num_steps: usize) -> usize {
        let Some(start) = self.num_steps_start else { return self.num_steps };
        let more = self.num_steps as f64 - start as f64;
        (start as f64 + more * self.share_at(step, num_steps)).round() as usize
    }

    /// The length of a step within a budget of `epsilon`; none: the attack's own default.
    pub fn step_size_within(&self, epsilon: f64) -> Option<f64> {
        self.step_size.map(|length| length.min(2.0 * epsilon)).filter(|length| *length > 0.0)
    }
}

impl RunConfig {
    /// What does not go together in an adversary.
    pub(super) fn adversary_problems(&self, problems: &mut Vec<ConfigError>) {
        let (train, own) = (&self.train, &self.train.adversary);
        if !train.recipe.is_adversarial() {
            return;
        }
        let mut refuse = |key: &str, message: String, help: &str| {
            problems.push(ConfigError::new(format!("train.adversary.{key}"), message).with_help(help));
        };
        let levels = 255.0 * own.epsilon;
        if own.norm == NormName::L2
            && (levels - levels.round()).abs() < 1e-6
            && (1.0..=LEVELS).contains(&levels.round())
        {
            let message =
                format!("`epsilon` {}/255 is a budget of `linf`, next to nothing in `l2`", levels.round());
            refuse(
                "epsilon",
                message,
                "an L2 budget is the length of the whole change: leave `epsilon` out for 0.5, or multiply by sqrt(3 x height x width)",
            );
        }
        if own.step_size == Some(0.0) && own.epsilon > 0.0 {
            refuse("step_size", "`step_size` 0 goes nowhere".to_owned(), "leave it out for the default");
        }
        if let Some(start) = own.num_steps_start {
            if start > own.num_steps {
                let message = format!("`num_steps_start` {start} exceeds `num_steps` {}", own.num_steps);
                refuse("num_steps_start", message, "steps grow in number: lower it");
            } else if own.epsilon_schedule == RampName::Constant {
                let message = "`num_steps_start` has no effect with `epsilon_schedule` `constant`".to_owned();
                refuse(
                    "num_steps_start",
                    message,
                    "steps grow in number as the budget does: take another schedule, with `epsilon_start_fraction` 1 if the budget shall stay",
                );
            }
        }
        let objective = own.objective;
        if train.recipe == RecipeName::Trades && objective != AdversaryObjective::default() {
            let message = format!("`objective` `{objective}` has no effect with recipe `trades`");
            refuse(
                "objective",
                message,
                "its adversary maximises the divergence that is trained down: leave `objective` out",
            );
        } else if objective == AdversaryObjective::ExpectedReward && !train.recipe.is_grpo() {
            let message = format!("recipe `{}` rewards nothing: it has no `expected_reward`", train.recipe);
            refuse("objective", message, "use `completion`, or recipe `at_grpo`");
        }
        if train.recipe == RecipeName::Trades && !own.random_start {
            let message = "on the clean image itself the divergence of `trades` has no gradient".to_owned();
            refuse("random_start", message, "leave `random_start` out");
        }
        if own.smoothing_sigma.is_some() && train.noise_sigma == 0.0 {
            let message =
                "`smoothing_sigma` attacks a smoothed model, and the images of training have no noise"
                    .to_owned();
            refuse("smoothing_sigma", message, "set `train.noise_sigma` too, to the same");
        }
    }
}

#[cfg(test)]
mod tests {
    use super::super::{Command, Override};
    use super::*;
    use crate::error::{Error, Result};

    fn loaded(settings: &[(&str, &str)]) -> Result<RunConfig> {
        let settings: Vec<Override> = settings
            .iter()
            .map(|(key, value)| {
                let key = key
                    .strip_prefix('.')
                    .map_or(format!("train.{key}"), |key| format!("train.adversary.{key}"));
                Override::new(key, *value, "--set")
            })
            .collect();
        RunConfig::load(Command::Train, None, &settings)
    }

    fn adversary(settings: &[(&str, &str)]) -> AdversaryConfig {
        loaded(settings).unwrap().train.adversary
    }

    #[test]
    fn budgets_follow_their_schedules() {
        let budgets = |schedule: &str| -> Vec<f64> {
            let own = adversary(&[
                ("recipe", "at_sft"),
                (".epsilon", "0.8"),
                (".epsilon_start_fraction", "0.25"),
                (".ramp_fraction", "0.4"),
                (".epsilon_schedule", schedule),
            ]);
            // A ramp of 8 of 20 steps.
            (0..20).map(|step| own.epsilon_at(step, 20)).collect()
        };
        let expected = |share: &dyn Fn(f64) -> f64| -> Vec<f64> {
            (0..20).map(|step| 0.2 + 0.6 * if step < 8 { share(f64::from(step)) } else { 1.0 }).collect()
        };
        for (schedule, wanted) in [
            ("constant", vec![0.8; 20]),
            ("linear", expected(&|t| (t + 1.0) / 8.0)),
            ("cosine", expected(&|t| (0.5 * std::f64::consts::PI * (t + 1.0) / 8.0).sin().powi(2))),
            ("steps", expected(&|t| (t / 2.0).floor() / 4.0)),
        ] {
            let found = budgets(schedule);
            for (step, (found, wanted)) in found.iter().zip(&wanted).enumerate() {
                assert!((found - wanted).abs() < 1e-12, "{schedule} step {step}: {found} {wanted}");
            }
            assert!(found.windows(2).all(|pair| pair[0] <= pair[1]), "{schedule}");
        }
    }

    #[test]
    fn steps_grow_in_number_with_the_budget_and_no_step_is_wider_than_the_ball() {
        let settings = [("recipe", "at_sft"), (".num_steps", "10"), (".ramp_fraction", "0.5")];
        let plain = adversary(&settings);
        assert!((0..20).all(|step| plain.num_steps_at(step, 20) == 10));
        let own = adversary(&[&settings[..], &[(".num_steps_start", "2"), (".step_size", "8/255")]].concat());
        let found: Vec<usize> = (0..12).map(|step| own.num_steps_at(step, 20)).collect();
        // 2 + 8 x (step + 1) / 10, rounded.
        assert_eq!(found, [3, 4, 4, 5, 6, 7, 8, 8, 9, 10, 10, 10]);
        assert_eq!(own.step_size_within(1.0 / 255.0), Some(2.0 / 255.0));
        assert_eq!(own.step_size_within(0.5), Some(8.0 / 255.0));
        assert_eq!(own.step_size_within(0.0), None);
        assert_eq!(plain.step_size_within(0.5), None);
    }

    #[test]
    fn defaults_depend_on_norm_and_recipe_unless_they_are_set() {
        let of = |settings: &[(&str, &str)]| {
            let own = adversary(settings);
            (own.epsilon, own.clean_fraction)
        };
        assert_eq!(of(&[("recipe", "at_sft")]), (8.0 / 255.0, 0.25));
        assert_eq!(of(&[("recipe", "at_sft"), (".norm", "l2")]), (0.5, 0.25));
        assert_eq!(of(&[("recipe", "trades"), (".norm", "l2"), (".epsilon", "0.03")]), (0.03, 0.0));
        assert_eq!(of(&[("recipe", "trades"), (".clean_fraction", "0.25")]), (8.0 / 255.0, 0.25));
        let trades = loaded(&[("recipe", "trades"), (".norm", "l2")]).unwrap();
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("config.toml");
        std::fs::write(&path, trades.to_toml(Command::Train).unwrap()).unwrap();
        assert_eq!(RunConfig::load(Command::Train, Some(&path), &[]).unwrap().train, trades.train);
    }

    #[test]
    fn what_does_not_go_together_is_refused_with_a_remedy() {
        for (settings, key, message, help) in [
            (
                &[("recipe", "at_sft"), (".norm", "l2"), (".epsilon", "8/255")][..],
                "epsilon",
                "8/255 is a budget of `linf`",
                "0.5",
            ),
            (&[("recipe", "at_sft"), (".step_size", "0")], "step_size", "goes nowhere", "leave it out"),
            (
                &[("recipe", "at_sft"), (".num_steps_start", "4")],
                "num_steps_start",
                "exceeds `num_steps` 3",
                "lower",
            ),
            (
                &[("recipe", "at_sft"), (".num_steps_start", "1"), (".epsilon_schedule", "constant")],
                "num_steps_start",
                "no effect",
                "another schedule",
            ),
            (
                &[("recipe", "trades"), (".objective", "answer")],
                "objective",
                "no effect",
                "leave `objective` out",
            ),
            (
                &[("recipe", "at_sft"), (".objective", "expected_reward")],
                "objective",
                "rewards nothing",
                "at_grpo",
            ),
            (&[("recipe", "trades"), (".random_start", "false")], "random_start", "no gradient", "leave"),
            (
                &[("recipe", "at_grpo"), (".smoothing_sigma", "0.1")],
                "smoothing_sigma",
                "no noise",
                "noise_sigma",
            ),
            (
                &[("recipe", "at_grpo"), (".objective", "all")],
                "objective",
                "unknown word `all`",
                "completion",
            ),
        ] {
            let Err(Error::Config(problems)) = loaded(settings) else { panic!("{settings:?} is taken") };
            let problem = &problems[0];
            assert_eq!(problem.key, format!("train.adversary.{key}"), "{settings:?}");
            assert!(problem.message.contains(message), "{settings:?}: {}", problem.message);
            assert!(problem.help.as_deref().unwrap_or_default().contains(help), "{settings:?}: {problem}");
        }
        // None of it matters where nothing is attacked.
        loaded(&[("recipe", "sft"), (".norm", "l2"), (".epsilon", "8/255")]).unwrap();
        loaded(&[("recipe", "at_grpo"), (".smoothing_sigma", "0.1"), ("noise_sigma", "0.1")]).unwrap();
        loaded(&[("recipe", "at_grpo"), (".objective", "expected_reward")]).unwrap();
    }
}
