//! The commands around a checkpoint: what they write, that nothing but the settings changes a byte, what they refuse.

use crate::support::{self, texts as said};
use crate::tiny::{phantoms, tiny_checkpoint};
use safemed::backend::{Isa, isa};
use safemed::data::Shard;
use safemed::error::{Error, ExitStatus, Result};
use safemed::recipes::config::{Command, RunConfig, Scoring};
use safemed::recipes::job::{Job, Outcome};
use safemed::recipes::progress::Silent;
use safemed::recipes::run::Stop;
use safemed::recipes::{eval, merge};
use serde_json::Value;
use std::collections::BTreeSet;
use std::fs;
use std::path::{Path, PathBuf};
use std::sync::OnceLock;

/// A checkpoint and questions, made once for all tests.
struct Material {
    _dir: tempfile::TempDir,
    model: PathBuf,
    data: PathBuf,
}

fn material() -> &'static Material {
    static MADE: OnceLock<Material> = OnceLock::new();
    MADE.get_or_init(|| {
        let dir = tempfile::tempdir().unwrap();
        let (model, data) = (dir.path().join("model"), dir.path().join("data"));
        tiny_checkpoint(&model);
        phantoms(&data);
        Material { _dir: dir, model, data }
    })
}

/// Runs the program.
fn safemed(arguments: &[&str]) -> std::process::Output {
    support::safemed(Path::new(".")).args(arguments).output().unwrap()
}

/// Twenty test questions, answered in one token: a letter, or nothing.
fn config(out: &Path) -> RunConfig {
    let Material { model, data, .. } = material();
    let mut config = RunConfig {
        model: Some(model.display().to_string()),
        prompt: "phantom".to_owned(),
        max_new_tokens: 1,
        out: Some(out.to_path_buf()),
        ..RunConfig::default()
    };
    config.data.omnimedvqa = Some(data.clone());
    config.data.split = Some("splits/test.json".into());
    config.data.train_split = Some("splits/train.json".into());
    config.data.limit = Some(20);
    config
}

fn evaluate_with(config: RunConfig, resume: bool, stop: Stop) -> Result<Outcome> {
    let pool = rayon::ThreadPoolBuilder::new().num_threads(config.threads.unwrap_or(2)).build().unwrap();
    pool.install(|| {
        eval::eval(&Job {
            command: Command::Eval,
            config,
            resume,
            command_line: Vec::new(),
            stop,
            progress: &Silent,
        })
    })
}

fn evaluate(config: RunConfig) -> Outcome {
    evaluate_with(config, false, Stop::default()).unwrap()
}

fn text(dir: &Path, name: &str) -> String {
    fs::read_to_string(dir.join(name)).unwrap()
}

fn json(dir: &Path, name: &str) -> Value {
    serde_json::from_str(&text(dir, name)).unwrap()
}

fn records(dir: &Path) -> Vec<Value> {
    text(dir, "records.jsonl").lines().map(|line| serde_json::from_str(line).unwrap()).collect()
}

/// The summary without the seconds.
fn numbers(dir: &Path) -> Value {
    let mut summary = json(dir, "summary.json");
    summary.as_object_mut().unwrap().remove("seconds").unwrap();
    summary
}

fn check_same_results(a: &Path, b: &Path) {
    assert_eq!(text(a, "records.jsonl"), text(b, "records.jsonl"), "{} {}", a.display(), b.display());
    assert_eq!(numbers(a), numbers(b));
}

#[test]
fn eval_writes_one_record_an_item_and_a_summary_of_them() {
    let dir = tempfile::tempdir().unwrap();
    let out = dir.path().join("run");
    let outcome = evaluate(config(&out));
    let (records, summary) = (records(&out), json(&out, "summary.json"));
    assert_eq!(outcome.summary, summary);
    assert_eq!((records.len(), &summary["n"]), (20, &Value::from(20)));
    let ids: Vec<&str> = records.iter().map(|record| record["id"].as_str().unwrap()).collect();
    assert!(ids.is_sorted());
    let right = records.iter().filter(|record| record["prediction"] == record["answer"]).count();
    assert_eq!(summary["accuracy"], right as f64 / 20.0);
    let unread = records.iter().filter(|record| record["prediction"] == "none").count();
    assert_eq!(summary["unparsable"], unread as f64 / 20.0);
    for control in ["blank_image", "shuffled_image", "option_prior"] {
        let right = records.iter().filter(|record| record["controls"][control] == record["answer"]).count();
        assert_eq!(summary["controls"][control], right as f64 / 20.0, "{control}");
    }
    assert_eq!(summary["controls"]["chance"], 0.25);
    let by_modality = summary["by_modality"].as_object().unwrap();
    for (modality, accuracy) in by_modality {
        let of: Vec<&Value> = records.iter().filter(|record| record["modality"] == **modality).collect();
        let right = of.iter().filter(|record| record["correct"] == true).count();
        assert_eq!(*accuracy, right as f64 / of.len() as f64, "{modality}");
    }
    // The tiny model looks at the image: else these tests would hold for one that does not.
    let different = |control: &str| {
        records.iter().filter(|record| record["controls"][control] != record["prediction"]).count()
    };
    assert!(different("blank_image") > 0 && different("shuffled_image") > 0);
    let answers: BTreeSet<&str> =
        records.iter().map(|record| record["prediction"].as_str().unwrap()).collect();
    assert!(answers.len() > 2, "{answers:?}");
    let keys: Vec<&String> = records[0].as_object().unwrap().keys().collect();
    assert_eq!(
        keys,
        [
            "id",
            "dataset",
            "modality",
            "modality_raw",
            "question_type",
            "question",
            "options",
            "answer",
            "prediction",
            "correct",
            "completion",
            "probabilities",
            "controls",
            "image_reading"
        ]
    );
    assert!(text(&out, "report.md").contains("accuracy") && out.join("report.html").is_file());
    let facts = json(&out, "run.json");
    assert_eq!(facts["items"], 20);
    for hash in ["data_sha256", "images_sha256", "model_sha256", "prompt_sha256", "train_data_sha256"] {
        assert_eq!(facts[hash].as_str().map(str::len), Some(64), "{hash}");
    }
}

