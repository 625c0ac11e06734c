//! How two nodes prove the cluster's secret to each other, in the heads of one HTTP exchange.
//!
//! The replica knocks with a nonce and a proof. A peer that does not prove the secret learns
//! nothing. The primary answers with a nonce of its own and a proof over both. The replica's hello,
//! the first unit of the request's body, proves both nonces once more. A recorded knock is
//! therefore worth nothing.
//!
//! A node that only asks how another stands ([`STANDING_PATH`]) knocks in the same way. Any node
//! answers it. The request's body is a proof over both nonces, and the response's is a STANDING,
//! with a proof over both nonces and what it says.
//!
//! An operator's command ([`COMMAND_PATH`]) comes in the same way, with keys of its own: the proof
//! is over both nonces and the command. No question of a node can be taken for one.
//!
//! Who asks the members that keep a lease's record ([`MEMBERS_PATH`]) proves both nonces once more,
//! with keys of its own. What follows in the bodies is said inside the channel.
//!
//! Who forwards an application's requests ([`FORWARD_PATH`]) does so, too. A byte in the response's
//! body says whether they are served; then each further exchange on the connection is such a
//! request. These connections are told apart within TLS already, and are always private.
//!
//! A follower proves all of this by a secret of followers, and is answered by the same one. A
//! member takes an answer of none but members. See [`Rights`](crate::secret::Rights).
//!
//! All of these are said inside a private channel, and each proof covers that channel's
//! [`Binding`]: it holds on no other connection. Only nodes that may do without TLS say them in the
//! clear.

mod dial;
mod proofs;
mod refusal;
#[cfg(test)]
mod tests;
mod tunnel;

use http::{HeaderMap, HeaderName, HeaderValue, StatusCode};

use crate::channel::{Binding, Channel};
use crate::context::NodeContext;
use crate::error::{Error, PeerProblem, Result};
use crate::hex::{hex, unhex};
use crate::peer::{Incarnation, NodeId};
use crate::random;
use crate::secret::{Keyring, PROOF_BYTES, Proved, Purpose};
use crate::wire::HELLO_PROOF_BYTES;

pub(crate) use proofs::*;
pub(crate) use refusal::Refusal;
pub(crate) use tunnel::{TUNNEL_PATH, TunnelKnock, UsedHeads};

/// The version of the stream's protocol.
pub(crate) const VERSION: u32 = 3;
/// What follows the replication endpoint's path in a stream's URL.
pub(crate) const STREAM_PATH: &str = "/v1/stream";
/// The same for the question how a node stands.
pub(crate) const STANDING_PATH: &str = "/v1/standing";
/// The same for an operator's command.
pub(crate) const COMMAND_PATH: &str = "/v1/command";
/// The same for the members that keep the lease's record.
pub(crate) const MEMBERS_PATH: &str = "/v1/members";
/// The same for requests of the application.
pub(crate) const FORWARD_PATH: &str = "/v1/forward";
/// What the body of the answer to that begins with: the application takes requests, or does not.
pub(crate) const FORWARDS_SERVED: u8 = b'+';
pub(crate) const FORWARDS_NOT_SERVED: u8 = b'-';
/// The stream's content type: not one that compression layers have on their lists.
pub(crate) const CONTENT_TYPE: &str = "application/vnd.replite.stream";
/// Bytes of a nonce.
const NONCE_BYTES: usize = 32;
const _: () = assert!(HELLO_PROOF_BYTES == PROOF_BYTES);

const H_VERSION: HeaderName = HeaderName::from_static("replite-version");
const H_CLUSTER: HeaderName = HeaderName::from_static("replite-cluster");
const H_DATABASE: HeaderName = HeaderName::from_static("replite-database");
const H_NODE: HeaderName = HeaderName::from_static("replite-node");
const H_INCARNATION: HeaderName = HeaderName::from_static("replite-incarnation");
const H_NONCE: HeaderName = HeaderName::from_static("replite-nonce");
const H_PROOF: HeaderName = HeaderName::from_static("replite-proof");
const H_REFUSED: HeaderName = HeaderName::from_static("replite-refused");
const H_PRIMARY: HeaderName = HeaderName::from_static("replite-primary");

/// The word for [`Refusal::Stopping`].
pub(crate) const STOPPING: &str = "stopping";

