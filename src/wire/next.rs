//! How a stream says a TXN that goes on from the record before it: without what the replica can
//! tell for itself.
//!
//! A NEXT unit is such a TXN without the position before, which is where the last record ended. In
//! its header's hash are the first bytes of the TXN's. A replica makes the TXN of it that the
//! primary's log has, bit for bit, before anything else looks at it. No log has a NEXT.

use bytes::{BufMut, Bytes, BytesMut};

use crate::txid::Position;
use crate::wire::decoder::Header;
use crate::wire::encode::head;
use crate::wire::fields::{Fields, hash_of};
use crate::wire::{HEADER_BYTES, Kind, TXN_MAX_BYTES, Unit};

/// Bytes of a TXN's payload before its position.
const LEADING_BYTES: usize = 2;
/// How much of the TXN's hash a NEXT has. The channel proves what it carries, and each page its
/// hash; this tells a node that puts the wrong position in from one that does not.
const CHECK_BYTES: usize = 4;

/// The side that sends.
#[derive(Debug, Default)]
pub(crate) struct Shortener {
    /// The record that was sent last has ended.
    follows: bool,
}

impl Shortener {
    /// What to send in the place of these bytes of a log, which are whole units or are not.
    pub(crate) fn shorten(&mut self, units: Bytes, whole: bool) -> Bytes {
        if !whole {
            self.follows = false;
            return units;
        }
        let (mut out, mut at, mut taken) = (BytesMut::new(), 0, 0);
        while let Some(Ok(Header { kind, unit_bytes, hash })) = units[at..].first_chunk().map(Header::parse)
            && let Some(unit) = units.get(at..at + unit_bytes)
        {
            if self.follows && kind == Some(Kind::Txn) && unit_bytes >= SHORTEST_BYTES {
                out.put_slice(&units[taken..at]);
                out.put_slice(&head(Kind::Next, unit_bytes - HEADER_BYTES - Position::BYTES));
                out.put_slice(&check_of(hash));
                out.put_slice(&unit[HEADER_BYTES..HEADER_BYTES + LEADING_BYTES]);
                out.put_slice(&unit[SHORTEST_BYTES..]);
                taken = at + unit_bytes;
            }
            if let Some(kind) = kind.filter(|kind| kind.is_of_record()) {
                self.follows = kind.ends_record();
            }
            at += unit_bytes;
        }
        if taken == 0 {
            return units;
        }
        out.put_slice(&units[taken..]);
        out.freeze()
    }
}

/// What a NEXT has in the place of the hash, where the TXN has this one.
fn check_of(hash: [u8; 16]) -> [u8; 16] {
    let mut check = [0; 16];
    check[..CHECK_BYTES].copy_from_slice(&hash[..CHECK_BYTES]);
    check
}

/// Header, and the payload up to the position's end.
const SHORTEST_BYTES: usize = HEADER_BYTES + LEADING_BYTES + Position::BYTES;

/// The side that receives.
#[derive(Debug, Default)]
pub(crate) struct Completer {
    /// Where the last record ended; none within one.
    after: Option<Position>,
}

impl Completer {
    /// The unit as the primary's log has it. A NEXT stays what it is when it goes on from nothing,
    /// or becomes another TXN than the one it stands for: those who decode it say that it is bad,
    /// as of any other unit.
    pub(crate) fn complete(&mut self, unit: Unit) -> Unit {
        let made = if unit.kind == Kind::Next { self.made(&unit) } else { None };
        let unit = made.unwrap_or(unit);
        if unit.kind.is_of_record() {
            let mut fields = Fields::of(unit.payload());
            self.after = match unit.kind {
                Kind::Txn => fields.txn().ok().map(|txn| txn.end.after),
                Kind::TxnEnd => fields.txn_end().ok().map(|end| end.after),
                _ => None,
            };
        }
        unit
    }

