//! What changes while a model is trained: weights, the optimiser's moments, averages, the step; saved and found again.
//!
//! Which group of the optimiser a tensor belongs to (its learning rate and weight decay) is a function of its name and the
//! configuration, so a checkpoint holds the moments of each tensor and no groups.
//!
//! Everything random is drawn from streams named by the step, so the step number is the whole state of the data order
//! and of every generator.

use super::checkpoint::{self, saved_steps};
use super::config::{ScheduleName, TrainConfig};
use super::failure::{self, Noted, Walk};
use super::{denoise, train};
use crate::error::{Error, Result};
use crate::model::assistant::Assistant;
use crate::model::denoiser::{self, Denoiser};
use crate::model::lora::{self, LoraConfig};
use crate::model::weights::{self, TensorFile};
use crate::nn::recompute::Gradients;
use crate::train::optimizer::{self, AdamWConfig, Moments};
use crate::train::schedule::{Schedule, ScheduleKind};
use candle_core::{Device, Tensor, Var};
use serde_json::json;
use std::fs;
use std::path::{Path, PathBuf};
use std::sync::Arc;

/// What can be trained: variables with names, and checkpoints that hold them.
pub trait Learner {
    /// The variables, always in the same order.
    fn trained(&self) -> Vec<(String, Var)>;

    /// The model that can be asked questions, as it is now and without gradients.
    fn assistant(&self) -> Option<&Assistant> {
        None
    }

    /// Writes a checkpoint into a new directory.
    ///
    /// # Errors
    /// When a file cannot be written.
    fn save(&self, dir: &Path) -> Result<()>;

    /// Opens a checkpoint that [`Learner::save`] wrote.
    ///
    /// # Errors
    /// When it is damaged.
    fn open(&self, dir: &Path) -> Result<Saved>;

    /// Bytes of what [`Learner::save`] writes, at most and to within small files.
    fn saved_bytes(&self) -> u64;

    /// The same of [`Learner::save_state`].
    fn state_bytes(&self) -> u64 {
        0
    }

    /// Where numbers first stop being finite on the way of a batch through the learner, and what each of its items comes to:
    /// for the report of a failure.
    ///
    /// # Errors
    /// When the batch cannot be run.
    fn walk(&self, batch: &Noted) -> Result<Walk> {
        let _ = batch;
        Ok(Walk::default())
    }

    /// Writes what else changes in training beside the variables.
    ///
    /// # Errors
    /// When a file cannot be written.
    fn save_state(&self, _dir: &Path) -> Result<()> {
        Ok(())
    }

    /// Takes up what [`Learner::save_state`] wrote.
    ///
    /// # Errors
    /// When it is damaged.
    fn open_state(&mut self, _dir: &Path) -> Result<()> {
        Ok(())
    }
}

/// A vision-language model that learns.
#[derive(Debug)]
pub struct Student {
    /// The model.
    pub assistant: Assistant,
    /// The same weights without gradients.
    pub frozen: Assistant,
    /// Settings of the adapter, when that is what trains: checkpoints hold it and not the weights.
    adapter: Option<LoraConfig>,
    reference: Option<Reference>,
}

/// The frozen policy of GRPO's KL term.
#[derive(Debug)]
struct Reference {
    assistant: Arc<Assistant>,
    /// Its values of what trains, in the order of the variables, where it follows them.
    values: Option<Vec<Tensor>>,
}

/// The file of a reference that follows the trained policy.
const REFERENCE_FILE: &str = "reference.safetensors";

impl Student {
    /// A model at the beginning of its training.
    ///
    /// # Errors
    /// When the device has no room.
    pub fn new(assistant: Assistant, adapter: Option<LoraConfig>) -> Result<Self> {
        Ok(Self { frozen: assistant.detached()?, assistant, adapter, reference: None })
    }

