//! Training runs: their curves over each other, what they came to, where their time went, and completions to read.

use super::source::RunDir;
use super::tables::budget;
use crate::error::Result;
use crate::eval::accuracy::from_counts;
use crate::eval::report::{Answer, Card, Cell, Figure, Picture, Point, Series, Shape, Table};
use crate::pixels::decode::{decode_file, encode_png};
use crate::recipes::config::{MetricName, NormName};
use crate::recipes::progress::Progress;
use crate::recipes::validation::{self, Best};
use serde_json::Value;
use std::collections::{BTreeMap, BTreeSet};
use std::fmt::Write as _;
use std::fs;

/// A plot of one metric, or of a few that belong together.
struct Plot {
    title: &'static str,
    /// Name and unit of the vertical axis.
    axis: &'static str,
    caption: &'static str,
    /// Ends of the vertical axis, where the metric has them.
    range: Option<[f64; 2]>,
    /// Metrics, each with what its curve is called beside the run.
    metrics: &'static [(&'static str, &'static str)],
}

const fn plot(
    title: &'static str,
    axis: &'static str,
    caption: &'static str,
    metrics: &'static [(&'static str, &'static str)],
) -> Plot {
    Plot { title, axis, caption, range: None, metrics }
}

const fn share(
    title: &'static str,
    axis: &'static str,
    caption: &'static str,
    metrics: &'static [(&'static str, &'static str)],
) -> Plot {
    Plot { title, axis, caption, range: Some([0.0, 1.0]), metrics }
}

/// The metrics that have a plot, the most telling first.
const PLOTS: [Plot; 16] = [
    plot(
        "Loss",
        "loss",
        "Supervised: nats per target token. GRPO: the clipped surrogate, near 0 by construction.",
        &[("loss", "")],
    ),
    plot("Reward", "reward", "Mean of a completion.", &[("reward", "")]),
    share(
        "Accuracy of sampled completions",
        "share right",
        "On attacked and on clean training images, as sampled.",
        &[("rewards/accuracy_adversarial/mean", "adversarial"), ("rewards/accuracy_clean/mean", "clean")],
    ),
    plot(
        "Loss before and after the attack",
        "nats per completion",
        "Of the right completion, which the adversary makes less likely.",
        &[("loss_adversarial", "adversarial"), ("loss_clean", "clean")],
    ),
    plot(
        "What the attack gains",
        "nats per completion",
        "Loss after the attack less loss before.",
        &[("pgd_gain", "")],
    ),
    plot("Budget of the adversary", "epsilon", "", &[("epsilon", "")]),
    plot(
        "Divergence from the reference policy",
        "KL (nats per token)",
        "The k3 estimate over sampled tokens.",
        &[("kl", "")],
    ),
    plot(
        "Divergence between clean and attacked",
        "KL (nats per token)",
        "Of the target tokens' distributions.",
        &[("kl_clean_adversarial", "")],
    ),
    plot(
        "Entropy",
        "nats per token",
        "Of the distribution that each token was sampled from.",
        &[("entropy", "")],
    ),
    plot("Length of completions", "tokens", "Mean.", &[("completions/mean_length", "")]),
    share(
        "Completions cut off",
        "share",
        "Those that reached the longest length allowed before they ended.",
        &[("completions/clipped_ratio", "")],
    ),
    share(
        "Groups without a lesson",
        "share of groups",
        "All rewards of the group are equal, so no completion is better than the others.",
        &[("frac_groups_zero_std", "")],
    ),
    share(
        CLIPPED,
        "share of tokens",
        "Either way; 0 as long as each set of completions is used for one update.",
        &[("clip_ratio/region_mean", ""), ("cispo_clip_ratio", "")],
    ),
    plot("Gradient norm", "norm", "Of all gradients together, before clipping.", &[("grad_norm", "")]),
    plot("Learning rate", "learning rate", "", &[("learning_rate", "")]),
    plot("Denoising", "PSNR (dB)", "", &[("psnr", ""), ("psnr_noisy", "noisy")]),
];

