//! How nodes know each other's requests: the hop proof, and the hint in a 421.

use std::net::SocketAddr;

use http::uri::Scheme;
use http::{HeaderMap, HeaderValue, Method};

use crate::hex::{Hex, unhex};
use crate::peer::NodeId;
use crate::secret::{Keyring, PROOF_BYTES, Purpose, SHORT_PROOF_BYTES};
use crate::txid::Epoch;

/// Nodes that a request is offered to, one after the other and by whatever layers, before it is
/// given up.
pub(super) const HOPS_MAX: u8 = 3;

const VERSION: &str = "v1";
/// The longest header value that is looked at. Version, count, node, epoch, client, scheme, the
/// other node and the proof have 220 bytes.
const HOP_TEXT_MAX_BYTES: usize = 240;
/// Stands for a field that there is none of.
const NONE: &str = "-";
/// The longest hint that is looked at: fixed fields and two URLs.
const HINT_TEXT_MAX_BYTES: usize = 2048;

/// A request that one node sends to another.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(super) struct Hop {
    /// 1 for the first node that the request is offered to.
    pub(super) count: u8,
    /// Who sends it.
    pub(super) from: NodeId,
    /// The newest epoch that the sender knows.
    pub(super) epoch: Epoch,
    /// The client's address, where the node that took the request knows it. The port is 0 where it
    /// knows the IP address only.
    pub(super) client: Option<SocketAddr>,
    /// What the client speaks, where that is known.
    pub(super) scheme: Option<ClientScheme>,
    /// Which node took the request from its client, where that is not the sender.
    pub(super) taken_by: Option<NodeId>,
}

/// What a client speaks with the node that took its request.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(super) enum ClientScheme {
    Http,
    Https,
}

impl ClientScheme {
    /// None of any other scheme.
    pub(super) fn of(scheme: &Scheme) -> Option<ClientScheme> {
        ClientScheme::read(scheme.as_str())
    }

    fn read(text: &str) -> Option<ClientScheme> {
        [ClientScheme::Http, ClientScheme::Https].into_iter().find(|scheme| scheme.as_str() == text)
    }

    pub(super) fn as_str(self) -> &'static str {
        match self {
            ClientScheme::Http => "http",
            ClientScheme::Https => "https",
        }
    }
}

/// The hop that a request came by, in its extensions. The outermost layer takes it out of the
/// headers. It may be meant for a layer below, which has another database and other keys.
#[derive(Clone)]
pub(super) struct Came {
    pub(super) value: HeaderValue,
    /// Who sent it here, as the outermost layer saw it: a node, or a client that made it up.
    pub(super) peer: Option<SocketAddr>,
    /// What was taken out of the headers because that is no known proxy. It is put back where a
    /// layer below proves the hop.
    pub(super) told: HeaderMap,
}

impl Came {
    /// How often the layers of all databases sent the request on. It is not proved: a layer can't
    /// prove the hop of another's. A client that makes one up has its own request refused, and
    /// nothing else.
    pub(super) fn count(&self) -> u8 {
        let count = || self.value.to_str().ok()?.split('.').nth(1)?.parse().ok();
        count().unwrap_or(0)
    }
}

/// What a hop's proof covers beside the hop itself.
#[derive(Clone, Copy)]
pub(super) struct About<'a> {
    pub(super) keys: &'a Keyring,
    /// The database's tag.
    pub(super) tag: &'a str,
    pub(super) method: &'a Method,
    /// Path and query.
    pub(super) target: &'a str,
}

impl Hop {
    /// The header's value. That of a follower proves nothing to any node: its request counts as one
    /// from outside. The count that it brings keeps such a request from going around.
    pub(super) fn text(&self, about: About<'_>) -> String {
        let fields = self.fields();
        let proof = about.keys.prove(Purpose::Hop, &proved(about, &fields));
        format!("{fields}.{}", Hex(&proof))
    }

