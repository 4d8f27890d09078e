//! Low-rank adapters in PEFT's format: which modules they touch, their files, and their sum with the weights.
//!
//! # References
//! Hu et al. 2021, <https://arxiv.org/abs/2106.09685>; rank-stabilised scaling: Kalajdzievski 2023,
//! <https://arxiv.org/abs/2312.03732>. Matching follows PEFT 0.21: names are those of `named_modules()`.

use super::weights::{Numbers, TensorFile, canonical_name, save_file};
use crate::error::{Error, Result};
use crate::files;
use crate::nn::linear::LowRank;
use crate::rng;
use candle_core::{Device, Tensor};
use fancy_regex::Regex;
use rand::Rng;
use serde_json::{Map, Value, json};
use std::cell::RefCell;
use std::collections::{BTreeMap, BTreeSet};
use std::path::{Path, PathBuf};

/// Name of the file with the settings.
pub const CONFIG_FILE: &str = "adapter_config.json";
/// Name of the file with the tensors.
pub const TENSOR_FILE: &str = "adapter_model.safetensors";
/// What PEFT puts before the base model's own names.
pub(crate) const ROOT: &str = "base_model.model.";

/// Which modules are meant.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Modules {
    /// Every linear layer but the output layer.
    AllLinear,
    /// Those whose name is one of these or ends with `.` and one of these.
    Names(Vec<String>),
    /// Those whose whole name matches this regular expression (in Python's syntax).
    Pattern(String),
}

impl Modules {
    /// `all-linear`, names with commas between (or a JSON list of them), or a regular expression, as people type them.
    pub fn parse(text: &str) -> Self {
        let is_name = |c: char| c.is_ascii_alphanumeric() || matches!(c, '_' | '.' | '-');
        if let Ok(names) = serde_json::from_str::<Vec<String>>(text) {
            return Self::Names(names);
        }
        let names = text.split(',').map(|name| name.trim().to_owned());
        let names: Vec<String> = names.filter(|name| !name.is_empty()).collect();
        if text == "all-linear" {
            Self::AllLinear
        } else if names.iter().all(|name| name.chars().all(is_name)) {
            Self::Names(names)
        } else {
            Self::Pattern(text.to_owned())
        }
    }

    fn from_json(value: &Value, key: &str) -> Result<Option<Self>> {
        match value {
            Value::Null => Ok(None),
            Value::String(text) if text == "all-linear" => Ok(Some(Self::AllLinear)),
            Value::String(text) => Ok(Some(Self::Pattern(text.clone()))),
            Value::Array(names) => {
                let names = names.iter().map(|name| name.as_str().map(str::to_owned));
                let names: Option<Vec<String>> = names.collect();
                names.map(|names| Some(Self::Names(names))).ok_or_else(|| wrong_type(key, "a list of names"))
            }
            _ => Err(wrong_type(key, "a text or a list of names")),
        }
    }

    fn to_json(&self) -> Value {
        match self {
            Self::AllLinear => json!("all-linear"),
            Self::Names(names) => json!(names),
            Self::Pattern(text) => json!(text),
        }
    }

    /// Refuses a regular expression that is none.
    ///
    /// # Errors
    /// A data error that shows it.
    pub fn check(&self) -> Result<()> {
        match self {
            Self::Pattern(pattern) => match Regex::new(pattern) {
                Ok(_) => Ok(()),
                Err(error) => Err(Error::data(format!("`{pattern}` is no regular expression: {error}"))),
            },
            Self::AllLinear | Self::Names(_) => Ok(()),
        }
    }

    /// Whether the linear layer `module` is meant.
    ///
    /// # Errors
    /// A data error for a regular expression that is none.
    pub fn contain(&self, module: &str) -> Result<bool> {
        match self {
            Self::AllLinear => Ok(module != "lm_head"),
            Self::Names(names) => Ok(names.iter().any(|name| {
                module.strip_suffix(name.as_str()).is_some_and(|rest| rest.is_empty() || rest.ends_with('.'))
            })),
            Self::Pattern(pattern) => matches(&format!("^(?:{pattern})$"), module),
        }
    }
}

fn wrong_type(key: &str, wanted: &str) -> Error {
    Error::data(format!("{CONFIG_FILE}: `{key}` must be {wanted}"))
}

