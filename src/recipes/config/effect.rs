//! Settings that change nothing beside the others: said, not refused, so that one file can serve several methods.

use super::{
    AdversaryConfig, AdversaryObjective, AttackConfig, CertifyConfig, CertifyMode, Command, DenoiserSettings,
    GrpoSettings, LossType, Method, MetricName, PromptTemplate, RampName, RecipeName, RefreshName, RunConfig,
    ScheduleName, Scoring, TargetName, TrainConfig, ValidationConfig, WatchSettings,
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

    /// A validation by what completions are worth in which the model says none: each would be an option's own text.
    pub(super) fn unsaid_rewards(&self) -> Option<ConfigError> {
        let validation = &self.train.validation;
        let metric = validation.metric();
        let is_reward = matches!(metric, MetricName::Reward | MetricName::RobustReward);
        let is_wanted = validation.every > 0 && self.train.recipe.is_grpo() && is_reward;
        (is_wanted && self.scoring == Scoring::Likelihood).then(|| {
            let message = format!(
                "`{metric}` is about what the model says, and with `scoring = \"likelihood\"` it says nothing"
            );
            ConfigError::new("train.validation.metric", message)
                .with_help("leave `scoring` at `generate`, or use `accuracy` or `robust_accuracy`")
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
        let mut notes = Notes::default();
        match command {
            Command::Attack => self.idle_in_attack(&mut notes),
            Command::Certify => self.idle_in_certificates(&mut notes),
            Command::Predict if self.certify.sigma.is_none() => {
                let (own, default) = (&self.certify, CertifyConfig::default());
                let why = "nothing is smoothed without `sigma`";
                notes.add(own.n0 != default.n0, "n0", why);
                notes.add(own.n != default.n, "n", why);
                notes.add(own.alpha != default.alpha, "alpha", why);
            }
            Command::Train => {
                self.idle_in_validation(&mut notes);
                self.idle_in_training(&mut notes);
                self.idle_in_watch(&mut notes);
                let why = |what: &str| format!("the recipe `{}` {what}", self.train.recipe);
                if self.train.recipe.is_adversarial() {
                    self.idle_in_adversary(&mut notes);
                } else {
                    let is_other = self.train.adversary != AdversaryConfig::default();
                    notes.add(is_other, "train.adversary", &why("attacks nothing"));
                }
                if self.train.recipe.is_grpo() {
                    self.idle_in_grpo(&mut notes);
                    self.idle_in_rewards(&mut notes);
                } else {
                    let is_other = self.train.grpo != GrpoSettings::default();
                    notes.add(is_other, "train.grpo", &why("samples no completions"));
                }
            }
            _ => {}
        }
        let generation = &self.generation;
        if generation.temperature == 0.0 {
            let why = "tokens are not drawn at temperature 0";
            notes.add(generation.top_k.is_some(), "top_k", why);
            notes.add(generation.top_p.is_some(), "top_p", why);
            notes.add(generation.min_p.is_some(), "min_p", why);
        }
        notes.0
    }

    fn idle_in_attack(&self, notes: &mut Notes) {
        let (own, default) = (&self.attack, AttackConfig::default());
        let method = own.method;
        let is = |methods: &[Method]| methods.contains(&method);
        let why = format!("the method is `{}`", method.word());
        let num_steps = AttackConfig::default_num_steps(method);
        let has_steps = is(&[Method::Pgd, Method::Apgd, Method::Auto]);
        notes.add(!has_steps && own.num_steps != num_steps, "num_steps", &why);
        notes.add(method != Method::Pgd && own.step_size.is_some(), "step_size", &why);
        let has_queries = is(&[Method::Square, Method::Auto]);
        notes.add(!has_queries && own.num_queries != default.num_queries, "num_queries", &why);
        let is_plain = own.smoothing_sigma.is_none() && own.eot_samples != default.eot_samples;
        notes.add(is_plain, "eot_samples", "there is no noise without `smoothing_sigma`");
    }

    fn idle_in_certificates(&self, notes: &mut Notes) {
        let (own, default) = (&self.certify, CertifyConfig::default());
        let is_fixed = own.mode == CertifyMode::Cohen;
        let why = "mode `cohen` makes `n` draws";
        notes.add(is_fixed && own.rule != default.rule, "rule", why);
        notes.add(is_fixed && own.min_gain != default.min_gain, "min_gain", why);
        let has_target = !is_fixed && own.target_radius.is_some() && own.min_gain != default.min_gain;
        notes.add(has_target, "min_gain", "`target_radius` says when to stop");
    }

    fn idle_in_validation(&self, notes: &mut Notes) {
        let (own, default) = (&self.train.validation, ValidationConfig::default());
        let of_attack = [
            (own.norm != default.norm, "norm"),
            (own.epsilon != default.epsilon, "epsilon"),
            (own.objective != default.objective, "objective"),
        ];
        let others = [
            (own.split.is_some(), "split"),
            (own.data.is_some(), "data"),
            (own.limit != default.limit, "limit"),
            (own.num_steps != default.num_steps, "num_steps"),
            (own.metric.is_some(), "metric"),
        ];
        let is_off = own.every == 0;
        if !is_off && own.num_steps > 0 {
            return;
        }
        let why = if is_off {
            "nothing is validated while `train.validation.every` is 0"
        } else {
            "validation attacks nothing while `train.validation.num_steps` is 0"
        };
        // Examinations alone ask for an answer: recipes sample completions, or score the right one.
        notes.add(is_off && self.scoring == Scoring::Likelihood, "scoring", why);
        for (is_other, key) in others.iter().filter(|_| is_off).chain(&of_attack) {
            notes.add(*is_other, &format!("train.validation.{key}"), why);
        }
    }

    fn idle_in_watch(&self, notes: &mut Notes) {
        let (own, default) = (&self.train.watch, WatchSettings::default());
        if own.patience > 0 {
            return;
        }
        for (is_other, key) in [
            (own.window != default.window, "window"),
            (own.spike_factor != default.spike_factor, "spike_factor"),
            (own.max_kl != default.max_kl, "max_kl"),
            (own.min_length_ratio != default.min_length_ratio, "min_length_ratio"),
            (own.max_clipped_ratio != default.max_clipped_ratio, "max_clipped_ratio"),
            (own.min_pgd_gain != default.min_pgd_gain, "min_pgd_gain"),
        ] {
            let why = "nothing is watched while `train.watch.patience` is 0";
            notes.add(is_other, &format!("train.watch.{key}"), why);
        }
    }

    fn idle_in_training(&self, notes: &mut Notes) {
        let (own, default) = (&self.train, TrainConfig::default());
        let why = "training has no prior to count but its own questions";
        notes.add(self.data.train_split.is_some(), "data.train_split", why);
        let is_constant = own.schedule == ScheduleName::Constant;
        let floor = own.min_learning_rate_ratio != default.min_learning_rate_ratio;
        let why = "`train.schedule` is `constant`";
        notes.add(is_constant && floor, "train.min_learning_rate_ratio", why);
        if own.recipe == RecipeName::Denoiser {
            let why = "the recipe `denoiser` trains a network of its own on images alone";
            notes.add(own.micro_batch_size.is_some(), "train.micro_batch_size", why);
            notes.add(own.recompute, "train.recompute", why);
            notes.add(own.permute_options, "train.permute_options", why);
            notes.add(own.target != default.target, "train.target", why);
            notes.add(own.parts != default.parts, "train.parts", why);
            return;
        }
        let is_other = own.denoiser != DenoiserSettings::default();
        notes.add(is_other, "train.denoiser", &format!("the recipe `{}` trains no denoiser", own.recipe));
        if own.lora_rank == 0 && self.adapter.is_none() {
            let why = "no adapter trains: `train.lora_rank` is 0";
            notes.add(own.lora_alpha != default.lora_alpha, "train.lora_alpha", why);
            notes.add(own.lora_use_rslora, "train.lora_use_rslora", why);
        } else if self.adapter.is_some() {
            let why = "the adapter named with `--adapter` has its own";
            notes.add(own.lora_use_rslora, "train.lora_use_rslora", why);
        }
        notes.add(own.captions && own.noise_sigma > 0.0, "train.noise_sigma", "captions stand in for images");
    }

    fn idle_in_adversary(&self, notes: &mut Notes) {
        let (own, default) = (&self.train.adversary, AdversaryConfig::default());
        if own.epsilon == 0.0 || own.clean_fraction == 1.0 {
            let key = if own.epsilon == 0.0 {
                "epsilon` 0 moves no pixel"
            } else {
                "clean_fraction` 1 leaves every image clean"
            };
            notes.0.push(format!("nothing is attacked: `train.adversary.{key}"));
            return;
        }
        let mut idle = |is_idle: bool, key: &str, why: &str| {
            notes.add(is_idle, &format!("train.adversary.{key}"), why);
        };
        let is_plain = own.smoothing_sigma.is_none() && own.eot_samples != default.eot_samples;
        idle(is_plain, "eot_samples", "there is no noise in the attack without `smoothing_sigma`");
        let is_paid = own.objective == AdversaryObjective::ExpectedReward;
        let samples = own.expected_reward_samples != default.expected_reward_samples;
        idle(!is_paid && samples, "expected_reward_samples", "`objective` is not `expected_reward`");
        let is_whole =
            own.objective == AdversaryObjective::Finding && self.train.target == TargetName::Instruct;
        idle(is_whole, "objective", "an answer without a reasoning is attacked whole, as by `completion`");
        let beta = own.trades_beta != default.trades_beta;
        idle(self.train.recipe != RecipeName::Trades && beta, "trades_beta", "the recipe is not `trades`");
        let is_single = !self.train.recipe.is_grpo() || self.train.grpo.num_updates == 1;
        let refreshes = own.refresh == RefreshName::EachUpdate;
        idle(is_single && refreshes, "refresh", "a step has one update");
        let is_ramp = own.epsilon_schedule != RampName::Constant;
        let start = own.epsilon_start_fraction != default.epsilon_start_fraction;
        idle(!is_ramp && start, "epsilon_start_fraction", "`epsilon_schedule` is `constant`");
        let ramp = own.ramp_fraction != default.ramp_fraction;
        idle(!is_ramp && ramp, "ramp_fraction", "`epsilon_schedule` is `constant`");
        let is_curve = matches!(own.epsilon_schedule, RampName::Linear | RampName::Cosine);
        let is_over = is_curve && own.ramp_fraction * self.train.num_steps as f64 <= 1.0;
        idle(is_over && start, "epsilon_start_fraction", "the budget is full from the first step on");
        let stages = own.ramp_stages != default.ramp_stages;
        let has_stages = own.epsilon_schedule == RampName::Steps;
        idle(!has_stages && stages, "ramp_stages", "`epsilon_schedule` is not `steps`");
    }

    fn idle_in_grpo(&self, notes: &mut Notes) {
        let (own, default) = (&self.train.grpo, GrpoSettings::default());
        let mut idle = |is_idle: bool, key: &str, why: &str| {
            notes.add(is_idle, &format!("train.grpo.{key}"), why);
        };
        let why = "there is no reference while `train.grpo.kl_coef` is 0";
        if own.kl_coef == 0.0 {
            idle(own.kl_image != default.kl_image, "kl_image", why);
            idle(own.kl_bias_correction, "kl_bias_correction", why);
        }
        let (low, high) = (own.clip_low != default.clip_low, own.clip_high != default.clip_high);
        let is_sequence = own.importance_level != default.importance_level;
        if own.num_updates == 1 {
            let why = "with one update a rollout every ratio is 1";
            // Cispo wants its cap set and Luspo its level in any case.
            idle(low, "clip_low", why);
            idle(high && own.loss_type != LossType::Cispo, "clip_high", why);
            idle(own.delta.is_some(), "delta", why);
            idle(is_sequence && own.loss_type != LossType::Luspo, "importance_level", why);
            return;
        }
        let has_no_floor = [LossType::Cispo, LossType::Sapo].contains(&own.loss_type);
        let why = format!("the loss `{}` does not clip there", own.loss_type.word());
        idle(has_no_floor && low, "clip_low", &why);
        idle(has_no_floor && own.delta.is_some(), "delta", &why);
        idle(own.loss_type == LossType::Sapo && high, "clip_high", &why);
    }

    fn idle_in_rewards(&self, notes: &mut Notes) {
        let (own, default) = (&self.train.grpo, GrpoSettings::default());
        let mut idle = |is_idle: bool, key: &str, why: &str| {
            notes.add(is_idle, &format!("train.grpo.{key}"), why);
        };
        if own.overlong_weight == 0.0 {
            let why = "`overlong_weight` is 0";
            idle(own.overlong_max_length.is_some(), "overlong_max_length", why);
            idle(own.overlong_cache.is_some(), "overlong_cache", why);
        }
        if own.repetition_weight == 0.0 {
            let why = "`repetition_weight` is 0";
            let is_other = own.repetition_ngram_size != default.repetition_ngram_size;
            idle(is_other, "repetition_ngram_size", why);
            let is_other = own.repetition_max_penalty != default.repetition_max_penalty;
            idle(is_other, "repetition_max_penalty", why);
        }
        if own.reward_command.is_none() {
            let why = "there is no `reward_command`";
            let is_other = own.reward_command_weight != default.reward_command_weight;
            idle(is_other, "reward_command_weight", why);
            let is_other = own.reward_command_timeout != default.reward_command_timeout;
            idle(is_other, "reward_command_timeout", why);
        }
    }
}

/// What is said about settings without effect.
#[derive(Default)]
struct Notes(Vec<String>);

impl Notes {
    fn add(&mut self, is_idle: bool, key: &str, why: &str) {
        if is_idle {
            self.0.push(format!("`{key}` has no effect: {why}"));
        }
    }
}

#[cfg(test)]
mod tests {
    use super::super::Override;
    use super::*;
    use crate::error::Error;

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
    fn validation_by_rewards_of_what_is_never_said_is_refused() {
        for (recipe, scoring, every, metric, is_refused) in [
            ("grpo", "likelihood", "5", "reward", true),
            ("at_grpo", "likelihood", "5", "robust_reward", true),
            ("grpo", "likelihood", "5", "accuracy", false),
            ("grpo", "likelihood", "5", "robust_accuracy", false),
            ("grpo", "generate", "5", "reward", false),
            // Nothing is validated.
            ("grpo", "likelihood", "0", "reward", false),
        ] {
            let settings = [
                ("train.recipe", recipe),
                ("scoring", scoring),
                ("prompt", "phantom_cot"),
                ("train.validation.every", every),
                ("train.validation.split", "x"),
                ("train.validation.metric", metric),
            ]
            .map(|(key, value)| Override::new(key, value, "--set"));
            let case = format!("{recipe} {scoring} {every} {metric}");
            match RunConfig::load(Command::Train, None, &settings) {
                Ok(_) => assert!(!is_refused, "{case}"),
                Err(Error::Config(problems)) => {
                    assert!(is_refused && problems.len() == 1, "{case}: {problems:?}");
                    assert_eq!(problems[0].key, "train.validation.metric");
                    assert!(problems[0].help.is_some() && problems[0].message.contains(metric), "{case}");
                }
                Err(other) => panic!("{case}: {other}"),
            }
        }
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
        let cases: [(&[(&str, &str)], usize); 7] = [
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
            (&[("train.recipe", "sft"), ("train.adversary.trades_beta", "1")], 1),
            (&[("train.recipe", "at_sft"), ("train.adversary.epsilon", "0")], 1),
            (&[("train.recipe", "at_sft"), ("train.adversary.clean_fraction", "1")], 1),
            (&[("train.recipe", "at_sft"), ("train.grpo.group_size", "4")], 1),
        ];
        for (settings, count) in cases {
            assert_eq!(notes(Command::Train, settings).len(), count, "{settings:?}");
        }
    }

    #[test]
    fn idle_settings_of_a_training_are_said() {
        let all = |settings: &[(&str, &str)]| -> Vec<String> {
            let keys = notes(Command::Train, settings);
            keys.iter().map(|note| note.split('`').nth(1).unwrap().replace("train.", "")).collect()
        };
        let validation = [("train.validation.split", "x"), ("train.validation.metric", "accuracy")];
        assert_eq!(all(&validation), ["validation.split", "validation.metric"]);
        let on = [("train.validation.every", "5"), ("train.validation.split", "x")];
        assert_eq!(all(&on), [""; 0]);
        let attack = [
            ("train.validation.norm", "l2"),
            ("train.validation.epsilon", "4/255"),
            ("train.validation.objective", "answer"),
        ];
        let keys = ["validation.norm", "validation.epsilon", "validation.objective"];
        assert_eq!(all(&attack), keys);
        assert_eq!(all(&[&on[..], &attack].concat()), [""; 0]);
        let clean = [("train.validation.num_steps", "0")];
        assert_eq!(all(&[&on[..], &attack, &clean].concat()), keys);
        assert_eq!(all(&[&on[..], &clean].concat()), [""; 0]);
        let likely = [("scoring", "likelihood")];
        assert_eq!(all(&likely), ["scoring"]);
        assert_eq!(all(&[&on[..], &likely].concat()), [""; 0]);
        let watch = [
            ("train.watch.window", "5"),
            ("train.watch.spike_factor", "5"),
            ("train.watch.max_kl", "2"),
            ("train.watch.min_length_ratio", "0.5"),
            ("train.watch.max_clipped_ratio", "0.5"),
            ("train.watch.min_pgd_gain", "0.5"),
        ];
        assert_eq!(all(&watch), [""; 0]);
        let keys = watch.map(|(key, _)| key.replace("train.", ""));
        assert_eq!(all(&[&watch[..], &[("train.watch.patience", "0")]].concat()), keys);
        assert_eq!(all(&[("train.watch.patience", "0")]), [""; 0]);
        let floor = [("train.min_learning_rate_ratio", "0.1")];
        assert_eq!(all(&floor), [""; 0]);
        let constant = [&floor[..], &[("train.schedule", "constant")]].concat();
        assert_eq!(all(&constant), ["min_learning_rate_ratio"]);
        assert_eq!(all(&[("data.train_split", "train.json")]), ["data.train_split"]);
        assert_eq!(all(&[("train.denoiser.width", "16")]), ["denoiser"]);
        let lora = [("train.lora_alpha", "8"), ("train.lora_use_rslora", "true")];
        assert_eq!(all(&lora), ["lora_alpha", "lora_use_rslora"]);
        assert_eq!(all(&[&lora[..], &[("train.lora_rank", "4")]].concat()), [""; 0]);
        assert_eq!(all(&[("adapter", "a"), ("train.lora_use_rslora", "true")]), ["lora_use_rslora"]);
        assert_eq!(all(&[("train.captions", "true"), ("train.noise_sigma", "0.1")]), ["noise_sigma"]);
        let denoiser = [
            ("train.recipe", "denoiser"),
            ("train.noise_sigma", "0.1"),
            ("train.recompute", "true"),
            ("train.micro_batch_size", "1"),
            ("train.parts.text", "false"),
            ("train.denoiser.width", "16"),
        ];
        assert_eq!(all(&denoiser), ["micro_batch_size", "recompute", "parts"]);
        let instruct = [("train.target", "instruct"), ("train.adversary.objective", "finding")];
        assert_eq!(all(&[&instruct[..], &[("train.recipe", "at_sft")]].concat()), ["adversary.objective"]);

        let grpo = |more: &[(&str, &str)]| all(&[&[("train.recipe", "grpo")], more].concat());
        assert_eq!(grpo(&[("train.grpo.kl_image", "clean")]), ["grpo.kl_image"]);
        assert_eq!(grpo(&[("train.grpo.kl_image", "clean"), ("train.grpo.kl_coef", "0.1")]), [""; 0]);
        let clips = [
            ("train.grpo.clip_low", "0.1"),
            ("train.grpo.clip_high", "0.5"),
            ("train.grpo.delta", "3"),
            ("train.grpo.importance_level", "sequence"),
        ];
        let keys = ["clip_low", "clip_high", "delta", "importance_level"].map(|key| format!("grpo.{key}"));
        assert_eq!(grpo(&clips), keys);
        let several = [("train.grpo.num_updates", "2")];
        assert_eq!(grpo(&[&clips[..], &several].concat()), [""; 0]);
        let cispo = [("train.grpo.loss_type", "cispo")];
        let capped =
            [&clips[..], &several, &cispo, &[("train.grpo.clip_high", "5"), ("train.grpo.delta", "7")]]
                .concat();
        assert_eq!(grpo(&capped), ["grpo.clip_low", "grpo.delta"]);
        let sapo = [("train.grpo.loss_type", "sapo")];
        let found = grpo(&[&clips[..], &several, &sapo].concat());
        assert_eq!(found, ["grpo.clip_low", "grpo.delta", "grpo.clip_high"]);
    }
}
