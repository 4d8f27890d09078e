//! Training: questions, one step after another, checkpoints.

use super::adapter::Chosen;
use super::config::{DenoiserSettings, GrpoSettings, MetricName, RecipeName, RunConfig};
use super::failure::{self, Evidence, Part};
use super::fit::{self, Fit, Learner, Student};
use super::grpo::{self, Assumed, Judge, Sampling};
use super::inputs;
use super::items::{self, Images};
use super::job::{Job, Outcome};
use super::lesson::{Exit, Lesson};
use super::progress::Progress;
use super::questions::Questions;
use super::report::{self, ReportOptions};
use super::room;
use super::run::{Run, Stop};
use super::scratch::{self, Scratch};
use super::step::{self, StepReport};
use super::validation::{self, Best, Exam};
use super::watch::{self, Watch};
use super::{denoise, sft, trades};
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
use std::collections::BTreeSet;
use std::fmt::Write as _;
use std::path::PathBuf;
use std::time::Instant;

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
    let material = material(&job.config, Extent::Whole, &job.stop, job.progress)?;
    let mut run = job.open_run()?;
    let summary = learn(material, &job.config, &mut run, job.progress)?;
    let options = ReportOptions { images: job.config.images, ..ReportOptions::default() };
    report::report(&[run.dir().to_path_buf()], &options, job.progress)?;
    let mut text =
        format!("trained: {}\n", run.path(summary["checkpoint"].as_str().unwrap_or_default()).display());
    if let Some(best) = summary["best"]["checkpoint"].as_str() {
        let (metric, value) = (summary["best"]["metric"].as_str(), summary["best"]["value"].as_f64());
        let _ = writeln!(
            text,
            "best:    {} ({} {:.4})",
            run.path("checkpoints").join(best).display(),
            metric.unwrap_or_default(),
            value.unwrap_or(f64::NAN)
        );
    }
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
    /// The questions of validation.
    validation: Option<Dataset>,
    /// What GRPO's completions are worth.
    judge: Judge,
    /// What asks to stop.
    stop: Stop,
}

/// How much of a training is to come.
#[derive(Debug, Clone, Copy)]
pub(super) enum Extent<'a> {
    /// All of it: whatever could stop it on its way is looked for first.
    Whole,
    /// A few steps, of the first blocks of each kind where they are told; the image files that cannot be read are known.
    Steps(Option<Depths>, &'a BTreeSet<PathBuf>),
}

/// Everything a configuration names, loaded; what costs little is looked at first.
pub(super) fn material(
    config: &RunConfig,
    extent: Extent<'_>,
    stop: &Stop,
    progress: &dyn Progress,
) -> Result<Material> {
    let device = config.backend().device()?;
    let chosen = Chosen::of(config)?;
    let is_denoiser = config.train.recipe == RecipeName::Denoiser;
    if is_denoiser && (config.denoiser.is_some() || !matches!(chosen, Chosen::None)) {
        return Err(Error::usage(
            "the recipe `denoiser` trains no model: an adapter or another denoiser has no effect\n   = help: leave `--adapter`, `train.lora_rank` and `--denoiser` out",
        ));
    }
    let model = config.model.as_deref().unwrap_or_default();
    let questions = match extent {
        Extent::Whole => Questions::sound(config, stop, progress)?,
        Extent::Steps(_, damaged) => Questions::again(config, damaged)?,
    };
    let Questions { trained: dataset, examined: validation, .. } = questions;
    for note in items::Reasonings::of(config, &dataset.samples).notes(&dataset.samples) {
        progress.note(&note);
    }
    let needs_reference = config.train.recipe.is_grpo() && config.train.grpo.kl_coef > 0.0;
    let parts = &config.train.parts;
    let trains = |name: &str| trains(name, parts.vision, parts.merger, parts.text);
    let trains = |name: &str| !is_denoiser && trains(name);
    // A reward command that does not work is found before weights are fetched or read.
    let judge = Judge::open(config, &dataset.samples[0])?;
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
        let depths = if let Extent::Steps(depths, _) = extent { depths } else { None };
        let assistant = Assistant::load_part(&model.dir, depths, adaptation, precision, &trains, &device)?;
        (Some(model), assistant)
    };
    let assistant = inputs::fitted(config, assistant)?;
    // The policy as it is before the first step: a new adapter changes nothing, so this is its base.
    let reference = if needs_reference { Some(assistant.frozen_copy()?) } else { None };
    let adapter = chosen.settings(&assistant, config.train.lora_dropout)?;
    let stop = stop.clone();
    Ok(Material { dataset, model, assistant, chosen, adapter, reference, validation, judge, stop })
}

