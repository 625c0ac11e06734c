//! The part of a stream that sends pages: a snapshot, sums to compare, and what a replica asks for.

use std::pin::pin;

use tokio::sync::{OwnedSemaphorePermit, mpsc};

use crate::engine::answer;
use crate::error::Error;
use crate::page::PageNo;
use crate::primary::blocking;
use crate::primary::read_ahead::{read_ahead, read_go, read_sums};
use crate::primary::stream::{BEAT, End, ReplicaStream};
use crate::txid::Position;
use crate::wire::{HealBegin, Message, Sent, SnapBegin, SnapEnd, Want, WantRun};

/// Pages that a replica asked for and that are read in one go: as many as a batch of pieces has of
/// the usual size.
const RUN_PAGES_AT_ONCE: usize = 256;

impl ReplicaStream {
    /// All pages from `from` on, and the position of the first of them.
    pub(super) async fn snapshot(
        &mut self,
        resumed: Option<Position>,
        from: PageNo,
    ) -> Result<Position, End> {
        let (mut goes, _reader) = read_ahead(self.source.clone(), from, read_go);
        let mut first = None;
        loop {
            let go = tokio::select! {
                go = goes.recv() => go.ok_or_else(|| ended_early("the reader of a snapshot"))??,
                () = tokio::time::sleep_until(self.last_beat + BEAT) => {
                    self.beat().await?;
                    continue;
                }
            };
            self.tell_epochs().await?;
            let first = match first {
                Some(first) => first,
                None => {
                    let at = *first.insert(resumed.unwrap_or(go.position));
                    let page_size = self.source.page_size();
                    self.say(&[Message::SnapBegin(SnapBegin {
                        first: at,
                        from,
                        page_size,
                        pages: go.pages,
                    })])
                    .await?;
                    at
                }
            };
            if !go.bytes.is_empty() {
                self.sender.send(go.bytes).await?;
            }
            if let Some(Sent { position: exact_at, pages }) = go.last {
                self.say(&[Message::SnapEnd(SnapEnd { exact_at, pages })]).await?;
                return Ok(first);
            }
            self.beat_if_due().await?;
        }
    }

    /// Waits until few enough others compare.
    pub(super) async fn turn(&mut self) -> Result<OwnedSemaphorePermit, End> {
        let mut turn = pin!(self.comparisons.clone().acquire_owned());
        loop {
            tokio::select! {
                turn = &mut turn => return Ok(turn.map_err(|_| Error::ShutDown)?),
                () = tokio::time::sleep_until(self.last_beat + BEAT) => self.beat().await?,
            }
        }
    }

    /// Sums over all pages, for a replica to compare with its own. The position of the first, and
    /// where the last was read.
    pub(super) async fn sums(&mut self, diverged: bool) -> Result<(Position, Sent), End> {
        let (mut goes, _reader) = read_ahead(self.source.clone(), PageNo::FIRST, read_sums);
        let mut first = None;
        loop {
            let go = tokio::select! {
                go = goes.recv() => go.ok_or_else(|| ended_early("the reader of pages"))??,
                () = tokio::time::sleep_until(self.last_beat + BEAT) => {
                    self.beat().await?;
                    continue;
                }
            };
            let from = match first {
                Some(from) => from,
                None => {
                    let (from, page_size) = (*first.insert(go.position), self.source.page_size());
                    let begin = HealBegin { from, page_size, pages: go.pages, compare: true, diverged };
                    self.say(&[Message::HealBegin(begin)]).await?;
                    from
                }
            };
            if !go.bytes.is_empty() {
                self.sender.send(go.bytes).await?;
            }
            if let Some(last) = go.last {
                self.say(&[Message::Sent(last)]).await?;
                return Ok((from, last));
            }
            self.beat_if_due().await?;
        }
    }

    /// Sends what the replica asks for until it wants nothing more. Then says where that is exact.
    pub(super) async fn answer(
        &mut self,
        mut wants: mpsc::Receiver<Want>,
        mut last: Option<Sent>,
    ) -> Result<(), End> {
        loop {
            let want = tokio::select! {
                want = wants.recv() => want.ok_or(End::Left)?,
                () = tokio::time::sleep_until(self.last_beat + BEAT) => {
                    self.beat().await?;
                    continue;
                }
            };
            let done = want.runs.is_empty();
            let (mut runs, mut pages) = (want.runs.into_iter(), 0);
            loop {
                let some: Vec<WantRun> = std::iter::from_fn(|| {
                    let run = (pages < RUN_PAGES_AT_ONCE).then(|| runs.next()).flatten()?;
                    pages += run.hashes.len();
                    Some(run)
                })
                .collect();
                pages = 0;
                if some.is_empty() && (!done || last.is_some()) {
                    break;
                }
                let source = self.source.clone();
                let read = move || {
                    let of = (source.page_size(), source.page_key());
                    answer(|first, most| source.read_piece(first, most), of, &some)
                };
                let (bytes, sent) = blocking(read).await?;
                last = Some(sent);
                if !bytes.is_empty() {
                    self.sender.send(bytes).await?;
                }
                self.beat_if_due().await?;
            }
            let Some(sent) = last else { continue };
            if done {
                let (exact_at, pages) = (sent.position, sent.pages);
                self.say(&[Message::SnapEnd(SnapEnd { exact_at, pages })]).await?;
                return Ok(());
            }
            self.say(&[Message::Sent(sent)]).await?;
        }
    }
}

/// A thread of ours that should have gone on.
fn ended_early(what: &str) -> Error {
    Error::Internal(format!("{what} has ended early"))
}
