//! The statements by which a reaper takes what no delivery asks for.

use sqlx::sqlite::{SqlitePool, SqliteRow};
use sqlx::{Connection, Row, SqliteConnection};
use tokio::time::Instant;
use uuid::Uuid;

use super::super::{ClaimTerms, Reach, StoreError, json_text};
use super::claims::{BEGIN, Taker, take_over};
use crate::job::{JobKey, Reaped};

/// Scans the small table only; the task of what it finds is looked up by key.
/// What waits may run at once; what was running when its worker was lost, only
/// once Pub/Sub has had its time to bring it back.
const FIND_ORPHANS: &str = "
SELECT leases.subscription, leases.key, leases.reap_delay, m.task, m.message_id,
       m.ordering_key, m.payload
FROM leases JOIN processed_messages m USING (subscription, key)
WHERE leases.lease_until + CASE WHEN leases.token IS NULL THEN 0 ELSE leases.reap_delay END
          <= CAST(unixepoch('subsec') * 1000 AS INTEGER)
  AND leases.subscription IN (SELECT value FROM json_each($1))
  AND m.task IN (SELECT value FROM json_each($2))
  AND (leases.ordering_key IS NULL OR leases.position = (
          SELECT min(head.position) FROM leases head
          WHERE head.subscription = leases.subscription
            AND head.ordering_key = leases.ordering_key))
ORDER BY leases.lease_until, leases.position
LIMIT $3";

async fn find(
    connection: &mut SqliteConnection,
    reach: &Reach,
    limit: usize,
) -> Result<Vec<SqliteRow>, StoreError> {
    let found = sqlx::query(FIND_ORPHANS)
        .bind(json_text(&reach.subscriptions.keys().collect::<Vec<_>>())?)
        .bind(json_text(&reach.tasks.keys().collect::<Vec<_>>())?)
        .bind(i64::try_from(limit).unwrap_or(i64::MAX))
        .fetch_all(connection)
        .await?;
    Ok(found)
}

pub(super) async fn due(
    pool: &SqlitePool,
    reach: &Reach,
    limit: usize,
) -> Result<usize, StoreError> {
    let mut connection = pool.acquire().await?;
    Ok(find(&mut connection, reach, limit).await?.len())
}

const UNKNOWN: &str = "SELECT EXISTS (SELECT 1 FROM leases WHERE unknown_since IS NOT NULL)";

const KNOW: &str = "
UPDATE leases SET unknown_since = NULL
WHERE unknown_since IS NOT NULL
  AND subscription IN (SELECT value FROM json_each($1))
  AND (SELECT task FROM processed_messages m
       WHERE m.subscription = leases.subscription AND m.key = leases.key)
      IN (SELECT value FROM json_each($2))";

pub(super) async fn know(pool: &SqlitePool, reach: &Reach) -> Result<(), StoreError> {
    // As a rule there is nothing to write, and no need for the only writer's place.
    if !sqlx::query_scalar(UNKNOWN).fetch_one(pool).await? {
        return Ok(());
    }
    sqlx::query(KNOW)
        .bind(json_text(&reach.subscriptions.keys().collect::<Vec<_>>())?)
        .bind(json_text(&reach.tasks.keys().collect::<Vec<_>>())?)
        .execute(pool)
        .await?;
    Ok(())
}

pub(super) async fn reap(
    pool: &SqlitePool,
    reach: &Reach,
    terms: &ClaimTerms,
    limit: usize,
) -> Result<Vec<Reaped>, StoreError> {
    let claimed_at = Instant::now();
    let mut connection = pool.acquire().await?;
    let mut transaction = connection.begin_with(BEGIN).await?;
    let found = find(&mut transaction, reach, limit).await?;
    let mut reaped = Vec::with_capacity(found.len());
    for row in &found {
        let key = JobKey::new(row.try_get("subscription")?, row.try_get("key")?);
        let taker = Taker {
            key: &key,
            token: Uuid::new_v4(),
            reap_delay: match reach.acked_when_claimed(row.try_get("task")?) {
                true => 0,
                false => row.try_get("reap_delay")?,
            },
            limits: reach.limits(&key.subscription, row.try_get("task")?),
        };
        let Some(won) = take_over(&mut transaction, &taker, terms).await? else {
            continue;
        };
        let payload: Option<Vec<u8>> = row.try_get("payload")?;
        reaped.push(Reaped {
            acquired: won.acquired(key, claimed_at),
            task: row.try_get("task")?,
            message_id: row.try_get("message_id")?,
            ordering_key: row.try_get("ordering_key")?,
            payload: payload.unwrap_or_default().into(),
        });
    }
    transaction.commit().await?;
    Ok(reaped)
}
