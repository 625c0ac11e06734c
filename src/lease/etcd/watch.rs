//! The hint that the key has changed.

use std::time::Duration;

use bytes::Bytes;
use http_body::Body;
use http_body_util::BodyExt;

use super::gateway::Gateway;
use super::life::Lives;
use super::messages::{self, Watched};
use super::settings::EtcdSettings;

/// The wait before members are asked again, none of which watches.
const PAUSE: Duration = Duration::from_secs(1);
/// The longest line that a watch begins with, in bytes.
const LINE_MAX_BYTES: usize = 16 * 1024;

/// Returns when the key was changed after the last record that was seen.
pub(super) async fn changed(settings: &EtcdSettings, gateway: &Gateway, lives: &Lives) {
    loop {
        for member in gateway.order(settings) {
            if changed_at(settings, gateway, lives, member).await.is_some() {
                return;
            }
        }
        tokio::time::sleep(PAUSE).await;
    }
}

/// None where the member does not watch, or not any more.
async fn changed_at(settings: &EtcdSettings, gateway: &Gateway, lives: &Lives, member: usize) -> Option<()> {
    let request = messages::watch(&settings.key, lives.now().revision);
    let body = gateway.open(settings, member, "watch", &request).await.ok()?;
    lines(body).await
}

/// A line says that the watch has begun. The next one is a change, whatever it says.
async fn lines<B: Body<Data = Bytes> + Unpin>(mut body: B) -> Option<()> {
    let mut line = Vec::new();
    let end = loop {
        line.extend_from_slice(&data(&mut body).await?);
        if let Some(end) = line.iter().position(|byte| *byte == b'\n') {
            break end;
        }
        if line.len() > LINE_MAX_BYTES {
            return None;
        }
    };
    let Watched { result } = messages::read(&line[..end]).ok()?;
    if result.compact_revision > 0 {
        // There were many changes. The caller reads, and watches from there on.
        tokio::time::sleep(PAUSE).await;
        return Some(());
    }
    if !result.created || result.canceled {
        return None;
    }
    if line.len() > end + 1 {
        return Some(());
    }
    data(&mut body).await.map(drop)
}

/// The next bytes; none at the end, whatever it comes of.
async fn data<B: Body<Data = Bytes> + Unpin>(body: &mut B) -> Option<Bytes> {
    loop {
        let frame = body.frame().await?.ok()?;
        if let Ok(bytes) = frame.into_data()
            && !bytes.is_empty()
        {
            return Some(bytes);
        }
    }
}