/// Trains in an open run directory and leaves the summary there.
///
/// # Errors
/// As [`train`].
pub fn run_training(config: &RunConfig, run: &mut Run, progress: &dyn Progress) -> Result<Value> {
    learn(material(config, Extent::Whole, run.stop(), progress)?, config, run, progress)
}

fn learn(material: Material, config: &RunConfig, run: &mut Run, progress: &dyn Progress) -> Result<Value> {
    let Material { dataset, model, chosen, judge, .. } = &material;
    inputs::note_questions(run, dataset, None, config.prompt.parse()?)?;
    if let Some(questions) = &material.validation {
        inputs::note_examined(run, questions)?;
    }
    for (key, count) in items::Reasonings::of(config, &dataset.samples).counts() {
        run.provenance(key, json!(count))?;
    }
    let adapter = if let Chosen::Given(adapter) = chosen { Some(adapter.dir.as_path()) } else { None };
    inputs::note_start(run, model.as_ref(), adapter)?;
    inputs::note_denoiser(run, config)?;
    room::check_memory(model.as_ref(), &material.assistant, dataset, config, run, progress);
    inputs::note_reward_command(run, config, judge)?;
    let num_questions = dataset.samples.len();
    let checkpoint = follow(material, config, &mut Whole { run, progress }, progress)?;
    let mut summary = json!({
        "command": "train",
        "n": num_questions,
        "recipe": config.train.recipe.word(),
        "num_steps": config.train.num_steps,
        "checkpoint": checkpoint.strip_prefix(run.dir()).unwrap_or(&checkpoint),
        "metrics": run.read_metrics()?.last().cloned().unwrap_or(Value::Null),
        "warnings": watch::counts(&run.read_warnings()?),
        "seconds": run.seconds(),
    });
    if let Some(validation) = run.read_validation()?.last() {
        summary["validation"] = validation.clone();
        let path = run.path(BEST);
        let text = std::fs::read(&path).map_err(|error| Error::io("cannot read", &path, error))?;
        summary["best"] = serde_json::from_slice(&text).map_err(anyhow::Error::from)?;
        note_if_no_better(run, &summary["best"], progress)?;
    }
    run.summary(&summary)?;
    Ok(summary)
}

/// Says when no checkpoint is better than the model was before training.
fn note_if_no_better(run: &Run, best: &Value, progress: &dyn Progress) -> Result<()> {
    let lines = run.read_validation()?;
    let metric = best["metric"].as_str().and_then(|word| word.parse::<MetricName>().ok());
    let (Some(first), Some(metric), Some(value)) = (lines.first(), metric, best["value"].as_f64()) else {
        return Ok(());
    };
    let before = validation::value_of(first, metric).filter(|_| first["step"] == 0);
    if let Some(before) = before.filter(|before| *before >= value) {
        progress.note(&format!(
            "no checkpoint is better than the model before training: {metric} {before:.4} then, {value:.4} at best since"
        ));
    }
    Ok(())
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
        exam: Option<&Exam<'_>>,
    ) -> Result<Self::Output>;
}

/// Puts the learner and the step of the configured recipe together, and hands both to `course`.
pub(super) fn follow<C: Course>(
    material: Material,
    config: &RunConfig,
    course: &mut C,
    progress: &dyn Progress,
) -> Result<C::Output> {
    let Material { dataset, assistant, chosen, adapter, reference, validation, judge, stop, .. } = material;
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
        evidence: Evidence::default(),
        exit: Exit::new(stop),
    };
    let own = validation::own_config(config);
    let exam = match &validation {
        Some(questions) => Some(Exam::new(&lesson, &own, questions, &dataset, &judge)?),
        None => None,
    };
    if settings.recipe == RecipeName::Denoiser {
        let DenoiserSettings { width, depth, .. } = settings.denoiser;
        let shape = DenoiserConfig::new(width, depth, settings.noise_sigma);
        let denoiser = Denoiser::untrained(shape, config.seed, assistant.vlm.device())?;
        let step = |fit: &mut Fit<Denoiser>, _: Assumed| denoise::step(&lesson, fit, &assistant);
        course.run(&lesson, Fit::new(denoiser)?.averaged(settings.ema_decay)?, &step, None)
    } else {
        if let Some(text) = chosen.describe(&assistant)? {
            progress.note(&text);
        }
        let is_adversarial = settings.recipe.is_adversarial();
        let step = |fit: &mut Fit<Student>, assumed: Assumed| {
            if settings.recipe.is_grpo() {
                let (reference, max_new_tokens) = (fit.learner.reference(), config.max_new_tokens);
                let (reference, judge) = (reference.as_deref(), &judge);
                let sampling = Sampling { reference, judge, max_new_tokens, is_adversarial, assumed };
                let report = grpo::step(&lesson, fit, &sampling)?;
                let GrpoSettings { ref_sync_steps, ref_sync_alpha, .. } = settings.grpo;
                if ref_sync_steps > 0 && (fit.step + 1).is_multiple_of(ref_sync_steps as u64) {
                    fit.learner.move_reference(ref_sync_alpha)?;
                }
                Ok(report)
            } else if settings.recipe == RecipeName::Trades {
                trades::step(&lesson, fit)
            } else {
                sft::step(&lesson, fit, is_adversarial)
            }
        };
        let follows = settings.grpo.ref_sync_steps > 0;
        let student = Student::new(assistant, adapter)?.with_reference(reference, follows)?;
        let fit = Fit::new(student)?.averaged(settings.ema_decay)?;
        let output = course.run(&lesson, fit, &step, exam.as_ref())?;
        judge.finish()?;
        Ok(output)
    }
}

