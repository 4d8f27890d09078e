//! The whole pipeline on phantoms: data, a model from scratch, four trainings, and each model clean, attacked and
//! certified beside its image-blind controls.
//!
//! Every part is an ordinary run in `runs/`, by the same functions as the commands; a part that is complete is not
//! done again, so that an interrupted demo goes on where it stopped. Parts that do not need each other run side by side.

use super::board::{self, Part, Work};
use super::config::{Command, ObjectiveName, RecipeName, RunConfig, Space, TargetName, TrainConfig};
use super::eval::{self, EvalSettings};
use super::job::{Job, Outcome};
use super::progress::Progress;
use super::report::{self, ReportOptions};
use super::run::{Opening, Run, write_atomic};
use super::scratch::Scratch;
use super::{attack, certify, train};
use crate::data::phantom::{self, PhantomConfig};
use crate::data::prompt::PromptTemplate;
use crate::data::{Dataset, ImageCheck};
use crate::error::{Error, Result};
use crate::model::assistant::Assistant;
use serde_json::{Value, json};
use std::fmt::Write as _;
use std::path::PathBuf;
use std::sync::{Mutex, PoisonError};

/// One training of the demo.
#[derive(Debug, Clone)]
struct Training {
    name: &'static str,
    /// The training whose model it starts from.
    from: &'static str,
    /// Done first, from there; this one goes on from its model.
    warm_up: Option<Box<Training>>,
    settings: TrainConfig,
    /// Core-seconds it is expected to take, for the progress.
    weight: f64,
}

/// How much of everything; chosen on the validation split.
#[derive(Debug, Clone)]
struct Plan {
    data: PhantomConfig,
    captions: Training,
    base: Training,
    others: Vec<Training>,
    /// L-inf budget of attacks in training and test.
    epsilon: f64,
    /// Steps of the strong attack.
    attack_steps: usize,
    /// Budgets of the accuracy curve, in units of 1/255.
    curve: Vec<u32>,
    num_curve: usize,
    num_certified: usize,
    draws: [usize; 2],
}

/// Standard deviation of the certificates' noise.
const SIGMA: f64 = 0.25;
/// Longest completion: the right ones have fourteen tokens.
const MAX_NEW_TOKENS: usize = 16;

/// `safemed demo`.
///
/// # Errors
/// What any of the parts refuses.
pub fn demo(job: &Job<'_>, is_quick: bool) -> Result<Outcome> {
    let out = job.config.out.clone().unwrap_or_else(|| PathBuf::from("demo"));
    let demo = Demo { job, out, plan: plan(job.config.seed, is_quick), rows: Mutex::default() };
    demo.claim(is_quick)?;
    if is_quick {
        job.progress
            .note("--quick: fewer steps, questions and draws; the numbers are looser than the full demo's");
    }
    demo.make_data()?;
    demo.make_start()?;
    demo.head();
    for training in [&demo.plan.captions, &demo.plan.base] {
        demo.train(training, job.progress)?;
    }
    let parts = demo.parts();
    let threads = job.config.threads.unwrap_or_else(super::run::all_threads);
    board::run_all(&parts, threads, job.progress, "training and measuring")?;
    demo.finish(is_quick)
}

