//! The statements that change a claim, each beside the function that runs it.

use std::borrow::Cow;
use std::collections::HashMap;
use std::time::Duration;

use sqlx::{PgConnection, PgPool, Row};
use tokio::time::Instant;
use uuid::Uuid;

use super::super::{
    ClaimTerms, Refusal, Refused, Standing, StoreError, final_state, json_text, storable,
};
use crate::job::{Acquired, Claim, ClaimRequest, Fence, JobKey};
use crate::outcome::Ending;

/// Answers a batch of claims in one transaction: first the new keys, then the
/// takeovers, then how the rest stand. A new row that conflicts waits for the
/// other transaction, so the later statements see what that one committed.
pub(super) async fn claim(
    pool: &PgPool,
    requests: &[ClaimRequest],
    terms: &ClaimTerms,
) -> Result<Vec<Claim>, StoreError> {
    let claimed_at = Instant::now();
    let mut answers: HashMap<Uuid, Claim> = HashMap::with_capacity(requests.len());
    let mut rest: Vec<&ClaimRequest> = requests.iter().collect();
    let mut transaction = pool.begin().await?;

    let inserted = insert_new(&mut transaction, &rest, terms).await?;
    settle(&mut answers, &mut rest, inserted, claimed_at);
    if !rest.is_empty() {
        let taken = take_over(&mut transaction, &rest, terms).await?;
        settle(&mut answers, &mut rest, taken, claimed_at);
    }
    if !rest.is_empty() {
        answers.extend(count_duplicates(&mut transaction, &rest).await?);
    }
    transaction.commit().await?;

    requests
        .iter()
        .map(|request| {
            answers
                .remove(&request.token)
                .ok_or_else(|| StoreError::Unreadable(format!("no row answers {}", request.key)))
        })
        .collect()
}

/// A lease that a statement of [`claim`] has just given to one request.
#[derive(sqlx::FromRow)]
struct Won {
    token: Uuid,
    job_id: Uuid,
    attempt: i32,
}

fn settle(
    answers: &mut HashMap<Uuid, Claim>,
    rest: &mut Vec<&ClaimRequest>,
    won: Vec<Won>,
    claimed_at: Instant,
) {
    let won: HashMap<Uuid, Won> = won.into_iter().map(|won| (won.token, won)).collect();
    rest.retain(|request| {
        let Some(won) = won.get(&request.token) else {
            return true;
        };
        let acquired = Acquired {
            fence: Fence {
                key: request.key.clone(),
                attempt: won.attempt.unsigned_abs(),
                token: won.token,
            },
            job_id: won.job_id,
            claimed_at,
        };
        answers.insert(request.token, Claim::Acquired(acquired));
        false
    });
}

/// Rows are inserted in key order, so that two batches with keys in common
/// wait for each other instead of deadlocking.
const INSERT_NEW: &str = "
WITH input AS (
    SELECT DISTINCT ON (subscription, key) *
    FROM unnest($1::text[], $2::text[], $3::uuid[], $4::uuid[], $5::text[], $6::timestamptz[],
                $7::text[], $8::text[], $9::bytea[], $10::text[])
      AS request (subscription, key, token, job_id, message_id, publish_time,
                  ordering_key, attributes, payload, task)
    ORDER BY subscription, key
), inserted AS (
    INSERT INTO processed_messages
           (subscription, key, job_id, message_id, publish_time, ordering_key, attributes,
            payload, task, state)
    SELECT subscription, key, job_id, message_id, publish_time, ordering_key, attributes::json,
           payload, task, 'open'
    FROM input
    ON CONFLICT (subscription, key) DO NOTHING
    RETURNING subscription, key, job_id
)
INSERT INTO leases (subscription, key, attempt, token, worker, started_at, lease_until)
SELECT input.subscription, input.key, 1, input.token, $11, now(),
       now() + make_interval(secs => $12)
FROM input JOIN inserted USING (subscription, key)
RETURNING token, (SELECT inserted.job_id FROM inserted
                  WHERE inserted.subscription = leases.subscription
                    AND inserted.key = leases.key) AS job_id, attempt";

