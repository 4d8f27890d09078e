//! A step, or an examination, that came to numbers that are not finite: where they began, and a dump of its batch.
//!
//! While a step runs, [`Evidence`] keeps what it works on. When it fails, [`explain`] looks through the trained weights, walks
//! the batch forward until a tensor is not finite, and writes `failure/step-N/`; of an examination `failure/validation-N/`, with
//! the questions that it had come to. Nothing is repaired, and checkpoints are left as they are: resuming repeats the steps from
//! the last one, to the same failure.

use super::checkpoint::{self, saved_steps};
use super::fit::{self, Fit, Learner, Saved};
use super::items;
use super::lesson::Lesson;
use super::run::write_atomic;
use crate::data::Sample;
use crate::error::{Error, Result};
use crate::model::assistant::Assistant;
use crate::model::generate::Prompt;
use crate::model::processor::ProcessedImage;
use crate::model::weights;
use crate::nn::recompute::Stage;
use crate::pixels::{RgbImage8, decode};
use crate::roles::policy::{self, Scoring};
use candle_core::{DType, Device, Tensor};
use serde_json::{Value, json};
use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex, PoisonError};

/// The file of a dump that says what happened.
pub const REPORT: &str = "failure.json";

/// The images of a dump, exactly: `pixels.I`, `[3, height, width]` in float32, for place I of the batch; `clean.I` beside it
/// where a step compares the two.
pub const PIXELS: &str = "pixels.safetensors";

/// What a step works on, as far as it has come. Lists go by the places of the batch.
#[derive(Debug, Clone, Default)]
pub struct Noted {
    /// What it was at: `data`, `attack`, `rollout` or `update`; `validation` in an examination.
    pub phase: &'static str,
    /// Its questions, with their options in this step's order.
    pub samples: Vec<Sample>,
    /// They in tokens.
    pub prompts: Vec<Prompt>,
    /// The right completion of each.
    pub targets: Vec<Vec<u32>>,
    /// The clean images, at the model's resolution.
    pub images: Vec<Arc<ProcessedImage>>,
    /// The images as the model sees them, attacked and noisy: tensors `[n, 3, height, width]` in [0, 1], one place after another;
    /// none before they are made.
    pub pixels: Vec<Tensor>,
    /// Of recipes that compare the two, what `pixels` are compared with: the same images without the attack, or without the noise
    /// that a denoiser takes off; none elsewhere.
    pub clean: Vec<Tensor>,
    /// The adversary's budget.
    pub epsilon: Option<f64>,
    /// Sampled completions in tokens.
    pub completions: Vec<Vec<Vec<u32>>>,
    /// What they are worth.
    pub rewards: Vec<Vec<f64>>,
    /// Relative to their group.
    pub advantages: Vec<Vec<f64>>,
    /// Temperature of the log-probabilities; 0 stands for 1, that of supervised recipes.
    pub temperature: f64,
}

/// Keeps what the present step works on; no numbers are copied but token ids.
#[derive(Debug, Default)]
pub struct Evidence(Mutex<Noted>);

impl Evidence {
    /// Changes what is known.
    pub fn note(&self, change: impl FnOnce(&mut Noted)) {
        change(&mut self.0.lock().unwrap_or_else(PoisonError::into_inner));
    }

    /// What is known.
    pub fn noted(&self) -> Noted {
        self.0.lock().unwrap_or_else(PoisonError::into_inner).clone()
    }
}

/// What a walk of a batch through a model found.
#[derive(Debug, Clone, Default)]
pub struct Walk {
    /// The first tensor that is not finite and the place of its question: `model.language_model.layers.3 output is NaN ...`.
    pub first_bad: Option<(usize, String)>,
    /// For each place: negative log-likelihood by token of the right completion, or of each sampled one, and their text.
    pub items: Vec<Value>,
}

