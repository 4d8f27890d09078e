//! One measurement: a few steps of the real program on a model with few blocks, or on all of it, in a process of its own,
//! so that its peak of memory is its own.

use super::exam::ExamProbe;
use super::inference::{self, InferenceProbe};
use crate::backend::{peak_memory_bytes, restart_peak_memory};
use crate::error::{self, Error, Result};
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
use std::collections::{BTreeMap, BTreeSet, HashSet};
use std::io::{self, Read, Write};
use std::path::PathBuf;
use std::process::{Child, Command, ExitStatus, Output, Stdio};
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
    /// A batch of an examination, where there are any.
    pub exam: Option<ExamProbe>,
    /// Image files that cannot be read.
    pub damaged: BTreeSet<PathBuf>,
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

    /// Measures in a process of its own; gives none where that process ran out of memory.
    ///
    /// # Errors
    /// As [`Probe::measure`]; an unexpected error when the process is killed for another reason.
    pub fn run(&self, stop: &Stop) -> Result<Option<Figures>> {
        stop.check()?;
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
        figures_of(&output)
    }
}

fn failed(what: &str, error: &dyn std::fmt::Display) -> Error {
    Error::Other(anyhow::anyhow!("a measurement {what}: {error}"))
}

/// What a child that ended has measured; none where it ran out of memory.
fn figures_of(output: &Output) -> Result<Option<Figures>> {
    let said = String::from_utf8_lossy(&output.stderr);
    let said = said.trim().trim_start_matches("error: ").to_owned();
    if ran_out_of_memory(output.status, &said) {
        return Ok(None);
    }
    match output.status.code() {
        Some(0) => {
            serde_json::from_slice(&output.stdout).map(Some).map_err(|error| failed("says nothing", &error))
        }
        Some(2) => Err(Error::Usage(said)),
        Some(3) => Err(Error::Data(said)),
        Some(4) => Err(Error::NonFinite(said)),
        Some(_) => Err(failed("failed", &said)),
        None => Err(failed("was killed", &output.status)),
    }
}

/// Whether a child ended as one does for which there is no memory: killed by the system, aborted by its allocator, or with the
/// words of a GPU's driver.
fn ran_out_of_memory(status: ExitStatus, said: &str) -> bool {
    let said = said.to_lowercase();
    let says_so =
        ["out of memory", "out_of_memory", "memory allocation of"].iter().any(|words| said.contains(words));
    match status.code() {
        Some(code) => says_so && code == error::ExitStatus::Unexpected as i32,
        None => says_so || is_killed(status),
    }
}

/// Whether a process was killed without a chance to say anything.
#[cfg(unix)]
fn is_killed(status: ExitStatus) -> bool {
    use std::os::unix::process::ExitStatusExt as _;
    status.signal() == Some(signal_hook::consts::SIGKILL)
}

#[cfg(not(unix))]
fn is_killed(_: ExitStatus) -> bool {
    false
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

/// Notes `name` where the system tells the peak, which is that of the memory beside the processor: what a GPU holds is not in it.
pub(super) fn note_peak(figures: &mut Figures, name: &str, beside: usize, is_cpu: bool) {
    if let Some(bytes) = peak_memory_bytes().filter(|_| is_cpu) {
        figures.insert(name.to_owned(), bytes as f64 - beside as f64);
    }
}

impl TrainingProbe {
    fn measure(&self) -> Result<Figures> {
        let started = Instant::now();
        let mut figures = Figures::new();
        let is_cpu = self.config.backend().device()?.is_cpu();
        let extent = Extent::Steps(self.depths, &self.damaged);
        let material = train::material(&self.config, extent, &Stop::default(), &Silent)?;
        figures.insert("seconds_load".to_owned(), started.elapsed().as_secs_f64());
        note_peak(&mut figures, "load_peak_bytes", 0, is_cpu);
        let mut rehearsal = Rehearsal { probe: self, figures, is_cpu };
        train::follow(material, &self.config, &mut rehearsal, &Silent)?;
        let mut figures = rehearsal.figures;
        figures.insert("seconds_probe".to_owned(), started.elapsed().as_secs_f64());
        Ok(figures)
    }
}

/// A few steps of a training, one checkpoint, and a batch of an examination.
struct Rehearsal<'a> {
    probe: &'a TrainingProbe,
    figures: Figures,
    /// Whether it runs on the processor.
    is_cpu: bool,
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
        let Self { probe, figures, is_cpu } = self;
        let is_cpu = *is_cpu;
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
        note_peak(figures, "step_peak_bytes", lesson.images.kept_bytes(), is_cpu);
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
        note_peak(figures, "save_peak_bytes", lesson.images.kept_bytes(), is_cpu);
        if let (Some(exam), Some(assistant)) = (&probe.exam, fit.learner.assistant()) {
            exam.measure(assistant, figures, lesson.images.kept_bytes(), is_cpu)?;
        }
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

#[cfg(all(test, unix))]
mod tests {
    use super::*;
    use std::os::unix::process::ExitStatusExt as _;

    #[test]
    fn a_child_without_memory_measured_nothing_and_any_other_end_is_an_error() {
        // As the system encodes how a process ended: a signal, or 256 times a status.
        let ended = |status: i32, said: &str| {
            let stdout = br#"{"seconds_load":2.5}"#.to_vec();
            figures_of(&Output { status: ExitStatus::from_raw(status), stdout, stderr: said.into() })
        };
        assert_eq!(ended(0, "").unwrap().unwrap()["seconds_load"], 2.5);
        for (status, said) in [
            (9, ""),
            (6, "memory allocation of 17179869184 bytes failed"),
            (1 << 8, "error: DriverError(CUDA_ERROR_OUT_OF_MEMORY, \"out of memory\")"),
        ] {
            assert_eq!(ended(status, said).unwrap(), None, "{status} {said}");
        }
        for (status, said, words) in [
            (11, "", "was killed"),
            (6, "thread 'main' has overflowed its stack", "was killed"),
            (1 << 8, "error: a defect", "a measurement failed: a defect"),
            (3 << 8, "error: the image cannot be decoded: out of memory", "the image cannot be decoded"),
        ] {
            let error = ended(status, said).unwrap_err().to_string();
            assert!(error.contains(words), "{status} {said}: {error}");
        }
    }

    #[test]
    fn memory_is_noted_on_the_processor_alone() {
        let mut figures = Figures::new();
        note_peak(&mut figures, "peak", 0, false);
        assert_eq!(figures, Figures::new());
        note_peak(&mut figures, "peak", 0, true);
        assert_eq!(figures.contains_key("peak"), peak_memory_bytes().is_some());
    }
}
