//! The records of the contract: one object an item, from which every table is computed.
//!
//! Answers, predictions and counts are option letters; "none" is the class of an answer that cannot be read.

use serde::{Deserialize, Serialize};
use std::collections::BTreeMap;

/// The word for an answer that cannot be read.
pub const NONE: &str = "none";

/// The letter of an option, "none" without one.
pub fn letter(option: Option<usize>) -> String {
    match option.and_then(|index| u8::try_from(index).ok()).filter(|index| *index < 26) {
        Some(index) => char::from(b'A' + index).to_string(),
        None => NONE.to_owned(),
    }
}

/// Letters predicted without sight of the right image.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Controls {
    /// The model on a uniform image.
    pub blank_image: String,
    /// The model on another item's image.
    pub shuffled_image: String,
    /// The option text that was most often right in training.
    pub option_prior: String,
}

/// One item of `eval`.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct EvalRecord {
    /// The question's id.
    pub id: String,
    /// Data set it belongs to.
    pub dataset: String,
    /// Modality under its usual name.
    pub modality: String,
    /// Modality as the file spells it.
    pub modality_raw: String,
    /// Question type.
    pub question_type: String,
    /// The question.
    pub question: String,
    /// Texts of the options in order.
    pub options: Vec<String>,
    /// Right letter.
    pub answer: String,
    /// Predicted letter, or "none".
    pub prediction: String,
    /// Whether they agree.
    pub correct: bool,
    /// The model's own words.
    pub completion: String,
    /// Probability of each option in order; absent when answers are generated only.
    pub probabilities: Option<Vec<f64>>,
    /// What is predicted without the image.
    pub controls: Controls,
    /// How the image's numbers became eight bits: `8-bit`, or what was done.
    #[serde(default)]
    pub image_reading: String,
}

/// One item of `attack`.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct AttackRecord {
    /// The question's id.
    pub id: String,
    /// The attack.
    pub method: String,
    /// The norm of the budget.
    pub norm: String,
    /// Where pixels were changed.
    pub space: String,
    /// Budget for pixels in [0, 1].
    pub epsilon: f64,
    /// Length of one step.
    pub step_size: f64,
    /// Gradient steps of one start.
    pub num_steps: usize,
    /// Starts.
    pub num_restarts: usize,
    /// What was maximised.
    pub objective: String,
    /// Right letter.
    pub answer: String,
    /// Letter predicted on the clean image.
    pub clean_prediction: String,
    /// Whether it is right.
    pub clean_correct: bool,
    /// Letter predicted on the attacked image.
    pub adversarial_prediction: String,
    /// Right when clean and under attack.
    pub robust_correct: bool,
    /// The objective on the clean image, nats.
    pub loss_clean: Option<f64>,
    /// The objective on the attacked image, nats.
    pub loss_adversarial: Option<f64>,
    /// Largest change of any channel value, measured on the 8-bit file, in [0, 1].
    pub linf: f64,
    /// Euclidean length of the change, measured on the 8-bit file.
    pub l2: f64,
    /// Path of the image, relative to the data root.
    pub image: String,
    /// Path of the attacked image, relative to the run directory; absent when it was not attacked.
    pub adversarial_image: Option<String>,
    /// Whatever a report shows beside the contract's fields: question, completions, modality, question type.
    #[serde(flatten)]
    pub more: serde_json::Map<String, serde_json::Value>,
}

/// One item of `certify`.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct CertifyRecord {
    /// The question's id.
    pub id: String,
    /// Right letter.
    pub answer: String,
    /// Certified letter; absent when abstained.
    pub prediction: Option<String>,
    /// Whether the draws were too divided to answer.
    pub abstained: bool,
    /// Whether the certified letter is right.
    pub correct: bool,
    /// L2 radius for pixels in [0, 1]; 0 when abstained.
    pub radius: f64,
    /// Lower bound of the winning class's probability.
    pub p_lower: f64,
    /// Standard deviation of the noise.
    pub sigma: f64,
    /// How draws were spent.
    pub mode: String,
    /// The radius to decide, when there was one.
    pub target_radius: Option<f64>,
    /// Draws that selected the class.
    pub n0: u64,
    /// Draws that estimated its probability.
    pub n: u64,
    /// Cap on `n`.
    pub n_max: u64,
    /// Probability that the certificate is wrong.
    pub alpha: f64,
    /// Seed of the noise.
    pub seed: u64,
    /// Votes of the selection draws by letter.
    pub counts_selection: BTreeMap<String, u64>,
    /// Votes of the estimation draws by letter.
    pub counts: BTreeMap<String, u64>,
    /// Selection draws: first, and one past the last.
    pub draws_selection: [u64; 2],
    /// Estimation draws: first, and one past the last.
    pub draws_estimation: [u64; 2],
    /// Hash of the image file.
    pub image_sha256: String,
    /// Hash of the weights.
    pub model_sha256: String,
    /// The stopping rule of the sequential mode, its schedule and its count; modality and question type.
    #[serde(flatten)]
    pub more: serde_json::Map<String, serde_json::Value>,
}

/// Modality and question type among the further fields of a record.
pub fn groups_of(more: &serde_json::Map<String, serde_json::Value>) -> [&str; 2] {
    ["modality", "question_type"]
        .map(|key| more.get(key).and_then(serde_json::Value::as_str).unwrap_or("unknown"))
}

/// Votes by letter, `counts[num_options]` being those of "none"; classes without a vote are kept.
pub fn counts_by_letter(counts: &[u64]) -> BTreeMap<String, u64> {
    let last = counts.len().saturating_sub(1);
    counts
        .iter()
        .enumerate()
        .map(|(index, count)| (letter((index < last).then_some(index)), *count))
        .collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn letters_end_with_none() {
        assert_eq!(letter(Some(0)), "A");
        assert_eq!(letter(Some(4)), "E");
        assert_eq!(letter(None), "none");
        let counts = counts_by_letter(&[3, 0, 1, 0, 9]);
        assert_eq!(serde_json::to_string(&counts).unwrap(), r#"{"A":3,"B":0,"C":1,"D":0,"none":9}"#);
    }
}
