//! TLS to servers of HTTP, the applications of other nodes and lease stores: whose certificates
//! count, which one is shown, and what is spoken.
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
use std::sync::{Arc, OnceLock};

use rustls::client::WebPkiServerVerifier;
use rustls::client::danger::ServerCertVerifier;
use rustls::crypto::{CryptoProvider, ring};
use rustls::pki_types::pem::PemObject;
use rustls::pki_types::{CertificateDer, PrivateKeyDer, ServerName};
use rustls::sign::{CertifiedKey, SingleCertAndKey};
use rustls::{AlertDescription, ClientConfig, RootCertStore};
use rustls_platform_verifier::Verifier;
use tokio::net::TcpStream;
use tokio_rustls::TlsConnector;

use crate::error::{Error, Result};
use crate::threads::blocking;

const HTTP2: &[u8] = b"h2";
const HTTP1: &[u8] = b"http/1.1";

/// A connection to a server that has proved its name.
pub(crate) type TlsStream = tokio_rustls::client::TlsStream<TcpStream>;

/// What a file has, and how the file is named where that can't be used.
#[derive(Clone, Copy)]
pub(crate) struct Pem<'a> {
    pub(crate) named: &'a str,
    pub(crate) bytes: &'a [u8],
}

/// Whose certificates are accepted of servers at `https://` URLs: those of the platform, or those
/// under given roots. And what is shown to a server that asks for a certificate.
#[derive(Clone, Default)]
pub(crate) struct ServerTls(Arc<TlsParts>);

#[derive(Default)]
struct TlsParts {
    /// That of given roots. That of the platform reads them with the first connection.
    verifier: Option<Arc<dyn ServerCertVerifier>>,
    identity: Option<Arc<SingleCertAndKey>>,
    configs: OnceLock<TlsConfigs>,
}

/// What a connection begins with.
struct TlsConfigs {
    /// Offers HTTP/1.1 alone.
    http1: Arc<ClientConfig>,
    /// Offers HTTP/2 first.
    http2: Arc<ClientConfig>,
}

impl ServerTls {
    /// Accepts what the certificates in `roots` vouch for. Without it (the default) it is what the
    /// platform accepts, whose roots are read with the first connection. `identity` is a chain of
    /// certificates, and the key of its first.
    ///
    /// # Errors
    /// [`Error::Config`] when what is given can't be used.
    pub(crate) fn new(roots: Option<Pem<'_>>, identity: Option<[Pem<'_>; 2]>) -> Result<ServerTls> {
        let verifier = roots.map(verifier_of).transpose()?;
        let identity = identity.map(|[chain, key]| identity_of(chain, key)).transpose()?;
        Ok(ServerTls(Arc::new(TlsParts { verifier, identity, configs: OnceLock::new() })))
    }

    /// Whether a server can be reached at this host by TLS.
    ///
    /// # Errors
    /// [`Error::Config`] when no certificate can name it.
    pub(crate) fn check(host: &str) -> Result<()> {
        let named = ServerName::try_from(host);
        named.map(drop).map_err(|_| Error::Config(format!("{host:?} is no name that a certificate can have")))
    }

    /// Speaks TLS to the server of this name, which proves that it has it. Says whether the server
    /// chose HTTP/2, if that is wished for.
    pub(crate) async fn connect(
        &self,
        stream: TcpStream,
        host: &str,
        http2: bool,
    ) -> Result<(TlsStream, bool), Box<dyn std::error::Error + Send + Sync>> {
        let inner = &self.0;
        if inner.configs.get().is_none() {
            let (verifier, identity) = (inner.verifier.clone(), inner.identity.clone());
            let made = blocking(move || {
                let verifier = verifier.map_or_else(platform_verifier, Ok)?;
                TlsConfigs::new(&verifier, identity.as_ref())
            });
            // Another connection may have been as fast.
            let _ = inner.configs.set(made.await?);
        }
        let configs = inner.configs.get().ok_or("no TLS")?;
        let config = if http2 { &configs.http2 } else { &configs.http1 };
        let name = ServerName::try_from(host.to_owned())?;
        let tls = TlsConnector::from(config.clone()).connect(name, stream).await?;
        let chose = tls.get_ref().1.alpn_protocol() == Some(HTTP2);
        Ok((tls, chose))
    }
}

impl fmt::Debug for ServerTls {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("ServerTls").finish_non_exhaustive()
    }
}

fn platform_verifier() -> Result<Arc<dyn ServerCertVerifier>> {
    let verifier = Verifier::new(provider())
        .map_err(|error| Error::Config(format!("the system's root certificates, without others: {error}")))?;
    Ok(Arc::new(verifier))
}

fn verifier_of(roots: Pem<'_>) -> Result<Arc<dyn ServerCertVerifier>> {
    let mut store = RootCertStore::empty();
    for certificate in certificates(roots)? {
        store.add(certificate).map_err(|error| unusable(roots, error))?;
    }
    let verifier = WebPkiServerVerifier::builder_with_provider(Arc::new(store), provider());
    Ok(verifier.build().map_err(|error| unusable(roots, error))?)
}

fn identity_of(chain: Pem<'_>, key: Pem<'_>) -> Result<Arc<SingleCertAndKey>> {
    let certificates = certificates(chain)?;
    let private = PrivateKeyDer::from_pem_slice(key.bytes).map_err(|error| unusable(key, error))?;
    let own = CertifiedKey::from_der(certificates, private, &provider()).map_err(|error| match error {
        rustls::Error::InconsistentKeys(_) => {
            unusable(key, format!("it is not the key of the certificate in {}", chain.named))
        }
        error => unusable(chain, error),
    })?;
    Ok(Arc::new(SingleCertAndKey::from(own)))
}

/// One at least.
fn certificates(pem: Pem<'_>) -> Result<Vec<CertificateDer<'static>>> {
    let all = CertificateDer::pem_slice_iter(pem.bytes).collect::<Result<Vec<_>, _>>();
    let all = all.map_err(|error| unusable(pem, error))?;
    if all.is_empty() {
        return Err(unusable(pem, "there is no certificate in it"));
    }
    Ok(all)
}

fn unusable(pem: Pem<'_>, why: impl fmt::Display) -> Error {
    Error::Config(format!("{}: {why}", pem.named))
}

impl TlsConfigs {
    fn new(
        verifier: &Arc<dyn ServerCertVerifier>,
        identity: Option<&Arc<SingleCertAndKey>>,
    ) -> Result<TlsConfigs> {
        let offers = |protocols: &[&[u8]]| {
            let builder =
                ClientConfig::builder_with_provider(provider()).with_safe_default_protocol_versions();
            let builder = builder.map_err(|error| Error::Internal(format!("TLS: {error}")))?;
            let builder = builder.dangerous().with_custom_certificate_verifier(verifier.clone());
            // Nothing is sent before the handshake is done: what is sent then could be repeated.
            let mut config = match identity {
                Some(identity) => builder.with_client_cert_resolver(identity.clone()),
                None => builder.with_no_client_auth(),
            };
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
pub(crate) fn was_refused(mut error: &(dyn std::error::Error + 'static)) -> bool {
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
