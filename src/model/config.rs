//! A checkpoint's `config.json` as one set of features.
//!
//! The three published families (Qwen2-VL, Qwen2.5-VL, Qwen3-VL) and the notations of transformers 4.4x (flat),
//! 4.5x (nested, `rope_scaling`) and 5.x (nested, `rope_parameters`) differ only here: forward code asks for a
//! feature (`qk_norm`, `window_size`, `deepstack_layers`), never for a family. Keys that a file leaves out have the
//! values that transformers 5.23 gives them. Nothing here reads weights.

use crate::error::{Error, Result};
use crate::files;
use crate::nn::activation::Activation;
use serde_json::{Map, Value, json};
use std::path::Path;

/// The `model_type`s that can be loaded.
pub const SUPPORTED_MODEL_TYPES: [&str; 3] = ["qwen2_vl", "qwen2_5_vl", "qwen3_vl"];

/// Most weights that a configuration may ask for: far beyond any dense model.
const MOST_WEIGHTS: usize = 1 << 41;

/// Epsilon of every norm of the vision tower; no `config.json` carries it.
const VISION_NORM_EPS: f64 = 1e-6;

/// A checkpoint's shape, as features.
#[derive(Debug, Clone, PartialEq)]
pub struct VlmConfig {
    /// `architectures[0]`, kept for saving.
    pub architecture: String,
    /// `model_type`, kept for saving.
    pub model_type: String,
    /// The decoder.
    pub text: TextConfig,
    /// The vision tower and its mergers.
    pub vision: VisionConfig,
    /// Id of the placeholder that one merged image patch takes.
    pub image_token_id: u32,
    /// Id of a video's placeholder.
    pub video_token_id: u32,
    /// Id that opens an image.
    pub vision_start_token_id: u32,
    /// Id that closes an image.
    pub vision_end_token_id: u32,
    /// Whether the output layer is the embedding table.
    pub tie_word_embeddings: bool,
    /// The file as it was read.
    pub raw: Value,
}

/// The decoder.
#[derive(Debug, Clone, PartialEq)]
#[expect(clippy::struct_excessive_bools, reason = "independent features of a checkpoint, not a state")]
pub struct TextConfig {
    /// Rows of the embedding table; may exceed the tokenizer's size.
    pub vocab_size: usize,
    /// Width of the residual stream.
    pub hidden_size: usize,
    /// Width inside the gated MLP.
    pub intermediate_size: usize,
    /// Decoder layers.
    pub num_layers: usize,
    /// Query heads.
    pub num_heads: usize,
    /// Key and value heads.
    pub num_kv_heads: usize,
    /// Width of one head; `num_heads · head_dim` need not be `hidden_size`.
    pub head_dim: usize,
    /// Epsilon of every RMS norm.
    pub rms_norm_eps: f64,
    /// Base of the rotary frequencies.
    pub rope_theta: f64,
    /// Frequencies given to the temporal, height and width positions.
    pub mrope_section: [usize; 3],
    /// Whether the three take turns (`t h w t h w …`) instead of one after another.
    pub mrope_interleaved: bool,
    /// Whether queries and keys are RMS-normalised per head.
    pub qk_norm: bool,
    /// Whether the query, key and value projections have biases.
    pub attention_bias: bool,
    /// Whether the attention's output projection has a bias.
    pub attention_output_bias: bool,
    /// Activation of the gated MLP.
    pub activation: Activation,
    /// Longest sequence the checkpoint was made for.
    pub max_position_embeddings: usize,
    /// First token of a document, when there is one.
    pub bos_token_id: Option<u32>,
    /// Tokens that end generation; `generation_config.json` may name more.
    pub eos_token_ids: Vec<u32>,
    /// Padding token.
    pub pad_token_id: Option<u32>,
}

/// Normalisation inside the vision blocks and before the merger.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum VisionNorm {
    /// RMS norm: a weight.
    Rms,
    /// Layer norm: a weight and a bias.
    Layer,
}

/// The MLP of a vision block; every projection has a bias.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum VisionMlp {
    /// `down(activation(gate x) · up x)`, tensors `gate_proj`, `up_proj`, `down_proj`.
    Gated(Activation),
    /// `out(activation(in x))`, tensors named in [`VisionNames`].
    Plain(Activation),
}

/// How a family names the tensors that all of them have, below `model.visual.`.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct VisionNames {
    /// First projection of a plain MLP, below `blocks.N.mlp.`.
    pub mlp_in: &'static str,
    /// Second projection of a plain MLP.
    pub mlp_out: &'static str,
    /// The merger's norm, below `merger.`.
    pub merger_norm: &'static str,
    /// The merger's first projection, below `merger.` (and `deepstack_merger_list.N.`).
    pub merger_in: &'static str,
    /// The merger's second projection.
    pub merger_out: &'static str,
}

/// The vision tower.
///
/// The merger is `out(gelu_erf(in(concat(norm(patches)))))`: it normalises each patch, before the
/// `spatial_merge_size²` patches of a block are joined. The mergers of `deepstack_layers` join first and normalise
/// the joined row, always with a layer norm.
#[derive(Debug, Clone, PartialEq)]
pub struct VisionConfig {
    /// Blocks.
    pub depth: usize,
    /// Width of a patch inside the tower.
    pub hidden_size: usize,
    /// Width inside a block's MLP.
    pub intermediate_size: usize,
    /// Attention heads.
    pub num_heads: usize,
    /// Side of a patch in pixels.
    pub patch_size: usize,
    /// Frames per patch; a still image is repeated.
    pub temporal_patch_size: usize,
    /// Side, in patches, of the block that becomes one token.
    pub spatial_merge_size: usize,
    /// Colour channels.
    pub in_channels: usize,
    /// Width of a merged token: the decoder's `hidden_size`.
    pub out_hidden_size: usize,
    /// Normalisation of blocks and merger.
    pub norm: VisionNorm,
    /// Epsilon of those norms.
    pub norm_eps: f64,
    /// MLP of the blocks.
    pub mlp: VisionMlp,
    /// Whether the patch projection has a bias.
    pub patch_bias: bool,
    /// Side in pixels of the attention windows; none: every block sees the whole image.
    pub window_size: Option<usize>,
    /// Blocks that see the whole image although there are windows.
    pub full_attention_blocks: Vec<usize>,
    /// Rows of the learned position table, a square that is interpolated to the image's grid.
    pub position_embeddings: Option<usize>,
    /// Blocks whose outputs are merged too, and added to the decoder's first layers in this order.
    pub deepstack_layers: Vec<usize>,
    /// Base of the rotary frequencies.
    pub rope_theta: f64,
    /// Tensor names.
    pub names: VisionNames,
}

