//! DICOM files written by hand, and real ones where they are.

use super::*;
use crate::pixels::decode::{decode_file, read_bytes};
use crate::pixels::gray::GrayReading;
use serde_json::Value;
use sha2::{Digest, Sha256};
use std::path::{Path, PathBuf};

/// One element in explicit little endian.
fn element(group: u16, number: u16, kind: &str, value: &[u8]) -> Vec<u8> {
    let mut bytes = [group.to_le_bytes(), number.to_le_bytes()].concat();
    bytes.extend_from_slice(kind.as_bytes());
    let padded = value.len() + value.len() % 2;
    if matches!(kind, "OB" | "OW" | "SQ" | "UN") {
        bytes.extend_from_slice(&[0, 0]);
        bytes.extend_from_slice(&(padded as u32).to_le_bytes());
    } else {
        bytes.extend_from_slice(&(padded as u16).to_le_bytes());
    }
    bytes.extend_from_slice(value);
    bytes.resize(bytes.len() + value.len() % 2, if kind == "OB" || kind == "UI" { 0 } else { b' ' });
    bytes
}

fn short(group: u16, number: u16, value: u16) -> Vec<u8> {
    element(group, number, "US", &value.to_le_bytes())
}

fn words(values: &[i32]) -> Vec<u8> {
    values.iter().flat_map(|&value| (value as u16).to_le_bytes()).collect()
}

/// A file of `elements`, which are in order.
fn file(syntax: &str, elements: &[Vec<u8>]) -> Vec<u8> {
    let meta = [
        element(2, 1, "OB", &[0, 1]),
        element(2, 2, "UI", b"1.2.840.10008.5.1.4.1.1.2"),
        element(2, 3, "UI", b"1.2.3"),
        element(2, 0x10, "UI", syntax.as_bytes()),
        element(2, 0x12, "UI", b"1.2.4"),
    ]
    .concat();
    let length = element(2, 0, "UL", &(meta.len() as u32).to_le_bytes());
    [&[0; 128][..], b"DICM", &length, &meta, &elements.concat()].concat()
}

const PLAIN: &str = "1.2.840.10008.1.2.1";

/// What a picture says about itself.
struct Header {
    kind: &'static str,
    samples: u16,
    planar: u16,
    size: [u16; 2],
    bits: [u16; 3],
    is_signed: bool,
}

/// Sixteen bits allocated, twelve stored, one row.
fn twelve(width: u16) -> Header {
    Header {
        kind: "MONOCHROME2",
        samples: 1,
        planar: 0,
        size: [1, width],
        bits: [16, 12, 11],
        is_signed: false,
    }
}

impl Header {
    fn elements(&self) -> Vec<Vec<u8>> {
        let [allocated, stored, high] = self.bits;
        vec![
            short(0x28, 2, self.samples),
            element(0x28, 4, "CS", self.kind.as_bytes()),
            short(0x28, 6, self.planar),
            short(0x28, 0x10, self.size[0]),
            short(0x28, 0x11, self.size[1]),
            short(0x28, 0x100, allocated),
            short(0x28, 0x101, stored),
            short(0x28, 0x102, high),
            short(0x28, 0x103, u16::from(self.is_signed)),
        ]
    }

    /// The file of these pixels, with `more` between header and pixels.
    fn file(&self, more: &[Vec<u8>], pixels: &[u8]) -> Vec<u8> {
        let kind = if self.bits[0] == 8 { "OB" } else { "OW" };
        let pixels = element(0x7fe0, 0x10, kind, pixels);
        file(PLAIN, &[self.elements(), more.to_vec(), vec![pixels]].concat())
    }
}

fn shown(bytes: &[u8], reading: GrayReading) -> (Vec<u8>, String) {
    let decoded = read_bytes(bytes, reading).unwrap();
    (decoded.image.data.iter().step_by(3).copied().collect(), decoded.reading)
}

fn as_stored(bytes: &[u8]) -> (Vec<u8>, String) {
    shown(bytes, GrayReading::default())
}

fn text(group: u16, number: u16, value: &str) -> Vec<u8> {
    element(group, number, "DS", value.as_bytes())
}

