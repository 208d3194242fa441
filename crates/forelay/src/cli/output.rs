//! What commands print: tables for people, JSON for programs, sizes and times in words.

use std::io::Write as _;

use comfy_table::{ContentArrangement, Table, presets};
use forelay_image::printable;
use serde::Serialize;

pub use crate::units::{bytes, seconds};

/// Prints `value` as one JSON document.
pub fn json(value: &impl Serialize) -> anyhow::Result<()> {
    raw(format!("{}\n", serde_json::to_string_pretty(value)?).as_bytes());
    Ok(())
}

/// A column of a table: its heading, and what it says of a thing.
pub type Column<'a, T> = (&'a str, fn(&T) -> String);

/// Prints a table with a row for each thing.
pub fn table<'a, T: 'a>(things: impl IntoIterator<Item = &'a T>, columns: &[Column<'_, T>]) {
    let mut table = Table::new();
    table
        .load_style(presets::NOTHING)
        .set_content_arrangement(ContentArrangement::Disabled);
    table.set_header(columns.iter().map(|(heading, _)| heading.to_uppercase()));
    for thing in things {
        // Before the columns are measured; a cell is one line.
        table.add_row(columns.iter().map(|(_, say)| printable(&say(thing))));
    }
    for row in table.to_string().lines() {
        line(row.trim_end());
    }
}

/// Prints a line on standard output, as `println!` does, and never panics.
macro_rules! say {
    () => {
        $crate::cli::output::line("")
    };
    ($($text:tt)*) => { $crate::cli::output::line(&format!($($text)*)) };
}

/// Prints a line on standard error.
macro_rules! complain {
    ($($text:tt)*) => { $crate::cli::output::complaint(std::io::stderr(), &format!($($text)*)) };
}

/// Prints a text of one or more lines. What it says may come from a repository or a guest:
/// nothing of it reaches the terminal as a command.
pub fn line(text: &str) {
    raw(format!("{}\n", shown(text)).as_bytes());
}

/// As [`line`], to `out`. If nobody can read it, nobody can be told that either.
pub fn complaint(mut out: impl std::io::Write, text: &str) {
    let _ = out.write_all(format!("{}\n", shown(text)).as_bytes());
}

/// A text whose lines are fit to be shown.
fn shown(text: &str) -> String {
    let lines: Vec<String> = text.split('\n').map(printable).collect();
    lines.join("\n")
}

/// Writes bytes to standard output as they are. A reader that has seen enough (`| head`) ends
/// the program in peace.
pub fn raw(bytes: &[u8]) {
    let mut out = std::io::stdout().lock();
    if let Err(error) = out.write_all(bytes).and_then(|()| out.flush()) {
        let seen_enough = error.kind() == std::io::ErrorKind::BrokenPipe;
        std::process::exit(i32::from(!seen_enough));
    }
}

/// `None` as a dash.
pub fn optional<T>(value: Option<T>, show: impl Fn(T) -> String) -> String {
    value.map_or_else(|| "-".to_owned(), show)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn lines_stay_and_what_steers_the_terminal_goes() {
        assert_eq!(
            shown("a: b\n  note: \u{1b}[2Jx"),
            "a: b\n  note: \\u{1b}[2Jx"
        );
        let mut told = Vec::new();
        complaint(&mut told, "note: \u{1b}]0;x\u{7}");
        assert_eq!(told, b"note: \\u{1b}]0;x\\u{7}\n");
    }
}
