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
    let says = ["dead_letter_topic = \"training\"", "own topic"];
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
