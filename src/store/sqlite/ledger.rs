//! The ledger: what happened to each message, for people.

use std::time::Duration;

use sqlx::sqlite::{SqlitePool, SqliteRow};
use sqlx::{Connection, Row, SqliteConnection};

use super::super::StoreError;
use super::claims::{BEGIN, milliseconds};
use super::reading::{read_job, time};
use crate::job::{JobKey, LedgerEntry, Note, Story};

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

/// Job ids begin with the milliseconds of their making, so the unique index on
/// them finds old rows; the time that counts is the database's.
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

const JOBS_OF_MESSAGE: &str = "
SELECT m.job_id, m.subscription, m.key, m.message_id, m.publish_time, m.ordering_key, m.task,
       m.state, m.attempts, m.duplicates, m.worker, m.received_at, m.started_at, m.finished_at,
       m.error, m.result, m.reason, m.checkpoint, leases.attempt - leases.interruptions AS live_attempts, leases.worker AS live_worker,
       leases.checkpoint AS live_checkpoint, leases.last_error,
       CASE WHEN leases.token IS NULL THEN leases.lease_until END AS waits_until,
       leases.started_at AS live_started_at,
       coalesce(leases.token IS NOT NULL
                AND leases.lease_until >= CAST(unixepoch('subsec') * 1000 AS INTEGER), false) AS held
FROM processed_messages m LEFT JOIN leases USING (subscription, key)
WHERE m.message_id = $1
   OR (m.subscription, m.key) IN (SELECT subscription, key FROM ledger WHERE message_id = $1)
ORDER BY m.job_id";

const LEDGER: &str = "
SELECT at, worker, kind, attempt, message_id, detail FROM ledger
WHERE subscription = $1 AND key = $2
ORDER BY id";

pub(super) async fn stories(pool: &SqlitePool, message_id: &str) -> Result<Vec<Story>, StoreError> {
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

fn read_entry(row: &SqliteRow) -> Result<LedgerEntry, StoreError> {
    Ok(LedgerEntry {
        at: time(row, "at")?.unwrap_or_default(),
        worker: row.try_get("worker")?,
        kind: row.try_get("kind")?,
        attempt: row.try_get("attempt")?,
        message_id: row.try_get("message_id")?,
        detail: row.try_get("detail")?,
    })
}
