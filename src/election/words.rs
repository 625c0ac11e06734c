//! What was decided, in words for operators.

use std::fmt;

use crate::election::{Choice, Note, Shown};

impl fmt::Display for Choice {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Choice::Shows(shown) => shown.fmt(f),
            Choice::Takes(epoch) => write!(f, "asks for the lease, with epoch {epoch}"),
            Choice::Took(epoch) => write!(f, "has the lease, with epoch {epoch}"),
            Choice::Fences(epoch) => write!(f, "acknowledges nothing more in epoch {epoch}"),
            Choice::Releases(epoch) => write!(f, "gives the lease of epoch {epoch} back"),
            Choice::SeeksTarget => f.write_str("asks the replicas, to hand the lease to one of them"),
            Choice::Offers(node) => {
                write!(f, "commits nothing more for a moment, and offers the lease to node {node}")
            }
            Choice::HandsOver(node, epoch) => {
                write!(f, "makes node {node} the holder of the lease, with epoch {epoch}")
            }
            Choice::Handed(node) => write!(f, "has handed the lease to node {node}"),
            Choice::KeepsOn(why) => write!(f, "hands the lease to no node: {why}"),
            Choice::Accepts => f.write_str("accepts the lease that the primary offers"),
            Choice::Declines(why) => write!(f, "does not accept the lease that the primary offers: {why}"),
            Choice::Follows(Some(node)) => write!(f, "follows node {node}"),
            Choice::Follows(None) => f.write_str("follows no node"),
            Choice::Notes(note) => note.fmt(f),
        }
    }
}

impl fmt::Display for Shown {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Shown::Replica => f.write_str("is a replica"),
            Shown::Electing => f.write_str("asks the others how far they are"),
            Shown::Waiting(reason) => write!(f, "waits: {reason}"),
            Shown::Promoting => f.write_str("is about to lead"),
            Shown::Primary => f.write_str("leads"),
            Shown::Fencing => f.write_str("stops leading"),
        }
    }
}

impl fmt::Display for Note {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Note::StoreWentBack(what) => write!(f, "the store went back in time: {what}"),
            Note::SameNode { incarnation } => {
                write!(f, "another process, {incarnation}, has this node's id and the lease")
            }
            Note::SeveralWithContent(nodes) => {
                write!(f, "{} nodes of a first start have a database with content", nodes.len())
            }
            Note::NoFirstStart(node) => {
                write!(f, "node {node} has a state of the cluster: this is no first start")
            }
            Note::NotTaken { holder } => write!(f, "node {holder} holds the lease, which is not taken"),
        }
    }
}
