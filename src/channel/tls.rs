//! TLS 1.3, in one of two ways. With raw public keys (RFC 7250) any key is taken, and its holder
//! has to prove it. With certificates (`pki`) those are taken that a list of names allows.

use std::io;
use std::sync::Arc;
use std::time::Duration;

use rustls::client::danger::{HandshakeSignatureValid, ServerCertVerified, ServerCertVerifier};
use rustls::client::{AlwaysResolvesClientRawPublicKeys, ResolvesClientCert};
use rustls::crypto::{CryptoProvider, WebPkiSupportedAlgorithms, verify_tls13_signature_with_raw_key};
use rustls::pki_types::{CertificateDer, PrivateKeyDer, ServerName, SubjectPublicKeyInfoDer, UnixTime};
use rustls::server::danger::{ClientCertVerified, ClientCertVerifier};
use rustls::server::{AlwaysResolvesServerRawPublicKeys, ResolvesServerCert};
use rustls::sign::{CertifiedKey, SingleCertAndKey};
use rustls::{
    ClientConfig, DigitallySignedStruct, DistinguishedName, ServerConfig, SignatureScheme, version::TLS13,
};
use tokio::io::{AsyncRead, AsyncReadExt, AsyncWrite, AsyncWriteExt};
use tokio_rustls::{TlsAcceptor, TlsConnector};

use crate::channel::certificates::{CertificateBytes, Certificates};
use crate::channel::key::ChannelKey;
use crate::channel::pki::{Pki, key_of};
use crate::channel::refused::old_version;
use crate::channel::{Binding, EXPORTER_BYTES, Traffic, refused};
use crate::error::{Error, PeerProblem, Result};
use crate::peer::PeerKey;

pub(crate) use tokio_rustls::TlsStream;

/// What RFC 9266 has for channel bindings, with no context.
const EXPORTER_LABEL: &[u8] = b"EXPORTER-Channel-Binding";
/// The protocol inside, as ALPN names it.
const ALPN: &[u8] = b"h2";
/// The same with an application's requests inside.
const ALPN_FORWARDS: &[u8] = b"replite-forwards";
/// The name that is asked for. It means nothing, for no key has a name, and is not sent.
const NAME: &str = "replite.invalid";

/// How long, and for how many bytes, a peer that is refused is listened to. What is closed before
/// it has read all may take away from the peer why it was refused.
const LINGER: Duration = Duration::from_secs(1);
const LINGER_MAX_BYTES: u64 = 64 * 1024;

/// Both sides of TLS, with one key.
#[derive(Debug)]
pub(crate) struct Tls {
    key: PeerKey,
    /// None: raw public keys.
    pki: Option<Pki>,
    client: Arc<ClientConfig>,
    /// For an application's requests.
    forwards: Arc<ClientConfig>,
    server: Arc<ServerConfig>,
}

impl Tls {
    /// With a raw public key.
    ///
    /// # Errors
    /// [`Error::Config`] for a key that is none.
    pub(super) fn raw(key: &ChannelKey) -> Result<Option<Tls>> {
        let provider = Arc::new(rustls::crypto::ring::default_provider());
        let certified = certified(key, &provider).map_err(unusable)?;
        let public_key = certified.cert.first().ok_or_else(|| unusable("it has no public key"))?;
        let key = PeerKey::of(public_key);
        let any = Arc::new(AnyKey(provider.signature_verification_algorithms));
        let client = Arc::new(AlwaysResolvesClientRawPublicKeys::new(certified.clone()));
        let server = Arc::new(AlwaysResolvesServerRawPublicKeys::new(certified));
        let client = client_config(provider.clone(), any.clone(), client).map_err(unusable)?;
        let server = server_config(provider, any, server).map_err(unusable)?;
        let forwards = for_forwards(&client);
        Ok(Some(Tls { key, pki: None, client, forwards, server }))
    }

    /// With certificates.
    ///
    /// # Errors
    /// [`Error::Config`] for what can't be used.
    pub(super) fn certified(certificates: &Certificates, bytes: &CertificateBytes) -> Result<Tls> {
        let provider = Arc::new(rustls::crypto::ring::default_provider());
        let pki = Pki::new(certificates, bytes, &provider)?;
        let certificate = pki.own.cert.first().ok_or_else(|| unusable("it has no certificate"))?;
        let key = key_of(certificate).map_err(unusable)?;
        let resolver = Arc::new(SingleCertAndKey::from(pki.own.clone()));
        let client =
            client_config(provider.clone(), pki.peers.clone(), resolver.clone()).map_err(unusable)?;
        let server = server_config(provider, pki.peers.clone(), resolver).map_err(unusable)?;
        let forwards = for_forwards(&client);
        Ok(Tls { key, pki: Some(pki), client, forwards, server })
    }

