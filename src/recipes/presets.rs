//! Ready configuration files, built in: what lies under `configs/`.

use super::job::Outcome;
use crate::error::{Error, Result};
use serde_json::json;
use std::fmt::Write as _;

/// Name and content of every file under `configs/`.
const PRESETS: &[(&str, &str)] = &[
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
    ("minimed_at_grpo_kl", include_str!("../../configs/minimed_at_grpo_kl.toml")),
    ("qwen2_vl_2b_sft", include_str!("../../configs/qwen2_vl_2b_sft.toml")),
    ("qwen2_vl_2b_grpo", include_str!("../../configs/qwen2_vl_2b_grpo.toml")),
    ("qwen2_vl_2b_at_grpo", include_str!("../../configs/qwen2_vl_2b_at_grpo.toml")),
    ("qwen2_vl_2b_medvlm_r1", include_str!("../../configs/qwen2_vl_2b_medvlm_r1.toml")),
    ("qwen2_5_vl_3b_sft", include_str!("../../configs/qwen2_5_vl_3b_sft.toml")),
    ("qwen2_5_vl_3b_grpo", include_str!("../../configs/qwen2_5_vl_3b_grpo.toml")),
    ("qwen2_5_vl_3b_grpo_no_think", include_str!("../../configs/qwen2_5_vl_3b_grpo_no_think.toml")),
    ("qwen2_5_vl_3b_at_grpo", include_str!("../../configs/qwen2_5_vl_3b_at_grpo.toml")),
    ("qwen3_vl_4b_sft", include_str!("../../configs/qwen3_vl_4b_sft.toml")),
    ("qwen3_vl_4b_grpo", include_str!("../../configs/qwen3_vl_4b_grpo.toml")),
    ("qwen3_vl_4b_at_grpo", include_str!("../../configs/qwen3_vl_4b_at_grpo.toml")),
];

/// The names, each with the first line of its file.
pub fn list() -> Outcome {
    let mut text = String::new();
    let mut names = Vec::new();
    let width = PRESETS.iter().map(|(name, _)| name.len()).max().unwrap_or_default();
    for (name, content) in PRESETS {
        let what = content.lines().next().unwrap_or_default().trim_start_matches(['#', ' ']);
        let _ = writeln!(text, "{name:<width$} {what}");
        names.push(json!({"name": name, "what": what}));
    }
    Outcome::new(json!({"command": "config preset", "presets": names}), text)
}

/// The content of one.
pub fn preset(name: &str) -> Result<Outcome> {
    if let Some((name, content)) = PRESETS.iter().find(|(known, _)| *known == name) {
        return Ok(Outcome::new(json!({"name": name, "content": content}), *content));
    }
    let names = || PRESETS.iter().map(|(name, _)| *name);
    let near = super::config::keys::near_misses(name, names());
    let help = super::config::keys::choices(if near.is_empty() { names().collect() } else { near });
    Err(Error::usage(format!("there is no preset `{name}`\n   = help: take {help}")))
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::recipes::config::{Command, Dtype, RecipeName, RunConfig, TargetName};
    use std::path::Path;

    fn load(content: &str) -> RunConfig {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("preset.toml");
        std::fs::write(&path, content).unwrap();
        RunConfig::load_any(Some(&path), &[]).unwrap()
    }

    #[test]
    fn every_preset_is_a_valid_configuration_and_says_what_it_is_for() {
        for (name, content) in PRESETS {
            let dir = tempfile::tempdir().unwrap();
            let path = dir.path().join("preset.toml");
            std::fs::write(&path, content).unwrap();
            let config =
                RunConfig::load_any(Some(&path), &[]).unwrap_or_else(|error| panic!("{name}: {error}"));
            assert!(content.starts_with("# "), "{name}");
            let commands =
                [("[train", Command::Train), ("[attack", Command::Attack), ("[certify", Command::Certify)];
            for (section, command) in commands {
                if content.contains(&format!("\n{section}")) {
                    assert_eq!(config.without_effect(command), Vec::<String>::new(), "{name}");
                }
            }
        }
    }

    #[test]
    fn every_configuration_file_is_a_preset() {
        let folder = Path::new(env!("CARGO_MANIFEST_DIR")).join("configs");
        let files = std::fs::read_dir(folder).unwrap();
        let mut files: Vec<String> = files
            .map(|file| file.unwrap().file_name().to_string_lossy().trim_end_matches(".toml").to_owned())
            .collect();
        let mut names: Vec<&str> = PRESETS.iter().map(|(name, _)| *name).collect();
        files.sort();
        names.sort_unstable();
        assert_eq!(files, names);
    }

    #[test]
    fn each_real_checkpoint_has_its_recipes_as_med_r1_has_them() {
        let find = |name: &str| PRESETS.iter().find(|(known, _)| *known == name).unwrap().1;
        for (prefix, model) in [
            ("qwen2_vl_2b", "Qwen/Qwen2-VL-2B-Instruct"),
            ("qwen2_5_vl_3b", "Qwen/Qwen2.5-VL-3B-Instruct"),
            ("qwen3_vl_4b", "Qwen/Qwen3-VL-4B-Instruct"),
        ] {
            for recipe in [RecipeName::Sft, RecipeName::Grpo, RecipeName::AtGrpo] {
                let name = format!("{prefix}_{recipe}");
                let content = find(&name);
                // The command in its head names it.
                assert!(content.contains(&format!("--config configs/{name}.toml")), "{name}");
                let config = load(content);
                let train = &config.train;
                assert_eq!((config.model.as_deref(), train.recipe), (Some(model), recipe), "{name}");
                assert!(config.dtype == Dtype::Bf16 && train.recompute && train.lora_rank > 0, "{name}");
                assert_eq!(config.max_pixels, Some(401_408), "{name}");
                assert!(!train.parts.vision && !train.parts.merger, "{name}");
                assert_eq!(config.without_effect(Command::Train), Vec::<String>::new(), "{name}");
                if recipe == RecipeName::Sft {
                    assert_eq!((train.target, train.batch_size), (TargetName::Instruct, 64), "{name}");
                    continue;
                }
                let grpo = &train.grpo;
                assert_eq!((grpo.group_size, grpo.kl_coef, grpo.num_updates), (4, 0.04, 1), "{name}");
                assert_eq!((config.max_new_tokens, train.batch_size), (256, 4), "{name}");
                assert_eq!(
                    (config.prompt.as_str(), train.target),
                    ("med_r1_train", TargetName::Cot),
                    "{name}"
                );
            }
        }
        // The published command answers without thinking; all else is the same.
        let [think, no_think] =
            ["qwen2_5_vl_3b_grpo", "qwen2_5_vl_3b_grpo_no_think"].map(|name| load(find(name)));
        assert_eq!(no_think.prompt, "med_r1_train_no_think");
        let mut same = no_think.clone();
        (same.prompt, same.train.target) = (think.prompt.clone(), TargetName::Cot);
        assert_eq!((no_think.train.target, same), (TargetName::Instruct, think));
        let config = load(find("qwen2_vl_2b_medvlm_r1"));
        assert_eq!(config.max_pixels, Some(401_408));
        assert!(config.train.grpo.graded && config.prompt == "medvlm_r1");
        assert_eq!(
            (config.max_new_tokens, config.train.grpo.group_size, config.data.limit),
            (512, 4, Some(600))
        );
    }

    #[test]
    fn a_misspelt_preset_is_told_the_near_miss() {
        let error = preset("at_gpro").unwrap_err().to_string();
        assert!(error.contains("take `at_grpo`") && !error.contains("certify"), "{error}");
    }
}
