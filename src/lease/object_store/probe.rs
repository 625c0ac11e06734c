//! Whether a store keeps to the conditions of a put, which some take and ignore.
//!
//! It is tried with an object that no one reads. Where it is there, as after the first start of
//! the first node, a put that creates it must be refused. Where it is not, the first creates it and
//! a second must be refused. Then a put over an ETag that it never had must be refused. All nodes
//! may do this at once, and no right to delete is needed: the object stays.

use std::sync::atomic::{AtomicU8, Ordering};

use object_store::path::Path;
use object_store::{PutMode, UpdateVersion};

use super::ObjectRegister;
use super::trace::PutFailure;

/// The object's name after the prefix.
const OBJECT: &str = "lease-probe.json";
const CONTENT: &[u8] = b"{\"replite_lease_probe\":\"whether the store keeps to the conditions of a put\"}";
/// No store has such an ETag, nor its first object such a version.
const NO_ETAG: &str = "\"00000000000000000000000000000000\"";
const NO_VERSION: &str = "1";

/// What is known of the store. It is found out once in a process.
#[derive(Debug)]
pub(super) struct Probe {
    object: Path,
    known: AtomicU8,
}

const NOT_TRIED: u8 = 0;
/// It can't be told: the store is away, or allows no puts.
const FAILED: u8 = 1;
const KEEPS: u8 = 2;
const IGNORES: u8 = 3;

/// Why it is not known that the store keeps to conditions.
enum Unproved {
    Ignores(String),
    Failed(String),
}

impl Probe {
    pub(super) fn new(prefix: Path) -> Probe {
        Probe { object: prefix.join(OBJECT), known: AtomicU8::new(NOT_TRIED) }
    }

    /// Fails where the store ignores conditions. A node that only reads may be allowed no puts.
    pub(super) async fn before_read(&self, store: &ObjectRegister) -> Result<(), String> {
        let known = self.known.load(Ordering::Relaxed);
        match known {
            KEEPS | FAILED => return Ok(()),
            // Also where this is dropped: one that gives no answer to puts may be read.
            NOT_TRIED => self.known.store(FAILED, Ordering::Relaxed),
            // It may have been mended.
            _ => {}
        }
        match self.run(store).await {
            Err(Unproved::Ignores(why)) => Err(why),
            Err(Unproved::Failed(why)) if known == IGNORES => Err(why),
            _ => Ok(()),
        }
    }

    /// Fails where it is not known that the store keeps to conditions. Nothing was swapped.
    pub(super) async fn before_swap(&self, store: &ObjectRegister) -> Result<(), String> {
        if self.known.load(Ordering::Relaxed) == KEEPS {
            return Ok(());
        }
        self.run(store).await.map_err(|doubt| match doubt {
            Unproved::Ignores(why) | Unproved::Failed(why) => why,
        })
    }

    async fn run(&self, store: &ObjectRegister) -> Result<(), Unproved> {
        let found = self.try_conditions(store).await;
        let known = match &found {
            Ok(()) => KEEPS,
            Err(Unproved::Ignores(_)) => IGNORES,
            // What was found before stays.
            Err(Unproved::Failed(_)) => return found,
        };
        self.known.store(known, Ordering::Relaxed);
        found
    }

    async fn try_conditions(&self, store: &ObjectRegister) -> Result<(), Unproved> {
        // The first may be the one that creates it.
        if !self.refused(store, PutMode::Create).await? && !self.refused(store, PutMode::Create).await? {
            return Err(ignores("`If-None-Match: *`", "created an object that was there"));
        }
        let never = UpdateVersion { e_tag: Some(NO_ETAG.into()), version: Some(NO_VERSION.into()) };
        if !self.refused(store, PutMode::Update(never)).await? {
            return Err(ignores("`If-Match`", "replaced an object by another's ETag"));
        }
        Ok(())
    }

    /// Whether the condition of a put is said not to hold.
    async fn refused(&self, store: &ObjectRegister, mode: PutMode) -> Result<bool, Unproved> {
        match store.put(&self.object, mode, CONTENT.to_vec()).await {
            Ok(_) => Ok(false),
            Err(PutFailure::Contradicted(_)) => Ok(true),
            Err(PutFailure::Refused(why) | PutFailure::Doubtful(why)) => Err(Unproved::Failed(why)),
        }
    }
}

fn ignores(condition: &str, what: &str) -> Unproved {
    Unproved::Ignores(format!(
        "this store ignores {condition}: a put with it {what}. Two nodes would have the lease at once: \
         a lease's record can't be kept here"
    ))
}
