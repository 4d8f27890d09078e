//! The low-rank adapter that a training run trains: a new one, or one that exists; and what is said about it.

use super::config::{RunConfig, TrainConfig, TrainParts};
use super::train;
use crate::error::{Error, Result};
use crate::model::assistant::Assistant;
use crate::model::loader::Adaptation;
use crate::model::lora::{Adapter, LoraConfig, Modules};
use std::collections::BTreeMap;
use std::path::Path;

/// Where the adapter comes from.
#[derive(Debug)]
pub enum Chosen {
    /// The weights train, or parts of them.
    None,
    /// A new adapter of `train.lora_rank`.
    New(LoraConfig),
    /// The one named with `--adapter`, trained further.
    Given(Adapter),
}

impl Chosen {
    /// What `config` asks for.
    ///
    /// # Errors
    /// A usage error when what is set about adapters has no effect, or contradicts the one named with `--adapter`; what is wrong
    /// with the latter.
    pub fn of(config: &RunConfig) -> Result<Self> {
        match &config.adapter {
            Some(dir) => Ok(Self::Given(given(&config.train, dir)?)),
            None => Ok(begun(config)?.map_or(Self::None, Self::New)),
        }
    }

    /// How the model is loaded.
    pub fn adaptation(&self, seed: u64) -> Adaptation<'_> {
        match self {
            Self::None => Adaptation::None,
            Self::New(config) => Adaptation::New { config, seed },
            Self::Given(adapter) => Adaptation::Active(adapter),
        }
    }

    /// Which parameters train, of those that `parts` names.
    pub fn trains(&self, name: &str, parts: impl Fn(&str) -> bool) -> bool {
        match self {
            Self::None => parts(name),
            Self::New(_) | Self::Given(_) => name.contains(".lora_"),
        }
    }

    /// The settings that checkpoints keep: a set of modules that was not written as PEFT's own names or pattern
    /// becomes the list of its modules, which means the same to every reader. `dropout`: of this training.
    ///
    /// # Errors
    /// A usage error when no module is meant.
    pub fn settings(&self, assistant: &Assistant, dropout: f64) -> Result<Option<LoraConfig>> {
        let config = match self {
            Self::None => return Ok(None),
            Self::New(config) => config.clone(),
            Self::Given(adapter) => adapter.settings()?,
        };
        let modules = modules(assistant)?;
        let known = || kinds(&linear_layers(assistant));
        if modules.is_empty() {
            return Err(Error::usage(format!(
                "no linear layer gets an adapter\n   = help: `train.lora_target_modules` less `train.lora_exclude_modules` leaves none of {}",
                known()
            )));
        }
        if let (Self::New(_), Modules::Names(names)) = (self, &config.target_modules) {
            let layers = linear_layers(assistant);
            for name in names {
                let one = Modules::Names(vec![name.clone()]);
                if !layers.iter().map(|layer| one.contain(layer)).collect::<Result<Vec<_>>>()?.contains(&true)
                {
                    return Err(Error::usage(format!(
                        "`train.lora_target_modules`: there is no linear layer `{name}`\n   = help: there are {}",
                        known()
                    )));
                }
            }
        }
        let is_ours = matches!(self, Self::New(_)) && !matches!(config.target_modules, Modules::Names(_));
        let is_pattern_of_ours = is_ours && matches!(config.exclude_modules, None | Some(Modules::Names(_)));
        let target_modules =
            if is_pattern_of_ours { Modules::Names(modules) } else { config.target_modules.clone() };
        Ok(Some(LoraConfig { target_modules, dropout, ..config }))
    }

    /// What is told before training: rank, layers by kind, parameters.
    ///
    /// # Errors
    /// As [`Chosen::settings`].
    pub fn describe(&self, assistant: &Assistant) -> Result<Option<String>> {
        let Some(settings) = self.settings(assistant, 0.0)? else { return Ok(None) };
        let modules = modules(assistant)?;
        let (all, trained) = assistant.vlm.parameters().count();
        Ok(Some(format!(
            "adapter of rank {} over {} linear layers ({}): {trained} parameters train, {all} are frozen",
            settings.rank,
            modules.len(),
            kinds(&modules)
        )))
    }
}

/// What is said of a setting that an adapter which exists does not follow.
const AS_IT_IS: &str = "an adapter that exists is trained as it is; leave `--adapter` out to begin a new one";

