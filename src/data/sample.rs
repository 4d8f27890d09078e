//! One multiple-choice question about one image, and the names of modalities.
//!
//! Also what a chain of thought says about it: the reasoning keeps a placeholder where the letter belongs, so that
//! options can be put in another order without making it untrue.

use std::path::PathBuf;

use serde::{Deserialize, Serialize};

use super::{index_of_letter, letter};

/// Stands in a reasoning where the letter of the right option belongs.
pub const ANSWER_PLACEHOLDER: &str = "{answer}";

/// What the question type is called that asks for the modality itself.
pub const MODALITY_RECOGNITION: &str = "Modality Recognition";

/// The name of a modality or question type that the source does not tell.
pub const UNKNOWN: &str = "unknown";

/// So many letters may name options in a reasoning even where a question has fewer: the letters of a file whose list has
/// gaps go further than those of the options that are left.
const FEWEST_LETTERS: usize = 5;

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
        let stays_true = |text: &String| !(moved && names_a_letter(text, self.options.len()));
        let reasoning = self.reasoning.clone().filter(stays_true);
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
        self.reasoning.as_deref().is_some_and(|text| names_a_letter(text, self.options.len()))
    }

    fn reasoning_template(&self) -> String {
        self.reasoning.clone().unwrap_or_else(|| reasoning_for(&self.modality, self.answer_text()))
    }
}

