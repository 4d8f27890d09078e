//! Whether a completion has the form asked for, whatever it says.
//!
//! The forms are those of Med-R1's public reward code (a full match of reasoning then answer, or of the answer
//! alone), made strict: each tag occurs exactly once, so that a completion cannot hide a second answer.

use serde::{Deserialize, Serialize};

/// The form that a completion should have. White space around and between the parts is allowed, other text is not.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Format {
    /// `<think>...</think><answer>...</answer>`
    ThinkThenAnswer,
    /// `<answer>...</answer>`
    AnswerOnly,
    /// `<answer>...</answer><think>...</think>`
    AnswerThenThink,
    /// The bare letter.
    Letter,
}

impl From<bool> for Format {
    /// `true`: reasoning then answer.
    fn from(think: bool) -> Self {
        if think { Self::ThinkThenAnswer } else { Self::AnswerOnly }
    }
}

impl Format {
    /// Whether `completion` has this form from its first to its last character, white space aside.
    pub fn matches(self, completion: &str) -> bool {
        let tags: &[&str] = match self {
            Self::ThinkThenAnswer => &["<think>", "</think>", "<answer>", "</answer>"],
            Self::AnswerOnly => &["<answer>", "</answer>"],
            Self::AnswerThenThink => &["<answer>", "</answer>", "<think>", "</think>"],
            Self::Letter => return matches!(completion.trim().as_bytes(), [b'A'..=b'Z']),
        };
        let mut rest = completion.trim();
        for (position, tag) in tags.iter().enumerate() {
            let Some((before, after)) = rest.split_once(tag) else { return false };
            let opens = position % 2 == 0;
            // Before an opening tag nothing may stand; before a closing one anything but another tag.
            let allowed = if opens { before.trim().is_empty() } else { !has_tag(before) };
            if !allowed {
                return false;
            }
            rest = after;
        }
        rest.is_empty()
    }
}

fn has_tag(text: &str) -> bool {
    ["<think>", "</think>", "<answer>", "</answer>"].iter().any(|tag| text.contains(tag))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn each_form_matches_itself_and_no_other() {
        let think = "<think>why\nso</think>\n <answer> B </answer>";
        let plain = " <answer>B</answer>\n";
        let after = "<answer>B</answer><think>why</think>";
        let letter = " B\n";
        for (form, own) in [
            (Format::ThinkThenAnswer, think),
            (Format::AnswerOnly, plain),
            (Format::AnswerThenThink, after),
            (Format::Letter, letter),
        ] {
            for text in [think, plain, after, letter, "B.", "AB", ""] {
                assert_eq!(form.matches(text), text == own, "{form:?}: {text}");
            }
        }
        assert!(Format::ThinkThenAnswer.matches("<think></think><answer></answer>"));
        assert_eq!((Format::from(true), Format::from(false)), (Format::ThinkThenAnswer, Format::AnswerOnly));
    }

    #[test]
    fn repeated_nested_missing_or_surrounded_tags_do_not_match() {
        for text in [
            "",
            "<think>a</think>",
            "<answer>B</answer>",
            "<think>a<answer>B</answer>",
            "<think>a</think><answer>B",
            "so <think>a</think><answer>B</answer>",
            "<think>a</think><answer>B</answer>.",
            "<think>a</think> so <answer>B</answer>",
            "<think>a</think><think>b</think><answer>B</answer>",
            "<think>a<think>b</think></think><answer>B</answer>",
            "<think>a</think><answer>A</answer><answer>B</answer>",
            "<think>a</think><answer>A<answer>B</answer></answer>",
            "<think>a <answer>A</answer></think><answer>B</answer>",
            "<answer>B</answer><think>a</think>",
            "<think>a</think><answer>B</answer></answer>",
            "<Think>a</Think><answer>B</answer>",
        ] {
            assert!(!Format::ThinkThenAnswer.matches(text), "{text}");
        }
    }
}
