//! What stands in the place of TLS in a build without it.

use std::path::Path;

use tokio::net::TcpStream;

use crate::error::{Error, Result};
use crate::proxy::BoxError;
use crate::proxy::preface::ByteStream;

/// What such a build says.
const NO_FEATURE: &str = "this build of replite speaks no https: enable its feature `tls`";

/// No certificate is accepted.
#[derive(Clone, Default, Debug)]
pub(crate) struct AppTls(());

impl AppTls {
    pub(crate) fn of_roots(path: &Path, _: &[u8]) -> Result<AppTls> {
        Err(Error::Config(format!("app_roots: {}: {NO_FEATURE}", path.display())))
    }

    pub(crate) fn check(host: &str) -> Result<()> {
        Err(Error::Config(format!("an https:// address, of {host:?}: {NO_FEATURE}")))
    }

    pub(super) async fn connect(
        &self,
        _: TcpStream,
        _: &str,
        _: bool,
    ) -> Result<(Box<dyn ByteStream>, bool), BoxError> {
        Err(NO_FEATURE.into())
    }
}

pub(super) fn was_refused(_: &(dyn std::error::Error + 'static)) -> bool {
    false
}