    /// Reads a header's value; none when it is garbled or its proof does not hold.
    pub(super) fn verify(value: &HeaderValue, about: About<'_>) -> Option<Hop> {
        let text = value.to_str().ok().filter(|text| text.len() <= HOP_TEXT_MAX_BYTES)?;
        let (fields, proof) = text.rsplit_once('.')?;
        let proof: [u8; PROOF_BYTES] = unhex(proof)?;
        let mut split = fields.split('.');
        let mut next = || split.next();
        let (version, count, from, epoch) = (next()?, next()?, next()?, next()?);
        let (client, scheme, taken_by) = (next()?, next()?, next()?);
        if version != VERSION || next().is_some() {
            return None;
        }
        let hop = Hop {
            count: count.parse().ok()?,
            from: from.parse().ok()?,
            epoch: epoch.parse().ok()?,
            client: known(client, read_client)?,
            scheme: known(scheme, ClientScheme::read)?,
            taken_by: known(taken_by, |text| text.parse().ok())?,
        };
        about.keys.verify(Purpose::Hop, &proved(about, fields), &proof).then_some(hop)
    }

    fn fields(&self) -> String {
        let none = || NONE.to_owned();
        let client = self.client.map_or_else(none, client_text);
        let scheme = self.scheme.map_or(NONE, ClientScheme::as_str);
        let taken_by = self.taken_by.map_or_else(none, |node| format!("{:032x}", node.as_u128()));
        let (count, from, epoch) = (self.count, self.from.as_u128(), self.epoch);
        format!("{VERSION}.{count}.{from:032x}.{epoch}.{client}.{scheme}.{taken_by}")
    }
}

/// A field that may say that there is nothing; none when it is garbled.
fn known<T>(text: &str, read: impl FnOnce(&str) -> Option<T>) -> Option<Option<T>> {
    if text == NONE { Some(None) } else { read(text).map(Some) }
}

/// The bytes of the IP address and of the port, as digits. The zone of an IPv6 address means
/// nothing on another machine.
fn client_text(client: SocketAddr) -> String {
    let port = client.port().to_be_bytes();
    match client {
        SocketAddr::V4(v4) => format!("{}{}", Hex(&v4.ip().octets()), Hex(&port)),
        SocketAddr::V6(v6) => format!("{}{}", Hex(&v6.ip().octets()), Hex(&port)),
    }
}

fn read_client(text: &str) -> Option<SocketAddr> {
    if let Some([a, b, c, d, port @ ..]) = unhex::<6>(text) {
        return Some(([a, b, c, d], u16::from_be_bytes(port)).into());
    }
    let bytes: [u8; 18] = unhex(text)?;
    let (ip, port) = bytes.split_first_chunk::<16>()?;
    Some((*ip, u16::from_be_bytes(port.try_into().ok()?)).into())
}

fn proved<'a>(about: About<'a>, fields: &'a str) -> [&'a [u8]; 5] {
    [
        b"hop",
        about.tag.as_bytes(),
        about.method.as_str().as_bytes(),
        about.target.as_bytes(),
        fields.as_bytes(),
    ]
}

/// What a node that is not the primary tells the one that took it for the primary.
#[derive(Clone, PartialEq, Eq, Debug)]
pub(super) struct Hint {
    /// The newest epoch that it knows.
    pub(super) epoch: Epoch,
    /// The primary's app URL; empty when it knows none.
    pub(super) url: String,
    /// And its replication endpoint.
    pub(super) replication: String,
}

impl Hint {
    /// The header's value, as an answer to the hop of this text.
    pub(super) fn value(&self, keys: &Keyring, hop: &str) -> Option<HeaderValue> {
        // No URL has this in it, and no server takes it off an end, as it does with a space.
        let urls = format!("{}>{}", self.url, self.replication);
        let proof = keys.prove_short(Purpose::Hop, &hinted(hop, self.epoch, &urls).each());
        HeaderValue::try_from(format!("{VERSION}.{}.{}.{urls}", self.epoch, Hex(&proof))).ok()
    }