/// Walks every question of a batch, one at a time, through the stages of the model, and names the first whose output is not
/// finite.
///
/// # Errors
/// When the batch cannot be run.
pub fn walk(assistant: &Assistant, noted: &Noted) -> Result<Walk> {
    let mut found = Walk::default();
    for (place, prompt) in noted.prompts.iter().enumerate() {
        let completions = match noted.completions.get(place) {
            Some(sampled) if !sampled.is_empty() => sampled.clone(),
            _ => vec![noted.targets[place].clone()],
        };
        let pixels = seen(assistant, noted, place)?;
        let scoring =
            Scoring::new(assistant, std::slice::from_ref(prompt), std::slice::from_ref(&completions))?;
        let (bad, log_probs) = walk_one(assistant, noted, &scoring, pixels)?;
        // Either side of a comparison may be the one that fails.
        let clean = items::pick(&noted.clean, &[place])?;
        let clean_bad = if clean.is_empty() { None } else { walk_one(assistant, noted, &scoring, clean)?.0 };
        let bad = clean_bad.map(|bad| format!("{bad} (clean image)")).or(bad);
        if let (None, Some(bad)) = (&found.first_bad, bad) {
            found.first_bad = Some((place, bad));
        }
        let losses = scoring.spans[0].iter().map(|span| {
            let values = log_probs.get(span.clone()).unwrap_or_default();
            number(-values.iter().map(|v| f64::from(*v)).sum::<f64>() / values.len() as f64)
        });
        let texts = completions.iter().map(|ids| assistant.tokenizer.decode(ids, false));
        found.items.push(json!({
            "losses": losses.collect::<Vec<_>>(),
            "texts": texts.collect::<Result<Vec<_>>>()?,
        }));
    }
    Ok(found)
}

/// The image of one place as the model sees it, or the clean one when it is not made yet; none for a question without one.
fn seen(assistant: &Assistant, noted: &Noted, place: usize) -> Result<Vec<Tensor>> {
    if !noted.pixels.is_empty() {
        return items::pick(&noted.pixels, &[place]);
    }
    match noted.images.get(place) {
        Some(_) => items::stack(assistant, &noted.images[place..=place]),
        None => Ok(Vec::new()),
    }
}

/// The first tensor that is not finite, and the log-probabilities of the target tokens, none where the walk ended before them.
fn walk_one(
    assistant: &Assistant,
    noted: &Noted,
    scoring: &Scoring,
    pixels: Vec<Tensor>,
) -> Result<(Option<String>, Vec<f32>)> {
    if let Some(bad) = first_bad("the image", &pixels)? {
        return Ok((Some(bad), Vec::new()));
    }
    let plan = if pixels.is_empty() {
        None
    } else {
        Some(assistant.vlm.vision_plan(&policy::grids_of(assistant, &pixels)?)?)
    };
    let (vision, text) = ("model.visual", "model.language_model");
    let mut stages: Vec<(String, Stage<'_>)> = Vec::new();
    if let Some(plan) = &plan {
        let all = assistant.vlm.vision_stages(plan);
        let last = all.len() - 1;
        stages.extend(all.into_iter().enumerate().map(|(index, stage)| match index {
            0 => (format!("{vision}.patch_embed"), stage),
            index if index == last => (format!("{vision}.merger"), stage),
            index => (format!("{vision}.blocks.{}", index - 1), stage),
        }));
    }
    let all = scoring.stages(assistant);
    let last = all.len() - 1;
    stages.extend(all.into_iter().enumerate().map(|(index, stage)| match index {
        0 => (format!("{text}.embed_tokens"), stage),
        index if index == last => (format!("{text}.norm"), stage),
        index => (format!("{text}.layers.{}", index - 1), stage),
    }));
    let mut state = pixels;
    for (name, stage) in stages {
        state = stage(&state)?;
        if let Some(bad) = first_bad(&format!("`{name} output`"), &state)? {
            return Ok((Some(bad), Vec::new()));
        }
    }
    let temperature = if noted.temperature > 0.0 { noted.temperature } else { 1.0 };
    let log_probs = scoring.log_probs(assistant, &state[0], temperature)?;
    let bad =
        first_bad("`lm_head` (the log-probabilities of the completion)", std::slice::from_ref(&log_probs))?;
    Ok((bad, log_probs.to_vec1()?))
}

/// What is wrong with the first of `tensors` that holds a number that is not finite.
pub(super) fn first_bad(name: &str, tensors: &[Tensor]) -> Result<Option<String>> {
    for tensor in tensors {
        let values: Vec<f32> = floats(tensor)?;
        if let Some(at) = values.iter().position(|value| !value.is_finite()) {
            return Ok(Some(format!("{name} is {} at element {at} of {:?}", values[at], tensor.dims())));
        }
    }
    Ok(None)
}

fn floats(tensor: &Tensor) -> Result<Vec<f32>> {
    Ok(tensor.detach().to_device(&Device::Cpu)?.to_dtype(DType::F32)?.flatten_all()?.to_vec1()?)
}

/// A number, or the word for one that JSON does not have.
pub(super) fn number(value: f64) -> Value {
    if value.is_finite() { json!(value) } else { json!(value.to_string()) }
}

/// Which part of a training failed.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Part {
    /// The step after those that are done.
    Step,
    /// The examination after them.
    Validation,
}

