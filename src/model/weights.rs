//! A checkpoint's tensors: checking, reading and writing.
//!
//! Names are canonical inside this crate, whatever layout a file has: `model.visual.…`,
//! `model.language_model.…` and `lm_head.weight`. [`NameLayout`] remembers the file's own, for saving. What the tensors
//! mean, and how they are laid out for speed, is not known here.

pub use super::tensor_file::{Entry, Numbers, TensorFile, write_atomically, write_tensors};
use crate::error::{Error, Result};
use crate::files;
use candle_core::{DType, Device, Tensor};
use half::{bf16, f16};
use safetensors::tensor::Dtype;
use serde_json::Value;
use std::borrow::Cow;
use std::collections::BTreeMap;
use std::path::{Component, Path, PathBuf};

/// How a checkpoint spells its tensors' names.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub enum NameLayout {
    /// `model.visual.…`, `model.language_model.…`, `lm_head.weight`: transformers since 4.52 in memory, Qwen3-VL on disk.
    #[default]
    Nested,
    /// `visual.…`, `model.…`, `lm_head.weight`: Qwen2-VL and Qwen2.5-VL on disk.
    Flat,
}

impl NameLayout {
    /// The canonical `name` as this layout spells it.
    pub fn spell(self, name: &str) -> String {
        match self {
            Self::Nested => name.to_string(),
            Self::Flat => {
                if let Some(rest) = name.strip_prefix("model.language_model.") {
                    format!("model.{rest}")
                } else {
                    name.strip_prefix("model.visual.")
                        .map_or_else(|| name.to_string(), |rest| format!("visual.{rest}"))
                }
            }
        }
    }
}

/// The canonical spelling of a tensor's name from any layout: `model.visual.…`, `model.language_model.…`,
/// `lm_head.weight`.
pub fn canonical_name(name: &str) -> String {
    const DECODER: [&str; 3] = ["embed_tokens.", "layers.", "norm."];
    let is_decoder = |rest: &str| DECODER.iter().any(|part| rest.starts_with(part));
    if name.starts_with("visual.") {
        return format!("model.{name}");
    }
    let bare = name.strip_prefix("language_model.model.").or_else(|| name.strip_prefix("language_model."));
    match bare.or_else(|| name.strip_prefix("model.")) {
        Some(rest) if is_decoder(rest) => format!("model.language_model.{rest}"),
        Some(rest) if rest == "lm_head.weight" => rest.to_string(),
        _ => name.to_string(),
    }
}

/// A whole checkpoint's tensors under their canonical names.
#[derive(Debug)]
pub struct Weights {
    dir: PathBuf,
    files: Vec<TensorFile>,
    /// Canonical name to the file and the name in it.
    places: BTreeMap<String, (usize, String)>,
    layout: NameLayout,
}

impl Weights {
    /// Opens `dir/model.safetensors`, or the shards that `dir/model.safetensors.index.json` lists.
    ///
    /// # Errors
    /// A data error when there are no weights, a shard is missing or damaged, or a name occurs twice.
    pub fn open(dir: &Path) -> Result<Self> {
        let single = dir.join("model.safetensors");
        let index = dir.join("model.safetensors.index.json");
        if single.exists() {
            let file = TensorFile::open(&single)?;
            let names = file.names();
            return Self::assemble(dir, vec![file], names.into_iter().map(|name| (0, name)).collect());
        }
        if index.exists() {
            return Self::open_sharded(dir, &index);
        }
        let help = if dir.join("pytorch_model.bin").exists()
            || dir.join("pytorch_model.bin.index.json").exists()
        {
            "only pickled weights are here; convert them to safetensors with transformers' `save_pretrained`"
        } else if dir.join("adapter_model.safetensors").exists() {
            "this is an adapter: pass it with --adapter, and its base model with --model"
        } else {
            "`--model` takes a directory with config.json and model.safetensors, or a hub id"
        };
        Err(Error::data(format!("no weights found\n  --> {}\n   = help: {help}", dir.display())))
    }

