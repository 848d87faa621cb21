//! Jobs whose task has been taken out of every worker's configuration.

use std::time::Duration;

use serde_json::json;
use trainyard::record::JobState;

use crate::support::database::Database;
use crate::support::eventually;
use crate::support::scene::{FAST, Scene};
use crate::support::worker::Yard;

/// A worker that serves the scene's subscription, and does not know the task.
const WITHOUT_THE_TASK: &str = "[worker]\nunknown_task_patience = \"1s\"\n[subscriptions.training]\n[tasks.other]\nbuiltin = \"rehearsal\"\n";

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_lost_job_of_a_task_that_no_worker_knows_any_more_is_said_to_wait_and_given_up() {
    let Some(database) = Database::postgres().await else {
        return;
    };
    let scene = Scene::new(&database, &FAST).await;
    let mut killed = scene.start_worker("killed");
    let id = scene.publish(scene.runs.waiting("job", json!({}))).await;
    scene.runs_have_started(1).await;
    let tables = database.tables().await;
    eventually("it has said what it knows", async || {
        let known = tables.fetch::<(String,)>("SELECT task FROM known_tasks".to_owned());
        known.await.pop()
    })
    .await;
    killed.kill().await;
    // As if that had been some time ago.
    let then = tables.ago(Duration::from_secs(60));
    let known = format!("UPDATE known_tasks SET known_until = {then}");
    assert_eq!(tables.execute(known).await, 1);
    let lost = format!("UPDATE leases SET lease_until = {then}, reap_delay = 0");
    assert_eq!(tables.execute(lost).await, 1);

    let later = Yard::new(&scene.broker, &database, WITHOUT_THE_TASK);
    let listed = later.output(&["jobs", "list"]).await.stdout;
    let says = "a worker that knows its task; none does now";
    assert!(listed.contains(&format!("waits for {says}")), "{listed}");
    let explained = later.output(&["explain", &id]).await.stdout;
    assert!(
        explained.contains(&format!("waits for: {says}")),
        "{explained}"
    );
    let checked = later.output(&["config", "check"]).await.stdout;
    let says = "training: 1 job waits for a worker that knows the task `rehearsal`";
    assert!(checked.contains(says), "{checked}");
    // The configuration that has the task only lacks a worker.
    let checked = scene.yard.output(&["config", "check"]).await.stdout;
    assert!(!checked.contains("1 job waits"), "{checked}");

    let worker = later.start_worker("later");
    let job = scene.only_job_ends(JobState::Dead).await;
    assert_eq!(job.reason.as_deref(), Some("unknown_task"));
    let error = job.error.unwrap();
    assert!(
        error.contains("`rehearsal` has been known for 1s"),
        "{error}"
    );
    scene.nothing_is_left_to_deliver().await;
    assert!(worker.stop().await.success());
}
