use std::sync::Mutex;

use ::http::StatusCode;
use async_trait::async_trait;
use futures_util::stream::BoxStream;
use object_store::memory::InMemory;
use object_store::{
    CopyOptions, GetResult, ListResult, MultipartUpload, ObjectMeta, PutMultipartOptions, PutResult,
};

use super::trace::Traced;
use super::*;
use crate::testing::lease::conformance;

type Said = object_store::Error;

/// A store in memory. The next put is answered with this error, executed before where it says so.
#[derive(Debug, Default)]
struct Fake {
    memory: InMemory,
    next: Mutex<Option<(bool, Said)>>,
}

impl fmt::Display for Fake {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("Fake")
    }
}

#[async_trait]
impl object_store::ObjectStore for Fake {
    async fn put_opts(
        &self,
        object: &Path,
        payload: PutPayload,
        options: PutOptions,
    ) -> object_store::Result<PutResult> {
        let next = self.next.lock().unwrap().take();
        match next {
            None => self.memory.put_opts(object, payload, options).await,
            Some((done, error)) => {
                if done {
                    self.memory.put_opts(object, payload, options).await?;
                }
                Err(error)
            }
        }
    }

    async fn get_opts(&self, object: &Path, options: GetOptions) -> object_store::Result<GetResult> {
        self.memory.get_opts(object, options).await
    }

    async fn put_multipart_opts(
        &self,
        _: &Path,
        _: PutMultipartOptions,
    ) -> object_store::Result<Box<dyn MultipartUpload>> {
        unreachable!("it is small")
    }

    fn delete_stream(
        &self,
        _: BoxStream<'static, object_store::Result<Path>>,
    ) -> BoxStream<'static, object_store::Result<Path>> {
        unreachable!("nothing is deleted")
    }

    fn list(&self, _: Option<&Path>) -> BoxStream<'static, object_store::Result<ObjectMeta>> {
        unreachable!("nothing is listed")
    }

    async fn list_with_delimiter(&self, _: Option<&Path>) -> object_store::Result<ListResult> {
        unreachable!("nothing is listed")
    }

    async fn copy_opts(&self, _: &Path, _: &Path, _: CopyOptions) -> object_store::Result<()> {
        unreachable!("nothing is copied")
    }
}

fn generic(text: &str) -> Said {
    Said::Generic { store: "Fake", source: text.into() }
}

fn answered(status: u16, body: &str) -> Traced {
    let trace = Trace::default();
    trace.tried();
    trace.answered(StatusCode::from_u16(status).unwrap(), body.as_bytes());
    trace.seen()
}

#[test]
fn a_place_is_a_bucket_and_a_prefix_and_no_secret_is_repeated() {
    for (url, shown, prefix) in [
        ("s3://bucket", "s3://bucket", ""),
        ("s3://my.bucket-1/", "s3://my.bucket-1", ""),
        (" gs://bucket/a/b/ ", "gs://bucket", "a/b"),
        ("s3://bucket//a/", "s3://bucket", "a"),
        ("azure://container/a", "az://container", "a"),
    ] {
        let place = BucketPlace::parse(url).unwrap();
        assert_eq!((place.shown().as_str(), place.prefix.as_ref()), (shown, prefix));
    }
    for url in [
        "",
        "bucket",
        "s3:bucket",
        "s3://",
        "s3:///prefix",
        "http://bucket/prefix",
        "s3://key:s3cret@bucket/prefix",
        "s3://bucket/prefix?secret=s3cret",
        "az://s3cret@account/prefix",
        "s3://bucket/../prefix",
        "s3://buck et/",
        &format!("s3://bucket/{}", "x".repeat(3000)),
    ] {
        let error = BucketPlace::parse(url).unwrap_err().to_string();
        assert!(error.contains("object store: ") && !error.contains("s3cret"), "{url}: {error}");
    }
}

