//! A watch on the course of training: it reads the same metrics that are logged and says, once per episode, what goes wrong and what
//! to look at. It changes nothing.
//!
//! [`Watch`] is a function of the lines of `metrics.jsonl` alone, so a resumed run, which reads them again, warns as one that was
//! never interrupted. An episode of a trouble ends after `train.watch.window` steps without it.

use super::config::WatchSettings;
use super::progress::Progress;
use super::run::Run;
use crate::error::Result;
use serde::Serialize;
use serde_json::{Map, Value, json};
use std::collections::{BTreeMap, VecDeque};

/// One warning: a line of `warnings.jsonl`.
#[derive(Debug, Clone, PartialEq, Serialize)]
pub struct Warning {
    /// The step it is about, from 1.
    pub step: u64,
    /// What is wrong, as one word that does not change: `dead_rewards`, `no_reward_variance`, `length_collapse`, `length_limit`, `kl`,
    /// `grad_norm`, `loss`, `pgd_without_effect` or `learning_rate_zero`.
    pub kind: &'static str,
    /// What is wrong and what to do, for people.
    pub message: String,
    /// The numbers that say so.
    pub figures: Map<String, Value>,
}

/// What has been seen so far.
#[derive(Debug)]
pub struct Watch<'a> {
    settings: &'a WatchSettings,
    step: u64,
    episodes: BTreeMap<&'static str, Episode>,
    levels: BTreeMap<&'static str, Level>,
}

/// How long a trouble lasts.
#[derive(Debug, Default)]
struct Episode {
    /// Steps in a row with it.
    bad: usize,
    /// Steps in a row without it.
    calm: usize,
    is_told: bool,
}

impl Episode {
    /// Whether this step is the one to warn at: the `patience`-th in a row with the trouble, if nothing was said since it was away for
    /// `rest` steps.
    fn see(&mut self, is_bad: bool, patience: usize, rest: usize) -> bool {
        if is_bad {
            (self.bad, self.calm) = (self.bad + 1, 0);
        } else {
            (self.bad, self.calm) = (0, self.calm + 1);
            self.is_told &= self.calm < rest;
        }
        let tells = !self.is_told && self.bad >= patience;
        self.is_told |= tells;
        tells
    }
}

/// The usual values of one number: the first and the last so many.
#[derive(Debug, Default)]
struct Level {
    first: Vec<f64>,
    last: VecDeque<f64>,
}

impl Level {
    fn push(&mut self, value: f64, window: usize) {
        if self.first.len() < window {
            self.first.push(value);
        }
        self.last.push_back(value);
        if self.last.len() > window {
            self.last.pop_front();
        }
    }

    /// The medians of the first and of the last values, once there are enough.
    fn medians(&self, window: usize) -> Option<(f64, f64)> {
        (self.last.len() >= window).then(|| (median(&self.first), median(&self.last)))
    }
}

impl<'a> Watch<'a> {
    /// A watch that has seen the steps of `metrics`, the lines logged so far, and warned of them.
    pub fn new(settings: &'a WatchSettings, metrics: &[Value]) -> Self {
        let mut watch = Self { settings, step: 0, episodes: BTreeMap::new(), levels: BTreeMap::new() };
        for line in metrics.iter().filter_map(Value::as_object) {
            watch.see(line);
        }
        watch
    }

    /// Sees one line of `metrics.jsonl` and writes down what it gives reason to say.
    ///
    /// # Errors
    /// When `warnings.jsonl` cannot be written.
    pub fn report(
        &mut self,
        line: &Map<String, Value>,
        run: &mut Run,
        progress: &dyn Progress,
    ) -> Result<()> {
        for warning in self.see(line) {
            progress.note(&format!("warning: step {}: {}", warning.step, warning.message));
            run.warning(&warning)?;
        }
        Ok(())
    }

