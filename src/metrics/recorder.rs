//! The recorder that the application has installed, if there is one.

use crate::metrics::{COUNTERS, GAUGES, GaugeUnit, NodeFigures};

/// Adds to a counter of a database.
pub(crate) fn add(database: &str, name: &'static str, labels: &[(&'static str, &'static str)], by: u64) {
    metrics::counter!(name, &with(database, labels.iter().copied())).increment(by);
}

/// Says what the numbers mean.
pub(crate) fn describe() {
    for counter in COUNTERS {
        metrics::describe_counter!(counter.name, metrics::Unit::Count, counter.help);
    }
    for gauge in GAUGES {
        let unit = match gauge.unit {
            GaugeUnit::Number => metrics::Unit::Count,
            GaugeUnit::Bytes => metrics::Unit::Bytes,
            GaugeUnit::Seconds => metrics::Unit::Seconds,
        };
        metrics::describe_gauge!(gauge.name, unit, gauge.help);
    }
}

/// Sets all gauges. What is not known is no number: a recorder would keep the old one.
pub(crate) fn record(figures: &NodeFigures) {
    for gauge in GAUGES {
        let labels = with(&figures.status.database, gauge.label.into_iter());
        metrics::gauge!(gauge.name, &labels).set((gauge.value)(figures).unwrap_or(f64::NAN));
    }
}

/// Says of a database that it is closed. The recorder would keep the last values for ever.
pub(crate) fn record_closed(database: &str) {
    for gauge in GAUGES {
        let labels = with(database, gauge.label.into_iter());
        let is_health = ["replite_live", "replite_can_read", "replite_can_write"].contains(&gauge.name);
        metrics::gauge!(gauge.name, &labels).set(if is_health { 0.0 } else { f64::NAN });
    }
}

fn with(
    database: &str,
    labels: impl Iterator<Item = (&'static str, &'static str)>,
) -> Vec<(&'static str, String)> {
    let labels = labels.map(|(label, value)| (label, value.to_string()));
    std::iter::once(("database", database.to_string())).chain(labels).collect()
}
