//! The server: S3 over a directory, each request after the other, with faults on demand.

use std::env;
use std::error::Error;
use std::fs;
use std::io::{self, Read as _};
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::Duration;

use bytes::Bytes;
use http::{Request, Response, StatusCode};
use http_body_util::{BodyExt, Full, Limited};
use hyper::body::Incoming;
use hyper::server::conn::http1;
use hyper::service::service_fn;
use hyper_util::rt::TokioIo;
use s3s::auth::SimpleAuth;
use s3s::dto::{
    DeleteObjectInput, DeleteObjectOutput, DeleteObjectsInput, DeleteObjectsOutput, GetObjectInput,
    GetObjectOutput, HeadObjectInput, HeadObjectOutput, PutObjectInput, PutObjectOutput,
};
use s3s::service::{S3Service, S3ServiceBuilder};
use s3s::{S3, S3Request, S3Response, S3Result};
use s3s_fs::FileSystem;
use tokio::io::{AsyncBufReadExt, AsyncReadExt, AsyncWriteExt, BufReader};
use tokio::net::{TcpListener, TcpStream};
use tokio::sync::Mutex;

use super::fault::{Fault, Faults};
use super::{ACCESS_KEY, SECRET_KEY};

/// Longer bodies are refused.
const BODY_MAX: usize = 1 << 20;

type Failure = Box<dyn Error + Send + Sync>;

/// The program: `s3-server DIRECTORY ADDRESS CONTROL-ADDRESS`. It says both addresses in a line,
/// and ends when its input does.
///
/// # Errors
/// Bad arguments, and the system's.
#[tokio::main(flavor = "current_thread")]
pub async fn run() -> Result<(), Failure> {
    let arguments: Vec<String> = env::args().skip(1).collect();
    let [root, address, control] = &arguments[..] else {
        return Err("s3-server DIRECTORY ADDRESS CONTROL-ADDRESS".into());
    };
    let root = PathBuf::from(root);
    let faults = Arc::new(Faults::default());
    let mut builder = S3ServiceBuilder::new(OneByOne::new(&root)?);
    builder.set_auth(SimpleAuth::from_single(ACCESS_KEY, SECRET_KEY));
    let server = Arc::new(Server { s3: builder.build(), faults: faults.clone() });
    let listener = TcpListener::bind(address).await?;
    let control = TcpListener::bind(control).await?;
    println!("{} {}", listener.local_addr()?, control.local_addr()?);
    // The end of the process that started this one, however it ended.
    std::thread::spawn(|| {
        let _ = io::stdin().read_to_end(&mut Vec::new());
        std::process::exit(0);
    });
    loop {
        tokio::select! {
            accepted = listener.accept() => {
                let (stream, server) = (accepted?.0, server.clone());
                tokio::spawn(async move {
                    let service = service_fn(move |request| answer(server.clone(), request));
                    // A client that has gone is no matter of ours.
                    let _ = http1::Builder::new().serve_connection(TokioIo::new(stream), service).await;
                });
            }
            accepted = control.accept() => {
                let (stream, faults) = (accepted?.0, faults.clone());
                tokio::spawn(async move { obey(stream, &faults).await });
            }
        }
    }
}

/// Answers one line.
async fn obey(stream: TcpStream, faults: &Faults) -> Result<(), Failure> {
    let mut stream = BufReader::new(stream);
    let mut line = String::new();
    (&mut stream).take(BODY_MAX as u64).read_line(&mut line).await?;
    let answer = serde_json::to_string(&faults.answer(serde_json::from_str(&line)?))? + "\n";
    stream.write_all(answer.as_bytes()).await?;
    Ok(())
}

struct Server {
    s3: S3Service,
    faults: Arc<Faults>,
}

/// The conditions that a put is executed without.
#[derive(Clone, Copy, PartialEq, Eq)]
enum Ignored {
    IfMatch,
    IfNoneMatch,
}

/// One request. An error ends the connection.
async fn answer(server: Arc<Server>, request: Request<Incoming>) -> Result<Response<Full<Bytes>>, Failure> {
    let (mut head, body) = request.into_parts();
    let body = Limited::new(body, BODY_MAX).collect().await?.to_bytes();
    let fault = server.faults.take(head.method.as_str(), head.uri.path());
    match &fault {
        Some(Fault::Answer { status, code }) => return refusal(*status, code),
        Some(Fault::LoseRequest) => return Err("the request is lost".into()),
        Some(Fault::Hang) => return std::future::pending().await,
        Some(Fault::IgnoreIfMatch) => drop(head.extensions.insert(Ignored::IfMatch)),
        Some(Fault::IgnoreIfNoneMatch) => drop(head.extensions.insert(Ignored::IfNoneMatch)),
        _ => {}
    }
    let delay = match fault {
        Some(Fault::Delay { millis }) => Duration::from_millis(millis),
        _ => Duration::ZERO,
    };
    let executed = server.clone();
    // What has come is executed, also where the client goes.
    let response = tokio::spawn(async move {
        tokio::time::sleep(delay).await;
        let answer = executed.execute(Request::from_parts(head, body)).await;
        if !delay.is_zero() {
            executed.faults.executed_late();
        }
        answer
    });
    let response = response.await??;
    match fault {
        Some(Fault::Executed { status, code }) => refusal(status, &code),
        Some(Fault::LoseAnswer) => Err("the answer is lost".into()),
        Some(Fault::HangExecuted) => std::future::pending().await,
        _ => Ok(response),
    }
}

