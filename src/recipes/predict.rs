//! `safemed predict`: one answer to one question; with `sigma` smoothed, and then it may abstain.

use super::answers::Asking;
use super::certify::smoothing_of;
use super::config::{CertifyMode, RunConfig};
use super::inputs;
use super::job::{Job, Outcome};
use super::records::{counts_by_letter, letter};
use crate::certify::{self, Draws, Prediction, SmoothingConfig};
use crate::data::sample::UNKNOWN;
use crate::data::{MOST_OPTIONS, Sample};
use crate::error::{Error, Result};
use crate::model::assistant::Assistant;
use crate::pixels::RgbImage8;
use crate::pixels::decode::{self, Decoded};
use crate::rng;
use crate::roles::classifier::QuestionClassifier;
use serde_json::{Value, json};
use std::fmt::Write as _;
use std::path::Path;

/// Answers `question` about the image, choosing among `options`.
///
/// # Errors
/// A usage error for fewer than two options or more than [`MOST_OPTIONS`]; a data error for a damaged image.
pub fn predict(job: &Job<'_>, image: &Path, question: &str, options: &[String]) -> Result<Outcome> {
    let config = &job.config;
    let sample = sample(image, question, options)?;
    inputs::check_settings(config)?;
    inputs::note_idle_settings(job);
    let smoothing = config.certify.sigma.map(|_| smoothing(config)).transpose()?;
    let Decoded { image: picture, reading } = decode::read_file(image, config.data.gray())?;
    let assistant = inputs::open_model(job)?.assistant;
    let asking = Asking::of(config)?;
    let mut outcome = match smoothing {
        Some(smoothing) => smoothed(&assistant, &asking, &sample, &picture, &smoothing)?,
        None => plain(&assistant, &asking, &sample, &picture)?,
    };
    outcome.summary["image_reading"] = json!(reading);
    Ok(outcome)
}

fn sample(image: &Path, question: &str, options: &[String]) -> Result<Sample> {
    if !(2..=MOST_OPTIONS).contains(&options.len()) || options.iter().any(|option| option.trim().is_empty()) {
        return Err(Error::usage(format!(
            "{} option(s): a question has 2 to {MOST_OPTIONS}, none of them blank\n   = help: give each with `--option TEXT`, in order",
            options.len()
        )));
    }
    if let Some(twice) =
        options.iter().enumerate().find_map(|(i, option)| options[..i].contains(option).then_some(option))
    {
        return Err(Error::usage(format!(
            "the option `{twice}` is given twice: an answer could not tell them apart"
        )));
    }
    if question.trim().is_empty() {
        return Err(Error::usage("the question is blank\n   = help: give it with `--question TEXT`"));
    }
    Ok(Sample {
        id: image.display().to_string(),
        dataset: UNKNOWN.to_owned(),
        modality: UNKNOWN.to_owned(),
        modality_raw: UNKNOWN.to_owned(),
        question_type: UNKNOWN.to_owned(),
        question: question.to_owned(),
        options: options.to_vec(),
        // Nobody knows it; nothing that is asked depends on it.
        answer: 0,
        image: image.to_path_buf(),
        reasoning: None,
    })
}

/// The summary's fields that both ways of answering share.
fn summary(sample: &Sample, prediction: Option<usize>) -> Value {
    json!({
        "command": "predict",
        "image": sample.id,
        "question": sample.question,
        "options": sample.options,
        "prediction": letter(prediction),
        "text": prediction.map(|option| &sample.options[option]),
    })
}

fn plain(assistant: &Assistant, asking: &Asking, sample: &Sample, picture: &RgbImage8) -> Result<Outcome> {
    let image = assistant.process(picture)?.into();
    let answers = asking.about_images(assistant, &[sample], &[image])?;
    let answer = answers.into_iter().next().ok_or_else(|| anyhow::anyhow!("the model gave no answer"))?;
    let mut summary = summary(sample, answer.prediction);
    summary["completion"] = json!(answer.completion);
    summary["probabilities"] = json!(answer.probabilities);
    let mut text = match answer.prediction {
        Some(option) => format!("{}) {}\n", letter(Some(option)), sample.options[option]),
        None => "none: the answer cannot be read\n".to_owned(),
    };
    let _ = writeln!(text, "\ncompletion: {}", answer.completion);
    for (option, probability) in answer.probabilities.iter().flatten().enumerate() {
        let _ = writeln!(text, "{}  {probability:.4}  {}", letter(Some(option)), sample.options[option]);
    }
    Ok(Outcome::new(summary, text))
}

