//! How a task runs. For now: inside this process.

mod in_process;

use std::sync::Arc;

use async_trait::async_trait;
use tokio::sync::watch;
use tokio_util::sync::CancellationToken;
use uuid::Uuid;

use crate::message::Payload;
use crate::outcome::Outcome;
use crate::task::Progress;

pub use in_process::InProcess;

/// One attempt of one job, as an executor is asked to run it.
#[derive(Debug, Clone)]
pub struct Attempt {
    pub job_id: Uuid,
    pub number: u32,
    pub payload: Arc<Payload>,
    /// Where the run's reports go; only the newest is kept.
    pub progress: watch::Sender<Progress>,
    /// Cancelled when the run should end soon.
    pub stop: CancellationToken,
}

/// Runs attempts of one task.
#[async_trait]
pub trait Executor: Send + Sync + 'static {
    /// Runs the attempt to its end: `Succeeded` or `Failed`. Why it was asked
    /// to stop, if it was, the caller knows. Dropping the future abandons the
    /// run at once.
    async fn execute(&self, attempt: Attempt) -> Outcome;
}
