//! A directory that is watched, and beside it the trace.

use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicU32, Ordering};

/// Kept when a test fails, so that its states can be looked at.
#[derive(Debug)]
pub struct Stage {
    dir: PathBuf,
}

impl Stage {
    #[must_use]
    pub fn new(name: &str) -> Stage {
        static NEXT: AtomicU32 = AtomicU32::new(0);
        let number = NEXT.fetch_add(1, Ordering::Relaxed);
        let dir = std::env::temp_dir().join(format!("replite-power-{}-{number}-{name}", std::process::id()));
        std::fs::create_dir_all(dir.join("watched")).unwrap();
        Stage { dir: dir.canonicalize().unwrap() }
    }

    #[must_use]
    pub fn dir(&self) -> &Path {
        &self.dir
    }

    #[must_use]
    pub fn watched(&self) -> PathBuf {
        self.dir.join("watched")
    }

    #[must_use]
    pub fn trace(&self) -> PathBuf {
        self.dir.join("trace")
    }

    /// What a process needs so that it is recorded.
    #[must_use]
    pub fn variables(&self) -> Vec<(&'static str, String)> {
        let exe = std::env::current_exe().unwrap();
        let built = exe.parent().and_then(Path::parent).unwrap();
        let recorder = built.join("examples").join("librecorder.so");
        assert!(recorder.exists(), "{} is built by `cargo build --examples`", recorder.display());
        let text = |path: PathBuf| path.to_str().unwrap().to_string();
        vec![
            ("LD_PRELOAD", text(recorder)),
            ("POWER_WATCH", text(self.watched())),
            ("POWER_TRACE", text(self.trace())),
            ("POWER_ACKS", text(self.watched().join("acks"))),
        ]
    }

    /// Runs something, such as a kill, while nobody is between a change and its record.
    pub fn between(&self, run: impl FnOnce()) {
        let trace = std::fs::File::open(self.trace()).unwrap();
        trace.lock().unwrap();
        run();
    }
}

impl Drop for Stage {
    fn drop(&mut self) {
        if !std::thread::panicking() {
            // What is left behind is in a temporary directory.
            let _ = std::fs::remove_dir_all(&self.dir);
        }
    }
}
