//! Which jobs a sweep takes over, and which it leaves alone.

use std::collections::BTreeSet;
use std::sync::Arc;
use std::time::Duration;

use bytes::Bytes;
use futures::future::join_all;
use trainyard::job::{Claim, JobKey, Taken};
use trainyard::record::JobState;

use crate::on_every_store;
use crate::support::database::Database;
use crate::support::jobs::{
    ENDED, LONG, acked_after, acquire, assert_is_stale, finish, interrupted, job_of,
    pass_the_lease, reap, reaped_keys, request, request_of, succeeded, terms,
};

on_every_store!(
    an_orphan_comes_with_its_payload_and_a_larger_fence,
    a_live_lease_is_not_reaped,
    an_ended_job_is_not_reaped,
    only_subscriptions_within_reach_are_reaped,
    only_tasks_within_reach_are_reaped,
    a_job_is_reaped_only_after_its_reap_delay,
    at_most_the_limit_is_reaped_earliest_end_first,
    concurrent_reapers_never_get_the_same_job,
    a_released_job_without_a_reap_delay_can_be_reaped_at_once,
    a_run_whose_job_was_reaped_can_write_nothing_more,
);

async fn an_orphan_comes_with_its_payload_and_a_larger_fence(database: Database) {
    let store = database.open_migrated().await;
    let mut request = request("1");
    request.message.data = Bytes::from_static(b"\x00\xffany bytes");
    let message = request.message.clone();
    let claims = store.claim(&[request], &terms(ENDED)).await.unwrap();
    let Claim::Acquired(first) = &claims[0] else {
        panic!("not acquired");
    };
    pass_the_lease().await;
    let orphans = reap(&store, 10).await;
    assert_eq!(orphans.len(), 1);
    let Taken {
        acquired,
        task,
        message_id,
        ordering_key: _,
        payload,
    } = &orphans[0];
    assert_eq!(acquired.job_id, first.job_id);
    assert_eq!(acquired.fence.attempt, 2);
    assert_ne!(acquired.fence.token, first.fence.token);
    assert_eq!(
        (task.as_str(), message_id, payload),
        ("train", &message.id, &message.data)
    );
    assert_eq!(job_of(&store, acquired).await.state, JobState::Running);
    assert!(finish(&store, &acquired.fence, succeeded()).await);
}

async fn a_live_lease_is_not_reaped(database: Database) {
    let store = database.open_migrated().await;
    acquire(&store, "1", LONG).await;
    assert_eq!(reaped_keys(&reap(&store, 10).await), [""; 0]);
}

async fn an_ended_job_is_not_reaped(database: Database) {
    let store = database.open_migrated().await;
    let acquired = acquire(&store, "1", ENDED).await;
    assert!(finish(&store, &acquired.fence, succeeded()).await);
    pass_the_lease().await;
    assert_eq!(reaped_keys(&reap(&store, 10).await), [""; 0]);
}

async fn only_subscriptions_within_reach_are_reaped(database: Database) {
    let store = database.open_migrated().await;
    let requests = [request_of("other", "1"), request_of("s", "2")];
    store.claim(&requests, &terms(ENDED)).await.unwrap();
    pass_the_lease().await;
    assert_eq!(reaped_keys(&reap(&store, 10).await), ["2"]);
}

async fn only_tasks_within_reach_are_reaped(database: Database) {
    let store = database.open_migrated().await;
    let mut unknown = request("1");
    unknown.task = "newer".to_owned();
    let requests = [unknown, request("2")];
    store.claim(&requests, &terms(ENDED)).await.unwrap();
    pass_the_lease().await;
    assert_eq!(reaped_keys(&reap(&store, 10).await), ["2"]);
}

async fn a_job_is_reaped_only_after_its_reap_delay(database: Database) {
    let store = database.open_migrated().await;
    let mut unacked = request("1");
    unacked.ack = acked_after(Duration::from_secs(60));
    store.claim(&[unacked], &terms(LONG)).await.unwrap();
    let tables = database.tables().await;
    let key = JobKey::new("s", "1");
    tables.end_lease(&key, Duration::from_secs(50)).await;
    assert_eq!(reaped_keys(&reap(&store, 10).await), [""; 0]);
    tables.end_lease(&key, Duration::from_secs(70)).await;
    assert_eq!(reaped_keys(&reap(&store, 10).await), ["1"]);
}

async fn at_most_the_limit_is_reaped_earliest_end_first(database: Database) {
    let store = database.open_migrated().await;
    let tables = database.tables().await;
    for (key, ago) in [("a", 20), ("b", 50), ("c", 10), ("d", 40), ("e", 30)] {
        let fence = acquire(&store, key, LONG).await.fence;
        tables.end_lease(&fence.key, Duration::from_secs(ago)).await;
    }
    assert_eq!(reaped_keys(&reap(&store, 4).await), ["b", "d", "e", "a"]);
    assert_eq!(reaped_keys(&reap(&store, 4).await), ["c"]);
    assert_eq!(reaped_keys(&reap(&store, 4).await), [""; 0]);
}

async fn concurrent_reapers_never_get_the_same_job(database: Database) {
    const JOBS: usize = 60;
    let store = database.open_migrated().await;
    let requests: Vec<_> = (0..JOBS).map(|n| request(&n.to_string())).collect();
    store.claim(&requests, &terms(ENDED)).await.unwrap();
    pass_the_lease().await;
    let mut reaped = Vec::new();
    // A sweep skips rows that another is writing, so it takes some rounds.
    for _ in 0..JOBS {
        let reapers = (0..8).map(|_| {
            let store = Arc::clone(&store);
            tokio::spawn(async move { reap(&store, 5).await })
        });
        for orphans in join_all(reapers).await {
            reaped.extend(orphans.unwrap().into_iter().map(|o| o.acquired.fence));
        }
        if reaped.len() >= JOBS {
            break;
        }
    }
    let distinct: BTreeSet<_> = reaped.iter().map(|fence| &fence.key).collect();
    assert_eq!((reaped.len(), distinct.len()), (JOBS, JOBS));
    assert!(reaped.iter().all(|fence| fence.attempt == 2));
}

async fn a_released_job_without_a_reap_delay_can_be_reaped_at_once(database: Database) {
    let store = database.open_migrated().await;
    let acquired = acquire(&store, "1", LONG).await;
    assert!(store.release(&interrupted(&acquired.fence)).await.unwrap());
    // SQLite stores whole milliseconds.
    pass_the_lease().await;
    let orphans = reap(&store, 1).await;
    assert_eq!(reaped_keys(&orphans), ["1"]);
    assert_eq!(job_of(&store, &orphans[0].acquired).await.attempts, 1);
}

async fn a_run_whose_job_was_reaped_can_write_nothing_more(database: Database) {
    let store = database.open_migrated().await;
    let stale = acquire(&store, "1", ENDED).await.fence;
    pass_the_lease().await;
    let orphans = reap(&store, 1).await;
    let before = job_of(&store, &orphans[0].acquired).await;
    assert_is_stale(&store, &stale).await;
    assert_eq!(job_of(&store, &orphans[0].acquired).await, before);
}
