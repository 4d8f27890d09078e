use super::*;
use crate::error::ExitStatus;
use crate::recipes::config::TrainConfig;

fn config(out: &Path) -> RunConfig {
    RunConfig { out: Some(out.to_path_buf()), ..RunConfig::default() }
}

fn open(out: &Path, resume: bool) -> Result<Run> {
    Run::open(Command::Eval, &config(out), Opening { resume, ..Opening::default() })
}

fn item(id: &str) -> Value {
    json!({"id": id, "correct": true, "probability": 0.1})
}

fn check_refused(result: Result<Run>, words: &str) {
    let error = result.expect_err("must be refused");
    assert_eq!(error.status(), ExitStatus::Usage, "{error}");
    assert!(error.to_string().contains(words), "{error}");
}

#[test]
fn a_directory_in_use_is_refused_without_resume_and_continued_with_it() {
    let dir = tempfile::tempdir().unwrap();
    let out = dir.path().join("new/run");
    let mut run = open(&out, false).unwrap();
    run.record(&item("a")).unwrap();
    check_refused(open(&out, true), "another process is writing");
    drop(run);
    check_refused(open(&out, false), "--resume");
    let run = open(&out, true).unwrap();
    assert!(run.resumed());
    assert!(run.done_ids().contains("a"));
}

#[test]
fn resume_starts_an_empty_or_absent_directory() {
    let dir = tempfile::tempdir().unwrap();
    assert!(!open(dir.path(), true).unwrap().resumed());
    assert!(!open(&dir.path().join("absent"), true).unwrap().resumed());
}

#[test]
fn another_configuration_or_command_is_refused_with_the_keys_that_differ() {
    let dir = tempfile::tempdir().unwrap();
    drop(open(dir.path(), false).unwrap());
    let resume = || Opening { resume: true, ..Opening::default() };
    let other = RunConfig { seed: 7, max_new_tokens: 9, ..config(dir.path()) };
    let result = Run::open(Command::Eval, &other, resume());
    check_refused(result, "`max_new_tokens` was 512 and is 9; `seed` was 0 and is 7");
    check_refused(Run::open(Command::Attack, &config(dir.path()), resume()), "a run of `eval`");
    let train = TrainConfig { log_text_every: 1, log_images_every: 0, ..TrainConfig::default() };
    let same = RunConfig { threads: Some(1), batch_size: 3, train, ..config(dir.path()) };
    assert!(Run::open(Command::Eval, &same, resume()).is_ok());
}

#[test]
fn a_foreign_directory_is_left_as_it_was() {
    let dir = tempfile::tempdir().unwrap();
    fs::write(dir.path().join("thesis.tex"), "x").unwrap();
    check_refused(open(dir.path(), false), "not empty");
    check_refused(open(dir.path(), true), "no run to continue");
    check_refused(open(&dir.path().join("thesis.tex"), true), "is a file");
    assert_eq!(fs::read_dir(dir.path()).unwrap().count(), 1);
}

#[test]
fn a_killed_and_resumed_run_leaves_the_bytes_of_an_uninterrupted_one() {
    let dir = tempfile::tempdir().unwrap();
    let order: Vec<String> = ["a", "b", "c"].map(str::to_owned).to_vec();
    let whole = dir.path().join("whole");
    let mut run = open(&whole, false).unwrap();
    for id in &order {
        run.record(&item(id)).unwrap();
    }
    run.finish_records(&order).unwrap();

    let torn = dir.path().join("torn");
    let mut run = open(&torn, false).unwrap();
    run.record(&item("c")).unwrap();
    run.record(&item("a")).unwrap();
    drop(run);
    let path = torn.join("records.jsonl");
    let mut bytes = fs::read(&path).unwrap();
    bytes.truncate(bytes.len() - 3);
    fs::write(&path, bytes).unwrap();
    let mut run = open(&torn, true).unwrap();
    assert_eq!(run.done_ids().len(), 1);
    for id in ["b", "a"] {
        run.record(&item(id)).unwrap();
    }
    run.finish_records(&order).unwrap();
    assert_eq!(fs::read(whole.join("records.jsonl")).unwrap(), fs::read(path).unwrap());
}

#[test]
fn finishing_demands_one_record_for_each_item() {
    let dir = tempfile::tempdir().unwrap();
    let mut run = open(dir.path(), false).unwrap();
    run.record(&item("a")).unwrap();
    assert!(run.record(&item("a")).is_err(), "the same item twice");
    let missing = run.finish_records(&["a".to_owned(), "b".to_owned()]).unwrap_err();
    assert!(missing.to_string().contains("item `b` has no record"));
    let extra = run.finish_records(&[]).unwrap_err();
    assert_eq!(extra.status(), ExitStatus::Data);
}

