//! What a run tells about itself while it goes on: progress and checkpoints.

use std::collections::BTreeMap;
use std::sync::Arc;

use serde::{Deserialize, Serialize};
use tokio::sync::watch;

/// How far a run has come. Later reports replace earlier ones.
#[derive(Debug, Clone, Default, PartialEq, Serialize, Deserialize)]
#[serde(default)]
pub struct Progress {
    /// Share of the work done, from 0.0 to 1.0.
    #[serde(rename = "progress", skip_serializing_if = "Option::is_none")]
    pub fraction: Option<f64>,
    /// The task's own count: an iteration, an epoch, a batch.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub step: Option<u64>,
    /// Named figures, such as `loss`.
    #[serde(skip_serializing_if = "BTreeMap::is_empty")]
    pub metrics: BTreeMap<String, f64>,
}

/// Where a run's work is kept, in the task's own words (a URI, a path): what a
/// later attempt of the same job gets to go on from.
pub type Checkpoint = Arc<str>;

/// Where a run's reports go. Telling never blocks; who listens sees the newest.
#[derive(Debug, Clone, Default)]
pub struct Reports {
    progress: watch::Sender<Progress>,
    checkpoint: watch::Sender<Option<Checkpoint>>,
}

impl Reports {
    pub fn progress(&self, progress: Progress) {
        self.progress.send_replace(progress);
    }

    /// What the checkpoint names must be safe already: a job that dies later
    /// goes on from it.
    pub fn checkpoint(&self, checkpoint: &str) {
        self.checkpoint.send_replace(Some(checkpoint.into()));
    }

    #[must_use]
    pub fn watch_progress(&self) -> watch::Receiver<Progress> {
        self.progress.subscribe()
    }

    #[must_use]
    pub fn watch_checkpoint(&self) -> watch::Receiver<Option<Checkpoint>> {
        self.checkpoint.subscribe()
    }
}
