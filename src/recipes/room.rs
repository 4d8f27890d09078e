//! Room on the disk and in memory, looked at before the first step: what will not fit is said while it costs nothing.
//!
//! Memory is counted by a formula, not measured: `train --dry-run` measures. What can be done about memory that runs out on the
//! processor is little: the system hands out more than it has and kills the process at some later write (status 137), or the
//! allocator aborts it (134); neither can be caught. The last checkpoint is whole, and `--resume` goes on from it, with
//! `train.recompute` and the like unchanged, since they are part of what a run is.

use super::checkpoint::{self, saved_steps};
use super::config::{RecipeName, RunConfig, TrainConfig};
use super::estimate::subject::Subject;
use super::estimate::workload::{self, Item, Workload};
use super::estimate::{free_bytes, holds_half, render::size};
use super::progress::{Progress, Silent};
use super::run::Run;
use super::scratch;
use super::train::VISION;
use crate::data::{Dataset, Sample};
use crate::error::Result;
use crate::model::assistant::Assistant;
use crate::model::config::VlmConfig;
use crate::model::hub::Location;
use rayon::prelude::*;
use std::cmp::Reverse;
use std::collections::HashSet;
use std::fmt::Write as _;
use std::path::{Path, PathBuf};

/// Questions whose tokens are counted: so many evenly spread, for the median, so many with the largest images and so many with
/// the longest texts, for the longest.
const COUNTED: usize = 256;

/// Image files whose headers are read for the largest images: the largest files.
const OPENED: usize = 4096;

/// Rank of the adapter that is suggested.
const RANK: usize = 16;

/// Bytes of a float32.
const FLOAT: u64 = 4;

/// Warns of a run whose checkpoints below `root`, of `bytes` each, will not fit on the disk.
pub(super) fn check_disk(bytes: u64, train: &TrainConfig, root: &Path, progress: &dyn Progress) {
    let there = saved_steps(root).len() as u64;
    let warning = checkpoint::free_disk_bytes(root)
        .and_then(|free| disk_warning(bytes, checkpoints(train).saturating_sub(there), free));
    if let Some(warning) = warning {
        progress.note(&warning);
    }
}

/// Warns of a run whose heaviest step will not fit in memory. What cannot be counted, such as a damaged image, is left to the step
/// that needs it.
pub(super) fn check_memory(
    model: Option<&Location>,
    assistant: &Assistant,
    dataset: &Dataset,
    config: &RunConfig,
    run: &Run,
    progress: &dyn Progress,
) {
    // A denoiser is small.
    if config.train.recipe == RecipeName::Denoiser {
        return;
    }
    let model = model.map_or_else(|| scratch::TINY.to_owned(), |model| model.dir.display().to_string());
    let Some(free) = free_bytes().filter(|_| assistant.vlm.device().is_cpu()) else { return };
    let plan = Plan::of(assistant, config);
    let is_visual = |(name, _): &(String, candle_core::Var)| name.starts_with(VISION);
    let is_seen =
        config.train.recipe.is_adversarial() || assistant.vlm.parameters().trained().iter().any(is_visual);
    let warning = longest(&plan, &model, dataset, config, (run, is_seen))
        .map(|(plan, shape)| plan.memory_warning(&shape, free));
    if let Ok(Some(warning)) = warning {
        progress.note(&warning);
    }
}

/// The plan with the lengths of its questions, and the shape of the model.
fn longest(
    plan: &Plan,
    model: &str,
    dataset: &Dataset,
    config: &RunConfig,
    (run, is_seen): (&Run, bool),
) -> Result<(Plan, VlmConfig)> {
    let spread = spread(dataset);
    let about = (&spread[..], config.prompt.parse()?);
    let subject = Subject::open(model, None, about, run.stop(), &Silent)?.within(config)?;
    let items = lengths(dataset, spread, &subject, config, is_seen)?;
    Ok((Plan { is_single: !holds_half(config, &subject), items, ..plan.clone() }, subject.config))
}

/// Questions evenly spread.
fn spread(dataset: &Dataset) -> Vec<Sample> {
    let stride = dataset.samples.len().div_ceil(COUNTED).max(1);
    dataset.samples.iter().step_by(stride).cloned().collect()
}