    /// The same with the policy as it is now, `assistant`, for reference; `follows`: it will be moved.
    ///
    /// # Errors
    /// When the device has no room.
    pub fn with_reference(self, assistant: Option<Assistant>, follows: bool) -> Result<Self> {
        let Some(assistant) = assistant else { return Ok(self) };
        let values = if follows {
            let copy = |(_, var): &(String, Var)| Ok(var.as_tensor().copy()?.detach());
            Some(self.trained().iter().map(copy).collect::<Result<_>>()?)
        } else {
            None
        };
        Ok(Self { reference: Some(Reference { assistant: Arc::new(assistant), values }), ..self })
    }

    /// The frozen policy of the KL term, as it is now.
    pub fn reference(&self) -> Option<Arc<Assistant>> {
        self.reference.as_ref().map(|reference| reference.assistant.clone())
    }

    /// Moves the reference to `alpha` x trained + (1 - `alpha`) x reference; does nothing to one that stays where it is.
    ///
    /// # Errors
    /// When the device has no room.
    pub fn move_reference(&mut self, alpha: f64) -> Result<()> {
        let Some(Reference { values: Some(values), .. }) = &self.reference else { return Ok(()) };
        let mix = |((_, var), old): (&(String, Var), &Tensor)| -> Result<Tensor> {
            // All the way is the trained policy itself, and in the form below what has not moved stays where it is: both to the
            // bit.
            if alpha == 1.0 {
                return Ok(var.as_tensor().copy()?.detach());
            }
            Ok((old + ((var.as_tensor().detach() - old)? * alpha)?)?)
        };
        let mixed = self.trained().iter().zip(values).map(mix).collect::<Result<Vec<_>>>()?;
        self.set_reference(mixed)
    }

    fn set_reference(&mut self, values: Vec<Tensor>) -> Result<()> {
        let assistant = with_values(&self.trained(), &values, || self.assistant.frozen_copy())?;
        self.reference = Some(Reference { assistant: Arc::new(assistant), values: Some(values) });
        Ok(())
    }
}

/// What `f` gives while the variables hold `values`; they hold their own again afterwards, whatever came of it.
fn with_values<T>(
    variables: &[(String, Var)],
    values: &[Tensor],
    f: impl FnOnce() -> Result<T>,
) -> Result<T> {
    let own: Vec<Tensor> =
        variables.iter().map(|(_, var)| var.as_tensor().copy()).collect::<candle_core::Result<_>>()?;
    let set = |values: &[Tensor]| -> Result<()> {
        Ok(variables.iter().zip(values).try_for_each(|((_, var), value)| var.set(value))?)
    };
    let result = set(values).and_then(|()| f());
    set(&own)?;
    result
}

impl Learner for Student {
    fn trained(&self) -> Vec<(String, Var)> {
        self.assistant.vlm.parameters().trained()
    }

    fn assistant(&self) -> Option<&Assistant> {
        Some(&self.frozen)
    }

    /// A complete Hugging Face directory, or an adapter as PEFT has it.
    fn save(&self, dir: &Path) -> Result<()> {
        match &self.adapter {
            Some(config) => lora::save(dir, config, &self.assistant.vlm.parameters().low_rank()?),
            None => self.assistant.save(dir),
        }
    }

    fn open(&self, dir: &Path) -> Result<Saved> {
        Ok(match &self.adapter {
            Some(_) => {
                Saved::Tensors { file: TensorFile::open(&dir.join(lora::TENSOR_FILE))?, root: lora::ROOT }
            }
            None => Saved::Model(weights::Weights::open(dir)?),
        })
    }

    fn saved_bytes(&self) -> u64 {
        let parameters = self.assistant.vlm.parameters();
        let (all, trained) = parameters.count();
        (size_of::<f32>() * if self.adapter.is_some() { trained } else { all }) as u64
    }

    fn state_bytes(&self) -> u64 {
        match &self.reference {
            Some(Reference { values: Some(_), .. }) => {
                (size_of::<f32>() * self.assistant.vlm.parameters().count().1) as u64
            }
            _ => 0,
        }
    }

    fn walk(&self, batch: &Noted) -> Result<Walk> {
        failure::walk(&self.frozen, batch)
    }