/// A random number that is used once.
pub(crate) type Nonce = [u8; NONCE_BYTES];

/// The replica's head: who it is and what it wants.
#[derive(Clone, PartialEq, Eq, Debug)]
pub(crate) struct Knock {
    pub(crate) version: u32,
    pub(crate) cluster: String,
    pub(crate) database: String,
    pub(crate) node: NodeId,
    pub(crate) incarnation: Incarnation,
    pub(crate) nonce: Nonce,
    /// The connection that it is said on; it does not travel.
    pub(crate) binding: Binding,
}

/// The primary's head.
#[derive(Clone, PartialEq, Eq, Debug)]
pub(crate) struct Answer {
    pub(crate) node: NodeId,
    pub(crate) incarnation: Incarnation,
    pub(crate) nonce: Nonce,
}

/// A fresh nonce.
pub(crate) fn nonce() -> Result<Nonce> {
    random::array()
}

/// Who knocks: a node, or an operator's program under an id of its own.
#[derive(Clone, Debug)]
pub(crate) struct Asker {
    pub(crate) keys: Keyring,
    pub(crate) cluster: String,
    pub(crate) database: String,
    pub(crate) node: NodeId,
    pub(crate) incarnation: Incarnation,
    pub(crate) channel: Channel,
}

impl Asker {
    pub(crate) fn of(node: &NodeContext) -> Asker {
        Asker {
            keys: node.keys.clone(),
            cluster: node.cluster.clone(),
            database: node.database.clone(),
            node: node.me.node,
            incarnation: node.me.incarnation,
            channel: node.channel.clone(),
        }
    }
}

impl Knock {
    /// A fresh one, to be said on this connection.
    pub(crate) fn by(asker: &Asker, binding: Binding) -> Result<Knock> {
        Ok(Knock {
            version: VERSION,
            cluster: asker.cluster.clone(),
            database: asker.database.clone(),
            node: asker.node,
            incarnation: asker.incarnation,
            nonce: nonce()?,
            binding,
        })
    }

    pub(crate) fn headers(&self, keys: &Keyring) -> Result<HeaderMap> {
        let mut headers = HeaderMap::new();
        headers.insert(H_VERSION, self.version.into());
        headers.insert(H_CLUSTER, text(&self.cluster)?);
        headers.insert(H_DATABASE, text(&self.database)?);
        headers.insert(H_NODE, text(&self.node.to_string())?);
        headers.insert(H_INCARNATION, text(&self.incarnation.to_string())?);
        headers.insert(H_NONCE, text(&hex(&self.nonce))?);
        headers.insert(H_PROOF, text(&hex(&self.proof(keys)))?);
        Ok(headers)
    }

    /// Reads a knock that came on this connection, and by which secret it is proved.
    pub(crate) fn read(
        headers: &HeaderMap,
        keys: &Keyring,
        binding: Binding,
    ) -> Result<(Knock, Proved), Stranger> {
        let (knock, proof) = Knock::fields(headers, binding).ok_or(Stranger::Passer)?;
        let version = knock.version.to_le_bytes();
        let proved = keys.proved(Purpose::Knock, &knock.parts(&version), &proof);
        proved.map(|proved| (knock.clone(), proved)).ok_or(Stranger::OtherSecret(knock.node))
    }

    fn fields(headers: &HeaderMap, binding: Binding) -> Option<(Knock, [u8; PROOF_BYTES])> {
        let knock = Knock {
            version: field(headers, &H_VERSION)?.parse().ok()?,
            cluster: field(headers, &H_CLUSTER)?.to_owned(),
            database: field(headers, &H_DATABASE)?.to_owned(),
            node: field(headers, &H_NODE)?.parse().ok()?,
            incarnation: field(headers, &H_INCARNATION)?.parse().ok()?,
            nonce: unhex(field(headers, &H_NONCE)?)?,
            binding,
        };
        let proof = unhex(field(headers, &H_PROOF)?)?;
        Some((knock, proof))
    }

    fn proof(&self, keys: &Keyring) -> [u8; PROOF_BYTES] {
        keys.prove(Purpose::Knock, &self.parts(&self.version.to_le_bytes()))
    }

