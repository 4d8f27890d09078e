//! `safemed eval`: accuracy by modality and question type, beside the controls that tell what it is worth.
//!
//! Each item is asked three times: about its image, about uniform gray, and about another item's image. What training
//! answers alone would give (the option prior) and chance stand beside them.

use super::answers::{Answer, Asking};
use super::config::RunConfig;
use super::inputs;
use super::items::{self, Images};
use super::job::{Job, Outcome};
use super::progress::Progress;
use super::records::{Controls, EvalRecord, letter};
use super::report::{self, ReportOptions};
use super::run::Run;
use crate::data::{Dataset, Sample, index_of_letter, stats};
use crate::error::{Error, Result};
use crate::eval::accuracy::{self, Outcome as Judged};
use crate::eval::controls::{self, ImageOf};
use crate::model::assistant::Assistant;
use crate::model::processor::ProcessedImage;
use crate::stats::prior::PriorSource;
use candle_core::Tensor;
use serde_json::{Value, json};
use std::collections::HashMap;
use std::fmt::Write as _;
use std::sync::Arc;
use std::time::Instant;

/// How an evaluation asks.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct EvalSettings {
    /// Prompt, scoring, longest completion.
    pub asking: Asking,
    /// Items in one forward pass; changes no result.
    pub batch_size: usize,
    /// Seed of the pairing of items with others' images.
    pub seed: u64,
}

impl EvalSettings {
    /// As a configuration says.
    ///
    /// # Errors
    /// A usage error when there is no such prompt.
    pub fn of(config: &RunConfig) -> Result<Self> {
        Ok(Self { asking: Asking::of(config)?, batch_size: config.batch_size, seed: config.seed })
    }
}

/// Evaluates a checkpoint: settings, questions, weights, run directory, then the items.
///
/// # Errors
/// Of usage, data or weights before any item is asked; [`Error::Stopped`] between batches.
pub fn eval(job: &Job<'_>) -> Result<Outcome> {
    inputs::check_job(job)?;
    let settings = EvalSettings::of(&job.config)?;
    let (dataset, train) = inputs::open_questions(&job.config)?;
    items::require_some(&dataset, "evaluate")?;
    let model = inputs::open_model(job)?;
    let mut run = job.open_run()?;
    inputs::note_model(&mut run, &model)?;
    let summary = evaluate(&model.assistant, &dataset, train.as_ref(), &settings, &mut run, job.progress)?;
    let options = ReportOptions { images: job.config.images, ..ReportOptions::default() };
    report::report(&[run.dir().to_path_buf()], &options, job.progress)?;
    Ok(Outcome::new(summary.clone(), render(&summary)))
}

/// Asks about every item that has no record yet, then writes records in order and `summary.json`, which is returned.
///
/// The caller notes the model's provenance; that of the questions is noted here.
///
/// # Errors
/// A data error for a damaged image; a non-finite error; [`Error::Stopped`] between batches.
pub fn evaluate(
    assistant: &Assistant,
    dataset: &Dataset,
    train: Option<&Dataset>,
    settings: &EvalSettings,
    run: &mut Run,
    progress: &dyn Progress,
) -> Result<Value> {
    let assistant = assistant.detached()?;
    inputs::note_questions(run, dataset, train, settings.asking.template)?;
    if !dataset.skipped.is_empty() {
        progress.note(&format!("{} problems: their records are left out", dataset.skipped.len()));
    }
    let blind = Blind::new(dataset, train, settings.seed, progress);
    run.provenance("option_prior_source", json!(blind.source))?;
    let samples = inputs::in_item_order(&dataset.samples);
    let work: Vec<&Sample> =
        samples.iter().copied().filter(|sample| !run.done_ids().contains(&sample.id)).collect();
    let images = Images::new(dataset);

    let mut correct = run.records()?.iter().filter(|record| record["correct"] == true).count();
    let mut done = samples.len() - work.len();
    progress.start(samples.len(), "eval");
    for batch in work.chunks(settings.batch_size.max(1)) {
        run.check_stop()?;
        let started = Instant::now();
        for record in ask(&assistant, &images, batch, &blind, settings.asking)? {
            correct += usize::from(record.correct);
            run.record(&record)?;
        }
        run.timing("eval", started.elapsed().as_secs_f64(), &[("items", batch.len() as f64)])?;
        done += batch.len();
        progress.tick(done, &[("accuracy", correct as f64 / done as f64)]);
    }
    progress.finish();

    let order: Vec<String> = samples.iter().map(|sample| sample.id.clone()).collect();
    let records = run.finish_records(&order)?;
    let summary = summarize(&records, run.seconds())?;
    run.summary(&summary)?;
    Ok(summary)
}

