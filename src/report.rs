//! What a run tells about itself while it goes on: progress, checkpoints, and
//! the last lines of its output.

mod series;
mod tail;

use std::collections::BTreeMap;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use serde::{Deserialize, Serialize};
use tokio::sync::watch;

use series::Series;

pub(crate) use tail::{Tail, readable};

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
/// What is worth keeping of the rest is kept here, bounded.
#[derive(Debug, Clone, Default)]
pub struct Reports {
    progress: watch::Sender<Progress>,
    checkpoint: watch::Sender<Option<Checkpoint>>,
    series: Arc<Mutex<Series>>,
    tail: Arc<Mutex<Tail>>,
}

impl Reports {
    pub fn progress(&self, progress: Progress) {
        lock(&self.series).push(progress.clone());
        self.progress.send_replace(progress);
    }

    /// What the checkpoint names must be safe already: a job that dies later
    /// goes on from it.
    pub fn checkpoint(&self, checkpoint: &str) {
        self.checkpoint.send_replace(Some(checkpoint.into()));
    }

    /// A line of the run's output, as its bytes came.
    pub fn output(&self, line: &[u8]) {
        lock(&self.tail).push(line);
    }

    #[must_use]
    pub fn watch_progress(&self) -> watch::Receiver<Progress> {
        self.progress.subscribe()
    }

    #[must_use]
    pub fn watch_checkpoint(&self) -> watch::Receiver<Option<Checkpoint>> {
        self.checkpoint.subscribe()
    }

    /// The progress reports so far, oldest first, for a plot: all of them, or
    /// a few hundred at even distances when there were many, and the newest.
    #[must_use]
    pub fn series(&self) -> Vec<Progress> {
        lock(&self.series).points()
    }

    /// The last lines of the run's output, oldest first: at most 50, each cut
    /// to 500 bytes and with its control characters escaped.
    #[must_use]
    pub fn tail(&self) -> Vec<String> {
        lock(&self.tail).lines()
    }
}

fn lock<T>(kept: &Mutex<T>) -> MutexGuard<'_, T> {
    kept.lock().unwrap_or_else(PoisonError::into_inner)
}
