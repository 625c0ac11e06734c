//! The layer between real servers on loopback.

mod breaks;
mod callers;
mod detours;
mod failover;
mod forwards;
mod handoff;
mod leaving;
mod lost;
mod reads;
mod routes;
mod sockets;
mod streams;
mod world;
