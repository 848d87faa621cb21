//! `jobs cancel` and `jobs retry`.

use serde_json::json;
use trainyard::record::JobState;

use crate::on_both_databases;
use crate::support::database::Database;
use crate::support::eventually;
use crate::support::runs::RunEvent;
use crate::support::scene::{PATIENT, Scene, Settings};

on_both_databases!(
    a_running_job_is_cancelled_on_whichever_worker_it_runs,
    a_waiting_job_is_cancelled_at_once,
    an_ended_job_runs_again_as_a_new_attempt,
    what_cannot_be_cancelled_or_run_again_is_told,
);

async fn a_running_job_is_cancelled_on_whichever_worker_it_runs(database: Database) {
    for ack in ["before_run", "after_run"] {
        let settings = Settings {
            slots: 1,
            ack,
            ..PATIENT
        };
        let scene = Scene::new(&database, &settings).await;
        let _workers = [scene.start_worker("w1"), scene.start_worker("w2")];
        let mut ids = Vec::new();
        let mut jobs = Vec::new();
        for _ in 0..2 {
            let id = scene.publish_rehearsal(json!({"seconds": 3600})).await;
            jobs.push(scene.job(&id, JobState::Running).await);
            ids.push(id);
        }
        assert_ne!(jobs[0].worker, jobs[1].worker);
        for job in &jobs {
            let told = scene
                .command(&["jobs", "cancel", &job.id.to_string()])
                .await;
            assert!(told.stdout.contains("within seconds"), "{}", told.stdout);
        }
        for id in &ids {
            scene.job(id, JobState::Cancelled).await;
        }
        assert_eq!(scene.runs.of(RunEvent::Stopped).len(), 2, "{ack}");
        scene.nothing_is_left_to_deliver().await;
        let story = ["claimed", "cancel_requested", "finished", "cancelled"];
        scene.is_explained_by(&ids[0], &story).await;
    }
}

async fn a_waiting_job_is_cancelled_at_once(database: Database) {
    let scene = Scene::new(&database, &PATIENT).await;
    let _worker = scene.start_worker("w1");
    // Waits for a worker that knows its task.
    let request = json!({"name": "newer"}).to_string();
    let waiting = scene.broker.publish("training", request).await;
    let job = scene.job(&waiting, JobState::Waiting).await;
    let told = scene.command(&["jobs", "show", &job.id.to_string()]).await;
    assert!(
        told.stdout.contains("a worker that knows its task"),
        "{}",
        told.stdout
    );
    let told = scene
        .command(&["jobs", "cancel", &job.id.to_string()])
        .await;
    assert!(told.stdout.contains("is cancelled"), "{}", told.stdout);
    let job = scene.store.job(job.id).await.unwrap().unwrap();
    assert_eq!((job.state, job.attempts), (JobState::Cancelled, 0));
    scene.nothing_is_left_to_deliver().await;
}

async fn an_ended_job_runs_again_as_a_new_attempt(database: Database) {
    let scene = Scene::new(&database, &PATIENT).await;
    let _worker = scene.start_worker("w1");
    let fields = json!({"fail": "permanent", "fail_attempts": 1});
    let id = scene.publish_rehearsal(fields).await;
    let dead = scene.job(&id, JobState::Dead).await;
    for attempt in 2..=3 {
        let told = scene
            .command(&["jobs", "retry", &dead.id.to_string()])
            .await;
        assert!(told.stdout.contains("runs again"), "{}", told.stderr);
        eventually("it has run again", async || {
            (scene.runs.of(RunEvent::End).len() == attempt).then_some(())
        })
        .await;
        let job = scene.job(&id, JobState::Succeeded).await;
        assert_eq!((job.id, job.error), (dead.id, None));
    }
    let attempts: Vec<u32> = scene
        .runs
        .of(RunEvent::End)
        .iter()
        .map(|l| l.attempt)
        .collect();
    assert_eq!(attempts, [1, 2, 3]);
}

async fn what_cannot_be_cancelled_or_run_again_is_told(database: Database) {
    let scene = Scene::new(&database, &PATIENT).await;
    let _worker = scene.start_worker("w1");
    let done = scene.publish_rehearsal(json!({})).await;
    let done = scene.job(&done, JobState::Succeeded).await.id.to_string();
    let bad = scene.broker.publish("training", b"[]".to_vec()).await;
    let bad = scene.job(&bad, JobState::Dead).await.id.to_string();
    let running = scene.publish_rehearsal(json!({"seconds": 3600})).await;
    let running = scene.job(&running, JobState::Running).await.id.to_string();
    let nobody = "00000000-0000-7000-8000-000000000000";
    for (arguments, says) in [
        (["jobs", "cancel", &*done], "its state is succeeded"),
        (["jobs", "cancel", nobody], "there is no job"),
        (["jobs", "retry", nobody], "there is no job"),
        (["jobs", "retry", &*bad], "names no task"),
        (["jobs", "retry", &*running], "is running"),
    ] {
        let output = scene.command(&arguments).await;
        assert_eq!(output.code, 1, "{arguments:?}");
        assert!(output.stderr.contains(says), "{}", output.stderr);
    }
}
