//! Certified accuracy by randomised smoothing, each certificate with its evidence.
//!
//! Noise is added to the pixels at the model's resolution, in [0, 1], before normalisation; it is not clipped. The
//! certified function is the model's generation read by the parser of clean evaluation (an answer that cannot be read is
//! a class of its own), or the letter of highest likelihood when `scoring = likelihood`. Generation is greedy, or drawn:
//! then the certificate is about the noise and the tokens drawn, and every record says so.

mod draws;

use super::answers::{Asker, Asking, with_items};
use super::blind::{self, Blind};
use super::config::{ArithmeticName, CertifyMode, Command, RuleName, RunConfig, Scoring};
use super::crosscheck::{Certified, CrossCheck};
use super::inputs;
use super::items::{self, Images};
use super::job::{Job, Outcome};
use super::progress::Progress;
use super::records::{self, CertifyRecord, Controls, counts_by_letter};
use super::report::{self, ReportOptions};
use super::run::Run;
use crate::certify::audit;
use crate::certify::smooth::{Evidence, Keep};
use crate::certify::{self, Certificate, Curve, Draws, Procedure, Rule, Sequential, SmoothingConfig, Stop};
use crate::data::{Dataset, Sample};
use crate::error::{Error, Result};
use crate::eval::accuracy;
use crate::model::assistant::Assistant;
use crate::model::sampling::SamplingConfig;
use crate::rng;
use crate::roles::classifier::QuestionClassifier;
use crate::roles::features::FeatureCache;
use draws::KeptDraws;
use serde_json::{Map, Value, json};
use std::fmt::Write as _;
use std::path::Path;
use std::sync::Arc;
use std::time::Instant;

/// Radii at which certified accuracy is reported, in multiples of `sigma`.
const RADII: [f64; 9] = [0.0, 0.25, 0.5, 0.75, 1.0, 1.25, 1.5, 2.0, 2.5];

/// How a model is smoothed and asked.
#[derive(Debug, Clone)]
pub struct Setting {
    /// Noise and draws.
    pub smoothing: SmoothingConfig,
    /// How the certified function is asked and read.
    pub asking: Asking,
    /// Whether each certified item is attacked inside its radius.
    pub cross_check: bool,
    /// Hash of the weights, for the records.
    pub model_sha256: String,
    /// What the model's products take: the certificate is about the classifier that they make.
    pub arithmetic: ArithmeticName,
    /// Images seen before.
    pub features: Arc<FeatureCache>,
}

/// `safemed certify`.
///
/// # Errors
/// Whatever is wrong with settings, data or weights, before the first item.
pub fn certify(job: &Job<'_>) -> Result<Outcome> {
    let config = &job.config;
    smoothing_of(config)?;
    inputs::check_job(job)?;
    let (dataset, train) = inputs::open_questions(job, "certify")?;
    let model = inputs::open_model(job)?;
    let setting = setting_with(config, model.sha256.clone())?;
    let mut run = job.open_run()?;
    inputs::note_model(&mut run, &model)?;
    inputs::note_denoiser(&mut run, config)?;
    if let Some(trained) = model.assistant.vlm.denoiser().map(|denoiser| denoiser.config().sigma) {
        let sigma = setting.smoothing.sigma;
        if (trained / sigma - 1.0).abs() > 1e-9 {
            job.progress.note(&format!(
                "the denoiser was trained under noise of {trained}, not {sigma}: certificates hold, they may be few"
            ));
        }
    }
    let summary = smoothed(&model.assistant, &dataset, train.as_ref(), &setting, &mut run, job.progress)?;
    let options = ReportOptions { images: config.images, ..ReportOptions::default() };
    report::report(&[run.dir().to_path_buf()], &options, job.progress)?;
    let mut text = String::from("radius  certified accuracy\n");
    for point in summary["certified_accuracy"].as_array().into_iter().flatten() {
        let number = |i: usize| point[i].as_f64().unwrap_or(f64::NAN);
        let _ = writeln!(text, "{:6.3}  {:.4}", number(0), number(1));
    }
    let _ = writeln!(text, "abstained {:.4}", summary["abstention_rate"].as_f64().unwrap_or(f64::NAN));
    let count = |key: &str| summary[key].as_u64().unwrap_or_default();
    let _ = write!(text, "draws {}", count("draws"));
    if let Some(stopped) = summary["stopped"].as_object() {
        let share = count("fixed_draws") as f64 / count("draws").max(1) as f64;
        let _ = write!(text, "; at a fixed n {} ({share:.1} times as many)\nstopped:", count("fixed_draws"));
        for (why, items) in stopped {
            let _ = write!(text, " {why} {items}");
        }
    }
    text.push('\n');
    if let Some(checked) = summary["cross_check"].as_object() {
        let _ = writeln!(
            text,
            "attacked inside their radius: {} of {} certified items broken (the base model alone is right on {} of them)",
            checked["broken"], checked["n"], checked["base_model_right_when_attacked"]
        );
    }
    let _ = writeln!(text, "{}", summary["note"].as_str().unwrap_or_default());
    Ok(Outcome::new(summary, text))
}

