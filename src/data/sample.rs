//! One multiple-choice question about one image, and the names of modalities.
//!
//! Also what a chain of thought says about it: the reasoning keeps a placeholder where the letter belongs, so that
//! options can be put in another order without making it untrue.

use std::path::PathBuf;

use serde::{Deserialize, Serialize};

use super::letter;

/// Stands in a reasoning where the letter of the right option belongs.
pub const ANSWER_PLACEHOLDER: &str = "{answer}";

/// What the question type is called that asks for the modality itself.
pub const MODALITY_RECOGNITION: &str = "Modality Recognition";

/// The name of a modality or question type that the source does not tell.
pub const UNKNOWN: &str = "unknown";

/// One question with its options and image.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Sample {
    /// Unique within a dataset.
    pub id: String,
    /// Name of the source the image is from, such as `ISIC2019`.
    pub dataset: String,
    /// One of [`MODALITIES`], or the raw text of another.
    pub modality: String,
    /// The file's own spelling.
    pub modality_raw: String,
    /// OmniMedVQA's name of the type.
    pub question_type: String,
    /// The question, without its options.
    pub question: String,
    /// The options' texts in order, two or more.
    pub options: Vec<String>,
    /// Index of the right option.
    pub answer: usize,
    /// The image, relative to the dataset's root.
    pub image: PathBuf,
    /// Chain of thought; [`ANSWER_PLACEHOLDER`] stands for the right option's letter.
    pub reasoning: Option<String>,
}

/// The modalities that have a name of their own here, in a fixed order.
pub const MODALITIES: [&str; 8] =
    ["CT", "MRI", "X-Ray", "Ultrasound", "Dermoscopy", "Fundus", "OCT", "Microscopy"];

/// OmniMedVQA's five question types, in a fixed order.
pub const QUESTION_TYPES: [&str; 5] = [
    MODALITY_RECOGNITION,
    "Anatomy Identification",
    "Disease Diagnosis",
    "Lesion Grading",
    "Other Biological Attributes",
];

/// Spellings met in the field, letters and digits only, lower case.
const SPELLINGS: [(&str, &[&str]); 8] = [
    ("CT", &["ct", "computedtomography", "ctcomputedtomography"]),
    (
        "MRI",
        &[
            "mr",
            "mri",
            "magneticresonanceimaging",
            "mrmagneticresonanceimaging",
            "mrimagneticresonanceimaging",
        ],
    ),
    ("X-Ray", &["xray", "xrays"]),
    ("Ultrasound", &["us", "ultrasound", "ultrasonography"]),
    ("Dermoscopy", &["dermoscopy", "dermatoscopy"]),
    ("Fundus", &["fundus", "fundusphotography", "fundusphotograph"]),
    ("OCT", &["oct", "opticalcoherencetomography", "octopticalcoherencetomography"]),
    ("Microscopy", &["microscopy", "microscopyimage", "microscopyimages"]),
];

/// The name of a modality from a file's spelling; the trimmed text itself when it is none of the eight.
pub fn modality_name(raw: &str) -> String {
    let folded: String = raw.chars().filter(|c| c.is_alphanumeric()).flat_map(char::to_lowercase).collect();
    SPELLINGS
        .iter()
        .find(|(_, spellings)| spellings.contains(&folded.as_str()))
        .map_or_else(|| raw.trim().to_owned(), |(name, _)| (*name).to_owned())
}

impl Sample {
    /// The text of the right option.
    pub fn answer_text(&self) -> &str {
        self.options.get(self.answer).map_or("", String::as_str)
    }

    /// The letter of the right option.
    pub fn answer_letter(&self) -> char {
        letter(self.answer)
    }

    /// The reasoning with the letter in its place. Without one of its own: the modality, then the right option's
    /// text, then directly its letter.
    pub fn reasoning_text(&self) -> String {
        self.reasoning_template().replace(ANSWER_PLACEHOLDER, &self.answer_letter().to_string())
    }

    /// What is seen, without the letter, such as `scan CT; finding upper-left`: the text that can stand in for the
    /// image.
    pub fn caption(&self) -> String {
        let template = self.reasoning_template();
        let words: Vec<&str> =
            template.split_whitespace().filter(|word| *word != ANSWER_PLACEHOLDER).collect();
        words.join(" ").replace(ANSWER_PLACEHOLDER, "")
    }

