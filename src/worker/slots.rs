//! Room for jobs: slots of the worker, what subscriptions and tasks may take of
//! them, and GPUs.

use std::collections::BTreeMap;
use std::sync::Arc;

use tokio::sync::{OwnedSemaphorePermit, Semaphore};

use crate::devices::{DeviceSet, Devices};
use crate::store::Reach;

/// The slots of a worker. Clones share them.
#[derive(Debug, Clone)]
pub(super) struct Slots {
    worker: Arc<Semaphore>,
    total: usize,
    /// Of those that have a limit of their own.
    subscriptions: Arc<BTreeMap<String, Arc<Semaphore>>>,
    tasks: Arc<BTreeMap<String, Arc<Semaphore>>>,
    devices: Devices,
    /// How many devices a job needs, by the tasks that need any.
    needs: Arc<BTreeMap<String, usize>>,
}

/// Room for one job; comes free when dropped.
#[derive(Debug)]
pub(super) struct Slot {
    _worker: OwnedSemaphorePermit,
    subscription: Option<OwnedSemaphorePermit>,
    task: Option<OwnedSemaphorePermit>,
    /// A run that cannot be ended keeps them longer than its slot.
    devices: Option<Arc<DeviceSet>>,
}

/// A number by name.
pub(super) type Limits = BTreeMap<String, usize>;

/// What a worker has room for.
#[derive(Debug, Default)]
pub(super) struct Capacity {
    pub(super) slots: usize,
    /// How many jobs of a subscription may run side by side, where limited.
    pub(super) subscriptions: Limits,
    /// The same for tasks.
    pub(super) tasks: Limits,
    pub(super) devices: Devices,
    /// How many devices a job of the task needs, where it needs any.
    pub(super) needs: Limits,
}

impl Slots {
    pub(super) fn new(capacity: Capacity) -> Self {
        let rooms = |limits: &Limits| {
            let rooms = limits.iter().map(|(name, limit)| {
                let room = Arc::new(Semaphore::new(*limit));
                (name.clone(), room)
            });
            Arc::new(rooms.collect())
        };
        Self {
            worker: Arc::new(Semaphore::new(capacity.slots)),
            total: capacity.slots,
            subscriptions: rooms(&capacity.subscriptions),
            tasks: rooms(&capacity.tasks),
            devices: capacity.devices,
            needs: Arc::new(capacity.needs),
        }
    }

    /// Completes once the subscription could have a slot, without taking it: a
    /// puller that waited with a slot in hand would keep it from the others.
    pub(super) async fn some_free(&self, subscription: &str) {
        loop {
            // A semaphore is never closed, so either answer means the same. No
            // room is kept while waiting for the other: the table's jobs need
            // both, too.
            if let Some(room) = self.subscriptions.get(subscription) {
                drop(room.acquire().await);
            }
            drop(self.worker.acquire().await);
            let room = self.subscriptions.get(subscription);
            if room.is_none_or(|room| room.available_permits() > 0) {
                return;
            }
        }
    }

    /// A slot for a message of the subscription.
    pub(super) fn try_take(&self, subscription: &str) -> Option<Slot> {
        let mut slot = self.try_take_any()?;
        self.admit_subscription(&mut slot, subscription)
            .then_some(slot)
    }

    /// A slot in its turn, for whatever the table has.
    pub(super) async fn take_any(&self) -> Option<Slot> {
        let worker = Arc::clone(&self.worker).acquire_owned().await.ok()?;
        Some(Slot::new(worker))
    }

    pub(super) fn try_take_any(&self) -> Option<Slot> {
        let worker = Arc::clone(&self.worker).try_acquire_owned().ok()?;
        Some(Slot::new(worker))
    }

    /// False where the subscription's jobs may take no more.
    pub(super) fn admit_subscription(&self, slot: &mut Slot, subscription: &str) -> bool {
        admit(&self.subscriptions, subscription, &mut slot.subscription)
    }

    /// False where the task's jobs may take no more, or too few GPUs are free.
    pub(super) fn admit_task(&self, slot: &mut Slot, task: &str) -> bool {
        if let Some(count) = self.needs.get(task) {
            slot.devices = self.devices.take(*count).map(Arc::new);
            if slot.devices.is_none() {
                return false;
            }
        }
        admit(&self.tasks, task, &mut slot.task)
    }