impl VisionConfig {
    /// Width of one attention head.
    pub fn head_dim(&self) -> usize {
        self.hidden_size / self.num_heads
    }

    /// Numbers in one flattened patch: `in_channels · temporal_patch_size · patch_size²`.
    pub fn patch_width(&self) -> usize {
        self.in_channels * self.temporal_patch_size * self.patch_size * self.patch_size
    }

    /// Patches that become one token: `spatial_merge_size²`.
    pub fn merge_unit(&self) -> usize {
        self.spatial_merge_size * self.spatial_merge_size
    }
}

/// One level of the file, with its place for messages.
struct Section<'a> {
    values: &'a Map<String, Value>,
    path: &'static str,
}

impl<'a> Section<'a> {
    fn wrong(&self, key: &str, expected: &str, found: &Value) -> Error {
        Error::data(format!("config.json: `{}{key}` must be {expected}, found `{found}`", self.path))
    }

    /// The value, unless absent or null.
    fn value(&self, key: &str) -> Option<&'a Value> {
        self.values.get(key).filter(|value| !value.is_null())
    }

    fn size(&self, key: &str, default: usize) -> Result<usize> {
        let Some(value) = self.value(key) else { return Ok(default) };
        // Patch sizes may be written as lists of equal sides.
        let first = match value {
            Value::Array(items) if items.windows(2).all(|pair| pair[0] == pair[1]) => items.first(),
            other => Some(other),
        };
        first
            .and_then(Value::as_u64)
            .and_then(|number| usize::try_from(number).ok())
            .ok_or_else(|| self.wrong(key, "a whole number", value))
    }

    fn required_size(&self, key: &str) -> Result<usize> {
        if self.value(key).is_none() {
            return Err(Error::data(format!(
                "config.json: `{}{key}` is missing\n   = help: is this the config.json of a whole checkpoint, not of an adapter?",
                self.path
            )));
        }
        self.size(key, 0)
    }

    fn sizes(&self, key: &str, default: &[usize]) -> Result<Vec<usize>> {
        let Some(value) = self.value(key) else { return Ok(default.to_vec()) };
        value
            .as_array()
            .and_then(|items| items.iter().map(|item| item.as_u64().map(|n| n as usize)).collect())
            .ok_or_else(|| self.wrong(key, "a list of whole numbers", value))
    }

    fn number(&self, key: &str, default: f64) -> Result<f64> {
        let Some(value) = self.value(key) else { return Ok(default) };
        value.as_f64().ok_or_else(|| self.wrong(key, "a number", value))
    }

    fn flag(&self, key: &str) -> Result<bool> {
        let Some(value) = self.value(key) else { return Ok(false) };
        value.as_bool().ok_or_else(|| self.wrong(key, "true or false", value))
    }

    fn id(&self, key: &str) -> Result<Option<u32>> {
        let Some(value) = self.value(key) else { return Ok(None) };
        value
            .as_u64()
            .and_then(|number| u32::try_from(number).ok())
            .map(Some)
            .ok_or_else(|| self.wrong(key, "a token id", value))
    }

    fn ids(&self, key: &str) -> Result<Vec<u32>> {
        match self.value(key) {
            Some(Value::Array(items)) => items
                .iter()
                .map(|item| item.as_u64().and_then(|number| u32::try_from(number).ok()))
                .collect::<Option<_>>()
                .ok_or_else(|| self.wrong(key, "a token id or a list of them", &self.values[key])),
            _ => Ok(self.id(key)?.into_iter().collect()),
        }
    }

    fn activation(&self, key: &str, default: Activation) -> Result<Activation> {
        let Some(value) = self.value(key) else { return Ok(default) };
        match value.as_str() {
            Some("silu") => Ok(Activation::Silu),
            Some("gelu_pytorch_tanh") => Ok(Activation::GeluTanh),
            Some("gelu") => Ok(Activation::GeluErf),
            Some("quick_gelu") => Ok(Activation::QuickGelu),
            _ => Err(self.wrong(key, "one of silu, gelu, gelu_pytorch_tanh, quick_gelu", value)),
        }
    }
}

/// Hugging Face's word for an activation.
fn activation_name(activation: Activation) -> &'static str {
    match activation {
        Activation::Silu => "silu",
        Activation::GeluTanh => "gelu_pytorch_tanh",
        Activation::GeluErf => "gelu",
        Activation::QuickGelu => "quick_gelu",
    }
}

