//! The words of the command line. Every option is text here: meaning, range and messages belong to the configuration,
//! so that a flag, a file and `--set` are judged alike.

use crate::backend::Backend;
use crate::recipes::config::keys::parse_number;
use crate::recipes::config::{ArithmeticName, Dtype};
use clap::builder::FalseyValueParser;
use clap::{ArgAction, Args, Parser, Subcommand};
use std::path::PathBuf;

/// Train, attack, certify and evaluate medical vision-language models. Not for clinical use.
#[derive(Debug, Parser)]
#[command(
    name = "safemed",
    version,
    arg_required_else_help = true,
    subcommand_required = true,
    after_help = "Every option is also an environment variable: --num-steps is SAFEMED_NUM_STEPS.\n\
        Data goes to standard output, everything else to standard error.\n\n\
        Start here:  safemed demo --quick\n\n\
        Exit status:\n  0 done   1 unexpected   2 usage or configuration   3 data or weights   4 non-finite numbers\n  \
        5 a check did not hold   75 stopped and saved (go on with --resume)   130 interrupted twice."
)]
pub(crate) struct Cli {
    #[command(flatten)]
    pub(crate) output: OutputArgs,
    #[command(subcommand)]
    pub(crate) command: CliCommand,
}

#[derive(Debug, Clone, Args)]
#[command(next_help_heading = "Output")]
pub(crate) struct OutputArgs {
    /// Print the summary as one JSON object, and nothing else, on standard output.
    #[arg(long, global = true, env = "SAFEMED_JSON", hide_env = true, value_parser = FalseyValueParser::new())]
    pub(crate) json: bool,
    /// No progress, no notes: errors only.
    #[arg(short, long, global = true, env = "SAFEMED_QUIET", hide_env = true, value_parser = FalseyValueParser::new())]
    pub(crate) quiet: bool,
    /// Log to standard error; twice for details.
    #[arg(short, long, global = true, action = ArgAction::Count, env = "SAFEMED_VERBOSE", hide_env = true)]
    pub(crate) verbose: u8,
}

#[derive(Debug, Subcommand)]
pub(crate) enum CliCommand {
    /// The whole pipeline on built-in phantom images, on the processor, in minutes.
    #[command(after_help = "Examples:\n  safemed demo\n  safemed demo --quick --out demo --seed 1")]
    Demo(DemoArgs),
    /// Fine-tune: sft, at_sft (on attacked images), trades, grpo, at_grpo.
    #[command(after_help = "Examples:\n  safemed config preset at_grpo > at_grpo.toml\n  \
        safemed train --config at_grpo.toml --model Qwen/Qwen2.5-VL-3B-Instruct --omnimedvqa OmniMedVQA --out runs/at_grpo\n  \
        safemed train --config at_grpo.toml --model Qwen/Qwen2.5-VL-3B-Instruct --omnimedvqa OmniMedVQA --dry-run\n  \
        safemed train --config runs/at_grpo/config.toml --resume --out runs/at_grpo")]
    Train(TrainArgs),
    /// Accuracy by modality and question type, beside image-blind controls.
    #[command(
        after_help = "Example:\n  safemed eval --model Qwen/Qwen2.5-VL-3B-Instruct --omnimedvqa OmniMedVQA --limit 200"
    )]
    Eval(RunArgs),
    /// Accuracy under attack.
    #[command(
        after_help = "Example:\n  safemed attack --pgd --model DIR --omnimedvqa OmniMedVQA --epsilon 8/255 --num-steps 50"
    )]
    Attack(AttackArgs),
    /// Certified accuracy by randomised smoothing.
    #[command(
        after_help = "Examples:\n  safemed certify --sigma 0.25 --model DIR --omnimedvqa OmniMedVQA --limit 100\n  \
        safemed certify --sigma 0.25 --mode sequential --target-radius 0.25 --n 100000 --model DIR --omnimedvqa OmniMedVQA"
    )]
    Certify(CertifyArgs),
    /// One answer to one question; with --sigma it is smoothed and may abstain.
    #[command(
        after_help = "Example:\n  safemed predict --model DIR --image scan.png --question 'Which modality is this?' --option CT --option MRI"
    )]
    Predict(PredictArgs),
    /// Tables and pictures from the records of any number of runs.
    #[command(after_help = "Example:\n  safemed report runs/clean runs/attack-8 --out comparison")]
    Report(ReportArgs),
    /// Recompute every certificate of a file from its own counts.
    #[command(
        after_help = "Examples:\n  safemed audit runs/certify/records.jsonl\n  safemed audit sigma_0.25.tsv --n 100000"
    )]
    Audit(AuditArgs),
    /// One certified radius from counts.
    #[command(
        after_help = "Examples:\n  safemed radius --count 990 --n 1000 --alpha 0.001 --sigma 0.25\n  safemed radius --tsv < counts.tsv"
    )]
    Radius(RadiusArgs),
    /// Compare this build with reference numbers exported from transformers.
    Parity(ParityArgs),
    /// Check, count, split, convert questions, or make phantoms.
    Data(DataCommandArgs),
    /// Merge an adapter into its model: a checkpoint that transformers can load.
    #[command(
        after_help = "Example:\n  safemed export --model DIR --adapter runs/sft/checkpoints/step-1000 --out merged"
    )]
    Export(ExportArgs),
    /// Join the parts of a sharded run.
    Merge(DirArgs),
    /// Devices, features, threads, versions, memory; what works with a model cost here.
    #[command(
        after_help = "Examples:\n  safemed doctor\n  safemed doctor --model Qwen/Qwen2.5-VL-3B-Instruct"
    )]
    Doctor(DoctorArgs),
    /// Measure what standard input asks for, for the estimates of `train --dry-run` and `doctor`.
    #[command(hide = true)]
    Probe,
    /// Configuration files: schema, check, show, preset.
    Config(ConfigCommandArgs),
}

