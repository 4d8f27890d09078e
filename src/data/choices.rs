//! Options inside a text: a question cut from its lettered options, and the option that an answer means.
//!
//! The wording of others is read here, so nothing is guessed: where a text can be cut in two ways, or an answer may mean two
//! options, that is an error that says so. Instructions after the options ("Answer with the letter.") are left out,
//! because the prompt template brings its own.

use serde_json::Value;

use super::problem::kind;
use super::{MOST_OPTIONS, index_of_letter, letter};

/// What is wrong with a text that has no options at all.
pub(super) const NO_OPTIONS: &str = "no options of the form `A) ...`, `A. ...`, `(A) ...` or `A: ...`";

/// How a letter is set off from its option.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Style {
    /// `A)`
    Bracket,
    /// `(A)`
    Brackets,
    /// `A.`
    Dot,
    /// `A:`
    Colon,
}

const STYLES: [Style; 4] = [Style::Bracket, Style::Brackets, Style::Dot, Style::Colon];

impl Style {
    fn marker(self, index: usize) -> String {
        let letter = letter(index);
        match self {
            Self::Bracket => format!("{letter})"),
            Self::Brackets => format!("({letter})"),
            Self::Dot => format!("{letter}."),
            Self::Colon => format!("{letter}:"),
        }
    }
}

/// How an instruction begins, lower case. With a capital, no option goes on like this.
const INSTRUCTIONS: [&str; 39] = [
    "answer directly",
    "answer the question",
    "answer using",
    "answer with",
    "choose from the",
    "choose one of",
    "choose the best answer",
    "choose the best option",
    "choose the correct answer",
    "choose the correct option",
    "choose the letter",
    "directly answer",
    "first output",
    "first provide",
    "give the letter",
    "give your answer",
    "only return",
    "output only",
    "output the",
    "please answer",
    "please choose",
    "please provide",
    "please reply",
    "please respond",
    "please select",
    "provide the correct",
    "provide your answer",
    "reply with",
    "respond with",
    "return only",
    "select from the",
    "select one of",
    "select the best answer",
    "select the best option",
    "select the correct answer",
    "select the correct option",
    "select the letter",
    "think through the question",
    "your task:",
];

/// Words that begin an instruction where they begin a line or a sentence, lower case. Elsewhere they are as good a part of an
/// option: `to select a donor`.
const INSTRUCTION_WORDS: [&str; 3] = ["choose ", "please ", "select "];

/// What may stand over a list of options, lower case, without its colon.
const HEADERS: [&str; 6] =
    ["answer choices", "answer options", "candidates", "choices", "options", "the options are"];

/// Ways to lead to an answer, lower case, longer ones before those that they begin with.
const LEADS: [&str; 12] = [
    "the correct answer is",
    "the correct option is",
    "the correct choice is",
    "the best answer is",
    "the final answer is",
    "the answer is",
    "correct answer:",
    "final answer:",
    "answer is",
    "answer:",
    "option",
    "answer",
];

/// A text cut at its options.
struct Cut {
    head: String,
    options: Vec<String>,
    tail: String,
}

/// Cuts `QUESTION` from its options: `A) x`, `A. x`, `(A) x` or `A: x`, one in each line or all in one, there with commas or
/// semicolons between them or none. An instruction behind the last option is cut off where it can be nothing else: in lines of
/// its own, behind the end of a sentence, or as one of the phrases that options do not hold; else the option stays whole.
///
/// # Errors
/// When there are no options, or none that can be told apart with certainty.
pub fn split(text: &str) -> Result<(String, Vec<String>), String> {
    let lines: Vec<&str> = text.lines().collect();
    let in_lines = STYLES.iter().find_map(|style| one_in_each_line(&lines, *style));
    let found = in_lines.or_else(|| STYLES.iter().find_map(|style| all_in_one_line(&lines, *style)));
    let Cut { head, mut options, tail } = found.unwrap_or_else(|| Err(NO_OPTIONS.into()))?;
    if let Some(last) = options.last_mut()
        && let Some(at) = instruction_in(last)
    {
        // What sets the instruction off goes with it.
        let sets_off = |mark: char| mark.is_whitespace() || [',', ';', '(', '['].contains(&mark);
        let end = last[..at].trim_end_matches(sets_off).len();
        last.truncate(end);
    }
    if !tail.is_empty() && !begins_instruction(&tail) {
        return Err(format!("text behind the options that is no instruction: `{}`", shortened(&tail)));
    }
    let question = without_header(&head);
    match options.iter().position(String::is_empty) {
        _ if question.is_empty() => Err("options but no question".into()),
        Some(empty) => Err(format!("option {} is blank", letter(empty))),
        None => Ok((question, options)),
    }
}

