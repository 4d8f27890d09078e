//! `train --dry-run` and `doctor --model`: memory and time, before anything is begun.
//!
//! No formula stands in for the program: a few steps of the very run are measured in processes of their own, on the whole
//! model where it is small and on models with few blocks of each kind otherwise, and drawn out in a straight line. What is
//! counted beforehand is which steps are the heaviest and which are typical.
//!
//! Deviation: weights are read from a warm cache, and nothing else is said to run on the machine.

pub mod exam;
pub mod inference;
pub mod line;
pub mod probe;
pub(super) mod render;
pub mod subject;
pub mod workload;

use super::adapter::Chosen;
use super::config::{Dtype, RecipeName, RunConfig};
use super::inputs;
use super::job::{Job, Outcome};
use super::progress::Progress;
use super::questions::Questions;
use super::run::Stop;
use crate::backend::Backend;
use crate::data::Dataset;
use crate::error::{Error, Result};
use crate::model::loader::Precision;
use crate::model::truncate::{Depths, KINDS, Truncation, count_parameters};
use crate::pixels::decode;
use exam::ExamWork;
use line::{More, extrapolate, steps_up};
use probe::{Figures, Probe, TrainingProbe};
use rayon::prelude::*;
use serde::Serialize;
use serde_json::{Value, json};
use sha2::{Digest, Sha256};
use std::collections::{BTreeSet, HashSet};
use std::path::PathBuf;
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
    /// Whether a measurement ran out of memory: there are no figures then.
    pub ran_out: bool,
}

impl Measured {
    fn whole(figures: Figures) -> Self {
        Self { figures, is_whole: true, how: "the whole model".to_owned(), ran_out: false }
    }

    fn nothing() -> Self {
        let how = "nothing: even a part of it takes more memory than there is".to_owned();
        Self { figures: Figures::new(), is_whole: false, how, ran_out: true }
    }

    /// Whether a run whose peak is `peak` fits into `free` bytes, where that is known.
    fn fits(&self, peak: Option<u64>, free: Option<u64>) -> Option<bool> {
        if self.ran_out { Some(false) } else { peak.zip(free).map(|(peak, free)| peak <= free) }
    }
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
    Chosen::of(config)?;
    let assumed = options.completion_tokens.unwrap_or(config.max_new_tokens);
    if assumed > config.max_new_tokens {
        return Err(Error::usage(format!(
            "--completion-tokens {assumed} exceeds `max_new_tokens` {}: no completion is that long\n   = help: lower it, or raise --max-new-tokens",
            config.max_new_tokens
        )));
    }
    let looked = Instant::now();
    let Questions { trained: dataset, examined, damaged } =
        Questions::sound(config, &job.stop, job.progress)?;
    let seconds_to_look = looked.elapsed().as_secs_f64();
    let model = config.model.as_deref().unwrap_or_default();
    let subject = Subject::open(
        model,
        config.revision.as_deref(),
        (&dataset.samples, template),
        &job.stop,
        job.progress,
    )?
    .within(config)?;
    let work = Workload::count(config, &subject, &dataset, Some(assumed))?;
    let exam = examined.as_ref().map(|questions| ExamWork::count(config, &subject, questions)).transpose()?;
    let seconds_per_image = if work.decoded > 0 { seconds_per_image(&subject, &dataset)? } else { 0.0 };
    let rehearsal = Rehearsal {
        config,
        subject: &subject,
        options,
        exam: exam.as_ref(),
        seconds_per_image,
        seconds_to_check: seconds_to_look + seconds_to_hash_images(&dataset),
        damaged: &damaged,
        stop: &job.stop,
    };
    let measured = rehearsal.measure(&work, true, job.progress)?;
    let free = options.memory_bytes.or_else(|| free_memory(config.backend()));
    let peak = peak_of(&measured.figures, &work, exam.as_ref());
    let fits = measured.fits(peak, free);
    let advice = if fits == Some(false) {
        job.progress.note(&what_is_missing(peak, free));
        rehearsal.advise(&dataset, &work, free, job.progress)?
    } else {
        Vec::new()
    };
    let mut summary = summarise(&rehearsal, &work, &measured)?;
    summary["peak_memory_bytes"] = json!(peak);
    summary["free_memory_bytes"] = json!(free);
    summary["fits"] = json!(fits);
    summary["advice"] = json!(advice);
    summary["seconds_spent"] = json!(started.elapsed().as_secs_f64());
    let text = render::training(&summary);
    Ok(Outcome::new(summary, text))
}

