//! How far one gets at choices without looking: count, per group, how often each text was the right one, then take
//! the candidate with the highest count.
//!
//! Texts are compared lower-cased; of equal counts the first candidate wins.

use std::collections::HashMap;

use serde::{Deserialize, Serialize};

/// One choice among candidate texts.
#[derive(Debug, Clone, Copy)]
pub struct Choice<'a> {
    /// Choices of one group are counted together.
    pub group: &'a str,
    /// The candidates.
    pub candidates: &'a [String],
    /// Index of the right one.
    pub right: usize,
}

/// Where the counts of a prior come from.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum PriorSource {
    /// Other choices than those predicted.
    Train,
    /// The predicted choices themselves, each left out of its own counts. On a set in which every text is right
    /// equally often this falls below chance, because leaving one out makes the right text the rarest.
    LeaveOneOut,
}

/// Counts of right texts by group.
#[derive(Debug, Clone, Default)]
pub struct ChoicePrior {
    counts: HashMap<String, HashMap<String, u64>>,
}

impl ChoicePrior {
    /// Counts `choices`.
    pub fn fit<'a>(choices: impl IntoIterator<Item = Choice<'a>>) -> Self {
        let mut prior = Self::default();
        for choice in choices {
            if let Some(text) = choice.candidates.get(choice.right) {
                *prior
                    .counts
                    .entry(choice.group.to_owned())
                    .or_default()
                    .entry(text.to_lowercase())
                    .or_default() += 1;
            }
        }
        prior
    }

    /// How often `text` was right in `group`.
    pub fn count(&self, group: &str, text: &str) -> u64 {
        self.counts.get(group).and_then(|counts| counts.get(&text.to_lowercase())).copied().unwrap_or(0)
    }

    /// The candidate that was right most often; `choice.right` is not looked at.
    pub fn predict(&self, choice: &Choice<'_>) -> usize {
        self.best(choice, |_| 0)
    }

    /// As [`Self::predict`], with `choice` itself taken out of the counts.
    pub fn predict_left_out(&self, choice: &Choice<'_>) -> usize {
        let own = choice.candidates.get(choice.right).map(|text| text.to_lowercase());
        self.best(choice, |text| u64::from(own.as_deref() == Some(text.to_lowercase().as_str())))
    }

    fn best(&self, choice: &Choice<'_>, own: impl Fn(&str) -> u64) -> usize {
        let mut best = (0, 0);
        for (index, text) in choice.candidates.iter().enumerate() {
            let count = self.count(choice.group, text).saturating_sub(own(text));
            if count > best.1 {
                best = (index, count);
            }
        }
        best.0
    }
}

/// Predicts every choice of `choices` from the counts of `train`, or of `choices` themselves with each left out.
pub fn predict_all(train: Option<&[Choice<'_>]>, choices: &[Choice<'_>]) -> (Vec<usize>, PriorSource) {
    if let Some(train) = train {
        let prior = ChoicePrior::fit(train.iter().copied());
        return (choices.iter().map(|choice| prior.predict(choice)).collect(), PriorSource::Train);
    }
    let prior = ChoicePrior::fit(choices.iter().copied());
    (choices.iter().map(|choice| prior.predict_left_out(choice)).collect(), PriorSource::LeaveOneOut)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn texts(words: &str) -> Vec<String> {
        words.split(' ').map(str::to_owned).collect()
    }

    #[test]
    fn counts_are_by_group_and_ignore_case_and_ties_go_to_the_first() {
        let (abc, cba) = (texts("a b C"), texts("c B a"));
        let choice = |group, candidates, right| Choice { group, candidates, right };
        let prior = ChoicePrior::fit([
            choice("g", &abc, 2),
            choice("g", &abc, 2),
            choice("g", &abc, 1),
            choice("h", &abc, 1),
        ]);
        assert_eq!(prior.predict(&choice("g", &cba, 1)), 0);
        assert_eq!(prior.predict(&choice("h", &cba, 0)), 1);
        assert_eq!(prior.predict(&choice("nowhere", &cba, 2)), 0);
        assert_eq!((prior.count("g", "c"), prior.count("h", "C")), (2, 0));
    }

    #[test]
    fn a_choice_left_out_does_not_vote_for_itself() {
        let (first, second) = (texts("a b"), texts("b a"));
        let choices = [
            Choice { group: "g", candidates: &first, right: 0 },
            Choice { group: "g", candidates: &second, right: 0 },
        ];
        // Right texts are a and b once each: with itself left out, each item sees only the other's.
        assert_eq!(predict_all(None, &choices), (vec![1, 1], PriorSource::LeaveOneOut));
        assert_eq!(predict_all(Some(&choices[..1]), &choices), (vec![0, 1], PriorSource::Train));
    }
}
