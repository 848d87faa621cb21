//! What attempts have told about themselves, for people.

use sqlx::postgres::PgRow;
use sqlx::{PgPool, Row};
use uuid::Uuid;

use super::super::{StoreError, from_json, json_text, series_text};
use crate::job::{AttemptRecord, Fence, Told};

const KEEP_ATTEMPT: &str = "
INSERT INTO attempts (subscription, key, attempt, worker, outcome, log, series)
VALUES ($1, $2, $3, $4, $5, $6::text::json, $7::text::json)
ON CONFLICT (subscription, key, attempt) DO UPDATE
SET ended_at = excluded.ended_at, outcome = excluded.outcome, log = excluded.log,
    series = excluded.series";

pub(super) async fn keep_attempt(
    pool: &PgPool,
    fence: &Fence,
    worker: &str,
    told: &Told,
) -> Result<(), StoreError> {
    sqlx::query(KEEP_ATTEMPT)
        .bind(&*fence.key.subscription)
        .bind(&*fence.key.key)
        .bind(fence.attempt.cast_signed())
        .bind(worker)
        .bind(told.outcome)
        .bind(json_text(&told.log)?)
        .bind(series_text(&told.series)?)
        .execute(pool)
        .await?;
    Ok(())
}

const ATTEMPTS: &str = "
SELECT attempt, attempts.worker, ended_at, outcome, log::text, series::text
FROM attempts JOIN processed_messages USING (subscription, key)
WHERE job_id = $1
ORDER BY attempt";

pub(super) async fn attempts(pool: &PgPool, id: Uuid) -> Result<Vec<AttemptRecord>, StoreError> {
    let rows = sqlx::query(ATTEMPTS).bind(id).fetch_all(pool).await?;
    rows.iter().map(read_attempt).collect()
}

fn read_attempt(row: &PgRow) -> Result<AttemptRecord, StoreError> {
    Ok(AttemptRecord {
        attempt: row.try_get::<i32, _>("attempt")?.unsigned_abs(),
        worker: row.try_get("worker")?,
        ended_at: row.try_get("ended_at")?,
        outcome: row.try_get("outcome")?,
        log: from_json(row.try_get("log")?)?,
        series: from_json(row.try_get("series")?)?,
    })
}