fn plan(seed: u64, is_quick: bool) -> Plan {
    let epsilon = 8.0 / 255.0;
    let steps = |full: usize, quick: usize| if is_quick { quick } else { full };
    let base = TrainConfig {
        permute_options: true,
        beta2: 0.98,
        warmup_steps: 50,
        min_learning_rate_ratio: 0.05,
        save_every: 200,
        keep_checkpoints: 1,
        ..TrainConfig::default()
    };
    let captions = TrainConfig {
        captions: true,
        num_steps: steps(300, 250),
        batch_size: 64,
        learning_rate: 4e-3,
        weight_decay: 0.02,
        ..base.clone()
    };
    let sft = TrainConfig {
        num_steps: steps(1650, 900),
        batch_size: 32,
        learning_rate: 2.5e-3,
        weight_decay: 0.02,
        ..base.clone()
    };
    let instruct = TrainConfig {
        target: TargetName::Instruct,
        num_steps: steps(1000, 300),
        learning_rate: 2e-3,
        ..sft.clone()
    };
    // Letters right after the question are learnt from words first: from images alone they stay at chance for long.
    let instruct_captions =
        TrainConfig { captions: true, num_steps: 250, batch_size: 64, ..instruct.clone() };
    let mut at_sft = TrainConfig {
        recipe: RecipeName::AtSft,
        num_steps: steps(600, 250),
        batch_size: 24,
        learning_rate: 1e-3,
        warmup_steps: 20,
        ..base
    };
    at_sft.adversary.epsilon = epsilon;
    at_sft.adversary.num_steps = 2;
    let mut at_grpo = TrainConfig {
        recipe: RecipeName::AtGrpo,
        num_steps: steps(1300, 320),
        learning_rate: 8e-4,
        ..at_sft.clone()
    };
    at_grpo.grpo.temperature = 1.5;
    at_grpo.grpo.format_weight = 0.2;
    let training = |name, from, settings: TrainConfig, seconds: f64| Training {
        name,
        from,
        warm_up: None,
        weight: settings.num_steps as f64 * seconds,
        settings,
    };
    Plan {
        data: PhantomConfig {
            seed,
            size: 64,
            contrast: 1.5,
            train: steps(20_000, 8_000),
            validation: 320,
            test: steps(320, 160),
        },
        captions: training("captions", "start", captions, 0.04),
        base: training("sft_cot", "captions", sft, 0.08),
        others: vec![
            training("at_grpo", "sft_cot", at_grpo, 0.25),
            training("at_sft", "sft_cot", at_sft, 0.2),
            Training {
                warm_up: Some(Box::new(training("instruct_captions", "sft_cot", instruct_captions, 0.04))),
                ..training("sft_instruct", "sft_cot", instruct, 0.08)
            },
        ],
        epsilon,
        attack_steps: steps(50, 20),
        curve: if is_quick { Vec::new() } else { vec![2, 4, 16] },
        num_curve: 96,
        num_certified: steps(64, 32),
        draws: [32, steps(320, 100)],
    }
}

struct Demo<'a> {
    job: &'a Job<'a>,
    out: PathBuf,
    plan: Plan,
    rows: Mutex<Vec<(String, Value)>>,
}

