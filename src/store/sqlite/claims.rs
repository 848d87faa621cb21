//! The statements that change a claim, each beside the function that runs it.
//!
//! SQLite has one writer at a time, so a batch is a loop in one transaction.

use std::time::Duration;

use sqlx::sqlite::SqlitePool;
use sqlx::{Connection, Row, SqliteConnection};
use tokio::time::Instant;
use uuid::Uuid;

use super::super::{
    ClaimTerms, Refusal, Refused, Standing, StoreError, final_state, json_text, storable,
};
use crate::job::{Acquired, Claim, ClaimRequest, Fence, JobKey};
use crate::outcome::Ending;

/// Takes the write lock at once: a transaction that began by reading could
/// not become a writer after another one's commit.
const BEGIN: &str = "BEGIN IMMEDIATE";

pub(super) async fn claim(
    pool: &SqlitePool,
    requests: &[ClaimRequest],
    terms: &ClaimTerms,
) -> Result<Vec<Claim>, StoreError> {
    let claimed_at = Instant::now();
    let mut connection = pool.acquire().await?;
    let mut transaction = connection.begin_with(BEGIN).await?;
    let mut answers = Vec::with_capacity(requests.len());
    for request in requests {
        let won = match insert_new(&mut transaction, request, terms).await? {
            Some(won) => Some(won),
            None => take_over(&mut transaction, request, terms).await?,
        };
        answers.push(match won {
            Some((job_id, attempt)) => Claim::Acquired(Acquired {
                fence: Fence {
                    key: request.key.clone(),
                    attempt,
                    token: request.token,
                },
                job_id,
                claimed_at,
            }),
            None => count_duplicate(&mut transaction, &request.key).await?,
        });
    }
    transaction.commit().await?;
    Ok(answers)
}

const INSERT_NEW: &str = "
INSERT INTO processed_messages
       (subscription, key, job_id, message_id, publish_time, ordering_key, attributes, payload,
        task, state, received_at)
VALUES ($1, $2, $3, $4, $5, $6, $7, $8, $9, 'open', CAST(unixepoch('subsec') * 1000 AS INTEGER))
ON CONFLICT (subscription, key) DO NOTHING";

const INSERT_LEASE: &str = "
INSERT INTO leases (subscription, key, attempt, token, worker, started_at, lease_until)
VALUES ($1, $2, 1, $3, $4, CAST(unixepoch('subsec') * 1000 AS INTEGER),
        CAST(unixepoch('subsec') * 1000 AS INTEGER) + $5)";

async fn insert_new(
    connection: &mut SqliteConnection,
    request: &ClaimRequest,
    terms: &ClaimTerms,
) -> Result<Option<(Uuid, u32)>, StoreError> {
    let message = &request.message;
    let inserted = sqlx::query(INSERT_NEW)
        .bind(&*request.key.subscription)
        .bind(&*request.key.key)
        .bind(request.job_id)
        .bind(&message.id)
        .bind(message.publish_time.timestamp_millis())
        .bind(storable(&message.ordering_key))
        .bind(json_text(&message.attributes)?)
        .bind(&message.data[..])
        .bind(storable(&request.task))
        .execute(&mut *connection)
        .await?;
    if inserted.rows_affected() == 0 {
        return Ok(None);
    }
    sqlx::query(INSERT_LEASE)
        .bind(&*request.key.subscription)
        .bind(&*request.key.key)
        .bind(request.token)
        .bind(&*terms.worker)
        .bind(milliseconds(terms.lease))
        .execute(connection)
        .await?;
    Ok(Some((request.job_id, 1)))
}

const TAKE_OVER: &str = "
UPDATE leases
SET attempt = attempt + 1, token = $3, worker = $4,
    started_at = CAST(unixepoch('subsec') * 1000 AS INTEGER),
    lease_until = CAST(unixepoch('subsec') * 1000 AS INTEGER) + $5
