//! The schema: brings it up to date, and checks that it is.

use sqlx::migrate::Migrator;
use sqlx::sqlite::SqlitePool;

use crate::store::{SchemaError, StoreError};

pub(super) async fn migrate(pool: &SqlitePool) -> Result<usize, SchemaError> {
    let migrator = migrator();
    let outstanding = outstanding(pool, &migrator).await?;
    migrator.run(pool).await?;
    Ok(outstanding.unwrap_or_else(|| migrator.iter().count()))
}

pub(super) async fn check(pool: &SqlitePool) -> Result<(), SchemaError> {
    match outstanding(pool, &migrator()).await? {
        None => Err(SchemaError::Missing),
        Some(0) => Ok(()),
        Some(behind) => Err(SchemaError::Old { behind }),
    }
}

/// An empty write, since a read-only database is no use.
const PING: &str = "UPDATE leases SET attempt = attempt WHERE false";

pub(super) async fn ping(pool: &SqlitePool) -> Result<(), StoreError> {
    sqlx::query(PING).execute(pool).await?;
    Ok(())
}

const HAS_MIGRATIONS: &str = "
SELECT EXISTS (SELECT 1 FROM sqlite_master WHERE type = 'table' AND name = '_sqlx_migrations')";
const APPLIED_MIGRATIONS: &str = "SELECT version FROM _sqlx_migrations WHERE success";

/// How many migrations are outstanding; None if none was ever applied.
async fn outstanding(pool: &SqlitePool, migrator: &Migrator) -> Result<Option<usize>, StoreError> {
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
    let mut migrator = sqlx::migrate!("migrations/sqlite");
    migrator.set_ignore_missing(true);
    migrator
}
