//! `train --dry-run` and `doctor --model`: memory and time, before anything is begun.
//!
//! No formula stands in for the program: a few steps of the very run are measured in processes of their own, on the whole
//! model where it is small and on models with few blocks of each kind otherwise, and drawn out in a straight line. What is
//! counted beforehand is which steps are the heaviest and which are typical.
//!
//! Deviation: weights are read from a warm cache, and nothing else is said to run on the machine.

pub mod inference;
pub mod line;
pub mod probe;
pub(super) mod render;
pub mod subject;
pub mod workload;

use super::adapter::Chosen;
use super::config::{Dtype, RecipeName, RunConfig};
use super::inputs;
use super::items;
use super::job::{Job, Outcome};
use super::progress::Progress;
use super::run::Stop;
use crate::data::Dataset;
use crate::error::{Error, Result};
use crate::model::loader::Precision;
use crate::model::truncate::{Depths, KINDS, Truncation, count_parameters};
use crate::pixels::decode;
use line::{More, extrapolate, steps_up};
use probe::{Figures, Probe, TrainingProbe};
use rayon::prelude::*;
use serde::Serialize;
use serde_json::{Value, json};
use sha2::{Digest, Sha256};
use std::time::Instant;
use subject::Subject;
use workload::Workload;

/// Images that are decoded to see how long one takes.
const TIMED_IMAGES: usize = 32;

/// What the caller of an estimate may say.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct Options {
    /// Seconds that measuring may take, roughly; a model that can be measured whole within them is.
    pub seconds: f64,
    /// Length of sampled completions in tokens, where it is known.
    pub completion_tokens: Option<usize>,
    /// Bytes of memory to plan for; none: what is free.
    pub memory_bytes: Option<u64>,
}

impl Default for Options {
    fn default() -> Self {
        Self { seconds: 60.0, completion_tokens: None, memory_bytes: None }
    }
}

/// What was measured of a model, brought to its whole depth.
#[derive(Debug, Clone, PartialEq)]
pub struct Measured {
    /// Figures of the whole model.
    pub figures: Figures,
    /// Whether it was measured whole.
    pub is_whole: bool,
    /// In words: on what.
    pub how: String,
}

/// A change of the configuration, and the memory it would take.
#[derive(Debug, Clone, PartialEq, Serialize)]
pub struct Advice {
    /// What to set, this and all before it.
    pub change: String,
    /// The peak then.
    pub peak_memory_bytes: Option<u64>,
    /// Whether that is free.
    pub fits: Option<bool>,
}

/// `safemed train --dry-run`.
///
/// # Errors
/// Whatever is wrong with settings, data or weights, as in training; [`Error::Interrupted`] when asked to stop.
pub fn dry_run(job: &Job<'_>, options: &Options) -> Result<Outcome> {
    rehearse(job, options).map_err(|error| match error {
        // Nothing is saved that could be gone on with.
        Error::Stopped => Error::Interrupted,
        other => other,
    })
}

fn rehearse(job: &Job<'_>, options: &Options) -> Result<Outcome> {
    let started = Instant::now();
    let config = &job.config;
    let template = inputs::check_job(job)?;
    inputs::require_greedy(config, "training samples as `train.grpo` says")?;
    let (dataset, _) = inputs::open_questions(config)?;
    items::require_some(&dataset, "train on")?;
    Chosen::of(config)?;
    let model = config.model.as_deref().unwrap_or_default();
    let subject = Subject::open(
        model,
        config.revision.as_deref(),
        (&dataset.samples, template),
        &job.stop,
        job.progress,
    )?
    .within(config)?;
    let assumed = options.completion_tokens.unwrap_or(config.max_new_tokens);
    if assumed > config.max_new_tokens {
        return Err(Error::usage(format!(
            "--completion-tokens {assumed} exceeds `max_new_tokens` {}: no completion is that long\n   = help: lower it, or raise --max-new-tokens",
            config.max_new_tokens
        )));
    }
    let work = Workload::count(config, &subject, &dataset, Some(assumed))?;
    let seconds_per_image = if work.decoded > 0 { seconds_per_image(&subject, &dataset)? } else { 0.0 };
    let rehearsal = Rehearsal { config, subject: &subject, options, seconds_per_image, stop: &job.stop };
    let measured = rehearsal.measure(&work, true, job.progress)?;
    let free = options.memory_bytes.or_else(|| free_memory(config));
    let peak = peak_of(&measured.figures, &work);
    let advice = match (peak, free) {
        (Some(peak), Some(free)) if peak > free => {
            let gib = |bytes: u64| bytes as f64 / f64::from(1 << 30);
            job.progress.note(&format!("it needs {:.2} GiB, {:.2} GiB are free", gib(peak), gib(free)));
            rehearsal.advise(&dataset, &work, free, job.progress)?
        }
        _ => Vec::new(),
    };
    let mut summary = summarise(&rehearsal, &work, &measured)?;
    summary["peak_memory_bytes"] = json!(peak);
    summary["free_memory_bytes"] = json!(free);
    summary["fits"] = json!(peak.zip(free).map(|(peak, free)| peak <= free));
    summary["advice"] = json!(advice);
    summary["seconds_spent"] = json!(started.elapsed().as_secs_f64());
    let text = render::training(&summary);
    Ok(Outcome::new(summary, text))
}

