//! What stands in the place of TLS to servers of HTTP in a build without it.

use tokio::net::TcpStream;

use crate::error::{Error, Result};

/// What such a build says.
const NO_FEATURE: &str = "this build of replite speaks no https: enable its feature `tls`";

/// There is none.
pub(crate) type TlsStream = TcpStream;

/// What a file has, and how the file is named where that can't be used.
#[derive(Clone, Copy)]
pub(crate) struct Pem<'a> {
    pub(crate) named: &'a str,
    #[expect(dead_code, reason = "a build with TLS reads it")]
    pub(crate) bytes: &'a [u8],
}

/// No certificate is accepted.
#[derive(Clone, Default, Debug)]
pub(crate) struct ServerTls(());

impl ServerTls {
    pub(crate) fn new(roots: Option<Pem<'_>>, identity: Option<[Pem<'_>; 2]>) -> Result<ServerTls> {
        match roots.or(identity.map(|[chain, _]| chain)) {
            Some(pem) => Err(Error::Config(format!("{}: {NO_FEATURE}", pem.named))),
            None => Ok(ServerTls::default()),
        }
    }

    pub(crate) fn check(host: &str) -> Result<()> {
        Err(Error::Config(format!("an https:// address, of {host:?}: {NO_FEATURE}")))
    }

    pub(crate) async fn connect(
        &self,
        _: TcpStream,
        _: &str,
        _: bool,
    ) -> Result<(TlsStream, bool), Box<dyn std::error::Error + Send + Sync>> {
        Err(NO_FEATURE.into())
    }
}

pub(crate) fn was_refused(_: &(dyn std::error::Error + 'static)) -> bool {
    false
}
