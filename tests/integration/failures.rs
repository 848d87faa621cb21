//! Runs that fail, and messages that nobody can run.

use serde_json::json;
use trainyard::record::JobState;

use crate::on_both_databases;
use crate::support::database::{Database, Tables};
use crate::support::runs::RunEvent;
use crate::support::scene::{PATIENT, Scene, Settings};

on_both_databases!(
    a_transient_failure_is_tried_again_until_it_succeeds,
    a_job_that_keeps_failing_is_dead_after_its_last_attempt,
    a_permanent_failure_is_dead_at_its_first_attempt,
    a_panic_is_a_failure_like_any_other,
    a_success_whose_result_the_database_refuses_is_a_success,
    a_failure_whose_error_the_database_refuses_is_a_failure,
    a_run_that_takes_too_long_is_stopped_and_tried_again,
    a_waiting_retry_holds_no_slot,
    a_retry_comes_before_messages_that_came_later,
    a_retry_goes_on_from_the_last_checkpoint,
    a_message_of_an_unknown_task_runs_once_a_worker_knows_it,
    a_task_at_its_concurrency_leaves_slots_to_the_others,
);

const ACK_TIMINGS: [&str; 3] = ["before_run", "after_checkpoint", "after_run"];

async fn a_transient_failure_is_tried_again_until_it_succeeds(database: Database) {
    for ack in ACK_TIMINGS {
        let settings = Settings { ack, ..PATIENT };
        let scene = Scene::new(&database, &settings).await;
        let worker = scene.start_worker("w1");
        let fields = json!({"fail": "transient", "fail_attempts": 2});
        let id = scene.publish_rehearsal(fields).await;
        let job = scene.job(&id, JobState::Succeeded).await;
        assert_eq!(job.attempts, 3, "{ack}");
        scene.nothing_is_left_to_deliver().await;
        let story = ["claimed", "failed", "told to fail", "failed", "finished"];
        scene.is_explained_by(&id, &story).await;
        assert_eq!(worker.stop().await.code(), Some(0));
    }
}

async fn a_job_that_keeps_failing_is_dead_after_its_last_attempt(database: Database) {
    let scene = Scene::new(&database, &PATIENT).await;
    let _worker = scene.start_worker("w1");
    let id = scene.publish_rehearsal(json!({"fail": "transient"})).await;
    let job = scene.job(&id, JobState::Dead).await;
    assert_eq!(job.attempts, 3);
    assert_eq!(job.error.as_deref(), Some("told to fail"));
    assert_eq!(job.reason.as_deref(), Some("attempts_exhausted"));
    assert_eq!(scene.runs.of(RunEvent::Start).len(), 3);
    scene.nothing_is_left_to_deliver().await;
}

async fn a_permanent_failure_is_dead_at_its_first_attempt(database: Database) {
    let scene = Scene::new(&database, &PATIENT).await;
    let _worker = scene.start_worker("w1");
    let id = scene.publish_rehearsal(json!({"fail": "permanent"})).await;
    let job = scene.job(&id, JobState::Dead).await;
    assert_eq!(job.attempts, 1);
    assert_eq!(job.reason.as_deref(), Some("permanent"));
    scene.nothing_is_left_to_deliver().await;
}

async fn a_panic_is_a_failure_like_any_other(database: Database) {
    let scene = Scene::new(&database, &PATIENT).await;
    let worker = scene.start_worker("w1");
    let fields = json!({"fail": "panic", "fail_attempts": 1});
    let id = scene.publish_rehearsal(fields).await;
    assert_eq!(scene.job(&id, JobState::Succeeded).await.attempts, 2);
    assert_eq!(worker.stop().await.code(), Some(0));
}