/// What stays the same while configurations are tried.
struct Rehearsal<'a> {
    config: &'a RunConfig,
    subject: &'a Subject,
    options: &'a Options,
    seconds_per_image: f64,
    stop: &'a Stop,
}

impl Rehearsal<'_> {
    /// Figures of the run on the whole model; without times, memory alone.
    fn measure(&self, work: &Workload, is_timed: bool, progress: &dyn Progress) -> Result<Measured> {
        let mut config = self.config.clone();
        if let Some(dir) = &self.subject.dir {
            config.model = Some(dir.display().to_string());
            config.revision = None;
        }
        let is_grpo = config.train.recipe.is_grpo();
        if let (true, Some(length)) = (is_grpo, self.options.completion_tokens) {
            config.max_new_tokens = length;
        }
        if !work.repeats {
            config.feature_cache_mib = 0;
        }
        let probe = |depths: Option<Depths>| {
            Probe::Training(Box::new(TrainingProbe {
                config: config.clone(),
                depths,
                heaviest: work.heaviest,
                typical: if is_timed { work.typical.clone() } else { Vec::new() },
                seconds: (self.options.seconds / 5.0).max(1.0),
                // The model's own words tell how long they are, if it is all of it and has learnt to speak.
                ends: depths.is_none()
                    && self.options.completion_tokens.is_none()
                    && self.subject.stand_ins.is_empty(),
                seconds_per_image: self.seconds_per_image,
                repeats: work.repeats,
            }))
        };
        measure_model(self.subject, self.options, self.stop, progress, &probe)
    }

    /// Changes of the configuration that lower its memory, each on top of those before, until it fits into `free` bytes.
    fn advise(
        &self,
        dataset: &Dataset,
        work: &Workload,
        free: u64,
        progress: &dyn Progress,
    ) -> Result<Vec<Advice>> {
        let mut config = self.config.clone();
        let mut found = Vec::new();
        for change in CHANGES {
            let Some(said) = change(&mut config, self.subject) else { continue };
            progress.note(&format!("what would fit: measuring with {said}"));
            let work = work.under(&config, self.subject, dataset)?;
            let rehearsal = Rehearsal { config: &config, ..*self };
            let measured = rehearsal.measure(&work, false, progress)?;
            let peak = peak_of(&measured.figures, &work);
            let fits = peak.map(|peak| peak <= free);
            found.push(Advice { change: said, peak_memory_bytes: peak, fits });
            if fits != Some(false) {
                break;
            }
        }
        Ok(found)
    }
}

/// A change that lowers memory, in words; none where it has no effect.
type Change = fn(&mut RunConfig, &Subject) -> Option<String>;

/// What lowers memory, what changes the training least first.
const CHANGES: [Change; 4] = [
    |config, subject| {
        (config.train.lora_rank > 0 && !holds_half(config, subject)).then(|| {
            config.dtype = if subject.is_half { Dtype::Auto } else { Dtype::Bf16 };
            format!("dtype={}", config.dtype)
        })
    },
    |config, _| {
        let train = &mut config.train;
        let is_one = train.micro_batch_size.unwrap_or(train.batch_size) == 1;
        (train.recipe != RecipeName::Denoiser && !is_one).then(|| {
            train.micro_batch_size = Some(1);
            "train.micro_batch_size=1".to_owned()
        })
    },
    |config, _| {
        let train = &mut config.train;
        (!train.recompute && train.recipe != RecipeName::Denoiser).then(|| {
            train.recompute = true;
            "train.recompute=true".to_owned()
        })
    },
    |config, _| {
        let train = &mut config.train;
        let is_possible =
            train.lora_rank == 0 && config.adapter.is_none() && train.recipe != RecipeName::Denoiser;
        is_possible.then(|| {
            train.lora_rank = 16;
            "train.lora_rank=16".to_owned()
        })
    },
];

/// Whether frozen weights are held in bfloat16.
pub(super) fn holds_half(config: &RunConfig, subject: &Subject) -> bool {
    match config.precision() {
        Precision::AsStored => subject.is_half,
        Precision::Single => false,
        Precision::Half | Precision::HalfProducts => true,
    }
}

