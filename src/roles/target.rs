//! The model as attack target: pixels to a loss that grows as the model gets worse, and its gradient.
//!
//! In a chain-of-thought model the letter is copied from the finished reasoning, so a loss on the letter alone has
//! almost no gradient to the pixels and would make any model look robust. The losses here therefore include the
//! tokens that carry what is seen; which one is used is named in every record.

use super::policy::{self, Scoring};
use crate::attack::loss::{log_softmax, log_sum, softmax};
use crate::attack::{NoiseBank, Objective, OptionLoss};
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
    /// What is maximised, over the completions' scores.
    pub loss: OptionLoss,
    /// Completions to score: the right one first, then wrong ones where the loss compares.
    pub completions: Vec<Vec<u32>>,
    /// The tokens of each completion that count.
    pub counted: Vec<Range<usize>>,
    /// Which option is right.
    pub answer: usize,
    /// Names the item's noise.
    pub key: u64,
}

impl Aim {
    /// The likelihood of one completion, each of its tokens, without noise: what a measurement attacks.
    pub fn at_completion(
        prompt: Prompt,
        model_size: [usize; 2],
        completion: Vec<u32>,
        answer: usize,
    ) -> Self {
        let counted = vec![0..completion.len()];
        let loss = OptionLoss::Likelihood;
        Self { prompt, model_size, loss, completions: vec![completion], counted, answer, key: 0 }
    }
}

/// What the model itself answers about each of `items` when it is shown these pixels, `[n, 3, height, width]` in [0, 1] at
/// its own resolution; none where the answer cannot be read.
pub type Answers<'a> = &'a dyn Fn(&Tensor, &[usize]) -> Result<Vec<Option<usize>>>;

/// A batch of items under attack.
pub struct Target<'a> {
    /// The model, without gradients of its own.
    pub assistant: &'a Assistant,
    /// The items.
    pub aims: Vec<Aim>,
    /// Its answers, by which items are judged.
    pub answers: Answers<'a>,
    /// Attack the model under this noise, by the mean of the option's shares; `None`: the model itself.
    pub noise: Option<NoiseBank>,
    /// Noisy images in one pass.
    pub draws_at_once: usize,
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

    /// Where the counted tokens of completion `c` stand in the list of targets; `place` is the item's place in `scoring`.
    fn counted(&self, scoring: &Scoring, place: usize, item: usize, c: usize) -> Range<usize> {
        let (span, part) = (&scoring.spans[place][c], &self.aims[item].counted[c]);
        span.start + part.start..span.start + part.end
    }

    /// Each item's completions' log-likelihoods, in nats.
    fn scores(&self, scoring: &Scoring, items: &[usize], log_probs: &[f32]) -> Vec<Vec<f64>> {
        let sum = |span: Range<usize>| log_probs[span].iter().map(|v| f64::from(*v)).sum::<f64>();
        items
            .iter()
            .enumerate()
            .map(|(place, &item)| {
                (0..scoring.spans[place].len()).map(|c| sum(self.counted(scoring, place, item, c))).collect()
            })
            .collect()
    }

    /// Loss of each item and the weight of each token's log-probability in the sum of losses.
    fn weigh(&self, scoring: &Scoring, items: &[usize], log_probs: &[f32]) -> (Vec<f32>, Vec<f32>) {
        let mut weights = vec![0f32; log_probs.len()];
        let mut losses = Vec::with_capacity(items.len());
        for (place, scores) in self.scores(scoring, items, log_probs).iter().enumerate() {
            let (loss, slope) = self.aims[items[place]].loss.of(scores, 0);
            for (c, slope) in slope.into_iter().enumerate() {
                weights[self.counted(scoring, place, items[place], c)].fill(slope as f32);
            }
            losses.push(loss as f32);
        }
        (losses, weights)
    }
}

/// One pass of images through the model, and back to the pixels that they were made from.
pub(super) struct PixelPass<'a> {
    /// The model, without gradients of its own.
    pub(super) assistant: &'a Assistant,
    /// What is said about the images.
    pub(super) scoring: &'a Scoring,
    /// How many images there are, all of `model_size`.
    pub(super) count: usize,
    /// Their height and width.
    pub(super) model_size: [usize; 2],
    /// Whether activations are kept or recomputed.
    pub(super) memory: Memory,
}