    /// The reference, where it follows the trained policy.
    fn save_state(&self, dir: &Path) -> Result<()> {
        let Some(Reference { values: Some(values), .. }) = &self.reference else { return Ok(()) };
        let mut named: Vec<(String, Tensor)> =
            self.trained().into_iter().map(|(name, _)| name).zip(values.iter().cloned()).collect();
        named.sort_by(|a, b| a.0.cmp(&b.0));
        weights::save_file(&dir.join(REFERENCE_FILE), &named, &[("format", "pt")])
    }

    fn open_state(&mut self, dir: &Path) -> Result<()> {
        if !matches!(&self.reference, Some(Reference { values: Some(_), .. })) {
            return Ok(());
        }
        let saved = Saved::Tensors { file: TensorFile::open(&dir.join(REFERENCE_FILE))?, root: "" };
        let value = |(name, var): &(String, Var)| -> Result<Tensor> {
            Ok(saved.get(name, var.as_tensor().dims())?.to_device(var.as_tensor().device())?)
        };
        let values = self.trained().iter().map(value).collect::<Result<Vec<_>>>()?;
        self.set_reference(values)
    }
}

impl Learner for Denoiser {
    fn trained(&self) -> Vec<(String, Var)> {
        self.parameters().trained()
    }

    fn save(&self, dir: &Path) -> Result<()> {
        Self::save(self, dir)
    }

    fn open(&self, dir: &Path) -> Result<Saved> {
        Ok(Saved::Tensors { file: TensorFile::open(&dir.join(denoiser::TENSOR_FILE))?, root: "" })
    }

    fn saved_bytes(&self) -> u64 {
        let trained: usize = Learner::trained(self).iter().map(|(_, var)| var.as_tensor().elem_count()).sum();
        (size_of::<f32>() * trained) as u64
    }

    fn walk(&self, batch: &Noted) -> Result<Walk> {
        denoise::walk(self, batch)
    }
}

/// A learner in training.
#[derive(Debug)]
pub struct Fit<L> {
    /// What learns.
    pub learner: L,
    parameters: Vec<(String, Var)>,
    moments: Vec<Moments>,
    average: Option<Average>,
    /// Whether a first update has shown which tensors get gradients.
    is_examined: bool,
    warning: Option<String>,
    /// Optimiser updates applied so far.
    pub updates: u64,
    /// Steps done.
    pub step: u64,
    /// Steps that were done when weights last moved in this process; none before.
    pub moved_in: Option<u64>,
}

/// An exponential moving average of what trains.
#[derive(Debug)]
struct Average {
    decay: f64,
    /// In the order of the variables.
    values: Vec<Vec<f32>>,
}

/// The directory of the averaged weights inside a checkpoint.
const AVERAGE_DIR: &str = "ema";

/// What one update did.
#[derive(Debug, Clone, Copy)]
pub struct Update {
    /// Norm of all gradients before clipping.
    pub grad_norm: f64,
    /// Base learning rate of the step, that of `train.learning_rate`.
    pub learning_rate: f64,
}

impl<L: Learner> Fit<L> {
    /// At the first step.
    ///
    /// # Errors
    /// When no parameter trains.
    pub fn new(learner: L) -> Result<Self> {
        let parameters = learner.trained();
        if parameters.is_empty() {
            return Err(Error::usage(
                "no parameter would train\n   = help: set one of train.parts.{vision,merger,text} to true",
            ));
        }
        let moments =
            parameters.iter().map(|(_, var)| Moments::zeros(var.as_tensor().elem_count())).collect();
        Ok(Self {
            learner,
            parameters,
            moments,
            average: None,
            is_examined: false,
            warning: None,
            updates: 0,
            moved_in: None,
            step: 0,
        })
    }

    /// The same with a moving average of what trains, from the weights as they are now on; none without a decay.
    ///
    /// # Errors
    /// When the device has no room.
    pub fn averaged(self, decay: Option<f64>) -> Result<Self> {
        let Some(decay) = decay else { return Ok(self) };
        let values = self.parameters.iter().map(|(_, var)| floats(var)).collect::<Result<_>>()?;
        Ok(Self { average: Some(Average { decay, values }), ..self })
    }

