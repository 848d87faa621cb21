//! The statements about a run in progress.

use std::time::Duration;

use sqlx::Connection;
use sqlx::sqlite::SqlitePool;
use uuid::Uuid;

use super::{BEGIN, milliseconds};
use crate::job::{Fence, Renewal};
use crate::store::StoreError;
use crate::store::values::storable;

const RENEW: &str = "
UPDATE leases
SET lease_until = CAST(unixepoch('subsec') * 1000 AS INTEGER) + $5
WHERE subscription = $1 AND key = $2 AND attempt = $3 AND token = $4";

pub(super) async fn renew(
    pool: &SqlitePool,
    fences: &[Fence],
    lease: Duration,
) -> Result<Vec<Renewal>, StoreError> {
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
        renewed.push(match row.rows_affected() {
            0 => Renewal::Lost,
            _ => Renewal::Renewed,
        });
    }
    transaction.commit().await?;
    Ok(renewed)
}

const SAVE_CHECKPOINT: &str = "
UPDATE leases
SET checkpoint = $5, reap_delay = CASE WHEN $6 THEN 0 ELSE reap_delay END
WHERE subscription = $1 AND key = $2 AND attempt = $3 AND token = $4";

pub(super) async fn save_checkpoint(
    pool: &SqlitePool,
    fence: &Fence,
    checkpoint: &str,
    acked: bool,
) -> Result<bool, StoreError> {
    let saved = sqlx::query(SAVE_CHECKPOINT)
        .bind(&*fence.key.subscription)
        .bind(&*fence.key.key)
        .bind(fence.attempt)
        .bind(fence.token)
        .bind(storable(checkpoint))
        .bind(acked)
        .execute(pool)
        .await?;
    Ok(saved.rows_affected() == 1)
}

const CANCELLED_RUNS: &str =
    "SELECT token FROM leases WHERE cancel_requested AND worker = $1 AND token IS NOT NULL";

pub(super) async fn cancelled_runs(
    pool: &SqlitePool,
    worker: &str,
) -> Result<Vec<Uuid>, StoreError> {
    let tokens = sqlx::query_scalar(CANCELLED_RUNS)
        .bind(worker)
        .fetch_all(pool)
        .await?;
    Ok(tokens)
}
