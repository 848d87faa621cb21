//! What the configuration lets a worker take.

use std::collections::BTreeMap;
use std::time::Duration;

/// What a worker has room for.
#[derive(Debug, Clone, Default)]
pub(in crate::worker) struct Capacity {
    pub(in crate::worker) slots: usize,
    pub(in crate::worker) subscriptions: BTreeMap<String, SubscriptionCapacity>,
    pub(in crate::worker) tasks: BTreeMap<String, TaskCapacity>,
    /// How long the oldest job waits before what comes free is reserved for it.
    pub(in crate::worker) reserve_after: Duration,
}

#[derive(Debug, Clone, Copy)]
pub(in crate::worker) struct SubscriptionCapacity {
    /// How many of its jobs run side by side, where limited.
    pub(in crate::worker) concurrency: Option<usize>,
    /// How many of its deliveries may be held before nothing more is pulled.
    pub(in crate::worker) max_waiting: usize,
}

#[derive(Debug, Clone, Copy, Default)]
pub(in crate::worker) struct TaskCapacity {
    /// How many of its jobs run side by side, where limited.
    pub(in crate::worker) concurrency: Option<usize>,
    /// How many GPUs each of its jobs has to itself.
    pub(in crate::worker) gpus: usize,
}
