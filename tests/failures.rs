//! Training that goes wrong: what is said and kept of numbers that are not finite, of full disks, damaged checkpoints, signals
//! and kills at any moment; and that a run goes on from there to the bytes of one to which nothing happened.

use crate::support::{run as call, safemed, texts};
use crate::tiny::{Kind, Weights, assistant_of};
use crate::training::{SHORT, arguments, check_same, copy, lines, material, run_as, settings};
use candle_core::{Device, Tensor};
use safemed::error::ExitStatus;
use safemed::model::weights::{TensorFile, save_file};
use safemed::pixels::RgbImage8;
use safemed::pixels::decode::decode_file;
use safemed::recipes::config::Command::{Attack, Train};
use safemed::recipes::failure::{Noted, walk};
use safemed::roles::policy::Scoring;
use serde_json::{Value, json};
use std::fs;
use std::path::Path;
use std::process::{Child, Stdio};
use std::sync::Arc;
use std::time::{Duration, Instant};

/// A policy with an adapter: several passes and several updates of each step, a checkpoint after each, warnings on the way.
const ADAPTER: [(&str, &str); 14] = [
    ("train.recipe", "grpo"),
    ("data.limit", "12"),
    ("train.batch_size", "4"),
    ("train.micro_batch_size", "2"),
    ("train.num_steps", "12"),
    ("train.save_every", "1"),
    ("train.keep_checkpoints", "3"),
    ("train.learning_rate", "0.002"),
    ("train.lora_rank", "2"),
    ("train.grpo.group_size", "4"),
    ("train.grpo.num_updates", "2"),
    ("train.grpo.temperature", "0.2"),
    ("train.watch.patience", "2"),
    ("train.watch.max_clipped_ratio", "0.01"),
];

type Damage<'a> = &'a dyn Fn(&Path);

/// The arguments of a training in `out` that goes on where it was.
fn words(out: &Path, more: &[(&str, &str)]) -> Vec<String> {
    let mut words = arguments(Train, &settings(&material().loud, out, more));
    words.extend(["--resume", "--threads", "1"].map(str::to_owned));
    words
}

/// Goes on with a training in `out`; gives its status and what it says.
pub(crate) fn go_on(out: &Path, more: &[(&str, &str)]) -> (i32, String) {
    let words = words(out, more);
    let words: Vec<&str> = words.iter().map(String::as_str).collect();
    let (status, _, err) = call(out.parent().unwrap(), &words);
    (status, err)
}

/// Starts such a training, or goes on with it.
pub(crate) fn start(out: &Path, more: &[(&str, &str)]) -> Child {
    let mut command = safemed(out.parent().unwrap());
    command.args(words(out, more)).stdout(Stdio::null()).stderr(Stdio::null()).spawn().unwrap()
}

/// Waits until `is_so`; false when the child ends, or a minute passes, before.
pub(crate) fn wait_until(child: &mut Child, mut is_so: impl FnMut() -> bool) -> bool {
    let started = Instant::now();
    while started.elapsed() < Duration::from_secs(60) {
        if is_so() {
            return true;
        }
        if child.try_wait().unwrap().is_some() {
            return false;
        }
        std::hint::spin_loop();
    }
    false
}

/// Of which each may have a line for every update.
fn steps_logged(out: &Path) -> usize {
    let text = fs::read_to_string(out.join("metrics.jsonl")).unwrap_or_default();
    let step = |line: &str| serde_json::from_str::<Value>(line).ok()?["step"].as_u64();
    text.lines().filter_map(step).max().unwrap_or(0) as usize
}

fn has_partial(out: &Path) -> bool {
    let Ok(entries) = fs::read_dir(out.join("checkpoints")) else { return false };
    entries.flatten().any(|entry| entry.file_name().to_string_lossy().ends_with(".partial"))
}

