//! Which option a completion chooses, if it says so unambiguously.
//!
//! Rules, in order:
//! 1. Reasoning in `<think>...</think>` is not read. What `<answer>...</answer>` pairs remain (tags in any case, the
//!    innermost of nested ones) are all read: they must agree. An unclosed tag is no tag.
//! 2. Inside a pair: a letter form alone (`B`, `b`, `(B)`, `B)`, `B.`), a letter before that option's own text, whatever marks
//!    stand between and around them (`B) cyst`, `b. cyst`, `**B**: cyst`, `B - cyst`), a letter form before other text
//!    (`B. round`, `(B) round`), or a letter after `answer`, `option`, `choice` (`The answer is B`).
//! 3. Without a pair: the whole text must be a letter form alone.
//!
//! A completion that lists several letters (`A or B`, `A) x b) y`, `A. x vs B`, `A. x - B`, `A. x, possibly b`) chooses none,
//! and a letter that the question does not have is no answer. Letters are those of the options and always those up to H, so that a
//! letter the question lacks is seen beside another; only ASCII letters are letters, whatever else looks like one. An option's own
//! text may hold letters (`A) Hepatitis B/C`); behind it no further one may stand alone.
//! Deviation: Med-R1 and AdvMed-R1 take the first tag; an ambiguous one is none here.

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

/// The options of a question: how many there are, and their texts where they are known.
#[derive(Debug, Clone, Copy)]
pub struct Options<'a> {
    count: usize,
    texts: &'a [String],
}

impl From<usize> for Options<'_> {
    fn from(count: usize) -> Self {
        Self { count, texts: &[] }
    }
}

impl<'a> From<&'a [String]> for Options<'a> {
    fn from(texts: &'a [String]) -> Self {
        Self { count: texts.len(), texts }
    }
}

/// The option of `options` that `completion` chooses, or `None` when it cannot be read.
pub fn parse_answer<'a>(completion: &str, options: impl Into<Options<'a>>) -> Option<usize> {
    parse(completion, options).map(|parsed| parsed.option)
}