impl Demo<'_> {
    /// Takes the output directory, or refuses one that holds something else.
    fn claim(&self, is_quick: bool) -> Result<()> {
        let mark = self.out.join("demo.json");
        let own = format!("{}\n", json!({"seed": self.job.config.seed, "quick": is_quick}));
        match std::fs::read_to_string(&mark) {
            Ok(found) if found == own => return Ok(()),
            Ok(_) => {
                return Err(Error::usage(format!(
                    "the directory holds a demo with other settings\n  --> {}\n   = help: name another with `--out`",
                    self.out.display()
                )));
            }
            Err(_) => {}
        }
        let is_empty = std::fs::read_dir(&self.out).map_or(true, |mut entries| entries.next().is_none());
        if !is_empty {
            return Err(Error::usage(format!(
                "the directory is not empty and holds no demo\n  --> {}\n   = help: name another with `--out`",
                self.out.display()
            )));
        }
        std::fs::create_dir_all(&self.out)
            .map_err(|error| Error::io("cannot create the directory", &self.out, error))?;
        write_atomic(&mark, own.as_bytes())
    }

    fn make_data(&self) -> Result<()> {
        let config = &self.plan.data;
        let progress = self.job.progress;
        progress.start(config.train + config.validation + config.test, 0, "phantoms");
        phantom::generate(config, &self.out.join("data"), &mut |done, _| progress.tick(done, &[]))?;
        progress.finish();
        Ok(())
    }

    /// The model before training.
    fn make_start(&self) -> Result<()> {
        let dir = self.out.join("runs/start/checkpoints/step-0");
        if dir.join("chat_template.jinja").exists() {
            return Ok(());
        }
        let dataset = self.config("train").data.dataset().load(ImageCheck::Ignore)?;
        let templates = [PromptTemplate::PhantomCot, PromptTemplate::Phantom];
        let device = self.job.config.backend().device()?;
        let few = &dataset.samples[..dataset.samples.len().min(4000)];
        let assistant = Scratch::tiny().build(few, &templates, self.job.config.seed, &|_| true, &device)?;
        let (count, _) = assistant.vlm.parameters().count();
        self.job
            .progress
            .note(&format!("a model from scratch: {count} parameters, {} tokens", assistant.tokenizer.len()));
        assistant.save(&dir)
    }

    fn config(&self, split: &str) -> RunConfig {
        let mut config = self.job.config.clone();
        // Every model of a demo is a directory of its own.
        config.revision = None;
        let data = self.out.join("data");
        config.data.split = Some(data.join(format!("splits/{split}.json")));
        config.data.train_split = Some(data.join("splits/train.json"));
        config.data.omnimedvqa = Some(data);
        config.max_new_tokens = MAX_NEW_TOKENS;
        config.batch_size = 32;
        config.threads = Some(1);
        config
    }

    fn run_dir(&self, name: &str) -> PathBuf {
        self.out.join("runs").join(name)
    }

    fn model_of(&self, training: &Training) -> PathBuf {
        let step = format!("step-{}", training.settings.num_steps);
        self.run_dir(training.name).join("checkpoints").join(step)
    }

    /// Opens a part's run, unless it is complete: then gives its summary.
    fn open(
        &self,
        command: Command,
        config: &RunConfig,
        name: &str,
    ) -> Result<std::result::Result<Run, Value>> {
        let done = self.run_dir(name).join("summary.json");
        if let Ok(text) = std::fs::read_to_string(&done) {
            let summary = serde_json::from_str(&text)
                .map_err(|error| Error::data(format!("not valid JSON: {error}\n  --> {}", done.display())))?;
            return Ok(Err(summary));
        }
        let opening = Opening {
            resume: true,
            command_line: self.job.command_line.clone(),
            stop: self.job.stop.clone(),
        };
        let config = RunConfig { out: Some(self.run_dir(name)), ..config.clone() };
        Run::open(command, &config, opening).map(Ok)
    }

    fn train(&self, training: &Training, progress: &dyn Progress) -> Result<()> {
        let mut config = self.config("train");
        let from = if let Some(first) = &training.warm_up {
            self.train(first, progress)?;
            self.model_of(first)
        } else {
            [&self.plan.captions, &self.plan.base]
                .into_iter()
                .find(|earlier| earlier.name == training.from)
                .map_or_else(|| self.run_dir("start/checkpoints/step-0"), |earlier| self.model_of(earlier))
        };
        config.model = Some(from.display().to_string());
        prompt_of(training).clone_into(&mut config.prompt);
        config.train = training.settings.clone();
        if let Ok(mut run) = self.open(Command::Train, &config, training.name)? {
            train::run_training(&config, &mut run, progress)?;
        }
        self.publish(training)
    }

    /// The finished model as a Hugging Face directory, without the optimiser.
    fn publish(&self, training: &Training) -> Result<()> {
        if training.settings.captions {
            return Ok(());
        }
        let (from, to) = (self.model_of(training), self.out.join("models").join(training.name));
        std::fs::create_dir_all(&to).map_err(|error| Error::io("cannot create the directory", &to, error))?;
        let entries = std::fs::read_dir(&from)
            .map_err(|error| Error::io("cannot read the checkpoint", &from, error))?;
        for entry in entries {
            let path = entry.map_err(|error| Error::io("cannot read the checkpoint", &from, error))?.path();
            let Some(name) =
                path.file_name().filter(|name| *name != "optimizer.safetensors" && *name != "state.json")
            else {
                continue;
            };
            std::fs::copy(&path, to.join(name)).map_err(|error| Error::io("cannot copy", &path, error))?;
        }
        Ok(())
    }

    /// Everything that may run side by side, the longest chains first.
    fn parts(&self) -> Vec<Part<'_>> {
        let mut parts: Vec<Part<'_>> = Vec::new();
        let base = &self.plan.base;
        for training in &self.plan.others {
            parts.push(Part {
                name: training.name.to_owned(),
                after: None,
                weight: training.weight,
                work: Box::new(move |progress| self.train(training, progress)),
            });
            if parts.len() == 1 {
                self.measurements(base, None, &mut parts);
            }
        }
        for training in &self.plan.others {
            let after = parts.iter().position(|part| part.name == training.name);
            self.measurements(training, after, &mut parts);
        }
        parts
    }

    fn measurements<'s>(&'s self, training: &'s Training, after: Option<usize>, parts: &mut Vec<Part<'s>>) {
        let mut add = |what: &str, weight: f64, work: Work<'s>| {
            parts.push(Part { name: format!("{} {what}", training.name), after, weight, work });
        };
        let steps = self.plan.attack_steps as f64;
        add("attack", 1.6 * steps, Box::new(move |progress| self.attack(training, progress)));
        let draws = self.plan.draws.iter().sum::<usize>() * self.plan.num_certified;
        add("certify", draws as f64 * 1e-3, Box::new(move |progress| self.certify(training, progress)));
        add("eval", 3.0, Box::new(move |progress| self.eval(training, progress)));
        for &levels in &self.plan.curve {
            add("curve", 8.0, Box::new(move |progress| self.curve(training, levels, progress)));
        }
    }

    fn loaded(&self, training: &Training, config: &RunConfig) -> Result<(Assistant, Dataset)> {
        let device = config.backend().device()?;
        let assistant = Assistant::load(&self.model_of(training), &|_| false, &device)?;
        Ok((assistant, config.data.dataset().load(ImageCheck::Exist)?))
    }

    fn measuring(&self, training: &Training) -> RunConfig {
        let mut config = self.config("test");
        config.model = Some(self.model_of(training).display().to_string());
        prompt_of(training).clone_into(&mut config.prompt);
        config
    }

    fn attack(&self, training: &Training, progress: &dyn Progress) -> Result<()> {
        let mut config = self.measuring(training);
        config.attack.epsilon = self.plan.epsilon;
        config.attack.num_steps = self.plan.attack_steps;
        config.attack.step_size = Some(self.plan.epsilon / 5.0);
        config.attack.objective = ObjectiveName::All;
        config.attack.space = Space::Model;
        let summary = self.attacked(training, &config, &format!("{}-attack", training.name), progress)?;
        self.measured(training, "attack", summary, progress);
        Ok(())
    }

    /// One point of accuracy against budget: a plain PGD-10 on fewer questions, cheaper than the strong attack and so an
    /// upper bound.
    fn curve(&self, training: &Training, levels: u32, progress: &dyn Progress) -> Result<()> {
        let mut config = self.measuring(training);
        config.attack.epsilon = f64::from(levels) / 255.0;
        config.attack.space = Space::Model;
        config.data.limit = Some(self.plan.num_curve);
        // The strong attack at the full budget is the one examined.
        config.attack.verdict_items = 0;
        let name = format!("{}-attack-{levels}", training.name);
        self.attacked(training, &config, &name, progress).map(|_| ())
    }

    fn attacked(
        &self,
        training: &Training,
        config: &RunConfig,
        name: &str,
        progress: &dyn Progress,
    ) -> Result<Value> {
        let mut run = match self.open(Command::Attack, config, name)? {
            Ok(run) => run,
            Err(summary) => return Ok(summary),
        };
        let (assistant, dataset) = self.loaded(training, config)?;
        attack::under_attack(&assistant, &dataset, None, &attack::Setting::of(config)?, &mut run, progress)
    }

    fn certify(&self, training: &Training, progress: &dyn Progress) -> Result<()> {
        let mut config = self.measuring(training);
        config.certify.sigma = Some(SIGMA);
        [config.certify.n0, config.certify.n] = self.plan.draws;
        config.data.limit = Some(self.plan.num_certified);
        let summary = match self.open(Command::Certify, &config, &format!("{}-certify", training.name))? {
            Ok(mut run) => {
                let (assistant, dataset) = self.loaded(training, &config)?;
                let setting = certify::setting_of(&config, &self.model_of(training))?;
                certify::smoothed(&assistant, &dataset, None, &setting, &mut run, progress)?
            }
            Err(summary) => summary,
        };
        self.measured(training, "certify", summary, progress);
        Ok(())
    }

    fn eval(&self, training: &Training, progress: &dyn Progress) -> Result<()> {
        let config = self.measuring(training);
        let summary = match self.open(Command::Eval, &config, &format!("{}-eval", training.name))? {
            Ok(mut run) => {
                let (assistant, dataset) = self.loaded(training, &config)?;
                let seen = config.data.dataset().load_train()?;
                let settings = EvalSettings::of(&config)?;
                eval::evaluate(&assistant, &dataset, seen.as_ref(), &settings, &mut run, progress)?
            }
            Err(summary) => summary,
        };
        self.measured(training, "eval", summary, progress);
        Ok(())
    }

    /// Keeps a measurement, and shows the model's row once all three are there.
    fn measured(&self, training: &Training, what: &str, summary: Value, progress: &dyn Progress) {
        let name = training.name;
        let row = {
            let mut rows = self.rows.lock().unwrap_or_else(PoisonError::into_inner);
            rows.push((format!("{name} {what}"), summary));
            let find = |what: &str| rows.iter().find(|(key, _)| *key == format!("{name} {what}"));
            match (find("eval"), find("attack"), find("certify")) {
                (Some((_, eval)), Some((_, attack)), Some((_, certify))) => {
                    Some(row_of(name, eval, attack, certify))
                }
                _ => None,
            }
        };
        if let Some(row) = row {
            progress.row(&cells_of(&row));
        }
    }

    fn head(&self) {
        let head = ["model", "clean", "attacked", "certified", "blank", "shuffled", "prior"];
        self.job.progress.row(&head.map(str::to_owned));
    }

    fn finish(&self, is_quick: bool) -> Result<Outcome> {
        let rows = self.rows.lock().unwrap_or_else(PoisonError::into_inner);
        let find = |key: String| rows.iter().find(|(found, _)| *found == key).map(|(_, summary)| summary);
        let mut table = Vec::new();
        let mut dirs = Vec::new();
        for name in ["sft_cot", "at_sft", "at_grpo", "sft_instruct"] {
            let parts = ["eval", "attack", "certify"].map(|what| find(format!("{name} {what}")));
            if let [Some(eval), Some(attack), Some(certify)] = parts {
                table.push(row_of(name, eval, attack, certify));
            }
            dirs.push(self.run_dir(name));
            let curve = self.plan.curve.iter().map(|levels| format!("{name}-attack-{levels}"));
            let measured = ["eval", "attack", "certify"].map(|what| format!("{name}-{what}"));
            dirs.extend(measured.into_iter().chain(curve).map(|name| self.run_dir(&name)));
        }
        let n = table.first().map_or(json!(0), |row| row["n"].clone());
        let summary = json!({
            "command": Command::Demo.word(),
            "n": n,
            "seed": self.job.config.seed,
            "quick": is_quick,
            "epsilon": self.plan.epsilon,
            "rows": table,
        });
        write_atomic(&self.out.join("summary.json"), format!("{summary:#}\n").as_bytes())?;
        let options = ReportOptions {
            out: Some(self.out.clone()),
            title: Some("safemed demo".to_owned()),
            images: self.job.config.images,
        };
        report::report(&dirs, &options, self.job.progress)?;
        let text = format!(
            "attacked: L-inf {}/255, worst of four objectives, {} steps, on {} held-out questions; certified: L2 radius {SIGMA} at sigma {SIGMA} on {} of them, {} draws each; an L2 certificate says nothing about the L-inf budget\nreport: {}\n",
            (self.plan.epsilon * 255.0).round(),
            self.plan.attack_steps,
            n,
            self.plan.num_certified,
            self.plan.draws.iter().sum::<usize>(),
            self.out.join("report.html").display(),
        );
        Ok(Outcome::new(summary, text))
    }
}

