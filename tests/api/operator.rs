//! What an operator does with a lease's store, by calls, and stores that get in the way.

use std::collections::VecDeque;
use std::sync::{Arc, Mutex};
use std::time::Duration;

use replite::lease::{ReadError, Store, StoreFuture, Stored, SwapError, Version};
use replite::operator::{LeaseStands, Operator, OperatorError, RecordView};
use replite::testing::lease::Memory;
use replite::{Config, Db, NodeId, Role, WaitReason, lease};
use serde_json::Value;

use crate::support::*;

/// What becomes of a swap.
#[derive(Clone, Copy, Debug)]
enum Fate {
    Done,
    /// A holder renews the record just before.
    Renewed,
    Away,
    /// It is done, and not said.
    DoneUnsaid,
    /// It is not done, and not said.
    Lost,
}

/// A register that does with each swap what the test says.
#[derive(Clone, Debug)]
struct Fated {
    memory: Memory,
    fates: Arc<Mutex<VecDeque<Fate>>>,
}

impl Fated {
    fn new(memory: &Memory, fates: impl IntoIterator<Item = Fate>) -> Fated {
        Fated { memory: memory.clone(), fates: Arc::new(Mutex::new(fates.into_iter().collect())) }
    }
}

impl Store for Fated {
    fn read(&self) -> StoreFuture<'_, Result<Option<Stored>, ReadError>> {
        self.memory.read()
    }

    fn swap<'a>(
        &'a self,
        expected: Option<&'a Version>,
        record: &'a [u8],
    ) -> StoreFuture<'a, Result<Version, SwapError>> {
        let fate = self.fates.lock().unwrap().pop_front().unwrap_or(Fate::Done);
        Box::pin(async move {
            match fate {
                Fate::Done => {}
                Fate::Renewed => {
                    self.memory.put(self.memory.stored().unwrap().record);
                }
                Fate::Away => return Err(SwapError::Unavailable("it is away".into())),
                Fate::Lost => return Err(SwapError::Unknown("no answer".into())),
                Fate::DoneUnsaid => {
                    self.memory.swap(expected, record).await?;
                    return Err(SwapError::Unknown("no answer".into()));
                }
            }
            self.memory.swap(expected, record).await
        })
    }

    fn lease_time(&self) -> Duration {
        self.memory.lease_time()
    }
}

fn config(dir: &tempfile::TempDir, name: &str, store: impl Store) -> Config {
    std::fs::create_dir_all(dir.path().join(name)).unwrap();
    Config::new(dir.path().join(name).join("app.db"))
        .secret(secret())
        .listen("127.0.0.1:0".parse().unwrap())
        .lease(Arc::new(store) as Arc<dyn Store>)
        .bootstrap(1)
        .migrate(|conn| conn.execute_batch(SCHEMA))
}

async fn leads(db: &Db) {
    within("a primary", db.roles().wait_for(|state| state.role == Role::Primary)).await.unwrap();
}

/// A register with the record of a node that has ended.
async fn released(dir: &tempfile::TempDir) -> Memory {
    let memory = Memory::new();
    let db = Db::open(config(dir, "first", memory.clone())).await.unwrap();
    leads(&db).await;
    db.shutdown().await;
    memory
}

fn record(memory: &Memory) -> Value {
    serde_json::from_slice(&memory.stored().unwrap().record).unwrap()
}

