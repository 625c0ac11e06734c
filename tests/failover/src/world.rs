//! The cluster of one round, and all that is noted of it.

use std::fs::OpenOptions;
use std::io::{self, Write as _};
use std::net::SocketAddr;
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use http::Method;
use tokio::net::TcpSocket;
use tokio::sync::watch;

use crate::clock::{Micros, now, seconds};
use crate::history::{History, Look, Violation};
use crate::member::{Member, PAUSE, Place};
use crate::node::Standing;
use crate::request;
use crate::store::{Store, StoreKind};
use crate::wires::Wires;

/// How long a node may take to say how it stands.
const LOOK_LIMIT: Duration = Duration::from_secs(2);
/// Between two looks at a node.
const LOOK_PAUSE: Duration = Duration::from_millis(60);

/// How the nodes of a round are set up.
#[derive(Clone, Debug)]
pub struct Setting {
    pub nodes: usize,
    /// None: the first node is the primary.
    pub lease: Option<LeaseSetting>,
    /// The log that is kept, where it is short.
    pub log_bytes: Option<u64>,
}

#[derive(Clone, Copy, Debug)]
pub struct LeaseSetting {
    pub store: StoreKind,
    pub time: Duration,
    pub loss: Duration,
    /// What requests that run have when the lease is handed over.
    pub drain: Duration,
}

impl Setting {
    /// The lease's time, or none.
    #[must_use]
    pub fn lease_time(&self) -> Duration {
        self.lease.map_or(Duration::ZERO, |lease| lease.time)
    }

    /// What keeps the lease's record; none without a lease.
    #[must_use]
    pub fn store(&self) -> Option<StoreKind> {
        self.lease.map(|lease| lease.store)
    }

    /// How much may be lost of what was acknowledged.
    #[must_use]
    pub fn loss_bound(&self) -> Duration {
        self.lease.map_or(Duration::ZERO, |lease| lease.time + lease.loss)
    }
}

#[derive(Debug)]
pub struct World {
    pub setting: Setting,
    pub home: PathBuf,
    pub binary: PathBuf,
    pub members: Vec<Arc<Member>>,
    /// A place for one more, which no client asks.
    pub spare: Arc<Member>,
    pub wires: Wires,
    pub store: Store,
    pub begin: Micros,
    /// Whether clients go on.
    pub clients: watch::Sender<bool>,
    history: Mutex<History>,
    troubles: AtomicUsize,
    violations: Mutex<Vec<Violation>>,
    diary: Mutex<Vec<(Micros, String)>>,
    /// Kept bound, so that no other process gets them: nodes listen on them all the same.
    _ports: Vec<TcpSocket>,
}

fn port() -> io::Result<(TcpSocket, SocketAddr)> {
    let socket = TcpSocket::new_v4()?;
    socket.bind(SocketAddr::from(([127, 0, 0, 1], 0)))?;
    socket.set_reuseaddr(true)?;
    let address = socket.local_addr()?;
    Ok((socket, address))
}

