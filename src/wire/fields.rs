//! A unit's hash, and its fields out of verified bytes.
use crate::checksum::{Checksum, Fingerprint, PageKey};
use crate::keys::TokenKey;
use crate::page::{PageNo, PageSize};
use crate::status::PeerInfo;
use crate::txid::{Epoch, EpochHistory, NUMBER_MAX, Position};
use crate::wire::piece::PageRun;
use crate::wire::{
    ADDRESS_MAX, Ack, FOLLOWS_NONE, Goodbye, HEADER_BYTES, HELLO_PROOF_BYTES, HealBegin, Heartbeat, Hello,
    Kind, MARKS_MAX, Message, NO_LEASE, PEER_MAX_BYTES, PeerKeys, Plan, REASON_MAX_BYTES, SPAN_MAX_PAGES,
    Segment, Sent, SnapBegin, SnapEnd, Standing, UNIT_KEY, WANT_MAX_PAGES, Want, WantRun, Welcome, WireError,
};

/// The hash of a unit that is no page, from its header and payload; what stands in the hash's place
/// is left out.
pub(super) fn hash_of(unit: &[u8]) -> [u8; 16] {
    hash_of_parts(&[&unit[..8], &unit[HEADER_BYTES..]])
}

fn hash_of_parts(parts: &[&[u8]]) -> [u8; 16] {
    let mut hasher = blake3::Hasher::new_keyed(&UNIT_KEY);
    for part in parts {
        hasher.update(part);
    }
    let mut hash = [0; 16];
    hash.copy_from_slice(&hasher.finalize().as_bytes()[..16]);
    hash
}

/// A unit of any kind and payload with a hash that holds.
#[cfg(any(test, all(fuzzing, feature = "testing")))]
pub(crate) fn sealed(kind: u8, payload: &[u8], key: PageKey) -> bytes::Bytes {
    let mut raw = (payload.len() as u32).to_le_bytes().to_vec();
    let [v0, v1] = crate::wire::VERSION.to_le_bytes();
    raw.extend_from_slice(&[kind, 0, v0, v1]);
    raw.extend_from_slice(&[0; 16]);
    raw.extend_from_slice(payload);
    let hash = match Kind::from_u8(kind) {
        Some(Kind::Page) => key.hash_of_numbered(payload).to_bytes(),
        Some(Kind::SnapPiece) => any_hash(&raw, key).unwrap_or([0; 16]),
        _ => hash_of(&raw),
    };
    raw[8..HEADER_BYTES].copy_from_slice(&hash);
    raw.into()
}

/// Checks the hash of header and payload.
pub(super) fn verify(
    kind: Option<Kind>,
    hash: [u8; 16],
    unit: &[u8],
    key: Option<PageKey>,
) -> Result<(), WireError> {
    let found = match (kind, key) {
        (Some(Kind::Page), Some(key)) => key.hash_of_numbered(&unit[HEADER_BYTES..]).to_bytes(),
        (Some(Kind::Page), None) => return Err(WireError::Fields("a page where none may be")),
        (Some(Kind::Next), _) => {
            return Err(WireError::Fields("a NEXT that goes on from no record, or from another"));
        }
        _ => hash_of(unit),
    };
    if found == hash { Ok(()) } else { Err(WireError::Hash) }
}

