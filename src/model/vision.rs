//! The vision tower: patches to tokens of the decoder's width.
//!
//! One tower for every checkpoint family; windows, learned positions, deep features, norms and MLPs are features of
//! [`VisionConfig`]. Rows of all images stand one after another; attention never crosses an image.

use super::config::{VisionConfig, VisionMlp, VisionNorm};
use super::parameters::Builder;
use super::positions::{self, PositionTaps};
use crate::error::Result;
use crate::nn::activation::{Activation, activate, gated};
use crate::nn::attention::{Heads, Layout, joint_attention};
use crate::nn::linear::{Linear, TensorMap};
use crate::nn::{norm, rows};
use candle_core::{Device, Tensor};
use std::sync::Arc;

/// The tower's weights.
#[derive(Debug, Clone)]
pub struct VisionTower {
    config: VisionConfig,
    patch_embed: Linear,
    /// Learned position table, `[positions, hidden]`.
    position_table: Option<Tensor>,
    blocks: Vec<VisionBlock>,
    merger: Merger,
    deepstack: Vec<Merger>,
}

#[derive(Debug, Clone)]
enum Norm {
    Rms { weight: Tensor, eps: f64 },
    Layer { weight: Tensor, bias: Tensor, eps: f64 },
}

#[derive(Debug, Clone)]
enum Mlp {
    Gated { gate: Linear, up: Linear, down: Linear, activation: Activation },
    Plain { input: Linear, output: Linear, activation: Activation },
}

#[derive(Debug, Clone)]
struct VisionBlock {
    norm1: Norm,
    qkv: Linear,
    proj: Linear,
    norm2: Norm,
    mlp: Mlp,
}

#[derive(Debug, Clone)]
struct Merger {
    norm: Norm,
    input: Linear,
    output: Linear,
    /// Whether rows are joined before they are normalised.
    joins_first: bool,
    merged_width: usize,
}

/// What the tower needs to know about a batch of images beside their patches.
#[derive(Debug, Clone)]
pub struct VisionPlan {
    cos: Tensor,
    sin: Tensor,
    /// Order of the patch rows inside the tower, when windows rearrange them.
    window_order: Option<Vec<u32>>,
    /// Row of each merged token, back in image order.
    merged_order: Option<Vec<u32>>,
    window_layout: Arc<Layout>,
    full_layout: Arc<Layout>,
    /// The four corners of each patch in the learned position table, and their weights.
    position_corners: Option<PositionTaps>,
    num_merged: usize,
}

impl VisionPlan {
    /// Number of tokens that the images become.
    pub fn num_merged(&self) -> usize {
        self.num_merged
    }
}

impl Norm {
    fn load(b: &mut Builder<'_>, prefix: &str, kind: VisionNorm, width: usize, eps: f64) -> Result<Self> {
        let weight = b.tensor(&format!("{prefix}.weight"), &[width])?;
        Ok(match kind {
            VisionNorm::Rms => Self::Rms { weight, eps },
            VisionNorm::Layer => {
                Self::Layer { weight, bias: b.tensor(&format!("{prefix}.bias"), &[width])?, eps }
            }
        })
    }

    fn map(&self, f: TensorMap<'_>) -> candle_core::Result<Self> {
        Ok(match self {
            Self::Rms { weight, eps } => Self::Rms { weight: f(weight)?, eps: *eps },
            Self::Layer { weight, bias, eps } => {
                Self::Layer { weight: f(weight)?, bias: f(bias)?, eps: *eps }
            }
        })
    }

    fn forward(&self, x: &Tensor) -> candle_core::Result<Tensor> {
        match self {
            Self::Rms { weight, eps } => norm::rms_norm(x, weight, *eps),
            Self::Layer { weight, bias, eps } => norm::layer_norm(x, weight, bias, *eps),
        }
    }
}

impl Mlp {
    fn load(b: &mut Builder<'_>, prefix: &str, config: &VisionConfig) -> Result<Self> {
        let (hidden, inner) = (config.hidden_size, config.intermediate_size);
        Ok(match config.mlp {
            VisionMlp::Gated(activation) => Self::Gated {
                gate: b.linear(&format!("{prefix}.gate_proj"), &[inner, hidden], true)?,
                up: b.linear(&format!("{prefix}.up_proj"), &[inner, hidden], true)?,
                down: b.linear(&format!("{prefix}.down_proj"), &[hidden, inner], true)?,
                activation,
            },
            VisionMlp::Plain(activation) => Self::Plain {
                input: b.linear(&format!("{prefix}.{}", config.names.mlp_in), &[inner, hidden], true)?,
                output: b.linear(&format!("{prefix}.{}", config.names.mlp_out), &[hidden, inner], true)?,
                activation,
            },
        })
    }

