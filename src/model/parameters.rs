//! Named parameters: where they come from, which of them train, and how they are found again for saving.

use super::tensor_file::Numbers;
use crate::error::{Error, Result};
use crate::nn::dropout::{Dropout, LayerDropout};
use crate::nn::linear::{Arithmetic, Linear, LowRank, Reader};
use crate::rng;
use candle_core::{DType, Device, Tensor, Var};
use std::ops::Range;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};

/// Gives the numbers of a canonical name, checked to have this shape.
pub type Source<'a> = &'a dyn Fn(&str, &[usize]) -> Result<Numbers<'a>>;

/// Gives the low-rank update of a linear layer by its name and shape `[out, in]`, where it has one.
pub type LowRankSource<'a> = &'a dyn Fn(&str, [usize; 2]) -> Result<Option<LowRank>>;

/// What a model is put together from.
#[derive(Clone, Copy)]
pub struct Build<'a> {
    /// The tensors.
    pub source: Source<'a>,
    /// Names of the parameters that get gradients.
    pub trains: &'a dyn Fn(&str) -> bool,
    /// Low-rank updates over linear layers; their tensors are named `LAYER.lora_A.weight` and `LAYER.lora_B.weight`.
    pub low_rank: LowRankSource<'a>,
    /// What frozen weights of bfloat16 are multiplied with; patch embedding and output layer stay in float32.
    pub arithmetic: Arithmetic,
}

impl std::fmt::Debug for Build<'_> {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str("Build")
    }
}

impl<'a> Build<'a> {
    /// Without low-rank updates.
    pub fn plain(source: Source<'a>, trains: &'a dyn Fn(&str) -> bool) -> Self {
        Self { source, trains, low_rank: &|_, _| Ok(None), arithmetic: Arithmetic::Single }
    }
}

/// One parameter of a model.
#[derive(Debug, Clone)]
enum Holder {
    Trained(Var),
    Frozen(Tensor),
    /// With the shape it has in a checkpoint.
    FrozenWeight(Linear, Vec<usize>),
}

/// All parameters of a model by canonical name, in the order of the forward pass.
#[derive(Debug, Clone, Default)]
pub struct Parameters {
    entries: Vec<(String, Holder)>,
    /// Tensors of low-rank updates, beside the model's own.
    low_rank: Vec<(String, Holder)>,
    /// Of the inputs of all low-rank updates.
    dropout: Arc<Dropout>,
}

/// What the rows of a linear layer's input stand for; names of rows tell kinds apart by these numbers.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum RowKind {
    /// Patches of images, in the vision tower's order.
    Patches = 0,
    /// Image tokens, in the same order.
    Merged = 1,
    /// Tokens of the decoder.
    Tokens = 2,
}

impl RowKind {
    /// Of the linear layer named `module`.
    fn of(module: &str) -> Self {
        match module.strip_prefix("model.visual.") {
            Some(rest) if rest.contains("merger") => Self::Merged,
            Some(_) => Self::Patches,
            None => Self::Tokens,
        }
    }
}

impl Parameters {
    /// The parameters that train, with their names.
    pub fn trained(&self) -> Vec<(String, Var)> {
        let trained = self.entries.iter().chain(&self.low_rank).filter_map(|(name, holder)| match holder {
            Holder::Trained(var) => Some((name.clone(), var.clone())),
            _ => None,
        });
        trained.collect()
    }

    /// The value of every parameter of the model itself, for saving.
    ///
    /// # Errors
    /// When a weight cannot be brought back into a checkpoint's layout.
    pub fn tensors(&self) -> Result<Vec<(String, Tensor)>> {
        values(&self.entries)
    }

    /// The tensors of low-rank updates, `LAYER.lora_A.weight` and `LAYER.lora_B.weight`.
    ///
    /// # Errors
    /// As [`Parameters::tensors`].
    pub fn low_rank(&self) -> Result<Vec<(String, Tensor)>> {
        values(&self.low_rank)
    }

