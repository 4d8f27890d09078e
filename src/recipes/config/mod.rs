//! `RunConfig`: every setting of a run, each with default, range, unit and source in one place.
//!
//! The same word names a setting in the file, on the command line, in records and in reports. How the layers
//! (defaults, file, `--set`, environment, flags) are joined stands in `layers`; how a key describes itself, in `keys`.

mod adversary;
mod effect;
pub mod keys;
mod layers;
mod show;
mod train;
mod values;

pub use adversary::{AdversaryConfig, AdversaryObjective, RampName, RefreshName};
pub use layers::Override;
pub use show::show;
pub use train::{
    DenoiserSettings, GrpoSettings, ImportanceName, KlImage, LearningRates, LossType, MetricName, RecipeName,
    RewardAggregation, ScaleRewards, ScheduleName, TargetName, TrainConfig, TrainParts, ValidationConfig,
    WatchSettings,
};
pub use values::DeviceWord;

use crate::data::prompt::PromptTemplate;
use crate::data::{DatasetConfig, Shard};
use crate::error::{ConfigError, Error, Result};
use crate::model::loader::Precision;
use crate::model::sampling::SamplingConfig;
use crate::pixels::gray::{GrayReading, GrayRule, Window};
use keys::{Key, Node, Range, Setting, section, words};
use std::path::{Path, PathBuf};

words! {
    /// What the configuration is for: decides which sections count.
    pub enum Command = Eval {
        /// The whole pipeline on phantoms.
        Demo = "demo",
        /// Training, by any recipe.
        Train = "train",
        /// Accuracy and controls.
        Eval = "eval",
        /// Accuracy under attack.
        Attack = "attack",
        /// Certified accuracy.
        Certify = "certify",
        /// One answer.
        Predict = "predict",
    }
}

words! {
    /// What the layers' matrix products take.
    pub enum ArithmeticName = F32 {
        /// float32.
        F32 = "f32",
        /// Frozen weights and what they are multiplied with are rounded to bfloat16, and summed in float32. Patch embedding, output
        /// layer, attention and all else stay in float32. About one and a half times as fast where the processor has
        /// instructions for it. It is another classifier, to be evaluated, attacked and certified as such.
        Bf16 = "bf16",
    }
}

words! {
    /// How frozen weights are held in memory. Trained weights are float32.
    pub enum Dtype = Auto {
        /// As the checkpoint holds them: float32 or bfloat16; float16 in float32.
        Auto = "auto",
        /// In float32: the same results as `auto`, to the byte, in twice the memory where the file is bfloat16.
        F32 = "f32",
        /// Rounded to bfloat16 where the file is not: half the memory, other numbers.
        Bf16 = "bf16",
    }
}

words! {
    /// How gray deeper than eight bits is read.
    pub enum DeepGray = AsStored {
        /// As transformers reads it: sixteen-bit values above 255 are white. DICOM: the file's own window, else its range.
        AsStored = "as_stored",
        /// From the least to the largest value that the file could hold.
        FullRange = "full_range",
        /// From the picture's least to its largest value.
        MinMax = "min_max",
    }
}

words! {
    /// How the model's answer is obtained.
    pub enum Scoring = Generate {
        /// Greedy free generation, read by the answer parser.
        Generate = "generate",
        /// The option letter of highest likelihood.
        Likelihood = "likelihood",
    }
}

words! {
    /// The attack.
    pub enum Method = Pgd {
        /// Random noise in the ball: the attack that must be weaker than every other.
        Noise = "noise",
        /// One signed gradient step (Goodfellow et al. 2015).
        Fgsm = "fgsm",
        /// Projected gradient descent (Madry et al. 2018).
        Pgd = "pgd",
        /// PGD with adaptive step size (Croce and Hein 2020).
        Apgd = "apgd",
        /// Random square search without gradients (Andriushchenko et al. 2020).
        Square = "square",
        /// The worst of several attacks, on survivors.
        Auto = "auto",
    }
}

