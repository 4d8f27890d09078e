//! Settings that change nothing beside the others: said, not refused, so that one file can serve several methods.

use super::{
    AdversaryConfig, AdversaryObjective, AttackConfig, CertifyConfig, CertifyMode, Command, GrpoSettings,
    Method, PromptTemplate, RampName, RecipeName, RefreshName, RunConfig, TargetName,
};
use crate::error::ConfigError;

impl RunConfig {
    /// Whether prompt and target of a training disagree about reasoning, in words and with a remedy.
    fn disagreement(&self) -> Option<(String, &'static str)> {
        let template: PromptTemplate = self.prompt.parse().ok()?;
        let train = &self.train;
        let is_cot = train.target == TargetName::Cot;
        if train.recipe == RecipeName::Denoiser || template.asks_for_reasoning() == is_cot {
            return None;
        }
        let (asks, remedy) = if is_cot {
            (
                "does not ask for the reasoning that",
                "take a prompt that asks for it, such as `med_r1_think`, or `target = \"instruct\"`",
            )
        } else {
            (
                "asks for a reasoning, which",
                "take a prompt that does not, such as `med_r1_no_think`, or `target = \"cot\"`",
            )
        };
        let target = if is_cot { "`target = \"cot\"` trains" } else { "`target = \"instruct\"` leaves out" };
        Some((format!("prompt `{template}` {asks} {target}"), remedy))
    }

    /// The disagreement of prompt and target where it is certainly a mistake: a policy rewarded for another form than the one that
    /// its prompt asks for in words.
    pub(super) fn contradicting_prompt(&self) -> Option<ConfigError> {
        let (message, remedy) = self.disagreement()?;
        let is_rewarded = self.train.recipe.is_grpo() && self.train.grpo.format_weight > 0.0;
        let instructs = self.prompt.parse::<PromptTemplate>().is_ok_and(PromptTemplate::instructs);
        (is_rewarded && instructs).then(|| {
            let message = format!("{message}: obeying it would cost the format reward");
            ConfigError::new("train.target", message).with_help(remedy)
        })
    }

    /// A shard of a training: its parts could never be joined.
    pub(super) fn partial_training(&self) -> Option<ConfigError> {
        let shard = self.data.shard?;
        let message = format!("training on part {shard} of the questions only: models cannot be merged");
        let help = "leave `shard` out; to train on fewer questions on purpose, take `split` or `limit`";
        Some(ConfigError::new("data.shard", message).with_help(help))
    }

    /// What a training should be told about prompt and target that is no mistake for certain.
    pub fn prompt_note(&self) -> Option<String> {
        let (message, remedy) = self.disagreement().filter(|_| self.contradicting_prompt().is_none())?;
        Some(format!(
            "{message}: the model learns it all the same, and should be evaluated with this prompt; if that is not meant, {remedy}"
        ))
    }

