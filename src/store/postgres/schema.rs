//! The schema: brings it up to date, and checks that it is.

use std::time::Duration;

use sqlx::migrate::{MigrateError, Migrator};
use sqlx::{AssertSqlSafe, Connection, PgConnection, PgPool};
use tokio::time::{Instant, sleep};

use crate::retry::Backoff;
use crate::store::{SchemaError, StoreError, Waiting};

/// A migration that waits for a lock blocks everyone behind it, renewals too. So it waits
/// briefly, then pauses to let the others go on, and tries again. A migration without a
/// transaction builds an index concurrently, and may wait without limit.
const LOCK_TIMEOUT: &str = "SET lock_timeout = '1s'";
const NO_LOCK_TIMEOUT: &str = "SET lock_timeout = 0";
const PAUSE: (Duration, Duration) = (Duration::from_secs(1), Duration::from_secs(5));
/// After this, a person has to look.
const PATIENCE: Duration = Duration::from_secs(600);

/// <https://www.postgresql.org/docs/current/errcodes-appendix.html>
const LOCK_NOT_AVAILABLE: &str = "55P03";
const DEADLOCK_DETECTED: &str = "40P01";

pub(super) async fn migrate(
    pool: &PgPool,
    url: &str,
    waiting: Waiting,
) -> Result<usize, SchemaError> {
    require(pool).await?;
    let migrator = migrator();
    let outstanding = outstanding(pool, &migrator).await?;
    // Without the limits of the workers' connections.
    let options = super::connect_options(url)?.application_name("trainyard migrate");
    let mut give_up = Instant::now() + PATIENCE;
    let mut backoff = Backoff::new(PAUSE.0, PAUSE.1);
    loop {
        let mut connection = PgConnection::connect_with(&options).await?;
        let migrated = migrate_alone(&migrator, &mut connection).await;
        // Closing also releases the locks. If it fails, the connection is gone.
        let _ = connection.close().await;
        match migrated? {
            Migrated::UpToDate => {
                return Ok(outstanding.unwrap_or_else(|| migrator.iter().count()));
            }
            Migrated::LockedOut(error) if Instant::now() > give_up => return Err(error.into()),
            Migrated::LockedOut(_) => {}
            Migrated::Elsewhere => give_up = Instant::now() + PATIENCE,
        }
        waiting(&holders(pool).await?);
        sleep(backoff.next_ceiling()).await;
    }
}

enum Migrated {
    UpToDate,
    /// Another session migrates. It may take long: an index is built over all jobs.
    Elsewhere,
    /// Another session has a lock. What was applied before stays.
    LockedOut(MigrateError),
}

/// Only one session migrates at a time. Asks without waiting: a session that waits inside
/// a statement has a snapshot, and a concurrent index build waits for all older ones.
const TRY_LOCK: &str = "SELECT pg_try_advisory_lock(hashtextextended('trainyard migrate', 0))";

async fn migrate_alone(
    migrator: &Migrator,
    connection: &mut PgConnection,
) -> Result<Migrated, MigrateError> {
    let alone: bool = sqlx::query_scalar(TRY_LOCK)
        .fetch_one(&mut *connection)
        .await?;
    if !alone {
        return Ok(Migrated::Elsewhere);
    }
    match apply(migrator, connection).await {
        Ok(()) => Ok(Migrated::UpToDate),
        Err(error) if is_locked_out(&error) => Ok(Migrated::LockedOut(error)),
        Err(error) => Err(error),
    }
}

/// Applies migrations one by one, each with its own patience for locks.
async fn apply(migrator: &Migrator, connection: &mut PgConnection) -> Result<(), MigrateError> {
    drop_invalid_indexes(connection).await?;
    for migration in migrator.iter() {
        let patience = match migration.no_tx {
            true => NO_LOCK_TIMEOUT,
            false => LOCK_TIMEOUT,
        };
        sqlx::query(patience).execute(&mut *connection).await?;
        let version = Some(migration.version);
        migrator
            .run_direct(version, &mut *connection, false)
            .await?;
    }
    Ok(())
}

const INVALID_INDEXES: &str = "
SELECT format('DROP INDEX CONCURRENTLY IF EXISTS %s', indexrelid::regclass) FROM pg_index
WHERE NOT indisvalid AND indrelid = to_regclass('processed_messages')";

