//! The cluster's secrets and the keyed proofs that are made from them.

use std::fmt;
use std::sync::Arc;

use subtle::ConstantTimeEq;
use tokio::sync::watch;

use crate::error::Error;

/// Bytes of a proof.
pub(crate) const PROOF_BYTES: usize = 32;
/// Bytes of a proof where 32 would be too long to carry, such as in a cookie.
pub(crate) const SHORT_PROOF_BYTES: usize = 16;
/// The fewest bytes of a secret: 128 bits, if they are random.
pub(crate) const SECRET_MIN_BYTES: usize = 16;
/// The most secrets that are valid at one time.
pub(crate) const SECRETS_MAX: usize = 8;

/// A shared secret of a cluster. It never travels and never appears in `Debug` output.
#[derive(Clone)]
pub struct Secret(Arc<[u8]>);

impl Secret {
    /// A secret from its bytes; use at least 16 random ones.
    ///
    /// # Errors
    /// [`Error::Config`] when it is shorter than 16 bytes.
    pub fn new(bytes: impl AsRef<[u8]>) -> Result<Secret, Error> {
        let bytes = bytes.as_ref();
        if bytes.len() < SECRET_MIN_BYTES {
            return Err(Error::Config(format!(
                "the secret has {} bytes; at least {SECRET_MIN_BYTES} are needed",
                bytes.len()
            )));
        }
        Ok(Secret(bytes.into()))
    }
}

impl fmt::Debug for Secret {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("Secret(..)")
    }
}

/// What a proof is for: each purpose has a key of its own, so that no proof serves for another.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(crate) enum Purpose {
    /// A replica's first proof, in the request's head.
    Knock,
    /// The primary's proof, in the response's head.
    Answer,
    /// A replica's fresh proof over both nonces and its hello.
    Hello,
    /// A read-your-writes token.
    Token,
    /// A request that one node forwards to another.
    Hop,
}

impl Purpose {
    const COUNT: usize = 5;

    fn context(self) -> &'static str {
        match self {
            Purpose::Knock => "replite 2026 v1 stream knock",
            Purpose::Answer => "replite 2026 v1 stream answer",
            Purpose::Hello => "replite 2026 v1 stream hello",
            Purpose::Token => "replite 2026 v1 token",
            Purpose::Hop => "replite 2026 v1 hop",
        }
    }
}

type Keys = [[u8; 32]; Purpose::COUNT];

/// Which secret something was proved with, as long as a stream lives that was let in by that. Says nothing of the secret, and appears in no output.
#[derive(Clone, Copy, PartialEq, Eq)]
pub(crate) struct Proved([u8; 32]);

impl fmt::Debug for Proved {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("Proved(..)")
    }
}

/// The keys of the secrets that are valid now, newest first. Shared: a rotation is seen everywhere at once.
#[derive(Clone)]
pub(crate) struct Keyring {
    keys: Arc<watch::Sender<Arc<[Keys]>>>,
    open: bool,
}

impl Keyring {
    /// A keyring of these secrets; proofs are made with the first, and verified with any.
    /// Without a secret the proofs are made with a published key and prove nothing.
    pub(crate) fn new(secrets: &[Secret]) -> Result<Keyring, Error> {
        let open = secrets.is_empty();
        Ok(Keyring { keys: Arc::new(watch::Sender::new(derive(secrets)?)), open })
    }

    /// Whether there is no secret.
    pub(crate) fn is_open(&self) -> bool {
        self.open
    }

    /// Replaces the secrets at run time.
    pub(crate) fn rotate(&self, secrets: &[Secret]) -> Result<(), Error> {
        if secrets.is_empty() != self.open {
            return Err(Error::Config(
                "a rotation can neither add the first secret nor drop the last".into(),
            ));
        }
        self.keys.send_replace(derive(secrets)?);
        Ok(())
    }

    /// A proof over the parts, made with the newest secret.
    pub(crate) fn prove(&self, purpose: Purpose, parts: &[&[u8]]) -> [u8; PROOF_BYTES] {
        keyed(&self.current()[0][purpose as usize], parts)
    }

    /// Whether a proof over the parts was made with a secret that is valid now.
    pub(crate) fn verify(&self, purpose: Purpose, parts: &[&[u8]], proof: &[u8]) -> bool {
        self.proved(purpose, parts, proof).is_some()
    }

    /// With which secret a proof over the parts was made, if that is valid now.
    pub(crate) fn proved(&self, purpose: Purpose, parts: &[&[u8]], proof: &[u8]) -> Option<Proved> {
        let keys = self.current();
        let made = |k: &&Keys| bool::from(keyed(&k[purpose as usize], parts).as_slice().ct_eq(proof));
        keys.iter().find(made).map(name)
    }

