//! Training, attacking and certifying a tiny model: what is learnt and logged, what is refused, and that no kill,
//! thread or batch changes a byte.

use crate::support::{run as call, safemed};
use crate::tiny::{Kind, Weights, assistant_of, phantoms, tiny_assistant, tiny_checkpoint};
use candle_core::Device;
use rand::RngCore as _;
use safemed::backend::with_threads;
use safemed::error::{Error, ExitStatus, Result};
use safemed::model::assistant::Assistant;
use safemed::model::chat::{Message, RenderOptions};
use safemed::recipes::config::Command::{self, Attack, Certify, Train};
use safemed::recipes::config::{Override, RunConfig};
use safemed::recipes::job::{Job, Outcome};
use safemed::recipes::progress::{Progress, Silent};
use safemed::recipes::run::Stop;
use safemed::recipes::{attack, certify, train};
use safemed::rng;
use serde_json::{Value, json};
use sha2::{Digest as _, Sha256};
use std::collections::BTreeMap;
use std::fs;
use std::path::{Path, PathBuf};
use std::process::Stdio;
use std::sync::OnceLock;
use std::time::Duration;

/// Checkpoints and questions, made once for all tests.
pub(crate) struct Material {
    _dir: tempfile::TempDir,
    /// As drawn for training.
    pub(crate) fresh: PathBuf,
    /// Answers with letters.
    pub(crate) loud: PathBuf,
    pub(crate) data: PathBuf,
}

pub(crate) fn material() -> &'static Material {
    static MADE: OnceLock<Material> = OnceLock::new();
    MADE.get_or_init(|| {
        let dir = tempfile::tempdir().unwrap();
        let path = |name: &str| dir.path().join(name);
        let (fresh, loud, data) = (path("fresh"), path("loud"), path("data"));
        assistant_of(Kind::Qwen3, Weights::Fresh, false).save(&fresh).unwrap();
        tiny_checkpoint(&loud);
        phantoms(&data);
        Material { _dir: dir, fresh, loud, data }
    })
}

/// Settings by key, as text, over those that all runs here share.
pub(crate) fn settings(model: &Path, out: &Path, more: &[(&str, &str)]) -> Vec<(String, String)> {
    let path = |path: &Path| path.display().to_string();
    let mut all: BTreeMap<String, String> = BTreeMap::new();
    for (key, value) in [
        ("model", path(model)),
        ("out", path(out)),
        ("data.omnimedvqa", path(&material().data)),
        ("data.split", "splits/train.json".to_owned()),
        ("prompt", "phantom".to_owned()),
        ("max_new_tokens", "2".to_owned()),
        ("images", "false".to_owned()),
        ("train.target", "instruct".to_owned()),
    ] {
        all.insert(key.to_owned(), value);
    }
    all.extend(more.iter().map(|(key, value)| ((*key).to_owned(), (*value).to_owned())));
    all.into_iter().collect()
}

pub(crate) fn run_as(command: Command, settings: &[(String, String)], threads: usize) -> Result<Outcome> {
    run_job(&job_of(command, settings, &Silent)?, threads)
}

/// What [`run_as`] runs: from the start, with nobody to stop it.
pub(crate) fn job_of<'a>(
    command: Command,
    settings: &[(String, String)],
    progress: &'a dyn Progress,
) -> Result<Job<'a>> {
    let overrides: Vec<Override> =
        settings.iter().map(|(key, value)| Override::new(key, value, "--set")).collect();
    let config = RunConfig::load(command, None, &overrides)?;
    Ok(Job { command, config, resume: false, command_line: Vec::new(), stop: Stop::default(), progress })
}

pub(crate) fn run_job(job: &Job<'_>, threads: usize) -> Result<Outcome> {
    with_threads(Some(threads), || match job.command {
        Train => train::train(job),
        Attack => attack::attack(job),
        _ => certify::certify(job),
    })
}

/// The same as arguments of the program.
pub(crate) fn arguments(command: Command, settings: &[(String, String)]) -> Vec<String> {
    let mut arguments = vec![command.word().to_owned()];
    for (key, value) in settings {
        arguments.extend(["--set".to_owned(), format!("{key}={value}")]);
    }
    arguments
}

pub(crate) fn lines(dir: &Path, name: &str) -> Vec<Value> {
    let text = fs::read_to_string(dir.join(name)).unwrap();
    text.lines().map(|line| serde_json::from_str(line).unwrap()).collect()
}

/// Every file that must not depend on kills, threads or batches, with its bytes; the summary without its seconds.
fn results(dir: &Path) -> BTreeMap<String, Vec<u8>> {
    let mut found = BTreeMap::new();
    let mut folders = vec![dir.to_path_buf()];
    while let Some(folder) = folders.pop() {
        for entry in fs::read_dir(&folder).unwrap() {
            let path = entry.unwrap().path();
            let name = path.strip_prefix(dir).unwrap().display().to_string();
            if path.is_dir() {
                folders.push(path);
            } else if path.extension().is_some_and(|end| end == "jsonl") && !name.ends_with("timings.jsonl")
                || ["checkpoints/", "adversarial/", "images/", "tensorboard/"]
                    .iter()
                    .any(|folder| name.starts_with(folder))
            {
                found.insert(name, fs::read(path).unwrap());
            } else if name == "summary.json" {
                let mut summary: Value = serde_json::from_slice(&fs::read(path).unwrap()).unwrap();
                summary.as_object_mut().unwrap().remove("seconds").unwrap();
                found.insert(name, summary.to_string().into_bytes());
            }
        }
    }
    found
}

pub(crate) fn check_same(a: &Path, b: &Path) {
    let (a_files, b_files) = (results(a), results(b));
    let names = |files: &BTreeMap<String, Vec<u8>>| files.keys().cloned().collect::<Vec<_>>();
    assert_eq!(names(&a_files), names(&b_files));
    for (name, bytes) in &a_files {
        assert!(*bytes == b_files[name], "{name} differs: {} {}", a.display(), b.display());
    }
}

/// Runs the program; once `file` of its run has so many lines it is killed without warning, then run again with
/// `--resume`, and so on through `kills`; the last run goes to its end. Fails when no kill came in time.
pub(crate) fn run_with_kills(
    command: Command,
    settings: &[(String, String)],
    out: &Path,
    file: &str,
    kills: &[usize],
) {
    let mut arguments = arguments(command, settings);
    arguments.push("--resume".to_owned());
    let count = |path: &Path| fs::read_to_string(path).map_or(0, |text| text.lines().count());
    let mut killed = 0;
    for &wanted in kills {
        let mut child = safemed(out.parent().unwrap())
            .args(&arguments)
            .args(["--threads", "1"])
            .stdout(Stdio::null())
            .stderr(Stdio::null())
            .spawn()
            .unwrap();
        while child.try_wait().unwrap().is_none() {
            if count(&out.join(file)) >= wanted {
                child.kill().unwrap();
                break;
            }
            std::thread::sleep(Duration::from_millis(1));
        }
        killed += usize::from(child.wait().unwrap().code().is_none());
    }
    assert!(killed > 0, "every run ended before it could be killed");
    let arguments: Vec<&str> = arguments.iter().map(String::as_str).collect();
    let (status, _, err) = call(out.parent().unwrap(), &arguments);
    assert_eq!(status, 0, "{err}");
}

