//! The small files of a checkpoint: sizes beyond reason, text processing without end, templates that loop.

use super::damage::{JsonDamage, damaged, edits, json_damage, noise};
use super::{check, for_all, memory_for, on_small_stack, refusal, survive};
use crate::tiny::{Kind, Weights, assistant_of, tiny_tokenizer};
use proptest::prelude::*;
use safemed::error::Result;
use safemed::model::chat::{ChatTemplate, DEFAULT_TEMPLATE, Message, RenderOptions};
use safemed::model::config::VlmConfig;
use safemed::model::positions;
use safemed::model::processor::ImageProcessorConfig;
use safemed::model::tokenizer::Tokenizer;
use safemed::model::vlm::Vlm;
use safemed::pixels::RgbImage8;
use serde_json::{Value, json};
use std::path::Path;

fn json_of(path: &Path) -> Value {
    serde_json::from_slice(&std::fs::read(path).unwrap()).unwrap()
}

/// The three families' configurations, tiny.
fn configs() -> Vec<Value> {
    let second = assistant_of(Kind::Qwen25, Weights::Fresh, false).vlm.config().to_json();
    let third = assistant_of(Kind::Qwen3, Weights::Fresh, false).vlm.config().to_json();
    let mut first = second.clone();
    first["model_type"] = json!("qwen2_vl");
    let width = second["text_config"]["hidden_size"].clone();
    for (key, value) in [("embed_dim", json!(32)), ("mlp_ratio", json!(2.0)), ("hidden_size", width)] {
        first["vision_config"][key] = value;
    }
    vec![first, second, third]
}

/// What a configuration that was accepted makes before any weight is read.
fn use_config(dir: &Path) -> Result<()> {
    let config = VlmConfig::load(dir)?;
    config.check()?;
    Vlm::outline(&config)?;
    drop(config.to_json());
    let places = std::array::from_fn(|_| (0..9).collect());
    positions::rotary_table(&config.text, &places, &candle_core::Device::Cpu)?;
    Ok(())
}

#[test]
fn damaged_configurations_are_refused_or_small() {
    let dir = tempfile::tempdir().unwrap();
    let configs = configs();
    for config in &configs {
        std::fs::write(dir.path().join("config.json"), config.to_string()).unwrap();
        use_config(dir.path()).unwrap();
    }
    for_all(400, &(0..configs.len(), json_damage()), |(which, damage)| {
        let bytes = damage.apply(&configs[which]);
        std::fs::write(dir.path().join("config.json"), &bytes).unwrap();
        survive(memory_for(bytes.len()), || use_config(dir.path()));
    });
}

#[test]
fn sizes_that_pass_one_by_one_are_refused_together() {
    let configs = configs();
    for (family, section, key, value) in [
        (1, "rope_parameters", "mrope_section", json!([1u64 << 63, 1u64 << 63, 8])),
        (2, "rope_parameters", "mrope_section", json!([1u64 << 63, 1u64 << 63, 1u64 << 63])),
    ] {
        let mut config = configs[family].clone();
        config["text_config"][section][key] = value;
        let text = refusal(memory_for(4000), || VlmConfig::from_json(config));
        assert!(text.contains("mrope_section"), "{text}");
    }
    // Each at its own limit, together more numbers than any file holds.
    let mut config = configs[2].clone();
    for (key, value) in
        [("vocab_size", 1u64 << 22), ("intermediate_size", 1 << 18), ("num_hidden_layers", 512)]
    {
        config["text_config"][key] = json!(value);
    }
    for width in [1u64 << 16, 1 << 15] {
        config["text_config"]["hidden_size"] = json!(width);
        config["vision_config"]["out_hidden_size"] = json!(width);
        let text = refusal(memory_for(4000), || VlmConfig::from_json(config.clone()));
        assert!(text.contains("weights"), "{text}");
    }
}

fn saved_tokenizer(dir: &Path) {
    tiny_tokenizer().save(dir).unwrap();
}

