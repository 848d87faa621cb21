//! Trainyard takes machine-learning training requests off Google Cloud Pub/Sub
//! and runs each of them once.

pub mod config;
pub mod emulator;
pub mod job;
pub mod message;
pub mod outcome;
pub mod retry;
pub mod store;
pub mod task;
pub mod tasks;

pub use task::{Progress, Run, Task, TaskError};
