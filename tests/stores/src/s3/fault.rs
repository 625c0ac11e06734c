//! What the server does wrong on demand.

use std::sync::{Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

use serde::{Deserialize, Serialize};

/// One thing that goes wrong.
#[derive(Clone, PartialEq, Eq, Serialize, Deserialize, Debug)]
#[serde(rename_all = "snake_case")]
pub enum Fault {
    /// Not executed; this answer, such as 503 `SlowDown`, 409 `ConditionalRequestConflict`, 403
    /// `ExpiredToken`.
    Answer { status: u16, code: String },
    /// Executed, and then this answer in place of its own, such as 412 `PreconditionFailed`.
    Executed { status: u16, code: String },
    /// Executed, and then the connection ends without an answer.
    LoseAnswer,
    /// Not executed; the connection ends.
    LoseRequest,
    /// Not executed, never answered.
    Hang,
    /// Executed, never answered.
    HangExecuted,
    /// Executed after so many milliseconds, also where the client has gone.
    Delay { millis: u64 },
    /// A put is executed whatever its `If-Match` says.
    IgnoreIfMatch,
    /// A put is executed whatever its `If-None-Match` says.
    IgnoreIfNoneMatch,
}

/// A fault, and which requests it happens to.
#[derive(Clone, PartialEq, Eq, Serialize, Deserialize, Debug)]
pub struct Rule {
    pub fault: Fault,
    /// `GET`, `PUT`, `POST`, `DELETE`, `HEAD`; none for each.
    pub method: Option<String>,
    /// What the request's path ends with; empty for each.
    pub suffix: String,
    /// How often; none for ever.
    pub times: Option<u32>,
    /// For so long from now; none for ever.
    pub millis: Option<u64>,
}

impl Rule {
    /// Each request.
    #[must_use]
    pub fn all(fault: Fault) -> Rule {
        Rule { fault, method: None, suffix: String::new(), times: None, millis: None }
    }

    /// Each put.
    #[must_use]
    pub fn puts(fault: Fault) -> Rule {
        Rule { method: Some("PUT".into()), ..Rule::all(fault) }
    }

    /// Each get.
    #[must_use]
    pub fn gets(fault: Fault) -> Rule {
        Rule { method: Some("GET".into()), ..Rule::all(fault) }
    }

    /// Only of objects whose name ends with this.
    #[must_use]
    pub fn of(self, suffix: &str) -> Rule {
        Rule { suffix: suffix.into(), ..self }
    }

    /// So often.
    #[must_use]
    pub fn times(self, times: u32) -> Rule {
        Rule { times: Some(times), ..self }
    }

    /// For so long.
    #[must_use]
    pub fn lasting(self, time: Duration) -> Rule {
        Rule { millis: Some(u64::try_from(time.as_millis()).unwrap_or(u64::MAX)), ..self }
    }
}

/// How many requests came.
#[derive(Clone, Copy, PartialEq, Eq, Default, Serialize, Deserialize, Debug)]
pub struct Counts {
    pub get: u64,
    pub put: u64,
    /// Any other: `HEAD`, `POST`, `DELETE`.
    pub other: u64,
    /// Those that a fault happened to.
    pub faults: u64,
    /// Those that were executed after a delay.
    pub late: u64,
}

/// What is asked on the control: a line of JSON, answered by one of [`Counts`].
#[derive(Serialize, Deserialize, Debug)]
#[serde(rename_all = "snake_case")]
pub(super) enum Ask {
    Add(Rule),
    Calm,
    Count,
}

/// The faults of a server.
#[derive(Default, Debug)]
pub(super) struct Faults {
    state: Mutex<State>,
}

#[derive(Default, Debug)]
struct State {
    rules: Vec<Active>,
    counts: Counts,
}

#[derive(Debug)]
struct Active {
    rule: Rule,
    left: Option<u32>,
    until: Option<Instant>,
}

impl Faults {
    pub(super) fn answer(&self, ask: Ask) -> Counts {
        let mut state = self.state();
        match ask {
            Ask::Add(rule) => {
                let until = rule.millis.and_then(|ms| Instant::now().checked_add(Duration::from_millis(ms)));
                state.rules.push(Active { left: rule.times, until, rule });
            }
            Ask::Calm => state.rules.clear(),
            Ask::Count => {}
        }
        state.counts
    }

    pub(super) fn executed_late(&self) {
        self.state().counts.late += 1;
    }

    /// The fault of a request that has come; the first whose rule names it.
    pub(super) fn take(&self, method: &str, path: &str) -> Option<Fault> {
        let mut state = self.state();
        match method {
            "GET" => state.counts.get += 1,
            "PUT" => state.counts.put += 1,
            _ => state.counts.other += 1,
        }
        let now = Instant::now();
        state.rules.retain(|active| active.left != Some(0) && active.until.is_none_or(|until| now < until));
        let active = state.rules.iter_mut().find(|active| {
            active.rule.method.as_deref().is_none_or(|named| named == method)
                && path.ends_with(&active.rule.suffix)
        })?;
        active.left = active.left.map(|left| left - 1);
        let fault = active.rule.fault.clone();
        state.counts.faults += 1;
        Some(fault)
    }

    fn state(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }
}
