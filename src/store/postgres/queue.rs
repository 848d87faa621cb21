//! The statements that take jobs from the queue without a delivery.

use std::collections::HashMap;
use std::time::Duration;

use sqlx::Row;
use sqlx::postgres::PgRow;
use tokio::time::Instant;
use uuid::Uuid;

use super::columns::key_columns;
use super::sessions::Sessions;
use super::takeover::{Won, take_over};
use crate::job::{DueJob, JobKey, Pick, Taken};
use crate::outcome::DeadReason;
use crate::store::taker::Taker;
use crate::store::values::{final_state, storable};
use crate::store::{
    ClaimTerms, GivenUp, KNOWN_FOR, Patience, Reach, Standing, StoreError, UnknownJob,
};

/// Walks an index for each pair of subscription and task, from the oldest job on, so that
/// ended jobs and jobs out of reach cost nothing. Waiting jobs may run at once; jobs
/// whose worker was lost only after Pub/Sub has had time to redeliver.
///
/// A job behind another of its ordering key has an infinite `run_after`. `position` is
/// checked too, since workers of an earlier version do not write that.
const DUE: &str = "
SELECT due.* FROM unnest($1::text[]) AS s (subscription)
CROSS JOIN unnest($2::text[]) AS t (task)
CROSS JOIN LATERAL (
    (SELECT subscription, key, task, false AS is_lost,
            extract(epoch FROM now() - run_after)::float8 AS waited, position
     FROM leases
     WHERE token IS NULL AND leases.subscription = s.subscription AND leases.task = t.task
       AND run_after <= now()
       AND (ordering_key IS NULL OR position = (
               SELECT min(head.position) FROM leases head
               WHERE head.subscription = leases.subscription
                 AND head.ordering_key = leases.ordering_key))
     ORDER BY run_after, position
     LIMIT $3)
    UNION ALL
    (SELECT subscription, key, task, true,
            extract(epoch FROM now() - lease_until)::float8 - reap_delay, position
     FROM leases
     WHERE token IS NOT NULL AND leases.subscription = s.subscription AND leases.task = t.task
       AND lease_until + make_interval(secs => reap_delay) <= now()
     ORDER BY lease_until, position
     LIMIT $3)
) AS due
ORDER BY waited DESC, position";

pub(super) async fn due(
    sessions: &Sessions,
    reach: &Reach,
    limit: u32,
) -> Result<Vec<DueJob>, StoreError> {
    let rows = sqlx::query(DUE)
        .bind(reach.subscriptions.keys().collect::<Vec<_>>())
        .bind(reach.tasks.keys().collect::<Vec<_>>())
        .bind(i64::from(limit))
        .fetch_all(sessions)
        .await?;
    rows.iter().map(read_due).collect()
}

fn read_due(row: &PgRow) -> Result<DueJob, StoreError> {
    let waited: f64 = row.try_get("waited")?;
    Ok(DueJob {
        key: JobKey::new(row.try_get("subscription")?, row.try_get("key")?),
        task: row.try_get("task")?,
        waited: Duration::try_from_secs_f64(waited).unwrap_or_default(),
        is_lost: row.try_get("is_lost")?,
    })
}

pub(super) async fn take(
    sessions: &Sessions,
    picks: &[Pick],
    terms: &ClaimTerms,
) -> Result<Vec<Taken>, StoreError> {
    let claimed_at = Instant::now();
    let takers: Vec<Taker> = picks.iter().map(Taker::from).collect();
    let won = take_over(sessions, &takers, terms).await?;
    let mut won: HashMap<Uuid, Won> = won.into_iter().map(|won| (won.token, won)).collect();
    // Parked jobs are not among the acquired ones.
    let taken = picks
        .iter()
        .filter_map(|pick| Some((pick, won.remove(&pick.token)?)))
        .map(|(pick, won)| taken(pick, won, claimed_at));
    Ok(taken.collect())
}

fn taken(pick: &Pick, mut won: Won, claimed_at: Instant) -> Taken {
    Taken {
        task: won.task.take().unwrap_or_default(),
        message_id: won.message_id.take().unwrap_or_default(),
        ordering_key: won.ordering_key.take().unwrap_or_default(),
        payload: won.payload.take().unwrap_or_default().into(),
        acquired: won.acquired(pick.key.clone(), claimed_at),
    }
}

/// Each limit makes a look-up by the index of each key: by its estimates, the
/// server would rather read the whole queue for hundreds of keys.
const LOOK: &str = "
SELECT m.state, leases.token IS NULL AS waits, leases.lease_until >= now() AS holds,
       leases.reap_delay = 0 AS acked,
       CASE WHEN leases.token IS NOT NULL
            THEN greatest(extract(epoch FROM leases.lease_until - now()), 0)
            WHEN leases.run_after < 'infinity'
            THEN greatest(extract(epoch FROM leases.run_after - now()), 0)
            ELSE 0 END::float8 AS remaining
