//! A primary's database in memory, for tests.

use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex, MutexGuard};

use bytes::{Bytes, BytesMut};
use tokio::sync::watch;

use crate::checksum::{Checksum, PageKey};
use crate::context::{EpochsHeard, LeaseContext, NodeContext, SyncedClock, ToDisk};
use crate::engine::Piece;
use crate::error::{Error, Result};
use crate::keys::DatabaseKeys;
use crate::log::Lookup;
use crate::page::{PageNo, PageSize};
use crate::peer::{Incarnation, NodeId};
use crate::primary::{LogPin, StreamSource};
use crate::secret::{Keyring, Secret};
use crate::status::{Addresses, PeerInfo, Role};
use crate::txid::{Epoch, EpochHistory, EpochStart, Position, Txid};
use crate::wire::{self, Message, TxnBegin, TxnEnd};

/// The secret of these tests' cluster, and another.
pub(crate) const SECRET: [u8; 32] = [1; 32];

pub(crate) fn keys(secret: &[u8]) -> Keyring {
    let secrets: Vec<_> =
        (!secret.is_empty()).then(|| Secret::fixed(secret.try_into().unwrap())).into_iter().collect();
    Keyring::new(&secrets).unwrap()
}

/// The keys of the tests' database.
pub(crate) const KEYS: DatabaseKeys = DatabaseKeys::fixed(7);

/// A node whose primary is fixed.
pub(crate) fn node(id: u128, secret: &[u8], role: Role) -> Arc<NodeContext> {
    with_lease(id, secret, role, LeaseContext::fixed())
}

/// A node that may lead by a lease, and keeps nothing on a disk.
pub(crate) fn leased(id: u128, secret: &[u8], role: Role) -> Arc<NodeContext> {
    let synced = SyncedClock::new(None, std::time::Duration::from_secs(10), ToDisk::nowhere());
    with_lease(id, secret, role, LeaseContext::leased(synced, EpochsHeard::new(0, ToDisk::nowhere())))
}

pub(crate) fn with_lease(id: u128, secret: &[u8], role: Role, lease: LeaseContext) -> Arc<NodeContext> {
    let me = PeerInfo {
        node: NodeId::from_u128(id),
        incarnation: Incarnation::from_u128(id + 1000),
        addresses: Addresses { replication: format!("http://node{id}/_replite"), ..Addresses::default() },
    };
    NodeContext::new(
        me,
        "test".into(),
        "app".into(),
        (keys(secret), crate::channel::Channel::open().compressing(true)),
        role,
        lease,
        KEYS,
    )
}

pub(crate) fn history(epochs: &[(u64, u64)]) -> EpochHistory {
    let mut history = EpochHistory::default();
    for &(number, first) in epochs {
        history.push(EpochStart { epoch: Epoch::new(number, number), first, before: Checksum::EMPTY });
    }
    history
}

/// The state after a transaction of the epoch with this number.
pub(crate) fn at(epoch: u64, number: u64) -> Position {
    Position::new(Txid::new(Epoch::new(epoch, epoch), number), Checksum::from_u128(number.into()))
}

/// A log and a database of pages that only have sizes.
pub(crate) struct Fake {
    node: Arc<NodeContext>,
    inner: Mutex<Inner>,
    end: watch::Sender<u64>,
    /// Bytes before this address were dropped.
    pub(crate) dropped: AtomicU64,
    /// Bytes before this address are on "disk" only.
    pub(crate) on_disk: AtomicU64,
    pub(crate) pages: u32,
    pub(crate) disk_reads: AtomicU64,
    /// Transactions that are committed, and come into the log when it is settled.
    pub(crate) late: AtomicU64,
}

struct Inner {
    bytes: Vec<u8>,
    /// Where the record after each state begins.
    records: Vec<(Position, u64)>,
}

impl Fake {
    /// In epoch 1, before the first transaction.
    pub(crate) fn new(node: Arc<NodeContext>, pages: u32) -> Arc<Fake> {
        node.applied.replace(history(&[(1, 1)]), Some(at(1, 0)));
        Arc::new(Fake {
            node,
            inner: Mutex::new(Inner { bytes: Vec::new(), records: vec![(at(1, 0), 0)] }),
            end: watch::Sender::new(0),
            dropped: AtomicU64::new(0),
            on_disk: AtomicU64::new(0),
            pages,
            disk_reads: AtomicU64::new(0),
            late: AtomicU64::new(0),
        })
    }

