//! Random calls, compared with what is in memory of them.

use proptest::prelude::*;

use super::*;

#[derive(Clone, Debug)]
enum Op {
    Append { entries: u64, elected: bool },
    Truncate { keep: u8 },
    Snapshot { apply: u8 },
    Purge { part: u8 },
    Vote,
    Reopen,
}

fn op() -> impl Strategy<Value = Op> {
    prop_oneof![
        6 => (1..5u64, prop::bool::weighted(0.2))
            .prop_map(|(entries, elected)| Op::Append { entries, elected }),
        2 => any::<u8>().prop_map(|keep| Op::Truncate { keep }),
        2 => any::<u8>().prop_map(|apply| Op::Snapshot { apply }),
        2 => any::<u8>().prop_map(|part| Op::Purge { part }),
        1 => Just(Op::Vote),
        2 => Just(Op::Reopen),
    ]
}

/// What the files must have, and the state that was applied.
struct Model {
    seen: View,
    applied: Agreed,
}

impl Model {
    fn next(&self) -> u64 {
        let last = self.seen.log.last().map(|entry| entry.log_id).or(self.seen.purged);
        last.map_or(0, |last| last.index + 1)
    }

    fn term(&self) -> u64 {
        self.seen.vote.map_or(0, |vote| vote.leader_id.term)
    }

    /// The part of the log that was not applied.
    fn open_end(&self) -> &[LogEntry] {
        let applied = self.seen.log.iter().filter(|entry| Some(entry.log_id) <= self.applied.last_applied);
        &self.seen.log[applied.count()..]
    }
}

/// So much of a length.
fn part(of: usize, by: u8) -> usize {
    of * usize::from(by) / 256
}

async fn run(directory: &Path, ops: Vec<Op>) {
    let storage = Storage::create(directory).unwrap();
    let mut model = Model { seen: view_of(&storage), applied: Agreed::default() };
    let (mut log, mut machine) = storage.into_parts();
    for op in ops {
        match op {
            Op::Append { entries: count, elected } => {
                if elected || model.seen.vote.is_none() {
                    let vote = Vote::new_committed(model.term() + 1, 7);
                    log.save_vote(&vote).await.unwrap();
                    model.seen.vote = Some(vote);
                }
                let new = entries(model.term(), model.next()..model.next() + count);
                log.blocking_append(new.clone()).await.unwrap();
                model.seen.log.extend(new);
            }
            Op::Truncate { keep } => {
                let open = model.open_end();
                let Some(cut) = open.get(part(open.len(), keep)).map(|entry| entry.log_id) else { continue };
                log.truncate(cut).await.unwrap();
                model.seen.log.retain(|entry| entry.log_id.index < cut.index);
            }
            Op::Snapshot { apply } => {
                let open = model.open_end();
                let new = open[..part(open.len() + 1, apply)].to_vec();
                machine.apply(new.clone()).await.unwrap();
                new.into_iter().for_each(|entry| drop(model.applied.apply(entry)));
                machine.get_snapshot_builder().await.build_snapshot().await.unwrap();
                model.seen.snapshot = Some(model.applied.clone());
            }
            Op::Purge { part: by } => {
                let covered = model.seen.snapshot.as_ref().and_then(|state| state.last_applied);
                let log_ids = model.seen.log.iter().map(|entry| entry.log_id);
                let may: Vec<_> = log_ids.filter(|id| Some(*id) <= covered).collect();
                let Some(upto) = may.get(part(may.len(), by)) else { continue };
                log.purge(*upto).await.unwrap();
                model.seen.purged = Some(*upto);
                model.seen.log.retain(|entry| entry.log_id.index > upto.index);
            }
            Op::Vote => {
                let vote = Vote::new(model.term() + 1, 8);
                log.save_vote(&vote).await.unwrap();
                model.seen.vote = Some(vote);
            }
            Op::Reopen => {
                drop((log, machine));
                let storage = opened(directory);
                assert_eq!(view_of(&storage), model.seen);
                model.applied = Agreed::clone(&storage.watch().borrow());
                (log, machine) = storage.into_parts();
            }
        }
        assert_eq!(log.try_get_log_entries(..).await.unwrap(), model.seen.log);
        assert_eq!(log.get_log_state().await.unwrap().last_log_id.map_or(0, |id| id.index + 1), model.next());
        assert_eq!(machine.applied_state().await.unwrap().0, model.applied.last_applied);
    }
    drop((log, machine));
    assert_eq!(view(directory), model.seen);
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 48, ..ProptestConfig::default() })]

    #[test]
    fn any_calls_leave_what_they_say(ops in prop::collection::vec(op(), 1..40)) {
        let dir = tempfile::tempdir().unwrap();
        let runtime = tokio::runtime::Builder::new_current_thread().build().unwrap();
        runtime.block_on(run(&dir.path().join("members"), ops));
    }
}
