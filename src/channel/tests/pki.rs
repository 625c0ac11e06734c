//! Certificates: who understands whom, and what is said to the others.

use std::sync::Arc;

use rustls::pki_types::pem::PemObject;
use rustls::pki_types::{CertificateDer, ServerName};
use rustls::{ClientConfig, RootCertStore};
use tokio::io::{AsyncReadExt, AsyncWriteExt, duplex};

use super::ca::{Ca, Leaf};
use crate::channel::*;

const NAMES: [&str; 2] = ["node-1.db.internal", "node-2.db.internal"];

fn certificates() -> Certificates {
    Certificates::new("chain.pem", "key.pem", "roots.pem").names(NAMES)
}

fn bytes(leaf: &Leaf, roots: &str) -> CertificateBytes {
    let (chain, key) = (leaf.chain.clone().into_bytes(), leaf.key.clone().into_bytes());
    CertificateBytes { chain, key, roots: roots.into() }
}

fn with(leaf: &Leaf, roots: &str) -> Channel {
    Channel::certified(&certificates(), &bytes(leaf, roots), None).unwrap()
}

/// What each side makes of it. The side that dialled hears of a refusal when it reads.
async fn speak(client: &Channel, server: &Channel) -> [Result<Binding, String>; 2] {
    let (ours, theirs) = duplex(64 * 1024);
    let dialled = async {
        let (mut io, binding) = client.connect(ours, Traffic::Exchanges).await?;
        io.read_exact(&mut [0; 1]).await?;
        Ok(binding)
    };
    let answered = async {
        let (mut io, binding) = server.accept(theirs).await?;
        io.write_all(b"x").await?;
        io.flush().await?;
        Ok::<_, io::Error>(binding)
    };
    let (dialled, answered) = tokio::join!(dialled, answered);
    let said = |channel: &Channel, error: io::Error| match channel.problem(&error) {
        Some(problem) => problem.to_string(),
        None => panic!("nothing is said of {error:?}"),
    };
    [dialled.map_err(|error| said(client, error)), answered.map_err(|error| said(server, error))]
}

#[tokio::test]
async fn two_with_certificates_of_one_ca_understand_each_other() {
    let ca = Ca::new("one");
    let leaf = ca.leaf(NAMES[0]);
    let (a, b) = (with(&leaf, &ca.pem), with(&ca.leaf(NAMES[1]), &ca.pem));
    assert!(a.own_problem().is_none() && b.own_problem().is_none());
    let [of_client, of_server] = speak(&a, &b).await.map(Result::unwrap);
    assert!(of_client == of_server && of_client.is_private());
    assert_eq!((of_client.client(), of_client.server()), (a.key(), b.key()));
    assert_ne!(a.key(), b.key());
    // A new certificate of the same key is the same node's; one of another key is not.
    let same = with(&ca.renewed(NAMES[0], &leaf), &ca.pem);
    assert_eq!(same.key(), a.key());
    assert_eq!(speak(&b, &same).await.map(Result::unwrap)[0].server(), a.key());
    a.renew(&certificates(), &bytes(&ca.leaf(NAMES[0]), &ca.pem)).unwrap();
    assert_ne!(a.key(), same.key());
    assert_eq!(speak(&a.clone(), &b).await.map(Result::unwrap)[1].client(), a.key());
}

#[tokio::test]
async fn who_has_no_good_certificate_is_refused_and_both_sides_say_why() {
    let (ca, other) = (Ca::new("one"), Ca::new("other"));
    let good = with(&ca.leaf(NAMES[1]), &ca.pem);
    let cases = [
        (other.leaf(NAMES[0]), "no root of this node leads to it", "no root that it has"),
        (Ca::self_signed(NAMES[0]), "no root of this node leads to it", "no root that it has"),
        (ca.expired(NAMES[0]), "it has expired", "has expired, or is not valid yet"),
        (
            ca.leaf("node-9.db.internal"),
            "its own are: node-9.db.internal",
            "valid for no name that it allows",
        ),
    ];
    for (bad, here, there) in cases {
        let bad = with(&bad, &ca.pem);
        assert!(bad.own_problem().unwrap().contains(here), "{:?}", bad.own_problem());
        let [dialled, answered] = speak(&bad, &good).await.map(Result::unwrap_err);
        let [of_good, of_bad] = speak(&good, &bad).await.map(Result::unwrap_err);
        for (refused, told) in [(answered, dialled), (of_good, of_bad)] {
            assert!(
                refused.starts_with("its certificate is refused: ") && refused.contains(here),
                "{refused}"
            );
            assert!(told.starts_with("it refuses this node's certificate: "), "{told}");
            assert!(told.contains(there), "{told}");
        }
    }
}

