//! The statements about a run in progress.

use std::collections::HashMap;
use std::time::Duration;

use uuid::Uuid;

use super::columns::{attempts, fence_tokens, key_columns};
use super::sessions::Sessions;
use crate::job::{Fence, Renewal};
use crate::store::StoreError;
use crate::store::values::storable;

/// Skips a row that another transaction has locked, so that no renewal waits for
/// another's row. The answer is then Unknown.
const RENEW: &str = "
WITH fence AS (
    SELECT * FROM unnest($1::text[], $2::text[], $3::int[], $4::uuid[])
      AS fence (subscription, key, attempt, token)
), locked AS (
    SELECT leases.subscription, leases.key
    FROM leases JOIN fence USING (subscription, key, attempt, token)
    ORDER BY leases.subscription, leases.key
    FOR NO KEY UPDATE OF leases SKIP LOCKED
), renewed AS (
    UPDATE leases
    SET lease_until = now() + make_interval(secs => $5)
    FROM locked
    WHERE leases.subscription = locked.subscription AND leases.key = locked.key
    RETURNING leases.token
)
SELECT token, renewed.token IS NOT NULL AS renewed
FROM fence JOIN leases USING (subscription, key, attempt, token)
LEFT JOIN renewed USING (token)";

pub(super) async fn renew(
    sessions: &Sessions,
    fences: &[Fence],
    lease: Duration,
) -> Result<Vec<Renewal>, StoreError> {
    let (subscriptions, keys) = key_columns(fences.iter().map(|fence| &fence.key));
    let rows: Vec<(Uuid, bool)> = sqlx::query_as(RENEW)
        .bind(subscriptions)
        .bind(keys)
        .bind(attempts(fences.iter()))
        .bind(fence_tokens(fences.iter()))
        .bind(lease.as_secs_f64())
        .fetch_all(sessions)
        .await?;
    let renewed: HashMap<Uuid, bool> = rows.into_iter().collect();
    Ok(fences
        .iter()
        .map(|fence| match renewed.get(&fence.token) {
            Some(true) => Renewal::Renewed,
            Some(false) => Renewal::Unknown,
            None => Renewal::Lost,
        })
        .collect())
}

const SAVE_CHECKPOINT: &str = "
UPDATE leases
SET checkpoint = $5, reap_delay = CASE WHEN $6 THEN 0 ELSE reap_delay END
WHERE subscription = $1 AND key = $2 AND attempt = $3 AND token = $4";

pub(super) async fn save_checkpoint(
    sessions: &Sessions,
    fence: &Fence,
    checkpoint: &str,
    acked: bool,
) -> Result<bool, StoreError> {
    let saved = sqlx::query(SAVE_CHECKPOINT)
        .bind(&*fence.key.subscription)
        .bind(&*fence.key.key)
        .bind(fence.attempt.cast_signed())
        .bind(fence.token)
        .bind(storable(checkpoint))
        .bind(acked)
        .execute(sessions)
        .await?;
    Ok(saved.rows_affected() == 1)
}

const CANCELLED_RUNS: &str =
    "SELECT token FROM leases WHERE cancel_requested AND worker = $1 AND token IS NOT NULL";

pub(super) async fn cancelled_runs(
    sessions: &Sessions,
    worker: &str,
) -> Result<Vec<Uuid>, StoreError> {
    let tokens = sqlx::query_scalar(CANCELLED_RUNS)
        .bind(worker)
        .fetch_all(sessions)
        .await?;
    Ok(tokens)
}
