//! Calls of etcd's gateway: which member is asked, as which user, and what came of a call.

use std::fs::File;
use std::io::Read;
use std::path::Path;
use std::sync::Mutex;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::time::Duration;

use bytes::Bytes;
use http::header::{AUTHORIZATION, CONTENT_TYPE};
use http::{HeaderValue, Request, Response, StatusCode};
use http_body_util::Full;
use hyper::body::Incoming;
use serde_json::Value as Json;

use super::messages::{self, Authenticated, GatewayRefusal};
use super::settings::EtcdSettings;
use crate::error::{Error, Result};
use crate::lock::lock;
use crate::net::{HttpsClient, HttpsError, Pem, ServerTls, read_body};
use crate::threads::blocking;

/// Longest wait for a connection.
const CONNECT_LIMIT: Duration = Duration::from_secs(1);
/// The most bytes of an answer: two records, as Base64, and what is around them.
const ANSWER_MAX_BYTES: usize = 64 * 1024;
/// The most bytes of a file with certificates.
const FILE_MAX_BYTES: u64 = 4 << 20;

/// Numbers of gRPC.
const INVALID_ARGUMENT: u64 = 3;
const PERMISSION_DENIED: u64 = 7;
const RESOURCE_EXHAUSTED: u64 = 8;
const FAILED_PRECONDITION: u64 = 9;
const UNIMPLEMENTED: u64 = 12;
const UNAUTHENTICATED: u64 = 16;

/// What etcd says of a token that is not good any more, or of none. It looks at that before it
/// does what it is asked for.
const TOKEN_TEXTS: [&str; 3] = ["invalid auth token", "revision of auth store is old", "user name is empty"];

/// The connections to etcd.
#[derive(Default)]
pub(super) struct Gateway {
    client: Mutex<Option<KeptClient>>,
    token: Mutex<Option<HeaderValue>>,
    /// The member that is asked first.
    first: AtomicUsize,
}

struct KeptClient {
    client: HttpsClient,
    /// A member could not be reached since: the certificates may be others now.
    doubtful: bool,
}

/// Why a call gave nothing. In words for an operator, with the member.
#[derive(Debug)]
pub(super) enum CallError {
    /// It was not sent, and never will be.
    NotSent(String),
    /// etcd does not do it, and will not.
    Refused(String),
    /// etcd has no room. It may have done it all the same, and does nothing more about it.
    NoRoom(String),
    /// It may have been done, or may be at a later time.
    Unknown(String),
}

impl CallError {
    pub(super) fn into_words(self) -> String {
        let (CallError::NotSent(why)
        | CallError::Refused(why)
        | CallError::NoRoom(why)
        | CallError::Unknown(why)) = self;
        why
    }
}

/// A member that is being asked. Where this is dropped without an answer, another one is asked
/// first from then on: the caller may have given up waiting.
pub(super) struct AskedMember<'a> {
    first: &'a AtomicUsize,
    member: usize,
    members: usize,
    answered: bool,
}

impl AskedMember<'_> {
    pub(super) fn answered(mut self) {
        self.answered = true;
    }
}

impl Drop for AskedMember<'_> {
    fn drop(&mut self) {
        let AskedMember { member, members, answered, .. } = *self;
        if answered {
            self.first.store(member, Ordering::Relaxed);
            return;
        }
        // Another call may know better by now.
        let next = (member + 1) % members;
        let _ = self.first.compare_exchange(member, next, Ordering::Relaxed, Ordering::Relaxed);
    }
}

impl Gateway {
    /// All members, the one that answered last first.
    pub(super) fn order(&self, settings: &EtcdSettings) -> impl Iterator<Item = usize> + use<> {
        let (members, first) = (settings.members.len(), self.first.load(Ordering::Relaxed));
        (0..members).map(move |after| (first + after) % members)
    }

