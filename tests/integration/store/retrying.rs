//! Requests to run a job again.

use std::sync::Arc;

use futures::future::join_all;
use trainyard::job::{Acquired, Can, Claim, ClaimRequest, FinalState};
use trainyard::outcome::{DeadReason, Ending};
use trainyard::record::{JobState, Retrying};
use trainyard::store::{GivenUp, Refusal, Standing, Store};
use uuid::Uuid;

use crate::on_every_store;
use crate::support::database::Database;
use crate::support::jobs::{
    ENDED, LONG, acquire, acquired, assert_is_stale, assert_none_to_reap, assert_waits, claim,
    dead, failed, finish, job_of, kinds, look, ordered, pass_the_lease, patience, reach, reap,
    reap_one, reaped_keys, refusal, request, send, story_of, succeeded, terms,
};

on_every_store!(
    an_ended_job_waits_again_as_if_it_had_not_ended,
    a_retried_jobs_attempt_goes_on_growing_and_counts_from_one,
    the_run_that_ended_a_retried_job_writes_nothing_more,
    a_retried_job_ends_once_more,
    a_retried_jobs_message_that_comes_again_runs_it,
    a_waiting_job_may_run_at_once,
    a_retry_of_a_waiting_job_keeps_its_attempts,
    a_retry_of_a_job_that_waits_for_room_keeps_its_place,
    a_running_job_is_left_alone,
    a_lost_run_is_left_to_be_taken_over,
    a_message_without_a_task_has_nothing_to_run,
    a_message_that_is_no_longer_kept_has_nothing_to_run,
    a_refused_message_with_a_task_can_run,
    a_message_that_was_given_up_can_run,
    an_ordered_job_takes_its_place_at_the_end,
    a_retry_forgets_the_request_to_cancel,
    a_job_that_does_not_exist_is_not_retried,
    of_many_retries_one_queues_the_job,
);

async fn retry(store: &Arc<dyn Store>, id: Uuid) -> Retrying {
    store.retry(id, "anna").await.unwrap().unwrap()
}

fn endings() -> [Ending; 3] {
    [succeeded(), dead("broken"), Ending::cancelled()]
}

async fn an_ended_job_waits_again_as_if_it_had_not_ended(database: Database) {
    let store = database.open_migrated().await;
    store.know(&reach()).await.unwrap();
    for (key, ending) in ["1", "2", "3"].into_iter().zip(endings()) {
        let run = acquire(&store, key, LONG).await;
        assert!(finish(&store, &run.fence, ending).await);
        assert_eq!(retry(&store, run.job_id).await, Retrying::Queued);
        let job = job_of(&store, &run).await;
        assert_eq!((job.state, job.attempts), (JobState::Waiting, 0));
        assert_eq!((job.error, job.reason), (None, None));
        assert_eq!((job.result, job.finished_at), (None, None));
        assert_eq!(
            (job.waits_until, job.waits_for.as_deref()),
            (None, Some("room"))
        );
        assert!(job.payload.is_some());
        assert!(matches!(
            look(&store, &run.fence.key).await,
            Standing::Waiting { remaining: ENDED }
        ));
        let story = story_of(&store, key).await;
        assert_eq!(kinds(&story)[2..], [("retried", None)]);
        assert_eq!(story.ledger[2].worker, "anna");
    }
}

async fn a_retried_jobs_attempt_goes_on_growing_and_counts_from_one(database: Database) {
    let store = database.open_migrated().await;
    let mut run = acquire(&store, "1", LONG).await;
    for (attempt, ending) in (2..).zip(endings()) {
        assert!(finish(&store, &run.fence, ending).await);
        assert_eq!(retry(&store, run.job_id).await, Retrying::Queued);
        pass_the_lease().await;
        run = reap_one(&store, "1").await;
        assert_eq!((run.fence.attempt, run.counted_attempts), (attempt, 1));
        let job = job_of(&store, &run).await;
        assert_eq!((job.state, job.attempts), (JobState::Running, 1));
    }
    assert!(finish(&store, &run.fence, succeeded()).await);
    assert_eq!(job_of(&store, &run).await.attempts, 1);
}

/// Its writes are refused while the job waits, once it runs, and under its old token.
async fn the_run_that_ended_a_retried_job_writes_nothing_more(database: Database) {
    let store = database.open_migrated().await;
    let first = acquire(&store, "1", LONG).await;
    assert!(finish(&store, &first.fence, succeeded()).await);
    retry(&store, first.job_id).await;
    let waiting = job_of(&store, &first).await;
    assert_is_stale(&store, &first.fence).await;
    assert_eq!(job_of(&store, &first).await, waiting);
    pass_the_lease().await;
    let second = acquire(&store, "1", LONG).await;
    let running = job_of(&store, &second).await;
    assert_is_stale(&store, &first.fence).await;
    assert_eq!(job_of(&store, &second).await, running);
    assert!(finish(&store, &second.fence, dead("broken")).await);
    assert_is_stale(&store, &first.fence).await;
}

