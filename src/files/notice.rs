//! Word from the kernel that a file is written to. Who waits for that need not look again and
//! again.
//!
//! One inotify object and one thread serve the whole process, while any watch stands. A watch ends
//! with the first write, so a file that is written to all the time costs nothing more.

#[cfg(target_os = "linux")]
pub(crate) use linux::{Notice, on_write};
#[cfg(not(target_os = "linux"))]
pub(crate) use others::{Notice, on_write};

#[cfg(target_os = "linux")]
mod linux {
    use std::collections::HashMap;
    use std::mem::MaybeUninit;
    use std::os::fd::OwnedFd;
    use std::path::Path;
    use std::sync::atomic::{AtomicBool, Ordering};
    use std::sync::{Arc, Mutex, Weak};

    use rustix::event::{EventfdFlags, PollFd, PollFlags, eventfd, poll};
    use rustix::fs::inotify::{self, CreateFlags, WatchFlags};
    use rustix::io::{Errno, write};

    use crate::error::{Error, Result};
    use crate::lock::lock;
    use crate::threads;

    /// What is called, on the thread that all watches share. It must not block.
    type NoticeCall = Arc<dyn Fn() + Send + Sync>;

    static WATCHES: Mutex<Weak<NoticeThread>> = Mutex::new(Weak::new());

    /// A watch, until the first write or until this is dropped.
    pub(crate) struct Notice {
        thread: Arc<NoticeThread>,
        watch: i32,
    }

    impl Drop for Notice {
        fn drop(&mut self) {
            let watches = &self.thread.0;
            if lock(&watches.wanted).remove(&self.watch).is_some() {
                // It may have ended just now.
                let _ = inotify::remove_watch(&watches.inotify, self.watch);
            }
        }
    }

    /// Ends the thread with the last watch.
    struct NoticeThread(Arc<Watches>);

    impl Drop for NoticeThread {
        fn drop(&mut self) {
            // A counter that is at 1 can't be full.
            let _ = write(&self.0.ends, &1u64.to_ne_bytes());
        }
    }

    struct Watches {
        inotify: OwnedFd,
        ends: OwnedFd,
        wanted: Mutex<HashMap<i32, NoticeCall>>,
        failed: AtomicBool,
    }

    /// Has `call` called once, when somebody writes to the file. A write through a mapping is none.
    /// What was written before this returns may go unnoticed.
    ///
    /// None: the system has no watch to give, or none for such a file.
    pub(crate) fn on_write(path: &Path, call: NoticeCall) -> Option<Notice> {
        let thread = thread()?;
        let watches = &thread.0;
        // The thread that gets its event waits until the call is there.
        let mut wanted = lock(&watches.wanted);
        let watch =
            inotify::add_watch(&watches.inotify, path, WatchFlags::MODIFY | WatchFlags::ONESHOT).ok()?;
        if watches.failed.load(Ordering::Acquire) {
            return None;
        }
        wanted.insert(watch, call);
        drop(wanted);
        Some(Notice { thread, watch })
    }

    fn thread() -> Option<Arc<NoticeThread>> {
        let mut shared = lock(&WATCHES);
        if let Some(thread) = shared.upgrade() {
            return (!thread.0.failed.load(Ordering::Acquire)).then_some(thread);
        }
        let watches = Arc::new(Watches {
            inotify: inotify::init(CreateFlags::CLOEXEC | CreateFlags::NONBLOCK).ok()?,
            ends: eventfd(0, EventfdFlags::CLOEXEC | EventfdFlags::NONBLOCK).ok()?,
            wanted: Mutex::default(),
            failed: AtomicBool::new(false),
        });
        let end = |watches: Arc<Watches>, ended: Result<()>| {
            if let Err(error) = ended {
                watches.failed.store(true, Ordering::Release);
                watches.tell_all();
                tracing::debug!(%error, "no word of writes any more");
            }
        };
        threads::start("replite-notice", watches.clone(), |watches| watches.run(), end).ok()?;
        let thread = Arc::new(NoticeThread(watches));
        *shared = Arc::downgrade(&thread);
        Some(thread)
    }

    impl Watches {
        fn run(&self) -> Result<()> {
            let failed = |errno: Errno| Error::io("wait for", "inotify")(errno.into());
            let mut buffer = [MaybeUninit::uninit(); 4096];
            loop {
                let mut both =
                    [PollFd::new(&self.inotify, PollFlags::IN), PollFd::new(&self.ends, PollFlags::IN)];
                match poll(&mut both, None) {
                    Err(Errno::INTR) => continue,
                    polled => polled.map_err(failed)?,
                };
                if !both[1].revents().is_empty() {
                    return Ok(());
                }
                let mut events = inotify::Reader::new(&self.inotify, &mut buffer);
                loop {
                    match events.next() {
                        // Some were dropped, of whatever watch.
                        Ok(event) if event.wd() < 0 => self.tell_all(),
                        Ok(event) => self.tell(event.wd()),
                        Err(Errno::INTR) => {}
                        Err(Errno::AGAIN) => break,
                        Err(errno) => return Err(failed(errno)),
                    }
                }
            }
        }

        fn tell(&self, watch: i32) {
            // Out of the lock, where the call may drop its notice.
            let call = lock(&self.wanted).remove(&watch);
            if let Some(call) = call {
                call();
            }
        }

        fn tell_all(&self) {
            let all = std::mem::take(&mut *lock(&self.wanted));
            all.into_values().for_each(|call| call());
        }
    }

    #[cfg(test)]
    mod tests {
        use std::fs::{self, OpenOptions};
        use std::io::Write;
        use std::sync::mpsc::{self, RecvTimeoutError};
        use std::time::Duration;

        use super::*;

        #[test]
        fn the_first_write_is_told_once_and_what_is_dropped_is_not() {
            let dir = tempfile::tempdir().unwrap();
            let watched = |name: &str| {
                let path = dir.path().join(name);
                fs::write(&path, b"a").unwrap();
                let (tell, told) = mpsc::channel();
                let notice = on_write(&path, Arc::new(move || tell.send(()).unwrap())).unwrap();
                let write = move || {
                    OpenOptions::new().append(true).open(&path).unwrap().write_all(b"b").unwrap();
                };
                (notice, told, write)
            };
            let (one, told, write) = watched("one");
            let (other, never_told, write_other) = watched("other");
            let (last, last_told, write_last) = watched("last");
            drop(other);
            write_other();
            write();
            write();
            told.recv_timeout(Duration::from_secs(30)).unwrap();
            // The events come in their order.
            write_last();
            last_told.recv_timeout(Duration::from_secs(30)).unwrap();
            assert_eq!(told.recv_timeout(Duration::ZERO), Err(RecvTimeoutError::Disconnected));
            assert_eq!(never_told.recv_timeout(Duration::ZERO), Err(RecvTimeoutError::Disconnected));
            assert!(on_write(&dir.path().join("none"), Arc::new(|| {})).is_none());
            let watches = Arc::downgrade(&one.thread.0);
            drop((one, last));
            // Others may have watches, too; else the thread ends, and lets go of what it has.
            while watches.upgrade().is_some() && lock(&WATCHES).upgrade().is_none() {
                std::thread::yield_now();
            }
        }
    }
}

#[cfg(not(target_os = "linux"))]
mod others {
    use std::path::Path;
    use std::sync::Arc;

    /// There is none.
    pub(crate) use std::convert::Infallible as Notice;

    /// There is nothing of the kind here.
    pub(crate) fn on_write(_path: &Path, _call: Arc<dyn Fn() + Send + Sync>) -> Option<Notice> {
        None
    }
}
