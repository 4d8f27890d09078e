//! Ready configuration files, built in: what lies under `configs/`.

use super::job::Outcome;
use crate::error::{Error, Result};
use serde_json::json;
use std::fmt::Write as _;

/// Name and content of every file under `configs/`.
const PRESETS: [(&str, &str); 24] = [
    ("eval", include_str!("../../configs/eval.toml")),
    ("attack", include_str!("../../configs/attack.toml")),
    ("certify", include_str!("../../configs/certify.toml")),
    ("sft_instruct", include_str!("../../configs/sft_instruct.toml")),
    ("sft_cot", include_str!("../../configs/sft_cot.toml")),
    ("at_sft", include_str!("../../configs/at_sft.toml")),
    ("trades", include_str!("../../configs/trades.toml")),
    ("grpo", include_str!("../../configs/grpo.toml")),
    ("at_grpo", include_str!("../../configs/at_grpo.toml")),
    ("denoiser", include_str!("../../configs/denoiser.toml")),
    ("phantom_captions", include_str!("../../configs/phantom_captions.toml")),
    ("phantom_sft_cot", include_str!("../../configs/phantom_sft_cot.toml")),
    ("phantom_instruct_captions", include_str!("../../configs/phantom_instruct_captions.toml")),
    ("phantom_sft_instruct", include_str!("../../configs/phantom_sft_instruct.toml")),
    ("phantom_at_sft", include_str!("../../configs/phantom_at_sft.toml")),
    ("phantom_grpo", include_str!("../../configs/phantom_grpo.toml")),
    ("phantom_at_grpo", include_str!("../../configs/phantom_at_grpo.toml")),
    ("minimed_captions", include_str!("../../configs/minimed_captions.toml")),
    ("minimed_sft_cot", include_str!("../../configs/minimed_sft_cot.toml")),
    ("minimed_instruct_captions", include_str!("../../configs/minimed_instruct_captions.toml")),
    ("minimed_sft_instruct", include_str!("../../configs/minimed_sft_instruct.toml")),
    ("minimed_at_sft", include_str!("../../configs/minimed_at_sft.toml")),
    ("minimed_grpo", include_str!("../../configs/minimed_grpo.toml")),
    ("minimed_at_grpo", include_str!("../../configs/minimed_at_grpo.toml")),
];

/// The names, each with the first line of its file.
pub fn list() -> Outcome {
    let mut text = String::new();
    let mut names = Vec::new();
    for (name, content) in PRESETS {
        let what = content.lines().next().unwrap_or_default().trim_start_matches(['#', ' ']);
        let _ = writeln!(text, "{name:<25} {what}");
        names.push(json!({"name": name, "what": what}));
    }
    Outcome::new(json!({"command": "config preset", "presets": names}), text)
}

/// The content of one.
pub fn preset(name: &str) -> Result<Outcome> {
    if let Some((_, content)) = PRESETS.iter().find(|(known, _)| *known == name) {
        return Ok(Outcome::new(json!({"name": name, "content": content}), *content));
    }
    let names = PRESETS.map(|(name, _)| name);
    let near = super::config::keys::near_misses(name, names);
    let help = super::config::keys::choices(if near.is_empty() { names.to_vec() } else { near });
    Err(Error::usage(format!("there is no preset `{name}`\n   = help: take {help}")))
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::recipes::config::RunConfig;

    #[test]
    fn every_preset_is_a_valid_configuration_and_says_what_it_is_for() {
        for (name, content) in PRESETS {
            let dir = tempfile::tempdir().unwrap();
            let path = dir.path().join("preset.toml");
            std::fs::write(&path, content).unwrap();
            RunConfig::load_any(Some(&path), &[]).unwrap_or_else(|error| panic!("{name}: {error}"));
            assert!(content.starts_with("# "), "{name}");
        }
    }

    #[test]
    fn a_misspelt_preset_is_told_the_near_miss() {
        let error = preset("at_gpro").unwrap_err().to_string();
        assert!(error.contains("take `at_grpo`") && !error.contains("certify"), "{error}");
    }
}
