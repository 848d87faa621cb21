//! The rules of every store, one suite for both.

mod attempts;
mod batches;
mod broken_transactions;
mod cancelling;
mod checkpoints;
mod crashes;
mod dead_letters;
mod ledger;
mod limits;
mod locking;
mod ordering;
mod orphans;
mod plans;
mod purge;
mod renewals;
mod retrying;
mod waiting;

use std::sync::Arc;
use std::time::Duration;

use chrono::{DateTime, Utc};
use futures::future::join_all;
use serde_json::json;
use trainyard::job::{Acquired, Claim, Fence, FinalState, JobKey, Renewal};
use trainyard::outcome::Ending;
use trainyard::record::{JobFilter, JobState};
use trainyard::store::{Refusal, Refused, SchemaError, Standing};
use uuid::Uuid;

use crate::on_every_store;
use crate::support::database::Database;
use crate::support::jobs::{
    ENDED, LONG, acquire, claim, dead, finish, interrupted, job_of, look, pass_the_lease, refusal,
    request, request_of, succeeded, terms,
};

on_every_store!(
    a_new_database_has_no_schema_until_it_is_migrated,
    migrating_again_changes_nothing,
    a_new_key_is_acquired_at_attempt_one,
    a_second_claim_is_held_while_the_first_runs,
    one_message_in_two_subscriptions_is_two_jobs,
    a_finished_key_is_finished_for_every_later_claim,
    of_64_concurrent_claims_of_one_key_one_wins,
    twice_the_same_key_in_one_batch_is_acquired_once,
    a_batch_is_answered_in_its_order,
    an_ended_lease_is_taken_over_with_a_larger_fence,
    a_held_lease_is_not_taken_over,
    a_renewed_lease_lasts_from_the_renewal,
    a_stale_fence_changes_nothing,
    finishing_again_with_the_same_fence_is_confirmed,
    a_released_claim_can_be_claimed_and_costs_no_attempt,
    a_refused_message_is_dead_with_its_reason,
    refusing_a_claimed_message_does_not_end_its_job,
    looking_changes_nothing,
    jobs_are_listed_newest_first_and_filtered,
    a_job_is_read_back_as_it_was_written,
    text_with_nul_characters_can_be_stored,
);

async fn a_new_database_has_no_schema_until_it_is_migrated(database: Database) {
    let store = database.open().await;
    assert!(matches!(
        store.check_schema().await,
        Err(SchemaError::Missing)
    ));
    assert!(store.migrate(|_| {}).await.unwrap() >= 1);
    store.check_schema().await.unwrap();
}

async fn migrating_again_changes_nothing(database: Database) {
    let store = database.open_migrated().await;
    assert_eq!(store.migrate(|_| {}).await.unwrap(), 0);
}

async fn a_new_key_is_acquired_at_attempt_one(database: Database) {
    let store = database.open_migrated().await;
    let acquired = acquire(&store, "1", LONG).await;
    assert_eq!(acquired.fence.attempt, 1);
    assert_eq!(job_of(&store, &acquired).await.state, JobState::Running);
}

async fn a_second_claim_is_held_while_the_first_runs(database: Database) {
    let store = database.open_migrated().await;
    let acquired = acquire(&store, "1", LONG).await;
    let second = claim(&store, "1", LONG).await;
    let Claim::RunningUntil { until, .. } = second else {
        panic!("not held: {second:?}");
    };
    let remaining = until - tokio::time::Instant::now();
    assert!(remaining > LONG / 2 && remaining <= LONG, "{remaining:?}");
    assert_eq!(job_of(&store, &acquired).await.duplicates, 1);
}

async fn one_message_in_two_subscriptions_is_two_jobs(database: Database) {
    let store = database.open_migrated().await;
    let claims = store
        .claim(&[request_of("a", "1"), request_of("b", "1")], &terms(LONG))
        .await
        .unwrap();
    assert!(claims.iter().all(|c| matches!(c, Claim::Acquired(_))));
}

async fn a_finished_key_is_finished_for_every_later_claim(database: Database) {
    let store = database.open_migrated().await;
    let acquired = acquire(&store, "1", LONG).await;
    assert!(finish(&store, &acquired.fence, succeeded()).await);
    for duplicates in 1..=2 {
        assert_eq!(
            claim(&store, "1", LONG).await,
            Claim::AlreadyFinished(FinalState::Succeeded)
        );
        assert_eq!(job_of(&store, &acquired).await.duplicates, duplicates);
    }
}

async fn of_64_concurrent_claims_of_one_key_one_wins(database: Database) {
    let store = database.open_migrated().await;
    let claims = join_all((0..64).map(|_| {
        let store = Arc::clone(&store);
        tokio::spawn(async move { claim(&store, "1", LONG).await })
    }))
    .await;
    let winners: Vec<Acquired> = claims
        .into_iter()
        .filter_map(|claim| match claim.unwrap() {
            Claim::Acquired(acquired) => Some(acquired),
            Claim::RunningUntil { .. } => None,
            other => panic!("neither acquired nor held: {other:?}"),
        })
        .collect();
    assert_eq!(winners.len(), 1);
    assert_eq!(job_of(&store, &winners[0]).await.duplicates, 63);
}

