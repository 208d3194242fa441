//! The workspace's Rust sources, parsed: which lines are tests, and which functions,
//! types, words and paths each file has.
//!
//! A file is a test if it lies below `tests/` or `fuzz/`, or if it is the body of a module
//! under `#[cfg(test)]`; the rest of a file is a test where an item is under
//! `#[cfg(test)]` or `#[test]`. Everything else outside `examples/` is product code.
//! Names are resolved by text only: two functions of one name are one word.

use std::collections::{BTreeMap, BTreeSet};
use std::fs;
use std::ops::RangeInclusive;
use std::path::{Path, PathBuf};

use anyhow::{Context, Result, anyhow};
use proc_macro2::{Delimiter, LexError, TokenStream, TokenTree};
use syn::spanned::Spanned as _;
use syn::visit::{self, Visit};

/// What a file is for.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Role {
    /// Built into a binary or library, xtask included.
    Product,
    /// Built by `cargo test` alone, or a fuzz target.
    Test,
    /// A program below `examples/`.
    Example,
}

/// A parsed file.
pub struct SourceFile {
    /// Relative to the workspace's root.
    pub path: PathBuf,
    /// The whole text.
    pub text: String,
    /// The crate's directory name: `forelay-image`, `xtask`.
    pub package: String,
    /// What the file as a whole is for.
    pub role: Role,
    /// Functions with a body, tests excluded.
    pub functions: Vec<Function>,
    /// Names of structs, enums, unions, traits and type aliases with their lines, tests
    /// excluded.
    pub types: Vec<(String, usize)>,
    /// How often each identifier is used outside tests; what defines or imports it is not
    /// a use.
    pub words: BTreeMap<String, usize>,
    /// Paths below `crate`, `self` or `super` outside tests, with their lines.
    pub paths: Vec<(Vec<String>, usize)>,
    test_lines: Vec<RangeInclusive<usize>>,
    modules: Vec<Module>,
}

/// A function or method outside tests.
#[derive(Clone, Debug)]
pub struct Function {
    /// Its name.
    pub name: String,
    /// The type whose `impl` or the trait that it stands in.
    pub owner: Option<String>,
    /// Line of its `fn`.
    pub line: usize,
    /// Lines from `fn` to the closing brace.
    pub lines: usize,
    /// Plain `pub`, not in an `impl` of a trait.
    pub public: bool,
    /// In an `impl` of a trait.
    pub of_trait: bool,
}

/// A `mod name;` whose body is another file.
struct Module {
    name: String,
    file: Option<String>,
    test: bool,
}

impl Function {
    /// `Type::name`, or the name of a free function.
    pub fn key(&self) -> String {
        match &self.owner {
            Some(owner) => format!("{owner}::{}", self.name),
            None => self.name.clone(),
        }
    }
}

impl SourceFile {
    /// Parses one file; `path` is relative to the workspace's root.
    pub fn parse(path: PathBuf, text: String) -> Result<Self> {
        let fail = || format!("cannot parse {}", path.display());
        let tokens: TokenStream = text
            .parse()
            .map_err(|error: LexError| anyhow!("{error}"))
            .with_context(fail)?;
        let syntax = syn::parse_file(&text).with_context(fail)?;
        let mut items = Items::default();
        items.visit_file(&syntax);
        let mut source = Self {
            package: package_of(&path),
            role: role_of(&path),
            functions: items.functions,
            types: items.types,
            words: BTreeMap::new(),
            paths: Vec::new(),
            test_lines: items.test_lines,
            modules: items.modules,
            path,
            text,
        };
        let mut words = BTreeMap::new();
        source.count_words(tokens.clone(), &items.imports, &mut words);
        source.words = words;
        let mut paths = Vec::new();
        find_paths(tokens, &mut paths);
        paths.retain(|(_, line)| !source.is_test_line(*line));
        source.paths = paths;
        Ok(source)
    }

    /// Whether the line belongs to a test, by an item's attributes.
    pub fn is_test_line(&self, line: usize) -> bool {
        self.test_lines.iter().any(|range| range.contains(&line))
    }

