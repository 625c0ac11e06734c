//! Why a peer that proved the secret is not let in, and how that is said.

use http::{HeaderMap, HeaderValue, StatusCode};

use crate::error::{PeerProblem, shown};
use crate::handshake::{H_PRIMARY, H_REFUSED, STOPPING, VERSION, field, text};
use crate::peer::PeerKey;

/// Bytes of a refusal's words that are shown.
const SHOWN_MAX_BYTES: usize = 128;
/// The word for [`Refusal::Private`].
const PRIVATE: &str = "tls";

/// Why a primary refuses a peer that did prove the secret.
#[derive(Clone, PartialEq, Eq, Debug)]
pub(crate) enum Refusal {
    Version,
    /// It belongs to this other cluster.
    Cluster(String),
    Database,
    /// The replication URL of the primary, if it is known.
    NotPrimary(Option<String>),
    /// Another live process has its node id, and this key.
    DuplicateNode(Option<PeerKey>),
    Http2,
    /// It speaks in the clear, which this node does not.
    Private,
    /// It asks for TLS, which this node does not have.
    Plaintext,
    /// It is a follower, and asks for what members only may.
    Follower,
    Path,
    Busy,
    Stopping,
}

impl Refusal {
    pub(crate) fn status(&self) -> StatusCode {
        match self {
            Refusal::Version | Refusal::Cluster(_) | Refusal::DuplicateNode(_) => StatusCode::CONFLICT,
            Refusal::Database | Refusal::Path => StatusCode::NOT_FOUND,
            Refusal::NotPrimary(_) => StatusCode::MISDIRECTED_REQUEST,
            Refusal::Http2 | Refusal::Private => StatusCode::UPGRADE_REQUIRED,
            Refusal::Plaintext => StatusCode::NOT_IMPLEMENTED,
            Refusal::Follower => StatusCode::FORBIDDEN,
            Refusal::Busy | Refusal::Stopping => StatusCode::SERVICE_UNAVAILABLE,
        }
    }

    pub(crate) fn headers(&self) -> HeaderMap {
        let mut headers = HeaderMap::new();
        let word = match self {
            Refusal::Version => format!("version={VERSION}"),
            Refusal::Cluster(ours) => format!("cluster={ours}"),
            Refusal::Database => "database".into(),
            Refusal::NotPrimary(_) => "not-primary".into(),
            Refusal::DuplicateNode(None) => "duplicate-node".into(),
            Refusal::DuplicateNode(Some(key)) => format!("duplicate-node={key}"),
            Refusal::Http2 => "http2".into(),
            Refusal::Private => PRIVATE.into(),
            Refusal::Plaintext => "plaintext".into(),
            Refusal::Follower => "follower".into(),
            Refusal::Path => "path".into(),
            Refusal::Busy => "busy".into(),
            Refusal::Stopping => STOPPING.into(),
        };
        headers.insert(H_REFUSED, text(&word).unwrap_or_else(|_| HeaderValue::from_static("unspeakable")));
        if let Refusal::NotPrimary(Some(url)) = self
            && let Ok(url) = text(url)
        {
            headers.insert(H_PRIMARY, url);
        }
        headers
    }

    /// Whether a response's head says that the peer speaks TLS only.
    pub(super) fn is_private(headers: &HeaderMap) -> bool {
        field(headers, &H_REFUSED) == Some(PRIVATE)
    }

    /// What a refusal in a response's head means to the replica that asked.
    pub(crate) fn read(headers: &HeaderMap, database: &str) -> Option<PeerProblem> {
        let word = field(headers, &H_REFUSED)?;
        let (word, value) = word.split_once('=').unwrap_or((word, ""));
        Some(match word {
            "version" => PeerProblem::Version { theirs: value.parse().unwrap_or(0), ours: VERSION },
            // An error's text shows it escaped.
            "cluster" => PeerProblem::Cluster(value.chars().take(SHOWN_MAX_BYTES).collect()),
            "database" => PeerProblem::Database(database.to_owned()),
            "not-primary" => PeerProblem::NotPrimary,
            "duplicate-node" => PeerProblem::DuplicateNode(value.parse().ok()),
            "http2" => PeerProblem::NotHttp2,
            PRIVATE => PeerProblem::NeedsTls,
            "plaintext" => PeerProblem::NoTls,
            "follower" => PeerProblem::MembersOnly,
            other => PeerProblem::Refused(shown(other, SHOWN_MAX_BYTES)),
        })
    }
}
