//! Nodes with certificates of a PKI: they follow each other, and certificates and roots are
//! replaced on the disk while the nodes run.

use std::path::Path;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Duration;

use replite::{Certificates, Config, Db, Error, Event, lease};

use crate::ca::{Ca, Leaf};
use crate::support::{self, LIMIT, Wire, address, count, insert, until, within};

const NAMES: [&str; 2] = ["node-1.db.internal", "node-2.db.internal"];

/// A file that is replaced as a whole, for its owner alone.
fn put(dir: &Path, name: &str, text: &str) {
    use std::os::unix::fs::OpenOptionsExt;
    let (new, mut options) = (dir.join("new"), std::fs::File::options());
    let mut file = options.write(true).create_new(true).mode(0o600).open(&new).unwrap();
    std::io::Write::write_all(&mut file, text.as_bytes()).unwrap();
    std::fs::rename(new, dir.join(name)).unwrap();
}

fn put_leaf(dir: &Path, leaf: &Leaf) {
    put(dir, "node.pem", &leaf.chain);
    put(dir, "node.key", &leaf.key);
}

fn certificates(dir: &Path, leaf: &Leaf, roots: &str) -> Certificates {
    std::fs::create_dir_all(dir).unwrap();
    put_leaf(dir, leaf);
    put(dir, "roots.pem", roots);
    Certificates::new(dir.join("node.pem"), dir.join("node.key"), dir.join("roots.pem")).names(NAMES)
}

fn replica(dir: &Path, name: &str, url: &str) -> Config {
    support::replica(&dir.join(name), url)
}

/// Both nodes, after `change` was made to the files of each, say that they use what is there now.
async fn taken(nodes: &[(&Db, &Path)], change: impl Fn(&Path)) {
    let events: Vec<_> = nodes.iter().map(|(db, _)| db.events()).collect();
    nodes.iter().for_each(|(_, files)| change(files));
    for mut events in events {
        within("the certificates are taken", async {
            while !matches!(events.next().await, Some(Event::CertificatesTaken)) {}
        })
        .await;
    }
}

