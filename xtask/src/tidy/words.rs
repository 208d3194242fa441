//! Words that are not used here any more, each with the field's term for it: in comments,
//! pages, identifiers and names of files. Strings are left alone, since formats and the
//! API's fields stay.

use std::collections::BTreeMap;

use super::allowances::Violation;
use super::sources::SourceFile;

/// One violation for each word that occurs; `terms` maps a lower-case word or phrase to
/// what to say instead.
pub fn outdated(
    sources: &[SourceFile],
    pages: &[(&str, String)],
    terms: &BTreeMap<String, String>,
) -> Vec<Violation> {
    let mut places: BTreeMap<&str, Vec<String>> = BTreeMap::new();
    let mut find = |place: String, text: &str| {
        for word in terms.keys() {
            if contains_word(text, word) {
                places.entry(word).or_default().push(place.clone());
            }
        }
    };
    for source in sources {
        let path = source.path.display();
        find(path.to_string(), &in_words(&path.to_string()));
        for (number, line) in source.text.lines().enumerate() {
            let (code, comment) = split_comment(line);
            let text = format!("{} {}", in_words(&without_strings(code)), in_words(comment));
            find(format!("{path}:{}", number + 1), &text);
        }
    }
    for (page, text) in pages {
        for (number, line) in text.lines().enumerate() {
            find(format!("{page}:{}", number + 1), &in_words(line));
        }
    }
    let shown = |places: &[String]| {
        places
            .iter()
            .take(5)
            .cloned()
            .collect::<Vec<_>>()
            .join(", ")
    };
    places
        .into_iter()
        .map(|(word, places)| Violation {
            key: word.to_owned(),
            amount: places.len(),
            place: places[0].clone(),
            text: format!(
                "\"{word}\" in {} place(s) ({}): say \"{}\"",
                places.len(),
                shown(&places),
                terms[word]
            ),
        })
        .collect()
}

/// The text in lower case, identifiers taken apart into their words.
fn in_words(text: &str) -> String {
    let mut words = String::with_capacity(text.len() + 8);
    let mut lower_before = false;
    for character in text.chars() {
        if character == '_' {
            words.push(' ');
        } else {
            if character.is_uppercase() && lower_before {
                words.push(' ');
            }
            words.extend(character.to_lowercase());
        }
        lower_before = character.is_lowercase();
    }
    words
}

/// A line's code and its comment; the `//` of a URL begins none.
fn split_comment(line: &str) -> (&str, &str) {
    let mut from = 0;
    while let Some(at) = line[from..].find("//") {
        let at = from + at;
        if !line[..at].ends_with(':') {
            return line.split_at(at);
        }
        from = at + 2;
    }
    (line, "")
}

fn without_strings(code: &str) -> String {
    code.split('"').step_by(2).collect::<Vec<_>>().join("\"\"")
}

/// Whether `word` stands in `text` between characters that are no part of a word.
fn contains_word(text: &str, word: &str) -> bool {
    text.match_indices(word).any(|(at, _)| {
        !text[..at].ends_with(char::is_alphanumeric)
            && !text[at + word.len()..].starts_with(char::is_alphanumeric)
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_word_is_found_wherever_people_read_it() {
        let terms = [("tell off", "withdraw"), ("lesson", "training set")];
        let terms = terms.map(|(word, instead)| (word.to_owned(), instead.to_owned()));
        let text = "\
//! Tell off.
struct LessonPlan { a_lesson: u8 } // http://lessons
fn lessons() { tell_off(\"a lesson\"); }
";
        let source = SourceFile::parse("crates/a/src/lesson.rs".into(), text.to_owned());
        let pages = [("P.md", "One\nLesson, said he.".to_owned())];
        let found = outdated(&[source.unwrap()], &pages, &terms.into());
        let amounts: Vec<_> = found
            .iter()
            .map(|found| (found.key.as_str(), found.amount))
            .collect();
        assert_eq!(amounts, [("lesson", 3), ("tell off", 2)]);
        assert_eq!(found[1].place, "crates/a/src/lesson.rs:1");
        assert!(found[0].text.contains("P.md:2"), "{}", found[0].text);
        assert_eq!(split_comment("let a = \"http://b\"; // c").1, "// c");
    }
}