impl VlmConfig {
    /// Reads `dir/config.json`.
    ///
    /// # Errors
    /// A data error when the file is missing, is not JSON, describes another kind of model, or makes no sense.
    pub fn load(dir: &Path) -> Result<Self> {
        let path = dir.join("config.json");
        let text = files::read_text(&path, "cannot read the model's configuration")?;
        let raw: Value = serde_json::from_str(&text)
            .map_err(|error| Error::data(format!("not valid JSON: {error}\n  --> {}", path.display())))?;
        Self::from_json(raw).map_err(|error| match error {
            Error::Data(message) => Error::data(match message.split_once("\n   = help") {
                Some((what, help)) => format!("{what}\n  --> {}\n   = help{help}", path.display()),
                None => format!("{message}\n  --> {}", path.display()),
            }),
            other => other,
        })
    }

    /// Reads a `config.json` in any of its notations, and checks it.
    ///
    /// # Errors
    /// A data error that names the key.
    pub fn from_json(raw: Value) -> Result<Self> {
        let top = raw.as_object().ok_or_else(|| Error::data("config.json: must be a JSON object"))?;
        let model_type = top.get("model_type").and_then(Value::as_str).unwrap_or("").to_string();
        if !SUPPORTED_MODEL_TYPES.contains(&model_type.as_str()) {
            return Err(Error::data(format!(
                "config.json: `model_type` is `{model_type}`, which is not supported\n   = help: supported are {}",
                SUPPORTED_MODEL_TYPES.join(", ")
            )));
        }
        let empty = Map::new();
        let nested = |key: &str| top.get(key).and_then(Value::as_object);
        let outer = Section { values: top, path: "" };
        // The flat notation keeps the decoder's keys at the top level.
        let text = nested("text_config")
            .map_or(Section { values: top, path: "" }, |values| Section { values, path: "text_config." });
        let vision = Section { values: nested("vision_config").unwrap_or(&empty), path: "vision_config." };
        let tied = outer.flag("tie_word_embeddings")? || text.flag("tie_word_embeddings")?;
        let config = Self {
            architecture: top
                .get("architectures")
                .and_then(|names| names.get(0))
                .and_then(Value::as_str)
                .unwrap_or(default_architecture(&model_type))
                .to_string(),
            text: text_config(&model_type, &text)?,
            vision: vision_config(&model_type, &vision)?,
            image_token_id: outer.id("image_token_id")?.unwrap_or(151_655),
            video_token_id: outer.id("video_token_id")?.unwrap_or(151_656),
            vision_start_token_id: outer.id("vision_start_token_id")?.unwrap_or(151_652),
            vision_end_token_id: outer.id("vision_end_token_id")?.unwrap_or(151_653),
            tie_word_embeddings: tied,
            model_type,
            raw,
        };
        config.check()?;
        Ok(config)
    }
}

fn default_architecture(model_type: &str) -> &'static str {
    match model_type {
        "qwen2_vl" => "Qwen2VLForConditionalGeneration",
        "qwen2_5_vl" => "Qwen2_5_VLForConditionalGeneration",
        _ => "Qwen3VLForConditionalGeneration",
    }
}

fn text_config(model_type: &str, text: &Section<'_>) -> Result<TextConfig> {
    let is_third = model_type == "qwen3_vl";
    let empty = Map::new();
    let rope_key = if text.value("rope_scaling").is_some() { "rope_scaling" } else { "rope_parameters" };
    let rope = Section {
        values: text.value(rope_key).and_then(Value::as_object).unwrap_or(&empty),
        path: "rope_parameters.",
    };
    let rope_type = rope.value("rope_type").or_else(|| rope.value("type"));
    if let Some(kind) = rope_type
        && !matches!(kind.as_str(), Some("default" | "mrope"))
    {
        return Err(Error::data(format!(
            "config.json: `{}{rope_key}.rope_type` is {kind}, which is not supported\n   = help: only the plain rotary embedding (`default`, `mrope`) is; remove long-context scaling from the file",
            text.path
        )));
    }
    if text.flag("use_sliding_window")? && text.value("sliding_window").is_some() {
        return Err(Error::data("config.json: `use_sliding_window` is true, which is not supported"));
    }
    let hidden_size = text.required_size("hidden_size")?;
    let num_heads = text.required_size("num_attention_heads")?;
    let head_dim =
        if is_third { text.size("head_dim", 128)? } else { hidden_size.checked_div(num_heads).unwrap_or(0) };
    // Written as null it means one per query head; left out, the class's default.
    let num_kv_heads = match text.values.get("num_key_value_heads") {
        Some(Value::Null) => num_heads,
        _ => text.size("num_key_value_heads", if is_third { 32 } else { 8 })?,
    };
    let default_theta = if is_third { 500_000.0 } else { 1_000_000.0 };
    let outer_theta = text.number("rope_theta", default_theta)?;
    let section = rope.sizes("mrope_section", if is_third { &[24, 20, 20] } else { &[16, 24, 24] })?;
    let mrope_section = <[usize; 3]>::try_from(section).map_err(|found| {
        Error::data(format!("config.json: `mrope_section` must have three parts, found {found:?}"))
    })?;
    let attention_bias = !is_third || text.flag("attention_bias")?;
    Ok(TextConfig {
        vocab_size: text.size("vocab_size", if is_third { 151_936 } else { 152_064 })?,
        hidden_size,
        intermediate_size: text.required_size("intermediate_size")?,
        num_layers: text.required_size("num_hidden_layers")?,
        num_heads,
        num_kv_heads,
        head_dim,
        rms_norm_eps: text.number("rms_norm_eps", if is_third { 1e-6 } else { 1e-5 })?,
        rope_theta: rope.number("rope_theta", outer_theta)?,
        mrope_section,
        mrope_interleaved: is_third,
        qk_norm: is_third,
        attention_bias,
        attention_output_bias: is_third && attention_bias,
        activation: text.activation("hidden_act", Activation::Silu)?,
        max_position_embeddings: text
            .size("max_position_embeddings", if is_third { 128_000 } else { 32_768 })?,
        bos_token_id: text.id("bos_token_id")?,
        eos_token_ids: text.ids("eos_token_id")?,
        pad_token_id: text.id("pad_token_id")?,
    })
}

