//! Accuracy under attack, scored from files.
//!
//! Each item that is right when clean is attacked by one objective after another until its answer is wrong. What
//! counts is the 8-bit image: the attacked pixels are rounded inside the ball, written as PNG, read back, shown to the
//! model through its own processor, and answered by free generation with the parser of clean evaluation.

use super::aims::{self, Asked};
use super::answers::with_items;
use super::config::{AttackConfig, Command, Method, ObjectiveName, RunConfig, Space};
use super::inputs;
use super::items::{self, Images};
use super::job::{Job, Outcome};
use super::lesson::{norm_of, objectives_of};
use super::progress::Progress;
use super::records::{self, AttackRecord};
use super::report::{self, ReportOptions};
use super::run::Run;
use crate::attack::{Fraction, PgdOutput, Problem, lattice, pgd};
use crate::data::prompt::PromptTemplate;
use crate::data::{Dataset, Sample};
use crate::error::{Error, Result};
use crate::eval::accuracy;
use crate::model::assistant::Assistant;
use crate::model::generate::Completion;
use crate::model::processor::ProcessedImage;
use crate::nn::recompute::Memory;
use crate::pixels::{RgbImage8, decode};
use crate::reward::answer::parse_answer;
use crate::rng;
use crate::roles::policy;
use crate::roles::target::Target;
use serde_json::{Map, Value, json};
use std::fmt::Write as _;
use std::sync::Arc;

/// Steps between two looks at whether an item is broken already.
const CHECK_EVERY: usize = 10;

/// How a model is attacked and asked.
#[derive(Debug, Clone)]
pub struct Setting<'a> {
    /// Budget and search.
    pub attack: &'a AttackConfig,
    /// How questions are asked.
    pub template: PromptTemplate,
    /// Longest completion.
    pub max_new_tokens: usize,
    /// Items in one forward pass.
    pub batch_size: usize,
    /// Seed of random starts.
    pub seed: u64,
}

/// `safemed attack`.
///
/// # Errors
/// Whatever is wrong with settings, data or weights, before the first item.
pub fn attack(job: &Job<'_>) -> Result<Outcome> {
    let config = &job.config;
    refuse_what_is_missing(&config.attack)?;
    inputs::check_job(job)?;
    inputs::require_greedy(&job.config, "attacked answers are those of a fixed function")?;
    let setting = setting_of(config)?;
    let (dataset, _) = inputs::open_questions(config)?;
    items::require_some(&dataset, "attack")?;
    let model = inputs::open_model(job)?;
    let mut run = job.open_run()?;
    inputs::note_model(&mut run, &model)?;
    let summary = under_attack(&model.assistant, &dataset, &setting, &mut run, job.progress)?;
    let options = ReportOptions { images: config.images, ..ReportOptions::default() };
    report::report(&[run.dir().to_path_buf()], &options, job.progress)?;
    Ok(Outcome::new(summary.clone(), render(&summary)))
}

/// The summary in a few lines.
fn render(summary: &Value) -> String {
    let number = |key: &str| summary[key].as_f64().unwrap_or(f64::NAN);
    let mut text = format!(
        "clean accuracy   {:.4}\nrobust accuracy  {:.4}  n {}\nunparsable       {:.4}\nverdict          {}\n",
        number("clean_accuracy"),
        number("robust_accuracy"),
        summary["n"],
        number("unparsable"),
        summary["verdict"].as_str().unwrap_or_default(),
    );
    for reason in summary["verdict_reasons"].as_array().into_iter().flatten().filter_map(Value::as_str) {
        let _ = writeln!(text, "  {reason}");
    }
    text
}

/// The setting that a configuration describes.
///
/// # Errors
/// When the prompt has an unknown name.
pub fn setting_of(config: &RunConfig) -> Result<Setting<'_>> {
    Ok(Setting {
        attack: &config.attack,
        template: config.prompt.parse()?,
        max_new_tokens: config.max_new_tokens,
        batch_size: config.batch_size,
        seed: config.seed,
    })
}

