//! Forward and backward through a chain of stages, with or without keeping what is between.
//!
//! With recomputation only the states between stages are kept, and each stage is run again when its gradient is
//! wanted: memory does not grow with what happens inside a stage, and no backward recurses deeper than one stage.

use candle_core::{Result, Tensor, TensorId, Var, backprop::GradStore};
use std::collections::HashMap;

/// One step of a chain: a state of a few tensors to the next state.
pub type Stage<'a> = Box<dyn Fn(&[Tensor]) -> Result<Vec<Tensor>> + 'a>;

/// Whether to keep or to recompute what happens inside stages.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub enum Memory {
    /// Keep everything: fastest where it fits.
    #[default]
    Keep,
    /// Keep the states between stages only.
    Recompute,
}

/// Gradients by tensor.
#[derive(Debug, Default)]
pub struct Gradients(HashMap<TensorId, Tensor>);

impl Gradients {
    /// Those of a loss that `tensors` have no part in.
    ///
    /// # Errors
    /// When the device has no room.
    pub fn zero(tensors: &[Tensor]) -> Result<Self> {
        let zeros = tensors.iter().map(|tensor| Ok((tensor.id(), tensor.zeros_like()?)));
        Ok(Self(zeros.collect::<Result<_>>()?))
    }

    /// The gradient of the loss with respect to `tensor`, if it got one.
    pub fn get(&self, tensor: &Tensor) -> Option<&Tensor> {
        self.0.get(&tensor.id())
    }

    /// Adds the gradients of another part of the same loss.
    ///
    /// # Errors
    /// When two gradients of one tensor differ in shape.
    pub fn add(&mut self, other: Self) -> Result<()> {
        for (id, gradient) in other.0 {
            let sum = match self.0.remove(&id) {
                Some(old) => (old + gradient)?,
                None => gradient,
            };
            self.0.insert(id, sum);
        }
        Ok(())
    }

    fn take_from(&mut self, store: &GradStore, wanted: &[Tensor]) -> Result<()> {
        for tensor in wanted {
            if let Some(grad) = store.get(tensor) {
                let sum = match self.0.remove(&tensor.id()) {
                    Some(old) => (old + grad.detach())?,
                    None => grad.detach(),
                };
                self.0.insert(tensor.id(), sum);
            }
        }
        Ok(())
    }
}

