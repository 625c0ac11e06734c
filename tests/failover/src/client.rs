//! What clients do: they write and read through any node, and remember what they saw.

use std::collections::{BTreeMap, BTreeSet};
use std::sync::Arc;
use std::time::Duration;

use http::Method;
use rand::rngs::StdRng;
use rand::{Rng, SeedableRng};

use crate::clock::now;
use crate::history::{Acknowledged, Outcome, Read, Write};
use crate::member::Member;
use crate::node::{Append, Appended, Seen};
use crate::request::{Answer, Failed, send};
use crate::world::World;

/// Longest pause between two requests.
const PAUSE_MAX_MS: u64 = 50;
/// Some writes take long: longer than a handoff waits for, where that is short.
const SLOW_SHARE: f64 = 0.03;
const SLOW_MAX_MS: u64 = 700;
/// Beyond the time for which a node holds a request.
const ANSWER_LIMIT: Duration = Duration::from_secs(12);
/// The response header that says that the request's token is of a lost branch.
const LOST: &str = "replite-lost";

pub struct Client {
    world: Arc<World>,
    name: String,
    rng: StdRng,
    op: u64,
    session: Session,
}

/// What a session has seen, and carries.
#[derive(Default)]
struct Session {
    /// The token travels as a cookie, not as a header.
    cookie: bool,
    token: Option<String>,
    /// Its acknowledged writes.
    own: BTreeSet<u64>,
    /// The most rows of each client that it saw.
    counts: BTreeMap<String, u64>,
    last: String,
}

impl Client {
    #[must_use]
    pub fn new(world: Arc<World>, number: usize, seed: u64) -> Client {
        let mut rng = StdRng::seed_from_u64(seed.wrapping_mul(1000) + number as u64);
        let session = Session { cookie: rng.random(), ..Session::default() };
        Client { world, name: format!("c{number}"), rng, op: 0, session }
    }

    /// Goes on until it is told to end.
    pub async fn run(mut self) {
        let go_on = self.world.clients.subscribe();
        while *go_on.borrow() {
            let member = self.world.members[self.rng.random_range(0..self.world.members.len())].clone();
            match self.rng.random_range(0..10) {
                0..6 => self.write(&member).await,
                6..9 => self.read(&member, true).await,
                _ => self.read(&member, false).await,
            }
            let pause = self.rng.random_range(0..PAUSE_MAX_MS);
            tokio::time::sleep(Duration::from_millis(pause)).await;
        }
    }

    async fn send(
        &self,
        member: &Member,
        method: Method,
        path: &str,
        body: Vec<u8>,
        session: bool,
    ) -> Result<Answer, Failed> {
        let mut headers = vec![("content-type", "application/json")];
        if let Some(token) = self.session.token.as_deref().filter(|_| session) {
            headers.push((if self.session.cookie { "cookie" } else { "replite-token" }, token));
        }
        send(member.listen, method, path, &headers, body, ANSWER_LIMIT + self.world.setting.lease_time())
            .await
    }

    async fn write(&mut self, member: &Member) {
        self.op += 1;
        let begin = now();
        let index = {
            let mut history = self.world.history();
            history.writes.push(Write {
                client: self.name.clone(),
                op: self.op,
                asked: member.name.clone(),
                begin,
                end: begin,
                away: false,
                outcome: Outcome::Pending,
            });
            history.writes.len() - 1
        };
        let slow = self.rng.random_bool(SLOW_SHARE);
        let pause = if slow { self.rng.random_range(0..SLOW_MAX_MS) } else { 0 };
        let asked = Append { client: self.name.clone(), op: self.op, pause };
        let body = serde_json::to_vec(&asked).unwrap_or_default();
        let answer = self.send(member, Method::POST, "/append", body, true).await;
        let outcome = outcome(&answer);
        if let Ok(answer) = &answer {
            self.carry(answer);
        }
        if let Outcome::Acknowledged(acknowledged) = &outcome {
            self.session.own.insert(self.op);
            self.session.last =
                format!("wrote {} as {} on {}", self.op, acknowledged.txid, acknowledged.node);
        }
        let end = now();
        let away = member.was_away(begin, end);
        let mut history = self.world.history();
        let write = &mut history.writes[index];
        (write.end, write.away, write.outcome) = (end, away, outcome);
    }

