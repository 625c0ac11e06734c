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

use bytes::BytesMut;
use http::{HeaderMap, HeaderName, HeaderValue, StatusCode};

use crate::context::NodeContext;
use crate::error::{Error, PeerProblem, Result, shown};
use crate::hex::{hex, unhex};
use crate::peer::{Incarnation, NodeId};
use crate::random;
use crate::secret::{Keyring, PROOF_BYTES, Proved, Purpose};
use crate::wire::{self, HEADER_BYTES, HELLO_PROOF_BYTES, Hello, Message, Standing};

/// The version of the stream's protocol.
pub(crate) const VERSION: u32 = 1;
/// What follows the replication endpoint's path in a stream's URL.
pub(crate) const STREAM_PATH: &str = "/v1/stream";
/// The same for the question how a node stands.
pub(crate) const STANDING_PATH: &str = "/v1/standing";
/// The same for an operator's command.
pub(crate) const COMMAND_PATH: &str = "/v1/command";
/// The stream's content type: not one that compression layers have on their lists.
pub(crate) const CONTENT_TYPE: &str = "application/vnd.replite.stream";
/// Bytes of a nonce.
const NONCE_BYTES: usize = 32;
/// Bytes of a refusal's words that are shown.
const SHOWN_MAX_BYTES: usize = 128;
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
}

impl Knock {
    /// A fresh one of this node.
    pub(crate) fn of(node: &NodeContext) -> Result<Knock> {
        Knock::by(&Asker {
            keys: node.keys.clone(),
            cluster: node.cluster.clone(),
            database: node.database.clone(),
            node: node.me.node,
            incarnation: node.me.incarnation,
        })
    }

