//! LoRA adapters: settings that make no number, patterns without end, halves that do not fit.

use super::damage::{damaged, edits, json_damage};
use super::tensors::file;
use super::{for_all, memory_for, refusal, survive};
use safemed::error::Result;
use safemed::model::lora::{Adapter, LoraConfig, Modules};
use serde_json::{Value, json};
use std::path::Path;

const MODULE: &str = "model.language_model.layers.0.self_attn.q_proj";

fn settings() -> Value {
    let mut config = LoraConfig::new(2, 4.0, Modules::Names(vec!["q_proj".to_owned()]));
    config.rank_pattern = vec![("layers.1.*".to_owned(), 4.0)];
    config.alpha_pattern = vec![(r"layers\.[0-9]+\.mlp".to_owned(), 8.0)];
    config.layers_to_transform = Some(vec![0]);
    config.layers_pattern = vec!["layers".to_owned()];
    config.exclude_modules = Some(Modules::Pattern(".*v_proj".to_owned()));
    config.to_json()
}

fn header() -> Value {
    let name = |half: &str| format!("base_model.model.{MODULE}.lora_{half}.weight");
    json!({
        name("A"): {"dtype": "F32", "shape": [2, 3], "data_offsets": [0, 24]},
        name("B"): {"dtype": "F32", "shape": [5, 2], "data_offsets": [24, 64]},
        "base_model.model.model.norm.weight": {"dtype": "F32", "shape": [3], "data_offsets": [64, 76]},
    })
}

fn write(dir: &Path, settings: &[u8], header: &[u8]) -> usize {
    std::fs::write(dir.join("adapter_config.json"), settings).unwrap();
    let tensors = file(header, &[0; 76]);
    std::fs::write(dir.join("adapter_model.safetensors"), &tensors).unwrap();
    settings.len() + tensors.len()
}

fn use_adapter(dir: &Path) -> Result<()> {
    let adapter = Adapter::load(dir)?;
    let modules: Vec<String> = adapter.modules().map(str::to_owned).collect();
    for module in
        modules.iter().map(String::as_str).chain([MODULE, "lm_head", "model.visual.blocks.3.attn.qkv"])
    {
        adapter.config.targets(module)?;
        if let Some(layer) = adapter.layer(module, [5, 3])? {
            assert!(layer.scaling.is_finite() && layer.scaling != 0.0);
            adapter.merged(&format!("{module}.weight"), &[5, 3], vec![0f32; 15].into())?;
        }
    }
    adapter.replacement("model.language_model.norm.weight", &[3])?;
    adapter.check_used()
}

#[test]
fn damaged_adapters_are_refused_or_used() {
    let dir = tempfile::tempdir().unwrap();
    let (settings, header) = (settings(), header());
    write(dir.path(), settings.to_string().as_bytes(), header.to_string().as_bytes());
    use_adapter(dir.path()).unwrap();
    for_all(300, &(json_damage(), json_damage(), 0u8..4), |(first, second, which)| {
        let sound = |value: &Value| value.to_string().into_bytes();
        let a = if which != 0 { first.apply(&settings) } else { sound(&settings) };
        let b = if which < 2 { second.apply(&header) } else { sound(&header) };
        let length = write(dir.path(), &a, &b);
        survive(memory_for(length), || use_adapter(dir.path()));
    });
    for_all(100, &edits(), |edits| {
        let header = header.to_string();
        write(dir.path(), settings.to_string().as_bytes(), header.as_bytes());
        let bytes = damaged(&file(header.as_bytes(), &[0; 76]), &edits);
        std::fs::write(dir.path().join("adapter_model.safetensors"), &bytes).unwrap();
        survive(memory_for(bytes.len()), || use_adapter(dir.path()));
    });
}

#[test]
fn settings_that_give_no_finite_scale_are_refused() {
    let dir = tempfile::tempdir().unwrap();
    let header = header().to_string();
    for (key, value) in [
        ("rank_pattern", json!({".*": 0.5})),
        ("rank_pattern", json!({".*": 1e300})),
        ("alpha_pattern", json!({".*": 1e308})),
        ("r", json!(u64::MAX)),
        ("lora_alpha", json!(1e300)),
        ("lora_alpha", json!(0)),
    ] {
        let mut settings = settings();
        settings[key] = value;
        let length = write(dir.path(), settings.to_string().as_bytes(), header.as_bytes());
        refusal(memory_for(length), || use_adapter(dir.path()));
    }
}

#[test]
fn halves_that_are_no_matrices_are_refused_by_name() {
    let dir = tempfile::tempdir().unwrap();
    let header = header().to_string().replace("\"shape\":[2,3]", "\"shape\":[6]");
    let length = write(dir.path(), settings().to_string().as_bytes(), header.as_bytes());
    let text = refusal(memory_for(length), || use_adapter(dir.path()));
    assert!(text.contains("q_proj") && text.contains("[6]"), "{text}");
}

#[test]
fn patterns_that_backtrack_without_end_are_given_up() {
    let module = format!("model.{}", "a".repeat(60));
    for pattern in [
        r"model\.(a+)+b",
        r"(?=(.*)*b).*",
        r"(a*)*(a*)*(a*)*b\1",
        &"(".repeat(10_000),
        &"a{1000}".repeat(1000),
    ] {
        let modules = Modules::Pattern(pattern.to_owned());
        survive(memory_for(pattern.len()), || modules.contain(&module));
    }
}
