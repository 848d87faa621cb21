//! Takes over jobs whose worker is gone, from the table, into free slots.

use std::sync::Arc;
use std::time::Duration;

use tokio::time::sleep;
use tokio_util::sync::CancellationToken;
use tokio_util::task::TaskTracker;
use tracing::{info, warn};

use super::process::Processor;
use super::slots::{Slot, Slots};
use crate::guard::Guard;
use crate::retry::jittered;
use crate::store::Reach;

/// Between sweeps, about: so long may a job wait that a stopping worker gave
/// back. A sweep reads a table that has a row per unfinished job.
const LONGEST_PAUSE: Duration = Duration::from_secs(5);

pub(super) struct Reaper {
    pub(super) guard: Guard,
    pub(super) reach: Reach,
    pub(super) slots: Slots,
    pub(super) processor: Arc<Processor>,
    pub(super) running: TaskTracker,
    pub(super) draining: CancellationToken,
}

impl Reaper {
    /// Sweeps now and then, so that a job whose worker died runs again within
    /// a lease and a sweep. Ends when the worker drains.
    pub(super) async fn run(self) {
        let pause = (self.guard.lease() / 4).min(LONGEST_PAUSE);
        loop {
            tokio::select! {
                () = self.draining.cancelled() => return,
                () = sleep(jittered(pause)) => {}
            }
            self.sweep().await;
        }
    }

    async fn sweep(&self) {
        let mut slots: Vec<Slot> = std::iter::from_fn(|| self.slots.try_take()).collect();
        if slots.is_empty() {
            return;
        }
        let orphans = match self.guard.reap(&self.reach, slots.len()).await {
            Ok(orphans) => orphans,
            Err(error) => {
                warn!(%error, "no sweep for orphaned jobs");
                return;
            }
        };
        for orphan in orphans {
            // As many were asked for as there are slots.
            let Some(slot) = slots.pop() else { return };
            info!(job = %orphan.acquired.fence.key, "took over an orphaned job");
            let processor = Arc::clone(&self.processor);
            self.running
                .spawn(async move { processor.process_orphan(orphan, slot).await });
        }
    }
}
