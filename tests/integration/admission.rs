//! What a worker asks Pub/Sub for: no more than it has room for.

use std::collections::BTreeSet;
use std::ops::RangeInclusive;

use serde_json::json;
use trainyard::record::{Job, JobState};

use crate::support::five_subscriptions::{FiveSubscriptions, SUBSCRIPTIONS};
use crate::support::runs::RunEvent;
use crate::support::scene::{CALM, Scene, Settings};
use crate::support::{eventually, once_still};

/// Holding a delivery for long does not fail it, however slow the machine is.
const PATIENT: Settings = Settings {
    ack_deadline: "60s",
    ..CALM
};

/// Without admission, a message that arrives while the only slot runs a message of
/// another subscription would be handed back, by each worker in turn.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn busy_workers_with_many_subscriptions_hand_no_message_back() {
    const EACH: usize = 4;
    // Longer than a worker would keep a message that it has no slot for.
    const SECONDS: f64 = 1.2;
    let Some(scene) = FiveSubscriptions::on_postgres(1, "60s", "60s").await else {
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
    let Some(scene) = FiveSubscriptions::on_postgres(4, "60s", "60s").await else {
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

const MESSAGES: usize = 60;

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
async fn nothing_is_asked_for_while_the_subscription_has_no_room() {
    let settings = Settings {
        slots: 2,
        ack: "before_run",
        subscription: "concurrency = 1",
        ..PATIENT
    };
    let Some(scene) = Scene::on_postgres(&settings).await else {
        return;
    };
    let first = scene.start_worker("first");
    let requests = (0..MESSAGES).map(|_| scene.runs.waiting("all", json!({})));
    scene.publish_all(requests.collect()).await;
    scene.runs_have_started(1).await;
    let taken = once_still(|| scene.taken(MESSAGES)).await;
    assert!(taken <= settings.slots, "{taken} messages were taken");

    // The others are for another worker.
    let second = scene.start_worker("second");
    let running = scene.runs_have_started(2).await;
    assert_ne!(running[0].pid, running[1].pid);
    let taken = once_still(|| scene.taken(MESSAGES)).await;
    assert!(taken <= 2 * settings.slots, "{taken} messages were taken");
    scene.runs.release("all");
    let jobs = scene.all_succeed(MESSAGES).await;
    assert!(jobs.iter().all(|job| job.attempts == 1), "{jobs:#?}");
    assert_eq!(scene.failed_deliveries(), 0);
    for worker in [first, second] {
        assert!(worker.stop().await.success());
    }
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

/// Parts of the statements.
const A_SWEEP: &str = "AS due\nORDER BY waited";
const A_LOOK: &str = "AS asked (subscription";

/// With a look for each of them, they would be many.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn deliveries_that_are_held_are_looked_at_together() {
    const HELD: usize = 100;
    const SWEEPS: usize = 6;
    let Some((proxy, scene)) = Scene::behind_a_proxy(&ONE_FULL).await else {
        return;
    };
    let worker = scene.start_worker("worker");
    let published = HELD + 8;
    let requests = (0..published).map(|_| scene.runs.waiting("all", json!({})));
    scene.publish_all(requests.collect()).await;
    eventually("all are taken", async || {
        (scene.taken(published) == published).then_some(())
    })
    .await;
    // A worker sweeps and looks about as often.
    let counts = || (proxy.executed(A_SWEEP), proxy.executed(A_LOOK));
    let (sweeps, looks) = counts();
    eventually("some sweeps", async || {
        (counts().0 >= sweeps + SWEEPS).then_some(())
    })
    .await;
    let looks = counts().1 - looks;
    assert!(
        (1..=4 * SWEEPS).contains(&looks),
        "{looks} looks beside {SWEEPS} sweeps"
    );
    scene.runs.release("all");
    scene.all_succeed(published).await;
    assert!(worker.stop().await.success());
}

/// While jobs run for as long as they like, a worker takes `expected` of the messages.
/// All run in the end, and hardly any is redelivered: on a busy machine a message may still
/// be on its way when its stream is closed.
async fn a_worker_takes(expected: RangeInclusive<usize>, published: usize, settings: &Settings) {
    let Some(scene) = Scene::on_postgres(settings).await else {
        return;
    };
    scene.yard.config_is_good().await;
    let worker = scene.start_worker("worker");
    let requests = (0..published).map(|_| scene.runs.waiting("all", json!({})));
    scene.publish_all(requests.collect()).await;
    scene.runs_have_started(8).await;
    eventually("the least is taken", async || {
        (scene.taken(published) >= *expected.start()).then_some(())
    })
    .await;
    let taken = once_still(|| scene.taken(published)).await;
    assert_eq!(scene.runs.of(RunEvent::Start).len(), 8);
    assert!(
        expected.contains(&taken),
        "{taken} of {published} messages were taken"
    );
    scene.runs.release("all");
    let jobs = scene.all_succeed(published).await;
    scene.nothing_is_left_to_deliver().await;
    assert!(jobs.iter().all(|job| job.attempts == 1), "{jobs:#?}");
    let failed = scene.failed_deliveries();
    let few = u64::try_from(published / 20).unwrap();
    assert!(failed <= few, "{failed} of {published} deliveries failed");
    assert!(worker.stop().await.success());
}
