//! The keys of the primary take the place of those that are here.
//!
//! With another page key nothing that names a state says anything any more: anchors, epochs, log,
//! and what came of a snapshot. Each of these files says which key it goes with. So the one rename
//! that puts the new keys in their place makes all of that unknown at once. A node that dies before
//! it has its old state, and one that dies after it an unknown one, which is compared.

use crate::engine::apply::thread::Apply;
use crate::engine::apply::thread::stage::{Served, State, Suspect};
use crate::error::{Error, Result};
use crate::files;
use crate::keys::DatabaseKeys;
use crate::report::Condition;
use crate::txid::EpochHistory;

impl Apply {
    /// Takes the keys of the primary, before anything of it. The stream goes on.
    pub(super) fn take_keys(&mut self, keys: DatabaseKeys) -> Result<()> {
        let ours = self.node.database_keys.get();
        if keys == ours {
            return Ok(());
        }
        // What was begun goes with the key before. What came of a snapshot is of no use.
        self.abort();
        files::keys::write(&self.options.paths, &keys)?;
        self.node.database_keys.set(keys);
        if keys.page == ours.page {
            return Ok(());
        }
        self.options.log.page_key = keys.page;
        let remedy = match &self.state {
            State::Known(Served { remedy, .. }) | State::Unknown(_, remedy) => Some(*remedy),
            _ => None,
        };
        match remedy {
            Some(_) => self.node.report(Condition::KeysAdopted { database: self.options.paths.database() }),
            // A new replica, which all keys fit.
            None => tracing::info!("the keys of the database come from the primary"),
        }
        self.end_service();
        self.state.close();
        // What this node promised of that state is not.
        self.history = EpochHistory::default();
        self.node.applied.forget();
        (self.suspect, self.garbled_at) = (Suspect::No, None);
        // What was synced of the names before says nothing of those to come.
        self.node.lease.synced.set(None);
        self.rekeyed = true;
        self.open_anew();
        self.rekeyed = false;
        if let State::Unopened = self.state {
            return Err(Error::NoState("what is at the path can't be opened".into()));
        }
        if let Some(remedy) = remedy {
            self.state.set_remedy(remedy);
        }
        Ok(())
    }
}
