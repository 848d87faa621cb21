//! The reports of a run: progress, checkpoints, and the last lines of its output.

mod series;
mod tail;

use std::collections::BTreeMap;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use serde::{Deserialize, Serialize};
use tokio::sync::watch;

use series::Series;

pub(crate) use tail::{Tail, readable};

/// The progress of a run. A later report replaces an earlier one.
#[derive(Debug, Clone, Default, PartialEq, Serialize, Deserialize)]
#[serde(default)]
pub struct Progress {
    /// The fraction of the work done, from 0.0 to 1.0.
    #[serde(rename = "progress", skip_serializing_if = "Option::is_none")]
    pub fraction: Option<f64>,
    /// The number of iterations, epochs or batches, as the task counts.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub step: Option<u64>,
    /// Named numbers, such as `loss`.
    #[serde(skip_serializing_if = "BTreeMap::is_empty")]
    pub metrics: BTreeMap<String, f64>,
}

/// A string of the task's choice (a URI, a path) by which a later attempt of the
/// job finds the saved work.
pub type Checkpoint = Arc<str>;

/// Collects a run's reports. Reporting never blocks. Watchers see the newest
/// report; the history is stored in bounded memory.
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

    /// The checkpoint must be durable already, as the next attempt resumes from it.
    pub fn checkpoint(&self, checkpoint: &str) {
        self.checkpoint.send_replace(Some(checkpoint.into()));
    }

    /// A line of the run's output.
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

    /// The progress reports so far, oldest first. If there are many, a few hundred
    /// evenly spaced ones and the newest.
    #[must_use]
    pub fn series(&self) -> Vec<Progress> {
        lock(&self.series).points()
    }

    /// The last lines of the run's output, oldest first: at most 50, truncated to
    /// 500 bytes, with control characters escaped.
    #[must_use]
    pub fn tail(&self) -> Vec<String> {
        lock(&self.tail).lines()
    }
}

fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}
