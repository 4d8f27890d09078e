//! What every command that asks a model opens first, cheapest check first: settings, questions, checkpoint.
//!
//! Also the hashes that provenance keeps of them. No model is run here.

use super::config::{GenerationConfig, RunConfig, Scoring};
use super::grpo::Judge;
use super::items;
use super::job::Job;
use super::progress::Progress;
use super::run::{Run, Stop};
use crate::data::prompt::PromptTemplate;
use crate::data::{Dataset, DatasetConfig, ImageCheck, Problem, Sample, problem};
use crate::error::{Error, Result};
use crate::model::assistant::Assistant;
use crate::model::denoiser::{self, Denoiser};
use crate::model::hub::{self, Event, Location};
use crate::model::loader::Adaptation;
use crate::model::lora::{self, Adapter};
use crate::model::processor::ImageProcessorConfig;
use crate::model::weights::Weights;
use rayon::prelude::*;
use serde_json::{Map, Value, json};
use sha2::{Digest, Sha256};
use std::cell::Cell;
use std::collections::BTreeSet;
use std::fs::File;
use std::path::{Path, PathBuf};

/// A checkpoint with where it came from.
#[derive(Debug, Clone)]
pub struct OpenModel {
    /// Its directory.
    pub dir: PathBuf,
    /// The commit on the hub that it is, when it came from there.
    pub revision: Option<String>,
    /// The model, loaded without gradients.
    pub assistant: Assistant,
    /// Hash of the weights: see [`model_sha256`]; with an adapter or a denoiser, of the lines `HASH  model`,
    /// `HASH  adapter` and `HASH  denoiser`.
    pub sha256: String,
    /// Hash of the adapter's tensors, where there is one.
    pub adapter_sha256: Option<String>,
}

/// The settings about the model that can be refused without opening anything.
///
/// # Errors
/// A usage error when no model is named, a revision is named of one that is not on the hub, or there is no such prompt
/// or device.
pub fn check_settings(config: &RunConfig) -> Result<PromptTemplate> {
    let template: PromptTemplate = config.prompt.parse()?;
    let Some(model) = config.model.as_deref() else {
        return Err(Error::usage(
            "no model is named\n   = help: give `--model DIR`, a Hugging Face directory, or an id on the hub",
        ));
    };
    hub::check_revision(model, config.revision.as_deref())?;
    config.generation.sampling().check()?;
    if config.scoring == Scoring::Likelihood {
        require_greedy(config, "likelihoods are computed, nothing is generated")?;
    }
    config.backend().device()?;
    Ok(template)
}

/// Refuses `[generation]` where it would have no effect, or break what is claimed: `why`.
///
/// # Errors
/// A usage error for any of its settings.
pub fn require_greedy(config: &RunConfig, why: &str) -> Result<()> {
    if config.generation == GenerationConfig::default() {
        return Ok(());
    }
    Err(Error::usage(format!(
        "{why}: `generation` settings (temperature, top_k, top_p, min_p, repetition_penalty) cannot be used here\n   = help: leave them out"
    )))
}

/// As [`check_settings`], and that the run directory can be used.
///
/// # Errors
/// Those of [`check_settings`] and of [`Run::check`].
pub fn check_job(job: &Job<'_>) -> Result<PromptTemplate> {
    let template = check_settings(&job.config)?;
    note_idle_settings(job);
    Run::check(job.command, &job.config, job.resume)?;
    Ok(template)
}

/// Says which settings change nothing.
pub fn note_idle_settings(job: &Job<'_>) {
    for note in job.config.without_effect(job.command) {
        job.progress.note(&note);
    }
}

