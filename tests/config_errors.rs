//! Mistakes in a configuration file: the exact text a user sees.

use crate::support::{self, run};
use std::fs;

#[test]
fn every_mistake_is_shown_at_once_with_place_line_and_remedy() {
    let dir = tempfile::tempdir().unwrap();
    let content = "seed = -1\n\n[attack]\n  num_stepz = 10\nnorm = \"l3\"\nepsilon = 8\n\n[train.grpo]\ngroup_size = 1\n";
    fs::write(dir.path().join("bad.toml"), content).unwrap();
    let (status, out, err) = run(dir.path(), &["config", "check", "bad.toml"]);
    assert_eq!((status, out.as_str()), (2, ""));
    let expected = "\
error: `seed`: expected a whole number of at least 0, found the whole number -1
  --> bad.toml:1:1  (seed)
   |  seed = -1
error: unknown key `num_stepz`
  --> bad.toml:4:3  (attack.num_stepz)
   |    num_stepz = 10
   = help: did you mean `num_steps`?
error: `norm`: unknown word `l3`
  --> bad.toml:5:1  (attack.norm)
   |  norm = \"l3\"
   = help: use `linf` or `l2`
error: `group_size`: 1 is out of range: at least 2 and at most 65536
  --> bad.toml:9:1  (train.grpo.group_size)
   |  group_size = 1
error: `epsilon` 8 is out of range: at least 0 and at most 1 for norm `linf`
  --> bad.toml:6:1  (attack.epsilon)
   |  epsilon = 8
   = help: pixel values lie in [0, 1]: write 8/255 if 8-bit levels were meant
";
    assert_eq!(err, expected);
}

#[test]
fn broken_toml_is_shown_where_it_breaks() {
    let dir = tempfile::tempdir().unwrap();
    fs::write(dir.path().join("bad.toml"), "seed = 0\nmodel = \"open\ndtype = \"f32\"\n").unwrap();
    let (status, _, err) = run(dir.path(), &["config", "check", "bad.toml"]);
    assert_eq!(status, 2);
    assert!(err.contains("bad.toml:2:"), "{err}");
    assert!(err.contains("|  model = \"open"), "{err}");
}

#[test]
fn a_file_that_is_no_text_or_no_file_is_a_usage_error() {
    let dir = tempfile::tempdir().unwrap();
    fs::write(dir.path().join("bytes.toml"), [0xff, 0xfe, 0x00]).unwrap();
    for (file, words) in [("bytes.toml", "not UTF-8"), ("absent.toml", "cannot read"), (".", "cannot read")] {
        let (status, _, err) = run(dir.path(), &["config", "check", file]);
        assert_eq!(status, 2, "{file}: {err}");
        assert!(err.contains(words), "{file}: {err}");
    }
}

#[test]
fn flags_of_a_dry_run_are_refused_without_one_but_not_what_the_environment_holds() {
    let dir = tempfile::tempdir().unwrap();
    for flag in [["--probe-seconds", "5"], ["--completion-tokens", "5"], ["--memory-gib", "5"]] {
        let (status, _, err) = run(dir.path(), &["train", "--model", "none", flag[0], flag[1]]);
        assert!(status == 2 && err.contains(&format!("{} has no effect", flag[0])), "{status} {err}");
    }
    let output = support::safemed(dir.path())
        .args(["train", "--model", "none"])
        .envs([("SAFEMED_MEMORY_GIB", "5"), ("SAFEMED_PROBE_SECONDS", "5")])
        .output()
        .unwrap();
    let (_, _, err) = support::texts(&output);
    assert!(!err.contains("no effect") && !err.contains("dry-run"), "{err}");
}
