//! The connection that writes, as it is opened.

use std::panic::{AssertUnwindSafe, catch_unwind};
use std::sync::Arc;

use rusqlite::OpenFlags;

use crate::descriptors::Share;
use crate::engine::PrimaryEngine;
use crate::error::{Error, Result};
use crate::node::writer::guard::{ConnectionSettings, refuse_exclusive};
use crate::node::writer::{ConnectionKind, OpenWriter, WriterShared};
use crate::sqlite::{self, CommitHook, defend};
use crate::threads::message;

impl WriterShared {
    /// Opens the connection as the application and we want it.
    pub(super) fn connect(&self, engine: &Arc<PrimaryEngine>) -> Result<OpenWriter> {
        let setup = &self.setup;
        let mut connection =
            sqlite::connect_whole(&setup.path, OpenFlags::SQLITE_OPEN_READ_WRITE, Share::Node)?;
        defend(&connection, !setup.trust_schema)?;
        connection.set_prepared_statement_cache_capacity(setup.statement_cache);
        // COMMIT does not fsync; the shared fsync does, for all that wait.
        connection.pragma_update(None, "synchronous", "NORMAL")?;
        connection.pragma_update(None, "wal_autocheckpoint", 0)?;
        // Before the application may set an authorizer of its own.
        refuse_exclusive(&mut connection)?;
        if let Some(run) = &setup.on_connect {
            run(&connection, ConnectionKind::Writer)?;
        }
        let settings = ConnectionSettings::of(&connection)?;
        let commits = CommitHook::put_on(&connection, self.node.fence.clone());
        Ok(OpenWriter { connection, commits, settings, engine: engine.clone() })
    }

    /// Has the application migrate the database.
    pub(super) fn migrate(&self, open: &mut OpenWriter) -> Result<()> {
        let OpenWriter { connection, commits, settings, engine } = open;
        if let Some(run) = &self.setup.migrate {
            let migrated = catch_unwind(AssertUnwindSafe(|| run(connection)));
            migrated.unwrap_or_else(|panic| Err(Error::Panicked(message(&*panic))))?;
            if !connection.is_autocommit() {
                return Err(Error::Config("the migration left a transaction open; it is rolled back".into()));
            }
        }
        settings.restore(connection)?;
        commits.again(connection);
        // What the migrations committed has its place in history, and stays, before any caller
        // hears that we are open.
        self.gate.settle(engine, engine.captured()?)
    }
}
