//! Jobs that wait for a worker that knows their task.

use std::collections::BTreeMap;
use std::sync::Arc;
use std::time::Duration;

use trainyard::job::{Can, Claim, ClaimRequest, FinalState, JobKey};
use trainyard::record::{JobState, UnknownTask};
use trainyard::store::{GivenUp, KNOWN_FOR, Patience, Reach, Store};

use crate::on_every_store;
use crate::support::database::{Database, Tables};
use crate::support::jobs::{
    ENDED, LONG, acked_after, acquire, acquired, assert_waits, failed, finish, interrupted, job_at,
    job_of, kinds, ordered, pass_the_lease, patience, reach, reap, reap_one, reaped_keys, request,
    request_of, send, story_of, succeeded, terms,
};

on_every_store!(
    a_message_of_an_unknown_task_waits_on_record,
    a_worker_that_knows_the_task_runs_it,
    a_worker_that_knows_the_task_reaps_it,
    an_unknown_task_is_given_up_only_after_the_patience,
    a_job_that_was_given_up_is_dead_and_tells_why,
    giving_up_again_changes_nothing,
    no_job_of_a_known_task_is_given_up,
    a_task_is_forgotten_once_the_patience_has_passed_since_a_worker_knew_it,
    a_task_that_was_known_once_can_be_spared,
    a_running_job_is_not_given_up_and_a_lost_one_is,
    a_job_that_waits_for_its_next_attempt_is_given_up_after_it,
    what_a_job_that_has_begun_has_done_stays_on_record,
    a_job_behind_another_of_its_ordering_key_is_given_up_too,
    a_look_finds_the_oldest_jobs_of_each_unknown_task_within_reach,
    a_job_that_is_not_on_record_cannot_be_given_up,
    a_waiting_job_tells_that_no_worker_knows_its_task,
    a_worker_says_what_it_knows_only_now_and_then,
);

const PATIENCE: Duration = Duration::from_secs(3_600);

fn unknown(key: &str) -> ClaimRequest {
    ClaimRequest {
        can: Can::RecordUnknown,
        ack: acked_after(Duration::from_secs(60)),
        ..request(key)
    }
}

async fn record(store: &Arc<dyn Store>, key: &str) -> ClaimRequest {
    let unknown = unknown(key);
    assert_waits(&send(store, &unknown, &terms(LONG)).await);
    unknown
}

/// As if all jobs had been queued that long ago.
async fn wait_since(tables: &Tables, ago: Duration) {
    let then = tables.ago(ago);
    let sql = format!("UPDATE leases SET queued_at = {then}");
    assert!(tables.execute(sql).await > 0);
}

/// As if the last worker that knew a task had gone.
async fn known_until(tables: &Tables, then: &str) {
    let sql = format!("UPDATE known_tasks SET known_until = {then}");
    assert!(tables.execute(sql).await > 0);
}

async fn give_up(store: &Arc<dyn Store>, key: &str, patience: Patience) -> bool {
    let given_up = GivenUp {
        key: JobKey::new("s", key),
        error: "no task\0`train`".to_owned(),
        worker: "w2".into(),
        dead_letter_topic: None,
    };
    let given_up = store.give_up_unknown(&[given_up], patience).await.unwrap();
    given_up == [JobKey::new("s", key)]
}

/// The keys that a look finds, sorted.
async fn found(store: &Arc<dyn Store>, patience: Patience, limit: u32) -> Vec<String> {
    let unknown = store.unknown(&["s"], patience, limit).await.unwrap();
    let mut keys: Vec<String> = unknown.iter().map(|job| job.key.key.to_string()).collect();
    keys.sort_unstable();
    keys
}

async fn a_message_of_an_unknown_task_waits_on_record(database: Database) {
    let store = database.open_migrated().await;
    let first = record(&store, "1").await;
    // The same request, as after a lost answer, and another delivery.
    for request in [&first, &unknown("1")] {
        let waiting = send(&store, request, &terms(LONG)).await;
        assert!(matches!(waiting, Claim::Waiting { acked: false, .. }));
    }
    let job = job_at(&store, first.job_id).await;
    assert_eq!((job.state, job.attempts), (JobState::Waiting, 0));
    assert_eq!((job.duplicates, job.error), (0, None));
    let story = story_of(&store, "1").await;
    assert_eq!(kinds(&story), [("queued", None)]);
    let why = story.ledger[0].detail.as_deref().unwrap();
    assert!(why.contains("`train`"), "{why}");
}

