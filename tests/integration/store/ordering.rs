//! Jobs of one ordering key run one at a time, in the order of their places.

mod races;

use std::sync::Arc;
use std::time::Duration;

use trainyard::job::{Acquired, Can, Claim, FinalState, JobKey};
use trainyard::outcome::{DeadReason, Ending};
use trainyard::record::JobState;
use trainyard::store::{GivenUp, Refused, Standing, Store};

use crate::on_every_store;
use crate::support::database::Database;
use crate::support::jobs::{
    ENDED, LONG, acquired, assert_none_to_reap, assert_waits, claim, dead, failed, finish,
    interrupted, job_at, kinds, look, ordered, pass_the_lease, patience, reap, reap_one,
    reaped_keys, refusal, request_of, send, story_of, succeeded, terms,
};

on_every_store!(
    the_second_of_an_ordering_key_waits,
    the_second_is_not_reaped_before_the_first_has_ended,
    the_second_runs_once_the_first_has_ended_however_it_did,
    the_second_runs_once_the_waiting_first_is_cancelled,
    the_second_runs_once_the_first_is_parked,
    the_second_runs_once_the_unknown_first_is_given_up,
    order_is_kept_when_the_first_is_given_back,
    order_is_kept_when_the_first_fails_and_waits,
    order_is_kept_when_the_first_is_taken_over,
    jobs_run_in_the_order_of_their_claims,
    of_two_jobs_in_one_batch_the_first_runs,
    a_batch_takes_its_places_in_the_order_of_its_requests,
    a_later_message_that_comes_again_does_not_overtake,
    a_job_recorded_without_room_keeps_its_place,
    jobs_without_an_ordering_key_run_side_by_side,
    ordering_keys_do_not_wait_for_each_other,
    a_refused_message_does_not_hold_up_its_ordering_key,
);

/// Claims a message of the ordering key.
async fn put(store: &Arc<dyn Store>, key: &str) -> Claim {
    send(store, &ordered(key), &terms(LONG)).await
}

/// The first holds its job, the others wait.
async fn queue_up(store: &Arc<dyn Store>, keys: &[&str]) -> Acquired {
    let first = acquired(put(store, keys[0]).await);
    for key in &keys[1..] {
        assert_waits(&put(store, key).await);
    }
    first
}

async fn the_second_of_an_ordering_key_waits(database: Database) {
    let store = database.open_migrated().await;
    queue_up(&store, &["1"]).await;
    let second = ordered("2");
    let waiting = send(&store, &second, &terms(LONG)).await;
    assert!(
        matches!(waiting, Claim::Waiting { acked: false, .. }),
        "{waiting:?}"
    );
    let job = job_at(&store, second.job_id).await;
    assert_eq!((job.state, job.attempts), (JobState::Waiting, 0));
    assert_eq!((job.worker, job.started_at), (None, None));
    assert!(matches!(
        look(&store, &second.key).await,
        Standing::Waiting { .. }
    ));
    assert_eq!(kinds(&story_of(&store, "2").await), [("queued", None)]);
}

async fn the_second_is_not_reaped_before_the_first_has_ended(database: Database) {
    let store = database.open_migrated().await;
    let first = queue_up(&store, &["1", "2"]).await;
    assert_none_to_reap(&store).await;
    let key = &first.fence.key;
    let tables = database.tables().await;
    tables.end_lease(key, Duration::from_secs(1)).await;
    let first = reap_one(&store, "1").await;
    assert!(finish(&store, &first.fence, succeeded()).await);
    let second = reap_one(&store, "2").await;
    assert_eq!((second.fence.attempt, second.counted_attempts), (1, 1));
}

async fn the_second_runs_once_the_first_has_ended_however_it_did(database: Database) {
    let store = database.open_migrated().await;
    let mut head = queue_up(&store, &["0", "1", "2", "3"]).await;
    let endings = [succeeded(), dead("broken"), Ending::cancelled()];
    for (ending, next) in endings.into_iter().zip(["1", "2", "3"]) {
        assert_waits(&put(&store, next).await);
        assert!(finish(&store, &head.fence, ending).await);
        head = acquired(put(&store, next).await);
    }
}

