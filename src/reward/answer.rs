//! Which option a completion chooses, if it says so unambiguously.
//!
//! Rules, in order:
//! 1. Reasoning in `<think>...</think>` is not read. What `<answer>...</answer>` pairs remain (tags in any case, the
//!    innermost of nested ones) are all read: they must agree. An unclosed tag is no tag.
//! 2. Inside a pair: a letter form alone (`B`, `b`, `(B)`, `B)`, `B.`), a letter form before other text
//!    (`B. cyst`, `(B) cyst`), or a letter after `answer`, `option`, `choice` (`The answer is B`).
//! 3. Without a pair: the whole text must be a letter form alone.
//!
//! A completion that lists several letters (`A or B`, `A) x B) y`) chooses none, and a letter that the question
//! does not have is no answer. Deviation: Med-R1 and AdvMed-R1 take the first tag; an ambiguous one is none here.

/// What a completion chooses.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Parsed {
    /// Index of the option.
    pub option: usize,
    /// Whether it stood in an `<answer>` tag.
    pub tagged: bool,
    /// Whether the letter stood alone, without other text.
    pub bare: bool,
}

/// The option that `completion` chooses among `num_options`, or `None` when it cannot be read.
pub fn parse_answer(completion: &str, num_options: usize) -> Option<usize> {
    parse(completion, num_options).map(|parsed| parsed.option)
}

/// As [`parse_answer`], with how it was written.
pub fn parse(completion: &str, num_options: usize) -> Option<Parsed> {
    let visible = without_reasoning(completion);
    let contents = tag_contents(&visible);
    let parsed = if contents.is_empty() {
        let option = letter_alone(visible.trim())?;
        Parsed { option, tagged: false, bare: true }
    } else {
        let mut found: Option<Parsed> = None;
        for content in contents {
            let (option, bare) = read_content(content.trim())?;
            match &mut found {
                None => found = Some(Parsed { option, tagged: true, bare }),
                Some(first) if first.option == option => first.bare &= bare,
                Some(_) => return None,
            }
        }
        found?
    };
    (parsed.option < num_options).then_some(parsed)
}

/// The text with every closed `<think>` block cut out. A block ends at the last `</think>` before the next
/// `<think>`, so that a stray closing tag inside reasoning does not expose the rest of it.
fn without_reasoning(text: &str) -> String {
    let lower = text.to_ascii_lowercase();
    let mut kept = String::with_capacity(text.len());
    let mut from = 0;
    while let Some(open) = find(&lower, "<think>", from) {
        let body = open + "<think>".len();
        let until = find(&lower, "<think>", body).unwrap_or(lower.len());
        let Some(close) = lower[body..until].rfind("</think>") else {
            if until == lower.len() {
                break;
            }
            kept.push_str(&text[from..until]);
            from = until;
            continue;
        };
        kept.push_str(&text[from..open]);
        from = body + close + "</think>".len();
    }
    kept.push_str(&text[from..]);
    kept
}

fn find(text: &str, pattern: &str, from: usize) -> Option<usize> {
    text[from..].find(pattern).map(|at| at + from)
}

/// What stands between each closing answer tag and the nearest opening one before it.
fn tag_contents(text: &str) -> Vec<&str> {
    let lower = text.to_ascii_lowercase();
    let (mut contents, mut from) = (Vec::new(), 0);
    while let Some(close) = find(&lower, "</answer>", from) {
        if let Some(open) = lower[from..close].rfind("<answer>") {
            contents.push(&text[from + open + "<answer>".len()..close]);
        }
        from = close + "</answer>".len();
    }
    contents
}

/// The letter that the inside of a tag chooses, and whether it stands alone.
fn read_content(content: &str) -> Option<(usize, bool)> {
    if let Some(option) = letter_alone(content) {
        return Some((option, true));
    }
    let content = after_lead_in(content);
    if let Some(option) = letter_alone(content) {
        return Some((option, false));
    }
    let (option, rest) = label(content)?;
    (!has_other_label(rest, option)).then_some((option, false))
}

/// A text that is nothing but one letter: `B`, `b`, `(B)`, `[B]`, `B)`, `B.`, `B:`, `*B*`, quoted or not.
fn letter_alone(text: &str) -> Option<usize> {
    let core = text
        .trim_matches(|c: char| c.is_whitespace() || matches!(c, '*' | '"' | '\'' | '`'))
        .trim_start_matches(['(', '['])
        .trim_end_matches([')', ']', '.', ':', ','])
        .trim_matches(|c: char| c.is_whitespace() || c == '*');
    let mut letters = core.chars();
    match (letters.next(), letters.next()) {
        (Some(letter), None) => index_of(letter.to_ascii_uppercase()),
        _ => None,
    }
}

