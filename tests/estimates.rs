//! Estimates: what they say before a run, that they leave nothing behind, and that memory is then as they said.

use crate::support;
use crate::tiny::{self, phantoms, tiny_checkpoint};
use safemed::model::config::{ModelSizes, SpecialIds, VlmConfig};
use safemed::model::loader::{Adaptation, Precision, load_part, load_vlm};
use safemed::model::truncate::{Depths, Truncation, write_stand_in};
use safemed::recipes::config::{Command, Override, RunConfig};
use serde_json::Value;
use std::fs;
use std::path::Path;

const SETTINGS: [&str; 5] =
    ["train.num_steps=6", "train.batch_size=2", "train.save_every=3", "max_new_tokens=8", "data.limit=12"];

/// The words of a `train` with these settings besides.
fn arguments<'a>(settings: &[&'a str], flags: &[&'a str]) -> Vec<&'a str> {
    let mut arguments = vec!["train", "--model", "model", "--omnimedvqa", "data", "--out", "run", "--json"];
    arguments.extend(["--prompt", "phantom", "--threads", "2"]);
    for setting in SETTINGS.iter().chain(settings) {
        arguments.extend(["--set", setting]);
    }
    arguments.extend(flags);
    arguments
}

/// Its answer.
fn train(dir: &Path, settings: &[&str], flags: &[&str]) -> (i32, String, String) {
    support::run(dir, &arguments(settings, flags))
}

fn estimate(dir: &Path, settings: &[&str], flags: &[&str]) -> Value {
    let flags: Vec<&str> = flags.iter().copied().chain(["--dry-run", "--probe-seconds", "0"]).collect();
    let (status, out, said) = train(dir, settings, &flags);
    assert_eq!(status, 0, "{said}");
    assert!(!dir.join("run").exists(), "a dry run writes nothing");
    serde_json::from_str(&out).unwrap()
}

/// A directory with a tiny checkpoint and questions for it.
fn material() -> tempfile::TempDir {
    let dir = tempfile::tempdir().unwrap();
    tiny_checkpoint(&dir.path().join("model"));
    phantoms(&dir.path().join("data"));
    dir
}

#[test]
fn a_dry_run_says_what_the_run_then_takes_and_writes_nothing() {
    let dir = material();
    for recipe in ["train.recipe=sft", "train.recipe=at_grpo"] {
        let said = estimate(dir.path(), &[recipe], &[]);
        assert_eq!((&said["items"], &said["num_steps"]), (&Value::from(12), &Value::from(6)), "{said}");
        assert_eq!((&said["image_tokens_longest"], &said["epochs"]), (&Value::from(4), &Value::from(1.0)));
        assert_eq!((&said["dry_run"], &said["is_measured_whole"]), (&Value::from(true), &Value::from(true)));
        assert_eq!(said["parameters"], said["parameters_trained"]);
        assert!(said["item_tokens_longest"].as_u64() >= said["item_tokens_median"].as_u64());
        let seconds = said["seconds_total"].as_f64().unwrap();
        assert!(seconds > 6.0 * said["seconds_per_step"].as_f64().unwrap());
        let (status, _, error) = train(dir.path(), &[recipe], &[]);
        assert_eq!(status, 0, "{error}");
        if cfg!(target_os = "linux") {
            let timings = fs::read_to_string(dir.path().join("run/timings.jsonl")).unwrap();
            let lines = timings.lines().map(|line| serde_json::from_str::<Value>(line).unwrap());
            let peak = lines.filter_map(|line| line["peak_memory_bytes"].as_f64()).fold(0.0, f64::max);
            let ratio = said["peak_memory_bytes"].as_f64().unwrap() / peak;
            assert!((0.85..1.15).contains(&ratio), "{recipe}: {ratio} of {peak}");
            assert_eq!(said["fits"], true);
        }
        fs::remove_dir_all(dir.path().join("run")).unwrap();
    }
}

/// Six questions apart, asked before the first of six steps, after the fourth and after the last.
const EXAMINED: [&str; 4] = [
    "data.split=splits/train.json",
    "train.validation.split=splits/test.json",
    "train.validation.every=4",
    "train.validation.limit=6",
];

#[test]
fn validations_are_measured_and_part_of_time_and_memory() {
    let dir = material();
    for own in [
        &["train.validation.num_steps=2"][..],
        &["train.validation.num_steps=2", "train.micro_batch_size=1", "train.recompute=true"],
        &["train.validation.num_steps=0", "train.recipe=grpo", "train.grpo.group_size=2"],
    ] {
        let settings = [&EXAMINED[..], own].concat();
        let said = estimate(dir.path(), &settings, &[]);
        assert_eq!((&said["validations"], &said["validation_items"]), (&Value::from(3), &Value::from(6)));
        let seconds = |name: &str| said[name].as_f64().unwrap();
        assert!(seconds("seconds_validation") > 0.0, "{said}");
        assert!(seconds("seconds_total") > 6.0 * seconds("seconds_per_step") + seconds("seconds_validation"));
        let (status, _, error) = train(dir.path(), &settings, &[]);
        assert_eq!(status, 0, "{error}");
        let examined = fs::read_to_string(dir.path().join("run/validation.jsonl")).unwrap();
        assert_eq!(examined.lines().count(), 3);
        if cfg!(target_os = "linux") {
            assert!(said["exam_peak_bytes"].as_u64().unwrap() <= said["peak_memory_bytes"].as_u64().unwrap());
            let timings = fs::read_to_string(dir.path().join("run/timings.jsonl")).unwrap();
            let lines = timings.lines().map(|line| serde_json::from_str::<Value>(line).unwrap());
            let peak = lines.filter_map(|line| line["peak_memory_bytes"].as_f64()).fold(0.0, f64::max);
            let ratio = said["peak_memory_bytes"].as_f64().unwrap() / peak;
            assert!((0.85..1.15).contains(&ratio), "{own:?}: {ratio} of {peak}");
        }
        fs::remove_dir_all(dir.path().join("run")).unwrap();
    }
    // What the run would refuse.
    let trained_on = [&EXAMINED[..], &["train.validation.split=splits/train.json"]].concat();
    let (status, _, said) = train(dir.path(), &trained_on, &["--dry-run"]);
    assert!(status == 3 && said.contains("validation questions are trained on"), "{said}");
}

/// The measurement that process `parent` has begun.
#[cfg(target_os = "linux")]
fn measurement_of(parent: u32) -> Option<String> {
    fs::read_dir("/proc").unwrap().find_map(|entry| {
        let process = entry.ok()?.path();
        let status = fs::read_to_string(process.join("status")).ok()?;
        let words = fs::read_to_string(process.join("cmdline")).ok()?;
        // Not yet the copy of the parent that is about to become it.
        let is_it = status.contains(&format!("PPid:\t{parent}\n")) && words.contains("\0probe\0");
        is_it.then(|| process.file_name().unwrap().to_string_lossy().into_owned())
    })
}

#[cfg(target_os = "linux")]
#[test]
fn a_measurement_killed_for_memory_is_answered_with_what_would_fit() {
    use std::process::Stdio;
    let dir = material();
    let settings = ["train.recipe=at_sft", "train.adversary.num_steps=60"];
    let mut program = support::safemed(dir.path());
    program.args(arguments(&settings, &["--dry-run", "--probe-seconds", "0"]));
    let child = program.stdout(Stdio::piped()).stderr(Stdio::piped()).spawn().unwrap();
    // Only the first: as the system does it, without a word.
    let deadline = std::time::Instant::now() + std::time::Duration::from_secs(60);
    let first = loop {
        if let Some(process) = measurement_of(child.id()) {
            break process;
        }
        assert!(std::time::Instant::now() < deadline, "nothing is measured");
        std::thread::sleep(std::time::Duration::from_millis(1));
    };
    assert!(std::process::Command::new("kill").args(["-KILL", &first]).status().unwrap().success());
    let (status, out, error) = support::texts(&child.wait_with_output().unwrap());
    assert_eq!(status, 0, "{error}");
    let said: Value = serde_json::from_str(&out).unwrap();
    assert_eq!((&said["fits"], &said["ran_out_of_memory"]), (&Value::from(false), &Value::from(true)));
    assert!(said["peak_memory_bytes"].is_null() && said["seconds_total"].is_null(), "{said}");
    assert_eq!(said["items"], 12);
    let advice = said["advice"].as_array().unwrap();
    assert_eq!(advice.len(), 1, "{said}");
    assert_eq!(
        (&advice[0]["change"], &advice[0]["fits"]),
        (&Value::from("train.micro_batch_size=1"), &Value::from(true))
    );
    assert!(advice[0]["peak_memory_bytes"].as_u64().unwrap() > 1 << 20);
    assert!(error.contains("out of memory"), "{error}");
}

#[test]
fn the_script_that_compares_estimates_names_runs_that_are_taken() {
    let script = Path::new(env!("CARGO_MANIFEST_DIR")).join("scripts/bench/estimates.py");
    let text = fs::read_to_string(script).unwrap();
    let (_, rest) = text.split_once("\nRECIPES = {").unwrap();
    let (recipes, rest) = rest.split_once("\n}\n").unwrap();
    assert!(rest.contains(r#""--prompt", "plain""#));
    let mut names = Vec::new();
    for recipe in recipes.split("],") {
        // Every other part stands between quotation marks.
        let mut words = recipe.split('"').skip(1).step_by(2);
        let Some(name) = words.next() else { continue };
        names.push(name);
        let settings = words.map(|word| word.split_once('=').unwrap()).chain([("prompt", "plain")]);
        let settings: Vec<Override> =
            settings.map(|(key, value)| Override::new(key, value, "--set")).collect();
        RunConfig::load(Command::Train, None, &settings).unwrap();
    }
    assert_eq!(names, ["sft_lora", "at_grpo"]);
}

#[test]
fn what_does_not_fit_comes_with_what_would() {
    let dir = material();
    let said = estimate(dir.path(), &["train.lora_rank=2"], &["--memory-gib", "0.001"]);
    if cfg!(target_os = "linux") {
        assert_eq!(said["fits"], false, "{said}");
        let changes: Vec<&str> = said["advice"]
            .as_array()
            .unwrap()
            .iter()
            .map(|advice| advice["change"].as_str().unwrap())
            .collect();
        assert_eq!(changes, ["dtype=bf16", "train.micro_batch_size=1", "train.recompute=true"]);
        assert!(said["advice"][2]["peak_memory_bytes"].as_u64().unwrap() > 1 << 20);
    }
    let (status, out, _) = train(dir.path(), &[], &["--dry-run", "--memory-gib", "1000"]);
    assert!(status == 0 && out.contains(r#""advice":[]"#), "{out}");
}

#[test]
fn a_dry_run_refuses_what_the_run_would() {
    let dir = material();
    let image = fs::read_dir(dir.path().join("data/Images")).unwrap().next().unwrap().unwrap().path();
    let files = walk(&image);
    for (content, status) in [(&b"no image"[..], 3)] {
        for file in &files {
            fs::write(file, content).unwrap();
        }
        let (found, _, said) = train(dir.path(), &[], &["--dry-run"]);
        assert_eq!(found, status, "{said}");
        assert!(said.contains("-->"), "{said}");
    }
    let (status, _, said) = train(dir.path(), &[], &["--dry-run", "--completion-tokens", "100000"]);
    assert!(status == 2 && said.contains("no completion is that long"), "{said}");
    let (status, _, said) = train(dir.path(), &["train.recipe=denoiser"], &["--dry-run"]);
    assert_eq!(status, 2, "{said}");
    fs::create_dir(dir.path().join("run")).unwrap();
    fs::write(dir.path().join("run/mine"), "").unwrap();
    assert_eq!(train(dir.path(), &[], &["--dry-run"]).0, 2);
}

fn walk(path: &Path) -> Vec<std::path::PathBuf> {
    if path.is_file() {
        return vec![path.to_path_buf()];
    }
    fs::read_dir(path).unwrap().flat_map(|entry| walk(&entry.unwrap().path())).collect()
}

/// A model with many blocks of every kind that its family has.
fn deep(is_third: bool) -> VlmConfig {
    let sizes = ModelSizes {
        num_layers: 8,
        vision_depth: 9,
        deepstack_layers: vec![1, 4, 7],
        full_attention_blocks: vec![2, 5, 8],
        ..tiny::sizes(2048)
    };
    let ids = SpecialIds { image: 1, video: 2, vision_start: 3, vision_end: 4, turn_end: 5, document_end: 6 };
    if is_third {
        VlmConfig::new_qwen3_vl(&sizes, ids).unwrap()
    } else {
        VlmConfig::new_qwen2_5_vl(&sizes, ids).unwrap()
    }
}

#[test]
fn a_truncated_checkpoint_holds_blocks_of_the_whole_one() {
    let dir = tempfile::tempdir().unwrap();
    tiny_checkpoint(dir.path());
    for is_third in [false, true] {
        let config = deep(is_third);
        write_stand_in(&config, true, dir.path()).unwrap();
        // The tiny checkpoint's processor is of the same geometry.
        let device = candle_core::Device::Cpu;
        let (whole, _) =
            load_vlm(dir.path(), Adaptation::None, Precision::AsStored, &|_| false, &device).unwrap();
        let all: std::collections::BTreeMap<String, _> =
            whole.parameters().tensors().unwrap().into_iter().collect();
        let depths = Depths::least(&config, 1);
        let truncation = Truncation::new(&config, depths);
        let (part, _) =
            load_part(dir.path(), Some(depths), Adaptation::None, Precision::AsStored, &|_| false, &device)
                .unwrap();
        assert_eq!(Depths::of(part.config()), depths);
        let kept = part.parameters().tensors().unwrap();
        assert!(kept.len() < all.len());
        for (name, tensor) in kept {
            let values =
                |tensor: &candle_core::Tensor| tensor.flatten_all().unwrap().to_vec1::<f32>().unwrap();
            assert_eq!(values(&tensor), values(&all[truncation.original(&name).as_ref()]), "{name}");
        }
    }
}

#[test]
fn a_configuration_alone_is_enough_for_an_estimate() {
    for is_third in [false, true] {
        let dir = tempfile::tempdir().unwrap();
        phantoms(&dir.path().join("data"));
        fs::create_dir(dir.path().join("model")).unwrap();
        let json = deep(is_third).to_json().to_string();
        fs::write(dir.path().join("model/config.json"), json).unwrap();
        let said = estimate(dir.path(), &["train.lora_rank=2"], &[]);
        assert_eq!(said["is_measured_whole"], false, "{said}");
        assert_eq!(said["assumptions"].as_array().unwrap().len(), 2, "{said}");
        assert!(said["seconds_total"].as_f64().unwrap() > 0.0);
        let (parameters, trained) = (&said["parameters"], &said["parameters_trained"]);
        assert!(trained.as_u64().unwrap() > 0 && trained.as_u64() < parameters.as_u64(), "{said}");
        if is_third {
            continue;
        }
        let image = walk(&dir.path().join("data/Images")).remove(0).display().to_string();
        let flags = ["--model", "model", "--probe-seconds", "0", "--image", &image, "--json"];
        let arguments: Vec<&str> = std::iter::once("doctor").chain(flags).collect();
        let (status, out, error) = support::run(dir.path(), &arguments);
        assert_eq!(status, 0, "{error}");
        let said: Value = serde_json::from_str(&out).unwrap();
        let works = said["estimate"]["works"].as_array().unwrap();
        assert_eq!(works.len(), 5);
        assert!(works.iter().all(|work| work["seconds"].as_f64().unwrap() >= 0.0), "{said}");
        assert_eq!(fs::read_dir(dir.path().join("model")).unwrap().count(), 1);
    }
}

#[test]
fn the_measuring_command_is_hidden() {
    let dir = tempfile::tempdir().unwrap();
    let (_, help, _) = support::run(dir.path(), &["--help"]);
    assert!(!help.contains("probe") && help.contains("doctor"), "{help}");
    let (status, _, said) = support::run(dir.path(), &["probe"]);
    assert_eq!(status, 2, "{said}");
}
