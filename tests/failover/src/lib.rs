//! A cluster of real processes, faults, and a checker of the history that its clients saw.

pub mod check;
pub mod client;
pub mod clock;
pub mod faults;
pub mod foreign;
pub mod history;
pub mod member;
pub mod node;
pub mod request;
pub mod round;
pub mod series;
pub mod store;
pub mod wires;
pub mod world;
