//! From a published message to a job's end, with worker processes.

use std::collections::BTreeSet;

use nix::sys::signal::Signal;
use trainyard::record::{Job, JobFilter, JobState};
use trainyard::store::Store;

use crate::on_every_broker_and_database;
use crate::support::broker::Broker;
use crate::support::database::Database;
use crate::support::eventually;
use crate::support::requests::{tiny_training, write_tiny_dataset};
use crate::support::worker::Yard;

on_every_broker_and_database!(
    two_workers_run_200_messages_once_each_with_20_delivered_twice,
    a_stopped_worker_exits_cleanly_and_another_goes_on,
);

fn sections(ack: &str, slots: usize) -> String {
    format!(
        "[worker]\nslots = {slots}\nlease = \"10s\"\nstop_grace = \"2s\"\n[subscriptions.training]\nack_deadline = \"10s\"\n\
         [tasks.train-classifier]\nbuiltin = \"train-classifier\"\nack = \"{ack}\"\n"
    )
}

async fn jobs(store: &dyn Store) -> Vec<Job> {
    let filter = JobFilter {
        limit: 10_000,
        ..JobFilter::default()
    };
    store.jobs(&filter).await.unwrap()
}

async fn all_succeed(store: &dyn Store, how_many: usize) -> Vec<Job> {
    eventually("all jobs have succeeded", async || {
        let jobs = jobs(store).await;
        let done = jobs.iter().filter(|job| job.state == JobState::Succeeded);
        (done.count() == how_many && jobs.len() == how_many).then_some(jobs)
    })
    .await
}

async fn two_workers_run_200_messages_once_each_with_20_delivered_twice(
    broker: Broker,
    database: Database,
) {
    let store = database.open_migrated().await;
    let yard = Yard::new(&broker, &database, &sections("after_run", 2));
    let dataset = write_tiny_dataset(yard.folder.path());
    broker.subscribe("training").await;
    let workers = [yard.start_worker("w1"), yard.start_worker("w2")];
    let mut published = Vec::new();
    for number in 0..200 {
        let output = yard.folder.path().join(format!("model-{number}"));
        let request = tiny_training(&dataset, &output).to_string();
        let id = broker.publish("training", request).await;
        published.push(id);
    }
    broker.deliver_again("training", &published[..20]).await;
    let jobs = all_succeed(&*store, 200).await;
    let on_record: BTreeSet<&String> = jobs.iter().map(|job| &job.message_id).collect();
    assert_eq!(on_record, published.iter().collect());
    assert_eq!(jobs.iter().map(|job| job.attempts).sum::<u32>(), 200);
    eventually("20 duplicates are on record", async || {
        let jobs = self::jobs(&*store).await;
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
    let store = database.open_migrated().await;
    broker.subscribe("training").await;
    let yard = Yard::new(&broker, &database, &sections("after_run", 1));
    let dataset = write_tiny_dataset(yard.folder.path());
    let first = yard.start_worker("first");
    for number in 0..20 {
        let output = yard.folder.path().join(format!("model-{number}"));
        let request = tiny_training(&dataset, &output).to_string();
        broker.publish("training", request).await;
    }
    eventually("the first worker has begun", async || {
        (!jobs(&*store).await.is_empty()).then_some(())
    })
    .await;
    assert_eq!(first.stop().await.code(), Some(0));
    let second = yard.start_worker("second");
    let output = yard.folder.path().join("model-of-the-second");
    let request = tiny_training(&dataset, &output).to_string();
    broker.publish("training", request).await;
    let jobs = all_succeed(&*store, 21).await;
    assert!(jobs.iter().all(|job| job.attempts == 1), "{jobs:#?}");
    assert_eq!(second.stop_with(Signal::SIGINT).await.code(), Some(0));
}