    fn made(&self, next: &Unit) -> Option<Unit> {
        let (before, payload) = (self.after?, next.payload());
        let (leading, rest) = payload.split_at_checked(LEADING_BYTES)?;
        if payload.len() + Position::BYTES > TXN_MAX_BYTES {
            return None;
        }
        let mut raw = BytesMut::with_capacity(next.raw.len() + Position::BYTES);
        raw.put_slice(&head(Kind::Txn, payload.len() + Position::BYTES));
        raw.put_bytes(0, 16);
        raw.put_slice(leading);
        raw.put_slice(&before.to_bytes());
        raw.put_slice(rest);
        let hash = hash_of(&raw);
        raw[8..HEADER_BYTES].copy_from_slice(&hash);
        (next.hash == check_of(hash)).then(|| Unit {
            kind: Kind::Txn,
            hash,
            raw: raw.freeze(),
            page_key: next.page_key,
        })
    }
}

#[cfg(test)]
pub(super) use tests::packed_seed;

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;
    use crate::checksum::{Checksum, PageKey};
    use crate::page::{PageNo, PageSize};
    use crate::txid::{Epoch, Txid};
    use crate::wire::{
        Changes, CompactTxn, Decoder, Image, Message, Packer, PageChange, TxnBegin, TxnEnd, WireError,
        difference, encode, encode_change,
    };

    const PAGE_KEY: PageKey = PageKey::from_bytes([7; 28]);

    fn position(number: u64, sum: Checksum) -> Position {
        Position::new(Txid::new(Epoch::from_bytes(&[7; 16]).unwrap(), number), sum)
    }

    /// A history of small and large transactions, as units of a log, and where units end.
    fn history(sizes: &[bool]) -> (Bytes, Vec<usize>) {
        let (mut out, mut ends, mut sum) = (BytesMut::new(), Vec::new(), Checksum::EMPTY);
        let (page_size, number) = (PageSize::new(512).unwrap(), PageNo::new(3).unwrap());
        for (n, &small) in sizes.iter().enumerate() {
            let n = n as u64;
            let mut page = vec![0; 512];
            page[..8].copy_from_slice(&n.to_le_bytes());
            let (before, hash) = (position(n, sum), PAGE_KEY.hash(number, &page));
            sum = sum.with(hash);
            let begin = TxnBegin { before, epoch: before.epoch(), page_size };
            let end = TxnEnd { after: position(n + 1, sum), pages: 3, changed: 1, unix_micros: n };
            let (mut runs, mut changes) = (BytesMut::new(), BytesMut::new());
            let image = if small { difference(None, &page, &mut runs) } else { Image::Whole(&page) };
            let change = PageChange { number, hash, replaced: None, image };
            encode_change(&change, &mut changes);
            let compact = [Message::Txn(CompactTxn { begin, end, changes: Changes::of(&changes) })];
            let parts = [Message::TxnBegin(begin), Message::Change(change), Message::TxnEnd(end)];
            for message in if small { &compact[..] } else { &parts } {
                encode(message, &mut out);
                ends.push(out.len());
            }
        }
        (out.freeze(), ends)
    }

    pub(in crate::wire) fn packed_seed() -> Vec<u8> {
        let (log, _) = history(&[true, false, true, true, true]);
        let mut packer = Packer::new().unwrap();
        let short = Shortener::default().shorten(log, true);
        let (small, large) = short.split_at(short.len() / 2);
        [&[9][..], &packer.pack(small, true).unwrap(), &packer.pack(large, false).unwrap()].concat()
    }

    fn completed(bytes: Bytes, completer: &mut Completer) -> Result<Vec<u8>, WireError> {
        let mut decoder = Decoder::new(Some(PAGE_KEY));
        decoder.push(bytes);
        let mut all = Vec::new();
        while let Some(unit) = decoder.next()? {
            let unit = completer.complete(unit);
            unit.decode()?;
            all.extend_from_slice(&unit.raw);
        }
        Ok(all)
    }

    proptest! {
        #[test]
        fn a_replica_has_the_units_of_the_log_bit_for_bit(
            sizes in prop::collection::vec(any::<bool>(), 1..12),
            cuts in prop::collection::vec(any::<prop::sample::Index>(), 0..4),
        ) {
            let (log, ends) = history(&sizes);
            let mut cuts: Vec<usize> = cuts.iter().map(|cut| ends[cut.index(ends.len())]).collect();
            cuts.extend([0, log.len()]);
            cuts.sort_unstable();
            let (mut shortener, mut completer) = (Shortener::default(), Completer::default());
            let (mut all, mut sent) = (Vec::new(), 0);
            for cut in cuts.windows(2) {
                let short = shortener.shorten(log.slice(cut[0]..cut[1]), true);
                sent += short.len();
                all.extend(completed(short, &mut completer).unwrap());
            }
            prop_assert_eq!(&all[..], &log[..]);
            // Each small one after the first record has no position.
            let saved = sizes.iter().skip(1).filter(|small| **small).count() * Position::BYTES;
            prop_assert_eq!(sent + saved, log.len());
        }

        #[test]
        fn what_a_stranger_calls_a_next_is_refused(
            payload in prop::collection::vec(any::<u8>(), 0..300),
            at in any::<prop::sample::Index>(),
            fits in any::<bool>(),
        ) {
            let (log, ends) = history(&[true, true]);
            let mut completer = Completer::default();
            completed(log.slice(..ends[0]), &mut completer).unwrap();
            let mut txn = log[ends[0]..].to_vec();
            // All of the payload but the position, or one byte of it.
            let place = if at.index(2) == 0 { HEADER_BYTES } else { SHORTEST_BYTES };
            txn.truncate(place);
            txn.extend_from_slice(&payload);
            let bytes = (txn.len() - HEADER_BYTES) as u32;
            txn[..4].copy_from_slice(&bytes.to_le_bytes());
            let hash = if fits { hash_of(&txn) } else { [3; 16] };
            txn[8..HEADER_BYTES].copy_from_slice(&hash);
            let short = Shortener { follows: true }.shorten(txn.into(), true);
            prop_assert!(completed(short, &mut completer).is_err());
        }
    }

    #[test]
    fn a_next_that_goes_on_from_elsewhere_is_refused() {
        let (log, ends) = history(&[true, true, true]);
        let short = Shortener { follows: true }.shorten(log.slice(ends[1]..), true);
        assert_eq!(short.len() + Position::BYTES, log.len() - ends[1]);
        let mut nowhere = Completer::default();
        assert!(completed(short.clone(), &mut nowhere).is_err());
        let mut earlier = Completer::default();
        completed(log.slice(..ends[0]), &mut earlier).unwrap();
        assert!(completed(short.clone(), &mut earlier).is_err());
        completed(log.slice(ends[0]..ends[1]), &mut earlier).unwrap();
        assert_eq!(completed(short, &mut earlier).unwrap(), log[ends[1]..]);
    }

    #[test]
    fn after_a_part_of_a_unit_nothing_is_shortened_before_a_record_has_ended() {
        let (log, ends) = history(&[true, true, true]);
        let mut shortener = Shortener::default();
        shortener.shorten(log.slice(..ends[0]), true);
        let part = log.slice(ends[0]..ends[0] + 30);
        assert_eq!(shortener.shorten(part.clone(), false), part);
        let last = log.slice(ends[1]..);
        assert_eq!(shortener.shorten(last.clone(), true), last);
        assert!(shortener.shorten(last.clone(), true).len() < last.len());
    }

    #[test]
    fn a_next_that_nobody_completed_is_no_message() {
        let (log, ends) = history(&[true, true]);
        let short = Shortener { follows: true }.shorten(log.slice(ends[0]..), true);
        let mut decoder = Decoder::new(Some(PAGE_KEY));
        decoder.push(short);
        assert!(decoder.next().unwrap().unwrap().decode().is_err());
    }
}
