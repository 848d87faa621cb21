//! A worker that freezes for longer than its lease, and then goes on.

use nix::sys::signal::Signal;
use serde_json::json;
use trainyard::record::JobState;

use super::{FAST, Scene, Settings, start_heir};
use crate::support::eventually;
use crate::support::runs::RunEvent;
use crate::support::worker::WorkerProcess;

const SETTINGS: Settings = Settings {
    // One that a slow worker can renew too, until it is frozen.
    lease: "6s",
    ack: "before_run",
    ..FAST
};

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_worker_thawed_during_another_ones_run_stops_its_own() {
    let Some(scene) = Scene::on_postgres(&SETTINGS).await else {
        return;
    };
    let (frozen, heir) = freeze_until_taken_over(&scene).await;
    frozen.signal(Signal::SIGCONT);
    it_says_that_it_changed_nothing(&frozen).await;
    scene.runs.release("job");
    only_the_heirs_ending_counts(&scene, &frozen, &heir).await;
    // Its run was stopped: only the heir's run ended.
    assert_eq!(scene.runs.of(RunEvent::End).len(), 1);
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_worker_thawed_after_another_ones_run_changes_nothing() {
    let Some(scene) = Scene::on_postgres(&SETTINGS).await else {
        return;
    };
    let (frozen, heir) = freeze_until_taken_over(&scene).await;
    scene.runs.release("job");
    scene.only_job_ends(JobState::Succeeded).await;
    frozen.signal(Signal::SIGCONT);
    it_says_that_it_changed_nothing(&frozen).await;
    only_the_heirs_ending_counts(&scene, &frozen, &heir).await;
}

async fn freeze_until_taken_over(scene: &Scene) -> (WorkerProcess, WorkerProcess) {
    let frozen = scene.start_worker("frozen");
    scene.publish(scene.runs.waiting("job", json!({}))).await;
    scene.runs_have_started(1).await;
    // The early ack must have arrived, or the broker redelivers too.
    scene.nothing_is_left_to_deliver().await;
    frozen.signal(Signal::SIGSTOP);
    let heir = start_heir(scene, "heir");
    scene.runs_have_started(2).await;
    (frozen, heir)
}

async fn it_says_that_it_changed_nothing(frozen: &WorkerProcess) {
    eventually(
        "the thawed worker says that it lost its lease",
        async || {
            let log = frozen.log();
            let lost = log.contains("another worker has taken the job over");
            (lost && log.contains("0 rows")).then_some(())
        },
    )
    .await;
}

async fn only_the_heirs_ending_counts(scene: &Scene, frozen: &WorkerProcess, heir: &WorkerProcess) {
    let job = scene.only_job_ends(JobState::Succeeded).await;
    assert_eq!(job.attempts, 2);
    let worker = job.worker.clone().unwrap();
    assert!(worker.contains(&heir.pid().to_string()), "{worker}");
    let story = scene.store.stories(&job.message_id).await.unwrap();
    let endings: Vec<_> = story[0]
        .ledger
        .iter()
        .filter(|entry| entry.kind == "finished")
        .collect();
    assert_eq!(endings.len(), 1, "{endings:?}");
    assert_eq!(endings[0].worker, worker);
    assert_ne!(frozen.pid(), heir.pid());
    scene.nothing_is_left_to_deliver().await;
}