/// Left out where nothing was clipped.
const CLIPPED: &str = "Ratios clipped";

/// Most points of a curve: more are not seen, and weigh.
const MOST_POINTS: usize = 1000;

/// Training runs among `runs`.
fn trained(runs: &[RunDir]) -> Vec<&RunDir> {
    runs.iter().filter(|run| !run.metrics.is_empty()).collect()
}

/// All curves of training, several runs in one plot.
pub(super) fn figures(runs: &[RunDir]) -> Vec<Figure> {
    let runs = trained(runs);
    let curves: Vec<BTreeMap<String, Vec<Point>>> = runs.iter().map(|run| curves_of(run)).collect();
    let mut figures = validation_figures(&runs);
    let mut add = |title: &str, plot: &Plot, metrics: &[(&str, &str)]| {
        let mut series = Vec::new();
        for (run, curves) in runs.iter().zip(&curves) {
            for (metric, word) in metrics {
                let Some(points) = curves.get(*metric).filter(|points| points.len() > 1) else { continue };
                series.push(Series { name: curve_name(run, word), points: thinned(points) });
            }
        }
        // Where nothing is ever clipped there is nothing to see.
        let is_flat = series.iter().flat_map(|series| &series.points).all(|point| point.y == 0.0);
        if series.is_empty() || is_flat && title == CLIPPED {
            return;
        }
        let mut figure = Figure {
            title: format!("Training: {title}"),
            caption: plot.caption.to_owned(),
            x_label: "step".to_owned(),
            y_label: plot.axis.to_owned(),
            y_range: plot.range,
            shape: Shape::Noisy,
            series,
        };
        if plot.axis == "epsilon" {
            in_levels(&mut figure, &runs);
        }
        figures.push(figure);
    };
    for plot in &PLOTS {
        add(plot.title, plot, plot.metrics);
    }
    let metrics: BTreeSet<&str> = curves.iter().flat_map(BTreeMap::keys).map(String::as_str).collect();
    let is_shown =
        |metric: &str| PLOTS.iter().flat_map(|plot| plot.metrics).any(|(shown, _)| *shown == metric);
    let (shown, others): (Vec<&str>, Vec<&str>) =
        metrics.iter().copied().partition(|metric| is_shown(metric));
    let has_accuracy = shown.iter().any(|metric| metric.starts_with("rewards/accuracy"));
    for metric in others {
        let name = metric.strip_prefix("rewards/").and_then(|rest| rest.strip_suffix("/mean"));
        // Accuracy on clean and on attacked images says more than on both together.
        if let Some(name) = name.filter(|name| !(has_accuracy && *name == "accuracy")) {
            let plot = plot("", "reward", "Mean of a completion, before its weight.", &[]);
            add(&format!("reward `{name}`"), &plot, &[(metric, "")]);
        }
    }
    figures
}

fn curve_name(run: &RunDir, word: &str) -> String {
    if word.is_empty() { run.name.clone() } else { format!("{}, {word}", run.name) }
}

/// Budgets of the L-infinity norm in 8-bit levels, where no run has another norm.
fn in_levels(figure: &mut Figure, runs: &[&RunDir]) {
    let is_other =
        |run: &&RunDir| run.config_refused.is_some() || run.config.train.adversary.norm != NormName::Linf;
    if runs.iter().any(is_other) {
        figure.y_label.push_str(" (pixels in [0, 1])");
        return;
    }
    figure.y_label.push_str(" (L-inf, 8-bit levels)");
    for point in figure.series.iter_mut().flat_map(|series| &mut series.points) {
        point.y *= 255.0;
    }
}

