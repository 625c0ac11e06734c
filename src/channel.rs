//! The private channel between two instances: TLS 1.3 with a key pair of each, and certificates
//! only for those who have a PKI of their own.
//!
//! Without certificates both sides take any key. What is worth something is the [`Binding`]: what
//! the TLS connection alone has, and the keys of both. The proofs of the cluster's secret cover it
//! (see `handshake`). So a proof holds on the connection that it was made for, and a relay between
//! two nodes, which ends one TLS and begins another, proves nothing to either.

mod certificates;
mod key;
#[cfg(feature = "tls")]
mod pki;
#[cfg(feature = "tls")]
mod refused;
mod shut_out;
#[cfg(all(test, feature = "tls"))]
mod tests;
#[cfg(not(feature = "tls"))]
#[path = "channel/absent.rs"]
mod tls;
#[cfg(feature = "tls")]
mod tls;

use std::fmt;
use std::io;
use std::sync::{Arc, Mutex};
use std::time::{Duration, Instant};

use tokio::io::{AsyncRead, AsyncWrite};

use crate::error::{Error, PeerProblem, Result};
use crate::lock::lock;
use crate::peer::PeerKey;

pub(crate) use certificates::CertificateBytes;
pub use certificates::Certificates;
pub(crate) use key::ChannelKey;
use shut_out::ShutOut;
use tls::Tls;
pub(crate) use tls::TlsStream;

pub(crate) use shut_out::key_of;

/// What a build that has no TLS says.
pub(crate) const NO_FEATURE: &str = "this build of replite has no TLS: enable its feature `tls`, or say \
    by `Config::plaintext` that none is wanted";

/// Where nodes may do without TLS: see [`Config::plaintext`](crate::Config::plaintext).
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Plaintext {
    /// Between processes of one machine, over its loopback addresses. A secret may be missing: then
    /// each local process reads and writes the database. With one, a process of another user still
    /// gets between two nodes when it takes the port of one that is down. On a machine with users
    /// who are not trusted use TLS, with [`Config::secret_file`](crate::Config::secret_file).
    Loopback,
    /// On any network. The secret is proved, and all else is in the clear: who is on the path
    /// reads every row and can change it on its way.
    AnyNetwork,
}

/// What an exporter gives, in bytes.
const EXPORTER_BYTES: usize = 32;

/// What is said inside of a connection. The side that dials says it within TLS, by ALPN.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(crate) enum Traffic {
    /// Exchanges between nodes, such as the stream.
    Exchanges,
    /// An application's requests, which one node forwards to the other.
    Forwards,
}

/// What a proof on a connection is bound to: the TLS exporter of RFC 9266 and the keys of both
/// sides. The exporter alone covers the server's key, but not the client's.
#[derive(Clone, Copy, PartialEq, Eq)]
pub(crate) struct Binding(Option<Ends>);

#[derive(Clone, Copy, PartialEq, Eq)]
struct Ends {
    exporter: [u8; EXPORTER_BYTES],
    client: PeerKey,
    server: PeerKey,
    traffic: Traffic,
}

impl Binding {
    /// A connection without TLS has nothing of its own.
    pub(crate) const NONE: Binding = Binding(None);

    #[cfg_attr(not(feature = "tls"), expect(dead_code, reason = "nothing is bound then"))]
    fn new(
        exporter: [u8; EXPORTER_BYTES],
        (client, server): (PeerKey, PeerKey),
        traffic: Traffic,
    ) -> Binding {
        Binding(Some(Ends { exporter, client, server, traffic }))
    }

    /// Whether the connection is private.
    pub(crate) fn is_private(&self) -> bool {
        self.0.is_some()
    }

    /// What proofs cover.
    pub(crate) fn parts(&self) -> [&[u8]; 3] {
        match &self.0 {
            None => [&[]; 3],
            Some(bound) => [&bound.exporter, bound.client.as_bytes(), bound.server.as_bytes()],
        }
    }

    /// Whether an application's requests are inside. The exporter covers that, too.
    pub(crate) fn is_for_forwards(&self) -> bool {
        self.0.is_some_and(|bound| bound.traffic == Traffic::Forwards)
    }

    /// The key of the side that dialled.
    pub(crate) fn client(&self) -> Option<PeerKey> {
        self.0.map(|bound| bound.client)
    }

    /// The key of the side that was dialled.
    pub(crate) fn server(&self) -> Option<PeerKey> {
        self.0.map(|bound| bound.server)
    }
}

impl fmt::Debug for Binding {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(if self.is_private() { "Binding(TLS)" } else { "Binding(plaintext)" })
    }
}

/// How often peers are told of that TLS kept out, at most.
const REFUSALS_EVERY: Duration = Duration::from_secs(60);

/// How a node speaks with others.
#[derive(Clone, Debug)]
pub(crate) struct Channel {
    /// What new connections begin with.
    tls: Option<Arc<Mutex<Arc<Tls>>>>,
    plaintext: Option<Plaintext>,
    refused: Arc<Mutex<KeptOut>>,
    shut_out: ShutOut,
    compresses: bool,
}

/// Peers that TLS kept out.
#[derive(Debug, Default)]
struct KeptOut {
    told: Option<Instant>,
    /// Since then.
    times: u64,
}

impl Channel {
    fn of(tls: Option<Tls>, plaintext: Option<Plaintext>) -> Channel {
        let tls = tls.map(|tls| Arc::new(Mutex::new(Arc::new(tls))));
        let (refused, shut_out) = (Arc::default(), ShutOut::default());
        Channel { tls, plaintext, refused, shut_out, compresses: false }
    }

