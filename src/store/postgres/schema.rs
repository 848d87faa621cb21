//! The schema: brings it up to date, and checks that it is.

use std::collections::HashMap;
use std::time::Duration;

use sqlx::migrate::{MigrateError, Migration, Migrator};
use sqlx::{AssertSqlSafe, Executor, Postgres, SqlSafeStr};
use tokio::time::{Instant, sleep};

use super::sessions::{Sessions, Transaction, pool_of};
use crate::retry::Backoff;
use crate::store::{SchemaError, StoreError, Waiting};

/// An index may take long to build, and waits for every transaction before it.
const NO_LIMITS: [(&str, &str); 3] = [
    ("statement_timeout", "0"),
    ("lock_timeout", "0"),
    ("idle_in_transaction_session_timeout", "0"),
];

/// What people see in the server's list of sessions.
const MIGRATES: &str = "trainyard migrate";

/// One for the lock, one for the migrations.
const CONNECTIONS: u32 = 2;
/// No message waits for these connections, and a migration that fails needs a person.
const CONNECTING: Duration = Duration::from_secs(60);

/// A migration that waits for a lock blocks everyone behind it, renewals too. So it waits
/// briefly, then pauses to let the others go on, and tries again. A migration without a
/// transaction builds an index concurrently, and may wait without limit.
const LOCK_TIMEOUT: &str = "SET LOCAL lock_timeout = '1s'";
const PAUSE: (Duration, Duration) = (Duration::from_secs(1), Duration::from_secs(5));
/// After this, a person has to look.
const PATIENCE: Duration = Duration::from_secs(600);

/// <https://www.postgresql.org/docs/current/errcodes-appendix.html>
const LOCK_NOT_AVAILABLE: &str = "55P03";
const DEADLOCK_DETECTED: &str = "40P01";

