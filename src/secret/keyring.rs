//! The keys of the secrets that are valid, and the proofs that are made with them.
//!
//! There are two kinds of secrets: of members, and of followers. A member knows both, a follower
//! only its own. So what a follower proves to a member shows that it is one. And what a member
//! takes as another member's word is proved by a secret that no follower has.

use std::fmt;
use std::sync::Arc;

use subtle::ConstantTimeEq;
use tokio::sync::watch;

use crate::error::Error;
use crate::secret::{PROOF_BYTES, SECRETS_MAX, SHORT_PROOF_BYTES, Secret};

/// What a proof is for. Each purpose has a key of its own: no proof serves for another.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(crate) enum Purpose {
    /// A replica's first proof, in the request's head.
    Knock,
    /// The primary's proof, in the response's head.
    Answer,
    /// A replica's fresh proof over both nonces and its hello.
    Hello,
    /// A request that one node forwards to another.
    Hop,
    /// A fresh proof over both nonces of a node that asks how another stands.
    Question,
    /// How a node stands, for the node that asked.
    Standing,
    /// A fresh proof over both nonces and an operator's command.
    Command,
    /// What a node says to that command.
    CommandAnswer,
    /// The head of a request that asks for a channel inside of its body.
    Tunnel,
    /// A fresh proof over both nonces of who asks the members that keep the lease's record.
    Members,
    /// A fresh proof over both nonces of who forwards an application's requests.
    Forwards,
}

impl Purpose {
    const ALL: [Purpose; 11] = [
        Purpose::Knock,
        Purpose::Answer,
        Purpose::Hello,
        Purpose::Hop,
        Purpose::Question,
        Purpose::Standing,
        Purpose::Command,
        Purpose::CommandAnswer,
        Purpose::Tunnel,
        Purpose::Members,
        Purpose::Forwards,
    ];

    fn context(self) -> &'static str {
        match self {
            Purpose::Knock => "replite 2026 v1 stream knock",
            Purpose::Answer => "replite 2026 v1 stream answer",
            Purpose::Hello => "replite 2026 v1 stream hello",
            Purpose::Hop => "replite 2026 v1 hop",
            Purpose::Question => "replite 2026 v1 question",
            Purpose::Standing => "replite 2026 v1 standing",
            Purpose::Command => "replite 2026 v1 command",
            Purpose::CommandAnswer => "replite 2026 v1 command answer",
            Purpose::Tunnel => "replite 2026 v1 tunnel",
            Purpose::Members => "replite 2026 v1 members",
            Purpose::Forwards => "replite 2026 v1 forwards",
        }
    }

    /// Whose proofs for this purpose a node takes that has these rights itself.
    fn taken_from(self, own: Rights) -> &'static [Rights] {
        use Rights::{Follower, Member};
        match self {
            // Of the side that dials. What it may do then, its rights say.
            Purpose::Knock | Purpose::Hello | Purpose::Question | Purpose::Tunnel | Purpose::Members => {
                &[Member, Follower]
            }
            // Of the side that was dialled: no follower can pass for a member's primary or peer.
            Purpose::Answer | Purpose::Standing => match own {
                Member => &[Member],
                Follower => &[Follower],
            },
            Purpose::Hop | Purpose::Forwards | Purpose::Command | Purpose::CommandAnswer => &[Member],
        }
    }
}

/// What a node may do to others that proved a secret to them.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(crate) enum Rights {
    /// All: it may be the primary.
    Member,
    /// It is served, and that is all: nothing that it says changes anything on another node.
    Follower,
}

/// What is derived of one secret.
struct Keys {
    /// Tells this secret from others, whatever its kind.
    name: [u8; 32],
    of_purposes: [[u8; 32]; Purpose::ALL.len()],
}

/// Which secret something was proved with, as long as a stream lives that was let in by that. Says
/// nothing of the secret, and appears in no output.
#[derive(Clone, Copy, PartialEq, Eq)]
pub(crate) struct Proved {
    name: [u8; 32],
    rights: Rights,
}

impl Proved {
    /// What the one that proved it may do.
    pub(crate) fn rights(self) -> Rights {
        self.rights
    }
}

impl fmt::Debug for Proved {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("Proved(..)")
    }
}

/// The keys of all secrets that are valid at one moment, newest first.
#[derive(Clone)]
struct ValidKeys {
    members: Arc<[Keys]>,
    followers: Arc<[Keys]>,
}

impl ValidKeys {
    fn of(&self, rights: Rights) -> &Arc<[Keys]> {
        match rights {
            Rights::Member => &self.members,
            Rights::Follower => &self.followers,
        }
    }

    fn is_valid(&self, proved: Proved) -> bool {
        self.of(proved.rights).iter().any(|keys| keys.name == proved.name)
    }

