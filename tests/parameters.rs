//! What moves in training and how: parts that train and their rates, adapters and their scale, weights held in fewer bits,
//! dropout, averages, references that stay or follow.

use crate::support::run as call;
use crate::tiny::{Kind, Weights, assistant_of};
use crate::training::{
    arguments, check_same, job_of, lines, material, run_as, run_job, run_with_kills, settings,
};
use candle_core::Device;
use rand::RngCore;
use rand::seq::SliceRandom;
use safemed::data::ImageCheck;
use safemed::data::prompt::PromptTemplate;
use safemed::error::ExitStatus;
use safemed::model::assistant::Assistant;
use safemed::model::loader::{Adaptation, Precision};
use safemed::model::lora::Adapter;
use safemed::model::sampling::SamplingConfig;
use safemed::model::weights::{TensorFile, Weights as Checkpoint};
use safemed::recipes::config::Command::Train;
use safemed::recipes::config::{Override, RunConfig};
use safemed::recipes::items;
use safemed::recipes::job::Job;
use safemed::recipes::progress::{Kept, Progress, Silent};
use safemed::recipes::run::Stop;
use safemed::rng;
use safemed::roles::policy::{self, Scoring};
use serde_json::Value;
use std::collections::BTreeMap;
use std::fs;
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicUsize, Ordering};

/// A few steps, each with a checkpoint.
const SHORT: [(&str, &str); 8] = [
    ("data.limit", "12"),
    ("train.batch_size", "3"),
    ("train.num_steps", "3"),
    ("train.save_every", "1"),
    ("train.keep_checkpoints", "0"),
    ("train.learning_rate", "0.01"),
    ("train.schedule", "constant"),
    ("train.grpo.group_size", "4"),
];

const LORA: [(&str, &str); 2] = [("train.lora_rank", "2"), ("train.lora_alpha", "8")];

fn trained(model: &Path, out: &Path, more: &[(&str, &str)]) {
    run_as(Train, &settings(model, out, &[&SHORT[..], more].concat()), 2).unwrap();
}

fn text(path: &Path) -> String {
    path.display().to_string()
}

fn number(line: &Value, key: &str) -> f64 {
    line[key].as_f64().unwrap_or_else(|| panic!("{key}: {line}"))
}

/// Every number of a checkpoint's weights by name.
fn weights_of(dir: &Path) -> BTreeMap<String, Vec<f32>> {
    let checkpoint = Checkpoint::open(dir).unwrap();
    let read = |name: &str| {
        let shape = checkpoint.shape(name).unwrap();
        let tensor = checkpoint.get(name, shape).unwrap().into_tensor(shape).unwrap();
        (name.to_owned(), tensor.flatten_all().unwrap().to_vec1().unwrap())
    };
    checkpoint.names().map(read).collect()
}

fn tensors_of(file: &Path) -> BTreeMap<String, Vec<f32>> {
    let file = TensorFile::open(file).unwrap();
    file.names().into_iter().map(|name| (name.clone(), file.floats(&name).unwrap())).collect()
}

fn adapter_of(dir: &Path) -> BTreeMap<String, Vec<f32>> {
    tensors_of(&dir.join("adapter_model.safetensors"))
}

/// An adapter that two steps of fine-tuning made over `model`: its B is not zero any more.
fn fine_tuned(model: &Path, out: &Path) -> PathBuf {
    trained(model, out, &[&LORA[..], &[("train.num_steps", "2")]].concat());
    out.join("checkpoints/step-2")
}

#[test]
fn parts_learn_at_their_own_rates_and_the_log_keeps_the_base() {
    let dir = tempfile::tempdir().unwrap();
    let out = dir.path().join("rates");
    let more = [
        ("train.num_steps", "1"),
        ("train.learning_rates.vision", "0"),
        ("train.learning_rates.merger", "0.02"),
        ("train.max_grad_norm", "0"),
    ];
    trained(&material().loud, &out, &more);
    assert_eq!(number(&lines(&out, "metrics.jsonl")[0], "learning_rate"), 0.01);
    let (before, after) = (weights_of(&material().loud), weights_of(&out.join("checkpoints/step-1")));
    let moved = |is_wanted: &dyn Fn(&str) -> bool| {
        let names = before.keys().filter(|name| is_wanted(name));
        let largest = names.flat_map(|name| {
            before[name].iter().zip(&after[name]).map(|(a, b)| (f64::from(*a) - f64::from(*b)).abs())
        });
        largest.fold(0.0, f64::max)
    };
    let is_visual = |name: &str| name.starts_with("model.visual.");
    assert_eq!(moved(&|name| is_visual(name) && !name.contains("merger")), 0.0);
    // The first step of Adam is the rate itself.
    let (merger, text) = (moved(&|name| name.contains("merger")), moved(&|name| !is_visual(name)));
    assert!((merger - 0.02).abs() < 1e-4 && (text - 0.01).abs() < 1e-4, "{merger} {text}");
}

