//! TLS to the applications of other nodes: whose certificates count, and what is spoken.
//!
//! What a failure says of a request:
//!
//! - A handshake that fails, whatever for, comes before a byte of the request: it was not begun.
//! - By TLS 1.3 the client may send before the server has accepted that it has no certificate. In
//!   HTTP/2 a request waits for the server's settings, which show that it has. In HTTP/1.1 it does
//!   not, and the server's alert tells: see [`was_refused`].
//! - Any other alert on a connection that stood, and an end without `close_notify`, is a connection
//!   that broke: the request may have run. It is never the end of an answer.

use std::fmt;
use std::path::Path;
use std::sync::{Arc, OnceLock};

use rustls::client::WebPkiServerVerifier;
use rustls::client::danger::ServerCertVerifier;
use rustls::crypto::{CryptoProvider, ring};
use rustls::pki_types::pem::PemObject;
use rustls::pki_types::{CertificateDer, ServerName};
use rustls::{AlertDescription, ClientConfig, RootCertStore};
use rustls_platform_verifier::Verifier;
use tokio::net::TcpStream;
use tokio_rustls::TlsConnector;

use crate::error::{Error, Result};
use crate::proxy::BoxError;
use crate::proxy::preface::ByteStream;
use crate::threads::blocking;

const HTTP2: &[u8] = b"h2";
const HTTP1: &[u8] = b"http/1.1";

/// Whose certificates are accepted of servers at `https://` URLs: those of the platform, or those
/// under given roots.
#[derive(Clone, Default)]
pub(crate) struct AppTls(Arc<OnceLock<TlsConfigs>>);

/// What a connection begins with.
struct TlsConfigs {
    /// Offers HTTP/1.1 alone.
    http1: Arc<ClientConfig>,
    /// Offers HTTP/2 first.
    http2: Arc<ClientConfig>,
}

impl AppTls {
    /// Accepts what the certificates in this file vouch for. Without one (the default) it is what
    /// the platform accepts, whose roots are read with the first connection.
    ///
    /// # Errors
    /// [`Error::Config`] when there is no certificate in it, or one that is garbled.
    pub(crate) fn of_roots(path: &Path, pem: &[u8]) -> Result<AppTls> {
        let bad = |why: &dyn fmt::Display| Error::Config(format!("app_roots: {}: {why}", path.display()));
        let mut roots = RootCertStore::empty();
        for certificate in CertificateDer::pem_slice_iter(pem) {
            let certificate = certificate.map_err(|error| bad(&error))?;
            roots.add(certificate).map_err(|error| bad(&error))?;
        }
        if roots.is_empty() {
            return Err(bad(&"there is no certificate in it"));
        }
        let verifier = WebPkiServerVerifier::builder_with_provider(Arc::new(roots), provider());
        let configs = TlsConfigs::new(verifier.build().map_err(|error| bad(&error))?)?;
        Ok(AppTls(Arc::new(OnceLock::from(configs))))
    }

    /// Whether an application can be reached at this host by TLS.
    ///
    /// # Errors
    /// [`Error::Config`] when no certificate can name it.
    pub(crate) fn check(host: &str) -> Result<()> {
        let named = ServerName::try_from(host);
        named.map(drop).map_err(|_| Error::Config(format!("{host:?} is no name that a certificate can have")))
    }

    /// Speaks TLS to the server of this name, which proves that it has it. Says whether the server
    /// chose HTTP/2, if that is wished for.
    pub(super) async fn connect(
        &self,
        stream: TcpStream,
        host: &str,
        http2: bool,
    ) -> Result<(Box<dyn ByteStream>, bool), BoxError> {
        if self.0.get().is_none() {
            let made = blocking(|| {
                let verifier = Verifier::new(provider()).map_err(|error| {
                    Error::Config(format!("the system's root certificates, without `app_roots`: {error}"))
                })?;
                TlsConfigs::new(Arc::new(verifier))
            });
            // Another connection may have been as fast.
            let _ = self.0.set(made.await?);
        }
        let configs = self.0.get().ok_or("no TLS")?;
        let config = if http2 { &configs.http2 } else { &configs.http1 };
        let name = ServerName::try_from(host.to_owned())?;
        let tls = TlsConnector::from(config.clone()).connect(name, stream).await?;
        let chose = tls.get_ref().1.alpn_protocol() == Some(HTTP2);
        Ok((Box::new(tls), chose))
    }
}

impl fmt::Debug for AppTls {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("AppTls").finish_non_exhaustive()
    }
}

impl TlsConfigs {
    fn new(verifier: Arc<dyn ServerCertVerifier>) -> Result<TlsConfigs> {
        let offers = |protocols: &[&[u8]]| {
            let builder =
                ClientConfig::builder_with_provider(provider()).with_safe_default_protocol_versions();
            let builder = builder.map_err(|error| Error::Internal(format!("TLS: {error}")))?;
            let builder = builder.dangerous().with_custom_certificate_verifier(verifier.clone());
            // Nothing is sent before the handshake is done: what is sent then could be repeated.
            let mut config = builder.with_no_client_auth();
            config.alpn_protocols = protocols.iter().map(|name| name.to_vec()).collect();
            Ok::<_, Error>(Arc::new(config))
        };
        Ok(TlsConfigs { http1: offers(&[HTTP1])?, http2: offers(&[HTTP2, HTTP1])? })
    }
}

fn provider() -> Arc<CryptoProvider> {
    Arc::new(ring::default_provider())
}

/// Whether a connection broke because the server wants a certificate of this node. By TLS 1.3 it
/// says so when this node takes the handshake for done. To the server it is not: it has read
/// nothing.
pub(super) fn was_refused(mut error: &(dyn std::error::Error + 'static)) -> bool {
    loop {
        let io = error.downcast_ref::<std::io::Error>().and_then(std::io::Error::get_ref);
        let tls = io.and_then(|inner| inner.downcast_ref::<rustls::Error>());
        if let Some(rustls::Error::AlertReceived(alert)) = tls {
            return *alert == AlertDescription::CertificateRequired;
        }
        match error.source() {
            Some(source) => error = source,
            None => return false,
        }
    }
}
