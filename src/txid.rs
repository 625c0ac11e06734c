//! The words for a place in the history: [`Epoch`], [`Txid`], [`Position`], [`EpochHistory`].

use std::fmt;
use std::str::FromStr;

use crate::checksum::Checksum;
use crate::hex::unhex_u64;
use crate::parse::ParseError;

/// One term of one primary: a number and a random branch id. The number grows at every change and
/// restart of the primary. The branch id tells apart two histories that claim the same number.
///
/// ```
/// use replite::Epoch;
///
/// let (before, after) = (Epoch::new(3, 0xfeed), Epoch::new(4, 0xbeef));
/// assert!(before < after);
/// assert_eq!(before.to_string(), "0000000000000003-000000000000feed");
/// ```
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct Epoch {
    number: u64,
    branch: u64,
}

impl Epoch {
    /// Bytes of the stored form: number, then branch, both little endian.
    pub(crate) const BYTES: usize = 16;

    /// An epoch from its number and branch id.
    pub const fn new(number: u64, branch: u64) -> Epoch {
        Epoch { number, branch }
    }

    /// The number; also the fencing token.
    pub const fn number(self) -> u64 {
        self.number
    }

    /// The random branch id.
    pub const fn branch(self) -> u64 {
        self.branch
    }

    pub(crate) fn to_bytes(self) -> [u8; Self::BYTES] {
        let mut bytes = [0; Self::BYTES];
        bytes[..8].copy_from_slice(&self.number.to_le_bytes());
        bytes[8..].copy_from_slice(&self.branch.to_le_bytes());
        bytes
    }

    /// Nothing when the number is above [`NUMBER_MAX`].
    pub(crate) fn from_bytes(bytes: &[u8; Self::BYTES]) -> Option<Epoch> {
        let number = Some(le_u64(&bytes[..8])).filter(|number| *number <= NUMBER_MAX)?;
        Some(Epoch { number, branch: le_u64(&bytes[8..]) })
    }
}

/// A committed transaction: its epoch and its number in the history. With both together, a wait for
/// it can't succeed on another history. The text form is three fields of 16 hex digits, joined by
/// `-`.
///
/// ```
/// use replite::{Epoch, Txid};
///
/// let txid = Txid::new(Epoch::new(3, 0xfeed), 77);
/// assert_eq!(txid.to_string().parse::<Txid>()?, txid);
/// // What was committed under another branch id is another transaction.
/// assert_ne!(txid, Txid::new(Epoch::new(3, 0xbeef), 77));
/// # Ok::<_, Box<dyn std::error::Error>>(())
/// ```
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct Txid {
    epoch: Epoch,
    number: u64,
}

impl Txid {
    /// A transaction id from its epoch and its number.
    pub const fn new(epoch: Epoch, number: u64) -> Txid {
        Txid { epoch, number }
    }

    /// The epoch in which the transaction was committed.
    pub const fn epoch(self) -> Epoch {
        self.epoch
    }

    /// The transaction's number; one more for each transaction of the history.
    pub const fn number(self) -> u64 {
        self.number
    }
}

/// The highest number of a transaction, and of an epoch, that a node takes from a file or a peer.
/// No history gets there, and there is always one more: a number that is only claimed overflows
/// nothing.
pub(crate) const NUMBER_MAX: u64 = u64::MAX >> 1;

/// A state of the database, named exactly: the last transaction in it and the checksum of all its
/// pages.
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
/// let mut positions = db.watch();
/// db.write(|tx| Ok::<_, Error>(tx.execute("INSERT INTO notes VALUES ('a')", [])?)).await?;
/// // Nodes that are at the same position have the same pages.
/// positions.changed().await.expect("the database is open");
/// println!("{:?}", *positions.borrow());
/// # Ok(())
/// # }
/// ```
#[derive(Clone, Copy, PartialEq, Eq, Hash)]
pub struct Position {
    txid: Txid,
    checksum: Checksum,
}

impl Position {
    /// Bytes of the stored form: epoch, number (little endian), checksum (little endian).
    pub(crate) const BYTES: usize = 40;

    /// A position from its parts.
    pub const fn new(txid: Txid, checksum: Checksum) -> Position {
        Position { txid, checksum }
    }

    /// The last transaction of the state.
    pub const fn txid(self) -> Txid {
        self.txid
    }

    /// The epoch of the last transaction of the state.
    pub const fn epoch(self) -> Epoch {
        self.txid.epoch
    }

