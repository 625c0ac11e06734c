//! One database file: capture and apply, checkpoints, snapshots. This module owns the position.
//!
//! [`PrimaryEngine`] is a primary's open file. [`ReplicaEngine`] is a replica's, there or yet to
//! come. The rooms, lowest first; each imports only from rooms above it in this list:
//!
//! | room | what is there |
//! |---|---|
//! | `options`, `figures` | what a database needs to know, and what the status shows of it |
//! | `source` | what may be read of a database while it goes on |
//! | `file` | an open database: the tip, its pages, anchors, the WAL file, the watch over both |
//! | `history` | what both roles write: records to the log, frames to the WAL, epochs |
//! | `checkpoint` | copies frames into the database file, begins the WAL anew, bounds its length |
//! | `incoming` | a state that comes from another node, page by page, beside the present one |
//! | `lost` | what a heal replaced, kept |
//! | `recover` | which state the files are; gives [`Opened`] |
//! | `capture` | a primary's threads |
//! | `apply` | a replica's threads |
//! | `turns` | from one role to the other |
//! | `check` | hashes the whole database, and repairs pages |

mod apply;
mod capture;
mod check;
mod checkpoint;
mod figures;
mod file;
#[cfg(any(test, all(fuzzing, feature = "testing")))]
mod fuzz;
mod history;
mod incoming;
mod lost;
mod options;
mod recover;
mod source;
mod turns;

pub(crate) use apply::handle::ReplicaEngine;
pub(crate) use apply::inbox::ReplicaStanding;
pub(crate) use apply::stream_error::StreamError;
pub(crate) use capture::commit_gate::{CommitGate, Waiting};
pub(crate) use capture::counting::Uncounted;
pub(crate) use capture::handle::PrimaryEngine;
pub(crate) use capture::startup::Opening;
pub(crate) use check::repair::RightPage;
pub(crate) use figures::WalFigures;
pub(crate) use file::epochs::newest_epoch;
#[cfg(test)]
pub(crate) use fuzz::fuzz_seeds;
#[cfg(any(test, all(fuzzing, feature = "testing")))]
pub(crate) use fuzz::{fuzz_btree, fuzz_lost, fuzz_state_files};
pub(crate) use history::epoch::draw_epoch;
#[cfg(test)]
pub(crate) use incoming::heal::Heal;
#[cfg(test)]
pub(crate) use incoming::overlay::{Overlay, PageStore};
pub use lost::{Lost, LostBranch, LostKind, LostRow, LostRows};
pub use options::Durability;
pub(crate) use options::EngineOptions;
pub(crate) use recover::key_of_files;
pub(crate) use recover::opened::Opened;
pub(crate) use source::{PIECE_BYTES, Piece, answer};
pub(crate) use turns::NotTurned;

#[cfg(test)]
mod states;
#[cfg(test)]
mod tests;
