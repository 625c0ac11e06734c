use std::collections::BTreeSet;
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::path::Path;
use std::sync::{Arc, Mutex};

use tracing::field::{Field, Visit};

use super::conditions::ROWS;
use super::{Condition, Part, Reports};
use crate::status::{Event, WalReason};

/// What the table has of one condition.
pub(super) struct Row {
    pub(super) condition: &'static str,
    pub(super) name: &'static str,
    pub(super) doc: &'static str,
    pub(super) begins: &'static [Part],
    pub(super) ends: &'static [Part],
    pub(super) counters: &'static [&'static str],
    /// Whether the row has anything besides its names.
    pub(super) does_something: bool,
}

/// The names that operators may search for. A new condition adds one, and none ever goes.
const NAMES: &[&str] = &[
    "anchor_not_replaced",
    "anchor_not_written",
    "app_address_invalid",
    "backfill_unsynced",
    "bad_pages_unnamed",
    "branch_kept",
    "branch_untold",
    "caught_up",
    "certificate_doubtful",
    "certificate_refused",
    "certificates_good",
    "certificates_not_taken",
    "certificates_taken",
    "checkpoint_fails",
    "checkpoint_works",
    "client_headers",
    "close_clock_missing",
    "close_not_awaited",
    "close_thread_missing",
    "damage_accepted",
    "database_kept",
    "demotion_goes_on",
    "demotion_waits",
    "descriptors_used_up",
    "disk_full",
    "doubt_not_forgotten",
    "doubt_not_noted",
    "election_failed",
    "endpoint_without_secret",
    "epoch_not_kept",
    "epochs_kept",
    "epochs_too_far",
    "files_not_opened",
    "files_opened",
    "files_replaced",
    "first_start_disputed",
    "first_state",
    "follower_ahead",
    "following",
    "following_panicked",
    "foreign_change",
    "fork_not_searched",
    "give_back_apart",
    "give_back_failed",
    "handoff_failed",
    "hashed",
    "hashing",
    "hashing_failed",
    "heal_started",
    "healed",
    "integrity_not_checked",
    "keys_adopted",
    "keys_asked",
    "keys_found",
    "keys_not_asked",
    "keys_not_found",
    "keys_of_primary",
    "knock_not_answered",
    "lag_unknown",
    "lagging",
    "last_commits_not_logged",
    "later_epoch_heard",
    "lease_clock_not_kept",
    "lease_clock_unreadable",
    "lease_ended",
    "lease_given_back",
    "lease_handed_over",
    "lease_not_given_back",
    "lease_not_taken",
    "lease_of_same_node",
    "lease_record_not_ours",
    "lease_store_away",
    "lease_store_back",
    "lease_store_panicked",
    "lease_store_went_back",
    "listener_crowded",
    "listener_panicked",
    "lock_not_released",
    "lock_watch_not_ended",
    "locks_lost",
    "log_fails",
    "log_gap",
    "log_kept",
    "log_loses_past",
    "log_not_renewed",
    "log_not_synced",
    "log_redone",
    "log_retried",
    "log_works",
    "loss_asked",
    "loss_not_asked",
    "member_away",
    "member_is_back",
    "member_replaced",
    "member_runs",
    "member_stopped",
    "member_went_back",
    "members_began",
    "members_changed",
    "members_too_few",
    "mend_failed",
    "mend_started",
    "mended",
    "newer_epoch",
    "no_first_start",
    "no_other_secret",
    "node_id_renewed",
    "not_accepted",
    "not_following",
    "not_verified",
    "older_database",
    "on_demote_failed",
    "operator_answered",
    "operator_asks",
    "other_secret",
    "page_size_differs",
    "page_size_not_set",
    "pages_doubted",
    "pages_kept",
    "pages_not_answered",
    "pages_repaired",
    "pages_replaced",
    "peer_refused",
    "peer_shut_out",
    "place_not_found",
    "plaintext",
    "primary_away",
    "primary_broke",
    "primary_disputed",
    "primary_silent",
    "primary_superseded",
    "primary_unreachable",
    "forwards_not_served",
    "promoted_unchecked",
    "promotion_failed",
    "reads_fail",
    "reads_work",
    "record_not_aborted",
    "records_missing",
    "records_taken",
    "replica_failed",
    "replica_joined",
    "replica_left",
    "replica_sent_away",
    "replication_stopped",
    "reserve_given_up",
    "reserve_not_freed",
    "reserve_not_made",
    "restart_fails",
    "restart_missed",
    "role_change_retried",
    "room_found",
    "runs_forgotten",
    "schema_unreadable",
    "segment_before_gap",
    "segment_corrupt",
    "segment_headless",
    "segment_not_removed",
    "snapshot_blocked",
    "snapshot_finished",
    "snapshot_not_copied",
    "snapshot_not_forgotten",
    "snapshot_not_kept",
    "snapshot_resumed",
    "snapshot_started",
    "state_not_read",
    "state_not_searched",
    "state_not_vouched",
    "state_suspect",
    "state_vouched",
    "stream_lost",
    "stream_panicked",
    "stream_works",
    "streams_late",
    "forwards_late",
    "tasks_late",
    "this_member_went_back",
    "turn_retried",
    "unsynced_not_noted",
    "verification_failed",
    "verified",
    "wal_already_kept",
    "wal_copied_by_others",
    "wal_copy_unknown",
    "wal_dropped",
    "wal_grows",
    "wal_kept",
    "wal_match_unknown",
    "wal_not_extended",
    "wal_not_truncated",
    "wal_short",
    "witness_unreadable",
    "writer_died",
    "writer_not_reset",
];