fn use_tokenizer(dir: &Path) -> Result<()> {
    let tokenizer = Tokenizer::load(dir)?;
    drop((tokenizer.stop_ids().to_vec(), tokenizer.pad_id(), tokenizer.generation().clone()));
    let ids = tokenizer
        .encode("<|im_start|>Is there a nodule in the upper-left part? Größe 12 mm\n<answer> B</answer>")?;
    tokenizer.decode(&ids, true)?;
    tokenizer.decode(&[0, 1, 5, u32::MAX], false)?;
    Ok(())
}

#[test]
fn damaged_tokenizers_are_refused_or_used() {
    let dir = tempfile::tempdir().unwrap();
    saved_tokenizer(dir.path());
    let names = ["tokenizer.json", "tokenizer_config.json", "generation_config.json"];
    let sound = names.map(|name| json_of(&dir.path().join(name)));
    use_tokenizer(dir.path()).unwrap();
    for_all(
        200,
        &(prop_oneof![6 => Just(0usize), 1 => Just(1), 1 => Just(2)], json_damage()),
        |(which, damage)| {
            let bytes = damage.apply(&sound[which]);
            for (name, sound) in names.iter().zip(&sound) {
                std::fs::write(dir.path().join(name), sound.to_string()).unwrap();
            }
            std::fs::write(dir.path().join(names[which]), &bytes).unwrap();
            survive(memory_for(bytes.len()), || use_tokenizer(dir.path()));
        },
    );
}

/// Every stage that is read, also those which a Qwen checkpoint has not.
#[test]
fn damaged_stages_of_other_tokenizers_are_refused_or_used() {
    let dir = tempfile::tempdir().unwrap();
    saved_tokenizer(dir.path());
    let path = dir.path().join("tokenizer.json");
    let sound = json_of(&path);
    let stages = json!({
        "normalizer": {"type": "Sequence", "normalizers": [
            {"type": "NFD"}, {"type": "NFKC"}
        ]},
        "pre_tokenizer": {"type": "Sequence", "pretokenizers": [
            {"type": "Split", "pattern": {"Regex": "\\w+|\\s"}, "behavior": "Isolated", "invert": false},
            {"type": "Split", "pattern": {"String": " "}, "behavior": "MergedWithPrevious", "invert": true},
            {"type": "Digits", "individual_digits": true},
            {"type": "ByteLevel", "add_prefix_space": false, "trim_offsets": true, "use_regex": true}
        ]},
        "post_processor": {"type": "TemplateProcessing", "single": [{"Sequence": {"id": "A", "type_id": 0}}],
            "pair": [{"Sequence": {"id": "A", "type_id": 0}}, {"Sequence": {"id": "B", "type_id": 1}}],
            "special_tokens": {}},
        "decoder": {"type": "Sequence", "decoders": [
            {"type": "ByteLevel", "add_prefix_space": true, "trim_offsets": true, "use_regex": true}
        ]},
    });
    for_all(150, &json_damage(), |damage| {
        let Ok(damaged) = serde_json::from_slice::<Value>(&damage.apply(&stages)) else { return };
        let mut whole = sound.clone();
        for (key, value) in damaged.as_object().into_iter().flatten() {
            whole[key.as_str()] = value.clone();
        }
        let bytes = whole.to_string();
        std::fs::write(&path, &bytes).unwrap();
        survive(memory_for(bytes.len()), || use_tokenizer(dir.path()));
    });
}

