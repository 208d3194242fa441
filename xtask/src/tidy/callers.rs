//! Public functions that no product code calls: `pub` hides them from the compiler.
//!
//! By text: a function counts as called if its name occurs anywhere in product code but
//! where it is defined or imported. So a dead function that shares its name with a living
//! one is not found.

use std::collections::HashMap;

use super::allowances::Violation;
use super::shape::{functions, product};
use super::sources::SourceFile;

/// Public product functions whose name no product code uses.
pub fn without_caller(sources: &[SourceFile]) -> Vec<Violation> {
    let mut uses: HashMap<&str, usize> = HashMap::new();
    for source in product(sources) {
        for (word, times) in &source.words {
            *uses.entry(word).or_default() += times;
        }
    }
    functions(sources)
        .filter(|(_, function)| function.public && !uses.contains_key(function.name.as_str()))
        .map(|(source, function)| Violation {
            key: format!("{}::{}", source.package, function.key()),
            amount: 1,
            place: format!("{}:{}", source.path.display(), function.line),
            text: format!(
                "nothing but tests and examples calls `{}`: delete it, or move it to them",
                function.key()
            ),
        })
        .collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    fn keys(files: &[(&str, &str)]) -> Vec<String> {
        let parse = |(path, text): &(&str, &str)| SourceFile::parse(path.into(), (*text).into());
        let sources: Vec<SourceFile> = files.iter().map(parse).collect::<Result<_, _>>().unwrap();
        let violations = without_caller(&sources);
        violations
            .into_iter()
            .map(|violation| violation.key)
            .collect()
    }

    #[test]
    fn a_function_without_a_product_caller_is_found() {
        let library = "\
pub fn called() {}
pub fn imported_only() {}
pub fn tested() {}
pub struct A;
impl A {
    pub fn method(&self) {}
}
impl Clone for A {
    fn clone(&self) -> A { A }
}
#[cfg(test)]
mod tests {
    fn t() { super::tested(); }
}
";
        let caller = "use a::{called, imported_only};\nfn main() { called(); }";
        let test = "fn t() { imported_only(); A.method(); }";
        let files = [
            ("crates/a/src/lib.rs", library),
            ("crates/b/src/main.rs", caller),
            ("crates/b/tests/it/main.rs", test),
            ("crates/b/examples/e.rs", test),
        ];
        assert_eq!(
            keys(&files),
            ["a::imported_only", "a::tested", "a::A::method"]
        );
    }

    #[test]
    fn a_function_that_an_attribute_names_is_called() {
        let text = "pub fn fallback() {}\nstruct A { #[serde(default = \"fallback\")] b: u8 }";
        assert_eq!(keys(&[("crates/a/src/lib.rs", text)]), Vec::<String>::new());
    }
}
