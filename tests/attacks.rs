//! Attacks of every method on a tiny model: budgets, records, curves, smoothed models; the same bytes in any batch.

use crate::support::run as call;
use crate::tiny::{Kind, Weights, assistant_of};
use crate::training::{arguments, check_same, lines, material, run_as, settings};
use candle_core::Tensor;
use safemed::attack::{NoiseBank, Objective};
use safemed::data::prompt::PromptTemplate;
use safemed::data::sample::Sample;
use safemed::model::assistant::Assistant;
use safemed::nn::recompute::Memory;
use safemed::pixels::decode::{decode_file, encode_png};
use safemed::recipes::aims::{Asked, aim};
use safemed::recipes::config::Command::{Attack, Certify};
use safemed::recipes::config::ObjectiveName;
use safemed::recipes::inputs::file_sha256;
use safemed::rng;
use safemed::roles::target::Target;
use serde_json::Value;
use std::fs;
use std::path::Path;

/// Few questions, answered by likelihood: that is right more often than a random model's words are.
const QUICK: [(&str, &str); 6] = [
    ("data.limit", "12"),
    ("data.split", "splits/test.json"),
    ("scoring", "likelihood"),
    ("attack.num_steps", "3"),
    ("attack.num_queries", "12"),
    ("attack.verdict_items", "2"),
];

fn attacked(dir: &Path, name: &str, more: &[(&str, &str)], threads: usize) -> (Vec<Value>, Value) {
    let out = dir.join(name);
    let settings = settings(&material().loud, &out, &[&QUICK[..], more].concat());
    let outcome = run_as(Attack, &settings, threads).unwrap();
    (lines(&out, "records.jsonl"), outcome.summary)
}

#[test]
fn every_method_norm_and_space_keeps_its_budget_and_its_bytes_in_any_batch() {
    let dir = tempfile::tempdir().unwrap();
    for (method, norm, epsilon, space) in [
        ("noise", "linf", "8/255", "model"),
        ("fgsm", "l2", "1.5", "original"),
        ("pgd", "l2", "1.5", "model"),
        ("apgd", "linf", "8/255", "original"),
        ("square", "linf", "8/255", "original"),
        ("square", "l2", "1.5", "model"),
        ("auto", "linf", "4/255", "original"),
        ("auto", "l2", "0.8", "original"),
    ] {
        let name = format!("{method}-{norm}-{space}");
        let own = [
            ("attack.method", method),
            ("attack.norm", norm),
            ("attack.epsilon", epsilon),
            ("attack.space", space),
        ];
        let (records, summary) = attacked(dir.path(), &name, &[&own[..], &[("batch_size", "1")]].concat(), 1);
        let other = format!("{name}-batched");
        attacked(dir.path(), &other, &[&own[..], &[("batch_size", "5")]].concat(), 2);
        check_same(&dir.path().join(&name), &dir.path().join(&other));
        let hit: Vec<&Value> =
            records.iter().filter(|record| record["adversarial_image"].is_string()).collect();
        assert!(!hit.is_empty(), "the tiny model got nothing right");
        for record in hit {
            let budget = record["epsilon"].as_f64().unwrap();
            assert!(record[norm].as_f64().unwrap() <= budget + 1e-9, "{record}");
            assert!(record["clean_correct"] == true && record["scoring"] == "likelihood", "{record}");
            assert_eq!(record["method"], method);
            let stage = record["stage"].as_str().unwrap();
            assert!(
                stage.starts_with(if method == "auto" { "apgd/" } else { method })
                    || stage == "square/margin"
            );
            assert!(record["processor_difference"].as_f64().unwrap() <= 1.75 / 255.0, "{record}");
        }
        assert!(summary["robust_accuracy"].as_f64() <= summary["clean_accuracy"].as_f64());
        assert_eq!(summary["robust_accuracy_by_epsilon"], Value::Array(Vec::new()));
    }
}

