use super::{Path, ReportData, ReportOptions, Value, cards, json, report, report_data, source, to_html};
use crate::eval::report::{Card, Cell, Figure, Table};
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
    assert!(page.contains("Training: reward `accuracy`") && page.contains("Training: Loss"));
    assert!(!page.contains("unrelated"));
    assert!(fs::read_to_string(out.join("report.md")).unwrap().starts_with("# safemed: comparison of runs"));
}

fn figure<'a>(data: &'a ReportData, title: &str) -> Option<&'a Figure> {
    data.figures.iter().find(|figure| figure.title == title)
}

/// Two runs: one of two updates a step, validated; another of 5000 steps.
fn training_runs(dir: &Path) -> Vec<source::RunDir> {
    let long: Vec<Value> = (1..=5000)
        .map(|step| {
            json!({"step": step, "loss": step, "num_tokens": 10 * step, "rewards/accuracy_adversarial/mean": 0.25,
                   "rewards/accuracy_clean/mean": 0.5, "rewards/accuracy/mean": 0.375, "rewards/brevity/mean": -0.5,
                   "clip_ratio/region_mean": 0.0, "epsilon": 2.0 / 255.0})
        })
        .collect();
    write_run(&dir.join("long"), "train", &[], &long, true);
    let line = |step: u64, update: u64| json!({"step": step, "update": update, "loss": update, "kl": 0.1});
    write_run(&dir.join("short"), "train", &[], &[line(1, 1), line(1, 2), line(2, 0)], true);
    fs::write(
        dir.join("short/config.toml"),
        "[train]\nrecipe = \"at_grpo\"\n[train.grpo]\nnum_updates = 2\n",
    )
    .unwrap();
    let file = |name: &str, lines: &[Value]| {
        let text: String = lines.iter().map(|line| line.to_string() + "\n").collect();
        fs::write(dir.join("short").join(name), text).unwrap();
    };
    let validated = |step: u64, clean: f64, pgd: f64| {
        let controls = json!({"blank_image": 0.3, "option_prior": 0.4, "chance": 0.25});
        json!({"step": step, "clean": {"accuracy": clean, "n": 10}, "pgd": {"accuracy": pgd, "n": 10}, "controls": controls})
    };
    file("validation.jsonl", &[validated(0, 0.5, 0.1), validated(2, 0.9, 0.6)]);
    let step = |attack: f64, update: f64| json!({"what": "step", "seconds": attack + update, "attack": attack, "update": update, "peak_memory_bytes": 3.0 * f64::from(1 << 30)});
    file("timings.jsonl", &[step(3.0, 1.0), step(2.0, 2.0), json!({"what": "validation", "seconds": 2.0})]);
    let completion = |step: u64, group: u64, reward: f64| {
        json!({"step": step, "group": group, "id": "a", "answer": "B", "prompt": "Which?", "completion": format!("says {step} {group} {reward}"),
               "reward": reward, "accuracy": f64::from(reward > 1.0), "advantage": reward - 1.0, "length": 3, "is_finished": reward > 0.0})
    };
    let rewards = [0.5, 2.0, 0.0, 1.0, 1.5, 0.25];
    let completions: Vec<Value> = (1..=2)
        .flat_map(|step| (0..2).flat_map(move |group| rewards.map(|reward| completion(step, group, reward))))
        .collect();
    file("completions.jsonl", &completions);
    source::read_all(&[dir.join("long"), dir.join("short")]).unwrap()
}