/// As [`parse_answer`], with how it was written.
pub fn parse<'a>(completion: &str, options: impl Into<Options<'a>>) -> Option<Parsed> {
    let Options { count: num_options, texts } = options.into();
    let letters = Letters::of(num_options);
    let visible = without_reasoning(completion);
    let contents = tag_contents(&visible);
    let parsed = if contents.is_empty() {
        let option = letters.alone(visible.trim())?;
        Parsed { option, tagged: false, bare: true }
    } else {
        let mut found: Option<Parsed> = None;
        for content in contents {
            let (option, bare) = letters.read_content(content.trim(), texts)?;
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

/// The letters that options have: `A` to the last.
#[derive(Debug, Clone, Copy)]
struct Letters {
    count: usize,
}

impl Letters {
    /// Those of a question, and never fewer than eight: of a question with four options E to H are letters too, of
    /// answers that are not there. Further ones are words (`I`) and names (`K`, `T`) where no option has them.
    fn of(num_options: usize) -> Self {
        Self { count: num_options.clamp(8, 26) }
    }

    /// The option of an upper-case letter.
    fn index_of(self, letter: char) -> Option<usize> {
        let index = letter.is_ascii_uppercase().then(|| letter as usize - 'A' as usize)?;
        (index < self.count).then_some(index)
    }

    /// The letter that the inside of a tag chooses, and whether it stands alone.
    fn read_content(self, content: &str, texts: &[String]) -> Option<(usize, bool)> {
        if let Some(option) = self.alone(content) {
            return Some((option, true));
        }
        let content = after_lead_in(content);
        if let Some(option) = self.alone(content) {
            return Some((option, false));
        }
        if let Some((option, rest)) = self.own_text(content, texts) {
            return (!self.has_lone_letter(rest, option)).then_some((option, false));
        }
        let (option, rest) = self.label(content)?;
        (!self.has_other_label(rest, option)).then_some((option, false))
    }

    /// A text that is nothing but one letter: `B`, `b`, `(B)`, `[B]`, `B)`, `B.`, `B:`, `*B*`, quoted or not.
    fn alone(self, text: &str) -> Option<usize> {
        let core = text
            .trim_matches(|c: char| c.is_whitespace() || matches!(c, '*' | '"' | '\'' | '`'))
            .trim_start_matches(['(', '[', '\u{ff08}'])
            .trim_end_matches([')', ']', '.', ':', ',', '\u{ff09}', '\u{3002}'])
            .trim_matches(|c: char| c.is_whitespace() || c == '*');
        // LaTeX, as many language models end a reasoning.
        let core = core.strip_prefix("\\boxed{").and_then(|inner| inner.strip_suffix('}')).unwrap_or(core);
        let mut letters = core.chars();
        match (letters.next(), letters.next()) {
            (Some(letter), None) => self.index_of(letter.to_ascii_uppercase()),
            _ => None,
        }
    }

    /// A label at the start of `text`: `(B) `, `B) `, `B. `, `B: `, and what follows it.
    fn label(self, text: &str) -> Option<(usize, &str)> {
        let text = text.trim_start();
        let (bracketed, inner) = match text.strip_prefix(['(', '[']) {
            Some(inner) => (true, inner),
            None => (false, text),
        };
        let mut characters = inner.chars();
        let option = self.index_of(characters.next()?)?;
        let mark = characters.next()?;
        let closes =
            if bracketed { matches!(mark, ')' | ']') } else { matches!(mark, ')' | '.' | ':' | ']') };
        let rest = characters.as_str();
        // `B.5` or `E.coli` is a name, not a label, but `B)cyst` is how Med-R1 writes options.
        let spaced = matches!(mark, ')' | ']') || rest.starts_with(char::is_whitespace) || rest.is_empty();
        (closes && spaced).then_some((option, rest))
    }

    /// A letter in either case before its own option's text, whatever marks stand between and around them, and what follows the
    /// text: `b) cyst`, `**C**: cyst`, `C - cyst`. A blank alone parts them only behind a capital, for `a` is a word too.
    fn own_text<'t>(self, content: &'t str, texts: &[String]) -> Option<(usize, &'t str)> {
        let start =
            content.trim_start_matches(|c: char| c.is_whitespace() || is_wrapping(c) || "([".contains(c));
        let letter = start.chars().next()?;
        let option = self.index_of(letter.to_ascii_uppercase())?;
        let rest = &start[1..];
        let marks = &rest[..rest.find(char::is_alphanumeric)?];
        let parts = marks.contains(|c: char| !c.is_whitespace()) || marks.contains('\n');
        if !parts && (marks.is_empty() || letter.is_ascii_lowercase()) {
            return None;
        }
        after_text(rest, texts.get(option)?).map(|rest| (option, rest))
    }

    /// Whether another letter than `chosen` stands in `text`, which follows the chosen option's own: alone, or as a label.
    fn has_lone_letter(self, text: &str, chosen: usize) -> bool {
        let mut from = 0;
        while let Some((start, word)) = next_word(text, from) {
            from = start + word.len();
            let single = word.chars().next().filter(|_| word.len() == 1);
            let option = single.and_then(|letter| self.index_of(letter.to_ascii_uppercase()));
            let is_small = word.starts_with(|c: char| c.is_ascii_lowercase());
            let after = &text[from..];
            // `e.g.`, `e. coli`
            let is_abbreviation =
                is_small && after.strip_prefix('.').is_some_and(|rest| !rest.trim().is_empty());
            if option.is_some_and(|option| option != chosen) && !goes_on(after) && !is_abbreviation {
                return true;
            }
        }
        self.has_other_label(text, chosen)
    }

    /// Whether another option than `chosen` is offered in `text`: as a label with text after it, in brackets, as the
    /// first thing, or after words or a mark that join alternatives. `hepatitis C` at the end offers none, nor do the
    /// words `A` and `I` before others. A small letter must be a label, or stand alone behind such words.
    fn has_other_label(self, text: &str, chosen: usize) -> bool {
        let mut words: Vec<&str> = Vec::new();
        let mut from = 0;
        while let Some((start, word)) = next_word(text, from) {
            let end = start + word.len();
            let single = word.chars().next().filter(|_| word.len() == 1);
            let option = single.and_then(|letter| self.index_of(letter.to_ascii_uppercase()));
            if option.is_some_and(|option| option != chosen) {
                let (before, after) = (&text[..start], &text[end..]);
                let is_offered = if single.is_some_and(|letter| letter.is_ascii_lowercase()) {
                    is_small_label(before, after) || is_small_alternative(&words, after)
                } else {
                    let is_word = matches!(word, "A" | "I")
                        && after.trim_start_matches(' ').starts_with(char::is_alphabetic);
                    let between = &text[from..start];
                    let first = from == 0;
                    let joined = before_joint(&words).is_some()
                        || between.trim().ends_with([',', ';', '/', '|', '&', '+', '(', '[', '.', ':']);
                    let is_contrast = words.last().is_some_and(|word| contrasts(word));
                    let set_against = (is_contrast || is_dash(between)) && !goes_on(after);
                    let labels = after.starts_with([')', ']', ':'])
                        || (after.starts_with('.') && !after[1..].trim().is_empty());
                    (first || joined || set_against || labels) && !is_word
                };
                if is_offered {
                    return true;
                }
            }
            words.push(word);
            from = end;
        }
        false
    }
}

/// Emphasis and quotes around a text.
fn is_wrapping(c: char) -> bool {
    matches!(c, '*' | '_' | '"' | '\'' | '`' | '\u{201c}' | '\u{201d}' | '\u{2018}' | '\u{2019}')
}

/// What follows `wanted` in `text`, which must begin with it: in either case, behind marks, with any white space between its
/// words, and with a full stop at its end or without.
fn after_text<'t>(text: &'t str, wanted: &str) -> Option<&'t str> {
    let wanted = wanted.trim().trim_end_matches('.');
    let first = wanted.chars().next()?;
    // An option may begin with a mark itself.
    let is_mark = |c: char| c.is_whitespace() || (!c.is_alphanumeric() && !same_in_any_case(c, first));
    let mut rest = text.trim_start_matches(is_mark);
    for word in wanted.split_whitespace() {
        rest = rest.trim_start();
        for expected in word.chars() {
            let found = rest.chars().next().filter(|&found| same_in_any_case(found, expected))?;
            rest = &rest[found.len_utf8()..];
        }
    }
    (!rest.starts_with(char::is_alphanumeric)).then_some(rest)
}

