//! The statements that take jobs from the queue without a delivery.

use std::time::Duration;

use sqlx::sqlite::{SqlitePool, SqliteRow};
use sqlx::{Connection, Row, SqliteConnection};
use tokio::time::Instant;

use super::death::{Death, end};
use super::entry::{Entry, add_to_ledger};
use super::takeover::take_over;
use super::{BEGIN, milliseconds};
use crate::job::{Acquired, DueJob, JobKey, Pick, Taken};
use crate::outcome::DeadReason;
use crate::store::values::{final_state, json_text, storable};
use crate::store::{
    ClaimTerms, GivenUp, KNOWN_FOR, Patience, Reach, Standing, StoreError, UnknownJob,
};

/// Waiting jobs may run at once; jobs whose worker was lost only after Pub/Sub has had
/// time to redeliver. At most `$3` per subscription and task.
const DUE: &str = "
SELECT * FROM (
    SELECT subscription, key, task, false AS is_lost, position,
           CAST(unixepoch('subsec') * 1000 AS INTEGER) - run_after AS waited,
           row_number() OVER (PARTITION BY subscription, task ORDER BY run_after, position) AS nth
    FROM leases
    WHERE token IS NULL AND run_after <= CAST(unixepoch('subsec') * 1000 AS INTEGER)
      AND subscription IN (SELECT value FROM json_each($1))
      AND task IN (SELECT value FROM json_each($2))
      AND (ordering_key IS NULL OR position = (
              SELECT min(head.position) FROM leases head
              WHERE head.subscription = leases.subscription
                AND head.ordering_key = leases.ordering_key))
    UNION ALL
    SELECT subscription, key, task, true, position,
           CAST(unixepoch('subsec') * 1000 AS INTEGER) - lease_until - reap_delay,
           row_number() OVER (PARTITION BY subscription, task ORDER BY lease_until, position)
    FROM leases
    WHERE token IS NOT NULL
      AND lease_until + reap_delay <= CAST(unixepoch('subsec') * 1000 AS INTEGER)
      AND subscription IN (SELECT value FROM json_each($1))
      AND task IN (SELECT value FROM json_each($2)))
WHERE nth <= $3
ORDER BY waited DESC, position";

pub(super) async fn due(
    pool: &SqlitePool,
    reach: &Reach,
    limit: u32,
) -> Result<Vec<DueJob>, StoreError> {
    let rows = sqlx::query(DUE)
        .bind(json_text(&reach.subscriptions.keys().collect::<Vec<_>>())?)
        .bind(json_text(&reach.tasks.keys().collect::<Vec<_>>())?)
        .bind(limit)
        .fetch_all(pool)
        .await?;
    rows.iter().map(read_due).collect()
}

fn read_due(row: &SqliteRow) -> Result<DueJob, StoreError> {
    Ok(DueJob {
        key: JobKey::new(row.try_get("subscription")?, row.try_get("key")?),
        task: row.try_get("task")?,
        waited: Duration::from_millis(row.try_get::<i64, _>("waited")?.max(0).unsigned_abs()),
        is_lost: row.try_get("is_lost")?,
    })
}

pub(super) async fn take(
    pool: &SqlitePool,
    picks: &[Pick],
    terms: &ClaimTerms,
) -> Result<Vec<Taken>, StoreError> {
    let claimed_at = Instant::now();
    let mut connection = pool.acquire().await?;
    let mut transaction = connection.begin_with(BEGIN).await?;
    let mut taken = Vec::with_capacity(picks.len());
    for pick in picks {
        let won = take_over(&mut transaction, &pick.into(), terms).await?;
        if let Some(won) = won {
            let acquired = won.acquired(pick.key.clone(), claimed_at);
            taken.push(with_message(&mut transaction, acquired).await?);
        }
    }
    transaction.commit().await?;
    Ok(taken)
}

const MESSAGE: &str = "
SELECT task, message_id, ordering_key, payload FROM processed_messages
WHERE subscription = $1 AND key = $2";

async fn with_message(
    connection: &mut SqliteConnection,
    acquired: Acquired,
) -> Result<Taken, StoreError> {
    let key = &acquired.fence.key;
    let row = sqlx::query(MESSAGE)
        .bind(&*key.subscription)
        .bind(&*key.key)
        .fetch_one(connection)
        .await?;
    let payload: Option<Vec<u8>> = row.try_get("payload")?;
    Ok(Taken {
        acquired,
        task: row.try_get("task")?,
        message_id: row.try_get("message_id")?,
        ordering_key: row.try_get("ordering_key")?,
        payload: payload.unwrap_or_default().into(),
    })
}