impl Part {
    /// The step that the failure is named by, from 1, after `done` steps.
    fn step(self, done: u64) -> u64 {
        match self {
            Self::Step => done + 1,
            Self::Validation => done,
        }
    }

    /// Where the dump goes, below the run directory.
    fn folder(self, done: u64) -> String {
        let word = match self {
            Self::Step => "step",
            Self::Validation => "validation",
        };
        format!("failure/{word}-{}", self.step(done))
    }

    /// Adds which step and questions an error is about; of an examination the error names the questions already.
    fn located(self, lesson: &Lesson<'_>, error: Error, done: u64) -> Error {
        match self {
            Self::Step => lesson.located(error, done),
            Self::Validation => error.at(&format!("validation after step {done}")),
        }
    }
}

/// Adds to an error of a step which step and questions it is about; to one of numbers that are not finite, in a step or in an
/// examination, also the tensor they began in, and where the batch was written.
pub fn explain<L: Learner>(lesson: &Lesson<'_>, fit: &Fit<L>, run: &Path, part: Part, error: Error) -> Error {
    if !matches!(error, Error::NonFinite(_)) {
        return match part {
            Part::Step => lesson.located(error, fit.step),
            Part::Validation => error,
        };
    }
    let what = error.to_string();
    let noted = lesson.evidence.noted();
    // The weights first: one that is not finite spoils everything behind it.
    let weight = fit.learner.trained().into_iter().find_map(|(name, var)| {
        first_bad(&format!("weights are non-finite: `{name}`"), &[var.as_tensor().clone()]).ok().flatten()
    });
    // A walk that fails says nothing; what it was to explain is known all the same.
    let walk = fit.learner.walk(&noted).unwrap_or_default();
    let ids: Vec<&str> = match part {
        Part::Step => lesson.picked(fit.step).iter().map(|&i| lesson.samples[i].id.as_str()).collect(),
        Part::Validation => noted.samples.iter().map(|sample| sample.id.as_str()).collect(),
    };
    let at = walk.first_bad.as_ref().map(|(place, bad)| {
        let id = ids.get(*place).copied().unwrap_or_default();
        format!("{bad}, question `{id}`")
    });
    let began: Vec<String> = weight.into_iter().chain(at).collect();
    let dir = run.join(part.folder(fit.step));
    let batch = Batch { part, noted: &noted, walk: &walk, ids: &ids };
    let dumped = dump(&dir, run, lesson, fit, &batch, (&what, &began));
    let mut error = part.located(lesson, error, fit.step);
    for place in &began {
        error = error.at(&format!("first not finite: {place}"));
    }
    let error = match dumped {
        Ok(()) => error.at(&format!("the batch lies in {}", dir.display())),
        Err(reason) => error.at(&format!("the batch could not be written down: {reason}")),
    };
    let is_image = began.first().is_some_and(|what| what.starts_with("the image"));
    let (advised, suspect) = advised(&error.to_string(), is_image, fit.updates, !began.is_empty());
    let then = begin_again(fit, &run.join("checkpoints"), suspect);
    Error::NonFinite(format!("{advised}; {then}"))
}

/// What may have made numbers that are not finite.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Suspect {
    /// What the error itself says something about, such as a reward.
    Named,
    /// The image, before the model saw it.
    Image,
    /// The weights as they were loaded: no update has moved them.
    Loaded,
    /// The last update of the weights.
    Update,
}

impl Suspect {
    /// After `updates`; `own` is what the error itself says to do.
    fn of(own: Option<&str>, is_image: bool, updates: u64) -> Self {
        match own {
            Some(own) if !own.contains("the weights") => Self::Named,
            _ if is_image => Self::Image,
            _ if updates == 0 => Self::Loaded,
            _ => Self::Update,
        }
    }
}