fn vision_config(model_type: &str, vision: &Section<'_>) -> Result<VisionConfig> {
    let empty = Map::new();
    let rope = Section {
        values: vision.value("rope_parameters").and_then(Value::as_object).unwrap_or(&empty),
        path: "vision_config.rope_parameters.",
    };
    let in_channels_key = if vision.value("in_channels").is_some() { "in_channels" } else { "in_chans" };
    let common = VisionConfig {
        depth: vision.size("depth", if model_type == "qwen3_vl" { 27 } else { 32 })?,
        hidden_size: 0,
        intermediate_size: 0,
        num_heads: vision.size("num_heads", 16)?,
        patch_size: vision.size("patch_size", if model_type == "qwen3_vl" { 16 } else { 14 })?,
        temporal_patch_size: vision.size("temporal_patch_size", 2)?,
        spatial_merge_size: vision.size("spatial_merge_size", 2)?,
        in_channels: vision.size(in_channels_key, 3)?,
        out_hidden_size: 0,
        norm: VisionNorm::Layer,
        norm_eps: VISION_NORM_EPS,
        mlp: VisionMlp::Plain(Activation::QuickGelu),
        patch_bias: false,
        window_size: None,
        full_attention_blocks: Vec::new(),
        position_embeddings: None,
        deepstack_layers: Vec::new(),
        rope_theta: rope.number("rope_theta", 10_000.0)?,
        names: SEQUENTIAL_NAMES,
    };
    match model_type {
        "qwen2_vl" => {
            let hidden_size = vision.size("embed_dim", 1280)?;
            Ok(VisionConfig {
                hidden_size,
                intermediate_size: (hidden_size as f64 * vision.number("mlp_ratio", 4.0)?) as usize,
                // In this family `hidden_size` is the decoder's.
                out_hidden_size: vision.size("hidden_size", 3584)?,
                mlp: VisionMlp::Plain(vision.activation("hidden_act", Activation::QuickGelu)?),
                ..common
            })
        }
        "qwen2_5_vl" => Ok(VisionConfig {
            hidden_size: vision.size("hidden_size", 3584)?,
            intermediate_size: vision.size("intermediate_size", 3420)?,
            out_hidden_size: vision.size("out_hidden_size", 3584)?,
            norm: VisionNorm::Rms,
            mlp: VisionMlp::Gated(vision.activation("hidden_act", Activation::Silu)?),
            window_size: Some(vision.size("window_size", 112)?),
            full_attention_blocks: vision.sizes("fullatt_block_indexes", &[7, 15, 23, 31])?,
            ..common
        }),
        _ => Ok(VisionConfig {
            hidden_size: vision.size("hidden_size", 1152)?,
            intermediate_size: vision.size("intermediate_size", 4304)?,
            out_hidden_size: vision.size("out_hidden_size", 3584)?,
            mlp: VisionMlp::Plain(vision.activation("hidden_act", Activation::GeluTanh)?),
            patch_bias: true,
            position_embeddings: Some(vision.size("num_position_embeddings", 2304)?),
            deepstack_layers: vision.sizes("deepstack_visual_indexes", &[8, 16, 24])?,
            names: NAMED_NAMES,
            ..common
        }),
    }
}

const SEQUENTIAL_NAMES: VisionNames = VisionNames {
    mlp_in: "fc1",
    mlp_out: "fc2",
    merger_norm: "ln_q",
    merger_in: "mlp.0",
    merger_out: "mlp.2",
};

const NAMED_NAMES: VisionNames = VisionNames {
    mlp_in: "linear_fc1",
    mlp_out: "linear_fc2",
    merger_norm: "norm",
    merger_in: "linear_fc1",
    merger_out: "linear_fc2",
};

impl VlmConfig {
    /// Checks that the sizes fit each other and are not absurd, so that a damaged file cannot ask for terabytes.
    ///
    /// # Errors
    /// A data error that names the key and the rule.
    pub fn check(&self) -> Result<()> {
        self.check_ranges()?;
        let (text, vision) = (&self.text, &self.vision);
        let rules = [
            (
                text.num_heads % text.num_kv_heads == 0,
                "num_attention_heads must be a multiple of num_key_value_heads",
            ),
            (
                text.qk_norm || text.hidden_size % text.num_heads == 0,
                "hidden_size must be a multiple of num_attention_heads",
            ),
            (text.head_dim % 2 == 0, "head_dim must be even"),
            (
                text.mrope_interleaved || text.mrope_section.iter().sum::<usize>() == text.head_dim / 2,
                "mrope_section must add up to half of head_dim",
            ),
            (
                vision.hidden_size % vision.num_heads == 0,
                "vision hidden_size must be a multiple of num_heads",
            ),
            (vision.head_dim() % 4 == 0, "a vision head's width must be a multiple of 4"),
            (
                vision.out_hidden_size == text.hidden_size,
                "the vision tower's output width must be the decoder's hidden_size",
            ),
            (vision.in_channels == 3, "in_channels must be 3"),
            (
                vision.window_size.is_none_or(|size| size >= vision.patch_size * vision.spatial_merge_size),
                "window_size must hold at least one merged patch",
            ),
            (
                vision.position_embeddings.is_none_or(|count| count.isqrt().pow(2) == count),
                "num_position_embeddings must be a square number",
            ),
            (
                vision.full_attention_blocks.iter().all(|&block| block < vision.depth),
                "fullatt_block_indexes must be below depth",
            ),
            (
                vision.deepstack_layers.iter().all(|&layer| layer < vision.depth)
                    && vision.deepstack_layers.len() <= text.num_layers,
                "deepstack_visual_indexes must be below depth, and no more than there are decoder layers",
            ),
            ((self.image_token_id as usize) < text.vocab_size, "image_token_id must be below vocab_size"),
            (text.rms_norm_eps > 0.0 && text.rms_norm_eps < 1.0, "rms_norm_eps must be between 0 and 1"),
            (text.rope_theta >= 1.0 && text.rope_theta.is_finite(), "rope_theta must be at least 1"),
            (
                vision.rope_theta >= 1.0 && vision.rope_theta.is_finite(),
                "the vision tower's rope_theta must be at least 1",
            ),
        ];
        match rules.iter().find(|(holds, _)| !holds) {
            Some((_, rule)) => Err(Error::data(format!("config.json: {rule}"))),
            None => Ok(()),
        }
    }

