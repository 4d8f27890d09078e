//! How time and memory grow: with the image, the sequence, the group, the draws, the depth and the threads.
//!
//! ```text
//! cargo bench --bench scaling                       # every law, a table on standard output
//! cargo bench --bench scaling -- --svg scaling.svg  # and a picture
//! ```
//!
//! Every point is a process of its own, so that its peak memory is its own. `work` is the number of multiply-adds that the
//! shapes ask for; a law that grows faster than its work is a defect.

#![expect(clippy::print_stdout, reason = "a benchmark's result is what it prints")]

use anyhow::{Context, Result, ensure};
use candle_core::{Device, Tensor};
use clap::Parser;
use plotters::coord::Shift;
use plotters::prelude::{
    ChartBuilder, Circle, Color, DrawingArea, IntoDrawingArea, LineSeries, RGBColor, SVGBackend,
};
use safemed::attack::{AttackConfig, PgdOutput, Problem, pgd};
use safemed::backend::{peak_memory_bytes, restart_peak_memory, with_threads};
use safemed::certify::count_draws;
use safemed::data::prompt::PromptTemplate;
use safemed::error;
use safemed::model::assistant::Assistant;
use safemed::model::config::{ModelSizes, VlmConfig};
use safemed::model::generate::Prompt;
use safemed::model::loader::{Adaptation, Precision};
use safemed::model::lora::{LoraConfig, Modules};
use safemed::model::sampling::{Decoding, SamplingConfig};
use safemed::model::vlm::Batch;
use safemed::nn::attention::Layout;
use safemed::nn::recompute::{Memory, loss_and_gradients};
use safemed::recipes::config::TrainConfig;
use safemed::recipes::fit::{Fit, Student};
use safemed::recipes::scratch::Scratch;
use safemed::rng;
use safemed::roles::classifier::{QuestionClassifier, Reading};
use safemed::roles::policy::{self, Scoring};
use safemed::roles::target::{Aim, Target};
use serde::{Deserialize, Serialize};
use std::path::{Path, PathBuf};
use std::process::Command;
use std::time::Instant;

#[path = "../src/process.rs"]
mod process;

/// The allocator of the program.
#[global_allocator]
static ALLOCATOR: mimalloc::MiMalloc = mimalloc::MiMalloc;

/// What grows, what is timed while it does, and where.
const LAWS: [(&str, &str, &[usize]); 9] = [
    ("image side", "PGD, 3 steps", &[112, 224, 336, 448, 672]),
    ("image side, recomputed", "PGD, 3 steps", &[112, 224, 336, 448, 672]),
    ("prompt tokens", "prefill", &[256, 512, 1024, 2048, 4096]),
    ("completion tokens", "SFT step, batch 2", &[64, 128, 256, 512, 1024]),
    ("group size", "rollout and update, 32 tokens", &[2, 4, 8, 16, 32]),
    ("draws", "certification, batch 32", &[32, 64, 128, 256, 512]),
    ("decoder layers", "PGD, 3 steps", &[2, 4, 8, 16, 32]),
    ("decoder layers, recomputed", "PGD, 3 steps", &[2, 4, 8, 16, 32]),
    ("threads", "PGD, 3 steps", &[1, 2]),
];
/// Decoder layers, image side and threads where they do not grow.
const LAYERS: usize = 4;
const SIDE: usize = 224;
const THREADS: usize = 2;

#[derive(Parser, Debug)]
struct Args {
    /// Laws whose name begins with this.
    #[arg(long, default_value = "")]
    only: String,
    /// Timed calls at each point; the least counts.
    #[arg(long, default_value_t = 3)]
    repeats: usize,
    /// A picture of all laws.
    #[arg(long)]
    svg: Option<PathBuf>,
    /// One point, in a process of its own: the law and its place.
    #[arg(long, num_args = 2, hide = true)]
    point: Vec<String>,
    /// Makes a model of so many decoder layers in a directory, and ends: what that takes is no part of a point's memory.
    #[arg(long, num_args = 2, value_names = ["LAYERS", "DIR"], hide = true)]
    make: Vec<String>,
    /// What `cargo bench` passes.
    #[arg(long, hide = true)]
    bench: bool,
}

