//! Settings that are more than a number or a word: the device and the shard. Their texts are parsed where they belong.

use super::keys::{Leaf, Node, Setting, describe};
use crate::backend::Backend;
use crate::data::Shard;
use crate::pixels::gray::Window;
use serde::{Deserialize, Serialize};
use serde_json::json;
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

impl Setting for Window {
    fn node() -> Node {
        Node::Leaf(Leaf {
            expected: "a window such as \"40/400\"",
            words: &[],
            is_text: true,
            schema: || json!({"type": "string", "pattern": "^-?[0-9.]+/[0-9.]+$"}),
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