fn no_effect(key: &str, why: &str, help: &str) -> Error {
    Error::usage(format!("`train.{key}` has no effect: {why}\n   = help: {help}"))
}

/// A set of modules as `train.KEY` writes it.
fn parsed(key: &str, text: &str) -> Result<Modules> {
    let modules = Modules::parse(text);
    modules.check().map_err(|error| {
        Error::usage(format!(
            "`train.{key}`: {error}\n   = help: write `all-linear`, names with commas between, or a regular expression"
        ))
    })?;
    Ok(modules)
}

/// The settings of a new adapter; none where the weights train.
fn begun(config: &RunConfig) -> Result<Option<LoraConfig>> {
    let train = &config.train;
    let sets = [
        ("lora_target_modules", &train.lora_target_modules),
        ("lora_exclude_modules", &train.lora_exclude_modules),
    ];
    if train.lora_rank == 0 {
        return match sets.into_iter().find(|(_, value)| value.is_some()) {
            Some((key, _)) => {
                Err(no_effect(key, "no adapter trains", "set `train.lora_rank`, 16 for example"))
            }
            None => Ok(None),
        };
    }
    let parts = &train.parts;
    if train.lora_target_modules.is_some() && !(parts.vision && parts.merger && parts.text) {
        return Err(no_effect(
            "parts",
            "`train.lora_target_modules` says what gets an adapter",
            "leave one of the two out",
        ));
    }
    for (key, value) in sets {
        if let Some(value) = value {
            parsed(key, value)?;
        }
    }
    Ok(Some(LoraConfig {
        use_rslora: train.lora_use_rslora,
        exclude_modules: train.lora_exclude_modules.as_deref().map(Modules::parse),
        base_model: config.model.clone(),
        ..LoraConfig::new(train.lora_rank, train.lora_alpha, targets(config))
    }))
}

/// The adapter in `dir`, to be trained further. One file may serve a new adapter and, in the next stage, the same one again, so
/// what it says of adapters is refused only where this one is another.
fn given(train: &TrainConfig, dir: &Path) -> Result<Adapter> {
    let adapter = Adapter::load(dir)?;
    if let Some(name) = adapter.replaced().next() {
        return Err(Error::usage(format!(
            "the adapter holds whole tensors in place of the model's (`modules_to_save`, trained biases), such as `{name}`: trained further it would lose them\n  --> {}\n   = help: merge it with `safemed export` and begin a new adapter",
            dir.display()
        )));
    }
    check_parts(&train.parts, &adapter)?;
    check_modules(train, &adapter)?;
    if train.lora_alpha != TrainConfig::default().lora_alpha && train.lora_alpha != adapter.config.alpha {
        return Err(no_effect("lora_alpha", "the adapter named with `--adapter` has its own", AS_IT_IS));
    }
    if train.lora_rank != 0 && train.lora_rank != adapter.config.rank {
        return Err(Error::usage(format!(
            "`train.lora_rank` is {}, the adapter that is trained further has rank {}\n  --> {}\n   = help: leave `train.lora_rank` out to go on with it, or merge it with `safemed export` and begin a new one",
            train.lora_rank,
            adapter.config.rank,
            dir.display()
        )));
    }
    Ok(adapter)
}

/// Refuses an adapter with modules in parts that do not train.
fn check_parts(parts: &TrainParts, adapter: &Adapter) -> Result<()> {
    let is_idle = |module: &&str| !train::trains(module, parts.vision, parts.merger, parts.text);
    let idle: Vec<&str> = adapter.modules().filter(is_idle).collect();
    if idle.is_empty() {
        return Ok(());
    }
    let is_in = |vision, merger, text| idle.iter().any(|module| train::trains(module, vision, merger, text));
    let keys = [
        ("vision", is_in(true, false, false)),
        ("merger", is_in(false, true, false)),
        ("text", is_in(false, false, true)),
    ];
    let keys: Vec<String> =
        keys.iter().filter(|(_, is_off)| *is_off).map(|(key, _)| format!("`train.parts.{key}`")).collect();
    let keys = keys.join(" and ");
    let named: Vec<String> = idle.iter().take(3).map(|module| format!("`{module}`")).collect();
    let more = if idle.len() > 3 { format!(" and {} more", idle.len() - 3) } else { String::new() };
    Err(Error::usage(format!(
        "the adapter that is trained further has modules in parts that do not train by {keys}: {}{more}\n  --> {}\n   = help: set {keys} to true, or leave `--adapter` out to begin a new adapter of the other parts",
        named.join(", "),
        adapter.dir.display()
    )))
}

