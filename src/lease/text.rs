//! A lease as one text, for command lines and environment variables.

use std::path::Path;
use std::str::FromStr;

use crate::error::{Error, Result};
use crate::lease::{Directory, Lease};

/// Longest text, in bytes.
const TEXT_MAX_BYTES: usize = 8192;
/// What a text can be.
const FORMS: &str = "members:URL,URL,URL, directory:PATH or a path, s3://, gs:// or az:// with \
                     bucket/prefix, etcd:// or etcds:// with host:port,host:port/key";
/// Words that are no paths, because they are half of a text.
const HALVES: [&str; 8] = ["members", "directory", "s3", "gs", "az", "azure", "etcd", "etcds"];

/// Reads one text that says where a lease's record is:
///
/// | text | lease | feature |
/// |---|---|---|
/// | `members:replite://a:7000,replite://b:7000,replite://c:7000` | `lease::Members` | `members` |
/// | `directory:/var/lib/app/lease`, or a path alone | [`Directory`] | |
/// | `s3://bucket/prefix`, `gs://..`, `az://..` | `lease::ObjectStore` | `object-store` |
/// | `etcd://host:port,host:port/key`; `etcds://` for TLS | `lease::Etcd` | `etcd` |
///
/// A path alone begins with `/` or `.`, or has no colon. A relative one is taken from where the
/// process is now.
///
/// Passwords and keys are never in the text, which other users of the machine may see. An object
/// store finds its own in the environment. For etcd these variables of its command `etcdctl` count:
/// `ETCDCTL_USER` (`name:password`, or the name alone with `ETCDCTL_PASSWORD`), `ETCDCTL_CACERT`,
/// `ETCDCTL_CERT` and `ETCDCTL_KEY`.
///
/// ```
/// use replite::{Config, lease::Lease};
///
/// # fn main() -> replite::Result<()> {
/// let text = std::env::var("APP_LEASE").unwrap_or_else(|_| "directory:/var/lib/app/lease".into());
/// let config = Config::new("data/app.db").lease(text.parse::<Lease>()?);
/// # drop(config);
/// # Ok(())
/// # }
/// ```
///
/// # Errors
/// [`Error::Config`] when the text has none of these forms, when what it names is wrong, and for a
/// lease whose feature is not in this build: it names the feature.
impl FromStr for Lease {
    type Err = Error;

    fn from_str(text: &str) -> Result<Lease> {
        read(text.trim(), &|name| std::env::var(name).ok().filter(|value| !value.is_empty()))
    }
}

/// With what the environment says.
fn read(text: &str, environment: &dyn Fn(&str) -> Option<String>) -> Result<Lease> {
    // The text is not repeated: who puts a password into it should not find it in a log.
    let bad = |why: &str| Error::Config(format!("a lease as text: {why}; it can be {FORMS}"));
    if text.is_empty() {
        return Err(bad("it is empty"));
    }
    if text.len() > TEXT_MAX_BYTES {
        return Err(bad("it is too long"));
    }
    let path = |path: &str| Ok(Directory::new(Path::new(path)).into());
    if text.starts_with(['/', '.']) {
        return path(text);
    }
    if HALVES.contains(&text) {
        return Err(bad("it says which kind, and not where"));
    }
    let Some((kind, rest)) = text.split_once(':') else { return path(text) };
    match (kind, rest) {
        (_, "") => Err(bad("nothing comes after its colon")),
        ("directory", rest) => path(rest),
        ("members", list) => members(list),
        ("s3" | "gs" | "az" | "azure", rest) if rest.starts_with("//") => object_store(text),
        ("etcd" | "etcds", rest) if rest.starts_with("//") => etcd(text, environment),
        // The drive of a path.
        (drive, _) if cfg!(windows) && drive.len() == 1 => path(text),
        _ => Err(bad("it is none of the forms")),
    }
}

#[cfg(feature = "members")]
fn members(list: &str) -> Result<Lease> {
    if list.contains('@') {
        return Err(Error::Config("a URL of a member can't carry a user name".into()));
    }
    let members = crate::lease::Members::new(list.split(',').map(str::trim));
    members.list()?;
    Ok(members.into())
}

#[cfg(not(feature = "members"))]
fn members(_: &str) -> Result<Lease> {
    Err(absent("members"))
}

#[cfg(feature = "object-store")]
fn object_store(url: &str) -> Result<Lease> {
    Ok(crate::lease::ObjectStore::new(url)?.into())
}

#[cfg(not(feature = "object-store"))]
fn object_store(_: &str) -> Result<Lease> {
    Err(absent("object-store"))
}

#[cfg(feature = "etcd")]
fn etcd(url: &str, environment: &dyn Fn(&str) -> Option<String>) -> Result<Lease> {
    let mut etcd = crate::lease::Etcd::from_url(url)?;
    if let Some(user) = environment("ETCDCTL_USER") {
        let (name, password) = match (environment("ETCDCTL_PASSWORD"), user.split_once(':')) {
            (Some(password), _) => (user, password),
            (None, Some((name, password))) => (name.to_owned(), password.to_owned()),
            (None, None) => {
                return Err(Error::Config("ETCDCTL_USER is there, and no password of that user".into()));
            }
        };
        etcd = etcd.user(name, password);
    }
    if let Some(roots) = environment("ETCDCTL_CACERT") {
        etcd = etcd.roots(roots);
    }
    match (environment("ETCDCTL_CERT"), environment("ETCDCTL_KEY")) {
        (Some(chain), Some(key)) => etcd = etcd.client_certificate(chain, key),
        (None, None) => {}
        _ => return Err(Error::Config("ETCDCTL_CERT and ETCDCTL_KEY go together".into())),
    }
    Ok(etcd.into())
}

