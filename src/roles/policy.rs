//! The model as policy: what it would say, and how likely it finds what was said.

use crate::error::Result;
use crate::model::assistant::Assistant;
use crate::model::generate::{Completion, Prompt, PromptRows, generate};
use crate::model::parameters::RowKind;
use crate::model::sampling::Decoding;
use crate::model::vlm::{Batch, Features};
use crate::nn::attention::{Block, Layout};
use crate::nn::dropout::{NamedRows, RowName};
use crate::nn::recompute::Stage;
use crate::nn::rows;
use crate::rng;
use candle_core::Tensor;
use rand::RngCore;
use std::ops::Range;

/// One question put to the model: its prompt and the size of its image.
#[derive(Debug, Clone, PartialEq)]
pub struct Question {
    /// The prompt's rows.
    pub prompt: Prompt,
    /// Height and width of the image at the model's resolution; none for text alone.
    pub image_size: Option<[usize; 2]>,
}

/// Features of a list of images of any sizes, each `[1 or n, 3, height, width]` in [0, 1].
///
/// # Errors
/// When a size does not fit.
pub fn encode(assistant: &Assistant, pixels: &[Tensor]) -> Result<Features> {
    let plan = assistant.vlm.vision_plan(&grids_of(assistant, pixels)?)?;
    assistant.vlm.encode_images(pixels, &plan)
}

/// The grids of a list of pixel tensors, in order.
///
/// # Errors
/// When a tensor is not four-dimensional.
pub fn grids_of(assistant: &Assistant, pixels: &[Tensor]) -> Result<Vec<[usize; 3]>> {
    let mut grids = Vec::new();
    for tensor in pixels {
        let (count, _, height, width) = tensor.dims4()?;
        grids.extend(std::iter::repeat_n(assistant.vlm.grid_of(height, width), count));
    }
    Ok(grids)
}

/// Answers, one for each prompt; `features` of the prompts' images, in order. `seeds[p]` matters only where tokens are
/// drawn.
///
/// # Errors
/// When a logit is not a number.
pub fn answers(
    assistant: &Assistant,
    prompts: &[Prompt],
    features: Option<&Features>,
    decoding: &Decoding,
    seeds: &[u64],
) -> Result<Vec<Completion>> {
    let seeds: Vec<Vec<u64>> = seeds.iter().map(|&seed| vec![seed]).collect();
    Ok(sample(assistant, prompts, features, &seeds, decoding)?.into_iter().flatten().collect())
}

/// Sampled completions, `seeds[p].len()` for prompt `p`.
///
/// # Errors
/// When a logit is not a number.
pub fn sample(
    assistant: &Assistant,
    prompts: &[Prompt],
    features: Option<&Features>,
    seeds: &[Vec<u64>],
    decoding: &Decoding,
) -> Result<Vec<Vec<Completion>>> {
    generate(&assistant.vlm, prompts, features, seeds, decoding)
}

/// Prompts with their completions laid out so that each prompt's rows are computed once and seen by all of its
/// completions.
#[derive(Debug, Clone)]
pub struct Scoring {
    /// Rows of the decoder.
    pub batch: Batch,
    /// Which of the last hidden states predicts each target token.
    rows: Vec<u32>,
    /// Target tokens of all completions one after another.
    targets: Vec<u32>,
    /// For prompt `p` and completion `c`, where its tokens stand in the list of targets.
    pub spans: Vec<Vec<Range<usize>>>,
    layout: Vec<OwnRows>,
}

/// Where the rows of a prompt stand.
#[derive(Debug, Clone)]
struct OwnRows {
    /// In the order of its tokens.
    prompt: Vec<Range<usize>>,
    /// Of each of its completions.
    completions: Vec<Range<usize>>,
}

/// What the names of rows begin with that several prompts share; places are smaller.
const SHARED: u64 = u64::MAX;

impl Scoring {
    /// Lays out `completions[p]` behind prompt `p`; every completion has at least one token.
    ///
    /// # Errors
    /// When tensors cannot be made on the device.
    pub fn new(assistant: &Assistant, prompts: &[Prompt], completions: &[Vec<Vec<u32>>]) -> Result<Self> {
        let PromptRows { mut input_ids, image_rows, mut positions, mut blocks, prompts: ranges } =
            PromptRows::of(prompts);
        let (mut scored_rows, mut targets, mut spans) = (Vec::new(), Vec::new(), Vec::new());
        let mut row_layout = Vec::with_capacity(prompts.len());
        for ((prompt, shared), completions) in prompts.iter().zip(ranges).zip(completions) {
            let next = prompt.next_position();
            let last = shared.last().map_or(0, |range| range.end as u32 - 1);
            let mut own_spans = Vec::with_capacity(completions.len());
            let mut own_rows = Vec::with_capacity(completions.len());
            for completion in completions {
                let first_target = targets.len();
                // The prompt's last row predicts the first token, each token but the last predicts the next.
                let inputs = &completion[..completion.len() - 1];
                let own = input_ids.len()..input_ids.len() + inputs.len();
                scored_rows.push(last);
                scored_rows.extend(own.clone().map(|row| row as u32));
                targets.extend_from_slice(completion);
                input_ids.extend_from_slice(inputs);
                for axis in &mut positions {
                    axis.extend((0..inputs.len() as i64).map(|i| next + i));
                }
                if !own.is_empty() {
                    let keys = shared.iter().cloned().chain([own.clone()]).collect();
                    blocks.push(Block { queries: own.clone(), keys, is_causal: true });
                }
                own_rows.push(own);
                own_spans.push(first_target..targets.len());
            }
            spans.push(own_spans);
            row_layout.push(OwnRows { prompt: shared, completions: own_rows });
        }
        let mut wanted = scored_rows.clone();
        wanted.sort_unstable();
        wanted.dedup();
        let (plan, is_pruned) = assistant.vlm.row_plan_for(&positions, Layout { blocks }, &wanted)?;
        if is_pruned {
            for row in &mut scored_rows {
                *row = wanted.partition_point(|wanted| wanted < row) as u32;
            }
        }
        let batch = Batch { input_ids, image_rows, plan };
        Ok(Self { batch, rows: scored_rows, targets, spans, layout: row_layout })
    }

