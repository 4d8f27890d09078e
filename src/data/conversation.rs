//! Conversations about one image: LLaVA's and ShareGPT's `conversations`, chat `messages`, and TRL's `prompt` with `completion`.
//!
//! What can be trained on here is one image, one question with options, and one answer: the user's turn gives question and
//! options (or the field `options` does), the assistant's turn the answer and in `<think>` the reasoning (or the fields
//! `answer`, `solution`, `reasoning`, ... do). A turn of the system holds instructions, whose place the prompt template
//! takes: it is left out. Anything else is a problem of its record.

use std::path::PathBuf;

use serde_json::Value;

use super::med_r1::FileName;
use super::problem::{self, Collector, optional_text};
use super::sample::{self, UNKNOWN};
use super::{Reading, Records, Sample, answer, choices, letter};

/// Stands in a text where the image is.
const IMAGE_TAG: &str = "<image>";

/// Stand where something is that this program does not read.
const OTHER_TAGS: [&str; 2] = ["<video>", "<audio>"];

/// Adds the records of one file to `reading`.
pub fn read_records(records: &Records, reading: &mut Reading) {
    let stem = records.file.file_stem().map(|stem| stem.to_string_lossy().into_owned()).unwrap_or_default();
    let name = FileName::parse(&stem);
    let mut collector = Collector::new(records);
    for (index, record) in records.iter() {
        reading.take(index, parse(record, index, &name), &mut collector);
    }
}

type Told<T> = std::result::Result<T, String>;

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Role {
    System,
    User,
    Assistant,
}

/// Who says what, with [`IMAGE_TAG`] where an image is, and the images named in it.
struct Turn {
    role: Role,
    text: String,
    images: Vec<String>,
    /// What it says apart from its text.
    reasoning: Option<String>,
}

/// One record, or everything that is wrong with it.
fn parse(record: &Value, index: usize, name: &FileName) -> std::result::Result<Sample, Vec<String>> {
    if !record.is_object() {
        return Err(vec![format!("an object was expected, found {}", problem::kind(record))]);
    }
    let turns = turns(record).map_err(|problem| vec![problem])?;
    let mut problems = Vec::new();
    // Reasoning and answer may stand in the same broken tags: once is enough.
    let mut keep = |problem: String| {
        if !problems.contains(&problem) {
            problems.push(problem);
        }
    };
    let (user, assistant) = one_round(&turns, record).map_err(|problem| vec![problem])?;
    let id = problem::id_field(record).map_err(&mut keep).ok();
    let image = image_of(record, &turns, user).map_err(&mut keep).ok();
    let asked = question_of(record, &user.text).map_err(&mut keep).ok();
    let answer = match &asked {
        Some((_, options)) => answer_of(record, assistant, options).map_err(&mut keep).ok(),
        None => None,
    };
    let solution = record.get("solution").and_then(Value::as_str);
    let completions = [("`solution`", solution), ("the assistant's turn", assistant)];
    // A turn may say what it thought beside what it says, as some chat servers write it.
    let of_turn =
        turns.iter().rfind(|turn| turn.role == Role::Assistant).and_then(|turn| turn.reasoning.clone());
    let of_record = answer::reasoning_of(record, &completions);
    let reasoning = of_record.map(|found| of_turn.or(found)).map_err(&mut keep).ok();
    let mut optional = |keys: &[&str]| {
        let found =
            keys.iter().map(|key| optional_text(record, key)).find(|found| !matches!(found, Ok(None)));
        found.unwrap_or(Ok(None)).unwrap_or_else(|problem| {
            keep(problem);
            None
        })
    };
    let modality_raw = optional(&["modality", "modality_type"]).unwrap_or(&name.modality_raw);
    let question_type = optional(&["question_type"]).unwrap_or(&name.question_type);
    let dataset = optional(&["dataset"]);
    match (id, image, asked, answer, reasoning) {
        (Some(id), Some(image), Some((question, options)), Some(answer), Some(reasoning))
            if problems.is_empty() =>
        {
            Ok(Sample {
                id: id.unwrap_or_else(|| name.id(index)),
                dataset: dataset.map_or_else(|| name.stem.clone(), str::to_owned),
                modality: if modality_raw == UNKNOWN {
                    UNKNOWN.into()
                } else {
                    sample::modality_name(modality_raw)
                },
                modality_raw: modality_raw.to_owned(),
                question_type: question_type.trim().to_owned(),
                question,
                reasoning: reasoning.map(|text| sample::with_placeholder(&text, answer)),
                options,
                answer,
                image,
            })
        }
        _ => Err(problems),
    }
}