    /// Sees one line of `metrics.jsonl`, the next one.
    pub fn see(&mut self, line: &Map<String, Value>) -> Vec<Warning> {
        let step = line.get("step").and_then(Value::as_u64).unwrap_or(self.step + 1);
        // Further updates on the completions of one step say nothing new about them.
        let is_new_step = step != self.step;
        self.step = step;
        if self.settings.patience == 0 {
            return Vec::new();
        }
        let seen = Seen { line, step };
        let mut warnings = Vec::new();
        if is_new_step {
            warnings.extend(self.rewards(&seen));
            warnings.extend(self.lengths(&seen));
            warnings.extend(self.attack(&seen));
            warnings.extend(self.learning_rate(&seen));
        }
        warnings.extend(self.kl(&seen));
        warnings.extend(self.grad_norm(&seen));
        warnings.extend(self.loss(&seen));
        warnings
    }

    /// Whether to warn of `kind` now.
    fn tells(&mut self, kind: &'static str, is_bad: bool, patience: usize) -> bool {
        self.episodes.entry(kind).or_default().see(is_bad, patience, self.settings.window)
    }

    fn rewards(&mut self, seen: &Seen<'_>) -> Option<Warning> {
        let flat = seen.number("frac_groups_zero_std")?;
        let patience = self.settings.patience;
        // A mean that is absent is of no reward at all, a spread that is absent of one at most: nothing to compare with.
        let given = (seen.number("reward"), seen.number("reward_std"));
        let is_missing = matches!(given, (None, _) | (_, None));
        let is_dead = is_missing || given == (Some(0.0), Some(0.0));
        let tells_dead = self.tells("dead_rewards", is_dead, patience);
        let tells_flat = self.tells("no_reward_variance", flat >= 1.0 && !is_dead, patience);
        if tells_dead && is_missing {
            let message = format!(
                "for {patience} steps there were no rewards to learn from, and this step gave at most one: see `rewards/*/missing`, the share of completions that a reward was not given for, and what `train.grpo.reward_command` answers to the lines of completions.jsonl; null is no reward"
            );
            let missing = |name: &&str| name.starts_with("rewards/") && name.ends_with("/missing");
            let names: Vec<&str> = seen.line.keys().map(String::as_str).filter(missing).collect();
            let names = [&["reward", "frac_groups_zero_std"][..], &names].concat();
            return Some(seen.warning("dead_rewards", message, &names));
        }
        if tells_dead {
            let message = format!(
                "every reward has been 0 for {patience} steps, so nothing is learnt: read completions.jsonl. Is the answer there but not in the form that is rewarded (`prompt` and `train.target` must ask for the same), cut off (`max_new_tokens`), or never right (begin from a model trained with `sft`)?"
            );
            return Some(seen.warning(
                "dead_rewards",
                message,
                &["reward", "reward_std", "rewards/format/mean"],
            ));
        }
        tells_flat.then(|| {
            let message = format!(
                "for {patience} steps all completions of each question earned the same, so nothing is learnt: raise `train.grpo.temperature` or `train.grpo.group_size`, set `train.grpo.max_resamples`, or take {} questions",
                if seen.number("rewards/accuracy/mean").is_some_and(|accuracy| accuracy > 0.5) { "harder" } else { "easier" }
            );
            seen.warning("no_reward_variance", message, &["frac_groups_zero_std", "reward", "reward_std", "entropy"])
        })
    }

    fn lengths(&mut self, seen: &Seen<'_>) -> Vec<Warning> {
        let WatchSettings { patience, window, min_length_ratio, max_clipped_ratio, .. } = *self.settings;
        let mut warnings = Vec::new();
        if let Some(length) = seen.number("completions/mean_length") {
            let level = self.levels.entry("length").or_default();
            level.push(length, window);
            let (early, late) = (mean(level.first.iter()), mean(level.last.iter()));
            let is_full = level.last.len() == window;
            if self.tells("length_collapse", is_full && late < min_length_ratio * early, 1) {
                let message = format!(
                    "completions have become short: {late:.1} tokens in the mean of {window} steps, {early:.1} in the first {window}. Read completions.jsonl: a reasoning that is no longer there earns as much where only the letter is rewarded; lower `train.learning_rate` or raise `train.grpo.kl_coef`"
                );
                let mut warning = seen.warning("length_collapse", message, &["completions/mean_length"]);
                warning
                    .figures
                    .extend([("early".to_owned(), json!(early)), ("late".to_owned(), json!(late))]);
                warnings.push(warning);
            }
        }
        if let Some(clipped) = seen.number("completions/clipped_ratio")
            && self.tells("length_limit", clipped >= max_clipped_ratio, patience)
        {
            let message = format!(
                "for {patience} steps at least {:.0} % of the completions were cut off at the longest length: raise `max_new_tokens`, or leave them out of the loss with `train.grpo.mask_truncated`; a model that never ends its turn has not learnt to",
                100.0 * max_clipped_ratio
            );
            let names = ["completions/clipped_ratio", "completions/mean_length", "completions/max_length"];
            warnings.push(seen.warning("length_limit", message, &names));
        }
        warnings
    }

