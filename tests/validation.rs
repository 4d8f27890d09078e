//! Examinations while a model trains: they find what `attack` and `eval` find, the best checkpoint stays, and no kill
//! changes a byte.

use crate::training::{check_same, lines, material, run_as, run_with_kills, settings};
use safemed::recipes::config::Command::{Attack, Train};
use serde_json::{Value, json};
use std::fs;
use std::path::Path;

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
        let mut kept: Vec<String> = fs::read_dir(out.join("checkpoints"))
            .unwrap()
            .map(|entry| entry.unwrap().file_name().into_string().unwrap())
            .collect();
        kept.sort();
        let mut expected =
            vec!["best.json".to_owned(), format!("step-{}", best["step"]), "step-6".to_owned()];
        expected.dedup();
        assert_eq!(kept, expected);
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
}

#[test]
fn validation_that_could_fool_is_refused() {
    let dir = tempfile::tempdir().unwrap();
    let out = dir.path().join("out");
    for (own, words) in [
        (&[("train.validation.split", "splits/train.json")][..], "validation questions are trained on"),
        (&[("train.validation.metric", "reward")], "has no rewards"),
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