words! {
    /// The norm that bounds the attack.
    pub enum NormName = Linf {
        /// Largest change of any channel value.
        Linf = "linf",
        /// Euclidean length of the change.
        L2 = "l2",
    }
}

words! {
    /// What the attack maximises.
    pub enum ObjectiveName = Completion {
        /// Negative log-likelihood of the whole right completion, reasoning included.
        Completion = "completion",
        /// Negative log-likelihood of the answer letter alone: masked in chain-of-thought models, where the letter is
        /// copied from the finished reasoning.
        Answer = "answer",
        /// Negative log-likelihood of the right reasoning: the tokens that carry what is seen.
        Finding = "finding",
        /// Best wrong option minus the right one.
        Margin = "margin",
        /// Negative log of the right option's share among the options.
        CrossEntropy = "cross_entropy",
        /// The margin divided by best minus third option (Croce and Hein 2020); with two options the margin itself.
        Dlr = "dlr",
        /// Each wrong option minus the right one, in turn, on survivors; divided as in `dlr` from four options on.
        Targeted = "targeted",
        /// `completion`, `finding`, `answer` and `margin` in turn, on survivors.
        All = "all",
    }
}

words! {
    /// Which pixels the attack may change.
    pub enum Space = Original {
        /// The original image's pixels; the resize is part of the attacked function.
        Original = "original",
        /// The pixels at the model's input resolution.
        Model = "model",
    }
}

words! {
    /// How draws are spent.
    pub enum CertifyMode = Cohen {
        /// Fixed `n0` and `n` (Cohen et al. 2019, CERTIFY).
        Cohen = "cohen",
        /// Draws until a confidence sequence decides, `n` at most.
        Sequential = "sequential",
    }
}

words! {
    /// The bound of a sequential certificate, which holds at every look at the draws together.
    pub enum RuleName = Kt {
        /// Krichevsky-Trofimov e-value, cut off at the bound, at every look; a Clopper-Pearson bound beside it at the cap.
        Kt = "kt",
        /// Clopper-Pearson bounds that share `alpha` over stages, each twice the one before.
        ClopperPearson = "clopper_pearson",
    }
}

section! {
    /// Every setting of a run.
    pub struct RunConfig {
        /// Seed of every random stream.
        seed: u64 = 0,
        /// Where tensors live: `auto`, `cpu`, `cuda`, `cuda:N` or `metal`.
        device: DeviceWord = DeviceWord::default(),
        /// How frozen weights are held: `auto`, `f32` or `bf16`.
        dtype: Dtype = Dtype::Auto,
        /// What matrix products take: `f32` or `bf16`, which holds frozen weights in bfloat16 too.
        arithmetic: ArithmeticName = ArithmeticName::F32,
        /// Threads of the processor; absent: all. Changes no result.
        threads: Option<usize> = None => Range::at_least(1.0),
        /// Checkpoint: a Hugging Face directory, or an id on the hub; `scratch:tiny` trains a tiny model from scratch.
        model: Option<String> = None,
        /// Branch, tag or commit hash of a `model` on the hub; absent: `main`. The commit it was goes into `run.json`.
        revision: Option<String> = None,
        /// LoRA adapter directory in PEFT's layout, applied over `model`.
        adapter: Option<PathBuf> = None,
        /// Directory of a denoiser (see `train.recipe`) that every image passes before `model`: part of what is attacked and
        /// certified.
        denoiser: Option<PathBuf> = None,
        /// Fewest pixels of a resized image, in place of what the checkpoint's image processor says. Smaller images are blown up.
        min_pixels: Option<usize> = None => Range::at_least(1.0),
        /// Most pixels of a resized image, in place of what the checkpoint's image processor says: memory and time of training
        /// and of attacks grow with it, and so does what can be seen. A model that is trained keeps it; an adapter does not,
        /// and wants the same again wherever it is used.
        max_pixels: Option<usize> = None => Range::at_least(1.0),
        /// Name of the prompt template: `med_r1_think` (also `think`), `med_r1_no_think` (also `no_think`), `med_r1_train`,
        /// `medvlm_r1`, `think_after`, `plain`, `phantom` or `phantom_cot`.
        prompt: String = "med_r1_think".to_owned(),
        /// How the answer is obtained.
        scoring: Scoring = Scoring::Generate,
        /// Longest completion, in tokens.
        max_new_tokens: usize = 512 => Range::at_least(1.0),
        /// Items (or noise draws) in one forward pass. Changes no result.
        batch_size: usize = 8 => Range::at_least(1.0),
        /// Memory for what a vision tower that does not train said about images, in MiB: the next time it is not asked. Changes no
        /// result.
        feature_cache_mib: usize = 256,
        /// Run directory; absent: `runs/COMMAND-TIME`.
        out: Option<PathBuf> = None,
        /// Whether reports carry pictures. Changes no result.
        images: bool = true,
        /// How the tokens of an answer are chosen.
        generation: GenerationConfig = GenerationConfig::default(),
        /// Which questions are read.
        data: DataConfig = DataConfig::default(),
        /// Attack settings, for `safemed attack`.
        attack: AttackConfig = AttackConfig::default(),
        /// Smoothing settings, for `safemed certify`.
        certify: CertifyConfig = CertifyConfig::default(),
        /// Training settings, for `safemed train`.
        train: TrainConfig = TrainConfig::default(),
    }
}

