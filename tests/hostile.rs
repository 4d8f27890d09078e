//! Files of strangers: whatever their bytes are, a reader gives a value or one clear error.
//!
//! Every property damages sound files (bits, lengths, keys, numbers, nesting) and feeds plain noise. A reader may not
//! panic, overflow a stack of 2 MiB, hold much more memory than the file is long, take long, or blame the program. The
//! cases are the same at every run; `PROPTEST_CASES` asks for more of them, `PROPTEST_RNG_SEED` for others.

/// LoRA adapters.
mod adapters;
/// Counting memory.
mod allocator;
/// `config.json`, tokenizer, chat template and image processor.
mod checkpoint_files;
/// Ways to damage bytes and JSON.
mod damage;
/// Questions, certificates, configurations, run directories and reference numbers.
mod data_files;
/// DICOM files.
mod dicom;
/// Picture files.
mod images;
/// safetensors files and the index of their shards.
mod tensors;

use proptest::strategy::Strategy;
use proptest::test_runner::{Config, RngSeed, TestError, TestRunner};
use safemed::error::{Error, ExitStatus, Result};
use std::fmt::Debug;
use std::time::{Duration, Instant};

/// The stack of a rayon worker, and of Rust's own threads.
const STACK: usize = 2 << 20;
/// What one file never takes, unless reading it grows with more than its size: no measure of speed.
const FOREVER: Duration = Duration::from_secs(60);

/// What a reader may hold at once for a file of `bytes`, unless its format promises pixels.
pub(super) fn memory_for(bytes: usize) -> usize {
    (64 << 20) + 64 * bytes
}

/// Runs `property` on `cases` values (or as many as `PROPTEST_CASES` says) on a thread with a small stack.
pub(super) fn for_all<S>(cases: u32, strategy: &S, property: impl Fn(S::Value) + Sync)
where
    S: Strategy + Sync,
    S::Value: Debug + Clone,
{
    // `Config::default` reads the environment.
    let asked = std::env::var_os("PROPTEST_CASES").is_some();
    let mut config = Config { failure_persistence: None, max_shrink_time: 20_000, ..Config::default() };
    if !asked {
        config.cases = cases;
    }
    if config.rng_seed == RngSeed::Random {
        config.rng_seed = RngSeed::Fixed(0x5afe);
    }
    on_small_stack(|| {
        let mut runner = TestRunner::new(config);
        match runner.run(strategy, |value| {
            property(value);
            Ok(())
        }) {
            Ok(()) => {}
            Err(TestError::Fail(why, value)) => panic!("{why}\nthe smallest such input: {value:?}"),
            Err(TestError::Abort(why)) => panic!("{why}"),
        }
    });
}

/// Runs `work` where deep recursion shows.
pub(super) fn on_small_stack<T: Send>(work: impl FnOnce() -> T + Send) -> T {
    std::thread::scope(|scope| {
        let name = std::thread::current().name().unwrap_or("hostile").to_owned();
        let thread =
            std::thread::Builder::new().name(name).stack_size(STACK).spawn_scoped(scope, work).unwrap();
        match thread.join() {
            Ok(value) => value,
            Err(panic) => std::panic::resume_unwind(panic),
        }
    })
}

/// Checks what `read` does with a file, and gives what it read: memory, time and, if it refuses, the error.
pub(super) fn survive<T>(most_memory: usize, read: impl FnOnce() -> Result<T>) -> Option<T> {
    let began = Instant::now();
    let (result, peak) = allocator::peak_of(read);
    assert!(peak <= most_memory, "{peak} bytes held, {most_memory} allowed");
    assert!(began.elapsed() < FOREVER, "took {:?}", began.elapsed());
    match result {
        Ok(value) => Some(value),
        Err(error) => {
            check(&error);
            None
        }
    }
}

/// An error that tells the user what is wrong with the file.
pub(super) fn check(error: &Error) {
    let text = error.to_string();
    assert!(!text.trim().is_empty(), "an empty message: {error:?}");
    assert!(
        matches!(error.status(), ExitStatus::Usage | ExitStatus::Data | ExitStatus::NonFinite),
        "status {:?}: {text}",
        error.status()
    );
}

/// The message of a file that must be refused.
pub(super) fn refusal<T>(most_memory: usize, read: impl FnOnce() -> Result<T>) -> String {
    let mut message = None;
    survive(most_memory, || {
        let result = read();
        message = result.as_ref().err().map(ToString::to_string);
        result
    });
    message.expect("such a file must be refused")
}
