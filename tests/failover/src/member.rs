//! One node as the checker holds it: its process, its place, and when its reads may fail.

use std::fs::{self, OpenOptions};
use std::io::{self, Write as _};
use std::net::SocketAddr;
use std::os::unix::fs::symlink;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, ExitStatus, Stdio};
use std::sync::{Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

use rustix::process::{Pid, Signal, kill_process};

use crate::clock::{Micros, now};
use crate::node::Standing;
use crate::wires::Wires;

/// Between two looks at something that nothing announces.
pub const PAUSE: Duration = Duration::from_millis(20);

#[derive(Debug)]
pub struct Member {
    pub index: usize,
    pub name: String,
    pub listen: SocketAddr,
    /// Where the other nodes reach it.
    pub advertised: SocketAddr,
    pub dir: PathBuf,
    /// What it says.
    pub log: PathBuf,
    /// Held by the one fault that does something to the process or its files.
    pub turn: tokio::sync::Mutex<()>,
    arguments: Vec<String>,
    environment: Vec<(String, String)>,
    wires: Wires,
    state: Mutex<State>,
}

#[derive(Debug, Default)]
struct State {
    child: Option<Child>,
    /// It has ended because it was asked to, or was killed.
    ended: bool,
    stopped: bool,
    /// More variables for its next start.
    variables: Vec<(String, String)>,
    /// Since when reads of it may fail.
    away: Option<Micros>,
    was_away: Vec<(Micros, Micros)>,
    /// Why it must not lead at the moment.
    barred: Option<String>,
    standing: Option<(Micros, Standing)>,
}

/// Where a node is, and what its command line has.
#[derive(Debug)]
pub struct Place {
    pub index: usize,
    pub listen: SocketAddr,
    pub advertised: SocketAddr,
    pub home: PathBuf,
    pub arguments: Vec<String>,
    pub environment: Vec<(String, String)>,
}

impl Member {
    /// # Errors
    /// The system's.
    pub fn new(place: Place, wires: Wires) -> io::Result<Member> {
        let name = format!("n{}", place.index + 1);
        let dir = place.home.join(&name);
        fs::create_dir_all(&dir)?;
        let member = Member {
            index: place.index,
            listen: place.listen,
            advertised: place.advertised,
            log: place.home.join(format!("{name}.log")),
            turn: tokio::sync::Mutex::default(),
            arguments: place.arguments,
            environment: place.environment,
            wires,
            state: Mutex::new(State { away: Some(now()), ended: true, ..State::default() }),
            dir,
            name,
        };
        member.store(true)?;
        Ok(member)
    }

    #[must_use]
    pub fn database(&self) -> PathBuf {
        self.dir.join("app.db")
    }

    /// Where this node alone finds the directory of the lease: a link.
    fn way_to_store(&self) -> PathBuf {
        self.dir.with_extension("store")
    }

    /// Lets the node see the store, or takes it away.
    ///
    /// # Errors
    /// The system's.
    pub fn store(&self, there: bool) -> io::Result<()> {
        let new = self.dir.with_extension("store-new");
        let _ = fs::remove_file(&new);
        // What is no directory can't be read or written as one.
        symlink(if there { "store" } else { "n1.log" }, &new)?;
        fs::rename(&new, self.way_to_store())
    }

    /// Starts the process, if it does not run.
    ///
    /// # Errors
    /// The system's.
    pub fn start(&self, binary: &Path) -> io::Result<()> {
        let mut state = self.state();
        if state.child.is_some() {
            return Ok(());
        }
        fs::create_dir_all(&self.dir)?;
        let mut log = OpenOptions::new().create(true).append(true).open(&self.log)?;
        writeln!(log, "--- starts at {:.3}", now() as f64 / 1e6)?;
        let child = Command::new(binary)
            .args(["node", "--name", &self.name, "--listen", &self.listen.to_string()])
            .args(["--advertise", &format!("http://{}", self.advertised)])
            .arg("--dir")
            .arg(&self.dir)
            .args(&self.arguments)
            .envs(self.environment.iter().cloned())
            .envs(state.variables.iter().cloned())
            .stdin(Stdio::null())
            .stdout(log.try_clone()?)
            .stderr(log)
            .spawn()?;
        self.wires.process(self.index, Some(child.id()));
        (state.child, state.ended, state.stopped) = (Some(child), false, false);
        Ok(())
    }

    fn signal(&self, signal: Signal) {
        if let Some(child) = &self.state().child
            && let Some(pid) = Pid::from_raw(child.id() as i32)
        {
            // It may have ended just now; its id is still its own, for it was not waited for.
            let _ = kill_process(pid, signal);
        }
    }

    /// SIGKILL.
    pub fn kill(&self) {
        self.goes_away();
        let mut state = self.state();
        state.ended = true;
        self.wires.process(self.index, None);
        if let Some(mut child) = state.child.take() {
            // What can't be killed has ended.
            let _ = child.kill();
            let _ = child.wait();
        }
        state.standing = None;
    }

    /// SIGTERM, and the end. None: it did not come in time, and the process was killed.
    pub async fn end(&self, limit: Duration) -> Option<ExitStatus> {
        self.goes_away();
        self.state().ended = true;
        self.signal(Signal::TERM);
        let begin = Instant::now();
        loop {
            if self.state().child.is_none() {
                return Some(ExitStatus::default());
            }
            if let Some(status) = self.exited() {
                return Some(status);
            }
            if begin.elapsed() > limit {
                self.kill();
                return None;
            }
            tokio::time::sleep(PAUSE).await;
        }
    }

    /// How the process ended, if it did since the last call.
    pub fn exited(&self) -> Option<ExitStatus> {
        let mut state = self.state();
        let status = state.child.as_mut()?.try_wait().ok()??;
        (state.child, state.standing) = (None, None);
        self.wires.process(self.index, None);
        Some(status)
    }

    /// SIGSTOP.
    pub fn stop(&self) {
        self.goes_away();
        self.state().stopped = true;
        self.signal(Signal::STOP);
    }

    /// SIGCONT.
    pub fn go_on(&self) {
        self.signal(Signal::CONT);
        self.state().stopped = false;
    }

    #[must_use]
    pub fn runs(&self) -> bool {
        let state = self.state();
        state.child.is_some() && !state.stopped
    }

    /// Whether its end was asked for.
    #[must_use]
    pub fn is_ended(&self) -> bool {
        self.state().ended
    }

    pub fn variables(&self, variables: Vec<(String, String)>) {
        self.state().variables = variables;
    }

    /// From now on its reads may fail.
    pub fn goes_away(&self) {
        let mut state = self.state();
        state.away.get_or_insert_with(now);
    }

    /// Notes what it said of itself; returns whether it was away until then.
    pub fn said(&self, asked: Micros, standing: Standing) -> bool {
        let mut state = self.state();
        let back = state.away.is_some_and(|away| asked > away) && standing.position.is_some();
        state.standing = Some((asked, standing));
        back && !state.stopped && !state.ended
    }

    /// Its reads work again, as a read showed that began at this instant.
    pub fn is_back(&self, asked: Micros) {
        let mut state = self.state();
        if let Some(away) = state.away.take_if(|away| asked > *away) {
            state.was_away.push((away, now()));
        }
    }

    pub fn is_silent(&self) {
        self.state().standing = None;
    }

    #[must_use]
    pub fn standing(&self) -> Option<Standing> {
        self.state().standing.clone().map(|(_, standing)| standing)
    }

    /// Whether its reads might fail at any time between two instants.
    #[must_use]
    pub fn was_away(&self, from: Micros, to: Micros) -> bool {
        let state = self.state();
        state.away.is_some_and(|away| away <= to)
            || state.was_away.iter().any(|(begin, end)| *begin <= to && from <= *end)
    }

    /// It must not lead from now on, or may again.
    pub fn bar(&self, why: Option<&str>) {
        self.state().barred = why.map(str::to_string);
    }

    #[must_use]
    pub fn barred(&self) -> Option<String> {
        self.state().barred.clone()
    }

    /// The last lines that it said.
    #[must_use]
    pub fn last_words(&self, lines: usize) -> String {
        let text = fs::read(&self.log).unwrap_or_default();
        let text = String::from_utf8_lossy(&text);
        let all: Vec<&str> = text.lines().collect();
        all[all.len().saturating_sub(lines)..].join("\n    ")
    }

    fn state(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl Drop for Member {
    fn drop(&mut self) {
        self.kill();
    }
}
