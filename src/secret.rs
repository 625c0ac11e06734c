//! The cluster's secrets and the keyed proofs that are made from them.

mod keyring;

use std::fmt;

use base64ct::{Base64Unpadded, Base64UrlUnpadded, Encoding};

use crate::error::Error;
use crate::hex::unhex;
use crate::random;

pub(crate) use keyring::{Keyring, Proved, Purpose, Rights};

/// Bytes of a proof.
pub(crate) const PROOF_BYTES: usize = 32;
/// Bytes of a proof where 32 would be too long to carry, such as in a cookie.
pub(crate) const SHORT_PROOF_BYTES: usize = 16;
/// Bytes of a secret: 256 bits, if they are random.
const SECRET_BYTES: usize = 32;
/// The fewest different bytes of a secret. Random ones have fewer once in 2^51 times.
const DIFFERENT_MIN: usize = 16;
/// The same of a phrase, and its fewest and most bytes.
const PHRASE_DIFFERENT_MIN: usize = 8;
const PHRASE_MIN_BYTES: usize = 16;
const PHRASE_MAX_BYTES: usize = 1024;
/// What a guess at a phrase costs: Argon2id with this much memory, in KiB, ...
const PHRASE_MEMORY_KIB: u32 = 64 * 1024;
/// ... gone through so often, by one thread.
const PHRASE_PASSES: u32 = 3;
/// The most secrets that are valid at one time.
pub(crate) const SECRETS_MAX: usize = 8;

/// A shared secret of a cluster: 32 random bytes. It never travels and never appears in `Debug`
/// output.
///
/// With a proof that was made with it, such as that of a request which a node forwards, one can try
/// guesses at the secret without asking anyone. Who answers at a node's address gets one, too. That
/// is of no use against random bytes, and of much against what people think up. So a text is taken
/// for a secret only in the forms that hold 32 bytes. A phrase has a constructor of its own, which
/// makes each guess expensive.
///
/// ```
/// use replite::{Config, Secret};
///
/// let secret = Secret::generate()?;
/// assert!(!format!("{secret:?}").contains(&secret.to_text()));
/// let config = Config::new("app.db").secret(secret);
/// # drop(config);
/// # Ok::<_, replite::Error>(())
/// ```
#[derive(Clone)]
pub struct Secret([u8; SECRET_BYTES]);

impl Secret {
    /// A new random secret. All nodes need the same: see [`Secret::to_text`].
    ///
    /// # Errors
    /// [`Error::NoRandom`] when the operating system has no random numbers.
    pub fn generate() -> Result<Secret, Error> {
        loop {
            // Once in some billions, a random secret is one whose own text form would be refused.
            // It is drawn again.
            let secret = Secret(random::array()?);
            if Secret::new(secret.to_text()).is_ok() {
                return Ok(secret);
            }
        }
    }

    /// A secret from its text: 32 bytes as 43 digits of base64, or as 64 hexadecimal digits. Base64
    /// may have `+/` or `-_`, and the `=` at the end or not. White space around it is ignored.
    /// `openssl rand -base64 32` and `openssl rand -hex 32` make one, and so do
    /// [`Secret::generate`] and [`Secret::to_text`].
    ///
    /// ```
    /// use replite::Secret;
    ///
    /// let text = Secret::generate()?.to_text(); // once, to be kept where the nodes find it
    /// let secret = Secret::new(text)?;
    /// assert!(Secret::new("aaaaaaaaaaaaaaaa").is_err());
    /// # let _ = secret;
    /// # Ok::<_, replite::Error>(())
    /// ```
    ///
    /// # Errors
    /// [`Error::WeakSecret`] for any other text, and for one that can't be random. Such a text has
    /// most of its bytes alike, or its base64 has no upper-case or no lower-case letter. That a
    /// text is random can't be seen from it.
    pub fn new(text: impl AsRef<str>) -> Result<Secret, Error> {
        let text = text.as_ref().trim();
        if let Some(bytes) = unhex(text) {
            return Secret::from_bytes(bytes);
        }
        let bytes = unbase64(text)
            .ok_or(Error::WeakSecret("it is neither 32 bytes in base64 nor 64 hexadecimal digits"))?;
        let digits = text.as_bytes();
        if !digits.iter().any(u8::is_ascii_uppercase) || !digits.iter().any(u8::is_ascii_lowercase) {
            return Err(Error::WeakSecret("its letters are of one case, so it is not random"));
        }
        Secret::from_bytes(bytes)
    }