    /// Why a peer with the same files would not take this node's certificate now.
    pub(super) fn own_problem(&self) -> Option<String> {
        self.pki.as_ref().and_then(Pki::own_problem)
    }

    /// What an error says of the peer, where it is about keys and certificates.
    pub(super) fn problem(&self, error: &io::Error) -> Option<PeerProblem> {
        refused::problem(error, self.pki.is_some())
    }

    pub(super) fn key(&self) -> PeerKey {
        self.key
    }

    pub(super) async fn connect<I>(&self, io: I, traffic: Traffic) -> io::Result<(TlsStream<I>, Binding)>
    where
        I: AsyncRead + AsyncWrite + Unpin,
    {
        let name = ServerName::try_from(NAME).map_err(io::Error::other)?;
        let config = match traffic {
            Traffic::Exchanges => &self.client,
            Traffic::Forwards => &self.forwards,
        };
        let stream = TlsConnector::from(config.clone()).connect(name, io).await?;
        let (_, connection) = stream.get_ref();
        let server = self.presented(connection.peer_certificates())?;
        let exporter = connection
            .export_keying_material([0; EXPORTER_BYTES], EXPORTER_LABEL, None)
            .map_err(io::Error::other)?;
        Ok((stream.into(), Binding::new(exporter, (self.key, server), traffic)))
    }

    pub(super) async fn accept<I>(&self, io: I) -> io::Result<(TlsStream<I>, Binding)>
    where
        I: AsyncRead + AsyncWrite + Unpin,
    {
        let accepted = TlsAcceptor::from(self.server.clone()).accept(io).into_fallible().await;
        let stream = match accepted {
            Ok(stream) => stream,
            Err((error, io)) => {
                if self.problem(&error).is_some() {
                    let _ = tokio::time::timeout(LINGER, listen_to_the_end(io)).await;
                }
                return Err(error);
            }
        };
        let (_, connection) = stream.get_ref();
        let client = self.presented(connection.peer_certificates())?;
        let exporter = connection
            .export_keying_material([0; EXPORTER_BYTES], EXPORTER_LABEL, None)
            .map_err(io::Error::other)?;
        let traffic = match connection.alpn_protocol() {
            Some(ALPN_FORWARDS) => Traffic::Forwards,
            _ => Traffic::Exchanges,
        };
        Ok((stream.into(), Binding::new(exporter, (client, self.key), traffic)))
    }

