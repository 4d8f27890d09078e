//! Examinations while a model trains: they find what `attack` and `eval` find, the best checkpoint stays, and no kill
//! changes a byte.

use crate::failures::{go_on, signal, start, wait_until};
use crate::parameters::Stopping;
use crate::training::{check_same, job_of, lines, material, run_as, run_job, run_with_kills, settings};
use safemed::backend::with_threads;
use safemed::error::{Error, ExitStatus};
use safemed::model::weights::TensorFile;
use safemed::pixels::RgbImage8;
use safemed::pixels::decode::encode_png;
use safemed::recipes::config::Command::{self, Attack, Eval, Train};
use safemed::recipes::eval;
use safemed::recipes::job::Job;
use safemed::recipes::progress::{Kept, Silent};
use serde_json::{Value, json};
use std::fs;
use std::ops::Range;
use std::path::{Path, PathBuf};

/// Four steps with an examination of eight questions at every other one.
const EXAMINED: [(&str, &str); 10] = [
    ("train.num_steps", "4"),
    ("train.batch_size", "4"),
    ("train.learning_rate", "0.02"),
    ("train.save_every", "0"),
    ("train.validation.every", "2"),
    ("train.validation.split", "splits/test.json"),
    ("train.validation.limit", "8"),
    ("train.validation.num_steps", "3"),
    ("train.validation.epsilon", "16/255"),
    ("data.limit", "16"),
];

fn json_of(path: &Path) -> Value {
    serde_json::from_slice(&fs::read(path).unwrap()).unwrap()
}

/// What lies in the directory of checkpoints.
fn kept(out: &Path) -> Vec<String> {
    let entries = fs::read_dir(out.join("checkpoints")).unwrap();
    let mut names: Vec<String> =
        entries.map(|entry| entry.unwrap().file_name().into_string().unwrap()).collect();
    names.sort();
    names
}

#[test]
fn an_examination_is_what_an_attack_on_the_same_checkpoint_finds() {
    let dir = tempfile::tempdir().unwrap();
    let out = dir.path().join("train");
    run_as(Train, &settings(&material().loud, &out, &EXAMINED), 2).unwrap();
    let examined = lines(&out, "validation.jsonl");
    assert_eq!(examined.iter().map(|line| line["step"].as_u64().unwrap()).collect::<Vec<_>>(), [0, 2, 4]);
    let asked = lines(&out, "validation/step-0/records.jsonl");
    let ids: Vec<Value> = asked.iter().map(|record| record["id"].clone()).collect();
    assert_eq!(ids.len(), 8);
    let split = dir.path().join("ids.json");
    fs::write(&split, json!(ids).to_string()).unwrap();
    // The option prior counts what was trained on.
    let all: Vec<String> =
        serde_json::from_slice(&fs::read(material().data.join("splits/train.json")).unwrap()).unwrap();
    let trained = dir.path().join("trained.json");
    fs::write(&trained, json!(all[..16]).to_string()).unwrap();
    let text = |path: &Path| path.display().to_string();
    for (step, model) in [(0, material().loud.clone()), (4, out.join("checkpoints/step-4"))] {
        let again = dir.path().join(format!("attack-{step}"));
        let own = [
            ("data.split", text(&split)),
            ("data.train_split", text(&trained)),
            ("attack.num_steps", "3".to_owned()),
            ("attack.epsilon", "16/255".to_owned()),
            ("attack.verdict_items", "0".to_owned()),
        ];
        let own: Vec<(&str, &str)> = own.iter().map(|(key, value)| (*key, value.as_str())).collect();
        run_as(Attack, &settings(&model, &again, &own), 2).unwrap();
        let run = out.join(format!("validation/step-{step}"));
        let (mut found, mut expected) = (lines(&run, "records.jsonl"), lines(&again, "records.jsonl"));
        assert_eq!(found.len(), expected.len());
        for (found, expected) in found.iter_mut().zip(&mut expected) {
            // Weights that train are laid out otherwise than frozen ones: sums differ in the last bit.
            for key in ["loss_clean", "loss_adversarial"] {
                let (found, expected) = (found[key].take().as_f64(), expected[key].take().as_f64());
                assert_eq!(found.is_some(), expected.is_some());
                if let (Some(found), Some(expected)) = (found, expected) {
                    assert!((found - expected).abs() <= 1e-5 * expected.abs().max(1.0), "{found} {expected}");
                }
            }
            for key in ["adversarial_sha256", "linf", "l2"] {
                (found[key], expected[key]) = (Value::Null, Value::Null);
            }
            assert_eq!(found, expected, "step {step}");
        }
        let (line, summary) = (&examined[step / 2], json_of(&again.join("summary.json")));
        assert_eq!(line["clean"]["accuracy"], summary["clean_accuracy"]);
        assert_eq!(line["pgd"]["accuracy"], summary["robust_accuracy"]);
        assert_eq!(line["controls"], summary["controls"]);
    }
    // Attacked images stay of the last and of the best.
    let best = json_of(&out.join("checkpoints/best.json"))["step"].as_u64().unwrap();
    for step in [0, 2, 4] {
        let has_any = lines(&out, &format!("validation/step-{step}/records.jsonl"))
            .iter()
            .any(|record| !record["adversarial_image"].is_null());
        let is_kept = has_any && (step == 4 || step == best);
        assert_eq!(out.join(format!("validation/step-{step}/adversarial")).exists(), is_kept, "{step}");
    }
}

