//! What completions are worth in training: penalties, several rewards, and commands that give them.

use crate::training::{arguments, check_same, lines, material, run_as, run_with_kills, settings};
use safemed::error::{Error, ExitStatus};
use safemed::recipes::config::Command::Train;
use serde_json::{Value, json};
use std::fs;
use std::path::Path;

/// Few steps of GRPO on few questions, with completions of one or two tokens.
const SHORT: [(&str, &str); 9] = [
    ("train.recipe", "grpo"),
    ("data.limit", "12"),
    ("train.batch_size", "3"),
    ("train.num_steps", "4"),
    ("train.save_every", "2"),
    ("train.keep_checkpoints", "0"),
    ("train.learning_rate", "0.002"),
    ("train.grpo.group_size", "4"),
    ("train.permute_options", "true"),
];

fn trained(out: &Path, more: &[(&str, &str)]) -> (Vec<Value>, Vec<Value>) {
    let more = [&SHORT[..], more].concat();
    run_as(Train, &settings(&material().loud, out, &more), 2).unwrap();
    (lines(out, "metrics.jsonl"), lines(out, "completions.jsonl"))
}

fn number(line: &Value, key: &str) -> f64 {
    line[key].as_f64().unwrap_or_else(|| panic!("no number `{key}` in {line}"))
}

/// (x - mean) / (standard deviation + 1e-4), as advantages are made.
fn normalized(values: &[f64]) -> Vec<f64> {
    let n = values.len() as f64;
    let mean = values.iter().sum::<f64>() / n;
    let variance = values.iter().map(|value| (value - mean).powi(2)).sum::<f64>() / (n - 1.0);
    values.iter().map(|value| (value - mean) / (variance.sqrt() + 1e-4)).collect()
}

#[test]
fn penalties_are_columns_of_their_own() {
    let dir = tempfile::tempdir().unwrap();
    let own = [
        ("max_new_tokens", "6"),
        ("train.grpo.temperature", "0.05"),
        ("train.grpo.overlong_weight", "0.5"),
        ("train.grpo.overlong_cache", "5"),
        ("train.grpo.repetition_weight", "2"),
        ("train.grpo.repetition_ngram_size", "1"),
        ("train.grpo.repetition_max_penalty", "-0.25"),
        ("train.grpo.format_weight", "0.25"),
    ];
    let (steps, completions) = trained(&dir.path().join("run"), &own);
    for step in &steps {
        // One token is free, each of the five behind it costs a fifth.
        let expected = (1.0 - number(step, "completions/mean_length")) / 5.0;
        assert!((number(step, "rewards/overlong/mean") - expected).abs() < 1e-12, "{step}");
        let sum = number(step, "rewards/accuracy/mean")
            + 0.25 * number(step, "rewards/format/mean")
            + 0.5 * number(step, "rewards/overlong/mean")
            + 2.0 * number(step, "rewards/repetition/mean");
        assert!((number(step, "reward") - sum).abs() < 1e-12, "{step}");
        assert!(step["rewards/overlong/std"].is_number() && step["rewards/overlong/missing"].is_null());
    }
    assert_eq!(completions.len(), 4 * 4);
    for line in &completions {
        let rewards = &line["rewards"];
        // Of n words alike all but one repeat.
        let text = line["completion"].as_str().unwrap().to_lowercase();
        let words: Vec<&str> = text.split_whitespace().collect();
        let distinct = words.iter().collect::<std::collections::BTreeSet<_>>().len();
        let repeated = if words.is_empty() { 0.0 } else { 1.0 - distinct as f64 / words.len() as f64 };
        assert!((number(rewards, "repetition") + 0.25 * repeated).abs() < 1e-12, "{line}");
        let sum = number(line, "accuracy")
            + 0.25 * number(line, "format")
            + 0.5 * number(rewards, "overlong")
            + 2.0 * number(rewards, "repetition");
        assert!((number(line, "reward") - sum).abs() < 1e-12, "{line}");
    }
    assert!(completions.iter().any(|line| number(&line["rewards"], "repetition") < 0.0), "nothing repeats");
    // Without a weight there is no column, and nothing else in the log.
    let (steps, completions) = trained(&dir.path().join("plain"), &[]);
    assert!(steps.iter().all(|step| step["rewards/overlong/mean"].is_null()));
    assert!(completions.iter().all(|line| line["rewards"].is_null()));
}

