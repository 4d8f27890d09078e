//! What several test modules need: the program itself, run in a directory of its own.

pub(crate) mod hub_server;

use std::path::Path;
use std::process::{Command, Output};

/// The program with no settings of the caller's environment.
pub(crate) fn safemed(dir: &Path) -> Command {
    let mut command = Command::new(env!("CARGO_BIN_EXE_safemed"));
    command.current_dir(dir);
    for (name, _) in std::env::vars_os() {
        if name.to_string_lossy().starts_with("SAFEMED_") {
            command.env_remove(name);
        }
    }
    command
}

/// Runs it; gives status, standard output and standard error.
pub(crate) fn run(dir: &Path, arguments: &[&str]) -> (i32, String, String) {
    texts(&safemed(dir).args(arguments).output().expect("the program starts"))
}

/// Status and both outputs as text.
pub(crate) fn texts(output: &Output) -> (i32, String, String) {
    let text = |bytes: &[u8]| String::from_utf8(bytes.to_vec()).expect("text");
    (output.status.code().unwrap_or(-1), text(&output.stdout), text(&output.stderr))
}
