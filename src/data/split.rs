//! Splits that keep an image's questions together, and the check for images that two sets share.
//!
//! Where an image goes depends on the seed, its own path and the other images of its modality, never on the order
//! of the questions. Decoding is the caller's: pixel hashes come in through a function.

use std::collections::{BTreeMap, HashMap, HashSet};
use std::path::{Path, PathBuf};

use rayon::prelude::*;
use serde::{Deserialize, Serialize};

use super::{Dataset, Sample};
use crate::error::{Error, Result};
use crate::rng;

/// One part of a split.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Part {
    /// Its name, which is also its file's: `train`.
    pub name: String,
    /// Its share of the questions: above 0; all shares add up to 1.
    pub share: f64,
}

impl Part {
    /// A part by name and share.
    pub fn new(name: impl Into<String>, share: f64) -> Self {
        Self { name: name.into(), share }
    }
}

/// A part's name and the ids of its questions, in the order of the data.
pub type NamedIds = (String, Vec<String>);

/// Splits `samples` so that all questions of one image are in one part, each modality in the same shares.
///
/// # Errors
/// A usage error when the shares are not above 0, do not add up to 1, or a name is repeated or no plain file name.
pub fn image_grouped(samples: &[Sample], parts: &[Part], seed: u64) -> Result<Vec<NamedIds>> {
    check(parts)?;
    let mut images: BTreeMap<&str, BTreeMap<&Path, usize>> = BTreeMap::new();
    let mut modality_of: HashMap<&Path, &str> = HashMap::new();
    for sample in samples {
        let modality = *modality_of.entry(&sample.image).or_insert(&sample.modality);
        *images.entry(modality).or_default().entry(&sample.image).or_default() += 1;
    }
    let mut part_of: HashMap<&Path, usize> = HashMap::new();
    for (_, questions) in images {
        let mut order: Vec<(u64, &Path, usize)> =
            questions.into_iter().map(|(image, count)| (place(seed, image), image, count)).collect();
        order.sort_unstable();
        let mut filled = vec![0usize; parts.len()];
        let mut total = 0;
        for (_, image, count) in order {
            total += count;
            // The part furthest behind its share takes the image; of equals the first.
            let behind = |part: usize| parts[part].share * total as f64 - filled[part] as f64;
            let part =
                (1..parts.len()).fold(0, |best, part| if behind(part) > behind(best) { part } else { best });
            filled[part] += count;
            part_of.insert(image, part);
        }
    }
    let mut ids: Vec<NamedIds> = parts.iter().map(|part| (part.name.clone(), Vec::new())).collect();
    for sample in samples {
        if let Some(&part) = part_of.get(sample.image.as_path()) {
            ids[part].1.push(sample.id.clone());
        }
    }
    Ok(ids)
}

fn place(seed: u64, image: &Path) -> u64 {
    rng::key_of(&format!("{seed}\n{}", image.display()))
}

fn check(parts: &[Part]) -> Result<()> {
    let mut names = HashSet::new();
    for part in parts {
        let plain = !part.name.is_empty() && !part.name.contains(['/', '\\', '.']);
        if !plain || !names.insert(part.name.as_str()) {
            return Err(Error::usage(format!(
                "`{}` cannot name a part: it is repeated, empty or no plain name",
                part.name
            )));
        }
        if !(part.share > 0.0 && part.share <= 1.0) {
            return Err(Error::usage(format!(
                "share {} of part `{}` is outside (0, 1]",
                part.share, part.name
            )));
        }
    }
    let sum: f64 = parts.iter().map(|part| part.share).sum();
    if (sum - 1.0).abs() > 1e-9 {
        return Err(Error::usage(format!("the shares of the parts add up to {sum}, not to 1")));
    }
    Ok(())
}

/// Writes each part as `folder/NAME.json`, a JSON list of ids, one a line.
///
/// # Errors
/// When the folder cannot be made or a file not be written.
pub fn write(folder: &Path, parts: &[NamedIds]) -> Result<()> {
    std::fs::create_dir_all(folder)
        .map_err(|error| Error::io("cannot make the folder of splits", folder, error))?;
    for (name, ids) in parts {
        let file = folder.join(format!("{name}.json"));
        let lines: Vec<String> =
            ids.iter().map(|id| format!(" {}", serde_json::Value::from(id.as_str()))).collect();
        let text = format!("[\n{}\n]\n", lines.join(",\n"));
        std::fs::write(&file, text).map_err(|error| Error::io("cannot write the split", &file, error))?;
    }
    Ok(())
}

/// How many of a test set's images the train set has too.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, Serialize)]
pub struct Leak {
    /// Different images of the test set, by path.
    pub test_images: usize,
    /// Of these, with a path that the train set has.
    pub shared_paths: usize,
    /// Of these, with the very pixels of an image of the train set; `None` when pixels were not compared.
    pub shared_pixels: Option<usize>,
}

/// Leaks by modality of the test question, and over all.
#[derive(Debug, Clone, PartialEq, Eq, Default, Serialize)]
pub struct LeakReport {
    /// Over all images.
    pub all: Leak,
    /// Per modality. An image with questions of two modalities counts in the one met first.
    pub by_modality: BTreeMap<String, Leak>,
}

/// Gives the hash of an image file's decoded pixels.
pub type PixelHash<'a> = &'a (dyn Fn(&Path) -> Result<[u8; 32]> + Sync);

/// Counts the images of `test` that `train` has too: by path within the data root, and by pixels when a hash
/// function is given (it decodes every image of both sets once, in parallel).
///
/// # Errors
/// Whatever the hash function refuses.
pub fn leak(train: &Dataset, test: &Dataset, pixel_hash: Option<PixelHash<'_>>) -> Result<LeakReport> {
    let train_paths: HashSet<&Path> = train.samples.iter().map(|sample| sample.image.as_path()).collect();
    let mut test_modality: BTreeMap<&Path, &str> = BTreeMap::new();
    for sample in &test.samples {
        test_modality.entry(&sample.image).or_insert(&sample.modality);
    }
    let hashes = match pixel_hash {
        Some(hash) => Some((
            hash_all(&train.root, &train_paths.iter().copied().collect::<Vec<_>>(), hash)?,
            hash_all(&test.root, &test_modality.keys().copied().collect::<Vec<_>>(), hash)?,
        )),
        None => None,
    };
    let train_pixels: Option<HashSet<[u8; 32]>> =
        hashes.as_ref().map(|(train, _)| train.values().copied().collect());
    let mut report = LeakReport::default();
    for (image, modality) in test_modality {
        let same_path = train_paths.contains(image);
        let same_pixels = hashes
            .as_ref()
            .zip(train_pixels.as_ref())
            .map(|((_, test), train)| test.get(image).is_some_and(|hash| train.contains(hash)));
        for leak in [&mut report.all, report.by_modality.entry(modality.to_owned()).or_default()] {
            leak.test_images += 1;
            leak.shared_paths += usize::from(same_path);
            if let Some(same) = same_pixels {
                *leak.shared_pixels.get_or_insert(0) += usize::from(same);
            }
        }
    }
    Ok(report)
}

fn hash_all(root: &Path, images: &[&Path], hash: PixelHash<'_>) -> Result<HashMap<PathBuf, [u8; 32]>> {
    images.par_iter().map(|image| Ok((image.to_path_buf(), hash(&root.join(image))?))).collect()
}
