//! The database crashes under a running worker and comes back.

use trainyard::job::JobState;

use super::checker::violations;
use super::{FAST, SUBSCRIPTION, Scene, Settings};
use crate::support::eventually;
use crate::support::private_postgres::PrivatePostgres;
use crate::support::runs::RunEvent;
use crate::support::worker::WorkerProcess;

const SETTINGS: Settings = Settings {
    slots: 4,
    lease: "6s",
    ..FAST
};

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_worker_outlives_a_crash_of_the_database() {
    let Some(postgres) = PrivatePostgres::start() else {
        return;
    };
    let database = postgres.database();
    let scene = Scene::new(&database, &database, &SETTINGS).await;
    let worker = scene.yard.start_worker("worker");
    scene.publish_run(4.0).await;
    scene.runs_have_started(1).await;

    postgres.crash();
    it_says(&worker, "the database is away").await;
    for _ in 0..10 {
        scene.publish_run(0.0).await;
    }
    // Slots are free; time is what is tested here.
    tokio::time::sleep(std::time::Duration::from_secs(2)).await;
    assert_eq!(scene.runs.of(RunEvent::Start).len(), 1, "nothing new began");
    assert_eq!(scene.broker.backlog(SUBSCRIPTION), 11, "nothing was acked");
    let pulled = worker.log().matches("the delivery is handed back").count();
    assert_eq!(pulled, 0, "nothing was pulled");

    postgres.start_again();
    it_says(&worker, "the database is back").await;
    let jobs = eventually("all jobs have succeeded", async || {
        let jobs = scene.jobs().await;
        let done = jobs.iter().all(|job| job.state == JobState::Succeeded);
        (done && jobs.len() == 11).then_some(jobs)
    })
    .await;
    scene.nothing_is_left_to_deliver().await;
    // Each ended once, and no run began before the one before it was over. A
    // run that was given back costs no attempt but its number, so the numbers
    // are read off the runs.
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
    assert_eq!(scene.runs.of(RunEvent::End).len(), 11);
    assert!(worker.stop().await.success());
}

async fn it_says(worker: &WorkerProcess, what: &str) {
    eventually(&format!("the worker says: {what}"), async || {
        worker.log().contains(what).then_some(())
    })
    .await;
}
