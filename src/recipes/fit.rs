//! What changes while a model is trained: weights, the optimiser's moments, the step; saved and found again.
//!
//! Everything random is drawn from streams named by the step, so the step number is the whole state of the data order
//! and of every generator.

use super::checkpoint::{self, saved_steps};
use super::config::{ScheduleName, TrainConfig};
use super::failure::{self, Noted, Walk};
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

    /// Where numbers first stop being finite on the way of a batch through the learner, and what each of its items comes to:
    /// for the report of a failure.
    ///
    /// # Errors
    /// When the batch cannot be run.
    fn walk(&self, batch: &Noted) -> Result<Walk> {
        let _ = batch;
        Ok(Walk::default())
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
}

impl Student {
    /// A model at the beginning of its training.
    ///
    /// # Errors
    /// When the device has no room.
    pub fn new(assistant: Assistant, adapter: Option<LoraConfig>) -> Result<Self> {
        Ok(Self { frozen: assistant.detached()?, assistant, adapter })
    }
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

    fn walk(&self, batch: &Noted) -> Result<Walk> {
        failure::walk(&self.frozen, batch)
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
}

/// A learner in training.
#[derive(Debug)]
pub struct Fit<L> {
    /// What learns.
    pub learner: L,
    parameters: Vec<(String, Var)>,
    moments: Vec<Moments>,
    /// Optimiser updates applied so far.
    pub updates: u64,
    /// Steps done.
    pub step: u64,
}

/// What one update did.
#[derive(Debug, Clone, Copy)]
pub struct Update {
    /// Norm of all gradients before clipping.
    pub grad_norm: f64,
    /// Learning rate applied.
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
        Ok(Self { learner, parameters, moments, updates: 0, step: 0 })
    }

    /// The tensors whose gradients are wanted.
    pub fn wanted(&self) -> Vec<Tensor> {
        self.parameters.iter().map(|(_, var)| var.as_tensor().clone()).collect()
    }

    /// One AdamW update with clipped gradients. Parameters without a gradient stay as they are.
    ///
    /// # Errors
    /// When a gradient, or a weight after the update, is not finite: the tensor is named.
    pub fn update(&mut self, gradients: &Gradients, config: &TrainConfig) -> Result<Update> {
        let mut values: Vec<Option<Vec<f32>>> = Vec::with_capacity(self.parameters.len());
        for (_, var) in &self.parameters {
            let gradient = gradients.get(var.as_tensor());
            values.push(gradient.map(|g| g.flatten_all()?.to_vec1::<f32>()).transpose()?);
        }
        let named: Vec<(&str, &[f32])> = self
            .parameters
            .iter()
            .zip(&values)
            .filter_map(|((name, _), values)| values.as_ref().map(|v| (name.as_str(), v.as_slice())))
            .collect();
        let grad_norm = optimizer::global_norm(named)?;
        let scale = if config.max_grad_norm > 0.0 {
            optimizer::clip_factor(grad_norm, config.max_grad_norm)
        } else {
            1.0
        };
        self.updates += 1;
        let learning_rate = learning_rate_at(config, self.step);
        let adamw = AdamWConfig {
            beta1: config.beta1,
            beta2: config.beta2,
            adam_epsilon: config.adam_epsilon,
            weight_decay: config.weight_decay,
        };
        for (((name, var), gradient), moments) in self.parameters.iter().zip(values).zip(&mut self.moments) {
            let Some(mut gradient) = gradient else { continue };
            if scale < 1.0 {
                for value in &mut gradient {
                    *value *= scale;
                }
            }
            let mut weights: Vec<f32> = var.as_tensor().flatten_all()?.to_vec1()?;
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
        Ok(Update { grad_norm, learning_rate })
    }

    /// Writes `checkpoints/step-N`: the learner's checkpoint, the optimiser and the step; the directory appears only once
    /// it is whole.
    ///
    /// # Errors
    /// When a file cannot be written; the last checkpoint is untouched then.
    pub fn save(&self, root: &Path) -> Result<PathBuf> {
        checkpoint::write(root, self.step, self.checkpoint_bytes(), |partial| self.write_into(partial))
    }

    fn write_into(&self, partial: &Path) -> Result<()> {
        self.learner.save(partial)?;
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

    /// Bytes of a checkpoint, to within its small files: what the learner saves, and two moments of every trained parameter.
    pub fn checkpoint_bytes(&self) -> u64 {
        let trained: usize = self.parameters.iter().map(|(_, var)| var.as_tensor().elem_count()).sum();
        self.learner.saved_bytes() + (2 * size_of::<f32>() * trained) as u64
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

/// Removes checkpoints that are no longer wanted at step `step`: of those that were `is_due` all but the newest `keep` (0: all
/// stay), and those that were not, left by a run that was told to stop, once training has gone on to another. The `best`
/// stays in any case and counts for nothing. What is left is what an uninterrupted run leaves.
///
/// # Errors
/// When a directory cannot be removed.
pub fn rotate(
    root: &Path,
    step: u64,
    keep: usize,
    is_due: &dyn Fn(u64) -> bool,
    best: Option<u64>,
) -> Result<()> {
    let mut steps = saved_steps(root);
    steps.retain(|&saved| Some(saved) != best);
    steps.sort_unstable_by(|a, b| b.cmp(a));
    let (due, others): (Vec<u64>, Vec<u64>) = steps.into_iter().partition(|&saved| is_due(saved));
    let old = due.into_iter().skip(if keep == 0 { usize::MAX } else { keep });
    for old in old.chain(others.into_iter().filter(|&other| other != step)) {
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

/// The learning rate of step `step` (from 0).
pub fn learning_rate_at(config: &TrainConfig, step: u64) -> f64 {
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
    config.learning_rate * schedule.factor(step, config.num_steps as u64)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_run_that_was_stopped_keeps_the_checkpoints_of_one_that_was_not() {
        let dir = tempfile::tempdir().unwrap();
        let is_due = |step: u64| step.is_multiple_of(10);
        let reach = |step: u64, keep: usize| {
            fs::create_dir_all(dir.path().join(format!("step-{step}"))).unwrap();
            rotate(dir.path(), step, keep, &is_due, None).unwrap();
            let mut left = saved_steps(dir.path());
            left.sort_unstable();
            left
        };
        assert_eq!(reach(10, 2), [10]);
        assert_eq!(reach(20, 2), [10, 20]);
        // Stopped between two that are due: nothing else goes.
        assert_eq!(reach(24, 2), [10, 20, 24]);
        assert_eq!(reach(30, 2), [20, 30]);
        assert_eq!(reach(40, 0), [20, 30, 40]);
        // The best is kept beside the newest.
        let reach_with_best = |step: u64, best: u64| {
            fs::create_dir_all(dir.path().join(format!("step-{step}"))).unwrap();
            rotate(dir.path(), step, 1, &is_due, Some(best)).unwrap();
            let mut left = saved_steps(dir.path());
            left.sort_unstable();
            left
        };
        assert_eq!(reach_with_best(45, 45), [40, 45]);
        assert_eq!(reach_with_best(50, 45), [45, 50]);
        assert_eq!(reach_with_best(60, 60), [50, 60]);
    }
}
