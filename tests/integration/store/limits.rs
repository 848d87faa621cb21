//! How often a job may lose its worker before it is dead.

use std::sync::Arc;

use trainyard::job::{Acquired, Claim, ClaimRequest, FinalState, Limits};
use trainyard::record::{JobState, Retrying};
use trainyard::store::{ClaimTerms, Reach, Store};

use crate::on_every_store;
use crate::support::database::Database;
use crate::support::jobs::{
    ENDED, LONG, acquired, failed, finish, interrupted, job_of, kinds, letters, pass_the_lease,
    reap_within, request, send, story_of, succeeded, task_terms, terms,
};

on_every_store!(
    the_last_attempt_that_is_lost_parks_the_job,
    a_reaper_parks_a_job_by_the_limits_of_its_reach,
    the_last_crash_parks_the_job_whatever_attempts_are_left,
    the_largest_limit_of_crashes_is_no_limit,
    failures_count_as_attempts_and_not_as_crashes,
    interruptions_count_neither_as_attempts_nor_as_crashes,
    a_claim_sent_again_at_the_limit_is_confirmed,
    a_job_that_waits_is_not_parked,
    a_retried_job_has_all_its_attempts_and_crashes_again,
);

const LOST_AT_THE_LAST: &str = "its worker was lost during attempt 2 of 2";

/// A request for a job with two attempts, whose dead letter goes to `graves`.
fn twice(key: &str) -> ClaimRequest {
    ClaimRequest {
        limits: Limits {
            max_attempts: 2,
            dead_letter_topic: Some("graves".into()),
        },
        ..request(key)
    }
}

/// Allows more crashes than attempts.
fn many_crashes() -> ClaimTerms {
    ClaimTerms {
        max_crashes: 100,
        ..terms(ENDED)
    }
}

/// A run that is lost with its worker.
async fn crash(store: &Arc<dyn Store>, request: fn(&str) -> ClaimRequest) -> Acquired {
    let lost = acquired(send(store, &request("1"), &many_crashes()).await);
    pass_the_lease().await;
    lost
}

async fn the_last_attempt_that_is_lost_parks_the_job(database: Database) {
    let store = database.open_migrated().await;
    crash(&store, twice).await;
    let last = crash(&store, twice).await;
    assert_eq!(last.counted_attempts, 2);
    for _ in 0..2 {
        let parked = send(&store, &twice("1"), &many_crashes()).await;
        assert_eq!(parked, Claim::AlreadyFinished(FinalState::Dead));
    }
    let job = job_of(&store, &last).await;
    assert_eq!((job.state, job.attempts), (JobState::Dead, 2));
    assert_eq!(job.reason.as_deref(), Some("worker_lost"));
    assert_eq!(job.error.as_deref(), Some(LOST_AT_THE_LAST));
    let parked = ("parked", Some(2));
    assert_eq!(kinds(&story_of(&store, "1").await)[2], parked);
    let letters = letters(&store).await;
    assert_eq!(letters.len(), 1);
    assert_eq!((&*letters[0].topic, letters[0].attempts), ("graves", 2));
    assert_eq!(letters[0].reason.as_deref(), Some("worker_lost"));
    assert!(!finish(&store, &last.fence, succeeded()).await);
}

async fn a_reaper_parks_a_job_by_the_limits_of_its_reach(database: Database) {
    let store = database.open_migrated().await;
    crash(&store, request).await;
    let last = crash(&store, request).await;
    let reach = |max_attempts, topic: Option<&str>| Reach {
        subscriptions: [("s".to_owned(), topic.map(Into::into))].into(),
        tasks: [("train".to_owned(), task_terms(max_attempts))].into(),
    };
    let reap = async |reach: Reach| reap_within(&store, &reach, &many_crashes(), 10).await;
    // By this worker's limit, attempts are left.
    let taken = reap(reach(3, Some("elsewhere"))).await;
    assert_eq!(taken[0].acquired.counted_attempts, 3);
    pass_the_lease().await;
    assert!(reap(reach(3, Some("graves"))).await.is_empty());
    let job = job_of(&store, &last).await;
    assert_eq!((job.state, job.attempts), (JobState::Dead, 3));
    assert_eq!(letters(&store).await[0].topic, "graves");
    assert!(reap(reach(100, None)).await.is_empty());
}

async fn the_last_crash_parks_the_job_whatever_attempts_are_left(database: Database) {
    let store = database.open_migrated().await;
    let with_topic = |key: &str| ClaimRequest {
        limits: Limits {
            max_attempts: 100,
            dead_letter_topic: Some("graves".into()),
        },
        ..request(key)
    };
    for _ in 0..3 {
        acquired(send(&store, &with_topic("1"), &terms(ENDED)).await);
        pass_the_lease().await;
    }
    let parked = send(&store, &with_topic("1"), &terms(LONG)).await;
    assert_eq!(parked, Claim::AlreadyFinished(FinalState::Dead));
    let letters = letters(&store).await;
    assert_eq!((&*letters[0].topic, letters[0].attempts), ("graves", 3));
    assert_eq!(letters[0].reason.as_deref(), Some("worker_lost"));
    assert!(letters[0].error.as_deref().unwrap().contains("3 times"));
}

