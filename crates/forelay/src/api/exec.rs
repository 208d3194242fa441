//! Programs that run in a VM.

use serde::{Deserialize, Serialize};

/// A command to run in the guest.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub struct ExecRequest {
    /// Program and arguments.
    pub command: Vec<String>,
    /// End it after this many seconds.
    #[serde(default)]
    pub timeout_s: Option<f64>,
    /// The client sends its standard input; else it is empty. Needs an upgrade.
    #[serde(default)]
    pub stdin: bool,
    /// The program has a terminal, which shows on standard output. Needs an upgrade.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub terminal: Option<ExecTerminal>,
}

/// A terminal of a program.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub struct ExecTerminal {
    /// Lines.
    pub rows: u16,
    /// Characters of a line.
    pub columns: u16,
    /// What kind of terminal shows it: the program's `TERM`.
    pub kind: String,
}

/// The end of a program whose streams were sent as they are.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct ExecEnd {
    /// Exit status; 128 + signal if killed, 124 if its time was up, 126 or 127 if it could
    /// not be executed or does not exist.
    pub status: i32,
    /// Why it was not started, or was lost.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub error: Option<String>,
}

/// What the command did. Output that is too much or no text is an error.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub struct ExecResult {
    /// Exit status, as in [`ExecEnd`].
    pub status: i32,
    /// Standard output.
    pub stdout: String,
    /// Standard error; also why it was not started.
    pub stderr: String,
}
