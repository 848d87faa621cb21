//! Jobs that wait for a worker that knows their task.

use std::sync::Arc;
use std::time::Duration;

use trainyard::job::{Can, Claim, ClaimRequest, FinalState, JobKey};
use trainyard::record::JobState;
use trainyard::store::{GivenUp, Store};

use crate::on_every_store;
use crate::support::database::{Database, Tables};
use crate::support::jobs::{
    LONG, acked_after, acquire, acquired, assert_waits, failed, finish, interrupted, job_at,
    job_of, kinds, pass_the_lease, reap, reap_one, reaped_keys, request, send, story_of, succeeded,
    terms,
};

on_every_store!(
    a_message_of_an_unknown_task_waits_on_record,
    a_worker_that_knows_the_task_runs_it,
    a_worker_that_knows_the_task_reaps_it,
    an_unknown_task_is_given_up_only_after_the_patience,
    a_job_that_was_given_up_is_dead_and_tells_why,
    giving_up_again_changes_nothing,
    a_job_that_has_begun_is_not_given_up,
    a_job_that_waits_for_room_is_not_given_up,
    a_job_that_is_not_on_record_cannot_be_given_up,
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

/// As if the message had arrived that long ago.
async fn waits_since(tables: &Tables, ago: Duration) {
    let then = tables.ago(ago);
    let sql = format!("UPDATE leases SET unknown_since = {then}");
    assert_eq!(tables.execute(sql).await, 1);
}

async fn give_up(store: &Arc<dyn Store>, key: &str, patience: Duration) -> bool {
    let given_up = GivenUp {
        key: JobKey::new("s", key),
        error: "no task\0`train`".to_owned(),
        worker: "w2".into(),
        dead_letter_topic: None,
    };
    let given_up = store.give_up_unknown(&[given_up], patience).await.unwrap();
    given_up == [JobKey::new("s", key)]
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
    assert!(!give_up(&store, "1", PATIENCE).await);
    waits_since(&tables, PATIENCE - Duration::from_secs(60)).await;
    assert!(!give_up(&store, "1", PATIENCE).await);
    // Deliveries that arrive meanwhile do not restart the wait.
    record(&store, "1").await;
    waits_since(&tables, PATIENCE + Duration::from_secs(1)).await;
    record(&store, "1").await;
    let job = job_at(&store, recorded.job_id).await;
    assert_eq!(job.state, JobState::Waiting);
    assert!(give_up(&store, "1", PATIENCE).await);
}

async fn a_job_that_was_given_up_is_dead_and_tells_why(database: Database) {
    let store = database.open_migrated().await;
    let recorded = record(&store, "1").await;
    assert!(give_up(&store, "1", Duration::ZERO).await);
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
    assert!(give_up(&store, "1", Duration::ZERO).await);
    let before = story_of(&store, "1").await;
    assert!(!give_up(&store, "1", Duration::ZERO).await);
    assert_eq!(story_of(&store, "1").await, before);
}

/// The job is kept while it runs and while it waits again.
async fn a_job_that_has_begun_is_not_given_up(database: Database) {
    let store = database.open_migrated().await;
    record(&store, "1").await;
    let run = acquire(&store, "1", LONG).await;
    assert!(!give_up(&store, "1", Duration::ZERO).await);
    assert!(store.release(&interrupted(&run.fence)).await.unwrap());
    assert!(!give_up(&store, "1", Duration::ZERO).await);
    pass_the_lease().await;
    let run = acquire(&store, "1", LONG).await;
    let failed = failed(&run.fence, "disk full", LONG);
    assert!(store.release(&failed).await.unwrap());
    record(&store, "1").await;
    assert!(!give_up(&store, "1", Duration::ZERO).await);
    assert_eq!(job_of(&store, &run).await.state, JobState::Waiting);
}

async fn a_job_that_waits_for_room_is_not_given_up(database: Database) {
    let store = database.open_migrated().await;
    let mut recorded = request("1");
    recorded.can = Can::Record;
    assert_waits(&send(&store, &recorded, &terms(LONG)).await);
    assert!(!give_up(&store, "1", Duration::ZERO).await);
    acquired(send(&store, &request("1"), &terms(LONG)).await);
}

async fn a_job_that_is_not_on_record_cannot_be_given_up(database: Database) {
    let store = database.open_migrated().await;
    assert!(!give_up(&store, "1", Duration::ZERO).await);
    assert_eq!(store.stories("1").await.unwrap(), []);
}
