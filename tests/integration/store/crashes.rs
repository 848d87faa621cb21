//! Lost leases are counted, leases given back are not.

use std::sync::Arc;

use trainyard::job::{Claim, FinalState, JobKey};
use trainyard::record::JobState;
use trainyard::store::{Standing, Store};
use uuid::Uuid;

use crate::on_every_store;
use crate::support::database::Database;
use crate::support::jobs::{
    ENDED, LONG, acquire, claim, finish, interrupted, job_of, kinds, look, pass_the_lease, reach,
    reap_within, story_of, succeeded, terms,
};

on_every_store!(
    the_third_lost_lease_parks_the_job_as_dead,
    a_reaper_parks_a_job_and_does_not_get_it,
    the_run_that_lost_the_last_lease_did_not_end_the_job,
    an_interruption_is_no_crash_and_costs_no_attempt,
    a_claim_that_was_never_answered_is_given_back_and_costs_no_attempt,
);

/// Loses the key's lease this many times.
async fn crash(store: &Arc<dyn Store>, key: &str, times: u32) -> trainyard::job::Acquired {
    let mut acquired = acquire(store, key, ENDED).await;
    pass_the_lease().await;
    for _ in 1..times {
        acquired = acquire(store, key, ENDED).await;
        pass_the_lease().await;
    }
    acquired
}

async fn the_third_lost_lease_parks_the_job_as_dead(database: Database) {
    let store = database.open_migrated().await;
    let last = crash(&store, "1", 3).await;
    assert_eq!(last.fence.attempt, 3);
    let dead = Claim::AlreadyFinished(FinalState::Dead);
    assert_eq!(claim(&store, "1", LONG).await, dead);
    let job = job_of(&store, &last).await;
    assert_eq!((job.state, job.attempts), (JobState::Dead, 3));
    assert!(job.error.as_deref().unwrap().contains("3 times"));
    assert!(job.finished_at.is_some());
    assert_eq!(claim(&store, "1", LONG).await, dead);
    assert_eq!(
        look(&store, &last.fence.key).await,
        Standing::Finished(FinalState::Dead)
    );
    let story = story_of(&store, "1").await;
    let told = kinds(&story);
    assert_eq!(
        told[..4],
        [
            ("claimed", Some(1)),
            ("taken_over", Some(2)),
            ("taken_over", Some(3)),
            ("parked", Some(3)),
        ]
    );
    assert_eq!(story.ledger[3].detail, story.job.error);
}

async fn a_reaper_parks_a_job_and_does_not_get_it(database: Database) {
    let store = database.open_migrated().await;
    // The interruption makes the fence's attempt differ from the job's attempts.
    let released = acquire(&store, "1", LONG).await;
    store.release(&interrupted(&released.fence)).await.unwrap();
    let last = crash(&store, "1", 3).await;
    let reach = reach();
    let orphans = reap_within(&store, &reach, &terms(LONG), 10).await;
    assert!(orphans.is_empty());
    let job = job_of(&store, &last).await;
    assert_eq!((job.state, job.attempts), (JobState::Dead, 3));
    let story = story_of(&store, "1").await;
    assert_eq!(kinds(&story).last(), Some(&("parked", Some(4))));
}

async fn the_run_that_lost_the_last_lease_did_not_end_the_job(database: Database) {
    let store = database.open_migrated().await;
    let last = crash(&store, "1", 3).await;
    claim(&store, "1", LONG).await;
    let parked = job_of(&store, &last).await;
    assert!(!finish(&store, &last.fence, succeeded()).await);
    assert_eq!(job_of(&store, &last).await, parked);
}

async fn an_interruption_is_no_crash_and_costs_no_attempt(database: Database) {
    let store = database.open_migrated().await;
    for _ in 0..5 {
        let acquired = acquire(&store, "1", LONG).await;
        assert_eq!(job_of(&store, &acquired).await.attempts, 1);
        assert!(store.release(&interrupted(&acquired.fence)).await.unwrap());
    }
    // Two more crashes are allowed.
    let acquired = crash(&store, "1", 3).await;
    assert_eq!(acquired.fence.attempt, 8);
    assert_eq!(job_of(&store, &acquired).await.attempts, 3);
}

async fn a_claim_that_was_never_answered_is_given_back_and_costs_no_attempt(database: Database) {
    let store = database.open_migrated().await;
    let unanswered = acquire(&store, "1", LONG).await.fence;
    let claims = [
        (unanswered.key.clone(), unanswered.token),
        // A claim that never arrived.
        (JobKey::new("s", "2"), Uuid::new_v4()),
    ];
    store.disown(&claims).await.unwrap();
    pass_the_lease().await;
    let run = acquire(&store, "1", LONG).await;
    assert_eq!((run.fence.attempt, run.counted_attempts), (2, 1));
    // Another run has the job by now.
    store.disown(&claims).await.unwrap();
    assert!(finish(&store, &run.fence, succeeded()).await);
    let told = story_of(&store, "1").await;
    assert_eq!(kinds(&told)[1], ("released", Some(1)));
}