pub(super) async fn migrate(
    sessions: &Sessions,
    url: &str,
    waiting: Waiting,
) -> Result<usize, SchemaError> {
    require(sessions).await?;
    let migrator = migrator();
    let outstanding = outstanding(sessions, &migrator).await?;
    let options = super::connect_options(url)?.application_name(MIGRATES);
    let pool = pool_of(CONNECTIONS, CONNECTING);
    let unlimited = Sessions::with_settings(&options, pool, sessions.pooler(), &NO_LIMITS);
    let mut give_up = Instant::now() + PATIENCE;
    let mut backoff = Backoff::new(PAUSE.0, PAUSE.1);
    loop {
        match migrate_alone(&migrator, &unlimited).await? {
            Migrated::UpToDate => {
                return Ok(outstanding.unwrap_or_else(|| migrator.iter().count()));
            }
            Migrated::LockedOut(error) if Instant::now() > give_up => return Err(error.into()),
            Migrated::LockedOut(_) => {}
            Migrated::Elsewhere => give_up = Instant::now() + PATIENCE,
        }
        waiting(&holders(sessions).await?);
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
const TRY_LOCK: &str = "SELECT pg_try_advisory_xact_lock(hashtextextended('trainyard migrate', 0))";

/// The lock is held by a transaction beside the migrations', since an index cannot be built
/// in one, and a pooler would let a session's lock outlive its owner.
async fn migrate_alone(migrator: &Migrator, sessions: &Sessions) -> Result<Migrated, MigrateError> {
    let mut lock = sessions.begin().await?;
    let alone: bool = sqlx::query_scalar(TRY_LOCK).fetch_one(&mut lock).await?;
    if !alone {
        lock.rollback().await?;
        return Ok(Migrated::Elsewhere);
    }
    let applied = apply(migrator, sessions, &mut lock).await;
    // If it fails, the connection is gone, and the lock with it.
    let _ = lock.rollback().await;
    match applied {
        Ok(()) => Ok(Migrated::UpToDate),
        Err(error) if is_locked_out(&error) => Ok(Migrated::LockedOut(error)),
        Err(error) => Err(error),
    }
}

/// As the driver's own migrator makes it.
const RECORD: &str = "
CREATE TABLE IF NOT EXISTS _sqlx_migrations (
    version BIGINT PRIMARY KEY,
    description TEXT NOT NULL,
    installed_on TIMESTAMPTZ NOT NULL DEFAULT now(),
    success BOOLEAN NOT NULL,
    checksum BYTEA NOT NULL,
    execution_time BIGINT NOT NULL
)";

const RECORDED: &str = "SELECT version, checksum FROM _sqlx_migrations WHERE success";

/// Applies the outstanding migrations one by one, each with its own patience for locks. The
/// driver's migrator would prepare named statements, which a pooler mixes up.
async fn apply(
    migrator: &Migrator,
    sessions: &Sessions,
    lock: &mut Transaction,
) -> Result<(), MigrateError> {
    sessions.execute(RECORD).await?;
    drop_invalid_indexes(sessions).await?;
    let recorded: Vec<(i64, Vec<u8>)> = sqlx::query_as(RECORDED).fetch_all(sessions).await?;
    let recorded: HashMap<i64, Vec<u8>> = recorded.into_iter().collect();
    for migration in migrator.iter() {
        match recorded.get(&migration.version) {
            Some(checksum) if **checksum == *migration.checksum => continue,
            Some(_) => return Err(MigrateError::VersionMismatch(migration.version)),
            None => {}
        }
        // Fails if the lock is gone.
        lock.execute("SELECT 1").await?;
        let applied = match migration.no_tx {
            true => apply_alone(sessions, migration).await,
            false => apply_in_transaction(sessions, migration).await,
        };
        applied.map_err(|error| MigrateError::ExecuteMigration(error, migration.version))?;
    }
    Ok(())
}

async fn apply_alone(sessions: &Sessions, migration: &Migration) -> Result<(), sqlx::Error> {
    sessions.execute_alone(migration.sql.clone()).await?;
    record(sessions, migration).await
}

async fn apply_in_transaction(
    sessions: &Sessions,
    migration: &Migration,
) -> Result<(), sqlx::Error> {
    let mut transaction = sessions.begin().await?;
    transaction.execute(LOCK_TIMEOUT).await?;
    transaction.execute(migration.sql.clone()).await?;
    record(&mut transaction, migration).await?;
    transaction.commit().await
}

const APPLIED: &str = "
INSERT INTO _sqlx_migrations (version, description, success, checksum, execution_time)
VALUES ($1, $2, true, $3, -1)";

async fn record(
    executor: impl Executor<'_, Database = Postgres>,
    migration: &Migration,
) -> Result<(), sqlx::Error> {
    sqlx::query(APPLIED)
        .bind(migration.version)
        .bind(&*migration.description)
        .bind(&*migration.checksum)
        .execute(executor)
        .await?;
    Ok(())
}

const INVALID_INDEXES: &str = "
SELECT format('DROP INDEX CONCURRENTLY IF EXISTS %s', indexrelid::regclass) FROM pg_index
WHERE NOT indisvalid AND indrelid = to_regclass('processed_messages')";

/// Drops the invalid indexes that an interrupted build has left.
async fn drop_invalid_indexes(sessions: &Sessions) -> Result<(), sqlx::Error> {
    let drops: Vec<String> = sqlx::query_scalar(INVALID_INDEXES)
        .fetch_all(sessions)
        .await?;
    for drop in drops {
        let drop = AssertSqlSafe(drop).into_sql_str();
        sessions.execute_alone(drop).await?;
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
async fn holders(sessions: &Sessions) -> Result<String, StoreError> {
    Ok(sqlx::query_scalar(HOLDERS).fetch_one(sessions).await?)
}

const FACTS: &str = "
SELECT current_setting('server_version_num')::int, current_setting('server_version'),
       current_setting('server_encoding')";

const OLDEST_VERSION: i32 = 140_000;

/// A message may have any character, and a database that refuses one would bring the message
/// back for ever.
async fn require(sessions: &Sessions) -> Result<(), SchemaError> {
    let facts: (i32, String, String) = sqlx::query_as(FACTS).fetch_one(sessions).await?;
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

pub(super) async fn check(sessions: &Sessions) -> Result<(), SchemaError> {
    require(sessions).await?;
    match outstanding(sessions, &migrator()).await? {
        None => Err(SchemaError::Missing),
        Some(0) => Ok(()),
        Some(behind) => Err(SchemaError::Old { behind }),
    }
}

/// An empty write, since a read-only database is no use.
const PING: &str = "UPDATE leases SET attempt = attempt WHERE false";

pub(super) async fn ping(sessions: &Sessions) -> Result<(), StoreError> {
    sqlx::query(PING).execute(sessions).await?;
    Ok(())
}

const HAS_MIGRATIONS: &str = "SELECT to_regclass('_sqlx_migrations') IS NOT NULL";
const APPLIED_MIGRATIONS: &str = "SELECT version FROM _sqlx_migrations WHERE success";

/// How many migrations are outstanding; None if none was ever applied.
async fn outstanding(
    sessions: &Sessions,
    migrator: &Migrator,
) -> Result<Option<usize>, StoreError> {
    if !sqlx::query_scalar(HAS_MIGRATIONS)
        .fetch_one(sessions)
        .await?
    {
        return Ok(None);
    }
    let applied: Vec<i64> = sqlx::query_scalar(APPLIED_MIGRATIONS)
        .fetch_all(sessions)
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