section! {
    /// `[generation]`: how the tokens of an answer are chosen by `eval`, `certify` and `predict`.
    pub struct GenerationConfig {
        /// 0 is greedy, which the numbers of this project are stated for; otherwise tokens are drawn at this temperature, with a
        /// seed that depends on the run's, the item and (under noise) the draw alone.
        temperature: f64 = 0.0 => Range::at_least(0.0),
        /// Keep the so many most likely tokens.
        top_k: Option<usize> = None => Range::at_least(1.0),
        /// Keep the most likely tokens that together have this probability.
        top_p: Option<f64> = None => Range::open_closed(0.0, 1.0),
        /// Keep tokens of at least this share of the most likely one's probability.
        min_p: Option<f64> = None => Range::closed(0.0, 1.0),
        /// Makes tokens that stood before less likely; 1 changes nothing. It counts greedily too.
        repetition_penalty: f64 = 1.0 => Range::above(0.0),
    }
}

section! {
    /// `[data]`: which questions are read.
    pub struct DataConfig {
        /// Root of an OmniMedVQA tree; beside `data`, the root of that file's images.
        omnimedvqa: Option<PathBuf> = None,
        /// A data set in any supported format, detected by its content: an OmniMedVQA tree or file, Med-R1 splits, LLaVA or ShareGPT
        /// `conversations`, chat `messages` (or TRL's `prompt` and `completion`); each file a JSON array or JSON lines; or a folder
        /// of such files.
        data: Option<PathBuf> = None,
        /// JSON list of the question ids to keep.
        split: Option<PathBuf> = None,
        /// JSON list of the training ids: they give the option prior its counts.
        train_split: Option<PathBuf> = None,
        /// Keep this modality only.
        modality: Option<String> = None,
        /// Keep this question type only.
        question_type: Option<String> = None,
        /// Keep the first so many items, damaged images counted, missing ones not.
        limit: Option<usize> = None => Range::at_least(1.0),
        /// `I/N`: every N-th item from the I-th on, I from 0; the parts are joined by `safemed merge`. Not for training.
        shard: Option<Shard> = None,
        /// Whether records with a problem are left out and counted, instead of refusing the data. Every image is decoded before
        /// a run begins (not before a dry run): a damaged one is a problem of its records too.
        skip_invalid: bool = false,
        /// How gray deeper than eight bits is read, where no window is given.
        deep_gray: DeepGray = DeepGray::AsStored,
        /// `CENTER/WIDTH`: what of deep gray is shown, in the picture's units (Hounsfield units for CT); wins over `deep_gray` and
        /// over a DICOM file's own window.
        window: Option<Window> = None,
    }
}

