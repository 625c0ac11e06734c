//! The layer between real servers on loopback.

mod breaks;
mod callers;
mod clients;
mod detours;
mod failover;
mod followers;
mod forwards;
mod handoff;
mod jams;
mod leaving;
mod lost;
mod past;
mod reads;
mod routes;
mod sockets;
mod streams;
#[cfg(feature = "tls")]
mod tls;
mod world;