/// Settings under which these train: the vision tower, its merger, the text decoder.
fn parts_that([vision, merger, text]: [bool; 3]) -> [(&'static str, &'static str); 3] {
    let word = |trains: bool| if trains { "true" } else { "false" };
    [
        ("train.parts.vision", word(vision)),
        ("train.parts.merger", word(merger)),
        ("train.parts.text", word(text)),
    ]
}

/// Which of the three a tensor or layer belongs to.
fn part_of(name: &str) -> usize {
    match name.strip_prefix("model.visual.") {
        Some(rest) if rest.contains("merger") => 1,
        Some(_) => 0,
        None => 2,
    }
}

#[test]
fn a_part_that_does_not_train_stays_to_the_bit_and_the_others_move() {
    let dir = tempfile::tempdir().unwrap();
    let before = weights_of(&material().loud);
    for frozen in 0..3 {
        let trains = [0, 1, 2].map(|part| part != frozen);
        let out = dir.path().join(frozen.to_string());
        trained(&material().loud, &out, &[&parts_that(trains)[..], &[("train.num_steps", "1")]].concat());
        let after = weights_of(&out.join("checkpoints/step-1"));
        assert!(before.keys().eq(after.keys()));
        let mut moved = [0; 3];
        for (name, values) in &before {
            let bits = |values: &[f32]| values.iter().map(|value| value.to_bits()).collect::<Vec<_>>();
            moved[part_of(name)] += usize::from(bits(values) != bits(&after[name]));
        }
        assert_eq!(moved.map(|count| count > 0), trains, "{frozen}: {moved:?}");
    }
}

#[test]
fn an_adapter_stands_over_every_layer_of_the_parts_that_train_and_over_no_other() {
    let dir = tempfile::tempdir().unwrap();
    let adapted = |name: &str, trains: [bool; 3]| -> Vec<String> {
        let out = dir.path().join(name);
        let more = [&LORA[..], &parts_that(trains), &[("train.num_steps", "1")]].concat();
        trained(&material().loud, &out, &more);
        let saved = adapter_of(&out.join("checkpoints/step-1"));
        let halves = saved.keys().filter_map(|name| name.strip_suffix(".lora_A.weight"));
        halves.map(|name| name.strip_prefix("base_model.model.").unwrap().to_owned()).collect()
    };
    let all = adapted("all", [true; 3]);
    for part in 0..3 {
        assert!(all.iter().any(|layer| part_of(layer) == part), "{part}: {all:?}");
    }
    for (name, trains) in
        [("text", [false, false, true]), ("vision", [true, false, true]), ("merger", [false, true, true])]
    {
        let wanted: Vec<String> = all.iter().filter(|layer| trains[part_of(layer)]).cloned().collect();
        assert_eq!(adapted(name, trains), wanted, "{name}");
    }
}

#[test]
fn a_stabilised_scale_is_the_plain_one_of_an_alpha_times_the_root_of_the_rank() {
    let dir = tempfile::tempdir().unwrap();
    let run = |name: &str, alpha: &str, is_stabilised: &str| {
        let out = dir.path().join(name);
        let more =
            [("train.lora_rank", "4"), ("train.lora_alpha", alpha), ("train.lora_use_rslora", is_stabilised)];
        trained(&material().loud, &out, &more);
        let checkpoint = out.join("checkpoints/step-3");
        let file = fs::read(checkpoint.join("adapter_config.json")).unwrap();
        let config: Value = serde_json::from_slice(&file).unwrap();
        assert_eq!(config["use_rslora"].to_string(), is_stabilised, "{config}");
        (lines(&out, "metrics.jsonl"), adapter_of(&checkpoint))
    };
    let (plain, stabilised) = (run("plain", "8", "false"), run("stabilised", "8", "true"));
    // 8 / sqrt(4) and 16 / 4.
    let larger = run("larger", "16", "false");
    assert_eq!(stabilised.0, larger.0);
    assert!(stabilised.1 == larger.1 && stabilised.1 != plain.1);
    // While B is zero, the gradient is as large as the scale.
    let [norm, other] = [&stabilised, &plain].map(|(steps, _)| number(&steps[0], "grad_norm"));
    assert!(other > 0.0 && (norm / (2.0 * other) - 1.0).abs() < 1e-4, "{norm} {other}");
}

