//! Why TLS with a peer did not come about, where keys and certificates are the reason.

use std::io;

use rustls::{AlertDescription, CertificateError, PeerIncompatible};

use crate::error::{PeerProblem, shown};

/// Bytes of what a certificate says that are shown.
const SHOWN_MAX_BYTES: usize = 256;

/// What TLS 1.2 has; it is not spoken.
pub(super) fn old_version() -> rustls::Error {
    rustls::Error::General("only TLS 1.3 is spoken".into())
}

/// What is wrong with the peer, in the eyes of a node that has certificates or none.
pub(super) fn problem(error: &io::Error, certificates: bool) -> Option<PeerProblem> {
    let error = error.get_ref()?.downcast_ref::<rustls::Error>()?;
    match error {
        rustls::Error::InvalidCertificate(_) | rustls::Error::NoCertificatesPresented => {
            certificates.then(|| PeerProblem::Certificate(certificate_words(error)))
        }
        rustls::Error::PeerIncompatible(PeerIncompatible::IncorrectCertificateTypeExtension)
        | rustls::Error::AlertReceived(AlertDescription::HandshakeFailure) => {
            Some(if certificates { PeerProblem::NoCertificate } else { PeerProblem::NeedsCertificate })
        }
        rustls::Error::AlertReceived(alert) if certificates => {
            alert_words(*alert).map(PeerProblem::CertificateRefused)
        }
        _ => None,
    }
}

/// Why this node refuses a certificate.
pub(super) fn certificate_words(error: &rustls::Error) -> String {
    let error = match error {
        rustls::Error::InvalidCertificate(error) => error,
        rustls::Error::NoCertificatesPresented => return "it showed none".into(),
        other => return shown(&other.to_string(), SHOWN_MAX_BYTES),
    };
    match error {
        CertificateError::UnknownIssuer => "no root of this node leads to it".into(),
        CertificateError::NotValidForName => "it is valid for no name that this node allows".into(),
        CertificateError::NotValidForNameContext { presented, .. } => {
            let names: Vec<_> = presented.iter().map(|name| plain(name)).collect();
            let names = shown(&names.join(", "), SHOWN_MAX_BYTES);
            format!("it is valid for no name that this node allows; its own are: {names}")
        }
        CertificateError::InvalidPurpose | CertificateError::InvalidPurposeContext { .. } => {
            format!("it has to be good for servers and for clients, where it says for what at all ({error})")
        }
        CertificateError::Expired | CertificateError::ExpiredContext { .. } => "it has expired".into(),
        CertificateError::NotValidYet | CertificateError::NotValidYetContext { .. } => {
            "it is not valid yet".into()
        }
        other => shown(&other.to_string(), SHOWN_MAX_BYTES),
    }
}

/// A name without what says that it is one of DNS.
fn plain(name: &str) -> &str {
    name.strip_prefix("DnsName(\"").and_then(|name| name.strip_suffix("\")")).unwrap_or(name)
}

/// Why the peer refuses this node's certificate, as far as an alert says so.
fn alert_words(alert: AlertDescription) -> Option<String> {
    let words = match alert {
        AlertDescription::UnknownCA => "no root that it has leads to this node's certificate",
        AlertDescription::CertificateExpired => {
            "by its clock the certificate has expired, or is not valid yet"
        }
        AlertDescription::BadCertificate => "the certificate is valid for no name that it allows",
        AlertDescription::UnsupportedCertificate => {
            "the certificate has to be good for servers and for clients, where it says for what at all"
        }
        AlertDescription::CertificateRequired => "it was shown none",
        AlertDescription::CertificateRevoked
        | AlertDescription::CertificateUnknown
        | AlertDescription::AccessDenied
        | AlertDescription::DecryptError => return Some(format!("alert {alert:?}")),
        _ => return None,
    };
    Some(words.into())
}
