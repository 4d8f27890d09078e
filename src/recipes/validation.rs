//! What a model in training answers to questions that it does not learn from, clean and under attack, with the
//! image-blind controls beside it.
//!
//! Each examination is an ordinary run of `attack` (of `eval` without an attack) in `validation/step-N/` of the training
//! run: the same records, scored from 8-bit files, and the same reports. One line of each goes to `validation.jsonl`. The
//! random starts are named by the question alone, so that the lines of one run can be compared.

use super::attack;
use super::config::{AttackConfig, Command, MetricName, RunConfig, Scoring, ValidationConfig};
use super::eval::{self, EvalSettings};
use super::failure::Noted;
use super::grpo::{Judge, Said};
use super::inputs;
use super::items::{self, Images};
use super::lesson::Lesson;
use super::progress::Progress;
use super::run::{Opening, Run};
use crate::data::{Dataset, Sample};
use crate::error::{Error, Result};
use crate::model::assistant::Assistant;
use serde_json::{Value, json};
use std::collections::HashMap;
use std::fs;

/// The configuration of the runs in `validation/`.
pub fn own_config(config: &RunConfig) -> RunConfig {
    let settings = &config.train.validation;
    let mut own = config.clone();
    // The model is the one in training.
    (own.model, own.revision, own.adapter) = (None, None, None);
    own.data.split.clone_from(&settings.split);
    if settings.data.is_some() {
        // What was all of the training data says nothing about where the images of another set lie.
        if config.data.data.is_none() {
            own.data.omnimedvqa = None;
        }
        own.data.data.clone_from(&settings.data);
    }
    (own.data.train_split, own.data.limit, own.data.shard) = (None, None, None);
    let ValidationConfig { norm, epsilon, objective, .. } = *settings;
    own.attack = AttackConfig {
        norm,
        epsilon,
        num_steps: settings.num_steps.max(1),
        objective,
        verdict_items: 0,
        ..AttackConfig::default()
    };
    own
}

/// Examines a model in training.
#[derive(Debug)]
pub struct Exam<'a> {
    settings: &'a ValidationConfig,
    /// Of the runs in `validation/`.
    config: &'a RunConfig,
    dataset: &'a Dataset,
    /// What the option prior counts.
    trained: &'a Dataset,
    lesson: &'a Lesson<'a>,
    /// What completions are worth, where they are sampled and rewarded.
    judge: Option<&'a Judge>,
    /// For a vision tower that does not train: keeps what it said about clean images.
    setting: Option<attack::Setting<'a>>,
}

impl<'a> Exam<'a> {
    /// An exam on `dataset`; `own` is [`own_config`] of the lesson's configuration.
    ///
    /// # Errors
    /// When there is no such prompt.
    pub fn new(
        lesson: &'a Lesson<'a>,
        own: &'a RunConfig,
        dataset: &'a Dataset,
        trained: &'a Dataset,
        judge: &'a Judge,
    ) -> Result<Self> {
        // With likelihoods the completion of a record is an option's own text, which nobody has said.
        let is_rewarded = lesson.config.recipe.is_grpo() && own.scoring == Scoring::Generate;
        Ok(Self {
            settings: &lesson.config.validation,
            config: own,
            dataset,
            trained,
            lesson,
            judge: is_rewarded.then_some(judge),
            setting: lesson.features.is_some().then(|| attack::Setting::of(own)).transpose()?,
        })
    }

    /// Whether the model is examined after `step` of `num_steps` steps: before the first, after every so many, after the last.
    pub fn is_due(&self, step: u64, num_steps: u64) -> bool {
        step == num_steps || step.is_multiple_of(self.settings.every as u64)
    }

    /// The number by which models are compared.
    pub fn metric(&self) -> MetricName {
        self.settings.metric()
    }