#[test]
fn an_adapter_over_bfloat16_begins_where_float32_does_to_rounding_and_learns() {
    let dir = tempfile::tempdir().unwrap();
    let losses = [("dtype", "f32"), ("dtype", "bf16"), ("arithmetic", "bf16")].map(|held| {
        let out = dir.path().join(format!("{}-{}", held.0, held.1));
        // The same questions in each step; and of large weights small differences would make much.
        trained(&material().fresh, &out, &[&LORA[..], &[held, ("data.limit", "3")]].concat());
        lines(&out, "metrics.jsonl").iter().map(|step| number(step, "loss")).collect::<Vec<f64>>()
    });
    for own in &losses {
        assert!((own[0] / losses[0][0] - 1.0).abs() < 1e-2 && own[2] < own[0], "{losses:?}");
    }
    // Weights, and then what is multiplied with them, are rounded indeed.
    let [single, weights, products] = [0, 1, 2].map(|held| losses[held][0]);
    assert!(single != weights && weights != products && products != single, "{losses:?}");
}

/// Asks for a stop behind so many steps.
#[derive(Default)]
pub(crate) struct Stopping {
    pub(crate) after: usize,
    pub(crate) steps: AtomicUsize,
    pub(crate) stop: Stop,
}

impl Progress for Stopping {
    fn start(&self, _total: usize, _done: usize, _what: &str) {}
    fn tick(&self, _done: usize, _figures: &[(&str, f64)]) {}
    // Of all that is told this alone is about steps.
    fn pace(&self, _tokens_per_second: f64, _phases: &[(&str, f64)]) {
        if self.steps.fetch_add(1, Ordering::Relaxed) + 1 == self.after {
            self.stop.request();
        }
    }
    fn note(&self, _text: &str) {}
    fn row(&self, _cells: &[String]) {}
}

#[test]
fn an_adapter_over_bfloat16_that_is_stopped_goes_on_to_the_same_bytes() {
    let dir = tempfile::tempdir().unwrap();
    let at_grpo = [
        ("train.recipe", "at_grpo"),
        ("train.adversary.num_steps", "2"),
        ("train.grpo.kl_coef", "0.1"),
        // Completions of one and of two tokens are worth different things.
        ("train.grpo.overlong_weight", "1"),
        ("train.grpo.overlong_cache", "1"),
    ];
    for (name, own, held) in [
        ("sft", &[][..], ("dtype", "bf16")),
        ("at_grpo", &at_grpo, ("dtype", "bf16")),
        ("products", &at_grpo, ("arithmetic", "bf16")),
    ] {
        let of = |name: &str| {
            let out = dir.path().join(name);
            // The stop is between two checkpoints.
            let more = [&SHORT[..], &LORA, own, &[held, ("train.save_every", "2")]].concat();
            (settings(&material().loud, &out, &more), out)
        };
        let (whole_settings, whole) = of(name);
        run_as(Train, &whole_settings, 2).unwrap();
        let steps = lines(&whole, "metrics.jsonl");
        assert!(steps.iter().all(|step| number(step, "loss").is_finite()), "{name}: {steps:?}");
        assert!(steps.iter().any(|step| number(step, "grad_norm") > 0.0), "{name}: {steps:?}");
        let (stopped_settings, stopped) = of(&format!("{name}-stopped"));
        let listener = Stopping { after: 1, ..Stopping::default() };
        let job = job_of(Train, &stopped_settings, &listener).unwrap();
        let error = run_job(&Job { stop: listener.stop.clone(), ..job }, 1).unwrap_err();
        assert_eq!(error.status(), ExitStatus::Stopped, "{name}: {error}");
        assert_eq!(lines(&stopped, "metrics.jsonl").len(), 1, "{name}");
        let job = job_of(Train, &stopped_settings, &Silent).unwrap();
        run_job(&Job { resume: true, ..job }, 2).unwrap();
        check_same(&whole, &stopped);
    }
}

