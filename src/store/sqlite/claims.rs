//! The statements that change a claim, each beside the function that runs it.
//!
//! SQLite has one writer at a time, so a batch is a loop in one transaction.

use std::time::Duration;

use sqlx::sqlite::SqlitePool;
use sqlx::{Connection, Row, SqliteConnection};
use tokio::time::Instant;
use uuid::Uuid;

use super::super::{
    ClaimTerms, MAX_DUPLICATES_IN_LEDGER, Standing, StoreError, final_state, json_text, storable,
    too_many_crashes,
};
use super::ledger::{Entry, add_to_ledger};
use crate::job::{Acquired, Claim, ClaimRequest, Fence, FinalState, JobKey};

/// Takes the write lock at once: a transaction that began by reading could
/// not become a writer after another one's commit.
pub(super) const BEGIN: &str = "BEGIN IMMEDIATE";

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
            None => take_over(&mut transaction, &request.into(), terms).await?,
        };
        answers.push(match won {
            Some(won) => Claim::Acquired(won.acquired(request.key.clone(), claimed_at)),
            None => count_duplicate(&mut transaction, request, terms).await?,
        });
    }
    transaction.commit().await?;
    Ok(answers)
}

/// A lease that a statement has just given.
pub(super) struct Won {
    token: Uuid,
    job_id: Uuid,
    attempt: u32,
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
        }
    }
}

const INSERT_NEW: &str = "
INSERT INTO processed_messages
       (subscription, key, job_id, message_id, publish_time, ordering_key, attributes, payload,
        task, state, received_at)
VALUES ($1, $2, $3, $4, $5, $6, $7, $8, $9, 'open', CAST(unixepoch('subsec') * 1000 AS INTEGER))
ON CONFLICT (subscription, key) DO NOTHING";

const INSERT_LEASE: &str = "
INSERT INTO leases
       (subscription, key, attempt, token, worker, started_at, lease_until, reap_delay)
VALUES ($1, $2, 1, $3, $4, CAST(unixepoch('subsec') * 1000 AS INTEGER),
        CAST(unixepoch('subsec') * 1000 AS INTEGER) + $5, $6)";

async fn insert_new(
    connection: &mut SqliteConnection,
    request: &ClaimRequest,
    terms: &ClaimTerms,
) -> Result<Option<Won>, StoreError> {
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
        .bind(milliseconds(request.reap_delay))
        .execute(&mut *connection)
        .await?;
    add_to_ledger(
        connection,
        &request.key,
        &Entry {
            worker: &terms.worker,
            kind: "claimed",
            attempt: Some(1),
            ..Entry::default()
        },
    )
    .await?;
    Ok(Some(Won {
        token: request.token,
        job_id: request.job_id,
        attempt: 1,
    }))
}

/// What a run needs to take a job over.
pub(super) struct Taker<'a> {
    pub(super) key: &'a JobKey,
    pub(super) token: Uuid,
    /// In milliseconds.
    pub(super) reap_delay: i64,
}

impl<'a> From<&'a ClaimRequest> for Taker<'a> {
    fn from(request: &'a ClaimRequest) -> Self {
        Self {
            key: &request.key,
            token: request.token,
            reap_delay: milliseconds(request.reap_delay),
        }
    }
}

/// A token that is the request's own already is the sign of an answer that was
/// lost: the claim is confirmed as it stands, and told once. A lease that ended without a word
/// from its worker is a crash.
const FREE: &str = "
SELECT token IS $3 AS mine, token IS NOT NULL AND token <> $3 AS crashed, crashes, worker
FROM leases
WHERE subscription = $1 AND key = $2
  AND (token IS NULL OR token = $3
       OR lease_until < CAST(unixepoch('subsec') * 1000 AS INTEGER))";

const TAKE_OVER: &str = "
UPDATE leases
SET attempt = attempt + (token IS NOT $3), token = $3, worker = $4,
    started_at = CAST(unixepoch('subsec') * 1000 AS INTEGER),
    lease_until = CAST(unixepoch('subsec') * 1000 AS INTEGER) + $5, crashes = $6, reap_delay = $7
WHERE subscription = $1 AND key = $2
RETURNING attempt, (SELECT job_id FROM processed_messages m
                    WHERE m.subscription = leases.subscription AND m.key = leases.key) AS job_id";

pub(super) async fn take_over(
    connection: &mut SqliteConnection,
    taker: &Taker<'_>,
    terms: &ClaimTerms,
) -> Result<Option<Won>, StoreError> {
    let free = sqlx::query(FREE)
        .bind(&*taker.key.subscription)
        .bind(&*taker.key.key)
        .bind(taker.token)
        .fetch_optional(&mut *connection)
        .await?;
    let Some(free) = free else {
        return Ok(None);
    };
    let crashed: bool = free.try_get("crashed")?;
    let crashes = free.try_get::<u32, _>("crashes")? + u32::from(crashed);
    if crashes >= terms.max_crashes {
        park(connection, taker.key, terms).await?;
        return Ok(None);
    }
    let taken = sqlx::query(TAKE_OVER)
        .bind(&*taker.key.subscription)
        .bind(&*taker.key.key)
        .bind(taker.token)
        .bind(&*terms.worker)
        .bind(milliseconds(terms.lease))
        .bind(crashes)
        .bind(taker.reap_delay)
        .fetch_one(&mut *connection)
        .await?;
    let attempt = taken.try_get("attempt")?;
    if !free.try_get::<bool, _>("mine")? {
        let last_worker: String = free.try_get("worker")?;
        let detail = crashed.then(|| format!("from {last_worker}, whose lease ended"));
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
    }))
}

/// No run ended the job, so `finished_by` is unset: the last one that lost its
/// lease must not take the ending for its own.
const PARK_JOB: &str = "
UPDATE processed_messages
SET state = 'dead', error = $3, finished_at = CAST(unixepoch('subsec') * 1000 AS INTEGER),
    attempts = parked.attempt - parked.interruptions, worker = parked.worker,
    started_at = parked.started_at
FROM (SELECT * FROM leases WHERE subscription = $1 AND key = $2) AS parked
WHERE processed_messages.subscription = $1 AND processed_messages.key = $2";

const PARK_LEASE: &str =
    "DELETE FROM leases WHERE subscription = $1 AND key = $2 RETURNING attempt";

async fn park(
    connection: &mut SqliteConnection,
    key: &JobKey,
    terms: &ClaimTerms,
) -> Result<(), StoreError> {
    let reason = too_many_crashes(terms.max_crashes);
    sqlx::query(PARK_JOB)
        .bind(&*key.subscription)
        .bind(&*key.key)
        .bind(&reason)
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
        detail: Some(&reason),
        ..Entry::default()
    };
    add_to_ledger(connection, key, &entry).await
}

const COUNT_DUPLICATE: &str = "
UPDATE processed_messages
SET duplicates = duplicates + 1
WHERE subscription = $1 AND key = $2
RETURNING state, duplicates, message_id,
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

pub(super) fn milliseconds(duration: Duration) -> i64 {
    i64::try_from(duration.as_millis()).unwrap_or(i64::MAX / 2)
}
