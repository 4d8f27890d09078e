//! The low-rank adapter that a training run trains: a new one, or one that exists; and what is said about it.

use super::config::{RunConfig, TrainConfig};
use crate::error::{Error, Result};
use crate::model::assistant::Assistant;
use crate::model::loader::Adaptation;
use crate::model::lora::{Adapter, LoraConfig, Modules};
use std::collections::BTreeMap;

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
    /// A usage error when a new adapter and one that exists are both asked for; what is wrong with the latter.
    pub fn of(config: &RunConfig) -> Result<Self> {
        let train = &config.train;
        let names = [
            ("lora_target_modules", &train.lora_target_modules),
            ("lora_exclude_modules", &train.lora_exclude_modules),
        ];
        let given = names.into_iter().find_map(|(key, value)| value.as_ref().map(|_| key));
        let parts = &train.parts;
        let has_all_parts = parts.vision && parts.merger && parts.text;
        let no_effect = |key: &str, why: &str, help: &str| {
            Err(Error::usage(format!("`train.{key}` has no effect: {why}\n   = help: {help}")))
        };
        let Some(dir) = &config.adapter else {
            if train.lora_rank == 0 {
                return match given {
                    Some(key) => no_effect(key, "no adapter trains", "set `train.lora_rank`, 16 for example"),
                    None => Ok(Self::None),
                };
            }
            if train.lora_target_modules.is_some() && !has_all_parts {
                return no_effect(
                    "parts",
                    "`train.lora_target_modules` says what gets an adapter",
                    "leave one of the two out",
                );
            }
            for (key, value) in names {
                if let Some(value) = value {
                    let wrong = |error: Error| Error::usage(format!("`train.{key}`: {error}"));
                    Modules::parse(value).check().map_err(wrong)?;
                }
            }
            let settings = LoraConfig {
                use_rslora: train.lora_use_rslora,
                exclude_modules: train.lora_exclude_modules.as_deref().map(Modules::parse),
                base_model: config.model.clone(),
                ..LoraConfig::new(train.lora_rank, train.lora_alpha, targets(config))
            };
            return Ok(Self::New(settings));
        };
        let help = "an adapter that exists is trained as it is; leave `--adapter` out to begin a new one";
        if let Some(key) = given {
            return no_effect(key, "the adapter named with `--adapter` has its own modules", help);
        }
        if !has_all_parts {
            return no_effect("parts", "the adapter named with `--adapter` has its own modules", help);
        }
        let adapter = Adapter::load(dir)?;
        if train.lora_alpha != TrainConfig::default().lora_alpha && train.lora_alpha != adapter.config.alpha {
            return no_effect("lora_alpha", "the adapter named with `--adapter` has its own", help);
        }
        if train.lora_rank != 0 && train.lora_rank != adapter.config.rank {
            return Err(Error::usage(format!(
                "`train.lora_rank` is {}, the adapter that is trained further has rank {}\n  --> {}\n   = help: leave `train.lora_rank` out to go on with it, or merge it with `safemed export` and begin a new one",
                train.lora_rank,
                adapter.config.rank,
                dir.display()
            )));
        }
        Ok(Self::Given(adapter))
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
            Self::New(config) => config,
            Self::Given(adapter) => &adapter.config,
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
        Ok(Some(LoraConfig { target_modules, dropout, ..config.clone() }))
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