#[test]
fn rewards_may_be_normalised_one_by_one() {
    let dir = tempfile::tempdir().unwrap();
    // One group a step: the log holds all of it.
    let own = [
        ("train.batch_size", "1"),
        ("train.grpo.group_size", "8"),
        ("train.grpo.temperature", "0.3"),
        ("train.grpo.format_weight", "0.1"),
        ("train.num_steps", "8"),
    ];
    let by_column = [("train.grpo.reward_aggregation", "normalize_then_sum")];
    let (_, completions) = trained(&dir.path().join("run"), &[&own[..], &by_column].concat());
    let mut differing = 0;
    for group in completions.chunks(8) {
        let column = |key: &str| group.iter().map(|line| number(line, key)).collect::<Vec<f64>>();
        let (accuracy, format) = (normalized(&column("accuracy")), normalized(&column("format")));
        let sums: Vec<f64> = accuracy.iter().zip(&format).map(|(a, f)| a + 0.1 * f).collect();
        let (expected, of_sums) = (normalized(&sums), normalized(&column("reward")));
        for ((line, expected), of_sum) in group.iter().zip(&expected).zip(&of_sums) {
            assert!((number(line, "advantage") - expected).abs() < 1e-9, "{line} {expected}");
            differing += usize::from((expected - of_sum).abs() > 1e-3);
        }
    }
    assert!(differing > 0, "both ways came to the same");
}

/// A reward command: remembers what it is told in `log`, likes answers of `A`, and never says whether they are kind.
fn script(dir: &Path, log: &Path) -> String {
    let text = format!(
        "while IFS= read -r line; do\n  printf '%s\\n' \"$line\" >> '{}'\n  case \"$line\" in\n    \
         *'\"completion\":\"<answer> A'*) echo '{{\"rewards\": {{\"likes_a\": 1, \"kind\": null}}}}';;\n    \
         *) echo '{{\"rewards\": {{\"kind\": null, \"likes_a\": 0}}}}';;\n  esac\ndone\n",
        log.display()
    );
    let path = dir.join("reward.sh");
    fs::write(&path, text).unwrap();
    format!("[\"sh\", \"{}\"]", path.display())
}