#[test]
fn curves_of_training_runs_lie_over_each_other() {
    let dir = tempfile::tempdir().unwrap();
    let runs = training_runs(dir.path());
    let data = report_data(&runs, &options(dir.path()), &Silent).unwrap();
    let names = |title: &str| {
        let figure = figure(&data, title).unwrap_or_else(|| panic!("no plot {title}"));
        figure.series.iter().map(|series| series.name.as_str()).collect::<Vec<_>>()
    };
    assert_eq!(names("Training: Loss"), ["long", "short"]);
    assert_eq!(names("Training: Accuracy of sampled completions"), ["long, adversarial", "long, clean"]);
    assert_eq!(names("Training: reward `brevity`"), ["long"]);
    assert_eq!(
        names("Validation accuracy"),
        [
            "short, adversarial",
            "short, clean",
            "short, best blind control",
            "short, best checkpoint (step 2)"
        ]
    );
    assert!(figure(&data, "Validation reward").is_none(), "nothing was rewarded");
    assert!(figure(&data, "Training: Ratios clipped").is_none(), "nothing was clipped");
    assert!(figure(&data, "Training: reward `accuracy`").is_none(), "it is shown by kind of image");
    let loss = figure(&data, "Training: Loss").unwrap();
    // Means of five neighbours: 1 to 5, ..., 4996 to 5000.
    let ends =
        [loss.series[0].points[0], *loss.series[0].points.last().unwrap()].map(|point| (point.x, point.y));
    assert_eq!((loss.series[0].points.len(), ends), (1000, [(3.0, 3.0), (4998.0, 4998.0)]));
    // Updates of a step lie before its end.
    let updates: Vec<(f64, f64)> = loss.series[1].points.iter().map(|point| (point.x, point.y)).collect();
    assert_eq!(updates, [(0.5, 1.0), (1.0, 2.0), (2.0, 0.0)]);
    let epsilon = figure(&data, "Training: Budget of the adversary").unwrap();
    assert_eq!(epsilon.y_label, "epsilon (L-inf, 8-bit levels)");
    assert!((epsilon.series[0].points[7].y - 2.0).abs() < 1e-12);
    let validation = figure(&data, "Validation accuracy").unwrap().series[0].points[1];
    let [low, high] = validation.interval.unwrap();
    assert!(
        validation.x == 2.0 && validation.y == 0.6 && low > 0.3 && low < 0.6 && high > 0.6,
        "{validation:?}"
    );
    assert!(to_html(&data).unwrap().contains("short, adversarial"));
}

#[test]
fn rewards_of_validation_have_curves_of_their_own_and_the_best_checkpoint_is_marked_where_it_was_chosen() {
    let dir = tempfile::tempdir().unwrap();
    let run = dir.path().join("grpo");
    write_run(&run, "train", &[], &[json!({"step": 1}), json!({"step": 2})], false);
    let line = |step: u64, clean: f64, pgd: f64| {
        let of = |accuracy: f64, reward: f64| json!({"accuracy": accuracy, "n": 10, "reward": reward});
        json!({"step": step, "clean": of(0.5, clean), "pgd": of(0.25, pgd)})
    };
    let lines = [line(0, 3.0, 2.0), line(1, 0.75, 0.5), line(2, 1.5, 0.125)];
    let text: String = lines.iter().map(|line| line.to_string() + "\n").collect();
    fs::write(run.join("validation.jsonl"), text).unwrap();
    for (metric, step, value) in [("reward", 2.0, 1.5), ("robust_reward", 1.0, 0.5)] {
        let config = format!("[train]\nrecipe = \"at_grpo\"\n[train.validation]\nmetric = \"{metric}\"\n");
        fs::write(run.join("config.toml"), config).unwrap();
        let runs = source::read_all(std::slice::from_ref(&run)).unwrap();
        let data = report_data(&runs, &options(dir.path()), &Silent).unwrap();
        let reward = figure(&data, "Validation reward").unwrap();
        let names: Vec<&str> = reward.series.iter().map(|series| series.name.as_str()).collect();
        let best = format!("grpo, best checkpoint (step {step})");
        assert_eq!(names, ["grpo, adversarial", "grpo, clean", best.as_str()], "{metric}");
        assert_eq!((reward.series[1].points[0].y, reward.y_range), (3.0, None));
        let marked = &reward.series[2].points;
        assert_eq!((marked.len(), marked[0].x, marked[0].y), (1, step, value), "{metric}");
        let accuracy = figure(&data, "Validation accuracy").unwrap();
        assert_eq!(accuracy.series.len(), 2, "the best was not chosen by accuracy");
        let table = data.tables.iter().find(|table| table.title == "Training").unwrap();
        let at = |name: &str| table.head.iter().position(|head| head == name).unwrap();
        assert_eq!(table.rows[0][at("validation reward, clean")], Cell::Number("1.500".into()));
        let said = format!("step {step}: {metric} {value:.3}");
        assert_eq!(table.rows[0][at("best checkpoint")], Cell::Text(said));
        assert!(to_html(&data).unwrap().contains("Validation reward"));
    }
}

