//! Every `forelay` command that README.md and ARCHITECTURE.md show is parsed by the real
//! command line, so that a renamed flag cannot stay in them.

use std::path::Path;

use clap::error::ErrorKind;

use super::*;

/// Commands of the page with their line numbers: whole ones in code blocks, and those
/// that prose mentions, which may leave out what a command needs.
fn commands(page: &str) -> Vec<(usize, bool, String)> {
    let mut found = Vec::new();
    let mut in_block = false;
    for (number, line) in page.lines().enumerate() {
        if line.trim_start().starts_with("```") {
            in_block = !in_block;
        } else if in_block {
            found.push((number + 1, true, line.trim().to_owned()));
        } else {
            let spans = line.split('`').skip(1).step_by(2);
            found.extend(spans.map(|span| (number + 1, false, span.to_owned())));
        }
    }
    found.retain(|(_, _, text)| program(text).is_some());
    found
}

/// The command without the program, if the program is `forelay`.
fn program(text: &str) -> Option<&str> {
    let (program, rest) = text.split_once(' ')?;
    (Path::new(program).file_name()? == "forelay").then_some(rest)
}

/// Why the command does not parse.
fn problem(text: &str, whole: bool) -> Option<String> {
    let rest = program(text)?.trim_end_matches(" &");
    let words = shlex::split(rest)?;
    let words = std::iter::once("forelay".to_owned()).chain(words);
    let error = Arguments::command().try_get_matches_from(words).err()?;
    let incomplete = [
        ErrorKind::MissingRequiredArgument,
        ErrorKind::DisplayHelpOnMissingArgumentOrSubcommand,
    ];
    let fine = !whole && incomplete.contains(&error.kind());
    (!fine).then(|| format!("`{text}`: {error}"))
}

#[test]
fn documented_commands_parse() {
    let root = Path::new(env!("CARGO_MANIFEST_DIR")).join("../..");
    for page in ["README.md", "ARCHITECTURE.md"] {
        let text = std::fs::read_to_string(root.join(page)).unwrap();
        let commands = commands(&text);
        assert!(!commands.is_empty(), "{page} shows no command");
        for (line, whole, command) in commands {
            assert_eq!(problem(&command, whole), None, "{page}:{line}");
        }
    }
}

#[test]
fn a_command_that_does_not_parse_is_found() {
    assert_eq!(problem("forelay daemon &", true), None);
    assert_eq!(
        problem("target/release/forelay doctor   # look", true),
        None
    );
    assert_eq!(problem("forelay attach --json", false), None);
    assert!(problem("forelay attach --json", true).is_some());
    assert!(problem("forelay component", true).is_some());
    assert!(problem("forelay ps --al", false).is_some());
    assert!(problem("forelay lanch web.toml", false).is_some());
    let page = "Text `forelay ps` and `cargo run`.\n```\nforelay stop web\nforelay_x y\n```\n";
    let expected = [
        (1, false, "forelay ps".into()),
        (3, true, "forelay stop web".into()),
    ];
    assert_eq!(commands(page), expected);
}
