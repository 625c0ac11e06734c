//! Right images of a primary's bad pages, from its replicas.

use std::collections::BTreeMap;
use std::sync::Arc;

use bytes::Bytes;

use crate::checksum::PageHash;
use crate::db::Db;
use crate::engine::{PrimaryEngine, RightPage};
use crate::error::{Error, Result};
use crate::page::PageNo;
use crate::primary::{PeerChannel, QUESTION_BYTES};
use crate::report::Condition;
use crate::status::{PeerInfo, Verification};
use crate::threads::blocking;
use crate::txid::Position;
use crate::wire::{WANT_MAX_PAGES, Want, WantRun};

/// Pages that a verification has named, with the hashes of what they must be.
struct Bad {
    at: Position,
    right: BTreeMap<PageNo, PageHash>,
}

/// Pages of a primary's database whose bytes are wrong, and their right images, which a replica
/// had; see [`Db::find_repair`].
///
/// ```
/// # async fn example(db: replite::Db) -> Result<(), replite::Error> {
/// if let Some(repair) = db.find_repair().await? {
///     println!("node {} has the right images of {:?}", repair.from.node, repair.pages());
///     let verification = repair.apply().await?;
///     assert!(verification.holds());
/// }
/// # Ok(())
/// # }
/// ```
#[derive(Debug)]
#[non_exhaustive]
pub struct Repair {
    /// What the verification before it found.
    pub verification: Verification,
    /// The replica that has the right images.
    pub from: PeerInfo,
    db: Db,
    engine: Arc<PrimaryEngine>,
    pages: Vec<RightPage>,
}

impl Db {
    /// On a primary: verifies the database, and finds the right images of bad pages. When the pages
    /// are not those of the position, it asks the connected replicas for the pages that the
    /// verification names bad ([`Verification::bad_pages`]). Each image must have the hash that
    /// this node's own log has of the page: no replica is believed, be it damaged or lying. It
    /// changes nothing before [`Repair::apply`]. None when all pages are right.
    ///
    /// The verification does not name a page that no transaction in the retained log has changed.
    /// The position's checksum alone, a sum over all pages, guards against accidents. It does not
    /// guard against a peer that makes pages up until the sum comes out, so the primary believes no
    /// replica there. For such pages the database of a replica is the way out; see [Bad pages of a
    /// primary](crate::guide::trouble#bad-pages-of-a-primary).
    ///
    /// # Errors
    /// - Those of [`Db::verify`].
    /// - [`Error::NotPrimary`] on a replica, which heals itself.
    /// - [`Error::Damaged`] when no page is named, or no replica has the right images. It says what
    ///   is known of the pages.
    ///
    /// # Cancel safety
    /// Nothing happens but reading and asking.
    pub async fn find_repair(&self) -> Result<Option<Repair>> {
        let engine = self.inner.slot.primary()?;
        let verification = self.verify().await?;
        if verification.holds() {
            return Ok(None);
        }
        let (reading, named) = (engine.clone(), verification.clone());
        let right = blocking(move || reading.right_hashes(&named)).await?;
        let bad = Bad { at: verification.position, right };
        let mut why = String::new();
        // Nothing to ask for where the log names none.
        for channel in self.inner.replica_server.channels().into_iter().filter(|_| !bad.right.is_empty()) {
            match proven(&channel, &engine, &bad).await {
                Ok(pages) => {
                    let (db, from) = (self.clone(), channel.peer);
                    return Ok(Some(Repair { verification, from, db, engine, pages }));
                }
                Err(error) => why += &format!("; {}: {error}", channel.peer.node),
            }
        }
        let what = format!(
            "{}; what no connected replica has, or the log does not name, can't be repaired{why}: \
             put the database of a replica in its place",
            verification.problem()
        );
        Err(Error::Damaged { path: self.inner.paths.database().to_path_buf(), what })
    }
}

impl Repair {
    /// The bad pages that are written.
    pub fn pages(&self) -> Vec<PageNo> {
        self.pages.iter().map(|page| page.number).collect()
    }

    /// Writes the right images into the database file, and verifies again. It leaves alone a page
    /// that a transaction has changed meanwhile.
    ///
    /// # Errors
    /// - [`Error::Timeout`] when readers of the file don't end for some milliseconds: try again.
    /// - [`Error::Io`] when the file can't be written.
    /// - Those of [`Db::verify`].
    ///
    /// # Cancel safety
    /// Dropped, it writes the pages all the same.
    pub async fn apply(self) -> Result<Verification> {
        let Repair { engine, pages, db, from, .. } = self;
        let written = blocking(move || engine.repair(&pages)).await?;
        db.inner.node.report(Condition::PagesRepaired { pages: &written, from: &from });
        db.verify().await
    }
}

/// The right images of the bad pages, if a replica has them all. Each is known by its own hash. The
/// primary does not look at what else a replica sends.
async fn proven(channel: &PeerChannel, engine: &Arc<PrimaryEngine>, bad: &Bad) -> Result<Vec<RightPage>> {
    let (size, key) = (engine.page_size(), engine.page_key());
    let mut found: BTreeMap<PageNo, RightPage> = BTreeMap::new();
    let numbers: Vec<PageNo> = bad.right.keys().copied().collect();
    for some in numbers.chunks((QUESTION_BYTES / size.bytes()).min(WANT_MAX_PAGES)) {
        let (reading, some) = (engine.clone(), some.to_vec());
        let wrong: Vec<(PageNo, PageHash)> = blocking(move || {
            let read = |number| Ok((number, key.hash(number, &reading.read_piece(number, 1)?.data)));
            some.into_iter().map(read).collect::<Result<_>>()
        })
        .await?;
        let run =
            |(first, hash): &(PageNo, PageHash)| WantRun { first: *first, hashes: vec![hash.to_bytes()] };
        let answer = channel.ask(Want { runs: wrong.iter().map(run).collect() }).await?;
        if answer.at.is_none_or(|at| at.position.number() < bad.at.number()) {
            return Err(Error::NoState("it is behind the state that was verified".into()));
        }
        let wrong: BTreeMap<_, _> = wrong.into_iter().collect();
        for (begin, pages) in answer.pages {
            for (number, page) in (begin.get()..).zip(pages.chunks_exact(size.bytes())) {
                if let Some(number) = PageNo::new(number)
                    && let Some(wrong) = wrong.get(&number).copied()
                    && bad.right.get(&number) == Some(&key.hash(number, page))
                {
                    found.insert(number, RightPage { number, wrong, right: Bytes::copy_from_slice(page) });
                }
            }
        }
    }
    // What was written since the verification is not what it was then.
    let (log, at) = (engine.log().clone(), bad.at);
    let Some(touched) = blocking(move || log.touched(at)).await? else {
        return Err(Error::NoState("the log does not reach back to the state that was verified".into()));
    };
    found.retain(|number, _| !touched.pages.contains(*number));
    let lacks = |number: &PageNo| !touched.pages.contains(*number) && !found.contains_key(number);
    let missing: Vec<PageNo> = numbers.into_iter().filter(lacks).collect();
    if missing.is_empty() {
        return Ok(found.into_values().collect());
    }
    Err(Error::NoState(format!("it does not have the right images of {missing:?}")))
}
