//! A primary whose application is behind nginx with a certificate.

use std::path::Path;

use http::Request;
use rcgen::{BasicConstraints, CertificateParams, IsCa, Issuer, KeyPair, SanType};

use crate::app::*;
use crate::http_support::*;
use crate::support::*;

/// Writes an authority's certificate, and one with its key for 127.0.0.1.
fn certificates(dir: &Path) {
    let (authority, key) = (KeyPair::generate().unwrap(), KeyPair::generate().unwrap());
    let mut roots = CertificateParams::new(Vec::new()).unwrap();
    roots.is_ca = IsCa::Ca(BasicConstraints::Unconstrained);
    std::fs::write(dir.join("roots.pem"), roots.self_signed(&authority).unwrap().pem()).unwrap();
    let mut server = CertificateParams::new(Vec::new()).unwrap();
    server.subject_alt_names = vec![SanType::IpAddress([127, 0, 0, 1].into())];
    let certificate = server.signed_by(&key, &Issuer::new(roots, authority)).unwrap();
    std::fs::write(dir.join("server.pem"), certificate.pem()).unwrap();
    std::fs::write(dir.join("server.key"), key.serialize_pem()).unwrap();
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
#[ignore = "needs nginx"]
async fn a_write_on_a_replica_goes_to_a_primary_behind_nginx_over_https() {
    let dir = tempfile::tempdir().unwrap();
    certificates(dir.path());
    let d = dir.path().display();
    let [door, primary_port] = [own_port(), own_port()];
    let server = format!(
        "server {{
             listen 127.0.0.1:{door} ssl http2;
             ssl_certificate {d}/server.pem; ssl_certificate_key {d}/server.key;
             location / {{ proxy_pass http://127.0.0.1:{primary_port}; proxy_set_header Host $http_host; }}
         }}"
    );
    let _nginx = nginx(dir.path(), door, &server);
    let advertised = format!("https://127.0.0.1:{door}");
    let primary = node(dir.path(), primary_port, None, "", &[("ADVERTISE", &advertised)]);
    primary.expect("ready");
    let follows = format!("http://127.0.0.1:{primary_port}");
    let roots = dir.path().join("roots.pem");
    let roots = ("ROOTS", roots.to_str().unwrap());
    let http = Http::new();
    for (extra, works) in [(&[roots][..], true), (&[roots, ("HTTP2", "yes")], true), (&[], false)] {
        let port = own_port();
        let replica = node(dir.path(), port, None, &follows, extra);
        replica.expect("ready");
        let url = format!("http://127.0.0.1:{port}");
        let note = format!("note-{port}");
        let added = within("an answer", http.send(Request::post(&url).body(note).unwrap())).await.unwrap();
        if works {
            assert_eq!(added.status, 201, "{added:?}");
            let read = Request::get(format!("{url}/?note-{port}"));
            let read = read.header("cookie", added.cookie().expect("a token")).body("").unwrap();
            let read = within("an answer", http.send(read)).await.unwrap();
            assert_eq!((read.status, read.text().as_str()), (200, "1"), "{read:?}");
        } else {
            assert_eq!((added.status, added.header("replite-outcome")), (503, "not-executed"), "{added:?}");
        }
        tokio::task::block_in_place(|| replica.end());
    }
    let notes = plain(&database(dir.path(), primary_port));
    let notes: i64 = notes.query_row("SELECT count(*) FROM notes", [], |row| row.get(0)).unwrap();
    assert_eq!(notes, 2, "each once, and none without a proof of the name");
    tokio::task::block_in_place(|| primary.end());
}
