//! A server that keeps what it gets byte for byte, and accepts nothing that two parsers could read
//! in two ways.
#![allow(dead_code, reason = "each test binary uses its part of it")]

use std::net::SocketAddr;
use std::sync::{Arc, Mutex};

use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::{TcpListener, TcpStream};

/// A request as it came over the wire.
#[derive(Clone, Debug, Default)]
pub(crate) struct Request {
    /// The first line.
    pub(crate) line: String,
    /// Names in lower case.
    pub(crate) headers: Vec<(String, String)>,
    pub(crate) body: Vec<u8>,
    pub(crate) trailers: Vec<(String, String)>,
    /// The connection ended before the request did.
    pub(crate) cut: bool,
}

impl Request {
    /// All values of a header.
    pub(crate) fn all(&self, name: &str) -> Vec<&str> {
        self.headers.iter().filter(|(n, _)| n == name).map(|(_, v)| v.as_str()).collect()
    }
}

/// The server; it answers each request with 201 and `ok`.
pub(crate) struct Recorder {
    pub(crate) address: SocketAddr,
    state: Arc<Mutex<State>>,
}

#[derive(Default)]
struct State {
    requests: Vec<Request>,
    /// What a strict server would refuse.
    malformed: Vec<String>,
    open: usize,
}

impl Recorder {
    pub(crate) async fn start() -> Recorder {
        let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
        let (address, state) = (listener.local_addr().unwrap(), Arc::new(Mutex::new(State::default())));
        let shared = state.clone();
        tokio::spawn(async move {
            while let Ok((stream, _)) = listener.accept().await {
                let state = shared.clone();
                tokio::spawn(async move {
                    state.lock().unwrap().open += 1;
                    let ended = serve(stream, &state).await;
                    let mut state = state.lock().unwrap();
                    state.open -= 1;
                    state.malformed.extend(ended.err());
                });
            }
        });
        Recorder { address, state }
    }

    /// The requests since the last call; panics when anything came that is not one.
    pub(crate) fn take(&self) -> Vec<Request> {
        let mut state = self.state.lock().unwrap();
        assert_eq!(state.malformed, [""; 0]);
        std::mem::take(&mut state.requests)
    }

    /// How many requests are there to take.
    pub(crate) fn count(&self) -> usize {
        self.state.lock().unwrap().requests.len()
    }

    /// Connections that are open.
    pub(crate) fn open(&self) -> usize {
        self.state.lock().unwrap().open
    }
}

async fn serve(stream: TcpStream, state: &Mutex<State>) -> Result<(), String> {
    let mut wire = Reader { stream, buffer: Vec::new() };
    while let Some(head) = wire.until(b"\r\n\r\n").await {
        let mut request = parse(&head)?;
        request.cut = body(&mut wire, &mut request).await?.is_none();
        let cut = request.cut;
        state.lock().unwrap().requests.push(request);
        let answer = b"HTTP/1.1 201 Created\r\ncontent-length: 2\r\n\r\nok";
        if cut || wire.stream.write_all(answer).await.is_err() {
            return Ok(());
        }
    }
    match wire.buffer.is_empty() {
        true => Ok(()),
        false => Err(format!("half a head: {:?}", String::from_utf8_lossy(&wire.buffer))),
    }
}

struct Reader {
    stream: TcpStream,
    buffer: Vec<u8>,
}

impl Reader {
    /// Everything up to and with the end mark; none when the connection ends before it.
    async fn until(&mut self, end: &[u8]) -> Option<Vec<u8>> {
        loop {
            if let Some(at) = self.buffer.windows(end.len()).position(|bytes| bytes == end) {
                return Some(self.buffer.drain(..at + end.len()).collect());
            }
            self.more().await?;
        }
    }

    async fn exactly(&mut self, bytes: usize) -> Option<Vec<u8>> {
        while self.buffer.len() < bytes {
            self.more().await?;
        }
        Some(self.buffer.drain(..bytes).collect())
    }

    async fn more(&mut self) -> Option<()> {
        match self.stream.read_buf(&mut self.buffer).await {
            Ok(n) if n > 0 => Some(()),
            _ => None,
        }
    }
}

fn parse(head: &[u8]) -> Result<Request, String> {
    let text = String::from_utf8_lossy(head).into_owned();
    let bad = |what: &str| Err(format!("{what}: {text:?}"));
    let mut lines = text.strip_suffix("\r\n\r\n").unwrap_or_default().split("\r\n");
    let line = lines.next().unwrap_or_default().to_string();
    let words: Vec<&str> = line.split(' ').collect();
    if words.len() != 3 || words[2] != "HTTP/1.1" || !(words[1].starts_with('/') || words[1] == "*") {
        return bad("not a request line");
    }
    let mut request = Request { line, ..Request::default() };
    for line in lines {
        request.headers.push(field(line)?);
    }
    let (lengths, codings) = (request.all("content-length"), request.all("transfer-encoding"));
    if lengths.len() + codings.len() > 1 || codings.iter().any(|c| *c != "chunked") {
        return bad("not one framing");
    }
    if lengths.iter().any(|l| !l.bytes().all(|b| b.is_ascii_digit()) || l.parse::<usize>().is_err()) {
        return bad("not a length");
    }
    if request.all("host").is_empty() {
        return bad("no host");
    }
    Ok(request)
}

fn field(line: &str) -> Result<(String, String), String> {
    let token = |b: u8| b.is_ascii_alphanumeric() || b"!#$%&'*+-.^_`|~".contains(&b);
    let (name, value) = line.split_once(':').unwrap_or_default();
    if name.is_empty() || !name.bytes().all(token) || value.bytes().any(|b| b < b' ' && b != b'\t') {
        return Err(format!("not a header: {line:?}"));
    }
    Ok((name.to_ascii_lowercase(), value.trim_matches([' ', '\t']).to_string()))
}

/// Reads the body; none when the connection ended within it.
async fn body(wire: &mut Reader, request: &mut Request) -> Result<Option<()>, String> {
    if request.all("transfer-encoding").is_empty() {
        let length = request.all("content-length").first().map_or(0, |l| l.parse().unwrap());
        let Some(body) = wire.exactly(length).await else { return Ok(None) };
        request.body = body;
        return Ok(Some(()));
    }
    loop {
        let Some(size) = wire.until(b"\r\n").await else { return Ok(None) };
        let text = String::from_utf8_lossy(&size[..size.len() - 2]).into_owned();
        let hex = !text.is_empty() && text.bytes().all(|b| b.is_ascii_hexdigit());
        let size = usize::from_str_radix(&text, 16).ok().filter(|_| hex);
        let size = size.ok_or_else(|| format!("not a chunk's size: {text:?}"))?;
        if size == 0 {
            break;
        }
        let Some(chunk) = wire.exactly(size + 2).await else { return Ok(None) };
        let Some(data) = chunk.strip_suffix(b"\r\n") else { return Err("a chunk without an end".into()) };
        request.body.extend_from_slice(data);
    }
    loop {
        let Some(line) = wire.until(b"\r\n").await else { return Ok(None) };
        if line == b"\r\n" {
            return Ok(Some(()));
        }
        request.trailers.push(field(&String::from_utf8_lossy(&line[..line.len() - 2]))?);
    }
}
