//! Azure's emulator `azurite` as a process, where it is installed. It is a package of npm.

use std::env;
use std::io;
use std::net::SocketAddr;
use std::path::PathBuf;
use std::process::Stdio;
use std::time::{Duration, SystemTime};

use hmac::{Hmac, KeyInit, Mac};
use sha2::Sha256;
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::TcpStream;
use tokio::process::{Child, Command};

/// The one container.
pub const CONTAINER: &str = "leases";
/// The account and key that the emulator has, which are the same everywhere.
const ACCOUNT: &str = "devstoreaccount1";
const KEY: &str = "Eby8vdM02xNOcqFlqUwJPLlmEtlCDXJ1OUzFT50uSRZ6IFsuFq2UVErCz4I6tq/K1SZFPTOtr/KBHBeksoGMGw==";

/// The longest that it takes to listen, or to answer.
const LIMIT: Duration = Duration::from_secs(30);

/// An emulator with one container, in a directory of its own. Dropped, it is killed.
#[derive(Debug)]
pub struct Azurite {
    _root: tempfile::TempDir,
    _child: Child,
    address: SocketAddr,
}

/// Where `azurite-blob` is: the file that the variable `AZURITE` names, or one on the path.
fn binary() -> Option<PathBuf> {
    if let Some(named) = env::var_os("AZURITE") {
        return Some(named.into());
    }
    let path = env::var_os("PATH")?;
    env::split_paths(&path).map(|place| place.join("azurite-blob")).find(|file| file.is_file())
}

impl Azurite {
    /// Starts one; none where it is not installed.
    ///
    /// # Errors
    /// The system's, and an emulator that does not listen within 30 s.
    pub async fn start() -> io::Result<Option<Azurite>> {
        let Some(binary) = binary() else { return Ok(None) };
        let root = tempfile::tempdir()?;
        let port = std::net::TcpListener::bind("127.0.0.1:0")?.local_addr()?.port();
        let address = SocketAddr::from(([127, 0, 0, 1], port));
        let child = Command::new(binary)
            .args(["--silent", "--skipApiVersionCheck", "--disableTelemetry"])
            .args(["--blobHost", "127.0.0.1", "--blobPort", &port.to_string()])
            .arg("--location")
            .arg(root.path())
            .stdin(Stdio::null())
            .stdout(Stdio::null())
            .kill_on_drop(true)
            .spawn()?;
        let azurite = Azurite { _root: root, _child: child, address };
        tokio::time::timeout(LIMIT, azurite.make_container()).await??;
        Ok(Some(azurite))
    }

    /// What a client needs to reach it, by the names of `object_store`'s options.
    #[must_use]
    pub fn options(&self) -> Vec<(&'static str, String)> {
        vec![
            ("azure_storage_account_name", ACCOUNT.into()),
            ("azure_storage_account_key", KEY.into()),
            ("azure_storage_endpoint", format!("http://{}/{ACCOUNT}", self.address)),
            ("azure_allow_http", "true".into()),
        ]
    }

    async fn make_container(&self) -> io::Result<()> {
        let mut stream = loop {
            match TcpStream::connect(self.address).await {
                Ok(stream) => break stream,
                Err(_) => tokio::time::sleep(Duration::from_millis(50)).await,
            }
        };
        let date = httpdate::fmt_http_date(SystemTime::now());
        let headers = format!("x-ms-date:{date}\nx-ms-version:2023-11-03\n");
        // Of eleven headers none is there.
        let resource = format!("/{ACCOUNT}/{ACCOUNT}/{CONTAINER}\nrestype:container");
        let signed = format!("PUT{}{headers}{resource}", "\n".repeat(12));
        let key = base64_simd::STANDARD.decode_to_vec(KEY).map_err(io::Error::other)?;
        let mut mac = Hmac::<Sha256>::new_from_slice(&key).map_err(io::Error::other)?;
        mac.update(signed.as_bytes());
        let signature = base64_simd::STANDARD.encode_to_string(mac.finalize().into_bytes());
        let request = format!(
            "PUT /{ACCOUNT}/{CONTAINER}?restype=container HTTP/1.1\r\nhost: {}\r\nx-ms-date: {date}\r\n\
             x-ms-version: 2023-11-03\r\nauthorization: SharedKey {ACCOUNT}:{signature}\r\n\
             content-length: 0\r\nconnection: close\r\n\r\n",
            self.address
        );
        stream.write_all(request.as_bytes()).await?;
        let mut answer = String::new();
        stream.read_to_string(&mut answer).await?;
        if answer.starts_with("HTTP/1.1 201") { Ok(()) } else { Err(io::Error::other(answer)) }
    }
}
