//! Records that come in from another node, on their way into the log and the WAL.

use bytes::BytesMut;

use crate::engine::history::append_or_gap::{append_or_gap, begin_anew};
use crate::engine::history::intake_error::IntakeError;
use crate::engine::history::wal_appender::WalAppender;
use crate::error::Result;
use crate::report::Condition;
use crate::txid::EpochHistory;
use crate::wire::{Message, RecordPart, Unit};

/// Hands units to an appender, and the same bytes to the log.
#[derive(Debug, Default)]
pub(in crate::engine) struct RecordIntake {
    /// Raw units that are not in the log yet.
    buffer: BytesMut,
    /// Bytes of `buffer` that are whole records.
    whole: usize,
}

impl RecordIntake {
    /// Takes a unit of a record: verified, but neither logged nor published yet. Returns whether it
    /// was one.
    pub(in crate::engine) fn unit(
        &mut self,
        live: &mut WalAppender,
        unit: &Unit,
        message: &Message<'_>,
        history: &EpochHistory,
    ) -> Result<bool, IntakeError> {
        if !unit.kind.is_of_record() {
            return Ok(false);
        }
        for part in message.parts() {
            match part {
                RecordPart::Begin(begin) => {
                    live.begin(begin, history)?;
                    // The primary vouches for a state that is not the log's, such as after a power
                    // cut.
                    if self.buffer.is_empty() && live.base.log.tip() != Some(begin.before) {
                        begin_anew(&live.base, begin.before)?;
                        live.base.node.report(Condition::StateVouched);
                    }
                }
                RecordPart::Change(change) => live.change(&change)?,
                RecordPart::End(end) => live.end(end)?,
            }
        }
        self.buffer.extend_from_slice(&unit.raw);
        if unit.kind.ends_record() {
            self.whole = self.buffer.len();
        }
        Ok(true)
    }

    /// Gives the log the records first; then readers see them.
    pub(in crate::engine) fn publish(&mut self, live: &mut WalAppender) -> Result<()> {
        if self.whole > 0 {
            let records = self.buffer.split_to(self.whole).freeze();
            self.whole = 0;
            append_or_gap(&live.base, records, Some(live.position()))?;
        }
        if let Err(error) = live.publish() {
            // The log has the records already. They come again, and must not stand in the log
            // twice.
            if let Err(error) = begin_anew(&live.base, live.base.tip().position) {
                live.base.node.report(Condition::LogNotRenewed { error: &error });
            }
            return Err(error);
        }
        if self.buffer.is_empty() {
            Ok(())
        } else {
            append_or_gap(&live.base, self.buffer.split().freeze(), None)
        }
    }

    /// Forgets what is not published, here, in the appender and in the log.
    pub(in crate::engine) fn abort(&mut self, live: Option<&mut WalAppender>) {
        self.buffer.clear();
        self.whole = 0;
        if let Some(live) = live {
            live.abort();
            if let Err(error) = live.base.log.abort() {
                live.base.node.report(Condition::RecordNotAborted { error: &error });
            }
        }
    }
}
