//! Low-rank adapters from training to export: small files, the same bytes after a kill, one meaning everywhere.

use crate::support::{run as call, safemed};
use crate::tiny::{phantoms, tiny_checkpoint};
use serde_json::Value;
use std::fs;
use std::path::Path;
use std::process::Stdio;
use std::time::Duration;

fn text(path: &Path) -> String {
    path.display().to_string()
}

fn train(root: &Path, out: &str, more: &[&str]) -> Vec<String> {
    let (model, data) = (text(&root.join("model")), text(&root.join("data")));
    let mut words: Vec<String> =
        ["train", "--model", &model, "--omnimedvqa", &data, "--split", "splits/train.json"]
            .map(str::to_owned)
            .to_vec();
    let settings = [
        "prompt=phantom",
        "max_new_tokens=2",
        "images=false",
        "train.target=instruct",
        "train.num_steps=4",
        "train.batch_size=4",
        "train.save_every=2",
        "train.keep_checkpoints=0",
        "train.learning_rate=0.02",
        "train.lora_rank=2",
        "train.lora_alpha=8",
    ];
    for setting in settings.iter().chain(more) {
        words.extend(["--set".to_owned(), (*setting).to_owned()]);
    }
    words.extend(["--out".to_owned(), text(&root.join(out)), "--resume".to_owned()]);
    words
}

fn done(root: &Path, words: &[String]) -> String {
    let words: Vec<&str> = words.iter().map(String::as_str).collect();
    let (status, _, stderr) = call(root, &words);
    assert_eq!(status, 0, "{stderr}");
    stderr
}

fn material() -> tempfile::TempDir {
    let dir = tempfile::tempdir().unwrap();
    tiny_checkpoint(&dir.path().join("model"));
    phantoms(&dir.path().join("data"));
    dir
}

fn predictions(root: &Path, out: &str, more: &[&str]) -> Vec<(String, Value, String)> {
    let (data, out_dir) = (text(&root.join("data")), text(&root.join(out)));
    let mut words = vec![
        "eval",
        "--omnimedvqa",
        &data,
        "--prompt",
        "phantom",
        "--out",
        &out_dir,
        "--max-new-tokens",
        "2",
    ];
    words.extend(more);
    let words: Vec<String> = words.into_iter().map(str::to_owned).collect();
    done(root, &words);
    let records = fs::read_to_string(root.join(out).join("records.jsonl")).unwrap();
    records
        .lines()
        .map(|line| {
            let record: Value = serde_json::from_str(line).unwrap();
            let word = |key: &str| record[key].as_str().unwrap_or_default().to_owned();
            (word("id"), record["prediction"].clone(), word("completion"))
        })
        .collect()
}

#[test]
fn an_adapter_trains_is_evaluated_and_merges_to_the_same_answers() {
    let dir = material();
    let root = dir.path();
    let said = done(root, &train(root, "lora", &["train.lora_target_modules=q_proj,v_proj,down_proj"]));
    assert!(said.contains("adapter of rank 2 over") && said.contains("q_proj x"), "{said}");
    let adapter = root.join("lora/checkpoints/step-4");
    assert!(
        adapter.join("adapter_model.safetensors").exists() && !adapter.join("model.safetensors").exists()
    );
    let mut settings: Value =
        serde_json::from_slice(&fs::read(adapter.join("adapter_config.json")).unwrap()).unwrap();
    assert_eq!(settings["target_modules"], serde_json::json!(["q_proj", "v_proj", "down_proj"]));
    assert_eq!((&settings["r"], &settings["lora_alpha"]), (&2.into(), &8.into()));

    let (model, adapter, merged) = (text(&root.join("model")), text(&adapter), text(&root.join("merged")));
    let plain = predictions(root, "plain", &["--model", &model]);
    let active = predictions(root, "active", &["--model", &model, "--adapter", &adapter]);
    assert_ne!(plain, active, "four large steps change what is said");
    let export = ["export", "--model", &model, "--adapter", &adapter, "--out", &merged].map(str::to_owned);
    done(root, &export);
    assert_eq!(active, predictions(root, "of-merged", &["--model", &merged]));
    let run: Value = serde_json::from_slice(&fs::read(root.join("active/run.json")).unwrap()).unwrap();
    assert_eq!(run["adapter_sha256"].as_str().map(str::len), Some(64), "{run}");

    // Settings that speak of more than the file holds: without a word the base's would stay.
    settings["modules_to_save"] = serde_json::json!(["lm_head"]);
    fs::write(Path::new(&adapter).join("adapter_config.json"), settings.to_string()).unwrap();
    let mut further = train(root, "further", &[]);
    further.extend(["--adapter".to_owned(), adapter.clone()]);
    let again = ["export", "--model", &model, "--adapter", &adapter, "--out", "again"].map(str::to_owned);
    for words in [&further[..], &again] {
        let words: Vec<&str> = words.iter().map(String::as_str).collect();
        let (status, _, stderr) = call(root, &words);
        assert_eq!(status, 3, "{stderr}");
        assert!(stderr.contains("`modules_to_save` names `lm_head`"), "{stderr}");
    }
    assert!(!root.join("further").exists() && !root.join("again").exists());
}