async fn a_retried_job_ends_once_more(database: Database) {
    let store = database.open_migrated().await;
    let first = acquire(&store, "1", LONG).await;
    assert!(finish(&store, &first.fence, dead("broken")).await);
    retry(&store, first.job_id).await;
    pass_the_lease().await;
    let second = acquire(&store, "1", LONG).await;
    assert!(finish(&store, &second.fence, succeeded()).await);
    let job = job_of(&store, &second).await;
    assert_eq!((job.state, job.attempts), (JobState::Succeeded, 1));
    assert_eq!((job.error, job.reason), (None, None));
    assert!(finish(&store, &second.fence, dead("too late")).await);
    assert_eq!(job_of(&store, &second).await.state, JobState::Succeeded);
    let ended = Claim::AlreadyFinished(FinalState::Succeeded);
    assert_eq!(claim(&store, "1", LONG).await, ended);
}

async fn a_retried_jobs_message_that_comes_again_runs_it(database: Database) {
    let store = database.open_migrated().await;
    let first = acquire(&store, "1", LONG).await;
    assert!(finish(&store, &first.fence, succeeded()).await);
    retry(&store, first.job_id).await;
    pass_the_lease().await;
    let second = acquire(&store, "1", LONG).await;
    assert_eq!(second.job_id, first.job_id);
    assert_eq!(job_of(&store, &second).await.duplicates, 0);
}

async fn a_waiting_job_may_run_at_once(database: Database) {
    let store = database.open_migrated().await;
    let run = acquire(&store, "1", LONG).await;
    let waits = failed(&run.fence, "disk full", LONG);
    assert!(store.release(&waits).await.unwrap());
    assert_none_to_reap(&store).await;
    assert_eq!(retry(&store, run.job_id).await, Retrying::Hurried);
    pass_the_lease().await;
    assert_eq!(retry(&store, run.job_id).await, Retrying::Hurried);
    pass_the_lease().await;
    reap_one(&store, "1").await;
    let told = story_of(&store, "1").await;
    assert_eq!(kinds(&told)[2..4], [("retried", None), ("retried", None)]);
}

async fn a_retry_of_a_job_that_waits_for_room_keeps_its_place(database: Database) {
    let store = database.open_migrated().await;
    let recorded = |key: &str| ClaimRequest {
        can: Can::Record,
        ..request(key)
    };
    let first = recorded("first");
    assert_waits(&send(&store, &first, &terms(LONG)).await);
    pass_the_lease().await;
    assert_waits(&send(&store, &recorded("second"), &terms(LONG)).await);
    pass_the_lease().await;
    assert_eq!(retry(&store, first.job_id).await, Retrying::Hurried);
    assert_eq!(reaped_keys(&reap(&store, 2).await), ["first", "second"]);
}

async fn a_retry_of_a_waiting_job_keeps_its_attempts(database: Database) {
    let store = database.open_migrated().await;
    let run = acquire(&store, "1", LONG).await;
    let waits = failed(&run.fence, "disk full", LONG);
    assert!(store.release(&waits).await.unwrap());
    retry(&store, run.job_id).await;
    let job = job_of(&store, &run).await;
    assert_eq!((job.state, job.attempts), (JobState::Waiting, 1));
    assert_eq!(job.error.as_deref(), Some("disk full"));
    pass_the_lease().await;
    let second = acquire(&store, "1", LONG).await;
    assert_eq!((second.fence.attempt, second.counted_attempts), (2, 2));
}

async fn a_running_job_is_left_alone(database: Database) {
    let store = database.open_migrated().await;
    let run = acquire(&store, "1", LONG).await;
    let before = story_of(&store, "1").await;
    assert_eq!(retry(&store, run.job_id).await, Retrying::Running);
    assert_eq!(story_of(&store, "1").await, before);
    assert!(finish(&store, &run.fence, succeeded()).await);
}

/// The lost run still counts as a crash.
async fn a_lost_run_is_left_to_be_taken_over(database: Database) {
    let store = database.open_migrated().await;
    let lost = acquire(&store, "1", ENDED).await;
    pass_the_lease().await;
    assert_eq!(retry(&store, lost.job_id).await, Retrying::Running);
    let taken = reap_one(&store, "1").await;
    assert_eq!(taken.fence.attempt, 2);
    let told = story_of(&store, "1").await;
    assert_eq!(kinds(&told)[1], ("taken_over", Some(2)));
}

async fn a_message_without_a_task_has_nothing_to_run(database: Database) {
    let store = database.open_migrated().await;
    let malformed = refusal("1");
    store.refuse(&malformed).await.unwrap();
    let before = story_of(&store, "1").await;
    assert_eq!(
        retry(&store, malformed.job_id).await,
        Retrying::NothingToRun
    );
    assert_eq!(story_of(&store, "1").await, before);
    assert_eq!(before.job.state, JobState::Dead);
}

async fn a_message_that_is_no_longer_kept_has_nothing_to_run(database: Database) {
    let store = database.open_migrated().await;
    let run = acquire(&store, "1", LONG).await;
    assert!(finish(&store, &run.fence, dead("broken")).await);
    let tables = database.tables().await;
    let forget = "UPDATE processed_messages SET payload = NULL";
    assert_eq!(tables.execute(forget.to_owned()).await, 1);
    assert_eq!(retry(&store, run.job_id).await, Retrying::NothingToRun);
    assert_eq!(job_of(&store, &run).await.state, JobState::Dead);
}