#[derive(Debug, Clone, Args)]
#[command(next_help_heading = "Configuration")]
pub(crate) struct ConfigArgs {
    /// Configuration file (TOML).
    #[arg(long, value_name = "FILE", env = "SAFEMED_CONFIG", hide_env = true)]
    pub(crate) config: Option<PathBuf>,
    /// Set one key of the configuration; repeatable.
    #[arg(long, value_name = "PATH.KEY=VALUE", env = "SAFEMED_SET", hide_env = true, value_delimiter = None)]
    pub(crate) set: Vec<String>,
}

#[derive(Debug, Clone, Args)]
#[command(next_help_heading = "Run")]
pub(crate) struct CommonArgs {
    /// Run directory (default: runs/COMMAND-TIME).
    #[arg(long, value_name = "DIR", env = "SAFEMED_OUT", hide_env = true)]
    out: Option<String>,
    /// Continue the unfinished run in --out.
    #[arg(long, env = "SAFEMED_RESUME", hide_env = true, value_parser = FalseyValueParser::new())]
    pub(crate) resume: bool,
    /// Seed of every random stream [default: 0].
    #[arg(long, value_name = "N", allow_hyphen_values = true, env = "SAFEMED_SEED", hide_env = true)]
    seed: Option<String>,
    /// auto, cpu, cuda, cuda:N or metal [default: auto].
    #[arg(long, value_name = "DEVICE", env = "SAFEMED_DEVICE", hide_env = true)]
    device: Option<String>,
    /// How weights are held: auto (as the checkpoint stores them), f32 or bf16 [default: auto].
    #[arg(long, value_name = "DTYPE", env = "SAFEMED_DTYPE", hide_env = true)]
    dtype: Option<String>,
    /// What matrix products take: f32, or bf16, which is faster and another classifier [default: f32].
    #[arg(long, value_name = "DTYPE", env = "SAFEMED_ARITHMETIC", hide_env = true)]
    arithmetic: Option<String>,
    /// Threads [default: all]; changes no result.
    #[arg(long, value_name = "N", allow_hyphen_values = true, env = "SAFEMED_THREADS", hide_env = true)]
    threads: Option<String>,
    /// Items in one pass [default: 8]; changes no result. `train`: questions of one step [default: 16], which does.
    #[arg(long, value_name = "N", allow_hyphen_values = true, env = "SAFEMED_BATCH_SIZE", hide_env = true)]
    batch_size: Option<String>,
    /// Reports without pictures.
    #[arg(long, env = "SAFEMED_NO_IMAGES", hide_env = true, value_parser = FalseyValueParser::new())]
    no_images: bool,
}

#[derive(Debug, Clone, Args)]
#[command(next_help_heading = "Model")]
pub(crate) struct ModelArgs {
    /// Hugging Face directory, or an id on the hub.
    #[arg(long, value_name = "DIR_OR_HUB_ID", env = "SAFEMED_MODEL", hide_env = true)]
    model: Option<String>,
    /// Branch, tag or commit of a model on the hub [default: main].
    #[arg(long, value_name = "REV", env = "SAFEMED_REVISION", hide_env = true)]
    revision: Option<String>,
    /// LoRA adapter directory (PEFT).
    #[arg(long, value_name = "DIR", env = "SAFEMED_ADAPTER", hide_env = true)]
    adapter: Option<String>,
    /// Directory of a denoiser that every image passes before the model.
    #[arg(long, value_name = "DIR", env = "SAFEMED_DENOISER", hide_env = true)]
    denoiser: Option<String>,
    /// Fewest pixels of a resized image [default: the checkpoint's].
    #[arg(long, value_name = "N", allow_hyphen_values = true, env = "SAFEMED_MIN_PIXELS", hide_env = true)]
    min_pixels: Option<String>,
    /// Most pixels of a resized image [default: the checkpoint's].
    #[arg(long, value_name = "N", allow_hyphen_values = true, env = "SAFEMED_MAX_PIXELS", hide_env = true)]
    max_pixels: Option<String>,
    /// Prompt template, `think`, `no_think` or `think_after` for example [default: med_r1_think].
    #[arg(long, value_name = "NAME", env = "SAFEMED_PROMPT", hide_env = true)]
    prompt: Option<String>,
    /// generate or likelihood [default: generate].
    #[arg(long, value_name = "HOW", env = "SAFEMED_SCORING", hide_env = true)]
    scoring: Option<String>,
    /// Longest completion in tokens [default: 512].
    #[arg(
        long,
        value_name = "N",
        allow_hyphen_values = true,
        env = "SAFEMED_MAX_NEW_TOKENS",
        hide_env = true
    )]
    max_new_tokens: Option<String>,
}

