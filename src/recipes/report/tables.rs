//! Tables of a report, counted from records.

use super::source::RunDir;
use super::training;
use crate::eval::accuracy::{Accuracy, from_counts};
use crate::eval::report::{Cell, Table, percent};
use crate::recipes::config::{Method, ObjectiveName};
use crate::recipes::records::{AttackRecord, NONE};
use crate::recipes::verdict::{self, Check};
use crate::stats::binomial;
use serde_json::Value;
use std::collections::BTreeMap;

/// Tables, and what a reader must know about them.
pub(super) struct Tables {
    pub(super) main: Vec<Table>,
    pub(super) details: Vec<Table>,
    pub(super) notes: Vec<String>,
}

const CONTROLS: [&str; 3] = ["blank_image", "shuffled_image", "option_prior"];

/// All tables that these runs give rise to.
pub(super) fn tables(runs: &[RunDir]) -> Tables {
    let of = |command: &str| -> Vec<&RunDir> {
        runs.iter().filter(|run| run.command == command && !run.records.is_empty()).collect()
    };
    let (evals, attacks, certificates) = (of("eval"), of("attack"), of("certify"));
    let mut all = Tables { main: Vec::new(), details: Vec::new(), notes: Vec::new() };
    all.main.extend(runs.iter().filter_map(demo_table));
    all.main.extend(eval_table(&evals));
    for run in &evals {
        all.notes.extend(control_notes(run));
    }
    all.main.extend(attack_table(&attacks));
    all.notes.extend(budget_notes(&attacks));
    all.main.extend(pairs_table(&attacks));
    all.main.extend(certify_table(&certificates));
    all.main.extend(training::table(runs));
    all.details.extend(training::time_table(runs));
    for run in &attacks {
        all.details.push(verdict_table(run));
    }
    for run in &evals {
        all.details.extend(group_table(run, "modality", "modality"));
        all.details.extend(group_table(run, "question_type", "question type"));
    }
    all
}

/// Accuracy of the records for which `is_right` says so; a prediction that cannot be read is none.
pub(super) fn accuracy(records: &[&Value], is_right: impl Fn(&Value) -> bool) -> Option<Accuracy> {
    let correct = records.iter().filter(|record| is_right(record)).count();
    let unparsable = records.iter().filter(|record| record["prediction"] == NONE).count();
    from_counts(correct as u64, unparsable as u64, records.len() as u64)
}

fn share(accuracy: Option<Accuracy>) -> Cell {
    accuracy
        .map_or(Cell::Missing, |accuracy| Cell::Share(accuracy.accuracy, Some(accuracy.accuracy_interval)))
}

/// A control's accuracy over the records that have it.
fn control(records: &[&Value], name: &str) -> Option<Accuracy> {
    let having: Vec<&Value> =
        records.iter().copied().filter(|record| record["controls"][name].is_string()).collect();
    accuracy(&having, |record| record["controls"][name] == record["answer"])
}

/// Mean of one over the number of options.
fn chance(records: &[&Value]) -> Option<f64> {
    let shares: Vec<f64> = records
        .iter()
        .filter_map(|record| record["options"].as_array())
        .filter(|options| !options.is_empty())
        .map(|options| 1.0 / options.len() as f64)
        .collect();
    (!shares.is_empty()).then(|| shares.iter().sum::<f64>() / shares.len() as f64)
}

fn count(n: usize) -> Cell {
    Cell::Number(n.to_string())
}

fn names(names: &[&str]) -> Vec<String> {
    names.iter().map(|name| (*name).to_owned()).collect()
}

fn eval_cells(records: &[&Value]) -> Vec<Cell> {
    let mut cells = vec![count(records.len()), share(accuracy(records, |record| record["correct"] == true))];
    cells.extend(CONTROLS.map(|name| share(control(records, name))));
    cells.push(chance(records).map_or(Cell::Missing, |chance| Cell::Share(chance, None)));
    cells
}

const EVAL_HEAD: [&str; 6] = ["n", "accuracy", "blank image", "shuffled image", "option prior", "chance"];
const EVAL_CAPTION: &str = "Per cent right with Wilson's 95 % interval. The controls answer without sight of the right \
     image: what they get right, the questions give away.";