fn matches(pattern: &str, text: &str) -> Result<bool> {
    let bad =
        |error: fancy_regex::Error| Error::data(format!("cannot match the pattern `{pattern}`: {error}"));
    Regex::new(pattern).map_err(bad)?.is_match(text).map_err(bad)
}

/// What `adapter_config.json` says, as far as it decides numbers.
#[derive(Debug, Clone, PartialEq)]
pub struct LoraConfig {
    /// Rank where no pattern says otherwise.
    pub rank: usize,
    /// The update is scaled by alpha / rank.
    pub alpha: f64,
    /// Scale by alpha / sqrt(rank) instead.
    pub use_rslora: bool,
    /// Modules with an adapter.
    pub target_modules: Modules,
    /// Modules without one all the same.
    pub exclude_modules: Option<Modules>,
    /// Layers with an adapter; none: all.
    pub layers_to_transform: Option<Vec<usize>>,
    /// Names of the lists that layers are counted in.
    pub layers_pattern: Vec<String>,
    /// Ranks of modules whose name ends with a match, the first that matches.
    pub rank_pattern: Vec<(String, f64)>,
    /// Alphas, likewise.
    pub alpha_pattern: Vec<(String, f64)>,
    /// Share of the input's entries that training dropped before the update; nothing is dropped afterwards.
    pub dropout: f64,
    /// The base model, as the file names it.
    pub base_model: Option<String>,
}

impl LoraConfig {
    /// The same rank and alpha for every target.
    pub fn new(rank: usize, alpha: f64, target_modules: Modules) -> Self {
        Self {
            rank,
            alpha,
            use_rslora: false,
            target_modules,
            exclude_modules: None,
            layers_to_transform: None,
            layers_pattern: Vec::new(),
            rank_pattern: Vec::new(),
            alpha_pattern: Vec::new(),
            dropout: 0.0,
            base_model: None,
        }
    }

    /// Reads the settings, and refuses every variant that would compute something else.
    ///
    /// # Errors
    /// A data error that names the key.
    pub fn from_json(value: &Value) -> Result<Self> {
        let kind = value["peft_type"].as_str().unwrap_or("LORA");
        if kind != "LORA" {
            return Err(Error::data(format!(
                "{CONFIG_FILE}: `peft_type` is {kind}; LORA is supported\n   = help: merge the adapter with PEFT's `merge_and_unload`"
            )));
        }
        refuse_variants(value)?;
        let number = |key: &str| value[key].as_f64().ok_or_else(|| wrong_type(key, "a number"));
        let rank = value["r"]
            .as_u64()
            .filter(|rank| *rank > 0)
            .ok_or_else(|| wrong_type("r", "a positive whole number"))?;
        let patterns = |key: &str| -> Result<Vec<(String, f64)>> {
            let Some(table) = value[key].as_object() else { return Ok(Vec::new()) };
            let entry = |(pattern, value): (&String, &Value)| {
                let number = value.as_f64().filter(|number| *number > 0.0);
                Ok((pattern.clone(), number.ok_or_else(|| wrong_type(key, "a table of positive numbers"))?))
            };
            table.iter().map(entry).collect()
        };
        let layers_to_transform = match &value["layers_to_transform"] {
            Value::Null => None,
            Value::Number(one) => {
                Some(vec![one.as_u64().ok_or_else(|| wrong_type("layers_to_transform", "a layer"))? as usize])
            }
            Value::Array(many) => Some(
                many.iter()
                    .map(|one| {
                        one.as_u64()
                            .map(|layer| layer as usize)
                            .ok_or_else(|| wrong_type("layers_to_transform", "layers"))
                    })
                    .collect::<Result<_>>()?,
            ),
            _ => return Err(wrong_type("layers_to_transform", "a layer or a list of layers")),
        };
        let layers_pattern = match &value["layers_pattern"] {
            Value::String(one) => vec![one.clone()],
            Value::Array(many) => many.iter().filter_map(|one| one.as_str().map(str::to_owned)).collect(),
            _ => Vec::new(),
        };
        let alpha = number("lora_alpha")?;
        if !(alpha.is_finite() && alpha != 0.0 && alpha.abs() < 1e9) {
            return Err(wrong_type("lora_alpha", "a number that scales, not 0 and not beyond 1e9"));
        }
        Ok(Self {
            rank: rank as usize,
            alpha,
            use_rslora: switch(value, "use_rslora")?,
            target_modules: Modules::from_json(&value["target_modules"], "target_modules")?
                .unwrap_or_else(|| Modules::Names(Vec::new())),
            exclude_modules: Modules::from_json(&value["exclude_modules"], "exclude_modules")?,
            layers_to_transform,
            layers_pattern,
            rank_pattern: patterns("rank_pattern")?,
            alpha_pattern: patterns("alpha_pattern")?,
            // It decides no number here: what training drops is its own setting.
            dropout: value["lora_dropout"].as_f64().unwrap_or(0.0),
            base_model: value["base_model_name_or_path"].as_str().map(str::to_owned),
        })
    }

