//! The bookkeeping behind admission: pure, and the time is an argument.
//!
//! A job fits if a slot is free, its subscription and its task may use one more,
//! and enough GPUs are free. What fits is begun, oldest first. The oldest job
//! that does not fit has what comes free reserved for it once it has waited for
//! `reserve_after`; from then on a younger job passes it only if it does not
//! delay it, or is over by the time that the older one can begin (backfilling,
//! as batch schedulers do it: <https://slurm.schedmd.com/sched_config.html>).

use std::collections::BTreeMap;
use std::time::Duration;

use tokio::time::Instant;

use super::run_time::RunTime;
use crate::job::{DueJob, JobKey};
use crate::store::Reach;

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

#[derive(Debug)]
pub(super) struct Rooms {
    capacity: Capacity,
    gpus: usize,
    running: BTreeMap<u64, Running>,
    next_id: u64,
    run_times: BTreeMap<String, RunTime>,
    /// Deliveries that are held, by subscription.
    held: BTreeMap<String, usize>,
    /// Of those, the ones whose job waits for room.
    held_for_room: usize,
    reserved: Option<Reserved>,
    sweep_is_due: bool,
}

#[derive(Debug)]
struct Running {
    subscription: String,
    task: String,
    since: Instant,
}

/// What comes free is for this job.
#[derive(Debug, Clone, PartialEq)]
struct Reserved {
    key: JobKey,
    gpus: usize,
}

/// A job that passes one that waits takes at most this part of `reserve_after`,
/// if nothing is known about when the other can begin.
const SHORT: u32 = 10;

impl Rooms {
    pub(super) fn new(capacity: Capacity, gpus: usize) -> Self {
        Self {
            capacity,
            gpus,
            running: BTreeMap::new(),
            next_id: 0,
            run_times: BTreeMap::new(),
            held: BTreeMap::new(),
            held_for_room: 0,
            reserved: None,
            sweep_is_due: false,
        }
    }

    pub(super) fn gpus_of(&self, task: &str) -> usize {
        self.capacity.tasks.get(task).map_or(0, |task| task.gpus)
    }

    pub(super) fn running(&self) -> usize {
        self.running.len()
    }

    /// Room for a job: the id that gives it back. None where it does not fit or
    /// would delay the job that room is reserved for.
    pub(super) fn admit(
        &mut self,
        key: &JobKey,
        task: &str,
        free_gpus: usize,
        now: Instant,
    ) -> Option<u64> {
        let room = self.room_of(&key.subscription).min(self.room_for(task));
        if room == 0 || self.gpus_of(task) > free_gpus {
            return None;
        }
        let is_reserved = self.reserved.as_ref().is_some_and(|r| r.key == *key);
        if is_reserved {
            self.reserved = None;
        } else if self.delays_the_oldest(task, free_gpus, now) {
            return None;
        }
        let id = self.next_id;
        self.next_id += 1;
        self.running.insert(
            id,
            Running {
                subscription: key.subscription.to_string(),
                task: task.to_owned(),
                since: now,
            },
        );
        Some(id)
    }

    /// Admits what fits of the jobs in the queue, which are sorted by age, and
    /// reserves room for the oldest that does not. Returns their indices and ids.
    pub(super) fn admit_due(
        &mut self,
        due: &[DueJob],
        mut free_gpus: usize,
        now: Instant,
    ) -> Vec<(usize, u64)> {
        // Jobs older than the one it was for go first.
        self.reserved = None;
        let mut admitted = Vec::new();
        for (nth, job) in due.iter().enumerate() {
            if let Some(id) = self.admit(&job.key, &job.task, free_gpus, now) {
                free_gpus -= self.gpus_of(&job.task);
                admitted.push((nth, id));
                continue;
            }
            if self.reserved.is_none() && self.may_reserve(job, free_gpus) {
                self.reserved = Some(Reserved {
                    key: job.key.clone(),
                    gpus: self.gpus_of(&job.task),
                });
            }
        }
        admitted
    }

    /// The job has ended.
    pub(super) fn leave(&mut self, id: u64, now: Instant) {
        let Some(ended) = self.running.remove(&id) else {
            return;
        };
        let took = now.duration_since(ended.since);
        self.run_times.entry(ended.task).or_default().add(took);
        if self.held_for_room > 0 {
            // Older than anything that could be pulled.
            self.sweep_is_due = true;
        }
    }

    /// See [`super::Admission::could_begin`].
    pub(super) fn could_begin(&self, subscription: &str, free_gpus: usize, now: Instant) -> usize {
        if self.sweep_is_due || !self.could_hold(subscription) {
            return 0;
        }
        let of_tasks = self.capacity.tasks.keys().map(|task| {
            let by_gpus = match self.gpus_of(task) {
                0 => usize::MAX,
                gpus => free_gpus / gpus,
            };
            match self.delays_the_oldest(task, free_gpus, now) {
                true => 0,
                false => self.room_for(task).min(by_gpus),
            }
        });
        let most = of_tasks.fold(0, usize::saturating_add);
        self.room_of(subscription).min(most)
    }

