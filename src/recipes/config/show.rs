//! A configuration written out with the meaning and range of every key: a file that loads again.

use super::RunConfig;
use super::keys::{Key, Node};
use crate::error::Result;
use std::fmt::Write as _;
use toml::{Table, Value};

/// Every key with its value, under its documentation; keys without a value are commented out.
pub fn show(config: &RunConfig) -> Result<String> {
    let table = Table::try_from(config).map_err(anyhow::Error::from)?;
    let mut text = String::new();
    write_section(&mut text, &RunConfig::keys(), &table, "");
    Ok(text)
}

fn write_section(text: &mut String, keys: &[Key], table: &Table, prefix: &str) {
    for key in keys {
        if let Node::Leaf(leaf) = &key.node {
            let range = key.range.map_or_else(String::new, |range| format!(" ({})", range.words()));
            let words =
                if leaf.words.is_empty() { String::new() } else { format!(" [{}]", leaf.words.join(" | ")) };
            let _ = writeln!(text, "# {}{range}{words}", key.doc);
            let _ = match table.get(key.name) {
                Some(value) => writeln!(text, "{} = {value}", key.name),
                None => writeln!(text, "# {} =", key.name),
            };
        }
    }
    for key in keys {
        if let Node::Section(inner) = &key.node {
            let path = if prefix.is_empty() { key.name.to_owned() } else { format!("{prefix}.{}", key.name) };
            let _ = writeln!(text, "\n# {}\n[{path}]", key.doc);
            let empty = Table::new();
            write_section(
                text,
                inner,
                table.get(key.name).and_then(Value::as_table).unwrap_or(&empty),
                &path,
            );
        }
    }
}
