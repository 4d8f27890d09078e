//! Sampling: many prompts at once, each prompt's rows shared by its group of completions.
//!
//! What is sampled for a completion depends on its own seed and its own rows alone, never on its neighbours: rows are
//! computed to the same bytes in any batch.

use super::config::VlmConfig;
use super::kv_cache::KvCache;
use super::positions::{Grid, prompt_positions};
use super::sampling::{Decoding, Sampler};
use super::vlm::{Batch, Features, Vlm};
use crate::error::{Error, Result};
use crate::nn::attention::{Block, Layout};
use crate::nn::rows;
use candle_core::{DType, Tensor};
use std::ops::Range;

/// A prompt ready for the decoder.
#[derive(Debug, Clone, PartialEq)]
pub struct Prompt {
    /// Tokens, each image placeholder repeated once for each merged token.
    pub ids: Vec<u32>,
    /// Temporal, height and width position of each token.
    pub positions: [Vec<i64>; 3],
    /// Indices of the image placeholders in `ids`.
    pub image_rows: Vec<u32>,
}

impl Prompt {
    /// The prompt of these tokens, placeholders expanded, about images of these grids.
    ///
    /// # Errors
    /// A data error when placeholders and grids do not match.
    pub fn of_ids(config: &VlmConfig, ids: Vec<u32>, grids: &[Grid]) -> Result<Self> {
        let merge = config.vision.spatial_merge_size;
        let positions = prompt_positions(&ids, config.image_token_id, grids, merge)?.ids;
        let is_image = |(row, &id): (usize, &u32)| (id == config.image_token_id).then_some(row as u32);
        let image_rows = ids.iter().enumerate().filter_map(is_image).collect();
        Ok(Self { ids, positions, image_rows })
    }

    /// Position, on every axis, of the first token after the prompt.
    pub fn next_position(&self) -> i64 {
        self.positions.iter().flatten().max().map_or(0, |last| last + 1)
    }
}

/// One sampled completion.
#[derive(Debug, Clone, PartialEq, Default)]
pub struct Completion {
    /// Tokens, the stop token included when there is one.
    pub ids: Vec<u32>,
    /// Whether a stop token ended it.
    pub is_finished: bool,
    /// Entropy, in nats, of the distribution that each token was drawn from, before any filter; empty when greedy.
    pub entropies: Vec<f32>,
    /// Log-probability of each token in that distribution; empty when greedy.
    pub log_probs: Vec<f32>,
}

/// The rows of several prompts one after another. What all begin with, before any image, stands first and once: its keys
/// and values are the same for all.
#[derive(Debug, Default)]
pub(crate) struct PromptRows {
    pub(crate) input_ids: Vec<u32>,
    pub(crate) image_rows: Vec<u32>,
    pub(crate) positions: [Vec<i64>; 3],
    pub(crate) blocks: Vec<Block>,
    /// Rows of each prompt, in the order of its tokens.
    pub(crate) prompts: Vec<Vec<Range<usize>>>,
}

impl PromptRows {
    pub(crate) fn of(prompts: &[Prompt]) -> Self {
        Self::with_lead(prompts, common_lead(prompts))
    }

    fn with_lead(prompts: &[Prompt], lead: usize) -> Self {
        let mut rows = Self::default();
        let shared = if lead > 0 { vec![0..lead] } else { Vec::new() };
        if let Some(first) = prompts.first().filter(|_| lead > 0) {
            rows.add(first, 0..lead);
            rows.blocks.push(Block { queries: 0..lead, keys: shared.clone(), is_causal: true });
        }
        for prompt in prompts {
            let own = rows.add(prompt, lead..prompt.ids.len());
            let keys: Vec<Range<usize>> = shared.iter().cloned().chain([own.clone()]).collect();
            rows.blocks.push(Block { queries: own, keys: keys.clone(), is_causal: true });
            rows.prompts.push(keys);
        }
        rows
    }

