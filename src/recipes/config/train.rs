//! `[train]` and its sections: what every recipe of training can be told.

use super::keys::{Range, section, words};
use super::{NormName, ObjectiveName};
use crate::nn::recompute::Memory;
use crate::reward::RewardConfig;
use crate::train::grpo::{self, GrpoConfig};

words! {
    /// The training recipe.
    pub enum RecipeName = Sft {
        /// Supervised fine-tuning.
        Sft = "sft",
        /// Supervised fine-tuning on PGD images: standard adversarial training.
        AtSft = "at_sft",
        /// Group-relative policy optimisation.
        Grpo = "grpo",
        /// GRPO whose completions are sampled on PGD images.
        AtGrpo = "at_grpo",
        /// A denoiser to stand in front of the model, which stays as it is.
        Denoiser = "denoiser",
    }
}

words! {
    /// Learning rate over the steps after warm-up.
    pub enum ScheduleName = Cosine {
        /// Stays.
        Constant = "constant",
        /// Falls linearly to the floor.
        Linear = "linear",
        /// Falls along half a cosine to the floor.
        Cosine = "cosine",
    }
}

words! {
    /// What the model learns to write.
    pub enum TargetName = Cot {
        /// The answer alone.
        Instruct = "instruct",
        /// Reasoning, then the answer.
        Cot = "cot",
    }
}

words! {
    /// How token losses become one number.
    pub enum LossType = Grpo {
        /// Mean over the tokens of each completion, then over completions (Shao et al. 2024).
        Grpo = "grpo",
        /// Mean over all tokens of the micro-batch.
        Bnpo = "bnpo",
        /// Sum over tokens by the longest completion allowed (Liu et al. 2025).
        DrGrpo = "dr_grpo",
        /// Mean over all tokens of the step (Yu et al. 2025).
        Dapo = "dapo",
        /// Clipped importance weights times log-probabilities (MiniMax 2025).
        Cispo = "cispo",
        /// A smooth gate in place of the clip; added up as `grpo`.
        Sapo = "sapo",
        /// Sum over each completion's tokens, mean over completions; needs ratios of sequences.
        Luspo = "luspo",
    }
}

words! {
    /// What an importance ratio belongs to.
    pub enum ImportanceName = Token {
        /// Each token.
        Token = "token",
        /// A whole completion: the mean over its tokens (GSPO, Zheng et al. 2025).
        Sequence = "sequence",
    }
}

words! {
    /// What advantages are divided by.
    pub enum ScaleRewards = Group {
        /// The standard deviation within the group.
        Group = "group",
        /// The standard deviation over the step.
        Batch = "batch",
        /// Nothing.
        None = "none",
    }
}

words! {
    /// The image that the reference policy sees.
    pub enum KlImage = Adversarial {
        /// The image the completion was sampled on.
        Adversarial = "adversarial",
        /// The untouched image.
        Clean = "clean",
    }
}

