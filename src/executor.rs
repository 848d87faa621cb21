//! How a task runs: inside this process, or as a command of its own.

mod in_process;
pub mod subprocess;

use std::sync::Arc;

use async_trait::async_trait;
use bytes::Bytes;
use chrono::{DateTime, Utc};
use tokio::sync::watch;
use tokio::time::Instant;
use tokio_util::sync::CancellationToken;
use uuid::Uuid;

use crate::devices::DeviceSet;
use crate::job::Fence;
use crate::message::Payload;
use crate::outcome::Outcome;
use crate::report::{Checkpoint, Reports};

pub use in_process::InProcess;
pub use subprocess::{Subprocess, check_command};

/// One attempt of one job, as an executor is asked to run it.
#[derive(Debug, Clone)]
pub struct Attempt {
    pub job_id: Uuid,
    pub task: Arc<str>,
    /// Its number and lease token go with everything written about the run.
    pub fence: Fence,
    /// The message that asked for the job first.
    pub message_id: Arc<str>,
    pub payload: Arc<Payload>,
    /// The same as the publisher wrote it.
    pub data: Bytes,
    /// Where an earlier attempt left off.
    pub checkpoint: Option<Checkpoint>,
    /// When the task's timeout will stop the run, for the run to know.
    pub deadline: Option<DateTime<Utc>>,
    /// The GPUs that are the run's own. They come free for others when the last
    /// copy of this goes, so it is kept until nothing of the run is left.
    pub devices: Option<Arc<DeviceSet>>,
    pub reports: Reports,
    /// Until when the run may go on without another word: the lease less a
    /// margin, by this process's clock. Grows with every renewal.
    pub valid_until: watch::Receiver<Instant>,
    /// Cancelled when the run should end soon.
    pub stop: CancellationToken,
}

impl Attempt {
    /// The run's GPUs, as `CUDA_VISIBLE_DEVICES` names them.
    #[must_use]
    pub fn device_names(&self) -> &[String] {
        self.devices.as_ref().map_or(&[], |set| set.names())
    }

    /// An attempt with nothing special about it, for tests of executors.
    #[cfg(test)]
    pub(crate) fn of(payload: serde_json::Value) -> Self {
        let far = Instant::now() + std::time::Duration::from_secs(60 * 60 * 24 * 365);
        Self {
            job_id: Uuid::nil(),
            task: "test".into(),
            fence: Fence {
                key: crate::job::JobKey::new("subscription", "key"),
                attempt: 1,
                token: Uuid::nil(),
            },
            message_id: "1".into(),
            data: payload.to_string().into(),
            payload: Arc::new(payload.as_object().cloned().unwrap_or_default()),
            checkpoint: None,
            deadline: None,
            devices: None,
            reports: Reports::default(),
            valid_until: watch::channel(far).1,
            stop: CancellationToken::new(),
        }
    }
}

/// Runs attempts of one task.
#[async_trait]
pub trait Executor: Send + Sync + 'static {
    /// Runs the attempt to its end: `Succeeded` or `Failed`. Why it was asked
    /// to stop, if it was, the caller knows. Dropping the future abandons the
    /// run at once.
    async fn execute(&self, attempt: Attempt) -> Outcome;

    /// The job has ended: what was kept on this machine for its next attempt
    /// can go.
    async fn forget(&self, _job_id: Uuid) {}
}