fn eval_table(runs: &[&RunDir]) -> Option<Table> {
    let rows: Vec<Vec<Cell>> = runs
        .iter()
        .map(|run| {
            let records: Vec<&Value> = run.records.iter().collect();
            [vec![Cell::Text(run.name.clone())], eval_cells(&records)].concat()
        })
        .collect();
    (!rows.is_empty()).then(|| Table {
        title: "Accuracy and controls".to_owned(),
        caption: EVAL_CAPTION.to_owned(),
        head: [names(&["run"]), names(&EVAL_HEAD)].concat(),
        rows,
    })
}

fn group_table(run: &RunDir, field: &str, name: &str) -> Option<Table> {
    let mut groups: BTreeMap<&str, Vec<&Value>> = BTreeMap::new();
    for record in &run.records {
        groups.entry(record[field].as_str().unwrap_or("unknown")).or_default().push(record);
    }
    (groups.len() > 1).then(|| Table {
        title: format!("By {name}: {}", run.name),
        caption: String::new(),
        head: [vec![name.to_owned()], names(&EVAL_HEAD)].concat(),
        rows: groups
            .into_iter()
            .map(|(group, records)| [vec![Cell::Text(group.to_owned())], eval_cells(&records)].concat())
            .collect(),
    })
}

/// Says when a control is above chance: then part of the accuracy needs no image.
fn control_notes(run: &RunDir) -> Vec<String> {
    let records: Vec<&Value> = run.records.iter().collect();
    let Some(chance) = chance(&records) else { return Vec::new() };
    CONTROLS
        .iter()
        .filter_map(|name| {
            let found = control(&records, name).filter(|found| found.accuracy_interval[0] > chance)?;
            Some(format!(
                "{}: the control {} is right in {} % of the items, above chance ({} %): part of the accuracy needs no image",
                run.name,
                name.replace('_', " "),
                percent(found.accuracy),
                percent(chance)
            ))
        })
        .collect()
}

/// `8/255` where an L-inf budget is one, else four digits.
pub(super) fn budget(epsilon: f64, norm: &str) -> String {
    let levels = epsilon * 255.0;
    if norm == "linf" && (levels - levels.round()).abs() < 1e-6 {
        format!("{}/255", levels.round())
    } else {
        format!("{epsilon:.4}")
    }
}

fn attack_table(runs: &[&RunDir]) -> Option<Table> {
    let rows: Vec<Vec<Cell>> = runs
        .iter()
        .map(|run| {
            let records: Vec<&Value> = run.records.iter().collect();
            let first = &run.records[0];
            let word = |name: &str| Cell::Text(first[name].as_str().unwrap_or_default().to_owned());
            let number =
                |name: &str| first[name].as_u64().map_or(Cell::Missing, |n| Cell::Number(n.to_string()));
            let unread = records.iter().filter(|record| record["adversarial_prediction"] == NONE).count();
            vec![
                Cell::Text(run.name.clone()),
                word("method"),
                word("norm"),
                first["epsilon"].as_f64().map_or(Cell::Missing, |epsilon| {
                    Cell::Number(budget(epsilon, first["norm"].as_str().unwrap_or("linf")))
                }),
                number("num_steps"),
                number("num_restarts"),
                match (run.config.attack.method, run.config.attack.objective) {
                    _ if run.config_refused.is_some() => Cell::Missing,
                    // Records name the one that an item was left with.
                    (Method::Auto, _) => Cell::Text("all stages".to_owned()),
                    (_, ObjectiveName::All) => Cell::Text("worst of all".to_owned()),
                    _ => word("objective"),
                },
                Cell::Text(asked_how(first)),
                count(records.len()),
                share(accuracy(&records, |record| record["clean_correct"] == true)),
                share(accuracy(&records, |record| record["robust_correct"] == true)),
                count(unread),
                Cell::Text(verdict::worst(&checks_of(run)).word().to_owned()),
            ]
        })
        .collect();
    (!rows.is_empty()).then(|| Table {
        title: "Accuracy under attack".to_owned(),
        caption: "Over all items, those wrong when clean included. An answer that cannot be read counts as wrong. \
                  The verdict is on the attack: without PASS the number may say more about it than about the model."
            .to_owned(),
        head: names(&[
            "run",
            "method",
            "norm",
            "epsilon",
            "steps",
            "starts",
            "objective",
            "answers by",
            "n",
            "clean",
            "attacked",
            "unreadable",
            "verdict",
        ]),
        rows,
    })
}

