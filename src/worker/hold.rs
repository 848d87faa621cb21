//! Deliveries of messages whose job is on record but has not ended.
//!
//! Acknowledging one would settle the message and take away what `after_run`
//! promises, so it is held, its ack deadline extended, without a slot. How many
//! are held is bounded; those beyond are handed back, after a pause that keeps a
//! broker from sending them again at once.

use std::collections::HashMap;
use std::pin::pin;
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;

use tokio::sync::{Notify, OwnedSemaphorePermit, Semaphore};
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

/// How many of one subscription a worker holds; more are handed back after a
/// pause.
const MAX_HELD: usize = 500;
/// How many of one subscription wait for that pause to be over; while there are
/// so many, no more is pulled of it.
const MAX_PAUSED: usize = 200;
/// How many deliveries of one subscription a worker may keep without a slot.
pub const MAX_KEPT: usize = MAX_HELD + MAX_PAUSED;
/// The pause before a delivery that cannot be dealt with now is handed back;
/// without it, a broker would send it again at once.
const PAUSE: Duration = Duration::from_secs(2);
/// How long after a lease's end a holder looks again.
const AFTER_LEASE: Duration = Duration::from_millis(500);
/// A job may end, or wait for a worker, long before its lease does.
const LONGEST_LOOK: Duration = Duration::from_secs(10);

/// The deliveries of one subscription that are held. Clones hold the same.
#[derive(Clone)]
pub(super) struct HeldDeliveries {
    guard: Guard,
    held: Arc<Semaphore>,
    paused: Arc<Semaphore>,
    ended: Arc<Mutex<HashMap<JobKey, Arc<Notify>>>>,
    tasks: TaskTracker,
    draining: CancellationToken,
}

/// A task that this worker does not know, and that another might.
#[derive(Debug, Clone)]
pub(super) struct Unknown {
    /// How long the message may wait for a worker that knows it.
    pub(super) patience: Duration,
    /// What is then wrong with it.
    pub(super) error: String,
    pub(super) dead_letter_topic: Option<Arc<str>>,
}

impl HeldDeliveries {
    /// Holders run on `tasks`, so that a stopping worker waits for them.
    pub(super) fn new(guard: Guard, tasks: TaskTracker, draining: CancellationToken) -> Self {
        Self {
            guard,
            held: Arc::new(Semaphore::new(MAX_HELD)),
            paused: Arc::new(Semaphore::new(MAX_PAUSED)),
            ended: Arc::default(),
            tasks,
            draining,
        }
    }

    /// Completes once one more could be kept.
    pub(super) async fn some_room(&self) {
        // The semaphore is never closed, so either answer means the same.
        drop(self.paused.acquire().await);
    }

    /// Holds a delivery until its job has ended or needs it no more (then
    /// acknowledges it), or until only a delivery can bring the job back (then
    /// hands it back, to be claimed by whoever has a slot).
    pub(super) fn hold(
        &self,
        key: JobKey,
        until: Instant,
        mut receipt: Receipt,
        unknown: Option<Unknown>,
    ) {
        receipt.is_held();
        let Some(place) = place_in(&self.held) else {
            self.pause_unless_given_up(receipt, unknown.map(|unknown| (key, unknown)));
            return;
        };
        let held = self.clone();
        self.tasks.spawn(async move {
            match held.wait_for_the_end(&key, until, unknown).await {
                Disposition::Ack => receipt.ack(),
                Disposition::Nack | Disposition::Hold => receipt.nack(),
            }
            drop(place);
        });
    }

    /// Hands a delivery back after a jittered pause, without a slot.
    pub(super) fn pause(&self, receipt: Receipt) {
        self.pause_unless_given_up(receipt, None);
    }