/// Runs `stages` on `inputs` and `loss` (a scalar) on the last state; returns the loss and the gradients of `wanted`
/// (variables used inside) and of the `inputs` that are variables.
///
/// # Errors
/// When an operation fails.
pub fn loss_and_gradients(
    stages: &[Stage<'_>],
    inputs: &[Tensor],
    loss: impl Fn(&[Tensor]) -> Result<Tensor>,
    wanted: &[Tensor],
    memory: Memory,
) -> Result<(Tensor, Gradients)> {
    let mut gradients = Gradients::default();
    let tracked: Vec<Tensor> = inputs.iter().filter(|input| input.is_variable()).cloned().collect();
    if memory == Memory::Keep {
        let mut state = inputs.to_vec();
        for stage in stages {
            state = stage(&state)?;
        }
        let value = loss(&state)?;
        let store = value.backward()?;
        gradients.take_from(&store, wanted)?;
        gradients.take_from(&store, &tracked)?;
        return Ok((value.detach(), gradients));
    }

    // Which tensors carry a gradient is known before anything is detached.
    let mut states = vec![inputs.to_vec()];
    let mut tracks: Vec<Vec<bool>> = vec![inputs.iter().map(Tensor::track_op).collect()];
    for stage in stages {
        let outputs = stage(&as_variables(&states[states.len() - 1], &tracks[tracks.len() - 1])?.1)?;
        tracks.push(outputs.iter().map(Tensor::track_op).collect());
        states.push(outputs.iter().map(Tensor::detach).collect());
    }
    let last = states.len() - 1;
    let (variables, state) = as_variables(&states[last], &tracks[last])?;
    let value = loss(&state)?;
    let store = value.backward()?;
    gradients.take_from(&store, wanted)?;
    let mut upstream = collect(&store, &variables);
    for index in (0..stages.len()).rev() {
        states.pop();
        let (variables, state) = if index == 0 {
            (inputs.iter().map(|input| Some(input.clone())).collect(), inputs.to_vec())
        } else {
            as_variables(&states[index], &tracks[index])?
        };
        let outputs = stages[index](&state)?;
        let mut seeded: Option<Tensor> = None;
        for (output, grad) in outputs.iter().zip(&upstream) {
            if let (true, Some(grad)) = (output.track_op(), grad) {
                let term = (output * grad)?.sum_all()?;
                seeded = Some(match seeded {
                    Some(sum) => (sum + term)?,
                    None => term,
                });
            }
        }
        let Some(seeded) = seeded else { break };
        let store = seeded.backward()?;
        gradients.take_from(&store, wanted)?;
        if index == 0 {
            gradients.take_from(&store, &tracked)?;
        }
        upstream = collect(&store, &variables);
    }
    Ok((value.detach(), gradients))
}

/// The state with the tensors that carry a gradient made variables of their own.
fn as_variables(state: &[Tensor], tracks: &[bool]) -> Result<(Vec<Option<Tensor>>, Vec<Tensor>)> {
    let mut variables = Vec::with_capacity(state.len());
    let mut tensors = Vec::with_capacity(state.len());
    for (tensor, &is_tracked) in state.iter().zip(tracks) {
        if is_tracked && !tensor.is_variable() {
            let variable = Var::from_tensor(tensor)?.into_inner();
            variables.push(Some(variable.clone()));
            tensors.push(variable);
        } else {
            variables.push(is_tracked.then(|| tensor.clone()));
            tensors.push(tensor.clone());
        }
    }
    Ok((variables, tensors))
}

/// The gradients of `variables`, as plain numbers: with their history, the weights that they were computed from would
/// get gradients of gradients when they seed the stage before.
fn collect(store: &GradStore, variables: &[Option<Tensor>]) -> Vec<Option<Tensor>> {
    variables.iter().map(|v| v.as_ref().and_then(|v| store.get(v)).map(Tensor::detach)).collect()
}

#[cfg(test)]
mod tests {
    use super::*;
    use candle_core::Device;

    #[test]
    fn recomputing_gives_the_gradients_of_keeping() {
        let device = Device::Cpu;
        let x = Var::from_tensor(&Tensor::new(&[[0.3f32, -0.2], [0.5, 0.1]], &device).unwrap()).unwrap();
        let w = Var::from_tensor(&Tensor::new(&[[1.1f32, 0.4], [-0.3, 0.9]], &device).unwrap()).unwrap();
        let run = |memory| {
            let stages: Vec<Stage<'_>> = vec![
                Box::new(|s: &[Tensor]| Ok(vec![s[0].matmul(w.as_tensor())?.tanh()?])),
                // A side output that a later stage uses, as deep visual features are.
                Box::new(|s: &[Tensor]| Ok(vec![s[0].matmul(w.as_tensor())?, s[0].sqr()?])),
                Box::new(|s: &[Tensor]| Ok(vec![(s[0].tanh()? * &s[1])?])),
            ];
            let inputs = [x.as_tensor().clone()];
            loss_and_gradients(&stages, &inputs, |s| s[0].sqr()?.sum_all(), &[w.as_tensor().clone()], memory)
                .unwrap()
        };
        let ((kept, keep), (again, recompute)) = (run(Memory::Keep), run(Memory::Recompute));
        assert_eq!(kept.to_scalar::<f32>().unwrap(), again.to_scalar::<f32>().unwrap());
        for tensor in [x.as_tensor(), w.as_tensor()] {
            let a: Vec<f32> = keep.get(tensor).unwrap().flatten_all().unwrap().to_vec1().unwrap();
            let b: Vec<f32> = recompute.get(tensor).unwrap().flatten_all().unwrap().to_vec1().unwrap();
            assert!(a.iter().all(|v| *v != 0.0));
            for (a, b) in a.iter().zip(&b) {
                assert!((a - b).abs() < 1e-6, "{a} {b}");
            }
        }
    }
}
