//! `[train]` and its sections: what every recipe of training can be told.

use super::adversary::AdversaryConfig;
use super::keys::{Range, section, words};
use super::{NormName, ObjectiveName};
use crate::error::ConfigError;
use crate::nn::recompute::Memory;
use crate::reward::RewardConfig;
use crate::reward::overlong::Overlong;
use crate::reward::repetition::Repetition;
use crate::train::grpo::{self, GrpoConfig};
use std::path::PathBuf;

words! {
    /// The training recipe.
    pub enum RecipeName = Sft {
        /// Supervised fine-tuning.
        Sft = "sft",
        /// Supervised fine-tuning on PGD images: standard adversarial training. It costs the attack beside the update.
        AtSft = "at_sft",
        /// Group-relative policy optimisation.
        Grpo = "grpo",
        /// GRPO whose completions are sampled on PGD images.
        AtGrpo = "at_grpo",
        /// Supervised fine-tuning on clean images, with a penalty on how far PGD images move what the model says (TRADES, Zhang
        /// et al. 2019). It costs the attack, a look at the clean images before it, and an update in which attacked questions are
        /// there twice.
        Trades = "trades",
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
        /// Mean over all tokens of the batch. TRL takes that of each micro-batch, so that its result depends on how memory is
        /// saved; here it is always the mean of the step, as `dapo`.
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
    /// How several rewards become one advantage.
    pub enum RewardAggregation = SumThenNormalize {
        /// The weighted sum of the rewards is normalised.
        SumThenNormalize = "sum_then_normalize",
        /// Each reward is normalised within its group, then their weighted sum over the step (GDPO, Liu et al. 2026).
        NormalizeThenSum = "normalize_then_sum",
    }
}

words! {
    /// The image that the reference policy sees.
    pub enum KlImage = Adversarial {
        /// The image that the policy sees: the one the completion was sampled on, or that image attacked again
        /// (`train.adversary.refresh`).
        Adversarial = "adversarial",
        /// The untouched image.
        Clean = "clean",
    }
}

words! {
    /// The number by which models in training are compared.
    pub enum MetricName = RobustAccuracy {
        /// Accuracy on clean images.
        Accuracy = "accuracy",
        /// Accuracy under the attack.
        RobustAccuracy = "robust_accuracy",
        /// Mean reward of greedy completions on clean images.
        Reward = "reward",
        /// Mean reward of greedy completions under the attack.
        RobustReward = "robust_reward",
    }
}

section! {
    /// `[train]`: what all training recipes share. Defaults of the optimiser: AdamW (Loshchilov and Hutter 2019) as in PyTorch.
    pub struct TrainConfig {
        /// The recipe. `at_sft` and `at_grpo` cost the attack of `train.adversary` beside what `sft` and `grpo` cost: `num_steps` + 2
        /// forward and `num_steps` backward passes of the attacked questions. `trades` costs that attack, a forward pass of the
        /// attacked questions on clean images before it, and an update through which they go twice, clean and attacked.
        recipe: RecipeName = RecipeName::Sft,
        /// Steps: batches of questions. Each is one optimiser step, with `grpo.num_updates` so many at one learning rate: the
        /// schedule goes by steps. (TRL's `max_steps` and schedule count the updates.)
        num_steps: usize = 1000 => Range::at_least(1.0),
        /// Questions of one optimiser step (groups, for GRPO).
        batch_size: usize = 16 => Range::closed(1.0, 1e6),
        /// Questions of one forward pass (of GRPO groups); absent: `batch_size`. Gradients add up to those of the whole batch, to
        /// rounding. Examinations (`train.validation`) attack no more at once.
        micro_batch_size: Option<usize> = None => Range::at_least(1.0),
        /// Whether a gradient keeps only the states between layers and computes what is inside them again: less memory, more
        /// time; equal gradients, to rounding. So do the attacks of examinations (`train.validation`).
        recompute: bool = false,
        /// Peak learning rate.
        learning_rate: f64 = 1e-5 => Range::at_least(0.0),
        /// Steps over which the learning rate rises linearly to its peak.
        warmup_steps: usize = 0,
        /// Course of the learning rate after warm-up.
        schedule: ScheduleName = ScheduleName::Cosine,
        /// Floor of the learning rate, as a share of its peak.
        min_learning_rate_ratio: f64 = 0.0 => Range::closed(0.0, 1.0),
        /// Decoupled weight decay, of adapters too; biases and weights of norms are left alone, as by Hugging Face's Trainer.
        weight_decay: f64 = 0.0 => Range::at_least(0.0),
        /// Whether `weight_decay` is for biases and weights of norms too.
        weight_decay_norms: bool = false,
        /// Decay of the mean of gradients.
        beta1: f64 = 0.9 => Range::from_below(0.0, 1.0),
        /// Decay of the mean of squared gradients.
        beta2: f64 = 0.999 => Range::from_below(0.0, 1.0),
        /// Added to the root of the squared-gradient mean.
        adam_epsilon: f64 = 1e-8 => Range::above(0.0),
        /// Global gradient norm above which gradients are scaled down; 0: never.
        max_grad_norm: f64 = 1.0 => Range::at_least(0.0),
        /// Decay, per update, of an exponential moving average of what trains, 0.999 for example; absent: none is kept. It begins
        /// at the first weights, and is saved as `ema/` in each checkpoint: a directory like the checkpoint itself. Training,
        /// its attacks and its metrics go on with the weights themselves. Costs four bytes for each trained parameter
        /// (twelve while a checkpoint is written), and a second directory of weights on disk.
        ema_decay: Option<f64> = None => Range::open(0.0, 1.0),
        /// What the model learns to write; the `prompt` should ask for it. A question without a reasoning of its own gets a made-up
        /// sentence (modality, right option): the run says how many.
        target: TargetName = TargetName::Cot,
        /// Whether the order of the options is drawn anew each time an item is seen.
        permute_options: bool = false,
        /// Whether the first words say what is seen and no image is shown: teaches a model from scratch to read
        /// options before it learns to see. A question without a reasoning is told its modality and right option.
        captions: bool = false,
        /// Standard deviation of Gaussian noise added to every training image at the model's resolution, fresh at each step
        /// and not clipped: what makes smoothing with the same `sigma` certify more (Cohen et al. 2019); 0: none. Attacked
        /// images get it after the attack, which knows of it only with `adversary.smoothing_sigma`. Images under noise never come
        /// back, so what a vision tower that does not train says about them is not remembered (`feature_cache_mib`) but computed
        /// at each step.
        noise_sigma: f64 = 0.0 => Range::at_least(0.0),
        /// Steps between checkpoints; 0: only at the end.
        save_every: usize = 100,
        /// Checkpoints kept, the newest; 0: all.
        keep_checkpoints: usize = 2,
        /// TensorBoard shows the completions written down at every step that is a multiple of this, a few kilobytes each time; 0:
        /// none. Changes nothing else.
        log_text_every: usize = 10,
        /// At every step that is a multiple of this, recipes with an adversary keep the first attacked image, its adversarial
        /// twin and the amplified difference as PNG files of the model's resolution under `images/step-N/`, for TensorBoard and
        /// reports: up to some megabytes each time, for large images; 0: never. Changes nothing else.
        log_images_every: usize = 100,
        /// Rank of a low-rank adapter (LoRA) that trains in place of the weights; 0: the weights train.
        lora_rank: usize = 0,
        /// The adapter's update is multiplied by `lora_alpha` / `lora_rank`.
        lora_alpha: f64 = 32.0 => Range::above(0.0),
        /// Whether it is multiplied by `lora_alpha` / sqrt(`lora_rank`) instead.
        lora_use_rslora: bool = false,
        /// Share of the entries of the adapter's input that each update drops, the others divided by 1 - `lora_dropout`; the
        /// weights see all of it. As in PEFT it is for the pass that gives the gradient alone: completions are sampled,
        /// images attacked and references asked without it. GRPO compares its later updates on one set of completions
        /// with the first, whose entries were dropped too. What prompts have in common, and the prompt of a group, is computed
        /// once and so has one mask. Costs memory for one more input of each adapted layer, and a little time. An
        /// adapter that is trained further takes this setting, not that of its file.
        lora_dropout: f64 = 0.0 => Range::from_below(0.0, 1.0),
        /// The learning rate of the adapter's B as a multiple of that of its A (LoRA+, Hayou et al. 2024; 16 is theirs).
        lora_plus_ratio: f64 = 1.0 => Range::above(0.0),
        /// Linear layers with an adapter, as PEFT names them: `all-linear`, names with commas between, or a regular
        /// expression; absent: every linear layer of the parts that train. Those of an adapter that is trained further must be
        /// among them.
        lora_target_modules: Option<String> = None,
        /// Linear layers without one all the same; names or a regular expression.
        lora_exclude_modules: Option<String> = None,
        /// Which parts of the model train; the modules of an adapter that is trained further must lie in them.
        parts: TrainParts = TrainParts::default(),
        /// Peak learning rates of parts of the model, where they differ.
        learning_rates: LearningRates = LearningRates::default(),
        /// GRPO, for the recipes `grpo` and `at_grpo`.
        grpo: GrpoSettings = GrpoSettings::default(),
        /// The adversary in training, for the recipes `at_sft`, `at_grpo` and `trades`. Its keys say what they cost; those that do
        /// not change no cost.
        adversary: AdversaryConfig = AdversaryConfig::default(),
        /// Questions apart from those trained on, asked as training goes on.
        validation: ValidationConfig = ValidationConfig::default(),
        /// The network, for the recipe `denoiser`.
        denoiser: DenoiserSettings = DenoiserSettings::default(),
        /// When a run is said to go wrong.
        watch: WatchSettings = WatchSettings::default(),
    }
}

section! {
    /// `[train.watch]`: when a run is said to go wrong. Warnings go to the terminal and to `warnings.jsonl`, once per episode, which
    /// ends after `window` steps without the trouble; they change nothing else and cost nothing.
    pub struct WatchSettings {
        /// Steps in a row that a standing trouble lasts before it is warned of: rewards that are all 0 or not given, groups without
        /// variance, completions cut off, attacks without effect; a learning rate of 0 is warned of at its second step. 0:
        /// nothing is watched.
        patience: usize = 20,
        /// Steps that tell what is usual: their median for gradients, losses and divergences, their mean for the length of
        /// completions, the first so many against the last.
        window: usize = 20 => Range::at_least(2.0),
        /// A gradient norm, a loss (of supervised recipes; above half of what it began with) or a divergence (above a tenth of
        /// `max_kl`) is a spike when it exceeds the usual one this many times.
        spike_factor: f64 = 10.0 => Range::above(1.0),
        /// Divergence from the reference policy, in nats per token, above which the policy is said to run away.
        max_kl: f64 = 1.0 => Range::above(0.0),
        /// Completions have collapsed when the mean length falls below this share of what it was first; 0: never.
        min_length_ratio: f64 = 0.25 => Range::closed(0.0, 1.0),
        /// Completions run into the limit when at least this share of them is cut off.
        max_clipped_ratio: f64 = 0.95 => Range::open_closed(0.0, 1.0),
        /// An attack is without effect when it raises the mean loss by less than this, in nats.
        min_pgd_gain: f64 = 1e-3 => Range::at_least(0.0),
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
    /// `[train.validation]`: questions apart from those trained on, asked before the first step, after every so many, and after
    /// the last: on clean images, without the right image, and under PGD on the original image's pixels. The
    /// checkpoint of the best is kept. Each time costs an `attack` of `limit` questions.
    pub struct ValidationConfig {
        /// Steps between; 0: none.
        every: usize = 0,
        /// JSON list of the ids of its questions.
        split: Option<PathBuf> = None,
        /// A data set of its own, in any supported format, whose images lie beside it, or under `data.omnimedvqa` where training
        /// has `data.data` too; absent: that of training. A question in the words of one that is trained on, about an image of the
        /// same pixels, is refused.
        data: Option<PathBuf> = None,
        /// Questions asked, at even distances in the order of their ids; 0: all.
        limit: usize = 128,
        /// The norm that bounds the attack.
        norm: NormName = NormName::Linf,
        /// Budget of the attack, in units of pixel values in [0, 1].
        epsilon: f64 = 8.0 / 255.0 => Range::at_least(0.0),
        /// Its gradient steps; 0: clean images only.
        num_steps: usize = 10,
        /// What it maximises.
        objective: ObjectiveName = ObjectiveName::Completion,
        /// By what the best checkpoint is chosen; absent: `robust_accuracy`, without an attack `accuracy`. Rewards are for the
        /// recipes `grpo` and `at_grpo`.
        metric: Option<MetricName> = None,
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
    /// `[train.learning_rates]`: peak learning rates of parts of the model, or of the adapters over them. All follow the schedule;
    /// `learning_rate` in the log stays that of `train.learning_rate`.
    pub struct LearningRates {
        /// The vision tower's; absent: `train.learning_rate`.
        vision: Option<f64> = None => Range::at_least(0.0),
        /// The merger's; absent: `train.learning_rate`.
        merger: Option<f64> = None => Range::at_least(0.0),
        /// The text decoder's; absent: `train.learning_rate`.
        text: Option<f64> = None => Range::at_least(0.0),
    }
}

section! {
    /// `[train.grpo]`: group-relative policy optimisation (Shao et al. 2024).
    pub struct GrpoSettings {
        /// Completions sampled for one question.
        group_size: usize = 8 => Range::closed(2.0, 65_536.0),
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
        /// Weight of the k3 estimate of the divergence from the reference policy; 0: no reference is kept. Above 0 a step costs a
        /// forward pass of the reference over its completions, groups whose rewards are all equal go through the update too,
        /// and the reference takes the memory of one more copy of what trains.
        kl_coef: f64 = 0.0 => Range::at_least(0.0),
        /// Whether that estimate is multiplied by the ratio, which makes it unbiased off policy.
        kl_bias_correction: bool = false,
        /// Steps after which the reference policy follows the trained one (TR-DPO, Gorbatovski et al. 2024); 0: it stays what
        /// training began with, the adapter of `--adapter` included. Costs one more copy of what trains, in memory and in
        /// each checkpoint.
        ref_sync_steps: usize = 0,
        /// How far it then goes: reference = `ref_sync_alpha` x trained + (1 - `ref_sync_alpha`) x reference.
        ref_sync_alpha: f64 = 0.6 => Range::closed(0.0, 1.0),
        /// The image that the reference policy sees. `clean` costs one more encoding of each question's image where the vision
        /// tower does not train (remembered, see `feature_cache_mib`); where it trains both cost the same.
        kl_image: KlImage = KlImage::Adversarial,
        /// How token losses become one number.
        loss_type: LossType = LossType::Grpo,
        /// What advantages are divided by.
        scale_rewards: ScaleRewards = ScaleRewards::Group,
        /// Optimiser steps on one set of completions, sampled and rewarded once; each costs a forward and a backward pass over
        /// them, and has a line of its own in `metrics.jsonl`, with its number under `update`.
        num_updates: usize = 1 => Range::closed(1.0, 1000.0),
        /// Whether completions that were cut off before they ended take no part in the loss.
        mask_truncated: bool = false,
        /// How often a group whose rewards are all equal, which teaches nothing, is sampled anew on the same image (dynamic
        /// sampling, Yu et al. 2025); each time costs another rollout of those groups.
        max_resamples: usize = 0,
        /// Questions of a step whose completions are all written to `completions.jsonl`, attacked ones first; 0: none. Each costs
        /// `group_size` lines, with prompt, about a kilobyte and more.
        log_questions: usize = 1,
        /// Whether rewards are weighted and added up before they are normalised, or each is normalised first, so that a reward of
        /// small spread counts as much as one of large; `scale_rewards` has no meaning then.
        reward_aggregation: RewardAggregation = RewardAggregation::SumThenNormalize,
        /// Weight of the accuracy reward.
        accuracy_weight: f64 = 1.0 => Range::at_least(0.0),
        /// Weight of the format reward.
        format_weight: f64 = 1.0 => Range::at_least(0.0),
        /// Whether accuracy is graded: half for the right letter among further text.
        graded: bool = false,
        /// Weight of the soft penalty on long completions (DAPO, Yu et al. 2025): 0 up to `overlong_max_length` -
        /// `overlong_cache` tokens, falling linearly to -1 at `overlong_max_length`; 0: none.
        overlong_weight: f64 = 0.0 => Range::at_least(0.0),
        /// Length, in tokens, at which that penalty is full; absent: `max_new_tokens`.
        overlong_max_length: Option<usize> = None => Range::at_least(1.0),
        /// Tokens before `overlong_max_length` over which it grows; absent: a fifth of `overlong_max_length`, as in DAPO.
        overlong_cache: Option<usize> = None,
        /// Weight of the penalty on repeated words: `repetition_max_penalty` x (1 - distinct n-grams / all n-grams) of the
        /// completion's words (Yeo et al. 2025); 0: none.
        repetition_weight: f64 = 0.0 => Range::at_least(0.0),
        /// Words of one n-gram.
        repetition_ngram_size: usize = 3 => Range::at_least(1.0),
        /// That penalty where everything is a repeat.
        repetition_max_penalty: f64 = -1.0 => Range::from_below(-1000.0, 0.0),
        /// A program and its arguments that rewards completions: started once, in this directory, it reads one JSON object a line
        /// ("step", "index", "count", "id", "question", "options", "answer", "completion", "is_finished", "num_tokens", "modality",
        /// "question_type", "dataset", "image", "reasoning") and answers each with one line: {"reward": NUMBER}, or {"rewards":
        /// {"NAME": NUMBER}} for several, null for none. All else it writes must go to standard error, and it ends when its input
        /// does. The first line, of step 0, is a trial before weights are loaded. Training waits for each step's answers. Validation
        /// asks too, under the number of steps done, and so does `adversary.objective` `expected_reward`, item by item and several
        /// times in a step; `index` and `count` are of one such asking. A run
        /// resumes to the same bytes only if the program answers equal lines equally; the files among its arguments must stay the
        /// same.
        reward_command: Option<Vec<String>> = None,
        /// Weight of each of its rewards; 0: they are logged only.
        reward_command_weight: f64 = 1.0 => Range::at_least(0.0),
        /// Longest wait for one of its answers, in seconds, the trial's with its start included.
        reward_command_timeout: f64 = 60.0 => Range::closed(0.001, 86_400.0),
    }
}

impl RecipeName {
    /// Whether it samples completions and rewards them.
    pub const fn is_grpo(self) -> bool {
        matches!(self, Self::Grpo | Self::AtGrpo)
    }

    /// Whether it trains on attacked images.
    pub const fn is_adversarial(self) -> bool {
        matches!(self, Self::AtSft | Self::AtGrpo | Self::Trades)
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

    /// The penalty on long completions of at most `max_new_tokens`; none without a weight.
    pub fn overlong(&self, max_new_tokens: usize) -> Option<Overlong> {
        let max_length = self.overlong_max_length.unwrap_or(max_new_tokens);
        let cache = self.overlong_cache.unwrap_or(max_length / 5);
        (self.overlong_weight > 0.0).then_some(Overlong { max_length, cache })
    }

    /// The penalty on repetition; none without a weight.
    pub fn repetition(&self) -> Option<Repetition> {
        let (ngram_size, max_penalty) = (self.repetition_ngram_size, self.repetition_max_penalty);
        (self.repetition_weight > 0.0).then_some(Repetition { ngram_size, max_penalty })
    }

    /// Everything that is wrong with the rewards of completions of at most `max_new_tokens`.
    pub(super) fn reward_problems(&self, max_new_tokens: usize) -> Vec<ConfigError> {
        let mut problems = self.rewards().check();
        let command_weight = if self.reward_command.is_some() { self.reward_command_weight } else { 0.0 };
        let weights = [
            self.accuracy_weight,
            self.format_weight,
            self.overlong_weight,
            self.repetition_weight,
            command_weight,
        ];
        if weights.iter().all(|weight| *weight == 0.0) {
            let message = "every reward weight is 0: every completion would be worth the same";
            problems.push(ConfigError::new("accuracy_weight", message).with_help("set accuracy_weight to 1"));
        }
        if let Some(Overlong { max_length, cache }) = self.overlong(max_new_tokens) {
            if cache > max_length {
                let message = format!("`overlong_cache` {cache} exceeds the longest length, {max_length}");
                let help = "it is the part of `overlong_max_length` over which the penalty grows: lower it";
                problems.push(ConfigError::new("overlong_cache", message).with_help(help));
            } else if max_length - cache >= max_new_tokens {
                let free = max_length - cache;
                let message = format!(
                    "up to {free} tokens there is no penalty, and none can be longer than `max_new_tokens` {max_new_tokens}"
                );
                let help = "lower `overlong_max_length`, or raise `overlong_cache`";
                problems.push(ConfigError::new("overlong_weight", message).with_help(help));
            }
        }
        let is_by_column = self.reward_aggregation == RewardAggregation::NormalizeThenSum;
        if is_by_column && self.scale_rewards != ScaleRewards::Group {
            let message = "`scale_rewards` has no meaning with reward_aggregation `normalize_then_sum`";
            problems.push(ConfigError::new("scale_rewards", message).with_help("leave it at `group`"));
        }
        if self.reward_command.as_ref().is_some_and(|command| command.iter().any(String::is_empty)) {
            let message = "`reward_command` holds an empty text";
            problems.push(ConfigError::new("reward_command", message).with_help("take it out of the list"));
        }
        problems
    }
}

impl ValidationConfig {
    /// By what the best checkpoint is chosen.
    pub fn metric(&self) -> MetricName {
        match self.metric {
            Some(metric) => metric,
            None if self.num_steps == 0 => MetricName::Accuracy,
            None => MetricName::RobustAccuracy,
        }
    }

    /// What does not fit `recipe`, by key of the section.
    pub fn problems(&self, recipe: RecipeName, captions: bool) -> Vec<ConfigError> {
        let mut problems = Vec::new();
        if self.every == 0 {
            return problems;
        }
        let mut problem = |key: &str, message: String, help: &str| {
            problems.push(ConfigError::new(format!("train.validation.{key}"), message).with_help(help));
        };
        if self.split.is_none() && self.data.is_none() {
            let message = "validation needs questions apart from those trained on".to_owned();
            problem("split", message, "name them with `train.validation.split` or `train.validation.data`");
        }
        if recipe == RecipeName::Denoiser {
            let help = "see what the denoiser is worth with `safemed certify --denoiser`; leave `every` at 0";
            problem("every", "a denoiser answers no questions".to_owned(), help);
        }
        if captions {
            let message = "a training on captions shows no images that could be attacked".to_owned();
            problem("every", message, "leave `every` at 0");
        }
        let metric = self.metric();
        let is_robust = matches!(metric, MetricName::RobustAccuracy | MetricName::RobustReward);
        if is_robust && self.num_steps == 0 {
            let message = format!("`{}` needs an attack", metric.word());
            problem("metric", message, "set `train.validation.num_steps`, or use `accuracy`");
        }
        let is_reward = matches!(metric, MetricName::Reward | MetricName::RobustReward);
        if is_reward && !recipe.is_grpo() {
            let message = format!("the recipe `{recipe}` has no rewards");
            problem("metric", message, "use `accuracy` or `robust_accuracy`");
        }
        problems
    }
}

impl TrainConfig {
    /// What contradicts itself, or has no effect, in how parameters are updated; `has_adapter`: one trains that exists.
    pub(super) fn parameter_problems(&self, has_adapter: bool) -> Vec<ConfigError> {
        let mut problems = Vec::new();
        let mut refuse = |key: &str, message: String, help: &str| {
            problems.push(ConfigError::new(format!("train.{key}"), message).with_help(help));
        };
        let is_denoiser = self.recipe == RecipeName::Denoiser;
        if self.lora_rank == 0 && !has_adapter {
            let help = "set `lora_rank`, 16 for example, or leave it out";
            let no_adapter = |key: &str| format!("`{key}` has no effect: no adapter trains");
            if self.lora_dropout > 0.0 {
                refuse("lora_dropout", no_adapter("lora_dropout"), help);
            }
            if self.lora_plus_ratio != 1.0 {
                refuse("lora_plus_ratio", no_adapter("lora_plus_ratio"), help);
            }
        }
        if self.recipe == RecipeName::Trades && self.lora_dropout > 0.0 {
            let message =
                "`lora_dropout` would put its own noise between the two branches that `trades` compares";
            refuse("lora_dropout", message.to_owned(), "leave it out");
        }
        let (rates, parts) = (&self.learning_rates, &self.parts);
        for (part, rate, trains) in [
            ("vision", rates.vision, parts.vision),
            ("merger", rates.merger, parts.merger),
            ("text", rates.text, parts.text),
        ] {
            let key = format!("learning_rates.{part}");
            if rate.is_some() && is_denoiser {
                let message =
                    format!("`{part}` has no effect: the recipe `denoiser` trains no part of the model");
                refuse(&key, message, "use `train.learning_rate`");
            } else if rate.is_some() && !trains {
                let message = format!("`{part}` has no effect: `train.parts.{part}` is false");
                refuse(&key, message, "leave one of the two out");
            }
        }
        if self.weight_decay_norms && self.weight_decay == 0.0 {
            let message = "`weight_decay_norms` has no effect: `weight_decay` is 0".to_owned();
            refuse("weight_decay_norms", message, "set `weight_decay`, 0.01 for example");
        }
        let grpo = &self.grpo;
        if self.recipe.is_grpo() && grpo.ref_sync_steps > 0 && grpo.kl_coef == 0.0 {
            let message =
                "`ref_sync_steps` has no effect: `kl_coef` is 0, so no reference is kept".to_owned();
            refuse("grpo.ref_sync_steps", message, "set `kl_coef`, 0.04 for example");
        }
        if self.recipe.is_grpo()
            && grpo.ref_sync_steps == 0
            && grpo.ref_sync_alpha != GrpoSettings::default().ref_sync_alpha
        {
            let message = "`ref_sync_alpha` has no effect: `ref_sync_steps` is 0".to_owned();
            refuse("grpo.ref_sync_alpha", message, "set `ref_sync_steps`, 512 for example");
        }
        problems
    }

    /// What is kept for gradients.
    pub const fn memory(&self) -> Memory {
        if self.recompute { Memory::Recompute } else { Memory::Keep }
    }
}

#[cfg(test)]
mod tests {
    use super::super::{Command, Override, RunConfig};
    use super::*;
    use crate::error::{Error, Result};

    fn loaded(settings: &[(&str, &str)]) -> Result<RunConfig> {
        let settings: Vec<Override> =
            settings.iter().map(|(key, value)| Override::new(*key, *value, "--set")).collect();
        RunConfig::load(Command::Train, None, &settings)
    }

    #[test]
    fn the_constants_of_the_loss_are_those_of_the_configuration() {
        let own = [
            ("train.recipe", "grpo"),
            ("train.grpo.num_updates", "2"),
            ("train.grpo.loss_type", "dapo"),
            ("train.grpo.importance_level", "sequence"),
            ("train.grpo.clip_low", "0.1"),
            ("train.grpo.clip_high", "0.3"),
            ("train.grpo.delta", "1.5"),
            ("train.grpo.kl_coef", "0.04"),
            ("train.grpo.kl_bias_correction", "true"),
        ];
        let wanted = GrpoConfig {
            loss_type: grpo::LossType::Dapo,
            importance_level: grpo::ImportanceLevel::Sequence,
            clip_low: 0.1,
            clip_high: 0.3,
            delta: Some(1.5),
            kl_coef: 0.04,
            kl_bias_correction: true,
        };
        assert_eq!(loaded(&own).unwrap().train.grpo.loss(), wanted);
        assert_eq!(loaded(&own[..1]).unwrap().train.grpo.loss(), GrpoConfig::default());
        // Within the clip a cap would never be reached.
        let Err(Error::Config(problems)) = loaded(&[&own[..], &[("train.grpo.delta", "1.2")]].concat())
        else {
            panic!("a delta below 1 + clip_high is taken")
        };
        assert_eq!(problems.len(), 1, "{problems:?}");
        assert_eq!(problems[0].key, "train.grpo.delta");
    }

    #[test]
    fn what_people_call_a_prompt_is_written_by_its_name() {
        for (word, name, target) in [
            ("think", "med_r1_think", "cot"),
            ("no_think", "med_r1_no_think", "instruct"),
            ("think_after", "think_after", "cot"),
        ] {
            let config = loaded(&[("prompt", word), ("train.target", target)]).unwrap();
            assert_eq!(config.prompt, name);
            let named = loaded(&[("prompt", name), ("train.target", target)]).unwrap();
            assert_eq!(config.identity(Command::Train).unwrap(), named.identity(Command::Train).unwrap());
        }
    }

    #[test]
    fn sizes_that_exceed_each_other_are_refused_with_a_remedy() {
        for (settings, key, help) in [
            ([("min_pixels", "300"), ("max_pixels", "256")], "min_pixels", "lower `min_pixels`"),
            (
                [("train.micro_batch_size", "8"), ("train.batch_size", "4")],
                "train.micro_batch_size",
                "lower `micro_batch_size`",
            ),
        ] {
            let Err(Error::Config(problems)) = loaded(&settings) else { panic!("{settings:?} is taken") };
            assert_eq!(problems.len(), 1, "{problems:?}");
            assert_eq!(problems[0].key, key);
            assert!(problems[0].help.as_deref().is_some_and(|text| text.contains(help)), "{problems:?}");
        }
    }
}