    /// What there is room for of all that is within reach, and for how many
    /// jobs of it at least, whichever they are.
    pub(super) fn within(&self, reach: &Reach) -> (Reach, usize) {
        let mut room = usize::MAX;
        let mut has_room = |limits: &BTreeMap<String, Arc<Semaphore>>, name: &str| {
            let Some(limit) = limits.get(name) else {
                return true;
            };
            let free = limit.available_permits();
            if free > 0 {
                room = room.min(free);
            }
            free > 0
        };
        let mut reach = reach.clone();
        reach
            .subscriptions
            .retain(|name, _| has_room(&self.subscriptions, name));
        reach.tasks.retain(|name, _| has_room(&self.tasks, name));
        let free = self.devices.free();
        for (task, count) in self.needs.iter() {
            match free / count {
                0 => drop(reach.tasks.remove(task)),
                jobs if reach.tasks.contains_key(task) => room = room.min(jobs),
                _ => {}
            }
        }
        (reach, room)
    }

    pub(super) fn taken(&self) -> usize {
        self.total - self.worker.available_permits()
    }
}

impl Slot {
    fn new(worker: OwnedSemaphorePermit) -> Self {
        Self {
            _worker: worker,
            subscription: None,
            task: None,
            devices: None,
        }
    }

    /// The GPUs that the job has to itself.
    pub(super) fn devices(&self) -> Option<Arc<DeviceSet>> {
        self.devices.clone()
    }
}

fn admit(
    rooms: &BTreeMap<String, Arc<Semaphore>>,
    name: &str,
    place: &mut Option<OwnedSemaphorePermit>,
) -> bool {
    let Some(room) = rooms.get(name) else {
        return true;
    };
    *place = Arc::clone(room).try_acquire_owned().ok();
    place.is_some()
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::store::TaskTerms;

    fn limit(name: &str, limit: usize) -> Limits {
        Limits::from([(name.to_owned(), limit)])
    }

    fn reach(tasks: &[&str]) -> Reach {
        Reach {
            subscriptions: BTreeMap::from([("s".to_owned(), None)]),
            tasks: tasks
                .iter()
                .map(|task| {
                    let terms = TaskTerms {
                        max_attempts: 3,
                        acked_when_claimed: false,
                    };
                    ((*task).to_owned(), terms)
                })
                .collect(),
        }
    }

    #[tokio::test]
    async fn a_slot_comes_free_when_its_job_is_dropped() {
        let slots = Slots::new(Capacity {
            slots: 1,
            ..Capacity::default()
        });
        let slot = slots.try_take("s").unwrap();
        assert!(slots.try_take("s").is_none());
        drop(slot);
        slots.some_free("s").await;
        assert!(slots.try_take("s").is_some());
    }

    #[test]
    fn a_subscription_at_its_limit_leaves_slots_to_the_others() {
        let slots = Slots::new(Capacity {
            slots: 3,
            subscriptions: limit("heavy", 1),
            ..Capacity::default()
        });
        let _heavy = slots.try_take("heavy").unwrap();
        assert!(slots.try_take("heavy").is_none());
        let _light = slots.try_take("light").unwrap();
        assert_eq!(slots.taken(), 2);
    }

    #[test]
    fn a_task_at_its_limit_is_out_of_reach_until_a_job_ends() {
        let slots = Slots::new(Capacity {
            slots: 3,
            tasks: limit("heavy", 1),
            ..Capacity::default()
        });
        let all = reach(&["heavy", "light"]);
        let mut slot = slots.try_take("s").unwrap();
        let (within, room) = slots.within(&all);
        assert_eq!((within.tasks.len(), room), (2, 1));
        assert!(slots.admit_task(&mut slot, "heavy"));
        let (within, room) = slots.within(&all);
        assert_eq!(within.tasks.keys().collect::<Vec<_>>(), ["light"]);
        assert_eq!(room, usize::MAX);
        drop(slot);
        assert_eq!(slots.within(&all).0.tasks.len(), 2);
    }

    #[test]
    fn jobs_that_need_gpus_have_their_own_and_wait_for_them() {
        let slots = Slots::new(Capacity {
            slots: 4,
            devices: Devices::new(vec!["0".to_owned(), "1".to_owned(), "2".to_owned()]),
            needs: limit("large", 2),
            ..Capacity::default()
        });
        let all = reach(&["large", "small"]);
        assert_eq!(slots.within(&all).1, 1);
        let mut first = slots.try_take("s").unwrap();
        assert!(slots.admit_task(&mut first, "large"));
        assert_eq!(first.devices().unwrap().names(), ["0", "1"]);
        let mut second = slots.try_take("s").unwrap();
        assert!(!slots.admit_task(&mut second, "large"));
        let (within, _) = slots.within(&all);
        assert_eq!(within.tasks.keys().collect::<Vec<_>>(), ["small"]);
        assert!(slots.admit_task(&mut second, "small"));
        assert!(second.devices().is_none());
        drop(first);
        assert!(slots.admit_task(&mut second, "large"));
    }
}
