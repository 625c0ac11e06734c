//! What the application does at a change of its node's role.

use std::sync::atomic::{AtomicU32, Ordering};

use super::*;
use crate::ends::comes;
use crate::status::Event;

/// A replica of a primary that steps down, with this done at its promotion.
async fn promotes(dir: &tempfile::TempDir, greet: impl FnOnce(Config) -> Config) -> [Db; 2] {
    let one = Db::open(config(&dir.path().join("a.db"))).await.unwrap();
    let follows = Fixed::replica_of(&one.node().addresses.replication);
    let two = Db::open(greet(config(&dir.path().join("b.db")).lease(follows))).await.unwrap();
    two.ready().await.unwrap();
    let txid = write(&[one.clone(), one.clone()]).await;
    two.wait_for_timeout(txid, LIMIT).await.unwrap();
    [one, two]
}

#[tokio::test(flavor = "multi_thread")]
async fn any_connection_writes_while_the_node_is_promoted_and_no_request_does() {
    let dir = tempfile::tempdir().unwrap();
    let seen = Arc::new(Mutex::new(None));
    let saw = seen.clone();
    let [one, two] = promotes(&dir, |config| {
        config.on_promote(move |db| {
            let saw = saw.clone();
            async move {
                let role = db.role();
                let txid = write(&[db.clone(), db.clone()]).await;
                let path = db.path().to_path_buf();
                let foreign = tokio::task::spawn_blocking(move || {
                    let other = rusqlite::Connection::open(path).unwrap();
                    other.execute_batch("INSERT INTO t DEFAULT VALUES").unwrap();
                });
                foreign.await.unwrap();
                // As a handler of a request.
                let tokens = crate::token::Tokens::new(db.inner.node.clone());
                let session = crate::session::Session::new(Arc::new(tokens), None, None);
                let insert = |tx: &mut Transaction<'_>| {
                    tx.execute("INSERT INTO t DEFAULT VALUES", []).map_err(Error::from)
                };
                let refused = session.clone().scope(db.write(insert)).await;
                assert!(matches!(refused, Err(Error::NotPrimary { .. })), "{refused:?}");
                assert!(session.primary_needed());
                *saw.lock().unwrap() = Some((role, txid));
                Ok::<_, Error>(())
            }
        })
    })
    .await;
    let roles = two.roles();
    one.demote(&two.node().addresses.replication).await.unwrap();
    two.promote().await.unwrap();
    let (role, txid) = seen.lock().unwrap().take().unwrap();
    assert_eq!((role, txid.epoch()), (Role::Promoting, two.roles().borrow_and_update().epoch));
    assert!(roles.has_changed().unwrap());
    assert_eq!(rows(&two), 3);
    // What came before the node led is no less in its history.
    let txid = write(&[two.clone(), two.clone()]).await;
    one.wait_for_timeout(txid, LIMIT).await.unwrap();
    assert_eq!(rows(&one), 4);
    for db in [one, two] {
        db.shutdown().await;
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn a_promotion_that_fails_leaves_a_replica_and_tells_it() {
    type Outcome = fn() -> std::result::Result<(), &'static str>;
    let fails: [(&str, Outcome); 3] = [
        ("by intent", || Err("by intent")),
        ("a panic: boom", || panic!("boom")),
        ("longer than", || Ok(())),
    ];
    for (what, outcome) in fails {
        let dir = tempfile::tempdir().unwrap();
        let left = Arc::new(AtomicU32::new(0));
        let leaves = left.clone();
        let [one, two] = promotes(&dir, |config| {
            let hangs = what == "longer than";
            let limit = Duration::from_millis(if hangs { 100 } else { 60_000 });
            config
                .role_timeout(limit)
                .on_promote(move |db| async move {
                    write(&[db.clone(), db.clone()]).await;
                    if hangs {
                        std::future::pending::<()>().await;
                    }
                    outcome()
                })
                .on_demote(move |_| {
                    leaves.fetch_add(1, Ordering::AcqRel);
                    async { Ok::<_, Error>(()) }
                })
        })
        .await;
        let mut events = two.events();
        one.demote(&two.node().addresses.replication).await.unwrap();
        let refused = two.promote().await;
        assert!(
            matches!(&refused, Err(error @ Error::OnPromote(_)) if error.to_string().contains(what)),
            "{refused:?}"
        );
        assert_eq!(two.role(), Role::Replica, "{what}");
        assert!(two.inner.node.failure().is_none());
        comes("on_demote", || left.load(Ordering::Acquire) == 1).await;
        let told = async {
            loop {
                if let Event::PromotionFailed { why, .. } = events.next().await.unwrap() {
                    break why;
                }
            }
        };
        let why = tokio::time::timeout(LIMIT, told).await.unwrap();
        assert!(why.contains(what), "{why}");
        let insert =
            |tx: &mut Transaction<'_>| Ok::<_, Error>(tx.execute("INSERT INTO t DEFAULT VALUES", [])?);
        assert!(matches!(two.write(insert).await, Err(Error::NotPrimary { .. })));
        // It is whole: what it committed is history, and the other can lead it on.
        assert_eq!(rows(&two), 2);
        let follower = two.inner.supervisor.prepare().await.unwrap().unwrap();
        assert_eq!(follower.number(), two.position().unwrap().number());
        one.promote().await.unwrap();
        two.inner.supervisor.follow(Some(endpoint(&one))).await.unwrap();
        let txid = write(&[one.clone(), one.clone()]).await;
        two.wait_for_timeout(txid, LIMIT).await.unwrap();
        assert_eq!(rows(&one), rows(&two), "{what}");
        for db in [one, two] {
            db.shutdown().await;
        }
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn the_first_primary_is_greeted_too_and_what_it_says_ends_the_opening() {
    let dir = tempfile::tempdir().unwrap();
    let db = Db::open(config(&dir.path().join("a.db")).on_promote(|db| async move {
        assert_eq!(db.role(), Role::Promoting);
        write(&[db.clone(), db.clone()]).await;
        Ok::<_, Error>(())
    }))
    .await
    .unwrap();
    assert_eq!((db.role(), rows(&db)), (Role::Primary, 1));
    db.shutdown().await;
    drop(db);
    let fails = config(&dir.path().join("a.db")).on_promote(|_| async { Err::<(), _>("by intent") });
    let refused = Db::open(fails).await;
    assert!(matches!(refused, Err(Error::OnPromote(_))), "{refused:?}");
    // It is closed, and free.
    let again = Db::open(config(&dir.path().join("a.db"))).await.unwrap();
    again.shutdown().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_hook_keeps_no_database_open_and_the_close_waits_for_none() {
    let dir = tempfile::tempdir().unwrap();
    let [one, two] = promotes(&dir, |config| {
        config
            .on_promote(|_| async {
                std::future::pending::<()>().await;
                Ok::<_, Error>(())
            })
            .on_demote(|_| async { Ok::<_, Error>(()) })
    })
    .await;
    let left = Arc::downgrade(&one.inner);
    let promoted = {
        let two = two.clone();
        tokio::spawn(async move { two.promote().await })
    };
    comes("it is being promoted", || two.role() == Role::Promoting && two.inner.writer.is_open()).await;
    tokio::time::timeout(LIMIT, two.shutdown()).await.unwrap();
    assert!(matches!(promoted.await.unwrap(), Err(Error::ShutDown)));
    drop((one, two));
    comes("no handle is left", || left.strong_count() == 0).await;
    let again = Db::open(config(&dir.path().join("b.db"))).await.unwrap();
    again.shutdown().await;
}

/// What ends and what begins at the application never overlap.
#[tokio::test(flavor = "multi_thread")]
async fn a_promotion_waits_for_what_the_application_ends() {
    let dir = tempfile::tempdir().unwrap();
    let (gate, at_work) = (Arc::new(tokio::sync::Semaphore::new(0)), Arc::new(AtomicU32::new(0)));
    let (opens, ending, begun) = (gate.clone(), at_work.clone(), at_work.clone());
    let one = Db::open(
        config(&dir.path().join("a.db"))
            .on_promote(move |_| {
                assert_eq!(begun.fetch_add(1, Ordering::AcqRel), 0, "what was before has not ended");
                async { Ok::<_, Error>(()) }
            })
            .on_demote(move |_| {
                let (opens, ending) = (opens.clone(), ending.clone());
                async move {
                    opens.acquire().await.unwrap().forget();
                    ending.fetch_sub(1, Ordering::AcqRel);
                    Ok::<_, Error>(())
                }
            }),
    )
    .await
    .unwrap();
    // The node does not wait for it.
    one.inner.supervisor.demote().await.unwrap();
    assert_eq!((one.role(), at_work.load(Ordering::Acquire)), (Role::Replica, 1));
    let promoted = {
        let one = one.clone();
        tokio::spawn(async move { one.promote().await })
    };
    comes("it is being promoted", || one.role() == Role::Promoting && one.inner.writer.is_open()).await;
    gate.add_permits(1);
    promoted.await.unwrap().unwrap();
    assert_eq!((one.role(), at_work.load(Ordering::Acquire)), (Role::Primary, 1));
    one.shutdown().await;
}