/// Noise and draws that a configuration describes.
///
/// # Errors
/// A usage error when the settings can never certify anything.
pub(super) fn smoothing_of(config: &RunConfig) -> Result<SmoothingConfig> {
    let certify = &config.certify;
    let sequential = (certify.mode == CertifyMode::Sequential).then_some(Sequential {
        rule: match certify.rule {
            RuleName::Kt => Rule::Kt,
            RuleName::ClopperPearson => Rule::ClopperPearson,
        },
        target_radius: certify.target_radius,
        min_gain: certify.min_gain,
    });
    let smoothing = SmoothingConfig {
        sigma: config.sigma()?,
        n0: certify.n0 as u64,
        n: certify.n as u64,
        alpha: certify.alpha,
        batch_size: config.batch_size,
        seed: config.seed,
        sequential,
    };
    smoothing.check()?;
    Ok(smoothing)
}

/// The setting that a configuration and a model's directory describe.
///
/// # Errors
/// When the settings can never certify anything, or the weights cannot be read.
pub fn setting_of(config: &RunConfig, model: &Path) -> Result<Setting> {
    setting_with(config, inputs::model_sha256(model)?)
}

fn setting_with(config: &RunConfig, model_sha256: String) -> Result<Setting> {
    Ok(Setting {
        smoothing: smoothing_of(config)?,
        asking: Asking::of(config)?,
        cross_check: config.certify.cross_check,
        model_sha256,
        arithmetic: config.arithmetic,
        features: Arc::new(FeatureCache::new(config.feature_bytes())),
    })
}

/// Certifies every question of `dataset`; leaves records and the summary in the run directory.
///
/// # Errors
/// When an image or an answer cannot be had.
pub fn smoothed(
    assistant: &Assistant,
    dataset: &Dataset,
    train: Option<&Dataset>,
    setting: &Setting,
    run: &mut Run,
    progress: &dyn Progress,
) -> Result<Value> {
    inputs::note_questions(run, dataset, train, setting.asking.template)?;
    let blind = Blind::new(dataset, train, setting.asking.seed);
    blind.note(run, progress)?;
    let images = Images::new(dataset);
    let samples = inputs::in_item_order(&dataset.samples);
    let mut kept = KeptDraws::recover(run)?;
    let stop = run.stop().clone();
    progress.start(samples.len(), run.done_ids().len(), "certify");
    let (mut done, mut certified) = (0, 0);
    for record in run.records()? {
        check_finished(&record, &samples, setting)?;
        done += 1;
        certified += usize::from(record["correct"] == json!(true));
    }
    for &sample in &samples {
        if run.done_ids().contains(&sample.id) {
            continue;
        }
        run.check_stop()?;
        let num_options = sample.options.len();
        let known = kept.of_item(&sample.id, num_options)?;
        let mut from = known.len();
        let mut keep = |classes: &[u8]| {
            kept.append(&sample.id, from, classes, num_options)?;
            from += classes.len();
            stop.check()
        };
        let started = Instant::now();
        let record = certify_one(assistant, &images, sample, setting, &blind, known, &mut keep)
            .map_err(|error| with_items(error, &[sample]))?;
        done += 1;
        certified += usize::from(record.correct);
        run.record(&record)?;
        kept.clear()?;
        run.timing("certify", started.elapsed().as_secs_f64(), &[("draws", (record.n0 + record.n) as f64)])?;
        progress.tick(done, &[("certified", certified as f64 / done as f64)]);
    }
    kept.clear()?;
    progress.finish();
    let order: Vec<String> = samples.iter().map(|sample| sample.id.clone()).collect();
    let records = run.finish_records(&order)?;
    let summary = summarize(&records, run.seconds())?;
    run.summary(&summary)?;
    Ok(summary)
}