/// Every number of every line, by metric. Updates of one step lie between it and the step before.
fn curves_of(run: &RunDir) -> BTreeMap<String, Vec<Point>> {
    let num_updates = run.config.train.grpo.num_updates.max(1) as f64;
    let mut curves: BTreeMap<String, Vec<Point>> = BTreeMap::new();
    for line in &run.metrics {
        let step = line["step"].as_f64().unwrap_or(0.0);
        let x = match line["update"].as_f64() {
            Some(update) if update > 0.0 => step - 1.0 + update / num_updates,
            _ => step,
        };
        collect(&mut curves, "", line, x);
    }
    curves
}

fn collect(curves: &mut BTreeMap<String, Vec<Point>>, prefix: &str, metrics: &Value, x: f64) {
    for (name, value) in metrics.as_object().into_iter().flatten() {
        let path = if prefix.is_empty() { name.clone() } else { format!("{prefix}/{name}") };
        match value {
            Value::Number(number) => {
                let y = number.as_f64().unwrap_or(f64::NAN);
                curves.entry(path).or_default().push(Point { x, y, interval: None });
            }
            Value::Object(_) => collect(curves, &path, value, x),
            _ => {}
        }
    }
}

/// Means over neighbours, where there are more points than a plot can show.
fn thinned(points: &[Point]) -> Vec<Point> {
    let size = points.len().div_ceil(MOST_POINTS).max(1);
    let mean =
        |part: &[Point], value: fn(&Point) -> f64| part.iter().map(value).sum::<f64>() / part.len() as f64;
    points
        .chunks(size)
        .map(|part| Point { x: mean(part, |p| p.x), y: mean(part, |p| p.y), interval: None })
        .collect()
}

/// What a line of `validation.jsonl` says about one kind of image: accuracy, with Wilson's interval where `n` is there; of the kind
/// [`BLIND`] the best of the controls that see no image, or not the right one.
fn validated(line: &Value, kind: &str) -> Option<(f64, Option<[f64; 2]>)> {
    if kind == BLIND {
        let controls = line["controls"].as_object()?;
        return Some((controls.values().filter_map(Value::as_f64).reduce(f64::max)?, None));
    }
    let accuracy = line[kind]["accuracy"].as_f64()?;
    let n = line[kind]["n"].as_u64().or_else(|| line["n"].as_u64());
    let counted = n.and_then(|n| from_counts((accuracy * n as f64).round() as u64, 0, n));
    Some((accuracy, counted.map(|counted| counted.accuracy_interval)))
}

/// The mean reward in a line of `validation.jsonl` on one kind of image.
fn rewarded(line: &Value, kind: &str) -> Option<(f64, Option<[f64; 2]>)> {
    Some((line[kind]["reward"].as_f64()?, None))
}

const BLIND: &str = "blind";
const VALIDATED: [(&str, &str); 3] =
    [("pgd", "adversarial"), ("clean", "clean"), (BLIND, "best blind control")];
const REWARDED: [(&str, &str); 2] = [("pgd", "adversarial"), ("clean", "clean")];

/// What a line of `validation.jsonl` says about one kind of image.
type Measured = fn(&Value, &str) -> Option<(f64, Option<[f64; 2]>)>;

/// The best checkpoint of a run by the metric that chose it.
fn best_of(run: &RunDir) -> Option<(MetricName, Best)> {
    let told = run.summary.as_ref().and_then(|summary| summary["best"]["metric"].as_str());
    let metric = match told.and_then(|word| word.parse::<MetricName>().ok()) {
        Some(metric) => metric,
        None if run.config_refused.is_some() => return None,
        None => run.config.train.validation.metric(),
    };
    Some((metric, validation::best(&run.validation, metric)?))
}