#[tokio::test]
async fn a_certificate_is_good_for_both_sides_or_for_none() {
    let ca = Ca::new("one");
    let (good, server) = (with(&ca.leaf(NAMES[1]), &ca.pem), with(&ca.server(NAMES[0]), &ca.pem));
    assert!(server.own_problem().unwrap().contains("for servers and for clients"));
    for said in speak(&server, &good).await {
        let said = said.unwrap_err();
        assert!(said.contains("for servers and for clients"), "{said}");
    }
}

#[tokio::test]
async fn raw_keys_and_certificates_do_not_go_together() {
    let ca = Ca::new("one");
    let (certified, raw) = (with(&ca.leaf(NAMES[0]), &ca.pem), Channel::ephemeral(None).unwrap());
    for (client, server) in [(&certified, &raw), (&raw, &certified)] {
        for (said, channel) in speak(client, server).await.into_iter().zip([client, server]) {
            let (said, certified) = (said.unwrap_err(), channel.key() == certified.key());
            let expected = if certified { "it has no certificate" } else { "with certificates only" };
            assert!(said.contains(expected) && said.contains("Config::tls"), "{said}");
        }
    }
}

#[tokio::test]
async fn who_shows_no_certificate_is_refused() {
    let ca = Ca::new("one");
    let server = with(&ca.leaf(NAMES[0]), &ca.pem);
    let mut roots = RootCertStore::empty();
    roots.add(CertificateDer::from_pem_slice(ca.pem.as_bytes()).unwrap()).unwrap();
    let client = ClientConfig::builder_with_provider(Arc::new(rustls::crypto::ring::default_provider()))
        .with_safe_default_protocol_versions()
        .unwrap()
        .with_root_certificates(roots)
        .with_no_client_auth();
    let (ours, theirs) = duplex(64 * 1024);
    let dialled = async {
        let name = ServerName::try_from(NAMES[0]).unwrap();
        let mut io = tokio_rustls::TlsConnector::from(Arc::new(client)).connect(name, ours).await?;
        io.read_exact(&mut [0; 1]).await
    };
    let (dialled, answered) = tokio::join!(dialled, server.accept(theirs));
    assert!(dialled.unwrap_err().to_string().contains("CertificateRequired"));
    let said = server.problem(&answered.unwrap_err()).unwrap().to_string();
    assert!(said.contains("it showed none"), "{said}");
}

#[test]
fn what_can_not_be_used_is_refused_with_its_file() {
    let (ca, certificates) = (Ca::new("one"), certificates());
    let (leaf, stranger) = (ca.leaf(NAMES[0]), ca.leaf(NAMES[0]));
    let refused = |certificates: &Certificates, bytes: &CertificateBytes| {
        let error = Channel::certified(certificates, bytes, None).unwrap_err();
        assert!(matches!(error, Error::Config(_)), "{error:?}");
        error.to_string()
    };
    let leaf_with = |change: &dyn Fn(&mut CertificateBytes)| {
        let mut bytes = bytes(&leaf, &ca.pem);
        change(&mut bytes);
        refused(&certificates, &bytes)
    };
    let said = leaf_with(&|bytes| bytes.chain = b"no PEM".to_vec());
    assert!(said.contains("chain.pem") && said.contains("no certificate"), "{said}");
    let said = leaf_with(&|bytes| bytes.chain.truncate(200));
    assert!(said.contains("chain.pem"), "{said}");
    let said = leaf_with(&|bytes| bytes.roots.clear());
    assert!(said.contains("roots.pem") && said.contains("no certificate"), "{said}");
    let said = leaf_with(&|bytes| bytes.key = bytes.chain.clone());
    assert!(said.contains("key.pem") && said.contains("no private key"), "{said}");
    let said = leaf_with(&|bytes| bytes.key = stranger.key.clone().into_bytes());
    assert!(
        said.contains("key.pem") && said.contains("not the key of the certificate in chain.pem"),
        "{said}"
    );
    let named = certificates.clone().names(["no name"]);
    assert!(refused(&named, &bytes(&leaf, &ca.pem)).contains("\"no name\" is neither"));
    // What was in use stays in use.
    let channel = with(&leaf, &ca.pem);
    let key = channel.key();
    assert!(channel.renew(&certificates, &bytes(&stranger, "")).is_err());
    assert_eq!(channel.key(), key);
}
