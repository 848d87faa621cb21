//! Jobs that wait in the table, held by no worker: until they may run again, or for a
//! worker with room.

mod unknown;

use std::sync::Arc;
use std::time::Duration;

use futures::future::join_all;
use tokio::time::Instant;
use trainyard::job::{Acquired, Can, Claim, ClaimRequest, Renewal};
use trainyard::record::JobState;
use trainyard::store::{Standing, Store};

use crate::on_every_store;
use crate::support::database::Database;
use crate::support::jobs::{
    ENDED, LONG, acked_after, acquire, acquired, assert_is_stale, assert_none_to_reap,
    assert_waits, claim, failed, finish, interrupted, job_at, job_of, kinds, look, pass_the_lease,
    reap, reap_one, reaped_keys, request, send, story_of, succeeded, terms,
};

on_every_store!(
    a_failed_job_is_neither_claimed_nor_reaped_before_its_time,
    a_failed_job_tells_why_and_until_when_it_waits,
    a_failed_job_is_claimed_at_its_time_and_its_attempt_counts,
    a_failed_job_is_reaped_at_its_time_and_its_attempt_counts,
    a_success_after_a_failure_leaves_no_error,
    a_stale_fence_makes_no_job_wait,
    failing_again_with_the_same_fence_changes_nothing,
    an_interruption_after_a_failure_costs_no_attempt,
    a_waiting_job_is_reaped_without_its_reap_delay,
    a_message_that_comes_while_its_job_waits_is_no_duplicate,
    a_worker_without_room_puts_a_job_on_record,
    a_recorded_job_runs_where_there_is_room,
    a_recorded_job_is_reaped,
    a_worker_without_room_takes_nothing_over,
    a_claim_of_a_waiting_job_sent_again_is_confirmed,
    waiting_jobs_are_reaped_in_the_order_of_their_times,
    of_many_who_want_a_waiting_job_one_gets_it,
);

async fn fail(store: &Arc<dyn Store>, acquired: &Acquired, retry_in: Duration) {
    let failed = failed(&acquired.fence, "disk full", retry_in);
    assert!(store.release(&failed).await.unwrap());
}

fn without_room(key: &str) -> ClaimRequest {
    ClaimRequest {
        can: Can::Record,
        ..request(key)
    }
}

async fn a_failed_job_is_neither_claimed_nor_reaped_before_its_time(database: Database) {
    let store = database.open_migrated().await;
    let first = acquire(&store, "1", LONG).await;
    fail(&store, &first, LONG).await;
    let waiting = claim(&store, "1", LONG).await;
    let Claim::Waiting { until, acked: true } = waiting else {
        panic!("does not wait: {waiting:?}");
    };
    let remaining = until - Instant::now();
    assert!(remaining > LONG / 2 && remaining <= LONG, "{remaining:?}");
    assert_none_to_reap(&store).await;
    assert!(matches!(
        look(&store, &first.fence.key).await,
        Standing::Waiting { remaining } if remaining > LONG / 2
    ));
}

async fn a_failed_job_tells_why_and_until_when_it_waits(database: Database) {
    let store = database.open_migrated().await;
    let first = acquire(&store, "1", LONG).await;
    let running = job_of(&store, &first).await;
    assert_eq!((running.error, running.waits_until), (None, None));
    fail(&store, &first, LONG).await;
    let job = job_of(&store, &first).await;
    assert_eq!((job.state, job.attempts), (JobState::Waiting, 1));
    assert_eq!(job.error.as_deref(), Some("disk full"));
    assert_eq!(job.worker.as_deref(), Some("w1"));
    assert_eq!((job.reason, job.finished_at), (None, None));
    let waits = job.waits_until.unwrap() - job.started_at.unwrap();
    assert!(waits.to_std().unwrap() >= LONG, "{waits}");
    let story = story_of(&store, "1").await;
    assert_eq!(kinds(&story), [("claimed", Some(1)), ("failed", Some(1))]);
    assert_eq!(story.ledger[1].detail.as_deref(), Some("disk full"));
}

async fn a_failed_job_is_claimed_at_its_time_and_its_attempt_counts(database: Database) {
    let store = database.open_migrated().await;
    let tables = database.tables().await;
    let mut run = acquire(&store, "1", LONG).await;
    for attempt in 2..=4 {
        fail(&store, &run, LONG).await;
        tables.end_lease(&run.fence.key, Duration::ZERO).await;
        run = acquire(&store, "1", LONG).await;
        assert_eq!(
            (run.fence.attempt, run.counted_attempts),
            (attempt, attempt)
        );
        let job = job_of(&store, &run).await;
        assert_eq!((job.state, job.attempts), (JobState::Running, attempt));
        assert_eq!(job.error.as_deref(), Some("disk full"));
        assert_eq!(job.waits_until, None);
    }
    let told = story_of(&store, "1").await;
    assert_eq!(
        kinds(&told)[1..3],
        [("failed", Some(1)), ("claimed", Some(2))]
    );
}