#[derive(Debug, Clone, Args)]
#[command(next_help_heading = "Generation")]
pub(crate) struct GenerationArgs {
    /// 0 is greedy; otherwise tokens are drawn [default: 0].
    #[arg(long, value_name = "T", allow_hyphen_values = true, env = "SAFEMED_TEMPERATURE", hide_env = true)]
    temperature: Option<String>,
    /// Keep the K most likely tokens.
    #[arg(long, value_name = "K", allow_hyphen_values = true, env = "SAFEMED_TOP_K", hide_env = true)]
    top_k: Option<String>,
    /// Keep the most likely tokens of this total probability.
    #[arg(long, value_name = "P", allow_hyphen_values = true, env = "SAFEMED_TOP_P", hide_env = true)]
    top_p: Option<String>,
    /// Keep tokens of at least this share of the best one's probability.
    #[arg(long, value_name = "P", allow_hyphen_values = true, env = "SAFEMED_MIN_P", hide_env = true)]
    min_p: Option<String>,
    /// Makes tokens that stood before less likely [default: 1].
    #[arg(
        long,
        value_name = "R",
        allow_hyphen_values = true,
        env = "SAFEMED_REPETITION_PENALTY",
        hide_env = true
    )]
    repetition_penalty: Option<String>,
}

#[derive(Debug, Clone, Args)]
#[command(next_help_heading = "Images")]
pub(crate) struct ImageArgs {
    /// Gray deeper than 8 bits: as_stored (as transformers; DICOM by its own window), full_range or min_max.
    #[arg(long, value_name = "HOW", env = "SAFEMED_DEEP_GRAY", hide_env = true)]
    deep_gray: Option<String>,
    /// Window of deep gray, in its own units (Hounsfield for CT): 40/400 for soft tissue.
    #[arg(
        long,
        value_name = "CENTER/WIDTH",
        allow_hyphen_values = true,
        env = "SAFEMED_WINDOW",
        hide_env = true
    )]
    window: Option<String>,
}

#[derive(Debug, Clone, Args)]
#[command(next_help_heading = "Questions")]
pub(crate) struct DataArgs {
    /// Root of an OmniMedVQA tree (without ROOT: the one configured, else ./OmniMedVQA).
    #[arg(
        long, value_name = "ROOT", num_args = 0..=1, default_missing_value = "",
        env = "SAFEMED_OMNIMEDVQA", hide_env = true
    )]
    omnimedvqa: Option<String>,
    /// Questions in any supported format, detected.
    #[arg(long, value_name = "PATH", env = "SAFEMED_DATA", hide_env = true)]
    data: Option<String>,
    /// JSON list of the question ids to keep.
    #[arg(long, value_name = "FILE", env = "SAFEMED_SPLIT", hide_env = true)]
    split: Option<String>,
    /// JSON list of the training ids, for the option prior.
    #[arg(long, value_name = "FILE", env = "SAFEMED_TRAIN_SPLIT", hide_env = true)]
    train_split: Option<String>,
    /// Keep one modality.
    #[arg(long, value_name = "M", env = "SAFEMED_MODALITY", hide_env = true)]
    modality: Option<String>,
    /// Keep one question type.
    #[arg(long, value_name = "T", env = "SAFEMED_QUESTION_TYPE", hide_env = true)]
    question_type: Option<String>,
    /// Keep the first N items.
    #[arg(long, value_name = "N", allow_hyphen_values = true, env = "SAFEMED_LIMIT", hide_env = true)]
    limit: Option<String>,
    /// One part of N: 0/N to N-1/N.
    #[arg(long, value_name = "I/N", env = "SAFEMED_SHARD", hide_env = true)]
    shard: Option<String>,
}

#[derive(Debug, Clone, Args)]
pub(crate) struct RunArgs {
    #[command(flatten)]
    pub(crate) config: ConfigArgs,
    #[command(flatten)]
    data: DataArgs,
    #[command(flatten)]
    images: ImageArgs,
    #[command(flatten)]
    model: ModelArgs,
    #[command(flatten)]
    generation: GenerationArgs,
    #[command(flatten)]
    pub(crate) common: CommonArgs,
}

