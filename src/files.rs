//! Reading whole files of strangers, and code of others that may panic on them.

use crate::error::{Error, Result};
use std::cell::Cell;
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::path::Path;

/// Longest file that is read whole.
const MOST_BYTES: u64 = 2 << 30;

/// Refuses what is no plain file (or a link to one) before it is opened: pipes wait, devices have no end.
///
/// # Errors
/// A data error for anything else; an I/O error, beginning with `failed`, when nothing is there.
pub fn check_plain(path: &Path, failed: &str) -> Result<u64> {
    let found = std::fs::metadata(path).map_err(|error| Error::io(failed, path, error))?;
    if found.is_file() {
        return Ok(found.len());
    }
    let what = if found.is_dir() { "a directory" } else { "a device or a pipe" };
    Err(Error::data(format!("{failed}: it is no plain file but {what}\n  --> {}", path.display())))
}

/// The content of a plain file.
///
/// # Errors
/// As [`check_plain`]; a data error when it is longer than two gibibytes.
pub fn read(path: &Path, failed: &str) -> Result<Vec<u8>> {
    let length = check_plain(path, failed)?;
    if length > MOST_BYTES {
        return Err(Error::data(format!(
            "{failed}: {length} bytes are more than the {MOST_BYTES} allowed\n  --> {}",
            path.display()
        )));
    }
    std::fs::read(path).map_err(|error| Error::io(failed, path, error))
}

/// The content of a plain file of text, without a byte order mark.
///
/// # Errors
/// As [`read`]; a data error when it is not UTF-8.
pub fn read_text(path: &Path, failed: &str) -> Result<String> {
    let text = String::from_utf8(read(path, failed)?)
        .map_err(|_| Error::data(format!("{failed}: it is not UTF-8 text\n  --> {}", path.display())))?;
    Ok(text.strip_prefix('\u{feff}').map(str::to_owned).unwrap_or(text))
}

/// Runs `work` where recursion as deep as a file of some ten thousand bytes can ask for does no harm.
///
/// # Errors
/// An unexpected error when the system gives no thread.
pub fn on_deep_stack<T: Send>(work: impl FnOnce() -> T + Send) -> Result<T> {
    /// Only what is used of it takes memory.
    const STACK: usize = 256 << 20;
    std::thread::scope(|scope| {
        let thread = std::thread::Builder::new()
            .stack_size(STACK)
            .spawn_scoped(scope, work)
            .map_err(|error| Error::Other(anyhow::anyhow!("cannot start a thread: {error}")))?;
        thread.join().map_err(|panic| std::panic::resume_unwind(panic))
    })
}

thread_local! {
    static GUARDED: Cell<bool> = const { Cell::new(false) };
}

/// What `work` gives; nothing if it panics, as decoders of third parties do on damaged files and drivers where they are
/// absent. Nothing is printed then.
pub fn guarded<T>(work: impl FnOnce() -> T) -> Option<T> {
    let before = GUARDED.replace(true);
    let result = catch_unwind(AssertUnwindSafe(work)).ok();
    GUARDED.set(before);
    result
}

/// Whether a panic of this thread is no defect of ours, and will be told as what it is.
pub fn is_guarded() -> bool {
    GUARDED.get()
}

/// For tests: where reference numbers and data lie, which this checkout may be without.
#[cfg(test)]
pub(crate) fn shared() -> Option<std::path::PathBuf> {
    let beside = Path::new(env!("CARGO_MANIFEST_DIR")).join("../shared");
    match std::env::var_os("SAFEMED_SHARED").map(std::path::PathBuf::from) {
        Some(named) => {
            // Tests that find nothing pass: a slip of the pen must not let all of them.
            assert!(named.is_dir(), "SAFEMED_SHARED names {}, which is no directory", named.display());
            Some(named)
        }
        None => Some(beside).filter(|dir| dir.is_dir()),
    }
}
