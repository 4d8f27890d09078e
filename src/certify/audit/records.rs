//! Audit of our own records: every field that follows from the counts is computed again.

use super::{AuditReport, MAX_PROBLEMS, Pair};
use crate::certify::radius::{RadiusRow, radius, transport};
use crate::certify::sequential::{Procedure, Sequential, Stop, Wins};
use crate::error::{Error, Result};
use serde::de::DeserializeOwned;
use serde_json::{Map, Value, json};
use std::collections::HashSet;
use std::path::Path;

/// Relative difference between a recorded number and ours that another machine's logarithm may explain.
const TOLERANCE: f64 = 1e-12;
/// The class of answers that cannot be read: last in order, and never right.
const UNPARSABLE: &str = "none";

/// Recomputes every line of a `records.jsonl`. A torn last line is left out, as on resuming.
pub(super) fn audit(text: &str, path: &Path) -> Result<AuditReport> {
    let (mut rows, mut exact) = (0, 0);
    let (mut problems, mut notes) = (Vec::new(), Vec::new());
    let mut pairs: Vec<Pair> = Vec::new();
    let num_lines = text.lines().count();
    let mut ids: HashSet<String> = HashSet::new();
    // Of the first record: certificates of one file are of one model under one seed.
    let mut origin: Option<[Value; 2]> = None;
    for (index, line) in text.lines().enumerate().filter(|(_, line)| !line.trim().is_empty()) {
        let value = match serde_json::from_str::<Value>(line) {
            Err(_) if index + 1 == num_lines && !text.ends_with('\n') => {
                notes.push(format!("line {}: torn, left out", index + 1));
                continue;
            }
            other => other,
        };
        rows += 1;
        let verdict = match value {
            Ok(Value::Object(record)) => match record.get("id").and_then(Value::as_str) {
                None | Some("") => Err("`id` is missing or no text".to_owned()),
                Some(id) if !ids.insert(id.to_owned()) => Err(format!("the id `{id}` stands here again")),
                Some(_) => check_origin(&record, &mut origin).and_then(|()| recompute(&record)),
            },
            Ok(_) => Err("is not a JSON object".to_owned()),
            Err(error) => Err(format!("is not JSON: {error}")),
        };
        match verdict {
            Ok(pair) => {
                exact += 1;
                if !pairs.contains(&pair) {
                    pairs.push(pair);
                }
            }
            Err(problem) if problems.len() < MAX_PROBLEMS => {
                problems.push(format!("line {}: {problem}", index + 1));
            }
            Err(_) => {}
        }
    }
    if rows == 0 {
        return Err(Error::data(format!("nothing to audit: no record\n  --> {}", path.display())));
    }
    pairs.sort_by(|a, b| a.n.cmp(&b.n).then(a.alpha.total_cmp(&b.alpha)));
    let pass = exact == rows;
    if !pass {
        pairs.clear();
    }
    let smallest_n = pairs.first().map(|pair| pair.n);
    Ok(AuditReport { rows, exact, consistent: pairs, pass, smallest_n, sigma: None, problems, notes })
}

/// Checks that the evidence that counts do not show is there, and is that of the other records.
fn check_origin(
    record: &Map<String, Value>,
    origin: &mut Option<[Value; 2]>,
) -> std::result::Result<(), String> {
    whole(record, "seed")?;
    for key in ["answer", "image_sha256", "model_sha256"] {
        if record.get(key).and_then(Value::as_str).is_none_or(str::is_empty) {
            return Err(format!("`{key}` is missing or no text"));
        }
    }
    let own = ["model_sha256", "seed"].map(|key| record.get(key).cloned().unwrap_or_default());
    let first = origin.get_or_insert_with(|| own.clone());
    for (key, (own, first)) in ["model_sha256", "seed"].iter().zip(own.iter().zip(first.iter())) {
        if own != first {
            return Err(format!("`{key}` is {own}, that of the first record {first}"));
        }
    }
    Ok(())
}

/// Checks what follows from one record's own counts.
///
/// # Errors
/// A data error that names the record and what does not hold.
pub fn check_record(record: &Value) -> Result<()> {
    let id = record["id"].as_str().unwrap_or("?");
    let Value::Object(fields) = record else { return Err(Error::data("a record is no JSON object")) };
    match check_origin(fields, &mut None).and_then(|()| recompute(fields)) {
        Ok(_) => Ok(()),
        Err(problem) => Err(Error::data(format!("record `{id}` does not recompute: {problem}"))),
    }
}

