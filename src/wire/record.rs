//! The units of which the records of transactions are made, whatever form they have.
use bytes::{BufMut, BytesMut};

use crate::checksum::Checksum;
use crate::page::PageSize;
use crate::txid::{Epoch, NUMBER_MAX, Position, Txid};
use crate::wire::change::PageChange;
use crate::wire::fields::Fields;
use crate::wire::{Kind, Message, WireError};

/// The most bytes that the changes of a TXN unit may come to. A larger transaction is units of its
/// own.
pub(crate) const TXN_CHANGES_MAX_BYTES: usize = 16 * 1024;
/// The longest payload of a TXN unit.
pub(crate) const TXN_MAX_BYTES: usize = FIELDS_BYTES + 2 * 16 + TXN_CHANGES_MAX_BYTES;
/// Bytes of the fields that every TXN unit has.
const FIELDS_BYTES: usize = 1 + 1 + Position::BYTES + 4 + 8;
/// Flag: the transaction begins an epoch, which follows.
const NEW_EPOCH: u8 = 1;
/// Flag: the database became shorter, and the sum of what it dropped follows.
const DROPPED: u8 = 2;

#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(crate) struct TxnBegin {
    pub(crate) before: Position,
    pub(crate) epoch: Epoch,
    pub(crate) page_size: PageSize,
}

#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(crate) struct TxnEnd {
    pub(crate) after: Position,
    /// The database's size in pages after the transaction.
    pub(crate) pages: u32,
    /// How many changed pages the record has.
    pub(crate) changed: u32,
    pub(crate) unix_micros: u64,
}

/// A whole transaction in one unit.
#[derive(Clone, Copy, PartialEq, Debug)]
pub(crate) struct CompactTxn<'a> {
    pub(crate) begin: TxnBegin,
    pub(crate) end: TxnEnd,
    /// Its changes, encoded; at least one.
    pub(crate) changes: Changes<'a>,
}

/// Encoded changes, one after the other, all of them well formed.
#[derive(Clone, Copy, PartialEq, Debug)]
pub(crate) struct Changes<'a>(&'a [u8]);

impl<'a> Changes<'a> {
    /// Changes that this node has encoded itself.
    pub(crate) fn of(encoded: &'a [u8]) -> Changes<'a> {
        Changes(encoded)
    }
}

impl<'a> Iterator for Changes<'a> {
    type Item = PageChange<'a>;

    fn next(&mut self) -> Option<PageChange<'a>> {
        let mut fields = Fields::of(self.0);
        if fields.is_empty() {
            return None;
        }
        let change = fields.change().ok();
        self.0 = fields.rest();
        change
    }
}

/// What a unit says of a transaction.
#[derive(Clone, Copy, PartialEq, Debug)]
pub(crate) enum RecordPart<'a> {
    Begin(TxnBegin),
    Change(PageChange<'a>),
    End(TxnEnd),
}

/// The parts of a record that a unit has, in order.
#[derive(Clone, Debug)]
pub(crate) struct RecordParts<'a> {
    begin: Option<TxnBegin>,
    change: Option<PageChange<'a>>,
    changes: Changes<'a>,
    end: Option<TxnEnd>,
}

impl<'a> Message<'a> {
    /// What the unit says of a transaction; nothing when it is no part of a record.
    pub(crate) fn parts(&self) -> RecordParts<'a> {
        let none = RecordParts { begin: None, change: None, changes: Changes(&[]), end: None };
        match *self {
            Message::TxnBegin(begin) => RecordParts { begin: Some(begin), ..none },
            Message::Change(change) => RecordParts { change: Some(change), ..none },
            Message::TxnEnd(end) => RecordParts { end: Some(end), ..none },
            Message::Txn(CompactTxn { begin, end, changes }) => {
                RecordParts { begin: Some(begin), changes, end: Some(end), ..none }
            }
            _ => none,
        }
    }
}

impl<'a> Iterator for RecordParts<'a> {
    type Item = RecordPart<'a>;

    fn next(&mut self) -> Option<RecordPart<'a>> {
        if let Some(begin) = self.begin.take() {
            return Some(RecordPart::Begin(begin));
        }
        match self.change.take().or_else(|| self.changes.next()) {
            Some(change) => Some(RecordPart::Change(change)),
            None => self.end.take().map(RecordPart::End),
        }
    }
}