/// What one process measured.
#[derive(Debug, Clone, Copy, Serialize, Deserialize)]
struct Point {
    at: usize,
    seconds: f64,
    /// Peak resident memory, weights included, in MiB; 0 where the system does not tell.
    mib: f64,
    /// Multiply-adds.
    work: f64,
}

fn main() -> Result<()> {
    process::prepare();
    let args = Args::parse();
    if let [layers, dir] = args.make.as_slice() {
        let scratch = Scratch { sizes: sizes(layers.parse()?), ..Scratch::tiny() };
        let made = scratch.build(&[], &[PromptTemplate::default()], 0, &|_| false, &Device::Cpu)?;
        return Ok(made.save(Path::new(dir))?);
    }
    match args.point.as_slice() {
        [law, at] => {
            let at: usize = at.parse()?;
            let threads = if law == "threads" { at } else { THREADS };
            let point =
                with_threads(Some(threads), || measure(law, at, args.repeats).map_err(error::Error::Other))?;
            println!("{}", serde_json::to_string(&point)?);
            Ok(())
        }
        _ => run(&args),
    }
}

fn run(args: &Args) -> Result<()> {
    let mut laws: Vec<(&str, &str, Vec<Point>)> = Vec::new();
    println!(
        "| grows | timed | places | seconds | MiB | work | time ~ place^ | time ~ work^ | memory ~ place^ |"
    );
    println!("|---|---|---|---|---|---|---|---|---|");
    for (law, what, places) in LAWS.iter().filter(|(law, ..)| law.starts_with(&args.only)) {
        let points = places.iter().map(|&at| child(law, at, args.repeats)).collect::<Result<Vec<Point>>>()?;
        let list = |value: &dyn Fn(&Point) -> String| points.iter().map(value).collect::<Vec<_>>().join(" ");
        println!(
            "| {law} | {what} | {} | {} | {} | {} | {:.2} | {:.2} | {:.2} |",
            list(&|point| point.at.to_string()),
            list(&|point| format!("{:.3}", point.seconds)),
            list(&|point| format!("{:.0}", point.mib)),
            list(&|point| format!("{:.2e}", point.work)),
            exponent(&points, |point| point.at as f64, |point| point.seconds),
            exponent(&points, |point| point.work, |point| point.seconds),
            exponent(&points, |point| point.at as f64, |point| point.mib.max(1.0)),
        );
        laws.push((law, what, points));
    }
    match &args.svg {
        Some(path) => draw(path, &laws),
        None => Ok(()),
    }
}

fn child(law: &str, at: usize, repeats: usize) -> Result<Point> {
    let said = of_itself(&["--point", law, &at.to_string(), "--repeats", &repeats.to_string()])?;
    serde_json::from_slice(&said).with_context(|| format!("{law} at {at}"))
}

/// What this program says when it is run with these words.
fn of_itself(words: &[&str]) -> Result<Vec<u8>> {
    let done = Command::new(std::env::current_exe()?).args(words).output()?;
    ensure!(done.status.success(), "{words:?}: {}", String::from_utf8_lossy(&done.stderr));
    Ok(done.stdout)
}

/// Slope of a straight line through the logarithms of the larger half of the points, where constants matter least.
fn exponent(points: &[Point], x: impl Fn(&Point) -> f64, y: impl Fn(&Point) -> f64) -> f64 {
    let upper = &points[(points.len() - 1) / 2..];
    let logs: Vec<(f64, f64)> = upper.iter().map(|point| (x(point).ln(), y(point).ln())).collect();
    let mean = |f: fn(&(f64, f64)) -> f64| logs.iter().map(f).sum::<f64>() / logs.len() as f64;
    let (mx, my) = (mean(|p| p.0), mean(|p| p.1));
    let (above, below) = logs
        .iter()
        .fold((0.0, 0.0), |(above, below), (x, y)| (above + (x - mx) * (y - my), below + (x - mx).powi(2)));
    if below == 0.0 { 0.0 } else { above / below }
}

/// A model between the demo's and the benchmarks': 256 wide in the decoder, 192 in the vision tower.
fn sizes(num_layers: usize) -> ModelSizes {
    ModelSizes {
        vocab_size: 0,
        hidden_size: 256,
        intermediate_size: 704,
        num_layers,
        num_heads: 4,
        num_kv_heads: 2,
        head_dim: 64,
        vision_depth: 4,
        vision_hidden_size: 192,
        vision_intermediate_size: 512,
        vision_num_heads: 3,
        patch_size: 14,
        spatial_merge_size: 2,
        position_side: 16,
        deepstack_layers: Vec::new(),
        window_size: 112,
        full_attention_blocks: Vec::new(),
        max_position_embeddings: 8192,
        tie_word_embeddings: true,
    }
}