/// Refuses sets of modules that an adapter does not keep to.
fn check_modules(train: &TrainConfig, adapter: &Adapter) -> Result<()> {
    let refused = |key: &str, what: &str| {
        Err(no_effect(
            key,
            &format!("the adapter named with `--adapter` has its own modules, {what}"),
            AS_IT_IS,
        ))
    };
    if let Some(text) = &train.lora_target_modules {
        let key = "lora_target_modules";
        let targets = parsed(key, text)?;
        for module in adapter.modules() {
            if !targets.contain(module)? {
                return refused(key, &format!("`{module}` among them"));
            }
        }
        let names = if let Modules::Names(names) = &targets { names.as_slice() } else { &[] };
        for name in names {
            let one = Modules::Names(vec![name.clone()]);
            let is_met = adapter.modules().map(|module| one.contain(module)).collect::<Result<Vec<_>>>()?;
            if !is_met.contains(&true) {
                return refused(key, &format!("and no `{name}` among them"));
            }
        }
    }
    if let Some(text) = &train.lora_exclude_modules {
        let key = "lora_exclude_modules";
        let excluded = parsed(key, text)?;
        for module in adapter.modules() {
            if excluded.contain(module)? {
                return refused(key, &format!("`{module}` among them"));
            }
        }
    }
    Ok(())
}

/// The modules of `train.lora_target_modules`, or those of the parts that train.
fn targets(config: &RunConfig) -> Modules {
    if let Some(wanted) = &config.train.lora_target_modules {
        return Modules::parse(wanted);
    }
    let parts = &config.train.parts;
    let patterns = [
        (parts.vision, r"model\.visual\.(?!.*merger).*"),
        (parts.merger, r"model\.visual\..*merger.*"),
        (parts.text, r"model\.language_model\..*"),
    ];
    let chosen: Vec<&str> =
        patterns.iter().filter(|(is_on, _)| *is_on).map(|(_, pattern)| *pattern).collect();
    Modules::Pattern(chosen.join("|"))
}

/// The modules under an adapter, sorted.
fn modules(assistant: &Assistant) -> Result<Vec<String>> {
    let tensors = assistant.vlm.parameters().low_rank()?;
    let mut modules: Vec<String> = tensors
        .iter()
        .filter_map(|(name, _)| name.strip_suffix(".lora_A.weight").map(str::to_owned))
        .collect();
    modules.sort();
    Ok(modules)
}

/// Names of weights that are matrices.
fn linear_layers(assistant: &Assistant) -> Vec<String> {
    let is_matrix =
        |name: &str, rank: usize| rank == 2 && !name.contains("embed") && name != "lm_head.weight";
    let layers = assistant.vlm.parameters().shapes().filter(|(name, shape)| is_matrix(name, shape.len()));
    layers.filter_map(|(name, _)| name.strip_suffix(".weight").map(str::to_owned)).collect()
}