    /// The settings that differ from their defaults and have no effect on `command`, each with the reason.
    pub fn without_effect(&self, command: Command) -> Vec<String> {
        let mut notes = Vec::new();
        let mut note = |is_idle: bool, key: &str, why: String| {
            if is_idle {
                notes.push(format!("`{key}` has no effect: {why}"));
            }
        };
        if command == Command::Attack {
            let (own, default) = (&self.attack, AttackConfig::default());
            let method = own.method;
            let is = |methods: &[Method]| methods.contains(&method);
            let with = || format!("the method is `{}`", method.word());
            let num_steps = AttackConfig::default_num_steps(method);
            let has_steps = is(&[Method::Pgd, Method::Apgd, Method::Auto]);
            note(!has_steps && own.num_steps != num_steps, "num_steps", with());
            note(method != Method::Pgd && own.step_size.is_some(), "step_size", with());
            let has_queries = is(&[Method::Square, Method::Auto]);
            note(!has_queries && own.num_queries != default.num_queries, "num_queries", with());
            let is_plain = own.smoothing_sigma.is_none() && own.eot_samples != default.eot_samples;
            note(is_plain, "eot_samples", "there is no noise without `smoothing_sigma`".to_owned());
        }
        if command == Command::Train && self.train.recipe.is_adversarial() {
            let (own, default) = (&self.train.adversary, AdversaryConfig::default());
            let mut idle = |is_idle: bool, key: &str, why: &str| {
                note(is_idle, &format!("train.adversary.{key}"), why.to_owned());
            };
            let is_plain = own.smoothing_sigma.is_none() && own.eot_samples != default.eot_samples;
            idle(is_plain, "eot_samples", "there is no noise in the attack without `smoothing_sigma`");
            let is_paid = own.objective == AdversaryObjective::ExpectedReward;
            let samples = own.expected_reward_samples != default.expected_reward_samples;
            idle(!is_paid && samples, "expected_reward_samples", "`objective` is not `expected_reward`");
            let beta = own.trades_beta != default.trades_beta;
            idle(
                self.train.recipe != RecipeName::Trades && beta,
                "trades_beta",
                "the recipe is not `trades`",
            );
            let is_single = !self.train.recipe.is_grpo() || self.train.grpo.num_updates == 1;
            let refreshes = own.refresh == RefreshName::EachUpdate;
            idle(is_single && refreshes, "refresh", "a step has one update");
            let is_ramp = own.epsilon_schedule != RampName::Constant;
            let start = own.epsilon_start_fraction != default.epsilon_start_fraction;
            idle(!is_ramp && start, "epsilon_start_fraction", "`epsilon_schedule` is `constant`");
            let ramp = own.ramp_fraction != default.ramp_fraction;
            idle(!is_ramp && ramp, "ramp_fraction", "`epsilon_schedule` is `constant`");
            let stages = own.ramp_stages != default.ramp_stages;
            let has_stages = own.epsilon_schedule == RampName::Steps;
            idle(!has_stages && stages, "ramp_stages", "`epsilon_schedule` is not `steps`");
        }
        let (own, default) = (&self.certify, CertifyConfig::default());
        if command == Command::Certify {
            let is_fixed = own.mode == CertifyMode::Cohen;
            let with = || "mode `cohen` makes `n` draws".to_owned();
            note(is_fixed && own.rule != default.rule, "rule", with());
            note(is_fixed && own.min_gain != default.min_gain, "min_gain", with());
            let has_target = !is_fixed && own.target_radius.is_some() && own.min_gain != default.min_gain;
            note(has_target, "min_gain", "`target_radius` says when to stop".to_owned());
        }
        if command == Command::Predict && own.sigma.is_none() {
            let with = || "nothing is smoothed without `sigma`".to_owned();
            note(own.n0 != default.n0, "n0", with());
            note(own.n != default.n, "n", with());
            note(own.alpha != default.alpha, "alpha", with());
        }
        if command == Command::Train && self.train.recipe.is_grpo() {
            let (own, default) = (&self.train.grpo, GrpoSettings::default());
            let without = |key: &str| format!("`{key}` is 0");
            let is_short = own.overlong_weight == 0.0;
            let with = || without("overlong_weight");
            note(is_short && own.overlong_max_length.is_some(), "overlong_max_length", with());
            note(is_short && own.overlong_cache.is_some(), "overlong_cache", with());
            let is_free = own.repetition_weight == 0.0;
            let with = || without("repetition_weight");
            let is_other = own.repetition_ngram_size != default.repetition_ngram_size;
            note(is_free && is_other, "repetition_ngram_size", with());
            let is_other = own.repetition_max_penalty != default.repetition_max_penalty;
            note(is_free && is_other, "repetition_max_penalty", with());
            let is_alone = own.reward_command.is_none();
            let with = || "there is no `reward_command`".to_owned();
            let is_other = own.reward_command_weight != default.reward_command_weight;
            note(is_alone && is_other, "reward_command_weight", with());
            let is_other = own.reward_command_timeout != default.reward_command_timeout;
            note(is_alone && is_other, "reward_command_timeout", with());
        }
        let generation = &self.generation;
        if generation.temperature == 0.0 {
            let with = || "tokens are not drawn at temperature 0".to_owned();
            note(generation.top_k.is_some(), "top_k", with());
            note(generation.top_p.is_some(), "top_p", with());
            note(generation.min_p.is_some(), "min_p", with());
        }
        notes
    }
}