#[test]
fn the_second_factor_of_an_adapter_learns_faster_by_the_ratio() {
    let dir = tempfile::tempdir().unwrap();
    let steps = ["1", "4"].map(|ratio| {
        let out = dir.path().join(ratio);
        let more = [("train.num_steps", "1"), ("train.lora_plus_ratio", ratio)];
        trained(&material().loud, &out, &[&LORA[..], &more].concat());
        adapter_of(&out.join("checkpoints/step-1"))
    });
    let mut moved = 0;
    for (name, plain) in &steps[0] {
        // B begins at zero, and a factor of four is exact.
        let factor = if name.contains("lora_B") { 4.0 } else { 1.0 };
        let wanted: Vec<f32> = plain.iter().map(|value| value * factor).collect();
        assert_eq!(steps[1][name], wanted, "{name}");
        moved += usize::from(factor > 1.0 && plain.iter().any(|value| *value != 0.0));
    }
    assert!(moved > 10, "{moved}");
}

/// The loss, and what the optimiser remembers of one step's gradients.
fn gradients_of(model: &Path, out: &Path, more: &[(&str, &str)]) -> (f64, BTreeMap<String, Vec<f32>>) {
    trained(model, out, &[more, &[("train.num_steps", "1"), ("train.batch_size", "8")]].concat());
    let mut moments = tensors_of(&out.join("checkpoints/step-1/optimizer.safetensors"));
    moments.retain(|name, _| name.starts_with("m."));
    assert!(moments.values().flatten().any(|value| *value != 0.0), "{more:?}");
    (number(&lines(out, "metrics.jsonl")[0], "loss"), moments)
}

/// Relative to the largest of each tensor, or of all where that is small beside it.
fn distance(a: &BTreeMap<String, Vec<f32>>, b: &BTreeMap<String, Vec<f32>>) -> f64 {
    let largest = |values: &[f32]| values.iter().fold(0f32, |most, value| most.max(value.abs()));
    let overall = a.values().map(|values| largest(values)).fold(0f32, f32::max);
    assert!(a.keys().eq(b.keys()));
    let worst = a.iter().map(|(name, values)| {
        let scale = largest(values).max(1e-3 * overall);
        values.iter().zip(&b[name]).map(|(a, b)| (a - b).abs() / scale).fold(0f32, f32::max)
    });
    f64::from(worst.fold(0f32, f32::max))
}

#[test]
fn one_pass_of_eight_two_of_four_and_eight_of_one_give_one_gradient() {
    let dir = tempfile::tempdir().unwrap();
    let cot: [(&str, &str); 2] = [("train.target", "cot"), ("prompt", "phantom_cot")];
    let grpo = [("train.recipe", "grpo"), ("train.grpo.kl_coef", "0.1"), ("train.grpo.temperature", "0.5")];
    for (recipe, own) in [("sft", &cot[..]), ("grpo", &grpo[..])] {
        let found = ["8", "4", "1"].map(|micro| {
            let more = [own, &[("train.micro_batch_size", micro)]].concat();
            gradients_of(&material().loud, &dir.path().join(format!("{recipe}-{micro}")), &more)
        });
        for other in &found[1..] {
            assert!((found[0].0 - other.0).abs() < 1e-5, "{recipe}: {} {}", found[0].0, other.0);
            let distance = distance(&found[0].1, &other.1);
            assert!(distance < 1e-3, "{recipe}: {distance}");
        }
    }
}

#[test]
fn what_is_recomputed_has_the_loss_and_gradients_of_what_is_kept_where_all_weights_train() {
    let dir = tempfile::tempdir().unwrap();
    let cot: [(&str, &str); 2] = [("train.target", "cot"), ("prompt", "phantom_cot")];
    let trades: [(&str, &str); 2] = [("train.recipe", "trades"), ("train.adversary.num_steps", "2")];
    let grpo = [("train.recipe", "grpo"), ("train.grpo.kl_coef", "0.1"), ("train.grpo.temperature", "0.5")];
    for (recipe, own) in [("sft", &cot[..]), ("trades", &trades), ("grpo", &grpo)] {
        let [kept, again] = ["false", "true"].map(|recompute| {
            let out = dir.path().join(format!("{recipe}-{recompute}"));
            let more = [own, &[("train.recompute", recompute)]].concat();
            let (loss, gradients) = gradients_of(&material().loud, &out, &more);
            let norm = number(&lines(&out, "metrics.jsonl")[0], "grad_norm");
            assert!(gradients.keys().any(|name| name.contains("model.visual.blocks.0.")), "the tower trains");
            ([loss, norm], gradients)
        });
        for (kept, again) in kept.0.iter().zip(again.0) {
            // The loss of a policy is zero by construction.
            assert!((kept - again).abs() < 1e-3 * kept.abs().max(1e-3), "{recipe}: {kept} {again}");
        }
        let distance = distance(&kept.1, &again.1);
        assert!(distance < 1e-3, "{recipe}: {distance}");
    }
}