#[test]
fn the_best_checkpoint_stays_and_the_summary_names_it() {
    let dir = tempfile::tempdir().unwrap();
    for (name, own) in [
        ("sft", &[("train.validation.num_steps", "0")][..]),
        (
            "grpo",
            &[
                ("train.recipe", "grpo"),
                ("train.grpo.group_size", "2"),
                ("train.validation.metric", "reward"),
            ],
        ),
    ] {
        let out = dir.path().join(name);
        let more =
            [&EXAMINED[..], &[("train.num_steps", "6"), ("train.keep_checkpoints", "1")], own].concat();
        let summary = run_as(Train, &settings(&material().loud, &out, &more), 2).unwrap().summary;
        let examined = lines(&out, "validation.jsonl");
        let key = if name == "sft" { "accuracy" } else { "reward" };
        let value = |line: &Value| line["clean"][key].as_f64().unwrap();
        let best = examined[1..].iter().rev().max_by(|a, b| value(a).total_cmp(&value(b))).unwrap();
        assert_eq!(summary["best"]["step"], best["step"], "{name}");
        assert_eq!(summary["best"]["value"].as_f64(), Some(value(best)));
        assert_eq!(summary["best"]["metric"], key);
        assert_eq!(summary["validation"], examined[3]);
        assert_eq!(examined[3].get("pgd").is_some(), name == "grpo");
        let mut expected =
            vec!["best.json".to_owned(), format!("step-{}", best["step"]), "step-6".to_owned()];
        expected.dedup();
        assert_eq!(kept(&out), expected);
    }
}

#[test]
fn kills_in_an_examination_change_no_byte() {
    let dir = tempfile::tempdir().unwrap();
    let [whole, killed] = ["whole", "killed"].map(|name| dir.path().join(name));
    let more = [&EXAMINED[..], &[("batch_size", "1"), ("train.recipe", "at_sft")]].concat();
    run_as(Train, &settings(&material().loud, &whole, &more), 2).unwrap();
    let own = settings(&material().loud, &killed, &more);
    run_with_kills(Train, &own, &killed, "validation/step-0/records.jsonl", &[3]);
    check_same(&whole, &killed);
    fs::remove_dir_all(&killed).unwrap();
    run_with_kills(Train, &own, &killed, "validation/step-2/records.jsonl", &[2, 4]);
    check_same(&whole, &killed);
    // One that comes when the last line is written leaves images that nobody wants any more.
    let left = killed.join("validation/step-0/adversarial");
    fs::create_dir_all(&left).unwrap();
    fs::write(left.join("0.png"), "").unwrap();
    let (status, err) = go_on(&killed, &more);
    assert_eq!(status, 0, "{err}");
    assert!(!left.exists());
    check_same(&whole, &killed);
}

