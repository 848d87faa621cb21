mod reservations;
mod simulation;
mod sweeps;

use super::*;
use crate::store::TaskTerms;
use crate::worker::admission::{SubscriptionCapacity, TaskCapacity};

const RESERVE_AFTER: Duration = Duration::from_secs(30);
const LONG: u64 = 30;

/// Rooms with GPUs and a clock. A task's name ends with how many GPUs it needs.
/// At most two jobs of subscription `few` and one of task `one-1` run side by side.
struct Bench {
    rooms: Rooms,
    now: Instant,
    free_gpus: usize,
    running: BTreeMap<String, (u64, usize)>,
}

const TASKS: [&str; 6] = ["cpu-0", "one-1", "a-1", "b-1", "a-2", "a-9"];

impl Bench {
    fn with(slots: usize, gpus: usize) -> Self {
        let subscription = |concurrency| SubscriptionCapacity {
            concurrency,
            max_waiting: 3,
        };
        let tasks = TASKS.map(|name| {
            let capacity = TaskCapacity {
                concurrency: (name == "one-1").then_some(1),
                gpus: gpus_of(name),
            };
            (name.to_owned(), capacity)
        });
        let capacity = Capacity {
            slots,
            subscriptions: BTreeMap::from([
                ("jobs".to_owned(), subscription(None)),
                ("few".to_owned(), subscription(Some(2))),
            ]),
            tasks: tasks.into(),
            reserve_after: RESERVE_AFTER,
        };
        Self {
            rooms: Rooms::new(capacity, gpus),
            now: Instant::now(),
            free_gpus: gpus,
            running: BTreeMap::new(),
        }
    }

    fn pass(&mut self, seconds: u64) {
        self.now += Duration::from_secs(seconds);
    }

    /// A job arrives. Returns whether it begins.
    fn arrives(&mut self, job: &str, task: &str) -> bool {
        let id = self.rooms.admit(&key(job), task, self.free_gpus, self.now);
        if let Some(id) = id {
            self.begin(job, task, id);
        }
        id.is_some()
    }

    fn begin(&mut self, job: &str, task: &str, id: u64) {
        self.free_gpus -= gpus_of(task);
        self.rooms.begin(id, self.now);
        self.running.insert(job.to_owned(), (id, gpus_of(task)));
    }

    fn ends(&mut self, job: &str) {
        let (id, gpus) = self.running.remove(job).unwrap();
        self.free_gpus += gpus;
        self.rooms.leave(id, self.free_gpus, self.now);
    }

    /// Sweeps with one look into the queue. `due` has jobs, their tasks, and for how
    /// many seconds they have waited. Returns the jobs that begin.
    fn sweep<'a>(&mut self, due: &[(&'a str, &str, u64)]) -> Vec<&'a str> {
        self.look();
        let begun = self.find(due);
        self.rooms.swept();
        begun
    }

    fn look(&mut self) -> (Reach, usize) {
        let terms = TaskTerms {
            max_attempts: 1,
            acked_when_claimed: false,
        };
        let reach = Reach {
            subscriptions: [("jobs".to_owned(), None), ("few".to_owned(), None)].into(),
            tasks: TASKS.map(|name| (name.to_owned(), terms)).into(),
        };
        self.rooms.within(&reach)
    }

    fn find<'a>(&mut self, due: &[(&'a str, &str, u64)]) -> Vec<&'a str> {
        let found: Vec<DueJob> = due
            .iter()
            .map(|(job, task, waited)| DueJob {
                key: key(job),
                task: (*task).to_owned(),
                waited: Duration::from_secs(*waited),
                is_lost: false,
            })
            .collect();
        let admitted = self.rooms.admit_due(&found, self.free_gpus, self.now);
        let begun = admitted.into_iter().map(|(nth, id)| {
            let (job, task, _) = due[nth];
            self.begin(job, task, id);
            job
        });
        begun.collect()
    }

    fn could_begin(&self, subscription: &str) -> usize {
        self.rooms
            .could_begin(subscription, self.free_gpus, self.now)
    }

    /// Runs enough jobs of the task that its run time is known from now on.
    fn learn(&mut self, task: &str, seconds: u64) {
        for _ in 0..3 {
            assert!(self.arrives("seen before", task));
            self.pass(seconds);
            self.ends("seen before");
        }
    }
}

