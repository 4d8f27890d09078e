//! Low-rank adapters of an export: logits with the adapter active and merged, and gradients of its matrices.

use super::network::{
    FORWARD_TOLERANCE, GRADIENT_TOLERANCE, SMALL_NORM, Subject, floats, relative_diff, scaled_diff,
};
use crate::error::{Error, Result};
use crate::model::generate::prompt_batch;
use crate::model::loader::{Adaptation, Precision, load_vlm};
use crate::model::lora::{Adapter, ROOT};
use crate::model::weights::TensorFile;
use crate::nn::recompute::{Memory, Stage, loss_and_gradients};
use crate::nn::rows;
use crate::recipes::parity_io::{Check, ReferenceCase, ReferenceCheckpoint, disagreements, read_json, typed};
use candle_core::{D, Device, Tensor};
use serde_json::Value;
use std::collections::BTreeMap;
use std::path::Path;

/// Every check of the adapters that `lora.json` lists.
///
/// # Errors
/// A data error when an adapter or its numbers cannot be read.
pub fn check(dir: &Path, device: &Device) -> Result<Vec<Check>> {
    let path = dir.join("lora.json");
    let mut checks = Vec::new();
    if !path.exists() {
        return Ok(checks);
    }
    let report = read_json(&path)?;
    let numbers = TensorFile::open(&dir.join("lora.safetensors"))?;
    for (key, row) in report.as_object().into_iter().flatten() {
        let (checkpoint, kind) = key.rsplit_once('.').unwrap_or((key, "-"));
        let reference = ReferenceCheckpoint::load(dir, checkpoint)?
            .ok_or_else(|| Error::data(format!("lora.json names the unknown checkpoint `{checkpoint}`")))?;
        let adapter = Adapter::load(&dir.join(typed::<String>(&row["directory"], "directory")?))?;
        let case: String = typed(&row["case"], "case")?;
        let case = reference
            .cases
            .iter()
            .find(|known| known.name == case)
            .ok_or_else(|| Error::data(format!("lora.json names the unknown case `{case}`")))?;
        let wanted = Wanted { key, kind, row, numbers: &numbers };
        let (active, _) =
            load_vlm(&reference.dir, Adaptation::Active(&adapter), Precision::AsStored, &|_| false, device)?;
        wanted.check_logits(&Subject { reference: &reference, vlm: &active }, case, "active", &mut checks)?;
        drop(active);
        let (merged, _) =
            load_vlm(&reference.dir, Adaptation::Merged(&adapter), Precision::AsStored, &|_| false, device)?;
        wanted.check_logits(&Subject { reference: &reference, vlm: &merged }, case, "merged", &mut checks)?;
        drop(merged);
        let trains = |name: &str| name.contains(".lora_");
        let (trained, _) =
            load_vlm(&reference.dir, Adaptation::Active(&adapter), Precision::AsStored, &trains, device)?;
        wanted.check_gradients(&Subject { reference: &reference, vlm: &trained }, case, &mut checks)?;
    }
    Ok(checks)
}

/// The numbers of one adapter.
struct Wanted<'a> {
    key: &'a str,
    kind: &'a str,
    row: &'a Value,
    numbers: &'a TensorFile,
}