async fn the_second_runs_once_the_waiting_first_is_cancelled(database: Database) {
    let store = database.open_migrated().await;
    let first = queue_up(&store, &["1", "2"]).await;
    let waits = failed(&first.fence, "disk full", LONG);
    assert!(store.release(&waits).await.unwrap());
    assert_none_to_reap(&store).await;
    store.cancel(first.job_id, "anna").await.unwrap();
    reap_one(&store, "2").await;
}

async fn the_second_runs_once_the_first_is_parked(database: Database) {
    let store = database.open_migrated().await;
    for _ in 0..3 {
        acquired(send(&store, &ordered("1"), &terms(ENDED)).await);
        assert_waits(&put(&store, "2").await);
        pass_the_lease().await;
    }
    let parked = put(&store, "1").await;
    assert_eq!(parked, Claim::AlreadyFinished(FinalState::Dead));
    acquired(put(&store, "2").await);
}

async fn the_second_runs_once_the_unknown_first_is_given_up(database: Database) {
    let store = database.open_migrated().await;
    let mut first = ordered("1");
    first.can = Can::RecordUnknown;
    assert_waits(&send(&store, &first, &terms(LONG)).await);
    assert_waits(&put(&store, "2").await);
    let given_up = GivenUp {
        key: first.key.clone(),
        error: "no task `train` is known here".to_owned(),
        worker: "w1".into(),
        dead_letter_topic: None,
    };
    let now = patience(Duration::ZERO);
    let given_up = store.give_up_unknown(&[given_up], now).await;
    assert_eq!(given_up.unwrap(), [first.key]);
    acquired(put(&store, "2").await);
}

async fn order_is_kept_when_the_first_is_given_back(database: Database) {
    let store = database.open_migrated().await;
    let first = queue_up(&store, &["1", "2"]).await;
    assert!(store.release(&interrupted(&first.fence)).await.unwrap());
    pass_the_lease().await;
    assert_waits(&put(&store, "2").await);
    let first = reap_one(&store, "1").await;
    assert!(finish(&store, &first.fence, succeeded()).await);
    reap_one(&store, "2").await;
}

/// The order holds however long the first one waits.
async fn order_is_kept_when_the_first_fails_and_waits(database: Database) {
    let store = database.open_migrated().await;
    let first = queue_up(&store, &["1", "2"]).await;
    let waits = failed(&first.fence, "disk full", LONG);
    assert!(store.release(&waits).await.unwrap());
    assert_waits(&put(&store, "2").await);
    assert_none_to_reap(&store).await;
    let tables = database.tables().await;
    tables.end_lease(&first.fence.key, Duration::ZERO).await;
    let first = reap_one(&store, "1").await;
    assert_waits(&put(&store, "2").await);
    assert!(finish(&store, &first.fence, succeeded()).await);
    reap_one(&store, "2").await;
}

async fn order_is_kept_when_the_first_is_taken_over(database: Database) {
    let store = database.open_migrated().await;
    let lost = acquired(send(&store, &ordered("1"), &terms(ENDED)).await);
    assert_waits(&put(&store, "2").await);
    pass_the_lease().await;
    // Nobody runs the first one now, and it still comes first.
    assert_waits(&put(&store, "2").await);
    let first = acquired(put(&store, "1").await);
    assert!(!finish(&store, &lost.fence, succeeded()).await);
    assert_none_to_reap(&store).await;
    assert_waits(&put(&store, "2").await);
    assert!(finish(&store, &first.fence, succeeded()).await);
    acquired(put(&store, "2").await);
}

/// The order of the claims decides, not that of the keys.
async fn jobs_run_in_the_order_of_their_claims(database: Database) {
    let store = database.open_migrated().await;
    let mut head = queue_up(&store, &["9", "10", "1", "b", "a"]).await;
    for next in ["10", "1", "b", "a"] {
        assert!(finish(&store, &head.fence, succeeded()).await);
        head = reap_one(&store, next).await;
    }
    assert!(finish(&store, &head.fence, succeeded()).await);
    assert_none_to_reap(&store).await;
}

