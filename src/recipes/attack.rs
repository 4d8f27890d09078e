//! Accuracy under attack, scored from files.
//!
//! Each item that is right when clean is attacked by one stage after another until its answer is wrong. What counts is
//! the 8-bit image: the attacked pixels are rounded inside the ball, written as PNG, read back, shown to the model
//! through its own processor, and answered as clean images are, with the same parser.

use super::aims::{self, Asked};
use super::answers::{Answer, Asker, Asking, with_items};
use super::blind::{self, Blind};
use super::config::{
    ArithmeticName, AttackConfig, Command, Method, ObjectiveName, RunConfig, Scoring, Space,
};
use super::inputs;
use super::items::{self, Images};
use super::job::{Job, Outcome};
use super::lesson::{norm_of, objectives_of};
use super::progress::Progress;
use super::records::{self, AttackRecord, Controls};
use super::report::{self, ReportOptions};
use super::run::{Run, Stop};
use super::verdict::{self, Probe};
use crate::attack::{
    self, Adversarial, Checked, Fraction, NoiseBank, Norm, PgdOutput, Problem, Rounding, lattice,
};
use crate::data::prompt::PromptTemplate;
use crate::data::{Dataset, Sample};
use crate::error::{Error, Result};
use crate::eval::accuracy;
use crate::model::assistant::Assistant;
use crate::model::processor::ProcessedImage;
use crate::model::resize::resize;
use crate::nn::recompute::Memory;
use crate::pixels::{RgbImage8, decode};
use crate::reward::answer::parse_answer;
use crate::rng;
use crate::roles::features::FeatureCache;
use crate::roles::target::{Answers, Target};
use crate::stats::interval;
use candle_core::Tensor;
use serde_json::{Map, Value, json};
use std::collections::HashSet;
use std::fmt::Write as _;
use std::sync::Arc;
use std::time::Instant;

/// Steps between two looks at whether an item is broken already.
pub(super) const CHECK_EVERY: usize = 10;
/// Noisy copies in one pass with gradients: sums over passes round as the passes are cut, so this is no setting.
const DRAWS_AT_ONCE: usize = 8;
/// Bisections of an L2 budget; an L-inf budget is bisected down to one level.
const L2_BISECTIONS: usize = 5;

/// How a model is attacked and asked.
#[derive(Debug, Clone)]
pub struct Setting<'a> {
    /// Budget and search.
    pub attack: &'a AttackConfig,
    /// How questions are asked and answers read.
    pub asking: Asking,
    /// Items in one forward pass; changes no result.
    pub batch_size: usize,
    /// What is kept for gradients.
    memory: Memory,
    /// Seed of random starts.
    pub seed: u64,
    /// Where the smoothed model is attacked: the noise that gradients see.
    noise: Option<NoiseBank>,
    /// The noise under which the search asks whether an item is broken.
    judge: Option<NoiseBank>,
    /// The noise of the answers that are reported: an attack that was chosen by its votes is counted by others.
    score: Option<NoiseBank>,
    /// What the model's products take.
    arithmetic: ArithmeticName,
    /// Images seen before.
    features: Arc<FeatureCache>,
}

/// How many items are attacked at once, and what gradients keep. Of a training that is validated no more than one pass of its
/// steps has, and the same as there: where the steps have room, examinations do.
pub(super) fn attacked_at_once(config: &RunConfig) -> (usize, Memory) {
    let train = &config.train;
    if train.validation.every == 0 {
        return (config.batch_size, Memory::Keep);
    }
    let most = train.micro_batch_size.unwrap_or(train.batch_size);
    (config.batch_size.min(most), train.memory())
}

impl<'a> Setting<'a> {
    /// The setting that a configuration describes.
    ///
    /// # Errors
    /// When the prompt has an unknown name.
    pub fn of(config: &'a RunConfig) -> Result<Self> {
        let attack = &config.attack;
        let (batch_size, memory) = attacked_at_once(config);
        let bank = |purpose| {
            let sigma = attack.smoothing_sigma?;
            Some(NoiseBank { purpose, sigma, draws: attack.eot_samples, seed: config.seed })
        };
        Ok(Self {
            attack,
            asking: Asking::of(config)?,
            batch_size,
            memory,
            seed: config.seed,
            noise: bank("attack_noise"),
            judge: bank("attack_judge"),
            score: bank("attack_score"),
            arithmetic: config.arithmetic,
            features: Arc::new(FeatureCache::new(config.feature_bytes())),
        })
    }

    /// Who gives the answers that are reported.
    fn asker<'b>(&'b self, assistant: &'b Assistant) -> Asker<'b> {
        let votes = self.score.as_ref();
        Asker {
            assistant,
            asking: self.asking,
            votes,
            batch_size: self.batch_size,
            features: Some(&self.features),
        }
    }

    fn template(&self) -> PromptTemplate {
        self.asking.template
    }

