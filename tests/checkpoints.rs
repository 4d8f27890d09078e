//! What a checkpoint's files are like changes no answer: names, shards, element types; and what is exported is what came.

use crate::tiny::{Kind, Weights, assistant_of, phantoms};
use candle_core::DType;
use safemed::model::weights::{self, NameLayout, TensorFile, save_file};
use serde_json::{Value, json};
use std::fs;
use std::path::{Path, PathBuf};
use std::sync::OnceLock;

struct Material {
    _dir: tempfile::TempDir,
    root: PathBuf,
}

/// The same model twice: `single`, and `shards`: two files in bfloat16 under the older names.
fn material() -> &'static Path {
    static MADE: OnceLock<Material> = OnceLock::new();
    &MADE
        .get_or_init(|| {
            let dir = tempfile::tempdir().unwrap();
            let root = dir.path().to_path_buf();
            phantoms(&root.join("data"));
            let assistant = assistant_of(Kind::Qwen25, Weights::Loud, false);
            assistant.save(&root.join("single")).unwrap();
            let mut tensors: Vec<_> = assistant
                .vlm
                .parameters()
                .tensors()
                .unwrap()
                .into_iter()
                .map(|(name, tensor)| (name, tensor.to_dtype(DType::BF16).unwrap()))
                .collect();
            // The same numbers in float32, so that only the files differ.
            let widened: Vec<_> = tensors
                .iter()
                .map(|(name, tensor)| (name.clone(), tensor.to_dtype(DType::F32).unwrap()))
                .collect();
            weights::save(&root.join("single"), &widened).unwrap();
            copy(&root.join("single"), &root.join("shards"));
            let shards = root.join("shards");
            fs::remove_file(shards.join("model.safetensors")).unwrap();
            let mut index = serde_json::Map::new();
            for (name, _) in &mut tensors {
                *name = NameLayout::Flat.spell(name);
            }
            let half = tensors.len() / 2;
            for (number, part) in [&tensors[..half], &tensors[half..]].into_iter().enumerate() {
                let file = format!("model-0000{}-of-00002.safetensors", number + 1);
                save_file(&shards.join(&file), part, &[("format", "pt")]).unwrap();
                index.extend(part.iter().map(|(name, _)| (name.clone(), json!(file))));
            }
            write(
                &shards.join("model.safetensors.index.json"),
                &json!({"metadata": {}, "weight_map": index}),
            );
            let mut config = read(&shards.join("config.json"));
            config.as_object_mut().unwrap().remove("dtype");
            config["torch_dtype"] = json!("bfloat16");
            config["vision_config"]["torch_dtype"] = json!("bfloat16");
            write(&shards.join("config.json"), &config);
            fs::write(shards.join("LICENSE"), "as it is").unwrap();
            fs::write(shards.join("consolidated.bin"), "not wanted").unwrap();
            Material { _dir: dir, root }
        })
        .root
}

fn copy(from: &Path, to: &Path) {
    fs::create_dir_all(to).unwrap();
    for entry in fs::read_dir(from).unwrap() {
        let path = entry.unwrap().path();
        fs::copy(&path, to.join(path.file_name().unwrap())).unwrap();
    }
}

fn read(path: &Path) -> Value {
    serde_json::from_slice(&fs::read(path).unwrap()).unwrap()
}

fn write(path: &Path, value: &Value) {
    fs::write(path, value.to_string()).unwrap();
}

/// What is on standard error of a command that must succeed.
fn done(arguments: &[&str]) -> String {
    let output = crate::support::safemed(material()).args(arguments).output().unwrap();
    let said = String::from_utf8_lossy(&output.stderr).into_owned();
    assert!(output.status.success(), "{arguments:?}: {said}");
    said
}

/// The records of evaluating `model`.
fn evaluated(model: &str, out: &Path, more: &[&str]) -> String {
    let out = out.display().to_string();
    let mut arguments = vec!["eval", "--model", model, "--omnimedvqa", "data", "--out", &out];
    arguments.extend(["--prompt", "phantom", "--limit", "12", "--max-new-tokens", "3"]);
    arguments.extend(["--scoring", "likelihood"]);
    arguments.extend(more);
    done(&arguments);
    fs::read_to_string(out + "/records.jsonl").unwrap()
}

#[test]
fn names_shards_and_bfloat16_change_no_byte_of_a_record() {
    let dir = tempfile::tempdir().unwrap();
    let at = |name: &str| dir.path().join(name);
    let single = evaluated("single", &at("single"), &[]);
    assert_eq!(single.lines().count(), 12);
    assert_eq!(single, evaluated("shards", &at("shards"), &[]));
    assert_eq!(single, evaluated("shards", &at("widened"), &["--dtype", "f32"]));
    // These weights are bfloat16 numbers already, so that rounding them changes nothing.
    assert_eq!(single, evaluated("single", &at("rounded"), &["--dtype", "bf16"]));
    let run = read(&at("rounded").join("run.json"));
    assert!(run.to_string().contains("bf16"), "{run}");
}