    /// With this key, and without TLS where that is allowed.
    ///
    /// # Errors
    /// [`Error::Config`] for a key that is none.
    pub(crate) fn new(key: &ChannelKey, plaintext: Option<Plaintext>) -> Result<Channel> {
        Ok(Channel::of(Tls::raw(key)?, plaintext))
    }

    /// With certificates, in place of a key that any peer takes.
    ///
    /// # Errors
    /// [`Error::Config`] for certificates that can't be used, and in a build without TLS.
    pub(crate) fn certified(
        certificates: &Certificates,
        bytes: &CertificateBytes,
        plaintext: Option<Plaintext>,
    ) -> Result<Channel> {
        Ok(Channel::of(Some(Tls::certified(certificates, bytes)?), plaintext))
    }

    /// Takes other certificates for connections that begin from now on, here and in all clones.
    /// Those that stand stay.
    ///
    /// # Errors
    /// [`Error::Config`]: they can't be used, and those that were in use still are.
    pub(crate) fn renew(&self, certificates: &Certificates, bytes: &CertificateBytes) -> Result<()> {
        let renewed = Tls::certified(certificates, bytes)?;
        if let Some(tls) = &self.tls {
            *lock(tls) = Arc::new(renewed);
        }
        Ok(())
    }

    /// Why a peer with the same certificates and names would not take this node's now.
    pub(crate) fn own_problem(&self) -> Option<String> {
        self.tls().ok().and_then(|tls| tls.own_problem())
    }

    /// What an error of TLS says of the peer, where keys and certificates are the reason.
    pub(crate) fn problem(&self, error: &io::Error) -> Option<PeerProblem> {
        self.tls().ok().and_then(|tls| tls.problem(error))
    }

    /// A peer is kept out. Returns how many since it was told last, when it is to be told now.
    pub(crate) fn refused(&self) -> Option<u64> {
        let mut refused = lock(&self.refused);
        refused.times += 1;
        if refused.told.is_some_and(|told| told.elapsed() < REFUSALS_EVERY) {
            return None;
        }
        refused.told = Some(Instant::now());
        Some(std::mem::take(&mut refused.times))
    }

    /// With a key that is used by this program alone, and until it ends.
    ///
    /// # Errors
    /// [`Error::NoRandom`].
    pub(crate) fn ephemeral(plaintext: Option<Plaintext>) -> Result<Channel> {
        Channel::new(&ChannelKey::generate()?, plaintext)
    }

    /// One that dials and answers in clear text wherever it may.
    #[cfg(any(test, all(fuzzing, feature = "testing")))]
    pub(crate) fn open() -> Channel {
        Channel::of(None, Some(Plaintext::AnyNetwork))
    }

    /// Where it does without TLS.
    pub(crate) fn plaintext(&self) -> Option<Plaintext> {
        self.plaintext
    }

    /// The key that it shows.
    pub(crate) fn key(&self) -> Option<PeerKey> {
        self.tls().ok().map(|tls| tls.key())
    }

    /// Whether it can speak TLS at all.
    pub(crate) fn has_tls(&self) -> bool {
        self.tls.is_some()
    }

    /// Begins TLS as the side that dialled.
    ///
    /// # Errors
    /// The other side speaks no TLS, breaks off, or has a key that is shut out.
    pub(crate) async fn connect<I>(&self, io: I, traffic: Traffic) -> io::Result<(TlsStream<I>, Binding)>
    where
        I: AsyncRead + AsyncWrite + Unpin,
    {
        let (io, binding) = self.tls()?.connect(io, traffic).await?;
        self.check(binding.server())?;
        Ok((io, binding))
    }

    /// The same as the side that was dialled.
    pub(crate) async fn accept<I>(&self, io: I) -> io::Result<(TlsStream<I>, Binding)>
    where
        I: AsyncRead + AsyncWrite + Unpin,
    {
        let (io, binding) = self.tls()?.accept(io).await?;
        self.check(binding.client())?;
        Ok((io, binding))
    }

    /// Whether streams to replicas may be compressed.
    pub(crate) fn compressing(self, compresses: bool) -> Channel {
        Channel { compresses, ..self }
    }

    pub(crate) fn compresses(&self) -> bool {
        self.compresses
    }

    /// Shuts these keys out from now on, and no others: what stands with them ends.
    ///
    /// # Errors
    /// [`Error::Config`] for too many, or for the own one. All is as before then.
    pub(crate) fn set_shut_out(&self, keys: impl IntoIterator<Item = PeerKey>) -> Result<()> {
        self.shut_out.replace(keys, self.key())
    }

    pub(crate) fn is_shut_out(&self, key: Option<PeerKey>) -> bool {
        key.is_some_and(|key| self.shut_out.has(key))
    }

    /// Returns when that key is shut out.
    pub(crate) async fn shut_out(&self, key: Option<PeerKey>) {
        match key {
            Some(key) => self.shut_out.until(key).await,
            None => std::future::pending().await,
        }
    }

    /// Whether this is the first time that this key is met since it was shut out: worth a word.
    pub(crate) fn is_news(&self, key: PeerKey) -> bool {
        self.shut_out.is_news(key)
    }

    fn check(&self, key: Option<PeerKey>) -> io::Result<()> {
        match key.filter(|key| self.shut_out.has(*key)) {
            None => Ok(()),
            Some(key) => Err(shut_out::error(key)),
        }
    }

    fn tls(&self) -> io::Result<Arc<Tls>> {
        let tls = self.tls.as_ref().map(|tls| lock(tls).clone());
        tls.ok_or_else(|| io::Error::new(io::ErrorKind::Unsupported, NO_FEATURE))
    }
}

/// The error of a configuration that needs TLS, in a build without it.
pub(crate) fn no_feature() -> Error {
    Error::Config(NO_FEATURE.into())
}
