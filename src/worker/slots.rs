//! Room for jobs: slots of the worker, and what subscriptions and tasks may
//! take of them.

use std::collections::BTreeMap;
use std::sync::Arc;

use tokio::sync::{OwnedSemaphorePermit, Semaphore};

use crate::store::Reach;

/// The slots of a worker. Clones share them.
#[derive(Debug, Clone)]
pub(super) struct Slots {
    worker: Arc<Semaphore>,
    total: usize,
    /// Of those that have a limit of their own.
    subscriptions: Arc<BTreeMap<String, Arc<Semaphore>>>,
    tasks: Arc<BTreeMap<String, Arc<Semaphore>>>,
}

/// Room for one job; comes free when dropped.
#[derive(Debug)]
pub(super) struct Slot {
    _worker: OwnedSemaphorePermit,
    subscription: Option<OwnedSemaphorePermit>,
    task: Option<OwnedSemaphorePermit>,
}

/// How many jobs may run side by side, by name.
pub(super) type Limits = BTreeMap<String, usize>;

impl Slots {
    pub(super) fn new(total: usize, subscriptions: &Limits, tasks: &Limits) -> Self {
        let rooms = |limits: &Limits| {
            let rooms = limits.iter().map(|(name, limit)| {
                let room = Arc::new(Semaphore::new(*limit));
                (name.clone(), room)
            });
            Arc::new(rooms.collect())
        };
        Self {
            worker: Arc::new(Semaphore::new(total)),
            total,
            subscriptions: rooms(subscriptions),
            tasks: rooms(tasks),
        }
    }

    /// Completes once the subscription could have a slot, without taking it: a
    /// puller that waited with a slot in hand would keep it from the others.
    pub(super) async fn some_free(&self, subscription: &str) {
        let _room = match self.subscriptions.get(subscription) {
            // A semaphore is never closed, so either answer means the same.
            Some(room) => room.acquire().await.ok(),
            None => None,
        };
        drop(self.worker.acquire().await);
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

    /// False where the task's jobs may take no more.
    pub(super) fn admit_task(&self, slot: &mut Slot, task: &str) -> bool {
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
        }
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

    fn limit(name: &str, limit: usize) -> Limits {
        Limits::from([(name.to_owned(), limit)])
    }

    #[tokio::test]
    async fn a_slot_comes_free_when_its_job_is_dropped() {
        let slots = Slots::new(1, &Limits::new(), &Limits::new());
        let slot = slots.try_take("s").unwrap();
        assert!(slots.try_take("s").is_none());
        drop(slot);
        slots.some_free("s").await;
        assert!(slots.try_take("s").is_some());
    }

    #[test]
    fn a_subscription_at_its_limit_leaves_slots_to_the_others() {
        let slots = Slots::new(3, &limit("heavy", 1), &Limits::new());
        let _heavy = slots.try_take("heavy").unwrap();
        assert!(slots.try_take("heavy").is_none());
        let _light = slots.try_take("light").unwrap();
        assert_eq!(slots.taken(), 2);
    }

    #[test]
    fn a_task_at_its_limit_is_out_of_reach_until_a_job_ends() {
        let slots = Slots::new(3, &Limits::new(), &limit("heavy", 1));
        let all = Reach {
            subscriptions: BTreeMap::from([("s".to_owned(), None)]),
            tasks: BTreeMap::from([("heavy".to_owned(), 3), ("light".to_owned(), 3)]),
        };
        let mut slot = slots.try_take("s").unwrap();
        let (reach, room) = slots.within(&all);
        assert_eq!((reach.tasks.len(), room), (2, 1));
        assert!(slots.admit_task(&mut slot, "heavy"));
        let (reach, room) = slots.within(&all);
        assert_eq!(reach.tasks.keys().collect::<Vec<_>>(), ["light"]);
        assert_eq!(room, usize::MAX);
        drop(slot);
        assert_eq!(slots.within(&all).0.tasks.len(), 2);
    }
}