/// An error with what to do about it, and what is suspected: what it says itself, unless that sends one to the weights of the
/// checkpoint and they are not what is suspected.
fn advised(text: &str, is_image: bool, updates: u64, is_found: bool) -> (String, Suspect) {
    let (what, own) = match text.split_once("\n   = help: ") {
        Some((what, own)) => (what, Some(own)),
        None => (text, None),
    };
    let suspect = Suspect::of(own, is_image, updates);
    let help = match (suspect, own) {
        (Suspect::Image, _) => {
            "the image was no number before the model saw it: look at `train.noise_sigma` and `train.adversary`"
        }
        (Suspect::Update, _) => {
            "lower `train.learning_rate`, add `train.warmup_steps`, or set `train.max_grad_norm`"
        }
        (_, Some(own)) => own,
        (_, None) if !is_found => {
            "no update has moved the weights yet, and what they give is finite: look at what the loss makes of it, such as `train.adversary.trades_beta`, `train.noise_sigma` and rewards"
        }
        (_, None) => {
            "no update has moved the weights yet: look at those that were loaded (`--model`, `--adapter`) and at what they are rounded to (`--dtype`, `--arithmetic`)"
        }
    };
    (format!("{what}\n   = help: {help}"), suspect)
}

/// What to begin again from: the newest checkpoint below `root` that what is suspected cannot have spoilt.
fn begin_again<L: Learner>(fit: &Fit<L>, root: &Path, suspect: Suspect) -> String {
    if suspect == Suspect::Loaded {
        return "then begin again with another `--out`".to_owned();
    }
    let is_update = suspect == Suspect::Update;
    // Unless the update is one of the step that failed, a checkpoint of all the steps that are done holds what it made, which may
    // be finite and far too large.
    let is_spoilt = is_update && fit.moved_in != Some(fit.step);
    let most = if is_spoilt { fit.step.saturating_sub(1) } else { fit.step };
    match (newest_sound(&fit.learner, root, most), saved_steps(root).into_iter().max()) {
        (Some(step), _) if is_update => format!(
            "the last update is the suspect, so with other settings begin a new run from the checkpoint of step {step}, which is older than it (`--model` or `--adapter`, and another `--out`)"
        ),
        (Some(step), _) => format!(
            "with other settings begin a new run from the checkpoint of step {step} (`--model` or `--adapter`, and another `--out`)"
        ),
        (None, Some(last)) => format!(
            "the checkpoint of step {last} may hold what went wrong, and no sound one is older: begin again from the start with other settings and another `--out`"
        ),
        (None, None) => {
            "no checkpoint was written yet: begin again with other settings and another `--out`".to_owned()
        }
    }
}

/// The newest checkpoint below `root` of at most `most` steps whose trained weights can be read and are all finite.
fn newest_sound<L: Learner>(learner: &L, root: &Path, most: u64) -> Option<u64> {
    let mut steps = saved_steps(root);
    steps.retain(|step| *step <= most);
    steps.sort_unstable();
    steps.into_iter().rev().find(|step| is_sound(learner, &checkpoint::named(root, *step)))
}

/// Whether the trained weights of the checkpoint in `dir` can be read and are all finite.
fn is_sound<L: Learner>(learner: &L, dir: &Path) -> bool {
    let Ok(saved) = learner.open(dir) else { return false };
    learner.trained().iter().all(|(name, var)| {
        let numbers = match &saved {
            Saved::Model(weights) => weights.get(name, var.as_tensor().dims()),
            Saved::Tensors { file, root } => file.numbers(&format!("{root}{name}")),
        };
        numbers.is_ok_and(|numbers| numbers.not_finite().is_none())
    })
}

/// A failed batch.
struct Batch<'a> {
    part: Part,
    noted: &'a Noted,
    walk: &'a Walk,
    ids: &'a [&'a str],
}

