//! Named prompt templates: from a question to what the model is told, and to the completion that would be right.
//!
//! A template is words only. Chat roles, image tokens and special tokens belong to the checkpoint's processor.
//! The wording of the `med_r1` templates is that of Med-R1 (arXiv 2503.13939, its public code), to the letter, because
//! checkpoints trained with it expect it: `med_r1_think` and `med_r1_no_think` are those it evaluates with,
//! `med_r1_train` and `med_r1_train_no_think` those its reinforcement learning asks with. That of `medvlm_r1` is MedVLM-R1's (arXiv 2502.19634),
//! white space included, as its evaluation and its demonstration ask the published checkpoint; its training script
//! has the same words behind eight spaces instead of four.

use std::fmt;
use std::str::FromStr;

use serde::{Deserialize, Serialize};

use super::{Sample, letter};
use crate::error::{Error, Result};

/// A named way to ask.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, Serialize, Deserialize)]
#[serde(try_from = "String", into = "String")]
pub enum PromptTemplate {
    /// Reasoning in `<think>`, then the letter in `<answer>`.
    #[default]
    MedR1Think,
    /// The letter in `<answer>` and nothing else.
    MedR1NoThink,
    /// As `med_r1_think`, in the words of Med-R1's training: three numbered demands.
    MedR1Train,
    /// The letter in `<answer>` and nothing else, in the words of Med-R1's training without thinking: two numbered demands.
    MedR1TrainNoThink,
    /// The same demands as MedVLM-R1 makes them, one a line, options one a line too.
    MedVlmR1,
    /// The letter first, then the reasoning.
    ThinkAfter,
    /// One option per line and a request for the bare letter.
    Plain,
    /// Question and options only, then the word `answer`: for models trained here from scratch.
    Phantom,
    /// As `phantom`, but the last word is `think`.
    PhantomCot,
}

/// Every template with its name.
const NAMES: [(&str, PromptTemplate); 9] = [
    ("med_r1_think", PromptTemplate::MedR1Think),
    ("med_r1_no_think", PromptTemplate::MedR1NoThink),
    ("med_r1_train", PromptTemplate::MedR1Train),
    ("med_r1_train_no_think", PromptTemplate::MedR1TrainNoThink),
    ("medvlm_r1", PromptTemplate::MedVlmR1),
    ("think_after", PromptTemplate::ThinkAfter),
    ("plain", PromptTemplate::Plain),
    ("phantom", PromptTemplate::Phantom),
    ("phantom_cot", PromptTemplate::PhantomCot),
];

/// What people in the field call two of them. They are read like the names; written is always the name.
const ALIASES: [(&str, PromptTemplate); 2] =
    [("think", PromptTemplate::MedR1Think), ("no_think", PromptTemplate::MedR1NoThink)];

impl FromStr for PromptTemplate {
    type Err = Error;
    fn from_str(text: &str) -> Result<Self> {
        let words = || NAMES.iter().chain(&ALIASES);
        if let Some((_, template)) = words().find(|(word, _)| *word == text) {
            return Ok(*template);
        }
        let near = words().map(|(word, _)| (strsim::jaro_winkler(word, text), *word));
        let near = near.max_by(|a, b| a.0.total_cmp(&b.0)).filter(|(similarity, _)| *similarity > 0.75);
        let hint = near.map_or_else(String::new, |(_, word)| format!("did you mean `{word}`? "));
        let spelled = |(name, template): &(&str, PromptTemplate)| {
            let alias = ALIASES.iter().find(|(_, other)| other == template);
            alias.map_or_else(|| (*name).to_owned(), |(alias, _)| format!("{name} (or {alias})"))
        };
        let all: Vec<String> = NAMES.iter().map(spelled).collect();
        Err(Error::usage(format!("unknown prompt `{text}`\n   = help: {hint}there are {}", all.join(", "))))
    }
}

impl TryFrom<String> for PromptTemplate {
    type Error = Error;
    fn try_from(text: String) -> Result<Self> {
        text.parse()
    }
}

impl From<PromptTemplate> for String {
    fn from(template: PromptTemplate) -> Self {
        template.name().to_owned()
    }
}

impl fmt::Display for PromptTemplate {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.name())
    }
}

