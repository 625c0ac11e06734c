//! How long a GET that writes takes: through the primary, and through an instance that finds out
//! late that it can't. `cargo build --release --example notes-sqlx && cargo bench`

#[path = "../../support/notes.rs"]
mod notes;
#[path = "../../../tests/support/lib.rs"]
mod support;

use std::time::Duration;

const VISITS: usize = 300;

fn main() {
    let notes = notes::Notes::start("notes-sqlx");
    let mut of_each: Vec<[Duration; 3]> = (0..3).map(|n| times(&notes, n)).collect();
    of_each.sort();
    let [primary, one, other] = &of_each[..] else { unreachable!() };
    for (name, [median, most, longest]) in [("primary", primary), ("replica", one), ("replica", other)] {
        println!(
            "a GET that writes through a {name}: {median:?} (median), {most:?} (p99), {longest:?} (longest)"
        );
    }
    println!("sqlx_late_replay_ms {:.2}", one[0].max(other[0]).as_secs_f64() * 1000.0);
    notes.end();
}

/// Median, the 99th percentile, and the longest.
fn times(notes: &notes::Notes, n: usize) -> [Duration; 3] {
    for _ in 0..20 {
        notes.visit(n);
    }
    let mut all: Vec<Duration> = (0..VISITS).map(|_| notes.visit(n).1).collect();
    all.sort();
    [all[VISITS / 2], all[VISITS * 99 / 100], all[VISITS - 1]]
}
