//! What a worker asks Pub/Sub for: no more than it has room for.

use std::collections::BTreeSet;
use std::ops::RangeInclusive;
use std::sync::Arc;

use serde_json::json;
use trainyard::record::{Job, JobFilter, JobState};
use trainyard::store::Store;

use crate::support::broker::Broker;
use crate::support::database::Database;
use crate::support::runs::{RunEvent, RunsLog};
use crate::support::scene::{CALM, Scene, Settings};
use crate::support::worker::Yard;
use crate::support::{eventually, once_still};

/// Holding a delivery for long does not fail it, however slow the machine is.
const PATIENT: Settings = Settings {
    ack_deadline: "60s",
    ..CALM
};

const SUBSCRIPTIONS: [&str; 5] = ["one", "two", "three", "four", "five"];

/// A broker, a database and workers with five subscriptions.
struct FiveSubscriptions {
    broker: Broker,
    store: Arc<dyn Store>,
    yard: Yard,
    runs: RunsLog,
}

impl FiveSubscriptions {
    /// None without Postgres. The last subscription has no dead-letter policy.
    async fn on_postgres(slots: usize) -> Option<Self> {
        let database = Database::postgres().await?;
        let broker = Broker::builtin().await?;
        let policy = broker.dead_letter_policy().await;
        for name in &SUBSCRIPTIONS[..4] {
            let wanted = broker.wanted(name, name).await;
            let wanted = wanted.set_dead_letter_policy(policy.clone());
            broker.make(wanted).await;
        }
        broker.subscribe(SUBSCRIPTIONS[4]).await;
        let sections =
            SUBSCRIPTIONS.map(|name| format!("[subscriptions.{name}]\nack_deadline = \"60s\"\n"));
        let sections = format!(
            "[worker]\nslots = {slots}\nlease = \"60s\"\n{}[tasks.rehearsal]\nbuiltin = \"rehearsal\"\n",
            sections.concat()
        );
        let yard = Yard::new(&broker, &database, &sections);
        Some(Self {
            store: database.open_migrated().await,
            runs: RunsLog::in_folder(yard.folder.path()),
            broker,
            yard,
        })
    }

    /// Publishes this many runs to each subscription.
    async fn publish(&self, each: usize, seconds: f64) {
        for name in SUBSCRIPTIONS {
            let requests = (0..each).map(|_| self.runs.request(seconds));
            self.broker.publish_all(name, requests.collect()).await;
        }
    }

    async fn nothing_is_left_to_deliver(&self) {
        eventually("no message is left", async || {
            let mut backlogs = SUBSCRIPTIONS.iter().map(|name| self.broker.backlog(name));
            backlogs.all(|backlog| backlog == 0).then_some(())
        })
        .await;
    }

    async fn jobs(&self) -> Vec<Job> {
        let filter = JobFilter {
            limit: 1000,
            ..JobFilter::default()
        };
        self.store.jobs(&filter).await.unwrap()
    }
}