/// Checks one record; says what does not hold.
fn recompute(record: &Map<String, Value>) -> std::result::Result<Pair, String> {
    let (n0, n) = (whole(record, "n0")?, whole(record, "n")?);
    let (alpha, sigma) = (number(record, "alpha")?, number(record, "sigma")?);
    let (selection, counts) = (class_counts(record, "counts_selection")?, class_counts(record, "counts")?);
    for (key, counts, draws) in [("counts_selection", &selection, n0), ("counts", &counts, n)] {
        let sum = counts.iter().fold(0u64, |sum, (_, count)| sum.saturating_add(*count));
        if sum != draws {
            return Err(format!("`{key}` add up to {sum}, not to the {draws} draws stated"));
        }
    }
    check_draws(record, n0, n)?;
    // The lowest of equals, as CERTIFY chooses.
    let selected = selection
        .iter()
        .fold(None::<&(String, u64)>, |best, item| best.filter(|b| b.1 >= item.1).or(Some(item)))
        .map(|(class, _)| class.clone())
        .ok_or("`counts_selection` is empty")?;
    let count = counts.iter().find(|(class, _)| *class == selected).map_or(0, |&(_, count)| count);
    let n_max = record.get("n_max").map_or(Ok(n), |_| whole(record, "n_max"))?;
    let row = match record.get("mode").and_then(Value::as_str).unwrap_or("cohen") {
        "cohen" if n_max == n => radius(count, n, alpha, sigma).map_err(|error| error.to_string())?,
        "cohen" => return Err(format!("`n_max` is {n_max}, but a fixed n of {n} draws was used")),
        "sequential" => stopped(record, [count, n, n_max], alpha, sigma)?,
        mode => return Err(format!("mode `{mode}` cannot be recomputed by this version")),
    };
    for (key, expected) in [("p_lower", row.p_lower), ("radius", row.radius)] {
        check_number(record, key, expected, &format!("{count} of {n} draws"))?;
    }
    check_answer(record, (!row.abstain).then_some(selected.as_str()))?;
    check_transport(record, row.radius)?;
    check_attack(record, row.radius, alpha)?;
    Ok(Pair { n: n_max, alpha })
}

/// Checks the radius in the original image's pixels against the norm of the resize between the sizes recorded.
fn check_transport(record: &Map<String, Value>, radius: f64) -> std::result::Result<(), String> {
    let Some(Value::Object(sizes)) = record.get("sizes") else { return Ok(()) };
    let side = |key: &str| match sizes.get(key).and_then(Value::as_array).map(Vec::as_slice) {
        Some([height, width]) => {
            let sides = [height, width].map(|side| side.as_u64().and_then(|side| usize::try_from(side).ok()));
            match sides {
                // Weights of a resize take memory: no image is larger than this on a side.
                [Some(height @ 1..=65_536), Some(width @ 1..=65_536)] => Ok([height, width]),
                _ => Err(format!("`sizes.{key}` should be [height, width]")),
            }
        }
        _ => Err(format!("`sizes.{key}` should be [height, width]")),
    };
    let (original, model) = (side("original")?, side("model")?);
    let values = 3 * model[0] as u64 * model[1] as u64;
    if whole(record, "values")? != values {
        return Err(format!("`values` should be {values}"));
    }
    let carried = transport(radius, original, model).map_err(|error| error.to_string())?;
    check_number(record, "radius_original", carried, "`radius` and `sizes`")
}

/// Checks that an attack inside the radius stayed there, and that it counts as broken only by a test that decides.
fn check_attack(record: &Map<String, Value>, radius: f64, alpha: f64) -> std::result::Result<(), String> {
    let Some(Value::Object(check)) = record.get("cross_check") else { return Ok(()) };
    let (l2, p_value) = (number(check, "l2")?, number(check, "p_value")?);
    // The change is measured in float32.
    if l2 > radius * (1.0 + 1e-5) {
        return Err(format!("`cross_check` went {l2} far, beyond the radius of {radius}"));
    }
    if !(0.0..=1.0).contains(&p_value) || (check.get("broken") == Some(&json!(true)) && p_value > alpha) {
        return Err(format!("`cross_check` cannot be broken at a p-value of {p_value}"));
    }
    Ok(())
}