/// The subscription is before the slash; without a slash it is `jobs`.
fn key(job: &str) -> JobKey {
    let (subscription, key) = job.split_once('/').unwrap_or(("jobs", job));
    JobKey::new(subscription, key)
}

fn gpus_of(task: &str) -> usize {
    task.rsplit('-').next().unwrap().parse().unwrap()
}

#[test]
fn a_slot_comes_free_when_its_job_leaves() {
    let mut bench = Bench::with(1, 0);
    assert!(bench.arrives("first", "cpu-0"));
    assert!(!bench.arrives("second", "cpu-0"));
    assert_eq!(bench.could_begin("jobs"), 0);
    bench.ends("first");
    assert_eq!(bench.could_begin("jobs"), 1);
    assert!(bench.arrives("second", "cpu-0"));
    assert_eq!(bench.rooms.running(), 1);
}

#[test]
fn a_subscription_at_its_limit_leaves_slots_to_the_others() {
    let mut bench = Bench::with(4, 0);
    assert_eq!(bench.could_begin("few"), 2);
    assert!(bench.arrives("few/1", "cpu-0"));
    assert!(bench.arrives("few/2", "cpu-0"));
    assert!(!bench.arrives("few/3", "cpu-0"));
    assert_eq!(bench.could_begin("few"), 0);
    assert_eq!(bench.could_begin("jobs"), 2);
    assert!(bench.arrives("other", "cpu-0"));
}

#[test]
fn a_task_at_its_limit_leaves_slots_to_the_others() {
    let mut bench = Bench::with(4, 4);
    assert!(bench.arrives("first", "one-1"));
    assert!(!bench.arrives("second", "one-1"));
    assert!(bench.arrives("other", "a-1"));
    bench.ends("first");
    assert!(bench.arrives("second", "one-1"));
}

#[test]
fn a_job_begins_only_with_all_its_gpus() {
    let mut bench = Bench::with(4, 2);
    assert!(bench.arrives("single", "a-1"));
    assert!(!bench.arrives("pair", "a-2"));
    assert!(bench.arrives("without", "cpu-0"));
    bench.ends("single");
    assert!(bench.arrives("pair", "a-2"));
}

#[test]
fn a_job_that_needs_more_gpus_than_there_are_is_not_looked_for() {
    let mut bench = Bench::with(4, 2);
    let (reach, limit) = bench.look();
    assert_eq!(limit, 4);
    assert!(reach.tasks.contains_key("a-2"));
    assert!(!reach.tasks.contains_key("a-9"));
}

#[test]
fn nothing_could_begin_while_the_only_task_is_full() {
    let mut bench = Bench::with(4, 4);
    let tasks = &mut bench.rooms.capacity.tasks;
    tasks.retain(|name, _| name == "one-1");
    assert_eq!(bench.could_begin("jobs"), 1);
    assert!(bench.arrives("first", "one-1"));
    assert_eq!(bench.could_begin("jobs"), 0);
    bench.ends("first");
    assert_eq!(bench.could_begin("jobs"), 1);
}

#[test]
fn what_could_begin_counts_tasks_together() {
    let mut bench = Bench::with(8, 4);
    let tasks = &mut bench.rooms.capacity.tasks;
    tasks.retain(|name, _| name == "one-1" || name == "a-2");
    // One job of `one-1`, and two of `a-2`.
    assert_eq!(bench.could_begin("jobs"), 3);
    assert_eq!(bench.could_begin("few"), 2);
}

#[test]
fn nothing_could_begin_while_the_places_for_held_deliveries_are_taken() {
    let mut bench = Bench::with(4, 0);
    for _ in 0..3 {
        assert!(bench.rooms.could_hold("few"));
        bench.rooms.hold("few");
    }
    assert!(!bench.rooms.could_hold("few"));
    assert_eq!(bench.could_begin("few"), 0);
    assert_eq!(bench.could_begin("jobs"), 4);
    bench.rooms.let_go("few");
    assert_eq!(bench.could_begin("few"), 2);
}