async fn twice_the_same_key_in_one_batch_is_acquired_once(database: Database) {
    let store = database.open_migrated().await;
    let claims = store
        .claim(&[request("1"), request("1")], &terms(LONG))
        .await
        .unwrap();
    let acquired = claims.iter().filter(|c| matches!(c, Claim::Acquired(_)));
    assert_eq!(acquired.count(), 1);
}

async fn a_batch_is_answered_in_its_order(database: Database) {
    let store = database.open_migrated().await;
    let finished = acquire(&store, "finished", LONG).await;
    finish(&store, &finished.fence, succeeded()).await;
    acquire(&store, "held", LONG).await;
    let batch = ["new", "held", "finished", "also new"].map(request);
    let claims = store.claim(&batch, &terms(LONG)).await.unwrap();
    assert!(matches!(&claims[0], Claim::Acquired(a) if &*a.fence.key.key == "new"));
    assert!(matches!(claims[1], Claim::RunningUntil { .. }));
    assert_eq!(claims[2], Claim::AlreadyFinished(FinalState::Succeeded));
    assert!(matches!(&claims[3], Claim::Acquired(a) if &*a.fence.key.key == "also new"));
}

async fn an_ended_lease_is_taken_over_with_a_larger_fence(database: Database) {
    let store = database.open_migrated().await;
    let first = acquire(&store, "1", ENDED).await;
    pass_the_lease().await;
    let second = acquire(&store, "1", LONG).await;
    assert_eq!(second.job_id, first.job_id);
    assert_eq!(second.fence.attempt, 2);
    assert_ne!(second.fence.token, first.fence.token);
}

async fn a_held_lease_is_not_taken_over(database: Database) {
    let store = database.open_migrated().await;
    acquire(&store, "1", LONG).await;
    assert!(matches!(
        claim(&store, "1", LONG).await,
        Claim::RunningUntil { .. }
    ));
}

async fn a_renewed_lease_lasts_from_the_renewal(database: Database) {
    let store = database.open_migrated().await;
    let acquired = acquire(&store, "1", ENDED).await;
    pass_the_lease().await;
    let renewed = store.renew(&[acquired.fence], LONG).await.unwrap();
    assert_eq!(renewed, [Renewal::Renewed]);
    assert!(matches!(
        claim(&store, "1", LONG).await,
        Claim::RunningUntil { .. }
    ));
}

async fn a_stale_fence_changes_nothing(database: Database) {
    let store = database.open_migrated().await;
    let stale = acquire(&store, "1", ENDED).await.fence;
    pass_the_lease().await;
    let holder = acquire(&store, "1", LONG).await;
    let before = job_of(&store, &holder).await;
    let wrong_attempt = Fence {
        attempt: 9,
        ..holder.fence.clone()
    };
    for fence in [&stale, &wrong_attempt] {
        assert_eq!(
            store
                .renew(std::slice::from_ref(fence), LONG)
                .await
                .unwrap(),
            [Renewal::Lost]
        );
        assert!(!store.release(&interrupted(fence)).await.unwrap());
        assert!(!finish(&store, fence, succeeded()).await);
    }
    assert_eq!(job_of(&store, &holder).await, before);
}

async fn finishing_again_with_the_same_fence_is_confirmed(database: Database) {
    let store = database.open_migrated().await;
    let acquired = acquire(&store, "1", LONG).await;
    assert!(finish(&store, &acquired.fence, succeeded()).await);
    let after_the_first = job_of(&store, &acquired).await;
    let other = dead("too late");
    assert!(finish(&store, &acquired.fence, other).await);
    assert_eq!(job_of(&store, &acquired).await, after_the_first);
}

async fn a_released_claim_can_be_claimed_and_costs_no_attempt(database: Database) {
    let store = database.open_migrated().await;
    let first = acquire(&store, "1", LONG).await;
    assert!(store.release(&interrupted(&first.fence)).await.unwrap());
    assert!(!store.release(&interrupted(&first.fence)).await.unwrap());
    let waiting = job_of(&store, &first).await;
    assert_eq!((waiting.state, waiting.attempts), (JobState::Waiting, 0));
    let second = acquire(&store, "1", LONG).await;
    assert!(second.fence.attempt > first.fence.attempt);
    assert!(!finish(&store, &first.fence, succeeded()).await);
    assert!(finish(&store, &second.fence, succeeded()).await);
    assert_eq!(job_of(&store, &second).await.attempts, 1);
}

