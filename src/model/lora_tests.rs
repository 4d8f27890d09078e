//! Matching and files of adapters, by rules written out by hand and by PEFT's own files where they are at hand.

use super::*;
use crate::model::test_support::fixtures;

const QUERY: &str = "model.language_model.layers.3.self_attn.q_proj";

fn read(json: &Value) -> Result<LoraConfig> {
    let mut whole = json!({"peft_type": "LORA", "r": 4, "lora_alpha": 8, "target_modules": ["q_proj"]});
    for (key, value) in json.as_object().unwrap() {
        whole[key] = value.clone();
    }
    LoraConfig::from_json(&whole)
}

#[test]
fn names_match_whole_last_parts_and_patterns_match_whole_names() {
    let names = Modules::Names(vec!["q_proj".into(), "mlp.0".into()]);
    for (module, wanted) in [
        (QUERY, true),
        ("q_proj", true),
        ("model.layers.0.my_q_proj", false),
        ("model.visual.merger.mlp.0", true),
        ("model.visual.merger.mlp.10", false),
        ("model.language_model.layers.3.self_attn.q_proj.inner", false),
    ] {
        assert_eq!(names.contain(module).unwrap(), wanted, "{module}");
    }
    let pattern = Modules::Pattern(r".*language_model.*\.(q_proj|v_proj)".into());
    assert!(pattern.contain(QUERY).unwrap());
    assert!(!pattern.contain(&format!("{QUERY}.inner")).unwrap());
    // Look-around, as some trainers write it.
    let without = Modules::Pattern(r"^(?!.*visual).*(?:q_proj|proj).*".into());
    assert!(without.contain(QUERY).unwrap() && !without.contain("model.visual.blocks.0.attn.proj").unwrap());
    assert!(Modules::AllLinear.contain("model.visual.merger.mlp.0").unwrap());
    assert!(!Modules::AllLinear.contain("lm_head").unwrap());
    assert!(Modules::Pattern("(".into()).contain(QUERY).is_err());
}