    /// What is tried on an item, in order, until it breaks.
    fn stages(&self, most_options: usize) -> Vec<Stage> {
        let stage = |method, objective| Stage { method, objective, target: 1 };
        let targeted = |method| {
            (1..most_options).map(move |target| Stage { method, objective: ObjectiveName::Targeted, target })
        };
        let method = self.attack.method;
        if method != Method::Auto {
            return objectives_of(self.attack.objective)
                .into_iter()
                .flat_map(|objective| match objective {
                    ObjectiveName::Targeted => targeted(method).collect(),
                    objective => vec![stage(method, objective)],
                })
                .collect();
        }
        let mut stages = vec![stage(Method::Apgd, ObjectiveName::Completion)];
        if self.asking.reasons() {
            // A letter behind a finished reasoning shows no gradient of its own: what leads to it is attacked too.
            stages.extend([ObjectiveName::Finding, ObjectiveName::Answer].map(|o| stage(Method::Apgd, o)));
        }
        stages.push(stage(Method::Apgd, ObjectiveName::Dlr));
        stages.extend(targeted(Method::Apgd));
        stages.push(stage(Method::Square, ObjectiveName::Margin));
        stages
    }
}

/// One attack of an ensemble.
#[derive(Debug, Clone, Copy, PartialEq)]
pub(super) struct Stage {
    pub(super) method: Method,
    pub(super) objective: ObjectiveName,
    /// For `targeted`: which wrong option, from 1.
    pub(super) target: usize,
}

impl Stage {
    fn name(&self) -> String {
        let name = format!("{}/{}", self.method.word(), self.objective.word());
        if self.objective == ObjectiveName::Targeted { format!("{name}/{}", self.target) } else { name }
    }

    fn suits(&self, sample: &Sample) -> bool {
        self.objective != ObjectiveName::Targeted || self.target < sample.options.len()
    }
}

/// `safemed attack`.
///
/// # Errors
/// Whatever is wrong with settings, data or weights, before the first item.
pub fn attack(job: &Job<'_>) -> Result<Outcome> {
    let config = &job.config;
    inputs::check_job(job)?;
    inputs::require_greedy(&job.config, "attacked answers are those of a fixed function")?;
    // Nothing trains here: what a file says of a training, for another command, changes nothing.
    let setting = Setting { batch_size: config.batch_size, memory: Memory::Keep, ..Setting::of(config)? };
    let (dataset, train) = inputs::open_questions(job, "attack")?;
    let model = inputs::open_model(job)?;
    let mut run = job.open_run()?;
    inputs::note_model(&mut run, &model)?;
    inputs::note_denoiser(&mut run, config)?;
    let summary = under_attack(&model.assistant, &dataset, train.as_ref(), &setting, &mut run, job.progress)?;
    let options = ReportOptions { images: config.images, ..ReportOptions::default() };
    report::report(&[run.dir().to_path_buf()], &options, job.progress)?;
    Ok(Outcome::new(summary.clone(), render(&summary)))
}

/// The summary in a few lines.
fn render(summary: &Value) -> String {
    let number = |key: &str| summary[key].as_f64().unwrap_or(f64::NAN);
    let mut text = format!(
        "clean accuracy   {:.4}\nrobust accuracy  {:.4}  n {}, of which {} were right when clean and attacked\nunparsable       {:.4}\nverdict          {}\n",
        number("clean_accuracy"),
        number("robust_accuracy"),
        summary["n"],
        summary["attacked"],
        number("unparsable"),
        summary["verdict"].as_str().unwrap_or_default(),
    );
    for check in summary["verdict_checks"].as_array().into_iter().flatten() {
        let word = |key: &str| check[key].as_str().unwrap_or_default();
        let _ = writeln!(text, "  {:4}  {:22}  {}", word("status"), word("name"), word("evidence"));
    }
    text
}

/// Attacks every question of `dataset`; leaves records, pictures and the summary in the run directory.
///
/// # Errors
/// When an image, a loss or a gradient cannot be had.
pub fn under_attack(
    assistant: &Assistant,
    dataset: &Dataset,
    train: Option<&Dataset>,
    setting: &Setting<'_>,
    run: &mut Run,
    progress: &dyn Progress,
) -> Result<Value> {
    inputs::note_questions(run, dataset, train, setting.template())?;
    let blind = Blind::new(dataset, train, setting.seed);
    blind.note(run, progress)?;
    let examined = verdict::chosen(
        dataset.population().iter().map(|sample| sample.id.as_str()),
        setting.attack.verdict_items,
    );
    let images = Images::new(dataset);
    let samples = inputs::in_item_order(&dataset.samples);
    let todo: Vec<&Sample> =
        samples.iter().copied().filter(|sample| !run.done_ids().contains(&sample.id)).collect();
    progress.start(samples.len(), samples.len() - todo.len(), "attack");
    let (mut done, mut clean, mut robust) = (0, 0, 0);
    for record in run.records()? {
        check_finished(&record, &samples, &images, assistant, setting, run)?;
        done += 1;
        clean += usize::from(record["clean_correct"] == json!(true));
        robust += usize::from(record["robust_correct"] == json!(true));
    }
    for batch in todo.chunks(setting.batch_size) {
        run.check_stop()?;
        let started = Instant::now();
        let records = attack_batch(assistant, &images, batch, setting, &blind, &examined, run);
        for record in records.map_err(|error| with_items(error, batch))? {
            done += 1;
            clean += usize::from(record.clean_correct);
            robust += usize::from(record.robust_correct);
            run.record(&record)?;
        }
        run.timing("attack", started.elapsed().as_secs_f64(), &[("items", batch.len() as f64)])?;
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
    own: Answer,
    controls: Controls,
    /// The attack's best pixels before rounding, planar.
    best: Option<Vec<f32>>,
    adversarial: Option<RgbImage8>,
    answer: Answer,
    stage: Option<Stage>,
    loss_clean: Option<f64>,
    loss_adversarial: Option<f64>,
    /// Gradients and queries spent.
    steps: usize,
    rounding: Rounding,
    has_zero_gradient: bool,
    /// The smallest budget found to break it, and the image that does.
    smallest: Option<(f64, RgbImage8)>,
    probe: Option<Probe>,
}

impl Item<'_> {
    fn was_right(&self) -> bool {
        self.own.prediction == Some(self.sample.answer)
    }

    fn is_right(&self) -> bool {
        self.answer.prediction == Some(self.sample.answer)
    }
}