fn model(dir: &Path, num_layers: usize, adapted: bool) -> Result<Assistant> {
    of_itself(&["--make", &num_layers.to_string(), dir.to_str().context("a directory with an odd name")?])?;
    let config = adapter();
    let adaptation = if adapted { Adaptation::New { config: &config, seed: 0 } } else { Adaptation::None };
    let trains = |name: &str| name.contains(".lora_");
    Ok(Assistant::load_adapted(dir, adaptation, Precision::AsStored, &trains, &Device::Cpu)?)
}

fn adapter() -> LoraConfig {
    LoraConfig::new(16, 32.0, Modules::parse(r"model\.language_model\..*"))
}

fn measure(law: &str, at: usize, repeats: usize) -> Result<Point> {
    let dir = tempfile::tempdir()?;
    let name = law.split(',').next().unwrap_or(law);
    let memory = if law.ends_with("recomputed") { Memory::Recompute } else { Memory::Keep };
    let layers = if name == "decoder layers" { at } else { LAYERS };
    let is_trained = matches!(name, "group size" | "completion tokens");
    let assistant = model(dir.path(), layers, is_trained)?;
    let config = assistant.vlm.config().clone();
    let counted = |side: usize, text: usize| counts(&config, side, text);
    let (mut work, multiply_adds): (Box<dyn FnMut() -> Result<()>>, f64) = match name {
        "image side" | "decoder layers" | "threads" => {
            let side = if name == "image side" { at } else { SIDE };
            let prompt = prompt(&assistant, side)?;
            // Forward and the gradient of the input, four times: the start, and after each of three steps the loss.
            let multiply_adds = 4.0 * 2.0 * counted(side, prompt.ids.len());
            (Box::new(move || attack(&assistant, &prompt, side, memory)), multiply_adds)
        }
        "prompt tokens" => {
            let ids: Vec<u32> = (0..at as u32).map(|i| 20 + i % 200).collect();
            let prompt = Prompt::of_ids(&config, ids, &[])?;
            (Box::new(move || prefill(&assistant, &prompt)), counted(0, at))
        }
        "draws" => {
            let prompt = prompt(&assistant, SIDE)?;
            let multiply_adds = at as f64 * counted(SIDE, prompt.ids.len());
            (Box::new(move || certify(&assistant, &prompt, at)), multiply_adds)
        }
        "completion tokens" => {
            let prompt = prompt(&assistant, SIDE)?;
            let rows = prompt.ids.len() + at;
            let multiply_adds = 2.0 * (counted(SIDE, 0) + 3.0 * counted(0, rows));
            let mut fit = Fit::new(Student::new(assistant, Some(adapter()))?)?;
            let work = move || {
                let target = vec![vec![vec![40; at]]; 2];
                update(&mut fit, &vec![prompt.clone(); 2], &target)
            };
            (Box::new(work), multiply_adds)
        }
        "group size" => {
            let prompt = prompt(&assistant, SIDE)?;
            let row = counted(0, prompt.ids.len()) / prompt.ids.len() as f64;
            // Once for the rollout and thrice (forward, input, adapter) for the update, the prompt's rows shared.
            let rows = (prompt.ids.len() + at * 32) as f64;
            let multiply_adds = 2.0 * counted(SIDE, 0) + 4.0 * rows * row;
            let mut fit = Fit::new(Student::new(assistant, Some(adapter()))?)?;
            let work = move || {
                let group = roll_out(&fit.learner.frozen, &prompt, at)?;
                update(&mut fit, std::slice::from_ref(&prompt), &[group])
            };
            (Box::new(work), multiply_adds)
        }
        other => anyhow::bail!("no law `{other}`"),
    };
    work()?;
    // What the first call left in the allocator's hands counts as used: pages are not given back between calls.
    restart_peak_memory();
    let mut seconds = f64::INFINITY;
    for _ in 0..repeats {
        let started = Instant::now();
        work()?;
        seconds = seconds.min(started.elapsed().as_secs_f64());
    }
    let mib = peak_memory_bytes().unwrap_or(0) as f64 / f64::from(1 << 20);
    Ok(Point { at, seconds, mib, work: multiply_adds })
}