impl PixelPass<'_> {
    /// The gradient by `pixels` of `loss`, a number made from the decoder's last state. `prepare` takes `pixels` to the
    /// model's images.
    pub(super) fn gradient(
        &self,
        pixels: &Tensor,
        prepare: &dyn Fn(&Tensor) -> candle_core::Result<Tensor>,
        loss: &dyn Fn(&Tensor) -> candle_core::Result<Tensor>,
    ) -> Result<Tensor> {
        let variable = Var::from_tensor(&pixels.detach())?;
        let inputs = [variable.as_tensor().clone()];
        let vlm = &self.assistant.vlm;
        let [height, width] = self.model_size;
        let plan = vlm.vision_plan(&vec![vlm.grid_of(height, width); self.count])?;
        let mut stages: Vec<Stage<'_>> = vec![Box::new(|state| Ok(vec![prepare(&state[0])?]))];
        stages.extend(vlm.vision_stages(&plan));
        stages.extend(self.scoring.stages(self.assistant));
        let (_, gradients) = loss_and_gradients(&stages, &inputs, |state| loss(&state[0]), &[], self.memory)?;
        gradients.get(variable.as_tensor()).cloned().ok_or_else(|| {
            Error::NonFinite("no gradient reached the pixels: the attack would be void".to_owned())
        })
    }
}

impl Target<'_> {
    /// Losses of pixels at the model's resolution and, if `slopes` weighs each token's log-probability, their gradient by
    /// `pixels`.
    ///
    /// `prepare` takes `pixels` to the model's images, of which there is one for each of `items`.
    fn gradient_by(
        &self,
        pixels: &Tensor,
        items: &[usize],
        prepare: &dyn Fn(&Tensor) -> candle_core::Result<Tensor>,
        slopes: &dyn Fn(&Scoring, &[f32]) -> Vec<f32>,
    ) -> Result<Tensor> {
        let scoring = self.scoring(items)?;
        let pass = PixelPass {
            assistant: self.assistant,
            scoring: &scoring,
            count: items.len(),
            model_size: self.aims[items[0]].model_size,
            memory: self.memory,
        };
        pass.gradient(pixels, prepare, &|hidden| {
            let log_probs = scoring.log_probs(self.assistant, hidden, 1.0)?;
            let weights = slopes(&scoring, &log_probs.to_vec1::<f32>()?);
            let weights = Tensor::from_vec(weights, log_probs.dims1()?, log_probs.device())?;
            (log_probs * weights)?.sum_all()
        })
    }

    /// Log of the right option's share in each noisy image of an item whose pixels are at the model's resolution,
    /// `[1, 3, height, width]`.
    fn log_shares(&self, bank: &NoiseBank, item: usize, pixels: &Tensor) -> Result<Vec<f64>> {
        let mut log_shares = Vec::with_capacity(bank.draws);
        for from in (0..bank.draws).step_by(self.draws_at_once) {
            let count = self.draws_at_once.min(bank.draws - from);
            let items = vec![item; count];
            let scoring = self.scoring(&items)?;
            let features = policy::encode(self.assistant, &[self.noisy(bank, item, pixels, from, count)?])?;
            let log_probs = scoring.evaluate(self.assistant, Some(&features), 1.0)?;
            log_shares.extend(self.scores(&scoring, &items, &log_probs).iter().map(|s| log_softmax(s, 0)));
        }
        Ok(log_shares)
    }

    /// Draws `from..from + count` of an item's noise added to its pixels.
    fn noisy(
        &self,
        bank: &NoiseBank,
        item: usize,
        pixels: &Tensor,
        from: usize,
        count: usize,
    ) -> candle_core::Result<Tensor> {
        let (_, channels, height, width) = pixels.dims4()?;
        let noise = bank.draws(self.aims[item].key, from, count, channels * height * width);
        let noise = Tensor::from_vec(noise, (count, channels, height, width), pixels.device())?;
        Tensor::cat(&vec![pixels; count], 0)? + noise
    }

    /// The smoothed model's losses: the negative log of the right option's mean share over the bank (Salman et al. 2019,
    /// SmoothAdv), and their gradient if `with_gradient`.
    fn smoothed(
        &self,
        bank: &NoiseBank,
        pixels: &Tensor,
        items: &[usize],
        with_gradient: bool,
    ) -> Result<(Vec<f32>, Option<Tensor>)> {
        let (mut losses, mut gradients) = (Vec::new(), Vec::new());
        for (row, &item) in items.iter().enumerate() {
            let own = pixels.narrow(0, row, 1)?;
            let log_shares = self.log_shares(bank, item, &self.at_model_size(&own.detach(), &[item])?)?;
            losses.push(((log_shares.len() as f64).ln() - log_sum(&log_shares)) as f32);
            if !with_gradient {
                continue;
            }
            // d(-log mean_j s_j) = -sum_j w_j d log s_j with w the softmax of log s: nothing underflows.
            let weights = softmax(&log_shares);
            let mut sum: Option<Tensor> = None;
            for from in (0..bank.draws).step_by(self.draws_at_once) {
                let count = self.draws_at_once.min(bank.draws - from);
                let copies = vec![item; count];
                let prepare = |pixels: &Tensor| {
                    self.noisy(bank, item, &self.at_model_size(pixels, &[item])?, from, count)
                };
                let slopes = |scoring: &Scoring, log_probs: &[f32]| {
                    let mut slopes = vec![0f32; log_probs.len()];
                    for (copy, scores) in self.scores(scoring, &copies, log_probs).iter().enumerate() {
                        let (_, by_score) = OptionLoss::CrossEntropy.of(scores, 0);
                        for (c, slope) in by_score.into_iter().enumerate() {
                            let span = self.counted(scoring, copy, item, c);
                            slopes[span].fill((weights[from + copy] * slope) as f32);
                        }
                    }
                    slopes
                };
                let part = self.gradient_by(&own, &copies, &prepare, &slopes)?;
                sum = Some(match sum {
                    Some(sum) => (sum + part)?,
                    None => part,
                });
            }
            gradients.extend(sum);
        }
        let gradient = if with_gradient { Some(Tensor::cat(&gradients, 0)?) } else { None };
        Ok((losses, gradient))
    }
}

