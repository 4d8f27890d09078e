//! How a settings key is described: its type, default, allowed range and documentation, each written once.
//!
//! `section!` turns one annotated struct into the struct, its defaults and its description; `words!` does the same for
//! a closed choice. Reading files and reporting mistakes is left to `layers`.

use serde_json::json;
use std::fmt::Write as _;
use std::path::PathBuf;
use toml::Value;

/// One key of a section.
#[derive(Debug, Clone)]
pub struct Key {
    /// Its name within the section.
    pub name: &'static str,
    /// Its documentation, one paragraph.
    pub doc: String,
    /// What stands under it.
    pub node: Node,
    /// The numbers allowed, when it holds one.
    pub range: Option<Range>,
}

/// What stands under a key.
#[derive(Debug, Clone)]
pub enum Node {
    /// A single value.
    Leaf(Leaf),
    /// A table of further keys.
    Section(Vec<Key>),
}

/// The type of a single value.
#[derive(Debug, Clone)]
pub struct Leaf {
    /// What to write there, as in "expected `a number`".
    pub expected: &'static str,
    /// The words allowed, when it is a closed choice.
    pub words: &'static [&'static str],
    /// Whether any text is a value as it stands.
    pub is_text: bool,
    /// Its JSON schema.
    pub schema: fn() -> serde_json::Value,
    /// Checks a value and gives it its canonical form (`"8/255"` becomes a number).
    pub read: fn(&Value) -> Result<Value, String>,
}

/// A type that can stand under a key.
pub trait Setting {
    /// How it is described.
    fn node() -> Node;
}

/// An interval of allowed numbers.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct Range {
    /// Smallest value; `true` when it is allowed itself.
    pub low: (f64, bool),
    /// Largest value; `true` when it is allowed itself.
    pub high: (f64, bool),
}

impl Range {
    /// `low <= x`.
    pub const fn at_least(low: f64) -> Self {
        Self { low: (low, true), high: (f64::INFINITY, false) }
    }

    /// `low < x`.
    pub const fn above(low: f64) -> Self {
        Self { low: (low, false), high: (f64::INFINITY, false) }
    }

    /// `low <= x <= high`.
    pub const fn closed(low: f64, high: f64) -> Self {
        Self { low: (low, true), high: (high, true) }
    }

    /// `low < x < high`.
    pub const fn open(low: f64, high: f64) -> Self {
        Self { low: (low, false), high: (high, false) }
    }

    /// `low < x <= high`.
    pub const fn open_closed(low: f64, high: f64) -> Self {
        Self { low: (low, false), high: (high, true) }
    }

    /// `low <= x < high`.
    pub const fn from_below(low: f64, high: f64) -> Self {
        Self { low: (low, true), high: (high, false) }
    }

    /// Whether `x` is allowed; a number that is not finite never is.
    pub fn contains(&self, x: f64) -> bool {
        let above = x > self.low.0 || (self.low.1 && x == self.low.0);
        let below = x < self.high.0 || (self.high.1 && x == self.high.0);
        x.is_finite() && above && below
    }

    /// In words: `at least 1`, `above 0 and below 1`.
    pub fn words(&self) -> String {
        let mut words = format!("{} {}", if self.low.1 { "at least" } else { "above" }, self.low.0);
        if self.high.0.is_finite() {
            let _ = write!(words, " and {} {}", if self.high.1 { "at most" } else { "below" }, self.high.0);
        }
        words
    }
}

/// A TOML value in words, for messages: `the text "ten"`.
pub fn describe(value: &Value) -> String {
    match value {
        Value::String(text) => format!("the text \"{text}\""),
        Value::Integer(number) => format!("the whole number {number}"),
        Value::Float(number) => format!("the number {number}"),
        Value::Boolean(yes) => format!("`{yes}`"),
        Value::Datetime(_) => "a date".to_owned(),
        Value::Array(_) => "a list".to_owned(),
        Value::Table(_) => "a table".to_owned(),
    }
}

/// Parses a number or a fraction such as `8/255`.
pub fn parse_number(text: &str) -> Option<f64> {
    let number = |part: &str| part.trim().parse::<f64>().ok().filter(|x| x.is_finite());
    match text.split_once('/') {
        Some((over, under)) => {
            Some(number(over)? / number(under).filter(|x| *x != 0.0)?).filter(|x| x.is_finite())
        }
        None => number(text),
    }
}