    /// Reads a header's value; none when its proof does not hold for the hop that was sent. So an
    /// app that answers 421 for reasons of its own, or a server that is no node, can't send
    /// requests elsewhere.
    pub(super) fn verify(value: &HeaderValue, keys: &Keyring, hop: &str) -> Option<Hint> {
        let text = value.to_str().ok().filter(|text| text.len() <= HINT_TEXT_MAX_BYTES)?;
        let mut split = text.splitn(4, '.');
        let mut next = || split.next();
        let (version, epoch, proof, urls) = (next()?, next()?, next()?, next()?);
        let proof: [u8; SHORT_PROOF_BYTES] = unhex(proof)?;
        let epoch: Epoch = epoch.parse().ok().filter(|_| version == VERSION)?;
        let (url, replication) = urls.split_once('>')?;
        let holds = keys.verify_short(Purpose::Hop, &hinted(hop, epoch, urls).each(), &proof);
        holds.then(|| Hint { epoch, url: url.to_owned(), replication: replication.to_owned() })
    }
}

struct Hinted<'a> {
    hop: &'a str,
    epoch: [u8; Epoch::BYTES],
    url: &'a str,
}

impl Hinted<'_> {
    fn each(&self) -> [&[u8]; 4] {
        [b"hint", self.hop.as_bytes(), &self.epoch, self.url.as_bytes()]
    }
}