/// What the names of the vision tower's parameters begin with, those of its merger too.
pub(super) const VISION: &str = "model.visual.";

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

    fn run<L: Learner>(
        &mut self,
        lesson: &Lesson<'_>,
        mut fit: Fit<L>,
        step: Step<'_, L>,
        exam: Option<&Exam<'_>>,
    ) -> Result<PathBuf> {
        let root = self.run.path("checkpoints");
        fit.resume(&root)?;
        room::check_disk(fit.checkpoint_bytes(), lesson.config, &root, self.progress);
        self.run.rewind_to(fit.step)?;
        validation::forget_after(self.run, fit.step)?;
        let saved = (fit.step > 0).then_some(fit.step);
        let mut keeper = Keeper { root, lesson, exam, saved, best: None };
        keeper.find_best(self.run)?;
        let logged = self.run.read_metrics()?;
        let num_tokens = logged.last().and_then(|line| line["num_tokens"].as_u64()).unwrap_or(0);
        let mut so_far = SoFar { num_tokens, watch: Watch::new(&lesson.config.watch, &logged) };
        let num_steps = lesson.config.num_steps as u64;
        self.begin(lesson, fit.step);
        loop {
            if keeper.is_due(fit.step) {
                keeper.save(&fit, self.run)?;
            }
            if let Some(exam) = exam
                && exam.is_due(fit.step, num_steps)
            {
                self.validate(exam, &fit, &mut keeper)?;
                self.begin(lesson, fit.step);
            }
            // Only now: before its examination nobody knows which checkpoint is the best.
            keeper.rotate()?;
            if fit.step == num_steps {
                break;
            }
            if self.run.stop_requested() {
                keeper.save(&fit, self.run)?;
                keeper.rotate()?;
                return Err(Error::Stopped);
            }
            let stepped = step(&mut fit, Assumed::default());
            lesson.exit.open();
            let report = match stepped {
                // Nothing has moved yet: the step begins anew when the run goes on.
                Err(Error::Stopped) if fit.moved_in != Some(fit.step) => continue,
                stepped => stepped
                    .map_err(|error| failure::explain(lesson, &fit, self.run.dir(), Part::Step, error))?,
            };
            fit.step += 1;
            if let Some(warning) = fit.take_warning() {
                self.progress.note(&warning);
            }
            self.write_down(lesson, fit.step, report, &mut so_far)?;
        }
        self.progress.finish();
        Ok(keeper.root.join(format!("step-{}", fit.step)))
    }
}