#[test]
fn bombs_in_a_tokenizer_are_refused() {
    let dir = tempfile::tempdir().unwrap();
    saved_tokenizer(dir.path());
    let path = dir.path().join("tokenizer.json");
    let sound = json_of(&path);
    let refused = |key: &str, value: Value| {
        let mut whole = sound.clone();
        whole[key] = value;
        let bytes = whole.to_string();
        std::fs::write(&path, &bytes).unwrap();
        on_small_stack(|| refusal(memory_for(bytes.len()), || use_tokenizer(dir.path())))
    };
    let double = json!({"type": "Replace", "pattern": {"String": "e"}, "content": "ee"});
    let stages = vec![double; 40];
    for (key, value) in [
        ("normalizer", json!({"type": "Sequence", "normalizers": stages.clone()})),
        ("decoder", json!({"type": "Sequence", "decoders": stages})),
        // An index beyond its own table.
        ("normalizer", json!({"type": "Precompiled", "precompiled_charsmap": "AAAAAA=="})),
        ("decoder", json!({"type": "Strip", "content": " ", "start": u32::MAX, "stop": u32::MAX})),
    ] {
        assert!(refused(key, value).contains("not supported"), "{key}");
    }
    let level =
        json!({"type": "ByteLevel", "add_prefix_space": false, "trim_offsets": true, "use_regex": false});
    let levels = json!({"type": "Sequence", "pretokenizers": vec![level; 40]});
    assert!(refused("pre_tokenizer", levels).contains("twice"));
    let split = |pattern: String| json!({"type": "Split", "pattern": {"Regex": pattern}, "behavior": "Isolated", "invert": false});
    for pattern in ["(".repeat(100_000), "(?:a?){2000}".repeat(1000), "(".repeat(2000)] {
        refused("pre_tokenizer", split(pattern));
    }
    for pattern in [
        r"(?:(?:[A-Za-z<>|_ ]+)+)+[#\d]\b",
        r"(?:(\w|\s|.)+)+$(?<!t)",
        r"((a{1000}){1000}){1000}",
        r"(?<a>\g<a>?x)",
        "",
        "(?=)",
        &format!("{}x{}", "(?:".repeat(500), ")*".repeat(500)),
    ] {
        let mut whole = sound.clone();
        whole["pre_tokenizer"] = split(pattern.to_owned());
        std::fs::write(&path, whole.to_string()).unwrap();
        on_small_stack(|| survive(memory_for(100_000), || use_tokenizer(dir.path())));
    }
    let mut nested = json!({"type": "NFC"});
    for _ in 0..60 {
        nested = json!({"type": "Sequence", "normalizers": [nested]});
    }
    let mut whole = sound.clone();
    whole["normalizer"] = nested;
    std::fs::write(&path, whole.to_string()).unwrap();
    on_small_stack(|| survive(memory_for(100_000), || use_tokenizer(dir.path())));
}

fn rendered(template: &str) -> Result<String> {
    let messages = [Message::text("system", "You are helpful."), Message::image_question("Is it normal?")];
    ChatTemplate::new(template)?
        .render(&messages, RenderOptions { add_generation_prompt: true, add_vision_id: true })
}

#[test]
fn damaged_templates_are_refused_or_rendered() {
    for_all(300, &(edits(), noise(), 0u8..8), |(edits, noise, kind)| {
        let bytes = if kind == 0 { noise } else { damaged(DEFAULT_TEMPLATE.as_bytes(), &edits) };
        let text = String::from_utf8_lossy(&bytes);
        survive(memory_for(text.len()), || rendered(&text));
    });
}

#[test]
fn templates_that_never_end_or_never_stop_writing_are_refused() {
    let loops = "{% for a in range(99999) %}{% for b in range(99999) %}{% endfor %}{% endfor %}";
    let writes =
        "{% for a in range(9999) %}{% for b in range(9999) %}0123456789{{ a }}{% endfor %}{% endfor %}";
    for template in [
        loops,
        writes,
        "{% macro a() %}{{ a() }}{% endmacro %}{{ a() }}",
        "{% macro a(n) %}{{ a(n + 1) }}{{ a(n + 1) }}{% endmacro %}{{ a(0) }}",
        "{{ range(99999999999) }}",
        "{{ 'x' * 99999999999 }}",
        "{{ messages|tojson(indent=99999999999) }}",
        "{{ messages|tojson(indent=18446744073709551615) }}",
        "{{ 'x'|indent(99999999999) }}",
        "{{ 'x'.center(99999999999) }}",
        "{% for x in messages recursive %}{{ loop(messages) }}{% endfor %}",
        "{{ raise_exception('no') }}",
        "{% include 'chat' %}",
        "{% extends 'chat' %}",
    ] {
        let text = on_small_stack(|| refusal(memory_for(template.len()), || rendered(template)));
        assert!(text.contains("template"), "{template}: {text}");
    }
    let deep = format!("{}1{}", "(".repeat(20_000), ")".repeat(20_000));
    let nested = format!("{}{}", "{% if 1 %}".repeat(5000), "{% endif %}".repeat(5000));
    let values = "{% set ns = namespace(x=[]) %}{% for a in range(9999) %}{% set ns.x = [ns.x] %}{% endfor %}{{ ns.x }}";
    let chains = [("not ", "1"), ("-", "1"), ("{% if 1 %}x{% elif 1 %}", "")].map(|(part, end)| {
        let opened = if end.is_empty() { "" } else { "{{ " };
        format!("{opened}{}{end} }}}}", part.repeat(60_000 / part.len()))
    });
    for template in [format!("{{{{ {deep} }}}}"), nested, values.to_owned(), "{{".repeat(1 << 20)]
        .into_iter()
        .chain(chains)
    {
        on_small_stack(|| survive(memory_for(template.len()), || rendered(&template)));
    }
}

