//! Running host tools: one place that captures output, tells failures apart and never
//! leaves a child behind.
//!
//! Invariant: a tool's standard input is empty, its locale is C and its directory not the
//! caller's, so its output does not depend on the host.

use std::collections::VecDeque;
use std::ffi::OsStr;
use std::io::{self, BufRead, BufReader, Read};
use std::path::Path;
use std::process::{Child, Command, ExitStatus, Stdio};
use std::sync::mpsc;

use crate::error::ImportError;
use crate::sandbox::limits::Watch;

/// Lines that are kept of what a tool prints.
const TAIL_LINES: usize = 400;
/// Lines that are shown of its end, and before the line in which dpkg says what failed.
const SHOWN_LINES: usize = 25;
/// The longest line that is kept in one piece.
const LINE_BYTES: u64 = 64 << 10;
const DISK_FULL: &str = "No space left on device";
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

    /// Errors name `program`, which it leads to.
    pub fn called(mut self, program: &str) -> Self {
        self.name = program.to_owned();
        self
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
    pub fn run(mut self, on_line: impl FnMut(&str)) -> Result<(), ImportError> {
        let child = self.take_command().spawn();
        let child = child.map_err(|error| self.cannot_run(error))?;
        self.follow(child, None, on_line)
    }

    /// The command, for who starts it in another way; to be started once.
    pub fn take_command(&mut self) -> Command {
        let mut command = std::mem::replace(&mut self.command, Command::new("false"));
        command.stdout(Stdio::piped()).stderr(Stdio::piped());
        command
    }

    /// Reads what a started tool prints, until it ends.
    pub fn follow(
        &self,
        mut child: Child,
        watch: Option<&Watch>,
        mut on_line: impl FnMut(&str),
    ) -> Result<(), ImportError> {
        let (stdout, stderr) = (child.stdout.take(), child.stderr.take());
        let counted = |bytes: u64| {
            if let Some(watch) = watch {
                watch.printed(bytes);
            }
        };
        let mut tail = VecDeque::new();
        let (status, errors) = std::thread::scope(|scope| {
            let (ended, end) = mpsc::channel();
            if let Some(watch) = watch {
                scope.spawn(move || watch.keep(&end));
            }
            let errors = scope.spawn(move || {
                let mut tail = VecDeque::new();
                if let Some(stderr) = stderr {
                    each_line(stderr, counted, |line| keep_tail(&mut tail, line));
                }
                tail
            });
            if let Some(stdout) = stdout {
                each_line(stdout, counted, |line| {
                    keep_tail(&mut tail, line);
                    on_line(line);
                });
            }
            // What closed its output may go on, and is watched until it ends.
            let status = child.wait();
            drop::<mpsc::Sender<()>>(ended);
            (status, errors.join().unwrap_or_default())
        });
        let status = status.map_err(|error| self.cannot_run(error))?;
        if let Some(why) = watch.and_then(|watch| watch.exceeded(!status.success())) {
            return Err(match why.contains(DISK_FULL) {
                true => ImportError::DiskFull {
                    doing: self.doing.clone(),
                },
                false => ImportError::Limit {
                    doing: self.doing.clone(),
                    why,
                },
            });
        }
        match status.success() {
            true => Ok(()),
            false => Err(self.failure(&status, if errors.is_empty() { tail } else { errors })),
        }
    }

    fn failure(&self, status: &ExitStatus, lines: VecDeque<String>) -> ImportError {
        let tail = excerpt(&Vec::from(lines));
        let doing = self.doing.clone();
        if tail.contains(DISK_FULL) {
            return ImportError::DiskFull { doing };
        }
        ImportError::Tool {
            tool: self.name.clone(),
            status: status.to_string(),
            doing,
            tail,
        }
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

fn each_line(from: impl Read, counted: impl Fn(u64), mut on_line: impl FnMut(&str)) {
    let mut from = BufReader::new(from);
    let mut line = Vec::new();
    while let Ok(count @ 1..) = from.by_ref().take(LINE_BYTES).read_until(b'\n', &mut line) {
        counted(count as u64);
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
