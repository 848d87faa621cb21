//! What a person types, and the answers.

use std::process::Stdio;

use serde_json::{Value, json};
use tokio::io::{AsyncBufReadExt, BufReader};
use tokio::process::Command;
use tokio::time::timeout;

use crate::support::broker::Broker;
use crate::support::database::Database;
use crate::support::requests::{tiny_training, write_tiny_dataset};
use crate::support::worker::{Yard, output_of, trainyard};
use crate::support::{PATIENCE, eventually};

const SECTIONS: &str = "[subscriptions.training]\n[tasks.train-classifier]\nbuiltin = \"train-classifier\"\nack = \"before_run\"\ntimeout = \"12h\"\n";

const CONFIGURATION: i32 = 2;
const OTHER: i32 = 1;

/// Runs a command and checks that it fails with one helpful sentence.
async fn fails(yard: &Yard, arguments: &[&str], code: i32, says: &[&str]) {
    let output = yard.output(arguments).await;
    assert_eq!(output.code, code, "{}", output.stderr);
    let last = output.stderr.lines().last().unwrap_or_default();
    for words in says {
        assert!(last.contains(words), "`{last}` should say `{words}`");
    }
}

async fn yard(sections: &str) -> (Broker, Database, Yard) {
    let broker = Broker::builtin().await.unwrap();
    let database = Database::sqlite().await.unwrap();
    let yard = Yard::new(&broker, &database, sections);
    (broker, database, yard)
}

#[tokio::test]
async fn an_unknown_key_ends_with_code_2_and_the_nearest_known_key() {
    let (_broker, _database, yard) = yard("[worker]\nslot = 1\n").await;
    let says = ["worker.slot", "worker.slots"];
    for command in [&["run"][..], &["config", "check"], &["jobs", "list"]] {
        fails(&yard, command, CONFIGURATION, &says).await;
    }
}

#[tokio::test]
async fn a_mistyped_value_in_the_environment_is_named() {
    let (_broker, _database, yard) = yard(SECTIONS).await;
    let mut command = yard.command(&["config", "check"]);
    command.env("TRAINYARD__WORKER__SLOTS", "many");
    let output = output_of(command).await;
    assert_eq!(output.code, CONFIGURATION);
    assert!(output.stderr.contains("worker.slots"), "{}", output.stderr);
}

#[tokio::test]
async fn the_environment_wins_over_the_file() {
    let (_broker, _database, yard) = yard("[worker]\nslots = 3\n").await;
    let mut command = yard.command(&["config", "check"]);
    command.env("TRAINYARD__WORKER__SLOTS", "7");
    let output = output_of(command).await;
    assert!(output.stdout.contains("slots = 7"), "{}", output.stdout);
}

#[tokio::test]
async fn a_missing_configuration_file_is_named() {
    let mut command = trainyard();
    command.args(["run", "--config", "/nowhere/trainyard.toml"]);
    let output = output_of(command).await;
    assert_eq!(output.code, CONFIGURATION);
    assert!(output.stderr.contains("/nowhere/trainyard.toml"));
}

#[tokio::test]
async fn a_missing_subscription_is_named_with_what_to_do() {
    let (_broker, database, yard) = yard(SECTIONS).await;
    database.open_migrated().await;
    let says = ["subscriptions/training", "does not exist", "create it"];
    fails(&yard, &["run"], CONFIGURATION, &says).await;
}

#[tokio::test]
async fn a_database_without_migrations_says_to_migrate() {
    let (_broker, database, yard) = yard(SECTIONS).await;
    fails(&yard, &["jobs", "list"], OTHER, &["trainyard migrate"]).await;
    database.open().await;
    fails(&yard, &["run"], OTHER, &["trainyard migrate"]).await;
}

#[tokio::test]
async fn a_database_that_cannot_hold_every_character_is_refused() {
    for encoding in ["LATIN1", "SQL_ASCII"] {
        let options = format!("TEMPLATE template0 ENCODING '{encoding}' LOCALE 'C'");
        let Some(database) = Database::postgres_with(&options).await else {
            return;
        };
        let broker = Broker::builtin().await.unwrap();
        broker.subscribe("training").await;
        let yard = Yard::new(&broker, &database, SECTIONS);
        let says = [encoding, "ENCODING 'UTF8'"];
        fails(&yard, &["migrate"], OTHER, &says).await;
        fails(&yard, &["run"], OTHER, &says).await;
        fails(&yard, &["config", "check"], CONFIGURATION, &says).await;
    }
}