#[test]
fn an_examination_that_is_cut_short_changes_nothing_about_which_checkpoints_stay() {
    let dir = tempfile::tempdir().unwrap();
    let [whole, killed, stopped] = ["whole", "killed", "stopped"].map(|name| dir.path().join(name));
    // Whatever is said, step 2 is the best until step 6 is.
    let text = r#"while IFS= read -r l; do case "$l" in '{"step":2,'*) r=0.5;; '{"step":4,'*) r=0.25;; '{"step":6,'*) r=0.75;; *) r=0;; esac; echo "{\"reward\": $r}"; done"#;
    let command = json!(["sh", "-c", text]).to_string();
    let own = [
        ("batch_size", "1"),
        ("train.recipe", "grpo"),
        ("train.num_steps", "6"),
        ("train.save_every", "2"),
        ("train.keep_checkpoints", "1"),
        ("train.grpo.group_size", "2"),
        ("train.grpo.accuracy_weight", "0"),
        ("train.grpo.format_weight", "0"),
        ("train.grpo.reward_command", command.as_str()),
        ("train.validation.limit", "24"),
        ("train.validation.metric", "reward"),
    ];
    let more = [&EXAMINED[..], &own].concat();
    run_as(Train, &settings(&material().loud, &whole, &more), 2).unwrap();
    assert_eq!(kept(&whole), ["best.json", "step-4", "step-6"]);
    let records = "validation/step-6/records.jsonl";
    run_with_kills(Train, &settings(&material().loud, &killed, &more), &killed, records, &[3]);
    check_same(&whole, &killed);
    let mut child = start(&stopped, &more);
    let asked = || fs::read_to_string(stopped.join(records)).map_or(0, |text| text.lines().count());
    assert!(wait_until(&mut child, || asked() >= 2));
    signal(&child, "TERM");
    assert_eq!(child.wait().unwrap().code(), Some(75));
    assert!(asked() < 24, "the examination was over");
    assert_eq!(kept(&stopped), ["best.json", "step-2", "step-4", "step-6"]);
    let (status, err) = go_on(&stopped, &more);
    assert_eq!(status, 0, "{err}");
    check_same(&whole, &stopped);
}

#[test]
fn an_examination_that_is_not_finite_is_dumped_and_repeats_to_the_bit() {
    let dir = tempfile::tempdir().unwrap();
    let out = dir.path().join("out");
    let own = [("train.learning_rate", "1e30"), ("train.save_every", "1"), ("train.validation.every", "1")];
    let more = [&EXAMINED[..], &own].concat();
    let error = run_as(Train, &settings(&material().loud, &out, &more), 2).unwrap_err();
    assert_eq!(error.status(), ExitStatus::NonFinite, "{error}");
    let (text, dump) = (error.to_string(), out.join("failure/validation-1"));
    for part in [
        "--> items `Phantom_",
        "--> validation after step 1\n",
        "first not finite: ",
        &dump.display().to_string(),
        "= help: lower `train.learning_rate`",
    ] {
        assert!(text.contains(part), "{part}: {text}");
    }
    assert_eq!((lines(&out, "metrics.jsonl").len(), lines(&out, "validation.jsonl").len()), (1, 1));
    let bytes = fs::read(dump.join("failure.json")).unwrap();
    let report: Value = serde_json::from_slice(&bytes).unwrap();
    assert_eq!((&report["step"], &report["checkpoint"]), (&json!(1), &json!("checkpoints/step-1")));
    assert_eq!((&report["phase"], &report["updates"]), (&json!("validation"), &json!(1)));
    let items = report["items"].as_array().unwrap();
    // As many as are attacked at once: no more than a pass of training has.
    assert_eq!(items.len(), 4);
    let tensors = TensorFile::open(&dump.join("pixels.safetensors")).unwrap();
    for (place, item) in items.iter().enumerate() {
        assert!(text.contains(item["id"].as_str().unwrap()), "{item}");
        assert_eq!(item["question"]["id"], item["id"]);
        assert!(!item["prompt_ids"].as_array().unwrap().is_empty());
        assert!(!tensors.floats(&format!("pixels.{place}")).unwrap().is_empty());
        assert!(dump.join(item["image"].as_str().unwrap()).exists());
    }
    let (status, err) = go_on(&out, &more);
    assert!(status == 4 && err.contains("validation after step 1"), "{status} {err}");
    assert_eq!(fs::read(dump.join("failure.json")).unwrap(), bytes);
}

#[test]
fn rewards_that_were_not_given_are_left_out_unless_the_best_is_chosen_by_them() {
    let dir = tempfile::tempdir().unwrap();
    // None of validation, which asks about eight completions at once.
    let text = r#"while IFS= read -r l; do case "$l" in *'"count":8,'*) echo '{"reward": null}';; *) echo '{"reward": 0.5}';; esac; done"#;
    let command = json!(["sh", "-c", text]).to_string();
    let given = [
        ("train.recipe", "grpo"),
        ("train.num_steps", "2"),
        ("train.grpo.group_size", "4"),
        ("train.grpo.accuracy_weight", "0"),
        ("train.grpo.format_weight", "0"),
        ("train.grpo.reward_command", command.as_str()),
    ];
    // Nobody said the text of a likely option.
    let likely = [
        ("train.recipe", "grpo"),
        ("train.num_steps", "2"),
        ("train.grpo.group_size", "4"),
        ("scoring", "likelihood"),
    ];
    for (name, own) in [("given", &given[..]), ("likely", &likely[..])] {
        let out = dir.path().join(name);
        let more = [&EXAMINED[..], own].concat();
        let summary = run_as(Train, &settings(&material().loud, &out, &more), 2).unwrap().summary;
        assert_eq!(summary["best"]["metric"], "robust_accuracy");
        for line in lines(&out, "validation.jsonl") {
            for part in ["clean", "pgd"] {
                assert!(line[part]["accuracy"].is_number(), "{name}: {line}");
                assert!(line[part].get("reward").is_none(), "{name}: {line}");
            }
        }
    }
    for metric in ["reward", "robust_reward"] {
        let out = dir.path().join(metric);
        let more = [&EXAMINED[..], &given, &[("train.validation.metric", metric)]].concat();
        let error = run_as(Train, &settings(&material().loud, &out, &more), 2).unwrap_err();
        assert_eq!(error.status(), ExitStatus::Data);
        let text = error.to_string();
        assert!(text.contains("after step 0 was given a reward") && text.contains("= help: "), "{text}");
        assert!(text.contains(&format!("there is no `{metric}`")), "{text}");
    }
}