#[test]
fn a_command_is_told_of_every_completion_and_its_rewards_are_learnt_from() {
    let dir = tempfile::tempdir().unwrap();
    let (out, log) = (dir.path().join("run"), dir.path().join("log"));
    let command = script(dir.path(), &log);
    let own = [
        ("train.grpo.reward_command", command.as_str()),
        ("train.grpo.reward_command_weight", "0.5"),
        ("train.grpo.accuracy_weight", "0"),
        ("train.grpo.format_weight", "0"),
        ("train.grpo.temperature", "0.4"),
    ];
    let (steps, completions) = trained(&out, &own);
    let told = fs::read_to_string(&log).unwrap();
    let told: Vec<Value> = told.lines().map(|line| serde_json::from_str(line).unwrap()).collect();
    // The trial, then all groups of each step at once.
    assert_eq!(told.len(), 1 + 4 * 3 * 4);
    assert_eq!((&told[0]["step"], &told[0]["count"]), (&json!(0), &json!(1)));
    let letter = told[0]["answer"].as_str().unwrap();
    assert_eq!(told[0]["completion"], format!("<answer> {letter}</answer>"));
    for (i, line) in told[1..].iter().enumerate() {
        let expected = [("step", i / 12 + 1), ("index", i % 12), ("count", 12)];
        assert!(expected.iter().all(|(key, value)| line[key] == *value), "{line}");
        let keys: Vec<&str> = line.as_object().unwrap().keys().map(String::as_str).collect();
        for key in ["id", "question", "options", "modality", "question_type", "dataset", "image", "reasoning"]
        {
            assert!(keys.contains(&key), "{key} {line}");
        }
        assert_eq!(line["options"].as_array().unwrap().len(), 4);
        let length = line["num_tokens"].as_u64().unwrap();
        assert!(length == 2 || line["is_finished"] == true, "{line}");
    }
    let likes = |line: &Value| line["completion"].as_str().unwrap().starts_with("<answer> A");
    for (step, told) in steps.iter().zip(told[1..].chunks(12)) {
        let share = told.iter().filter(|line| likes(line)).count() as f64 / 12.0;
        assert!((number(step, "rewards/likes_a/mean") - share).abs() < 1e-12, "{step}");
        assert!((number(step, "reward") - 0.5 * share).abs() < 1e-12, "{step}");
        let missing = (number(step, "rewards/likes_a/missing"), number(step, "rewards/kind/missing"));
        assert_eq!(missing, (0.0, 1.0));
        assert!(step["rewards/kind/mean"].is_null(), "{step}");
    }
    // The written group is the first of its step, in the same order.
    for (g, line) in completions.iter().enumerate() {
        let heard = &told[1 + g / 4 * 12 + g % 4];
        assert_eq!((&line["completion"], &line["id"]), (&heard["completion"], &heard["id"]));
        let reward = f64::from(u8::from(likes(line)));
        assert_eq!(line["rewards"], json!({"likes_a": reward, "kind": null}));
        assert_eq!(number(line, "reward"), 0.5 * reward);
    }
    assert!(steps.iter().any(|step| number(step, "grad_norm") > 0.0), "{steps:?}");
    let run: Value = serde_json::from_slice(&fs::read(out.join("run.json")).unwrap()).unwrap();
    assert_eq!(run["reward_command"], serde_json::from_str::<Value>(&command).unwrap());
    assert_eq!(run["reward_command_names"], json!(["kind", "likes_a"]));
    let file = dir.path().join("reward.sh").display().to_string();
    assert_eq!(run["reward_command_files"][&file].as_str().map(str::len), Some(64), "{run}");
}

#[test]
fn kills_and_passes_of_few_questions_change_nothing_that_a_command_is_part_of() {
    let dir = tempfile::tempdir().unwrap();
    let log = dir.path().join("log");
    let command = script(dir.path(), &log);
    let own = [
        ("train.grpo.reward_command", command.as_str()),
        ("train.grpo.max_resamples", "1"),
        ("train.grpo.overlong_weight", "0.1"),
        ("train.grpo.overlong_cache", "1"),
        ("train.num_steps", "6"),
    ];
    let [whole, killed] = ["whole", "killed"].map(|name| dir.path().join(name));
    trained(&whole, &own);
    let told = fs::read_to_string(&log).unwrap();
    let more = [&SHORT[..], &own].concat();
    let all = settings(&material().loud, &killed, &more);
    run_with_kills(Train, &all, &killed, "metrics.jsonl", &[1, 3]);
    check_same(&whole, &killed);

    // What it is told does not depend on how many questions go through the model at once.
    fs::remove_file(&log).unwrap();
    let by_one = [&own[..], &[("train.micro_batch_size", "1"), ("train.num_steps", "1")]].concat();
    trained(&dir.path().join("by_one"), &by_one);
    let told_by_one = fs::read_to_string(&log).unwrap();
    assert!(told.starts_with(&told_by_one) && told_by_one.lines().count() > 12, "{told_by_one}");

    // Another command or another script is another experiment; how long it may take is none.
    let resumed = |more: &[(&str, &str)]| {
        let words =
            arguments(Train, &settings(&material().loud, &killed, &[&SHORT[..], &own, more].concat()));
        let words: Vec<&str> = words.iter().map(String::as_str).chain(["--resume"]).collect();
        let (status, _, err) = crate::support::run(dir.path(), &words);
        (status, err)
    };
    assert_eq!(resumed(&[("train.grpo.reward_command_timeout", "77")]).0, 0);
    let (status, err) = resumed(&[("train.grpo.reward_command_weight", "2")]);
    assert!(status == 2 && err.contains("`train.grpo.reward_command_weight` was 1"), "{status} {err}");
    let file = dir.path().join("reward.sh");
    let text = fs::read_to_string(&file).unwrap();
    fs::write(&file, text + "# more\n").unwrap();
    let (status, err) = resumed(&[]);
    assert!(status == 2 && err.contains("`reward_command_files` is"), "{status} {err}");
}