#[test]
fn likelihood_gives_probabilities_whose_largest_is_the_prediction() {
    let dir = tempfile::tempdir().unwrap();
    evaluate(RunConfig { scoring: Scoring::Likelihood, ..config(dir.path()) });
    for record in records(dir.path()) {
        let probabilities: Vec<f64> = serde_json::from_value(record["probabilities"].clone()).unwrap();
        assert_eq!(probabilities.len(), record["options"].as_array().unwrap().len());
        assert!((probabilities.iter().sum::<f64>() - 1.0).abs() < 1e-12);
        let best = (0..probabilities.len()).max_by(|a, b| probabilities[*a].total_cmp(&probabilities[*b]));
        let letter = char::from(b'A' + best.unwrap() as u8).to_string();
        assert_eq!(record["prediction"], letter);
        assert_eq!(record["completion"], format!("<answer> {letter}</answer>"));
    }
    assert_eq!(numbers(dir.path())["unparsable"], 0.0);
}

#[test]
fn neither_batches_nor_threads_change_a_byte() {
    for scoring in [Scoring::Generate, Scoring::Likelihood] {
        let dir = tempfile::tempdir().unwrap();
        let config = |out: &Path| RunConfig { max_new_tokens: 5, scoring, ..config(out) };
        let first = dir.path().join("first");
        evaluate(RunConfig { batch_size: 1, threads: Some(1), ..config(&first) });
        if scoring == Scoring::Generate {
            // Items of one batch end at different times.
            let lengths: BTreeSet<usize> =
                records(&first).iter().map(|record| record["completion"].as_str().unwrap().len()).collect();
            assert!(lengths.len() > 2, "{lengths:?}");
        }
        for (batch_size, threads) in [(3, 1), (8, 2), (1, 2)] {
            let other = dir.path().join(format!("{batch_size}-{threads}"));
            evaluate(RunConfig { batch_size, threads: Some(threads), ..config(&other) });
            check_same_results(&first, &other);
        }
    }
}

#[test]
fn lesser_instructions_agree_to_rounding_and_an_unknown_word_for_them_is_refused() {
    let dir = tempfile::tempdir().unwrap();
    let probabilities = |isa: &str| -> Vec<f64> {
        let out = dir.path().join(isa);
        let mut command = support::safemed(dir.path());
        command.env("SAFEMED_ISA", isa).args([
            "eval",
            "--scoring",
            "likelihood",
            "--limit",
            "6",
            "--prompt",
            "phantom",
        ]);
        command.arg("--model").arg(&material().model).arg("--omnimedvqa").arg(&material().data);
        let output = command.args(["--no-images", "--out"]).arg(&out).output().unwrap();
        assert_eq!(output.status.code(), Some(0), "{isa}: {}", String::from_utf8_lossy(&output.stderr));
        assert_eq!(json(&out, "run.json")["kernels"], isa);
        let of =
            |record: Value| -> Vec<f64> { serde_json::from_value(record["probabilities"].clone()).unwrap() };
        records(&out).into_iter().flat_map(of).collect()
    };
    let best = isa();
    let reference = probabilities(best.word());
    for lesser in [Isa::Baseline, Isa::Avx2].into_iter().filter(|isa| *isa < best) {
        for (a, b) in probabilities(lesser.word()).iter().zip(&reference) {
            assert!((a - b).abs() < 1e-5, "{lesser:?}: {a} {b}");
        }
    }
    let refused = support::safemed(dir.path()).env("SAFEMED_ISA", "mmx").arg("doctor").output().unwrap();
    assert_eq!(refused.status.code(), Some(2));
    assert!(String::from_utf8_lossy(&refused.stderr).contains("baseline, avx2 or avx512"));
}