/// Writes everything that the step depended on beside the weights, which the last checkpoint leads to.
fn dump<L: Learner>(
    dir: &Path,
    run: &Path,
    lesson: &Lesson<'_>,
    fit: &Fit<L>,
    batch: &Batch<'_>,
    (what, began): (&str, &[String]),
) -> Result<()> {
    let Batch { part, noted, walk, ids } = *batch;
    let step = part.step(fit.step);
    let shown = match part {
        _ if !noted.pixels.is_empty() => "as the model saw them",
        Part::Step => "clean: the step ended before its own were made",
        Part::Validation => "clean: attacked ones are not kept",
    };
    let images = dump_images(dir, noted, ids.len())?;
    let last = saved_steps(&run.join("checkpoints")).into_iter().max();
    let items: Vec<Value> = ids
        .iter()
        .enumerate()
        .map(|(place, id)| {
            let sample = noted.samples.get(place);
            let groups = |list: &[Vec<f64>]| {
                list.get(place).map(|group| group.iter().copied().map(number).collect::<Vec<_>>())
            };
            json!({
                "id": id,
                "question": sample,
                "prompt": sample.map(|sample| lesson.template.user_text(sample)),
                "prompt_ids": noted.prompts.get(place).map(|prompt| &prompt.ids),
                "target_ids": noted.targets.get(place),
                "completion_ids": noted.completions.get(place),
                "texts": walk.items.get(place).map(|item| item["texts"].clone()),
                "losses": walk.items.get(place).map(|item| item["losses"].clone()),
                "rewards": groups(&noted.rewards),
                "advantages": groups(&noted.advantages),
                "image": images.get(place),
            })
        })
        .collect();
    let report = json!({
        "what": what,
        "first_not_finite": began,
        "step": step,
        "phase": noted.phase,
        "updates": fit.updates,
        "ids": ids,
        "seed": lesson.seed,
        "learning_rate": number(fit::learning_rate_at(lesson.config, step.saturating_sub(1))),
        "epsilon": noted.epsilon,
        "train": lesson.config,
        "checkpoint": last.map(|last| checkpoint::named(Path::new("checkpoints"), last)),
        "images": shown,
        "reproduce": "run the same command with --resume: it goes on from `checkpoint` (or from the beginning) and repeats this to the bit",
        "items": items,
    });
    write_atomic(&dir.join(REPORT), format!("{report:#}\n").as_bytes())
}

/// Writes the images of a batch as PNG, rounded to eight bits, and as they are; gives the name of each PNG, null where there is
/// none.
fn dump_images(dir: &Path, noted: &Noted, count: usize) -> Result<Vec<Value>> {
    let (mut names, mut tensors) = (Vec::new(), Vec::new());
    for place in 0..count {
        let pixels = match (noted.pixels.is_empty(), noted.images.get(place)) {
            (false, _) => items::pick(&noted.pixels, &[place])?.into_iter().next(),
            (true, Some(image)) => Some(image.resized.to_tensor(&Device::Cpu)?.unsqueeze(0)?),
            (true, None) => None,
        };
        for clean in items::pick(&noted.clean, &[place])? {
            tensors.push((format!("clean.{place}"), exact(&clean)?));
        }
        let Some(pixels) = pixels else {
            names.push(Value::Null);
            continue;
        };
        let pixels = exact(&pixels)?;
        // A picture of numbers that are none cannot be shown; the exact ones are in the other file.
        names.push(match RgbImage8::from_tensor(&pixels) {
            Ok(image) => {
                let name = format!("image-{place}.png");
                write_atomic(&dir.join(&name), &decode::encode_png(&image)?)?;
                json!(name)
            }
            Err(_) => Value::Null,
        });
        tensors.push((format!("pixels.{place}"), pixels));
    }
    if !tensors.is_empty() {
        std::fs::create_dir_all(dir).map_err(|error| Error::io("cannot create the directory", dir, error))?;
        let path: PathBuf = dir.join(PIXELS);
        weights::save_file(&path, &tensors, &[])?;
    }
    Ok(names)
}

