//! One repository's place in the cache: what was resolved, what is complete, what is linked to what.

use crate::error::{Error, Result};
use crate::model::weights::write_atomically;
use hf_hub::{Cache, CacheRepo, Repo, RepoType};
use std::fs::{self, File, TryLockError};
use std::io::{ErrorKind, Write as _};
use std::path::{Path, PathBuf};
use std::time::Duration;

/// How long to wait before looking at a lock again.
const LOCK_PAUSE: Duration = Duration::from_millis(200);

/// A repository at a revision, and its directory of the cache: contents under `blobs` by their hash, for each commit a
/// directory of links to them under `snapshots`, and under `refs` the commit that each branch or tag was last.
#[derive(Debug)]
pub(super) struct Repository {
    id: String,
    revision: String,
    names: Repo,
    cache: CacheRepo,
    /// The directory of all repositories.
    root: PathBuf,
}

impl Repository {
    pub(super) fn new(root: &Path, id: &str, revision: &str) -> Self {
        let names = Repo::with_revision(id.to_owned(), RepoType::Model, revision.to_owned());
        // Links between its directories are relative, and the directory of the process may change.
        let root = std::path::absolute(root).unwrap_or_else(|_| root.to_path_buf());
        let cache = Cache::new(root.clone()).repo(names.clone());
        Self { id: id.to_owned(), revision: revision.to_owned(), names, cache, root }
    }

    pub(super) fn id(&self) -> &str {
        &self.id
    }

    pub(super) fn revision(&self) -> &str {
        &self.revision
    }

    /// Paths of the hub's addresses.
    pub(super) fn names(&self) -> &Repo {
        &self.names
    }

    /// In words.
    pub(super) fn described(&self) -> String {
        format!("{}, revision {}", self.id, self.revision)
    }

    /// Its directory of the cache.
    pub(super) fn dir(&self) -> PathBuf {
        self.root.join(self.names.folder_name())
    }

    /// The directory that is the checkpoint at `commit`, whether or not it is there.
    pub(super) fn snapshot(&self, commit: &str) -> PathBuf {
        self.cache.pointer_path(commit)
    }

    /// Where the content named `etag` belongs.
    pub(super) fn blob(&self, etag: &str) -> PathBuf {
        self.cache.blob_path(etag)
    }

    /// The commit that the revision was when it was last fetched; of a commit hash, itself when anything of it is there.
    pub(super) fn commit(&self) -> Option<String> {
        if is_commit(&self.revision) && self.snapshot(&self.revision).is_dir() {
            return Some(self.revision.clone());
        }
        let text = fs::read_to_string(self.reference()).ok()?;
        Some(text.trim().to_owned()).filter(|commit| is_commit(commit))
    }

    /// Notes that the revision is `commit`.
    pub(super) fn remember(&self, commit: &str) -> Result<()> {
        let path = self.reference();
        if self.revision == commit || fs::read_to_string(&path).is_ok_and(|known| known.trim() == commit) {
            return Ok(());
        }
        let failed = |error| write_failed("note the revision", &path, &error);
        path.parent().map_or(Ok(()), fs::create_dir_all).map_err(failed)?;
        write_atomically(&path, |out| out.write_all(commit.as_bytes()).map_err(failed))
    }

    fn reference(&self) -> PathBuf {
        self.dir().join("refs").join(&self.revision)
    }

    /// Makes `name` of the snapshot a link to `blob`.
    pub(super) fn link(&self, commit: &str, name: &str, blob: &Path) -> Result<()> {
        let path = self.snapshot(commit).join(name);
        let failed = |error| write_failed("link the file", &path, &error);
        path.parent().map_or(Ok(()), fs::create_dir_all).map_err(failed)?;
        let target = Path::new("../../blobs").join(blob.file_name().unwrap_or_default());
        match symlink(&target, &path) {
            Ok(()) => Ok(()),
            // Either another process was faster, or the link leads nowhere and must not stay.
            Err(error) if error.kind() == ErrorKind::AlreadyExists && path.exists() => Ok(()),
            Err(error) if error.kind() == ErrorKind::AlreadyExists => {
                fs::remove_file(&path).and_then(|()| symlink(&target, &path)).map_err(failed)
            }
            // Not every file system has links, nor every user the right to make them.
            Err(_) => fs::rename(blob, &path).map_err(failed),
        }
    }

