//! Workers are killed while several subscriptions compete for their only slot.

use trainyard::record::JobState;
use uuid::Uuid;

use super::checker::violations;
use crate::support::eventually;
use crate::support::five_subscriptions::{FiveSubscriptions, SUBSCRIPTIONS};
use crate::support::runs::RunEvent;
use crate::support::worker::WorkerProcess;

const EACH: usize = 3;
const KILLS: usize = 3;

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn killed_workers_lose_no_message_of_any_subscription() {
    let Some(scene) = FiveSubscriptions::on_postgres(1, "3s", "10s").await else {
        return;
    };
    let mut workers: Vec<WorkerProcess> = ["one", "other"]
        .map(|name| scene.yard.start_worker(name))
        .into();
    scene.publish(EACH, 0.3).await;
    let mut deaths = Vec::new();
    for kill in 0..KILLS {
        eventually("more runs have started", async || {
            (scene.runs.of(RunEvent::Start).len() > 2 * kill).then_some(())
        })
        .await;
        deaths.push(workers[kill].kill().await);
        // Dead workers stay in the list, so that a failure shows their logs.
        workers.push(scene.yard.start_worker(&format!("worker-{kill}")));
    }
    scene.nothing_is_left_to_deliver().await;
    let jobs = scene.jobs().await;
    let succeeded = jobs.iter().filter(|job| job.state == JobState::Succeeded);
    assert_eq!(
        (scene.broker.given_up(), succeeded.count()),
        (0, EACH * SUBSCRIPTIONS.len()),
        "given up by the broker, jobs that succeeded"
    );
    let attempts: Vec<(Uuid, u32)> = jobs.iter().map(|job| (job.id, job.attempts)).collect();
    let wrong = violations(&scene.runs.lines(), &deaths, &attempts);
    assert!(wrong.is_empty(), "{wrong:#?}");
}
