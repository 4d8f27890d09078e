//! Plots of a report: accuracy against budget, certified accuracy against radius, training curves.

use super::source::RunDir;
use super::tables::{accuracy, is_certified};
use crate::eval::report::{Figure, Point, Series, Shape};
use crate::recipes::attack;
use serde_json::Value;
use std::collections::{BTreeMap, BTreeSet};

/// Training metrics worth a plot, the most telling first.
const TELLING: [&str; 15] = [
    "loss",
    "reward",
    "rewards/accuracy/mean",
    "rewards/accuracy_adversarial/mean",
    "rewards/accuracy_clean/mean",
    "pgd_gain",
    "kl_clean_adversarial",
    "frac_reward_zero_std",
    "kl",
    "entropy",
    "rewards/format/mean",
    "completions/mean_length",
    "clip_ratio/high_mean",
    "grad_norm",
    "learning_rate",
];
const MOST_CURVES: usize = 8;

/// All plots that these runs give rise to.
pub(super) fn figures(runs: &[RunDir]) -> Vec<Figure> {
    let mut figures = Vec::new();
    figures.extend(budget_figure(runs));
    figures.extend(steps_figure(runs));
    figures.extend(radius_figure(runs));
    figures.extend(training_figures(runs));
    figures
}

/// Names of curves: the model, and what else tells them apart if anything does. So a model keeps its colour.
fn curve_names(runs: &[&RunDir], what: impl Fn(&RunDir) -> String) -> Vec<String> {
    let all: BTreeSet<String> = runs.iter().map(|run| what(run)).collect();
    runs.iter()
        .map(
            |run| if all.len() > 1 { format!("{}, {}", model_name(run), what(run)) } else { model_name(run) },
        )
        .collect()
}

/// What is attacked: the model, by its last path component; a run's checkpoint by the run's name too.
fn model_name(run: &RunDir) -> String {
    let name = |path: &str| match path.trim_end_matches('/').rsplit('/').collect::<Vec<_>>()[..] {
        [step, "checkpoints", run, ..] => format!("{run}/{step}"),
        [last, ..] => last.to_owned(),
        [] => path.to_owned(),
    };
    let adapter = run.config.adapter.as_ref().map(|path| name(&path.to_string_lossy()));
    match (run.config.model.as_deref().map(name), adapter) {
        (Some(model), Some(adapter)) => format!("{model} + {adapter}"),
        (Some(model), None) => model,
        (None, _) => run.name.clone(),
    }
}

fn budget_figure(runs: &[RunDir]) -> Option<Figure> {
    let attacks: Vec<&RunDir> =
        runs.iter().filter(|run| run.command == "attack" && !run.records.is_empty()).collect();
    let first = attacks.first()?;
    let norm = first.records[0]["norm"].as_str().unwrap_or("linf").to_owned();
    // Budgets are axis values; whatever else differs makes another curve, and is named where it differs.
    let attacks: Vec<&RunDir> =
        attacks.into_iter().filter(|run| run.records[0]["norm"] == norm.as_str()).collect();
    let names = curve_names(&attacks, |run| {
        let record = &run.records[0];
        format!("{} {}", record["method"].as_str().unwrap_or("attack"), record["num_steps"])
    });
    let mut curves: BTreeMap<&String, BTreeMap<u64, Point>> = BTreeMap::new();
    let scale = if norm == "linf" { 255.0 } else { 1.0 };
    for (run, name) in attacks.iter().zip(&names) {
        let records: Vec<&Value> = run.records.iter().collect();
        let curve = curves.entry(name).or_default();
        for [x, y, low, high] in attack::curves(&run.records).by_epsilon {
            let x = x * scale;
            curve.insert(x.to_bits(), Point { x, y, interval: Some([low, high]) });
        }
        let epsilon = run.records[0]["epsilon"].as_f64().unwrap_or(0.0) * scale;
        for (x, field) in [(epsilon, "robust_correct"), (0.0, "clean_correct")] {
            if let Some(found) = accuracy(&records, |record| record[field] == true) {
                let point = Point { x, y: found.accuracy, interval: Some(found.accuracy_interval) };
                curve.entry(x.to_bits()).or_insert(point);
            }
        }
    }
    let series: Vec<Series> = curves
        .into_iter()
        .map(|(name, points)| Series { name: name.clone(), points: points.into_values().collect() })
        .collect();
    let unit =
        if norm == "linf" { "epsilon (L-inf, 8-bit levels)" } else { "epsilon (L2, pixels in [0, 1])" };
    Some(Figure {
        title: "Accuracy against attack budget".to_owned(),
        caption: "Over all items; band: Wilson's 95 % interval.".to_owned(),
        x_label: unit.to_owned(),
        y_label: "accuracy".to_owned(),
        y_range: Some([0.0, 1.0]),
        shape: Shape::Line,
        series,
    })
}