async fn the_largest_limit_of_crashes_is_no_limit(database: Database) {
    let store = database.open_migrated().await;
    let terms = ClaimTerms {
        max_crashes: u32::MAX,
        ..terms(ENDED)
    };
    for attempt in 1..=3 {
        let run = acquired(send(&store, &request("1"), &terms).await);
        assert_eq!(run.fence.attempt, attempt);
        pass_the_lease().await;
    }
}

async fn failures_count_as_attempts_and_not_as_crashes(database: Database) {
    let store = database.open_migrated().await;
    for _ in 0..4 {
        let run = acquired(send(&store, &request("1"), &terms(LONG)).await);
        let failed = failed(&run.fence, "disk full", ENDED);
        assert!(store.release(&failed).await.unwrap());
        pass_the_lease().await;
    }
    // Three crashes would be too many.
    for _ in 0..3 {
        acquired(send(&store, &request("1"), &terms(ENDED)).await);
        pass_the_lease().await;
    }
    let with_seven = |key: &str| ClaimRequest {
        limits: Limits {
            max_attempts: 7,
            dead_letter_topic: None,
        },
        ..request(key)
    };
    let parked = send(&store, &with_seven("1"), &many_crashes()).await;
    assert_eq!(parked, Claim::AlreadyFinished(FinalState::Dead));
    let error = story_of(&store, "1").await.job.error.unwrap();
    assert_eq!(error, "its worker was lost during attempt 7 of 7");
}

async fn interruptions_count_neither_as_attempts_nor_as_crashes(database: Database) {
    let store = database.open_migrated().await;
    for _ in 0..5 {
        let run = acquired(send(&store, &twice("1"), &terms(LONG)).await);
        assert_eq!(run.counted_attempts, 1);
        assert!(store.release(&interrupted(&run.fence)).await.unwrap());
        pass_the_lease().await;
    }
    crash(&store, twice).await;
    let last = crash(&store, twice).await;
    assert_eq!((last.fence.attempt, last.counted_attempts), (7, 2));
    let parked = send(&store, &twice("1"), &many_crashes()).await;
    assert_eq!(parked, Claim::AlreadyFinished(FinalState::Dead));
    assert_eq!(job_of(&store, &last).await.attempts, 2);
}

/// Its lease has expired, but no other worker has it.
async fn a_claim_sent_again_at_the_limit_is_confirmed(database: Database) {
    let store = database.open_migrated().await;
    crash(&store, twice).await;
    let last = twice("1");
    for _ in 0..3 {
        let run = acquired(send(&store, &last, &many_crashes()).await);
        assert_eq!((run.fence.attempt, run.counted_attempts), (2, 2));
        pass_the_lease().await;
    }
}

/// Its worker decides whether a failed job gets another attempt, and it did.
async fn a_job_that_waits_is_not_parked(database: Database) {
    let store = database.open_migrated().await;
    for attempt in 1..=4 {
        let run = acquired(send(&store, &twice("1"), &terms(LONG)).await);
        assert_eq!(run.counted_attempts, attempt);
        let failed = failed(&run.fence, "disk full", ENDED);
        assert!(store.release(&failed).await.unwrap());
        pass_the_lease().await;
    }
}

async fn a_retried_job_has_all_its_attempts_and_crashes_again(database: Database) {
    let store = database.open_migrated().await;
    for _ in 0..2 {
        crash(&store, twice).await;
    }
    let parked = send(&store, &twice("1"), &many_crashes()).await;
    assert_eq!(parked, Claim::AlreadyFinished(FinalState::Dead));
    let id = story_of(&store, "1").await.job.id;
    let retrying = store.retry(id, "anna").await.unwrap();
    assert_eq!(retrying, Some(Retrying::Queued));
    // Counting the two earlier crashes would leave it one.
    let terms = ClaimTerms {
        max_crashes: 3,
        ..many_crashes()
    };
    for attempt in 1..=2 {
        let run = acquired(send(&store, &twice("1"), &terms).await);
        assert_eq!(run.fence.attempt, 2 + attempt);
        assert_eq!(run.counted_attempts, attempt);
        pass_the_lease().await;
    }
    let parked = send(&store, &twice("1"), &terms).await;
    assert_eq!(parked, Claim::AlreadyFinished(FinalState::Dead));
    let job = story_of(&store, "1").await.job;
    assert_eq!(job.attempts, 2);
    assert_eq!(job.error.as_deref(), Some(LOST_AT_THE_LAST));
}
