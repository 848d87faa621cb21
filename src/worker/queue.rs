//! Takes jobs from the queue into free room: waiting jobs that may run, and jobs whose
//! worker is lost.
//!
//! A sweep has three steps: [`Queue::due`] reads without locks, admission reserves room
//! for the oldest jobs that fit, and [`Queue::take`] takes exactly those, each only if it
//! is still due. Several workers may see the same job; one gets it, and the others give
//! their room back. A take that is not answered is asked again with the same tokens.

use std::collections::{HashMap, HashSet};
use std::sync::Arc;
use std::time::Duration;

use tokio::time::{Instant, sleep, sleep_until};
use tokio_util::sync::CancellationToken;
use tracing::{info, warn};
use uuid::Uuid;

use super::admission::{Admission, Room};
use super::attempt::Context;
use super::process::Processor;
use crate::job::{DueJob, JobKey, Pick, Taken};
use crate::retry::{Backoff, jittered};
use crate::store::{Queue, Reach, StoreError, in_time};

/// Pause between sweeps, roughly; a job given back by a stopping worker waits as long.
const PAUSE: Duration = Duration::from_secs(1);
/// How many jobs of one subscription and task a sweep looks at.
const MOST_AT_ONCE: u32 = 200;
/// Looks at this many more than there is room for: other workers want the same jobs.
const MARGIN: u32 = 8;
/// After losing this many jobs to other workers, the round ends.
const MOST_LOST: usize = 200;
/// Pauses between tries of a take that was not answered.
const TRY_AGAIN: (Duration, Duration) = (Duration::from_millis(100), Duration::from_secs(5));

/// Moves jobs from the queue into the worker's room.
pub(super) struct Sweeper {
    pub(super) queue: Arc<dyn Queue>,
    pub(super) reach: Reach,
    pub(super) context: Arc<Context>,
    pub(super) processor: Arc<Processor>,
    pub(super) draining: CancellationToken,
}

impl Sweeper {
    /// Sweeps about every second, and at once when jobs may wait that are older than
    /// messages still to be pulled. Ends when the worker drains.
    pub(super) async fn run(self) {
        let mut next_sweep = Instant::now() + jittered(PAUSE);
        loop {
            tokio::select! {
                () = self.draining.cancelled() => return,
                () = sleep_until(next_sweep) => {
                    next_sweep = Instant::now() + jittered(PAUSE);
                }
                () = sweep_is_due(&self.context.admission) => {}
            }
            self.sweep_all().await;
            self.context.admission.swept();
        }
    }

    /// Sweeps while there is something to take. A sweep that has begun always completes,
    /// since it may have taken jobs.
    async fn sweep_all(&self) {
        let mut lost = HashSet::new();
        while !self.draining.is_cancelled() && lost.len() < MOST_LOST {
            match self.sweep(&mut lost).await {
                Ok(true) => {}
                Ok(false) => return,
                Err(error) => {
                    warn!(%error, "the queue was not swept");
                    self.context.guard.health().note(Some(&error));
                    return;
                }
            }
        }
    }

    /// One look and one take. True if there may be more to take. `lost` collects the jobs
    /// that this round saw and did not get: another worker was quicker, or the row was
    /// locked.
    async fn sweep(&self, lost: &mut HashSet<JobKey>) -> Result<bool, StoreError> {
        let admission = &self.context.admission;
        let (reach, most) = admission.within(&self.reach);
        if reach.tasks.is_empty() {
            return Ok(false);
        }
        let most = u32::try_from(most).unwrap_or(MOST_AT_ONCE);
        let limit = most.saturating_add(MARGIN).min(MOST_AT_ONCE);
        let mut due = in_time(self.queue.due(&reach, limit)).await?;
        // Asked in each sweep, so that a clock that was set is noticed soon.
        let may_take_over = self.context.guard.may_take_over();
        due.retain(|job| self.may_take(job, may_take_over) && !lost.contains(&job.key));
        let admitted = admission.admit_due(due);
        if admitted.is_empty() {
            return Ok(false);
        }
        self.take(admitted, lost).await?;
        Ok(true)
    }

    /// A worker never takes over a job that it runs itself, nor any lost job just after
    /// an outage: that job's worker renews first.
    fn may_take(&self, job: &DueJob, may_take_over: bool) -> bool {
        !job.is_lost || may_take_over && !self.context.keeper.has(&job.key)
    }

    async fn take(
        &self,
        admitted: Vec<(DueJob, Room)>,
        lost: &mut HashSet<JobKey>,
    ) -> Result<(), StoreError> {
        let mut rooms = HashMap::with_capacity(admitted.len());
        let picks: Vec<Pick> = admitted
            .into_iter()
            .map(|(job, room)| {
                let token = Uuid::new_v4();
                rooms.insert(token, room);
                Pick {
                    acked_when_claimed: self.reach.acked_when_claimed(&job.task),
                    limits: self.reach.limits(&job.key.subscription, &job.task),
                    key: job.key,
                    token,
                }
            })
            .collect();
        for job in self.take_until_answered(&picks).await? {
            let fence = &job.acquired.fence;
            let Some(room) = rooms.remove(&fence.token) else {
                continue;
            };
            info!(job = %fence.key, attempt = fence.attempt, "took a job from the queue");
            let processor = Arc::clone(&self.processor);
            self.processor
                .running
                .spawn(async move { processor.run_taken(job, room).await });
        }
        let not_taken = picks.iter().filter(|pick| rooms.contains_key(&pick.token));
        lost.extend(not_taken.map(|pick| pick.key.clone()));
        Ok(())
    }

    /// A take may have committed although its answer is lost. Repeating it with the same
    /// tokens confirms it, so that no job waits for a lease that nobody renews.
    async fn take_until_answered(&self, picks: &[Pick]) -> Result<Vec<Taken>, StoreError> {
        let guard = &self.context.guard;
        let mut backoff = Backoff::new(TRY_AGAIN.0, TRY_AGAIN.1);
        loop {
            let error = match in_time(self.queue.take(picks, guard.terms())).await {
                Err(error) if error.is_passing() => error,
                answer => return answer,
            };
            guard.health().note(Some(&error));
            warn!(%error, "jobs of the queue may have been taken; asking again");
            tokio::select! {
                () = self.context.shutdown.giving_up.cancelled() => return Err(error),
                () = sleep(backoff.next_delay()) => {}
            }
        }
    }
}

async fn sweep_is_due(admission: &Admission) {
    let mut changes = admission.changes();
    while !admission.is_sweep_due() {
        changes.next().await;
    }
}
