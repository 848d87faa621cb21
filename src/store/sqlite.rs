//! The tables on SQLite: one process's own, for development and single
//! machines. Statements have the names and the order of those for Postgres.

mod attempts;
mod claims;
mod dead_letters;
mod endings;
mod ledger;
mod orphans;
mod reading;
mod requests;
mod running;

use std::path::Path;
use std::str::FromStr;
use std::time::Duration;

use async_trait::async_trait;
use sqlx::migrate::Migrator;
use sqlx::sqlite::{
    SqliteConnectOptions, SqliteJournalMode, SqlitePool, SqlitePoolOptions, SqliteSynchronous,
};
use uuid::Uuid;

use super::{
    ClaimTerms, DeadLettersDue, Finish, GivenUp, Missing, Reach, Refusal, Refused, Release,
    SchemaError, Standing, Store, StoreError,
};
use crate::job::{
    AttemptRecord, Cancelling, Claim, ClaimRequest, DeadLetter, Fence, Job, JobFilter, JobKey,
    Note, Reaped, Retrying, Story, Told,
};

/// SQLite has one writer at a time; a few more connections let readers by.
const CONNECTIONS: u32 = 4;

/// How long a writer waits for another before the database counts as busy.
const BUSY_TIMEOUT: Duration = Duration::from_secs(10);

/// [`Store`] on SQLite.
#[derive(Debug, Clone)]
pub struct SqliteStore {
    pool: SqlitePool,
}

impl SqliteStore {
    /// Opens the file that the URL names, making it and its folder if it may.
    ///
    /// # Errors
    /// [`StoreError::Unavailable`] when the file cannot be opened.
    pub async fn open(url: &str, missing: Missing) -> Result<Self, StoreError> {
        let create = missing == Missing::Create;
        let options = SqliteConnectOptions::from_str(url)?
            .create_if_missing(create)
            .journal_mode(SqliteJournalMode::Wal)
            // An acknowledged message must be on the disk.
            .synchronous(SqliteSynchronous::Full)
            .busy_timeout(BUSY_TIMEOUT);
        if let Some(folder) = options.get_filename().parent()
            && create
        {
            create_folder(folder)?;
        }
        let pool = SqlitePoolOptions::new()
            .max_connections(CONNECTIONS)
            .connect_with(options)
            .await
            .map_err(StoreError::Unavailable)?;
        Ok(Self { pool })
    }
}

fn create_folder(folder: &Path) -> Result<(), StoreError> {
    std::fs::create_dir_all(folder).map_err(|error| StoreError::Unavailable(error.into()))
}

/// A write, though of nothing: a database that only reads is no use.
const PING: &str = "UPDATE leases SET attempt = attempt WHERE false";

#[async_trait]
impl Store for SqliteStore {
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

    async fn ping(&self) -> Result<(), StoreError> {
        sqlx::query(PING).execute(&self.pool).await?;
        Ok(())
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
        running::renew(&self.pool, fences, lease).await
    }

    async fn due(&self, reach: &Reach, limit: usize) -> Result<usize, StoreError> {
        orphans::due(&self.pool, reach, limit).await
    }

    async fn know(&self, reach: &Reach) -> Result<(), StoreError> {
        orphans::know(&self.pool, reach).await
    }

    async fn reap(
        &self,
        reach: &Reach,
        terms: &ClaimTerms,
        limit: usize,
    ) -> Result<Vec<Reaped>, StoreError> {
        orphans::reap(&self.pool, reach, terms, limit).await
    }

    async fn save_checkpoint(
        &self,
        fence: &Fence,
        checkpoint: &str,
        acked: bool,
    ) -> Result<bool, StoreError> {
        running::save_checkpoint(&self.pool, fence, checkpoint, acked).await
    }

    async fn keep_attempt(
        &self,
        fence: &Fence,
        worker: &str,
        told: &Told,
    ) -> Result<(), StoreError> {
        attempts::keep_attempt(&self.pool, fence, worker, told).await
    }

    async fn attempts(&self, id: Uuid) -> Result<Vec<AttemptRecord>, StoreError> {
        attempts::attempts(&self.pool, id).await
    }

    async fn cancelled_runs(&self, worker: &str) -> Result<Vec<Uuid>, StoreError> {
        running::cancelled_runs(&self.pool, worker).await
    }

    async fn finish(&self, finishes: &[Finish]) -> Result<Vec<bool>, StoreError> {
        endings::finish(&self.pool, finishes).await
    }

    async fn release(&self, release: &Release) -> Result<bool, StoreError> {
        endings::release(&self.pool, release).await
    }

    async fn refuse(&self, refusal: &Refusal) -> Result<Refused, StoreError> {
        endings::refuse(&self.pool, refusal).await
    }

    async fn give_up_unknown(
        &self,
        key: &JobKey,
        patience: Duration,
        refusal: &GivenUp,
    ) -> Result<bool, StoreError> {
        endings::give_up_unknown(&self.pool, key, patience, refusal).await
    }

    async fn dead_letters(&self, due: &DeadLettersDue) -> Result<Vec<DeadLetter>, StoreError> {
        dead_letters::dead_letters(&self.pool, due).await
    }

    async fn dead_letter_settled(
        &self,
        letter: &DeadLetter,
        worker: &str,
        detail: &str,
    ) -> Result<(), StoreError> {
        dead_letters::dead_letter_settled(&self.pool, letter, worker, detail).await
    }

    async fn cancel(&self, id: Uuid, by: &str) -> Result<Option<Cancelling>, StoreError> {
        requests::cancel(&self.pool, id, by).await
    }

    async fn retry(&self, id: Uuid, by: &str) -> Result<Option<Retrying>, StoreError> {
        requests::retry(&self.pool, id, by).await
    }

    async fn note(&self, worker: &str, notes: &[Note]) -> Result<(), StoreError> {
        ledger::note(&self.pool, worker, notes).await
    }

    async fn purge(&self, retention: Duration, limit: u32) -> Result<u64, StoreError> {
        ledger::purge(&self.pool, retention, limit).await
    }

    async fn stories(&self, message_id: &str) -> Result<Vec<Story>, StoreError> {
        ledger::stories(&self.pool, message_id).await
    }

    async fn jobs(&self, filter: &JobFilter) -> Result<Vec<Job>, StoreError> {
        reading::jobs(&self.pool, filter).await
    }

    async fn job_ids_ending_with(&self, end: &str, limit: u32) -> Result<Vec<Uuid>, StoreError> {
        reading::job_ids_ending_with(&self.pool, end, limit).await
    }

    async fn job(&self, id: Uuid) -> Result<Option<Job>, StoreError> {
        reading::job(&self.pool, id).await
    }
}

/// The migrations, tolerant of newer ones that another version has applied.
fn migrator() -> Migrator {
    let mut migrator = sqlx::migrate!("migrations/sqlite");
    migrator.set_ignore_missing(true);
    migrator
}