    /// The number of the last transaction of the state.
    pub const fn number(self) -> u64 {
        self.txid.number
    }

    /// The checksum of the state.
    pub const fn checksum(self) -> Checksum {
        self.checksum
    }

    pub(crate) fn to_bytes(self) -> [u8; Self::BYTES] {
        let mut bytes = [0; Self::BYTES];
        bytes[..16].copy_from_slice(&self.txid.epoch.to_bytes());
        bytes[16..24].copy_from_slice(&self.txid.number.to_le_bytes());
        bytes[24..].copy_from_slice(&self.checksum.as_u128().to_le_bytes());
        bytes
    }

    /// Nothing when the number of the transaction or of its epoch is above [`NUMBER_MAX`].
    pub(crate) fn from_bytes(bytes: &[u8; Self::BYTES]) -> Option<Position> {
        let mut epoch = [0; Epoch::BYTES];
        epoch.copy_from_slice(&bytes[..16]);
        let mut checksum = [0; 16];
        checksum.copy_from_slice(&bytes[24..]);
        let number = Some(le_u64(&bytes[16..24])).filter(|number| *number <= NUMBER_MAX)?;
        Some(Position {
            txid: Txid { epoch: Epoch::from_bytes(&epoch)?, number },
            checksum: Checksum::from_u128(u128::from_le_bytes(checksum)),
        })
    }
}

fn le_u64(bytes: &[u8]) -> u64 {
    let mut eight = [0; 8];
    eight.copy_from_slice(bytes);
    u64::from_le_bytes(eight)
}

macro_rules! text_form {
    ($type:ty, $what:literal, $fields:literal) => {
        impl fmt::Debug for $type {
            fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                fmt::Display::fmt(self, f)
            }
        }

        impl serde::Serialize for $type {
            fn serialize<S: serde::Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
                serializer.collect_str(self)
            }
        }

        impl<'de> serde::Deserialize<'de> for $type {
            fn deserialize<D: serde::Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
                let text = <std::borrow::Cow<'de, str>>::deserialize(deserializer)?;
                text.parse().map_err(serde::de::Error::custom)
            }
        }

        impl FromStr for $type {
            type Err = ParseError;

            fn from_str(text: &str) -> Result<Self, ParseError> {
                let bad = || ParseError::new($what, text);
                let fields: [&str; $fields] =
                    text.split('-').collect::<Vec<_>>().try_into().map_err(|_| bad())?;
                Self::from_fields(fields).ok_or_else(bad)
            }
        }
    };
}

text_form!(Epoch, "epoch", 2);
text_form!(Txid, "transaction id", 3);
text_form!(Position, "position", 4);

impl Epoch {
    fn from_fields([number, branch]: [&str; 2]) -> Option<Epoch> {
        Some(Epoch { number: unhex_u64(number)?, branch: unhex_u64(branch)? })
    }
}

impl Txid {
    fn from_fields([epoch, branch, number]: [&str; 3]) -> Option<Txid> {
        Some(Txid { epoch: Epoch::from_fields([epoch, branch])?, number: unhex_u64(number)? })
    }
}

impl Position {
    fn from_fields([epoch, branch, number, checksum]: [&str; 4]) -> Option<Position> {
        let txid = Txid::from_fields([epoch, branch, number])?;
        Some(Position { txid, checksum: checksum.parse().ok()? })
    }
}

impl fmt::Display for Epoch {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{:016x}-{:016x}", self.number, self.branch)
    }
}

impl fmt::Display for Txid {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}-{:016x}", self.epoch, self.number)
    }
}

impl fmt::Display for Position {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}-{}", self.txid, self.checksum)
    }
}

/// Where an epoch begins in the history.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(crate) struct EpochStart {
    pub(crate) epoch: Epoch,
    /// The number of the first transaction that belongs to the epoch, committed yet or not.
    pub(crate) first: u64,
    /// The checksum of the state before that transaction.
    pub(crate) before: Checksum,
}

/// What became of a transaction in a history.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(crate) enum Place {
    /// The history has, or may come to have, this transaction: only its number decides.
    OnHistory,
    /// An epoch that this history has not heard of, whatever its number: it may be in the future of
    /// this history, or on another branch.
    Unknown,
    /// Another branch: this history will never have the transaction.
    Lost,
}

/// The epochs of a database's history, oldest first. Numbers and first transactions never fall.
#[derive(Clone, PartialEq, Eq, Debug, Default)]
pub(crate) struct EpochHistory {
    starts: Vec<EpochStart>,
}

