//! A node's files: what is done to them by kills, full disks, other processes and operators.

mod astray;
mod crash;
mod descriptors;
mod files;
mod foreign;
#[path = "../support/fork.rs"]
mod fork;
mod full;
#[path = "../support/http.rs"]
mod http_support;
mod kills;
mod lease;
mod locks;
mod marks;
mod private;
mod quota;
mod recovery;
#[path = "../support/lib.rs"]
mod support;
mod truth;
mod wal;