fn refuse_what_is_missing(config: &AttackConfig) -> Result<()> {
    match config.method {
        Method::Noise | Method::Fgsm | Method::Pgd => Ok(()),
        other => Err(Error::usage(format!(
            "the attack `{}` is not there yet\n   = help: there are noise, fgsm and pgd",
            other.word()
        ))),
    }
}

/// Attacks every question of `dataset`; leaves records, pictures and the summary in the run directory.
///
/// # Errors
/// When an image, a loss or a gradient cannot be had.
pub fn under_attack(
    assistant: &Assistant,
    dataset: &Dataset,
    setting: &Setting<'_>,
    run: &mut Run,
    progress: &dyn Progress,
) -> Result<Value> {
    inputs::note_questions(run, dataset, None, setting.template)?;
    let images = Images::new(dataset);
    let samples = inputs::in_item_order(&dataset.samples);
    let todo: Vec<&Sample> =
        samples.iter().copied().filter(|sample| !run.done_ids().contains(&sample.id)).collect();
    progress.start(samples.len(), "attack");
    let (mut done, mut clean, mut robust) = (0, 0, 0);
    for record in run.records()? {
        done += 1;
        clean += usize::from(record["clean_correct"] == json!(true));
        robust += usize::from(record["robust_correct"] == json!(true));
    }
    for batch in todo.chunks(setting.batch_size) {
        run.check_stop()?;
        let records = attack_batch(assistant, &images, batch, setting, run);
        for record in records.map_err(|error| with_items(error, batch))? {
            done += 1;
            clean += usize::from(record.clean_correct);
            robust += usize::from(record.robust_correct);
            run.record(&record)?;
        }
        let share = |count: usize| count as f64 / done.max(1) as f64;
        progress.tick(done, &[("clean", share(clean)), ("robust", share(robust))]);
    }
    progress.finish();
    let order: Vec<String> = samples.iter().map(|sample| sample.id.clone()).collect();
    let records = run.finish_records(&order)?;
    let summary = summarize(&records, run.seconds())?;
    run.summary(&summary)?;
    Ok(summary)
}

/// One item on its way through the attack.
struct Item<'a> {
    sample: &'a Sample,
    /// The attacked pixels' 8-bit original: the file, or its resized version for `space = model`.
    clean: RgbImage8,
    /// How its numbers became eight bits.
    reading: String,
    processed: Arc<ProcessedImage>,
    own: Completion,
    clean_prediction: Option<usize>,
    adversarial: Option<RgbImage8>,
    prediction: Option<usize>,
    completion: String,
    loss_clean: Option<f64>,
    loss_adversarial: Option<f64>,
    objective: ObjectiveName,
}

impl Item<'_> {
    fn is_right(&self) -> bool {
        self.prediction == Some(self.sample.answer)
    }
}

fn attack_batch(
    assistant: &Assistant,
    images: &Images,
    samples: &[&Sample],
    setting: &Setting<'_>,
    run: &Run,
) -> Result<Vec<AttackRecord>> {
    let mut batch = Vec::with_capacity(samples.len());
    for &sample in samples {
        let original = images.original(&sample.image)?;
        let processed = Arc::new(assistant.process(&original)?);
        let clean = match setting.attack.space {
            Space::Original => original,
            Space::Model => processed.resized.clone(),
        };
        batch.push(Item {
            sample,
            clean,
            reading: images.reading(&sample.image),
            processed,
            own: Completion::default(),
            clean_prediction: None,
            adversarial: None,
            prediction: None,
            completion: String::new(),
            loss_clean: None,
            loss_adversarial: None,
            objective: setting.attack.objective,
        });
    }
    let processed: Vec<Arc<ProcessedImage>> = batch.iter().map(|item| item.processed.clone()).collect();
    let answers = ask(assistant, samples, &processed, setting)?;
    for (item, (completion, text)) in batch.iter_mut().zip(answers) {
        item.clean_prediction = parse_answer(&text, item.sample.options.len());
        item.prediction = item.clean_prediction;
        item.completion.clone_from(&text);
        item.own = completion;
    }
    for objective in objectives_of(setting.attack.objective) {
        let alive: Vec<usize> = (0..batch.len()).filter(|&i| batch[i].is_right()).collect();
        attack_survivors(assistant, &mut batch, &alive, objective, setting)?;
    }
    batch.iter().map(|item| finish(assistant, item, setting, run)).collect()
}