/// Where a model lies, fetched from the hub as far as it is not there yet: see [`hub::locate`]. Fetching ends early, to
/// be continued, when `stop` is raised.
///
/// # Errors
/// Those of [`hub::locate`]; [`Error::Stopped`].
pub fn locate_model(
    model: &str,
    revision: Option<&str>,
    stop: &Stop,
    progress: &dyn Progress,
) -> Result<Location> {
    let is_told = Cell::new(false);
    hub::locate(model, revision, &|event| {
        match event {
            Event::Begin { file, total, done } => progress.start_transfer(file, total, done),
            Event::Received(done) => progress.tick(done as usize, &[]),
            Event::End => progress.finish(),
            Event::Waiting(file) => {
                if !is_told.replace(true) {
                    progress.note(&format!("another process is fetching {file}: waiting for it"));
                }
            }
        }
        stop.check()
    })
}

/// Opens the checkpoint of a job; [`check_settings`] has passed.
///
/// # Errors
/// Those of [`locate_model`]; what is missing or wrong in the directory.
pub fn open_model(job: &Job<'_>) -> Result<OpenModel> {
    let config = &job.config;
    let model = config.model.as_deref().unwrap_or_default();
    let Location { dir, commit } = locate_model(model, config.revision.as_deref(), &job.stop, job.progress)?;
    let device = config.backend().device()?;
    let adapter = config.adapter.as_deref().map(Adapter::load).transpose()?;
    let adaptation = adapter.as_ref().map_or(Adaptation::None, Adaptation::Active);
    let assistant = Assistant::load_adapted(&dir, adaptation, config.precision(), &|_| false, &device)?;
    let adapter_sha256 = config.adapter.as_deref().map(adapter_sha256).transpose()?;
    let denoiser_sha256 = config.denoiser.as_deref().map(denoiser_sha256).transpose()?;
    let mut sha256 = model_sha256(&dir)?;
    if adapter_sha256.is_some() || denoiser_sha256.is_some() {
        let parts = [
            ("model", Some(&sha256)),
            ("adapter", adapter_sha256.as_ref()),
            ("denoiser", denoiser_sha256.as_ref()),
        ];
        let lines: Vec<String> =
            parts.iter().filter_map(|(name, hash)| hash.map(|hash| format!("{hash}  {name}\n"))).collect();
        sha256 = hex(&Sha256::digest(lines.concat()));
    }
    let assistant = fitted(config, assistant)?;
    Ok(OpenModel { dir, revision: commit, assistant, sha256, adapter_sha256 })
}

/// The model as `config` wants it: with its sizes of images, and behind the denoiser that it names.
///
/// # Errors
/// Those of [`within_limits`]; what is missing or wrong in the denoiser's directory.
pub fn fitted(config: &RunConfig, assistant: Assistant) -> Result<Assistant> {
    let image_processor = within_limits(config, assistant.image_processor)?;
    let vlm = match &config.denoiser {
        Some(dir) => {
            let denoiser = Denoiser::load(dir, assistant.vlm.device())?;
            assistant.vlm.behind(denoiser)
        }
        None => assistant.vlm,
    };
    Ok(Assistant { vlm, image_processor, ..assistant })
}

/// The image processor with the sizes that `config` sets in place of its own.
///
/// # Errors
/// A usage error when they do not go together with those of the checkpoint.
pub fn within_limits(config: &RunConfig, own: ImageProcessorConfig) -> Result<ImageProcessorConfig> {
    if config.min_pixels.is_none() && config.max_pixels.is_none() {
        return Ok(own);
    }
    let limited = ImageProcessorConfig {
        min_pixels: config.min_pixels.unwrap_or(own.min_pixels),
        max_pixels: config.max_pixels.unwrap_or(own.max_pixels),
        ..own
    };
    if !limited.do_resize {
        return Err(Error::usage(
            "`min_pixels` and `max_pixels` have no effect: this checkpoint does not resize pictures\n   = help: leave both out",
        ));
    }
    limited.check().map_err(|error| {
        Error::usage(format!(
            "with `min_pixels` {} and `max_pixels` {}: {error}\n   = help: what is not set is the checkpoint's own",
            limited.min_pixels, limited.max_pixels
        ))
    })?;
    Ok(limited)
}