impl EpochHistory {
    /// The most epochs that a node remembers; older ones are forgotten, those without a transaction
    /// before all others. One is added at each start of a primary.
    pub(crate) const MAX: usize = 4096;
    /// Bytes of one stored entry: epoch, first transaction, checksum before it.
    pub(crate) const ENTRY_BYTES: usize = 40;

    /// Adds the newest epoch.
    ///
    /// # Panics
    /// When the epoch is not newer than the last one: that would be two histories in one.
    pub(crate) fn push(&mut self, start: EpochStart) {
        if let Some(last) = self.last() {
            assert!(
                start.epoch.number > last.epoch.number && start.first >= last.first,
                "epoch {start:?} does not follow {last:?}"
            );
        }
        if self.starts.len() == Self::MAX {
            // An epoch that names no transaction goes first. Many starts or raises without a write
            // must not push out the one that names the state. The oldest may be that one without a
            // transaction of its own.
            let ends = |at: usize| self.starts.get(at + 1).map_or(start.first, |next| next.first);
            let empty = (1..Self::MAX).find(|&at| self.starts[at].first == ends(at));
            self.starts.remove(empty.unwrap_or(0));
        }
        self.starts.push(start);
    }

    pub(crate) fn last(&self) -> Option<&EpochStart> {
        self.starts.last()
    }

    /// The newest epoch, or the one of number 0 when there is none yet.
    pub(crate) fn epoch(&self) -> Epoch {
        self.last().map_or(Epoch::new(0, 0), |s| s.epoch)
    }

    pub(crate) fn iter(&self) -> impl Iterator<Item = &EpochStart> {
        self.starts.iter()
    }

    /// The epoch of the transaction with this number.
    pub(crate) fn epoch_of(&self, number: u64) -> Option<Epoch> {
        self.starts.iter().rev().find(|s| s.first <= number).or(self.starts.first()).map(|s| s.epoch)
    }

    /// Where a transaction stands in this history.
    pub(crate) fn place(&self, txid: Txid) -> Place {
        let Some(at) = self.starts.iter().rposition(|s| s.epoch == txid.epoch) else {
            return Place::Unknown;
        };
        // The state that the oldest epoch began with counts as its own.
        let oldest = at == 0 && txid.number.checked_add(1) == Some(self.starts[0].first);
        let begun = txid.number >= self.starts[at].first || oldest;
        let ended = self.starts.get(at + 1).is_some_and(|next| txid.number >= next.first);
        if begun && !ended { Place::OnHistory } else { Place::Lost }
    }

    /// The last transaction of this history before one that its epoch lost: the next epoch began
    /// without it.
    pub(crate) fn kept_before(&self, lost: Txid) -> Option<Txid> {
        let at = self.starts.iter().rposition(|s| s.epoch == lost.epoch)?;
        let kept = self.starts.get(at + 1)?.first.checked_sub(1)?;
        self.epoch_of(kept).filter(|_| kept < lost.number).map(|epoch| Txid::new(epoch, kept))
    }

    /// A history that has nothing but a state, and what follows it in its epoch.
    pub(crate) fn ending(state: Position) -> EpochHistory {
        let (first, before) = (state.number() + 1, state.checksum());
        EpochHistory { starts: vec![EpochStart { epoch: state.epoch(), first, before }] }
    }

    /// This history without the epochs that began after a state: their transactions are not in it.
    pub(crate) fn up_to(&self, state: Position) -> EpochHistory {
        let starts = self.starts.iter().filter(|start| start.first <= state.number() + 1);
        EpochHistory { starts: starts.copied().collect() }
    }

    /// A transaction up to which both histories are certainly one: the last before the newest epoch
    /// that they share.
    pub(crate) fn common(&self, other: &EpochHistory) -> u64 {
        let shared = self.starts.iter().rev().find(|start| other.starts.contains(start));
        shared.map_or(0, |start| start.first.saturating_sub(1))
    }

    /// Whether it has no epoch.
    pub(crate) fn is_empty(&self) -> bool {
        self.starts.is_empty()
    }

    /// The epochs that are left when another history takes the place of this one. Those before the
    /// last that both share are in both, also when one of them has forgotten them.
    pub(crate) fn left_for(&self, other: &EpochHistory) -> impl Iterator<Item = Epoch> {
        let shared = |start: &EpochStart| other.starts.iter().rev().any(|o| o.epoch == start.epoch);
        let from = self.starts.iter().rposition(shared).map_or(0, |at| at + 1);
        self.starts[from..].iter().map(|start| start.epoch)
    }