#[test]
fn a_command_that_does_not_work_is_found_before_weights_are_read() {
    let dir = tempfile::tempdir().unwrap();
    let out = dir.path().join("out");
    // The weights are not even there.
    let absent = dir.path().join("absent");
    fs::create_dir(&absent).unwrap();
    for (command, status, words) in [
        ("[\"no-such-program\"]", ExitStatus::Usage, "cannot start the reward command"),
        ("[\"sh\", \"-c\", \"echo broken >&2; exit 4\"]", ExitStatus::Usage, "   |  broken\n"),
        ("[\"sh\", \"-c\", \"read -r l; echo NaN; read -r l\"]", ExitStatus::NonFinite, "not finite"),
        ("[\"sh\", \"-c\", \"sleep 60\"]", ExitStatus::Usage, "did not answer within 0.3 s"),
    ] {
        let own = [("train.grpo.reward_command", command), ("train.grpo.reward_command_timeout", "0.3")];
        let more = [&SHORT[..], &own].concat();
        let error = run_as(Train, &settings(&absent, &out, &more), 1).unwrap_err();
        assert_eq!(error.status(), status, "{command}: {error}");
        assert!(error.to_string().contains(words), "{command}: {error}");
        assert!(!out.exists(), "{command}");
    }
}

#[test]
fn a_command_that_breaks_ends_training_with_step_and_question_and_loses_nothing() {
    let dir = tempfile::tempdir().unwrap();
    let out = dir.path().join("out");
    // The trial, two steps of twelve, and a part of the third.
    let text = "i=0; while IFS= read -r l; do i=$((i+1)); if [ $i -gt 30 ]; then echo out of luck >&2; exit 9; fi; echo '{\"reward\": 1}'; done";
    let command = json!(["sh", "-c", text]).to_string();
    let more = [&SHORT[..], &[("train.grpo.reward_command", command.as_str())]].concat();
    let error = run_as(Train, &settings(&material().loud, &out, &more), 2).unwrap_err();
    assert_eq!(error.status(), ExitStatus::Data, "{error}");
    assert!(matches!(error, Error::Data(_)));
    let text = error.to_string();
    for words in [
        "the reward command ended (exit status: 9)",
        "--> step 3, question `Phantom_",
        "line 6 of 12",
        "\n   |  out of luck\n",
        "--> step 3, questions `Phantom_",
        "= help: ",
    ] {
        assert!(text.contains(words), "{words}: {text}");
    }
    assert!(out.join("checkpoints/step-2/state.json").exists());
    assert_eq!(lines(&out, "metrics.jsonl").len(), 2);
}

#[test]
fn a_command_that_rewards_nothing_is_warned_of() {
    let dir = tempfile::tempdir().unwrap();
    let out = dir.path().join("out");
    let text = "while IFS= read -r l; do echo '{\"rewards\": {\"kind\": null}}'; done";
    let command = json!(["sh", "-c", text]).to_string();
    let own = [
        ("train.grpo.reward_command", command.as_str()),
        ("train.grpo.accuracy_weight", "0"),
        ("train.grpo.format_weight", "0"),
        ("train.watch.patience", "3"),
    ];
    let (steps, _) = trained(&out, &own);
    for step in &steps {
        assert!(step["reward"].is_null() && step["reward_std"].is_null(), "{step}");
        assert_eq!((number(step, "rewards/kind/missing"), number(step, "frac_reward_zero_std")), (1.0, 0.0));
    }
    let mut warnings = lines(&out, "warnings.jsonl");
    warnings.retain(|warning| warning["kind"] == "dead_rewards");
    assert_eq!(warnings.len(), 1, "{warnings:?}");
    assert_eq!(warnings[0]["step"], 3, "{warnings:?}");
    assert_eq!(warnings[0]["figures"]["rewards/kind/missing"], 1.0, "{warnings:?}");
    assert!(warnings[0]["message"].as_str().unwrap().contains("rewards/*/missing"), "{warnings:?}");
}