fn hinted<'a>(hop: &'a str, epoch: Epoch, url: &'a str) -> Hinted<'a> {
    Hinted { hop, epoch: epoch.to_bytes(), url }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::secret::Secret;

    fn keys(byte: u8) -> Keyring {
        Keyring::new(&[Secret::fixed([byte; 32])]).unwrap()
    }

    const HOP: Hop = Hop {
        count: 2,
        from: NodeId::from_u128(7),
        epoch: Epoch::new(4, 9),
        client: None,
        scheme: Some(ClientScheme::Https),
        taken_by: None,
    };

    fn came(value: HeaderValue) -> Came {
        Came { value, peer: None, told: HeaderMap::new() }
    }

    #[test]
    fn a_follower_makes_no_hop_that_any_node_takes_and_is_counted() {
        let [members, followers] = [1, 2].map(|byte| Secret::fixed([byte; 32]));
        let member = Keyring::with_followers(&[members], std::slice::from_ref(&followers)).unwrap();
        let follower = Keyring::with_followers(&[], &[followers]).unwrap();
        let about = |keys| About { keys, tag: "t", method: &Method::GET, target: "/" };
        let value = HeaderValue::try_from(HOP.text(about(&follower))).unwrap();
        assert_eq!(Hop::verify(&value, about(&member)), None);
        assert_eq!(Hop::verify(&value, about(&follower)), None);
        assert_eq!(came(value).count(), HOP.count);
        let hint = Hint { epoch: HOP.epoch, url: "http://a:1".into(), replication: "replite://a:2".into() };
        let value = hint.value(&follower, "hop").unwrap();
        assert_eq!(Hint::verify(&value, &member, "hop"), None);
    }

    #[test]
    fn a_hop_holds_for_its_method_target_database_and_secret_only() {
        let (mine, other) = (keys(1), keys(2));
        let about = About { keys: &mine, tag: "aa", method: &Method::POST, target: "/a?b=1" };
        let value = HeaderValue::try_from(HOP.text(about)).unwrap();
        assert_eq!(Hop::verify(&value, about), Some(HOP));
        for wrong in [
            About { keys: &other, ..about },
            About { tag: "ab", ..about },
            About { method: &Method::PUT, ..about },
            About { target: "/a?b=2", ..about },
        ] {
            assert_eq!(Hop::verify(&value, wrong), None);
        }
        let forged = HOP.text(about).replacen("v1.2.", "v1.1.", 1);
        assert_eq!(Hop::verify(&HeaderValue::try_from(forged).unwrap(), about), None);
        for text in ["", ".", "v1", "v1.1..", "v1.1.x.y.z", &"v1.".repeat(1000)] {
            assert_eq!(Hop::verify(&HeaderValue::try_from(text).unwrap(), about), None);
        }
        assert_eq!(came(value).count(), 2, "also for who can't prove it");
        for (text, count) in [("", 0), ("v1", 0), ("v1.x.y", 0), ("v1.300.y", 0), ("v1.255.y", 255)] {
            assert_eq!(came(HeaderValue::from_static(text)).count(), count, "{text}");
        }
    }

    #[test]
    fn a_hop_says_who_the_client_is_and_no_one_else_can() {
        let mine = keys(1);
        let about = About { keys: &mine, tag: "aa", method: &Method::POST, target: "/a" };
        let longest = "[2001:db8:ffff:ffff:ffff:ffff:ffff:ffff]:65535";
        let clients = ["203.0.113.9:4711", "10.0.0.1:0", "[::1]:80", "[::ffff:10.0.0.1]:9", longest];
        for client in clients.map(|client| client.parse().ok()).into_iter().chain([None]) {
            for scheme in [None, Some(ClientScheme::Http), Some(ClientScheme::Https)] {
                let taken_by = client.map(|_| NodeId::from_u128(u128::MAX));
                let hop = Hop { count: 255, client, scheme, taken_by, ..HOP };
                let text = hop.text(about);
                assert!(text.len() <= HOP_TEXT_MAX_BYTES, "{text}");
                let value = HeaderValue::try_from(text).unwrap();
                assert_eq!(Hop::verify(&value, about), Some(hop), "{client:?} {scheme:?}");
            }
        }
        let text = Hop { client: "203.0.113.9:4711".parse().ok(), ..HOP }.text(about);
        for (real, made_up) in [("cb007109", "0a000001"), ("cb0071091267", "-"), (".https.", ".http.")] {
            assert!(text.contains(real), "{text}");
            let value = HeaderValue::try_from(text.replacen(real, made_up, 1)).unwrap();
            assert_eq!(Hop::verify(&value, about), None, "{made_up}");
        }
        for garbled in ["", "--", "cb0071", "zz007109126700", &"0".repeat(34)] {
            assert_eq!(known(garbled, read_client), None, "{garbled}");
        }
    }

    #[test]
    fn a_hint_answers_one_hop_only() {
        let mine = keys(1);
        let (url, replication) = ("http://10.0.0.2:80".into(), "replite://10.0.0.2:81".into());
        let hint = Hint { epoch: Epoch::new(5, 1), url, replication };
        let value = hint.value(&mine, "hop a").unwrap();
        assert_eq!(Hint::verify(&value, &mine, "hop a"), Some(hint));
        assert_eq!(Hint::verify(&value, &mine, "hop b"), None);
        assert_eq!(Hint::verify(&value, &keys(2), "hop a"), None);
        let moved = value.to_str().unwrap().replace("10.0.0.2", "10.0.0.3");
        assert_eq!(Hint::verify(&HeaderValue::try_from(moved).unwrap(), &mine, "hop a"), None);
        assert_eq!(Hint::verify(&HeaderValue::from_static("v1.x"), &mine, "hop a"), None);
        // HTTP takes off what is white at the ends of a value.
        for urls in ["", "http://a:1>", ">replite://a:2"] {
            let (url, replication) = urls.split_once('>').unwrap_or_default();
            let hint = Hint { url: url.into(), replication: replication.into(), epoch: Epoch::new(5, 1) };
            let value = hint.value(&mine, "hop a").unwrap();
            let arrived = HeaderValue::from_str(value.to_str().unwrap().trim()).unwrap();
            assert_eq!(Hint::verify(&arrived, &mine, "hop a"), Some(hint));
        }
    }
}
