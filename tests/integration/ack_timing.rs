//! When a message is acked, and who brings an interrupted job back.

use nix::sys::signal::Signal;
use serde_json::json;
use trainyard::record::JobState;

use crate::on_both_databases;
use crate::support::database::Database;
use crate::support::eventually;
use crate::support::scene::{PATIENT, SUBSCRIPTION, Scene, Settings};

on_both_databases!(
    before_run_acks_while_the_job_runs,
    after_run_acks_the_messages_of_ended_jobs_only,
    an_interrupted_run_moves_at_no_cost_if_its_message_is_acked,
    an_interrupted_run_moves_at_no_cost_with_its_message,
    a_draining_worker_pulls_no_more,
);

const BEFORE_RUN: &str = "before_run";
const AFTER_RUN: &str = "after_run";

/// Longer than any test waits.
const FOR_EVER: f64 = 3600.0;

async fn scene(database: &Database, ack: &'static str, slots: usize) -> Scene {
    let settings = Settings {
        slots,
        ack,
        ..PATIENT
    };
    Scene::new(database, &settings).await
}

async fn publish(scene: &Scene, seconds: f64) -> String {
    scene.publish_rehearsal(json!({"seconds": seconds})).await
}

async fn before_run_acks_while_the_job_runs(database: Database) {
    let scene = scene(&database, BEFORE_RUN, 1).await;
    let worker = scene.start_worker("w1");
    let id = publish(&scene, FOR_EVER).await;
    scene.nothing_is_left_to_deliver().await;
    scene.job(&id, JobState::Running).await;
    assert_eq!(worker.stop().await.code(), Some(0));
}

async fn after_run_acks_the_messages_of_ended_jobs_only(database: Database) {
    let scene = scene(&database, AFTER_RUN, 2).await;
    let worker = scene.start_worker("w1");
    let long = publish(&scene, FOR_EVER).await;
    scene.job(&long, JobState::Running).await;
    // This one starts and ends while the first one runs.
    let short = publish(&scene, 0.0).await;
    scene.job(&short, JobState::Succeeded).await;
    eventually("only the running job's message is left", async || {
        (scene.broker.backlog(SUBSCRIPTION) == 1).then_some(())
    })
    .await;
    assert_eq!(worker.stop().await.code(), Some(0));
    assert_eq!(scene.broker.backlog(SUBSCRIPTION), 1);
}

async fn an_interrupted_run_moves_at_no_cost_if_its_message_is_acked(database: Database) {
    let scene = scene(&database, BEFORE_RUN, 1).await;
    an_interrupted_run_moves_at_no_cost(&scene, 0).await;
}

async fn an_interrupted_run_moves_at_no_cost_with_its_message(database: Database) {
    let scene = scene(&database, AFTER_RUN, 1).await;
    an_interrupted_run_moves_at_no_cost(&scene, 1).await;
}

/// `unacked`: how many messages the broker has while the job runs.
async fn an_interrupted_run_moves_at_no_cost(scene: &Scene, unacked: usize) {
    let first = scene.start_worker("first");
    let id = publish(scene, FOR_EVER).await;
    let interrupted = scene.job(&id, JobState::Running).await;
    eventually("the message is acked as early as it can be", async || {
        (scene.broker.backlog(SUBSCRIPTION) == unacked).then_some(())
    })
    .await;
    let second = scene.start_worker("second");
    assert_eq!(first.stop().await.code(), Some(0));
    let moved = eventually("the second worker runs it", async || {
        let job = scene.store.job(interrupted.id).await.unwrap().unwrap();
        (job.state == JobState::Running && job.worker != interrupted.worker).then_some(job)
    })
    .await;
    assert_eq!(moved.attempts, 1);
    assert_eq!(scene.broker.backlog(SUBSCRIPTION), unacked);
    assert_eq!(second.stop().await.code(), Some(0));
}

async fn a_draining_worker_pulls_no_more(database: Database) {
    let scene = scene(&database, AFTER_RUN, 2).await;
    let patient = [("TRAINYARD__WORKER__SHUTDOWN_GRACE", "1h")];
    let draining = scene.start_worker_with("draining", &patient);
    let long = publish(&scene, FOR_EVER).await;
    let long = scene.job(&long, JobState::Running).await;
    draining.signal(Signal::SIGTERM);
    draining.says("pulling has stopped").await;
    let other = scene.start_worker("other");
    let short = publish(&scene, 0.0).await;
    let short = scene.job(&short, JobState::Succeeded).await;
    assert_ne!(short.worker, long.worker);
    assert_eq!(other.stop().await.code(), Some(0));
}
