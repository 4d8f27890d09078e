//! Checkpoint directories that survive a kill, a power cut and a full disk at any moment.
//!
//! `step-N` appears under its name only when every file of it is on the disk, with a list of them, their lengths
//! and hashes ([`LIST`]). On resume the newest directory that is whole counts; damaged ones are named and set aside, never taken up in part.
//! What stands in the files is the learner's business.

use super::inputs::file_sha256;
use super::run::write_atomic;
use crate::error::{Error, ExitStatus, Result};
use rayon::prelude::*;
use serde_json::{Map, Value, json};
use std::fs::{self, File, OpenOptions};
use std::io::ErrorKind;
use std::path::{Path, PathBuf};

/// The files of a checkpoint with their lengths in bytes and their SHA-256. Lists of earlier versions have lengths alone, and
/// checkpoints before them no list: they are judged by what is there.
pub const LIST: &str = "files.json";

/// The directory of step `step` below `root`.
pub fn named(root: &Path, step: u64) -> PathBuf {
    root.join(format!("step-{step}"))
}

/// Steps that have a directory below `root`, in no order.
pub fn saved_steps(root: &Path) -> Vec<u64> {
    names(root).iter().filter_map(|name| name.strip_prefix("step-")?.parse().ok()).collect()
}

/// Makes `step-N` of what `fill` writes into the directory it is given, about `bytes` bytes.
///
/// # Errors
/// What `fill` refuses, and what the system refuses; older checkpoints are untouched then, and nothing of the new one is left.
pub fn write(root: &Path, step: u64, bytes: u64, fill: impl FnOnce(&Path) -> Result<()>) -> Result<PathBuf> {
    let (dir, partial) = (named(root, step), root.join(format!(".step-{step}.partial")));
    remove(&partial)?;
    let written = fill(&partial).and_then(|()| seal(&partial)).and_then(|()| {
        if dir.exists() {
            let stale = root.join(format!(".step-{step}.stale"));
            remove(&stale)?;
            rename(&dir, &stale)?;
        }
        rename(&partial, &dir)
    });
    if let Err(error) = written {
        // The room is needed more than what is left of it; the first error is the one to report.
        let _ = fs::remove_dir_all(&partial);
        return Err(without_room(error, root, step, bytes));
    }
    sync_dir(root);
    remove(&root.join(format!(".step-{step}.stale")))?;
    remove(&set_aside(root, step))?;
    Ok(dir)
}

/// Gives `load` the newest checkpoint below `root` that is whole, if there is any, and says whether there was. Damaged ones newer
/// than it are warned of and set aside as `step-N.damaged`, until step N is saved again.
///
/// # Errors
/// A data error when there are checkpoints and none of them is whole; what `load` refuses for another reason than damage.
pub fn take_up(root: &Path, mut load: impl FnMut(&Path, u64) -> Result<()>) -> Result<bool> {
    for name in names(root) {
        if name.starts_with(".step-") && matches!(name.rsplit('.').next(), Some("partial" | "stale")) {
            remove(&root.join(name))?;
        }
    }
    let mut steps = saved_steps(root);
    steps.sort_unstable_by(|a, b| b.cmp(a));
    let mut damaged: Vec<(u64, String)> = Vec::new();
    for step in steps {
        let dir = named(root, step);
        match inspect(&dir).and_then(|()| load(&dir, step)) {
            Ok(()) => {
                for (bad, reason) in damaged {
                    tracing::warn!(
                        "the checkpoint {} is damaged: {reason}; going on from {}",
                        named(root, bad).display(),
                        dir.display()
                    );
                    let aside = set_aside(root, bad);
                    remove(&aside)?;
                    rename(&named(root, bad), &aside)?;
                }
                return Ok(true);
            }
            // Damage: what is there is not what was written. A disk that does not answer may do so the next time.
            Err(error) if error.status() == ExitStatus::Data => {
                let text = error.to_string();
                let text = text.split("\n   = help").next().unwrap_or_default().replace("\n  --> ", ": ");
                damaged.push((step, text));
            }
            Err(error) => return Err(error),
        }
    }
    if damaged.is_empty() {
        return Ok(false);
    }
    let list: Vec<String> = damaged.iter().map(|(step, why)| format!("\n  --> step {step}: {why}")).collect();
    Err(Error::data(format!(
        "no checkpoint of this run is whole{}\n   = help: begin a new run with another `--out`; trained weights that are whole there can be its `--model` or `--adapter`",
        list.concat()
    )))
}

