//! A member of an etcd that has one key, and does to each request what the test says.

use std::collections::VecDeque;
use std::sync::{Arc, Mutex};

use base64ct::{Base64, Encoding};
use serde_json::{Value as Json, json};
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::{TcpListener, TcpStream};
use tokio::sync::watch;

use crate::lease::etcd::messages::KeyValue;
use crate::lease::etcd::value::Value;
use crate::lock::lock;

/// What is done to a request for this path, in the order in which they were said.
#[derive(Clone)]
pub(super) enum Mishap {
    /// None befalls it.
    None,
    /// It is answered with this status and body, and not looked at.
    Answer(u16, String),
    /// It is done, and then answered like that.
    DoneAndAnswer(u16, String),
    /// The connection is closed, and nothing done.
    Close,
    /// It is done, and the connection closed.
    DoneAndClose,
    /// It is never answered.
    Hang,
    /// It is done twice. The second answer is given.
    Twice,
    /// It is done as often; then another record takes the place of what is there; then it is done
    /// once more. That answer is given.
    Overtaken(usize),
    /// The answer has no end.
    Endless,
}

pub(super) struct State {
    pub(super) cluster: u64,
    pub(super) revision: u64,
    pub(super) found: Option<(u64, Vec<u8>)>,
    /// Who is let in, and with what since.
    pub(super) user: Option<(&'static str, &'static str)>,
    pub(super) token: u64,
    pub(super) mishaps: VecDeque<(&'static str, Mishap)>,
    /// The paths of all requests.
    pub(super) asked: Vec<String>,
}

#[derive(Clone)]
pub(super) struct Fake {
    state: Arc<Mutex<State>>,
    changes: Arc<watch::Sender<()>>,
}

impl Fake {
    pub(super) fn new() -> Fake {
        let (mishaps, asked) = (VecDeque::new(), Vec::new());
        let state = State { cluster: 77, revision: 1, found: None, user: None, token: 0, mishaps, asked };
        Fake { state: Arc::new(Mutex::new(state)), changes: Arc::new(watch::Sender::new(())) }
    }

    pub(super) fn with<T>(&self, change: impl FnOnce(&mut State) -> T) -> T {
        change(&mut lock(&self.state))
    }

    pub(super) fn mishap(&self, path: &'static str, mishap: Mishap) {
        self.with(|state| state.mishaps.push_back((path, mishap)));
    }

    /// How many requests for this path came.
    pub(super) fn asked(&self, path: &str) -> usize {
        self.with(|state| state.asked.iter().filter(|asked| *asked == path).count())
    }

    /// A member. All of them have the same state. Returns its URL.
    pub(super) async fn member(&self) -> String {
        let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
        let url = format!("http://{}", listener.local_addr().unwrap());
        let fake = self.clone();
        tokio::spawn(async move {
            loop {
                let (io, _) = listener.accept().await.unwrap();
                let fake = fake.clone();
                tokio::spawn(async move { fake.serve(io).await });
            }
        });
        url
    }

    async fn serve(&self, mut io: TcpStream) -> Option<()> {
        loop {
            let (path, token, body) = request(&mut io).await?;
            let mishap = self.with(|state| {
                state.asked.push(path.clone());
                let at = state.mishaps.iter().position(|(of, _)| *of == path)?;
                state.mishaps.remove(at).map(|(_, mishap)| mishap)
            });
            if path == "watch" && mishap.is_none() {
                return self.watch(&mut io).await;
            }
            let answer = || self.answer(&path, token.as_deref(), &body);
            let (status, text) = match mishap {
                None | Some(Mishap::None) => answer(),
                Some(Mishap::Answer(status, text)) => (status, text),
                Some(Mishap::DoneAndAnswer(status, text)) => {
                    answer();
                    (status, text)
                }
                Some(Mishap::Close) => return None,
                Some(Mishap::DoneAndClose) => {
                    answer();
                    return None;
                }
                Some(Mishap::Hang) => std::future::pending().await,
                Some(Mishap::Twice) => {
                    answer();
                    answer()
                }
                Some(Mishap::Overtaken(times)) => {
                    (0..times).for_each(|_| drop(answer()));
                    self.with(|state| {
                        let over =
                            state.found.take().map(|(mod_revision, value)| KeyValue { mod_revision, value });
                        state.revision += 1;
                        state.found = Some((state.revision, Value::encode(over.as_ref(), b"other").unwrap()));
                    });
                    answer()
                }
                Some(Mishap::Endless) => {
                    let head = "HTTP/1.1 200 OK\r\ntransfer-encoding: chunked\r\n\r\n4\r\n{\"a\"\r\n";
                    io.write_all(head.as_bytes()).await.ok()?;
                    while io.write_all(b"4\r\n    \r\n").await.is_ok() {}
                    return None;
                }
            };
            let length = text.len();
            let head = format!("HTTP/1.1 {status} Some\r\ncontent-length: {length}\r\n\r\n");
            io.write_all((head + &text).as_bytes()).await.ok()?;
        }
    }

