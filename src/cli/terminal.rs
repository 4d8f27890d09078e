//! What people see: bars, plain progress lines, tables, errors. The only file that writes to the terminal.
//!
//! Data goes to standard output, everything else to standard error. A closed pipe is an error of its own kind, whose
//! status is 0.

use crate::error::{Error, Result};
use crate::recipes::progress::Progress;
use indicatif::{BinaryBytes, ProgressBar, ProgressStyle};
use std::io::{IsTerminal as _, Write as _};
use std::path::Path;
use std::sync::{Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

/// Seconds between two plain progress lines.
const PLAIN_EVERY: Duration = Duration::from_secs(10);

/// Writes to standard output.
///
/// # Errors
/// [`Error::Io`]; when the reader closed the pipe, one whose status is 0.
pub(super) fn print(text: &str) -> Result<()> {
    let mut out = std::io::stdout().lock();
    out.write_all(text.as_bytes())
        .and_then(|()| out.flush())
        .map_err(|error| Error::io("cannot write", Path::new("standard output"), error))
}

/// Writes an error, or whatever must not be lost, to standard error.
pub(super) fn print_error(error: &Error) {
    say(&format!("error: {error}"));
}

/// How much is shown.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Loudness {
    /// Errors only.
    Quiet,
    /// A bar on a terminal, a line now and then elsewhere.
    Normal,
    /// Lines only, between the log's.
    Verbose,
}

/// A value that the threads of a recipe take turns with.
#[derive(Debug)]
struct Shared<T>(Mutex<T>);

impl<T> Shared<T> {
    fn new(value: T) -> Self {
        Self(Mutex::new(value))
    }

    fn lock(&self) -> MutexGuard<'_, T> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn get(&self) -> T
    where
        T: Copy,
    {
        *self.lock()
    }

    fn set(&self, value: T) {
        *self.lock() = value;
    }
}

/// Progress on standard error; rows on standard output unless that is reserved for JSON.
#[derive(Debug)]
pub(super) struct Terminal {
    loudness: Loudness,
    rows_on_stdout: bool,
    bar: Shared<Option<ProgressBar>>,
    phase: Shared<String>,
    total: Shared<usize>,
    /// How much of the phase was done when it began.
    begun: Shared<usize>,
    /// Whether the phase is counted in bytes.
    in_bytes: Shared<bool>,
    started: Shared<Instant>,
    last_line: Shared<Instant>,
    last_done: Shared<usize>,
    widths: Shared<Vec<usize>>,
    /// A failed write to standard output, reported when the recipe is done.
    broken: Shared<Option<Error>>,
}

impl Terminal {
    pub(super) fn new(loudness: Loudness, json: bool) -> Self {
        let now = Instant::now();
        Self {
            loudness,
            rows_on_stdout: !json,
            bar: Shared::new(None),
            phase: Shared::new(String::new()),
            total: Shared::new(0),
            begun: Shared::new(0),
            in_bytes: Shared::new(false),
            started: Shared::new(now),
            last_line: Shared::new(now),
            last_done: Shared::new(0),
            widths: Shared::new(Vec::new()),
            broken: Shared::new(None),
        }
    }

    /// The first failure to write a row, if any.
    pub(super) fn take_error(&self) -> Option<Error> {
        self.broken.lock().take()
    }

    fn line(&self, text: &str) {
        match &*self.bar.lock() {
            Some(bar) => bar.suspend(|| say(text)),
            None => say(text),
        }
    }

    fn plain(&self, done: usize, figures: &str) {
        let total = self.total.get();
        let seconds = self.started.get().elapsed().as_secs_f64();
        let rate = done.saturating_sub(self.begun.get()) as f64 / seconds.max(1e-9);
        let eta = clock((total.saturating_sub(done)) as f64 / rate.max(1e-9));
        let phase = self.phase.lock();
        if self.in_bytes.get() {
            let [done, total, rate] = [done as u64, total as u64, rate as u64].map(BinaryBytes);
            self.line(&format!("{phase}: {done}/{total}, {rate}/s, eta {eta}"));
            return;
        }
        let pace = if done <= self.begun.get() { String::new() } else { format!(", {rate:.2}/s, eta {eta}") };
        self.line(&format!("{phase}: {done}/{total}{pace}{figures}"));
    }

    /// Begins a phase of which `done` are done already; on a terminal with a bar of the form `template`.
    fn begin(&self, what: &str, total: usize, done: usize, template: &str) {
        self.finish();
        let now = Instant::now();
        self.started.set(now);
        self.last_line.set(now);
        self.last_done.set(done);
        self.total.set(total);
        self.begun.set(done);
        what.clone_into(&mut self.phase.lock());
        if self.loudness == Loudness::Normal && std::io::stderr().is_terminal() {
            let bar = ProgressBar::new(total as u64).with_position(done as u64);
            if let Ok(style) = ProgressStyle::with_template(template) {
                bar.set_style(style.progress_chars("━╸─"));
            }
            // The pace is that of this process.
            bar.reset_eta();
            bar.set_prefix(what.to_owned());
            bar.enable_steady_tick(Duration::from_millis(250));
            *self.bar.lock() = Some(bar);
        }
    }
}

/// A line on standard error. Whoever closed it does not want to read it: the work goes on.
fn say(text: &str) {
    let _ = writeln!(std::io::stderr(), "{text}");
}