#[test]
fn a_run_whose_configuration_this_version_refuses_is_reported_with_a_note() {
    let dir = tempfile::tempdir().unwrap();
    let run = dir.path().join("old");
    write_run(
        &run,
        "train",
        &[],
        &[json!({"step": 1, "epsilon": 0.5}), json!({"step": 2, "epsilon": 0.5})],
        true,
    );
    let validated = json!({"step": 2, "clean": {"accuracy": 0.5}, "pgd": {"accuracy": 0.25}});
    fs::write(run.join("validation.jsonl"), validated.to_string() + "\n").unwrap();
    fs::write(run.join("config.toml"), "[train]\nrecipe = \"of_old\"\nforgotten_key = 1\n").unwrap();
    let out = dir.path().join("out");
    report(std::slice::from_ref(&run), &options(&out), &Silent).unwrap();
    let runs = source::read_all(std::slice::from_ref(&run)).unwrap();
    let data = report_data(&runs, &options(&out), &Silent).unwrap();
    let [note] = &data.notes[..] else { panic!("{:?}", data.notes) };
    assert!(
        note.starts_with("old: this version refuses its `config.toml` (") && note.contains("and 1 more"),
        "{note}"
    );
    // Nothing is told that only the configuration knew.
    let table = data.tables.iter().find(|table| table.title == "Training").unwrap();
    assert_eq!(
        (&table.rows[0][1], table.head.contains(&"best checkpoint".to_owned())),
        (&Cell::Missing, false)
    );
    assert_eq!(
        figure(&data, "Training: Budget of the adversary").unwrap().y_label,
        "epsilon (pixels in [0, 1])"
    );
    // What is no such refusal stays an error.
    fs::write(run.join("config.toml"), b"\xff").unwrap();
    assert!(source::read_all(&[run]).is_err());
}

#[test]
fn tables_of_training_say_what_came_of_it_and_where_the_time_went() {
    let dir = tempfile::tempdir().unwrap();
    let data = report_data(&training_runs(dir.path()), &options(dir.path()), &Silent).unwrap();
    let cell = |table: &Table, row: usize, column: &str| {
        table.rows[row][table.head.iter().position(|name| name == column).unwrap()].clone()
    };
    let number = |text: &str| Cell::Number(text.to_owned());
    let training = data.tables.iter().find(|table| table.title == "Training").unwrap();
    assert_eq!(cell(training, 0, "steps"), number("5000"));
    assert_eq!(cell(training, 0, "tokens seen"), number("50000"));
    // The last tenth: 4501 to 5000.
    assert_eq!(cell(training, 0, "loss"), number("4750.500"));
    assert_eq!(cell(training, 0, "sampled, adversarial"), Cell::Share(0.25, None));
    assert_eq!(cell(training, 1, "recipe"), Cell::Text("at_grpo".to_owned()));
    assert_eq!(cell(training, 1, "sampled, adversarial"), Cell::Missing);
    assert!(matches!(cell(training, 1, "validation, clean"), Cell::Share(0.9, Some(_))));
    assert!(matches!(cell(training, 1, "validation, best blind control"), Cell::Share(0.4, None)));
    assert_eq!(cell(training, 1, "best checkpoint"), Cell::Text("step 2: robust_accuracy 0.600".to_owned()));
    assert_eq!(cell(training, 0, "best checkpoint"), Cell::Missing);
    let times = data.details.iter().find(|table| table.title.starts_with("Where the time")).unwrap();
    assert_eq!(times.rows.len(), 1, "a run that noted no time has no row");
    for (column, text) in
        [("steps timed", "2"), ("seconds", "10"), ("seconds a step", "4.000"), ("peak memory (GiB)", "3.00")]
    {
        assert_eq!(cell(times, 0, column), number(text), "{column}");
    }
    for (column, share) in [("attack", 0.5), ("update", 0.3), ("validation", 0.2)] {
        assert_eq!(cell(times, 0, column), Cell::Share(share, None), "{column}");
    }
}

