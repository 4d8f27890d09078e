//! safetensors: headers that lie, numbers that are none, shards that are not there.

use super::damage::{JsonDamage, damaged, edits, json_damage, noise};
use super::{for_all, memory_for, on_small_stack, refusal, survive};
use proptest::prelude::*;
use safemed::error::Result;
use safemed::model::tensor_file::TensorFile;
use safemed::model::weights::Weights;
use serde_json::{Value, json};
use std::path::Path;

/// A safetensors file of this header and these numbers.
pub(super) fn file(header: &[u8], numbers: &[u8]) -> Vec<u8> {
    [&(header.len() as u64).to_le_bytes()[..], header, numbers].concat()
}

/// Every type of number that is read, one that is not, an empty tensor and a scalar.
fn header() -> Value {
    json!({
        "__metadata__": {"format": "pt"},
        "model.norm.weight": {"dtype": "F32", "shape": [2, 3], "data_offsets": [0, 24]},
        "visual.a": {"dtype": "BF16", "shape": [4], "data_offsets": [24, 32]},
        "visual.b": {"dtype": "F16", "shape": [2, 2], "data_offsets": [32, 40]},
        "lm_head.weight": {"dtype": "U8", "shape": [8], "data_offsets": [40, 48]},
        "empty": {"dtype": "F32", "shape": [0, 5], "data_offsets": [48, 48]},
        "scalar": {"dtype": "F32", "shape": [], "data_offsets": [48, 52]},
    })
}

fn numbers() -> Vec<u8> {
    (0..52).map(|index| index as u8).collect()
}

/// Reads all there is.
fn read_all(path: &Path) -> Result<()> {
    let file = TensorFile::open(path)?;
    drop(file.metadata());
    let mut outcome = Ok(());
    for entry in file.entries() {
        let name = &entry.name;
        assert_eq!(file.bytes(name)?.len(), entry.size(), "{entry:?}");
        assert_eq!(file.shape(name), Some(entry.shape.as_slice()));
        let results = [
            file.numbers(name).and_then(|numbers| numbers.check_finite(name)),
            file.floats(name).map(drop),
            file.tensor(name).map(drop),
            file.bytes_u8(name).map(drop),
        ];
        outcome = results.into_iter().fold(outcome, Result::and);
    }
    outcome
}

fn check_file(path: &Path, bytes: &[u8]) {
    std::fs::write(path, bytes).unwrap();
    let most = memory_for(bytes.len());
    survive(most, || read_all(path));
    survive(most, || {
        let weights = Weights::open(path.parent().unwrap())?;
        let names: Vec<String> = weights.names().map(str::to_owned).collect();
        for name in &names {
            for shape in [&[][..], &[2, 3], &[usize::MAX, usize::MAX], &[0]] {
                if weights.shape(name) != Some(shape) {
                    weights.get(name, shape).expect_err("another shape");
                }
            }
        }
        weights.check_finite()
    });
}

#[test]
fn damaged_headers_and_numbers_are_refused_or_read() {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("model.safetensors");
    check_file(&path, &file(header().to_string().as_bytes(), &numbers()));
    let strategy = (json_damage(), edits(), any::<bool>());
    for_all(400, &strategy, |(damage, edits, is_whole)| {
        let bytes = file(&damage.apply(&header()), &numbers());
        check_file(&path, &if is_whole { bytes } else { damaged(&bytes, &edits) });
    });
}

#[test]
fn noise_is_no_safetensors_file() {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("model.safetensors");
    for_all(100, &noise(), |bytes| {
        check_file(&path, &bytes);
        check_file(&path, &file(&bytes, &[]));
    });
}

#[test]
fn a_damaged_index_leaves_the_directory_or_names_what_is_missing() {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("model.safetensors.index.json");
    let one = |name: &str| format!(r#"{{"{name}":{{"dtype":"F32","shape":[1],"data_offsets":[0,4]}}}}"#);
    for (shard, tensor) in [("one.safetensors", "a"), ("two.safetensors", "b")] {
        std::fs::write(dir.path().join(shard), file(one(tensor).as_bytes(), &[0; 4])).unwrap();
    }
    let sound = json!({"metadata": {"total_size": 8}, "weight_map": {"a": "one.safetensors", "b": "two.safetensors"}});
    let check = |damage: &JsonDamage| {
        let bytes = damage.apply(&sound);
        std::fs::write(&path, &bytes).unwrap();
        survive(memory_for(bytes.len()), || Weights::open(dir.path())?.check_finite());
    };
    for_all(200, &json_damage(), |damage| check(&damage));
}

#[test]
fn shards_that_are_directories_loops_or_elsewhere_are_refused() {
    let dir = tempfile::tempdir().unwrap();
    let root = dir.path().join("model");
    std::fs::create_dir_all(root.join("folder.safetensors")).unwrap();
    let shard = file(br#"{"a":{"dtype":"F32","shape":[1],"data_offsets":[0,4]}}"#, &[0; 4]);
    std::fs::write(dir.path().join("outside.safetensors"), &shard).unwrap();
    #[cfg(unix)]
    std::os::unix::fs::symlink("loop.safetensors", root.join("loop.safetensors")).unwrap();
    let outside = dir.path().join("outside.safetensors").display().to_string();
    for name in [
        "folder.safetensors",
        "loop.safetensors",
        "missing.safetensors",
        "../outside.safetensors",
        "./../outside.safetensors",
        "..\\outside.safetensors",
        outside.as_str(),
        "/dev/zero",
        "",
        ".",
        "/",
        "a\u{0}b",
        &"x".repeat(5000),
    ] {
        let index = json!({"weight_map": {"a": name}}).to_string();
        std::fs::write(root.join("model.safetensors.index.json"), index).unwrap();
        refusal(memory_for(6000), || Weights::open(&root));
    }
}

#[test]
fn what_is_no_plain_file_is_refused_before_it_is_opened() {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("model.safetensors");
    std::fs::create_dir(&path).unwrap();
    assert!(refusal(memory_for(0), || Weights::open(dir.path())).contains("no plain file"));
    #[cfg(unix)]
    {
        std::fs::remove_dir(&path).unwrap();
        std::os::unix::fs::symlink("/dev/zero", &path).unwrap();
        assert!(refusal(memory_for(0), || Weights::open(dir.path())).contains("no plain file"));
    }
}

#[test]
fn an_index_of_many_names_takes_no_more_memory_than_it_is_long() {
    let dir = tempfile::tempdir().unwrap();
    let map: serde_json::Map<String, Value> =
        (0..50_000).map(|index| (format!("tensor.{index}"), json!("one.safetensors"))).collect();
    let index = json!({"weight_map": map}).to_string();
    std::fs::write(dir.path().join("model.safetensors.index.json"), &index).unwrap();
    std::fs::write(dir.path().join("one.safetensors"), file(b"{}", &[])).unwrap();
    assert!(refusal(memory_for(index.len()), || Weights::open(dir.path())).contains("is missing"));
}

#[test]
fn an_empty_tensor_of_absurd_sides_is_refused() {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("model.safetensors");
    // No number in it, so that its length fits; but the distance between its rows has no number either.
    let header = format!(r#"{{"a":{{"dtype":"F32","shape":[0,{0},{0}],"data_offsets":[0,0]}}}}"#, 1u64 << 63);
    std::fs::write(&path, file(header.as_bytes(), &[])).unwrap();
    on_small_stack(|| assert!(refusal(memory_for(100), || read_all(&path)).contains("`a`")));
}
