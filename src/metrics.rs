//! Counters of what happens on a node, through the `metrics` crate. The recorder that the
//! application has installed gets them. `docs/guide.md` names them all; the table of conditions
//! says when each is added to.

/// Adds to a counter of a database.
pub(crate) fn add(database: &str, name: &'static str, labels: &[(&'static str, &'static str)], by: u64) {
    let database = ("database", database.to_string());
    let labels = labels.iter().map(|(label, value)| (*label, (*value).to_string()));
    let labels: Vec<_> = std::iter::once(database).chain(labels).collect();
    metrics::counter!(name, &labels).increment(by);
}
