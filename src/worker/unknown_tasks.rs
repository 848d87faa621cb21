//! Says which tasks this worker knows, and gives up the jobs whose task no worker knows.
//!
//! A job of an unknown task waits, since a worker with a newer configuration may come. It is
//! given up once it has waited for `unknown_task_patience`, and for as long no live worker
//! knew its task.

use std::sync::Arc;
use std::time::Duration;

use tokio::sync::Notify;
use tokio::time::sleep;
use tokio_util::sync::CancellationToken;
use tracing::{debug, warn};

use crate::guard::Guard;
use crate::retry::jittered;
use crate::store::{GivenUp, Patience, Queue, Reach, StoreError, UnknownJob, in_time};

/// Pauses between rounds. The longest is well below [`crate::store::KNOWN_FOR`].
const PAUSE: (Duration, Duration) = (Duration::from_secs(1), Duration::from_secs(10));
/// How many jobs of one subscription and task are given up at once.
const MOST_AT_ONCE: u32 = 200;

pub(super) struct UnknownTasks {
    pub(super) queue: Arc<dyn Queue>,
    pub(super) guard: Guard,
    pub(super) reach: Reach,
    pub(super) patience: Duration,
    pub(super) wake_dead_letters: Arc<Notify>,
    pub(super) draining: CancellationToken,
}

impl UnknownTasks {
    /// Ends when the worker drains.
    pub(super) async fn run(self) {
        while !self.draining.is_cancelled() {
            if let Err(error) = self.round().await {
                debug!(%error, "unknown tasks are looked for again");
                self.guard.health().note(Some(&error));
            }
            let pause = self.patience.clamp(PAUSE.0, PAUSE.1);
            tokio::select! {
                () = self.draining.cancelled() => {}
                () = sleep(jittered(pause)) => {}
            }
        }
    }

    async fn round(&self) -> Result<(), StoreError> {
        in_time(self.queue.know(&self.reach)).await?;
        while !self.draining.is_cancelled() && self.give_up_some().await? {}
        Ok(())
    }

    /// True if there may be more to give up.
    async fn give_up_some(&self) -> Result<bool, StoreError> {
        let patience = Patience {
            lasts: self.patience,
            forgotten: self.guard.may_forget(self.patience),
        };
        let subscriptions: Vec<&str> = self.reach.subscriptions.keys().map(|s| &**s).collect();
        let looking = self.queue.unknown(&subscriptions, patience, MOST_AT_ONCE);
        let unknown: Vec<GivenUp> = in_time(looking)
            .await?
            .into_iter()
            .map(|job| self.given_up(job))
            .collect();
        if unknown.is_empty() {
            return Ok(false);
        }
        let ended = in_time(self.queue.give_up_unknown(&unknown, patience)).await?;
        for key in &ended {
            warn!(job = %key, "given up: no worker knows its task");
        }
        if !ended.is_empty() {
            self.wake_dead_letters.notify_one();
        }
        Ok(!ended.is_empty())
    }

    fn given_up(&self, job: UnknownJob) -> GivenUp {
        let limits = self.reach.limits(&job.key.subscription, &job.task);
        let patience = humantime::format_duration(self.patience);
        let known: Vec<&str> = self.reach.tasks.keys().map(|task| &**task).collect();
        GivenUp {
            error: format!(
                "no task `{}` has been known for {patience}; known here: {}",
                job.task,
                known.join(", ")
            ),
            worker: Arc::clone(&self.guard.terms().worker),
            dead_letter_topic: limits.dead_letter_topic,
            key: job.key,
        }
    }
}
