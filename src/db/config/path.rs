//! What a database's path may look like: a path, or a URL that says one.

use std::path::{Path, PathBuf};

use crate::db::config::Config;
use crate::error::{Error, Result, Unsupported, without_user};

/// How SQLite, and others, name a database that is in no file.
const IN_MEMORY: &str = ":memory:";
/// Options of a URL that say what is done here anyway.
const AS_EVER: [&str; 2] = ["mode=rwc", "mode=rw"];
/// Some programs decode it, and others do not.
const PERCENT: &str = "with a percent sign, which can be read in two ways";

impl Config {
    /// The path of the database file.
    pub(in crate::db) fn file(&self) -> Result<PathBuf> {
        of_file(&self.path)
            .map_err(|reason| {
                let path =
                    self.path.to_str().map_or_else(|| self.path.clone(), |text| without_user(text).into());
                Error::Unsupported { path, reason }
            })
            .map(Path::to_path_buf)
    }
}

/// The path in it. A text that other programs take for a URL is none by itself: as a path it would
/// be a file of that very name.
fn of_file(path: &Path) -> Result<&Path, Unsupported> {
    let Some(text) = path.to_str() else { return Ok(path) };
    if text.is_empty() {
        return Err(Unsupported::NotAFile);
    }
    if text.starts_with(IN_MEMORY) {
        return Err(Unsupported::InMemory);
    }
    let Some((scheme, rest)) = text.split_once(':') else { return Ok(path) };
    match scheme {
        "sqlite" | "file" => {}
        scheme if rest.starts_with("//") && is_scheme(scheme) => {
            return Err(Unsupported::Url("of no SQLite database"));
        }
        _ => return Ok(path),
    }
    let (place, options) = rest.split_once('?').map_or((rest, None), |(place, all)| (place, Some(all)));
    let place = match (scheme, place.strip_prefix("//")) {
        // There a host comes first, which is this one.
        ("file", Some(of_host)) => {
            let path = of_host.strip_prefix("localhost").unwrap_or(of_host);
            if !path.starts_with('/') {
                return Err(Unsupported::Url("with a host: `file:///data/app.db` has none"));
            }
            path
        }
        (_, after) => after.unwrap_or(place),
    };
    let mut options = options.into_iter().flat_map(|all| all.split('&'));
    if place.trim_start_matches('/') == IN_MEMORY || options.clone().any(|option| option == "mode=memory") {
        return Err(Unsupported::InMemory);
    }
    if options.any(|option| !option.is_empty() && !AS_EVER.contains(&option)) {
        return Err(Unsupported::Url("with options that are none here"));
    }
    if place.contains('%') {
        return Err(Unsupported::Url(PERCENT));
    }
    if place.is_empty() { Err(Unsupported::NotAFile) } else { Ok(Path::new(place)) }
}

fn is_scheme(text: &str) -> bool {
    text.starts_with(|c: char| c.is_ascii_alphabetic())
        && text.chars().all(|c| c.is_ascii_alphanumeric() || "+-".contains(c))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_url_that_says_a_file_is_that_file() {
        for (text, file) in [
            ("app.db", "app.db"),
            ("/data/app.db", "/data/app.db"),
            ("sqlite:app.db", "app.db"),
            ("sqlite://data/app.db", "data/app.db"),
            ("sqlite:///data/app.db", "/data/app.db"),
            ("sqlite://app.db?mode=rwc", "app.db"),
            ("file:app.db", "app.db"),
            ("file:/data/app.db?mode=rw", "/data/app.db"),
            ("file:///data/app.db", "/data/app.db"),
            ("file://localhost/data/app.db", "/data/app.db"),
            // Files that are called so.
            ("./sqlite:app.db", "./sqlite:app.db"),
            ("a:b.db", "a:b.db"),
            ("data/x://y", "data/x://y"),
        ] {
            assert_eq!(of_file(Path::new(text)), Ok(Path::new(file)), "{text}");
        }
        assert_eq!(Config::new("sqlite://data/notes.db?mode=rwc").database_name().unwrap(), "notes");
    }

    #[test]
    fn what_is_no_file_is_refused_with_what_to_write() {
        let refused = |text: &str| match Config::new(text).check() {
            Err(Error::Unsupported { reason, .. }) => reason,
            other => panic!("{text}: {other:?}"),
        };
        for text in [
            ":memory:",
            "sqlite::memory:",
            "sqlite://:memory:",
            "file::memory:?cache=shared",
            "file:app?mode=memory&cache=shared",
        ] {
            assert_eq!(refused(text), Unsupported::InMemory, "{text}");
        }
        assert!(Unsupported::InMemory.to_string().contains("data/app.db"));
        for text in ["", "sqlite:", "sqlite://", "file:", "sqlite:?mode=rwc"] {
            assert_eq!(refused(text), Unsupported::NotAFile, "{text}");
        }
        for (text, why) in [
            ("file:app.db?mode=ro", "options"),
            ("sqlite://app.db?cache=shared", "options"),
            ("file://host/app.db", "host"),
            ("file://app.db", "host"),
            ("sqlite://my%20app.db", "percent"),
            ("postgres://host/app", "no SQLite"),
        ] {
            let said = refused(text).to_string();
            assert!(said.contains(why) && said.contains("data/app.db"), "{text}: {said}");
        }
    }
}
