//! Requests from people: to cancel a job, to run it again.

use sqlx::sqlite::SqlitePool;
use sqlx::{Connection, Row};
use uuid::Uuid;

use super::BEGIN;
use super::entry::{Entry, add_to_ledger};
use crate::job::JobKey;
use crate::record::{Cancelling, Retrying};
use crate::store::StoreError;
use crate::store::values::final_state;

const JOB: &str = "
SELECT m.subscription, m.key, m.state,
       leases.token IS NULL
       OR leases.lease_until < CAST(unixepoch('subsec') * 1000 AS INTEGER) AS waits,
       m.task IS NOT NULL AND m.payload IS NOT NULL AS can_run, leases.token IS NULL AS unheld
FROM processed_messages m LEFT JOIN leases USING (subscription, key)
WHERE m.job_id = $1";

/// A job that nobody runs ends at once, also one whose worker is lost.
const CANCEL_JOB: &str = "
UPDATE processed_messages
SET state = 'cancelled', finished_at = CAST(unixepoch('subsec') * 1000 AS INTEGER),
    attempts = waiting.attempt - waiting.interruptions, last_attempt = waiting.attempt,
    worker = waiting.worker, started_at = waiting.started_at, checkpoint = waiting.checkpoint
FROM (SELECT * FROM leases WHERE subscription = $1 AND key = $2) AS waiting
WHERE processed_messages.subscription = $1 AND processed_messages.key = $2";

const CANCEL_LEASE: &str = "DELETE FROM leases WHERE subscription = $1 AND key = $2";

/// A run is only asked to stop, since its worker writes the ending.
const ASK_TO_CANCEL: &str =
    "UPDATE leases SET cancel_requested = 1 WHERE subscription = $1 AND key = $2";

/// None if there is no such job.
pub(super) async fn cancel(
    pool: &SqlitePool,
    id: Uuid,
    by: &str,
) -> Result<Option<Cancelling>, StoreError> {
    let mut connection = pool.acquire().await?;
    let mut transaction = connection.begin_with(BEGIN).await?;
    let row = sqlx::query(JOB)
        .bind(id)
        .fetch_optional(&mut *transaction)
        .await?;
    let Some(row) = row else {
        return Ok(None);
    };
    if let Some(state) = final_state(row.try_get("state")?) {
        return Ok(Some(Cancelling::AlreadyEnded(state)));
    }
    let key = JobKey::new(row.try_get("subscription")?, row.try_get("key")?);
    let waits: bool = row.try_get("waits")?;
    let statements = match waits {
        true => vec![CANCEL_JOB, CANCEL_LEASE],
        false => vec![ASK_TO_CANCEL],
    };
    for statement in statements {
        sqlx::query(statement)
            .bind(&*key.subscription)
            .bind(&*key.key)
            .execute(&mut *transaction)
            .await?;
    }
    let (kind, answer) = match waits {
        true => ("cancelled", Cancelling::Cancelled),
        false => ("cancel_requested", Cancelling::Requested),
    };
    let entry = Entry {
        worker: by,
        kind,
        ..Entry::default()
    };
    add_to_ledger(&mut transaction, &key, &entry).await?;
    transaction.commit().await?;
    Ok(Some(answer))
}

/// The attempt number goes on from where the ended job left it. Jobs that an earlier
/// version ended have it in the ledger only. Earlier attempts do not count against the
/// task's maximum.
const QUEUE: &str = "
INSERT INTO leases (subscription, key, job_id, task, ordering_key, position, attempt,
                    interruptions, run_after, lease_until, queued_at, checkpoint, worker,
                    started_at)
SELECT m.subscription, m.key, m.job_id, m.task, nullif(m.ordering_key, ''),
       (SELECT coalesce(max(position), 0) + 1 FROM leases
        WHERE leases.subscription = m.subscription AND leases.ordering_key = m.ordering_key),
       fence.attempt, fence.attempt,
       CASE WHEN m.ordering_key <> '' AND EXISTS (
                SELECT 1 FROM leases
                WHERE leases.subscription = m.subscription
                  AND leases.ordering_key = m.ordering_key) THEN 9223372036854775807
            ELSE CAST(unixepoch('subsec') * 1000 AS INTEGER) END,
       CAST(unixepoch('subsec') * 1000 AS INTEGER),
       CAST(unixepoch('subsec') * 1000 AS INTEGER), m.checkpoint, m.worker, m.started_at
FROM processed_messages m
JOIN (SELECT coalesce(max(attempt), 0) AS attempt FROM (
          SELECT attempt FROM ledger WHERE subscription = $1 AND key = $2
          UNION ALL
          SELECT max(last_attempt, attempts) FROM processed_messages
          WHERE subscription = $1 AND key = $2)) AS fence
WHERE m.subscription = $1 AND m.key = $2";

const REOPEN: &str = "
UPDATE processed_messages
SET state = 'open', finished_at = NULL, finished_by = NULL, error = NULL, reason = NULL,
    result = NULL, dead_letter_topic = NULL, dead_letter_due = NULL
WHERE subscription = $1 AND key = $2";

/// A job behind another of its ordering key still waits for its turn.
const HURRY: &str = "
UPDATE leases
SET run_after = CASE WHEN run_after < 9223372036854775807
                     THEN min(run_after, CAST(unixepoch('subsec') * 1000 AS INTEGER))
                     ELSE run_after END,
    lease_until = min(lease_until, CAST(unixepoch('subsec') * 1000 AS INTEGER))
WHERE subscription = $1 AND key = $2";

/// None if there is no such job.
pub(super) async fn retry(
    pool: &SqlitePool,
    id: Uuid,
    by: &str,
) -> Result<Option<Retrying>, StoreError> {
    let mut connection = pool.acquire().await?;
    let mut transaction = connection.begin_with(BEGIN).await?;
    let row = sqlx::query(JOB)
        .bind(id)
        .fetch_optional(&mut *transaction)
        .await?;
    let Some(row) = row else {
        return Ok(None);
    };
    let ended = final_state(row.try_get("state")?).is_some();
    if ended && !row.try_get("can_run")? {
        return Ok(Some(Retrying::NothingToRun));
    }
    if !ended && !row.try_get("unheld")? {
        return Ok(Some(Retrying::Running));
    }
    let key = JobKey::new(row.try_get("subscription")?, row.try_get("key")?);
    let (statements, answer) = match ended {
        true => (vec![QUEUE, REOPEN], Retrying::Queued),
        false => (vec![HURRY], Retrying::Hurried),
    };
    for statement in statements {
        sqlx::query(statement)
            .bind(&*key.subscription)
            .bind(&*key.key)
            .execute(&mut *transaction)
            .await?;
    }
    let entry = Entry {
        worker: by,
        kind: "retried",
        ..Entry::default()
    };
    add_to_ledger(&mut transaction, &key, &entry).await?;
    transaction.commit().await?;
    Ok(Some(answer))
}
