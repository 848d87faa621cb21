//! The database crashes under a running worker and comes back.

use super::checker::violations;
use super::{FAST, SUBSCRIPTION, Scene, Settings};
use crate::support::private_postgres::PrivatePostgres;
use crate::support::runs::RunEvent;

/// Longer than noticing and repairing a crash takes.
const LONG_LEASE: Settings = Settings {
    slots: 4,
    lease: "9s",
    ..FAST
};

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn nothing_is_pulled_while_the_database_is_away() {
    let Some(postgres) = PrivatePostgres::start() else {
        return;
    };
    let database = postgres.database();
    let scene = Scene::new(&database, &database, &LONG_LEASE).await;
    let worker = scene.yard.start_worker("worker");
    scene.publish_run(7.0).await;
    scene.runs_have_started(1).await;

    postgres.crash();
    worker.says("the database is away").await;
    assert_eq!(scene.runs.of(RunEvent::End), [], "the run goes on");
    for _ in 0..10 {
        scene.publish_run(0.0).await;
    }
    // Slots are free, so only the outage can keep jobs from starting.
    tokio::time::sleep(std::time::Duration::from_secs(2)).await;
    assert_eq!(scene.runs.of(RunEvent::Start).len(), 1, "nothing new began");
    assert_eq!(scene.broker.backlog(SUBSCRIPTION), 11, "nothing was acked");
    let pulled = worker.log().matches("the delivery is handed back").count();
    assert_eq!(pulled, 0, "nothing was pulled");

    postgres.start_again();
    worker.says("the database is back").await;
    every_job_ends_once(&scene, 11).await;
    assert!(worker.stop().await.success());
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_run_that_cannot_be_renewed_stops_and_runs_again() {
    let Some(postgres) = PrivatePostgres::start() else {
        return;
    };
    let database = postgres.database();
    let scene = Scene::new(&database, &database, &FAST).await;
    let worker = scene.yard.start_worker("worker");
    scene.publish_run(5.0).await;
    scene.runs_have_started(1).await;

    postgres.crash();
    worker.says("the lease is lost").await;
    assert_eq!(scene.runs.of(RunEvent::Stopped).len(), 1);

    postgres.start_again();
    every_job_ends_once(&scene, 1).await;
    assert!(worker.stop().await.success());
}

/// Each job ends once, and no run begins before the previous one is over.
async fn every_job_ends_once(scene: &Scene, how_many: usize) {
    let jobs = scene.all_succeed(how_many).await;
    scene.nothing_is_left_to_deliver().await;
    // A run that was given back costs no attempt, only its number, so the numbers come
    // from the runs.
    let lines = scene.runs.lines();
    let last_attempt = |job| {
        let of_job = lines.iter().filter(|line| line.job == job);
        of_job.map(|line| line.attempt).max().unwrap()
    };
    let attempts: Vec<_> = jobs
        .iter()
        .map(|job| (job.id, last_attempt(job.id)))
        .collect();
    let wrong = violations(&lines, &[], &attempts);
    assert!(wrong.is_empty(), "{wrong:#?}");
    assert_eq!(scene.runs.of(RunEvent::End).len(), how_many);
}