fn wrong(expected: &str, found: &Value) -> String {
    format!("expected {expected}, found {}", describe(found))
}

fn read_number(value: &Value) -> Result<Value, String> {
    let number = match value {
        Value::Float(number) => Some(*number),
        Value::Integer(number) => Some(*number as f64),
        Value::String(text) => parse_number(text),
        _ => None,
    };
    number.map(Value::Float).ok_or_else(|| wrong(NUMBER, value))
}

const NUMBER: &str = "a number or a fraction such as \"8/255\"";

impl Setting for f64 {
    fn node() -> Node {
        Node::Leaf(Leaf {
            expected: NUMBER,
            words: &[],
            is_text: false,
            schema: || json!({"type": ["number", "string"]}),
            read: read_number,
        })
    }
}

fn read_count(value: &Value) -> Result<Value, String> {
    match value {
        Value::Integer(number) if *number >= 0 => Ok(value.clone()),
        // An environment variable or a template may hand over a whole number in quotes.
        Value::String(text) => match text.trim().parse::<u32>() {
            Ok(number) => Ok(Value::Integer(number.into())),
            Err(_) => Err(wrong(COUNT, value)),
        },
        _ => Err(wrong(COUNT, value)),
    }
}

const COUNT: &str = "a whole number of at least 0";

fn count_node() -> Node {
    Node::Leaf(Leaf {
        expected: COUNT,
        words: &[],
        is_text: false,
        schema: || json!({"type": "integer", "minimum": 0}),
        read: read_count,
    })
}

impl Setting for usize {
    fn node() -> Node {
        count_node()
    }
}

impl Setting for u64 {
    fn node() -> Node {
        count_node()
    }
}

impl Setting for bool {
    fn node() -> Node {
        Node::Leaf(Leaf {
            expected: "`true` or `false`",
            words: &["true", "false"],
            is_text: false,
            schema: || json!({"type": "boolean"}),
            read: |value| match value {
                Value::Boolean(_) => Ok(value.clone()),
                _ => Err(wrong("`true` or `false`", value)),
            },
        })
    }
}

fn read_text(value: &Value) -> Result<Value, String> {
    match value {
        Value::String(text) if text.is_empty() => Err("an empty text; leave the key out instead".to_owned()),
        Value::String(_) => Ok(value.clone()),
        _ => Err(wrong("a text in quotes", value)),
    }
}

fn text_node(expected: &'static str) -> Node {
    Node::Leaf(Leaf {
        expected,
        words: &[],
        is_text: true,
        schema: || json!({"type": "string", "minLength": 1}),
        read: read_text,
    })
}

impl Setting for String {
    fn node() -> Node {
        text_node("a text in quotes")
    }
}

impl Setting for PathBuf {
    fn node() -> Node {
        text_node("a path in quotes")
    }
}

const TEXTS: &str = "a list of texts such as [\"python3\", \"reward.py\"]";

fn read_texts(value: &Value) -> Result<Value, String> {
    match value {
        Value::Array(items) if items.is_empty() => Err("an empty list; leave the key out instead".to_owned()),
        Value::Array(items) => match items.iter().find(|item| !item.is_str()) {
            None => Ok(value.clone()),
            Some(other) => Err(format!("expected {TEXTS}, found {} in it", describe(other))),
        },
        _ => Err(wrong(TEXTS, value)),
    }
}

impl Setting for Vec<String> {
    fn node() -> Node {
        Node::Leaf(Leaf {
            expected: TEXTS,
            words: &[],
            is_text: false,
            schema: || json!({"type": "array", "items": {"type": "string"}, "minItems": 1}),
            read: read_texts,
        })
    }
}

impl<T: Setting> Setting for Option<T> {
    fn node() -> Node {
        T::node()
    }
}

/// The words among `candidates` that `word` may have meant, nearest first, two at most.
pub fn near_misses<'a>(word: &str, candidates: impl IntoIterator<Item = &'a str>) -> Vec<&'a str> {
    let mut scored: Vec<(f64, &str)> = candidates
        .into_iter()
        .map(|candidate| {
            let (a, b) = (word.to_lowercase(), candidate.to_lowercase());
            let score = strsim::normalized_damerau_levenshtein(&a, &b).max(strsim::jaro(&a, &b) - 0.25);
            (score, candidate)
        })
        .filter(|(score, _)| *score > 0.55)
        .collect();
    scored.sort_by(|a, b| b.0.total_cmp(&a.0));
    let best = scored.first().map_or(0.0, |(score, _)| *score);
    scored.retain(|(score, _)| *score > best - 0.1);
    scored.into_iter().map(|(_, candidate)| candidate).take(2).collect()
}