    /// The dropout before low-rank updates; it drops nothing until it is begun, and never in detached or frozen copies.
    pub fn dropout(&self) -> &Arc<Dropout> {
        &self.dropout
    }

    /// Names and shapes of the model's own parameters; no number is copied.
    pub fn shapes(&self) -> impl Iterator<Item = (&str, &[usize])> {
        self.entries.iter().map(|(name, holder)| {
            let shape = match holder {
                Holder::Trained(var) => var.as_tensor().dims(),
                Holder::Frozen(tensor) => tensor.dims(),
                Holder::FrozenWeight(_, shape) => shape,
            };
            (name.as_str(), shape)
        })
    }

    /// Number of scalar parameters: the model's own, and those that train.
    pub fn count(&self) -> (usize, usize) {
        let all = self.shapes().map(|(_, shape)| shape.iter().product::<usize>()).sum();
        let trained = self.trained().iter().map(|(_, var)| var.as_tensor().elem_count()).sum();
        (all, trained)
    }
}

fn values(entries: &[(String, Holder)]) -> Result<Vec<(String, Tensor)>> {
    let value = |holder: &Holder| -> Result<Tensor> {
        Ok(match holder {
            Holder::Trained(var) => var.as_tensor().detach(),
            Holder::Frozen(tensor) => tensor.clone(),
            Holder::FrozenWeight(linear, shape) => linear.weight()?.reshape(shape.as_slice())?,
        })
    };
    entries.iter().map(|(name, holder)| Ok((name.clone(), value(holder)?))).collect()
}

/// Names and shapes of the parameters that a model asks for, in the order of the forward pass.
pub type Outline = Vec<(String, Vec<usize>)>;

/// Takes parameters from a [`Build`] while a model is put together.
pub(super) struct Builder<'a> {
    build: Build<'a>,
    device: Device,
    parameters: Parameters,
    /// Names and shapes, when nothing else is wanted: no number is read and none is held.
    outline: Option<Outline>,
}

impl<'a> Builder<'a> {
    pub(super) fn new(build: Build<'a>, device: Device) -> Self {
        Self { build, device, parameters: Parameters::default(), outline: None }
    }

    /// A builder that only takes notes.
    pub(super) fn of_outline() -> Self {
        let build = Build::plain(&|_, _| Err(Error::data("an outline has no numbers")), &|_| false);
        Self { outline: Some(Vec::new()), ..Self::new(build, Device::Cpu) }
    }

    pub(super) fn into_outline(self) -> Outline {
        self.outline.unwrap_or_default()
    }

    /// A stand-in of this shape that takes no room, when only names and shapes are wanted.
    fn noted(&mut self, name: &str, shape: &[usize]) -> Result<Option<Tensor>> {
        let Some(outline) = &mut self.outline else { return Ok(None) };
        outline.push((name.to_owned(), shape.to_vec()));
        Ok(Some(Tensor::zeros(1, DType::F32, &Device::Cpu)?.broadcast_as(shape)?))
    }

    pub(super) fn finish(self) -> Parameters {
        self.parameters
    }

    /// A vector or table: tracked if it trains.
    pub(super) fn tensor(&mut self, name: &str, shape: &[usize]) -> Result<Tensor> {
        if let Some(stand_in) = self.noted(name, shape)? {
            return Ok(stand_in);
        }
        let numbers = (self.build.source)(name, shape)?;
        numbers.check_finite(name)?;
        let tensor = numbers.into_tensor(shape)?;
        let (tensor, holder) = self.held(name, &tensor)?;
        self.parameters.entries.push((name.to_owned(), holder));
        Ok(tensor)
    }