    /// What the first update showed to be wrong, once.
    pub fn take_warning(&mut self) -> Option<String> {
        self.warning.take()
    }

    /// The tensors whose gradients are wanted.
    pub fn wanted(&self) -> Vec<Tensor> {
        self.parameters.iter().map(|(_, var)| var.as_tensor().clone()).collect()
    }

    /// One AdamW update with clipped gradients. Parameters without a gradient stay as they are; the first update that moves
    /// anything leaves a warning about them.
    ///
    /// # Errors
    /// When a gradient, or a weight after the update, is not finite: the tensor is named. When no parameter has one.
    pub fn update(&mut self, gradients: &Gradients, config: &TrainConfig) -> Result<Update> {
        let mut values: Vec<Option<Vec<f32>>> = Vec::with_capacity(self.parameters.len());
        for (_, var) in &self.parameters {
            let gradient = gradients.get(var.as_tensor());
            values.push(gradient.map(|g| g.flatten_all()?.to_vec1::<f32>()).transpose()?);
        }
        if !self.is_examined {
            self.examine(&values, config)?;
        }
        let mut named: Vec<(&str, &mut [f32])> = self
            .parameters
            .iter()
            .zip(&mut values)
            .filter_map(|((name, _), values)| Some((name.as_str(), values.as_mut()?.as_mut_slice())))
            .collect();
        let max_grad_norm = Some(config.max_grad_norm).filter(|norm| *norm > 0.0);
        let grad_norm = optimizer::clip_global_norm(&mut named, max_grad_norm)?;
        self.updates += 1;
        self.moved_in = Some(self.step);
        let learning_rate = learning_rate_at(config, self.step);
        let adamw = AdamWConfig {
            beta1: config.beta1,
            beta2: config.beta2,
            adam_epsilon: config.adam_epsilon,
            weight_decay: config.weight_decay,
        };
        let undecayed = AdamWConfig { weight_decay: 0.0, ..adamw.clone() };
        for (((name, var), gradient), moments) in self.parameters.iter().zip(values).zip(&mut self.moments) {
            let Some(gradient) = gradient else { continue };
            let learning_rate = group_rate_at(config, name, self.step);
            let adamw = if config.weight_decay_norms || decays(name) { &adamw } else { &undecayed };
            let mut weights = floats(var)?;
            adamw.step(self.updates, learning_rate, &mut weights, &gradient, moments)?;
            // Found here, before a checkpoint of it takes the place of a good one.
            if let Some(at) = weights.iter().position(|weight| !weight.is_finite()) {
                let value = weights[at];
                return Err(Error::NonFinite(format!(
                    "the update makes the weight `{name}` {value} at element {at}"
                )));
            }
            var.set(&Tensor::from_vec(weights, var.as_tensor().shape(), var.as_tensor().device())?)?;
        }
        if let Some(Average { decay, values }) = &mut self.average {
            let share = (1.0 - *decay) as f32;
            for ((_, var), average) in self.parameters.iter().zip(values) {
                for (average, value) in average.iter_mut().zip(floats(var)?) {
                    // In this form what does not change has itself for its average, to the bit.
                    *average += share * (value - *average);
                }
            }
        }
        Ok(Update { grad_norm, learning_rate })
    }

