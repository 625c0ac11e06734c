//! What an [`Etcd`](super::Etcd) is told.

use std::fmt;
use std::path::{Path, PathBuf};

use http::Uri;

use crate::error::{Error, Result};
use crate::net::ServerTls;

/// The most members that are named.
const MEMBERS_MAX: usize = 16;
/// The longest URL, in bytes.
const URL_MAX_BYTES: usize = 4096;
/// The port for clients of etcd.
const DEFAULT_PORT: u16 = 2379;
/// The key, where none is given.
const DEFAULT_KEY: &str = "replite/lease";

#[derive(Clone)]
pub(super) struct EtcdSettings {
    pub(super) members: Vec<EtcdMember>,
    pub(super) key: String,
    /// Name and password.
    pub(super) user: Option<(String, String)>,
    pub(super) roots: Option<PathBuf>,
    /// Chain and key.
    pub(super) certificate: Option<[PathBuf; 2]>,
}

/// Where a member is; the text form is its URL.
#[derive(Clone, PartialEq, Eq, Debug)]
pub(super) struct EtcdMember {
    tls: bool,
    /// Host and port as a URL carries them.
    authority: String,
}

impl EtcdSettings {
    pub(super) fn new<U: AsRef<str>>(urls: impl IntoIterator<Item = U>) -> Result<EtcdSettings> {
        let members =
            urls.into_iter().map(|url| EtcdMember::parse(url.as_ref())).collect::<Result<Vec<_>>>()?;
        if members.is_empty() || members.len() > MEMBERS_MAX {
            let number = members.len();
            return Err(Error::Config(format!("etcd has {number} URLs: there must be 1 to {MEMBERS_MAX}")));
        }
        Ok(EtcdSettings { members, key: DEFAULT_KEY.into(), user: None, roots: None, certificate: None })
    }

    pub(super) fn from_url(url: &str) -> Result<EtcdSettings> {
        let bad = |why: &str| Error::Config(format!("the URL of an etcd: {why}"));
        if url.len() > URL_MAX_BYTES {
            return Err(bad("it is too long"));
        }
        let scheme = [("etcd://", "http"), ("etcds://", "https")];
        let scheme = scheme.into_iter().find_map(|(etcd, http)| Some((url.strip_prefix(etcd)?, http)));
        let (rest, http) = scheme.ok_or_else(|| bad("it must begin with etcd:// or etcds://"))?;
        let (members, key) = rest.split_once('/').unwrap_or((rest, ""));
        if key.is_empty() {
            return Err(bad("it has no key: etcd://host:port,host:port/key"));
        }
        if key.contains(['?', '#', '%']) {
            return Err(bad("its key can't have any of ? # %"));
        }
        let settings = EtcdSettings::new(members.split(',').map(|member| format!("{http}://{member}")))?;
        Ok(EtcdSettings { key: key.into(), ..settings })
    }

    /// Files are read for a connection.
    pub(super) fn files(&self) -> Vec<&Path> {
        let certificate = self.certificate.iter().flatten();
        self.roots.iter().chain(certificate).map(PathBuf::as_path).collect()
    }
}

impl EtcdMember {
    fn parse(url: &str) -> Result<EtcdMember> {
        let bad = |why: &str| {
            // A name and a password may be in it.
            let shown = if url.contains('@') { "…" } else { url.get(..128).unwrap_or(url) };
            Error::Config(format!("etcd at {shown:?}: {why}"))
        };
        if url.len() > URL_MAX_BYTES {
            return Err(bad("the URL is too long"));
        }
        let uri: Uri = url.trim().parse().map_err(|_| bad("it is no URL"))?;
        let tls = match uri.scheme_str() {
            Some("http") => false,
            Some("https") => true,
            _ => return Err(bad("the URL must begin with http:// or https://")),
        };
        let authority = uri.authority().ok_or_else(|| bad("there is no host"))?;
        if authority.as_str().contains('@') {
            return Err(bad("name and password are not given in the URL: use `Etcd::user`"));
        }
        if !matches!(uri.path(), "" | "/") || uri.query().is_some() {
            return Err(bad("the URL can't have a path"));
        }
        let host = authority.host();
        let port = match authority.port_u16() {
            Some(port) if port > 0 => port,
            None if authority.as_str() == host => DEFAULT_PORT,
            _ => return Err(bad("the port is not a number from 1 to 65535")),
        };
        let bare = host.strip_prefix('[').and_then(|host| host.strip_suffix(']')).unwrap_or(host);
        if bare.is_empty() {
            return Err(bad("there is no host"));
        }
        if tls {
            ServerTls::check(bare)?;
        }
        Ok(EtcdMember { tls, authority: format!("{host}:{port}") })
    }
}

impl fmt::Display for EtcdMember {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}://{}", if self.tls { "https" } else { "http" }, self.authority)
    }
}