#[test]
fn a_finished_item_is_taken_on_trust_only_while_its_file_is_what_was_scored() {
    let dir = tempfile::tempdir().unwrap();
    let own = [("attack.method", "fgsm"), ("batch_size", "1")];
    let (records, _) = attacked(dir.path(), "run", &own, 2);
    let out = dir.path().join("run");
    let again = || {
        // As if killed at the very end.
        fs::remove_file(out.join("summary.json")).unwrap_or_default();
        let settings = settings(&material().loud, &out, &[&QUICK[..], &own].concat());
        let words: Vec<String> =
            arguments(Attack, &settings).into_iter().chain(["--resume".to_owned()]).collect();
        call(dir.path(), &words.iter().map(String::as_str).collect::<Vec<_>>())
    };
    assert_eq!(again().0, 0);
    let file = records.iter().find_map(|record| record["adversarial_image"].as_str()).unwrap();
    let png = fs::read(out.join(file)).unwrap();
    fs::write(out.join(file), [&png[..], b"x"].concat()).unwrap();
    let (status, _, err) = again();
    assert!(status == 3 && err.contains("is not the one that was scored") && err.contains(file), "{err}");
    // Another picture with its own hash: it is measured again.
    let records = fs::read_to_string(out.join("records.jsonl")).unwrap();
    fs::write(out.join(file), &png).unwrap();
    let old = file_sha256(&out.join(file)).unwrap();
    let mut image = decode_file(&out.join(file)).unwrap();
    image.data.fill(255);
    fs::write(out.join(file), encode_png(&image).unwrap()).unwrap();
    let new = file_sha256(&out.join(file)).unwrap();
    fs::write(out.join("records.jsonl"), records.replace(&old, &new)).unwrap();
    let (status, _, err) = again();
    assert!(status == 3 && err.contains("from the original in L-inf and L2"), "{err}");
    fs::write(out.join("records.jsonl"), &records).unwrap();
    fs::remove_file(out.join(file)).unwrap();
    assert_eq!(again().0, 3);
    fs::write(out.join(file), png).unwrap();
    assert_eq!(again().0, 0);

    // A record whose letters say another thing than its verdict.
    let path = out.join("records.jsonl");
    let text = fs::read_to_string(&path).unwrap();
    assert!(text.contains("\"clean_correct\":true"));
    fs::write(&path, text.replacen("\"clean_correct\":true", "\"clean_correct\":false", 1)).unwrap();
    let (status, _, err) = again();
    assert!(status == 3 && err.contains("contradicts itself"), "{status} {err}");
}

#[test]
fn smallest_budgets_agree_with_the_files_and_make_a_falling_curve() {
    let dir = tempfile::tempdir().unwrap();
    for (norm, epsilon) in [("linf", "16/255"), ("l2", "6")] {
        let own = [
            ("attack.norm", norm),
            ("attack.epsilon", epsilon),
            ("attack.min_epsilon", "true"),
            ("attack.objective", "margin"),
            ("attack.num_steps", "10"),
        ];
        let (records, summary) = attacked(dir.path(), norm, &own, 2);
        let mut broken = 0;
        for record in records.iter().filter(|record| record["clean_correct"] == true) {
            let smallest = record["min_epsilon"].as_f64();
            assert_eq!(smallest.is_some(), record["robust_correct"] == false, "{record}");
            if let Some(smallest) = smallest {
                broken += 1;
                assert!(smallest > 0.0 && smallest <= record[norm].as_f64().unwrap() + 1e-12, "{record}");
            }
        }
        assert!(broken > 0, "nothing broke");
        let curve = summary["robust_accuracy_by_epsilon"].as_array().unwrap();
        let at = |i: usize, j: usize| curve[i][j].as_f64().unwrap();
        assert_eq!(at(0, 1), summary["clean_accuracy"].as_f64().unwrap());
        assert_eq!(at(curve.len() - 1, 1), summary["robust_accuracy"].as_f64().unwrap());
        for i in 0..curve.len() {
            assert!(at(i, 2) <= at(i, 1) && at(i, 1) <= at(i, 3));
            assert!(i == 0 || (at(i, 0) > at(i - 1, 0) && at(i, 1) <= at(i - 1, 1)));
        }
        let steps = summary["robust_accuracy_by_steps"].as_array().unwrap();
        assert_eq!(steps[0][1], summary["clean_accuracy"]);
        assert_eq!(steps[steps.len() - 1][1], summary["robust_accuracy"]);
    }
}

#[test]
fn a_smoothed_model_is_attacked_and_judged_by_votes() {
    let dir = tempfile::tempdir().unwrap();
    let own = [
        ("attack.objective", "cross_entropy"),
        ("attack.smoothing_sigma", "0.05"),
        ("attack.eot_samples", "5"),
        ("data.limit", "6"),
    ];
    let (records, _) = attacked(dir.path(), "one", &[&own[..], &[("batch_size", "2")]].concat(), 1);
    attacked(dir.path(), "two", &[&own[..], &[("batch_size", "5")]].concat(), 2);
    check_same(&dir.path().join("one"), &dir.path().join("two"));
    for record in &records {
        assert_eq!(record["smoothing_sigma"], 0.05);
        assert!(record["clean_completion"].as_str().unwrap().starts_with("votes {"), "{record}");
    }
}

