//! Taking connections that come, while descriptors last.

use std::io;
use std::net::SocketAddr;
use std::time::Duration;

use tokio::net::{TcpListener, TcpStream};

use crate::descriptors::{self, Share};

/// How often it is looked whether there are descriptors again.
const PAUSE: Duration = Duration::from_millis(100);
/// The same after a connection was cut, which gives its descriptor back.
const PAUSE_OF_CUT: Duration = Duration::from_millis(5);

/// Accepts a connection. It waits while the process has few descriptors left: the last ones are not
/// for strangers. `give_way` cuts one of these. A peer may come by the few of the reserve that are
/// for this door.
///
/// # Errors
/// Those of the system.
///
/// # Cancel safety
/// No connection is lost.
pub(super) async fn accept(
    listener: &TcpListener,
    give_way: impl Fn() -> bool,
) -> io::Result<(TcpStream, SocketAddr)> {
    loop {
        while !descriptors::has_room(Share::Door) {
            tokio::time::sleep(if give_way() { PAUSE_OF_CUT } else { PAUSE }).await;
        }
        let error = match listener.accept().await {
            Err(error) if descriptors::is_want(&error) => error,
            accepted => return accepted,
        };
        let Some(loan) = descriptors::lend(Share::Door, 1) else { return Err(error) };
        // The system wants the descriptor before it looks whether a connection is there.
        let now = tokio::select! {
            biased;
            accepted = listener.accept() => Some(accepted),
            () = std::future::ready(()) => None,
        };
        drop(loan);
        if let Some(accepted) = now {
            return accepted;
        }
    }
}
