//! Requests to another node in HTTP/2: on one connection, whatever hosts they name.

use std::error::Error as _;
use std::sync::Arc;
use std::time::Duration;

use http::header::HOST;
use http::uri::{Authority, PathAndQuery, Scheme};
use http::{Request, Response, Uri};
use hyper::body::Incoming;
use hyper::client::conn::http2::{Builder, SendRequest};
use hyper::rt::Executor;
use hyper_util::rt::TokioTimer;
use tokio::sync::Mutex;
use tokio::time::Instant;
use tower::Service;

use crate::proxy::body::Outgoing;
use crate::proxy::connect::{ChoseHttp1, Connector, POOL_IDLE_SECONDS, SendError, Spawn};
use crate::proxy::preface::Spoken;

/// How often a connection with requests on it is pinged.
pub(super) const PING_INTERVAL: Duration = Duration::from_secs(10);
/// One whose pings stay unanswered for this long is dead. On a slow link they wait for all that is
/// on its way before them.
pub(super) const PING_TIMEOUT: Duration = Duration::from_secs(60);

/// The connection to the node that was asked last.
#[derive(Clone, Debug)]
pub(super) struct Http2 {
    connector: Connector,
    spawn: Spawn,
    open: Arc<Mutex<Option<OpenConnection>>>,
}

#[derive(Debug)]
struct OpenConnection {
    to: (Scheme, Authority),
    way: SendRequest<Outgoing>,
    shown: Spoken,
    used: Instant,
}

impl Http2 {
    pub(super) fn new(connector: Connector, spawn: Spawn) -> Http2 {
        Http2 { connector, spawn, open: Arc::default() }
    }

    /// Sends a request to the host of its URI; it is named after its `Host` there.
    ///
    /// # Cancel safety
    /// Dropping the future resets the request's stream.
    pub(super) async fn request(
        &self,
        mut request: Request<Outgoing>,
    ) -> Result<Response<Incoming>, SendError> {
        let to = name(&mut request)?;
        // A request that waits for another's try to connect does not wait longer than that one.
        let (mut way, shown) = match tokio::time::timeout(self.connector.limit, self.way(to)).await {
            Ok(way) => way?,
            Err(_) => return Err(SendError::Unreachable("no connection in time".into())),
        };
        way.send_request(request).await.map_err(|error| {
            if was_not_begun(&error, &shown) {
                SendError::NotBegun(error.into())
            } else {
                SendError::Broken(error.into())
            }
        })
    }

    /// A way onto the connection, which is opened if need be. Its server has shown that it speaks
    /// HTTP/2.
    async fn way(&self, to: (Scheme, Authority)) -> Result<(SendRequest<Outgoing>, Spoken), SendError> {
        let mut open = self.open.lock().await;
        if let Some(open) = &mut *open
            && open.to == to
            && !open.way.is_closed()
            && open.used.elapsed() < Duration::from_secs(POOL_IDLE_SECONDS)
        {
            open.used = Instant::now();
            return Ok((open.way.clone(), open.shown.clone()));
        }
        let is_tls = to.0 == Scheme::HTTPS;
        let uri = Uri::builder().scheme(to.0.clone()).authority(to.1.clone()).path_and_query("/").build();
        let uri = uri.map_err(|error| SendError::Unreachable(error.into()))?;
        let io = self.connector.clone().call(uri).await.map_err(|error| match error.is::<ChoseHttp1>() {
            true => SendError::NoHttp2(error),
            false => SendError::Unreachable(error),
        })?;
        let mut shown = io.inner().shown();
        let mut builder = Builder::new(self.spawn.clone());
        builder
            .timer(TokioTimer::new())
            .adaptive_window(true)
            .keep_alive_interval(PING_INTERVAL)
            .keep_alive_timeout(PING_TIMEOUT);
        let (way, connection) =
            builder.handshake(io).await.map_err(|error| SendError::Unreachable(error.into()))?;
        self.spawn.execute(async move {
            // Each request on it hears of its end.
            let _ = connection.await;
        });
        // Also of a server that has agreed to HTTP/2 within TLS: by its settings it shows that the
        // handshake is done for it, too. Before that it may still want a certificate of this node.
        match shown.speaks().await {
            Some(true) => {}
            Some(false) if is_tls => {
                return Err(SendError::Unreachable(
                    "the server agreed to HTTP/2, and does not speak it".into(),
                ));
            }
            Some(false) => return Err(SendError::NoHttp2("the server does not speak HTTP/2".into())),
            None => return Err(SendError::Unreachable("the connection broke at once".into())),
        }
        *open = Some(OpenConnection { to, way: way.clone(), shown: shown.clone(), used: Instant::now() });
        Ok((way, shown))
    }
}