impl Objective for Target<'_> {
    fn loss_and_gradient(&self, pixels: &Tensor, items: &[usize]) -> Result<(Vec<f32>, Tensor)> {
        if let Some(bank) = &self.noise {
            let (losses, gradient) = self.smoothed(bank, pixels, items, true)?;
            let gradient = gradient.ok_or_else(|| anyhow::anyhow!("no item to attack"))?;
            return Ok((losses, gradient));
        }
        let losses = RefCell::new(Vec::new());
        let gradient = self.gradient_by(
            pixels,
            items,
            &|pixels| self.at_model_size(pixels, items),
            &|scoring, log_probs| {
                let (values, weights) = self.weigh(scoring, items, log_probs);
                *losses.borrow_mut() = values;
                weights
            },
        )?;
        Ok((losses.into_inner(), gradient))
    }

    fn loss(&self, pixels: &Tensor, items: &[usize]) -> Result<Vec<f32>> {
        if let Some(bank) = &self.noise {
            return Ok(self.smoothed(bank, pixels, items, false)?.0);
        }
        let scoring = self.scoring(items)?;
        let features = policy::encode(self.assistant, &[self.at_model_size(&pixels.detach(), items)?])?;
        let log_probs = scoring.evaluate(self.assistant, Some(&features), 1.0)?;
        Ok(self.weigh(&scoring, items, &log_probs).0)
    }

    fn is_broken(&self, pixels: &Tensor, items: &[usize]) -> Result<Vec<bool>> {
        let answers = (self.answers)(&self.at_model_size(&pixels.detach(), items)?, items)?;
        Ok(answers.iter().zip(items).map(|(answer, &item)| *answer != Some(self.aims[item].answer)).collect())
    }
}
