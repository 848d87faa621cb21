//! Messages of dead jobs on their dead-letter topic.

use std::collections::BTreeMap;

use serde_json::json;
use trainyard::message::Message;
use trainyard::pubsub::Outgoing;
use trainyard::record::JobState;

use crate::on_both_databases;
use crate::support::broker::Broker;
use crate::support::database::Database;
use crate::support::scene::{PATIENT, SUBSCRIPTION, Scene, Settings};
use crate::support::{eventually, has_failpoints};

on_both_databases!(
    a_dead_message_is_published_with_its_reason,
    a_refused_message_is_published_as_it_came,
    a_dead_letter_that_comes_back_is_not_published_again,
    a_dead_letter_survives_the_worker_that_should_have_published_it,
    a_missing_topic_is_found_at_the_start,
);

const DEAD: &str = "training-dead";

fn settings() -> Settings {
    Settings {
        subscription: "dead_letter_topic = \"training-dead\"",
        ..PATIENT
    }
}

async fn scene(database: &Database) -> Scene {
    let broker = Broker::builtin().await.unwrap();
    broker.subscribe(DEAD).await;
    Scene::on(broker, database, &settings()).await
}

async fn the_dead_letter(scene: &Scene) -> Message {
    scene.broker.receive(DEAD, 1).await.remove(0)
}

fn reasons(letter: &Message) -> BTreeMap<&str, &str> {
    letter
        .attributes
        .iter()
        .filter_map(|(name, value)| Some((name.strip_prefix("trainyard-")?, value.as_str())))
        .collect()
}

async fn a_dead_message_is_published_with_its_reason(database: Database) {
    let scene = scene(&database).await;
    let _worker = scene.start_worker("w1");
    let request = scene.runs.rehearsal(json!({"fail": "transient"}));
    let message = Outgoing {
        data: request.clone().into(),
        attributes: vec![("tenant".to_owned(), "a".to_owned())],
        ..Outgoing::default()
    };
    let connection = &scene.broker.connection;
    let id = connection.publish(SUBSCRIPTION, message).await.unwrap();
    let letter = the_dead_letter(&scene).await;
    let job = scene.job(&id, JobState::Dead).await;
    assert_eq!(letter.data, request);
    assert_eq!(letter.attributes["tenant"], "a");
    let published = job.publish_time.to_rfc3339();
    let path = connection.subscription_path(SUBSCRIPTION);
    let expected = [
        ("attempts", "3"),
        ("error", "told to fail"),
        ("message-id", id.as_str()),
        ("path", path.as_str()),
        ("publish-time", published.as_str()),
        ("reason", "attempts_exhausted"),
        ("subscription", SUBSCRIPTION),
        ("task", "rehearsal"),
    ];
    assert_eq!(reasons(&letter), BTreeMap::from(expected));
    scene.nothing_is_left_to_deliver().await;
    let story = ["finished", "dead_lettered"];
    scene.is_explained_by(&id, &story).await;
}

async fn a_refused_message_is_published_as_it_came(database: Database) {
    let scene = scene(&database).await;
    let _worker = scene.start_worker("w1");
    scene
        .broker
        .publish(SUBSCRIPTION, b"{not json".to_vec())
        .await;
    let letter = the_dead_letter(&scene).await;
    assert_eq!(&letter.data[..], b"{not json");
    let reasons = reasons(&letter);
    assert_eq!(reasons["reason"], "malformed");
    assert!(reasons["error"].contains("not valid JSON"));
    assert_eq!(reasons["attempts"], "0");
    assert!(!reasons.contains_key("task"));
}

/// Somebody else's pipeline leads dead letters back to the topic that they came from.
async fn a_dead_letter_that_comes_back_is_not_published_again(database: Database) {
    let scene = scene(&database).await;
    let _worker = scene.start_worker("w1");
    scene.publish_rehearsal(json!({"fail": "permanent"})).await;
    let letter = the_dead_letter(&scene).await;
    let back = Outgoing {
        data: letter.data.to_vec(),
        attributes: letter.attributes.into_iter().collect(),
        ..Outgoing::default()
    };
    let connection = &scene.broker.connection;
    let id = connection.publish(SUBSCRIPTION, back).await.unwrap();
    scene.job(&id, JobState::Dead).await;
    eventually("its end is on record", async || {
        let stories = scene.store.stories(&id).await.unwrap();
        let ledger = &stories.first()?.ledger;
        let settled = ledger.iter().find(|entry| entry.kind == "dead_lettered")?;
        settled
            .detail
            .as_ref()?
            .contains("leads back here")
            .then_some(())
    })
    .await;
    assert_eq!(scene.broker.backlog(DEAD), 0);
    scene.nothing_is_left_to_deliver().await;
}

/// The job is dead and its message acked. Then the topic is created, and another worker
/// publishes.
async fn a_dead_letter_survives_the_worker_that_should_have_published_it(database: Database) {
    if !has_failpoints() {
        return;
    }
    let scene = scene(&database).await;
    let mut first = scene
        .yard
        .start_worker_with("first", &[("TRAINYARD_FAILPOINT", "after_finish")]);
    let id = scene.publish_rehearsal(json!({"fail": "permanent"})).await;
    first.dies().await;
    scene.job(&id, JobState::Dead).await;
    let _second = scene.start_worker("second");
    let letter = the_dead_letter(&scene).await;
    assert_eq!(reasons(&letter)["reason"], "permanent");
    scene.nothing_is_left_to_deliver().await;
    eventually("the letter is settled once", async || {
        let told = scene.command(&["explain", &id]).await.stdout;
        (told.matches("dead_lettered").count() == 1).then_some(())
    })
    .await;
}

async fn a_missing_topic_is_found_at_the_start(database: Database) {
    let scene = Scene::new(&database, &settings()).await;
    let output = scene.command(&["run"]).await;
    assert_eq!(output.code, 2);
    assert!(output.stderr.contains("training-dead does not exist"));
    assert!(output.stderr.contains("dead_letter_topic"));
}