async fn shut_down(nodes: impl IntoIterator<Item = Db>) {
    for db in nodes {
        within("shutdown", db.shutdown()).await;
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_ca_is_replaced_while_a_client_writes() {
    let dir = tempfile::tempdir().unwrap();
    let dir = dir.path();
    let (old, new) = (Ca::new("old"), Ca::new("new"));
    let files = [dir.join("p"), dir.join("r")];
    let config = support::primary(&dir.join("p.db"), 0);
    let p = Db::open(config.tls(certificates(&files[0], &old.leaf(NAMES[0]), &old.pem))).await.unwrap();
    let wire = Wire::start(address(&p.node().addresses.replication), Duration::ZERO).await;
    // Its way is through the HTTP side of the listener: the channel is in a request there.
    let r = replica(dir, "r.db", &format!("http://{}", wire.address));
    let r = Db::open(r.tls(certificates(&files[1], &old.leaf(NAMES[1]), &old.pem))).await.unwrap();
    within("ready", r.ready()).await.unwrap();
    let stop = Arc::new(AtomicBool::new(false));
    let client = tokio::spawn({
        let (p, stop) = (p.clone(), stop.clone());
        async move {
            let mut written = 0;
            while !stop.load(Ordering::Relaxed) {
                insert(&p, "client", written).await;
                written += 1;
            }
            written
        }
    });
    let nodes = [(&p, &*files[0]), (&r, &*files[1])];
    let follows = async || {
        wire.cut();
        let txid = insert(&p, "test", 0).await;
        r.wait_for_timeout(txid, LIMIT).await.unwrap();
        1
    };
    let mut written = follows().await;
    let both = format!("{}{}", old.pem, new.pem);
    taken(&nodes, |files| put(files, "roots.pem", &both)).await;
    written += follows().await;
    for (node, name) in nodes.iter().zip(NAMES) {
        taken(std::slice::from_ref(node), |files| put_leaf(files, &new.leaf(name))).await;
        written += follows().await;
    }
    taken(&nodes, |files| put(files, "roots.pem", &new.pem)).await;
    written += follows().await;
    stop.store(true, Ordering::Relaxed);
    written += client.await.unwrap();
    within("all is there", r.wait_for_timeout(p.position().unwrap().txid(), LIMIT)).await.unwrap();
    assert_eq!((count(&p), count(&r)), (written, written));
    shut_down([r, p]).await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn bad_files_are_told_and_the_old_ones_stay_in_use() {
    let dir = tempfile::tempdir().unwrap();
    let (dir, ca) = (dir.path(), Ca::new("ca"));
    let (files, leaf) = (dir.join("p"), ca.leaf(NAMES[0]));
    let config = support::primary(&dir.join("p.db"), 0);
    let p = Db::open(config.tls(certificates(&files, &leaf, &ca.pem))).await.unwrap();
    assert_eq!(p.status().problem, None);
    let says = |what: &str| p.status().problem.is_some_and(|problem| problem.contains(what));
    put(&files, "node.key", &ca.leaf(NAMES[0]).key);
    until("it is told", || says("not the key of the certificate") && says("stay in use"));
    let r = replica(dir, "r.db", &p.node().addresses.replication);
    let r = Db::open(r.tls(certificates(&dir.join("r"), &ca.leaf(NAMES[1]), &ca.pem))).await.unwrap();
    within("the old ones are in use", r.ready()).await.unwrap();
    std::fs::remove_file(files.join("node.pem")).unwrap();
    until("it is told", || says("node.pem"));
    put_leaf(&files, &leaf);
    until("all is well again", || p.status().problem.is_none());
    // What others refuse is told, too, and used.
    put_leaf(&files, &ca.expired(NAMES[0]));
    until("it is told", || says("it has expired"));
    shut_down([r, p]).await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn who_has_no_good_certificate_does_not_follow_and_is_told_why() {
    let dir = tempfile::tempdir().unwrap();
    let (dir, ca, other) = (dir.path(), Ca::new("ca"), Ca::new("other"));
    let config = support::primary(&dir.join("p.db"), 0);
    let p = Db::open(config.tls(certificates(&dir.join("p"), &ca.leaf(NAMES[0]), &ca.pem))).await.unwrap();
    let url = p.node().addresses.replication.clone();
    for (door, url) in
        ["http://", "replite://"].map(|scheme| url.replace("replite://", scheme)).iter().enumerate()
    {
        let cases = [
            (Some(other.leaf(NAMES[1])), "it refuses this node's certificate: no root that it has"),
            (
                Some(ca.leaf("node-9.db.internal")),
                "it refuses this node's certificate: the certificate is valid",
            ),
            (None, "it takes peers with certificates only"),
        ];
        for (case, (leaf, why)) in cases.into_iter().enumerate() {
            let mut config = replica(dir, &format!("{door}-{case}.db"), url);
            if let Some(leaf) = leaf {
                config = config.tls(certificates(&dir.join(format!("{door}-{case}")), &leaf, &ca.pem));
            }
            let r = Db::open(config).await.unwrap();
            until(why, || r.status().problem.is_some_and(|problem| problem.contains(why)));
            assert!(r.position().is_none());
            shut_down([r]).await;
        }
    }
    shut_down([p]).await;
}

#[tokio::test]
async fn what_can_not_be_used_is_refused_when_a_database_is_opened() {
    let dir = tempfile::tempdir().unwrap();
    let (dir, ca) = (dir.path(), Ca::new("ca"));
    let open = async |certificates: Certificates| {
        let config = Config::new(dir.join("p.db")).secret(support::secret()).lease(lease::Fixed::primary());
        match Db::open(config.tls(certificates)).await {
            Ok(db) => shut_down([db]).await,
            Err(error) => return Some(error),
        }
        None
    };
    let files = dir.join("p");
    let good = certificates(&files, &ca.leaf(NAMES[0]), &ca.pem);
    let missing = Certificates::new(files.join("none"), files.join("node.key"), files.join("roots.pem"));
    assert!(matches!(open(missing.clone()).await, Some(Error::Config(why)) if why.contains("names")));
    assert!(matches!(open(missing.names(NAMES)).await, Some(Error::Io { .. })));
    std::fs::set_permissions(files.join("node.key"), std::os::unix::fs::PermissionsExt::from_mode(0o644))
        .unwrap();
    assert!(matches!(open(good.clone()).await, Some(Error::Config(why)) if why.contains("chmod 600")));
    put(&files, "node.key", "");
    assert!(matches!(open(good.clone()).await, Some(Error::Config(why)) if why.contains("no private key")));
    put_leaf(&files, &ca.expired(NAMES[0]));
    assert!(open(good).await.is_none(), "expired: it is told");
}
