//! The table of figures about the code: `cargo xtask tidy --figures`.

use std::collections::BTreeMap;
use std::fmt::Write as _;

use super::sources::{Role, SourceFile};
use super::{callers, edges, shape};

/// The table as text; the names behind each number follow it.
pub fn table(sources: &[SourceFile]) -> String {
    let mut text = String::new();
    lines_per_crate(sources, &mut text);
    let long = shape::long_functions(sources);
    let types = shape::type_names(sources);
    let dead = callers::without_caller(sources);
    let edges = edges::folder_uses(sources);
    let host: Vec<_> = shape::functions(sources)
        .filter(|(source, function)| {
            source.package == "forelay"
                && !function.of_trait
                && function.owner.as_deref() == Some("Host")
        })
        .collect();
    let mut files: Vec<_> = host
        .iter()
        .map(|(source, _)| source.path.display())
        .collect();
    files.dedup_by_key(|path| path.to_string());
    let limit = shape::LONGEST_FUNCTION;
    let uses = shape::TYPE_NAME_USES;
    let mut count = |what: &str, number: usize| {
        writeln!(text, "{what:<42} {number:>7}").expect("a string takes all");
    };
    count(&format!("functions over {limit} lines"), long.len());
    count(
        &format!("type names used {uses} times or more"),
        types.len(),
    );
    count("public functions without a caller", dead.len());
    count("files with methods of Host", files.len());
    count("methods of Host", host.len());
    count("edges between the daemon's folders", edges.len());
    for violation in long.iter().chain(&types).chain(&dead) {
        writeln!(text, "{}: {}", violation.place, violation.text).expect("a string takes all");
    }
    for file in files {
        writeln!(text, "{file}: methods of Host").expect("a string takes all");
    }
    for ((from, to), places) in edges {
        writeln!(text, "{from} -> {to}: {} place(s)", places.len()).expect("a string takes all");
    }
    text
}

fn lines_per_crate(sources: &[SourceFile], text: &mut String) {
    let mut crates: BTreeMap<&str, (usize, usize, usize)> = BTreeMap::new();
    for source in sources {
        let (product, tests) = source.line_counts();
        let sums = crates.entry(&source.package).or_default();
        sums.0 += product;
        sums.1 += tests;
        if source.role == Role::Example {
            sums.2 += source.text.lines().count();
        }
    }
    let sum = crates.values().fold((0, 0, 0), |sum, lines| {
        (sum.0 + lines.0, sum.1 + lines.1, sum.2 + lines.2)
    });
    let mut row = |name: &str, lines: (usize, usize, usize)| {
        let (product, tests, examples) = lines;
        writeln!(text, "{name:<26} {product:>7} {tests:>7} {examples:>8}")
            .expect("a string takes all");
    };
    for (name, lines) in crates {
        row(name, lines);
    }
    row("sum", sum);
    text.insert_str(
        0,
        &format!(
            "{:<26} {:>7} {:>7} {:>8}\n",
            "crate", "product", "tests", "examples"
        ),
    );
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_table_counts_product_tests_and_host() {
        let parse = |path: &str, text: &str| SourceFile::parse(path.into(), text.into()).unwrap();
        let host = "struct Host;\nimpl Host {\n    fn a() {}\n    fn b() {}\n}\nimpl Drop for Host {\n    fn drop(&mut self) {}\n}\n";
        let sources = [
            parse("crates/forelay/src/daemon/mod.rs", host),
            parse("crates/forelay/tests/it/main.rs", "fn x() {}\n"),
            parse("crates/forelay/examples/e.rs", "fn main() {}\nfn y() {}\n"),
        ];
        let table = table(&sources);
        let row = |name: &str| {
            let line = table.lines().find(|line| line.starts_with(name)).unwrap();
            let numbers = line[name.len()..].split_whitespace();
            numbers
                .map(|number| number.parse().unwrap())
                .collect::<Vec<usize>>()
        };
        assert_eq!(row("forelay"), [8, 1, 2]);
        assert_eq!(row("sum"), [8, 1, 2]);
        assert_eq!(row("methods of Host"), [2]);
        assert_eq!(row("files with methods of Host"), [1]);
    }
}
