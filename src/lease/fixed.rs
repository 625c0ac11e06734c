//! The primary that the configuration says.

/// The primary is fixed by configuration: it never changes while the nodes run.
///
/// The node that is configured as the primary is it from its first start on; there must be exactly
/// one. Should two be started by mistake, their histories differ by their epochs' branch ids. A
/// replica that meets both follows the higher epoch and keeps a copy of what it had.
///
/// ```
/// use replite::{Config, lease};
///
/// let primary = Config::new("app.db").lease(lease::Fixed::primary()); // as without
/// let replica = Config::new("app.db").lease(lease::Fixed::replica_of("replite://10.0.0.1:7000"));
/// # drop((primary, replica));
/// ```
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct Fixed {
    primary: Option<String>,
}

impl Fixed {
    /// This node is the primary.
    pub fn primary() -> Fixed {
        Fixed { primary: None }
    }

    /// This node follows the primary whose replication endpoint has this URL. With a listener of
    /// its own ([`Config::listen`](crate::Config::listen)) that is `replite://10.0.0.1:7000`. An
    /// endpoint that is mounted in an HTTP server has one like `http://10.0.0.1:8080`, which
    /// without a path means `/_replite`.
    pub fn replica_of(url: impl Into<String>) -> Fixed {
        Fixed { primary: Some(url.into()) }
    }

    /// The URL of the primary; none on the primary.
    pub(crate) fn primary_url(&self) -> Option<&str> {
        self.primary.as_deref()
    }
}