#[test]
fn a_tiny_model_learns_eight_phantoms_by_heart() {
    let dir = tempfile::tempdir().unwrap();
    let out = dir.path().join("run");
    let more = [
        ("train.recipe", "sft"),
        ("data.limit", "8"),
        ("train.batch_size", "8"),
        ("train.num_steps", "50"),
        ("train.learning_rate", "0.01"),
        ("train.save_every", "0"),
    ];
    run_as(Train, &settings(&material().fresh, &out, &more), 2).unwrap();
    let losses: Vec<f64> =
        lines(&out, "metrics.jsonl").iter().map(|line| line["loss"].as_f64().unwrap()).collect();
    assert_eq!(losses.len(), 50);
    assert!(losses[0] > 3.0, "{losses:?}");
    assert!(losses[49] < 0.1, "{losses:?}");
    let step = &lines(&out, "metrics.jsonl")[4];
    for key in ["step", "loss", "learning_rate", "grad_norm", "num_tokens"] {
        assert!(step[key].is_number(), "{key}: {step}");
    }
    // The checkpoint is a model of its own.
    let trained = out.join("checkpoints/step-50");
    let more = [("attack.epsilon", "0"), ("attack.num_steps", "1"), ("data.limit", "8")];
    let outcome = run_as(Attack, &settings(&trained, &dir.path().join("attack"), &more), 2).unwrap();
    assert_eq!(outcome.summary["clean_accuracy"], 1.0);
    assert_ne!(outcome.summary["verdict"], "PASS", "a budget of nothing proves nothing");
}

#[test]
fn a_target_ends_as_the_chat_template_ends_a_turn() {
    let mut assistants = vec![tiny_assistant()];
    let named = std::env::var_os("SAFEMED_SHARED").map(PathBuf::from);
    if let Some(named) = &named {
        assert!(named.is_dir(), "SAFEMED_SHARED names {}, which is no directory", named.display());
    }
    let shared = named.unwrap_or_else(|| Path::new(env!("CARGO_MANIFEST_DIR")).join("../shared"));
    let checkpoints = shared.join("reference/fixtures/checkpoints");
    for name in ["qwen2_vl", "qwen2_5_vl", "qwen3_vl"].iter().filter(|_| checkpoints.is_dir()) {
        assistants.push(Assistant::load(&checkpoints.join(name), &|_| false, &Device::Cpu).unwrap());
    }
    for assistant in assistants {
        let text = "<think> dark B</think><answer> B</answer>";
        let ids = |messages: &[Message], add_generation_prompt: bool| {
            let options = RenderOptions { add_generation_prompt, add_vision_id: false };
            assistant.tokenizer.encode(&assistant.chat.render(messages, options).unwrap()).unwrap()
        };
        let question = Message::text("user", "Which?");
        let target = assistant.target(text).unwrap();
        let mut learnt = ids(std::slice::from_ref(&question), true);
        learnt.extend(&target);
        // The whole conversation as the template writes it: prompt, target, and a line break that nobody says.
        let whole = ids(&[question, Message::text("assistant", text)], false);
        assert_eq!(whole[..learnt.len()], learnt);
        assert_eq!(whole[learnt.len()..], assistant.tokenizer.encode("\n").unwrap());
        assert!(assistant.tokenizer.stop_ids().contains(target.last().unwrap()));
    }
}

/// Eight of the drawn questions as conversations in lines, the last `bare` of them without a reasoning.
fn conversations(file: &Path, bare: usize) {
    let questions = safemed::data::load(&material().data).unwrap().samples;
    let lines = questions[..8].iter().enumerate().map(|(n, sample)| {
        let options = sample.options.iter().zip("ABCD".chars());
        let options: Vec<String> = options.map(|(text, letter)| format!("\n{letter}. {text}")).collect();
        let letter = sample.answer_letter();
        let answer = format!("<answer> {letter}</answer>");
        let said = if n < 8 - bare { format!("<think>{}</think>{answer}", sample.reasoning_text()) } else { answer };
        let record = json!({"id": sample.id, "image": sample.image, "modality": sample.modality_raw, "conversations": [
            {"from": "human", "value": format!("<image>\n{}{}", sample.question, options.concat())}, {"from": "gpt", "value": said},
        ]});
        format!("{record}\n")
    });
    fs::write(file, lines.collect::<String>()).unwrap();
}

#[test]
fn conversations_train_as_the_same_questions_do_and_missing_reasonings_are_told() {
    let dir = tempfile::tempdir().unwrap();
    let path = |name: &str| dir.path().join(name);
    let more = [
        ("prompt", "phantom_cot"),
        ("train.target", "cot"),
        ("train.batch_size", "4"),
        ("train.num_steps", "3"),
        ("train.learning_rate", "0.01"),
    ];
    let ids: Vec<String> =
        safemed::data::load(&material().data).unwrap().samples[..8].iter().map(|s| s.id.clone()).collect();
    fs::write(path("eight.json"), json!(ids).to_string()).unwrap();
    let split = path("eight.json").display().to_string();
    let train = |name: &str, data: Option<&Path>, own: &[(&str, &str)]| {
        let data = data.map(|data| data.display().to_string());
        let source: Vec<(&str, &str)> = data.iter().map(|data| ("data.data", data.as_str())).collect();
        let more = [&more[..], &[("data.split", split.as_str())], &source, own].concat();
        let settings = settings(&material().fresh, &path(name), &more);
        let arguments = arguments(Train, &settings);
        call(dir.path(), &arguments.iter().map(String::as_str).collect::<Vec<_>>())
    };
    conversations(&path("all.jsonl"), 0);
    conversations(&path("some.jsonl"), 3);
    let told = "3 of 8 questions have no reasoning of their own";
    let provenance = |name: &str| {
        let run: Value = serde_json::from_slice(&fs::read(path(name).join("run.json")).unwrap()).unwrap();
        run["made_up_reasonings"].clone()
    };
    for (name, data) in [("own", None), ("all", Some(path("all.jsonl")))] {
        let (status, _, err) = train(name, data.as_deref(), &[]);
        assert!(status == 0 && !err.contains("no reasoning of their own"), "{err}");
        assert_eq!(provenance(name), Value::Null);
    }
    check_same(&path("own"), &path("all"));
    let (status, _, err) = train("some", Some(&path("some.jsonl")), &[]);
    assert_eq!((status, err.matches(told).count(), provenance("some")), (0, 1, json!(3)), "{err}");
    assert!(err.contains("is learnt, such as `scan "), "{err}");
    // Where nothing is made up, nothing is said.
    let own = [("train.target", "instruct"), ("prompt", "phantom")];
    let (status, _, err) = train("instruct", Some(&path("some.jsonl")), &own);
    assert!(status == 0 && !err.contains("no reasoning of their own"), "{err}");
    assert_eq!(provenance("instruct"), Value::Null);
    // A prompt that does not ask for what is learnt is told, not refused.
    let (status, _, err) = train("word", None, &[("prompt", "phantom")]);
    assert!(status == 0 && err.contains("prompt `phantom` does not ask for the reasoning that"), "{err}");
}