    fn open_sharded(dir: &Path, index: &Path) -> Result<Self> {
        let entries = weight_map(index)?;
        let mut files = Vec::new();
        let mut numbers: BTreeMap<&str, usize> = BTreeMap::new();
        let mut places = Vec::with_capacity(entries.len());
        for (name, shard) in &entries {
            let number = if let Some(&number) = numbers.get(shard.as_str()) {
                number
            } else {
                let path = dir.join(shard);
                if !path.exists() {
                    return Err(Error::data(format!(
                        "shard `{shard}` is listed but not there\n  --> {}\n   = help: fetch the missing file",
                        index.display()
                    )));
                }
                files.push(TensorFile::open(&path)?);
                numbers.insert(shard, files.len() - 1);
                files.len() - 1
            };
            files[number].info(name)?;
            places.push((number, name.clone()));
        }
        Self::assemble(dir, files, places)
    }

    fn assemble(dir: &Path, files: Vec<TensorFile>, entries: Vec<(usize, String)>) -> Result<Self> {
        let layout = if entries.iter().any(|(_, name)| {
            name.starts_with("visual.")
                || name.starts_with("model.layers.")
                || name.starts_with("model.embed_tokens.")
        }) {
            NameLayout::Flat
        } else {
            NameLayout::Nested
        };
        let mut places = BTreeMap::new();
        for (number, name) in entries {
            let canonical = canonical_name(&name);
            if let Some((_, other)) = places.insert(canonical.clone(), (number, name.clone())) {
                return Err(Error::data(format!(
                    "tensors `{other}` and `{name}` are both `{canonical}`\n  --> {}",
                    files[number].path().display()
                )));
            }
        }
        Ok(Self { dir: dir.to_path_buf(), files, places, layout })
    }

    /// The directory.
    pub fn dir(&self) -> &Path {
        &self.dir
    }

    /// How the files spell names.
    pub fn layout(&self) -> NameLayout {
        self.layout
    }

    /// Canonical names, sorted.
    pub fn names(&self) -> impl Iterator<Item = &str> {
        self.places.keys().map(String::as_str)
    }

    /// Whether the checkpoint has `name` (canonical).
    pub fn contains(&self, name: &str) -> bool {
        self.places.contains_key(name)
    }

    /// Shape of `name` (canonical), when there.
    pub fn shape(&self, name: &str) -> Option<&[usize]> {
        let (number, original) = self.places.get(name)?;
        self.files[*number].shape(original)
    }

    /// The name that the file itself uses for canonical `name`.
    pub fn original_name(&self, name: &str) -> Option<&str> {
        self.places.get(name).map(|(_, original)| original.as_str())
    }

    /// The files, in the order of opening.
    pub fn files(&self) -> &[TensorFile] {
        &self.files
    }

    /// Paths of the files, in the order of opening.
    pub fn paths(&self) -> impl Iterator<Item = &Path> {
        self.files.iter().map(TensorFile::path)
    }

    fn place(&self, name: &str) -> Result<(&TensorFile, &str)> {
        match self.places.get(name) {
            Some((number, original)) => Ok((&self.files[*number], original)),
            None => Err(Error::data(format!(
                "tensor `{name}` is missing\n  --> {}\n   = help: config.json promises it; config.json and weights may be of different models",
                self.dir.display()
            ))),
        }
    }

