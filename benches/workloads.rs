//! The work that decides what robustness costs, timed: prefill, PGD, certification, decoding, training.
//!
//! ```text
//! cargo bench --bench workloads                                   # a tiny model from scratch on phantoms
//! cargo bench --bench workloads -- --checkpoint DIR --data DIR    # any checkpoint, any data in OmniMedVQA's layout
//! ```
//!
//! One JSON line for each workload, in the units of `scripts/bench/versus_torch.py`, which runs this beside PyTorch.

#![expect(clippy::print_stdout, reason = "a benchmark's result is what it prints")]

use anyhow::{Context, Result, ensure};
use candle_core::{Device, Tensor};
use clap::Parser;
use safemed::attack::{AttackConfig, Fraction, PgdOutput, Problem, pgd};
use safemed::backend::{peak_memory_bytes, restart_peak_memory, with_threads};
use safemed::certify::count_draws;
use safemed::data::phantom::{self, PhantomConfig};
use safemed::data::prompt::PromptTemplate;
use safemed::data::{Dataset, DatasetConfig, ImageCheck, Sample};
use safemed::error;
use safemed::model::assistant::Assistant;
use safemed::model::generate::Prompt;
use safemed::model::loader::{Adaptation, Precision};
use safemed::model::lora::{LoraConfig, Modules};
use safemed::model::sampling::{Decoding, SamplingConfig};
use safemed::model::vlm::Features;
use safemed::nn::recompute::{Memory, loss_and_gradients};
use safemed::pixels::decode::decode_file;
use safemed::recipes::config::{AdversaryConfig, RampName, RecipeName, TrainConfig};
use safemed::recipes::failure::Evidence;
use safemed::recipes::fit::{Fit, Student};
use safemed::recipes::items::Images;
use safemed::recipes::lesson::{Exit, Lesson};
use safemed::recipes::scratch::Scratch;
use safemed::recipes::{sft, trades};
use safemed::roles::classifier::{QuestionClassifier, Reading};
use safemed::roles::policy::{self, Scoring};
use safemed::roles::target::{Aim, Target};
use serde_json::json;
use std::path::{Path, PathBuf};
use std::time::Instant;

#[path = "../src/process.rs"]
mod process;

/// The allocator of the program.
#[global_allocator]
static ALLOCATOR: mimalloc::MiMalloc = mimalloc::MiMalloc;

/// What runs on the checkpoint as it is, what under an adapter, and what where the weights themselves train.
const ON_BASE: [&str; 7] =
    ["forward", "certify_b16", "certify_b32", "pgd_b1", "pgd_b4", "generate_b1", "generate_b8"];
const ON_ADAPTER: [&str; 6] =
    ["sft_lora", "grpo_rollout", "grpo_attack_pgd5", "grpo_update", "at_sft", "trades"];
const ON_WEIGHTS: &str = "sft_full";
const EPSILON: f64 = 8.0 / 255.0;
const SIGMA: f64 = 0.25;
const LETTERS: [&str; 4] = ["A", "B", "C", "D"];
/// Tokens of a sampled completion and of a greedy one.
const NEW_TOKENS: usize = 64;

#[derive(Parser, Debug)]
struct Args {
    /// A Hugging Face checkpoint; absent, a tiny model from scratch.
    #[arg(long, requires = "data")]
    checkpoint: Option<PathBuf>,
    /// Questions and images in OmniMedVQA's layout.
    #[arg(long)]
    data: Option<PathBuf>,
    /// Workloads whose name has one of these words.
    #[arg(long, num_args = 1..)]
    only: Vec<String>,
    /// Timed calls of each.
    #[arg(long, default_value_t = 3)]
    repeats: usize,
    /// Threads.
    #[arg(long, default_value_t = 2)]
    threads: usize,
    /// Matrix products of bfloat16, summed in float32.
    #[arg(long)]
    bf16: bool,
    /// Keep only the states between layers while a gradient is computed.
    #[arg(long)]
    recompute: bool,
    /// What `cargo bench` passes.
    #[arg(long, hide = true)]
    bench: bool,
}

fn main() -> Result<()> {
    process::prepare();
    let args = Args::parse();
    let threads = Some(args.threads);
    Ok(with_threads(threads, || run(&args).map_err(error::Error::Other))?)
}