#[test]
fn a_window_is_in_rescaled_units_and_monochrome1_is_inverted() {
    let pixels = words(&[0, 1024, 1064, 1263, 4095]);
    let rescale = [text(0x28, 0x1052, "-1024"), text(0x28, 0x1053, "1")];
    let window = [text(0x28, 0x1050, "40\\50"), text(0x28, 0x1051, "400\\60")];
    let more = [window.concat(), rescale.concat()];
    let (levels, said) = as_stored(&twelve(5).file(&more, &pixels));
    // Hounsfield -1024, 0, 40, 239, 3071 in the window 40/400: share (x - 39.5) / 399 + 1/2.
    assert_eq!(levels, [0, 102, 128, 255, 255]);
    assert_eq!(said, "DICOM, its window 40/400");
    let inverted = Header { kind: "MONOCHROME1", ..twelve(5) };
    assert_eq!(as_stored(&inverted.file(&more, &pixels)).0, [255, 153, 127, 0, 0]);
    // What is asked for wins over what the file says.
    let asked = GrayReading { window: Some("-1024/1".parse().unwrap()), ..GrayReading::default() };
    assert_eq!(shown(&twelve(5).file(&more, &pixels), asked).0, [255; 5]);
    let (levels, said) =
        shown(&twelve(5).file(&more, &pixels), GrayReading { rule: GrayRule::FullRange, window: None });
    assert_eq!((levels[0], levels[4], said.as_str()), (0, 255, "DICOM, range -1024 to 3071"));
    let (_, said) =
        shown(&twelve(5).file(&more, &pixels), GrayReading { rule: GrayRule::MinMax, window: None });
    assert_eq!(said, "DICOM, range -1024 to 3071");
    let exact = [more.concat(), element(0x28, 0x1056, "CS", b"LINEAR_EXACT")];
    assert_eq!(as_stored(&twelve(5).file(&exact, &pixels)).0, [0, 102, 128, 254, 255]);
}

#[test]
fn without_a_window_the_range_is_shown_and_padding_does_not_count() {
    let pixels = words(&[0, 100, 300, 200]);
    assert_eq!(as_stored(&twelve(4).file(&[], &pixels)).1, "DICOM, range 0 to 300");
    let padding = [short(0x28, 0x120, 0)];
    let (levels, said) = as_stored(&twelve(4).file(&padding, &pixels));
    assert_eq!((levels.as_slice(), said.as_str()), (&[0, 0, 255, 128][..], "DICOM, range 100 to 300"));
    let eight = Header { bits: [8, 8, 7], ..twelve(4) };
    assert_eq!(as_stored(&eight.file(&[], &[7, 0, 255, 9])), (vec![7, 0, 255, 9], "DICOM, 8-bit".to_owned()));
}

#[test]
fn signs_and_high_bits_are_read_from_where_they_lie() {
    let signed = Header { bits: [16, 12, 11], is_signed: true, ..twelve(3) };
    // 0xFFF is -1 in twelve bits, whatever stands above.
    let (levels, said) = as_stored(&signed.file(&[], &words(&[0x0fff, 0x0000, 0xf001])));
    assert_eq!((levels.as_slice(), said.as_str()), (&[0, 128, 255][..], "DICOM, range -1 to 1"));
    let upper = Header { bits: [16, 12, 15], ..twelve(2) };
    assert_eq!(as_stored(&upper.file(&[], &words(&[0x0010, 0x0030]))).1, "DICOM, range 1 to 3");
    let long = Header { bits: [32, 32, 31], ..twelve(2) };
    let pixels: Vec<u8> = [5i32, 70_000].iter().flat_map(|value| value.to_le_bytes()).collect();
    assert_eq!(as_stored(&long.file(&[], &pixels)).1, "DICOM, range 5 to 70000");
}

#[test]
fn a_table_of_values_of_interest_is_looked_up() {
    let item = [
        element(0x28, 0x3002, "US", &words(&[3, 10, 8])),
        element(0x28, 0x3006, "US", &words(&[0, 100, 255])),
    ]
    .concat();
    let item = [&[0xfe, 0xff, 0x00, 0xe0][..], &(item.len() as u32).to_le_bytes(), &item].concat();
    let table = [element(0x28, 0x3010, "SQ", &item)];
    let (levels, said) = as_stored(&twelve(5).file(&table, &words(&[0, 10, 11, 12, 4000])));
    assert_eq!((levels.as_slice(), said.as_str()), (&[0, 0, 100, 255, 255][..], "DICOM, its table"));
}

