//! A checkpoint with fewer blocks of each kind: what a run costs on it tells what it costs on the whole one, for cost is
//! linear in blocks of one kind.
//!
//! Widths, vocabulary, mergers and names stay as they are. A kept block is one of the whole checkpoint's, under the number
//! that its place among the kept ones gives it.

use super::config::VlmConfig;
use super::tensor_file::{Entry, write_tensors};
use super::vlm::Vlm;
use crate::error::Result;
use half::bf16;
use rayon::prelude::*;
use safetensors::tensor::Dtype;
use serde::{Deserialize, Serialize};
use std::borrow::Cow;
use std::collections::BTreeMap;
use std::path::Path;

const BLOCKS: &str = "model.visual.blocks.";
const TABLE: [&str; 2] = ["embed_tokens", "lm_head"];

/// How many blocks of each kind there are, or are kept: `[decoder, vision, vision over the whole image, vision with deep
/// features]`. Blocks of one kind cost the same.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, Serialize, Deserialize)]
pub struct Depths(pub [usize; 4]);

/// The kinds of [`Depths`] in words.
pub const KINDS: [&str; 4] =
    ["decoder layers", "vision blocks", "full-attention vision blocks", "deepstack vision blocks"];

impl Depths {
    /// All blocks of a model.
    pub fn of(config: &VlmConfig) -> Self {
        let mut counts = [config.text.num_layers, 0, 0, 0];
        for block in 0..config.vision.depth {
            counts[kind_of(config, block)] += 1;
        }
        Self(counts)
    }

    /// The fewest that a legal model can have, `spare` more of each kind where there are so many.
    pub fn least(config: &VlmConfig, spare: usize) -> Self {
        let all = Self::of(config).0;
        let mut counts = all.map(|count| count.min(1 + spare));
        // The last decoder layer takes no deep features: only then does it leave rows out, as the whole model's does.
        counts[0] = all[0].min(1 + spare + counts[3]);
        Self(counts)
    }

    /// `self` with `count` blocks of `kind`.
    #[must_use]
    pub fn with(mut self, kind: usize, count: usize) -> Self {
        self.0[kind] = count;
        self
    }
}

/// Which place of [`Depths`] a vision block counts in.
fn kind_of(config: &VlmConfig, block: usize) -> usize {
    let vision = &config.vision;
    if vision.deepstack_layers.contains(&block) {
        3
    } else if vision.window_size.is_some() && vision.full_attention_blocks.contains(&block) {
        2
    } else {
        1
    }
}

/// Which blocks of a checkpoint are kept.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Truncation {
    layers: usize,
    /// Numbers in the whole checkpoint, ascending.
    blocks: Vec<usize>,
}

impl Truncation {
    /// The first `depths` blocks of each kind, no more than there are.
    pub fn new(config: &VlmConfig, depths: Depths) -> Self {
        let mut left = depths.0;
        let blocks = (0..config.vision.depth).filter(|&block| {
            let left = &mut left[kind_of(config, block)];
            let is_kept = *left > 0;
            *left = left.saturating_sub(1);
            is_kept
        });
        Self { blocks: blocks.collect(), layers: depths.0[0].min(config.text.num_layers) }
    }

    /// The configuration of what is kept.
    ///
    /// # Errors
    /// A data error when too little is kept for a legal model.
    pub fn config(&self, whole: &VlmConfig) -> Result<VlmConfig> {
        let place = |blocks: &[usize]| -> Vec<usize> {
            blocks.iter().filter_map(|block| self.blocks.iter().position(|kept| kept == block)).collect()
        };
        let mut config = whole.clone();
        config.text.num_layers = self.layers;
        config.vision.depth = self.blocks.len();
        config.vision.full_attention_blocks = place(&whole.vision.full_attention_blocks);
        config.vision.deepstack_layers = place(&whole.vision.deepstack_layers);
        config.check()?;
        config.raw = config.to_json();
        Ok(config)
    }

    /// The whole checkpoint's (canonical) name of the tensor or module that is `name` in what is kept.
    pub fn original<'a>(&self, name: &'a str) -> Cow<'a, str> {
        let moved = name.strip_prefix(BLOCKS).and_then(|rest| {
            let (number, rest) = rest.split_once('.')?;
            Some(format!("{BLOCKS}{}.{rest}", self.blocks.get(number.parse::<usize>().ok()?)?))
        });
        moved.map_or(Cow::Borrowed(name), Cow::Owned)
    }
}