/// `h:mm:ss`, or `m:ss` below an hour.
fn clock(seconds: f64) -> String {
    let seconds = seconds.clamp(0.0, 1e8).round() as u64;
    let (hours, minutes, rest) = (seconds / 3600, seconds / 60 % 60, seconds % 60);
    if hours > 0 { format!("{hours}:{minutes:02}:{rest:02}") } else { format!("{minutes}:{rest:02}") }
}

/// `, accuracy 0.930, loss 1.20e-4`.
fn figures_text(figures: &[(&str, f64)]) -> String {
    figures
        .iter()
        .map(|(name, value)| {
            if *value != 0.0 && value.abs() < 1e-3 {
                format!(", {name} {value:.2e}")
            } else {
                format!(", {name} {value:.3}")
            }
        })
        .collect()
}

impl Progress for Terminal {
    fn start(&self, total: usize, done: usize, what: &str) {
        self.in_bytes.set(false);
        let template =
            "{prefix:<22} {bar:24.cyan/black.bright} {pos}/{len} {per_sec:.dim} eta {eta:.dim}{msg}";
        self.begin(what, total, done, template);
        if self.bar.lock().is_none() && self.loudness != Loudness::Quiet {
            self.plain(done, "");
        }
    }

    /// Without a terminal only what takes long is worth a line.
    fn start_transfer(&self, file: &str, total: u64, done: u64) {
        self.in_bytes.set(true);
        let template = "{prefix:<34} {bar:24.cyan/black.bright} {binary_bytes}/{binary_total_bytes} \
            {binary_bytes_per_sec:.dim} eta {eta:.dim}";
        self.begin(file, total as usize, done as usize, template);
    }

    fn tick(&self, done: usize, figures: &[(&str, f64)]) {
        self.last_done.set(done);
        if let Some(bar) = &*self.bar.lock() {
            bar.set_message(figures_text(figures));
            bar.set_position(done as u64);
            return;
        }
        let is_last = done >= self.total.get() && !self.in_bytes.get();
        let is_due = self.last_line.get().elapsed() >= PLAIN_EVERY || is_last;
        if self.loudness != Loudness::Quiet && is_due {
            self.last_line.set(Instant::now());
            self.plain(done, &figures_text(figures));
        }
    }

    fn finish(&self) {
        if let Some(bar) = self.bar.lock().take() {
            bar.finish_and_clear();
        }
    }

    fn note(&self, text: &str) {
        if self.loudness != Loudness::Quiet {
            self.line(&format!("note: {text}"));
        }
    }

    fn row(&self, cells: &[String]) {
        let mut widths = self.widths.lock();
        if widths.len() != cells.len() {
            *widths = cells
                .iter()
                .enumerate()
                .map(|(i, c)| c.chars().count().max(if i == 0 { 16 } else { 8 }))
                .collect();
        }
        let line = cells
            .iter()
            .zip(widths.iter())
            .enumerate()
            .map(
                |(i, (cell, width))| {
                    if i == 0 { format!("{cell:<width$}") } else { format!("{cell:>width$}") }
                },
            )
            .collect::<Vec<_>>()
            .join("  ");
        let line = line.trim_end();
        if !self.rows_on_stdout {
            if self.loudness != Loudness::Quiet {
                self.line(line);
            }
            return;
        }
        let write = || {
            if let Err(error) = print(&format!("{line}\n")) {
                self.broken.lock().get_or_insert(error);
            }
        };
        match &*self.bar.lock() {
            Some(bar) => bar.suspend(write),
            None => write(),
        }
    }
}

impl Drop for Terminal {
    fn drop(&mut self) {
        self.finish();
    }
}

/// Sends the log to standard error: warnings, with `-v` information, with `-vv` details; `SAFEMED_LOG` overrides.
pub(super) fn start_log(verbosity: u8, quiet: bool) {
    let level = match (quiet, verbosity) {
        (true, _) => "error",
        (false, 0) => "warn",
        (false, 1) => "info",
        (false, _) => "debug",
    };
    let filter = std::env::var("SAFEMED_LOG").unwrap_or_else(|_| format!("warn,safemed={level}"));
    // A log that was set up before, by a caller of this library, stays.
    let _ = tracing_subscriber::fmt()
        .with_env_filter(tracing_subscriber::EnvFilter::new(filter))
        .with_writer(std::io::stderr)
        .with_ansi(std::io::stderr().is_terminal())
        .with_target(false)
        .try_init();
}

/// A panic is a defect of ours: one line, no trace, and the process ends with status 1.
pub(super) fn install_panic_hook() {
    std::panic::set_hook(Box::new(|panic| {
        if crate::files::is_guarded() {
            return;
        }
        let payload = panic.payload();
        let message = payload
            .downcast_ref::<&str>()
            .map(|text| (*text).to_owned())
            .or_else(|| payload.downcast_ref::<String>().cloned())
            .unwrap_or_default();
        let place = panic.location().map_or_else(String::new, |at| format!(" ({}:{})", at.file(), at.line()));
        let message = message.replace('\n', "; ");
        // Standard error may be closed too; there is nobody left to tell.
        let _ = writeln!(std::io::stderr(), "error: a defect of safemed: {message}{place}");
    }));
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn times_and_figures_are_short() {
        assert_eq!(clock(59.6), "1:00");
        assert_eq!(clock(3723.0), "1:02:03");
        assert_eq!(clock(f64::INFINITY), "27777:46:40");
        assert_eq!(
            figures_text(&[("accuracy", 0.9301), ("kl", 1.2e-5), ("loss", 0.0)]),
            ", accuracy 0.930, kl 1.20e-5, loss 0.000"
        );
    }
}