/// Rows and patches of questions, ascending: of those in `spread`, which stand for all, and last of the longest there is.
fn lengths(
    dataset: &Dataset,
    spread: Vec<Sample>,
    subject: &Subject,
    config: &RunConfig,
    is_seen: bool,
) -> Result<Vec<(usize, usize)>> {
    let group = workload::group_of(config);
    let merged = subject.config.vision.merge_unit();
    let length = |item: &Item| (item.rows(group), if is_seen { item.image * merged } else { 0 });
    let count = |samples: Vec<Sample>| -> Result<Vec<(usize, usize)>> {
        let some = Dataset::new(dataset.root.clone(), samples);
        let items = Workload::items(config, subject, &some, Some(config.max_new_tokens))?;
        Ok(items.iter().map(length).collect())
    };
    let mut all = count(spread)?;
    all.sort_unstable();
    let most = count(large(dataset, subject, config)?)?.into_iter().max();
    let longer = most.filter(|most| all.last().is_none_or(|last| most > last));
    // One more hardly moves the median.
    all.extend(longer);
    Ok(all)
}

/// Questions among which the longest is: those with the largest images, of these the longest texts first, and those with the
/// longest texts.
fn large(dataset: &Dataset, subject: &Subject, config: &RunConfig) -> Result<Vec<Sample>> {
    let text = |sample: &Sample| {
        let reasoning = sample.reasoning.as_ref().map_or(0, String::len);
        sample.question.len() + sample.options.iter().map(String::len).sum::<usize>() + reasoning
    };
    let mut samples: Vec<&Sample> = dataset.samples.iter().collect();
    samples.sort_by_cached_key(|sample| Reverse(text(sample)));
    let mut found: Vec<Sample> = samples.iter().take(COUNTED).copied().cloned().collect();
    if config.train.captions {
        return Ok(found);
    }
    let unique: HashSet<&PathBuf> = samples.iter().map(|sample| &sample.image).collect();
    let size = |image: &PathBuf| dataset.root.join(image).metadata().map_or(0, |about| about.len());
    let mut files: Vec<(u64, &PathBuf)> = unique.into_par_iter().map(|image| (size(image), image)).collect();
    files.sort_unstable_by_key(|&file| Reverse(file));
    let files: Vec<&PathBuf> = files.into_iter().take(OPENED).map(|(_, image)| image).collect();
    let pictures = workload::pictures(subject, &dataset.root, &files)?;
    let tokens = |sample: &Sample| pictures.get(&sample.image).map_or(0, |picture| picture.tokens);
    // Among images of one size the order by text stays.
    samples.sort_by_key(|sample| Reverse(tokens(sample)));
    found.extend(samples.into_iter().take(COUNTED).cloned());
    Ok(found)
}

/// What decides how much memory a step takes beside the weights.
#[derive(Debug, Clone, Default)]
struct Plan {
    /// Parameters, those that train, and those that an adapter of rank [`RANK`] would have.
    all: u64,
    trained: u64,
    adapter: u64,
    /// Whether an adapter trains.
    is_adapter: bool,
    /// Whether frozen weights are float32.
    is_single: bool,
    micro_batch_size: usize,
    is_recomputed: bool,
    /// Rows of the decoder, and patches of the vision tower, that a gradient of each question goes through; ascending.
    items: Vec<(usize, usize)>,
}

impl Plan {
    fn of(assistant: &Assistant, config: &RunConfig) -> Self {
        let train = &config.train;
        let parameters = assistant.vlm.parameters();
        let (all, trained) = parameters.count();
        let linear = |name: &str| !["embed", "lm_head"].iter().any(|part| name.contains(part));
        let adapter: usize = parameters
            .shapes()
            .filter(|(name, shape)| shape.len() == 2 && linear(name))
            .map(|(_, shape)| RANK * (shape[0] + shape[1]))
            .sum();
        let is_adapter = train.lora_rank > 0 || config.adapter.is_some();
        Self {
            all: all as u64,
            trained: trained as u64,
            adapter: adapter as u64,
            is_adapter,
            is_single: true,
            micro_batch_size: train.micro_batch_size.unwrap_or(train.batch_size),
            is_recomputed: train.recompute,
            items: Vec::new(),
        }
    }

    /// Two moments, a gradient and its copy for the update, of every trained parameter.
    fn optimizer_bytes(&self) -> u64 {
        4 * FLOAT * self.trained
    }

