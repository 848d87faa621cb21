//! The statements that end a run: finished, released, or refused unrun.

use std::collections::HashMap;

use sqlx::Row;
use uuid::Uuid;

use super::columns::{attempts, fence_tokens, key_columns};
use super::sessions::Sessions;
use crate::job::JobKey;
use crate::json::Json;
use crate::outcome::DeadReason;
use crate::store::values::{MAX_DUPLICATES_IN_LEDGER, json_text, storable};
use crate::store::{Finish, Finished, Refusal, Refused, Release, StoreError};

/// One statement, so that the lease is deleted and the job ends, or neither. A second call
/// with the same token finds the ending that the first one wrote.
///
/// Skips a job of which another session has locked a row, be it only a claim that holds the
/// last job of its ordering key for a moment. So it delays no other ending, and as it holds
/// locks it waits for nobody but, in the trigger, for the next job of an ordering key.
const FINISH: &str = "
WITH input AS (
    SELECT * FROM unnest($1::text[], $2::text[], $3::int[], $4::uuid[], $5::text[], $6::text[],
                         $7::text[], $8::text[], $9::text[], $10::text[])
      AS finish (subscription, key, attempt, token, state, error, result, reason,
                 last_checkpoint, dead_letter_topic)
), locked AS (
    SELECT leases.subscription, leases.key, leases.attempt, leases.interruptions, leases.worker,
           leases.started_at, input.token, input.state, input.error, input.result, input.reason,
           coalesce(input.last_checkpoint, leases.checkpoint) AS checkpoint,
           input.dead_letter_topic
    FROM leases JOIN input USING (subscription, key, attempt, token)
    JOIN processed_messages USING (subscription, key)
    ORDER BY leases.subscription, leases.key
    FOR UPDATE OF leases SKIP LOCKED FOR NO KEY UPDATE OF processed_messages SKIP LOCKED
), ended AS (
    DELETE FROM leases USING locked
    WHERE leases.subscription = locked.subscription AND leases.key = locked.key
    RETURNING locked.*
), finished AS (
    UPDATE processed_messages
    SET state = ended.state, error = ended.error, result = ended.result::json,
        finished_at = now(), finished_by = ended.token,
        attempts = ended.attempt - ended.interruptions, last_attempt = ended.attempt,
        worker = ended.worker, started_at = ended.started_at, reason = ended.reason,
        checkpoint = ended.checkpoint,
        dead_letter_topic = CASE WHEN ended.state = 'dead' THEN ended.dead_letter_topic END
    FROM ended
    WHERE processed_messages.subscription = ended.subscription
      AND processed_messages.key = ended.key
    RETURNING ended.token
), noted AS (
    INSERT INTO ledger (subscription, key, worker, kind, attempt, detail)
    SELECT subscription, key, worker, 'finished', attempt, state FROM ended
)
SELECT token FROM finished";

pub(super) async fn finish(
    sessions: &Sessions,
    finishes: &[Finish],
) -> Result<Vec<Finished>, StoreError> {
    let (subscriptions, keys) = key_columns(finishes.iter().map(|finish| &finish.fence.key));
    let results = finishes
        .iter()
        .map(|finish| finish.ending.result.as_ref().map(Json::as_str));
    let errors = finishes
        .iter()
        .map(|finish| finish.ending.error.as_deref().map(storable));
    let ended: Vec<Uuid> = sqlx::query_scalar(FINISH)
        .bind(subscriptions)
        .bind(keys)
        .bind(attempts(finishes.iter().map(|finish| &finish.fence)))
        .bind(fence_tokens(finishes.iter().map(|finish| &finish.fence)))
        .bind(
            finishes
                .iter()
                .map(|finish| finish.ending.state.as_str())
                .collect::<Vec<_>>(),
        )
        .bind(errors.collect::<Vec<_>>())
        .bind(results.collect::<Vec<_>>())
        .bind(
            finishes
                .iter()
                .map(|finish| finish.ending.reason.map(DeadReason::as_str))
                .collect::<Vec<_>>(),
        )
        .bind(
            finishes
                .iter()
                .map(|finish| finish.checkpoint.as_deref().map(storable))
                .collect::<Vec<_>>(),
        )
        .bind(
            finishes
                .iter()
                .map(|finish| finish.dead_letter_topic.as_deref())
                .collect::<Vec<_>>(),
        )
        .fetch_all(sessions)
        .await?;
    let mut finished: HashMap<Uuid, Finished> = ended
        .into_iter()
        .map(|token| (token, Finished::Ended))
        .collect();
    if finished.len() < finishes.len() {
        finished.extend(others(sessions, finishes).await?);
    }
    let standing = |finish: &Finish| finished.get(&finish.fence.token).copied();
    Ok(finishes
        .iter()
        .map(|finish| standing(finish).unwrap_or(Finished::NotMine))
        .collect())
}

/// Why a finish has not ended its job: an earlier call did, or its row was locked. A separate
/// statement, since the snapshot of the first one may predate the commit of an earlier try.
const OTHERS: &str = "
SELECT finish.token, processed_messages.finished_by IS NOT DISTINCT FROM finish.token AS ended
FROM unnest($1::text[], $2::text[], $3::uuid[], $4::int[])
  AS finish (subscription, key, token, attempt)
JOIN processed_messages USING (subscription, key)
LEFT JOIN leases USING (subscription, key)
WHERE processed_messages.finished_by = finish.token
   OR (leases.token = finish.token AND leases.attempt = finish.attempt)";

