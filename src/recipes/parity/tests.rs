use super::*;
use crate::model::test_support::{fixture_json, fixtures};
use crate::model::weights::{TensorFile, save_file};
use candle_core::Tensor;
use serde_json::{Value, json};
use std::collections::{BTreeMap, BTreeSet};
use std::path::PathBuf;

fn run(dir: &Path) -> ParityReport {
    parity(dir, &Device::Cpu, &mut |_| ()).unwrap()
}

/// The last part of a check's name.
fn quantity(name: &str) -> &str {
    name.rsplit('/').next().unwrap()
}

#[test]
fn the_whole_export_is_matched() {
    let Some(dir) = fixtures() else { return };
    let mut stages = Vec::new();
    let report = parity(&dir, &Device::Cpu, &mut |stage| stages.push(stage.to_string())).unwrap();
    let mut worst: BTreeMap<&str, (f64, &str)> = BTreeMap::new();
    for check in &report.checks {
        let entry = worst.entry(quantity(&check.name)).or_insert((-1.0, ""));
        if check.max_abs_diff > entry.0 {
            *entry = (check.max_abs_diff, &check.name);
        }
    }
    println!("{worst:#?}");
    let failed: Vec<&Check> = report.checks.iter().filter(|check| !check.pass).collect();
    assert!(report.pass && failed.is_empty(), "{failed:#?}");
    let names: BTreeSet<&str> = report.checks.iter().map(|check| check.name.as_str()).collect();
    assert_eq!(names.len(), report.checks.len(), "every name once");
    assert!(stages.len() > 2 && stages.last().unwrap() == "attacks");
    every_part_of_the_export_has_its_check(&dir, &names);
    let not_checked: BTreeSet<&str> = report.not_checked.iter().map(|entry| entry.name.as_str()).collect();
    assert!(not_checked.is_disjoint(&names));
    if dir.join("lora.json").exists() {
        let adapters = fixture_json(&dir.join("lora.json"));
        for key in adapters.as_object().unwrap().keys() {
            for quantity in ["lora_logits", "lora_merged", "weight_gradient", "loss"] {
                let name = format!("{}/{quantity}", key.replacen('.', "/", 1));
                assert!(names.contains(name.as_str()), "{name}");
            }
        }
    }
}

/// What the files of the export hold, by the contract's names.
fn every_part_of_the_export_has_its_check(dir: &Path, names: &BTreeSet<&str>) {
    for checkpoint in parity_io::checkpoint_names(dir).unwrap() {
        let reference = ReferenceCheckpoint::load(dir, &checkpoint).unwrap().unwrap();
        let has = |case: &str, quantity: &str| {
            let name = format!("{checkpoint}/{case}/{quantity}");
            assert!(names.contains(name.as_str()), "{name}");
        };
        for (case, row) in reference.expected["cases"].as_object().unwrap() {
            has(case, "logits");
            has(case, "log_probs");
            if row.get("greedy").is_some() {
                has(case, "greedy_tokens");
            }
            for (tensor, quantity) in [("vision.merged", "vision"), ("text.hidden.0", "hidden_states")] {
                if reference.tensors.shape(&format!("{case}.{tensor}")).is_some() {
                    has(case, quantity);
                }
            }
        }
        for quantity in ["loss", "pixel_gradient", "pgd_first_step"] {
            has("single", quantity);
        }
        if reference.expected["train"].get("grad_norms").is_some() {
            has("single", "weight_gradient");
        }
        if reference.expected.get("batch_left").is_some() {
            for side in ["batch_left", "batch_right"] {
                has(side, "logits_padded");
                has(side, "position_ids");
            }
            has("batch_left", "greedy_tokens");
        }
    }
    for name in ["-/binary/grpo_advantages", "-/dr_grpo/grpo_loss", "-/dapo/grpo_gradient", "-/-/clipping"] {
        assert!(names.contains(name), "{name}");
    }
    for name in ["-/adamw_clip/adamw", "-/adamw_clip/clipping", "-/cosine.warmup3.total10/schedule"] {
        assert!(names.contains(name), "{name}");
    }
    let attack = fixture_json(&dir.join("pgd.json"));
    for quantity in ["pgd_loss", "pgd_image"] {
        let name =
            [attack["checkpoint"].as_str().unwrap(), attack["case"].as_str().unwrap(), quantity].join("/");
        assert!(names.contains(name.as_str()), "{name}");
    }
}

