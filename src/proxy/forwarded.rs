//! What a handler is told of a request that came from another node.

use std::net::SocketAddr;

use http::request::Parts;
use http::uri::Scheme;

use crate::peer::NodeId;
use crate::proxy::hop::{ClientScheme, Hop};

/// The request came from another node of the cluster, which took it from a client. It is in the
/// request's extensions then, and no client can put it there.
///
/// A handler that asks who the client is asks this first: the connection that a forwarded request
/// came by is the other node's. With the feature `axum` that is done already. The extractor
/// `ConnectInfo<SocketAddr>` gives the client's address on the primary as it does on the node that
/// took the request. Where that node did not know the address, there is no `ConnectInfo`, and its
/// extractor refuses the request.
///
/// ```
/// use std::net::{IpAddr, SocketAddr};
///
/// use replite::Forwarded;
///
/// /// The client's address; `peer` is that of the connection.
/// fn client<B>(request: &http::Request<B>, peer: SocketAddr) -> Option<IpAddr> {
///     match request.extensions().get::<Forwarded>() {
///         Some(forwarded) => forwarded.client().map(|client| client.ip()),
///         None => Some(peer.ip()),
///     }
/// }
/// # let peer = ([10, 0, 0, 7], 4711).into();
/// # assert_eq!(client(&http::Request::new(()), peer), Some([10, 0, 0, 7].into()));
/// ```
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct Forwarded {
    client: Option<SocketAddr>,
    scheme: Option<ClientScheme>,
    node: NodeId,
}

impl Forwarded {
    /// What a hop says whose proof holds.
    pub(super) fn of(hop: &Hop) -> Forwarded {
        Forwarded { client: hop.client, scheme: hop.scheme, node: hop.taken_by.unwrap_or(hop.from) }
    }

    /// Of a request that this node took itself, for its own application.
    pub(super) fn here(client: Option<SocketAddr>, scheme: Option<ClientScheme>, node: NodeId) -> Forwarded {
        Forwarded { client, scheme, node }
    }

    /// The address of the client's connection to the node that took the request. `None` where that
    /// node does not know it. The port is 0 where it knows the IP address only.
    ///
    /// Where a proxy is in front, that is the proxy's address. The client's is in the headers that
    /// the proxy set, which came along: see [`ReplayLayer::proxies`](crate::ReplayLayer::proxies).
    pub fn client(&self) -> Option<SocketAddr> {
        self.client
    }

    /// The scheme of the request as the client sent it: `http` or `https`. `None` where its node
    /// could not tell, as with HTTP/1, whose requests name none.
    pub fn scheme(&self) -> Option<Scheme> {
        self.scheme.map(|scheme| match scheme {
            ClientScheme::Http => Scheme::HTTP,
            ClientScheme::Https => Scheme::HTTPS,
        })
    }

    /// The node that took the request from its client.
    pub fn node(&self) -> NodeId {
        self.node
    }

    pub(super) fn client_scheme(&self) -> Option<ClientScheme> {
        self.scheme
    }
}

/// Notes in a request who its client is, in place of the peer that sent it here.
pub(crate) fn arrive(parts: &mut Parts, forwarded: Forwarded) {
    parts.extensions.insert(forwarded);
    connect::replace(parts, forwarded.client);
}

pub(super) use connect::{forget, peer};

/// The address of the connection that a request came by, as axum tells it.
#[cfg(feature = "axum")]
mod connect {
    use std::net::SocketAddr;

    use axum::extract::ConnectInfo;
    use axum::extract::connect_info::MockConnectInfo;
    use http::request::Parts;

    pub(in crate::proxy) fn peer(parts: &Parts) -> Option<SocketAddr> {
        let connected = parts.extensions.get::<ConnectInfo<SocketAddr>>().map(|info| info.0);
        connected.or_else(|| parts.extensions.get::<MockConnectInfo<SocketAddr>>().map(|info| info.0))
    }

    pub(super) fn replace(parts: &mut Parts, client: Option<SocketAddr>) {
        match client {
            Some(client) => drop(parts.extensions.insert(ConnectInfo(client))),
            None => forget(parts),
        }
    }

    /// The extractor then finds none, and refuses.
    pub(in crate::proxy) fn forget(parts: &mut Parts) {
        parts.extensions.remove::<ConnectInfo<SocketAddr>>();
        parts.extensions.remove::<MockConnectInfo<SocketAddr>>();
    }
}

#[cfg(not(feature = "axum"))]
mod connect {
    use std::net::SocketAddr;

    use http::request::Parts;

    pub(in crate::proxy) fn peer(_: &Parts) -> Option<SocketAddr> {
        None
    }

    pub(super) fn replace(_: &mut Parts, _: Option<SocketAddr>) {}

    pub(in crate::proxy) fn forget(_: &mut Parts) {}
}
