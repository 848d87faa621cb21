//! Messages go where a slot is free, or are prefetched if configured.

use std::collections::HashMap;

use google_cloud_pubsub::model::Subscription;
use serde_json::{Value, json};
use trainyard::pubsub::Outgoing;
use trainyard::record::Job;
use uuid::Uuid;

use crate::support::eventually;
use crate::support::runs::{RunEvent, RunLine};
use crate::support::scene::{CALM, SUBSCRIPTION, Scene, Settings};
use crate::support::worker::WorkerProcess;

const JOBS: usize = 10;

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn no_message_waits_at_a_busy_worker_with_before_run() {
    no_message_waits_at_a_busy_worker("before_run", json!({}), 0).await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn no_message_waits_at_a_busy_worker_with_after_checkpoint() {
    let more = json!({"checkpoint_after": 0});
    no_message_waits_at_a_busy_worker("after_checkpoint", more, 0).await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn no_message_waits_at_a_busy_worker_before_its_checkpoint() {
    no_message_waits_at_a_busy_worker("after_checkpoint", json!({}), 2).await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn no_message_waits_at_a_busy_worker_with_after_run() {
    no_message_waits_at_a_busy_worker("after_run", json!({}), 2).await;
}

/// Two workers with one slot each. While one is busy, each message goes to the other,
/// whose slot becomes free; then vice versa. A message sent to the busy worker would have
/// been handed back and redelivered.
///
/// `unacked`: how many of the two running messages are not acked yet.
async fn no_message_waits_at_a_busy_worker(ack: &'static str, more: Value, unacked: usize) {
    let Some(scene) = Scene::on_postgres(&Settings { ack, ..CALM }).await else {
        return;
    };
    let workers = [
        scene.ready_worker("one").await,
        scene.ready_worker("other").await,
    ];
    let requests = (0..JOBS).map(|number| scene.runs.waiting(&number.to_string(), more.clone()));
    scene.publish_all(requests.collect()).await;
    let mut running = scene.runs_have_started(2).await;
    assert_ne!(running[0].pid, running[1].pid, "one run each");
    let mut started = 2;
    for free in [0, 1] {
        for _ in 0..(JOBS - 2) / 2 {
            scene.runs.release(label(&running[free]));
            started += 1;
            let next = scene.runs_have_started(started).await.pop().unwrap();
            assert_eq!(next.pid, running[free].pid, "the other one is busy");
            running[free] = next;
            eventually("workers have no message but those that run", async || {
                (scene.broker.outstanding(SUBSCRIPTION) == unacked).then_some(())
            })
            .await;
        }
    }
    running
        .iter()
        .for_each(|run| scene.runs.release(label(run)));
    let jobs = scene.all_succeed(JOBS).await;
    scene.nothing_is_left_to_deliver().await;
    assert!(jobs.iter().all(|job| job.attempts == 1), "{jobs:#?}");
    let deliveries: Vec<u32> = workers.iter().flat_map(deliveries_that_started).collect();
    assert_eq!(deliveries.len(), JOBS);
    // A broker that is slow to notice a stream's end may send one message into it. If
    // busy workers asked for messages, most would be redelivered.
    let again = deliveries.iter().filter(|delivery| **delivery > 1).count();
    assert!(again <= 1, "{deliveries:?}");
}

fn label(run: &RunLine) -> &str {
    run.label.as_deref().unwrap()
}

/// For each run that a worker started, the number of its message's delivery. With a
/// dead-letter policy the broker sends it, and workers log it.
fn deliveries_that_started(worker: &WorkerProcess) -> Vec<u32> {
    let log = worker.log();
    let starts = log.lines().filter(|line| line.ends_with(" started"));
    let attempts = starts.map(|line| {
        let (_, rest) = line.split_once("delivery.attempt=").unwrap();
        let digits = rest.find(|c: char| !c.is_ascii_digit()).unwrap();
        rest[..digits].parse().unwrap()
    });
    attempts.collect()
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_prefetching_worker_runs_200_messages_once_each_and_in_order() {
    let settings = Settings {
        prefetch: 50,
        ..CALM
    };
    let Some(scene) = Scene::on_postgres(&settings).await else {
        return;
    };
    let worker = scene.start_worker("worker");
    scene.publish(scene.runs.waiting("first", json!({}))).await;
    scene.runs_have_started(1).await;
    let more = (1..200).map(|_| scene.runs.request(0.0)).collect();
    scene.publish_all(more).await;
    eventually("50 messages wait at the worker", async || {
        (scene.broker.outstanding(SUBSCRIPTION) == 51).then_some(())
    })
    .await;
    assert_eq!(scene.runs.of(RunEvent::Start).len(), 1);
    scene.runs.release("first");
    let jobs = scene.all_succeed(200).await;
    scene.nothing_is_left_to_deliver().await;
    assert!(worker.stop().await.success());
    let order = messages_in_the_order_of_their_runs(&scene, &jobs);
    assert_eq!(order.len(), 200, "one run each");
    // The emulator's ids grow.
    assert!(order.is_sorted(), "{order:?}");
}

fn messages_in_the_order_of_their_runs(scene: &Scene, jobs: &[Job]) -> Vec<u64> {
    let messages: HashMap<Uuid, u64> = jobs
        .iter()
        .map(|job| (job.id, job.message_id.parse().unwrap()))
        .collect();
    let starts = scene.runs.of(RunEvent::Start);
    starts.iter().map(|start| messages[&start.job]).collect()
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn prefetched_messages_of_an_ordering_key_run_one_after_the_other() {
    let settings = Settings {
        slots: 4,
        prefetch: 50,
        ..CALM
    };
    let ordered = Subscription::new().set_enable_message_ordering(true);
    let Some(scene) = Scene::subscribed(ordered, &settings).await else {
        return;
    };
    let worker = scene.start_worker("worker");
    for number in 0..20 {
        for key in ["a", "b", "c"] {
            let like = json!({"seconds": 0.01, "label": format!("{key}{number}")});
            let message = Outgoing {
                data: scene.runs.rehearsal(like).into_bytes(),
                ordering_key: key.to_owned(),
                ..Outgoing::default()
            };
            let publishing = scene.broker.connection.publish(SUBSCRIPTION, message);
            publishing.await.unwrap();
        }
    }
    scene.all_succeed(60).await;
    scene.nothing_is_left_to_deliver().await;
    assert!(worker.stop().await.success());
    let lines = scene.runs.lines();
    for key in ["a", "b", "c"] {
        let of_key = lines.iter().filter(|line| label(line).starts_with(key));
        let told: Vec<(&str, RunEvent)> = of_key.map(|line| (label(line), line.event)).collect();
        let expected: Vec<String> = (0..20).map(|number| format!("{key}{number}")).collect();
        let expected: Vec<(&str, RunEvent)> = expected
            .iter()
            .flat_map(|label| [(label.as_str(), RunEvent::Start), (label, RunEvent::End)])
            .collect();
        assert_eq!(told, expected);
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_held_duplicate_takes_no_slot() {
    for ack in ["after_checkpoint", "after_run"] {
        let Some(scene) = Scene::on_postgres(&Settings { ack, ..CALM }).await else {
            return;
        };
        let runner = scene.ready_worker("runner").await;
        let id = scene.publish(scene.runs.waiting("long", json!({}))).await;
        scene.runs_have_started(1).await;
        let holder = scene.ready_worker("holder").await;
        scene.broker.deliver_again(SUBSCRIPTION, &[id]).await;
        holder.says("duplicate of a message that is running").await;
        scene.publish_run(0.0).await;
        let ends = scene.runs_have_come_to(RunEvent::End, 1).await;
        assert_eq!(ends[0].pid, holder.pid());
        eventually("only the running job's deliveries are left", async || {
            (scene.broker.backlog(SUBSCRIPTION) == 2).then_some(())
        })
        .await;
        assert_eq!(scene.broker.outstanding(SUBSCRIPTION), 2, "both are held");
        scene.runs.release("long");
        let jobs = scene.all_succeed(2).await;
        scene.nothing_is_left_to_deliver().await;
        assert!(jobs.iter().all(|job| job.attempts == 1), "{jobs:#?}");
        assert_eq!(scene.runs.of(RunEvent::Start).len(), 2);
        assert!(runner.stop().await.success());
        assert!(holder.stop().await.success());
    }
}
