//! Transactions that the database ends by itself, or that nobody waits for.

use std::time::Duration;

use tokio::time::timeout;
use trainyard::job::Claim;

use crate::on_every_store;
use crate::support::database::{Database, Tables};
use crate::support::jobs::{ENDED, LONG, acquire, finish, request, send, succeeded, terms};

on_every_store!(
    after_transactions_that_the_database_ended_every_statement_works,
    after_calls_that_were_given_up_every_ending_is_stored,
);

/// More than a store has connections.
const TRIES: usize = 20;

/// What ends each transaction that adds a job: on SQLite as a full disk does, on Postgres as
/// an administrator does.
fn breaking(tables: &Tables) -> Vec<&'static str> {
    match tables {
        Tables::Sqlite(_) => vec![
            "CREATE TRIGGER breaking BEFORE INSERT ON leases
             BEGIN SELECT RAISE(ROLLBACK, 'the disk is full'); END",
        ],
        Tables::Postgres(_) => vec![
            "CREATE FUNCTION end_session() RETURNS trigger LANGUAGE plpgsql AS
             'BEGIN PERFORM pg_terminate_backend(pg_backend_pid()); RETURN NEW; END'",
            "CREATE TRIGGER breaking BEFORE INSERT ON leases
             FOR EACH ROW EXECUTE FUNCTION end_session()",
        ],
    }
}

async fn after_transactions_that_the_database_ended_every_statement_works(database: Database) {
    let store = database.open_migrated().await;
    let tables = database.tables().await;
    for statement in breaking(&tables) {
        tables.execute(statement.to_owned()).await;
    }
    for key in 0..TRIES {
        let request = request(&key.to_string());
        store.claim(&[request], &terms(LONG)).await.unwrap_err();
    }
    let mended = match tables {
        Tables::Sqlite(_) => "DROP TRIGGER breaking",
        Tables::Postgres(_) => "DROP TRIGGER breaking ON leases",
    };
    tables.execute(mended.to_owned()).await;
    for key in 0..TRIES {
        let claim = send(&store, &request(&key.to_string()), &terms(LONG)).await;
        assert!(matches!(claim, Claim::Acquired(_)), "{claim:?}");
    }
}

/// Dropped while it begins, a transaction must not stay open on a connection of the pool:
/// what runs on that later would never be committed.
async fn after_calls_that_were_given_up_every_ending_is_stored(database: Database) {
    let store = database.open_migrated().await;
    let tables = database.tables().await;
    let mut runs = Vec::new();
    for key in 0..TRIES {
        runs.push(acquire(&store, &key.to_string(), LONG).await);
    }
    for step in 0..600 {
        let patience = Duration::from_micros(step * 5);
        let (requests, terms) = ([request(&format!("given up {step}"))], terms(ENDED));
        let claiming = store.claim(&requests, &terms);
        let _ = timeout(patience, claiming).await;
    }
    // At once, so that every connection takes part.
    let finishes = runs
        .iter()
        .map(|run| finish(&store, &run.fence, succeeded()));
    let ended = futures::future::join_all(finishes).await;
    assert!(ended.into_iter().all(|ended| ended));
    let stored = "SELECT count(*) FROM processed_messages WHERE state = 'succeeded'";
    let stored: Vec<(i64,)> = tables.fetch(stored.to_owned()).await;
    assert_eq!(stored, [(i64::try_from(TRIES).unwrap(),)]);
}
