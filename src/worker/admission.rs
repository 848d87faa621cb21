//! Decides what this worker may take now: slots, what subscriptions and tasks
//! may use of them, GPUs, and places for deliveries that are held.
//!
//! It is asked before a pull ([`Admission::could_begin`]), at an arrival
//! ([`Admission::admit`], [`Admission::hold`]) and in a sweep
//! ([`Admission::admit_due`]). Jobs in the queue are older than what could be
//! pulled, so nothing is pulled between [`Admission::sweep_first`] and the end of
//! that sweep.

mod capacity;
mod rooms;
mod run_time;

use std::collections::BTreeMap;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use tokio::sync::watch;
use tokio::time::Instant;

use crate::devices::{DeviceSet, Devices};
use crate::job::{DueJob, JobKey};
use crate::store::Reach;

pub(super) use capacity::{Capacity, SubscriptionCapacity, TaskCapacity};
use rooms::Rooms;

/// Data of messages that wait for their claim. With more, nothing is asked for.
const MAX_LOAD: usize = 64 << 20;

/// The room of one worker. Clones share it.
#[derive(Clone)]
pub(super) struct Admission {
    inner: Arc<Inner>,
}

struct Inner {
    rooms: Mutex<Rooms>,
    devices: Devices,
    /// Bytes of messages that wait for their claim.
    load: AtomicUsize,
    changed: watch::Sender<()>,
}

/// Room for one job; comes free when dropped.
pub(super) struct Room {
    admission: Admission,
    id: u64,
    /// A run that cannot be ended has them for longer than its room.
    devices: Option<Arc<DeviceSet>>,
}

/// A place for one delivery that is held; comes free when dropped.
pub(super) struct Place {
    admission: Admission,
    subscription: Arc<str>,
}

/// The data of a message that waits for its claim.
pub(super) struct Load {
    admission: Admission,
    bytes: usize,
}

/// Tells when there may be more room, or less.
pub(super) struct Changes {
    rooms: watch::Receiver<()>,
    devices: watch::Receiver<()>,
}

impl Changes {
    pub(super) async fn next(&mut self) {
        // Both senders live as long as the worker, so waiting cannot fail.
        tokio::select! {
            _ = self.rooms.changed() => {}
            _ = self.devices.changed() => {}
        }
    }
}

impl Admission {
    pub(super) fn new(capacity: Capacity, devices: Devices) -> Self {
        Self {
            inner: Arc::new(Inner {
                rooms: Mutex::new(Rooms::new(capacity, devices.total())),
                devices,
                load: AtomicUsize::new(0),
                changed: watch::Sender::default(),
            }),
        }
    }

    pub(super) fn changes(&self) -> Changes {
        Changes {
            rooms: self.inner.changed.subscribe(),
            devices: self.inner.devices.freed(),
        }
    }

    /// Room for a job that has arrived, all that it needs or nothing. None also
    /// where it would delay an older one that waits for what comes free, and while
    /// older ones are looked for.
    pub(super) fn admit(&self, key: &JobKey, task: &str) -> Option<Room> {
        let mut rooms = self.lock();
        let free = self.inner.devices.free();
        let id = rooms.admit(key, task, free, Instant::now())?;
        let room = self.room(&rooms, id, task);
        drop(rooms);
        self.inner.changed.send_replace(());
        Some(room)
    }

    /// Whether a message of the subscription could be begun now, whichever task it
    /// names. Not while older jobs are looked for, or while the places for held
    /// deliveries are taken.
    pub(super) fn could_begin(&self, subscription: &str) -> bool {
        if self.is_overloaded() {
            return false;
        }
        let free = self.inner.devices.free();
        self.lock().could_begin(subscription, free, Instant::now()) > 0
    }

    /// Whether another delivery of the subscription could be held.
    pub(super) fn could_hold(&self, subscription: &str) -> bool {
        !self.is_overloaded() && self.lock().could_hold(subscription)
    }

    /// A place for a delivery that is held. There always is one for what has
    /// arrived; what is asked for next depends on it.
    pub(super) fn hold(&self, subscription: &Arc<str>) -> Place {
        self.lock().hold(subscription);
        self.inner.changed.send_replace(());
        Place {
            admission: self.clone(),
            subscription: Arc::clone(subscription),
        }
    }