async fn insert_new(
    connection: &mut PgConnection,
    requests: &[&ClaimRequest],
    terms: &ClaimTerms,
) -> Result<Vec<Won>, StoreError> {
    let column = |of: fn(&ClaimRequest) -> &str| -> Vec<&str> {
        requests.iter().map(|request| of(request)).collect()
    };
    let attributes = requests
        .iter()
        .map(|request| json_text(&request.message.attributes))
        .collect::<Result<Vec<String>, StoreError>>()?;
    let payloads = requests.iter().map(|request| &request.message.data[..]);
    let rows = sqlx::query_as(INSERT_NEW)
        .bind(column(|request| &request.key.subscription))
        .bind(column(|request| &request.key.key))
        .bind(tokens(requests))
        .bind(requests.iter().map(|r| r.job_id).collect::<Vec<_>>())
        .bind(column(|request| &request.message.id))
        .bind(
            requests
                .iter()
                .map(|r| r.message.publish_time)
                .collect::<Vec<_>>(),
        )
        .bind(column_of_text(requests, |request| {
            &request.message.ordering_key
        }))
        .bind(attributes)
        .bind(payloads.collect::<Vec<_>>())
        .bind(column_of_text(requests, |request| &request.task))
        .bind(&*terms.worker)
        .bind(terms.lease.as_secs_f64())
        .fetch_all(connection)
        .await?;
    Ok(rows)
}

fn column_of_text<'a>(
    requests: &[&'a ClaimRequest],
    of: fn(&ClaimRequest) -> &str,
) -> Vec<Cow<'a, str>> {
    requests
        .iter()
        .map(|request| storable(of(request)))
        .collect()
}

fn tokens(requests: &[&ClaimRequest]) -> Vec<Uuid> {
    requests.iter().map(|request| request.token).collect()
}

/// A lease row that another transaction is writing right now is somebody
/// else's, hence SKIP LOCKED.
const TAKE_OVER: &str = "
WITH input AS (
    SELECT DISTINCT ON (subscription, key) *
    FROM unnest($1::text[], $2::text[], $3::uuid[]) AS request (subscription, key, token)
), free AS (
    SELECT leases.subscription, leases.key, input.token
    FROM leases JOIN input USING (subscription, key)
    WHERE leases.token IS NULL OR leases.lease_until < now()
    FOR UPDATE OF leases SKIP LOCKED
)
UPDATE leases
SET attempt = leases.attempt + 1, token = free.token, worker = $4, started_at = now(),
    lease_until = now() + make_interval(secs => $5)
FROM free JOIN processed_messages USING (subscription, key)
WHERE leases.subscription = free.subscription AND leases.key = free.key
RETURNING leases.token, processed_messages.job_id, leases.attempt";

async fn take_over(
    connection: &mut PgConnection,
    requests: &[&ClaimRequest],
    terms: &ClaimTerms,
) -> Result<Vec<Won>, StoreError> {
    let (subscriptions, keys) = key_columns(requests.iter().map(|request| &request.key));
    let rows = sqlx::query_as(TAKE_OVER)
        .bind(subscriptions)
        .bind(keys)
        .bind(tokens(requests))
        .bind(&*terms.worker)
        .bind(terms.lease.as_secs_f64())
        .fetch_all(connection)
        .await?;
    Ok(rows)
}

const COUNT_DUPLICATES: &str = "
WITH request AS (
    SELECT * FROM unnest($1::text[], $2::text[], $3::uuid[]) AS request (subscription, key, token)
), counted AS (
    UPDATE processed_messages
    SET duplicates = duplicates + repeated.times
    FROM (SELECT subscription, key, count(*)::int AS times FROM request GROUP BY 1, 2) AS repeated
    WHERE processed_messages.subscription = repeated.subscription
      AND processed_messages.key = repeated.key
    RETURNING processed_messages.subscription, processed_messages.key, processed_messages.state
)
SELECT request.token, counted.state,
       greatest(extract(epoch FROM leases.lease_until - now()), 0)::float8 AS remaining
FROM request
JOIN counted USING (subscription, key)
LEFT JOIN leases USING (subscription, key)";

async fn count_duplicates(
    connection: &mut PgConnection,
    requests: &[&ClaimRequest],
) -> Result<Vec<(Uuid, Claim)>, StoreError> {
    let (subscriptions, keys) = key_columns(requests.iter().map(|request| &request.key));
    let rows = sqlx::query(COUNT_DUPLICATES)
        .bind(subscriptions)
        .bind(keys)
        .bind(tokens(requests))
        .fetch_all(connection)
        .await?;
    rows.into_iter()
        .map(|row| {
            let state: &str = row.try_get("state")?;
            let claim = final_state(state).map_or_else(
                || {
                    let remaining: Option<f64> = row.try_get("remaining")?;
                    let remaining = Duration::from_secs_f64(remaining.unwrap_or(0.0));
                    Ok(Claim::HeldUntil(Instant::now() + remaining))
                },
                |state| Ok::<_, StoreError>(Claim::AlreadyFinished(state)),
            )?;
            Ok((row.try_get("token")?, claim))
        })
        .collect()
}

const LOOK: &str = "
SELECT processed_messages.state, leases.token IS NOT NULL AND leases.lease_until >= now() AS held,
       greatest(extract(epoch FROM leases.lease_until - now()), 0)::float8 AS remaining
