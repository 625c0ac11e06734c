//! The register as one object that is only ever put on conditions.

mod content;
mod http;
mod place;
mod probe;
mod trace;

use std::fmt;
use std::sync::Arc;
use std::time::Duration;

use object_store::path::Path;
use object_store::{GetOptions, PutMode, PutOptions, PutPayload};

use self::content::{FoundObject, LeaseObject, Named, OBJECT_MAX_BYTES};
use self::place::BucketPlace;
use self::probe::Probe;
use self::trace::{PutFailure, Trace, words};
use super::record::RECORD_MAX_BYTES;
use super::store::{ReadError, Store, StoreFuture, Stored, SwapError, Version};
use crate::error::{Error, Result};
use crate::random;

/// The object's name after the prefix.
const OBJECT: &str = "lease.json";

/// A lease whose record is an object in S3, or in what speaks it, in Google's or in Azure's store.
/// All nodes of a database name the same place, and no other database does.
///
/// The record is the object `lease.json` under the prefix. It is JSON that an operator can read. It
/// is put only over the state that was read, by `If-Match` and `If-None-Match`. Beside it is
/// `lease-probe.json`: by that a node finds out, before its first read or swap, whether the store
/// keeps to such conditions. One that ignores them is refused, and the error says which. This takes
/// two or three puts each time that a process starts. Nothing is ever deleted or listed: a node
/// needs the right to get and put these two objects, and on S3 `s3:ListBucket`, without which S3
/// does not say that an object is not there.
///
/// A lease of 15 s, as it is by default, takes 16 puts a minute by the holder and 32 gets a minute
/// by each other node. A bucket that keeps old versions keeps each record: give it a rule that
/// removes them. Google's store allows one put a second to an object, which a lease time of less
/// than 5 s goes beyond.
///
/// Tested with an S3 server of its own, and with Azure's emulator. Google's store is untested.
///
/// ```no_run
/// use replite::{Config, lease};
///
/// # fn main() -> replite::Result<()> {
/// // With AWS_ACCESS_KEY_ID, AWS_SECRET_ACCESS_KEY and AWS_REGION in the environment.
/// let config = Config::new("app.db").lease(lease::ObjectStore::new("s3://bucket/app")?);
/// # drop(config);
/// # Ok(())
/// # }
/// ```
#[derive(Clone)]
pub struct ObjectStore {
    shared: Arc<ObjectRegister>,
}

struct ObjectRegister {
    store: Arc<dyn object_store::ObjectStore>,
    object: Path,
    /// Where the object is, for people.
    place: String,
    /// Each request is sent once, and traced: an error may prove that a put was not done.
    once: bool,
    probe: Probe,
}

impl ObjectStore {
    /// The store at `s3://bucket/prefix`, `gs://bucket/prefix` or `az://container/prefix`. The
    /// prefix may be empty.
    ///
    /// Credentials and all else come from the environment, as the crate `object_store` reads it:
    /// variables that begin with `AWS_`, `GOOGLE_` or `AZURE_`, or what the machine is allowed to
    /// do. For another store that speaks S3 there is `AWS_ENDPOINT`, and for one without TLS also
    /// `AWS_ALLOW_HTTP=true`. `SSL_CERT_FILE` names a private authority on Linux. Nothing is sent
    /// yet.
    ///
    /// # Errors
    /// [`Error::Config`] when the URL is of no such form, when something is missing in the
    /// environment, or when the build is without the feature `tls` and the URL needs it.
    pub fn new(url: &str) -> Result<ObjectStore> {
        ObjectStore::with_options(url, [] as [(&str, &str); 0])
    }