impl World {
    /// Makes the places of all nodes. None runs yet.
    ///
    /// # Errors
    /// The system's.
    pub async fn new(setting: Setting, home: PathBuf, binary: &Path) -> io::Result<Arc<World>> {
        std::fs::create_dir_all(home.join("store"))?;
        let wires = Wires::new();
        let kind = setting.store().unwrap_or(StoreKind::Directory);
        let store = Store::start(kind, binary).await?;
        let store = store.ok_or_else(|| io::Error::other("etcd is not here"))?;
        let (mut ports, mut places) = (Vec::new(), Vec::new());
        for index in 0..=setting.nodes {
            let (socket, listen) = port()?;
            ports.push(socket);
            places.push((listen, wires.stand_before(index, listen).await?));
        }
        let urls: Vec<String> =
            places[..setting.nodes].iter().map(|(_, way)| format!("http://{way}/_replite")).collect();
        let mut members = Vec::new();
        let mut leads = None;
        for (index, (listen, advertised)) in places.into_iter().enumerate() {
            let (lease, environment) = match kind {
                StoreKind::Directory => {
                    (home.join(format!("n{}.store/lease", index + 1)).display().to_string(), Vec::new())
                }
                StoreKind::Members => (format!("members:{}", urls.join(",")), Vec::new()),
                StoreKind::Etcd | StoreKind::Objects => store.of_node(index).await?,
            };
            let mut arguments = Vec::new();
            let mut argument = |name: &str, value: String| arguments.extend([format!("--{name}"), value]);
            match (&setting.lease, leads) {
                (Some(times), _) => {
                    argument("lease", lease);
                    argument("nodes", setting.nodes.to_string());
                    argument("lease-time", times.time.as_millis().to_string());
                    argument("failover-loss", times.loss.as_millis().to_string());
                    argument("drain-limit", times.drain.as_millis().to_string());
                    argument("hook", home.join(format!("n{}.hook", index + 1)).display().to_string());
                }
                (None, Some(leads)) => argument("follows", format!("http://{leads}")),
                (None, None) => leads = Some(advertised),
            }
            if let Some(bytes) = setting.log_bytes {
                argument("log-bytes", bytes.to_string());
            }
            let place = Place { index, listen, advertised, home: home.clone(), arguments, environment };
            members.push(Arc::new(Member::new(place, wires.clone())?));
        }
        let spare = members.pop().ok_or_else(|| io::Error::other("no node"))?;
        let world = World {
            setting,
            home,
            binary: binary.to_path_buf(),
            members,
            spare,
            wires,
            store,
            begin: now(),
            clients: watch::Sender::new(true),
            history: Mutex::default(),
            troubles: AtomicUsize::new(0),
            violations: Mutex::default(),
            diary: Mutex::default(),
            _ports: ports,
        };
        Ok(Arc::new(world))
    }

    pub fn history(&self) -> MutexGuard<'_, History> {
        self.history.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Something begins to be wrong, or ends to be.
    pub fn is_troubled(&self, begins: bool) {
        match begins {
            true => self.troubles.fetch_add(1, Ordering::Relaxed),
            false => self.troubles.fetch_sub(1, Ordering::Relaxed),
        };
    }

    /// How many things are wrong at the moment.
    #[must_use]
    pub fn troubles(&self) -> usize {
        self.troubles.load(Ordering::Relaxed)
    }

    pub fn violation(&self, rule: &'static str, what: impl Into<String>) {
        let what = format!("{:.3} {}", self.at(now()), what.into());
        let mut all = self.violations.lock().unwrap_or_else(PoisonError::into_inner);
        // What is wrong again and again is said often enough.
        if all.iter().filter(|violation| violation.rule == rule).count() < 10 {
            all.push(Violation { rule, what });
        }
    }

    #[must_use]
    pub fn violations(&self) -> Vec<Violation> {
        self.violations.lock().unwrap_or_else(PoisonError::into_inner).clone()
    }

    /// Writes into the schedule, also that in the round's directory.
    pub fn note(&self, what: impl Into<String>) {
        let (at, what) = (now(), what.into());
        let file = OpenOptions::new().create(true).append(true).open(self.home.join("schedule"));
        // The one in memory counts.
        let _ = file.and_then(|mut file| writeln!(file, "{:8.3} {what}", self.at(at)));
        self.diary.lock().unwrap_or_else(PoisonError::into_inner).push((at, what));
    }

    /// The schedule as it was.
    #[must_use]
    pub fn diary(&self) -> String {
        let diary = self.diary.lock().unwrap_or_else(PoisonError::into_inner);
        let line = |(at, what): &(Micros, String)| format!("  {:8.3} {what}\n", self.at(*at));
        diary.iter().map(line).collect()
    }

    /// Seconds since the round began.
    #[must_use]
    pub fn at(&self, time: Micros) -> f64 {
        seconds(self.begin, time)
    }