/// A target of one question with four options, and its pixels at the model's resolution.
fn target(
    assistant: &Assistant,
    objective: ObjectiveName,
    noise: Option<NoiseBank>,
    answer: usize,
) -> (Target<'_>, Tensor) {
    let sample = Sample {
        id: "x".into(),
        dataset: "d".into(),
        modality: "CT".into(),
        modality_raw: "CT".into(),
        question_type: "Anatomy Identification".into(),
        question: "Where is it?".into(),
        options: ["lung", "liver", "brain", "heart"].map(String::from).to_vec(),
        answer,
        image: "i.png".into(),
        reasoning: None,
    };
    let mut values = vec![0f32; 3 * 32 * 32];
    rng::fill_standard_normal(&mut rng::stream(1, "pixels", &[]), &mut values);
    for value in &mut values {
        *value = (0.5 + 0.1 * *value).clamp(0.1, 0.9);
    }
    let pixels = Tensor::from_vec(values, (1, 3, 32, 32), assistant.vlm.device()).unwrap();
    let template: PromptTemplate = "phantom".parse().unwrap();
    let prompt = assistant.prompt(&template.user_text(&sample), Some(assistant.vlm.grid_of(32, 32))).unwrap();
    let asked = Asked { template, is_cot: false, objective, target: 1, own: None };
    let aim = aim(assistant, &sample, asked, prompt, [32, 32]).unwrap();
    let target = Target {
        assistant,
        aims: vec![aim],
        answers: &|_, items| Ok(vec![None; items.len()]),
        noise,
        draws_at_once: 3,
        memory: Memory::Keep,
    };
    (target, pixels)
}

fn bank(sigma: f64, draws: usize) -> NoiseBank {
    NoiseBank { purpose: "test", sigma, draws, seed: 4 }
}

fn values(tensor: &Tensor) -> Vec<f32> {
    tensor.flatten_all().unwrap().to_vec1().unwrap()
}

#[test]
fn every_loss_over_options_has_the_gradient_of_its_differences() {
    let assistant = assistant_of(Kind::Qwen3, Weights::Fresh, false);
    for (objective, noise) in [
        (ObjectiveName::Completion, None),
        (ObjectiveName::Margin, None),
        (ObjectiveName::CrossEntropy, None),
        (ObjectiveName::Dlr, None),
        (ObjectiveName::Targeted, None),
        (ObjectiveName::CrossEntropy, Some(bank(0.1, 7))),
    ] {
        // Where another option leads, the margin over itself is constant: the right one must be the model's own.
        let loss_of = |answer| {
            let (target, pixels) = target(&assistant, ObjectiveName::CrossEntropy, None, answer);
            target.loss(&pixels, &[0]).unwrap()[0]
        };
        let answer = (0..4).min_by(|&a, &b| loss_of(a).total_cmp(&loss_of(b))).unwrap();
        let (target, pixels) = target(&assistant, objective, noise, answer);
        let (loss, gradient) = target.loss_and_gradient(&pixels, &[0]).unwrap();
        assert!((loss[0] - target.loss(&pixels, &[0]).unwrap()[0]).abs() < 1e-5);
        let (point, gradient) = (values(&pixels), values(&gradient));
        let half = 1e-3;
        let moved = |by: f32| {
            let moved: Vec<f32> = point.iter().zip(&gradient).map(|(p, g)| p + by * g.signum()).collect();
            let moved = Tensor::from_vec(moved, pixels.shape(), pixels.device()).unwrap();
            f64::from(target.loss(&moved, &[0]).unwrap()[0])
        };
        let difference = (moved(half) - moved(-half)) / (2.0 * f64::from(half));
        let slope: f64 = gradient.iter().map(|g| f64::from(g.abs())).sum();
        assert!((difference / slope - 1.0).abs() < 2e-2, "{objective:?}: {difference} {slope}");
    }
}

