//! Many messages, many copies, and workers that are killed again and again.

use std::collections::BTreeSet;

use sqlx::{Connection, PgConnection};
use trainyard::record::Job;
use uuid::Uuid;

use super::checker::violations;
use super::{FAST, SUBSCRIPTION, Scene, Settings};
use crate::support::database::Database;
use crate::support::runs::RunEvent;
use crate::support::seeded;
use crate::support::worker::{Death, WorkerProcess};

const MESSAGES_PER_WAVE: usize = 250;
/// How many runs of a wave have begun when a worker is killed.
const RUNS_BEFORE_A_KILL: usize = 50;
const WORKERS: usize = 3;

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn killed_workers_lose_no_message_and_end_none_twice() {
    if let Some(database) = Database::postgres().await {
        kill_workers_in_waves(&database, 8).await;
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn killed_workers_behind_a_pooler_lose_no_message_and_end_none_twice() {
    if let Some(database) = Database::behind_a_pooler().await {
        kill_workers_in_waves(&database, 3).await;
    }
}

async fn kill_workers_in_waves(database: &Database, waves: usize) {
    let settings = Settings {
        slots: 24,
        // Even a busy machine lets a worker renew, and stop its runs, within these times.
        lease: "9s",
        stop_grace: "3s",
        // No job may be parked, however often its worker is killed.
        max_crashes: 100,
        ..FAST
    };
    let scene = Scene::new(database, &settings).await;
    let mut random = seeded();
    let mut workers: Vec<WorkerProcess> = (0..WORKERS)
        .map(|number| scene.start_worker(&format!("worker-{number}")))
        .collect();
    let mut published = Vec::new();
    let mut deaths = Vec::new();
    for wave in 0..waves {
        published.extend(publish_wave(&scene, &mut random).await);
        scene
            .runs_have_started(wave * MESSAGES_PER_WAVE + RUNS_BEFORE_A_KILL)
            .await;
        let victim = workers.len() - WORKERS;
        deaths.push(workers[victim].kill().await);
        // Dead workers stay in the list, so that a failure shows their logs.
        let name = format!("worker-{}", workers.len());
        workers.push(scene.start_worker(&name));
    }
    let jobs = scene.all_succeed(published.len()).await;
    scene.nothing_is_left_to_deliver().await;
    check(&scene, &jobs, &published, &deaths);
    assert_eq!(endings_on_record(database).await, jobs.len());
}

/// Publishes short runs concurrently; each message is delivered up to three times.
async fn publish_wave(scene: &Scene, random: &mut fastrand::Rng) -> Vec<String> {
    let requests = (0..MESSAGES_PER_WAVE)
        .map(|_| scene.runs.request(f64::from(random.u32(5..=20)) / 1000.0))
        .collect();
    let ids = scene.broker.publish_all(SUBSCRIPTION, requests).await;
    let mut again: Vec<String> = ids
        .iter()
        .flat_map(|id| std::iter::repeat_n(id.clone(), random.usize(0..=2)))
        .collect();
    random.shuffle(&mut again);
    scene.broker.deliver_again(SUBSCRIPTION, &again).await;
    ids
}

fn check(scene: &Scene, jobs: &[Job], published: &[String], deaths: &[Death]) {
    let on_record: BTreeSet<&String> = jobs.iter().map(|job| &job.message_id).collect();
    assert_eq!(on_record, published.iter().collect());
    let attempts: Vec<(Uuid, u32)> = jobs.iter().map(|job| (job.id, job.attempts)).collect();
    let lines = scene.runs.lines();
    let wrong = violations(&lines, deaths, &attempts);
    assert!(wrong.is_empty(), "{wrong:#?}");
    let starts = scene.runs.of(RunEvent::Start).len();
    let duplicates: u32 = jobs.iter().map(|job| job.duplicates).sum();
    let again = jobs.iter().filter(|job| job.attempts > 1).count();
    println!(
        "{} jobs, {starts} runs, {again} jobs taken over, {duplicates} duplicates, {} kills",
        jobs.len(),
        deaths.len()
    );
    assert!(duplicates > 0, "no message was delivered twice");
}

/// How many endings were written. Checks that no job has two.
async fn endings_on_record(database: &Database) -> usize {
    let mut connection = PgConnection::connect(&database.direct_url).await.unwrap();
    let counts: Vec<i64> = sqlx::query_scalar(
        "SELECT count(*) FROM ledger WHERE kind = 'finished' GROUP BY subscription, key",
    )
    .fetch_all(&mut connection)
    .await
    .unwrap();
    assert!(counts.iter().all(|count| *count == 1));
    counts.len()
}
