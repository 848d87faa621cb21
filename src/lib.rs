//! Trainyard takes machine-learning training requests off Google Cloud Pub/Sub
//! and runs each of them once.
//!
//! The folders follow the message: [`pubsub`] delivers it, [`worker`] takes it through
//! its life, [`guard`] lets it through one time, [`registry`] finds its task,
//! [`executor`] runs it, [`store`] keeps the record.
//!
//! A program with tasks of its own needs [`Task`], [`Registry`] and [`run`]:
//! `examples/embed.rs` is a complete example.

mod app;
#[doc(hidden)]
pub mod cli;
pub mod config;
mod database_url;
pub mod dedupe;
pub mod devices;
pub mod executor;
#[doc(hidden)]
pub mod failpoint;
pub mod guard;
pub mod job;
pub mod json;
pub mod message;
pub mod nvidia;
pub mod outcome;
pub mod printable;
pub mod pubsub;
pub mod record;
pub mod registry;
pub mod report;
pub mod retry;
pub mod shutdown;
pub mod store;
pub mod task;
pub mod tasks;
pub mod telemetry;
pub mod worker;

pub use app::run;
pub use executor::subprocess::run_as_keeper_if_asked;
pub use registry::Registry;
pub use task::{Progress, Run, Task, TaskError};
pub use worker::Worker;
