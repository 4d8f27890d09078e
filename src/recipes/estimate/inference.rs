//! What a trained model costs: loading, prefill, decoding, an attack, certification, each measured by itself.

use super::probe::{Figures, Probe, median, note_peak};
use super::subject::Subject;
use super::{Options, measure_model, render};
use crate::attack::{AttackConfig, Fraction, PgdOutput, Problem, pgd};
use crate::backend::{Backend, restart_peak_memory};
use crate::certify::count_draws;
use crate::data::prompt::PromptTemplate;
use crate::error::Result;
use crate::model::assistant::Assistant;
use crate::model::generate::Prompt;
use crate::model::loader::Adaptation;
use crate::model::sampling::Decoding;
use crate::model::truncate::{Depths, count_parameters};
use crate::nn::recompute::Memory;
use crate::pixels::{RgbImage8, decode};
use crate::recipes::config::{ArithmeticName, Dtype};
use crate::recipes::job::Outcome;
use crate::recipes::progress::{Progress, Silent};
use crate::recipes::run::Stop;
use crate::roles::classifier::{QuestionClassifier, Reading};
use crate::roles::policy::{self, Scoring};
use crate::roles::target::{Aim, Target};
use candle_core::Tensor;
use serde::{Deserialize, Serialize};
use serde_json::{Value, json};
use std::path::PathBuf;
use std::time::Instant;

const QUESTION: &str = "Which of the following findings does this image show?\nA) pleural effusion\nB) pneumonia\n\
    C) pneumothorax\nD) no abnormality\nAnswer with the letter.";
const LETTERS: [&str; 4] = ["A", "B", "C", "D"];

/// Side in pixels of the image in place of one that is not named.
const SIDE: usize = 448;

/// Tokens that are decoded.
const NEW_TOKENS: usize = 33;

/// Noise draws of one pass.
const DRAWS: usize = 32;

/// Calls that are timed at least, and at most.
const CALLS: [usize; 2] = [3, 20];

/// What is measured.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub enum Work {
    /// Every weight read.
    Load,
    /// One prompt with its image, logits of every row.
    Prefill,
    /// Greedy decoding, the prompt's own time taken off.
    Decode,
    /// PGD of ten steps on one image.
    Pgd,
    /// Certification by the likelihood of the letters.
    Certify,
}

impl Work {
    /// All of them.
    pub const ALL: [Self; 5] = [Self::Load, Self::Prefill, Self::Decode, Self::Pgd, Self::Certify];

    /// Its name in reports, and what its seconds are of.
    pub fn words(self) -> (&'static str, &'static str) {
        match self {
            Self::Load => ("load", "checkpoint"),
            Self::Prefill => ("prefill", "prompt"),
            Self::Decode => ("decode", "token"),
            Self::Pgd => ("pgd_10", "image"),
            Self::Certify => ("certify_batch_32", "draw"),
        }
    }
}

/// One work on one model.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct InferenceProbe {
    /// Where its files lie.
    pub dir: PathBuf,
    /// Blocks of the model; none: all.
    pub depths: Option<Depths>,
    /// How weights are held.
    pub dtype: Dtype,
    /// What products take.
    pub arithmetic: ArithmeticName,
    /// Where it runs.
    pub device: Backend,
    /// Threads; none: all.
    pub threads: Option<usize>,
    /// The image; none: a gray square.
    pub image: Option<PathBuf>,
    /// What is measured.
    pub work: Work,
    /// Seconds that timed calls may take together.
    pub seconds: f64,
}

/// A model to estimate, as a person names it.
#[derive(Debug, Clone, PartialEq)]
pub struct Named {
    /// Directory or hub id.
    pub model: String,
    /// Its revision.
    pub revision: Option<String>,
    /// How weights are held.
    pub dtype: Dtype,
    /// What products take.
    pub arithmetic: ArithmeticName,
    /// Where it runs.
    pub device: Backend,
    /// Threads; none: all.
    pub threads: Option<usize>,
    /// The image; none: a gray square.
    pub image: Option<PathBuf>,
}

