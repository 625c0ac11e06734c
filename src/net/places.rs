//! Places for connections. One on which nothing was proved gives way to others, and has little time
//! and few bytes. One on which a secret was proved has a place that no stranger can take.

use std::collections::{BTreeMap, HashMap};
use std::fmt;
use std::io;
use std::net::{IpAddr, Ipv6Addr};
use std::pin::Pin;
use std::sync::{Arc, Mutex, OnceLock};
use std::task::{Context, Poll};
use std::time::Duration;

use tokio::io::{AsyncRead, AsyncWrite, ReadBuf};
use tokio::time::Instant;
use tokio_util::sync::CancellationToken;

use crate::lock::lock;
use crate::peer::NodeId;
use crate::secret::Rights;

/// How long a connection may take until a secret is proved on it: as long as who dials waits.
const PROOF_LIMIT: Duration = Duration::from_secs(10);
/// The most bytes that are read of one on which nothing was proved: a handshake with a chain of
/// certificates and a head, inside of a tunnel.
const UNPROVED_MAX_BYTES: usize = 128 * 1024;
/// What the first record of TLS begins with.
pub(super) const TLS_HANDSHAKE: u8 = 22;
/// Bytes of a record's header: kind, version, and length.
const RECORD_HEADER_BYTES: usize = 5;

/// Where a connection comes from, as far as that can be told.
#[derive(Clone, Copy, PartialEq, Eq, Hash, Debug)]
pub(crate) enum CameFrom {
    /// An address of IPv4, or the first 64 bits of one of IPv6: who has one of these has them all.
    Network(IpAddr),
    /// The node that the head of a tunnel names.
    Node(NodeId),
}

impl CameFrom {
    pub(super) fn of(address: IpAddr) -> CameFrom {
        CameFrom::Network(match address.to_canonical() {
            IpAddr::V6(ip) => Ipv6Addr::from_bits(ip.to_bits() & (u128::MAX << 64)).into(),
            ip @ IpAddr::V4(_) => ip,
        })
    }
}

impl fmt::Display for CameFrom {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            CameFrom::Network(IpAddr::V4(ip)) => ip.fmt(f),
            CameFrom::Network(IpAddr::V6(ip)) => write!(f, "{ip}/64"),
            CameFrom::Node(node) => node.fmt(f),
        }
    }
}

/// How many connections there are at one time.
#[derive(Clone, Copy, Debug)]
pub(crate) struct DoorLimits {
    /// Without a proof, ...
    pub(crate) unproved: usize,
    /// ... and of these, of one source.
    pub(crate) of_source: usize,
    /// With one, ...
    pub(crate) proved: usize,
    /// ... and of these, of followers.
    pub(crate) followers: usize,
    /// With one, for an application's requests: they take nothing of the others.
    pub(crate) forwards: usize,
}

/// Who proved a secret on a connection, and what for.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(crate) enum DoorGuest {
    Member,
    Follower,
    /// A member that forwards an application's requests.
    Forwards,
}

impl DoorGuest {
    pub(crate) fn of(rights: Rights, forwards: bool) -> DoorGuest {
        match rights {
            Rights::Follower => DoorGuest::Follower,
            Rights::Member if forwards => DoorGuest::Forwards,
            Rights::Member => DoorGuest::Member,
        }
    }
}

/// The places of one door.
#[derive(Debug)]
pub(crate) struct DoorPlaces {
    limits: DoorLimits,
    taken: Mutex<TakenDoorPlaces>,
}

#[derive(Default, Debug)]
struct TakenDoorPlaces {
    /// By their numbers, the oldest first.
    unproved: BTreeMap<u64, Newcomer>,
    last: u64,
    proved: usize,
    followers: usize,
    forwards: usize,
}

#[derive(Debug)]
struct Newcomer {
    source: CameFrom,
    spoke: bool,
    cut: CancellationToken,
}

/// The place of one connection; free again when the last of these is dropped.
#[derive(Clone, Debug)]
pub(crate) struct DoorPlace(Arc<HeldDoorPlace>);