    /// Looks at the gradients of a first update for tensors that would never learn. One in which everything is zero, as GRPO
    /// has where a reference is all that speaks, shows nothing.
    fn examine(&mut self, gradients: &[Option<Vec<f32>>], config: &TrainConfig) -> Result<()> {
        if gradients.iter().all(Option::is_none) {
            return Err(Error::usage(format!(
                "none of the {} trained tensors got a gradient, such as `{}`: nothing would be learnt\n   = help: `train.parts` and `train.lora_target_modules` say what trains; the loss must depend on it",
                self.parameters.len(),
                self.parameters.first().map_or("", |(name, _)| name.as_str())
            )));
        }
        let is_zero = |values: &[f32]| values.iter().all(|value| *value == 0.0);
        if gradients.iter().flatten().all(|values| is_zero(values)) {
            return Ok(());
        }
        self.is_examined = true;
        let (mut without, mut zero) = (Vec::new(), Vec::new());
        for ((name, _), gradient) in self.parameters.iter().zip(gradients) {
            match gradient {
                // No image is shown with captions, which the configuration says.
                None if !(config.captions && name.starts_with(train::VISION)) => without.push(name.as_str()),
                Some(values) if is_zero(values) && !self.waits(name)? => zero.push(name.as_str()),
                _ => {}
            }
        }
        let total = self.parameters.len();
        let told = |names: &[&str], what: &str| {
            let listed: Vec<String> = names.iter().take(3).map(|name| format!("`{name}`")).collect();
            let more = if names.len() > 3 { format!(" and {} more", names.len() - 3) } else { String::new() };
            let count = names.len();
            format!(
                "{count} of {total} trained tensors {what} in the first update: {}{more}",
                listed.join(", ")
            )
        };
        let mut said = Vec::new();
        if !without.is_empty() {
            said.push(told(&without, "got no gradient"));
        }
        if !zero.is_empty() {
            said.push(told(&zero, "got a gradient of zero"));
        }
        self.warning = (!said.is_empty()).then(|| said.join("; "));
        Ok(())
    }

    /// Whether `name` is the A of an adapter whose B is still zero: it learns from the second update on.
    fn waits(&self, name: &str) -> Result<bool> {
        let Some(layer) = name.strip_suffix(".lora_A.weight") else { return Ok(false) };
        let partner = format!("{layer}.lora_B.weight");
        match self.parameters.iter().find(|(name, _)| *name == partner) {
            Some((_, var)) => Ok(floats(var)?.iter().all(|value| *value == 0.0)),
            None => Ok(false),
        }
    }

    /// Writes `checkpoints/step-N`: the learner's checkpoint, the optimiser and the step, and in `ema` a second checkpoint of
    /// the learner with averaged weights, where they are kept; the directory appears only once it is whole.
    ///
    /// # Errors
    /// When a file cannot be written; the last checkpoint is untouched then.
    pub fn save(&self, root: &Path) -> Result<PathBuf> {
        checkpoint::write(root, self.step, self.checkpoint_bytes(), |partial| self.write_into(partial))
    }

    fn write_into(&self, partial: &Path) -> Result<()> {
        self.learner.save(partial)?;
        self.learner.save_state(partial)?;
        if let Some(Average { values, .. }) = &self.average {
            let tensor = |((_, var), values): (&(String, Var), &Vec<f32>)| {
                Tensor::from_slice(values, var.as_tensor().shape(), var.as_tensor().device())
            };
            let values: Vec<Tensor> =
                self.parameters.iter().zip(values).map(tensor).collect::<candle_core::Result<_>>()?;
            with_values(&self.parameters, &values, || self.learner.save(&partial.join(AVERAGE_DIR)))?;
        }
        let mut tensors = Vec::with_capacity(2 * self.moments.len());
        for ((name, var), moments) in self.parameters.iter().zip(&self.moments) {
            let shape = var.as_tensor().shape();
            for (kind, values) in [("m", &moments.m), ("v", &moments.v)] {
                let tensor = Tensor::from_slice(values, shape, &Device::Cpu)?;
                tensors.push((format!("{kind}.{name}"), tensor));
            }
        }
        tensors.sort_by(|a, b| a.0.cmp(&b.0));
        weights::save_file(&partial.join("optimizer.safetensors"), &tensors, &[("format", "pt")])?;
        let state = json!({"step": self.step, "updates": self.updates});
        let path = partial.join("state.json");
        fs::write(&path, format!("{state:#}\n")).map_err(|error| Error::io("cannot write", &path, error))
    }

    /// Bytes of a checkpoint, to within its small files: what the learner saves, a second time for the average, and two moments of
    /// every trained parameter.
    pub fn checkpoint_bytes(&self) -> u64 {
        let trained: usize = self.parameters.iter().map(|(_, var)| var.as_tensor().elem_count()).sum();
        let copies = if self.average.is_some() { 2 } else { 1 };
        let moments = (2 * size_of::<f32>() * trained) as u64;
        copies * self.learner.saved_bytes() + self.learner.state_bytes() + moments
    }