const LOOK: &str = "
SELECT m.state, leases.token IS NULL AS waits, leases.reap_delay = 0 AS acked,
       leases.lease_until >= CAST(unixepoch('subsec') * 1000 AS INTEGER) AS holds,
       CASE WHEN leases.token IS NOT NULL
            THEN max(leases.lease_until - CAST(unixepoch('subsec') * 1000 AS INTEGER), 0)
            WHEN leases.run_after < 9223372036854775807
            THEN max(leases.run_after - CAST(unixepoch('subsec') * 1000 AS INTEGER), 0)
            ELSE 0 END AS remaining
FROM processed_messages m LEFT JOIN leases USING (subscription, key)
WHERE m.subscription = $1 AND m.key = $2";

pub(super) async fn look(pool: &SqlitePool, keys: &[JobKey]) -> Result<Vec<Standing>, StoreError> {
    let mut connection = pool.acquire().await?;
    let mut standings = Vec::with_capacity(keys.len());
    for key in keys {
        let row = sqlx::query(LOOK)
            .bind(&*key.subscription)
            .bind(&*key.key)
            .fetch_optional(&mut *connection)
            .await?;
        standings.push(match row {
            Some(row) => read_standing(&row)?,
            None => Standing::Missing,
        });
    }
    Ok(standings)
}

fn read_standing(row: &SqliteRow) -> Result<Standing, StoreError> {
    if let Some(state) = final_state(row.try_get("state")?) {
        return Ok(Standing::Finished(state));
    }
    let remaining = Duration::from_millis(row.try_get("remaining")?);
    if row.try_get("waits")? {
        return Ok(Standing::Waiting { remaining });
    }
    if row.try_get::<Option<bool>, _>("holds")? == Some(true) {
        let acked = row.try_get::<Option<bool>, _>("acked")? == Some(true);
        return Ok(Standing::Running { remaining, acked });
    }
    Ok(Standing::Lost)
}

/// As if the lease had expired `reap_delay` earlier.
const OFFER: &str = "
UPDATE leases SET lease_until = CAST(unixepoch('subsec') * 1000 AS INTEGER) - reap_delay
WHERE subscription = $1 AND key = $2 AND token IS NOT NULL
  AND lease_until <= CAST(unixepoch('subsec') * 1000 AS INTEGER)
  AND lease_until + reap_delay > CAST(unixepoch('subsec') * 1000 AS INTEGER)";

pub(super) async fn offer(pool: &SqlitePool, keys: &[JobKey]) -> Result<(), StoreError> {
    for key in keys {
        sqlx::query(OFFER)
            .bind(&*key.subscription)
            .bind(&*key.key)
            .execute(pool)
            .await?;
    }
    Ok(())
}

/// Usually there is nothing to write, so a look first avoids the write lock.
const NOT_KNOWN_FOR_LONG: &str = "
SELECT EXISTS (
    SELECT 1 FROM json_each($1) s CROSS JOIN json_each($2) t
    LEFT JOIN known_tasks ON subscription = s.value AND task = t.value
    WHERE known_until IS NULL OR known_until < CAST(unixepoch('subsec') * 1000 AS INTEGER) + $3 / 2)";

const KNOW: &str = "
INSERT INTO known_tasks (subscription, task, known_until)
SELECT s.value, t.value, CAST(unixepoch('subsec') * 1000 AS INTEGER) + $3
FROM json_each($1) s CROSS JOIN json_each($2) t WHERE true
ON CONFLICT (subscription, task) DO UPDATE
SET known_until = max(known_until, excluded.known_until)";

pub(super) async fn know(pool: &SqlitePool, reach: &Reach) -> Result<(), StoreError> {
    let subscriptions = json_text(&reach.subscriptions.keys().collect::<Vec<_>>())?;
    let tasks = json_text(&reach.tasks.keys().collect::<Vec<_>>())?;
    let has_to_say: bool = sqlx::query_scalar(NOT_KNOWN_FOR_LONG)
        .bind(&subscriptions)
        .bind(&tasks)
        .bind(milliseconds(KNOWN_FOR))
        .fetch_one(pool)
        .await?;
    if has_to_say {
        sqlx::query(KNOW)
            .bind(subscriptions)
            .bind(tasks)
            .bind(milliseconds(KNOWN_FOR))
            .execute(pool)
            .await?;
    }
    Ok(())
}