#[test]
fn lesser_instructions_train_and_attack_alike_to_rounding() {
    let dir = tempfile::tempdir().unwrap();
    let steps = |isa: &str| -> Vec<Value> {
        let out = dir.path().join(isa);
        let mut command = support::safemed(dir.path());
        command.env("SAFEMED_ISA", isa).arg("train");
        command.arg("--model").arg(&material().model).arg("--omnimedvqa").arg(&material().data);
        for setting in [
            "data.split=splits/train.json",
            "data.limit=12",
            "prompt=phantom",
            "images=false",
            "train.recipe=at_sft",
            "train.target=instruct",
            "train.num_steps=2",
            "train.batch_size=4",
            "train.learning_rate=0.001",
            // Where a gradient is nothing but rounding, its sign would be taken for a direction otherwise.
            "train.adam_epsilon=1e-4",
            "train.adversary.norm=l2",
            "train.adversary.epsilon=0.25",
            "train.adversary.num_steps=2",
            "train.adversary.random_start=false",
            "train.adversary.clean_fraction=0",
            "train.adversary.epsilon_schedule=constant",
        ] {
            command.args(["--set", setting]);
        }
        let output = command.arg("--out").arg(&out).output().unwrap();
        assert_eq!(output.status.code(), Some(0), "{isa}: {}", String::from_utf8_lossy(&output.stderr));
        assert_eq!(json(&out, "run.json")["kernels"], isa);
        text(&out, "metrics.jsonl").lines().map(|line| serde_json::from_str(line).unwrap()).collect()
    };
    let best = isa();
    let reference = steps(best.word());
    assert_eq!(reference.len(), 2);
    assert!(reference.iter().all(|step| step["pgd_gain"].as_f64() > Some(0.0)), "{reference:?}");
    for lesser in [Isa::Baseline, Isa::Avx2].into_iter().filter(|isa| *isa < best) {
        for (step, wanted) in steps(lesser.word()).iter().zip(&reference) {
            for key in ["loss", "grad_norm", "loss_clean", "loss_adversarial"] {
                let (found, wanted) = (step[key].as_f64().unwrap(), wanted[key].as_f64().unwrap());
                assert!(
                    wanted > 0.0 && (found / wanted - 1.0).abs() < 1e-4,
                    "{lesser:?} {key}: {found} {wanted}"
                );
            }
        }
    }
}

#[test]
fn the_order_of_the_questions_changes_no_byte() {
    let dir = tempfile::tempdir().unwrap();
    let (data, a, b) = (dir.path().join("data"), dir.path().join("a"), dir.path().join("b"));
    copy(&material().data, &data);
    let ids: Vec<String> = serde_json::from_str(&text(&data, "splits/test.json")).unwrap();
    fs::write(data.join("some.json"), serde_json::to_string(&ids[50..70]).unwrap()).unwrap();
    let with = |out: &Path| {
        let mut config = config(out);
        config.data.omnimedvqa = Some(data.clone());
        config.data.split = Some("some.json".into());
        config.data.train_split = None;
        config
    };
    evaluate(with(&a));
    let questions = data.join("QA_information/Open-access/Phantom.json");
    let mut records: Vec<Value> = serde_json::from_slice(&fs::read(&questions).unwrap()).unwrap();
    records.reverse();
    fs::write(&questions, serde_json::to_string(&records).unwrap()).unwrap();
    evaluate(with(&b));
    check_same_results(&a, &b);
    assert_eq!(json(&a, "run.json")["data_sha256"], json(&b, "run.json")["data_sha256"]);
}

#[test]
fn a_run_torn_in_the_middle_of_a_line_is_continued_to_the_same_bytes() {
    let dir = tempfile::tempdir().unwrap();
    let (whole, torn) = (dir.path().join("whole"), dir.path().join("torn"));
    evaluate(config(&whole));
    evaluate(config(&torn));
    let content = text(&torn, "records.jsonl");
    for keep in [content.len() / 2, content.find('\n').unwrap() - 3, content.len() - 1] {
        fs::write(torn.join("records.jsonl"), &content[..keep]).unwrap();
        fs::remove_file(torn.join("summary.json")).unwrap();
        let resumed = RunConfig { batch_size: 3, ..config(&torn) };
        evaluate_with(resumed, true, Stop::default()).unwrap();
        check_same_results(&whole, &torn);
    }
}

#[test]
fn a_stop_request_leaves_everything_saved_and_the_run_goes_on_later() {
    let dir = tempfile::tempdir().unwrap();
    let (whole, stopped) = (dir.path().join("whole"), dir.path().join("stopped"));
    evaluate(config(&whole));
    let stop = Stop::default();
    stop.request();
    let error = evaluate_with(config(&stopped), false, stop).unwrap_err();
    assert_eq!(error.status(), ExitStatus::Stopped);
    assert!(!stopped.join("summary.json").exists());
    evaluate_with(config(&stopped), true, Stop::default()).unwrap();
    check_same_results(&whole, &stopped);
}

#[test]
fn a_run_is_not_continued_on_other_questions_or_weights() {
    let dir = tempfile::tempdir().unwrap();
    let (model, out) = (dir.path().join("model"), dir.path().join("run"));
    tiny_checkpoint(&model);
    let with = || RunConfig { model: Some(model.display().to_string()), ..config(&out) };
    evaluate(with());
    let weights = model.join("model.safetensors");
    let mut bytes = fs::read(&weights).unwrap();
    let last = bytes.len() - 1;
    bytes[last] ^= 1;
    fs::write(&weights, bytes).unwrap();
    let error = evaluate_with(with(), true, Stop::default()).unwrap_err();
    assert!(matches!(&error, Error::Usage(text) if text.contains("model_sha256")), "{error}");
}

/// Runs the shards of twenty questions into `dir`, each in its own directory.
fn shards(dir: &Path, count: usize) {
    for index in 0..count {
        let mut part = config(&dir.join(index.to_string()));
        part.data.shard = Some(Shard { index, count });
        evaluate(part);
    }
}