/// The questions of a job to `ask`, and those that the option prior counts when a training split is named. Images are decoded
/// once to see: a run of days must not end at a damaged one on its way.
///
/// # Errors
/// Those of [`DatasetConfig::survey`]; a data error that lists whatever is wrong with records and images, unless it may be left
/// out, or when nothing is left; when asked to stop.
pub fn open_questions(job: &Job<'_>, ask: &str) -> Result<(Dataset, Option<Dataset>)> {
    let data = job.config.data.dataset();
    let mut dataset = DatasetConfig { shard: None, ..data.clone() }.survey(ImageCheck::Exist)?;
    // A slip elsewhere is told before images are looked at, but for what is wrong with the records themselves.
    let model = job.config.model.as_deref().unwrap_or_default();
    let train = match hub::check_place(model).and_then(|()| data.load_train()) {
        Err(error) if dataset.skipped.is_empty() => return Err(error),
        found => found,
    };
    let take_shard =
        |dataset: &mut Dataset| data.shard.into_iter().for_each(|shard| dataset.take_shard(shard));
    // Shards divide what is left of all, and pair their questions with images of all: they must agree on what that is. Where
    // nothing may be left out each looks at its own.
    if !data.skip_invalid {
        take_shard(&mut dataset);
    }
    items::leave_out_damaged(&mut [&mut dataset], |_| (), &job.stop, job.progress)?;
    if data.skip_invalid {
        take_shard(&mut dataset);
    }
    settle(&dataset, data.skip_invalid, job.progress)?;
    dataset.require_population()?;
    items::require_some(&dataset, ask)?;
    Ok((dataset, train?))
}

/// Refuses what is wrong with the questions, or says how much of them is left out for it where it may be.
///
/// # Errors
/// A data error that lists the problems, also where they leave nothing.
fn settle(dataset: &Dataset, skip_invalid: bool, progress: &dyn Progress) -> Result<()> {
    if !skip_invalid || dataset.population().is_empty() {
        problem::refuse(&dataset.skipped)?;
    }
    note_left_out(&dataset.skipped, progress);
    Ok(())
}

/// Says how much is wrong with the records that were left out: once in a run, by whoever opens the questions.
pub fn note_left_out(skipped: &[Problem], progress: &dyn Progress) {
    if !skipped.is_empty() {
        progress.note(&format!("{}: the records are left out", problem::counted(skipped.len())));
    }
}

/// The samples in the order in which every run works and writes: by id, so that neither the order of the files nor
/// shards change a byte.
pub fn in_item_order(samples: &[Sample]) -> Vec<&Sample> {
    let mut sorted: Vec<&Sample> = samples.iter().collect();
    sorted.sort_unstable_by(|a, b| a.id.cmp(&b.id));
    sorted
}

/// Notes what the numbers depend on besides the settings: questions, images, prompt, training questions, and how
/// many items the whole run has (which `merge` looks at).
///
/// # Errors
/// A usage error when a resumed run began with others; a data error when an image cannot be read.
pub fn note_questions(
    run: &mut Run,
    dataset: &Dataset,
    train: Option<&Dataset>,
    template: PromptTemplate,
) -> Result<()> {
    run.provenance("items", json!(dataset.population().len()))?;
    run.provenance("data_sha256", json!(questions_sha256(dataset.population())?))?;
    if let Some(train) = train {
        run.provenance("train_data_sha256", json!(questions_sha256(&train.samples)?))?;
    }
    if !dataset.skipped.is_empty() {
        run.provenance("skipped_problems", json!(dataset.skipped.len()))?;
    }
    run.provenance("images_sha256", json!(images_sha256(dataset)?))?;
    run.provenance("prompt_sha256", json!(hex(&Sha256::digest(template.wording()))))
}

/// Notes the questions that a training is examined on: its best checkpoint is the best on these.
///
/// # Errors
/// As [`note_questions`].
pub fn note_examined(run: &mut Run, dataset: &Dataset) -> Result<()> {
    run.provenance("validation_data_sha256", json!(questions_sha256(&dataset.samples)?))?;
    run.provenance("validation_images_sha256", json!(images_sha256(dataset)?))
}

