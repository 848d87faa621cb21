//! The tables on Postgres.

mod claims;
mod reading;

use std::str::FromStr;
use std::time::Duration;

use async_trait::async_trait;
use sqlx::PgPool;
use sqlx::migrate::Migrator;
use sqlx::postgres::{PgConnectOptions, PgPoolOptions};
use uuid::Uuid;

use super::{ClaimTerms, Refusal, Refused, SchemaError, Standing, Store, StoreError};
use crate::job::{Claim, ClaimRequest, Fence, Job, JobFilter, JobKey};
use crate::outcome::Ending;

/// How long a caller waits for a connection before the database counts as
/// unavailable.
const ACQUIRE_TIMEOUT: Duration = Duration::from_secs(5);

/// [`Store`] on Postgres 14 or newer.
#[derive(Debug, Clone)]
pub struct PostgresStore {
    pool: PgPool,
}

impl PostgresStore {
    /// Connects a pool of at most `max_connections`.
    ///
    /// # Errors
    /// [`StoreError::Unavailable`] when no connection can be made.
    pub async fn open(url: &str, max_connections: u32) -> Result<Self, StoreError> {
        let options = PgConnectOptions::from_str(url)?.application_name("trainyard");
        let pool = PgPoolOptions::new()
            .max_connections(max_connections)
            .acquire_timeout(ACQUIRE_TIMEOUT)
            .connect_with(options)
            .await?;
        Ok(Self { pool })
    }
}

#[async_trait]
impl Store for PostgresStore {
    async fn migrate(&self) -> Result<usize, SchemaError> {
        let migrator = migrator();
        let outstanding = reading::outstanding_migrations(&self.pool, &migrator).await?;
        migrator.run(&self.pool).await?;
        Ok(outstanding.unwrap_or_else(|| migrator.iter().count()))
    }

    async fn check_schema(&self) -> Result<(), SchemaError> {
        match reading::outstanding_migrations(&self.pool, &migrator()).await? {
            None => Err(SchemaError::Missing),
            Some(0) => Ok(()),
            Some(behind) => Err(SchemaError::Old { behind }),
        }
    }

    async fn claim(
        &self,
        requests: &[ClaimRequest],
        terms: &ClaimTerms,
    ) -> Result<Vec<Claim>, StoreError> {
        claims::claim(&self.pool, requests, terms).await
    }

    async fn look(&self, key: &JobKey) -> Result<Standing, StoreError> {
        claims::look(&self.pool, key).await
    }

    async fn renew(&self, fences: &[Fence], lease: Duration) -> Result<Vec<bool>, StoreError> {
        claims::renew(&self.pool, fences, lease).await
    }

    async fn finish(&self, fence: &Fence, ending: &Ending) -> Result<bool, StoreError> {
        claims::finish(&self.pool, fence, ending).await
    }

    async fn release(&self, fence: &Fence) -> Result<bool, StoreError> {
        claims::release(&self.pool, fence).await
    }

    async fn refuse(&self, refusal: &Refusal) -> Result<Refused, StoreError> {
        claims::refuse(&self.pool, refusal).await
    }

    async fn jobs(&self, filter: &JobFilter) -> Result<Vec<Job>, StoreError> {
        reading::jobs(&self.pool, filter).await
    }

    async fn job(&self, id: Uuid) -> Result<Option<Job>, StoreError> {
        reading::job(&self.pool, id).await
    }
}

/// The migrations, tolerant of newer ones that another version has applied.
fn migrator() -> Migrator {
    let mut migrator = sqlx::migrate!("migrations/postgres");
    migrator.set_ignore_missing(true);
    migrator
}
