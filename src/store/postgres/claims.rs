//! The statements that change a claim, each beside the function that runs it.

use std::borrow::Cow;
use std::collections::HashMap;
use std::time::Duration;

use sqlx::{PgConnection, PgPool, Row};
use tokio::time::Instant;
use uuid::Uuid;

use super::super::{
    ClaimTerms, MAX_DUPLICATES_IN_LEDGER, Standing, StoreError, final_state, json_text, storable,
    too_many_crashes,
};
use crate::job::{Acquired, Claim, ClaimRequest, Fence, JobKey};

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
        let takers: Vec<Taker> = rest.iter().map(|request| request.into()).collect();
        let taken = take_over(&mut transaction, &takers, terms).await?;
        settle(&mut answers, &mut rest, taken, claimed_at);
    }
    if !rest.is_empty() {
        answers.extend(count_duplicates(&mut transaction, &rest, terms).await?);
    }
    // Before the commit: were one request without an answer, the others' leases
    // would be held by nobody.
    let claims = requests
        .iter()
        .map(|request| {
            answers
                .remove(&request.token)
                .ok_or_else(|| StoreError::Unreadable(format!("no row answers {}", request.key)))
        })
        .collect::<Result<Vec<Claim>, StoreError>>()?;
    transaction.commit().await?;
    Ok(claims)
}

/// A lease that a statement has just given.
#[derive(sqlx::FromRow)]
pub(super) struct Won {
    pub(super) token: Uuid,
    pub(super) job_id: Uuid,
    pub(super) attempt: i32,
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
                $7::text[], $8::text[], $9::bytea[], $10::text[], $11::float8[])
      AS request (subscription, key, token, job_id, message_id, publish_time,
                  ordering_key, attributes, payload, task, reap_delay)
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
), leased AS (
    INSERT INTO leases
           (subscription, key, attempt, token, worker, started_at, lease_until, reap_delay)
    SELECT input.subscription, input.key, 1, input.token, $12, now(),
           now() + make_interval(secs => $13), input.reap_delay
    FROM input JOIN inserted USING (subscription, key)
    RETURNING subscription, key, token, attempt
), noted AS (
    INSERT INTO ledger (subscription, key, worker, kind, attempt)
    SELECT subscription, key, $12, 'claimed', attempt FROM leased
)
SELECT leased.token, inserted.job_id, leased.attempt
FROM leased JOIN inserted USING (subscription, key)";

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
        .bind(delays(requests))
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

fn delays(requests: &[&ClaimRequest]) -> Vec<f64> {
    requests
        .iter()
        .map(|request| request.reap_delay.as_secs_f64())
        .collect()
}

/// A lease row that another transaction is writing right now is somebody
/// else's, hence SKIP LOCKED. A token that is the request's own already is the
/// sign of an answer that was lost: the claim is confirmed as it stands.
///
/// It comes before other claims of its key in the same batch, and is told once.
///
/// A lease that ended without a word from its worker is a crash; at the limit
/// of them the job is dead instead. No run ended it, so `finished_by` is unset:
/// the last one that lost its lease must not take the ending for its own.
const TAKE_OVER: &str = "
WITH input AS (
    SELECT DISTINCT ON (subscription, key) request.*
    FROM unnest($1::text[], $2::text[], $3::uuid[], $4::float8[])
      AS request (subscription, key, token, reap_delay)
    LEFT JOIN leases USING (subscription, key)
    ORDER BY subscription, key, leases.token IS NOT DISTINCT FROM request.token DESC
), free AS (
    SELECT leases.subscription, leases.key, input.token AS new_token, input.reap_delay AS new_delay,
           leases.token IS NOT DISTINCT FROM input.token AS mine,
           leases.token IS NOT NULL AND leases.token <> input.token AS crashed,
           leases.crashes, leases.worker AS last_worker, leases.token AS last_token
    FROM leases JOIN input USING (subscription, key)
    WHERE leases.token IS NULL OR leases.token = input.token OR leases.lease_until < now()
    ORDER BY leases.subscription, leases.key
    FOR UPDATE OF leases SKIP LOCKED
), taken AS (
    UPDATE leases
    SET attempt = leases.attempt + (NOT free.mine)::int, token = free.new_token, worker = $5,
        started_at = now(), lease_until = now() + make_interval(secs => $6),
        crashes = free.crashes + free.crashed::int, reap_delay = free.new_delay
    FROM free
    WHERE leases.subscription = free.subscription AND leases.key = free.key
      AND free.crashes + free.crashed::int < $7
    RETURNING leases.subscription, leases.key, leases.token, leases.attempt, free.mine,
              free.crashed, free.last_worker
), noted AS (
    INSERT INTO ledger (subscription, key, worker, kind, attempt, detail)
    SELECT subscription, key, $5, CASE WHEN crashed THEN 'taken_over' ELSE 'claimed' END, attempt,
           CASE WHEN crashed THEN 'from ' || last_worker || ', whose lease ended' END
    FROM taken
    WHERE NOT mine
), parked AS (
    DELETE FROM leases USING free
    WHERE leases.subscription = free.subscription AND leases.key = free.key
      AND free.crashes + free.crashed::int >= $7
    RETURNING leases.*
), dead AS (
    UPDATE processed_messages
    SET state = 'dead', error = $8, finished_at = now(),
        attempts = parked.attempt - parked.interruptions, worker = parked.worker,
        started_at = parked.started_at
    FROM parked
    WHERE processed_messages.subscription = parked.subscription
      AND processed_messages.key = parked.key
), told AS (
    INSERT INTO ledger (subscription, key, worker, kind, attempt, detail)
    SELECT subscription, key, $5, 'parked', attempt, $8 FROM parked
)
SELECT taken.token, processed_messages.job_id, taken.attempt
FROM taken JOIN processed_messages USING (subscription, key)";