#[test]
fn an_object_gives_back_what_was_written() {
    let records: [&[u8]; 9] =
        [b"{\"a\":1}", b"{ \"a\" : 1 }", b" {}", b"{}\n", b"", b"null", b"1.50", b"\xff\x00", b"{\"a\":"];
    for (record, after) in records.into_iter().zip([None, Some(7)].into_iter().cycle()) {
        let content = LeaseObject { id: 5, after, record: record.to_vec() };
        let bytes = content.encode().unwrap();
        assert!(serde_json::from_slice::<serde_json::Value>(&bytes).is_ok());
        assert_eq!(LeaseObject::decode(&bytes).unwrap(), content);
        for end in 0..bytes.len() {
            LeaseObject::decode(&bytes[..end]).unwrap_err();
        }
    }
    let json = LeaseObject { id: 1, after: None, record: b"{\"a\":1}".to_vec() }.encode().unwrap();
    let id = "00000000000000000000000000000001";
    let text = format!("{{\"replite_lease\":1,\"id\":\"{id}\",\"after\":null,\"record\":{{\"a\":1}}}}");
    assert_eq!(String::from_utf8(json).unwrap(), text);
    for (from, to, words) in [
        ("e\":1,", "e\":2,", "format 2, of another version"),
        ("{\"r", "{\"new\":1,\"r", "did not write"),
        (id, "1", "did not write"),
        ("null", "\"1\"", "did not write"),
        ("record", "bytes", "did not write"),
        ("null", "null,\"bytes\":\"\"", "did not write"),
    ] {
        let why = LeaseObject::decode(text.replacen(from, to, 1).as_bytes()).unwrap_err();
        assert!(why.contains(words), "{why}");
    }
    let long = format!("{{\"replite_lease\":1,\"\u{1b}{}\":1}}", "x".repeat(9000));
    let why = LeaseObject::decode(long.as_bytes()).unwrap_err();
    assert!(why.len() < 500 && !why.contains('\u{1b}'), "{why}");
    // The longest fits.
    let longest = LeaseObject { id: 1, after: Some(2), record: vec![255; RECORD_MAX_BYTES] };
    assert!(longest.encode().unwrap().len() as u64 <= OBJECT_MAX_BYTES);
}

#[test]
fn a_version_says_the_id_and_what_the_store_calls_it() {
    let names = [(Some("\"a b\""), None), (None, Some("1234")), (Some("W/\"é\""), Some("x")), (None, None)];
    for (e_tag, version) in names {
        let name = object_store::UpdateVersion {
            e_tag: e_tag.map(str::to_owned),
            version: version.map(str::to_owned),
        };
        let named = Named { id: 7, name };
        assert_eq!(Named::of(&named.version()), Some(named));
    }
    for text in ["", "1", "42-0000-00", "00000000000000000000000000000001", "x [null,null]"] {
        assert_eq!(Named::of(&Version::new(text)), None, "{text}");
    }
}

#[test]
fn what_is_known_of_a_put_is_told_by_what_was_seen_of_it() {
    let of = |error: &Said, seen: &Traced, once| PutFailure::of(error, seen, once);
    let error = generic("it failed");
    for status in [200, 408, 429, 500, 502, 503, 504] {
        assert!(matches!(of(&error, &answered(status, ""), true), PutFailure::Doubtful(_)), "{status}");
    }
    for status in [301, 307, 400, 401, 403, 405, 413, 501] {
        assert!(matches!(of(&error, &answered(status, ""), true), PutFailure::Refused(_)), "{status}");
        // One that is sent again: the first try may have been done.
        assert!(matches!(of(&error, &answered(status, ""), false), PutFailure::Doubtful(_)), "{status}");
    }
    let trace = Trace::default();
    assert!(matches!(of(&error, &trace.seen(), true), PutFailure::Doubtful(_)), "it was not seen");
    trace.tried();
    trace.failed(true, "no connection");
    assert_eq!(of(&error, &trace.seen(), true), PutFailure::Refused("no connection".into()));
    trace.tried();
    assert!(matches!(of(&error, &trace.seen(), true), PutFailure::Doubtful(_)), "it was tried twice");
    let trace = Trace::default();
    trace.tried();
    trace.failed(false, "it broke off");
    assert_eq!(of(&error, &trace.seen(), true), PutFailure::Doubtful("it broke off".into()));
    let missing = Said::NotFound { path: "a".into(), source: "no".into() };
    assert!(matches!(
        of(&missing, &answered(404, "<Code>NoSuchKey</Code>"), true),
        PutFailure::Contradicted(_)
    ));
    let no_bucket = answered(404, "<Code>NoSuchBucket</Code>");
    assert!(matches!(of(&missing, &no_bucket, true), PutFailure::Refused(_)));
}

