//! What is said of the application: where it is reached, and whose certificates it may have there.

use std::fs::File;
use std::io::Read;
use std::path::PathBuf;

use crate::db::config::Config;
use crate::error::{Error, Result};
use crate::lease::LeaseKind;
use crate::net::{Endpoint, Pem, Scheme, ServerTls};
use crate::status::Addresses;

/// How a URL begins whose server has a certificate.
const HTTPS: &str = "https://";
/// The most that a file of roots may have, in bytes: some thousand certificates.
const ROOTS_MAX_BYTES: u64 = 4 << 20;

impl Config {
    /// The URL under which other nodes reach this one's application, such as
    /// `http://10.0.0.1:8080`. The node then advertises its replication endpoint there, too, at
    /// `/_replite`, unless [`Config::listen`] gives it a port of its own.
    ///
    /// With `https://` other nodes verify the certificate of the application's server; see
    /// [`Config::app_roots`]. The replication endpoint is not reached by such a URL: it needs
    /// [`Config::listen`] or [`Addresses::replication`].
    ///
    /// A node that others are to reach needs a secret, or [`Db::open`](crate::Db::open) refuses it.
    pub fn advertise(mut self, url: impl Into<String>) -> Config {
        self.addresses.app = url.into();
        self
    }

    /// All addresses of this node, where they differ more than [`Config::advertise`] allows for.
    pub fn addresses(mut self, addresses: Addresses) -> Config {
        self.addresses = addresses;
        self
    }

    /// A file with the certificates, as PEM, that vouch for the applications of the nodes whose
    /// [`Addresses::app`] is an `https://` URL. Those of the system count if it is not set. A
    /// certificate has to name the host of the URL.
    ///
    /// [`Db::open`](crate::Db::open) reads the file, and never again. It gives
    /// [`Error::Io`](crate::Error::Io) when the file can't be read, and
    /// [`Error::Config`](crate::Error::Config) when what is in it are no certificates, or when the
    /// build is without the feature `tls`.
    ///
    /// ```no_run
    /// use replite::Config;
    ///
    /// let config = Config::new("data/app.db")
    ///     .advertise("https://one.internal.example:8443")
    ///     .listen(([10, 0, 0, 1], 8081).into())
    ///     .app_roots("/etc/app/internal-ca.pem");
    /// # drop(config);
    /// ```
    pub fn app_roots(mut self, path: impl Into<PathBuf>) -> Config {
        self.app_roots = Some(path.into());
        self
    }

    /// Reads the certificates. Blocks.
    pub(in crate::db) fn app_tls(&self) -> Result<ServerTls> {
        let Some(path) = &self.app_roots else { return Ok(ServerTls::default()) };
        let mut pem = Vec::new();
        let file = File::open(path).map_err(Error::io("open", path))?;
        file.take(ROOTS_MAX_BYTES + 1).read_to_end(&mut pem).map_err(Error::io("read", path))?;
        if pem.len() as u64 > ROOTS_MAX_BYTES {
            let most = format!("app_roots: {}: more than {ROOTS_MAX_BYTES} bytes", path.display());
            return Err(Error::Config(most));
        }
        let named = format!("app_roots: {}", path.display());
        ServerTls::new(Some(Pem { named: &named, bytes: &pem }), None)
    }

    /// Checks the application's address.
    pub(super) fn check_app(&self) -> Result<()> {
        let Addresses { app, replication, .. } = &self.addresses;
        if app.is_empty() {
            return Ok(());
        }
        if !is_https(app) {
            if Endpoint::parse(app)?.scheme != Scheme::Http {
                return Err(Error::Config(format!("{app:?} is not the URL of an application")));
            }
            return Ok(());
        }
        // But for the scheme it is a URL like others.
        let host = Endpoint::parse(&format!("http://{}", &app[HTTPS.len()..]))?.host;
        ServerTls::check(&host)?;
        let elects = !matches!(self.lease.0, LeaseKind::Fixed(_));
        if elects && replication.is_empty() && self.listen.is_none() {
            return Err(Error::Config(format!(
                "with a lease, other nodes have to reach this one, and not by {app:?}: say how by `listen` \
                 or `Addresses::replication`"
            )));
        }
        Ok(())
    }
}

/// Whether this is the URL of a server with a certificate.
pub(super) fn is_https(url: &str) -> bool {
    url.get(..HTTPS.len()).is_some_and(|begin| begin.eq_ignore_ascii_case(HTTPS))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_application_may_have_a_certificate() {
        let secret = || crate::secret::Secret::fixed([7; 32]);
        let config = || Config::new("a.db").secret(secret()).plaintext(crate::channel::Plaintext::AnyNetwork);
        let check = |url: &str| config().advertise(url).check().map(drop);
        for url in ["http://a:1", "http://a/below"] {
            check(url).unwrap();
        }
        for url in ["https://a.example", "https://10.0.0.1:8443/below", "HTTPS://[::1]:8443"] {
            let checked = check(url);
            if cfg!(feature = "tls") {
                checked.unwrap();
            } else {
                assert!(checked.unwrap_err().to_string().contains("feature `tls`"), "{url}");
            }
        }
        for url in ["https://", "https://u:p@a", "https://a:0", "https://a?q", "ftp://a", "https://a_/b c"] {
            assert!(matches!(check(url), Err(Error::Config(_))), "{url}");
        }
    }

    #[cfg(feature = "tls")]
    #[test]
    fn roots_are_read_when_they_are_given() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("roots.pem");
        let read = || Config::new("a.db").app_roots(&path).app_tls().map(drop);
        assert!(matches!(read(), Err(Error::Io { .. })), "there is none");
        let key = rcgen::KeyPair::generate().unwrap();
        let certificate = rcgen::CertificateParams::new(Vec::new()).unwrap().self_signed(&key).unwrap();
        let good = certificate.pem();
        std::fs::write(&path, format!("{good}\n# and another\n{good}")).unwrap();
        read().unwrap();
        let garbled = good.replacen("MII", "AAA", 1);
        let huge = "\n".repeat((4 << 20) + 1);
        for text in ["", "no certificate", &good[..good.len() / 2], &garbled, &huge] {
            std::fs::write(&path, text).unwrap();
            let error = read().unwrap_err();
            assert!(matches!(error, Error::Config(_)), "{error:?}");
            assert!(error.to_string().contains("roots.pem"), "{error}");
        }
    }

    #[cfg(feature = "tls")]
    #[test]
    fn the_replication_endpoint_is_not_taken_to_be_at_an_https_address() {
        let config = Config::new("a.db").advertise("https://a.example:8443/");
        let advertised = config.advertised(None);
        assert_eq!(
            (advertised.app.as_str(), advertised.replication.as_str()),
            ("https://a.example:8443", "")
        );
        let elects = config.lease(crate::lease::Directory::new("lease"));
        let elects = elects.secret(crate::secret::Secret::fixed([7; 32]));
        let error = elects.clone().check().unwrap_err().to_string();
        assert!(error.contains("say how by `listen`"), "{error}");
        assert!(elects.listen(([127, 0, 0, 1], 8081).into()).check().is_ok());
    }
}
