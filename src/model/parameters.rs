//! Named parameters: where they come from, which of them train, and how they are found again for saving.

use crate::error::Result;
use crate::nn::linear::Linear;
use candle_core::{Device, Tensor, Var};

/// Gives the tensor of a canonical name, checked to have this shape.
pub type Source<'a> = &'a dyn Fn(&str, &[usize]) -> Result<Tensor>;

/// One parameter of a model.
#[derive(Debug, Clone)]
enum Holder {
    Trained(Var),
    Frozen(Tensor),
    FrozenWeight(Linear),
}

/// All parameters of a model by canonical name, in the order of the forward pass.
#[derive(Debug, Clone, Default)]
pub struct Parameters {
    entries: Vec<(String, Holder)>,
}

impl Parameters {
    /// The parameters that train, with their names.
    pub fn trained(&self) -> Vec<(String, Var)> {
        let trained = self.entries.iter().filter_map(|(name, holder)| match holder {
            Holder::Trained(var) => Some((name.clone(), var.clone())),
            _ => None,
        });
        trained.collect()
    }

    /// Every parameter's value, for saving.
    ///
    /// # Errors
    /// When a weight cannot be brought back into a checkpoint's layout.
    pub fn tensors(&self) -> Result<Vec<(String, Tensor)>> {
        let value = |holder: &Holder| -> Result<Tensor> {
            Ok(match holder {
                Holder::Trained(var) => var.as_tensor().detach(),
                Holder::Frozen(tensor) => tensor.clone(),
                Holder::FrozenWeight(linear) => linear.weight()?,
            })
        };
        self.entries.iter().map(|(name, holder)| Ok((name.clone(), value(holder)?))).collect()
    }

    /// Number of scalar parameters: all, and those that train.
    ///
    /// # Errors
    /// As [`Parameters::tensors`].
    pub fn count(&self) -> Result<(usize, usize)> {
        let all = self.tensors()?.iter().map(|(_, tensor)| tensor.elem_count()).sum();
        let trained = self.trained().iter().map(|(_, var)| var.as_tensor().elem_count()).sum();
        Ok((all, trained))
    }
}

/// Takes parameters from a [`Source`] while a model is put together.
pub(super) struct Builder<'a> {
    source: Source<'a>,
    trains: &'a dyn Fn(&str) -> bool,
    device: Device,
    parameters: Parameters,
}

impl<'a> Builder<'a> {
    pub(super) fn new(source: Source<'a>, trains: &'a dyn Fn(&str) -> bool, device: Device) -> Self {
        Self { source, trains, device, parameters: Parameters::default() }
    }

    pub(super) fn finish(self) -> Parameters {
        self.parameters
    }

    /// A vector or table: tracked if it trains.
    pub(super) fn tensor(&mut self, name: &str, shape: &[usize]) -> Result<Tensor> {
        let tensor = (self.source)(name, shape)?.to_device(&self.device)?;
        let (tensor, holder) = if (self.trains)(name) {
            let var = Var::from_tensor(&tensor)?;
            (var.as_tensor().clone(), Holder::Trained(var))
        } else {
            (tensor.clone(), Holder::Frozen(tensor))
        };
        self.parameters.entries.push((name.to_owned(), holder));
        Ok(tensor)
    }

    /// A linear layer `PREFIX.weight` (`shape`, flattened to `[out, rest]`) with or without `PREFIX.bias`.
    pub(super) fn linear(&mut self, prefix: &str, shape: &[usize], has_bias: bool) -> Result<Linear> {
        let name = format!("{prefix}.weight");
        let out = shape[0];
        let bias = if has_bias { Some(format!("{prefix}.bias")) } else { None };
        if (self.trains)(&name) {
            let weight = self.tensor(&name, shape)?;
            let bias = bias.map(|bias| self.tensor(&bias, &[out])).transpose()?;
            let flat = if shape.len() == 2 { weight } else { weight.reshape((out, ()))? };
            return Ok(Linear::of_tensor(&flat, bias.as_ref()));
        }
        let weight = (self.source)(&name, shape)?.to_device(&self.device)?.reshape((out, ()))?;
        let at = self.parameters.entries.len();
        let bias = bias.map(|bias| self.tensor(&bias, &[out])).transpose()?;
        let linear = Linear::frozen(&weight, bias.as_ref())?;
        let holder = if shape.len() == 2 {
            Holder::FrozenWeight(linear.clone())
        } else {
            Holder::Frozen(weight.reshape(shape)?)
        };
        self.parameters.entries.insert(at, (name, holder));
        Ok(linear)
    }
}
