//! The kinds of units and their numbers.

/// What a unit is.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
#[repr(u8)]
pub(crate) enum Kind {
    TxnBegin = 1,
    Page = 2,
    TxnEnd = 3,
    Hello = 4,
    Welcome = 5,
    Epochs = 6,
    Heartbeat = 7,
    Ack = 8,
    SnapBegin = 9,
    SnapPiece = 10,
    SnapEnd = 11,
    Goodbye = 12,
    Segment = 13,
    HealBegin = 14,
    Sums = 15,
    Want = 16,
    Sent = 17,
    Drain = 18,
    Standing = 19,
    Handoff = 20,
    Offer = 21,
    Accept = 22,
    Handed = 23,
    Patch = 24,
    Txn = 25,
    Next = 26,
}

impl Kind {
    pub(super) fn from_u8(kind: u8) -> Option<Kind> {
        use Kind::*;
        const ALL: [Kind; 26] = [
            TxnBegin, Page, TxnEnd, Hello, Welcome, Epochs, Heartbeat, Ack, SnapBegin, SnapPiece, SnapEnd,
            Goodbye, Segment, HealBegin, Sums, Want, Sent, Drain, Standing, Handoff, Offer, Accept, Handed,
            Patch, Txn, Next,
        ];
        let kind = ALL.get(usize::from(kind).checked_sub(1)?).copied();
        debug_assert!(kind.is_none_or(|k| ALL[k as usize - 1] == k), "the list is not in order");
        kind
    }
}