fn attack_batch(
    assistant: &Assistant,
    images: &Images,
    samples: &[&Sample],
    setting: &Setting<'_>,
    blind: &Blind<'_>,
    examined: &HashSet<String>,
    run: &Run,
) -> Result<Vec<AttackRecord>> {
    let mut originals = Vec::with_capacity(samples.len());
    for &sample in samples {
        let original = images.original(&sample.image)?;
        let processed = Arc::new(images.process(assistant, &sample.image, &original)?);
        originals.push((original, processed));
    }
    let processed: Vec<Arc<ProcessedImage>> = originals.iter().map(|(_, image)| image.clone()).collect();
    let asker = setting.asker(assistant);
    let answers = asker.about_images(samples, &processed)?;
    let controls = blind.controls(&asker, images, samples, &processed)?;
    let mut batch = Vec::with_capacity(samples.len());
    for (((&sample, (original, processed)), own), controls) in
        samples.iter().zip(originals).zip(answers).zip(controls)
    {
        batch.push(Item {
            sample,
            clean: match setting.attack.space {
                Space::Original => original,
                Space::Model => processed.resized.clone(),
            },
            reading: images.reading(&sample.image),
            processed,
            answer: own.clone(),
            own,
            controls,
            best: None,
            adversarial: None,
            stage: None,
            loss_clean: None,
            loss_adversarial: None,
            steps: 0,
            rounding: Rounding::Harmless,
            has_zero_gradient: false,
            smallest: None,
            probe: None,
        });
    }
    let attacker = Attacker { assistant, setting, stop: run.stop() };
    let most_options = samples.iter().map(|sample| sample.options.len()).max().unwrap_or(0);
    for (number, stage) in setting.stages(most_options).into_iter().enumerate() {
        let alive: Vec<usize> =
            (0..batch.len()).filter(|&i| batch[i].is_right() && stage.suits(batch[i].sample)).collect();
        // An ensemble goes on from the best image so far.
        let is_warm = number > 0 && setting.attack.method == Method::Auto;
        attacker.attack_survivors(&mut batch, &alive, stage, is_warm)?;
    }
    for item in &mut batch {
        if setting.attack.min_epsilon && item.was_right() {
            attacker.try_smaller(item)?;
            if !item.is_right() {
                item.smallest = attacker.smallest_epsilon(item)?;
            }
        }
        if item.was_right() && examined.contains(&item.sample.id) {
            item.probe = Some(attacker.examine(item)?);
        }
    }
    attacker.finish(&batch, run)
}

/// An attacked image as its file holds it.
struct Seen {
    path: String,
    sha256: String,
    image: RgbImage8,
    processed: Arc<ProcessedImage>,
    answer: Answer,
}

/// The model under attack.
struct Attacker<'a> {
    assistant: &'a Assistant,
    setting: &'a Setting<'a>,
    stop: &'a Stop,
}