#[test]
fn what_people_type_is_a_word_names_or_a_pattern() {
    assert_eq!(Modules::parse("all-linear"), Modules::AllLinear);
    assert_eq!(Modules::parse("q_proj, mlp.0"), Modules::Names(vec!["q_proj".into(), "mlp.0".into()]));
    assert_eq!(Modules::parse(r#"["q_proj"]"#), Modules::Names(vec!["q_proj".into()]));
    assert_eq!(Modules::parse("q_proj,,v_proj, "), Modules::Names(vec!["q_proj".into(), "v_proj".into()]));
    assert!(Modules::parse("((q").check().is_err() && Modules::parse("q_proj|v").check().is_ok());
    assert_eq!(Modules::parse(r".*q_proj"), Modules::Pattern(r".*q_proj".into()));
}

#[test]
fn layers_exclusions_and_patterns_narrow_what_is_meant() {
    let config = read(&json!({"layers_to_transform": [1, 3], "layers_pattern": "layers"})).unwrap();
    assert!(config.targets(QUERY).unwrap());
    assert!(!config.targets(&QUERY.replace(".3.", ".2.")).unwrap());
    assert!(!config.targets(&QUERY.replace("layers", "blocks")).unwrap());
    let any = read(&json!({"layers_to_transform": 3})).unwrap();
    assert!(any.targets(&QUERY.replace("layers", "blocks")).unwrap());
    let excluded = read(&json!({"exclude_modules": ".*layers\\.3\\..*"})).unwrap();
    assert!(!excluded.targets(QUERY).unwrap() && excluded.targets(&QUERY.replace(".3.", ".4.")).unwrap());
}

#[test]
fn the_first_pattern_that_matches_decides_rank_and_alpha() {
    let config = read(&json!({
        "rank_pattern": {"layers.3.self_attn.q_proj": 16, "q_proj": 2},
        "alpha_pattern": {"layers\\.[0-2]\\..*": 64},
    }))
    .unwrap();
    assert_eq!(config.shape_of(QUERY, &[]).unwrap(), (16, 8.0 / 16.0));
    assert_eq!(config.shape_of(&QUERY.replace(".3.", ".1."), &[]).unwrap(), (2, 64.0 / 2.0));
    assert_eq!(config.shape_of("model.language_model.layers.5.mlp.up_proj", &[]).unwrap(), (4, 2.0));
    let stabilised = read(&json!({"use_rslora": true})).unwrap();
    assert_eq!(stabilised.shape_of(QUERY, &[]).unwrap(), (4, 4.0));
}

#[test]
fn variants_that_compute_something_else_are_refused_by_name() {
    for (key, value) in [
        ("use_dora", json!(true)),
        ("lora_bias", json!(true)),
        ("layer_replication", json!([[0, 2]])),
        ("init_lora_weights", json!("pissa_niter_16")),
        ("peft_type", json!("ADALORA")),
        ("r", json!(0)),
        ("use_rslora", json!("yes")),
        ("use_dora", json!("true")),
        ("lora_alpha", json!(0)),
        ("lora_alpha", json!(1e39)),
    ] {
        let message = read(&json!({ key: value })).unwrap_err().to_string();
        assert!(message.contains(key), "{key}: {message}");
    }
    assert!(read(&json!({"init_lora_weights": "gaussian", "target_parameters": []})).is_ok());
}

#[test]
fn a_new_layer_changes_nothing_and_files_come_back_as_they_were() {
    let config = LoraConfig::new(4, 8.0, Modules::parse("q_proj,up_proj"));
    let layer = new_layer(&config, QUERY, [6, 10], 7).unwrap().unwrap();
    assert_eq!((layer.a.dims(), layer.b.dims(), layer.scaling), (&[4, 10][..], &[6, 4][..], 2.0));
    let a: Vec<f32> = layer.a.flatten_all().unwrap().to_vec1().unwrap();
    let bound = 1.0 / 10f32.sqrt();
    assert!(a.iter().all(|v| v.abs() <= bound) && a.iter().any(|v| v.abs() > bound / 2.0));
    assert!(layer.b.flatten_all().unwrap().to_vec1::<f32>().unwrap().iter().all(|v| *v == 0.0));
    assert!(new_layer(&config, "model.language_model.norm", [6, 10], 7).unwrap().is_none());

    let dir = tempfile::tempdir().unwrap();
    let tensors = [(format!("{QUERY}.lora_A.weight"), layer.a), (format!("{QUERY}.lora_B.weight"), layer.b)];
    save(dir.path(), &config, &tensors).unwrap();
    let adapter = Adapter::load(dir.path()).unwrap();
    assert_eq!(adapter.config, config);
    let again = adapter.layer(QUERY, [6, 10]).unwrap().unwrap();
    assert_eq!(again.a.flatten_all().unwrap().to_vec1::<f32>().unwrap(), a);
    adapter.check_used().unwrap();
    let message = adapter.layer(QUERY, [6, 11]).unwrap_err().to_string();
    assert!(message.contains("[6, 11]"), "{message}");
}

#[test]
fn merging_adds_the_scaled_product_and_an_unknown_module_is_an_error() {
    let dir = tempfile::tempdir().unwrap();
    let matrix =
        |values: Vec<f32>, shape: (usize, usize)| Tensor::from_vec(values, shape, &Device::Cpu).unwrap();
    let a = matrix(vec![1.0, 2.0, 3.0, 4.0], (2, 2));
    let b = matrix(vec![1.0, 0.0, 0.5, -1.0], (2, 2));
    let config = LoraConfig::new(2, 1.0, Modules::parse("q_proj"));
    // Older files have the adapter's name inside and the base's older names.
    let old = "base_model.model.model.layers.3.self_attn.q_proj";
    let named = [(format!("{old}.lora_A.default.weight"), a), (format!("{old}.lora_B.default.weight"), b)];
    save_file(&dir.path().join(TENSOR_FILE), &named, &[]).unwrap();
    crate::model::tokenizer::write_json(&dir.path().join(CONFIG_FILE), &config.to_json()).unwrap();
    let adapter = Adapter::load(dir.path()).unwrap();
    assert!(adapter.check_used().unwrap_err().to_string().contains(QUERY));
    let base = vec![10.0f32, 20.0, 30.0, 40.0];
    let merged = adapter.merged(&format!("{QUERY}.weight"), &[2, 2], base.clone().into()).unwrap();
    // W + 1/2 · [[1, 2], [0.5 - 3, 1 - 4]]
    assert_eq!(merged.into_floats(), [10.5, 21.0, 28.75, 38.5]);
    let other = adapter.merged("model.language_model.norm.weight", &[4], base.clone().into()).unwrap();
    assert_eq!(other.into_floats(), base);
    adapter.check_used().unwrap();
}

#[test]
fn settings_that_only_the_files_own_names_meet_are_saved_for_canonical_names() {
    let filled = |rows: usize, columns: usize| {
        Tensor::from_vec(vec![0.5f32; rows * columns], (rows, columns), &Device::Cpu).unwrap()
    };
    let old = |layer: usize| format!("model.layers.{layer}.self_attn.q_proj");
    let mut tensors = Vec::new();
    for (layer, rank) in [(2, 4), (3, 2)] {
        tensors.push((format!("{}.lora_A.weight", old(layer)), filled(rank, 6)));
        tensors.push((format!("{}.lora_B.weight", old(layer)), filled(6, rank)));
    }
    let config = LoraConfig {
        rank_pattern: vec![(old(3), 2.0)],
        alpha_pattern: vec![(r"model\.layers\.3\..*".to_owned(), 16.0)],
        ..LoraConfig::new(4, 8.0, Modules::Pattern(r"model\.layers\..*q_proj".to_owned()))
    };
    let (first_dir, second_dir) = (tempfile::tempdir().unwrap(), tempfile::tempdir().unwrap());
    save(first_dir.path(), &config, &tensors).unwrap();
    let first = Adapter::load(first_dir.path()).unwrap();
    assert_eq!(first.config, config, "what is read is what stands there");
    let mut again = Vec::new();
    for module in first.modules() {
        let layer = first.layer(module, [6, 6]).unwrap().unwrap();
        again.push((format!("{module}.lora_A.weight"), layer.a));
        again.push((format!("{module}.lora_B.weight"), layer.b));
    }
    save(second_dir.path(), &first.settings().unwrap(), &again).unwrap();
    let second = Adapter::load(second_dir.path()).unwrap();
    let shape = |adapter: &Adapter, module: &str| {
        let layer = adapter.layer(module, [6, 6]).unwrap().unwrap();
        (layer.a.dims().to_vec(), layer.scaling)
    };
    for (module, wanted) in
        [(QUERY.to_owned(), (vec![2, 6], 8.0)), (QUERY.replace(".3.", ".2."), (vec![4, 6], 2.0))]
    {
        assert_eq!(shape(&first, &module), wanted, "{module}");
        assert_eq!(shape(&second, &module), wanted, "{module}");
        assert!(second.config.targets(&module).unwrap(), "{module}");
    }
    // What canonical names meet stays as it is.
    assert_eq!(second.settings().unwrap(), second.config);
}

#[test]
fn tensors_that_replace_the_bases_are_named() {
    let dir = tempfile::tempdir().unwrap();
    let config = LoraConfig::new(2, 4.0, Modules::parse("q_proj"));
    let tensor = |shape: (usize, usize)| Tensor::zeros(shape, candle_core::DType::F32, &Device::Cpu).unwrap();
    let mut tensors = vec![
        (format!("{QUERY}.lora_A.weight"), tensor((2, 6))),
        (format!("{QUERY}.lora_B.weight"), tensor((6, 2))),
    ];
    save(dir.path(), &config, &tensors).unwrap();
    assert_eq!(Adapter::load(dir.path()).unwrap().replaced().next(), None);
    tensors.push(("lm_head.modules_to_save.default.weight".to_owned(), tensor((3, 6))));
    save(dir.path(), &config, &tensors).unwrap();
    let adapter = Adapter::load(dir.path()).unwrap();
    assert_eq!(adapter.replaced().collect::<Vec<_>>(), ["lm_head.weight"]);
}

#[test]
fn modules_that_are_said_to_be_saved_and_are_not_are_an_error() {
    let dir = tempfile::tempdir().unwrap();
    let config = LoraConfig::new(2, 4.0, Modules::parse("q_proj"));
    let tensor = |shape: (usize, usize)| Tensor::zeros(shape, candle_core::DType::F32, &Device::Cpu).unwrap();
    let low_rank = [
        (format!("{QUERY}.lora_A.weight"), tensor((2, 6))),
        (format!("{QUERY}.lora_B.weight"), tensor((6, 2))),
    ];
    let load = |modules: Value, whole: &[&str]| {
        let whole = whole.iter().map(|name| ((*name).to_owned(), tensor((3, 6))));
        let tensors: Vec<(String, Tensor)> = low_rank.iter().cloned().chain(whole).collect();
        save(dir.path(), &config, &tensors).unwrap();
        let mut settings = config.to_json();
        settings["modules_to_save"] = modules;
        crate::model::tokenizer::write_json(&dir.path().join(CONFIG_FILE), &settings).unwrap();
        Adapter::load(dir.path()).map(|_| ())
    };
    for (modules, whole) in [
        (json!(["lm_head"]), &["lm_head.weight"][..]),
        (json!(null), &[]),
        (json!([]), &[]),
        (json!(["lm_head"]), &["lm_head.modules_to_save.default.weight"]),
        // A name of the file's own, one of a whole part, and one of a module within it.
        (json!(["model.embed_tokens"]), &["model.embed_tokens.weight"]),
        (json!(["language_model.embed_tokens"]), &["model.embed_tokens.weight"]),
        (json!(["merger", "merger.mlp.2"]), &["visual.merger.mlp.0.weight", "visual.merger.mlp.2.weight"]),
    ] {
        load(modules.clone(), whole).unwrap_or_else(|error| panic!("{modules} {whole:?}: {error}"));
    }
    for (modules, whole, named) in [
        (json!(["lm_head", "embed_tokens"]), &["lm_head.weight"][..], "names `embed_tokens`"),
        (json!(["lm_head"]), &[], "names `lm_head`"),
        // Part of another module's name.
        (json!(["head"]), &["lm_head.weight"], "names `head`"),
        // What an adapter lies over is not saved whole.
        (json!(["q_proj"]), &[], "names `q_proj`"),
        (json!("lm_head"), &["lm_head.weight"], "must be a list of names"),
        (json!([7]), &[], "must be a list of names"),
    ] {
        let error = load(modules.clone(), whole).unwrap_err();
        assert!(matches!(error, Error::Data(_)), "{modules}: {error}");
        let text = error.to_string();
        assert!(text.contains("`modules_to_save`") && text.contains(named), "{modules}: {text}");
        assert!(text.contains(&format!("--> {}", dir.path().display())), "{text}");
    }
}

#[test]
fn settings_written_by_peft_are_read_with_their_meaning() {
    let Some(root) = fixtures() else { return };
    let list = Adapter::load(&root.join("lora/qwen2_5_vl_list")).unwrap();
    assert!(matches!(list.config.target_modules, Modules::Names(_)));
    assert!(list.modules().any(|name| name.starts_with("model.visual.")));
    let language = Adapter::load(&root.join("lora/qwen2_5_vl_language")).unwrap();
    assert!(language.modules().all(|name| name.starts_with("model.language_model.")));
    // What the settings mean is what the file holds.
    for adapter in [&list, &language] {
        assert!(adapter.modules().all(|name| adapter.config.targets(name).unwrap()));
    }
}