    /// Who has a secret of one kind must not have one of the other by that.
    fn check_apart(&self) -> Result<(), Error> {
        let shared = |keys: &Keys| self.members.iter().any(|member| member.name == keys.name);
        match self.followers.iter().any(shared) {
            true => Err(Error::Config("a secret of followers is one of members, too".into())),
            false => Ok(()),
        }
    }
}

/// The keys of the secrets that are valid now, newest first. Shared: a rotation is seen everywhere
/// at once.
#[derive(Clone)]
pub(crate) struct Keyring {
    valid: Arc<watch::Sender<ValidKeys>>,
    rights: Rights,
    open: bool,
    /// What it proves with in place of its own newest secret.
    with: Option<Proved>,
}

impl Keyring {
    /// A keyring of these secrets. It makes proofs with the first, and verifies them with any.
    /// Without a secret it makes them with a published key, and they prove nothing.
    pub(crate) fn new(secrets: &[Secret]) -> Result<Keyring, Error> {
        Keyring::with_followers(secrets, &[])
    }

    /// The same, and these secrets let followers in. With no other ones it is that of a follower,
    /// which makes its proofs with them.
    pub(crate) fn with_followers(secrets: &[Secret], followers: &[Secret]) -> Result<Keyring, Error> {
        let (open, rights) = match (secrets.is_empty(), followers.is_empty()) {
            (true, true) => (true, Rights::Member),
            (true, false) => (false, Rights::Follower),
            (false, _) => (false, Rights::Member),
        };
        let members = match open {
            true => vec![Keys::of(b"no secret", Rights::Member)],
            false => derive(secrets, Rights::Member)?,
        };
        let followers = derive(followers, Rights::Follower)?;
        let valid = ValidKeys { members: members.into(), followers: followers.into() };
        valid.check_apart()?;
        Ok(Keyring { valid: Arc::new(watch::Sender::new(valid)), rights, open, with: None })
    }

    /// Whether there is no secret.
    pub(crate) fn is_open(&self) -> bool {
        self.open
    }

    /// Whether this node has secrets of followers only.
    pub(crate) fn is_follower(&self) -> bool {
        self.rights == Rights::Follower
    }

    /// Replaces the secrets at run time.
    pub(crate) fn rotate(&self, secrets: &[Secret]) -> Result<(), Error> {
        if self.is_follower() {
            return Err(Error::Config("a follower has no secret of members to be replaced".into()));
        }
        if secrets.is_empty() != self.open {
            return Err(Error::Config(
                "a rotation can neither add the first secret nor drop the last".into(),
            ));
        }
        if self.open {
            return Ok(());
        }
        let members = derive(secrets, Rights::Member)?.into();
        self.replace(|valid| ValidKeys { members, followers: valid.followers.clone() })
    }

    /// The same for those that let followers in, of which a member may have none.
    pub(crate) fn rotate_followers(&self, secrets: &[Secret]) -> Result<(), Error> {
        if secrets.is_empty() && self.is_follower() {
            return Err(Error::Config("a rotation can't drop a follower's last secret".into()));
        }
        if self.open {
            return Err(Error::Config("a node without a secret of members lets anyone in".into()));
        }
        let followers = derive(secrets, Rights::Follower)?.into();
        self.replace(|valid| ValidKeys { members: valid.members.clone(), followers })
    }

    fn replace(&self, next: impl FnOnce(&ValidKeys) -> ValidKeys) -> Result<(), Error> {
        let mut result = Ok(());
        self.valid.send_if_modified(|valid| {
            let next = next(valid);
            result = next.check_apart();
            if result.is_ok() {
                *valid = next;
            }
            result.is_ok()
        });
        result
    }

    /// The same keyring, which proves with the secret that the other side has proved: so the other
    /// side knows it.
    pub(crate) fn towards(&self, proved: Proved) -> Keyring {
        Keyring { with: Some(proved), ..self.clone() }
    }

    /// A proof over the parts. A follower's counts only for what a follower may do. Where the
    /// secret of the other side was dropped meanwhile, what this makes holds nowhere.
    pub(crate) fn prove(&self, purpose: Purpose, parts: &[&[u8]]) -> [u8; PROOF_BYTES] {
        let valid = self.valid.borrow().clone();
        let keys = match self.with {
            Some(with) => valid.of(with.rights).iter().find(|keys| keys.name == with.name),
            None => valid.of(self.rights).first(),
        };
        keys.map_or([0; PROOF_BYTES], |keys| keys.proof(purpose, parts))
    }

    /// Whether a proof over the parts was made with a secret that is valid now, and by a node that
    /// may.
    pub(crate) fn verify(&self, purpose: Purpose, parts: &[&[u8]], proof: &[u8]) -> bool {
        self.proved(purpose, parts, proof).is_some()
    }

