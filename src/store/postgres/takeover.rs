//! The statement by which a run takes a job that is on record: one that waits, or one
//! whose worker was lost.

use sqlx::{Executor, Postgres};
use tokio::time::Instant;
use uuid::Uuid;

use super::columns::key_columns;
use crate::job::{Acquired, Fence, JobKey};
use crate::outcome::DeadReason;
use crate::store::taker::Taker;
use crate::store::values::too_many_crashes;
use crate::store::{ClaimTerms, StoreError};

/// A job that a statement has just acquired or put on record.
#[derive(sqlx::FromRow)]
pub(super) struct Won {
    pub(super) token: Uuid,
    job_id: Uuid,
    attempt: i32,
    /// False if the new job has to wait.
    pub(super) runs: bool,
    counted_attempts: i32,
    checkpoint: Option<String>,
    cancel_requested: bool,
    /// The rest is filled only for a worker that takes the job without a delivery.
    pub(super) task: Option<String>,
    pub(super) message_id: Option<String>,
    pub(super) ordering_key: Option<String>,
    pub(super) payload: Option<Vec<u8>>,
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

/// SKIP LOCKED: another transaction is claiming a locked row. If the row already has the
/// request's own token, an earlier answer was lost: the claim is confirmed unchanged. It
/// precedes other claims of its key in the same batch, and is reported once.
///
/// A lease that expired without a word from its worker counts as a crash. At the limit of
/// crashes, or of the task's attempts, the job ends dead instead. `finished_by` stays
/// unset, since no run ended it: the last run that lost its lease must not mistake the
/// ending for its own.
const TAKE_OVER: &str = "
WITH input AS (
    SELECT DISTINCT ON (subscription, key) request.*
    FROM unnest($1::text[], $2::text[], $3::uuid[], $4::float8[], $5::boolean[], $6::boolean[],
                $7::int[], $8::text[])
      AS request (subscription, key, token, delay, takes_lost, from_queue, max_attempts,
                  dead_letter_topic)
    LEFT JOIN leases USING (subscription, key)
    ORDER BY subscription, key, leases.token IS NOT DISTINCT FROM request.token DESC
), free AS (
    SELECT leases.subscription, leases.key, input.token AS new_token,
           coalesce(input.delay, leases.reap_delay) AS new_delay, input.from_queue,
           input.dead_letter_topic, input.max_attempts,
           leases.token IS NOT DISTINCT FROM input.token AS mine,
           leases.token IS NOT NULL AND leases.token <> input.token AS crashed,
           leases.attempt - leases.interruptions >= input.max_attempts AS exhausted,
           leases.crashes, leases.worker AS last_worker
    FROM leases JOIN input USING (subscription, key)
    WHERE (leases.token = input.token
           OR leases.token IS NULL AND leases.run_after <= now()
           OR leases.token IS NOT NULL AND input.takes_lost
              AND leases.lease_until + make_interval(
                      secs => CASE WHEN input.from_queue THEN leases.reap_delay ELSE 0 END)
                  <= now())
      AND (leases.ordering_key IS NULL OR leases.position = (
              SELECT min(head.position) FROM leases head
              WHERE head.subscription = leases.subscription
                AND head.ordering_key = leases.ordering_key))
    ORDER BY leases.subscription, leases.key
    FOR NO KEY UPDATE OF leases SKIP LOCKED
), judged AS (
    SELECT *, crashed AND (crashes + 1 >= $9 OR exhausted) AS ends FROM free
), taken AS (
    UPDATE leases
    SET attempt = leases.attempt + (NOT judged.mine)::int, token = judged.new_token, worker = $10,
        started_at = now(), lease_until = now() + make_interval(secs => $11),
        crashes = judged.crashes + judged.crashed::int, reap_delay = judged.new_delay
    FROM judged
    WHERE leases.subscription = judged.subscription AND leases.key = judged.key
      AND NOT judged.ends
    RETURNING leases.*, judged.mine, judged.crashed, judged.last_worker, judged.from_queue
), noted AS (
    INSERT INTO ledger (subscription, key, worker, kind, attempt, detail)
    SELECT subscription, key, $10, CASE WHEN crashed THEN 'taken_over' ELSE 'claimed' END, attempt,
           CASE WHEN crashed THEN 'from ' || last_worker || ', whose lease ended' END
    FROM taken
    WHERE NOT mine
), parked AS (
    DELETE FROM leases USING judged
    WHERE leases.subscription = judged.subscription AND leases.key = judged.key AND judged.ends
    RETURNING leases.*, judged.dead_letter_topic,
              CASE WHEN judged.crashes + 1 >= $9 THEN $12
                   ELSE 'its worker was lost during attempt ' || judged.max_attempts || ' of '
                        || judged.max_attempts END AS reason
), dead AS (
    UPDATE processed_messages
    SET state = 'dead', error = parked.reason, reason = $13, finished_at = now(),
        attempts = parked.attempt - parked.interruptions, last_attempt = parked.attempt,
        worker = parked.worker, started_at = parked.started_at, checkpoint = parked.checkpoint,
        dead_letter_topic = parked.dead_letter_topic
    FROM parked
    WHERE processed_messages.subscription = parked.subscription
      AND processed_messages.key = parked.key
      -- All leases are deleted before the first job's row is locked, as a deletion may wait
      -- for a claim that waits for such a row.
      AND (SELECT count(*) FROM parked) > 0
), told AS (
    INSERT INTO ledger (subscription, key, worker, kind, attempt, detail)
    SELECT subscription, key, $10, 'parked', attempt, reason FROM parked
)
SELECT taken.token, taken.job_id, taken.attempt, true AS runs,
       taken.attempt - taken.interruptions AS counted_attempts, taken.checkpoint,
       taken.cancel_requested, taken.task, taken.ordering_key, message.message_id, message.payload
FROM taken LEFT JOIN LATERAL (
    SELECT message_id, payload FROM processed_messages m
    WHERE taken.from_queue AND m.subscription = taken.subscription AND m.key = taken.key
) AS message ON true";

pub(super) async fn take_over(
    executor: impl Executor<'_, Database = Postgres>,
    takers: &[Taker<'_>],
    terms: &ClaimTerms,
) -> Result<Vec<Won>, StoreError> {
    let (subscriptions, keys) = key_columns(takers.iter().map(|taker| taker.key));
    let max_attempts = takers
        .iter()
        .map(|taker| i32::try_from(taker.limits.max_attempts).unwrap_or(i32::MAX));
    let topics = takers
        .iter()
        .map(|taker| taker.limits.dead_letter_topic.as_deref());
    let delays = takers
        .iter()
        .map(|taker| taker.delay.map(|delay| delay.as_secs_f64()));
    let rows = sqlx::query_as(TAKE_OVER)
        .bind(subscriptions)
        .bind(keys)
        .bind(takers.iter().map(|taker| taker.token).collect::<Vec<_>>())
        .bind(delays.collect::<Vec<_>>())
        .bind(flags(takers, |taker| taker.takes_lost))
        .bind(flags(takers, |taker| taker.from_queue))
        .bind(max_attempts.collect::<Vec<_>>())
        .bind(topics.collect::<Vec<_>>())
        .bind(i32::try_from(terms.max_crashes).unwrap_or(i32::MAX))
        .bind(&*terms.worker)
        .bind(terms.lease.as_secs_f64())
        .bind(too_many_crashes(terms.max_crashes))
        .bind(DeadReason::WorkerLost.as_str())
        .fetch_all(executor)
        .await?;
    Ok(rows)
}

fn flags(takers: &[Taker<'_>], of: fn(&Taker<'_>) -> bool) -> Vec<bool> {
    takers.iter().map(of).collect()
}
