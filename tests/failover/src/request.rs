//! Requests of the checker, each on a connection of its own.

use std::io;
use std::net::SocketAddr;
use std::time::Duration;

use bytes::Bytes;
use http::{Method, Request};
use http_body_util::{BodyExt, Full};
use hyper_util::rt::TokioIo;
use serde::de::DeserializeOwned;
use tokio::net::TcpStream;

/// What came back.
#[derive(Debug)]
pub struct Answer {
    pub status: u16,
    pub headers: http::HeaderMap,
    pub body: Bytes,
}

impl Answer {
    #[must_use]
    pub fn header(&self, name: &str) -> Option<&str> {
        self.headers.get(name)?.to_str().ok()
    }

    /// # Errors
    /// It is no such JSON.
    pub fn json<T: DeserializeOwned>(&self) -> serde_json::Result<T> {
        serde_json::from_slice(&self.body)
    }

    #[must_use]
    pub fn text(&self) -> String {
        String::from_utf8_lossy(&self.body).trim().chars().take(300).collect()
    }
}

/// Why nothing came back.
#[derive(Debug)]
pub enum Failed {
    /// No node saw the request.
    Unsent(String),
    /// It may have been done.
    Unknown(String),
}

/// Sends a request, with such headers.
///
/// # Errors
/// No answer came.
pub async fn send(
    to: SocketAddr,
    method: Method,
    path: &str,
    headers: &[(&str, &str)],
    body: Vec<u8>,
    limit: Duration,
) -> Result<Answer, Failed> {
    let mut request = Request::builder().method(method).uri(path).header("host", to.to_string());
    for (name, value) in headers {
        request = request.header(*name, *value);
    }
    let request = request.body(Full::new(Bytes::from(body))).map_err(|e| Failed::Unsent(e.to_string()))?;
    let stream = match tokio::time::timeout(limit, TcpStream::connect(to)).await {
        Ok(Ok(stream)) => stream,
        Ok(Err(error)) => return Err(Failed::Unsent(error.to_string())),
        Err(_) => return Err(Failed::Unsent("no connection in time".into())),
    };
    // It leaves nothing in the system's tables when it ends; there are many.
    stream.set_zero_linger().map_err(|e| Failed::Unsent(e.to_string()))?;
    let exchanged = tokio::time::timeout(limit, async {
        let (mut sender, connection) = hyper::client::conn::http1::handshake(TokioIo::new(stream)).await?;
        let exchange = async {
            let (head, body) = sender.send_request(request).await?.into_parts();
            let body = body.collect().await?.to_bytes();
            Ok::<_, hyper::Error>(Answer { status: head.status.as_u16(), headers: head.headers, body })
        };
        tokio::pin!(connection);
        tokio::pin!(exchange);
        tokio::select! {
            answer = &mut exchange => answer,
            ended = &mut connection => { ended?; exchange.await }
        }
    });
    match exchanged.await {
        Ok(Ok(answer)) => Ok(answer),
        Ok(Err(error)) => Err(Failed::Unknown(error.to_string())),
        Err(_) => Err(Failed::Unknown(format!("no answer within {limit:?}"))),
    }
}

/// Asks for JSON.
///
/// # Errors
/// None came.
pub async fn get<T: DeserializeOwned>(to: SocketAddr, path: &str, limit: Duration) -> io::Result<T> {
    let answer = send(to, Method::GET, path, &[], Vec::new(), limit).await;
    let answer = answer.map_err(|failed| io::Error::other(format!("{failed:?}")))?;
    if answer.status != 200 {
        return Err(io::Error::other(format!("{}: {}", answer.status, answer.text())));
    }
    Ok(answer.json()?)
}