#[cfg(test)]
mod tests {
    use super::super::Override;
    use super::*;

    fn notes(command: Command, settings: &[(&str, &str)]) -> Vec<String> {
        let settings: Vec<Override> =
            settings.iter().map(|(key, value)| Override::new(*key, *value, "--set")).collect();
        RunConfig::load_any(None, &settings).unwrap().without_effect(command)
    }

    #[test]
    fn prompt_and_target_that_disagree_are_told_and_refused_only_where_the_reward_contradicts() {
        // Per prompt: whether it asks for a reasoning, and whether it says so in words.
        for (prompt, asks, instructs) in [
            ("med_r1_think", true, true),
            ("think_after", true, true),
            ("med_r1_no_think", false, true),
            ("plain", false, true),
            ("phantom", false, false),
            ("phantom_cot", true, false),
        ] {
            for (target, is_cot) in [("cot", true), ("instruct", false)] {
                for (recipe, weight, rewards) in [
                    ("sft", "1", false),
                    ("at_sft", "1", false),
                    ("grpo", "1", true),
                    ("at_grpo", "0.2", true),
                    ("grpo", "0", false),
                ] {
                    let settings = [
                        ("prompt", prompt),
                        ("train.target", target),
                        ("train.recipe", recipe),
                        ("train.grpo.format_weight", weight),
                    ]
                    .map(|(key, value)| Override::new(key, value, "--set"));
                    let case = format!("{prompt} {target} {recipe} {weight}");
                    let is_refused = asks != is_cot && rewards && instructs;
                    match RunConfig::load(Command::Train, None, &settings) {
                        Ok(config) => {
                            assert!(!is_refused, "{case}");
                            assert_eq!(config.prompt_note().is_some(), asks != is_cot, "{case}");
                        }
                        Err(error) => {
                            assert!(is_refused && error.to_string().contains(prompt), "{case}: {error}");
                        }
                    }
                }
            }
        }
        let denoiser = [("train.recipe", "denoiser"), ("prompt", "plain"), ("train.noise_sigma", "0.1")]
            .map(|(key, value)| Override::new(key, value, "--set"));
        assert_eq!(RunConfig::load(Command::Train, None, &denoiser).unwrap().prompt_note(), None);
    }