#[test]
fn shards_merged_are_the_run_that_was_not_sharded() {
    let dir = tempfile::tempdir().unwrap();
    let (whole, parts) = (dir.path().join("whole"), dir.path().join("parts"));
    evaluate(config(&whole));
    shards(&parts, 3);
    let outcome = merge::merge(&parts, &Silent).unwrap();
    assert_eq!((&outcome.summary["pass"], outcome.check_failed), (&Value::from(true), None));
    check_same_results(&whole, &parts);
    let without_out = |dir: &Path| {
        let lines = text(dir, "config.toml");
        lines.lines().filter(|line| !line.starts_with("out =")).map(str::to_owned).collect::<Vec<_>>()
    };
    assert_eq!(without_out(&whole), without_out(&parts));
}

#[test]
fn parts_that_do_not_make_a_whole_are_refused_and_nothing_is_written() {
    let dir = tempfile::tempdir().unwrap();
    let parts = dir.path();
    shards(parts, 2);
    let check_fails = |words: &str| {
        let outcome = merge::merge(parts, &Silent).unwrap();
        let problems = outcome.summary["problems"].to_string();
        assert!(outcome.check_failed.is_some() && problems.contains(words), "{words}: {problems}");
        assert!(!parts.join("records.jsonl").exists());
    };
    let file = parts.join("1/records.jsonl");
    let whole = fs::read_to_string(&file).unwrap();
    let lines: Vec<&str> = whole.lines().collect();
    fs::write(&file, lines[1..].join("\n") + "\n").unwrap();
    check_fails("19 records, but the run has 20 items");
    let first_of_0 = text(parts, "0/records.jsonl").lines().next().unwrap().to_owned();
    fs::write(&file, format!("{first_of_0}\n{}\n", lines[1..].join("\n"))).unwrap();
    check_fails("is in");
    let renamed = lines[0].replacen("Phantom_", "Zhantom_", 1);
    fs::write(&file, format!("{}\n{renamed}\n", lines[1..].join("\n"))).unwrap();
    check_fails("does not belong to shard");
    fs::write(&file, &whole).unwrap();
    let summary = fs::read(parts.join("1/summary.json")).unwrap();
    fs::remove_file(parts.join("1/summary.json")).unwrap();
    check_fails("unfinished");
    fs::write(parts.join("1/summary.json"), summary).unwrap();
    let facts = text(parts, "1/run.json");
    let hash = json(parts, "1/run.json")["model_sha256"].as_str().unwrap().to_owned();
    fs::write(parts.join("1/run.json"), facts.replace(&hash, "0")).unwrap();
    check_fails("`model_sha256` in run.json differs");
    fs::remove_dir_all(parts.join("1")).unwrap();
    check_fails("part 1/2 is missing");
    let (status, stdout, _) = said(&safemed(&["merge", &parts.display().to_string(), "--json"]));
    assert_eq!((status, serde_json::from_str::<Value>(&stdout).unwrap()["pass"].clone()), (5, false.into()));
}

/// Copies a directory of files and folders.
fn copy(from: &Path, to: &Path) {
    fs::create_dir_all(to).unwrap();
    for entry in fs::read_dir(from).unwrap() {
        let path = entry.unwrap().path();
        let target = to.join(path.file_name().unwrap());
        if path.is_dir() {
            copy(&path, &target);
        } else {
            fs::copy(&path, &target).unwrap();
        }
    }
}

/// Runs `eval` as a program on a data root and a model; gives exit status and standard error.
fn run_eval(model: &Path, data: &Path, more: &[&str]) -> (i32, String) {
    let out = tempfile::tempdir().unwrap();
    let out = out.path().join("run").display().to_string();
    let (model, data) = (model.display().to_string(), data.display().to_string());
    let mut arguments = vec!["eval", "--model", &model, "--omnimedvqa", &data, "--out", &out];
    arguments.extend(["--prompt", "phantom", "--max-new-tokens", "2", "--limit", "4"]);
    arguments.extend(more);
    let (status, stdout, stderr) = said(&safemed(&arguments));
    assert!(status == 0 || stdout.is_empty(), "{stdout}");
    assert!(!stderr.contains("panicked"), "{stderr}");
    (status, stderr)
}

/// A sound tree in which `damage` changes the text of the questions or the first image.
fn check_damaged_data(words: &[&str], damage: impl Fn(&Path, &str, &Path) -> Option<String>) {
    let dir = tempfile::tempdir().unwrap();
    let data = dir.path().join("data");
    copy(&material().data, &data);
    let questions = data.join("QA_information/Open-access/Phantom.json");
    let content = fs::read_to_string(&questions).unwrap();
    let records: Vec<Value> = serde_json::from_str(&content).unwrap();
    let image = data.join(records[0]["image_path"].as_str().unwrap());
    if let Some(changed) = damage(&questions, &content, &image) {
        fs::write(&questions, changed).unwrap();
    }
    let (status, stderr) = run_eval(&material().model, &data, &[]);
    assert_eq!(status, 3, "{words:?}: {stderr}");
    for word in words {
        assert!(stderr.contains(word), "{word}: {stderr}");
    }
}

