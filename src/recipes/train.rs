//! Training: questions, one step after another, checkpoints.

use super::adapter::Chosen;
use super::config::{DenoiserSettings, RecipeName, RunConfig};
use super::fit::{self, Fit, Learner, Student};
use super::grpo::{self, Assumed, Sampling};
use super::inputs;
use super::items::{self, Images};
use super::job::{Job, Outcome};
use super::lesson::Lesson;
use super::progress::Progress;
use super::report::{self, ReportOptions};
use super::run::{Run, Stop};
use super::scratch::{self, Scratch};
use super::sft::StepReport;
use super::{denoise, sft};
use crate::backend::peak_memory_bytes;
use crate::data::Dataset;
use crate::error::{Error, Result};
use crate::model::assistant::Assistant;
use crate::model::denoiser::{Denoiser, DenoiserConfig};
use crate::model::hub::Location;
use crate::model::lora::LoraConfig;
use crate::model::truncate::Depths;
use crate::roles::features::FeatureCache;
use candle_core::Var;
use serde_json::{Value, json};
use std::path::PathBuf;

/// `safemed train`.
///
/// # Errors
/// Whatever is wrong with settings, data or weights, before the first step; numbers that are not finite, at the step.
pub fn train(job: &Job<'_>) -> Result<Outcome> {
    inputs::check_job(job)?;
    if let Some(note) = job.config.prompt_note() {
        job.progress.note(&note);
    }
    inputs::require_greedy(&job.config, "training samples as `train.grpo` says")?;
    let material = material(&job.config, None, &job.stop, job.progress)?;
    let mut run = job.open_run()?;
    let summary = learn(material, &job.config, &mut run, job.progress)?;
    let options = ReportOptions { images: job.config.images, ..ReportOptions::default() };
    report::report(&[run.dir().to_path_buf()], &options, job.progress)?;
    let text =
        format!("trained: {}\n", run.path(summary["checkpoint"].as_str().unwrap_or_default()).display());
    Ok(Outcome::new(summary, text))
}

/// What a training run learns from.
pub(super) struct Material {
    dataset: Dataset,
    /// Where the model comes from; none from scratch.
    model: Option<Location>,
    assistant: Assistant,
    chosen: Chosen,
    /// Settings of the adapter that trains.
    adapter: Option<LoraConfig>,
    /// The frozen policy of GRPO's KL term.
    reference: Option<Assistant>,
}

/// Everything a configuration names, loaded; the questions first, for they are cheap. Of a checkpoint only the first blocks
/// of each kind where `depths` says so.
pub(super) fn material(
    config: &RunConfig,
    depths: Option<Depths>,
    stop: &Stop,
    progress: &dyn Progress,
) -> Result<Material> {
    let (dataset, _) = inputs::open_questions(config)?;
    items::require_some(&dataset, "train on")?;
    for note in items::Reasonings::of(config, &dataset.samples).notes(&dataset.samples) {
        progress.note(&note);
    }
    let device = config.backend().device()?;
    let needs_reference = config.train.recipe.is_grpo() && config.train.grpo.kl_coef > 0.0;
    let model = config.model.as_deref().unwrap_or_default();
    let parts = &config.train.parts;
    let trains = |name: &str| trains(name, parts.vision, parts.merger, parts.text);
    let chosen = Chosen::of(config)?;
    let is_denoiser = config.train.recipe == RecipeName::Denoiser;
    if is_denoiser && (config.denoiser.is_some() || !matches!(chosen, Chosen::None)) {
        return Err(Error::usage(
            "the recipe `denoiser` trains no model: an adapter or another denoiser has no effect\n   = help: leave `--adapter`, `train.lora_rank` and `--denoiser` out",
        ));
    }
    let trains = |name: &str| !is_denoiser && trains(name);
    let (model, assistant) = if model == scratch::TINY {
        if !matches!(chosen, Chosen::None) {
            return Err(Error::usage(
                "a model from scratch has no weights to adapt\n   = help: leave `train.lora_rank` and `--adapter` out",
            ));
        }
        let templates = [config.prompt.parse()?];
        (None, Scratch::tiny().build(&dataset.samples, &templates, config.seed, &trains, &device)?)
    } else {
        let model = inputs::locate_model(model, config.revision.as_deref(), stop, progress)?;
        let trains = |name: &str| chosen.trains(name, trains);
        let (adaptation, precision) = (chosen.adaptation(config.seed), config.precision());
        let assistant = Assistant::load_part(&model.dir, depths, adaptation, precision, &trains, &device)?;
        (Some(model), assistant)
    };
    let assistant = inputs::behind_denoiser(config, assistant)?;
    // The policy as it is before the first step: a new adapter changes nothing, so this is its base.
    let reference = if needs_reference { Some(assistant.frozen_copy()?) } else { None };
    let adapter = chosen.settings(&assistant)?;
    Ok(Material { dataset, model, assistant, chosen, adapter, reference })
}