    /// Examines a model that has learnt for `step` steps in `validation/step-N/` of `run`, going on where an earlier process
    /// stopped; gives the line of `validation.jsonl`.
    ///
    /// # Errors
    /// Those of an attack; [`Error::Stopped`] between batches; when the metric is a reward and none was given.
    pub fn sit(&self, assistant: &Assistant, step: u64, run: &Run, progress: &dyn Progress) -> Result<Value> {
        let is_attacked = self.settings.num_steps > 0;
        let command = if is_attacked { Command::Attack } else { Command::Eval };
        let dir = run.path(format!("validation/step-{step}"));
        let config = RunConfig { out: Some(dir), ..self.config.clone() };
        let opening = Opening { resume: true, stop: run.stop().clone(), ..Opening::default() };
        let mut own = Run::open(command, &config, opening)?;
        own.provenance("trained_steps", json!(step))?;
        inputs::note_denoiser(&mut own, &config)?;
        // The last step of training is none of what may fail here.
        self.lesson.evidence.note(|noted| {
            let epsilon = is_attacked.then_some(self.settings.epsilon);
            *noted = Noted { phase: "validation", epsilon, ..Noted::default() };
        });
        let summary = self.examine(assistant, &mut own, progress);
        if matches!(summary, Err(Error::NonFinite(_))) {
            // What comes of this adds to the error; the error is what matters.
            let _ = self.note_pending(assistant, &own);
        }
        let summary = summary?;
        let records = own.records()?;
        let mut line = json!({"step": step, "clean": {"n": records.len()}});
        let completions: &[(&str, &str)] = if is_attacked {
            line["clean"]["accuracy"] = summary["clean_accuracy"].clone();
            line["pgd"] = json!({
                "n": records.len(),
                "accuracy": summary["robust_accuracy"],
                "epsilon": self.settings.epsilon,
                "num_steps": self.settings.num_steps,
            });
            &[("clean", "clean_completion"), ("pgd", "adversarial_completion")]
        } else {
            line["clean"]["accuracy"] = summary["accuracy"].clone();
            &[("clean", "completion")]
        };
        for &(part, key) in completions {
            let Some(judge) = self.judge else { break };
            if let Some(reward) = self.mean_reward(judge, assistant, step, &records, key)? {
                line[part]["reward"] = json!(reward);
            }
        }
        let metric = self.metric();
        let is_reward = matches!(metric, MetricName::Reward | MetricName::RobustReward);
        if is_reward && value_of(&line, metric).is_none() {
            return Err(Error::data(format!(
                "no completion of the validation after step {step} was given a reward: there is no `{metric}`\n   = help: the reward command must reward some of them, or give `train.validation.metric` another name"
            )));
        }
        line["controls"] = summary["controls"].clone();
        Ok(line)
    }

    /// Asks the questions that have no record yet; gives the summary of all.
    fn examine(&self, assistant: &Assistant, own: &mut Run, progress: &dyn Progress) -> Result<Value> {
        let (questions, trained) = (self.dataset, Some(self.trained));
        if self.settings.num_steps == 0 {
            let settings = EvalSettings::of(self.config)?;
            return eval::evaluate(assistant, questions, trained, &settings, own, progress);
        }
        // Another tower says other things about the same images.
        let fresh = if self.setting.is_none() { Some(attack::Setting::of(self.config)?) } else { None };
        let setting =
            self.setting.as_ref().or(fresh.as_ref()).ok_or_else(|| anyhow::anyhow!("no setting"))?;
        attack::under_attack(assistant, questions, trained, setting, own, progress)
    }

    /// Notes for the report of a failure the questions that it came to, as they are asked of clean images: the first ones without
    /// a record, as many as are asked at a time.
    fn note_pending(&self, assistant: &Assistant, own: &Run) -> Result<()> {
        let (template, is_cot) = (self.lesson.template, self.lesson.is_cot());
        let samples: Vec<&Sample> = inputs::in_item_order(&self.dataset.samples)
            .into_iter()
            .filter(|sample| !own.done_ids().contains(&sample.id))
            .take(if self.settings.num_steps > 0 {
                attack::attacked_at_once(self.config).0
            } else {
                self.config.batch_size
            })
            .collect();
        let images = Images::new(self.dataset).of_samples(assistant, samples.clone())?;
        let asked = samples.iter().zip(&images);
        let prompts = asked
            .map(|(sample, image)| items::prompt_of(assistant, template, sample, image))
            .collect::<Result<Vec<_>>>()?;
        let targets = samples
            .iter()
            .map(|sample| assistant.target(&template.target(sample, is_cot)))
            .collect::<Result<Vec<_>>>()?;
        self.lesson.evidence.note(|noted| {
            noted.samples = samples.into_iter().cloned().collect();
            (noted.prompts, noted.targets, noted.images) = (prompts, targets, images);
        });
        Ok(())
    }

    /// What the completions under `key` of the records are worth on average, as in training. Records hold no tokens: a completion
    /// is as long as its text in tokens, with one that ended it unless it fills all that is allowed.
    fn mean_reward(
        &self,
        judge: &Judge,
        assistant: &Assistant,
        step: u64,
        records: &[Value],
        key: &str,
    ) -> Result<Option<f64>> {
        let samples: HashMap<&str, &Sample> =
            self.dataset.samples.iter().map(|sample| (sample.id.as_str(), sample)).collect();
        let said = |record: &'_ Value| -> Option<(&Sample, String)> {
            Some((*samples.get(record["id"].as_str()?)?, record[key].as_str()?.to_owned()))
        };
        let mut texts = Vec::with_capacity(records.len());
        for record in records {
            let (sample, text) = said(record)
                .ok_or_else(|| Error::data(format!("the record of {} has no `{key}`", record["id"])))?;
            let length = assistant.tokenizer.encode(&text)?.len();
            texts.push((sample, text, length));
        }
        let most = self.config.max_new_tokens;
        let all: Vec<Said<'_>> = texts
            .iter()
            .map(|(sample, text, length)| {
                let is_finished = *length < most;
                let num_tokens = length.min(&most) + usize::from(is_finished);
                Said { sample, text, num_tokens, is_finished }
            })
            .collect();
        judge.mean_reward(self.lesson, step, &all)
    }
}