fn one_in_each_line(lines: &[&str], style: Style) -> Option<Result<Cut, String>> {
    let told: Vec<(usize, &str)> = lines
        .iter()
        .enumerate()
        .filter(|(_, line)| !line.trim().is_empty())
        .map(|(n, line)| (n, *line))
        .collect();
    let option =
        |at: usize, index: usize| told.get(at).and_then(|(_, line)| after_marker(line, style, index));
    let starts: Vec<usize> =
        (0..told.len()).filter(|&at| option(at, 0).is_some() && option(at + 1, 1).is_some()).collect();
    let [start] = starts.as_slice() else {
        return (!starts.is_empty()).then(|| Err("the options stand there twice".into()));
    };
    let mut options: Vec<String> =
        (0..MOST_OPTIONS).map_while(|index| option(start + index, index)).map(str::to_owned).collect();
    let inline = format!(" {}", style.marker(options.len() % MOST_OPTIONS));
    if options.iter().any(|option| option.contains(&inline)) {
        return Some(Err("some options have a line of their own and some share one".into()));
    }
    let count = options.len();
    let is_listed = options[..count - 1].iter().all(|option| option.ends_with([',', ';']));
    for option in options[..count - 1].iter_mut().filter(|_| is_listed) {
        option.pop();
        option.truncate(option.trim_end().len());
    }
    let tail: Vec<&str> = told[start + count..].iter().map(|(_, line)| line.trim()).collect();
    Some(Ok(Cut { head: lines[..told[*start].0].join("\n"), options, tail: tail.join("\n") }))
}

/// What follows the marker of option `index` in a line that begins with it, maybe as an item of a list.
fn after_marker(line: &str, style: Style, index: usize) -> Option<&str> {
    let line = line.trim_start();
    let line = line.strip_prefix("- ").or_else(|| line.strip_prefix("* ")).unwrap_or(line);
    line.trim_start().strip_prefix(&style.marker(index)).map(str::trim)
}

fn all_in_one_line(lines: &[&str], style: Style) -> Option<Result<Cut, String>> {
    lines.iter().enumerate().find_map(|(number, line)| {
        let cut = in_line(line, style)?;
        Some(cut.map(|(head, options)| Cut {
            head: [&lines[..number], &[head]].concat().join("\n"),
            options,
            tail: lines[number + 1..].join("\n").trim().to_owned(),
        }))
    })
}

/// The question before the options of one line, and the options; `None` when there are none of this style.
fn in_line(line: &str, style: Style) -> Option<Result<(&str, Vec<String>), String>> {
    let is_after_comma = |at: &usize| line[..*at].trim_end().ends_with([',', ';']);
    let places = |index: usize, from: usize| -> Vec<usize> {
        let found = line.match_indices(&style.marker(index)).map(|(at, _)| at).collect::<Vec<_>>();
        let is_set_off = |at: &usize| {
            line[..*at]
                .chars()
                .next_back()
                .is_none_or(|before| before.is_whitespace() || [',', ';'].contains(&before))
        };
        found.into_iter().filter(|at| *at >= from).filter(is_set_off).collect()
    };
    let firsts = places(0, 0);
    let first = *firsts.first()?;
    let seconds = places(1, first);
    let has_commas = seconds.iter().any(is_after_comma);
    let mut cuts = vec![first];
    for index in 1..MOST_OPTIONS {
        let from = cuts[index - 1] + 1;
        let next: Vec<usize> =
            places(index, from).into_iter().filter(|at| !has_commas || is_after_comma(at)).collect();
        match next.as_slice() {
            [] => break,
            [one] => cuts.push(*one),
            _ => {
                let marker = style.marker(index);
                return Some(Err(format!("the options cannot be told apart: `{marker}` stands there twice")));
            }
        }
    }
    if cuts.len() < 2 {
        return None;
    }
    let head = line[..first].trim();
    // A sentence may end in a letter: `vitamin A. and vitamin B.` are no options.
    let is_plain = matches!(style, Style::Dot | Style::Colon) && !has_commas;
    if is_plain && !head.is_empty() && !head.ends_with(['?', ':', '.', '!', ')']) {
        return None;
    }
    if firsts.iter().filter(|at| **at < cuts[1]).count() > 1 {
        let marker = style.marker(0);
        return Some(Err(format!("the options cannot be told apart: `{marker}` stands there twice")));
    }
    let mut options = Vec::new();
    for (index, &cut) in cuts.iter().enumerate() {
        let end = cuts.get(index + 1).copied().unwrap_or(line.len());
        let option = line[cut + style.marker(index).len()..end].trim();
        let is_separated = has_commas && index + 1 < cuts.len();
        let bare = option.strip_suffix([',', ';']).filter(|_| is_separated).unwrap_or(option);
        options.push(bare.trim_end().to_owned());
    }
    Some(Ok((head, options)))
}