/// Multiply-adds of one forward pass over an image of this side (0: none) and a sequence of `tokens`.
fn counts(config: &VlmConfig, side: usize, tokens: usize) -> f64 {
    let sizes = sizes(config.text.num_layers);
    let (v, vi) = (sizes.vision_hidden_size as f64, sizes.vision_intermediate_size as f64);
    let patches = (side / sizes.patch_size).pow(2) as f64;
    let vision =
        sizes.vision_depth as f64 * (patches * (4.0 * v * v + 2.0 * v * vi) + 2.0 * patches * patches * v);
    let (h, hi) = (sizes.hidden_size as f64, sizes.intermediate_size as f64);
    let (q, kv) = ((sizes.num_heads * sizes.head_dim) as f64, (sizes.num_kv_heads * sizes.head_dim) as f64);
    let rows = tokens as f64;
    let layer = rows * (2.0 * h * q + 2.0 * h * kv + 3.0 * h * hi) + rows * rows * q;
    vision + sizes.num_layers as f64 * layer
}

fn prompt(assistant: &Assistant, side: usize) -> Result<Prompt> {
    let text = "What is seen in this image? A) mass B) cyst C) fracture D) nothing";
    Ok(assistant.prompt(text, Some(assistant.vlm.grid_of(side, side)))?)
}

fn pixels(side: usize) -> Result<Tensor> {
    let mut values = vec![0f32; 3 * side * side];
    rng::fill_standard_normal(&mut rng::stream(0, "scaling", &[side as u64]), &mut values);
    Ok((Tensor::from_vec(values, (1, 3, side, side), &Device::Cpu)? * 0.1)?
        .affine(1.0, 0.5)?
        .clamp(0.0, 1.0)?)
}

fn attack(assistant: &Assistant, prompt: &Prompt, side: usize, memory: Memory) -> Result<()> {
    let aim = Aim::at_completion(prompt.clone(), [side, side], vec![40], 0);
    let target = Target {
        assistant,
        aims: vec![aim],
        answers: &|_, items| Ok(vec![None; items.len()]),
        noise: None,
        draws_at_once: 1,
        memory,
    };
    let config =
        AttackConfig { num_steps: 3, early_stop: false, output: PgdOutput::Last, ..AttackConfig::default() };
    let clean = pixels(side)?;
    let problem = Problem { clean: &clean, items: &[0], keys: &[0], start: None, judge_8bit: false };
    pgd(&target, &problem, &config, &mut |_| Ok(()))?;
    Ok(())
}

fn prefill(assistant: &Assistant, prompt: &Prompt) -> Result<()> {
    let count = prompt.ids.len();
    let plan = assistant.vlm.row_plan(&prompt.positions, Layout::causal(&[count]))?;
    let batch = Batch { input_ids: prompt.ids.clone(), image_rows: Vec::new(), plan };
    ensure!(assistant.vlm.forward(None, &batch)?.dim(0)? == count);
    Ok(())
}

fn certify(assistant: &Assistant, prompt: &Prompt, draws: usize) -> Result<()> {
    let reading = Reading::Likelihood { completions: vec![vec![40], vec![41]] };
    let classifier = QuestionClassifier { assistant, prompt, num_options: 2, reading };
    let clean = pixels(SIDE)?.squeeze(0)?;
    count_draws(&classifier, &clean, 0.25, 0, 0, 0..draws as u64, 32)?;
    Ok(())
}

fn roll_out(assistant: &Assistant, prompt: &Prompt, group: usize) -> Result<Vec<Vec<u32>>> {
    let features = policy::encode(assistant, &[pixels(SIDE)?])?;
    let decoding = Decoding { sampling: SamplingConfig::at(1.0), ..Decoding::greedy(32, Vec::new()) };
    let seeds = vec![(0..group as u64).collect()];
    let groups = policy::sample(assistant, std::slice::from_ref(prompt), Some(&features), &seeds, &decoding)?;
    Ok(groups.into_iter().flatten().map(|completion| completion.ids).collect())
}