#[test]
fn validation_rewards_what_training_rewards() {
    let dir = tempfile::tempdir().unwrap();
    let out = dir.path().join("out");
    // Of the trial and of training 0.5, of validation 0.25.
    let text = "while IFS= read -r l; do case \"$l\" in *'\"count\":8,'*) echo '{\"reward\": 0.25}';; *) echo '{\"reward\": 0.5}';; esac; done";
    let command = json!(["sh", "-c", text]).to_string();
    let own = [
        ("train.num_steps", "2"),
        ("train.grpo.accuracy_weight", "0"),
        ("train.grpo.format_weight", "0"),
        ("train.grpo.reward_command", command.as_str()),
        ("train.grpo.reward_command_weight", "3"),
        ("train.validation.every", "2"),
        ("train.validation.split", "splits/test.json"),
        ("train.validation.limit", "8"),
        ("train.validation.num_steps", "2"),
        ("train.validation.metric", "robust_reward"),
    ];
    let summary =
        run_as(Train, &settings(&material().loud, &out, &[&SHORT[..], &own].concat()), 2).unwrap().summary;
    let examined = lines(&out, "validation.jsonl");
    assert_eq!(examined.len(), 2);
    for line in &examined {
        assert_eq!(
            (&line["clean"]["reward"], &line["pgd"]["reward"]),
            (&json!(0.75), &json!(0.75)),
            "{line}"
        );
    }
    assert_eq!(lines(&out, "metrics.jsonl")[0]["reward"], 1.5);
    assert_eq!(summary["best"]["value"], 0.75);
}

#[test]
fn rewards_that_make_no_sense_are_refused() {
    let dir = tempfile::tempdir().unwrap();
    let out = dir.path().join("out");
    for (own, words) in [
        (&[("accuracy_weight", "0"), ("format_weight", "0")][..], "worth the same"),
        (
            &[("overlong_weight", "1"), ("overlong_cache", "9")],
            "`overlong_cache` 9 exceeds the longest length, 2",
        ),
        (&[("overlong_weight", "1"), ("overlong_max_length", "40")], "up to 32 tokens there is no penalty"),
        (&[("overlong_weight", "-1")], "out of range"),
        (
            &[("repetition_weight", "1"), ("repetition_max_penalty", "0")],
            "out of range: at least -1000 and below 0",
        ),
        (&[("repetition_ngram_size", "0")], "out of range"),
        (
            &[("reward_aggregation", "normalize_then_sum"), ("scale_rewards", "batch")],
            "`scale_rewards` has no meaning",
        ),
        (&[("reward_aggregation", "gdpo")], "use `sum_then_normalize` or `normalize_then_sum`"),
        (&[("reward_command", "python3 reward.py")], "expected a list of texts"),
        (&[("reward_command", "[]")], "an empty list"),
        (&[("reward_command", "[\"python3\", 1]")], "found the whole number 1 in it"),
        (&[("reward_command", "[\"\"]")], "holds an empty text"),
        (&[("reward_command_timeout", "0")], "out of range"),
    ] {
        let named: Vec<(String, &str)> =
            own.iter().map(|(key, value)| (format!("train.grpo.{key}"), *value)).collect();
        let named: Vec<(&str, &str)> = named.iter().map(|(key, value)| (key.as_str(), *value)).collect();
        let more = [&SHORT[..], &named].concat();
        let error = run_as(Train, &settings(&material().loud, &out, &more), 1).unwrap_err();
        assert_eq!(error.status(), ExitStatus::Usage, "{own:?}: {error}");
        assert!(error.to_string().contains(words), "{own:?}: {error}");
        assert!(!out.exists(), "{own:?}");
    }
    // Weights elsewhere will do.
    let own = [
        ("train.grpo.accuracy_weight", "0"),
        ("train.grpo.format_weight", "0"),
        ("train.grpo.overlong_weight", "1"),
        ("train.grpo.overlong_cache", "1"),
        ("train.num_steps", "1"),
    ];
    trained(&out, &own);
}
