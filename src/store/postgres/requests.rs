//! Requests from people: to cancel a job, to run it again.

use sqlx::Row;
use uuid::Uuid;

use super::ordering::lock_places_in;
use super::sessions::Sessions;
use crate::record::{Cancelling, Retrying};
use crate::store::StoreError;
use crate::store::values::final_state;

/// A job that nobody runs ends at once, also one whose worker is lost. A run is only
/// asked to stop, since its worker writes the ending.
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

/// How often the statement is tried while the job changes hands.
const TRIES: usize = 10;

/// None if there is no such job.
pub(super) async fn cancel(
    sessions: &Sessions,
    id: Uuid,
    by: &str,
) -> Result<Option<Cancelling>, StoreError> {
    for _ in 0..TRIES {
        match try_cancel(sessions, id, by).await? {
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
    /// The job ended or changed hands while the statement ran.
    Changed,
}

async fn try_cancel(sessions: &Sessions, id: Uuid, by: &str) -> Result<Tried, StoreError> {
    let row = sqlx::query(CANCEL)
        .bind(id)
        .bind(by)
        .fetch_optional(sessions)
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

const ORDERING_KEY: &str = "
SELECT subscription, ordering_key FROM processed_messages WHERE job_id = $1";

/// Lets a waiting job run now; one behind another of its ordering key still waits for its
/// turn.
const HURRY: &str = "
WITH hurried AS (
    UPDATE leases
    SET run_after = CASE WHEN run_after < 'infinity' THEN least(run_after, now())
                         ELSE run_after END,
        lease_until = least(lease_until, now())
    FROM processed_messages m
    WHERE m.job_id = $1 AND leases.subscription = m.subscription AND leases.key = m.key
      AND leases.token IS NULL
    RETURNING leases.subscription, leases.key
)
INSERT INTO ledger (subscription, key, worker, kind)
SELECT subscription, key, $2, 'retried' FROM hurried";

/// The attempt number goes on from where the ended job left it. Jobs that an earlier
/// version ended have it in the ledger only. Earlier attempts do not count against the
/// task's maximum.
const REOPEN: &str = "
WITH reopened AS (
    UPDATE processed_messages
    SET state = 'open', finished_at = NULL, finished_by = NULL, error = NULL, reason = NULL,
        result = NULL, dead_letter_topic = NULL, dead_letter_due = NULL
    WHERE job_id = $1 AND state <> 'open' AND task IS NOT NULL AND payload IS NOT NULL
    RETURNING *
), queued AS (
    INSERT INTO leases (subscription, key, job_id, task, ordering_key, attempt, interruptions,
                        run_after, lease_until, checkpoint, worker, started_at)
    SELECT subscription, key, job_id, task, nullif(ordering_key, ''), fence.attempt, fence.attempt,
           CASE WHEN ordering_key <> '' AND EXISTS (
                    SELECT 1 FROM leases
                    WHERE leases.subscription = reopened.subscription
                      AND leases.ordering_key = reopened.ordering_key) THEN 'infinity'
                ELSE now() END,
           now(), checkpoint, worker, started_at
    FROM reopened CROSS JOIN LATERAL (
        SELECT greatest(reopened.last_attempt, reopened.attempts, max(ledger.attempt)) AS attempt
        FROM ledger
        WHERE ledger.subscription = reopened.subscription AND ledger.key = reopened.key
    ) AS fence
)
INSERT INTO ledger (subscription, key, worker, kind)
SELECT subscription, key, $2, 'retried' FROM reopened";

const IS_OPEN: &str = "SELECT state = 'open' FROM processed_messages WHERE job_id = $1";

/// None if there is no such job.
pub(super) async fn retry(
    sessions: &Sessions,
    id: Uuid,
    by: &str,
) -> Result<Option<Retrying>, StoreError> {
    let mut transaction = sessions.begin().await?;
    let place: Option<(String, String)> = sqlx::query_as(ORDERING_KEY)
        .bind(id)
        .fetch_optional(&mut transaction)
        .await?;
    let Some((subscription, ordering_key)) = place else {
        transaction.rollback().await?;
        return Ok(None);
    };
    if !ordering_key.is_empty() {
        lock_places_in(
            &mut transaction,
            &[&subscription],
            &[ordering_key.as_str().into()],
        )
        .await?;
    }
    // Locks the queue's row before the job's, as everywhere. Tries twice, for a job that
    // somebody else has just put back in the queue.
    for (statement, answer) in [
        (HURRY, Retrying::Hurried),
        (REOPEN, Retrying::Queued),
        (HURRY, Retrying::Hurried),
    ] {
        let changed = sqlx::query(statement)
            .bind(id)
            .bind(by)
            .execute(&mut transaction)
            .await?;
        if changed.rows_affected() > 0 {
            transaction.commit().await?;
            return Ok(Some(answer));
        }
    }
    let open: bool = sqlx::query_scalar(IS_OPEN)
        .bind(id)
        .fetch_one(&mut transaction)
        .await?;
    transaction.rollback().await?;
    Ok(Some(match open {
        true => Retrying::Running,
        false => Retrying::NothingToRun,
    }))
}