    /// The numbers of `name` (canonical), row-major, as the file holds them.
    ///
    /// # Errors
    /// A data error when it is missing, of another shape than `shape`, or no floating-point tensor.
    pub fn get(&self, name: &str, shape: &[usize]) -> Result<Numbers<'_>> {
        self.check(name, shape)?;
        let (file, original) = self.place(name)?;
        file.numbers(original)
    }

    /// Refuses `name` (canonical) when it is missing or of another shape than `shape`.
    ///
    /// # Errors
    /// A data error for either.
    pub fn check(&self, name: &str, shape: &[usize]) -> Result<()> {
        let (file, original) = self.place(name)?;
        let info = file.info(original)?;
        if info.shape != shape {
            return Err(Error::data(format!(
                "tensor `{original}` has shape {:?}, but config.json needs {shape:?}\n  --> {}\n   = help: config.json and weights may be of different models",
                info.shape,
                file.path().display()
            )));
        }
        Ok(())
    }

    /// The numbers of `name` (canonical) as float32, row-major.
    ///
    /// # Errors
    /// As [`Self::get`].
    pub fn values(&self, name: &str, shape: &[usize]) -> Result<Vec<f32>> {
        Ok(self.get(name, shape)?.into_floats())
    }

    /// Checks that every number of every tensor is finite.
    ///
    /// # Errors
    /// A non-finite error that names the first tensor which is not.
    pub fn check_finite(&self) -> Result<()> {
        for (number, original) in self.places.values() {
            let file = &self.files[*number];
            if let Some((index, _)) = file.numbers(original)?.not_finite() {
                return Err(Error::NonFinite(format!(
                    "tensor `{original}` holds a number that is not finite, at position {index}\n  --> {}",
                    file.path().display()
                )));
            }
        }
        Ok(())
    }
}

/// The files that the index of a sharded checkpoint lists, sorted, each once.
///
/// # Errors
/// A data error when the index is damaged or names anything but files of its own directory.
pub fn shards(index: &Path) -> Result<Vec<String>> {
    let mut shards: Vec<String> = weight_map(index)?.into_iter().map(|(_, shard)| shard).collect();
    shards.sort_unstable();
    shards.dedup();
    Ok(shards)
}

/// Each tensor of a sharded checkpoint with the file it is in, in the order of the index.
fn weight_map(index: &Path) -> Result<Vec<(String, String)>> {
    let wrong = |what: String| Error::data(format!("{what}\n  --> {}", index.display()));
    let text = files::read_text(index, "cannot read the index of the weights")?;
    let value: Value =
        serde_json::from_str(&text).map_err(|error| wrong(format!("not valid JSON: {error}")))?;
    let entries = value
        .get("weight_map")
        .and_then(Value::as_object)
        .ok_or_else(|| wrong("`weight_map` is missing".to_string()))?;
    let mut places = Vec::with_capacity(entries.len());
    for (name, shard) in entries {
        let shard = shard.as_str().filter(|shard| is_plain_file_name(shard)).ok_or_else(|| {
            wrong(format!(
                "tensor `{name}` is said to be in {shard}, which is not a file name in this directory"
            ))
        })?;
        places.push((name.clone(), shard.to_owned()));
    }
    Ok(places)
}

/// Whether `name` names a file right in the directory: no separators, no parent, no root.
fn is_plain_file_name(name: &str) -> bool {
    let mut parts = Path::new(name).components();
    matches!((parts.next(), parts.next()), (Some(Component::Normal(_)), None))
        && !name.contains(['/', '\\', '\0'])
}

/// Writes `tensors` to `dir/model.safetensors`: the same tensors give the same bytes, and a crash leaves either the
/// old file or the new one.
///
/// # Errors
/// As [`save_file`].
pub fn save(dir: &Path, tensors: &[(String, Tensor)]) -> Result<()> {
    std::fs::create_dir_all(dir).map_err(|error| Error::io("cannot create the directory", dir, error))?;
    save_file(&dir.join("model.safetensors"), tensors, &[("format", "pt")])
}