/// Cuts `The correct answer is`, `Option`, `Choice:` and the like off the front.
fn after_lead_in(content: &str) -> &str {
    let mut rest = content.trim_start();
    let mut named = false;
    loop {
        let end = rest.find(|c: char| !c.is_ascii_alphabetic()).unwrap_or(rest.len());
        let word = rest[..end].to_ascii_lowercase();
        match word.as_str() {
            "answer" | "option" | "choice" => named = true,
            "the" | "correct" | "final" | "best" | "right" => {}
            "is" if named => {}
            _ => break,
        }
        rest = rest[end..].trim_start_matches(|c: char| c.is_whitespace() || c == ':');
    }
    if named { rest } else { content }
}

/// A label at the start of `text`: `(B) `, `B) `, `B. `, `B: `, and what follows it.
fn label(text: &str) -> Option<(usize, &str)> {
    let text = text.trim_start();
    let (bracketed, inner) = match text.strip_prefix(['(', '[']) {
        Some(inner) => (true, inner),
        None => (false, text),
    };
    let mut characters = inner.chars();
    let option = index_of(characters.next()?)?;
    let mark = characters.next()?;
    let closes = if bracketed { matches!(mark, ')' | ']') } else { matches!(mark, ')' | '.' | ':' | ']') };
    let rest = characters.as_str();
    // `B.5` or `E.coli` is a name, not a label, but `B)cyst` is how Med-R1 writes options.
    let spaced = matches!(mark, ')' | ']') || rest.starts_with(char::is_whitespace) || rest.is_empty();
    (closes && spaced).then_some((option, rest))
}

/// Whether another option than `chosen` is offered in `text`: as a label with text after it, in brackets, as the
/// first thing, or after a word or mark that joins alternatives. `hepatitis C` at the end offers none.
fn has_other_label(text: &str, chosen: usize) -> bool {
    let mut previous_word = "";
    let mut from = 0;
    while let Some((start, word)) = next_word(text, from) {
        let end = start + word.len();
        let option = if word.len() == 1 { word.chars().next().and_then(index_of) } else { None };
        if option.is_some_and(|option| option != chosen) {
            let between = text[from..start].trim();
            let after = &text[end..];
            let article = word == "A" && after.trim_start_matches(' ').starts_with(char::is_alphabetic);
            let first = from == 0;
            let joined = matches!(
                previous_word.to_ascii_lowercase().as_str(),
                "or" | "and"
                    | "either"
                    | "maybe"
                    | "perhaps"
                    | "then"
                    | "but"
                    | "also"
                    | "option"
                    | "choice"
                    | "answer"
                    | "is"
            ) || between.ends_with([',', ';', '/', '|', '&', '+', '(', '[', '.', ':']);
            let labels = after.starts_with([')', ']', ':'])
                || (after.starts_with('.') && !after[1..].trim().is_empty());
            if (first || joined || labels) && !article {
                return true;
            }
        }
        previous_word = word;
        from = end;
    }
    false
}

fn next_word(text: &str, from: usize) -> Option<(usize, &str)> {
    let start = from + text[from..].find(char::is_alphanumeric)?;
    let length =
        text[start..].find(|c: char| !c.is_alphanumeric() && c != '\'').unwrap_or(text.len() - start);
    Some((start, &text[start..start + length]))
}