/// Notes the checkpoint: the commit on the hub, a hash of each of its files, and of the weights as a whole.
///
/// # Errors
/// As [`note_questions`].
pub fn note_model(run: &mut Run, model: &OpenModel) -> Result<()> {
    note_revision(run, model.revision.as_deref())?;
    run.provenance("model_sha256", json!(model.sha256))?;
    if let Some(adapter) = &model.adapter_sha256 {
        run.provenance("adapter_sha256", json!(adapter))?;
    }
    note_files(run, "model_files", &model.dir, &MODEL_FILES)?;
    run.provenance("chat_template_sha256", json!(hex(&Sha256::digest(model.assistant.chat.source()))))
}

/// Notes the commit of a model that came from the hub.
///
/// # Errors
/// As [`note_questions`].
pub fn note_revision(run: &mut Run, revision: Option<&str>) -> Result<()> {
    revision.map_or(Ok(()), |revision| run.provenance("model_revision", json!(revision)))
}

/// The hash of a checkpoint's weights: what `sha256sum model.safetensors` prints; of several files the hash of the
/// lines that it prints for them in the order of their names.
///
/// # Errors
/// When a file cannot be read.
pub fn model_sha256(dir: &Path) -> Result<String> {
    let mut paths: Vec<PathBuf> = Weights::open(dir)?.paths().map(Path::to_path_buf).collect();
    paths.sort();
    let hashes: Vec<String> = paths.par_iter().map(|path| file_sha256(path)).collect::<Result<_>>()?;
    if let [only] = hashes.as_slice() {
        return Ok(only.clone());
    }
    let mut hasher = Sha256::new();
    for (hash, path) in hashes.iter().zip(&paths) {
        hasher.update(format!("{hash}  {}\n", file_name(path)));
    }
    Ok(hex(&hasher.finalize()))
}

/// The hash of an adapter's tensors: what `sha256sum adapter_model.safetensors` prints.
///
/// # Errors
/// When the file cannot be read.
pub fn adapter_sha256(dir: &Path) -> Result<String> {
    file_sha256(&dir.join(lora::TENSOR_FILE))
}

/// The hash of a denoiser's tensors: what `sha256sum model.safetensors` prints.
///
/// # Errors
/// When the file cannot be read.
pub fn denoiser_sha256(dir: &Path) -> Result<String> {
    file_sha256(&dir.join(denoiser::TENSOR_FILE))
}

/// Notes the denoiser in front of the model, if there is one.
///
/// # Errors
/// As [`note_questions`].
pub fn note_denoiser(run: &mut Run, config: &RunConfig) -> Result<()> {
    let Some(dir) = &config.denoiser else { return Ok(()) };
    run.provenance("denoiser_sha256", json!(denoiser_sha256(dir)?))?;
    note_files(run, "denoiser_files", dir, &[denoiser::CONFIG_FILE])
}

/// Notes the reward command: its words, the names of its rewards, and a hash of each file among its arguments.
///
/// # Errors
/// As [`note_questions`]; when a file cannot be read.
pub fn note_reward_command(run: &mut Run, config: &RunConfig, judge: &Judge) -> Result<()> {
    let (Some(command), Some(names)) = (&config.train.grpo.reward_command, judge.command_names()) else {
        return Ok(());
    };
    run.provenance("reward_command", json!(command))?;
    run.provenance("reward_command_names", json!(names))?;
    let files = command.iter().filter(|word| Path::new(word).is_file());
    let hashes: Map<String, Value> =
        files.map(|word| Ok((word.clone(), json!(file_sha256(Path::new(word))?)))).collect::<Result<_>>()?;
    run.provenance("reward_command_files", Value::Object(hashes))
}

