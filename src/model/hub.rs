//! Checkpoints by hub id: `owner/name` at a revision becomes a directory of the local cache.
//!
//! The cache is the one that transformers uses (`blobs`, `refs` and `snapshots` of each repository), so either finds
//! what the other fetched. What a file says is not known here, with two exceptions: config.json is checked before any
//! weight is fetched, and the index of the weights lists their files.

mod cache;
mod client;
mod settings;

pub use settings::HubSettings;

use super::config::VlmConfig;
use super::weights;
use crate::error::{Error, Result};
use cache::Repository;
use client::{Client, Failure};
use std::path::{Path, PathBuf};

/// The branch that is meant when no revision is named.
pub const DEFAULT_REVISION: &str = "main";

/// The weights in one file.
const SINGLE: &str = "model.safetensors";

/// The list of the files that hold the weights, when they are several.
const INDEX: &str = "model.safetensors.index.json";

/// The small files that a checkpoint may have beside its config.json: tokenizer, processors, templates, generation.
const SMALL: [&str; 12] = [
    "generation_config.json",
    "preprocessor_config.json",
    "processor_config.json",
    "video_preprocessor_config.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "chat_template.json",
    "chat_template.jinja",
    "vocab.json",
    "merges.txt",
    "tokenizer.json",
];

/// Where a checkpoint lies.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Location {
    /// Its directory.
    pub dir: PathBuf,
    /// The commit on the hub that it is, 40 hexadecimal digits; none when a directory was named.
    pub commit: Option<String>,
}

/// What happens while files are fetched.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Event<'a> {
    /// A file of `total` bytes is being fetched; `done` of them are there from an earlier attempt.
    Begin {
        /// Its name in the repository.
        file: &'a str,
        /// Its size in bytes.
        total: u64,
        /// Bytes already there.
        done: u64,
    },
    /// So many bytes of the file are there.
    Received(u64),
    /// The file is complete and checked.
    End,
    /// Another process is fetching this file, and is waited for. Told again and again until it is done.
    Waiting(&'a str),
}

/// Hears of every [`Event`]. An error ends the fetching and is passed on; what was received stays for the next time.
pub type Listener<'a> = dyn Fn(Event<'_>) -> Result<()> + 'a;

/// The directory of `model`: itself when it is one, else the local copy of the hub's repository of that id at
/// `revision` (branch, tag or commit hash; absent: [`DEFAULT_REVISION`]), fetched as far as it is not there yet.
/// Settings come from the environment: see [`HubSettings::from_env`].
///
/// # Errors
/// Those of [`check_revision`]; a data error when there is no such directory and no such repository, or it cannot be
/// fetched: see [`fetch`].
pub fn locate(model: &str, revision: Option<&str>, listener: &Listener<'_>) -> Result<Location> {
    check_revision(model, revision)?;
    check_place(model)?;
    let path = Path::new(model);
    if path.is_dir() {
        return Ok(Location { dir: path.to_path_buf(), commit: None });
    }
    fetch(model, revision.unwrap_or(DEFAULT_REVISION), &HubSettings::from_env()?, listener)
}

/// Refuses what is neither a directory nor can be a hub id; the hub is not asked.
///
/// # Errors
/// A data error that says what `--model` takes.
pub fn check_place(model: &str) -> Result<()> {
    if Path::new(model).is_dir() || is_hub_id(model) {
        return Ok(());
    }
    Err(Error::data(format!(
        "no such model directory\n  --> {model}\n   = help: `--model` takes a directory, or a hub id such as `Qwen/Qwen2.5-VL-3B-Instruct`"
    )))
}

/// The same without fetching weights: config.json, tokenizer and processors are enough to say what a model would cost.
/// Weights that are there already are in the directory.
///
/// # Errors
/// As [`locate`].
pub fn locate_without_weights(
    model: &str,
    revision: Option<&str>,
    listener: &Listener<'_>,
) -> Result<Location> {
    check_revision(model, revision)?;
    let revision = revision.unwrap_or(DEFAULT_REVISION);
    fetch_parts(model, revision, &HubSettings::from_env()?, listener, Parts::AllButWeights)
}

