//! `safemed eval`: accuracy by modality and question type, beside the controls that tell what it is worth.
//!
//! Each item is asked three times: about its image, about uniform gray, and about another item's image. What training
//! answers alone would give (the option prior) and chance stand beside them.

use super::answers::{Answer, Asker, Asking};
use super::blind::{self, Blind};
use super::config::RunConfig;
use super::inputs;
use super::items::Images;
use super::job::{Job, Outcome};
use super::progress::Progress;
use super::records::{Controls, EvalRecord, letter};
use super::report::{self, ReportOptions};
use super::run::Run;
use crate::data::{Dataset, Sample, index_of_letter};
use crate::error::{Error, Result};
use crate::eval::accuracy::{self, Outcome as Judged};
use crate::model::assistant::Assistant;
use crate::roles::features::FeatureCache;
use serde_json::{Value, json};
use std::fmt::Write as _;
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
    /// Room for features of images seen before, in bytes; changes no result.
    pub feature_bytes: usize,
}

impl EvalSettings {
    /// As a configuration says.
    ///
    /// # Errors
    /// A usage error when there is no such prompt.
    pub fn of(config: &RunConfig) -> Result<Self> {
        Ok(Self {
            asking: Asking::of(config)?,
            batch_size: config.batch_size,
            seed: config.seed,
            feature_bytes: config.feature_bytes(),
        })
    }
}

/// Evaluates a checkpoint: settings, questions, weights, run directory, then the items.
///
/// # Errors
/// Of usage, data or weights before any item is asked; [`Error::Stopped`] between batches.
pub fn eval(job: &Job<'_>) -> Result<Outcome> {
    inputs::check_job(job)?;
    let settings = EvalSettings::of(&job.config)?;
    let (dataset, train) = inputs::open_questions(job, "evaluate")?;
    let model = inputs::open_model(job)?;
    let mut run = job.open_run()?;
    inputs::note_model(&mut run, &model)?;
    inputs::note_denoiser(&mut run, &job.config)?;
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
    let blind = Blind::new(dataset, train, settings.seed);
    blind.note(run, progress)?;
    let asker = Asker {
        assistant: &assistant,
        asking: settings.asking,
        votes: None,
        batch_size: settings.batch_size,
        features: Some(&FeatureCache::new(settings.feature_bytes)),
    };
    let samples = inputs::in_item_order(&dataset.samples);
    let work: Vec<&Sample> =
        samples.iter().copied().filter(|sample| !run.done_ids().contains(&sample.id)).collect();
    let images = Images::new(dataset);

    let mut correct = run.records()?.iter().filter(|record| record["correct"] == true).count();
    let mut done = samples.len() - work.len();
    progress.start(samples.len(), done, "eval");
    for batch in work.chunks(settings.batch_size.max(1)) {
        run.check_stop()?;
        let started = Instant::now();
        for record in ask(&asker, &images, batch, &blind)? {
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

/// The records of some items.
fn ask(
    asker: &Asker<'_>,
    images: &Images,
    samples: &[&Sample],
    blind: &Blind<'_>,
) -> Result<Vec<EvalRecord>> {
    let own = images.of_samples(asker.assistant, samples.to_vec())?;
    let answers = asker.about_images(samples, &own)?;
    let controls = blind.controls(asker, images, samples, &own)?;
    Ok(answers
        .into_iter()
        .zip(controls)
        .zip(samples)
        .map(|((answer, controls), sample)| record(sample, answer, controls, images.reading(&sample.image)))
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

/// `summary.json` from the records alone.
///
/// # Errors
/// A data error when there are no records, or one is none of `eval`.
pub fn summarize(records: &[Value], seconds: f64) -> Result<Value> {
    let records: Vec<EvalRecord> = records.iter().map(read_record).collect::<Result<_>>()?;
    let report = accuracy::report(&judged(&records)?)?;
    let controls: Vec<(&str, Controls, usize)> = records
        .iter()
        .map(|record| (record.answer.as_str(), record.controls.clone(), record.options.len()))
        .collect();
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
        "controls": blind::summary(&controls),
    }))
}

/// What was predicted beside what is right.
fn judged(records: &[EvalRecord]) -> Result<Vec<Judged<'_>>> {
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
            prediction: option(&record.prediction),
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
