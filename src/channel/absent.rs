//! What stands in the place of TLS in a build without it.

use std::io;

use crate::channel::certificates::{CertificateBytes, Certificates};
use crate::channel::key::ChannelKey;
use crate::channel::{Binding, Traffic, no_feature};
use crate::error::{PeerProblem, Result};
use crate::peer::PeerKey;

/// There is none.
#[derive(Debug)]
pub(crate) enum Tls {}

/// What a connection would be.
pub(crate) type TlsStream<I> = I;

impl Tls {
    pub(super) fn raw(_: &ChannelKey) -> Result<Option<Tls>> {
        Ok(None)
    }

    pub(super) fn certified(_: &Certificates, _: &CertificateBytes) -> Result<Tls> {
        Err(no_feature())
    }

    pub(super) fn own_problem(&self) -> Option<String> {
        match *self {}
    }

    pub(super) fn problem(&self, _: &io::Error) -> Option<PeerProblem> {
        match *self {}
    }

    pub(super) fn key(&self) -> PeerKey {
        match *self {}
    }

    pub(super) async fn connect<I>(&self, _: I, _: Traffic) -> io::Result<(TlsStream<I>, Binding)> {
        match *self {}
    }

    pub(super) async fn accept<I>(&self, _: I) -> io::Result<(TlsStream<I>, Binding)> {
        match *self {}
    }
}
