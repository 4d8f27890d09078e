//! DICOM files: lengths beyond the file, sequences without bottom, pictures of any size and depth.

use super::damage::{damaged, edits};
use super::{for_all, on_small_stack, refusal, survive};
use safemed::pixels::decode::read_bytes;
use safemed::pixels::gray::{GrayReading, GrayRule};

const EXPLICIT: &str = "1.2.840.10008.1.2.1";
const IMPLICIT: &str = "1.2.840.10008.1.2";
const MOST: usize = 256 << 20;

/// One element; kinds of two letters with an upper-case `X` behind take a long length.
fn element(syntax: &str, group: u16, number: u16, kind: &str, value: &[u8]) -> Vec<u8> {
    let mut bytes = [group.to_le_bytes(), number.to_le_bytes()].concat();
    let length = value.len() + value.len() % 2;
    if syntax == IMPLICIT {
        bytes.extend((length as u32).to_le_bytes());
    } else if matches!(kind, "OB" | "OW" | "SQ" | "UN") {
        bytes.extend([kind.as_bytes(), &[0, 0], &(length as u32).to_le_bytes()].concat());
    } else {
        bytes.extend([kind.as_bytes(), &(length as u16).to_le_bytes()].concat());
    }
    bytes.extend_from_slice(value);
    bytes.resize(bytes.len() + value.len() % 2, if kind == "UI" { 0 } else { b' ' });
    bytes
}

/// A file of these elements, which are in order.
fn file(syntax: &str, elements: &[u8]) -> Vec<u8> {
    let meta = [
        element(EXPLICIT, 2, 1, "OB", &[0, 1]),
        element(EXPLICIT, 2, 2, "UI", b"1.2.840.10008.5.1.4.1.1.2"),
        element(EXPLICIT, 2, 3, "UI", b"1.2.3"),
        element(EXPLICIT, 2, 0x10, "UI", syntax.as_bytes()),
        element(EXPLICIT, 2, 0x12, "UI", b"1.2.4"),
    ]
    .concat();
    let length = element(EXPLICIT, 2, 0, "UL", &(meta.len() as u32).to_le_bytes());
    [&[0; 128][..], b"DICM", &length, &meta, elements].concat()
}

fn words(values: &[u16]) -> Vec<u8> {
    values.iter().flat_map(|value| value.to_le_bytes()).collect()
}

/// A picture of two by three pixels with a window, a table and a nested sequence.
fn picture(syntax: &str, kind: &str, samples: u16, bits: [u16; 3], pixels: &[u8]) -> Vec<u8> {
    let of = |group, number, kind: &str, value: &[u8]| element(syntax, group, number, kind, value);
    let item = |content: &[u8]| {
        [&[0xfe, 0xff, 0, 0xe0][..], &(content.len() as u32).to_le_bytes(), content].concat()
    };
    let table =
        [of(0x28, 0x3002, "US", &words(&[3, 0, 8])), of(0x28, 0x3006, "US", &words(&[0, 100, 255]))].concat();
    let nested = of(0x8, 0x1140, "SQ", &item(&of(0x8, 0x1155, "UI", b"1.2.5")));
    let palette = (0x1101..=0x1103).map(|number| of(0x28, number, "US", &words(&[2, 0, 16])));
    let palette_data = (0x1201..=0x1203).map(|number| of(0x28, number, "OW", &words(&[0x1000, 0xff00])));
    let elements: Vec<Vec<u8>> = [
        of(0x8, 0x1115, "SQ", &item(&nested)),
        of(0x28, 2, "US", &words(&[samples])),
        of(0x28, 4, "CS", kind.as_bytes()),
        of(0x28, 6, "US", &words(&[0])),
        of(0x28, 8, "IS", b"1"),
        of(0x28, 0x10, "US", &words(&[2])),
        of(0x28, 0x11, "US", &words(&[3])),
        of(0x28, 0x100, "US", &words(&bits[..1])),
        of(0x28, 0x101, "US", &words(&bits[1..2])),
        of(0x28, 0x102, "US", &words(&bits[2..])),
        of(0x28, 0x103, "US", &words(&[0])),
        of(0x28, 0x1050, "DS", b"40"),
        of(0x28, 0x1051, "DS", b"400"),
        of(0x28, 0x1052, "DS", b"-10"),
        of(0x28, 0x1053, "DS", b"1"),
    ]
    .into_iter()
    .chain(if kind.starts_with("PAL") { palette.chain(palette_data).collect() } else { Vec::new() })
    .chain((bits[0] == 32).then(|| of(0x28, 0x3010, "SQ", &item(&table))))
    .chain([of(0x7fe0, 0x10, if bits[0] == 8 { "OB" } else { "OW" }, pixels)])
    .collect();
    file(syntax, &elements.concat())
}

