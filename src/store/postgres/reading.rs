//! The statements that only read.

use sqlx::migrate::Migrator;
use sqlx::postgres::PgRow;
use sqlx::{PgPool, Row};
use uuid::Uuid;

use super::super::{StoreError, job_state, stored_state};
use crate::job::{Job, JobFilter};

const HAS_MIGRATIONS: &str = "SELECT to_regclass('_sqlx_migrations') IS NOT NULL";
const APPLIED_MIGRATIONS: &str = "SELECT version FROM _sqlx_migrations WHERE success";

/// How many migrations are still to be applied; None where none ever was.
pub(super) async fn outstanding_migrations(
    pool: &PgPool,
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
       leases.started_at AS live_started_at, coalesce(leases.token IS NOT NULL AND leases.lease_until >= now(), false) AS held
FROM processed_messages m LEFT JOIN leases USING (subscription, key)
WHERE ($1::text IS NULL OR m.task = $1)
  AND ($2::text IS NULL OR m.state = $2)
  AND ($3::boolean IS NULL OR coalesce(leases.token IS NOT NULL AND leases.lease_until >= now(), false) = $3)
ORDER BY m.job_id DESC
LIMIT $4";

pub(super) async fn jobs(pool: &PgPool, filter: &JobFilter) -> Result<Vec<Job>, StoreError> {
    let (state, held) = filter.state.map_or((None, None), stored_state);
    let rows = sqlx::query(JOBS)
        .bind(&filter.task)
        .bind(state)
        .bind(held)
        .bind(i64::from(filter.limit))
        .fetch_all(pool)
        .await?;
    rows.iter().map(read_job).collect()
}

const JOB_IDS_ENDING_WITH: &str = "
SELECT job_id FROM processed_messages
WHERE replace(job_id::text, '-', '') LIKE '%' || $1
LIMIT $2";

pub(super) async fn job_ids_ending_with(
    pool: &PgPool,
    end: &str,
    limit: u32,
) -> Result<Vec<Uuid>, StoreError> {
    let ids = sqlx::query_scalar(JOB_IDS_ENDING_WITH)
        .bind(end)
        .bind(i64::from(limit))
        .fetch_all(pool)
        .await?;
    Ok(ids)
}

const JOB: &str = "
SELECT m.*, leases.attempt - leases.interruptions AS live_attempts, leases.worker AS live_worker,
       leases.checkpoint AS live_checkpoint, leases.last_error,
       CASE WHEN leases.token IS NULL THEN leases.lease_until END AS waits_until,
       leases.started_at AS live_started_at, coalesce(leases.token IS NOT NULL AND leases.lease_until >= now(), false) AS held
FROM processed_messages m LEFT JOIN leases USING (subscription, key)
WHERE m.job_id = $1";

pub(super) async fn job(pool: &PgPool, id: Uuid) -> Result<Option<Job>, StoreError> {
    let Some(row) = sqlx::query(JOB).bind(id).fetch_optional(pool).await? else {
        return Ok(None);
    };
    let payload: Option<Vec<u8>> = row.try_get("payload")?;
    let mut job = read_job(&row)?;
    job.payload = payload.map(Into::into);
    Ok(Some(job))
}

pub(super) fn read_job(row: &PgRow) -> Result<Job, StoreError> {
    let live_attempts: Option<i32> = row.try_get("live_attempts")?;
    let attempts = live_attempts.unwrap_or(row.try_get("attempts")?);
    let live_worker: Option<String> = row.try_get("live_worker")?;
    let ordering_key: String = row.try_get("ordering_key")?;
    let error: Option<String> = row.try_get("error")?;
    let live_checkpoint: Option<String> = row.try_get("live_checkpoint")?;
    Ok(Job {
        id: row.try_get("job_id")?,
        subscription: row.try_get("subscription")?,
        key: row.try_get("key")?,
        message_id: row.try_get("message_id")?,
        publish_time: row.try_get("publish_time")?,
        ordering_key: (!ordering_key.is_empty()).then_some(ordering_key),
        task: row.try_get("task")?,
        state: job_state(row.try_get("state")?, row.try_get("held")?),
        attempts: attempts.unsigned_abs(),
        duplicates: row.try_get::<i32, _>("duplicates")?.unsigned_abs(),
        worker: live_worker.or(row.try_get("worker")?),
        received_at: row.try_get("received_at")?,
        started_at: row
            .try_get::<Option<_>, _>("live_started_at")?
            .or(row.try_get("started_at")?),
        finished_at: row.try_get("finished_at")?,
        error: error.or(row.try_get("last_error")?),
        reason: row.try_get("reason")?,
        checkpoint: live_checkpoint.or(row.try_get("checkpoint")?),
        waits_until: row.try_get("waits_until")?,
        result: row.try_get("result")?,
        payload: None,
    })
}
