//! Settings that change nothing beside the others: said, not refused, so that one file can serve several methods.

use super::{
    AttackConfig, CertifyConfig, CertifyMode, Command, Method, PromptTemplate, RecipeName, RunConfig,
    TargetName,
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
            (Command::Eval, &[("generation.top_k", "5"), ("generation.top_p", "0.5")], 2),
            (Command::Eval, &[("generation.top_k", "5"), ("generation.temperature", "0.5")], 0),
        ] {
            assert_eq!(notes(command, settings).len(), count, "{settings:?}");
        }
    }
}