fn snake_case(camel: &str) -> String {
    let mut snake = String::new();
    for letter in camel.chars() {
        if letter.is_ascii_uppercase() && !snake.is_empty() {
            snake.push('_');
        }
        snake.push(letter.to_ascii_lowercase());
    }
    snake
}

#[test]
fn each_condition_has_a_name_of_its_own_that_never_changes_and_a_doc() {
    let names: Vec<&str> = ROWS.iter().map(|row| row.name).collect();
    let unique: BTreeSet<&str> = names.iter().copied().collect();
    assert_eq!(unique.len(), names.len());
    assert_eq!(unique, NAMES.iter().copied().collect());
    for row in ROWS {
        assert_eq!(row.name, snake_case(row.condition));
        assert!(row.doc.len() > 10 && row.doc.ends_with('.'), "{}: {:?}", row.name, row.doc);
        assert!(row.does_something, "{} does nothing", row.name);
    }
    assert_eq!(Condition::DiskFull { database: "app", what: &"a file", new: true }.name(), "disk_full");
}

#[test]
fn each_problem_that_begins_can_end_and_has_a_text_for_everybody() {
    let begun: BTreeSet<Part> = ROWS.iter().flat_map(|row| row.begins).copied().collect();
    let ended: BTreeSet<Part> = ROWS.iter().flat_map(|row| row.ends).copied().collect();
    assert_eq!(begun, ended);
    let public: BTreeSet<&str> = begun.iter().map(|part| part.in_public()).collect();
    assert_eq!(public.len(), begun.len());
    for text in public {
        assert!(text.len() > 10 && !text.contains(['{', '/', ':']) && !text.contains(char::is_numeric));
    }
    for row in ROWS {
        assert!(row.begins.iter().all(|part| !row.ends.contains(part)), "{}", row.name);
    }
}

#[test]
fn each_counter_is_in_the_guide_and_each_of_the_guide_in_the_table() {
    let counters: BTreeSet<&str> = ROWS.iter().flat_map(|row| row.counters).copied().collect();
    let guide = include_str!("../../docs/guide.md").split('`');
    let named: BTreeSet<&str> =
        guide.filter(|word| word.starts_with("replite_") && word.ends_with("_total")).collect();
    assert_eq!(counters, named);
    let described: BTreeSet<&str> = crate::metrics::COUNTERS.iter().map(|counter| counter.name).collect();
    assert_eq!(counters, described);
}

