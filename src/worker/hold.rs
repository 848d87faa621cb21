//! Deliveries of messages whose job is on record but has not ended.
//!
//! An ack would settle the message and break the promise of `after_run`, so the delivery
//! is held without a slot, and its ack deadline extended. One loop looks at all their
//! jobs together. A subscription's number of held deliveries is bounded by pulling no
//! more; a delivery that has arrived is never handed back for want of a place.

use std::collections::HashMap;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use tokio::sync::{Notify, OwnedSemaphorePermit, Semaphore};
use tokio::time::{Instant, sleep, sleep_until};
use tokio_util::sync::CancellationToken;
use tokio_util::task::TaskTracker;
use tracing::{debug, warn};

use super::admission::{Admission, Place};
use crate::guard::Guard;
use crate::job::JobKey;
use crate::pubsub::Receipt;
use crate::retry::jittered;
use crate::store::{Queue, Standing, in_time};

/// How long after a lease expires a holder looks again.
const AFTER_LEASE: Duration = Duration::from_millis(500);
/// A job may end elsewhere, or wait for a worker, long before its lease expires.
const LONGEST_LOOK: Duration = Duration::from_secs(10);
/// Pause after a look that found nothing particular to wait for.
const PAUSE: Duration = Duration::from_secs(2);
/// A look also takes the jobs whose time comes this soon: one statement instead of many.
const SOON: Duration = Duration::from_secs(1);
/// Maximum keys in one look.
const MOST_AT_ONCE: usize = 500;
/// At most this many deliveries wait to be handed back while the database is away. More
/// are handed back at once.
const MAX_PAUSED: usize = 200;

/// The deliveries that one worker holds. Clones share them.
#[derive(Clone)]
pub(super) struct HeldDeliveries {
    shared: Arc<Shared>,
}

struct Shared {
    guard: Guard,
    queue: Arc<dyn Queue>,
    admission: Admission,
    held: Mutex<HashMap<JobKey, Held>>,
    changed: Notify,
    paused: Arc<Semaphore>,
    tasks: TaskTracker,
    draining: CancellationToken,
}

/// The deliveries of one job.
struct Held {
    look_at: Instant,
    deliveries: Vec<(Receipt, Place)>,
}

/// How and until when to hold a delivery.
pub(super) struct Holding {
    pub(super) key: JobKey,
    pub(super) place: Place,
    /// When its job may run again, or its lease may expire.
    pub(super) until: Instant,
}

impl HeldDeliveries {
    /// Pauses run on `tasks`, so that a stopping worker waits for them.
    pub(super) fn new(
        guard: Guard,
        queue: Arc<dyn Queue>,
        admission: Admission,
        tasks: TaskTracker,
        draining: CancellationToken,
    ) -> Self {
        Self {
            shared: Arc::new(Shared {
                guard,
                queue,
                admission,
                held: Mutex::default(),
                changed: Notify::new(),
                paused: Arc::new(Semaphore::new(MAX_PAUSED)),
                tasks,
                draining,
            }),
        }
    }

    /// Holds a delivery until its job has ended or does not need it any more, then acks
    /// it. Meanwhile the queue brings the job back.
    pub(super) fn hold(&self, mut delivery: Receipt, holding: Holding) {
        delivery.mark_held();
        let Shared {
            changed, draining, ..
        } = &*self.shared;
        let mut held = self.lock();
        if draining.is_cancelled() {
            return delivery.nack();
        }
        let look_at = holding.until + jittered(AFTER_LEASE);
        let entry = held.entry(holding.key).or_insert_with(|| Held {
            look_at,
            deliveries: Vec::new(),
        });
        entry.look_at = entry
            .look_at
            .min(look_at)
            .min(Instant::now() + jittered(LONGEST_LOOK));
        entry.deliveries.push((delivery, holding.place));
        drop(held);
        changed.notify_one();
    }

    /// Takes out a delivery of a job that this worker begins to run.
    pub(super) fn take(&self, key: &JobKey) -> Option<Receipt> {
        let mut held = self.lock();
        let entry = held.get_mut(key)?;
        let (delivery, _place) = entry.deliveries.pop()?;
        if entry.deliveries.is_empty() {
            held.remove(key);
        }
        Some(delivery)
    }

    /// Looks at the job at once, since an attempt of it has ended in this worker.
    pub(super) fn look_now(&self, key: &JobKey) {
        if let Some(held) = self.lock().get_mut(key) {
            held.look_at = Instant::now();
            self.shared.changed.notify_one();
        }
    }

