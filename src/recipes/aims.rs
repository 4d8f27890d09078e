//! What an attack aims at: the completions whose likelihood it lowers or raises, and which of their tokens count.

use super::config::ObjectiveName;
use crate::attack::OptionLoss;
use crate::data::Sample;
use crate::data::prompt::PromptTemplate;
use crate::data::sample::reasoning_for;
use crate::error::{Error, Result};
use crate::model::assistant::Assistant;
use crate::model::generate::{Completion, Prompt};
use crate::rng;
use crate::roles::target::Aim;

/// What is attacked about one item.
#[derive(Debug, Clone, Copy)]
pub struct Asked<'a> {
    /// How the question is asked.
    pub template: PromptTemplate,
    /// Whether the right completion carries a reasoning.
    pub is_cot: bool,
    /// The loss.
    pub objective: ObjectiveName,
    /// Which wrong option `targeted` aims at: 1 is the first of them.
    pub target: usize,
    /// What the model itself says about the clean image: the prefix that the answer's loss is conditioned on.
    pub own: Option<&'a Completion>,
}

/// The aim of an attack on one item, at `model_size` (height, width).
///
/// - `completion`: the whole right completion.
/// - `finding`: its reasoning alone, the tokens that carry what is seen.
/// - `answer`: the letter, behind the model's own reasoning where it has given one.
/// - `margin`, `cross_entropy`, `dlr`, `targeted`: the right completion against those of the wrong options, each with the
///   reasoning that would lead to it (see [`OptionLoss`]).
///
/// # Errors
/// When the tokenizer lacks the token that ends a turn.
pub fn aim(
    assistant: &Assistant,
    sample: &Sample,
    asked: Asked<'_>,
    prompt: Prompt,
    model_size: [usize; 2],
) -> Result<Aim> {
    let right = assistant.target(&asked.template.target(sample, asked.is_cot))?;
    let whole = 0..right.len();
    let (completions, counted) = match asked.objective {
        ObjectiveName::Completion | ObjectiveName::All => (vec![right], vec![whole]),
        ObjectiveName::Finding => {
            let end = reasoning_end(assistant, &right)?.unwrap_or(right.len());
            (vec![right], vec![0..end])
        }
        ObjectiveName::Answer => {
            let forced = behind_own_reasoning(assistant, asked.own, &right)?;
            // The letter and what closes it; the prefix is given.
            let start = answer_start(assistant, &forced)?;
            let span = start..forced.len();
            (vec![forced], vec![span])
        }
        ObjectiveName::Margin
        | ObjectiveName::CrossEntropy
        | ObjectiveName::Dlr
        | ObjectiveName::Targeted => {
            if sample.options.len() < 2 {
                return Err(Error::data(format!(
                    "question `{}` has one option: nothing to attack towards\n   = help: leave it out, or use `--objective completion`",
                    sample.id
                )));
            }
            let mut completions = vec![right];
            for option in (0..sample.options.len()).filter(|&option| option != sample.answer) {
                let wrong = Sample {
                    answer: option,
                    reasoning: sample
                        .reasoning
                        .as_ref()
                        .map(|_| reasoning_for(&sample.modality, &sample.options[option])),
                    ..sample.clone()
                };
                completions.push(assistant.target(&asked.template.target(&wrong, asked.is_cot))?);
            }
            let counted = completions.iter().map(|completion| 0..completion.len()).collect();
            (completions, counted)
        }
    };
    let loss = match asked.objective {
        ObjectiveName::Margin => OptionLoss::Margin,
        ObjectiveName::CrossEntropy => OptionLoss::CrossEntropy,
        ObjectiveName::Dlr => OptionLoss::Dlr,
        ObjectiveName::Targeted => OptionLoss::Targeted(asked.target),
        _ => OptionLoss::Likelihood,
    };
    Ok(Aim {
        prompt,
        model_size,
        loss,
        completions,
        counted,
        answer: sample.answer,
        key: rng::key_of(&sample.id),
    })
}

/// One past the token that closes the reasoning.
fn reasoning_end(assistant: &Assistant, ids: &[u32]) -> Result<Option<usize>> {
    let close = assistant.tokenizer.encode("</think>")?;
    Ok(find(ids, &close).map(|at| at + close.len()))
}

/// Where the letter stands: behind the last opening answer tag.
fn answer_start(assistant: &Assistant, ids: &[u32]) -> Result<usize> {
    let open = assistant.tokenizer.encode("<answer>")?;
    Ok(find(ids, &open).map_or(0, |at| at + open.len()))
}

/// The model's own completion up to its answer tag, then the right answer from there on.
fn behind_own_reasoning(assistant: &Assistant, own: Option<&Completion>, right: &[u32]) -> Result<Vec<u32>> {
    let open = assistant.tokenizer.encode("<answer>")?;
    let own_prefix = own.and_then(|own| find(&own.ids, &open).map(|at| &own.ids[..at]));
    Ok(match (own_prefix, find(right, &open)) {
        (Some(prefix), Some(at)) => [prefix, &right[at..]].concat(),
        _ => right.to_vec(),
    })
}

fn find(ids: &[u32], wanted: &[u32]) -> Option<usize> {
    if wanted.is_empty() || wanted.len() > ids.len() {
        return None;
    }
    (0..=ids.len() - wanted.len()).rev().find(|&at| ids[at..at + wanted.len()] == *wanted)
}