    /// The settings as PEFT writes them.
    pub fn to_json(&self) -> Value {
        let table = |patterns: &[(String, f64)]| -> Value {
            patterns
                .iter()
                .map(|(pattern, value)| (pattern.clone(), whole_or_float(*value)))
                .collect::<Map<_, _>>()
                .into()
        };
        json!({
            "alpha_pattern": table(&self.alpha_pattern),
            "auto_mapping": null,
            "base_model_name_or_path": self.base_model,
            "bias": "none",
            "exclude_modules": self.exclude_modules.as_ref().map(Modules::to_json),
            "fan_in_fan_out": false,
            "inference_mode": true,
            "init_lora_weights": true,
            "layers_pattern": if self.layers_pattern.is_empty() { Value::Null } else { json!(self.layers_pattern) },
            "layers_to_transform": self.layers_to_transform,
            "lora_alpha": whole_or_float(self.alpha),
            "lora_dropout": self.dropout,
            "modules_to_save": null,
            "peft_type": "LORA",
            "r": self.rank,
            "rank_pattern": table(&self.rank_pattern),
            "revision": null,
            "target_modules": self.target_modules.to_json(),
            "task_type": "CAUSAL_LM",
            "use_dora": false,
            "use_rslora": self.use_rslora,
        })
    }

    /// Whether the linear layer `module` gets an adapter.
    ///
    /// # Errors
    /// A data error for a regular expression that is none.
    pub fn targets(&self, module: &str) -> Result<bool> {
        if let Some(excluded) = &self.exclude_modules
            && excluded.contain(module)?
        {
            return Ok(false);
        }
        Ok(self.target_modules.contain(module)? && self.has_layer(module)?)
    }

    fn has_layer(&self, module: &str) -> Result<bool> {
        let Some(layers) = &self.layers_to_transform else { return Ok(true) };
        let list = if self.layers_pattern.is_empty() {
            r"[^.]*".to_owned()
        } else {
            format!("(?:{})", self.layers_pattern.join("|"))
        };
        let pattern = format!(r"^.*\.{list}\.(\d+)\.");
        let bad =
            |error: fancy_regex::Error| Error::data(format!("cannot match the pattern `{pattern}`: {error}"));
        let found = Regex::new(&pattern).map_err(bad)?.captures(module).map_err(bad)?;
        let layer = found.and_then(|groups| groups.get(1)?.as_str().parse::<usize>().ok());
        Ok(layer.is_some_and(|layer| layers.contains(&layer)))
    }

    /// Rank and alpha of `module`, which may also go by the names in `aliases`.
    fn rank_and_alpha(&self, module: &str, aliases: &[&str]) -> Result<(usize, f64)> {
        let find = |patterns: &[(String, f64)]| -> Result<Option<f64>> {
            for (pattern, value) in patterns {
                for name in std::iter::once(&module).chain(aliases) {
                    if matches(&format!(r"^(?:.*\.)?(?:{pattern})$"), name)? {
                        return Ok(Some(*value));
                    }
                }
            }
            Ok(None)
        };
        let rank = find(&self.rank_pattern)?.map_or(self.rank, |rank| rank as usize);
        Ok((rank, find(&self.alpha_pattern)?.unwrap_or(self.alpha)))
    }