/// Whether a text of its own is an instruction.
fn begins_instruction(text: &str) -> bool {
    let folded = text.to_ascii_lowercase();
    INSTRUCTIONS.iter().chain(&INSTRUCTION_WORDS).any(|start| folded.starts_with(*start))
}

/// Where in an option, all in one line, an instruction begins that can be no part of it.
fn instruction_in(option: &str) -> Option<usize> {
    let folded = option.to_ascii_lowercase();
    let is_start = |at: &usize| {
        let before = option[..*at].chars().next_back();
        option[*at..].starts_with(char::is_uppercase) && before.is_none_or(|before| !before.is_alphanumeric())
    };
    let is_behind_sentence = |at: &usize| {
        let before = option[..*at].trim_end();
        before.len() < *at && before.ends_with(['.', '?', '!', ';'])
    };
    let phrases = INSTRUCTIONS
        .iter()
        .filter_map(|phrase| folded.match_indices(phrase).map(|(at, _)| at).find(is_start));
    let words = INSTRUCTION_WORDS.iter().filter_map(|word| {
        folded.match_indices(word).map(|(at, _)| at).find(|at| is_start(at) && is_behind_sentence(at))
    });
    phrases.chain(words).min()
}

/// A question without the word that stands over its options.
fn without_header(head: &str) -> String {
    let head = head.trim();
    let bare = head.trim_end_matches([':', '*', ' ']);
    let folded = bare.to_ascii_lowercase();
    let header = HEADERS.iter().find(|header| folded.ends_with(**header));
    let Some(header) = header else { return head.to_owned() };
    let before = &bare[..bare.len() - header.len()];
    let is_own_line = before.trim_end_matches([' ', '*']).ends_with('\n');
    let has_colon = head[bare.len()..].contains(':') && before.ends_with([' ', '\n']);
    let rest = before.trim_end_matches(['*', ' ', '\n', '\r']);
    if (is_own_line || has_colon) && !rest.is_empty() { rest.to_owned() } else { head.to_owned() }
}

/// The options in field `options` of a record: a list of texts, an object from letters to texts, or either written as a text.
/// Letters in front of the texts are taken off.
///
/// # Errors
/// When it is none of these, or does not hold from 2 to 26 texts that say something.
pub fn field(record: &Value) -> Result<Option<Vec<String>>, String> {
    let written;
    let value = match record.get("options") {
        None | Some(Value::Null) => return Ok(None),
        Some(Value::String(text)) => {
            let parsed = serde_json::from_str(text);
            written = parsed.map_err(|_| "`options` is a text, a list of texts was expected".to_owned())?;
            &written
        }
        Some(value) => value,
    };
    let texts: Vec<&Value> = match value {
        Value::Array(texts) => texts.iter().collect(),
        Value::Object(map) => {
            let named =
                map.iter().enumerate().all(|(n, (key, _))| n < MOST_OPTIONS && *key == letter(n).to_string());
            if !named {
                return Err("the keys of `options` are not the letters A, B, ... in order".into());
            }
            map.values().collect()
        }
        other => return Err(format!("`options` is {}, a list of texts was expected", kind(other))),
    };
    let mut options = Vec::with_capacity(texts.len());
    for (place, text) in texts.into_iter().enumerate() {
        match text {
            Value::String(text) if !text.trim().is_empty() => options.push(text.trim().to_owned()),
            Value::String(_) => return Err(format!("entry {} of `options` is blank", place + 1)),
            other => return Err(format!("entry {} of `options` is {}", place + 1, kind(other))),
        }
    }
    if !(2..=MOST_OPTIONS).contains(&options.len()) {
        return Err(format!(
            "`options` has {} entries, from 2 to {MOST_OPTIONS} were expected",
            options.len()
        ));
    }
    Ok(Some(without_letters(options)))
}

