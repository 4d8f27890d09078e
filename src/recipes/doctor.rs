//! `safemed doctor`: what this build and this machine offer, and what a run would use.

use super::estimate::Options;
use super::estimate::inference::{self, Named};
use super::job::Outcome;
use super::progress::Progress;
use super::run::{Stop, all_threads, provenance};
use crate::backend::{Backend, isa};
use crate::error::Result;
use serde_json::json;
use std::fmt::Write as _;

/// Looks at the machine, and at what works with a model would cost on it.
///
/// # Errors
/// What is missing or wrong in the model's directory.
pub fn doctor_with(
    named: &Named,
    options: &Options,
    stop: &Stop,
    progress: &dyn Progress,
) -> Result<Outcome> {
    let mut machine = doctor();
    let model = inference::estimate(named, options, stop, progress)?;
    machine.summary["estimate"] = model.summary;
    machine.text.push_str(&model.text);
    Ok(machine)
}

/// Looks at the machine; loads nothing and cannot fail.
pub fn doctor() -> Outcome {
    let features: Vec<&str> = [
        ("cuda", cfg!(feature = "cuda")),
        ("metal", cfg!(feature = "metal")),
        ("accelerate", cfg!(feature = "accelerate")),
    ]
    .into_iter()
    .filter_map(|(name, on)| on.then_some(name))
    .collect();
    let devices: Vec<serde_json::Value> = [Backend::Cpu, Backend::Cuda(0), Backend::Metal]
        .into_iter()
        .map(|backend| {
            let problem = backend.device().err().map(|error| first_line(&error.to_string()));
            json!({"device": backend.to_string(), "usable": problem.is_none(), "problem": problem})
        })
        .collect();
    let mut system = sysinfo::System::new();
    system.refresh_memory();
    let summary = json!({
        "command": "doctor",
        "version": provenance::VERSION,
        "git_commit": provenance::GIT_COMMIT,
        "build": if cfg!(debug_assertions) { "debug" } else { "release" },
        "features": features,
        "system": std::env::consts::OS,
        "architecture": std::env::consts::ARCH,
        "instruction_sets": provenance::instruction_sets(),
        "kernels": isa().word(),
        "threads": all_threads(),
        "memory_total_bytes": system.total_memory(),
        "memory_available_bytes": system.available_memory(),
        "devices": devices,
        "device_auto": provenance::device_name(Backend::Auto),
        "crates": provenance::crate_versions(),
        "hub_cache": hub_cache(),
    });
    let text = render(&summary);
    Outcome::new(summary, text)
}

fn first_line(text: &str) -> String {
    text.lines().next().unwrap_or_default().to_owned()
}

/// Where checkpoints named by hub id are kept.
fn hub_cache() -> Option<String> {
    let home = || std::env::var("HOME").ok().map(|home| format!("{home}/.cache/huggingface"));
    std::env::var("HF_HUB_CACHE")
        .ok()
        .or_else(|| Some(format!("{}/hub", std::env::var("HF_HOME").ok().or_else(home)?)))
}

fn render(summary: &serde_json::Value) -> String {
    let word = |name: &str| summary[name].as_str().unwrap_or("unknown").to_owned();
    let words = |name: &str| {
        let list: Vec<&str> =
            summary[name].as_array().into_iter().flatten().filter_map(serde_json::Value::as_str).collect();
        if list.is_empty() { "none".to_owned() } else { list.join(" ") }
    };
    let gib = |name: &str| summary[name].as_u64().unwrap_or(0) as f64 / f64::from(1 << 30);
    let mut text = format!("safemed {} ({}, {})\n", word("version"), word("build"), word("git_commit"));
    let _ = writeln!(text, "system        {} {}", word("system"), word("architecture"));
    let _ = writeln!(text, "instructions  {}; kernels use {}", words("instruction_sets"), word("kernels"));
    let _ = writeln!(text, "threads       {}", summary["threads"]);
    let _ = writeln!(
        text,
        "memory        {:.1} GiB available of {:.1} GiB",
        gib("memory_available_bytes"),
        gib("memory_total_bytes")
    );
    let _ = writeln!(text, "features      {}", words("features"));
    for device in summary["devices"].as_array().into_iter().flatten() {
        let state = device["problem"]
            .as_str()
            .map_or_else(|| "usable".to_owned(), |why| format!("not usable: {why}"));
        let _ = writeln!(text, "device        {}: {state}", device["device"].as_str().unwrap_or_default());
    }
    let _ = writeln!(text, "device auto   {}", word("device_auto"));
    let crates: Vec<String> = summary["crates"]
        .as_object()
        .into_iter()
        .flatten()
        .map(|(name, version)| format!("{name} {}", version.as_str().unwrap_or_default()))
        .collect();
    let _ = writeln!(text, "crates        {}", crates.join(", "));
    let _ = writeln!(text, "hub cache     {}", word("hub_cache"));
    if summary["build"] == "debug" {
        text.push_str("note          a debug build is many times slower: build with `--release`\n");
    }
    text
}

#[cfg(test)]
mod tests {
    #[test]
    fn the_processor_is_always_usable_and_memory_is_seen() {
        let outcome = super::doctor();
        assert_eq!(outcome.summary["devices"][0]["usable"], true);
        assert!(outcome.summary["memory_total_bytes"].as_u64().unwrap() > 1 << 28);
        assert!(outcome.text.contains("device        cpu: usable"));
    }
}