#[test]
fn training_on_a_shard_is_refused_before_anything_is_read() {
    let dir = tempfile::tempdir().unwrap();
    let (status, out, err) = call(
        dir.path(),
        &["train", "--model", "nowhere", "--omnimedvqa", "nowhere", "--out", "run", "--shard", "0/2"],
    );
    assert_eq!((status, out.as_str()), (2, ""));
    assert!(err.contains("part 0/2 of the questions only: models cannot be merged"), "{err}");
    assert!(err.contains("leave `shard` out") && !dir.path().join("run").exists(), "{err}");
}

/// Few steps of an adversarial recipe on few questions.
pub(crate) const SHORT: [(&str, &str); 9] = [
    ("data.limit", "12"),
    ("train.batch_size", "3"),
    ("train.num_steps", "6"),
    ("train.save_every", "2"),
    ("train.keep_checkpoints", "0"),
    ("train.learning_rate", "0.002"),
    ("train.grpo.group_size", "4"),
    ("train.permute_options", "true"),
    ("train.adversary.num_steps", "2"),
];

/// A denoiser, over [`SHORT`].
const DENOISER: [(&str, &str); 7] = [
    ("train.recipe", "denoiser"),
    ("train.noise_sigma", "0.2"),
    ("train.batch_size", "8"),
    ("train.num_steps", "60"),
    ("train.save_every", "4"),
    ("train.learning_rate", "0.01"),
    ("train.denoiser.width", "16"),
];

#[test]
fn a_denoiser_learns_and_is_part_of_what_is_attacked_and_certified() {
    let dir = tempfile::tempdir().unwrap();
    let out = dir.path().join("denoiser");
    let more = [&SHORT[..], &DENOISER].concat();
    run_as(Train, &settings(&material().loud, &out, &more), 2).unwrap();
    let steps = lines(&out, "metrics.jsonl");
    let last = |key: &str| steps.last().unwrap()[key].as_f64().unwrap();
    assert!(last("psnr") > last("psnr_noisy") + 1.0, "{:?}", steps.last());
    let trained = out.join("checkpoints/step-60").display().to_string();

    // The same files with the noise of one run, through the denoiser and without it.
    let of = |command, name: &str, denoiser: &[(&str, &str)]| {
        let out = dir.path().join(name);
        let more = [&measuring(command)[..], denoiser].concat();
        let summary = run_as(command, &settings(&material().loud, &out, &more), 2).unwrap().summary;
        let run: Value = serde_json::from_slice(&fs::read(out.join("run.json")).unwrap()).unwrap();
        (summary, lines(&out, "records.jsonl"), run)
    };
    let before: [(&str, &str); 1] = [("denoiser", &trained)];
    let (_, plain, plain_run) = of(Certify, "plain", &[]);
    let (_, denoised, run) = of(Certify, "denoised", &before);
    let counts = |records: &[Value]| records.iter().map(|r| r["counts"].clone()).collect::<Vec<_>>();
    assert_ne!(counts(&plain), counts(&denoised));
    assert_ne!(plain[0]["model_sha256"], denoised[0]["model_sha256"], "the function is another one");
    assert!(run["denoiser_sha256"].is_string() && plain_run["denoiser_sha256"].is_null());
    let (summary, records, _) = of(Attack, "attack", &[before[0], ("scoring", "likelihood")]);
    let gradient =
        summary["verdict_checks"].as_array().unwrap().iter().find(|c| c["name"] == "gradient check");
    assert_eq!(gradient.unwrap_or(&Value::Null)["status"], "PASS", "{summary:#}");
    assert!(records.iter().any(|record| record["loss_adversarial"].as_f64() > record["loss_clean"].as_f64()));

    // What makes no sense.
    let refused = |command, more: &[(&str, &str)], what: &str| {
        let more = [&measuring(command)[..], more].concat();
        let error =
            run_as(command, &settings(&material().loud, &dir.path().join("no"), &more), 2).unwrap_err();
        assert!(error.to_string().contains(what), "{error}");
        error.status()
    };
    assert_eq!(refused(Train, &[("train.recipe", "denoiser")], "noise_sigma"), ExitStatus::Usage);
    let both = [&DENOISER[..], &before].concat();
    assert_eq!(refused(Train, &both, "has no effect"), ExitStatus::Usage);
    let model = material().loud.display().to_string();
    assert_eq!(refused(Certify, &[("denoiser", &model)], "this is no denoiser"), ExitStatus::Data);
}

/// Whether `docs/training.md` says what a metric is, by its name or as `/` with the last part of it.
fn is_explained(key: &str) -> bool {
    const GLOSSARY: &str = include_str!("../docs/training.md");
    let parts: Vec<&str> = key.split('/').collect();
    let name = match parts.as_slice() {
        ["rewards", "accuracy_clean" | "accuracy_adversarial", _] => key.to_owned(),
        ["rewards", _, last] => format!("rewards/NAME/{last}"),
        ["completions", last] if last.ends_with("_terminated_length") => "…_terminated_length".to_owned(),
        _ => key.to_owned(),
    };
    let short = format!("`/{}`", parts.last().unwrap());
    GLOSSARY.contains(&format!("`{name}`")) || parts.len() > 1 && GLOSSARY.contains(&short)
}

#[test]
fn every_recipe_logs_its_numbers() {
    let dir = tempfile::tempdir().unwrap();
    let sft = ["loss", "learning_rate", "grad_norm", "num_tokens"];
    let adversary = ["epsilon", "loss_clean", "loss_adversarial", "pgd_gain"];
    let grpo = [
        "loss",
        "learning_rate",
        "grad_norm",
        "reward",
        "reward_std",
        "rewards/accuracy/mean",
        "rewards/accuracy/std",
        "rewards/format/mean",
        "rewards/format/std",
        "frac_reward_zero_std",
        "groups_updated",
        "kl",
        "entropy",
        "sampling/sampling_logp_difference/mean",
        "sampling/sampling_logp_difference/max",
        "clip_ratio/low_mean",
        "clip_ratio/low_min",
        "clip_ratio/high_mean",
        "clip_ratio/high_max",
        "clip_ratio/region_mean",
        "completions/mean_length",
        "completions/min_length",
        "completions/max_length",
        "completions/mean_terminated_length",
        "completions/min_terminated_length",
        "completions/max_terminated_length",
        "completions/clipped_ratio",
        "num_tokens",
        "epoch",
    ];
    for (recipe, keys) in [
        ("at_sft", [&sft[..], &adversary].concat()),
        ("grpo", grpo.to_vec()),
        ("at_grpo", [&grpo[..], &adversary].concat()),
    ] {
        let out = dir.path().join(recipe);
        let own = [
            ("train.recipe", recipe),
            ("train.num_steps", "2"),
            ("train.grpo.kl_coef", "0.04"),
            ("train.grpo.num_updates", "2"),
        ];
        let more = [&SHORT[..], &own].concat();
        run_as(Train, &settings(&material().loud, &out, &more), 2).unwrap();
        let steps = lines(&out, "metrics.jsonl");
        let updates: Vec<(u64, Option<u64>)> =
            steps.iter().map(|line| (line["step"].as_u64().unwrap(), line["update"].as_u64())).collect();
        let wanted: &[(u64, Option<u64>)] = if recipe.ends_with("grpo") {
            &[(1, Some(1)), (1, Some(2)), (2, Some(1)), (2, Some(2))]
        } else {
            &[(1, None), (2, None)]
        };
        assert_eq!(updates, wanted, "{recipe}");
        for (step, key) in steps.iter().flat_map(|step| keys.iter().map(move |key| (step, key))) {
            assert!(step[*key].is_number(), "{recipe} {key}: {step}");
        }
        for key in steps.iter().flat_map(|step| step.as_object().unwrap().keys()) {
            assert!(is_explained(key), "docs/training.md does not say what `{key}` is");
        }
        // Time stands in `timings.jsonl` and nowhere else.
        let is_time = |key: &str| key.contains("time") || key.contains("second");
        assert!(steps.iter().all(|step| !step.as_object().unwrap().keys().any(|key| is_time(key))));
        if recipe.starts_with("at_") {
            assert!(steps.iter().all(|step| step["pgd_gain"].as_f64() > Some(0.0)), "{steps:?}");
        }
        if recipe.ends_with("grpo") {
            assert!(steps.iter().any(|step| step["groups_updated"].as_f64() > Some(0.0)), "{steps:?}");
            // What samples and what scores are one policy at one temperature, but for the image placeholders, which are never
            // drawn: to an untrained model they are as likely as other tokens.
            let gaps =
                steps.iter().map(|step| step["sampling/sampling_logp_difference/max"].as_f64().unwrap());
            assert!(gaps.clone().all(|gap| gap > 0.0 && gap < 0.03), "{:?}", gaps.collect::<Vec<_>>());
            assert_eq!(lines(&out, "completions.jsonl").len(), 2 * 4);
        }
        assert!(out.join("report.md").exists() && out.join("checkpoints/step-2/config.json").exists());
    }
}