fn without_letters(options: Vec<String>) -> Vec<String> {
    let bare = STYLES.iter().find_map(|style| {
        let strip = |(index, option): (usize, &String)| {
            after_marker(option, *style, index).filter(|text| !text.is_empty()).map(str::to_owned)
        };
        options.iter().enumerate().map(strip).collect::<Option<Vec<String>>>()
    });
    bare.unwrap_or(options)
}

/// The option that an answer means: `B`, `(B)`, `B.`, `B) text`, the text of an option, or one of these behind `The answer is`.
///
/// # Errors
/// When it is none of these, letter and text disagree, or several options have that text.
pub fn find(answer: &str, options: &[String]) -> Result<usize, String> {
    const WRAPPERS: [char; 4] = ['*', '`', '"', ' '];
    let mut text = answer.trim().trim_matches(WRAPPERS);
    // A lead may stand before another: `Final answer: option B`.
    for _ in 0..3 {
        if let Some(found) = meant(text, options)? {
            return Ok(found);
        }
        let leads = |lead: &str| text.get(..lead.len()).is_some_and(|start| start.eq_ignore_ascii_case(lead));
        let Some(lead) = LEADS.into_iter().find(|lead| leads(lead)) else { break };
        text = text[lead.len()..].trim_start_matches([':', ' ', '\n']).trim_matches(WRAPPERS);
    }
    if answer.trim().is_empty() {
        return Err("the answer is blank".into());
    }
    Err(format!("no option is meant by `{}`", shortened(answer.trim())))
}

fn meant(text: &str, options: &[String]) -> Result<Option<usize>, String> {
    let same = match only(text, options, |option| option == text)? {
        None => only(text, options, |option| folded(option) == folded(text))?,
        found => found,
    };
    let Some((index, rest)) = lettered(text) else { return Ok(same) };
    if rest.is_empty() {
        return match same {
            Some(other) if other != index => {
                Err(format!("`{}` may be the letter of one option or the text of another", shortened(text)))
            }
            _ if index < options.len() => Ok(Some(index)),
            _ => Err(format!("the answer is {}, but there are {} options", letter(index), options.len())),
        };
    }
    if same.is_some() {
        return Ok(same);
    }
    match options.iter().position(|option| folded(option) == folded(rest)) {
        // Of options alike the one with the letter counts.
        Some(_) if options.get(index).is_some_and(|option| folded(option) == folded(rest)) => Ok(Some(index)),
        Some(other) => Err(format!(
            "the answer has the letter {}, but the text of option {}",
            letter(index),
            letter(other)
        )),
        None => Ok(None),
    }
}

/// The one option that is the same as `text`; `None` when there is none.
///
/// # Errors
/// When there are several: then the text names none of them.
pub(super) fn only(
    text: &str,
    options: &[String],
    is_same: impl Fn(&str) -> bool,
) -> Result<Option<usize>, String> {
    let mut found = (0..options.len()).filter(|&index| is_same(&options[index]));
    let first = found.next();
    match found.count() {
        0 => Ok(first),
        more => Err(format!("`{}` is the text of {} options", shortened(text.trim()), more + 1)),
    }
}

/// A letter alone, or set off from what follows.
fn lettered(text: &str) -> Option<(usize, &str)> {
    for style in STYLES {
        let open = if style == Style::Brackets { "(" } else { "" };
        let Some(index) =
            text.strip_prefix(open).and_then(|text| text.chars().next()).and_then(index_of_letter)
        else {
            continue;
        };
        if let Some(rest) = text.strip_prefix(&style.marker(index)) {
            return Some((index, rest.trim_matches(['*', ' ', '\n'])));
        }
    }
    let mut letters = text.chars();
    let index = letters.next().and_then(index_of_letter)?;
    letters.next().is_none().then_some((index, ""))
}

fn folded(text: &str) -> String {
    text.trim().trim_end_matches('.').to_lowercase()
}

/// So much of a text as a message has room for.
pub(super) fn shortened(text: &str) -> String {
    const MOST: usize = 80;
    let mut short: String = text.chars().take(MOST).collect();
    if text.chars().nth(MOST).is_some() {
        short.push_str("...");
    }
    short
}

#[cfg(test)]
mod tests {
    use super::*;
    use serde_json::json;