#[test]
fn dropout_is_the_same_however_a_batch_is_cut_and_recomputed() {
    let dir = tempfile::tempdir().unwrap();
    for kind in [Kind::Qwen3, Kind::Qwen25] {
        let path = |name: &str| dir.path().join(format!("{kind:?}-{name}"));
        let model = path("model");
        // The vision tower of one of them has windows.
        assistant_of(kind, Weights::Loud, false).save(&model).unwrap();
        let adapter = text(&fine_tuned(&model, &path("sft")));
        let cot: [(&str, &str); 2] = [("train.target", "cot"), ("prompt", "phantom_cot")];
        let grpo =
            [("train.recipe", "grpo"), ("train.grpo.kl_coef", "0.1"), ("train.grpo.temperature", "0.5")];
        for (recipe, own) in [("sft", &cot[..]), ("grpo", &grpo[..])] {
            let run = |name: &str, dropout: &str, more: &[(&str, &str)]| {
                let base = [("adapter", adapter.as_str()), ("train.lora_dropout", dropout)];
                let more = [own, &base, more].concat();
                gradients_of(&model, &path(&format!("{recipe}-{name}")), &more)
            };
            let whole = run("whole", "0.4", &[]);
            for (name, more) in [
                ("halves", [("train.micro_batch_size", "4")]),
                ("single", [("train.micro_batch_size", "1")]),
                ("recomputed", [("train.recompute", "true")]),
            ] {
                let other = run(name, "0.4", &more);
                assert!((whole.0 - other.0).abs() < 1e-5, "{recipe} {name}: {} {}", whole.0, other.0);
                let distance = distance(&whole.1, &other.1);
                assert!(distance < 1e-3, "{kind:?} {recipe} {name}: {distance}");
            }
            let without = run("without", "0", &[]);
            assert!(distance(&whole.1, &without.1) > 0.1, "{kind:?} {recipe}: nothing was dropped");
            // What is sampled does not know of it: the same completions, and so the same rewards.
            if recipe == "grpo" {
                let rewards = ["whole", "without"].map(|name| {
                    lines(&path(&format!("grpo-{name}")), "completions.jsonl")
                        .iter()
                        .map(|line| line["completion"].clone())
                        .collect::<Vec<_>>()
                });
                assert_eq!(rewards[0], rewards[1]);
            }
        }
        let settings: Value = serde_json::from_slice(
            &fs::read(path("sft-whole").join("checkpoints/step-1/adapter_config.json")).unwrap(),
        )
        .unwrap();
        assert_eq!(settings["lora_dropout"], 0.4);
    }
}

#[test]
fn dropout_draws_anew_at_each_step_and_update() {
    let dir = tempfile::tempdir().unwrap();
    let adapter = text(&fine_tuned(&material().loud, &dir.path().join("sft")));
    let losses = |name: &str, more: &[(&str, &str)]| -> Vec<f64> {
        let out = dir.path().join(name);
        // One question, again and again, by a model that stays as it is.
        let base = [
            ("adapter", adapter.as_str()),
            ("train.lora_dropout", "0.5"),
            ("train.learning_rate", "0"),
            ("data.limit", "1"),
            ("train.batch_size", "1"),
        ];
        trained(&material().loud, &out, &[&base[..], more].concat());
        lines(&out, "metrics.jsonl").iter().map(|line| number(line, "loss")).collect()
    };
    let steps = losses("steps", &[]);
    assert!(steps[0] != steps[1] && steps[1] != steps[2] && steps[0] != steps[2], "{steps:?}");
    assert_ne!(losses("seed", &[("seed", "1")]), steps);
}