#[tokio::test]
async fn an_unreachable_database_is_named_without_its_password() {
    let (_broker, _database, yard) = yard(SECTIONS).await;
    let mut command = yard.command(&["run"]);
    command.env(
        "TRAINYARD__DATABASE__URL",
        "postgres://u:s3cret@127.0.0.1:1/db",
    );
    let output = output_of(command).await;
    assert_eq!(output.code, OTHER, "{}", output.stderr);
    assert!(output.stderr.contains("127.0.0.1:1"), "{}", output.stderr);
    let refused = output.stderr.matches("Connection refused").count();
    assert_eq!(refused, 1, "{}", output.stderr);
    assert!(!output.stderr.contains("s3cret"), "{}", output.stderr);
}

#[tokio::test]
async fn no_part_of_an_unreadable_database_url_is_printed() {
    let (_broker, _database, yard) = yard(SECTIONS).await;
    for arguments in [&["run"][..], &["config", "check"], &["jobs", "list"]] {
        let mut command = yard.command(arguments);
        command.env("TRAINYARD__DATABASE__URL", "postgres://u:p@ss/w#rd@h/db");
        let output = output_of(command).await;
        assert_eq!(output.code, CONFIGURATION, "{}", output.stderr);
        assert!(output.stderr.contains("write `#` as %23"));
        for part in ["p@ss", "ss/w", "rd@h"] {
            assert!(!output.stderr.contains(part), "{}", output.stderr);
            assert!(!output.stdout.contains(part), "{}", output.stdout);
        }
    }
}

/// Nobody is there, so that the error tells whether the right way was tried.
#[tokio::test]
async fn urls_of_sockets_and_ipv6_addresses_lead_to_the_server() {
    let broker = Broker::builtin().await.unwrap();
    for (url, says, not) in [
        (
            "postgres://u@/db?host=/nowhere",
            "No such file",
            "localhost",
        ),
        // A machine without IPv6 says something else than one that has it.
        ("postgres://u@[::1]:1/db", "[::1]:1", "lookup"),
    ] {
        let yard = Yard::new(&broker, &Database::at(url.to_owned()), SECTIONS);
        let output = yard.output(&["migrate"]).await;
        assert_eq!(output.code, OTHER, "{}", output.stderr);
        assert!(output.stderr.contains(says), "{}", output.stderr);
        assert!(!output.stderr.contains(not), "{}", output.stderr);
    }
    if let Some(mut database) = Database::postgres().await {
        database.url += "?target_session_attrs=read-write";
        let yard = Yard::new(&broker, &database, SECTIONS);
        let output = yard.output(&["migrate"]).await;
        assert_eq!(output.code, 0, "{}", output.stderr);
    }
}

#[tokio::test]
async fn run_without_tasks_or_subscriptions_says_which_section_to_add() {
    let (_broker, database, yard) = yard("").await;
    database.open_migrated().await;
    fails(&yard, &["run"], CONFIGURATION, &["[tasks."]).await;
    let (_broker, database, yard) =
        self::yard("[tasks.train-classifier]\nbuiltin = \"train-classifier\"\n").await;
    database.open_migrated().await;
    fails(&yard, &["run"], CONFIGURATION, &["[subscriptions."]).await;
}

#[tokio::test]
async fn config_check_masks_secrets_and_shows_when_a_task_is_acked() {
    let (_broker, _database, yard) = yard(SECTIONS).await;
    let mut command = yard.command(&["config", "check", "--offline"]);
    command.env("TRAINYARD__DATABASE__URL", "postgres://u:s3cret@h/db");
    let output = output_of(command).await;
    assert_eq!(output.code, 0, "{}", output.stderr);
    assert!(output.stdout.contains("postgres://***@h/db"));
    assert!(!output.stdout.contains("s3cret"));
    for words in ["before the run", "a lease of 2m", "after 12h"] {
        assert!(output.stdout.contains(words), "{}", output.stdout);
    }
}