/// What is answered without the right image, for the whole run, so that shards agree.
struct Blind<'a> {
    /// By id, the sample whose image is shown instead; absent when all have the same image.
    shuffled: HashMap<&'a str, &'a Sample>,
    /// By id, the option that the prior predicts.
    prior: HashMap<&'a str, usize>,
    source: PriorSource,
}

impl<'a> Blind<'a> {
    fn new(dataset: &'a Dataset, train: Option<&Dataset>, seed: u64, progress: &dyn Progress) -> Self {
        let all = dataset.population();
        let paths: Vec<String> = all.iter().map(|sample| sample.image.display().to_string()).collect();
        let shown: Vec<ImageOf<'_>> =
            all.iter().zip(&paths).map(|(sample, image)| ImageOf { id: &sample.id, image }).collect();
        let shuffled = if let Ok(pairs) = controls::shuffled_images(&shown, seed) {
            all.iter().zip(pairs).map(|(sample, other)| (sample.id.as_str(), &all[other])).collect()
        } else {
            progress.note(
                "all items have the same image: the control `shuffled_image` is not asked and counts as wrong",
            );
            HashMap::new()
        };
        let train = train.map(|train| stats::choices(&train.samples, Sample::prior_group));
        let (options, source) =
            controls::option_prior(train.as_deref(), &stats::choices(all, Sample::prior_group));
        if source == PriorSource::LeaveOneOut {
            progress.note(
                "no training questions are named (`--train-split`): the option prior counts the other items, which puts it below chance on balanced ones",
            );
        }
        let prior = all.iter().zip(options).map(|(sample, option)| (sample.id.as_str(), option)).collect();
        Self { shuffled, prior, source }
    }
}

/// The records of some items.
fn ask(
    assistant: &Assistant,
    images: &Images,
    samples: &[&Sample],
    blind: &Blind<'_>,
    asking: Asking,
) -> Result<Vec<EvalRecord>> {
    let own = images.of_samples(assistant, samples.to_vec())?;
    let answers = asking.about_images(assistant, samples, &own)?;
    let on_blank = asking.about_pixels(assistant, samples, &blank_like(assistant, &own)?)?;
    let others: Option<Vec<&Sample>> =
        samples.iter().map(|sample| blind.shuffled.get(sample.id.as_str()).copied()).collect();
    let on_others: Vec<Option<usize>> = match others {
        Some(others) => {
            let others = images.of_samples(assistant, others)?;
            let answers = asking.about_images(assistant, samples, &others)?;
            answers.into_iter().map(|answer| answer.prediction).collect()
        }
        None => vec![None; samples.len()],
    };
    let predicted = answers.into_iter().zip(on_blank).zip(on_others).zip(samples);
    Ok(predicted
        .map(|(((answer, blank), other), sample)| {
            let controls = Controls {
                blank_image: letter(blank.prediction),
                shuffled_image: letter(other),
                option_prior: letter(blind.prior.get(sample.id.as_str()).copied()),
            };
            record(sample, answer, controls, images.reading(&sample.image))
        })
        .collect())
}