#[test]
fn averaged_weights_are_a_model_of_their_own_and_the_closed_form() {
    let dir = tempfile::tempdir().unwrap();
    let (plain, out) = (dir.path().join("plain"), dir.path().join("averaged"));
    trained(&material().fresh, &plain, &[]);
    trained(&material().fresh, &out, &[("train.ema_decay", "0.6")]);
    let mut average: BTreeMap<String, Vec<f64>> = weights_of(&material().fresh)
        .into_iter()
        .map(|(name, values)| (name, values.into_iter().map(f64::from).collect()))
        .collect();
    for step in 1..=3 {
        let checkpoint = out.join(format!("checkpoints/step-{step}"));
        let (own, found) = (weights_of(&checkpoint), weights_of(&checkpoint.join("ema")));
        assert!(own.keys().eq(found.keys()));
        for (name, own) in &own {
            for ((average, own), found) in
                average.get_mut(name).unwrap().iter_mut().zip(own).zip(&found[name])
            {
                *average += 0.4 * (f64::from(*own) - *average);
                assert!((*average - f64::from(*found)).abs() < 1e-6, "{name} {step}: {average} {found}");
            }
        }
        // Training itself does not know of it.
        assert_eq!(own, weights_of(&plain.join(format!("checkpoints/step-{step}"))));
    }
    let lora = dir.path().join("lora");
    trained(&material().loud, &lora, &[&LORA[..], &[("train.ema_decay", "0.6")]].concat());
    let (ema, loud) = (text(&lora.join("checkpoints/step-3/ema")), text(&material().loud));
    assert_ne!(adapter_of(Path::new(&ema)), adapter_of(&lora.join("checkpoints/step-3")));
    let of_full = text(&out.join("checkpoints/step-3/ema"));
    let data = text(&material().data);
    for (name, model) in
        [("full", vec!["--model", &of_full]), ("lora", vec!["--model", &loud, "--adapter", &ema])]
    {
        let run = text(&dir.path().join(format!("eval-{name}")));
        let rest = ["--omnimedvqa", &data, "--prompt", "phantom", "--max-new-tokens", "2", "--limit", "4"];
        let words = [&["eval"][..], &model, &rest, &["--no-images", "--out", &run]].concat();
        let (status, _, err) = call(dir.path(), &words);
        assert_eq!(status, 0, "{name}: {err}");
    }
}

#[test]
fn a_killed_run_with_all_of_it_goes_on_to_the_same_bytes() {
    let dir = tempfile::tempdir().unwrap();
    let adapter = text(&fine_tuned(&material().loud, &dir.path().join("sft")));
    let more = [
        ("train.recipe", "at_grpo"),
        ("adapter", adapter.as_str()),
        ("train.num_steps", "6"),
        ("train.save_every", "2"),
        ("train.lora_dropout", "0.3"),
        ("train.lora_plus_ratio", "4"),
        ("train.learning_rates.vision", "0.002"),
        ("train.weight_decay", "0.1"),
        ("train.ema_decay", "0.9"),
        ("train.adversary.num_steps", "2"),
        ("train.grpo.kl_coef", "0.1"),
        ("train.grpo.num_updates", "2"),
        ("train.grpo.ref_sync_steps", "3"),
    ];
    let of = |name: &str| {
        let out = dir.path().join(name);
        (settings(&material().loud, &out, &[&SHORT[..], &more].concat()), out)
    };
    let (whole_settings, whole) = of("whole");
    run_as(Train, &whole_settings, 2).unwrap();
    let (killed_settings, killed) = of("killed");
    // Behind the checkpoints of steps 2 and 4: before the reference has moved, and after.
    run_with_kills(Train, &killed_settings, &killed, "metrics.jsonl", &[3, 5]);
    check_same(&whole, &killed);
    for file in ["ema/adapter_model.safetensors", "reference.safetensors", "optimizer.safetensors"] {
        assert!(whole.join("checkpoints/step-6").join(file).exists(), "{file}");
    }
    // Other settings of the same kind are another run.
    let mut words = arguments(Train, &killed_settings);
    words.extend(["--resume", "--set", "train.ema_decay=0.8"].map(str::to_owned));
    let words: Vec<&str> = words.iter().map(String::as_str).collect();
    let (status, _, err) = call(dir.path(), &words);
    assert!(status == 2 && err.contains("ema_decay"), "{status} {err}");
}