fn same_in_any_case(a: char, b: char) -> bool {
    a == b || a.to_lowercase().eq(b.to_lowercase())
}

fn is_one_of(word: &str, others: &[&str]) -> bool {
    others.iter().any(|other| word.eq_ignore_ascii_case(other))
}

/// What stands before the words at the end of `words` that join an alternative to it; none, where they join none.
fn before_joint<'w, 't>(words: &'w [&'t str]) -> Option<&'w [&'t str]> {
    const JOINING: [&str; 25] = [
        "or",
        "and",
        "either",
        "maybe",
        "perhaps",
        "possibly",
        "probably",
        "potentially",
        "presumably",
        "conceivably",
        "alternatively",
        "alternately",
        "otherwise",
        "else",
        "instead",
        "rather",
        "unless",
        "then",
        "but",
        "also",
        "option",
        "choice",
        "alternative",
        "answer",
        "is",
    ];
    const MODAL: [&str; 7] = ["could", "may", "might", "can", "would", "should", "must"];
    match words {
        [before @ .., last] if is_one_of(last, &JOINING) => Some(before),
        [before @ .., modal, last] if is_one_of(modal, &MODAL) && is_one_of(last, &["be"]) => Some(before),
        [before @ .., first, last] if is_one_of(first, &["if"]) && is_one_of(last, &["not"]) => Some(before),
        [before @ .., first, well, last]
            if is_one_of(first, &["as"]) && is_one_of(well, &["well"]) && is_one_of(last, &["as"]) =>
        {
            Some(before)
        }
        _ => None,
    }
}