#[test]
fn progress_says_how_many_tokens_a_second_the_last_step_took_in() {
    let dir = tempfile::tempdir().unwrap();
    let out = dir.path().join("run");
    let settings = settings(&material().loud, &out, &[&SHORT[..], &[("train.num_steps", "2")]].concat());
    let words = arguments(Train, &settings);
    let words: Vec<&str> = words.iter().map(String::as_str).collect();
    let (status, _, err) = call(dir.path(), &words);
    assert_eq!(status, 0, "{err}");
    // Without a terminal the end of a phase has a line whatever the time.
    let line = err.lines().find(|line| line.starts_with("sft: 2/2, ")).unwrap_or_else(|| panic!("{err}"));
    let said = line.split(", ").find_map(|part| part.strip_suffix(" tokens/s"));
    let said: f64 = said.unwrap_or_else(|| panic!("{line}")).parse().unwrap();
    let tokens: Vec<f64> =
        lines(&out, "metrics.jsonl").iter().map(|step| step["num_tokens"].as_f64().unwrap()).collect();
    let timings = lines(&out, "timings.jsonl");
    let last = timings.iter().rfind(|timing| timing["what"] == "step").unwrap();
    let speed = (tokens[1] - tokens[0]) / last["seconds"].as_f64().unwrap();
    // Told in whole tokens.
    assert!((said - speed).abs() < 0.5 + 1e-6 * speed, "{line}: {speed}");
    assert!(line.contains("update ") && line.ends_with(" %"), "the shares of the step's phases: {line}");
}

#[test]
fn killed_training_goes_on_to_the_same_bytes() {
    let dir = tempfile::tempdir().unwrap();
    let at_grpo = [
        ("train.recipe", "at_grpo"),
        ("train.grpo.num_updates", "2"),
        ("train.grpo.log_questions", "2"),
        ("train.log_text_every", "1"),
        ("train.log_images_every", "1"),
    ];
    for own in [&at_grpo[..], &DENOISER] {
        let [whole, killed] = ["whole", "killed"].map(|name| dir.path().join(format!("{name}-{}", own[0].1)));
        let more = [&SHORT[..], own].concat();
        run_as(Train, &settings(&material().loud, &whole, &more), 2).unwrap();
        let settings = settings(&material().loud, &killed, &more);
        // Behind the checkpoint of step 2: step 3 is done again.
        run_with_kills(
            Train,
            &settings,
            &killed,
            "metrics.jsonl",
            if own == at_grpo { &[2, 6] } else { &[1, 3] },
        );
        assert!(results(&whole).keys().any(|name| name.contains("step-4/optimizer.safetensors")));
        check_same(&whole, &killed);
        // What a checkpoint says of itself, and the log up to it, must fit.
        let words = arguments(Train, &settings);
        let words: Vec<&str> = words.iter().map(String::as_str).chain(["--resume"]).collect();
        let refused = |file: &Path, change: &dyn Fn(&str) -> String, what: &str| {
            let text = fs::read_to_string(file).unwrap();
            fs::write(file, change(&text)).unwrap();
            let (status, _, err) = call(dir.path(), &words);
            assert!(status == 3 && err.contains(what), "{status} {err}");
            fs::write(file, text).unwrap();
        };
        let last = own.iter().find(|(key, _)| *key == "train.num_steps").map_or("6", |(_, steps)| *steps);
        let state = killed.join(format!("checkpoints/step-{last}/state.json"));
        let text = fs::read_to_string(&state).unwrap();
        let other = format!("\"step\": 1{}", &last[1..]);
        fs::write(&state, text.replace(&format!("\"step\": {last}"), &other)).unwrap();
        let (status, _, err) = call(dir.path(), &words);
        assert!(status == 0 && err.contains("is damaged") && err.contains("/state.json"), "{status} {err}");
        check_same(&whole, &killed);
        refused(&killed.join("metrics.jsonl"), &|text| text.lines().skip(1).collect(), "are logged");
    }
}

#[test]
fn each_update_of_a_step_has_a_line_of_its_own() {
    let dir = tempfile::tempdir().unwrap();
    let lines_of = |name: &str, own: &[(&str, &str)]| {
        let out = dir.path().join(name);
        let base = [
            ("train.recipe", "grpo"),
            ("train.num_steps", "1"),
            ("train.grpo.kl_coef", "0.5"),
            ("train.grpo.temperature", "1"),
            // Completions of one and of two tokens are worth different things.
            ("train.grpo.overlong_weight", "1"),
            ("train.grpo.overlong_cache", "1"),
        ];
        run_as(Train, &settings(&material().loud, &out, &[&SHORT[..], &base, own].concat()), 2).unwrap();
        lines(&out, "metrics.jsonl")
    };
    let (one, three) = (lines_of("one", &[]), lines_of("three", &[("train.grpo.num_updates", "3")]));
    assert_eq!((one.len(), three.len()), (1, 3));
    // The first update is the only one of the other run; what was sampled is the same for all.
    let mut first = three[0].clone();
    assert_eq!(first.as_object_mut().unwrap().shift_remove("update"), Some(1.into()));
    assert_eq!(first, one[0]);
    assert!(three[0].to_string().starts_with("{\"step\":1,\"update\":1,"), "{}", three[0]);
    for later in &three[1..] {
        assert_eq!(later["reward"], three[0]["reward"]);
        assert_eq!(later["step"], 1);
        for own in ["loss", "grad_norm", "kl"] {
            assert!(later[own].is_f64() && later[own] != three[0][own], "{own}: {later}");
        }
    }
    assert_eq!(three[0]["kl"], 0.0, "the policy is its own reference before it moves");
    // Where no group teaches anything the updates are made by gradients of zero, and the lines say so.
    let own = [("train.grpo.num_updates", "2"), ("train.grpo.kl_coef", "0"), ("train.learning_rate", "0")];
    let weights =
        [("train.grpo.overlong_weight", "0"), ("train.grpo.format_weight", "0"), ("max_new_tokens", "1")];
    let flat = lines_of("flat", &[&own[..], &weights, &[("train.grpo.temperature", "0.01")]].concat());
    assert_eq!(flat.len(), 2, "{flat:?}");
    for (line, update) in flat.iter().zip(1u64..) {
        assert_eq!((&line["update"], &line["groups_updated"]), (&update.into(), &0.0.into()), "{line}");
        assert_eq!((&line["grad_norm"], &line["clip_ratio/region_mean"]), (&0.0.into(), &0.0.into()));
    }
}

