//! One measurement: a few steps of the real program on a model with few blocks, or on all of it, in a process of its own,
//! so that its peak of memory is its own.

use super::inference::{self, InferenceProbe};
use crate::backend::{peak_memory_bytes, restart_peak_memory};
use crate::error::{Error, Result};
use crate::model::truncate::Depths;
use crate::recipes::config::RunConfig;
use crate::recipes::fit::{Fit, Learner};
use crate::recipes::grpo::Assumed;
use crate::recipes::lesson::Lesson;
use crate::recipes::progress::Silent;
use crate::recipes::run::Stop;
use crate::recipes::train::{self, Course, Extent, Step};
use crate::recipes::validation::Exam;
use serde::{Deserialize, Serialize};
use std::collections::{BTreeMap, HashSet};
use std::io::{self, Read, Write};
use std::process::{Child, Command, Output, Stdio};
use std::thread::{self, ScopedJoinHandle};
use std::time::{Duration, Instant};

/// What was measured, by name: `seconds_…` and `…_bytes`. What the system does not tell is not there.
pub type Figures = BTreeMap<String, f64>;

/// The hidden command that children run.
pub const COMMAND: &str = "probe";

/// Steps that are timed at most, and at least where one takes less than [`LONG_STEP`] seconds.
const TIMED_STEPS: [usize; 2] = [3, 12];
const LONG_STEP: f64 = 10.0;

/// How often a measurement is looked after.
const LOOK: Duration = Duration::from_millis(20);

/// What a child is asked to measure.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub enum Probe {
    /// Steps of a training.
    Training(Box<TrainingProbe>),
    /// One work of a trained model.
    Inference(InferenceProbe),
}

/// Some steps of a training run.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct TrainingProbe {
    /// Its configuration; `model` is where the weights, or a stand-in, lie.
    pub config: RunConfig,
    /// Blocks of the model; none: all.
    pub depths: Option<Depths>,
    /// The step whose memory is wanted, first; not timed.
    pub heaviest: u64,
    /// Steps to time, with what each has to do as a share of a mean step.
    pub typical: Vec<(u64, f64)>,
    /// Seconds that timed steps may take together; the fewest steps are run all the same.
    pub seconds: f64,
    /// Whether sampled completions end where the model ends them.
    pub ends: bool,
    /// Seconds to decode an image, which belong to no step: taken off.
    pub seconds_per_image: f64,
    /// Whether the images of a timed step were shown before.
    pub repeats: bool,
}

impl Probe {
    /// Measures, in this process.
    ///
    /// # Errors
    /// Those of the work itself.
    pub fn measure(&self) -> Result<Figures> {
        match self {
            Self::Training(probe) => probe.measure(),
            Self::Inference(probe) => inference::measure(probe),
        }
    }

    /// The threads it may use; none: all.
    pub fn threads(&self) -> Option<usize> {
        match self {
            Self::Training(probe) => probe.config.threads,
            Self::Inference(probe) => probe.threads,
        }
    }

    /// Measures in a process of its own.
    ///
    /// # Errors
    /// As [`Probe::measure`]; an unexpected error when the process is killed.
    pub fn run(&self, stop: &Stop) -> Result<Figures> {
        stop.check()?;
        let failed = |what: &str, error: &dyn std::fmt::Display| {
            Error::Other(anyhow::anyhow!("a measurement {what}: {error}"))
        };
        let program = std::env::current_exe().map_err(|error| failed("cannot find this program", &error))?;
        let spec = serde_json::to_vec(self).map_err(anyhow::Error::from)?;
        let mut child = Command::new(program)
            .args([COMMAND, "--quiet"])
            .stdin(Stdio::piped())
            .stdout(Stdio::piped())
            .stderr(Stdio::piped())
            .spawn()
            .map_err(|error| failed("cannot start", &error))?;
        if let Some(mut input) = child.stdin.take() {
            // A child that ended already says why on its standard error.
            let _ = input.write_all(&spec);
        }
        let output = until_stopped(child, stop).map_err(|error| failed("cannot be read", &error))?;
        stop.check()?;
        let said = String::from_utf8_lossy(&output.stderr);
        let said = said.trim().trim_start_matches("error: ").to_owned();
        match output.status.code() {
            Some(0) => serde_json::from_slice(&output.stdout).map_err(|error| failed("says nothing", &error)),
            Some(2) => Err(Error::Usage(said)),
            Some(3) => Err(Error::Data(said)),
            Some(4) => Err(Error::NonFinite(said)),
            Some(_) => Err(failed("failed", &said)),
            None => Err(failed(
                "was killed",
                &"the system does this when memory runs out\n   = help: lower the batch, or set train.recompute=true",
            )),
        }
    }
}

/// What a child says, read to its end; it is killed when this process is asked to stop.
fn until_stopped(mut child: Child, stop: &Stop) -> io::Result<Output> {
    let (said, complained) = (child.stdout.take(), child.stderr.take());
    thread::scope(|scope| {
        let said = scope.spawn(|| read_all(said));
        let complained = scope.spawn(|| read_all(complained));
        let status = loop {
            if stop.requested() {
                // It may have ended by itself just now.
                let _ = child.kill();
            }
            match child.try_wait()? {
                Some(status) => break status,
                None => thread::sleep(LOOK),
            }
        };
        let join = |reader: ScopedJoinHandle<'_, io::Result<Vec<u8>>>| {
            reader.join().unwrap_or_else(|_| Err(io::Error::other("a reader panicked")))
        };
        Ok(Output { status, stdout: join(said)?, stderr: join(complained)? })
    })
}