    /// Every size within what any published model of this kind could have, with room.
    fn check_ranges(&self) -> Result<()> {
        let (text, vision) = (&self.text, &self.vision);
        let limits = [
            ("vocab_size", text.vocab_size, 1 << 22),
            ("hidden_size", text.hidden_size, 1 << 16),
            ("intermediate_size", text.intermediate_size, 1 << 18),
            ("num_hidden_layers", text.num_layers, 512),
            ("num_attention_heads", text.num_heads, 1024),
            ("num_key_value_heads", text.num_kv_heads, 1024),
            ("head_dim", text.head_dim, 1024),
            ("max_position_embeddings", text.max_position_embeddings, 1 << 28),
            ("vision_config.depth", vision.depth, 512),
            ("vision_config width", vision.hidden_size, 1 << 16),
            ("vision_config MLP width", vision.intermediate_size, 1 << 18),
            ("vision_config.num_heads", vision.num_heads, 1024),
            ("vision_config.patch_size", vision.patch_size, 256),
            ("vision_config.temporal_patch_size", vision.temporal_patch_size, 16),
            ("vision_config.spatial_merge_size", vision.spatial_merge_size, 16),
            ("vision_config.window_size", vision.window_size.unwrap_or(1), 1 << 16),
            ("vision_config.num_position_embeddings", vision.position_embeddings.unwrap_or(1), 1 << 22),
        ];
        if let Some((key, size, most)) = limits.iter().find(|(_, size, most)| *size == 0 || size > most) {
            return Err(Error::data(format!(
                "config.json: `{key}` is {size}; it must be between 1 and {most}"
            )));
        }
        // An axis has no more frequencies than the widest head.
        if text.mrope_section.iter().any(|&part| part > 1024) {
            return Err(Error::data(format!(
                "config.json: `mrope_section` is {:?}; its parts must be 1024 at most",
                text.mrope_section
            )));
        }
        let block = |hidden: usize, inner: usize, heads: usize| hidden * (3 * inner + 4 * heads);
        let weights = 2 * text.vocab_size * text.hidden_size
            + text.num_layers
                * block(text.hidden_size, text.intermediate_size, text.num_heads * text.head_dim)
            + vision.depth * block(vision.hidden_size, vision.intermediate_size, vision.hidden_size);
        if weights > MOST_WEIGHTS {
            return Err(Error::data(format!(
                "config.json: its sizes together make about {weights} weights, more than the {MOST_WEIGHTS} allowed"
            )));
        }
        Ok(())
    }

    /// This configuration in the notation of transformers 5.x, for a `config.json` beside float32 weights.
    pub fn to_json(&self) -> Value {
        let text = &self.text;
        let mut rope = json!({
            "mrope_section": text.mrope_section,
            "rope_theta": text.rope_theta,
            "rope_type": "default",
        });
        let mut text_json = json!({
            "attention_dropout": 0.0,
            "bos_token_id": text.bos_token_id,
            "eos_token_id": match text.eos_token_ids.as_slice() {
                [] => Value::Null,
                [one] => json!(one),
                several => json!(several),
            },
            "hidden_act": activation_name(text.activation),
            "hidden_size": text.hidden_size,
            "initializer_range": 0.02,
            "intermediate_size": text.intermediate_size,
            "max_position_embeddings": text.max_position_embeddings,
            "model_type": format!("{}_text", self.model_type),
            "num_attention_heads": text.num_heads,
            "num_hidden_layers": text.num_layers,
            "num_key_value_heads": text.num_kv_heads,
            "pad_token_id": text.pad_token_id,
            "rms_norm_eps": text.rms_norm_eps,
            "tie_word_embeddings": self.tie_word_embeddings,
            "use_cache": true,
            "vocab_size": text.vocab_size,
        });
        if text.mrope_interleaved {
            rope["mrope_interleaved"] = json!(true);
            text_json["attention_bias"] = json!(text.attention_bias);
            text_json["head_dim"] = json!(text.head_dim);
        }
        text_json["rope_parameters"] = rope;
        json!({
            "architectures": [self.architecture],
            "dtype": "float32",
            "image_token_id": self.image_token_id,
            "model_type": self.model_type,
            "text_config": text_json,
            "tie_word_embeddings": self.tie_word_embeddings,
            "video_token_id": self.video_token_id,
            "vision_config": self.vision_json(),
            "vision_end_token_id": self.vision_end_token_id,
            "vision_start_token_id": self.vision_start_token_id,
        })
    }

