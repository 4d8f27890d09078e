//! Where a run's numbers come from: version, commit, crates, machine. Nothing here holds a time.

use crate::backend::Backend;
use serde_json::{Map, Value, json};
use std::path::Path;
use std::process::Command;

/// The crates whose versions can change a number.
const CRATES: [&str; 9] = [
    "candle-core",
    "candle-nn",
    "gemm",
    "image",
    "rand",
    "rand_chacha",
    "rand_distr",
    "safetensors",
    "tokenizers",
];

/// Version of this program.
pub const VERSION: &str = env!("CARGO_PKG_VERSION");

/// Versions of the crates that compute, as built.
pub fn crate_versions() -> Map<String, Value> {
    let lock: toml::Table = include_str!("../../../Cargo.lock").parse().unwrap_or_default();
    let packages = lock.get("package").and_then(toml::Value::as_array).map_or(&[][..], Vec::as_slice);
    let mut versions = Map::new();
    for name in CRATES {
        let found: Vec<&str> = packages
            .iter()
            .filter(|package| package.get("name").and_then(toml::Value::as_str) == Some(name))
            .filter_map(|package| package.get("version").and_then(toml::Value::as_str))
            .collect();
        if !found.is_empty() {
            versions.insert(name.to_owned(), json!(found.join(", ")));
        }
    }
    versions
}

/// Commit of the checkout that the program is run in, with `-dirty` when it is changed; "unknown" elsewhere.
pub fn git_commit() -> String {
    let git = |arguments: &[&str]| {
        let output =
            Command::new("git").args(arguments).output().ok().filter(|output| output.status.success())?;
        String::from_utf8(output.stdout).ok().map(|text| text.trim().to_owned())
    };
    // A data directory may lie in a repository of its own, whose commit says nothing about this program.
    let is_ours = |root: &str| {
        std::fs::read_to_string(Path::new(root).join("Cargo.toml"))
            .is_ok_and(|manifest| manifest.contains("name = \"safemed\""))
    };
    let commit = git(&["rev-parse", "--show-toplevel"])
        .filter(|root| is_ours(root))
        .and_then(|_| git(&["rev-parse", "HEAD"]));
    match commit {
        Some(commit)
            if git(&["status", "--porcelain", "--untracked-files=no"]).is_some_and(|t| !t.is_empty()) =>
        {
            format!("{commit}-dirty")
        }
        Some(commit) => commit,
        None => "unknown".to_owned(),
    }
}

/// The device that `backend` stands for on this machine.
pub fn device_name(backend: Backend) -> String {
    backend.resolved().to_string()
}

/// Instruction sets in use that decide the order of floating-point sums.
pub fn instruction_sets() -> Vec<&'static str> {
    let mut found = Vec::new();
    #[cfg(target_arch = "x86_64")]
    {
        macro_rules! probe {
            ($($name:tt),+) => { $(if std::arch::is_x86_feature_detected!($name) { found.push($name); })+ };
        }
        probe!("sse4.2", "avx", "avx2", "fma", "f16c", "avx512f", "avx512bw", "avx512vl", "avx512bf16");
    }
    #[cfg(target_arch = "aarch64")]
    {
        found.push("neon");
        if std::arch::is_aarch64_feature_detected!("fp16") {
            found.push("fp16");
        }
    }
    found
}

#[cfg(test)]
mod tests {
    #[test]
    fn the_versions_of_the_tensor_crates_are_known() {
        let versions = super::crate_versions();
        assert!(versions["candle-core"].as_str().unwrap().starts_with("0."), "{versions:?}");
    }
}