fn read_all(pipe: Option<impl Read>) -> io::Result<Vec<u8>> {
    let mut bytes = Vec::new();
    match pipe {
        Some(mut pipe) => pipe.read_to_end(&mut bytes).map(|_| bytes),
        None => Ok(bytes),
    }
}

/// Notes `name` where the system tells the peak.
pub(super) fn note_peak(figures: &mut Figures, name: &str, beside: usize) {
    if let Some(bytes) = peak_memory_bytes() {
        figures.insert(name.to_owned(), bytes as f64 - beside as f64);
    }
}

impl TrainingProbe {
    fn measure(&self) -> Result<Figures> {
        let started = Instant::now();
        let mut figures = Figures::new();
        let material = train::material(&self.config, Extent::Steps(self.depths), &Stop::default(), &Silent)?;
        figures.insert("seconds_load".to_owned(), started.elapsed().as_secs_f64());
        note_peak(&mut figures, "load_peak_bytes", 0);
        let mut rehearsal = Rehearsal { probe: self, figures };
        train::follow(material, &self.config, &mut rehearsal, &Silent)?;
        let mut figures = rehearsal.figures;
        figures.insert("seconds_probe".to_owned(), started.elapsed().as_secs_f64());
        Ok(figures)
    }
}

/// A few steps of a training, and one checkpoint.
struct Rehearsal<'a> {
    probe: &'a TrainingProbe,
    figures: Figures,
}

impl Course for Rehearsal<'_> {
    type Output = ();

    fn run<L: Learner>(
        &mut self,
        lesson: &Lesson<'_>,
        mut fit: Fit<L>,
        step: Step<'_, L>,
        _: Option<&Exam<'_>>,
    ) -> Result<()> {
        let Self { probe, figures } = self;
        let trained: usize = fit.learner.trained().iter().map(|(_, var)| var.as_tensor().elem_count()).sum();
        figures.insert("trained".to_owned(), trained as f64);
        let remembers = lesson.features.is_some();
        figures.insert("remembers_features".to_owned(), f64::from(u8::from(remembers)));
        let is_known = probe.repeats && remembers;
        restart_peak_memory();
        let mut seen: HashSet<usize> = lesson.picked(probe.heaviest).into_iter().collect();
        let started = Instant::now();
        fit.step = probe.heaviest;
        let longest = !probe.ends;
        let report = step(&mut fit, Assumed { longest, all_groups: true })?;
        note(figures, &report.metrics, "completions/max_length", "completion_longest");
        figures.insert("seconds_first_step".to_owned(), started.elapsed().as_secs_f64());
        let fewest = if started.elapsed().as_secs_f64() < LONG_STEP { TIMED_STEPS[0] } else { 1 };
        let started = Instant::now();
        let (mut rates, mut lengths, mut updated) = (Vec::new(), Vec::new(), Vec::new());
        for &(at, share) in probe.typical.iter().take(TIMED_STEPS[1]) {
            if rates.len() >= fewest && started.elapsed().as_secs_f64() > probe.seconds {
                break;
            }
            let fresh = lesson.picked(at).into_iter().filter(|&index| seen.insert(index)).count();
            fit.step = at;
            if is_known {
                step(&mut fit, Assumed { longest, all_groups: longest })?;
            }
            let step_started = Instant::now();
            let report = step(&mut fit, Assumed { longest, all_groups: longest })?;
            let seconds = step_started.elapsed().as_secs_f64();
            let decoding = if is_known { 0.0 } else { fresh as f64 * probe.seconds_per_image };
            rates.push((seconds - decoding).max(0.0) / share);
            lengths.extend(report.metrics.get("completions/mean_length").and_then(serde_json::Value::as_f64));
            updated.extend(report.metrics.get("groups_updated").and_then(serde_json::Value::as_f64));
        }
        note_peak(figures, "step_peak_bytes", lesson.images.kept_bytes());
        if !rates.is_empty() {
            // Steps whose samples end by themselves differ; of equal ones, the middle one was disturbed least.
            let seconds = if probe.ends && !lengths.is_empty() { mean(&rates) } else { median(&mut rates) };
            figures.insert("seconds_per_step".to_owned(), seconds);
        }
        if !lengths.is_empty() {
            figures.insert("completion_mean".to_owned(), mean(&lengths));
            figures.insert("groups_updated".to_owned(), mean(&updated) / lesson.config.batch_size as f64);
        }
        let root = tempfile::tempdir().map_err(anyhow::Error::from)?;
        restart_peak_memory();
        let started = Instant::now();
        fit.save(root.path())?;
        figures.insert("seconds_per_checkpoint".to_owned(), started.elapsed().as_secs_f64());
        note_peak(figures, "save_peak_bytes", lesson.images.kept_bytes());
        Ok(())
    }
}

fn note(
    figures: &mut Figures,
    metrics: &serde_json::Map<String, serde_json::Value>,
    metric: &str,
    name: &str,
) {
    if let Some(value) = metrics.get(metric).and_then(serde_json::Value::as_f64) {
        figures.insert(name.to_owned(), value);
    }
}

pub(super) fn mean(values: &[f64]) -> f64 {
    values.iter().sum::<f64>() / values.len() as f64
}

pub(super) fn median(values: &mut [f64]) -> f64 {
    values.sort_by(f64::total_cmp);
    let middle = values.len() / 2;
    if values.len() % 2 == 1 { values[middle] } else { f64::midpoint(values[middle - 1], values[middle]) }
}
