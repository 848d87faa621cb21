//! What people ask for: to cancel a job, to run it again.

use sqlx::{PgPool, Row};
use uuid::Uuid;

use super::super::{StoreError, final_state};
use crate::job::{Cancelling, Retrying};

/// A job that nobody runs ends here and now; a run is only asked to stop, since
/// its end is its worker's to write. One whose worker is lost ends too.
const CANCEL: &str = "
WITH job AS (
    SELECT subscription, key, state FROM processed_messages WHERE job_id = $1
), waiting AS (
    DELETE FROM leases USING job
    WHERE leases.subscription = job.subscription AND leases.key = job.key
      AND (leases.token IS NULL OR leases.lease_until < now())
    RETURNING leases.*
), cancelled AS (
    UPDATE processed_messages
    SET state = 'cancelled', finished_at = now(), attempts = waiting.attempt - waiting.interruptions,
        last_attempt = waiting.attempt, worker = waiting.worker, started_at = waiting.started_at,
        checkpoint = waiting.checkpoint
    FROM waiting
    WHERE processed_messages.subscription = waiting.subscription
      AND processed_messages.key = waiting.key
), asked AS (
    UPDATE leases SET cancel_requested = true
    FROM job
    WHERE leases.subscription = job.subscription AND leases.key = job.key
      AND leases.token IS NOT NULL AND leases.lease_until >= now()
    RETURNING leases.subscription, leases.key
), noted AS (
    INSERT INTO ledger (subscription, key, worker, kind)
    SELECT subscription, key, $2, 'cancelled' FROM waiting
    UNION ALL
    SELECT subscription, key, $2, 'cancel_requested' FROM asked
)
SELECT job.state, EXISTS (SELECT 1 FROM waiting) AS waited, EXISTS (SELECT 1 FROM asked) AS asked
FROM job";

/// How often a job may change hands under the statement.
const TRIES: usize = 10;

/// None where there is no such job.
pub(super) async fn cancel(
    pool: &PgPool,
    id: Uuid,
    by: &str,
) -> Result<Option<Cancelling>, StoreError> {
    for _ in 0..TRIES {
        match try_cancel(pool, id, by).await? {
            Tried::Changed => {}
            Tried::Missing => return Ok(None),
            Tried::Answered(answer) => return Ok(Some(answer)),
        }
    }
    Err(StoreError::Unreadable(format!(
        "job {id} does not hold still"
    )))
}

enum Tried {
    Answered(Cancelling),
    Missing,
    /// It ended or changed hands while the statement ran.
    Changed,
}

async fn try_cancel(pool: &PgPool, id: Uuid, by: &str) -> Result<Tried, StoreError> {
    let row = sqlx::query(CANCEL)
        .bind(id)
        .bind(by)
        .fetch_optional(pool)
        .await?;
    let Some(row) = row else {
        return Ok(Tried::Missing);
    };
    if row.try_get("waited")? {
        return Ok(Tried::Answered(Cancelling::Cancelled));
    }
    if row.try_get("asked")? {
        return Ok(Tried::Answered(Cancelling::Requested));
    }
    Ok(
        final_state(row.try_get("state")?).map_or(Tried::Changed, |state| {
            Tried::Answered(Cancelling::AlreadyEnded(state))
        }),
    )
}

/// Beside another retry, or a claim that puts a job of the same ordering key on
/// record, the later one must see what the earlier one wrote.
const LOCK_JOB: &str = "
SELECT CASE WHEN ordering_key <> '' THEN
           pg_advisory_xact_lock(
               hashtextextended(subscription || chr(10) || ordering_key, 0))::text END
FROM processed_messages WHERE job_id = $1
FOR UPDATE";

/// The fence goes on growing from where the ended job left it, which those that
/// an earlier version ended have in the ledger only. What was tried before does
/// not count against the task's attempts.
const RETRY: &str = "
WITH job AS (
    SELECT * FROM processed_messages WHERE job_id = $1
), reopened AS (
    UPDATE processed_messages
    SET state = 'open', finished_at = NULL, finished_by = NULL, error = NULL, reason = NULL,
        result = NULL, dead_letter_topic = NULL, dead_letter_due = NULL
    FROM job
    WHERE processed_messages.subscription = job.subscription
      AND processed_messages.key = job.key
      AND job.state <> 'open' AND job.task IS NOT NULL AND job.payload IS NOT NULL
    RETURNING processed_messages.*
), queued AS (
    INSERT INTO leases (subscription, key, ordering_key, attempt, interruptions, lease_until,
                        checkpoint, worker, started_at)
    SELECT subscription, key, nullif(ordering_key, ''), fence.attempt, fence.attempt, now(),
           checkpoint, worker, started_at
    FROM reopened CROSS JOIN LATERAL (
        SELECT greatest(reopened.last_attempt, reopened.attempts, max(ledger.attempt)) AS attempt
        FROM ledger
        WHERE ledger.subscription = reopened.subscription AND ledger.key = reopened.key
    ) AS fence
), hurried AS (
    UPDATE leases SET lease_until = now()
    FROM job
    WHERE leases.subscription = job.subscription AND leases.key = job.key
      AND job.state = 'open' AND leases.token IS NULL
    RETURNING leases.subscription, leases.key
), noted AS (
    INSERT INTO ledger (subscription, key, worker, kind)
    SELECT subscription, key, $2, 'retried' FROM reopened
    UNION ALL
    SELECT subscription, key, $2, 'retried' FROM hurried
)
SELECT job.state = 'open' AS open, EXISTS (SELECT 1 FROM reopened) AS reopened,
       EXISTS (SELECT 1 FROM hurried) AS hurried
FROM job";

/// None where there is no such job.
pub(super) async fn retry(
    pool: &PgPool,
    id: Uuid,
    by: &str,
) -> Result<Option<Retrying>, StoreError> {
    let mut transaction = pool.begin().await?;
    sqlx::query(LOCK_JOB)
        .bind(id)
        .execute(&mut *transaction)
        .await?;
    let row = sqlx::query(RETRY)
        .bind(id)
        .bind(by)
        .fetch_optional(&mut *transaction)
        .await?;
    transaction.commit().await?;
    let Some(row) = row else {
        return Ok(None);
    };
    Ok(Some(
        match (row.try_get("reopened")?, row.try_get("hurried")?) {
            (true, _) => Retrying::Queued,
            (_, true) => Retrying::Hurried,
            _ if row.try_get("open")? => Retrying::Running,
            _ => Retrying::NothingToRun,
        },
    ))
}