#[derive(Debug, Clone, Args)]
pub(crate) struct TrainArgs {
    #[command(flatten)]
    pub(crate) estimate: EstimateFlags,
    #[command(flatten)]
    pub(crate) run: RunArgs,
}

#[derive(Debug, Clone, Args)]
#[command(next_help_heading = "Estimate")]
pub(crate) struct EstimateFlags {
    /// Train nothing: say what memory and time it would take, measured on a few steps.
    #[arg(long, env = "SAFEMED_DRY_RUN", hide_env = true, value_parser = FalseyValueParser::new())]
    pub(crate) dry_run: bool,
    /// Dry run: seconds that measuring may take, roughly; a model small enough is measured whole.
    #[arg(
        long, value_name = "S", allow_hyphen_values = true, value_parser = not_negative, default_value = "60",
        env = "SAFEMED_PROBE_SECONDS", hide_env = true
    )]
    pub(crate) probe_seconds: f64,
    /// Dry run of GRPO: length of sampled completions [default: as the model samples them, else the longest].
    #[arg(
        long, value_name = "N", allow_hyphen_values = true, value_parser = at_least_one,
        env = "SAFEMED_COMPLETION_TOKENS", hide_env = true
    )]
    pub(crate) completion_tokens: Option<usize>,
    /// Dry run: memory to plan for, in GiB [default: what is free].
    #[arg(
        long, value_name = "GIB", allow_hyphen_values = true, value_parser = not_negative,
        env = "SAFEMED_MEMORY_GIB", hide_env = true
    )]
    pub(crate) memory_gib: Option<f64>,
}

#[derive(Debug, Clone, Args)]
pub(crate) struct DoctorArgs {
    /// Hugging Face directory, or an id on the hub (no weights are fetched): estimate works with it.
    #[arg(long, value_name = "DIR_OR_HUB_ID", env = "SAFEMED_MODEL", hide_env = true)]
    pub(crate) model: Option<String>,
    /// Branch, tag or commit of a model on the hub [default: main].
    #[arg(long, value_name = "REV", env = "SAFEMED_REVISION", hide_env = true)]
    pub(crate) revision: Option<String>,
    /// How weights are held: auto (as the checkpoint stores them), f32 or bf16.
    #[arg(long, value_name = "DTYPE", env = "SAFEMED_DTYPE", hide_env = true, default_value = "auto")]
    pub(crate) dtype: Dtype,
    /// What matrix products take: f32 or bf16.
    #[arg(long, value_name = "DTYPE", env = "SAFEMED_ARITHMETIC", hide_env = true, default_value = "f32")]
    pub(crate) arithmetic: ArithmeticName,
    /// auto, cpu, cuda, cuda:N or metal.
    #[arg(long, value_name = "DEVICE", default_value = "auto", env = "SAFEMED_DEVICE", hide_env = true)]
    pub(crate) device: Backend,
    /// Threads of the processor [default: all].
    #[arg(long, value_name = "N", allow_hyphen_values = true, value_parser = at_least_one, env = "SAFEMED_THREADS", hide_env = true)]
    pub(crate) threads: Option<usize>,
    /// Image file to work on [default: a gray square of 448 pixels].
    #[arg(long, value_name = "FILE", env = "SAFEMED_IMAGE", hide_env = true)]
    pub(crate) image: Option<PathBuf>,
    /// Seconds that measuring may take, roughly; a model small enough is measured whole.
    #[arg(
        long, value_name = "S", allow_hyphen_values = true, value_parser = not_negative, default_value = "60",
        env = "SAFEMED_PROBE_SECONDS", hide_env = true
    )]
    pub(crate) probe_seconds: f64,
}

#[derive(Debug, Clone, Args)]
pub(crate) struct AttackArgs {
    #[command(flatten)]
    attack: AttackFlags,
    #[command(flatten)]
    pub(crate) run: RunArgs,
}