    /// Starts a node.
    pub fn start(&self, member: &Member) {
        if let Err(error) = member.start(&self.binary) {
            self.violation("harness", format!("{} can't be started: {error}", member.name));
        }
    }

    /// The node that says to lead, with the highest epoch if there are several.
    #[must_use]
    pub fn leader(&self) -> Option<Arc<Member>> {
        let standing = |member: &Arc<Member>| member.standing().filter(|standing| standing.role == "primary");
        let all = self.members.iter().chain([&self.spare]);
        let leads = all.filter_map(|m| Some((standing(m)?.epoch, m.clone())));
        leads.max_by_key(|(epoch, _)| *epoch).map(|(_, member)| member)
    }

    /// Waits for a condition; returns whether it came.
    pub async fn comes(&self, limit: Duration, mut done: impl FnMut() -> bool) -> bool {
        let begin = now();
        while !done() {
            if now() - begin > limit.as_micros() as u64 {
                return false;
            }
            tokio::time::sleep(PAUSE).await;
        }
        true
    }

    /// Looks at a node again and again, starts it anew when it ends by itself, and says what must
    /// not be.
    pub async fn watch(self: Arc<World>, member: Arc<Member>) {
        loop {
            if !member.is_ended()
                && let Some(status) = member.exited()
            {
                member.goes_away();
                let words = member.last_words(6);
                self.violation("alive", format!("{} ended by itself: {status}\n    {words}", member.name));
                tokio::time::sleep(Duration::from_millis(500)).await;
                self.start(&member);
            }
            if member.runs() {
                self.look(&member).await;
            } else {
                member.is_silent();
            }
            tokio::time::sleep(LOOK_PAUSE).await;
        }
    }

    async fn look(&self, member: &Member) {
        let begin = now();
        let barred = member.barred();
        let Ok(standing) = request::get::<Standing>(member.listen, "/status", LOOK_LIMIT).await else {
            member.is_silent();
            return;
        };
        let look = Look {
            begin,
            end: now(),
            node: member.name.clone(),
            role: standing.role.clone(),
            epoch: standing.epoch,
            position: standing.position,
        };
        let leads = standing.role == "primary";
        if let Some(why) = barred.filter(|why| leads && member.barred().as_ref() == Some(why)) {
            let at = standing.position.map(|position| position.to_string());
            self.violation("5 eligible", format!("{} leads, which {why}: {at:?}", member.name));
            member.bar(None);
        }
        self.compare(&look);
        self.history().looks.push(look);
        if member.said(begin, standing) {
            let asked = now();
            let read = request::send(member.listen, Method::GET, "/read", &[], Vec::new(), LOOK_LIMIT).await;
            if read.is_ok_and(|answer| answer.status == 200) {
                member.is_back(asked);
            }
        }
    }

    /// Writes down why there is no primary, as each node sees it.
    pub async fn ask_why(&self) {
        for member in &self.members {
            let none = Vec::new();
            let answer = request::send(member.listen, Method::GET, "/decisions", &[], none, LOOK_LIMIT).await;
            let text = answer.map(|answer| answer.body).unwrap_or_default();
            let file = self.home.join(format!("{}.decisions-{:.0}", member.name, self.at(now())));
            if let Err(error) = std::fs::write(&file, text) {
                self.violation("harness", format!("{}: {error}", file.display()));
            }
        }
    }

    /// One epoch has one primary.
    fn compare(&self, look: &Look) {
        if look.role != "primary" {
            return;
        }
        let history = self.history();
        let same = |other: &&Look| other.role == "primary" && other.epoch.number() == look.epoch.number();
        let other = history.looks.iter().filter(same).find(|other| other.node != look.node).cloned();
        drop(history);
        if let Some(other) = other {
            let (one, two) = (&other.node, &look.node);
            self.violation("1 one primary", format!("{one} and {two} are primaries of epoch {}", look.epoch));
        }
    }
}