    #[test]
    fn what_changes_nothing_is_said_and_what_changes_something_is_not() {
        for command in [Command::Attack, Command::Certify, Command::Predict, Command::Eval] {
            assert_eq!(notes(command, &[]), Vec::<String>::new());
        }
        for method in ["noise", "fgsm", "pgd", "apgd", "square", "auto"] {
            assert_eq!(notes(Command::Attack, &[("attack.method", method)]), Vec::<String>::new());
            for (key, value, methods) in [
                ("num_steps", "7", &["pgd", "apgd", "auto"][..]),
                ("step_size", "0.01", &["pgd"]),
                ("num_queries", "77", &["square", "auto"]),
                ("eot_samples", "3", &[]),
            ] {
                let found =
                    notes(Command::Attack, &[("attack.method", method), (&format!("attack.{key}"), value)]);
                let wanted = usize::from(!methods.contains(&method));
                assert_eq!(found.len(), wanted, "{method} {key}: {found:?}");
                assert!(found.iter().all(|note| note.starts_with(&format!("`{key}` has no effect: "))));
            }
        }
        for (command, settings, count) in [
            (
                Command::Attack,
                &[
                    ("attack.eot_samples", "3"),
                    ("attack.smoothing_sigma", "0.1"),
                    ("attack.objective", "cross_entropy"),
                ][..],
                0,
            ),
            (Command::Certify, &[("certify.rule", "clopper_pearson"), ("certify.min_gain", "0")], 2),
            (Command::Certify, &[("certify.mode", "sequential"), ("certify.min_gain", "0")], 0),
            (
                Command::Certify,
                &[
                    ("certify.mode", "sequential"),
                    ("certify.min_gain", "0"),
                    ("certify.target_radius", "0.1"),
                ],
                1,
            ),
            (Command::Predict, &[("certify.n", "50"), ("certify.alpha", "0.1")], 2),
            (Command::Predict, &[("certify.n", "50"), ("certify.sigma", "0.1")], 0),
            (
                Command::Train,
                &[
                    ("train.recipe", "grpo"),
                    ("train.grpo.overlong_cache", "5"),
                    ("train.grpo.overlong_max_length", "50"),
                    ("train.grpo.repetition_ngram_size", "5"),
                    ("train.grpo.repetition_max_penalty", "-0.5"),
                    ("train.grpo.reward_command_weight", "0.5"),
                    ("train.grpo.reward_command_timeout", "5"),
                ],
                6,
            ),
            (
                Command::Train,
                &[
                    ("train.recipe", "grpo"),
                    ("train.grpo.overlong_weight", "1"),
                    ("train.grpo.overlong_cache", "50"),
                    ("train.grpo.overlong_max_length", "512"),
                    ("train.grpo.repetition_weight", "1"),
                    ("train.grpo.repetition_ngram_size", "5"),
                    ("train.grpo.repetition_max_penalty", "-0.5"),
                    ("train.grpo.reward_command", "[\"x\"]"),
                    ("train.grpo.reward_command_weight", "0.5"),
                    ("train.grpo.reward_command_timeout", "5"),
                ],
                0,
            ),
            (Command::Eval, &[("generation.top_k", "5"), ("generation.top_p", "0.5")], 2),
            (Command::Eval, &[("generation.top_k", "5"), ("generation.temperature", "0.5")], 0),
        ] {
            assert_eq!(notes(command, settings).len(), count, "{settings:?}");
        }
    }

    #[test]
    fn idle_settings_of_an_adversary_are_said() {
        let cases: [(&[(&str, &str)], usize); 4] = [
            (
                &[
                    ("train.recipe", "at_sft"),
                    ("train.adversary.eot_samples", "2"),
                    ("train.adversary.expected_reward_samples", "2"),
                    ("train.adversary.trades_beta", "1"),
                    ("train.adversary.refresh", "each_update"),
                    ("train.adversary.ramp_stages", "2"),
                ],
                5,
            ),
            (
                &[
                    ("train.recipe", "at_grpo"),
                    ("train.noise_sigma", "0.1"),
                    ("train.grpo.num_updates", "2"),
                    ("train.adversary.smoothing_sigma", "0.1"),
                    ("train.adversary.eot_samples", "2"),
                    ("train.adversary.objective", "expected_reward"),
                    ("train.adversary.expected_reward_samples", "2"),
                    ("train.adversary.refresh", "each_update"),
                    ("train.adversary.epsilon_schedule", "steps"),
                    ("train.adversary.ramp_stages", "2"),
                ],
                0,
            ),
            (
                &[
                    ("train.recipe", "trades"),
                    ("train.adversary.trades_beta", "1"),
                    ("train.adversary.epsilon_schedule", "constant"),
                    ("train.adversary.epsilon_start_fraction", "1"),
                    ("train.adversary.ramp_fraction", "1"),
                ],
                2,
            ),
            (&[("train.recipe", "sft"), ("train.adversary.trades_beta", "1")], 0),
        ];
        for (settings, count) in cases {
            assert_eq!(notes(Command::Train, settings).len(), count, "{settings:?}");
        }
    }
}