impl Whole<'_> {
    fn begin(&self, lesson: &Lesson<'_>, step: u64) {
        self.progress.start(lesson.config.num_steps, step as usize, lesson.config.recipe.word());
    }

    /// Examines the model unless that was done before, and keeps it where it is the best so far.
    fn validate<L: Learner>(&mut self, exam: &Exam<'_>, fit: &Fit<L>, keeper: &mut Keeper<'_>) -> Result<()> {
        let lines = self.run.read_validation()?;
        let is_done = lines.last().is_some_and(|line| line["step"].as_u64() == Some(fit.step));
        if let Some(assistant) = fit.learner.assistant().filter(|_| !is_done) {
            let started = Instant::now();
            match exam.sit(assistant, fit.step, self.run, self.progress) {
                Ok(line) => {
                    self.run.timing("validation", started.elapsed().as_secs_f64(), &[])?;
                    self.run.validation(&line)?;
                    self.progress.note(&validation::describe(&line));
                }
                // No checkpoint goes before the examination is over: it may make another one the best.
                Err(Error::Stopped) => {
                    keeper.save(fit, self.run)?;
                    return Err(Error::Stopped);
                }
                Err(error) => {
                    let (lesson, dir) = (keeper.lesson, self.run.dir());
                    return Err(failure::explain(lesson, fit, dir, Part::Validation, error));
                }
            }
            let before = keeper.best;
            if keeper.find_best(self.run)? != before {
                keeper.save(fit, self.run)?;
            }
        }
        // After an examination of an earlier process too: a kill may have come between its line and this.
        validation::remove_old_images(self.run, &self.run.read_validation()?, keeper.best)
    }

    /// Appends what a step reports to the run's files.
    fn write_down(
        &mut self,
        lesson: &Lesson<'_>,
        step: u64,
        report: StepReport,
        so_far: &mut SoFar<'_>,
    ) -> Result<()> {
        let mut metrics = serde_json::Map::new();
        metrics.insert("step".into(), json!(step));
        let seen = step as f64 * lesson.config.batch_size as f64;
        metrics.insert("epoch".into(), json!(seen / lesson.samples.len() as f64));
        if report.num_tokens > 0 {
            so_far.num_tokens += report.num_tokens;
            metrics.insert("num_tokens".into(), json!(so_far.num_tokens));
        }
        metrics.extend(report.metrics);
        for completion in report.completions {
            let mut line = serde_json::Map::new();
            line.insert("step".into(), json!(step));
            if let Value::Object(fields) = completion {
                line.extend(fields);
            }
            self.run.completion(&line)?;
        }
        let shown: Vec<(&str, f64)> =
            SHOWN.iter().filter_map(|(key, short)| Some((*short, metrics.get(*key)?.as_f64()?))).collect();
        let seconds: f64 = report.phases.iter().map(|(_, seconds)| seconds).sum();
        self.progress.pace(report.num_tokens as f64 / seconds, &report.phases);
        self.progress.tick(step as usize, &shown);
        if let Some(pictures) = &report.pictures {
            self.run.pictures(step, &pictures.files, &pictures.about)?;
        }
        let lines = step::lines_of(metrics, &report.updates);
        for line in &lines {
            so_far.watch.report(line, self.run, self.progress)?;
        }
        self.run.updates(&lines)?;
        let mut figures = report.phases;
        figures.extend(peak_memory_bytes().map(|bytes| ("peak_memory_bytes", bytes as f64)));
        self.run.timing("step", seconds, &figures)
    }
}

/// What is carried from step to step.
struct SoFar<'a> {
    num_tokens: u64,
    watch: Watch<'a>,
}

/// Which checkpoints there are.
struct Keeper<'a> {
    root: PathBuf,
    lesson: &'a Lesson<'a>,
    exam: Option<&'a Exam<'a>>,
    /// The step last saved by this process, or resumed from.
    saved: Option<u64>,
    best: Option<Best>,
}

impl Keeper<'_> {
    fn is_due(&self, step: u64) -> bool {
        let (every, num_steps) = (self.lesson.config.save_every as u64, self.lesson.config.num_steps as u64);
        step > 0 && (step == num_steps || (every > 0 && step.is_multiple_of(every)))
    }

    /// Saves unless that was done already; before the first step there is nothing to save.
    fn save<L: Learner>(&mut self, fit: &Fit<L>, run: &Run) -> Result<()> {
        if fit.step > 0 && self.saved != Some(fit.step) {
            run.sync_logs()?;
            fit.save(&self.root)?;
            self.saved = Some(fit.step);
        }
        Ok(())
    }

    fn rotate(&self) -> Result<()> {
        let keep = self.lesson.config.keep_checkpoints;
        fit::rotate(&self.root, keep, &|step| self.is_due(step), self.best.map(|best| best.step))
    }

    /// Looks at all examinations for the best, and says in `checkpoints/best.json` which it is.
    fn find_best(&mut self, run: &Run) -> Result<Option<Best>> {
        let Some(exam) = self.exam else { return Ok(None) };
        let metric = exam.metric();
        self.best = validation::best(&run.read_validation()?, metric);
        let path = run.path(BEST);
        match self.best {
            Some(Best { step, value }) => {
                let fact = json!({
                    "step": step, "metric": metric.word(), "value": value, "checkpoint": format!("step-{step}"),
                });
                run.write_json(BEST, &fact)?;
            }
            // A run that was taken back to before its first examination.
            None if path.exists() => {
                std::fs::remove_file(&path).map_err(|error| Error::io("cannot remove", &path, error))?;
            }
            None => {}
        }
        Ok(self.best)
    }
}

/// Which checkpoint validation found best.
const BEST: &str = "checkpoints/best.json";

/// The figures a person watches, with the short words a progress bar has room for.
const SHOWN: [(&str, &str); 7] = [
    ("loss", "loss"),
    ("reward", "reward"),
    ("rewards/accuracy_adversarial/mean", "adv"),
    ("rewards/accuracy_clean/mean", "clean"),
    ("frac_groups_zero_std", "zero-var"),
    ("pgd_gain", "pgd gain"),
    ("psnr", "psnr"),
];