    /// Adds the tokens `range` of a prompt; gives the rows they have now.
    fn add(&mut self, prompt: &Prompt, range: Range<usize>) -> Range<usize> {
        let start = self.input_ids.len();
        self.input_ids.extend_from_slice(&prompt.ids[range.clone()]);
        let images = prompt.image_rows.iter().filter(|row| range.contains(&(**row as usize)));
        self.image_rows.extend(images.map(|row| row + start as u32 - range.start as u32));
        for (all, own) in self.positions.iter_mut().zip(&prompt.positions) {
            all.extend_from_slice(&own[range.clone()]);
        }
        start..self.input_ids.len()
    }
}

/// The rows of several prompts one after another, each whole, and where each stands; every last hidden state is wanted.
pub(crate) fn prompt_batch(vlm: &Vlm, prompts: &[Prompt]) -> Result<(Batch, Vec<Range<usize>>)> {
    let PromptRows { input_ids, image_rows, positions, blocks, prompts } = PromptRows::with_lead(prompts, 0);
    let plan = vlm.row_plan(&positions, Layout { blocks })?;
    Ok((Batch { input_ids, image_rows, plan }, prompts.into_iter().flatten().collect()))
}

/// How many tokens all prompts begin with, in the same places, before the first image; each keeps one at least.
fn common_lead(prompts: &[Prompt]) -> usize {
    let Some((first, others)) = prompts.split_first().filter(|(_, others)| !others.is_empty()) else {
        return 0;
    };
    let end = |prompt: &Prompt| {
        let image = prompt.image_rows.first().map_or(usize::MAX, |&row| row as usize);
        image.min(prompt.ids.len().saturating_sub(1))
    };
    others.iter().fold(end(first), |lead, other| {
        let is_same = |&i: &usize| {
            other.ids[i] == first.ids[i]
                && other.positions.iter().zip(&first.positions).all(|(other, first)| other[i] == first[i])
        };
        (0..lead.min(end(other))).take_while(is_same).count()
    })
}

/// Samples `seeds[p].len()` completions for prompt `p`, one for each seed.
///
/// `features` hold the images' tokens in the order of the prompts; none for prompts without images.
///
/// # Errors
/// When a logit is not a number, features and placeholders do not match, or a setting of `decoding` is impossible.
pub fn generate(
    vlm: &Vlm,
    prompts: &[Prompt],
    features: Option<&Features>,
    seeds: &[Vec<u64>],
    decoding: &Decoding,
) -> Result<Vec<Vec<Completion>>> {
    decoding.sampling.check()?;
    let PromptRows { input_ids, image_rows, positions, blocks, prompts: ranges } = PromptRows::of(prompts);
    let prompt_rows = input_ids.len();
    let last_rows: Vec<u32> =
        ranges.iter().filter_map(|keys| keys.last()).map(|range| range.end as u32 - 1).collect();
    let (plan, is_pruned) = vlm.row_plan_for(&positions, Layout { blocks }, &last_rows)?;
    let batch = Batch { input_ids, image_rows, plan };
    let total: usize = seeds.iter().map(Vec::len).sum();
    let cache = KvCache::new(
        &vlm.config().text,
        prompt_rows + total * decoding.max_new_tokens,
        DType::F32,
        vlm.device(),
    )?;
    let places: Vec<u32> = (0..prompt_rows as u32).collect();
    let hidden = vlm.forward_cached(features, &batch, &cache, &places)?;
    let hidden = if is_pruned { hidden } else { rows::select(&hidden, &last_rows)? };
    let first = logits_of(vlm, &hidden, decoding)?;

    let mut sequences = Vec::with_capacity(total);
    for (prompt, seeds) in seeds.iter().enumerate() {
        for &seed in seeds {
            sequences.push(Sequence {
                prompt,
                start: prompt_rows + sequences.len() * decoding.max_new_tokens,
                next_position: prompts[prompt].next_position(),
                sampler: Sampler::new(decoding.sampling, seed),
                completion: Completion::default(),
            });
        }
    }
    for sequence in &mut sequences {
        sequence.choose(&first[sequence.prompt], &prompts[sequence.prompt].ids, decoding)?;
    }
    for step in 1..decoding.max_new_tokens {
        let mut live: Vec<&mut Sequence> =
            sequences.iter_mut().filter(|sequence| !sequence.completion.is_finished).collect();
        if live.is_empty() {
            break;
        }
        let (batch, places) = step_batch(vlm, &live, &ranges, step)?;
        let hidden = vlm.forward_cached(None, &batch, &cache, &places)?;
        for (sequence, logits) in live.iter_mut().zip(logits_of(vlm, &hidden, decoding)?) {
            sequence.choose(&logits, &prompts[sequence.prompt].ids, decoding)?;
        }
    }
    let mut groups: Vec<Vec<Completion>> = seeds.iter().map(|_| Vec::new()).collect();
    for sequence in sequences {
        groups[sequence.prompt].push(sequence.completion);
    }
    Ok(groups)
}