    pub(crate) fn encode(&self) -> Vec<u8> {
        let mut bytes = Vec::with_capacity(4 + self.starts.len() * Self::ENTRY_BYTES);
        bytes.extend_from_slice(&(self.starts.len() as u32).to_le_bytes());
        for start in &self.starts {
            bytes.extend_from_slice(&start.epoch.to_bytes());
            bytes.extend_from_slice(&start.first.to_le_bytes());
            bytes.extend_from_slice(&start.before.as_u128().to_le_bytes());
        }
        bytes
    }

    /// Reads what [`EpochHistory::encode`] wrote, or says in a word what is wrong with it.
    pub(crate) fn decode(bytes: &[u8]) -> Result<EpochHistory, &'static str> {
        let (count, entries) = bytes.split_at_checked(4).ok_or("epoch history too short")?;
        let count = u32::from_le_bytes([count[0], count[1], count[2], count[3]]) as usize;
        if count > Self::MAX {
            return Err("epoch history too long");
        }
        if entries.len() != count * Self::ENTRY_BYTES {
            return Err("epoch history of the wrong length");
        }
        let mut history = EpochHistory::default();
        for entry in entries.chunks_exact(Self::ENTRY_BYTES) {
            let mut fixed = [0; Position::BYTES];
            fixed.copy_from_slice(entry);
            // An entry has the layout of a position.
            let p = Position::from_bytes(&fixed).ok_or("epoch history beyond all numbers")?;
            let start = EpochStart { epoch: p.epoch(), first: p.number(), before: p.checksum() };
            if history.last().is_some_and(|l| start.epoch.number <= l.epoch.number || start.first < l.first) {
                return Err("epoch history out of order");
            }
            history.starts.push(start);
        }
        Ok(history)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn history(starts: &[(u64, u64, u64)]) -> EpochHistory {
        let mut h = EpochHistory::default();
        for &(number, branch, first) in starts {
            h.push(EpochStart { epoch: Epoch::new(number, branch), first, before: Checksum::EMPTY });
        }
        h
    }

    #[test]
    fn text_forms_round_trip_and_refuse_anything_else() {
        let txid = Txid::new(Epoch::new(3, 0xfeed), 77);
        assert_eq!(txid.to_string(), "0000000000000003-000000000000feed-000000000000004d");
        assert_eq!(txid.to_string().parse::<Txid>().unwrap(), txid);
        let position = Position::new(txid, Checksum::from_u128(5));
        assert_eq!(position.to_string().parse::<Position>().unwrap(), position);
        assert_eq!(Position::from_bytes(&position.to_bytes()), Some(position));
        for bad in ["", "-", "3-feed-4d", "0000000000000003-000000000000feed-+00000000000004d"] {
            assert!(bad.parse::<Txid>().is_err(), "{bad}");
        }
        assert!(txid.to_string().parse::<Position>().is_err());
    }

    #[test]
    fn a_number_that_no_history_gets_to_overflows_nothing() {
        let of = |number| Position::new(Txid::new(Epoch::new(1, 10), number), Checksum::EMPTY);
        assert_eq!(Position::from_bytes(&of(NUMBER_MAX).to_bytes()), Some(of(NUMBER_MAX)));
        assert_eq!(Position::from_bytes(&of(NUMBER_MAX + 1).to_bytes()), None);
        // As text it may come from a client.
        let last: Txid = of(u64::MAX).txid().to_string().parse().unwrap();
        assert_eq!(history(&[(1, 10, 1)]).place(last), Place::OnHistory);
        assert_eq!(history(&[(1, 10, 0)]).place(last), Place::OnHistory);
        assert_eq!(history(&[(1, 10, 1), (2, 20, 5)]).place(last), Place::Lost);
        assert!(EpochHistory::decode(&history(&[(1, 10, NUMBER_MAX)]).encode()).is_ok());
        assert!(EpochHistory::decode(&history(&[(1, 10, NUMBER_MAX + 1)]).encode()).is_err());
        let epoch = |number| Position::new(Txid::new(Epoch::new(number, 10), 1), Checksum::EMPTY);
        assert_eq!(Position::from_bytes(&epoch(NUMBER_MAX).to_bytes()), Some(epoch(NUMBER_MAX)));
        assert_eq!(Position::from_bytes(&epoch(NUMBER_MAX + 1).to_bytes()), None);
        assert!(EpochHistory::decode(&history(&[(NUMBER_MAX, 10, 1)]).encode()).is_ok());
        assert!(EpochHistory::decode(&history(&[(NUMBER_MAX + 1, 10, 1)]).encode()).is_err());
    }