/// S3 repeats what was signed, with the token of a session.
#[test]
fn what_was_signed_is_not_repeated() {
    let body = "<?xml version=\"1.0\"?><Error><Code>SignatureDoesNotMatch</Code><Message>It does not\nmatch.\
                </Message><CanonicalRequest>x-amz-security-token:s3cret</CanonicalRequest></Error>";
    let error = generic(&format!("status code: 403: {body}"));
    for seen in [answered(403, body), Traced::default()] {
        let words = words(&seen, &error);
        assert!(words.contains("SignatureDoesNotMatch") && words.contains("It does not\\nmatch."), "{words}");
        assert!(!words.contains("s3cret"), "{words}");
    }
    let no_tag = words(&answered(200, ""), &generic("ETag Header missing from response"));
    assert!(no_tag.contains("ETag Header missing"), "{no_tag}");
    let json = generic("status code: 403: {\"token\": \"s3cret\"}");
    assert!(!words(&Traced::default(), &json).contains("s3cret"));
}

#[tokio::test]
async fn a_store_in_memory_keeps_the_contract() {
    let store: Arc<dyn object_store::ObjectStore> = Arc::new(InMemory::new());
    conformance(|| Arc::new(ObjectStore::with(store.clone(), "a/b").unwrap())).await.unwrap();
}

#[tokio::test]
async fn a_store_that_repeats_requests_by_itself_proves_nothing_by_a_failure() {
    let fake = Arc::new(Fake::default());
    let store = ObjectStore::with(fake.clone(), "app").unwrap();
    let mut version = store.swap(None, b"{}").await.unwrap();
    assert_eq!(store.place(), "Fake/app/lease.json");
    let next = |done, error| *fake.next.lock().unwrap() = Some((done, error));
    for done in [false, true] {
        next(done, Said::PermissionDenied { path: "a".into(), source: "expired".into() });
        let swapped = store.swap(Some(&version), b"{}").await;
        assert!(matches!(swapped, Err(SwapError::Unknown(_))), "{swapped:?}");
        let there = store.read().await.unwrap().unwrap().version;
        assert_eq!(there != version, done);
        version = there;
    }
    // A condition is asked again after a put that was done.
    next(true, Said::Precondition { path: "a".into(), source: "412".into() });
    version = store.swap(Some(&version), b"{}").await.unwrap();
    next(true, Said::AlreadyExists { path: "a".into(), source: "409".into() });
    version = store.swap(Some(&version), b"{}").await.unwrap();
    assert_eq!(store.read().await.unwrap().unwrap().version, version);
}

/// One that was made without conditional puts.
#[tokio::test]
async fn a_store_that_has_no_conditional_puts_says_so() {
    let fake = Arc::new(Fake::default());
    let store = ObjectStore::with(fake.clone(), "").unwrap();
    let never = Said::NotImplemented { operation: "put_opts".into(), implementer: "Fake".into() };
    *fake.next.lock().unwrap() = Some((false, never));
    let swapped = store.swap(None, b"{}").await;
    let Err(SwapError::Unavailable(why)) = swapped else { panic!("{swapped:?}") };
    assert!(why.contains("put_opts"), "{why}");
    assert_eq!(store.place(), "Fake/lease.json");
}

#[test]
fn options_are_named_and_never_what_they_are() {
    let opened = |url: &str, key: &str| ObjectStore::with_options(url, [(key, "s3cret")]);
    for url in ["s3://bucket", "gs://bucket", "az://container"] {
        let error = opened(url, "no_such_option").unwrap_err().to_string();
        assert!(error.contains("no_such_option") && !error.contains("s3cret"), "{error}");
    }
    let store = opened("s3://bucket/app", "AWS_SECRET_ACCESS_KEY");
    assert!(!format!("{store:?}").contains("s3cret"));
    let missing = opened("az://container", "azure_storage_sas_key").unwrap_err().to_string();
    assert!(missing.contains("az://container: ") && !missing.contains("s3cret"), "{missing}");
}