    /// Hands a delivery back after a jittered pause, while the database is away. Without
    /// the pause a broker would redeliver it at once.
    pub(super) fn hand_back_later(&self, delivery: Receipt) {
        self.hand_back_in(jittered(PAUSE), delivery);
    }

    /// Hands a delivery back after the given pause.
    pub(super) fn hand_back_in(&self, pause: Duration, delivery: Receipt) {
        let Some(place) = place_in(&self.shared.paused) else {
            return delivery.nack();
        };
        let draining = self.shared.draining.clone();
        self.shared.tasks.spawn(async move {
            tokio::select! {
                () = draining.cancelled() => {}
                () = sleep(pause) => {}
            }
            delivery.nack();
            drop(place);
        });
    }

    /// Looks at the jobs until the worker drains, then hands back all held deliveries.
    pub(super) async fn run(self) {
        let Shared {
            changed, draining, ..
        } = &*self.shared;
        loop {
            let next = self.next_look();
            tokio::select! {
                biased;
                () = draining.cancelled() => break,
                () = sleep_until(next) => self.look().await,
                () = changed.notified() => {}
            }
        }
        for (_, held) in self.lock().drain() {
            for (delivery, _) in held.deliveries {
                delivery.nack();
            }
        }
    }

    fn next_look(&self) -> Instant {
        let held = self.lock();
        let next = held.values().map(|held| held.look_at).min();
        next.unwrap_or_else(|| Instant::now() + LONGEST_LOOK)
    }

    async fn look(&self) {
        let soon = Instant::now() + SOON;
        let keys: Vec<JobKey> = self
            .lock()
            .iter()
            .filter(|(_, held)| held.look_at <= soon)
            .take(MOST_AT_ONCE)
            .map(|(key, _)| key.clone())
            .collect();
        if keys.is_empty() {
            return;
        }
        match in_time(self.shared.queue.look(&keys)).await {
            Ok(standings) => self.act_on(&keys, &standings).await,
            Err(error) => {
                warn!(deliveries = keys.len(), %error, "held deliveries could not look at their jobs");
                self.shared.guard.health().note(Some(&error));
                self.look_again(&keys, || jittered(PAUSE));
            }
        }
    }

    async fn act_on(&self, keys: &[JobKey], standings: &[Standing]) {
        let mut lost = Vec::new();
        for (key, standing) in keys.iter().zip(standings) {
            match standing {
                Standing::Finished(_) | Standing::Running { acked: true, .. } => {
                    debug!(job = %key, ?standing, "held deliveries are acked");
                    self.settle(key, Receipt::ack);
                }
                Standing::Missing => self.settle(key, Receipt::nack),
                Standing::Running { remaining, .. } => {
                    self.look_again(std::slice::from_ref(key), || {
                        *remaining + jittered(AFTER_LEASE)
                    });
                }
                // A worker with room takes it from the queue.
                Standing::Waiting { remaining } => {
                    self.look_again(std::slice::from_ref(key), || *remaining + jittered(PAUSE));
                }
                Standing::Lost => {
                    self.look_again(std::slice::from_ref(key), || jittered(PAUSE));
                    lost.push(key.clone());
                }
            }
        }
        if !lost.is_empty() && self.shared.guard.may_take_over() {
            self.offer(&lost).await;
        }
    }

    /// Offers lost jobs to any worker: Pub/Sub has redelivered them.
    async fn offer(&self, lost: &[JobKey]) {
        match in_time(self.shared.queue.offer(lost)).await {
            Ok(()) => self.shared.admission.sweep_first(),
            Err(error) => debug!(%error, "lost jobs are not offered yet"),
        }
    }

    fn settle(&self, key: &JobKey, how: fn(Receipt)) {
        let held = self.lock().remove(key);
        for (delivery, _) in held.into_iter().flat_map(|held| held.deliveries) {
            how(delivery);
        }
    }

    fn look_again(&self, keys: &[JobKey], pause: impl Fn() -> Duration) {
        let now = Instant::now();
        let mut held = self.lock();
        for key in keys {
            if let Some(held) = held.get_mut(key) {
                held.look_at = now + pause().min(jittered(LONGEST_LOOK));
            }
        }
    }

    fn lock(&self) -> MutexGuard<'_, HashMap<JobKey, Held>> {
        self.shared
            .held
            .lock()
            .unwrap_or_else(PoisonError::into_inner)
    }
}

fn place_in(room: &Arc<Semaphore>) -> Option<OwnedSemaphorePermit> {
    Arc::clone(room).try_acquire_owned().ok()
}