section! {
    /// `[attack]`: budget and search.
    pub struct AttackConfig {
        /// The attack.
        method: Method = Method::Pgd,
        /// The norm that bounds the change.
        norm: NormName = NormName::Linf,
        /// Budget, in units of pixel values in [0, 1]. 8/255 is the customary L-inf budget (Madry et al. 2018).
        epsilon: f64 = 8.0 / 255.0 => Range::at_least(0.0),
        /// Length of one step, in the units of `epsilon`; absent: 2.5 x `epsilon` / `num_steps` (Madry et al. 2018).
        step_size: Option<f64> = None => Range::at_least(0.0),
        /// Gradient steps of one start; 100 for `apgd` and `auto` unless set.
        num_steps: usize = 10 => Range::at_least(1.0),
        /// Losses that `square` may ask for in one start.
        num_queries: usize = 1000 => Range::at_least(1.0),
        /// Starts; later ones attack survivors only.
        num_restarts: usize = 1 => Range::at_least(1.0),
        /// Share of the last direction that PGD keeps (Dong et al. 2018); 0 is plain PGD.
        momentum: f64 = 0.0 => Range::closed(0.0, 1.0),
        /// Whether each start begins at a random point of the ball.
        random_start: bool = true,
        /// What is maximised. `completion`: the negative log-likelihood of the whole right completion; `finding`: that of its
        /// reasoning alone, the tokens that carry what is seen; `answer`: that of the letter alone, behind the reasoning that the
        /// model itself gives of the clean image; `margin`: the best wrong option minus the right one; `cross_entropy`: the
        /// negative log of the right option's share among all; `dlr`: the margin divided by best minus third option; `targeted`:
        /// each wrong option in turn, minus the right one; `all`: the first four, one after another, on survivors.
        objective: ObjectiveName = ObjectiveName::Completion,
        /// Which pixels may change.
        space: Space = Space::Original,
        /// Whether an item already broken is left alone.
        early_stop: bool = true,
        /// Whether the smallest budget that breaks each item is searched for, by bisection of `epsilon`.
        min_epsilon: bool = false,
        /// Attack the smoothed model of this noise instead: gradients of the mean probability over a fixed bank of noise
        /// (Salman et al. 2019), answers by majority of fresh draws.
        smoothing_sigma: Option<f64> = None => Range::above(0.0),
        /// Draws of that bank, and of each majority.
        eot_samples: usize = 32 => Range::at_least(1.0),
        /// Items on which the attack itself is examined for its verdict; 0: none.
        verdict_items: usize = 8,
    }
}

section! {
    /// `[certify]`: randomised smoothing (Cohen et al. 2019).
    pub struct CertifyConfig {
        /// Standard deviation of the noise, in units of pixel values in [0, 1]. Required by `safemed certify`.
        sigma: Option<f64> = None => Range::above(0.0),
        /// Draws that select the class.
        n0: usize = 100 => Range::at_least(1.0),
        /// Draws that estimate its probability; the cap when sequential.
        n: usize = 1000 => Range::at_least(1.0),
        /// Probability that a certificate is wrong.
        alpha: f64 = 0.001 => Range::open(0.0, 1.0),
        /// How draws are spent.
        mode: CertifyMode = CertifyMode::Cohen,
        /// Sequential: decide this L2 radius only; absent: the anytime radius.
        target_radius: Option<f64> = None => Range::above(0.0),
        /// Sequential: the bound, `kt` or `clopper_pearson`.
        rule: RuleName = RuleName::Kt,
        /// Sequential, without `target_radius`: stop when twice the draws would, at the present share of the class, raise the
        /// radius by less than this share of it; 0 goes on as long as anything is gained.
        min_gain: f64 = 0.05 => Range::at_least(0.0),
        /// Whether each certified item is attacked inside its radius, through the smoothed model, and asked again.
        cross_check: bool = false,
    }
}

