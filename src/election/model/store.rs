//! A register that can do what stores do.

use crate::election::{Swapped, Unread};
use crate::lease::Version;
use crate::lease::record::Record;

#[derive(Clone, PartialEq, Debug)]
pub(super) enum Content {
    Empty,
    Garbled,
    Record(Box<Record>),
}

pub(super) type ReadOutcome = Result<Option<(Record, Version)>, Unread>;

/// All that the register ever had. A version is the place in the list.
#[derive(Debug)]
pub(super) struct Register {
    all: Vec<Content>,
    now: usize,
    /// Another record has the same version.
    pub(super) one_version: bool,
}

fn version(at: usize) -> Version {
    Version::new(at.to_string())
}

impl Register {
    pub(super) fn new() -> Register {
        Register { all: vec![Content::Empty], now: 0, one_version: false }
    }

    pub(super) fn content(&self) -> &Content {
        &self.all[self.now]
    }

    pub(super) fn record(&self) -> Option<&Record> {
        match self.content() {
            Content::Record(record) => Some(record),
            _ => None,
        }
    }

    pub(super) fn put(&mut self, content: Content) {
        if self.one_version {
            self.all.pop();
        }
        self.all.push(content);
        self.now = self.all.len() - 1;
    }

    /// Reads what is there, or was there some changes ago.
    pub(super) fn read(&self, changes_ago: usize) -> ReadOutcome {
        let at = self.now.saturating_sub(changes_ago);
        match &self.all[at] {
            Content::Empty => Ok(None),
            Content::Garbled => Err(Unread::NotOurs { version: version(at), why: "garbled".into() }),
            Content::Record(record) => Ok(Some(((**record).clone(), version(at)))),
        }
    }

    pub(super) fn swap(&mut self, expected: Option<&Version>, record: &Record) -> Swapped {
        let there = match self.content() {
            Content::Empty => None,
            _ => Some(version(self.now)),
        };
        if there.as_ref() != expected {
            return Swapped::Conflict;
        }
        self.put(Content::Record(Box::new(record.clone())));
        Swapped::Done(version(self.now))
    }

    /// A place in the register's life, to go back to.
    pub(super) fn place(&self) -> usize {
        self.now
    }

    /// Goes back, and uses later versions again.
    pub(super) fn go_back(&mut self, to: usize) {
        self.all.truncate(to + 1);
        self.now = to;
    }
}
