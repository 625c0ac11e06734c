//! The table: what a node does with each condition.

use std::error::Error as StdError;
use std::fmt::{Debug, Display};
use std::net::SocketAddr;
use std::path::Path;
use std::time::Duration;

use super::table::conditions;
use super::{Part, STOPPED};
use crate::page::PageNo;
use crate::peer::{Incarnation, NodeId, PeerKey, ShortKey};
use crate::status::{Event, PeerInfo, Verification, WalReason, whole_millis};
use crate::txid::{Epoch, Position};

conditions! {
    // The node as a whole.

    /// Replication of the database has stopped for good.
    ReplicationStopped { database: &'a str, why: &'a str } "replication_stopped" {
        lasts Engine = format!("{STOPPED}{why}");
        log error(database, error = why, "replication stopped");
        event Event::Stopped { why: why.into() };
        counts "replite_stopped_total" += 1;
    }
    /// A peer knocks at this node with another secret.
    OtherSecret { database: &'a str, node: NodeId, key: Option<PeerKey>, times: u64 } "other_secret" {
        lasts Strangers = format!(
            "somebody who says to be node {node} knocks with another secret and is let in nowhere: \
            if it is one of yours, give it the cluster's secret"
        );
        log warn(
            database, %node, key = %ShortKey(key), times,
            "refused: a peer has another secret than this node"
        );
        event Event::OtherSecret { node, key, times };
        counts "replite_other_secret_total" += times;
    }
    /// No peer knocked with another secret for a while.
    NoOtherSecret "no_other_secret" {
        ends Strangers;
    }

    /// The node did not become the primary, and is a replica as before.
    PromotionFailed { database: &'a Path, epoch: Epoch, error: &'a dyn Display } "promotion_failed" {
        log error(
            database = %database.display(), %epoch, %error,
            "this node did not become the primary, and is a replica again"
        );
        event Event::PromotionFailed { why: error.to_string() };
        counts "replite_promotions_failed_total" += 1;
    }
    /// What is here becomes the first state of a cluster.
    FirstState { database: &'a Path, epoch: Epoch } "first_state" {
        log info(database = %database.display(), %epoch, "what is here becomes the cluster's first state");
    }
    /// What is here becomes the primary's state, though no primary vouches for it.
    PromotedUnchecked { database: &'a Path, epoch: Epoch } "promoted_unchecked" {
        log warn(
            database = %database.display(), %epoch,
            "no primary vouches for what is here, and it becomes the cluster's state all the same: it \
            replaces what the other nodes have, which they keep apart"
        );
    }
    /// The node is to be the primary no more, and something holds that up.
    DemotionWaits { database: &'a Path, what: &'a str } "demotion_waits" {
        lasts Role = format!("this node is to be a replica, and waits for {what}");
        log warn(database = %database.display(), "this node is to be a replica, and waits for {what}");
    }
    /// The disk holds up the end of the primary's role.
    TurnRetried { error: &'a dyn Display } "turn_retried" {
        lasts Role = format!("this node is to be a replica, and tries again: {error}");
    }
    /// Nothing holds it up any more.
    DemotionGoesOn "demotion_goes_on" {
        ends Role;
    }
    /// What the application does when its node is the primary no more failed.
    OnDemoteFailed { error: &'a dyn Display } "on_demote_failed" {
        log error(%error, "on_demote failed; the node is a replica all the same");
    }

    // The disk and the files.

    /// Something of ours found no room on the disk.
    DiskFull { database: &'a str, what: &'a dyn Display, new: bool } "disk_full" {
        told if new;
        lasts Room = format!("the disk is full; reads go on, and writes when there is room: {what}");
        log error(database, %what, "the disk is full");
    }
    /// There is room on the disk.
    RoomFound "room_found" {
        ends Room;
    }
    /// A read of the application failed, and not for its own sake.
    ReadsFail { database: &'a str, why: &'a str } "reads_fail" {
        lasts Reads = format!("the database can't be read: {why}");
        log error(database, why, "the database can't be read");
    }
    /// Reads of the application work.
    ReadsWork "reads_work" {
        ends Reads;
    }
    /// A replica's files were removed, replaced or overwritten: it opens what is there.
    FilesReplaced { database: &'a Path, text: &'a str } "files_replaced" {
        lasts Engine = text;
        log error(database = %database.display(), text, "the replica's files are opened anew");
    }
    /// What is at a replica's path now can't be opened.
    FilesNotOpened { error: &'a dyn Display } "files_not_opened" {
        lasts Engine = format!("what is at the path now can't be opened: {error}");
    }
    /// A replica has opened what is at its path now.
    FilesOpened "files_opened" {
        ends Engine;
    }
    /// The locks of this process's connections were dropped, and were taken again.
    LocksLost { database: &'a Path, times: u64 } "locks_lost" {
        log error(
            database = %database.display(), times,
            "locks were dropped and are taken again: something in this process opened and closed the \
            database by other means than SQLite; use `Db::snapshot_to` for copies"
        );
        event Event::LocksLost { database: database.into(), times };
        counts "replite_locks_lost_total" += 1;
    }
    /// The reserve of disk space was given up.
    ReserveGivenUp { directory: &'a Path } "reserve_given_up" {
        log warn(directory = %directory.display(), "the disk is full: the reserve is given up");
    }
    /// The reserve's room may not be free yet.
    ReserveNotFreed { error: &'a dyn Display } "reserve_not_freed" {
        log warn(%error, "its room may not be free yet");
    }
    /// The reserve could not be made again.
    ReserveNotMade { error: &'a dyn Display } "reserve_not_made" {
        log warn(%error, "the reserve is made again when there is room");
    }
    /// The watch over the locks of this process's connections could not be ended.
    LockWatchNotEnded { error: &'a dyn Display } "lock_watch_not_ended" {
        log warn(%error, "the watch over locks could not be ended");
    }
    /// A lock that the node held could not be given back.
    LockNotReleased { error: &'a dyn Display } "lock_not_released" {
        log warn(%error, "a lock could not be given back");
    }
    /// An anchor may stay that names files which are not there any more.
    AnchorNotReplaced { error: &'a dyn Display } "anchor_not_replaced" {
        log error(%error, "an anchor of files that are not there any more can't be replaced");
    }
    /// The last anchor was not written at a replica's end.
    AnchorNotWritten { error: &'a dyn Display } "anchor_not_written" {
        log warn(%error, "the last anchor was not written; the next start reads the WAL instead");
    }
    /// SQLite finds no schema that it can read.
    SchemaUnreadable { path: &'a Path, error: &'a dyn Display } "schema_unreadable" {
        log warn(path = %path.display(), %error, "SQLite can't read the schema");
    }
    /// The node's directory was copied or moved.
    NodeIdRenewed { directory: &'a Path } "node_id_renewed" {
        log warn(
            directory = %directory.display(),
            "the directory was copied or moved: it gets a new node id"
        );
    }

    // The lease.

    /// The list of this node's runs could not be read: it does not take its own lease over at once.
    RunsForgotten { error: &'a dyn Display } "runs_forgotten" {
        log warn(%error, "the list of this node's runs is begun anew");
    }
    /// The lease's store can't be read.
    LeaseStoreAway { problem: &'a str, new: bool } "lease_store_away" {
        told if new;
        lasts Lease = format!("the lease's store can't be read: {problem}");
        log warn(problem, "the lease's store can't be read; trying again");
    }
    /// The record of the lease is not this database's, or can't be understood.
    LeaseRecordNotOurs { problem: &'a str, new: bool } "lease_record_not_ours" {
        told if new;
        lasts Lease = format!("the lease's record can't be used: {problem}");
        log error(problem, "the lease's record can't be used; it is left as it is");
    }
    /// The lease's store can be read.
    LeaseStoreBack "lease_store_back" {
        ends Lease;
    }
    /// The lease ended before it was renewed: commits are not acknowledged any more.
    LeaseEnded { database: &'a str } "lease_ended" {
        log warn(database, "the lease could not be renewed in time: this node stops being the primary");
        counts "replite_leases_ended_total" += 1;
    }
    /// This node is about to end, and gives its lease back.
    LeaseGivenBack { database: &'a str } "lease_given_back" {
        log info(database, "this node is about to end, and gives its lease back");
    }
    /// Another node has the lease, because this one handed it over.
    LeaseHandedOver { database: &'a str, node: NodeId } "lease_handed_over" {
        log info(database, %node, "another node has the lease: this one handed it over");
        counts "replite_handoffs_total" += 1;
    }
    /// The lease was to be handed over, and was not.
    HandoffFailed { database: &'a str, why: &'a dyn Display } "handoff_failed" {
        log warn(database, %why, "the lease was not handed over");
        counts "replite_handoffs_failed_total" += 1;
    }
    /// The store shows less than this node knows.
    LeaseStoreWentBack { what: &'a str } "lease_store_went_back" {
        log error(what, "the lease's store went back in time");
        counts "replite_lease_store_went_back_total" += 1;
    }
    /// Another process has this node's id, and the lease.
    LeaseOfSameNode { incarnation: Incarnation } "lease_of_same_node" {
        log error(
            %incarnation,
            "another process has this node's id and the lease: a state directory or machine was copied"
        );
    }
    /// A cluster can't start: several of its nodes have a database with content.
    FirstStartDisputed { nodes: &'a dyn Debug } "first_start_disputed" {
        log error(?nodes, "several nodes of a first start have a database with content: keep that of one");
    }
    /// A cluster can't start for the first time: a node has been part of one.
    NoFirstStart { node: NodeId } "no_first_start" {
        log error(%node, "this is no first start: a node has a state of the cluster, and there is no record");
    }
    /// The operator's word to take the lease was not followed.
    LeaseNotTaken { node: NodeId } "lease_not_taken" {
        log error(%node, "the lease is not taken: another node holds it, and renews it");
        event Event::LeaseNotTaken { holder: node };
    }
    /// An operator asks this node to do something; the name is what the operator says.
    OperatorAsks { database: &'a str, by: &'a str, what: &'a str } "operator_asks" {
        log warn(database, by, what, "an operator's command");
        event Event::OperatorAsks { by: by.into(), what: what.into() };
        counts "replite_operator_commands_total" += 1;
    }
    /// What came of an operator's command.
    OperatorAnswered { by: &'a str, what: &'a str, outcome: &'a str } "operator_answered" {
        log warn(by, what, outcome, "an operator's command has ended");
    }
    /// A change of the node's role could not be begun, and is tried again.
    RoleChangeRetried { error: &'a dyn Display } "role_change_retried" {
        log warn(%error, "a change of this node's role is tried again");
    }
    /// A store's hint panicked: the node reads the record on its own time alone.
    LeaseStorePanicked { error: &'a dyn Display } "lease_store_panicked" {
        log error(%error, "the lease's store gives no more hints");
    }
    /// This node keeps the lease's record with others.
    MemberRuns "member_runs" {
        ends Members;
    }
    /// What this node keeps of the lease's record with others has stopped, and is begun again.
    MemberStopped { error: &'a dyn Display } "member_stopped" {
        lasts Members = format!("this member of those that keep the lease's record has stopped: {error}");
        log error(%error, "this member has stopped, and begins again in five seconds");
    }
    /// A member does not answer the one that leads them.
    MemberAway { url: &'a str, why: &'a str } "member_away" {
        log warn(url, why, "a member of those that keep the lease's record does not answer");
    }
    /// It does again.
    MemberIsBack { url: &'a str } "member_is_back" {
        log info(url, "a member of those that keep the lease's record answers again");
    }
    /// Another member has not what it said to have: its Raft directory is one of before.
    MemberWentBack { url: &'a str, id: u64 } "member_went_back" {
        log error(
            url, id = %format_args!("{id:x}"),
            "a member has not what it said to have, and counts no more: its directory was restored from a \
            copy; end it, remove its directory members, and start it again"
        );
    }
    /// The same of this node.
    ThisMemberWentBack { directory: &'a str } "this_member_went_back" {
        lasts Members = format!(
            "{directory} was restored from a copy, and has not what this member said to have: end the node, \
            remove that directory, and start it again"
        );
        log error(
            directory, "this member has not what it said to have: its directory was restored from a copy"
        );
    }
    /// The members that keep the lease's record have begun.
    MembersBegan { members: usize } "members_began" {
        log info(members, "the members that keep the lease's record have begun");
    }
    /// This member is in the others' list under a new id, or at a new URL.
    MemberReplaced { id: u64, url: &'a str } "member_replaced" {
        log warn(
            id = %format_args!("{id:x}"), url, "the other members know this one under this id at this URL"
        );
    }
    /// A member was added or removed.
    MembersChanged { url: &'a str, what: &'a str } "members_changed" {
        log warn(url, what, "the members that keep the lease's record have changed");
    }
    /// With so few members none may be lost.
    MembersTooFew { database: &'a str, voters: usize } "members_too_few" {
        log warn(
            database, voters,
            "so few members survive the loss of none: three do, and the third may be a witness"
        );
    }
    /// The lease was not given back when the node ended: others wait until its time is over.
    LeaseNotGivenBack "lease_not_given_back" {
        log warn("the lease was not given back in time");
    }
    /// What drives the election ended by a panic.
    ElectionFailed { error: &'a dyn Display } "election_failed" {
        log error(%error, "the election has ended: this node can't become the primary, nor stay it");
    }

    // Finding the position.

    /// All pages are hashed to find the position.
    Hashing { database: &'a Path, text: &'a str, aloud: bool } "hashing" {
        told if aloud;
        lasts Hashing = text;
        log info(database = %database.display(), "{text}");
    }
    /// All pages are hashed.
    Hashed { database: &'a Path, elapsed: Duration } "hashed" {
        ends Hashing;
        log info(database = %database.display(), ?elapsed, "hashed the database");
    }
    /// The pages could not be hashed, which the opening says.
    HashingFailed "hashing_failed" {
        ends Hashing;
    }
    /// An image that the WAL replaces can't be read, and is no witness.
    WitnessUnreadable { error: &'a dyn Display, page: PageNo } "witness_unreadable" {
        log warn(%error, ?page, "an image that the WAL replaces can't be read");
    }
    /// The log can't be searched for the state that the files are.
    StateNotSearched { error: &'a dyn Display } "state_not_searched" {
        log warn(%error, "the log can't be searched for the state of the database");
    }
    /// The file does not tell whether the WAL was copied back in full.
    WalCopyUnknown { error: &'a dyn Display } "wal_copy_unknown" {
        log warn(%error, "the file can't tell whether the WAL was copied back in full");
    }
    /// The WAL is gone that was being copied back; the file has all of it that is known.
    WalCopiedByOthers { path: &'a Path } "wal_copied_by_others" {
        log warn(
            path = %path.display(),
            "the WAL that was being copied back is gone, and nothing of it is known to be missing: \
            somebody else has copied it on"
        );
    }
    /// The log does not tell whether the file goes with its WAL.
    WalMatchUnknown { error: &'a dyn Display } "wal_match_unknown" {
        log warn(%error, "the log can't tell whether the file goes with the WAL beside it");
    }
    /// The configuration accepts files that would be refused.
    DamageAccepted { path: &'a Path, why: &'a str } "damage_accepted" {
        log error(path = %path.display(), why, "the configuration accepts this state; commits may be lost");
    }
    /// `PRAGMA integrity_check` could not run.
    IntegrityNotChecked { error: &'a dyn Display } "integrity_not_checked" {
        log warn(%error, "the state becomes history without `PRAGMA integrity_check`, which could not run");
    }
    /// An older database stands in the place of the one that the node had.
    OlderDatabase { position: Position, last: u64 } "older_database" {
        log warn(
            %position, last,
            "an older database was put in the place of this one, and is history from here on"
        );
    }
    /// Another program changed the database while the node was down.
    ForeignChange { position: Position } "foreign_change" {
        log warn(%position, "the database was changed by somebody else; its state becomes history");
    }
    /// The node goes on without the WAL.
    WalDropped { path: &'a Path, position: Position, why: &'a str } "wal_dropped" {
        log error(
            path = %path.display(), %position, why,
            "the file alone is a committed state; the WAL is put aside"
        );
    }
    /// The node tries to make its database good from its log.
    MendStarted { path: &'a Path, why: &'a str } "mend_started" {
        log warn(path = %path.display(), why, "trying to make the database good from the log");
    }
    /// The log does not make the database good.
    MendFailed { error: &'a dyn Display } "mend_failed" {
        log warn(%error, "the log does not make the database good");
    }
    /// The log made the database good.
    Mended { position: Position, pages: usize } "mended" {
        log warn(%position, pages, "the log made the database good");
    }
    /// A WAL that is to be put aside was kept by an earlier start.
    WalAlreadyKept { kept: &'a Path } "wal_already_kept" {
        log warn(kept = %kept.display(), "the WAL is kept already");
    }
    /// A WAL was put aside.
    WalKept { kept: &'a Path } "wal_kept" {
        log warn(kept = %kept.display(), "the WAL is kept as it was");
        event Event::Kept { path: kept.into() };
    }
    /// What the log replaces when it makes the database good was put aside.
    PagesKept { kept: &'a Path } "pages_kept" {
        event Event::Kept { path: kept.into() };
    }
    /// The log has more than the WAL, and is applied.
    LogRedone { from: Position, to: Position } "log_redone" {
        log warn(%from, %to, "the log is ahead of the WAL and is applied again");
    }
    /// The log was put aside.
    LogKept { kept: &'a Path, from: Option<Position>, to: Option<Position> } "log_kept" {
        log error(
            kept = %kept.display(), ?from, ?to,
            "the log does not lead on from the database's state, and is put aside"
        );
        event Event::Kept { path: kept.into() };
    }
    /// The epoch history is damaged, and was put aside.
    EpochsKept { error: &'a dyn Display } "epochs_kept" {
        log error(%error, "the epoch history is put aside");
    }

    // Commits that a power cut may have taken.

    /// The marker of unsynced commits could not be written.
    UnsyncedNotNoted { error: &'a dyn Display } "unsynced_not_noted" {
        log warn(%error, "that commits may be lost could not be noted");
    }
    /// Commits may be lost, and no replica can be asked for them.
    LossNotAsked "loss_not_asked" {
        log warn(
            "the last commits may have been lost with the machine's power; replicas can't be asked \
            for them without a listener of this node's own"
        );
    }
    /// The keys of the database are gone, and no replica can be asked for them.
    KeysNotAsked "keys_not_asked" {
        log error(
            "the keys of this database are gone, and replicas can't be asked for them without a listener of \
             this node's own, or without a recovery timeout: new ones are drawn, and what is here begins a \
             new branch"
        );
    }
    /// The keys of the database are gone on a node with a lease.
    KeysOfPrimary "keys_of_primary" {
        log warn(
            "the keys of this database are gone: this node takes those of the primary that it follows, and \
             can't become the primary by itself before"
        );
    }
    /// The keys of the database are gone, and replicas are asked for them.
    KeysAsked { limit: Duration } "keys_asked" {
        log warn(?limit, "the keys of this database are gone: replicas are asked for them");
    }
    /// A replica had the keys of the database.
    KeysFound { node: NodeId } "keys_found" {
        log warn(%node, "a replica had the keys of this database");
    }
    /// No replica said the keys of the database in time.
    KeysNotFound "keys_not_found" {
        log error(
            "no replica had the keys of this database in time: new ones are drawn, and what is here begins a \
             new branch"
        );
    }
    /// A replica takes the page key of its primary, and its own state has no name any more.
    KeysAdopted { database: &'a Path } "keys_adopted" {
        log warn(
            database = %database.display(),
            "the primary's pages are hashed with another key, which this node takes over: all pages are \
             compared with the primary's, and what differs is kept"
        );
    }
    /// Commits may be lost, and replicas are asked for them.
    LossAsked { position: Position, limit: Duration } "loss_asked" {
        log warn(
            %position, ?limit,
            "the last commits may have been lost with the machine's power: replicas are asked for them"
        );
    }
    /// A replica's records did not come in full.
    RecordsMissing { node: NodeId, error: &'a dyn Display } "records_missing" {
        log warn(%node, %error, "not all of a replica's records could be taken");
    }
    /// A replica gave back commits that this primary had lost.
    RecordsTaken { node: NodeId, transactions: u64, position: Position } "records_taken" {
        log warn(
            %node, transactions, %position,
            "transactions that this node had lost are taken back from a replica"
        );
    }
    /// A replica's log does not give its primary all that was lost.
    GiveBackFailed { error: &'a dyn Display } "give_back_failed" {
        log warn(%error, "the primary does not get back all that the log has");
    }
    /// A replica's log does not go on from its primary's state.
    GiveBackApart { after: Position, found: &'a dyn Debug } "give_back_apart" {
        log warn(%after, ?found, "the log here does not go on from the state that the primary has");
    }

    // The log.

    /// The log can't be written, and loses its past.
    LogFails { error: &'a dyn Display, means: &'a str } "log_fails" {
        lasts Log = format!("the log can't be written: {error}; {means}");
        log error(%error, "the log can't be written: {means}");
    }
    /// A primary could not write its log, and tries again at once.
    LogRetried { text: &'a str } "log_retried" {
        lasts Log = text;
    }
    /// The log is written again, and has all commits.
    LogWorks "log_works" {
        ends Log;
    }
    /// The log is written again, and has a gap.
    LogGap { after: Position } "log_gap" {
        ends Log;
        event Event::LogGap { position: after };
        counts "replite_log_gaps_total" += 1;
    }
    /// The log can't be synced, and is begun anew.
    LogNotSynced { error: &'a dyn Display, at: Position } "log_not_synced" {
        log error(
            %error, %at,
            "the log can't be synced, and is begun anew: replicas that are behind compare their pages"
        );
        event Event::LogGap { position: at };
        counts "replite_log_gaps_total" += 1;
    }
    /// The log can't be written while a primary starts.
    LogLosesPast { error: &'a dyn Display } "log_loses_past" {
        log error(
            %error,
            "the log can't be written and loses its past: it begins anew behind the last commit"
        );
    }
    /// A replica's log could not be begun anew after a failure.
    LogNotRenewed { error: &'a dyn Display } "log_not_renewed" {
        log warn(%error, "the log is begun anew behind the next transaction");
    }
    /// A record that was begun stays in the log.
    RecordNotAborted { error: &'a dyn Display } "record_not_aborted" {
        log warn(%error, "the log's unfinished record could not be taken back");
    }
    /// A primary that lost its files could not bring its last commits to the log.
    LastCommitsNotLogged { error: &'a dyn Display } "last_commits_not_logged" {
        log error(%error, "the log does not have the last commits");
    }
    /// The log could not be synced before the WAL is copied back.
    BackfillUnsynced { error: &'a dyn Display } "backfill_unsynced" {
        log warn(%error, "the log can't be synced before a backfill");
    }
    /// A segment of the log stays that is of no use any more.
    SegmentNotRemoved { path: &'a Path, error: &'a dyn Display } "segment_not_removed" {
        log warn(path = %path.display(), %error, "a log segment can't be removed");
    }
    /// A segment of the log has no whole head.
    SegmentHeadless { path: &'a Path, bytes: u64 } "segment_headless" {
        log warn(path = %path.display(), bytes, "a log segment without a whole head is dropped");
    }
    /// A segment of the log is before a gap.
    SegmentBeforeGap { path: &'a Path, bytes: u64 } "segment_before_gap" {
        log warn(path = %path.display(), bytes, "a log segment before a gap is dropped");
    }
    /// A segment of the log is corrupt.
    SegmentCorrupt { path: &'a Path, bytes: u64, offset: u64, problem: &'a dyn Display } "segment_corrupt" {
        log error(
            path = %path.display(), bytes, offset, %problem,
            "a log segment is corrupt and cut there"
        );
    }

    // The WAL and its checkpoints.

    /// The WAL was not begun anew: a disk that is full or fails.
    RestartFails { error: &'a dyn Display } "restart_fails" {
        lasts Checkpoint = format!("the WAL can't be copied back: {error}");
        log warn(%error, "the WAL could not be restarted");
    }
    /// The WAL was not begun anew when the checkpointer asked a replica for it.
    RestartMissed { error: &'a dyn Display } "restart_missed" {
        log warn(%error, "the WAL could not be restarted");
    }
    /// The WAL was not copied back.
    CheckpointFails { error: &'a dyn Display } "checkpoint_fails" {
        lasts Checkpoint = format!("the WAL can't be copied back: {error}");
        log warn(%error, "a checkpoint failed and is tried again");
    }
    /// The WAL is copied back, or was begun anew.
    CheckpointWorks "checkpoint_works" {
        ends Checkpoint;
    }
    /// The WAL is much longer than its limit.
    WalGrows { database: &'a Path, bytes: u64, limit: u64, why: WalReason, doubled: bool } "wal_grows" {
        told if doubled;
        lasts Wal = wal_text(bytes, limit, why);
        log warn(database = %database.display(), "{}", wal_text(bytes, limit, why));
        event Event::WalGrows { bytes, limit, why };
        counts "replite_wal_grows_total" += 1;
    }
    /// The WAL is short again.
    WalShort "wal_short" {
        ends Wal;
    }
    /// The WAL stays longer than it has to be.
    WalNotTruncated { error: &'a dyn Display } "wal_not_truncated" {
        log warn(%error, "the WAL stays longer than it has to be");
    }
    /// The WAL could not be made longer in advance.
    WalNotExtended { error: &'a dyn Display } "wal_not_extended" {
        log warn(%error, "the WAL is not made longer in advance");
    }
    /// Another process died in the middle of a commit.
    WriterDied "writer_died" {
        log warn("a writer died while it published its commit; the wal-index is mended");
    }

    // The pages, and verifications.

    /// The pages are in doubt since before the start.
    PagesDoubted { found: &'a str } "pages_doubted" {
        lasts Pages = found;
    }
    /// A replica's pages came from the primary: no doubt is left.
    PagesReplaced "pages_replaced" {
        ends Pages;
    }
    /// The doubt of the pages could not be noted.
    DoubtNotNoted { error: &'a dyn Display } "doubt_not_noted" {
        log warn(%error, "that the pages are in doubt is forgotten with a restart");
    }
    /// The doubt of the pages could not be taken back.
    DoubtNotForgotten { error: &'a dyn Display } "doubt_not_forgotten" {
        log warn(%error, "that the pages are in doubt could not be taken back");
    }
    /// A verification found the pages of the position.
    Verified { verification: &'a Verification } "verified" {
        ends Pages;
        log info(
            position = %verification.position,
            pages = verification.pages,
            elapsed_ms = whole_millis(verification.elapsed),
            "verified: the pages are those of the position"
        );
        event Event::Verified { verification: verification.clone() };
        counts "replite_verifications_total" ["result" = "holds"] += 1;
    }
    /// A verification found other pages than those of the position.
    VerificationFailed { verification: &'a Verification } "verification_failed" {
        lasts Pages = verification.problem();
        log error(
            position = %verification.position,
            found = %verification.found,
            pages = verification.pages,
            "{}", verification.problem()
        );
        event Event::VerificationFailed { verification: verification.clone() };
        counts "replite_verifications_total" ["result" = "differs"] += 1;
    }
    /// A verification came to no end.
    NotVerified { error: &'a dyn Display } "not_verified" {
        lasts Pages = format!("the database could not be verified: {error}");
        log warn(%error, "the database could not be verified");
    }
    /// The log does not tell which pages are bad.
    BadPagesUnnamed { error: &'a dyn Display } "bad_pages_unnamed" {
        log warn(%error, "the log does not tell which pages are bad");
    }
    /// Bad pages of a primary were written anew.
    PagesRepaired { pages: &'a [PageNo], from: &'a PeerInfo } "pages_repaired" {
        log warn(?pages, from = %from.node, "bad pages were written anew");
        event Event::Repaired { pages: pages.to_vec(), from: from.clone() };
        counts "replite_repaired_pages_total" += pages.len() as u64;
    }

    // The state of a replica: snapshots and heals.

    /// A replica's database is not read from.
    StateNotRead { path: &'a Path, text: &'a str } "state_not_read" {
        lasts State = text;
        log warn(path = %path.display(), text);
    }
    /// A replica's last commits came from no primary that is known.
    StateNotVouched { position: Position, vouched: Option<Position> } "state_not_vouched" {
        lasts State =
            "the last commits here came from no primary that is known; the primary decides on them";
        log warn(%position, ?vouched, "the last commits here came from no primary that is known");
    }
    /// A replica's state is off the primary's, or in doubt.
    StateSuspect { path: &'a Path, text: &'a str } "state_suspect" {
        lasts State = text;
        log error(path = %path.display(), text);
    }
    /// The primary vouches for a replica's state.
    StateVouched "state_vouched" {
        ends State;
    }
    /// A primary's pages have another size than a replica's.
    PageSizeDiffers { text: &'a str } "page_size_differs" {
        lasts State = text;
    }
    /// A replica's empty database could not be given the primary's page size.
    PageSizeNotSet { error: &'a dyn Display } "page_size_not_set" {
        log warn(%error, "the empty database does not have the primary's page size yet");
    }
    /// A snapshot begins.
    SnapshotStarted { first: Position, from: PageNo } "snapshot_started" {
        log info(%first, %from, "a snapshot begins");
        event Event::SnapshotStarted { why: "this node has no state of the cluster".into() };
    }
    /// A snapshot goes on that was begun before.
    SnapshotResumed { from: Position } "snapshot_resumed" {
        log info(%from, "what came of a snapshot is compared with the primary's pages");
        event Event::SnapshotStarted { why: "what came of a snapshot before is compared".into() };
    }
    /// Other connections are in a snapshot's way.
    SnapshotBlocked { text: &'a str } "snapshot_blocked" {
        lasts State = text;
    }
    /// A snapshot was taken over.
    SnapshotFinished { position: Position } "snapshot_finished" {
        ends State;
        log info(%position, "the snapshot is taken over");
        event Event::SnapshotFinished { position };
        counts "replite_snapshots_total" += 1;
    }
    /// The last pages of a snapshot that broke off come once more.
    SnapshotNotKept { error: &'a dyn Display } "snapshot_not_kept" {
        log warn(%error, "the pages that came last of a snapshot are not kept");
    }
    /// A snapshot stays that can't be made exact.
    SnapshotNotForgotten { error: &'a dyn Display } "snapshot_not_forgotten" {
        log warn(%error, "a snapshot that can't be made exact is not forgotten");
    }
    /// The first page of a snapshot is in the WAL only.
    SnapshotNotCopied { error: &'a dyn Display } "snapshot_not_copied" {
        log warn(%error, "the first page of the snapshot is not copied back yet");
    }
    /// The database that a snapshot replaces was put aside.
    DatabaseKept { kept: &'a Path } "database_kept" {
        log warn(kept = %kept.display(), "the database that was here is kept aside");
        event Event::Kept { path: kept.into() };
    }
    /// A replica's state is being led back to the primary's.
    HealStarted { position: Position, from: Position, compare: bool, why: &'a str } "heal_started" {
        log warn(%position, %from, compare, "a heal begins: {why}");
        event Event::HealStarted { why: why.into() };
    }
    /// A replica's state was led back to the primary's.
    Healed { position: Position, pages: u64, lost: Option<&'a Path> } "healed" {
        ends State, Pages;
        log info(%position, pages, "healed");
        event Event::Healed { position, pages, lost: lost.map(Path::to_owned) };
        counts "replite_heals_total" += 1;
        counts "replite_healed_pages_total" += pages;
        counts "replite_lost_branches_total" += 1, if lost.is_some();
    }
    /// The log can't be searched for the state where a replica left the primary's history.
    ForkNotSearched { error: &'a dyn Display } "fork_not_searched" {
        log warn(%error, "the log can't be searched for the fork");
    }
    /// Commits of a replica that the primary does not have were put aside.
    BranchKept { kept: &'a Path, tip: Position } "branch_kept" {
        log error(
            kept = %kept.display(), %tip,
            "this node had commits that are not in the primary's history; they are kept"
        );
        event Event::Kept { path: kept.into() };
    }
    /// The rows of a branch that was put aside are not known.
    BranchUntold { error: &'a dyn Display, branch: &'a Path } "branch_untold" {
        log warn(
            %error, branch = %branch.display(),
            "the rows of a lost branch can't be told; its pages are kept"
        );
    }

    // The stream, on a replica.

    /// The stream from the primary stands.
    Following {
        primary: &'a dyn Display,
        peer: &'a PeerInfo,
        key: Option<PeerKey>,
        plan: &'a dyn Debug,
    } "following" {
        log info(%primary, node = %peer.node, key = %ShortKey(key), ?plan, "following the primary");
        event Event::Connected { primary: peer.clone(), key };
    }
    /// Something came from the primary and was taken in.
    StreamWorks "stream_works" {
        ends Stream;
    }
    /// A stream that stood has ended.
    StreamLost { problem: &'a str } "stream_lost" {
        lasts Stream = problem;
        event Event::Disconnected { why: problem.into() };
        counts "replite_stream_losses_total" += 1;
    }
    /// The primary is not followed at present, unlike expected. The same problem is told once.
    NotFollowing { primary: &'a dyn Display, problem: &'a str, what: &'a str, new: bool } "not_following" {
        told if new;
        lasts Stream = problem;
        log warn(%primary, problem, "{what}");
    }
    /// The primary is not there for a moment, as is expected. The same problem is told once.
    PrimaryAway { primary: &'a dyn Display, problem: &'a str, what: &'a str, new: bool } "primary_away" {
        told if new;
        lasts Stream = problem;
        log info(%primary, problem, "{what}");
    }
    /// What follows the primary panicked, and begins anew.
    FollowingPanicked { primary: &'a dyn Display, error: &'a dyn Display } "following_panicked" {
        lasts Stream = error.to_string();
        log error(%primary, %error, "can't follow the primary; trying again");
    }
    /// A replica lags.
    Lagging { text: &'a str } "lagging" {
        lasts Behind = text;
    }
    /// A replica does not know by how much it lags.
    LagUnknown { text: &'a str, new: bool } "lag_unknown" {
        told if new;
        lasts Behind = text;
        log warn("{text}");
        counts "replite_lag_unknown_total" += 1;
    }
    /// A replica does not lag.
    CaughtUp "caught_up" {
        ends Behind;
    }
    /// The primary asked for pages that can't be read here.
    PagesNotAnswered { error: &'a dyn Display } "pages_not_answered" {
        log warn(%error, "the primary's question about pages is not answered");
    }

    // The stream, on a primary.

    /// A replica joined.
    ReplicaJoined { peer: &'a PeerInfo, key: Option<PeerKey>, follower: bool } "replica_joined" {
        log info(
            node = %peer.node, key = %ShortKey(key), follower, url = %peer.addresses.replication,
            "a replica joined"
        );
        event Event::ReplicaJoined { replica: peer.clone(), key };
        counts "replite_replicas_joined_total" += 1;
    }
    /// A replica left.
    ReplicaLeft { peer: &'a PeerInfo, key: Option<PeerKey> } "replica_left" {
        log info(node = %peer.node, key = %ShortKey(key), "a replica left, or its connection broke");
        event Event::ReplicaLeft { replica: peer.clone(), key };
        counts "replite_replicas_left_total" += 1;
    }
    /// This primary ended a replica's stream, and said why.
    ReplicaSentAway { peer: &'a PeerInfo, key: Option<PeerKey>, reason: &'a str } "replica_sent_away" {
        log info(node = %peer.node, key = %ShortKey(key), reason, "a replica's stream was ended");
        event Event::ReplicaLeft { replica: peer.clone(), key };
        counts "replite_replicas_left_total" += 1;
    }
    /// A replica's stream failed.
    ReplicaFailed { peer: &'a PeerInfo, key: Option<PeerKey>, error: &'a dyn Display } "replica_failed" {
        log warn(node = %peer.node, key = %ShortKey(key), %error, "a replica's stream failed");
        event Event::ReplicaLeft { replica: peer.clone(), key };
        counts "replite_replicas_left_total" += 1;
    }
    /// A peer was refused.
    PeerRefused { node: NodeId, key: Option<PeerKey>, times: u64, why: &'a dyn Display } "peer_refused" {
        log warn(%node, key = %ShortKey(key), times, "refused a peer: {why}");
    }
    /// A node that is shut out dialled this one. Each key is told once.
    PeerShutOut { key: PeerKey } "peer_shut_out" {
        log warn(%key, "cut off: the key of the node that dialled is shut out");
    }
    /// A follower says to know a later epoch than this primary's, which is no reason to take one.
    FollowerAhead { theirs: Epoch, ours: Epoch, node: NodeId } "follower_ahead" {
        log warn(
            %theirs, %ours, %node,
            "a follower has followed a later epoch than this primary's, and is refused: if it is right, \
            another node leads; if not, remove its database and its state directory"
        );
    }
    /// The log does not tell where a replica is, and it compares its pages.
    PlaceNotFound { error: &'a dyn Display, node: NodeId } "place_not_found" {
        log error(%error, %node, "a replica's place in the log can't be found");
    }
    /// A replica has seen a later epoch than this primary's: it takes one above that.
    NewerEpoch { above: u64, node: NodeId } "newer_epoch" {
        log warn(above, %node, "a replica knows a newer epoch");
    }
    /// A replica has seen epochs that no history leads to.
    EpochsTooFar { theirs: Epoch, ours: Epoch, node: NodeId } "epochs_too_far" {
        log warn(%theirs, %ours, %node, "a replica's epochs are from nowhere");
    }

    // A lease.

    /// A peer names a later epoch than that of this primary, which leads by a lease.
    LaterEpochHeard { number: u64 } "later_epoch_heard" {
        log warn(number, "a later epoch was heard of: this primary acknowledges nothing more in its own");
    }
    /// The number of an epoch that was heard of could not be put on the disk.
    EpochNotKept { error: &'a dyn Display } "epoch_not_kept" {
        log warn(%error, "the number of a later epoch could not be put on the disk");
    }
    /// How old this node's state is by the primary's lease clock could not be put on the disk.
    LeaseClockNotKept { error: &'a dyn Display } "lease_clock_not_kept" {
        log warn(%error, "the primary's lease clock could not be put on the disk; it is tried again");
    }
    /// What is on the disk of a primary's lease clock can't be read.
    LeaseClockUnreadable { error: &'a dyn Display } "lease_clock_unreadable" {
        log warn(%error, "how old this node's state is, is not known until it has followed a primary");
    }

    // The process.

    /// The process has no descriptor left, and what the node opens comes from its reserve.
    DescriptorsUsedUp { limit: usize } "descriptors_used_up" {
        log warn(
            limit,
            "the process has all descriptors that it may have: what the node opens comes from a \
            small reserve. Limit the connections of the application's server, or raise the limit"
        );
    }

    // Connections of peers.

    /// What accepts peers' connections panicked, and goes on.
    ListenerPanicked { error: &'a dyn Display } "listener_panicked" {
        log error(%error, "the listener goes on");
    }
    /// A connection could not be accepted.
    NotAccepted { address: SocketAddr, error: &'a dyn Display } "not_accepted" {
        log warn(%address, %error, "can't accept a connection");
    }
    /// Connections on which nothing was proved take all the places that there are for them.
    ListenerCrowded { address: SocketAddr, from: &'a dyn Display, times: u64 } "listener_crowded" {
        log warn(
            %address, %from, times,
            "connections that prove nothing crowd the listener, and some were cut: it should not be \
            reachable from there"
        );
    }
    /// The configuration lets the node do without TLS.
    Plaintext { allowed: &'a dyn Debug } "plaintext" {
        log warn(
            ?allowed,
            "this node speaks with others without TLS where they do: Config::plaintext says so"
        );
    }
    /// The certificates in the files can't be used, and those that were in them before still are.
    CertificatesNotTaken { error: &'a dyn Display } "certificates_not_taken" {
        lasts Certificates = format!(
            "the certificates in the files can't be used, and those from before stay in use: {error}"
        );
        log error(%error, "the certificates in the files can't be used; those from before stay in use");
        event Event::CertificatesNotTaken { why: error.to_string() };
        counts "replite_certificates_not_taken_total" += 1;
    }
    /// Other certificates are in the files, and are used from now on.
    CertificatesTaken "certificates_taken" {
        log info("other certificates are in use from now on");
        event Event::CertificatesTaken;
        counts "replite_certificates_taken_total" += 1;
    }
    /// Peers that have the same roots and names refuse this node's certificate.
    CertificateDoubtful { why: &'a str } "certificate_doubtful" {
        lasts Certificates = format!(
            "peers with the same roots and names refuse this node's certificate: {why}"
        );
        log warn(why, "peers with the same roots and names refuse this node's certificate");
    }
    /// Nothing is wrong with the certificates any more.
    CertificatesGood "certificates_good" {
        ends Certificates;
    }
    /// TLS with peers did not come about for want of a certificate that both sides take.
    CertificateRefused { problem: &'a dyn Display, times: u64 } "certificate_refused" {
        log warn(times, "a peer that dialled this node was kept out: {problem}");
    }
    /// The application has mounted an endpoint that lets no peer in.
    EndpointWithoutSecret "endpoint_without_secret" {
        log warn("the mounted replication endpoint serves nobody: no secret is configured");
    }
    /// A peer's knock could not be answered.
    KnockNotAnswered { error: &'a dyn Display } "knock_not_answered" {
        log warn(%error, "can't answer a knock");
    }
    /// What serves a replica panicked; the replica comes again.
    StreamPanicked { node: NodeId, error: &'a dyn Display } "stream_panicked" {
        log error(%node, %error, "a replica's stream was broken off");
    }

    // Requests for the primary's application.

    /// What the replay layer makes of the headers in which proxies say who the client is.
    ClientHeaders { database: &'a str, what: &'a dyn Display } "client_headers" {
        log info(database, "the headers X-Forwarded-*, X-Real-IP and Forwarded {what}");
    }
    /// The address that the primary gives for its application is none.
    AppAddressInvalid { error: &'a dyn Display, url: &'a str } "app_address_invalid" {
        log warn(%error, %url, "the primary's app address is of no use");
    }
    /// Two nodes each take the other for the primary.
    PrimaryDisputed { asked: &'a dyn Debug, hint: &'a dyn Debug } "primary_disputed" {
        log warn(?asked, ?hint, "nodes disagree on who the primary is");
    }
    /// The primary's application can't be reached.
    PrimaryUnreachable { error: &'a (dyn StdError + 'static), target: &'a dyn Debug } "primary_unreachable" {
        log warn(error, ?target, "the primary can't be reached; it is tried again");
    }
    /// The primary has not been given its application's service, and this node speaks on the
    /// private channel only.
    ForwardsNotServed { target: &'a dyn Debug } "forwards_not_served" {
        log warn(
            ?target,
            "the primary takes no requests on the private channel: call `Db::serve_forwarded` on each \
             instance; it is tried again"
        );
    }
    /// The primary's application did not answer.
    PrimarySilent { target: &'a dyn Debug } "primary_silent" {
        log warn(?target, "the primary did not answer in time");
    }
    /// Another node became the primary while the application of the one before had a request, which
    /// it did not answer.
    PrimarySuperseded { target: &'a dyn Debug } "primary_superseded" {
        log warn(?target, "another node is the primary now, and the one before has not answered");
    }
    /// A connection to the primary's application broke within a request.
    PrimaryBroke { error: &'a (dyn StdError + 'static), target: &'a dyn Debug } "primary_broke" {
        log warn(error, ?target, "the connection to the primary broke");
    }

    // The handle.

    /// The writer connection has settings that its last user made.
    WriterNotReset { error: &'a dyn Display } "writer_not_reset" {
        log warn(%error, "the writer connection could not be set right");
    }
    /// The database was closed before its streams and tasks had ended.
    CloseNotAwaited { error: &'a dyn Display } "close_not_awaited" {
        log warn(%error, "the end of streams and tasks was not waited for");
    }
    /// No thread could be started that closes the database.
    CloseThreadMissing { error: &'a dyn Display } "close_thread_missing" {
        log warn(%error, "no thread to close the database on");
    }
    /// No clock could be had to wait for the end of streams and tasks.
    CloseClockMissing { error: &'a dyn Display } "close_clock_missing" {
        log warn(%error, "the end of streams and tasks is not waited for");
    }
    /// Streams went on after the node's end.
    StreamsLate "streams_late" {
        log warn("some streams did not end in time");
    }
    /// The node ends while requests are under way that other nodes forwarded on the private
    /// channel.
    ForwardsLate "forwards_late" {
        log warn("some forwarded requests did not end in time");
    }
    /// Tasks went on after the node's end.
    TasksLate "tasks_late" {
        log warn("some tasks did not end in time");
    }
}

fn wal_text(bytes: u64, limit: u64, why: WalReason) -> String {
    format!("the WAL has {bytes} bytes, its limit is {limit}: {why}")
}