impl Dtype {
    /// The same for the loader, with what products take.
    pub const fn precision(self, arithmetic: ArithmeticName) -> Precision {
        match (arithmetic, self) {
            (ArithmeticName::Bf16, _) => Precision::HalfProducts,
            (ArithmeticName::F32, Self::Auto) => Precision::AsStored,
            (ArithmeticName::F32, Self::F32) => Precision::Single,
            (ArithmeticName::F32, Self::Bf16) => Precision::Half,
        }
    }
}

impl GenerationConfig {
    /// The same for the sampler.
    pub fn sampling(&self) -> SamplingConfig {
        let Self { temperature, top_k, top_p, min_p, repetition_penalty } = *self;
        SamplingConfig { temperature, top_k, top_p, min_p, repetition_penalty }
    }
}

impl DataConfig {
    /// How pictures are read.
    pub fn gray(&self) -> GrayReading {
        let rule = match self.deep_gray {
            DeepGray::AsStored => GrayRule::AsStored,
            DeepGray::FullRange => GrayRule::FullRange,
            DeepGray::MinMax => GrayRule::MinMax,
        };
        GrayReading { rule, window: self.window }
    }

    /// The same as the data reader wants it.
    pub fn dataset(&self) -> DatasetConfig {
        DatasetConfig {
            omnimedvqa: self.omnimedvqa.clone(),
            data: self.data.clone(),
            split: self.split.clone(),
            train_split: self.train_split.clone(),
            modality: self.modality.clone(),
            question_type: self.question_type.clone(),
            limit: self.limit,
            shard: self.shard,
            skip_invalid: self.skip_invalid,
            gray: self.gray(),
        }
    }
}

impl AttackConfig {
    /// The length of one step: `step_size`, else 2.5 x `epsilon` / `num_steps` and at most `epsilon`; of FGSM `epsilon`, of
    /// APGD 2 x `epsilon` to begin with.
    pub fn resolved_step_size(&self) -> f64 {
        match (self.method, self.step_size) {
            (Method::Fgsm, _) => self.epsilon,
            (Method::Apgd | Method::Auto, _) => 2.0 * self.epsilon,
            (_, Some(step_size)) => step_size,
            (_, None) => (2.5 * self.epsilon / self.num_steps.max(1) as f64).min(self.epsilon),
        }
    }

    /// Steps of a restart: none of noise, one of FGSM, of Square its queries.
    pub fn resolved_num_steps(&self) -> usize {
        match self.method {
            Method::Noise => 0,
            Method::Fgsm => 1,
            Method::Square => self.num_queries,
            Method::Pgd | Method::Apgd | Method::Auto => self.num_steps,
        }
    }

    /// Gradient steps where none are set: AutoAttack's for what it is made of.
    pub fn default_num_steps(method: Method) -> usize {
        match method {
            Method::Apgd | Method::Auto => 100,
            _ => Self::default().num_steps,
        }
    }
}

impl RunConfig {
    /// Joins defaults, `file` and `overrides` (each wins over those before it), then checks everything for `command`.
    ///
    /// # Errors
    /// [`Error::Config`] with every problem found; [`Error::Io`] when the file cannot be read.
    pub fn load(command: Command, file: Option<&Path>, overrides: &[Override]) -> Result<Self> {
        Ok(layers::load(Some(command), file, overrides)?.with_names())
    }

    /// The same without a command in mind: whatever only one command requires may be absent.
    pub fn load_any(file: Option<&Path>, overrides: &[Override]) -> Result<Self> {
        Ok(layers::load(None, file, overrides)?.with_names())
    }

    /// With the name of the prompt where another word for it was given: a run is the same under either.
    fn with_names(self) -> Self {
        match self.prompt.parse::<PromptTemplate>() {
            Ok(template) => Self { prompt: template.name().to_owned(), ..self },
            Err(_) => self,
        }
    }

