//! From flags and environment to overrides of the configuration, each remembering what set it.

use crate::error::{Error, Result};
use crate::recipes::config::{Command, Override};
use clap::ArgMatches;
use clap::parser::ValueSource;

/// Flags of the top level of the configuration.
const TOP: [&str; 17] = [
    "seed",
    "device",
    "dtype",
    "arithmetic",
    "threads",
    "model",
    "revision",
    "adapter",
    "denoiser",
    "min_pixels",
    "max_pixels",
    "prompt",
    "scoring",
    "max_new_tokens",
    "batch_size",
    "out",
    "no_images",
];

/// Flags of `[data]`.
const DATA: [&str; 10] = [
    "omnimedvqa",
    "data",
    "split",
    "train_split",
    "modality",
    "question_type",
    "limit",
    "shard",
    "deep_gray",
    "window",
];

/// Flags of `[generation]`.
const GENERATION: [&str; 5] = ["temperature", "top_k", "top_p", "min_p", "repetition_penalty"];

/// Flags of `[attack]`.
const ATTACK: [&str; 15] = [
    "pgd",
    "method",
    "norm",
    "epsilon",
    "step_size",
    "num_steps",
    "num_queries",
    "num_restarts",
    "momentum",
    "objective",
    "space",
    "min_epsilon",
    "smoothing_sigma",
    "eot_samples",
    "verdict_items",
];

/// Flags of `[certify]`.
const CERTIFY: [&str; 9] =
    ["sigma", "n0", "n", "alpha", "mode", "target_radius", "rule", "min_gain", "cross_check"];

/// The overrides of one command line: `--set` first, then environment and flags, which win over it.
pub(super) fn overrides(command: Command, matches: &ArgMatches) -> Result<Vec<Override>> {
    let mut found = Vec::new();
    for text in matches.try_get_many::<String>("set").ok().flatten().into_iter().flatten() {
        let (key, value) = text.split_once('=').ok_or_else(|| {
            Error::usage(format!(
                "`--set {text}` has no `=`\n   = help: write `--set path.key=value`, for example `--set attack.epsilon=4/255`"
            ))
        })?;
        found.push(Override::new(key.trim(), value.trim(), "--set"));
    }
    let sections = [
        ("", &TOP[..]),
        ("generation.", &GENERATION),
        ("data.", &DATA),
        ("attack.", &ATTACK),
        ("certify.", &CERTIFY),
    ];
    for (section, ids) in sections {
        for id in ids {
            found.extend(flag(command, section, id, matches));
        }
    }
    Ok(found)
}

fn flag(command: Command, section: &str, id: &str, matches: &ArgMatches) -> Option<Override> {
    // A command that does not have the flag at all is an error here, and no override.
    let raw = matches.try_get_raw(id).ok().flatten()?;
    let source = matches.value_source(id)?;
    if source == ValueSource::DefaultValue {
        return None;
    }
    let text = raw.map(|text| text.to_string_lossy()).collect::<Vec<_>>().join(" ");
    let origin = match source {
        ValueSource::EnvVariable => format!("SAFEMED_{}", id.to_uppercase()),
        _ => format!("--{}", id.replace('_', "-")),
    };
    let is_on = || matches.get_flag(id);
    match id {
        "no_images" => is_on().then(|| Override::new("images", "false", origin)),
        "pgd" => is_on().then(|| Override::new("attack.method", "pgd", origin)),
        "omnimedvqa" if text.is_empty() => {
            let root = std::env::var("SAFEMED_OMNIMEDVQA").ok().filter(|root| !root.is_empty());
            let is_known = root.is_some();
            let root = root.unwrap_or_else(|| "OmniMedVQA".to_owned());
            Some(Override { weak: !is_known, ..Override::new("data.omnimedvqa", root, origin) })
        }
        // In training, the word means the optimiser's batch.
        "batch_size" if command == Command::Train => Some(Override::new("train.batch_size", text, origin)),
        _ => Some(Override::new(format!("{section}{id}"), text, origin)),
    }
}