    fn map(&self, f: TensorMap<'_>) -> candle_core::Result<Self> {
        Ok(match self {
            Self::Gated { gate, up, down, activation } => Self::Gated {
                gate: gate.map(f)?,
                up: up.map(f)?,
                down: down.map(f)?,
                activation: *activation,
            },
            Self::Plain { input, output, activation } => {
                Self::Plain { input: input.map(f)?, output: output.map(f)?, activation: *activation }
            }
        })
    }

    fn forward_added(&self, x: &Tensor, residual: &Tensor) -> candle_core::Result<Tensor> {
        match self {
            Self::Gated { gate, up, down, activation } => {
                let inner = gated(&gate.forward(x)?, &up.forward(x)?, *activation)?;
                down.forward_added(&inner, residual)
            }
            Self::Plain { input, output, activation } => {
                output.forward_added(&activate(&input.forward(x)?, *activation)?, residual)
            }
        }
    }
}

impl Merger {
    fn load(b: &mut Builder<'_>, prefix: &str, config: &VisionConfig, joins_first: bool) -> Result<Self> {
        let merged_width = config.hidden_size * config.merge_unit();
        let (kind, width) =
            if joins_first { (VisionNorm::Layer, merged_width) } else { (config.norm, config.hidden_size) };
        let names = config.names;
        let norm_name = if joins_first { "norm" } else { names.merger_norm };
        Ok(Self {
            norm: Norm::load(b, &format!("{prefix}.{norm_name}"), kind, width, config.norm_eps)?,
            input: b.linear(&format!("{prefix}.{}", names.merger_in), &[merged_width, merged_width], true)?,
            output: b.linear(
                &format!("{prefix}.{}", names.merger_out),
                &[config.out_hidden_size, merged_width],
                true,
            )?,
            joins_first,
            merged_width,
        })
    }

    fn map(&self, f: TensorMap<'_>) -> candle_core::Result<Self> {
        let (norm, input, output) = (self.norm.map(f)?, self.input.map(f)?, self.output.map(f)?);
        Ok(Self { norm, input, output, ..self.clone() })
    }

    /// `[patches, hidden]` to `[merged, out_hidden]`; rows of a merge block are adjacent.
    fn forward(&self, x: &Tensor) -> candle_core::Result<Tensor> {
        let joined = if self.joins_first {
            self.norm.forward(&x.reshape(((), self.merged_width))?)?
        } else {
            self.norm.forward(x)?.reshape(((), self.merged_width))?
        };
        self.output.forward(&activate(&self.input.forward(&joined)?, Activation::GeluErf)?)
    }
}

impl VisionTower {
    pub(super) fn load(b: &mut Builder<'_>, config: &VisionConfig) -> Result<Self> {
        let root = "model.visual";
        let hidden = config.hidden_size;
        let patch_shape =
            [hidden, config.in_channels, config.temporal_patch_size, config.patch_size, config.patch_size];
        let patch_embed = b.linear(&format!("{root}.patch_embed.proj"), &patch_shape, config.patch_bias)?;
        let position_table = config
            .position_embeddings
            .map(|count| b.tensor(&format!("{root}.pos_embed.weight"), &[count, hidden]))
            .transpose()?;
        let mut blocks = Vec::with_capacity(config.depth);
        for index in 0..config.depth {
            let prefix = format!("{root}.blocks.{index}");
            blocks.push(VisionBlock {
                norm1: Norm::load(b, &format!("{prefix}.norm1"), config.norm, hidden, config.norm_eps)?,
                qkv: b.linear(&format!("{prefix}.attn.qkv"), &[3 * hidden, hidden], true)?,
                proj: b.linear(&format!("{prefix}.attn.proj"), &[hidden, hidden], true)?,
                norm2: Norm::load(b, &format!("{prefix}.norm2"), config.norm, hidden, config.norm_eps)?,
                mlp: Mlp::load(b, &format!("{prefix}.mlp"), config)?,
            });
        }
        let merger = Merger::load(b, &format!("{root}.merger"), config, false)?;
        let deepstack = (0..config.deepstack_layers.len())
            .map(|i| Merger::load(b, &format!("{root}.deepstack_merger_list.{i}"), config, true))
            .collect::<Result<_>>()?;
        Ok(Self { config: config.clone(), patch_embed, position_table, blocks, merger, deepstack })
    }

    /// The same tower over `f` of every tensor that may train.
    pub(super) fn map(&self, f: TensorMap<'_>) -> candle_core::Result<Self> {
        let block = |block: &VisionBlock| -> candle_core::Result<VisionBlock> {
            Ok(VisionBlock {
                norm1: block.norm1.map(f)?,
                qkv: block.qkv.map(f)?,
                proj: block.proj.map(f)?,
                norm2: block.norm2.map(f)?,
                mlp: block.mlp.map(f)?,
            })
        };
        Ok(Self {
            config: self.config.clone(),
            patch_embed: self.patch_embed.map(f)?,
            position_table: self.position_table.as_ref().map(f).transpose()?,
            blocks: self.blocks.iter().map(block).collect::<candle_core::Result<_>>()?,
            merger: self.merger.map(f)?,
            deepstack: self
                .deepstack
                .iter()
                .map(|merger| merger.map(f))
                .collect::<candle_core::Result<_>>()?,
        })
    }

