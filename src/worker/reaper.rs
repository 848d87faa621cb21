//! Takes jobs from the table into free slots: those whose turn it is, and those
//! whose worker is gone.

use std::sync::Arc;
use std::time::Duration;

use tokio::sync::Notify;
use tokio::time::sleep;
use tokio_util::sync::CancellationToken;
use tokio_util::task::TaskTracker;
use tracing::{debug, info, warn};

use super::process::Processor;
use super::slots::{Slot, Slots};
use crate::guard::Guard;
use crate::job::Reaped;
use crate::retry::jittered;
use crate::store::Reach;

/// Between sweeps, about: so long may a job wait that a stopping worker gave
/// back. A sweep reads a table that has a row per unfinished job.
const PAUSE: Duration = Duration::from_secs(1);
/// How many jobs one sweep takes at most.
const MOST_AT_ONCE: usize = 200;
/// However often the reaper is woken.
const SHORTEST_PAUSE: Duration = Duration::from_millis(20);

pub(super) struct Reaper {
    pub(super) guard: Guard,
    pub(super) reach: Reach,
    pub(super) slots: Slots,
    pub(super) processor: Arc<Processor>,
    pub(super) running: TaskTracker,
    pub(super) wake: Arc<Notify>,
    pub(super) draining: CancellationToken,
}

impl Reaper {
    /// Sweeps now and then, so that a job whose worker died runs again within
    /// a lease and a sweep. Ends when the worker drains.
    pub(super) async fn run(self) {
        loop {
            tokio::select! {
                () = self.draining.cancelled() => return,
                () = sleep(jittered(PAUSE)) => {}
                () = self.wake.notified() => sleep(SHORTEST_PAUSE).await,
            }
            if let Err(error) = self.guard.know(&self.reach).await {
                debug!(%error, "could not tell which tasks are known here");
            }
            loop {
                let slots = tokio::select! {
                    () = self.draining.cancelled() => return,
                    slots = self.slots_for_what_is_due() => slots,
                };
                if slots.is_empty() || !self.sweep(slots).await {
                    break;
                }
            }
        }
    }

    /// As many slots as jobs are due, of those that come free; none where none
    /// is due. Nobody goes without a slot while the database is asked.
    async fn slots_for_what_is_due(&self) -> Vec<Slot> {
        let (reach, room) = self.slots.within(&self.reach);
        let due = match self.guard.due(&reach, room.min(MOST_AT_ONCE)).await {
            Ok(0) => return Vec::new(),
            Ok(due) => due,
            Err(error) => {
                warn!(%error, "no sweep for waiting jobs");
                return Vec::new();
            }
        };
        // In its turn among the pullers: what waits in the table must not wait
        // for the subscriptions to be empty.
        let first = self.slots.take_any().await;
        let others = std::iter::from_fn(|| self.slots.try_take_any());
        first.into_iter().chain(others).take(due).collect()
    }

    /// True where there may be more to take.
    async fn sweep(&self, mut slots: Vec<Slot>) -> bool {
        let (reach, room) = self.slots.within(&self.reach);
        let limit = slots.len().min(room);
        let reaped = match self.guard.reap(&reach, limit).await {
            Ok(reaped) => reaped,
            Err(error) => {
                warn!(%error, "no sweep for waiting jobs");
                return false;
            }
        };
        let more = reaped.len() == limit;
        for job in reaped {
            // As many were asked for as there are slots.
            let Some(slot) = slots.pop() else {
                return false;
            };
            self.begin(job, slot).await;
        }
        more
    }

    async fn begin(&self, job: Reaped, mut slot: Slot) {
        let fence = &job.acquired.fence;
        let admitted = self
            .slots
            .admit_subscription(&mut slot, &fence.key.subscription)
            && self.slots.admit_task(&mut slot, &job.task);
        if !admitted {
            // A delivery was quicker.
            self.processor.give_back(fence).await;
            return;
        }
        info!(job = %fence.key, attempt = fence.attempt, "took a job from the table");
        let processor = Arc::clone(&self.processor);
        self.running
            .spawn(async move { processor.process_reaped(job, slot).await });
    }
}