fn record(sample: &Sample, answer: Answer, controls: Controls, image_reading: String) -> EvalRecord {
    EvalRecord {
        id: sample.id.clone(),
        dataset: sample.dataset.clone(),
        modality: sample.modality.clone(),
        modality_raw: sample.modality_raw.clone(),
        question_type: sample.question_type.clone(),
        question: sample.question.clone(),
        options: sample.options.clone(),
        answer: letter(Some(sample.answer)),
        prediction: letter(answer.prediction),
        correct: answer.prediction == Some(sample.answer),
        completion: answer.completion,
        probabilities: answer.probabilities,
        controls,
        image_reading,
    }
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

/// `summary.json` from the records alone.
///
/// # Errors
/// A data error when there are no records, or one is none of `eval`.
pub fn summarize(records: &[Value], seconds: f64) -> Result<Value> {
    let records: Vec<EvalRecord> = records.iter().map(read_record).collect::<Result<_>>()?;
    let report = accuracy::report(&judged(&records, |record| &record.prediction)?)?;
    let control = |prediction: fn(&EvalRecord) -> &String| -> Result<f64> {
        Ok(accuracy::report(&judged(&records, prediction)?)?.all.accuracy)
    };
    let num_options: Vec<usize> = records.iter().map(|record| record.options.len()).collect();
    Ok(json!({
        "command": "eval",
        "n": records.len(),
        "seconds": seconds,
        "accuracy": report.all.accuracy,
        "accuracy_interval": report.all.accuracy_interval,
        "unparsable": report.all.unparsable as f64 / report.all.n as f64,
        "by_modality": accuracy::shares(&report.by_modality),
        "by_question_type": accuracy::shares(&report.by_question_type),
        "modality_details": report.by_modality,
        "question_type_details": report.by_question_type,
        "controls": {
            "blank_image": control(|record| &record.controls.blank_image)?,
            "shuffled_image": control(|record| &record.controls.shuffled_image)?,
            "option_prior": control(|record| &record.controls.option_prior)?,
            "chance": controls::chance(&num_options),
        },
    }))
}

/// What was predicted, by `prediction`, beside what is right.
fn judged(records: &[EvalRecord], prediction: fn(&EvalRecord) -> &String) -> Result<Vec<Judged<'_>>> {
    let option = |text: &str| text.parse::<char>().ok().and_then(index_of_letter);
    let mut judged = Vec::with_capacity(records.len());
    for record in records {
        let answer = option(&record.answer).ok_or_else(|| {
            Error::data(format!(
                "record `{}` has the answer `{}`, which is no letter",
                record.id, record.answer
            ))
        })?;
        judged.push(Judged {
            modality: &record.modality,
            question_type: &record.question_type,
            answer,
            prediction: option(prediction(record)),
        });
    }
    Ok(judged)
}

fn read_record(value: &Value) -> Result<EvalRecord> {
    serde_json::from_value(value.clone()).map_err(|error| {
        Error::data(format!("record `{}` is none of `eval`: {error}", value["id"].as_str().unwrap_or("?")))
    })
}

/// The summary as a table.
fn render(summary: &Value) -> String {
    let number = |value: &Value| value.as_f64().map_or_else(|| "-".to_owned(), |value| format!("{value:.4}"));
    let interval = &summary["accuracy_interval"];
    let mut text = format!(
        "accuracy               {}  [{}, {}]  n {}\nunparsable             {}\n",
        number(&summary["accuracy"]),
        number(&interval[0]),
        number(&interval[1]),
        summary["n"],
        number(&summary["unparsable"])
    );
    for (title, key) in [("modality", "modality_details"), ("question type", "question_type_details")] {
        let _ = writeln!(text, "\nby {title}");
        for (name, group) in summary[key].as_object().into_iter().flatten() {
            let _ = writeln!(text, "  {name:<28} {}  n {}", number(&group["accuracy"]), group["n"]);
        }
    }
    text.push_str("\ncontrols (without the image)\n");
    for (name, value) in summary["controls"].as_object().into_iter().flatten() {
        let _ = writeln!(text, "  {name:<28} {}", number(value));
    }
    text
}
