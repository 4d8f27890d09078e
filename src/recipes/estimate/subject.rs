//! The model that an estimate is about, as far as it is there: its configuration, what prepares its input, and weights or
//! a stand-in for them.

use crate::data::Sample;
use crate::data::prompt::PromptTemplate;
use crate::error::{Error, Result};
use crate::model::chat::ChatTemplate;
use crate::model::config::VlmConfig;
use crate::model::hub;
use crate::model::loader::Processor;
use crate::model::processor::ImageProcessorConfig;
use crate::model::tokenizer::{REASONING_TOKENS, Tokenizer, train_bpe};
use crate::model::truncate::{self, Depths, Truncation, count_parameters};
use crate::model::weights::Weights;
use crate::recipes::config::RunConfig;
use crate::recipes::inputs;
use crate::recipes::progress::Progress;
use crate::recipes::run::Stop;
use crate::recipes::scratch::{self, Scratch};
use candle_core::Device;
use safetensors::tensor::Dtype;
use std::path::{Path, PathBuf};
use tempfile::TempDir;

/// Fewest parameters of a stand-in that has fewer blocks than the whole model.
const SMALL_STAND_IN: usize = 300_000_000;

/// Words of a tokenizer made in place of one that is not there.
const MADE_WORDS: usize = 16_384;

/// A model of which only what is cheap was looked at.
#[derive(Debug)]
pub struct Subject {
    /// Its shape.
    pub config: VlmConfig,
    /// What turns questions into its input.
    pub processor: Processor,
    /// Where children find it: its own directory, or that of a stand-in; none for a model from scratch.
    pub dir: Option<PathBuf>,
    /// Bytes of the weights as files hold them.
    pub file_bytes: usize,
    /// Whether those weights are bfloat16.
    pub is_half: bool,
    /// Blocks that children can have; fewer than [`Depths::of`] the shape for a stand-in of a large model.
    pub measurable: Depths,
    /// What is not the real thing, in words.
    pub stand_ins: Vec<String>,
    /// Holds a stand-in.
    _made: Option<TempDir>,
}

impl Subject {
    /// Looks at the model that `name` means; `samples` give a tokenizer its words where the model has none.
    ///
    /// # Errors
    /// What is missing or wrong in its directory, but for weights and tokenizer that are not there.
    pub fn open(
        name: &str,
        revision: Option<&str>,
        (samples, template): (&[Sample], PromptTemplate),
        stop: &Stop,
        progress: &dyn Progress,
    ) -> Result<Self> {
        if name == scratch::TINY {
            return Self::scratch(samples, template);
        }
        let has_path = Path::new(name).is_dir();
        let location = if has_path || !hub::is_hub_id(name) {
            inputs::locate_model(name, revision, stop, progress)?
        } else {
            hub::locate_without_weights(name, revision, &|_| stop.check())?
        };
        let config = VlmConfig::load(&location.dir)?;
        let mut stand_ins = Vec::new();
        let (config, processor) = if location.dir.join("tokenizer.json").exists() {
            (config, Processor::load(&location.dir)?)
        } else {
            stand_ins.push("no tokenizer.json: tokens are counted by one made from the questions".to_owned());
            made_processor(config, &location.dir, samples, template)?
        };
        let weights = match Weights::open(&location.dir) {
            Ok(weights) => Some(weights),
            Err(_) if !has_weight_files(&location.dir) => None,
            Err(error) => return Err(error),
        };
        let (parameters, ..) = count_parameters(&config)?;
        if let Some(weights) = weights
            && stand_ins.is_empty()
        {
            let first = weights.files().first().and_then(|file| file.entries().into_iter().next());
            let sizes = weights.paths().map(|path| std::fs::metadata(path).map_or(0, |about| about.len()));
            return Ok(Self {
                file_bytes: sizes.sum::<u64>() as usize,
                is_half: first.is_some_and(|entry| entry.dtype == Dtype::BF16),
                measurable: Depths::of(&config),
                dir: Some(location.dir),
                config,
                processor,
                stand_ins,
                _made: None,
            });
        }
        stand_ins.push("no weights there: measured on meaningless ones of the same shape".to_owned());
        let is_half = says_half(&config);
        let made = tempfile::tempdir().map_err(anyhow::Error::from)?;
        let (measurable, kept) = if parameters <= SMALL_STAND_IN {
            (Depths::of(&config), config.clone())
        } else {
            let base = Depths::least(&config, 1);
            let all = Depths::of(&config);
            let most = super::line::steps_up(base, all);
            let depths = most.into_iter().fold(base, |depths, (kind, count)| depths.with(kind, count));
            (depths, Truncation::new(&config, depths).config(&config)?)
        };
        truncate::write_stand_in(&kept, is_half, made.path())?;
        processor.tokenizer.save(made.path())?;
        processor.image_processor.save(made.path(), &config.model_type, processor.chat.source())?;
        Ok(Self {
            file_bytes: parameters * if is_half { 2 } else { 4 },
            is_half,
            measurable,
            dir: Some(made.path().to_path_buf()),
            config,
            processor,
            stand_ins,
            _made: Some(made),
        })
    }