    fn pause_unless_given_up(&self, receipt: Receipt, unknown: Option<(JobKey, Unknown)>) {
        let Some(place) = place_in(&self.paused) else {
            receipt.nack();
            return;
        };
        let held = self.clone();
        self.tasks.spawn(async move {
            tokio::select! {
                () = held.draining.cancelled() => {}
                () = sleep(jittered(PAUSE)) => {}
            }
            let given_up = match unknown {
                Some((key, unknown)) => held.give_up_if_due(&key, &unknown).await,
                None => false,
            };
            match given_up {
                true => receipt.ack(),
                false => receipt.nack(),
            }
            drop(place);
        });
    }

    /// A job has ended in this worker: who holds a delivery of it need not wait
    /// until the next look.
    pub(super) fn tell_of_the_end(&self, key: &JobKey) {
        let ended = self.ended.lock().unwrap_or_else(PoisonError::into_inner);
        if let Some(waiting) = ended.get(key) {
            waiting.notify_waiters();
        }
    }

    async fn wait_for_the_end(
        &self,
        key: &JobKey,
        until: Instant,
        unknown: Option<Unknown>,
    ) -> Disposition {
        let listener = self.listen(key);
        // Listened to without a gap: an end that comes during a look counts.
        let mut ended = pin!(listener.notified());
        ended.as_mut().enable();
        let mut next_look = until + jittered(AFTER_LEASE);
        let disposition = loop {
            let soon = Instant::now() + jittered(LONGEST_LOOK);
            tokio::select! {
                () = self.draining.cancelled() => break Disposition::Nack,
                () = &mut ended => {}
                () = sleep_until(next_look.min(soon)) => {}
            }
            ended.set(listener.notified());
            ended.as_mut().enable();
            if let Some(unknown) = &unknown {
                self.give_up_if_due(key, unknown).await;
            }
            match self.guard.look(key).await {
                Ok(standing) => match after_look(standing) {
                    Next::Settle(disposition) => {
                        debug!(job = %key, ?standing, ?disposition, "a held delivery is settled");
                        break disposition;
                    }
                    Next::LookIn(pause) => next_look = Instant::now() + pause,
                },
                Err(error) => {
                    warn!(job = %key, %error, "a held delivery could not look at its job");
                    next_look = Instant::now() + jittered(PAUSE);
                }
            }
        };
        self.stop_listening(key, &listener);
        disposition
    }

    async fn give_up_if_due(&self, key: &JobKey, unknown: &Unknown) -> bool {
        let topic = unknown.dead_letter_topic.clone();
        let given_up = self
            .guard
            .give_up_unknown(key, unknown.patience, &unknown.error, topic);
        match given_up.await {
            Ok(given_up) => {
                if given_up {
                    warn!(job = %key, error = unknown.error, "refused");
                }
                given_up
            }
            Err(error) => {
                warn!(job = %key, %error, "a message of an unknown task waits longer");
                false
            }
        }
    }

    fn listen(&self, key: &JobKey) -> Arc<Notify> {
        let mut ended = self.ended.lock().unwrap_or_else(PoisonError::into_inner);
        Arc::clone(ended.entry(key.clone()).or_default())
    }

    fn stop_listening(&self, key: &JobKey, listener: &Arc<Notify>) {
        let mut ended = self.ended.lock().unwrap_or_else(PoisonError::into_inner);
        // The map's and this one: nobody else listens.
        if Arc::strong_count(listener) == 2 {
            ended.remove(key);
        }
    }
}

enum Next {
    Settle(Disposition),
    LookIn(Duration),
}

fn after_look(standing: Standing) -> Next {
    match standing {
        Standing::Finished(_) | Standing::Held { acked: true, .. } => {
            Next::Settle(Disposition::Ack)
        }
        Standing::Free => Next::Settle(Disposition::Nack),
        Standing::Held { remaining, .. } => Next::LookIn(remaining + jittered(AFTER_LEASE)),
        // A worker with room takes it from the table.
        Standing::Waiting { remaining } => Next::LookIn(remaining + jittered(PAUSE)),
    }
}

fn place_in(room: &Arc<Semaphore>) -> Option<OwnedSemaphorePermit> {
    Arc::clone(room).try_acquire_owned().ok()
}