impl Attacker<'_> {
    /// Who judges while the attack searches.
    fn judge(&self) -> Asker<'_> {
        Asker { votes: self.setting.judge.as_ref(), ..self.scorer() }
    }

    /// Who answers about attacked images, of which none comes back.
    fn scorer(&self) -> Asker<'_> {
        Asker { features: None, ..self.setting.asker(self.assistant) }
    }

    /// What the model answers about these images, as files.
    fn ask(&self, samples: &[&Sample], images: &[&RgbImage8]) -> Result<Vec<Answer>> {
        let processed = images
            .iter()
            .map(|image| Ok(Arc::new(self.assistant.process(image)?)))
            .collect::<Result<Vec<_>>>()?;
        self.judge().about_images(samples, &processed)
    }

    /// What it answers about pixels at its own resolution.
    fn predictions(&self, samples: &[&Sample], pixels: &Tensor) -> Result<Vec<Option<usize>>> {
        let answers = self.judge().about_pixels(samples, std::slice::from_ref(pixels))?;
        Ok(answers.into_iter().map(|answer| answer.prediction).collect())
    }

    /// Attacks items that still answer rightly; together where their images have one size.
    fn attack_survivors(
        &self,
        batch: &mut [Item<'_>],
        alive: &[usize],
        stage: Stage,
        is_warm: bool,
    ) -> Result<()> {
        let size = |item: &Item<'_>| (item.clean.height, item.clean.width);
        let mut rest = alive.to_vec();
        while let Some(&first) = rest.first() {
            let wanted = size(&batch[first]);
            let (same, others): (Vec<usize>, Vec<usize>) =
                rest.into_iter().partition(|&i| size(&batch[i]) == wanted);
            rest = others;
            let items: Vec<&Item<'_>> = same.iter().map(|&i| &batch[i]).collect();
            let (found, images) = self.search(&items, stage, self.setting.attack.epsilon, is_warm)?;
            let samples: Vec<&Sample> = items.iter().map(|item| item.sample).collect();
            let answers = self.ask(&samples, &images.iter().collect::<Vec<_>>())?;
            let pixels = rows_of(&found.pixels)?;
            let results = same.iter().zip(images).zip(answers).zip(pixels).enumerate();
            for (place, (((&i, image), answer), pixels)) in results {
                let item = &mut batch[i];
                item.loss_clean = Some(f64::from(found.loss_clean[place]));
                item.loss_adversarial = Some(f64::from(found.loss[place]));
                item.has_zero_gradient |= found.zero_gradient[place];
                item.rounding = found.rounding[place];
                item.steps += found.steps_used[place];
                item.stage = Some(stage);
                item.answer = answer;
                item.adversarial = Some(image);
                item.best = Some(pixels);
            }
        }
        Ok(())
    }

    /// One attack on items of one size: what was found, and its images rounded inside the ball.
    fn search(
        &self,
        items: &[&Item<'_>],
        stage: Stage,
        epsilon: f64,
        is_warm: bool,
    ) -> Result<(Adversarial, Vec<RgbImage8>)> {
        let samples: Vec<&Sample> = items.iter().map(|item| item.sample).collect();
        let answers = |pixels: &Tensor, places: &[usize]| {
            let samples: Vec<&Sample> = places.iter().map(|&place| samples[place]).collect();
            self.predictions(&samples, pixels)
        };
        let target = self.target(items, stage, &answers)?;
        let clean = self.clean(items)?;
        let start = is_warm.then(|| Self::start(items, &clean)).transpose()?;
        let suffix = if stage.target > 1 { format!("{}/", stage.target) } else { String::new() };
        let name = |item: &&Item<'_>| format!("{}/{suffix}{}", stage.objective.word(), item.sample.id);
        let keys: Vec<u64> = items.iter().map(|item| rng::key_of(&name(item))).collect();
        let indices: Vec<usize> = (0..items.len()).collect();
        let problem =
            Problem { clean: &clean, items: &indices, keys: &keys, start: start.as_ref(), judge_8bit: true };
        let target = Checked { objective: &target, check: &|| self.stop.check() };
        let found = attack::attack(&target, &problem, &self.config(stage.method, epsilon))?;
        let norm = norm_of(self.setting.attack.norm);
        let images = items
            .iter()
            .zip(rows_of(&found.pixels)?)
            .map(|(item, pixels)| {
                // Tensors are planar, files interleaved.
                let pixels = interleave(&pixels, item.clean.data.len() / 3);
                let rounded = lattice::to_8bit_within_ball(&pixels, &item.clean.data, norm, epsilon);
                RgbImage8::new(item.clean.width, item.clean.height, rounded)
            })
            .collect::<Result<_>>()?;
        Ok((found, images))
    }

    fn target<'b>(&'b self, items: &[&Item<'_>], stage: Stage, answers: Answers<'b>) -> Result<Target<'b>> {
        let template = self.setting.template();
        let aims = items
            .iter()
            .map(|item| {
                let asked = Asked {
                    template,
                    is_cot: self.setting.asking.reasons(),
                    objective: stage.objective,
                    target: stage.target,
                    own: item.own.tokens.as_ref(),
                };
                let prompt = items::prompt_of(self.assistant, template, item.sample, &item.processed)?;
                let model_size = [item.processed.resized.height, item.processed.resized.width];
                aims::aim(self.assistant, item.sample, asked, prompt, model_size)
            })
            .collect::<Result<_>>()?;
        Ok(Target {
            assistant: self.assistant,
            aims,
            answers,
            noise: self.setting.noise.clone(),
            draws_at_once: DRAWS_AT_ONCE,
            memory: self.setting.memory,
        })
    }

    /// Clean pixels of items of one size, `[n, 3, height, width]`.
    fn clean(&self, items: &[&Item<'_>]) -> Result<Tensor> {
        let device = self.assistant.vlm.device();
        let clean = items.iter().map(|item| item.clean.to_tensor(device)).collect::<Result<Vec<_>>>()?;
        Ok(Tensor::stack(&clean, 0)?)
    }

    /// The best images so far, in the shape of `clean`.
    fn start(items: &[&Item<'_>], clean: &Tensor) -> Result<Tensor> {
        let mut rows = rows_of(clean)?;
        for (row, item) in rows.iter_mut().zip(items) {
            if let Some(best) = &item.best {
                row.copy_from_slice(best);
            }
        }
        Ok(Tensor::from_vec(rows.concat(), clean.shape(), clean.device())?)
    }

    fn config(&self, method: Method, epsilon: f64) -> attack::AttackConfig {
        let attack = self.setting.attack;
        attack::AttackConfig {
            method: match method {
                Method::Noise => attack::Method::Noise,
                Method::Fgsm => attack::Method::Fgsm,
                Method::Pgd => attack::Method::Pgd,
                Method::Apgd | Method::Auto => attack::Method::Apgd,
                Method::Square => attack::Method::Square,
            },
            norm: norm_of(attack.norm),
            epsilon: Fraction(epsilon),
            // A smaller budget takes smaller steps.
            step_size: attack
                .step_size
                .filter(|_| epsilon > 0.0)
                .map(|s| Fraction(s * epsilon / attack.epsilon)),
            num_steps: if method == Method::Square { attack.num_queries } else { attack.num_steps },
            momentum: attack.momentum,
            num_restarts: attack.num_restarts,
            random_start: attack.random_start,
            early_stop: attack.early_stop,
            check_every: CHECK_EVERY,
            // Noise is judged as it was drawn; every other attack keeps its best.
            output: if method == Method::Noise { PgdOutput::Last } else { PgdOutput::Best },
            seed: self.setting.seed,
        }
    }

    /// Tries halves of the budget on an item that the whole one left right: what breaks it there lies in the whole ball too,
    /// and long steps may have leapt over it.
    fn try_smaller(&self, item: &mut Item<'_>) -> Result<()> {
        let least = match norm_of(self.setting.attack.norm) {
            Norm::Linf => 1.0 / 255.0,
            Norm::L2 => self.setting.attack.epsilon / 8.0,
        };
        let mut epsilon = self.setting.attack.epsilon / 2.0;
        while let Some(stage) = item.stage.filter(|_| item.is_right() && epsilon >= least * (1.0 - 1e-9)) {
            let (found, mut images) = self.search(&[&*item], stage, epsilon, false)?;
            let answer = self.ask(&[item.sample], &[&images[0]])?.remove(0);
            item.steps += found.steps_used[0];
            if answer.prediction != Some(item.sample.answer) {
                item.answer = answer;
                item.adversarial = images.pop();
                item.best = rows_of(&found.pixels)?.pop();
                item.loss_adversarial = Some(f64::from(found.loss[0]));
            }
            epsilon /= 2.0;
        }
        Ok(())
    }

    /// The smallest budget found to break an item, with the image that does, by bisection: each smaller budget starts from
    /// the image that broke it under the larger one.
    fn smallest_epsilon(&self, item: &mut Item<'_>) -> Result<Option<(f64, RgbImage8)>> {
        let (Some(stage), Some(image)) = (item.stage, item.adversarial.clone()) else { return Ok(None) };
        let mut smallest = image.clone();
        let norm = norm_of(self.setting.attack.norm);
        let kept = item.best.clone();
        // What the file measures may be less than the budget.
        let mut broken = lattice::Distances::between(&image.data, &item.clean.data).in_norm(norm);
        let mut robust = 0.0;
        let mut left = L2_BISECTIONS;
        loop {
            let middle = match norm {
                Norm::Linf => {
                    let levels = |epsilon: f64| (255.0 * epsilon).round();
                    if levels(broken) - levels(robust) <= 1.0 {
                        break;
                    }
                    f64::midpoint(levels(broken), levels(robust)).floor() / 255.0
                }
                Norm::L2 if left == 0 => break,
                Norm::L2 => 0.5 * (broken + robust),
            };
            left = left.saturating_sub(1);
            let (found, mut images) = self.search(&[&*item], stage, middle, true)?;
            let answer = self.ask(&[item.sample], &[&images[0]])?.remove(0);
            if answer.prediction == Some(item.sample.answer) {
                robust = middle;
            } else {
                broken = lattice::Distances::between(&images[0].data, &item.clean.data).in_norm(norm);
                item.best = rows_of(&found.pixels)?.pop();
                smallest = images.swap_remove(0);
                if broken <= robust {
                    break;
                }
            }
        }
        item.best = kept;
        Ok(Some((broken, smallest)))
    }

    /// Examines the attack on one item.
    fn examine(&self, item: &Item<'_>) -> Result<Probe> {
        let stage = self.setting.stages(item.sample.options.len())[0];
        let answers =
            |pixels: &Tensor, places: &[usize]| self.predictions(&vec![item.sample; places.len()], pixels);
        let target = self.target(&[item], stage, &answers)?;
        let config = self.config(Method::Pgd, self.setting.attack.epsilon);
        let key = rng::key_of(&format!("verdict/{}", item.sample.id));
        let target = Checked { objective: &target, check: &|| self.stop.check() };
        verdict::examine(&target, &self.clean(&[item])?, key, &config, !item.is_right())
    }

    /// Writes the attacked images, reads them back and records what the model says to the files.
    fn finish(&self, batch: &[Item<'_>], run: &Run) -> Result<Vec<AttackRecord>> {
        let attacked: Vec<&Item<'_>> = batch.iter().filter(|item| item.adversarial.is_some()).collect();
        let mut files = Vec::with_capacity(attacked.len());
        for item in &attacked {
            let relative = format!("adversarial/{}.png", file_name(&item.sample.id));
            if let Some(adversarial) = &item.adversarial {
                run.write(&relative, &decode::encode_png(adversarial)?)?;
            }
            let image = decode::decode_file(&run.path(&relative))?;
            let sha256 = inputs::file_sha256(&run.path(&relative))?;
            let processed = Arc::new(self.assistant.process(&image)?);
            files.push((relative, sha256, image, processed));
        }
        let samples: Vec<&Sample> = attacked.iter().map(|item| item.sample).collect();
        let processed: Vec<Arc<ProcessedImage>> = files.iter().map(|(.., image)| image.clone()).collect();
        let answers =
            if samples.is_empty() { Vec::new() } else { self.scorer().about_images(&samples, &processed)? };
        let mut seen = files.into_iter().zip(answers);
        batch
            .iter()
            .map(|item| {
                let seen = item.adversarial.as_ref().and_then(|_| seen.next());
                let seen = seen.map(|((path, sha256, image, processed), answer)| Seen {
                    path,
                    sha256,
                    image,
                    processed,
                    answer,
                });
                self.record(item, seen, run)
            })
            .collect()
    }

    fn record(&self, item: &Item<'_>, seen: Option<Seen>, run: &Run) -> Result<AttackRecord> {
        let attack = self.setting.attack;
        let sample = item.sample;
        let mut more = Map::new();
        if let Some(seen) = &seen {
            let difference = self.processor_difference(&seen.image, &seen.processed)?;
            more.insert("processor_difference".into(), json!(difference));
            more.insert("adversarial_sha256".into(), json!(seen.sha256));
        }
        let distances = seen
            .as_ref()
            .map(|seen| lattice::Distances::between(&seen.image.data, &item.clean.data))
            .unwrap_or_default();
        let (path, answer) = match seen {
            Some(seen) => (Some(seen.path), seen.answer),
            None => (None, item.own.clone()),
        };
        let robust_correct = item.was_right() && answer.prediction == Some(sample.answer);
        more.insert("question".into(), json!(sample.question));
        more.insert("options".into(), json!(sample.options));
        more.insert("modality".into(), json!(sample.modality));
        more.insert("question_type".into(), json!(sample.question_type));
        more.insert("scoring".into(), json!(self.setting.asking.scoring.word()));
        more.insert("clean_completion".into(), json!(item.own.completion));
        more.insert("adversarial_completion".into(), json!(answer.completion));
        more.insert("image_reading".into(), json!(item.reading));
        if self.setting.arithmetic == ArithmeticName::Bf16 {
            more.insert("arithmetic".into(), json!(self.setting.arithmetic.word()));
        }
        more.insert("controls".into(), json!(item.controls));
        if let Some(stage) = item.stage {
            more.insert("stage".into(), json!(stage.name()));
            more.insert("steps_spent".into(), json!(item.steps));
            more.insert("zero_gradient".into(), json!(item.has_zero_gradient));
            let rounding = match item.rounding {
                Rounding::Harmless => "harmless",
                Rounding::Repaired => "repaired",
                Rounding::Undone => "undone",
            };
            more.insert("rounding".into(), json!(rounding));
        }
        if attack.min_epsilon {
            let smallest = item.smallest.as_ref().filter(|_| !robust_correct);
            more.insert("min_epsilon".into(), json!(smallest.map(|(epsilon, _)| epsilon)));
            if let Some((_, image)) = smallest {
                let relative = format!("adversarial/{}.smallest.png", file_name(&sample.id));
                run.write(&relative, &decode::encode_png(image)?)?;
                more.insert("min_epsilon_image".into(), json!(relative));
            }
        }
        if let Some(sigma) = attack.smoothing_sigma {
            more.insert("smoothing_sigma".into(), json!(sigma));
            more.insert("eot_samples".into(), json!(attack.eot_samples));
        }
        if let Some(probe) = &item.probe {
            more.insert("probe".into(), serde_json::to_value(probe).map_err(anyhow::Error::from)?);
        }
        Ok(AttackRecord {
            id: sample.id.clone(),
            method: attack.method.word().to_owned(),
            norm: attack.norm.word().to_owned(),
            space: attack.space.word().to_owned(),
            epsilon: attack.epsilon,
            step_size: attack.resolved_step_size(),
            num_steps: attack.resolved_num_steps(),
            num_restarts: attack.num_restarts,
            objective: item.stage.map_or(attack.objective, |stage| stage.objective).word().to_owned(),
            answer: sample.answer_letter().to_string(),
            clean_prediction: records::letter(item.own.prediction),
            clean_correct: item.was_right(),
            adversarial_prediction: records::letter(answer.prediction),
            robust_correct,
            loss_clean: item.loss_clean,
            loss_adversarial: item.loss_adversarial,
            linf: distances.linf,
            l2: distances.l2,
            image: sample.image.display().to_string(),
            adversarial_image: path,
            more,
        })
    }

    /// Largest difference between what the processor makes of a file and what the attack's differentiable path makes of
    /// it, for pixels in [0, 1].
    fn processor_difference(&self, seen: &RgbImage8, processed: &ProcessedImage) -> Result<f64> {
        let device = self.assistant.vlm.device();
        let model_size = [processed.resized.height, processed.resized.width];
        let path = resize(&seen.to_tensor(device)?.unsqueeze(0)?, model_size)?;
        let own = processed.resized.to_tensor(device)?.unsqueeze(0)?;
        let largest = (path - own)?.abs()?.flatten_all()?.max(0)?.to_scalar::<f32>()?;
        Ok(f64::from(largest))
    }
}

/// The images of `[n, 3, height, width]`, planar.
fn rows_of(pixels: &Tensor) -> Result<Vec<Vec<f32>>> {
    Ok(pixels.flatten_from(1)?.to_vec2()?)
}

/// From three planes to pixels of three channels.
fn interleave(planes: &[f32], count: usize) -> Vec<f32> {
    (0..count).flat_map(|i| [planes[i], planes[count + i], planes[2 * count + i]]).collect()
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
    let checks = verdict::checks(&records);
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
        "controls": blind::summary(&controls_of(&records)),
        "by_modality": accuracy::shares(&report.by_modality),
        "by_question_type": accuracy::shares(&report.by_question_type),
        "modality_details": report.by_modality,
        "question_type_details": report.by_question_type,
        "rounding": roundings(&records),
        "robust_accuracy_by_epsilon": by_epsilon(&records),
        "robust_accuracy_by_steps": by_steps(&records),
        "verdict": verdict::worst(&checks),
        "verdict_checks": checks,
    }))
}

