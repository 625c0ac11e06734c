//! What people see of a lease.

use std::fmt;

use super::view::{LeaseStands, LeaseView, NodeView, RecordView, View};
use crate::peer::ShortKey;
use crate::status::Role;
use crate::txid::Position;

/// A position as people read it: the epoch's number and the transaction's.
pub(super) struct Short(pub(super) Option<Position>);

impl fmt::Display for Short {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self.0 {
            Some(position) => f.pad(&format!("{}/{}", position.epoch().number(), position.number())),
            None => f.pad("-"),
        }
    }
}

impl fmt::Display for View {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        writeln!(f, "database {:?} of cluster {:?}", self.database, self.cluster)?;
        match &self.record {
            RecordView::Nothing => writeln!(f, "  the store has no record of a lease")?,
            RecordView::Unreachable { why } => writeln!(f, "  {why}")?,
            RecordView::Unusable { why } => writeln!(f, "  {why}")?,
            RecordView::Moved { to } => {
                writeln!(f, "  the lease was moved to {to}: no node leads by this store")?;
            }
            RecordView::Lease(lease) => lease.fmt(f)?,
        }
        if self.nodes.is_empty() {
            return Ok(());
        }
        writeln!(f)?;
        let wide = self.nodes.iter().map(|node| Short(node.position()).to_string().len()).max();
        let wide = wide.unwrap_or_default().max("POSITION".len());
        let (node, key) = ("NODE", "KEY");
        writeln!(f, "{node:36}  {key:8}  {:9}  {:wide$}  {:3}  URL", "ROLE", "POSITION", "FIT")?;
        self.nodes.iter().try_for_each(|node| node.row(f, wide))
    }
}

impl fmt::Display for LeaseView {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let state = match (self.state, self.renewed) {
            (LeaseStands::Gathering, _) => "no node has led yet: the nodes of a first start come together",
            (LeaseStands::Held, Some(true)) => "held, and renewed",
            (LeaseStands::Held, Some(false)) => "held, and not renewed: the holder is gone or cut off",
            (LeaseStands::Held, None) => "held",
            (LeaseStands::Released, _) => "given back: its last holder ended in good order",
        };
        writeln!(f, "  lease      {state}")?;
        if let Some(holder) = &self.holder {
            writeln!(f, "  holder     {} at {}", holder.node, holder.addresses.replication)?;
            let held = holder.held.as_secs_f64();
            writeln!(f, "  epoch      {}, for {held:.1} s", holder.epoch.number())?;
            writeln!(f, "  position   {}", Short(holder.position))?;
        }
        writeln!(f, "  lease time {} s", self.lease_time.as_secs_f64())?;
        let elections = if self.paused { "paused: no node takes over by itself" } else { "on" };
        writeln!(f, "  elections  {elections}")
    }
}

impl NodeView {
    pub(super) fn position(&self) -> Option<Position> {
        self.answer.as_ref()?.position
    }

    fn row(&self, f: &mut fmt::Formatter<'_>, wide: usize) -> fmt::Result {
        let node = self.node.map_or("?".into(), |node| node.to_string());
        let Some(answer) = &self.answer else {
            writeln!(f, "{node:36}  {:8}  {:9}  {:wide$}  {:3}  {}", "-", "-", "-", "-", self.url)?;
            return match &self.problem {
                Some(problem) => note(f, problem),
                None => Ok(()),
            };
        };
        let leads = answer.role == Role::Primary;
        let fit = if leads {
            "-"
        } else if answer.fit {
            "yes"
        } else {
            "no"
        };
        let (role, position) = (answer.role.to_string(), Short(answer.position));
        let key = ShortKey(answer.key);
        writeln!(f, "{node:36}  {key:8}  {role:9}  {position:wide$}  {fit:3}  {}", self.url)?;
        if answer.draining {
            note(f, "it is about to end")?;
        }
        if let Some(why) = answer.why_not.as_ref().filter(|_| !answer.fit && !leads) {
            note(f, &format!("not fit: {why}"))?;
        }
        if let Some(waits_for) =
            answer.waits_for.as_ref().filter(|waits| answer.why_not.as_ref() != Some(waits))
        {
            note(f, &format!("waits: {waits_for}"))?;
        }
        if let Some(problem) = &answer.problem {
            note(f, problem)?;
        }
        if !self.in_record {
            note(f, "the record does not name it")?;
        }
        Ok(())
    }
}

fn note(f: &mut fmt::Formatter<'_>, text: &str) -> fmt::Result {
    writeln!(f, "    {text}")
}