WHERE subscription = $1 AND key = $2
  AND (token IS NULL OR lease_until < CAST(unixepoch('subsec') * 1000 AS INTEGER))
RETURNING attempt, (SELECT job_id FROM processed_messages m
                    WHERE m.subscription = leases.subscription AND m.key = leases.key) AS job_id";

async fn take_over(
    connection: &mut SqliteConnection,
    request: &ClaimRequest,
    terms: &ClaimTerms,
) -> Result<Option<(Uuid, u32)>, StoreError> {
    let taken = sqlx::query(TAKE_OVER)
        .bind(&*request.key.subscription)
        .bind(&*request.key.key)
        .bind(request.token)
        .bind(&*terms.worker)
        .bind(milliseconds(terms.lease))
        .fetch_optional(connection)
        .await?;
    taken
        .map(|row| Ok((row.try_get("job_id")?, row.try_get("attempt")?)))
        .transpose()
}

const COUNT_DUPLICATE: &str = "
UPDATE processed_messages
SET duplicates = duplicates + 1
WHERE subscription = $1 AND key = $2
RETURNING state, (SELECT max(lease_until - CAST(unixepoch('subsec') * 1000 AS INTEGER), 0)
                  FROM leases
                  WHERE leases.subscription = $1 AND leases.key = $2) AS remaining";

async fn count_duplicate(
    connection: &mut SqliteConnection,
    key: &JobKey,
) -> Result<Claim, StoreError> {
    let row = sqlx::query(COUNT_DUPLICATE)
        .bind(&*key.subscription)
        .bind(&*key.key)
        .fetch_one(connection)
        .await?;
    if let Some(state) = final_state(row.try_get("state")?) {
        return Ok(Claim::AlreadyFinished(state));
    }
    let remaining: Option<u64> = row.try_get("remaining")?;
    let remaining = Duration::from_millis(remaining.unwrap_or(0));
    Ok(Claim::HeldUntil(Instant::now() + remaining))
}

const LOOK: &str = "
SELECT m.state,
       leases.token IS NOT NULL
       AND leases.lease_until >= CAST(unixepoch('subsec') * 1000 AS INTEGER) AS held,
       max(leases.lease_until - CAST(unixepoch('subsec') * 1000 AS INTEGER), 0) AS remaining
FROM processed_messages m LEFT JOIN leases USING (subscription, key)
WHERE m.subscription = $1 AND m.key = $2";

pub(super) async fn look(pool: &SqlitePool, key: &JobKey) -> Result<Standing, StoreError> {
    let row = sqlx::query(LOOK)
        .bind(&*key.subscription)
        .bind(&*key.key)
        .fetch_optional(pool)
        .await?;
    let Some(row) = row else {
        return Ok(Standing::Free);
    };
    if let Some(state) = final_state(row.try_get("state")?) {
        return Ok(Standing::Finished(state));
    }
    if row.try_get::<Option<bool>, _>("held")? == Some(true) {
        let remaining = row.try_get("remaining")?;
        return Ok(Standing::Held(Duration::from_millis(remaining)));
    }
    Ok(Standing::Free)
}

const RENEW: &str = "
UPDATE leases
SET lease_until = CAST(unixepoch('subsec') * 1000 AS INTEGER) + $5
WHERE subscription = $1 AND key = $2 AND attempt = $3 AND token = $4";

pub(super) async fn renew(
    pool: &SqlitePool,
    fences: &[Fence],
    lease: Duration,
) -> Result<Vec<bool>, StoreError> {
    let mut connection = pool.acquire().await?;
    let mut transaction = connection.begin_with(BEGIN).await?;
    let mut renewed = Vec::with_capacity(fences.len());
    for fence in fences {
        let row = sqlx::query(RENEW)
            .bind(&*fence.key.subscription)
            .bind(&*fence.key.key)
            .bind(fence.attempt)
            .bind(fence.token)
            .bind(milliseconds(lease))
            .execute(&mut *transaction)
            .await?;
        renewed.push(row.rows_affected() == 1);
    }
    transaction.commit().await?;
    Ok(renewed)
}