async fn a_failed_job_is_reaped_at_its_time_and_its_attempt_counts(database: Database) {
    let store = database.open_migrated().await;
    let first = acquire(&store, "1", LONG).await;
    fail(&store, &first, LONG).await;
    let tables = database.tables().await;
    tables.end_lease(&first.fence.key, Duration::ZERO).await;
    let second = reap_one(&store, "1").await;
    assert_eq!((second.fence.attempt, second.counted_attempts), (2, 2));
    assert_is_stale(&store, &first.fence).await;
    assert!(finish(&store, &second.fence, succeeded()).await);
}

async fn a_success_after_a_failure_leaves_no_error(database: Database) {
    let store = database.open_migrated().await;
    let first = acquire(&store, "1", LONG).await;
    fail(&store, &first, Duration::ZERO).await;
    pass_the_lease().await;
    let second = acquire(&store, "1", LONG).await;
    assert!(finish(&store, &second.fence, succeeded()).await);
    let job = job_of(&store, &second).await;
    assert_eq!((job.state, job.attempts), (JobState::Succeeded, 2));
    assert_eq!((job.error, job.reason), (None, None));
}

async fn a_stale_fence_makes_no_job_wait(database: Database) {
    let store = database.open_migrated().await;
    let stale = acquire(&store, "1", ENDED).await.fence;
    pass_the_lease().await;
    let holder = acquire(&store, "1", LONG).await;
    let before = job_of(&store, &holder).await;
    assert!(!store.release(&failed(&stale, "stale", LONG)).await.unwrap());
    assert_eq!(job_of(&store, &holder).await, before);
    assert_eq!(before.error, None);
}

/// The same call twice, as after a lost answer: the wait does not restart.
async fn failing_again_with_the_same_fence_changes_nothing(database: Database) {
    let store = database.open_migrated().await;
    let first = acquire(&store, "1", LONG).await;
    fail(&store, &first, LONG).await;
    let before = story_of(&store, "1").await;
    let again = failed(&first.fence, "again", LONG * 2);
    assert!(!store.release(&again).await.unwrap());
    assert_eq!(story_of(&store, "1").await, before);
}

async fn an_interruption_after_a_failure_costs_no_attempt(database: Database) {
    let store = database.open_migrated().await;
    let first = acquire(&store, "1", LONG).await;
    fail(&store, &first, Duration::ZERO).await;
    for attempt in 2..=4 {
        pass_the_lease().await;
        let run = acquire(&store, "1", LONG).await;
        assert_eq!((run.fence.attempt, run.counted_attempts), (attempt, 2));
        assert!(store.release(&interrupted(&run.fence)).await.unwrap());
        let job = job_of(&store, &run).await;
        assert_eq!((job.state, job.attempts), (JobState::Waiting, 1));
        assert_eq!(job.error.as_deref(), Some("disk full"));
    }
}

/// No worker holds it, so none might still renew. Once it runs again, Pub/Sub may bring
/// it back as before.
async fn a_waiting_job_is_reaped_without_its_reap_delay(database: Database) {
    let store = database.open_migrated().await;
    let mut unacked = request("1");
    unacked.ack = acked_after(Duration::from_secs(60));
    let first = acquired(send(&store, &unacked, &terms(LONG)).await);
    fail(&store, &first, Duration::ZERO).await;
    let waiting = send(&store, &without_room("1"), &terms(LONG)).await;
    assert!(matches!(waiting, Claim::Waiting { acked: false, .. }));
    pass_the_lease().await;
    let second = reap_one(&store, "1").await;
    let tables = database.tables().await;
    let key = &second.fence.key;
    tables.end_lease(key, Duration::from_secs(50)).await;
    assert_none_to_reap(&store).await;
    tables.end_lease(key, Duration::from_secs(70)).await;
    reap_one(&store, "1").await;
}

/// Nobody has run it yet; it is a duplicate while the job runs and once it has ended.
async fn a_message_that_comes_while_its_job_waits_is_no_duplicate(database: Database) {
    let store = database.open_migrated().await;
    let first = acquire(&store, "1", LONG).await;
    fail(&store, &first, LONG).await;
    for _ in 0..3 {
        assert_waits(&claim(&store, "1", LONG).await);
    }
    let batch = [request("1"), without_room("1")];
    let claims = store.claim(&batch, &terms(LONG)).await.unwrap();
    claims.iter().for_each(assert_waits);
    assert_eq!(job_of(&store, &first).await.duplicates, 0);
    let tables = database.tables().await;
    tables.end_lease(&first.fence.key, Duration::ZERO).await;
    let second = acquire(&store, "1", LONG).await;
    claim(&store, "1", LONG).await;
    assert_eq!(job_of(&store, &second).await.duplicates, 1);
    assert!(finish(&store, &second.fence, succeeded()).await);
    claim(&store, "1", LONG).await;
    assert_eq!(job_of(&store, &second).await.duplicates, 2);
}