/// Whether a word sets alternatives against each other. Names hold it too (`T cells vs B cells`): see [`goes_on`].
fn contrasts(word: &str) -> bool {
    is_one_of(word, &["nor", "versus", "vs", "likely", "even", "plus"])
}

/// Whether a small letter behind `words` and before `after` stands alone as an alternative to what they say: `round or b`,
/// `round, possibly b.`; not `hepatitis or b cells`, and not the letters of one name, `vitamin c or d`.
fn is_small_alternative(words: &[&str], after: &str) -> bool {
    let before = match words {
        [before @ .., last] if contrasts(last) => before,
        _ => match before_joint(words) {
            Some(before) => before,
            None => return false,
        },
    };
    let mut named = before;
    while let Some(before) = before_joint(named) {
        named = before;
    }
    let is_of_a_name = matches!(named, [.., _, last] if is_letter_of_name(last));
    let rest = after.trim_start_matches(' ');
    let is_abbreviation = rest.strip_prefix('.').is_some_and(|rest| !rest.trim().is_empty());
    !is_of_a_name && !goes_on(after) && !is_abbreviation
}

/// Whether a word is a letter that names hold, with or without a number: `c`, `b12`.
fn is_letter_of_name(word: &str) -> bool {
    let mut characters = word.chars();
    characters.next().is_some_and(char::is_alphabetic) && characters.all(|c| c.is_ascii_digit())
}

/// Whether what stands between two words is a dash apart from them. One without blanks makes a name of both (`hepatitis-B`),
/// except for the long one.
fn is_dash(between: &str) -> bool {
    let marks = between.trim_end();
    let lead = marks.trim_end_matches(['-', '\u{2013}', '\u{2014}', '\u{2212}']);
    let is_apart = between.len() > marks.len() && !lead.is_empty();
    lead.len() < marks.len() && (is_apart || marks.ends_with('\u{2014}'))
}

/// Whether the name that a letter begins goes on in `after`: `B cells`, `B-mode`.
fn goes_on(after: &str) -> bool {
    let next = after.trim_start_matches(' ');
    next.strip_prefix(['-', '\u{2011}']).unwrap_or(next).starts_with(char::is_alphanumeric)
}