    fn parts<'a>(&'a self, version: &'a [u8]) -> [&'a [u8]; 9] {
        let [exporter, client, server] = self.binding.parts();
        [
            &self.nonce,
            self.cluster.as_bytes(),
            self.database.as_bytes(),
            self.node.as_bytes(),
            self.incarnation.as_bytes(),
            version,
            exporter,
            client,
            server,
        ]
    }
}

/// A peer that does not prove the secret, and learns nothing.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(crate) enum Stranger {
    /// What it sends is no knock.
    Passer,
    /// A whole knock, by another secret; the node that it says to be.
    OtherSecret(NodeId),
}

impl Answer {
    pub(crate) fn headers(&self, knock: &Knock, keys: &Keyring) -> Result<HeaderMap> {
        let mut headers = HeaderMap::new();
        let version = VERSION.to_le_bytes();
        let proof = keys.prove(Purpose::Answer, &self.parts(knock, &version));
        headers.insert(H_VERSION, VERSION.into());
        headers.insert(H_NODE, text(&self.node.to_string())?);
        headers.insert(H_INCARNATION, text(&self.incarnation.to_string())?);
        headers.insert(H_NONCE, text(&hex(&self.nonce))?);
        headers.insert(H_PROOF, text(&hex(&proof))?);
        of_stream(&mut headers);
        Ok(headers)
    }

    /// Reads an answer. `None`: this is no answer of ours at all. An error: it is one, but a wrong
    /// one.
    pub(crate) fn read(
        headers: &HeaderMap,
        knock: &Knock,
        keys: &Keyring,
    ) -> Option<Result<(Answer, Proved), PeerProblem>> {
        let version: u32 = field(headers, &H_VERSION)?.parse().ok()?;
        let proof: [u8; PROOF_BYTES] = unhex(field(headers, &H_PROOF)?)?;
        let answer = Answer {
            node: field(headers, &H_NODE)?.parse().ok()?,
            incarnation: field(headers, &H_INCARNATION)?.parse().ok()?,
            nonce: unhex(field(headers, &H_NONCE)?)?,
        };
        if version != VERSION {
            return Some(Err(PeerProblem::Version { theirs: version, ours: VERSION }));
        }
        let proved = keys.proved(Purpose::Answer, &answer.parts(knock, &version.to_le_bytes()), &proof);
        Some(proved.map(|proved| (answer, proved)).ok_or(PeerProblem::Secret))
    }

    fn parts<'a>(&'a self, knock: &'a Knock, version: &'a [u8]) -> [&'a [u8]; 10] {
        let [exporter, client, server] = knock.binding.parts();
        [
            &knock.nonce,
            &self.nonce,
            knock.cluster.as_bytes(),
            knock.database.as_bytes(),
            self.node.as_bytes(),
            self.incarnation.as_bytes(),
            version,
            exporter,
            client,
            server,
        ]
    }
}

/// What the head of a response means to the node that knocked. `Err(None)`: it is no word of ours.
pub(crate) fn read_head(
    (status, headers): (StatusCode, &HeaderMap),
    knock: &Knock,
    keys: &Keyring,
) -> Result<(Answer, Proved), Option<PeerProblem>> {
    if status == StatusCode::OK {
        return Answer::read(headers, knock, keys).ok_or(None)?.map_err(Some);
    }
    Err(Refusal::read(headers, &knock.database))
}

/// What a response's head says so that what is between leaves the body as it is.
pub(crate) fn of_stream(headers: &mut HeaderMap) {
    headers.insert(http::header::CONTENT_TYPE, HeaderValue::from_static(CONTENT_TYPE));
    // Some layers compress whatever the other headers say. They leave alone what says how it is
    // encoded.
    headers.insert(http::header::CONTENT_ENCODING, HeaderValue::from_static("identity"));
    headers.insert(http::header::CACHE_CONTROL, HeaderValue::from_static("no-store, no-transform"));
    headers.insert(HeaderName::from_static("x-accel-buffering"), HeaderValue::from_static("no"));
}

fn field<'a>(headers: &'a HeaderMap, name: &HeaderName) -> Option<&'a str> {
    std::str::from_utf8(headers.get(name)?.as_bytes()).ok()
}

fn text(value: &str) -> Result<HeaderValue> {
    HeaderValue::from_bytes(value.as_bytes())
        .map_err(|_| Error::Config(format!("{value:?} has characters that no HTTP header can carry")))
}
