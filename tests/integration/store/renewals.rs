//! The cost of renewals on Postgres.

use trainyard::job::{Claim, Fence, Renewal};

use crate::support::database::Tables;
use crate::support::eventually;
use crate::support::jobs::{LONG, request, terms};
use crate::support::private_postgres::PrivatePostgres;

const LEASES: usize = 200;
const ROUNDS: usize = 20;

const FINISHED: &str = "
INSERT INTO processed_messages
       (subscription, key, job_id, message_id, publish_time, ordering_key, attributes, payload,
        task, state, attempts, worker, started_at, finished_at, finished_by)
SELECT 's', 'old-' || n, gen_random_uuid(), n::text, now(), '', '{}', 'payload', 'train',
       'succeeded', 1, 'w0', now(), now(), gen_random_uuid()
FROM generate_series(1, 100000) AS n";

const UPDATES: &str = "
SELECT coalesce(n_tup_upd, 0), coalesce(n_tup_hot_upd, 0)
FROM pg_stat_user_tables WHERE relname = 'leases'";

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn renewals_stay_heap_only_beside_100_000_finished_jobs() {
    // Beside other tests, the databases that they create keep row versions from being
    // pruned for a while, which leaves no room for heap-only updates.
    let Some(postgres) = PrivatePostgres::start() else {
        return;
    };
    let database = postgres.database();
    let store = database.open_migrated().await;
    let tables = database.tables().await;
    tables.execute(FINISHED.to_owned()).await;
    let requests: Vec<_> = (0..LEASES).map(|n| request(&n.to_string())).collect();
    let claims = store.claim(&requests, &terms(LONG)).await.unwrap();
    let fences: Vec<Fence> = claims
        .into_iter()
        .map(|claim| match claim {
            Claim::Acquired(acquired) => acquired.fence,
            other => panic!("not acquired: {other:?}"),
        })
        .collect();
    for _ in 0..ROUNDS {
        let renewed = store.renew(&fences, LONG).await.unwrap();
        assert!(renewed.iter().all(|renewed| *renewed == Renewal::Renewed));
    }
    // A connection reports its counts at its end at the latest.
    drop(store);
    let (updates, hot) = eventually("the counts of updates", async || {
        updates_counted(&tables).await
    })
    .await;
    println!("{hot} of {updates} renewals were heap-only");
    assert!(hot * 100 >= updates * 95, "{hot} of {updates}");
}

async fn updates_counted(tables: &Tables) -> Option<(i64, i64)> {
    let rows: Vec<(i64, i64)> = tables.fetch(UPDATES.to_owned()).await;
    let counts = *rows.first()?;
    (counts.0 >= i64::try_from(LEASES * ROUNDS).ok()?).then_some(counts)
}
