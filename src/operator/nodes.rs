//! Asking the nodes that a record names, and those whose addresses are given.

use std::time::Duration;

use tokio::task::JoinSet;
use tokio_util::task::TaskTracker;

use crate::command::{self, NoAnswer};
use crate::context::{CommandAnswer, OperatorCommand};
use crate::handshake::Asker;
use crate::lease::record::Record;
use crate::net::Endpoint;
use crate::operator::problem::OperatorError;
use crate::operator::register::tenure;
use crate::operator::view::{NodeAnswer, NodeView};
use crate::peer::NodeId;

/// How long a node has to say how it stands.
const DESCRIBE_LIMIT: Duration = Duration::from_secs(3);

/// Asks nodes, with the cluster's secret.
#[derive(Clone, Debug)]
pub(super) struct Nodes {
    pub(super) asker: Asker,
    /// Who asks, for the nodes' logs.
    pub(super) by: String,
    pub(super) tracker: TaskTracker,
}

/// The nodes that are to be seen: the holder first, then the known ones, then the given addresses.
pub(super) fn named(record: Option<&Record>, given: &[Endpoint]) -> Vec<NodeView> {
    let holder = record.and_then(tenure).map(|tenure| (tenure.holder.node, &tenure.holder.addresses));
    let known = record.into_iter().flat_map(|record| &record.nodes);
    let known = known.map(|known| (known.peer.node, &known.peer.addresses));
    let mut nodes: Vec<NodeView> = Vec::new();
    for (node, addresses) in holder.into_iter().chain(known) {
        if node != NodeId::NIL && !nodes.iter().any(|known| known.node == Some(node)) {
            let url = addresses.replication.clone();
            nodes.push(NodeView { node: Some(node), url, in_record: true, answer: None, problem: None });
        }
    }
    for url in given {
        let url = url.to_string();
        let same = |known: &NodeView| Endpoint::parse(&known.url).is_ok_and(|known| known.to_string() == url);
        if !nodes.iter().any(same) {
            nodes.push(NodeView { node: None, url, in_record: false, answer: None, problem: None });
        }
    }
    nodes
}

impl Nodes {
    /// Asks all of them at once how they stand.
    pub(super) async fn describe(&self, nodes: Vec<NodeView>) -> Vec<NodeView> {
        let mut asking = JoinSet::new();
        for (at, node) in nodes.into_iter().enumerate() {
            let nodes = self.clone();
            asking.spawn(async move { (at, nodes.described(node).await) });
        }
        let mut described = asking.join_all().await;
        described.sort_by_key(|(at, _)| *at);
        let mut nodes: Vec<NodeView> = Vec::new();
        for (_, node) in described {
            // An address that was given may be that of a node which the record names, or was until
            // it moved.
            match nodes.iter_mut().find(|known| known.node.is_some() && known.node == node.node) {
                Some(known) if known.answer.is_none() => *known = NodeView { in_record: true, ..node },
                Some(_) => {}
                None => nodes.push(node),
            }
        }
        nodes
    }

    async fn described(&self, mut node: NodeView) -> NodeView {
        let to = match Endpoint::parse(&node.url) {
            Ok(to) => to,
            Err(error) => {
                node.problem = Some(error.to_string());
                return node;
            }
        };
        match self.give((&to, node.node), OperatorCommand::Describe, DESCRIBE_LIMIT).await {
            Ok((found, CommandAnswer::Described(said))) => {
                node.node = Some(found);
                node.answer = Some(NodeAnswer::from(*said));
            }
            Ok((_, CommandAnswer::Refused { why })) => node.problem = Some(why),
            Ok((_, CommandAnswer::Done { .. })) => node.problem = Some("it says something else".into()),
            Err(NoAnswer { problem, .. }) => node.problem = Some(problem.to_string()),
        }
        node
    }

    /// Which node is at this URL.
    pub(super) async fn at(&self, url: &str) -> Result<NodeId, OperatorError> {
        let to = Endpoint::parse(url).map_err(|error| OperatorError::Invalid(error.to_string()))?;
        match self.give((&to, None), OperatorCommand::Describe, DESCRIBE_LIMIT).await {
            Ok((found, _)) => Ok(found),
            Err(NoAnswer { problem, .. }) => Err(OperatorError::Unreachable { url: to.to_string(), problem }),
        }
    }

    async fn give(
        &self,
        to: (&Endpoint, Option<NodeId>),
        command: OperatorCommand,
        limit: Duration,
    ) -> Result<(NodeId, CommandAnswer), NoAnswer> {
        command::give(&self.asker, to, (&self.by, command), limit, &self.tracker).await
    }

    /// Has a node carry a command out. Returns which node has the lease then.
    pub(super) async fn command(
        &self,
        to: (&Endpoint, NodeId),
        command: OperatorCommand,
        limit: Duration,
    ) -> Result<NodeId, OperatorError> {
        let (to, node) = to;
        match self.give((to, Some(node)), command, limit).await {
            Ok((_, CommandAnswer::Done { holder })) => Ok(holder),
            Ok((node, CommandAnswer::Refused { why })) => Err(OperatorError::Refused { node, why }),
            Ok((node, CommandAnswer::Described(_))) => {
                Err(OperatorError::Refused { node, why: "it says something else".into() })
            }
            Err(NoAnswer { sent: true, problem }) => {
                Err(OperatorError::NotAnswered { url: to.to_string(), problem })
            }
            Err(NoAnswer { sent: false, problem }) => {
                Err(OperatorError::Unreachable { url: to.to_string(), problem })
            }
        }
    }
}