    /// Rank and scaling of `module`, likewise.
    fn shape_of(&self, module: &str, aliases: &[&str]) -> Result<(usize, f64)> {
        let (rank, alpha) = self.rank_and_alpha(module, aliases)?;
        let divisor = if self.use_rslora { (rank as f64).sqrt() } else { rank as f64 };
        Ok((rank, alpha / divisor))
    }
}

/// PEFT writes whole alphas without a point.
fn whole_or_float(value: f64) -> Value {
    if value.fract() == 0.0 && value.abs() < 1e15 { json!(value as i64) } else { json!(value) }
}

/// A setting that is on or off; absent is off.
fn switch(value: &Value, key: &str) -> Result<bool> {
    match &value[key] {
        Value::Null => Ok(false),
        Value::Bool(is_on) => Ok(*is_on),
        _ => Err(wrong_type(key, "true or false")),
    }
}

/// The modules that the settings say are saved whole, beside the low-rank ones.
fn saved_modules(value: &Value) -> Result<Vec<&str>> {
    const KEY: &str = "modules_to_save";
    let wrong = || wrong_type(KEY, "a list of names");
    match &value[KEY] {
        Value::Null => Ok(Vec::new()),
        Value::Array(names) => names.iter().map(|name| name.as_str().ok_or_else(wrong)).collect(),
        _ => Err(wrong()),
    }
}

/// Refuses what is not plain low-rank adaptation rather than computing something else.
fn refuse_variants(value: &Value) -> Result<()> {
    const SWITCHES: [&str; 5] = ["use_dora", "use_qalora", "use_bdlora", "fan_in_fan_out", "lora_bias"];
    const SETTINGS: [&str; 8] = [
        "layer_replication",
        "target_parameters",
        "trainable_token_indices",
        "alora_invocation_tokens",
        "arrow_config",
        "kasa_config",
        "velora_config",
        "monteclora_config",
    ];
    let refused = |key: &str| {
        Error::data(format!(
            "{CONFIG_FILE}: `{key}` is set, which is not supported\n   = help: merge the adapter with PEFT's `merge_and_unload`, and name the merged directory with `--model`"
        ))
    };
    for key in SWITCHES {
        if switch(value, key)? {
            return Err(refused(key));
        }
    }
    let is_set = |value: &Value| match value {
        Value::Null => false,
        Value::Array(list) => !list.is_empty(),
        Value::Object(table) => !table.is_empty(),
        _ => true,
    };
    if let Some(key) = SETTINGS.iter().find(|key| is_set(&value[**key])) {
        return Err(refused(key));
    }
    // These change the base weights when the adapter is made, so that the adapter fits no published base.
    let start = value["init_lora_weights"].as_str().unwrap_or_default();
    if ["pissa", "olora", "corda", "loftq", "lora_ga"].iter().any(|word| start.starts_with(word)) {
        return Err(refused("init_lora_weights"));
    }
    Ok(())
}

/// A trained adapter as its files hold it.
#[derive(Debug, Clone)]
pub struct Adapter {
    /// Where it was read.
    pub dir: PathBuf,
    /// Its settings.
    pub config: LoraConfig,
    /// By canonical module name.
    layers: BTreeMap<String, LowRank>,
    /// What the file calls a module, by its canonical name, where that is another.
    own_names: BTreeMap<String, String>,
    /// Tensors that replace the base's (`modules_to_save`, trained biases), by canonical name.
    whole: BTreeMap<String, Tensor>,
    /// Which of both a model has asked for so far.
    used: RefCell<BTreeSet<String>>,
}