    /// Takes up the newest checkpoint below `root` that is whole, if there is one; see [`checkpoint::take_up`].
    ///
    /// # Errors
    /// When there are some and none is whole.
    pub fn resume(&mut self, root: &Path) -> Result<bool> {
        checkpoint::take_up(root, |dir, step| self.open(dir, step))
    }

    fn open(&mut self, dir: &Path, newest: u64) -> Result<()> {
        let saved = self.learner.open(dir)?;
        let optimizer = TensorFile::open(&dir.join("optimizer.safetensors"))?;
        for ((name, var), moments) in self.parameters.iter().zip(&mut self.moments) {
            var.set(&saved.get(name, var.as_tensor().dims())?.to_device(var.as_tensor().device())?)?;
            moments.m = optimizer.floats(&format!("m.{name}"))?;
            moments.v = optimizer.floats(&format!("v.{name}"))?;
            if moments.m.len() != var.as_tensor().elem_count() || moments.v.len() != moments.m.len() {
                return Err(Error::data(format!(
                    "the optimiser's state of `{name}` has another size\n  --> {}",
                    dir.display()
                )));
            }
        }
        if let Some(Average { values, .. }) = &mut self.average {
            let saved = self.learner.open(&dir.join(AVERAGE_DIR))?;
            for ((name, var), value) in self.parameters.iter().zip(values) {
                *value = saved.get(name, var.as_tensor().dims())?.flatten_all()?.to_vec1()?;
            }
        }
        self.learner.open_state(dir)?;
        let path = dir.join("state.json");
        let text = fs::read(&path).map_err(|error| Error::io("cannot read", &path, error))?;
        let state: serde_json::Value = serde_json::from_slice(&text)
            .map_err(|error| Error::data(format!("not valid JSON: {error}\n  --> {}", path.display())))?;
        let number = |key: &str| {
            state[key].as_u64().ok_or_else(|| {
                Error::data(format!("`{key}` is missing or no whole number\n  --> {}", path.display()))
            })
        };
        self.step = number("step")?;
        self.updates = number("updates")?;
        if self.step != newest {
            return Err(Error::data(format!(
                "the checkpoint says it is of step {}, its directory of step {newest}\n  --> {}",
                self.step,
                path.display()
            )));
        }
        Ok(())
    }
}

/// Removes checkpoints that are no longer wanted: of those that were `is_due` all but the newest `keep` (0: all stay), and
/// those that were not, left by a run that was told to stop, once a newer one is there to go on from. The `best` stays in any
/// case and counts for nothing. What is left at the end is what an uninterrupted run leaves, if `best` was always known.
///
/// # Errors
/// When a directory cannot be removed.
pub fn rotate(root: &Path, keep: usize, is_due: &dyn Fn(u64) -> bool, best: Option<u64>) -> Result<()> {
    let mut steps = saved_steps(root);
    let newest = steps.iter().copied().max();
    steps.retain(|&saved| Some(saved) != best);
    steps.sort_unstable_by(|a, b| b.cmp(a));
    let (due, others): (Vec<u64>, Vec<u64>) = steps.into_iter().partition(|&saved| is_due(saved));
    let old = due.into_iter().skip(if keep == 0 { usize::MAX } else { keep });
    for old in old.chain(others.into_iter().filter(|&other| Some(other) != newest)) {
        checkpoint::discard(root, old)?;
    }
    Ok(())
}

/// The values of a checkpoint.
#[derive(Debug)]
pub enum Saved {
    /// A model's, by canonical name.
    Model(weights::Weights),
    /// One file's, whose names begin with `root`.
    Tensors {
        /// The file.
        file: TensorFile,
        /// What stands before each name.
        root: &'static str,
    },
}

impl Saved {
    fn get(&self, name: &str, shape: &[usize]) -> Result<Tensor> {
        match self {
            Self::Model(weights) => Ok(weights.get(name, shape)?.into_tensor(shape)?),
            Self::Tensors { file, root } => {
                let name = format!("{root}{name}");
                if file.shape(&name).is_some_and(|found| found != shape) {
                    return Err(Error::data(format!(
                        "the saved `{name}` is not {shape:?}\n  --> {}",
                        file.path().display()
                    )));
                }
                file.tensor(&name)
            }
        }
    }
}