/// Whether a record of an earlier part of this run is one that this run would have written.
fn check_finished(record: &Value, samples: &[&Sample], setting: &Setting) -> Result<()> {
    audit::check_record(record)?;
    let own = read_record(record)?;
    let smoothing = &setting.smoothing;
    let sample = samples.iter().find(|sample| sample.id == own.id);
    let wanted =
        (&setting.model_sha256, smoothing.seed, smoothing.sigma, smoothing.alpha, smoothing.n0, smoothing.n);
    let found = (&own.model_sha256, own.seed, own.sigma, own.alpha, own.n0, own.n_max);
    let is_same = sample.is_none_or(|sample| own.answer == sample.answer_letter().to_string());
    if wanted == found && is_same {
        return Ok(());
    }
    Err(Error::data(format!(
        "record `{}` is not of this run: model, seed, settings or right answer differ\n   = help: take its line out of records.jsonl, or begin with another `--out`",
        own.id
    )))
}

fn certify_one(
    assistant: &Assistant,
    images: &Images,
    sample: &Sample,
    setting: &Setting,
    blind: &Blind<'_>,
    known: Vec<u8>,
    keep: &mut Keep<'_>,
) -> Result<CertifyRecord> {
    let original = images.original(&sample.image)?;
    let processed = Arc::new(images.process(assistant, &sample.image, &original)?);
    let prompt = items::prompt_of(assistant, setting.asking.template, sample, &processed)?;
    let key = rng::key_of(&sample.id);
    let reading = setting.asking.reading(assistant, sample, key)?;
    let classifier =
        QuestionClassifier { assistant, prompt: &prompt, num_options: sample.options.len(), reading };
    let pixels = processed.resized.to_tensor(assistant.vlm.device())?;
    let mut draws = Draws::new(&classifier, &pixels, key, &setting.smoothing, known, keep)?;
    let certificate = certify::certify(&mut draws, &setting.smoothing)?;
    let mut record = record_of(sample, &certificate, setting, original.sha256());
    let [from, to] = [&original, &processed.resized].map(|image| [image.height, image.width]);
    let asker = Asker {
        assistant,
        asking: setting.asking,
        votes: None,
        batch_size: setting.smoothing.batch_size,
        features: Some(&setting.features),
    };
    let controls = blind.controls(&asker, images, &[sample], std::slice::from_ref(&processed))?;
    record.more.insert("controls".to_owned(), json!(controls[0]));
    record.more.insert("values".to_owned(), json!(processed.resized.data.len()));
    record.more.insert("sizes".to_owned(), json!({"original": from, "model": to}));
    let carried = certify::transport(certificate.radius, from, to)?;
    record.more.insert("radius_original".to_owned(), json!(carried));
    if setting.cross_check {
        let certified = Certified {
            assistant,
            sample,
            asking: setting.asking,
            prompt: &prompt,
            pixels: &pixels,
            key,
            classifier: &classifier,
            smoothing: &setting.smoothing,
            certificate: &certificate,
        };
        record.more.insert("cross_check".to_owned(), json!(certified.check()?));
    }
    record.more.insert("image_reading".to_owned(), json!(images.reading(&sample.image)));
    if setting.arithmetic == ArithmeticName::Bf16 {
        record.more.insert("arithmetic".to_owned(), json!(setting.arithmetic.word()));
    }
    Ok(record)
}