fn run(args: &Args) -> Result<()> {
    let scratch = tempfile::tempdir()?;
    let data = match &args.data {
        Some(data) => data.clone(),
        None => phantoms(scratch.path())?,
    };
    let dataset = DatasetConfig { omnimedvqa: Some(data.clone()), ..DatasetConfig::default() }
        .load(ImageCheck::Exist)?;
    let checkpoint = match &args.checkpoint {
        Some(dir) => dir.clone(),
        None => tiny_checkpoint(&dataset.samples, scratch.path())?,
    };
    let wants = |name: &str| args.only.is_empty() || args.only.iter().any(|only| name.contains(only));
    let bench = Bench { args, data: &data, dataset: &dataset, samples: &dataset.samples, wants: &wants };
    if wants("load") {
        bench.load(&checkpoint)?;
    }
    if ON_BASE.iter().any(|name| wants(name)) {
        let frozen = bench.frozen(&checkpoint)?;
        bench.forward(&frozen)?;
        bench.certify(&frozen)?;
        bench.pgd(&frozen, &ON_BASE)?;
        bench.generate(&frozen)?;
    }
    if ON_ADAPTER.iter().any(|name| wants(name)) {
        // A frozen base under an adapter over every linear layer of the decoder.
        let targets = Modules::parse(r"model\.language_model\..*");
        let config = LoraConfig::new(16, 32.0, targets);
        let adaptation = Adaptation::New { config: &config, seed: 0 };
        let trains = |name: &str| name.contains(".lora_");
        let assistant =
            Assistant::load_adapted(&checkpoint, adaptation, bench.precision(), &trains, &Device::Cpu)?;
        let mut fit = Fit::new(Student::new(assistant, Some(config.clone()))?)?;
        bench.sft("sft_lora", &mut fit)?;
        bench.rollout(&fit.learner.frozen)?;
        bench.pgd(&fit.learner.frozen, &ON_ADAPTER)?;
        bench.grpo_update(&mut fit)?;
        for recipe in [RecipeName::AtSft, RecipeName::Trades] {
            bench.adversarial(recipe, &mut fit)?;
        }
    }
    if wants(ON_WEIGHTS) {
        let precision = bench.precision();
        let all = Assistant::load_adapted(&checkpoint, Adaptation::None, precision, &|_| true, &Device::Cpu)?;
        bench.sft(ON_WEIGHTS, &mut Fit::new(Student::new(all, None)?)?)?;
    }
    Ok(())
}

/// A tiny model from scratch, saved.
fn tiny_checkpoint(samples: &[Sample], dir: &Path) -> Result<PathBuf> {
    let dir = dir.join("model");
    Scratch::tiny().build(samples, &[PromptTemplate::Plain], 0, &|_| false, &Device::Cpu)?.save(&dir)?;
    Ok(dir)
}

/// Sixteen phantom questions.
fn phantoms(dir: &Path) -> Result<PathBuf> {
    let config = PhantomConfig { train: 160, validation: 0, test: 0, size: 64, ..PhantomConfig::default() };
    phantom::generate(&config, dir, &mut |_, _| {})?;
    Ok(dir.to_path_buf())
}

struct Bench<'a> {
    args: &'a Args,
    data: &'a Path,
    dataset: &'a Dataset,
    samples: &'a [Sample],
    wants: &'a dyn Fn(&str) -> bool,
}

/// A few questions ready for the model.
struct Asked {
    prompts: Vec<Prompt>,
    pixels: Tensor,
    answers: Vec<usize>,
    size: [usize; 2],
}

