//! The statements by which a run takes a job that is on record: one that waits, or one
//! whose worker was lost.

use sqlx::{Row, SqliteConnection};
use tokio::time::Instant;
use uuid::Uuid;

use super::death::{Death, end};
use super::entry::{Entry, add_to_ledger};
use super::milliseconds;
use crate::job::{Acquired, Fence, JobKey};
use crate::outcome::DeadReason;
use crate::store::taker::Taker;
use crate::store::values::too_many_crashes;
use crate::store::{ClaimTerms, StoreError};

/// A job that a statement has just acquired.
pub(super) struct Won {
    pub(super) token: Uuid,
    pub(super) job_id: Uuid,
    pub(super) attempt: u32,
    pub(super) counted_attempts: u32,
    pub(super) checkpoint: Option<String>,
    pub(super) cancel_requested: bool,
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
    reap_delay = coalesce($7, reap_delay)
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
        .bind(taker.from_queue)
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
        .bind(taker.delay.map(milliseconds))
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

async fn park(
    connection: &mut SqliteConnection,
    taker: &Taker<'_>,
    error: &str,
    terms: &ClaimTerms,
) -> Result<(), StoreError> {
    let death = Death {
        error,
        reason: DeadReason::WorkerLost,
        worker: None,
        dead_letter_topic: taker.limits.dead_letter_topic.as_deref(),
    };
    let attempt = end(connection, taker.key, &death).await?;
    let entry = Entry {
        worker: &terms.worker,
        kind: "parked",
        attempt: Some(attempt),
        detail: Some(error),
        ..Entry::default()
    };
    add_to_ledger(connection, taker.key, &entry).await
}