/// Refuses a revision that means nothing, without looking for the model.
///
/// # Errors
/// A usage error when `revision` cannot be one, or `model` is a directory or anything else that is not on the hub.
pub fn check_revision(model: &str, revision: Option<&str>) -> Result<()> {
    let Some(revision) = revision else { return Ok(()) };
    let part = |part: &str| {
        !part.is_empty()
            && !part.starts_with(['.', '-'])
            && part.chars().all(|c| c.is_ascii_alphanumeric() || matches!(c, '-' | '_' | '.' | '+' | '@'))
    };
    if revision.contains("..") || !revision.split('/').all(part) {
        return Err(Error::usage(format!(
            "`{revision}` is no revision\n   = help: `--revision` takes a branch, a tag or a commit hash of the model's repository on the hub"
        )));
    }
    if Path::new(model).is_dir() || !is_hub_id(model) {
        return Err(Error::usage(format!(
            "a revision is named, `{revision}`, but the model is not on the hub\n  --> {model}\n   = help: leave `--revision` out, or give `--model` a hub id; a directory is always taken as it is"
        )));
    }
    Ok(())
}

/// Whether `model` has the form `owner/name` of a hub id and no file-system look.
pub fn is_hub_id(model: &str) -> bool {
    let allowed = |part: &str| {
        !part.is_empty()
            && !part.starts_with('.')
            && part.chars().all(|c| c.is_ascii_alphanumeric() || matches!(c, '-' | '_' | '.'))
    };
    matches!(model.split_once('/'), Some((owner, name)) if allowed(owner) && allowed(name))
}

/// The local copy of repository `id` at `revision`. Small files come first, and config.json is checked before any
/// weight is fetched; of the weights, only what a checkpoint needs. What an earlier attempt received is continued.
/// When the hub cannot be asked, a complete copy serves, with a warning; offline, nothing else does.
///
/// # Errors
/// A data error that says what to do: no such repository or revision, access refused, no network, no room on the disk,
/// content that is not what the hub promises, a repository without safetensors weights, a model that is not supported,
/// offline an incomplete copy or none. Whatever `listener` returns.
pub fn fetch(id: &str, revision: &str, settings: &HubSettings, listener: &Listener<'_>) -> Result<Location> {
    fetch_parts(id, revision, settings, listener, Parts::All)
}

/// What of a repository is wanted.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Parts {
    All,
    AllButWeights,
}

fn fetch_parts(
    id: &str,
    revision: &str,
    settings: &HubSettings,
    listener: &Listener<'_>,
    parts: Parts,
) -> Result<Location> {
    let repository = Repository::new(&settings.cache, id, revision);
    if settings.offline {
        return cached(&repository);
    }
    let client = Client::new(settings, &repository, listener);
    let listing = match client.listing() {
        Ok(listing) => listing,
        Err(Failure { error, cache_serves: true, .. }) => {
            let Ok(found) = cached(&repository) else { return Err(error) };
            let reason = error.to_string();
            tracing::warn!(
                "{}; the cached copy of `{id}` is used, commit {}",
                reason.lines().next().unwrap_or_default(),
                found.commit.as_deref().unwrap_or_default()
            );
            return Ok(found);
        }
        Err(failure) => return Err(failure.error),
    };
    let commit = listing.sha.as_str();
    let names: Vec<&str> = listing.siblings.iter().map(|file| file.rfilename.as_str()).collect();
    let is_sharded = checkpoint_form(&repository, &names)?;
    // An interrupted first download can then say offline what it lacks; a later one must not hide a complete copy.
    if repository.commit().is_none() {
        repository.remember(commit)?;
    }
    let get = |name: &str| client.get(commit, name).map_err(|failure| failure.error);
    let dir = repository.snapshot(commit);
    get("config.json")?;
    VlmConfig::load(&dir)?;
    for name in SMALL.into_iter().filter(|name| names.contains(name)) {
        get(name)?;
    }
    if parts == Parts::AllButWeights {
        return Ok(Location { dir, commit: Some(commit.to_owned()) });
    }
    if is_sharded {
        get(INDEX)?;
        for shard in weights::shards(&dir.join(INDEX))? {
            if !names.contains(&shard.as_str()) {
                return Err(Error::data(format!(
                    "shard `{shard}` is listed in {INDEX}, but model `{id}` does not have it\n  --> {}\n   = help: the repository is not complete; take another revision, or tell its owner",
                    repository.described()
                )));
            }
            get(&shard)?;
        }
    } else {
        get(SINGLE)?;
    }
    repository.remember(commit)?;
    Ok(Location { dir, commit: Some(commit.to_owned()) })
}

