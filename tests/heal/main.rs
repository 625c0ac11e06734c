//! What is wrong is found and made right: verification, heals, repairs, and what is kept of it.

mod divergence;
mod faults;
#[path = "../support/fork.rs"]
mod fork;
mod forks;
mod keys;
mod repair;
#[path = "../support/lib.rs"]
mod support;
mod unknown;
mod verify;