/// The one image of `[1, 3, height, width]` as a file takes it.
fn exact(image: &Tensor) -> Result<Tensor> {
    Ok(image.detach().to_device(&Device::Cpu)?.to_dtype(DType::F32)?.get(0)?.contiguous()?)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::model::weights::TensorFile;
    use candle_core::Var;

    /// One variable and nothing else.
    struct Toy(Var);

    impl Learner for Toy {
        fn trained(&self) -> Vec<(String, Var)> {
            vec![("a".to_owned(), self.0.clone())]
        }

        fn save(&self, dir: &Path) -> Result<()> {
            std::fs::create_dir_all(dir).unwrap();
            let tensors = [("a".to_owned(), self.0.as_tensor().detach())];
            weights::save_file(&dir.join("toy.safetensors"), &tensors, &[])
        }

        fn open(&self, dir: &Path) -> Result<Saved> {
            Ok(Saved::Tensors { file: TensorFile::open(&dir.join("toy.safetensors"))?, root: "" })
        }

        fn saved_bytes(&self) -> u64 {
            8
        }
    }

    #[test]
    fn a_run_begins_again_from_a_checkpoint_that_what_is_suspected_cannot_have_spoilt() {
        let dir = tempfile::tempdir().unwrap();
        let root = dir.path();
        let var = Var::from_slice(&[1f32, 2.0], 2, &Device::Cpu).unwrap();
        let mut fit = Fit::new(Toy(var)).unwrap();
        let first = begin_again(&fit, root, Suspect::Update);
        assert!(first.starts_with("no checkpoint was written yet"), "{first}");
        for (step, value) in [(2, 1e30f32), (4, 1e30), (6, f32::INFINITY)] {
            fit.step = step;
            fit.learner.0.set(&Tensor::new(&[value, 1.0], &Device::Cpu).unwrap()).unwrap();
            fit.save(root).unwrap();
        }
        let check = |fit: &mut Fit<Toy>, done: u64, suspect: Suspect, words: &str| {
            fit.step = done;
            let told = begin_again(fit, root, suspect);
            assert!(told.contains(words), "{done} {suspect:?}: {told}");
        };
        let fit = &mut fit;
        // Step 5 is under way, or an examination after step 4: that checkpoint holds what the last update made.
        fit.moved_in = Some(3);
        check(fit, 4, Suspect::Update, "from the checkpoint of step 2, which is older than it");
        check(fit, 5, Suspect::Update, "from the checkpoint of step 4, which is older than it");
        for suspect in [Suspect::Image, Suspect::Named] {
            check(fit, 4, suspect, "from the checkpoint of step 4 (");
            // The newest is not finite.
            check(fit, 6, suspect, "from the checkpoint of step 4 (");
        }
        check(fit, 7, Suspect::Update, "from the checkpoint of step 4, ");
        check(fit, 2, Suspect::Update, "begin again from the start");
        check(fit, 0, Suspect::Loaded, "then begin again with another `--out`");
        // The update is one of the step under way.
        fit.moved_in = Some(4);
        check(fit, 4, Suspect::Update, "from the checkpoint of step 4, which is older than it");
        // What cannot be read is no place to begin from.
        std::fs::remove_file(root.join("step-4/toy.safetensors")).unwrap();
        check(fit, 7, Suspect::Update, "from the checkpoint of step 2, ");
        check(fit, 6, Suspect::Image, "from the checkpoint of step 2 (");
    }

    #[test]
    fn the_help_of_an_error_stays_unless_training_made_the_weights_that_it_sends_one_to() {
        let doctor = "a logit is NaN while sampling\n  --> step 2\n   = help: check the weights with `safemed doctor` and the image's pixels";
        let option = "a log-probability is inf while scoring options\n   = help: the weights or the image's pixels hold numbers that are not finite";
        let command = "the reward command wrote NaN\n   = help: write null where no reward can be given";
        let plain = "the loss is NaN\n  --> step 2";
        for (text, is_image, updates, words) in [
            (doctor, false, 0, "check the weights with `safemed doctor`"),
            (doctor, false, 1, "lower `train.learning_rate`, add `train.warmup_steps`"),
            (doctor, true, 1, "the image was no number"),
            (option, false, 0, "the weights or the image's pixels"),
            (option, false, 3, "lower `train.learning_rate`"),
            (command, false, 0, "write null"),
            (command, false, 3, "write null"),
            // No learning rate has done anything yet.
            (plain, false, 0, "no update has moved the weights yet: look at those that were loaded"),
            (plain, false, 1, "lower `train.learning_rate`"),
            (plain, true, 0, "the image was no number"),
            (plain, true, 3, "the image was no number"),
        ] {
            let (told, suspect) = advised(text, is_image, updates, true);
            let is_named = text == command;
            assert_eq!(suspect == Suspect::Named, is_named, "{text}");
            assert_eq!(suspect == Suspect::Image, is_image && !is_named, "{text}");
            let what = text.split("\n   = help: ").next().unwrap();
            assert!(told.starts_with(&format!("{what}\n   = help: {words}")), "{told}");
            assert_eq!(told.matches("= help: ").count(), 1, "{told}");
        }
        let (told, _) = advised(plain, false, 0, false);
        assert!(told.contains("what they give is finite: look at what the loss makes of it"), "{told}");
    }
}
