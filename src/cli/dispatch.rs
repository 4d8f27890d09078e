//! One line for each command: from its words to the function that does it.

use super::args::{
    AuditArgs, CertifyArgs, Cli, CliCommand, CommonArgs, ConfigArgs, ConfigCommand, DataCommand, DemoArgs,
    DirArgs, DoctorArgs, EstimateFlags, ExportArgs, ParityArgs, PredictArgs, RadiusArgs, ReportArgs, RunArgs,
};
use super::overrides::overrides;
use super::terminal::Terminal;
use crate::backend::with_threads;
use crate::certify::audit::AuditOptions;
use crate::data::phantom::PhantomConfig;
use crate::error::{Error, Result};
use crate::recipes::config::{Command, RunConfig, show};
use crate::recipes::estimate::inference::Named;
use crate::recipes::estimate::probe::Probe;
use crate::recipes::estimate::{self, Options};
use crate::recipes::export::Export;
use crate::recipes::job::{Job, Outcome};
use crate::recipes::parity::dump::Subject;
use crate::recipes::progress::Progress;
use crate::recipes::run::Stop;
use crate::recipes::{self, doctor, parity, presets, report};
use candle_core::Device;
use clap::ArgMatches;
use clap::parser::ValueSource;
use serde_json::json;

/// Calls the command.
pub(super) fn dispatch(cli: &Cli, matches: &ArgMatches, terminal: &Terminal) -> Result<Outcome> {
    let matches = matches.subcommand().map_or(matches, |(_, matches)| matches);
    let call = Call { matches, terminal };
    match &cli.command {
        CliCommand::Demo(args) => demo(&call.job(Command::Demo, &args.config, &args.common)?, args),
        CliCommand::Train(args) => {
            call.refuse_idle_estimate_flags(&args.estimate)?;
            train(&call.run(Command::Train, &args.run)?, &args.estimate)
        }
        CliCommand::Eval(args) => eval(&call.run(Command::Eval, args)?),
        CliCommand::Attack(args) => attack(&call.run(Command::Attack, &args.run)?),
        CliCommand::Certify(CertifyArgs { run, .. }) => certify(&call.run(Command::Certify, run)?),
        CliCommand::Predict(args) => predict(&call.job(Command::Predict, &args.config, &args.common)?, args),
        CliCommand::Report(args) => make_report(args, terminal),
        CliCommand::Audit(args) => audit(args),
        CliCommand::Radius(args) => radius(args),
        CliCommand::Parity(args) => parity(args, terminal),
        CliCommand::Data(args) => data(&args.command, matches, terminal),
        CliCommand::Export(args) => export(args, terminal),
        CliCommand::Merge(args) => merge(args, terminal),
        CliCommand::Doctor(args) => doctor(args, terminal),
        CliCommand::Probe => probe(),
        CliCommand::Config(args) => config(&args.command, matches),
    }
}

struct Call<'a> {
    matches: &'a ArgMatches,
    terminal: &'a Terminal,
}

impl<'a> Call<'a> {
    fn run(&self, command: Command, args: &RunArgs) -> Result<Job<'a>> {
        self.job(command, &args.config, &args.common)
    }

    /// Flags of a dry run say nothing without one. What stands in the environment may be meant for other commands.
    fn refuse_idle_estimate_flags(&self, flags: &EstimateFlags) -> Result<()> {
        if flags.dry_run {
            return Ok(());
        }
        for id in ["probe_seconds", "completion_tokens", "memory_gib"] {
            if self.matches.value_source(id) == Some(ValueSource::CommandLine) {
                let flag = id.replace('_', "-");
                return Err(Error::usage(format!(
                    "--{flag} has no effect on a training\n   = help: add --dry-run, or leave it out"
                )));
            }
        }
        Ok(())
    }

    /// Resolves the configuration; everything expensive comes after it. Signals are listened to from here on.
    fn job(&self, command: Command, config: &ConfigArgs, common: &CommonArgs) -> Result<Job<'a>> {
        let overrides = overrides(command, self.matches)?;
        let config = RunConfig::load(command, config.config.as_deref(), &overrides)?;
        Ok(Job {
            command,
            config,
            resume: common.resume,
            command_line: std::env::args().collect(),
            // One answer has nothing to save: there Ctrl-C ends the process as it always does.
            stop: if command == Command::Predict { Stop::default() } else { Stop::on_signals()? },
            progress: self.terminal,
        })
    }
}

