//! For stores that keep a lease's record, and for tests of what an application does across a
//! failover.
//!
//! [`conformance`] checks a [`Store`] against its contract. [`Memory`] is one in this process.
//! [`Faulty`] makes any store lose answers, stall, or be away.

mod conformance;
mod faulty;
mod ledger;
mod memory;

use std::fmt;
use std::sync::Mutex;

#[cfg(doc)]
use crate::lease::Store;
use crate::lock::lock;

pub use conformance::conformance;
pub use faulty::Faulty;
pub use memory::Memory;

/// What a store does against the contract of [`Store`].
///
/// ```
/// use replite::testing::lease::{Broken, Memory, conformance};
/// use std::sync::Arc;
///
/// # #[tokio::main(flavor = "current_thread")]
/// # async fn main() {
/// let register = Memory::new();
/// let checked: Result<(), Broken> = conformance(|| Arc::new(register.clone())).await;
/// if let Err(broken) = checked {
///     panic!("{broken}");
/// }
/// # }
/// ```
#[derive(Clone, PartialEq, Eq)]
pub struct Broken {
    rule: Option<u8>,
    what: String,
}

impl Broken {
    fn new(rule: u8, what: impl Into<String>) -> Broken {
        Broken { rule: Some(rule), what: what.into() }
    }

    /// A store with which nothing gets done. No rule says how fast it has to be.
    fn useless(what: impl Into<String>) -> Broken {
        Broken { rule: None, what: what.into() }
    }

    /// The number of the rule in the documentation of [`Store`]; none where the store is of no use
    /// without breaking one.
    pub fn rule(&self) -> Option<u8> {
        self.rule
    }
}

impl fmt::Display for Broken {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self.rule {
            Some(rule) => write!(f, "rule {rule} of `lease::Store` is broken: {}", self.what),
            None => write!(f, "the store is of no use: {}", self.what),
        }
    }
}

/// As for people: a test that fails with it shows this form.
impl fmt::Debug for Broken {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        fmt::Display::fmt(self, f)
    }
}

impl std::error::Error for Broken {}

/// Numbers that a seed makes: SplitMix64.
#[derive(Debug)]
struct Dice(Mutex<u64>);

impl Dice {
    fn new(seed: u64) -> Dice {
        Dice(Mutex::new(seed))
    }

    fn roll(&self) -> u64 {
        let mut state = lock(&self.0);
        *state = state.wrapping_add(0x9e37_79b9_7f4a_7c15);
        let mut z = *state;
        z = (z ^ (z >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        z = (z ^ (z >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
        z ^ (z >> 31)
    }

    /// A number below this one.
    fn below(&self, most: u64) -> u64 {
        self.roll() % most.max(1)
    }

    /// From 0 up to 1.
    fn fraction(&self) -> f64 {
        (self.roll() >> 11) as f64 / (1_u64 << 53) as f64
    }
}