/// The parts of the export that one checkpoint needs, in a directory of their own.
fn export_of(name: &str) -> Option<tempfile::TempDir> {
    let source = fixtures()?;
    let dir = tempfile::tempdir().unwrap();
    for part in [format!("checkpoints/{name}"), "images".to_string()] {
        std::fs::create_dir_all(dir.path().join(&part)).unwrap();
        for entry in std::fs::read_dir(source.join(&part)).unwrap() {
            let file = entry.unwrap().file_name();
            copy(&source, dir.path(), &PathBuf::from(&part).join(file));
        }
    }
    std::fs::create_dir_all(dir.path().join("expected")).unwrap();
    for extension in ["json", "safetensors"] {
        copy(&source, dir.path(), Path::new(&format!("expected/{name}.{extension}")));
    }
    Some(dir)
}

/// By content: the copy may be written to even where the original may not.
fn copy(from: &Path, to: &Path, file: &Path) {
    std::fs::write(to.join(file), std::fs::read(from.join(file)).unwrap()).unwrap();
}

/// Adds `amount` to one number of one weight.
fn corrupt(dir: &Path, checkpoint: &str, weight: &str, amount: f32) {
    let path = dir.join("checkpoints").join(checkpoint).join("model.safetensors");
    let file = TensorFile::open(&path).unwrap();
    assert!(file.shape(weight).is_some());
    let mut tensors = Vec::new();
    for name in file.names() {
        let mut values = file.floats(&name).unwrap();
        if name == weight {
            values[0] += amount;
        }
        let tensor = Tensor::from_vec(values, file.shape(&name).unwrap(), &Device::Cpu).unwrap();
        tensors.push((name, tensor));
    }
    save_file(&path, &tensors, &[]).unwrap();
}

#[test]
fn one_changed_weight_fails_what_depends_on_it_and_nothing_else() {
    let Some(dir) = export_of("qwen2_vl") else { return };
    assert!(run(dir.path()).pass);
    corrupt(dir.path(), "qwen2_vl", "visual.blocks.1.mlp.fc2.bias", 0.02);
    let report = run(dir.path());
    assert!(!report.pass);
    let passed = |name: &str| {
        let name = format!("qwen2_vl/{name}");
        report.checks.iter().find(|check| check.name == name).unwrap_or_else(|| panic!("{name}")).pass
    };
    for name in ["single/vision", "single/hidden_states", "single/logits", "single/log_probs", "single/loss"]
    {
        assert!(!passed(name), "{name}");
    }
    for name in
        ["two_images/logits", "batch_right/logits_padded", "single/pixel_gradient", "single/weight_gradient"]
    {
        assert!(!passed(name), "{name}");
    }
    for name in ["text_only/logits", "text_only/greedy_tokens", "single/input_ids", "single/pixel_values"] {
        assert!(passed(name), "{name}");
    }
}

#[test]
fn an_export_without_numbers_is_refused() {
    let dir = tempfile::tempdir().unwrap();
    let error = parity(dir.path(), &Device::Cpu, &mut |_| ()).unwrap_err();
    assert!(error.to_string().contains("no reference numbers"), "{error}");
}

/// Rewrites `expected/NAME.json`.
fn change_expected(dir: &Path, name: &str, change: impl FnOnce(&mut Value)) {
    let path = dir.join(format!("expected/{name}.json"));
    let mut value = fixture_json(&path);
    change(&mut value);
    std::fs::write(&path, value.to_string()).unwrap();
}

#[test]
fn a_wrong_expectation_fails_its_own_check() {
    let Some(dir) = export_of("qwen3_vl") else { return };
    change_expected(dir.path(), "qwen3_vl", |value| {
        value["cases"]["single"]["greedy"][1]["ids"][0][3] = json!(7);
        value["batch_left"]["position_ids"][2][1][30] = json!(99);
        value["train"]["grad_norms"]["lm_head.weight"] = json!(1e-4);
    });
    let failed: Vec<String> =
        run(dir.path()).checks.into_iter().filter(|check| !check.pass).map(|check| check.name).collect();
    let wanted = ["single/greedy_tokens", "batch_left/position_ids", "single/weight_gradient"];
    assert_eq!(failed, wanted.map(|name| format!("qwen3_vl/{name}")));
}