#[derive(Debug)]
struct HeldDoorPlace {
    places: Arc<DoorPlaces>,
    number: u64,
    cut: CancellationToken,
    until: Instant,
    proved: OnceLock<DoorGuest>,
}

impl DoorPlaces {
    pub(crate) fn new(limits: DoorLimits) -> Arc<DoorPlaces> {
        Arc::new(DoorPlaces { limits, taken: Mutex::default() })
    }

    /// A place for a connection that begins. Where its source has too many, or none is free, one
    /// goes that has proved nothing; the source of that one. None: there is no such one.
    pub(crate) fn enter(self: &Arc<Self>, source: CameFrom) -> Option<(DoorPlace, Option<CameFrom>)> {
        let DoorLimits { unproved, of_source, .. } = self.limits;
        let mut taken = lock(&self.taken);
        let own = taken.unproved.values().filter(|other| other.source == source).count();
        let gone = if own >= of_source {
            taken.cut_of(source)
        } else if taken.unproved.len() >= unproved {
            Some(taken.cut_one(Some(source))?)
        } else {
            None
        };
        taken.last += 1;
        let (number, cut) = (taken.last, CancellationToken::new());
        taken.unproved.insert(number, Newcomer { source, spoke: false, cut: cut.clone() });
        let until = Instant::now() + PROOF_LIMIT;
        let held = HeldDoorPlace { places: self.clone(), number, cut, until, proved: OnceLock::new() };
        Some((DoorPlace(Arc::new(held)), gone))
    }

    /// Cuts a connection that has proved nothing. False: there is none.
    pub(super) fn give_way(&self) -> bool {
        lock(&self.taken).cut_one(None).is_some()
    }
}

impl TakenDoorPlaces {
    /// Cuts one of the source that has most, with the one that comes.
    fn cut_one(&mut self, coming: Option<CameFrom>) -> Option<CameFrom> {
        let mut counts = HashMap::new();
        for source in self.unproved.values().map(|other| other.source).chain(coming) {
            *counts.entry(source).or_insert(0_usize) += 1;
        }
        let most = self.unproved.values().map(|other| counts[&other.source]).max()?;
        self.cut_among(|source| counts[&source] == most)
    }

    fn cut_of(&mut self, source: CameFrom) -> Option<CameFrom> {
        self.cut_among(|other| other == source)
    }

    /// Silent ones go before those that speak, and then the oldest.
    fn cut_among(&mut self, may_go: impl Fn(CameFrom) -> bool) -> Option<CameFrom> {
        let candidates = self.unproved.iter().filter(|(_, other)| may_go(other.source));
        let number = candidates.min_by_key(|(number, other)| (other.spoke, **number)).map(|(n, _)| *n)?;
        let gone = self.unproved.remove(&number)?;
        gone.cut.cancel();
        Some(gone.source)
    }
}

impl DoorPlace {
    /// It said something whole: the first record of TLS, or the head of a request. So who says less
    /// over and over takes no place of one that does.
    pub(super) fn spoke(&self) {
        if let Some(own) = lock(&self.0.places.taken).unproved.get_mut(&self.0.number) {
            own.spoke = true;
        }
    }

    /// A secret was proved. False: there are too many such connections, or this one is cut.
    pub(crate) fn proved(&self, guest: DoorGuest) -> bool {
        let HeldDoorPlace { places, number, proved, .. } = &*self.0;
        let mut taken = lock(&places.taken);
        if proved.get().is_some() {
            return true;
        }
        let limits = places.limits;
        let full = match guest {
            DoorGuest::Member => taken.proved >= limits.proved,
            DoorGuest::Follower => taken.proved >= limits.proved || taken.followers >= limits.followers,
            DoorGuest::Forwards => taken.forwards >= limits.forwards,
        };
        if full || taken.unproved.remove(number).is_none() {
            return false;
        }
        match guest {
            DoorGuest::Forwards => taken.forwards += 1,
            DoorGuest::Member | DoorGuest::Follower => taken.proved += 1,
        }
        taken.followers += usize::from(guest == DoorGuest::Follower);
        proved.set(guest).is_ok()
    }

    fn is_proved(&self) -> bool {
        self.0.proved.get().is_some()
    }