impl Bench<'_> {
    fn asked(&self, assistant: &Assistant, places: &[usize]) -> Result<Asked> {
        let (mut prompts, mut pixels, mut answers, mut size) = (Vec::new(), Vec::new(), Vec::new(), [0; 2]);
        for &place in places {
            let sample = &self.samples[place % self.samples.len()];
            let image = assistant.process(&decode_file(&self.data.join(&sample.image))?)?;
            let options: Vec<String> = LETTERS
                .iter()
                .zip(&sample.options)
                .map(|(letter, option)| {
                    format!(
                        "
{letter}) {option}"
                    )
                })
                .collect();
            let text = format!("{}{}\nAnswer with the letter.", sample.question, options.concat());
            prompts.push(assistant.prompt(&text, Some(image.grid))?);
            pixels.push(assistant.pixels(&image)?);
            answers.push(sample.answer);
            size = [image.resized.height, image.resized.width];
        }
        Ok(Asked { prompts, pixels: Tensor::cat(&pixels, 0)?, answers, size })
    }

    fn first(&self, assistant: &Assistant, count: usize) -> Result<Asked> {
        self.asked(assistant, &(0..count).collect::<Vec<_>>())
    }

    fn letters(assistant: &Assistant) -> Result<Vec<u32>> {
        let token = |letter: &&str| -> Result<u32> {
            assistant
                .tokenizer
                .encode(letter)?
                .first()
                .copied()
                .with_context(|| format!("no token for {letter}"))
        };
        LETTERS.iter().map(token).collect()
    }

    /// Times `work` after `warmup` calls and prints the line.
    fn measure(
        &self,
        name: &str,
        unit: &str,
        units: usize,
        work: &mut dyn FnMut() -> Result<()>,
    ) -> Result<()> {
        work()?;
        restart_peak_memory();
        let mut seconds = Vec::with_capacity(self.args.repeats);
        for _ in 0..self.args.repeats {
            let started = Instant::now();
            work()?;
            seconds.push(started.elapsed().as_secs_f64());
        }
        self.emit(name, unit, units, &seconds);
        Ok(())
    }

    /// The whole checkpoint, every weight read. The peak is that of the first time: later ones find memory of the ones
    /// before, which the allocator keeps.
    fn load(&self, checkpoint: &Path) -> Result<()> {
        let run = || -> Result<f64> {
            let started = Instant::now();
            let assistant = self.frozen(checkpoint)?;
            let seconds = started.elapsed().as_secs_f64();
            drop(assistant);
            Ok(seconds)
        };
        restart_peak_memory();
        run()?;
        let peak = peak_memory_mib();
        let seconds = (0..self.args.repeats).map(|_| run()).collect::<Result<Vec<_>>>()?;
        self.emit_with("load", "checkpoint", 1, &seconds, peak);
        Ok(())
    }

    fn emit(&self, name: &str, unit: &str, units: usize, seconds: &[f64]) {
        self.emit_with(name, unit, units, seconds, peak_memory_mib());
    }

    fn emit_with(&self, name: &str, unit: &str, units: usize, seconds: &[f64], peak: u64) {
        let mut each: Vec<f64> = seconds.iter().map(|s| s / units as f64).collect();
        each.sort_by(f64::total_cmp);
        println!(
            "{}",
            json!({
                "workload": name, "unit": unit, "units": units, "median_s": each[each.len() / 2], "all_s": each,
                "peak_rss_mb": peak, "threads": self.args.threads, "bf16": self.args.bf16,
            })
        );
    }

    fn precision(&self) -> Precision {
        if self.args.bf16 { Precision::HalfProducts } else { Precision::AsStored }
    }

    fn frozen(&self, checkpoint: &Path) -> Result<Assistant> {
        Ok(Assistant::load_adapted(checkpoint, Adaptation::None, self.precision(), &|_| false, &Device::Cpu)?)
    }

    fn memory(&self) -> Memory {
        if self.args.recompute { Memory::Recompute } else { Memory::Keep }
    }

    /// Vision tower and decoder on eight prompts, logits of every position.
    fn forward(&self, assistant: &Assistant) -> Result<()> {
        if !(self.wants)("forward") {
            return Ok(());
        }
        let count = 8;
        let asked = self.first(assistant, count)?;
        let none = vec![Vec::new(); count];
        self.measure("forward", "prompt", count, &mut || {
            let scoring = Scoring::new(assistant, &asked.prompts, &none)?;
            let features = policy::encode(assistant, std::slice::from_ref(&asked.pixels))?;
            let hidden = assistant.vlm.forward(Some(&features), &scoring.batch)?;
            let logits = assistant.vlm.logits(&hidden)?;
            ensure!(logits.dim(0)? == scoring.batch.input_ids.len());
            Ok(())
        })
    }

    /// One noisy forward for each draw, the class by the likelihood of the letters.
    fn certify(&self, assistant: &Assistant) -> Result<()> {
        for batch in [16, 32] {
            let name = format!("certify_b{batch}");
            if !(self.wants)(&name) {
                continue;
            }
            let asked = self.first(assistant, 1)?;
            let completions = Self::letters(assistant)?.into_iter().map(|id| vec![id]).collect();
            let classifier = QuestionClassifier {
                assistant,
                prompt: &asked.prompts[0],
                num_options: LETTERS.len(),
                reading: Reading::Likelihood { completions },
            };
            let image = asked.pixels.get(0)?;
            let mut start = 0;
            self.measure(&name, "draw", batch, &mut || {
                let draws = start..start + batch as u64;
                start = draws.end;
                count_draws(&classifier, &image, SIGMA, 0, 0, draws, batch)?;
                Ok(())
            })?;
        }
        Ok(())
    }

    /// PGD on the answer's letter, those workloads that are among `names`.
    fn pgd(&self, assistant: &Assistant, names: &[&str]) -> Result<()> {
        let letters = Self::letters(assistant)?;
        for (name, batch, steps) in [("pgd_b1", 1, 10), ("pgd_b4", 4, 10), ("grpo_attack_pgd5", 2, 5)] {
            if !names.contains(&name) || !(self.wants)(name) {
                continue;
            }
            let asked = self.first(assistant, batch)?;
            let aims = asked.prompts.iter().zip(&asked.answers).map(|(prompt, &answer)| {
                Aim::at_completion(prompt.clone(), asked.size, vec![letters[answer]], answer)
            });
            let target = Target {
                assistant,
                aims: aims.collect(),
                answers: &|_, items| Ok(vec![None; items.len()]),
                noise: None,
                draws_at_once: 1,
                memory: self.memory(),
            };
            let config = AttackConfig {
                epsilon: Fraction(EPSILON),
                step_size: Some(Fraction(2.0 / 255.0)),
                num_steps: steps,
                early_stop: false,
                output: PgdOutput::Last,
                ..AttackConfig::default()
            };
            let items: Vec<usize> = (0..batch).collect();
            let keys: Vec<u64> = (0..batch as u64).collect();
            let problem =
                Problem { clean: &asked.pixels, items: &items, keys: &keys, start: None, judge_8bit: false };
            let (unit, units) = if steps == 5 { ("step", 1) } else { ("image (10 steps)", batch) };
            self.measure(name, unit, units, &mut || {
                pgd(&target, &problem, &config, &mut |_| Ok(()))?;
                Ok(())
            })?;
        }
        Ok(())
    }

    /// Greedy decoding, prefill subtracted.
    fn generate(&self, assistant: &Assistant) -> Result<()> {
        for batch in [1, 8] {
            let name = format!("generate_b{batch}");
            if !(self.wants)(&name) {
                continue;
            }
            let asked = self.first(assistant, batch)?;
            let run = |new_tokens: usize| -> Result<f64> {
                let decoding = Decoding::greedy(new_tokens, Vec::new());
                let started = Instant::now();
                let features = policy::encode(assistant, std::slice::from_ref(&asked.pixels))?;
                policy::sample(assistant, &asked.prompts, Some(&features), &vec![vec![0]; batch], &decoding)?;
                Ok(started.elapsed().as_secs_f64())
            };
            run(4)?;
            let mut first = f64::INFINITY;
            for _ in 0..self.args.repeats {
                first = first.min(run(1)?);
            }
            restart_peak_memory();
            let seconds =
                (0..self.args.repeats).map(|_| Ok(run(NEW_TOKENS)? - first)).collect::<Result<Vec<_>>>()?;
            self.emit(&name, "token (decode only)", batch * (NEW_TOKENS - 1), &seconds);
        }
        Ok(())
    }

    fn group(assistant: &Assistant, asked: &Asked, features: &Features) -> Result<Vec<Vec<Vec<u32>>>> {
        let decoding =
            Decoding { sampling: SamplingConfig::at(1.0), ..Decoding::greedy(NEW_TOKENS, Vec::new()) };
        let seeds: Vec<Vec<u64>> =
            (0..asked.prompts.len() as u64).map(|p| (p * 8..p * 8 + 8).collect()).collect();
        let groups = policy::sample(assistant, &asked.prompts, Some(features), &seeds, &decoding)?;
        Ok(groups.into_iter().map(|group| group.into_iter().map(|c| c.ids).collect()).collect())
    }

    /// Two prompts, eight completions of 64 tokens each.
    fn rollout(&self, assistant: &Assistant) -> Result<()> {
        if !(self.wants)("grpo_rollout") {
            return Ok(());
        }
        let asked = self.first(assistant, 2)?;
        self.measure("grpo_rollout", "step", 1, &mut || {
            let features = policy::encode(assistant, std::slice::from_ref(&asked.pixels))?;
            let groups = Self::group(assistant, &asked, &features)?;
            ensure!(groups.iter().flatten().all(|ids| ids.len() == NEW_TOKENS));
            Ok(())
        })
    }

    /// One step of what trains on four questions with a reasoning each.
    fn sft(&self, name: &str, fit: &mut Fit<Student>) -> Result<()> {
        if !(self.wants)(name) {
            return Ok(());
        }
        let asked = self.first(&fit.learner.frozen, 4)?;
        let mut targets = Vec::new();
        for sample in self.samples.iter().take(4) {
            let text = format!(
                "<think>The image shows a region with increased signal intensity in the left lower part. Compare the options: {}. The findings are consistent with {}.</think> <answer>{}</answer>",
                sample.options.join(", "),
                sample.options[sample.answer],
                LETTERS[sample.answer],
            );
            targets.push(vec![fit.learner.assistant.target(&text)?]);
        }
        self.step(name, fit, &asked, None, &targets, &|spans: usize| vec![-1.0 / spans as f32; spans])
    }

    /// One step of a recipe that trains on attacked images, as `safemed train` takes it: PGD of three steps on four questions,
    /// all of them attacked with the full budget, and the update.
    fn adversarial(&self, recipe: RecipeName, fit: &mut Fit<Student>) -> Result<()> {
        if !(self.wants)(recipe.word()) {
            return Ok(());
        }
        let adversary = AdversaryConfig {
            clean_fraction: 0.0,
            epsilon_schedule: RampName::Constant,
            ..AdversaryConfig::default()
        };
        let config = TrainConfig {
            recipe,
            batch_size: 4,
            learning_rate: 1e-5,
            recompute: self.args.recompute,
            adversary,
            ..TrainConfig::default()
        };
        let images = Images::new(self.dataset);
        let lesson = Lesson {
            samples: self.samples,
            images: &images,
            template: PromptTemplate::Plain,
            config: &config,
            seed: 0,
            features: None,
            evidence: Evidence::default(),
            exit: Exit::default(),
        };
        self.measure(recipe.word(), "optimiser step", 1, &mut || {
            let report = if recipe == RecipeName::Trades {
                trades::step(&lesson, fit)?
            } else {
                sft::step(&lesson, fit, true)?
            };
            ensure!(report.num_tokens > 0);
            Ok(())
        })
    }

    /// Log-probabilities of two groups of eight, the loss's slopes, an update.
    fn grpo_update(&self, fit: &mut Fit<Student>) -> Result<()> {
        if !(self.wants)("grpo_update") {
            return Ok(());
        }
        let asked = self.first(&fit.learner.frozen, 2)?;
        // A frozen tower has seen these images in the rollout: the update goes on from there, as `safemed train` does.
        let features = policy::encode(&fit.learner.frozen, std::slice::from_ref(&asked.pixels))?;
        let groups = Self::group(&fit.learner.frozen, &asked, &features)?;
        // On the policy that sampled, the surrogate's slope is minus the advantage over the number of tokens.
        let slopes = |count: usize| {
            (0..count).map(|token| -((token / NEW_TOKENS) as f32 * 0.7).sin() / count as f32).collect()
        };
        self.step("grpo_update", fit, &asked, Some(&features), &groups, &slopes)
    }

    fn step(
        &self,
        name: &str,
        fit: &mut Fit<Student>,
        asked: &Asked,
        features: Option<&Features>,
        completions: &[Vec<Vec<u32>>],
        slopes: &dyn Fn(usize) -> Vec<f32>,
    ) -> Result<()> {
        let settings = TrainConfig { learning_rate: 1e-5, ..TrainConfig::default() };
        let memory = self.memory();
        self.measure(name, "optimiser step", 1, &mut || {
            let scoring = Scoring::new(&fit.learner.assistant, &asked.prompts, completions)?;
            let pixels = [asked.pixels.clone()];
            let plan =
                fit.learner.assistant.vlm.vision_plan(&policy::grids_of(&fit.learner.assistant, &pixels)?)?;
            let (mut stages, inputs) = match features {
                Some(features) => (Vec::new(), features.clone().into_state()),
                None => (fit.learner.assistant.vlm.vision_stages(&plan), pixels.to_vec()),
            };
            stages.extend(scoring.stages(&fit.learner.assistant));
            let loss = |state: &[Tensor]| {
                let log_probs = scoring.log_probs(&fit.learner.assistant, &state[0], 1.0)?;
                let slopes = Tensor::from_vec(slopes(log_probs.dims1()?), log_probs.dims1()?, &Device::Cpu)?;
                (log_probs * slopes)?.sum_all()
            };
            let (_, gradients) = loss_and_gradients(&stages, &inputs, loss, &fit.wanted(), memory)?;
            drop(stages);
            fit.update(&gradients, &settings)?;
            Ok(())
        })
    }
}

/// Peak resident memory in MiB, weights included; 0 where the system does not tell.
fn peak_memory_mib() -> u64 {
    peak_memory_bytes().unwrap_or(0) >> 20
}