/// The message in header and payload, after the hash was found to hold.
pub(super) fn decode(
    kind: Kind,
    hash: [u8; 16],
    unit: &[u8],
    key: Option<PageKey>,
) -> Result<Message<'_>, WireError> {
    if kind != Kind::SnapPiece {
        verify(Some(kind), hash, unit, key)?;
    }
    let mut f = Fields(&unit[HEADER_BYTES..]);
    let message = match kind {
        Kind::TxnBegin => Message::TxnBegin(f.txn_begin()?),
        Kind::Page => Message::Change(f.page(hash)?),
        Kind::Patch => Message::Change(f.change()?),
        Kind::Txn => Message::Txn(f.txn()?),
        Kind::Next => return Err(WireError::Fields("a NEXT that goes on from no record, or from another")),
        Kind::TxnEnd => Message::TxnEnd(f.txn_end()?),
        Kind::Hello => Message::Hello(f.hello()?),
        Kind::Welcome => Message::Welcome(f.welcome()?),
        Kind::Epochs => Message::Epochs(f.history()?),
        Kind::Heartbeat => Message::Heartbeat(f.heartbeat()?),
        Kind::Ack => Message::Ack(Ack {
            applied: f.optional(Fields::position)?,
            synced: f.optional(Fields::position)?,
            clock: f.u64()?,
        }),
        Kind::SnapBegin => Message::SnapBegin(SnapBegin {
            first: f.position()?,
            from: f.page_no()?,
            page_size: f.page_size()?,
            pages: f.u32()?,
        }),
        Kind::SnapPiece => return piece(hash, unit, key),
        Kind::SnapEnd => Message::SnapEnd(SnapEnd { exact_at: f.position()?, pages: f.u32()? }),
        Kind::HealBegin => Message::HealBegin(f.heal_begin()?),
        Kind::Sums => f.sums()?,
        Kind::Want => Message::Want(f.want()?),
        Kind::Sent => Message::Sent(Sent { position: f.position()?, pages: f.u32()? }),
        Kind::Drain => Message::Drain,
        Kind::Standing => Message::Standing(f.standing()?),
        Kind::Handoff => Message::Handoff(f.handoff()?),
        Kind::Offer => Message::Offer(f.offer()?),
        Kind::Accept => Message::Accept(f.accept()?),
        Kind::Handed => Message::Handed(f.handed()?),
        Kind::Goodbye => Message::Goodbye(f.goodbye()?),
        Kind::Segment => Message::Segment(Segment {
            start: f.address()?,
            before: f.position()?,
            follows: Some(f.u64()?).filter(|&end| end != FOLLOWS_NONE),
            key: Fingerprint(*f.array()?),
        }),
    };
    if f.0.is_empty() { Ok(message) } else { Err(WireError::Fields("bytes after a unit's last field")) }
}

/// The hash of a piece: over its header and fields, and the hashes of its pages.
pub(super) fn piece_hash(unit: &[u8], run: &PageRun<'_>) -> [u8; 16] {
    let fields = &unit[HEADER_BYTES..unit.len() - run.bytes().len()];
    let hashes: Vec<u8> = run.hashes().iter().flat_map(|hash| hash.to_bytes()).collect();
    hash_of_parts(&[&unit[..8], fields, &hashes])
}

/// Hashes the pages of a piece, checks the unit's hash with that, and reads its fields.
fn piece<'a>(hash: [u8; 16], unit: &'a [u8], key: Option<PageKey>) -> Result<Message<'a>, WireError> {
    let key = key.ok_or(WireError::Fields("pages where none may be"))?;
    let mut f = Fields::of(&unit[HEADER_BYTES..]);
    let (first, position, size, pages) = (f.page_no()?, f.position()?, f.page_size_power()?, f.rest());
    let whole = pages.len().is_multiple_of(size.bytes());
    let most = (pages.len() / size.bytes()) as u32;
    if !whole || first.get().checked_add(most).is_none() {
        return Err(WireError::Fields("a snapshot piece of no whole pages, or of too many"));
    }
    let run = PageRun::hashed(first, pages, size, &key);
    if piece_hash(unit, &run) == hash {
        Ok(Message::SnapPiece { position, run })
    } else {
        Err(WireError::Hash)
    }
}

/// What stands in place of the hash of a piece whose fields may be anything.
#[cfg(any(test, all(fuzzing, feature = "testing")))]
fn any_hash(unit: &[u8], key: PageKey) -> Option<[u8; 16]> {
    let mut f = Fields::of(&unit[HEADER_BYTES..]);
    let (first, _, size) = (f.page_no().ok()?, f.position().ok()?, f.page_size_power().ok()?);
    Some(piece_hash(unit, &PageRun::hashed(first, f.rest(), size, &key)))
}

/// What is left of a payload.
pub(super) struct Fields<'a>(&'a [u8]);