/// `safemed doctor --model`: seconds and memory of each work.
///
/// # Errors
/// What is missing or wrong in the model's directory.
pub fn estimate(named: &Named, options: &Options, stop: &Stop, progress: &dyn Progress) -> Result<Outcome> {
    let started = Instant::now();
    let about = (&[][..], PromptTemplate::Plain);
    let subject = Subject::open(&named.model, named.revision.as_deref(), about, stop, progress)?;
    let (parameters, ..) = count_parameters(&subject.config)?;
    let share = Options { seconds: options.seconds / Work::ALL.len() as f64, ..*options };
    let mut works: Vec<Value> = Vec::new();
    let mut how = String::new();
    for work in Work::ALL {
        let (name, unit) = work.words();
        progress.note(&format!("measuring {name}"));
        let run = |depths| {
            let probe = Probe::Inference(InferenceProbe {
                dir: subject.dir.clone().unwrap_or_default(),
                depths,
                dtype: named.dtype,
                arithmetic: named.arithmetic,
                device: named.device,
                threads: named.threads,
                image: named.image.clone(),
                work,
                seconds: (share.seconds / 5.0).max(0.2),
            });
            probe.run(stop)
        };
        let measured = measure_model(&subject, &share, &Silent, &run)?;
        let figure = |name: &str| measured.figures.get(name).copied();
        works.push(json!({
            "work": name,
            "unit": unit,
            "seconds": figure("seconds_per_unit"),
            "peak_memory_bytes": figure("step_peak_bytes").map(|bytes| bytes as u64),
            "ran_out_of_memory": measured.ran_out,
            "is_measured_whole": measured.is_whole,
        }));
        if how.is_empty() || !measured.ran_out {
            how = measured.how;
        }
    }
    let summary = json!({
        "model": named.model,
        "parameters": parameters,
        "measured_on": how,
        "assumptions": subject.stand_ins,
        "image": named.image.as_ref().map_or_else(|| format!("{SIDE} x {SIDE} pixels"), |path| path.display().to_string()),
        "works": works,
        "device": named.device.resolved().to_string(),
        "free_memory_bytes": super::free_memory(named.device),
        "seconds_spent": started.elapsed().as_secs_f64(),
    });
    let text = render::inference(&summary);
    Ok(Outcome::new(summary, text))
}

/// A question about an image, ready for the model.
struct Asked {
    prompt: Prompt,
    pixels: Tensor,
    size: [usize; 2],
}

/// Measures one work in this process.
pub(super) fn measure(probe: &InferenceProbe) -> Result<Figures> {
    let mut figures = Figures::new();
    let device = probe.device.device()?;
    let started = Instant::now();
    let load = || {
        Assistant::load_part(
            &probe.dir,
            probe.depths,
            Adaptation::None,
            probe.dtype.precision(probe.arithmetic),
            &|_| false,
            &device,
        )
    };
    let assistant = load()?;
    let mut seconds = started.elapsed().as_secs_f64();
    figures.insert("seconds_load".to_owned(), seconds);
    if probe.work == Work::Load {
        note_peak(&mut figures, "step_peak_bytes", 0, device.is_cpu());
        drop(assistant);
        let started = Instant::now();
        drop(load()?);
        seconds = seconds.min(started.elapsed().as_secs_f64());
        figures.insert("seconds_per_unit".to_owned(), seconds);
        return Ok(figures);
    }
    let image = match &probe.image {
        Some(path) => decode::decode_file(path)?,
        None => RgbImage8::filled(SIDE, SIDE, [96; 3])?,
    };
    let image = assistant.process(&image)?;
    let asked = Asked {
        prompt: assistant.prompt(QUESTION, Some(image.grid))?,
        pixels: assistant.pixels(&image)?,
        size: [image.resized.height, image.resized.width],
    };
    restart_peak_memory();
    let (per_unit, whole) = match probe.work {
        Work::Decode => decode_seconds(&assistant, &asked, probe.seconds)?,
        work => {
            let (mut units, mut done) = (1, 0u64);
            if work == Work::Certify {
                units = DRAWS;
            }
            let whole = timed(probe.seconds, &mut || {
                done += 1;
                match work {
                    Work::Prefill => prefill(&assistant, &asked),
                    Work::Pgd => attack(&assistant, &asked),
                    _ => draw(&assistant, &asked, done * DRAWS as u64),
                }
            })?;
            (whole / units as f64, whole)
        }
    };
    note_peak(&mut figures, "step_peak_bytes", 0, device.is_cpu());
    figures.insert("seconds_per_unit".to_owned(), per_unit);
    figures.insert("seconds_work".to_owned(), 4.0 * whole);
    Ok(figures)
}

