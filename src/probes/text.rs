//! Counters and gauges as the text that Prometheus reads.

use std::fmt;
use std::sync::Arc;
use std::time::{Duration, Instant};

use bytes::Bytes;
use prometheus_client::collector::Collector;
use prometheus_client::encoding::prometheus_text;
use prometheus_client::encoding::{DescriptorEncoder, NoLabelSet};
use prometheus_client::metrics::MetricType;
use prometheus_client::registry::Registry;
use tokio::sync::Mutex;

use crate::error::{Error, Result};
use crate::metrics::{COUNTERS, GAUGES, Gauge, NodeFigures};
use crate::probes::Probed;
use crate::threads::blocking;

pub(super) use prometheus_client::encoding::prometheus_text::CONTENT_TYPE;

/// For how long a text counts: strangers who ask again and again cost little.
const TEXT_AGE: Duration = Duration::from_secs(1);

/// What was told last, and when.
#[derive(Clone, Debug, Default)]
pub(super) struct Scrapes(Arc<Mutex<Option<(Instant, Bytes)>>>);

impl Scrapes {
    /// The text of now, or of a second ago. One caller at a time makes one, and the others wait for
    /// that.
    ///
    /// # Cancel safety
    /// Dropped, what was begun is made to its end, and is there for the next one.
    pub(super) async fn text(&self, databases: Vec<Arc<dyn Probed>>) -> Result<Bytes> {
        let mut last = self.0.clone().lock_owned().await;
        if let Some((at, text)) = &*last
            && at.elapsed() < TEXT_AGE
        {
            return Ok(text.clone());
        }
        blocking(move || {
            let figures = databases.iter().filter_map(|database| database.figures()).collect();
            let text = told(figures);
            let text = text.map_err(|_| Error::Internal("the text of the metrics can't be made".into()))?;
            let text = Bytes::from(text);
            // Also when who asked has left: the next one waits for it, and begins none beside it.
            *last = Some((Instant::now(), text.clone()));
            Ok(text)
        })
        .await
    }
}

/// The figures of all databases as one text.
fn told(figures: Vec<NodeFigures>) -> std::result::Result<String, fmt::Error> {
    let (mut registry, mut text) = (Registry::default(), String::new());
    registry.register_collector(Box::new(Figures(figures)));
    prometheus_text::encode(&mut text, &registry)?;
    Ok(text)
}

#[derive(Debug)]
struct Figures(Vec<NodeFigures>);

impl Collector for Figures {
    fn encode(&self, mut encoder: DescriptorEncoder<'_>) -> std::result::Result<(), fmt::Error> {
        for counter in COUNTERS {
            // The encoder adds the end.
            let name = counter.name.trim_end_matches("_total");
            let mut metric = encoder.encode_descriptor(name, counter.help, None, MetricType::Counter)?;
            for figures in &self.0 {
                let database = ("database", &*figures.status.database);
                let count = |value| figures.counters.get(&(counter.name, value)).copied().unwrap_or(0);
                match counter.label {
                    None => metric
                        .encode_family(&[database])?
                        .encode_counter::<NoLabelSet, _, u64>(&count(""), None)?,
                    Some((label, values)) => {
                        for value in values {
                            metric
                                .encode_family(&[database, (label, value)])?
                                .encode_counter::<NoLabelSet, _, u64>(&count(value), None)?;
                        }
                    }
                }
            }
        }
        for gauges in GAUGES.chunk_by(|one, next| one.name == next.name) {
            let Some(Gauge { name, help, .. }) = gauges.first() else { continue };
            let mut metric = encoder.encode_descriptor(name, help, None, MetricType::Gauge)?;
            for (figures, gauge) in self.0.iter().flat_map(|f| gauges.iter().map(move |gauge| (f, gauge))) {
                let Some(value) = (gauge.value)(figures) else { continue };
                let database = Some(("database", &*figures.status.database));
                let labels: Vec<(&str, &str)> = database.into_iter().chain(gauge.label).collect();
                metric.encode_family(&labels)?.encode_gauge(&value)?;
            }
        }
        Ok(())
    }
}
