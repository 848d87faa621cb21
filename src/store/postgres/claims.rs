//! The statements that change a claim, each beside the function that runs it.

use std::borrow::Cow;
use std::collections::HashMap;
use std::time::Duration;

use sqlx::Row;
use sqlx::postgres::PgRow;
use tokio::time::Instant;
use uuid::Uuid;

use super::columns::key_columns;
use super::ordering::lock_places_in;
use super::sessions::{Sessions, Transaction};
use super::takeover::{Won, take_over};
use crate::job::{Can, Claim, ClaimRequest};
use crate::store::taker::Taker;
use crate::store::values::{MAX_DUPLICATES_IN_LEDGER, final_state, json_text, storable};
use crate::store::{ClaimTerms, StoreError};

/// Answers a batch of claims in one transaction: first inserts the new keys, then takes
/// over, then reports on the rest. A new row that conflicts waits for the other
/// transaction, so the later statements see its commit.
pub(super) async fn claim(
    sessions: &Sessions,
    requests: &[ClaimRequest],
    terms: &ClaimTerms,
) -> Result<Vec<Claim>, StoreError> {
    let claimed_at = Instant::now();
    let mut answers: HashMap<Uuid, Claim> = HashMap::with_capacity(requests.len());
    let mut rest: Vec<&ClaimRequest> = requests.iter().collect();
    let mut transaction = sessions.begin().await?;

    lock_ordering_keys(&mut transaction, &rest).await?;
    let inserted = insert_new(&mut transaction, &rest, terms).await?;
    settle(&mut answers, &mut rest, inserted, claimed_at);
    let takers: Vec<Taker> = rest
        .iter()
        .filter(|request| request.can.run())
        .map(|request| (*request).into())
        .collect();
    if !takers.is_empty() {
        let taken = take_over(&mut transaction, &takers, terms).await?;
        settle(&mut answers, &mut rest, taken, claimed_at);
    }
    if !rest.is_empty() {
        answers.extend(count_duplicates(&mut transaction, &rest, terms).await?);
    }
    // Checked before the commit: otherwise nobody would own the leases of the other
    // requests.
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
                acked: false,
            },
        };
        answers.insert(request.token, claim);
        false
    });
}

async fn lock_ordering_keys(
    transaction: &mut Transaction,
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
    lock_places_in(transaction, &subscriptions, &keys).await
}

/// Inserts jobs in key order, so that two batches with common keys wait for each other
/// instead of deadlocking; places within an ordering key follow the order of the
/// requests.
///
/// A job runs at once unless it has to wait for an earlier job of its ordering key, or
/// for a worker that knows its task.
const INSERT_NEW: &str = "
WITH input AS (
    SELECT DISTINCT ON (subscription, key) *
    FROM unnest($1::text[], $2::text[], $3::uuid[], $4::uuid[], $5::text[], $6::timestamptz[],
                $7::text[], $8::text[], $9::bytea[], $10::text[], $11::float8[], $12::float8[],
                $13::boolean[], $14::boolean[]) WITH ORDINALITY
      AS request (subscription, key, token, job_id, message_id, publish_time,
                  ordering_key, attributes, payload, task, delay_if_runs, delay_if_waits,
                  can_run, unknown, nth)
    ORDER BY subscription, key, nth
), inserted AS (
    INSERT INTO processed_messages
           (subscription, key, job_id, message_id, publish_time, ordering_key, attributes,
            payload, task, state)
    SELECT subscription, key, job_id, message_id, publish_time, ordering_key, attributes::json,
           payload, task, 'open'
    FROM input
    ON CONFLICT (subscription, key) DO NOTHING
    RETURNING subscription, key
), placed AS (
    SELECT input.*,
           ordering_key <> '' AND (
               EXISTS (SELECT 1 FROM leases
                       WHERE leases.subscription = input.subscription
                         AND leases.ordering_key = input.ordering_key)
               OR row_number() OVER (PARTITION BY subscription, ordering_key ORDER BY nth) > 1
           ) AS is_behind
    FROM input JOIN inserted USING (subscription, key)
), fresh AS (
    SELECT *, can_run AND NOT is_behind AS runs FROM placed
), leased AS (
    INSERT INTO leases
           (subscription, key, job_id, task, ordering_key, attempt, token, worker, started_at,
            run_after, lease_until, reap_delay)
    SELECT subscription, key, job_id, task, nullif(ordering_key, ''), runs::int,
           CASE WHEN runs THEN token END, CASE WHEN runs THEN $15 END,
           CASE WHEN runs THEN now() END, CASE WHEN is_behind THEN 'infinity' ELSE now() END,
           CASE WHEN runs THEN now() + make_interval(secs => $16) ELSE now() END,
           CASE WHEN runs THEN delay_if_runs ELSE delay_if_waits END
    FROM fresh
    ORDER BY nth
), noted AS (
    INSERT INTO ledger (subscription, key, worker, kind, attempt, detail)
    SELECT subscription, key, $15, CASE WHEN runs THEN 'claimed' ELSE 'queued' END,
           CASE WHEN runs THEN 1 END,
           CASE WHEN runs THEN NULL
                WHEN unknown THEN 'this worker does not know the task `' || task || '`'
                WHEN can_run THEN 'an earlier job of its ordering key is unfinished'
                ELSE 'this worker has no room for the task' END
    FROM fresh
)
SELECT token, job_id, runs::int AS attempt, runs, 1 AS counted_attempts, NULL::text AS checkpoint,
       false AS cancel_requested, NULL::text AS task, NULL::text AS message_id,
       NULL::text AS ordering_key, NULL::bytea AS payload
FROM fresh";

async fn insert_new(
    transaction: &mut Transaction,
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
        .bind(delays(requests, true))
        .bind(delays(requests, false))
        .bind(requests.iter().map(|r| r.can.run()).collect::<Vec<_>>())
        .bind(
            requests
                .iter()
                .map(|r| r.can == Can::RecordUnknown)
                .collect::<Vec<_>>(),
        )
        .bind(&*terms.worker)
        .bind(terms.lease.as_secs_f64())
        .fetch_all(transaction)
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

fn delays(requests: &[&ClaimRequest], runs: bool) -> Vec<f64> {
    requests
        .iter()
        .map(|request| request.ack.reap_delay(runs).as_secs_f64())
        .collect()
}

/// The ledger keeps a limited number of duplicates per job; the count goes on. A message
/// that arrives again while its job waits is no duplicate: nobody has run it yet.
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
       CASE WHEN leases.token IS NOT NULL
            THEN greatest(extract(epoch FROM leases.lease_until - now()), 0)
            WHEN leases.run_after < 'infinity'
            THEN greatest(extract(epoch FROM leases.run_after - now()), 0)
            ELSE 0 END::float8 AS remaining
FROM request
JOIN counted USING (subscription, key)
LEFT JOIN leases USING (subscription, key)";

async fn count_duplicates(
    transaction: &mut Transaction,
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
        .fetch_all(transaction)
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
        false => Claim::RunningUntil { until, acked },
    })
}
