//! The network of one checkpoint against its reference: hidden states, logits, log-probabilities, greedy tokens, loss
//! and gradients.
//!
//! Forward passes run on frozen weights, as evaluation does; loss and pixel gradient run on frozen and on trained
//! weights, which take different paths. Every pass starts from the reference's resized 8-bit pictures.

use crate::error::{Error, Result};
use crate::model::generate::{Prompt, generate, prompt_batch};
use crate::model::loader::{Adaptation, Precision, load_vlm};
use crate::model::positions::Grid;
use crate::model::sampling::{Decoding, SamplingConfig};
use crate::model::tokenizer::Tokenizer;
use crate::model::vlm::{Features, Vlm};
use crate::nn::recompute::{Gradients, Memory, Stage, loss_and_gradients};
use crate::nn::rows;
use crate::recipes::parity_io::{
    Check, ReferenceCase, ReferenceCheckpoint, disagreements, max_abs_diff, optional, typed,
};
use candle_core::{Device, Tensor, Var};
use serde_json::Value;
use std::collections::BTreeMap;

/// Largest difference of hidden states, logits, log-probabilities and losses, relative where values exceed one.
pub(super) const FORWARD_TOLERANCE: f64 = 1e-4;
/// Largest difference of a gradient, relative to its largest entry.
pub(super) const GRADIENT_TOLERANCE: f64 = 1e-3;
/// Logits of a reference that rounds every intermediate result to bfloat16. Ours come from the same bfloat16 weights in
/// float32 arithmetic: the difference is that rounding.
const HALF_TOLERANCE: f64 = 0.25;
/// Share of pixels whose first signed step differs.
const FIRST_STEP_TOLERANCE: f64 = 0.002;
/// A gradient's norm is compared relative to itself, but to no less than this share of the largest norm: below lies
/// the rounding of gradients that cancel.
pub(super) const SMALL_NORM: f64 = 1e-3;

/// Every network check of one checkpoint on `device`.
///
/// # Errors
/// A data error when the checkpoint or its reference cannot be read.
pub fn check(reference: &ReferenceCheckpoint, device: &Device) -> Result<Vec<Check>> {
    let (vlm, processor) =
        load_vlm(&reference.dir, Adaptation::None, Precision::AsStored, &|_| false, device)?;
    let subject = Subject { reference, vlm: &vlm };
    let mut checks = Vec::new();
    for case in &reference.cases {
        subject.check_forward(case, &mut checks)?;
    }
    subject.check_greedy(&processor.tokenizer, &mut checks)?;
    for (name, batch) in subject.batches() {
        subject.check_batch(name, batch, &processor.tokenizer, &mut checks)?;
    }
    if let Some(case) = subject.trained_case()? {
        subject.check_loss(case, Memory::Recompute, &mut checks)?;
        let (trained, _) =
            load_vlm(&reference.dir, Adaptation::None, Precision::AsStored, &|_| true, device)?;
        Subject { reference, vlm: &trained }.check_loss(case, Memory::Keep, &mut checks)?;
    }
    Ok(checks)
}

/// A model and what is expected of it.
pub(super) struct Subject<'a> {
    /// What is expected.
    pub(super) reference: &'a ReferenceCheckpoint,
    /// The model.
    pub(super) vlm: &'a Vlm,
}

/// Largest difference, relative to the largest wanted magnitude where that exceeds one.
pub(super) fn scaled_diff(found: &[f32], wanted: &[f32]) -> f64 {
    max_abs_diff(found, wanted) / magnitude(wanted).max(1.0)
}

/// Largest difference relative to the largest wanted magnitude.
pub(super) fn relative_diff(found: &[f32], wanted: &[f32]) -> f64 {
    let scale = magnitude(wanted);
    max_abs_diff(found, wanted) / if scale > 0.0 { scale } else { 1.0 }
}

fn magnitude(values: &[f32]) -> f64 {
    values.iter().fold(0.0, |largest, value| largest.max(f64::from(value.abs())))
}