fn read_record(value: &Value) -> Result<AttackRecord> {
    check_letters(value)?;
    serde_json::from_value(value.clone()).map_err(|error| {
        Error::data(format!("record `{}` is none of `attack`: {error}", value["id"].as_str().unwrap_or("?")))
    })
}

/// Whether a record's letters, as far as it has them, say what its flags say.
fn check_letters(record: &Value) -> Result<()> {
    let letter = |key: &str| record[key].as_str();
    let (Some(answer), Some(clean), Some(adversarial)) =
        (letter("answer"), letter("clean_prediction"), letter("adversarial_prediction"))
    else {
        return Ok(());
    };
    let is_clean = clean == answer;
    let wanted = [("clean_correct", is_clean), ("robust_correct", is_clean && adversarial == answer)];
    if wanted.iter().all(|(key, is)| record[*key].as_bool().is_none_or(|flag| flag == *is)) {
        return Ok(());
    }
    Err(Error::data(format!(
        "record `{}` contradicts itself: its letters are {clean} when clean and {adversarial} under attack, the right one {answer}",
        record["id"].as_str().unwrap_or("?")
    )))
}

/// That no record contradicts itself.
///
/// # Errors
/// A data error that names the first that does.
pub fn check_records(records: &[Value]) -> Result<()> {
    records.iter().try_for_each(check_letters)
}

