//! What a recipe is given and what it gives back.

use super::config::{Command, RunConfig};
use super::progress::Progress;
use super::run::{Opening, Run, Stop};
use crate::error::Result;
use serde_json::Value;

/// One call of a recipe.
#[derive(Clone)]
pub struct Job<'a> {
    /// What was asked for.
    pub command: Command,
    /// The checked configuration.
    pub config: RunConfig,
    /// Whether an unfinished run may be continued.
    pub resume: bool,
    /// The command line, for provenance.
    pub command_line: Vec<String>,
    /// Raised when the run should save and end.
    pub stop: Stop,
    /// Who listens.
    pub progress: &'a dyn Progress,
}

impl std::fmt::Debug for Job<'_> {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Job")
            .field("command", &self.command)
            .field("config", &self.config)
            .finish_non_exhaustive()
    }
}

impl Job<'_> {
    /// Opens the run directory of this job.
    ///
    /// # Errors
    /// Those of [`Run::open`].
    pub fn open_run(&self) -> Result<Run> {
        let opening =
            Opening { resume: self.resume, command_line: self.command_line.clone(), stop: self.stop.clone() };
        Run::open(self.command, &self.config, opening)
    }
}

/// What a command has to say when it is done.
#[derive(Debug, Clone, Default)]
pub struct Outcome {
    /// The summary: what `--json` prints.
    pub summary: Value,
    /// What is printed otherwise; rows already reported through the progress are not repeated here.
    pub text: String,
    /// Set when a check did not hold: the status is then 5.
    pub check_failed: Option<String>,
    /// Set when data is refused whose problems the summary lists: the status is then 3.
    pub data_refused: Option<String>,
}

impl Outcome {
    /// A summary and its text.
    pub fn new(summary: Value, text: impl Into<String>) -> Self {
        Self { summary, text: text.into(), ..Self::default() }
    }
}