#[derive(Debug, Clone, Args)]
#[command(next_help_heading = "Attack")]
struct AttackFlags {
    /// Projected gradient descent: the same as --method pgd.
    #[arg(
        long, conflicts_with = "method", env = "SAFEMED_PGD", hide_env = true,
        value_parser = FalseyValueParser::new()
    )]
    pgd: bool,
    /// noise, fgsm, pgd, apgd, square or auto [default: pgd].
    #[arg(long, value_name = "METHOD", env = "SAFEMED_METHOD", hide_env = true)]
    method: Option<String>,
    /// linf or l2 [default: linf].
    #[arg(long, value_name = "NORM", env = "SAFEMED_NORM", hide_env = true)]
    norm: Option<String>,
    /// Budget for pixels in [0, 1] [default: 8/255].
    #[arg(long, value_name = "E", allow_hyphen_values = true, env = "SAFEMED_EPSILON", hide_env = true)]
    epsilon: Option<String>,
    /// Length of one step [default: 2.5 x epsilon / num-steps].
    #[arg(long, value_name = "S", allow_hyphen_values = true, env = "SAFEMED_STEP_SIZE", hide_env = true)]
    step_size: Option<String>,
    /// Gradient steps [default: 10; apgd and auto: 100].
    #[arg(long, value_name = "N", allow_hyphen_values = true, env = "SAFEMED_NUM_STEPS", hide_env = true)]
    num_steps: Option<String>,
    /// Losses that square asks for [default: 1000].
    #[arg(long, value_name = "N", allow_hyphen_values = true, env = "SAFEMED_NUM_QUERIES", hide_env = true)]
    num_queries: Option<String>,
    /// Starts; later ones attack survivors only [default: 1].
    #[arg(long, value_name = "N", allow_hyphen_values = true, env = "SAFEMED_NUM_RESTARTS", hide_env = true)]
    num_restarts: Option<String>,
    /// Share of the last direction that pgd keeps [default: 0].
    #[arg(long, value_name = "M", allow_hyphen_values = true, env = "SAFEMED_MOMENTUM", hide_env = true)]
    momentum: Option<String>,
    /// completion, finding, answer, margin, cross_entropy, dlr, targeted or all [default: completion].
    #[arg(long, value_name = "WHAT", env = "SAFEMED_OBJECTIVE", hide_env = true)]
    objective: Option<String>,
    /// original or model: whose pixels may change [default: original].
    #[arg(long, value_name = "WHERE", env = "SAFEMED_SPACE", hide_env = true)]
    space: Option<String>,
    /// Find the smallest budget that breaks each item, by bisection: true or false.
    #[arg(
        long, value_name = "BOOL", num_args = 0..=1, default_missing_value = "true",
        env = "SAFEMED_MIN_EPSILON", hide_env = true
    )]
    min_epsilon: Option<String>,
    /// Attack the smoothed model of this noise.
    #[arg(
        long,
        value_name = "S",
        allow_hyphen_values = true,
        env = "SAFEMED_SMOOTHING_SIGMA",
        hide_env = true
    )]
    smoothing_sigma: Option<String>,
    /// Draws of the smoothed model's gradient and of its answer [default: 32].
    #[arg(long, value_name = "N", allow_hyphen_values = true, env = "SAFEMED_EOT_SAMPLES", hide_env = true)]
    eot_samples: Option<String>,
    /// Items on which the attack is examined [default: 8].
    #[arg(
        long,
        value_name = "N",
        allow_hyphen_values = true,
        env = "SAFEMED_VERDICT_ITEMS",
        hide_env = true
    )]
    verdict_items: Option<String>,
}

#[derive(Debug, Clone, Args)]
pub(crate) struct CertifyArgs {
    #[command(flatten)]
    smoothing: SmoothingFlags,
    /// cohen or sequential [default: cohen].
    #[arg(long, value_name = "MODE", env = "SAFEMED_MODE", hide_env = true, help_heading = "Smoothing")]
    mode: Option<String>,
    /// Sequential: decide this radius only.
    #[arg(
        long,
        value_name = "R",
        allow_hyphen_values = true,
        env = "SAFEMED_TARGET_RADIUS",
        hide_env = true,
        help_heading = "Smoothing"
    )]
    target_radius: Option<String>,
    /// Sequential: kt or clopper_pearson, the bound that holds at every look [default: kt].
    #[arg(long, value_name = "RULE", env = "SAFEMED_RULE", hide_env = true, help_heading = "Smoothing")]
    rule: Option<String>,
    /// Sequential without a target: stop when twice the draws would raise the radius by less than this share
    /// [default: 0.05].
    #[arg(
        long,
        value_name = "G",
        allow_hyphen_values = true,
        env = "SAFEMED_MIN_GAIN",
        hide_env = true,
        help_heading = "Smoothing"
    )]
    min_gain: Option<String>,
    /// Attack each certified item inside its radius and ask again: true or false.
    #[arg(
        long, value_name = "BOOL", num_args = 0..=1, default_missing_value = "true",
        env = "SAFEMED_CROSS_CHECK", hide_env = true, help_heading = "Smoothing"
    )]
    cross_check: Option<String>,
    #[command(flatten)]
    pub(crate) run: RunArgs,
}

#[derive(Debug, Clone, Args)]
#[command(next_help_heading = "Smoothing")]
struct SmoothingFlags {
    /// Standard deviation of the noise for pixels in [0, 1].
    #[arg(long, value_name = "S", allow_hyphen_values = true, env = "SAFEMED_SIGMA", hide_env = true)]
    sigma: Option<String>,
    /// Draws that select the class [default: 100].
    #[arg(long, value_name = "N", allow_hyphen_values = true, env = "SAFEMED_N0", hide_env = true)]
    n0: Option<String>,
    /// Draws that estimate its probability, at most so many when sequential [default: 1000].
    #[arg(long, value_name = "N", allow_hyphen_values = true, env = "SAFEMED_N", hide_env = true)]
    n: Option<String>,
    /// Probability that a certificate is wrong [default: 0.001].
    #[arg(long, value_name = "A", allow_hyphen_values = true, env = "SAFEMED_ALPHA", hide_env = true)]
    alpha: Option<String>,
}