/// The numbers of a variable.
fn floats(var: &Var) -> Result<Vec<f32>> {
    Ok(var.as_tensor().flatten_all()?.to_vec1()?)
}

/// The base learning rate of step `step` (from 0).
pub fn learning_rate_at(config: &TrainConfig, step: u64) -> f64 {
    config.learning_rate * schedule_factor(config, step)
}

/// The learning rate of the tensor `name` at step `step`: that of its part of the model, and of an adapter's B by the ratio.
fn group_rate_at(config: &TrainConfig, name: &str, step: u64) -> f64 {
    let rates = &config.learning_rates;
    let own = [
        (rates.vision, train::trains(name, true, false, false)),
        (rates.merger, train::trains(name, false, true, false)),
        (rates.text, train::trains(name, false, false, true)),
    ];
    let peak = own.into_iter().find_map(|(rate, is_own)| rate.filter(|_| is_own));
    let ratio = if name.ends_with(".lora_B.weight") { config.lora_plus_ratio } else { 1.0 };
    peak.unwrap_or(config.learning_rate) * schedule_factor(config, step) * ratio
}

/// Whether weight decay is for the tensor `name`: not for biases and the weights of norms.
fn decays(name: &str) -> bool {
    let (module, last) = name.rsplit_once('.').unwrap_or(("", name));
    let module = module.rsplit('.').next().unwrap_or(module);
    last != "bias" && !module.contains("norm") && !module.starts_with("ln_")
}

fn schedule_factor(config: &TrainConfig, step: u64) -> f64 {
    let kind = match config.schedule {
        ScheduleName::Constant => ScheduleKind::Constant,
        ScheduleName::Linear => ScheduleKind::Linear,
        ScheduleName::Cosine => ScheduleKind::Cosine,
    };
    let schedule = Schedule {
        kind,
        warmup_steps: config.warmup_steps as u64,
        final_fraction: config.min_learning_rate_ratio,
    };
    schedule.factor(step, config.num_steps as u64)
}

#[cfg(test)]
#[path = "fit_tests.rs"]
mod update_tests;

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_run_that_was_stopped_keeps_the_checkpoints_of_one_that_was_not() {
        let dir = tempfile::tempdir().unwrap();
        let is_due = |step: u64| step.is_multiple_of(10);
        let reach = |step: u64, keep: usize| {
            fs::create_dir_all(dir.path().join(format!("step-{step}"))).unwrap();
            rotate(dir.path(), keep, &is_due, None).unwrap();
            let mut left = saved_steps(dir.path());
            left.sort_unstable();
            left
        };
        assert_eq!(reach(10, 2), [10]);
        assert_eq!(reach(20, 2), [10, 20]);
        // Stopped between two that are due: nothing else goes.
        assert_eq!(reach(24, 2), [10, 20, 24]);
        // Gone on to steps that are not saved: a kill would cost all since step 20, were step 24 not kept.
        rotate(dir.path(), 2, &is_due, None).unwrap();
        assert!(dir.path().join("step-24").exists());
        // Stopped once more.
        assert_eq!(reach(25, 2), [10, 20, 25]);
        assert_eq!(reach(30, 2), [20, 30]);
        assert_eq!(reach(40, 0), [20, 30, 40]);
        // The best is kept beside the newest.
        let reach_with_best = |step: u64, best: u64| {
            fs::create_dir_all(dir.path().join(format!("step-{step}"))).unwrap();
            rotate(dir.path(), 1, &is_due, Some(best)).unwrap();
            let mut left = saved_steps(dir.path());
            left.sort_unstable();
            left
        };
        assert_eq!(reach_with_best(45, 45), [40, 45]);
        assert_eq!(reach_with_best(50, 45), [45, 50]);
        assert_eq!(reach_with_best(60, 60), [50, 60]);
    }
}
