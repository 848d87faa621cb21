//! Concurrent jobs of one ordering key.

use std::collections::BTreeSet;
use std::sync::Arc;
use std::sync::Mutex;
use std::sync::atomic::{AtomicUsize, Ordering};

use futures::future::join_all;
use tokio::task::yield_now;
use tokio::time::timeout;
use trainyard::job::{Acquired, Claim, ClaimRequest};
use trainyard::record::{Cancelling, JobFilter, JobState, Retrying};
use trainyard::store::Store;

use crate::on_every_store;
use crate::support::PATIENCE;
use crate::support::database::Database;
use crate::support::jobs::{
    LONG, acquired, assert_waits, finish, ordered, pass_the_lease, reap, reap_one, request, send,
    succeeded, terms, terms_of,
};

on_every_store!(
    of_50_messages_claimed_at_once_never_two_run,
    a_retried_job_and_a_new_one_of_its_key_do_not_both_run,
    a_key_goes_on_when_its_two_first_jobs_leave_at_once,
    a_key_goes_on_when_a_job_comes_as_the_one_before_it_leaves,
);

const MESSAGES: usize = 50;
const WORKERS: usize = 6;

/// State that the workers share.
#[derive(Default)]
struct Runs {
    now: AtomicUsize,
    done: Mutex<Vec<Acquired>>,
}

impl Runs {
    async fn run(&self, store: &Arc<dyn Store>, acquired: Acquired) {
        let others = self.now.fetch_add(1, Ordering::SeqCst);
        assert_eq!(others, 0, "two jobs of one ordering key run at once");
        yield_now().await;
        // Before the ending is written: after that, the next job may run.
        self.now.fetch_sub(1, Ordering::SeqCst);
        assert!(finish(store, &acquired.fence, succeeded()).await);
        self.done.lock().unwrap().push(acquired);
    }

    fn are_all_done(&self) -> bool {
        self.done.lock().unwrap().len() >= MESSAGES
    }
}

async fn of_50_messages_claimed_at_once_never_two_run(database: Database) {
    let store = database.open_migrated().await;
    let runs = Arc::new(Runs::default());
    let workers = (0..WORKERS).map(|worker| {
        let (store, runs) = (Arc::clone(&store), Arc::clone(&runs));
        tokio::spawn(async move { work(&store, &runs, worker).await })
    });
    let workers = timeout(PATIENCE, join_all(workers)).await;
    for worker in workers.expect("some job was never run") {
        worker.unwrap();
    }
    let done = runs.done.lock().unwrap();
    let distinct: BTreeSet<_> = done.iter().map(|run| &run.fence.key).collect();
    assert_eq!((done.len(), distinct.len()), (MESSAGES, MESSAGES));
    assert!(done.iter().all(|run| run.fence.attempt == 1));
}

/// Claims every message, as if each were delivered to each worker, and then takes the
/// rest from the table.
async fn work(store: &Arc<dyn Store>, runs: &Runs, worker: usize) {
    let terms = terms_of(&format!("w{worker}"));
    for nth in 0..MESSAGES {
        let key = (nth + worker * 7) % MESSAGES;
        let claim = send(store, &ordered(&key.to_string()), &terms).await;
        if let Claim::Acquired(acquired) = claim {
            runs.run(store, acquired).await;
        }
    }
    while !runs.are_all_done() {
        for reaped in reap(store, 5).await {
            runs.run(store, reaped.acquired).await;
        }
        pass_the_lease().await;
    }
}