#[test]
fn damaged_data_is_exit_status_3_with_the_file_named() {
    check_damaged_data(&["000000.png", "missing"], |_, _, image| {
        fs::remove_file(image).unwrap();
        None
    });
    check_damaged_data(&["000000.png", "cannot be decoded"], |_, _, image| {
        let bytes = fs::read(image).unwrap();
        fs::write(image, &bytes[..bytes.len() / 2]).unwrap();
        None
    });
    check_damaged_data(&["Phantom.json", "record 1", "`question`", "a number"], |_, text, _| {
        let start = text.find("\"question\": \"").unwrap();
        let end = start + text[start..].find('\n').unwrap();
        Some(format!("{}\"question\": 7,{}", &text[..start], &text[end..]))
    });
    check_damaged_data(&["Phantom.json", "record 1", "none of the options"], |_, text, _| {
        let start = text.find("\"gt_answer\": \"").unwrap() + "\"gt_answer\": \"".len();
        Some(format!("{}un{}", &text[..start], &text[start..]))
    });
    check_damaged_data(&["Phantom.json", "empty file"], |_, _, _| Some(String::new()));
    check_damaged_data(&["Phantom.json", "not JSON"], |_, text, _| Some(text[..text.len() / 2].to_owned()));
}

#[test]
fn questions_about_damaged_images_are_left_out_where_they_may_be_and_shards_agree_on_them() {
    let dir = tempfile::tempdir().unwrap();
    let data = dir.path().join("data");
    copy(&material().data, &data);
    let of = |out: &Path| {
        let mut config = config(out);
        config.data.omnimedvqa = Some(data.clone());
        config
    };
    let (sound, whole, parts) =
        (dir.path().join("sound"), dir.path().join("whole"), dir.path().join("parts"));
    evaluate(of(&sound));
    let asked = records(&sound);
    let content = text(&data, "QA_information/Open-access/Phantom.json");
    let questions: Vec<Value> = serde_json::from_str(&content).unwrap();
    let image_of = |id: &Value| {
        questions.iter().find(|record| record["question_id"] == *id).unwrap()["image_path"].clone()
    };
    let image = image_of(&asked[7]["id"]);
    let left = asked.iter().filter(|record| image_of(&record["id"]) != image).count();
    fs::write(data.join(image.as_str().unwrap()), "no image").unwrap();
    // It is refused before a model is opened, though not before one that cannot be there.
    let unopened = dir.path().join("model");
    fs::create_dir(&unopened).unwrap();
    for (model, told) in [(unopened.as_path(), image.as_str().unwrap()), (Path::new("none"), "no such model")]
    {
        let config = RunConfig { model: Some(model.display().to_string()), ..of(&whole) };
        let error = evaluate_with(config, false, Stop::default()).unwrap_err();
        assert_eq!(error.status(), ExitStatus::Data, "{error}");
        assert!(error.to_string().contains(told) && !whole.exists(), "{error}");
    }
    let lenient = |out: &Path| {
        let mut config = of(out);
        config.data.skip_invalid = true;
        config
    };
    evaluate(lenient(&whole));
    assert!(left < asked.len() && records(&whole).len() == left, "{left}");
    for index in 0..3 {
        let mut part = lenient(&parts.join(index.to_string()));
        part.data.shard = Some(Shard { index, count: 3 });
        evaluate(part);
    }
    let outcome = merge::merge(&parts, &Silent).unwrap();
    assert_eq!((&outcome.summary["pass"], outcome.check_failed), (&Value::from(true), None));
    check_same_results(&whole, &parts);
    // Where nothing is left, what is wrong is told.
    for question in &questions {
        fs::write(data.join(question["image_path"].as_str().unwrap()), "no image").unwrap();
    }
    let error = evaluate_with(lenient(&dir.path().join("none")), false, Stop::default()).unwrap_err();
    assert!(error.to_string().contains("problems in the data"), "{error}");
}

#[test]
fn an_unknown_modality_is_kept_under_its_raw_name_and_asking_for_an_absent_one_is_refused() {
    let dir = tempfile::tempdir().unwrap();
    let data = dir.path().join("data");
    copy(&material().data, &data);
    let questions = data.join("QA_information/Open-access/Phantom.json");
    let content = fs::read_to_string(&questions).unwrap();
    fs::write(&questions, content.replace("Fundus Photography", "Thermography")).unwrap();
    let (model, data) = (&material().model, data.as_path());
    assert_eq!(run_eval(model, data, &["--modality", "Thermography"]).0, 0);
    let (status, stderr) = run_eval(model, data, &["--modality", "Fundus"]);
    assert_eq!(status, 2, "{stderr}");
    assert!(stderr.contains("Thermography"), "{stderr}");
}

#[test]
fn a_damaged_checkpoint_is_exit_status_3_with_the_file_named() {
    let Material { model, data, .. } = material();
    let weights = safemed::model::weights::Weights::open(model).unwrap();
    let name = "model.language_model.layers.1.mlp.up_proj.weight";
    let tensors = |change: &dyn Fn(&str, candle_core::Tensor) -> Option<candle_core::Tensor>| {
        weights
            .names()
            .filter_map(|name| {
                let shape = weights.shape(name).unwrap();
                let tensor = weights.get(name, shape).unwrap().into_tensor(shape).unwrap();
                change(name, tensor).map(|tensor| (name.to_owned(), tensor))
            })
            .collect::<Vec<_>>()
    };
    let missing = tensors(&|each, tensor| (each != name).then_some(tensor));
    let misshapen = tensors(&|each, tensor| Some(if each == name { tensor.t().unwrap() } else { tensor }));
    let dir = tempfile::tempdir().unwrap();
    let broken = dir.path().join("model");
    for (tensors, words) in [(missing, "is missing"), (misshapen, "has shape")] {
        copy(model, &broken);
        safemed::model::weights::save(&broken, &tensors).unwrap();
        let (status, stderr) = run_eval(&broken, data, &[]);
        assert_eq!(status, 3, "{stderr}");
        assert!(stderr.contains(name) && stderr.contains(words) && stderr.contains("model"), "{stderr}");
    }
    copy(model, &broken);
    let file = broken.join("model.safetensors");
    let bytes = fs::read(&file).unwrap();
    fs::write(&file, &bytes[..bytes.len() - 100]).unwrap();
    let (status, stderr) = run_eval(&broken, data, &[]);
    assert!(status == 3 && stderr.contains("model.safetensors"), "{status} {stderr}");
    let (status, stderr) = run_eval(&dir.path().join("absent"), data, &[]);
    assert!(status == 3 && stderr.contains("absent"), "{status} {stderr}");
}