#[test]
fn completions_and_pictures_say_where_they_come_from() {
    let dir = tempfile::tempdir().unwrap();
    // Every image of the data: what it is as a file, and as the network takes it.
    let mut known: BTreeMap<String, (String, Vec<f32>)> = BTreeMap::new();
    for entry in fs::read_dir(material().data.join("Images/Phantom")).unwrap() {
        let image = safemed::pixels::decode::decode_file(&entry.unwrap().path()).unwrap();
        let pixels = image
            .to_tensor(&candle_core::Device::Cpu)
            .unwrap()
            .flatten_all()
            .unwrap()
            .to_vec1::<f32>()
            .unwrap();
        let bytes: Vec<u8> = pixels.iter().flat_map(|value| value.to_le_bytes()).collect();
        known.insert(image.sha256(), (format!("{:x}", Sha256::digest(bytes)), pixels));
    }
    for recipe in ["grpo", "at_grpo"] {
        let out = dir.path().join(recipe);
        let own = [
            ("train.recipe", recipe),
            ("train.num_steps", "2"),
            ("train.grpo.log_questions", "3"),
            ("train.log_images_every", "2"),
            ("train.adversary.clean_fraction", "0.33333"),
            ("train.adversary.epsilon_start_fraction", "1"),
        ];
        run_as(Train, &settings(&material().loud, &out, &[&SHORT[..], &own].concat()), 2).unwrap();
        let completions = lines(&out, "completions.jsonl");
        assert_eq!(completions.len(), 2 * 3 * 4);
        for (index, line) in completions.iter().enumerate() {
            let (step, group, g) = (1 + index / 12, index / 4 % 3, index % 4);
            assert_eq!((&line["step"], &line["group"]), (&step.into(), &group.into()), "{line}");
            let place = [step as u64 - 1, group as u64, g as u64];
            assert_eq!(line["seed"].as_u64().unwrap(), rng::stream(0, "rollout", &place).next_u64());
            let is_attacked = recipe == "at_grpo" && group < 2;
            assert_eq!(line["attacked"], is_attacked);
            let clean = &known[line["image_sha256"].as_str().unwrap()].0;
            assert_eq!(line["pixels_sha256"] == clean.as_str(), !is_attacked, "{line}");
            // Two tokens are allowed.
            let length = line["length"].as_u64().unwrap();
            assert!((1..=2).contains(&length) && (line["is_finished"] == true || length == 2), "{line}");
            assert!(line["prompt"].as_str().unwrap().ends_with("\nanswer"), "{line}");
        }
        let picture = |step: u64, name: &str| out.join(format!("images/step-{step}/{name}"));
        assert!(!picture(1, "clean.png").exists());
        assert_eq!(picture(2, "clean.png").exists(), recipe == "at_grpo");
        if recipe == "at_grpo" {
            let read = |name: &str| safemed::pixels::decode::decode_file(&picture(2, name)).unwrap();
            let (clean, adversarial, difference) =
                (read("clean.png"), read("adversarial.png"), read("difference.png"));
            let of_second = |line: &&Value| line["step"] == 2 && line["group"] == 0;
            let first = completions.iter().find(of_second).unwrap();
            assert_eq!(first["image_sha256"], clean.sha256(), "images of this data are not resized");
            let changes = clean.data.iter().zip(&adversarial.data).map(|(a, b)| a.abs_diff(*b));
            assert_eq!(changes.max(), Some(8), "the whole budget of 8/255 is spent somewhere");
            let about: Value = serde_json::from_slice(&fs::read(picture(2, "about.json")).unwrap()).unwrap();
            assert_eq!(
                (&about["id"], &about["step"], &about["difference_factor"]),
                (&first["id"], &2.into(), &15.into())
            );
            let amplified = clean
                .data
                .iter()
                .zip(&adversarial.data)
                .map(|(a, b)| 128 + 15 * (i32::from(*b) - i32::from(*a)));
            assert!(amplified.zip(&difference.data).all(|(wanted, found)| wanted == i32::from(*found)));
            let events = fs::read(out.join("tensorboard/events.out.tfevents.0000000000.safemed")).unwrap();
            let png = fs::read(picture(2, "adversarial.png")).unwrap();
            assert!(events.windows(png.len()).any(|window| window == png), "the events hold the picture");
        }
    }
}

#[test]
fn threads_change_no_byte_of_training() {
    let dir = tempfile::tempdir().unwrap();
    for recipe in ["sft", "at_grpo", "denoiser"] {
        let outs = [1, 2].map(|threads| {
            let out = dir.path().join(format!("{recipe}-{threads}"));
            let own = [("train.recipe", recipe), ("train.noise_sigma", "0.1"), ("train.num_steps", "3")];
            let more = [&SHORT[..], &own].concat();
            run_as(Train, &settings(&material().loud, &out, &more), threads).unwrap();
            out
        });
        check_same(&outs[0], &outs[1]);
    }
}

#[test]
fn remembering_images_changes_no_byte_of_training_on_a_frozen_tower() {
    let dir = tempfile::tempdir().unwrap();
    for recipe in ["sft", "grpo", "at_grpo"] {
        let outs = ["0", "1"].map(|mib| {
            let out = dir.path().join(format!("{recipe}-{mib}"));
            let own = [
                ("train.recipe", recipe),
                ("train.parts.vision", "false"),
                ("train.parts.merger", "false"),
                ("train.grpo.kl_coef", "0.1"),
                ("feature_cache_mib", mib),
            ];
            let more = [&SHORT[..], &own].concat();
            run_as(Train, &settings(&material().loud, &out, &more), 2).unwrap();
            out
        });
        check_same(&outs[0], &outs[1]);
    }
}

#[test]
fn passes_of_few_questions_add_up_to_the_whole_batch() {
    let dir = tempfile::tempdir().unwrap();
    for recipe in ["sft", "at_sft", "trades"] {
        let numbers = ["7", "3", "1"].map(|micro| {
            let out = dir.path().join(format!("{recipe}-{micro}"));
            // Reasonings of different lengths: passes differ in their number of tokens.
            let own = [
                ("train.recipe", recipe),
                ("train.target", "cot"),
                ("prompt", "phantom_cot"),
                ("train.batch_size", "7"),
                ("train.num_steps", "1"),
                ("train.micro_batch_size", micro),
            ];
            let more = [&SHORT[..], &own].concat();
            run_as(Train, &settings(&material().loud, &out, &more), 2).unwrap();
            let step = &lines(&out, "metrics.jsonl")[0];
            ["loss", "grad_norm", "num_tokens"].map(|key| step[key].as_f64().unwrap())
        });
        for other in &numbers[1..] {
            for (whole, parts) in numbers[0].iter().zip(other) {
                assert!((whole / parts - 1.0).abs() < 1e-5, "{recipe}: {numbers:?}");
            }
        }
    }
}

