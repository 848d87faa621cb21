//! The statements that change a claim, each beside the function that runs it.

use std::borrow::Cow;
use std::collections::HashMap;
use std::time::Duration;

use sqlx::postgres::PgRow;
use sqlx::{PgConnection, PgPool, Row};
use tokio::time::Instant;
use uuid::Uuid;

use super::super::{
    ClaimTerms, MAX_DUPLICATES_IN_LEDGER, Standing, StoreError, final_state, json_text, storable,
    too_many_crashes,
};
use crate::job::{Acquired, Can, Claim, ClaimRequest, Fence, JobKey, Limits};
use crate::outcome::DeadReason;

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

    lock_ordering_keys(&mut transaction, &rest).await?;
    let inserted = insert_new(&mut transaction, &rest, terms).await?;
    settle(&mut answers, &mut rest, inserted, claimed_at);
    let takers: Vec<Taker> = rest
        .iter()
        .filter(|request| request.can == Can::Run)
        .map(|request| (*request).into())
        .collect();
    if !takers.is_empty() {
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

/// A job that a statement has just given, or put on record.
#[derive(sqlx::FromRow)]
pub(super) struct Won {
    pub(super) token: Uuid,
    pub(super) job_id: Uuid,
    pub(super) attempt: i32,
    /// False where the new job has to wait.
    runs: bool,
    counted_attempts: i32,
    checkpoint: Option<String>,
    cancel_requested: bool,
}

impl Won {
    pub(super) fn acquired(self, key: JobKey, claimed_at: Instant) -> Acquired {
        Acquired {
            fence: Fence {
                key,
                attempt: self.attempt.unsigned_abs(),
                token: self.token,
            },
            job_id: self.job_id,
            claimed_at,
            counted_attempts: self.counted_attempts.unsigned_abs(),
            checkpoint: self.checkpoint.map(Into::into),
            cancel_requested: self.cancel_requested,
        }
    }
}

fn settle(
    answers: &mut HashMap<Uuid, Claim>,
    rest: &mut Vec<&ClaimRequest>,
    won: Vec<Won>,
    claimed_at: Instant,
) {
    let mut won: HashMap<Uuid, Won> = won.into_iter().map(|won| (won.token, won)).collect();
    rest.retain(|request| {
        let Some(won) = won.remove(&request.token) else {
            return true;
        };
        let claim = match won.runs {
            true => Claim::Acquired(won.acquired(request.key.clone(), claimed_at)),
            false => Claim::Waiting {
                until: claimed_at,
                acked: request.reap_delay.is_zero(),
            },
        };
        answers.insert(request.token, claim);
        false
    });
}

/// Of two transactions that put jobs of one ordering key on record, the later
/// one must see what the earlier one wrote. In key order, against deadlocks.
const LOCK_ORDERING_KEYS: &str = "
SELECT pg_advisory_xact_lock(lock) FROM (
    SELECT DISTINCT hashtextextended(subscription || chr(10) || ordering_key, 0) AS lock
    FROM unnest($1::text[], $2::text[]) AS request (subscription, ordering_key)
    ORDER BY lock
) AS locks";

async fn lock_ordering_keys(
    connection: &mut PgConnection,
    requests: &[&ClaimRequest],
) -> Result<(), StoreError> {
    let ordered = requests
        .iter()
        .filter(|request| !request.message.ordering_key.is_empty());
    let (subscriptions, keys): (Vec<&str>, Vec<Cow<'_, str>>) = ordered
        .map(|request| {
            let ordering_key = storable(&request.message.ordering_key);
            (&*request.key.subscription, ordering_key)
        })
        .unzip();
    if keys.is_empty() {
        return Ok(());
    }
    sqlx::query(LOCK_ORDERING_KEYS)
        .bind(subscriptions)
        .bind(keys)
        .execute(connection)
        .await?;
    Ok(())
}

/// Jobs are inserted in key order, so that two batches with keys in common
/// wait for each other instead of deadlocking; their places within an ordering
/// key are in the order of the requests.
///
/// A job runs at once unless it has to wait: for an earlier one of its
/// ordering key, or for a worker that can run it.
const INSERT_NEW: &str = "
WITH input AS (
    SELECT DISTINCT ON (subscription, key) *
    FROM unnest($1::text[], $2::text[], $3::uuid[], $4::uuid[], $5::text[], $6::timestamptz[],
                $7::text[], $8::text[], $9::bytea[], $10::text[], $11::float8[], $14::boolean[],
                $15::boolean[]) WITH ORDINALITY
      AS request (subscription, key, token, job_id, message_id, publish_time,
                  ordering_key, attributes, payload, task, reap_delay, can_run, unknown, nth)
    ORDER BY subscription, key, nth
), inserted AS (
    INSERT INTO processed_messages
           (subscription, key, job_id, message_id, publish_time, ordering_key, attributes,
            payload, task, state)
    SELECT subscription, key, job_id, message_id, publish_time, ordering_key, attributes::json,
           payload, task, 'open'
    FROM input
    ON CONFLICT (subscription, key) DO NOTHING
    RETURNING subscription, key, job_id
), fresh AS (
    SELECT input.*,
           can_run AND (ordering_key = '' OR (
               NOT EXISTS (SELECT 1 FROM leases
                           WHERE leases.subscription = input.subscription
                             AND leases.ordering_key = input.ordering_key)
               AND row_number() OVER (PARTITION BY subscription, ordering_key ORDER BY nth) = 1
           )) AS runs
    FROM input JOIN inserted USING (subscription, key)
), leased AS (
    INSERT INTO leases
           (subscription, key, ordering_key, attempt, token, worker, started_at, lease_until,
            reap_delay, unknown_since)
    SELECT subscription, key, nullif(ordering_key, ''), runs::int, CASE WHEN runs THEN token END,
           CASE WHEN runs THEN $12 END, CASE WHEN runs THEN now() END,
           CASE WHEN runs THEN now() + make_interval(secs => $13) ELSE now() END,
           reap_delay, CASE WHEN unknown THEN now() END
    FROM fresh
    ORDER BY nth
), noted AS (
    INSERT INTO ledger (subscription, key, worker, kind, attempt, detail)
    SELECT subscription, key, $12, CASE WHEN runs THEN 'claimed' ELSE 'queued' END,
           CASE WHEN runs THEN 1 END,
           CASE WHEN runs THEN NULL
                WHEN unknown THEN 'this worker does not know the task `' || task || '`'
                WHEN can_run THEN 'an earlier job of its ordering key is unfinished'
                ELSE 'this worker has no room for the task' END
    FROM fresh
)
SELECT fresh.token, inserted.job_id, fresh.runs::int AS attempt, fresh.runs,
       1 AS counted_attempts, NULL::text AS checkpoint, false AS cancel_requested
FROM fresh JOIN inserted USING (subscription, key)";

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
        .bind(
            requests
                .iter()
                .map(|r| r.can == Can::Run)
                .collect::<Vec<_>>(),
        )
        .bind(
            requests
                .iter()
                .map(|r| r.can == Can::RecordUnknown)
                .collect::<Vec<_>>(),
        )
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
/// of them, or of the task's attempts, the job is dead instead. No run ended it, so `finished_by` is unset:
/// the last one that lost its lease must not take the ending for its own.
const TAKE_OVER: &str = "
WITH input AS (
    SELECT DISTINCT ON (subscription, key) request.*
    FROM unnest($1::text[], $2::text[], $3::uuid[], $4::float8[], $9::int[], $10::text[])
      AS request (subscription, key, token, reap_delay, max_attempts, dead_letter_topic)
    LEFT JOIN leases USING (subscription, key)
    ORDER BY subscription, key, leases.token IS NOT DISTINCT FROM request.token DESC
), free AS (
    SELECT leases.subscription, leases.key, input.token AS new_token, input.reap_delay AS new_delay,
           input.dead_letter_topic, input.max_attempts,
           leases.token IS NOT DISTINCT FROM input.token AS mine,
           leases.token IS NOT NULL AND leases.token <> input.token AS crashed,
           leases.attempt - leases.interruptions >= input.max_attempts AS exhausted,
           leases.crashes, leases.worker AS last_worker, leases.token AS last_token
    FROM leases JOIN input USING (subscription, key)
    WHERE (leases.token = input.token OR leases.lease_until <= now())
      AND (leases.ordering_key IS NULL OR leases.position = (
              SELECT min(head.position) FROM leases head
              WHERE head.subscription = leases.subscription
                AND head.ordering_key = leases.ordering_key))
    ORDER BY leases.subscription, leases.key
    FOR UPDATE OF leases SKIP LOCKED
), judged AS (
    SELECT *, crashed AND (crashes + 1 >= $7 OR exhausted) AS ends FROM free
), taken AS (
    UPDATE leases
    SET attempt = leases.attempt + (NOT judged.mine)::int, token = judged.new_token, worker = $5,
        started_at = now(), lease_until = now() + make_interval(secs => $6),
        crashes = judged.crashes + judged.crashed::int, reap_delay = judged.new_delay,
        unknown_since = NULL
    FROM judged
    WHERE leases.subscription = judged.subscription AND leases.key = judged.key
      AND NOT judged.ends
    RETURNING leases.*, judged.mine, judged.crashed, judged.last_worker
), noted AS (
    INSERT INTO ledger (subscription, key, worker, kind, attempt, detail)
    SELECT subscription, key, $5, CASE WHEN crashed THEN 'taken_over' ELSE 'claimed' END, attempt,
           CASE WHEN crashed THEN 'from ' || last_worker || ', whose lease ended' END
    FROM taken
    WHERE NOT mine
), parked AS (
    DELETE FROM leases USING judged
    WHERE leases.subscription = judged.subscription AND leases.key = judged.key AND judged.ends
    RETURNING leases.*, judged.dead_letter_topic,
              CASE WHEN judged.crashes + 1 >= $7 THEN $8
                   ELSE 'its worker was lost during attempt ' || judged.max_attempts || ' of '
                        || judged.max_attempts END AS reason
), dead AS (
    UPDATE processed_messages
    SET state = 'dead', error = parked.reason, reason = $11, finished_at = now(),
        attempts = parked.attempt - parked.interruptions, last_attempt = parked.attempt,
        worker = parked.worker, started_at = parked.started_at, checkpoint = parked.checkpoint,
        dead_letter_topic = parked.dead_letter_topic
    FROM parked
    WHERE processed_messages.subscription = parked.subscription
      AND processed_messages.key = parked.key
), told AS (
    INSERT INTO ledger (subscription, key, worker, kind, attempt, detail)
    SELECT subscription, key, $5, 'parked', attempt, reason FROM parked
)
SELECT taken.token, processed_messages.job_id, taken.attempt, true AS runs,
       taken.attempt - taken.interruptions AS counted_attempts, taken.checkpoint,
       taken.cancel_requested
FROM taken JOIN processed_messages USING (subscription, key)";

/// What a run needs to take a job over.
pub(super) struct Taker<'a> {
    pub(super) key: &'a JobKey,
    pub(super) token: Uuid,
    pub(super) reap_delay: f64,
    pub(super) limits: Limits,
}

impl<'a> From<&'a ClaimRequest> for Taker<'a> {
    fn from(request: &'a ClaimRequest) -> Self {
        Self {
            key: &request.key,
            token: request.token,
            reap_delay: request.reap_delay.as_secs_f64(),
            limits: request.limits.clone(),
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
    let max_attempts = takers
        .iter()
        .map(|taker| i32::try_from(taker.limits.max_attempts).unwrap_or(i32::MAX));
    let topics = takers
        .iter()
        .map(|taker| taker.limits.dead_letter_topic.as_deref());
    let rows = sqlx::query_as(TAKE_OVER)
        .bind(subscriptions)
        .bind(keys)
        .bind(takers.iter().map(|taker| taker.token).collect::<Vec<_>>())
        .bind(delays.collect::<Vec<_>>())
        .bind(&*terms.worker)
        .bind(terms.lease.as_secs_f64())
        .bind(terms.max_crashes.cast_signed())
        .bind(too_many_crashes(terms.max_crashes))
        .bind(max_attempts.collect::<Vec<_>>())
        .bind(topics.collect::<Vec<_>>())
        .bind(DeadReason::WorkerLost.as_str())
        .fetch_all(connection)
        .await?;
    Ok(rows)
}

/// The ledger keeps so many duplicates of a job; the count goes on. A message
/// that comes again while its job waits is none: nobody has run it yet.
const COUNT_DUPLICATES: &str = "
WITH request AS (
    SELECT * FROM unnest($1::text[], $2::text[], $3::uuid[], $4::text[])
      AS request (subscription, key, token, message_id)
), repeated AS (
    SELECT subscription, key, count(*)::int AS times FROM request GROUP BY subscription, key
), locked AS (
    SELECT subscription, key, leases.key IS NOT NULL AND leases.token IS NULL AS waiting,
           CASE WHEN leases.key IS NOT NULL AND leases.token IS NULL THEN 0
                ELSE repeated.times END AS times
    FROM processed_messages JOIN repeated USING (subscription, key)
    LEFT JOIN leases USING (subscription, key)
    ORDER BY subscription, key
    FOR UPDATE OF processed_messages
), counted AS (
    UPDATE processed_messages
    SET duplicates = duplicates + locked.times
    FROM locked
    WHERE processed_messages.subscription = locked.subscription
      AND processed_messages.key = locked.key
    RETURNING processed_messages.subscription, processed_messages.key, processed_messages.state,
              processed_messages.duplicates, processed_messages.message_id, locked.times,
              locked.waiting
), noted AS (
    INSERT INTO ledger (subscription, key, worker, kind, message_id, detail)
    SELECT subscription, key, $5, 'suppressed', nullif(request.message_id, counted.message_id),
           CASE counted.state WHEN 'open' THEN 'it is running' ELSE 'it is ' || counted.state END
    FROM (SELECT *, row_number() OVER (PARTITION BY subscription, key) AS nth FROM request) AS request
    JOIN counted USING (subscription, key)
    WHERE counted.times > 0 AND counted.duplicates - counted.times + request.nth <= $6
)
SELECT request.token, counted.state, counted.waiting, leases.reap_delay = 0 AS acked,
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
    rows.iter()
        .map(|row| Ok((row.try_get("token")?, not_acquired(row)?)))
        .collect()
}

fn not_acquired(row: &PgRow) -> Result<Claim, StoreError> {
    if let Some(state) = final_state(row.try_get("state")?) {
        return Ok(Claim::AlreadyFinished(state));
    }
    let remaining: Option<f64> = row.try_get("remaining")?;
    let until = Instant::now() + Duration::from_secs_f64(remaining.unwrap_or(0.0));
    let acked = row.try_get::<Option<bool>, _>("acked")? == Some(true);
    Ok(match row.try_get("waiting")? {
        true => Claim::Waiting { until, acked },
        false => Claim::HeldUntil { until, acked },
    })
}

const LOOK: &str = "
SELECT processed_messages.state, leases.token IS NULL AS waiting, leases.lease_until >= now() AS held,
       leases.reap_delay = 0 AS acked,
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
    let remaining: Option<f64> = row.try_get("remaining")?;
    let remaining = Duration::from_secs_f64(remaining.unwrap_or(0.0));
    if row.try_get("waiting")? {
        return Ok(Standing::Waiting { remaining });
    }
    if row.try_get::<Option<bool>, _>("held")? == Some(true) {
        let acked = row.try_get::<Option<bool>, _>("acked")? == Some(true);
        return Ok(Standing::Held { remaining, acked });
    }
    Ok(Standing::Free)
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