impl Adapter {
    /// Reads `adapter_config.json` and `adapter_model.safetensors`.
    ///
    /// # Errors
    /// A data error for a missing or damaged file, a variant that is not supported, a tensor that is no part of one, or
    /// a number that is not finite.
    pub fn load(dir: &Path) -> Result<Self> {
        let here = |error: Error| match error {
            Error::Data(message) if !message.contains("-->") => {
                Error::data(format!("{message}\n  --> {}", dir.display()))
            }
            other => other,
        };
        let path = dir.join(CONFIG_FILE);
        let text = files::read(&path, "cannot read the adapter")?;
        let value: Value = serde_json::from_slice(&text)
            .map_err(|error| Error::data(format!("not valid JSON: {error}\n  --> {}", path.display())))?;
        let config = LoraConfig::from_json(&value).map_err(here)?;
        let path = dir.join(TENSOR_FILE);
        if !path.exists() && dir.join("adapter_model.bin").exists() {
            return Err(Error::data(format!(
                "only pickled weights are here\n  --> {}\n   = help: save the adapter with PEFT's `save_pretrained`, which writes safetensors",
                dir.display()
            )));
        }
        let file = TensorFile::open(&path)?;
        let mut adapter = Self {
            dir: dir.to_path_buf(),
            config,
            layers: BTreeMap::new(),
            own_names: BTreeMap::new(),
            whole: BTreeMap::new(),
            used: RefCell::default(),
        };
        adapter.read(&file).map_err(here)?;
        adapter.check_saved(&saved_modules(&value).map_err(here)?, &file)?;
        Ok(adapter)
    }

    /// Refuses an adapter whose file lacks one of the modules that its settings say are saved whole: the base's would stand in its
    /// place without a word.
    fn check_saved(&self, modules: &[&str], file: &TensorFile) -> Result<()> {
        // As the file spells them and canonical ones, of the module itself or of modules inside it.
        let names: Vec<String> =
            file.names().into_iter().filter(|name| low_rank_name(name).is_none()).collect();
        let names = || names.iter().chain(self.whole.keys());
        let is_there = |module: &str| {
            let (inside, below) = (format!("{module}."), format!(".{module}."));
            names().any(|name| name.starts_with(&inside) || name.contains(&below))
        };
        let Some(module) = modules.iter().find(|module| !is_there(module)) else { return Ok(()) };
        Err(Error::data(format!(
            "`modules_to_save` names `{module}`, and the adapter holds no tensor of it: the model's own would stay in its place\n  --> {}\n   = help: save the adapter again with PEFT's `save_pretrained`; where nothing of `{module}` was trained, take it out of `modules_to_save` in {CONFIG_FILE}",
            self.dir.display()
        )))
    }

    fn read(&mut self, file: &TensorFile) -> Result<()> {
        // Canonical module name to the file's own name, A and B.
        type Halves = (String, Option<Tensor>, Option<Tensor>);
        let mut halves: BTreeMap<String, Halves> = BTreeMap::new();
        for name in file.names() {
            let bare = name.strip_prefix(ROOT).unwrap_or(&name);
            let values = file.floats(&name)?;
            if let Some(place) = values.iter().position(|value| !value.is_finite()) {
                return Err(Error::NonFinite(format!(
                    "adapter tensor `{name}` holds {} at position {place}\n  --> {}",
                    values[place],
                    self.dir.display()
                )));
            }
            let tensor = Tensor::from_vec(values, file.shape(&name).unwrap_or_default(), &Device::Cpu)?;
            if bare.contains(".lora_embedding_") || bare.contains(".lora_magnitude_vector") {
                return Err(Error::data(format!(
                    "adapter tensor `{name}` is of a kind that is not supported"
                )));
            }
            if let Some((module, half)) = low_rank_name(bare) {
                let entry =
                    halves.entry(canonical_module(module)).or_insert_with(|| (module.to_owned(), None, None));
                let slot = if half == 'A' { &mut entry.1 } else { &mut entry.2 };
                if slot.replace(tensor).is_some() {
                    return Err(Error::data(format!("adapter tensor `{name}` is there twice")));
                }
            } else {
                let bare = bare
                    .replace(".base_layer.", ".")
                    .replace(".modules_to_save.default.", ".")
                    .replace(".modules_to_save.", ".");
                self.whole.insert(canonical_name(&bare), tensor);
            }
        }
        for (module, (own_name, a, b)) in halves {
            let (Some(a), Some(b)) = (a, b) else {
                return Err(Error::data(format!("the adapter of `{own_name}` lacks lora_A or lora_B")));
            };
            let (rank, scaling) = self.config.shape_of(&module, &[&own_name])?;
            let fits = matches!((a.dims(), b.dims()), (&[rows, _], &[_, columns]) if rows == rank && columns == rank);
            if !fits {
                return Err(Error::data(format!(
                    "the adapter of `{own_name}` has lora_A {:?} and lora_B {:?}; its rank is {rank} by {CONFIG_FILE}",
                    a.dims(),
                    b.dims()
                )));
            }
            if own_name != module {
                self.own_names.insert(module.clone(), own_name);
            }
            self.layers.insert(module, LowRank { a, b, scaling });
        }
        if self.layers.is_empty() && self.whole.is_empty() {
            return Err(Error::data("the adapter holds no tensor"));
        }
        Ok(())
    }