/// The small files that decide, beside the weights, what a checkpoint says.
const MODEL_FILES: [&str; 8] = [
    "chat_template.jinja",
    "chat_template.json",
    "config.json",
    "generation_config.json",
    "preprocessor_config.json",
    "processor_config.json",
    "tokenizer.json",
    "tokenizer_config.json",
];

/// Notes the hashes of those of the files `names` that are in `dir`.
fn note_files(run: &mut Run, key: &str, dir: &Path, names: &[&str]) -> Result<()> {
    let present = names.iter().filter(|name| dir.join(name).is_file());
    let hashes: Map<String, Value> = present
        .map(|name| Ok(((*name).to_owned(), json!(file_sha256(&dir.join(name))?))))
        .collect::<Result<_>>()?;
    run.provenance(key, Value::Object(hashes))
}

/// Notes what a training starts from: the checkpoint's weights and the files beside them that decide what it says, and the
/// adapter with its settings.
///
/// # Errors
/// As [`note_questions`].
pub fn note_start(run: &mut Run, model: Option<&Location>, adapter: Option<&Path>) -> Result<()> {
    if let Some(model) = model {
        note_revision(run, model.commit.as_deref())?;
        run.provenance("model_sha256", json!(model_sha256(&model.dir)?))?;
        note_files(run, "model_files", &model.dir, &MODEL_FILES)?;
    }
    if let Some(dir) = adapter {
        run.provenance("adapter_sha256", json!(adapter_sha256(dir)?))?;
        note_files(run, "adapter_files", dir, &[lora::CONFIG_FILE])?;
    }
    Ok(())
}

/// Hash of the questions as records, in the order of their ids.
fn questions_sha256(samples: &[Sample]) -> Result<String> {
    let mut hasher = Sha256::new();
    for sample in in_item_order(samples) {
        hasher.update(serde_json::to_vec(sample).map_err(anyhow::Error::from)?);
        hasher.update(b"\n");
    }
    Ok(hex(&hasher.finalize()))
}

/// Hash of the image files of this process's share, in the order of their paths.
fn images_sha256(dataset: &Dataset) -> Result<String> {
    let paths: BTreeSet<&PathBuf> = dataset.samples.iter().map(|sample| &sample.image).collect();
    let paths: Vec<&PathBuf> = paths.into_iter().collect();
    let hashes: Vec<String> =
        paths.par_iter().map(|path| file_sha256(&dataset.root.join(path))).collect::<Result<_>>()?;
    Ok(hex(&Sha256::digest(hashes.join("\n"))))
}

/// SHA-256 of a file's content, in hexadecimal.
///
/// # Errors
/// When it cannot be read.
pub fn file_sha256(path: &Path) -> Result<String> {
    let failed = |error| Error::io("cannot read", path, error);
    let mut file = File::open(path).map_err(failed)?;
    let mut hasher = Sha256::new();
    std::io::copy(&mut file, &mut hasher).map_err(failed)?;
    Ok(hex(&hasher.finalize()))
}

fn hex(bytes: &[u8]) -> String {
    let digit = |value: u8| char::from(b"0123456789abcdef"[usize::from(value)]);
    bytes.iter().flat_map(|byte| [digit(byte >> 4), digit(byte & 15)]).collect()
}

fn file_name(path: &Path) -> String {
    path.file_name().unwrap_or_default().to_string_lossy().into_owned()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn sizes_of_pictures_that_have_no_effect_or_contradict_are_refused_with_a_remedy() {
        let config = RunConfig { max_pixels: Some(10), ..RunConfig::default() };
        let own = ImageProcessorConfig::default();
        assert_eq!(within_limits(&RunConfig::default(), own.clone()).unwrap(), own);
        for processor in [ImageProcessorConfig { do_resize: false, ..own.clone() }, own] {
            let error = within_limits(&config, processor).unwrap_err();
            assert_eq!(error.status(), crate::error::ExitStatus::Usage, "{error}");
            assert!(error.to_string().contains("   = help: "), "{error}");
        }
    }
}
