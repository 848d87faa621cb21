//! The statements that end a job as dead without a run that ends it.

use sqlx::SqliteConnection;

use crate::job::JobKey;
use crate::outcome::DeadReason;
use crate::store::StoreError;

/// How a job ends that no run ends.
pub(super) struct Death<'a> {
    pub(super) error: &'a str,
    pub(super) reason: DeadReason,
    /// Who ends it. None: the worker that ran it last stays on record.
    pub(super) worker: Option<&'a str>,
    pub(super) dead_letter_topic: Option<&'a str>,
}

/// `finished_by` is unset, since no run ended the job: the last run that lost its lease
/// must not mistake the ending for its own.
const END_JOB: &str = "
UPDATE processed_messages
SET state = 'dead', error = $3, finished_at = CAST(unixepoch('subsec') * 1000 AS INTEGER),
    attempts = ended.attempt - ended.interruptions, last_attempt = ended.attempt,
    worker = coalesce($6, ended.worker), started_at = ended.started_at,
    checkpoint = ended.checkpoint, reason = $4, dead_letter_topic = $5
FROM (SELECT * FROM leases WHERE subscription = $1 AND key = $2) AS ended
WHERE processed_messages.subscription = $1 AND processed_messages.key = $2";

const END_LEASE: &str = "DELETE FROM leases WHERE subscription = $1 AND key = $2 RETURNING attempt";

/// Returns the last attempt.
pub(super) async fn end(
    connection: &mut SqliteConnection,
    key: &JobKey,
    death: &Death<'_>,
) -> Result<u32, StoreError> {
    sqlx::query(END_JOB)
        .bind(&*key.subscription)
        .bind(&*key.key)
        .bind(death.error)
        .bind(death.reason.as_str())
        .bind(death.dead_letter_topic)
        .bind(death.worker)
        .execute(&mut *connection)
        .await?;
    let attempt = sqlx::query_scalar(END_LEASE)
        .bind(&*key.subscription)
        .bind(&*key.key)
        .fetch_one(connection)
        .await?;
    Ok(attempt)
}
