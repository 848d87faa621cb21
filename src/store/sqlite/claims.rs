//! The statements that change a claim, each beside the function that runs it.
//!
//! SQLite has one writer at a time, so a batch is a loop in one transaction.

use std::time::Duration;

use sqlx::sqlite::SqlitePool;
use sqlx::{Connection, Row, SqliteConnection};
use tokio::time::Instant;

use super::entry::{Entry, add_to_ledger};
use super::takeover::{Won, take_over};
use super::{BEGIN, milliseconds};
use crate::job::{Can, Claim, ClaimRequest, FinalState};
use crate::store::values::{MAX_DUPLICATES_IN_LEDGER, final_state, json_text, storable};
use crate::store::{ClaimTerms, StoreError};

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
        answers.push(answer(&mut transaction, request, terms, claimed_at).await?);
    }
    transaction.commit().await?;
    Ok(answers)
}

async fn answer(
    connection: &mut SqliteConnection,
    request: &ClaimRequest,
    terms: &ClaimTerms,
    claimed_at: Instant,
) -> Result<Claim, StoreError> {
    let acquired = |won: Won| Claim::Acquired(won.acquired(request.key.clone(), claimed_at));
    match insert_new(connection, request, terms).await? {
        Inserted::Runs(won) => return Ok(acquired(won)),
        Inserted::Waits => {
            return Ok(Claim::Waiting {
                until: claimed_at,
                acked: false,
            });
        }
        Inserted::Known => {}
    }
    if request.can.run()
        && let Some(won) = take_over(connection, &request.into(), terms).await?
    {
        return Ok(acquired(won));
    }
    not_acquired(connection, request, terms).await
}

enum Inserted {
    Runs(Won),
    Waits,
    /// The key was on record already.
    Known,
}

const INSERT_NEW: &str = "
INSERT INTO processed_messages
       (subscription, key, job_id, message_id, publish_time, ordering_key, attributes, payload,
        task, state, received_at)
VALUES ($1, $2, $3, $4, $5, $6, $7, $8, $9, 'open', CAST(unixepoch('subsec') * 1000 AS INTEGER))
ON CONFLICT (subscription, key) DO NOTHING";

const IS_FIRST_OF_ITS_ORDERING_KEY: &str = "
SELECT NOT EXISTS (SELECT 1 FROM leases WHERE subscription = $1 AND ordering_key = $2)";

/// A job runs at once unless it has to wait for an earlier job of its ordering key, or
/// for a worker that knows its task.
const INSERT_LEASE: &str = "
INSERT INTO leases
       (subscription, key, job_id, task, ordering_key, position, attempt, token, worker,
        started_at, run_after, lease_until, reap_delay, queued_at)
VALUES ($1, $2, $3, $4, $5,
        (SELECT coalesce(max(position), 0) + 1 FROM leases
         WHERE subscription = $1 AND ordering_key = $5),
        $6, CASE WHEN $6 THEN $7 END, CASE WHEN $6 THEN $8 END,
        CASE WHEN $6 THEN CAST(unixepoch('subsec') * 1000 AS INTEGER) END,
        CASE WHEN $9 THEN CAST(unixepoch('subsec') * 1000 AS INTEGER)
             ELSE 9223372036854775807 END,
        CAST(unixepoch('subsec') * 1000 AS INTEGER) + CASE WHEN $6 THEN $10 ELSE 0 END, $11,
        CAST(unixepoch('subsec') * 1000 AS INTEGER))";