/// Whether the weights are in several files, when `names` are those of a checkpoint.
fn checkpoint_form(repository: &Repository, names: &[&str]) -> Result<bool> {
    let refused = |what: String, help: &str| {
        Error::data(format!(
            "model `{}` {what}\n  --> {}\n   = help: {help}",
            repository.id(),
            repository.described()
        ))
    };
    let ending = |endings: &[&str]| -> Vec<&str> {
        names.iter().filter(|name| endings.iter().any(|ending| name.ends_with(ending))).copied().collect()
    };
    let some = |found: &[&str]| {
        let more = if found.len() > 3 { ", …" } else { "" };
        format!("{}{more}", found.iter().take(3).copied().collect::<Vec<_>>().join(", "))
    };
    let is_sharded = !names.contains(&SINGLE);
    if !is_sharded || names.contains(&INDEX) {
        return if names.contains(&"config.json") {
            Ok(is_sharded)
        } else {
            Err(refused(
                "has weights but no config.json".to_owned(),
                "take a repository that transformers loads",
            ))
        };
    }
    if names.contains(&"adapter_model.safetensors") {
        return Err(refused(
            "is an adapter, not a checkpoint".to_owned(),
            "fetch it into a directory and pass that with `--adapter`, and its base model with `--model`",
        ));
    }
    let (gguf, pickled, others) =
        (ending(&[".gguf"]), ending(&[".bin", ".pt", ".pth", ".ckpt"]), ending(&[".safetensors"]));
    Err(if !gguf.is_empty() {
        refused(
            format!("holds GGUF files only ({})", some(&gguf)),
            "take the repository that they were made from, with safetensors weights",
        )
    } else if !pickled.is_empty() {
        refused(
            format!("holds pickled weights only ({})", some(&pickled)),
            "look for a revision with safetensors weights on the model's page, or convert them with transformers' `save_pretrained`",
        )
    } else if !others.is_empty() {
        refused(
            format!("has no {SINGLE}, only {}", some(&others)),
            "take a repository in the layout that transformers loads",
        )
    } else {
        refused("holds no weights".to_owned(), "check the id and the revision on the hub's page of the model")
    })
}

/// The copy in the cache, when it is complete.
fn cached(repository: &Repository) -> Result<Location> {
    let id = repository.id();
    let Some(commit) = repository.commit() else {
        return Err(Error::data(format!(
            "model `{id}`, revision `{}`, is not in the local cache, and HF_HUB_OFFLINE or TRANSFORMERS_OFFLINE forbids fetching it\n  --> {}\n   = help: unset the variable to fetch it, or pass a directory; HF_HUB_CACHE and HF_HOME say where the cache is",
            repository.revision(),
            repository.dir().display()
        )));
    };
    let dir = repository.snapshot(&commit);
    match missing(&dir)? {
        None => Ok(Location { dir, commit: Some(commit) }),
        Some(file) => Err(Error::data(format!(
            "the cached copy of model `{id}` is incomplete: `{file}` is missing\n  --> {}\n   = help: run once with HF_HUB_OFFLINE and TRANSFORMERS_OFFLINE unset: what is missing is fetched",
            dir.display()
        ))),
    }
}