#[tokio::test]
async fn a_published_request_can_be_followed_to_its_end() {
    let (broker, _database, yard) = yard(SECTIONS).await;
    broker.subscribe("training").await;
    assert_eq!(yard.output(&["migrate"]).await.code, 0);
    let worker = yard.start_worker("w1");
    let dataset = write_tiny_dataset(yard.folder.path());
    let request = tiny_training(&dataset, &yard.folder.path().join("model")).to_string();
    let arguments = ["publish", "training", &request, "--attribute", "team=a"];
    let published = yard.output(&arguments).await;
    assert_eq!(published.code, 0, "{}", published.stderr);

    let list = ["jobs", "list", "--state", "succeeded", "--json"];
    let job: Value = eventually("the job has succeeded", async || {
        let list = yard.output(&list).await;
        assert_eq!(list.code, 0, "{}", list.stderr);
        serde_json::from_str(list.stdout.lines().next()?).ok()
    })
    .await;
    let id = job["id"].as_str().unwrap();
    let end = &id[id.len() - 8..];
    for id_or_end in [id, end] {
        let shown = yard.output(&["jobs", "show", id_or_end]).await.stdout;
        for words in [id, "train-classifier", "succeeded", "accuracy", &request] {
            assert!(shown.contains(words), "{shown}");
        }
    }
    let shown = yard.output(&["jobs", "show", id, "--json"]).await.stdout;
    let shown: Value = serde_json::from_str(&shown).unwrap();
    assert_eq!(shown["payload"]["name"], "train-classifier");
    let table = yard.output(&["jobs", "list", "--task", "train-classifier"]);
    assert!(table.await.stdout.contains(end));
    let message = job["message_id"].as_str().unwrap();
    eventually("its story is told, also that it is acked", async || {
        let story = yard.output(&["explain", message]).await.stdout;
        let mut told = ["claimed", "finished", "acked"].into_iter();
        told.all(|kind| story.contains(kind)).then_some(())
    })
    .await;
    let nothing = yard.output(&["jobs", "list", "--state", "dead"]).await;
    assert_eq!(nothing.stdout, "no jobs\n");
    assert_eq!(worker.stop().await.code(), Some(0));
}

