//! Further connections to an open database.

use crate::descriptors;
use crate::engine::file::database::OpenDatabase;
use crate::error::Result;
use crate::sqlite::Handle;

/// Has all readers of this process share a read mark, until the locks are released. Without a
/// descriptor to spare they ask the kernel, each for itself, as they do without a node.
pub(in crate::engine) fn share_reads(base: &OpenDatabase) {
    if descriptors::refill()
        && let Err(error) = reader(base).and_then(|handle| base.options.read_mark.open(handle))
    {
        tracing::debug!(%error, "there is no standing read mark");
    }
}

/// A further connection to an open database.
pub(in crate::engine) fn reader(base: &OpenDatabase) -> Result<Handle> {
    base.expect_files()?;
    let handle = Handle::open(base.path(), false)?;
    handle.connection().query_row("SELECT count(*) FROM sqlite_schema", [], |r| r.get::<_, i64>(0))?;
    Ok(handle)
}
