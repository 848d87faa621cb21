//! Ordering keys: one job after another within a key, keys in parallel.

use std::collections::BTreeMap;

use chrono::Utc;
use serde_json::json;
use trainyard::pubsub::Outgoing;
use trainyard::record::JobState;

use crate::on_both_databases;
use crate::support::broker::Broker;
use crate::support::database::Database;
use crate::support::eventually;
use crate::support::runs::RunEvent;
use crate::support::scene::{PATIENT, SUBSCRIPTION, Scene, Settings};

on_both_databases!(
    jobs_of_one_key_run_in_order_whatever_the_ack_timing,
    a_blocked_key_does_not_block_the_others,
    a_dead_head_lets_its_key_go_on,
    a_failing_head_keeps_its_place,
    a_failing_head_is_soon_tried_again,
    order_outlives_a_killed_worker,
);

const ACK_TIMINGS: [&str; 3] = ["before_run", "after_checkpoint", "after_run"];

async fn scene(database: &Database, settings: &Settings) -> Scene {
    let broker = Broker::builtin().await.unwrap();
    broker.subscribe_in_order(SUBSCRIPTION).await;
    Scene::set(broker, SUBSCRIPTION, database, database, settings).await
}

/// Publishes with an ordering key; the label is the key and a number.
async fn publish(scene: &Scene, key: &str, number: usize, fields: serde_json::Value) -> String {
    let mut fields = fields;
    fields["label"] = format!("{key}{number}").into();
    let message = Outgoing {
        data: scene.runs.rehearsal(fields).into(),
        ordering_key: key.to_owned(),
        ..Outgoing::default()
    };
    let published = scene.broker.connection.publish(SUBSCRIPTION, message).await;
    published.unwrap()
}

/// Checks that no run of a key begins before the previous one has ended; returns the
/// labels of the successful runs, by key.
fn ended_by_key(scene: &Scene) -> BTreeMap<String, Vec<String>> {
    let mut running: BTreeMap<String, String> = BTreeMap::new();
    let mut ended: BTreeMap<String, Vec<String>> = BTreeMap::new();
    for line in scene.runs.lines() {
        let label = line.label.unwrap();
        let key = label[..1].to_owned();
        match line.event {
            RunEvent::Start => {
                let other = running.insert(key, label.clone());
                assert!(other.is_none(), "{label} began during {other:?}");
            }
            RunEvent::End => {
                running.remove(&key);
                ended.entry(key).or_default().push(label);
            }
            RunEvent::Stopped => {
                running.remove(&key);
            }
        }
    }
    ended
}

fn numbered(key: &str, how_many: usize) -> Vec<String> {
    (0..how_many)
        .map(|number| format!("{key}{number}"))
        .collect()
}

async fn jobs_of_one_key_run_in_order_whatever_the_ack_timing(database: Database) {
    for ack in ACK_TIMINGS {
        for prefetch in [0, 20] {
            let settings = Settings {
                slots: 4,
                ack,
                prefetch,
                ..PATIENT
            };
            let scene = scene(&database, &settings).await;
            let _workers = [scene.start_worker("w1"), scene.start_worker("w2")];
            for number in 0..8 {
                for key in ["a", "b", "c"] {
                    let fields = json!({"seconds": 0.02, "checkpoint_after": 0.0});
                    publish(&scene, key, number, fields).await;
                }
            }
            scene.all_succeed(24).await;
            let ended = ended_by_key(&scene);
            for key in ["a", "b", "c"] {
                assert_eq!(ended[key], numbered(key, 8), "{ack} {prefetch}");
            }
            scene.nothing_is_left_to_deliver().await;
        }
    }
}