#[test]
fn training_logs_rewound_and_written_again_have_the_same_bytes() {
    let dir = tempfile::tempdir().unwrap();
    let png = |step: u64| {
        let image = crate::pixels::RgbImage8::filled(2, 1, [step as u8; 3]).unwrap();
        crate::pixels::decode::encode_png(&image).unwrap()
    };
    let write = |run: &mut Run, steps: std::ops::RangeInclusive<u64>| {
        for step in steps {
            for group in 0..2 {
                let text = format!("<answer> {step}</answer>");
                run.completion(&json!({"step": step, "group": group, "completion": text, "reward": 1.0}))
                    .unwrap();
            }
            if step % 3 == 0 {
                run.pictures(
                    step,
                    &[("clean", png(step)), ("adversarial", png(step))],
                    &json!({"step": step}),
                )
                .unwrap();
            }
            // Every other step makes two updates.
            let line =
                |update: u64| json!({"step": step, "update": update, "loss": (update as f64) / step as f64});
            run.updates(&[line(1), line(2)][..=step as usize % 2]).unwrap();
        }
    };
    let train = TrainConfig { log_text_every: 2, ..TrainConfig::default() };
    let open = |out: &Path, resume: bool| {
        let config = RunConfig { train: train.clone(), ..config(out) };
        Run::open(Command::Train, &config, Opening { resume, ..Opening::default() }).unwrap()
    };
    let (whole, torn) = (dir.path().join("whole"), dir.path().join("torn"));
    write(&mut open(&whole, false), 1..=9);
    write(&mut open(&torn, false), 1..=7);
    let mut run = open(&torn, true);
    run.rewind_to(5).unwrap();
    assert_eq!(run.read_metrics().unwrap().len(), 8);
    assert!(torn.join("images/step-3/clean.png").exists() && !torn.join("images/step-6").exists());
    let events = "tensorboard/events.out.tfevents.0000000000.safemed";
    let rebuilt = fs::read(torn.join(events)).unwrap();
    write(&mut run, 6..=9);
    for file in ["metrics.jsonl", "completions.jsonl", events, "images/step-9/adversarial.png"] {
        assert_eq!(fs::read(whole.join(file)).unwrap(), fs::read(torn.join(file)).unwrap(), "{file}");
    }
    // Texts of even steps only, pictures of every third.
    let of = |needle: &str| {
        let bytes = fs::read(whole.join(events)).unwrap();
        assert!(bytes.starts_with(&rebuilt));
        bytes.windows(needle.len()).filter(|window| *window == needle.as_bytes()).count()
    };
    assert_eq!((of("<answer> 4<"), of("<answer> 5<"), of("IHDR")), (2, 0, 6));
    // A step that has lost its line is no whole log.
    let log = torn.join("metrics.jsonl");
    let lines = fs::read_to_string(&log).unwrap();
    fs::write(
        &log,
        lines
            .lines()
            .filter(|line| !line.contains("\"step\":2,"))
            .map(|line| line.to_owned() + "\n")
            .collect::<String>(),
    )
    .unwrap();
    drop(run);
    let error = open(&torn, true).rewind_to(5).unwrap_err();
    assert!(error.to_string().contains("only 1 of the steps before it are logged"), "{error}");
}

#[test]
fn changed_data_under_a_resumed_run_is_refused() {
    let dir = tempfile::tempdir().unwrap();
    open(dir.path(), false).unwrap().provenance("data_sha256", json!("aa")).unwrap();
    let mut run = open(dir.path(), true).unwrap();
    run.provenance("data_sha256", json!("aa")).unwrap();
    let error = run.provenance("data_sha256", json!("bb")).unwrap_err();
    assert_eq!(error.status(), ExitStatus::Usage);
    let facts: Value = serde_json::from_slice(&fs::read(dir.path().join("run.json")).unwrap()).unwrap();
    assert_eq!(facts["continued"].as_array().unwrap().len(), 1);
    assert_eq!(facts["command"], "eval");
}

#[test]
fn a_request_to_stop_ends_with_its_own_status() {
    let dir = tempfile::tempdir().unwrap();
    let stop = Stop::default();
    let opening = Opening { stop: stop.clone(), ..Opening::default() };
    let run = Run::open(Command::Eval, &config(dir.path()), opening).unwrap();
    assert!(run.check_stop().is_ok());
    stop.request();
    assert_eq!(run.check_stop().unwrap_err().status(), ExitStatus::Stopped);
}

#[test]
fn default_directories_are_named_by_the_utc_time() {
    assert_eq!(timestamp(0), "19700101-000000");
    assert_eq!(timestamp(951_827_696), "20000229-123456");
    assert_eq!(timestamp(1_735_689_599), "20241231-235959");
}
