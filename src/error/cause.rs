//! Why something has stopped.

use std::fmt;

use crate::error::Blame;

/// Why replication has stopped, or why the outcome of a write is not known: in words, and who must
/// act.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct Cause {
    text: String,
    blame: Blame,
}

impl Cause {
    pub(crate) fn new(text: impl Into<String>, blame: Blame) -> Cause {
        Cause { text: text.into(), blame }
    }

    /// The same, said with what failed because of it: `what` comes before the text.
    pub(crate) fn of(self, what: &str) -> Cause {
        Cause { text: format!("{what}: {}", self.text), blame: self.blame }
    }

    /// What happened.
    pub fn text(&self) -> &str {
        &self.text
    }

    /// Who must act.
    pub fn blame(&self) -> Blame {
        self.blame
    }
}

impl fmt::Display for Cause {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.text)
    }
}
