//! A broker that misbehaves.

mod silencer;

use google_cloud_pubsub::model::Subscription;
use nix::sys::signal::Signal;
use trainyard_emulator::Faults;

use crate::support::broker::Broker;
use crate::support::database::Database;
use crate::support::runs::RunEvent;
use crate::support::scene::{CALM, SUBSCRIPTION, Scene, Settings};
use crate::support::seeded;
use crate::support::worker::WorkerProcess;
use silencer::Silencer;

const JOBS: usize = 200;
const FAULTS: &str =
    "duplicates=0.1,dropped-acks=0.05,resets=0.05:UNAVAILABLE,latency=0ms..50ms,out-of-order=0.2";

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn messages_acked_late_run_once_in_spite_of_faults() {
    let scene = messages_run_once_in_spite_of_faults("after_run", Subscription::new()).await;
    if let Some(scene) = scene {
        messages_were_duplicated_and_acks_dropped(&scene).await;
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn messages_acked_early_run_once_in_spite_of_faults() {
    let scene = messages_run_once_in_spite_of_faults("before_run", Subscription::new()).await;
    if let Some(scene) = scene {
        messages_were_duplicated_and_acks_dropped(&scene).await;
    }
}

/// Its messages are not duplicated, and the client sends a dropped ack again.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn exactly_once_subscriptions_messages_run_once_in_spite_of_faults() {
    let exactly_once = Subscription::new().set_enable_exactly_once_delivery(true);
    messages_run_once_in_spite_of_faults("after_run", exactly_once).await;
}

async fn messages_run_once_in_spite_of_faults(
    ack: &'static str,
    subscription: Subscription,
) -> Option<Scene> {
    let settings = Settings {
        slots: 4,
        ack,
        ..CALM
    };
    let scene = Scene::subscribed(subscription, &settings).await?;
    let mut random = seeded();
    scene.misbehaves(Faults {
        seed: Some(random.u64(..)),
        ..FAULTS.parse().unwrap()
    });
    let workers = ["one", "other"].map(|name| scene.start_worker(name));
    let requests = (0..JOBS).map(|_| scene.runs.request(f64::from(random.u32(0..=20)) / 1000.0));
    scene.publish_all(requests.collect()).await;
    let jobs = scene.all_succeed(JOBS).await;
    scene.nothing_is_left_to_deliver().await;
    let mut surplus = 0;
    for worker in workers {
        surplus += surplus_of(worker).await;
    }
    assert!(jobs.iter().all(|job| job.attempts == 1), "{jobs:#?}");
    assert_eq!(scene.runs.of(RunEvent::Start).len(), JOBS);
    assert_eq!(scene.runs.of(RunEvent::End).len(), JOBS);
    assert!(surplus > 0, "no stream was reset while a job ran");
    Some(scene)
}

/// Stops the worker, and reads how many messages came for which their stream had no room.
/// After a reset the client resumes the stream, and the broker sends one such message.
async fn surplus_of(worker: WorkerProcess) -> u64 {
    worker.signal(Signal::SIGTERM);
    worker.says("pulling has stopped").await;
    let log = worker.log();
    let (_, figures) = log.split_once("surplus: ").unwrap();
    let (surplus, _) = figures.split_once(',').unwrap();
    assert!(worker.stops().await.success());
    surplus.parse().unwrap()
}

async fn messages_were_duplicated_and_acks_dropped(scene: &Scene) {
    let jobs = scene.jobs().await;
    let duplicates: u32 = jobs.iter().map(|job| job.duplicates).sum();
    let dropped = scene.failed_deliveries();
    println!("{duplicates} duplicates of {JOBS} jobs, {dropped} acks were dropped");
    assert!(duplicates > 0 && dropped > 0, "no fault happened");
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_silent_stream_is_replaced_with_before_run() {
    a_silent_stream_is_replaced("before_run", 0).await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_silent_stream_is_replaced_with_prefetch() {
    a_silent_stream_is_replaced("after_run", 10).await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_silent_stream_is_replaced_with_after_run() {
    a_silent_stream_is_replaced("after_run", 0).await;
}

async fn a_silent_stream_is_replaced(ack: &'static str, prefetch: usize) {
    let settings = Settings {
        quiet_limit: "10s",
        ack,
        prefetch,
        ..CALM
    };
    let Some(scene) = Scene::on_postgres(&settings).await else {
        return;
    };
    let worker = scene.start_worker("worker");
    scene.publish_run(0.0).await;
    scene.all_succeed(1).await;
    scene.misbehaves("silence".parse().unwrap());
    let more = (0..5).map(|_| scene.runs.request(0.0)).collect();
    scene.publish_all(more).await;
    worker.says("a stream was quiet for too long").await;
    assert_eq!(scene.runs.of(RunEvent::Start).len(), 1, "nothing came");
    scene.misbehaves(Faults::default());
    let jobs = scene.all_succeed(6).await;
    scene.nothing_is_left_to_deliver().await;
    assert!(jobs.iter().all(|job| job.attempts == 1), "{jobs:#?}");
    assert_eq!(scene.runs.of(RunEvent::Start).len(), 6);
    assert!(worker.stop().await.success());
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_connection_that_died_without_a_sign_is_replaced() {
    let settings = Settings {
        quiet_limit: "10s",
        ..CALM
    };
    let Some(database) = Database::postgres().await else {
        return;
    };
    let mut broker = Broker::builtin().await.unwrap();
    broker.subscribe_with_policy(SUBSCRIPTION).await;
    let silencer = Silencer::in_front_of(&broker.host).await;
    broker.host.clone_from(&silencer.address);
    let scene = Scene::set(broker, SUBSCRIPTION, &database, &database, &settings).await;
    let worker = scene.start_worker("worker");
    scene.publish_run(0.0).await;
    scene.all_succeed(1).await;
    scene.nothing_is_left_to_deliver().await;
    silencer.silence_connections();
    let more = (0..5).map(|_| scene.runs.request(0.0)).collect();
    scene.publish_all(more).await;
    let jobs = scene.all_succeed(6).await;
    scene.nothing_is_left_to_deliver().await;
    assert!(jobs.iter().all(|job| job.attempts == 1), "{jobs:#?}");
    assert_eq!(scene.runs.of(RunEvent::Start).len(), 6);
    worker.says("a stream was quiet for too long").await;
    assert!(worker.stop().await.success());
}