/// Names the request's host as HTTP/2 does, in the URI alone: a server takes a `Host` beside
/// another authority for an attack (RFC 9113, 8.3.1). Where the URI led to before.
pub(super) fn name<B>(request: &mut Request<B>) -> Result<(Scheme, Authority), SendError> {
    let mut parts = std::mem::take(request.uri_mut()).into_parts();
    let to = parts.scheme.clone().zip(parts.authority.clone());
    let to = to.ok_or_else(|| SendError::Unreachable("it names no host".into()))?;
    // An empty one is no name.
    if let Some(host) = request.headers_mut().remove(HOST).filter(|host| !host.is_empty()) {
        let named = Authority::try_from(host.as_bytes()).ok().filter(|name| !name.as_str().contains('@'));
        parts.authority = Some(named.ok_or(SendError::BadHost)?);
    }
    parts.path_and_query.get_or_insert(PathAndQuery::from_static("/"));
    *request.uri_mut() = Uri::from_parts(parts).map_err(|error| SendError::Unreachable(error.into()))?;
    Ok(to)
}

/// Whether it is certain that the node has not begun the request. It was never put on the
/// connection, it came after the last one that the node says it looked at, or the node refused it.
///
/// A node that goes away says first that it does, and later which request was the last. An error
/// between the two tells nothing of a request that was put on the connection in that moment.
pub(super) fn was_not_begun(error: &hyper::Error, shown: &Spoken) -> bool {
    let inner = || error.source().and_then(|source| source.downcast_ref::<h2::Error>());
    error.is_canceled() || inner().is_some_and(|error| was_not_looked_at(error, shown))
}

/// The same of a request that was put on the connection.
pub(super) fn was_not_looked_at(error: &h2::Error, shown: &Spoken) -> bool {
    let refused = error.is_reset() && error.reason() == Some(h2::Reason::REFUSED_STREAM);
    error.is_remote() && (error.is_go_away() && shown.said_last() || refused)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_request_is_named_after_its_host_and_goes_where_its_uri_says() {
        let named = |host: Option<&str>| {
            let mut request = Request::get("http://10.0.0.1:80/app/a%2F?b");
            if let Some(host) = host {
                request = request.header("host", host);
            }
            let mut request = request.body(()).unwrap();
            let to = name(&mut request).map_err(|error| format!("{error:?}"))?;
            assert_eq!(to, (Scheme::HTTP, Authority::from_static("10.0.0.1:80")));
            assert!(!request.headers().contains_key(HOST));
            Ok::<_, String>(request.uri().to_string())
        };
        assert_eq!(named(Some("a.example")).unwrap(), "http://a.example/app/a%2F?b");
        assert_eq!(named(Some("[::1]:8080")).unwrap(), "http://[::1]:8080/app/a%2F?b");
        for none in [None, Some("")] {
            assert_eq!(named(none).unwrap(), "http://10.0.0.1:80/app/a%2F?b");
        }
        for bad in ["a b", "a/b", "user@a", "a,b.example?"] {
            assert_eq!(named(Some(bad)).unwrap_err(), "BadHost", "{bad}");
        }
    }
}