    fn attack(&mut self, seen: &Seen<'_>) -> Option<Warning> {
        let (gain, epsilon) = (seen.number("pgd_gain")?, seen.number("epsilon")?);
        let WatchSettings { patience, min_pgd_gain, .. } = *self.settings;
        self.tells("pgd_without_effect", gain < min_pgd_gain && epsilon > 0.0, patience).then(|| {
            let message = format!(
                "for {patience} steps the attack raised the loss by less than {min_pgd_gain} nats: this is training on clean images. See whether `safemed attack` passes its gradient check on this model, and `train.adversary` (`epsilon`, `step_size`, `num_steps`, `objective`); a model that does not look at the image cannot be attacked either"
            );
            seen.warning("pgd_without_effect", message, &["pgd_gain", "loss_clean", "loss_adversarial", "epsilon"])
        })
    }

    fn learning_rate(&mut self, seen: &Seen<'_>) -> Option<Warning> {
        let rate = seen.number("learning_rate")?;
        // The first step of a warm-up has the rate 0, and one such step is no trouble.
        self.tells("learning_rate_zero", rate == 0.0, 2).then(|| {
            let message = "the learning rate is 0, so nothing is learnt: see `train.learning_rate`, `train.warmup_steps` and `train.min_learning_rate_ratio`";
            seen.warning("learning_rate_zero", message.to_owned(), &["learning_rate"])
        })
    }

    fn kl(&mut self, seen: &Seen<'_>) -> Option<Warning> {
        let kl = seen.number("kl")?;
        let WatchSettings { window, spike_factor, max_kl, .. } = *self.settings;
        let usual = self.levels.entry("kl").or_default().medians(window).map(|(_, late)| late);
        // Early on it grows from nothing, which is no explosion.
        let is_spike = kl > 0.1 * max_kl && usual.is_some_and(|usual| kl > spike_factor * usual);
        let is_bad = kl > max_kl || is_spike;
        if !is_bad {
            self.levels.entry("kl").or_default().push(kl, window);
        }
        self.tells("kl", is_bad, 1).then(|| {
            let message = format!(
                "the policy runs away from its reference: the divergence is {kl:.3} nats per token{}. Lower `train.learning_rate`, raise `train.grpo.kl_coef`, and read completions.jsonl for words that only please the reward",
                usual.map_or_else(String::new, |usual| format!(", {usual:.3} in the steps before"))
            );
            seen.warning("kl", message, &["kl"]).with("usual", usual)
        })
    }

    fn grad_norm(&mut self, seen: &Seen<'_>) -> Option<Warning> {
        // A step without any group to learn from has no gradient.
        let norm = seen.number("grad_norm").filter(|norm| *norm > 0.0)?;
        let usual = self.spike("grad_norm", norm, |_| true);
        self.tells("grad_norm", usual.is_some(), 1).then(|| {
            let usual = usual.unwrap_or_default();
            let message = format!(
                "the gradient has grown to {norm:.3} from {usual:.3} in the steps before (median): lower `train.learning_rate` or `train.max_grad_norm`; one bad batch shows in the next step again as usual"
            );
            seen.warning("grad_norm", message, &["grad_norm", "loss"]).with("usual", Some(usual))
        })
    }

    fn loss(&mut self, seen: &Seen<'_>) -> Option<Warning> {
        // A policy's loss is about zero by construction: its size says nothing, nor where no completion was given a reward.
        if seen.number("reward").is_some() || seen.number("frac_groups_zero_std").is_some() {
            return None;
        }
        let loss = seen.number("loss")?;
        let usual = self.spike("loss", loss, |early| loss > 0.5 * early);
        self.tells("loss", usual.is_some(), 1).then(|| {
            let usual = usual.unwrap_or_default();
            let message = format!(
                "the loss has jumped to {loss:.3} from {usual:.3} in the steps before (median): what was learnt may be lost. Lower `train.learning_rate`, lengthen `train.warmup_steps`, or set `train.max_grad_norm`"
            );
            seen.warning("loss", message, &["loss", "grad_norm"]).with("usual", Some(usual))
        })
    }