    /// The same with the sizes of images that `config` wants.
    ///
    /// # Errors
    /// Those of [`inputs::within_limits`].
    pub fn within(mut self, config: &RunConfig) -> Result<Self> {
        self.processor.image_processor = inputs::within_limits(config, self.processor.image_processor)?;
        Ok(self)
    }

    fn scratch(samples: &[Sample], template: PromptTemplate) -> Result<Self> {
        let assistant = Scratch::tiny().build(samples, &[template], 0, &|_| false, &Device::Cpu)?;
        let config = assistant.vlm.config().clone();
        Ok(Self {
            measurable: Depths::of(&config),
            config,
            processor: Processor {
                tokenizer: assistant.tokenizer,
                chat: assistant.chat,
                image_processor: assistant.image_processor,
            },
            dir: None,
            file_bytes: 0,
            is_half: false,
            stand_ins: Vec::new(),
            _made: None,
        })
    }
}

/// Whether `dir` holds anything that was meant to be weights.
fn has_weight_files(dir: &Path) -> bool {
    let names = [
        "model.safetensors",
        "model.safetensors.index.json",
        "pytorch_model.bin",
        "adapter_model.safetensors",
    ];
    names.iter().any(|name| dir.join(name).exists())
}

/// Whether `config.json` says that the weights are bfloat16.
fn says_half(config: &VlmConfig) -> bool {
    let word = |value: &serde_json::Value| {
        ["dtype", "torch_dtype"].iter().find_map(|key| value[*key].as_str().map(str::to_owned))
    };
    word(&config.raw).or_else(|| word(&config.raw["text_config"])).as_deref() == Some("bfloat16")
}

/// A processor for a checkpoint without a tokenizer, and the configuration with that tokenizer's ids.
fn made_processor(
    mut config: VlmConfig,
    dir: &Path,
    samples: &[Sample],
    template: PromptTemplate,
) -> Result<(VlmConfig, Processor)> {
    let mut texts: Vec<String> = Vec::new();
    for sample in samples.iter().take(20_000) {
        texts.push(format!("user\n{}", template.user_text(sample)));
        texts.push(format!("assistant\n{}", template.target(sample, template.asks_for_reasoning())));
    }
    let tokenizer: Tokenizer = train_bpe(&texts, MADE_WORDS.min(config.text.vocab_size), &REASONING_TOKENS)?;
    if tokenizer.len() > config.text.vocab_size {
        return Err(Error::data(format!(
            "no tokenizer.json\n  --> {}\n   = help: this vocabulary is too small for one made from the questions",
            dir.display()
        )));
    }
    config.image_token_id = tokenizer.require("<|image_pad|>")?;
    config.video_token_id = tokenizer.require("<|video_pad|>")?;
    config.vision_start_token_id = tokenizer.require("<|vision_start|>")?;
    config.vision_end_token_id = tokenizer.require("<|vision_end|>")?;
    let has_pictures =
        ["preprocessor_config.json", "processor_config.json"].iter().any(|name| dir.join(name).exists());
    let vision = &config.vision;
    let image_processor = if has_pictures {
        ImageProcessorConfig::load(dir)?
    } else {
        ImageProcessorConfig {
            patch_size: vision.patch_size,
            merge_size: vision.spatial_merge_size,
            temporal_patch_size: vision.temporal_patch_size,
            ..ImageProcessorConfig::default()
        }
    };
    let chat = ChatTemplate::load(dir).or_else(|_| ChatTemplate::default_template())?;
    Ok((config, Processor { tokenizer, chat, image_processor }))
}