impl<'a> Fields<'a> {
    pub(super) fn of(bytes: &'a [u8]) -> Fields<'a> {
        Fields(bytes)
    }

    pub(super) fn is_empty(&self) -> bool {
        self.0.is_empty()
    }

    pub(super) fn array<const N: usize>(&mut self) -> Result<&'a [u8; N], WireError> {
        let (taken, rest) =
            self.0.split_first_chunk().ok_or(WireError::Fields("a unit that is too short"))?;
        self.0 = rest;
        Ok(taken)
    }

    pub(super) fn bytes(&mut self, count: usize) -> Result<&'a [u8], WireError> {
        let (taken, rest) =
            self.0.split_at_checked(count).ok_or(WireError::Fields("a unit that is too short"))?;
        self.0 = rest;
        Ok(taken)
    }

    pub(super) fn rest(&mut self) -> &'a [u8] {
        std::mem::take(&mut self.0)
    }

    pub(super) fn flag(&mut self) -> Result<bool, WireError> {
        match self.array()? {
            [0] => Ok(false),
            [1] => Ok(true),
            _ => Err(WireError::Fields("a flag that is neither 0 nor 1")),
        }
    }

    fn optional<T>(
        &mut self,
        read: impl FnOnce(&mut Self) -> Result<T, WireError>,
    ) -> Result<Option<T>, WireError> {
        self.flag()?.then(|| read(self)).transpose()
    }

    pub(super) fn u32(&mut self) -> Result<u32, WireError> {
        Ok(u32::from_le_bytes(*self.array()?))
    }

    pub(super) fn u64(&mut self) -> Result<u64, WireError> {
        Ok(u64::from_le_bytes(*self.array()?))
    }

    pub(super) fn position(&mut self) -> Result<Position, WireError> {
        Position::from_bytes(self.array()?).ok_or(WireError::Fields("a position beyond all numbers"))
    }

    /// An address in a log to which the length of any file can be added.
    fn address(&mut self) -> Result<u64, WireError> {
        Some(self.u64()?)
            .filter(|address| *address <= ADDRESS_MAX)
            .ok_or(WireError::Fields("an address beyond all logs"))
    }

    pub(super) fn checksum(&mut self) -> Result<Checksum, WireError> {
        Ok(Checksum::from_u128(u128::from_le_bytes(*self.array()?)))
    }

    pub(super) fn epoch(&mut self) -> Result<Epoch, WireError> {
        Epoch::from_bytes(self.array()?).ok_or(WireError::Fields("an epoch beyond all numbers"))
    }

    pub(super) fn page_no(&mut self) -> Result<PageNo, WireError> {
        PageNo::new(self.u32()?).ok_or(WireError::Fields("page number 0"))
    }

    pub(super) fn page_size(&mut self) -> Result<PageSize, WireError> {
        PageSize::new(self.u32()?).map_err(|_| WireError::Fields("a page size that SQLite does not have"))
    }

    /// A page size as the power of two that it is.
    pub(super) fn page_size_power(&mut self) -> Result<PageSize, WireError> {
        let [power] = *self.array()?;
        let size = 1_u32.checked_shl(power.into()).and_then(|bytes| PageSize::new(bytes).ok());
        size.ok_or(WireError::Fields("a page size that SQLite does not have"))
    }

    fn history(&mut self) -> Result<EpochHistory, WireError> {
        EpochHistory::decode(self.rest()).map_err(WireError::Fields)
    }

    fn peer(&mut self) -> Result<PeerInfo, WireError> {
        let length = usize::from(u16::from_le_bytes(*self.array()?));
        if length > PEER_MAX_BYTES {
            return Err(WireError::Fields("a peer's description that is too long"));
        }
        let peer: PeerInfo = serde_json::from_slice(self.bytes(length)?)
            .map_err(|_| WireError::Fields("a peer that is no such JSON"))?;
        // Otherwise they would stand in logs, problems and pages.
        if !peer.addresses.are_plain() {
            return Err(WireError::Fields("addresses or labels with control characters"));
        }
        Ok(peer)
    }

    fn keys(&mut self) -> Result<PeerKeys, WireError> {
        let page = PageKey::from_bytes(*self.array()?);
        let token = self.optional(|f| Ok(TokenKey::from_bytes(*f.array()?)))?;
        Ok(PeerKeys { page, token })
    }

    fn hello(&mut self) -> Result<Hello, WireError> {
        Ok(Hello {
            proof: *self.array::<HELLO_PROOF_BYTES>()?,
            keys: self.keys()?,
            position: self.optional(Fields::position)?,
            resume: self.optional(|f| Ok((f.position()?, f.page_no()?)))?,
            suspect: self.flag()?,
            marks: self.marks()?,
            peer: self.peer()?,
            history: self.history()?,
        })
    }

    fn heal_begin(&mut self) -> Result<HealBegin, WireError> {
        Ok(HealBegin {
            from: self.position()?,
            page_size: self.page_size()?,
            pages: self.u32()?,
            compare: self.flag()?,
            diverged: self.flag()?,
        })
    }

    fn marks(&mut self) -> Result<Vec<Position>, WireError> {
        let [count] = *self.array()?;
        if usize::from(count) > MARKS_MAX {
            return Err(WireError::Fields("too many marks"));
        }
        (0..count).map(|_| self.position()).collect()
    }

    fn sums(&mut self) -> Result<Message<'a>, WireError> {
        let (first, span) = (self.page_no()?, self.u32()?);
        let (sums, rest) = self.rest().as_chunks();
        if !(1..=SPAN_MAX_PAGES).contains(&span) || sums.is_empty() || !rest.is_empty() {
            return Err(WireError::Fields("sums of no pages, of too many, or cut"));
        }
        Ok(Message::Sums { first, span, sums })
    }

    fn want(&mut self) -> Result<Want, WireError> {
        let (mut runs, mut pages) = (Vec::new(), 0);
        while !self.0.is_empty() {
            let (first, count) = (self.page_no()?, self.u32()? as usize);
            pages += count;
            if count == 0 || count > SPAN_MAX_PAGES as usize || pages > WANT_MAX_PAGES {
                return Err(WireError::Fields("a run of no pages, or too many pages are asked for"));
            }
            let (hashes, _) = self.bytes(count * 16)?.as_chunks();
            runs.push(WantRun { first, hashes: hashes.to_vec() });
        }
        Ok(Want { runs })
    }

    fn welcome(&mut self) -> Result<Welcome, WireError> {
        Ok(Welcome {
            epoch: self.epoch()?,
            plan: match self.array()? {
                [1] => Plan::Log,
                [2] => Plan::Snapshot,
                [3] => Plan::Heal,
                [4] => Plan::Resume,
                [5] => Plan::Compare,
                [6] => Plan::Recover,
                _ => return Err(WireError::Fields("an unknown plan")),
            },
            position: self.position()?,
            page_size: self.page_size()?,
            keys: self.keys()?,
            packed: self.flag()?,
            peer: self.peer()?,
        })
    }

    fn heartbeat(&mut self) -> Result<Heartbeat, WireError> {
        Ok(Heartbeat {
            position: self.position()?,
            clock: self.u64()?,
            lease_clock: Some(self.u64()?).filter(|&clock| clock != NO_LEASE),
        })
    }

    fn standing(&mut self) -> Result<Standing, WireError> {
        Ok(Standing {
            proof: *self.array::<HELLO_PROOF_BYTES>()?,
            position: self.optional(Fields::position)?,
            epoch: Some(self.u64()?)
                .filter(|number| *number <= NUMBER_MAX)
                .ok_or(WireError::Fields("an epoch beyond all numbers"))?,
            fit: self.flag()?,
            has_state: self.flag()?,
            has_content: self.flag()?,
            peer: self.peer()?,
        })
    }

    fn goodbye(&mut self) -> Result<Goodbye, WireError> {
        let reason = self.rest();
        if reason.len() > REASON_MAX_BYTES {
            return Err(WireError::Fields("a goodbye that is too long"));
        }
        let reason =
            std::str::from_utf8(reason).map_err(|_| WireError::Fields("a goodbye that is no text"))?;
        Ok(Goodbye { reason: reason.to_owned() })
    }
}