/// Why a run does not fit, in words.
fn what_is_missing(peak: Option<u64>, free: Option<u64>) -> String {
    let gib = |bytes: u64| bytes as f64 / f64::from(1 << 30);
    match (peak, free) {
        (Some(peak), Some(free)) => format!("it needs {:.2} GiB, {:.2} GiB are free", gib(peak), gib(free)),
        _ => "a measurement ran out of memory, so this does not fit".to_owned(),
    }
}

/// What stays the same while configurations are tried.
struct Rehearsal<'a> {
    config: &'a RunConfig,
    subject: &'a Subject,
    options: &'a Options,
    /// The questions of validation, where there is one.
    exam: Option<&'a ExamWork>,
    seconds_per_image: f64,
    /// Seconds in which a run looks at its questions and images before it begins.
    seconds_to_check: f64,
    /// Image files that cannot be read.
    damaged: &'a BTreeSet<PathBuf>,
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
        let examined = config.clone();
        if !work.repeats {
            config.feature_cache_mib = 0;
        }
        let run = |depths: Option<Depths>| {
            // The model's own words tell how long they are, if it is all of it and has learnt to speak.
            let ends = depths.is_none()
                && self.options.completion_tokens.is_none()
                && self.subject.stand_ins.is_empty();
            let exam = match self.exam {
                Some(exam) => Some(exam.probe(&examined, (!ends).then(|| self.answer_tokens(exam)))?),
                None => None,
            };
            let probe = Probe::Training(Box::new(TrainingProbe {
                config: config.clone(),
                depths,
                heaviest: work.heaviest,
                typical: if is_timed { work.typical.clone() } else { Vec::new() },
                seconds: (self.options.seconds / 5.0).max(1.0),
                ends,
                seconds_per_image: self.seconds_per_image,
                repeats: work.repeats,
                exam,
                damaged: self.damaged.clone(),
            }));
            probe.run(self.stop)
        };
        measure_model(self.subject, self.options, progress, &run)
    }

    /// Tokens of an answer in an examination, where it is not the model that tells.
    fn answer_tokens(&self, exam: &ExamWork) -> usize {
        let learnt = if self.config.train.recipe.is_grpo() {
            self.config.max_new_tokens
        } else {
            exam.longest_answer()
        };
        self.options.completion_tokens.unwrap_or(learnt)
    }

    /// Changes of the configuration that lower its memory, each on top of those before, until it fits into `free` bytes; where
    /// that is not known, until it can be measured.
    fn advise(
        &self,
        dataset: &Dataset,
        work: &Workload,
        free: Option<u64>,
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
            let peak = peak_of(&measured.figures, &work, self.exam);
            let fits = measured.fits(peak, free);
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
const CHANGES: [Change; 5] = [
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
        // Attacks of validation hold no more than a pass of training; what asks without an attack knows only this.
        let validation = &config.train.validation;
        (validation.every > 0 && validation.num_steps == 0 && config.batch_size > 1).then(|| {
            config.batch_size = 1;
            "batch_size=1".to_owned()
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

/// Measures a model whole where it is small enough, else with few blocks, drawn out; `run` measures a model of so many blocks,
/// none for all, and gives nothing where memory runs out.
fn measure_model(
    subject: &Subject,
    options: &Options,
    progress: &dyn Progress,
    run: &dyn Fn(Option<Depths>) -> Result<Option<Figures>>,
) -> Result<Measured> {
    let whole = Depths::of(&subject.config);
    let is_all_there = subject.measurable == whole;
    let base = Depths::least(&subject.config, 1);
    if base == whole || subject.dir.is_none() {
        progress.note("measuring the whole model");
        return Ok(run(None)?.map_or_else(Measured::nothing, Measured::whole));
    }
    progress.note(&format!("measuring {}", words(base)));
    let Some(first) = run(Some(base))? else { return Ok(Measured::nothing()) };
    let (all, _, tables) = count_parameters(&subject.config)?;
    let kept = kept_parameters(subject, base)?;
    let times = (all - tables) as f64 / kept as f64;
    let get = |name: &str| first.get(name).copied().unwrap_or(0.0);
    let steps = get("seconds_first_step") + 3.0 * get("seconds_per_step") + get("seconds_exam");
    let seconds = (get("seconds_load") + steps.max(get("seconds_work"))) * times;
    let peak = get("step_peak_bytes").max(get("exam_peak_bytes"));
    let memory = free_bytes().is_none_or(|free| peak * times < 0.7 * free as f64);
    if is_all_there && memory && seconds <= options.seconds {
        progress.note("measuring the whole model");
        if let Some(figures) = run(None)? {
            return Ok(Measured::whole(figures));
        }
        progress.note("it takes more memory than there is: parts of it tell how much");
    }
    let mut more = Vec::new();
    for (kind, count) in steps_up(base, whole) {
        let depths = base.with(kind, count);
        progress.note(&format!("measuring {}", words(depths)));
        let Some(figures) = run(Some(depths))? else { return Ok(Measured::nothing()) };
        let (extra, rest) = (count - base.0[kind], whole.0[kind] - base.0[kind]);
        more.push(More { figures, extra, rest });
    }
    let how = format!("{} models of {} and more, drawn out to {}", more.len() + 1, words(base), words(whole));
    Ok(Measured { figures: extrapolate(&first, &more), is_whole: false, how, ran_out: false })
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

/// The most memory of a run: while loading, in its heaviest step, while saving or in an examination, with the images and features
/// it comes to keep.
fn peak_of(figures: &Figures, work: &Workload, exam: Option<&ExamWork>) -> Option<u64> {
    let get = |name: &str| figures.get(name).copied();
    let remembers = remembers(figures);
    let mut kept = work.image_bytes + if remembers { work.feature_bytes } else { 0 };
    let mut peak = get("step_peak_bytes")?.max(get("save_peak_bytes")?);
    if let Some(exam) = exam {
        // Features stay from one examination to the next where the tower says the same again.
        let (always, meanwhile) = if remembers { (exam.feature_bytes, 0) } else { (0, exam.feature_bytes) };
        kept += always;
        peak = peak.max(get("exam_peak_bytes")? + (exam.image_bytes + meanwhile) as f64);
    }
    Some(get("load_peak_bytes")?.max(peak + kept as f64) as u64)
}

/// Whether the run keeps what its vision tower said: it does where the tower does not train.
fn remembers(figures: &Figures) -> bool {
    figures.get("remembers_features").is_some_and(|yes| *yes > 0.0)
}

/// Bytes of memory that a run on `backend` can have; unknown off the processor.
fn free_memory(backend: Backend) -> Option<u64> {
    if backend.device().is_ok_and(|device| device.is_cpu()) { free_bytes() } else { None }
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

/// Seconds in which the files of the images that are trained on are hashed. Examinations hash theirs.
fn seconds_to_hash_images(dataset: &Dataset) -> f64 {
    let images: HashSet<&PathBuf> = dataset.samples.iter().map(|sample| &sample.image).collect();
    let size = |image: &&PathBuf| std::fs::metadata(dataset.root.join(image)).map_or(0, |about| about.len());
    let bytes: u64 = images.par_iter().map(size).sum();
    seconds_to_hash(bytes as usize) / rayon::current_num_threads() as f64
}

/// Examinations of a run: before the first step, after every so many, and after the last.
fn count_exams(num_steps: usize, every: usize) -> usize {
    if every == 0 { 0 } else { num_steps.div_ceil(every) + 1 }
}

/// What an estimate takes for granted, in words.
fn assumptions(rehearsal: &Rehearsal<'_>, measured: &Measured) -> Vec<String> {
    let Rehearsal { config, subject, options, exam, .. } = rehearsal;
    let get = |name: &str| measured.figures.get(name).copied();
    let mut assumptions = subject.stand_ins.clone();
    if config.train.recipe.is_grpo() {
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
    if exam.is_some() && config.train.validation.num_steps > 0 {
        assumptions.push(
            "validation whose every answer is right and breaks under no attack: wrong ones take less time"
                .to_owned(),
        );
    }
    assumptions
}

/// Everything that is known, as one object.
fn summarise(rehearsal: &Rehearsal<'_>, work: &Workload, measured: &Measured) -> Result<Value> {
    let Rehearsal { config, subject, exam, seconds_per_image, seconds_to_check, .. } = rehearsal;
    let (train, figures) = (&config.train, &measured.figures);
    let (parameters, ..) = count_parameters(&subject.config)?;
    let get = |name: &str| figures.get(name).copied();
    let steps = train.num_steps as f64;
    let saves = train.num_steps.checked_div(train.save_every).unwrap_or(0)
        + usize::from(train.save_every == 0 || !train.num_steps.is_multiple_of(train.save_every));
    let seconds_start =
        get("seconds_load").unwrap_or(0.0) + seconds_to_hash(subject.file_bytes) + seconds_to_check;
    let seconds_images = work.decoded as f64 * seconds_per_image;
    let seconds_steps = get("seconds_per_step").map(|seconds| seconds * steps);
    let seconds_saves = get("seconds_per_checkpoint").unwrap_or(0.0) * saves as f64;
    let (validations, num_asked) =
        (count_exams(train.num_steps, train.validation.every), exam.map_or(0, ExamWork::num_questions));
    let seconds_exams = match exam {
        Some(_) => get("seconds_per_exam_item").map(|seconds| seconds * (validations * num_asked) as f64),
        None => Some(0.0),
    };
    let total = seconds_steps
        .zip(seconds_exams)
        .map(|(steps, exams)| seconds_start + seconds_images + steps + exams + seconds_saves);
    let trained = get("trained");
    // A trained weight is float32, and the optimiser keeps two numbers beside it, an average one more.
    let trains_weights =
        train.lora_rank == 0 && config.adapter.is_none() && train.recipe != RecipeName::Denoiser;
    let frozen = |trained: f64| if trains_weights { parameters as f64 - trained } else { parameters as f64 };
    let bytes_each = if holds_half(config, subject) { 2.0 } else { 4.0 };
    let (prompt, prompt_most) = work.median_and_most(|item| item.prompt);
    let (image, image_most) = work.median_and_most(|item| item.image);
    let (rows, rows_most) = work.median_and_most(|item| item.rows(work.group));
    let trained_bytes = |count: f64| (4.0 * count) as u64;
    Ok(json!({
        "command": "train",
        "dry_run": true,
        "recipe": train.recipe.word(),
        "model": config.model,
        "measured_on": measured.how,
        "is_measured_whole": measured.is_whole,
        "ran_out_of_memory": measured.ran_out,
        "device": config.backend().resolved().to_string(),
        "assumptions": assumptions(rehearsal, measured),
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
        "parameters_trained": trained.map(|trained| trained.round() as u64),
        "weights_bytes": trained.map(|trained| (frozen(trained) * bytes_each) as u64 + trained_bytes(trained)),
        "optimizer_bytes": trained.map(|trained| (2 + u64::from(train.ema_decay.is_some())) * trained_bytes(trained)),
        "kept_images_bytes": work.image_bytes,
        "kept_features_bytes": if remembers(figures) { work.feature_bytes } else { 0 },
        "load_peak_bytes": get("load_peak_bytes").map(|bytes| bytes as u64),
        "step_peak_bytes": get("step_peak_bytes").map(|bytes| bytes as u64),
        "save_peak_bytes": get("save_peak_bytes").map(|bytes| bytes as u64),
        "exam_peak_bytes": get("exam_peak_bytes").map(|bytes| bytes as u64),
        "seconds_per_step": get("seconds_per_step"),
        "seconds_start": seconds_start,
        "seconds_images": seconds_images,
        "seconds_checkpoints": seconds_saves,
        "validations": validations,
        "validation_items": num_asked,
        "seconds_validation": seconds_exams,
        "seconds_total": total,
    }))
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::model::config::VlmConfig;
    use crate::model::test_support::{ids, sizes};
    use crate::pixels::RgbImage8;
    use crate::recipes::progress::Silent;
    use std::cell::RefCell;
    use workload::tests::{questions, subject};

    fn figures(named: &[(&str, f64)]) -> Figures {
        named.iter().map(|(name, value)| ((*name).to_owned(), *value)).collect()
    }

    /// A model of several blocks of each kind, which need not be there.
    fn deep() -> Subject {
        let mut subject = subject(&questions(10));
        subject.config = VlmConfig::new_qwen3_vl(&sizes(), ids()).unwrap();
        subject.measurable = Depths::of(&subject.config);
        subject.dir = Some("model".into());
        subject
    }

    #[test]
    fn a_measurement_without_memory_is_an_answer_and_no_error() {
        let small = subject(&questions(10));
        let options = Options { seconds: 0.0, ..Options::default() };
        let found = measure_model(&small, &options, &Silent, &|_| Ok(None)).unwrap();
        assert!(found.ran_out && !found.is_whole && found.figures.is_empty());
        assert_eq!(found.fits(None, Some(1)), Some(false));
        assert_eq!(found.fits(None, None), Some(false));

        let subject = deep();
        let base = Depths::least(&subject.config, 1);
        let known = || -> Result<Option<Figures>> { Ok(Some(figures(&[("seconds_load", 1.0)]))) };
        // Whatever runs out: the smallest part, a larger one, or the whole, which its parts then stand in for.
        let first = measure_model(&subject, &options, &Silent, &|_| Ok(None)).unwrap();
        assert!(first.ran_out);
        let later = |depths: Option<Depths>| if depths == Some(base) { known() } else { Ok(None) };
        assert!(measure_model(&subject, &options, &Silent, &later).unwrap().ran_out);
        let patient = Options { seconds: 1e9, ..options };
        let asked = RefCell::new(Vec::new());
        let run = |depths: Option<Depths>| {
            asked.borrow_mut().push(depths);
            if depths.is_none() { Ok(None) } else { known() }
        };
        let drawn_out = measure_model(&subject, &patient, &Silent, &run).unwrap();
        assert!(!drawn_out.ran_out && !drawn_out.is_whole, "{drawn_out:?}");
        assert_eq!(asked.borrow()[..2], [Some(base), None]);
        assert_eq!(drawn_out.fits(Some(2), Some(1)), Some(false));
        assert_eq!(drawn_out.fits(Some(1), Some(1)), Some(true));
        assert_eq!(drawn_out.fits(None, Some(1)), None);
    }

    #[test]
    fn examinations_are_counted_as_a_run_holds_them() {
        for (num_steps, every) in [(6, 2), (6, 4), (6, 6), (6, 7), (1, 1), (1000, 100), (999, 100)] {
            let is_due = |step: &usize| *step == num_steps || step.is_multiple_of(every);
            let held = (0..=num_steps).filter(is_due).count();
            assert_eq!(count_exams(num_steps, every), held, "{num_steps} {every}");
        }
        assert_eq!(count_exams(1000, 0), 0);
    }

    #[test]
    fn the_files_of_images_are_hashed_once_each() {
        let dir = tempfile::tempdir().unwrap();
        let mut samples = questions(2);
        samples[1].image = samples[0].image.clone();
        let dataset = Dataset::new(dir.path(), samples);
        assert_eq!(seconds_to_hash_images(&dataset), 0.0);
        std::fs::write(dataset.image_path(&dataset.samples[0]), vec![0u8; 1 << 20]).unwrap();
        assert!(seconds_to_hash_images(&dataset) > 0.0);
    }

    #[test]
    fn the_peak_is_that_of_steps_saves_or_examinations_with_what_is_kept() {
        let dir = tempfile::tempdir().unwrap();
        let dataset = Dataset::new(dir.path(), questions(4));
        let png = decode::encode_png(&RgbImage8::filled(64, 64, [9; 3]).unwrap()).unwrap();
        for sample in &dataset.samples {
            std::fs::write(dataset.image_path(sample), &png).unwrap();
        }
        let subject = subject(&dataset.samples);
        let mut config = RunConfig { prompt: "phantom".to_owned(), ..RunConfig::default() };
        config.train.num_steps = 4;
        config.train.validation.every = 2;
        let work = Workload::count(&config, &subject, &dataset, None).unwrap();
        let exam = ExamWork::count(&config, &subject, &dataset).unwrap();
        assert_eq!((exam.num_questions(), exam.image_bytes), (4, 4 * 3 * 64 * 64));
        let (kept, images) = (work.image_bytes as u64, exam.image_bytes as u64);
        let (features, known) = (exam.feature_bytes as u64, work.feature_bytes as u64);
        assert!(features > 0 && known > 0);
        let mut measured = figures(&[
            ("load_peak_bytes", 1e3),
            ("step_peak_bytes", 5e6),
            ("save_peak_bytes", 3e6),
            ("exam_peak_bytes", 4e6),
        ]);
        let peak = |measured: &Figures, exam| peak_of(measured, &work, exam);
        assert_eq!(peak(&measured, None), Some(5_000_000 + kept));
        assert_eq!(peak(&measured, Some(&exam)), Some(5_000_000 + kept));
        measured.insert("exam_peak_bytes".to_owned(), 6e6);
        assert_eq!(peak(&measured, Some(&exam)), Some(6_000_000 + kept + images + features));
        measured.insert("remembers_features".to_owned(), 1.0);
        assert_eq!(peak(&measured, Some(&exam)), Some(6_000_000 + kept + images + features + known));
        measured.remove("exam_peak_bytes");
        assert_eq!(peak(&measured, Some(&exam)), None);
    }
}