/// Questions of another source, which say and show what the drawn ones at these places do (the first forty are trained on), under
/// other ids, with images beside them under other names; gives their file.
fn own_questions(dir: &Path, places: Range<usize>) -> PathBuf {
    fs::create_dir_all(dir).unwrap();
    let drawn = safemed::data::load(&material().data).unwrap();
    let records: Vec<Value> = drawn.samples[places]
        .iter()
        .enumerate()
        .map(|(n, sample)| {
            // No image of the training data has this name.
            let image = format!("beside-{n}.png");
            fs::copy(drawn.root.join(&sample.image), dir.join(&image)).unwrap();
            let mut record = json!({
                "question_id": format!("own-{n}"), "question": sample.question, "image_path": image,
                "question_type": sample.question_type, "modality_type": sample.modality_raw,
                "gt_answer": sample.options[sample.answer],
            });
            for (option, letter) in sample.options.iter().zip("ABCD".chars()) {
                record[format!("option_{letter}")] = json!(option);
            }
            record
        })
        .collect();
    let file = dir.join("questions.json");
    fs::write(&file, json!(records).to_string()).unwrap();
    file
}

/// Two steps with an examination before and after them, of clean images, by the questions in `file`.
fn examined_by(file: &str) -> Vec<(&str, &str)> {
    let mut more: Vec<(&str, &str)> = EXAMINED.to_vec();
    more.retain(|(key, _)| *key != "train.validation.split");
    more.push(("train.validation.data", file));
    more.extend([("train.validation.num_steps", "0"), ("train.num_steps", "2")]);
    more
}

#[test]
fn a_training_does_not_go_on_with_other_questions_to_examine_it_by() {
    let dir = tempfile::tempdir().unwrap();
    let own = dir.path().join("own");
    let file = own_questions(&own, 40..48).display().to_string();
    let settings = settings(&material().loud, &dir.path().join("out"), &examined_by(&file));
    let listener = Stopping { after: 1, ..Stopping::default() };
    let job = job_of(Train, &settings, &listener).unwrap();
    let error = run_job(&Job { stop: listener.stop.clone(), ..job }, 2).unwrap_err();
    assert_eq!(error.status(), ExitStatus::Stopped, "{error}");
    let other = encode_png(&RgbImage8::filled(8, 8, [9; 3]).unwrap()).unwrap();
    fs::write(own.join("beside-0.png"), other).unwrap();
    let job = job_of(Train, &settings, &Silent).unwrap();
    let error = run_job(&Job { resume: true, ..job }, 2).unwrap_err();
    let is_told = matches!(&error, Error::Usage(text) if text.contains("`validation_images_sha256`"));
    assert!(is_told, "{error}");
}

#[test]
fn a_data_set_of_its_own_is_validated_with_the_images_beside_it() {
    let dir = tempfile::tempdir().unwrap();
    let file = own_questions(&dir.path().join("own"), 40..48).display().to_string();
    let out = dir.path().join("out");
    run_as(Train, &settings(&material().loud, &out, &examined_by(&file)), 2).unwrap();
    let asked = lines(&out, "validation/step-0/records.jsonl");
    assert_eq!(asked.len(), 8);
    assert!(asked.iter().all(|record| record["id"].as_str().unwrap().starts_with("own-")), "{asked:?}");
}