/// Trains in an open run directory and leaves the summary there.
///
/// # Errors
/// As [`train`].
pub fn run_training(config: &RunConfig, run: &mut Run, progress: &dyn Progress) -> Result<Value> {
    learn(material(config, None, run.stop(), progress)?, config, run, progress)
}

fn learn(material: Material, config: &RunConfig, run: &mut Run, progress: &dyn Progress) -> Result<Value> {
    let Material { dataset, model, chosen, .. } = &material;
    inputs::note_questions(run, dataset, None, config.prompt.parse()?)?;
    for (key, count) in items::Reasonings::of(config, &dataset.samples).counts() {
        run.provenance(key, json!(count))?;
    }
    if let Some(model) = model {
        inputs::note_revision(run, model.commit.as_deref())?;
        run.provenance("model_sha256", json!(inputs::model_sha256(&model.dir)?))?;
    }
    if let Chosen::Given(adapter) = chosen {
        run.provenance("adapter_sha256", json!(inputs::adapter_sha256(&adapter.dir)?))?;
    }
    inputs::note_denoiser(run, config)?;
    let num_questions = dataset.samples.len();
    let checkpoint = follow(material, config, &mut Whole { run, progress }, progress)?;
    let summary = json!({
        "command": "train",
        "n": num_questions,
        "recipe": config.train.recipe.word(),
        "num_steps": config.train.num_steps,
        "checkpoint": checkpoint.strip_prefix(run.dir()).unwrap_or(&checkpoint),
        "metrics": run.read_metrics()?.last().cloned().unwrap_or(Value::Null),
        "seconds": run.seconds(),
    });
    run.summary(&summary)?;
    Ok(summary)
}

/// One step of a recipe.
pub(super) type Step<'a, L> = &'a dyn Fn(&mut Fit<L>, Assumed) -> Result<StepReport>;

/// What is done with a learner and the step of its recipe: the whole training, or a few steps of it to see what they cost.
pub(super) trait Course {
    /// What comes of it.
    type Output;

    /// Runs it.
    fn run<L: Learner>(
        &mut self,
        lesson: &Lesson<'_>,
        fit: Fit<L>,
        step: Step<'_, L>,
    ) -> Result<Self::Output>;
}

/// Puts the learner and the step of the configured recipe together, and hands both to `course`.
pub(super) fn follow<C: Course>(
    material: Material,
    config: &RunConfig,
    course: &mut C,
    progress: &dyn Progress,
) -> Result<C::Output> {
    let Material { dataset, assistant, chosen, adapter, reference, .. } = material;
    let settings = &config.train;
    let images = Images::new(&dataset);
    let is_visual = |(name, _): &(String, Var)| name.starts_with(VISION);
    let sees_alike = !assistant.vlm.parameters().trained().iter().any(is_visual);
    let lesson = Lesson {
        samples: &dataset.samples,
        images: &images,
        template: config.prompt.parse()?,
        config: settings,
        seed: config.seed,
        features: sees_alike.then(|| FeatureCache::new(config.feature_bytes())),
    };
    if settings.recipe == RecipeName::Denoiser {
        let DenoiserSettings { width, depth, .. } = settings.denoiser;
        let shape = DenoiserConfig::new(width, depth, settings.noise_sigma);
        let denoiser = Denoiser::untrained(shape, config.seed, assistant.vlm.device())?;
        let step = |fit: &mut Fit<Denoiser>, _: Assumed| denoise::step(&lesson, fit, &assistant);
        course.run(&lesson, Fit::new(denoiser)?, &step)
    } else {
        if let Some(text) = chosen.describe(&assistant)? {
            progress.note(&text);
        }
        let is_adversarial = settings.recipe.is_adversarial();
        let step = |fit: &mut Fit<Student>, assumed: Assumed| {
            if settings.recipe.is_grpo() {
                let (reference, max_new_tokens) = (reference.as_ref(), config.max_new_tokens);
                grpo::step(&lesson, fit, &Sampling { reference, max_new_tokens, is_adversarial, assumed })
            } else {
                sft::step(&lesson, fit, is_adversarial)
            }
        };
        course.run(&lesson, Fit::new(Student::new(assistant, adapter)?)?, &step)
    }
}

