//! What makes the order of an ordering key's jobs safe beside each other.
//!
//! A job may be taken only if no other row of its ordering key has a lower
//! `position`. A row goes when its job ends and only then, so a job that waits for
//! its next attempt or has lost its worker keeps its place. `position` is a
//! sequence, and sequences are not in the order of commits: hence the locks.

use std::borrow::Cow;

use sqlx::PgConnection;

use crate::store::StoreError;

/// Of two transactions that put jobs of one ordering key on record, the later
/// one must see what the earlier one wrote. Sorted, against deadlocks.
const LOCK_ORDERING_KEYS: &str = "
SELECT pg_advisory_xact_lock(lock) FROM (
    SELECT DISTINCT hashtextextended(subscription || chr(10) || ordering_key, 0) AS lock
    FROM unnest($1::text[], $2::text[]) AS request (subscription, ordering_key)
    ORDER BY lock
) AS locks";

/// The last job of each ordering key stays in the queue until this transaction
/// ends. So whoever deletes it later sees the job that comes behind it, and the
/// deletion's trigger lets that one run. KEY SHARE does not stop renewals.
const LOCK_LAST_OF_ORDERING_KEYS: &str = "
WITH last AS MATERIALIZED (
    SELECT requested.subscription, last.key
    FROM (SELECT DISTINCT * FROM unnest($1::text[], $2::text[])
            AS request (subscription, ordering_key)) AS requested
    CROSS JOIN LATERAL (
        SELECT leases.key FROM leases
        WHERE leases.subscription = requested.subscription
          AND leases.ordering_key = requested.ordering_key
        ORDER BY leases.position DESC
        LIMIT 1) AS last
), locked AS (
    SELECT leases.key FROM leases JOIN last USING (subscription, key)
    ORDER BY leases.subscription, leases.key
    FOR KEY SHARE OF leases
)
SELECT (SELECT count(*) FROM last) = (SELECT count(*) FROM locked)";

/// From now on, until the transaction ends, nobody else puts a job of these
/// ordering keys on record, and the last one of each stays.
pub(super) async fn lock_places_in(
    connection: &mut PgConnection,
    subscriptions: &[&str],
    ordering_keys: &[Cow<'_, str>],
) -> Result<(), StoreError> {
    if ordering_keys.is_empty() {
        return Ok(());
    }
    sqlx::query(LOCK_ORDERING_KEYS)
        .bind(subscriptions)
        .bind(ordering_keys)
        .execute(&mut *connection)
        .await?;
    // A last job that ended meanwhile leaves an earlier one to lock.
    loop {
        let locked = sqlx::query_scalar(LOCK_LAST_OF_ORDERING_KEYS)
            .bind(subscriptions)
            .bind(ordering_keys)
            .fetch_one(&mut *connection)
            .await?;
        if locked {
            return Ok(());
        }
    }
}
