//! Records for people, and their deletion.

use std::time::Duration;

use super::sessions::Sessions;
use crate::job::{Fence, JobKey};
use crate::record::{AttemptReport, Note};
use crate::store::StoreError;
use crate::store::values::{json_text, series_text, storable};

const NOTE: &str = "
INSERT INTO ledger (subscription, key, worker, kind, attempt, detail)
SELECT subscription, key, $1, kind, attempt, detail
FROM unnest($2::text[], $3::text[], $4::text[], $5::int[], $6::text[])
  AS note (subscription, key, kind, attempt, detail)";

pub(super) async fn note(
    sessions: &Sessions,
    worker: &str,
    notes: &[Note],
) -> Result<(), StoreError> {
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
        .execute(sessions)
        .await?;
    Ok(())
}

const RECORD_ATTEMPT: &str = "
INSERT INTO attempts (subscription, key, attempt, worker, outcome, log, series)
VALUES ($1, $2, $3, $4, $5, $6::text::json, $7::text::json)
ON CONFLICT (subscription, key, attempt) DO UPDATE
SET ended_at = excluded.ended_at, outcome = excluded.outcome, log = excluded.log,
    series = excluded.series";

pub(super) async fn record_attempt(
    sessions: &Sessions,
    fence: &Fence,
    worker: &str,
    report: &AttemptReport,
) -> Result<(), StoreError> {
    sqlx::query(RECORD_ATTEMPT)
        .bind(&*fence.key.subscription)
        .bind(&*fence.key.key)
        .bind(fence.attempt.cast_signed())
        .bind(worker)
        .bind(report.outcome)
        .bind(json_text(&report.log)?)
        .bind(series_text(&report.series)?)
        .execute(sessions)
        .await?;
    Ok(())
}

/// Job ids begin with their creation time in milliseconds, so their unique index finds
/// old rows; the database's clock decides.
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
    sessions: &Sessions,
    retention: Duration,
    limit: u32,
) -> Result<u64, StoreError> {
    let purged = sqlx::query(PURGE)
        .bind(retention.as_secs_f64())
        .bind(i64::from(limit))
        .execute(sessions)
        .await?;
    Ok(purged.rows_affected())
}
