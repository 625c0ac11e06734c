//! What a node tells of its history.

use replite::testing::Cluster;
use replite::{Db, Epoch, Error, Txid};

fn nothing(_: &Db) -> axum::Router {
    axum::Router::new()
}

#[tokio::test]
async fn the_retained_transactions_are_listed_alike_on_every_node() {
    let cluster = Cluster::start(2)
        .config(|config| config.migrate(|conn| conn.execute_batch("CREATE TABLE IF NOT EXISTS t (v)")))
        .app(nothing)
        .await
        .unwrap();
    let begin = std::time::SystemTime::now();
    let mut committed = Vec::new();
    for size in [1, 100_000] {
        let insert = move |tx: &mut replite::rusqlite::Transaction<'_>| {
            Ok::<_, Error>(tx.execute("INSERT INTO t VALUES (randomblob(?1))", [size])?)
        };
        committed.push(cluster.node(0).db().write(insert).await.unwrap().txid.unwrap());
    }
    cluster.caught_up().await.unwrap();
    let before = Txid::new(committed[0].epoch(), committed[0].number() - 1);
    let primary = cluster.node(0).db().transactions(Some(before), 100).await.unwrap();
    assert_eq!(primary.iter().map(|t| t.position.txid()).collect::<Vec<_>>(), committed);
    assert_eq!(cluster.node(1).db().transactions(Some(before), 100).await.unwrap(), primary);
    assert!(primary[1].changed_pages > 20 && primary[1].log_bytes > 80_000, "{primary:?}");
    assert!(primary.iter().all(|t| t.time >= begin - std::time::Duration::from_secs(1)));
    assert_eq!(primary[1].position, cluster.node(0).db().position().unwrap());
    let newest = cluster.node(0).db().transactions(Some(committed[1]), 100).await.unwrap();
    assert!(newest.is_empty());
    let elsewhere = Txid::new(Epoch::new(1, 7), 1);
    let lost = cluster.node(0).db().transactions(Some(elsewhere), 100).await;
    assert!(matches!(lost, Err(Error::Lost { .. })));
    cluster.shutdown().await;
}