#[test]
fn passes_of_few_groups_add_up_to_the_whole_step_of_every_policy_loss() {
    let dir = tempfile::tempdir().unwrap();
    let losses = [
        ("grpo", "token"),
        ("bnpo", "token"),
        ("dr_grpo", "token"),
        ("dapo", "token"),
        ("cispo", "token"),
        ("sapo", "token"),
        ("luspo", "sequence"),
        ("grpo", "sequence"),
    ];
    for (loss_type, level) in losses {
        let numbers = ["8", "3", "1"].map(|micro| {
            let out = dir.path().join(format!("{loss_type}-{level}-{micro}"));
            let own = [
                ("train.recipe", "grpo"),
                ("train.batch_size", "8"),
                ("train.num_steps", "1"),
                ("train.micro_batch_size", micro),
                ("train.grpo.loss_type", loss_type),
                ("train.grpo.importance_level", level),
                ("train.grpo.clip_high", "1.5"),
                ("train.grpo.num_updates", "2"),
                ("train.grpo.kl_coef", "0.1"),
                ("train.grpo.kl_bias_correction", "true"),
                // Of an untrained model's words few are answers, unless the likely ones are preferred.
                ("train.grpo.temperature", "0.2"),
            ];
            let more = [&SHORT[..], &own].concat();
            run_as(Train, &settings(&material().loud, &out, &more), 2).unwrap();
            let step = &lines(&out, "metrics.jsonl")[0];
            ["loss", "grad_norm", "kl", "num_tokens", "entropy", "groups_updated"]
                .map(|key| step[key].as_f64().unwrap())
        });
        assert!(numbers[0][1] > 0.0 && numbers[0][5] == 8.0, "{loss_type}: {numbers:?}");
        for other in &numbers[1..] {
            for (whole, parts) in numbers[0].iter().zip(other) {
                assert!(
                    (whole - parts).abs() < 2e-5 * (1e-3 + whole.abs()),
                    "{loss_type} {level}: {numbers:?}"
                );
            }
        }
    }
}

#[test]
fn completions_that_never_end_can_be_left_out_and_flat_groups_sampled_anew() {
    let dir = tempfile::tempdir().unwrap();
    let step = |name: &str, own: &[(&str, &str)]| {
        let out = dir.path().join(name);
        let base = [
            ("train.recipe", "grpo"),
            ("train.num_steps", "1"),
            ("train.batch_size", "8"),
            ("train.grpo.temperature", "0.2"),
        ];
        run_as(Train, &settings(&material().loud, &out, &[&SHORT[..], &base, own].concat()), 2).unwrap();
        lines(&out, "metrics.jsonl").remove(0)
    };
    let number = |step: &serde_json::Value, key: &str| step[key].as_f64().unwrap();
    // Few end within two tokens, and what they learn from is theirs alone.
    let loss = ("train.grpo.loss_type", "dapo");
    let (all, ended) = (step("all", &[loss]), step("ended", &[loss, ("train.grpo.mask_truncated", "true")]));
    assert_eq!(all["completions/clipped_ratio"], ended["completions/clipped_ratio"]);
    assert!(number(&all, "completions/clipped_ratio") > 0.0 && number(&all, "grad_norm") > 0.0, "{all}");
    assert_ne!(all["grad_norm"], ended["grad_norm"]);
    let (once, again) = (step("once", &[]), step("again", &[("train.grpo.max_resamples", "3")]));
    assert!(once["groups_resampled"].is_null());
    let (before, after) = (number(&once, "frac_reward_zero_std"), number(&again, "frac_reward_zero_std"));
    let replaced = number(&again, "groups_resampled");
    assert!(before > 0.0 && replaced > 0.0, "{before} {replaced}");
    assert!((before - after - replaced / 8.0).abs() < 1e-12, "{before} {after} {replaced}");
}

#[test]
fn noise_in_training_is_fresh_at_each_step_and_the_same_on_any_number_of_threads() {
    let dir = tempfile::tempdir().unwrap();
    for recipe in ["sft", "at_sft", "at_grpo"] {
        let losses = |name: &str, sigma: &str, threads| -> Vec<f64> {
            let out = dir.path().join(format!("{recipe}-{name}"));
            let own = [("train.recipe", recipe), ("train.noise_sigma", sigma), ("train.num_steps", "3")];
            let more = [&SHORT[..], &own].concat();
            run_as(Train, &settings(&material().loud, &out, &more), threads).unwrap();
            lines(&out, "metrics.jsonl").iter().map(|line| line["grad_norm"].as_f64().unwrap()).collect()
        };
        let (noisy, again, still) =
            (losses("noisy", "0.1", 1), losses("again", "0.1", 2), losses("still", "0", 1));
        assert_eq!(noisy, again, "{recipe}");
        assert!(noisy.iter().zip(&still).any(|(a, b)| a != b), "{recipe}: {noisy:?} {still:?}");
    }
}

#[test]
fn numbers_that_are_not_finite_end_training_with_step_and_questions() {
    let dir = tempfile::tempdir().unwrap();
    for recipe in ["sft", "at_grpo"] {
        let own = [("train.recipe", recipe), ("train.learning_rate", "1e30")];
        let more = [&SHORT[..], &own].concat();
        let result = run_as(Train, &settings(&material().loud, &dir.path().join(recipe), &more), 2);
        let error = result.unwrap_err();
        assert_eq!(error.status(), ExitStatus::NonFinite, "{recipe}: {error}");
        let text = error.to_string();
        assert!(text.contains("step 2, questions `Phantom_"), "{recipe}: {text}");
    }
}

/// Settings under which an attack or a certificate of a few items takes a moment.
fn measuring(command: Command) -> Vec<(&'static str, &'static str)> {
    let mut more = vec![("data.limit", "14"), ("data.split", "splits/test.json")];
    more.extend(match command {
        Attack => [("attack.objective", "all"), ("attack.num_steps", "4"), ("attack.verdict_items", "14")],
        _ => [("certify.sigma", "0.1"), ("certify.n", "60"), ("max_new_tokens", "1")],
    });
    more
}