/// Makes the database refuse a row of the table that fulfils the condition, as one that
/// cannot store a value does.
async fn refuses(database: &Database, table: &str, condition: &str) {
    let tables = database.tables().await;
    let statements = match tables {
        Tables::Sqlite(_) => vec![format!(
            "CREATE TRIGGER refusing BEFORE UPDATE ON {table} WHEN {condition}
             BEGIN SELECT RAISE(ABORT, 'no such character'); END"
        )],
        Tables::Postgres(_) => vec![
            "CREATE FUNCTION refuse() RETURNS trigger LANGUAGE plpgsql AS $$
             BEGIN RAISE 'no such character' USING ERRCODE = '22P05'; END $$"
                .to_owned(),
            format!(
                "CREATE TRIGGER refusing BEFORE UPDATE ON {table} FOR EACH ROW
                 WHEN ({condition}) EXECUTE FUNCTION refuse()"
            ),
        ],
    };
    for statement in statements {
        tables.execute(statement).await;
    }
}

async fn a_success_whose_result_the_database_refuses_is_a_success(database: Database) {
    let scene = Scene::new(&database, &PATIENT).await;
    refuses(&database, "processed_messages", "NEW.result IS NOT NULL").await;
    let _worker = scene.start_worker("w1");
    let id = scene.publish_rehearsal(json!({})).await;
    let job = scene.job(&id, JobState::Succeeded).await;
    assert_eq!((job.attempts, job.result), (1, None));
    let error = job.error.unwrap();
    assert!(error.starts_with("it succeeded, but the database refused its result"));
    assert_eq!(scene.runs.of(RunEvent::Start).len(), 1);
    scene.nothing_is_left_to_deliver().await;
}

async fn a_failure_whose_error_the_database_refuses_is_a_failure(database: Database) {
    let scene = Scene::new(&database, &PATIENT).await;
    refuses(&database, "leases", "NEW.last_error = 'told to fail'").await;
    let _worker = scene.start_worker("w1");
    let fields = json!({"fail": "transient", "fail_attempts": 1});
    let id = scene.publish_rehearsal(fields).await;
    let job = scene.job(&id, JobState::Succeeded).await;
    assert_eq!(job.attempts, 2);
    let story = [
        "claimed",
        "failed",
        "the database refused its error",
        "finished",
    ];
    scene.is_explained_by(&id, &story).await;
}

async fn a_run_that_takes_too_long_is_stopped_and_tried_again(database: Database) {
    let settings = Settings {
        task: "timeout = \"300ms\"\nmax_attempts = 2",
        ..PATIENT
    };
    let scene = Scene::new(&database, &settings).await;
    let _worker = scene.start_worker("w1");
    let id = scene.publish_rehearsal(json!({"seconds": 3600})).await;
    let job = scene.job(&id, JobState::Dead).await;
    assert_eq!(job.attempts, 2);
    assert_eq!(scene.runs.of(RunEvent::Stopped).len(), 2);
    assert!(job.error.unwrap().contains("timeout"));
}

/// The only slot runs another job while the failed one waits for an hour.
async fn a_waiting_retry_holds_no_slot(database: Database) {
    let settings = Settings {
        slots: 1,
        backoff: "{ initial = \"100h\", max = \"100h\" }",
        task: "max_attempts = 2",
        ..PATIENT
    };
    let scene = Scene::new(&database, &settings).await;
    let _worker = scene.start_worker("w1");
    let waiting = scene.publish_rehearsal(json!({"fail": "transient"})).await;
    let job = scene.job(&waiting, JobState::Waiting).await;
    assert_eq!(job.error.as_deref(), Some("told to fail"));
    let other = scene.publish_rehearsal(json!({})).await;
    scene.job(&other, JobState::Succeeded).await;
    // A person's request ends the wait.
    let told = scene
        .command(&["jobs", "retry", &job.id.to_string()])
        .await
        .stdout;
    assert!(told.contains("its next attempt starts"), "{told}");
    scene.job(&waiting, JobState::Dead).await;
    scene.nothing_is_left_to_deliver().await;
}