    /// A secret from its bytes, which must be random.
    ///
    /// # Errors
    /// [`Error::WeakSecret`] when most of them are alike.
    pub fn from_bytes(bytes: [u8; SECRET_BYTES]) -> Result<Secret, Error> {
        if different(&bytes) < DIFFERENT_MIN {
            return Err(Error::WeakSecret("most of its bytes are alike"));
        }
        Ok(Secret(bytes))
    }

    /// A secret from a phrase that people can remember, by Argon2id (version 19, 64 MiB, 3 passes,
    /// 1 lane). The salt is the BLAKE3 hash, in a context of its own, of the cluster's name
    /// ([`Config::cluster`](crate::Config::cluster)). Every node of the cluster derives the same
    /// secret from the same phrase and name. A guess counts for one cluster only.
    ///
    /// It blocks for some tenths of a second and takes the memory for as long. A random secret is
    /// better: a phrase is as good as it is hard to guess. White space around it is ignored; all
    /// else counts, byte for byte.
    ///
    /// # Errors
    /// [`Error::WeakSecret`] when it has fewer than 16 bytes or fewer than 8 different ones.
    /// [`Error::Config`] when it has more than 1024 bytes, or there is no memory.
    pub fn from_phrase(phrase: impl AsRef<str>, cluster: &str) -> Result<Secret, Error> {
        let phrase = phrase.as_ref().trim().as_bytes();
        if phrase.len() < PHRASE_MIN_BYTES {
            return Err(Error::WeakSecret("a phrase has 16 bytes at least"));
        }
        if different(phrase) < PHRASE_DIFFERENT_MIN {
            return Err(Error::WeakSecret("most of the phrase's bytes are alike"));
        }
        if phrase.len() > PHRASE_MAX_BYTES {
            return Err(Error::Config(format!("the secret's phrase has more than {PHRASE_MAX_BYTES} bytes")));
        }
        let salt = blake3::derive_key("replite 2026 v1 phrase salt", cluster.as_bytes());
        let mut bytes = [0; SECRET_BYTES];
        let failed = |error| Error::Config(format!("no secret can be derived from the phrase: {error}"));
        let cost = argon2::Params::new(PHRASE_MEMORY_KIB, PHRASE_PASSES, 1, Some(SECRET_BYTES));
        argon2::Argon2::new(argon2::Algorithm::Argon2id, argon2::Version::V0x13, cost.map_err(failed)?)
            .hash_password_into(phrase, &salt, &mut bytes)
            .map_err(failed)?;
        Ok(Secret(bytes))
    }

    /// The text form, for an environment variable or a file of the other nodes: 43 digits of
    /// URL-safe base64 (letters, digits, `-` and `_`). Each reader of it is a member of the
    /// cluster.
    pub fn to_text(&self) -> String {
        Base64UrlUnpadded::encode_string(&self.0)
    }

    /// One for tests, whatever its bytes.
    #[cfg(any(test, all(fuzzing, feature = "testing")))]
    pub(crate) fn fixed(bytes: [u8; SECRET_BYTES]) -> Secret {
        Secret(bytes)
    }
}

/// How many different bytes there are.
fn different(bytes: &[u8]) -> usize {
    let mut seen = [false; 256];
    bytes.iter().filter(|byte| !std::mem::replace(&mut seen[usize::from(**byte)], true)).count()
}

/// The bytes of either base64 alphabet, with or without padding, and nothing else: the bits beyond
/// the last byte are zero.
fn unbase64(text: &str) -> Option<[u8; SECRET_BYTES]> {
    let digits = if text.len() == 44 { text.strip_suffix('=')? } else { text };
    if digits.len() != 43 {
        return None;
    }
    let mut bytes = [0; SECRET_BYTES];
    let decoded = match digits.contains(['+', '/']) {
        true => Base64Unpadded::decode(digits, &mut bytes),
        false => Base64UrlUnpadded::decode(digits, &mut bytes),
    };
    decoded.is_ok_and(|decoded| decoded.len() == SECRET_BYTES).then_some(bytes)
}