#[test]
fn batches_threads_and_kills_change_no_byte_of_attacks_and_certificates() {
    for command in [Attack, Certify] {
        let dir = tempfile::tempdir().unwrap();
        let of = |name: &str, batch_size: &str| {
            let out = dir.path().join(name);
            let more = [&measuring(command)[..], &[("batch_size", batch_size)]].concat();
            (settings(&material().loud, &out, &more), out)
        };
        let (settings, first) = of("first", "1");
        let outcome = run_as(command, &settings, 1).unwrap();
        for (name, batch_size, threads) in [("batched", "4", 1), ("threads", "1", 2), ("both", "4", 2)] {
            let (settings, out) = of(name, batch_size);
            run_as(command, &settings, threads).unwrap();
            check_same(&first, &out);
        }
        let (settings, killed) = of("killed", "1");
        run_with_kills(command, &settings, &killed, "records.jsonl", &[1, 4]);
        check_same(&first, &killed);
        if command == Certify {
            // A finished record is computed again before the run goes on.
            let (path, words) = (killed.join("records.jsonl"), arguments(command, &settings));
            let text = fs::read_to_string(&path).unwrap();
            let words: Vec<&str> = words.iter().map(String::as_str).chain(["--resume"]).collect();
            for (from, to) in [("\"radius\":0.0", "\"radius\":0.5"), ("\"seed\":0", "\"seed\":1")] {
                assert!(text.contains(from), "{text}");
                fs::write(&path, text.replacen(from, to, 1)).unwrap();
                fs::remove_file(killed.join("summary.json")).unwrap_or_default();
                let (status, _, err) = call(dir.path(), &words);
                assert!(status == 3 && err.contains("record `"), "{status} {err}");
            }
        }

        let (records, summary) = (lines(&first, "records.jsonl"), &outcome.summary);
        let right =
            |record: &&Value| record[if command == Attack { "robust_correct" } else { "correct" }] == true;
        let share =
            |records: &[&Value]| records.iter().copied().filter(right).count() as f64 / records.len() as f64;
        assert_eq!(summary["n"], 14);
        assert_eq!(summary["accuracy"], share(&records.iter().collect::<Vec<_>>()));
        for key in ["modality", "question_type"] {
            let groups = summary[format!("by_{key}")].as_object().unwrap();
            assert!(!groups.is_empty());
            for (name, accuracy) in groups {
                let own: Vec<&Value> = records.iter().filter(|record| record[key] == **name).collect();
                assert_eq!(*accuracy, share(&own), "{name}");
                assert_eq!(summary[format!("{key}_details")][name]["n"], own.len());
            }
        }
        if command == Attack {
            check_attacks(&first, &records, summary);
        } else {
            let audited = dir.path().join("first").display().to_string();
            let (status, out, err) = call(dir.path(), &["audit", &audited, "--json"]);
            let report: Value = serde_json::from_str(&out).unwrap();
            assert_eq!((status, &report["rows"], &report["exact"]), (0, &14.into(), &14.into()), "{err}");
            let file = first.join("records.jsonl");
            let text = fs::read_to_string(&file).unwrap();
            fs::write(&file, text.replacen("\"alpha\":0.001", "\"alpha\":0.002", 1)).unwrap();
            assert_eq!(call(dir.path(), &["audit", &audited]).0, 5);
        }
    }
}

#[test]
fn kills_inside_an_item_and_batches_change_no_byte_of_a_sequential_certificate() {
    let dir = tempfile::tempdir().unwrap();
    let of = |name: &str, batch_size: &str, more: &[(&'static str, &'static str)]| {
        let out = dir.path().join(name);
        let all = [
            &[
                ("certify.sigma", "0.1"),
                ("certify.mode", "sequential"),
                ("certify.n", "700"),
                ("certify.n0", "30"),
                ("max_new_tokens", "2"),
                ("data.limit", "3"),
                ("batch_size", batch_size),
            ][..],
            more,
        ]
        .concat();
        (settings(&material().loud, &out, &all), out)
    };
    // Drawn tokens, two rules, with and without a target: the record says which.
    for (name, more, decoding) in [
        ("anytime", &[("generation.temperature", "1.5"), ("certify.min_gain", "0")][..], "1.5"),
        ("target", &[("certify.target_radius", "0.1")], "greedy"),
        ("stages", &[("certify.target_radius", "0.1"), ("certify.rule", "clopper_pearson")], "greedy"),
    ] {
        let (first_settings, first) = of(name, "1", more);
        let summary = run_as(Certify, &first_settings, 1).unwrap().summary;
        let (batched_settings, batched) = of(&format!("{name}-batched"), "16", more);
        run_as(Certify, &batched_settings, 2).unwrap();
        check_same(&first, &batched);
        if name == "anytime" {
            let (killed_settings, killed) = of("killed", "1", more);
            run_with_kills(Certify, &killed_settings, &killed, "draws.jsonl", &[5, 40, 90]);
            check_same(&first, &killed);
            assert!(!killed.join("draws.jsonl").exists());
            // What was drawn belongs to the run: its settings are written down, and others cannot continue it.
            assert!(fs::read_to_string(killed.join("config.toml")).unwrap().contains("temperature = 1.5"));
            let mut arguments = arguments(Certify, &killed_settings);
            arguments.extend(["--resume", "--temperature", "1"].map(str::to_owned));
            let arguments: Vec<&str> = arguments.iter().map(String::as_str).collect();
            let (status, _, err) = call(dir.path(), &arguments);
            assert!(status == 2 && err.contains("generation.temperature"), "{status} {err}");
        }
        let records = lines(&first, "records.jsonl");
        let used: u64 = records.iter().map(|record| 30 + record["n"].as_u64().unwrap()).sum();
        assert_eq!(summary["draws"], used);
        assert_eq!(summary["fixed_draws"], 3 * 730);
        let stopped: u64 =
            summary["stopped"].as_object().unwrap().values().map(|v| v.as_u64().unwrap()).sum();
        assert_eq!(stopped, 3);
        assert!(
            records.iter().all(|record| record["decoding"].to_string().contains(decoding)),
            "{records:?}"
        );
        let (status, out, err) = call(dir.path(), &["audit", &first.display().to_string(), "--json"]);
        assert!(status == 0 && out.contains("\"exact\":3"), "{out} {err}");
    }
}

#[test]
fn noise_meets_pixels_that_no_mean_or_deviation_of_the_processor_has_touched() {
    let dir = tempfile::tempdir().unwrap();
    let other = dir.path().join("other");
    copy(&material().loud, &other);
    for (name, pointer) in [("preprocessor_config.json", ""), ("processor_config.json", "/image_processor")] {
        let file = other.join(name);
        let Ok(text) = fs::read_to_string(&file) else { continue };
        let mut processor: Value = serde_json::from_str(&text).unwrap();
        let settings = processor.pointer_mut(pointer).unwrap();
        settings["image_mean"] = serde_json::json!([0.1, 0.2, 0.3]);
        settings["image_std"] = serde_json::json!([0.9, 0.8, 0.7]);
        fs::write(&file, processor.to_string()).unwrap();
    }
    let device = candle_core::Device::Cpu;
    let image = fs::read_dir(material().data.join("Images/Phantom")).unwrap().next().unwrap().unwrap().path();
    let image = safemed::pixels::decode::decode_file(&image).unwrap();
    let seen = [&material().loud, &other].map(|model| {
        let assistant = safemed::model::assistant::Assistant::load(model, &|_| false, &device).unwrap();
        // What `certify` adds noise to, and what the network makes of it.
        let pixels = assistant.process(&image).unwrap().resized.to_tensor(&device).unwrap();
        let features = safemed::roles::policy::encode(&assistant, &[pixels.unsqueeze(0).unwrap()]).unwrap();
        let values = pixels.flatten_all().unwrap().to_vec1::<f32>().unwrap();
        assert!(values.iter().all(|value| (0.0..=1.0).contains(value)));
        (values, features.merged.flatten_all().unwrap().to_vec1::<f32>().unwrap())
    });
    assert_eq!(seen[0].0, seen[1].0);
    assert_ne!(seen[0].1, seen[1].1);
}

