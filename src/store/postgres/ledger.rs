//! The ledger: what happened to each message, for people.

use std::time::Duration;

use sqlx::postgres::PgRow;
use sqlx::{PgPool, Row};

use super::super::{StoreError, storable};
use super::reading::read_job;
use crate::job::{JobKey, LedgerEntry, Note, Story};

const NOTE: &str = "
INSERT INTO ledger (subscription, key, worker, kind, attempt, detail)
SELECT subscription, key, $1, kind, attempt, detail
FROM unnest($2::text[], $3::text[], $4::text[], $5::int[], $6::text[])
  AS note (subscription, key, kind, attempt, detail)";

pub(super) async fn note(pool: &PgPool, worker: &str, notes: &[Note]) -> Result<(), StoreError> {
    let keys: Vec<&JobKey> = notes.iter().map(|note| &note.key).collect();
    let attempts = notes.iter().map(|note| note.attempt.map(u32::cast_signed));
    sqlx::query(NOTE)
        .bind(worker)
        .bind(
            keys.iter()
                .map(|key| &*key.subscription)
                .collect::<Vec<_>>(),
        )
        .bind(keys.iter().map(|key| &*key.key).collect::<Vec<_>>())
        .bind(
            notes
                .iter()
                .map(|note| note.kind.as_str())
                .collect::<Vec<_>>(),
        )
        .bind(attempts.collect::<Vec<_>>())
        .bind(
            notes
                .iter()
                .map(|note| note.detail.as_deref().map(storable))
                .collect::<Vec<_>>(),
        )
        .execute(pool)
        .await?;
    Ok(())
}

/// Job ids begin with the milliseconds of their making, so the unique index on
/// them finds old rows; the time that counts is the database's.
const PURGE: &str = "
WITH old AS (
    SELECT subscription, key FROM processed_messages
    WHERE job_id < (lpad(to_hex((extract(epoch FROM now()) * 1000 - $1 * 1000)::bigint), 12, '0')
                    || repeat('0', 20))::uuid
      AND state <> 'open' AND finished_at < now() - make_interval(secs => $1)
      AND dead_letter_topic IS NULL
    ORDER BY job_id
    LIMIT $2
    FOR UPDATE SKIP LOCKED
), forgotten AS (
    DELETE FROM ledger USING old
    WHERE ledger.subscription = old.subscription AND ledger.key = old.key
), forgotten_attempts AS (
    DELETE FROM attempts USING old
    WHERE attempts.subscription = old.subscription AND attempts.key = old.key
)
DELETE FROM processed_messages USING old
WHERE processed_messages.subscription = old.subscription AND processed_messages.key = old.key";

pub(super) async fn purge(
    pool: &PgPool,
    retention: Duration,
    limit: u32,
) -> Result<u64, StoreError> {
    let purged = sqlx::query(PURGE)
        .bind(retention.as_secs_f64())
        .bind(i64::from(limit))
        .execute(pool)
        .await?;
    Ok(purged.rows_affected())
}

const JOBS_OF_MESSAGE: &str = "
SELECT m.job_id, m.subscription, m.key, m.message_id, m.publish_time, m.ordering_key, m.task,
       m.state, m.attempts, m.duplicates, m.worker, m.received_at, m.started_at, m.finished_at,
       m.error, m.result, m.reason, m.checkpoint, leases.attempt - leases.interruptions AS live_attempts, leases.worker AS live_worker,
       leases.checkpoint AS live_checkpoint, leases.last_error,
       CASE WHEN leases.token IS NULL THEN leases.lease_until END AS waits_until,
       leases.started_at AS live_started_at,
       coalesce(leases.token IS NOT NULL AND leases.lease_until >= now(), false) AS held
FROM processed_messages m LEFT JOIN leases USING (subscription, key)
WHERE m.message_id = $1
   OR (m.subscription, m.key) IN (SELECT subscription, key FROM ledger WHERE message_id = $1)
ORDER BY m.job_id";

const LEDGER: &str = "
SELECT at, worker, kind, attempt, message_id, detail FROM ledger
WHERE subscription = $1 AND key = $2
ORDER BY id";

pub(super) async fn stories(pool: &PgPool, message_id: &str) -> Result<Vec<Story>, StoreError> {
    let jobs = sqlx::query(JOBS_OF_MESSAGE)
        .bind(message_id)
        .fetch_all(pool)
        .await?;
    let mut stories = Vec::with_capacity(jobs.len());
    for row in &jobs {
        let job = read_job(row)?;
        let entries = sqlx::query(LEDGER)
            .bind(&job.subscription)
            .bind(&job.key)
            .fetch_all(pool)
            .await?;
        let ledger = entries.iter().map(read_entry).collect::<Result<_, _>>()?;
        stories.push(Story { job, ledger });
    }
    Ok(stories)
}

fn read_entry(row: &PgRow) -> Result<LedgerEntry, StoreError> {
    Ok(LedgerEntry {
        at: row.try_get("at")?,
        worker: row.try_get("worker")?,
        kind: row.try_get("kind")?,
        attempt: row
            .try_get::<Option<i32>, _>("attempt")?
            .map(i32::unsigned_abs),
        message_id: row.try_get("message_id")?,
        detail: row.try_get("detail")?,
    })
}