async fn of_two_jobs_in_one_batch_the_first_runs(database: Database) {
    let store = database.open_migrated().await;
    for keys in [["1", "2"], ["4", "3"]] {
        let claims = store.claim(&keys.map(ordered), &terms(LONG)).await.unwrap();
        assert_waits(&claims[1]);
        let first = acquired(claims[0].clone());
        assert!(finish(&store, &first.fence, succeeded()).await);
        let second = reap_one(&store, keys[1]).await;
        assert!(finish(&store, &second.fence, succeeded()).await);
    }
}

async fn a_batch_takes_its_places_in_the_order_of_its_requests(database: Database) {
    let store = database.open_migrated().await;
    let mut head = acquired(put(&store, "0").await);
    let batch = ["9", "10", "b", "a"].map(ordered);
    let claims = store.claim(&batch, &terms(LONG)).await.unwrap();
    claims.iter().for_each(assert_waits);
    for next in ["9", "10", "b", "a"] {
        assert!(finish(&store, &head.fence, succeeded()).await);
        head = reap_one(&store, next).await;
    }
}

async fn a_later_message_that_comes_again_does_not_overtake(database: Database) {
    let store = database.open_migrated().await;
    let first = queue_up(&store, &["1", "2", "3"]).await;
    assert!(store.release(&interrupted(&first.fence)).await.unwrap());
    pass_the_lease().await;
    for key in ["3", "2", "3"] {
        assert_waits(&put(&store, key).await);
    }
    let batch = ["3", "2", "1"].map(ordered);
    let claims = store.claim(&batch, &terms(LONG)).await.unwrap();
    assert_waits(&claims[0]);
    assert_waits(&claims[1]);
    let first = acquired(claims[2].clone());
    assert!(finish(&store, &first.fence, succeeded()).await);
    assert_waits(&put(&store, "3").await);
    acquired(put(&store, "2").await);
    for key in ["2", "3"] {
        let duplicates = story_of(&store, key).await.job.duplicates;
        assert_eq!(duplicates, 0, "a message that waits is no duplicate");
    }
}

async fn a_job_recorded_without_room_keeps_its_place(database: Database) {
    let store = database.open_migrated().await;
    let mut first = ordered("1");
    first.can = Can::Record;
    assert_waits(&send(&store, &first, &terms(LONG)).await);
    assert_waits(&put(&store, "2").await);
    let first = reap_one(&store, "1").await;
    assert!(finish(&store, &first.fence, succeeded()).await);
    reap_one(&store, "2").await;
}

async fn jobs_without_an_ordering_key_run_side_by_side(database: Database) {
    let store = database.open_migrated().await;
    for key in ["1", "2", "3"] {
        acquired(claim(&store, key, LONG).await);
    }
}

async fn ordering_keys_do_not_wait_for_each_other(database: Database) {
    let store = database.open_migrated().await;
    let in_order = |subscription: &str, key: &str, ordering_key: &str| {
        let mut request = request_of(subscription, key);
        request.message.ordering_key = ordering_key.to_owned();
        request
    };
    let batch = [
        in_order("s", "1", "k"),
        in_order("s", "2", "K"),
        in_order("other", "1", "k"),
    ];
    for claim in store.claim(&batch, &terms(LONG)).await.unwrap() {
        acquired(claim);
    }
    let later = in_order("other", "0", "k");
    assert_waits(&send(&store, &later, &terms(LONG)).await);
    assert_eq!(reaped_keys(&reap(&store, 10).await), [""; 0]);
}

/// It will never run, so nothing waits for it.
async fn a_refused_message_does_not_hold_up_its_ordering_key(database: Database) {
    let store = database.open_migrated().await;
    let mut malformed = refusal("1");
    malformed.message.ordering_key = "k".to_owned();
    malformed.reason = DeadReason::Malformed;
    assert_eq!(store.refuse(&malformed).await.unwrap(), Refused::Recorded);
    queue_up(&store, &["2", "3"]).await;
    let key = JobKey::new("s", "1");
    let standing = look(&store, &key).await;
    assert_eq!(standing, Standing::Finished(FinalState::Dead));
}