#[test]
fn training_killed_at_any_moment_goes_on_to_the_same_bytes() {
    let dir = tempfile::tempdir().unwrap();
    let whole = dir.path().join("whole");
    run_as(Train, &settings(&material().loud, &whole, &ADAPTER), 2).unwrap();
    assert!(!lines(&whole, "warnings.jsonl").is_empty(), "nothing to be rewound");
    let (mut kills, mut inside) = (0, 0);
    for seed in 0u64..3 {
        let out = dir.path().join(format!("killed-{seed}"));
        let mut state = seed.wrapping_mul(0x9E37_79B9_7F4A_7C15) + 1;
        for round in 0..5 {
            let mut child = start(&out, &ADAPTER);
            let before = steps_logged(&out);
            // By turns while a checkpoint is written, and a while after a step.
            let is_due = if round % 2 == 0 {
                wait_until(&mut child, || steps_logged(&out) > before && has_partial(&out))
            } else {
                state = state.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1);
                let is_due = wait_until(&mut child, || steps_logged(&out) > before);
                std::thread::sleep(Duration::from_millis(state >> 33 & 63));
                is_due
            };
            if is_due {
                child.kill().unwrap();
            }
            let was_killed = child.wait().unwrap().code().is_none();
            kills += usize::from(was_killed);
            inside += usize::from(was_killed && has_partial(&out));
        }
        let (status, err) = go_on(&out, &ADAPTER);
        assert_eq!(status, 0, "{err}");
        check_same(&whole, &out);
    }
    assert!(kills >= 6 && inside > 0, "{kills} kills, {inside} while a checkpoint was written");
}

