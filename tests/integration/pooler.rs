//! Postgres behind a pooler in transaction mode. The tests of the store run behind one too.

use std::sync::Arc;

use futures::{StreamExt, stream};
use sqlx::{Connection, PgConnection, Row};
use trainyard::job::Claim;
use trainyard::store::{self, Store, StoreError};

use crate::support::database::{Database, open};
use crate::support::jobs::{LONG, acquire, finish, request, send, succeeded, terms};
use crate::support::pooler::Pooler;

/// So few sessions that connections share them.
const FEW: &str = "default_pool_size = 2";
/// What its users are told to write when it refuses a program's startup parameters.
const DROPS_SETTINGS: &str = "ignore_startup_parameters = extra_float_digits, options";

const JOBS: usize = 40;
/// Of each store.
const CONNECTIONS: usize = 10;

/// Two workers' stores that claim the same jobs at the same time.
async fn each_job_is_claimed_once(stores: [Arc<dyn Store>; 2]) {
    stores[0].migrate(|_| {}).await.unwrap();
    let claims = (0..JOBS * 2).map(|number| {
        let store = Arc::clone(&stores[number % 2]);
        tokio::spawn(async move {
            let request = request(&(number / 2).to_string());
            let claim = send(&store, &request, &terms(LONG)).await;
            match claim {
                Claim::Acquired(acquired) => finish(&store, &acquired.fence, succeeded()).await,
                Claim::RunningUntil { .. } | Claim::AlreadyFinished(_) => false,
                other => panic!("{other:?}"),
            }
        })
    });
    // No more than there are connections: how long a call waits for one is limited.
    let ended = stream::iter(claims).buffer_unordered(CONNECTIONS);
    let ended: Vec<bool> = ended.map(Result::unwrap).collect().await;
    assert_eq!(ended.into_iter().filter(|ended| *ended).count(), JOBS);
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_pooler_that_refuses_settings_is_found_out() {
    let Some(database) = Database::postgres().await else {
        return;
    };
    let Some(pooler) = Pooler::in_front_of(&database, &[FEW]) else {
        return;
    };
    let stores = [open(&pooler.url, None).await, open(&pooler.url, None).await];
    each_job_is_claimed_once(stores).await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_pooler_that_drops_settings_is_found_out() {
    let Some(database) = Database::postgres().await else {
        return;
    };
    let Some(pooler) = Pooler::in_front_of(&database, &[FEW, DROPS_SETTINGS]) else {
        return;
    };
    let stores = [open(&pooler.url, None).await, open(&pooler.url, None).await];
    each_job_is_claimed_once(stores).await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_server_that_is_said_to_be_behind_a_pooler_is_used_as_if_it_were() {
    let Some(database) = Database::postgres().await else {
        return;
    };
    let said = Some(store::Pooler::Transaction);
    let url = &database.direct_url;
    let stores = [open(url, said).await, open(url, said).await];
    each_job_is_claimed_once(stores).await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn nothing_outlives_a_transaction_behind_a_pooler() {
    let Some(database) = Database::postgres().await else {
        return;
    };
    let Some(pooler) = Pooler::in_front_of(&database, &["default_pool_size = 1", DROPS_SETTINGS])
    else {
        return;
    };
    // Migrations hold one session for their lock.
    database.open_migrated().await;
    let store = open(&pooler.url, None).await;
    let claimed = acquire(&store, "1", LONG).await;
    store
        .renew(std::slice::from_ref(&claimed.fence), LONG)
        .await
        .unwrap();
    assert!(finish(&store, &claimed.fence, succeeded()).await);

    let mut somebody = PgConnection::connect(&pooler.url).await.unwrap();
    let left = sqlx::raw_sql(
        "SELECT current_setting('statement_timeout') AS timeout,
                current_setting('synchronous_commit') AS commits,
                (SELECT count(*) FROM pg_prepared_statements)::text AS statements,
                (SELECT count(*) FROM pg_locks
                 WHERE locktype = 'advisory' AND pid = pg_backend_pid())::text AS locks",
    );
    let left = left.fetch_one(&mut somebody).await.unwrap();
    let left: Vec<&str> = (0..4).map(|column| left.get(column)).collect();
    assert_eq!(left, ["0", "on", "0", "0"]);
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_lock_is_not_waited_for_without_end_behind_a_pooler() {
    let Some(database) = Database::behind_a_pooler().await else {
        return;
    };
    let store = database.open_migrated().await;
    let claimed = acquire(&store, "1", LONG).await;
    let mut somebody = PgConnection::connect(&database.direct_url).await.unwrap();
    let mut holding = somebody.begin().await.unwrap();
    sqlx::query("SELECT 1 FROM leases FOR UPDATE")
        .execute(&mut *holding)
        .await
        .unwrap();
    let saved = store.save_checkpoint(&claimed.fence, "c", false).await;
    assert!(matches!(saved, Err(StoreError::InTheWay(_))), "{saved:?}");
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn one_of_several_migrations_behind_a_pooler_does_the_work() {
    let Some(database) = Database::behind_a_pooler().await else {
        return;
    };
    let migrations = (0..3).map(async |_| {
        let store = database.open().await;
        store.migrate(|_| {}).await.unwrap();
        store.check_schema().await.unwrap();
    });
    futures::future::join_all(migrations).await;
    let tables = database.tables().await;
    let twice = "SELECT description FROM _sqlx_migrations GROUP BY 1 HAVING count(*) > 1";
    assert!(tables.fetch::<(String,)>(twice.to_owned()).await.is_empty());
}
