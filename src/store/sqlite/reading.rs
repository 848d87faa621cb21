//! The statements that only read.

use chrono::{DateTime, Utc};
use sqlx::Row;
use sqlx::migrate::Migrator;
use sqlx::sqlite::{SqlitePool, SqliteRow};
use uuid::Uuid;

use super::super::{StoreError, job_state, stored_state};
use crate::job::{Job, JobFilter};

const HAS_MIGRATIONS: &str = "
SELECT EXISTS (SELECT 1 FROM sqlite_master WHERE type = 'table' AND name = '_sqlx_migrations')";
const APPLIED_MIGRATIONS: &str = "SELECT version FROM _sqlx_migrations WHERE success";

/// How many migrations are still to be applied; None where none ever was.
pub(super) async fn outstanding_migrations(
    pool: &SqlitePool,
    migrator: &Migrator,
) -> Result<Option<usize>, StoreError> {
    if !sqlx::query_scalar(HAS_MIGRATIONS).fetch_one(pool).await? {
        return Ok(None);
    }
    let applied: Vec<i64> = sqlx::query_scalar(APPLIED_MIGRATIONS)
        .fetch_all(pool)
        .await?;
    let outstanding = migrator
        .iter()
        .filter(|migration| !applied.contains(&migration.version));
    Ok(Some(outstanding.count()))
}

/// Job ids are UUIDs of version 7, so their order is that of first arrival.
const JOBS: &str = "
SELECT m.job_id, m.subscription, m.key, m.message_id, m.publish_time, m.ordering_key, m.task,
       m.state, m.attempts, m.duplicates, m.worker, m.received_at, m.started_at, m.finished_at,
       m.error, m.result, m.reason, m.checkpoint, leases.attempt - leases.interruptions AS live_attempts, leases.worker AS live_worker,
       leases.checkpoint AS live_checkpoint, leases.last_error,
       CASE WHEN leases.token IS NULL THEN leases.lease_until END AS waits_until,
       leases.started_at AS live_started_at, coalesce(leases.token IS NOT NULL AND leases.lease_until >= CAST(unixepoch('subsec') * 1000 AS INTEGER), false) AS held
FROM processed_messages m LEFT JOIN leases USING (subscription, key)
WHERE ($1 IS NULL OR m.task = $1)
  AND ($2 IS NULL OR m.state = $2)
  AND ($3 IS NULL OR coalesce(leases.token IS NOT NULL AND leases.lease_until >= CAST(unixepoch('subsec') * 1000 AS INTEGER), false) = $3)
ORDER BY m.job_id DESC
LIMIT $4";

pub(super) async fn jobs(pool: &SqlitePool, filter: &JobFilter) -> Result<Vec<Job>, StoreError> {
    let (state, held) = filter.state.map_or((None, None), stored_state);
    let rows = sqlx::query(JOBS)
        .bind(&filter.task)
        .bind(state)
        .bind(held)
        .bind(filter.limit)
        .fetch_all(pool)
        .await?;
    rows.iter().map(read_job).collect()
}

const JOB_IDS_ENDING_WITH: &str = "
SELECT job_id FROM processed_messages
WHERE lower(hex(job_id)) LIKE '%' || $1
LIMIT $2";

pub(super) async fn job_ids_ending_with(
    pool: &SqlitePool,
    end: &str,
    limit: u32,
) -> Result<Vec<Uuid>, StoreError> {
    let ids = sqlx::query_scalar(JOB_IDS_ENDING_WITH)
        .bind(end)
        .bind(limit)
        .fetch_all(pool)
        .await?;
    Ok(ids)
}

const JOB: &str = "
SELECT m.*, leases.attempt - leases.interruptions AS live_attempts, leases.worker AS live_worker,
       leases.checkpoint AS live_checkpoint, leases.last_error,
       CASE WHEN leases.token IS NULL THEN leases.lease_until END AS waits_until,
       leases.started_at AS live_started_at, coalesce(leases.token IS NOT NULL AND leases.lease_until >= CAST(unixepoch('subsec') * 1000 AS INTEGER), false) AS held
FROM processed_messages m LEFT JOIN leases USING (subscription, key)
WHERE m.job_id = $1";

pub(super) async fn job(pool: &SqlitePool, id: Uuid) -> Result<Option<Job>, StoreError> {
    let Some(row) = sqlx::query(JOB).bind(id).fetch_optional(pool).await? else {
        return Ok(None);
    };
    let payload: Option<Vec<u8>> = row.try_get("payload")?;
    let mut job = read_job(&row)?;
    job.payload = payload.map(Into::into);
    Ok(Some(job))
}

pub(super) fn read_job(row: &SqliteRow) -> Result<Job, StoreError> {
    let state: &str = row.try_get("state")?;
    let ordering_key: String = row.try_get("ordering_key")?;
    let error: Option<String> = row.try_get("error")?;
    let live_checkpoint: Option<String> = row.try_get("live_checkpoint")?;
    let result: Option<String> = row.try_get("result")?;
    let result = result.map(|text| serde_json::from_str(&text)).transpose();
    let live_attempts: Option<u32> = row.try_get("live_attempts")?;
    let live_worker: Option<String> = row.try_get("live_worker")?;
    let live_started_at = time(row, "live_started_at")?;
    Ok(Job {
        id: row.try_get("job_id")?,
        subscription: row.try_get("subscription")?,
        key: row.try_get("key")?,
        message_id: row.try_get("message_id")?,
        publish_time: time(row, "publish_time")?.unwrap_or_default(),
        ordering_key: (!ordering_key.is_empty()).then_some(ordering_key),
        task: row.try_get("task")?,
        state: job_state(state, row.try_get("held")?),
        attempts: live_attempts.unwrap_or(row.try_get("attempts")?),
        duplicates: row.try_get("duplicates")?,
        worker: live_worker.or(row.try_get("worker")?),
        received_at: time(row, "received_at")?.unwrap_or_default(),
        started_at: live_started_at.or(time(row, "started_at")?),
        finished_at: time(row, "finished_at")?,
        error: error.or(row.try_get("last_error")?),
        reason: row.try_get("reason")?,
        checkpoint: live_checkpoint.or(row.try_get("checkpoint")?),
        waits_until: time(row, "waits_until")?,
        result: result.map_err(|error| StoreError::Unreadable(error.to_string()))?,
        payload: None,
    })
}

pub(super) fn time(row: &SqliteRow, column: &str) -> Result<Option<DateTime<Utc>>, StoreError> {
    let milliseconds: Option<i64> = row.try_get(column)?;
    Ok(milliseconds.and_then(DateTime::from_timestamp_millis))
}