    fn vision_json(&self) -> Value {
        let vision = &self.vision;
        let (VisionMlp::Gated(activation) | VisionMlp::Plain(activation)) = vision.mlp;
        let mut out = json!({
            "depth": vision.depth,
            "hidden_act": activation_name(activation),
            "in_channels": vision.in_channels,
            "initializer_range": 0.02,
            "model_type": format!("{}_vision", self.model_type),
            "num_heads": vision.num_heads,
            "patch_size": vision.patch_size,
            "rope_parameters": {"rope_theta": vision.rope_theta, "rope_type": "axial"},
            "spatial_merge_size": vision.spatial_merge_size,
            "temporal_patch_size": vision.temporal_patch_size,
        });
        if self.model_type == "qwen2_vl" {
            out["embed_dim"] = json!(vision.hidden_size);
            out["hidden_size"] = json!(vision.out_hidden_size);
            let whole = vision.intermediate_size / vision.hidden_size;
            out["mlp_ratio"] = if whole * vision.hidden_size == vision.intermediate_size {
                json!(whole)
            } else {
                json!(vision.intermediate_size as f64 / vision.hidden_size as f64)
            };
        } else {
            out["hidden_size"] = json!(vision.hidden_size);
            out["intermediate_size"] = json!(vision.intermediate_size);
            out["out_hidden_size"] = json!(vision.out_hidden_size);
        }
        if let Some(window_size) = vision.window_size {
            out["window_size"] = json!(window_size);
            out["fullatt_block_indexes"] = json!(vision.full_attention_blocks);
            out["tokens_per_second"] = json!(2);
        }
        if let Some(count) = vision.position_embeddings {
            out["num_position_embeddings"] = json!(count);
            out["deepstack_visual_indexes"] = json!(vision.deepstack_layers);
        }
        out
    }

    /// The file as it was read, with the weights' type set to float32, for saving changed weights beside it.
    pub fn raw_as_float32(&self) -> Value {
        fn set(value: &mut Value) {
            if let Value::Object(map) = value {
                for (key, entry) in map.iter_mut() {
                    if (key == "dtype" || key == "torch_dtype") && entry.is_string() {
                        *entry = json!("float32");
                    } else {
                        set(entry);
                    }
                }
            }
        }
        let mut raw = self.raw.clone();
        set(&mut raw);
        raw
    }
}

/// Sizes of a model built from scratch.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct ModelSizes {
    /// Rows of the embedding table.
    pub vocab_size: usize,
    /// Decoder width.
    pub hidden_size: usize,
    /// Decoder MLP width.
    pub intermediate_size: usize,
    /// Decoder layers.
    pub num_layers: usize,
    /// Decoder heads; Qwen2.5-VL's head width is `hidden_size / num_heads`.
    pub num_heads: usize,
    /// Decoder key and value heads.
    pub num_kv_heads: usize,
    /// Decoder head width, used by the Qwen3-VL kind.
    pub head_dim: usize,
    /// Vision blocks.
    pub vision_depth: usize,
    /// Vision width.
    pub vision_hidden_size: usize,
    /// Vision MLP width.
    pub vision_intermediate_size: usize,
    /// Vision heads.
    pub vision_num_heads: usize,
    /// Side of a patch in pixels.
    pub patch_size: usize,
    /// Side, in patches, of the block that becomes one token.
    pub spatial_merge_size: usize,
    /// Side of the learned position table (Qwen3-VL kind).
    pub position_side: usize,
    /// Blocks merged into the decoder's first layers (Qwen3-VL kind).
    pub deepstack_layers: Vec<usize>,
    /// Side in pixels of the attention windows (Qwen2.5-VL kind).
    pub window_size: usize,
    /// Blocks that see the whole image (Qwen2.5-VL kind).
    pub full_attention_blocks: Vec<usize>,
    /// Longest sequence.
    pub max_position_embeddings: usize,
    /// Whether the output layer is the embedding table.
    pub tie_word_embeddings: bool,
}

/// Ids of the special tokens of a model built from scratch.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct SpecialIds {
    /// `<|image_pad|>`.
    pub image: u32,
    /// `<|video_pad|>`.
    pub video: u32,
    /// `<|vision_start|>`.
    pub vision_start: u32,
    /// `<|vision_end|>`.
    pub vision_end: u32,
    /// `<|im_end|>`, ends a turn.
    pub turn_end: u32,
    /// `<|endoftext|>`, padding and end of a document.
    pub document_end: u32,
}

impl VlmConfig {
    /// A new model of the Qwen3-VL kind: interleaved rotary sections, query and key norms, learned positions, deepstack.
    ///
    /// # Errors
    /// A data error when the sizes do not fit each other.
    pub fn new_qwen3_vl(sizes: &ModelSizes, ids: SpecialIds) -> Result<Self> {
        let half = sizes.head_dim / 2;
        // As many as the turns `t h w t h w …` give each.
        let (height, width) = ((half + 1) / 3, half / 3);
        let text = TextConfig {
            rope_theta: 5_000_000.0,
            mrope_section: [half - height - width, height, width],
            mrope_interleaved: true,
            qk_norm: true,
            attention_bias: false,
            ..new_text(sizes, ids)
        };
        let vision = VisionConfig {
            mlp: VisionMlp::Plain(Activation::GeluTanh),
            patch_bias: true,
            position_embeddings: Some(sizes.position_side * sizes.position_side),
            deepstack_layers: sizes.deepstack_layers.clone(),
            names: NAMED_NAMES,
            ..new_vision(sizes)
        };
        Self::from_parts("qwen3_vl", text, vision, sizes, ids)
    }

    /// A new model of the Qwen2.5-VL kind: sectioned rotary positions, attention biases, windows in the vision tower.
    ///
    /// # Errors
    /// A data error when the sizes do not fit each other.
    pub fn new_qwen2_5_vl(sizes: &ModelSizes, ids: SpecialIds) -> Result<Self> {
        let head_dim = sizes.hidden_size.checked_div(sizes.num_heads).unwrap_or(0);
        let (half, temporal) = (head_dim / 2, head_dim / 8);
        let height = (half - temporal) / 2;
        let text = TextConfig {
            head_dim,
            mrope_section: [temporal, height, half - temporal - height],
            ..new_text(sizes, ids)
        };
        let vision = VisionConfig {
            norm: VisionNorm::Rms,
            mlp: VisionMlp::Gated(Activation::Silu),
            window_size: Some(sizes.window_size),
            full_attention_blocks: sizes.full_attention_blocks.clone(),
            ..new_vision(sizes)
        };
        Self::from_parts("qwen2_5_vl", text, vision, sizes, ids)
    }

