//! Whom the node follows, whether that one takes requests, and by which keys, as its stream says.

use crate::context::RoleChange;
use crate::engine::StreamError;
use crate::error::Result;
use crate::keys::DatabaseKeys;
use crate::replica::Feed;
use crate::replica::connection::PrimaryConnection;
use crate::replica::pace::Coming;
use crate::replica::units::Units;
use crate::status::{PeerInfo, Role};
use crate::txid::Epoch;
use crate::wire::{Handed, HandoffStage, Kind, Message, PIECE_FIELDS_BYTES, PeerKeys, Plan, Unit, Welcome};

impl<F: Feed> PrimaryConnection<'_, F> {
    /// From here on this node has the keys of the primary.
    pub(super) async fn take_keys(
        &self,
        welcome: &Welcome,
        units: &mut Units<'_>,
    ) -> Result<(), StreamError> {
        let ours = self.node.database_keys.get();
        let PeerKeys { page, token } = welcome.keys;
        if welcome.plan == Plan::Recover && page != ours.page {
            return Err(self.garbled("another page key, and records that are to go on".into()).into());
        }
        let keys = DatabaseKeys { page, token: token.unwrap_or(ours.token) };
        if keys != ours {
            self.feed.take_keys(keys).await?;
        }
        units.expect_pages(page);
        Ok(())
    }

    pub(super) fn follows(&mut self, epoch: Epoch, peer: PeerInfo) {
        self.epoch = Some(epoch);
        self.peer = Some(peer.clone());
        let primary = (!self.drained.is_cancelled() && !self.withheld).then_some((peer, self.key));
        self.node.change_role(RoleChange::Follows { primary, epoch });
    }

    /// An election that came to nothing may have had the node forget whom it follows.
    pub(super) fn follows_still(&mut self) {
        let forgot = {
            let now = self.node.roles.borrow();
            now.role == Role::Replica && now.primary.is_none()
        };
        if forgot && let (Some(epoch), Some(peer)) = (self.epoch, self.peer.clone()) {
            self.follows(epoch, peer);
        }
    }

    /// The primary's application is about to end. From now on the node holds requests for it, as it
    /// does without a primary.
    pub(super) fn drain(&mut self) {
        tracing::info!(primary = %self.primary, "the primary takes no more requests");
        self.drained.cancel();
        if let (Some(epoch), Some(peer)) = (self.epoch, self.peer.clone()) {
            self.follows(epoch, peer);
        }
    }

    /// Notes how far the primary is, for status. The part that takes a unit in says what is wrong
    /// with it.
    pub(super) fn note(&self, unit: &Unit) {
        let bytes = |pages: u32, size: u64| u64::from(pages) * size;
        if unit.kind == Kind::SnapPiece {
            // Its hash is looked at where it is taken in, and nowhere else.
            let pages = unit.payload().len().saturating_sub(PIECE_FIELDS_BYTES) as u64;
            return self.lagging.comes(|coming| {
                if let Coming::Snapshot { have, .. } = coming {
                    *have += pages;
                }
            });
        }
        match unit.decode() {
            Ok(Message::TxnBegin(begin)) => self.lagging.heard(begin.before.number().saturating_add(1)),
            Ok(Message::SnapBegin(begin)) => {
                let size = u64::from(begin.page_size.get());
                let (have, total) = (bytes(begin.from.get() - 1, size), bytes(begin.pages, size));
                self.lagging.comes(|coming| *coming = Coming::Snapshot { have, total });
            }
            Ok(Message::HealBegin(_)) => self.lagging.comes(|coming| *coming = Coming::Heal),
            Ok(Message::SnapEnd(_)) => self.lagging.comes(|coming| *coming = Coming::Log),
            _ => {}
        }
    }

    /// The primary hands its lease over, or does not after all. While it is about to, the node
    /// holds requests for it.
    pub(super) fn handoff(&mut self, unit: &Unit) -> Result<()> {
        match self.decode(unit)? {
            Message::Handoff(stage) => {
                tracing::debug!(primary = %self.primary, ?stage, "a handoff of the primary's");
                self.withheld = stage != HandoffStage::GoesOn;
                if let (Some(epoch), Some(peer)) = (self.epoch, self.peer.clone()) {
                    self.follows(epoch, peer);
                }
                if stage == HandoffStage::Done {
                    if let Some(peer) = &self.peer {
                        self.node.set_handed((peer.node, peer.incarnation));
                    }
                    self.node.lease.offers.hint();
                }
            }
            Message::Offer(offer) => {
                // It waits for the answer, or gives the offer up.
                self.offers.try_send(offer).map_err(|_| self.garbled("offers without end".into()))?;
            }
            Message::Handed(Handed { attempt, version, record }) => {
                self.node.lease.offers.handed(attempt, record, version);
            }
            _ => return Err(self.garbled(format!("a {:?} that is none", unit.kind))),
        }
        Ok(())
    }
}
