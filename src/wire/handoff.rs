//! The units of a handoff: of the lease from a primary that lives to a replica that lives.
use crate::txid::Position;
use crate::wire::WireError;
use crate::wire::fields::Fields;

/// The longest id of a boot.
pub(crate) const BOOT_ID_MAX_BYTES: usize = 64;
/// The longest reason why a replica declines.
pub(super) const DECLINED_MAX_BYTES: usize = 256;
/// The longest version of a lease's record: a store's text for it is much shorter.
pub(super) const VERSION_MAX_BYTES: usize = 1024;
/// The most bytes of a lease's record.
pub(crate) const LEASE_RECORD_MAX_BYTES: usize = 16 * 1024;

/// How far a primary is that hands its lease over.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
#[repr(u8)]
pub(crate) enum HandoffStage {
    /// It came to nothing: this node takes requests again.
    GoesOn = 0,
    /// This node takes no new requests.
    Begins = 1,
    /// Another node has the lease: the record says which.
    Done = 2,
}

/// A primary offers its lease to the replica: with this as its last state.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(crate) struct LeaseOffer {
    /// Names the swap that is to come.
    pub(crate) attempt: u128,
    pub(crate) position: Position,
}

/// A replica's answer.
#[derive(Clone, PartialEq, Eq, Debug)]
pub(crate) struct Accept {
    pub(crate) attempt: u128,
    /// Everything up to the offer's position is on its disk, and this is the id of the boot of its
    /// machine; empty where the system has none. Or why it does not take the lease.
    pub(crate) answer: Result<String, String>,
}

/// The swap was done: this is the lease's record.
#[derive(Clone, PartialEq, Eq, Debug)]
pub(crate) struct Handed<'a> {
    pub(crate) attempt: u128,
    /// The store's text for the record's version.
    pub(crate) version: &'a str,
    /// The record, as it is in the store.
    pub(crate) record: &'a [u8],
}

impl Handed<'_> {
    /// Whether a unit has room for it. If not, the replica finds the record in the store.
    pub(crate) fn fits(&self) -> bool {
        self.version.len() <= VERSION_MAX_BYTES && self.record.len() <= LEASE_RECORD_MAX_BYTES
    }
}

impl<'a> Fields<'a> {
    pub(super) fn handoff(&mut self) -> Result<HandoffStage, WireError> {
        match self.array()? {
            [0] => Ok(HandoffStage::GoesOn),
            [1] => Ok(HandoffStage::Begins),
            [2] => Ok(HandoffStage::Done),
            _ => Err(WireError::Fields("an unknown stage of a handoff")),
        }
    }

    pub(super) fn offer(&mut self) -> Result<LeaseOffer, WireError> {
        Ok(LeaseOffer { attempt: self.attempt()?, position: self.position()? })
    }

    pub(super) fn accept(&mut self) -> Result<Accept, WireError> {
        let (attempt, accepted, text) = (self.attempt()?, self.flag()?, self.rest());
        if text.len() > if accepted { BOOT_ID_MAX_BYTES } else { DECLINED_MAX_BYTES } {
            return Err(WireError::Fields("an answer to an offer that is too long"));
        }
        let text = std::str::from_utf8(text).ok().filter(|text| !text.chars().any(char::is_control));
        let text = text.ok_or(WireError::Fields("an answer to an offer that is no plain text"))?;
        let text = text.to_owned();
        Ok(Accept { attempt, answer: if accepted { Ok(text) } else { Err(text) } })
    }

    pub(super) fn handed(&mut self) -> Result<Handed<'a>, WireError> {
        let attempt = self.attempt()?;
        let length = usize::from(u16::from_le_bytes(*self.array()?));
        if length > VERSION_MAX_BYTES {
            return Err(WireError::Fields("a version of a record that is too long"));
        }
        let version = std::str::from_utf8(self.bytes(length)?)
            .map_err(|_| WireError::Fields("a version of a record that is no text"))?;
        let record = self.rest();
        if record.len() > LEASE_RECORD_MAX_BYTES {
            return Err(WireError::Fields("a record of a lease that is too long"));
        }
        Ok(Handed { attempt, version, record })
    }

    fn attempt(&mut self) -> Result<u128, WireError> {
        Ok(u128::from_le_bytes(*self.array()?))
    }
}