    /// The same question with its options in another order: place `k` gets the option `permutation[k]`.
    ///
    /// A reasoning with a placeholder stays true by itself. One that names letters of its own cannot be rewritten
    /// safely and is dropped (the rebuilt one of [`Self::reasoning_text`] takes its place) unless the order stays.
    /// A `permutation` that is none of `0..options.len()` gives the question unchanged.
    #[must_use]
    pub fn with_options_permuted(&self, permutation: &[usize]) -> Self {
        let mut seen = permutation.to_vec();
        seen.sort_unstable();
        let valid = seen.iter().copied().eq(0..self.options.len());
        let Some(answer) = permutation.iter().position(|&from| from == self.answer).filter(|_| valid) else {
            return self.clone();
        };
        let moved = permutation.iter().enumerate().any(|(to, &from)| to != from);
        let reasoning = self.reasoning.clone().filter(|text| !(moved && names_a_letter(text)));
        Self {
            options: permutation.iter().map(|&from| self.options[from].clone()).collect(),
            answer,
            reasoning,
            ..self.clone()
        }
    }

    /// The group within which an image-blind prior may count: the modality, which a patient record would tell too.
    /// Questions that ask for the modality are grouped by their type, since there the modality is the answer; so are
    /// questions whose modality is unknown.
    pub fn prior_group(&self) -> &str {
        if self.question_type == MODALITY_RECOGNITION || self.modality == UNKNOWN {
            &self.question_type
        } else {
            &self.modality
        }
    }

    /// Whether there is a reasoning that names letters of its own, which another order of the options would make untrue.
    pub fn reasons_with_letters(&self) -> bool {
        self.reasoning.as_deref().is_some_and(names_a_letter)
    }

    fn reasoning_template(&self) -> String {
        self.reasoning.clone().unwrap_or_else(|| reasoning_for(&self.modality, self.answer_text()))
    }
}

/// The reasoning that names the modality and what was found, with a placeholder for the letter right after it.
pub fn reasoning_for(modality: &str, finding: &str) -> String {
    format!("scan {modality}; finding {finding} {ANSWER_PLACEHOLDER}")
}

/// A reasoning with [`ANSWER_PLACEHOLDER`] in place of the right option's letter, wherever the letter is certain to name the
/// option: behind `option`, `choice` or `letter`, or behind `answer` (also `the answer is`) with nothing but the end of the
/// sentence after it. A letter anywhere else stays, and [`Sample::with_options_permuted`] knows what to do about it.
pub fn with_placeholder(reasoning: &str, answer: usize) -> String {
    let right = letter(answer);
    let mut text = String::with_capacity(reasoning.len());
    let mut copied = 0;
    for (at, _) in reasoning.match_indices(right) {
        if names_option(&reasoning[..at], &reasoning[at + 1..]) {
            text.push_str(&reasoning[copied..at]);
            text.push_str(ANSWER_PLACEHOLDER);
            copied = at + 1;
        }
    }
    text.push_str(&reasoning[copied..]);
    text
}

/// Whether a letter between these texts is certain to name an option.
fn names_option(before: &str, after: &str) -> bool {
    const NOUNS: [&str; 3] = ["option", "choice", "letter"];
    let is_apart = before.chars().next_back().is_some_and(|c| c.is_whitespace() || "(*`\"'".contains(c));
    let closing = after.trim_start_matches([')', '*', '`', '"', '\'']);
    let next = closing.chars().next();
    if !is_apart || next.is_some_and(|c| !c.is_whitespace() && !".,;:!?".contains(c)) {
        return false;
    }
    // Only the sentence around it counts: no longer text is looked at, whatever the length of the whole.
    let mut words = before
        .rsplit(|c: char| !c.is_alphanumeric())
        .take(16)
        .filter(|word| !word.is_empty())
        .map(str::to_ascii_lowercase);
    let (last, second, third) = (words.next(), words.next(), words.next());
    let is = |word: &Option<String>, list: &[&str]| word.as_deref().is_some_and(|word| list.contains(&word));
    if is(&last, &NOUNS) {
        return true;
    }
    let is_verb = is(&last, &["is", "be"]);
    if is_verb && (is(&second, &NOUNS) || is(&third, &NOUNS)) {
        return true;
    }
    let is_answer = is(&last, &["answer"])
        || is_verb
            && (is(&second, &["answer"])
                || is(&third, &["answer"]) && is(&second, &["would", "must", "should"]));
    // `The answer is A. fumigatus` names no option.
    let rest = closing.trim_start_matches(['.', ',', ';', ':', '!', '?']);
    let ends_here = rest.len() < closing.len() || rest.is_empty();
    is_answer && ends_here && !rest.trim_start().starts_with(char::is_lowercase)
}

