//! The model as TRADES attacks it (Zhang et al. 2019): how far what it says about changed pixels is from what it says about
//! the clean ones.

use super::policy::{self, Scoring};
use super::target::PixelPass;
use crate::attack::Objective;
use crate::error::Result;
use crate::model::assistant::Assistant;
use crate::model::generate::Prompt;
use crate::nn::recompute::Memory;
use candle_core::Tensor;
use std::cell::RefCell;

/// Questions about images of one size, with what the model says about the clean ones.
///
/// An item's loss is the sum over the tokens of its right completion of `KL(p_clean || p)` between the distributions of the
/// next token, in nats, each given the right tokens before it. At the clean pixels it is 0 and so is its gradient: an attack
/// must begin elsewhere.
#[derive(Debug)]
pub struct DivergenceTarget<'a> {
    assistant: &'a Assistant,
    prompts: Vec<Prompt>,
    targets: Vec<Vec<Vec<u32>>>,
    /// For each item the decoder's last state where its tokens are predicted, `[tokens, hidden]`, of the clean image.
    clean: Vec<Tensor>,
    model_size: [usize; 2],
    memory: Memory,
}

impl<'a> DivergenceTarget<'a> {
    /// Looks at the clean images `pixels`, `[n, 3, height, width]` at the model's resolution, one for each of `prompts`.
    ///
    /// # Errors
    /// When the size does not fit.
    pub fn new(
        assistant: &'a Assistant,
        prompts: &[Prompt],
        targets: &[Vec<u32>],
        pixels: &Tensor,
        memory: Memory,
    ) -> Result<Self> {
        let (.., height, width) = pixels.dims4()?;
        let targets: Vec<Vec<Vec<u32>>> = targets.iter().map(|target| vec![target.clone()]).collect();
        let scoring = Scoring::new(assistant, prompts, &targets)?;
        let features = policy::encode(assistant, std::slice::from_ref(pixels))?;
        let hidden = assistant.vlm.forward(Some(&features), &scoring.batch)?;
        let clean = (0..prompts.len())
            .map(|item| Ok(scoring.predicting(&hidden, scoring.targets_of(item..item + 1))?.detach()))
            .collect::<Result<_>>()?;
        Ok(Self { assistant, prompts: prompts.to_vec(), targets, clean, model_size: [height, width], memory })
    }

    fn scoring(&self, items: &[usize]) -> Result<Scoring> {
        let prompts: Vec<Prompt> = items.iter().map(|&item| self.prompts[item].clone()).collect();
        let targets: Vec<Vec<Vec<u32>>> = items.iter().map(|&item| self.targets[item].clone()).collect();
        Scoring::new(self.assistant, &prompts, &targets)
    }

    /// Divergence at every target token.
    fn of_tokens(&self, scoring: &Scoring, hidden: &Tensor, items: &[usize]) -> candle_core::Result<Tensor> {
        let clean: Vec<&Tensor> = items.iter().map(|&item| &self.clean[item]).collect();
        let now = scoring.predicting(hidden, 0..scoring.num_targets())?;
        self.assistant.vlm.divergence(&Tensor::cat(&clean, 0)?, &now)
    }
}

/// Sums over the tokens of each prompt.
fn of_items(scoring: &Scoring, tokens: &[f32]) -> Vec<f32> {
    let sum = |place: usize| {
        let own = &tokens[scoring.targets_of(place..place + 1)];
        own.iter().map(|value| f64::from(*value)).sum::<f64>() as f32
    };
    (0..scoring.spans.len()).map(sum).collect()
}

impl Objective for DivergenceTarget<'_> {
    fn loss_and_gradient(&self, pixels: &Tensor, items: &[usize]) -> Result<(Vec<f32>, Tensor)> {
        let scoring = self.scoring(items)?;
        let tokens = RefCell::new(Vec::new());
        let pass = PixelPass {
            assistant: self.assistant,
            scoring: &scoring,
            count: items.len(),
            model_size: self.model_size,
            memory: self.memory,
        };
        let gradient = pass.gradient(pixels, &|pixels| Ok(pixels.clone()), &|hidden| {
            let divergence = self.of_tokens(&scoring, hidden, items)?;
            *tokens.borrow_mut() = divergence.to_vec1()?;
            divergence.sum_all()
        })?;
        Ok((of_items(&scoring, &tokens.into_inner()), gradient))
    }

    fn loss(&self, pixels: &Tensor, items: &[usize]) -> Result<Vec<f32>> {
        let scoring = self.scoring(items)?;
        let features = policy::encode(self.assistant, &[pixels.detach()])?;
        let hidden = self.assistant.vlm.forward(Some(&features), &scoring.batch)?;
        Ok(of_items(&scoring, &self.of_tokens(&scoring, &hidden, items)?.to_vec1::<f32>()?))
    }

    fn is_broken(&self, _pixels: &Tensor, _items: &[usize]) -> Result<Vec<bool>> {
        Err(anyhow::anyhow!("a divergence has no answer that could be wrong").into())
    }
}