/// Removes the directory of step `step`, which is gone as a whole or there as a whole.
///
/// # Errors
/// When the system refuses.
pub fn discard(root: &Path, step: u64) -> Result<()> {
    let stale = root.join(format!(".step-{step}.stale"));
    remove(&stale)?;
    rename(&named(root, step), &stale)?;
    remove(&stale)
}

/// Bytes free for this user on the disk that `path` is or will be on; none where the system does not tell.
pub fn free_disk_bytes(path: &Path) -> Option<u64> {
    // The ancestors of a relative path end with an empty one, which stands for the working directory.
    let place = |part: &Path| {
        let is_here = part.as_os_str().is_empty();
        if is_here { PathBuf::from(".") } else { part.to_path_buf() }
    };
    free_at(&path.ancestors().map(place).find(|part| part.exists())?)
}

#[cfg(unix)]
fn free_at(path: &Path) -> Option<u64> {
    let about = rustix::fs::statvfs(path).ok()?;
    about.f_bavail.checked_mul(about.f_frsize)
}

#[cfg(not(unix))]
fn free_at(_path: &Path) -> Option<u64> {
    None
}

/// Refuses a directory whose files are not those of its list.
fn inspect(dir: &Path) -> Result<()> {
    let path = dir.join(LIST);
    let text = match fs::read(&path) {
        Ok(text) => text,
        Err(error) if error.kind() == ErrorKind::NotFound => return Ok(()),
        Err(error) => return Err(Error::io("cannot read", &path, error)),
    };
    let list: Value = serde_json::from_slice(&text)
        .map_err(|error| Error::data(format!("not valid JSON: {error}\n  --> {}", path.display())))?;
    let files = list["files"]
        .as_object()
        .ok_or_else(|| Error::data(format!("`files` is missing\n  --> {}", path.display())))?;
    for (name, about) in files {
        let file = dir.join(name);
        let length = if about.is_object() { &about["bytes"] } else { about };
        let wrong = |what: String| Err(Error::data(format!("{what}\n  --> {}", file.display())));
        match fs::metadata(&file) {
            Ok(found) if Some(found.len()) == length.as_u64() => {
                let wanted = about["sha256"].as_str();
                if wanted.is_some() && Some(file_sha256(&file)?.as_str()) != wanted {
                    return wrong(
                        "the file is not the one that was written: its SHA-256 is another".to_owned(),
                    );
                }
            }
            Ok(about) => return wrong(format!("the file has {} of {length} bytes", about.len())),
            Err(error) if error.kind() == ErrorKind::NotFound => {
                return wrong("the file is missing".to_owned());
            }
            Err(error) => return Err(Error::io("cannot look at", &file, error)),
        }
    }
    Ok(())
}