/// Whether a small letter between these texts is a label: `(b)`, `b)` where the bracket closes no other, or `b. ` and `b: ` at
/// the start of a line. Elsewhere it is a part of words: `hepatitis b.`, `(vitamin c)`, `nodule(s)`, `e. coli`.
fn is_small_label(before: &str, after: &str) -> bool {
    let mut following = after.chars();
    let mark = following.next();
    let is_spaced = following.next().is_none_or(char::is_whitespace);
    if let Some(outside) = before.strip_suffix(['(', '[']) {
        return matches!(mark, Some(')' | ']')) && !outside.ends_with(char::is_alphanumeric);
    }
    match mark {
        Some(')') => {
            let is_apart = before.ends_with(|c: char| c.is_whitespace() || ",;/|&+*".contains(c));
            let is_enclosed = before.rfind(['(', ')']).is_some_and(|at| before[at..].starts_with('('));
            (is_apart || before.is_empty()) && !is_enclosed
        }
        Some('.' | ':') => is_spaced && before.trim_end_matches([' ', '\t', '-', '*']).ends_with('\n'),
        _ => false,
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

fn next_word(text: &str, from: usize) -> Option<(usize, &str)> {
    let start = from + text[from..].find(char::is_alphanumeric)?;
    let length =
        text[start..].find(|c: char| !c.is_alphanumeric() && c != '\'').unwrap_or(text.len() - start);
    Some((start, &text[start..start + length]))
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
            ("<answer>A and B</answer>", None),
            ("<answer>A & B</answer>", None),
            ("<answer>(A)/(B)</answer>", None),
            ("<answer>A.B</answer>", None),
            ("<answer>A\nB</answer>", None),
            ("<answer>both A and B</answer>", None),
            ("<answer>not A but B</answer>", None),
            ("<answer>Not A, B</answer>", None),
            ("<answer>A, not B</answer>", None),
            ("<answer>The answer is not A but B</answer>", None),
            ("<answer>B. cyst, not A. oval</answer>", None),
            ("<answer>B. cyst (or C)</answer>", None),
            ("<answer>B) cyst [C]</answer>", None),
            // A letter that a question of four options lacks is a second letter all the same.
            ("<answer>B. cyst or F. none</answer>", None),
            ("<answer>A</answer> again <answer> a </answer>", Some('A')),
        ]);
    }

    #[test]
    fn small_labels_and_contrasts_are_hedges_too() {
        check(&[
            ("<answer>A) round b) oval</answer>", None),
            ("<answer>A) round, b) oval</answer>", None),
            ("<answer>A)round,b)oval</answer>", None),
            ("<answer>A) b)</answer>", None),
            ("<answer>A) round b)</answer>", None),
            ("<answer>(A) round (b) oval</answer>", None),
            ("<answer>A. round [b]</answer>", None),
            ("<answer>A. round or b) oval</answer>", None),
            ("<answer>A) round (hepatitis c) b) oval</answer>", None),
            ("<answer>A. round\nb. oval</answer>", None),
            ("<answer>A. round\n- b: oval</answer>", None),
            // A letter that a question of four options lacks is a second letter all the same.
            ("<answer>A) round f) none</answer>", None),
            ("<answer>A. round vs B</answer>", None),
            ("<answer>A. round vs. B</answer>", None),
            ("<answer>A. round VS B.</answer>", None),
            ("<answer>A. round versus B</answer>", None),
            ("<answer>A vs B</answer>", None),
            ("<answer>A, nor B</answer>", None),
            ("<answer>A. round, nor B</answer>", None),
            ("<answer>A. neither round nor B, nor C</answer>", None),
            ("<answer>A. round - B</answer>", None),
            ("<answer>A. round -- B</answer>", None),
            ("<answer>A. round \u{2013} B</answer>", None),
            ("<answer>A. round \u{2014} B</answer>", None),
            ("<answer>A. round\u{2014}B</answer>", None),
            ("<answer>A. round. - B. oval</answer>", None),
            ("<answer>A. round (dense) - B</answer>", None),
            ("<answer>A - B</answer>", None),
            ("<answer>A-B</answer>", None),
        ]);
    }

    #[test]
    fn a_letter_behind_words_of_doubt_is_a_hedge() {
        check(&[
            ("<answer>A. round, possibly B</answer>", None),
            ("<answer>A. round, probably B</answer>", None),
            ("<answer>A. Or possibly B</answer>", None),
            ("<answer>A. round or possibly B</answer>", None),
            ("<answer>A. round. Alternatively B</answer>", None),
            ("<answer>A. round, otherwise B</answer>", None),
            ("<answer>A. round, or else B</answer>", None),
            ("<answer>A. round, potentially B.</answer>", None),
            ("<answer>A. round, rather B</answer>", None),
            ("<answer>A. round, could be B</answer>", None),
            ("<answer>A. It might be B</answer>", None),
            ("<answer>A. round, if not B</answer>", None),
            ("<answer>A. round unless B</answer>", None),
            ("<answer>A. round, second choice B</answer>", None),
            ("<answer>A. round, likely B</answer>", None),
            ("<answer>A. round or even B</answer>", None),
            ("<answer>A) round as well as B</answer>", None),
            ("<answer>A) round AS WELL AS B.</answer>", None),
            ("<answer>A. round, possibly B oval</answer>", None),
            // Small letters that stand alone.
            ("<answer>A. round or b</answer>", None),
            ("<answer>A. round or b.</answer>", None),
            ("<answer>A. round or b, or c</answer>", None),
            ("<answer>A. or b</answer>", None),
            ("<answer>A. a or b</answer>", None),
            ("<answer>A. round and b</answer>", None),
            ("<answer>A. round, possibly b</answer>", None),
            ("<answer>A. round, could be b?</answer>", None),
            ("<answer>A. round as well as b</answer>", None),
            ("<answer>A. round, if not b</answer>", None),
            ("<answer>A. round vs b</answer>", None),
            ("<answer>A. round, the answer is b</answer>", None),
            ("<answer>The answer is A or b</answer>", None),
        ]);
    }

    #[test]
    fn letters_within_the_words_of_an_option_are_no_hedge() {
        check(&[
            ("<answer>A. hepatitis b</answer>", Some('A')),
            ("<answer>A. Hepatitis b.</answer>", Some('A')),
            ("<answer>A. type b, acute</answer>", Some('A')),
            ("<answer>A. lack of vitamin c or d</answer>", Some('A')),
            ("<answer>A. lack of vitamins b12 and d.</answer>", Some('A')),
            ("<answer>A. vitamin c as well as d</answer>", Some('A')),
            ("<answer>A. hepatitis a, b or c</answer>", Some('A')),
            ("<answer>A. hepatitis b and/or c</answer>", Some('A')),
            ("<answer>A. hepatitis b versus c</answer>", Some('A')),
            ("<answer>A. type a and b</answer>", Some('A')),
            ("<answer>A. t cells or b cells</answer>", Some('A')),
            ("<answer>A. m-mode or b-mode</answer>", Some('A')),
            ("<answer>A. t cells, possibly b cells</answer>", Some('A')),
            ("<answer>A. Most likely B cells</answer>", Some('A')),
            ("<answer>A. even if not hepatitis B</answer>", Some('A')),
            ("<answer>A. it could be hepatitis B</answer>", Some('A')),
            ("<answer>A. possibly benign, probably a cyst</answer>", Some('A')),
            ("<answer>B. round or a cyst</answer>", Some('B')),
            ("<answer>B. perhaps a dense, if not a round one</answer>", Some('B')),
            ("<answer>A. both round and oval, otherwise normal</answer>", Some('A')),
            ("<answer>A) scurvy (lack of vitamin c)</answer>", Some('A')),
            ("<answer>A) scurvy (lack of vitamin c), acute</answer>", Some('A')),
            ("<answer>A. vitamin C</answer>", Some('A')),
            ("<answer>A. type B</answer>", Some('A')),
            ("<answer>A. b values</answer>", Some('A')),
            ("<answer>A. e. coli</answer>", Some('A')),
            ("<answer>A. h. pylori or c. difficile</answer>", Some('A')),
            ("<answer>A. dense, e.g. a cyst</answer>", Some('A')),
            ("<answer>A. lamina(e)</answer>", Some('A')),
            ("<answer>B) cyst b) cyst</answer>", Some('B')),
            ("<answer>A. ratio a:b</answer>", Some('A')),
            ("<answer>A. T-cell lymphoma</answer>", Some('A')),
            ("<answer>A. X-ray</answer>", Some('A')),
            ("<answer>A. an ocular A-scan</answer>", Some('A')),
            ("<answer>A. ocular B-scan</answer>", Some('A')),
            ("<answer>A. ultrasound - B-mode</answer>", Some('A')),
            ("<answer>A. hepatitis-B</answer>", Some('A')),
            ("<answer>A. hepatitis\u{2013}B</answer>", Some('A')),
            ("<answer>A. grade 1 - 2, T1-T2</answer>", Some('A')),
            ("<answer>B. cyst - A dense one</answer>", Some('B')),
            ("<answer>B. cyst - a dense one</answer>", Some('B')),
            ("<answer>A. T cells vs B cells</answer>", Some('A')),
            ("<answer>A. M-mode versus B-mode</answer>", Some('A')),
            ("<answer>A. graft versus host disease</answer>", Some('A')),
            ("<answer>A. neither cyst nor mass</answer>", Some('A')),
            ("<answer>The answer is A: vitamin c.</answer>", Some('A')),
        ]);
    }

    #[test]
    fn a_letter_before_its_own_text_is_read_whatever_the_text_holds() {
        let texts = |own: &str| ["round", own, "hepatitis B", "normal"].map(str::to_owned);
        for own in [
            "Hematoxylin & eosin (H&E) stained histological image",
            "B-cells",
            "B lymphocytes",
            "E. coli",
            "H. pylori",
            "C. albicans",
            "D-dimer",
            "C-arm fluoroscopy",
            "A-scan",
            "Hepatitis B/C",
            "Type A, B",
            "A",
            "Grade C",
            "(C) mass.",
            "\u{3b2}-blocker",
            "A or C",
        ] {
            let options = texts(own);
            let small = own.to_lowercase();
            for text in [
                format!("B) {own}"),
                format!("B. {own}."),
                format!("(B) {small}"),
                format!("B: {own}"),
                format!("b) {own}"),
                format!("b. {own}"),
                format!("(b) {own}"),
                format!("**B. {own}**"),
                format!("**B**: {own}"),
                format!("\"B. {own}\""),
                format!("B - {own}"),
                format!("B, {own}"),
                format!("B\n{own}"),
                format!("The answer is B) {own}"),
                format!("B) {own}, for it is dense; a round one"),
            ] {
                let said = format!("<answer>{text}</answer>");
                assert_eq!(parse_answer(&said, &options[..]), Some(1), "{said}");
            }
            for more in [
                " C",
                " A C D",
                ", A",
                " or C",
                "; C",
                " **C**",
                " \"C\"",
                " / c",
                ", c",
                " = C",
                ". Not C",
                "? C",
                " \u{2192} C",
                " (C)",
                " (c)",
                " or c",
                "\nC. hepatitis B",
                " C) hepatitis B",
                " and A) round",
            ] {
                let said = format!("<answer>B. {own}{more}</answer>");
                assert_eq!(parse_answer(&said, &options[..]), None, "{said}");
            }
        }
        // Another option's text is no label's own, and a text must end where the option's does.
        let options = texts("cyst");
        for (said, expected) in [
            ("b. round", None),
            ("C - cyst", None),
            ("a cyst", None),
            ("B cyst", Some(1)),
            ("b cyst", None),
            ("B, cystic", None),
            ("b) cysts", None),
            ("B. round", Some(1)),
            ("A round", Some(0)),
            ("\\boxed{B}", Some(1)),
            ("\\boxed{B} or C", None),
            ("B\u{3002}", Some(1)),
            ("\u{ff08}B\u{ff09}", Some(1)),
        ] {
            assert_eq!(parse_answer(&format!("<answer>{said}</answer>"), &options[..]), expected, "{said}");
        }
        // Without an option's text there is nothing to compare.
        let empty = [String::new(), String::new()];
        assert_eq!(parse_answer("<answer>b, cyst</answer>", &empty[..]), None);
    }

    #[test]
    fn several_and_nested_tags_must_agree() {
        check(&[
            ("<answer>B</answer><answer>b.</answer><answer>(B) cyst</answer>", Some('B')),
            ("<answer>B</answer><answer>B</answer><answer>C</answer>", None),
            ("<answer>B</answer><ANSWER>C</ANSWER>", None),
            ("<answer>C<answer>B</answer></answer>", Some('B')),
            ("<answer><answer>A</answer><answer>B</answer></answer>", None),
            ("<answer>A</answer><answer>B", Some('A')),
            ("<answer>A<think>no</think></answer>", Some('A')),
            ("<answer>A<think></answer><answer>B</think></answer>", Some('A')),
            ("<answer><think>A</think>B</answer>", Some('B')),
            ("</answer>B<answer>", None),
        ]);
    }

    #[test]
    fn what_only_looks_like_a_letter_or_a_tag_is_none() {
        check(&[
            // Cyrillic, Greek, full-width, mathematical, circled, an accent, a mark that cannot be seen.
            ("<answer>\u{410}</answer>", None),
            ("<answer>\u{412}</answer>", None),
            ("<answer>\u{392}</answer>", None),
            ("<answer>\u{ff21}</answer>", None),
            ("<answer>\u{1d401}</answer>", None),
            ("<answer>\u{24b7}</answer>", None),
            ("<answer>B\u{301}</answer>", None),
            ("<answer>\u{200b}B</answer>", None),
            ("<answer>\u{412}. cyst</answer>", None),
            ("\u{ff1c}answer\u{ff1e}B\u{ff1c}/answer\u{ff1e}", None),
            ("<\u{430}nswer>B</\u{430}nswer>", None),
            ("<answer >B</answer >", None),
            // White space that is no ASCII is white space.
            ("<answer>\u{a0}B\u{3000}</answer>", Some('B')),
        ]);
    }

    #[test]
    fn letters_reach_as_far_as_the_options() {
        let of = |text: &str, num_options| parse_answer(text, num_options);
        for index in 0..26u8 {
            let letter = char::from(b'A' + index);
            let small = letter.to_ascii_lowercase();
            for text in [
                format!("{letter}"),
                format!("<answer>{small}</answer>"),
                format!("<answer>{letter}) cyst</answer>"),
                format!("<answer>({letter}) cyst</answer>"),
                format!("<answer>The answer is {letter}.</answer>"),
            ] {
                let index = usize::from(index);
                assert_eq!(of(&text, 26), Some(index), "{text}");
                assert_eq!(of(&text, index + 1), Some(index), "{text}");
                assert_eq!(of(&text, index), None, "{text}");
            }
            // Beside another letter of the question it is a hedge.
            if letter != 'B' {
                for text in [
                    format!("<answer>B. x or {letter}. y</answer>"),
                    format!("<answer>B or {letter}</answer>"),
                    format!("<answer>B) one {small}) two</answer>"),
                    format!("<answer>B. one ({small})</answer>"),
                    format!("<answer>B. one vs {letter}</answer>"),
                    format!("<answer>B. one - {letter}</answer>"),
                    format!("<answer>B</answer><answer>{letter}</answer>"),
                ] {
                    assert_eq!(of(&text, 26), None, "{text}");
                }
            }
        }
        // Where no option has it, a letter from I on is a word or a name.
        for (text, num_options, expected) in [
            ("<answer>B. grade II or I</answer>", 4, Some(1)),
            ("<answer>B. grade II or I</answer>", 9, None),
            ("<answer>B. vitamin D, K</answer>", 8, Some(1)),
            ("<answer>B. vitamin D, K</answer>", 11, None),
            ("<answer>B. cyst, and I think so</answer>", 9, Some(1)),
            ("<answer>I think B</answer>", 9, None),
            ("<answer>AA</answer>", 26, None),
            ("<answer>[</answer>", 26, None),
        ] {
            assert_eq!(of(text, num_options), expected, "{text} {num_options}");
        }
        assert_eq!(of("<answer>Z</answer>", 1000), Some(25), "there are no more letters");
    }

    #[test]
    fn a_text_of_100_kb_is_read_like_a_short_one() {
        let long = |piece: &str| piece.repeat(100_000 / piece.len());
        for piece in ["<think>", "</think>", "<answer>", "</answer>", "a ", "é", "A or ", "\n", "<", "(("] {
            let text = long(piece);
            assert_eq!(parse_answer(&text, 4), None, "{piece}");
            let closed = format!("<think>{text}</think><answer>B</answer>");
            assert_eq!(parse_answer(&closed, 4), Some(1), "{piece}");
        }
        assert_eq!(parse_answer(&format!("<answer>B. {}</answer>", long("cyst ")), 4), Some(1));
        assert_eq!(parse_answer(&format!("<answer>B. {} or C</answer>", long("cyst ")), 4), None);
        assert_eq!(parse_answer(&long("<answer>B</answer>"), 4), Some(1));
        assert_eq!(parse_answer(&(long("<answer>B</answer>") + "<answer>C</answer>"), 4), None);
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
