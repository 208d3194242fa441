//! Project tasks: `demo`, `test`, `bench` and `tidy`.
//!
//! Owns how the project is built, checked and shown; holds no logic of the product.
//! Everything it starts it ends by its own ids.

mod backend;
mod bench;
mod cgroup;
mod cpu;
mod demo;
mod frames;
mod guest;
mod hog;
mod host;
mod pages;
mod prerequisites;
mod process;
#[path = "../../crates/forelay-store/tests/it/servers.rs"]
mod servers;
mod test;
mod tidy;

use std::process::ExitCode;

const USAGE: &str = "\
Usage: cargo xtask <TASK>

Tasks:
  demo            install what is needed, build, compose and boot real VMs, show the main job
  demo --repository s3|oci
                  the same over a bucket, or a container registry
  test            install what is needed and run the whole suite
  bench <NAME>    measure; writes target/bench/<NAME>.json
  guest           build the guest's init and print its path
  tidy            check what drifts: who knows whom, names and commands in the pages, headers,
                  long functions, repeated type names, functions without a caller, words
  tidy --figures [ROOT]
                  print the figures behind these checks, of the workspace at ROOT
";

/// The tasks above, by which the pages are checked.
const TASKS: [&str; 5] = ["demo", "test", "bench", "guest", "tidy"];

fn main() -> ExitCode {
    let arguments: Vec<String> = std::env::args().skip(1).collect();
    let words: Vec<&str> = arguments.iter().map(String::as_str).collect();
    let result = match words.as_slice() {
        ["bench", name, rest @ ..] => bench::run_named(name, rest),
        ["demo"] => demo::run_all(backend::Backend::Directory),
        ["demo", "--repository", name] => backend::Backend::parse(name).and_then(demo::run_all),
        ["test", rest @ ..] => test::run_all(rest),
        ["guest"] => guest::build().map(|path| println!("{}", path.display())),
        // Not for people: the memory hog of `bench pressure`.
        ["hog"] => hog::run(),
        ["tidy"] => tidy::check(),
        ["tidy", "--figures"] => tidy::print_figures(None),
        ["tidy", "--figures", root] => tidy::print_figures(Some(root)),
        _ => {
            eprint!("{USAGE}");
            return ExitCode::from(2);
        }
    };
    match result {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            eprintln!("error: {error:#}");
            ExitCode::FAILURE
        }
    }
}