/// Brings all of a directory to the disk, and lists it.
fn seal(dir: &Path) -> Result<()> {
    let mut found: Vec<(String, PathBuf, u64)> = Vec::new();
    let mut folders = vec![dir.to_path_buf()];
    let mut next = 0;
    while next < folders.len() {
        let folder = folders[next].clone();
        next += 1;
        let failed = |error| Error::io("cannot list", &folder, error);
        for entry in fs::read_dir(&folder).map_err(failed)? {
            let path = entry.map_err(failed)?.path();
            if path.is_dir() {
                folders.push(path);
                continue;
            }
            let length = OpenOptions::new().append(true).open(&path).and_then(|file| {
                file.sync_all()?;
                Ok(file.metadata()?.len())
            });
            let length = length.map_err(|error| Error::io("cannot bring to the disk", &path, error))?;
            let relative = path.strip_prefix(dir).unwrap_or(&path);
            let parts: Vec<_> = relative.iter().map(|part| part.to_string_lossy()).collect();
            found.push((parts.join("/"), path.clone(), length));
        }
    }
    found.sort();
    let about = |(name, path, length): (String, PathBuf, u64)| -> Result<(String, Value)> {
        Ok((name, json!({"bytes": length, "sha256": file_sha256(&path)?})))
    };
    let files: Map<String, Value> =
        found.into_par_iter().map(about).collect::<Result<Vec<_>>>()?.into_iter().collect();
    write_atomic(&dir.join(LIST), format!("{:#}\n", json!({"files": files})).as_bytes())?;
    for folder in &folders {
        sync_dir(folder);
    }
    Ok(())
}

/// Makes names in a directory durable; not every file system lets one open a directory.
fn sync_dir(dir: &Path) {
    if let Ok(dir) = File::open(dir) {
        let _ = dir.sync_all();
    }
}

/// Says how much room was needed where there was too little.
fn without_room(error: Error, root: &Path, step: u64, bytes: u64) -> Error {
    let Error::Io { path, source, .. } = &error else { return error };
    let is_full =
        matches!(source.kind(), ErrorKind::StorageFull | ErrorKind::QuotaExceeded | ErrorKind::FileTooLarge);
    if !is_full {
        return error;
    }
    let last = saved_steps(root).into_iter().max();
    let last =
        last.map_or_else(|| "there is none before it".to_owned(), |last| format!("step {last} is kept"));
    let free =
        free_disk_bytes(root).map_or_else(String::new, |free| format!(", {free} are free on this disk"));
    Error::Other(anyhow::anyhow!(
        "the checkpoint of step {step} cannot be written: {source}\n  --> {}\n   = help: it takes about {bytes} bytes{free}; {last}. Make room (or raise the quota or limit), then run the same command with --resume",
        path.display()
    ))
}

fn set_aside(root: &Path, step: u64) -> PathBuf {
    root.join(format!("step-{step}.damaged"))
}

fn names(root: &Path) -> Vec<String> {
    let Ok(entries) = fs::read_dir(root) else { return Vec::new() };
    entries.filter_map(|entry| entry.ok()?.file_name().into_string().ok()).collect()
}

fn rename(from: &Path, to: &Path) -> Result<()> {
    fs::rename(from, to).map_err(|error| Error::io("cannot complete", to, error))
}