fn operator(store: impl Store) -> Operator {
    Operator::new(store, "default", "app")
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_pause_changes_one_word_and_is_tried_again_while_others_write() {
    let dir = tempfile::tempdir().unwrap();
    let memory = released(&dir).await;
    let before = record(&memory);
    let fates = [Fate::Renewed, Fate::Renewed, Fate::Lost, Fate::Renewed, Fate::Done];
    operator(Fated::new(&memory, fates)).pause().await.unwrap();
    let mut after = record(&memory);
    assert_eq!(after["record"]["paused"], true);
    assert_eq!(after["record"]["attempt"], before["record"]["attempt"], "the holder knows it again");
    assert_ne!(after["checksum"], before["checksum"]);
    after["record"]["paused"] = false.into();
    after["checksum"] = before["checksum"].clone();
    assert_eq!(after, before, "all else is as it was");
    // Done is done, also where the store did not say so.
    operator(Fated::new(&memory, [Fate::DoneUnsaid])).resume().await.unwrap();
    assert_eq!(record(&memory), before);
    let version = memory.stored().unwrap().version;
    operator(memory.clone()).resume().await.unwrap();
    assert_eq!(memory.stored().unwrap().version, version, "nothing was to be done");
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn stores_that_do_not_let_the_record_be_changed_are_told_apart() {
    let dir = tempfile::tempdir().unwrap();
    let memory = released(&dir).await;
    let paused = async |fate: Fate| operator(Fated::new(&memory, [fate; 100])).pause().await;
    let busy = paused(Fate::Renewed).await;
    assert!(matches!(busy, Err(OperatorError::Contended { tries: 10 })), "{busy:?}");
    let away = paused(Fate::Away).await.unwrap_err();
    assert!(away.is_unreachable() && away.to_string().contains("it is away"), "{away}");
    let unknown = paused(Fate::Lost).await;
    assert!(matches!(unknown, Err(OperatorError::Unknown(_))), "{unknown:?}");
    assert_eq!(record(&memory)["record"]["paused"], false);
    let empty = operator(Memory::new()).pause().await;
    assert!(matches!(empty, Err(OperatorError::NoRecord)), "{empty:?}");
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn what_is_no_record_of_this_lease_is_shown_as_what_it_is_and_left_alone() {
    let dir = tempfile::tempdir().unwrap();
    let memory = released(&dir).await;
    let view = operator(memory.clone()).show().await;
    let lease = view.lease().unwrap();
    assert_eq!((lease.state, lease.paused, lease.renewed), (LeaseStands::Released, false, None));
    assert!(view.to_string().contains("given back"), "{view}");
    let json = serde_json::to_value(&view).unwrap();
    assert_eq!((&json["record"]["found"], &json["record"]["state"]), (&"lease".into(), &"released".into()));
    assert!(view.nodes.iter().all(|node| node.problem.as_deref().unwrap().contains("secret")));

    let good = memory.stored().unwrap().record;
    let mut newer = record(&memory);
    newer["format"] = 2.into();
    let mut changed = good.clone();
    let at = changed.windows(5).position(|five| five == b"false").unwrap();
    changed.splice(at..at + 5, *b"true");
    for (bytes, why) in [
        (newer.to_string().into_bytes(), "format 2"),
        (changed, "checksum"),
        (b"hello".to_vec(), "garbled"),
        (b"\x1b[2J\n\"".to_vec(), "garbled"),
        (Vec::new(), "garbled"),
    ] {
        memory.put(bytes.clone());
        let view = operator(memory.clone()).show().await;
        let RecordView::Unusable { why: said, .. } = &view.record else { panic!("{view:?}") };
        assert!(said.contains(why) && !view.to_string().contains('\u{1b}'), "{why}: {said}");
        let refused = operator(memory.clone()).pause().await;
        assert!(matches!(refused, Err(OperatorError::Unusable(_))), "{refused:?}");
        let refused = operator(memory.clone()).move_to(Memory::new(), "there").await;
        assert!(matches!(refused, Err(OperatorError::Unusable(_))), "{refused:?}");
        assert_eq!(memory.stored().unwrap().record, bytes);
    }
    memory.put(good);
    for (cluster, database) in [("other", "app"), ("default", "other")] {
        let view = Operator::new(memory.clone(), cluster, database).show().await;
        let RecordView::Unusable { why, .. } = &view.record else { panic!("{view:?}") };
        assert!(why.contains("is that of"), "{why}");
    }
    let view = operator(Memory::new()).show().await;
    assert_eq!((&view.record, view.nodes.len()), (&RecordView::Nothing, 0));
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn commands_need_a_secret_a_holder_and_a_node_that_is_known() {
    let dir = tempfile::tempdir().unwrap();
    let memory = released(&dir).await;
    let without = operator(memory.clone());
    assert!(matches!(without.handoff(None).await, Err(OperatorError::NoSecret)));
    assert!(matches!(without.promotion(NodeId::from_u128(1)).await, Err(OperatorError::NoSecret)));
    let with = operator(memory.clone()).secret(secret());
    assert!(matches!(with.handoff(None).await, Err(OperatorError::NoHolder)));
    let unknown = with.promotion(NodeId::from_u128(1)).await;
    assert!(matches!(unknown, Err(OperatorError::UnknownNode(_))), "{unknown:?}");
    let bad = with.promotion("https://x").await;
    assert!(matches!(bad, Err(OperatorError::Invalid(_))), "{bad:?}");
    // The one that the record names has ended.
    let id = with.show().await.lease().unwrap().holder.as_ref().unwrap().node;
    let gone = with.promotion(id).await.unwrap_err();
    assert!(gone.is_unreachable(), "{gone}");
}

/// Whichever swap of a move fails, no node leads by two stores, and the next try ends it.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_move_that_broke_off_is_gone_on_with() {
    let dir = tempfile::tempdir().unwrap();
    let memory = released(&dir).await;
    let before = record(&memory);
    let old_moved = |memory: &Memory| record(memory)["record"]["paused"] == true;

    // Nothing was written yet.
    let there = Memory::new();
    let broke = operator(memory.clone()).move_to(Fated::new(&there, [Fate::Away]), "there").await;
    assert!(matches!(broke, Err(OperatorError::Store(_))), "{broke:?}");
    assert_eq!((record(&memory), there.stored()), (before.clone(), None));
    // The copy is there, and the old record has not been replaced.
    for fate in [Fate::Away, Fate::Lost] {
        let broke = operator(Fated::new(&memory, [fate])).move_to(there.clone(), "there").await;
        assert!(broke.is_err());
        assert_eq!(record(&memory), before);
        assert_eq!(record(&there)["record"]["paused"], true, "no node elects itself by it");
    }
    operator(memory.clone()).move_to(there.clone(), "there").await.unwrap();
    assert_eq!(record(&there), before, "as it was");
    assert!(old_moved(&memory));
    let view = operator(memory.clone()).show().await;
    assert!(matches!(&view.record, RecordView::Moved { to, .. } if to == "there"), "{view}");

    // A node at work in the old store after the copy was made.
    let back = Memory::new();
    let under = operator(Fated::new(&there, [Fate::Renewed])).move_to(back.clone(), "back").await;
    assert!(matches!(under, Err(OperatorError::MovedUnder)), "{under:?}");
    assert_eq!((record(&there), &record(&back)["record"]["paused"]), (before.clone(), &Value::Bool(true)));
    // Another lease is never written over.
    let dir = tempfile::tempdir().unwrap();
    let other = released(&dir).await;
    let (here, its) = (there.stored(), other.stored());
    let occupied = operator(there.clone()).move_to(other.clone(), "other").await.unwrap_err();
    assert!(matches!(occupied, OperatorError::Occupied { .. }), "{occupied}");
    assert_eq!((there.stored(), other.stored()), (here, its));
    // What was said last is the end of it, also unsaid.
    let to = Fated::new(&Memory::new(), [Fate::Done, Fate::DoneUnsaid]);
    operator(there.clone()).move_to(to.clone(), "at last").await.unwrap();
    assert_eq!(record(&to.memory), before);
}

/// By another path, say: the mark must not replace the only record that there is.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_lease_is_not_moved_to_the_store_that_it_is_in() {
    let dir = tempfile::tempdir().unwrap();
    let memory = released(&dir).await;
    let moves = || async { operator(memory.clone()).move_to(memory.clone(), "itself").await.unwrap_err() };
    let running = moves().await;
    assert!(matches!(running, OperatorError::Occupied { .. }), "{running}");
    operator(memory.clone()).pause().await.unwrap();
    let before = record(&memory);
    let paused = moves().await;
    assert!(matches!(paused, OperatorError::Invalid(_)), "{paused}");
    assert_eq!(record(&memory), before);
}

/// The mark takes the lease away from all: also from a holder that was cut off from the store, and
/// from an operator who resumes elections by hand.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn no_node_leads_by_a_store_that_the_lease_was_moved_from() {
    let dir = tempfile::tempdir().unwrap();
    let memory = Memory::new();
    let cut = replite::testing::lease::Faulty::new(memory.clone(), 1);
    let db = Db::open(config(&dir, "first", cut.clone())).await.unwrap();
    leads(&db).await;
    let there = Memory::new();
    let renewed = operator(memory.clone()).move_to(there.clone(), "there").await;
    assert!(
        matches!(renewed, Err(OperatorError::Renewed { holder }) if holder == db.node_id()),
        "{renewed:?}"
    );
    assert_eq!(there.stored(), None);
    cut.away(true);
    let mut roles = db.roles();
    within("the end of the lease", roles.wait_for(|state| state.role != Role::Primary)).await.unwrap();
    operator(memory.clone()).move_to(there.clone(), "there").await.unwrap();
    cut.away(false);
    let waits = |reason| move |state: &replite::RoleState| state.waits_for == Some(reason);
    within("the mark", roles.wait_for(waits(WaitReason::Paused))).await.unwrap();
    // By hand, with an editor, and against all advice.
    let there_is_no = operator(memory.clone()).resume().await;
    assert!(matches!(there_is_no, Err(OperatorError::Moved { .. })), "{there_is_no:?}");
    let version = memory.stored().unwrap().version;
    within("lease times", async {
        for _ in 0..3 {
            tokio::time::timeout(Duration::from_secs(1), roles.wait_for(|state| state.role == Role::Primary))
                .await
                .expect_err("it leads by the old store");
        }
    })
    .await;
    assert_eq!(memory.stored().unwrap().version, version, "it is written by no node");
    db.shutdown().await;
    // With the new one it goes on.
    let db = Db::open(config(&dir, "first", there)).await.unwrap();
    leads(&db).await;
    db.shutdown().await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_node_pauses_and_resumes_by_itself_and_one_without_a_lease_says_so() {
    let dir = tempfile::tempdir().unwrap();
    let memory = Memory::new();
    let db = Db::open(config(&dir, "first", memory.clone())).await.unwrap();
    leads(&db).await;
    db.pause_failover().await.unwrap();
    assert_eq!(record(&memory)["record"]["paused"], true);
    let version = memory.stored().unwrap().version;
    within("a renewal", async {
        while memory.stored().unwrap().version == version {
            tokio::task::yield_now().await;
        }
    })
    .await;
    assert_eq!((&record(&memory)["record"]["paused"], db.role()), (&Value::Bool(true), Role::Primary));
    db.resume_failover().await.unwrap();
    assert_eq!(record(&memory)["record"]["paused"], false);
    db.shutdown().await;
    assert!(matches!(db.pause_failover().await, Err(OperatorError::NoLease)));
    let fixed = Db::temporary(|config| config.lease(lease::Fixed::primary())).await.unwrap();
    assert!(matches!(fixed.pause_failover().await, Err(OperatorError::NoLease)));
}
