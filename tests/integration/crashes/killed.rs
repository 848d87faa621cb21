//! Workers killed in the middle of a run.

use serde_json::json;
use trainyard::record::JobState;

use super::{FAST, Scene, Settings, start_heir};
use crate::support::runs::RunEvent;

/// A lease that a slow worker can renew too, until it is killed.
const SETTINGS: Settings = Settings {
    lease: "6s",
    ..FAST
};

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_killed_workers_job_runs_again_where_the_message_was_acked_early() {
    let before_run = ["claimed", "acked", "taken_over", "finished"];
    a_killed_workers_job_runs_again("before_run", &before_run[..2], &before_run).await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_killed_workers_job_runs_again_where_the_message_is_acked_late() {
    let after_run = ["claimed", "taken_over", "finished", "acked"];
    a_killed_workers_job_runs_again("after_run", &after_run[..1], &after_run).await;
}

async fn a_killed_workers_job_runs_again(ack: &'static str, first: &[&str], whole: &[&str]) {
    let Some(scene) = Scene::on_postgres(&Settings { ack, ..SETTINGS }).await else {
        return;
    };
    let mut killed = scene.start_worker("killed");
    let id = scene.publish(scene.runs.waiting("job", json!({}))).await;
    scene.runs_have_started(1).await;
    scene.is_explained_by(&id, first).await;
    let death = killed.kill().await;
    scene.runs.release("job");

    let _heir = start_heir(&scene, "heir");
    let job = scene.only_job_ends(JobState::Succeeded).await;
    assert_eq!(job.attempts, 2);
    let ends = scene.runs.of(RunEvent::End);
    assert_eq!(ends.len(), 1, "{ends:?}");
    assert_ne!(ends[0].pid, death.pid);
    scene.is_explained_by(&id, whole).await;
    scene.nothing_is_left_to_deliver().await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_job_that_kills_its_workers_is_parked() {
    let settings = Settings {
        max_crashes: 2,
        ack: "before_run",
        ..SETTINGS
    };
    let Some(scene) = Scene::on_postgres(&settings).await else {
        return;
    };
    let id = scene.publish(scene.runs.waiting("job", json!({}))).await;
    for (name, runs) in [("first", 1), ("second", 2)] {
        let mut victim = scene.start_worker(name);
        scene.runs_have_started(runs).await;
        victim.kill().await;
    }
    let third = scene.start_worker("third");
    let job = scene.only_job_ends(JobState::Dead).await;
    assert_eq!(job.attempts, 2);
    let reason = job.error.unwrap();
    assert!(reason.contains("lost 2 times"), "{reason}");
    scene
        .is_explained_by(&id, &["claimed", "taken_over", "parked", "lost 2 times"])
        .await;
    // The first worker may have died before its early ack was sent; then the message is
    // redelivered and acked as a duplicate.
    scene.nothing_is_left_to_deliver().await;
    // A run that had begun would be interrupted by the stop, and log it.
    assert!(third.stop().await.success());
    assert_eq!(scene.runs.of(RunEvent::Start).len(), 2);
}