/// Whether a record of an earlier part of this run holds: the right answer, letters that its completions say, and an attacked
/// image that is still the one that was scored, as far from the original as is written.
fn check_finished(
    record: &Value,
    samples: &[&Sample],
    images: &Images,
    assistant: &Assistant,
    setting: &Setting<'_>,
    run: &Run,
) -> Result<()> {
    let record = read_record(record)?;
    let wrong = |what: String| {
        Err(Error::data(format!(
            "record `{}` does not hold: {what}\n   = help: take its line out of records.jsonl, or begin with another `--out`",
            record.id
        )))
    };
    let Some(sample) = samples.iter().find(|sample| sample.id == record.id) else { return Ok(()) };
    if record.answer != sample.answer_letter().to_string() {
        return wrong(format!("the right answer is {}, not {}", sample.answer_letter(), record.answer));
    }
    if setting.asking.scoring == Scoring::Generate && setting.score.is_none() {
        let said = |key: &str| {
            let completion = record.more.get(key).and_then(Value::as_str).unwrap_or_default();
            records::letter(parse_answer(completion, sample.options.as_slice()))
        };
        let letters = [said("clean_completion"), said("adversarial_completion")];
        if letters != [record.clean_prediction.clone(), record.adversarial_prediction.clone()] {
            return wrong(format!("its completions say {} and {}", letters[0], letters[1]));
        }
    }
    let Some(path) = &record.adversarial_image else { return Ok(()) };
    let full = run.path(path);
    if record.more.get("adversarial_sha256") != Some(&json!(inputs::file_sha256(&full)?)) {
        return wrong(format!("the attacked image is not the one that was scored\n  --> {}", full.display()));
    }
    let original = images.original(&sample.image)?;
    let clean = match setting.attack.space {
        Space::Original => original,
        Space::Model => images.process(assistant, &sample.image, &original)?.resized,
    };
    let attacked = decode::decode_file(&full)?;
    let is_size = (attacked.height, attacked.width) == (clean.height, clean.width);
    let found = if is_size { lattice::Distances::between(&attacked.data, &clean.data) } else { wrong_size() };
    if (found.linf, found.l2) == (record.linf, record.l2) {
        return Ok(());
    }
    wrong(format!(
        "the attacked image is {} and {} from the original in L-inf and L2, not {} and {}",
        found.linf, found.l2, record.linf, record.l2
    ))
}