    pub(super) fn ask(&self, settings: &EtcdSettings, member: usize) -> AskedMember<'_> {
        AskedMember { first: &self.first, member, members: settings.members.len(), answered: false }
    }

    /// Sends a request and reads the whole answer. A user that etcd does not know any more is
    /// authenticated anew, once.
    ///
    /// # Errors
    /// Whether it was done, and what went wrong.
    ///
    /// # Cancel safety
    /// Once dropped it may have been done.
    pub(super) async fn call(
        &self,
        settings: &EtcdSettings,
        member: usize,
        path: &'static str,
        body: &Json,
    ) -> Result<Bytes, CallError> {
        let mut anew = false;
        loop {
            let token = self.token(settings, member, anew).await?;
            let response = self.send(settings, member, path, body, token).await?;
            let (status, answer) = read(settings, member, response).await?;
            if status == StatusCode::OK {
                return Ok(answer);
            }
            let refusal = GatewayRefusal::read(status, &answer);
            if wants_token(&refusal) && settings.user.is_some() && !anew {
                anew = true;
                continue;
            }
            return Err(sort(settings, member, status, refusal));
        }
    }

    /// Begins a call whose answer goes on for ever.
    pub(super) async fn open(
        &self,
        settings: &EtcdSettings,
        member: usize,
        path: &'static str,
        body: &Json,
    ) -> Result<Incoming, CallError> {
        let token = self.token(settings, member, false).await?;
        let response = self.send(settings, member, path, body, token).await?;
        if response.status() != StatusCode::OK {
            let (status, answer) = read(settings, member, response).await?;
            return Err(sort(settings, member, status, GatewayRefusal::read(status, &answer)));
        }
        Ok(response.into_body())
    }

    async fn send(
        &self,
        settings: &EtcdSettings,
        member: usize,
        path: &'static str,
        body: &Json,
        token: Option<HeaderValue>,
    ) -> Result<Response<Incoming>, CallError> {
        let client = self.client(settings).await.map_err(|error| CallError::NotSent(error.to_string()))?;
        let request = Request::post(format!("{}/v3/{path}", settings.members[member]));
        let mut request = request
            .header(CONTENT_TYPE, "application/json")
            .body(Full::from(body.to_string()))
            .map_err(|error| CallError::NotSent(error.to_string()))?;
        if let Some(token) = token {
            request.headers_mut().insert(AUTHORIZATION, token);
        }
        client.send(request).await.map_err(|error| match error {
            HttpsError::NotSent(why) => {
                if let Some(kept) = lock(&self.client).as_mut() {
                    kept.doubtful = !settings.files().is_empty();
                }
                CallError::NotSent(why)
            }
            HttpsError::MaybeSent(why) => CallError::Unknown(why),
        })
    }

    /// The client, whose files are read anew after a member could not be reached.
    async fn client(&self, settings: &EtcdSettings) -> Result<HttpsClient> {
        let kept = match &*lock(&self.client) {
            Some(kept) if !kept.doubtful => return Ok(kept.client.clone()),
            kept => kept.as_ref().map(|kept| kept.client.clone()),
        };
        let (roots, certificate) = (settings.roots.clone(), settings.certificate.clone());
        let made = blocking(move || {
            let roots = roots.as_deref().map(PemFile::read).transpose()?;
            let certificate = certificate
                .as_ref()
                .map(|[chain, key]| Ok::<_, Error>([PemFile::read(chain)?, PemFile::read(key)?]));
            let certificate = certificate.transpose()?;
            let certificate = certificate.as_ref().map(|[chain, key]| [chain.pem(), key.pem()]);
            ServerTls::new(roots.as_ref().map(PemFile::pem), certificate)
        });
        match (made.await, kept) {
            (Ok(tls), _) => {
                let client = HttpsClient::new(tls, CONNECT_LIMIT);
                *lock(&self.client) = Some(KeptClient { client: client.clone(), doubtful: false });
                Ok(client)
            }
            // They may be half written. Those from before may do.
            (Err(_), Some(client)) => Ok(client),
            (Err(error), None) => Err(error),
        }
    }

    /// What shows etcd which user this is; none where there is no user.
    async fn token(
        &self,
        settings: &EtcdSettings,
        member: usize,
        anew: bool,
    ) -> Result<Option<HeaderValue>, CallError> {
        let Some((name, password)) = &settings.user else { return Ok(None) };
        let known = lock(&self.token).clone();
        if !anew && known.is_some() {
            return Ok(known);
        }
        let body = messages::authenticate(name, password);
        let response = self.send(settings, member, "auth/authenticate", &body, None).await;
        // The request that needs it was not sent.
        let not_sent =
            |why: String| CallError::NotSent(format!("{}: user {name:?}: {why}", settings.members[member]));
        let response = response.map_err(|error| CallError::NotSent(error.into_words()))?;
        let (status, answer) =
            read(settings, member, response).await.map_err(|error| CallError::NotSent(error.into_words()))?;
        if status != StatusCode::OK {
            let GatewayRefusal { code, text } = GatewayRefusal::read(status, &answer);
            // An etcd without users lets all in. That must not stop the nodes.
            if code == Some(FAILED_PRECONDITION) && text.contains("not enabled") {
                return Ok(None);
            }
            return Err(not_sent(text));
        }
        let Authenticated { token } = messages::read(&answer).map_err(not_sent)?;
        let token = HeaderValue::try_from(token).map_err(|_| not_sent("its token is none".into()))?;
        *lock(&self.token) = Some(token.clone());
        Ok(Some(token))
    }
}

