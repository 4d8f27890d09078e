//! Pictures of training: what the adversary made of an image, for the eye. TensorBoard and reports show them.

use super::adversary::Attacked;
use super::lesson::{Lesson, Questions};
use super::report::amplified_difference;
use crate::error::Result;
use crate::pixels::RgbImage8;
use crate::pixels::decode::encode_png;
use serde_json::{Value, json};

/// What one training step shows.
#[derive(Debug, Clone, PartialEq)]
pub struct Pictures {
    /// PNG files by name, at the model's resolution: `clean`, `adversarial`, and `difference`, the change around middle grey
    /// times the largest whole factor that clips nothing.
    pub files: Vec<(&'static str, Vec<u8>)>,
    /// The question they are about, the attack's budget and norm, and that factor.
    pub about: Value,
}

/// The first attacked image of step `step` (from 0) and its adversarial twin, rounded to 8 bits and without the noise of
/// `noise_sigma`; none where the step attacks nothing or shows no pictures.
///
/// # Errors
/// When a pixel is not finite.
pub fn of_attack(
    lesson: &Lesson<'_>,
    questions: &Questions,
    attacked: Option<&Attacked>,
    step: u64,
) -> Result<Option<Pictures>> {
    let every = lesson.config.log_images_every as u64;
    let Some(attacked) = attacked.filter(|_| every > 0 && (step + 1).is_multiple_of(every)) else {
        return Ok(None);
    };
    // Attacked ones come first.
    if lesson.num_attacked(step, questions.samples.len()) == 0 {
        return Ok(None);
    }
    let (sample, clean) = (&questions.samples[0], &questions.images[0].resized);
    let adversarial = RgbImage8::from_tensor(&attacked.pixels[0].get(0)?)?;
    let mut files = vec![("clean", encode_png(clean)?), ("adversarial", encode_png(&adversarial)?)];
    let difference = amplified_difference(clean, &adversarial);
    if let Some((image, _)) = &difference {
        files.push(("difference", encode_png(image)?));
    }
    let about = json!({
        "step": step + 1,
        "id": sample.id,
        "modality": sample.modality,
        "question": sample.question,
        "options": sample.options,
        "answer": sample.answer_letter().to_string(),
        "norm": lesson.config.adversary.norm.word(),
        "epsilon": attacked.epsilon,
        "difference_factor": difference.map(|(_, factor)| factor),
    });
    Ok(Some(Pictures { files, about }))
}