pub(super) fn floats(tensor: &Tensor) -> Result<Vec<f32>> {
    Ok(tensor.flatten_all()?.to_vec1()?)
}

/// `ln Σ exp`, in double precision.
fn log_sum_exp(logits: &[f32]) -> f32 {
    let largest = logits.iter().copied().fold(f32::NEG_INFINITY, f32::max);
    let sum: f64 = logits.iter().map(|&value| f64::from(value - largest).exp()).sum();
    (f64::from(largest) + sum.ln()) as f32
}

impl Subject<'_> {
    /// Whether the reference holds this tensor.
    fn has(&self, name: &str) -> bool {
        self.reference.tensors.shape(name).is_some()
    }

    fn forward_check(&self, case: &str, quantity: &str, difference: f64) -> Check {
        Check::new(&self.reference.name, case, quantity, difference, FORWARD_TOLERANCE)
    }

    /// The resized pictures of `case`, each `[1, 3, height, width]` in [0, 1].
    pub(super) fn pixels(&self, case: &ReferenceCase) -> Result<Vec<Tensor>> {
        let picture = |index| {
            let picture = self.reference.resized(&case.name, index)?;
            Ok(picture.to_tensor(self.vlm.device())?.unsqueeze(0)?)
        };
        (0..case.images.len()).map(picture).collect()
    }

    pub(super) fn features(&self, cases: &[&ReferenceCase]) -> Result<Option<Features>> {
        let (mut grids, mut pixels) = (Vec::new(), Vec::new());
        for case in cases {
            grids.extend_from_slice(&case.grids);
            pixels.extend(self.pixels(case)?);
        }
        if pixels.is_empty() {
            return Ok(None);
        }
        let plan = self.vlm.vision_plan(&grids)?;
        Ok(Some(self.vlm.encode_images(&pixels, &plan)?))
    }

    pub(super) fn prompt(&self, ids: Vec<u32>, grids: &[Grid]) -> Result<Prompt> {
        Prompt::of_ids(self.vlm.config(), ids, grids)
    }

    /// Hidden states, logits and log-probabilities of one prompt.
    fn check_forward(&self, case: &ReferenceCase, checks: &mut Vec<Check>) -> Result<()> {
        let (batch, _) = prompt_batch(self.vlm, &[self.prompt(case.input_ids.clone(), &case.grids)?])?;
        let mut states = BTreeMap::new();
        let mut state = Vec::new();
        if !case.images.is_empty() {
            let plan = self.vlm.vision_plan(&case.grids)?;
            state = trace(&self.vlm.vision_stages(&plan), self.pixels(case)?, "vision", &mut states)?;
            for (index, tensor) in state.iter().enumerate() {
                let name =
                    index.checked_sub(1).map_or("vision.merged".into(), |i| format!("vision.deepstack.{i}"));
                states.insert(name, tensor.clone());
            }
        }
        let hidden = trace(&self.vlm.decoder_stages(&batch), state, "text", &mut states)?.remove(0);
        states.insert("text.hidden.final".to_string(), hidden.clone());
        for (quantity, part) in [("vision", "vision."), ("hidden_states", "text.hidden.")] {
            if let Some(difference) = self.compare_states(case, part, &states)? {
                checks.push(self.forward_check(&case.name, quantity, difference));
            }
        }
        self.check_logits(case, &hidden, checks)
    }

    /// Largest difference of the states whose names start with `part`; none when the reference holds none.
    fn compare_states(
        &self,
        case: &ReferenceCase,
        part: &str,
        states: &BTreeMap<String, Tensor>,
    ) -> Result<Option<f64>> {
        let mut worst = None;
        let own = format!("{}.", case.name);
        for name in self.reference.tensors.names() {
            let Some(state) = name.strip_prefix(&own).filter(|state| state.starts_with(part)) else {
                continue;
            };
            // Patches before positions are added and windows are made: no state of this build, but all of
            // `vision.hidden.0` depends on it.
            if state == "vision.patch_embed" {
                continue;
            }
            let difference = match states.get(state) {
                Some(found) => scaled_diff(&floats(found)?, &self.reference.tensors.floats(&name)?),
                None => f64::INFINITY,
            };
            worst = Some(difference.max(worst.unwrap_or(0.0)));
        }
        Ok(worst)
    }

    /// Logits where the reference lists them, their normaliser everywhere, and the log-probability of each next token.
    fn check_logits(&self, case: &ReferenceCase, hidden: &Tensor, checks: &mut Vec<Check>) -> Result<()> {
        let tensors = &self.reference.tensors;
        let row = &self.reference.expected["cases"][&case.name];
        let vocab = self.vlm.config().text.vocab_size;
        let logits = floats(&self.vlm.logits(hidden)?)?;
        let difference_of = |run: &str| -> Result<f64> {
            let mut found = Vec::new();
            for place in typed::<Vec<usize>>(&row[format!("{run}.positions")], "positions")? {
                found.extend_from_slice(logits.get(place * vocab..(place + 1) * vocab).unwrap_or_default());
            }
            Ok(scaled_diff(&found, &tensors.floats(&format!("{run}.logits"))?))
        };
        let half = format!("{}.bf16_compute", case.name);
        if self.has(&format!("{half}.logits")) {
            let difference = difference_of(&half)?;
            let name = &self.reference.name;
            checks.push(Check::new(name, &case.name, "bf16_logits", difference, HALF_TOLERANCE));
        }
        let mut difference = difference_of(&case.name)?;
        let key = format!("{}.logsumexp", case.name);
        if self.has(&key) {
            let found: Vec<f32> = logits.chunks_exact(vocab).map(log_sum_exp).collect();
            difference = difference.max(scaled_diff(&found, &tensors.floats(&key)?));
        }
        checks.push(self.forward_check(&case.name, "logits", difference));
        let key = format!("{}.next_logprob", case.name);
        if self.has(&key) && case.input_ids.len() > 1 {
            let places: Vec<u32> = (0..case.input_ids.len() as u32 - 1).collect();
            let hidden = rows::select(hidden, &places)?;
            let found = floats(&self.vlm.log_probs(&hidden, &case.input_ids[1..], 1.0)?)?;
            let difference = scaled_diff(&found, &tensors.floats(&key)?);
            checks.push(self.forward_check(&case.name, "log_probs", difference));
        }
        Ok(())
    }

    /// The longest greedy completion of the reference: what its runs were limited to, unless all stopped earlier.
    fn max_new_tokens(&self) -> usize {
        let cases = self.reference.expected["cases"].as_object().into_iter().flatten().map(|(_, row)| row);
        let runs = cases.flat_map(|row| row["greedy"].as_array().into_iter().flatten());
        let lists = runs.flat_map(|run| run["ids"].as_array().into_iter().flatten());
        lists.filter_map(|ids| ids.as_array().map(Vec::len)).max().unwrap_or(0)
    }

    fn check_greedy(&self, tokenizer: &Tokenizer, checks: &mut Vec<Check>) -> Result<()> {
        for case in &self.reference.cases {
            let runs = self.reference.expected["cases"][&case.name]["greedy"].as_array();
            for run in runs.into_iter().flatten() {
                let prompts = [self.prompt(case.input_ids.clone(), &case.grids)?];
                let wrong = self.greedy_disagreements(run, &prompts, &[case], tokenizer)?;
                checks.push(Check::exact(&self.reference.name, &case.name, "greedy_tokens", wrong));
            }
        }
        Ok(())
    }

    /// Tokens that differ from one greedy run of the reference over `prompts`; finished rows are padded as there.
    fn greedy_disagreements(
        &self,
        run: &Value,
        prompts: &[Prompt],
        cases: &[&ReferenceCase],
        tokenizer: &Tokenizer,
    ) -> Result<usize> {
        let wanted: Vec<Vec<u32>> = typed(&run["ids"], "greedy ids")?;
        let longest = wanted.iter().map(Vec::len).max().unwrap_or(0);
        let sampling = SamplingConfig {
            repetition_penalty: optional(run, "repetition_penalty")?.unwrap_or(1.0),
            ..SamplingConfig::default()
        };
        let decoding = Decoding {
            sampling,
            ..Decoding::greedy(self.max_new_tokens().max(longest), tokenizer.stop_ids().to_vec())
        };
        let seeds = vec![vec![0]; prompts.len()];
        let groups = generate(self.vlm, prompts, self.features(cases)?.as_ref(), &seeds, &decoding)?;
        let mut found: Vec<Vec<u32>> =
            groups.into_iter().flatten().map(|completion| completion.ids).collect();
        let width = found.iter().map(Vec::len).max().unwrap_or(0);
        let pad = tokenizer.pad_id().or_else(|| tokenizer.stop_ids().first().copied()).unwrap_or(0);
        for ids in &mut found {
            ids.resize(width, pad);
        }
        let wrong: usize = found.iter().zip(&wanted).map(|(a, b)| disagreements(a, b)).sum();
        Ok(wrong + found.len().abs_diff(wanted.len()))
    }

    /// The reference's padded batches, by name.
    fn batches(&self) -> impl Iterator<Item = (&str, &Value)> {
        let entries = self.reference.expected.as_object().into_iter().flatten();
        entries
            .filter(|(_, value)| value.get("attention_mask").is_some())
            .map(|(name, value)| (name.as_str(), value))
    }

    /// A batch that the reference pads and this build packs: the same rows without their padding.
    fn check_batch(
        &self,
        name: &str,
        batch: &Value,
        tokenizer: &Tokenizer,
        checks: &mut Vec<Check>,
    ) -> Result<()> {
        let checkpoint = self.reference.name.as_str();
        let names: Vec<String> = typed(&batch["cases"], "cases")?;
        let mut cases = Vec::new();
        for name in &names {
            let found = self.reference.cases.iter().find(|case| case.name == *name);
            cases.push(found.ok_or_else(|| Error::data(format!("a batch names the unknown case `{name}`")))?);
        }
        let padded: Vec<Vec<u32>> = typed(&batch["input_ids"], "input_ids")?;
        let masks: Vec<Vec<u8>> = typed(&batch["attention_mask"], "attention_mask")?;
        let mut prompts = Vec::new();
        for ((ids, mask), case) in padded.iter().zip(&masks).zip(&cases) {
            prompts.push(self.prompt(unpadded(ids, mask), &case.grids)?);
        }
        if let Some(wanted) = optional::<[Vec<Vec<i64>>; 3]>(batch, "position_ids")? {
            let mut wrong = 0;
            for (axis, rows) in wanted.iter().enumerate() {
                for ((row, mask), prompt) in rows.iter().zip(&masks).zip(&prompts) {
                    wrong += disagreements(&prompt.positions[axis], &unpadded(row, mask));
                }
            }
            checks.push(Check::exact(checkpoint, name, "position_ids", wrong));
        }
        let (rows_of_all, ranges) = prompt_batch(self.vlm, &prompts)?;
        let hidden = self.vlm.forward(self.features(&cases)?.as_ref(), &rows_of_all)?;
        let mut difference = 0f64;
        for (index, range) in ranges.iter().enumerate() {
            let found = floats(&self.vlm.logits(&rows::select(&hidden, &[range.end as u32 - 1])?)?)?;
            let wanted = self.reference.tensors.floats(&format!("{name}.{index}.last_logits"))?;
            difference = difference.max(scaled_diff(&found, &wanted));
        }
        checks.push(self.forward_check(name, "logits_padded", difference));
        if let Some(run) = batch.get("greedy") {
            let wrong = self.greedy_disagreements(run, &prompts, &cases, tokenizer)?;
            checks.push(Check::exact(checkpoint, name, "greedy_tokens", wrong));
        }
        Ok(())
    }

    /// The case that the reference's loss is about: the one whose prompt its tokens begin with.
    fn trained_case(&self) -> Result<Option<&ReferenceCase>> {
        let train = &self.reference.expected["train"];
        if train.is_null() {
            return Ok(None);
        }
        let ids: Vec<u32> = typed(&train["input_ids"], "input_ids")?;
        let found = self.reference.cases.iter().find(|case| ids.starts_with(&case.input_ids));
        found.map(Some).ok_or_else(|| Error::data("the reference's `train` continues none of its cases"))
    }

    /// The loss on the labelled tokens, their log-probabilities, and the gradients on pixels and (where the model
    /// trains) weights.
    fn check_loss(&self, case: &ReferenceCase, memory: Memory, checks: &mut Vec<Check>) -> Result<()> {
        let train = &self.reference.expected["train"];
        let ids: Vec<u32> = typed(&train["input_ids"], "input_ids")?;
        let labels: Vec<i64> = typed(&train["labels"], "labels")?;
        let (places, targets) = labelled(&labels);
        let (batch, _) = prompt_batch(self.vlm, &[self.prompt(ids, &case.grids)?])?;
        let has_images = !case.images.is_empty();
        let plan = has_images.then(|| self.vlm.vision_plan(&case.grids)).transpose()?;
        let pixels: Vec<Var> =
            self.pixels(case)?.iter().map(Var::from_tensor).collect::<candle_core::Result<_>>()?;
        let mut stages = plan.as_ref().map_or_else(Vec::new, |plan| self.vlm.vision_stages(plan));
        stages.extend(self.vlm.decoder_stages(&batch));
        let log_probs = std::cell::RefCell::new(Vec::new());
        let loss = |state: &[Tensor]| {
            let values = self.vlm.log_probs(&rows::select(&state[0], &places)?, &targets, 1.0)?;
            *log_probs.borrow_mut() = values.to_vec1()?;
            values.mean_all()?.neg()
        };
        let inputs: Vec<Tensor> = pixels.iter().map(|var| var.as_tensor().clone()).collect();
        let weights = self.vlm.parameters().trained();
        let wanted: Vec<Tensor> = weights.iter().map(|(_, var)| var.as_tensor().clone()).collect();
        let (value, gradients) = loss_and_gradients(&stages, &inputs, loss, &wanted, memory)?;
        let value = value.to_scalar::<f32>()?;
        let expected: f32 = typed(&train["loss"], "loss")?;
        checks.push(self.forward_check(&case.name, "loss", scaled_diff(&[value], &[expected])));
        if self.has("train.completion_logprobs") {
            let expected = self.reference.tensors.floats("train.completion_logprobs")?;
            let difference = scaled_diff(&log_probs.into_inner(), &expected);
            checks.push(self.forward_check(&case.name, "log_probs", difference));
        }
        self.check_pixel_gradient(case, &inputs, &gradients, checks)?;
        if !weights.is_empty() && train.get("grad_norms").is_some() {
            let difference = self.weight_gradient_difference(&weights, &gradients)?;
            checks.push(Check::new(
                &self.reference.name,
                &case.name,
                "weight_gradient",
                difference,
                GRADIENT_TOLERANCE,
            ));
        }
        Ok(())
    }

    /// The gradient on the first picture, and the picture after one step of one level along its sign.
    fn check_pixel_gradient(
        &self,
        case: &ReferenceCase,
        pixels: &[Tensor],
        gradients: &Gradients,
        checks: &mut Vec<Check>,
    ) -> Result<()> {
        let (Some(picture), true) = (pixels.first(), self.has("train.grad_image01")) else { return Ok(()) };
        let wanted = self.reference.tensors.floats("train.grad_image01")?;
        let found = gradients.get(picture).map(floats).transpose()?.unwrap_or_default();
        let (checkpoint, name) = (self.reference.name.as_str(), case.name.as_str());
        let difference = relative_diff(&found, &wanted);
        checks.push(Check::new(checkpoint, name, "pixel_gradient", difference, GRADIENT_TOLERANCE));
        let start = floats(picture)?;
        let step = |gradient: &[f32]| -> Vec<f32> {
            let moved = start.iter().zip(gradient);
            moved.map(|(x, g)| (x + sign(*g) / 255.0).clamp(0.0, 1.0)).collect()
        };
        let share = share_of_pixels(&step(&found), &step(&wanted), 0.5 / 255.0);
        checks.push(Check::new(checkpoint, name, "pgd_first_step", share, FIRST_STEP_TOLERANCE));
        Ok(())
    }

    /// Worst relative difference of all gradient norms and of the gradients that are stored whole. A weight on one
    /// side only, or with a gradient that the other side lacks, differs infinitely.
    fn weight_gradient_difference(&self, weights: &[(String, Var)], gradients: &Gradients) -> Result<f64> {
        let train = &self.reference.expected["train"];
        let norms: BTreeMap<String, f64> = typed(&train["grad_norms"], "grad_norms")?;
        let without: Vec<String> = optional(train, "params_without_grad")?.unwrap_or_default();
        let floor = SMALL_NORM * norms.values().fold(0.0, |largest: f64, &norm| largest.max(norm));
        let mut worst = 0f64;
        let mut compared = 0;
        for (name, var) in weights {
            let found = gradients.get(var.as_tensor()).map(floats).transpose()?;
            let (Some(found), Some(&wanted)) = (found, norms.get(name)) else {
                let neither = gradients.get(var.as_tensor()).is_none() && without.contains(name);
                worst = if neither { worst } else { f64::INFINITY };
                continue;
            };
            compared += 1;
            let norm = found.iter().map(|&value| f64::from(value).powi(2)).sum::<f64>().sqrt();
            let relative = (norm - wanted).abs() / wanted.max(floor);
            worst = worst.max(if relative.is_nan() { f64::INFINITY } else { relative });
            let key = format!("train.grad.{name}");
            if self.has(&key) {
                worst = worst.max(relative_diff(&found, &self.reference.tensors.floats(&key)?));
            }
        }
        Ok(if compared == norms.len() { worst } else { f64::INFINITY })
    }
}