#[test]
fn sizes_of_images_that_are_set_are_those_of_a_checkpoint_that_says_so_and_a_trained_model_keeps_them() {
    let dir = tempfile::tempdir().unwrap();
    let at = |name: &str| dir.path().join(name);
    let sizes = json!({"longest_edge": 256, "shortest_edge": 200});
    copy(&material().join("single"), &at("limited"));
    let file = at("limited/preprocessor_config.json");
    let mut processor = read(&file);
    processor["size"] = sizes.clone();
    write(&file, &processor);
    let file = at("limited/processor_config.json");
    let mut whole = read(&file);
    whole["image_processor"]["size"] = sizes.clone();
    write(&file, &whole);
    let limits = ["--min-pixels", "200", "--max-pixels", "256"];
    let set = evaluated("single", &at("set"), &limits);
    assert_eq!(set, evaluated(&at("limited").display().to_string(), &at("file"), &[]));
    assert_ne!(set, evaluated("single", &at("plain"), &[]));

    let out = at("trained").display().to_string();
    let mut arguments = vec!["train", "--model", "single", "--omnimedvqa", "data", "--out", &out];
    arguments.extend(["--prompt", "phantom_cot", "--limit", "4", "--batch-size", "2"]);
    arguments.extend(["--set", "train.num_steps=1"]);
    arguments.extend(limits);
    done(&arguments);
    let kept = read(&at("trained/checkpoints/step-1/preprocessor_config.json"));
    assert_eq!(kept["size"], sizes);

    let refused = |limits: &[&str]| {
        let out = at("refused").display().to_string();
        let mut arguments = vec!["eval", "--model", "single", "--omnimedvqa", "data", "--out", &out];
        arguments.extend(["--prompt", "phantom"]);
        arguments.extend(limits);
        let (status, _, said) = crate::support::run(material(), &arguments);
        assert_eq!(status, 2, "{said}");
        said
    };
    assert!(refused(&["--min-pixels", "300", "--max-pixels", "256"]).contains("exceeds `max_pixels` 256"));
    assert!(refused(&["--max-pixels", "10"]).contains("`max_pixels` 10"));
}

#[test]
fn an_export_without_changes_is_the_checkpoint_byte_for_byte() {
    let dir = tempfile::tempdir().unwrap();
    let out = dir.path().join("out");
    done(&["export", "--model", "shards", "--out", &out.display().to_string()]);
    let names = |dir: &Path| {
        let mut names: Vec<String> = fs::read_dir(dir)
            .unwrap()
            .map(|entry| entry.unwrap().file_name().into_string().unwrap())
            .filter(|name| Path::new(name).extension().is_none_or(|extension| extension != "bin"))
            .collect();
        names.sort();
        names
    };
    let shards = material().join("shards");
    assert_eq!(names(&shards), names(&out));
    for name in names(&shards).iter().filter(|name| !name.ends_with(".index.json")) {
        assert!(fs::read(shards.join(name)).unwrap() == fs::read(out.join(name)).unwrap(), "{name}");
    }
    let index = "model.safetensors.index.json";
    assert_eq!(read(&out.join(index))["weight_map"], read(&shards.join(index))["weight_map"]);
    let sizes: u64 = ["1", "2"]
        .map(|n| TensorFile::open(&out.join(format!("model-0000{n}-of-00002.safetensors"))).unwrap())
        .iter()
        .flat_map(TensorFile::entries)
        .map(|entry| entry.size() as u64)
        .sum();
    assert_eq!(read(&out.join(index))["metadata"]["total_size"], sizes);
}

#[test]
fn an_exported_type_is_named_in_the_configuration_and_keeps_the_layout() {
    let dir = tempfile::tempdir().unwrap();
    let at = |name: &str| dir.path().join(name).display().to_string();
    done(&["export", "--model", "shards", "--dtype", "f32", "--out", &at("wide")]);
    let config = read(&dir.path().join("wide/config.json"));
    assert_eq!(config["torch_dtype"], "float32");
    assert_eq!(config["vision_config"]["torch_dtype"], "float32");
    assert!(config.get("dtype").is_none(), "a key that was not there");
    let file = TensorFile::open(&dir.path().join("wide/model-00002-of-00002.safetensors")).unwrap();
    assert!(file.names().iter().any(|name| name.starts_with("visual.")));
    assert!(file.entries().iter().all(|entry| format!("{:?}", entry.dtype) == "F32"));
    let plain = evaluated("single", &dir.path().join("plain"), &[]);
    assert_eq!(plain, evaluated(&at("wide"), &dir.path().join("of-wide"), &[]));
    done(&["export", "--model", &at("wide"), "--dtype", "bf16", "--out", &at("narrow")]);
    let bytes = |path: &Path| fs::read(path.join("model-00001-of-00002.safetensors")).unwrap();
    assert!(bytes(&dir.path().join("narrow")) == bytes(&material().join("shards")));
}

#[test]
fn an_export_of_half_a_checkpoint_writes_nothing() {
    let dir = tempfile::tempdir().unwrap();
    let (model, out) = (dir.path().join("model"), dir.path().join("out"));
    copy(&material().join("single"), &model);
    let file = TensorFile::open(&model.join("model.safetensors")).unwrap();
    let all = file.names();
    let kept: Vec<_> = all.iter().skip(1).map(|name| (name.clone(), file.tensor(name).unwrap())).collect();
    weights::save(&model, &kept).unwrap();
    let output = crate::support::safemed(dir.path())
        .args(["export", "--model", "model", "--out", "out"])
        .output()
        .unwrap();
    let said = String::from_utf8_lossy(&output.stderr);
    assert_eq!(output.status.code(), Some(3), "{said}");
    assert!(said.contains(all[0].trim_start_matches("model.")) && said.contains("missing"), "{said}");
    assert!(!out.exists());
}