FROM unnest($1::text[], $2::text[]) WITH ORDINALITY AS asked (subscription, key, nth)
LEFT JOIN LATERAL (
    SELECT * FROM leases
    WHERE leases.subscription = asked.subscription AND leases.key = asked.key
    LIMIT 1) AS leases ON true
LEFT JOIN LATERAL (
    SELECT state FROM processed_messages m
    WHERE m.subscription = asked.subscription AND m.key = asked.key
    LIMIT 1) AS m ON true
ORDER BY nth";

pub(super) async fn look(
    sessions: &Sessions,
    keys: &[JobKey],
) -> Result<Vec<Standing>, StoreError> {
    let (subscriptions, keys) = key_columns(keys.iter());
    let rows = sqlx::query(LOOK)
        .bind(subscriptions)
        .bind(keys)
        .fetch_all(sessions)
        .await?;
    rows.iter().map(read_standing).collect()
}

fn read_standing(row: &PgRow) -> Result<Standing, StoreError> {
    let state: Option<&str> = row.try_get("state")?;
    let Some(state) = state else {
        return Ok(Standing::Missing);
    };
    if let Some(state) = final_state(state) {
        return Ok(Standing::Finished(state));
    }
    let remaining = Duration::from_secs_f64(row.try_get("remaining")?);
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
WITH lost AS (
    SELECT leases.subscription, leases.key
    FROM leases JOIN unnest($1::text[], $2::text[]) AS offered (subscription, key)
        USING (subscription, key)
    WHERE token IS NOT NULL AND lease_until <= now()
      AND lease_until + make_interval(secs => reap_delay) > now()
    ORDER BY leases.subscription, leases.key
    FOR NO KEY UPDATE OF leases SKIP LOCKED
)
UPDATE leases SET lease_until = now() - make_interval(secs => reap_delay)
FROM lost
WHERE leases.subscription = lost.subscription AND leases.key = lost.key";

pub(super) async fn offer(sessions: &Sessions, keys: &[JobKey]) -> Result<(), StoreError> {
    let (subscriptions, keys) = key_columns(keys.iter());
    sqlx::query(OFFER)
        .bind(subscriptions)
        .bind(keys)
        .execute(sessions)
        .await?;
    Ok(())
}

/// Of the rows that it would not change, none is locked.
const KNOW: &str = "
INSERT INTO known_tasks AS known (subscription, task, known_until)
SELECT s.subscription, t.task, now() + make_interval(secs => $3)
FROM unnest($1::text[]) AS s (subscription) CROSS JOIN unnest($2::text[]) AS t (task)
LEFT JOIN known_tasks USING (subscription, task)
WHERE known_until IS NULL OR known_until < now() + make_interval(secs => $3 / 2)
ORDER BY subscription, task
ON CONFLICT (subscription, task) DO UPDATE
SET known_until = greatest(known.known_until, excluded.known_until)";

pub(super) async fn know(sessions: &Sessions, reach: &Reach) -> Result<(), StoreError> {
    sqlx::query(KNOW)
        .bind(reach.subscriptions.keys().collect::<Vec<_>>())
        .bind(reach.tasks.keys().collect::<Vec<_>>())
        .bind(KNOWN_FOR.as_secs_f64())
        .execute(sessions)
        .await?;
    Ok(())
}

/// Goes from task to task through the indexes, past the jobs of each.
const UNKNOWN: &str = "
WITH RECURSIVE waiting (subscription, task) AS (
    SELECT s.subscription, (
        SELECT min(task) FROM leases WHERE token IS NULL AND subscription = s.subscription)
    FROM unnest($1::text[]) AS s (subscription)
    UNION ALL
    SELECT waiting.subscription, (
        SELECT min(leases.task) FROM leases
        WHERE token IS NULL AND leases.subscription = waiting.subscription
          AND leases.task > waiting.task)
    FROM waiting WHERE task IS NOT NULL
), claimed (subscription, task) AS (
    SELECT s.subscription, (
        SELECT min(task) FROM leases WHERE token IS NOT NULL AND subscription = s.subscription)
    FROM unnest($1::text[]) AS s (subscription)
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
          AND (known.known_until > now() - make_interval(secs => $2) OR NOT $3))
)
SELECT job.* FROM unknown CROSS JOIN LATERAL (
    (SELECT subscription, key, task FROM leases
     WHERE token IS NULL AND leases.subscription = unknown.subscription
       AND leases.task = unknown.task AND (run_after <= now() OR attempt = 0)
     ORDER BY run_after, position
     LIMIT $4)
    UNION ALL
    (SELECT subscription, key, task FROM leases
     WHERE token IS NOT NULL AND leases.subscription = unknown.subscription
       AND leases.task = unknown.task
       AND lease_until + make_interval(secs => reap_delay + $2) <= now()
     ORDER BY lease_until, position
     LIMIT $4)
) AS job";

