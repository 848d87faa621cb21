//! Deliveries of messages whose job runs elsewhere.
//!
//! Acknowledging one would settle the message and take away what `after_run`
//! promises, so it is held, its ack deadline extended, without a slot.

use std::sync::Arc;
use std::time::Duration;

use tokio::sync::{OwnedSemaphorePermit, Semaphore};
use tokio::time::{Instant, sleep, sleep_until};
use tokio_util::sync::CancellationToken;
use tokio_util::task::TaskTracker;
use tracing::{debug, warn};

use crate::guard::Guard;
use crate::job::JobKey;
use crate::outcome::Disposition;
use crate::pubsub::Receipt;
use crate::retry::jittered;
use crate::store::Standing;

/// More than these are handed back after a pause instead.
const MAX_HELD: usize = 256;
/// More than these are not even kept for the pause.
const MAX_PAUSED: usize = 1024;
/// The pause before a delivery that cannot be dealt with now is handed back;
/// without it, a broker would send it again at once.
const PAUSE: Duration = Duration::from_secs(2);
/// How long after a lease's end a holder looks again.
const AFTER_LEASE: Duration = Duration::from_millis(500);

pub(super) struct HeldDeliveries {
    held: Arc<Semaphore>,
    paused: Arc<Semaphore>,
    tasks: TaskTracker,
}

impl HeldDeliveries {
    /// Holders run on `tasks`, so that a stopping worker waits for them.
    pub(super) fn new(tasks: TaskTracker) -> Self {
        Self {
            held: Arc::new(Semaphore::new(MAX_HELD)),
            paused: Arc::new(Semaphore::new(MAX_PAUSED)),
            tasks,
        }
    }

    /// Holds a duplicate until its job has ended (then acknowledges it) or has
    /// come free (then hands it back, to be claimed by whoever has a slot).
    pub(super) fn hold(
        &self,
        guard: Guard,
        key: JobKey,
        until: Instant,
        receipt: Receipt,
        draining: CancellationToken,
    ) {
        let Some(place) = place_in(&self.held) else {
            self.pause(receipt, draining);
            return;
        };
        self.tasks.spawn(async move {
            match wait_for_the_end(&guard, &key, until, &draining).await {
                Disposition::Ack => receipt.ack(),
                Disposition::Nack | Disposition::Hold => receipt.nack(),
            }
            drop(place);
        });
    }

    /// Hands a delivery back after a jittered pause, without a slot.
    pub(super) fn pause(&self, receipt: Receipt, draining: CancellationToken) {
        let Some(place) = place_in(&self.paused) else {
            receipt.nack();
            return;
        };
        self.tasks.spawn(async move {
            tokio::select! {
                () = draining.cancelled() => {}
                () = sleep(jittered(PAUSE)) => {}
            }
            receipt.nack();
            drop(place);
        });
    }
}

fn place_in(room: &Arc<Semaphore>) -> Option<OwnedSemaphorePermit> {
    Arc::clone(room).try_acquire_owned().ok()
}

async fn wait_for_the_end(
    guard: &Guard,
    key: &JobKey,
    mut until: Instant,
    draining: &CancellationToken,
) -> Disposition {
    loop {
        tokio::select! {
            () = draining.cancelled() => return Disposition::Nack,
            () = sleep_until(until + jittered(AFTER_LEASE)) => {}
        }
        match guard.look(key).await {
            Ok(Standing::Finished(state)) => {
                debug!(job = %key, state = state.as_str(), "a held duplicate is settled");
                return Disposition::Ack;
            }
            Ok(Standing::Free) => return Disposition::Nack,
            Ok(Standing::Held(remaining)) => until = Instant::now() + remaining,
            Err(error) => {
                warn!(job = %key, %error, "a held delivery could not look at its job");
                until = Instant::now() + jittered(PAUSE);
            }
        }
    }
}
