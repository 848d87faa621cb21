//! The ledger's lines: what happened to each message, for people.

use sqlx::SqliteConnection;

use crate::job::JobKey;
use crate::store::StoreError;

/// One line of a job's ledger.
#[derive(Default)]
pub(super) struct Entry<'a> {
    pub(super) worker: &'a str,
    pub(super) kind: &'static str,
    pub(super) attempt: Option<u32>,
    pub(super) message_id: Option<&'a str>,
    pub(super) detail: Option<&'a str>,
}

const ADD_TO_LEDGER: &str = "
INSERT INTO ledger (subscription, key, at, worker, kind, attempt, message_id, detail)
VALUES ($1, $2, CAST(unixepoch('subsec') * 1000 AS INTEGER), $3, $4, $5, $6, $7)";

pub(super) async fn add_to_ledger(
    connection: &mut SqliteConnection,
    key: &JobKey,
    entry: &Entry<'_>,
) -> Result<(), StoreError> {
    sqlx::query(ADD_TO_LEDGER)
        .bind(&*key.subscription)
        .bind(&*key.key)
        .bind(entry.worker)
        .bind(entry.kind)
        .bind(entry.attempt)
        .bind(entry.message_id)
        .bind(entry.detail)
        .execute(connection)
        .await?;
    Ok(())
}
