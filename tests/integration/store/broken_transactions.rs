//! Transactions that the database ends by itself.

use trainyard::job::Claim;

use crate::on_every_store;
use crate::support::database::{Database, Tables};
use crate::support::jobs::{LONG, request, send, terms};

on_every_store!(after_transactions_that_the_database_ended_every_statement_works,);

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