/// The distance of images that cannot be compared.
fn wrong_size() -> lattice::Distances {
    lattice::Distances { linf: f64::INFINITY, l2: f64::INFINITY }
}

/// Right letter, controls and number of options of each item.
fn controls_of(records: &[AttackRecord]) -> Vec<(&str, Controls, usize)> {
    let of = |record: &'_ AttackRecord| {
        let controls = serde_json::from_value(record.more.get("controls")?.clone()).ok()?;
        Some((controls, record.more.get("options")?.as_array()?.len()))
    };
    records
        .iter()
        .filter_map(|record| {
            of(record).map(|(controls, options)| (record.answer.as_str(), controls, options))
        })
        .collect()
}

/// How often rounding to eight bits mattered.
fn roundings(records: &[AttackRecord]) -> Value {
    let count = |word: &str| records.iter().filter(|r| r.more.get("rounding") == Some(&json!(word))).count();
    json!({ "undone": count("undone"), "repaired": count("repaired") })
}

/// Robust accuracy against what it cost, each point `[at, accuracy, low, high]`.
#[derive(Debug, Clone, Default, PartialEq)]
pub struct Curves {
    /// At each budget up to the run's; empty where the smallest budgets were not searched for.
    pub by_epsilon: Vec<[f64; 4]>,
    /// At numbers of gradients and queries spent on each item.
    pub by_steps: Vec<[f64; 4]>,
}

