//! The whole model: pixels and token ids to hidden states, logits and log-probabilities.
//!
//! A forward pass is a list of stages ([`Vlm::stages`]), so that training and attacks can keep or recompute what is
//! between, and a parity check can look at every hidden state. Losses live elsewhere.

use super::config::VlmConfig;
use super::denoiser::Denoiser;
use super::kv_cache::KvCache;
use super::parameters::{Build, Builder, Outline, Parameters};
use super::patches::Patchify;
use super::positions;
use super::text::{Decoder, LastRows, RowPlan};
use super::vision::{VisionPlan, VisionTower};
use crate::error::Result;
use crate::nn::attention::Layout;
use crate::nn::cross_entropy;
use crate::nn::divergence;
use crate::nn::linear::TensorMap;
use crate::nn::recompute::Stage;
use crate::nn::rows;
use candle_core::{Device, Tensor};
use std::sync::Arc;

/// A vision-language model.
#[derive(Debug, Clone)]
pub struct Vlm {
    config: VlmConfig,
    denoiser: Option<Denoiser>,
    patchify: Patchify,
    vision: VisionTower,
    decoder: Decoder,
    parameters: Parameters,
    device: Device,
}

/// Rows of the decoder for one forward pass: the tokens of all sequences one after another.
#[derive(Debug, Clone)]
pub struct Batch {
    /// Token of each row; image placeholders included.
    pub input_ids: Vec<u32>,
    /// Rows whose embedding is replaced by a merged image token, in the order of the images.
    pub image_rows: Vec<u32>,
    /// Angles and visibility.
    pub plan: RowPlan,
}

/// What the vision tower gives the decoder.
#[derive(Debug, Clone)]
pub struct Features {
    /// `[merged, hidden]`, the images' tokens.
    pub merged: Tensor,
    /// Deep features of the same shape, added to the hidden state after the first decoder layers.
    pub deep: Vec<Tensor>,
}

impl Features {
    /// The features of the tokens `rows`, in that order; used to show one image to several prompts.
    ///
    /// # Errors
    /// When a row does not exist.
    pub fn select(&self, rows: &[u32]) -> Result<Self> {
        Ok(Self {
            merged: rows::select(&self.merged, rows)?,
            deep: self
                .deep
                .iter()
                .map(|deep| rows::select(deep, rows))
                .collect::<candle_core::Result<_>>()?,
        })
    }

    /// Those of several lists of images as one.
    ///
    /// # Errors
    /// When they are of different models, or there is none.
    pub fn joined(parts: &[&Self]) -> candle_core::Result<Self> {
        let [first, rest @ ..] = parts else { candle_core::bail!("no features to join") };
        if rest.is_empty() {
            return Ok((*first).clone());
        }
        let join = |of: &dyn Fn(&Self) -> &Tensor| {
            let tensors: Vec<&Tensor> = parts.iter().map(|part| of(part)).collect();
            Tensor::cat(&tensors, 0)
        };
        let deep =
            (0..first.deep.len()).map(|i| join(&|part| &part.deep[i])).collect::<candle_core::Result<_>>()?;
        Ok(Self { merged: join(&|part| &part.merged)?, deep })
    }

    /// Memory that the numbers take.
    pub fn bytes(&self) -> usize {
        let tensors = std::iter::once(&self.merged).chain(&self.deep);
        tensors.map(|tensor| tensor.elem_count() * tensor.dtype().size_in_bytes()).sum()
    }

    /// Without history: gradients do not flow below.
    #[must_use]
    pub fn detach(&self) -> Self {
        Self { merged: self.merged.detach(), deep: self.deep.iter().map(Tensor::detach).collect() }
    }

    /// As a state of [`Vlm::decoder_stages`].
    pub fn into_state(self) -> Vec<Tensor> {
        std::iter::once(self.merged).chain(self.deep).collect()
    }
}

impl Vlm {
    /// Puts a model together from named tensors.
    ///
    /// # Errors
    /// What the sources refuse: missing or misshapen tensors.
    pub fn new(config: &VlmConfig, patchify: Patchify, build: Build<'_>, device: &Device) -> Result<Self> {
        let mut builder = Builder::new(build, device.clone());
        let vision = VisionTower::load(&mut builder, &config.vision)?;
        let decoder = Decoder::load(&mut builder, &config.text, config.tie_word_embeddings)?;
        Ok(Self {
            config: config.clone(),
            denoiser: None,
            patchify,
            vision,
            decoder,
            parameters: builder.finish(),
            device: device.clone(),
        })
    }

    /// Canonical names and shapes of the weights that a model of this shape has, without making it.
    ///
    /// # Errors
    /// When the configuration contradicts itself.
    pub fn outline(config: &VlmConfig) -> Result<Outline> {
        let mut builder = Builder::of_outline();
        VisionTower::load(&mut builder, &config.vision)?;
        Decoder::load(&mut builder, &config.text, config.tie_word_embeddings)?;
        Ok(builder.into_outline())
    }

