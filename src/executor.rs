//! How a task runs: in this process, or as a command.

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
use crate::outcome::Outcome;
use crate::report::{Checkpoint, Reports};

pub use in_process::InProcess;
pub use subprocess::{Subprocess, check_command};

/// One attempt of one job.
#[derive(Debug, Clone)]
pub struct Attempt {
    pub job_id: Uuid,
    pub task: Arc<str>,
    /// The attempt number and the lease token; every write of the run carries it.
    pub fence: Fence,
    /// The first message that requested the job.
    pub message_id: Arc<str>,
    /// The request as published, a JSON object.
    pub data: Bytes,
    /// The last checkpoint of an earlier attempt.
    pub checkpoint: Option<Checkpoint>,
    /// When the task's timeout will stop the run. For information only.
    pub deadline: Option<DateTime<Utc>>,
    /// The GPUs of the run. They come free when the last clone is dropped, so
    /// one is held until the run's processes are gone.
    pub devices: Option<Arc<DeviceSet>>,
    pub reports: Reports,
    /// When the run must stop: the lease's end minus a margin, on this process's
    /// clock. Each renewal moves it.
    pub valid_until: watch::Receiver<Instant>,
    /// Cancelled to ask the run to stop.
    pub stop: CancellationToken,
}

impl Attempt {
    /// The run's GPUs, for `CUDA_VISIBLE_DEVICES`.
    #[must_use]
    pub fn device_names(&self) -> &[String] {
        self.devices.as_ref().map_or(&[], |set| set.names())
    }

    /// An attempt with default values, for tests of executors.
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
    /// Runs the attempt to its end, and returns `Succeeded` or `Failed`, also
    /// after a stop. Dropping the future abandons the run at once.
    async fn execute(&self, attempt: Attempt) -> Outcome;

    /// Removes the job's files on this machine, as the job has ended.
    async fn forget(&self, _job_id: Uuid) {}
}