async fn a_worker_that_knows_the_task_runs_it(database: Database) {
    let store = database.open_migrated().await;
    let recorded = record(&store, "1").await;
    let run = acquire(&store, "1", LONG).await;
    assert_eq!(run.job_id, recorded.job_id);
    assert_eq!((run.fence.attempt, run.counted_attempts), (1, 1));
    let held = send(&store, &unknown("1"), &terms(LONG)).await;
    assert!(matches!(held, Claim::RunningUntil { .. }));
    assert!(finish(&store, &run.fence, succeeded()).await);
    let ended = send(&store, &unknown("1"), &terms(LONG)).await;
    assert_eq!(ended, Claim::AlreadyFinished(FinalState::Succeeded));
}

async fn a_worker_that_knows_the_task_reaps_it(database: Database) {
    let store = database.open_migrated().await;
    record(&store, "1").await;
    let mut other = unknown("2");
    other.task = "newer".to_owned();
    assert_waits(&send(&store, &other, &terms(LONG)).await);
    let run = reap_one(&store, "1").await;
    assert!(finish(&store, &run.fence, succeeded()).await);
    assert_eq!(reaped_keys(&reap(&store, 10).await), [""; 0]);
}

async fn an_unknown_task_is_given_up_only_after_the_patience(database: Database) {
    let store = database.open_migrated().await;
    let tables = database.tables().await;
    let recorded = record(&store, "1").await;
    assert!(!give_up(&store, "1", patience(PATIENCE)).await);
    wait_since(&tables, PATIENCE - Duration::from_secs(60)).await;
    assert!(!give_up(&store, "1", patience(PATIENCE)).await);
    // Deliveries that arrive meanwhile do not restart the wait.
    record(&store, "1").await;
    wait_since(&tables, PATIENCE + Duration::from_secs(1)).await;
    record(&store, "1").await;
    let job = job_at(&store, recorded.job_id).await;
    assert_eq!(job.state, JobState::Waiting);
    assert_eq!(found(&store, patience(PATIENCE), 10).await, ["1"]);
    assert!(give_up(&store, "1", patience(PATIENCE)).await);
}

async fn a_job_that_was_given_up_is_dead_and_tells_why(database: Database) {
    let store = database.open_migrated().await;
    let recorded = record(&store, "1").await;
    assert!(give_up(&store, "1", patience(Duration::ZERO)).await);
    let job = job_at(&store, recorded.job_id).await;
    assert_eq!((job.state, job.attempts), (JobState::Dead, 0));
    assert_eq!(job.reason.as_deref(), Some("unknown_task"));
    assert!(job.error.unwrap().ends_with("`train`"));
    assert_eq!(job.worker.as_deref(), Some("w2"));
    assert!(job.finished_at.is_some());
    let told = story_of(&store, "1").await;
    assert_eq!(kinds(&told), [("queued", None), ("refused", None)]);
    // Also for a worker that comes to know the task too late.
    let ended = send(&store, &request("1"), &terms(LONG)).await;
    assert_eq!(ended, Claim::AlreadyFinished(FinalState::Dead));
}

async fn giving_up_again_changes_nothing(database: Database) {
    let store = database.open_migrated().await;
    record(&store, "1").await;
    assert!(give_up(&store, "1", patience(Duration::ZERO)).await);
    let before = story_of(&store, "1").await;
    assert!(!give_up(&store, "1", patience(Duration::ZERO)).await);
    assert_eq!(story_of(&store, "1").await, before);
}

async fn no_job_of_a_known_task_is_given_up(database: Database) {
    let store = database.open_migrated().await;
    let tables = database.tables().await;
    record(&store, "1").await;
    wait_since(&tables, PATIENCE).await;
    store.know(&reach()).await.unwrap();
    for patience in [patience(PATIENCE), patience(Duration::ZERO)] {
        assert_eq!(found(&store, patience, 10).await, [""; 0]);
        assert!(!give_up(&store, "1", patience).await);
    }
    acquire(&store, "1", LONG).await;
}

async fn a_task_is_forgotten_once_the_patience_has_passed_since_a_worker_knew_it(
    database: Database,
) {
    let store = database.open_migrated().await;
    let tables = database.tables().await;
    record(&store, "1").await;
    wait_since(&tables, 2 * PATIENCE).await;
    store.know(&reach()).await.unwrap();
    known_until(&tables, &tables.ago(PATIENCE - Duration::from_secs(60))).await;
    assert_eq!(found(&store, patience(PATIENCE), 10).await, [""; 0]);
    assert!(!give_up(&store, "1", patience(PATIENCE)).await);
    known_until(&tables, &tables.ago(PATIENCE + Duration::from_secs(1))).await;
    // A job that came later waits as long.
    record(&store, "2").await;
    assert_eq!(found(&store, patience(PATIENCE), 10).await, ["1", "2"]);
    assert!(!give_up(&store, "2", patience(PATIENCE)).await);
    assert!(give_up(&store, "1", patience(PATIENCE)).await);
}