/// The first file that a checkpoint in `dir` would need and that is not there.
fn missing(dir: &Path) -> Result<Option<String>> {
    // A link of the snapshot whose blob is gone counts as missing too.
    let has = |name: &str| dir.join(name).exists();
    let lacks = |names: &[&str]| (!names.iter().any(|name| has(name))).then(|| names[0].to_owned());
    let needed: [&[&str]; 4] = [
        &["config.json"],
        &["tokenizer.json"],
        &["preprocessor_config.json", "processor_config.json"],
        &[SINGLE, INDEX],
    ];
    if let Some(name) = needed.into_iter().find_map(lacks) {
        return Ok(Some(name));
    }
    if has(SINGLE) {
        return Ok(None);
    }
    Ok(weights::shards(&dir.join(INDEX))?.into_iter().find(|shard| !has(shard)))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_directory_is_its_own_location_and_nonsense_is_no_hub_id() {
        let dir = tempfile::tempdir().unwrap();
        let name = dir.path().display().to_string();
        let silent: &Listener<'_> = &|_| Ok(());
        let found = locate(&name, None, silent).unwrap();
        assert_eq!(found, Location { dir: dir.path().to_path_buf(), commit: None });
        let error = locate(&name, Some("main"), silent).unwrap_err();
        assert!(matches!(&error, Error::Usage(text) if text.contains("not on the hub")), "{error}");
        for nonsense in ["", "model", "./a/b", "a/b/c", "/no/such", "../no-such-directory", "a/..", "a b/c"] {
            assert!(!is_hub_id(nonsense), "{nonsense}");
            assert!(matches!(locate(nonsense, None, silent), Err(Error::Data(_))), "{nonsense}");
        }
        assert!(is_hub_id("Qwen/Qwen2.5-VL-3B-Instruct"));
    }

    #[test]
    fn a_revision_is_a_branch_a_tag_or_a_commit() {
        for good in ["main", "v1.0", "refs/pr/3", "feature_x", "0123456789abcdef0123456789abcdef01234567"] {
            check_revision("owner/name", Some(good)).unwrap();
        }
        for bad in
            ["", "/", "a/", "/a", "..", "a/../b", "a..b", "a b", ".hidden", "-x", "a?b", "a%2e", "ä", "a\\b"]
        {
            let error = check_revision("owner/name", Some(bad)).unwrap_err();
            assert!(
                matches!(&error, Error::Usage(text) if text.contains("is no revision")),
                "{bad}: {error}"
            );
        }
        assert!(check_revision("scratch:tiny", Some("main")).is_err());
        check_revision("scratch:tiny", None).unwrap();
    }

    #[test]
    fn what_holds_no_checkpoint_says_what_it_holds() {
        let repository = Repository::new(Path::new("cache"), "o/m", "main");
        let form = |names: &[&str]| checkpoint_form(&repository, names);
        assert!(!form(&["config.json", SINGLE, INDEX]).unwrap());
        assert!(form(&["config.json", INDEX, "model-00001-of-00002.safetensors"]).unwrap());
        for (names, words) in [
            (&["config.json", "pytorch_model.bin"][..], "pickled weights only (pytorch_model.bin)"),
            (&["a.gguf", "b.gguf", "c.gguf", "d.gguf"], "GGUF files only (a.gguf, b.gguf, c.gguf, …)"),
            (&["adapter_config.json", "adapter_model.safetensors"], "is an adapter"),
            (&["config.json", "consolidated.safetensors"], "has no model.safetensors, only consolidated"),
            (&["README.md"], "holds no weights"),
            (&[SINGLE], "no config.json"),
        ] {
            let error = form(names).unwrap_err();
            assert!(matches!(&error, Error::Data(text) if text.contains(words)), "{names:?}: {error}");
        }
    }
}