    /// Names of the modules it touches, sorted.
    pub fn modules(&self) -> impl Iterator<Item = &str> {
        self.layers.keys().map(String::as_str)
    }

    /// Names of the tensors that it holds whole in place of the base's, sorted. They are no low-rank update: [`save`] does not
    /// write them.
    pub fn replaced(&self) -> impl Iterator<Item = &str> {
        self.whole.keys().map(String::as_str)
    }

    /// The settings to [`save`] its modules with, under their canonical names: a pattern that means a module by the file's own
    /// name alone would not be met by these.
    ///
    /// # Errors
    /// A data error for a regular expression that is none.
    pub fn settings(&self) -> Result<LoraConfig> {
        let mut settings = self.config.clone();
        for (module, own_name) in &self.own_names {
            let (rank, alpha) = self.config.rank_and_alpha(module, &[own_name.as_str()])?;
            if (rank, alpha) == self.config.rank_and_alpha(module, &[])? {
                continue;
            }
            // The first match decides, and a name as a whole matches nothing else.
            for (patterns, value) in
                [(&mut settings.rank_pattern, rank as f64), (&mut settings.alpha_pattern, alpha)]
            {
                patterns.retain(|(pattern, _)| pattern != module);
                patterns.insert(0, (module.clone(), value));
            }
        }
        for module in self.layers.keys() {
            if !settings.targets(module)? {
                return Ok(LoraConfig {
                    target_modules: Modules::Names(self.layers.keys().cloned().collect()),
                    exclude_modules: None,
                    layers_to_transform: None,
                    layers_pattern: Vec::new(),
                    ..settings
                });
            }
        }
        Ok(settings)
    }

    /// What stands over the linear layer `module` of shape `[out, in]`.
    ///
    /// # Errors
    /// A data error when the adapter was made for another shape.
    pub fn layer(&self, module: &str, shape: [usize; 2]) -> Result<Option<LowRank>> {
        let Some(layer) = self.layers.get(module) else { return Ok(None) };
        let own = [layer.b.dim(0)?, layer.a.dim(1)?];
        if own != shape {
            return Err(Error::data(format!(
                "the adapter of `{module}` is for a weight {own:?}, the model's is {shape:?}\n  --> {}\n   = help: it was made for {}",
                self.dir.display(),
                self.config.base_model.as_deref().unwrap_or("another model")
            )));
        }
        self.used.borrow_mut().insert(module.to_owned());
        Ok(Some(layer.clone()))
    }

    /// What replaces the base's tensor `name`, where something does.
    ///
    /// # Errors
    /// A data error when it has another shape.
    pub fn replacement(&self, name: &str, shape: &[usize]) -> Result<Option<Vec<f32>>> {
        let Some(own) = self.whole.get(name) else { return Ok(None) };
        self.used.borrow_mut().insert(name.to_owned());
        if own.dims() != shape {
            return Err(Error::data(format!(
                "the adapter's `{name}` is {:?}, the model's {shape:?}\n  --> {}",
                own.dims(),
                self.dir.display()
            )));
        }
        Ok(Some(own.flatten_all()?.to_vec1()?))
    }

