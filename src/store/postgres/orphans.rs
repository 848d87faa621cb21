//! The statements by which a reaper takes what no delivery asks for.

use std::collections::HashMap;

use sqlx::postgres::PgRow;
use sqlx::{PgPool, Row};
use tokio::time::Instant;
use uuid::Uuid;

use super::super::{ClaimTerms, Reach, StoreError};
use super::claims::{Taker, Won, take_over};
use crate::job::{JobKey, Reaped};

/// Scans the small table only; the task of what it finds is looked up by key.
/// What waits may run at once; what was running when its worker was lost, only
/// once Pub/Sub has had its time to bring it back.
const FIND_ORPHANS: &str = "
SELECT leases.subscription, leases.key, leases.reap_delay, processed_messages.task,
       processed_messages.message_id, processed_messages.ordering_key, processed_messages.payload
FROM leases JOIN processed_messages USING (subscription, key)
WHERE leases.lease_until + make_interval(
          secs => CASE WHEN leases.token IS NULL THEN 0 ELSE leases.reap_delay END) <= now()
  AND leases.subscription = ANY ($1) AND processed_messages.task = ANY ($2)
  AND (leases.ordering_key IS NULL OR leases.position = (
          SELECT min(head.position) FROM leases head
          WHERE head.subscription = leases.subscription
            AND head.ordering_key = leases.ordering_key))
ORDER BY leases.lease_until, leases.position
LIMIT $3
FOR UPDATE OF leases SKIP LOCKED";

/// As [`FIND_ORPHANS`], without a lock: most sweeps find nothing.
const COUNT_DUE: &str = "
SELECT count(*) FROM (
    SELECT FROM leases JOIN processed_messages USING (subscription, key)
    WHERE leases.lease_until + make_interval(
              secs => CASE WHEN leases.token IS NULL THEN 0 ELSE leases.reap_delay END) <= now()
      AND leases.subscription = ANY ($1) AND processed_messages.task = ANY ($2)
      AND (leases.ordering_key IS NULL OR leases.position = (
              SELECT min(head.position) FROM leases head
              WHERE head.subscription = leases.subscription
                AND head.ordering_key = leases.ordering_key))
    LIMIT $3) AS due";

pub(super) async fn due(pool: &PgPool, reach: &Reach, limit: usize) -> Result<usize, StoreError> {
    let count: i64 = sqlx::query_scalar(COUNT_DUE)
        .bind(reach.subscriptions.keys().collect::<Vec<_>>())
        .bind(reach.tasks.keys().collect::<Vec<_>>())
        .bind(i64::try_from(limit).unwrap_or(i64::MAX))
        .fetch_one(pool)
        .await?;
    Ok(usize::try_from(count).unwrap_or_default())
}

const KNOW: &str = "
UPDATE leases SET unknown_since = NULL
FROM processed_messages
WHERE leases.unknown_since IS NOT NULL
  AND processed_messages.subscription = leases.subscription
  AND processed_messages.key = leases.key
  AND leases.subscription = ANY ($1) AND processed_messages.task = ANY ($2)";

pub(super) async fn know(pool: &PgPool, reach: &Reach) -> Result<(), StoreError> {
    sqlx::query(KNOW)
        .bind(reach.subscriptions.keys().collect::<Vec<_>>())
        .bind(reach.tasks.keys().collect::<Vec<_>>())
        .execute(pool)
        .await?;
    Ok(())
}

pub(super) async fn reap(
    pool: &PgPool,
    reach: &Reach,
    terms: &ClaimTerms,
    limit: usize,
) -> Result<Vec<Reaped>, StoreError> {
    let claimed_at = Instant::now();
    let mut transaction = pool.begin().await?;
    let found = sqlx::query(FIND_ORPHANS)
        .bind(reach.subscriptions.keys().collect::<Vec<_>>())
        .bind(reach.tasks.keys().collect::<Vec<_>>())
        .bind(i64::try_from(limit).unwrap_or(i64::MAX))
        .fetch_all(&mut *transaction)
        .await?;
    let keys = found
        .iter()
        .map(|row| {
            Ok(JobKey::new(
                row.try_get("subscription")?,
                row.try_get("key")?,
            ))
        })
        .collect::<Result<Vec<JobKey>, StoreError>>()?;
    let takers = keys
        .iter()
        .zip(&found)
        .map(|(key, row)| {
            Ok(Taker {
                key,
                token: Uuid::new_v4(),
                reap_delay: match reach.acked_when_claimed(row.try_get("task")?) {
                    true => 0.0,
                    false => row.try_get("reap_delay")?,
                },
                limits: reach.limits(&key.subscription, row.try_get("task")?),
            })
        })
        .collect::<Result<Vec<Taker>, StoreError>>()?;
    let won = take_over(&mut transaction, &takers, terms).await?;
    transaction.commit().await?;

    let mut won: HashMap<Uuid, Won> = won.into_iter().map(|won| (won.token, won)).collect();
    // In the order of `found`; what was parked instead is not among the won.
    takers
        .iter()
        .zip(&found)
        .filter_map(|(taker, row)| Some((taker, row, won.remove(&taker.token)?)))
        .map(|(taker, row, won)| reaped(taker.key, row, won, claimed_at))
        .collect()
}

fn reaped(key: &JobKey, row: &PgRow, won: Won, claimed_at: Instant) -> Result<Reaped, StoreError> {
    let payload: Option<Vec<u8>> = row.try_get("payload")?;
    Ok(Reaped {
        acquired: won.acquired(key.clone(), claimed_at),
        task: row.try_get("task")?,
        message_id: row.try_get("message_id")?,
        ordering_key: row.try_get("ordering_key")?,
        payload: payload.unwrap_or_default().into(),
    })
}
