//! Errors a user can cause, each with what is wrong, where, and what to do; and the exit statuses of the contract.
//!
//! A tensor error or an unexpected one travels in the same type, so that one `?` serves every floor.

use std::fmt;
use std::path::{Path, PathBuf};

/// What the process reports to its caller (the contract's list).
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum ExitStatus {
    /// Everything done, or a pipe closed by its reader.
    Done = 0,
    /// A defect or an environment failure.
    Unexpected = 1,
    /// Wrong flags or configuration.
    Usage = 2,
    /// Data or weights missing or invalid.
    Data = 3,
    /// A loss, gradient or weight that is not a finite number.
    NonFinite = 4,
    /// A check did not hold (parity, audit, merge).
    CheckFailed = 5,
    /// Stopped on request with everything saved: run again to go on.
    Stopped = 75,
    /// Interrupted twice.
    Interrupted = 130,
}

/// One problem in a configuration, located.
#[derive(Debug, Clone, PartialEq, Eq, Default)]
pub struct ConfigError {
    /// File the key stands in, when it came from one.
    pub file: Option<PathBuf>,
    /// One-based line and column in that file.
    pub position: Option<(usize, usize)>,
    /// Dotted path of the key, such as `attack.num_steps`.
    pub key: String,
    /// What is wrong, lower case, no full stop.
    pub message: String,
    /// The source line, for display.
    pub source_line: Option<String>,
    /// What to do.
    pub help: Option<String>,
}

impl ConfigError {
    /// A problem with `key`, without a place in a file.
    pub fn new(key: impl Into<String>, message: impl Into<String>) -> Self {
        Self { key: key.into(), message: message.into(), ..Self::default() }
    }

    /// Adds what to do about it.
    #[must_use]
    pub fn with_help(mut self, help: impl Into<String>) -> Self {
        self.help = Some(help.into());
        self
    }
}

impl fmt::Display for ConfigError {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}", self.message)?;
        match (&self.file, self.position) {
            (Some(file), Some((line, column))) => {
                write!(f, "\n  --> {}:{line}:{column}  ({})", file.display(), self.key)?;
            }
            (Some(file), None) => write!(f, "\n  --> {}  ({})", file.display(), self.key)?,
            _ => write!(f, "\n  --> {}", self.key)?,
        }
        if let Some(line) = &self.source_line {
            write!(f, "\n   |  {line}")?;
        }
        if let Some(help) = &self.help {
            write!(f, "\n   = help: {help}")?;
        }
        Ok(())
    }
}

/// Everything that can end a command early.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// Wrong flags, or an output directory that must not be touched.
    #[error("{0}")]
    Usage(String),
    /// Every problem found in the configuration, all at once.
    #[error("{}", .0.iter().map(ToString::to_string).collect::<Vec<_>>().join("\nerror: "))]
    Config(Vec<ConfigError>),
    /// Data or weights missing or invalid.
    #[error("{0}")]
    Data(String),
    /// A number that is not finite where only finite numbers make sense.
    #[error("{0}")]
    NonFinite(String),
    /// A check did not hold.
    #[error("{0}")]
    Check(String),
    /// Stopped on request; everything is saved.
    #[error("stopped on request, everything saved: run the same command with --resume to go on")]
    Stopped,
    /// Interrupted twice.
    #[error("interrupted")]
    Interrupted,
    /// A tensor operation failed.
    #[error(transparent)]
    Tensor(#[from] candle_core::Error),
    /// The operating system refused a file operation.
    #[error("{message}: {source}\n  --> {}", path.display())]
    Io {
        /// What was attempted.
        message: String,
        /// On which file.
        path: PathBuf,
        /// What the system said.
        source: std::io::Error,
    },
    /// Unexpected.
    #[error("{0:#}")]
    Other(#[from] anyhow::Error),
}

/// The crate's result.
pub type Result<T> = std::result::Result<T, Error>;

impl Error {
    /// A usage error.
    pub fn usage(message: impl Into<String>) -> Self {
        Self::Usage(message.into())
    }

    /// A data error.
    pub fn data(message: impl Into<String>) -> Self {
        Self::Data(message.into())
    }

    /// A refused file operation: `message` says what was attempted.
    pub fn io(message: impl Into<String>, path: &Path, source: std::io::Error) -> Self {
        Self::Io { message: message.into(), path: path.to_path_buf(), source }
    }

    /// Says where an error of data or numbers happened: items, a step. Other errors stay as they are.
    #[must_use]
    pub fn at(self, place: &str) -> Self {
        let add = |text: String| match text.split_once("\n   = help") {
            Some((what, help)) => format!("{what}\n  --> {place}\n   = help{help}"),
            None => format!("{text}\n  --> {place}"),
        };
        match self {
            Self::Data(text) => Self::Data(add(text)),
            Self::NonFinite(text) => Self::NonFinite(add(text)),
            other => other,
        }
    }

    /// The exit status this error stands for.
    pub fn status(&self) -> ExitStatus {
        match self {
            Self::Usage(_) | Self::Config(_) => ExitStatus::Usage,
            Self::Data(_) => ExitStatus::Data,
            Self::NonFinite(_) => ExitStatus::NonFinite,
            Self::Check(_) => ExitStatus::CheckFailed,
            Self::Stopped => ExitStatus::Stopped,
            Self::Interrupted => ExitStatus::Interrupted,
            Self::Io { source, .. } => match source.kind() {
                std::io::ErrorKind::BrokenPipe => ExitStatus::Done,
                std::io::ErrorKind::NotFound
                | std::io::ErrorKind::IsADirectory
                | std::io::ErrorKind::NotADirectory
                | std::io::ErrorKind::InvalidData
                | std::io::ErrorKind::InvalidInput
                | std::io::ErrorKind::InvalidFilename => ExitStatus::Data,
                _ => ExitStatus::Unexpected,
            },
            Self::Tensor(_) | Self::Other(_) => ExitStatus::Unexpected,
        }
    }
}
