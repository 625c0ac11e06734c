//! A test that fails ends: its threads with it, and its waits after a while.

use std::sync::atomic::{AtomicBool, Ordering};
use std::time::{Duration, Instant};

/// Longest wait for anything.
pub(crate) const LIMIT: Duration = Duration::from_secs(60);

/// Sets its flag when it is dropped, also by an assertion that fails: a scope waits for its threads
/// before it lets a panic out, and threads without a scope would go on beside the tests that
/// follow.
pub(crate) struct Ends<'a>(pub(crate) &'a AtomicBool);

impl Drop for Ends<'_> {
    fn drop(&mut self) {
        self.0.store(true, Ordering::SeqCst);
    }
}

/// Waits on a runtime for a condition that nothing announces; by the clock on the wall, for a
/// test's own may stand still.
pub(crate) async fn comes(what: &str, mut done: impl FnMut() -> bool) {
    let end = Instant::now() + LIMIT;
    while !done() {
        assert!(Instant::now() < end, "timed out: {what}");
        tokio::task::yield_now().await;
    }
}

/// Whether the test that calls this is alone in its process. Where it is not, it is run once more in
/// a process of its own, whose threads and descriptors can be counted, and there is nothing left to
/// do here.
pub(crate) fn alone(name: &str) -> bool {
    const ALONE: &str = "REPLITE_TEST_ALONE";
    if std::env::var_os(ALONE).is_some() {
        return true;
    }
    let test = std::env::current_exe().unwrap();
    let ended = std::process::Command::new(test).args(["--exact", name]).env(ALONE, "1").output().unwrap();
    let said = String::from_utf8_lossy(&ended.stdout);
    // A name that no test has ends well, too.
    let ran = ended.status.success() && said.contains("test result: ok. 1 passed;");
    assert!(ran, "{name}: {}\n{said}{}", ended.status, String::from_utf8_lossy(&ended.stderr));
    false
}

/// Open descriptors of this process whose files are below a directory.
pub(crate) fn descriptors(below: &std::path::Path) -> usize {
    let all = std::fs::read_dir("/proc/self/fd").unwrap();
    let path = |fd: std::io::Result<std::fs::DirEntry>| std::fs::read_link(fd.ok()?.path()).ok();
    all.filter_map(path).filter(|path| path.starts_with(below)).count()
}

/// Threads of this process, but for the one that all its databases share while they are quiet.
pub(crate) fn threads() -> usize {
    let all = std::fs::read_dir("/proc/self/task").unwrap().flatten();
    let names = all.map(|task| std::fs::read_to_string(task.path().join("comm")).unwrap_or_default());
    names.filter(|name| name.trim() != "replite-notice").count()
}