#[test]
fn colours_come_from_planes_palettes_and_luminance() {
    let rgb = Header { kind: "RGB", samples: 3, bits: [8, 8, 7], ..twelve(2) };
    let bytes = |header: &Header, more: &[Vec<u8>], pixels: &[u8]| {
        read_bytes(&header.file(more, pixels), GrayReading::default()).unwrap().image.data
    };
    assert_eq!(bytes(&rgb, &[], &[1, 2, 3, 4, 5, 6]), [1, 2, 3, 4, 5, 6]);
    let planes = Header { planar: 1, ..rgb };
    assert_eq!(bytes(&planes, &[], &[1, 4, 2, 5, 3, 6]), [1, 2, 3, 4, 5, 6]);
    let luminance = Header { kind: "YBR_FULL", planar: 0, ..planes };
    // Pure red is Y 76, Cb 85, Cr 255 to the nearest.
    assert_eq!(bytes(&luminance, &[], &[76, 85, 255, 9, 128, 128]), [254, 0, 0, 9, 9, 9]);
    let palette = Header { kind: "PALETTE COLOR", bits: [8, 8, 7], ..twelve(3) };
    let descriptors = (0x1101..=0x1103).map(|number| element(0x28, number, "US", &words(&[2, 1, 16])));
    let tables = [[0x1000, 0x2000], [0x3000, 0xff00], [0, 0x0100]];
    let tables =
        tables.iter().zip(0x1201..).map(|(table, number)| element(0x28, number, "OW", &words(table)));
    let more: Vec<Vec<u8>> = descriptors.chain(tables).collect();
    let expected = [0x10, 0x30, 0, 0x10, 0x30, 0, 0x20, 0xff, 1];
    // Values below the first entry take it.
    assert_eq!(bytes(&palette, &more, &[0, 1, 2]), expected);
    let error = read_bytes(&palette.file(&more[..3], &[0, 1, 2]), GrayReading::default()).unwrap_err();
    assert!(error.to_string().contains("palette"), "{error}");
}

#[test]
fn what_is_no_picture_or_only_part_of_one_is_refused() {
    let failure = |bytes: &[u8]| {
        let error = read_bytes(bytes, GrayReading::default()).unwrap_err();
        assert!(matches!(error, Error::Data(_)), "{error}");
        error.to_string()
    };
    let whole = twelve(4).file(&[], &words(&[1, 2, 3, 4]));
    for length in [132, 140, 200, whole.len() / 2, whole.len() - 1] {
        failure(&whole[..length]);
    }
    assert!(failure(&twelve(5).file(&[], &words(&[1, 2, 3, 4]))).contains("cannot be decoded"));
    assert!(failure(&file(PLAIN, &[short(0x28, 0x10, 4)])).contains("no columns"));
    assert!(failure(&file(PLAIN, &twelve(4).elements())).contains("no pixel data"));
    assert!(failure(&Header { size: [0, 4], ..twelve(4) }.file(&[], &[])).contains("no pixels"));
    assert!(failure(&Header { size: [60_000, 60_000], ..twelve(4) }.file(&[], &[])).contains("60000"));
    let fragment = |bytes: &[u8]| {
        let item = |bytes: &[u8]| {
            [&[0xfe, 0xff, 0x00, 0xe0][..], &(bytes.len() as u32).to_le_bytes(), bytes].concat()
        };
        let mut pixels = [0x7fe0u16.to_le_bytes(), 0x10u16.to_le_bytes()].concat();
        pixels.extend_from_slice(b"OB\0\0\xff\xff\xff\xff");
        pixels.extend([item(&[]), item(bytes), vec![0xfe, 0xff, 0xdd, 0xe0, 0, 0, 0, 0]].concat());
        pixels
    };
    let encoded = |syntax: &str, stream: &[u8]| {
        let header = Header { bits: [8, 8, 7], ..twelve(4) };
        failure(&file(syntax, &[header.elements(), vec![fragment(stream)]].concat()))
    };
    // A stream that claims 65535 by 65535 pixels.
    let bomb = [0xff, 0xd8, 0xff, 0xc0, 0, 11, 8, 0xff, 0xff, 0xff, 0xff, 1, 1, 0x11, 0];
    assert!(encoded("1.2.840.10008.1.2.4.50", &bomb).contains("65535 by 65535"));
    assert!(encoded("1.2.840.10008.1.2.4.50", &[0xff, 0xd8, 0, 0]).contains("JPEG baseline"));
    assert!(encoded("1.2.840.10008.1.2.4.80", &[0xff, 0xd8, 0, 0]).contains("JPEG-LS"));
    assert!(encoded("1.2.840.10008.1.2.4.90", &[0xff, 0x4f, 0xff, 0x51]).contains("JPEG 2000"));
}