/// What the look proves that a sequential record rests on, and whether its schedule and its rule end it where it ended.
fn stopped(
    record: &Map<String, Value>,
    [count, n, n_max]: [u64; 3],
    alpha: f64,
    sigma: f64,
) -> std::result::Result<RadiusRow, String> {
    let target_radius = record.get("target_radius").filter(|radius| !radius.is_null());
    let target_radius = target_radius.map(|_| number(record, "target_radius")).transpose()?;
    let min_gain = if target_radius.is_some() { 0.0 } else { number(record, "min_gain")? };
    let settings = Sequential { rule: word(record, "rule")?, target_radius, min_gain };
    let procedure = Procedure::new(settings, n_max, alpha, sigma);
    if record.get("schedule") != Some(&procedure.schedule()) {
        return Err(format!("`schedule` should be {}", procedure.schedule()));
    }
    if let Some(target) = procedure.target() {
        check_number(record, "p_target", target.value, "`target_radius`")?;
    }
    let Some(Value::Object(bound)) = record.get("bound") else {
        return Err("`bound` should hold `count` and `n`".to_owned());
    };
    let look = [whole(bound, "count")?, whole(bound, "n")?];
    let wins = word::<Wins>(record, "wins")?.counts();
    let among = |n: u64| usize::try_from(n).ok().and_then(|n| wins.get(n)).copied();
    if among(n) != Some(count) {
        return Err(format!("`wins` does not hold {count} wins in {n} draws"));
    }
    // Look by look as it was made: nothing of what it says is taken on trust.
    let missing = || Error::data(format!("the rule does not stop within {n} draws"));
    let (end, bound, stop) = procedure
        .run(|at| among(at).filter(|_| at <= n).ok_or_else(missing))
        .map_err(|error| error.to_string())?;
    if end != n {
        return Err(format!("the rule stops after {end} draws, not after {n}"));
    }
    if look != [bound.count, bound.n] {
        return Err(format!("`bound` should be {} in {} draws", bound.count, bound.n));
    }
    if word::<Stop>(record, "stopped")? != stop {
        return Err(format!("`stopped` should be {}", json!(stop)));
    }
    Ok(procedure.radius(&bound, stop, sigma))
}

/// Checks a number that follows from `cause`.
fn check_number(
    record: &Map<String, Value>,
    key: &str,
    expected: f64,
    cause: &str,
) -> std::result::Result<(), String> {
    let recorded = number(record, key)?;
    if (recorded - expected).abs() > TOLERANCE * expected.abs() {
        return Err(format!("`{key}` is {recorded}, but {cause} give {expected}"));
    }
    Ok(())
}

/// Checks `abstained`, `prediction` and `correct` against the class that the counts certify.
fn check_answer(record: &Map<String, Value>, expected: Option<&str>) -> std::result::Result<(), String> {
    let text = |key: &str| record.get(key).filter(|value| !value.is_null()).map(class_name);
    if record.get("abstained").and_then(Value::as_bool) != Some(expected.is_none()) {
        return Err(format!("`abstained` should be {}", expected.is_none()));
    }
    if text("prediction").as_deref() != expected {
        return Err(format!("`prediction` should be {}", expected.unwrap_or("null")));
    }
    let correct = text("answer").as_deref() == expected && !matches!(expected, None | Some(UNPARSABLE));
    if record.get("correct").and_then(Value::as_bool) != Some(correct) {
        return Err(format!("`correct` should be {correct}"));
    }
    Ok(())
}

/// Checks that the two ranges of draws are as long as stated and share no draw.
fn check_draws(record: &Map<String, Value>, n0: u64, n: u64) -> std::result::Result<(), String> {
    let range = |key: &str, draws: u64| {
        let ends = record
            .get(key)
            .and_then(Value::as_array)
            .map(|ends| ends.iter().map(Value::as_u64).collect::<Vec<_>>());
        match ends.as_deref() {
            Some(&[Some(from), Some(to)]) if to.checked_sub(from) == Some(draws) => Ok((from, to)),
            _ => Err(format!("`{key}` should be [from, to] with {draws} draws between")),
        }
    };
    let (selection, estimation) = (range("draws_selection", n0)?, range("draws_estimation", n)?);
    if selection.0 < estimation.1 && estimation.0 < selection.1 {
        return Err("selection and estimation share draws: the bound does not hold".to_owned());
    }
    Ok(())
}

