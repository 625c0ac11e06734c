//! Right images of a primary's bad pages, from its replicas.

use std::collections::BTreeMap;
use std::sync::Arc;

use bytes::Bytes;

use crate::checksum::PageHash;
use crate::db::{Db, Side};
use crate::engine::{Engine, RightPage};
use crate::error::{Error, Result};
use crate::page::PageNo;
use crate::primary::{Line, QUESTION_BYTES};
use crate::status::{Event, PeerInfo, Verification};
use crate::threads::blocking;
use crate::wire::{Want, WantRun};

/// Pages that may differ between a primary and a replica that is asked. More is no damage, but another state.
const CANDIDATES_MAX: usize = 4096;

/// Pages of a primary's database whose bytes are wrong, and their right images, which a replica had; see [`Db::offered_repair`].
#[derive(Debug)]
#[non_exhaustive]
pub struct Repair {
    /// What the verification before it found.
    pub verification: Verification,
    /// The replica that has the right images.
    pub from: PeerInfo,
    db: Db,
    engine: Arc<Engine>,
    pages: Vec<RightPage>,
}

impl Db {
    /// On a primary: verifies, and when the pages are not those of the position, asks the connected replicas for the right ones. That they are the
    /// right ones is proved by the checksum, so that a replica with damaged pages of its own is not believed. Nothing is changed before
    /// [`Repair::apply`]. None when all pages are right.
    ///
    /// # Errors
    /// As for [`Db::verify`]; [`Error::NotPrimary`] on a replica, which heals itself; [`Error::Damaged`] when no replica has what is missing, with what
    /// is known of the pages.
    ///
    /// # Cancel safety
    /// Nothing happens but reading and asking.
    pub async fn offered_repair(&self) -> Result<Option<Repair>> {
        let Side::Primary { engine, .. } = &self.inner.side else {
            let primary = self.inner.node.roles.borrow().primary.clone();
            return Err(Error::NotPrimary { primary: primary.map(Box::new) });
        };
        let engine = engine.get()?;
        let verification = self.verify().await?;
        if verification.holds() {
            return Ok(None);
        }
        let mut why = String::new();
        for line in self.inner.source.lines() {
            match proven(&line, &engine, &verification).await {
                Ok(pages) => {
                    let (db, from) = (self.clone(), line.peer);
                    return Ok(Some(Repair { verification, from, db, engine, pages }));
                }
                Err(error) => why += &format!("; {}: {error}", line.peer.node),
            }
        }
        let what = format!(
            "its pages are not those of position {}, {} of them are known by number ({:?}), and no connected replica has the right ones{why}",
            verification.position,
            verification.bad_pages.len(),
            verification.bad_pages
        );
        Err(Error::Damaged { path: self.inner.path.clone(), what })
    }
}

impl Repair {
    /// The bad pages.
    pub fn pages(&self) -> Vec<PageNo> {
        self.pages.iter().map(|page| page.number).collect()
    }

    /// Writes the right images into the database file, and verifies again. A page that a transaction has changed meanwhile is left alone.
    ///
    /// # Errors
    /// [`Error::Timeout`] when readers of the file don't end for some milliseconds: try again; [`Error::Io`]; those of [`Db::verify`].
    ///
    /// # Cancel safety
    /// Dropped, the pages are written all the same.
    pub async fn apply(self) -> Result<Verification> {
        let Repair { engine, pages, db, from, .. } = self;
        let written = blocking(move || engine.repair(&pages)).await?;
        tracing::warn!(pages = ?written, from = %from.node, "bad pages were written anew");
        db.inner.node.tell(Event::Repaired { pages: written, from });
        db.verify().await
    }
}

/// The pages that a replica has otherwise, if they make this node's pages those of the position.
async fn proven(line: &Line, engine: &Arc<Engine>, verification: &Verification) -> Result<Vec<RightPage>> {
    let mut candidates: BTreeMap<PageNo, RightPage> = BTreeMap::new();
    let size = engine.page_size();
    let per_question = (QUESTION_BYTES / size.bytes()) as u32;
    let mut next = PageNo::new(1);
    while let Some(first) = next.filter(|next| next.get() <= verification.pages) {
        let reading = engine.clone();
        let piece = blocking(move || reading.read_piece(first, QUESTION_BYTES)).await?;
        let ours = |at: u32| {
            let page = &piece.data[at as usize * size.bytes()..][..size.bytes()];
            PageNo::new(first.get() + at).map(|number| PageHash::of(number, page))
        };
        let count = (piece.data.len() / size.bytes()) as u32;
        let hashes = (0..count).filter_map(ours).map(PageHash::to_bytes).collect();
        let answer = line.ask(Want { runs: vec![WantRun { first, hashes }] }).await?;
        if answer.at.is_none_or(|at| at.position.number() < verification.position.number()) {
            return Err(Error::NoState("it is behind the state that was verified".into()));
        }
        for (begin, pages) in answer.pages {
            for (number, page) in (begin.get()..).zip(pages.chunks_exact(size.bytes())) {
                let at = number.checked_sub(first.get()).filter(|at| *at < count);
                if let (Some(wrong), Some(number)) = (at.and_then(ours), PageNo::new(number)) {
                    let right = Bytes::copy_from_slice(page);
                    candidates.insert(number, RightPage { number, wrong, right });
                }
            }
        }
        if candidates.len() > CANDIDATES_MAX {
            return Err(Error::TooMany { what: "pages that differ", limit: CANDIDATES_MAX });
        }
        next = first.get().checked_add(count.max(per_question.min(1))).and_then(PageNo::new);
    }
    // What was written since the verification differs for that reason.
    let (log, position) = (engine.log().clone(), verification.position);
    match blocking(move || log.touched(position)).await? {
        Some(touched) => candidates.retain(|number, _| !touched.pages.contains(*number)),
        None => {
            return Err(Error::NoState("the log does not reach back to the state that was verified".into()));
        }
    }
    let led = candidates.values().fold(verification.found, |sum, page| {
        sum.without(page.wrong).with(PageHash::of(page.number, &page.right))
    });
    if led != verification.expected() {
        let (expected, found) = (verification.expected().to_string(), led.to_string());
        return Err(Error::Mismatch { expected, found });
    }
    Ok(candidates.into_values().collect())
}