    /// Room for features of images seen before.
    pub fn feature_bytes(&self) -> usize {
        self.feature_cache_mib.saturating_mul(1 << 20)
    }

    /// How weights are held and multiplied.
    pub const fn precision(&self) -> Precision {
        self.dtype.precision(self.arithmetic)
    }

    /// Checks what holds between keys.
    pub fn problems(&self, command: Option<Command>) -> Vec<ConfigError> {
        let mut problems = Vec::new();
        self.attack_problems(command, &mut problems);
        if let Err(error) = self.prompt.parse::<PromptTemplate>() {
            let text = error.to_string();
            let (message, help) = text.split_once("\n   = help: ").unwrap_or((&text, ""));
            problems.push(ConfigError::new("prompt", message).with_help(help));
        }
        if let (Some(least), Some(most)) = (self.min_pixels, self.max_pixels)
            && least > most
        {
            let message = format!("`min_pixels` {least} exceeds `max_pixels` {most}");
            let help = "lower `min_pixels` or raise `max_pixels`; what is left out is the checkpoint's own";
            problems.push(ConfigError::new("min_pixels", message).with_help(help));
        }
        if self.arithmetic == ArithmeticName::Bf16 && self.dtype == Dtype::F32 {
            problems.push(
                ConfigError::new("dtype", "weights in float32 cannot be multiplied in bfloat16")
                    .with_help("leave `dtype` out, or take `arithmetic = \"f32\"`"),
            );
        }
        if command == Some(Command::Certify) && self.certify.sigma.is_none() {
            problems.push(
                ConfigError::new("certify.sigma", "`sigma` is required")
                    .with_help("say how much noise, for example `--sigma 0.25`"),
            );
        }
        if self.certify.target_radius.is_some() && self.certify.mode != CertifyMode::Sequential {
            problems.push(
                ConfigError::new("certify.target_radius", "`target_radius` has no effect with mode `cohen`")
                    .with_help("add `--mode sequential`, or leave `target_radius` out"),
            );
        }
        if self.train.recipe == RecipeName::Denoiser && self.train.noise_sigma <= 0.0 {
            problems.push(
                ConfigError::new(
                    "train.noise_sigma",
                    "the recipe `denoiser` needs `noise_sigma`: the noise to take off",
                )
                .with_help("use the `sigma` of the certificates, for example 0.25"),
            );
        }
        if self.train.warmup_steps > self.train.num_steps {
            let (warmup, steps) = (self.train.warmup_steps, self.train.num_steps);
            problems.push(
                ConfigError::new(
                    "train.warmup_steps",
                    format!("`warmup_steps` {warmup} exceeds `num_steps` {steps}"),
                )
                .with_help("the learning rate would never reach its peak: lower `warmup_steps`"),
            );
        }
        if let Some(micro) = self.train.micro_batch_size
            && micro > self.train.batch_size
        {
            let message =
                format!("`micro_batch_size` {micro} exceeds `batch_size` {}", self.train.batch_size);
            let help = "lower `micro_batch_size`, or leave it out for all of the step's questions at once";
            problems.push(ConfigError::new("train.micro_batch_size", message).with_help(help));
        }
        if command.is_none_or(|command| command == Command::Train) {
            self.train_problems(&mut problems);
            problems.extend(self.contradicting_prompt());
            problems.extend(self.unsaid_rewards());
        }
        if command == Some(Command::Train) {
            problems.extend(self.partial_training());
        }
        problems
    }

