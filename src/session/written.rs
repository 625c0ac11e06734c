//! What a session is told of a write.

use std::fmt;
use std::sync::Arc;

use crate::context::NodeContext;
use crate::token::Token;
use crate::txid::Txid;

/// A write that a [`Session`](crate::Session) is told of: by the [`Commit`](crate::Commit) that
/// came of it, by a [`Token`], or by the [`Db`](crate::Db) that was written to by other means. No
/// bare position is one, because a commit may be newer than the position that is read right after
/// it.
///
/// ```
/// use replite::{Db, Error, Session};
///
/// async fn rename(session: Session, db: Db) -> Result<(), Error> {
///     let path = db.path().to_owned();
///     let renamed = tokio::task::spawn_blocking(move || {
///         let own = replite::rusqlite::Connection::open(path)?; // or a pool's, an ORM's
///         own.execute("UPDATE notes SET text = 'b'", [])
///     });
///     renamed.await.map_err(|_| Error::ShutDown)??;
///     session.observe(&db); // the response's token names it, also when this was a GET
///     Ok(())
/// }
/// # let _ = rename;
/// ```
#[derive(Clone)]
pub struct Written {
    pub(super) by: WrittenBy,
}

#[derive(Clone)]
pub(super) enum WrittenBy {
    /// None when nothing was written.
    Commit(Option<Txid>),
    /// Any connection, to this node's database.
    Others(Arc<NodeContext>),
}

impl Written {
    pub(crate) fn commit(txid: Option<Txid>) -> Written {
        Written { by: WrittenBy::Commit(txid) }
    }

    pub(crate) fn past(node: Arc<NodeContext>) -> Written {
        Written { by: WrittenBy::Others(node) }
    }
}

impl fmt::Debug for Written {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match &self.by {
            WrittenBy::Commit(txid) => f.debug_tuple("Written").field(txid).finish(),
            WrittenBy::Others(node) => f.debug_tuple("Written").field(&node.database).finish(),
        }
    }
}

impl From<&Token> for Written {
    fn from(token: &Token) -> Written {
        Written::commit(Some(token.txid()))
    }
}