/// Counts by class, in the order of classes: letters first, the unreadable answer last.
fn class_counts(record: &Map<String, Value>, key: &str) -> std::result::Result<Vec<(String, u64)>, String> {
    let bad = || format!("`{key}` should map classes to counts");
    let mut counts = match record.get(key) {
        Some(Value::Object(map)) => {
            map.iter().map(|(class, count)| (class.clone(), count.as_u64())).collect::<Vec<_>>()
        }
        Some(Value::Array(list)) => {
            list.iter().enumerate().map(|(class, c)| (class.to_string(), c.as_u64())).collect()
        }
        _ => return Err(bad()),
    };
    if matches!(record.get(key), Some(Value::Object(_))) {
        counts.sort_by(|a, b| (a.0 == UNPARSABLE).cmp(&(b.0 == UNPARSABLE)).then_with(|| a.0.cmp(&b.0)));
    }
    counts.into_iter().map(|(class, count)| count.map(|count| (class, count)).ok_or_else(bad)).collect()
}

fn class_name(value: &Value) -> String {
    value.as_str().map_or_else(|| value.to_string(), str::to_owned)
}

fn number(record: &Map<String, Value>, key: &str) -> std::result::Result<f64, String> {
    record.get(key).and_then(Value::as_f64).ok_or_else(|| format!("`{key}` is missing or no number"))
}

/// A field that is one of a few words.
fn word<T: DeserializeOwned>(record: &Map<String, Value>, key: &str) -> std::result::Result<T, String> {
    let value = record.get(key).cloned().unwrap_or_default();
    serde_json::from_value(value).map_err(|error| format!("`{key}` is none of its words: {error}"))
}

