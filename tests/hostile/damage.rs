//! Ways to damage a sound file: bytes without regard to their meaning, JSON by its structure.

use proptest::collection::vec;
use proptest::prelude::*;
use proptest::sample::{Index, select};
use serde_json::{Value, json};

/// One change to bytes.
#[derive(Debug, Clone)]
pub(super) enum Edit {
    Flip(Index, u8),
    Set(Index, u8),
    Cut(Index),
    Insert(Index, Vec<u8>),
    Remove(Index, usize),
    Repeat(Index, usize, usize),
    /// A number that lengths and sizes do not expect, in one of the usual widths and orders.
    Number(Index, u64, usize, bool),
}

/// Numbers that readers forget.
const NUMBERS: [u64; 16] = [
    0,
    1,
    0x7f,
    0xff,
    0x7fff,
    0xffff,
    0xffff_0000,
    0x7fff_ffff,
    0xffff_fff0,
    0xffff_ffff,
    1 << 32,
    1 << 40,
    i64::MAX as u64,
    1 << 63,
    u64::MAX - 7,
    u64::MAX,
];

pub(super) fn edit() -> impl Strategy<Value = Edit> + Sync {
    let at = any::<Index>;
    prop_oneof![
        3 => (at(), 0u8..8).prop_map(|(at, bit)| Edit::Flip(at, bit)),
        3 => (at(), any::<u8>()).prop_map(|(at, byte)| Edit::Set(at, byte)),
        1 => at().prop_map(Edit::Cut),
        1 => (at(), vec(any::<u8>(), 1..20)).prop_map(|(at, bytes)| Edit::Insert(at, bytes)),
        1 => (at(), 1usize..20).prop_map(|(at, count)| Edit::Remove(at, count)),
        1 => (at(), 1usize..40, 1usize..50).prop_map(|(at, count, times)| Edit::Repeat(at, count, times)),
        3 => (at(), select(&NUMBERS[..]), select(&[1usize, 2, 4, 8][..]), any::<bool>())
            .prop_map(|(at, number, width, is_big)| Edit::Number(at, number, width, is_big)),
    ]
}

/// Some edits; sometimes none.
pub(super) fn edits() -> impl Strategy<Value = Vec<Edit>> + Sync {
    vec(edit(), 0..5)
}

/// Noise, short or long.
pub(super) fn noise() -> impl Strategy<Value = Vec<u8>> + Sync {
    vec(any::<u8>(), 0..400)
}

/// Applies `edits` one after another.
pub(super) fn damaged(bytes: &[u8], edits: &[Edit]) -> Vec<u8> {
    let mut bytes = bytes.to_vec();
    for edit in edits {
        if bytes.is_empty() {
            bytes.push(0);
        }
        let length = bytes.len();
        match edit {
            Edit::Flip(at, bit) => bytes[at.index(length)] ^= 1 << bit,
            Edit::Set(at, byte) => bytes[at.index(length)] = *byte,
            Edit::Cut(at) => bytes.truncate(at.index(length)),
            Edit::Insert(at, more) => {
                let at = at.index(length);
                bytes.splice(at..at, more.iter().copied());
            }
            Edit::Remove(at, count) => {
                let at = at.index(length);
                bytes.drain(at..(at + count).min(length));
            }
            Edit::Repeat(at, count, times) => {
                let at = at.index(length);
                let part = bytes[at..(at + count).min(length)].repeat(*times);
                bytes.splice(at..at, part);
            }
            Edit::Number(at, number, width, is_big) => {
                let at = at.index(length);
                let mut word = number.to_le_bytes()[..*width].to_vec();
                if *is_big {
                    word.reverse();
                }
                for (place, byte) in bytes[at..].iter_mut().zip(word) {
                    *place = byte;
                }
            }
        }
    }
    bytes
}

/// One change to a JSON document: which of its values, and what becomes of it.
#[derive(Debug, Clone)]
pub(super) struct JsonEdit {
    at: Index,
    what: What,
}

#[derive(Debug, Clone)]
enum What {
    Replace(usize),
    Remove,
    Repeat,
    Rename(String),
    Wrap(usize),
}

/// Values that a reader does not expect where it finds them.
fn hostile_values() -> Vec<Value> {
    vec![
        json!(0),
        json!(-1),
        json!(1),
        json!(0.5),
        json!(1u64 << 31),
        json!(u32::MAX),
        json!(1u64 << 40),
        json!(i64::MAX),
        json!(1u64 << 63),
        json!(u64::MAX),
        json!(1e308),
        json!(-1e308),
        json!(1e-308),
        json!(null),
        json!(true),
        json!(""),
        json!("\u{0}"),
        json!("../../../etc/passwd"),
        json!("x".repeat(20_000)),
        json!("(a+)+$"),
        json!("((((((((((x"),
        json!("é\u{202e}💥"),
        json!([]),
        json!({}),
        json!([[]]),
        json!([null]),
        json!([0, 0, 0]),
        json!([u64::MAX, u64::MAX, u64::MAX]),
        json!([1u64 << 62, 1u64 << 62, 1u64 << 62, 1u64 << 62]),
        json!({"type": "Sequence"}),
        json!({"content": "x", "id": u64::MAX}),
    ]
}