struct Sequence {
    prompt: usize,
    /// First cache row of its own.
    start: usize,
    next_position: i64,
    sampler: Sampler,
    completion: Completion,
}

impl Sequence {
    fn choose(&mut self, logits: &[f32], prompt: &[u32], decoding: &Decoding) -> Result<()> {
        let seen = prompt.iter().chain(&self.completion.ids);
        let chosen = self.sampler.choose(logits.to_vec(), seen.copied())?;
        let token = chosen.token;
        self.completion.ids.push(token);
        self.completion.entropies.extend(chosen.entropy);
        self.completion.log_probs.extend(chosen.log_prob);
        self.completion.is_finished = decoding.stop_ids.contains(&token);
        Ok(())
    }
}

/// The last token of each live sequence as one row: it sees its prompt and its own rows.
fn step_batch(
    vlm: &Vlm,
    live: &[&mut Sequence],
    prompts: &[Vec<Range<usize>>],
    step: usize,
) -> Result<(Batch, Vec<u32>)> {
    let mut ids = Vec::with_capacity(live.len());
    let mut places = Vec::with_capacity(live.len());
    let mut positions = Vec::with_capacity(live.len());
    let mut blocks = Vec::with_capacity(live.len());
    for (row, sequence) in live.iter().enumerate() {
        ids.extend(sequence.completion.ids.last());
        places.push((sequence.start + step - 1) as u32);
        positions.push(sequence.next_position + step as i64 - 1);
        let own = sequence.start..sequence.start + step;
        let keys = prompts[sequence.prompt].iter().cloned().chain([own]).collect();
        blocks.push(Block { queries: row..row + 1, keys, is_causal: true });
    }
    let plan = vlm.row_plan(&[positions.clone(), positions.clone(), positions], Layout { blocks })?;
    Ok((Batch { input_ids: ids, image_rows: Vec::new(), plan }, places))
}

/// Logits by row, suppressed tokens at minus infinity.
fn logits_of(vlm: &Vlm, hidden: &Tensor, decoding: &Decoding) -> Result<Vec<Vec<f32>>> {
    let logits = vlm.logits(hidden)?.to_dtype(DType::F32)?.to_device(&candle_core::Device::Cpu)?;
    let vocab = logits.dim(1)?;
    let mut values: Vec<f32> = logits.flatten_all()?.to_vec1()?;
    for row in values.chunks_exact_mut(vocab) {
        if let Some(bad) = row.iter().find(|value| !value.is_finite()) {
            return Err(Error::NonFinite(format!(
                "a logit is {bad} while sampling\n   = help: check the weights with `safemed doctor` and the image's pixels"
            )));
        }
        for &id in &decoding.suppressed_ids {
            if let Some(value) = row.get_mut(id as usize) {
                *value = f32::NEG_INFINITY;
            }
        }
    }
    Ok(values.chunks_exact(vocab).map(<[f32]>::to_vec).collect())
}