#[test]
fn an_adapter_that_computes_something_else_fails_its_own_checks() {
    let Some(dir) = export_of("qwen3_vl") else { return };
    let Some(source) = fixtures().filter(|source| source.join("lora.json").exists()) else { return };
    let from = source.join("lora/qwen3_vl_list");
    let to = dir.path().join("lora/qwen3_vl_list");
    std::fs::create_dir_all(&to).unwrap();
    std::fs::copy(from.join("adapter_model.safetensors"), to.join("adapter_model.safetensors")).unwrap();
    std::fs::copy(source.join("lora.safetensors"), dir.path().join("lora.safetensors")).unwrap();
    let report = fixture_json(&source.join("lora.json"));
    let own = json!({"qwen3_vl.list": report["qwen3_vl.list"]});
    std::fs::write(dir.path().join("lora.json"), own.to_string()).unwrap();
    // Twice the scaling.
    let mut settings = fixture_json(&from.join("adapter_config.json"));
    settings["lora_alpha"] = json!(2.0 * settings["lora_alpha"].as_f64().unwrap());
    std::fs::write(to.join("adapter_config.json"), settings.to_string()).unwrap();
    let checks = lora::check(dir.path(), &Device::Cpu).unwrap();
    let failed: BTreeSet<&str> =
        checks.iter().filter(|check| !check.pass).map(|check| quantity(&check.name)).collect();
    for wanted in ["lora_logits", "lora_merged", "loss", "weight_gradient"] {
        assert!(failed.contains(wanted), "{wanted} passed: {failed:?}");
    }
}

#[test]
fn what_is_not_compared_is_named() {
    let Some(dir) = export_of("qwen3_vl_bf16") else { return };
    std::fs::create_dir(dir.path().join("checkpoints/other")).unwrap();
    std::fs::write(dir.path().join("checkpoints/other/config.json"), "{}").unwrap();
    let report = run(dir.path());
    assert!(report.pass);
    let names: Vec<&str> = report.not_checked.iter().map(|entry| entry.name.as_str()).collect();
    assert_eq!(names, ["other/-/logits"]);
    let half = report.checks.iter().find(|check| check.name == "qwen3_vl_bf16/single/bf16_logits").unwrap();
    assert!(half.max_abs_diff > 1e-4, "the reference rounds, and this build does not: {half:?}");
    let value = serde_json::to_value(&report).unwrap();
    let keys: Vec<&str> = value["checks"][0].as_object().unwrap().keys().map(String::as_str).collect();
    assert_eq!(keys, ["name", "max_abs_diff", "tolerance", "pass"]);
}

#[test]
fn dumped_logits_are_those_of_the_reference() {
    let Some(source) = fixtures() else { return };
    let reference = ReferenceCheckpoint::load(&source, "qwen2_5_vl").unwrap().unwrap();
    let case = reference.cases.iter().find(|case| case.name == "single").unwrap();
    let conversation = &parity_io::conversations(&source).unwrap()["single"];
    let out = tempfile::tempdir().unwrap();
    dump::dump_logits(&reference.dir, None, conversation, &case.images, out.path(), &Device::Cpu).unwrap();
    let prompt = fixture_json(&out.path().join("prompt.json"));
    assert_eq!(prompt["prompt"], case.prompt);
    assert_eq!(prompt["input_ids"], json!(case.input_ids));
    let numbers = TensorFile::open(&out.path().join("numbers.safetensors")).unwrap();
    let logits = numbers.tensor("logits").unwrap();
    let wanted = reference.tensors.tensor("single.logits").unwrap();
    let places: Vec<u32> =
        serde_json::from_value(reference.expected["cases"]["single"]["single.positions"].clone()).unwrap();
    let found = logits.index_select(&Tensor::new(places, &Device::Cpu).unwrap(), 0).unwrap();
    let difference = (found - wanted).unwrap().abs().unwrap().max_all().unwrap().to_scalar::<f32>().unwrap();
    assert!(difference < 1e-4, "{difference}");
    assert_eq!(numbers.shape("pixel_values"), reference.tensors.shape("single.pixel_values"));
}

#[test]
fn a_wrong_training_number_fails_its_own_check() {
    let Some(source) = fixtures() else { return };
    let dir = tempfile::tempdir().unwrap();
    let mut grpo = fixture_json(&source.join("grpo.json"));
    let mut optim = fixture_json(&source.join("optim.json"));
    let name = grpo["advantages"][0]["name"].as_str().unwrap().to_string();
    let kind = grpo["loss"]["cases"][0]["loss_type"].as_str().unwrap().to_string();
    let run = optim["runs"].as_object().unwrap().keys().next().unwrap().clone();
    let add = |value: &mut Value, amount: f64| *value = json!(value.as_f64().unwrap() + amount);
    add(&mut grpo["advantages"][0]["advantages"][1], 1e-5);
    add(&mut grpo["loss"]["cases"][0]["loss"], -1e-5);
    // A token that does not count, in the second completion of length one.
    add(&mut grpo["loss"]["cases"][0]["grad_logps"][1][3], 1e-5);
    add(&mut optim["runs"][&run]["steps"][5]["x"][2], 1e-4);
    add(&mut optim["schedules"]["linear.warmup3.total10"][4], 1e-5);
    add(&mut optim["clip"]["after"][1][0], 1e-5);
    std::fs::write(dir.path().join("grpo.json"), grpo.to_string()).unwrap();
    assert!(parity(dir.path(), &Device::Cpu, &mut |_| ()).is_ok_and(|report| !report.pass));
    std::fs::write(dir.path().join("optim.json"), optim.to_string()).unwrap();
    let failed: BTreeSet<String> =
        parity_io::merge_by_name(training::check(dir.path(), &mut Vec::new()).unwrap())
            .into_iter()
            .filter(|check| !check.pass)
            .map(|check| check.name)
            .collect();
    let wanted = [
        format!("-/{name}/grpo_advantages"),
        format!("-/{kind}/grpo_loss"),
        format!("-/{kind}/grpo_gradient"),
        format!("-/{run}/adamw"),
        "-/linear.warmup3.total10/schedule".to_string(),
        "-/-/clipping".to_string(),
    ];
    assert_eq!(failed, wanted.into());
}