/// Notes each event's fields, and panics after that if it is to.
struct Notes {
    lines: Arc<Mutex<Vec<String>>>,
    panics: bool,
}

struct Line(String);

impl Visit for Line {
    fn record_debug(&mut self, field: &Field, value: &dyn std::fmt::Debug) {
        self.0.push_str(&format!("{field}={value:?};"));
    }
}

impl tracing::Subscriber for Notes {
    fn enabled(&self, _: &tracing::Metadata<'_>) -> bool {
        true
    }
    fn new_span(&self, _: &tracing::span::Attributes<'_>) -> tracing::span::Id {
        tracing::span::Id::from_u64(1)
    }
    fn record(&self, _: &tracing::span::Id, _: &tracing::span::Record<'_>) {}
    fn record_follows_from(&self, _: &tracing::span::Id, _: &tracing::span::Id) {}
    fn event(&self, event: &tracing::Event<'_>) {
        let mut line = Line(format!("{} ", event.metadata().level()));
        event.record(&mut line);
        self.lines.lock().unwrap().push(line.0);
        if self.panics {
            panic!("the subscriber panics");
        }
    }
    fn enter(&self, _: &tracing::span::Id) {}
    fn exit(&self, _: &tracing::span::Id) {}
}

/// The lines that are logged meanwhile.
pub(crate) fn noted(panics: bool, run: impl FnOnce()) -> Vec<String> {
    let lines = Arc::new(Mutex::new(Vec::new()));
    tracing::subscriber::with_default(Notes { lines: lines.clone(), panics }, run);
    std::mem::take(&mut lines.lock().unwrap())
}

fn grows(doubled: bool) -> Condition<'static> {
    let why = WalReason::Readers;
    Condition::WalGrows { database: Path::new("/app.db"), bytes: 9, limit: 4, why, doubled }
}

#[test]
fn what_is_not_told_changes_its_problem_and_nothing_else() {
    let reports = Reports::new();
    let mut events = reports.subscribe();
    let lines = noted(false, || reports.report("app", grows(false)));
    assert!(lines.is_empty(), "{lines:?}");
    assert!(events.try_recv().is_err());
    assert!(reports.problem_of(Part::Wal).unwrap().starts_with("the WAL has 9 bytes, its limit is 4: "));
    assert_eq!(reports.public_problems(), ["the write-ahead log grows"]);
    let lines = noted(false, || reports.report("app", Condition::WalShort));
    assert!(lines.is_empty(), "{lines:?}");
    assert!(!reports.has_problem(Part::Wal) && reports.problems().is_empty());
}

#[test]
fn a_log_line_has_the_conditions_name_and_its_own_fields() {
    let reports = Reports::new();
    let lines = noted(false, || reports.report("app", grows(true)));
    let [line] = &lines[..] else { panic!("{lines:?}") };
    assert!(line.starts_with("WARN "), "{line}");
    for part in ["condition=\"wal_grows\";", "database=/app.db;", "message=the WAL has 9 bytes"] {
        assert!(line.contains(part), "{line}");
    }
}

#[test]
fn the_applications_code_runs_last_and_without_a_lock() {
    let reports = Reports::new();
    let mut events = reports.subscribe();
    noted(true, || {
        let told = catch_unwind(AssertUnwindSafe(|| reports.report("app", grows(true))));
        assert!(told.is_err(), "the caller does not learn of the panic");
    });
    assert!(reports.has_problem(Part::Wal));
    assert!(matches!(events.try_recv(), Ok(Event::WalGrows { bytes: 9, .. })));
    let lines = noted(true, || reports.report_aside("app", grows(true)));
    assert_eq!(lines.len(), 1);
    assert!(matches!(events.try_recv(), Ok(Event::WalGrows { bytes: 9, .. })));
    // A lock that was held would be poisoned.
    assert!(!reports.problems.is_poisoned());
}
