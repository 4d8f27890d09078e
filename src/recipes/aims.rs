//! What an attack aims at: the completions whose likelihood it lowers or raises, and which of their tokens count.

use super::config::ObjectiveName;
use crate::attack::OptionLoss;
use crate::data::Sample;
use crate::data::prompt::PromptTemplate;
use crate::data::sample::reasoning_for;
use crate::error::{Error, Result};
use crate::model::assistant::Assistant;
use crate::model::generate::{Completion, Prompt};
use crate::model::tokenizer::Tokenizer;
use crate::rng;
use crate::roles::target::Aim;
use std::ops::Range;

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
/// - `finding`: its reasoning alone, the tokens that carry what is seen; all of a completion without one.
/// - `answer`: the letter and what closes it, behind the model's own reasoning where it has given one.
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
    let text = asked.template.target(sample, asked.is_cot);
    let right = assistant.target(&text)?;
    let whole = 0..right.len();
    let (completions, counted) = match asked.objective {
        ObjectiveName::Completion | ObjectiveName::All => (vec![right], vec![whole]),
        ObjectiveName::Finding => {
            let span = Spelled::new(assistant, &right)?.reasoning()?;
            (vec![right], vec![span])
        }
        ObjectiveName::Answer => {
            let forced = behind_own_reasoning(assistant, asked.own, &text)?.unwrap_or(right);
            let span = Spelled::new(assistant, &forced)?.answer()?;
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

/// Tokens with the text that they spell. A tag need not be a token, nor begin or end with one: `><` is one of many vocabularies.
struct Spelled<'a> {
    tokenizer: &'a Tokenizer,
    ids: &'a [u32],
    text: String,
}

impl<'a> Spelled<'a> {
    fn new(assistant: &'a Assistant, ids: &'a [u32]) -> Result<Self> {
        let tokenizer = &assistant.tokenizer;
        Ok(Self { tokenizer, ids, text: tokenizer.decode(ids, false)? })
    }

    /// Bytes of the text that the first `count` tokens spell, without a last character that is not whole yet; and whether
    /// that is all they spell.
    fn bytes_of(&self, count: usize) -> Result<(usize, bool)> {
        let part = self.tokenizer.decode(&self.ids[..count], false)?;
        let alike = part.chars().zip(self.text.chars()).take_while(|(a, b)| a == b);
        let bytes = alike.map(|(char, _)| char.len_utf8()).sum();
        Ok((bytes, bytes == part.len()))
    }

    /// The fewest tokens that spell the first `bytes` bytes.
    fn tokens_for(&self, bytes: usize) -> Result<usize> {
        let (mut low, mut high) = (0, self.ids.len());
        while low < high {
            let middle = usize::midpoint(low, high);
            if self.bytes_of(middle)?.0 >= bytes {
                high = middle;
            } else {
                low = middle + 1;
            }
        }
        Ok(low)
    }

    /// The token that holds the byte at `at`.
    fn token_at(&self, at: usize) -> Result<usize> {
        Ok(self.tokens_for(at + 1)?.saturating_sub(1))
    }

    /// The tokens of the reasoning with its tags; all, where there is none.
    fn reasoning(&self) -> Result<Range<usize>> {
        let (Some(open), Some(close)) = (self.text.find("<think>"), self.text.rfind(THINK_END)) else {
            return Ok(0..self.ids.len());
        };
        Ok(self.token_at(open)?..self.tokens_for(close + THINK_END.len())?)
    }

    /// The tokens from the letter on to the tag that closes it, and to the end where nothing is said after it; all, where there
    /// is no such tag.
    fn answer(&self) -> Result<Range<usize>> {
        let Some(open) = self.text.rfind(ANSWER) else { return Ok(0..self.ids.len()) };
        let letter = open + ANSWER.len();
        let rest = &self.text[letter..];
        let close = rest.find(ANSWER_END).map(|at| letter + at + ANSWER_END.len());
        let end = match close.filter(|&close| self.text[close..].contains("<think>")) {
            Some(close) => self.tokens_for(close)?,
            None => self.ids.len(),
        };
        Ok(self.token_at(letter)?..end)
    }
}

const THINK_END: &str = "</think>";
const ANSWER: &str = "<answer>";
const ANSWER_END: &str = "</answer>";

/// The model's own completion up to its answer tag, then the right one, `text`, from there on; none, where either has no tag.
fn behind_own_reasoning(
    assistant: &Assistant,
    own: Option<&Completion>,
    text: &str,
) -> Result<Option<Vec<u32>>> {
    let (Some(own), Some(right)) = (own, text.rfind(ANSWER)) else { return Ok(None) };
    let own = Spelled::new(assistant, &own.ids)?;
    let Some(tag) = own.text.rfind(ANSWER) else { return Ok(None) };
    // Back to a token that ends with a whole character; what lies between it and the tag is spelled again.
    let mut kept = own.token_at(tag)?;
    while !own.bytes_of(kept)?.1 {
        kept -= 1;
    }
    let between = &own.text[own.bytes_of(kept)?.0..tag];
    let rest = assistant.target(&format!("{between}{}", &text[right..]))?;
    Ok(Some([&own.ids[..kept], &rest].concat()))
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::model::tokenizer::{REASONING_TOKENS, train_bpe};
    use crate::recipes::scratch::Scratch;
    use candle_core::Device;

    const REASONING: &str = "The organ is on the lower left.";

    fn sample() -> Sample {
        Sample { answer: 1, reasoning: Some(REASONING.into()), ..Sample::for_test(0) }
    }

    /// Assistants whose tags are tokens, many tokens that run into their neighbours, and parts of longer tokens.
    fn assistants() -> Vec<Assistant> {
        let base = Scratch::tiny().build(&[], &[], 0, &|_| false, &Device::Cpu).unwrap();
        let text = format!("<think> {REASONING}</think><answer> B</answer><think> right</think>");
        let texts = vec![text; 50];
        [&REASONING_TOKENS[..], &[], &["<answer> B</answer>"]]
            .into_iter()
            .map(|added| {
                let tokenizer = train_bpe(&texts, 256 + 8 + added.len() + 60, added).unwrap();
                Assistant { tokenizer, ..base.clone() }
            })
            .collect()
    }

    fn aimed(
        assistant: &Assistant,
        template: PromptTemplate,
        objective: ObjectiveName,
        own: Option<&Completion>,
    ) -> (String, String) {
        let asked = Asked { template, is_cot: true, objective, target: 1, own };
        let prompt = Prompt::of_ids(assistant.vlm.config(), vec![1], &[]).unwrap();
        let aim = aim(assistant, &sample(), asked, prompt, [8, 8]).unwrap();
        let (ids, counted) = (&aim.completions[0], aim.counted[0].clone());
        let say = |ids: &[u32]| assistant.tokenizer.decode(ids, false).unwrap();
        (say(ids), say(&ids[counted]))
    }

    #[test]
    fn what_counts_is_the_reasoning_or_the_letter_whatever_the_tokens_of_the_tags() {
        let assistants = assistants();
        let joined = assistants[1].tokenizer.encode("</think><answer>").unwrap();
        let open = assistants[1].tokenizer.encode("<answer>").unwrap();
        assert!(
            joined[joined.len() - open.len()..] != open[..],
            "the tags must run into each other: {joined:?}"
        );
        for (which, assistant) in assistants.iter().enumerate() {
            for template in [PromptTemplate::MedR1Think, PromptTemplate::ThinkAfter] {
                let (_, said) = aimed(assistant, template, ObjectiveName::Finding, None);
                let what = format!("{which} {template}: {said}");
                assert!(said.contains(&format!("<think> {REASONING}</think>")), "{what}");
                assert!(!said.contains(" B"), "{what}");
                let (_, said) = aimed(assistant, template, ObjectiveName::Answer, None);
                let what = format!("{which} {template}: {said}");
                assert!(said.contains(" B</answer>") && !said.contains("organ"), "{what}");
                let is_last = template == PromptTemplate::MedR1Think;
                assert_eq!(said.contains("<|im_end|>"), is_last, "{what}");
            }
        }
    }

    #[test]
    fn the_right_letter_comes_behind_the_models_own_reasoning_to_the_byte() {
        for (which, assistant) in assistants().iter().enumerate() {
            for own_text in [
                "<think> é, on the left.</think><answer> A</answer>",
                "<think> right\n<answer>A",
                "<answer> A",
            ] {
                let ids = assistant.tokenizer.encode(own_text).unwrap();
                let own = Completion { ids, ..Completion::default() };
                let template = PromptTemplate::MedR1Think;
                let (whole, counted) = aimed(assistant, template, ObjectiveName::Answer, Some(&own));
                let before = own_text.split_once("<answer>").unwrap().0;
                assert_eq!(whole, format!("{before}<answer> B</answer><|im_end|>"), "{which}");
                assert!(
                    counted.contains(" B</answer><|im_end|>") && !counted.contains("think"),
                    "{which} {counted}"
                );
            }
            // Without a tag of its own there is nothing to stand behind.
            let ids = assistant.tokenizer.encode("It is A").unwrap();
            let own = Completion { ids, ..Completion::default() };
            let (whole, _) = aimed(assistant, PromptTemplate::MedR1Think, ObjectiveName::Answer, Some(&own));
            assert!(whole.starts_with(&format!("<think> {REASONING}")), "{whole}");
        }
    }
}
