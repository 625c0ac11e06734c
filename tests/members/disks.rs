//! Members whose disks are lost, or are another's copy.

use std::path::Path;

use replite::{Db, Error, Role};

use crate::support::{LIMIT, within};
use crate::world::*;

fn copy(from: &Path, to: &Path) {
    let copied = std::process::Command::new("cp").arg("-a").args([from, to]).status().unwrap();
    assert!(copied.success());
}

/// Opens a node again after `lose` did something to its files. It comes back to the others under a
/// new id, and votes.
async fn comes_back_as_a_new_one(world: &World, dbs: &mut [Db], node: usize, lose: impl FnOnce()) {
    let witness = (node + 1) % dbs.len();
    let url = world.url(node);
    let before = id_at(&dbs[witness].members().await.unwrap(), &url).unwrap();
    end([dbs[node].clone()]).await;
    lose();
    dbs[node] = world.open(node).await;
    let after = members_are(&dbs[witness], "three voters with a new one", |view| {
        all_vote(view, 3) && id_at(view, &url).is_some_and(|id| id != before)
    })
    .await;
    assert_eq!(after.members.len(), 3, "{after}");
    let txid = write(dbs, node as i64).await;
    all_have(dbs, txid).await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_member_whose_disk_is_gone_comes_back_as_a_new_one_and_counts() {
    let world = World::new(3);
    let mut dbs = world.open_all().await;
    write(&dbs, 100).await;
    for db in &dbs {
        members_are(db, "three voters", |view| all_vote(view, 3)).await;
    }
    let state = world.state_directory(0);
    comes_back_as_a_new_one(&world, &mut dbs, 0, || std::fs::remove_dir_all(state).unwrap()).await;
    let members = world.members_directory(1);
    comes_back_as_a_new_one(&world, &mut dbs, 1, || std::fs::remove_dir_all(members).unwrap()).await;
    // Both new ones are most of the three now.
    let gone = dbs.remove(2);
    end([gone]).await;
    let txid = write(&dbs, 3).await;
    all_have(&dbs, txid).await;
    assert_eq!(values(&dbs[0]), [100, 0, 1, 3]);
    end(dbs).await;
}

/// The way of operators when most of the members are lost: the last one that is left forgets what
/// was agreed on, too; all begin anew, and one is promoted.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn when_most_lost_their_disks_an_operator_has_all_begin_anew() {
    let world = World::new(3);
    let dbs = world.open_all().await;
    let txid = write(&dbs, 1).await;
    all_have(&dbs, txid).await;
    end(dbs).await;
    for node in [0, 1] {
        std::fs::remove_dir_all(world.members_directory(node)).unwrap();
    }
    let mut dbs = vec![world.open(0).await, world.open(1).await, world.open(2).await];
    comes("why it does not lead", || words(&dbs[2]).contains("no leader of the members")).await;
    let until = std::time::Instant::now() + TIME * 2;
    while std::time::Instant::now() < until {
        assert!(dbs.iter().all(|db| db.role() != Role::Primary));
        tokio::time::sleep(LOOK).await;
    }
    // While one has something of the old ones nothing is begun.
    let operator = world.operator();
    let refused = operator.begin_members().await.unwrap_err();
    eprintln!("refused: {refused}");
    end([dbs.remove(2)]).await;
    std::fs::remove_dir_all(world.members_directory(2)).unwrap();
    dbs.push(world.open(2).await);
    within("the beginning", async {
        while let Err(error) = operator.begin_members().await {
            eprintln!("not yet: {error}");
            tokio::time::sleep(LOOK).await;
        }
    })
    .await;
    members_are(&dbs[0], "three voters", |view| all_vote(view, 3)).await;
    assert!(dbs.iter().all(|db| db.role() != Role::Primary));
    let promotion = within("a promotion", async {
        loop {
            match operator.promotion(world.url(2).as_str()).await {
                Ok(promotion) => return promotion,
                Err(error) => eprintln!("not yet: {error}"),
            }
            tokio::time::sleep(LOOK).await;
        }
    })
    .await;
    within("the primary", promotion.confirm()).await.unwrap();
    assert_eq!(primary(&dbs).await, 2);
    let txid = write(&dbs, 2).await;
    all_have(&dbs, txid).await;
    for db in &dbs {
        assert_eq!(values(db), [1, 2]);
    }
    end(dbs).await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_copy_of_what_members_agreed_on_is_refused() {
    let world = World::new(3);
    let mut dbs = world.open_all().await;
    let txid = write(&dbs, 1).await;
    all_have(&dbs, txid).await;
    let node = 1;
    end([dbs.remove(node)]).await;
    // A backup that is put back.
    let (directory, backup) = (world.members_directory(node), world.dir.path().join("backup"));
    copy(&directory, &backup);
    std::fs::remove_dir_all(&directory).unwrap();
    copy(&backup, &directory);
    let refused = Db::open(world.config(node)).await.unwrap_err();
    let said = refused.to_string();
    eprintln!("{said}");
    assert!(matches!(refused, Error::Unsupported { .. }), "{refused:?}");
    assert!(said.contains("remove") && said.contains("members"), "{said}");
    // What it says helps.
    std::fs::remove_dir_all(&directory).unwrap();
    dbs.insert(node, world.open(node).await);
    members_are(&dbs[0], "three voters", |view| all_vote(view, 3)).await;
    within("a state", dbs[node].wait_for_timeout(txid, LIMIT)).await.unwrap();
    end(dbs).await;
}
