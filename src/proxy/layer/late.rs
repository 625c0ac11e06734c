//! Which responses have the layer run a request again, on the primary.

use std::sync::Arc;

use http::response::Parts;

use crate::proxy::layer::ReplayLayer;

impl ReplayLayer {
    /// Which responses of handlers say that the request needs the primary, beside those that are
    /// marked ([`NeedsPrimary`](crate::NeedsPrimary)). It is for applications whose errors come
    /// from other libraries. On a replica a write of theirs fails with `attempt to write a readonly
    /// database`, or with `database is locked`. The layer asks for each response of a handler that
    /// ran here, but not where this node was the primary when it began: there a statement may have
    /// failed after others that were committed.
    ///
    /// The layer sends such a request to the primary, and drops the response. It does not when the
    /// session committed something, or for a [`Route::Local`](crate::Route::Local).
    ///
    /// ```
    /// use replite::{Db, ReplayLayer};
    ///
    /// fn layer(db: &Db) -> ReplayLayer {
    ///     // The application's error response says so where SQLite said that it may not write.
    ///     db.replay_layer().replay_when(|response| response.headers.contains_key("x-read-only"))
    /// }
    /// # let _ = layer;
    /// ```
    pub fn replay_when(self, needs: impl Fn(&Parts) -> bool + Send + Sync + 'static) -> Self {
        self.with(|options| options.replay_when = Some(Arc::new(needs)))
    }
}