async fn a_refused_message_is_dead_with_its_reason(database: Database) {
    let store = database.open_migrated().await;
    let refusal = refusal("1");
    assert_eq!(store.refuse(&refusal).await.unwrap(), Refused::Recorded);
    let job = store.job(refusal.job_id).await.unwrap().unwrap();
    assert_eq!(job.state, JobState::Dead);
    assert_eq!(job.error.as_deref(), Some("the data is not valid JSON"));
    assert_eq!(job.payload, Some(refusal.message.data.clone()));
    let again = Refusal {
        job_id: Uuid::now_v7(),
        ..refusal
    };
    assert_eq!(
        store.refuse(&again).await.unwrap(),
        Refused::AlreadyFinished(FinalState::Dead)
    );
}

async fn refusing_a_claimed_message_does_not_end_its_job(database: Database) {
    let store = database.open_migrated().await;
    let acquired = acquire(&store, "1", LONG).await;
    assert_eq!(store.refuse(&refusal("1")).await.unwrap(), Refused::Claimed);
    assert_eq!(job_of(&store, &acquired).await.state, JobState::Running);
}

async fn looking_changes_nothing(database: Database) {
    let store = database.open_migrated().await;
    let key = JobKey::new("s", "1");
    assert_eq!(look(&store, &key).await, Standing::Missing);
    let acquired = acquire(&store, "1", LONG).await;
    let before = job_of(&store, &acquired).await;
    assert!(matches!(
        look(&store, &key).await,
        Standing::Running { remaining, .. } if remaining > LONG / 2
    ));
    assert_eq!(job_of(&store, &acquired).await, before);
    store.release(&interrupted(&acquired.fence)).await.unwrap();
    let remaining = Duration::ZERO;
    assert_eq!(look(&store, &key).await, Standing::Waiting { remaining });
    let again = acquire(&store, "1", LONG).await;
    finish(&store, &again.fence, succeeded()).await;
    assert_eq!(
        look(&store, &key).await,
        Standing::Finished(FinalState::Succeeded)
    );
}

async fn jobs_are_listed_newest_first_and_filtered(database: Database) {
    let store = database.open_migrated().await;
    for key in ["1", "2", "3", "4"] {
        acquire(&store, key, LONG).await;
    }
    let ended = acquire(&store, "5", LONG).await;
    finish(&store, &ended.fence, succeeded()).await;
    let released = acquire(&store, "6", LONG).await;
    store.release(&interrupted(&released.fence)).await.unwrap();

    let keys = async |state: Option<JobState>, task: Option<&str>, limit| -> Vec<String> {
        let filter = JobFilter {
            state,
            task: task.map(str::to_owned),
            limit,
        };
        let jobs = store.jobs(&filter).await.unwrap();
        jobs.into_iter().map(|job| job.key).collect()
    };
    assert_eq!(keys(None, None, 10).await, ["6", "5", "4", "3", "2", "1"]);
    assert_eq!(keys(None, None, 2).await, ["6", "5"]);
    assert_eq!(keys(Some(JobState::Running), None, 2).await, ["4", "3"]);
    assert_eq!(keys(Some(JobState::Waiting), None, 10).await, ["6"]);
    assert_eq!(keys(Some(JobState::Succeeded), None, 10).await, ["5"]);
    assert_eq!(keys(None, Some("other"), 10).await, [""; 0]);
    assert_eq!(keys(None, Some("train"), 10).await.len(), 6);
}

async fn a_job_is_read_back_as_it_was_written(database: Database) {
    let store = database.open_migrated().await;
    let mut request = request("1");
    request.message.ordering_key = "k".to_owned();
    let sent = request.message.clone();
    let claims = store.claim(&[request], &terms(LONG)).await.unwrap();
    let Claim::Acquired(acquired) = &claims[0] else {
        panic!("not acquired");
    };
    finish(&store, &acquired.fence, succeeded()).await;
    let job = job_of(&store, acquired).await;
    assert_eq!(job.message_id, sent.id);
    assert_eq!(job.publish_time, sent.publish_time);
    assert_eq!(job.ordering_key.as_deref(), Some("k"));
    assert_eq!(job.payload, Some(sent.data));
    assert_eq!(job.task.as_deref(), Some("train"));
    assert_eq!(job.result, Some(json!({"accuracy": 0.5}).into()));
    assert_eq!(job.worker.as_deref(), Some("w1"));
    let times: [Option<DateTime<Utc>>; 3] =
        [Some(job.received_at), job.started_at, job.finished_at];
    assert!(times.is_sorted() && times.iter().all(Option::is_some));
}

async fn text_with_nul_characters_can_be_stored(database: Database) {
    let store = database.open_migrated().await;
    let mut odd = request("1");
    odd.task = "a\0b".to_owned();
    odd.message.ordering_key = "\0".to_owned();
    odd.message
        .attributes
        .insert("nul".to_owned(), "\0".to_owned());
    let claims = store.claim(&[odd], &terms(LONG)).await.unwrap();
    let Claim::Acquired(acquired) = &claims[0] else {
        panic!("not acquired");
    };
    let ending = Ending {
        result: Some(json!("\0").into()),
        ..dead("\0")
    };
    assert!(finish(&store, &acquired.fence, ending).await);
    assert_eq!(
        job_of(&store, acquired).await.result,
        Some(json!("\0").into())
    );
}