/// Whether a single letter A to E stands alone anywhere. The article `A` counts too: better to lose one reasoning
/// than to keep an untrue one.
fn names_a_letter(text: &str) -> bool {
    text.replace(ANSWER_PLACEHOLDER, " ")
        .split(|c: char| !c.is_alphanumeric())
        .any(|word| word.len() == 1 && ('A'..='E').contains(&char::from(word.as_bytes()[0])))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn sample() -> Sample {
        Sample {
            id: "x".into(),
            dataset: "d".into(),
            modality: "CT".into(),
            modality_raw: "CT(Computed Tomography)".into(),
            question_type: "Anatomy Identification".into(),
            question: "Where?".into(),
            options: ["w", "x", "y", "z"].map(String::from).to_vec(),
            answer: 2,
            image: "i.png".into(),
            reasoning: Some("scan CT; finding y {answer}".into()),
        }
    }

    #[test]
    fn every_known_spelling_has_its_name_and_others_keep_theirs() {
        for (raw, name) in [
            ("CT(Computed Tomography)", "CT"),
            ("MR (Mag-netic Resonance Imaging)", "MRI"),
            ("MR (Magnetic Resonance Imaging)", "MRI"),
            ("X-Ray", "X-Ray"),
            ("x_ray", "X-Ray"),
            ("ultrasound", "Ultrasound"),
            ("Dermoscopy", "Dermoscopy"),
            ("Fundus Photography", "Fundus"),
            ("OCT (Optical Coherence Tomography", "OCT"),
            ("OCT (Optical Coherence Tomography)", "OCT"),
            ("Microscopy Images", "Microscopy"),
            (" Endoscopy ", "Endoscopy"),
            ("PET-CT", "PET-CT"),
        ] {
            assert_eq!(modality_name(raw), name);
        }
        for name in MODALITIES {
            assert_eq!(modality_name(name), name);
        }
    }

    #[test]
    fn permuting_options_keeps_the_answer_and_the_reasoning_true() {
        let original = sample();
        assert_eq!(original.reasoning_text(), "scan CT; finding y C");
        assert_eq!(original.caption(), "scan CT; finding y");
        let moved = original.with_options_permuted(&[3, 2, 1, 0]);
        assert_eq!(moved.options, ["z", "y", "x", "w"]);
        assert_eq!((moved.answer, moved.answer_text()), (1, "y"));
        assert_eq!(moved.reasoning_text(), "scan CT; finding y B");
        for wrong in [&[0, 1, 2][..], &[0, 0, 1, 2], &[0, 1, 2, 4]] {
            assert_eq!(original.with_options_permuted(wrong), original);
        }
    }

    #[test]
    fn a_reasoning_with_letters_of_its_own_does_not_survive_another_order() {
        let mut original = sample();
        original.reasoning = Some("Rim enhancement: option C fits.".into());
        assert_eq!(original.with_options_permuted(&[0, 1, 2, 3]), original);
        let moved = original.with_options_permuted(&[1, 0, 2, 3]);
        assert_eq!(moved.reasoning, None);
        assert_eq!(moved.reasoning_text(), "scan CT; finding y C");
        assert!(original.reasons_with_letters() && !sample().reasons_with_letters());
        original.reasoning = Some("Rim enhancement, no Calcification.".into());
        assert!(original.with_options_permuted(&[1, 0, 2, 3]).reasoning.is_some());
    }

    #[test]
    fn the_right_letter_gives_way_to_the_placeholder_only_where_it_is_certain() {
        for (text, expected) in [
            ("So option C fits.", "So option {answer} fits."),
            ("Therefore the answer is C.", "Therefore the answer is {answer}."),
            ("Answer: **C**", "Answer: **{answer}**"),
            ("The correct choice is (C), since", "The correct choice is ({answer}), since"),
            ("The answer must be C. It is round.", "The answer must be {answer}. It is round."),
            ("not option B, option C", "not option B, option {answer}"),
            ("options B and C", "options B and C"),
            ("The answer is C-shaped.", "The answer is C-shaped."),
            ("The answer is C. difficile", "The answer is C. difficile"),
            ("The answer is C difficile", "The answer is C difficile"),
            ("The answer is C Major", "The answer is C Major"),
            ("Panel (C) is dark. Vitamin C. Cyst.", "Panel (C) is dark. Vitamin C. Cyst."),
            ("optionC, option CC", "optionC, option CC"),
            ("C", "C"),
            ("option \u{e9}C", "option \u{e9}C"),
        ] {
            let placed = with_placeholder(text, 2);
            assert_eq!(placed, expected);
            assert_eq!(placed.replace(ANSWER_PLACEHOLDER, "C"), text);
        }
        // What has no other letter survives another order, and stays true.
        let mut moved = sample();
        moved.reasoning = Some(with_placeholder("Round and dark: option C.", 2));
        let moved = moved.with_options_permuted(&[2, 0, 1, 3]);
        assert_eq!(moved.reasoning_text(), "Round and dark: option A.");
    }
}