    /// With which secret such a proof over the parts was made, if that is valid now.
    pub(crate) fn proved(&self, purpose: Purpose, parts: &[&[u8]], proof: &[u8]) -> Option<Proved> {
        let valid = self.valid.borrow().clone();
        let made = |k: &&Keys| bool::from(k.proof(purpose, parts).as_slice().ct_eq(proof));
        let by = |rights: &Rights| {
            let keys = valid.of(*rights).iter().find(made)?;
            Some(Proved { name: keys.name, rights: *rights })
        };
        purpose.taken_from(self.rights).iter().find_map(by)
    }

    /// Returns when that secret is not valid any more.
    pub(crate) async fn dropped(&self, proved: Proved) {
        // The sender is ours.
        let _ = self.valid.subscribe().wait_for(|valid| !valid.is_valid(proved)).await;
    }

    /// The first bytes of a proof.
    pub(crate) fn prove_short(&self, purpose: Purpose, parts: &[&[u8]]) -> [u8; SHORT_PROOF_BYTES] {
        let mut short = [0; SHORT_PROOF_BYTES];
        short.copy_from_slice(&self.prove(purpose, parts)[..SHORT_PROOF_BYTES]);
        short
    }

    /// Whether the bytes are the first ones of a proof that [`Keyring::verify`] takes.
    pub(crate) fn verify_short(
        &self,
        purpose: Purpose,
        parts: &[&[u8]],
        proof: &[u8; SHORT_PROOF_BYTES],
    ) -> bool {
        let valid = self.valid.borrow().clone();
        let made =
            |k: &Keys| bool::from(k.proof(purpose, parts)[..SHORT_PROOF_BYTES].ct_eq(proof.as_slice()));
        purpose.taken_from(self.rights).iter().any(|rights| valid.of(*rights).iter().any(made))
    }
}

impl fmt::Debug for Keyring {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("Keyring(..)")
    }
}

fn derive(secrets: &[Secret], rights: Rights) -> Result<Vec<Keys>, Error> {
    if secrets.len() > SECRETS_MAX {
        return Err(Error::Config(format!("at most {SECRETS_MAX} secrets can be valid at once")));
    }
    Ok(secrets.iter().map(|secret| Keys::of(&secret.0, rights)).collect())
}

impl Keys {
    fn of(secret: &[u8], rights: Rights) -> Keys {
        let name = blake3::derive_key("replite 2026 v1 secret name", secret);
        // A secret of followers that a node was given as one of members is of no use there.
        let of_followers = blake3::derive_key("replite 2026 v1 follower secret", secret);
        let secret = match rights {
            Rights::Member => secret,
            Rights::Follower => &of_followers,
        };
        Keys { name, of_purposes: Purpose::ALL.map(|purpose| blake3::derive_key(purpose.context(), secret)) }
    }

    fn proof(&self, purpose: Purpose, parts: &[&[u8]]) -> [u8; PROOF_BYTES] {
        keyed(&self.of_purposes[purpose as usize], parts)
    }
}

/// BLAKE3 keyed, over each part after its length: no two lists of parts are alike.
fn keyed(key: &[u8; 32], parts: &[&[u8]]) -> [u8; PROOF_BYTES] {
    let mut hasher = blake3::Hasher::new_keyed(key);
    for part in parts {
        hasher.update(&(part.len() as u64).to_le_bytes());
        hasher.update(part);
    }
    *hasher.finalize().as_bytes()
}

#[cfg(test)]
mod tests {
    use super::*;

    fn secret(byte: u8) -> Secret {
        Secret::fixed([byte; 32])
    }

    #[test]
    fn a_proof_holds_for_its_purpose_parts_and_secret_only() {
        let (old, new) = (secret(1), secret(2));
        let ring = Keyring::new(&[new.clone(), old.clone()]).unwrap();
        let proof = Keyring::new(std::slice::from_ref(&old)).unwrap().prove(Purpose::Hop, &[b"ab", b"c"]);
        assert!(ring.verify(Purpose::Hop, &[b"ab", b"c"], &proof), "an old secret still verifies");
        assert!(!ring.verify(Purpose::Hop, &[b"a", b"bc"], &proof));
        assert!(!ring.verify(Purpose::Knock, &[b"ab", b"c"], &proof));
        assert!(!ring.verify(Purpose::Hop, &[b"ab", b"c"], &proof[..31]));
        ring.rotate(&[new]).unwrap();
        assert!(!ring.verify(Purpose::Hop, &[b"ab", b"c"], &proof), "rotated away");
        assert!(ring.rotate(&[]).is_err());
    }