    fn train_problems(&self, problems: &mut Vec<ConfigError>) {
        let train = &self.train;
        let recipe = train.recipe;
        if recipe.is_grpo() {
            let named = |mut problem: ConfigError| {
                problem.key = format!("train.grpo.{}", problem.key);
                problem
            };
            problems.extend(train.grpo.loss().check().into_iter().map(named));
            problems.extend(train.grpo.reward_problems(self.max_new_tokens).into_iter().map(named));
            if train.grpo.loss_type == LossType::Cispo && train.grpo.clip_high < 1.0 {
                let message = format!(
                    "`cispo` caps the ratio itself at `clip_high`: {} would weigh every token down",
                    train.grpo.clip_high
                );
                problems
                    .push(ConfigError::new("train.grpo.clip_high", message).with_help("set clip_high = 5.0"));
            }
        }
        problems.extend(train.validation.problems(recipe, train.captions));
        problems.extend(train.parameter_problems(self.adapter.is_some()));
        if train.captions && recipe != RecipeName::Sft {
            problems.push(
                ConfigError::new("train.captions", format!("recipe `{recipe}` needs images, not captions"))
                    .with_help("`captions` is for recipe `sft`"),
            );
        }
        self.adversary_problems(problems);
        if !(train.parts.vision || train.parts.merger || train.parts.text) {
            problems.push(
                ConfigError::new("train.parts", "no parameter would train")
                    .with_help("set one of `vision`, `merger` and `text` to true"),
            );
        }
        if train.captions && !train.parts.text {
            problems.push(
                ConfigError::new(
                    "train.captions",
                    "captions reach the text decoder only, which does not train",
                )
                .with_help("set `parts.text` to true"),
            );
        }
    }

    fn attack_problems(&self, command: Option<Command>, problems: &mut Vec<ConfigError>) {
        let train = &self.train.adversary;
        let validation = &self.train.validation;
        let attack = &self.attack;
        let mut no_effect = |key: &str, message: String, help: &str| {
            problems.push(ConfigError::new(format!("attack.{key}"), message).with_help(help));
        };
        if attack.method == Method::Auto && attack.objective != ObjectiveName::default() {
            let message =
                format!("`objective` has no effect with method `auto`: {}", attack.objective.word());
            no_effect("objective", message, "`auto` goes through its own objectives: leave it out");
        }
        if attack.momentum > 0.0 && attack.method != Method::Pgd {
            let message = format!("`momentum` has no effect with method `{}`", attack.method.word());
            no_effect("momentum", message, "it belongs to `pgd`");
        }
        if attack.step_size == Some(0.0) && attack.epsilon > 0.0 {
            let message = "`step_size` 0 goes nowhere".to_owned();
            no_effect("step_size", message, "leave it out for the default");
        }
        if attack.min_epsilon && !attack.early_stop {
            let message = "`min_epsilon` needs `early_stop`: whether an item breaks must be asked".to_owned();
            no_effect("min_epsilon", message, "leave `early_stop` at its default");
        }
        if attack.smoothing_sigma.is_some() && attack.objective != ObjectiveName::CrossEntropy {
            let message = "`smoothing_sigma` attacks the mean probability of the options".to_owned();
            no_effect("smoothing_sigma", message, "add `--objective cross_entropy`");
        }
        if attack.smoothing_sigma.is_some() && attack.method == Method::Square {
            let message = "`smoothing_sigma` is about gradients, which `square` does not use".to_owned();
            no_effect("smoothing_sigma", message, "use pgd or apgd");
        }
        for (section, norm, epsilon, step_size) in [
            ("attack", attack.norm, attack.epsilon, attack.step_size),
            ("train.adversary", train.norm, train.epsilon, train.step_size),
            ("train.validation", validation.norm, validation.epsilon, None),
        ] {
            let counts = command.is_none_or(|command| self.sections(command).contains(&section));
            if norm == NormName::Linf && epsilon > 1.0 && counts {
                problems.push(
                    ConfigError::new(
                        format!("{section}.epsilon"),
                        format!(
                            "`epsilon` {epsilon} is out of range: at least 0 and at most 1 for norm `linf`"
                        ),
                    )
                    .with_help(if epsilon.fract() == 0.0 && epsilon <= 255.0 {
                        format!("pixel values lie in [0, 1]: write {epsilon}/255 if 8-bit levels were meant")
                    } else {
                        "pixel values lie in [0, 1]: a budget of 1 is all of it".to_owned()
                    }),
                );
            } else if let Some(step_size) = step_size
                && step_size > 2.0 * epsilon
                && counts
            {
                problems.push(
                    ConfigError::new(
                        format!("{section}.step_size"),
                        format!("`step_size` {step_size} exceeds 2 x `epsilon` {epsilon}"),
                    )
                    .with_help("such a step leaves the ball from any point of it: lower it or leave it out"),
                );
            }
        }
    }