/// `a`, `b` or `c`, each in backticks.
pub fn choices<'a>(words: impl IntoIterator<Item = &'a str>) -> String {
    let quoted: Vec<String> = words.into_iter().map(|word| format!("`{word}`")).collect();
    match quoted.split_last() {
        Some((last, [])) => last.clone(),
        Some((last, rest)) => format!("{} or {last}", rest.join(", ")),
        None => String::new(),
    }
}

/// Defines a closed choice: an enum that is written as one word in files, flags and records.
macro_rules! words {
    ($(#[doc = $doc:literal])+ pub enum $name:ident = $default:ident {
        $($(#[doc = $word_doc:literal])+ $variant:ident = $word:literal,)+
    }) => {
        $(#[doc = $doc])+
        #[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, serde::Serialize, serde::Deserialize)]
        pub enum $name { $($(#[doc = $word_doc])+ #[serde(rename = $word)] $variant,)+ }

        impl $name {
            /// Every word of this choice.
            pub const WORDS: &'static [&'static str] = &[$($word),+];

            /// The word that files, flags and records use.
            pub const fn word(self) -> &'static str {
                match self { $(Self::$variant => $word,)+ }
            }
        }

        impl Default for $name {
            fn default() -> Self { Self::$default }
        }

        impl std::str::FromStr for $name {
            type Err = String;

            fn from_str(text: &str) -> std::result::Result<Self, String> {
                match text {
                    $($word => Ok(Self::$variant),)+
                    _ => Err(format!("expected one of {}", Self::WORDS.join(", "))),
                }
            }
        }

        impl std::fmt::Display for $name {
            fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result { f.write_str(self.word()) }
        }

        impl $crate::recipes::config::keys::Setting for $name {
            fn node() -> $crate::recipes::config::keys::Node {
                $crate::recipes::config::keys::Node::Leaf($crate::recipes::config::keys::Leaf {
                    expected: "a word",
                    words: Self::WORDS,
                    is_text: true,
                    schema: || serde_json::json!({"enum": Self::WORDS}),
                    read: |value| $crate::recipes::config::keys::read_word(value, Self::WORDS),
                })
            }
        }
    };
}
pub(crate) use words;

/// Reads one of `words`.
pub fn read_word(value: &Value, words: &[&'static str]) -> Result<Value, String> {
    match value {
        Value::String(word) if words.contains(&word.as_str()) => Ok(value.clone()),
        Value::String(word) => {
            let near = near_misses(word, words.iter().copied());
            let help = if near.is_empty() {
                format!("use {}", choices(words.iter().copied()))
            } else {
                format!("did you mean {}? (one of {})", choices(near), words.join(", "))
            };
            Err(format!("unknown word `{word}`\n{help}"))
        }
        _ => Err(wrong(&format!("one of {}", choices(words.iter().copied())), value)),
    }
}

/// Defines a section: a struct whose fields carry documentation, default and allowed range side by side.
macro_rules! section {
    ($(#[doc = $doc:literal])+ pub struct $name:ident {
        $($(#[doc = $key_doc:literal])+ $key:ident: $type:ty = $default:expr $(=> $range:expr)?,)+
    }) => {
        $(#[doc = $doc])+
        #[derive(Debug, Clone, PartialEq, serde::Serialize, serde::Deserialize)]
        #[serde(default, deny_unknown_fields)]
        pub struct $name {
            $($(#[doc = $key_doc])+ #[doc = ""] #[doc = concat!("Default: `", stringify!($default), "`.")] pub $key: $type,)+
        }

        impl Default for $name {
            fn default() -> Self { Self { $($key: $default,)+ } }
        }

        impl $crate::recipes::config::keys::Setting for $name {
            fn node() -> $crate::recipes::config::keys::Node {
                $crate::recipes::config::keys::Node::Section(vec![
                    $($crate::recipes::config::keys::Key {
                        name: stringify!($key),
                        doc: [$($key_doc),+].map(str::trim).join(" "),
                        node: <$type as $crate::recipes::config::keys::Setting>::node(),
                        range: section!(@range $($range)?),
                    },)+
                ])
            }
        }
    };
    (@range) => { None };
    (@range $range:expr) => { Some($range) };
}
pub(crate) use section;
