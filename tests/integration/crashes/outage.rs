//! Runs that end while the database is away for longer than their leases.

use std::time::Duration;

use serde_json::json;
use sqlx::{Connection, PgConnection};
use trainyard::record::{Job, JobState};

use super::{FAST, Scene, Settings};
use crate::support::database::Database;
use crate::support::eventually;
use crate::support::proxy::LossyProxy;
use crate::support::runs::RunEvent;
use crate::support::worker::WorkerProcess;

const SETTINGS: Settings = Settings {
    slots: 10,
    // Long enough for the pause in which a worker can renew after the outage, before another
    // one takes over.
    lease: "20s",
    ack: "before_run",
    ..FAST
};
/// Longer than a pause between two sweeps.
const A_SWEEP: Duration = Duration::from_secs(2);

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn jobs_that_end_during_an_outage_are_not_run_again() {
    jobs_that_end_during_an_outage_have_succeeded(&["worker"], &SETTINGS).await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn jobs_with_one_attempt_that_end_during_an_outage_are_not_dead() {
    let settings = Settings {
        slots: 5,
        task: "max_attempts = 1",
        ..SETTINGS
    };
    jobs_that_end_during_an_outage_have_succeeded(&["one", "other"], &settings).await;
}

async fn jobs_that_end_during_an_outage_have_succeeded(workers: &[&str], settings: &Settings) {
    let Some(database) = Database::postgres().await else {
        return;
    };
    let proxy = LossyProxy::in_front_of(&database.url).await;
    let behind = Database::at(proxy.url.clone());
    let scene = Scene::reached_by(&database, &behind, settings).await;
    let start = |name: &&str| scene.start_worker(name);
    let workers: Vec<WorkerProcess> = workers.iter().map(start).collect();
    let how_many = workers.len() * settings.slots;
    let requests = (0..how_many).map(|_| scene.runs.waiting("all", json!({})));
    scene.publish_all(requests.collect()).await;
    scene.runs_have_started(how_many).await;
    // The early acks have arrived.
    scene.nothing_is_left_to_deliver().await;

    proxy.take_away();
    scene.runs.release("all");
    scene.runs_have_come_to(RunEvent::End, how_many).await;
    every_lease_has_ended(&database, A_SWEEP).await;
    proxy.bring_back();

    let jobs = scene.all_end(how_many).await;
    for worker in workers {
        assert!(worker.stop().await.success());
    }
    let of = |state| jobs.iter().filter(|job| job.state == state).count();
    let again = |job: &&Job| job.attempts > 1;
    let figures = (
        of(JobState::Succeeded),
        of(JobState::Dead),
        jobs.iter().filter(again).count(),
        scene.runs.of(RunEvent::Start).len(),
    );
    assert_eq!(
        figures,
        (how_many, 0, 0, how_many),
        "jobs that succeeded, are dead, were attempted again; runs"
    );
    assert_eq!(scene.failed_deliveries(), 0);
}

/// Waits until all leases expired this long ago.
async fn every_lease_has_ended(database: &Database, ago: Duration) {
    let mut connection = PgConnection::connect(&database.url).await.unwrap();
    eventually("every lease has ended", async || {
        let left: i64 = sqlx::query_scalar(
            "SELECT count(*) FROM leases WHERE lease_until > now() - make_interval(secs => $1)",
        )
        .bind(ago.as_secs_f64())
        .fetch_one(&mut connection)
        .await
        .unwrap();
        (left == 0).then_some(())
    })
    .await;
}
