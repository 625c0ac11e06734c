//! Read-your-writes tokens: a transaction id with a proof, as a client carries it.

use std::fmt;
use std::sync::Arc;

use crate::context::NodeContext;
use crate::hex::{Hex, unhex, unhex_u64};
use crate::secret::SHORT_PROOF_BYTES;
use crate::txid::{Epoch, Txid};

/// The version that begins each token.
const VERSION: &str = "v1";
/// Bytes of a token's text: version, tag, epoch, number and proof with dots between. Anything
/// longer or shorter is not looked at.
const TEXT_BYTES: usize = 2 + 1 + 8 + 1 + 33 + 1 + 16 + 1 + 2 * SHORT_PROOF_BYTES;

/// A transaction that a client has seen, with a proof that a node of this database said so. A node
/// that is given the token waits until it has the transaction before it reads.
///
/// The proof is made with a key of the database, which its nodes give each other. No one can try
/// guesses at the cluster's secret with a token, and a rotation of the secrets leaves tokens valid.
/// A database that begins anew, without its state directory, has another key.
///
/// The text form is `v1.<database tag>.<epoch>.<number>.<proof>`.
///
/// ```text
/// v1.5f0c2a11.0000000000000003-9f...e1.000000000000004d.6b...02
/// ```
///
/// ```
/// # #[tokio::main(flavor = "current_thread")]
/// # async fn main() -> Result<(), replite::Error> {
/// use replite::{Db, Error};
///
/// let db = Db::temporary(|config| {
///     config.migrate(|conn| conn.execute_batch("CREATE TABLE IF NOT EXISTS notes (text TEXT)"))
/// })
/// .await?;
/// let commit = db
///     .write(|tx| Ok::<_, Error>(tx.execute("INSERT INTO notes VALUES ('a')", [])?))
///     .await?;
/// let token = db.token(commit.txid.expect("it wrote something")).expect("this is no follower");
/// // On another node, where the text came with a message of some queue:
/// assert_eq!(db.verify_token(token.as_str()), commit.txid);
/// assert_eq!(db.verify_token("v1.made.up"), None);
/// # Ok(())
/// # }
/// ```
#[derive(Clone, PartialEq, Eq)]
pub struct Token {
    txid: Txid,
    text: Box<str>,
}

impl Token {
    /// A token for the transaction, with a proof by the database's key.
    pub(crate) fn sign(node: &NodeContext, txid: Txid) -> Token {
        sign(node, &node.database_tag(), txid)
    }

    /// The transaction of a token's text, if it is one of this database and its proof holds.
    pub(crate) fn verify(node: &NodeContext, text: &str) -> Option<Txid> {
        verify(node, &node.database_tag(), text)
    }

    /// The transaction.
    pub fn txid(&self) -> Txid {
        self.txid
    }

    /// The text form.
    pub fn as_str(&self) -> &str {
        &self.text
    }
}

impl fmt::Display for Token {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.text)
    }
}

impl fmt::Debug for Token {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "Token({})", self.txid)
    }
}

impl serde::Serialize for Token {
    fn serialize<S: serde::Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        serializer.serialize_str(&self.text)
    }
}

/// A node's way to sign and verify tokens, with the database's tag worked out once.
#[derive(Debug)]
pub(crate) struct Tokens {
    node: Arc<NodeContext>,
    tag: String,
}

impl Tokens {
    pub(crate) fn new(node: Arc<NodeContext>) -> Tokens {
        let tag = node.database_tag();
        Tokens { node, tag }
    }

    pub(crate) fn node(&self) -> &NodeContext {
        &self.node
    }

    pub(crate) fn tag(&self) -> &str {
        &self.tag
    }

    /// None on a follower, whose tokens no node takes.
    pub(crate) fn sign(&self, txid: Txid) -> Option<Token> {
        (!self.node.keys.is_follower()).then(|| sign(&self.node, &self.tag, txid))
    }

    /// Whether the text may be a token of this database that this node can't verify: a follower has
    /// no key for that.
    pub(crate) fn is_unread(&self, text: &str) -> bool {
        let rest = || text.strip_prefix(VERSION)?.strip_prefix('.')?.strip_prefix(self.tag.as_str());
        let shape = text.len() == TEXT_BYTES && rest().is_some_and(|rest| rest.starts_with('.'));
        shape && self.node.keys.is_follower()
    }

    pub(crate) fn verify(&self, text: &str) -> Option<Token> {
        let txid = verify(&self.node, &self.tag, text)?;
        Some(Token { txid, text: text.into() })
    }
}

fn sign(node: &NodeContext, tag: &str, txid: Txid) -> Token {
    let proof = node.database_keys.get().token.prove(&proved(tag, &txid_bytes(txid)));
    let (epoch, number) = (txid.epoch(), txid.number());
    let text = format!("{VERSION}.{tag}.{epoch}.{number:016x}.{}", Hex(&proof));
    Token { txid, text: text.into() }
}

fn verify(node: &NodeContext, tag: &str, text: &str) -> Option<Txid> {
    // The token key of a follower, if it has one, is none of the database's.
    if text.len() != TEXT_BYTES || !text.is_ascii() || node.keys.is_follower() {
        return None;
    }
    let mut fields = text.split('.');
    let mut next = || fields.next();
    let (version, of, epoch, number, proof) = (next()?, next()?, next()?, next()?, next()?);
    if version != VERSION || of != tag || next().is_some() {
        return None;
    }
    let epoch: Epoch = epoch.parse().ok()?;
    let txid = Txid::new(epoch, unhex_u64(number)?);
    let proof: [u8; SHORT_PROOF_BYTES] = unhex(proof)?;
    let parts = txid_bytes(txid);
    node.database_keys.get().token.verify(&proved(tag, &parts), &proof).then_some(txid)
}