/// The turns of a record, in order.
fn turns(record: &Value) -> Told<Vec<Turn>> {
    for key in ["conversations", "messages"] {
        match record.get(key) {
            None | Some(Value::Null) => {}
            Some(Value::Array(turns)) => {
                let told = |(place, turn)| {
                    turn_of(turn).map_err(|why| format!("`{key}`, turn {}: {why}", place + 1))
                };
                return turns.iter().enumerate().map(told).collect();
            }
            Some(other) => {
                return Err(format!("`{key}` is {}, an array of turns was expected", problem::kind(other)));
            }
        }
    }
    let mut turns = Vec::new();
    for (key, role) in [("prompt", Role::User), ("completion", Role::Assistant)] {
        match record.get(key) {
            Some(Value::String(text)) => {
                turns.push(Turn { role, text: text.clone(), images: Vec::new(), reasoning: None });
            }
            Some(Value::Array(own)) => {
                for (place, turn) in own.iter().enumerate() {
                    turns.push(turn_of(turn).map_err(|why| format!("`{key}`, turn {}: {why}", place + 1))?);
                }
            }
            None | Some(Value::Null) => {}
            Some(other) => {
                return Err(format!(
                    "`{key}` is {}, a text or an array of turns was expected",
                    problem::kind(other)
                ));
            }
        }
    }
    if turns.is_empty() {
        return Err("no turns: neither `conversations`, nor `messages`, nor `prompt` is there".into());
    }
    Ok(turns)
}

fn turn_of(turn: &Value) -> Told<Turn> {
    if !turn.is_object() {
        return Err(format!("an object was expected, found {}", problem::kind(turn)));
    }
    let role = optional_text(turn, "from")?.or(optional_text(turn, "role")?);
    let role = match role.map(str::trim) {
        Some("system") => Role::System,
        Some("human" | "user") => Role::User,
        Some("gpt" | "assistant") => Role::Assistant,
        Some(other) => {
            return Err(format!(
                "unknown speaker `{other}`: human and gpt, or user and assistant, were expected"
            ));
        }
        None => return Err("nobody speaks: `from` or `role` is missing".into()),
    };
    let content = turn.get("value").or_else(|| turn.get("content"));
    let reasoning = answer::reasoning_of(turn, &[])?;
    match content {
        Some(Value::String(text)) => Ok(Turn { role, text: text.clone(), images: Vec::new(), reasoning }),
        Some(Value::Array(parts)) => {
            let (mut texts, mut images) = (Vec::new(), Vec::new());
            for part in parts {
                texts.push(part_of(part, &mut images)?);
            }
            Ok(Turn { role, text: texts.join("\n"), images, reasoning })
        }
        Some(other) => {
            Err(format!("its content is {}, a text or a list of parts was expected", problem::kind(other)))
        }
        None => Err("nothing is said: `value` or `content` is missing".into()),
    }
}

/// One part of a turn as text; the image that it names, if it names one, goes to `images`.
fn part_of(part: &Value, images: &mut Vec<String>) -> Told<String> {
    match optional_text(part, "type")? {
        Some("text") => match part.get("text") {
            Some(Value::String(text)) => Ok(text.clone()),
            _ => Err("a part of type `text` has no text".into()),
        },
        Some("image" | "image_url") => {
            let named = ["image", "path", "url", "image_url"].iter().find_map(|key| part.get(key));
            match named.map(|named| named.get("url").unwrap_or(named)) {
                None | Some(Value::Null) => {}
                Some(Value::String(path)) => images.push(path.clone()),
                Some(other) => {
                    return Err(format!("an image is {}, its path was expected", problem::kind(other)));
                }
            }
            Ok(IMAGE_TAG.to_owned())
        }
        Some(other) => Err(format!("a part of type `{other}`: text and image were expected")),
        None => Err("a part without `type`".into()),
    }
}

/// The user's turn and the assistant's text, which a record with an answer of its own may do without.
fn one_round<'a>(turns: &'a [Turn], record: &Value) -> Told<(&'a Turn, Option<&'a str>)> {
    let spoken: Vec<&Turn> = turns.iter().filter(|turn| turn.role != Role::System).collect();
    let has_answer =
        ["answer", "solution"].iter().any(|key| record.get(key).is_some_and(|value| !value.is_null()));
    match spoken.as_slice() {
        [user, rest @ ..] if user.role == Role::User => match rest {
            [] if has_answer => Ok((user, None)),
            [] => {
                Err("no answer: neither a turn of the assistant nor `answer` or `solution` is there".into())
            }
            [assistant] if assistant.role == Role::Assistant => Ok((user, Some(&assistant.text))),
            _ => {
                let rounds = spoken.iter().filter(|turn| turn.role == Role::User).count();
                Err(format!(
                    "{rounds} questions and {} answers in one record: make a record of each question with its answer",
                    spoken.len() - rounds
                ))
            }
        },
        [] => Err("no turn of the user".into()),
        _ => Err("the assistant speaks before the user".into()),
    }
}

