//! Jobs whose task has been taken out of every worker's configuration.

use std::time::{Duration, Instant};

use serde_json::json;
use trainyard::record::JobState;

use crate::on_both_databases;
use crate::support::database::Database;
use crate::support::eventually;
use crate::support::scene::{FAST, SUBSCRIPTION, Scene};
use crate::support::worker::Yard;

/// How long `known_until` is ahead when a worker writes it.
const KNOWN_FOR: Duration = Duration::from_secs(30);

/// A worker that serves the scene's subscription, and does not know the task.
const WITHOUT_THE_TASK: &str = "[worker]\nunknown_task_patience = \"1s\"\n[subscriptions.training]\n[tasks.other]\nbuiltin = \"rehearsal\"\n";

on_both_databases!(
    a_lost_job_of_a_task_that_no_worker_knows_any_more_is_said_to_wait_and_given_up,
    a_job_of_an_unknown_task_waits_anew_for_a_worker_that_has_just_started,
);

async fn a_lost_job_of_a_task_that_no_worker_knows_any_more_is_said_to_wait_and_given_up(
    database: Database,
) {
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
    // The configuration that has the task only lacks a worker, however it names the
    // subscription.
    let full = scene.broker.connection.subscription_path(SUBSCRIPTION);
    let full = format!("[subscriptions.{full:?}]\n[tasks.rehearsal]\nbuiltin = \"rehearsal\"\n");
    let full = Yard::new(&scene.broker, &database, &full);
    for yard in [&scene.yard, &full] {
        let checked = yard.output(&["config", "check"]).await.stdout;
        assert!(checked.contains("subscription "), "{checked}");
        assert!(!checked.contains("1 job waits"), "{checked}");
    }

    let started = Instant::now();
    let worker = later.start_worker("later");
    let job = scene.only_job_ends(JobState::Dead).await;
    // The worker that knew it may only have been away as long as this one.
    assert!(started.elapsed() >= KNOWN_FOR, "{:?}", started.elapsed());
    assert_eq!(job.reason.as_deref(), Some("unknown_task"));
    let error = job.error.unwrap();
    assert!(
        error.contains("`rehearsal` has been known for 1s"),
        "{error}"
    );
    scene.nothing_is_left_to_deliver().await;
    assert!(worker.stop().await.success());
}

/// As after a night without workers: the one that knows the task may start a little later.
async fn a_job_of_an_unknown_task_waits_anew_for_a_worker_that_has_just_started(
    database: Database,
) {
    let scene = Scene::new(&database, &FAST).await;
    let sections = WITHOUT_THE_TASK.replace("1s", "5s");
    let without = Yard::new(&scene.broker, &database, &sections);
    let recording = without.start_worker("recording");
    scene.publish(scene.runs.rehearsal(json!({}))).await;
    let tables = database.tables().await;
    eventually("it is on record", async || {
        let jobs = tables.fetch::<(String,)>("SELECT task FROM leases".to_owned());
        jobs.await.pop()
    })
    .await;
    assert!(recording.stop().await.success());
    let then = tables.ago(Duration::from_secs(60));
    let queued = format!("UPDATE leases SET queued_at = {then}");
    assert_eq!(tables.execute(queued).await, 1);

    let started = Instant::now();
    let worker = without.start_worker("later");
    let job = scene.only_job_ends(JobState::Dead).await;
    assert!(started.elapsed() >= Duration::from_secs(5));
    assert_eq!(job.reason.as_deref(), Some("unknown_task"));
    assert!(worker.stop().await.success());
}
