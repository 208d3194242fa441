//! What README.md and ARCHITECTURE.md name: paths, symbols, the function of each step of
//! a page's life, and tasks of xtask. Commands of `forelay` are parsed by a test of the
//! crate that defines them.

use std::path::Path;

use super::allowances::Violation;
use super::shape::functions;
use super::sources::{SourceFile, is_identifier};

/// The heading above the steps of a page's life.
const STEPS: &str = "Life of a page";

/// Checks each code span of a page that looks like a path or a Rust symbol, and each
/// `cargo xtask` in it.
pub fn names(root: &Path, page: &str, text: &str, sources: &[SourceFile]) -> Vec<String> {
    let mut findings = Vec::new();
    let mut in_block = false;
    for (number, line) in text.lines().enumerate() {
        if line.trim_start().starts_with("```") {
            in_block = !in_block;
            continue;
        }
        let mut find = |problem: String| findings.push(format!("{page}:{}: {problem}", number + 1));
        if in_block {
            unknown_task(line).into_iter().for_each(&mut find);
            continue;
        }
        for span in spans(line) {
            unknown_task(span)
                .or_else(|| check_span(root, span, sources))
                .into_iter()
                .for_each(&mut find);
        }
    }
    findings
}

/// Steps of a page's life that name no function which grep finds once.
pub fn steps(text: &str, sources: &[SourceFile]) -> Vec<Violation> {
    let steps = numbered_steps(text);
    if steps.is_empty() {
        return vec![Violation {
            key: STEPS.to_owned(),
            amount: 1,
            place: "ARCHITECTURE.md".to_owned(),
            text: format!("no numbered steps below `{STEPS}`"),
        }];
    }
    steps
        .iter()
        .filter(|step| {
            !step
                .text
                .iter()
                .any(|line| spans(line).any(|span| is_one_function(span, sources)))
        })
        .map(|step| Violation {
            key: step.name.clone(),
            amount: 1,
            place: format!("ARCHITECTURE.md:{}", step.line),
            text: format!(
                "step `{}` names no function that is defined exactly once",
                step.name
            ),
        })
        .collect()
}

struct NumberedStep<'a> {
    name: String,
    line: usize,
    text: Vec<&'a str>,
}

fn numbered_steps(text: &str) -> Vec<NumberedStep<'_>> {
    let mut steps: Vec<NumberedStep<'_>> = Vec::new();
    let mut below = false;
    for (number, line) in text.lines().enumerate() {
        if let Some(heading) = line.strip_prefix("## ") {
            below = heading.trim() == STEPS;
        } else if !below {
            continue;
        } else if line.starts_with(|c: char| c.is_ascii_digit()) && line.contains(". ") {
            let name = line
                .split("**")
                .nth(1)
                .unwrap_or(line)
                .trim_end_matches('.');
            steps.push(NumberedStep {
                name: name.to_owned(),
                line: number + 1,
                text: vec![line],
            });
        } else if line.starts_with(char::is_whitespace) {
            steps
                .iter_mut()
                .last()
                .into_iter()
                .for_each(|step| step.text.push(line));
        }
    }
    steps
}

/// Whether the span is `function`, `module::function` or `Type::function`, and there is
/// one of it in product code.
fn is_one_function(span: &str, sources: &[SourceFile]) -> bool {
    let parts: Vec<&str> = span.trim_end_matches("()").split("::").collect();
    let [owner @ .., name] = parts.as_slice() else {
        return false;
    };
    let owner = owner
        .last()
        .filter(|owner| owner.starts_with(char::is_uppercase));
    let found = functions(sources).filter(|(_, function)| {
        function.name == *name && owner.is_none_or(|owner| function.owner.as_deref() == Some(owner))
    });
    found.count() == 1
}

fn spans(line: &str) -> impl Iterator<Item = &str> {
    line.split('`').skip(1).step_by(2)
}