#[test]
fn a_killed_adapter_run_under_kl_goes_on_to_the_same_bytes() {
    let dir = material();
    let root = dir.path();
    let more = ["train.recipe=at_grpo", "train.grpo.kl_coef=0.1", "train.grpo.temperature=1.5"];
    done(root, &train(root, "whole", &more));
    let words = train(root, "killed", &more);
    let metrics = root.join("killed/metrics.jsonl");
    let mut child = safemed(root).args(&words).stdout(Stdio::null()).stderr(Stdio::null()).spawn().unwrap();
    while child.try_wait().unwrap().is_none() {
        if fs::read_to_string(&metrics).is_ok_and(|text| text.lines().count() >= 3) {
            child.kill().unwrap();
            break;
        }
        std::thread::sleep(Duration::from_millis(1));
    }
    assert!(child.wait().unwrap().code().is_none(), "the run ended before it could be killed");
    done(root, &words);
    for file in ["metrics.jsonl", "completions.jsonl"] {
        let read = |run: &str| fs::read(root.join(run).join(file)).unwrap();
        assert!(read("whole") == read("killed"), "{file} differs");
    }
    for file in ["adapter_model.safetensors", "optimizer.safetensors", "adapter_config.json"] {
        let read = |run: &str| fs::read(root.join(run).join("checkpoints/step-4").join(file)).unwrap();
        assert!(read("whole") == read("killed"), "{file} differs");
    }
    let first: Value =
        serde_json::from_str(fs::read_to_string(&metrics).unwrap().lines().next().unwrap()).unwrap();
    assert_eq!(first["kl"], 0.0, "a new adapter is its own reference: {first}");
}

#[test]
fn an_adapter_is_trained_further_from_where_it_stands() {
    let dir = material();
    let root = dir.path();
    done(root, &train(root, "first", &[]));
    let adapter = text(&root.join("first/checkpoints/step-4"));
    // What is set about adapters may stand there again where this one keeps to it.
    let again = ["train.num_steps=1", "train.learning_rate=0", "train.lora_target_modules=all-linear"];
    let mut words = train(root, "second", &again);
    words.extend(["--adapter".to_owned(), adapter.clone()]);
    done(root, &words);
    for file in ["adapter_model.safetensors", "adapter_config.json"] {
        let read = |dir: &str| fs::read(root.join(dir).join(file)).unwrap();
        assert!(read("first/checkpoints/step-4") == read("second/checkpoints/step-1"), "{file}");
    }
    for (setting, said) in [
        ("train.parts.vision=false", "set `train.parts.vision` to true"),
        ("train.lora_target_modules=q_proj", "`train.lora_target_modules` has no effect"),
        ("train.lora_exclude_modules=down_proj", "`train.lora_exclude_modules` has no effect"),
    ] {
        let mut words = train(root, "refused", &[setting]);
        words.extend(["--adapter".to_owned(), adapter.clone()]);
        let words: Vec<&str> = words.iter().map(String::as_str).collect();
        let (status, _, stderr) = call(root, &words);
        assert_eq!(status, 2, "{setting}: {stderr}");
        assert!(stderr.contains(said) && stderr.contains("`model."), "{setting}: {stderr}");
        assert!(!root.join("refused").exists(), "{setting}");
    }
}

#[test]
fn what_does_not_fit_is_refused_before_training() {
    let dir = material();
    let root = dir.path();
    for (more, adapter, status, words) in [
        (&["train.lora_target_modules=nothing_like_it"][..], None, 2, "q_proj x"),
        (&["train.lora_target_modules=lm_head"], None, 2, "output layer"),
        (&["train.lora_target_modules=(q_proj"], None, 2, "no regular expression"),
        (&["train.lora_target_modules=q_proj,nope"], None, 2, "no linear layer `nope`"),
        (&["train.lora_target_modules=q_proj", "train.parts.text=false"], None, 2, "has no effect"),
        (&["train.lora_target_modules=q_proj", "train.lora_rank=0"], None, 2, "no adapter trains"),
        (&["train.lora_rank=1000000"], None, 2, "exceeds both sides"),
        (&[], Some("absent"), 3, "absent"),
    ] {
        let mut arguments = train(root, "out", more);
        if let Some(adapter) = adapter {
            arguments.extend(["--adapter".to_owned(), adapter.to_owned()]);
        }
        let arguments: Vec<&str> = arguments.iter().map(String::as_str).collect();
        let (found, _, stderr) = call(root, &arguments);
        assert_eq!(found, status, "{more:?}: {stderr}");
        assert!(stderr.contains(words), "{more:?}: {stderr}");
        assert!(!root.join("out").exists(), "{more:?}");
    }
}