/// Holds for many later messages, prefetched or not.
async fn a_retry_comes_before_messages_that_came_later(database: Database) {
    const NEW: usize = 40;
    for prefetch in [0, 100] {
        let settings = Settings {
            slots: 1,
            prefetch,
            ..PATIENT
        };
        let scene = Scene::new(&database, &settings).await;
        let fields = json!({"label": "retried", "fail": "transient", "fail_attempts": 1});
        scene.publish_rehearsal(fields).await;
        for _ in 0..NEW {
            scene
                .publish_rehearsal(json!({"label": "new", "seconds": 0.1}))
                .await;
        }
        let worker = scene.start_worker("w1");
        scene.all_succeed(NEW + 1).await;
        let started = scene.started();
        let retry = started
            .iter()
            .rposition(|label| label == "retried")
            .unwrap();
        // The queue is swept about every second, which is ten runs.
        assert!(
            retry < NEW * 3 / 4,
            "{retry}th of {NEW}: prefetch {prefetch}"
        );
        assert_eq!(worker.stop().await.code(), Some(0));
    }
}

async fn a_retry_goes_on_from_the_last_checkpoint(database: Database) {
    let settings = Settings {
        ack: "after_checkpoint",
        ..PATIENT
    };
    let scene = Scene::new(&database, &settings).await;
    let _worker = scene.start_worker("w1");
    let fields = json!({
        "seconds": 0.3, "checkpoint_after": 0.0, "fail": "transient", "fail_attempts": 1,
    });
    let id = scene.publish_rehearsal(fields).await;
    let job = scene.job(&id, JobState::Succeeded).await;
    assert_eq!(job.checkpoint.as_deref(), Some("rehearsal of attempt 2"));
    let starts = scene.runs.of(RunEvent::Start);
    assert_eq!(starts[0].resumed_from, None);
    let resumed_from = starts[1].resumed_from.as_deref();
    assert_eq!(resumed_from, Some("rehearsal of attempt 1"));
    scene
        .is_explained_by(&id, &["checkpointed", "failed", "finished"])
        .await;
}

async fn a_message_of_an_unknown_task_runs_once_a_worker_knows_it(database: Database) {
    let scene = Scene::new(&database, &PATIENT).await;
    let old = scene.start_worker("old");
    let id = scene
        .publish(scene.runs.rehearsal_as("newer", json!({})))
        .await;
    let waiting = scene.job(&id, JobState::Waiting).await;
    assert_eq!(waiting.attempts, 0);
    let config = std::fs::read_to_string(&scene.yard.config).unwrap();
    let config = format!("{config}\n[tasks.newer]\nbuiltin = \"rehearsal\"\n");
    std::fs::write(&scene.yard.config, config).unwrap();
    let new = scene.start_worker("new");
    let job = scene.job(&id, JobState::Succeeded).await;
    assert_eq!((job.attempts, job.duplicates), (1, 0));
    scene.nothing_is_left_to_deliver().await;
    for worker in [old, new] {
        assert_eq!(worker.stop().await.code(), Some(0));
    }
}

/// Two of three heavy jobs wait although slots are free; light ones run.
async fn a_task_at_its_concurrency_leaves_slots_to_the_others(database: Database) {
    for ack in ACK_TIMINGS {
        let settings = Settings {
            slots: 3,
            ack,
            task: "concurrency = 1",
            ..PATIENT
        };
        let scene = Scene::new(&database, &settings).await;
        let config = std::fs::read_to_string(&scene.yard.config).unwrap();
        let config = format!("{config}\n[tasks.light]\nbuiltin = \"rehearsal\"\nack = \"{ack}\"\n");
        std::fs::write(&scene.yard.config, config).unwrap();
        let _worker = scene.start_worker("w1");
        let gate = scene.folder().join("gate");
        let heavy = json!({"until": gate, "label": "heavy"});
        for _ in 0..3 {
            scene.publish_rehearsal(heavy.clone()).await;
        }
        let light = scene.runs.rehearsal_as("light", json!({"label": "light"}));
        let light = scene.publish(light).await;
        scene.job(&light, JobState::Succeeded).await;
        let heavy_starts = || scene.started().iter().filter(|l| *l == "heavy").count();
        assert_eq!(heavy_starts(), 1, "{ack}");
        std::fs::write(&gate, "").unwrap();
        scene.all_succeed(4).await;
        scene.nothing_is_left_to_deliver().await;
    }
}