/// The value of `metric` in a line of `validation.jsonl`.
pub fn value_of(line: &Value, metric: MetricName) -> Option<f64> {
    let (part, key) = match metric {
        MetricName::Accuracy => ("clean", "accuracy"),
        MetricName::Reward => ("clean", "reward"),
        MetricName::RobustAccuracy => ("pgd", "accuracy"),
        MetricName::RobustReward => ("pgd", "reward"),
    };
    line[part][key].as_f64()
}

/// The best examination.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct Best {
    /// Steps of training before it, at least 1.
    pub step: u64,
    /// The metric's value.
    pub value: f64,
}

/// The best of the lines by `metric`; of equal ones the first. The model before training is no candidate.
pub fn best(lines: &[Value], metric: MetricName) -> Option<Best> {
    let trained = lines.iter().filter_map(|line| {
        let step = line["step"].as_u64().filter(|step| *step > 0)?;
        Some(Best { step, value: value_of(line, metric)? })
    });
    trained.reduce(|best, next| if next.value > best.value { next } else { best })
}

/// One line of `validation.jsonl` in words.
pub fn describe(line: &Value) -> String {
    let number = |value: &Value| value.as_f64().map_or_else(|| "-".to_owned(), |value| format!("{value:.4}"));
    let mut parts = vec![format!("accuracy {}", number(&line["clean"]["accuracy"]))];
    if line["pgd"].is_object() {
        parts.push(format!("under PGD {}", number(&line["pgd"]["accuracy"])));
    }
    if line["clean"]["reward"].is_number() {
        parts.push(format!("reward {}", number(&line["clean"]["reward"])));
    }
    let controls = &line["controls"];
    format!(
        "step {}: validation {} (n {}; blank image {}, option prior {})",
        line["step"],
        parts.join(", "),
        line["clean"]["n"],
        number(&controls["blank_image"]),
        number(&controls["option_prior"])
    )
}

/// Removes the attacked images of earlier examinations, but for those of the best: their records stay.
///
/// # Errors
/// When they cannot be removed.
pub fn remove_old_images(run: &Run, lines: &[Value], best: Option<Best>) -> Result<()> {
    let Some((_, earlier)) = lines.split_last() else { return Ok(()) };
    let steps = earlier.iter().filter_map(|line| line["step"].as_u64());
    for step in steps.filter(|step| best.is_none_or(|best| best.step != *step)) {
        let dir = run.path(format!("validation/step-{step}/adversarial"));
        match fs::remove_dir_all(&dir) {
            Err(error) if error.kind() != std::io::ErrorKind::NotFound => {
                return Err(Error::io("cannot remove", &dir, error));
            }
            _ => {}
        }
    }
    Ok(())
}

/// Removes examinations of steps after `step`: a resumed run makes them again.
///
/// # Errors
/// When they cannot be removed.
pub fn forget_after(run: &Run, step: u64) -> Result<()> {
    let Ok(entries) = fs::read_dir(run.path("validation")) else { return Ok(()) };
    for entry in entries.flatten() {
        let at: Option<u64> =
            entry.file_name().to_str().and_then(|name| name.strip_prefix("step-")?.parse().ok());
        if at.is_some_and(|at| at > step) {
            let dir = entry.path();
            fs::remove_dir_all(&dir).map_err(|error| Error::io("cannot remove", &dir, error))?;
        }
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_best_is_the_first_of_the_highest_after_training_began() {
        let line = |step: u64, clean: f64, pgd: f64| json!({"step": step, "clean": {"accuracy": clean, "reward": -clean}, "pgd": {"accuracy": pgd}});
        let lines = [line(0, 0.99, 0.9), line(10, 0.7, 0.4), line(20, 0.9, 0.6), line(30, 0.8, 0.6)];
        assert_eq!(best(&lines, MetricName::RobustAccuracy), Some(Best { step: 20, value: 0.6 }));
        assert_eq!(best(&lines, MetricName::Accuracy), Some(Best { step: 20, value: 0.9 }));
        assert_eq!(best(&lines, MetricName::Reward), Some(Best { step: 10, value: -0.7 }));
        assert_eq!(best(&lines, MetricName::RobustReward), None);
        assert_eq!(best(&lines[..1], MetricName::Accuracy), None);
    }

    #[test]
    fn a_data_set_of_its_own_has_images_of_its_own() {
        let path = |name: &str| Some(std::path::PathBuf::from(name));
        for (data, own_data, expected) in [
            // The root of the training data's images is no other set's.
            (None, Some("b"), (None, Some("b"))),
            // It was named for the images of a file.
            (Some("a"), Some("b"), (Some("root"), Some("b"))),
            (None, None, (Some("root"), None)),
            (Some("a"), None, (Some("root"), Some("a"))),
        ] {
            let mut config = RunConfig::default();
            config.data.omnimedvqa = path("root");
            config.data.data = data.and_then(path);
            config.train.validation.data = own_data.and_then(path);
            let own = own_config(&config).data;
            assert_eq!((own.omnimedvqa, own.data), (expected.0.and_then(path), expected.1.and_then(path)));
        }
    }
}