pub(super) fn json_edits() -> impl Strategy<Value = Vec<JsonEdit>> + Sync {
    let count = hostile_values().len();
    let what = prop_oneof![
        6 => (0..count).prop_map(What::Replace),
        2 => Just(What::Remove),
        1 => Just(What::Repeat),
        1 => select(&["", "x", "__metadata__", "type", "weight_map", "0"][..]).prop_map(|key| What::Rename(key.into())),
        1 => select(&[1usize, 3, 100, 1000][..]).prop_map(What::Wrap),
    ];
    vec((any::<Index>(), what).prop_map(|(at, what)| JsonEdit { at, what }), 1..4)
}

fn count(value: &Value) -> usize {
    1 + match value {
        Value::Array(items) => items.iter().map(count).sum(),
        Value::Object(entries) => entries.values().map(count).sum(),
        _ => 0,
    }
}

/// Gives the value number `at` in the order of the text to `change`, with its parent's slot to be removed from.
fn change(value: &mut Value, at: &mut usize, what: &What) -> bool {
    if *at == 0 {
        match what {
            What::Replace(which) => *value = hostile_values().swap_remove(*which),
            What::Wrap(depth) => {
                for _ in 0..*depth {
                    *value = Value::Array(vec![value.take()]);
                }
            }
            _ => return true,
        }
        return false;
    }
    *at -= 1;
    match value {
        Value::Array(items) => {
            for index in 0..items.len() {
                let size = count(&items[index]);
                if *at < size {
                    if change(&mut items[index], at, what) {
                        match what {
                            What::Repeat => {
                                let copy = items[index].clone();
                                items.extend(std::iter::repeat_n(copy, 30));
                            }
                            _ => drop(items.remove(index)),
                        }
                    }
                    return false;
                }
                *at -= size;
            }
        }
        Value::Object(entries) => {
            let keys: Vec<String> = entries.keys().cloned().collect();
            for key in keys {
                let size = count(&entries[&key]);
                if *at < size {
                    if change(entries.get_mut(&key).unwrap(), at, what) {
                        let own = entries.shift_remove(&key).unwrap();
                        match what {
                            What::Rename(name) => drop(entries.insert(name.clone(), own)),
                            What::Repeat => {
                                entries.insert(format!("{key} "), own.clone());
                                entries.insert(key, own);
                            }
                            _ => {}
                        }
                    }
                    return false;
                }
                *at -= size;
            }
        }
        _ => {}
    }
    false
}

/// Applies `edits` one after another.
pub(super) fn damaged_json(value: &Value, edits: &[JsonEdit]) -> Value {
    let mut value = value.clone();
    for edit in edits {
        let mut at = edit.at.index(count(&value));
        change(&mut value, &mut at, &edit.what);
    }
    value
}

/// A damaged JSON file: by structure, sometimes by its bytes as well, sometimes noise.
#[derive(Debug, Clone)]
pub(super) enum JsonDamage {
    Structure(Vec<JsonEdit>),
    Both(Vec<JsonEdit>, Vec<Edit>),
    /// The first key of the document a second time, with another value.
    Twice,
    Bytes(Vec<u8>),
    /// Brackets without end.
    Deep(usize),
}

pub(super) fn json_damage() -> impl Strategy<Value = JsonDamage> + Sync {
    prop_oneof![
        8 => json_edits().prop_map(JsonDamage::Structure),
        3 => (json_edits(), edits()).prop_map(|(structure, bytes)| JsonDamage::Both(structure, bytes)),
        1 => Just(JsonDamage::Twice),
        1 => noise().prop_map(JsonDamage::Bytes),
        1 => select(&[10usize, 1000, 100_000][..]).prop_map(JsonDamage::Deep),
    ]
}

impl JsonDamage {
    /// The damaged file's bytes.
    pub(super) fn apply(&self, sound: &Value) -> Vec<u8> {
        match self {
            Self::Structure(edits) => text(&damaged_json(sound, edits)),
            Self::Both(structure, bytes) => damaged(&text(&damaged_json(sound, structure)), bytes),
            Self::Twice => {
                let whole = sound.to_string();
                let Some((key, _)) = whole[1..].split_once(':') else { return whole.into_bytes() };
                format!("{}{key}:null,{}", &whole[..1], &whole[1..]).into_bytes()
            }
            Self::Bytes(bytes) => bytes.clone(),
            Self::Deep(depth) => "[".repeat(*depth).into_bytes(),
        }
    }
}

/// As text; a tree deeper than the serializer's own stack is written by hand.
fn text(value: &Value) -> Vec<u8> {
    value.to_string().into_bytes()
}
