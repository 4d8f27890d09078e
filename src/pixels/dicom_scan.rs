//! A look at a DICOM file before dicom-rs reads it, which makes room for whatever length an element claims, and calls
//! itself for every nested sequence.
//!
//! Only lengths and nesting are looked at: every value must lie inside the file. What the elements mean is not known.

use flate2::read::DeflateDecoder;
use std::borrow::Cow;
use std::io::Read;

/// Deepest nesting of sequences and their items; real files have a dozen.
const MOST_DEPTH: usize = 64;
const UNDEFINED: u32 = u32::MAX;
const TOO_LONG: &str = "an element claims more bytes than the file has";

/// How a data set is written down.
#[derive(Debug, Clone, Copy, PartialEq)]
struct Syntax {
    is_explicit: bool,
    is_big: bool,
}

/// Refuses a file of which an element is longer than the rest, or sequences are nested too deeply.
pub(super) fn check(file: &[u8]) -> Result<(), &'static str> {
    let little = Syntax { is_explicit: true, is_big: false };
    let head = file.get(132..144).ok_or("it ends in its header")?;
    let length = u32::from_le_bytes([head[8], head[9], head[10], head[11]]) as usize;
    let meta = file.get(144..).and_then(|rest| rest.get(..length)).ok_or(TOO_LONG)?;
    if head[..4] != [2, 0, 0, 0] {
        return Err("its header does not begin with its length");
    }
    let mut syntax: &[u8] = &[];
    walk(meta, little, &mut |tag, value| {
        if tag == [2, 0x10] {
            syntax = value;
        }
    })?;
    let data = &file[144 + length..];
    let (syntax, data) = match syntax.trim_ascii_end().strip_suffix(b"\0").unwrap_or(syntax.trim_ascii_end())
    {
        b"1.2.840.10008.1.2" => (Syntax { is_explicit: false, ..little }, Cow::Borrowed(data)),
        b"1.2.840.10008.1.2.2" => (Syntax { is_big: true, ..little }, Cow::Borrowed(data)),
        b"1.2.840.10008.1.2.1.99" => {
            let most = (64 << 20) + 64 * data.len() as u64;
            let mut inflated = Vec::new();
            DeflateDecoder::new(data)
                .take(most + 1)
                .read_to_end(&mut inflated)
                .map_err(|_| "its deflated data are damaged")?;
            if inflated.len() as u64 > most {
                return Err("its deflated data are absurdly long");
            }
            (little, Cow::Owned(inflated))
        }
        _ => (little, Cow::Borrowed(data)),
    };
    walk(&data, syntax, &mut |_, _| {})
}

/// Visits the elements of a data set, those of nested ones too.
fn walk<'a>(
    data: &'a [u8],
    syntax: Syntax,
    visit: &mut dyn FnMut([u16; 2], &'a [u8]),
) -> Result<(), &'static str> {
    let word = |at: usize| {
        let bytes = [data[at], data[at + 1]];
        if syntax.is_big { u16::from_be_bytes(bytes) } else { u16::from_le_bytes(bytes) }
    };
    let long = |at: usize| {
        let (first, second) = (u32::from(word(at)), u32::from(word(at + 2)));
        if syntax.is_big { (first << 16) + second } else { (second << 16) + first }
    };
    // Where each open sequence or item ends, unless a delimiter says; and whether it holds fragments of pixel data.
    let mut open: Vec<(Option<usize>, bool)> = Vec::new();
    let mut at = 0;
    while at + 8 <= data.len() {
        while open.last().is_some_and(|(end, _)| end.is_some_and(|end| end <= at)) {
            open.pop();
        }
        if open.len() > MOST_DEPTH {
            return Err("its sequences are nested too deeply");
        }
        let tag = [word(at), word(at + 2)];
        let is_item = tag[0] == 0xfffe;
        let kind = &data[at + 4..at + 6];
        let (header, length) = if is_item || !syntax.is_explicit {
            (8, long(at + 4))
        } else if SHORT.chunks(2).any(|short| short == kind) {
            (8, u32::from(word(at + 6)))
        } else if at + 12 <= data.len() {
            (12, long(at + 8))
        } else {
            return Ok(());
        };
        at += header;
        if is_item && tag[1] != 0xe000 {
            open.pop();
            continue;
        }
        let are_fragments = open.last().is_some_and(|(_, are_fragments)| *are_fragments);
        if length == UNDEFINED {
            open.push((None, tag == [0x7fe0, 0x0010]));
            continue;
        }
        let value = data[at..].get(..length as usize).ok_or(TOO_LONG)?;
        // Without a kind only the content tells a sequence.
        let is_nested = if is_item {
            !are_fragments
        } else if syntax.is_explicit {
            kind == b"SQ"
        } else {
            value.starts_with(&[0xfe, 0xff])
        };
        if is_nested {
            open.push((Some(at + value.len()), false));
        } else {
            visit(tag, value);
            at += value.len();
        }
    }
    Ok(())
}

/// Kinds whose length takes two bytes (PS3.5, 7.1.2).
const SHORT: &[u8] = b"AEASATCSDADSDTFLFDISLOLTPNSHSLSSSTTMUIULUS";