    /// Returns when that secret is not valid any more.
    pub(crate) async fn dropped(&self, proved: Proved) {
        let gone = |keys: &Arc<[Keys]>| !keys.iter().any(|k| name(k) == proved);
        // The sender is ours.
        let _ = self.keys.subscribe().wait_for(gone).await;
    }

    /// The first bytes of a proof.
    pub(crate) fn prove_short(&self, purpose: Purpose, parts: &[&[u8]]) -> [u8; SHORT_PROOF_BYTES] {
        let mut short = [0; SHORT_PROOF_BYTES];
        short.copy_from_slice(&self.prove(purpose, parts)[..SHORT_PROOF_BYTES]);
        short
    }

    /// Whether the bytes are the first ones of a proof that was made with a secret that is valid now.
    pub(crate) fn verify_short(
        &self,
        purpose: Purpose,
        parts: &[&[u8]],
        proof: &[u8; SHORT_PROOF_BYTES],
    ) -> bool {
        let keys = self.current();
        keys.iter().any(|k| {
            bool::from(keyed(&k[purpose as usize], parts)[..SHORT_PROOF_BYTES].ct_eq(proof.as_slice()))
        })
    }

    fn current(&self) -> Arc<[Keys]> {
        self.keys.borrow().clone()
    }
}

impl fmt::Debug for Keyring {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("Keyring(..)")
    }
}

fn derive(secrets: &[Secret]) -> Result<Arc<[Keys]>, Error> {
    if secrets.len() > SECRETS_MAX {
        return Err(Error::Config(format!("at most {SECRETS_MAX} secrets can be valid at once")));
    }
    let none = [Secret(Arc::from(*b"no secret"))];
    let secrets = if secrets.is_empty() { &none } else { secrets };
    let all = [Purpose::Knock, Purpose::Answer, Purpose::Hello, Purpose::Token, Purpose::Hop];
    Ok(secrets.iter().map(|s| all.map(|p| blake3::derive_key(p.context(), &s.0))).collect())
}

fn name(keys: &Keys) -> Proved {
    Proved(keyed(&keys[Purpose::Hello as usize], &[b"name"]))
}

/// BLAKE3 keyed, over each part behind its length, so that no two lists of parts are alike.
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

    #[test]
    fn a_proof_holds_for_its_purpose_parts_and_secret_only() {
        let (old, new) = (Secret::new([1; 16]).unwrap(), Secret::new([2; 16]).unwrap());
        let ring = Keyring::new(&[new.clone(), old.clone()]).unwrap();
        let proof = Keyring::new(std::slice::from_ref(&old)).unwrap().prove(Purpose::Token, &[b"ab", b"c"]);
        assert!(ring.verify(Purpose::Token, &[b"ab", b"c"], &proof), "an old secret still verifies");
        assert!(!ring.verify(Purpose::Token, &[b"a", b"bc"], &proof));
        assert!(!ring.verify(Purpose::Hop, &[b"ab", b"c"], &proof));
        assert!(!ring.verify(Purpose::Token, &[b"ab", b"c"], &proof[..31]));
        ring.rotate(&[new]).unwrap();
        assert!(!ring.verify(Purpose::Token, &[b"ab", b"c"], &proof), "rotated away");
        assert!(ring.rotate(&[]).is_err());
    }

    #[tokio::test(start_paused = true)]
    async fn a_secret_is_dropped_when_a_rotation_leaves_it_out() {
        let [old, new] = [1, 2].map(|byte| Secret::new([byte; 16]).unwrap());
        let ring = Keyring::new(std::slice::from_ref(&old)).unwrap();
        let proof = ring.prove(Purpose::Hello, &[b"a"]);
        let proved = ring.proved(Purpose::Hello, &[b"a"], &proof).unwrap();
        let mut dropped = std::pin::pin!(ring.dropped(proved));
        let second = std::time::Duration::from_secs(1);
        ring.rotate(&[new.clone(), old]).unwrap();
        assert!(tokio::time::timeout(second, &mut dropped).await.is_err(), "it is still valid");
        ring.rotate(&[new]).unwrap();
        tokio::time::timeout(second, dropped).await.unwrap();
        assert_eq!(format!("{proved:?}"), "Proved(..)");
    }

    #[test]
    fn secrets_redact_themselves_and_have_a_least_length() {
        let secret = Secret::new("correct horse battery").unwrap();
        assert_eq!(format!("{secret:?}"), "Secret(..)");
        assert!(!format!("{:?}", Keyring::new(&[secret]).unwrap()).contains("horse"));
        assert!(Secret::new("short").is_err());
    }
}