/// Goes from task to task through the indexes, past the jobs of each.
const UNKNOWN: &str = "
WITH RECURSIVE waiting (subscription, task) AS (
    SELECT value, (SELECT min(task) FROM leases WHERE token IS NULL AND subscription = value)
    FROM json_each($1)
    UNION ALL
    SELECT waiting.subscription, (
        SELECT min(leases.task) FROM leases
        WHERE token IS NULL AND leases.subscription = waiting.subscription
          AND leases.task > waiting.task)
    FROM waiting WHERE task IS NOT NULL
), claimed (subscription, task) AS (
    SELECT value, (SELECT min(task) FROM leases WHERE token IS NOT NULL AND subscription = value)
    FROM json_each($1)
    UNION ALL
    SELECT claimed.subscription, (
        SELECT min(leases.task) FROM leases
        WHERE token IS NOT NULL AND leases.subscription = claimed.subscription
          AND leases.task > claimed.task)
    FROM claimed WHERE task IS NOT NULL
), unknown AS (
    SELECT * FROM (SELECT * FROM waiting UNION SELECT * FROM claimed) AS asked
    WHERE task IS NOT NULL AND NOT EXISTS (
        SELECT 1 FROM known_tasks known
        WHERE known.subscription = asked.subscription AND known.task = asked.task
          AND (known.known_until > CAST(unixepoch('subsec') * 1000 AS INTEGER) - $2 OR NOT $3))
), job AS (
    SELECT leases.subscription, leases.key, leases.task,
           row_number() OVER (PARTITION BY leases.subscription, leases.task
                              ORDER BY leases.run_after, leases.position) AS nth
    FROM unknown JOIN leases USING (subscription, task)
    WHERE token IS NULL
          AND (run_after <= CAST(unixepoch('subsec') * 1000 AS INTEGER) OR attempt = 0)
       OR token IS NOT NULL
          AND lease_until + reap_delay <= CAST(unixepoch('subsec') * 1000 AS INTEGER) - $2
)
SELECT subscription, key, task FROM job WHERE nth <= $4";

pub(super) async fn unknown(
    pool: &SqlitePool,
    subscriptions: &[&str],
    patience: Patience,
    limit: u32,
) -> Result<Vec<UnknownJob>, StoreError> {
    let rows = sqlx::query(UNKNOWN)
        .bind(json_text(&subscriptions)?)
        .bind(milliseconds(patience.lasts))
        .bind(patience.forgotten)
        .bind(limit)
        .fetch_all(pool)
        .await?;
    let unknown = rows.iter().map(|row| {
        Ok(UnknownJob {
            key: JobKey::new(row.try_get("subscription")?, row.try_get("key")?),
            task: row.try_get("task")?,
        })
    });
    unknown.collect()
}

const IS_GIVEN_UP: &str = "
SELECT EXISTS (
SELECT 1 FROM leases
WHERE subscription = $1 AND key = $2
  AND (token IS NULL
           AND CASE WHEN attempt = 0 THEN queued_at ELSE run_after END
               <= CAST(unixepoch('subsec') * 1000 AS INTEGER) - $3
       OR token IS NOT NULL
           AND lease_until + reap_delay <= CAST(unixepoch('subsec') * 1000 AS INTEGER) - $3)
  AND NOT EXISTS (
      SELECT 1 FROM known_tasks known
      WHERE known.subscription = leases.subscription AND known.task = leases.task
        AND (known.known_until > CAST(unixepoch('subsec') * 1000 AS INTEGER) - $3 OR NOT $4)))";

pub(super) async fn give_up_unknown(
    pool: &SqlitePool,
    unknown: &[GivenUp],
    patience: Patience,
) -> Result<Vec<JobKey>, StoreError> {
    let mut connection = pool.acquire().await?;
    let mut transaction = connection.begin_with(BEGIN).await?;
    let mut ended = Vec::new();
    for given_up in unknown {
        if give_up_one(&mut transaction, given_up, patience).await? {
            ended.push(given_up.key.clone());
        }
    }
    transaction.commit().await?;
    Ok(ended)
}

async fn give_up_one(
    connection: &mut SqliteConnection,
    given_up: &GivenUp,
    patience: Patience,
) -> Result<bool, StoreError> {
    let key = &given_up.key;
    let is_given_up: bool = sqlx::query_scalar(IS_GIVEN_UP)
        .bind(&*key.subscription)
        .bind(&*key.key)
        .bind(milliseconds(patience.lasts))
        .bind(patience.forgotten)
        .fetch_one(&mut *connection)
        .await?;
    if !is_given_up {
        return Ok(false);
    }
    let error = storable(&given_up.error);
    let death = Death {
        error: &error,
        reason: DeadReason::UnknownTask,
        worker: Some(&given_up.worker),
        dead_letter_topic: given_up.dead_letter_topic.as_deref(),
    };
    end(connection, key, &death).await?;
    let entry = Entry {
        worker: &given_up.worker,
        kind: "refused",
        detail: Some(&error),
        ..Entry::default()
    };
    add_to_ledger(connection, key, &entry).await?;
    Ok(true)
}