/// Writes `tensors` (float32, float16 or bfloat16) in the order of their names to `path`, through a temporary file.
///
/// # Errors
/// An I/O error; a data error when a name occurs twice or a tensor holds other numbers.
pub fn save_file(path: &Path, tensors: &[(String, Tensor)], metadata: &[(&str, &str)]) -> Result<()> {
    let mut sorted: Vec<&(String, Tensor)> = tensors.iter().collect();
    sorted.sort_by(|a, b| a.0.cmp(&b.0));
    if let Some(pair) = sorted.windows(2).find(|pair| pair[0].0 == pair[1].0) {
        return Err(Error::data(format!("tensor `{}` is to be saved twice", pair[0].0)));
    }
    let entries: Vec<Entry> = sorted
        .iter()
        .map(|(name, tensor)| {
            let dtype = match tensor.dtype() {
                DType::F32 => Dtype::F32,
                DType::F16 => Dtype::F16,
                DType::BF16 => Dtype::BF16,
                other => {
                    return Err(Error::data(format!("tensor `{name}` of type {other:?} cannot be saved")));
                }
            };
            Ok(Entry { name: name.clone(), dtype, shape: tensor.dims().to_vec() })
        })
        .collect::<Result<_>>()?;
    let metadata = metadata.iter().map(|(key, value)| (key.to_string(), value.to_string())).collect();
    write_tensors(path, &entries, &metadata, &mut |index| bytes_of(&sorted[index].1))
}

