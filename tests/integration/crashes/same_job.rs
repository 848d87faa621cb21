//! Two deliveries of the same job, and one message that is two jobs.

use trainyard::pubsub::Outgoing;
use trainyard::record::JobState;

use crate::on_both_databases;
use crate::support::broker::Broker;
use crate::support::database::Database;
use crate::support::eventually;
use crate::support::runs::{RunEvent, RunsLog};
use crate::support::worker::Yard;

on_both_databases!(
    two_subscriptions_of_one_topic_each_run_the_message,
    two_messages_with_one_dedupe_key_run_once,
);

const TASK: &str = "[tasks.rehearsal]\nbuiltin = \"rehearsal\"\n";

async fn two_subscriptions_of_one_topic_each_run_the_message(database: Database) {
    let store = database.open_migrated().await;
    let broker = Broker::builtin().await.unwrap();
    let policy = broker.dead_letter_policy().await;
    for name in ["one", "other"] {
        let wanted = broker.wanted("requests", name).await;
        let wanted = wanted.set_dead_letter_policy(policy.clone());
        broker.make(wanted).await;
    }
    let yard = Yard::new(
        &broker,
        &database,
        &format!("[subscriptions.one]\n[subscriptions.other]\n{TASK}"),
    );
    let runs = RunsLog::in_folder(yard.folder.path());
    let worker = yard.start_worker("worker");
    let id = broker.publish("requests", runs.request(0.0)).await;
    let mut stories = eventually("both jobs have succeeded", async || {
        let stories = store.stories(&id).await.unwrap();
        let done = stories
            .iter()
            .filter(|s| s.job.state == JobState::Succeeded);
        (done.count() == 2).then_some(stories)
    })
    .await;
    stories.sort_by(|a, b| a.job.subscription.cmp(&b.job.subscription));
    let through: Vec<&str> = stories.iter().map(|s| &*s.job.subscription).collect();
    assert_eq!(through, ["one", "other"]);
    assert_ne!(stories[0].job.id, stories[1].job.id);
    assert!(worker.stop().await.success());
    assert_eq!(runs.of(RunEvent::End).len(), 2);
    assert_eq!((broker.backlog("one"), broker.backlog("other")), (0, 0));
    assert_eq!(broker.given_up(), 0);
}

async fn two_messages_with_one_dedupe_key_run_once(database: Database) {
    let store = database.open_migrated().await;
    let broker = Broker::builtin().await.unwrap();
    broker.subscribe_with_policy("requests").await;
    let section = "[subscriptions.requests]\ndedupe_key = \"attribute:request_id\"\n";
    let yard = Yard::new(&broker, &database, &format!("{section}{TASK}"));
    let runs = RunsLog::in_folder(yard.folder.path());
    let worker = yard.start_worker("worker");
    let first = publish_request(&broker, &runs, "r1").await;
    eventually("the first message's job has succeeded", async || {
        let stories = store.stories(&first).await.unwrap();
        stories
            .iter()
            .find(|s| s.job.state == JobState::Succeeded)?;
        Some(())
    })
    .await;
    let second = publish_request(&broker, &runs, "r1").await;
    let told = eventually("the second message is suppressed", async || {
        let told = yard.output(&["explain", &second]).await.stdout;
        told.contains("suppressed").then_some(told)
    })
    .await;
    let job = store.stories(&first).await.unwrap().remove(0).job;
    assert!(told.contains(&job.id.to_string()), "{told}");
    assert!(told.contains(&format!("message {first}")), "{told}");
    assert_eq!((job.attempts, job.duplicates), (1, 1));
    assert!(worker.stop().await.success());
    assert_eq!(runs.of(RunEvent::Start).len(), 1);
    assert_eq!((broker.backlog("requests"), broker.given_up()), (0, 0));
}

async fn publish_request(broker: &Broker, runs: &RunsLog, request_id: &str) -> String {
    let message = Outgoing {
        data: runs.request(0.0).into_bytes(),
        attributes: vec![("request_id".to_owned(), request_id.to_owned())],
        ..Outgoing::default()
    };
    broker
        .connection
        .publish("requests", message)
        .await
        .unwrap()
}
