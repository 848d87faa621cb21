//! Plays the sweeper and the pullers, event by event.

use std::collections::VecDeque;
use std::time::Duration;

use tokio::time::Instant;

use super::mix::{Job, Mix, SUBSCRIPTIONS};
use crate::job::DueJob;
use crate::store::{Reach, TaskTerms};
use crate::worker::admission::rooms::Rooms;

/// The longest time between sweeps.
pub(super) const PAUSE: Duration = Duration::from_secs(3);

pub(super) struct Worker<'a> {
    mix: &'a Mix,
    start: Instant,
    now: Instant,
    next_sweep: Instant,
    rooms: Rooms,
    reach: Reach,
    free_gpus: usize,
    to_come: VecDeque<&'a Job>,
    /// Messages that nobody has pulled, by subscription.
    backlogs: [VecDeque<&'a Job>; SUBSCRIPTIONS.len()],
    /// Oldest first.
    queue: Vec<Waiting<'a>>,
    running: Vec<Running<'a>>,
    /// The oldest job that waits, and the time since which it has been the oldest and
    /// has waited for `reserve_after`.
    oldest: Option<(&'a Job, Instant)>,
    pub(super) begun: Vec<&'a Job>,
    pub(super) longest_wait: Duration,
    pub(super) longest_reservation: Duration,
    /// GPUs times seconds.
    pub(super) gpus_kept_idle: f64,
}

struct Waiting<'a> {
    job: &'a Job,
    since: Instant,
}

struct Running<'a> {
    job: &'a Job,
    id: u64,
    ends: Instant,
}

impl<'a> Worker<'a> {
    pub(super) fn new(mix: &'a Mix, reserve_after: Duration) -> Self {
        let now = Instant::now();
        let terms = TaskTerms {
            max_attempts: 1,
            acked_when_claimed: false,
        };
        let subscriptions = SUBSCRIPTIONS.map(|name| (name.to_owned(), None));
        let tasks = mix.tasks.iter().map(|task| (task.name.clone(), terms));
        Self {
            mix,
            start: now,
            now,
            next_sweep: now,
            rooms: Rooms::new(mix.capacity(reserve_after), mix.gpus),
            reach: Reach {
                subscriptions: subscriptions.into(),
                tasks: tasks.collect(),
            },
            free_gpus: mix.gpus,
            to_come: mix.jobs.iter().collect(),
            backlogs: [const { VecDeque::new() }; SUBSCRIPTIONS.len()],
            queue: Vec::new(),
            running: Vec::new(),
            oldest: None,
            begun: Vec::new(),
            longest_wait: Duration::ZERO,
            longest_reservation: Duration::ZERO,
            gpus_kept_idle: 0.0,
        }
    }

    /// The time since the start.
    pub(super) fn took(&self) -> Duration {
        self.now - self.start
    }

    /// Runs until all jobs have ended.
    pub(super) fn run(&mut self) {
        while self.begun.len() < self.mix.jobs.len() || !self.running.is_empty() {
            let comes = self.to_come.front().map(|job| self.start + job.comes_after);
            let ends = self.running.iter().map(|running| running.ends).min();
            // A sweep of an empty queue would find nothing.
            let sweeps = (!self.queue.is_empty()).then_some(self.next_sweep.max(self.now));
            let next = [comes, ends, sweeps].into_iter().flatten().min().unwrap();
            self.pass_time_until(next);
            if comes == Some(next) {
                self.let_one_come();
            } else if ends == Some(next) {
                self.end_one();
            } else {
                self.sweep();
            }
            self.sweep_if_due();
            self.pull();
            self.see_which_is_the_oldest();
        }
    }

    fn pass_time_until(&mut self, next: Instant) {
        if let Some(reserved) = &self.rooms.reserved {
            let idle = self.free_gpus.min(self.rooms.gpus_of(&reserved.task));
            self.gpus_kept_idle += idle as f64 * (next - self.now).as_secs_f64();
        }
        self.now = next;
    }

    fn let_one_come(&mut self) {
        let job = self.to_come.pop_front().unwrap();
        match job.is_pulled {
            true => self.backlogs[job.subscription].push_back(job),
            false => self.put_in_the_queue(job),
        }
    }

    fn put_in_the_queue(&mut self, job: &'a Job) {
        let since = self.now;
        self.queue.push(Waiting { job, since });
    }

