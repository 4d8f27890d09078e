//! The model as attack target: pixels to a loss that grows as the model gets worse, and its gradient.
//!
//! In a chain-of-thought model the letter is copied from the finished reasoning, so a loss on the letter alone has
//! almost no gradient to the pixels and would make any model look robust. The losses here therefore include the
//! tokens that carry what is seen; which one is used is named in every record.

use super::policy::{self, Scoring};
use crate::attack::Objective;
use crate::error::{Error, Result};
use crate::model::assistant::Assistant;
use crate::model::generate::Prompt;
use crate::model::resize::resize;
use crate::nn::recompute::{Memory, Stage, loss_and_gradients};
use candle_core::{Tensor, Var};
use std::cell::RefCell;
use std::ops::Range;

/// What one item is attacked on.
#[derive(Debug, Clone)]
pub struct Aim {
    /// The question.
    pub prompt: Prompt,
    /// Height and width of the image at the model's resolution.
    pub model_size: [usize; 2],
    /// Completions to score: the right one first, then wrong ones where the loss compares.
    pub completions: Vec<Vec<u32>>,
    /// The tokens of each completion that count.
    pub counted: Vec<Range<usize>>,
    /// Which option is right, and how many there are.
    pub answer: usize,
    /// Number of options.
    pub num_options: usize,
}

/// A batch of items under attack.
pub struct Target<'a> {
    /// The model, without gradients of its own.
    pub assistant: &'a Assistant,
    /// The items.
    pub aims: Vec<Aim>,
    /// Longest completion when it is asked freely.
    pub max_new_tokens: usize,
    /// The answer parser.
    pub parse: &'a dyn Fn(&str, usize) -> Option<usize>,
    /// Whether activations are kept or recomputed.
    pub memory: Memory,
}

impl std::fmt::Debug for Target<'_> {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Target").field("aims", &self.aims.len()).finish_non_exhaustive()
    }
}

impl Target<'_> {
    /// Pixels at the model's resolution, by the differentiable resize where they are not there yet.
    fn at_model_size(&self, pixels: &Tensor, items: &[usize]) -> candle_core::Result<Tensor> {
        match items.first() {
            Some(&first) => resize(pixels, self.aims[first].model_size),
            None => Ok(pixels.clone()),
        }
    }

    fn scoring(&self, items: &[usize]) -> Result<Scoring> {
        let prompts: Vec<Prompt> = items.iter().map(|&i| self.aims[i].prompt.clone()).collect();
        let completions: Vec<Vec<Vec<u32>>> =
            items.iter().map(|&i| self.aims[i].completions.clone()).collect();
        Scoring::new(self.assistant, &prompts, &completions)
    }

    /// Loss of each item and the weight of each token's log-probability in the sum of losses.
    fn weigh(&self, scoring: &Scoring, items: &[usize], log_probs: &[f32]) -> (Vec<f32>, Vec<f32>) {
        let mut weights = vec![0f32; log_probs.len()];
        let mut losses = Vec::with_capacity(items.len());
        for (spans, &item) in scoring.spans.iter().zip(items) {
            let aim = &self.aims[item];
            let counted = |c: usize| {
                let (span, part) = (&spans[c], &aim.counted[c]);
                span.start + part.start..span.start + part.end
            };
            let score = |c: usize| log_probs[counted(c)].iter().map(|v| f64::from(*v)).sum::<f64>();
            let right = score(0);
            let mut loss = -right;
            weights[counted(0)].fill(-1.0);
            let rivals = (1..spans.len()).map(|c| (c, score(c)));
            if let Some((rival, rival_score)) = rivals.max_by(|a, b| a.1.total_cmp(&b.1)) {
                loss += rival_score;
                for weight in &mut weights[counted(rival)] {
                    *weight += 1.0;
                }
            }
            losses.push(loss as f32);
        }
        (losses, weights)
    }
}

impl Objective for Target<'_> {
    fn loss_and_gradient(&self, pixels: &Tensor, items: &[usize]) -> Result<(Vec<f32>, Tensor)> {
        let scoring = self.scoring(items)?;
        let variable = Var::from_tensor(&pixels.detach())?;
        let inputs = [variable.as_tensor().clone()];
        let model_grid = {
            let [height, width] = self.aims[items[0]].model_size;
            vec![self.assistant.vlm.grid_of(height, width); items.len()]
        };
        let plan = self.assistant.vlm.vision_plan(&model_grid)?;
        let mut stages: Vec<Stage<'_>> =
            vec![Box::new(|state| Ok(vec![self.at_model_size(&state[0], items)?]))];
        stages.extend(self.assistant.vlm.vision_stages(&plan));
        stages.extend(scoring.stages(self.assistant));
        let losses = RefCell::new(Vec::new());
        let loss = |state: &[Tensor]| {
            let log_probs = scoring.log_probs(self.assistant, &state[0], 1.0)?;
            let (values, weights) = self.weigh(&scoring, items, &log_probs.to_vec1::<f32>()?);
            *losses.borrow_mut() = values;
            let weights = Tensor::from_vec(weights, log_probs.dims1()?, log_probs.device())?;
            (log_probs * weights)?.sum_all()
        };
        let (_, gradients) = loss_and_gradients(&stages, &inputs, loss, &[], self.memory)?;
        let gradient = gradients.get(variable.as_tensor()).cloned().ok_or_else(|| {
            Error::NonFinite("no gradient reached the pixels: the attack would be void".to_owned())
        })?;
        Ok((losses.into_inner(), gradient))
    }

    fn loss(&self, pixels: &Tensor, items: &[usize]) -> Result<Vec<f32>> {
        let scoring = self.scoring(items)?;
        let features = policy::encode(self.assistant, &[self.at_model_size(&pixels.detach(), items)?])?;
        let log_probs = scoring.evaluate(self.assistant, Some(&features), 1.0)?;
        Ok(self.weigh(&scoring, items, &log_probs).0)
    }

    fn is_broken(&self, pixels: &Tensor, items: &[usize]) -> Result<Vec<bool>> {
        let prompts: Vec<Prompt> = items.iter().map(|&i| self.aims[i].prompt.clone()).collect();
        let pixels = self.at_model_size(&pixels.detach(), items)?;
        let completions = policy::greedy_answers(self.assistant, &prompts, &[pixels], self.max_new_tokens)?;
        completions
            .iter()
            .zip(items)
            .map(|(completion, &item)| {
                let text = self.assistant.text_of(completion)?;
                Ok((self.parse)(&text, self.aims[item].num_options) != Some(self.aims[item].answer))
            })
            .collect()
    }
}