async fn a_task_that_was_known_once_can_be_spared(database: Database) {
    let store = database.open_migrated().await;
    let tables = database.tables().await;
    store.know(&reach()).await.unwrap();
    known_until(&tables, &tables.ago(2 * PATIENCE)).await;
    record(&store, "known").await;
    let mut never = unknown("never known");
    never.task = "newer".to_owned();
    assert_waits(&send(&store, &never, &terms(LONG)).await);
    wait_since(&tables, 2 * PATIENCE).await;
    let spared = Patience {
        lasts: PATIENCE,
        forgotten: false,
    };
    assert_eq!(found(&store, spared, 10).await, ["never known"]);
    assert!(!give_up(&store, "known", spared).await);
    assert!(give_up(&store, "never known", spared).await);
}

async fn a_running_job_is_not_given_up_and_a_lost_one_is(database: Database) {
    let store = database.open_migrated().await;
    let tables = database.tables().await;
    let run = acquire(&store, "1", LONG).await;
    let now = patience(Duration::ZERO);
    assert_eq!(found(&store, now, 10).await, [""; 0]);
    assert!(!give_up(&store, "1", now).await);
    tables.end_lease(&run.fence.key, PATIENCE / 2).await;
    assert!(!give_up(&store, "1", patience(PATIENCE)).await);
    tables.end_lease(&run.fence.key, 2 * PATIENCE).await;
    assert_eq!(found(&store, patience(PATIENCE), 10).await, ["1"]);
    assert!(give_up(&store, "1", patience(PATIENCE)).await);
    assert!(!finish(&store, &run.fence, succeeded()).await);
    assert_eq!(job_of(&store, &run).await.state, JobState::Dead);
}

async fn a_job_that_waits_for_its_next_attempt_is_given_up_after_it(database: Database) {
    let store = database.open_migrated().await;
    let tables = database.tables().await;
    let run = acquire(&store, "1", LONG).await;
    let failed = failed(&run.fence, "disk full", LONG);
    assert!(store.release(&failed).await.unwrap());
    wait_since(&tables, 2 * PATIENCE).await;
    assert_eq!(found(&store, patience(PATIENCE), 10).await, [""; 0]);
    assert!(!give_up(&store, "1", patience(PATIENCE)).await);
    tables.end_lease(&run.fence.key, PATIENCE / 2).await;
    assert!(!give_up(&store, "1", patience(PATIENCE)).await);
    tables.end_lease(&run.fence.key, 2 * PATIENCE).await;
    assert_eq!(found(&store, patience(PATIENCE), 10).await, ["1"]);
    assert!(give_up(&store, "1", patience(PATIENCE)).await);
}

async fn what_a_job_that_has_begun_has_done_stays_on_record(database: Database) {
    let store = database.open_migrated().await;
    let run = acquire(&store, "1", LONG).await;
    store
        .save_checkpoint(&run.fence, "epoch 7", false)
        .await
        .unwrap();
    assert!(
        store
            .release(&failed(&run.fence, "disk full", ENDED))
            .await
            .unwrap()
    );
    let run = acquire(&store, "1", LONG).await;
    assert!(store.release(&interrupted(&run.fence)).await.unwrap());
    assert!(give_up(&store, "1", patience(Duration::ZERO)).await);
    let job = job_of(&store, &run).await;
    assert_eq!((job.state, job.attempts), (JobState::Dead, 1));
    assert_eq!(job.checkpoint.as_deref(), Some("epoch 7"));
    assert!(job.started_at.is_some());
    // A retry goes on from there, and waits anew.
    store.retry(job.id, "somebody").await.unwrap();
    assert!(!give_up(&store, "1", patience(LONG)).await);
    let run = acquire(&store, "1", LONG).await;
    assert_eq!((run.fence.attempt, run.counted_attempts), (3, 1));
    assert_eq!(run.checkpoint.as_deref(), Some("epoch 7"));
}