/// Number of scalar parameters of a model of this shape, that of its vision tower among them, and that of its tables of
/// tokens: `(all, vision, tables)`.
///
/// # Errors
/// When the configuration contradicts itself.
pub fn count_parameters(config: &VlmConfig) -> Result<(usize, usize, usize)> {
    let (mut all, mut vision, mut tables) = (0, 0, 0);
    for (name, shape) in Vlm::outline(config)? {
        let count: usize = shape.iter().product();
        all += count;
        if name.starts_with("model.visual.") {
            vision += count;
        } else if TABLE.iter().any(|part| name.contains(part)) {
            tables += count;
        }
    }
    Ok((all, vision, tables))
}

/// Writes `config.json` and a `model.safetensors` of meaningless small numbers into `dir`, in bfloat16 if `is_half`: a
/// stand-in where a checkpoint's weights are not there.
///
/// # Errors
/// When a file cannot be written.
pub fn write_stand_in(config: &VlmConfig, is_half: bool, dir: &Path) -> Result<()> {
    let dtype = if is_half { Dtype::BF16 } else { Dtype::F32 };
    let outline = Vlm::outline(config)?;
    let entries: Vec<Entry> = outline.into_iter().map(|(name, shape)| Entry { name, dtype, shape }).collect();
    write_tensors(&dir.join("model.safetensors"), &entries, &BTreeMap::new(), &mut |index| {
        let Entry { name, shape, .. } = &entries[index];
        let count: usize = shape.iter().product();
        let fan_in = shape.iter().skip(1).product::<usize>().max(1) as f32;
        let scale = if shape.len() == 1 { 0.0 } else { 1.0 / fan_in.sqrt() };
        let offset = if shape.len() == 1 && name.ends_with("weight") { 1.0 } else { 0.0 };
        let value = |i: usize| {
            // A hash of the place, spread over [-1, 1).
            let hash = ((i as u64 + 1).wrapping_mul(0x9e37_79b9_7f4a_7c15) >> 40) as f32;
            offset + scale * (hash / (1 << 23) as f32 - 1.0)
        };
        let width = if is_half { 2 } else { 4 };
        let mut bytes = vec![0; count * width];
        bytes.par_chunks_mut(width << 12).enumerate().for_each(|(part, chunk)| {
            for (i, out) in chunk.chunks_exact_mut(width).enumerate() {
                let value = value((part << 12) + i);
                if is_half {
                    out.copy_from_slice(&bf16::from_f32(value).to_le_bytes());
                } else {
                    out.copy_from_slice(&value.to_le_bytes());
                }
            }
        });
        Ok(bytes.into())
    })?;
    let text = serde_json::to_string_pretty(&config.to_json()).map_err(anyhow::Error::from)?;
    super::tokenizer::write_text(&dir.join("config.json"), &(text + "\n"))
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::model::test_support::{ids, sizes};

    #[test]
    fn a_truncated_model_has_the_names_and_shapes_of_the_whole_one() {
        for whole in [
            VlmConfig::new_qwen2_5_vl(&sizes(), ids()).unwrap(),
            VlmConfig::new_qwen3_vl(&sizes(), ids()).unwrap(),
        ] {
            let names: BTreeMap<String, Vec<usize>> = Vlm::outline(&whole).unwrap().into_iter().collect();
            let all = Depths::of(&whole);
            assert_eq!(all.0.iter().sum::<usize>(), 14);
            for spare in 0..3 {
                let least = Depths::least(&whole, spare);
                let more = (0..4).map(|kind| least.with(kind, all.0[kind].min(least.0[kind] + 1)));
                for depths in std::iter::once(least).chain(more).chain([all]) {
                    let truncation = Truncation::new(&whole, depths);
                    let config = truncation.config(&whole).unwrap();
                    assert_eq!(Depths::of(&config), depths);
                    let outline = Vlm::outline(&config).unwrap();
                    for (name, shape) in &outline {
                        assert_eq!(names.get(truncation.original(name).as_ref()), Some(shape), "{name}");
                    }
                    assert_eq!(outline.len() == names.len(), depths == all);
                }
            }
        }
    }

    #[test]
    fn parameters_are_linear_in_the_blocks_of_each_kind() {
        let whole = VlmConfig::new_qwen3_vl(&sizes(), ids()).unwrap();
        let all = Depths::of(&whole);
        let count = |depths: Depths| {
            let config = Truncation::new(&whole, depths).config(&whole).unwrap();
            count_parameters(&config).unwrap().0
        };
        let base = Depths::least(&whole, 0);
        let mut wanted = count(base);
        for kind in 0..4 {
            let rest = all.0[kind] - base.0[kind];
            if rest > 0 {
                wanted += rest * (count(base.with(kind, base.0[kind] + 1)) - count(base));
            }
        }
        assert_eq!(wanted, count(all));
        let (parameters, vision, tables) = count_parameters(&whole).unwrap();
        assert!(vision < parameters && tables == 2 * 64 * 32, "{parameters} {vision} {tables}");
    }
}