fn proved<'a>(tag: &'a str, txid: &'a [u8; 24]) -> [&'a [u8]; 3] {
    [VERSION.as_bytes(), tag.as_bytes(), txid]
}

fn txid_bytes(txid: Txid) -> [u8; 24] {
    let mut bytes = [0; 24];
    bytes[..16].copy_from_slice(&txid.epoch().to_bytes());
    bytes[16..].copy_from_slice(&txid.number().to_le_bytes());
    bytes
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::context::LeaseContext;
    use crate::keys::DatabaseKeys;
    use crate::peer::{Incarnation, NodeId};
    use crate::secret::{Keyring, Secret};
    use crate::status::{Addresses, PeerInfo, Role};

    fn node(key: u8, database: &str) -> Arc<NodeContext> {
        let me =
            PeerInfo { node: NodeId::NIL, incarnation: Incarnation::NIL, addresses: Addresses::default() };
        let keys = (Keyring::new(&[Secret::fixed([1; 32])]).unwrap(), crate::channel::Channel::open());
        let (database_keys, lease) = (DatabaseKeys::fixed(key), LeaseContext::fixed());
        NodeContext::new(me, "c".into(), database.into(), keys, Role::Replica, lease, database_keys)
    }

    const TXID: Txid = Txid::new(Epoch::new(3, 0xfeed), 77);

    #[test]
    fn a_token_round_trips_on_every_node_of_the_cluster() {
        let token = Token::sign(&node(1, "app"), TXID);
        assert_eq!(token.to_string().len(), TEXT_BYTES);
        assert_eq!(Token::verify(&node(1, "app"), token.as_str()), Some(TXID));
        let tokens = Tokens::new(node(1, "app"));
        assert_eq!(tokens.verify(token.as_str()), Some(token.clone()));
        assert_eq!(tokens.sign(TXID), Some(token.clone()));
        assert!(!tokens.is_unread(token.as_str()), "a member reads it");
    }

    #[test]
    fn a_follower_makes_no_token_and_tells_those_of_its_database_by_their_form() {
        let member = node(1, "app");
        let token = Token::sign(&member, TXID).to_string();
        let keys = Keyring::with_followers(&[], &[Secret::fixed([1; 32])]).unwrap();
        let (me, channel) = (member.me.clone(), crate::channel::Channel::open());
        // It has the page key of the members, and another one for tokens.
        let own = DatabaseKeys { token: DatabaseKeys::fixed(2).token, ..DatabaseKeys::fixed(1) };
        let follower = |database: &str| {
            let (keys, lease) = ((keys.clone(), channel.clone()), LeaseContext::fixed());
            NodeContext::new(me.clone(), "c".into(), database.into(), keys, Role::Replica, lease, own)
        };
        let tokens = Tokens::new(follower("app"));
        assert_eq!((tokens.verify(&token), tokens.sign(TXID)), (None, None));
        assert!(tokens.is_unread(&token));
        assert!(!tokens.is_unread(&token[1..]) && !tokens.is_unread(&format!("{token}0")));
        assert!(!Tokens::new(follower("other")).is_unread(&token));
        let made = Token::sign(&follower("app"), TXID).to_string();
        assert_eq!(Token::verify(&member, &made), None, "what it makes all the same is none");
    }

    #[test]
    fn a_token_outlives_the_secrets_and_goes_with_the_databases_key() {
        let mine = node(1, "app");
        let token = Token::sign(&mine, TXID).to_string();
        mine.keys.rotate(&[Secret::fixed([9; 32])]).unwrap();
        assert_eq!(Token::verify(&mine, &token), Some(TXID));
        // A replica that follows another primary.
        mine.database_keys.set(DatabaseKeys::fixed(2));
        assert_eq!(Token::verify(&mine, &token), None);
        assert_eq!(Token::verify(&mine, Token::sign(&node(2, "app"), TXID).as_str()), Some(TXID));
    }

    #[test]
    fn another_key_or_database_or_a_changed_byte_is_no_token() {
        let token = Token::sign(&node(1, "app"), TXID).to_string();
        assert_eq!(Token::verify(&node(2, "app"), &token), None);
        assert_eq!(Token::verify(&node(1, "other"), &token), None);
        let mine = node(1, "app");
        for at in 0..token.len() {
            for other in [b'0', b'1', b'.', b'-', b'z', 0] {
                let mut bytes = token.clone().into_bytes();
                if bytes[at] != other {
                    bytes[at] = other;
                    assert_eq!(Token::verify(&mine, std::str::from_utf8(&bytes).unwrap()), None);
                }
            }
        }
    }

    #[test]
    fn texts_of_any_other_length_are_refused_unread() {
        let mine = node(1, "app");
        let token = Token::sign(&mine, TXID).to_string();
        for end in 0..token.len() {
            assert_eq!(Token::verify(&mine, &token[..end]), None);
        }
        assert_eq!(Token::verify(&mine, &format!("{token}0")), None);
        assert_eq!(Token::verify(&mine, &"v1.".repeat(100_000)), None);
        assert_eq!(Token::verify(&mine, &"é".repeat(TEXT_BYTES / 2 + 1)), None);
    }
}
