//! The shape of product code: functions that are too long, type names that grep finds too
//! often.

use std::collections::BTreeMap;

use super::allowances::Violation;
use super::sources::{Function, Role, SourceFile};

/// Longest product function, from `fn` to the closing brace.
pub const LONGEST_FUNCTION: usize = 70;

/// So many definitions of a type name are too many.
pub const TYPE_NAME_USES: usize = 3;

/// Product functions over [`LONGEST_FUNCTION`] lines.
pub fn long_functions(sources: &[SourceFile]) -> Vec<Violation> {
    functions(sources)
        .filter(|(_, function)| function.lines > LONGEST_FUNCTION)
        .map(|(source, function)| Violation {
            key: format!("{}::{}", source.package, function.key()),
            amount: function.lines,
            place: format!("{}:{}", source.path.display(), function.line),
            text: format!(
                "`{}` has {} lines, more than {LONGEST_FUNCTION}: split it by what it does",
                function.name, function.lines
            ),
        })
        .collect()
}

/// Type names defined [`TYPE_NAME_USES`] times or more in product code.
pub fn type_names(sources: &[SourceFile]) -> Vec<Violation> {
    let mut places: BTreeMap<&str, Vec<String>> = BTreeMap::new();
    for source in product(sources) {
        for (name, line) in &source.types {
            let place = format!("{}:{line}", source.path.display());
            places.entry(name).or_default().push(place);
        }
    }
    places.retain(|_, places| places.len() >= TYPE_NAME_USES);
    places
        .into_iter()
        .map(|(name, places)| Violation {
            key: name.to_owned(),
            amount: places.len(),
            place: places[0].clone(),
            text: format!(
                "`{name}` is the name of {} types, also in {}: qualify them",
                places.len(),
                places[1..].join(", ")
            ),
        })
        .collect()
}

/// Product functions with their files.
pub fn functions(sources: &[SourceFile]) -> impl Iterator<Item = (&SourceFile, &Function)> {
    product(sources).flat_map(|source| {
        let functions = source.functions.iter();
        functions.map(move |function| (source, function))
    })
}

/// Files with product code.
pub fn product(sources: &[SourceFile]) -> impl Iterator<Item = &SourceFile> {
    sources.iter().filter(|source| source.role == Role::Product)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn source(path: &str, text: String) -> SourceFile {
        SourceFile::parse(path.into(), text).unwrap()
    }

    #[test]
    fn a_long_function_is_found_outside_tests_alone() {
        let long = |lines: usize| format!("fn f() {{\n{}}}\n", "    g();\n".repeat(lines - 2));
        let found = |path, text| long_functions(&[source(path, text)]);
        assert_eq!(found("crates/a/src/b.rs", long(70)), []);
        let violations = found("crates/a/src/b.rs", long(71));
        assert_eq!((violations.len(), violations[0].amount), (1, 71));
        assert_eq!(found("crates/a/tests/it/b.rs", long(71)), []);
        let test = format!("#[cfg(test)]\nmod tests {{\n{}}}\n", long(71));
        assert_eq!(found("crates/a/src/b.rs", test), []);
        let method = format!("impl A {{\n{}}}\n", long(71));
        assert_eq!(found("crates/a/src/b.rs", method).len(), 1);
    }

    #[test]
    fn a_name_of_three_types_is_found() {
        let twice = "struct A; mod b { enum A {} }".to_owned();
        let once = "trait A {}".to_owned();
        let first = source("crates/a/src/lib.rs", twice.clone());
        assert_eq!(type_names(&[first]), []);
        let first = source("crates/a/src/lib.rs", twice.clone());
        let test = source("crates/b/tests/it/main.rs", once.clone());
        assert_eq!(type_names(&[first, test]), []);
        let first = source("crates/a/src/lib.rs", twice);
        let second = source("crates/b/src/lib.rs", once);
        let violations = type_names(&[first, second]);
        assert_eq!((violations.len(), violations[0].amount), (1, 3));
    }
}