/// How answers were obtained, and of which model.
fn asked_how(record: &Value) -> String {
    let scoring = record["scoring"].as_str().unwrap_or("generate");
    match record["smoothing_sigma"].as_f64() {
        Some(sigma) => format!("{scoring}, smoothed {sigma}, {} votes", record["eot_samples"]),
        None => scoring.to_owned(),
    }
}

fn checks_of(run: &RunDir) -> Vec<Check> {
    let records: Vec<AttackRecord> =
        run.records.iter().filter_map(|record| serde_json::from_value(record.clone()).ok()).collect();
    verdict::checks(&records)
}

/// The checks behind a run's verdict.
fn verdict_table(run: &RunDir) -> Table {
    let rows = checks_of(run)
        .into_iter()
        .map(|check| {
            vec![
                Cell::Text(check.status.word().to_owned()),
                Cell::Text(check.name),
                Cell::Text(check.evidence),
            ]
        })
        .collect();
    Table {
        title: format!("{}: may its accuracy under attack be believed?", run.name),
        caption: "The attack examined on all records and, step by step, on a few items.".to_owned(),
        head: names(&["", "check", "evidence"]),
        rows,
    }
}

/// Every two attacked models on the items that both runs have: McNemar's exact test of their differences.
fn pairs_table(runs: &[&RunDir]) -> Option<Table> {
    let robust = |run: &RunDir| -> BTreeMap<String, bool> {
        let id = |record: &Value| Some((record["id"].as_str()?.to_owned(), record["robust_correct"] == true));
        run.records.iter().filter_map(id).collect()
    };
    let mut rows = Vec::new();
    for (i, first) in runs.iter().enumerate() {
        for second in &runs[i + 1..] {
            let same = |key: &str| first.records[0][key] == second.records[0][key];
            if !["norm", "epsilon", "space", "scoring", "smoothing_sigma"].into_iter().all(same) {
                continue;
            }
            let (a, b) = (robust(first), robust(second));
            let both: Vec<(bool, bool)> = a.iter().filter_map(|(id, a)| Some((*a, *b.get(id)?))).collect();
            let only = |wanted| both.iter().filter(|pair| **pair == wanted).count() as u64;
            let (left, right) = (only((true, false)), only((false, true)));
            if both.is_empty() {
                continue;
            }
            rows.push(vec![
                Cell::Text(first.name.clone()),
                Cell::Text(second.name.clone()),
                count(both.len()),
                count(left as usize),
                count(right as usize),
                Cell::Number(format!("{:.2e}", binomial::two_sided_test(left, right))),
            ]);
        }
    }
    (!rows.is_empty()).then(|| Table {
        title: "Paired comparison under attack".to_owned(),
        caption: "Items of both runs, right under attack in one of them only; p of McNemar's exact test that the two are \
                  equally robust."
            .to_owned(),
        head: names(&["first", "second", "n", "only first", "only second", "p"]),
        rows,
    })
}

/// Says when a measured change left its budget, which would void the run.
fn budget_notes(runs: &[&RunDir]) -> Vec<String> {
    let mut notes = Vec::new();
    for run in runs {
        let outside = |record: &&Value| {
            let norm = record["norm"].as_str().unwrap_or("linf");
            // Half an 8-bit level of slack: the change is measured on stored files.
            record[norm].as_f64() > record["epsilon"].as_f64().map(|epsilon| epsilon + 0.5 / 255.0)
        };
        let count = run.records.iter().filter(outside).count();
        if count > 0 {
            notes.push(format!("{}: {count} attacked images are outside the budget", run.name));
        }
    }
    notes
}

/// Radii of the table: quarters of a unit up to the largest radius that occurs, at least two.
pub(super) fn radii(runs: &[&RunDir]) -> Vec<f64> {
    let largest = runs.iter().flat_map(|run| &run.records).filter_map(|record| record["radius"].as_f64());
    let count = (largest.fold(0.0, f64::max) / 0.25).floor() as usize + 1;
    let mut radii: Vec<f64> = (0..=count.clamp(1, 8)).map(|quarters| quarters as f64 * 0.25).collect();
    // What a run was asked to decide.
    radii.extend(runs.iter().filter_map(|run| run.records[0]["target_radius"].as_f64()));
    radii.sort_by(f64::total_cmp);
    radii.dedup();
    radii
}

/// Right, not abstained, and certified to at least `radius`.
pub(super) fn is_certified(record: &Value, radius: f64) -> bool {
    record["correct"] == true && record["abstained"] != true && record["radius"].as_f64() >= Some(radius)
}

