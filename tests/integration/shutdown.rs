//! What a stopping worker does with running jobs and with jobs that have not begun.

use std::time::Duration;

use nix::sys::signal::Signal;
use serde_json::{Value, json};
use trainyard::record::JobState;

use crate::support::eventually;
use crate::support::runs::{RunEvent, RunLine, micros_now};
use crate::support::scene::{CALM, SUBSCRIPTION, Scene, Settings};

/// Far longer than the two seconds that an idle machine takes, and far shorter than the
/// lease. Each test prints how long it took.
const BOUND: Duration = Duration::from_secs(30);

/// Runs are interrupted at the first signal.
const IMPATIENT: Settings = Settings {
    shutdown_grace: "500ms",
    ..CALM
};
/// Runs may go on after the first signal.
const PATIENT: Settings = Settings {
    shutdown_grace: "1h",
    ..CALM
};

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn an_interrupted_job_moves_at_once_with_before_run() {
    let settings = Settings {
        ack: "before_run",
        ..IMPATIENT
    };
    an_interrupted_job_moves_at_once(&settings, json!({}), 0).await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn an_interrupted_job_moves_at_once_with_its_checkpoint() {
    let settings = Settings {
        ack: "after_checkpoint",
        ..IMPATIENT
    };
    let more = json!({"checkpoint_after": 0});
    let moved = an_interrupted_job_moves_at_once(&settings, more, 0).await;
    if let Some(moved) = moved {
        let resumed_from = moved.resumed_from.as_deref();
        assert_eq!(resumed_from, Some("rehearsal of attempt 1"));
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn an_interrupted_job_moves_at_once_before_its_checkpoint() {
    let settings = Settings {
        ack: "after_checkpoint",
        ..IMPATIENT
    };
    an_interrupted_job_moves_at_once(&settings, json!({}), 1).await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn an_interrupted_job_moves_at_once_with_after_run() {
    an_interrupted_job_moves_at_once(&IMPATIENT, json!({}), 1).await;
}

/// `unacked`: how many messages the broker has while the job runs. Returns the start of
/// the second attempt.
async fn an_interrupted_job_moves_at_once(
    settings: &Settings,
    more: Value,
    unacked: usize,
) -> Option<RunLine> {
    let scene = Scene::on_postgres(settings).await?;
    let first = scene.ready_worker("first").await;
    scene.publish(scene.runs.waiting("job", more)).await;
    scene.runs_have_started(1).await;
    eventually("the message is acked as early as it can be", async || {
        (scene.broker.backlog(SUBSCRIPTION) == unacked).then_some(())
    })
    .await;
    let second = scene.ready_worker("second").await;
    let signalled_at = micros_now();
    assert!(first.stop().await.success());
    let moved = scene.runs_have_started(2).await.pop()?;
    let took = Duration::from_micros(moved.at_micros - signalled_at);
    println!("{}: the job moved within {took:?}", settings.ack);
    assert!(took < BOUND, "it took {took:?}");
    assert_eq!(moved.pid, second.pid());
    scene.runs.release("job");
    let jobs = scene.all_succeed(1).await;
    assert_eq!(jobs[0].attempts, 1, "an interruption costs no attempt");
    scene.nothing_is_left_to_deliver().await;
    assert!(second.stop().await.success());
    Some(moved)
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_second_signal_interrupts_what_the_first_one_lets_run() {
    let Some(scene) = Scene::on_postgres(&PATIENT).await else {
        return;
    };
    let first = scene.ready_worker("first").await;
    scene.publish(scene.runs.waiting("job", json!({}))).await;
    scene.runs_have_started(1).await;
    first.signal(Signal::SIGTERM);
    first.says("pulling has stopped").await;
    let second = scene.ready_worker("second").await;
    assert_eq!(scene.runs.of(RunEvent::Stopped), [], "it may go on");
    assert!(first.stop().await.success());
    assert_eq!(scene.runs.of(RunEvent::Stopped).len(), 1);
    let moved = scene.runs_have_started(2).await.pop().unwrap();
    assert_eq!(moved.pid, second.pid());
    scene.runs.release("job");
    assert_eq!(scene.all_succeed(1).await[0].attempts, 1);
    assert!(second.stop().await.success());
}

/// A program that ignores the request to stop, once it says so.
const STUBBORN: Settings = Settings {
    shutdown_grace: "1h",
    task: r#"
[tasks.stubborn]
command = ["sh", "-c", "trap '' TERM; echo '@trainyard {\"checkpoint\":\"begun\"}'; while :; do sleep 0.1; done"]
stop_grace = "20s""#,
    ..CALM
};

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn the_third_signal_ends_a_worker_whose_run_does_not_stop_with_code_1() {
    let Some(scene) = Scene::on_postgres(&STUBBORN).await else {
        return;
    };
    let worker = scene.ready_worker("worker").await;
    scene.publish(json!({"name": "stubborn"}).to_string()).await;
    eventually("the program has begun", async || {
        let jobs = scene.jobs().await;
        jobs.first()?.checkpoint.as_ref().map(drop)
    })
    .await;
    worker.signal(Signal::SIGTERM);
    worker.says("pulling has stopped").await;
    worker.signal(Signal::SIGINT);
    worker.says("second signal:").await;
    assert_eq!(worker.stop().await.code(), Some(1));
    let jobs = scene.jobs().await;
    assert_eq!(jobs[0].state, JobState::Running, "nothing is written");
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_stopping_worker_hands_back_what_it_has_fetched_ahead() {
    for ack in ["before_run", "after_checkpoint", "after_run"] {
        let settings = Settings {
            ack,
            prefetch: 50,
            ..PATIENT
        };
        let Some(scene) = Scene::on_postgres(&settings).await else {
            return;
        };
        what_was_fetched_ahead_is_handed_back(&scene).await;
    }
}

async fn what_was_fetched_ahead_is_handed_back(scene: &Scene) {
    let first = scene.ready_worker("first").await;
    scene.publish(scene.runs.waiting("long", json!({}))).await;
    scene.runs_have_started(1).await;
    let more = (0..20).map(|_| scene.runs.request(0.0)).collect();
    scene.publish_all(more).await;
    eventually("all messages are at the first worker", async || {
        (scene.broker.outstanding(SUBSCRIPTION) >= 20).then_some(())
    })
    .await;
    let second = scene.ready_worker("second").await;
    first.signal(Signal::SIGTERM);
    // The second worker ran them while the first still runs its own job.
    let ends = scene.runs_have_come_to(RunEvent::End, 20).await;
    assert!(ends.iter().all(|end| end.pid == second.pid()));
    scene.runs.release("long");
    let jobs = scene.all_succeed(21).await;
    scene.nothing_is_left_to_deliver().await;
    assert!(jobs.iter().all(|job| job.attempts == 1), "{jobs:#?}");
    assert_eq!(scene.runs.of(RunEvent::Start).len(), 21);
    assert!(first.stops().await.success());
    assert!(second.stop().await.success());
}