fn validation_figures(runs: &[&RunDir]) -> Vec<Figure> {
    let by_accuracy =
        |metric: MetricName| matches!(metric, MetricName::Accuracy | MetricName::RobustAccuracy);
    let accuracy = Figure {
        title: "Validation accuracy".to_owned(),
        caption: "On questions that are not trained on, clean, under PGD, and by the best of the controls that see no image or another one; band: Wilson's 95 % interval. A dot marks the best checkpoint, where it was chosen by one of these."
            .to_owned(),
        x_label: "step".to_owned(),
        y_label: "accuracy".to_owned(),
        y_range: Some([0.0, 1.0]),
        shape: Shape::Line,
        series: validation_series(runs, &VALIDATED, validated, by_accuracy),
    };
    let reward = Figure {
        title: "Validation reward".to_owned(),
        caption: "Mean over greedy completions to questions that are not trained on, clean and under PGD. A dot marks the best checkpoint, where it was chosen by one of these."
            .to_owned(),
        y_label: "reward".to_owned(),
        y_range: None,
        series: validation_series(runs, &REWARDED, rewarded, |metric| !by_accuracy(metric)),
        ..accuracy.clone()
    };
    [accuracy, reward].into_iter().filter(|figure| !figure.series.is_empty()).collect()
}

/// Curves over the examinations of each run, and a point for its best checkpoint where its metric `is_shown` beside them.
fn validation_series(
    runs: &[&RunDir],
    kinds: &[(&str, &str)],
    measured: Measured,
    is_shown: impl Fn(MetricName) -> bool,
) -> Vec<Series> {
    let mut series = Vec::new();
    for run in runs {
        for (kind, word) in kinds {
            let point = |line: &Value| {
                let (y, interval) = measured(line, kind)?;
                Some(Point { x: line["step"].as_f64()?, y, interval })
            };
            let points: Vec<Point> = run.validation.iter().filter_map(point).collect();
            if !points.is_empty() {
                series.push(Series { name: curve_name(run, word), points });
            }
        }
        if let Some((_, best)) = best_of(run).filter(|(metric, _)| is_shown(*metric)) {
            let name = curve_name(run, &format!("best checkpoint (step {})", best.step));
            let point = Point { x: best.step as f64, y: best.value, interval: None };
            series.push(Series { name, points: vec![point] });
        }
    }
    series
}

/// Metrics of the table of training runs, with the heads of their columns.
const COLUMNS: [(&str, &str); 6] = [
    ("loss", "loss"),
    ("reward", "reward"),
    ("kl", "KL"),
    ("entropy", "entropy"),
    ("completions/mean_length", "tokens of a completion"),
    ("psnr", "PSNR (dB)"),
];
const SHARES: [(&str, &str); 2] =
    [("rewards/accuracy_adversarial/mean", "adversarial"), ("rewards/accuracy_clean/mean", "clean")];

/// What each training run came to.
pub(super) fn table(runs: &[RunDir]) -> Option<Table> {
    let runs = trained(runs);
    let curves: Vec<BTreeMap<String, Vec<Point>>> = runs.iter().map(|run| curves_of(run)).collect();
    let is_there = |metric: &str| curves.iter().any(|curves| curves.contains_key(metric));
    let mut head: Vec<String> = ["run", "recipe", "steps", "tokens seen"].map(str::to_owned).to_vec();
    let mut rows: Vec<Vec<Cell>> = runs
        .iter()
        .map(|run| {
            let last = run.metrics.last().unwrap_or(&Value::Null);
            let number =
                |name: &str| last[name].as_u64().map_or(Cell::Missing, |n| Cell::Number(n.to_string()));
            vec![Cell::Text(run.name.clone()), recipe_of(run), number("step"), number("num_tokens")]
        })
        .collect();
    for (metric, name) in COLUMNS.into_iter().filter(|(metric, _)| is_there(metric)) {
        head.push(name.to_owned());
        for (row, curves) in rows.iter_mut().zip(&curves) {
            row.push(late_mean(curves, metric).map_or(Cell::Missing, |mean| Cell::Number(short(mean))));
        }
    }
    for (metric, name) in SHARES.into_iter().filter(|(metric, _)| is_there(metric)) {
        head.push(format!("sampled, {name}"));
        for (row, curves) in rows.iter_mut().zip(&curves) {
            row.push(late_mean(curves, metric).map_or(Cell::Missing, |mean| Cell::Share(mean, None)));
        }
    }
    for (name, cells) in validation_columns(&runs) {
        head.push(name);
        for (row, cell) in rows.iter_mut().zip(cells) {
            row.push(cell);
        }
    }
    (!rows.is_empty()).then(|| Table {
        title: "Training".to_owned(),
        caption: "Means over the last tenth of the steps; validation: the last one.".to_owned(),
        head,
        rows,
    })
}