#[test]
fn no_tensor_of_an_ordinary_training_is_without_a_gradient() {
    let dir = tempfile::tempdir().unwrap();
    let captions: [(&str, &str); 1] = [("train.captions", "true")];
    for (name, own) in [("all", &[][..]), ("lora", &LORA), ("captions", &captions)] {
        let more = [&SHORT[..], own, &[("train.num_steps", "2")]].concat();
        let kept = Kept::default();
        let own = settings(&material().fresh, &dir.path().join(name), &more);
        run_job(&job_of(Train, &own, &kept).unwrap(), 2).unwrap();
        let notes = kept.notes.into_inner().unwrap();
        assert!(notes.iter().all(|note| !note.contains("trained tensors")), "{name}: {notes:?}");
    }
}

/// Group relative policy optimisation over an adapter: the same few questions in every step.
fn grpo_settings<'a>(adapter: &'a str, more: &[(&'a str, &'a str)]) -> Vec<(&'a str, &'a str)> {
    let base = [
        ("train.recipe", "grpo"),
        ("adapter", adapter),
        ("data.limit", "8"),
        ("train.batch_size", "8"),
        ("train.grpo.group_size", "8"),
        ("train.grpo.temperature", "0.5"),
        ("train.grpo.kl_coef", "0.1"),
    ];
    [&SHORT[..], &base, more].concat()
}

/// Mean over tokens of exp(d) - d - 1 with d = reference - policy, of the completions of step `step` (from 0), each scored
/// alone, by policies loaded from their files.
fn divergence_by_hand(config: &RunConfig, reference: &Path, policy: &Path, step: u64) -> f64 {
    let load = |dir: &Path| {
        let adapter = Adapter::load(dir).unwrap();
        let model = PathBuf::from(config.model.as_deref().unwrap());
        let adaptation = Adaptation::Active(&adapter);
        Assistant::load_adapted(&model, adaptation, Precision::AsStored, &|_| false, &Device::Cpu).unwrap()
    };
    let (reference, policy) = (load(reference), load(policy));
    let dataset = config.data.dataset().load(ImageCheck::Exist).unwrap();
    let images = items::Images::new(&dataset);
    let template: PromptTemplate = config.prompt.parse().unwrap();
    let temperature = config.train.grpo.temperature;
    let decoding = policy.decoding(config.max_new_tokens, SamplingConfig::at(temperature));
    // A step is an epoch, in an order of its own.
    let mut order: Vec<usize> = (0..dataset.samples.len()).collect();
    order.shuffle(&mut rng::stream(config.seed, "order", &[step]));
    let (mut sum, mut count) = (0.0, 0);
    for (place, index) in (0..).zip(order) {
        let sample = &dataset.samples[index];
        let image = images.processed(&policy, &sample.image).unwrap();
        let prompt = [items::prompt_of(&policy, template, sample, &image).unwrap()];
        let pixels = [policy.pixels(&image).unwrap()];
        let seeds = (0..config.train.grpo.group_size as u64)
            .map(|g| rng::stream(config.seed, "rollout", &[step, place, g]).next_u64())
            .collect();
        let features = [&policy, &reference].map(|assistant| policy::encode(assistant, &pixels).unwrap());
        let sampled = policy::sample(&policy, &prompt, Some(&features[0]), &[seeds], &decoding).unwrap();
        for completion in sampled.into_iter().flatten() {
            let scoring = Scoring::new(&policy, &prompt, &[vec![completion.ids]]).unwrap();
            let [own, other] =
                [(&policy, &features[0]), (&reference, &features[1])].map(|(assistant, features)| {
                    scoring.evaluate(assistant, Some(features), temperature).unwrap()
                });
            for (own, other) in own.iter().zip(&other) {
                let d = f64::from(*other) - f64::from(*own);
                sum += d.exp() - d - 1.0;
                count += 1;
            }
        }
    }
    sum / f64::from(count)
}