fn samples() -> Option<PathBuf> {
    Some(crate::files::shared()?.join("data/minimed/decoder_samples")).filter(|dir| dir.is_dir())
}

#[test]
fn real_files_hold_the_stored_values_that_their_manifest_lists() {
    let Some(dir) = samples() else { return };
    let manifest: Value = serde_json::from_slice(&std::fs::read(dir.join("manifest.json")).unwrap()).unwrap();
    for row in manifest.as_array().unwrap() {
        let name = row["file"].as_str().unwrap();
        let is_dicom = Path::new(name).extension().is_some_and(|end| end == "dcm");
        if !is_dicom || row.get("raw_sha256").is_none() {
            continue;
        }
        let object = dicom_object::open_file(dir.join(name)).unwrap();
        let stored = Stored::read(&object, 1 << 20).unwrap();
        let wanted = [&row["height"], &row["width"], &row["channels"]].map(|v| v.as_u64().unwrap() as usize);
        assert_eq!([stored.height, stored.width, stored.samples], wanted, "{name}");
        let bytes: Vec<u8> = match row["dtype"].as_str().unwrap() {
            "uint8" => stored.values.iter().map(|&value| value as u8).collect(),
            // Hashed in little endian, whatever the file is in.
            _ => stored.values.iter().flat_map(|&value| (value as i16).to_le_bytes()).collect(),
        };
        let hash = format!("{:x}", Sha256::digest(&bytes));
        assert_eq!(row["raw_sha256"], hash, "{name}");
        let lowest = stored.values.iter().min().copied();
        assert_eq!(row["min"].as_i64().map(|value| value as i32), lowest, "{name}");
    }
}

#[test]
fn real_files_of_every_format_have_the_manifests_values_or_are_refused() {
    let Some(dir) = samples() else { return };
    let manifest: Value = serde_json::from_slice(&std::fs::read(dir.join("manifest.json")).unwrap()).unwrap();
    for row in manifest.as_array().unwrap() {
        let name = row["file"].as_str().unwrap();
        let found = decode_file(&dir.join(name));
        let is_dicom = Path::new(name).extension().is_some_and(|end| end == "dcm");
        let is_broken = ["truncated", "empty", "bad_crc"].iter().any(|word| name.contains(word));
        if is_broken || name == "JPEG-lossy.dcm" {
            let error = found.expect_err(name).to_string();
            assert!(error.contains(name), "{error}");
            continue;
        }
        let image = found.unwrap_or_else(|error| panic!("{name}: {error}"));
        if is_dicom || row.get("height").is_none() || row["dtype"] == "uint16" {
            continue;
        }
        let is_turned = name.contains("exif");
        let size = [row["height"].as_u64().unwrap() as usize, row["width"].as_u64().unwrap() as usize];
        let own = [image.height, image.width];
        assert_eq!(if is_turned { [own[1], own[0]] } else { own }, size, "{name}");
        let channels = row["channels"].as_u64().unwrap();
        if channels == 2 || channels == 4 {
            continue;
        }
        let mean = image.data.iter().map(|&value| f64::from(value)).sum::<f64>() / image.data.len() as f64;
        let tolerance = if row["lossy"] == true { 0.3 } else { 1e-3 };
        assert!((mean - row["mean"].as_f64().unwrap()).abs() < tolerance, "{name}: {mean}");
        let center = 3 * (image.height / 2 * image.width + image.width / 2);
        for (channel, &level) in image.data[center..center + 3].iter().enumerate() {
            let wanted = row["center"].get(channel).unwrap_or(&row["center"]).as_f64().unwrap();
            let most = if row["lossy"] == true { 4.0 } else { 0.0 };
            assert!(is_turned || (f64::from(level) - wanted).abs() <= most, "{name}: {level} {wanted}");
        }
    }
}