/// The tensor's numbers as a file holds them.
fn bytes_of(tensor: &Tensor) -> Result<Cow<'static, [u8]>> {
    fn encode<T: candle_core::WithDType, const N: usize>(
        flat: &Tensor,
        bytes_of: impl Fn(T) -> [u8; N],
    ) -> Result<Vec<u8>> {
        Ok(flat.to_vec1::<T>()?.into_iter().flat_map(bytes_of).collect())
    }
    let flat = tensor.to_device(&Device::Cpu)?.flatten_all()?;
    let bytes = match flat.dtype() {
        DType::F16 => encode(&flat, f16::to_le_bytes)?,
        DType::BF16 => encode(&flat, bf16::to_le_bytes)?,
        _ => encode(&flat, f32::to_le_bytes)?,
    };
    Ok(bytes.into())
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::model::test_support::fixtures;
    use tempfile::tempdir;

    fn tensor(values: &[f32]) -> Tensor {
        Tensor::new(values, &Device::Cpu).unwrap()
    }

    fn raw(header: &str, data: usize) -> Vec<u8> {
        let mut bytes = (header.len() as u64).to_le_bytes().to_vec();
        bytes.extend_from_slice(header.as_bytes());
        bytes.extend(std::iter::repeat_n(0, data));
        bytes
    }

    #[test]
    fn every_layout_has_one_canonical_spelling_that_can_be_undone() {
        for (flat, canonical) in [
            ("visual.merger.ln_q.weight", "model.visual.merger.ln_q.weight"),
            ("model.layers.3.mlp.up_proj.weight", "model.language_model.layers.3.mlp.up_proj.weight"),
            ("model.embed_tokens.weight", "model.language_model.embed_tokens.weight"),
            ("model.norm.weight", "model.language_model.norm.weight"),
            ("lm_head.weight", "lm_head.weight"),
        ] {
            assert_eq!(canonical_name(flat), canonical);
            assert_eq!(canonical_name(canonical), canonical);
            assert_eq!(NameLayout::Flat.spell(canonical), flat);
            assert_eq!(NameLayout::Nested.spell(canonical), canonical);
        }
        assert_eq!(canonical_name("language_model.model.norm.weight"), "model.language_model.norm.weight");
        assert_eq!(canonical_name("language_model.layers.0.x"), "model.language_model.layers.0.x");
        assert_eq!(canonical_name("language_model.lm_head.weight"), "lm_head.weight");
    }

    #[test]
    fn what_is_saved_is_read_back_and_the_bytes_do_not_depend_on_the_order() {
        let dir = tempdir().unwrap();
        let half = tensor(&[1.5, -2.0]).to_dtype(DType::BF16).unwrap();
        let transposed =
            Tensor::new(&[[1f32, 2.0, 3.0], [4.0, 5.0, 6.0]], &Device::Cpu).unwrap().t().unwrap();
        let a = ("b.half".to_string(), half);
        let b = ("visual.a".to_string(), transposed);
        save(dir.path(), &[a.clone(), b.clone()]).unwrap();
        let first = std::fs::read(dir.path().join("model.safetensors")).unwrap();
        save(dir.path(), &[b, a]).unwrap();
        assert_eq!(first, std::fs::read(dir.path().join("model.safetensors")).unwrap());
        assert_eq!(std::fs::read_dir(dir.path()).unwrap().count(), 1);
        let weights = Weights::open(dir.path()).unwrap();
        assert_eq!(weights.values("model.visual.a", &[3, 2]).unwrap(), [1.0, 4.0, 2.0, 5.0, 3.0, 6.0]);
        assert_eq!(weights.values("b.half", &[2]).unwrap(), [1.5, -2.0]);
        assert_eq!(weights.layout(), NameLayout::Flat);
        assert_eq!(weights.original_name("model.visual.a"), Some("visual.a"));
    }

    #[test]
    fn a_wrong_request_names_tensor_shapes_and_file() {
        let dir = tempdir().unwrap();
        save(dir.path(), &[("x".to_string(), tensor(&[1.0, 2.0]))]).unwrap();
        let weights = Weights::open(dir.path()).unwrap();
        let text = weights.values("x", &[3]).unwrap_err().to_string();
        assert!(text.contains("`x`") && text.contains("[2]") && text.contains("[3]"), "{text}");
        assert!(text.contains("model.safetensors"), "{text}");
        assert!(weights.values("y", &[2]).unwrap_err().to_string().contains("`y` is missing"));
    }

    #[test]
    fn numbers_that_are_not_finite_are_found() {
        let dir = tempdir().unwrap();
        save(dir.path(), &[("a".to_string(), tensor(&[1.0])), ("bad".to_string(), tensor(&[0.0, f32::NAN]))])
            .unwrap();
        let error = Weights::open(dir.path()).unwrap().check_finite().unwrap_err();
        assert!(matches!(error, Error::NonFinite(_)) && error.to_string().contains("`bad`"), "{error}");
        save(dir.path(), &[("a".to_string(), tensor(&[1.0]))]).unwrap();
        Weights::open(dir.path()).unwrap().check_finite().unwrap();
    }

    #[test]
    fn damaged_files_are_refused_with_their_path() {
        let dir = tempdir().unwrap();
        let good = r#"{"a":{"dtype":"F32","shape":[2],"data_offsets":[0,8]},"b":{"dtype":"F32","shape":[1],"data_offsets":[8,12]}}"#;
        let cases: Vec<(&str, Vec<u8>)> = vec![
            ("empty", Vec::new()),
            ("short", vec![1, 2, 3]),
            ("huge header", [&u64::MAX.to_le_bytes()[..], b"{}"].concat()),
            ("long header", [&200u64.to_le_bytes()[..], b"{}"].concat()),
            ("truncated", raw(good, 11)),
            ("too long", raw(good, 13)),
            ("overlap", raw(&good.replace("[8,12]", "[4,8]"), 12)),
            ("backwards", raw(&good.replace("[8,12]", "[8,4]"), 12)),
            ("beyond", raw(&good.replace("[8,12]", "[8,9999]"), 12)),
            ("size", raw(&good.replace("[2]", "[3]"), 12)),
            ("overflow", raw(&good.replace("[2]", "[18446744073709551615,4]"), 12)),
            ("not json", raw("[nonsense", 0)),
            ("pointer", b"version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 1\n".to_vec()),
        ];
        let path = dir.path().join("model.safetensors");
        std::fs::write(&path, raw(good, 12)).unwrap();
        assert!(Weights::open(dir.path()).is_ok());
        for (what, bytes) in cases {
            std::fs::write(&path, bytes).unwrap();
            let error = Weights::open(dir.path()).map(|_| ()).expect_err(what);
            assert!(matches!(error, Error::Data(_)), "{what}: {error}");
            assert!(error.to_string().contains("model.safetensors"), "{what}: {error}");
            assert_eq!(error.to_string().contains("git lfs pull"), what == "pointer", "{what}: {error}");
        }
        let integers = raw(r#"{"a":{"dtype":"I32","shape":[1],"data_offsets":[0,4]}}"#, 4);
        std::fs::write(&path, integers).unwrap();
        assert!(
            Weights::open(dir.path()).unwrap().values("a", &[1]).unwrap_err().to_string().contains("I32")
        );
    }

    #[test]
    fn a_sharded_checkpoint_may_not_miss_a_shard_or_leave_its_directory() {
        let dir = tempdir().unwrap();
        save_file(&dir.path().join("one.safetensors"), &[("a".to_string(), tensor(&[1.0]))], &[]).unwrap();
        save_file(&dir.path().join("two.safetensors"), &[("b".to_string(), tensor(&[2.0]))], &[]).unwrap();
        let open = |index: &str| {
            std::fs::write(dir.path().join("model.safetensors.index.json"), index).unwrap();
            Weights::open(dir.path())
        };
        let weights = open(r#"{"weight_map":{"a":"one.safetensors","b":"two.safetensors"}}"#).unwrap();
        assert_eq!(weights.values("b", &[1]).unwrap(), [2.0]);
        assert_eq!(weights.names().collect::<Vec<_>>(), ["a", "b"]);
        let outside = dir.path().parent().unwrap().join("outside.safetensors");
        for (index, part) in [
            (r#"{"weight_map":{"a":"three.safetensors"}}"#, "three.safetensors"),
            (r#"{"weight_map":{"a":"../outside.safetensors"}}"#, "not a file name"),
            (&format!(r#"{{"weight_map":{{"a":{:?}}}}}"#, outside.display().to_string()), "not a file name"),
            (r#"{"weight_map":{"a":".."}}"#, "not a file name"),
            (r#"{"weight_map":{"a":3}}"#, "not a file name"),
            (r#"{"weight_map":{"b":"one.safetensors"}}"#, "`b` is missing"),
            (r"{}", "weight_map"),
            ("nonsense", "not valid JSON"),
        ] {
            let error = open(index).map(|_| ()).expect_err(index);
            assert!(matches!(error, Error::Data(_)) && error.to_string().contains(part), "{index}: {error}");
        }
    }

    #[test]
    fn two_spellings_of_one_tensor_are_refused() {
        let dir = tempdir().unwrap();
        let twice =
            [("visual.a".to_string(), tensor(&[1.0])), ("model.visual.a".to_string(), tensor(&[2.0]))];
        save(dir.path(), &twice).unwrap();
        assert!(Weights::open(dir.path()).unwrap_err().to_string().contains("both `model.visual.a`"));
        assert!(save(dir.path(), &[twice[0].clone(), twice[0].clone()]).is_err());
    }

    #[test]
    fn what_is_no_checkpoint_says_what_it_is() {
        let dir = tempdir().unwrap();
        let message = || Weights::open(dir.path()).unwrap_err().to_string();
        assert!(message().contains("no weights found"));
        std::fs::write(dir.path().join("adapter_model.safetensors"), "").unwrap();
        assert!(message().contains("--adapter"));
        std::fs::write(dir.path().join("pytorch_model.bin"), "").unwrap();
        assert!(message().contains("pickled"));
    }

    #[test]
    fn reference_checkpoints_agree_across_their_layouts() {
        let Some(dir) = fixtures() else { return };
        let open = |name: &str| Weights::open(&dir.join("checkpoints").join(name)).unwrap();
        let names = |weights: &Weights| weights.names().map(String::from).collect::<Vec<_>>();
        let (flat, nested, sharded) = (open("qwen2_5_vl"), open("qwen2_5_vl_bf16"), open("qwen3_vl"));
        assert_eq!(flat.layout(), NameLayout::Flat);
        assert_eq!(nested.layout(), NameLayout::Nested);
        assert_eq!(sharded.layout(), NameLayout::Nested);
        for weights in [&flat, &nested, &sharded] {
            assert!(weights.contains("model.language_model.norm.weight"));
            assert!(names(weights).iter().all(|name| {
                name.starts_with("model.visual.")
                    || name.starts_with("model.language_model.")
                    || name == "lm_head.weight"
            }));
            weights.check_finite().unwrap();
        }
        assert_eq!(sharded.paths().count(), 2);
        assert_eq!(names(&flat), names(&open("qwen2_5_vl_legacy")));
    }
}
