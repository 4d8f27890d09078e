//! A model with everything needed to show it an image, ask it, and read what it says.

use super::chat::{ChatTemplate, Message, RenderOptions};
use super::config::VlmConfig;
use super::generate::{Completion, Prompt};
use super::loader::{self, Adaptation, Precision, Processor};
use super::parameters::Build;
use super::positions::Grid;
use super::processor::{ImageProcessorConfig, ProcessedImage};
use super::sampling::{Decoding, SamplingConfig};
use super::tokenizer::Tokenizer;
use super::truncate::Depths;
use super::vlm::Vlm;
use super::weights;
use crate::error::{Error, Result};
use crate::pixels::RgbImage8;
use candle_core::{Device, Tensor};
use std::path::Path;

/// A checkpoint, loaded.
#[derive(Debug, Clone)]
pub struct Assistant {
    /// The network.
    pub vlm: Vlm,
    /// Text to tokens.
    pub tokenizer: Tokenizer,
    /// Conversations to text.
    pub chat: ChatTemplate,
    /// Images to the network's input.
    pub image_processor: ImageProcessorConfig,
}

impl Assistant {
    /// Loads a Hugging Face directory; parameters whose name `trains` accepts get gradients.
    ///
    /// # Errors
    /// A data error for what is missing, damaged or does not fit; a non-finite error that names the weight.
    pub fn load(dir: &Path, trains: &dyn Fn(&str) -> bool, device: &Device) -> Result<Self> {
        Self::load_adapted(dir, Adaptation::None, Precision::AsStored, trains, device)
    }

    /// The same with a low-rank adapter over it, or in it, and frozen weights held in another type.
    ///
    /// # Errors
    /// As [`Assistant::load`]; a data error when the adapter does not fit.
    pub fn load_adapted(
        dir: &Path,
        adaptation: Adaptation<'_>,
        precision: Precision,
        trains: &dyn Fn(&str) -> bool,
        device: &Device,
    ) -> Result<Self> {
        Self::load_part(dir, None, adaptation, precision, trains, device)
    }

    /// The same with the first so many blocks of each kind only.
    ///
    /// # Errors
    /// As [`loader::load_part`].
    pub fn load_part(
        dir: &Path,
        depths: Option<Depths>,
        adaptation: Adaptation<'_>,
        precision: Precision,
        trains: &dyn Fn(&str) -> bool,
        device: &Device,
    ) -> Result<Self> {
        let (vlm, Processor { tokenizer, chat, image_processor }) =
            loader::load_part(dir, depths, adaptation, precision, trains, device)?;
        Ok(Self { vlm, tokenizer, chat, image_processor })
    }

    /// Puts the parts together around weights from `source`.
    ///
    /// # Errors
    /// When the parts do not fit each other.
    pub fn new(
        config: &VlmConfig,
        tokenizer: Tokenizer,
        chat: ChatTemplate,
        image_processor: ImageProcessorConfig,
        build: Build<'_>,
        device: &Device,
    ) -> Result<Self> {
        let patchify = loader::patchify_of(config, &image_processor)?;
        let vlm = Vlm::new(config, patchify, build, device)?;
        Ok(Self { vlm, tokenizer, chat, image_processor })
    }

    /// The same assistant over the same weights without gradients.
    ///
    /// # Errors
    /// When the device has no room.
    pub fn detached(&self) -> Result<Self> {
        Ok(Self { vlm: self.vlm.detached()?, ..self.clone() })
    }

    /// As it is now, whatever is trained later: see [`Vlm::frozen_copy`].
    ///
    /// # Errors
    /// When the device has no room.
    pub fn frozen_copy(&self) -> Result<Self> {
        Ok(Self { vlm: self.vlm.frozen_copy()?, ..self.clone() })
    }

    /// Writes a Hugging Face directory that transformers loads.
    ///
    /// # Errors
    /// When a file cannot be written.
    pub fn save(&self, dir: &Path) -> Result<()> {
        std::fs::create_dir_all(dir).map_err(|error| Error::io("cannot create the directory", dir, error))?;
        let mut tensors = self.vlm.parameters().tensors()?;
        tensors.sort_by(|a, b| a.0.cmp(&b.0));
        weights::save(dir, &tensors)?;
        let config = self.vlm.config();
        let text = serde_json::to_string_pretty(&config.to_json()).map_err(anyhow::Error::from)?;
        super::tokenizer::write_text(&dir.join("config.json"), &(text + "\n"))?;
        self.tokenizer.save(dir)?;
        self.image_processor.save(dir, &config.model_type, self.chat.source())
    }

    /// An image as the network takes it.
    ///
    /// # Errors
    /// When the image cannot be resized to what the network takes.
    pub fn process(&self, image: &RgbImage8) -> Result<ProcessedImage> {
        self.image_processor.process(image)
    }

    /// The pixels of a processed image, `[1, 3, height, width]` in [0, 1].
    ///
    /// # Errors
    /// When the device has no room.
    pub fn pixels(&self, image: &ProcessedImage) -> Result<Tensor> {
        Ok(image.resized.to_tensor(self.vlm.device())?.unsqueeze(0)?)
    }

    /// The prompt of one image and a text about it; no grid, no image.
    ///
    /// # Errors
    /// When the text contains an image placeholder of its own.
    pub fn prompt(&self, user_text: &str, grid: Option<Grid>) -> Result<Prompt> {
        let message = match grid {
            Some(_) => Message::image_question(user_text),
            None => Message::text("user", user_text),
        };
        let options = RenderOptions { add_generation_prompt: true, add_vision_id: false };
        let text = self.chat.render(&[message], options)?;
        let config = self.vlm.config();
        let grids: Vec<Grid> = grid.into_iter().collect();
        loader::expanded_prompt(&self.tokenizer, config, &text, &grids)
    }

    /// Tokens of a completion to be learnt or scored, with the token that ends a turn.
    ///
    /// # Errors
    /// When the tokenizer has no such token.
    pub fn target(&self, text: &str) -> Result<Vec<u32>> {
        let mut ids = self.tokenizer.encode(text)?;
        ids.push(self.end_of_turn()?);
        Ok(ids)
    }

    /// The token that ends a turn.
    ///
    /// # Errors
    /// When the tokenizer has none.
    pub fn end_of_turn(&self) -> Result<u32> {
        self.tokenizer.require("<|im_end|>")
    }

    /// How to sample from this model: never a vision token, and until one of its stop tokens.
    pub fn decoding(&self, max_new_tokens: usize, sampling: SamplingConfig) -> Decoding {
        let config = self.vlm.config();
        let suppressed_ids = vec![
            config.image_token_id,
            config.video_token_id,
            config.vision_start_token_id,
            config.vision_end_token_id,
        ];
        Decoding { max_new_tokens, stop_ids: self.tokenizer.stop_ids().to_vec(), suppressed_ids, sampling }
    }

    /// What a completion says, without the stop token.
    ///
    /// # Errors
    /// When the tokenizer refuses an id.
    pub fn text_of(&self, completion: &Completion) -> Result<String> {
        let end = completion.ids.len() - usize::from(completion.is_finished);
        self.tokenizer.decode(&completion.ids[..end], false)
    }
}