async fn a_blocked_key_does_not_block_the_others(database: Database) {
    for ack in ACK_TIMINGS {
        let settings = Settings {
            slots: 2,
            ack,
            ..PATIENT
        };
        let scene = scene(&database, &settings).await;
        let _worker = scene.start_worker("w1");
        let gate = scene.folder().join("gate");
        let blocked = publish(&scene, "a", 0, json!({"until": gate})).await;
        scene.job(&blocked, JobState::Running).await;
        for number in 1..4 {
            publish(&scene, "a", number, json!({})).await;
        }
        for number in 0..4 {
            let id = publish(&scene, "b", number, json!({})).await;
            scene.job(&id, JobState::Succeeded).await;
        }
        assert_eq!(ended_by_key(&scene).keys().collect::<Vec<_>>(), ["b"]);
        std::fs::write(&gate, "").unwrap();
        scene.all_succeed(8).await;
        assert_eq!(ended_by_key(&scene)["a"], numbered("a", 4), "{ack}");
    }
}

async fn a_dead_head_lets_its_key_go_on(database: Database) {
    let settings = Settings {
        ack: "before_run",
        ..PATIENT
    };
    let scene = scene(&database, &settings).await;
    let _worker = scene.start_worker("w1");
    let head = publish(&scene, "a", 0, json!({"fail": "transient"})).await;
    let next = publish(&scene, "a", 1, json!({})).await;
    scene.job(&next, JobState::Succeeded).await;
    assert_eq!(scene.job(&head, JobState::Dead).await.attempts, 3);
    assert_eq!(scene.started(), ["a0", "a0", "a0", "a1"]);
}

async fn a_failing_head_keeps_its_place(database: Database) {
    for ack in ACK_TIMINGS {
        let settings = Settings {
            slots: 3,
            ack,
            ..PATIENT
        };
        let scene = scene(&database, &settings).await;
        let _worker = scene.start_worker("w1");
        let failing = json!({"fail": "transient", "fail_attempts": 2});
        publish(&scene, "a", 0, failing).await;
        for number in 1..4 {
            publish(&scene, "a", number, json!({})).await;
        }
        scene.all_succeed(4).await;
        let expected = ["a0", "a0", "a0", "a1", "a2", "a3"];
        assert_eq!(scene.started(), expected, "{ack}");
    }
}

/// It blocks its key for seconds at most; any other job waits as its task says.
async fn a_failing_head_is_soon_tried_again(database: Database) {
    let scene = scene(&database, &PATIENT).await;
    // The wait is random, from zero on: for a year it is surely more than seconds.
    let a_year = [
        ("TRAINYARD__TASKS__REHEARSAL__BACKOFF__INITIAL", "365days"),
        ("TRAINYARD__TASKS__REHEARSAL__BACKOFF__MAX", "365days"),
    ];
    let _worker = scene.start_worker_with("w1", &a_year);
    let failing = || json!({"fail": "transient", "fail_attempts": 1});
    let ordered = publish(&scene, "a", 0, failing()).await;
    let other = scene.publish_rehearsal(failing()).await;
    for (message, waits) in [(ordered, 0..=10), (other, 60..=i64::MAX)] {
        let job = eventually("it waits for its next attempt", async || {
            let mut jobs = scene.jobs().await.into_iter();
            jobs.find(|job| job.message_id == message && job.waits_until.is_some())
        })
        .await;
        let seconds = (job.waits_until.unwrap() - Utc::now()).num_seconds();
        assert!(waits.contains(&seconds), "{seconds} s, not {waits:?}");
    }
}

async fn order_outlives_a_killed_worker(database: Database) {
    for ack in ACK_TIMINGS {
        let settings = Settings {
            slots: 3,
            ack,
            ..PATIENT
        };
        let scene = scene(&database, &settings).await;
        let mut first = scene.start_doomed_worker("first");
        let gate = scene.folder().join("gate");
        publish(&scene, "a", 0, json!({"until": gate})).await;
        for number in 1..4 {
            publish(&scene, "a", number, json!({})).await;
        }
        eventually("the head has begun", async || {
            (!scene.started().is_empty()).then_some(())
        })
        .await;
        first.kill().await;
        std::fs::write(&gate, "").unwrap();
        let _second = scene.start_worker("second");
        scene.all_succeed(4).await;
        assert_eq!(scene.started(), ["a0", "a0", "a1", "a2", "a3"], "{ack}");
    }
}