    #[test]
    fn options_are_read_in_every_layout() {
        let expected =
            ("What is seen?".to_owned(), vec!["cyst".to_owned(), "solid, dense mass".into(), "none".into()]);
        for text in [
            "What is seen? A)cyst, B)solid, dense mass, C)none",
            "What is seen? A) cyst; B) solid, dense mass; C) none",
            "What is seen? A) cyst B) solid, dense mass C) none",
            "What is seen? (A) cyst (B) solid, dense mass (C) none",
            "What is seen? A. cyst B. solid, dense mass C. none",
            "What is seen? A: cyst, B: solid, dense mass, C: none",
            "What is seen? Options: A: cyst, B: solid, dense mass, C: none",
            "What is seen?\nA) cyst\nB) solid, dense mass\nC) none",
            "What is seen?\r\nA. cyst\r\n\r\nB. solid, dense mass\r\nC. none\r\n",
            "What is seen?\n(A) cyst,\n(B) solid, dense mass,\n(C) none",
            "What is seen?\nOptions:\n- A: cyst\n- B: solid, dense mass\n- C: none",
            "What is seen?\n**Choices:**\nA. cyst\nB. solid, dense mass\nC. none\nAnswer with the option's letter from the given choices directly.",
            "What is seen?\nA. cyst\nB. solid, dense mass\nC. none\n\nYour task:\n1. Think.\n2. Answer.",
            "What is seen? A)cyst, B)solid, dense mass, C)none Think through the question step by step in <think>...</think> tags.",
            "What is seen?\nA)cyst, B)solid, dense mass, C)none\nPlease answer with one letter.",
        ] {
            assert_eq!(split(text).as_ref(), Ok(&expected), "{text}");
        }
        // Where commas set options off, a letter without one is part of an option.
        assert_eq!(split("Which? A)stage B) of it, B)none").unwrap().1, ["stage B) of it", "none"]);
        // Of two lines the question keeps both.
        assert_eq!(split("A woman of 60.\nWhat? A) x, B) y").unwrap().0, "A woman of 60.\nWhat?");
        assert_eq!(split("Options:\nA) x\nB) y").unwrap().0, "Options:");
    }

    #[test]
    fn what_can_be_cut_in_two_ways_is_refused() {
        for (text, words) in [
            ("What is seen?", "no options"),
            ("What? A) x", "no options"),
            ("Short of vitamin A. and vitamin B. too", "no options"),
            ("A) x\nB) y", "options but no question"),
            ("Q?\nA)\nB) y", "option A is blank"),
            ("Q? A) Answer with the letter, B) y", "x"),
            ("Q? A) x B) y B) z", "`B)` stands there twice"),
            ("Q? A. Hepatitis A. B. Hepatitis", "`A.` stands there twice"),
            ("Q?\nA) x\nB) y\nQ?\nA) x\nB) y", "twice"),
            ("Q?\nA) x\nB) y C) z", "some options have a line of their own"),
            (
                "Q?\nA) x\nB) y\nThe patient is old.",
                "text behind the options that is no instruction: `The patient is old.`",
            ),
            ("Q? A) x B) y\nC) z", "text behind the options"),
        ] {
            match split(text) {
                Err(error) => assert!(error.contains(words), "{text}: {error}"),
                Ok(cut) => assert_eq!((words, cut.1[1].as_str()), ("x", "y"), "{text}"),
            }
        }
    }

    #[test]
    fn an_option_is_cut_only_where_an_instruction_begins_a_line_or_a_sentence() {
        for (last, expected) in [
            // Within an option the same words are part of it.
            ("to select a donor", "to select a donor"),
            ("to choose a donor, to please all", "to choose a donor, to please all"),
            ("a way to answer with care", "a way to answer with care"),
            ("Select a donor", "Select a donor"),
            ("The Select kit", "The Select kit"),
            ("none. please wait", "none. please wait"),
            ("none.Please wait", "none.Please wait"),
            ("unselect one, please", "unselect one, please"),
            // Behind the end of a sentence, or in words that no option has, they are none.
            ("none. Select one.", "none."),
            ("none! Please say which.", "none!"),
            ("none; Choose one.", "none"),
            ("to select a donor. Choose one.", "to select a donor."),
            ("none Please answer with the letter.", "none"),
            ("none (Answer with the letter.)", "none"),
            ("none Select the correct option.", "none"),
            ("none Provide the correct single-letter choice (A, B, C, D,...) inside <answer> tags.", "none"),
            ("none Your task: 1. Think through the question.", "none"),
            ("none\nplease answer with one letter", "none"),
            ("none\nSelect one.", "none"),
        ] {
            for text in [format!("Q? A) cyst, B) {last}"), format!("Q?\nA) cyst\nB) {last}")] {
                let options = vec!["cyst".to_owned(), expected.to_owned()];
                assert_eq!(split(&text), Ok(("Q?".to_owned(), options)), "{text}");
            }
        }
        // Either the option is missing, or these are its words.
        let error = split("Q? A) cyst, B) Answer with the letter.").unwrap_err();
        assert!(error.contains("option B is blank"), "{error}");
    }

