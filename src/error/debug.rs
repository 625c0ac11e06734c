//! An error as `Debug` shows it: what `main` prints.

use std::error::Error as StdError;
use std::fmt;

use crate::error::Error;

/// The sentence of `Display`, and the causes that are not in it yet.
impl fmt::Debug for Error {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let mut said = self.to_string();
        f.write_str(&said)?;
        let mut cause = self.source();
        while let Some(error) = cause {
            let text = error.to_string();
            if !said.contains(&text) {
                write!(f, "; because: {text}")?;
                said.push_str(&text);
            }
            cause = error.source();
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[derive(Debug, thiserror::Error)]
    #[error("step 3 failed")]
    struct Step(#[source] std::io::Error);

    #[test]
    fn what_main_prints_is_a_sentence_with_its_causes() {
        let config = Error::Config("a secret is missing".into());
        assert_eq!(format!("{config:?}"), "configuration: a secret is missing");
        let io = Error::io("open", "/data/app.db")(std::io::Error::other("it is away"));
        assert_eq!(format!("{io:?}"), "open /data/app.db: it is away");
        let deep = Error::Migration(Step(std::io::Error::other("no room")).into());
        assert_eq!(format!("{deep:?}"), "migration: step 3 failed; because: no room");
        let boxed: Box<dyn StdError> = Box::new(Error::Reentrant);
        assert_eq!(format!("{boxed:?}"), Error::Reentrant.to_string());
    }
}