    /// Keeps what an answer says of the session.
    fn carry(&mut self, answer: &Answer) {
        if answer.header(LOST).is_some() {
            // From here on a new session.
            self.session = Session { cookie: self.session.cookie, ..Session::default() };
            self.world.history().told_lost += 1;
        }
        let token = match self.session.cookie {
            true => answer.header("set-cookie").and_then(|cookie| cookie.split(';').next()),
            false => answer.header("replite-token"),
        };
        if let Some(token) = token {
            self.session.token = Some(token.to_string());
        }
    }

    async fn read(&mut self, member: &Member, session: bool) {
        let begin = now();
        let path = format!("/read?client={}", self.name);
        let answer = self.send(member, Method::GET, &path, Vec::new(), session).await;
        let end = now();
        let (status, text) = match &answer {
            Ok(answer) if answer.status == 200 => (Some(200), String::new()),
            Ok(answer) => (Some(answer.status), answer.text()),
            Err(failed) => (None, format!("{failed:?}")),
        };
        let asked = member.name.clone();
        let away = member.was_away(begin, end);
        if !session && status != Some(200) && !away {
            let took = crate::clock::seconds(begin, end);
            let what =
                format!("{asked} was up and did not answer a read: {status:?} {text} after {took:.3} s");
            self.world.violation("7 reads", what);
        }
        let waits = session && self.session.token.is_some();
        let client = self.name.clone();
        self.world.history().reads.push(Read {
            client,
            asked,
            begin,
            end,
            away,
            status,
            session: waits,
            text,
        });
        let Ok(answer) = answer else { return };
        if answer.status != 200 || !session {
            return;
        }
        let carried = self.session.token.clone();
        self.carry(&answer);
        match answer.json::<Seen>() {
            Ok(seen) => self.session_holds(&seen, member, carried.as_deref()),
            Err(error) => self.world.violation("harness", format!("a read that is none: {error}")),
        }
    }

    /// A session reads its own writes, and never goes back.
    fn session_holds(&mut self, seen: &Seen, member: &Member, token: Option<&str>) {
        let session = &mut self.session;
        let there = |position: Option<replite::Position>| position.map(|position| position.to_string());
        let told = format!(
            "{} by {} at {:?}, with token {token:?}; before that: {}",
            self.name,
            member.name,
            there(seen.position),
            session.last
        );
        let own: BTreeSet<u64> = seen.own.iter().copied().collect();
        let missing: Vec<u64> = session.own.difference(&own).copied().collect();
        if !missing.is_empty() {
            self.world.violation("4 own writes", format!("{missing:?} are not there: {told}"));
            session.own = &session.own & &own;
        }
        let back = |(client, count): (&String, &u64)| {
            let now = seen.counts.get(client).copied().unwrap_or(0);
            (now < *count).then(|| format!("{client} from {count} to {now}"))
        };
        let back: Vec<String> = session.counts.iter().filter_map(back).collect();
        if !back.is_empty() {
            self.world.violation("4 monotonic", format!("went back: {}; {told}", back.join(", ")));
        }
        session.counts.clone_from(&seen.counts);
        session.last = format!("read {:?} on {}", there(seen.position), seen.node);
    }
}

fn outcome(answer: &Result<Answer, Failed>) -> Outcome {
    let answer = match answer {
        Err(Failed::Unsent(why)) => return Outcome::NotExecuted(why.clone()),
        Err(Failed::Unknown(why)) => return Outcome::Unknown(why.clone()),
        Ok(answer) => answer,
    };
    let told = format!("{} {}", answer.status, answer.text());
    match (answer.status, answer.header("replite-outcome")) {
        (200, _) => match answer.json::<Appended>() {
            Ok(Appended { txid, node, run, began, acked }) => {
                Outcome::Acknowledged(Acknowledged { txid, node, run, began, acked })
            }
            Err(error) => Outcome::Unknown(format!("{told}: {error}")),
        },
        (_, Some("not-executed")) => Outcome::NotExecuted(told),
        _ => Outcome::Unknown(told),
    }
}
