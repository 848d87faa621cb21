//! Trainyard takes machine-learning training requests off Google Cloud Pub/Sub
//! and runs each of them once.

pub mod emulator;
pub mod message;
pub mod task;

pub use task::{Progress, Run, Task, TaskError};
