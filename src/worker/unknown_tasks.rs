//! Says which tasks this worker knows, and gives up the jobs whose task no worker knows.
//!
//! A job of an unknown task waits, since a worker with a newer configuration may come. It is
//! given up once it has waited for `unknown_task_patience`, and for as long no live worker
//! knew its task.

use std::sync::Arc;
use std::time::{Duration, SystemTime};

use tokio::sync::Notify;
use tokio::time::{Instant, sleep};
use tokio_util::sync::CancellationToken;
use tracing::{debug, warn};

use crate::guard::Guard;
use crate::retry::jittered;
use crate::store::{GivenUp, KNOWN_FOR, Patience, Queue, Reach, StoreError, UnknownJob, in_time};

/// Pauses between rounds. A task's time is moved on when half of [`KNOWN_FOR`] is left, so
/// that even a slow round comes in time.
const PAUSE: (Duration, Duration) = (Duration::from_secs(1), Duration::from_secs(5));
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
        let mut rounds = Rounds::since(SystemTime::now(), Instant::now());
        while !self.draining.is_cancelled() {
            let watched_for = rounds.next(SystemTime::now(), Instant::now());
            if let Err(error) = self.round(watched_for).await {
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

    async fn round(&self, watched_for: Duration) -> Result<(), StoreError> {
        let seen_for = |time| watched_for >= time && self.guard.has_seen(time);
        loop {
            in_time(self.queue.know(&self.reach)).await?;
            // While the database, this worker or the whole fleet was away, a worker that
            // knows the task could not take the job, nor say that it does.
            if self.draining.is_cancelled() || !seen_for(self.patience) {
                return Ok(());
            }
            let patience = Patience {
                lasts: self.patience,
                forgotten: seen_for(self.patience.max(KNOWN_FOR)),
            };
            if !self.give_up_some(patience).await? {
                return Ok(());
            }
        }
    }

    /// True if there may be more to give up.
    async fn give_up_some(&self, patience: Patience) -> Result<bool, StoreError> {
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

/// Since when one round has followed the other. A machine that was suspended, or a process
/// that was frozen, has seen nothing in the meantime.
struct Rounds {
    since: Instant,
    /// The second one stands still while the machine is suspended.
    last: (SystemTime, Instant),
}

impl Rounds {
    fn since(wall: SystemTime, steady: Instant) -> Self {
        Self {
            since: steady,
            last: (wall, steady),
        }
    }

    /// Notes a round. Returns for how long none was missing.
    fn next(&mut self, wall: SystemTime, steady: Instant) -> Duration {
        let (last_wall, last_steady) = self.last;
        let by_wall = wall.duration_since(last_wall).unwrap_or_default();
        if by_wall.max(steady.duration_since(last_steady)) > KNOWN_FOR {
            self.since = steady;
        }
        self.last = (wall, steady);
        steady.duration_since(self.since)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[tokio::test(start_paused = true)]
    async fn a_worker_that_was_frozen_or_suspended_has_seen_nothing_before() {
        let seconds = Duration::from_secs;
        let (wall, steady) = (SystemTime::now(), Instant::now());
        let mut rounds = Rounds::since(wall, steady);
        let mut next =
            |by_wall, by_steady| rounds.next(wall + seconds(by_wall), steady + seconds(by_steady));
        assert_eq!(next(0, 0), seconds(0));
        assert_eq!(next(5, 5), seconds(5));
        assert_eq!(next(35, 35), seconds(35));
        // Frozen.
        assert_eq!(next(66, 66), seconds(0));
        assert_eq!(next(70, 70), seconds(4));
        // Suspended.
        assert_eq!(next(3600, 71), seconds(0));
        // The clock was set back.
        assert_eq!(next(72, 72), seconds(1));
    }
}
