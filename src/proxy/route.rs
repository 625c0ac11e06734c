//! Where a request is to run.

use http::Method;
use http::request::Parts;
use hyper::ext::Protocol;

/// Where a request is to run.
///
/// ```
/// use replite::{Db, ReplayLayer, Route};
///
/// fn layer(db: &Db) -> ReplayLayer {
///     db.replay_layer()
///         .route_prefix("/metrics", Route::Local)
///         .route(|parts| match parts.uri.path() {
///             "/search" => Route::LocalThenReplay, // a POST that only reads
///             _ => Route::by_method(parts),
///         })
/// }
/// # let _ = layer;
/// ```
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
#[non_exhaustive]
pub enum Route {
    /// On the node that got it, whatever its role; it waits for no token and is never replayed.
    Local,
    /// On the primary.
    Primary,
    /// On the node that got it, once it has the transaction of the request's token. The layer sends
    /// it to the primary, too, when the handler turned out to need that and committed nothing.
    LocalThenReplay,
}

impl Route {
    /// Where a request runs when nothing else is configured: `GET`, `HEAD`, `OPTIONS` and `TRACE`
    /// are [`Route::LocalThenReplay`], all others [`Route::Primary`]. An extended `CONNECT`, by
    /// which HTTP/2 asks for a WebSocket, counts as the `GET` that it is in HTTP/1.1.
    pub fn by_method(parts: &Parts) -> Route {
        let extended = parts.method == Method::CONNECT && parts.extensions.get::<Protocol>().is_some();
        if !is_safe(&parts.method) && !extended {
            Route::Primary
        } else if parts.uri.path() == "*" {
            // `OPTIONS *` is about the server itself and has no URL to be forwarded to.
            Route::Local
        } else {
            Route::LocalThenReplay
        }
    }
}

/// Whether the method promises to change nothing. The request may then be sent again.
pub(super) fn is_safe(method: &Method) -> bool {
    matches!(*method, Method::GET | Method::HEAD | Method::OPTIONS | Method::TRACE)
}

/// Whether the path is the prefix or lies below it.
pub(super) fn is_below(path: &str, prefix: &str) -> bool {
    let prefix = prefix.strip_suffix('/').unwrap_or(prefix);
    path.strip_prefix(prefix).is_some_and(|rest| rest.is_empty() || rest.starts_with('/'))
}

#[cfg(test)]
mod tests {
    use super::*;
    use http::Request;

    #[test]
    fn safe_methods_run_here_and_all_others_on_the_primary() {
        for (method, uri, route) in [
            ("GET", "/a", Route::LocalThenReplay),
            ("HEAD", "/a", Route::LocalThenReplay),
            ("OPTIONS", "/a", Route::LocalThenReplay),
            ("OPTIONS", "*", Route::Local),
            ("POST", "/a", Route::Primary),
            ("DELETE", "/a", Route::Primary),
            ("BREW", "/a", Route::Primary),
        ] {
            let (parts, ()) = Request::builder().method(method).uri(uri).body(()).unwrap().into_parts();
            assert_eq!(Route::by_method(&parts), route, "{method} {uri}");
        }
    }

    #[test]
    fn a_prefix_ends_at_a_slash() {
        assert!(is_below("/_replite", "/_replite"));
        assert!(is_below("/_replite/v1", "/_replite"));
        assert!(is_below("/_replite/v1", "/_replite/"));
        assert!(!is_below("/_replited", "/_replite"));
        assert!(is_below("/a", "/"));
    }
}