/// Options have letters A to H: more are never met, and `I` is a word.
fn index_of(letter: char) -> Option<usize> {
    ('A'..='H').contains(&letter).then(|| letter as usize - 'A' as usize)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn check(cases: &[(&str, Option<char>)]) {
        for (completion, expected) in cases {
            let found = parse_answer(completion, 4).map(|option| char::from(b'A' + option as u8));
            assert_eq!(found, *expected, "{completion}");
        }
    }

    #[test]
    fn letter_forms_in_a_tag() {
        check(&[
            ("<answer>B</answer>", Some('B')),
            ("<answer> B </answer>", Some('B')),
            ("<answer>\nB\n</answer>", Some('B')),
            ("<answer>b</answer>", Some('B')),
            ("<ANSWER>C</Answer>", Some('C')),
            ("<answer>B)</answer>", Some('B')),
            ("<answer>(B)</answer>", Some('B')),
            ("<answer>[D]</answer>", Some('D')),
            ("<answer>**B**</answer>", Some('B')),
            ("<answer>\"B\"</answer>", Some('B')),
            ("<answer>B.</answer>", Some('B')),
            ("<answer>B. cyst</answer>", Some('B')),
            ("<answer>B) A cyst</answer>", Some('B')),
            ("<answer>B)cyst</answer>", Some('B')),
            ("<answer>(B) cyst</answer>", Some('B')),
            ("<answer>B: cyst</answer>", Some('B')),
            ("<answer>B. hepatitis C</answer>", Some('B')),
            ("<answer>B. Hepatitis C.</answer>", Some('B')),
            ("<answer>Option B</answer>", Some('B')),
            ("<answer>The correct answer is: B.</answer>", Some('B')),
            ("<answer>the answer is A</answer>", Some('A')),
            ("<think> A or B?</think><answer> C</answer> done", Some('C')),
        ]);
    }

    #[test]
    fn hedging_gains_nothing() {
        check(&[
            ("<answer>A or B</answer>", None),
            ("<answer>A, B</answer>", None),
            ("<answer>A/B</answer>", None),
            ("<answer>A B C D</answer>", None),
            ("<answer>ABCD</answer>", None),
            ("<answer>A) B)</answer>", None),
            ("<answer>A. B. C. D.</answer>", None),
            ("<answer>A) round, B) oval</answer>", None),
            ("<answer>A. round or B. oval</answer>", None),
            ("<answer>A. round (B)</answer>", None),
            ("<answer>A. maybe B</answer>", None),
            ("<answer>A. round; C</answer>", None),
            ("<answer>(A) (B)</answer>", None),
            ("<answer>The answer is A or B</answer>", None),
            ("<answer>A</answer><answer>B</answer>", None),
            ("<answer>A</answer> no: <answer>B</answer>", None),
            ("<answer>A</answer><answer></answer>", None),
            ("<answer>A or B</answer><answer>A</answer>", None),
            ("<answer>A</answer> again <answer> a </answer>", Some('A')),
        ]);
    }

    #[test]
    fn words_are_not_letters() {
        check(&[
            ("<answer></answer>", None),
            ("<answer>Because</answer>", None),
            ("<answer>A cyst</answer>", None),
            ("<answer>cyst</answer>", None),
            ("<answer>CT</answer>", None),
            ("<answer>Dermoscopy</answer>", None),
            ("<answer>not B</answer>", None),
            ("<answer>B cell</answer>", None),
            ("<answer>E.coli</answer>", None),
            ("<answer>the best</answer>", None),
            ("<answer>D.5 mm</answer>", None),
            ("<answer>1</answer>", None),
            ("<answer>\u{ff22}</answer>", None),
            ("<answer>\u{df}</answer>", None),
            ("<answer>İ</answer>", None),
        ]);
    }

    #[test]
    fn without_a_tag_only_a_bare_letter_counts() {
        check(&[
            ("B", Some('B')),
            (" (b) \n", Some('B')),
            ("B.", Some('B')),
            ("<think>A</think> D", Some('D')),
            ("B. cyst", None),
            ("The answer is B", None),
            ("A cyst", None),
            ("A or B", None),
            ("", None),
            ("<answer>B", None),
            ("B</answer>", None),
            ("<answer B</answer>", None),
            ("<think>B</think>", None),
        ]);
    }

    #[test]
    fn reasoning_is_not_an_answer() {
        check(&[
            ("<think><answer>A</answer></think><answer>B</answer>", Some('B')),
            ("<think>x</think> y <answer>A</answer></think><answer>B</answer>", Some('B')),
            ("<answer>B</answer><think>or <answer>A</answer></think>", Some('B')),
            ("<think>never closed <answer>B</answer>", Some('B')),
            ("<think><think>a</think><answer>A</answer></think><answer>B</answer>", Some('B')),
            ("<think><answer>A</answer></think>", None),
            ("<answer><answer>B</answer></answer>", Some('B')),
            ("<answer>A<answer>B</answer>", Some('B')),
        ]);
    }

    #[test]
    fn letters_beyond_the_options_are_none() {
        assert_eq!(parse_answer("<answer>C</answer>", 2), None);
        assert_eq!(parse_answer("<answer>E</answer>", 4), None);
        assert_eq!(parse_answer("<answer>E</answer>", 5), Some(4));
        assert_eq!(parse_answer("Z", 4), None);
        assert_eq!(parse_answer("A", 0), None);
    }

    #[test]
    fn no_text_makes_it_fail() {
        // Every string over a small hostile alphabet, multi-byte characters and halves of tags included.
        let pieces = ["<think>", "</think>", "<answer>", "</answer>", "B", "é", "(", ". ", "<"];
        for code in 0..pieces.len().pow(5) {
            let text: String =
                (0..5).map(|place| pieces[code / pieces.len().pow(place) % pieces.len()]).collect();
            if let Some(option) = parse_answer(&text, 4) {
                assert_eq!(option, 1, "{text}");
            }
        }
    }
}