    /// The same with options that go before the environment's, by the names that `object_store`
    /// has for them: `aws_access_key_id`, `aws_endpoint`, `azure_storage_account_name`,
    /// `google_service_account`.
    ///
    /// ```
    /// use replite::lease::ObjectStore;
    ///
    /// # fn main() -> replite::Result<()> {
    /// let store = ObjectStore::with_options(
    ///     "s3://bucket/app",
    ///     [
    ///         ("aws_endpoint", "https://minio.internal:9000"),
    ///         ("aws_access_key_id", "app"),
    ///         ("aws_secret_access_key", "of no one"),
    ///     ],
    /// )?;
    /// assert_eq!(store.place(), "s3://bucket/app/lease.json");
    /// # Ok(())
    /// # }
    /// ```
    ///
    /// # Errors
    /// Those of [`ObjectStore::new`], and [`Error::Config`] for an option that the store does not
    /// have.
    pub fn with_options<K, V>(url: &str, options: impl IntoIterator<Item = (K, V)>) -> Result<ObjectStore>
    where
        K: Into<String>,
        V: Into<String>,
    {
        let place = BucketPlace::parse(url)?;
        let options = options.into_iter().map(|(key, value)| (key.into(), value.into())).collect();
        let store = place.open(options)?;
        Ok(ObjectStore::at(store, &place.prefix, place.shown(), true))
    }

    /// A store that the application made, and the prefix in it. It may send a request again by
    /// itself: then most failures of a put leave open whether it was done.
    ///
    /// ```
    /// use std::sync::Arc;
    ///
    /// use object_store::memory::InMemory;
    /// use replite::lease::{ObjectStore, Store};
    ///
    /// # #[tokio::main(flavor = "current_thread")]
    /// # async fn main() -> Result<(), Box<dyn std::error::Error>> {
    /// let store = ObjectStore::with(Arc::new(InMemory::new()), "app")?;
    /// assert!(store.read().await?.is_none());
    /// let first = store.swap(None, b"{}").await?;
    /// assert!(store.swap(None, b"{}").await.is_err());
    /// store.swap(Some(&first), b"{}").await?;
    /// # Ok(())
    /// # }
    /// ```
    ///
    /// # Errors
    /// [`Error::Config`] when the prefix can't be one.
    pub fn with(store: Arc<dyn object_store::ObjectStore>, prefix: &str) -> Result<ObjectStore> {
        let bad = |error: object_store::path::Error| Error::Config(format!("object store: {error}"));
        let prefix = Path::parse(prefix).map_err(bad)?;
        let named = store.to_string();
        Ok(ObjectStore::at(store, &prefix, named, false))
    }

    fn at(
        store: Arc<dyn object_store::ObjectStore>,
        prefix: &Path,
        named: String,
        once: bool,
    ) -> ObjectStore {
        let object = prefix.clone().join(OBJECT);
        let place = format!("{named}/{object}");
        let probe = Probe::new(prefix.clone());
        ObjectStore { shared: Arc::new(ObjectRegister { store, object, place, once, probe }) }
    }

    /// Where the object is: `s3://bucket/prefix/lease.json`.
    pub fn place(&self) -> &str {
        &self.shared.place
    }
}

/// Without what it reaches the store with.
impl fmt::Debug for ObjectStore {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_tuple("ObjectStore").field(&self.shared.place).finish()
    }
}

impl Store for ObjectStore {
    fn read(&self) -> StoreFuture<'_, Result<Option<Stored>, ReadError>> {
        Box::pin(async move {
            let shared = &*self.shared;
            shared.probe.before_read(shared).await.map_err(|why| ReadError::new(shared.says(&why)))?;
            let found = shared.get().await.map_err(|why| ReadError::new(shared.says(&why)))?;
            Ok(found.map(Stored::from))
        })
    }

    fn swap<'a>(
        &'a self,
        expected: Option<&'a Version>,
        record: &'a [u8],
    ) -> StoreFuture<'a, Result<Version, SwapError>> {
        Box::pin(self.shared.swap(expected, record))
    }

    /// Fifteen seconds.
    fn lease_time(&self) -> Duration {
        Duration::from_secs(15)
    }
}

impl ObjectRegister {
    fn says(&self, why: &str) -> String {
        format!("{}: {why}", self.place)
    }