/// Drops the invalid indexes that an interrupted build has left.
async fn drop_invalid_indexes(connection: &mut PgConnection) -> Result<(), sqlx::Error> {
    let drops: Vec<String> = sqlx::query_scalar(INVALID_INDEXES)
        .fetch_all(&mut *connection)
        .await?;
    for drop in drops {
        sqlx::query(AssertSqlSafe(drop))
            .execute(&mut *connection)
            .await?;
    }
    Ok(())
}

fn is_locked_out(error: &MigrateError) -> bool {
    let error = match error {
        MigrateError::Execute(error) | MigrateError::ExecuteMigration(error, _) => error,
        _ => return false,
    };
    let code = error.as_database_error().and_then(|error| error.code());
    matches!(
        code.as_deref(),
        Some(LOCK_NOT_AVAILABLE | DEADLOCK_DETECTED)
    )
}

const HOLDERS: &str = "
SELECT coalesce(string_agg(DISTINCT format(
           'process %s (%s, %s, since %s)', activity.pid, activity.usename,
           coalesce(nullif(activity.application_name, ''), 'unnamed'),
           to_char(coalesce(activity.xact_start, activity.backend_start), 'HH24:MI:SS')), '; '), 'somebody who has gone')
FROM pg_locks locks JOIN pg_stat_activity activity USING (pid)
WHERE locks.granted AND activity.pid <> pg_backend_pid()
  AND (locks.relation IN (to_regclass('leases'), to_regclass('processed_messages'))
           AND activity.xact_start < now() - interval '1 second'
       OR locks.locktype = 'advisory' AND activity.application_name = 'trainyard migrate'
           AND activity.datname = current_database())";

/// The sessions that are in the way, for people.
async fn holders(pool: &PgPool) -> Result<String, StoreError> {
    Ok(sqlx::query_scalar(HOLDERS).fetch_one(pool).await?)
}

const FACTS: &str = "
SELECT current_setting('server_version_num')::int, current_setting('server_version'),
       current_setting('server_encoding')";

const OLDEST_VERSION: i32 = 140_000;

/// A message may have any character, and a database that refuses one would bring the message
/// back for ever.
async fn require(pool: &PgPool) -> Result<(), SchemaError> {
    let facts: (i32, String, String) = sqlx::query_as(FACTS).fetch_one(pool).await?;
    let (number, version, encoding) = facts;
    if number < OLDEST_VERSION {
        return Err(SchemaError::Unfit(format!(
            "the server is PostgreSQL {version}; 14 is the oldest that will do"
        )));
    }
    if encoding != "UTF8" {
        return Err(SchemaError::Unfit(format!(
            "its encoding is {encoding}, and a message may have any character; make one with `CREATE DATABASE name TEMPLATE template0 ENCODING 'UTF8'`"
        )));
    }
    Ok(())
}

pub(super) async fn check(pool: &PgPool) -> Result<(), SchemaError> {
    require(pool).await?;
    match outstanding(pool, &migrator()).await? {
        None => Err(SchemaError::Missing),
        Some(0) => Ok(()),
        Some(behind) => Err(SchemaError::Old { behind }),
    }
}

/// An empty write, since a read-only database is no use.
const PING: &str = "UPDATE leases SET attempt = attempt WHERE false";

pub(super) async fn ping(pool: &PgPool) -> Result<(), StoreError> {
    sqlx::query(PING).execute(pool).await?;
    Ok(())
}

const HAS_MIGRATIONS: &str = "SELECT to_regclass('_sqlx_migrations') IS NOT NULL";
const APPLIED_MIGRATIONS: &str = "SELECT version FROM _sqlx_migrations WHERE success";

/// How many migrations are outstanding; None if none was ever applied.
async fn outstanding(pool: &PgPool, migrator: &Migrator) -> Result<Option<usize>, StoreError> {
    if !sqlx::query_scalar(HAS_MIGRATIONS).fetch_one(pool).await? {
        return Ok(None);
    }
    let applied: Vec<i64> = sqlx::query_scalar(APPLIED_MIGRATIONS)
        .fetch_all(pool)
        .await?;
    let outstanding = migrator
        .iter()
        .filter(|migration| !applied.contains(&migration.version));
    Ok(Some(outstanding.count()))
}

/// The migrations; ignores newer ones that another version has applied.
fn migrator() -> Migrator {
    let mut migrator = sqlx::migrate!("migrations/postgres");
    migrator.set_ignore_missing(true);
    migrator
}
