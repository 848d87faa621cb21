//! Messages that no worker can run. They cause no panic, no loss and no loop; the refusal
//! is on record with its reason.

use trainyard::record::{Job, JobFilter, JobState};

use crate::on_every_broker_and_database;
use crate::support::broker::Broker;
use crate::support::database::Database;
use crate::support::eventually;
use crate::support::requests::{tiny_training, write_tiny_dataset};
use crate::support::worker::Yard;

on_every_broker_and_database!(every_kind_of_bad_message_is_dead_with_its_reason);

const SECTIONS: &str = "[worker]\nslots = 2\nunknown_task_patience = \"1s\"\n[subscriptions.training]\n[tasks.train-classifier]\nbuiltin = \"train-classifier\"\n";

/// (data, part of the recorded reason)
fn bad_messages() -> Vec<(Vec<u8>, &'static str)> {
    let deep = format!("{{\"name\":{}{}}}", "[".repeat(10_000), "]".repeat(10_000));
    let mut large = b"{\"name\":\"nobody\",\"padding\":\"".to_vec();
    large.resize(9_900_000, b'x');
    large.extend(b"\"}");
    vec![
        (b"{not json".to_vec(), "not valid JSON"),
        (b"[1,2]".to_vec(), "JSON array"),
        (b"{\"seed\":1}".to_vec(), "no `name`"),
        (b"{\"name\":7}".to_vec(), "JSON number"),
        (b"{\"name\":\"nobody\"}".to_vec(), "no task `nobody`"),
        (b"{\"name\":\"a\\u0000b\"}".to_vec(), "no task `a"),
        (b"\xff\xfe{}".to_vec(), "not UTF-8"),
        (
            b"\xef\xbb\xbf{\"name\":\"nobody\"}".to_vec(),
            "byte order mark",
        ),
        (b"{\"name\":\"nobody\",\"x\":NaN}".to_vec(), "`NaN`"),
        (deep.into_bytes(), "`name` is a JSON array"),
        (large, "no task `nobody`"),
        (
            b"{\"name\":\"train-classifier\"}".to_vec(),
            "missing field `dataset`",
        ),
    ]
}

async fn every_kind_of_bad_message_is_dead_with_its_reason(broker: Broker, database: Database) {
    let store = database.open_migrated().await;
    broker.subscribe("training").await;
    let yard = Yard::new(&broker, &database, SECTIONS);
    let worker = yard.start_worker("w1");
    let mut expected = Vec::new();
    for (data, reason) in bad_messages() {
        expected.push((broker.publish("training", data).await, reason));
    }
    // A message with attributes only has no data.
    let empty = trainyard::pubsub::Outgoing {
        attributes: vec![("only".to_owned(), "attributes".to_owned())],
        ..Default::default()
    };
    let id = broker.connection.publish("training", empty).await.unwrap();
    expected.push((id, "no data"));
    // A good message behind them all still runs.
    let dataset = write_tiny_dataset(yard.folder.path());
    let good = tiny_training(&dataset, &yard.folder.path().join("model")).to_string();
    let good = broker.publish("training", good).await;

    let filter = JobFilter {
        limit: 100,
        ..JobFilter::default()
    };
    let ended: Vec<Job> = eventually("every message has ended", async || {
        let jobs = store.jobs(&filter).await.unwrap();
        let all = jobs.len() == expected.len() + 1;
        (all && jobs.iter().all(|job| job.finished_at.is_some())).then_some(jobs)
    })
    .await;
    let job = |id: &str| ended.iter().find(|job| job.message_id == id).unwrap();
    assert_eq!(job(&good).state, JobState::Succeeded);
    for (id, reason) in &expected {
        let job = job(id);
        let error = job.error.as_deref().unwrap_or_default();
        assert_eq!(job.state, JobState::Dead);
        assert!(error.contains(reason), "{error} should say {reason}");
    }
    // No loop: each arrived once, and nothing is left to deliver.
    assert_eq!(ended.iter().map(|job| job.duplicates).sum::<u32>(), 0);
    if let Some(inside) = &broker.builtin {
        let subscription = broker.connection.subscription_path("training");
        eventually("every message is acked", async || {
            (inside.backlog_len(&subscription).unwrap() == 0).then_some(())
        })
        .await;
    }
    let log = worker.log();
    assert!(!log.contains("panicked"), "{log}");
    assert_eq!(worker.stop().await.code(), Some(0));
}