fn row_of(name: &str, eval: &Value, attack: &Value, certify: &Value) -> Value {
    json!({
        "name": name,
        "n": attack["n"],
        "clean_accuracy": attack["clean_accuracy"],
        "robust_accuracy": attack["robust_accuracy"],
        "robust_accuracy_interval": attack["accuracy_interval"],
        "unparsable": attack["unparsable"],
        "verdict": attack["verdict"],
        "certified_accuracy": certify["certified_accuracy"],
        "abstention_rate": certify["abstention_rate"],
        "n_certified": certify["n"],
        "controls": eval["controls"],
    })
}

fn cells_of(row: &Value) -> Vec<String> {
    let share = |value: &Value| {
        value.as_f64().map_or_else(|| "-".to_owned(), |value| format!("{:.1} %", 100.0 * value))
    };
    let at_sigma = row["certified_accuracy"]
        .as_array()
        .and_then(|points| points.iter().find(|point| point[0].as_f64() == Some(SIGMA)))
        .map_or(Value::Null, |point| point[1].clone());
    let controls = &row["controls"];
    let mut cells = vec![row["name"].as_str().unwrap_or_default().to_owned()];
    cells.extend(
        [
            &row["clean_accuracy"],
            &row["robust_accuracy"],
            &at_sigma,
            &controls["blank_image"],
            &controls["shuffled_image"],
            &controls["option_prior"],
        ]
        .map(share),
    );
    // Robust accuracy never stands without what was found about the attack.
    let _ = write!(cells[2], " {}", row["verdict"].as_str().unwrap_or_default());
    cells
}

fn prompt_of(training: &Training) -> &'static str {
    match training.settings.target {
        TargetName::Cot => "phantom_cot",
        TargetName::Instruct => "phantom",
    }
}
