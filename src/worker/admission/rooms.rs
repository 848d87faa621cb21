//! The bookkeeping behind admission: pure, and the time is an argument.
//!
//! A job fits if a slot is free, its subscription and its task may use one more,
//! and enough GPUs are free. Jobs that fit begin, oldest first. When the oldest
//! job that lacks only slots or GPUs has waited for `reserve_after`, slots and GPUs
//! that come free are reserved for it. From then on a younger job passes it only
//! if it takes nothing that is reserved, or should be over before that is needed
//! (backfilling, as batch schedulers do it:
//! <https://slurm.schedmd.com/sched_config.html>).
//!
//! A reservation bounds the wait of its job. It stands until the job begins, is
//! gone, or cannot get its GPUs any more. The time by which jobs that pass must be
//! over is set when the reservation is made. There is one reservation at a time. After
//! it there is none for a while, so that GPUs stand idle for reservations during
//! at most a fifth of the time.
//!
//! A reservation covers slots and GPUs. It is made only while the limits of the job's
//! subscription and task leave it a share. The last share of its subscription is reserved
//! for its task, unless the task is at its limit. So a job that both limits keep
//! waiting may be passed again and again.

use std::collections::BTreeMap;
use std::time::Duration;

use tokio::time::Instant;

use super::capacity::Capacity;
use super::run_time::RunTime;
use crate::job::{DueJob, JobKey};
use crate::store::Reach;

#[derive(Debug)]
pub(super) struct Rooms {
    capacity: Capacity,
    gpus: usize,
    running: BTreeMap<u64, Running>,
    next_id: u64,
    run_times: BTreeMap<String, RunTime>,
    /// Deliveries that are held, by subscription.
    held: BTreeMap<String, usize>,
    /// Subscriptions and tasks with a job that waits in the queue for room. True if
    /// it was put there after the last look into the queue began.
    waiting: BTreeMap<(String, String), bool>,
    /// Subscriptions with a job that has waited for `reserve_after`, and the task of
    /// that job. The last share that the subscription's limit allows is for this task.
    last_shares: BTreeMap<String, String>,
    reserved: Option<Reserved>,
    /// No reservation is made before this time.
    rests_until: Option<Instant>,
    sweep_is_due: bool,
    /// The sweep was requested after the last look into the queue began.
    sweep_is_new: bool,
}

#[derive(Debug)]
struct Running {
    subscription: String,
    task: String,
    /// None until the run begins.
    since: Option<Instant>,
}

/// The job for which slots and GPUs that come free are reserved.
#[derive(Debug)]
struct Reserved {
    key: JobKey,
    task: String,
    since: Instant,
    /// Jobs that pass it must be over by then.
    by: Instant,
}

/// If it is not known when the reserved job can begin, jobs that pass it must be
/// over within `reserve_after` divided by this.
const SHORT: u32 = 10;
/// After a reservation there is none for this many times as long as it reserved the GPUs
/// idle.
const REST: u32 = 4;

impl Rooms {
    pub(super) fn new(capacity: Capacity, gpus: usize) -> Self {
        Self {
            capacity,
            gpus,
            running: BTreeMap::new(),
            next_id: 0,
            run_times: BTreeMap::new(),
            held: BTreeMap::new(),
            waiting: BTreeMap::new(),
            last_shares: BTreeMap::new(),
            reserved: None,
            rests_until: None,
            sweep_is_due: false,
            sweep_is_new: false,
        }
    }

    pub(super) fn gpus_of(&self, task: &str) -> usize {
        self.capacity.tasks.get(task).map_or(0, |task| task.gpus)
    }

    pub(super) fn running(&self) -> usize {
        self.running.len()
    }

    /// Gives room to a job that has arrived, and returns the id with which to give
    /// it back. None if the job does not fit or may delay an older one.
    pub(super) fn admit(
        &mut self,
        key: &JobKey,
        task: &str,
        free_gpus: usize,
        now: Instant,
    ) -> Option<u64> {
        if self.sweep_is_due {
            return None;
        }
        self.give(key, task, free_gpus, now)
    }

    /// Admits the jobs in the queue that fit; `due` is sorted by age. May reserve room
    /// for one that does not fit. Returns the indices and ids of the admitted jobs.
    pub(super) fn admit_due(
        &mut self,
        due: &[DueJob],
        mut free_gpus: usize,
        now: Instant,
    ) -> Vec<(usize, u64)> {
        let of_reserved = self.reserved_in(due, free_gpus);
        if of_reserved.is_none() {
            self.end_reservation(now);
        }
        self.last_shares.clear();
        self.waiting.retain(|_, is_new| *is_new);
        let mut admitted = Vec::new();
        let by_age = (0..due.len()).filter(|nth| Some(*nth) != of_reserved);
        for nth in of_reserved.into_iter().chain(by_age) {
            let job = &due[nth];
            if let Some(id) = self.give(&job.key, &job.task, free_gpus, now) {
                free_gpus -= self.gpus_of(&job.task);
                admitted.push((nth, id));
                continue;
            }
            self.leave_waiting(job, free_gpus, now);
        }
        admitted
    }