    /// Lines of product code and lines of tests; an example has neither.
    pub fn line_counts(&self) -> (usize, usize) {
        let all = self.text.lines().count();
        match self.role {
            Role::Test => (0, all),
            Role::Example => (0, 0),
            Role::Product => {
                let tests = (1..=all).filter(|line| self.is_test_line(*line)).count();
                (all - tests, tests)
            }
        }
    }

    /// The module of the file: `["daemon", "launch"]`.
    pub fn module(&self) -> Vec<String> {
        let mut parts: Vec<String> = self
            .path
            .with_extension("")
            .iter()
            .map(|part| part.to_string_lossy().into_owned())
            .collect();
        let below_src = parts.iter().position(|part| part == "src");
        parts.drain(..below_src.map_or(parts.len(), |at| at + 1));
        if parts
            .last()
            .is_some_and(|last| ["mod", "lib", "main"].contains(&last.as_str()))
        {
            parts.pop();
        }
        parts
    }

    fn count_words(
        &self,
        tokens: TokenStream,
        imports: &[RangeInclusive<usize>],
        words: &mut BTreeMap<String, usize>,
    ) {
        let mut defines = false;
        let mut assigns = false;
        for token in tokens {
            let line = token.span().start().line;
            let skipped =
                self.is_test_line(line) || imports.iter().any(|range| range.contains(&line));
            match token {
                TokenTree::Group(group) => {
                    self.count_words(group.stream(), imports, words);
                    (defines, assigns) = (false, false);
                }
                TokenTree::Ident(word) => {
                    let word = word.to_string();
                    let keyword = word == "fn";
                    if !skipped && !defines && !keyword {
                        *words.entry(word).or_default() += 1;
                    }
                    (defines, assigns) = (keyword, false);
                }
                // `#[serde(default = "a_function")]`
                TokenTree::Literal(literal) if assigns && !skipped => {
                    let text = literal.to_string();
                    let path = text.trim_matches('"');
                    if path.split("::").all(is_identifier) {
                        for word in path.split("::") {
                            *words.entry(word.to_owned()).or_default() += 1;
                        }
                    }
                    (defines, assigns) = (false, false);
                }
                TokenTree::Literal(_) => (defines, assigns) = (false, false),
                TokenTree::Punct(punct) => {
                    (defines, assigns) = (false, punct.as_char() == '=');
                }
            }
        }
    }
}

/// Reads and parses all Rust files of the workspace at `root`.
pub fn load(root: &Path) -> Result<Vec<SourceFile>> {
    let mut sources = Vec::new();
    let mut pending = vec![root.join("crates"), root.join("xtask"), root.join("fuzz")];
    while let Some(dir) = pending.pop() {
        let Ok(entries) = fs::read_dir(&dir) else {
            continue;
        };
        for entry in entries {
            let path = entry?.path();
            if path.is_dir() {
                if !path.ends_with("target") && !path.ends_with("corpus") {
                    pending.push(path);
                }
            } else if path.extension().is_some_and(|extension| extension == "rs") {
                let text = fs::read_to_string(&path)?;
                sources.push(SourceFile::parse(
                    path.strip_prefix(root)?.to_owned(),
                    text,
                )?);
            }
        }
    }
    sources.sort_by(|a, b| a.path.cmp(&b.path));
    mark_test_modules(&mut sources);
    Ok(sources)
}

/// Whether the text is one Rust identifier.
pub fn is_identifier(text: &str) -> bool {
    !text.is_empty()
        && !text.starts_with(|c: char| c.is_ascii_digit())
        && text.chars().all(|c| c.is_ascii_alphanumeric() || c == '_')
}

fn package_of(path: &Path) -> String {
    let mut parts = path.iter().map(|part| part.to_string_lossy().into_owned());
    match parts.next() {
        Some(first) if first == "crates" => parts.next().unwrap_or_default(),
        first => first.unwrap_or_default(),
    }
}