#[test]
fn copies_of_questions_that_are_trained_on_are_refused_whatever_their_ids() {
    let dir = tempfile::tempdir().unwrap();
    // Sixteen questions are trained on: two of these four.
    let file = own_questions(&dir.path().join("own"), 14..18).display().to_string();
    let out = dir.path().join("out");
    // Before weights: none are there.
    let absent = dir.path().join("no-weights");
    fs::create_dir(&absent).unwrap();
    let error = run_as(Train, &settings(&absent, &out, &examined_by(&file)), 1).unwrap_err();
    assert_eq!(error.status(), ExitStatus::Data);
    let text = error.to_string();
    let words =
        "2 of 4 validation questions are trained on, among them `own-0` (in training `Phantom_000014`)";
    assert!(text.starts_with(words) && text.contains("= help: "), "{text}");
    assert!(!out.exists());
}

#[test]
fn problems_of_validation_come_before_weights_or_are_told_once() {
    let dir = tempfile::tempdir().unwrap();
    let own = dir.path().join("own");
    let file = own_questions(&own, 40..48);
    let mut records: Vec<Value> = serde_json::from_slice(&fs::read(&file).unwrap()).unwrap();
    records[0]["gt_answer"] = json!("none of these");
    fs::write(&file, json!(records).to_string()).unwrap();
    let split = dir.path().join("all.json");
    let ids: Vec<&Value> = records.iter().map(|record| &record["question_id"]).collect();
    fs::write(&split, json!(ids).to_string()).unwrap();
    let [folder, file, split] = [&own, &file, &split].map(|path| path.display().to_string());
    let told = |command: Command, settings: &[(String, String)]| -> Vec<String> {
        let kept = Kept::default();
        let job = job_of(command, settings, &kept).unwrap();
        let outcome =
            if command == Eval { with_threads(Some(2), || eval::eval(&job)) } else { run_job(&job, 2) };
        outcome.unwrap();
        let notes = kept.notes.lock().unwrap();
        notes.iter().filter(|note| note.contains("are left out")).cloned().collect()
    };
    let lenient = ("data.skip_invalid", "true");
    for command in [Eval, Attack] {
        let more = [
            ("data.omnimedvqa", folder.as_str()),
            ("data.data", file.as_str()),
            ("data.split", split.as_str()),
            ("attack.num_steps", "1"),
            lenient,
        ];
        let out = dir.path().join(command.word());
        let notes = told(command, &settings(&material().loud, &out, &more));
        assert_eq!(notes, ["1 problem: the records are left out"], "{command}");
        assert_eq!(lines(&out, "records.jsonl").len(), 7);
    }
    // Training decodes the images of validation too before it begins.
    fs::write(own.join("beside-1.png"), "no image").unwrap();
    let out = dir.path().join("out");
    let absent = dir.path().join("no-such-model");
    let error = run_as(Train, &settings(&absent, &out, &examined_by(&file)), 1).unwrap_err();
    assert_eq!(error.status(), ExitStatus::Data);
    let text = error.to_string();
    assert!(text.starts_with("2 problems in the data") && text.contains("beside-1.png"), "{text}");
    assert!(text.contains("(`own-0`): `gt_answer` is none of the options") && !out.exists(), "{text}");
    let more = [&examined_by(&file)[..], &[lenient]].concat();
    let notes = told(Train, &settings(&material().loud, &out, &more));
    assert_eq!(notes, ["2 problems in the validation data: the records are left out"]);
    for step in [0, 2] {
        assert_eq!(lines(&out, &format!("validation/step-{step}/records.jsonl")).len(), 6);
    }
}

#[test]
fn validation_that_could_fool_is_refused() {
    let dir = tempfile::tempdir().unwrap();
    let out = dir.path().join("out");
    for (own, words) in [
        (&[("train.validation.split", "splits/train.json")][..], "validation questions are trained on"),
        (&[("train.validation.metric", "reward")], "has no rewards"),
        (
            &[("train.recipe", "grpo"), ("scoring", "likelihood"), ("train.validation.metric", "reward")],
            "is about what the model says",
        ),
        (
            &[("train.validation.num_steps", "0"), ("train.validation.metric", "robust_accuracy")],
            "needs an attack",
        ),
        (&[("train.captions", "true")], "no images that could be attacked"),
        (&[("train.validation.epsilon", "8")], "out of range"),
    ] {
        let error =
            run_as(Train, &settings(&material().loud, &out, &[&EXAMINED[..], own].concat()), 1).unwrap_err();
        assert!(error.to_string().contains(words), "{words}: {error}");
        assert!(!out.exists());
    }
    let without = [("train.validation.every", "2")];
    let error = run_as(Train, &settings(&material().loud, &out, &without), 1).unwrap_err();
    assert!(error.to_string().contains("apart from those trained on"), "{error}");
}