/// The status and the body.
async fn read(
    settings: &EtcdSettings,
    member: usize,
    response: Response<Incoming>,
) -> Result<(StatusCode, Bytes), CallError> {
    let status = response.status();
    let body = read_body(response.into_body(), ANSWER_MAX_BYTES).await;
    let body = body.map_err(|why| CallError::Unknown(format!("{}: {why}", settings.members[member])))?;
    Ok((status, body))
}

fn wants_token(refusal: &GatewayRefusal) -> bool {
    let GatewayRefusal { code, text } = refusal;
    *code == Some(UNAUTHENTICATED) || code.is_some() && TOKEN_TEXTS.iter().any(|known| text.contains(known))
}

/// What a refusal says of the request.
fn sort(settings: &EtcdSettings, member: usize, status: StatusCode, refusal: GatewayRefusal) -> CallError {
    let tokenless = wants_token(&refusal);
    let GatewayRefusal { code, text } = refusal;
    let at = &settings.members[member];
    match (code, status) {
        _ if settings.user.is_none() && (tokenless || code == Some(PERMISSION_DENIED)) => {
            CallError::Refused(format!("{at}: etcd wants a user and a password: {text}"))
        }
        (Some(PERMISSION_DENIED), _) => CallError::Refused(format!(
            "{at}: the user needs the permission `readwrite` for the key {:?}: {text}",
            settings.key
        )),
        (Some(INVALID_ARGUMENT | UNAUTHENTICATED), _) => CallError::Refused(format!("{at}: {text}")),
        (Some(RESOURCE_EXHAUSTED), _) if text.contains("space exceeded") => CallError::NoRoom(format!(
            "{at}: {text}: etcd takes nothing more until it is compacted and defragmented, and its alarm \
             NOSPACE disarmed"
        )),
        (Some(RESOURCE_EXHAUSTED), _) => CallError::NoRoom(format!("{at}: {text}")),
        (Some(UNIMPLEMENTED), _) | (None, StatusCode::NOT_FOUND | StatusCode::METHOD_NOT_ALLOWED) => {
            CallError::Refused(format!("{at}: no JSON gateway of etcd 3.4 or later is there: {text}"))
        }
        // Something on the way does not let it through.
        (None, StatusCode::BAD_REQUEST | StatusCode::UNAUTHORIZED | StatusCode::FORBIDDEN) => {
            CallError::Refused(format!("{at}: {text}"))
        }
        _ => CallError::Unknown(format!("{at}: {text}")),
    }
}

/// A file with certificates or a key.
struct PemFile {
    named: String,
    bytes: Vec<u8>,
}

impl PemFile {
    /// Blocks.
    fn read(path: impl AsRef<Path>) -> Result<PemFile> {
        let path = path.as_ref();
        let mut bytes = Vec::new();
        let file = File::open(path).map_err(Error::io("open", path))?;
        file.take(FILE_MAX_BYTES + 1).read_to_end(&mut bytes).map_err(Error::io("read", path))?;
        let named = path.display().to_string();
        if bytes.len() as u64 > FILE_MAX_BYTES {
            return Err(Error::Config(format!("{named}: more than {FILE_MAX_BYTES} bytes")));
        }
        Ok(PemFile { named, bytes })
    }

    fn pem(&self) -> Pem<'_> {
        Pem { named: &self.named, bytes: &self.bytes }
    }
}