    /// The same weights, shared, without gradients: for attacks, rollouts and evaluation while training.
    ///
    /// # Errors
    /// When the device has no room.
    pub fn detached(&self) -> Result<Self> {
        self.map(&|tensor| Ok(tensor.detach()))
    }

    /// A copy that later updates of trained weights do not reach, without gradients; frozen weights are shared.
    ///
    /// # Errors
    /// As [`Vlm::detached`].
    pub fn frozen_copy(&self) -> Result<Self> {
        self.map(&|tensor| if tensor.track_op() { tensor.detach().copy() } else { Ok(tensor.clone()) })
    }

    fn map(&self, f: TensorMap<'_>) -> Result<Self> {
        Ok(Self { vision: self.vision.map(f)?, decoder: self.decoder.map(f)?, ..self.clone() })
    }

    /// The shape.
    pub fn config(&self) -> &VlmConfig {
        &self.config
    }

    /// The same model with a denoiser in front: part of the function for attacks and certificates.
    #[must_use]
    pub fn behind(self, denoiser: Denoiser) -> Self {
        Self { denoiser: Some(denoiser), ..self }
    }

    /// What stands in front of the model.
    pub fn denoiser(&self) -> Option<&Denoiser> {
        self.denoiser.as_ref()
    }

    /// How pixels become patches.
    pub fn patchify(&self) -> &Patchify {
        &self.patchify
    }

    /// The weights by name.
    pub fn parameters(&self) -> &Parameters {
        &self.parameters
    }

    /// Where the model lives.
    pub fn device(&self) -> &Device {
        &self.device
    }

    /// Patches of an image of this size: `[frames, rows, columns]`.
    pub fn grid_of(&self, height: usize, width: usize) -> [usize; 3] {
        [1, height / self.patchify.patch_size, width / self.patchify.patch_size]
    }

    /// Everything about images of these grids that does not depend on their pixels.
    ///
    /// # Errors
    /// When tensors cannot be made on the device.
    pub fn vision_plan(&self, grids: &[[usize; 3]]) -> Result<VisionPlan> {
        self.vision.plan(grids, &self.device)
    }

    /// Angles and visibility for rows at these temporal, height and width positions.
    ///
    /// # Errors
    /// When tensors cannot be made on the device.
    pub fn row_plan(&self, row_positions: &[Vec<i64>; 3], layout: Layout) -> Result<RowPlan> {
        let (cos, sin) = positions::rotary_table(&self.config.text, row_positions, &self.device)?;
        Ok(RowPlan { cos, sin, layout: Arc::new(layout), last: None })
    }

    /// The same where only the last hidden states of `rows` (ascending) are wanted: they are all that [`Vlm::forward`]
    /// gives then, and the last layer computes little else. Says whether it is so; without rows, or where deep features
    /// go into the last layer, all rows are given.
    ///
    /// # Errors
    /// As [`Vlm::row_plan`]; when a row does not exist.
    pub fn row_plan_for(
        &self,
        row_positions: &[Vec<i64>; 3],
        layout: Layout,
        rows: &[u32],
    ) -> Result<(RowPlan, bool)> {
        let plan = self.row_plan(row_positions, layout)?;
        let deep = self.config.vision.deepstack_layers.len();
        if rows.is_empty() || deep >= self.decoder.num_layers() {
            return Ok((plan, false));
        }
        let last = LastRows {
            rows: rows.to_vec(),
            cos: rows::select(&plan.cos, rows)?,
            sin: rows::select(&plan.sin, rows)?,
            layout: Arc::new(plan.layout.of_rows(rows)?),
        };
        Ok((RowPlan { last: Some(last), ..plan }, true))
    }