/// What the names of the vision tower's parameters begin with, those of its merger too.
const VISION: &str = "model.visual.";

/// Which parameters a choice of parts trains.
pub fn trains(name: &str, vision: bool, merger: bool, text: bool) -> bool {
    if name.starts_with(VISION) {
        let is_merger = name.contains("merger");
        (is_merger && merger) || (!is_merger && vision)
    } else {
        text
    }
}

/// Every step that is left, saved as it goes; gives the last checkpoint's directory, or [`Error::Stopped`] when asked to
/// stop, with everything saved.
struct Whole<'a> {
    run: &'a mut Run,
    progress: &'a dyn Progress,
}

impl Course for Whole<'_> {
    type Output = PathBuf;

    fn run<L: Learner>(&mut self, lesson: &Lesson<'_>, fit: Fit<L>, step: Step<'_, L>) -> Result<PathBuf> {
        train_steps(lesson, fit, step, self.run, self.progress)
    }
}

fn train_steps<L: Learner>(
    lesson: &Lesson<'_>,
    mut fit: Fit<L>,
    step: Step<'_, L>,
    run: &mut Run,
    progress: &dyn Progress,
) -> Result<PathBuf> {
    let settings = lesson.config;
    let checkpoints = run.path("checkpoints");
    fit.resume(&checkpoints)?;
    run.rewind_to(fit.step)?;
    let is_due = |step: u64| {
        let every = settings.save_every as u64;
        step == settings.num_steps as u64 || (every > 0 && step.is_multiple_of(every))
    };
    fit::rotate(&checkpoints, fit.step, settings.keep_checkpoints, &is_due)?;
    let logged = run.read_metrics()?;
    let mut num_tokens = logged.last().and_then(|line| line["num_tokens"].as_u64()).unwrap_or(0);
    progress.start(settings.num_steps, fit.step as usize, settings.recipe.word());
    let mut saved = None;
    while fit.step < settings.num_steps as u64 {
        let report = step(&mut fit, Assumed::default()).map_err(|error| lesson.located(error, fit.step))?;
        fit.step += 1;
        let mut metrics = serde_json::Map::new();
        metrics.insert("step".into(), json!(fit.step));
        let seen = fit.step as f64 * settings.batch_size as f64;
        metrics.insert("epoch".into(), json!(seen / lesson.samples.len() as f64));
        if report.num_tokens > 0 {
            num_tokens += report.num_tokens;
            metrics.insert("num_tokens".into(), json!(num_tokens));
        }
        metrics.extend(report.metrics);
        for completion in report.completions {
            let mut line = serde_json::Map::new();
            line.insert("step".into(), json!(fit.step));
            if let Value::Object(fields) = completion {
                line.extend(fields);
            }
            run.completion(&line)?;
        }
        let shown: Vec<(&str, f64)> =
            SHOWN.iter().filter_map(|(key, short)| Some((*short, metrics.get(*key)?.as_f64()?))).collect();
        progress.tick(fit.step as usize, &shown);
        run.metrics(&metrics)?;
        let seconds: f64 = report.phases.iter().map(|(_, seconds)| seconds).sum();
        let mut figures = report.phases;
        figures.extend(peak_memory_bytes().map(|bytes| ("peak_memory_bytes", bytes as f64)));
        run.timing("step", seconds, &figures)?;
        let is_last = fit.step == settings.num_steps as u64;
        let is_stopping = run.stop_requested();
        if is_due(fit.step) || is_stopping {
            saved = Some(fit.save(&checkpoints)?);
            fit::rotate(&checkpoints, fit.step, settings.keep_checkpoints, &is_due)?;
        }
        if is_stopping && !is_last {
            return Err(Error::Stopped);
        }
    }
    progress.finish();
    Ok(saved.unwrap_or_else(|| checkpoints.join(format!("step-{}", fit.step))))
}

/// The figures a person watches, with the short words a progress bar has room for.
const SHOWN: [(&str, &str); 7] = [
    ("loss", "loss"),
    ("reward", "reward"),
    ("rewards/accuracy_adversarial/mean", "adv"),
    ("rewards/accuracy_clean/mean", "clean"),
    ("frac_reward_zero_std", "zero-var"),
    ("pgd_gain", "pgd gain"),
    ("psnr", "psnr"),
];
