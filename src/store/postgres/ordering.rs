//! Keeps the jobs of an ordering key in order under concurrency.
//!
//! A job may be taken only if no other row of its ordering key has a lower `position`. A
//! row is deleted only when its job ends, so a job that waits for its next attempt or has
//! lost its worker keeps its place. `position` is a sequence, and sequence values do not
//! follow the order of commits: hence the locks.

use std::borrow::Cow;

use super::sessions::Transaction;
use crate::store::StoreError;

/// Of two transactions that insert jobs of one ordering key, the later one must see the
/// rows of the earlier one. Sorted, against deadlocks.
const LOCK_ORDERING_KEYS: &str = "
SELECT pg_advisory_xact_lock(lock) FROM (
    SELECT DISTINCT hashtextextended(subscription || chr(10) || ordering_key, 0) AS lock
    FROM unnest($1::text[], $2::text[]) AS request (subscription, ordering_key)
    ORDER BY lock
) AS locks";

/// Keeps the last job of each ordering key in the queue until this transaction ends.
/// Whoever deletes it later then sees the job behind it, and the deletion's trigger lets
/// that job run. KEY SHARE does not block renewals.
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

/// Until the transaction ends, nobody else inserts a job of these ordering keys, and the
/// last job of each stays.
pub(super) async fn lock_places_in(
    transaction: &mut Transaction,
    subscriptions: &[&str],
    ordering_keys: &[Cow<'_, str>],
) -> Result<(), StoreError> {
    if ordering_keys.is_empty() {
        return Ok(());
    }
    sqlx::query(LOCK_ORDERING_KEYS)
        .bind(subscriptions)
        .bind(ordering_keys)
        .execute(&mut *transaction)
        .await?;
    // If a last job ended meanwhile, an earlier one must be locked instead.
    loop {
        let locked = sqlx::query_scalar(LOCK_LAST_OF_ORDERING_KEYS)
            .bind(subscriptions)
            .bind(ordering_keys)
            .fetch_one(&mut *transaction)
            .await?;
        if locked {
            return Ok(());
        }
    }
}