#[test]
fn a_template_far_longer_than_any_conversation_needs_still_renders() {
    let template = "{% for a in range(200) %}{% for m in messages %}{{ m.role }}{% endfor %}{% endfor %}";
    assert_eq!(rendered(template).unwrap().len(), 200 * "systemuser".len());
}

#[test]
fn damaged_image_processors_are_refused_or_small() {
    let dir = tempfile::tempdir().unwrap();
    let sound =
        ImageProcessorConfig { min_pixels: 1024, max_pixels: 4096, ..ImageProcessorConfig::default() }
            .to_json();
    let whole = json!({"image_processor": sound.clone(), "processor_class": "x"});
    let image = RgbImage8::filled(20, 30, [1, 2, 3]).unwrap();
    for_all(300, &(any::<bool>(), json_damage()), |(is_whole, damage)| {
        let (name, other) = ("processor_config.json", "preprocessor_config.json");
        let (name, other) = if is_whole { (name, other) } else { (other, name) };
        let bytes = damage.apply(if is_whole { &whole } else { &sound });
        std::fs::write(dir.path().join(name), &bytes).unwrap();
        let _ = std::fs::remove_file(dir.path().join(other));
        // A picture is made at least as large as the file asks for: 2^24 pixels are the most.
        let most = memory_for(bytes.len()) + (1 << 28);
        survive(most, || ImageProcessorConfig::load(dir.path())?.process(&image));
    });
}

#[test]
fn a_picture_is_not_blown_up_to_whatever_a_processor_asks() {
    let value = json!({"min_pixels": 1u64 << 30, "max_pixels": 1u64 << 30});
    let text = refusal(memory_for(100), || ImageProcessorConfig::from_json(&value));
    assert!(text.contains("min_pixels"), "{text}");
}

#[test]
fn text_files_that_are_no_text_are_the_files_fault() {
    let dir = tempfile::tempdir().unwrap();
    saved_tokenizer(dir.path());
    for name in ["config.json", "tokenizer_config.json", "chat_template.jinja", "preprocessor_config.json"] {
        std::fs::write(dir.path().join(name), b"\xff\xfe{}").unwrap();
    }
    check(&VlmConfig::load(dir.path()).unwrap_err());
    check(&Tokenizer::load(dir.path()).unwrap_err());
    check(&ImageProcessorConfig::load(dir.path()).unwrap_err());
    std::fs::remove_file(dir.path().join("tokenizer_config.json")).unwrap();
    check(&ChatTemplate::load(dir.path()).unwrap_err());
}

#[test]
fn damage_of_this_module_reaches_every_kind_of_failure() {
    // The damage itself must not fail: brackets, twice the same key, noise.
    for damage in [JsonDamage::Deep(1000), JsonDamage::Twice, JsonDamage::Bytes(vec![0xff])] {
        assert!(
            VlmConfig::from_json(serde_json::from_slice(&damage.apply(&json!({"a": 1}))).unwrap_or_default())
                .is_err()
        );
    }
}