    #[test]
    fn a_transaction_of_an_epoch_that_went_on_otherwise_is_lost() {
        let h = history(&[(1, 10, 1), (2, 20, 5), (4, 40, 9)]);
        let place = |n, b, t| h.place(Txid::new(Epoch::new(n, b), t));
        assert_eq!(place(1, 10, 0), Place::OnHistory);
        assert_eq!(place(1, 10, 4), Place::OnHistory);
        assert_eq!(place(1, 10, 5), Place::Lost, "epoch 2 began before it");
        assert_eq!(place(2, 20, 4), Place::Lost, "belongs to epoch 1");
        assert_eq!(place(4, 40, 1000), Place::OnHistory);
        // No number says whether an epoch is to come, or was left.
        assert_eq!(place(2, 21, 6), Place::Unknown, "another branch under the same number");
        assert_eq!(place(3, 30, 9), Place::Unknown, "an epoch that this history passed over");
        assert_eq!(place(5, 50, 10), Place::Unknown);
        assert_eq!(h.epoch_of(4), Some(Epoch::new(1, 10)));
        assert_eq!(h.epoch_of(5), Some(Epoch::new(2, 20)));
    }

    #[test]
    fn epochs_without_a_transaction_are_forgotten_first() {
        let max = EpochHistory::MAX as u64;
        let start =
            |number, first| EpochStart { epoch: Epoch::new(number, number), first, before: Checksum::EMPTY };
        let on_history = |h: &EpochHistory, e, n| h.place(Txid::new(Epoch::new(e, e), n)) == Place::OnHistory;
        // A new database is named by its first epoch before it has a transaction.
        let mut idle = EpochHistory::default();
        (1..=max + 10).for_each(|number| idle.push(start(number, 1)));
        assert!(on_history(&idle, 1, 0));
        let mut h = history(&[(1, 1, 1), (2, 2, 5), (3, 3, 9)]);
        (4..=max + 10).for_each(|number| h.push(start(number, 12)));
        assert_eq!(h.iter().count(), EpochHistory::MAX);
        assert!(on_history(&h, 1, 4) && on_history(&h, 2, 8) && on_history(&h, 3, 11));
        assert_eq!(h.epoch().number(), max + 10);
        assert_eq!(EpochHistory::decode(&h.encode()).unwrap(), h);
        // Where each has one, the oldest.
        let mut busy = EpochHistory::default();
        (1..=max + 10).for_each(|number| busy.push(start(number, number)));
        assert!(!on_history(&busy, 10, 10) && on_history(&busy, 11, 11));
    }

    #[test]
    fn the_epochs_that_are_left_are_those_after_the_last_shared_one() {
        let old = history(&[(1, 10, 1), (2, 20, 5), (4, 40, 9)]);
        let left =
            |other: &[(u64, u64, u64)]| old.left_for(&history(other)).map(Epoch::number).collect::<Vec<_>>();
        assert_eq!(left(&[(1, 10, 1), (2, 20, 5), (4, 40, 9), (5, 50, 12)]), [0; 0]);
        assert_eq!(left(&[(1, 10, 1), (2, 20, 5), (5, 50, 8)]), [4]);
        assert_eq!(left(&[(1, 10, 1), (3, 30, 4)]), [2, 4]);
        assert_eq!(left(&[(1, 11, 1)]), [1, 2, 4], "nothing is shared");
        assert_eq!(left(&[(4, 40, 9), (5, 50, 12)]), [0; 0], "forgotten is not left");
    }

    #[test]
    fn an_epoch_history_survives_its_encoding_and_refuses_garbage() {
        let h = history(&[(1, 10, 1), (2, 20, 5)]);
        let bytes = h.encode();
        assert_eq!(EpochHistory::decode(&bytes).unwrap(), h);
        assert!(EpochHistory::decode(&bytes[..bytes.len() - 1]).is_err());
        assert!(EpochHistory::decode(&[0xff; 4]).is_err());
        assert!(EpochHistory::decode(&[]).is_err());
        let mut swapped = bytes.clone();
        swapped[4..44].copy_from_slice(&bytes[44..84]);
        swapped[44..84].copy_from_slice(&bytes[4..44]);
        assert!(EpochHistory::decode(&swapped).is_err());
    }
}
