//! A worker's events, for those who watch it.

use std::sync::Arc;
use std::time::Duration;

use tokio::sync::broadcast;
use uuid::Uuid;

use crate::task::Progress;

/// A slow watcher loses the oldest events rather than delay the worker.
const CAPACITY: usize = 1024;

/// Something that happened to a message or its job.
#[derive(Debug, Clone, PartialEq)]
pub struct Event {
    pub message_id: Arc<str>,
    pub kind: EventKind,
}

#[derive(Debug, Clone, PartialEq)]
pub enum EventKind {
    /// An attempt began.
    Started {
        job_id: Uuid,
        task: String,
        attempt: u32,
    },
    Progressed(Progress),
    /// The attempt ended, with the outcome's name.
    Ended {
        outcome: &'static str,
        /// When the next attempt begins; None if the job has ended too.
        retry_in: Option<Duration>,
    },
    /// The job waits in the table.
    Queued,
    /// The guard did not let a delivery through.
    Suppressed,
    /// The message will never run.
    Refused {
        reason: String,
    },
}

/// Sends events to those who watch.
#[derive(Debug, Clone)]
pub struct Events {
    sender: broadcast::Sender<Event>,
}

impl Default for Events {
    fn default() -> Self {
        Self {
            sender: broadcast::Sender::new(CAPACITY),
        }
    }
}

impl Events {
    #[must_use]
    pub fn watch(&self) -> broadcast::Receiver<Event> {
        self.sender.subscribe()
    }

    pub(super) fn tell(&self, message_id: &Arc<str>, kind: EventKind) {
        // An error only means that nobody watches.
        let _ = self.sender.send(Event {
            message_id: Arc::clone(message_id),
            kind,
        });
    }
}
