//! Both sides of TLS with certificates of a PKI: whose are taken, and why others are not.

use std::io;
use std::path::Path;
use std::sync::Arc;

use rustls::client::danger::{HandshakeSignatureValid, ServerCertVerified, ServerCertVerifier};
use rustls::client::{verify_server_cert_signed_by_trust_anchor, verify_server_name};
use rustls::crypto::{CryptoProvider, WebPkiSupportedAlgorithms, verify_tls13_signature};
use rustls::pki_types::pem::PemObject;
use rustls::pki_types::{CertificateDer, PrivateKeyDer, ServerName, UnixTime};
use rustls::server::danger::{ClientCertVerified, ClientCertVerifier};
use rustls::server::{ParsedCertificate, WebPkiClientVerifier};
use rustls::sign::CertifiedKey;
use rustls::{
    CertificateError, DigitallySignedStruct, DistinguishedName, InconsistentKeys, RootCertStore,
    SignatureScheme,
};

use crate::channel::certificates::{CertificateBytes, Certificates};
use crate::channel::refused::{certificate_words, old_version};
use crate::error::{Error, Result};
use crate::peer::PeerKey;

/// A node's certificates, and whose it takes.
#[derive(Debug)]
pub(super) struct Pki {
    pub(super) own: Arc<CertifiedKey>,
    pub(super) peers: Arc<Listed>,
}

impl Pki {
    /// # Errors
    /// [`Error::Config`] for what can't be used, with the file.
    pub(super) fn new(
        certificates: &Certificates,
        bytes: &CertificateBytes,
        provider: &Arc<CryptoProvider>,
    ) -> Result<Pki> {
        let [chain_path, key_path, roots_path] = certificates.paths();
        let chain = all_of(chain_path, &bytes.chain)?;
        let key = PrivateKeyDer::from_pem_slice(&bytes.key)
            .map_err(|error| unusable(key_path, format!("it has no private key in PEM ({error})")))?;
        let own = CertifiedKey::from_der(chain, key, provider).map_err(|error| match error {
            rustls::Error::InconsistentKeys(InconsistentKeys::KeyMismatch) => unusable(
                key_path,
                format!("it is not the key of the certificate in {}", chain_path.display()),
            ),
            rustls::Error::InvalidCertificate(error) => {
                unusable(chain_path, format!("its first certificate can't be read: {error}"))
            }
            error => unusable(key_path, error),
        })?;
        let mut roots = RootCertStore::empty();
        for root in all_of(roots_path, &bytes.roots)? {
            let added = roots.add(root);
            added.map_err(|error| unusable(roots_path, format!("a root can't be used: {error}")))?;
        }
        let roots = Arc::new(roots);
        // A stranger does not get to see what the roots are called.
        let clients = WebPkiClientVerifier::builder_with_provider(roots.clone(), provider.clone())
            .clear_root_hint_subjects()
            .build()
            .map_err(|error| unusable(roots_path, error))?;
        let names = certificates.allowed().iter().map(|name| {
            ServerName::try_from(name.clone()).map_err(|_| {
                Error::Config(format!(
                    "{name:?} is neither a DNS name nor an IP address (`Certificates::names`)"
                ))
            })
        });
        let names = names.collect::<Result<Vec<_>>>()?;
        let algorithms = provider.signature_verification_algorithms;
        Ok(Pki { own: Arc::new(own), peers: Arc::new(Listed { names, roots, clients, algorithms }) })
    }

    /// Why a peer with the same files would not take this node's certificate now.
    pub(super) fn own_problem(&self) -> Option<String> {
        let now = UnixTime::now();
        let (own, between) = self.own.cert.split_first()?;
        let checked = self.peers.check_server(own, between, now);
        let checked = checked.and_then(|()| self.peers.check_client(own, between, now));
        checked.err().map(|error| certificate_words(&error))
    }
}