/// The curves of a run's records; empty when they are none of `attack`.
pub fn curves(records: &[Value]) -> Curves {
    match records.iter().map(read_record).collect::<Result<Vec<_>>>() {
        Ok(records) if !records.is_empty() => {
            Curves { by_epsilon: by_epsilon(&records), by_steps: by_steps(&records) }
        }
        _ => Curves::default(),
    }
}

fn by_epsilon(records: &[AttackRecord]) -> Vec<[f64; 4]> {
    let first = &records[0];
    if records.iter().all(|record| !record.more.contains_key("min_epsilon")) {
        return Vec::new();
    }
    let points = if first.norm == "l2" { 16.0 } else { (255.0 * first.epsilon).round().clamp(1.0, 255.0) };
    let survives = |record: &&AttackRecord, epsilon: f64| {
        let smallest = record.more.get("min_epsilon").and_then(Value::as_f64);
        record.clean_correct && smallest.is_none_or(|smallest| smallest > epsilon + 1e-9)
    };
    (0..=points as usize)
        .map(|k| {
            let epsilon = first.epsilon * k as f64 / points;
            let robust = records.iter().filter(|record| survives(record, epsilon)).count();
            point(epsilon, robust, records.len())
        })
        .collect()
}

fn by_steps(records: &[AttackRecord]) -> Vec<[f64; 4]> {
    let spent = |record: &AttackRecord| record.more.get("steps_spent").and_then(Value::as_u64).unwrap_or(0);
    let most = records.iter().map(spent).max().unwrap_or(0);
    let stride = most.div_ceil(20).max(1).next_multiple_of(CHECK_EVERY as u64);
    let survives = |record: &&AttackRecord, steps: u64| {
        record.clean_correct && (record.robust_correct || spent(record) > steps)
    };
    (0..most)
        .step_by(stride as usize)
        .chain([most])
        .map(|steps| {
            let robust = records.iter().filter(|record| survives(record, steps)).count();
            point(steps as f64, robust, records.len())
        })
        .collect()
}

fn point(at: f64, robust: usize, n: usize) -> [f64; 4] {
    let [low, high] = interval::wilson(robust as u64, n as u64, interval::Z_95);
    [at, robust as f64 / n as f64, low, high]
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn examinations_hold_no_more_at_once_than_the_steps_of_their_training() {
        let mut config = RunConfig { batch_size: 8, ..RunConfig::default() };
        config.train.batch_size = 4;
        config.train.recompute = true;
        let of = |config: &RunConfig| {
            let setting = Setting::of(config).unwrap();
            (setting.batch_size, setting.memory)
        };
        assert_eq!(of(&config), (8, Memory::Keep));
        config.train.validation.every = 10;
        assert_eq!(of(&config), (4, Memory::Recompute));
        config.train.micro_batch_size = Some(1);
        config.train.recompute = false;
        assert_eq!(of(&config), (1, Memory::Keep));
        config.train.micro_batch_size = Some(16);
        assert_eq!(of(&config), (8, Memory::Keep));
    }
}
