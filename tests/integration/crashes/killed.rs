//! Workers killed in the middle of a run.

use trainyard::record::JobState;

use super::{FAST, Scene, Settings};
use crate::support::runs::RunEvent;

/// Long enough to be killed in, short enough to wait for.
const SECONDS: f64 = 2.0;
const UNTIL_KILLED: f64 = 600.0;

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
    let Some(scene) = Scene::on_postgres(&Settings { ack, ..FAST }).await else {
        return;
    };
    let mut killed = scene.yard.start_worker("killed");
    let id = scene.publish_run(SECONDS).await;
    scene.runs_have_started(1).await;
    scene.is_explained_by(&id, first).await;
    let death = killed.kill().await;
    assert_eq!(scene.runs.of(RunEvent::End), [], "it was killed too late");

    let _heir = scene.yard.start_worker("heir");
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
        ..FAST
    };
    let Some(scene) = Scene::on_postgres(&settings).await else {
        return;
    };
    let id = scene.publish_run(UNTIL_KILLED).await;
    let mut victims = Vec::new();
    for name in ["first", "second"] {
        let mut victim = scene.yard.start_worker(name);
        victims.push(name);
        scene.runs_have_started(victims.len()).await;
        victim.kill().await;
    }
    let third = scene.yard.start_worker("third");
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