    /// Stages from pixels to features: the state goes from a list of `[n, 3, height, width]` tensors in [0, 1] (their
    /// images in the plan's order) to `[merged, deep…]`.
    pub fn vision_stages<'a>(&'a self, plan: &'a VisionPlan) -> Vec<Stage<'a>> {
        let mut stages: Vec<Stage<'a>> = vec![Box::new(move |state| {
            let patches = state
                .iter()
                .map(|pixels| match &self.denoiser {
                    Some(denoiser) => self.patchify.apply(&denoiser.apply(pixels)?),
                    None => self.patchify.apply(pixels),
                })
                .collect::<candle_core::Result<Vec<_>>>()?;
            let patches = if patches.len() == 1 { patches[0].clone() } else { Tensor::cat(&patches, 0)? };
            Ok(vec![self.vision.embed(&patches, plan)?])
        })];
        for index in 0..self.vision.depth() {
            stages.push(Box::new(move |state| {
                let hidden = self.vision.block(index, &state[0], plan)?;
                let deep = self.vision.deep_features(index, &hidden)?;
                Ok(std::iter::once(hidden).chain(state[1..].iter().cloned()).chain(deep).collect())
            }));
        }
        stages.push(Box::new(move |state| {
            let merged = self.vision.merge(&state[0], plan)?;
            Ok(std::iter::once(merged).chain(state[1..].iter().cloned()).collect())
        }));
        stages
    }

    /// Stages from features (`[merged, deep…]`, or nothing for text alone) to `[normalised hidden]`,
    /// `[rows, hidden]` of the rows that the plan wants.
    /// After the first stage the first tensor of the state is the input of decoder layer 0, and so on.
    pub fn decoder_stages<'a>(&'a self, batch: &'a Batch) -> Vec<Stage<'a>> {
        let mut stages: Vec<Stage<'a>> = vec![Box::new(move |state| {
            let mut hidden = self.decoder.embed(&batch.input_ids)?;
            if let Some(merged) = state.first() {
                hidden = rows::replace(&hidden, &batch.image_rows, merged)?;
            }
            Ok(std::iter::once(hidden).chain(state.iter().skip(1).cloned()).collect())
        })];
        for index in 0..self.decoder.num_layers() {
            stages.push(Box::new(move |state| {
                let hidden = self.decoder.layer(index, &state[0], &batch.plan, None)?;
                let (hidden, rest) = add_deep(hidden, &state[1..], &batch.image_rows)?;
                Ok(std::iter::once(hidden).chain(rest.iter().cloned()).collect())
            }));
        }
        stages.push(Box::new(move |state| Ok(vec![self.decoder.finish(&state[0])?])));
        stages
    }

    /// The features of images; `pixels` as in [`Vlm::vision_stages`].
    ///
    /// # Errors
    /// When an image's size does not fit.
    pub fn encode_images(&self, pixels: &[Tensor], plan: &VisionPlan) -> Result<Features> {
        let mut state = pixels.to_vec();
        for stage in self.vision_stages(plan) {
            state = stage(&state)?;
        }
        let merged = state.remove(0);
        Ok(Features { merged, deep: state })
    }

    /// The normalised hidden state of every row that the plan wants, `[rows, hidden]`.
    ///
    /// # Errors
    /// When features and image rows do not match.
    pub fn forward(&self, features: Option<&Features>, batch: &Batch) -> Result<Tensor> {
        let mut state = features.map(|f| f.clone().into_state()).unwrap_or_default();
        for stage in self.decoder_stages(batch) {
            state = stage(&state)?;
        }
        Ok(state.remove(0))
    }

    /// As [`Vlm::forward`], with the rows' keys and values written to `places` of the cache; the batch's layout names
    /// cache rows.
    ///
    /// # Errors
    /// As [`Vlm::forward`].
    pub fn forward_cached(
        &self,
        features: Option<&Features>,
        batch: &Batch,
        cache: &KvCache,
        places: &[u32],
    ) -> Result<Tensor> {
        let mut hidden = self.decoder.embed(&batch.input_ids)?;
        let mut deep: &[Tensor] = &[];
        if let Some(features) = features {
            hidden = rows::replace(&hidden, &batch.image_rows, &features.merged)?;
            deep = &features.deep;
        }
        for index in 0..self.decoder.num_layers() {
            hidden = self.decoder.layer(index, &hidden, &batch.plan, Some((cache.layer(index), places)))?;
            (hidden, deep) = add_deep(hidden, deep, &batch.image_rows)?;
        }
        Ok(self.decoder.finish(&hidden)?)
    }

    /// Logits of normalised hidden rows, `[rows, vocab]`.
    ///
    /// # Errors
    /// When the device has no room.
    pub fn logits(&self, hidden: &Tensor) -> Result<Tensor> {
        Ok(self.decoder.head.forward(hidden)?)
    }

    /// Log-probabilities of `targets` under the rows' softmax at `temperature`, `[rows]`, in nats.
    ///
    /// # Errors
    /// When a target is not in the vocabulary.
    pub fn log_probs(
        &self,
        hidden: &Tensor,
        targets: &[u32],
        temperature: f64,
    ) -> candle_core::Result<Tensor> {
        cross_entropy::log_probs_of(hidden, &self.decoder.head, targets, temperature)
    }

    /// Divergence of the next token's distribution at each row of `p` from that at the same row of `q`, `[rows]`, in nats; both
    /// are normalised hidden rows.
    ///
    /// # Errors
    /// When the two differ in shape.
    pub fn divergence(&self, p: &Tensor, q: &Tensor) -> candle_core::Result<Tensor> {
        divergence::divergence_of(p, q, &self.decoder.head)
    }
}

/// Adds the first of the deep features that are left to the image rows.
fn add_deep<'a>(
    hidden: Tensor,
    deep: &'a [Tensor],
    image_rows: &[u32],
) -> candle_core::Result<(Tensor, &'a [Tensor])> {
    match deep.split_first() {
        Some((first, rest)) => Ok((rows::add(&hidden, image_rows, first)?, rest)),
        None => Ok((hidden, deep)),
    }
}