/// `q_proj x36, …`: the last parts of the names, with how often each occurs.
fn kinds(modules: &[String]) -> String {
    let mut counts: BTreeMap<&str, usize> = BTreeMap::new();
    for module in modules {
        *counts.entry(module.rsplit('.').next().unwrap_or(module)).or_default() += 1;
    }
    let counts: Vec<String> = counts.iter().map(|(kind, count)| format!("{kind} x{count}")).collect();
    counts.join(", ")
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::error::ExitStatus;
    use crate::model::lora;
    use crate::recipes::config::{Command, Override};
    use candle_core::{DType, Device, Tensor};

    const QUERY: &str = "model.language_model.layers.0.self_attn.q_proj";
    const TOWER: &str = "model.visual.blocks.0.attn.qkv";
    const MERGER: &str = "model.visual.merger.mlp.0";

    /// An adapter over `modules`, of the rank and alpha of the presets, with tensors `whole` beside.
    fn saved(modules: &[&str], whole: &[&str]) -> tempfile::TempDir {
        let dir = tempfile::tempdir().unwrap();
        let zeros = |shape: (usize, usize)| Tensor::zeros(shape, DType::F32, &Device::Cpu).unwrap();
        let mut tensors: Vec<(String, Tensor)> = Vec::new();
        for module in modules {
            tensors.push((format!("{module}.lora_A.weight"), zeros((64, 4))));
            tensors.push((format!("{module}.lora_B.weight"), zeros((4, 64))));
        }
        tensors.extend(whole.iter().map(|name| ((*name).to_owned(), zeros((4, 4)))));
        let names = modules.iter().map(|module| (*module).to_owned()).collect();
        lora::save(dir.path(), &LoraConfig::new(64, 128.0, Modules::Names(names)), &tensors).unwrap();
        dir
    }

    /// What a preset of GRPO, which trains the decoder alone, makes of the adapter in `dir`.
    fn chosen(dir: &Path, settings: &[(&str, &str)]) -> Result<Chosen> {
        let preset = Path::new(env!("CARGO_MANIFEST_DIR")).join("configs/qwen2_5_vl_3b_grpo.toml");
        let mut overrides: Vec<Override> =
            settings.iter().map(|(key, value)| Override::new(*key, *value, "--set")).collect();
        overrides.push(Override::new("adapter", dir.display().to_string(), "--adapter"));
        Chosen::of(&RunConfig::load(Command::Train, Some(&preset), &overrides)?)
    }

    #[test]
    fn the_preset_of_the_next_stage_takes_up_the_adapter_of_the_one_before() {
        let of_decoder = saved(&[QUERY], &[]);
        let all = [("train.parts.vision", "true"), ("train.parts.merger", "true")];
        let of_all = saved(&[QUERY, TOWER, MERGER], &[]);
        for (dir, settings) in [
            (&of_decoder, &[("train.lora_target_modules", "all-linear")][..]),
            (&of_decoder, &[("train.lora_target_modules", "q_proj"), ("train.lora_exclude_modules", "qkv")]),
            (&of_decoder, &[]),
            // The parts are bounds: it need not reach them.
            (&of_decoder, &all),
            (&of_all, &all),
        ] {
            let chosen = chosen(dir.path(), settings).unwrap();
            assert!(matches!(chosen, Chosen::Given(_)), "{settings:?}: {chosen:?}");
        }
    }

    #[test]
    fn an_adapter_that_the_settings_contradict_is_refused_with_what_is_another() {
        for (modules, settings, words) in [
            (
                &[QUERY, MERGER][..],
                &[("train.parts.vision", "true")][..],
                &["`train.parts.merger` to true", MERGER][..],
            ),
            (&[QUERY, TOWER], &[], &["`train.parts.vision` to true", TOWER]),
            (&[TOWER, MERGER], &[], &["`train.parts.vision` and `train.parts.merger` to true"]),
            (&[QUERY], &[("train.lora_target_modules", "v_proj")], &["has no effect", QUERY]),
            (&[QUERY], &[("train.lora_target_modules", "q_proj,v_proj")], &["has no effect", "no `v_proj`"]),
            (&[QUERY], &[("train.lora_target_modules", "(q")], &["no regular expression"]),
            (&[QUERY], &[("train.lora_exclude_modules", ".*q_proj")], &["has no effect", QUERY]),
            (&[QUERY], &[("train.lora_alpha", "64")], &["`train.lora_alpha` has no effect"]),
            (&[QUERY], &[("train.lora_rank", "8")], &["has rank 64", "safemed export"]),
        ] {
            let error = chosen(saved(modules, &[]).path(), settings).unwrap_err();
            assert_eq!(error.status(), ExitStatus::Usage, "{modules:?} {settings:?}: {error}");
            let text = error.to_string();
            assert!(text.contains("   = help: "), "{text}");
            for word in words {
                assert!(text.contains(*word), "{modules:?} {settings:?}: {word}: {text}");
            }
        }
    }

    #[test]
    fn an_adapter_with_tensors_that_would_be_lost_is_not_trained_further() {
        for whole in ["lm_head.weight", "model.language_model.layers.0.self_attn.q_proj.bias"] {
            let error = chosen(saved(&[QUERY], &[whole]).path(), &[]).unwrap_err();
            assert_eq!(error.status(), ExitStatus::Usage, "{error}");
            let text = error.to_string();
            assert!(text.contains(&format!("`{whole}`")) && text.contains("`safemed export`"), "{text}");
        }
    }
}
