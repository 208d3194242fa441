//! Errors with their causes, for logs and messages of one line.

use std::error::Error;

/// An error and its causes in one line, outermost first.
pub fn error_chain(error: &dyn Error) -> String {
    let mut text = error.to_string();
    let mut source = error.source();
    while let Some(cause) = source {
        let words = cause.to_string();
        // Transparent wrappers repeat their cause.
        if !text.ends_with(&words) {
            text.push_str(": ");
            text.push_str(&words);
        }
        source = cause.source();
    }
    text
}

#[cfg(test)]
mod tests {
    use std::fmt;

    use super::*;

    #[derive(Debug)]
    struct Layer(&'static str, Option<Box<Layer>>);

    impl fmt::Display for Layer {
        fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
            f.write_str(self.0)
        }
    }

    impl Error for Layer {
        fn source(&self) -> Option<&(dyn Error + 'static)> {
            self.1.as_deref().map(|cause| cause as _)
        }
    }

    #[test]
    fn causes_follow_and_repetitions_are_left_out() {
        let cause = Layer("no such file", None);
        let wrapper = Layer("no such file", Some(Box::new(cause)));
        let outer = Layer("reading the lock", Some(Box::new(wrapper)));
        assert_eq!(error_chain(&outer), "reading the lock: no such file");
    }
}