#[test]
fn many_draws_of_no_noise_are_the_model_itself_and_passes_change_nothing() {
    let assistant = assistant_of(Kind::Qwen3, Weights::Loud, false);
    let of = |noise, draws_at_once| {
        let (target, pixels) = target(&assistant, ObjectiveName::CrossEntropy, noise, 2);
        let target = Target { draws_at_once, ..target };
        let (loss, gradient) = target.loss_and_gradient(&pixels, &[0]).unwrap();
        (loss[0], values(&gradient))
    };
    let (plain, gradient) = of(None, 1);
    let (still, mean) = of(Some(bank(0.0, 5)), 2);
    let largest = gradient.iter().fold(0f32, |most, g| most.max(g.abs()));
    assert!((plain - still).abs() < 1e-6, "{plain} {still}");
    assert!(gradient.iter().zip(&mean).all(|(a, b)| (a - b).abs() < 1e-5 * largest));
    let (whole, one) = (of(Some(bank(0.2, 6)), 6), of(Some(bank(0.2, 6)), 1));
    assert_eq!(whole.0, one.0);
    assert!(whole.1.iter().zip(&one.1).all(|(a, b)| (a - b).abs() < 1e-5 * largest));
    assert_ne!(whole.0, plain);
}

#[test]
fn certified_items_are_attacked_inside_their_radius() {
    let dir = tempfile::tempdir().unwrap();
    let of = |name: &str, batch: &str, threads| {
        let more = [
            ("data.limit", "6"),
            ("data.split", "splits/test.json"),
            ("scoring", "likelihood"),
            ("certify.sigma", "0.02"),
            ("certify.n0", "10"),
            ("certify.n", "60"),
            ("certify.cross_check", "true"),
            ("batch_size", batch),
        ];
        let out = dir.path().join(name);
        let outcome = run_as(Certify, &settings(&material().loud, &out, &more), threads).unwrap();
        (lines(&out, "records.jsonl"), outcome)
    };
    let (records, outcome) = of("one", "1", 1);
    of("two", "7", 2);
    check_same(&dir.path().join("one"), &dir.path().join("two"));
    let mut checked = 0;
    for record in &records {
        let radius = record["radius"].as_f64().unwrap();
        let stands = record["prediction"].is_string() && radius > 0.0;
        assert_eq!(record["cross_check"].is_object(), stands, "{record}");
        if stands {
            checked += 1;
            let check = &record["cross_check"];
            assert!(check["l2"].as_f64().unwrap() <= radius, "{record}");
            assert!(check["losses"][1].as_f64() >= check["losses"][0].as_f64(), "{record}");
        }
        // The tiny model takes phantoms as they are: nothing to be stretched.
        assert_eq!(record["radius_original"], record["radius"]);
    }
    assert!(checked > 0, "nothing was certified");
    assert_eq!(outcome.summary["cross_check"]["n"], checked);
    assert!(outcome.text.contains(&format!("of {checked} certified items broken")), "{}", outcome.text);
}

#[test]
fn images_that_the_model_resizes_are_attacked_through_the_resize_as_it_is() {
    let dir = tempfile::tempdir().unwrap();
    let data = dir.path().join("data");
    crate::training::copy(&material().data, &data);
    for entry in std::fs::read_dir(data.join("Images/Phantom")).unwrap() {
        let path = entry.unwrap().path();
        let small = image::open(&path).unwrap();
        small.resize_exact(45, 77, image::imageops::FilterType::Nearest).save(&path).unwrap();
    }
    let root = data.display().to_string();
    let own = [("data.omnimedvqa", root.as_str()), ("attack.min_epsilon", "true"), ("attack.num_steps", "5")];
    let (records, summary) = attacked(dir.path(), "run", &own, 2);
    let check = |name: &str| {
        let checks = summary["verdict_checks"].as_array().unwrap();
        checks.iter().find(|check| check["name"] == name).unwrap().clone()
    };
    for name in ["processor equality", "budget kept by files", "files are changed"] {
        assert_eq!(check(name)["status"], "PASS", "{}", check(name));
    }
    for record in records.iter().filter(|record| record["min_epsilon"].is_number()) {
        let read = |name: &Value| {
            let path = dir.path().join("run").join(name.as_str().unwrap());
            safemed::pixels::decode::decode_file(&path).unwrap().data
        };
        let original = data.join(record["image"].as_str().unwrap());
        let original = safemed::pixels::decode::decode_file(&original).unwrap().data;
        let smallest = read(&record["min_epsilon_image"]);
        let linf = smallest.iter().zip(&original).map(|(a, b)| a.abs_diff(*b)).max().unwrap();
        assert!(
            (record["min_epsilon"].as_f64().unwrap() - f64::from(linf) / 255.0).abs() < 1e-12,
            "{record}"
        );
    }
}
