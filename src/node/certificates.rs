//! Certificates that are replaced on the disk while the node runs.

use std::sync::Arc;
use std::time::Duration;

use crate::channel::{Certificates, Channel, ChannelKey, Plaintext};
use crate::context::NodeContext;
use crate::error::Result;
use crate::files::{CertificateFiles, Paths};
use crate::peer::NodeId;
use crate::report::Condition;
use crate::threads::blocking;

/// How often the files are looked at.
const LOOKS_EVERY: Duration = Duration::from_secs(2);
/// Looks in a row that find files which can't be used, before it is told. Three files are replaced
/// one after the other.
const LOOKS_BAD: u32 = 2;

/// Reads the files again when they change.
#[derive(Debug)]
pub(crate) struct CertificateWatch {
    files: CertificateFiles,
    /// Hashes of what is in use.
    used: blake3::Hash,
    bad_looks: u32,
    told: Finding,
}

/// What is to be said of the certificates.
#[derive(Clone, PartialEq, Eq, Debug)]
enum Finding {
    Good,
    /// Others would refuse them.
    Doubtful(String),
    /// What is in the files can't be used; what was in them before is.
    Bad(String),
}

/// How a node speaks with others: with certificates and the watch over them, or with a key of its
/// own. Blocks.
///
/// # Errors
/// Those of [`Certificates::read`], [`Channel::certified`] and [`ChannelKey::of_node`].
pub(crate) fn channel(
    certificates: &Option<Certificates>,
    (paths, node): (&Paths, NodeId),
    plaintext: Option<Plaintext>,
) -> Result<(Channel, Option<CertificateWatch>)> {
    let Some(certificates) = certificates else {
        return Ok((Channel::new(&ChannelKey::of_node(paths, node)?, plaintext)?, None));
    };
    let bytes = certificates.read()?;
    let channel = Channel::certified(certificates, &bytes, plaintext)?;
    let files = CertificateFiles::new(certificates.clone());
    let watch = CertificateWatch { files, used: bytes.hash(), bad_looks: 0, told: Finding::Good };
    Ok((channel, Some(watch)))
}

impl CertificateWatch {
    /// Looks every two seconds until the node stops.
    pub(crate) async fn run(mut self, node: Arc<NodeContext>) {
        loop {
            tokio::select! {
                () = tokio::time::sleep(LOOKS_EVERY) => {}
                () = node.stop.cancelled() => return,
            }
            let of = node.clone();
            let looked = blocking(move || {
                self.look(&of);
                Ok(self)
            });
            match looked.await {
                Ok(watch) => self = watch,
                // A panic, or the end of the runtime.
                Err(error) => {
                    node.report_aside(Condition::CertificatesNotTaken { error: &error });
                    return;
                }
            }
        }
    }

    /// Takes what has changed, and tells what is to be told. Blocks.
    pub(crate) fn look(&mut self, node: &NodeContext) {
        let failed = match self.take(node) {
            Ok(()) => {
                self.bad_looks = 0;
                None
            }
            Err(error) => {
                self.files.forget();
                self.bad_looks += 1;
                Some(error.to_string())
            }
        };
        let finding = match (failed, node.channel.own_problem()) {
            (Some(why), _) if self.bad_looks >= LOOKS_BAD => Finding::Bad(why),
            (Some(_), _) => return,
            (None, Some(why)) => Finding::Doubtful(why),
            (None, None) => Finding::Good,
        };
        if finding == self.told {
            return;
        }
        self.told = finding;
        match &self.told {
            Finding::Good => node.report(Condition::CertificatesGood),
            Finding::Doubtful(why) => node.report(Condition::CertificateDoubtful { why }),
            Finding::Bad(error) => node.report(Condition::CertificatesNotTaken { error }),
        }
    }

    fn take(&mut self, node: &NodeContext) -> Result<()> {
        let Some(bytes) = self.files.changed()? else { return Ok(()) };
        let hash = bytes.hash();
        if hash == self.used {
            return Ok(());
        }
        node.channel.renew(&self.files.certificates, &bytes)?;
        self.used = hash;
        node.report(Condition::CertificatesTaken);
        Ok(())
    }
}
