//! Records for people, and their deletion.

use std::time::Duration;

use sqlx::Connection;
use sqlx::sqlite::SqlitePool;

use super::entry::{Entry, add_to_ledger};
use super::{BEGIN, milliseconds};
use crate::job::Fence;
use crate::record::{AttemptReport, Note};
use crate::store::StoreError;
use crate::store::values::{json_text, series_text};

pub(super) async fn note(
    pool: &SqlitePool,
    worker: &str,
    notes: &[Note],
) -> Result<(), StoreError> {
    let mut connection = pool.acquire().await?;
    let mut transaction = connection.begin_with(BEGIN).await?;
    for note in notes {
        let entry = Entry {
            worker,
            kind: note.kind.as_str(),
            attempt: note.attempt,
            detail: note.detail.as_deref(),
            ..Entry::default()
        };
        add_to_ledger(&mut transaction, &note.key, &entry).await?;
    }
    transaction.commit().await?;
    Ok(())
}

const RECORD_ATTEMPT: &str = "
INSERT INTO attempts (subscription, key, attempt, worker, ended_at, outcome, log, series)
VALUES ($1, $2, $3, $4, CAST(unixepoch('subsec') * 1000 AS INTEGER), $5, $6, $7)
ON CONFLICT (subscription, key, attempt) DO UPDATE
SET ended_at = excluded.ended_at, outcome = excluded.outcome, log = excluded.log,
    series = excluded.series";

pub(super) async fn record_attempt(
    pool: &SqlitePool,
    fence: &Fence,
    worker: &str,
    report: &AttemptReport,
) -> Result<(), StoreError> {
    sqlx::query(RECORD_ATTEMPT)
        .bind(&*fence.key.subscription)
        .bind(&*fence.key.key)
        .bind(fence.attempt)
        .bind(worker)
        .bind(report.outcome)
        .bind(json_text(&report.log)?)
        .bind(series_text(&report.series)?)
        .execute(pool)
        .await?;
    Ok(())
}

/// Job ids begin with their creation time in milliseconds, so their unique index finds
/// old rows; the database's clock decides.
const FIND_OLD: &str = "
SELECT subscription, key FROM processed_messages
WHERE job_id < unhex(printf('%012x', CAST(unixepoch('subsec') * 1000 AS INTEGER) - $1)
                     || '00000000000000000000')
  AND state <> 'open' AND finished_at < CAST(unixepoch('subsec') * 1000 AS INTEGER) - $1
  AND dead_letter_topic IS NULL
ORDER BY job_id
LIMIT $2";
const FORGET_JOB: &str = "DELETE FROM processed_messages WHERE subscription = $1 AND key = $2";
const FORGET_LEDGER: &str = "DELETE FROM ledger WHERE subscription = $1 AND key = $2";
const FORGET_ATTEMPTS: &str = "DELETE FROM attempts WHERE subscription = $1 AND key = $2";

pub(super) async fn purge(
    pool: &SqlitePool,
    retention: Duration,
    limit: u32,
) -> Result<u64, StoreError> {
    let mut connection = pool.acquire().await?;
    let mut transaction = connection.begin_with(BEGIN).await?;
    let old: Vec<(String, String)> = sqlx::query_as(FIND_OLD)
        .bind(milliseconds(retention))
        .bind(limit)
        .fetch_all(&mut *transaction)
        .await?;
    for (subscription, key) in &old {
        for forget in [FORGET_JOB, FORGET_LEDGER, FORGET_ATTEMPTS] {
            sqlx::query(forget)
                .bind(subscription)
                .bind(key)
                .execute(&mut *transaction)
                .await?;
        }
    }
    transaction.commit().await?;
    Ok(old.len() as u64)
}