async fn others(
    sessions: &Sessions,
    finishes: &[Finish],
) -> Result<impl Iterator<Item = (Uuid, Finished)>, StoreError> {
    let (subscriptions, keys) = key_columns(finishes.iter().map(|finish| &finish.fence.key));
    let rows: Vec<(Uuid, bool)> = sqlx::query_as(OTHERS)
        .bind(subscriptions)
        .bind(keys)
        .bind(fence_tokens(finishes.iter().map(|finish| &finish.fence)))
        .bind(attempts(finishes.iter().map(|finish| &finish.fence)))
        .fetch_all(sessions)
        .await?;
    Ok(rows.into_iter().map(|(token, ended)| match ended {
        true => (token, Finished::Ended),
        false => (token, Finished::Locked),
    }))
}

/// From now on the job waits in the queue, for room or for its next attempt. A job that is to
/// be cancelled does not wait for its next attempt.
const RELEASE: &str = "
WITH released AS (
    UPDATE leases
    SET token = NULL, interruptions = interruptions + $5,
        run_after = now() + make_interval(secs => CASE WHEN cancel_requested THEN 0 ELSE $6 END),
        lease_until = now() + make_interval(secs => CASE WHEN cancel_requested THEN 0 ELSE $6 END),
        last_error = coalesce($7, last_error),
        checkpoint = coalesce($8, checkpoint)
    WHERE subscription = $1 AND key = $2 AND attempt = $3 AND token = $4
    RETURNING subscription, key, worker, attempt
)
INSERT INTO ledger (subscription, key, worker, kind, attempt, detail)
SELECT subscription, key, worker, $9, attempt, $7 FROM released";

pub(super) async fn release(sessions: &Sessions, release: &Release) -> Result<bool, StoreError> {
    let Release { fence, why, .. } = release;
    let (interruptions, retry_in, error, kind) = why.columns();
    let released = sqlx::query(RELEASE)
        .bind(&*fence.key.subscription)
        .bind(&*fence.key.key)
        .bind(fence.attempt.cast_signed())
        .bind(fence.token)
        .bind(interruptions)
        .bind(retry_in.as_secs_f64())
        .bind(error.map(storable))
        .bind(release.checkpoint.as_deref().map(storable))
        .bind(kind)
        .execute(sessions)
        .await?;
    Ok(released.rows_affected() == 1)
}

/// In key order, like everything that locks many rows.
const DISOWN: &str = "
WITH locked AS (
    SELECT leases.subscription, leases.key
    FROM unnest($1::text[], $2::text[], $3::uuid[]) AS claim (subscription, key, token)
    JOIN leases USING (subscription, key, token)
    ORDER BY subscription, key
    FOR NO KEY UPDATE OF leases
), disowned AS (
    UPDATE leases
    SET token = NULL, interruptions = interruptions + 1, run_after = now(), lease_until = now()
    FROM locked
    WHERE leases.subscription = locked.subscription AND leases.key = locked.key
    RETURNING leases.subscription, leases.key, leases.worker, leases.attempt
)
INSERT INTO ledger (subscription, key, worker, kind, attempt, detail)
SELECT subscription, key, worker, 'released', attempt, 'the answer to its claim was lost'
FROM disowned";

pub(super) async fn disown(
    sessions: &Sessions,
    claims: &[(JobKey, Uuid)],
) -> Result<(), StoreError> {
    let (subscriptions, keys) = key_columns(claims.iter().map(|(key, _)| key));
    sqlx::query(DISOWN)
        .bind(subscriptions)
        .bind(keys)
        .bind(claims.iter().map(|(_, token)| *token).collect::<Vec<_>>())
        .execute(sessions)
        .await?;
    Ok(())
}

const REFUSE: &str = "
WITH refused AS (
    INSERT INTO processed_messages AS existing
           (subscription, key, job_id, message_id, publish_time, ordering_key, attributes,
            payload, task, state, error, finished_at, worker, reason, dead_letter_topic)
    VALUES ($1, $2, $3, $4, $5, $6, $7::text::json, $8, $9, 'dead', $10, now(), $11, $13, $14)
    ON CONFLICT (subscription, key) DO UPDATE SET duplicates = existing.duplicates + 1
    RETURNING job_id = $3 AS recorded, state, duplicates, message_id
), noted AS (
    INSERT INTO ledger (subscription, key, worker, kind, message_id, detail)
    SELECT $1, $2, $11, CASE WHEN recorded THEN 'refused' ELSE 'suppressed' END,
           nullif($4, message_id), CASE WHEN recorded THEN $10 END
    FROM refused
    WHERE duplicates <= $12
)
SELECT recorded, state FROM refused";

pub(super) async fn refuse(sessions: &Sessions, refusal: &Refusal) -> Result<Refused, StoreError> {
    let message = &refusal.message;
    let row = sqlx::query(REFUSE)
        .bind(&*refusal.key.subscription)
        .bind(&*refusal.key.key)
        .bind(refusal.job_id)
        .bind(&message.id)
        .bind(message.publish_time)
        .bind(storable(&message.ordering_key))
        .bind(json_text(&message.attributes)?)
        .bind(&message.data[..])
        .bind(refusal.task.as_deref().map(storable))
        .bind(storable(&refusal.error))
        .bind(&*refusal.worker)
        .bind(MAX_DUPLICATES_IN_LEDGER.cast_signed())
        .bind(refusal.reason.as_str())
        .bind(refusal.dead_letter_topic.as_deref())
        .fetch_one(sessions)
        .await?;
    Ok(Refused::read(
        row.try_get("recorded")?,
        row.try_get("state")?,
    ))
}
