//! Which of the loaded questions to keep: by id, modality, question type, image on disk, and shard.

use std::collections::{BTreeSet, HashSet};
use std::fmt;
use std::path::{Path, PathBuf};
use std::str::FromStr;

use rayon::prelude::*;
use serde::{Deserialize, Serialize};
use serde_json::Value;

use super::problem::{self, Problem};
use super::sample::{Sample, modality_name};
use crate::error::{Error, Result};
use crate::files;

/// Part `index` of `count` equal parts, by stride over the ids in sorted order; written `I/N`, `I` from 0.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(try_from = "String", into = "String")]
pub struct Shard {
    /// Which part, from 0 to `count - 1`.
    pub index: usize,
    /// Into how many parts, at least 1.
    pub count: usize,
}

impl FromStr for Shard {
    type Err = String;
    fn from_str(text: &str) -> std::result::Result<Self, String> {
        let parsed = text
            .split_once('/')
            .and_then(|(index, count)| Some((index.trim().parse().ok()?, count.trim().parse().ok()?)));
        match parsed {
            Some((index, count)) if index < count => Ok(Self { index, count }),
            Some((index, count)) => {
                Err(format!("shard {index}/{count} does not exist: parts are numbered from 0 to N - 1"))
            }
            None => Err(format!("`{text}` is no shard: write I/N, such as 0/4")),
        }
    }
}

impl TryFrom<String> for Shard {
    type Error = String;
    fn try_from(text: String) -> std::result::Result<Self, String> {
        text.parse()
    }
}

impl From<Shard> for String {
    fn from(shard: Shard) -> Self {
        shard.to_string()
    }
}

impl fmt::Display for Shard {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}/{}", self.index, self.count)
    }
}

impl Shard {
    /// This part of `samples`, in their order. Which items it holds depends on the set of ids alone.
    pub fn of(self, samples: &[Sample]) -> Vec<Sample> {
        let mut ids: Vec<&str> = samples.iter().map(|sample| sample.id.as_str()).collect();
        ids.sort_unstable();
        let mine: HashSet<&str> = ids.into_iter().skip(self.index).step_by(self.count).collect();
        samples.iter().filter(|sample| mine.contains(sample.id.as_str())).cloned().collect()
    }
}

/// Reads a split: a JSON list of question ids.
///
/// # Errors
/// When the file is missing, no list of texts, empty, or names an id twice.
pub fn read_split(file: &Path) -> Result<Vec<String>> {
    let bytes = files::read(file, "cannot read the split")?;
    let refuse = |message: String| {
        Error::data(format!(
            "{message}\n  --> {}\n   = help: a split is a JSON list of question ids, such as [\"ACRIMA_0000\"]",
            file.display()
        ))
    };
    let values: Vec<Value> = serde_json::from_slice(&bytes)
        .map_err(|error| refuse(format!("the split is no JSON list: {error}")))?;
    let mut ids = Vec::with_capacity(values.len());
    let mut seen = HashSet::new();
    for (index, value) in values.into_iter().enumerate() {
        match value {
            Value::String(id) if seen.insert(id.clone()) => ids.push(id),
            Value::String(id) => return Err(refuse(format!("the split names `{id}` twice"))),
            other => {
                return Err(refuse(format!("entry {} of the split is {}", index + 1, problem::kind(&other))));
            }
        }
    }
    if ids.is_empty() {
        return Err(refuse("the split is empty".into()));
    }
    Ok(ids)
}

/// Keeps the samples that the split in `file` names, in their own order. Ids of records that were left out for a
/// problem are no surprise; any other id that is not there is.
///
/// # Errors
/// When the split cannot be read, or names ids that the data does not have.
pub fn by_split(samples: Vec<Sample>, file: &Path, problems: &[Problem]) -> Result<Vec<Sample>> {
    let ids = read_split(file)?;
    let known: HashSet<&str> = samples
        .iter()
        .map(|sample| sample.id.as_str())
        .chain(problems.iter().filter_map(|problem| problem.id.as_deref()))
        .collect();
    let unknown: Vec<&String> = ids.iter().filter(|id| !known.contains(id.as_str())).collect();
    if !unknown.is_empty() {
        let few: Vec<String> = unknown.iter().take(5).map(|id| format!("`{id}`")).collect();
        let dots = if unknown.len() > few.len() { ", ..." } else { "" };
        return Err(Error::data(format!(
            "{} of the {} ids in the split are not in the data: {}{dots}\n  --> {}\n   = help: use a split that was made for this data",
            unknown.len(),
            ids.len(),
            few.join(", "),
            file.display()
        )));
    }
    let wanted: HashSet<String> = ids.into_iter().collect();
    Ok(samples.into_iter().filter(|sample| wanted.contains(&sample.id)).collect())
}

/// Keeps one modality, named in our way or in a file's spelling; case does not matter.
///
/// # Errors
/// A usage error that lists the modalities there are, when none matches.
pub fn by_modality(samples: &mut Vec<Sample>, wanted: Option<&str>) -> Result<()> {
    keep(samples, wanted.map(modality_name).as_deref(), "modality", |sample| &sample.modality)
}

/// Keeps one question type; case does not matter.
///
/// # Errors
/// A usage error that lists the types there are, when none matches.
pub fn by_question_type(samples: &mut Vec<Sample>, wanted: Option<&str>) -> Result<()> {
    keep(samples, wanted, "question type", |sample| &sample.question_type)
}

fn keep(
    samples: &mut Vec<Sample>,
    wanted: Option<&str>,
    what: &str,
    field: fn(&Sample) -> &String,
) -> Result<()> {
    let Some(wanted) = wanted.map(str::trim) else { return Ok(()) };
    let present: BTreeSet<String> = samples.iter().map(|sample| field(sample).clone()).collect();
    if !present.iter().any(|name| name.eq_ignore_ascii_case(wanted)) {
        let near =
            near_miss(wanted, &present).map_or_else(String::new, |name| format!("did you mean `{name}`? "));
        let list: Vec<String> = present.iter().map(|name| format!("`{name}`")).collect();
        return Err(Error::usage(format!(
            "no question with {what} `{wanted}` in the data\n   = help: {near}there are {}",
            if list.is_empty() { "none".into() } else { list.join(", ") }
        )));
    }
    samples.retain(|sample| field(sample).eq_ignore_ascii_case(wanted));
    Ok(())
}

fn near_miss<'a>(wanted: &str, present: &'a BTreeSet<String>) -> Option<&'a str> {
    let wanted = wanted.to_lowercase();
    present
        .iter()
        .map(|name| (strsim::jaro_winkler(&wanted, &name.to_lowercase()), name))
        .filter(|(similarity, _)| *similarity > 0.75)
        .max_by(|a, b| a.0.total_cmp(&b.0))
        .map(|(_, name)| name.as_str())
}

/// The images of `samples` that are no files under `root`.
pub fn missing_images(root: &Path, samples: &[Sample]) -> HashSet<PathBuf> {
    let images: HashSet<&PathBuf> = samples.iter().map(|sample| &sample.image).collect();
    images.into_par_iter().filter(|image| !root.join(image).is_file()).cloned().collect()
}