    /// What the gradient of the heaviest pass keeps: the longest question and others of median length.
    fn activation_bytes(&self, model: &VlmConfig) -> u64 {
        let (Some(most), Some(median)) = (self.items.last(), self.items.get(self.items.len() / 2)) else {
            return 0;
        };
        let others = self.micro_batch_size.saturating_sub(1) as u64;
        let (rows, patches) =
            (most.0 as u64 + others * median.0 as u64, most.1 as u64 + others * median.1 as u64);
        let (text, vision) = (&model.text, &model.vision);
        let heads = ((text.num_heads + text.num_kv_heads) * text.head_dim) as u64;
        let hidden = text.hidden_size as u64;
        // Per row: norms and sums, queries and keys before and after norm and rotation, values, the mixture, the gated MLP.
        let inside = 4 * hidden + 3 * heads + heads + 3 * text.intermediate_size as u64;
        let seen_inside = 8 * vision.hidden_size as u64 + 3 * vision.intermediate_size as u64;
        let chain = |count: u64, depth: usize, state: u64, inside: u64| {
            let depth = depth as u64;
            count * if self.is_recomputed { (depth + 1) * state + inside } else { depth * inside }
        };
        let decoder = chain(rows, text.num_layers, hidden, inside);
        let tower = chain(patches, vision.depth, vision.hidden_size as u64, seen_inside);
        FLOAT * (decoder + tower)
    }

    fn bytes(&self, model: &VlmConfig) -> u64 {
        self.optimizer_bytes() + self.activation_bytes(model)
    }

    /// What to say when `free` bytes are not enough, with the changes, each on top of those before, that would make it fit.
    fn memory_warning(&self, model: &VlmConfig, free: u64) -> Option<String> {
        let need = self.bytes(model);
        if need <= free {
            return None;
        }
        let mut text = format!(
            "warning: the heaviest step takes about {} more memory (optimiser and gradients {}, activations {}), and {} are free: the system would end this process without a word.",
            size(need),
            size(self.optimizer_bytes()),
            size(self.activation_bytes(model)),
            size(free)
        );
        let (mut plan, mut freed, mut changes) = (self.clone(), 0, Vec::new());
        for change in CHANGES {
            let Some((what, gain)) = change(&mut plan) else { continue };
            freed += gain;
            changes.push(what);
            if plan.bytes(model) <= free + freed {
                let needed = plan.bytes(model).saturating_sub(freed);
                let _ = write!(text, " With {} it would be about {}.", changes.join(", "), size(needed));
                return Some(text + MEASURE);
            }
        }
        text.push_str(" No setting makes it fit: take a smaller model, or smaller images (`max_pixels`).");
        Some(text + MEASURE)
    }
}

const MEASURE: &str = " `safemed train --dry-run` measures it";

/// A change of settings in words, with the bytes of weights that it frees; none where it changes nothing.
type Change = fn(&mut Plan) -> Option<(String, u64)>;

/// What lowers memory, what changes the training least first.
const CHANGES: [Change; 4] = [
    |plan| {
        let is_new = plan.micro_batch_size > 1;
        plan.micro_batch_size = 1;
        is_new.then(|| ("train.micro_batch_size=1".to_owned(), 0))
    },
    |plan| {
        let is_new = !plan.is_recomputed;
        plan.is_recomputed = true;
        is_new.then(|| ("train.recompute=true".to_owned(), 0))
    },
    |plan| {
        let is_new = !plan.is_adapter;
        if is_new {
            (plan.trained, plan.is_adapter) = (plan.adapter, true);
        }
        is_new.then(|| (format!("train.lora_rank={RANK}"), 0))
    },
    |plan| {
        let is_new = plan.is_adapter && plan.is_single;
        plan.is_single = false;
        is_new.then(|| ("dtype=bf16".to_owned(), plan.all * FLOAT / 2))
    },
];

/// Checkpoints that are there at once: those that are kept, the one being written, and with validation the best.
fn checkpoints(train: &TrainConfig) -> u64 {
    let saves = train.num_steps.checked_div(train.save_every).unwrap_or(0) + 1;
    let exams = train.num_steps.checked_div(train.validation.every).unwrap_or(0);
    let most = if train.keep_checkpoints == 0 { saves } else { saves.min(train.keep_checkpoints + 1) };
    (most + usize::from(exams > 0)) as u64
}