async fn insert_new(
    connection: &mut SqliteConnection,
    request: &ClaimRequest,
    terms: &ClaimTerms,
) -> Result<Inserted, StoreError> {
    let message = &request.message;
    let ordering_key = storable(&message.ordering_key);
    let inserted = sqlx::query(INSERT_NEW)
        .bind(&*request.key.subscription)
        .bind(&*request.key.key)
        .bind(request.job_id)
        .bind(&message.id)
        .bind(message.publish_time.timestamp_millis())
        .bind(&*ordering_key)
        .bind(json_text(&message.attributes)?)
        .bind(&message.data[..])
        .bind(storable(&request.task))
        .execute(&mut *connection)
        .await?;
    if inserted.rows_affected() == 0 {
        return Ok(Inserted::Known);
    }
    let ordering_key = Some(&*ordering_key).filter(|key| !key.is_empty());
    let is_first: bool = sqlx::query_scalar(IS_FIRST_OF_ITS_ORDERING_KEY)
        .bind(&*request.key.subscription)
        .bind(ordering_key)
        .fetch_one(&mut *connection)
        .await?;
    let runs = request.can.run() && is_first;
    sqlx::query(INSERT_LEASE)
        .bind(&*request.key.subscription)
        .bind(&*request.key.key)
        .bind(request.job_id)
        .bind(storable(&request.task))
        .bind(ordering_key)
        .bind(runs)
        .bind(request.token)
        .bind(&*terms.worker)
        .bind(is_first)
        .bind(milliseconds(terms.lease))
        .bind(milliseconds(request.ack.reap_delay(runs)))
        .execute(&mut *connection)
        .await?;
    let unknown = format!("this worker does not know the task `{}`", request.task);
    let detail = match request.can {
        _ if runs => None,
        Can::Run | Can::RunUnlessLost => Some("an earlier job of its ordering key is unfinished"),
        Can::Record => Some("this worker has no room for the task"),
        Can::RecordUnknown => Some(&*unknown),
    };
    let detail = detail.map(storable);
    let entry = Entry {
        worker: &terms.worker,
        kind: if runs { "claimed" } else { "queued" },
        attempt: runs.then_some(1),
        detail: detail.as_deref(),
        ..Entry::default()
    };
    add_to_ledger(connection, &request.key, &entry).await?;
    Ok(match runs {
        true => Inserted::Runs(Won {
            token: request.token,
            job_id: request.job_id,
            attempt: 1,
            counted_attempts: 1,
            checkpoint: None,
            cancel_requested: false,
        }),
        false => Inserted::Waits,
    })
}

/// A message that arrives again while its job waits is no duplicate: nobody has run it
/// yet.
const WAITING: &str = "
SELECT CASE WHEN run_after < 9223372036854775807
            THEN max(run_after - CAST(unixepoch('subsec') * 1000 AS INTEGER), 0)
            ELSE 0 END AS remaining,
       reap_delay = 0 AS acked
FROM leases
WHERE subscription = $1 AND key = $2 AND token IS NULL";

async fn not_acquired(
    connection: &mut SqliteConnection,
    request: &ClaimRequest,
    terms: &ClaimTerms,
) -> Result<Claim, StoreError> {
    let waiting = sqlx::query(WAITING)
        .bind(&*request.key.subscription)
        .bind(&*request.key.key)
        .fetch_optional(&mut *connection)
        .await?;
    let Some(waiting) = waiting else {
        return count_duplicate(connection, request, terms).await;
    };
    let remaining = Duration::from_millis(waiting.try_get("remaining")?);
    Ok(Claim::Waiting {
        until: Instant::now() + remaining,
        acked: waiting.try_get("acked")?,
    })
}

const COUNT_DUPLICATE: &str = "
UPDATE processed_messages
SET duplicates = duplicates + 1
WHERE subscription = $1 AND key = $2
RETURNING state, duplicates, message_id,
          (SELECT reap_delay = 0 FROM leases
           WHERE leases.subscription = $1 AND leases.key = $2) AS acked,
          (SELECT max(lease_until - CAST(unixepoch('subsec') * 1000 AS INTEGER), 0)
           FROM leases
           WHERE leases.subscription = $1 AND leases.key = $2) AS remaining";

async fn count_duplicate(
    connection: &mut SqliteConnection,
    request: &ClaimRequest,
    terms: &ClaimTerms,
) -> Result<Claim, StoreError> {
    let row = sqlx::query(COUNT_DUPLICATE)
        .bind(&*request.key.subscription)
        .bind(&*request.key.key)
        .fetch_one(&mut *connection)
        .await?;
    let state = final_state(row.try_get("state")?);
    if row.try_get::<u32, _>("duplicates")? <= MAX_DUPLICATES_IN_LEDGER {
        let first: &str = row.try_get("message_id")?;
        let detail = format!("it is {}", state.map_or("running", FinalState::as_str));
        let entry = Entry {
            worker: &terms.worker,
            kind: "suppressed",
            message_id: Some(&*request.message.id).filter(|id| *id != first),
            detail: Some(&detail),
            ..Entry::default()
        };
        add_to_ledger(connection, &request.key, &entry).await?;
    }
    if let Some(state) = state {
        return Ok(Claim::AlreadyFinished(state));
    }
    let remaining: Option<u64> = row.try_get("remaining")?;
    let remaining = Duration::from_millis(remaining.unwrap_or(0));
    Ok(Claim::RunningUntil {
        until: Instant::now() + remaining,
        acked: row.try_get::<Option<bool>, _>("acked")? == Some(true),
    })
}
