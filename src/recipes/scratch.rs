//! A model from scratch: a tokenizer trained on the questions' own words, and weights drawn from a seed.

use crate::data::Sample;
use crate::data::prompt::PromptTemplate;
use crate::error::Result;
use crate::model::assistant::Assistant;
use crate::model::chat::ChatTemplate;
use crate::model::config::{ModelSizes, SpecialIds, VlmConfig};
use crate::model::initialise::initial_value;
use crate::model::parameters::Build;
use crate::model::processor::ImageProcessorConfig;
use crate::model::tokenizer::{REASONING_TOKENS, Tokenizer, train_bpe};
use candle_core::Device;

/// The word for [`Scratch::tiny`] where a checkpoint could stand.
pub const TINY: &str = "scratch:tiny";

/// What a model from scratch is made for.
#[derive(Debug, Clone, PartialEq)]
pub struct Scratch {
    /// Sizes; the vocabulary's is found from the tokenizer.
    pub sizes: ModelSizes,
    /// Largest vocabulary.
    pub vocab_size: usize,
    /// Fewest and most pixels of a resized image.
    pub pixels: [usize; 2],
    /// Base of the decoder's rotary frequencies.
    pub rope_theta: f64,
}

impl Scratch {
    /// The demo's model: about 300 thousand parameters for images of 64 x 64 pixels.
    pub fn tiny() -> Self {
        Self {
            sizes: ModelSizes {
                vocab_size: 0,
                hidden_size: 64,
                intermediate_size: 128,
                num_layers: 2,
                num_heads: 4,
                num_kv_heads: 4,
                head_dim: 16,
                vision_depth: 3,
                vision_hidden_size: 64,
                vision_intermediate_size: 192,
                vision_num_heads: 4,
                patch_size: 8,
                spatial_merge_size: 2,
                position_side: 8,
                deepstack_layers: Vec::new(),
                window_size: 64,
                full_attention_blocks: Vec::new(),
                max_position_embeddings: 512,
                tie_word_embeddings: false,
            },
            vocab_size: 768,
            pixels: [64 * 64, 64 * 64],
            rope_theta: 100.0,
        }
    }

    /// The assistant: tokenizer from the words of `samples`, weights from `seed`; parameters whose name `trains`
    /// accepts get gradients.
    ///
    /// # Errors
    /// When the sizes do not fit each other.
    pub fn build(
        &self,
        samples: &[Sample],
        templates: &[PromptTemplate],
        seed: u64,
        trains: &dyn Fn(&str) -> bool,
        device: &Device,
    ) -> Result<Assistant> {
        let tokenizer = self.tokenizer(samples, templates)?;
        let id = |token: &str| tokenizer.require(token);
        let ids = SpecialIds {
            image: id("<|image_pad|>")?,
            video: id("<|video_pad|>")?,
            vision_start: id("<|vision_start|>")?,
            vision_end: id("<|vision_end|>")?,
            turn_end: id("<|im_end|>")?,
            document_end: id("<|endoftext|>")?,
        };
        let sizes = ModelSizes { vocab_size: tokenizer.len(), ..self.sizes.clone() };
        let mut config = VlmConfig::new_qwen3_vl(&sizes, ids)?;
        config.text.rope_theta = self.rope_theta;
        let image_processor = ImageProcessorConfig {
            min_pixels: self.pixels[0],
            max_pixels: self.pixels[1],
            patch_size: sizes.patch_size,
            merge_size: sizes.spatial_merge_size,
            temporal_patch_size: config.vision.temporal_patch_size,
            image_mean: [0.5; 3],
            image_std: [0.25; 3],
            rescale_factor: 1.0 / 255.0,
            do_resize: true,
        };
        let source = |name: &str, shape: &[usize]| Ok((&initial_value(seed, name, shape)?).try_into()?);
        let chat = ChatTemplate::default_template()?;
        Assistant::new(&config, tokenizer, chat, image_processor, Build::plain(&source, trains), device)
    }

    fn tokenizer(&self, samples: &[Sample], templates: &[PromptTemplate]) -> Result<Tokenizer> {
        let mut texts = Vec::with_capacity(samples.len() * (2 * templates.len() + 1));
        for sample in samples {
            for template in templates {
                texts.push(format!("user\n{}", template.user_text(sample)));
                let target = template.target(sample, template.asks_for_reasoning());
                texts.push(format!("assistant\n{target}"));
            }
            texts.push(format!("{}\n", sample.caption()));
        }
        train_bpe(&texts, self.vocab_size, &REASONING_TOKENS)
    }
}