#[cfg(test)]
impl Sample {
    /// A question for tests: those of different numbers differ in nothing but id and image, and their ids sort like the numbers.
    pub(crate) fn for_test(number: usize) -> Self {
        Self {
            id: format!("q{number:06}"),
            dataset: "d".into(),
            modality: "CT".into(),
            modality_raw: "CT".into(),
            question_type: "t".into(),
            question: "what?".into(),
            options: vec!["x".into(), "y".into()],
            answer: 0,
            image: format!("{number}.png").into(),
            reasoning: None,
        }
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
    let [last, second, third] = last_words(before);
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

/// The last words of a text in small letters, the very last first.
fn last_words(text: &str) -> [Option<String>; 3] {
    // Only the sentence around a letter counts: no longer text is looked at, whatever the length of the whole.
    let mut words = text
        .rsplit(|c: char| !c.is_alphanumeric())
        .take(16)
        .filter(|word| !word.is_empty())
        .map(str::to_ascii_lowercase);
    [words.next(), words.next(), words.next()]
}

/// Whether a text may name one of so many options by its letter.
///
/// Any capital among their letters that stands alone counts, the article `A` and the end of `vitamin C` too: better to lose
/// one reasoning than to keep an untrue one. Spared are only the pronoun `I` and `X-ray`, which letters that go so far
/// would find in most reports. A small letter counts where it is marked: see
/// [`is_small_label`] and [`is_led_to`].
fn names_a_letter(text: &str, num_options: usize) -> bool {
    let text = text.replace(ANSWER_PLACEHOLDER, " ");
    let is_in_word = |neighbour: Option<char>| neighbour.is_some_and(char::is_alphanumeric);
    text.char_indices().any(|(at, found)| {
        let index = index_of_letter(found.to_ascii_uppercase());
        if index.is_none_or(|index| index >= num_options.max(FEWEST_LETTERS)) {
            return false;
        }
        let (before, after) = (&text[..at], &text[at + 1..]);
        if is_in_word(before.chars().next_back()) || is_in_word(after.chars().next()) {
            return false;
        }
        if found.is_ascii_uppercase() {
            !is_word(found, after)
        } else {
            is_small_label(before, after) || is_led_to(found, before, after)
        }
    })
}

/// Whether a capital before this text is certain to name no option: the pronoun `I`, told by a verb that takes another
/// form behind the name of an option, or the first of `X-ray`.
fn is_word(capital: char, after: &str) -> bool {
    const VERBS: [&str; 12] = [
        "am", "believe", "conclude", "consider", "find", "have", "identify", "note", "notice", "observe",
        "see", "think",
    ];
    const CONTRACTIONS: [&str; 4] = ["d", "ll", "m", "ve"];
    let mut rest = after.chars();
    let mark = rest.next();
    let next = first_word(rest.as_str()).to_ascii_lowercase();
    match (capital, mark) {
        ('I', Some(' ')) => VERBS.contains(&next.as_str()),
        ('I', Some('\'' | '\u{2019}')) => CONTRACTIONS.contains(&next.as_str()),
        ('X', Some('-' | ' ' | '\u{2011}')) => next == "ray" || next == "rays",
        _ => false,
    }
}

/// The letters and digits that a text begins with.
fn first_word(text: &str) -> &str {
    let end = text.find(|c: char| !c.is_alphanumeric()).unwrap_or(text.len());
    &text[..end]
}

/// Whether a small letter between these texts is marked as an option's: enclosed (`(c)`, `**c**`, `\boxed{c}`), before a
/// bracket that closes no other (`c) round`), or first in a line and set off (`c. round`, or nothing behind it). One within
/// a sentence is a word of it: `hepatitis c`, `(vitamin d)`, `b values`.
fn is_small_label(before: &str, after: &str) -> bool {
    const PAIRS: [(char, char); 6] = [('(', ')'), ('[', ']'), ('{', '}'), ('*', '*'), ('`', '`'), ('"', '"')];
    let (left, right) = (before.chars().next_back(), after.chars().next());
    if PAIRS.iter().any(|&(open, close)| left == Some(open) && right == Some(close)) {
        return true;
    }
    // The search goes back through all that is said: only a closing bracket asks for it.
    let is_in_brackets = || before.rfind(['(', ')']).is_some_and(|at| before[at..].starts_with('('));
    if right == Some(')') && !is_in_brackets() {
        return true;
    }
    let lead = before.trim_end_matches([' ', '\t', '-', '*']);
    let is_first = lead.is_empty() || lead.ends_with(['\n', '\r']);
    let rest = after.strip_prefix(['.', ':']);
    let is_set_off = rest.is_some_and(|rest| rest.is_empty() || rest.starts_with(char::is_whitespace));
    is_first && (is_set_off || after.is_empty() || after.starts_with(['\n', '\r']))
}

/// Whether a small letter between these texts follows, in its sentence, what leads to an option: `option c`, `answer: c`,
/// `the choice is c`, `choose c`. Behind the verbs and `answer` an `a` before a word is the article (`the answer is a cyst`).
fn is_led_to(small: char, before: &str, after: &str) -> bool {
    const NOUNS: [&str; 6] = ["option", "options", "choice", "choices", "letter", "letters"];
    const ANSWERS: [&str; 2] = ["answer", "answers"];
    const CHOOSING: [&str; 4] = ["choose", "chose", "pick", "select"];
    // Words that go on with the sentence behind the letter `a`, and cannot follow the article.
    const GOING_ON: [&str; 9] = ["and", "as", "because", "but", "is", "nor", "not", "or", "since"];
    let sentence = before.trim_end_matches(|c: char| !c.is_alphanumeric());
    if before[sentence.len()..].contains(['.', '?', '!', ';']) {
        return false;
    }
    let [last, second, third] = last_words(before);
    let is = |word: &Option<String>, list: &[&str]| word.as_deref().is_some_and(|word| list.contains(&word));
    if is(&last, &NOUNS) {
        return true;
    }
    let is_named = |word: &Option<String>| is(word, &NOUNS) || is(word, &ANSWERS);
    let is_verb = is(&last, &["is", "be", "are"]) && (is_named(&second) || is_named(&third));
    let next = first_word(after.trim_start_matches([' ', '*', '"', '\u{201c}'])).to_ascii_lowercase();
    let is_article =
        small == 'a' && after.starts_with(' ') && !next.is_empty() && !GOING_ON.contains(&next.as_str());
    (is_verb || is(&last, &ANSWERS) || is(&last, &CHOOSING)) && !is_article
}

#[cfg(test)]
mod tests {
    use super::*;

    fn sample() -> Sample {
        Sample {
            options: ["w", "x", "y", "z"].map(String::from).to_vec(),
            answer: 2,
            reasoning: Some("scan CT; finding y {answer}".into()),
            ..Sample::for_test(0)
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

    /// Whether a reasoning about so many options is kept when the first two change places.
    fn survives(text: &str, num_options: usize) -> bool {
        let original = Sample {
            options: (0..num_options).map(|n| format!("finding {n}")).collect(),
            answer: 0,
            reasoning: Some(text.into()),
            ..sample()
        };
        let mut swapped: Vec<usize> = (0..num_options).collect();
        swapped.swap(0, 1);
        let survives = original.with_options_permuted(&swapped).reasoning.is_some();
        assert_eq!(survives, !original.reasons_with_letters(), "{text}");
        survives
    }

    #[test]
    fn every_letter_of_the_options_counts_in_every_form_that_names_one() {
        for index in 0..26 {
            let large = letter(index);
            let small = large.to_ascii_lowercase();
            for text in [
                format!("Round, so not option {large}."),
                format!("{large} is wrong."),
                format!("Round ({large})"),
                format!("Not option ({small})."),
                format!("Neither option {small} nor none."),
                format!("So the answer: {small}"),
                format!("The answer is {small}."),
                format!("The choice must be **{small}**."),
                format!("Round: I'd choose {small}."),
                format!("Hence \\boxed{{{small}}}"),
                format!("Too dense for {small}) round."),
                format!("Compared:\n- {small}. dense\nnone fits"),
                format!("Dense, hence\n{small}"),
            ] {
                assert!(!survives(&text, 26) && !survives(&text, (index + 1).max(2)), "{text}");
                // Where no option has it, a letter past the fifth is a word or a name.
                assert_eq!(survives(&text, index.max(2)), index >= 5, "{text}");
            }
        }
        for text in
            ["The answer is a because it is round.", "Letters h and {answer}", "I shows a rim, X is dark"]
        {
            assert!(!survives(text, 26), "{text}");
        }
    }

    #[test]
    fn small_letters_and_capitals_in_ordinary_words_name_no_option() {
        for text in [
            "Round, no Calcification, T2 bright, CD20 positive.",
            "I see a cyst and I'm sure; I have no doubt.",
            "The X-ray shows hepatitis c (not hepatitis b).",
            "X rays are weak here; b values of 1000 s are high, p < 0.05.",
            "The answer is a cyst, the best option.",
            "The answer is a *dense* cyst, so the options differ.",
            "I'd choose a biopsy.",
            "Vitamin d is low, i.e. rickets, e.g. bowing.",
            "That gives the answer. b values agree.",
        ] {
            assert!(survives(text, 26), "{text}");
        }
        // Better to lose one reasoning than to keep an untrue one.
        for text in ["A mass is seen.", "Lack of vitamin C.", "Of type B.", "Stage I"] {
            assert!(!survives(text, 26), "{text}");
        }
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