    /// The usual level of `name` if `value` is a spike above it that `counts` beside the first level; otherwise it becomes part of
    /// that level.
    fn spike(&mut self, name: &'static str, value: f64, counts: impl Fn(f64) -> bool) -> Option<f64> {
        let WatchSettings { window, spike_factor, .. } = *self.settings;
        let level = self.levels.entry(name).or_default();
        if let Some((early, late)) = level.medians(window)
            && value > spike_factor * late
            && counts(early)
        {
            return Some(late);
        }
        level.push(value, window);
        None
    }
}

/// A line of metrics.
struct Seen<'a> {
    line: &'a Map<String, Value>,
    step: u64,
}

impl Seen<'_> {
    fn number(&self, name: &str) -> Option<f64> {
        self.line.get(name)?.as_f64()
    }

    /// A warning with those of the figures `names` that the line has.
    fn warning(&self, kind: &'static str, message: String, names: &[&str]) -> Warning {
        let figures =
            names.iter().filter_map(|name| Some(((*name).to_owned(), self.line.get(*name)?.clone())));
        Warning { step: self.step, kind, message, figures: figures.collect() }
    }
}

impl Warning {
    fn with(mut self, name: &str, value: Option<f64>) -> Self {
        self.figures.extend(value.map(|value| (name.to_owned(), json!(value))));
        self
    }
}

/// How many warnings of each kind there are, by kind.
pub fn counts(warnings: &[Value]) -> Value {
    let mut counts: BTreeMap<&str, u64> = BTreeMap::new();
    for kind in warnings.iter().filter_map(|warning| warning["kind"].as_str()) {
        *counts.entry(kind).or_default() += 1;
    }
    json!(counts)
}

fn mean<'a>(values: impl ExactSizeIterator<Item = &'a f64>) -> f64 {
    let count = values.len().max(1) as f64;
    values.sum::<f64>() / count
}