fn recipe_of(run: &RunDir) -> Cell {
    let summed_up = run.summary.as_ref().and_then(|summary| summary["recipe"].as_str());
    let configured = run.config_refused.is_none().then(|| run.config.train.recipe.word());
    summed_up.or(configured).map_or(Cell::Missing, |word| Cell::Text(word.to_owned()))
}

/// Columns about validation that any of the runs has something to say in: the last line of each, then the best checkpoint.
fn validation_columns(runs: &[&RunDir]) -> Vec<(String, Vec<Cell>)> {
    let mut columns: Vec<(String, Vec<Cell>)> = Vec::new();
    for (kind, word) in VALIDATED {
        let last = |run: &&RunDir| run.validation.iter().rev().find_map(|line| validated(line, kind));
        let cell = |run: &&RunDir| {
            last(run).map_or(Cell::Missing, |(accuracy, interval)| Cell::Share(accuracy, interval))
        };
        columns.push((format!("validation, {word}"), runs.iter().map(cell).collect()));
    }
    for (kind, word) in REWARDED {
        let last = |run: &&RunDir| run.validation.iter().rev().find_map(|line| rewarded(line, kind));
        let cell = |run: &&RunDir| last(run).map_or(Cell::Missing, |(reward, _)| Cell::Number(short(reward)));
        columns.push((format!("validation reward, {word}"), runs.iter().map(cell).collect()));
    }
    let best = |run: &&RunDir| {
        best_of(run).map_or(Cell::Missing, |(metric, best)| {
            Cell::Text(format!("step {}: {} {}", best.step, metric.word(), short(best.value)))
        })
    };
    columns.push(("best checkpoint".to_owned(), runs.iter().map(best).collect()));
    columns.retain(|(_, cells)| cells.iter().any(|cell| *cell != Cell::Missing));
    columns
}

/// Mean over the last tenth of a curve.
fn late_mean(curves: &BTreeMap<String, Vec<Point>>, metric: &str) -> Option<f64> {
    let points = curves.get(metric)?;
    let late = &points[points.len() - points.len().div_ceil(10)..];
    Some(late.iter().map(|point| point.y).sum::<f64>() / late.len() as f64)
}

/// Four digits.
fn short(value: f64) -> String {
    if value != 0.0 && value.abs() < 1e-3 { format!("{value:.2e}") } else { format!("{value:.3}") }
}