fn record_of(
    sample: &Sample,
    certificate: &Certificate,
    setting: &Setting,
    image_sha256: String,
) -> CertifyRecord {
    let options = sample.options.len();
    let prediction = certificate.prediction.map(|class| records::letter((class < options).then_some(class)));
    let draws = |range: &std::ops::Range<u64>| [range.start, range.end];
    let smoothing = &setting.smoothing;
    let mode = if smoothing.sequential.is_some() { CertifyMode::Sequential } else { CertifyMode::Cohen };
    let mut more = Map::from_iter([
        ("modality".to_owned(), json!(sample.modality)),
        ("question_type".to_owned(), json!(sample.question_type)),
        ("decoding".to_owned(), decoding_of(setting)),
    ]);
    if let (Some(settings), Some(procedure), Some(evidence)) =
        (smoothing.sequential, smoothing.procedure(), certificate.evidence.clone())
    {
        more.extend(evidence_of(settings, &procedure, evidence));
    }
    CertifyRecord {
        id: sample.id.clone(),
        answer: sample.answer_letter().to_string(),
        abstained: prediction.is_none(),
        correct: certificate.prediction == Some(sample.answer),
        prediction,
        radius: certificate.radius,
        p_lower: certificate.p_lower,
        sigma: smoothing.sigma,
        mode: mode.word().to_owned(),
        target_radius: smoothing.sequential.and_then(|settings| settings.target_radius),
        n0: smoothing.n0,
        n: certificate.draws_estimation.end - certificate.draws_estimation.start,
        n_max: smoothing.n,
        alpha: smoothing.alpha,
        seed: smoothing.seed,
        counts_selection: counts_by_letter(&certificate.counts_selection),
        counts: counts_by_letter(&certificate.counts),
        draws_selection: draws(&certificate.draws_selection),
        draws_estimation: draws(&certificate.draws_estimation),
        image_sha256,
        model_sha256: setting.model_sha256.clone(),
        more,
    }
}

/// The function that is certified, as far as choosing tokens goes.
fn decoding_of(setting: &Setting) -> Value {
    let SamplingConfig { temperature, top_k, top_p, min_p, repetition_penalty } = setting.asking.sampling;
    if setting.asking.scoring == Scoring::Likelihood {
        return json!(Scoring::Likelihood.word());
    }
    if setting.asking.sampling == SamplingConfig::default() {
        return json!("greedy");
    }
    json!({
        "temperature": temperature, "top_k": top_k, "top_p": top_p, "min_p": min_p,
        "repetition_penalty": repetition_penalty,
    })
}

/// Rule, schedule, reason to stop, and the count that the bound rests on.
fn evidence_of(settings: Sequential, procedure: &Procedure, evidence: Evidence) -> Map<String, Value> {
    let Sequential { rule, target_radius, min_gain } = settings;
    let Evidence { stop, count, n, wins } = evidence;
    let mut fields =
        Map::from_iter([("rule".to_owned(), json!(rule)), ("schedule".to_owned(), procedure.schedule())]);
    let goal = match (target_radius, procedure.target()) {
        (Some(_), Some(target)) => ("p_target", target.value),
        _ => ("min_gain", min_gain),
    };
    fields.insert(goal.0.to_owned(), json!(goal.1));
    fields.insert("stopped".to_owned(), json!(stop));
    fields.insert("wins".to_owned(), json!(wins));
    fields.insert("bound".to_owned(), json!({"count": count, "n": n}));
    fields
}

/// `summary.json` from the records alone.
///
/// # Errors
/// A data error when there are no records, or one is none of `certify`.
pub fn summarize(records: &[Value], seconds: f64) -> Result<Value> {
    let records: Vec<CertifyRecord> = records.iter().map(read_record).collect::<Result<_>>()?;
    let judged: Vec<accuracy::Outcome<'_>> = records
        .iter()
        .map(|record| {
            let [modality, question_type] = records::groups_of(&record.more);
            // 0 is right, 1 is wrong; the smoothed model gives no answer where it abstains or certifies "none".
            let answers = record.prediction.as_deref().is_some_and(|prediction| prediction != records::NONE);
            let prediction = answers.then_some(usize::from(!record.correct));
            accuracy::Outcome { modality, question_type, answer: 0, prediction }
        })
        .collect();
    let report = accuracy::report(&judged)?;
    let curve = Curve::new(
        records
            .iter()
            .map(|record| certify::Outcome {
                abstained: record.abstained,
                correct: record.correct,
                radius: record.radius,
            })
            .collect(),
    );
    let first = &records[0];
    let mut radii: Vec<f64> = RADII.iter().map(|multiple| multiple * first.sigma).collect();
    radii.extend(first.target_radius);
    radii.sort_by(f64::total_cmp);
    radii.dedup();
    let draws: u64 = records.iter().map(|record| record.n0 + record.n).sum();
    let mut summary = json!({
        "command": Command::Certify.word(),
        "n": records.len(),
        "seconds": seconds,
        "sigma": first.sigma,
        "mode": first.mode,
        "n0": first.n0,
        "n_max": first.n_max,
        "alpha": first.alpha,
        "accuracy": report.all.accuracy,
        "accuracy_interval": report.all.accuracy_interval,
        "controls": blind::summary(&controls_of(&records)),
        "by_modality": accuracy::shares(&report.by_modality),
        "by_question_type": accuracy::shares(&report.by_question_type),
        "modality_details": report.by_modality,
        "question_type_details": report.by_question_type,
        "certified_accuracy": curve.points(&radii),
        "average_certified_radius": curve.average_certified_radius(),
        "abstention_rate": curve.abstention_rate(),
        "draws": draws,
        "cross_check": cross_check_of(&records),
        "note": conversion(&records),
    });
    if first.mode == CertifyMode::Sequential.word() {
        summary["target_radius"] = json!(first.target_radius);
        summary["rule"] = json!(first.more.get("rule"));
        summary["fixed_draws"] = json!(records.iter().map(|record| record.n0 + record.n_max).sum::<u64>());
        summary["stopped"] = stops(&records);
    }
    Ok(summary)
}