    #[test]
    fn a_field_of_options_has_many_shapes() {
        let expected = Ok(Some(vec!["x".to_owned(), "y".into()]));
        for options in [
            json!(["x", "y"]),
            json!(["A) x", "B) y"]),
            json!(["A. x", "B. y"]),
            json!({"A": "x", "B": " y "}),
            json!("[\"x\", \"y\"]"),
            json!("{\"A\": \"A: x\", \"B\": \"B: y\"}"),
        ] {
            assert_eq!(field(&json!({"options": options})), expected, "{options}");
        }
        assert_eq!(field(&json!({"options": ["A. x", "y"]})).unwrap().unwrap()[0], "A. x");
        assert_eq!(field(&json!({"options": null})), Ok(None));
        for options in [
            json!(3),
            json!("x, y"),
            json!(["x"]),
            json!(["x", " "]),
            json!(["x", 2]),
            json!({"B": "x", "A": "y"}),
            json!(vec!["x"; 27]),
        ] {
            assert!(field(&json!({"options": options})).is_err(), "{options}");
        }
    }

    #[test]
    fn an_answer_means_one_option_or_none() {
        let options = ["Cyst", "Solid mass", "A. fumigatus", "B"].map(str::to_owned);
        for (answer, expected) in [
            ("C", 2),
            (" (C) ", 2),
            ("C.", 2),
            ("**C**", 2),
            ("solid mass.", 1),
            ("B) Solid mass", 1),
            ("B: solid mass.", 1),
            ("(B) Solid mass", 1),
            ("The answer is B. Solid mass", 1),
            ("The correct answer is: A", 0),
            ("Answer: Cyst", 0),
            ("Final answer: option C", 2),
            ("A. fumigatus", 2),
            ("C. A. fumigatus", 2),
            ("D", 3),
        ] {
            let options =
                if answer == "D" { options.clone().map(|o| o.replace('B', "b.")) } else { options.clone() };
            assert_eq!(find(answer, &options), Ok(expected), "{answer}");
        }
        for (answer, words) in [
            ("B", "may be the letter of one option or the text of another"),
            ("E", "the answer is E, but there are 4 options"),
            ("A) Solid mass", "the letter A, but the text of option B"),
            ("B. The rim is thick.", "no option is meant by"),
            ("I see a cyst", "no option is meant by `I see a cyst`"),
            ("A or C", "no option"),
            ("a", "no option"),
            ("", "blank"),
            ("answer answer answer answer C", "no option"),
        ] {
            let error = find(answer, &options).unwrap_err();
            assert!(error.contains(words), "{answer}: {error}");
        }
        assert!(find(&"x".repeat(1000), &options).unwrap_err().len() < 120);
    }

    #[test]
    fn a_text_that_several_options_have_names_none_of_them() {
        let options = ["cyst", "mass", "cyst", "Mass"].map(str::to_owned);
        for (answer, expected) in [
            // A letter tells them apart, and so does the case where it is the same.
            ("A", 0),
            ("C", 2),
            ("A) cyst", 0),
            ("C. Cyst", 2),
            ("The answer is (C) cyst", 2),
            ("mass", 1),
            ("Mass", 3),
        ] {
            assert_eq!(find(answer, &options), Ok(expected), "{answer}");
        }
        for (answer, words) in [
            ("cyst", "`cyst` is the text of 2 options"),
            ("Cyst.", "`Cyst.` is the text of 2 options"),
            ("The answer is: cyst", "`cyst` is the text of 2 options"),
            ("MASS", "`MASS` is the text of 2 options"),
            ("B) cyst", "the letter B, but the text of option A"),
        ] {
            let error = find(answer, &options).unwrap_err();
            assert!(error.contains(words), "{answer}: {error}");
        }
    }
}
