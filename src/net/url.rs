//! The URL of a replication endpoint.

use std::fmt;
use std::net::Ipv6Addr;

use crate::error::{Error, Result, without_user};

/// The path of the replication endpoint when the URL has none.
const DEFAULT_PATH: &str = "/_replite";
/// The port of `http`.
const DEFAULT_PORT: u16 = 80;
/// Longest URL, in bytes.
const URL_MAX_BYTES: usize = 2048;

/// What is at a replication endpoint's port.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(crate) enum Scheme {
    /// `replite`: a node's own listener, TLS from the first byte.
    Replite,
    /// `http`: an HTTP server.
    Http,
}

/// Where a replication endpoint is: a host, a port and a path. The text form is its normalised URL.
#[derive(Clone, PartialEq, Eq, Debug)]
pub(crate) struct Endpoint {
    pub(crate) scheme: Scheme,
    /// Without the brackets of an IPv6 address.
    pub(crate) host: String,
    pub(crate) port: u16,
    /// Begins with a slash and does not end with one. Empty where there is no HTTP server.
    pub(crate) path: String,
}

impl Endpoint {
    /// Reads a URL; an empty path means `/_replite`.
    ///
    /// # Errors
    /// [`Error::Config`] when it is neither a plain `http://host[:port][/path]` nor a
    /// `replite://host:port`.
    pub(crate) fn parse(url: &str) -> Result<Endpoint> {
        let bad = |why: &str| {
            let shown: String = without_user(url).chars().take(128).collect();
            Error::Config(format!("replication URL {shown:?}: {why}"))
        };
        if url.len() > URL_MAX_BYTES {
            return Err(bad("too long"));
        }
        let uri: http::Uri = url.trim().parse().map_err(|_| bad("not a URL"))?;
        let scheme = match uri.scheme_str() {
            Some("http") => Scheme::Http,
            Some("replite") => Scheme::Replite,
            Some("https") => {
                return Err(bad(
                    "what goes over http:// is encrypted inside of it; https:// is not supported",
                ));
            }
            _ => return Err(bad("it must begin with replite:// or http://")),
        };
        let authority = uri.authority().ok_or_else(|| bad("it has no host"))?;
        if authority.as_str().contains('@') {
            return Err(bad("it can't carry a user name"));
        }
        if uri.query().is_some() {
            return Err(bad("it can't carry a query"));
        }
        let host = authority.host();
        let inner = host.strip_prefix('[').and_then(|h| h.strip_suffix(']'));
        if inner.is_some_and(|address| address.parse::<Ipv6Addr>().is_err()) {
            return Err(bad("in its brackets is no IPv6 address"));
        }
        let bare = inner.unwrap_or(host);
        if bare.is_empty() {
            return Err(bad("it has no host"));
        }
        if bare.contains(['[', ']']) {
            return Err(bad("its host is neither a name nor an address"));
        }
        if authority.as_str() != host && authority.port_u16().is_none() {
            return Err(bad("its port is not a number from 1 to 65535"));
        }
        let port = match (authority.port_u16(), scheme) {
            (Some(port), _) => port,
            (None, Scheme::Http) => DEFAULT_PORT,
            (None, Scheme::Replite) => return Err(bad("it has no port")),
        };
        if port == 0 {
            return Err(bad("its port is not a number from 1 to 65535"));
        }
        let path = match (uri.path().trim_end_matches('/'), scheme) {
            ("", Scheme::Http) => DEFAULT_PATH,
            ("", Scheme::Replite) => "",
            (_, Scheme::Replite) => return Err(bad("a replite:// URL has no path")),
            (path, Scheme::Http) => path,
        };
        Ok(Endpoint { scheme, host: bare.to_owned(), port, path: path.to_owned() })
    }

    /// Host and port as a URL carries them.
    pub(crate) fn authority(&self) -> String {
        if self.host.contains(':') {
            format!("[{}]:{}", self.host, self.port)
        } else {
            format!("{}:{}", self.host, self.port)
        }
    }
}

impl fmt::Display for Endpoint {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let scheme = match self.scheme {
            Scheme::Replite => "replite",
            Scheme::Http => "http",
        };
        write!(f, "{scheme}://{}{}", self.authority(), self.path)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn urls_are_normalised() {
        let text = |url: &str| Endpoint::parse(url).unwrap().to_string();
        assert_eq!(text("http://10.0.0.1:8081"), "http://10.0.0.1:8081/_replite");
        assert_eq!(text("http://10.0.0.1:8081/"), "http://10.0.0.1:8081/_replite");
        assert_eq!(text("http://db/own/path/"), "http://db:80/own/path");
        assert_eq!(text("http://[::1]:7001"), "http://[::1]:7001/_replite");
        assert_eq!(Endpoint::parse("http://[::1]:7001").unwrap().host, "::1");
        assert_eq!(text("replite://10.0.0.1:8081/"), "replite://10.0.0.1:8081");
        assert_eq!(text("replite://[::1]:7001"), "replite://[::1]:7001");
    }

    #[test]
    fn what_can_not_be_dialled_is_refused_with_a_reason() {
        for (url, why) in [
            ("https://a:1", "https:// is not supported"),
            ("replite://a", "no port"),
            ("replite://a:1/path", "no path"),
            ("a:1", "http://"),
            ("ftp://a:1", "http://"),
            ("http://u:p@a:1", "user name"),
            ("http://a:1/?x=1", "query"),
            ("http://a:99999", ""),
            ("http://a:0", "port"),
            ("http://[a]:1", "IPv6"),
            ("replite://a[:1", ""),
            ("http://", ""),
            ("", ""),
        ] {
            let error = Endpoint::parse(url).unwrap_err();
            assert!(matches!(error, Error::Config(_)), "{url}: {error:?}");
            assert!(error.to_string().contains(why), "{url}: {error}");
        }
        assert!(Endpoint::parse(&format!("http://{}", "a".repeat(3000))).is_err());
    }
}