fn whole(record: &Map<String, Value>, key: &str) -> std::result::Result<u64, String> {
    record.get(key).and_then(Value::as_u64).ok_or_else(|| format!("`{key}` is missing or no whole number"))
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::certify::{Certificate, Rule, SmoothingConfig};

    fn record(selection: [u64; 3], estimation: [u64; 3]) -> Value {
        let config = SmoothingConfig { n0: 10, n: 100, ..SmoothingConfig::new(0.25) };
        let c = Certificate::from_counts(&config, selection.to_vec(), estimation.to_vec()).unwrap();
        let letters = ["A", "B", "none"];
        let map = |counts: &[u64]| {
            letters.iter().zip(counts).map(|(l, &c)| ((*l).to_owned(), c.into())).collect::<Map<_, _>>()
        };
        json!({"id": "x", "answer": "B", "prediction": c.prediction.map(|p| letters[p]), "abstained": c.prediction.is_none(),
            "correct": c.prediction == Some(1), "radius": c.radius, "p_lower": c.p_lower, "sigma": 0.25, "mode": "cohen",
            "n0": 10, "n": 100, "alpha": 0.001, "seed": 0, "image_sha256": "i", "model_sha256": "m",
            "counts_selection": map(&c.counts_selection), "counts": map(&c.counts),
            "draws_selection": [0, 10], "draws_estimation": [10, 110]})
    }

    /// A record of a class that wins all but every fiftieth draw.
    fn sequential(rule: Rule, target_radius: Option<f64>) -> Value {
        let settings = Sequential { rule, target_radius, min_gain: 0.05 };
        let procedure = Procedure::new(settings, 5000, 0.001, 0.25);
        let (n, bound, stop) = procedure.run(|n| Ok(n - n / 50)).unwrap();
        let row = procedure.radius(&bound, stop, 0.25);
        let wins = Wins::new((1..=n).map(|draw| draw - draw / 50 > draw - 1 - (draw - 1) / 50));
        json!({"id": "x", "answer": "B", "prediction": "B", "abstained": false, "correct": true, "radius": row.radius,
            "p_lower": row.p_lower, "sigma": 0.25, "mode": "sequential", "target_radius": target_radius, "n0": 10, "n": n,
            "n_max": 5000, "alpha": 0.001, "counts_selection": {"A": 0, "B": 10, "none": 0},
            "counts": {"A": n / 50, "B": n - n / 50, "none": 0}, "draws_selection": [0, 10],
            "draws_estimation": [10, 10 + n], "rule": rule, "schedule": procedure.schedule(), "min_gain": 0.05,
            "seed": 0, "image_sha256": "i", "model_sha256": "m", "p_target": procedure.target().map(|p| p.value), "stopped": stop, "bound": {"count": bound.count, "n": bound.n},
            "wins": wins})
    }

    #[test]
    fn sequential_records_recompute_and_every_tampered_field_is_found() {
        for rule in [Rule::Kt, Rule::ClopperPearson] {
            for target_radius in [None, Some(0.25), Some(0.7)] {
                let good = sequential(rule, target_radius);
                let report = audited(std::slice::from_ref(&good));
                assert!(report.pass, "{rule:?} {target_radius:?}: {:?}", report.problems);
                assert_eq!(report.consistent, [Pair { n: 5000, alpha: 0.001 }]);
                let other = if rule == Rule::Kt { "clopper_pearson" } else { "kt" };
                let radius = good["radius"].as_f64().unwrap();
                let [count, n] = ["count", "n"].map(|key| good["bound"][key].as_u64().unwrap());
                for (key, value) in [
                    ("radius", json!(radius * (1.0 + 1e-10))),
                    ("p_lower", json!(0.99)),
                    ("rule", json!(other)),
                    ("rule", json!("wald")),
                    ("schedule", json!([n])),
                    ("stopped", json!("cap")),
                    ("stopped", json!("futile")),
                    ("bound", json!({"count": count + 1, "n": n})),
                    ("bound", json!({"count": count, "n": n - 1})),
                    ("bound", json!({"count": count})),
                    ("bound", json!({"count": 9, "n": 9})),
                    ("wins", json!("ff")),
                    ("wins", json!("xyz")),
                    ("wins", json!(null)),
                    ("n_max", json!(good["n"].as_u64().unwrap() - 1)),
                    ("alpha", json!(0.01)),
                    ("alpha", json!(0.9)),
                    ("sigma", json!(0.3)),
                    ("prediction", json!(null)),
                    ("mode", json!("cohen")),
                ] {
                    // At the cap that reason is the true one; the others are wrong wherever they stand.
                    if good[key] == value {
                        continue;
                    }
                    let mut bad = good.clone();
                    bad[key] = value.clone();
                    let report = audited(&[bad]);
                    assert!(!report.pass, "{rule:?} {target_radius:?}: {key} = {value} passes");
                }
            }
        }
        let mut bad = sequential(Rule::Kt, Some(0.25));
        bad["target_radius"] = json!(0.3);
        assert!(!audited(&[bad]).pass);
    }

    #[test]
    fn what_no_count_shows_must_be_there_and_be_one_for_all() {
        let good = record([0, 10, 0], [1, 98, 1]);
        let mut other = good.clone();
        other["id"] = json!("y");
        assert!(audited(&[good.clone(), other.clone()]).pass);
        for (key, value) in [
            ("id", json!(null)),
            ("answer", json!(null)),
            ("image_sha256", json!("")),
            ("model_sha256", json!(null)),
            ("model_sha256", json!("of another")),
            ("seed", json!(1)),
            ("seed", json!(null)),
        ] {
            let mut bad = other.clone();
            bad[key] = value.clone();
            assert!(!audited(&[good.clone(), bad]).pass, "{key} = {value} passes");
        }
    }

    #[test]
    fn a_radius_in_original_pixels_and_an_attack_inside_it_are_checked() {
        let mut good = record([0, 10, 0], [1, 98, 1]);
        let radius = good["radius"].as_f64().unwrap();
        // An enlargement stretches every change: the radius shrinks.
        let carried = transport(radius, [8, 10], [16, 20]).unwrap();
        assert!(carried < radius, "{carried} {radius}");
        good["sizes"] = json!({"original": [8, 10], "model": [16, 20]});
        good["values"] = json!(960);
        good["radius_original"] = json!(carried);
        good["cross_check"] = json!({"l2": radius, "p_value": 1e-9, "broken": true});
        assert!(audited(std::slice::from_ref(&good)).pass, "{:?}", audited(&[good]).problems);
        for (key, value) in [
            ("radius_original", json!(radius)),
            ("radius_original", json!(null)),
            ("values", json!(961)),
            ("sizes", json!({"original": [8, 11], "model": [16, 20]})),
            ("sizes", json!({"original": [8], "model": [16, 20]})),
            ("sizes", json!({"original": [8, 0], "model": [16, 20]})),
            ("sizes", json!({"original": [8, 1u64 << 60], "model": [16, 20]})),
            ("cross_check", json!({"l2": radius * 1.1, "p_value": 0.5, "broken": false})),
            ("cross_check", json!({"l2": 0.1, "p_value": 0.5, "broken": true})),
            ("cross_check", json!({"l2": 0.1, "p_value": -0.5, "broken": false})),
        ] {
            let mut bad = good.clone();
            bad[key] = value.clone();
            assert!(!audited(&[bad]).pass, "{key} = {value} passes");
        }
    }

    fn audited(records: &[Value]) -> AuditReport {
        let text = records.iter().fold(String::new(), |text, record| text + &record.to_string() + "\n");
        audit(&text, Path::new("records.jsonl")).unwrap()
    }

    #[test]
    fn true_records_recompute() {
        let records = [
            record([0, 10, 0], [1, 98, 1]),
            record([5, 5, 0], [2, 98, 0]),
            record([0, 0, 10], [0, 0, 100]),
            record([9, 1, 0], [100, 0, 0]),
        ];
        let named = |(i, mut record): (usize, Value)| {
            record["id"] = json!(format!("q{i}"));
            record
        };
        let records: Vec<Value> = records.into_iter().enumerate().map(named).collect();
        let report = audited(&records);
        assert_eq!((report.rows, report.exact, report.pass, report.problems.len()), (4, 4, true, 0));
        assert_eq!(report.consistent, [Pair { n: 100, alpha: 0.001 }]);
    }

    #[test]
    fn an_id_that_stands_twice_is_found() {
        let twice = record([0, 10, 0], [1, 98, 1]);
        let report = audited(&[twice.clone(), twice]);
        assert!(!report.pass && report.problems[0].contains("again"), "{:?}", report.problems);
    }

    #[test]
    fn every_tampered_field_is_found() {
        let good = record([0, 10, 0], [1, 98, 1]);
        let radius = good["radius"].as_f64().unwrap();
        for (key, value) in [
            ("radius", json!(radius * (1.0 + 1e-10))),
            ("p_lower", json!(0.9)),
            ("prediction", json!("A")),
            ("prediction", json!(null)),
            ("abstained", json!(true)),
            ("correct", json!(false)),
            ("answer", json!("A")),
            ("sigma", json!(0.5)),
            ("n", json!(101)),
            ("n0", json!(11)),
            ("alpha", json!(0.01)),
            ("counts", json!({"A": 0, "B": 99, "none": 1})),
            ("counts", json!({"A": 2, "B": 98, "none": 1})),
            ("counts", json!({"A": 0, "B": 98, "none": 1})),
            ("counts_selection", json!({"A": 6, "B": 4, "none": 0})),
            ("draws_estimation", json!([9, 109])),
            ("draws_selection", json!([0, 9])),
            ("mode", json!("sequential")),
        ] {
            let mut bad = good.clone();
            bad[key] = value;
            let report = audited(&[good.clone(), bad]);
            assert_eq!((report.rows, report.exact, report.pass), (2, 1, false), "{key}");
            assert!(report.problems[0].starts_with("line 2: "), "{:?}", report.problems);
            assert!(report.consistent.is_empty());
        }
    }

    #[test]
    fn a_torn_last_line_is_left_out_and_a_broken_one_is_not() {
        let line = record([0, 10, 0], [1, 98, 1]).to_string();
        let report = audit(&format!("{line}\n{}", &line[..50]), Path::new("r")).unwrap();
        assert_eq!((report.rows, report.pass, report.notes.len()), (1, true, 1));
        let report = audit(&format!("{}\n{line}\n", &line[..50]), Path::new("r")).unwrap();
        assert_eq!((report.rows, report.exact, report.pass), (2, 1, false));
    }
}
