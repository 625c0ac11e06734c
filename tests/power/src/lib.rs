//! What the tests of power cuts, flipped bits and full disks share.

pub mod cuts;
pub mod disk;
pub mod model;
pub mod stage;
pub mod trace;