fn disk_warning(bytes: u64, count: u64, free: u64) -> Option<String> {
    (bytes.saturating_mul(count) > free).then(|| {
        format!(
            "warning: a checkpoint takes about {}, {count} more of them are to be there at once, and {} are free on this disk: make room, lower `train.keep_checkpoints`, or train an adapter (`train.lora_rank`)",
            size(bytes),
            size(free)
        )
    })
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::model::test_support::{ids, sizes};
    use crate::pixels::RgbImage8;
    use crate::pixels::decode::encode_png;
    use crate::recipes::estimate::workload::tests::{questions, subject};

    #[test]
    fn the_longest_question_is_found_wherever_it_stands() {
        let dir = tempfile::tempdir().unwrap();
        let mut samples = questions(1000);
        for sample in &mut samples {
            sample.image = "small.png".into();
        }
        let write = |name: &str, side: usize| {
            let png = encode_png(&RgbImage8::filled(side, side, [7; 3]).unwrap()).unwrap();
            std::fs::write(dir.path().join(name), png).unwrap();
        };
        write("small.png", 32);
        write("large.png", 128);
        let mut subject = subject(&samples[..10]);
        let processor = &mut subject.processor.image_processor;
        (processor.min_pixels, processor.max_pixels) = (32 * 32, 128 * 128);
        let config = RunConfig { prompt: "phantom".to_owned(), ..RunConfig::default() };
        let of = |samples: &[Sample]| {
            let dataset = Dataset::new(dir.path(), samples.to_vec());
            lengths(&dataset, spread(&dataset), &subject, &config, true).unwrap()
        };
        let alike = of(&samples);
        assert_eq!((alike.len(), alike[0]), (250, alike[249]));
        // One that stands between those that are looked at in any case.
        let mut images = samples.clone();
        images[501].image = "large.png".into();
        let found = of(&images);
        assert_eq!((found.len(), found[125]), (251, alike[0]));
        assert_eq!(found[250], (alike[0].0 + 60, 16 * alike[0].1));
        let mut texts = samples.clone();
        texts[501].question = "what is it then? ".repeat(9);
        let found = of(&texts);
        assert!(found[250].0 > alike[0].0 && found[250].1 == alike[0].1, "{:?}", found[250]);
    }

    fn plan() -> Plan {
        Plan {
            all: 1000,
            trained: 1000,
            adapter: 10,
            is_single: true,
            micro_batch_size: 3,
            items: vec![(10, 4), (20, 8), (100, 40)],
            ..Plan::default()
        }
    }

    #[test]
    fn memory_is_counted_over_the_longest_question_and_median_others() {
        let model = VlmConfig::new_qwen3_vl(&sizes(), ids()).unwrap();
        let (text, vision) = (&model.text, &model.vision);
        let heads = (text.num_heads + text.num_kv_heads) * text.head_dim;
        let row = 4 * text.hidden_size + 4 * heads + 3 * text.intermediate_size;
        let patch = 8 * vision.hidden_size + 3 * vision.intermediate_size;
        let kept = 140 * row * text.num_layers + 56 * patch * vision.depth;
        assert_eq!(plan().activation_bytes(&model), 4 * kept as u64);
        let items = vec![(10, 0), (100, 0)];
        let blind = Plan { items, micro_batch_size: 1, is_recomputed: true, ..plan() };
        let again = 100 * ((text.num_layers + 1) * text.hidden_size + row);
        assert_eq!(blind.activation_bytes(&model), 4 * again as u64);
        assert_eq!(plan().optimizer_bytes(), 16_000);
    }

    #[test]
    fn what_would_fit_is_found_in_order_and_enough_room_says_nothing() {
        let model = VlmConfig::new_qwen3_vl(&sizes(), ids()).unwrap();
        let need = plan().bytes(&model);
        assert_eq!(plan().memory_warning(&model, need), None);
        let said = |free: u64| plan().memory_warning(&model, free).unwrap();
        assert!(said(need - 1).contains("With train.micro_batch_size=1 it"), "{}", said(need - 1));
        let one = Plan { micro_batch_size: 1, ..plan() };
        let second = said(one.bytes(&model) - 1);
        assert!(second.contains("With train.micro_batch_size=1, train.recompute=true it"), "{second}");
        let low = Plan { is_recomputed: true, ..one };
        assert!(said(low.bytes(&model) - 1).contains("train.lora_rank=16 it"));
        let adapter = Plan { trained: 10, is_adapter: true, ..low };
        let bytes = adapter.bytes(&model);
        assert!(said(bytes - 1).contains("dtype=bf16 it"), "{}", said(bytes - 1));
        assert!(said(bytes - 2001).contains("No setting makes it fit"));
    }

    #[test]
    fn checkpoints_that_do_not_fit_on_the_disk_are_warned_of() {
        assert_eq!(disk_warning(100, 3, 300), None);
        assert!(disk_warning(100, 3, 299).unwrap().contains("train.keep_checkpoints"));
        let mut train = TrainConfig::default();
        for (steps, every, keep, wanted) in
            [(1000, 100, 2, 3), (1000, 100, 0, 11), (1000, 0, 2, 1), (100, 100, 5, 2)]
        {
            train.num_steps = steps;
            train.save_every = every;
            train.keep_checkpoints = keep;
            assert_eq!(checkpoints(&train), wanted, "{steps} {every} {keep}");
            train.validation.every = 50;
            assert_eq!(checkpoints(&train), wanted + 1, "{steps} {every} {keep}");
            train.validation.every = 0;
        }
    }
}
