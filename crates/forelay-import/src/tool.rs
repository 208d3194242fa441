//! Running host tools: one place that captures output, tells failures apart and never
//! leaves a child behind.
//!
//! Invariant: a tool's standard input is empty, its locale is C and its directory not the
//! caller's, so its output does not depend on the host.

use std::collections::VecDeque;
use std::ffi::OsStr;
use std::io::{self, BufRead, BufReader, Read};
use std::path::Path;
use std::process::{Command, Stdio};

use crate::error::ImportError;

/// Lines that are kept of what a tool prints.
const TAIL_LINES: usize = 400;
/// Lines that are shown of its end, and before the line in which dpkg says what failed.
const SHOWN_LINES: usize = 25;
const FAILED_PACKAGE: &str = "dpkg: error processing";

/// A host tool about to run.
pub(crate) struct Tool {
    command: Command,
    name: String,
    package: &'static str,
    doing: String,
}

impl Tool {
    /// The tool `name` of the Debian package `package`, used for `doing`.
    pub fn new(name: &str, package: &'static str, doing: impl Into<String>) -> Self {
        let mut command = Command::new(name);
        command
            .env_clear()
            .env(
                "PATH",
                "/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin",
            )
            .env("LC_ALL", "C.UTF-8")
            .env("HOME", "/root")
            .env("DEBIAN_FRONTEND", "noninteractive")
            .env("DEBCONF_NONINTERACTIVE_SEEN", "true")
            .current_dir("/")
            .stdin(Stdio::null());
        for (name, value) in std::env::vars_os() {
            // Reaching the mirror through a proxy is the host's business.
            if name
                .to_string_lossy()
                .to_ascii_lowercase()
                .ends_with("_proxy")
            {
                command.env(name, value);
            }
        }
        Self {
            command,
            name: name.to_owned(),
            package,
            doing: doing.into(),
        }
    }

    pub fn arg(mut self, arg: impl AsRef<OsStr>) -> Self {
        self.command.arg(arg);
        self
    }

    pub fn args<S: AsRef<OsStr>>(mut self, args: impl IntoIterator<Item = S>) -> Self {
        self.command.args(args);
        self
    }

    /// Runs it in this directory.
    pub fn directory(mut self, directory: &Path) -> Self {
        self.command.current_dir(directory);
        self
    }

    pub fn env(mut self, name: &str, value: impl AsRef<OsStr>) -> Self {
        self.command.env(name, value);
        self
    }

    /// Runs the tool and returns what it printed on standard output.
    pub fn output(self) -> Result<String, ImportError> {
        let mut out = String::new();
        self.run(|line| {
            out.push_str(line);
            out.push('\n');
        })?;
        Ok(out)
    }

    /// Runs the tool; each line of its standard output goes to `on_line`. A failure
    /// carries the last lines of both outputs.
    pub fn run(mut self, mut on_line: impl FnMut(&str)) -> Result<(), ImportError> {
        self.command.stdout(Stdio::piped()).stderr(Stdio::piped());
        let mut child = self
            .command
            .spawn()
            .map_err(|error| self.cannot_run(error))?;
        let stderr = child.stderr.take();
        let errors = std::thread::spawn(move || {
            let mut tail = VecDeque::new();
            if let Some(stderr) = stderr {
                each_line(stderr, |line| keep_tail(&mut tail, line));
            }
            tail
        });
        let mut tail = VecDeque::new();
        if let Some(stdout) = child.stdout.take() {
            each_line(stdout, |line| {
                keep_tail(&mut tail, line);
                on_line(line);
            });
        }
        let status = child.wait().map_err(|error| self.cannot_run(error))?;
        let errors = errors.join().unwrap_or_default();
        if status.success() {
            return Ok(());
        }
        let lines = if errors.is_empty() { tail } else { errors };
        let tail = excerpt(&Vec::from(lines));
        if tail.contains("No space left on device") {
            return Err(ImportError::DiskFull { doing: self.doing });
        }
        Err(ImportError::Tool {
            tool: self.name,
            status: status.to_string(),
            doing: self.doing,
            tail,
        })
    }

    fn cannot_run(&self, error: io::Error) -> ImportError {
        match error.kind() {
            io::ErrorKind::NotFound => ImportError::MissingTool {
                tool: self.name.clone(),
                package: self.package,
            },
            _ => crate::error::io_error("running", &self.name)(error),
        }
    }
}

/// The end of what was printed, and what was printed about the first package that failed.
fn excerpt(lines: &[String]) -> String {
    let end = lines.len().saturating_sub(SHOWN_LINES);
    let failed = lines
        .iter()
        .position(|line| line.starts_with(FAILED_PACKAGE));
    match failed {
        Some(failed) if failed < end => {
            let from = failed.saturating_sub(SHOWN_LINES);
            let to = (failed + 2).min(end);
            let shown = [&lines[from..to].join("\n"), "...", &lines[end..].join("\n")];
            shown.join("\n")
        }
        _ => lines[end..].join("\n"),
    }
}

fn each_line(from: impl Read, mut on_line: impl FnMut(&str)) {
    let mut from = BufReader::new(from);
    let mut line = Vec::new();
    while from
        .read_until(b'\n', &mut line)
        .is_ok_and(|count| count > 0)
    {
        let text = String::from_utf8_lossy(&line);
        on_line(text.trim_end_matches(['\n', '\r']));
        line.clear();
    }
}

fn keep_tail(tail: &mut VecDeque<String>, line: &str) {
    if tail.len() == TAIL_LINES {
        tail.pop_front();
    }
    tail.push_back(line.to_owned());
}

/// Refuses to go on without root, naming what needs it.
pub(crate) fn require_root(doing: &'static str) -> Result<(), ImportError> {
    if rustix::process::geteuid().is_root() {
        Ok(())
    } else {
        Err(ImportError::NotRoot { doing })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn failures_carry_the_end_of_what_was_said() {
        let script = "echo out; echo reason >&2; exit 3";
        let tool = Tool::new("sh", "dash", "testing").args(["-c", script]);
        let error = tool.output().unwrap_err().to_string();
        assert!(error.contains("reason") && error.contains('3'), "{error}");
        let script = "echo 'write: No space left on device' >&2; exit 1";
        let tool = Tool::new("sh", "dash", "testing").args(["-c", script]);
        assert!(matches!(tool.output(), Err(ImportError::DiskFull { .. })));
    }

    #[test]
    fn a_missing_tool_names_its_package() {
        let error = Tool::new("no-such-tool", "some-package", "testing").output();
        let text = error.unwrap_err().to_string();
        assert!(text.contains("apt-get install some-package"), "{text}");
    }
}
