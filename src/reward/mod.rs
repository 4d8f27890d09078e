//! What a completion is worth: whether it chooses the right option, and whether it has the form asked for.
//!
//! One judge for evaluation and reinforcement learning: both read answers with [`answer::parse_answer`]. Beside it stand
//! penalties on length and repetition, and whatever a [`command`] of the user's says. Nothing here knows a model, a token
//! or an image.

pub mod answer;
pub mod command;
pub mod format;
pub mod overlong;
pub mod repetition;

use serde::{Deserialize, Serialize};

use crate::error::ConfigError;
pub use answer::parse_answer;
pub use format::Format;

/// How rewards are made of their parts.
#[derive(Debug, Clone, Copy, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct RewardConfig {
    /// Weight of the right answer; at least 0. Med-R1 (arXiv 2503.13939) uses 1.
    pub accuracy_weight: f64,
    /// Weight of the right form; at least 0. Med-R1 uses 1.
    pub format_weight: f64,
    /// Grades the answer as MedVLM-R1 (arXiv 2502.19634) does: 1 for the bare letter in the tag, 0.5 for the letter
    /// with more text in the tag, 0 without a tag. Otherwise the right option is worth 1 however it is written.
    ///
    /// Deviation: its public code counts every A to J of the tag's text, so that the words of `B. Benign` hide the letter and
    /// `B.` is more than the bare letter; here the answer parser says what is a letter, and brackets and marks are no text.
    pub graded: bool,
}

impl Default for RewardConfig {
    fn default() -> Self {
        Self { accuracy_weight: 1.0, format_weight: 1.0, graded: false }
    }
}

/// The reward of one completion with its parts.
#[derive(Debug, Clone, Copy, PartialEq, Default, Serialize)]
pub struct Rewards {
    /// The answer's part before weighting, in [0, 1].
    pub accuracy: f64,
    /// The form's part before weighting: 0 or 1.
    pub format: f64,
    /// The weighted sum.
    pub total: f64,
}

impl RewardConfig {
    /// Everything that is wrong with the values; empty when nothing is.
    pub fn check(&self) -> Vec<ConfigError> {
        let mut problems = Vec::new();
        for (key, weight) in
            [("accuracy_weight", self.accuracy_weight), ("format_weight", self.format_weight)]
        {
            if !(weight.is_finite() && weight >= 0.0) {
                let message = format!("{key} is {weight}, it must be a finite number of at least 0");
                let help = format!("set {key} = 1.0, or 0.0 to leave it out");
                problems.push(ConfigError::new(key, message).with_help(help));
            }
        }
        problems
    }

    /// Scores `completion` for a question whose right option is `answer_idx` of `options`.
    ///
    /// `format` is the form asked for; `true` stands for reasoning then answer, `false` for the answer alone.
    pub fn score<'a>(
        &self,
        completion: &str,
        answer_idx: usize,
        options: impl Into<answer::Options<'a>>,
        format: impl Into<Format>,
    ) -> Rewards {
        let accuracy = match answer::parse(completion, options) {
            Some(parsed) if parsed.option == answer_idx => match (self.graded, parsed.tagged, parsed.bare) {
                (false, _, _) | (true, true, true) => 1.0,
                (true, true, false) => 0.5,
                (true, false, _) => 0.0,
            },
            _ => 0.0,
        };
        let format = f64::from(u8::from(format.into().matches(completion)));
        Rewards { accuracy, format, total: self.accuracy_weight * accuracy + self.format_weight * format }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn parts_are_named_weighted_and_added() {
        let config = RewardConfig { accuracy_weight: 1.0, format_weight: 0.25, graded: false };
        let good = "<think> x</think><answer> B</answer>";
        for (completion, answer, think, accuracy, format) in [
            (good, 1, true, 1.0, 1.0),
            (good, 0, true, 0.0, 1.0),
            (good, 1, false, 1.0, 0.0),
            ("<answer>B. cyst</answer>", 1, true, 1.0, 0.0),
            ("B", 1, false, 1.0, 0.0),
            ("", 1, false, 0.0, 0.0),
        ] {
            let rewards = config.score(completion, answer, 4, think);
            assert_eq!(
                rewards,
                Rewards { accuracy, format, total: accuracy + 0.25 * format },
                "{completion}"
            );
        }
    }

    #[test]
    fn grading_halves_extra_text_and_asks_for_the_tag() {
        let config = RewardConfig { graded: true, format_weight: 0.0, ..RewardConfig::default() };
        for (completion, expected) in [
            ("<answer> B </answer>", 1.0),
            ("<answer>(B)</answer>", 1.0),
            ("<answer>B. cyst</answer>", 0.5),
            ("<answer>the answer is B</answer>", 0.5),
            ("B", 0.0),
            ("<answer>C</answer>", 0.0),
            ("<answer>B or C</answer>", 0.0),
        ] {
            assert_eq!(config.score(completion, 1, 4, true).total, expected, "{completion}");
        }
    }

    #[test]
    fn weights_out_of_range_are_named() {
        assert!(RewardConfig::default().check().is_empty());
        let bad = RewardConfig { accuracy_weight: f64::NAN, format_weight: -1.0, graded: false };
        assert_eq!(
            bad.check().iter().map(|problem| problem.key.as_str()).collect::<Vec<_>>(),
            ["accuracy_weight", "format_weight"]
        );
        let idle = RewardConfig { accuracy_weight: 0.0, format_weight: 0.0, graded: true };
        assert!(idle.check().is_empty(), "other rewards may have the weight");
    }
}
