//! Rounds, one after the other.

use std::time::{Duration, Instant};

use crate::round::{Order, Report, run};

/// Requests that failed which are named.
const FAILED_MAX: usize = 5;

/// How many.
#[derive(Clone, Copy, Debug)]
pub struct Series {
    pub seed: u64,
    pub rounds: u64,
    /// None begins that would end after that, if it takes as long as the longest so far.
    pub time: Option<Duration>,
    /// The first one that fails is the last.
    pub first: bool,
}

/// Runs rounds of consecutive seeds, says how each went, and returns the seeds that failed.
///
/// # Errors
/// The system's.
pub async fn rounds(order: &Order, series: Series) -> std::io::Result<Vec<u64>> {
    let begin = Instant::now();
    let mut failed = Vec::new();
    let (mut done, mut longest) = (0, Duration::ZERO);
    let (mut gap, mut after) = (Duration::ZERO, Duration::ZERO);
    let (mut acknowledged, mut lost) = (0, 0);
    for seed in series.seed..series.seed.saturating_add(series.rounds) {
        if series.time.is_some_and(|time| begin.elapsed() + longest > time) {
            break;
        }
        let report = run(order, seed).await?;
        tell(&report, order.keep);
        (done, longest) = (done + 1, longest.max(report.took));
        (gap, after) = (gap.max(report.figures.longest_gap), after.max(report.primary_after));
        acknowledged += report.figures.acknowledged;
        lost += report.figures.lost;
        if !report.violations.is_empty() {
            failed.push(seed);
            if series.first {
                break;
            }
        }
    }
    println!(
        "{done} rounds in {:.0} s, {} failed {failed:?}; {acknowledged} acknowledged, {lost} of them in lost/; \
         longest time between two epochs {gap:.1?}, and to a primary after all faults {after:.1?}",
        begin.elapsed().as_secs_f64(),
        failed.len(),
    );
    Ok(failed)
}

fn tell(report: &Report, keep: bool) {
    let names: Vec<&str> = report.plan.iter().map(|step| step.fault).collect();
    let f = &report.figures;
    println!(
        "seed {}: {} in {:.1} s: {} acknowledged (lost/ {}, twice {}, destroyed {}), {} unknown ({} done), \
         {} not executed, {} foreign (gone {}), {} reads, {} epochs, told lost {}, {} of {} handed over, \
         failed {} away {}, longest {:.2?}, gap {:.2?}, primary after {:.1?}{}",
        report.seed,
        names.join(" "),
        report.took.as_secs_f64(),
        f.acknowledged,
        f.lost,
        f.lost_twice,
        f.destroyed,
        f.unknown,
        f.unknown_done,
        f.not_executed,
        f.foreign,
        f.foreign_gone,
        f.reads,
        f.epochs,
        f.told_lost,
        f.handed,
        f.handoffs,
        f.failed,
        f.failed_away,
        f.longest_request,
        f.longest_gap,
        report.primary_after,
        if report.violations.is_empty() { "" } else { ": FAILED" },
    );
    for request in report.failed.iter().take(FAILED_MAX) {
        println!("  failed: {request}");
    }
    if report.violations.is_empty() && !keep {
        return;
    }
    println!("the schedule of seed {}:\n{}", report.seed, report.diary);
    for violation in &report.violations {
        println!("violated: {violation}");
    }
    println!("logs and files of the nodes: {}", report.home.display());
    println!(
        "again: cargo run --release --manifest-path tests/failover/Cargo.toml -- --seed {} --rounds 1",
        report.seed
    );
}