/// The one image of a record, named in `image`, `images` or the turns.
fn image_of(record: &Value, turns: &[Turn], user: &Turn) -> Told<PathBuf> {
    let mut named: Vec<(&str, String)> = Vec::new();
    for key in ["image", "images"] {
        let entries = match record.get(key) {
            None | Some(Value::Null) => &[][..],
            Some(Value::Array(entries)) => entries.as_slice(),
            Some(entry) => std::slice::from_ref(entry),
        };
        for entry in entries {
            match entry.get("path").unwrap_or(entry) {
                Value::String(path) if !path.trim().is_empty() => named.push((key, path.clone())),
                Value::String(_) => return Err(format!("`{key}` is blank")),
                other => {
                    return Err(format!(
                        "`{key}` holds {}, the path of an image was expected",
                        problem::kind(other)
                    ));
                }
            }
        }
    }
    for path in turns.iter().flat_map(|turn| &turn.images) {
        // Some writers name the image in the field and in its part.
        if !named.iter().any(|(key, known)| *key != "content" && known == path) {
            named.push(("content", path.clone()));
        }
    }
    let tags = user.text.matches(IMAGE_TAG).count();
    if let Some(turn) = turns.iter().find(|turn| turn.role != Role::User && turn.text.contains(IMAGE_TAG)) {
        return Err(format!("`{IMAGE_TAG}` stands in a turn of the {}", turn.role.word()));
    }
    match named.as_slice() {
        [] => Err(format!("no image: `image` or `images` is missing, {tags} `{IMAGE_TAG}` in the question")),
        [(key, path)] if tags <= 1 => {
            if path.contains("://") || path.starts_with("data:") {
                return Err(format!(
                    "`{key}` is no file under the data root: `{}`",
                    choices::shortened(path)
                ));
            }
            problem::image_path(path, key)
        }
        [_] => Err(format!("{tags} `{IMAGE_TAG}` in the question, but 1 image")),
        _ => Err(format!("{} images: questions about one are read here", named.len())),
    }
}

impl Role {
    fn word(self) -> &'static str {
        match self {
            Self::System => "system",
            Self::User => "user",
            Self::Assistant => "assistant",
        }
    }
}

/// The question without the image's tag, and the options: those of the field, else those in the text.
fn question_of(record: &Value, text: &str) -> Told<(String, Vec<String>)> {
    let tags = text.matches(IMAGE_TAG).count();
    let text = text.trim();
    let text = text.strip_prefix(IMAGE_TAG).or_else(|| text.strip_suffix(IMAGE_TAG)).unwrap_or(text).trim();
    if tags == 1 && text.contains(IMAGE_TAG) {
        return Err(format!("`{IMAGE_TAG}` stands within the question: it may begin or end it"));
    }
    if let Some(tag) = OTHER_TAGS.iter().find(|tag| text.contains(**tag)) {
        return Err(format!("`{tag}` in the question: only images are read"));
    }
    if text.is_empty() {
        return Err("the question is blank".into());
    }
    let inside = choices::split(text);
    match (choices::field(record)?, inside) {
        (None, inside) => inside.map_err(|why| format!("the question has {why}")),
        (Some(options), Ok((question, own))) if own == options => Ok((question, options)),
        (Some(_), Ok((_, own))) => {
            Err(format!("`options` are not those in the question: {}", own.join(" | ")))
        }
        (Some(options), Err(why)) if why == choices::NO_OPTIONS => Ok((text.to_owned(), options)),
        (Some(_), Err(why)) => Err(format!("the question has {why}")),
    }
}

/// The right option: what `answer` says, else `solution`, else the assistant's turn. All of them that can be read must agree,
/// and the first that is there must be one of those.
fn answer_of(record: &Value, assistant: Option<&str>, options: &[String]) -> Told<usize> {
    let stated =
        |place: &str, text: &str| answer::stated(text, options).map_err(|why| format!("{place}: {why}"));
    let field = |key: &str| match optional_text(record, key) {
        Ok(text) => text.map(|text| stated(&format!("`{key}`"), text)),
        Err(why) => Some(Err(why)),
    };
    let turn = assistant.map(|text| stated("the assistant's turn", text));
    let sources =
        [("`answer`", field("answer")), ("`solution`", field("solution")), ("the assistant's answer", turn)];
    let mut told: Option<(&str, usize)> = None;
    for (name, option) in sources {
        match (told, option) {
            (None, Some(option)) => told = Some((name, option?)),
            (Some((first, own)), Some(Ok(other))) if other != own => {
                return Err(format!("{first} is option {}, {name} option {}", letter(own), letter(other)));
            }
            // Beside an answer, a text that gives none may explain it.
            _ => {}
        }
    }
    told.map(|(_, option)| option).ok_or_else(|| "the assistant's turn: it is missing".to_owned())
}

#[cfg(test)]
mod tests;