    pub(super) fn could_hold(&self, subscription: &str) -> bool {
        let held = self.held.get(subscription).copied().unwrap_or(0);
        let capacity = self.capacity.subscriptions.get(subscription);
        capacity.is_none_or(|capacity| held < capacity.max_waiting)
    }

    pub(super) fn hold(&mut self, subscription: &str, waits_for_room: bool) {
        *self.held.entry(subscription.to_owned()).or_default() += 1;
        self.held_for_room += usize::from(waits_for_room);
    }

    pub(super) fn let_go(&mut self, subscription: &str, waits_for_room: bool) {
        if let Some(held) = self.held.get_mut(subscription) {
            *held -= 1;
        }
        self.held_for_room -= usize::from(waits_for_room);
    }

    pub(super) fn nothing_waits(&self) -> bool {
        self.held_for_room == 0 && self.reserved.is_none() && !self.sweep_is_due
    }

    pub(super) fn sweep_first(&mut self) {
        self.sweep_is_due = true;
    }

    pub(super) fn is_sweep_due(&self) -> bool {
        self.sweep_is_due
    }

    pub(super) fn swept(&mut self) {
        self.sweep_is_due = false;
    }

    /// Of everything within reach, what could have room now or, if only GPUs or
    /// slots are lacking, soon; and how many slots are free.
    pub(super) fn within(&self, reach: &Reach) -> (Reach, usize) {
        let mut reach = reach.clone();
        reach
            .subscriptions
            .retain(|name, _| self.free_share_of(name) > 0);
        reach
            .tasks
            .retain(|name, _| self.free_share_for(name) > 0 && self.gpus_of(name) <= self.gpus);
        (reach, self.free_slots())
    }

    fn free_slots(&self) -> usize {
        self.capacity.slots.saturating_sub(self.running.len())
    }

    /// How many more jobs of the subscription fit, whatever their task.
    fn room_of(&self, subscription: &str) -> usize {
        self.free_slots().min(self.free_share_of(subscription))
    }

    /// How many more jobs of the task fit, GPUs aside.
    fn room_for(&self, task: &str) -> usize {
        self.free_slots().min(self.free_share_for(task))
    }

    fn free_share_of(&self, subscription: &str) -> usize {
        let capacity = self.capacity.subscriptions.get(subscription);
        let limit = capacity.and_then(|capacity| capacity.concurrency);
        limit.map_or(usize::MAX, |limit| {
            let running = self.running.values();
            limit.saturating_sub(running.filter(|r| r.subscription == subscription).count())
        })
    }

    fn free_share_for(&self, task: &str) -> usize {
        let capacity = self.capacity.tasks.get(task);
        let limit = capacity.and_then(|capacity| capacity.concurrency);
        limit.map_or(usize::MAX, |limit| {
            let running = self.running.values();
            limit.saturating_sub(running.filter(|r| r.task == task).count())
        })
    }

    /// Whether room may be reserved for a job that does not fit: only slots or
    /// GPUs are lacking, which will come free, and it has waited long enough.
    fn may_reserve(&self, job: &DueJob, free_gpus: usize) -> bool {
        let needed = self.gpus_of(&job.task);
        let lacks = needed > free_gpus || self.free_slots() == 0;
        let could_fit = needed <= self.gpus
            && self.free_share_of(&job.key.subscription) > 0
            && self.free_share_for(&job.task) > 0;
        lacks && could_fit && job.waited >= self.capacity.reserve_after
    }

    /// Whether a job of the task, which fits, would take what is reserved for
    /// the oldest, and for longer than that one has to wait in any case.
    fn delays_the_oldest(&self, task: &str, free_gpus: usize, now: Instant) -> bool {
        let Some(reserved) = &self.reserved else {
            return false;
        };
        let gpus = self.gpus_of(task);
        let takes_its_slot = self.free_slots() <= 1;
        let takes_its_gpus = gpus > 0 && free_gpus.saturating_sub(gpus) < reserved.gpus;
        if !takes_its_slot && !takes_its_gpus {
            return false;
        }
        let begins_in = self
            .begins_in(reserved, free_gpus, now)
            .unwrap_or(self.capacity.reserve_after / SHORT);
        let takes = self.run_times.get(task).and_then(RunTime::mean);
        takes.is_none_or(|takes| takes > begins_in)
    }

    /// When the job that room is reserved for can begin, if the running ones take
    /// as long as their like did. None where too little is known.
    fn begins_in(&self, reserved: &Reserved, free_gpus: usize, now: Instant) -> Option<Duration> {
        let mut ends: Vec<(Duration, usize)> = self
            .running
            .values()
            .filter_map(|running| {
                let mean = self.run_times.get(&running.task)?.mean()?;
                let ran = now.duration_since(running.since);
                Some((mean.saturating_sub(ran), self.gpus_of(&running.task)))
            })
            .collect();
        ends.sort();
        let (mut slots, mut gpus) = (self.free_slots(), free_gpus);
        let mut begins_in = Duration::ZERO;
        let mut ends = ends.into_iter();
        while slots == 0 || gpus < reserved.gpus {
            let (ends_in, freed) = ends.next()?;
            begins_in = ends_in;
            slots += 1;
            gpus += freed;
        }
        Some(begins_in)
    }
}

#[cfg(test)]
mod tests;
