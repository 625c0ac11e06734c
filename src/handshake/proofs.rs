//! The proofs that follow a knock and its answer. Each is over both nonces and the connection.

use bytes::BytesMut;

use crate::handshake::{Answer, Knock, Nonce};
use crate::secret::{Keyring, PROOF_BYTES, Proved, Purpose};
use crate::wire::{self, HEADER_BYTES, HELLO_PROOF_BYTES, Hello, Message, Standing};

/// What such a proof covers, with what is said.
fn fresh<'a>(knock: &'a Knock, answer: &'a Nonce, said: &'a [u8]) -> [&'a [u8]; 6] {
    let [exporter, client, server] = knock.binding.parts();
    [&knock.nonce, answer, said, exporter, client, server]
}

/// Puts the proof into a hello.
pub(crate) fn seal_hello(hello: &mut Hello, knock: &Knock, answer: &Nonce, keys: &Keyring) {
    let rest = hello_rest(hello);
    hello.proof = keys.prove(Purpose::Hello, &fresh(knock, answer, &rest));
}

/// By which secret a hello proves that its sender saw our nonce, if it does and belongs to this
/// knock. It may be another one than the knock's, and of other rights. `payload` is that of the
/// hello's unit: the proof is over the bytes that came, not over what we would have sent.
pub(crate) fn hello_holds(
    hello: &Hello,
    payload: &[u8],
    knock: &Knock,
    answer: &Nonce,
    keys: &Keyring,
) -> Option<Proved> {
    let rest = payload.get(HELLO_PROOF_BYTES..).unwrap_or_default();
    let fits = hello.peer.node == knock.node && hello.peer.incarnation == knock.incarnation;
    keys.proved(Purpose::Hello, &fresh(knock, answer, rest), &hello.proof).filter(|_| fits)
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

/// The proof that who knocked saw our nonce, and asks how this node stands.
pub(crate) fn question(knock: &Knock, answer: &Nonce, keys: &Keyring) -> [u8; PROOF_BYTES] {
    keys.prove(Purpose::Question, &fresh(knock, answer, &[]))
}

/// By which secret that is proved, if it holds.
pub(crate) fn question_holds(proof: &[u8], knock: &Knock, answer: &Nonce, keys: &Keyring) -> Option<Proved> {
    keys.proved(Purpose::Question, &fresh(knock, answer, &[]), proof)
}

/// The proof that who knocked saw our nonce, and speaks with the members on this connection.
#[cfg(feature = "members")]
pub(crate) fn prove_members(knock: &Knock, answer: &Nonce, keys: &Keyring) -> [u8; PROOF_BYTES] {
    keys.prove(Purpose::Members, &fresh(knock, answer, &[]))
}

/// By which secret that is proved, if it holds.
#[cfg(feature = "members")]
pub(crate) fn members_hold(proof: &[u8], knock: &Knock, answer: &Nonce, keys: &Keyring) -> Option<Proved> {
    keys.proved(Purpose::Members, &fresh(knock, answer, &[]), proof)
}

/// The proof that who knocked saw our nonce, and forwards requests on this connection.
pub(crate) fn prove_forwards(knock: &Knock, answer: &Nonce, keys: &Keyring) -> [u8; PROOF_BYTES] {
    keys.prove(Purpose::Forwards, &fresh(knock, answer, &[]))
}

/// By which secret that is proved, if it holds.
pub(crate) fn forwards_hold(proof: &[u8], knock: &Knock, answer: &Nonce, keys: &Keyring) -> Option<Proved> {
    keys.proved(Purpose::Forwards, &fresh(knock, answer, &[]), proof)
}

/// Puts the proof into what a node says of itself.
pub(crate) fn seal_standing(standing: &mut Standing, knock: &Knock, answer: &Nonce, keys: &Keyring) {
    let rest = after_proof(&Message::Standing(standing.clone()));
    standing.proof = keys.prove(Purpose::Standing, &fresh(knock, answer, &rest));
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
    fits && keys.verify(Purpose::Standing, &fresh(knock, &answer.nonce, rest), &standing.proof)
}

/// The proof that who knocked saw our nonce, and gives this command.
pub(crate) fn prove_command(
    knock: &Knock,
    answer: &Nonce,
    command: &[u8],
    keys: &Keyring,
) -> [u8; PROOF_BYTES] {
    keys.prove(Purpose::Command, &fresh(knock, answer, command))
}

/// Whether that holds.
pub(crate) fn command_holds(
    proof: &[u8],
    command: &[u8],
    (knock, answer): (&Knock, &Nonce),
    keys: &Keyring,
) -> bool {
    keys.verify(Purpose::Command, &fresh(knock, answer, command), proof)
}

/// The proof that the node which answered the knock says this to the command.
pub(crate) fn prove_command_answer(
    knock: &Knock,
    answer: &Nonce,
    said: &[u8],
    keys: &Keyring,
) -> [u8; PROOF_BYTES] {
    keys.prove(Purpose::CommandAnswer, &fresh(knock, answer, said))
}

/// Whether that holds.
pub(crate) fn command_answer_holds(
    proof: &[u8],
    said: &[u8],
    (knock, answer): (&Knock, &Nonce),
    keys: &Keyring,
) -> bool {
    keys.verify(Purpose::CommandAnswer, &fresh(knock, answer, said), proof)
}
