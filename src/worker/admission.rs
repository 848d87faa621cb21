//! Decides what this worker may take now: slots, the shares of subscriptions and tasks,
//! GPUs, and places for held deliveries.
//!
//! It is asked before a pull ([`Admission::could_begin`]), at an arrival
//! ([`Admission::admit`], [`Admission::hold`]) and in a sweep ([`Admission::admit_due`]).
//! Jobs in the queue are older than messages still to be pulled, so nothing is pulled
//! between [`Admission::sweep_first`] and the end of that sweep.

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

/// Limit on the data of messages that wait for their claim. Above it, nothing is pulled.
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

/// Room for one job; freed when dropped.
pub(super) struct Room {
    admission: Admission,
    id: u64,
    /// Outlives the room if the run cannot be ended.
    devices: Option<Arc<DeviceSet>>,
}

/// A place for one held delivery; freed when dropped.
pub(super) struct Place {
    admission: Admission,
    subscription: Arc<str>,
}

/// The data of a message that waits for its claim.
pub(super) struct Load {
    admission: Admission,
    bytes: usize,
}

/// Signals that there may be more room, or less.
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

    /// Room for an arrived job: all that it needs, or None. Also None if the job would
    /// delay an older one that waits for room, and while a sweep looks for older ones.
    pub(super) fn admit(&self, key: &JobKey, task: &str) -> Option<Room> {
        let mut rooms = self.lock();
        let free = self.inner.devices.free();
        let id = rooms.admit(key, task, free, Instant::now())?;
        let room = self.room(&rooms, id, task);
        drop(rooms);
        self.inner.changed.send_replace(());
        Some(room)
    }

    /// Whether a message of the subscription could be begun now, whichever task it names.
    /// Not while a sweep looks for older jobs, nor while the places for held deliveries
    /// are taken.
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

    /// A place for a held delivery. One that has arrived always gets a place; the count
    /// decides whether more is pulled.
    pub(super) fn hold(&self, subscription: &Arc<str>) -> Place {
        self.lock().hold(subscription);
        self.inner.changed.send_replace(());
        Place {
            admission: self.clone(),
            subscription: Arc::clone(subscription),
        }
    }

    /// Counts a message's data until its claim is answered: a held delivery keeps no
    /// data.
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

    /// Notes that a job of the subscription was put in the queue for want of room; room
    /// may have come free meanwhile.
    pub(super) fn queued(&self, subscription: &str) {
        let free = self.inner.devices.free();
        self.lock().queued(subscription, free, Instant::now());
        self.inner.changed.send_replace(());
    }

    /// Whether the next message may follow a settled one.
    pub(super) fn wants_a_successor(&self) -> bool {
        self.lock().nothing_waits()
    }

    /// Requests a sweep before the next pull: the queue may have jobs older than the
    /// messages still to be pulled.
    pub(super) fn sweep_first(&self) {
        self.lock().sweep_first();
        self.inner.changed.send_replace(());
    }

    pub(super) fn is_sweep_due(&self) -> bool {
        self.lock().is_sweep_due()
    }

    /// Ends a sweep. A sweep is still due if one was requested after the last call of
    /// [`Admission::within`].
    pub(super) fn swept(&self) {
        self.lock().swept();
        self.inner.changed.send_replace(());
    }

    /// Begins a sweep: returns `reach` without the tasks that need more GPUs than this worker
    /// has, and how many jobs of each kind to look for.
    pub(super) fn within(&self, reach: &Reach) -> (Reach, usize) {
        self.lock().within(reach)
    }

    /// Room for those due jobs that fit; `due` is sorted by age. Once the oldest that
    /// does not fit has waited long enough, freed room is reserved for it.
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
                // They were free under the same lock.
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
    /// Marks the start of the run, from which its time counts. Returns the job's own
    /// GPUs.
    pub(super) fn begin(&self) -> Option<Arc<DeviceSet>> {
        self.admission.lock().begin(self.id, Instant::now());
        self.devices.clone()
    }
}

impl Drop for Room {
    fn drop(&mut self) {
        // Frees the GPUs first: whoever is told of the room may need them.
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
