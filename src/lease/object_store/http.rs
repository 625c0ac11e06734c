//! The HTTP client under the store's client: that of this crate.

use async_trait::async_trait;
use http::header::USER_AGENT;
use http::{HeaderValue, Request, Response, uri};
use http_body_util::{BodyExt, Full};
use object_store::client::{
    HttpClient, HttpConnector, HttpError, HttpErrorKind, HttpRequest, HttpResponse, HttpResponseBody,
    HttpService,
};
use object_store::{ClientConfigKey, ClientOptions};

use super::trace::Trace;
use crate::net::{HttpsClient, HttpsError, read_body};

/// The most bytes of an answer: an object, an error, the credentials of a machine.
const ANSWER_MAX_BYTES: usize = 256 * 1024;
const AGENT: &str = concat!("replite/", env!("CARGO_PKG_VERSION"));

/// Makes the clients: all of them share the connections of one.
#[derive(Clone, Debug)]
pub(super) struct StoreConnector(pub(super) HttpsClient);

impl HttpConnector for StoreConnector {
    fn connect(&self, options: &ClientOptions) -> object_store::Result<HttpClient> {
        let plain = options.get_config_value(&ClientConfigKey::AllowHttp);
        let plain = plain.is_some_and(|plain| plain == "true");
        Ok(HttpClient::new(Service { client: self.0.clone(), plain }))
    }
}

#[derive(Debug)]
struct Service {
    client: HttpsClient,
    /// `http://` is allowed.
    plain: bool,
}

/// Why a request failed before it was sent, or after.
#[derive(Debug, thiserror::Error)]
#[error("{0}")]
struct NoResponse(String);

#[async_trait]
impl HttpService for Service {
    async fn call(&self, request: HttpRequest) -> Result<HttpResponse, HttpError> {
        let trace = request.extensions().get::<Trace>().cloned().unwrap_or_default();
        trace.tried();
        if !self.plain && request.uri().scheme() == Some(&uri::Scheme::HTTP) {
            let why = "http:// is not allowed: it takes the option `allow_http`";
            trace.failed(true, why);
            return Err(HttpError::new(HttpErrorKind::Unknown, NoResponse(why.into())));
        }
        let (mut head, body) = request.into_parts();
        head.headers.entry(USER_AGENT).or_insert(HeaderValue::from_static(AGENT));
        let body = body.collect().await?.to_bytes();
        let failed = |error: HttpsError| {
            let (kind, not_sent, why) = match error {
                HttpsError::NotSent(why) => (HttpErrorKind::Connect, true, why),
                HttpsError::MaybeSent(why) => (HttpErrorKind::Unknown, false, why),
            };
            trace.failed(not_sent, &why);
            HttpError::new(kind, NoResponse(why))
        };
        let response = self.client.send(Request::from_parts(head, Full::new(body))).await.map_err(failed)?;
        let (head, body) = response.into_parts();
        let body = read_body(body, ANSWER_MAX_BYTES).await.map_err(|why| {
            trace.failed(false, &why);
            HttpError::new(HttpErrorKind::Decode, NoResponse(why))
        })?;
        trace.answered(head.status, &body);
        Ok(Response::from_parts(head, HttpResponseBody::from(body)))
    }
}