section! {
    /// `[train]`: what all training recipes share. Defaults of the optimiser: AdamW (Loshchilov and Hutter 2019) as in PyTorch.
    pub struct TrainConfig {
        /// The recipe.
        recipe: RecipeName = RecipeName::Sft,
        /// Optimiser steps.
        num_steps: usize = 1000 => Range::at_least(1.0),
        /// Questions of one optimiser step (groups, for GRPO).
        batch_size: usize = 16 => Range::at_least(1.0),
        /// Questions of one forward pass (of GRPO groups); absent: `batch_size`. Gradients add up to those of the whole batch, to
        /// rounding.
        micro_batch_size: Option<usize> = None => Range::at_least(1.0),
        /// Whether a gradient keeps only the states between layers and computes what is inside them again: less memory, more
        /// time; equal gradients, to rounding.
        recompute: bool = false,
        /// Peak learning rate.
        learning_rate: f64 = 1e-5 => Range::at_least(0.0),
        /// Steps over which the learning rate rises linearly to its peak.
        warmup_steps: usize = 0,
        /// Course of the learning rate after warm-up.
        schedule: ScheduleName = ScheduleName::Cosine,
        /// Floor of the learning rate, as a share of its peak.
        min_learning_rate_ratio: f64 = 0.0 => Range::closed(0.0, 1.0),
        /// Decoupled weight decay.
        weight_decay: f64 = 0.0 => Range::at_least(0.0),
        /// Decay of the mean of gradients.
        beta1: f64 = 0.9 => Range::from_below(0.0, 1.0),
        /// Decay of the mean of squared gradients.
        beta2: f64 = 0.999 => Range::from_below(0.0, 1.0),
        /// Added to the root of the squared-gradient mean.
        adam_epsilon: f64 = 1e-8 => Range::above(0.0),
        /// Global gradient norm above which gradients are scaled down; 0: never.
        max_grad_norm: f64 = 1.0 => Range::at_least(0.0),
        /// What the model learns to write; the `prompt` should ask for it. A question without a reasoning of its own gets a made-up
        /// sentence (modality, right option): the run says how many.
        target: TargetName = TargetName::Cot,
        /// Whether the order of the options is drawn anew each time an item is seen.
        permute_options: bool = false,
        /// Whether the first words say what is seen and no image is shown: teaches a model from scratch to read
        /// options before it learns to see. A question without a reasoning is told its modality and right option.
        captions: bool = false,
        /// Standard deviation of Gaussian noise added to every training image at the model's resolution, fresh at each step
        /// and not clipped: what makes smoothing with the same `sigma` certify more (Cohen et al. 2019); 0: none.
        noise_sigma: f64 = 0.0 => Range::at_least(0.0),
        /// Steps between checkpoints; 0: only at the end.
        save_every: usize = 100,
        /// Checkpoints kept, the newest; 0: all.
        keep_checkpoints: usize = 2,
        /// Rank of a low-rank adapter (LoRA) that trains in place of the weights; 0: the weights train.
        lora_rank: usize = 0,
        /// The adapter's update is multiplied by `lora_alpha` / `lora_rank`.
        lora_alpha: f64 = 32.0 => Range::above(0.0),
        /// Whether it is multiplied by `lora_alpha` / sqrt(`lora_rank`) instead.
        lora_use_rslora: bool = false,
        /// Linear layers with an adapter, as PEFT names them: `all-linear`, names with commas between, or a regular
        /// expression; absent: every linear layer of the parts that train.
        lora_target_modules: Option<String> = None,
        /// Linear layers without one all the same; names or a regular expression.
        lora_exclude_modules: Option<String> = None,
        /// Which parts of the model train.
        parts: TrainParts = TrainParts::default(),
        /// GRPO, for the recipes `grpo` and `at_grpo`.
        grpo: GrpoSettings = GrpoSettings::default(),
        /// The adversary in training, for the recipes `at_sft` and `at_grpo`.
        adversary: AdversaryConfig = AdversaryConfig::default(),
        /// The network, for the recipe `denoiser`.
        denoiser: DenoiserSettings = DenoiserSettings::default(),
    }
}

section! {
    /// `[train.denoiser]`: the network of the recipe `denoiser`, which learns to take off noise of `train.noise_sigma`.
    pub struct DenoiserSettings {
        /// Channels of its layers, at half resolution.
        width: usize = 32 => Range::closed(1.0, 4096.0),
        /// Its convolutions of 3 x 3.
        depth: usize = 5 => Range::closed(2.0, 64.0),
        /// Side of the squares that are cut from the images, in pixels; at most the smallest image of a batch.
        crop: usize = 64 => Range::at_least(2.0),
    }
}

section! {
    /// `[train.parts]`: which parts of the model train.
    pub struct TrainParts {
        /// The vision tower.
        vision: bool = true,
        /// The merger between vision and text.
        merger: bool = true,
        /// The text decoder.
        text: bool = true,
    }
}

