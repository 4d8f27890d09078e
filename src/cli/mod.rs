//! The command line: words in, text out, an exit status at the end. The only floor that prints.
//!
//! `args` are the words, `overrides` turns flags into settings, `dispatch` is the table of commands, `terminal` shows.

mod args;
mod dispatch;
mod overrides;
mod terminal;

use crate::backend::Isa;
use crate::error::{Error, ExitStatus, Result};
use args::Cli;
use clap::{CommandFactory as _, FromArgMatches as _};
use std::process::ExitCode;
use terminal::{Loudness, Terminal};

/// Runs the program on the arguments of this process.
pub fn main() -> ExitCode {
    terminal::install_panic_hook();
    let status = std::panic::catch_unwind(|| {
        match run() {
            Ok(status) => status,
            Err(error) => {
                let status = error.status();
                // Whoever closed the pipe has what they wanted.
                if status != ExitStatus::Done {
                    terminal::print_error(&error);
                }
                status
            }
        }
    });
    ExitCode::from(status.unwrap_or(ExitStatus::Unexpected) as u8)
}

fn run() -> Result<ExitStatus> {
    let parsed = Cli::command()
        .try_get_matches()
        .and_then(|matches| Cli::from_arg_matches(&matches).map(|cli| (cli, matches)));
    let (cli, matches) = match parsed {
        Ok(parsed) => parsed,
        Err(error) => {
            // Help and version are data on standard output; a mistake goes to standard error.
            return match error.print() {
                Err(closed) if closed.kind() != std::io::ErrorKind::BrokenPipe => Ok(ExitStatus::Unexpected),
                _ if error.use_stderr() => Ok(ExitStatus::Usage),
                _ => Ok(ExitStatus::Done),
            };
        }
    };
    let loudness = match (cli.output.quiet, cli.output.verbose) {
        (true, _) => Loudness::Quiet,
        (false, 0) => Loudness::Normal,
        _ => Loudness::Verbose,
    };
    terminal::start_log(cli.output.verbose, cli.output.quiet);
    Isa::limit()?;
    let terminal = Terminal::new(loudness, cli.output.json);
    let result = dispatch::dispatch(&cli, &matches, &terminal);
    let broken = terminal.take_error();
    drop(terminal);
    let outcome = result?;
    if cli.output.json {
        terminal::print(&format!("{}\n", outcome.summary))?;
    } else {
        terminal::print(&outcome.text)?;
    }
    match (outcome.check_failed, outcome.data_refused, broken) {
        (Some(what), ..) => Err(Error::Check(what)),
        (None, Some(what), _) => Err(Error::Data(what)),
        (None, None, Some(error)) => Err(error),
        (None, None, None) => Ok(ExitStatus::Done),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn for_each_command(command: &clap::Command, check: &mut impl FnMut(&clap::Command)) {
        check(command);
        for inner in command.get_subcommands() {
            for_each_command(inner, check);
        }
    }

    #[test]
    fn the_command_line_is_sound() {
        Cli::command().debug_assert();
    }

    #[test]
    fn every_option_is_an_environment_variable_of_the_same_name() {
        let mut count = 0;
        for_each_command(&Cli::command(), &mut |command| {
            for argument in command.get_arguments() {
                let Some(long) = argument.get_long().filter(|long| !["help", "version"].contains(long))
                else {
                    continue;
                };
                let expected = format!("SAFEMED_{}", long.replace('-', "_").to_uppercase());
                let found = argument.get_env().map(|name| name.to_string_lossy().into_owned());
                assert_eq!(found, Some(expected), "{} --{long}", command.get_name());
                count += 1;
            }
        });
        assert!(count > 100, "{count}");
    }

    #[test]
    fn every_command_and_option_is_explained() {
        for_each_command(&Cli::command(), &mut |command| {
            assert!(command.get_about().is_some(), "{}", command.get_name());
            for argument in command.get_arguments() {
                assert!(argument.get_help().is_some(), "{} {}", command.get_name(), argument.get_id());
            }
        });
    }
}
