//! The database crashes under a running worker and comes back.

use serde_json::json;

use super::checker::violations;
use super::{FAST, SUBSCRIPTION, Scene, Settings};
use crate::support::private_postgres::PrivatePostgres;
use crate::support::runs::RunEvent;
use crate::support::scene::CALM;
use crate::support::{eventually, once_still};

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn nothing_is_pulled_while_the_database_is_away() {
    let Some(postgres) = PrivatePostgres::start() else {
        return;
    };
    let database = postgres.database();
    let settings = Settings { slots: 4, ..CALM };
    let scene = Scene::new(&database, &settings).await;
    let worker = scene.start_worker("worker");
    scene.publish(scene.runs.waiting("first", json!({}))).await;
    scene.runs_have_started(1).await;

    postgres.crash();
    worker.says("the database is away").await;
    for _ in 0..10 {
        scene.publish_run(0.0).await;
    }
    // Slots are free, so only the outage keeps messages from coming. One may still come on
    // the stream that listened when the outage was noticed.
    let pulled = once_still(|| scene.broker.outstanding(SUBSCRIPTION)).await;
    assert!((1..=2).contains(&pulled), "{pulled} messages are here");
    assert_eq!(scene.runs.lines().len(), 1, "one run goes on, none began");
    assert_eq!(scene.broker.backlog(SUBSCRIPTION), 11, "nothing was acked");

    postgres.start_again();
    worker.says("the database is back").await;
    scene.runs.release("first");
    every_job_ends_once(&scene, 11).await;
    assert!(worker.stop().await.success());
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_run_that_cannot_be_renewed_stops_and_runs_again() {
    let Some(postgres) = PrivatePostgres::start() else {
        return;
    };
    let database = postgres.database();
    let settings = Settings {
        lease: "9s",
        ..FAST
    };
    let scene = Scene::new(&database, &settings).await;
    // A run on a slow machine has time to say that it stops.
    let stop_grace = [("TRAINYARD__WORKER__STOP_GRACE", "3s")];
    let worker = scene.start_worker_with("worker", &stop_grace);
    scene.publish(scene.runs.waiting("job", json!({}))).await;
    scene.runs_have_started(1).await;

    postgres.crash();
    eventually("the run is stopped", async || {
        (scene.runs.of(RunEvent::Stopped).len() == 1).then_some(())
    })
    .await;

    postgres.start_again();
    scene.runs_have_started(2).await;
    scene.runs.release("job");
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