#[cfg(not(feature = "etcd"))]
fn etcd(_: &str, _: &dyn Fn(&str) -> Option<String>) -> Result<Lease> {
    Err(absent("etcd"))
}

#[cfg(not(all(feature = "etcd", feature = "members", feature = "object-store")))]
fn absent(feature: &str) -> Error {
    Error::Config(format!("this lease needs the feature `{feature}`, which is not in this build"))
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::lease::LeaseKind;

    fn of(text: &str) -> Result<Lease> {
        read(text, &|_| None)
    }

    #[track_caller]
    fn refused(lease: Result<Lease>) -> String {
        match lease {
            Err(Error::Config(why)) => why,
            other => panic!("{other:?}"),
        }
    }

    #[track_caller]
    fn store(lease: Result<Lease>) -> String {
        match lease.unwrap().0 {
            LeaseKind::Store(store) => format!("{store:?}"),
            other => panic!("{other:?}"),
        }
    }

    #[test]
    fn a_directory_is_a_path_with_or_without_its_word() {
        let here = std::env::current_dir().unwrap();
        for (text, path) in [
            ("/var/lib/lease", "/var/lib/lease".into()),
            ("directory:/var/lib/lease", "/var/lib/lease".into()),
            ("lease", here.join("lease")),
            ("directory:members", here.join("members")),
            ("./a:b", here.join("a:b")),
            ("/a:b@c", "/a:b@c".into()),
        ] {
            assert!(store(of(text)).contains(&format!("{path:?}")), "{text}");
        }
        // As it comes from a command line.
        assert!(store("  /var/lib/lease\n".parse()).contains("\"/var/lib/lease\""));
    }

    #[test]
    fn what_is_no_lease_is_refused_and_not_repeated() {
        for text in ["", "members", "etcd", "s3", "directory:", "members:", "s3:x", "etcd:x", "http://a:80/x"]
        {
            assert!(refused(of(text)).contains("members:URL"), "{text}");
        }
        for text in [
            "redis://app:hunter2@h/0",
            "members:http://app:hunter2@a:1",
            "s3://app:hunter2@bucket/x",
            "etcd://app:hunter2@h:1/key",
            "etcds://app:hunter2@h:1/key",
            "hunter2:x",
        ] {
            let said = refused(of(text));
            assert!(!said.contains("hunter2"), "{said}");
        }
        assert!(refused(of(&"x".repeat(TEXT_MAX_BYTES + 1))).contains("too long"));
    }

    #[test]
    fn a_lease_that_is_not_in_the_build_names_its_feature() {
        for (text, feature, built) in [
            ("members:http://a", "`members`", cfg!(feature = "members")),
            ("s3://bucket/x", "`object-store`", cfg!(feature = "object-store")),
            ("etcd://a:1/key", "`etcd`", cfg!(feature = "etcd")),
        ] {
            let named = of(text).is_err_and(|error| error.to_string().contains(feature));
            assert_eq!(named, !built, "{text}");
        }
    }

    #[cfg(feature = "members")]
    #[test]
    fn members_are_urls_with_commas() {
        let lease = of("members:replite://b:2, http://a");
        let Ok(Lease(LeaseKind::Members(members))) = lease else { panic!("{lease:?}") };
        assert_eq!(members.list().unwrap(), ["http://a:80/_replite", "replite://b:2"]);
        for bad in ["members:a:1", "members:http://a,", "members:http://a,http://a"] {
            refused(of(bad));
        }
    }

    #[cfg(feature = "etcd")]
    #[test]
    fn etcd_takes_its_user_and_its_files_from_the_environment() {
        let with = |variables: &[(&str, &str)]| {
            let variables: Vec<(String, String)> =
                variables.iter().map(|(name, value)| (name.to_string(), value.to_string())).collect();
            read("etcd://a:1,b:2/app/lease", &move |name| {
                variables.iter().find(|(known, _)| known == name).map(|(_, value)| value.clone())
            })
        };
        let plain = store(with(&[]));
        assert!(plain.contains("http://b:2") && plain.contains("app/lease"), "{plain}");
        for variables in [
            &[("ETCDCTL_USER", "app:hunter2")][..],
            &[("ETCDCTL_USER", "app"), ("ETCDCTL_PASSWORD", "hunter2")],
        ] {
            let shown = store(with(variables));
            assert!(shown.contains("Some(\"app\")") && !shown.contains("hunter2"), "{shown}");
        }
        assert!(refused(with(&[("ETCDCTL_USER", "hunter2")])).contains("no password"));
        assert!(refused(with(&[("ETCDCTL_KEY", "k.pem")])).contains("go together"));
        store(with(&[("ETCDCTL_KEY", "k.pem"), ("ETCDCTL_CERT", "c.pem"), ("ETCDCTL_CACERT", "r.pem")]));
    }
}
