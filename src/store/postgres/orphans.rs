//! The statements by which a reaper takes over what no delivery asks for.

use std::collections::HashMap;

use sqlx::{PgPool, Row};
use tokio::time::Instant;
use uuid::Uuid;

use super::super::{ClaimTerms, Reach, StoreError};
use super::claims::{Taker, Won, take_over};
use crate::job::{Acquired, Fence, JobKey, Orphan};

/// Scans the small table only; the task of what it finds is looked up by key.
const FIND_ORPHANS: &str = "
SELECT leases.subscription, leases.key, leases.reap_delay, processed_messages.task,
       processed_messages.message_id, processed_messages.payload
FROM leases JOIN processed_messages USING (subscription, key)
WHERE leases.lease_until + make_interval(secs => leases.reap_delay) < now()
  AND leases.subscription = ANY ($1) AND processed_messages.task = ANY ($2)
ORDER BY leases.lease_until
LIMIT $3
FOR UPDATE OF leases SKIP LOCKED";

pub(super) async fn reap(
    pool: &PgPool,
    reach: &Reach,
    terms: &ClaimTerms,
    limit: usize,
) -> Result<Vec<Orphan>, StoreError> {
    let claimed_at = Instant::now();
    let mut transaction = pool.begin().await?;
    let found = sqlx::query(FIND_ORPHANS)
        .bind(&reach.subscriptions)
        .bind(&reach.tasks)
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
                reap_delay: row.try_get("reap_delay")?,
            })
        })
        .collect::<Result<Vec<Taker>, StoreError>>()?;
    let won = take_over(&mut transaction, &takers, terms).await?;
    transaction.commit().await?;

    let mut won: HashMap<Uuid, Won> = won.into_iter().map(|won| (won.token, won)).collect();
    let mut orphans = Vec::with_capacity(won.len());
    // In the order of `found`; what was parked instead is not among the won.
    for (taker, row) in takers.iter().zip(&found) {
        let Some(won) = won.remove(&taker.token) else {
            continue;
        };
        let payload: Option<Vec<u8>> = row.try_get("payload")?;
        orphans.push(Orphan {
            acquired: Acquired {
                fence: Fence {
                    key: taker.key.clone(),
                    attempt: won.attempt.unsigned_abs(),
                    token: won.token,
                },
                job_id: won.job_id,
                claimed_at,
            },
            task: row.try_get("task")?,
            message_id: row.try_get("message_id")?,
            payload: payload.unwrap_or_default().into(),
        });
    }
    Ok(orphans)
}