    /// The base's tensor `name` with the adapter added: W + scaling · B · A, in float32; `base` itself where the
    /// adapter leaves it alone.
    ///
    /// # Errors
    /// As [`Adapter::layer`] and [`Adapter::replacement`].
    pub fn merged<'a>(&self, name: &str, shape: &[usize], base: Numbers<'a>) -> Result<Numbers<'a>> {
        let base = self.replacement(name, shape)?.map_or(base, Numbers::from);
        let (Some(module), [out, input]) = (name.strip_suffix(".weight"), shape) else {
            return Ok(base);
        };
        let Some(LowRank { a, b, scaling }) = self.layer(module, [*out, *input])? else { return Ok(base) };
        let sum = (base.into_tensor(shape)? + (b.matmul(&a)? * scaling)?)?;
        let sum: Vec<f32> = sum.flatten_all()?.to_vec1()?;
        if sum.iter().any(|value| !value.is_finite()) {
            return Err(Error::NonFinite(format!(
                "with the adapter added, `{name}` is not all finite\n  --> {}",
                self.dir.display()
            )));
        }
        Ok(sum.into())
    }

    /// Refuses an adapter of which a whole model has asked for less than everything.
    ///
    /// # Errors
    /// A data error that names the first tensor the model has no place for.
    pub fn check_used(&self) -> Result<()> {
        let used = self.used.borrow();
        match self.layers.keys().chain(self.whole.keys()).find(|name| !used.contains(*name)) {
            None => Ok(()),
            Some(name) => Err(Error::data(format!(
                "the adapter is for `{name}`, and the model has no such linear layer\n  --> {}\n   = help: it was made for {}",
                self.dir.display(),
                self.config.base_model.as_deref().unwrap_or("another model")
            ))),
        }
    }
}

/// Module and half (`A` or `B`) of a low-rank tensor's name; some versions put the adapter's name inside.
fn low_rank_name(name: &str) -> Option<(&str, char)> {
    let (module, rest) = name.rsplit_once(".lora_")?;
    let mut parts = rest.split('.');
    let half = match parts.next()? {
        "A" => 'A',
        "B" => 'B',
        _ => return None,
    };
    (parts.next_back() == Some("weight")).then_some((module, half))
}

fn canonical_module(module: &str) -> String {
    let name = canonical_name(&format!("{module}.weight"));
    name.strip_suffix(".weight").unwrap_or(&name).to_owned()
}

/// A new adapter's layer: A uniform within ±1/√in as PEFT draws it, B zero, so that nothing changes at first.
///
/// # Errors
/// As [`LoraConfig::targets`]; a usage error for the output layer, or a rank that no layer of this shape needs.
pub fn new_layer(config: &LoraConfig, module: &str, shape: [usize; 2], seed: u64) -> Result<Option<LowRank>> {
    if !config.targets(module)? {
        return Ok(None);
    }
    if module == "lm_head" {
        return Err(Error::usage(
            "`train.lora_target_modules` takes in the output layer, which cannot have an adapter\n   = help: leave `lm_head` out",
        ));
    }
    let [out, input] = shape;
    let (rank, scaling) = config.shape_of(module, &[])?;
    if rank > out.max(input) {
        return Err(Error::usage(format!(
            "`train.lora_rank` {rank} exceeds both sides of `{module}`, {out} x {input}\n   = help: 8 to 64 is usual"
        )));
    }
    let bound = 1.0 / (input as f32).sqrt();
    let mut stream = rng::stream(seed, "lora", &[rng::key_of(module)]);
    let values: Vec<f32> = (0..rank * input).map(|_| stream.random_range(-bound..bound)).collect();
    Ok(Some(LowRank {
        a: Tensor::from_vec(values, (rank, input), &Device::Cpu)?,
        b: Tensor::zeros((out, rank), candle_core::DType::F32, &Device::Cpu)?,
        scaling,
    }))
}

/// Writes an adapter that PEFT loads; `tensors` are named `MODULE.lora_A.weight` and `MODULE.lora_B.weight`.
///
/// # Errors
/// When a file cannot be written.
pub fn save(dir: &Path, config: &LoraConfig, tensors: &[(String, Tensor)]) -> Result<()> {
    std::fs::create_dir_all(dir).map_err(|error| Error::io("cannot create the directory", dir, error))?;
    let mut named: Vec<(String, Tensor)> =
        tensors.iter().map(|(name, tensor)| (format!("{ROOT}{name}"), tensor.clone())).collect();
    named.sort_by(|a, b| a.0.cmp(&b.0));
    save_file(&dir.join(TENSOR_FILE), &named, &[("format", "pt")])?;
    super::tokenizer::write_json(&dir.join(CONFIG_FILE), &config.to_json())
}

#[cfg(test)]
#[path = "lora_tests.rs"]
mod tests;