    /// The object as it is; none where it is not there. What went wrong is said in words.
    async fn get(&self) -> Result<Option<FoundObject>, String> {
        let trace = Trace::default();
        let mut options = GetOptions::default();
        options.extensions.insert(trace.clone());
        let got = match self.store.get_opts(&self.object, options).await {
            Ok(got) => got,
            Err(error) => {
                let seen = trace.seen();
                let missing = matches!(error, object_store::Error::NotFound { .. }) && !seen.no_bucket();
                return if missing { Ok(None) } else { Err(words(&seen, &error)) };
            }
        };
        if got.meta.size > OBJECT_MAX_BYTES {
            return Err("it is longer than any record".into());
        }
        let name =
            object_store::UpdateVersion { e_tag: got.meta.e_tag.clone(), version: got.meta.version.clone() };
        let bytes = got.bytes().await.map_err(|error| words(&trace.seen(), &error))?;
        if bytes.len() as u64 > OBJECT_MAX_BYTES {
            return Err("it is longer than any record".into());
        }
        let content = LeaseObject::decode(&bytes)?;
        let named = Named { id: content.id, name };
        Ok(Some(FoundObject { content, named }))
    }

    async fn swap(&self, expected: Option<&Version>, record: &[u8]) -> Result<Version, SwapError> {
        let unavailable = |why: &str| SwapError::Unavailable(self.says(why));
        if record.len() > RECORD_MAX_BYTES {
            return Err(unavailable("the record is too long"));
        }
        let expected = match expected.map(Named::of) {
            None => None,
            Some(Some(named)) => Some(named),
            // No record of this register has had this version.
            Some(None) => return Err(SwapError::Conflict),
        };
        self.probe.before_swap(self).await.map_err(|why| unavailable(&why))?;
        let id = random::array().map(u128::from_be_bytes).map_err(|error| unavailable(&error.to_string()))?;
        let content =
            LeaseObject { id, after: expected.as_ref().map(|named| named.id), record: record.to_vec() };
        let bytes = content.encode().map_err(|error| unavailable(&error.to_string()))?;
        let mode = match &expected {
            None => PutMode::Create,
            Some(named) => PutMode::Update(named.name.clone()),
        };
        match self.put(&self.object, mode, bytes).await {
            Ok(name) => Ok(Named { id, name }.version()),
            Err(PutFailure::Refused(why)) => Err(unavailable(&why)),
            Err(PutFailure::Doubtful(why)) => Err(SwapError::Unknown(self.says(&why))),
            Err(PutFailure::Contradicted(why)) => self.settle(id, expected.as_ref(), &why).await,
        }
    }

    async fn put(
        &self,
        object: &Path,
        mode: PutMode,
        bytes: Vec<u8>,
    ) -> Result<object_store::UpdateVersion, PutFailure> {
        let trace = Trace::default();
        let mut options = PutOptions::from(mode);
        options.extensions.insert(trace.clone());
        match self.store.put_opts(object, PutPayload::from(bytes), options).await {
            Ok(put) => Ok(put.into()),
            Err(error) => Err(PutFailure::of(&error, &trace.seen(), self.once)),
        }
    }

    /// What became of a put whose condition did not hold. Something on the way to the store may
    /// have sent it twice: then this is the answer to the second, and the first was done. So it is
    /// asked what is there now.
    async fn settle(&self, id: u128, expected: Option<&Named>, why: &str) -> Result<Version, SwapError> {
        let unknown = |more: &str| SwapError::Unknown(self.says(&format!("{why}: {more}")));
        let there = match self.get().await {
            Ok(there) => there,
            Err(error) => return Err(unknown(&format!("and then it could not be read: {error}"))),
        };
        match there {
            Some(there) if there.named.id == id => Ok(there.named.version()),
            // Another put is on its way, or the store calls the object by two names.
            Some(there) if Some(&there.named) == expected => {
                Err(unknown("but the record is still the one that was to be replaced"))
            }
            // It has taken the place that ours was to take: only one can.
            Some(there) if there.content.after == expected.map(|named| named.id) => Err(SwapError::Conflict),
            // By hand.
            Some(there) if expected.is_some_and(|named| named.id == there.named.id) => {
                Err(SwapError::Conflict)
            }
            // Others may have gone on from ours.
            Some(_) => Err(unknown("and others have written since")),
            // It was deleted.
            None if expected.is_some() => Err(SwapError::Conflict),
            None => Err(unknown("but there is no record")),
        }
    }
}

#[cfg(test)]
mod tests;