#[test]
fn completions_of_training_are_shown_best_and_worst_with_the_pictures_of_their_step() {
    let dir = tempfile::tempdir().unwrap();
    let runs = training_runs(dir.path());
    let data = report_data(&runs, &options(dir.path()), &Silent).unwrap();
    let labels = |card: &Card| card.answers.iter().map(|answer| answer.label.clone()).collect::<Vec<_>>();
    assert_eq!(data.cards.len(), 2, "first and last step of the run that has completions");
    assert_eq!(labels(&data.cards[0]), ["reward 2.00", "reward 1.50", "reward 0.25", "reward 0.00"]);
    let (best, worst) = (&data.cards[1].answers[0], &data.cards[1].answers[3]);
    assert_eq!((best.prediction.as_str(), best.correct), ("advantage +1.00 · 3 tokens", true));
    assert_eq!((worst.prediction.as_str(), worst.correct), ("advantage -1.00 · 3 tokens, cut off", false));
    assert_eq!((best.completion.as_str(), data.cards[1].question.as_str()), ("says 2 0 2", "Which?"));

    let folder = dir.path().join("short/images/step-2");
    fs::create_dir_all(&folder).unwrap();
    let image = RgbImage8::filled(2, 2, [7; 3]).unwrap();
    for name in ["clean.png", "adversarial.png"] {
        fs::write(folder.join(name), encode_png(&image).unwrap()).unwrap();
    }
    let about = json!({"step": 2, "id": "a", "question": "Where?", "options": ["x", "y"], "answer": "B", "norm": "linf", "epsilon": 4.0 / 255.0});
    fs::write(folder.join("about.json"), about.to_string()).unwrap();
    let data = report_data(&runs, &options(dir.path()), &Silent).unwrap();
    let [card] = &data.cards[..] else { panic!("{:?}", data.cards) };
    let captions: Vec<&str> = card.pictures.iter().map(|picture| picture.caption.as_str()).collect();
    assert_eq!(captions, ["clean", "attacked"]);
    assert_eq!(
        (card.question.as_str(), card.detail.as_str()),
        ("Where?", "short · step 2 · a · epsilon 4/255")
    );
    assert_eq!((card.answer, card.options.len(), card.answers.len()), (Some(1), 2, 4));
    let without = ReportOptions { images: false, ..options(dir.path()) };
    assert!(report_data(&runs, &without, &Silent).unwrap().cards[0].pictures.is_empty());
    fs::write(folder.join("clean.png"), "no picture").unwrap();
    let kept = Kept::default();
    assert!(report_data(&runs, &options(dir.path()), &kept).unwrap().cards[0].pictures.is_empty());
    assert!(kept.notes.lock().unwrap()[0].starts_with("no picture of step 2 of short"));
}

#[test]
fn what_is_no_run_is_a_data_error() {
    let dir = tempfile::tempdir().unwrap();
    for path in [dir.path().join("absent"), dir.path().to_path_buf()] {
        let error = report(&[path], &ReportOptions::default(), &Silent).unwrap_err();
        assert_eq!(error.status(), crate::error::ExitStatus::Data, "{error}");
    }
}