#[derive(Debug, Clone, Args)]
pub(crate) struct PredictArgs {
    /// Image file.
    #[arg(long, value_name = "FILE", env = "SAFEMED_IMAGE", hide_env = true)]
    pub(crate) image: PathBuf,
    /// The question.
    #[arg(long, value_name = "TEXT", env = "SAFEMED_QUESTION", hide_env = true)]
    pub(crate) question: String,
    /// An option, in order; repeatable.
    #[arg(long = "option", value_name = "TEXT", env = "SAFEMED_OPTION", hide_env = true)]
    pub(crate) options: Vec<String>,
    #[command(flatten)]
    smoothing: SmoothingFlags,
    #[command(flatten)]
    images: ImageArgs,
    #[command(flatten)]
    model: ModelArgs,
    #[command(flatten)]
    generation: GenerationArgs,
    #[command(flatten)]
    pub(crate) config: ConfigArgs,
    #[command(flatten)]
    pub(crate) common: CommonArgs,
}

#[derive(Debug, Clone, Args)]
pub(crate) struct DemoArgs {
    /// The same story in three minutes, with looser numbers.
    #[arg(long, env = "SAFEMED_QUICK", hide_env = true, value_parser = FalseyValueParser::new())]
    pub(crate) quick: bool,
    #[command(flatten)]
    pub(crate) config: ConfigArgs,
    #[command(flatten)]
    pub(crate) common: CommonArgs,
}

#[derive(Debug, Clone, Args)]
pub(crate) struct ReportArgs {
    /// Run directories.
    #[arg(required = true, value_name = "RUN_DIR")]
    pub(crate) runs: Vec<PathBuf>,
    /// Where to write report.md and report.html [default: the run directory, or ./report for several].
    #[arg(long, value_name = "DIR", env = "SAFEMED_OUT", hide_env = true)]
    pub(crate) out: Option<PathBuf>,
    /// Title of the report.
    #[arg(long, value_name = "TEXT", env = "SAFEMED_TITLE", hide_env = true)]
    pub(crate) title: Option<String>,
    /// Leave pictures out.
    #[arg(long, env = "SAFEMED_NO_IMAGES", hide_env = true, value_parser = FalseyValueParser::new())]
    pub(crate) no_images: bool,
}

#[derive(Debug, Clone, Args)]
pub(crate) struct AuditArgs {
    /// records.jsonl of `certify`, or a Cohen-style TSV.
    #[arg(value_name = "FILE")]
    pub(crate) file: PathBuf,
    /// Noise of a TSV [default: `sigma_X` in its path].
    #[arg(long, value_name = "S", allow_hyphen_values = true, value_parser = number, env = "SAFEMED_SIGMA", hide_env = true)]
    pub(crate) sigma: Option<f64>,
    /// Draws of a TSV [default: tried from 100 to 1000000].
    #[arg(long, value_name = "N", allow_hyphen_values = true, env = "SAFEMED_N", hide_env = true)]
    pub(crate) n: Option<u64>,
    /// Failure probability of a TSV [default: tried from 0.05 to 0.0001].
    #[arg(long, value_name = "A", allow_hyphen_values = true, value_parser = number, env = "SAFEMED_ALPHA", hide_env = true)]
    pub(crate) alpha: Option<f64>,
}

#[derive(Debug, Clone, Args)]
pub(crate) struct RadiusArgs {
    /// Draws in which the class won.
    #[arg(
        long,
        value_name = "K",
        allow_hyphen_values = true,
        required_unless_present = "tsv",
        env = "SAFEMED_COUNT",
        hide_env = true
    )]
    pub(crate) count: Option<u64>,
    /// All draws.
    #[arg(
        long,
        value_name = "N",
        allow_hyphen_values = true,
        required_unless_present = "tsv",
        env = "SAFEMED_N",
        hide_env = true
    )]
    pub(crate) n: Option<u64>,
    /// Probability that the certificate is wrong.
    #[arg(long, value_name = "A", allow_hyphen_values = true, value_parser = number, required_unless_present = "tsv", env = "SAFEMED_ALPHA", hide_env = true)]
    pub(crate) alpha: Option<f64>,
    /// Standard deviation of the noise.
    #[arg(long, value_name = "S", allow_hyphen_values = true, value_parser = number, required_unless_present = "tsv", env = "SAFEMED_SIGMA", hide_env = true)]
    pub(crate) sigma: Option<f64>,
    /// Read `count n alpha sigma` rows, tab-separated, from standard input.
    #[arg(
        long, conflicts_with_all = ["count", "n", "alpha", "sigma"], env = "SAFEMED_TSV", hide_env = true,
        value_parser = FalseyValueParser::new()
    )]
    pub(crate) tsv: bool,
}