    /// Counts a message's data until its claim is answered: from then on a delivery
    /// that is held has none.
    pub(super) fn load(&self, bytes: usize) -> Load {
        self.inner.load.fetch_add(bytes, Ordering::AcqRel);
        Load {
            admission: self.clone(),
            bytes,
        }
    }

    fn is_overloaded(&self) -> bool {
        self.inner.load.load(Ordering::Acquire) >= MAX_LOAD
    }

    /// A job of the subscription was put in the queue for want of room, which may
    /// have come free meanwhile.
    pub(super) fn queued(&self, subscription: &str) {
        let free = self.inner.devices.free();
        self.lock().queued(subscription, free, Instant::now());
        self.inner.changed.send_replace(());
    }

    /// Whether a message that is settled may be followed by the next one.
    pub(super) fn wants_a_successor(&self) -> bool {
        self.lock().nothing_waits()
    }

    /// Jobs may wait in the queue that are older than what could be pulled: it
    /// is swept before anything more is asked for.
    pub(super) fn sweep_first(&self) {
        self.lock().sweep_first();
        self.inner.changed.send_replace(());
    }

    pub(super) fn is_sweep_due(&self) -> bool {
        self.lock().is_sweep_due()
    }

    /// The queue has been swept: a sweep is due still if one was asked for after
    /// the last call of [`Admission::within`].
    pub(super) fn swept(&self) {
        self.lock().swept();
        self.inner.changed.send_replace(());
    }

    /// Begins a look into the queue. Of everything within reach, what is worth
    /// looking for, and how many jobs of each kind.
    pub(super) fn within(&self, reach: &Reach) -> (Reach, usize) {
        self.lock().within(reach)
    }

    /// Room for those jobs in the queue that fit; `due` is sorted by age. The
    /// oldest that does not fit has what comes free reserved for it once it has
    /// waited long enough.
    pub(super) fn admit_due(&self, due: Vec<DueJob>) -> Vec<(DueJob, Room)> {
        let mut rooms = self.lock();
        let free = self.inner.devices.free();
        let admitted = rooms.admit_due(&due, free, Instant::now());
        let admitted: BTreeMap<usize, u64> = admitted.into_iter().collect();
        let given = due.into_iter().enumerate().filter_map(|(nth, job)| {
            let room = self.room(&rooms, *admitted.get(&nth)?, &job.task);
            Some((job, room))
        });
        let given = given.collect();
        drop(rooms);
        self.inner.changed.send_replace(());
        given
    }

    fn room(&self, rooms: &Rooms, id: u64, task: &str) -> Room {
        Room {
            admission: self.clone(),
            id,
            devices: match rooms.gpus_of(task) {
                0 => None,
                // As many were free under the same lock.
                gpus => self.inner.devices.take(gpus).map(Arc::new),
            },
        }
    }

    pub(super) fn running(&self) -> usize {
        self.lock().running()
    }

    fn lock(&self) -> MutexGuard<'_, Rooms> {
        self.inner
            .rooms
            .lock()
            .unwrap_or_else(PoisonError::into_inner)
    }
}

impl Room {
    /// The run begins: its time counts from here. Returns the GPUs that the job has
    /// to itself.
    pub(super) fn begin(&self) -> Option<Arc<DeviceSet>> {
        self.admission.lock().begin(self.id, Instant::now());
        self.devices.clone()
    }
}

impl Drop for Room {
    fn drop(&mut self) {
        // The GPUs first: whoever hears of the room may need them.
        self.devices = None;
        let mut rooms = self.admission.lock();
        let free = self.admission.inner.devices.free();
        rooms.leave(self.id, free, Instant::now());
        drop(rooms);
        self.admission.inner.changed.send_replace(());
    }
}

impl Drop for Place {
    fn drop(&mut self) {
        let mut rooms = self.admission.lock();
        rooms.let_go(&self.subscription);
        drop(rooms);
        self.admission.inner.changed.send_replace(());
    }
}

impl Drop for Load {
    fn drop(&mut self) {
        let inner = &self.admission.inner;
        let before = inner.load.fetch_sub(self.bytes, Ordering::AcqRel);
        if before >= MAX_LOAD {
            inner.changed.send_replace(());
        }
    }
}

#[cfg(test)]
mod tests;
