//! Statements that lock many rows lock them in one order, so that none has to be rolled
//! back for another.

use std::sync::Arc;

use futures::future::join_all;
use trainyard::job::{Acquired, Claim, ClaimRequest, Fence};
use trainyard::store::{Finish, Store};

use crate::support::eventually;
use crate::support::jobs::{ENDED, LONG, failed, message, reap, request, succeeded, terms};
use crate::support::private_postgres::PrivatePostgres;
use crate::support::seeded;

const WORKERS: usize = 4;
const ROUNDS: usize = 80;
const KEYS: usize = 40;
const BATCH: usize = 30;

/// Workers claim, renew, finish and give back the same few jobs, and people retry and
/// cancel them.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn batches_with_jobs_in_common_do_not_deadlock() {
    let Some(postgres) = PrivatePostgres::start() else {
        return;
    };
    let database = postgres.database();
    let store = database.open_migrated().await;
    let mut random = seeded();
    let workers = (0..WORKERS).map(|_| work(Arc::clone(&store), random.fork()));
    join_all(workers).await;
    drop(store);
    let tables = database.tables().await;
    // A connection tells its counts at its end at the latest.
    let deadlocks = eventually("the server's counts", async || {
        let rows: Vec<(i64, i64)> = tables
            .fetch(
                "SELECT deadlocks, (SELECT count(*) FROM pg_stat_activity
                                    WHERE application_name = 'trainyard')
                 FROM pg_stat_database WHERE datname = current_database()"
                    .to_owned(),
            )
            .await;
        (rows[0].1 == 0).then_some(rows[0].0)
    })
    .await;
    assert_eq!(deadlocks, 0, "transactions were rolled back for another");
}

async fn work(store: Arc<dyn Store>, mut random: fastrand::Rng) {
    for _ in 0..ROUNDS {
        let requests: Vec<ClaimRequest> = (0..BATCH).map(|_| any(&mut random)).collect();
        // Some are lost at once, and dead when that has happened three times.
        let lease = if random.bool() { LONG } else { ENDED };
        let claims = store.claim(&requests, &terms(lease)).await.unwrap();
        let mut jobs: Vec<Acquired> = claims.into_iter().filter_map(acquired).collect();
        jobs.extend(reap(&store, 5).await.into_iter().map(|job| job.acquired));
        random.shuffle(&mut jobs);
        let fences: Vec<Fence> = jobs.iter().map(|job| job.fence.clone()).collect();
        store.renew(&fences, LONG).await.unwrap();
        let (end, go_on) = fences.split_at(fences.len() / 2);
        let finishes: Vec<Finish> = end.iter().cloned().map(finish).collect();
        store.finish(&finishes).await.unwrap();
        let claims: Vec<_> = go_on
            .iter()
            .map(|run| (run.key.clone(), run.token))
            .collect();
        match random.bool() {
            true => store.disown(&claims).await.unwrap(),
            false => {
                for run in go_on {
                    store.release(&failed(run, "no luck", LONG)).await.unwrap();
                }
            }
        }
        for job in jobs.iter().take(3) {
            store.retry(job.job_id, "anna").await.unwrap();
        }
        if let Some(job) = jobs.last() {
            store.cancel(job.job_id, "anna").await.unwrap();
        }
    }
}

/// A message for any of the jobs; some have ordering keys.
fn any(random: &mut fastrand::Rng) -> ClaimRequest {
    let number = random.usize(0..KEYS);
    let mut request = request(&number.to_string());
    request.message = message(&random.u32(..).to_string());
    if number.is_multiple_of(2) {
        request.message.ordering_key = (number % 20).to_string();
    }
    request
}

fn acquired(claim: Claim) -> Option<Acquired> {
    match claim {
        Claim::Acquired(acquired) => Some(acquired),
        _ => None,
    }
}

fn finish(fence: Fence) -> Finish {
    Finish {
        fence,
        ending: succeeded(),
        checkpoint: None,
        dead_letter_topic: None,
    }
}
