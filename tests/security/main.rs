//! An attacker on the path between nodes, who knows everything but the secret, and strangers who
//! are not on it.
//!
//! What holds whatever they do: every node has a committed prefix of the primary's rows, SQLite
//! finds its file whole, nothing of the attacker's is in any file, no row passed in the clear, and
//! the nodes say that the line is cut or the peer not proved.

mod changing;
mod crowds;
mod election;
mod ending;
#[path = "../support/fork.rs"]
mod fork;
mod freezing;
mod keys;
mod recovery;
mod redirecting;
mod relay;
mod replaying;
mod rewriting;
mod strangers;
#[path = "../support/lib.rs"]
mod support;
mod truncating;
mod world;
