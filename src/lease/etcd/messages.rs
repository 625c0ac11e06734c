//! The JSON of etcd's gateway: numbers are strings, bytes are Base64, and what is zero is left out.

use base64ct::{Base64, Encoding};
use serde::de::{DeserializeOwned, Error as _};
use serde::{Deserialize, Deserializer};
use serde_json::{Value as Json, json};

use crate::error::shown;

/// Bytes of an error's text that are shown.
const SHOWN_MAX_BYTES: usize = 300;

/// What each answer begins with.
#[derive(Deserialize, Clone, Copy)]
pub(super) struct EtcdHeader {
    #[serde(deserialize_with = "number")]
    pub(super) cluster_id: u64,
    #[serde(deserialize_with = "number")]
    pub(super) revision: u64,
}

#[derive(Deserialize)]
pub(super) struct KeyValue {
    #[serde(deserialize_with = "number")]
    pub(super) mod_revision: u64,
    #[serde(default, deserialize_with = "bytes")]
    pub(super) value: Vec<u8>,
}

#[derive(Deserialize)]
pub(super) struct RangeAnswer {
    pub(super) header: EtcdHeader,
    #[serde(default)]
    pub(super) kvs: Vec<KeyValue>,
}

#[derive(Deserialize)]
pub(super) struct TxnAnswer {
    pub(super) header: EtcdHeader,
    #[serde(default)]
    pub(super) succeeded: bool,
    #[serde(default)]
    responses: Vec<TxnPart>,
}

/// What one operation of a transaction gave.
#[derive(Deserialize)]
struct TxnPart {
    response_put: Option<Put>,
    response_range: Option<FoundPart>,
}

#[derive(Deserialize)]
struct Put {
    header: Revision,
}

#[derive(Deserialize)]
struct Revision {
    #[serde(deserialize_with = "number")]
    revision: u64,
}

#[derive(Deserialize)]
struct FoundPart {
    #[serde(default)]
    kvs: Vec<KeyValue>,
}

impl TxnAnswer {
    /// The revision of the record that was written.
    pub(super) fn put_revision(&self) -> Option<u64> {
        Some(self.responses.first()?.response_put.as_ref()?.header.revision)
    }

    /// What is there instead.
    pub(super) fn found(&self) -> Option<&KeyValue> {
        self.responses.first()?.response_range.as_ref()?.kvs.first()
    }
}

#[derive(Deserialize)]
pub(super) struct Authenticated {
    pub(super) token: String,
}

/// Why a request was not answered.
pub(super) struct GatewayRefusal {
    /// The number that gRPC has for it, where it comes from etcd.
    pub(super) code: Option<u64>,
    pub(super) text: String,
}

#[derive(Deserialize)]
struct RefusalJson {
    error: Option<String>,
    message: Option<String>,
    code: Option<u64>,
}

impl GatewayRefusal {
    pub(super) fn read(status: http::StatusCode, body: &[u8]) -> GatewayRefusal {
        let json = serde_json::from_slice::<RefusalJson>(body).ok();
        let code = json.as_ref().and_then(|json| json.code);
        let text = json.and_then(|json| json.error.or(json.message));
        let plain = || {
            let said = String::from_utf8_lossy(&body[..body.len().min(SHOWN_MAX_BYTES)]);
            // Not the pages of servers on the way.
            let said = Some(said.trim()).filter(|said| !said.is_empty() && !said.starts_with('<'));
            said.map_or_else(
                || format!("HTTP status {status}"),
                |said| format!("HTTP status {status}: {said}"),
            )
        };
        let text = shown(&text.unwrap_or_else(plain), SHOWN_MAX_BYTES);
        GatewayRefusal { code, text }
    }
}

/// Reads an answer.
pub(super) fn read<T: DeserializeOwned>(body: &[u8]) -> Result<T, String> {
    serde_json::from_slice(body).map_err(|error| {
        // The text of such an error may have parts of the answer in it.
        format!("the answer is none of etcd's: {}", shown(&error.to_string(), SHOWN_MAX_BYTES))
    })
}

/// What a change is announced with.
#[derive(Deserialize)]
pub(super) struct Watched {
    pub(super) result: WatchResult,
}

#[derive(Deserialize)]
pub(super) struct WatchResult {
    #[serde(default)]
    pub(super) created: bool,
    #[serde(default)]
    pub(super) canceled: bool,
    /// What was to be seen is not kept any more.
    #[serde(default, deserialize_with = "number")]
    pub(super) compact_revision: u64,
}

pub(super) fn range(key: &str) -> Json {
    json!({ "key": base64(key.as_bytes()) })
}

/// Writes a value over the one that is there, or where there is none. Gives what is there where it
/// does not.
pub(super) fn txn(key: &str, over: Option<&KeyValue>, value: &[u8]) -> Json {
    let key = base64(key.as_bytes());
    let compare = match over {
        Some(over) => json!([
            { "key": key, "target": "MOD", "result": "EQUAL", "mod_revision": over.mod_revision.to_string() },
            { "key": key, "target": "VALUE", "result": "EQUAL", "value": base64(&over.value) },
        ]),
        None => json!([{ "key": key, "target": "CREATE", "result": "EQUAL", "create_revision": "0" }]),
    };
    json!({
        "compare": compare,
        "success": [{ "request_put": { "key": key, "value": base64(value) } }],
        "failure": [{ "request_range": { "key": key } }],
    })
}

pub(super) fn authenticate(name: &str, password: &str) -> Json {
    json!({ "name": name, "password": password })
}

/// Watches a key from the first change after this revision on; from now on where that is 0.
pub(super) fn watch(key: &str, after: u64) -> Json {
    let from = if after == 0 { 0 } else { after.saturating_add(1) };
    json!({ "create_request": { "key": base64(key.as_bytes()), "start_revision": from.to_string() } })
}

fn base64(bytes: &[u8]) -> String {
    Base64::encode_string(bytes)
}

fn number<'de, D: Deserializer<'de>>(from: D) -> Result<u64, D::Error> {
    #[derive(Deserialize)]
    #[serde(untagged)]
    enum Number {
        Text(String),
        Number(u64),
    }
    match Number::deserialize(from)? {
        Number::Number(number) => Ok(number),
        Number::Text(text) => text.parse().map_err(|_| D::Error::custom("a number is none")),
    }
}

fn bytes<'de, D: Deserializer<'de>>(from: D) -> Result<Vec<u8>, D::Error> {
    let text = String::deserialize(from)?;
    Base64::decode_vec(&text).map_err(|_| D::Error::custom("a value is no Base64"))
}
