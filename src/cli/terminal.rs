//! What people see: bars, plain progress lines, tables, errors. The only file that writes to the terminal.
//!
//! Data goes to standard output, everything else to standard error. A closed pipe is an error of its own kind, whose
//! status is 0.

use crate::error::{Error, Result};
use crate::recipes::progress::Progress;
use indicatif::{BinaryBytes, ProgressBar, ProgressState, ProgressStyle};
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
    /// How fast the last step went, in words.
    speed: Shared<Vec<String>>,
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
            speed: Shared::new(Vec::new()),
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

    fn plain(&self, done: usize, figures: &[String]) {
        let total = self.total.get();
        let elapsed = self.started.get().elapsed();
        let Pace { rate, left } = Pace::of(self.begun.get(), done as u64, Some(total as u64), elapsed);
        let eta = left.map_or_else(|| "-".to_owned(), clock);
        let phase = self.phase.lock();
        if self.in_bytes.get() {
            let [done, total, rate] = [done as u64, total as u64, rate as u64].map(BinaryBytes);
            self.line(&format!("{phase}: {done}/{total}, {rate}/s, eta {eta}"));
            return;
        }
        let mut parts = vec![format!("{done}/{total}")];
        if done > self.begun.get() {
            parts.extend([pace_text(rate), format!("eta {eta}")]);
        }
        parts.extend_from_slice(figures);
        self.line(&format!("{phase}: {}", parts.join(", ")));
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
        self.speed.lock().clear();
        what.clone_into(&mut self.phase.lock());
        if self.loudness == Loudness::Normal && std::io::stderr().is_terminal() {
            let bar = ProgressBar::new(total as u64).with_position(done as u64);
            if let Ok(style) = ProgressStyle::with_template(template) {
                // The pace is that of this phase in this process: what was done before took it no time.
                let of =
                    move |state: &ProgressState| Pace::of(done, state.pos(), state.len(), state.elapsed());
                let pace = move |state: &ProgressState, text: &mut dyn std::fmt::Write| {
                    let _ = text.write_str(&pace_text(of(state).rate));
                };
                let byte_pace = move |state: &ProgressState, text: &mut dyn std::fmt::Write| {
                    let _ = write!(text, "{}/s", BinaryBytes(of(state).rate as u64));
                };
                let left = move |state: &ProgressState, text: &mut dyn std::fmt::Write| {
                    let _ = text.write_str(&of(state).left.map_or_else(|| "-".to_owned(), clock));
                };
                let style = style.with_key("pace", pace).with_key("byte_pace", byte_pace);
                bar.set_style(style.with_key("left", left).progress_chars("━╸─"));
            }
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

/// How fast a phase goes.
#[derive(Debug, Clone, Copy, PartialEq)]
struct Pace {
    /// Units a second, of those that this phase has done itself.
    rate: f64,
    /// Seconds that the rest takes; none as long as nothing is known.
    left: Option<f64>,
}

impl Pace {
    /// After `elapsed` of a phase that began with `begun` units done, when `done` of `total` are.
    fn of(begun: usize, done: u64, total: Option<u64>, elapsed: Duration) -> Self {
        let rate = done.saturating_sub(begun as u64) as f64 / elapsed.as_secs_f64().max(1e-9);
        let rest = total.map(|total| total.saturating_sub(done) as f64);
        Self { rate, left: rest.filter(|_| rate > 0.0).map(|rest| rest / rate) }
    }
}

/// `h:mm:ss`, or `m:ss` below an hour.
fn clock(seconds: f64) -> String {
    let seconds = seconds.clamp(0.0, 1e8).round() as u64;
    let (hours, minutes, rest) = (seconds / 3600, seconds / 60 % 60, seconds % 60);
    if hours > 0 { format!("{hours}:{minutes:02}:{rest:02}") } else { format!("{minutes}:{rest:02}") }
}

/// `accuracy 0.930`, `loss 1.20e-4`.
fn figure_texts(figures: &[(&str, f64)]) -> Vec<String> {
    figures
        .iter()
        .map(|(name, value)| {
            if *value != 0.0 && value.abs() < 1e-3 {
                format!("{name} {value:.2e}")
            } else {
                format!("{name} {value:.3}")
            }
        })
        .collect()
}

/// How many a second, or how long one takes where that says more.
fn pace_text(rate: f64) -> String {
    match rate {
        rate if rate >= 1.0 => format!("{rate:.1}/s"),
        rate if rate > 1.0 / 60.0 => format!("{:.1} s each", 1.0 / rate),
        rate if rate > 0.0 => format!("{} each", clock(1.0 / rate)),
        _ => "-/s".to_owned(),
    }
}

/// `820 tokens/s`, then the share of each phase in the step.
fn speed_texts(tokens_per_second: f64, phases: &[(&str, f64)]) -> Vec<String> {
    let mut texts = Vec::new();
    if tokens_per_second.is_finite() && tokens_per_second > 0.0 {
        texts.push(format!("{tokens_per_second:.0} tokens/s"));
    }
    let all: f64 = phases.iter().map(|(_, seconds)| seconds).sum();
    let shares = phases.iter().filter(|_| all > 0.0).map(|(name, seconds)| (name, 100.0 * seconds / all));
    texts.extend(
        shares.filter(|(_, share)| *share >= 0.5).map(|(name, share)| format!("{name} {share:.0} %")),
    );
    texts
}

/// Columns that a terminal has at least.
const COLUMNS: usize = 80;

/// Texts on indented lines of their own, as many on one as have room.
fn lines_of(texts: &[String]) -> String {
    let mut lines = String::new();
    let mut column = COLUMNS;
    for text in texts {
        let width = 2 + text.chars().count();
        if column + width >= COLUMNS {
            lines.push('\n');
            column = 0;
        }
        lines.push_str("  ");
        lines.push_str(text);
        column += width;
    }
    lines
}

impl Progress for Terminal {
    fn start(&self, total: usize, done: usize, what: &str) {
        self.in_bytes.set(false);
        let template = "{prefix} {wide_bar:.cyan/black.bright} {pos}/{len} {pace:.dim} eta {left:.dim}{msg}";
        self.begin(what, total, done, template);
        if self.bar.lock().is_none() && self.loudness != Loudness::Quiet {
            self.plain(done, &[]);
        }
    }

    /// Without a terminal only what takes long is worth a line.
    fn start_transfer(&self, file: &str, total: u64, done: u64) {
        self.in_bytes.set(true);
        let template = "{prefix:<34} {bar:24.cyan/black.bright} {binary_bytes}/{binary_total_bytes} \
            {byte_pace:.dim} eta {left:.dim}";
        self.begin(file, total as usize, done as usize, template);
    }

    fn tick(&self, done: usize, figures: &[(&str, f64)]) {
        self.last_done.set(done);
        if let Some(bar) = &*self.bar.lock() {
            // What was measured, then how fast, each beginning a line.
            bar.set_message(lines_of(&figure_texts(figures)) + &lines_of(&self.speed.lock()));
            bar.set_position(done as u64);
            return;
        }
        let is_last = done >= self.total.get() && !self.in_bytes.get();
        let is_due = self.last_line.get().elapsed() >= PLAIN_EVERY || is_last;
        if self.loudness != Loudness::Quiet && is_due {
            self.last_line.set(Instant::now());
            self.plain(done, &[figure_texts(figures), self.speed.lock().clone()].concat());
        }
    }

    fn pace(&self, tokens_per_second: f64, phases: &[(&str, f64)]) {
        *self.speed.lock() = speed_texts(tokens_per_second, phases);
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
            figure_texts(&[("accuracy", 0.9301), ("kl", 1.2e-5), ("loss", 0.0)]),
            ["accuracy 0.930", "kl 1.20e-5", "loss 0.000"]
        );
        assert_eq!([12.34, 0.4, 0.01, 0.0].map(pace_text), ["12.3/s", "2.5 s each", "1:40 each", "-/s"]);
    }

    #[test]
    fn what_was_done_before_a_phase_is_no_speed_of_it() {
        let pace = |done| Pace::of(18, done, Some(40), Duration::from_secs(4));
        assert_eq!(pace(18), Pace { rate: 0.0, left: None });
        assert_eq!(pace(20), Pace { rate: 0.5, left: Some(40.0) });
        assert_eq!(pace(40), Pace { rate: 5.5, left: Some(0.0) });
        assert_eq!(Pace::of(0, 8, None, Duration::from_secs(4)), Pace { rate: 2.0, left: None });
    }

    #[test]
    fn a_steps_speed_is_told_in_shares_of_its_phases() {
        let phases = [("attack", 3.0), ("rollout", 0.99), ("update", 0.01)];
        assert_eq!(speed_texts(819.7, &phases), ["820 tokens/s", "attack 75 %", "rollout 25 %"]);
        assert_eq!(speed_texts(f64::NAN, &[("update", 0.0)]), Vec::<String>::new());
    }

    #[test]
    fn what_stands_below_a_bar_fits_a_narrow_terminal_and_loses_nothing() {
        let texts: Vec<String> = (0..9).map(|number| format!("figure {number} 0.12345")).collect();
        let lines = lines_of(&texts);
        assert!(lines.starts_with("\n  figure 0"));
        assert!(lines.lines().all(|line| line.chars().count() < COLUMNS), "{lines}");
        assert_eq!(lines.lines().skip(1).count(), 3);
        assert!(texts.iter().all(|text| lines.contains(text.as_str())));
        assert_eq!(lines_of(&[]), "");
    }
}