/// Without admission, a message that arrives while the only slot runs a message of
/// another subscription would be handed back, by each worker in turn.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn busy_workers_with_many_subscriptions_hand_no_message_back() {
    const EACH: usize = 4;
    // Longer than a worker would keep a message that it has no slot for.
    const SECONDS: f64 = 1.2;
    let Some(scene) = FiveSubscriptions::on_postgres(1).await else {
        return;
    };
    let workers = ["first", "second"].map(|name| scene.yard.start_worker(name));
    scene.publish(EACH, SECONDS).await;
    // Each message is acknowledged, or given up by the broker.
    scene.nothing_is_left_to_deliver().await;
    let failed = SUBSCRIPTIONS.map(|name| scene.broker.failed_deliveries(name));
    let jobs = scene.jobs().await;
    let done = |job: &&Job| job.state == JobState::Succeeded && job.attempts == 1;
    let done = jobs.iter().filter(done).count();
    assert_eq!(
        (scene.broker.given_up(), failed, done),
        (0, [0; 5], SUBSCRIPTIONS.len() * EACH),
        "given up by the broker, failed deliveries, jobs that succeeded"
    );
    let pids: BTreeSet<u32> = scene.runs.lines().iter().map(|line| line.pid).collect();
    assert_eq!(pids.len(), 2, "both workers ran some");
    for worker in workers {
        assert!(worker.stop().await.success());
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn an_idle_worker_has_few_connections_to_pubsub() {
    let Some(scene) = FiveSubscriptions::on_postgres(4).await else {
        return;
    };
    let worker = scene.yard.start_worker("worker");
    // Once its message is done, each subscription has been pulled.
    scene.publish(1, 0.0).await;
    scene.nothing_is_left_to_deliver().await;
    let port = scene.broker.port();
    let connections = once_still(|| worker.connections_to(port)).await;
    assert!((1..=3).contains(&connections), "{connections} connections");
    assert!(worker.stop().await.success());
}

/// How many jobs wait at one worker by default.
const MAX_WAITING: usize = 500;
/// More than `MAX_WAITING`, and more than are kept for a while.
const MANY: usize = 720;

/// The only task has no room for another job.
const FULL: Settings = Settings {
    slots: 9,
    task: "concurrency = 8",
    ..PATIENT
};

/// As [`FULL`], but another task has room, and any message may be for it.
const ONE_FULL: Settings = Settings {
    task: "concurrency = 8\n[tasks.spare]\nbuiltin = \"rehearsal\"",
    ..FULL
};

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn nothing_is_asked_for_while_no_task_has_room_with_before_run() {
    let settings = Settings {
        ack: "before_run",
        ..FULL
    };
    a_worker_takes(0..=FULL.slots, 60, &settings).await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn nothing_is_asked_for_while_no_task_has_room_with_after_run() {
    a_worker_takes(0..=FULL.slots, MANY, &FULL).await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn what_waits_at_a_worker_is_bounded_with_before_run() {
    let settings = Settings {
        ack: "before_run",
        ..ONE_FULL
    };
    a_worker_takes(0..=MAX_WAITING + FULL.slots, MANY, &settings).await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn what_waits_at_a_worker_is_bounded_with_after_run() {
    a_worker_takes(0..=MAX_WAITING + FULL.slots, MANY, &ONE_FULL).await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn max_waiting_bounds_what_waits_at_a_worker() {
    let settings = Settings {
        ack: "before_run",
        subscription: "max_waiting = 20",
        ..ONE_FULL
    };
    // It does ask for more than it can run.
    a_worker_takes(FULL.slots + 1..=20 + FULL.slots, 100, &settings).await;
}

/// While jobs run for as long as they like, a worker takes `expected` of the messages.
/// All run in the end, and none is redelivered.
async fn a_worker_takes(expected: RangeInclusive<usize>, published: usize, settings: &Settings) {
    let Some(scene) = Scene::on_postgres(settings).await else {
        return;
    };
    scene.yard.config_is_good().await;
    let worker = scene.yard.start_worker("worker");
    let requests = (0..published).map(|_| scene.runs.waiting("all", json!({})));
    scene.publish_all(requests.collect()).await;
    scene.runs_have_started(8).await;
    eventually("the least is taken", async || {
        (scene.taken(published) >= *expected.start()).then_some(())
    })
    .await;
    let figures = || (scene.taken(published), scene.failed_deliveries());
    let (taken, failed) = once_still(figures).await;
    assert_eq!(scene.runs.of(RunEvent::Start).len(), 8);
    assert!(
        expected.contains(&taken) && failed == 0,
        "{taken} of {published} messages were taken, {failed} deliveries failed"
    );
    scene.runs.release("all");
    let jobs = scene.all_succeed(published).await;
    scene.nothing_is_left_to_deliver().await;
    assert!(jobs.iter().all(|job| job.attempts == 1), "{jobs:#?}");
    assert_eq!(scene.failed_deliveries(), 0);
    assert!(worker.stop().await.success());
}
