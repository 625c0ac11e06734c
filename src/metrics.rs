//! What a node says in numbers: counters of what happens, gauges of how it stands. `docs/guide.md`
//! names them all.
//!
//! With the feature `metrics` the recorder that the application has installed gets them. With
//! `prometheus` the node keeps its counters itself, and [`Probes`](crate::Probes) answers with all
//! of them. Neither installs a recorder, nor needs the other.

#![cfg_attr(
    not(any(feature = "metrics", feature = "prometheus")),
    allow(dead_code, unused_imports, reason = "one of the two features looks at them")
)]

mod counters;
mod gauges;
#[cfg(feature = "metrics")]
mod recorder;
#[cfg(test)]
mod tests;

pub(crate) use counters::COUNTERS;
#[cfg(feature = "prometheus")]
pub(crate) use counters::CounterStore;
#[cfg(feature = "prometheus")]
pub(crate) use gauges::Gauge;
#[cfg(any(feature = "metrics", test))]
pub(crate) use gauges::GaugeUnit;
pub(crate) use gauges::{FileSizes, GAUGES, NodeFigures, NodeLoad};
#[cfg(feature = "metrics")]
pub(crate) use recorder::{add, describe, record, record_closed};