section! {
    /// `[train.grpo]`: group-relative policy optimisation (Shao et al. 2024).
    pub struct GrpoSettings {
        /// Completions sampled for one question.
        group_size: usize = 8 => Range::at_least(2.0),
        /// Sampling temperature; log-probabilities are those of the tempered distribution.
        temperature: f64 = 1.0 => Range::above(0.0),
        /// The ratio is clipped below 1 - `clip_low`.
        clip_low: f64 = 0.2 => Range::closed(0.0, 1.0),
        /// The ratio is clipped above 1 + `clip_high`; of `cispo` it is the cap of the ratio itself, 5 for example.
        clip_high: f64 = 0.2 => Range::at_least(0.0),
        /// Cap of the ratio where the clip leaves it free (a negative advantage), above 1 + `clip_high`; absent: none
        /// (two-sided clipping).
        delta: Option<f64> = None => Range::above(1.0),
        /// What a ratio belongs to: a token, or a whole completion (GSPO).
        importance_level: ImportanceName = ImportanceName::Token,
        /// Weight of the k3 estimate of the divergence from the reference policy; 0: no reference is kept.
        kl_coef: f64 = 0.0 => Range::at_least(0.0),
        /// Whether that estimate is multiplied by the ratio, which makes it unbiased off policy.
        kl_bias_correction: bool = false,
        /// The image that the reference policy sees.
        kl_image: KlImage = KlImage::Adversarial,
        /// How token losses become one number.
        loss_type: LossType = LossType::Grpo,
        /// What advantages are divided by.
        scale_rewards: ScaleRewards = ScaleRewards::Group,
        /// Optimiser steps on one set of completions.
        num_updates: usize = 1 => Range::at_least(1.0),
        /// Whether completions that were cut off before they ended take no part in the loss.
        mask_truncated: bool = false,
        /// How often a group whose rewards are all equal, which teaches nothing, is sampled anew on the same image (dynamic
        /// sampling, Yu et al. 2025); each time costs another rollout of those groups.
        max_resamples: usize = 0,
        /// Weight of the accuracy reward.
        accuracy_weight: f64 = 1.0 => Range::at_least(0.0),
        /// Weight of the format reward.
        format_weight: f64 = 1.0 => Range::at_least(0.0),
        /// Whether accuracy is graded: half for the right letter among further text.
        graded: bool = false,
    }
}

section! {
    /// `[train.adversary]`: the attack inside adversarial training.
    pub struct AdversaryConfig {
        /// The norm that bounds the change.
        norm: NormName = NormName::Linf,
        /// Full budget, in units of pixel values in [0, 1].
        epsilon: f64 = 8.0 / 255.0 => Range::at_least(0.0),
        /// Length of one step, in the units of `epsilon`; absent: 2.5 x the current budget / `num_steps`.
        step_size: Option<f64> = None => Range::at_least(0.0),
        /// Gradient steps of one start.
        num_steps: usize = 3,
        /// Whether it begins at a random point of the ball.
        random_start: bool = true,
        /// What is maximised.
        objective: ObjectiveName = ObjectiveName::Completion,
        /// Share of questions left clean.
        clean_fraction: f64 = 0.25 => Range::closed(0.0, 1.0),
        /// Budget of the first step, as a share of `epsilon`.
        epsilon_start_fraction: f64 = 0.25 => Range::closed(0.0, 1.0),
        /// Share of the steps over which the budget rises linearly to `epsilon`.
        ramp_fraction: f64 = 0.3 => Range::closed(0.0, 1.0),
    }
}

impl RecipeName {
    /// Whether it samples completions and rewards them.
    pub const fn is_grpo(self) -> bool {
        matches!(self, Self::Grpo | Self::AtGrpo)
    }

    /// Whether it trains on attacked images.
    pub const fn is_adversarial(self) -> bool {
        matches!(self, Self::AtSft | Self::AtGrpo)
    }
}

impl GrpoSettings {
    /// The constants of the loss.
    pub fn loss(&self) -> GrpoConfig {
        GrpoConfig {
            loss_type: match self.loss_type {
                LossType::Grpo => grpo::LossType::Grpo,
                LossType::Bnpo => grpo::LossType::Bnpo,
                LossType::DrGrpo => grpo::LossType::DrGrpo,
                LossType::Dapo => grpo::LossType::Dapo,
                LossType::Cispo => grpo::LossType::Cispo,
                LossType::Sapo => grpo::LossType::Sapo,
                LossType::Luspo => grpo::LossType::Luspo,
            },
            importance_level: match self.importance_level {
                ImportanceName::Token => grpo::ImportanceLevel::Token,
                ImportanceName::Sequence => grpo::ImportanceLevel::Sequence,
            },
            clip_low: self.clip_low,
            clip_high: self.clip_high,
            delta: self.delta,
            kl_coef: self.kl_coef,
            kl_bias_correction: self.kl_bias_correction,
        }
    }

    /// What completions are worth.
    pub fn rewards(&self) -> RewardConfig {
        RewardConfig {
            accuracy_weight: self.accuracy_weight,
            format_weight: self.format_weight,
            graded: self.graded,
        }
    }
}

impl TrainConfig {
    /// What is kept for gradients.
    pub const fn memory(&self) -> Memory {
        if self.recompute { Memory::Recompute } else { Memory::Keep }
    }
}
