use super::{Path, ReportOptions, Value, cards, json, report, report_data, source};
use crate::eval::report::Cell;
use crate::pixels::RgbImage8;
use crate::pixels::decode::encode_png;
use crate::recipes::progress::{Kept, Silent};
use std::fs;

fn write_run(dir: &Path, command: &str, records: &[Value], metrics: &[Value], finished: bool) {
    fs::create_dir_all(dir).unwrap();
    fs::write(dir.join("run.json"), json!({"command": command, "seed": 0}).to_string()).unwrap();
    let lines = |values: &[Value]| values.iter().map(|value| value.to_string() + "\n").collect::<String>();
    fs::write(dir.join("records.jsonl"), lines(records)).unwrap();
    fs::write(dir.join("metrics.jsonl"), lines(metrics)).unwrap();
    if finished {
        fs::write(dir.join("summary.json"), json!({"command": command}).to_string()).unwrap();
    }
}

fn eval_record(id: usize, modality: &str, correct: bool, blank_right: bool) -> Value {
    json!({
        "id": id.to_string(), "modality": modality, "question_type": "Anatomy", "options": ["a", "b"], "answer": "A",
        "prediction": if correct { "A" } else { "none" }, "correct": correct,
        "controls": {"blank_image": if blank_right { "A" } else { "B" }, "shuffled_image": "B", "option_prior": "A"},
    })
}

fn attack_record(id: usize, clean: bool, robust: bool) -> Value {
    json!({
        "id": id.to_string(), "method": "pgd", "norm": "linf", "epsilon": 8.0 / 255.0, "num_steps": 10, "num_restarts": 1,
        "objective": "completion", "answer": "B", "clean_correct": clean, "robust_correct": robust,
        "clean_prediction": if clean { "B" } else { "A" }, "adversarial_prediction": if robust { "B" } else { "none" }, "linf": 8.0 / 255.0,
        "question": "Which?", "options": ["x", "y"], "image": "clean.png", "adversarial_image": "images/a.png",
    })
}

fn options(out: &Path) -> ReportOptions {
    ReportOptions { out: Some(out.to_path_buf()), title: None, images: true }
}

#[test]
fn accuracies_and_controls_are_counted_from_the_records() {
    let dir = tempfile::tempdir().unwrap();
    let records: Vec<Value> =
        (0..40).map(|i| eval_record(i, if i < 10 { "CT" } else { "MRI" }, i % 4 != 0, i < 30)).collect();
    write_run(&dir.path().join("clean"), "eval", &records, &[], true);
    let runs = source::read_all(&[dir.path().join("clean")]).unwrap();
    let data = report_data(&runs, &options(dir.path()), &Silent).unwrap();
    let row = &data.tables[0].rows[0];
    assert_eq!(row[1], Cell::Number("40".into()));
    assert!(
        matches!(row[2], Cell::Share(share, Some([low, high])) if share == 0.75 && low < 0.75 && high > 0.75)
    );
    assert!(matches!(row[3], Cell::Share(0.75, _)), "blank image: {row:?}");
    assert!(matches!(row[4], Cell::Share(0.0, _)), "shuffled image: {row:?}");
    assert_eq!(row[6], Cell::Share(0.5, None));
    assert_eq!(data.details[0].title, "By modality: clean");
    assert_eq!((data.tables.len(), data.details.len()), (1, 1), "one question type needs no table");
    let above: Vec<&String> = data.notes.iter().filter(|note| note.contains("above chance")).collect();
    assert_eq!(above.len(), 2, "blank image and option prior, not shuffled: {:?}", data.notes);
}

#[test]
fn attacked_and_certified_items_are_shares_of_all_items() {
    let dir = tempfile::tempdir().unwrap();
    let attacks: Vec<Value> = (0..10).map(|i| attack_record(i, i < 8, i < 3)).collect();
    write_run(&dir.path().join("attack"), "attack", &attacks, &[], true);
    let certificates: Vec<Value> = (0..10)
        .map(|i| {
            json!({"id": i.to_string(), "correct": i < 6, "abstained": i == 9, "radius": if i == 9 { 0.0 } else { 0.1 * f64::from(i) },
                   "sigma": 0.25, "n": 1000, "alpha": 0.001})
        })
        .collect();
    write_run(&dir.path().join("certify"), "certify", &certificates, &[], false);
    let runs = source::read_all(&[dir.path().join("attack"), dir.path().join("certify")]).unwrap();
    let data = report_data(&runs, &ReportOptions { images: false, ..options(dir.path()) }, &Silent).unwrap();
    let attack = &data.tables[0].rows[0];
    assert_eq!(attack[3], Cell::Number("8/255".into()));
    assert!(matches!((&attack[9], &attack[10]), (Cell::Share(0.8, _), Cell::Share(0.3, _))), "{attack:?}");
    assert_eq!(attack[11], Cell::Number("7".into()));
    let certified = &data.tables[1];
    let at = |radius: &str| certified.head.iter().position(|name| name == radius).unwrap();
    let share = |radius: &str| certified.rows[0][at(radius)].clone();
    // Right items have radii 0, .1, .2, .3, .4, .5: six of ten at 0, three at .25, one at .5.
    assert!(matches!(share("r = 0"), Cell::Share(0.6, _)));
    assert!(matches!(share("r = 0.25"), Cell::Share(0.3, _)));
    assert!(matches!(share("r = 0.5"), Cell::Share(0.1, _)));
    assert_eq!(certified.rows[0].last(), Some(&Cell::Number("0.150".into())));
    assert!(
        data.notes.iter().any(|note| note == "certify is unfinished: 10 records so far"),
        "{:?}",
        data.notes
    );
    let curve = &data.figures[1].series[0].points;
    assert_eq!((curve[0].y, curve.last().unwrap().y), (0.6, 0.0));
    let budget = &data.figures[0].series[0].points;
    assert_eq!((budget[0].x, budget[0].y, budget[1].x, budget[1].y), (0.0, 0.8, 8.0, 0.3));
}