#[test]
fn damaged_checkpoints_are_named_and_the_one_before_goes_on_to_the_same_bytes() {
    let dir = tempfile::tempdir().unwrap();
    let whole = dir.path().join("whole");
    run_as(Train, &settings(&material().loud, &whole, &SHORT), 2).unwrap();
    let cut = |path: &Path, length: u64| {
        fs::OpenOptions::new().write(true).open(path).unwrap().set_len(length).unwrap();
    };
    let cases: [(&str, &[u64], Damage<'_>); 4] = [
        ("truncated", &[6], &|step| cut(&step.join("optimizer.safetensors"), 1000)),
        ("empty", &[6, 4], &|step| cut(&step.join("model.safetensors"), 0)),
        ("missing", &[6], &|step| fs::remove_file(step.join("tokenizer.json")).unwrap()),
        // Checkpoints of earlier versions have no list of their files.
        ("unlisted", &[6], &|step| {
            fs::remove_file(step.join("files.json")).unwrap();
            cut(&step.join("optimizer.safetensors"), 1000);
        }),
    ];
    for (name, steps, damage) in cases {
        let out = dir.path().join(name);
        copy(&whole, &out);
        for step in steps {
            damage(&out.join(format!("checkpoints/step-{step}")));
        }
        let (status, err) = go_on(&out, &SHORT);
        assert_eq!(status, 0, "{name}: {err}");
        let last = format!("step-{}", 6 - 2 * steps.len());
        for step in steps {
            assert!(err.contains(&format!("step-{step} is damaged")) && err.contains(&last), "{name}: {err}");
        }
        check_same(&whole, &out);
    }
    let out = dir.path().join("all");
    copy(&whole, &out);
    for step in [2, 4, 6] {
        cut(&out.join(format!("checkpoints/step-{step}/state.json")), 3);
    }
    let (status, err) = go_on(&out, &SHORT);
    assert!(status == 3 && err.contains("no checkpoint of this run is whole"), "{status} {err}");
    assert!([2, 4, 6].iter().all(|step| err.contains(&format!("step {step}: "))), "{err}");
}

#[test]
fn a_disk_that_is_full_leaves_the_last_checkpoint_and_the_run_goes_on_when_there_is_room() {
    let dir = tempfile::tempdir().unwrap();
    let (whole, out) = (dir.path().join("whole"), dir.path().join("full"));
    run_as(Train, &settings(&material().loud, &whole, &SHORT), 2).unwrap();
    let mut child = start(&out, &SHORT);
    assert!(wait_until(&mut child, || steps_logged(&out) >= 3));
    child.kill().unwrap();
    child.wait().unwrap();
    // Files longer than this are refused, as by a full disk: the optimiser's, of all that a checkpoint has.
    let optimizer = fs::metadata(whole.join("checkpoints/step-2/optimizer.safetensors")).unwrap().len();
    let script = format!("trap '' XFSZ; ulimit -f {}; exec \"$@\"", (optimizer - 1) / 512);
    let mut command = std::process::Command::new("sh");
    command.args(["-c", &script, "sh", env!("CARGO_BIN_EXE_safemed")]).args(words(&out, &SHORT));
    let (status, _, err) = texts(&command.current_dir(dir.path()).output().unwrap());
    assert_eq!(status, 1, "{err}");
    for part in ["checkpoint of step 4 cannot be written", "step 2 is kept", "--resume"] {
        assert!(err.contains(part), "{part}: {err}");
    }
    // What it says a checkpoint takes is what it takes.
    let checkpoint = fs::read_dir(whole.join("checkpoints/step-2")).unwrap();
    let bytes: u64 = checkpoint.map(|entry| entry.unwrap().metadata().unwrap().len()).sum();
    let said = err.split("it takes about ").nth(1).unwrap().split(' ').next().unwrap();
    let said: u64 = said.parse().unwrap();
    assert!(said <= bytes && said * 4 > bytes * 3, "{said} {bytes}");
    let mut left: Vec<String> = fs::read_dir(out.join("checkpoints"))
        .unwrap()
        .map(|entry| entry.unwrap().file_name().into_string().unwrap())
        .collect();
    left.sort();
    assert_eq!(left, ["step-2"]);
    let (status, err) = go_on(&out, &SHORT);
    assert_eq!(status, 0, "{err}");
    check_same(&whole, &out);
}

/// Sends the signal of this name.
pub(crate) fn signal(child: &Child, name: &str) {
    let sent =
        std::process::Command::new("kill").args([&format!("-{name}"), &child.id().to_string()]).status();
    assert!(sent.unwrap().success());
}

#[test]
fn a_signal_saves_and_the_run_goes_on_to_the_same_bytes() {
    let dir = tempfile::tempdir().unwrap();
    let more = [&ADAPTER[..], &[("train.num_steps", "30"), ("train.save_every", "7")]].concat();
    let whole = dir.path().join("whole");
    run_as(Train, &settings(&material().loud, &whole, &more), 2).unwrap();
    for name in ["TERM", "USR1", "INT"] {
        let out = dir.path().join(name);
        let mut child = start(&out, &more);
        assert!(wait_until(&mut child, || steps_logged(&out) >= 2), "SIG{name}");
        signal(&child, name);
        assert_eq!(child.wait().unwrap().code(), Some(75), "SIG{name}");
        let done = steps_logged(&out);
        assert!(out.join(format!("checkpoints/step-{done}/files.json")).exists(), "SIG{name}");
        let (status, err) = go_on(&out, &more);
        assert_eq!(status, 0, "{err}");
        check_same(&whole, &out);
    }
}

#[test]
fn a_second_signal_ends_a_long_step_at_once() {
    let dir = tempfile::tempdir().unwrap();
    let slow = [
        ("train.batch_size", "36"),
        ("train.micro_batch_size", "36"),
        ("data.limit", "40"),
        ("train.grpo.group_size", "32"),
        ("max_new_tokens", "96"),
        ("train.grpo.temperature", "2"),
    ];
    let more = [&ADAPTER[..], &slow].concat();
    for (first, second) in [("TERM", "TERM"), ("INT", "TERM"), ("USR1", "INT")] {
        let out = dir.path().join(format!("{first}-{second}"));
        let mut child = start(&out, &more);
        // Between steps one signal is enough: the second is under way soon after the first is saved.
        assert!(wait_until(&mut child, || out.join("checkpoints/step-1/files.json").exists()));
        std::thread::sleep(Duration::from_millis(50));
        for name in [first, second] {
            signal(&child, name);
            std::thread::sleep(Duration::from_millis(50));
        }
        if first == "USR1" {
            // It is not counted: the next one asks, and one more ends.
            assert!(child.try_wait().unwrap().is_none(), "a warning and one request");
            signal(&child, "TERM");
        }
        assert_eq!(child.wait().unwrap().code(), Some(130), "{first} {second}");
        assert_eq!(steps_logged(&out), 1);
    }
}

#[test]
fn a_step_that_is_not_finite_is_dumped_and_repeats_to_the_bit() {
    let dir = tempfile::tempdir().unwrap();
    for recipe in ["sft", "at_grpo", "trades", "denoiser"] {
        let out = dir.path().join(recipe);
        let own = [
            ("train.recipe", recipe),
            ("train.learning_rate", "1e30"),
            ("train.save_every", "1"),
            ("train.grpo.group_size", "4"),
            ("train.adversary.num_steps", "2"),
            ("train.permute_options", "true"),
            ("train.noise_sigma", if recipe == "denoiser" { "0.2" } else { "0" }),
            // Of this one it is the update that fails, and not the attack before it.
            ("train.adversary.clean_fraction", if recipe == "trades" { "1" } else { "0.25" }),
        ];
        let more = [&SHORT[..], &own].concat();
        let error = run_as(Train, &settings(&material().loud, &out, &more), 2).unwrap_err();
        assert_eq!(error.status(), ExitStatus::NonFinite, "{recipe}: {error}");
        let text = error.to_string();
        let dump = out.join("failure/step-2");
        let lower = "= help: lower `train.learning_rate`";
        // The only checkpoint holds what the update before this step made.
        let start = "the checkpoint of step 1 may hold what went wrong, and no sound one is older: begin again from the start";
        for part in ["step 2, questions `Phantom_", &dump.display().to_string(), lower, start] {
            assert!(text.contains(part), "{recipe}: {part}: {text}");
        }
        let is_named =
            text.contains("first not finite: `") || text.contains("first not finite: weights are non-finite");
        assert!(is_named, "{recipe}: {text}");
        let bytes = fs::read(dump.join("failure.json")).unwrap();
        let report: Value = serde_json::from_slice(&bytes).unwrap();
        assert_eq!((&report["step"], &report["checkpoint"]), (&json!(2), &json!("checkpoints/step-1")));
        assert_eq!(report["train"]["recipe"], recipe);
        assert!(report["learning_rate"].as_f64() > Some(1e29));
        assert!(out.join("checkpoints/step-1/state.json").exists() && !out.join("summary.json").exists());
        let items = report["items"].as_array().unwrap();
        assert_eq!(items.len(), 3);
        let tensors = TensorFile::open(&dump.join("pixels.safetensors")).unwrap();
        for (place, item) in items.iter().enumerate() {
            assert_eq!(item["id"], report["ids"][place]);
            let exact = tensors.floats(&format!("pixels.{place}")).unwrap();
            assert!(!exact.is_empty() && exact.iter().all(|value| value.is_finite()));
            let shown = decode_file(&dump.join(item["image"].as_str().unwrap())).unwrap();
            let shown =
                shown.to_tensor(&Device::Cpu).unwrap().flatten_all().unwrap().to_vec1::<f32>().unwrap();
            assert_eq!(shown.len(), exact.len());
            if recipe == "sft" {
                assert_eq!(shown, exact, "a clean image has eight bits");
            }
            let is_compared = ["trades", "denoiser"].contains(&recipe);
            let clean = tensors.floats(&format!("clean.{place}"));
            assert_eq!(clean.is_ok(), is_compared, "{recipe}");
            if recipe == "trades" {
                assert_eq!(clean.unwrap(), exact, "nothing is attacked");
            }
            if recipe != "denoiser" {
                assert!(!item["prompt_ids"].as_array().unwrap().is_empty());
                let question = item["question"]["question"].as_str().unwrap();
                assert!(item["prompt"].as_str().unwrap().contains(question));
                assert!(!item["target_ids"].as_array().unwrap().is_empty());
            }
        }
        // The command of the report: the same step fails in the same way.
        let (status, err) = go_on(&out, &more);
        assert!(status == 4 && err.contains("step 2, questions"), "{status} {err}");
        assert_eq!(fs::read(dump.join("failure.json")).unwrap(), bytes, "{recipe}");
    }
}

#[test]
fn after_a_failure_a_checkpoint_older_than_the_last_update_is_named() {
    let dir = tempfile::tempdir().unwrap();
    let out = dir.path().join("run");
    // The first step of a warm-up moves nothing; what the second makes of the weights is saved before the third fails.
    let own = [("train.learning_rate", "1e30"), ("train.warmup_steps", "2"), ("train.save_every", "1")];
    let more = [&SHORT[..], &own].concat();
    let error = run_as(Train, &settings(&material().loud, &out, &more), 2).unwrap_err();
    assert_eq!(error.status(), ExitStatus::NonFinite, "{error}");
    let text = error.to_string();
    let named = "the last update is the suspect, so with other settings begin a new run from the checkpoint of step 1, which is older";
    assert!(text.contains("step 3, questions `Phantom_") && text.contains(named), "{text}");
    // What goes on from the newest comes to the same failure.
    let report: Value =
        serde_json::from_slice(&fs::read(out.join("failure/step-3/failure.json")).unwrap()).unwrap();
    assert_eq!(report["checkpoint"], "checkpoints/step-2");
    let weights = |dir: &Path| -> Vec<Vec<f32>> {
        let file = TensorFile::open(&dir.join("model.safetensors")).unwrap();
        file.names().iter().map(|name| file.floats(name).unwrap()).collect()
    };
    let named = weights(&out.join("checkpoints/step-1"));
    assert!(named == weights(&material().loud), "the one that is named is sound");
}

#[test]
fn a_failure_before_any_update_is_no_matter_of_the_learning_rate() {
    let dir = tempfile::tempdir().unwrap();
    let (model, out) = (dir.path().join("model"), dir.path().join("run"));
    copy(&material().loud, &model);
    // Finite, as weights are looked at when they are loaded, and too large for what is made of them.
    let path = model.join("model.safetensors");
    let file = TensorFile::open(&path).unwrap();
    let tensor = |name: String| {
        let tensor = file.tensor(&name).unwrap();
        let is_large = name == "model.language_model.layers.0.mlp.up_proj.weight";
        (name, if is_large { (tensor.ones_like().unwrap() * 3e38).unwrap() } else { tensor })
    };
    let tensors: Vec<(String, Tensor)> = file.names().into_iter().map(tensor).collect();
    drop(file);
    save_file(&path, &tensors, &[("format", "pt")]).unwrap();
    let error = run_as(Train, &settings(&model, &out, &SHORT), 2).unwrap_err();
    assert_eq!(error.status(), ExitStatus::NonFinite, "{error}");
    let text = error.to_string();
    for part in [
        "step 1, questions `Phantom_",
        "first not finite: `model.language_model.layers.0 output` is ",
        "= help: no update has moved the weights yet: look at those that were loaded (`--model`, `--adapter`)",
        "; then begin again with another `--out`",
    ] {
        assert!(text.contains(part), "{part}: {text}");
    }
    assert!(!text.contains("learning_rate"), "{text}");
}

/// A reward command that answers the completions at odd places of a group with one text and all others with another, whatever they
/// say.
fn by_turns(odd: &str, even: &str) -> String {
    let text = format!(
        r#"while IFS= read -r l; do case "$l" in '{{"step":'*',"index":'*[13579]',"count":'*) echo '{odd}';; *) echo '{even}';; esac; done"#
    );
    json!(["sh", "-c", text]).to_string()
}

/// A few steps of GRPO in which that command alone gives rewards; how it ends.
fn fails_paid_by(command: &str, out: &Path, more: &[(&str, &str)]) -> String {
    let own = [
        ("train.recipe", "grpo"),
        ("train.grpo.temperature", "2"),
        ("train.grpo.accuracy_weight", "0"),
        ("train.grpo.format_weight", "0"),
        ("train.grpo.reward_command", command),
    ];
    let more = [&SHORT[..], &own, more].concat();
    let error = run_as(Train, &settings(&material().loud, out, &more), 2).unwrap_err();
    assert_eq!(error.status(), ExitStatus::NonFinite, "{error}");
    error.to_string()
}

#[test]
fn rewards_too_large_to_be_compared_end_the_run_with_their_group() {
    let dir = tempfile::tempdir().unwrap();
    let out = dir.path().join("run");
    let command = by_turns(r#"{"reward": 1e300}"#, r#"{"reward": -1e300}"#);
    let text = fails_paid_by(&command, &out, &[]);
    for part in
        ["the rewards of group 0 are too large", "step 1, questions `Phantom_", "= help: let `train.grpo.r"]
    {
        assert!(text.contains(part), "{part}: {text}");
    }
    assert!(!text.contains("learning_rate") && !text.contains("the weights"), "{text}");
    let report: Value =
        serde_json::from_slice(&fs::read(out.join("failure/step-1/failure.json")).unwrap()).unwrap();
    assert_eq!(report["items"][0]["rewards"][1], 1e300, "{report}");
}

#[test]
fn a_policy_that_diverged_and_fails_in_its_rollout_is_told_to_learn_slower() {
    let dir = tempfile::tempdir().unwrap();
    let out = dir.path().join("run");
    // Every other completion of a group is better, whatever it says: each step moves the weights.
    let command = by_turns(r#"{"reward": 1}"#, r#"{"reward": 0}"#);
    let text = fails_paid_by(&command, &out, &[("train.learning_rate", "1e30")]);
    for part in
        ["while sampling", "step 2, questions `Phantom_", "first not finite: ", "= help: lower `train.l"]
    {
        assert!(text.contains(part), "{part}: {text}");
    }
    assert!(!text.contains("safemed doctor"), "the checkpoint is sound: {text}");
}

#[test]
fn a_walk_names_the_first_layer_that_is_not_finite_and_the_question() {
    let image = |assistant: &safemed::model::assistant::Assistant, level: u8| {
        Arc::new(assistant.process(&RgbImage8::filled(32, 32, [level, 90, 7]).unwrap()).unwrap())
    };
    let batch = |assistant: &safemed::model::assistant::Assistant| {
        let images = [image(assistant, 10), image(assistant, 200)];
        let prompt = |text: &str, image: &safemed::model::processor::ProcessedImage| {
            assistant.prompt(text, Some(image.grid)).unwrap()
        };
        Noted {
            prompts: vec![prompt("first", &images[0]), prompt("second", &images[1])],
            targets: vec![assistant.target("<answer> A</answer>").unwrap(), assistant.target("no").unwrap()],
            images: images.to_vec(),
            ..Noted::default()
        }
    };
    let found = |name: &str, value: f64| {
        let assistant = assistant_of(Kind::Qwen3, Weights::Loud, true);
        let (_, var) =
            assistant.vlm.parameters().trained().into_iter().find(|(own, _)| own == name).expect(name);
        var.set(&(var.as_tensor().ones_like().unwrap() * value).unwrap()).unwrap();
        walk(&assistant, &batch(&assistant)).unwrap().first_bad
    };
    for (weight, value, layer) in [
        ("model.visual.blocks.1.attn.proj.weight", f64::NAN, "`model.visual.blocks.1 output` is NaN"),
        ("model.visual.merger.linear_fc2.weight", f64::NAN, "`model.visual.merger output` is NaN"),
        (
            "model.language_model.layers.1.mlp.up_proj.weight",
            f64::NAN,
            "`model.language_model.layers.1 output` is NaN",
        ),
        (
            "model.language_model.layers.0.mlp.up_proj.weight",
            3e38,
            "`model.language_model.layers.0 output` is ",
        ),
        ("model.language_model.norm.weight", f64::INFINITY, "`model.language_model.norm output` is "),
        ("lm_head.weight", f64::NAN, "`lm_head`"),
    ] {
        let (place, bad) = found(weight, value).unwrap_or_else(|| panic!("{weight}"));
        assert!(place == 0 && bad.starts_with(layer), "{weight}: {bad}");
    }
    let assistant = assistant_of(Kind::Qwen3, Weights::Loud, false);
    let sound = batch(&assistant);
    let walked = walk(&assistant, &sound).unwrap();
    assert_eq!(walked.first_bad, None);
    for (place, item) in walked.items.iter().enumerate() {
        let scoring =
            Scoring::new(&assistant, &sound.prompts[place..=place], &[vec![sound.targets[place].clone()]])
                .unwrap();
        let pixels = sound.images[place].resized.to_tensor(&Device::Cpu).unwrap().unsqueeze(0).unwrap();
        let features = safemed::roles::policy::encode(&assistant, &[pixels]).unwrap();
        let log_probs = scoring.evaluate(&assistant, Some(&features), 1.0).unwrap();
        let mean = -log_probs.iter().map(|v| f64::from(*v)).sum::<f64>() / log_probs.len() as f64;
        assert!((item["losses"][0].as_f64().unwrap() - mean).abs() < 1e-6, "{item} {mean}");
    }
    // One question of two: its image holds a number that is none.
    let mut values = vec![0.5f32; 2 * 3 * 32 * 32];
    values[3 * 32 * 32 + 5] = f32::NAN;
    let spoilt = vec![Tensor::from_vec(values, (2, 3, 32, 32), &Device::Cpu).unwrap()];
    let noted = Noted { pixels: spoilt.clone(), ..sound.clone() };
    let (place, bad) = walk(&assistant, &noted).unwrap().first_bad.unwrap();
    assert_eq!((place, bad.as_str()), (1, "the image is NaN at element 5 of [1, 3, 32, 32]"));
    // The one that it is compared with does.
    let pixels = vec![Tensor::full(0.5f32, (2, 3, 32, 32), &Device::Cpu).unwrap()];
    let noted = Noted { pixels, clean: spoilt, ..sound };
    let (place, bad) = walk(&assistant, &noted).unwrap().first_bad.unwrap();
    assert_eq!((place, bad.as_str()), (1, "the image is NaN at element 5 of [1, 3, 32, 32] (clean image)"));
}

#[test]
fn a_run_that_learns_nothing_says_so_in_its_files() {
    let dir = tempfile::tempdir().unwrap();
    let out = dir.path().join("run");
    let more = [&SHORT[..], &[("train.learning_rate", "0")]].concat();
    let outcome = run_as(Train, &settings(&material().loud, &out, &more), 2).unwrap();
    let warnings = lines(&out, "warnings.jsonl");
    assert_eq!(warnings.len(), 1, "{warnings:?}");
    assert_eq!((&warnings[0]["step"], &warnings[0]["kind"]), (&json!(2), &json!("learning_rate_zero")));
    assert_eq!(warnings[0]["figures"]["learning_rate"], 0.0);
    assert_eq!(outcome.summary["warnings"], json!({"learning_rate_zero": 1}));
    let report = fs::read_to_string(out.join("report.md")).unwrap();
    assert!(report.contains("learning_rate_zero") && report.contains("at step 2"), "{report}");
    // A run that learns has none.
    let out = dir.path().join("other");
    let outcome = run_as(Train, &settings(&material().loud, &out, &SHORT), 2).unwrap();
    assert!(outcome.summary["warnings"] == json!({}) && !out.join("warnings.jsonl").exists());
}

#[test]
fn every_bad_row_is_listed_with_its_line_before_weights_are_looked_for() {
    let dir = tempfile::tempdir().unwrap();
    let data = dir.path().join("data");
    copy(&material().data, &data);
    let folder = data.join("QA_information/Open-access");
    let file = fs::read_dir(&folder).unwrap().next().unwrap().unwrap().path();
    let text = fs::read_to_string(&file).unwrap();
    let mut records: Vec<Value> = serde_json::from_str(&text).unwrap();
    for at in [1, 4, 9] {
        records[at].as_object_mut().unwrap().remove("gt_answer").unwrap();
    }
    let rows: Vec<String> = records.iter().map(Value::to_string).collect();
    fs::write(&file, format!("[\n{}\n]\n", rows.join(",\n"))).unwrap();
    let data = data.display().to_string();
    let out = dir.path().join("out");
    let more = [&SHORT[..], &[("data.omnimedvqa", data.as_str())]].concat();
    let absent = dir.path().join("no-such-model");
    let error = run_as(Train, &settings(&absent, &out, &more), 1).unwrap_err();
    assert_eq!(error.status(), ExitStatus::Data);
    let text = error.to_string();
    assert!(text.starts_with("3 problems in the data"), "{text}");
    let name = file.file_name().unwrap().to_string_lossy().into_owned();
    for line in [3, 6, 11] {
        assert!(text.contains(&format!("{name}:{line}: record {}", line - 1)), "{line}: {text}");
    }
    assert!(!out.exists());
}

#[test]
fn an_image_that_cannot_be_read_is_found_before_weights_are_looked_for_or_left_out() {
    let dir = tempfile::tempdir().unwrap();
    let data = dir.path().join("data");
    copy(&material().data, &data);
    let trained: Vec<String> =
        serde_json::from_slice(&fs::read(data.join("splits/train.json")).unwrap()).unwrap();
    let split = dir.path().join("split.json");
    fs::write(&split, json!(trained[..12]).to_string()).unwrap();
    let folder = data.join("QA_information/Open-access");
    let file = fs::read_dir(&folder).unwrap().next().unwrap().unwrap().path();
    let records: Vec<Value> = serde_json::from_slice(&fs::read(file).unwrap()).unwrap();
    let of = |id: &str| records.iter().find(|record| record["question_id"] == id).unwrap();
    let image = of(&trained[7])["image_path"].as_str().unwrap();
    let damaged = data.join(image);
    let length = fs::metadata(&damaged).unwrap().len();
    fs::OpenOptions::new().write(true).open(&damaged).unwrap().set_len(length / 2).unwrap();
    let (data, split) = (data.display().to_string(), split.display().to_string());
    let more = [&SHORT[..], &[("data.omnimedvqa", data.as_str()), ("data.split", split.as_str())]].concat();
    let (absent, out) = (dir.path().join("no-weights"), dir.path().join("out"));
    fs::create_dir(&absent).unwrap();
    let error = run_as(Train, &settings(&absent, &out, &more), 1).unwrap_err();
    let text = error.to_string();
    assert_eq!(error.status(), ExitStatus::Data, "{text}");
    assert!(text.starts_with("1 problem in the data") && text.contains(image), "{text}");
    assert!(!out.exists());
    let more = [&more[..], &[("data.skip_invalid", "true")]].concat();
    let summary = run_as(Train, &settings(&material().loud, &out, &more), 2).unwrap().summary;
    let left = records.iter().filter(|record| {
        let is_wanted = trained[..12].iter().any(|id| record["question_id"] == id.as_str());
        is_wanted && record["image_path"] != image
    });
    assert_eq!(summary["n"], left.count());
    let run: Value = serde_json::from_slice(&fs::read(out.join("run.json")).unwrap()).unwrap();
    assert!(run.to_string().contains("\"skipped_problems\":1"), "{run}");
}

#[cfg(unix)]
#[test]
fn an_attack_stops_within_its_batch_when_asked() {
    let dir = tempfile::tempdir().unwrap();
    let out = dir.path().join("attack");
    let more = [
        ("scoring", "likelihood"),
        // Hours of it.
        ("attack.num_steps", "10000000"),
        ("attack.early_stop", "false"),
    ];
    let words = arguments(Attack, &settings(&material().loud, &out, &more));
    let mut child =
        safemed(dir.path()).args(words).stdout(Stdio::null()).stderr(Stdio::null()).spawn().unwrap();
    assert!(wait_until(&mut child, || out.join("run.json").exists()), "it ended by itself");
    std::thread::sleep(Duration::from_millis(500));
    signal(&child, "TERM");
    if wait_until(&mut child, || false) {
        child.kill().unwrap();
    }
    assert_eq!(child.wait().unwrap().code(), Some(75));
    // Items that are wrong anyway are not attacked: there may be records.
    assert!(!out.join("summary.json").exists());
}

/// A step may take minutes: an attack is left, and a program that does not answer.
#[cfg(unix)]
#[test]
fn a_step_is_left_before_its_update_and_begun_anew() {
    let dir = tempfile::tempdir().unwrap();
    let (script, hangs) = (dir.path().join("reward.sh"), dir.path().join("hangs"));
    // As long as there is such a file it does not answer in step 3.
    let text = format!(
        "while IFS= read -r line; do\n  case \"$line\" in *'\"step\":3,'*) while [ -e '{}' ]; do sleep 0.05; done;; esac\n  \
         case \"$line\" in *'\"index\":1,'*) echo '{{\"reward\": 1}}';; *) echo '{{\"reward\": 0}}';; esac\ndone\n",
        hangs.display()
    );
    fs::write(&script, text).unwrap();
    let command = format!("[\"sh\", \"{}\"]", script.display());
    let own = [
        ("train.recipe", "at_grpo"),
        ("train.grpo.group_size", "4"),
        ("train.grpo.reward_command", command.as_str()),
        ("train.grpo.reward_command_timeout", "600"),
        ("train.adversary.num_steps", "2"),
        ("train.save_every", "100"),
    ];
    let more = [&SHORT[..], &own].concat();
    let (whole, out) = (dir.path().join("whole"), dir.path().join("left"));
    run_as(Train, &settings(&material().loud, &whole, &more), 2).unwrap();
    fs::write(&hangs, "").unwrap();
    let mut child = start(&out, &more);
    assert!(wait_until(&mut child, || steps_logged(&out) == 2));
    std::thread::sleep(Duration::from_millis(300));
    signal(&child, "TERM");
    wait_until(&mut child, || false);
    assert_eq!(child.wait().unwrap().code(), Some(75));
    assert_eq!(steps_logged(&out), 2);
    assert!(out.join("checkpoints/step-2/files.json").exists());
    fs::remove_file(&hangs).unwrap();
    let (status, err) = go_on(&out, &more);
    assert_eq!(status, 0, "{err}");
    check_same(&whole, &out);

    let out = dir.path().join("attack");
    let endless = [("train.recipe", "at_sft"), ("train.adversary.num_steps", "1000000")];
    let mut child = start(&out, &[&SHORT[..], &endless].concat());
    assert!(wait_until(&mut child, || out.join("run.json").exists()));
    std::thread::sleep(Duration::from_millis(500));
    signal(&child, "TERM");
    if wait_until(&mut child, || false) {
        child.kill().unwrap();
    }
    assert_eq!(child.wait().unwrap().code(), Some(75));
    assert_eq!(steps_logged(&out), 0);
}

#[test]
fn a_training_does_not_go_on_from_another_model() {
    let dir = tempfile::tempdir().unwrap();
    let model = dir.path().join("model");
    copy(&material().loud, &model);
    let out = dir.path().join("out");
    let config = settings(&model, &out, &[&SHORT[..], &[("train.num_steps", "2")]].concat());
    run_as(Train, &config, 2).unwrap();
    for name in ["config.json", "tokenizer.json", "preprocessor_config.json"] {
        let path = model.join(name);
        let before = fs::read(&path).unwrap();
        // As much JSON as before, and other bytes.
        fs::write(&path, [&before[..], b"\n"].concat()).unwrap();
        let job = crate::training::job_of(Train, &config, &safemed::recipes::progress::Silent).unwrap();
        let job = safemed::recipes::job::Job { resume: true, ..job };
        let error = crate::training::run_job(&job, 2).unwrap_err();
        assert_eq!(error.status(), ExitStatus::Usage, "{name}: {error}");
        let text = error.to_string();
        assert!(text.contains("`model_files`") && text.contains("begin a new run"), "{name}: {text}");
        fs::write(&path, before).unwrap();
    }
}