#[test]
fn what_this_build_does_not_do_is_a_usage_error_and_not_ignored() {
    let Material { model, data, .. } = material();
    for (more, words) in [
        (&["--dtype", "f8"][..], "`auto`, `f32` or `bf16`"),
        (&["--prompt", "phantm"], "did you mean `phantom`"),
        (&["--device", "cuda:99"], "device `cuda"),
    ] {
        let model = model.display().to_string();
        let data = data.display().to_string();
        let mut arguments = vec!["eval", "--model", &model, "--omnimedvqa", &data];
        arguments.extend(more);
        let (status, stdout, stderr) = said(&safemed(&arguments));
        assert_eq!((status, stdout.as_str()), (2, ""), "{stderr}");
        assert!(stderr.contains(words), "{stderr}");
    }
    let (status, _, stderr) = said(&safemed(&["eval", "--omnimedvqa", &data.display().to_string()]));
    assert!(status == 2 && stderr.contains("no model is named"), "{status} {stderr}");
}

#[test]
fn phantoms_are_drawn_checked_counted_split_and_converted() {
    let dir = tempfile::tempdir().unwrap();
    let path = |name: &str| dir.path().join(name).display().to_string();
    let data = path("data");
    let call = |arguments: &[&str]| {
        let mut arguments = arguments.to_vec();
        arguments.push("--json");
        let (status, stdout, stderr) = said(&safemed(&arguments));
        assert_eq!(status, 0, "{arguments:?}: {stderr}");
        serde_json::from_str::<Value>(&stdout).unwrap()
    };
    let sizes = ["--size", "24", "--train-items", "40", "--validation-items", "0", "--test-items", "160"];
    let drawn = call(&[&["data", "phantom", "--out", &data][..], &sizes].concat());
    assert_eq!(drawn["n"], 200);
    let checked = call(&["data", "check", "--omnimedvqa", &data]);
    assert_eq!((&checked["n"], &checked["images"]), (&drawn["n"], &drawn["images"]));
    let test = ["--omnimedvqa", &data, "--split", "splits/test.json"];
    let stats = call(&[&["data", "stats", "--train", "splits/train.json"][..], &test].concat());
    assert_eq!((&stats["n"], &stats["chance"]), (&Value::from(160), &Value::from(0.25)));
    assert_eq!(stats["option_prior"]["source"], "train");
    let split = call(&["data", "split", "--omnimedvqa", &data, "--test-share", "0.25", "--out", &path("s")]);
    assert_eq!(split["leak"]["all"]["shared_paths"], 0);
    assert_eq!(split["parts"]["train"].as_u64().unwrap() + split["parts"]["test"].as_u64().unwrap(), 200);
    let (status, _, stderr) = said(&safemed(&["data", "split", "--omnimedvqa", &data, "--out", &path("s")]));
    assert!(status == 2 && stderr.contains("already"), "{stderr}");

    call(&["data", "convert", "--to", "med_r1", "--omnimedvqa", &data, "--out", &path("r1")]);
    let back = call(&["data", "convert", "--data", &path("r1"), "--out", &path("omni")]);
    assert_eq!((&back["n"], &back["images"]), (&Value::from(200), &Value::from(0)));
    let whole = call(&["data", "convert", "--omnimedvqa", &data, "--out", &path("copy")]);
    assert_eq!(whole["images"], drawn["images"]);
    call(&["data", "check", "--omnimedvqa", &path("copy")]);
    let original = safemed::data::load(Path::new(&data)).unwrap();
    assert_eq!(safemed::data::load(&dir.path().join("copy")).unwrap().samples, original.samples);
    let mut known: Vec<_> =
        original.samples.iter().map(|s| (&s.image, &s.question, s.answer_text())).collect();
    let converted = safemed::data::load(&dir.path().join("omni")).unwrap();
    let mut found: Vec<_> =
        converted.samples.iter().map(|s| (&s.image, &s.question, s.answer_text())).collect();
    known.sort();
    found.sort();
    assert_eq!(known, found);

    // Conversations hold everything, reasonings that move with the options included.
    assert!(original.samples.iter().all(|sample| sample.reasoning.is_some()));
    for to in ["llava", "messages"] {
        let made = call(&["data", "convert", "--to", to, "--omnimedvqa", &data, "--out", &path(to)]);
        assert_eq!((&made["n"], &made["images"]), (&drawn["n"], &drawn["images"]));
        call(&["data", "check", "--data", &path(to)]);
        assert_eq!(call(&["data", "stats", "--data", &path(to)])["reasonings"], 200);
        let split = call(&["data", "split", "--data", &path(to), "--out", &path(&format!("{to}-splits"))]);
        assert_eq!(split["leak"]["all"]["shared_paths"], 0);
        assert_eq!(safemed::data::load(&dir.path().join(to)).unwrap().samples, original.samples);
    }
    // Others read the turns, where the letter is in its place.
    let first = &original.samples[0];
    let text = fs::read_to_string(dir.path().join("llava/questions.json")).unwrap();
    let record: Value = serde_json::from_str::<Vec<Value>>(&text).unwrap().remove(0);
    let said_by = |turn: usize| record["conversations"][turn]["value"].as_str().unwrap();
    assert!(said_by(0).starts_with(&format!("<image>\n{}\nA) {}\nB) ", first.question, first.options[0])));
    let reasoning = first.reasoning_text();
    assert_eq!(said_by(1), format!("<think> {reasoning}</think><answer> {}</answer>", first.answer_letter()));
    let text = fs::read_to_string(dir.path().join("messages/questions.jsonl")).unwrap();
    assert_eq!(text.lines().count(), 200);
    let record: Value = serde_json::from_str(text.lines().next().unwrap()).unwrap();
    assert_eq!(record["messages"][0]["content"][0]["type"], "image");
    assert_eq!(record["images"], serde_json::json!([first.image]));
}

