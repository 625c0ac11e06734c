//! A replica becomes the primary.

use std::sync::Arc;

use crate::context::RoleChange;
use crate::engine::{NotTurned, Opening, PrimaryEngine, ReplicaEngine, draw_epoch};
use crate::error::{Error, PeerProblem, Result};
use crate::node::slot::Running;
use crate::node::supervisor::{BesideEngine, Turns};
use crate::report::Condition;
use crate::status::Role;
use crate::txid::{Epoch, NUMBER_MAX};

/// What came of a turn that left the node whole: the primary, or why it is none.
type Turned = Result<Arc<PrimaryEngine>, Error>;

impl Turns {
    /// Without an epoch it draws one above all that are known here.
    pub(super) fn promote(
        &self,
        standing: &mut BesideEngine,
        epoch: Option<Epoch>,
        unchecked: bool,
    ) -> Result<()> {
        let replica = match (self.slot.get()?, epoch) {
            (Running::Replica(replica), _) => replica,
            (Running::Primary(_), None) => return Ok(()),
            (Running::Primary(engine), Some(epoch)) => {
                engine.open_epoch(epoch)?;
                engine.release()?;
                return self.lead(&engine);
            }
        };
        let epoch = self.newer(epoch)?;
        let followed = self.end_following(standing)?;
        // After that: a primary that the stream reaches makes it a replica again.
        self.stands(Role::Promoting);
        let turned = self.turn(&replica, epoch, unchecked).map_err(|error| self.stopped(error))?;
        let refused = match turned {
            Ok(engine) => match self.enter(standing, &engine) {
                Ok(()) => return Ok(()),
                Err(error) => {
                    // It serves no more: others may write, and nothing is acknowledged.
                    self.stands(Role::Fencing);
                    let back = self.leave(&engine).and_then(|opened| self.back(opened));
                    back.map_err(|error| self.stopped(error))?;
                    error
                }
            },
            Err(error) => error,
        };
        self.stands(Role::Replica);
        if !matches!(refused, Error::ShutDown) {
            let database = self.options.paths.database();
            self.node.report_aside(Condition::PromotionFailed { database, epoch, error: &refused });
        }
        if followed.is_some() {
            self.follow(standing, followed)?;
        }
        Err(refused)
    }

    /// The epoch, where it is above all that are known here.
    fn newer(&self, epoch: Option<Epoch>) -> Result<Epoch> {
        let newest = self.node.applied.history().epoch().max(self.node.roles.borrow().epoch);
        match epoch {
            None => draw_epoch(newest.number()).map_err(|error| error.of_peer("a primary")),
            Some(epoch) if epoch.number() > newest.number() && epoch.number() <= NUMBER_MAX => Ok(epoch),
            Some(epoch) => {
                let problem = PeerProblem::OldEpoch { theirs: epoch.to_string(), ours: newest.to_string() };
                Err(Error::peer("the lease", problem))
            }
        }
    }

    /// Turns the engine around. An error says that nothing can be gone on with.
    fn turn(&self, replica: &ReplicaEngine, epoch: Epoch, unchecked: bool) -> Result<Turned> {
        let opened = match replica.stop() {
            Ok(opened) => opened,
            Err(Error::NoState(_)) if unchecked => return self.turn_unchecked(replica, epoch),
            Err(error @ Error::NoState(_)) => return Ok(Err(error)),
            Err(error) => return Err(error),
        };
        match opened.into_primary(epoch) {
            Ok(engine) => self.led_by(engine),
            Err(NotTurned { error, opened: Some(opened) }) => {
                self.back(*opened)?;
                Ok(Err(error))
            }
            Err(NotTurned { error, opened: None }) => Err(error),
        }
    }

    /// The same with whatever is here, which is judged as at the start of a primary.
    fn turn_unchecked(&self, replica: &ReplicaEngine, epoch: Epoch) -> Result<Turned> {
        let database = self.options.paths.database();
        // The first epoch is above all that this node and those that it asked have heard of: none.
        self.node.report(match epoch.number() {
            1 => Condition::FirstState { database, epoch },
            _ => Condition::PromotedUnchecked { database, epoch },
        });
        replica.abandon()?;
        let (options, node) = (self.options.clone(), self.node.clone());
        let opened = Opening::begin(options, node, Some(epoch)).and_then(|files| files.finish(Some(epoch)));
        match opened {
            Ok(engine) => self.led_by(engine),
            Err(error) => {
                let replica = ReplicaEngine::open(self.options.clone(), self.node.clone())?;
                self.run(Running::Replica(Arc::new(replica)))?;
                Ok(Err(error))
            }
        }
    }

    fn led_by(&self, engine: PrimaryEngine) -> Result<Turned> {
        let engine = Arc::new(engine);
        self.run(Running::Primary(engine.clone()))?;
        // The newest epoch that the node knows; it does not lead yet.
        self.node.change_role(RoleChange::Epoch(self.node.applied.history().epoch()));
        Ok(Ok(engine))
    }

    /// Opens the writer, has the application migrate and greet its new role, and leads.
    fn enter(&self, standing: &mut BesideEngine, engine: &Arc<PrimaryEngine>) -> Result<()> {
        self.writer.open(engine)?;
        if let Err(error) = self.may_go_on() {
            // The database was closed meanwhile, and its writer before this one opened.
            self.writer.close();
            return Err(error);
        }
        let led = self.greet(standing).and_then(|()| self.lead(engine));
        if led.is_err() {
            self.take_leave(standing);
        }
        led
    }
}