impl Kind {
    /// Whether it is a unit of a record.
    pub(crate) fn is_of_record(self) -> bool {
        matches!(self, Kind::TxnBegin | Kind::Page | Kind::Patch | Kind::TxnEnd | Kind::Txn)
    }

    /// Whether a record begins with it.
    pub(crate) fn begins_record(self) -> bool {
        matches!(self, Kind::TxnBegin | Kind::Txn)
    }

    /// Whether a record ends with it.
    pub(crate) fn ends_record(self) -> bool {
        matches!(self, Kind::TxnEnd | Kind::Txn)
    }
}

impl<'a> Fields<'a> {
    pub(super) fn txn_begin(&mut self) -> Result<TxnBegin, WireError> {
        Ok(TxnBegin { before: self.position()?, epoch: self.epoch()?, page_size: self.page_size()? })
    }

    pub(super) fn txn_end(&mut self) -> Result<TxnEnd, WireError> {
        let (after, pages, changed) = (self.position()?, self.u32()?, self.u32()?);
        Ok(TxnEnd { after, pages, changed, unix_micros: self.u64()? })
    }

    /// The position after is not among the fields: it follows from the hashes.
    pub(super) fn txn(&mut self) -> Result<CompactTxn<'a>, WireError> {
        let [flags] = *self.array()?;
        if flags & !(NEW_EPOCH | DROPPED) != 0 {
            return Err(WireError::Fields("flags that no transaction has"));
        }
        let page_size = self.page_size_power()?;
        let before = self.position()?;
        let (pages, unix_micros) = (self.u32()?, self.u64()?);
        let epoch = if flags & NEW_EPOCH != 0 { self.epoch()? } else { before.epoch() };
        let dropped = if flags & DROPPED != 0 { self.checksum()? } else { Checksum::EMPTY };
        if (epoch != before.epoch(), dropped != Checksum::EMPTY)
            != (flags & NEW_EPOCH != 0, flags & DROPPED != 0)
        {
            return Err(WireError::Fields("a flag without what it stands for"));
        }
        let mut sum = before.checksum().minus(dropped);
        let changes = Changes(self.rest());
        let (mut fields, mut changed) = (Fields::of(changes.0), 0);
        while !fields.is_empty() {
            let change = fields.change()?;
            sum = change.replaced.map_or(sum, |replaced| sum.without(replaced)).with(change.hash);
            changed += 1;
        }
        if changed == 0 || changes.0.len() > TXN_CHANGES_MAX_BYTES {
            return Err(WireError::Fields("a transaction of no pages, or of more than one unit may have"));
        }
        let number = before.number().checked_add(1).filter(|number| *number <= NUMBER_MAX);
        let number = number.ok_or(WireError::Fields("a position beyond all numbers"))?;
        let after = Position::new(Txid::new(epoch, number), sum);
        let begin = TxnBegin { before, epoch, page_size };
        Ok(CompactTxn { begin, end: TxnEnd { after, pages, changed, unix_micros }, changes })
    }
}

/// Writes a TXN unit's fields.
pub(super) fn put_txn(txn: &CompactTxn<'_>, out: &mut BytesMut) -> Kind {
    let CompactTxn { begin, end, changes } = txn;
    let mut sum = begin.before.checksum();
    for change in *changes {
        sum = change.replaced.map_or(sum, |replaced| sum.without(replaced)).with(change.hash);
    }
    let dropped = sum.minus(end.after.checksum());
    let new_epoch = begin.epoch != begin.before.epoch();
    let mut flags = if new_epoch { NEW_EPOCH } else { 0 };
    if dropped != Checksum::EMPTY {
        flags |= DROPPED;
    }
    out.put_u8(flags);
    out.put_u8(begin.page_size.power());
    out.put_slice(&begin.before.to_bytes());
    out.put_u32_le(end.pages);
    out.put_u64_le(end.unix_micros);
    if new_epoch {
        out.put_slice(&begin.epoch.to_bytes());
    }
    if dropped != Checksum::EMPTY {
        out.put_u128_le(dropped.as_u128());
    }
    out.put_slice(changes.0);
    Kind::Txn
}
