//! The statements that change a claim, each beside the function that runs it.
//!
//! SQLite has one writer at a time, so a batch is a loop in one transaction.

use std::time::Duration;

use sqlx::sqlite::SqlitePool;
use sqlx::{Connection, Row, SqliteConnection};
use tokio::time::Instant;
use uuid::Uuid;

use super::entry::{Entry, add_to_ledger};
use super::{BEGIN, milliseconds};
use crate::job::{Acquired, Can, Claim, ClaimRequest, Fence, FinalState, JobKey, Limits, Pick};
use crate::outcome::DeadReason;
use crate::store::values::{
    MAX_DUPLICATES_IN_LEDGER, final_state, json_text, storable, too_many_crashes,
};
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

/// A job that a statement has just acquired.
pub(super) struct Won {
    token: Uuid,
    job_id: Uuid,
    attempt: u32,
    counted_attempts: u32,
    checkpoint: Option<String>,
    cancel_requested: bool,
}

impl Won {
    pub(super) fn acquired(self, key: JobKey, claimed_at: Instant) -> Acquired {
        Acquired {
            fence: Fence {
                key,
                attempt: self.attempt,
                token: self.token,
            },
            job_id: self.job_id,
            claimed_at,
            counted_attempts: self.counted_attempts,
            checkpoint: self.checkpoint.map(Into::into),
            cancel_requested: self.cancel_requested,
        }
    }
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
        started_at, run_after, lease_until, reap_delay, unknown_since)
VALUES ($1, $2, $3, $4, $5,
        (SELECT coalesce(max(position), 0) + 1 FROM leases
         WHERE subscription = $1 AND ordering_key = $5),
        $6, CASE WHEN $6 THEN $7 END, CASE WHEN $6 THEN $8 END,
        CASE WHEN $6 THEN CAST(unixepoch('subsec') * 1000 AS INTEGER) END,
        CASE WHEN $9 THEN CAST(unixepoch('subsec') * 1000 AS INTEGER)
             ELSE 9223372036854775807 END,
        CAST(unixepoch('subsec') * 1000 AS INTEGER) + CASE WHEN $6 THEN $10 ELSE 0 END, $11,
        CASE WHEN $12 THEN CAST(unixepoch('subsec') * 1000 AS INTEGER) END)";

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
        .bind(request.can == Can::RecordUnknown)
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

/// What a run needs to take a job over.
pub(super) struct Taker<'a> {
    key: &'a JobKey,
    token: Uuid,
    /// In milliseconds. None keeps the row's value.
    delay: Option<i64>,
    /// Also takes the job of a worker whose lease has expired.
    takes_lost: bool,
    /// But only after the row's delay.
    waits_delay: bool,
    limits: &'a Limits,
}

impl<'a> From<&'a ClaimRequest> for Taker<'a> {
    fn from(request: &'a ClaimRequest) -> Self {
        Self {
            key: &request.key,
            token: request.token,
            delay: Some(milliseconds(request.ack.reap_delay(true))),
            takes_lost: request.can == Can::Run,
            waits_delay: false,
            limits: &request.limits,
        }
    }
}

impl<'a> From<&'a Pick> for Taker<'a> {
    fn from(pick: &'a Pick) -> Self {
        Self {
            key: &pick.key,
            token: pick.token,
            delay: pick.acked_when_claimed.then_some(0),
            takes_lost: true,
            waits_delay: true,
            limits: &pick.limits,
        }
    }
}

/// If the row already has the request's own token, an earlier answer was lost: the claim
/// is confirmed unchanged, and reported once. A lease that expired without a word from
/// its worker counts as a crash.
const FREE: &str = "
SELECT token IS $3 AS mine, token IS NOT NULL AND token <> $3 AS crashed, crashes, worker,
       attempt - interruptions AS counted_attempts
FROM leases
WHERE subscription = $1 AND key = $2
  AND (token = $3
       OR token IS NULL AND run_after <= CAST(unixepoch('subsec') * 1000 AS INTEGER)
       OR token IS NOT NULL AND $4
          AND lease_until + CASE WHEN $5 THEN reap_delay ELSE 0 END
              <= CAST(unixepoch('subsec') * 1000 AS INTEGER))
  AND (ordering_key IS NULL OR position = (
          SELECT min(head.position) FROM leases head
          WHERE head.subscription = leases.subscription
            AND head.ordering_key = leases.ordering_key))";

const TAKE_OVER: &str = "
UPDATE leases
SET attempt = attempt + (token IS NOT $3), token = $3, worker = $4,
    started_at = CAST(unixepoch('subsec') * 1000 AS INTEGER),
    lease_until = CAST(unixepoch('subsec') * 1000 AS INTEGER) + $5, crashes = $6,
    reap_delay = coalesce($7, reap_delay),
    unknown_since = NULL