async fn a_worker_without_room_puts_a_job_on_record(database: Database) {
    let store = database.open_migrated().await;
    let mut recorded = without_room("1");
    recorded.ack = acked_after(Duration::from_secs(60));
    // The same request twice, as after a lost answer, and another delivery.
    for request in [&recorded, &recorded, &without_room("1")] {
        let waiting = send(&store, request, &terms(LONG)).await;
        assert!(matches!(waiting, Claim::Waiting { acked: false, .. }));
        let job = job_at(&store, recorded.job_id).await;
        assert_eq!((job.state, job.attempts), (JobState::Waiting, 0));
        assert_eq!((job.duplicates, job.worker), (0, None));
    }
    assert_eq!(kinds(&story_of(&store, "1").await), [("queued", None)]);
}

async fn a_recorded_job_runs_where_there_is_room(database: Database) {
    let store = database.open_migrated().await;
    let recorded = without_room("1");
    assert_waits(&send(&store, &recorded, &terms(LONG)).await);
    let run = acquire(&store, "1", LONG).await;
    assert_eq!(run.job_id, recorded.job_id);
    assert_eq!((run.fence.attempt, run.counted_attempts), (1, 1));
    let held = send(&store, &recorded, &terms(LONG)).await;
    assert!(matches!(held, Claim::RunningUntil { .. }));
    assert!(finish(&store, &run.fence, succeeded()).await);
    let job = job_of(&store, &run).await;
    assert_eq!((job.state, job.attempts), (JobState::Succeeded, 1));
    let told = story_of(&store, "1").await;
    assert_eq!(kinds(&told)[..2], [("queued", None), ("claimed", Some(1))]);
}

async fn a_recorded_job_is_reaped(database: Database) {
    let store = database.open_migrated().await;
    let mut recorded = without_room("1");
    recorded.ack = acked_after(Duration::from_secs(60));
    assert_waits(&send(&store, &recorded, &terms(LONG)).await);
    let reaped = reap(&store, 10).await;
    assert_eq!(reaped_keys(&reaped), ["1"]);
    assert_eq!(reaped[0].payload, recorded.message.data);
    let run = &reaped[0].acquired;
    assert_eq!((run.fence.attempt, run.counted_attempts), (1, 1));
    assert!(finish(&store, &run.fence, succeeded()).await);
}

async fn a_worker_without_room_takes_nothing_over(database: Database) {
    let store = database.open_migrated().await;
    let lost = acquire(&store, "1", ENDED).await;
    pass_the_lease().await;
    let held = send(&store, &without_room("1"), &terms(LONG)).await;
    assert!(matches!(held, Claim::RunningUntil { .. }), "{held:?}");
    let renewals = store.renew(&[lost.fence], LONG).await.unwrap();
    assert_eq!(renewals, [Renewal::Renewed]);
}

async fn a_claim_of_a_waiting_job_sent_again_is_confirmed(database: Database) {
    let store = database.open_migrated().await;
    let first = acquire(&store, "1", LONG).await;
    fail(&store, &first, Duration::ZERO).await;
    pass_the_lease().await;
    let request = request("1");
    let once = acquired(send(&store, &request, &terms(LONG)).await);
    let twice = acquired(send(&store, &request, &terms(LONG)).await);
    assert_eq!(twice.fence, once.fence);
    assert_eq!((twice.fence.attempt, twice.counted_attempts), (2, 2));
    let job = job_of(&store, &twice).await;
    assert_eq!((job.attempts, job.duplicates), (2, 0));
    assert_eq!(kinds(&story_of(&store, "1").await).len(), 3);
}

async fn waiting_jobs_are_reaped_in_the_order_of_their_times(database: Database) {
    let store = database.open_migrated().await;
    let tables = database.tables().await;
    for (key, ago) in [("a", 20), ("b", 50), ("c", 10), ("d", 40)] {
        let run = acquire(&store, key, LONG).await;
        fail(&store, &run, LONG).await;
        let ago = Duration::from_secs(ago);
        tables.end_lease(&run.fence.key, ago).await;
    }
    assert_eq!(reaped_keys(&reap(&store, 3).await), ["b", "d", "a"]);
    assert_eq!(reaped_keys(&reap(&store, 3).await), ["c"]);
}

async fn of_many_who_want_a_waiting_job_one_gets_it(database: Database) {
    let store = database.open_migrated().await;
    let first = acquire(&store, "1", LONG).await;
    fail(&store, &first, Duration::ZERO).await;
    pass_the_lease().await;
    let takers = (0..24).map(|n| {
        let store = Arc::clone(&store);
        tokio::spawn(async move {
            if n % 2 == 0 {
                let reaped = reap(&store, 1).await;
                return reaped.into_iter().map(|reaped| reaped.acquired).next();
            }
            match claim(&store, "1", LONG).await {
                Claim::Acquired(acquired) => Some(acquired),
                Claim::RunningUntil { .. } | Claim::Waiting { .. } => None,
                other => panic!("neither acquired nor held: {other:?}"),
            }
        })
    });
    let taken = join_all(takers).await;
    let mut taken: Vec<Acquired> = taken.into_iter().filter_map(Result::unwrap).collect();
    assert_eq!(taken.len(), 1);
    let run = taken.remove(0);
    assert_eq!(run.fence.attempt, 2);
    assert!(finish(&store, &run.fence, succeeded()).await);
}