    /// Number of blocks.
    pub(super) fn depth(&self) -> usize {
        self.blocks.len()
    }

    /// Everything about these images that does not depend on their pixels.
    ///
    /// `grids` are `[frames, rows, columns]` in patches, one for each image.
    ///
    /// # Errors
    /// When tensors cannot be made on the device.
    pub fn plan(&self, grids: &[[usize; 3]], device: &Device) -> Result<VisionPlan> {
        let config = &self.config;
        let unit = config.merge_unit();
        let full_layout = Arc::new(Layout::windows(&positions::frame_lengths(grids)));
        let (mut cos, mut sin) = positions::vision_rotary_table(config, grids, device)?;
        let total = cos.dims2()?.0;
        let (window_order, merged_order, window_layout) = match config.window_size {
            None => (None, None, full_layout.clone()),
            Some(size) => {
                let partition =
                    positions::window_partition(grids, config.spatial_merge_size, size, config.patch_size);
                let order = to_u32(&partition.patch_order(unit));
                (cos, sin) = (rows::select(&cos, &order)?, rows::select(&sin, &order)?);
                let layout = Arc::new(Layout::windows(&partition.lengths));
                (Some(order), Some(to_u32(&partition.inverse())), layout)
            }
        };
        let position_corners = config
            .position_embeddings
            .map(|count| positions::position_taps(grids, count.isqrt(), config.spatial_merge_size));
        Ok(VisionPlan {
            cos,
            sin,
            window_order,
            merged_order,
            window_layout,
            full_layout,
            position_corners,
            num_merged: total / unit,
        })
    }

    /// Patches (`[patches, width]`, image order) to the tower's first hidden state, in the tower's order.
    pub(super) fn embed(&self, patches: &Tensor, plan: &VisionPlan) -> candle_core::Result<Tensor> {
        let mut hidden = self.patch_embed.forward(patches)?;
        if let (Some(table), Some(taps)) = (&self.position_table, &plan.position_corners) {
            let (count, width) = (hidden.dims2()?.0, self.config.hidden_size);
            let weights = Tensor::from_slice(&taps.weights, (count * 4, 1), hidden.device())?;
            let corners =
                rows::select(table, &taps.indices)?.broadcast_mul(&weights.to_dtype(hidden.dtype())?)?;
            hidden = (hidden + corners.reshape((count, 4, width))?.sum(1)?)?;
        }
        match &plan.window_order {
            Some(order) => rows::select(&hidden, order),
            None => Ok(hidden),
        }
    }

    /// Block `index`.
    pub(super) fn block(
        &self,
        index: usize,
        hidden: &Tensor,
        plan: &VisionPlan,
    ) -> candle_core::Result<Tensor> {
        let block = &self.blocks[index];
        let head_dim = self.config.head_dim();
        let heads = Heads {
            num_heads: self.config.num_heads,
            num_kv_heads: self.config.num_heads,
            head_dim,
            scale: 1.0 / (head_dim as f32).sqrt(),
        };
        let is_windowed =
            self.config.window_size.is_some() && !self.config.full_attention_blocks.contains(&index);
        let layout = if is_windowed { &plan.window_layout } else { &plan.full_layout };
        let qkv = block.qkv.forward(&block.norm1.forward(hidden)?)?;
        let mixed = joint_attention(&qkv, (&plan.cos, &plan.sin), heads, layout)?;
        let hidden = block.proj.forward_added(&mixed, hidden)?;
        block.mlp.forward_added(&block.norm2.forward(&hidden)?, &hidden)
    }

    /// The deep features to take after block `index`, if any.
    pub(super) fn deep_features(&self, index: usize, hidden: &Tensor) -> candle_core::Result<Option<Tensor>> {
        match self.config.deepstack_layers.iter().position(|&layer| layer == index) {
            Some(slot) => self.deepstack[slot].forward(hidden).map(Some),
            None => Ok(None),
        }
    }

    /// The last hidden state to tokens, `[merged, out_hidden]`, in image order.
    pub(super) fn merge(&self, hidden: &Tensor, plan: &VisionPlan) -> candle_core::Result<Tensor> {
        let merged = self.merger.forward(hidden)?;
        match &plan.merged_order {
            Some(order) => rows::select(&merged, order),
            None => Ok(merged),
        }
    }
}

fn to_u32(rows: &[usize]) -> Vec<u32> {
    rows.iter().map(|&row| row as u32).collect()
}
