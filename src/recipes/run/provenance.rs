//! Where a run's numbers come from: version, commit, crates, machine. Nothing here holds a time.

use crate::backend::Backend;
use serde_json::{Map, Value, json};

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

/// Commit that this program was built from, with `-dirty` when its sources were changed; "unknown" outside of a checkout.
pub const GIT_COMMIT: &str = env!("SAFEMED_GIT_COMMIT");

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
    fn the_commit_is_a_hash_or_not_known() {
        let commit = super::GIT_COMMIT.strip_suffix("-dirty").unwrap_or(super::GIT_COMMIT);
        let is_hash = commit.len() == 40 && commit.bytes().all(|byte| byte.is_ascii_hexdigit());
        assert!(is_hash || commit == "unknown", "{commit}");
    }

    #[test]
    fn the_versions_of_the_tensor_crates_are_known() {
        let versions = super::crate_versions();
        assert!(versions["candle-core"].as_str().unwrap().starts_with("0."), "{versions:?}");
    }
}