/// What each record says about its attacked image, against the image itself.
fn check_attacks(dir: &Path, records: &[Value], summary: &Value) {
    let attacked: Vec<&Value> =
        records.iter().filter(|record| record["adversarial_image"].is_string()).collect();
    assert!(!attacked.is_empty(), "the tiny model got nothing right");
    for record in attacked {
        let read = |path: PathBuf| safemed::pixels::decode::decode_file(&path).unwrap();
        let adversarial = read(dir.join(record["adversarial_image"].as_str().unwrap()));
        let clean = read(material().data.join(record["image"].as_str().unwrap()));
        let largest = adversarial.data.iter().zip(&clean.data).map(|(a, b)| a.abs_diff(*b)).max().unwrap();
        assert_eq!(record["linf"].as_f64().unwrap(), f64::from(largest) / 255.0);
        assert!(largest > 0 && largest <= 8, "{largest}");
    }
    assert!(summary["robust_accuracy"].as_f64() <= summary["clean_accuracy"].as_f64());
    let checks = summary["verdict_checks"].as_array().unwrap();
    for name in ["budget kept by files", "processor equality", "gradient is there", "gradient check"] {
        let check = checks.iter().find(|check| check["name"] == name).unwrap();
        assert_eq!(check["status"], "PASS", "{check}");
    }
}

/// Copies a directory of files and folders.
pub(crate) fn copy(from: &Path, to: &Path) {
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

#[test]
fn what_cannot_be_done_is_refused_before_anything_is_written() {
    let dir = tempfile::tempdir().unwrap();
    let out = dir.path().join("out");
    for (command, more, words) in [
        (Attack, &[("attack.epsilon", "3")][..], "out of range"),
        (Attack, &[("attack.epsilon", "-1")], "out of range"),
        (Attack, &[("attack.num_steps", "0")], "at least 1"),
        (Attack, &[("attack.step_size", "0")], "goes nowhere"),
        (Attack, &[("attack.method", "auto"), ("attack.objective", "margin")], "no effect"),
        (Attack, &[("attack.smoothing_sigma", "0.1")], "cross_entropy"),
        (Certify, &[("certify.sigma", "0.25"), ("certify.n", "9")], "at least 10 draws"),
        (Certify, &[("certify.sigma", "0")], "out of range"),
        (
            Certify,
            &[("certify.sigma", "0.25"), ("certify.mode", "sequential"), ("certify.n", "9")],
            "can never answer",
        ),
        (
            Certify,
            &[("certify.sigma", "0.25"), ("certify.mode", "sequential"), ("certify.target_radius", "1")],
            "the largest that a unanimous vote reaches",
        ),
        (Certify, &[("certify.sigma", "0.25"), ("certify.alpha", "1")], "out of range"),
        (Train, &[("train.recipe", "grpo"), ("train.grpo.loss_type", "cispo")], "caps the ratio itself"),
        (Train, &[("train.recipe", "grpo"), ("train.grpo.loss_type", "luspo")], "ratios of sequences"),
        (Train, &[("train.recipe", "grpo"), ("train.grpo.delta", "1.1")], "must exceed 1 + clip_high"),
        (
            Train,
            &[
                ("train.recipe", "grpo"),
                ("train.grpo.accuracy_weight", "0"),
                ("train.grpo.format_weight", "0"),
            ],
            "worth the same",
        ),
        (Train, &[("train.recipe", "at_sft"), ("train.captions", "true")], "needs images"),
        (
            Train,
            &[
                ("train.parts.vision", "false"),
                ("train.parts.merger", "false"),
                ("train.parts.text", "false"),
            ],
            "no parameter would train",
        ),
    ] {
        let error = run_as(command, &settings(&material().loud, &out, more), 1).unwrap_err();
        assert_eq!(error.status(), ExitStatus::Usage, "{more:?}: {error}");
        assert!(error.to_string().contains(words), "{more:?}: {error}");
        assert!(!out.exists(), "{more:?}");
    }
    for command in [Attack, Certify, Train] {
        let more = [("certify.sigma", "0.25"), ("device", "cuda:99")];
        let error = run_as(command, &settings(&material().loud, &out, &more), 1).unwrap_err();
        assert_eq!(error.status(), ExitStatus::Usage, "{error}");
        assert!(error.to_string().contains("device `cuda"), "{command}: {error}");
        let mut nameless = settings(&material().loud, &out, &[("certify.sigma", "0.25")]);
        nameless.retain(|(key, _)| key != "model");
        let error = run_as(command, &nameless, 1).unwrap_err();
        assert!(matches!(&error, Error::Usage(text) if text.contains("no model is named")), "{error}");
        assert!(!out.exists());
        let foreign = dir.path().join(format!("foreign-{command}"));
        fs::create_dir(&foreign).unwrap();
        fs::write(foreign.join("notes.txt"), "mine").unwrap();
        // Refused before the weights: those are not even there.
        let absent = dir.path().join("absent");
        let error =
            run_as(command, &settings(&absent, &foreign, &[("certify.sigma", "0.25")]), 1).unwrap_err();
        assert!(matches!(&error, Error::Usage(text) if text.contains("not empty")), "{error}");
        assert_eq!(fs::read_dir(&foreign).unwrap().count(), 1);
    }
}

#[test]
fn a_damaged_image_or_weight_is_named() {
    let dir = tempfile::tempdir().unwrap();
    let data = dir.path().join("data");
    copy(&material().data, &data);
    for entry in fs::read_dir(data.join("Images/Phantom")).unwrap() {
        let path = entry.unwrap().path();
        let bytes = fs::read(&path).unwrap();
        fs::write(&path, &bytes[..bytes.len() / 2]).unwrap();
    }
    let data = data.display().to_string();
    for command in [Attack, Certify, Train] {
        let out = dir.path().join(command.word());
        let more = [("data.omnimedvqa", data.as_str()), ("certify.sigma", "0.25"), ("data.limit", "2")];
        let error = run_as(command, &settings(&material().loud, &out, &more), 1).unwrap_err();
        assert_eq!(error.status(), ExitStatus::Data, "{error}");
        let text = error.to_string();
        assert!(text.contains(".png") && text.contains("Phantom_"), "{command}: {text}");
    }
    let weights = safemed::model::weights::Weights::open(&material().loud).unwrap();
    let name = "model.language_model.layers.1.mlp.up_proj.weight";
    let tensors: Vec<(String, candle_core::Tensor)> = weights
        .names()
        .map(|each| {
            let shape = weights.shape(each).unwrap();
            let tensor = weights.get(each, shape).unwrap().into_tensor(shape).unwrap();
            (each.to_owned(), if each == name { (tensor * f64::NAN).unwrap() } else { tensor })
        })
        .collect();
    let broken = dir.path().join("model");
    copy(&material().loud, &broken);
    safemed::model::weights::save(&broken, &tensors).unwrap();
    for command in [Attack, Certify, Train] {
        let out = dir.path().join(format!("broken-{command}"));
        let error = run_as(command, &settings(&broken, &out, &[("certify.sigma", "0.25")]), 1).unwrap_err();
        assert_eq!(error.status(), ExitStatus::NonFinite, "{error}");
        assert!(error.to_string().contains(name), "{error}");
        assert!(!out.exists());
    }
}