WHERE subscription = $1 AND key = $2
RETURNING attempt, attempt - interruptions AS counted_attempts, checkpoint, cancel_requested,
          job_id";

pub(super) async fn take_over(
    connection: &mut SqliteConnection,
    taker: &Taker<'_>,
    terms: &ClaimTerms,
) -> Result<Option<Won>, StoreError> {
    let free = sqlx::query(FREE)
        .bind(&*taker.key.subscription)
        .bind(&*taker.key.key)
        .bind(taker.token)
        .bind(taker.takes_lost)
        .bind(taker.waits_delay)
        .fetch_optional(&mut *connection)
        .await?;
    let Some(free) = free else {
        return Ok(None);
    };
    let crashed: bool = free.try_get("crashed")?;
    let crashes = free.try_get::<u32, _>("crashes")? + u32::from(crashed);
    let max_attempts = taker.limits.max_attempts;
    let error = match crashed {
        true if crashes >= terms.max_crashes => Some(too_many_crashes(terms.max_crashes)),
        true if free.try_get::<u32, _>("counted_attempts")? >= max_attempts => Some(format!(
            "its worker was lost during attempt {max_attempts} of {max_attempts}"
        )),
        _ => None,
    };
    if let Some(error) = error {
        park(connection, taker, &error, terms).await?;
        return Ok(None);
    }
    let taken = sqlx::query(TAKE_OVER)
        .bind(&*taker.key.subscription)
        .bind(&*taker.key.key)
        .bind(taker.token)
        .bind(&*terms.worker)
        .bind(milliseconds(terms.lease))
        .bind(crashes)
        .bind(taker.delay)
        .fetch_one(&mut *connection)
        .await?;
    let attempt = taken.try_get("attempt")?;
    if !free.try_get::<bool, _>("mine")? {
        let last_worker: Option<String> = free.try_get("worker")?;
        let last_worker = last_worker.filter(|_| crashed);
        let detail = last_worker.map(|last| format!("from {last}, whose lease ended"));
        let entry = Entry {
            worker: &terms.worker,
            kind: if crashed { "taken_over" } else { "claimed" },
            attempt: Some(attempt),
            detail: detail.as_deref(),
            ..Entry::default()
        };
        add_to_ledger(connection, taker.key, &entry).await?;
    }
    Ok(Some(Won {
        token: taker.token,
        job_id: taken.try_get("job_id")?,
        attempt,
        counted_attempts: taken.try_get("counted_attempts")?,
        checkpoint: taken.try_get("checkpoint")?,
        cancel_requested: taken.try_get("cancel_requested")?,
    }))
}

/// `finished_by` is unset, since no run ended the job: the last run that lost its lease
/// must not mistake the ending for its own.
const PARK_JOB: &str = "
UPDATE processed_messages
SET state = 'dead', error = $3, finished_at = CAST(unixepoch('subsec') * 1000 AS INTEGER),
    attempts = parked.attempt - parked.interruptions, last_attempt = parked.attempt,
    worker = parked.worker, started_at = parked.started_at, checkpoint = parked.checkpoint,
    reason = $4, dead_letter_topic = $5
FROM (SELECT * FROM leases WHERE subscription = $1 AND key = $2) AS parked
WHERE processed_messages.subscription = $1 AND processed_messages.key = $2";

const PARK_LEASE: &str =
    "DELETE FROM leases WHERE subscription = $1 AND key = $2 RETURNING attempt";

async fn park(
    connection: &mut SqliteConnection,
    taker: &Taker<'_>,
    error: &str,
    terms: &ClaimTerms,
) -> Result<(), StoreError> {
    let key = taker.key;
    sqlx::query(PARK_JOB)
        .bind(&*key.subscription)
        .bind(&*key.key)
        .bind(error)
        .bind(DeadReason::WorkerLost.as_str())
        .bind(taker.limits.dead_letter_topic.as_deref())
        .execute(&mut *connection)
        .await?;
    let attempt = sqlx::query_scalar(PARK_LEASE)
        .bind(&*key.subscription)
        .bind(&*key.key)
        .fetch_one(&mut *connection)
        .await?;
    let entry = Entry {
        worker: &terms.worker,
        kind: "parked",
        attempt: Some(attempt),
        detail: Some(error),
        ..Entry::default()
    };
    add_to_ledger(connection, key, &entry).await
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
    Ok(Claim::HeldUntil {
        until: Instant::now() + remaining,
        acked: row.try_get::<Option<bool>, _>("acked")? == Some(true),
    })
}