#[test]
fn an_attack_of_another_step_size_fails() {
    let Some(source) = fixtures() else { return };
    let Some(dir) = export_of("qwen2_5_vl") else { return };
    copy(&source, dir.path(), Path::new("pgd.safetensors"));
    let mut attack = fixture_json(&source.join("pgd.json"));
    for (norm, factor) in [("l2", 0.8), ("linf", 0.5)] {
        let kept = attack.clone();
        attack[norm]["alpha"] = json!(attack[norm]["alpha"].as_f64().unwrap() * factor);
        std::fs::write(dir.path().join("pgd.json"), attack.to_string()).unwrap();
        let checks = parity_io::merge_by_name(pgd::check(dir.path(), &Device::Cpu).unwrap());
        assert!(checks.len() == 2 && checks.iter().all(|check| !check.pass), "{norm}: {checks:?}");
        attack = kept;
    }
}

#[test]
fn golden_vectors_are_matched_case_by_case_and_a_wrong_number_fails_its_own_check() {
    let Some(source) = fixtures().map(|dir| dir.join("../grpo_golden.json")).filter(|path| path.exists())
    else {
        return;
    };
    let dir = tempfile::tempdir().unwrap();
    let mut golden = fixture_json(&source);
    let write = |name: &str, value: &Value| std::fs::write(dir.path().join(name), value.to_string()).unwrap();
    write("grpo_golden.json", &golden);
    let report = run(dir.path());
    assert!(report.pass && report.not_checked.is_empty(), "{report:#?}");
    let count = |quantity: &str| report.checks.iter().filter(|check| check.name.ends_with(quantity)).count();
    let cases = golden["cases"].as_array().unwrap().len();
    let metrics = golden["metrics"].as_object().unwrap().len();
    assert_eq!(
        (count("/grpo_loss"), count("/grpo_gradient"), count("/grpo_advantages"), count("/grpo_metrics")),
        (cases, cases, 4, metrics),
        "every case by a name of its own"
    );
    assert!(report.checks.iter().all(|check| check.tolerance == 1e-6));

    let add = |value: &mut Value, amount: f64| *value = json!(value.as_f64().unwrap() + amount);
    add(&mut golden["cases"][3]["loss"], 1e-5);
    add(&mut golden["cases"][25]["grad"][1][1], 1e-5);
    add(&mut golden["advantages"]["batch"][0], 1e-5);
    add(&mut golden["advantages"]["normalize_then_sum"][1], 1e-5);
    for metric in ["kl", "entropy", "clip_ratio/high_max", "rewards/f1/std"] {
        add(&mut golden["metrics"][metric], 1e-5);
    }
    golden["metrics"]["unheard_of"] = json!(1.0);
    // By another name beside the first: both are looked at.
    write("grpo_other.json", &golden);
    let report = run(dir.path());
    let failed: BTreeSet<&str> =
        report.checks.iter().filter(|check| !check.pass).map(|check| check.name.as_str()).collect();
    let wanted = [
        "-/grpo.token.beta0.04.delta1.35/grpo_loss",
        "-/cispo.token.beta0.04/grpo_gradient",
        "-/batch/grpo_advantages",
        "-/normalize_then_sum/grpo_advantages",
        "-/kl/grpo_metrics",
        "-/entropy/grpo_metrics",
        "-/clip_ratio/high_max/grpo_metrics",
        "-/rewards/f1/std/grpo_metrics",
    ];
    assert_eq!(failed, wanted.into());
    assert_eq!(report.not_checked[0].name, "-/unheard_of/grpo_metrics");
    golden["logps"][0] = json!([0.0]);
    write("grpo_other.json", &golden);
    let error = parity(dir.path(), &Device::Cpu, &mut |_| ()).unwrap_err().to_string();
    assert!(error.contains("another shape") && error.contains("grpo_other.json"), "{error}");
}