#[test]
fn every_problem_of_the_data_is_told_at_once() {
    let dir = tempfile::tempdir().unwrap();
    copy(&material().data, dir.path());
    let image = |n: usize| dir.path().join(format!("Images/Phantom/{n:06}.png"));
    fs::write(image(5), b"no image").unwrap();
    fs::remove_file(image(1)).unwrap();
    let questions = dir.path().join("QA_information/Open-access/Phantom.json");
    let text = fs::read_to_string(&questions).unwrap();
    fs::write(&questions, text.replacen("\"question_type\"", "\"question_typ\"", 1)).unwrap();
    let (status, stdout, stderr) =
        said(&safemed(&["data", "check", "--omnimedvqa", &dir.path().display().to_string()]));
    assert_eq!((status, stdout.as_str()), (3, ""));
    for words in ["000005.png", "000001.png", "did you mean `question_type`"] {
        assert!(stderr.contains(words), "{words}: {stderr}");
    }
    // Where no question is left no image is decoded.
    let empty = dir.path().join("empty.json");
    fs::write(&empty, "").unwrap();
    let (status, _, stderr) = said(&safemed(&["data", "check", "--data", &empty.display().to_string()]));
    assert!(status == 3 && stderr.contains("empty file"), "{status} {stderr}");
    assert!(!stderr.contains("decode images"), "{stderr}");
}

#[test]
fn questions_that_a_format_cannot_hold_are_refused() {
    let dir = tempfile::tempdir().unwrap();
    let file = dir.path().join("X.json");
    let record = serde_json::json!([{
        "dataset": "X", "question_id": "X_0", "question_type": "t", "question": "Which?", "gt_answer": "b",
        "image_path": "i.png", "option_A": "a, B)x", "option_B": "b", "modality_type": "CT",
    }]);
    fs::write(&file, record.to_string()).unwrap();
    let (file, out) = (file.display().to_string(), dir.path().join("out").display().to_string());
    let (status, _, stderr) =
        said(&safemed(&["data", "convert", "--to", "med_r1", "--data", &file, "--out", &out]));
    assert!(status == 3 && stderr.contains("X_0"), "{status} {stderr}");
}

#[test]
fn predict_answers_as_eval_does_and_smoothed_it_counts_votes() {
    let dir = tempfile::tempdir().unwrap();
    evaluate(RunConfig { scoring: Scoring::Likelihood, ..config(dir.path()) });
    let record = &records(dir.path())[3];
    let Material { model, data, .. } = material();
    let samples = safemed::data::load(data).unwrap().samples;
    let sample = samples.iter().find(|sample| record["id"] == *sample.id).unwrap();
    let (model, image) = (model.display().to_string(), data.join(&sample.image).display().to_string());
    let mut arguments = vec!["predict", "--model", &model, "--image", &image, "--question", &sample.question];
    arguments.extend(["--prompt", "phantom", "--scoring", "likelihood", "--json"]);
    arguments.extend(sample.options.iter().flat_map(|option| ["--option", option]));
    let (status, stdout, stderr) = said(&safemed(&arguments));
    assert_eq!(status, 0, "{stderr}");
    let answer: Value = serde_json::from_str(&stdout).unwrap();
    assert_eq!(answer["prediction"], record["prediction"]);
    assert_eq!(answer["probabilities"], record["probabilities"]);

    arguments.extend(["--sigma", "0.1", "--n", "40"]);
    let smoothed = || {
        let (status, stdout, stderr) = said(&safemed(&arguments));
        assert_eq!(status, 0, "{stderr}");
        serde_json::from_str::<Value>(&stdout).unwrap()
    };
    let answer = smoothed();
    assert_eq!(answer, smoothed());
    let votes: u64 = answer["counts"].as_object().unwrap().values().map(|v| v.as_u64().unwrap()).sum();
    assert_eq!(votes, 40);
    assert_eq!(answer["abstained"], answer["prediction"].is_null());
    let p_value = answer["p_value"].as_f64().unwrap();
    assert_eq!(answer["abstained"], p_value > 0.001);
    assert_eq!(
        answer["radius"].as_f64().unwrap() > 0.0,
        answer["p_lower"].as_f64() > Some(0.5) && p_value <= 0.001
    );
    // The same in words, and no sequential test.
    arguments.retain(|word| *word != "--json");
    let (status, stdout, _) = said(&safemed(&arguments));
    assert!(status == 0 && stdout.contains("p-value") && stdout.contains("radius"), "{stdout}");
    arguments.extend(["--set", "certify.mode=sequential"]);
    let (status, _, stderr) = said(&safemed(&arguments));
    assert!(status == 2 && stderr.contains("fixed `n`"), "{stderr}");
}

