//! What attempts have told about themselves, for people.

use sqlx::Row;
use sqlx::sqlite::{SqlitePool, SqliteRow};
use uuid::Uuid;

use super::super::{StoreError, from_json, json_text, series_text};
use super::reading::time;
use crate::job::{AttemptRecord, Fence, Told};

const KEEP_ATTEMPT: &str = "
INSERT INTO attempts (subscription, key, attempt, worker, ended_at, outcome, log, series)
VALUES ($1, $2, $3, $4, CAST(unixepoch('subsec') * 1000 AS INTEGER), $5, $6, $7)
ON CONFLICT (subscription, key, attempt) DO UPDATE
SET ended_at = excluded.ended_at, outcome = excluded.outcome, log = excluded.log,
    series = excluded.series";

pub(super) async fn keep_attempt(
    pool: &SqlitePool,
    fence: &Fence,
    worker: &str,
    told: &Told,
) -> Result<(), StoreError> {
    sqlx::query(KEEP_ATTEMPT)
        .bind(&*fence.key.subscription)
        .bind(&*fence.key.key)
        .bind(fence.attempt)
        .bind(worker)
        .bind(told.outcome)
        .bind(json_text(&told.log)?)
        .bind(series_text(&told.series)?)
        .execute(pool)
        .await?;
    Ok(())
}

const ATTEMPTS: &str = "
SELECT attempt, attempts.worker, ended_at, outcome, log, series
FROM attempts JOIN processed_messages USING (subscription, key)
WHERE job_id = $1
ORDER BY attempt";

pub(super) async fn attempts(
    pool: &SqlitePool,
    id: Uuid,
) -> Result<Vec<AttemptRecord>, StoreError> {
    let rows = sqlx::query(ATTEMPTS).bind(id).fetch_all(pool).await?;
    rows.iter().map(read_attempt).collect()
}

fn read_attempt(row: &SqliteRow) -> Result<AttemptRecord, StoreError> {
    Ok(AttemptRecord {
        attempt: row.try_get("attempt")?,
        worker: row.try_get("worker")?,
        ended_at: time(row, "ended_at")?.unwrap_or_default(),
        outcome: row.try_get("outcome")?,
        log: from_json(row.try_get("log")?)?,
        series: from_json(row.try_get("series")?)?,
    })
}