fn smoothing(config: &RunConfig) -> Result<SmoothingConfig> {
    if config.certify.mode == CertifyMode::Sequential {
        return Err(Error::usage(
            "the test of a smoothed prediction is for a fixed `n`\n   = help: leave mode `sequential` to `safemed certify`",
        ));
    }
    smoothing_of(config)
}

/// The smoothed classifier's answer (PREDICT of Cohen et al. 2019) with its radius (CERTIFY, on the same draws): noise on
/// the pixels that the network takes. Each of the two claims fails with probability `alpha` at most. The radius is 0 when
/// the answer abstains, or is not the class that the selection draws chose.
fn smoothed(
    assistant: &Assistant,
    asking: &Asking,
    sample: &Sample,
    picture: &RgbImage8,
    smoothing: &SmoothingConfig,
) -> Result<Outcome> {
    let image = assistant.process(picture)?;
    let prompt = assistant.prompt(&asking.template.user_text(sample), Some(image.grid))?;
    let key = rng::key_of(&picture.sha256());
    let reading = asking.reading(assistant, sample, key)?;
    let num_options = sample.options.len();
    let classifier = QuestionClassifier { assistant, prompt: &prompt, num_options, reading };
    let pixels = image.resized.to_tensor(assistant.vlm.device())?;
    let mut keep = |_: &[u8]| Ok(());
    let mut draws = Draws::new(&classifier, &pixels, key, smoothing, Vec::new(), &mut keep)?;
    let certificate = certify::certify(&mut draws, smoothing)?;
    let is_certified = |class: &usize| certificate.prediction == Some(*class);
    let found = Prediction::from_counts(certificate.counts.clone(), smoothing.alpha)?;
    let radius = found.prediction.filter(is_certified).map_or(0.0, |_| certificate.radius);
    // The last class is that of answers that cannot be read.
    let option = found.prediction.filter(|class| *class < num_options);
    let mut summary = summary(sample, option);
    if found.prediction.is_none() {
        summary["prediction"] = Value::Null;
    }
    let counts = counts_by_letter(&found.counts);
    summary["abstained"] = json!(found.prediction.is_none());
    summary["radius"] = json!(radius);
    summary["p_value"] = json!(found.p_value);
    summary["p_lower"] = json!(certificate.p_lower);
    summary["sigma"] = json!(smoothing.sigma);
    summary["n0"] = json!(smoothing.n0);
    summary["n"] = json!(smoothing.n);
    summary["alpha"] = json!(smoothing.alpha);
    summary["seed"] = json!(smoothing.seed);
    summary["counts_selection"] = json!(counts_by_letter(&certificate.counts_selection));
    summary["counts"] = json!(counts);
    let mut text = match (found.prediction, option) {
        (_, Some(option)) => format!("{}) {}\n", letter(Some(option)), sample.options[option]),
        (Some(_), None) => "none: the answer cannot be read under noise\n".to_owned(),
        (None, _) => "abstains: no answer leads clearly under noise\n".to_owned(),
    };
    let votes: Vec<String> = counts.iter().map(|(letter, count)| format!("{letter} {count}")).collect();
    let _ = writeln!(
        text,
        "\nradius {radius:.4} (L2, pixels in [0, 1]), p-value {:.3e}\nsmoothed with sigma {}, {} draws, alpha {}: {}",
        found.p_value,
        smoothing.sigma,
        smoothing.n,
        smoothing.alpha,
        votes.join(", ")
    );
    Ok(Outcome::new(summary, text))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_question_needs_options_with_text_no_more_than_there_are_letters() {
        let ask = |options: &[&str]| {
            let options: Vec<String> = options.iter().map(|text| (*text).to_owned()).collect();
            sample(Path::new("i.png"), "Which?", &options)
        };
        for options in [&["CT"][..], &[], &["CT", " "], &["CT", "MRI", "CT"]] {
            assert!(matches!(ask(options), Err(Error::Usage(_))), "{options:?}");
        }
        let many: Vec<String> = (0..=MOST_OPTIONS).map(|number| number.to_string()).collect();
        let many: Vec<&str> = many.iter().map(String::as_str).collect();
        assert!(matches!(ask(&many), Err(Error::Usage(_))));
        assert_eq!(ask(&many[1..]).unwrap().options.len(), MOST_OPTIONS);
        assert_eq!(ask(&["CT", "MRI"]).unwrap().options, ["CT", "MRI"]);
        assert!(sample(Path::new("i.png"), " ", &["a".into(), "b".into()]).is_err());
    }
}