    fn end_one(&mut self) {
        let ended = self.running.iter().position(|r| r.ends == self.now);
        let ended = self.running.swap_remove(ended.unwrap());
        self.free_gpus += self.mix.tasks[ended.job.task].gpus;
        self.rooms.leave(ended.id, self.free_gpus, self.now);
        if self.mix.arrivals_come_first && self.rooms.is_sweep_due() {
            let first = self.backlogs.each_mut().map(VecDeque::pop_front);
            for job in first.into_iter().flatten() {
                self.let_arrive(job);
            }
        }
    }

    fn pull(&mut self) {
        for (nth, subscription) in SUBSCRIPTIONS.into_iter().enumerate() {
            while !self.backlogs[nth].is_empty() && self.could_begin(subscription) {
                let job = self.backlogs[nth].pop_front().unwrap();
                self.let_arrive(job);
                self.sweep_if_due();
            }
        }
    }

    fn could_begin(&self, subscription: &str) -> bool {
        let most = self
            .rooms
            .could_begin(subscription, self.free_gpus, self.now);
        most > 0
    }

    fn let_arrive(&mut self, job: &'a Job) {
        let task = &self.mix.tasks[job.task].name;
        let id = self.rooms.admit(&job.key, task, self.free_gpus, self.now);
        if let Some(id) = id {
            return self.begin(job, id);
        }
        self.put_in_the_queue(job);
        let subscription = SUBSCRIPTIONS[job.subscription];
        self.rooms.hold(subscription);
        self.rooms.queued(subscription, self.free_gpus, self.now);
    }

    fn begin(&mut self, job: &'a Job, id: u64) {
        let gpus = self.mix.tasks[job.task].gpus;
        self.free_gpus = self.free_gpus.checked_sub(gpus).unwrap();
        self.rooms.begin(id, self.now);
        let ends = self.now + job.takes;
        self.running.push(Running { job, id, ends });
        assert!(self.running.len() <= self.mix.slots);
        if let Some((oldest, since)) = self.oldest
            && oldest.key == job.key
        {
            let waited = self.now.duration_since(since);
            self.longest_wait = self.longest_wait.max(waited);
        }
        self.begun.push(job);
    }

    fn sweep_if_due(&mut self) {
        while self.rooms.is_sweep_due() {
            self.sweep();
        }
    }

    fn sweep(&mut self) {
        while self.take_what_fits() {}
        self.rooms.swept();
        self.next_sweep = self.now + PAUSE;
    }

    fn take_what_fits(&mut self) -> bool {
        let (reach, limit) = self.rooms.within(&self.reach);
        let due = self.due(&reach, limit);
        if let Some(reserved) = &self.rooms.reserved {
            let stands = self.now - reserved.since;
            self.longest_reservation = self.longest_reservation.max(stands);
        }
        let admitted = self.rooms.admit_due(&due, self.free_gpus, self.now);
        for (nth, id) in &admitted {
            let key = &due[*nth].key;
            let taken = self
                .queue
                .iter()
                .position(|waiting| waiting.job.key == *key);
            let Waiting { job, .. } = self.queue.remove(taken.unwrap());
            if job.is_pulled {
                self.rooms.let_go(SUBSCRIPTIONS[job.subscription]);
            }
            self.begin(job, *id);
        }
        !admitted.is_empty()
    }

    /// At most `limit` jobs of each subscription and task, oldest first.
    fn due(&self, reach: &Reach, limit: usize) -> Vec<DueJob> {
        let mut found = vec![[0; SUBSCRIPTIONS.len()]; self.mix.tasks.len()];
        let mut due = Vec::new();
        for Waiting { job, since } in &self.queue {
            let task = &self.mix.tasks[job.task].name;
            let found = &mut found[job.task][job.subscription];
            if *found < limit && reach.tasks.contains_key(task) {
                *found += 1;
                due.push(DueJob {
                    key: job.key.clone(),
                    task: task.clone(),
                    waited: self.now - *since,
                    is_lost: false,
                });
            }
        }
        due
    }

    fn see_which_is_the_oldest(&mut self) {
        let Some(Waiting { job, since }) = self.queue.first() else {
            self.oldest = None;
            return;
        };
        if self.oldest.is_none_or(|(oldest, _)| oldest.key != job.key) {
            let long_enough = *since + self.mix.reserve_after;
            self.oldest = Some((job, long_enough.max(self.now)));
        }
    }
}
