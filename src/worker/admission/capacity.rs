//! The limits that the configuration sets for a worker.

use std::collections::BTreeMap;
use std::time::Duration;

/// What a worker has room for.
#[derive(Debug, Clone, Default)]
pub(in crate::worker) struct Capacity {
    pub(in crate::worker) slots: usize,
    pub(in crate::worker) subscriptions: BTreeMap<String, SubscriptionCapacity>,
    pub(in crate::worker) tasks: BTreeMap<String, TaskCapacity>,
    /// How long the oldest job waits before freed room is reserved for it.
    pub(in crate::worker) reserve_after: Duration,
}

#[derive(Debug, Clone, Copy)]
pub(in crate::worker) struct SubscriptionCapacity {
    /// How many of its jobs may run side by side, if limited.
    pub(in crate::worker) concurrency: Option<usize>,
    /// How many of its deliveries may be held before pulling stops.
    pub(in crate::worker) max_waiting: usize,
}

#[derive(Debug, Clone, Copy, Default)]
pub(in crate::worker) struct TaskCapacity {
    /// How many of its jobs may run side by side, if limited.
    pub(in crate::worker) concurrency: Option<usize>,
    /// How many GPUs each of its jobs has to itself.
    pub(in crate::worker) gpus: usize,
}