fn refusal(status: u16, code: &str) -> Result<Response<Full<Bytes>>, Failure> {
    let body = format!(
        "<?xml version=\"1.0\" encoding=\"UTF-8\"?>\n\
         <Error><Code>{code}</Code><Message>A fault on demand.</Message></Error>"
    );
    let mut response = Response::new(Full::from(body));
    *response.status_mut() = StatusCode::from_u16(status)?;
    response
        .headers_mut()
        .insert(http::header::CONTENT_TYPE, http::HeaderValue::from_static("application/xml"));
    Ok(response)
}

impl Server {
    async fn execute(&self, request: Request<Bytes>) -> Result<Response<Full<Bytes>>, Failure> {
        let request = request.map(s3s::Body::from);
        let response = self.s3.call(request).await.map_err(|error| format!("{error:?}"))?;
        let (head, body) = response.into_parts();
        let body = body.collect().await?.to_bytes();
        Ok(Response::from_parts(head, Full::new(body)))
    }
}

/// The file system's S3, which compares and then writes: here no other request comes between.
#[derive(Debug)]
struct OneByOne {
    files: FileSystem,
    root: PathBuf,
    turn: Mutex<()>,
}

impl OneByOne {
    fn new(root: &Path) -> Result<OneByOne, Failure> {
        let files = FileSystem::new(root).map_err(|error| format!("{error:?}"))?;
        let one_by_one = OneByOne { files, root: root.to_owned(), turn: Mutex::default() };
        one_by_one.forget()?;
        Ok(one_by_one)
    }

    /// The file system's S3 makes a bucket that is not there, and says of its objects that they are
    /// not there.
    fn check(&self, bucket: &str) -> S3Result<()> {
        if self.root.join(bucket).is_dir() { Ok(()) } else { Err(s3s::s3_error!(NoSuchBucket)) }
    }

    /// Removes the tags beside the files: they are old where a test wrote the file, or the server
    /// was killed. Without them a tag is made from what is in the file.
    fn forget(&self) -> io::Result<()> {
        for entry in fs::read_dir(&self.root)? {
            let path = entry?.path();
            if path.to_str().is_some_and(|name| name.ends_with(".internal.json")) {
                fs::remove_file(path)?;
            }
        }
        Ok(())
    }
}

#[async_trait::async_trait]
impl S3 for OneByOne {
    async fn put_object(
        &self,
        mut request: S3Request<PutObjectInput>,
    ) -> S3Result<S3Response<PutObjectOutput>> {
        let _turn = self.turn.lock().await;
        self.check(&request.input.bucket)?;
        match request.extensions.get::<Ignored>() {
            Some(Ignored::IfMatch) => request.input.if_match = None,
            Some(Ignored::IfNoneMatch) => request.input.if_none_match = None,
            None => {}
        }
        let put = self.files.put_object(request).await;
        self.forget().map_err(s3s::S3Error::internal_error)?;
        put
    }

    async fn get_object(&self, request: S3Request<GetObjectInput>) -> S3Result<S3Response<GetObjectOutput>> {
        // The file is open when this returns: what is read is what the tag was made from.
        let _turn = self.turn.lock().await;
        self.check(&request.input.bucket)?;
        self.files.get_object(request).await
    }

    async fn head_object(
        &self,
        request: S3Request<HeadObjectInput>,
    ) -> S3Result<S3Response<HeadObjectOutput>> {
        let _turn = self.turn.lock().await;
        self.files.head_object(request).await
    }

    async fn delete_object(
        &self,
        request: S3Request<DeleteObjectInput>,
    ) -> S3Result<S3Response<DeleteObjectOutput>> {
        let _turn = self.turn.lock().await;
        self.files.delete_object(request).await
    }

    async fn delete_objects(
        &self,
        request: S3Request<DeleteObjectsInput>,
    ) -> S3Result<S3Response<DeleteObjectsOutput>> {
        let _turn = self.turn.lock().await;
        self.files.delete_objects(request).await
    }
}
