//! What the constructors of the words refuse with.

/// A text, or a number, is not of the form that it should have.
///
/// The caller made it or passed it on: nothing happened, and the same text is refused again.
///
/// ```
/// use replite::Txid;
///
/// let refused = "17".parse::<Txid>().unwrap_err();
/// assert_eq!((refused.what(), refused.text()), ("transaction id", "17"));
/// ```
#[derive(Clone, PartialEq, Eq, Debug, thiserror::Error)]
#[error("not a valid {what}: {text:?}")]
pub struct ParseError {
    what: &'static str,
    text: String,
}

impl ParseError {
    /// At most so many characters of a refused text are kept.
    const CHARS_MAX: usize = 128;

    pub(crate) fn new(what: &'static str, text: &str) -> ParseError {
        ParseError { what, text: text.chars().take(Self::CHARS_MAX).collect() }
    }

    /// What the text should have been.
    pub fn what(&self) -> &'static str {
        self.what
    }

    /// The text, cut short.
    pub fn text(&self) -> &str {
        &self.text
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_refused_text_is_shown_cut_short() {
        let refused = ParseError::new("epoch", &"ä".repeat(1000));
        assert_eq!((refused.what(), refused.text()), ("epoch", "ä".repeat(128).as_str()));
        assert_eq!(ParseError::new("epoch", "a\n").to_string(), r#"not a valid epoch: "a\n""#);
    }
}