/// All certificates of a file, one at least.
fn all_of(path: &Path, pem: &[u8]) -> Result<Vec<CertificateDer<'static>>> {
    let all: Vec<_> = CertificateDer::pem_slice_iter(pem)
        .collect::<Result<_, _>>()
        .map_err(|error| unusable(path, format!("it is no PEM ({error})")))?;
    if all.is_empty() {
        return Err(unusable(path, "it has no certificate in PEM"));
    }
    Ok(all)
}

fn unusable(path: &Path, why: impl std::fmt::Display) -> Error {
    Error::Config(format!("{} can't be used for TLS: {why}", path.display()))
}

/// The key of a certificate.
pub(super) fn key_of(certificate: &CertificateDer<'_>) -> io::Result<PeerKey> {
    let parsed = ParsedCertificate::try_from(certificate).map_err(io::Error::other)?;
    Ok(PeerKey::of(&parsed.subject_public_key_info()))
}

/// Takes certificates that a root leads to and that are valid for one of the names.
#[derive(Debug)]
pub(super) struct Listed {
    names: Vec<ServerName<'static>>,
    roots: Arc<RootCertStore>,
    clients: Arc<dyn ClientCertVerifier>,
    algorithms: WebPkiSupportedAlgorithms,
}

impl Listed {
    fn check_server(
        &self,
        certificate: &CertificateDer<'_>,
        between: &[CertificateDer<'_>],
        now: UnixTime,
    ) -> Result<(), rustls::Error> {
        let parsed = ParsedCertificate::try_from(certificate)?;
        let algorithms = self.algorithms.all;
        verify_server_cert_signed_by_trust_anchor(&parsed, &self.roots, between, now, algorithms)?;
        self.check_name(&parsed)
    }

    fn check_client(
        &self,
        certificate: &CertificateDer<'_>,
        between: &[CertificateDer<'_>],
        now: UnixTime,
    ) -> Result<(), rustls::Error> {
        self.clients.verify_client_cert(certificate, between, now)?;
        self.check_name(&ParsedCertificate::try_from(certificate)?)
    }

    fn check_name(&self, parsed: &ParsedCertificate<'_>) -> Result<(), rustls::Error> {
        let mut refused = CertificateError::NotValidForName.into();
        for name in &self.names {
            match verify_server_name(parsed, name) {
                Ok(()) => return Ok(()),
                Err(error) => refused = error,
            }
        }
        Err(refused)
    }
}

impl ServerCertVerifier for Listed {
    fn verify_server_cert(
        &self,
        certificate: &CertificateDer<'_>,
        between: &[CertificateDer<'_>],
        _: &ServerName<'_>,
        _: &[u8],
        now: UnixTime,
    ) -> Result<ServerCertVerified, rustls::Error> {
        self.check_server(certificate, between, now).map(|()| ServerCertVerified::assertion())
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
        certificate: &CertificateDer<'_>,
        signature: &DigitallySignedStruct,
    ) -> Result<HandshakeSignatureValid, rustls::Error> {
        verify_tls13_signature(message, certificate, signature, &self.algorithms)
    }

    fn supported_verify_schemes(&self) -> Vec<SignatureScheme> {
        self.algorithms.supported_schemes()
    }
}

impl ClientCertVerifier for Listed {
    fn root_hint_subjects(&self) -> &[DistinguishedName] {
        self.clients.root_hint_subjects()
    }

    fn verify_client_cert(
        &self,
        certificate: &CertificateDer<'_>,
        between: &[CertificateDer<'_>],
        now: UnixTime,
    ) -> Result<ClientCertVerified, rustls::Error> {
        self.check_client(certificate, between, now).map(|()| ClientCertVerified::assertion())
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
        certificate: &CertificateDer<'_>,
        signature: &DigitallySignedStruct,
    ) -> Result<HandshakeSignatureValid, rustls::Error> {
        verify_tls13_signature(message, certificate, signature, &self.algorithms)
    }

    fn supported_verify_schemes(&self) -> Vec<SignatureScheme> {
        self.algorithms.supported_schemes()
    }
}