fn pictures() -> Vec<Vec<u8>> {
    let fragment = |bytes: &[u8]| {
        let item =
            |bytes: &[u8]| [&[0xfe, 0xff, 0, 0xe0][..], &(bytes.len() as u32).to_le_bytes(), bytes].concat();
        let start = [&[0xe0, 0x7f, 0x10, 0][..], b"OB\0\0\xff\xff\xff\xff"].concat();
        [start, item(&[]), item(bytes), vec![0xfe, 0xff, 0xdd, 0xe0, 0, 0, 0, 0]].concat()
    };
    // Run lengths: one segment of six bytes, as they are.
    let runs = [&words(&[1, 0, 64, 0])[..], &[0; 56], &[5, 1, 2, 3, 4, 5, 6, 0]].concat();
    let mut encoded = picture("1.2.840.10008.1.2.5", "MONOCHROME2", 1, [8, 8, 7], &[]);
    encoded.truncate(encoded.len() - 12);
    encoded.extend(fragment(&runs));
    vec![
        picture(EXPLICIT, "MONOCHROME2", 1, [16, 12, 11], &words(&[0, 1, 100, 4000, 4095, 7])),
        picture(IMPLICIT, "MONOCHROME1", 1, [16, 16, 15], &words(&[0, 1, 100, 4000, 65535, 7])),
        picture(EXPLICIT, "RGB", 3, [8, 8, 7], &[9; 18]),
        picture(EXPLICIT, "PALETTE COLOR", 1, [8, 8, 7], &[0, 1, 0, 1, 0, 200]),
        picture(EXPLICIT, "MONOCHROME2", 1, [32, 32, 31], &[3; 24]),
        encoded,
    ]
}

#[test]
fn damaged_files_are_refused_or_shown() {
    let pictures = pictures();
    for (index, picture) in pictures.iter().enumerate() {
        read_bytes(picture, GrayReading::default()).unwrap_or_else(|error| panic!("{index}: {error}"));
    }
    for_all(500, &(0..pictures.len(), edits(), 0u8..4), |(which, edits, rule)| {
        // The first 132 bytes mean nothing.
        let bytes = [&pictures[which][..132], &damaged(&pictures[which][132..], &edits)].concat();
        let reading = match rule {
            0 => GrayReading { rule: GrayRule::FullRange, window: None },
            1 => GrayReading { rule: GrayRule::MinMax, window: None },
            2 => GrayReading { window: Some("40/400".parse().unwrap()), ..GrayReading::default() },
            _ => GrayReading::default(),
        };
        survive(MOST, || read_bytes(&bytes, reading));
    });
}

#[test]
fn sequences_without_bottom_are_refused_whether_they_say_their_length_or_not() {
    let read =
        |bytes: &[u8]| on_small_stack(|| refusal(64 << 20, || read_bytes(bytes, GrayReading::default())));
    let item = [0xfe, 0xff, 0, 0xe0, 0xff, 0xff, 0xff, 0xff];
    let explicit = [&[8, 0, 0x15, 0x11][..], b"SQ\0\0\xff\xff\xff\xff", &item].concat();
    let unknown = [&[9, 0, 0x15, 0x11][..], b"UN\0\0\xff\xff\xff\xff", &item].concat();
    let implicit = [&[8, 0, 0x15, 0x11, 0xff, 0xff, 0xff, 0xff][..], &item].concat();
    for (syntax, part) in [(EXPLICIT, explicit), (EXPLICIT, unknown), (IMPLICIT, implicit)] {
        assert!(read(&file(syntax, &part.repeat(20_000))).contains("nested"));
    }
    for syntax in [EXPLICIT, IMPLICIT] {
        let mut content = Vec::new();
        for _ in 0..1000 {
            let item = [&[0xfe, 0xff, 0, 0xe0][..], &(content.len() as u32).to_le_bytes(), &content].concat();
            content = element(syntax, 8, 0x1115, "SQ", &item);
        }
        assert!(read(&file(syntax, &content)).contains("nested"));
    }
}

#[test]
fn lengths_and_sizes_beyond_the_file_are_refused_before_there_is_room_for_them() {
    let refused = |bytes: &[u8]| refusal(16 << 20, || read_bytes(bytes, GrayReading::default()));
    for kind in ["OB", "OW", "UN", "SQ", "UT", "ZZ"] {
        let start = [&[8, 0, 0x16, 0][..], kind.as_bytes(), &[0, 0], &0xffff_fff0u32.to_le_bytes()].concat();
        refused(&file(EXPLICIT, &start));
    }
    refused(&file(IMPLICIT, &[&[8, 0, 0x16, 0][..], &0xffff_fff0u32.to_le_bytes()].concat()));
    let sound = picture(EXPLICIT, "MONOCHROME2", 1, [16, 12, 11], &words(&[0; 6]));
    let at = |number: u8| sound.windows(4).position(|tag| tag == [0x28, 0, number, 0]).unwrap() + 8;
    for (rows, columns) in [(u16::MAX, u16::MAX), (60_000, 60_000), (u16::MAX, 2), (12_000, 12_000)] {
        let mut bytes = sound.clone();
        for (number, side) in [(0x10, rows), (0x11, columns)] {
            bytes[at(number)..at(number) + 2].copy_from_slice(&side.to_le_bytes());
        }
        refused(&bytes);
    }
    // The file's own header, too.
    for place in [140, 144 + 8] {
        let mut bytes = sound.clone();
        bytes[place..place + 4].copy_from_slice(&0xffff_fff0u32.to_le_bytes());
        refused(&bytes);
    }
}