/// What more steps bring: a curve that still falls at its end stands for an attack that was stopped too early.
fn steps_figure(runs: &[RunDir]) -> Option<Figure> {
    let attacks: Vec<&RunDir> =
        runs.iter().filter(|run| run.command == "attack" && !run.records.is_empty()).collect();
    let names = curve_names(&attacks, |run| run.records[0]["method"].as_str().unwrap_or("attack").to_owned());
    let series: Vec<Series> = attacks
        .iter()
        .zip(names)
        .map(|(run, name)| Series {
            name,
            points: attack::curves(&run.records)
                .by_steps
                .into_iter()
                .map(|[x, y, low, high]| Point { x, y, interval: Some([low, high]) })
                .collect(),
        })
        .filter(|series| series.points.len() > 2)
        .collect();
    (!series.is_empty()).then(|| Figure {
        title: "Accuracy against steps spent".to_owned(),
        caption: "Gradients and queries spent on an item until it broke, over all stages; band: Wilson's 95 % interval."
            .to_owned(),
        x_label: "steps".to_owned(),
        y_label: "accuracy".to_owned(),
        y_range: Some([0.0, 1.0]),
        shape: Shape::Line,
        series,
    })
}

fn radius_figure(runs: &[RunDir]) -> Option<Figure> {
    let certified: Vec<&RunDir> =
        runs.iter().filter(|run| run.command == "certify" && !run.records.is_empty()).collect();
    let names = curve_names(&certified, |run| format!("sigma {}", run.records[0]["sigma"]));
    let series: Vec<Series> = certified
        .iter()
        .zip(names)
        .map(|(run, name)| {
            let n = run.records.len() as f64;
            let mut radii: Vec<f64> = run
                .records
                .iter()
                .filter(|record| is_certified(record, 0.0))
                .filter_map(|record| record["radius"].as_f64())
                .collect();
            radii.sort_by(f64::total_cmp);
            let at = |x: f64, count: usize| Point { x, y: count as f64 / n, interval: None };
            let mut points = vec![at(0.0, radii.len())];
            points.extend(radii.iter().enumerate().map(|(below, radius)| at(*radius, radii.len() - below)));
            points.extend(radii.last().map(|last| at(*last, 0)));
            Series { name, points }
        })
        .collect();
    (!series.is_empty()).then(|| Figure {
        title: "Certified accuracy against radius".to_owned(),
        caption: "Share of items that are right and certified to at least this L2 radius.".to_owned(),
        x_label: "radius (L2, pixels in [0, 1])".to_owned(),
        y_label: "certified accuracy".to_owned(),
        y_range: Some([0.0, 1.0]),
        shape: Shape::Steps,
        series,
    })
}

fn training_figures(runs: &[RunDir]) -> Vec<Figure> {
    let mut by_metric: BTreeMap<String, Vec<Series>> = BTreeMap::new();
    for run in runs {
        let mut curves: BTreeMap<String, Vec<Point>> = BTreeMap::new();
        for metrics in &run.metrics {
            let step = metrics["step"].as_f64().unwrap_or(0.0);
            collect(&mut curves, "", metrics, step);
        }
        for (metric, points) in curves.into_iter().filter(|(_, points)| points.len() > 1) {
            by_metric.entry(metric).or_default().push(Series { name: run.name.clone(), points });
        }
    }
    let rank = |metric: &str| TELLING.iter().position(|name| metric == *name).unwrap_or(TELLING.len());
    let mut metrics: Vec<(String, Vec<Series>)> =
        by_metric.into_iter().filter(|(metric, _)| rank(metric) < TELLING.len()).collect();
    metrics.sort_by_key(|(metric, _)| rank(metric));
    metrics
        .into_iter()
        .take(MOST_CURVES)
        .map(|(metric, series)| Figure {
            title: format!("Training: {}", metric.replace('_', " ")),
            caption: String::new(),
            x_label: "step".to_owned(),
            y_label: metric,
            y_range: None,
            shape: Shape::Noisy,
            series,
        })
        .collect()
}

fn collect(curves: &mut BTreeMap<String, Vec<Point>>, prefix: &str, metrics: &Value, step: f64) {
    for (name, value) in metrics.as_object().into_iter().flatten() {
        let path = if prefix.is_empty() { name.clone() } else { format!("{prefix}/{name}") };
        match value {
            Value::Number(number) => {
                let y = number.as_f64().unwrap_or(f64::NAN);
                curves.entry(path).or_default().push(Point { x: step, y, interval: None });
            }
            Value::Object(_) => collect(curves, &path, value, step),
            _ => {}
        }
    }
}
