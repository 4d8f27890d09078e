//! What an attack aims at: the completions whose likelihood it lowers or raises, and which of their tokens count.

use super::config::ObjectiveName;
use crate::data::Sample;
use crate::data::prompt::PromptTemplate;
use crate::data::sample::reasoning_for;
use crate::error::Result;
use crate::model::assistant::Assistant;
use crate::model::generate::{Completion, Prompt};
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
    /// What the model itself says about the clean image: the prefix that the answer's loss is conditioned on.
    pub own: Option<&'a Completion>,
}

/// The aim of an attack on one item, at `model_size` (height, width).
///
/// - `completion`: the whole right completion.
/// - `finding`: its reasoning alone, the tokens that carry what is seen.
/// - `answer`: the letter, behind the model's own reasoning where it has given one.
/// - `margin`: the right completion against the likeliest wrong one, each wrong option with the reasoning that would
///   lead to it.
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
        ObjectiveName::Margin => {
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
    Ok(Aim {
        prompt,
        model_size,
        completions,
        counted,
        answer: sample.answer,
        num_options: sample.options.len(),
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