#[derive(Debug, Clone, Args)]
pub(crate) struct DirArgs {
    /// Directory.
    #[arg(value_name = "DIR")]
    pub(crate) dir: PathBuf,
}

#[derive(Debug, Clone, Args)]
pub(crate) struct ParityArgs {
    /// Directory of reference numbers.
    #[arg(value_name = "DIR", required_unless_present = "dump", conflicts_with = "dump")]
    pub(crate) dir: Option<PathBuf>,
    /// In place of comparing: write this build's own numbers for one question here, for
    /// `scripts/check_with_transformers.py`.
    #[arg(long, value_name = "OUT", requires_all = ["model", "question"], env = "SAFEMED_DUMP", hide_env = true)]
    pub(crate) dump: Option<PathBuf>,
    /// With --dump: Hugging Face directory, or an id on the hub.
    #[arg(long, value_name = "DIR_OR_HUB_ID", env = "SAFEMED_MODEL", hide_env = true)]
    pub(crate) model: Option<String>,
    /// With --dump: branch, tag or commit of a model on the hub [default: main].
    #[arg(long, value_name = "REV", env = "SAFEMED_REVISION", hide_env = true)]
    pub(crate) revision: Option<String>,
    /// With --dump: LoRA adapter directory (PEFT).
    #[arg(long, value_name = "DIR", env = "SAFEMED_ADAPTER", hide_env = true)]
    pub(crate) adapter: Option<PathBuf>,
    /// With --dump: an image file; repeatable.
    #[arg(long = "image", value_name = "FILE", env = "SAFEMED_IMAGE", hide_env = true)]
    pub(crate) images: Vec<PathBuf>,
    /// With --dump: the question.
    #[arg(long, value_name = "TEXT", env = "SAFEMED_QUESTION", hide_env = true)]
    pub(crate) question: Option<String>,
    /// auto, cpu, cuda, cuda:N or metal.
    #[arg(long, value_name = "DEVICE", default_value = "auto", env = "SAFEMED_DEVICE", hide_env = true)]
    pub(crate) device: Backend,
    /// Threads of the processor [default: all]; changes no result.
    #[arg(long, value_name = "N", allow_hyphen_values = true, value_parser = at_least_one, env = "SAFEMED_THREADS", hide_env = true)]
    pub(crate) threads: Option<usize>,
}

#[derive(Debug, Clone, Args)]
pub(crate) struct ExportArgs {
    /// Hugging Face directory, or an id on the hub.
    #[arg(long, value_name = "DIR_OR_HUB_ID", env = "SAFEMED_MODEL", hide_env = true)]
    pub(crate) model: String,
    /// Branch, tag or commit of a model on the hub [default: main].
    #[arg(long, value_name = "REV", env = "SAFEMED_REVISION", hide_env = true)]
    pub(crate) revision: Option<String>,
    /// LoRA adapter directory (PEFT).
    #[arg(long, value_name = "DIR", env = "SAFEMED_ADAPTER", hide_env = true)]
    pub(crate) adapter: Option<PathBuf>,
    /// Type of the weights: auto (the checkpoint's, float32 once an adapter is added), f32 or bf16.
    #[arg(
        long,
        value_name = "auto|f32|bf16",
        env = "SAFEMED_DTYPE",
        hide_env = true,
        default_value = "auto"
    )]
    pub(crate) dtype: Dtype,
    /// Where to write the checkpoint.
    #[arg(long, value_name = "DIR", env = "SAFEMED_OUT", hide_env = true)]
    pub(crate) out: PathBuf,
}

#[derive(Debug, Clone, Args)]
pub(crate) struct DataCommandArgs {
    #[command(subcommand)]
    pub(crate) command: DataCommand,
}

#[derive(Debug, Clone, Subcommand)]
pub(crate) enum DataCommand {
    /// Read everything and report every problem at once.
    Check(RunArgs),
    /// Counts and what can be known without images: option prior, letter prior, chance.
    #[command(after_help = "Example:\n  safemed data stats --data test.json --train train.json")]
    Stats(DataStatsArgs),
    /// Image-grouped splits.
    Split(DataSplitArgs),
    /// Make phantom images in OmniMedVQA's layout.
    #[command(
        after_help = "Example:\n  safemed data phantom --out phantoms --seed 0 --train-items 6400 --test-items 320"
    )]
    Phantom(PhantomArgs),
    /// Write questions in OmniMedVQA's layout, as Med-R1 split files, or as conversations (LLaVA, chat messages).
    #[command(after_help = "Examples:\n  safemed data convert --data splits/CT_test.json --out omni\n  \
        safemed data convert --to med_r1 --omnimedvqa OmniMedVQA --out splits\n  \
        safemed data convert --to messages --omnimedvqa OmniMedVQA --out chat")]
    Convert(DataConvertArgs),
}