FROM processed_messages LEFT JOIN leases USING (subscription, key)
WHERE subscription = $1 AND key = $2";

pub(super) async fn look(pool: &PgPool, key: &JobKey) -> Result<Standing, StoreError> {
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
        return Ok(Standing::Held(Duration::from_secs_f64(remaining)));
    }
    Ok(Standing::Free)
}

const RENEW: &str = "
UPDATE leases
SET lease_until = now() + make_interval(secs => $5)
FROM unnest($1::text[], $2::text[], $3::int[], $4::uuid[]) AS fence (subscription, key, attempt, token)
WHERE leases.subscription = fence.subscription AND leases.key = fence.key
  AND leases.attempt = fence.attempt AND leases.token = fence.token
RETURNING leases.token";

pub(super) async fn renew(
    pool: &PgPool,
    fences: &[Fence],
    lease: Duration,
) -> Result<Vec<bool>, StoreError> {
    let (subscriptions, keys) = key_columns(fences.iter().map(|fence| &fence.key));
    let renewed: Vec<Uuid> = sqlx::query_scalar(RENEW)
        .bind(subscriptions)
        .bind(keys)
        .bind(
            fences
                .iter()
                .map(|f| f.attempt.cast_signed())
                .collect::<Vec<_>>(),
        )
        .bind(fences.iter().map(|f| f.token).collect::<Vec<_>>())
        .bind(lease.as_secs_f64())
        .fetch_all(pool)
        .await?;
    Ok(fences
        .iter()
        .map(|fence| renewed.contains(&fence.token))
        .collect())
}

/// One statement: the lease goes and the job ends, or neither. A second call
/// with the same token finds the ending that it wrote the first time.
const FINISH: &str = "
WITH ended AS (
    DELETE FROM leases
    WHERE subscription = $1 AND key = $2 AND attempt = $3 AND token = $4
    RETURNING *
), finished AS (
    UPDATE processed_messages
    SET state = $5, error = $6, result = $7::text::json, finished_at = now(), finished_by = ended.token,
        attempts = ended.attempt - ended.interruptions, worker = ended.worker,
        started_at = ended.started_at
    FROM ended
    WHERE processed_messages.subscription = ended.subscription
      AND processed_messages.key = ended.key
    RETURNING 1
)
SELECT EXISTS (SELECT FROM finished)
    OR EXISTS (SELECT FROM processed_messages
               WHERE subscription = $1 AND key = $2 AND finished_by = $4)";

pub(super) async fn finish(
    pool: &PgPool,
    fence: &Fence,
    ending: &Ending,
) -> Result<bool, StoreError> {
    let result = ending.result.as_ref().map(json_text).transpose()?;
    let finished = sqlx::query_scalar(FINISH)
        .bind(&*fence.key.subscription)
        .bind(&*fence.key.key)
        .bind(fence.attempt.cast_signed())
        .bind(fence.token)
        .bind(ending.state.as_str())
        .bind(ending.error.as_deref().map(storable))
        .bind(result)
        .fetch_one(pool)
        .await?;
    Ok(finished)
}

const RELEASE: &str = "
UPDATE leases
SET token = NULL, interruptions = interruptions + 1
WHERE subscription = $1 AND key = $2 AND attempt = $3 AND token = $4";

pub(super) async fn release(pool: &PgPool, fence: &Fence) -> Result<bool, StoreError> {
    let released = sqlx::query(RELEASE)
        .bind(&*fence.key.subscription)
        .bind(&*fence.key.key)
        .bind(fence.attempt.cast_signed())
        .bind(fence.token)
        .execute(pool)
        .await?;
    Ok(released.rows_affected() == 1)
}

const REFUSE: &str = "
INSERT INTO processed_messages AS existing
       (subscription, key, job_id, message_id, publish_time, ordering_key, attributes, payload,
        task, state, error, finished_at, worker)
VALUES ($1, $2, $3, $4, $5, $6, $7::text::json, $8, $9, 'dead', $10, now(), $11)
ON CONFLICT (subscription, key) DO UPDATE SET duplicates = existing.duplicates + 1
RETURNING job_id = $3 AS recorded, state";

pub(super) async fn refuse(pool: &PgPool, refusal: &Refusal) -> Result<Refused, StoreError> {
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
        .bind(storable(&refusal.reason))
        .bind(&*refusal.worker)
        .fetch_one(pool)
        .await?;
    Ok(Refused::read(
        row.try_get("recorded")?,
        row.try_get("state")?,
    ))
}

fn key_columns<'a>(keys: impl Iterator<Item = &'a JobKey>) -> (Vec<&'a str>, Vec<&'a str>) {
    keys.map(|key| (&*key.subscription, &*key.key)).unzip()
}