    /// The sections (dotted) whose keys matter to `command`; keys of the top level always do.
    pub fn sections(&self, command: Command) -> Vec<&'static str> {
        match command {
            Command::Demo | Command::Predict => vec!["attack", "certify"],
            Command::Eval => vec!["data", "generation"],
            Command::Attack => vec!["data", "attack"],
            Command::Certify => vec!["data", "certify", "generation"],
            Command::Train => {
                let recipe = self.train.recipe;
                let mut sections = vec![
                    "data",
                    "train",
                    "train.parts",
                    "train.learning_rates",
                    "train.validation",
                    "train.watch",
                ];
                sections.extend(recipe.is_grpo().then_some("train.grpo"));
                sections.extend(recipe.is_adversarial().then_some("train.adversary"));
                sections.extend((recipe == RecipeName::Denoiser).then_some("train.denoiser"));
                sections
            }
        }
    }

    /// The resolved configuration as TOML: loading it again gives `self`, as far as `command` can tell.
    /// Numbers that were derived (the step size) are written out.
    pub fn to_toml(&self, command: Command) -> Result<String> {
        let mut resolved = self.clone();
        if command == Command::Attack {
            resolved.attack.step_size = Some(resolved.attack.resolved_step_size());
        }
        let mut table = toml::Table::try_from(&resolved).map_err(anyhow::Error::from)?;
        keep_sections(&mut table, "", &self.sections(command));
        Ok(toml::to_string(&table).map_err(anyhow::Error::from)?)
    }

    /// The resolved configuration without what changes no result (threads, batch size of inference, pictures, what
    /// TensorBoard shows, run directory, how long a reward command may take) and without the name of the model's revision,
    /// of which the run notes the commit: two runs with the
    /// same identity may continue each other.
    pub fn identity(&self, command: Command) -> Result<String> {
        let mut neutral = Self {
            threads: None,
            batch_size: Self::default().batch_size,
            feature_cache_mib: Self::default().feature_cache_mib,
            out: None,
            images: true,
            revision: None,
            train: TrainConfig {
                log_text_every: TrainConfig::default().log_text_every,
                log_images_every: TrainConfig::default().log_images_every,
                ..self.train.clone()
            },
            ..self.clone()
        };
        neutral.train.grpo.reward_command_timeout = GrpoSettings::default().reward_command_timeout;
        neutral.to_toml(command)
    }

    /// Every key, for documentation and checks.
    pub fn keys() -> Vec<Key> {
        match Self::node() {
            Node::Section(keys) => keys,
            Node::Leaf(_) => Vec::new(),
        }
    }

    /// The JSON schema of a configuration file.
    pub fn schema() -> serde_json::Value {
        layers::schema(&Self::keys())
    }

    /// The device asked for.
    pub fn backend(&self) -> crate::backend::Backend {
        self.device.0
    }

    /// `sigma`, or the error that it is missing.
    pub fn sigma(&self) -> Result<f64> {
        self.certify.sigma.ok_or_else(|| {
            Error::usage("`sigma` is required\n   = help: say how much noise, for example `--sigma 0.25`")
        })
    }
}

fn keep_sections(table: &mut toml::Table, prefix: &str, sections: &[&str]) {
    table.retain(|name, value| {
        let Some(inner) = value.as_table_mut() else { return true };
        let path = if prefix.is_empty() { name.to_owned() } else { format!("{prefix}.{name}") };
        let kept = sections.contains(&path.as_str());
        keep_sections(inner, &path, sections);
        kept
    });
}

#[cfg(test)]
mod tests;