    /// Commits a transaction of so many pages; its record begins where the answer says.
    pub(crate) fn commit(&self, pages: u32) -> u64 {
        let mut inner = self.lock();
        let before = inner.records[inner.records.len() - 1].0;
        let epoch = self.node.applied.history().epoch();
        let after = at(epoch.number(), before.number() + 1);
        let mut out = BytesMut::new();
        let begin = TxnBegin { before, epoch, page_size: self.page_size() };
        wire::encode(&Message::TxnBegin(begin), &mut out);
        for number in 1..=pages {
            let (number, page) = (PageNo::new(number).unwrap(), [number as u8; 512]);
            wire::encode_page(number, KEYS.page.hash(number, &page), &page, &mut out);
        }
        let end = TxnEnd { after, pages: self.pages, changed: pages, unix_micros: 0 };
        wire::encode(&Message::TxnEnd(end), &mut out);
        let lsn = inner.bytes.len() as u64;
        inner.bytes.extend_from_slice(&out);
        let end = inner.bytes.len() as u64;
        inner.records.push((after, end));
        drop(inner);
        self.node.applied.advance(after);
        self.end.send_replace(end);
        lsn
    }

    fn lock(&self) -> MutexGuard<'_, Inner> {
        self.inner.lock().unwrap()
    }
}

struct NoHold;

impl LogPin for NoHold {
    fn advance(&self, _lsn: u64) {}
}

impl StreamSource for Fake {
    fn page_size(&self) -> PageSize {
        PageSize::new(512).unwrap()
    }

    fn page_key(&self) -> PageKey {
        KEYS.page
    }

    fn read_piece(&self, first: PageNo, max_bytes: usize) -> Result<Piece> {
        let left = (self.pages + 1).saturating_sub(first.get()) as usize;
        let data = vec![5; left.min(max_bytes / 512) * 512].into();
        let position = self.tip().unwrap();
        Ok(Piece { position, pages: self.pages, data })
    }

    fn raise_epoch(&self, above: u64) -> Result<()> {
        let mut history = (*self.node.applied.history()).clone();
        let tip = self.tip().unwrap();
        let epoch = Epoch::new(above + 1, above + 1);
        history.push(EpochStart { epoch, first: tip.number() + 1, before: tip.checksum() });
        self.node.applied.replace(history, Some(tip));
        Ok(())
    }

    fn settle(&self) -> Result<()> {
        for _ in 0..self.late.swap(0, Ordering::SeqCst) {
            self.commit(1);
        }
        Ok(())
    }

    fn tip(&self) -> Option<Position> {
        self.lock().records.last().map(|r| r.0)
    }

    fn end(&self) -> u64 {
        *self.end.borrow()
    }

    fn find(&self, number: u64) -> Result<Lookup> {
        let inner = self.lock();
        let Some(&(before, lsn)) = inner.records.iter().find(|r| r.0.number() == number) else {
            return Ok(Lookup::NotYet);
        };
        let dropped = lsn < self.dropped.load(Ordering::SeqCst);
        Ok(if dropped { Lookup::TooOld } else { Lookup::At { lsn, before } })
    }

    fn read_memory(&self, lsn: u64, max: usize) -> Option<Bytes> {
        if lsn < self.on_disk.load(Ordering::SeqCst) || lsn >= self.end() {
            return None;
        }
        Some(self.lock().bytes[lsn as usize..].iter().copied().take(max).collect())
    }

    fn read_disk(&self, lsn: u64, max: usize) -> Result<Bytes> {
        self.disk_reads.fetch_add(1, Ordering::SeqCst);
        if lsn < self.dropped.load(Ordering::SeqCst) {
            let gone = std::io::ErrorKind::NotFound.into();
            return Err(Error::Io { op: "read", path: "log".into(), source: gone });
        }
        Ok(self.lock().bytes[lsn as usize..].iter().copied().take(max).collect())
    }

    fn step_over(&self, lsn: u64) -> u64 {
        lsn
    }

    fn watch(&self) -> watch::Receiver<u64> {
        self.end.subscribe()
    }

    fn pin(&self, _lsn: u64) -> Box<dyn LogPin> {
        Box::new(NoHold)
    }
}