fn median<'a>(values: impl IntoIterator<Item = &'a f64>) -> f64 {
    let mut sorted: Vec<f64> = values.into_iter().copied().collect();
    sorted.sort_by(f64::total_cmp);
    sorted.get(sorted.len() / 2).copied().unwrap_or(0.0)
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Four steps of patience and of window, so that cases are short.
    fn settings() -> WatchSettings {
        WatchSettings { patience: 4, window: 4, ..WatchSettings::default() }
    }

    fn line(step: usize, numbers: &[(&str, f64)]) -> Value {
        let mut line = json!({"step": step});
        for (name, value) in numbers {
            line[*name] = json!(value);
        }
        line
    }

    /// The steps and kinds of the warnings about a course of numbers by name; the same after a resume at any step.
    fn warned(settings: &WatchSettings, course: &[Vec<(&str, f64)>]) -> Vec<(u64, &'static str)> {
        let lines: Vec<Value> = course.iter().enumerate().map(|(i, numbers)| line(i + 1, numbers)).collect();
        let from = |resumed: usize| -> Vec<Warning> {
            let mut watch = Watch::new(settings, &lines[..resumed]);
            lines[resumed..].iter().flat_map(|line| watch.see(line.as_object().unwrap())).collect()
        };
        let all = from(0);
        for resumed in 1..lines.len() {
            let rest: Vec<Warning> = all.iter().filter(|w| w.step > resumed as u64).cloned().collect();
            assert_eq!(from(resumed), rest, "resumed at {resumed}");
        }
        for warning in &all {
            assert!(
                !warning.figures.is_empty() && warning.figures.values().all(Value::is_number),
                "{warning:?}"
            );
            // Each says which setting or file to look at.
            assert!(warning.message.contains('`') || warning.message.contains(".jsonl"), "{warning:?}");
        }
        all.iter().map(|warning| (warning.step, warning.kind)).collect()
    }

    /// A course of one number, beside others that stay.
    fn course<'a>(name: &'a str, values: &[f64], others: &[(&'a str, f64)]) -> Vec<Vec<(&'a str, f64)>> {
        values.iter().map(|value| [&[(name, *value)][..], others].concat()).collect()
    }

    #[test]
    fn a_standing_trouble_is_told_once_and_again_after_it_was_away_for_a_window() {
        let dead = [("reward_std", 0.0), ("frac_groups_zero_std", 1.0)];
        let rewards = |values: &[f64]| warned(&settings(), &course("reward", values, &dead));
        assert_eq!(rewards(&[0.0; 3]), []);
        assert_eq!(rewards(&[0.0; 12]), [(4, "dead_rewards")]);
        // Three steps away are not the end of it, four are; the others have no variance either.
        let (bad, good) = ([0.0; 4], [0.5; 8]);
        let short = [&bad[..], &good[..3], &bad].concat();
        assert_eq!(rewards(&short), [(4, "dead_rewards")]);
        let long = [&bad[..], &good[..4], &bad].concat();
        assert_eq!(rewards(&long), [(4, "dead_rewards"), (8, "no_reward_variance"), (12, "dead_rewards")]);
        let off = WatchSettings { patience: 0, ..settings() };
        assert_eq!(warned(&off, &course("reward", &[0.0; 12], &dead)), []);
    }

    #[test]
    fn groups_without_variance_are_told_apart_from_dead_rewards() {
        let others = |accuracy| [("reward", 1.0), ("reward_std", 0.2), ("rewards/accuracy/mean", accuracy)];
        for (accuracy, advice) in [(0.9, "harder"), (0.1, "easier")] {
            let lines = course("frac_groups_zero_std", &[1.0; 9], &others(accuracy));
            assert_eq!(warned(&settings(), &lines), [(4, "no_reward_variance")]);
            let settings = settings();
            let mut watch = Watch::new(&settings, &[]);
            let said: Vec<Warning> =
                (1..5).flat_map(|i| watch.see(line(i, &lines[i]).as_object().unwrap())).collect();
            assert!(said[0].message.contains(advice), "{said:?}");
        }
        let mixed = course("frac_groups_zero_std", &[1.0, 1.0, 1.0, 0.9, 1.0, 1.0, 1.0, 0.5], &others(0.5));
        assert_eq!(warned(&settings(), &mixed), []);
    }

    #[test]
    fn rewards_that_nobody_gave_are_dead_and_their_name_is_told() {
        let missing = |share: f64| [("rewards/kind/missing", share), ("frac_groups_zero_std", 0.0)];
        let course: Vec<Vec<(&str, f64)>> = vec![missing(1.0).to_vec(); 9];
        assert_eq!(warned(&settings(), &course), [(4, "dead_rewards")]);
        // One completion that was given a reward has nothing to be compared with.
        let alone = [&missing(0.9)[..], &[("reward", 1.0)]].concat();
        assert_eq!(warned(&settings(), &vec![alone; 9]), [(4, "dead_rewards")]);
        let settings = settings();
        let mut watch = Watch::new(&settings, &[]);
        let said: Vec<Warning> =
            (1..5).flat_map(|i| watch.see(line(i, &course[i]).as_object().unwrap())).collect();
        assert!(said[0].message.contains("`rewards/*/missing`"), "{said:?}");
        assert_eq!(said[0].figures["rewards/kind/missing"], 1.0);
        // Two are enough for a spread, and the loss of a step without rewards is a policy's all the same.
        let two = [&missing(0.5)[..], &[("reward", 1.0), ("reward_std", 0.5)]].concat();
        assert_eq!(warned(&settings, &vec![two; 9]), []);
        let losses = [0.0, 0.0, 0.0, 0.0, 1.0].map(|loss| [&missing(1.0)[..], &[("loss", loss)]].concat());
        assert_eq!(warned(&settings, &losses), [(4, "dead_rewards")]);
    }

    #[test]
    fn lengths_that_collapse_or_reach_the_limit_are_told() {
        let lengths = |values: &[f64]| warned(&settings(), &course("completions/mean_length", values, &[]));
        let mut values = vec![100.0; 6];
        assert_eq!(lengths(&values), []);
        values.extend([20.0; 6]);
        // The mean of four is 40 after three of them, 20 after four: below a quarter of 100 only then.
        assert_eq!(lengths(&values), [(10, "length_collapse")]);
        values.truncate(8);
        values.extend([30.0; 9]);
        assert_eq!(lengths(&values), []);
        let clipped = |share| warned(&settings(), &course("completions/clipped_ratio", &[share; 9], &[]));
        assert_eq!(clipped(0.96), [(4, "length_limit")]);
        assert_eq!(clipped(0.94), []);
    }

    #[test]
    fn spikes_are_measured_against_the_median_and_do_not_become_usual() {
        let norms = |values: &[f64]| warned(&settings(), &course("grad_norm", values, &[]));
        assert_eq!(norms(&[1.0, 30.0, 1.0, 1.0, 9.0]), []);
        assert_eq!(norms(&[1.0, 1.0, 1.0, 1.0, 10.1]), [(5, "grad_norm")]);
        // It stays high: one episode, however long.
        let high = [&[1.0; 4][..], &[50.0; 20]].concat();
        assert_eq!(norms(&high), [(5, "grad_norm")]);
        // Steps without a gradient are no level to compare with.
        assert_eq!(norms(&[0.0, 0.0, 0.0, 0.0, 0.0, 5.0]), []);
        let losses =
            |values: &[f64], others: &[(&str, f64)]| warned(&settings(), &course("loss", values, others));
        let learnt = [3.0, 3.0, 3.0, 3.0, 0.1, 0.1, 0.1, 0.1];
        assert_eq!(losses(&[&learnt[..], &[1.2]].concat(), &[]), [], "a hard batch");
        let lost = [&learnt[..], &[1.6]].concat();
        assert_eq!(losses(&lost, &[]), [(9, "loss")]);
        assert_eq!(losses(&lost, &[("reward", 1.0)]), [], "a policy's");
    }

    #[test]
    fn a_divergence_may_grow_from_nothing_but_not_explode() {
        let kl = |values: &[f64]| warned(&settings(), &course("kl", values, &[]));
        assert_eq!(kl(&[0.0, 0.0, 0.0, 0.0, 0.001, 0.01, 0.05, 0.09]), []);
        assert_eq!(kl(&[0.01, 0.01, 0.01, 0.01, 0.11]), [(5, "kl")]);
        assert_eq!(kl(&[0.0, 1.1, 1.2]), [(2, "kl")]);
    }

    #[test]
    fn attacks_without_effect_and_no_learning_rate_are_told() {
        let gains =
            |gain, epsilon| warned(&settings(), &course("pgd_gain", &[gain; 9], &[("epsilon", epsilon)]));
        assert_eq!(gains(1e-4, 0.03), [(4, "pgd_without_effect")]);
        assert_eq!(gains(-0.1, 0.03), [(4, "pgd_without_effect")]);
        assert_eq!(gains(0.002, 0.03), []);
        assert_eq!(gains(0.0, 0.0), [], "a budget of nothing");
        let rates = |values: &[f64]| warned(&settings(), &course("learning_rate", values, &[]));
        assert_eq!(rates(&[0.0, 0.1, 0.1, 0.0]), [], "warm-up and end");
        assert_eq!(rates(&[0.0, 0.0, 0.0]), [(2, "learning_rate_zero")]);
        let hasty = WatchSettings { patience: 1, ..settings() };
        let rates = |values: &[f64]| warned(&hasty, &course("learning_rate", values, &[]));
        assert_eq!(rates(&[0.0, 0.1, 0.1]), [], "warm-up, whatever the patience");
        assert_eq!(rates(&[0.0, 0.0]), [(2, "learning_rate_zero")]);
    }

    #[test]
    fn further_updates_of_one_step_count_as_one_step() {
        let dead = [("reward", 0.0), ("reward_std", 0.0), ("frac_groups_zero_std", 1.0)];
        let settings = settings();
        let mut watch = Watch::new(&settings, &[]);
        let lines = (2..12).map(|i| line(i / 2, &dead));
        let warned: Vec<u64> =
            lines.flat_map(|line| watch.see(line.as_object().unwrap())).map(|w| w.step).collect();
        assert_eq!(warned, [4]);
        assert_eq!(
            counts(&[json!({"kind": "kl"}), json!({"kind": "loss"}), json!({"kind": "kl"})]),
            json!({"kl": 2, "loss": 1})
        );
    }
}
