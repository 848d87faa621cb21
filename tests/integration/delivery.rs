//! From a published message to a job's end, with worker processes.

use std::collections::BTreeSet;
use std::ops::Range;

use nix::sys::signal::Signal;
use trainyard::record::JobState;

use crate::on_every_broker_and_database;
use crate::support::broker::Broker;
use crate::support::database::Database;
use crate::support::eventually;
use crate::support::requests::{tiny_training, write_tiny_dataset};
use crate::support::scene::{PATIENT, SUBSCRIPTION, Scene, Settings};

on_every_broker_and_database!(
    two_workers_run_200_messages_once_each_with_20_delivered_twice,
    a_stopped_worker_exits_cleanly_and_another_goes_on,
);

async fn scene(broker: Broker, database: &Database, slots: usize) -> Scene {
    let settings = Settings {
        slots,
        task: "[tasks.train-classifier]\nbuiltin = \"train-classifier\"\nack = \"after_run\"",
        ..PATIENT
    };
    Scene::on(broker, database, &settings).await
}

/// Publishes a request for the training of each of these models, and returns the messages'
/// ids.
async fn publish(scene: &Scene, models: Range<usize>) -> Vec<String> {
    let dataset = write_tiny_dataset(scene.folder());
    let mut published = Vec::new();
    for number in models {
        let output = scene.folder().join(format!("model-{number}"));
        let request = tiny_training(&dataset, &output).to_string();
        published.push(scene.broker.publish(SUBSCRIPTION, request).await);
    }
    published
}

async fn two_workers_run_200_messages_once_each_with_20_delivered_twice(
    broker: Broker,
    database: Database,
) {
    let scene = scene(broker, &database, 2).await;
    let workers = [scene.start_worker("w1"), scene.start_worker("w2")];
    for worker in &workers {
        worker.says("ready").await;
    }
    let published = publish(&scene, 0..200).await;
    let twice = &published[..20];
    // The second delivery of a job that waits would not be counted.
    for id in twice {
        scene.job(id, JobState::Succeeded).await;
    }
    scene.broker.deliver_again(SUBSCRIPTION, twice).await;
    let jobs = scene.all_succeed(200).await;
    let on_record: BTreeSet<&String> = jobs.iter().map(|job| &job.message_id).collect();
    assert_eq!(on_record, published.iter().collect());
    assert_eq!(jobs.iter().map(|job| job.attempts).sum::<u32>(), 200);
    eventually("20 duplicates are on record", async || {
        let jobs = scene.jobs().await;
        (jobs.iter().map(|job| job.duplicates).sum::<u32>() >= 20).then_some(())
    })
    .await;
    let by_worker: BTreeSet<_> = jobs.iter().filter_map(|job| job.worker.clone()).collect();
    assert_eq!(by_worker.len(), 2, "both workers had work");
    for worker in workers {
        assert_eq!(worker.stop().await.code(), Some(0));
    }
}

async fn a_stopped_worker_exits_cleanly_and_another_goes_on(broker: Broker, database: Database) {
    let scene = scene(broker, &database, 1).await;
    let first = scene.start_worker("first");
    publish(&scene, 0..20).await;
    eventually("the first worker has begun", async || {
        (!scene.jobs().await.is_empty()).then_some(())
    })
    .await;
    assert_eq!(first.stop().await.code(), Some(0));
    let second = scene.start_worker("second");
    publish(&scene, 20..21).await;
    let jobs = scene.all_succeed(21).await;
    assert!(jobs.iter().all(|job| job.attempts == 1), "{jobs:#?}");
    assert_eq!(second.stop_with(Signal::SIGINT).await.code(), Some(0));
}