    fn from_parts(
        model_type: &str,
        text: TextConfig,
        vision: VisionConfig,
        sizes: &ModelSizes,
        ids: SpecialIds,
    ) -> Result<Self> {
        let mut config = Self {
            architecture: default_architecture(model_type).to_string(),
            model_type: model_type.to_string(),
            text,
            vision,
            image_token_id: ids.image,
            video_token_id: ids.video,
            vision_start_token_id: ids.vision_start,
            vision_end_token_id: ids.vision_end,
            tie_word_embeddings: sizes.tie_word_embeddings,
            raw: Value::Null,
        };
        config.check()?;
        config.raw = config.to_json();
        Ok(config)
    }
}

fn new_text(sizes: &ModelSizes, ids: SpecialIds) -> TextConfig {
    TextConfig {
        vocab_size: sizes.vocab_size,
        hidden_size: sizes.hidden_size,
        intermediate_size: sizes.intermediate_size,
        num_layers: sizes.num_layers,
        num_heads: sizes.num_heads,
        num_kv_heads: sizes.num_kv_heads,
        head_dim: sizes.head_dim,
        rms_norm_eps: 1e-6,
        rope_theta: 1_000_000.0,
        mrope_section: [0; 3],
        mrope_interleaved: false,
        qk_norm: false,
        attention_bias: true,
        attention_output_bias: false,
        activation: Activation::Silu,
        max_position_embeddings: sizes.max_position_embeddings,
        bos_token_id: Some(ids.document_end),
        eos_token_ids: vec![ids.turn_end],
        pad_token_id: Some(ids.document_end),
    }
}