fn role_of(path: &Path) -> Role {
    let below_package = path
        .iter()
        .skip(usize::from(path.starts_with("crates")) + 1);
    let top = below_package.map(|part| part.to_string_lossy()).next();
    match top.as_deref() {
        _ if path.starts_with("fuzz") => Role::Test,
        Some("tests") => Role::Test,
        Some("examples") => Role::Example,
        _ => Role::Product,
    }
}

/// Marks the files that are bodies of test modules, and their own modules' files.
fn mark_test_modules(sources: &mut [SourceFile]) {
    let known: BTreeMap<PathBuf, usize> = sources
        .iter()
        .enumerate()
        .map(|(index, source)| (source.path.clone(), index))
        .collect();
    let mut tests: BTreeSet<usize> = BTreeSet::new();
    loop {
        let before = tests.len();
        for source in sources.iter() {
            for module in &source.modules {
                if !module.test && source.role != Role::Test {
                    continue;
                }
                tests.extend(
                    module_files(&source.path, module)
                        .iter()
                        .filter_map(|file| known.get(file).copied()),
                );
            }
        }
        for &index in &tests {
            sources[index].role = Role::Test;
        }
        if tests.len() == before {
            return;
        }
    }
}

fn module_files(declared_in: &Path, module: &Module) -> Vec<PathBuf> {
    let dir = declared_in.parent().unwrap_or(Path::new(""));
    if let Some(file) = &module.file {
        return vec![dir.join(file)];
    }
    let stem = declared_in.file_stem().unwrap_or_default();
    let own = ["mod", "lib", "main"].iter().any(|name| stem == *name);
    let dir = if own { dir.to_owned() } else { dir.join(stem) };
    vec![
        dir.join(format!("{}.rs", module.name)),
        dir.join(&module.name).join("mod.rs"),
    ]
}

/// Collects paths that start at `crate`, `self` or `super`, groups of imports expanded.
fn find_paths(tokens: TokenStream, found: &mut Vec<(Vec<String>, usize)>) {
    let tokens: Vec<TokenTree> = tokens.into_iter().collect();
    let mut at = 0;
    while at < tokens.len() {
        match &tokens[at] {
            TokenTree::Group(group) => {
                find_paths(group.stream(), found);
                at += 1;
            }
            TokenTree::Ident(word)
                if ["crate", "self", "super"].contains(&word.to_string().as_str())
                    && is_separator(&tokens[at + 1..]) =>
            {
                at += follow_path(&tokens[at..], Vec::new(), found);
            }
            _ => at += 1,
        }
    }
}

/// Follows a path from its first identifier; returns how many tokens it took.
fn follow_path(
    tokens: &[TokenTree],
    mut prefix: Vec<String>,
    found: &mut Vec<(Vec<String>, usize)>,
) -> usize {
    let mut at = 0;
    loop {
        match tokens.get(at) {
            Some(TokenTree::Ident(word)) => {
                let line = word.span().start().line;
                prefix.push(word.to_string());
                at += 1;
                if !is_separator(&tokens[at..]) {
                    found.push((prefix, line));
                    return at;
                }
                at += 2;
            }
            Some(TokenTree::Group(group)) if group.delimiter() == Delimiter::Brace => {
                let parts: Vec<TokenTree> = group.stream().into_iter().collect();
                for part in parts.split(|token| is_punct(token, ',')) {
                    follow_path(part, prefix.clone(), found);
                }
                return at + 1;
            }
            // `*`, or generic arguments, which may hold paths of their own.
            Some(other) => {
                if !prefix.is_empty() {
                    found.push((prefix, other.span().start().line));
                }
                return at.max(1);
            }
            None => return at.max(1),
        }
    }
}

fn is_separator(tokens: &[TokenTree]) -> bool {
    matches!(tokens, [first, second, ..] if is_punct(first, ':') && is_punct(second, ':'))
}

fn is_punct(token: &TokenTree, character: char) -> bool {
    matches!(token, TokenTree::Punct(punct) if punct.as_char() == character)
}

/// What one pass over a file's syntax finds.
#[derive(Default)]
struct Items {
    functions: Vec<Function>,
    types: Vec<(String, usize)>,
    test_lines: Vec<RangeInclusive<usize>>,
    imports: Vec<RangeInclusive<usize>>,
    modules: Vec<Module>,
    owner: Option<String>,
    of_trait: bool,
}

