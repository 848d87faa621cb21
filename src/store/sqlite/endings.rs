//! The statements that end a run: finished, released, or refused unrun.

use sqlx::sqlite::SqlitePool;
use sqlx::{Connection, Row, SqliteConnection};
use uuid::Uuid;

use super::entry::{Entry, add_to_ledger};
use super::{BEGIN, milliseconds};
use crate::job::{Fence, JobKey};
use crate::json::Json;
use crate::outcome::DeadReason;
use crate::store::values::{MAX_DUPLICATES_IN_LEDGER, json_text, storable};
use crate::store::{Finish, Finished, Refusal, Refused, Release, StoreError};

const END_JOB: &str = "
UPDATE processed_messages
SET state = $5, error = $6, result = $7,
    finished_at = CAST(unixepoch('subsec') * 1000 AS INTEGER), finished_by = $4,
    attempts = ended.attempt - ended.interruptions, last_attempt = ended.attempt,
    worker = ended.worker, started_at = ended.started_at, reason = $8,
    checkpoint = coalesce($9, ended.checkpoint),
    dead_letter_topic = CASE WHEN $5 = 'dead' THEN $10 END
FROM (SELECT * FROM leases
      WHERE subscription = $1 AND key = $2 AND attempt = $3 AND token = $4) AS ended
WHERE processed_messages.subscription = $1 AND processed_messages.key = $2
RETURNING processed_messages.worker";

const END_LEASE: &str = "DELETE FROM leases WHERE subscription = $1 AND key = $2";

const WAS_ENDED_BY: &str = "
SELECT EXISTS (SELECT 1 FROM processed_messages
               WHERE subscription = $1 AND key = $2 AND finished_by = $3)";

pub(super) async fn finish(
    pool: &SqlitePool,
    finishes: &[Finish],
) -> Result<Vec<Finished>, StoreError> {
    let mut connection = pool.acquire().await?;
    let mut transaction = connection.begin_with(BEGIN).await?;
    let mut finished = Vec::with_capacity(finishes.len());
    for finish in finishes {
        finished.push(finish_one(&mut transaction, finish).await?);
    }
    transaction.commit().await?;
    Ok(finished)
}

async fn finish_one(
    connection: &mut SqliteConnection,
    finish: &Finish,
) -> Result<Finished, StoreError> {
    let Finish { fence, ending, .. } = finish;
    let worker: Option<String> = sqlx::query_scalar(END_JOB)
        .bind(&*fence.key.subscription)
        .bind(&*fence.key.key)
        .bind(fence.attempt)
        .bind(fence.token)
        .bind(ending.state.as_str())
        .bind(ending.error.as_deref().map(storable))
        .bind(ending.result.as_ref().map(Json::as_str))
        .bind(ending.reason.map(DeadReason::as_str))
        .bind(finish.checkpoint.as_deref().map(storable))
        .bind(finish.dead_letter_topic.as_deref())
        .fetch_optional(&mut *connection)
        .await?;
    let Some(worker) = worker else {
        return Ok(match was_ended_by(connection, fence).await? {
            true => Finished::Ended,
            false => Finished::NotMine,
        });
    };
    sqlx::query(END_LEASE)
        .bind(&*fence.key.subscription)
        .bind(&*fence.key.key)
        .execute(&mut *connection)
        .await?;
    let entry = Entry {
        worker: &worker,
        kind: "finished",
        attempt: Some(fence.attempt),
        detail: Some(ending.state.as_str()),
        ..Entry::default()
    };
    add_to_ledger(connection, &fence.key, &entry).await?;
    Ok(Finished::Ended)
}

/// Whether an earlier call with this fence ended the job.
async fn was_ended_by(
    connection: &mut SqliteConnection,
    fence: &Fence,
) -> Result<bool, StoreError> {
    let ended = sqlx::query_scalar(WAS_ENDED_BY)
        .bind(&*fence.key.subscription)
        .bind(&*fence.key.key)
        .bind(fence.token)
        .fetch_one(connection)
        .await?;
    Ok(ended)
}

/// From now on the job waits in the queue, for room or for its next attempt. A job that is to
/// be cancelled does not wait for its next attempt.
const RELEASE: &str = "
UPDATE leases
SET token = NULL, interruptions = interruptions + $5,
    run_after = CAST(unixepoch('subsec') * 1000 AS INTEGER)
                + CASE WHEN cancel_requested THEN 0 ELSE $6 END,
    lease_until = CAST(unixepoch('subsec') * 1000 AS INTEGER)
                  + CASE WHEN cancel_requested THEN 0 ELSE $6 END,
    last_error = coalesce($7, last_error), checkpoint = coalesce($8, checkpoint)
WHERE subscription = $1 AND key = $2 AND attempt = $3 AND token = $4
RETURNING worker";