fn demo(job: &Job<'_>, args: &DemoArgs) -> Result<Outcome> {
    with_threads(job.config.threads, || recipes::demo::demo(job, args.quick))
}

fn train(job: &Job<'_>, flags: &EstimateFlags) -> Result<Outcome> {
    if !flags.dry_run {
        return with_threads(job.config.threads, || recipes::train::train(job));
    }
    let options = Options {
        seconds: flags.probe_seconds,
        completion_tokens: flags.completion_tokens,
        memory_bytes: flags.memory_gib.map(|gib| (gib * f64::from(1 << 30)) as u64),
    };
    with_threads(job.config.threads, || estimate::dry_run(job, &options))
}

fn doctor(args: &DoctorArgs, terminal: &Terminal) -> Result<Outcome> {
    let Some(model) = &args.model else { return Ok(doctor::doctor()) };
    let named = Named {
        model: model.clone(),
        revision: args.revision.clone(),
        dtype: args.dtype,
        arithmetic: args.arithmetic,
        device: args.device,
        threads: args.threads,
        image: args.image.clone(),
    };
    let options = Options { seconds: args.probe_seconds, ..Options::default() };
    with_threads(args.threads, || doctor::doctor_with(&named, &options, &Stop::default(), terminal))
}

/// What a measuring child does: one [`Probe`] from standard input, its figures to standard output.
fn probe() -> Result<Outcome> {
    let probe: Probe = serde_json::from_reader(std::io::stdin().lock())
        .map_err(|error| Error::usage(format!("`probe` reads what to measure from its caller: {error}")))?;
    let figures = with_threads(probe.threads(), || probe.measure())?;
    let summary = serde_json::to_value(&figures).map_err(anyhow::Error::from)?;
    let text = format!("{summary}\n");
    Ok(Outcome::new(summary, text))
}

fn eval(job: &Job<'_>) -> Result<Outcome> {
    with_threads(job.config.threads, || recipes::eval::eval(job))
}

fn attack(job: &Job<'_>) -> Result<Outcome> {
    with_threads(job.config.threads, || recipes::attack::attack(job))
}

fn certify(job: &Job<'_>) -> Result<Outcome> {
    with_threads(job.config.threads, || recipes::certify::certify(job))
}

fn predict(job: &Job<'_>, args: &PredictArgs) -> Result<Outcome> {
    with_threads(job.config.threads, || {
        recipes::predict::predict(job, &args.image, &args.question, &args.options)
    })
}

fn audit(args: &AuditArgs) -> Result<Outcome> {
    let options = AuditOptions {
        sigma: args.sigma,
        n: args.n.into_iter().collect(),
        alpha: args.alpha.into_iter().collect(),
    };
    with_threads(None, || recipes::audit::audit(&args.file, &options))
}

fn radius(args: &RadiusArgs) -> Result<Outcome> {
    match (args.count, args.n, args.alpha, args.sigma) {
        (Some(count), Some(n), Some(alpha), Some(sigma)) => recipes::radius::one(count, n, alpha, sigma),
        _ => recipes::radius::table(std::io::stdin().lock()),
    }
}

fn parity(args: &ParityArgs, progress: &dyn Progress) -> Result<Outcome> {
    with_threads(args.threads, || {
        let device = args.device.device()?;
        let Some(dir) = &args.dir else { return dump(args, &device, progress) };
        let report = parity::parity(dir, &device, &mut |what| progress.note(what))?;
        parity::render::outcome(&report)
    })
}