const END_JOB: &str = "
UPDATE processed_messages
SET state = $5, error = $6, result = $7,
    finished_at = CAST(unixepoch('subsec') * 1000 AS INTEGER), finished_by = $4,
    attempts = ended.attempt - ended.interruptions, worker = ended.worker,
    started_at = ended.started_at
FROM (SELECT * FROM leases
      WHERE subscription = $1 AND key = $2 AND attempt = $3 AND token = $4) AS ended
WHERE processed_messages.subscription = $1 AND processed_messages.key = $2";

const END_LEASE: &str = "
DELETE FROM leases WHERE subscription = $1 AND key = $2 AND attempt = $3 AND token = $4";

const WAS_ENDED_BY: &str = "
SELECT EXISTS (SELECT 1 FROM processed_messages
               WHERE subscription = $1 AND key = $2 AND finished_by = $3)";

pub(super) async fn finish(
    pool: &SqlitePool,
    fence: &Fence,
    ending: &Ending,
) -> Result<bool, StoreError> {
    let mut connection = pool.acquire().await?;
    let mut transaction = connection.begin_with(BEGIN).await?;
    sqlx::query(END_JOB)
        .bind(&*fence.key.subscription)
        .bind(&*fence.key.key)
        .bind(fence.attempt)
        .bind(fence.token)
        .bind(ending.state.as_str())
        .bind(ending.error.as_deref().map(storable))
        .bind(ending.result.as_ref().map(json_text).transpose()?)
        .execute(&mut *transaction)
        .await?;
    sqlx::query(END_LEASE)
        .bind(&*fence.key.subscription)
        .bind(&*fence.key.key)
        .bind(fence.attempt)
        .bind(fence.token)
        .execute(&mut *transaction)
        .await?;
    let finished = sqlx::query_scalar(WAS_ENDED_BY)
        .bind(&*fence.key.subscription)
        .bind(&*fence.key.key)
        .bind(fence.token)
        .fetch_one(&mut *transaction)
        .await?;
    transaction.commit().await?;
    Ok(finished)
}

const RELEASE: &str = "
UPDATE leases
SET token = NULL, interruptions = interruptions + 1
WHERE subscription = $1 AND key = $2 AND attempt = $3 AND token = $4";

pub(super) async fn release(pool: &SqlitePool, fence: &Fence) -> Result<bool, StoreError> {
    let released = sqlx::query(RELEASE)
        .bind(&*fence.key.subscription)
        .bind(&*fence.key.key)
        .bind(fence.attempt)
        .bind(fence.token)
        .execute(pool)
        .await?;
    Ok(released.rows_affected() == 1)
}

const REFUSE: &str = "
INSERT INTO processed_messages
       (subscription, key, job_id, message_id, publish_time, ordering_key, attributes, payload,
        task, state, error, received_at, finished_at, worker)
VALUES ($1, $2, $3, $4, $5, $6, $7, $8, $9, 'dead', $10,
        CAST(unixepoch('subsec') * 1000 AS INTEGER),
        CAST(unixepoch('subsec') * 1000 AS INTEGER), $11)
ON CONFLICT (subscription, key) DO UPDATE SET duplicates = duplicates + 1
RETURNING job_id = $3 AS recorded, state";

pub(super) async fn refuse(pool: &SqlitePool, refusal: &Refusal) -> Result<Refused, StoreError> {
    let message = &refusal.message;
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
        .bind(storable(&refusal.reason))
        .bind(&*refusal.worker)
        .fetch_one(pool)
        .await?;
    Ok(Refused::read(
        row.try_get("recorded")?,
        row.try_get("state")?,
    ))
}

fn milliseconds(duration: Duration) -> i64 {
    i64::try_from(duration.as_millis()).unwrap_or(i64::MAX / 2)
}