/// The model's own greedy answers.
fn ask(
    assistant: &Assistant,
    samples: &[&Sample],
    images: &[Arc<ProcessedImage>],
    setting: &Setting<'_>,
) -> Result<Vec<(Completion, String)>> {
    let prompts = samples
        .iter()
        .zip(images)
        .map(|(sample, image)| items::prompt_of(assistant, setting.template, sample, image))
        .collect::<Result<Vec<_>>>()?;
    let pixels = items::stack(assistant, images)?;
    let completions = policy::greedy_answers(assistant, &prompts, &pixels, setting.max_new_tokens)?;
    completions
        .into_iter()
        .map(|completion| {
            let text = assistant.text_of(&completion)?;
            Ok((completion, text))
        })
        .collect()
}

/// Attacks items that still answer rightly; together where their images have one size.
fn attack_survivors(
    assistant: &Assistant,
    batch: &mut [Item<'_>],
    alive: &[usize],
    objective: ObjectiveName,
    setting: &Setting<'_>,
) -> Result<()> {
    let size = |item: &Item<'_>| (item.clean.height, item.clean.width);
    let mut rest = alive.to_vec();
    while let Some(&first) = rest.first() {
        let wanted = size(&batch[first]);
        let (same, others): (Vec<usize>, Vec<usize>) =
            rest.into_iter().partition(|&i| size(&batch[i]) == wanted);
        rest = others;
        let adversarial = search(assistant, batch, &same, objective, setting)?;
        let mut processed = Vec::with_capacity(same.len());
        for (&i, image) in same.iter().zip(&adversarial) {
            batch[i].objective = objective;
            processed.push(Arc::new(assistant.process(image)?));
        }
        let samples: Vec<&Sample> = same.iter().map(|&i| batch[i].sample).collect();
        let answers = ask(assistant, &samples, &processed, setting)?;
        for ((&i, image), (_, text)) in same.iter().zip(adversarial).zip(answers) {
            let item = &mut batch[i];
            item.prediction = parse_answer(&text, item.sample.options.len());
            item.completion = text;
            item.adversarial = Some(image);
        }
    }
    Ok(())
}

/// The attacked images of items of one size, rounded inside the ball.
fn search(
    assistant: &Assistant,
    batch: &mut [Item<'_>],
    items: &[usize],
    objective: ObjectiveName,
    setting: &Setting<'_>,
) -> Result<Vec<RgbImage8>> {
    let mut aims = Vec::with_capacity(items.len());
    for &i in items {
        let item = &batch[i];
        let asked = Asked {
            template: setting.template,
            is_cot: setting.template.asks_for_reasoning(),
            objective,
            own: Some(&item.own),
        };
        let prompt = items::prompt_of(assistant, setting.template, item.sample, &item.processed)?;
        let model_size = [item.processed.resized.height, item.processed.resized.width];
        aims.push(aims::aim(assistant, item.sample, asked, prompt, model_size)?);
    }
    let target = Target {
        assistant,
        aims,
        max_new_tokens: setting.max_new_tokens,
        parse: &parse_answer,
        memory: Memory::Keep,
    };
    let clean = items
        .iter()
        .map(|&i| batch[i].clean.to_tensor(assistant.vlm.device()))
        .collect::<Result<Vec<_>>>()?;
    let clean = candle_core::Tensor::stack(&clean, 0)?;
    let keys: Vec<u64> =
        items.iter().map(|&i| rng::key_of(&format!("{}/{}", objective.word(), batch[i].sample.id))).collect();
    let indices: Vec<usize> = (0..items.len()).collect();
    let problem = Problem { clean: &clean, items: &indices, keys: &keys, start: None, judge_8bit: true };
    let found = pgd(&target, &problem, &pgd_config(setting), &mut |_| Ok(()))?;
    for (place, &i) in items.iter().enumerate() {
        batch[i].loss_clean = Some(f64::from(found.loss_clean[place]));
        batch[i].loss_adversarial = Some(f64::from(found.loss[place]));
    }
    let norm = norm_of(setting.attack.norm);
    items
        .iter()
        .enumerate()
        .map(|(place, &i)| {
            let pixels: Vec<f32> = found.pixels.get(place)?.flatten_all()?.to_vec1()?;
            let clean = &batch[i].clean;
            // Tensors are planar, files interleaved.
            let adversarial = interleave(&pixels, clean.data.len() / 3);
            let rounded =
                lattice::to_8bit_within_ball(&adversarial, &clean.data, norm, setting.attack.epsilon);
            RgbImage8::new(clean.width, clean.height, rounded)
        })
        .collect()
}

/// From three planes to pixels of three channels.
fn interleave(planes: &[f32], count: usize) -> Vec<f32> {
    (0..count).flat_map(|i| [planes[i], planes[count + i], planes[2 * count + i]]).collect()
}

fn pgd_config(setting: &Setting<'_>) -> crate::attack::AttackConfig {
    let attack = setting.attack;
    crate::attack::AttackConfig {
        method: match attack.method {
            Method::Noise => crate::attack::Method::Noise,
            Method::Fgsm => crate::attack::Method::Fgsm,
            _ => crate::attack::Method::Pgd,
        },
        norm: norm_of(attack.norm),
        epsilon: Fraction(attack.epsilon),
        step_size: attack.step_size.map(Fraction),
        num_steps: attack.num_steps,
        num_restarts: attack.num_restarts,
        random_start: attack.random_start,
        early_stop: attack.early_stop,
        check_every: CHECK_EVERY,
        output: PgdOutput::Best,
        seed: setting.seed,
    }
}

/// Writes the attacked image, reads it back and records what the model says to the file.
fn finish(assistant: &Assistant, item: &Item<'_>, setting: &Setting<'_>, run: &Run) -> Result<AttackRecord> {
    let attack = setting.attack;
    let sample = item.sample;
    let mut prediction = item.prediction;
    let mut completion = item.completion.clone();
    let (mut linf, mut l2, mut path) = (0.0, 0.0, None);
    if let Some(adversarial) = &item.adversarial {
        let relative = format!("adversarial/{}.png", file_name(&sample.id));
        run.write(&relative, &decode::encode_png(adversarial)?)?;
        let seen = decode::decode_file(&run.path(&relative))?;
        let processed = Arc::new(assistant.process(&seen)?);
        let answer = ask(assistant, &[sample], &[processed], setting)?.remove(0);
        prediction = parse_answer(&answer.1, sample.options.len());
        completion = answer.1;
        let distances = lattice::Distances::between(&seen.data, &item.clean.data);
        (linf, l2) = (distances.linf, distances.l2);
        path = Some(relative);
    }
    let clean_correct = item.clean_prediction == Some(sample.answer);
    let mut more = Map::new();
    more.insert("question".into(), json!(sample.question));
    more.insert("options".into(), json!(sample.options));
    more.insert("modality".into(), json!(sample.modality));
    more.insert("question_type".into(), json!(sample.question_type));
    more.insert("clean_completion".into(), json!(assistant.text_of(&item.own)?));
    more.insert("adversarial_completion".into(), json!(completion));
    more.insert("image_reading".into(), json!(item.reading));
    Ok(AttackRecord {
        id: sample.id.clone(),
        method: attack.method.word().to_owned(),
        norm: attack.norm.word().to_owned(),
        space: attack.space.word().to_owned(),
        epsilon: attack.epsilon,
        step_size: attack.resolved_step_size(),
        num_steps: attack.resolved_num_steps(),
        num_restarts: attack.num_restarts,
        objective: item.objective.word().to_owned(),
        answer: sample.answer_letter().to_string(),
        clean_prediction: records::letter(item.clean_prediction),
        clean_correct,
        adversarial_prediction: records::letter(prediction),
        robust_correct: clean_correct && prediction == Some(sample.answer),
        loss_clean: item.loss_clean,
        loss_adversarial: item.loss_adversarial,
        linf,
        l2,
        image: sample.image.display().to_string(),
        adversarial_image: path,
        more,
    })
}

/// A file name that any file system takes, different for different ids.
fn file_name(id: &str) -> String {
    let safe: String =
        id.chars().map(|c| if c.is_ascii_alphanumeric() || "-_.".contains(c) { c } else { '_' }).collect();
    if safe == id && !id.starts_with('.') { safe } else { format!("{safe}-{:016x}", rng::key_of(id)) }
}

/// `summary.json` from the records alone.
///
/// # Errors
/// A data error when there are no records, or one is none of `attack`.
pub fn summarize(records: &[Value], seconds: f64) -> Result<Value> {
    let records: Vec<AttackRecord> = records.iter().map(read_record).collect::<Result<_>>()?;
    let judged: Vec<accuracy::Outcome<'_>> = records
        .iter()
        .map(|record| {
            let [modality, question_type] = records::groups_of(&record.more);
            // 0 is right, 1 is wrong: which letter it was does not matter here.
            let is_unread = record.adversarial_prediction == records::NONE;
            let prediction = (!is_unread).then_some(usize::from(!record.robust_correct));
            accuracy::Outcome { modality, question_type, answer: 0, prediction }
        })
        .collect();
    let report = accuracy::report(&judged)?;
    let clean = records.iter().filter(|record| record.clean_correct).count();
    let (verdict, reasons) = verdict(&records);
    let first = &records[0];
    Ok(json!({
        "command": Command::Attack.word(),
        "n": records.len(),
        "seconds": seconds,
        "method": first.method,
        "norm": first.norm,
        "space": first.space,
        "epsilon": first.epsilon,
        "num_steps": first.num_steps,
        "num_restarts": first.num_restarts,
        "accuracy": report.all.accuracy,
        "accuracy_interval": report.all.accuracy_interval,
        "clean_accuracy": clean as f64 / records.len() as f64,
        "robust_accuracy": report.all.accuracy,
        "unparsable": report.all.unparsable as f64 / report.all.n as f64,
        "attacked": clean,
        "by_modality": accuracy::shares(&report.by_modality),
        "by_question_type": accuracy::shares(&report.by_question_type),
        "modality_details": report.by_modality,
        "question_type_details": report.by_question_type,
        "verdict": verdict,
        "verdict_reasons": reasons,
    }))
}

fn read_record(value: &Value) -> Result<AttackRecord> {
    serde_json::from_value(value.clone()).map_err(|error| {
        Error::data(format!("record `{}` is none of `attack`: {error}", value["id"].as_str().unwrap_or("?")))
    })
}

/// Whether the robust accuracy may be believed, as far as the records tell: `plausible`, `doubtful` or `void`.
///
/// A gradient attack that cannot raise its own loss found no gradient, which looks like robustness and is none; a
/// change beyond the budget is no attack within it.
fn verdict(records: &[AttackRecord]) -> (&'static str, Vec<String>) {
    let attacked: Vec<&AttackRecord> =
        records.iter().filter(|record| record.adversarial_image.is_some()).collect();
    if attacked.is_empty() {
        return ("void", vec!["no item was right when clean: nothing was attacked".to_owned()]);
    }
    let size = |record: &AttackRecord| if record.norm == "l2" { record.l2 } else { record.linf };
    let beyond = attacked.iter().filter(|record| size(record) > record.epsilon * (1.0 + 1e-9)).count();
    if beyond > 0 {
        return ("void", vec![format!("{beyond} changes exceed the budget, measured on the files")]);
    }
    let first = attacked[0];
    let mut reasons = Vec::new();
    if first.epsilon == 0.0 {
        reasons.push("the budget is 0".to_owned());
    } else if first.method == Method::Noise.word() {
        reasons.push("noise is the weakest attack: compare with pgd".to_owned());
    } else {
        let is_stuck = |record: &&&AttackRecord| record.loss_adversarial <= record.loss_clean;
        let stuck = attacked.iter().filter(is_stuck).count();
        if 10 * stuck > attacked.len() {
            reasons.push(format!(
                "the loss did not rise in {stuck} of {} attacked items: the gradient may be masked",
                attacked.len()
            ));
        }
    }
    (if reasons.is_empty() { "plausible" } else { "doubtful" }, reasons)
}
