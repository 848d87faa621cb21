//! The reports of attempts.

use std::collections::BTreeMap;
use std::sync::Arc;

use trainyard::job::Acquired;
use trainyard::record::{AttemptRecord, AttemptReport};
use trainyard::report::Progress;
use trainyard::store::Store;
use uuid::Uuid;

use crate::on_every_store;
use crate::support::database::Database;
use crate::support::jobs::{
    ENDED, LONG, acquire, finish, job_of, pass_the_lease, refusal, succeeded,
};

on_every_store!(
    what_attempts_told_is_read_back_in_their_order,
    an_attempt_is_kept_once,
    a_lost_attempt_may_tell_and_changes_nothing,
    a_job_whose_attempts_told_nothing_has_none,
    what_is_no_number_is_left_out,
);

fn loss(step: u64, loss: f64) -> Progress {
    Progress {
        fraction: Some(0.25),
        step: Some(step),
        metrics: BTreeMap::from([("loss".to_owned(), loss)]),
    }
}

fn told(outcome: &'static str, series: Vec<Progress>) -> AttemptReport {
    AttemptReport {
        outcome,
        log: vec!["a\0b".to_owned(), "\u{1f682}".to_owned()],
        series,
    }
}

async fn keep(store: &Arc<dyn Store>, run: &Acquired, told: &AttemptReport) {
    store.record_attempt(&run.fence, "w1", told).await.unwrap();
}

async fn kept(store: &Arc<dyn Store>, run: &Acquired) -> Vec<AttemptRecord> {
    store.attempts(run.job_id).await.unwrap()
}

async fn what_attempts_told_is_read_back_in_their_order(database: Database) {
    let store = database.open_migrated().await;
    let first = acquire(&store, "1", ENDED).await;
    pass_the_lease().await;
    let second = acquire(&store, "1", LONG).await;
    let series = vec![
        loss(1, 0.1 + 0.2),
        Progress::default(),
        loss(u64::MAX, 1e-300),
    ];
    keep(&store, &second, &told("succeeded", series.clone())).await;
    keep(&store, &first, &told("lease_lost", Vec::new())).await;
    let another = acquire(&store, "2", LONG).await;
    keep(&store, &another, &told("failed", Vec::new())).await;

    let kept = kept(&store, &second).await;
    let outline: Vec<_> = kept
        .iter()
        .map(|kept| (kept.attempt, &*kept.outcome, &*kept.worker))
        .collect();
    assert_eq!(outline, [(1, "lease_lost", "w1"), (2, "succeeded", "w1")]);
    assert_eq!((&kept[0].series, &kept[1].series), (&Vec::new(), &series));
    assert_eq!(kept[1].log, ["a\0b", "\u{1f682}"]);
    let started = job_of(&store, &second).await.started_at.unwrap();
    assert!(kept[1].ended_at >= started);
}

/// Its last report counts; it may report while it runs.
async fn an_attempt_is_kept_once(database: Database) {
    let store = database.open_migrated().await;
    let run = acquire(&store, "1", LONG).await;
    keep(&store, &run, &told("failed", vec![loss(1, 0.5)])).await;
    let last = vec![loss(1, 0.5), loss(2, 0.25)];
    keep(&store, &run, &told("succeeded", last.clone())).await;
    let kept = kept(&store, &run).await;
    assert_eq!(kept.len(), 1);
    assert_eq!((&*kept[0].outcome, &kept[0].series), ("succeeded", &last));
}

async fn a_lost_attempt_may_tell_and_changes_nothing(database: Database) {
    let store = database.open_migrated().await;
    let lost = acquire(&store, "1", ENDED).await;
    pass_the_lease().await;
    let holder = acquire(&store, "1", LONG).await;
    let before = job_of(&store, &holder).await;
    keep(&store, &lost, &told("lease_lost", Vec::new())).await;
    assert_eq!(kept(&store, &holder).await.len(), 1);
    assert_eq!(job_of(&store, &holder).await, before);
    assert!(finish(&store, &holder.fence, succeeded()).await);
    keep(&store, &holder, &told("succeeded", Vec::new())).await;
    assert_eq!(kept(&store, &holder).await.len(), 2);
}

async fn a_job_whose_attempts_told_nothing_has_none(database: Database) {
    let store = database.open_migrated().await;
    let run = acquire(&store, "1", LONG).await;
    assert_eq!(kept(&store, &run).await, []);
    let refused = refusal("2");
    store.refuse(&refused).await.unwrap();
    assert_eq!(store.attempts(refused.job_id).await.unwrap(), []);
    assert_eq!(store.attempts(Uuid::now_v7()).await.unwrap(), []);
}

/// A diverging loss must not make its job unreadable.
async fn what_is_no_number_is_left_out(database: Database) {
    let store = database.open_migrated().await;
    let run = acquire(&store, "1", LONG).await;
    let mut diverged = loss(2, f64::NAN);
    diverged.fraction = Some(f64::INFINITY);
    diverged.metrics.insert("rate".to_owned(), 0.01);
    keep(&store, &run, &told("failed", vec![loss(1, 0.5), diverged])).await;
    let kept = kept(&store, &run).await;
    assert_eq!(kept[0].series[0], loss(1, 0.5));
    let expected = Progress {
        fraction: None,
        step: Some(2),
        metrics: BTreeMap::from([("rate".to_owned(), 0.01)]),
    };
    assert_eq!(kept[0].series[1], expected);
}