impl Wanted<'_> {
    /// Logits where the reference lists them, and the best token everywhere.
    fn check_logits(
        &self,
        subject: &Subject<'_>,
        case: &ReferenceCase,
        how: &str,
        checks: &mut Vec<Check>,
    ) -> Result<()> {
        let prompt = subject.prompt(case.input_ids.clone(), &case.grids)?;
        let (batch, _) = prompt_batch(subject.vlm, &[prompt])?;
        let hidden = subject.vlm.forward(subject.features(&[case])?.as_ref(), &batch)?;
        let logits = subject.vlm.logits(&hidden)?;
        let places: Vec<u32> = typed(&self.row["positions"], "positions")?;
        let wanted = self.numbers.floats(&format!("{}.{how}.logits", self.key))?;
        let difference = scaled_diff(&floats(&rows::select(&logits, &places)?)?, &wanted);
        let quantity = if how == "active" { "lora_logits" } else { "lora_merged" };
        checks.push(Check::new(&subject.reference.name, self.kind, quantity, difference, FORWARD_TOLERANCE));
        if how == "active" {
            let found: Vec<u32> = logits.argmax(D::Minus1)?.to_vec1()?;
            let wrong = disagreements(&found, &typed::<Vec<u32>>(&self.row["argmax"], "argmax")?);
            checks.push(Check::exact(&subject.reference.name, self.kind, "greedy_tokens", wrong));
        }
        Ok(())
    }

    /// The loss on the last tokens, and the gradient of every matrix of the adapter.
    fn check_gradients(
        &self,
        subject: &Subject<'_>,
        case: &ReferenceCase,
        checks: &mut Vec<Check>,
    ) -> Result<()> {
        let vlm = subject.vlm;
        let labelled: usize = typed(&self.row["labels_last"], "labels_last")?;
        let count = case.input_ids.len();
        let first = count.saturating_sub(labelled).max(1);
        let targets = &case.input_ids[first..];
        let places: Vec<u32> = (first as u32 - 1..count as u32 - 1).collect();
        let (batch, _) = prompt_batch(vlm, &[subject.prompt(case.input_ids.clone(), &case.grids)?])?;
        let pixels = subject.pixels(case)?;
        let plan = vlm.vision_plan(&case.grids)?;
        let mut stages: Vec<Stage<'_>> =
            if pixels.is_empty() { Vec::new() } else { vlm.vision_stages(&plan) };
        stages.extend(vlm.decoder_stages(&batch));
        let loss = |state: &[Tensor]| {
            vlm.log_probs(&rows::select(&state[0], &places)?, targets, 1.0)?.mean_all()?.neg()
        };
        let matrices = vlm.parameters().trained();
        let wanted: Vec<Tensor> = matrices.iter().map(|(_, var)| var.as_tensor().clone()).collect();
        let (value, gradients) = loss_and_gradients(&stages, &pixels, loss, &wanted, Memory::Recompute)?;
        let expected: f32 = typed(&self.row["loss"], "loss")?;
        let difference = scaled_diff(&[value.to_scalar::<f32>()?], &[expected]);
        checks.push(Check::new(&subject.reference.name, self.kind, "loss", difference, FORWARD_TOLERANCE));

        let norms: BTreeMap<String, f64> = typed(&self.row["grad_norms"], "grad_norms")?;
        let floor = SMALL_NORM * norms.values().fold(0.0, |largest: f64, &norm| largest.max(norm));
        let mut worst = if norms.len() == matrices.len() { 0.0 } else { f64::INFINITY };
        for (name, var) in &matrices {
            // In memory PEFT has the name of the adapter inside.
            let in_memory = name.replace(".weight", ".default.weight");
            let found = gradients.get(var.as_tensor()).map(floats).transpose()?;
            let (Some(found), Some(&wanted)) = (found, norms.get(&format!("{ROOT}{in_memory}"))) else {
                worst = f64::INFINITY;
                continue;
            };
            let norm = found.iter().map(|&value| f64::from(value).powi(2)).sum::<f64>().sqrt();
            let relative = (norm - wanted).abs() / wanted.max(floor);
            worst = worst.max(if relative.is_nan() { f64::INFINITY } else { relative });
            // The reference keeps two whole: those of the first layer's queries.
            if let Some(half) = name.strip_prefix("model.language_model.layers.0.self_attn.q_proj.") {
                let key = format!("{}.grad.layers.0.q_proj.{}", self.key, half.trim_end_matches(".weight"));
                if self.numbers.shape(&key).is_some() {
                    worst = worst.max(relative_diff(&found, &self.numbers.floats(&key)?));
                }
            }
        }
        checks.push(Check::new(
            &subject.reference.name,
            self.kind,
            "weight_gradient",
            worst,
            GRADIENT_TOLERANCE,
        ));
        Ok(())
    }
}