    /// A fresh one.
    pub(crate) fn by(asker: &Asker) -> Result<Knock> {
        Ok(Knock {
            version: VERSION,
            cluster: asker.cluster.clone(),
            database: asker.database.clone(),
            node: asker.node,
            incarnation: asker.incarnation,
            nonce: nonce()?,
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

    /// Reads a knock.
    pub(crate) fn read(headers: &HeaderMap, keys: &Keyring) -> Result<Knock, Stranger> {
        let (knock, proof) = Knock::fields(headers).ok_or(Stranger::Passer)?;
        let version = knock.version.to_le_bytes();
        let proved = keys.verify(Purpose::Knock, &knock.parts(&version), &proof);
        if proved { Ok(knock) } else { Err(Stranger::OtherSecret(knock.node)) }
    }

    fn fields(headers: &HeaderMap) -> Option<(Knock, [u8; PROOF_BYTES])> {
        let knock = Knock {
            version: field(headers, &H_VERSION)?.parse().ok()?,
            cluster: field(headers, &H_CLUSTER)?.to_owned(),
            database: field(headers, &H_DATABASE)?.to_owned(),
            node: field(headers, &H_NODE)?.parse().ok()?,
            incarnation: field(headers, &H_INCARNATION)?.parse().ok()?,
            nonce: unhex(field(headers, &H_NONCE)?)?,
        };
        let proof = unhex(field(headers, &H_PROOF)?)?;
        Some((knock, proof))
    }

    fn proof(&self, keys: &Keyring) -> [u8; PROOF_BYTES] {
        keys.prove(Purpose::Knock, &self.parts(&self.version.to_le_bytes()))
    }

    fn parts<'a>(&'a self, version: &'a [u8]) -> [&'a [u8]; 6] {
        [
            &self.nonce,
            self.cluster.as_bytes(),
            self.database.as_bytes(),
            self.node.as_bytes(),
            self.incarnation.as_bytes(),
            version,
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
        headers.insert(http::header::CONTENT_TYPE, HeaderValue::from_static(CONTENT_TYPE));
        // Some layers compress whatever the other headers say. They leave alone what says how it is
        // encoded.
        headers.insert(http::header::CONTENT_ENCODING, HeaderValue::from_static("identity"));
        headers.insert(http::header::CACHE_CONTROL, HeaderValue::from_static("no-store, no-transform"));
        headers.insert(HeaderName::from_static("x-accel-buffering"), HeaderValue::from_static("no"));
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

    fn parts<'a>(&'a self, knock: &'a Knock, version: &'a [u8]) -> [&'a [u8]; 7] {
        [
            &knock.nonce,
            &self.nonce,
            knock.cluster.as_bytes(),
            knock.database.as_bytes(),
            self.node.as_bytes(),
            self.incarnation.as_bytes(),
            version,
        ]
    }
}

/// Puts the proof into a hello.
pub(crate) fn seal_hello(hello: &mut Hello, knock: &Knock, answer: &Nonce, keys: &Keyring) {
    let rest = hello_rest(hello);
    hello.proof = keys.prove(Purpose::Hello, &[&knock.nonce, answer, &rest]);
}

/// By which secret a hello proves that its sender saw our nonce, if it does and belongs to this
/// knock. `payload` is that of the hello's unit: the proof is over the bytes that came, not over
/// what we would have sent.
pub(crate) fn hello_holds(
    hello: &Hello,
    payload: &[u8],
    knock: &Knock,
    answer: &Nonce,
    keys: &Keyring,
) -> Option<Proved> {
    let rest = payload.get(HELLO_PROOF_BYTES..).unwrap_or_default();
    let fits = hello.peer.node == knock.node && hello.peer.incarnation == knock.incarnation;
    keys.proved(Purpose::Hello, &[&knock.nonce, answer, rest], &hello.proof).filter(|_| fits)
}

/// What a hello's proof covers: its payload after the proof.
fn hello_rest(hello: &Hello) -> Vec<u8> {
    after_proof(&Message::Hello(hello.clone()))
}

/// The payload after the proof.
fn after_proof(message: &Message<'_>) -> Vec<u8> {
    let mut bytes = BytesMut::new();
    wire::encode(message, &mut bytes);
    bytes.split_off(HEADER_BYTES + HELLO_PROOF_BYTES).to_vec()
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

/// The proof that who knocked saw our nonce, and asks how this node stands.
pub(crate) fn question(knock: &Knock, answer: &Nonce, keys: &Keyring) -> [u8; PROOF_BYTES] {
    keys.prove(Purpose::Question, &[&knock.nonce, answer])
}

/// Whether that holds.
pub(crate) fn question_holds(proof: &[u8], knock: &Knock, answer: &Nonce, keys: &Keyring) -> bool {
    keys.verify(Purpose::Question, &[&knock.nonce, answer], proof)
}

/// Puts the proof into what a node says of itself.
pub(crate) fn seal_standing(standing: &mut Standing, knock: &Knock, answer: &Nonce, keys: &Keyring) {
    let rest = after_proof(&Message::Standing(standing.clone()));
    standing.proof = keys.prove(Purpose::Standing, &[&knock.nonce, answer, &rest]);
}

/// Whether the node that answered the knock said this, to this knock. `payload` is that of the
/// unit, as it came.
pub(crate) fn standing_holds(
    standing: &Standing,
    payload: &[u8],
    (knock, answer): (&Knock, &Answer),
    keys: &Keyring,
) -> bool {
    let rest = payload.get(HELLO_PROOF_BYTES..).unwrap_or_default();
    let fits = standing.peer.node == answer.node && standing.peer.incarnation == answer.incarnation;
    fits && keys.verify(Purpose::Standing, &[&knock.nonce, &answer.nonce, rest], &standing.proof)
}

/// The proof that who knocked saw our nonce, and gives this command.
pub(crate) fn prove_command(
    knock: &Knock,
    answer: &Nonce,
    command: &[u8],
    keys: &Keyring,
) -> [u8; PROOF_BYTES] {
    keys.prove(Purpose::Command, &[&knock.nonce, answer, command])
}

/// Whether that holds.
pub(crate) fn command_holds(
    proof: &[u8],
    command: &[u8],
    (knock, answer): (&Knock, &Nonce),
    keys: &Keyring,
) -> bool {
    keys.verify(Purpose::Command, &[&knock.nonce, answer, command], proof)
}

/// The proof that the node which answered the knock says this to the command.
pub(crate) fn prove_command_answer(
    knock: &Knock,
    answer: &Nonce,
    said: &[u8],
    keys: &Keyring,
) -> [u8; PROOF_BYTES] {
    keys.prove(Purpose::CommandAnswer, &[&knock.nonce, answer, said])
}

/// Whether that holds.
pub(crate) fn command_answer_holds(
    proof: &[u8],
    said: &[u8],
    (knock, answer): (&Knock, &Nonce),
    keys: &Keyring,
) -> bool {
    keys.verify(Purpose::CommandAnswer, &[&knock.nonce, answer, said], proof)
}

/// Why a primary refuses a peer that did prove the secret.
#[derive(Clone, PartialEq, Eq, Debug)]
pub(crate) enum Refusal {
    Version,
    /// It belongs to this other cluster.
    Cluster(String),
    Database,
    /// The replication URL of the primary, if it is known.
    NotPrimary(Option<String>),
    DuplicateNode,
    Http2,
    Path,
    Busy,
    Stopping,
}

impl Refusal {
    pub(crate) fn status(&self) -> StatusCode {
        match self {
            Refusal::Version | Refusal::Cluster(_) | Refusal::DuplicateNode => StatusCode::CONFLICT,
            Refusal::Database | Refusal::Path => StatusCode::NOT_FOUND,
            Refusal::NotPrimary(_) => StatusCode::MISDIRECTED_REQUEST,
            Refusal::Http2 => StatusCode::UPGRADE_REQUIRED,
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
            Refusal::DuplicateNode => "duplicate-node".into(),
            Refusal::Http2 => "http2".into(),
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
            "duplicate-node" => PeerProblem::DuplicateNode,
            "http2" => PeerProblem::NotHttp2,
            other => PeerProblem::Refused(shown(other, SHOWN_MAX_BYTES)),
        })
    }
}

fn field<'a>(headers: &'a HeaderMap, name: &HeaderName) -> Option<&'a str> {
    std::str::from_utf8(headers.get(name)?.as_bytes()).ok()
}

fn text(value: &str) -> Result<HeaderValue> {
    HeaderValue::from_bytes(value.as_bytes())
        .map_err(|_| Error::Config(format!("{value:?} has characters that no HTTP header can carry")))
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::secret::Secret;

    fn keys(byte: u8) -> Keyring {
        Keyring::new(&[Secret::fixed([byte; 32])]).unwrap()
    }

    fn knock() -> Knock {
        Knock {
            version: VERSION,
            cluster: "blå".into(),
            database: "app".into(),
            node: NodeId::from_u128(1),
            incarnation: Incarnation::from_u128(2),
            nonce: [7; 32],
        }
    }

    #[test]
    fn a_knock_survives_its_headers_and_holds_for_every_field() {
        let headers = knock().headers(&keys(1)).unwrap();
        assert_eq!(Knock::read(&headers, &keys(1)), Ok(knock()));
        let other = Err(Stranger::OtherSecret(knock().node));
        assert_eq!(Knock::read(&headers, &keys(2)), other, "another secret");
        for name in [H_VERSION, H_CLUSTER, H_DATABASE, H_NODE, H_INCARNATION, H_NONCE, H_PROOF] {
            let mut missing = headers.clone();
            missing.remove(&name);
            assert_eq!(Knock::read(&missing, &keys(1)), Err(Stranger::Passer), "without {name}");
        }
        for (name, value) in [
            (H_VERSION, "2".to_string()),
            (H_CLUSTER, "other".into()),
            (H_DATABASE, "other".into()),
            (H_NODE, NodeId::from_u128(9).to_string()),
            (H_INCARNATION, Incarnation::from_u128(9).to_string()),
            (H_NONCE, hex(&[8; 32])),
            (H_PROOF, hex(&[8; 32])),
            (H_PROOF, "zz".repeat(32)),
            (H_PROOF, "00".repeat(31)),
        ] {
            let mut changed = headers.clone();
            changed.insert(name.clone(), text(&value).unwrap());
            assert!(Knock::read(&changed, &keys(1)).is_err(), "{name} changed");
        }
    }

    #[test]
    fn an_answer_holds_for_the_knock_that_it_answers() {
        let answer =
            Answer { node: NodeId::from_u128(5), incarnation: Incarnation::from_u128(6), nonce: [9; 32] };
        let headers = answer.headers(&knock(), &keys(1)).unwrap();
        let read = |headers: &HeaderMap, knock: &Knock, k| Answer::read(headers, knock, &keys(k));
        assert_eq!(read(&headers, &knock(), 1).unwrap().unwrap().0, answer);
        assert!(matches!(read(&headers, &knock(), 2), Some(Err(PeerProblem::Secret))));
        let other = Knock { nonce: [8; 32], ..knock() };
        assert!(matches!(read(&headers, &other, 1), Some(Err(PeerProblem::Secret))), "a recorded answer");
        let mut newer = headers.clone();
        newer.insert(H_VERSION, 2u32.into());
        assert!(matches!(read(&newer, &knock(), 1), Some(Err(PeerProblem::Version { theirs: 2, .. }))));
        assert!(read(&HeaderMap::new(), &knock(), 1).is_none());
    }

    #[test]
    fn refusals_are_understood_by_the_other_side() {
        let read = |r: Refusal| Refusal::read(&r.headers(), "app").unwrap().to_string();
        assert_eq!(read(Refusal::Cluster("blå".into())), "it belongs to cluster \"blå\"");
        assert_eq!(read(Refusal::Database), "it does not serve database \"app\"");
        assert_eq!(read(Refusal::NotPrimary(None)), "it is not the primary");
        assert_eq!(read(Refusal::Busy), "it refused: busy");
        let Some(PeerProblem::Version { theirs: 1, ours: 1 }) =
            Refusal::read(&Refusal::Version.headers(), "app")
        else {
            panic!("version")
        };
        let headers = Refusal::NotPrimary(Some("http://a/_replite".into())).headers();
        assert_eq!(headers[H_PRIMARY], "http://a/_replite");
        assert!(Refusal::read(&HeaderMap::new(), "app").is_none());
    }
}
