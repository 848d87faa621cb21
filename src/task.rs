//! The trait of an in-process task.

use std::sync::Arc;

use async_trait::async_trait;
use bytes::Bytes;
use serde::de::DeserializeOwned;
use serde_json::Value;
use tokio_util::sync::CancellationToken;

use crate::report::{Checkpoint, Reports};

pub use crate::report::Progress;

/// A task that runs in the worker's process.
///
/// ```
/// use trainyard::{Run, Task, TaskError};
///
/// struct Greet;
///
/// #[async_trait::async_trait]
/// impl Task for Greet {
///     async fn run(&self, run: Run) -> Result<serde_json::Value, TaskError> {
///         #[derive(serde::Deserialize)]
///         struct Greeting { to: String }
///         let greeting: Greeting = run.payload_as()?;
///         Ok(serde_json::json!({ "said": format!("hello {}", greeting.to) }))
///     }
/// }
/// ```
#[async_trait]
pub trait Task: Send + Sync + 'static {
    /// Runs one attempt of a job and returns its result, any JSON value.
    ///
    /// CPU-bound work belongs on [`tokio::task::spawn_blocking`]. When
    /// [`Run::stop_requested`] completes, return soon: the run is dropped after the
    /// stop grace.
    ///
    /// # Errors
    /// [`TaskError::Permanent`] for a request that can never succeed, any other
    /// error for one that may succeed at a later attempt.
    async fn run(&self, run: Run) -> Result<Value, TaskError>;
}

/// How a task failed, which decides whether its job is retried.
#[derive(Debug, thiserror::Error)]
pub enum TaskError {
    /// The request can never succeed (a missing column, an unknown option). The
    /// job is dead at once.
    #[error("{0}")]
    Permanent(String),
    /// A later attempt may succeed (a lost connection, a full disk).
    #[error("{0:#}")]
    Transient(#[from] anyhow::Error),
}

impl TaskError {
    pub fn permanent(reason: impl Into<String>) -> Self {
        Self::Permanent(reason.into())
    }
}

impl From<std::io::Error> for TaskError {
    fn from(error: std::io::Error) -> Self {
        Self::Transient(error.into())
    }
}

/// The input of one attempt of one job.
///
/// It is cheap to clone, for use on a blocking thread.
#[derive(Debug, Clone)]
pub struct Run {
    job_id: Arc<str>,
    attempt: u32,
    payload: Bytes,
    checkpoint: Option<Checkpoint>,
    reports: Reports,
    stop: CancellationToken,
}

impl Run {
    /// Creates a run, for tests of a task.
    #[must_use]
    pub fn new(
        job_id: &str,
        attempt: u32,
        payload: impl Into<Bytes>,
        reports: Reports,
        stop: CancellationToken,
    ) -> Self {
        Self {
            job_id: job_id.into(),
            attempt,
            payload: payload.into(),
            checkpoint: None,
            reports,
            stop,
        }
    }

    /// Sets the checkpoint of an earlier attempt.
    #[must_use]
    pub fn resuming_from(mut self, checkpoint: Option<Checkpoint>) -> Self {
        self.checkpoint = checkpoint;
        self
    }

    #[must_use]
    pub fn job_id(&self) -> &str {
        &self.job_id
    }

    /// The number of the attempt, from 1.
    #[must_use]
    pub fn attempt(&self) -> u32 {
        self.attempt
    }

    /// The request as it was published: a JSON object, including `name`.
    #[must_use]
    pub fn payload(&self) -> &[u8] {
        &self.payload
    }

    /// Deserializes the payload. Numbers keep the digits that `T` has room for.
    ///
    /// # Errors
    /// [`TaskError::Permanent`], with the field, if the payload does not match `T`.
    pub fn payload_as<T: DeserializeOwned>(&self) -> Result<T, TaskError> {
        let mut json = serde_json::Deserializer::from_slice(&self.payload);
        serde_path_to_error::deserialize(&mut json).map_err(|error| {
            let path = error.path().to_string();
            let reason = error.into_inner();
            TaskError::permanent(match path.as_str() {
                "." => format!("the payload does not fit the task: {reason}"),
                _ => format!("the payload's `{path}` does not fit the task: {reason}"),
            })
        })
    }

    /// Reports progress. Never blocks; a slow reader sees only the newest report.
    pub fn report(&self, progress: Progress) {
        self.reports.progress(progress);
    }

    /// The last checkpoint of an earlier attempt, if there is one.
    #[must_use]
    pub fn checkpoint(&self) -> Option<&str> {
        self.checkpoint.as_deref()
    }

    /// Reports a checkpoint. A later attempt, on any worker, gets it from
    /// [`Run::checkpoint`]. Call this when the saved work is durable. Never blocks;
    /// the checkpoint is written to the database soon after.
    pub fn save_checkpoint(&self, checkpoint: &str) {
        self.reports.checkpoint(checkpoint);
    }

    /// Whether the run was asked to stop, for loops on blocking threads.
    #[must_use]
    pub fn should_stop(&self) -> bool {
        self.stop.is_cancelled()
    }

    /// Completes when the run is asked to stop: it was cancelled or timed out, its
    /// lease is lost, or the worker shuts down.
    pub async fn stop_requested(&self) {
        self.stop.cancelled().await;
    }
}
