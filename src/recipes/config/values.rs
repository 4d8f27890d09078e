//! Settings that are more than a number or a word: the device and the shard.

use super::keys::{Leaf, Node, Setting, describe};
use crate::backend::Backend;
use serde::{Deserialize, Serialize};
use serde_json::json;
use std::fmt;
use std::str::FromStr;
use toml::Value;

/// The device asked for, as a setting.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, Serialize, Deserialize)]
#[serde(transparent)]
pub struct DeviceWord(pub Backend);

impl Setting for DeviceWord {
    fn node() -> Node {
        Node::Leaf(Leaf {
            expected: "a device: auto, cpu, cuda, cuda:N or metal",
            words: &[],
            is_text: true,
            schema: || json!({"type": "string", "pattern": "^(auto|cpu|metal|cuda(:[0-9]+)?)$"}),
            read: read_parsed::<Backend>,
        })
    }
}

/// Part `index` of `count`: every `count`-th item from the `index`-th on.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(try_from = "String", into = "String")]
pub struct Shard {
    /// Which part, from 0.
    pub index: usize,
    /// How many parts.
    pub count: usize,
}

impl Shard {
    /// Whether the item at `position` of the whole list belongs to this part.
    pub const fn holds(&self, position: usize) -> bool {
        position % self.count == self.index
    }
}

impl FromStr for Shard {
    type Err = String;
    fn from_str(text: &str) -> Result<Self, String> {
        let parts = text.split_once('/').and_then(|(index, count)| {
            Some(Self { index: index.trim().parse().ok()?, count: count.trim().parse().ok()? })
        });
        match parts {
            Some(shard) if shard.index < shard.count => Ok(shard),
            Some(shard) => Err(format!(
                "shard `{text}` does not exist\nthe parts of {n} are 0/{n} to {last}/{n}",
                n = shard.count,
                last = shard.count.saturating_sub(1)
            )),
            None => Err(format!("expected a shard `I/N`, found `{text}`\nthe first of four is 0/4")),
        }
    }
}

impl fmt::Display for Shard {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}/{}", self.index, self.count)
    }
}

impl TryFrom<String> for Shard {
    type Error = String;
    fn try_from(text: String) -> Result<Self, String> {
        text.parse()
    }
}

impl From<Shard> for String {
    fn from(shard: Shard) -> Self {
        shard.to_string()
    }
}

impl Setting for Shard {
    fn node() -> Node {
        Node::Leaf(Leaf {
            expected: "a shard such as \"0/4\"",
            words: &[],
            is_text: true,
            schema: || json!({"type": "string", "pattern": "^[0-9]+/[0-9]+$"}),
            read: read_parsed::<Self>,
        })
    }
}

/// Accepts a text that parses as `T`.
fn read_parsed<T: FromStr<Err = String>>(value: &Value) -> Result<Value, String> {
    match value {
        Value::String(text) => text.parse::<T>().map(|_| value.clone()),
        _ => Err(format!("expected a text in quotes, found {}", describe(value))),
    }
}