/// Items by their reason to stop: with a target, those certified, given up, and undecided at the cap.
fn stops(records: &[CertifyRecord]) -> Value {
    let reasons = match records[0].target_radius {
        Some(_) => [Stop::Certified, Stop::Futile, Stop::Cap],
        None => [Stop::Gain, Stop::Futile, Stop::Cap],
    };
    let count = |stop: Stop| {
        let stop = json!(stop);
        records.iter().filter(|record| record.more.get("stopped") == Some(&stop)).count()
    };
    let name = |stop: Stop| json!(stop).as_str().unwrap_or_default().to_owned();
    reasons.into_iter().map(|stop| (name(stop), json!(count(stop)))).collect::<Map<_, _>>().into()
}

/// Right letter, the base model's controls and number of options of each item.
fn controls_of(records: &[CertifyRecord]) -> Vec<(&str, Controls, usize)> {
    let of = |record: &'_ CertifyRecord| -> Option<Controls> {
        serde_json::from_value(record.more.get("controls")?.clone()).ok()
    };
    // Votes are counted for every option, and for "none".
    let options = |record: &CertifyRecord| record.counts.len() - 1;
    records
        .iter()
        .filter_map(|record| of(record).map(|controls| (record.answer.as_str(), controls, options(record))))
        .collect()
}

/// How many certified items an attack inside their radius broke, beside what the failure probability allows.
fn cross_check_of(records: &[CertifyRecord]) -> Value {
    let checked: Vec<CrossCheck> = records
        .iter()
        .filter_map(|record| serde_json::from_value(record.more.get("cross_check")?.clone()).ok())
        .collect();
    if checked.is_empty() {
        return Value::Null;
    }
    let count = |is: fn(&CrossCheck) -> bool| checked.iter().filter(|item| is(item)).count();
    let mean =
        |which: usize| checked.iter().map(|item| item.losses[which]).sum::<f64>() / checked.len() as f64;
    json!({
        "n": checked.len(),
        "broken": count(|item| item.broken),
        "broken_expected_at_most": records[0].alpha * checked.len() as f64,
        "base_model_right_when_clean": count(|item| item.clean_correct),
        "base_model_right_when_attacked": count(|item| item.attacked_correct),
        "mean_loss": [mean(0), mean(1)],
    })
}

/// What these radii say about an L-inf budget.
fn conversion(records: &[CertifyRecord]) -> String {
    let values = records[0].more.get("values").and_then(Value::as_f64).unwrap_or(f64::NAN);
    let largest = records.iter().map(|record| record.radius).fold(0.0, f64::max);
    format!(
        "an L2 certificate says nothing about an L-inf budget: with {values} values an L-inf ball of 8/255 reaches {:.2} in L2, and the largest radius here, {largest:.3}, holds an L-inf ball of {:.3}/255; radius_original is for the resize without rounding to eight bits",
        8.0 / 255.0 * values.sqrt(),
        255.0 * largest / values.sqrt()
    )
}

fn read_record(value: &Value) -> Result<CertifyRecord> {
    serde_json::from_value(value.clone()).map_err(|error| {
        Error::data(format!("record `{}` is none of `certify`: {error}", value["id"].as_str().unwrap_or("?")))
    })
}
