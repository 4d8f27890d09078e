//! What is answered without the right image: the controls that stand beside every accuracy.

use super::answers::Asker;
use super::items::{self, Images};
use super::progress::Progress;
use super::records::{Controls, letter};
use super::run::Run;
use crate::data::{Dataset, Sample, stats};
use crate::error::Result;
use crate::eval::controls::{self, ImageOf};
use crate::model::assistant::Assistant;
use crate::model::processor::ProcessedImage;
use crate::stats::prior::PriorSource;
use candle_core::Tensor;
use serde_json::{Value, json};
use std::collections::HashMap;
use std::sync::Arc;

/// Blind answers for the whole run, so that shards agree.
pub(super) struct Blind<'a> {
    /// By id, the sample whose image is shown instead; absent when all have the same image.
    shuffled: HashMap<&'a str, &'a Sample>,
    /// By id, the option that the prior predicts.
    prior: HashMap<&'a str, usize>,
    source: PriorSource,
}

impl<'a> Blind<'a> {
    /// `train`: the questions that the option prior counts; without them the other items.
    pub(super) fn new(dataset: &'a Dataset, train: Option<&Dataset>, seed: u64) -> Self {
        let all = dataset.population();
        let paths: Vec<String> = all.iter().map(|sample| sample.image.display().to_string()).collect();
        let shown: Vec<ImageOf<'_>> =
            all.iter().zip(&paths).map(|(sample, image)| ImageOf { id: &sample.id, image }).collect();
        let shuffled = match controls::shuffled_images(&shown, seed) {
            Ok(pairs) => {
                all.iter().zip(pairs).map(|(sample, other)| (sample.id.as_str(), &all[other])).collect()
            }
            Err(_) => HashMap::new(),
        };
        let train = train.map(|train| stats::choices(&train.samples, Sample::prior_group));
        let (options, source) =
            controls::option_prior(train.as_deref(), &stats::choices(all, Sample::prior_group));
        let prior = all.iter().zip(options).map(|(sample, option)| (sample.id.as_str(), option)).collect();
        Self { shuffled, prior, source }
    }

    /// Says what the controls of these items cannot do, and notes what the prior counted.
    ///
    /// # Errors
    /// A usage error when a resumed run began with another prior.
    pub(super) fn note(&self, run: &mut Run, progress: &dyn Progress) -> Result<()> {
        if self.shuffled.is_empty() {
            progress.note(
                "all items have the same image: the control `shuffled_image` is not asked and counts as wrong",
            );
        }
        if self.source == PriorSource::LeaveOneOut {
            progress.note(
                "no training questions are named (`--train-split`): the option prior counts the other items, which puts it below chance on balanced ones",
            );
        }
        run.provenance("option_prior_source", json!(self.source))
    }

    /// What is answered about `samples`, whose own images are `own`: about uniform gray, about another item's image, and by
    /// the prior.
    ///
    /// # Errors
    /// A damaged image of another item; those of the model.
    pub(super) fn controls(
        &self,
        asker: &Asker<'_>,
        images: &Images,
        samples: &[&Sample],
        own: &[Arc<ProcessedImage>],
    ) -> Result<Vec<Controls>> {
        let on_blank = asker.about_pixels(samples, &blank_like(asker.assistant, own)?)?;
        let others: Option<Vec<&Sample>> =
            samples.iter().map(|sample| self.shuffled.get(sample.id.as_str()).copied()).collect();
        let on_others: Vec<Option<usize>> = match others {
            Some(others) => {
                let others = images.of_samples(asker.assistant, others)?;
                let answers = asker.about_pixels(samples, &items::stack(asker.assistant, &others)?)?;
                answers.into_iter().map(|answer| answer.prediction).collect()
            }
            None => vec![None; samples.len()],
        };
        let predicted = on_blank.into_iter().zip(on_others).zip(samples);
        Ok(predicted
            .map(|((blank, other), sample)| Controls {
                blank_image: letter(blank.prediction),
                shuffled_image: letter(other),
                option_prior: letter(self.prior.get(sample.id.as_str()).copied()),
            })
            .collect())
    }
}

/// Accuracies of the controls over all items, each its right letter, its controls and its number of options, and chance;
/// null when there are none.
pub(super) fn summary(items: &[(&str, Controls, usize)]) -> Value {
    let num_options: Vec<usize> = items.iter().map(|(_, _, options)| *options).collect();
    let Some(chance) = controls::chance(&num_options) else { return Value::Null };
    let share = |letter: fn(&Controls) -> &str| {
        let right = items.iter().filter(|(answer, controls, _)| letter(controls) == *answer).count();
        right as f64 / items.len() as f64
    };
    json!({
        "blank_image": share(|controls| &controls.blank_image),
        "shuffled_image": share(|controls| &controls.shuffled_image),
        "option_prior": share(|controls| &controls.option_prior),
        "chance": chance,
    })
}

/// Uniform gray of the sizes of `images`: `[n, 3, height, width]` of 0.5, one tensor for each run of equal sizes.
fn blank_like(assistant: &Assistant, images: &[Arc<ProcessedImage>]) -> Result<Vec<Tensor>> {
    let size = |image: &ProcessedImage| (image.resized.height, image.resized.width);
    images
        .chunk_by(|a, b| size(a) == size(b))
        .map(|run| {
            let (height, width) = size(&run[0]);
            Ok(Tensor::full(0.5f32, (run.len(), 3, height, width), assistant.vlm.device())?)
        })
        .collect()
}
