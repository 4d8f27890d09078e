//! What a completion says: the reasoning and the answer in its tags, and where else a record may keep its reasoning.

use serde_json::Value;

use super::choices;
use super::problem::optional_text;

/// The fields that may hold a reasoning, the first that is there counts.
const REASONING_KEYS: [&str; 8] = [
    "reasoning",
    "think",
    "thinking",
    "cot",
    "reasoning_content",
    "chain_of_thought",
    "rationale",
    "explanation",
];

/// Tags that a completion is built of: within a reasoning they would break it.
const TAGS: [&str; 4] = ["<think>", "</think>", "<answer>", "</answer>"];

/// The text between `<name>` and `</name>`, trimmed; `None` where there is no such tag.
///
/// # Errors
/// When the tag does not open and close exactly once.
pub fn inside<'a>(text: &'a str, name: &str) -> Result<Option<&'a str>, String> {
    Ok(around(text, name)?.map(|(_, inside, _)| inside.trim()))
}

/// What stands before, in and after a tag.
fn around<'a>(text: &'a str, name: &str) -> Result<Option<(&'a str, &'a str, &'a str)>, String> {
    let (open, close) = (format!("<{name}>"), format!("</{name}>"));
    let counts = (text.matches(&open).count(), text.matches(&close).count());
    if counts == (0, 0) {
        return Ok(None);
    }
    let parts = text.split_once(&open).and_then(|(before, rest)| {
        let (inside, after) = rest.split_once(&close)?;
        Some((before, inside, after))
    });
    match parts.filter(|_| counts == (1, 1)) {
        Some(parts) => Ok(Some(parts)),
        None => Err(format!("`{open}` and `{close}` do not stand there once each, in this order")),
    }
}

/// The reasoning of a record: of the fields of `REASONING_KEYS` the first that says something, else what
/// `<think>...</think>` holds in one of the `completions`, each with the name of its place; where none of them has such tags,
/// what one says in whole sentences before `<answer>`.
///
/// # Errors
/// When a field is no text, or tags do not fit together.
pub fn reasoning_of(record: &Value, completions: &[(&str, Option<&str>)]) -> Result<Option<String>, String> {
    for key in REASONING_KEYS {
        if let Some(text) = optional_text(record, key)? {
            let found = inside(text, "think").map_err(|why| format!("`{key}`: {why}"))?.unwrap_or(text);
            if !found.trim().is_empty() {
                return without_tags(found, &format!("`{key}`")).map(Some);
            }
        }
    }
    let mut is_tagged = false;
    for (place, text) in completions {
        let found = text.map_or(Ok(None), |text| inside(text, "think"));
        match found.map_err(|why| format!("{place}: {why}"))? {
            Some(found) if !found.is_empty() => return without_tags(found, place).map(Some),
            Some(_) => is_tagged = true,
            None => {}
        }
    }
    for (place, text) in completions.iter().filter(|_| !is_tagged) {
        let said = text.and_then(|text| Some(text.split_once("<answer>")?.0.trim()));
        if let Some(said) = said.filter(|said| said.ends_with(['.', '!', '?'])) {
            return without_tags(said, place).map(Some);
        }
    }
    Ok(None)
}

fn without_tags(reasoning: &str, place: &str) -> Result<String, String> {
    match TAGS.iter().find(|tag| reasoning.contains(**tag)) {
        Some(tag) => Err(format!("{place}: the reasoning holds a tag of its own: `{tag}`")),
        None => Ok(reasoning.to_owned()),
    }
}

/// The option that a completion ends in: the one in `<answer>...</answer>`, else the one that all of it but `<think>...</think>`
/// names. See [`choices::find`] for what may stand there.
///
/// # Errors
/// When tags do not fit together, or no option is meant.
pub fn stated(completion: &str, options: &[String]) -> Result<usize, String> {
    if let Some(answer) = inside(completion, "answer")? {
        return choices::find(answer, options);
    }
    match around(completion, "think")? {
        Some((before, _, after)) => choices::find(&format!("{before}{after}"), options),
        None => choices::find(completion, options),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use serde_json::json;

    #[test]
    fn reasonings_come_from_the_first_column_that_says_something_else_from_the_tag() {
        let of =
            |record: Value, completion: Option<&str>| reasoning_of(&record, &[("`solution`", completion)]);
        let tagged = Some("<think> A rim. </think><answer> B</answer>");
        for (record, completion, expected) in [
            (json!({}), None, None),
            (json!({}), Some("<answer> B</answer>"), None),
            (json!({}), Some("<think> </think>B"), None),
            (json!({}), Some("A rim. So: no.\n<answer>C</answer>"), Some("A rim. So: no.")),
            (json!({}), Some("The answer is <answer>C</answer>"), None),
            (json!({}), Some("A rim. C"), None),
            (json!({}), tagged, Some("A rim.")),
            (json!({"cot": "c", "think": " "}), tagged, Some("c")),
            (json!({"cot": "<think> </think>"}), tagged, Some("A rim.")),
            (json!({"thinking": "t", "cot": "c", "reasoning": null}), tagged, Some("t")),
            (json!({"reasoning": "<think>r</think><answer> B</answer>"}), None, Some("r")),
        ] {
            assert_eq!(of(record.clone(), completion).unwrap().as_deref(), expected, "{record}");
        }
        // A reasoning in tags goes before sentences that only lead to the answer, wherever it stands.
        let both = [("`solution`", Some("See below. <answer>B</answer>")), ("the turn", tagged)];
        assert_eq!(reasoning_of(&json!({}), &both).unwrap().as_deref(), Some("A rim."));
        for (record, completion, words) in [
            (json!({"cot": 3}), None, "`cot` is a number"),
            (json!({}), Some("<think>x"), "`solution`: `<think>` and `</think>` do not stand"),
            (json!({}), Some("x</think>y<think>"), "`solution`: `<think>` and"),
            (json!({"think": "<think>a<think>b</think>"}), None, "`think`: `<think>` and"),
            (
                json!({"think": "so <answer> B"}),
                None,
                "`think`: the reasoning holds a tag of its own: `<answer>`",
            ),
        ] {
            let error = of(record.clone(), completion).unwrap_err();
            assert!(error.contains(words), "{record}: {error}");
        }
    }

    #[test]
    fn the_answer_is_in_its_tag_or_all_but_the_reasoning() {
        let options = ["cyst".to_owned(), "mass".to_owned()];
        for text in [
            "<answer> B </answer>",
            "<think>A?</think>\nmass",
            "<answer>B) mass</answer> for sure",
            "<answer>B</answer><think>x</think>",
        ] {
            assert_eq!(stated(text, &options), Ok(1), "{text}");
        }
        for text in
            ["<answer>B</answer><answer>B</answer>", "<think>B", "<answer></answer>", "<think>B</think>"]
        {
            assert!(stated(text, &options).is_err(), "{text}");
        }
    }
}
