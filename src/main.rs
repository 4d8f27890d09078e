//! The `safemed` program: parse, call, turn an error into an exit status.

mod process;

/// Keeps freed memory: temporaries of a training step are not returned to the system and faulted in again.
#[global_allocator]
static ALLOCATOR: mimalloc::MiMalloc = mimalloc::MiMalloc;

fn main() -> std::process::ExitCode {
    process::prepare();
    safemed::cli::main()
}