    /// The key that the other side showed, and has proved to hold.
    fn presented(&self, certificates: Option<&[CertificateDer<'_>]>) -> io::Result<PeerKey> {
        match (certificates, &self.pki) {
            (Some([certificate, ..]), Some(_)) => key_of(certificate),
            (Some([public_key]), None) => Ok(PeerKey::of(public_key)),
            _ => Err(io::Error::new(io::ErrorKind::InvalidData, "the peer showed no public key")),
        }
    }
}

fn unusable(why: impl std::fmt::Display) -> Error {
    Error::Config(format!("the key of the channel can't be used: {why}"))
}

fn certified(key: &ChannelKey, provider: &CryptoProvider) -> Result<Arc<CertifiedKey>, rustls::Error> {
    let private = PrivateKeyDer::Pkcs8(key.pkcs8().to_vec().into());
    let signing = provider.key_provider.load_private_key(private)?;
    let public = signing.public_key().ok_or(rustls::Error::General("it has no public key".into()))?;
    let public = CertificateDer::from(public.to_vec());
    Ok(Arc::new(CertifiedKey::new(vec![public], signing)))
}

/// Ends what is sent, and reads what still comes.
async fn listen_to_the_end<I: AsyncRead + AsyncWrite + Unpin>(mut io: I) -> io::Result<()> {
    io.shutdown().await?;
    tokio::io::copy(&mut io.take(LINGER_MAX_BYTES), &mut tokio::io::sink()).await.map(drop)
}

fn server_config(
    provider: Arc<CryptoProvider>,
    clients: Arc<dyn ClientCertVerifier>,
    own: Arc<dyn ResolvesServerCert>,
) -> Result<Arc<ServerConfig>, rustls::Error> {
    let mut server = ServerConfig::builder_with_provider(provider)
        .with_protocol_versions(&[&TLS13])?
        .with_client_cert_verifier(clients)
        .with_cert_resolver(own);
    // Each connection has an exporter of its own: nothing is resumed, and nothing comes early.
    server.send_tls13_tickets = 0;
    server.alpn_protocols = vec![ALPN.to_vec(), ALPN_FORWARDS.to_vec()];
    Ok(Arc::new(server))
}

fn client_config(
    provider: Arc<CryptoProvider>,
    servers: Arc<dyn ServerCertVerifier>,
    own: Arc<dyn ResolvesClientCert>,
) -> Result<Arc<ClientConfig>, rustls::Error> {
    let mut client = ClientConfig::builder_with_provider(provider)
        .with_protocol_versions(&[&TLS13])?
        .dangerous()
        .with_custom_certificate_verifier(servers)
        .with_client_cert_resolver(own);
    client.resumption = rustls::client::Resumption::disabled();
    client.enable_sni = false;
    client.alpn_protocols = vec![ALPN.to_vec()];
    Ok(Arc::new(client))
}

/// The same for connections that have an application's requests inside.
fn for_forwards(client: &ClientConfig) -> Arc<ClientConfig> {
    let mut client = client.clone();
    client.alpn_protocols = vec![ALPN_FORWARDS.to_vec()];
    Arc::new(client)
}

/// Takes any key: who holds it is asked by the proofs of the secret.
#[derive(Debug)]
struct AnyKey(WebPkiSupportedAlgorithms);

impl AnyKey {
    fn verify(
        &self,
        message: &[u8],
        key: &CertificateDer<'_>,
        signature: &DigitallySignedStruct,
    ) -> Result<HandshakeSignatureValid, rustls::Error> {
        let key = SubjectPublicKeyInfoDer::from(key.as_ref());
        verify_tls13_signature_with_raw_key(message, &key, signature, &self.0)
    }
}

impl ServerCertVerifier for AnyKey {
    fn verify_server_cert(
        &self,
        _: &CertificateDer<'_>,
        _: &[CertificateDer<'_>],
        _: &ServerName<'_>,
        _: &[u8],
        _: UnixTime,
    ) -> Result<ServerCertVerified, rustls::Error> {
        Ok(ServerCertVerified::assertion())
    }

    fn verify_tls12_signature(
        &self,
        _: &[u8],
        _: &CertificateDer<'_>,
        _: &DigitallySignedStruct,
    ) -> Result<HandshakeSignatureValid, rustls::Error> {
        Err(old_version())
    }

    fn verify_tls13_signature(
        &self,
        message: &[u8],
        key: &CertificateDer<'_>,
        signature: &DigitallySignedStruct,
    ) -> Result<HandshakeSignatureValid, rustls::Error> {
        self.verify(message, key, signature)
    }

    fn supported_verify_schemes(&self) -> Vec<SignatureScheme> {
        self.0.supported_schemes()
    }

    fn requires_raw_public_keys(&self) -> bool {
        true
    }
}

impl ClientCertVerifier for AnyKey {
    fn root_hint_subjects(&self) -> &[DistinguishedName] {
        &[]
    }

    fn verify_client_cert(
        &self,
        _: &CertificateDer<'_>,
        _: &[CertificateDer<'_>],
        _: UnixTime,
    ) -> Result<ClientCertVerified, rustls::Error> {
        Ok(ClientCertVerified::assertion())
    }

    fn verify_tls12_signature(
        &self,
        _: &[u8],
        _: &CertificateDer<'_>,
        _: &DigitallySignedStruct,
    ) -> Result<HandshakeSignatureValid, rustls::Error> {
        Err(old_version())
    }

    fn verify_tls13_signature(
        &self,
        message: &[u8],
        key: &CertificateDer<'_>,
        signature: &DigitallySignedStruct,
    ) -> Result<HandshakeSignatureValid, rustls::Error> {
        self.verify(message, key, signature)
    }

    fn supported_verify_schemes(&self) -> Vec<SignatureScheme> {
        self.0.supported_schemes()
    }

    fn requires_raw_public_keys(&self) -> bool {
        true
    }
}