/// `parity --dump`.
fn dump(args: &ParityArgs, device: &Device, progress: &dyn Progress) -> Result<Outcome> {
    let (Some(out), Some(model), Some(question)) = (&args.dump, &args.model, &args.question) else {
        return Err(Error::usage(
            "name a directory of reference numbers, or --dump with --model and --question",
        ));
    };
    let (revision, adapter) = (args.revision.as_deref(), args.adapter.as_deref());
    let subject = Subject { model, revision, adapter, images: &args.images, question };
    parity::dump::dump(&subject, out, device, progress)
}

fn merge(args: &DirArgs, progress: &dyn Progress) -> Result<Outcome> {
    recipes::merge::merge(&args.dir, progress)
}

fn export(args: &ExportArgs, progress: &dyn Progress) -> Result<Outcome> {
    let ExportArgs { model, revision, adapter, dtype, out } = args;
    let export =
        Export { model, revision: revision.as_deref(), adapter: adapter.as_deref(), dtype: *dtype, out };
    with_threads(None, || recipes::export::export(&export, progress))
}

fn data(command: &DataCommand, matches: &ArgMatches, terminal: &Terminal) -> Result<Outcome> {
    let matches = matches.subcommand().map_or(matches, |(_, matches)| matches);
    let call = Call { matches, terminal };
    match command {
        DataCommand::Check(args) => {
            let job = call.run(Command::Eval, args)?;
            with_threads(job.config.threads, || recipes::data::check(&job))
        }
        DataCommand::Stats(args) => {
            recipes::data::stats(&call.run(Command::Eval, &args.run)?, args.train.as_deref())
        }
        DataCommand::Split(args) => {
            let job = call.run(Command::Eval, &args.run)?;
            with_threads(job.config.threads, || {
                recipes::data::split(&job, args.test_share, args.validation_share)
            })
        }
        DataCommand::Phantom(args) => {
            let config = PhantomConfig {
                seed: args.seed,
                size: args.size,
                contrast: args.contrast as f32,
                train: args.train_items,
                validation: args.validation_items,
                test: args.test_items,
            };
            recipes::data::phantom(&config, &args.out, terminal)
        }
        DataCommand::Convert(args) => {
            recipes::data::convert(&call.run(Command::Eval, &args.run)?, args.to.as_deref())
        }
    }
}

fn make_report(args: &ReportArgs, progress: &dyn Progress) -> Result<Outcome> {
    let options =
        report::ReportOptions { out: args.out.clone(), title: args.title.clone(), images: !args.no_images };
    report::report(&args.runs, &options, progress)
}

fn config(command: &ConfigCommand, matches: &ArgMatches) -> Result<Outcome> {
    let matches = matches.subcommand().map_or(matches, |(_, matches)| matches);
    match command {
        ConfigCommand::Schema => {
            let schema = RunConfig::schema();
            let text = serde_json::to_string_pretty(&schema).map_err(anyhow::Error::from)?;
            Ok(Outcome::new(schema, text + "\n"))
        }
        ConfigCommand::Check { files } => {
            let mut problems = Vec::new();
            for file in files {
                match RunConfig::load_any(Some(file), &[]) {
                    Ok(_) => {}
                    Err(Error::Config(found)) => problems.extend(found),
                    Err(other) => return Err(other),
                }
            }
            if !problems.is_empty() {
                return Err(Error::Config(problems));
            }
            let names: Vec<String> = files.iter().map(|file| file.display().to_string()).collect();
            let text = names.join(": ok\n") + ": ok\n";
            Ok(Outcome::new(json!({"command": "config check", "files": names, "pass": true}), text))
        }
        ConfigCommand::Show(args) => {
            let config = RunConfig::load_any(args.config.as_deref(), &overrides(Command::Eval, matches)?)?;
            let summary = serde_json::to_value(&config).map_err(anyhow::Error::from)?;
            Ok(Outcome::new(summary, show(&config)?))
        }
        ConfigCommand::Preset { name: None } => Ok(presets::list()),
        ConfigCommand::Preset { name: Some(name) } => presets::preset(name),
    }
}