/// Where the time of each training run went, from `timings.jsonl`.
pub(super) fn time_table(runs: &[RunDir]) -> Option<Table> {
    let runs: Vec<&RunDir> = trained(runs).into_iter().filter(|run| !run.timings.is_empty()).collect();
    let times: Vec<Times> = runs.iter().map(|run| times_of(run)).collect();
    let mut phases: Vec<&str> = Vec::new();
    for (name, _) in times.iter().flat_map(|times| &times.phases) {
        if !phases.contains(&name.as_str()) {
            phases.push(name);
        }
    }
    let rows: Vec<Vec<Cell>> = runs
        .iter()
        .zip(&times)
        .map(|(run, times)| {
            let number = |text: String| Cell::Number(text);
            let mut row = vec![
                Cell::Text(run.name.clone()),
                number(times.steps.to_string()),
                number(format!("{:.0}", times.seconds)),
                number(short(times.step_seconds / times.steps.max(1) as f64)),
            ];
            // Steps done twice after a kill are timed twice, but their tokens are counted once.
            let tokens = run.metrics.last().and_then(|line| line["num_tokens"].as_f64());
            let once = run.metrics.last().and_then(|line| line["step"].as_u64()) == Some(times.steps as u64);
            row.push(
                tokens
                    .filter(|_| once && times.step_seconds > 0.0)
                    .map_or(Cell::Missing, |tokens| number(format!("{:.0}", tokens / times.step_seconds))),
            );
            row.push(if times.peak_memory > 0.0 {
                number(format!("{:.2}", times.peak_memory / f64::from(1 << 30)))
            } else {
                Cell::Missing
            });
            row.extend(phases.iter().map(|phase| {
                let found = times.phases.iter().find(|(name, _)| name == phase);
                found.map_or(Cell::Missing, |(_, seconds)| {
                    Cell::Share(seconds / times.seconds.max(1e-9), None)
                })
            }));
            row
        })
        .collect();
    let mut head: Vec<String> =
        ["run", "steps timed", "seconds", "seconds a step", "tokens a second", "peak memory (GiB)"]
            .map(str::to_owned)
            .to_vec();
    head.extend(phases.iter().map(|phase| (*phase).to_owned()));
    (!rows.is_empty()).then(|| Table {
        title: "Where the time of training went".to_owned(),
        caption:
            "Shares of the seconds that were timed. A step that was done again after a kill counts twice."
                .to_owned(),
        head,
        rows,
    })
}

/// Sums over `timings.jsonl`.
#[derive(Default)]
struct Times {
    steps: usize,
    /// Of steps.
    step_seconds: f64,
    /// Of everything.
    seconds: f64,
    /// Of the phases of steps, and of whatever else was timed.
    phases: Vec<(String, f64)>,
    /// In bytes.
    peak_memory: f64,
}

fn times_of(run: &RunDir) -> Times {
    let mut times = Times::default();
    for line in &run.timings {
        let (what, seconds) =
            (line["what"].as_str().unwrap_or("other"), line["seconds"].as_f64().unwrap_or(0.0));
        times.seconds += seconds;
        let mut add =
            |name: &str, seconds: f64| match times.phases.iter_mut().find(|(known, _)| known == name) {
                Some((_, sum)) => *sum += seconds,
                None => times.phases.push((name.to_owned(), seconds)),
            };
        if what != "step" {
            add(what, seconds);
            continue;
        }
        for (name, value) in line.as_object().into_iter().flatten() {
            match (name.as_str(), value.as_f64()) {
                ("what" | "seconds", _) | (_, None) => {}
                ("peak_memory_bytes", Some(bytes)) => times.peak_memory = times.peak_memory.max(bytes),
                (phase, Some(seconds)) => add(phase, seconds),
            }
        }
        times.steps += 1;
        times.step_seconds += seconds;
    }
    times
}

/// Cards of one run, and completions of a card: the best and the worst.
const CARDS: usize = 3;
const COMPLETIONS: usize = 4;

/// The first, middle and last of the steps that kept pictures, or else completions, with what was sampled then.
pub(super) fn cards(runs: &[RunDir], progress: Option<&dyn Progress>) -> Vec<Card> {
    let mut cards = Vec::new();
    for run in trained(runs) {
        for step in chosen(run) {
            let mut card = card(run, step);
            if let Some(progress) = progress {
                card.pictures = pictures(run, step).unwrap_or_else(|error| {
                    let reason = error.to_string().replace('\n', " ");
                    progress.note(&format!("no picture of step {step} of {}: {reason}", run.name));
                    Vec::new()
                });
            }
            cards.push(card);
        }
    }
    cards
}