impl Items {
    fn add_function(&mut self, signature: &syn::Signature, end: usize, public: bool) {
        let line = signature.fn_token.span.start().line;
        self.functions.push(Function {
            name: signature.ident.to_string(),
            owner: self.owner.clone(),
            line,
            lines: end + 1 - line,
            public: public && !self.of_trait,
            of_trait: self.of_trait,
        });
    }

    fn within(&mut self, owner: Option<String>, of_trait: bool, visit: impl FnOnce(&mut Self)) {
        let outer = (self.owner.take(), self.of_trait);
        (self.owner, self.of_trait) = (owner, of_trait);
        visit(self);
        (self.owner, self.of_trait) = outer;
    }
}

impl<'ast> Visit<'ast> for Items {
    fn visit_item(&mut self, item: &'ast syn::Item) {
        let attributes = attributes_of(item);
        let test = attributes.iter().any(is_test);
        if test {
            self.test_lines.push(lines_of(item.span()));
        }
        match item {
            syn::Item::Mod(module) if module.content.is_none() => {
                self.modules.push(Module {
                    name: module.ident.to_string(),
                    file: attributes.iter().find_map(file_of),
                    test,
                });
            }
            syn::Item::Use(_) => self.imports.push(lines_of(item.span())),
            _ => {}
        }
        if test {
            return;
        }
        let named = match item {
            syn::Item::Struct(item) => Some(&item.ident),
            syn::Item::Enum(item) => Some(&item.ident),
            syn::Item::Union(item) => Some(&item.ident),
            syn::Item::Trait(item) => Some(&item.ident),
            syn::Item::Type(item) => Some(&item.ident),
            _ => None,
        };
        if let Some(name) = named {
            self.types
                .push((name.to_string(), name.span().start().line));
        }
        match item {
            syn::Item::Fn(function) => {
                let public = matches!(function.vis, syn::Visibility::Public(_));
                let end = function.block.span().end().line;
                self.add_function(&function.sig, end, public);
                self.within(None, false, |items| visit::visit_item(items, item));
            }
            syn::Item::Impl(block) => {
                let of_trait = block.trait_.is_some();
                let owner = type_name(&block.self_ty);
                self.within(owner, of_trait, |items| visit::visit_item(items, item));
            }
            syn::Item::Trait(block) => {
                let owner = Some(block.ident.to_string());
                self.within(owner, true, |items| visit::visit_item(items, item));
            }
            _ => visit::visit_item(self, item),
        }
    }

    fn visit_impl_item_fn(&mut self, function: &'ast syn::ImplItemFn) {
        if function.attrs.iter().any(is_test) {
            self.test_lines.push(lines_of(function.span()));
            return;
        }
        let public = matches!(function.vis, syn::Visibility::Public(_));
        self.add_function(&function.sig, function.block.span().end().line, public);
        visit::visit_impl_item_fn(self, function);
    }

    fn visit_trait_item_fn(&mut self, function: &'ast syn::TraitItemFn) {
        if let Some(body) = &function.default {
            self.add_function(&function.sig, body.span().end().line, false);
        }
        visit::visit_trait_item_fn(self, function);
    }
}

fn lines_of(span: proc_macro2::Span) -> RangeInclusive<usize> {
    span.start().line..=span.end().line
}

fn type_name(of: &syn::Type) -> Option<String> {
    match of {
        syn::Type::Path(path) => Some(path.path.segments.last()?.ident.to_string()),
        syn::Type::Reference(reference) => type_name(&reference.elem),
        _ => None,
    }
}

fn attributes_of(item: &syn::Item) -> &[syn::Attribute] {
    match item {
        syn::Item::Const(item) => &item.attrs,
        syn::Item::Enum(item) => &item.attrs,
        syn::Item::Fn(item) => &item.attrs,
        syn::Item::Impl(item) => &item.attrs,
        syn::Item::Macro(item) => &item.attrs,
        syn::Item::Mod(item) => &item.attrs,
        syn::Item::Static(item) => &item.attrs,
        syn::Item::Struct(item) => &item.attrs,
        syn::Item::Trait(item) => &item.attrs,
        syn::Item::Type(item) => &item.attrs,
        syn::Item::Use(item) => &item.attrs,
        _ => &[],
    }
}

