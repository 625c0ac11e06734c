//! Knocking at a peer's endpoint.

use http::{HeaderMap, StatusCode};
use tokio_util::sync::CancellationToken;
use tokio_util::task::TaskTracker;

use crate::channel::{Binding, Plaintext};
use crate::error::{Error, PeerProblem};
use crate::handshake::{Asker, CONTENT_TYPE, H_PROOF, Knock, Refusal, TUNNEL_PATH, TunnelKnock};
use crate::net::{self, Endpoint, OpenResponse, PrivateConnection, Scheme, Tunnel, Way};

impl Asker {
    /// Dials a peer and knocks at one of its paths. Returns with the head of the response; what
    /// that says is for the caller to read. The connection's tasks are the tracker's.
    ///
    /// # Errors
    /// What is wrong with the peer, or with the connection.
    ///
    /// # Cancel safety
    /// Dropping the future closes the connection.
    pub(crate) async fn knock(
        &self,
        to: &Endpoint,
        path: &str,
        tracker: &TaskTracker,
    ) -> Result<(Knock, OpenResponse), PeerProblem> {
        // What anybody can prove is worth something on this machine only, with TLS or without.
        let open = self.keys.is_open();
        let local = match (to.scheme, self.channel.plaintext()) {
            (Scheme::Replite, _) => return self.knock_by((Way::Direct, open), to, path, tracker).await,
            (Scheme::Http, None) => return self.knock_by((self.tunnel()?, open), to, path, tracker).await,
            (Scheme::Http, Some(allowed)) => open || allowed == Plaintext::Loopback,
        };
        let (knock, opened) = self.knock_by((Way::Clear, local), to, path, tracker).await?;
        let private = opened.status != StatusCode::OK && Refusal::is_private(&opened.headers);
        if !(private && self.channel.has_tls()) {
            return Ok((knock, opened));
        }
        drop(opened);
        self.knock_by((self.tunnel()?, open), to, path, tracker).await
    }

    /// Dials a peer for a connection that an application's requests go over, and makes the knock
    /// that is to be said on it. It is always private.
    ///
    /// # Errors
    /// What is wrong with the peer, or with the connection.
    ///
    /// # Cancel safety
    /// Dropping the future closes the connection.
    pub(crate) async fn open_for_forwards(
        &self,
        to: &Endpoint,
        tracker: &TaskTracker,
        stop: &CancellationToken,
    ) -> Result<(Knock, PrivateConnection), PeerProblem> {
        let way = match to.scheme {
            Scheme::Replite => Way::Direct,
            Scheme::Http => self.tunnel()?,
        };
        let local = self.keys.is_open();
        match net::open_for_forwards(&self.channel, (way, local), to, (tracker, stop)).await? {
            Ok(opened) => Ok((Knock::by(self, opened.binding).map_err(ours)?, opened)),
            Err((_, headers)) => {
                Err(Refusal::read(&headers, &self.database).unwrap_or(PeerProblem::NotFound))
            }
        }
    }

    fn tunnel(&self) -> Result<Way, PeerProblem> {
        let headers = TunnelKnock::headers(self).map_err(ours)?;
        Ok(Way::Tunnel(Tunnel { path: TUNNEL_PATH, headers, content_type: CONTENT_TYPE }))
    }

    async fn knock_by(
        &self,
        way: (Way, bool),
        to: &Endpoint,
        path: &str,
        tracker: &TaskTracker,
    ) -> Result<(Knock, OpenResponse), PeerProblem> {
        // Replaced by what is said, where it comes to that.
        let mut knock = Knock::by(self, Binding::NONE).map_err(ours)?;
        let mut head = |binding| -> Result<HeaderMap, PeerProblem> {
            knock.binding = binding;
            knock.headers(&self.keys).map_err(ours)
        };
        let clear = matches!(way.0, Way::Clear);
        let mut opened = net::open(&self.channel, way, to, path, &mut head, tracker).await?;
        if !(clear || knock.binding.is_private()) {
            // What refused the tunnel answers no knock.
            opened.headers.remove(H_PROOF);
        }
        Ok((knock, opened))
    }
}

/// An error of this node's own.
fn ours(error: Error) -> PeerProblem {
    PeerProblem::Connection(error.to_string())
}