impl fmt::Debug for Secret {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("Secret(..)")
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[track_caller]
    fn is_weak(made: Result<Secret, Error>) {
        let Err(error) = made else { panic!("not refused") };
        assert!(matches!(error, Error::WeakSecret(_)), "{error}");
        assert!(error.to_string().contains("openssl rand -base64 32"), "{error}");
    }

    #[test]
    fn a_secret_is_thirty_two_random_bytes_in_one_of_its_forms() {
        let secret = Secret::generate().unwrap();
        assert_ne!(secret.0, Secret::generate().unwrap().0);
        let text = secret.to_text();
        assert_eq!(text.len(), 43);
        assert!(text.bytes().all(|b| b.is_ascii_alphanumeric() || b"-_".contains(&b)), "{text}");
        let standard = text.replace('-', "+").replace('_', "/");
        let hex = crate::hex::hex(&secret.0);
        for form in
            [&text, &standard, &format!("{standard}="), &hex, &hex.to_uppercase(), &format!(" {text}\n")]
        {
            assert_eq!(Secret::new(form).unwrap().0, secret.0, "{form}");
        }
        // RFC 4648's digits, by another's tool: `printf .. | base64`.
        let known = Secret::new("AAECAwQFBgcICQoLDA0ODxAREhMUFRYXGBkaGxwdHv8=").unwrap();
        assert_eq!(known.0[..31], std::array::from_fn::<u8, 31, _>(|n| n as u8));
        assert_eq!(known.to_text(), "AAECAwQFBgcICQoLDA0ODxAREhMUFRYXGBkaGxwdHv8");
    }

    #[test]
    fn what_people_think_up_is_no_secret() {
        for text in [
            "",
            "aaaaaaaaaaaaaaaa",
            "correct horse battery staple",
            "sixteen bytes or more, and random",
            // The right lengths.
            &"a".repeat(43),
            &"A".repeat(43),
            &"ab".repeat(32),
            &"0123456789abcdef".repeat(4),
            "correct-horse-battery-staple-and-some-other",
            "correct-horse-battery-staple-and-some-otheq",
            "CORRECT-HORSE-BATTERY-STAPLE-AND-SOME-OTHEQ",
            "tK2v0CZkYt8bM5WJ3uH1nQxPp7sDfLrEaG6yVoXiN4d=",
            "tK2v0CZkYt8bM5WJ3uH1nQxPp7sDfLrEaG6yVoXiN4c==",
            "tK2v0CZkYt8bM5WJ3uH1nQxPp7sDfLrEaG6yVoXiN4",
            "tK2v0CZkYt8bM5WJ3uH1nQxPp7sDfLrEaG6yVoXi\u{e9}4c",
        ] {
            is_weak(Secret::new(text));
        }
        is_weak(Secret::from_bytes([7; 32]));
        is_weak(Secret::from_phrase("too short", "notes"));
        is_weak(Secret::from_phrase("a".repeat(40), "notes"));
        assert!(matches!(Secret::from_phrase("many words ".repeat(100), "notes"), Err(Error::Config(_))));
    }

    /// The parameters are part of the format: nodes of two versions derive the same.
    #[test]
    fn a_phrase_gives_each_cluster_one_secret_of_its_own() {
        let phrase = "correct horse battery staple";
        let secret = Secret::from_phrase(phrase, "notes").unwrap();
        assert_eq!(secret.to_text(), "LQsWPAhQpLOFKV3cE2jjoxM7aDbGRiXmlRJwgrxcpfY");
        assert_eq!(Secret::from_phrase(format!("{phrase}\n"), "notes").unwrap().0, secret.0);
        assert_ne!(Secret::from_phrase(phrase, "shop").unwrap().0, secret.0);
    }

    #[test]
    fn secrets_redact_themselves() {
        let secret = Secret::fixed([1; 32]);
        assert_eq!(format!("{secret:?}"), "Secret(..)");
        assert_eq!(format!("{:?}", Keyring::new(&[secret]).unwrap()), "Keyring(..)");
    }
}
