//! The decoder: a causal transformer over packed rows, with or without a key-value cache.

use super::config::TextConfig;
use super::kv_cache::LayerCache;
use super::parameters::Builder;
use crate::error::Result;
use crate::nn::activation::gated;
use crate::nn::attention::{Heads, Layout, attention};
use crate::nn::linear::{Linear, TensorMap};
use crate::nn::{norm, rotary, rows};
use candle_core::Tensor;
use std::sync::Arc;

/// The decoder's weights.
#[derive(Debug, Clone)]
pub struct Decoder {
    config: TextConfig,
    /// The embedding table `[vocab, hidden]`, unless it is the output layer.
    embedding: Option<Linear>,
    layers: Vec<Layer>,
    norm: Tensor,
    /// The output layer, `[vocab, hidden]`.
    pub(super) head: Linear,
}

#[derive(Debug, Clone)]
struct Layer {
    input_norm: Tensor,
    q: Linear,
    k: Linear,
    v: Linear,
    o: Linear,
    q_norm: Option<Tensor>,
    k_norm: Option<Tensor>,
    post_norm: Tensor,
    gate: Linear,
    up: Linear,
    down: Linear,
}

/// What every layer needs to know about the rows: angles, and who sees whom.
#[derive(Debug, Clone)]
pub struct RowPlan {
    /// `[rows, head_dim / 2]`.
    pub cos: Tensor,
    /// `[rows, head_dim / 2]`.
    pub sin: Tensor,
    /// Keys are rows of this batch, or rows of the cache where there is one.
    pub layout: Arc<Layout>,
    /// The rows whose last hidden state is wanted; none: all.
    pub last: Option<LastRows>,
}

/// The rows that the last layer computes beyond keys and values, where nothing asks for the others.
#[derive(Debug, Clone)]
pub struct LastRows {
    /// Ascending.
    pub rows: Vec<u32>,
    /// `[rows, head_dim / 2]`.
    pub cos: Tensor,
    /// `[rows, head_dim / 2]`.
    pub sin: Tensor,
    /// As for all rows, for these alone.
    pub layout: Arc<Layout>,
}