async fn a_retried_job_and_a_new_one_of_its_key_do_not_both_run(database: Database) {
    let store = database.open_migrated().await;
    let first = acquired(send(&store, &ordered("first"), &terms(LONG)).await);
    assert!(finish(&store, &first.fence, succeeded()).await);
    for round in 0..40 {
        let retry = tokio::spawn({
            let store = Arc::clone(&store);
            async move { store.retry(first.job_id, "anna").await.unwrap() }
        });
        let claim = tokio::spawn({
            let store = Arc::clone(&store);
            async move { send(&store, &ordered(&round.to_string()), &terms(LONG)).await }
        });
        assert_eq!(retry.await.unwrap(), Some(Retrying::Queued));
        let mut runs: Vec<Acquired> = match claim.await.unwrap() {
            Claim::Acquired(acquired) => vec![acquired],
            Claim::Waiting { .. } => Vec::new(),
            other => panic!("neither acquired nor waiting: {other:?}"),
        };
        runs.extend(reap(&store, 5).await.into_iter().map(|r| r.acquired));
        assert_eq!(runs.len(), 1, "in round {round}");
        end_one_after_another(&store, runs).await;
    }
}

/// Ends both jobs of a round, whichever runs first.
async fn end_one_after_another(store: &Arc<dyn Store>, mut runs: Vec<Acquired>) {
    let mut ended = 0;
    while let Some(run) = runs.pop() {
        assert!(finish(store, &run.fence, succeeded()).await);
        ended += 1;
        runs.extend(reap(store, 5).await.into_iter().map(|r| r.acquired));
    }
    assert_eq!(ended, 2);
    let open = JobFilter {
        state: Some(JobState::Waiting),
        task: None,
        limit: 1,
    };
    assert_eq!(store.jobs(&open).await.unwrap(), []);
}

/// A request with its own ordering key.
fn ordered_by(ordering_key: &str, key: &str) -> ClaimRequest {
    let mut request = request(key);
    request.message.ordering_key = ordering_key.to_owned();
    request
}

/// The next job of the key may be ending, too.
async fn a_key_goes_on_when_its_two_first_jobs_leave_at_once(database: Database) {
    let store = database.open_migrated().await;
    for round in 0..60 {
        let ordering_key = format!("k{round}");
        let request = |nth: usize| ordered_by(&ordering_key, &format!("{round}-{nth}"));
        let first = acquired(send(&store, &request(0), &terms(LONG)).await);
        let (second, third) = (request(1), request(2));
        for waiting in [&second, &third] {
            assert_waits(&send(&store, waiting, &terms(LONG)).await);
        }
        let ending = tokio::spawn({
            let store = Arc::clone(&store);
            async move { finish(&store, &first.fence, succeeded()).await }
        });
        let cancelling = tokio::spawn({
            let store = Arc::clone(&store);
            async move { store.cancel(second.job_id, "anna").await.unwrap() }
        });
        assert!(ending.await.unwrap());
        assert_eq!(cancelling.await.unwrap(), Some(Cancelling::Cancelled));
        pass_the_lease().await;
        let third = reap_one(&store, &third.key.key).await;
        assert!(finish(&store, &third.fence, succeeded()).await);
    }
}

async fn a_key_goes_on_when_a_job_comes_as_the_one_before_it_leaves(database: Database) {
    let store = database.open_migrated().await;
    for round in 0..60 {
        let ordering_key = format!("k{round}");
        let request = |nth: usize| ordered_by(&ordering_key, &format!("{round}-{nth}"));
        let first = acquired(send(&store, &request(0), &terms(LONG)).await);
        let second = request(1);
        let ending = tokio::spawn({
            let store = Arc::clone(&store);
            async move { finish(&store, &first.fence, succeeded()).await }
        });
        let claiming = tokio::spawn({
            let (store, second) = (Arc::clone(&store), second.clone());
            async move { send(&store, &second, &terms(LONG)).await }
        });
        assert!(ending.await.unwrap());
        let run = match claiming.await.unwrap() {
            Claim::Acquired(run) => run,
            Claim::Waiting { .. } => {
                pass_the_lease().await;
                reap_one(&store, &second.key.key).await
            }
            other => panic!("neither acquired nor waiting: {other:?}"),
        };
        assert!(finish(&store, &run.fence, succeeded()).await);
    }
}
