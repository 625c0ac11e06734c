//! What became of a request: the store's client says it in words alone.

use std::sync::{Arc, Mutex};

use http::StatusCode;

use crate::error::shown;
use crate::lock::lock;

/// Bytes of a store's words that are passed on.
const SAID_MAX_BYTES: usize = 300;

/// Goes with a request through the store's client, down to where it is sent.
#[derive(Clone, Default, Debug)]
pub(super) struct Trace(Arc<Mutex<Traced>>);

/// What was seen of a request.
#[derive(Clone, Default, Debug)]
pub(super) struct Traced {
    /// How often it was given to the network.
    pub(super) tries: u32,
    /// It never left.
    pub(super) not_sent: bool,
    /// Why there is no answer.
    pub(super) failure: Option<String>,
    pub(super) status: Option<StatusCode>,
    /// The store's word for what is wrong, such as `NoSuchBucket`.
    pub(super) code: String,
    message: String,
}

impl Traced {
    /// It is not the object that is missing.
    pub(super) fn no_bucket(&self) -> bool {
        matches!(&*self.code, "NoSuchBucket" | "ContainerNotFound")
    }
}

impl Trace {
    pub(super) fn tried(&self) {
        lock(&self.0).tries += 1;
    }

    pub(super) fn failed(&self, not_sent: bool, why: &str) {
        let mut seen = lock(&self.0);
        (seen.not_sent, seen.failure) = (not_sent, Some(why.to_owned()));
    }

    pub(super) fn answered(&self, status: StatusCode, body: &[u8]) {
        let mut seen = lock(&self.0);
        seen.status = Some(status);
        if !status.is_success() {
            let text = String::from_utf8_lossy(body);
            (seen.code, seen.message) = (element(&text, "Code"), element(&text, "Message"));
        }
    }

    pub(super) fn seen(&self) -> Traced {
        lock(&self.0).clone()
    }
}

/// The text of an element of XML; empty where there is none.
fn element(text: &str, name: &str) -> String {
    let inner = text.split_once(&format!("<{name}>")).and_then(|(_, rest)| rest.split_once('<'));
    shown(inner.map_or("", |(inner, _)| inner), SAID_MAX_BYTES)
}

/// What was wrong, in words for an operator.
///
/// The body of an answer is never shown: with a signature that does not match it repeats all that
/// was signed, and a session's token is in that.
pub(super) fn words(seen: &Traced, error: &object_store::Error) -> String {
    let advice = match (seen.status.map(|status| status.as_u16()), seen.code.as_str()) {
        (Some(300..=399), _) => ": is it the region of the bucket?",
        (_, "ExpiredToken" | "ExpiredTokenException") => ": the credentials must be renewed",
        (Some(401 | 403), _) => ": are the credentials right, and allowed to read and write there?",
        (_, "NoSuchBucket" | "ContainerNotFound") => ": make the bucket first",
        _ => "",
    };
    if let Some(status) = seen.status.filter(|status| !status.is_success()) {
        let said: Vec<&str> =
            [&*seen.code, &*seen.message].into_iter().filter(|said| !said.is_empty()).collect();
        return format!("{} {}{advice}", status.as_u16(), said.join(": "));
    }
    if let Some(failure) = &seen.failure {
        return failure.clone();
    }
    let text = error.to_string();
    let plain = text.split(['<', '{']).next().unwrap_or_default();
    let [code, message] = ["Code", "Message"].map(|name| element(&text, name));
    let parts = [plain.trim(), &code, &message];
    shown(&parts.into_iter().filter(|part| !part.is_empty()).collect::<Vec<_>>().join(" "), SAID_MAX_BYTES)
}

/// What an error of a put says of it.
#[derive(Clone, PartialEq, Eq, Debug)]
pub(super) enum PutFailure {
    /// It was not done, and never will be.
    Refused(String),
    /// Its condition did not hold, at one of its tries.
    Contradicted(String),
    /// It may have been done, or may be yet.
    Doubtful(String),
}

impl PutFailure {
    /// `once` says that the client sends each put once.
    pub(super) fn of(error: &object_store::Error, seen: &Traced, once: bool) -> PutFailure {
        use object_store::Error;
        let why = words(seen, error);
        let contradicted = matches!(
            error,
            Error::Precondition { .. } | Error::AlreadyExists { .. } | Error::NotFound { .. }
        );
        if contradicted && !seen.no_bucket() {
            return PutFailure::Contradicted(why);
        }
        if !once || seen.tries != 1 {
            return PutFailure::Doubtful(why);
        }
        match seen.status.map(|status| status.as_u16()) {
            None if seen.not_sent => PutFailure::Refused(why),
            // S3 documents of 500 that it may have been done, and nothing of 503 and 429.
            None | Some(200..=299 | 408 | 429 | 500 | 502..) => PutFailure::Doubtful(why),
            Some(_) => PutFailure::Refused(why),
        }
    }
}
