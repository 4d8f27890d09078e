//! Picture files: damaged ones, and headers that claim what no file holds.

use super::damage::{damaged, edits, noise};
use super::{for_all, refusal, survive};
use image::{DynamicImage, ImageFormat};
use safemed::pixels::decode::{read_bytes, read_file};
use safemed::pixels::gray::{GrayReading, GrayRule};
use std::io::Cursor;

/// Room for a few million pixels: a small file may have as many.
const MOST: usize = 512 << 20;

fn written(image: &DynamicImage, format: ImageFormat) -> Vec<u8> {
    let mut bytes = Cursor::new(Vec::new());
    image.write_to(&mut bytes, format).unwrap();
    bytes.into_inner()
}

/// A small picture in every format and depth that is read.
fn pictures() -> Vec<Vec<u8>> {
    use ImageFormat::{Bmp, Gif, Jpeg, Png, Pnm, Tiff, WebP};
    let colour = DynamicImage::ImageRgb8(image::RgbImage::from_fn(13, 9, |x, y| {
        image::Rgb([x as u8 * 19, y as u8, 7])
    }));
    let [alpha, deep] =
        [DynamicImage::ImageRgba8(colour.to_rgba8()), DynamicImage::ImageLuma16(colour.to_luma16())];
    let of = |image: &DynamicImage, formats: &[ImageFormat]| -> Vec<Vec<u8>> {
        formats.iter().map(|&format| written(image, format)).collect()
    };
    [
        of(&colour, &[Png, Jpeg, Bmp, Tiff, WebP, Pnm]),
        of(&alpha, &[Png, Gif, Tiff, WebP]),
        of(&deep, &[Png, Tiff, Pnm]),
        vec![b"P1\n# gray\n3 2\n1 0 1\n0 1 0\n".to_vec(), b"P3 2 1 255\n1 2 3 4 5 6\n".to_vec()],
    ]
    .concat()
}

#[test]
fn damaged_pictures_are_refused_or_shown() {
    let pictures = pictures();
    for picture in &pictures {
        read_bytes(picture, GrayReading::default()).unwrap();
    }
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("x.png");
    for_all(400, &(0..pictures.len(), edits(), 0u8..3), |(which, edits, rule)| {
        let bytes = damaged(&pictures[which], &edits);
        let rule = [GrayRule::AsStored, GrayRule::FullRange, GrayRule::MinMax][usize::from(rule)];
        std::fs::write(&path, &bytes).unwrap();
        let image = survive(MOST, || read_file(&path, GrayReading { rule, window: None }));
        assert!(image.is_none_or(|read| read.image.data.len() == 3 * read.image.width * read.image.height));
    });
}

#[test]
fn noise_after_a_magic_number_is_refused_or_shown() {
    let magic: Vec<Vec<u8>> =
        pictures().iter().map(|picture| picture[..picture.len().min(16)].to_vec()).collect();
    for_all(100, &(0..magic.len(), noise()), |(which, noise)| {
        survive(MOST, || read_bytes(&[&magic[which][..], &noise].concat(), GrayReading::default()));
    });
}

/// The header of a PNG file of this size, and nothing to fill it with.
fn png(width: u32, height: u32) -> Vec<u8> {
    let mut bytes = written(&DynamicImage::new_rgb8(1, 1), ImageFormat::Png);
    bytes[16..20].copy_from_slice(&width.to_be_bytes());
    bytes[20..24].copy_from_slice(&height.to_be_bytes());
    let crc = crc32(&bytes[12..29]);
    bytes[29..33].copy_from_slice(&crc.to_be_bytes());
    bytes
}

fn crc32(bytes: &[u8]) -> u32 {
    !bytes.iter().fold(!0u32, |crc, &byte| {
        (0..8).fold(
            crc ^ u32::from(byte),
            |crc, _| if crc & 1 == 1 { crc >> 1 ^ 0xedb8_8320 } else { crc >> 1 },
        )
    })
}

#[test]
fn pictures_that_claim_more_than_a_file_can_hold_are_refused_before_there_is_room_for_them() {
    let set = |mut bytes: Vec<u8>, at: usize, sides: &[u8]| {
        bytes[at..at + sides.len()].copy_from_slice(sides);
        bytes
    };
    let picture = DynamicImage::new_rgb8(8, 8);
    let jpeg = written(&picture, ImageFormat::Jpeg);
    let frame = jpeg.windows(2).position(|pair| pair == [0xff, 0xc0]).unwrap();
    for bytes in [
        png(60_000, 60_000),
        png(12_000, 12_000),
        png(u32::MAX, u32::MAX),
        b"P6\n60000 60000\n255\n".to_vec(),
        b"P6\n12000 12000\n255\n".to_vec(),
        b"P5\n99999999999999999999 1\n255\n".to_vec(),
        set(jpeg, frame + 5, &[0xff, 0xff, 0xff, 0xff]),
        set(written(&picture, ImageFormat::Bmp), 18, &[0x60, 0xea, 0, 0, 0x60, 0xea, 0, 0]),
        set(written(&picture, ImageFormat::Gif), 6, &[0x60, 0xea, 0x60, 0xea]),
    ] {
        refusal(64 << 20, || read_bytes(&bytes, GrayReading::default()));
    }
}

#[test]
fn what_is_no_plain_file_is_no_picture() {
    let dir = tempfile::tempdir().unwrap();
    let text = refusal(1 << 20, || read_file(dir.path(), GrayReading::default()));
    assert!(text.contains("no plain file"), "{text}");
    #[cfg(unix)]
    {
        let link = dir.path().join("endless.png");
        std::os::unix::fs::symlink("/dev/zero", &link).unwrap();
        assert!(refusal(1 << 20, || read_file(&link, GrayReading::default())).contains("no plain file"));
    }
}
