//! Joins the layers of a configuration, and finds every mistake in them at once, each with its place.
//!
//! Defaults, then the file, then overrides in the order given (`--set`, environment, flags). Values are checked key by
//! key against their descriptions, so that one wrong key does not hide the next.

use super::keys::{Key, Leaf, Node, choices, describe, near_misses};
use super::{AttackConfig, Command, RunConfig};
use crate::error::{ConfigError, Error, Result};
use serde_json::json;
use std::collections::BTreeMap;
use std::path::Path;
use toml::de::{DeTable, DeValue};
use toml::{Table, Value};

/// One key set from outside the file.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Override {
    /// Dotted path of the key.
    pub key: String,
    /// The value as typed.
    pub text: String,
    /// What set it, for messages: `--set`, `--epsilon` or `SAFEMED_EPSILON`.
    pub origin: String,
    /// Whether it gives way to any other source of the same key.
    pub weak: bool,
}

impl Override {
    /// `key` set to `text` by `origin`.
    pub fn new(key: impl Into<String>, text: impl Into<String>, origin: impl Into<String>) -> Self {
        Self { key: key.into(), text: text.into(), origin: origin.into(), weak: false }
    }
}

/// Where the value of a key came from.
#[derive(Debug, Clone)]
enum Origin {
    File { position: (usize, usize), line: String },
    Outside { origin: String, text: String },
}

struct Layers<'a> {
    file: Option<&'a Path>,
    values: Table,
    origins: BTreeMap<String, Origin>,
    problems: Vec<ConfigError>,
}

/// Reads, joins and checks.
pub(super) fn load(
    command: Option<Command>,
    file: Option<&Path>,
    overrides: &[Override],
) -> Result<RunConfig> {
    let keys = RunConfig::keys();
    let mut layers = Layers { file, values: Table::new(), origins: BTreeMap::new(), problems: Vec::new() };
    if let Some(path) = file {
        let text = std::fs::read_to_string(path).map_err(|source| match source.kind() {
            std::io::ErrorKind::NotFound | std::io::ErrorKind::IsADirectory => Error::usage(format!(
                "cannot read the configuration: {source}\n  --> {}\n   = help: `safemed config preset` lists ready ones",
                path.display()
            )),
            std::io::ErrorKind::InvalidData => {
                Error::usage(format!("the configuration is not UTF-8 text\n  --> {}", path.display()))
            }
            _ => Error::io("cannot read the configuration", path, source),
        })?;
        layers.add_file(&text, &keys);
    }
    for item in overrides {
        layers.add_override(item, &keys);
    }
    let mut config: RunConfig = match layers.values.clone().try_into() {
        Ok(config) => config,
        Err(error) => {
            layers.problems.push(ConfigError::new("", error.to_string()));
            return Err(Error::Config(layers.problems));
        }
    };
    if !layers.origins.contains_key("attack.num_steps") {
        config.attack.num_steps = AttackConfig::default_num_steps(config.attack.method);
    }
    let is_set = |key: &str| layers.origins.contains_key(&format!("train.adversary.{key}"));
    config.train.adversary.resolve(config.train.recipe, &is_set);
    let refused: Vec<String> = layers.problems.iter().map(|problem| problem.key.clone()).collect();
    // A value that was refused already is absent here: that it is missing is no second problem.
    for mut problem in config.problems(command).into_iter().filter(|problem| !refused.contains(&problem.key))
    {
        let origin = layers.origins.get(&problem.key).cloned();
        layers.locate(&mut problem, origin.as_ref());
        layers.problems.push(problem);
    }
    if layers.problems.is_empty() { Ok(config) } else { Err(Error::Config(layers.problems)) }
}