impl PromptTemplate {
    /// Every template's name, for help texts.
    pub fn names() -> impl Iterator<Item = &'static str> {
        NAMES.iter().map(|(name, _)| *name)
    }

    /// The name that selects it.
    pub fn name(self) -> &'static str {
        NAMES.iter().find(|(_, template)| *template == self).map_or("", |(name, _)| name)
    }

    /// The template with `{question}` and `{options}` in place: what provenance hashes.
    pub fn wording(self) -> &'static str {
        match self {
            Self::MedR1Think => {
                "{question}{options} Think through the question step by step in <think>...</think> tags. Then provide the correct single-letter choice (A, B, C, D,...) inside <answer>...</answer> tags."
            }
            Self::MedR1NoThink => {
                "{question}{options} Provide the correct single-letter choice (A, B, C, D,...) inside <answer>...</answer> tags."
            }
            Self::MedR1Train => {
                "{question}{options} Your task: 1. Think through the question step by step, enclose your reasoning process in <think>...</think> tags. 2. Then provide the correct single-letter choice (A, B, C, D,...) inside <answer>...</answer> tags. 3. No extra information or text outside of these tags."
            }
            Self::MedR1TrainNoThink => {
                "{question}{options} Your task: 1. Provide the correct single-letter choice (A, B, C, D,...) inside <answer>...</answer> tags. 2. No extra information or text outside of this tag."
            }
            Self::MedVlmR1 => {
                "\n    {question}{options} \n    Your task: \n    1. Think through the question step by step, enclose your reasoning process in <think>...</think> tags. \n    2. Then provide the correct single-letter choice (A, B, C, D,...) inside <answer>...</answer> tags.\n    3. No extra information or text outside of these tags.\n    "
            }
            Self::ThinkAfter => {
                "{question}{options} First provide the correct single-letter choice (A, B, C, D,...) inside <answer>...</answer> tags. Then explain the choice in <think>...</think> tags."
            }
            Self::Plain => "{question}{options}\nAnswer with the letter.",
            Self::Phantom => "{question}{options}\nanswer",
            Self::PhantomCot => "{question}{options}\nthink",
        }
    }

    /// What the user says about the image: question, options, instruction.
    pub fn user_text(self, sample: &Sample) -> String {
        // In two steps, so that braces inside a question are never taken for a placeholder.
        let (before, rest) = self.wording().split_once("{question}").unwrap_or(("", self.wording()));
        let (between, after) = rest.split_once("{options}").unwrap_or((rest, ""));
        format!("{before}{}{between}{}{after}", sample.question, self.options_text(sample))
    }

    /// The right completion: with `cot` the reasoning and the letter, without it the letter alone, in the form that
    /// this template asks for.
    pub fn target(self, sample: &Sample, cot: bool) -> String {
        let answer = format!("<answer> {}</answer>", sample.answer_letter());
        match self {
            Self::Plain if !cot => sample.answer_letter().to_string(),
            _ if !cot => answer,
            Self::ThinkAfter => format!("{answer}<think> {}</think>", sample.reasoning_text()),
            _ => format!("<think> {}</think>{answer}", sample.reasoning_text()),
        }
    }

    /// Whether the template asks for a reasoning.
    pub fn asks_for_reasoning(self) -> bool {
        matches!(
            self,
            Self::MedR1Think | Self::MedR1Train | Self::MedVlmR1 | Self::ThinkAfter | Self::PhantomCot
        )
    }

    /// Whether it says in words what form a completion has. The two for models from scratch end in a word that has the
    /// meaning that training gives it.
    pub fn instructs(self) -> bool {
        !matches!(self, Self::Phantom | Self::PhantomCot)
    }

    fn options_text(self, sample: &Sample) -> String {
        let lettered = sample.options.iter().enumerate().map(|(index, option)| (letter(index), option));
        match self {
            Self::MedR1Think
            | Self::MedR1NoThink
            | Self::MedR1Train
            | Self::MedR1TrainNoThink
            | Self::ThinkAfter => {
                let parts: Vec<String> =
                    lettered.map(|(letter, option)| format!("{letter}){option}")).collect();
                format!(" {}", parts.join(", "))
            }
            Self::MedVlmR1 | Self::Plain | Self::Phantom | Self::PhantomCot => {
                let lines: Vec<String> =
                    lettered.map(|(letter, option)| format!("\n{letter}) {option}")).collect();
                lines.concat()
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn sample() -> Sample {
        Sample {
            question: "Where is {options}?".into(),
            options: vec!["upper-left".into(), "lower, right".into()],
            answer: 1,
            ..Sample::for_test(0)
        }
    }

    #[test]
    fn each_template_writes_question_options_and_instruction_in_its_layout() {
        let text = |template: PromptTemplate| template.user_text(&sample());
        let inline = "Where is {options}? A)upper-left, B)lower, right ";
        assert_eq!(
            text(PromptTemplate::MedR1NoThink),
            format!(
                "{inline}Provide the correct single-letter choice (A, B, C, D,...) inside <answer>...</answer> tags."
            )
        );
        assert_eq!(
            text(PromptTemplate::MedR1Think),
            format!(
                "{inline}Think through the question step by step in <think>...</think> tags. Then provide the correct single-letter choice (A, B, C, D,...) inside <answer>...</answer> tags."
            )
        );
        let first = "Think through the question step by step, enclose your reasoning process in <think>...</think> tags.";
        let second = "Then provide the correct single-letter choice (A, B, C, D,...) inside <answer>...</answer> tags.";
        let third = "No extra information or text outside of these tags.";
        assert_eq!(
            text(PromptTemplate::MedR1Train),
            format!("{inline}Your task: 1. {first} 2. {second} 3. {third}")
        );
        assert_eq!(
            text(PromptTemplate::MedR1TrainNoThink),
            format!(
                "{inline}Your task: 1. Provide the correct single-letter choice (A, B, C, D,...) inside <answer>...</answer> tags. 2. No extra information or text outside of this tag."
            )
        );
        // Line for line, with the spaces at the ends of some.
        let medvlm_r1 = [
            "",
            "    Where is {options}?",
            "A) upper-left",
            "B) lower, right ",
            "    Your task: ",
            &format!("    1. {first} "),
            &format!("    2. {second}"),
            &format!("    3. {third}"),
            "    ",
        ];
        assert_eq!(text(PromptTemplate::MedVlmR1), medvlm_r1.join("\n"));
        assert!(text(PromptTemplate::ThinkAfter).starts_with(&format!("{inline}First provide")));
        let lines = "Where is {options}?\nA) upper-left\nB) lower, right";
        assert_eq!(text(PromptTemplate::Plain), format!("{lines}\nAnswer with the letter."));
        assert_eq!(text(PromptTemplate::Phantom), format!("{lines}\nanswer"));
        assert_eq!(text(PromptTemplate::PhantomCot), format!("{lines}\nthink"));
    }

    #[test]
    fn targets_hold_the_letter_and_the_letter_follows_the_finding() {
        let cot = "<think> scan CT; finding lower, right B</think>";
        for (name, template) in NAMES {
            let expected = match name {
                "think_after" => (format!("<answer> B</answer>{cot}"), "<answer> B</answer>"),
                "plain" => (format!("{cot}<answer> B</answer>"), "B"),
                _ => (format!("{cot}<answer> B</answer>"), "<answer> B</answer>"),
            };
            assert_eq!(
                (template.target(&sample(), true).as_str(), template.target(&sample(), false).as_str()),
                (expected.0.as_str(), expected.1)
            );
        }
    }

    #[test]
    fn names_round_trip_and_a_misspelt_one_is_told_the_near_miss() {
        for name in PromptTemplate::names() {
            assert_eq!(name.parse::<PromptTemplate>().unwrap().to_string(), name);
        }
        for (alias, name) in
            [("think", "med_r1_think"), ("no_think", "med_r1_no_think"), ("think_after", "think_after")]
        {
            assert_eq!(alias.parse::<PromptTemplate>().unwrap().to_string(), name);
        }
        let error = "thinking".parse::<PromptTemplate>().unwrap_err().to_string();
        assert!(error.contains("med_r1_think (or think), med_r1_no_think (or no_think), "), "{error}");
        let error = "med_r1_thnk".parse::<PromptTemplate>().unwrap_err().to_string();
        assert!(error.contains("did you mean `med_r1_think`"), "{error}");
    }
}
