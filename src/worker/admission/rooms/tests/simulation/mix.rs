//! The resources of a worker, and the jobs that come.

use std::fmt;
use std::time::Duration;

use crate::job::JobKey;
use crate::worker::admission::{Capacity, SubscriptionCapacity, TaskCapacity};

/// Only the second one may have a limit.
pub(super) const SUBSCRIPTIONS: [&str; 2] = ["first", "second"];

/// How many jobs a random mix has.
const JOBS: usize = 200;

pub(super) struct Mix {
    pub(super) slots: usize,
    pub(super) gpus: usize,
    /// How many jobs of the second subscription may run side by side.
    pub(super) limit: Option<usize>,
    pub(super) reserve_after: Duration,
    /// Whenever a sweep is due, messages arrive before it.
    pub(super) arrivals_come_first: bool,
    pub(super) tasks: Vec<Task>,
    pub(super) jobs: Vec<Job>,
}

#[derive(Debug)]
pub(super) struct Task {
    pub(super) name: String,
    pub(super) gpus: usize,
    /// The mean run time of its jobs, in seconds.
    mean: f64,
    /// If false, the run times are exponentially distributed.
    take_the_same: bool,
    /// Its share of the jobs, compared with the weights of the other tasks.
    weight: f64,
}

pub(super) struct Job {
    pub(super) key: JobKey,
    pub(super) subscription: usize,
    pub(super) task: usize,
    pub(super) comes_after: Duration,
    pub(super) takes: Duration,
    /// If false, another worker puts it in the queue.
    pub(super) is_pulled: bool,
}

impl Mix {
    pub(super) fn of(slots: usize, gpus: usize, tasks: Vec<Task>, jobs: Vec<Job>) -> Self {
        Self {
            slots,
            gpus,
            limit: None,
            reserve_after: Duration::ZERO,
            arrivals_come_first: false,
            tasks,
            jobs,
        }
    }

    /// Loads the worker with 0.5 to 1.5 times the work that it can do.
    pub(super) fn random(random: &mut fastrand::Rng) -> Self {
        let gpus = random.usize(2..=8);
        let slots = random.usize(gpus / 2 + 1..=2 * gpus);
        let tasks = (0..random.usize(2..=5)).map(|nth| Task::random(random, nth, gpus));
        let mut mix = Self::of(slots, gpus, tasks.collect(), Vec::new());
        mix.limit = random.bool().then(|| random.usize(1..=slots));
        mix.reserve_after = Duration::from_secs([0, 5, 30, 100][random.usize(..4)]);
        mix.arrivals_come_first = random.bool();
        let between = mix.work_of_a_job() / (0.5 + random.f64());
        let mut now = 0.0;
        for number in 0..JOBS {
            now += exponential(random, between);
            let task = mix.pick(random);
            mix.jobs.push(Job {
                comes_after: Duration::from_secs_f64(now),
                takes: mix.tasks[task].run_time(random),
                is_pulled: random.u8(..4) > 0,
                ..Job::of(random.usize(..2), number, task)
            });
        }
        mix
    }

    /// The mean work of a job, in seconds of the whole worker.
    fn work_of_a_job(&self) -> f64 {
        let weights: f64 = self.tasks.iter().map(|task| task.weight).sum();
        let parts = self.tasks.iter().map(|task| {
            let of_gpus = task.gpus as f64 / self.gpus as f64;
            let part = of_gpus.max(1.0 / self.slots as f64);
            task.weight / weights * task.mean * part
        });
        parts.sum()
    }

    fn pick(&self, random: &mut fastrand::Rng) -> usize {
        let weights: f64 = self.tasks.iter().map(|task| task.weight).sum();
        let mut pick = random.f64() * weights;
        let picked = self.tasks.iter().position(|task| {
            pick -= task.weight;
            pick < 0.0
        });
        picked.unwrap_or(0)
    }

    pub(super) fn capacity(&self, reserve_after: Duration) -> Capacity {
        let limits = [None, self.limit];
        let subscriptions = SUBSCRIPTIONS.iter().zip(limits).map(|(name, concurrency)| {
            let capacity = SubscriptionCapacity {
                concurrency,
                max_waiting: 50,
            };
            ((*name).to_owned(), capacity)
        });
        let tasks = self.tasks.iter().map(|task| {
            let capacity = TaskCapacity {
                concurrency: None,
                gpus: task.gpus,
            };
            (task.name.clone(), capacity)
        });
        Capacity {
            slots: self.slots,
            subscriptions: subscriptions.collect(),
            tasks: tasks.collect(),
            reserve_after,
        }
    }

    pub(super) fn longest_run(&self) -> Duration {
        self.jobs.iter().map(|job| job.takes).max().unwrap()
    }
}

impl Task {
    pub(super) fn of(name: &str, gpus: usize) -> Self {
        Self {
            name: name.to_owned(),
            gpus,
            mean: 0.0,
            take_the_same: true,
            weight: 1.0,
        }
    }

    /// The first task needs one GPU, the second several.
    fn random(random: &mut fastrand::Rng, nth: usize, gpus: usize) -> Self {
        let gpus = match nth {
            0 => 1,
            1 => random.usize(2..=gpus),
            _ => random.usize(0..=gpus),
        };
        Self {
            mean: 100_f64.powf(random.f64()),
            take_the_same: random.bool(),
            weight: (0.02 + random.f64()) / gpus.max(1) as f64,
            ..Self::of(&format!("task-{nth}"), gpus)
        }
    }

    fn run_time(&self, random: &mut fastrand::Rng) -> Duration {
        Duration::from_secs_f64(match self.take_the_same {
            true => self.mean,
            false => exponential(random, self.mean),
        })
    }
}

impl Job {
    /// A job that is there from the start, and is pulled.
    pub(super) fn pulled(number: usize, task: usize, seconds: u64) -> Self {
        Self {
            takes: Duration::from_secs(seconds),
            ..Self::of(0, number, task)
        }
    }

    fn of(subscription: usize, number: usize, task: usize) -> Self {
        Self {
            key: JobKey::new(SUBSCRIPTIONS[subscription], &number.to_string()),
            subscription,
            task,
            comes_after: Duration::ZERO,
            takes: Duration::ZERO,
            is_pulled: true,
        }
    }
}

fn exponential(random: &mut fastrand::Rng, mean: f64) -> f64 {
    -mean * (1.0 - random.f64()).ln()
}

/// Leaves out the jobs.
impl fmt::Debug for Mix {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Mix")
            .field("slots", &self.slots)
            .field("gpus", &self.gpus)
            .field("limit", &self.limit)
            .field("reserve_after", &self.reserve_after)
            .field("arrivals_come_first", &self.arrivals_come_first)
            .field("tasks", &self.tasks)
            .finish()
    }
}