pub(super) async fn release(pool: &SqlitePool, release: &Release) -> Result<bool, StoreError> {
    let Release { fence, why, .. } = release;
    let (interruptions, retry_in, error, kind) = why.columns();
    let error = error.map(storable);
    let mut connection = pool.acquire().await?;
    let mut transaction = connection.begin_with(BEGIN).await?;
    let worker: Option<String> = sqlx::query_scalar(RELEASE)
        .bind(&*fence.key.subscription)
        .bind(&*fence.key.key)
        .bind(fence.attempt)
        .bind(fence.token)
        .bind(interruptions)
        .bind(milliseconds(retry_in))
        .bind(error.as_deref())
        .bind(release.checkpoint.as_deref().map(storable))
        .fetch_optional(&mut *transaction)
        .await?;
    let Some(worker) = worker else {
        return Ok(false);
    };
    let entry = Entry {
        worker: &worker,
        kind,
        attempt: Some(fence.attempt),
        detail: error.as_deref(),
        ..Entry::default()
    };
    add_to_ledger(&mut transaction, &fence.key, &entry).await?;
    transaction.commit().await?;
    Ok(true)
}

const DISOWN: &str = "
UPDATE leases
SET token = NULL, interruptions = interruptions + 1,
    run_after = CAST(unixepoch('subsec') * 1000 AS INTEGER),
    lease_until = CAST(unixepoch('subsec') * 1000 AS INTEGER)
WHERE subscription = $1 AND key = $2 AND token = $3
RETURNING worker, attempt";

pub(super) async fn disown(pool: &SqlitePool, claims: &[(JobKey, Uuid)]) -> Result<(), StoreError> {
    let mut connection = pool.acquire().await?;
    let mut transaction = connection.begin_with(BEGIN).await?;
    for (key, token) in claims {
        let disowned: Option<(String, u32)> = sqlx::query_as(DISOWN)
            .bind(&*key.subscription)
            .bind(&*key.key)
            .bind(token)
            .fetch_optional(&mut *transaction)
            .await?;
        if let Some((worker, attempt)) = disowned {
            let entry = Entry {
                worker: &worker,
                kind: "released",
                attempt: Some(attempt),
                detail: Some("the answer to its claim was lost"),
                ..Entry::default()
            };
            add_to_ledger(&mut transaction, key, &entry).await?;
        }
    }
    transaction.commit().await?;
    Ok(())
}

const REFUSE: &str = "
INSERT INTO processed_messages
       (subscription, key, job_id, message_id, publish_time, ordering_key, attributes, payload,
        task, state, error, received_at, finished_at, worker, reason, dead_letter_topic)
VALUES ($1, $2, $3, $4, $5, $6, $7, $8, $9, 'dead', $10,
        CAST(unixepoch('subsec') * 1000 AS INTEGER),
        CAST(unixepoch('subsec') * 1000 AS INTEGER), $11, $12, $13)
ON CONFLICT (subscription, key) DO UPDATE SET duplicates = duplicates + 1
RETURNING job_id = $3 AS recorded, state, duplicates, message_id";

pub(super) async fn refuse(pool: &SqlitePool, refusal: &Refusal) -> Result<Refused, StoreError> {
    let message = &refusal.message;
    let mut connection = pool.acquire().await?;
    let mut transaction = connection.begin_with(BEGIN).await?;
    let row = sqlx::query(REFUSE)
        .bind(&*refusal.key.subscription)
        .bind(&*refusal.key.key)
        .bind(refusal.job_id)
        .bind(&message.id)
        .bind(message.publish_time.timestamp_millis())
        .bind(storable(&message.ordering_key))
        .bind(json_text(&message.attributes)?)
        .bind(&message.data[..])
        .bind(refusal.task.as_deref().map(storable))
        .bind(storable(&refusal.error))
        .bind(&*refusal.worker)
        .bind(refusal.reason.as_str())
        .bind(refusal.dead_letter_topic.as_deref())
        .fetch_one(&mut *transaction)
        .await?;
    let recorded: bool = row.try_get("recorded")?;
    let refused = Refused::read(recorded, row.try_get("state")?);
    if row.try_get::<u32, _>("duplicates")? <= MAX_DUPLICATES_IN_LEDGER {
        let reason = storable(&refusal.error);
        let first: &str = row.try_get("message_id")?;
        let entry = Entry {
            worker: &refusal.worker,
            kind: if recorded { "refused" } else { "suppressed" },
            message_id: Some(&*message.id).filter(|id| *id != first),
            detail: recorded.then_some(&*reason),
            ..Entry::default()
        };
        add_to_ledger(&mut transaction, &refusal.key, &entry).await?;
    }
    transaction.commit().await?;
    Ok(refused)
}