#[derive(Debug, Clone, Args)]
pub(crate) struct DataStatsArgs {
    /// Training questions, in any supported format, whose answers give the prior.
    #[arg(long, value_name = "PATH", env = "SAFEMED_TRAIN", hide_env = true)]
    pub(crate) train: Option<PathBuf>,
    #[command(flatten)]
    pub(crate) run: RunArgs,
}

#[derive(Debug, Clone, Args)]
pub(crate) struct DataSplitArgs {
    /// Share of the questions in the test split.
    #[arg(
        long,
        value_name = "SHARE",
        allow_hyphen_values = true,
        default_value_t = 0.2,
        env = "SAFEMED_TEST_SHARE",
        hide_env = true
    )]
    pub(crate) test_share: f64,
    /// Share of the questions in the validation split.
    #[arg(
        long,
        value_name = "SHARE",
        allow_hyphen_values = true,
        default_value_t = 0.0,
        env = "SAFEMED_VALIDATION_SHARE",
        hide_env = true
    )]
    pub(crate) validation_share: f64,
    #[command(flatten)]
    pub(crate) run: RunArgs,
}

#[derive(Debug, Clone, Args)]
pub(crate) struct PhantomArgs {
    /// Where to write the tree.
    #[arg(long, value_name = "DIR", env = "SAFEMED_OUT", hide_env = true)]
    pub(crate) out: PathBuf,
    /// Seed: the same seed gives the same bytes.
    #[arg(
        long,
        value_name = "N",
        allow_hyphen_values = true,
        default_value_t = 0,
        env = "SAFEMED_SEED",
        hide_env = true
    )]
    pub(crate) seed: u64,
    /// Width and height in pixels.
    #[arg(
        long,
        value_name = "PIXELS",
        allow_hyphen_values = true,
        default_value_t = 64,
        env = "SAFEMED_SIZE",
        hide_env = true
    )]
    pub(crate) size: usize,
    /// Strength of the findings.
    #[arg(
        long,
        value_name = "C",
        allow_hyphen_values = true,
        default_value_t = 1.5,
        env = "SAFEMED_CONTRAST",
        hide_env = true
    )]
    pub(crate) contrast: f64,
    /// Questions of the training split.
    #[arg(
        long,
        value_name = "N",
        allow_hyphen_values = true,
        default_value_t = 6400,
        env = "SAFEMED_TRAIN_ITEMS",
        hide_env = true
    )]
    pub(crate) train_items: usize,
    /// Questions of the validation split.
    #[arg(
        long,
        value_name = "N",
        allow_hyphen_values = true,
        default_value_t = 320,
        env = "SAFEMED_VALIDATION_ITEMS",
        hide_env = true
    )]
    pub(crate) validation_items: usize,
    /// Questions of the test split.
    #[arg(
        long,
        value_name = "N",
        allow_hyphen_values = true,
        default_value_t = 320,
        env = "SAFEMED_TEST_ITEMS",
        hide_env = true
    )]
    pub(crate) test_items: usize,
}

#[derive(Debug, Clone, Args)]
pub(crate) struct DataConvertArgs {
    /// omnimedvqa, med_r1, llava or messages [default: omnimedvqa].
    #[arg(long, value_name = "FORMAT", env = "SAFEMED_TO", hide_env = true)]
    pub(crate) to: Option<String>,
    #[command(flatten)]
    pub(crate) run: RunArgs,
}

#[derive(Debug, Clone, Args)]
pub(crate) struct ConfigCommandArgs {
    #[command(subcommand)]
    pub(crate) command: ConfigCommand,
}

#[derive(Debug, Clone, Subcommand)]
pub(crate) enum ConfigCommand {
    /// The JSON schema of a configuration file, for editors.
    Schema,
    /// Check files: every problem of each, with line and near miss.
    Check {
        /// Configuration files.
        #[arg(required = true, value_name = "FILE")]
        files: Vec<PathBuf>,
    },
    /// Every key with its value, meaning and range.
    Show(ConfigArgs),
    /// A ready configuration file; without NAME, their list.
    Preset {
        /// Which.
        #[arg(value_name = "NAME")]
        name: Option<String>,
    },
}

/// A number, or a fraction such as 1/4.
fn number(text: &str) -> Result<f64, String> {
    parse_number(text).ok_or_else(|| "expected a number or a fraction such as 1/4".to_owned())
}

fn not_negative(text: &str) -> Result<f64, String> {
    parse_number(text).filter(|x| *x >= 0.0).ok_or_else(|| "expected a number of at least 0".to_owned())
}

fn at_least_one(text: &str) -> Result<usize, String> {
    let number = text.parse().ok().filter(|number| *number > 0);
    number.ok_or_else(|| "expected a whole number of at least 1".to_owned())
}
