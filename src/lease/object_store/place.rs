//! Where the object is: a URL, and the store that it names.

use std::sync::Arc;
use std::time::Duration;

use object_store::aws::AmazonS3Builder;
use object_store::azure::MicrosoftAzureBuilder;
use object_store::gcp::GoogleCloudStorageBuilder;
use object_store::path::Path;
use object_store::{ObjectStore, RetryConfig};

use super::http::StoreConnector;
use crate::error::{Error, Result, shown};
use crate::net::{HttpsClient, ServerTls};

/// Longest URL, in bytes.
const URL_MAX_BYTES: usize = 2048;
/// The most bytes of what is wrong with one.
const SHOWN_MAX_BYTES: usize = 300;
/// What comes before a request: the look-up of the name, TCP and TLS.
const CONNECT_LIMIT: Duration = Duration::from_secs(2);

/// Whose store it is.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
enum Vendor {
    S3,
    Google,
    Azure,
}

/// A bucket, and a path in it.
#[derive(Clone, PartialEq, Eq, Debug)]
pub(super) struct BucketPlace {
    vendor: Vendor,
    bucket: String,
    pub(super) prefix: Path,
}

impl BucketPlace {
    /// Reads `s3://bucket/prefix`, `gs://` or `az://`.
    ///
    /// # Errors
    /// [`Error::Config`]. What may be a password is not repeated.
    pub(super) fn parse(url: &str) -> Result<BucketPlace> {
        let bad = |why: &str| Error::Config(format!("object store: {why}"));
        if url.len() > URL_MAX_BYTES {
            return Err(bad("the URL is too long"));
        }
        let form = "the URL must be like s3://bucket/prefix, gs://bucket/prefix or az://container/prefix";
        let (scheme, rest) = url.trim().split_once("://").ok_or_else(|| bad(form))?;
        let vendor = match scheme {
            "s3" => Vendor::S3,
            "gs" => Vendor::Google,
            "az" | "azure" => Vendor::Azure,
            _ => return Err(bad(form)),
        };
        if rest.contains(['@', '?', '#', '%', '\\']) {
            return Err(bad("the URL has a bucket and a prefix, and nothing else: no user, no options"));
        }
        let (bucket, prefix) = rest.split_once('/').unwrap_or((rest, ""));
        let plain = |c: char| c.is_ascii_alphanumeric() || matches!(c, '-' | '.' | '_');
        if bucket.is_empty() || !bucket.chars().all(plain) {
            return Err(bad(form));
        }
        let prefix = Path::parse(prefix).map_err(|error| bad(&shown(&error.to_string(), SHOWN_MAX_BYTES)))?;
        Ok(BucketPlace { vendor, bucket: bucket.to_owned(), prefix })
    }

    /// For logs: `s3://bucket`.
    pub(super) fn shown(&self) -> String {
        let scheme = match self.vendor {
            Vendor::S3 => "s3",
            Vendor::Google => "gs",
            Vendor::Azure => "az",
        };
        format!("{scheme}://{}", self.bucket)
    }

    /// Its client, by the environment, in which these options have the last word. It sends each
    /// request once.
    ///
    /// # Errors
    /// [`Error::Config`], with names of options and never what they are.
    pub(super) fn open(&self, options: Vec<(String, String)>) -> Result<Arc<dyn ObjectStore>> {
        let connector = StoreConnector(HttpsClient::new(ServerTls::default(), CONNECT_LIMIT));
        let once = RetryConfig { max_retries: 0, ..RetryConfig::default() };
        let bad = |error: object_store::Error| {
            Error::Config(format!("{}: {}", self.shown(), shown(&error.to_string(), SHOWN_MAX_BYTES)))
        };
        /// The builders have no trait in common.
        macro_rules! build {
            ($builder:expr, $with_bucket:ident) => {{
                let mut builder = $builder;
                for (key, value) in options {
                    let known = key.to_ascii_lowercase().parse();
                    let known = known.map_err(|_| {
                        Error::Config(format!(
                            "{}: no option {:?}",
                            self.shown(),
                            shown(&key, SHOWN_MAX_BYTES)
                        ))
                    })?;
                    builder = builder.with_config(known, value);
                }
                let plain = "allow_http".parse().ok().and_then(|key| builder.get_config_value(&key));
                if cfg!(not(feature = "tls")) && plain.as_deref() != Some("true") {
                    let place = self.shown();
                    return Err(Error::Config(format!("{place}: this build is without the feature `tls`")));
                }
                let builder = builder.$with_bucket(&self.bucket).with_retry(once);
                Arc::new(builder.with_http_connector(connector).build().map_err(bad)?) as Arc<dyn ObjectStore>
            }};
        }
        Ok(match self.vendor {
            Vendor::S3 => build!(AmazonS3Builder::from_env(), with_bucket_name),
            Vendor::Google => build!(GoogleCloudStorageBuilder::from_env(), with_bucket_name),
            Vendor::Azure => build!(MicrosoftAzureBuilder::from_env(), with_container_name),
        })
    }
}
