//! Elections over small clusters, event by event: clocks that drift, a register that stalls, loses
//! answers and repeats itself, processes that stop and are started again, and networks that are
//! cut.
//!
//! `world` runs the nodes of `node` over the register of `store` and checks what must hold always.
//! `cases` has the schedules that a rule is there for. Each of them is run with the rule taken
//! out, too, and must go wrong then. `handing` is the part of `world` that hands a lease over.
//! `handoffs` has what comes of that, and `leaving` what of a node that ends. `faults` has what
//! operators and users see. `walks` tries schedules by chance.

mod cases;
mod faults;
mod handing;
mod handoffs;
mod leaving;
mod node;
mod store;
mod walks;
mod world;