#[tokio::test]
async fn publishing_to_nowhere_or_a_useless_payload_is_refused() {
    let (_broker, _database, yard) = yard("").await;
    let nowhere = ["publish", "nowhere", r#"{"name":"t"}"#];
    fails(&yard, &nowhere, OTHER, &["neither a topic nor", "nowhere"]).await;
    fails(&yard, &["publish", "nowhere", "{}"], OTHER, &["`name`"]).await;
}

/// A large payload does not fit on a command line.
#[tokio::test]
async fn a_payload_is_published_from_a_file_and_from_stdin() {
    let (broker, _database, yard) = yard("").await;
    broker.subscribe("training").await;
    let payload = json!({"name": "t", "padding": "x".repeat(200_000)}).to_string();
    let file = yard.folder.path().join("request.json");
    std::fs::write(&file, &payload).unwrap();
    let subscription = broker.connection.subscription_path("training");
    let from_file = format!("@{}", file.display());
    for (target, from) in [("training", from_file.as_str()), (&subscription, "-")] {
        let mut command = yard.command(&["publish", target, from]);
        command.stdin(std::fs::File::open(&file).unwrap());
        let output = output_of(command).await;
        assert_eq!(output.code, 0, "{}", output.stderr);
    }
    for message in broker.receive("training", 2).await {
        assert_eq!(message.data, payload);
    }
    let missing = ["publish", "training", "@no-such-file"];
    fails(
        &yard,
        &missing,
        OTHER,
        &["cannot be read from no-such-file"],
    )
    .await;
    let odd = ["publish", "projects/p/snapshots/s", "{\"name\":\"t\"}"];
    fails(&yard, &odd, OTHER, &["projects/PROJECT/topics/NAME"]).await;
}

#[tokio::test]
async fn an_emulator_that_is_not_there_is_named() {
    let (_broker, database, yard) = yard(SECTIONS).await;
    database.open_migrated().await;
    let mut command = yard.command(&["run"]);
    command.env("TRAINYARD__PUBSUB__EMULATOR_HOST", "127.0.0.1:1");
    let output = output_of(command).await;
    assert_eq!(output.code, OTHER, "{}", output.stderr);
    for words in ["127.0.0.1:1", "is an emulator running", "emulator_host"] {
        assert!(output.stderr.contains(words), "{}", output.stderr);
    }
}

#[tokio::test]
async fn a_message_that_is_not_on_record_is_said_to_be_missing() {
    let (_broker, database, yard) = yard("").await;
    database.open_migrated().await;
    fails(
        &yard,
        &["explain", "4711"],
        OTHER,
        &["4711", "not been pulled"],
    )
    .await;
}

#[tokio::test]
async fn config_check_warns_of_what_pubsubs_own_settings_would_break() {
    let (broker, _database, yard) =
        yard("[guard]\nretention = \"1d\"\n[subscriptions.training]\n[subscriptions.kept]\n").await;
    broker.subscribe_with_policy("training").await;
    broker.subscribe("kept").await;
    let output = yard.output(&["config", "check"]).await;
    let warns = |name: &str, of: &str| {
        let warning = format!("# warning: subscription {name}: ");
        let mut lines = output.stdout.lines();
        lines.any(|line| line.starts_with(&warning) && line.contains(of))
    };
    assert!(warns("training", "for 7days, longer"), "{}", output.stdout);
    assert!(warns("training", "after 5 deliveries"), "{}", output.stdout);
    assert!(warns("kept", "for 7days, longer"), "{}", output.stdout);
    assert!(!warns("kept", "deliveries"), "{}", output.stdout);
}

#[tokio::test]
async fn a_job_that_does_not_exist_is_said_to_be_missing() {
    let (_broker, database, yard) = yard("").await;
    database.open_migrated().await;
    let id = "01990000-0000-7000-8000-000000000000";
    fails(&yard, &["jobs", "show", id], OTHER, &[id]).await;
}

#[tokio::test]
async fn dev_once_trains_the_samples_and_suppresses_the_duplicate() {
    let folder = tempfile::tempdir().unwrap();
    let mut command = trainyard();
    command
        .args(["dev", "--once", "--port", "0"])
        .current_dir(folder.path());
    let output = output_of(command).await;
    assert_eq!(output.code, 0, "{}{}", output.stdout, output.stderr);
    assert!(
        output
            .stdout
            .contains("1 duplicate delivery was suppressed")
    );
    assert!(folder.path().join(".trainyard/trainyard.db").exists());
}

/// The worker of another `dev` would run some of the samples.
#[tokio::test]
async fn dev_refuses_a_directory_that_another_uses() {
    let folder = tempfile::tempdir().unwrap();
    let lock = std::fs::File::create(folder.path().join("dev.lock")).unwrap();
    lock.lock().unwrap();
    let mut command = trainyard();
    command
        .args(["dev", "--once", "--port", "0", "--dir"])
        .arg(folder.path());
    let output = output_of(command).await;
    assert_eq!(output.code, 1, "{}", output.stderr);
    assert!(output.stderr.contains("another `trainyard dev` runs in"));
}

#[tokio::test]
async fn dev_refuses_a_configuration_file() {
    let folder = tempfile::tempdir().unwrap();
    let mut command = trainyard();
    command
        .args(["dev", "--once", "--config", "mine.toml"])
        .current_dir(folder.path());
    let output = output_of(command).await;
    assert_eq!(output.code, 2, "{}", output.stderr);
    assert!(output.stderr.contains("takes no --config"));
    assert!(!folder.path().join(".trainyard").exists());
}

fn emulator(faults: &str) -> Command {
    let mut command = trainyard();
    command.args(["emulator", "--port", "0", "--faults", faults]);
    command
}

/// The first line that a command writes to stderr; the command is then killed.
async fn first_words(mut command: Command) -> String {
    command.stdout(Stdio::null()).stderr(Stdio::piped());
    let mut child = command.spawn().unwrap();
    let mut lines = BufReader::new(child.stderr.take().unwrap()).lines();
    let line = timeout(PATIENCE, lines.next_line()).await.unwrap();
    line.unwrap().unwrap()
}

#[tokio::test]
async fn the_emulator_prints_its_faults_and_a_seed_that_repeats_them() {
    let line = first_words(emulator("duplicates=0.5")).await;
    let seed = line.strip_prefix("faults: duplicates=0.5; --seed ");
    let seed = seed.and_then(|rest| rest.strip_suffix(" repeats them"));
    let seed = seed.unwrap_or_else(|| panic!("{line}"));
    let mut repeated = emulator("duplicates=0.5");
    repeated.args(["--seed", seed]);
    assert_eq!(first_words(repeated).await, line);
}

#[tokio::test]
async fn the_emulator_refuses_a_bad_fault() {
    let output = output_of(emulator("duplicates=often")).await;
    assert_eq!(output.code, CONFIGURATION);
    let reason = "a number from 0 to 1";
    assert!(output.stderr.contains(reason), "{}", output.stderr);
}