    /// Number of target tokens.
    pub fn num_targets(&self) -> usize {
        self.targets.len()
    }

    /// Where the target tokens of `prompts` stand in the list of targets.
    pub fn targets_of(&self, prompts: Range<usize>) -> Range<usize> {
        let spans = || self.spans[prompts.clone()].iter().flatten();
        let start = spans().map(|span| span.start).min().unwrap_or(0);
        start..spans().map(|span| span.end).max().unwrap_or(start)
    }

    /// Of the decoder's last state, what predicts the targets in `range`: `[range.len(), hidden]`.
    ///
    /// # Errors
    /// When the state has too few rows.
    pub fn predicting(&self, hidden: &Tensor, range: Range<usize>) -> candle_core::Result<Tensor> {
        rows::select(hidden, &self.rows[range])
    }

    /// Log-probabilities of the targets in `range` from the rows that [`Scoring::predicting`] gives for it.
    ///
    /// # Errors
    /// When a target is not in the vocabulary.
    pub fn log_probs_from(
        &self,
        assistant: &Assistant,
        predicting: &Tensor,
        range: Range<usize>,
    ) -> candle_core::Result<Tensor> {
        assistant.vlm.log_probs(predicting, &self.targets[range], 1.0)
    }

    /// Log-probability of every target token from the decoder's last state, `[targets]`, in nats.
    ///
    /// # Errors
    /// When a target is not in the vocabulary.
    pub fn log_probs(
        &self,
        assistant: &Assistant,
        hidden: &Tensor,
        temperature: f64,
    ) -> candle_core::Result<Tensor> {
        let rows = rows::select(hidden, &self.rows)?;
        assistant.vlm.log_probs(&rows, &self.targets, temperature)
    }

    /// Names, for dropout, of every row that a layer sees: those of the decoder and, for images of `grids`, of the vision
    /// tower. `places[p]` is the place of prompt `p` in the whole batch, of which this may be a part: a row has one name
    /// however the batch is cut. What prompts have in common before their images is computed once, so its names say
    /// what was read so far and not by whom.
    pub fn row_names(&self, places: &[usize], grids: &[[usize; 3]], merge_unit: usize) -> Vec<NamedRows> {
        let Batch { input_ids, image_rows, plan } = &self.batch;
        let mut is_image = vec![false; input_ids.len()];
        for &row in image_rows {
            is_image[row as usize] = true;
        }
        let mut tokens: Vec<RowName> = vec![[0; 3]; input_ids.len()];
        let (mut patches, mut merged) = (Vec::new(), Vec::new());
        let mut images = grids.iter().map(|[frames, height, width]| frames * height * width);
        for (OwnRows { prompt, completions }, &place) in self.layout.iter().zip(places) {
            let place = place as u64;
            let mut read = Some(0);
            let mut image_tokens = 0;
            for (index, row) in prompt.iter().cloned().flatten().enumerate() {
                image_tokens += usize::from(is_image[row]);
                read = read
                    .filter(|_| !is_image[row])
                    .map(|before| rng::stream(before, "prefix", &[u64::from(input_ids[row])]).next_u64());
                tokens[row] = read.map_or([place, 0, index as u64], |read| [SHARED, read, index as u64]);
            }
            for (number, rows) in (1..).zip(completions) {
                for (index, row) in rows.clone().enumerate() {
                    tokens[row] = [place, number, index as u64];
                }
            }
            let mut image = 0;
            while image_tokens > 0 {
                let Some(count) = images.next() else { break };
                let name = |index: usize| [place, image, index as u64];
                patches.extend((0..count).map(name));
                merged.extend((0..count / merge_unit).map(name));
                image_tokens = image_tokens.saturating_sub(count / merge_unit);
                image += 1;
            }
        }
        let mut rows = vec![(RowKind::Patches as usize, patches), (RowKind::Merged as usize, merged)];
        if let Some(last) = &plan.last {
            let wanted = last.rows.iter().map(|&row| tokens[row as usize]).collect();
            rows.push((RowKind::Tokens as usize, wanted));
        }
        rows.push((RowKind::Tokens as usize, tokens));
        rows
    }

    /// Stages from features to the normalised hidden state.
    pub fn stages<'a>(&'a self, assistant: &'a Assistant) -> Vec<Stage<'a>> {
        assistant.vlm.decoder_stages(&self.batch)
    }

    /// Log-probabilities without gradients.
    ///
    /// # Errors
    /// When features and prompts do not match.
    pub fn evaluate(
        &self,
        assistant: &Assistant,
        features: Option<&Features>,
        temperature: f64,
    ) -> Result<Vec<f32>> {
        let hidden = assistant.vlm.forward(features, &self.batch)?;
        Ok(self.log_probs(assistant, &hidden, temperature)?.to_vec1()?)
    }
}