/// A `cargo xtask` of a task or bench that is not there.
fn unknown_task(line: &str) -> Option<String> {
    let mut words = line.split_once("cargo xtask ")?.1.split([' ', ')']);
    let task = words.next()?;
    if !crate::TASKS.contains(&task) {
        return Some(format!("there is no `cargo xtask {task}`"));
    }
    let bench = words.next().filter(|_| task == "bench")?;
    let known = bench == "NAME" || crate::bench::NAMES.contains(&bench);
    (!known).then(|| format!("there is no `cargo xtask bench {bench}`"))
}

fn check_span(root: &Path, span: &str, sources: &[SourceFile]) -> Option<String> {
    let is_path =
        span.starts_with("crates/") || span.starts_with("xtask/") || span.ends_with(".rs");
    if is_path && !span.contains([' ', '*', '{', '<']) {
        let exists = root.join(span).exists()
            || sources
                .iter()
                .any(|source| source.path.ends_with(span.trim_start_matches('/')));
        return (!exists).then(|| format!("`{span}` does not exist: correct or remove it"));
    }
    let parts: Vec<&str> = span.split("::").collect();
    if parts.len() > 1 && parts.iter().all(|part| is_identifier(part)) {
        let last = parts[parts.len() - 1];
        let defined = sources.iter().any(|source| defines(&source.text, last));
        return (!defined).then(|| format!("nothing named `{last}` is defined (in `{span}`)"));
    }
    None
}

/// True if `text` defines `name` as an item, a field or a variant.
fn defines(text: &str, name: &str) -> bool {
    let keywords = ["fn", "struct", "enum", "trait", "mod", "const", "type"];
    keywords.iter().any(|keyword| {
        text.match_indices(&format!("{keyword} {name}"))
            .any(|(at, found)| {
                !text[at + found.len()..]
                    .starts_with(|c: char| c.is_ascii_alphanumeric() || c == '_')
            })
    }) || text.lines().any(|line| {
        let line = line.trim_start().trim_start_matches("pub ");
        line.strip_prefix(name)
            .is_some_and(|rest| rest.starts_with([':', ',', '(']) || rest.starts_with(" {"))
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    fn sources() -> Vec<SourceFile> {
        let text = "pub fn known() {}\nstruct A; impl A { fn step() {} }\nstruct B; impl B { fn step() {} }";
        vec![SourceFile::parse("crates/a/src/lib.rs".into(), text.to_owned()).unwrap()]
    }

    #[test]
    fn a_missing_path_and_an_unknown_symbol_are_found() {
        let sources = sources();
        let check = |span| check_span(Path::new("/nonexistent"), span, &sources);
        assert!(check("crates/a/src/gone.rs").is_some());
        assert!(check("crates/a/src/lib.rs").is_none());
        assert!(check("a::known").is_none());
        assert!(check("a::unknown").is_some());
        assert!(check("cargo xtask test").is_none());
    }

    #[test]
    fn an_unknown_task_or_bench_is_found() {
        let page = "\
Run `cargo xtask tset`, `cargo xtask bench NAME` or `cargo xtask bench launch`.
```
export FORELAY_GUEST=$(cargo xtask guest)
cargo xtask bench lunch
```
";
        let findings = names(Path::new("/nonexistent"), "PAGE.md", page, &[]);
        let expected = [
            "PAGE.md:1: there is no `cargo xtask tset`",
            "PAGE.md:4: there is no `cargo xtask bench lunch`",
        ];
        assert_eq!(findings, expected);
    }

    #[test]
    fn a_step_names_a_function_that_is_defined_once() {
        let page = |third: &str| {
            format!(
                "## {STEPS}\n\n1. **One.** By `A::step`.\n2. **Two.** By `x::known`.\n3. **Three.** {third}\n   More.\n\n## Other\n\n1. **Four.** No.\n"
            )
        };
        let check = |third: &str| steps(&page(third), &sources());
        assert_eq!(check("`A::step`"), []);
        assert_eq!(check("`known()`"), []);
        assert_eq!(check("`A` alone")[0].key, "Three");
        assert_eq!(
            check("`step`, of which there are two")[0].place,
            "ARCHITECTURE.md:5"
        );
        assert_eq!(check("`A::gone`").len(), 1);
        assert_eq!(steps("## Other\n", &[]).len(), 1);
    }
}