/// What a run needs to take a job over.
pub(super) struct Taker<'a> {
    pub(super) key: &'a JobKey,
    pub(super) token: Uuid,
    pub(super) reap_delay: f64,
}

impl<'a> From<&&'a ClaimRequest> for Taker<'a> {
    fn from(request: &&'a ClaimRequest) -> Self {
        Self {
            key: &request.key,
            token: request.token,
            reap_delay: request.reap_delay.as_secs_f64(),
        }
    }
}

pub(super) async fn take_over(
    connection: &mut PgConnection,
    takers: &[Taker<'_>],
    terms: &ClaimTerms,
) -> Result<Vec<Won>, StoreError> {
    let (subscriptions, keys) = key_columns(takers.iter().map(|taker| taker.key));
    let delays = takers.iter().map(|taker| taker.reap_delay);
    let rows = sqlx::query_as(TAKE_OVER)
        .bind(subscriptions)
        .bind(keys)
        .bind(takers.iter().map(|taker| taker.token).collect::<Vec<_>>())
        .bind(delays.collect::<Vec<_>>())
        .bind(&*terms.worker)
        .bind(terms.lease.as_secs_f64())
        .bind(terms.max_crashes.cast_signed())
        .bind(too_many_crashes(terms.max_crashes))
        .fetch_all(connection)
        .await?;
    Ok(rows)
}

/// The ledger keeps so many duplicates of a job; the count goes on.
const COUNT_DUPLICATES: &str = "
WITH request AS (
    SELECT * FROM unnest($1::text[], $2::text[], $3::uuid[], $4::text[])
      AS request (subscription, key, token, message_id)
), repeated AS (
    SELECT subscription, key, count(*)::int AS times FROM request GROUP BY subscription, key
), locked AS (
    SELECT subscription, key, repeated.times
    FROM processed_messages JOIN repeated USING (subscription, key)
    ORDER BY subscription, key
    FOR UPDATE OF processed_messages
), counted AS (
    UPDATE processed_messages
    SET duplicates = duplicates + locked.times
    FROM locked
    WHERE processed_messages.subscription = locked.subscription
      AND processed_messages.key = locked.key
    RETURNING processed_messages.subscription, processed_messages.key, processed_messages.state,
              processed_messages.duplicates, processed_messages.message_id, locked.times
), noted AS (
    INSERT INTO ledger (subscription, key, worker, kind, message_id, detail)
    SELECT subscription, key, $5, 'suppressed', nullif(request.message_id, counted.message_id),
           CASE counted.state WHEN 'open' THEN 'it is running' ELSE 'it is ' || counted.state END
    FROM (SELECT *, row_number() OVER (PARTITION BY subscription, key) AS nth FROM request) AS request
    JOIN counted USING (subscription, key)
    WHERE counted.duplicates - counted.times + request.nth <= $6
)
SELECT request.token, counted.state,
       greatest(extract(epoch FROM leases.lease_until - now()), 0)::float8 AS remaining
FROM request
JOIN counted USING (subscription, key)
LEFT JOIN leases USING (subscription, key)";

async fn count_duplicates(
    connection: &mut PgConnection,
    requests: &[&ClaimRequest],
    terms: &ClaimTerms,
) -> Result<Vec<(Uuid, Claim)>, StoreError> {
    let (subscriptions, keys) = key_columns(requests.iter().map(|request| &request.key));
    let rows = sqlx::query(COUNT_DUPLICATES)
        .bind(subscriptions)
        .bind(keys)
        .bind(tokens(requests))
        .bind(
            requests
                .iter()
                .map(|r| r.message.id.as_str())
                .collect::<Vec<_>>(),
        )
        .bind(&*terms.worker)
        .bind(MAX_DUPLICATES_IN_LEDGER.cast_signed())
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
WITH held AS (
    SELECT leases.subscription, leases.key
    FROM leases
    JOIN unnest($1::text[], $2::text[], $3::int[], $4::uuid[])
      AS fence (subscription, key, attempt, token) USING (subscription, key, attempt, token)
    ORDER BY leases.subscription, leases.key
    FOR UPDATE OF leases
)
UPDATE leases
SET lease_until = now() + make_interval(secs => $5)
FROM held
WHERE leases.subscription = held.subscription AND leases.key = held.key
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
        .bind(attempts(fences.iter()))
        .bind(fence_tokens(fences.iter()))
        .bind(lease.as_secs_f64())
        .fetch_all(pool)
        .await?;
    Ok(fences
        .iter()
        .map(|fence| renewed.contains(&fence.token))
        .collect())
}

pub(super) fn key_columns<'a>(
    keys: impl Iterator<Item = &'a JobKey>,
) -> (Vec<&'a str>, Vec<&'a str>) {
    keys.map(|key| (&*key.subscription, &*key.key)).unzip()
}

pub(super) fn attempts<'a>(fences: impl Iterator<Item = &'a Fence>) -> Vec<i32> {
    fences.map(|fence| fence.attempt.cast_signed()).collect()
}

pub(super) fn fence_tokens<'a>(fences: impl Iterator<Item = &'a Fence>) -> Vec<Uuid> {
    fences.map(|fence| fence.token).collect()
}