    /// Waits until no other process fetches the content named `etag`, and keeps others waiting until the file returned
    /// is dropped, or the process ends. Calls `waiting` again and again while it has to wait; an error ends that.
    pub(super) fn lock(&self, etag: &str, waiting: impl Fn() -> Result<()>) -> Result<File> {
        let path = self.root.join(".locks").join(self.names.folder_name()).join(format!("{etag}.lock"));
        let failed = |error| write_failed("lock the download", &path, &error);
        path.parent().map_or(Ok(()), fs::create_dir_all).map_err(failed)?;
        let file = File::options().create(true).truncate(false).write(true).open(&path).map_err(failed)?;
        loop {
            match file.try_lock() {
                Ok(()) => return Ok(file),
                Err(TryLockError::WouldBlock) => waiting()?,
                // A file system without locks: contents are still checked before they get their name.
                Err(TryLockError::Error(error)) if error.kind() == ErrorKind::Unsupported => return Ok(file),
                Err(TryLockError::Error(error)) => return Err(failed(error)),
            }
            std::thread::sleep(LOCK_PAUSE);
        }
    }
}

#[cfg(unix)]
fn symlink(target: &Path, path: &Path) -> std::io::Result<()> {
    std::os::unix::fs::symlink(target, path)
}

#[cfg(windows)]
fn symlink(target: &Path, path: &Path) -> std::io::Result<()> {
    std::os::windows::fs::symlink_file(target, path)
}

/// Whether `text` is a full commit hash.
pub(super) fn is_commit(text: &str) -> bool {
    text.len() == 40 && text.bytes().all(|byte| byte.is_ascii_hexdigit() && !byte.is_ascii_uppercase())
}

/// The error of a cache that cannot be written.
pub(super) fn write_failed(what: &str, path: &Path, error: &std::io::Error) -> Error {
    let help = match error.kind() {
        ErrorKind::StorageFull | ErrorKind::QuotaExceeded => {
            "make room and run again: what was received is kept and continued; or set HF_HUB_CACHE to a directory on a larger disk"
        }
        _ => "the cache must be writable; HF_HUB_CACHE or HF_HOME names another place for it",
    };
    let problem = match error.kind() {
        ErrorKind::StorageFull => "the disk is full".to_owned(),
        ErrorKind::QuotaExceeded => "the disk quota is used up".to_owned(),
        _ => error.to_string(),
    };
    Error::data(format!("cannot {what}: {problem}\n  --> {}\n   = help: {help}", path.display()))
}

#[cfg(test)]
mod tests {
    use super::*;

    const OLD: &str = "1111111111111111111111111111111111111111";
    const NEW: &str = "2222222222222222222222222222222222222222";

    #[test]
    fn a_revision_is_remembered_and_a_commit_is_its_own() {
        let dir = tempfile::tempdir().unwrap();
        let branch = Repository::new(dir.path(), "o/m", "refs/pr/1");
        assert_eq!(branch.commit(), None);
        branch.remember(OLD).unwrap();
        branch.remember(NEW).unwrap();
        assert_eq!(branch.commit().as_deref(), Some(NEW));
        assert_eq!(fs::read_to_string(dir.path().join("models--o--m/refs/refs/pr/1")).unwrap(), NEW);
        fs::write(branch.reference(), "../../etc").unwrap();
        assert_eq!(branch.commit(), None);
        let pinned = Repository::new(dir.path(), "o/m", OLD);
        pinned.remember(OLD).unwrap();
        assert_eq!(pinned.commit(), None);
        fs::create_dir_all(pinned.snapshot(OLD)).unwrap();
        assert_eq!(pinned.commit().as_deref(), Some(OLD));
        assert!(!dir.path().join("models--o--m/refs").join(OLD).exists());
    }

    #[test]
    fn a_link_that_leads_nowhere_is_replaced() {
        let dir = tempfile::tempdir().unwrap();
        let repository = Repository::new(dir.path(), "o/m", "main");
        let blob = repository.blob("abc");
        fs::create_dir_all(blob.parent().unwrap()).unwrap();
        let name = repository.snapshot(NEW).join("config.json");
        repository.link(NEW, "config.json", &repository.blob("gone")).unwrap();
        assert!(!name.exists());
        fs::write(&blob, "text").unwrap();
        for _ in 0..2 {
            repository.link(NEW, "config.json", &blob).unwrap();
            assert_eq!(fs::read_to_string(&name).unwrap(), "text");
        }
    }

    #[test]
    fn one_process_fetches_while_another_waits() {
        let dir = tempfile::tempdir().unwrap();
        let repository = Repository::new(dir.path(), "o/m", "main");
        let held = repository.lock("abc", || panic!("nobody else is there")).unwrap();
        let (heard, hears) = std::sync::mpsc::channel();
        std::thread::scope(|scope| {
            scope.spawn(|| {
                repository
                    .lock("abc", || {
                        let _ = heard.send(());
                        Ok(())
                    })
                    .unwrap()
            });
            hears.recv().unwrap();
            drop(held);
        });
    }
}
