//! A channel between two keys, and what one that is relayed is worth.

mod ca;
mod pki;

use std::sync::atomic::{AtomicBool, Ordering};

use tokio::io::{AsyncReadExt, AsyncWriteExt, DuplexStream, duplex};

use crate::channel::*;
use crate::files::Paths;
use crate::handshake::{Asker, Knock};
use crate::hex::hex;
use crate::peer::{Incarnation, NodeId};
use crate::secret::{Keyring, Secret};

fn channel() -> Channel {
    Channel::ephemeral(None).unwrap()
}

type Ended = (TlsStream<DuplexStream>, Binding);

async fn both(client: &Channel, server: &Channel) -> (Ended, Ended) {
    let (ours, theirs) = duplex(64 * 1024);
    let (client, server) = tokio::join!(client.connect(ours, Traffic::Exchanges), server.accept(theirs));
    (client.unwrap(), server.unwrap())
}

#[tokio::test]
async fn both_sides_know_the_connection_and_the_others_key() {
    let (a, b) = (channel(), channel());
    let ((mut client, of_client), (mut server, of_server)) = both(&a, &b).await;
    assert_eq!(of_client, of_server);
    assert!(of_client.is_private() && of_client != Binding::NONE);
    assert_eq!((of_client.client(), of_client.server()), (a.key(), b.key()));
    assert_ne!(a.key(), b.key());
    client.write_all(b"frames").await.unwrap();
    let mut came = [0; 6];
    server.read_exact(&mut came).await.unwrap();
    assert_eq!(&came, b"frames");
    // The next connection of the same two is another one.
    let ((_, again), _) = both(&a, &b).await;
    assert_ne!(again, of_client);
    assert_eq!(again.client(), of_client.client());
}

#[tokio::test]
async fn what_is_cut_off_is_told_from_an_end() {
    let (a, b) = (channel(), channel());
    let ((mut client, _), (mut server, _)) = both(&a, &b).await;
    client.shutdown().await.unwrap();
    assert_eq!(server.read(&mut [0; 9]).await.unwrap(), 0, "an end");
    let ((client, _), (mut server, _)) = both(&a, &b).await;
    drop(client);
    assert!(server.read(&mut [0; 9]).await.is_err(), "cut off");
}

#[tokio::test]
async fn a_changed_byte_ends_the_channel() {
    let (a, b) = (channel(), channel());
    let (ours, mut between) = duplex(64 * 1024);
    let (mut beyond, theirs) = duplex(64 * 1024);
    let spoil = Arc::new(AtomicBool::new(false));
    let spoils = spoil.clone();
    let relay = async move {
        let (mut up, mut down) = ([0; 4096], [0; 4096]);
        loop {
            tokio::select! {
                read = between.read(&mut up) => {
                    let read = read.unwrap_or(0);
                    if read == 0 {
                        return;
                    }
                    up[read - 1] ^= u8::from(spoils.load(Ordering::SeqCst));
                    let _ = beyond.write_all(&up[..read]).await;
                }
                read = beyond.read(&mut down) => match read {
                    Ok(read) if read > 0 => drop(between.write_all(&down[..read]).await),
                    _ => return,
                },
            }
        }
    };
    let exchange = async {
        let (client, server) = tokio::join!(a.connect(ours, Traffic::Exchanges), b.accept(theirs));
        let ((mut client, _), (mut server, _)) = (client.unwrap(), server.unwrap());
        spoil.store(true, Ordering::SeqCst);
        client.write_all(b"frames").await.unwrap();
        let error = server.read(&mut [0; 9]).await.unwrap_err();
        assert!(error.to_string().contains("decrypt"), "{error}");
    };
    tokio::join!(relay, exchange);
}

/// One that ends the TLS of both sides passes on what they say, and that is of no worth: the proofs
/// are bound to another connection, and to other keys.
#[tokio::test]
async fn a_knock_that_was_relayed_proves_nothing() {
    let (replica, primary, relay) = (channel(), channel(), channel());
    let ((_, of_replica), _) = both(&replica, &relay).await;
    let (_, (_, of_primary)) = both(&relay, &primary).await;
    let keys = Keyring::new(&[Secret::fixed([7; 32])]).unwrap();
    let asker = Asker {
        keys: keys.clone(),
        cluster: "main".into(),
        database: "app".into(),
        node: NodeId::from_u128(1),
        incarnation: Incarnation::from_u128(2),
        channel: replica,
    };
    let headers = Knock::by(&asker, of_replica).unwrap().headers(&keys).unwrap();
    assert!(Knock::read(&headers, &keys, of_replica).is_ok());
    assert!(Knock::read(&headers, &keys, of_primary).is_err());
    assert!(Knock::read(&headers, &keys, Binding::NONE).is_err());
    // Each part counts: the exporter, and both keys.
    let Binding(Some(bound)) = of_replica else { panic!("no TLS") };
    let (client, server) = (bound.server, bound.client);
    for other in
        [Ends { exporter: [0; EXPORTER_BYTES], ..bound }, Ends { client, ..bound }, Ends { server, ..bound }]
    {
        assert!(Knock::read(&headers, &keys, Binding(Some(other))).is_err());
    }
}

#[tokio::test]
async fn what_is_no_tls_is_refused() {
    let (mut ours, theirs) = duplex(4096);
    ours.write_all(b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n").await.unwrap();
    assert!(channel().accept(theirs).await.is_err());
    assert!(Channel::open().accept(duplex(1).0).await.unwrap_err().to_string().contains("feature `tls`"));
}

#[test]
fn a_key_stays_with_its_node_and_not_with_a_copy() {
    let dirs = [tempfile::tempdir().unwrap(), tempfile::tempdir().unwrap()];
    let [one, two] = [0, 1].map(|at| Paths::fresh(dirs[at].path()));
    let (node, other) = (NodeId::from_u128(1), NodeId::from_u128(2));
    let key = |paths: &Paths, node| {
        let key = ChannelKey::of_node(paths, node).unwrap();
        assert_eq!(format!("{key:?}"), "ChannelKey(..)");
        Channel::new(&key, None).unwrap().key().unwrap()
    };
    let made = key(&one, node);
    assert_eq!(key(&one, node), made);
    #[cfg(unix)]
    {
        use std::os::unix::fs::PermissionsExt;
        let mode = || std::fs::metadata(one.channel_key()).unwrap().permissions().mode() & 0o777;
        assert_eq!(mode(), 0o600);
        std::fs::set_permissions(one.channel_key(), std::fs::Permissions::from_mode(0o664)).unwrap();
        assert_eq!((key(&one, node), mode()), (made, 0o600));
    }
    std::fs::copy(one.channel_key(), two.channel_key()).unwrap();
    let copy = key(&two, other);
    assert_ne!(copy, made, "another node has another key");
    assert_eq!(key(&two, other), copy);
    // What is damaged is told, and left alone.
    let whole = std::fs::read(one.channel_key()).unwrap();
    for at in [0, 9, 20, whole.len() - 1] {
        let mut flipped = whole.clone();
        flipped[at] ^= 4;
        std::fs::write(one.channel_key(), &flipped).unwrap();
        let error = ChannelKey::of_node(&one, node).unwrap_err();
        assert!(matches!(error, Error::Corrupt { .. } | Error::Newer { .. }), "byte {at}: {error}");
        assert_eq!(std::fs::read(one.channel_key()).unwrap(), flipped);
    }
    assert_eq!(hex(made.as_bytes()), made.to_string());
}
