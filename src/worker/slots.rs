//! Room for jobs.

use std::sync::Arc;

use tokio::sync::{OwnedSemaphorePermit, Semaphore};

/// The slots of a worker. Clones share them.
#[derive(Debug, Clone)]
pub(super) struct Slots {
    free: Arc<Semaphore>,
    total: usize,
}

/// Room for one job; comes free when dropped.
#[derive(Debug)]
pub(super) struct Slot {
    _permit: OwnedSemaphorePermit,
}

impl Slots {
    pub(super) fn new(total: usize) -> Self {
        Self {
            free: Arc::new(Semaphore::new(total)),
            total,
        }
    }

    /// Completes once a slot is free, without taking it: a puller that waited
    /// with a slot in hand would keep it from the other subscriptions.
    pub(super) async fn some_free(&self) {
        // The semaphore is never closed, so either answer means the same.
        drop(self.free.acquire().await);
    }

    pub(super) fn try_take(&self) -> Option<Slot> {
        let permit = Arc::clone(&self.free).try_acquire_owned().ok()?;
        Some(Slot { _permit: permit })
    }

    pub(super) fn taken(&self) -> usize {
        self.total - self.free.available_permits()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[tokio::test]
    async fn a_slot_comes_free_when_its_job_is_dropped() {
        let slots = Slots::new(1);
        let slot = slots.try_take().unwrap();
        assert!(slots.try_take().is_none());
        drop(slot);
        slots.some_free().await;
        assert!(slots.try_take().is_some());
    }
}