impl Layers<'_> {
    fn add_file(&mut self, text: &str, keys: &[Key]) {
        let (root, errors) = DeTable::parse_recoverable(text);
        for error in errors {
            let at = error.span().map_or(0, |span| span.start);
            let mut problem = ConfigError::new("", error.message().replace('\n', "; "));
            self.locate(&mut problem, Some(&origin_at(text, at)));
            self.problems.push(problem);
        }
        self.add_table(text, root.get_ref(), keys, "");
    }

    fn add_table(&mut self, text: &str, table: &DeTable<'_>, keys: &[Key], prefix: &str) {
        for (name, value) in table {
            let path = join(prefix, name.get_ref());
            let origin = origin_at(text, name.span().start);
            let Some(key) = keys.iter().find(|key| key.name == name.get_ref().as_ref()) else {
                let problem = unknown(&path, name.get_ref(), keys);
                self.push_at(problem, &origin);
                continue;
            };
            match (&key.node, value.get_ref()) {
                (Node::Section(inner), DeValue::Table(table)) => self.add_table(text, table, inner, &path),
                (Node::Section(_), other) => {
                    let found = to_value(other);
                    let message = format!("`{}` is a section, found {}", key.name, describe(&found));
                    let problem = ConfigError::new(&path, message).with_help(format!("write `[{path}]`"));
                    self.push_at(problem, &origin);
                }
                (Node::Leaf(leaf), other) => self.set(&path, key, leaf, &to_value(other), origin),
            }
        }
    }

    fn add_override(&mut self, item: &Override, keys: &[Key]) {
        if item.weak && self.origins.contains_key(&item.key) {
            return;
        }
        let origin = Origin::Outside { origin: item.origin.clone(), text: item.text.clone() };
        match find(keys, &item.key) {
            Some(key) => match &key.node {
                Node::Leaf(leaf) => {
                    let value = typed(leaf, &item.text);
                    self.set(&item.key, key, leaf, &value, origin);
                }
                Node::Section(inner) => {
                    let names = choices(inner.iter().map(|key| key.name));
                    let problem = ConfigError::new(&item.key, format!("`{}` is a section", item.key))
                        .with_help(format!("name one of its keys: {names}"));
                    self.push_at(problem, &origin);
                }
            },
            None => self.push_at(unknown(&item.key, &item.key, keys), &origin),
        }
    }

    fn set(&mut self, path: &str, key: &Key, leaf: &Leaf, value: &Value, origin: Origin) {
        match read(key, leaf, value) {
            Ok(value) => {
                insert(&mut self.values, path, value);
                self.origins.insert(path.to_owned(), origin);
            }
            Err(reason) => {
                let (message, help) = match reason.split_once('\n') {
                    Some((message, help)) => (message.to_owned(), Some(help.to_owned())),
                    None => (reason, None),
                };
                let problem =
                    ConfigError { help, ..ConfigError::new(path, format!("`{}`: {message}", key.name)) };
                self.push_at(problem, &origin);
            }
        }
    }

    fn push_at(&mut self, mut problem: ConfigError, origin: &Origin) {
        self.locate(&mut problem, Some(origin));
        self.problems.push(problem);
    }

    fn locate(&self, problem: &mut ConfigError, origin: Option<&Origin>) {
        match origin {
            Some(Origin::File { position, line }) => {
                problem.file = self.file.map(Path::to_path_buf);
                problem.position = Some(*position);
                problem.source_line = Some(line.clone());
            }
            Some(Origin::Outside { origin, text }) => {
                let assignment = if origin == "--set" {
                    format!("--set {}={text}", problem.key)
                } else if origin.starts_with("--") {
                    format!("{origin} {text}")
                } else {
                    format!("{origin}={text}")
                };
                problem.source_line = Some(assignment);
            }
            None => {}
        }
    }
}

/// Checks type and range.
fn read(key: &Key, leaf: &Leaf, value: &Value) -> std::result::Result<Value, String> {
    let value = (leaf.read)(value)?;
    let number = value.as_float().or_else(|| value.as_integer().map(|number| number as f64));
    match (key.range, number) {
        (Some(range), Some(number)) if !range.contains(number) => {
            Err(format!("{number} is out of range: {}", range.words()))
        }
        (None, Some(number)) if !number.is_finite() => Err(format!("{number} is not a finite number")),
        _ => Ok(value),
    }
}

/// A value typed on the command line: text where text is wanted, TOML otherwise.
fn typed(leaf: &Leaf, text: &str) -> Value {
    let parsed = format!("x = {text}").parse::<Table>().ok().and_then(|mut table| table.remove("x"));
    match parsed {
        Some(value @ Value::String(_)) => value,
        Some(value) if !leaf.is_text => value,
        _ => Value::String(text.to_owned()),
    }
}

/// An unknown key, with the keys that may have been meant: those of the same name elsewhere, else near misses here, else
/// near misses anywhere.
fn unknown(path: &str, shown: &str, keys: &[Key]) -> ConfigError {
    let name = path.rsplit('.').next().unwrap_or(path);
    let all = paths(&RunConfig::keys(), "");
    let all = || all.iter().map(String::as_str);
    let same_name: Vec<&str> = all().filter(|known| known.rsplit('.').next() == Some(name)).collect();
    let nearest = near_misses(path, same_name.iter().copied());
    let mut help = if nearest.is_empty() { same_name } else { nearest };
    if help.is_empty() {
        help = near_misses(name, keys.iter().map(|key| key.name));
    }
    if help.is_empty() {
        help = near_misses(path, all());
    }
    let problem = ConfigError::new(path, format!("unknown key `{shown}`"));
    if help.is_empty() {
        problem.with_help(format!("known here: {}", choices(keys.iter().map(|key| key.name))))
    } else {
        problem.with_help(format!("did you mean {}?", choices(help)))
    }
}

