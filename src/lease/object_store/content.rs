//! What is in the object, and the version that it has.
//!
//! ```text
//! {"replite_lease":1,"id":"<32 hex digits>","after":"<the id before it>","record":{ .. }}
//! ```
//!
//! The id is random. A store may name an object by a hash of its content: with the id it never
//! names two alike. `after` is null in the first. A record that is no JSON is `bytes`, as base64,
//! in place of `record`. An editor may lay the object out anew.

use base64ct::{Base64, Encoding};
use object_store::UpdateVersion;
use serde::{Deserialize, Serialize};
use serde_json::value::RawValue;

use crate::error::shown;
use crate::hex::{hex, unhex};
use crate::lease::record::RECORD_MAX_BYTES;
use crate::lease::store::{Stored, Version};

/// The most bytes of an object: the longest record as base64, or laid out anew.
pub(super) const OBJECT_MAX_BYTES: u64 = 4 * RECORD_MAX_BYTES as u64;
/// The format that is written, and the only one that is read.
const FORMAT: u64 = 1;
/// The most bytes of what is wrong with one.
const SHOWN_MAX_BYTES: usize = 200;

#[derive(Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
struct ObjectJson<'a> {
    replite_lease: u64,
    id: String,
    after: Option<String>,
    #[serde(borrow, default, skip_serializing_if = "Option::is_none")]
    record: Option<&'a RawValue>,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    bytes: Option<String>,
}

/// The part of it that each format has.
#[derive(Deserialize)]
struct ObjectFormat {
    replite_lease: u64,
}

/// What is written at once.
#[derive(Clone, PartialEq, Eq, Debug)]
pub(super) struct LeaseObject {
    pub(super) id: u128,
    /// The id of what it takes the place of.
    pub(super) after: Option<u128>,
    pub(super) record: Vec<u8>,
}

impl LeaseObject {
    /// The bytes of the object. Those of a record fail only where there is no memory.
    pub(super) fn encode(&self) -> Result<Vec<u8>, serde_json::Error> {
        let json: Option<&RawValue> = serde_json::from_slice(&self.record).ok();
        // White space around it would be lost, and null would be as nothing.
        let json = json.filter(|json| json.get().len() == self.record.len() && json.get() != "null");
        let envelope = ObjectJson {
            replite_lease: FORMAT,
            id: digits(self.id),
            after: self.after.map(digits),
            record: json,
            bytes: json.is_none().then(|| Base64::encode_string(&self.record)),
        };
        serde_json::to_vec(&envelope)
    }

    /// Reads an object. What is wrong with it is said in words.
    pub(super) fn decode(bytes: &[u8]) -> Result<LeaseObject, String> {
        let not_ours = |error: serde_json::Error| {
            let why = shown(&error.to_string(), SHOWN_MAX_BYTES);
            format!("replite did not write what is in it: {why}")
        };
        let format = serde_json::from_slice::<ObjectFormat>(bytes).map_err(not_ours)?.replite_lease;
        if format != FORMAT {
            return Err(format!("it has format {format}, of another version of replite"));
        }
        let envelope: ObjectJson<'_> = serde_json::from_slice(bytes).map_err(not_ours)?;
        let id = |text: &str| unhex(text).map(u128::from_be_bytes);
        let record = match (envelope.record, &envelope.bytes) {
            (Some(json), None) => Some(json.get().as_bytes().to_vec()),
            (None, Some(text)) => Base64::decode_vec(text).ok(),
            _ => None,
        };
        let after = match &envelope.after {
            None => Some(None),
            Some(text) => id(text).map(Some),
        };
        match (id(&envelope.id), after, record) {
            (Some(id), Some(after), Some(record)) => Ok(LeaseObject { id, after, record }),
            _ => Err("replite did not write what is in it".into()),
        }
    }
}

fn digits(id: u128) -> String {
    hex(&id.to_be_bytes())
}

/// One state of the object: what was written, and what the store calls it.
#[derive(Clone, PartialEq, Eq, Debug)]
pub(super) struct Named {
    pub(super) id: u128,
    pub(super) name: UpdateVersion,
}

impl Named {
    /// Its text: the id, and a JSON list of the store's ETag and version.
    pub(super) fn version(&self) -> Version {
        let name = serde_json::json!([self.name.e_tag, self.name.version]);
        Version::new(format!("{} {name}", digits(self.id)))
    }

    /// None for a version that no object has.
    pub(super) fn of(version: &Version) -> Option<Named> {
        let (id, name) = version.as_str().split_once(' ')?;
        let id = unhex(id).map(u128::from_be_bytes)?;
        let (e_tag, version) = serde_json::from_str(name).ok()?;
        Some(Named { id, name: UpdateVersion { e_tag, version } })
    }
}

/// An object that was read.
#[derive(Clone, PartialEq, Eq, Debug)]
pub(super) struct FoundObject {
    pub(super) content: LeaseObject,
    pub(super) named: Named,
}

impl From<FoundObject> for Stored {
    fn from(found: FoundObject) -> Stored {
        Stored::new(found.content.record, found.named.version())
    }
}
