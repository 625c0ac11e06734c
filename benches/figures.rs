//! Figures: ratios to raw SQLite, measured side by side in one run.
//! `cargo bench --bench figures -- NAME` runs one.

#[path = "../tests/support/app.rs"]
mod app;
#[path = "figures/commits.rs"]
mod commits;
#[path = "figures/deploys.rs"]
mod deploys;
#[path = "figures/doors.rs"]
mod doors;
#[path = "../tests/support/fleet.rs"]
mod fleet;
#[path = "figures/forwards.rs"]
mod forwards;
#[path = "figures/heals.rs"]
mod heals;
#[path = "figures/home.rs"]
mod home;
#[path = "../tests/support/http.rs"]
mod http_support;
#[path = "figures/members.rs"]
mod members;
#[path = "figures/reads.rs"]
mod reads;
#[path = "figures/roles.rs"]
mod roles;
#[path = "figures/streams.rs"]
mod streams;
#[path = "../tests/support/lib.rs"]
mod support;
#[path = "figures/trio.rs"]
mod trio;
#[path = "figures/verify.rs"]
mod verify;
#[path = "figures/wal.rs"]
mod wal;
#[path = "figures/wire.rs"]
mod wire;

use std::time::Instant;

/// Figures that are measured together, and what measures them.
type Figure = (&'static [&'static str], fn());

const FIGURES: [Figure; 45] = [
    (&["commit_normal_ratio"], commits::normal),
    (&["commit_full_ratio"], commits::full),
    (&["group_commit_ratio"], commits::group),
    (&["write_hop_us"], commits::hop),
    (
        &[
            "commit_async_two_replicas_ratio",
            "switches_per_commit_primary",
            "switches_per_commit_two_replicas",
        ],
        trio::lone,
    ),
    (
        &[
            "group_two_replicas_per_s",
            "group_vs_normal_ratio",
            "group_cpu_primary_us",
            "group_cpu_two_replicas_us",
        ],
        trio::group,
    ),
    (&["lag_sleeping_p50_us", "lag_sleeping_p99_us"], trio::lag),
    (
        &[
            "idle_ms_per_s",
            "idle_replica_ms_per_s",
            "idle_100_ms_per_s",
            "idle_100_threads_each",
            "idle_100_descriptors_each",
        ],
        trio::idle,
    ),
    (&["read_async_us"], reads::from_async),
    (&["read_primary_ratio", "read_replica_ratio", "read_plain_ratio", "read_pool_ns"], reads::points),
    (&["read_two_threads_ratio", "read_two_to_one_ratio"], reads::two_threads),
    (&["read_under_writes_ratio"], reads::under_writes),
    (&["replica_read_p99_ratio"], reads::beside_apply),
    (&["apply_under_readers_p99_ms"], reads::apply_under_readers),
    (&["lag_p50_us", "lag_p99_us"], streams::lag),
    (&["lag_mounted_p50_us", "lag_mounted_p90_us"], streams::lag_mounted),
    (&["tls_lag_ratio"], streams::tls_lag),
    (&["tls_snapshot_ratio"], streams::tls_snapshot),
    (&["catchup_txn_per_s"], streams::catch_up),
    (&["snapshot_cp_ratio", "big_txn_memory_mib"], streams::bulk),
    (&["wire_append_bytes", "wire_update_bytes", "wire_insert_bytes", "wire_loaded_bytes"], wire::commits),
    (
        &["log_bytes_per_commit", "disk_bytes_per_commit_primary", "disk_bytes_per_commit_replica"],
        wire::files,
    ),
    (&["far_link_lag_ms", "far_link_lag_100_ms"], wire::far),
    (&["lossy_link_lag_ms"], wire::lossy),
    (&["layer_get_us", "replay_post_us"], doors::layer),
    (&["last_resort_token_us"], doors::last_resort),
    (&["proxy_req_per_s_ratio", "proxy_plain_req_per_s_ratio"], doors::forwarded),
    (&["forward_channel_post_us", "forward_channel_req_per_s"], forwards::forwards),
    (&["orderly_restart_failed", "orderly_restart_longest_ms"], doors::restarted),
    (&["verify_gb_per_s", "verify_ratio"], verify::whole),
    (&["wait_wakeup_us"], streams::wakeups),
    (&["temporary_db_ms"], doors::temporary),
    (&["heal_seconds", "heal_bytes_ratio", "heal_compare_seconds", "heal_compare_bytes_ratio"], heals::heals),
    (&["open_after_kill_ms"], heals::open_after_kill),
    (&["hash_us_per_page"], heals::hashes),
    (&["patch_us_per_page"], heals::patches),
    (&["wal_peak_mib", "wal_commits_ratio"], wal::bounded),
    (&["failover_p50_s", "failover_max_s"], roles::failover),
    (&["members_failover_p50_s", "members_failover_max_s"], roles::members_failover),
    (&["members_bytes_per_minute"], roles::members_idle),
    (&["restart_takeover_ms"], roles::restart),
    (&["promote_ms", "promote_first_write_ms", "demote_ms"], roles::changes),
    (&["lease_requests_per_minute"], roles::requests),
    (&["handoff_pause_p50_ms", "handoff_pause_p99_ms"], deploys::handoffs),
    (&["rolling_deploy_failed", "shutdown_ms"], deploys::rolling),
];

/// The process of a node that `app` starts.
fn node_process() {
    app::run_node();
}

/// The same of a node that `fleet` starts.
fn fleet_process() {
    fleet::run_member();
}

fn main() {
    if home::child() || reads::child() || members::child() || verify::child() || wal::child() {
        return;
    }
    if support::is_child() {
        return if std::env::var_os("WRITERS").is_some() { fleet_process() } else { node_process() };
    }
    if let Some(path) = std::env::var_os("REPLITE_BENCH_DOOMED") {
        return heals::doomed(path.as_ref());
    }
    let wanted: Vec<String> = std::env::args().skip(1).filter(|a| !a.starts_with("--")).collect();
    let is_figure = |word: &String| FIGURES.iter().any(|(names, _)| names.contains(&word.as_str()));
    if let Some(none) = wanted.iter().find(|word| !is_figure(word)) {
        eprintln!("there is no figure {none}");
        std::process::exit(2);
    }
    for (names, run) in FIGURES {
        if wanted.is_empty() || names.iter().any(|n| wanted.iter().any(|w| w == n)) {
            let begin = Instant::now();
            run();
            eprintln!("({} s)", begin.elapsed().as_secs());
        }
    }
}

/// How many rounds a long figure has: all of them where it is named, else a tenth.
fn rounds(names: &[&str], all: usize) -> usize {
    let named = std::env::args().skip(1).any(|word| names.contains(&word.as_str()));
    if named { all } else { all / 10 }
}

/// Prints a figure: the median of the runs, and their spread.
fn figure(name: &str, unit: &str, mut runs: Vec<f64>) {
    runs.sort_by(f64::total_cmp);
    let median = runs[runs.len() / 2];
    println!("{name}: {median:.2} {unit} ({:.2}..{:.2} of {})", runs[0], runs[runs.len() - 1], runs.len());
}

/// The value below which this share of the samples lies.
fn quantile(samples: &mut [f64], share: f64) -> f64 {
    samples.sort_by(f64::total_cmp);
    samples[((samples.len() - 1) as f64 * share) as usize]
}
