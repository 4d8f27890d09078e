//! The command line: help, statuses, what goes to which stream.

use crate::support::{run, safemed, texts};
use std::io::Read as _;
use std::process::Stdio;

#[test]
fn help_and_version_are_data_and_a_bare_call_is_a_mistake() {
    let dir = tempfile::tempdir().unwrap();
    for arguments in [&["--help"][..], &["help", "attack"], &["certify", "-h"]] {
        let (status, out, err) = run(dir.path(), arguments);
        assert_eq!((status, err.as_str()), (0, ""), "{arguments:?}");
        assert!(out.contains("Usage: safemed"), "{arguments:?}");
    }
    let (status, out, _) = run(dir.path(), &["--version"]);
    assert_eq!((status, out.trim()), (0, concat!("safemed ", env!("CARGO_PKG_VERSION"))));
    let (status, out, err) = run(dir.path(), &[]);
    assert_eq!((status, out.as_str()), (2, ""));
    assert!(err.contains("demo"));
}

#[test]
fn every_command_of_the_contract_is_there() {
    let dir = tempfile::tempdir().unwrap();
    for command in [
        "demo",
        "train",
        "eval",
        "attack",
        "certify",
        "predict",
        "report",
        "audit",
        "radius",
        "parity",
        "data check",
        "data stats",
        "data split",
        "data phantom",
        "data convert",
        "export",
        "merge",
        "doctor",
        "config schema",
        "config check",
        "config show",
        "config preset",
    ] {
        let arguments: Vec<&str> = command.split(' ').chain(["--help"]).collect();
        assert_eq!(run(dir.path(), &arguments).0, 0, "{command}");
    }
}

#[test]
fn mistakes_in_words_end_with_2_and_say_which() {
    let dir = tempfile::tempdir().unwrap();
    for (arguments, words) in [
        (&["atack"][..], "attack"),
        (&["attack", "--epsilonn", "1"], "--epsilon"),
        (&["attack", "--pgd", "--method", "fgsm"], "cannot be used with"),
        (&["attack", "--norm", "l3"], "--norm l3"),
        (&["attack", "--epsilon", "8"], "8/255"),
        (&["attack", "--epsilon", "-1"], "at least 0"),
        (&["attack", "--set", "attack.epsilon"], "has no `=`"),
        (&["attack", "--set", "atack.epsilon=0.1"], "did you mean `attack.epsilon`?"),
        (&["certify"], "`sigma` is required"),
        (&["certify", "--sigma", "0"], "above 0"),
        (&["eval", "--config", "absent.toml"], "cannot read the configuration"),
        (&["eval", "--device", "gpu"], "unknown device `gpu`"),
        (&["eval", "--shard", "3/3"], "shard 3/3 does not exist"),
        (&["config", "preset", "at_gpro"], "take `at_grpo`"),
    ] {
        let (status, out, err) = run(dir.path(), arguments);
        assert_eq!((status, out.as_str()), (2, ""), "{arguments:?}: {err}");
        assert!(err.contains(words), "{arguments:?}: {err}");
    }
    assert_eq!(std::fs::read_dir(dir.path()).unwrap().count(), 0, "a mistake leaves no file behind");
}

#[test]
fn json_is_the_only_thing_on_standard_output() {
    let dir = tempfile::tempdir().unwrap();
    let (status, out, _) = run(dir.path(), &["doctor", "--json"]);
    let summary: serde_json::Value = serde_json::from_str(&out).unwrap();
    assert_eq!((status, summary["command"].as_str(), out.lines().count()), (0, Some("doctor"), 1));
}

#[test]
fn a_flag_wins_over_its_variable_and_that_over_set_and_file() {
    let dir = tempfile::tempdir().unwrap();
    std::fs::write(dir.path().join("a.toml"), "seed = 1\ndtype = \"bf16\"\n[attack]\nepsilon = 3\n").unwrap();
    let reported = |arguments: &[&str], variable: Option<&str>| {
        let mut command = safemed(dir.path());
        command.args(["attack", "--config", "a.toml"]).args(arguments);
        if let Some(value) = variable {
            command.env("SAFEMED_EPSILON", value);
        }
        texts(&command.output().unwrap()).2
    };
    assert!(reported(&[], None).contains("a.toml:4:1"));
    assert!(reported(&["--set", "attack.epsilon=4"], None).contains("--set attack.epsilon=4"));
    let set = &["--set", "attack.epsilon=4"];
    assert!(reported(set, Some("5")).contains("SAFEMED_EPSILON=5"));
    assert!(reported(&["--set", "attack.epsilon=4", "--epsilon", "6"], Some("5")).contains("--epsilon 6"));
}

#[test]
fn a_closed_standard_error_ends_nothing() {
    let dir = tempfile::tempdir().unwrap();
    // A reader that is gone before the first word.
    let (reader, writer) = std::io::pipe().unwrap();
    drop(reader);
    let status = safemed(dir.path()).args(["eval", "--model", "nowhere"]).stderr(writer).status().unwrap();
    assert_eq!(status.code(), Some(2), "the error's own status");
}

#[test]
fn a_closed_pipe_is_no_error() {
    let dir = tempfile::tempdir().unwrap();
    let mut child = safemed(dir.path())
        .args(["config", "schema"])
        .stdout(Stdio::piped())
        .stderr(Stdio::piped())
        .spawn()
        .unwrap();
    drop(child.stdout.take());
    let mut err = String::new();
    child.stderr.take().unwrap().read_to_string(&mut err).unwrap();
    assert_eq!((child.wait().unwrap().code(), err.as_str()), (Some(0), ""));
}

#[test]
fn every_preset_printed_passes_its_own_check() {
    let dir = tempfile::tempdir().unwrap();
    let (_, list, _) = run(dir.path(), &["config", "preset"]);
    assert!(list.lines().count() >= 8, "{list}");
    for name in list.lines().filter_map(|line| line.split_whitespace().next()) {
        let (_, content, _) = run(dir.path(), &["config", "preset", name]);
        std::fs::write(dir.path().join("x.toml"), content).unwrap();
        let (status, out, err) = run(dir.path(), &["config", "check", "x.toml"]);
        assert_eq!((status, out.as_str()), (0, "x.toml: ok\n"), "{name}: {err}");
    }
}

#[test]
fn the_configuration_shown_is_one_that_loads() {
    let dir = tempfile::tempdir().unwrap();
    let (status, shown, _) = run(dir.path(), &["config", "show", "--set", "attack.epsilon=4/255"]);
    assert_eq!(status, 0);
    assert!(shown.contains("epsilon = 0.01568627450980392"), "{shown}");
    std::fs::write(dir.path().join("x.toml"), &shown).unwrap();
    assert_eq!(run(dir.path(), &["config", "show", "--config", "x.toml"]).1, shown);
}

#[test]
fn a_report_of_no_run_ends_with_3() {
    let dir = tempfile::tempdir().unwrap();
    let (status, out, err) = run(dir.path(), &["report", "runs/absent"]);
    assert_eq!((status, out.as_str()), (3, ""));
    assert!(err.contains("no such run directory"), "{err}");
}