/// The median of the seconds of a call, after one that warms up.
fn timed(seconds: f64, work: &mut dyn FnMut() -> Result<()>) -> Result<f64> {
    work()?;
    let started = Instant::now();
    let mut found = Vec::new();
    while found.len() < CALLS[0] || (found.len() < CALLS[1] && started.elapsed().as_secs_f64() < seconds) {
        let call = Instant::now();
        work()?;
        found.push(call.elapsed().as_secs_f64());
        if started.elapsed().as_secs_f64() > 10.0 * seconds.max(3.0) {
            break;
        }
    }
    Ok(median(&mut found))
}

fn prefill(assistant: &Assistant, asked: &Asked) -> Result<()> {
    let scoring = Scoring::new(assistant, std::slice::from_ref(&asked.prompt), &[Vec::new()])?;
    let features = policy::encode(assistant, std::slice::from_ref(&asked.pixels))?;
    let hidden = assistant.vlm.forward(Some(&features), &scoring.batch)?;
    assistant.vlm.logits(&hidden)?;
    Ok(())
}

/// Seconds of a token, and of a call.
fn decode_seconds(assistant: &Assistant, asked: &Asked, seconds: f64) -> Result<(f64, f64)> {
    let run = |tokens: usize| -> Result<()> {
        let decoding = Decoding::greedy(tokens, Vec::new());
        let features = policy::encode(assistant, std::slice::from_ref(&asked.pixels))?;
        policy::sample(
            assistant,
            std::slice::from_ref(&asked.prompt),
            Some(&features),
            &[vec![0]],
            &decoding,
        )?;
        Ok(())
    };
    let whole = timed(seconds / 2.0, &mut || run(NEW_TOKENS))?;
    let first = timed(seconds / 2.0, &mut || run(1))?;
    Ok(((whole - first).max(0.0) / (NEW_TOKENS - 1) as f64, whole))
}

fn letters(assistant: &Assistant) -> Result<Vec<u32>> {
    let first = |letter: &&str| -> Result<u32> {
        let ids = assistant.tokenizer.encode(letter)?;
        ids.first().copied().ok_or_else(|| anyhow::anyhow!("no token for {letter}").into())
    };
    LETTERS.iter().map(first).collect()
}

fn attack(assistant: &Assistant, asked: &Asked) -> Result<()> {
    let aim = Aim::at_completion(asked.prompt.clone(), asked.size, vec![letters(assistant)?[0]], 0);
    let target = Target {
        assistant,
        aims: vec![aim],
        answers: &|_, items| Ok(vec![None; items.len()]),
        noise: None,
        draws_at_once: 1,
        memory: Memory::Keep,
    };
    let config = AttackConfig {
        epsilon: Fraction(8.0 / 255.0),
        num_steps: 10,
        early_stop: false,
        output: PgdOutput::Last,
        ..AttackConfig::default()
    };
    let problem = Problem { clean: &asked.pixels, items: &[0], keys: &[0], start: None, judge_8bit: false };
    pgd(&target, &problem, &config, &mut |_| Ok(()))?;
    Ok(())
}

fn draw(assistant: &Assistant, asked: &Asked, start: u64) -> Result<()> {
    let completions = letters(assistant)?.into_iter().map(|id| vec![id]).collect();
    let classifier = QuestionClassifier {
        assistant,
        prompt: &asked.prompt,
        num_options: LETTERS.len(),
        reading: Reading::Likelihood { completions },
    };
    let image = asked.pixels.get(0)?;
    count_draws(&classifier, &image, 0.25, 0, 0, start..start + DRAWS as u64, DRAWS)?;
    Ok(())
}