    #[test]
    fn a_follower_proves_what_a_follower_may_and_a_member_takes_no_other_word_of_it() {
        let member = Keyring::with_followers(&[secret(1)], &[secret(2), secret(3)]).unwrap();
        let follower = Keyring::with_followers(&[], &[secret(3)]).unwrap();
        let other = Keyring::with_followers(&[], &[secret(2)]).unwrap();
        let mistaken = Keyring::new(&[secret(3)]).unwrap();
        assert!(follower.is_follower() && !member.is_follower() && !follower.is_open());
        let asks = [Purpose::Knock, Purpose::Hello, Purpose::Question, Purpose::Tunnel, Purpose::Members];
        let answers = [Purpose::Answer, Purpose::Standing];
        for purpose in Purpose::ALL {
            let proof = follower.prove(purpose, &[b"a"]);
            let taken = member.proved(purpose, &[b"a"], &proof);
            let rights = asks.contains(&purpose).then_some(Rights::Follower);
            assert_eq!(taken.map(Proved::rights), rights, "{purpose:?}");
            let short = follower.prove_short(purpose, &[b"a"]);
            assert_eq!(member.verify_short(purpose, &[b"a"], &short), rights.is_some(), "{purpose:?}");
            let proof = member.prove(purpose, &[b"a"]);
            let taken = member.proved(purpose, &[b"a"], &proof);
            assert_eq!(taken.map(Proved::rights), Some(Rights::Member), "{purpose:?}");
            assert_eq!(follower.proved(purpose, &[b"a"], &proof), None, "{purpose:?}");
            // Followers have the same secret: they can deceive each other.
            let proof = follower.prove(purpose, &[b"a"]);
            let known = asks.contains(&purpose) || answers.contains(&purpose);
            assert_eq!(follower.verify(purpose, &[b"a"], &proof), known, "{purpose:?}");
            assert!(!other.verify(purpose, &[b"a"], &proof), "{purpose:?}");
            assert!(!member.verify(purpose, &[b"a"], &mistaken.prove(purpose, &[b"a"])), "{purpose:?}");
        }
        // A member answers with the secret that the follower has, the newest or not.
        let proved = member.proved(Purpose::Knock, &[], &follower.prove(Purpose::Knock, &[])).unwrap();
        let answer = member.towards(proved).prove(Purpose::Answer, &[b"a"]);
        assert!(follower.verify(Purpose::Answer, &[b"a"], &answer));
        assert!(!member.verify(Purpose::Answer, &[b"a"], &answer), "no member's word");
        member.rotate_followers(&[]).unwrap();
        let holds_nowhere = member.towards(proved).prove(Purpose::Answer, &[b"a"]);
        assert!(!member.verify(Purpose::Answer, &[b"a"], &holds_nowhere));
        assert!(!follower.verify(Purpose::Answer, &[b"a"], &holds_nowhere));
    }

    #[test]
    fn no_secret_is_of_both_kinds_and_each_kind_is_rotated_by_itself() {
        assert!(Keyring::with_followers(&[secret(1)], &[secret(2), secret(1)]).is_err());
        let member = Keyring::with_followers(&[secret(1)], &[secret(2)]).unwrap();
        assert!(member.rotate_followers(&[secret(1)]).is_err());
        assert!(member.rotate(&[secret(2)]).is_err());
        assert!(member.verify(Purpose::Hop, &[], &member.prove(Purpose::Hop, &[])), "all is as before");
        member.rotate(&[secret(3)]).unwrap();
        let follower = Keyring::with_followers(&[], &[secret(2)]).unwrap();
        assert!(member.verify(Purpose::Knock, &[], &follower.prove(Purpose::Knock, &[])));
        assert!(follower.rotate(&[secret(1)]).is_err() && follower.rotate_followers(&[]).is_err());
        follower.rotate_followers(&[secret(4)]).unwrap();
        assert!(!member.verify(Purpose::Knock, &[], &follower.prove(Purpose::Knock, &[])));
        assert!(Keyring::new(&[]).unwrap().rotate_followers(&[secret(1)]).is_err());
    }

    #[tokio::test(start_paused = true)]
    async fn a_secret_is_dropped_when_a_rotation_leaves_it_out() {
        let [old, new, followers] = [1, 2, 3].map(secret);
        let ring = Keyring::with_followers(std::slice::from_ref(&old), &[followers]).unwrap();
        let proof = ring.prove(Purpose::Hello, &[b"a"]);
        let proved = ring.proved(Purpose::Hello, &[b"a"], &proof).unwrap();
        let mut dropped = std::pin::pin!(ring.dropped(proved));
        let second = std::time::Duration::from_secs(1);
        ring.rotate(&[new.clone(), old]).unwrap();
        ring.rotate_followers(&[]).unwrap();
        assert!(tokio::time::timeout(second, &mut dropped).await.is_err(), "it is still valid");
        ring.rotate(&[new]).unwrap();
        tokio::time::timeout(second, dropped).await.unwrap();
        assert_eq!(format!("{proved:?}"), "Proved(..)");
    }
}
