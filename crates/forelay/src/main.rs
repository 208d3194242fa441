//! The `forelay` command: see [`forelay::cli`].

use std::process::ExitCode;

fn main() -> ExitCode {
    forelay::cli::main()
}