async fn a_refused_message_with_a_task_can_run(database: Database) {
    let store = database.open_migrated().await;
    let refused = Refusal {
        task: Some("train".to_owned()),
        reason: DeadReason::NoDedupeKey,
        ..refusal("1")
    };
    store.refuse(&refused).await.unwrap();
    assert_eq!(retry(&store, refused.job_id).await, Retrying::Queued);
    pass_the_lease().await;
    let run = reap_one(&store, "1").await;
    assert_eq!(run.job_id, refused.job_id);
    assert_eq!((run.fence.attempt, run.counted_attempts), (1, 1));
    assert!(finish(&store, &run.fence, succeeded()).await);
}

async fn a_message_that_was_given_up_can_run(database: Database) {
    let store = database.open_migrated().await;
    let mut unknown = request("1");
    unknown.can = Can::RecordUnknown;
    assert_waits(&send(&store, &unknown, &terms(LONG)).await);
    let given_up = GivenUp {
        key: unknown.key.clone(),
        error: "no task `train` is known here".to_owned(),
        worker: "w1".into(),
        dead_letter_topic: None,
    };
    let gone = store
        .give_up_unknown(std::slice::from_ref(&given_up), patience(ENDED))
        .await;
    assert_eq!(gone.unwrap(), [unknown.key.clone()]);
    assert_eq!(retry(&store, unknown.job_id).await, Retrying::Queued);
    // It waits anew.
    let gone = store
        .give_up_unknown(std::slice::from_ref(&given_up), patience(LONG))
        .await;
    assert_eq!(gone.unwrap(), []);
    pass_the_lease().await;
    let run = reap_one(&store, "1").await;
    assert_eq!((run.fence.attempt, run.counted_attempts), (1, 1));
}

async fn an_ordered_job_takes_its_place_at_the_end(database: Database) {
    let store = database.open_migrated().await;
    let put = async |key: &str| send(&store, &ordered(key), &terms(LONG)).await;
    let first = acquired(put("1").await);
    assert_waits(&put("2").await);
    assert_waits(&put("3").await);
    assert!(finish(&store, &first.fence, dead("broken")).await);
    assert_eq!(retry(&store, first.job_id).await, Retrying::Queued);
    assert_waits(&put("4").await);
    pass_the_lease().await;
    assert_waits(&put("1").await);
    for next in ["2", "3", "1", "4"] {
        let run = reap_one(&store, next).await;
        assert!(finish(&store, &run.fence, succeeded()).await);
    }
    // Hurried, the last one still waits for the others.
    assert_eq!(retry(&store, first.job_id).await, Retrying::Queued);
    let last = ordered("5");
    assert_waits(&send(&store, &last, &terms(LONG)).await);
    assert_eq!(retry(&store, last.job_id).await, Retrying::Hurried);
    pass_the_lease().await;
    reap_one(&store, "1").await;
}

async fn a_retry_forgets_the_request_to_cancel(database: Database) {
    let store = database.open_migrated().await;
    let run = acquire(&store, "1", LONG).await;
    store.cancel(run.job_id, "anna").await.unwrap();
    assert!(finish(&store, &run.fence, Ending::cancelled()).await);
    assert_eq!(retry(&store, run.job_id).await, Retrying::Queued);
    pass_the_lease().await;
    let again = acquire(&store, "1", LONG).await;
    assert!(!again.cancel_requested);
    let told = store.cancelled_runs("w1").await.unwrap();
    assert!(told.is_empty(), "{told:?}");
}

async fn a_job_that_does_not_exist_is_not_retried(database: Database) {
    let store = database.open_migrated().await;
    let run = acquire(&store, "1", LONG).await;
    assert!(finish(&store, &run.fence, succeeded()).await);
    assert_eq!(store.retry(Uuid::now_v7(), "anna").await.unwrap(), None);
    assert_eq!(job_of(&store, &run).await.state, JobState::Succeeded);
}

async fn of_many_retries_one_queues_the_job(database: Database) {
    let store = database.open_migrated().await;
    let mut run: Acquired = acquire(&store, "1", LONG).await;
    for attempt in 2..8 {
        assert!(finish(&store, &run.fence, dead("broken")).await);
        let id = run.job_id;
        let retries = join_all((0..8).map(|_| {
            let store = Arc::clone(&store);
            tokio::spawn(async move { retry(&store, id).await })
        }))
        .await;
        let answers: Vec<Retrying> = retries.into_iter().map(Result::unwrap).collect();
        let queued = answers.iter().filter(|a| **a == Retrying::Queued).count();
        let hurried = answers.iter().filter(|a| **a == Retrying::Hurried).count();
        assert_eq!((queued, hurried), (1, 7), "{answers:?}");
        pass_the_lease().await;
        run = reap_one(&store, "1").await;
        assert_eq!((run.fence.attempt, run.counted_attempts), (attempt, 1));
    }
}