fn new_vision(sizes: &ModelSizes) -> VisionConfig {
    VisionConfig {
        depth: sizes.vision_depth,
        hidden_size: sizes.vision_hidden_size,
        intermediate_size: sizes.vision_intermediate_size,
        num_heads: sizes.vision_num_heads,
        patch_size: sizes.patch_size,
        temporal_patch_size: 2,
        spatial_merge_size: sizes.spatial_merge_size,
        in_channels: 3,
        out_hidden_size: sizes.hidden_size,
        norm: VisionNorm::Layer,
        norm_eps: VISION_NORM_EPS,
        mlp: VisionMlp::Plain(Activation::GeluTanh),
        patch_bias: false,
        window_size: None,
        full_attention_blocks: Vec::new(),
        position_embeddings: None,
        deepstack_layers: Vec::new(),
        rope_theta: 10_000.0,
        names: SEQUENTIAL_NAMES,
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::model::test_support::{fixture_json, fixtures};

    fn sizes() -> ModelSizes {
        ModelSizes {
            vocab_size: 300,
            hidden_size: 64,
            intermediate_size: 96,
            num_layers: 3,
            num_heads: 4,
            num_kv_heads: 2,
            head_dim: 16,
            vision_depth: 4,
            vision_hidden_size: 32,
            vision_intermediate_size: 48,
            vision_num_heads: 2,
            patch_size: 14,
            spatial_merge_size: 2,
            position_side: 6,
            deepstack_layers: vec![0, 2],
            window_size: 56,
            full_attention_blocks: vec![1, 3],
            max_position_embeddings: 1024,
            tie_word_embeddings: true,
        }
    }

    const IDS: SpecialIds = SpecialIds {
        image: 270,
        video: 271,
        vision_start: 268,
        vision_end: 269,
        turn_end: 262,
        document_end: 260,
    };

    fn without_raw(mut config: VlmConfig) -> VlmConfig {
        config.raw = Value::Null;
        config
    }

    #[test]
    fn a_new_model_reads_back_from_its_own_json() {
        for config in [VlmConfig::new_qwen3_vl(&sizes(), IDS), VlmConfig::new_qwen2_5_vl(&sizes(), IDS)] {
            let config = config.unwrap();
            let again = VlmConfig::from_json(config.to_json()).unwrap();
            assert_eq!(without_raw(again), without_raw(config.clone()));
            assert_eq!(config.text.mrope_section.iter().sum::<usize>(), 8);
        }
    }

    #[test]
    fn other_models_are_refused_by_name() {
        for (file, part) in [
            (json!({"model_type": "llava"}), "`llava`"),
            (json!({"model_type": "qwen3_vl_moe"}), "`qwen3_vl_moe`"),
            (json!({}), "supported are qwen2_vl"),
            (json!([]), "JSON object"),
            (json!({"model_type": "qwen3_vl"}), "`hidden_size` is missing"),
        ] {
            let error = VlmConfig::from_json(file).unwrap_err();
            assert!(matches!(error, Error::Data(_)) && error.to_string().contains(part), "{error}");
        }
    }

    #[test]
    fn every_damaged_value_is_refused_with_its_key() {
        let good = VlmConfig::new_qwen2_5_vl(&sizes(), IDS).unwrap().to_json();
        for (pointer, value, part) in [
            ("/text_config/hidden_size", json!("64"), "text_config.hidden_size"),
            ("/text_config/hidden_size", json!(0), "hidden_size"),
            ("/text_config/hidden_size", json!(u64::MAX), "hidden_size"),
            ("/text_config/hidden_size", json!(-64), "hidden_size"),
            ("/text_config/vocab_size", json!(1e300), "vocab_size"),
            ("/text_config/num_hidden_layers", json!(100_000), "num_hidden_layers"),
            ("/text_config/num_attention_heads", json!(0), "num_attention_heads"),
            ("/text_config/num_key_value_heads", json!(3), "multiple of num_key_value_heads"),
            ("/text_config/rms_norm_eps", json!(0.0), "rms_norm_eps"),
            ("/text_config/hidden_act", json!("relu"), "hidden_act"),
            ("/text_config/rope_parameters/mrope_section", json!([2, 3]), "three parts"),
            ("/text_config/rope_parameters/mrope_section", json!([2, 3, 4]), "half of head_dim"),
            ("/text_config/rope_parameters/rope_type", json!("yarn"), "yarn"),
            ("/text_config/rope_parameters/rope_theta", json!(0), "rope_theta"),
            ("/text_config/eos_token_id", json!("x"), "eos_token_id"),
            ("/vision_config/depth", json!(0), "vision_config.depth"),
            ("/vision_config/patch_size", json!([14, 16]), "patch_size"),
            ("/vision_config/num_heads", json!(5), "multiple of num_heads"),
            ("/vision_config/fullatt_block_indexes", json!([9]), "fullatt_block_indexes"),
            ("/vision_config/window_size", json!(5), "window_size"),
            ("/vision_config/out_hidden_size", json!(65), "output width"),
            ("/vision_config/in_channels", json!(1), "in_channels"),
            ("/tie_word_embeddings", json!("yes"), "tie_word_embeddings"),
            ("/image_token_id", json!(300), "image_token_id"),
        ] {
            let mut bad = good.clone();
            *bad.pointer_mut(pointer).unwrap() = value.clone();
            let error = VlmConfig::from_json(bad).map(|_| ()).expect_err(&format!("{pointer} {value}"));
            assert!(
                matches!(error, Error::Data(_)) && error.to_string().contains(part),
                "{pointer}: {error}"
            );
        }
        let mut bad = VlmConfig::new_qwen3_vl(&sizes(), IDS).unwrap().to_json();
        bad["vision_config"]["num_position_embeddings"] = json!(35);
        assert!(VlmConfig::from_json(bad).unwrap_err().to_string().contains("square"));
    }

    #[test]
    fn the_tie_flag_counts_at_either_level_and_sizes_may_be_lists() {
        let mut file = VlmConfig::new_qwen2_5_vl(&sizes(), IDS).unwrap().to_json();
        file["vision_config"]["patch_size"] = json!([14, 14]);
        file["text_config"]["num_key_value_heads"] = Value::Null;
        assert_eq!(VlmConfig::from_json(file.clone()).unwrap().text.num_kv_heads, 4);
        for (outer, inner, tied) in [(true, false, true), (false, true, true), (false, false, false)] {
            file["tie_word_embeddings"] = json!(outer);
            file["text_config"]["tie_word_embeddings"] = json!(inner);
            assert_eq!(VlmConfig::from_json(file.clone()).unwrap().tie_word_embeddings, tied);
        }
    }

    #[test]
    fn the_saved_file_says_float32_and_changes_nothing_else() {
        let raw =
            json!({"dtype": "bfloat16", "text_config": {"torch_dtype": "bfloat16", "x": 1}, "keep": [1]});
        let config = VlmConfig { raw, ..VlmConfig::new_qwen3_vl(&sizes(), IDS).unwrap() };
        let want =
            json!({"dtype": "float32", "text_config": {"torch_dtype": "float32", "x": 1}, "keep": [1]});
        assert_eq!(config.raw_as_float32(), want);
    }

    #[test]
    fn a_missing_or_broken_file_names_its_path() {
        let dir = tempfile::tempdir().unwrap();
        assert!(VlmConfig::load(dir.path()).unwrap_err().to_string().contains("config.json"));
        std::fs::write(dir.path().join("config.json"), "{").unwrap();
        assert!(VlmConfig::load(dir.path()).unwrap_err().to_string().contains("not valid JSON"));
        std::fs::write(dir.path().join("config.json"), r#"{"model_type": "bert"}"#).unwrap();
        let text = VlmConfig::load(dir.path()).unwrap_err().to_string();
        let path = dir.path().join("config.json").display().to_string();
        assert!(text.contains(&path) && text.contains("help"), "{text}");
    }

    #[test]
    fn all_notations_of_the_reference_checkpoints_say_the_same() {
        let Some(dir) = fixtures() else { return };
        let load = |name: &str| VlmConfig::load(&dir.join("checkpoints").join(name)).unwrap();
        for name in ["qwen2_vl", "qwen2_5_vl", "qwen2_5_vl_bf16", "qwen3_vl", "qwen3_vl_bf16"] {
            let newest = without_raw(load(name));
            let older = fixture_json(&dir.join("checkpoints").join(name).join("config_4x.json"));
            assert_eq!(without_raw(VlmConfig::from_json(older).unwrap()), newest, "{name}");
            assert_eq!(without_raw(VlmConfig::from_json(newest.to_json()).unwrap()), newest, "{name}");
        }
        assert_eq!(without_raw(load("qwen2_5_vl_legacy")), without_raw(load("qwen2_5_vl")));
        let (second, third) = (load("qwen2_vl"), load("qwen3_vl"));
        assert_eq!(second.vision.mlp, VisionMlp::Plain(Activation::QuickGelu));
        assert_eq!((second.vision.hidden_size, second.vision.intermediate_size), (32, 64));
        assert_eq!((second.vision.out_hidden_size, second.tie_word_embeddings), (48, false));
        assert_eq!((third.text.head_dim, third.text.rope_theta), (32, 5e6));
        assert!(third.text.qk_norm && !third.text.attention_bias && third.text.mrope_interleaved);
        assert_eq!(third.vision.deepstack_layers, [0, 1, 2]);
        assert_eq!(load("qwen2_5_vl").vision.full_attention_blocks, [1, 3]);
    }
}