/// The key at a dotted path.
fn find<'a>(keys: &'a [Key], path: &str) -> Option<&'a Key> {
    let (head, rest) = path.split_once('.').map_or((path, None), |(head, rest)| (head, Some(rest)));
    let key = keys.iter().find(|key| key.name == head)?;
    match (rest, &key.node) {
        (None, _) => Some(key),
        (Some(rest), Node::Section(inner)) => find(inner, rest),
        (Some(_), Node::Leaf(_)) => None,
    }
}

/// Dotted paths of all values.
fn paths(keys: &[Key], prefix: &str) -> Vec<String> {
    keys.iter()
        .flat_map(|key| {
            let path = join(prefix, key.name);
            match &key.node {
                Node::Leaf(_) => vec![path],
                Node::Section(inner) => paths(inner, &path),
            }
        })
        .collect()
}

fn join(prefix: &str, name: &str) -> String {
    if prefix.is_empty() { name.to_owned() } else { format!("{prefix}.{name}") }
}

fn insert(table: &mut Table, path: &str, value: Value) {
    match path.split_once('.') {
        None => {
            table.insert(path.to_owned(), value);
        }
        Some((head, rest)) => {
            let inner = table.entry(head.to_owned()).or_insert_with(|| Value::Table(Table::new()));
            if let Some(inner) = inner.as_table_mut() {
                insert(inner, rest, value);
            }
        }
    }
}

/// Line, column (from 1, in characters) and text of the line at a byte offset.
fn origin_at(text: &str, at: usize) -> Origin {
    let before = text.get(..at).unwrap_or(text);
    let start = before.rfind('\n').map_or(0, |newline| newline + 1);
    let line = text[start..].lines().next().unwrap_or_default();
    let position = (before.matches('\n').count() + 1, before[start..].chars().count() + 1);
    Origin::File { position, line: line.trim_end().to_owned() }
}

fn to_value(value: &DeValue<'_>) -> Value {
    match value {
        DeValue::String(text) => Value::String(text.to_string()),
        DeValue::Integer(number) => i64::from_str_radix(number.as_str(), number.radix())
            .map_or_else(|_| Value::String(number.to_string()), Value::Integer),
        DeValue::Float(number) => {
            number.as_str().parse().map_or_else(|_| Value::String(number.to_string()), Value::Float)
        }
        DeValue::Boolean(yes) => Value::Boolean(*yes),
        DeValue::Datetime(date) => Value::Datetime(*date),
        DeValue::Array(items) => Value::Array(items.iter().map(|item| to_value(item.get_ref())).collect()),
        DeValue::Table(table) => Value::Table(
            table
                .iter()
                .map(|(name, value)| (name.get_ref().to_string(), to_value(value.get_ref())))
                .collect(),
        ),
    }
}

/// The JSON schema of a section.
pub(super) fn schema(keys: &[Key]) -> serde_json::Value {
    let defaults = serde_json::to_value(RunConfig::default()).unwrap_or_default();
    let mut schema = section_schema(keys, &defaults);
    if let Some(object) = schema.as_object_mut() {
        object.insert("$schema".to_owned(), json!("https://json-schema.org/draft/2020-12/schema"));
        object.insert("title".to_owned(), json!("safemed configuration"));
    }
    schema
}

fn section_schema(keys: &[Key], defaults: &serde_json::Value) -> serde_json::Value {
    let properties: serde_json::Map<String, serde_json::Value> = keys
        .iter()
        .map(|key| {
            let default = &defaults[key.name];
            let mut schema = match &key.node {
                Node::Section(inner) => section_schema(inner, default),
                Node::Leaf(leaf) => leaf_schema(leaf, key, default),
            };
            schema["description"] = json!(key.doc);
            (key.name.to_owned(), schema)
        })
        .collect();
    json!({"type": "object", "additionalProperties": false, "properties": properties})
}

fn leaf_schema(leaf: &Leaf, key: &Key, default: &serde_json::Value) -> serde_json::Value {
    let mut schema = (leaf.schema)();
    if !default.is_null() {
        schema["default"] = default.clone();
    }
    if let Some(range) = key.range {
        schema[if range.low.1 { "minimum" } else { "exclusiveMinimum" }] = json!(range.low.0);
        if range.high.0.is_finite() {
            schema[if range.high.1 { "maximum" } else { "exclusiveMaximum" }] = json!(range.high.0);
        }
    }
    schema
}
