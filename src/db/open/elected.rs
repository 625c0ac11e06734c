//! Opening a node whose role a lease decides.

use std::sync::Arc;
use std::time::Duration;

use crate::checksum::Fingerprint;
use crate::db::config::ConfiguredStore;
use crate::db::open::{ClaimedNode, Elected, Files, OPENING, OpenedNode};
use crate::election::Settings;
use crate::engine::{Opening, ReplicaEngine, newest_epoch};
use crate::error::{Error, Result};
use crate::files::Paths;
use crate::lease::record::{Holder, LeaseState};
#[cfg(feature = "members")]
use crate::members::{MemberNode, MembersConfig};
use crate::node::elector::{Elector, LeaseStore, RecordLook, WITHHOLD_LIMIT};
use crate::node::host::ListenerGuard;
use crate::node::tenancy::{self, Tenancy};
use crate::random;
use crate::threads::blocking_for_caller as blocking;
use crate::txid::Epoch;

impl ClaimedNode {
    /// A node with a lease begins as a replica, and the election makes it the primary. The one that
    /// held the lease last, and can show that nothing happened to its files since, opens them as a
    /// primary's first: what others wrote to them meanwhile becomes history.
    pub(super) async fn open_elected(
        self,
        store: ConfiguredStore,
        lease_time: Duration,
        listener_guard: &mut ListenerGuard,
    ) -> Result<OpenedNode> {
        let (claimed, tenancy, store) = blocking(OPENING, move || {
            let tenancy = Tenancy::enter(&self.paths, self.node.me.incarnation)?;
            let store = self.lease_store(store, lease_time)?;
            Ok((self, tenancy, store))
        })
        .await?;
        if store.has_members() {
            // They agree on nothing that they can't say to each other.
            listener_guard.open();
        }
        let (elector, look) = Elector::start(claimed.node.clone(), store, lease_time)?;
        // Without a thread that looks there is no record that would say more.
        let look = look.await.map_err(|_| Error::ShutDown)?;
        blocking(OPENING, move || {
            let me = Holder {
                node: claimed.node.me.node,
                incarnation: claimed.node.me.incarnation,
                boot: tenancy::boot_id(),
                addresses: claimed.node.me.addresses.clone(),
            };
            let may_lead = !claimed.config.is_follower();
            let heir = tenancy.alone && may_lead && is_heirs(&look, &me, &tenancy, claimed.options.keyed());
            let engine = match heir {
                true => claimed.engine_of_heir()?,
                false => claimed.replica_engine()?,
            };
            let settings = claimed.settings(me, &tenancy, lease_time, heir);
            let files = Files::Replica(Arc::new(engine));
            let elected = Some(Elected { elector, settings, tenancy });
            Ok(OpenedNode { claimed, files, recovered: 0, elected })
        })
        .await
    }

    /// Blocks.
    #[cfg_attr(not(feature = "members"), allow(unused_variables, reason = "only members have timers by it"))]
    fn lease_store(&self, store: ConfiguredStore, lease_time: Duration) -> Result<LeaseStore> {
        match store {
            ConfiguredStore::Given(store) => Ok(LeaseStore::given(store)),
            #[cfg(feature = "members")]
            ConfiguredStore::Members(list) => {
                let config =
                    MembersConfig { list, witness: false, mounted: self.config.listen.is_none(), lease_time };
                let member = MemberNode::open(self.node.clone(), &self.paths, config)?;
                self.members.open(member.clone());
                Ok(LeaseStore::members(member))
            }
        }
    }

    fn engine_of_heir(&self) -> Result<ReplicaEngine> {
        let (_, key) = self.options.keyed();
        // What becomes history here gets an epoch above all that were heard of.
        let above =
            self.node.lease.heard.number().max(newest_epoch(&self.paths, key).map_or(0, Epoch::number));
        let epoch = Epoch::new(above + 1, u64::from_le_bytes(random::array()?));
        let opening = match Opening::begin(self.options.clone(), self.node.clone(), Some(epoch)) {
            // The next primary leads it back, and what is here is kept.
            Err(Error::Damaged { .. }) => return self.replica_engine(),
            opening => opening?,
        };
        opening.finish_opened()?.into_replica().map_err(|refused| refused.error)
    }

    fn settings(&self, me: Holder, tenancy: &Tenancy, lease_time: Duration, heir: bool) -> Settings {
        let may_lead = !self.config.is_follower();
        Settings {
            me,
            cluster: self.node.cluster.clone(),
            database: self.node.database.clone(),
            lease_time,
            failover_loss: self.config.failover_loss,
            // A follower enters itself nowhere.
            candidate: self.config.candidate && may_lead,
            bootstrap: self.config.bootstrap.filter(|_| may_lead),
            bootstrapped: tenancy.bootstrapped,
            alone: heir,
            withhold_limit: self.config.drain_limit + WITHHOLD_LIMIT,
            incarnations: tenancy.incarnations.clone(),
        }
    }
}

/// Whether the record says that this node, as it lies on this disk, held the lease last.
fn is_heirs(look: &RecordLook, me: &Holder, tenancy: &Tenancy, (paths, key): (&Paths, Fingerprint)) -> bool {
    let Ok(Some((record, _))) = &look.1 else { return false };
    let LeaseState::Held(tenure) = &record.state else { return false };
    let holder = &tenure.holder;
    holder.node == me.node
        && holder.boot == me.boot
        && !me.boot.is_empty()
        && tenancy.incarnations.contains(&holder.incarnation)
        && newest_epoch(paths, key) == Some(tenure.epoch)
}
