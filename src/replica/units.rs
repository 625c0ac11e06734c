//! What comes from a primary: units, silence, and answers that are not ours.

use std::sync::Arc;
use std::time::Duration;

use bytes::Bytes;
use http::StatusCode;

use crate::checksum::PageKey;
use crate::error::{Error, PeerProblem, Result};
use crate::net::{Endpoint, Heard, Incoming};
use crate::wire::{Completer, Decoder, Unit, Unpacker, WireError};

/// A primary of which not one byte came for this long is gone; it says its position each second.
const SILENCE_MAX: Duration = Duration::from_secs(10);
/// Bytes of a foreign answer that are shown.
const BEGINS_MAX_BYTES: usize = 200;
/// Longest wait for them.
const BEGINS_TIMEOUT: Duration = Duration::from_secs(1);

/// What an answer that is not ours is taken for.
pub(crate) async fn foreign(
    status: StatusCode,
    headers: &http::HeaderMap,
    body: &mut Incoming,
) -> PeerProblem {
    let (mut begins, mut whole) = (Vec::new(), false);
    let read = async {
        while begins.len() < BEGINS_MAX_BYTES {
            let Some(next) = body.next().await else {
                whole = true;
                break;
            };
            let Ok(bytes) = next else { break };
            begins.extend(bytes.iter().take(BEGINS_MAX_BYTES - begins.len()));
        }
    };
    // What has come by then is shown.
    let _ = tokio::time::timeout(BEGINS_TIMEOUT, read).await;
    let content_type = headers.get(http::header::CONTENT_TYPE);
    if status == StatusCode::NOT_FOUND && content_type.is_none() && begins.is_empty() {
        if !whole {
            return PeerProblem::Connection("it broke within an answer".into());
        }
        // This is how we answer strangers.
        return PeerProblem::NotFound;
    }
    // As bytes: an error's text shows them escaped.
    let text = |bytes: &[u8]| String::from_utf8_lossy(bytes).chars().take(BEGINS_MAX_BYTES).collect();
    PeerProblem::NotReplite {
        status: status.as_u16(),
        content_type: content_type.map_or(String::new(), |t| text(t.as_bytes())),
        begins: text(&begins),
    }
}

/// The units of a response's body.
pub(super) struct Units<'a> {
    body: Incoming,
    decoder: Decoder,
    completer: Completer,
    /// What the bytes come through, where they are packed.
    unpacker: Option<Unpacker>,
    heard: Arc<Heard>,
    primary: &'a Endpoint,
}

impl<'a> Units<'a> {
    pub(super) fn new(body: Incoming, heard: Arc<Heard>, primary: &'a Endpoint) -> Units<'a> {
        Units {
            body,
            decoder: Decoder::default(),
            completer: Completer::default(),
            unpacker: None,
            heard,
            primary,
        }
    }

    /// The pages that come are hashed with this key.
    pub(super) fn expect_pages(&mut self, key: PageKey) {
        self.decoder.set_page_key(key);
    }

    /// What follows the unit that came last is packed.
    pub(super) fn expect_packed(&mut self) -> Result<()> {
        let mut unpacker = Unpacker::new().map_err(|error| Error::Internal(error.to_string()))?;
        self.decoder.take_rest().for_each(|bytes| unpacker.push(bytes));
        self.unpacker = Some(unpacker);
        Ok(())
    }

    /// The next unit; an error at the end, after silence and for garbage.
    pub(super) async fn next(&mut self) -> Result<Unit> {
        loop {
            if let Some(unit) = self.cut()? {
                return Ok(unit);
            }
            self.heard.wait(true);
            let bytes = self.more().await;
            self.heard.wait(false);
            match bytes {
                Some(bytes) => self.push(bytes)?,
                None => return Err(self.blame(PeerProblem::Silent(SILENCE_MAX))),
            }
        }
    }

    /// What comes next; nothing after too long a silence.
    async fn more(&mut self) -> Option<Option<std::io::Result<Bytes>>> {
        loop {
            let left = SILENCE_MAX.checked_sub(self.heard.silence()).filter(|left| !left.is_zero())?;
            // Meanwhile something may have come that is no whole frame yet.
            if let Ok(bytes) = tokio::time::timeout(left, self.body.next()).await {
                return Some(bytes);
            }
        }
    }

    /// The next unit if it has arrived already.
    pub(super) async fn now(&mut self) -> Result<Option<Unit>> {
        loop {
            if let Some(unit) = self.cut()? {
                return Ok(Some(unit));
            }
            tokio::select! {
                biased;
                bytes = self.body.next() => self.push(bytes)?,
                () = std::future::ready(()) => return Ok(None),
            }
        }
    }

    fn cut(&mut self) -> Result<Option<Unit>> {
        self.cut_next().map_err(|e| self.blame(PeerProblem::Garbled(e.to_string())))
    }

    fn cut_next(&mut self) -> Result<Option<Unit>, WireError> {
        loop {
            let unit = self.decoder.next()?;
            if let Some(unit) = unit {
                return Ok(Some(self.completer.complete(unit)));
            }
            let Some(unpacker) = &mut self.unpacker else { return Ok(None) };
            match unpacker.next()? {
                Some(bytes) => self.decoder.push(bytes),
                None => return Ok(None),
            }
        }
    }

    fn push(&mut self, bytes: Option<std::io::Result<Bytes>>) -> Result<()> {
        match bytes {
            Some(Ok(bytes)) => match &mut self.unpacker {
                Some(unpacker) => unpacker.push(bytes),
                None => self.decoder.push(bytes),
            },
            Some(Err(_)) => return Err(self.blame(PeerProblem::Connection("the stream broke off".into()))),
            None => return Err(self.blame(PeerProblem::Connection("the stream ended".into()))),
        }
        Ok(())
    }

    fn blame(&self, problem: PeerProblem) -> Error {
        Error::peer(self.primary.to_string(), problem)
    }
}
