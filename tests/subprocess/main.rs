//! Commands as tasks, with real processes: the executor, its keepers, and their
//! deaths. No service is needed.

#![expect(clippy::unwrap_used, reason = "a test may panic")]

mod deaths;
mod gpus;
mod leaks;
mod limits;
mod misbehaviour;
mod outcomes;
mod stopping;
mod support;