#[test]
fn drawn_answers_depend_on_the_seed_and_the_item_alone() {
    let dir = tempfile::tempdir().unwrap();
    let at = |name: &str| dir.path().join(name);
    let drawn = |name: &str, seed: u64, batch_size: usize| {
        let mut config = RunConfig { seed, batch_size, max_new_tokens: 3, ..config(&at(name)) };
        config.generation.temperature = 2.0;
        config.generation.top_k = Some(50);
        config.generation.min_p = Some(1e-4);
        evaluate(config);
        text(&at(name), "records.jsonl")
    };
    let together = drawn("together", 5, 20);
    assert_eq!(together, drawn("apart", 5, 3));
    assert_ne!(together, drawn("other", 6, 20));
    let mut greedy = RunConfig { max_new_tokens: 3, ..config(&at("greedy")) };
    evaluate(greedy.clone());
    assert_ne!(together, text(&at("greedy"), "records.jsonl"));
    // Of one token alone, every choice is the greedy one.
    greedy.out = Some(at("one"));
    greedy.generation.temperature = 2.0;
    greedy.generation.top_k = Some(1);
    evaluate(greedy);
    assert_eq!(text(&at("greedy"), "records.jsonl"), text(&at("one"), "records.jsonl"));
    let Material { model, data, .. } = material();
    let (model, data) = (model.display().to_string(), data.display().to_string());
    let base = ["--model", &model, "--omnimedvqa", &data, "--temperature", "1"];
    for more in [
        &["attack"][..],
        &["certify", "--sigma", "0.25", "--scoring", "likelihood"],
        &["eval", "--scoring", "likelihood"],
    ] {
        let (status, _, stderr) = said(&safemed(&[more, &base[..]].concat()));
        assert!(status == 2 && stderr.contains("temperature"), "{more:?}: {stderr}");
    }
    let (status, _, stderr) = said(&safemed(&[&["eval"], &base[..4], &["--top-p", "1.5"]].concat()));
    assert!(status == 2 && stderr.contains("top_p"), "{stderr}");
}

#[test]
fn deep_gray_is_read_as_asked_and_the_record_says_how() {
    let dir = tempfile::tempdir().unwrap();
    let Material { model, .. } = material();
    let (image, model) = (dir.path().join("slice.png"), model.display().to_string());
    let values = (0..64 * 64u32).map(|at| (at * 16) as u16).collect::<Vec<_>>();
    image::ImageBuffer::<image::Luma<u16>, _>::from_raw(64, 64, values).unwrap().save(&image).unwrap();
    let image = image.display().to_string();
    let read = |more: &[&str]| {
        let base = ["predict", "--model", &model, "--image", &image, "--question", "Which?", "--option", "a"];
        let rest = ["--option", "b", "--scoring", "likelihood", "--prompt", "phantom", "--json"];
        let (status, stdout, stderr) = said(&safemed(&[&base, &rest[..], more].concat()));
        assert_eq!(status, 0, "{stderr}");
        serde_json::from_str::<Value>(&stdout).unwrap()
    };
    let plain = read(&[]);
    assert_eq!(plain["image_reading"], "16-bit, white above 255");
    let window = read(&["--window", "30000/20000"]);
    assert_eq!(window["image_reading"], "window 30000/20000");
    assert_ne!(plain["probabilities"], window["probabilities"]);
    assert_eq!(read(&["--deep-gray", "min_max"])["image_reading"], "range 0 to 65520");
    assert_eq!(read(&["--deep-gray", "full_range"])["image_reading"], "range 0 to 65535");
    let (status, _, stderr) = said(&safemed(&["eval", "--window", "40"]));
    assert!(status == 2 && stderr.contains("40/400"), "{stderr}");
}

#[test]
fn an_exported_checkpoint_answers_the_same() {
    let dir = tempfile::tempdir().unwrap();
    let (model, out) = (material().model.display().to_string(), dir.path().join("export"));
    let out_text = out.display().to_string();
    let (status, _, stderr) = said(&safemed(&["export", "--model", &model, "--out", &out_text]));
    assert_eq!(status, 0, "{stderr}");
    for file in ["config.json", "tokenizer.json", "preprocessor_config.json", "chat_template.jinja"] {
        assert_eq!(
            fs::read(material().model.join(file)).unwrap(),
            fs::read(out.join(file)).unwrap(),
            "{file}"
        );
    }
    let (from, to) = (dir.path().join("from"), dir.path().join("to"));
    evaluate(config(&from));
    evaluate(RunConfig { model: Some(out_text.clone()), ..config(&to) });
    check_same_results(&from, &to);
    let (status, _, stderr) = said(&safemed(&["export", "--model", &model, "--out", &out_text]));
    assert!(status == 2 && stderr.contains("not empty"), "{stderr}");
}