fn update(fit: &mut Fit<Student>, prompts: &[Prompt], completions: &[Vec<Vec<u32>>]) -> Result<()> {
    let assistant = &fit.learner.assistant;
    let scoring = Scoring::new(assistant, prompts, completions)?;
    let images = prompts.iter().map(|_| pixels(SIDE)).collect::<Result<Vec<_>>>()?;
    let plan = assistant.vlm.vision_plan(&policy::grids_of(assistant, &images)?)?;
    let mut stages = assistant.vlm.vision_stages(&plan);
    stages.extend(scoring.stages(assistant));
    let loss = |state: &[Tensor]| scoring.log_probs(assistant, &state[0], 1.0)?.mean_all()?.neg();
    let (_, gradients) = loss_and_gradients(&stages, &images, loss, &fit.wanted(), Memory::Keep)?;
    drop(stages);
    fit.update(&gradients, &TrainConfig { learning_rate: 1e-6, ..TrainConfig::default() })?;
    Ok(())
}

const TIME: RGBColor = RGBColor(0x2b, 0x7b, 0xba);
const MEMORY: RGBColor = RGBColor(0xd9, 0x5f, 0x1e);
const WORK: RGBColor = RGBColor(0x90, 0x90, 0x90);

/// One panel for each law, on logarithmic axes: time, memory and work, each relative to its first point.
fn draw(path: &Path, laws: &[(&str, &str, Vec<Point>)]) -> Result<()> {
    let columns = 3;
    let rows = laws.len().div_ceil(columns);
    let root = SVGBackend::new(path, (1260, 330 * rows as u32 + 40)).into_drawing_area();
    let failed = |error: &dyn std::fmt::Display| anyhow::anyhow!("cannot draw {}: {error}", path.display());
    root.fill(&RGBColor(255, 255, 255)).map_err(|error| failed(&error))?;
    let root = root
        .titled(
            "relative to the first point, doublings: time (blue), peak memory (orange), multiply-adds (gray)",
            ("sans-serif", 20),
        )
        .map_err(|error| failed(&error))?;
    for (panel, (law, what, points)) in root.split_evenly((rows, columns)).iter().zip(laws) {
        draw_panel(panel, &format!("{law}: {what}"), points).map_err(|error| failed(&error))?;
    }
    root.present().map_err(|error| failed(&error))
}

fn draw_panel(
    area: &DrawingArea<SVGBackend<'_>, Shift>,
    title: &str,
    points: &[Point],
) -> std::result::Result<(), Box<dyn std::error::Error>> {
    let first = points[0];
    let curve = |value: &dyn Fn(&Point) -> f64| -> Vec<(f64, f64)> {
        points.iter().map(|point| ((point.at as f64).log2(), (value(point) / value(&first)).log2())).collect()
    };
    let curves: [(RGBColor, Vec<(f64, f64)>); 3] = [
        (WORK, curve(&|point| point.work)),
        (TIME, curve(&|point| point.seconds)),
        (MEMORY, curve(&|point| point.mib.max(1.0))),
    ];
    let values = || curves.iter().flat_map(|(_, curve)| curve.iter().map(|point| point.1));
    let (low, high) = (values().fold(0.0, f64::min), values().fold(0.0, f64::max));
    let places = || points.iter().map(|point| (point.at as f64).log2());
    let (from, to) = (places().fold(f64::INFINITY, f64::min), places().fold(f64::NEG_INFINITY, f64::max));
    let mut chart = ChartBuilder::on(area)
        .margin(12)
        .caption(title, ("sans-serif", 17))
        .x_label_area_size(28)
        .y_label_area_size(46)
        .build_cartesian_2d(from - 0.1..to + 0.1, low - 0.3..high + 0.3)?;
    chart
        .configure_mesh()
        .max_light_lines(0)
        .x_labels(6)
        .y_labels(6)
        .x_label_formatter(&|place| format!("{:.0}", place.exp2()))
        .y_label_formatter(&|times| format!("{:.1}", times.exp2()))
        .label_style(("sans-serif", 13))
        .draw()?;
    for (colour, curve) in curves {
        chart.draw_series(LineSeries::new(curve.iter().copied(), colour.stroke_width(2)))?;
        chart.draw_series(curve.into_iter().map(|point| Circle::new(point, 3, colour.filled())))?;
    }
    Ok(())
}