    fn leave_waiting(&mut self, job: &DueJob, free_gpus: usize, now: Instant) {
        let (subscription, task) = (job.key.subscription.to_string(), job.task.clone());
        let of = (subscription.clone(), task.clone());
        self.waiting.entry(of).or_default();
        let is_old = job.waited >= self.capacity.reserve_after;
        // If its task is at its limit, nothing is reserved for it, and other jobs go on.
        if !is_old || self.free_share_for(&task) == 0 {
            return;
        }
        if self.may_reserve(job, free_gpus, now) {
            self.reserve(job, free_gpus, now);
            self.last_shares.insert(subscription, task);
        } else {
            self.last_shares.entry(subscription).or_insert(task);
        }
    }

    /// The index of the job that room is reserved for. None if it is not in `due`, or
    /// if the GPUs that it needs cannot come free any more.
    fn reserved_in(&self, due: &[DueJob], free_gpus: usize) -> Option<usize> {
        let reserved = self.reserved.as_ref()?;
        let nth = due.iter().position(|job| job.key == reserved.key)?;
        self.can_come_free(&reserved.task, free_gpus).then_some(nth)
    }

    fn give(&mut self, key: &JobKey, task: &str, free_gpus: usize, now: Instant) -> Option<u64> {
        let is_reserved = self.reserved.as_ref().is_some_and(|r| r.key == *key);
        let fit = match is_reserved {
            true => self.fit(&key.subscription, task, free_gpus),
            false => self.fit_beside(&key.subscription, task, free_gpus, now),
        };
        if fit == 0 {
            return None;
        }
        if is_reserved {
            self.end_reservation(now);
        }
        let id = self.next_id;
        self.next_id += 1;
        self.running.insert(
            id,
            Running {
                subscription: key.subscription.to_string(),
                task: task.to_owned(),
                since: None,
            },
        );
        Some(id)
    }

    /// The job begins to run.
    pub(super) fn begin(&mut self, id: u64, now: Instant) {
        if let Some(running) = self.running.get_mut(&id) {
            running.since = Some(now);
        }
    }

    /// The job has ended, or will not run.
    pub(super) fn leave(&mut self, id: u64, free_gpus: usize, now: Instant) {
        let ended = self.running.remove(&id);
        // A job that has not run tells nothing about run times. It requests no sweep
        // either: taking jobs from the queue may have failed, and a sweep would try
        // again at once.
        if let Some(Running { task, since, .. }) = ended
            && let Some(since) = since
        {
            let took = now.duration_since(since);
            self.run_times.entry(task).or_default().add(took);
            self.sweep_if_any_fits(free_gpus, now);
        }
    }

    /// See [`super::Admission::could_begin`].
    pub(super) fn could_begin(&self, subscription: &str, free_gpus: usize, now: Instant) -> usize {
        if self.sweep_is_due || !self.could_hold(subscription) {
            return 0;
        }
        let tasks = self.capacity.tasks.keys();
        let of_tasks = tasks.map(|task| self.fit_beside(subscription, task, free_gpus, now));
        let most = of_tasks.fold(0, usize::saturating_add);
        self.free_slots()
            .min(self.free_share_of(subscription))
            .min(most)
    }

    pub(super) fn could_hold(&self, subscription: &str) -> bool {
        let held = self.held.get(subscription).copied().unwrap_or(0);
        let capacity = self.capacity.subscriptions.get(subscription);
        capacity.is_none_or(|capacity| held < capacity.max_waiting)
    }

    pub(super) fn hold(&mut self, subscription: &str) {
        *self.held.entry(subscription.to_owned()).or_default() += 1;
    }

    pub(super) fn let_go(&mut self, subscription: &str) {
        if let Some(held) = self.held.get_mut(subscription) {
            *held -= 1;
        }
    }

    /// A job of the subscription was put in the queue because it had no room. Room
    /// may have come free meanwhile.
    pub(super) fn queued(&mut self, subscription: &str, free_gpus: usize, now: Instant) {
        let tasks = self.capacity.tasks.keys();
        let of_any_task = tasks.map(|task| ((subscription.to_owned(), task.clone()), true));
        self.waiting.extend(of_any_task);
        self.sweep_if_any_fits(free_gpus, now);
    }

    pub(super) fn nothing_waits(&self) -> bool {
        self.waiting.is_empty() && self.reserved.is_none() && !self.sweep_is_due
    }

    fn sweep_if_any_fits(&mut self, free_gpus: usize, now: Instant) {
        let reserved = self.reserved.as_ref();
        let reserved_fits =
            reserved.is_some_and(|r| self.fit(&r.key.subscription, &r.task, free_gpus) > 0);
        let mut waiting = self.waiting.keys();
        if reserved_fits || waiting.any(|(of, task)| self.fit_beside(of, task, free_gpus, now) > 0)
        {
            self.sweep_first();
        }
    }

    pub(super) fn sweep_first(&mut self) {
        self.sweep_is_due = true;
        self.sweep_is_new = true;
    }

    pub(super) fn is_sweep_due(&self) -> bool {
        self.sweep_is_due
    }