    fn held(&self, name: &str, tensor: &Tensor) -> Result<(Tensor, Holder)> {
        let tensor = tensor.to_device(&self.device)?;
        Ok(if (self.build.trains)(name) {
            let var = Var::from_tensor(&tensor)?;
            (var.as_tensor().clone(), Holder::Trained(var))
        } else {
            (tensor.clone(), Holder::Frozen(tensor))
        })
    }

    /// A linear layer `PREFIX.weight` (`shape`, flattened to `[out, rest]`) with or without `PREFIX.bias`.
    pub(super) fn linear(&mut self, prefix: &str, shape: &[usize], has_bias: bool) -> Result<Linear> {
        let linear = self.base(prefix, shape, has_bias)?;
        // A patch embedding is a convolution to everybody else, and a token embedding no layer.
        let &[out, input] = shape else { return Ok(linear) };
        if prefix.ends_with("embed_tokens") {
            return Ok(linear);
        }
        // Log-probabilities keep float32: the loss takes the output layer's products from a kernel of its own.
        let linear = if prefix == "lm_head" { linear } else { linear.with_arithmetic(self.build.arithmetic) };
        let Some(low_rank) = (self.build.low_rank)(prefix, [out, input])? else { return Ok(linear) };
        if prefix == "lm_head" {
            return Err(Error::data(
                "a low-rank adapter over the output layer is not supported\n   = help: leave `lm_head` out of the target modules",
            ));
        }
        let mut tensor = |half: &str, value: &Tensor| -> Result<Tensor> {
            let name = format!("{prefix}.lora_{half}.weight");
            let (tensor, holder) = self.held(&name, value)?;
            self.parameters.low_rank.push((name, holder));
            Ok(tensor)
        };
        let (a, b) = (tensor("A", &low_rank.a)?, tensor("B", &low_rank.b)?);
        let dropout = LayerDropout {
            dropout: self.parameters.dropout.clone(),
            layer: rng::key_of(prefix),
            kind: RowKind::of(prefix) as usize,
        };
        Ok(linear.with_low_rank(LowRank { a, b, scaling: low_rank.scaling }).with_dropout(dropout))
    }

    fn base(&mut self, prefix: &str, shape: &[usize], has_bias: bool) -> Result<Linear> {
        let name = format!("{prefix}.weight");
        let out = shape[0];
        let bias = if has_bias { Some(format!("{prefix}.bias")) } else { None };
        let flat: [usize; 2] = [out, shape[1..].iter().product()];
        if self.noted(&name, shape)?.is_some() {
            bias.map(|bias| self.noted(&bias, &[out])).transpose()?;
            let stand_in = Tensor::zeros((1, 1), DType::F32, &Device::Cpu)?.broadcast_as(&flat)?;
            return Ok(Linear::of_tensor(&stand_in, None));
        }
        if (self.build.trains)(&name) {
            let weight = self.tensor(&name, shape)?;
            let bias = bias.map(|bias| self.tensor(&bias, &[out])).transpose()?;
            let flat = if shape.len() == 2 { weight } else { weight.reshape((out, ()))? };
            return Ok(Linear::of_tensor(&flat, bias.as_ref()));
        }
        let weight = (self.build.source)(&name, shape)?;
        let at = self.parameters.entries.len();
        let bias = bias.map(|bias| self.tensor(&bias, &[out])).transpose()?;
        if !self.device.is_cpu() {
            weight.check_finite(&name)?;
        }
        let is_finite = AtomicBool::new(true);
        let look = |range: Range<usize>| {
            if weight.has_bad(range) {
                is_finite.store(false, Ordering::Relaxed);
            }
        };
        let reader = Reader { before: &look, after: &|range| weight.release(range) };
        let linear = Linear::frozen_values(weight.values(), flat, bias.as_ref(), &self.device, reader)?;
        if !is_finite.into_inner() {
            weight.check_finite(&name)?;
        }
        let holder = Holder::FrozenWeight(linear.clone(), shape.to_vec());
        self.parameters.entries.insert(at, (name, holder));
        Ok(linear)
    }
}
