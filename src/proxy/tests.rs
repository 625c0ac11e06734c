//! The layer between real servers on loopback.

mod breaks;
mod forwards;
mod reads;
mod routes;
mod world;