    /// Ends a sweep. If another was requested after the last look began, that one is
    /// still due.
    pub(super) fn swept(&mut self) {
        self.sweep_is_due = self.sweep_is_new;
    }

    /// Begins a look into the queue. Returns the part of `reach` that could ever have
    /// room here, and how many jobs to look for: at least one, since room may be
    /// reserved for it.
    pub(super) fn within(&mut self, reach: &Reach) -> (Reach, usize) {
        self.sweep_is_new = false;
        self.waiting.values_mut().for_each(|is_new| *is_new = false);
        let mut reach = reach.clone();
        reach
            .tasks
            .retain(|name, _| self.gpus_of(name) <= self.gpus);
        (reach, self.free_slots().max(1))
    }

    fn free_slots(&self) -> usize {
        self.capacity.slots.saturating_sub(self.running.len())
    }

    /// How many jobs fit.
    fn fit(&self, subscription: &str, task: &str, free_gpus: usize) -> usize {
        self.free_slots()
            .min(self.free_share_of(subscription))
            .min(self.free_share_for(task))
            .min(self.by_gpus(task, free_gpus))
    }

    /// How many jobs fit without delaying an older one: they take nothing that is
    /// reserved for it, or should be over in time.
    fn fit_beside(&self, subscription: &str, task: &str, free_gpus: usize, now: Instant) -> usize {
        let mut fit = self.fit(subscription, task, free_gpus);
        if self
            .last_shares
            .get(subscription)
            .is_some_and(|of| of != task)
        {
            fit = fit.min(self.free_share_of(subscription).saturating_sub(1));
        }
        let Some(reserved) = &self.reserved else {
            return fit;
        };
        if fit == 0 || self.is_over_in_time(task, reserved, free_gpus, now) {
            return fit;
        }
        let spare_gpus = free_gpus.saturating_sub(self.gpus_of(&reserved.task));
        fit.min(self.free_slots() - 1)
            .min(self.by_gpus(task, spare_gpus))
    }

    fn by_gpus(&self, task: &str, free_gpus: usize) -> usize {
        match self.gpus_of(task) {
            0 => usize::MAX,
            gpus => free_gpus / gpus,
        }
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

    /// Whether room may be reserved for a job that does not fit: it lacks only slots
    /// or GPUs, and these will come free.
    fn may_reserve(&self, job: &DueJob, free_gpus: usize, now: Instant) -> bool {
        self.reserved.is_none()
            && self.rests_until.is_none_or(|until| until <= now)
            && self.free_share_of(&job.key.subscription) > 0
            && self.can_come_free(&job.task, free_gpus)
    }

    /// Whether the GPUs that a job of the task needs are free or will be. A run that
    /// cannot be ended keeps its GPUs when its room is freed; these do not count.
    fn can_come_free(&self, task: &str, free_gpus: usize) -> bool {
        let running = self.running.values();
        let taken: usize = running.map(|r| self.gpus_of(&r.task)).sum();
        self.gpus_of(task) <= free_gpus + taken
    }

    fn reserve(&mut self, job: &DueJob, free_gpus: usize, now: Instant) {
        let begins_in = self.begins_in(self.gpus_of(&job.task), free_gpus, now);
        self.reserved = Some(Reserved {
            key: job.key.clone(),
            task: job.task.clone(),
            since: now,
            by: now + begins_in.unwrap_or(self.capacity.reserve_after / SHORT),
        });
    }

    fn end_reservation(&mut self, now: Instant) {
        if let Some(ended) = self.reserved.take() {
            let share = self.gpus_of(&ended.task) as f64 / self.gpus.max(1) as f64;
            let idle = now.duration_since(ended.since).mul_f64(share);
            self.rests_until = Some(now + idle * REST);
        }
    }

    /// Whether a job of the task should be over before the reserved job can begin.
    fn is_over_in_time(
        &self,
        task: &str,
        reserved: &Reserved,
        free_gpus: usize,
        now: Instant,
    ) -> bool {
        let Some(takes) = self.run_times.get(task).and_then(RunTime::mean) else {
            return false;
        };
        let needed = self.gpus_of(&reserved.task);
        let begins_in = self.begins_in(needed, free_gpus, now);
        now + takes <= reserved.by && begins_in.is_none_or(|begins_in| takes <= begins_in)
    }

    /// How long until a job that needs a slot and `needed` GPUs can begin, if the
    /// running jobs take as long as earlier ones of their tasks. None if too little is
    /// known.
    fn begins_in(&self, needed: usize, free_gpus: usize, now: Instant) -> Option<Duration> {
        let mut ends: Vec<(Duration, usize)> = self
            .running
            .values()
            .filter_map(|running| {
                let mean = self.run_times.get(&running.task)?.mean()?;
                let ran = now.duration_since(running.since.unwrap_or(now));
                Some((mean.saturating_sub(ran), self.gpus_of(&running.task)))
            })
            .collect();
        ends.sort();
        let (mut slots, mut gpus) = (self.free_slots(), free_gpus);
        let mut begins_in = Duration::ZERO;
        let mut ends = ends.into_iter();
        while slots == 0 || gpus < needed {
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
