//! Shares of right answers with Wilson intervals, over all items and by group.
//!
//! An answer that cannot be read counts as wrong and is counted apart; nothing is left out of a denominator.

use std::collections::BTreeMap;

use serde::{Deserialize, Serialize};

use crate::error::{Error, Result};
use crate::stats::interval::{Z_95, wilson};

/// What became of one item.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Outcome<'a> {
    /// Its modality.
    pub modality: &'a str,
    /// Its question type.
    pub question_type: &'a str,
    /// Index of the right option.
    pub answer: usize,
    /// Index of the predicted option; `None` when the answer could not be read.
    pub prediction: Option<usize>,
}

impl Outcome<'_> {
    /// Whether the prediction is right.
    pub fn is_correct(&self) -> bool {
        self.prediction == Some(self.answer)
    }
}

/// Accuracy over some items.
#[derive(Debug, Clone, Copy, PartialEq, Serialize, Deserialize)]
pub struct Accuracy {
    /// Items.
    pub n: u64,
    /// Right ones.
    pub correct: u64,
    /// Items whose answer could not be read (they are wrong).
    pub unparsable: u64,
    /// `correct / n`, in [0, 1].
    pub accuracy: f64,
    /// Wilson's 95 % interval.
    pub accuracy_interval: [f64; 2],
}

/// Accuracy over all items and by group; groups are in alphabetical order.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct AccuracyReport {
    /// Over all items.
    #[serde(flatten)]
    pub all: Accuracy,
    /// By modality.
    pub by_modality: BTreeMap<String, Accuracy>,
    /// By question type.
    pub by_question_type: BTreeMap<String, Accuracy>,
}

/// Accuracy from counts; `None` when `n` is 0, for there is no share of nothing.
pub fn from_counts(correct: u64, unparsable: u64, n: u64) -> Option<Accuracy> {
    (n > 0).then(|| Accuracy {
        n,
        correct,
        unparsable,
        accuracy: correct as f64 / n as f64,
        accuracy_interval: wilson(correct, n, Z_95),
    })
}

/// Accuracy of `outcomes`.
///
/// # Errors
/// [`Error::Data`] when there are none.
pub fn report(outcomes: &[Outcome<'_>]) -> Result<AccuracyReport> {
    let all = of(outcomes.iter())
        .ok_or_else(|| Error::data("no item was evaluated: there is no accuracy of nothing"))?;
    Ok(AccuracyReport {
        all,
        by_modality: grouped(outcomes, |outcome| outcome.modality),
        by_question_type: grouped(outcomes, |outcome| outcome.question_type),
    })
}

/// The accuracy of each group as a plain number in [0, 1].
pub fn shares(groups: &BTreeMap<String, Accuracy>) -> BTreeMap<&str, f64> {
    groups.iter().map(|(name, group)| (name.as_str(), group.accuracy)).collect()
}

fn of<'a>(outcomes: impl Iterator<Item = &'a Outcome<'a>>) -> Option<Accuracy> {
    let (mut correct, mut unparsable, mut n) = (0, 0, 0);
    for outcome in outcomes {
        n += 1;
        correct += u64::from(outcome.is_correct());
        unparsable += u64::from(outcome.prediction.is_none());
    }
    from_counts(correct, unparsable, n)
}

fn grouped<'a>(outcomes: &'a [Outcome<'a>], key: fn(&Outcome<'a>) -> &'a str) -> BTreeMap<String, Accuracy> {
    let mut groups: BTreeMap<String, Vec<&Outcome<'_>>> = BTreeMap::new();
    for outcome in outcomes {
        groups.entry(key(outcome).to_owned()).or_default().push(outcome);
    }
    groups
        .into_iter()
        .filter_map(|(name, members)| of(members.into_iter()).map(|accuracy| (name, accuracy)))
        .collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn unreadable_answers_are_wrong_and_stay_in_the_denominator() {
        let outcome =
            |modality, question_type, prediction| Outcome { modality, question_type, answer: 1, prediction };
        let report = report(&[
            outcome("CT", "x", Some(1)),
            outcome("CT", "y", None),
            outcome("MRI", "y", Some(0)),
            outcome("MRI", "y", Some(1)),
        ])
        .unwrap();
        assert_eq!(
            (report.all.n, report.all.correct, report.all.unparsable, report.all.accuracy),
            (4, 2, 1, 0.5)
        );
        assert_eq!(report.by_modality["CT"].accuracy, 0.5);
        assert_eq!(report.by_question_type["y"].accuracy, 1.0 / 3.0);
        assert_eq!(report.by_question_type["y"].accuracy_interval, wilson(1, 3, Z_95));
        assert_eq!(shares(&report.by_modality), BTreeMap::from([("CT", 0.5), ("MRI", 0.5)]));
        let json = serde_json::to_value(&report).unwrap();
        assert_eq!(json["accuracy"], 0.5);
        assert_eq!(json["by_modality"]["MRI"]["unparsable"], 0);
    }

    #[test]
    fn no_items_are_an_error_and_not_a_zero() {
        assert!(report(&[]).is_err());
        assert_eq!(from_counts(0, 0, 0), None);
    }
}