#[test]
fn a_change_outside_the_budget_is_said() {
    let dir = tempfile::tempdir().unwrap();
    let mut records: Vec<Value> = (0..3).map(|i| attack_record(i, true, true)).collect();
    records[1]["linf"] = json!(9.0 / 255.0);
    write_run(&dir.path().join("a"), "attack", &records, &[], true);
    let runs = source::read_all(&[dir.path().join("a")]).unwrap();
    let data = report_data(&runs, &ReportOptions::default(), &Silent).unwrap();
    assert_eq!(data.notes, ["a: 1 attacked images are outside the budget"]);
}

#[test]
fn pictures_show_clean_attacked_and_amplified_difference() {
    let dir = tempfile::tempdir().unwrap();
    let run = dir.path().join("attack");
    write_run(&run, "attack", &[attack_record(0, true, false)], &[], true);
    let clean = RgbImage8::new(2, 1, vec![100, 100, 100, 50, 50, 50]).unwrap();
    let other = RgbImage8::new(2, 1, vec![108, 100, 92, 50, 50, 54]).unwrap();
    fs::create_dir(run.join("images")).unwrap();
    fs::write(run.join("images/a.png"), encode_png(&other).unwrap()).unwrap();
    fs::write(dir.path().join("clean.png"), encode_png(&clean).unwrap()).unwrap();
    let facts = json!({"command": "attack", "data_root": dir.path()});
    fs::write(run.join("run.json"), facts.to_string()).unwrap();
    let runs = source::read_all(std::slice::from_ref(&run)).unwrap();
    let data = report_data(&runs, &options(&run), &Silent).unwrap();
    let captions: Vec<&str> = data.cards[0].pictures.iter().map(|picture| picture.caption.as_str()).collect();
    assert_eq!(captions, ["clean", "attacked", "difference × 15"]);
    let (image, _) = cards::amplified_difference(&clean, &other).unwrap();
    assert_eq!(image.data, [248, 128, 8, 128, 128, 188]);
    fs::remove_file(run.join("images/a.png")).unwrap();
    let kept = Kept::default();
    assert!(report_data(&runs, &options(&run), &kept).unwrap().cards[0].pictures.is_empty());
    assert!(kept.notes.lock().unwrap()[0].starts_with("no picture of `0`"));
}

#[test]
fn training_curves_come_from_metrics_and_the_files_are_written() {
    let dir = tempfile::tempdir().unwrap();
    let metrics: Vec<Value> = (1..=50)
        .map(|step| json!({"step": step, "loss": 1.0 / f64::from(step), "rewards/accuracy/mean": 0.5, "unrelated": 3}))
        .collect();
    for name in ["x", "y"] {
        write_run(&dir.path().join("runs").join(name), "train", &[], &metrics, true);
    }
    let out = dir.path().join("out");
    let outcome = report(&[dir.path().to_path_buf()], &options(&out), &Silent).unwrap();
    assert_eq!(outcome.summary["runs"][1]["steps"], 50);
    let page = fs::read_to_string(out.join("report.html")).unwrap();
    assert!(page.contains("Training: rewards/accuracy/mean") && page.contains("Training: loss"));
    assert!(!page.contains("unrelated"));
    assert!(fs::read_to_string(out.join("report.md")).unwrap().starts_with("# safemed: comparison of runs"));
}

#[test]
fn what_is_no_run_is_a_data_error() {
    let dir = tempfile::tempdir().unwrap();
    for path in [dir.path().join("absent"), dir.path().to_path_buf()] {
        let error = report(&[path], &ReportOptions::default(), &Silent).unwrap_err();
        assert_eq!(error.status(), crate::error::ExitStatus::Data, "{error}");
    }
}