impl Decoder {
    pub(super) fn load(b: &mut Builder<'_>, config: &TextConfig, is_tied: bool) -> Result<Self> {
        let root = "model.language_model";
        let (hidden, inner, dim) = (config.hidden_size, config.intermediate_size, config.head_dim);
        let (q_width, kv_width) = (config.num_heads * dim, config.num_kv_heads * dim);
        let table = b.linear(&format!("{root}.embed_tokens"), &[config.vocab_size, hidden], false)?;
        let mut layers = Vec::with_capacity(config.num_layers);
        for index in 0..config.num_layers {
            let prefix = format!("{root}.layers.{index}");
            let head_norm = |b: &mut Builder<'_>, name: &str| {
                let name = format!("{prefix}.self_attn.{name}.weight");
                config.qk_norm.then(|| b.tensor(&name, &[dim])).transpose()
            };
            let attn = format!("{prefix}.self_attn");
            let mlp = format!("{prefix}.mlp");
            let bias = config.attention_bias;
            layers.push(Layer {
                input_norm: b.tensor(&format!("{prefix}.input_layernorm.weight"), &[hidden])?,
                q: b.linear(&format!("{attn}.q_proj"), &[q_width, hidden], bias)?,
                k: b.linear(&format!("{attn}.k_proj"), &[kv_width, hidden], bias)?,
                v: b.linear(&format!("{attn}.v_proj"), &[kv_width, hidden], bias)?,
                o: b.linear(&format!("{attn}.o_proj"), &[hidden, q_width], config.attention_output_bias)?,
                q_norm: head_norm(b, "q_norm")?,
                k_norm: head_norm(b, "k_norm")?,
                post_norm: b.tensor(&format!("{prefix}.post_attention_layernorm.weight"), &[hidden])?,
                gate: b.linear(&format!("{mlp}.gate_proj"), &[inner, hidden], false)?,
                up: b.linear(&format!("{mlp}.up_proj"), &[inner, hidden], false)?,
                down: b.linear(&format!("{mlp}.down_proj"), &[hidden, inner], false)?,
            });
        }
        let norm = b.tensor(&format!("{root}.norm.weight"), &[hidden])?;
        let (embedding, head) = if is_tied {
            (None, table)
        } else {
            (Some(table), b.linear("lm_head", &[config.vocab_size, hidden], false)?)
        };
        Ok(Self { config: config.clone(), embedding, layers, norm, head })
    }

    /// The same decoder over `f` of every tensor that may train.
    pub(super) fn map(&self, f: TensorMap<'_>) -> candle_core::Result<Self> {
        let layer = |layer: &Layer| -> candle_core::Result<Layer> {
            Ok(Layer {
                input_norm: f(&layer.input_norm)?,
                q: layer.q.map(f)?,
                k: layer.k.map(f)?,
                v: layer.v.map(f)?,
                o: layer.o.map(f)?,
                q_norm: layer.q_norm.as_ref().map(f).transpose()?,
                k_norm: layer.k_norm.as_ref().map(f).transpose()?,
                post_norm: f(&layer.post_norm)?,
                gate: layer.gate.map(f)?,
                up: layer.up.map(f)?,
                down: layer.down.map(f)?,
            })
        };
        Ok(Self {
            config: self.config.clone(),
            embedding: self.embedding.as_ref().map(|table| table.map(f)).transpose()?,
            layers: self.layers.iter().map(layer).collect::<candle_core::Result<_>>()?,
            norm: f(&self.norm)?,
            head: self.head.map(f)?,
        })
    }

    /// Number of layers.
    pub(super) fn num_layers(&self) -> usize {
        self.layers.len()
    }

    /// Token rows.
    pub(super) fn embed(&self, ids: &[u32]) -> candle_core::Result<Tensor> {
        self.embedding.as_ref().unwrap_or(&self.head).weight_rows(ids)
    }

    /// Layer `index`; with a cache, the rows' keys and values are written to the cache rows given and attention reads
    /// the cache.
    pub(super) fn layer(
        &self,
        index: usize,
        hidden: &Tensor,
        plan: &RowPlan,
        cache: Option<(&LayerCache, &[u32])>,
    ) -> candle_core::Result<Tensor> {
        let (layer, config) = (&self.layers[index], &self.config);
        let heads = Heads {
            num_heads: config.num_heads,
            num_kv_heads: config.num_kv_heads,
            head_dim: config.head_dim,
            scale: 1.0 / (config.head_dim as f32).sqrt(),
        };
        let normal = norm::rms_norm(hidden, &layer.input_norm, config.rms_norm_eps)?;
        let rotated = |projection: &Linear, head_norm: &Option<Tensor>, x: &Tensor, cos, sin| {
            let x = projection.forward(x)?;
            let x = match head_norm {
                Some(weight) => norm::rms_norm(&x, weight, config.rms_norm_eps)?,
                None => x,
            };
            rotary::rotary(&x, cos, sin)
        };
        let k = rotated(&layer.k, &layer.k_norm, &normal, &plan.cos, &plan.sin)?;
        let v = layer.v.forward(&normal)?;
        // Of the last layer, rows that nobody asks for give keys and values alone.
        let last = plan.last.as_ref().filter(|_| index + 1 == self.layers.len());
        let (q, hidden, layout) = if let Some(LastRows { rows, cos, sin, layout }) = last {
            let normal = rows::select(&normal, rows)?;
            (rotated(&layer.q, &layer.q_norm, &normal, cos, sin)?, rows::select(hidden, rows)?, layout)
        } else {
            let q = rotated(&layer.q, &layer.q_norm, &normal, &plan.cos, &plan.sin)?;
            (q, hidden.clone(), &plan.layout)
        };
        let mixed = match cache {
            Some((cache, places)) => {
                cache.write(places, &k, &v)?;
                attention(&q, cache.keys(), cache.values(), heads, layout)?
            }
            None => attention(&q, &k, &v, heads, layout)?,
        };
        let hidden = layer.o.forward_added(&mixed, &hidden)?;
        let normal = norm::rms_norm(&hidden, &layer.post_norm, config.rms_norm_eps)?;
        let inner = gated(&layer.gate.forward(&normal)?, &layer.up.forward(&normal)?, config.activation)?;
        layer.down.forward_added(&inner, &hidden)
    }

    /// The norm before the output layer.
    pub(super) fn finish(&self, hidden: &Tensor) -> candle_core::Result<Tensor> {
        norm::rms_norm(hidden, &self.norm, self.config.rms_norm_eps)
    }
}