/// Measures a model whole where it is small enough, else with few blocks, drawn out.
fn measure_model(
    subject: &Subject,
    options: &Options,
    stop: &Stop,
    progress: &dyn Progress,
    probe: &dyn Fn(Option<Depths>) -> Probe,
) -> Result<Measured> {
    let whole = Depths::of(&subject.config);
    let is_all_there = subject.measurable == whole;
    let base = Depths::least(&subject.config, 1);
    let as_whole = |figures| Measured { figures, is_whole: true, how: "the whole model".to_owned() };
    if base == whole || subject.dir.is_none() {
        progress.note("measuring the whole model");
        return Ok(as_whole(probe(None).run(stop)?));
    }
    progress.note(&format!("measuring {}", words(base)));
    let first = probe(Some(base)).run(stop)?;
    let (all, _, tables) = count_parameters(&subject.config)?;
    let kept = kept_parameters(subject, base)?;
    let times = (all - tables) as f64 / kept as f64;
    let get = |name: &str| first.get(name).copied().unwrap_or(0.0);
    let steps = get("seconds_first_step") + 3.0 * get("seconds_per_step");
    let seconds = (get("seconds_load") + steps.max(get("seconds_work"))) * times;
    let memory = free_bytes().is_none_or(|free| get("step_peak_bytes") * times < 0.7 * free as f64);
    if is_all_there && memory && seconds <= options.seconds {
        progress.note("measuring the whole model");
        return Ok(as_whole(probe(None).run(stop)?));
    }
    let mut more = Vec::new();
    for (kind, count) in steps_up(base, whole) {
        let depths = base.with(kind, count);
        progress.note(&format!("measuring {}", words(depths)));
        let figures = probe(Some(depths)).run(stop)?;
        let (extra, rest) = (count - base.0[kind], whole.0[kind] - base.0[kind]);
        more.push(More { figures, extra, rest });
    }
    let how = format!("{} models of {} and more, drawn out to {}", more.len() + 1, words(base), words(whole));
    Ok(Measured { figures: extrapolate(&first, &more), is_whole: false, how })
}

/// Parameters of the blocks and mergers of a model with `depths`.
fn kept_parameters(subject: &Subject, depths: Depths) -> Result<usize> {
    let config = Truncation::new(&subject.config, depths).config(&subject.config)?;
    let (all, _, tables) = count_parameters(&config)?;
    Ok(all - tables)
}

/// `2 decoder layers, 2 vision blocks`.
fn words(depths: Depths) -> String {
    let parts = depths.0.iter().zip(KINDS).filter(|(count, _)| **count > 0);
    parts.map(|(count, kind)| format!("{count} {kind}")).collect::<Vec<_>>().join(", ")
}

/// The most memory of a run: while loading, in its heaviest step or while saving, with the images and features it comes to
/// keep.
fn peak_of(figures: &Figures, work: &Workload) -> Option<u64> {
    let peaks = ["load_peak_bytes", "step_peak_bytes", "save_peak_bytes"];
    let peaks: Vec<f64> = peaks.iter().map(|name| figures.get(*name).copied()).collect::<Option<_>>()?;
    let kept = work.image_bytes + if remembers(figures) { work.feature_bytes } else { 0 };
    Some((peaks[0].max(peaks[1].max(peaks[2]) + kept as f64)) as u64)
}

/// Whether the run keeps what its vision tower said: it does where the tower does not train.
fn remembers(figures: &Figures) -> bool {
    figures.get("remembers_features").is_some_and(|yes| *yes > 0.0)
}

/// Bytes of memory that a run of `config` can have; unknown off the processor.
fn free_memory(config: &RunConfig) -> Option<u64> {
    if config.backend().device().is_ok_and(|device| device.is_cpu()) { free_bytes() } else { None }
}

/// Bytes of memory that are free on this machine, or in the container that this process is in.
pub fn free_bytes() -> Option<u64> {
    let mut system = sysinfo::System::new();
    system.refresh_memory();
    let group = system.cgroup_limits().map_or(u64::MAX, |limits| limits.free_memory);
    Some(system.available_memory().min(group)).filter(|bytes| *bytes > 0)
}

/// Seconds in which one image is decoded and resized, with all threads at it.
fn seconds_per_image(subject: &Subject, dataset: &Dataset) -> Result<f64> {
    let stride = (dataset.samples.len() / TIMED_IMAGES).max(1);
    let some: Vec<_> = dataset.samples.iter().step_by(stride).take(TIMED_IMAGES).collect();
    let started = Instant::now();
    some.par_iter().try_for_each(|sample| {
        let decoded = decode::read_file(&dataset.image_path(sample), dataset.gray)?;
        subject.processor.image_processor.process(&decoded.image).map(|_| ())
    })?;
    Ok(started.elapsed().as_secs_f64() / some.len() as f64)
}