/// Runs `stages` and keeps the first tensor of the state between them: `PART.hidden.I` before block `I`,
/// `PART.hidden.last` after the last; the first stage makes the hidden state, the last one leaves it.
fn trace(
    stages: &[Stage<'_>],
    mut state: Vec<Tensor>,
    part: &str,
    states: &mut BTreeMap<String, Tensor>,
) -> Result<Vec<Tensor>> {
    for (index, stage) in stages.iter().enumerate() {
        state = stage(&state)?;
        let key = match stages.len() - index {
            1 => continue,
            2 => "last".to_string(),
            _ => index.to_string(),
        };
        states.insert(format!("{part}.hidden.{key}"), state[0].clone());
    }
    Ok(state)
}

/// The entries whose mask is set.
fn unpadded<T: Copy>(row: &[T], mask: &[u8]) -> Vec<T> {
    row.iter().zip(mask).filter(|(_, kept)| **kept != 0).map(|(value, _)| *value).collect()
}

/// Rows that predict a labelled token (label not negative), and those tokens.
fn labelled(labels: &[i64]) -> (Vec<u32>, Vec<u32>) {
    let next = labels.iter().skip(1).enumerate();
    next.filter_map(|(row, &label)| Some((row as u32, u32::try_from(label).ok()?))).unzip()
}

/// -1, 0 or 1, as torch's `sign`.
fn sign(value: f32) -> f32 {
    if value == 0.0 { 0.0 } else { value.signum() }
}

/// Share of pixels (three channels of planes one after another) of which a channel differs by more than `threshold`.
pub(super) fn share_of_pixels(found: &[f32], wanted: &[f32], threshold: f32) -> f64 {
    if found.len() != wanted.len() || found.is_empty() {
        return f64::INFINITY;
    }
    let plane = found.len() / 3;
    // What cannot be compared differs.
    let differs = |i: usize| {
        let difference = (found[i] - wanted[i]).abs();
        difference.is_nan() || difference > threshold
    };
    (0..plane).filter(|&i| (0..3).any(|channel| differs(channel * plane + i))).count() as f64 / plane as f64
}