pub(super) async fn unknown(
    sessions: &Sessions,
    subscriptions: &[&str],
    patience: Patience,
    limit: u32,
) -> Result<Vec<UnknownJob>, StoreError> {
    let rows = sqlx::query(UNKNOWN)
        .bind(subscriptions)
        .bind(patience.lasts.as_secs_f64())
        .bind(patience.forgotten)
        .bind(i64::from(limit))
        .fetch_all(sessions)
        .await?;
    let unknown = rows.iter().map(|row| {
        Ok(UnknownJob {
            key: JobKey::new(row.try_get("subscription")?, row.try_get("key")?),
            task: row.try_get("task")?,
        })
    });
    unknown.collect()
}

/// A locked row is for the next look. `finished_by` stays unset, as in a takeover that ends
/// the job.
const GIVE_UP_UNKNOWN: &str = "
WITH unknown AS (
    SELECT * FROM unnest($1::text[], $2::text[], $3::text[], $4::text[], $5::text[])
      AS unknown (subscription, key, error, worker, dead_letter_topic)
), locked AS (
    SELECT unknown.*
    FROM leases JOIN unknown USING (subscription, key)
    JOIN processed_messages m USING (subscription, key)
    WHERE (leases.token IS NULL
               AND CASE WHEN leases.attempt = 0 THEN leases.queued_at ELSE leases.run_after END
                   <= now() - make_interval(secs => $6)
           OR leases.token IS NOT NULL
               AND leases.lease_until + make_interval(secs => leases.reap_delay + $6) <= now())
      AND NOT EXISTS (
          SELECT 1 FROM known_tasks known
          WHERE known.subscription = leases.subscription AND known.task = leases.task
            AND (known.known_until > now() - make_interval(secs => $6) OR NOT $7))
    ORDER BY leases.subscription, leases.key
    FOR UPDATE OF leases SKIP LOCKED FOR NO KEY UPDATE OF m SKIP LOCKED
), given_up AS (
    DELETE FROM leases USING locked
    WHERE leases.subscription = locked.subscription AND leases.key = locked.key
    RETURNING locked.*, leases.attempt, leases.interruptions, leases.started_at, leases.checkpoint
), dead AS (
    UPDATE processed_messages
    SET state = 'dead', error = given_up.error, reason = $8, finished_at = now(),
        attempts = given_up.attempt - given_up.interruptions, last_attempt = given_up.attempt,
        worker = given_up.worker, started_at = given_up.started_at,
        checkpoint = given_up.checkpoint, dead_letter_topic = given_up.dead_letter_topic
    FROM given_up
    WHERE processed_messages.subscription = given_up.subscription
      AND processed_messages.key = given_up.key
), noted AS (
    INSERT INTO ledger (subscription, key, worker, kind, detail)
    SELECT subscription, key, worker, 'refused', error FROM given_up
)
SELECT subscription, key FROM given_up";

pub(super) async fn give_up_unknown(
    sessions: &Sessions,
    unknown: &[GivenUp],
    patience: Patience,
) -> Result<Vec<JobKey>, StoreError> {
    let (subscriptions, keys) = key_columns(unknown.iter().map(|unknown| &unknown.key));
    let errors = unknown.iter().map(|unknown| storable(&unknown.error));
    let workers = unknown.iter().map(|unknown| &*unknown.worker);
    let topics = unknown
        .iter()
        .map(|unknown| unknown.dead_letter_topic.as_deref());
    let ended: Vec<(String, String)> = sqlx::query_as(GIVE_UP_UNKNOWN)
        .bind(subscriptions)
        .bind(keys)
        .bind(errors.collect::<Vec<_>>())
        .bind(workers.collect::<Vec<_>>())
        .bind(topics.collect::<Vec<_>>())
        .bind(patience.lasts.as_secs_f64())
        .bind(patience.forgotten)
        .bind(DeadReason::UnknownTask.as_str())
        .fetch_all(sessions)
        .await?;
    let keys = ended
        .iter()
        .map(|(subscription, key)| JobKey::new(subscription, key));
    Ok(keys.collect())
}
