//! A rollout of a new version under load.

use std::collections::{BTreeSet, HashMap};

use google_cloud_pubsub::model::Subscription;
use serde_json::json;
use trainyard::record::Job;
use uuid::Uuid;

use super::{SUBSCRIPTION, Scene, Settings};
use crate::support::broker::Broker;
use crate::support::database::Database;
use crate::support::runs::RunEvent;
use crate::support::scene::CALM;
use crate::support::seeded;
use crate::support::worker::WorkerProcess;

const JOBS: usize = 1000;
/// Every this many jobs, one is long enough to be interrupted.
const LONG_EVERY: usize = 25;
const WORKERS: usize = 3;
/// How often each worker is replaced.
const ROUNDS: usize = 3;
const RESTARTS: usize = WORKERS * ROUNDS;

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_rolling_restart_costs_nothing_where_messages_are_acked_early() {
    a_rolling_restart_costs_nothing("before_run").await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_rolling_restart_costs_nothing_where_messages_are_acked_late() {
    a_rolling_restart_costs_nothing("after_run").await;
}

async fn a_rolling_restart_costs_nothing(ack: &'static str) {
    let settings = Settings {
        slots: 4,
        // No longer than the stop grace, so that runs are interrupted.
        shutdown_grace: "500ms",
        ack,
        ..CALM
    };
    let Some(scene) = scene(&settings).await else {
        return;
    };
    let published = scene.publish_all(requests(&scene)).await;
    let mut workers: Vec<WorkerProcess> = (0..WORKERS)
        .map(|number| scene.start_worker(&format!("worker-{number}")))
        .collect();
    for restart in 0..RESTARTS {
        // Spread over all the work.
        scene
            .runs_have_started((restart + 1) * JOBS / (RESTARTS + 2))
            .await;
        let replaced = workers.remove(0);
        assert!(replaced.stop().await.success());
        let name = format!("worker-{}", WORKERS + restart);
        workers.push(scene.start_worker(&name));
    }
    let jobs = scene.all_succeed(JOBS).await;
    scene.nothing_is_left_to_deliver().await;
    for worker in workers {
        assert!(worker.stop().await.success());
    }
    check(&scene, &jobs, &published);
}

/// A stopping worker hands back its messages, and any restart may hit the same message;
/// still no restart costs it more than one delivery.
async fn scene(settings: &Settings) -> Option<Scene> {
    let database = Database::postgres().await?;
    let broker = Broker::builtin().await?;
    let deliveries = i32::try_from(RESTARTS + 1).unwrap();
    let policy = broker.dead_letter_policy().await;
    let policy = policy.set_max_delivery_attempts(deliveries);
    let subscription = Subscription::new().set_dead_letter_policy(policy);
    broker.subscribe_like(SUBSCRIPTION, subscription).await;
    Some(Scene::set(broker, SUBSCRIPTION, &database, &database, settings).await)
}

fn requests(scene: &Scene) -> Vec<String> {
    let mut random = seeded();
    let seconds = (0..JOBS).map(|number| match number % LONG_EVERY {
        0 => 2.0,
        _ => f64::from(random.u32(10..=50)) / 1000.0,
    });
    seconds
        .map(|seconds| scene.runs.rehearsal(json!({"seconds": seconds})))
        .collect()
}

fn check(scene: &Scene, jobs: &[Job], published: &[String]) {
    let on_record: BTreeSet<&String> = jobs.iter().map(|job| &job.message_id).collect();
    assert_eq!(on_record, published.iter().collect(), "no message is lost");
    let burnt: Vec<&Job> = jobs.iter().filter(|job| job.attempts != 1).collect();
    assert!(burnt.is_empty(), "{burnt:#?}");
    let mut ends: HashMap<Uuid, usize> = HashMap::new();
    for line in scene.runs.of(RunEvent::End) {
        *ends.entry(line.job).or_default() += 1;
    }
    assert_eq!(ends.len(), jobs.len());
    assert!(ends.values().all(|times| *times == 1), "{ends:#?}");
    let interrupted = scene.runs.of(RunEvent::Stopped).len();
    println!("{} jobs, {interrupted} runs were interrupted", jobs.len());
    assert!(interrupted > 0, "no restart interrupted a run");
}
