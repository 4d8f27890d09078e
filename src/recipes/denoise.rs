//! One step of training a denoiser: noise on crops of the images at the model's resolution, and the noise-free crops as
//! targets.
//!
//! The loss is the mean squared error (Salman et al. 2020, the objective that needs no classifier), so one denoiser serves
//! every model that takes the same pixels.

use super::failure::{self, Noted, Walk};
use super::fit::Fit;
use super::items;
use super::lesson::Lesson;
use super::step::StepReport;
use crate::error::{Error, Result};
use crate::model::assistant::Assistant;
use crate::model::denoiser::Denoiser;
use crate::nn::recompute::{Memory, Stage, loss_and_gradients};
use crate::rng;
use candle_core::Tensor;
use rand::Rng;
use serde_json::json;
use std::time::Instant;

/// Trains on crops of the images of the fit's current step; `assistant` resizes them as its model wants them.
///
/// # Errors
/// When an image is missing or damaged, or the loss or a gradient is not finite.
pub fn step(lesson: &Lesson<'_>, fit: &mut Fit<Denoiser>, assistant: &Assistant) -> Result<StepReport> {
    let mut report = StepReport::default();
    let started = Instant::now();
    let clean = crops(lesson, assistant, fit.step)?;
    let noisy = lesson.with_noise(std::slice::from_ref(&clean), fit.step)?.remove(0);
    lesson.evidence.note(|noted| {
        let (pixels, clean) = (vec![noisy.clone()], vec![clean.clone()]);
        *noted = Noted { phase: "update", pixels, clean, ..Noted::default() };
    });
    report.phases.push(("data", started.elapsed().as_secs_f64()));

    let started = Instant::now();
    let error = |pixels: &Tensor| (pixels - &clean)?.sqr()?.mean_all();
    let (loss, gradients) = {
        let stages: Vec<Stage<'_>> = vec![Box::new(|state| Ok(vec![fit.learner.apply(&state[0])?]))];
        let loss = |state: &[Tensor]| error(&state[0]);
        loss_and_gradients(&stages, std::slice::from_ref(&noisy), loss, &fit.wanted(), Memory::Keep)?
    };
    let loss = f64::from(loss.to_scalar::<f32>()?);
    if !loss.is_finite() {
        return Err(Error::NonFinite(format!("the loss is {loss}")));
    }
    let before = f64::from(error(&noisy)?.to_scalar::<f32>()?);
    let update = fit.update(&gradients, lesson.config)?;
    report.phases.push(("update", started.elapsed().as_secs_f64()));

    let metrics = &mut report.metrics;
    metrics.insert("loss".into(), json!(loss));
    metrics.insert("learning_rate".into(), json!(update.learning_rate));
    metrics.insert("grad_norm".into(), json!(update.grad_norm));
    metrics.insert("psnr_noisy".into(), json!(psnr(before)));
    metrics.insert("psnr".into(), json!(psnr(loss)));
    Ok(report)
}

/// Takes the images of a batch through the denoiser, one at a time, and names the first tensor on the way that is not finite; an
/// item comes to its mean squared error.
///
/// # Errors
/// When an image cannot be run.
pub fn walk(denoiser: &Denoiser, noted: &Noted) -> Result<Walk> {
    let mut found = Walk::default();
    let mut count = 0;
    for tensor in &noted.clean {
        count += tensor.dim(0)?;
    }
    for place in 0..count {
        let (pixels, clean) = (items::pick(&noted.pixels, &[place])?, items::pick(&noted.clean, &[place])?);
        let (Some(pixels), Some(clean)) = (pixels.first(), clean.first()) else { continue };
        let denoised = denoiser.apply(pixels)?.detach();
        let square = (&denoised - clean)?.sqr()?;
        let loss = square.mean_all()?.to_scalar::<f32>()?;
        found.items.push(json!({"losses": [failure::number(f64::from(loss))]}));
        for (name, tensor) in
            [("the image", pixels), ("`denoiser output`", &denoised), ("`squared error`", &square)]
        {
            let bad = failure::first_bad(name, std::slice::from_ref(tensor))?;
            found.first_bad = found.first_bad.or(bad.map(|bad| (place, bad)));
        }
    }
    Ok(found)
}

/// Peak signal-to-noise ratio in decibels, for pixels in [0, 1].
fn psnr(mean_squared_error: f64) -> f64 {
    -10.0 * mean_squared_error.max(1e-12).log10()
}

/// Square crops of the images of step `step`, at places of their own, `[batch, 3, side, side]` in [0, 1].
fn crops(lesson: &Lesson<'_>, assistant: &Assistant, step: u64) -> Result<Tensor> {
    let images = lesson.images_of(assistant, step)?;
    let least = images.iter().map(|image| image.resized.height.min(image.resized.width)).min().unwrap_or(0);
    // Blocks of 2 x 2 pixels.
    let side = least.min(lesson.config.denoiser.crop) & !1;
    let mut values = Vec::with_capacity(images.len() * 3 * side * side);
    for (place, image) in images.iter().enumerate() {
        let (height, width) = (image.resized.height, image.resized.width);
        let mut stream = rng::stream(lesson.seed, "denoiser_crop", &[step, place as u64]);
        let (top, left) = (stream.random_range(0..=height - side), stream.random_range(0..=width - side));
        for channel in 0..3 {
            for row in top..top + side {
                let line = &image.resized.data[3 * (row * width + left)..][..3 * side];
                values.extend(line.iter().skip(channel).step_by(3).map(|&level| f32::from(level) / 255.0));
            }
        }
    }
    Ok(Tensor::from_vec(values, (images.len(), 3, side, side), assistant.vlm.device())?)
}