    /// Returns when the connection has to go: another one needs its place, or it proved nothing in
    /// time.
    pub(crate) async fn lost(&self) {
        tokio::select! {
            () = self.0.cut.cancelled() => return,
            () = tokio::time::sleep_until(self.0.until) => {}
        }
        if self.is_proved() {
            std::future::pending().await
        }
    }
}

impl Drop for HeldDoorPlace {
    fn drop(&mut self) {
        let mut taken = lock(&self.places.taken);
        match self.proved.get() {
            None => drop(taken.unproved.remove(&self.number)),
            Some(DoorGuest::Forwards) => taken.forwards -= 1,
            Some(guest) => {
                taken.proved -= 1;
                taken.followers -= usize::from(*guest == DoorGuest::Follower);
            }
        }
    }
}

/// A connection of which little is read before a secret is proved on it. So what a stranger sends
/// costs no more memory than that, whatever it is made of.
pub(crate) struct Guarded<I> {
    io: I,
    place: DoorPlace,
    came: usize,
    record: FirstRecord,
}

/// What is known of the first record of TLS.
enum FirstRecord {
    /// What came of its header.
    Header(Vec<u8>),
    /// Its end, in bytes of the connection.
    End(usize),
    /// It came, or it is none.
    Over,
}

impl<I> Guarded<I> {
    pub(crate) fn new(io: I, place: &DoorPlace) -> Guarded<I> {
        Guarded { io, place: place.clone(), came: 0, record: FirstRecord::Header(Vec::new()) }
    }

    fn note(&mut self, bytes: &[u8]) {
        if self.came > UNPROVED_MAX_BYTES {
            return;
        }
        self.came += bytes.len();
        if let FirstRecord::Header(header) = &mut self.record {
            header.extend(bytes.iter().take(RECORD_HEADER_BYTES - header.len()));
            match header[..] {
                [] => {}
                [TLS_HANDSHAKE, _, _, high, low] => {
                    let length = usize::from(u16::from_be_bytes([high, low]));
                    self.record = FirstRecord::End(RECORD_HEADER_BYTES + length);
                }
                [TLS_HANDSHAKE, ..] => {}
                _ => self.record = FirstRecord::Over,
            }
        }
        if matches!(self.record, FirstRecord::End(end) if self.came >= end) {
            self.record = FirstRecord::Over;
            self.place.spoke();
        }
    }
}

impl<I: AsyncRead + Unpin> AsyncRead for Guarded<I> {
    fn poll_read(
        mut self: Pin<&mut Self>,
        cx: &mut Context<'_>,
        buf: &mut ReadBuf<'_>,
    ) -> Poll<io::Result<()>> {
        let before = buf.filled().len();
        let read = Pin::new(&mut self.io).poll_read(cx, buf);
        self.note(&buf.filled()[before..]);
        if self.came > UNPROVED_MAX_BYTES && !self.place.is_proved() {
            buf.set_filled(before);
            let why = "more came than a peer has to say before it proves the secret";
            return Poll::Ready(Err(io::Error::new(io::ErrorKind::ConnectionAborted, why)));
        }
        read
    }
}

impl<I: AsyncWrite + Unpin> AsyncWrite for Guarded<I> {
    fn poll_write(mut self: Pin<&mut Self>, cx: &mut Context<'_>, buf: &[u8]) -> Poll<io::Result<usize>> {
        Pin::new(&mut self.io).poll_write(cx, buf)
    }

    fn poll_flush(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        Pin::new(&mut self.io).poll_flush(cx)
    }

    fn poll_shutdown(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        Pin::new(&mut self.io).poll_shutdown(cx)
    }

    fn poll_write_vectored(
        mut self: Pin<&mut Self>,
        cx: &mut Context<'_>,
        bufs: &[io::IoSlice<'_>],
    ) -> Poll<io::Result<usize>> {
        Pin::new(&mut self.io).poll_write_vectored(cx, bufs)
    }

    fn is_write_vectored(&self) -> bool {
        self.io.is_write_vectored()
    }
}

#[cfg(test)]
mod tests;