/// `#[test]`, `#[tokio::test]` and `#[cfg(test)]`, also within `any` and `all`.
fn is_test(attribute: &syn::Attribute) -> bool {
    let path = attribute.path();
    if path
        .segments
        .last()
        .is_some_and(|last| last.ident == "test")
    {
        return true;
    }
    path.is_ident("cfg")
        && matches!(&attribute.meta, syn::Meta::List(list) if names_test(list.tokens.clone()))
}

fn names_test(tokens: TokenStream) -> bool {
    let mut negated = false;
    for token in tokens {
        match token {
            TokenTree::Ident(word) if word == "test" => return true,
            TokenTree::Ident(word) => negated = word == "not",
            TokenTree::Group(group) if !negated && names_test(group.stream()) => return true,
            _ => {}
        }
    }
    false
}

/// The file of `#[path = "file"]`.
fn file_of(attribute: &syn::Attribute) -> Option<String> {
    let syn::Meta::NameValue(pair) = &attribute.meta else {
        return None;
    };
    match &pair.value {
        syn::Expr::Lit(value) if pair.path.is_ident("path") => match &value.lit {
            syn::Lit::Str(file) => Some(file.value()),
            _ => None,
        },
        _ => None,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn source(path: &str, text: &str) -> SourceFile {
        SourceFile::parse(path.into(), text.to_owned()).unwrap()
    }

    #[test]
    fn tests_are_told_from_product_code() {
        let text = "\
fn product() {}
#[cfg(test)]
mod tests {
    fn helper() {}
}
#[cfg(not(test))]
fn also_product() {}
";
        let parsed = source("crates/a/src/lib.rs", text);
        assert_eq!(parsed.line_counts(), (3, 4));
        let names: Vec<_> = parsed.functions.iter().map(|f| f.name.as_str()).collect();
        assert_eq!(names, ["product", "also_product"]);
    }

    #[test]
    fn files_of_test_modules_are_tests() {
        let mut sources = vec![
            source(
                "crates/a/src/b.rs",
                "#[cfg(test)] #[path = \"odd.rs\"] mod c; #[cfg(test)] mod d;",
            ),
            source("crates/a/src/b/d.rs", "mod e;"),
            source("crates/a/src/b/d/e.rs", ""),
            source("crates/a/src/odd.rs", ""),
            source("crates/a/src/other.rs", ""),
        ];
        mark_test_modules(&mut sources);
        let roles: Vec<Role> = sources.iter().map(|source| source.role).collect();
        let expected = [
            Role::Product,
            Role::Test,
            Role::Test,
            Role::Test,
            Role::Product,
        ];
        assert_eq!(roles, expected);
    }

    #[test]
    fn paths_are_expanded_and_words_counted() {
        let text = "\
use crate::daemon::{vm::Vm, memory, Host as It};
pub fn called() {}
fn other() { called(); super::up::go::<crate::x::Y>(); }
#[serde(default = \"by_name\")]
struct A;
/// called by_name
#[test]
fn test() { other(); crate::hidden::x(); }
";
        let parsed = source("crates/a/src/b/c.rs", text);
        let paths: Vec<String> = parsed
            .paths
            .iter()
            .map(|(path, _)| path.join("::"))
            .collect();
        let expected = [
            "crate::daemon::vm::Vm",
            "crate::daemon::memory",
            "crate::daemon::Host",
            "super::up::go",
            "crate::x::Y",
        ];
        assert_eq!(paths, expected);
        assert_eq!(parsed.words.get("called"), Some(&1));
        assert_eq!(parsed.words.get("by_name"), Some(&1));
        assert_eq!(parsed.words.get("other"), None);
        assert_eq!(parsed.module(), ["b", "c"]);
    }
}
