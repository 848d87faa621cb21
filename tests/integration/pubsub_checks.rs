//! What is configured must fit to what exists in Pub/Sub; `run` and `config check` say
//! where it does not.

use crate::support::broker::Broker;
use crate::support::database::Database;
use crate::support::worker::Yard;

const CONFIGURATION: i32 = 2;
const TASK: &str = "[tasks.rehearsal]\nbuiltin = \"rehearsal\"\n";

/// With the topic and subscription `training`.
async fn yard(sections: &str) -> (Broker, Database, Yard) {
    let broker = Broker::builtin().await.unwrap();
    let database = Database::sqlite().await.unwrap();
    database.open_migrated().await;
    broker.subscribe("training").await;
    let yard = Yard::new(&broker, &database, &format!("{TASK}{sections}"));
    (broker, database, yard)
}

async fn both_refuse(yard: &Yard, says: &[&str]) {
    for command in [&["run"][..], &["config", "check"]] {
        let output = yard.output(command).await;
        assert_eq!(output.code, CONFIGURATION, "{}", output.stderr);
        let last = output.stderr.lines().last().unwrap_or_default();
        for words in says {
            assert!(last.contains(words), "`{last}` should say `{words}`");
        }
    }
}

#[tokio::test]
async fn a_missing_subscription_is_named() {
    let (_broker, _database, yard) = yard("[subscriptions.trainings]\n").await;
    both_refuse(&yard, &["subscriptions/trainings does not exist"]).await;
}

#[tokio::test]
async fn a_missing_topic_for_dead_letters_is_named() {
    let sections = "[subscriptions.training]\ndead_letter_topic = \"graves\"\n";
    let (_broker, _database, yard) = yard(sections).await;
    both_refuse(&yard, &["topics/graves does not exist"]).await;
}

#[tokio::test]
async fn dead_letters_must_not_come_back_as_new_messages() {
    let sections = "[subscriptions.training]\ndead_letter_topic = \"training\"\n";
    let (_broker, _database, yard) = yard(sections).await;
    let says = ["[subscriptions.training] go to its own topic"];
    both_refuse(&yard, &says).await;
}

#[tokio::test]
async fn dead_letters_must_not_go_in_a_circle() {
    let sections = "[subscriptions.training]\ndead_letter_topic = \"retries\"\n
                    [subscriptions.retries]\ndead_letter_topic = \"training\"\n";
    let (broker, _database, yard) = yard(sections).await;
    broker.subscribe("retries").await;
    let says = [
        "those of [subscriptions.retries] go to the topic of [subscriptions.training]",
        "those of [subscriptions.training] go to the topic of [subscriptions.retries]",
    ];
    both_refuse(&yard, &says).await;
}

#[tokio::test]
async fn a_subscription_without_its_topic_needs_a_person() {
    let (broker, _database, yard) = yard("[subscriptions.training]\n").await;
    broker.delete_topic("training").await;
    let output = yard.output(&["config", "check"]).await;
    assert_eq!(output.code, 0, "{}", output.stderr);
    let says = "subscription training: it needs a person's help: its topic is deleted";
    assert!(output.stdout.contains(says), "{}", output.stdout);
}

/// On Google's emulator, as the built-in one has no push subscriptions.
#[tokio::test]
async fn a_push_subscription_is_refused() {
    let Some(broker) = Broker::google().await else {
        return;
    };
    let database = Database::sqlite().await.unwrap();
    database.open_migrated().await;
    broker.subscribe_with_push("training").await;
    let sections = format!("{TASK}[subscriptions.training]\n");
    let yard = Yard::new(&broker, &database, &sections);
    let says = ["subscription training cannot be pulled", "a push endpoint"];
    both_refuse(&yard, &says).await;
}

#[tokio::test]
async fn one_subscription_has_one_section() {
    let broker = Broker::builtin().await.unwrap();
    let database = Database::sqlite().await.unwrap();
    database.open_migrated().await;
    broker.subscribe("training").await;
    let path = broker.connection.subscription_path("training");
    let sections = format!("{TASK}[subscriptions.training]\n[subscriptions.\"{path}\"]\n");
    let yard = Yard::new(&broker, &database, &sections);
    both_refuse(&yard, &["same subscription"]).await;
}