#[test]
fn the_reference_is_the_adapter_that_training_began_with() {
    let dir = tempfile::tempdir().unwrap();
    let start = fine_tuned(&material().loud, &dir.path().join("sft"));
    let adapter = text(&start);
    let out = dir.path().join("grpo");
    let own = settings(&material().loud, &out, &grpo_settings(&adapter, &[]));
    run_as(Train, &own, 2).unwrap();
    let steps = lines(&out, "metrics.jsonl");
    assert_eq!(steps[0]["kl"], 0.0, "not the base model: {}", steps[0]);
    let overrides: Vec<Override> =
        own.iter().map(|(key, value)| Override::new(key, value, "--set")).collect();
    let config = RunConfig::load(Train, None, &overrides).unwrap();
    for step in [1, 2] {
        let policy = out.join(format!("checkpoints/step-{step}"));
        let (found, wanted) =
            (number(&steps[step], "kl"), divergence_by_hand(&config, &start, &policy, step as u64));
        assert!(wanted > 1e-5, "nothing was learnt: {steps:?}");
        assert!((found - wanted).abs() < 1e-3 * wanted, "step {step}: {found} {wanted}");
    }
    assert!(!out.join("checkpoints/step-3/reference.safetensors").exists(), "it never changes");
}

#[test]
fn a_reference_that_follows_is_mixed_as_said_and_asked_from_then_on() {
    let dir = tempfile::tempdir().unwrap();
    let start = fine_tuned(&material().loud, &dir.path().join("sft"));
    let adapter = text(&start);
    let run = |name: &str, more: &[(&'static str, &'static str)]| {
        let out = dir.path().join(name);
        let own = settings(&material().loud, &out, &grpo_settings(&adapter, more));
        run_as(Train, &own, 2).unwrap();
        (lines(&out, "metrics.jsonl"), out)
    };
    let (steps, out) = run(
        "follows",
        &[("train.num_steps", "4"), ("train.grpo.ref_sync_steps", "2"), ("train.grpo.ref_sync_alpha", "0.7")],
    );
    let mut expected = adapter_of(&start);
    for step in 1..=4 {
        let checkpoint = out.join(format!("checkpoints/step-{step}"));
        let own = adapter_of(&checkpoint);
        if step % 2 == 0 {
            for (name, values) in &mut expected {
                for (value, own) in values.iter_mut().zip(&own[name]) {
                    *value = 0.7 * own + 0.3 * *value;
                }
            }
        }
        let found = tensors_of(&checkpoint.join("reference.safetensors"));
        assert_eq!(found.len(), expected.len());
        for (name, values) in &found {
            for (found, wanted) in values.iter().zip(&expected[&format!("base_model.model.{name}")]) {
                assert!((found - wanted).abs() < 1e-6, "{name} step {step}: {found} {wanted}");
            }
        }
    }
    assert!(number(&steps[1], "kl") > 1e-5, "{steps:?}");
    // All the way at every step, and there is no distance left.
    let (steps, _) =
        run("at once", &[("train.grpo.ref_sync_steps", "1"), ("train.grpo.ref_sync_alpha", "1")]);
    assert!(steps.iter().all(|step| step["kl"] == 0.0), "{steps:?}");
    assert_ne!(steps[0]["grad_norm"], 0.0, "the policy did move");
}

#[test]
fn settings_without_an_effect_are_refused_before_weights_load() {
    let dir = tempfile::tempdir().unwrap();
    let absent = dir.path().join("absent");
    for (more, words) in [
        (&[("train.lora_dropout", "0.1")][..], "no adapter trains"),
        (&[("train.lora_plus_ratio", "16")], "no adapter trains"),
        (&[("train.lora_rank", "4"), ("train.lora_dropout", "1")], "below 1"),
        (&[("train.ema_decay", "1")], "below 1"),
        (&[("train.weight_decay_norms", "true")], "`weight_decay` is 0"),
        (
            &[("train.parts.vision", "false"), ("train.learning_rates.vision", "0.1")],
            "`train.parts.vision` is false",
        ),
        (&[("train.learning_rates.text", "-1")], "at least 0"),
        (
            &[
                ("train.recipe", "denoiser"),
                ("train.noise_sigma", "0.1"),
                ("train.learning_rates.text", "0.1"),
            ],
            "trains no part of the model",
        ),
        (&[("train.recipe", "grpo"), ("train.grpo.ref_sync_steps", "5")], "no reference is kept"),
        (
            &[("train.recipe", "grpo"), ("train.grpo.kl_coef", "0.1"), ("train.grpo.ref_sync_alpha", "0.5")],
            "`ref_sync_steps` is 0",
        ),
    ] {
        let own = settings(&absent, &dir.path().join("out"), more);
        let error = run_as(Train, &own, 1).unwrap_err();
        assert_eq!(error.status(), ExitStatus::Usage, "{more:?}: {error}");
        assert!(error.to_string().contains(words), "{more:?}: {error}");
    }
}