async fn a_job_behind_another_of_its_ordering_key_is_given_up_too(database: Database) {
    let store = database.open_migrated().await;
    let first = acquired(send(&store, &ordered("1"), &terms(LONG)).await);
    let second = ClaimRequest {
        task: "older".to_owned(),
        can: Can::RecordUnknown,
        ..ordered("2")
    };
    assert_waits(&send(&store, &second, &terms(LONG)).await);
    assert_waits(&send(&store, &ordered("3"), &terms(LONG)).await);
    store.know(&reach()).await.unwrap();
    let now = patience(Duration::ZERO);
    assert_eq!(found(&store, now, 10).await, ["2"]);
    assert!(give_up(&store, "2", now).await);
    assert_waits(&send(&store, &ordered("3"), &terms(LONG)).await);
    assert!(finish(&store, &first.fence, succeeded()).await);
    reap_one(&store, "3").await;
}

async fn a_look_finds_the_oldest_jobs_of_each_unknown_task_within_reach(database: Database) {
    let store = database.open_migrated().await;
    let of = |subscription: &str, key: &str, task: &str| ClaimRequest {
        task: task.to_owned(),
        can: Can::RecordUnknown,
        ..request_of(subscription, key)
    };
    for key in ["a1", "b1", "a2", "b2", "a3", "c1"] {
        let task = &key[..1];
        assert_waits(&send(&store, &of("s", key, task), &terms(LONG)).await);
        pass_the_lease().await;
    }
    assert_waits(&send(&store, &of("elsewhere", "d1", "d"), &terms(LONG)).await);
    let known = Reach {
        tasks: BTreeMap::from([("c".to_owned(), reach().tasks["train"])]),
        ..reach()
    };
    store.know(&known).await.unwrap();
    let now = patience(Duration::ZERO);
    assert_eq!(found(&store, now, 2).await, ["a1", "a2", "b1", "b2"]);
    assert!(give_up(&store, "a1", now).await);
    assert_eq!(found(&store, now, 2).await, ["a2", "a3", "b1", "b2"]);
    let nowhere = store.unknown(&[], now, 2).await.unwrap();
    assert_eq!(nowhere, []);
}

async fn a_job_that_is_not_on_record_cannot_be_given_up(database: Database) {
    let store = database.open_migrated().await;
    assert!(!give_up(&store, "1", patience(Duration::ZERO)).await);
    assert_eq!(store.stories("1").await.unwrap(), []);
}

async fn a_waiting_job_tells_that_no_worker_knows_its_task(database: Database) {
    let store = database.open_migrated().await;
    let tables = database.tables().await;
    let waiting = record(&store, "1").await;
    let lost = acquire(&store, "2", ENDED).await;
    let waits_for = async |what: [&str; 2]| {
        let [waiting, lost] = [waiting.job_id, lost.job_id].map(|id| job_at(&store, id));
        let told = [waiting.await.waits_for, lost.await.waits_for];
        assert_eq!(told.each_ref().map(|told| told.as_deref()), what.map(Some));
    };
    let of_two = [UnknownTask {
        subscription: "s".to_owned(),
        task: "train".to_owned(),
        jobs: 2,
    }];
    pass_the_lease().await;
    waits_for(["task", "task"]).await;
    assert_eq!(store.unknown_tasks().await.unwrap(), of_two);
    store.know(&reach()).await.unwrap();
    waits_for(["room", "takeover"]).await;
    assert_eq!(store.unknown_tasks().await.unwrap(), []);
    known_until(&tables, &tables.ago(Duration::from_secs(1))).await;
    waits_for(["task", "task"]).await;
    assert_eq!(store.unknown_tasks().await.unwrap(), of_two);
}

async fn a_worker_says_what_it_knows_only_now_and_then(database: Database) {
    let store = database.open_migrated().await;
    let tables = database.tables().await;
    let until = async || {
        let sql = "SELECT CAST(known_until AS text) FROM known_tasks";
        let mut rows: Vec<(String,)> = tables.fetch(sql.to_owned()).await;
        assert_eq!(rows.len(), 1);
        rows.remove(0).0
    };
    store.know(&reach()).await.unwrap();
    let first = until().await;
    store.know(&reach()).await.unwrap();
    assert_eq!(until().await, first);
    known_until(
        &tables,
        &tables.ahead(KNOWN_FOR / 2 - Duration::from_secs(1)),
    )
    .await;
    let soon = until().await;
    store.know(&reach()).await.unwrap();
    assert_ne!(until().await, soon);
    // What an earlier worker has been promised stays.
    known_until(&tables, &tables.ahead(2 * KNOWN_FOR)).await;
    let later = until().await;
    store.know(&reach()).await.unwrap();
    assert_eq!(until().await, later);
}