/// Seconds in which `bytes` of weights are hashed, as a run does before it begins.
fn seconds_to_hash(bytes: usize) -> f64 {
    let block = vec![7u8; 16 << 20];
    let started = Instant::now();
    std::hint::black_box(Sha256::digest(&block));
    started.elapsed().as_secs_f64() / block.len() as f64 * bytes as f64
}

/// Everything that is known, as one object.
fn summarise(rehearsal: &Rehearsal<'_>, work: &Workload, measured: &Measured) -> Result<Value> {
    let Rehearsal { config, subject, options, seconds_per_image, .. } = rehearsal;
    let (train, figures) = (&config.train, &measured.figures);
    let (parameters, ..) = count_parameters(&subject.config)?;
    let get = |name: &str| figures.get(name).copied();
    let steps = train.num_steps as f64;
    let saves = train.num_steps.checked_div(train.save_every).unwrap_or(0)
        + usize::from(train.save_every == 0 || !train.num_steps.is_multiple_of(train.save_every));
    let seconds_start = get("seconds_load").unwrap_or(0.0) + seconds_to_hash(subject.file_bytes);
    let seconds_images = work.decoded as f64 * seconds_per_image;
    let seconds_steps = get("seconds_per_step").map(|seconds| seconds * steps);
    let seconds_saves = get("seconds_per_checkpoint").unwrap_or(0.0) * saves as f64;
    let total = seconds_steps.map(|seconds| seconds_start + seconds + seconds_images + seconds_saves);
    let trained = get("trained").unwrap_or(0.0);
    // A trained weight is float32, and the optimiser keeps two numbers beside it, an average one more.
    let trains_weights =
        train.lora_rank == 0 && config.adapter.is_none() && train.recipe != RecipeName::Denoiser;
    let frozen = if trains_weights { parameters as f64 - trained } else { parameters as f64 };
    let is_half = holds_half(config, subject);
    let (prompt, prompt_most) = work.median_and_most(|item| item.prompt);
    let (image, image_most) = work.median_and_most(|item| item.image);
    let (rows, rows_most) = work.median_and_most(|item| item.rows(work.group));
    let mut assumptions = subject.stand_ins.clone();
    if train.recipe.is_grpo() {
        assumptions.push(match (options.completion_tokens, measured.is_whole && subject.stand_ins.is_empty()) {
            (Some(length), _) => format!("completions of {length} tokens, as asked, and every group updated"),
            (None, true) => format!(
                "completions as this model samples them now: {:.0} tokens in the mean (at most {}), {:.0} % of the groups updated",
                get("completion_mean").unwrap_or(0.0),
                config.max_new_tokens,
                100.0 * get("groups_updated").unwrap_or(0.0)
            ),
            (None, false) => format!(
                "completions of {} tokens, the longest allowed, and every group updated; --completion-tokens says otherwise",
                config.max_new_tokens
            ),
        });
    }
    let trained_bytes = |count: f64| (4.0 * count) as u64;
    Ok(json!({
        "command": "train",
        "dry_run": true,
        "recipe": train.recipe.word(),
        "model": config.model,
        "measured_on": measured.how,
        "is_measured_whole": measured.is_whole,
        "assumptions": assumptions,
        "items": work.items.len(),
        "num_steps": train.num_steps,
        "batch_size": train.batch_size,
        "epochs": steps * train.batch_size as f64 / work.items.len() as f64,
        "prompt_tokens_median": prompt,
        "prompt_tokens_longest": prompt_most,
        "image_tokens_median": image,
        "image_tokens_longest": image_most,
        "item_tokens_median": rows,
        "item_tokens_longest": rows_most,
        "tokens_per_step": work.rows_per_step,
        "completion_tokens_mean": get("completion_mean"),
        "groups_updated_share": get("groups_updated"),
        "parameters": parameters,
        "parameters_trained": trained.round() as u64,
        "weights_bytes": (frozen * if is_half { 2.0 } else { 4.0 }) as u64 + trained_bytes(trained),
        "optimizer_bytes": (2 + u64::from(train.ema_decay.is_some())) * trained_bytes(trained),
        "kept_images_bytes": work.image_bytes,
        "kept_features_bytes": if remembers(figures) { work.feature_bytes } else { 0 },
        "load_peak_bytes": get("load_peak_bytes").map(|bytes| bytes as u64),
        "step_peak_bytes": get("step_peak_bytes").map(|bytes| bytes as u64),
        "save_peak_bytes": get("save_peak_bytes").map(|bytes| bytes as u64),
        "seconds_per_step": get("seconds_per_step"),
        "seconds_start": seconds_start,
        "seconds_images": seconds_images,
        "seconds_checkpoints": seconds_saves,
        "validations": train.num_steps.checked_div(train.validation.every).map_or(0, |times| times + 2),
        "seconds_total": total,
    }))
}