fn certify_table(runs: &[&RunDir]) -> Option<Table> {
    let radii = radii(runs);
    let rows: Vec<Vec<Cell>> = runs
        .iter()
        .map(|run| {
            let records: Vec<&Value> = run.records.iter().collect();
            let first = &run.records[0];
            let text = |name: &str| Cell::Number(first[name].to_string());
            let mean: f64 = records
                .iter()
                .filter(|record| is_certified(record, 0.0))
                .filter_map(|record| record["radius"].as_f64())
                .sum::<f64>()
                / records.len() as f64;
            let mut row = vec![
                Cell::Text(run.name.clone()),
                text("sigma"),
                Cell::Number(draws_of(&records)),
                text("alpha"),
                count(records.len()),
            ];
            row.push(share(accuracy(&records, |record| record["abstained"] == true)));
            row.extend(
                radii.iter().map(|radius| share(accuracy(&records, |record| is_certified(record, *radius)))),
            );
            row.push(Cell::Number(format!("{mean:.3}")));
            row
        })
        .collect();
    let mut head = names(&["run", "sigma", "draws", "alpha", "n", "abstained"]);
    head.extend(radii.iter().map(|radius| format!("r = {radius}")));
    head.push("mean radius".to_owned());
    (!rows.is_empty()).then(|| Table {
        title: "Certified accuracy".to_owned(),
        caption: "Share of all items that are right and certified to an L2 radius of at least r (pixels in [0, 1]); \
                  each certificate is wrong with probability alpha at most."
            .to_owned(),
        head,
        rows,
    })
}

/// Estimation draws of an item; of sequential certificates their mean, and the cap.
fn draws_of(records: &[&Value]) -> String {
    let first = records[0];
    if first["mode"] != "sequential" {
        return first["n"].to_string();
    }
    let used: u64 = records.iter().filter_map(|record| record["n"].as_u64()).sum();
    format!("{:.0} of {}", used as f64 / records.len() as f64, first["n_max"])
}

/// The rows of a demo's summary.
fn demo_table(run: &RunDir) -> Option<Table> {
    let rows = run.summary.as_ref().filter(|summary| summary["command"] == "demo")?["rows"].as_array()?;
    let share_of = |row: &Value, name: &str, n: &str| {
        row[name].as_f64().map_or(Cell::Missing, |value| {
            let interval = row[n].as_u64().and_then(|n| {
                let correct = (value * n as f64).round() as u64;
                from_counts(correct, 0, n).map(|accuracy| accuracy.accuracy_interval)
            });
            Cell::Share(value, interval)
        })
    };
    let rows = rows
        .iter()
        .map(|row| {
            let mut cells = vec![Cell::Text(row["name"].as_str().unwrap_or_default().to_owned())];
            cells.push(row["n"].as_u64().map_or(Cell::Missing, |n| Cell::Number(n.to_string())));
            cells.push(share_of(row, "clean_accuracy", "n"));
            cells.push(share_of(row, "robust_accuracy", "n"));
            cells.push(row["verdict"].as_str().map_or(Cell::Missing, |word| Cell::Text(word.to_owned())));
            cells.push(certified_cell(row, share_of));
            cells.extend(CONTROLS.map(|name| share_of(&row["controls"], name, "n")));
            cells
        })
        .collect();
    let epsilon = run.summary.as_ref()?["epsilon"].as_f64();
    let attacked = epsilon
        .map_or_else(|| "attacked".to_owned(), |epsilon| format!("attacked, {}", budget(epsilon, "linf")));
    Some(Table {
        title: "Models".to_owned(),
        caption: "Per cent right with Wilson's 95 % interval.".to_owned(),
        head: [
            names(&["model", "n", "clean"]),
            vec![attacked],
            names(&["verdict", "certified", "blank image", "shuffled image", "option prior"]),
        ]
        .concat(),
        rows,
    })
}

/// Certified accuracy as a number, or at the last radius of a curve.
fn certified_cell(row: &Value, share_of: impl Fn(&Value, &str, &str) -> Cell) -> Cell {
    match row["certified_accuracy"].as_array().and_then(|curve| curve.last()) {
        Some(point) => point[1].as_f64().map_or(Cell::Missing, |value| Cell::Share(value, None)),
        None => share_of(row, "certified_accuracy", "n_certified"),
    }
}