fn chosen(run: &RunDir) -> Vec<u64> {
    let folders = fs::read_dir(run.dir.join("images")).into_iter().flatten();
    let of_folder = |name: String| name.strip_prefix("step-")?.parse::<u64>().ok();
    let mut steps: BTreeSet<u64> =
        folders.filter_map(|entry| of_folder(entry.ok()?.file_name().into_string().ok()?)).collect();
    if steps.is_empty() {
        steps = run.completions.iter().filter_map(|line| line["step"].as_u64()).collect();
    }
    let steps: Vec<u64> = steps.into_iter().collect();
    let places: BTreeSet<usize> =
        (0..CARDS).map(|card| card * steps.len().saturating_sub(1) / (CARDS - 1)).collect();
    places.into_iter().filter_map(|place| steps.get(place).copied()).collect()
}

fn card(run: &RunDir, step: u64) -> Card {
    let about = fs::read(run.dir.join(format!("images/step-{step}/about.json")));
    let about: Value = about.ok().and_then(|text| serde_json::from_slice(&text).ok()).unwrap_or(Value::Null);
    // Pictures are those of the first question.
    let is_first = |line: &&Value| line["step"] == step && line["group"].as_u64().unwrap_or(0) == 0;
    let mut completions: Vec<&Value> = run.completions.iter().filter(is_first).collect();
    let first = completions.first().copied().unwrap_or(&Value::Null);
    let text =
        |name: &str| about[name].as_str().or_else(|| first[name].as_str()).unwrap_or_default().to_owned();
    let mut detail = vec![run.name.clone(), format!("step {step}"), text("modality"), text("id")];
    if let Some(epsilon) = about["epsilon"].as_f64() {
        detail.push(format!("epsilon {}", budget(epsilon, about["norm"].as_str().unwrap_or_default())));
    }
    detail.retain(|part| !part.is_empty());
    let options: Vec<String> = about["options"]
        .as_array()
        .into_iter()
        .flatten()
        .map(|option| option.as_str().unwrap_or_default().to_owned())
        .collect();
    let reward = |line: &Value| line["reward"].as_f64().unwrap_or(f64::NEG_INFINITY);
    if completions.len() > COMPLETIONS {
        completions.sort_by(|a, b| reward(b).total_cmp(&reward(a)));
        completions.drain(COMPLETIONS / 2..completions.len() - COMPLETIONS / 2);
    }
    let question = [text("question"), text("prompt"), text("id")].into_iter().find(|text| !text.is_empty());
    Card {
        question: question.unwrap_or_default(),
        detail: detail.join(" · "),
        answer: text("answer").bytes().next().map(|byte| usize::from(byte.wrapping_sub(b'A'))),
        options,
        pictures: Vec::new(),
        answers: completions.into_iter().map(answer).collect(),
    }
}

fn answer(line: &Value) -> Answer {
    let number = |name: &str| line[name].as_f64().unwrap_or(f64::NAN);
    let mut facts = format!("advantage {:+.2}", number("advantage"));
    if let Some(length) = line["length"].as_u64() {
        let _ = write!(facts, " · {length} tokens");
    }
    if line["is_finished"] == false {
        facts.push_str(", cut off");
    }
    Answer {
        label: format!("reward {:.2}", number("reward")),
        prediction: facts,
        correct: number("accuracy") >= 1.0,
        completion: line["completion"].as_str().unwrap_or_default().to_owned(),
    }
}

fn pictures(run: &RunDir, step: u64) -> Result<Vec<Picture>> {
    let folder = run.dir.join(format!("images/step-{step}"));
    let mut pictures = Vec::new();
    for (name, caption) in
        [("clean", "clean"), ("adversarial", "attacked"), ("difference", "difference, amplified")]
    {
        let path = folder.join(format!("{name}.png"));
        if path.exists() {
            let png = encode_png(&decode_file(&path)?)?;
            pictures.push(Picture { caption: caption.to_owned(), png });
        }
    }
    Ok(pictures)
}