/// Removes a directory that may not be there.
fn remove(dir: &Path) -> Result<()> {
    match fs::remove_dir_all(dir) {
        Err(error) if error.kind() != ErrorKind::NotFound => Err(Error::io("cannot remove", dir, error)),
        _ => Ok(()),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    type Damage<'a> = &'a dyn Fn(&Path);

    fn save(root: &Path, step: u64) {
        write(root, step, 0, |dir| {
            fs::create_dir_all(dir.join("ema")).unwrap();
            fs::write(dir.join("weights"), vec![step as u8; 100]).unwrap();
            fs::write(dir.join("ema/weights"), [1; 10]).unwrap();
            Ok(())
        })
        .unwrap();
    }

    fn taken(root: &Path) -> Result<Option<u64>> {
        let mut found = None;
        let any = take_up(root, |dir, step| {
            assert_eq!(fs::read(dir.join("weights")).unwrap(), vec![step as u8; 100]);
            found = Some(step);
            Ok(())
        })?;
        assert_eq!(any, found.is_some());
        Ok(found)
    }

    #[test]
    fn the_newest_whole_checkpoint_counts_however_the_newer_ones_are_damaged() {
        let cut = |file: &Path, length: u64| {
            OpenOptions::new().write(true).open(file).unwrap().set_len(length).unwrap();
        };
        let damages: [(&str, Damage<'_>); 7] = [
            ("truncated", &|dir| cut(&dir.join("weights"), 99)),
            ("of no length", &|dir| cut(&dir.join("ema/weights"), 0)),
            ("longer", &|dir| cut(&dir.join("weights"), 101)),
            ("of other bytes", &|dir| fs::write(dir.join("ema/weights"), [0; 10]).unwrap()),
            ("missing", &|dir| fs::remove_file(dir.join("ema/weights")).unwrap()),
            ("list of no length", &|dir| cut(&dir.join(LIST), 0)),
            ("empty", &|dir| {
                fs::remove_dir_all(dir).unwrap();
                fs::create_dir(dir).unwrap();
                fs::write(dir.join(LIST), "{\"files\": {\"weights\": 100}}").unwrap();
            }),
        ];
        for (name, damage) in damages {
            let dir = tempfile::tempdir().unwrap();
            let root = dir.path();
            assert_eq!(taken(root).unwrap(), None);
            save(root, 9);
            save(root, 10);
            assert_eq!(taken(root).unwrap(), Some(10), "{name}");
            damage(&named(root, 10));
            assert_eq!(taken(root).unwrap(), Some(9), "{name}");
            assert!(set_aside(root, 10).exists() && saved_steps(root) == [9], "{name}");
            // Once the step is saved again, nothing tells of the damage.
            save(root, 10);
            assert!(!set_aside(root, 10).exists());
            assert_eq!(taken(root).unwrap(), Some(10), "{name}");
            damage(&named(root, 9));
            damage(&named(root, 10));
            let error = taken(root).unwrap_err();
            assert_eq!(error.status(), ExitStatus::Data);
            let text = error.to_string();
            assert!(text.contains("step 9: ") && text.contains("step 10: "), "{name}: {text}");
            assert_eq!(saved_steps(root).len(), 2, "nothing is thrown away: {name}");
        }
    }

    #[test]
    fn what_a_kill_leaves_of_a_checkpoint_is_cleared_and_never_counts() {
        let dir = tempfile::tempdir().unwrap();
        save(dir.path(), 2);
        for name in [".step-4.partial", ".step-1.stale"] {
            fs::create_dir(dir.path().join(name)).unwrap();
            fs::write(dir.path().join(name).join("weights"), [0; 3]).unwrap();
        }
        assert_eq!(taken(dir.path()).unwrap(), Some(2));
        assert_eq!(names(dir.path()), ["step-2"]);
        discard(dir.path(), 2).unwrap();
        assert!(names(dir.path()).is_empty());
    }

    #[test]
    fn a_full_disk_leaves_the_last_checkpoint_and_says_what_is_needed() {
        let dir = tempfile::tempdir().unwrap();
        save(dir.path(), 2);
        for (kind, words) in [(ErrorKind::StorageFull, "12345 bytes"), (ErrorKind::PermissionDenied, "x")] {
            let error = write(dir.path(), 4, 12345, |partial| {
                fs::create_dir_all(partial).unwrap();
                fs::write(partial.join("weights"), [4; 50]).unwrap();
                Err(Error::io("x", &partial.join("optimizer"), kind.into()))
            })
            .unwrap_err();
            assert_eq!(error.status(), ExitStatus::Unexpected);
            let text = error.to_string();
            assert!(text.contains(words) && text.contains("optimizer"), "{text}");
            assert_eq!(text.contains("step 2 is kept"), kind == ErrorKind::StorageFull, "{text}");
            assert_eq!(names(dir.path()), ["step-2"]);
        }
        assert_eq!(taken(dir.path()).unwrap(), Some(2));
    }

    #[test]
    fn the_room_on_a_disk_is_known_before_the_directory_is_there() {
        if cfg!(unix) {
            let dir = tempfile::tempdir().unwrap();
            let (there, not) = (free_disk_bytes(dir.path()), free_disk_bytes(&dir.path().join("a/b")));
            assert!(there.unwrap() > 0 && not.is_some());
            assert!(free_disk_bytes(Path::new("runs/absent")).is_some());
        }
    }
}
