//! The statements by which a reaper takes over what no delivery asks for.

use std::collections::HashMap;

use sqlx::{PgPool, Row};
use tokio::time::Instant;
use uuid::Uuid;

use super::super::{ClaimTerms, Reach, StoreError};
use super::claims::{Taker, take_over};
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
    let mut keys = HashMap::with_capacity(found.len());
    for row in &found {
        let key = JobKey::new(row.try_get("subscription")?, row.try_get("key")?);
        keys.insert(Uuid::new_v4(), (key, row));
    }
    let takers: Vec<Taker> = keys
        .iter()
        .map(|(token, (key, row))| {
            Ok(Taker {
                key,
                token: *token,
                reap_delay: row.try_get("reap_delay")?,
            })
        })
        .collect::<Result<_, StoreError>>()?;
    let won = take_over(&mut transaction, &takers, terms).await?;
    drop(takers);
    transaction.commit().await?;

    let mut orphans = Vec::with_capacity(won.len());
    for won in won {
        let Some((key, row)) = keys.remove(&won.token) else {
            continue;
        };
        let payload: Option<Vec<u8>> = row.try_get("payload")?;
        orphans.push(Orphan {
            acquired: Acquired {
                fence: Fence {
                    key,
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