    async fn watch(&self, io: &mut TcpStream) -> Option<()> {
        let mut changes = self.changes.subscribe();
        let chunk = |text: &str| format!("{:x}\r\n{text}\r\n", text.len());
        let head = "HTTP/1.1 200 OK\r\ntransfer-encoding: chunked\r\n\r\n".to_owned();
        let created = chunk("{\"result\":{\"header\":{},\"created\":true}}\n");
        io.write_all((head + &created).as_bytes()).await.ok()?;
        changes.changed().await.ok()?;
        io.write_all(chunk("{\"result\":{\"events\":[]}}\n").as_bytes()).await.ok()?;
        std::future::pending().await
    }

    fn answer(&self, path: &str, token: Option<&str>, body: &Json) -> (u16, String) {
        let mut state = lock(&self.state);
        let refused = |status, code: u64, why: &str| {
            (status, json!({ "error": why, "message": why, "code": code }).to_string())
        };
        if path == "auth/authenticate" {
            return match state.user {
                None => refused(412, 9, "etcdserver: authentication is not enabled"),
                Some((name, password)) if body["name"] == name && body["password"] == password => {
                    (200, json!({ "header": {}, "token": format!("token.{}", state.token) }).to_string())
                }
                Some(_) => refused(400, 3, "etcdserver: authentication failed, invalid user ID or password"),
            };
        }
        if state.user.is_some() && token != Some(&format!("token.{}", state.token)) {
            return match token {
                None => refused(400, 3, "etcdserver: user name is empty"),
                Some(_) => refused(401, 16, "etcdserver: invalid auth token"),
            };
        }
        let kvs = |state: &State| -> Vec<Json> {
            let key_value = |(revision, value): &(u64, Vec<u8>)| {
                let (revision, value) = (revision.to_string(), Base64::encode_string(value));
                json!({ "mod_revision": revision, "value": value })
            };
            state.found.iter().map(key_value).collect()
        };
        let mut answer = json!({});
        if path == "kv/range" {
            answer["kvs"] = kvs(&state).into();
        } else if body["compare"].as_array().unwrap().iter().all(|compare| holds(&state, compare)) {
            let value = body["success"][0]["request_put"]["value"].as_str().unwrap();
            state.revision += 1;
            state.found = Some((state.revision, Base64::decode_vec(value).unwrap()));
            answer["succeeded"] = true.into();
            let revision = state.revision.to_string();
            answer["responses"] = json!([{ "response_put": { "header": { "revision": revision } } }]);
            self.changes.send_replace(());
        } else {
            answer["responses"] = json!([{ "response_range": { "kvs": kvs(&state) } }]);
        }
        let State { cluster, revision, .. } = &*state;
        answer["header"] = json!({ "cluster_id": cluster.to_string(), "revision": revision.to_string() });
        (200, answer.to_string())
    }
}

fn holds(state: &State, compare: &Json) -> bool {
    assert_eq!(compare["result"], "EQUAL");
    match (compare["target"].as_str().unwrap(), &state.found) {
        ("CREATE", found) => found.is_none() && compare["create_revision"] == "0",
        ("MOD", Some((revision, _))) => {
            compare["mod_revision"].as_str() == Some(revision.to_string().as_str())
        }
        ("VALUE", Some((_, value))) => compare["value"] == Base64::encode_string(value),
        _ => false,
    }
}

/// Path, token and body of a request.
async fn request(io: &mut TcpStream) -> Option<(String, Option<String>, Json)> {
    let (mut read, mut buffer) = (Vec::new(), vec![0; 4096]);
    loop {
        let text = String::from_utf8_lossy(&read).into_owned();
        if let Some((head, body)) = text.split_once("\r\n\r\n") {
            let header = |name: &str| {
                head.lines().find_map(|line| Some(line.strip_prefix(name)?.strip_prefix(": ")?.to_owned()))
            };
            let length: usize = header("content-length").unwrap().parse().unwrap();
            if body.len() == length {
                let path = head.split(' ').nth(1).unwrap().strip_prefix("/v3/").unwrap().to_owned();
                return Some((path, header("authorization"), serde_json::from_str(body).unwrap()));
            }
        }
        match io.read(&mut buffer).await {
            Ok(0) | Err(_) => return None,
            Ok(bytes) => read.extend_from_slice(&buffer[..bytes]),
        }
    }
}
