//! Ports of listeners that others know before they listen, or that listen again where they did.

use std::io;
use std::net::{Ipv4Addr, SocketAddr};
use std::sync::Mutex;

use tokio::net::TcpSocket;

/// A port of loopback that is this process's until its end.
///
/// Most listeners of the tests take any port and tell it. This is for two others: one whose port
/// must be known before it listens, and one that is opened again where its replicas look for it.
/// A socket is bound to the port all the time, and never listens. So the system gives the port to
/// no other listener or connection that takes any. A listener with SO_REUSEADDR, which nodes and
/// nginx set, binds it all the same, also in another process.
pub(crate) fn own_port() -> u16 {
    keep([bind(0).unwrap()])
}

/// The first of three such ports in a row.
pub(crate) fn three_ports() -> u16 {
    // Kept meanwhile, so that another try finds others.
    let mut tried = Vec::new();
    loop {
        let first = bind(0).unwrap();
        let port = first.local_addr().unwrap().port();
        let next = |by| port.checked_add(by).ok_or(io::ErrorKind::AddrInUse.into()).and_then(bind);
        if let (Ok(second), Ok(third)) = (next(1), next(2)) {
            return keep([first, second, third]);
        }
        tried.push(first);
    }
}

/// Fails when another socket has the port. Once it is bound, a listener may share it.
fn bind(port: u16) -> io::Result<TcpSocket> {
    let socket = TcpSocket::new_v4()?;
    socket.bind(SocketAddr::from((Ipv4Addr::LOCALHOST, port)))?;
    socket.set_reuseaddr(true)?;
    Ok(socket)
}

/// Keeps the sockets, and says the port of the first.
fn keep<const N: usize>(sockets: [TcpSocket; N]) -> u16 {
    static KEPT: Mutex<Vec<TcpSocket>> = Mutex::new(Vec::new());
    let port = sockets[0].local_addr().unwrap().port();
    // Elsewhere no listener can bind what another socket has. There the port was free just now.
    if cfg!(target_os = "linux") {
        KEPT.lock().unwrap().extend(sockets);
    }
    port
}
