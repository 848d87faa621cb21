//! Which jobs are purged, and which never are.

use std::sync::Arc;
use std::time::Duration;

use trainyard::job::{Acquired, Claim};
use trainyard::record::AttemptReport;
use trainyard::store::Store;
use uuid::{NoContext, Timestamp, Uuid};

use crate::on_every_store;
use crate::support::database::Database;
use crate::support::jobs::{
    LONG, claim, finish, interrupted, letters, refusal, request, succeeded, terms,
};

on_every_store!(
    an_old_ended_job_is_purged_with_its_ledger,
    a_job_that_ended_within_the_retention_is_kept,
    an_open_job_is_never_purged,
    a_refused_message_is_purged_like_an_ended_job,
    a_dead_job_is_kept_until_its_message_is_published,
    at_most_the_limit_is_purged_oldest_first,
    a_purged_key_is_new_again,
);

const DAY: Duration = Duration::from_secs(86_400);

/// A job id as if created this many days ago.
fn old_id(days: u32) -> Uuid {
    let now = Timestamp::now(NoContext).to_unix().0;
    let then = now - DAY.as_secs() * u64::from(days);
    Uuid::new_v7(Timestamp::from_unix(NoContext, then, 0))
}

async fn old_claim(store: &Arc<dyn Store>, key: &str, days: u32) -> Acquired {
    let mut request = request(key);
    request.job_id = old_id(days);
    let claims = store.claim(&[request], &terms(LONG)).await.unwrap();
    match claims.into_iter().next() {
        Some(Claim::Acquired(acquired)) => acquired,
        other => panic!("not acquired: {other:?}"),
    }
}

/// A job that arrived and ended this many days ago.
async fn old_job(database: &Database, store: &Arc<dyn Store>, key: &str, days: u32) -> Acquired {
    let acquired = old_claim(store, key, days).await;
    assert!(finish(store, &acquired.fence, succeeded()).await);
    ended(database, key, days).await;
    acquired
}

async fn ended(database: &Database, key: &str, days: u32) {
    let tables = database.tables().await;
    let then = tables.ago(DAY * days);
    let sql = format!("UPDATE processed_messages SET finished_at = {then} WHERE key = '{key}'");
    assert_eq!(tables.execute(sql).await, 1);
}

async fn count(database: &Database, table: &str) -> i64 {
    let tables = database.tables().await;
    let rows: Vec<(i64,)> = tables.fetch(format!("SELECT count(*) FROM {table}")).await;
    rows[0].0
}

async fn an_old_ended_job_is_purged_with_its_ledger(database: Database) {
    let store = database.open_migrated().await;
    let old = old_job(&database, &store, "old", 10).await;
    let young = old_job(&database, &store, "young", 3).await;
    for run in [&old, &young] {
        let told = AttemptReport::default();
        store.record_attempt(&run.fence, "w1", &told).await.unwrap();
    }
    assert_eq!(store.purge(DAY * 5, 100).await.unwrap(), 1);
    assert!(store.job(old.job_id).await.unwrap().is_none());
    assert!(store.job(young.job_id).await.unwrap().is_some());
    assert_eq!(count(&database, "ledger").await, 2);
    assert_eq!(count(&database, "attempts").await, 1);
    assert_eq!(store.purge(DAY * 5, 100).await.unwrap(), 0);
}

/// The job is kept however long ago it arrived.
async fn a_job_that_ended_within_the_retention_is_kept(database: Database) {
    let store = database.open_migrated().await;
    let acquired = old_claim(&store, "1", 10).await;
    assert!(finish(&store, &acquired.fence, succeeded()).await);
    assert_eq!(store.purge(DAY * 5, 100).await.unwrap(), 0);
    assert!(store.job(acquired.job_id).await.unwrap().is_some());
}

async fn an_open_job_is_never_purged(database: Database) {
    let store = database.open_migrated().await;
    let acquired = old_claim(&store, "1", 10).await;
    let released = old_claim(&store, "2", 10).await;
    store.release(&interrupted(&released.fence)).await.unwrap();
    let tables = database.tables().await;
    tables.end_lease(&acquired.fence.key, DAY * 10).await;
    for retention in [Duration::ZERO, DAY] {
        assert_eq!(store.purge(retention, 100).await.unwrap(), 0);
    }
    assert_eq!(count(&database, "leases").await, 2);
    assert_eq!(count(&database, "ledger").await, 3);
}

async fn a_refused_message_is_purged_like_an_ended_job(database: Database) {
    let store = database.open_migrated().await;
    let mut refusal = refusal("1");
    refusal.job_id = old_id(10);
    store.refuse(&refusal).await.unwrap();
    assert_eq!(store.purge(DAY * 5, 100).await.unwrap(), 0);
    ended(&database, "1", 9).await;
    assert_eq!(store.purge(DAY * 5, 100).await.unwrap(), 1);
    assert_eq!(count(&database, "ledger").await, 0);
}

/// Pub/Sub has forgotten the message, and publishing may have been down.
async fn a_dead_job_is_kept_until_its_message_is_published(database: Database) {
    let store = database.open_migrated().await;
    let mut refusal = refusal("1");
    refusal.job_id = old_id(10);
    refusal.dead_letter_topic = Some("graves".into());
    store.refuse(&refusal).await.unwrap();
    ended(&database, "1", 9).await;
    assert_eq!(store.purge(DAY * 5, 100).await.unwrap(), 0);
    let letters = letters(&store).await;
    assert_eq!(letters[0].message, refusal.message);
    let settled = store.dead_letter_settled(&letters[0], "w1", "published");
    settled.await.unwrap();
    assert_eq!(store.purge(DAY * 5, 100).await.unwrap(), 1);
}

async fn at_most_the_limit_is_purged_oldest_first(database: Database) {
    let store = database.open_migrated().await;
    let mut jobs = Vec::new();
    for (key, days) in [("1", 7), ("2", 10), ("3", 8), ("4", 9)] {
        jobs.push(old_job(&database, &store, key, days).await.job_id);
    }
    assert_eq!(store.purge(DAY * 5, 3).await.unwrap(), 3);
    assert!(store.job(jobs[0]).await.unwrap().is_some());
    assert_eq!(store.purge(DAY * 5, 3).await.unwrap(), 1);
    assert_eq!(count(&database, "processed_messages").await, 0);
}

async fn a_purged_key_is_new_again(database: Database) {
    let store = database.open_migrated().await;
    let old = old_job(&database, &store, "1", 10).await;
    assert_eq!(store.purge(DAY, 1).await.unwrap(), 1);
    let Claim::Acquired(again) = claim(&store, "1", LONG).await else {
        panic!("not acquired");
    };
    assert_eq!(again.fence.attempt, 1);
    assert_ne!(again.job_id, old.job_id);
}
