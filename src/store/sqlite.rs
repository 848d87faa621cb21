//! The tables on SQLite: for the workers of one machine, and for development.
//! Statements have the same names and order as those for Postgres.

mod claims;
mod dead_letters;
mod death;
mod endings;
mod entry;
mod ledger;
mod queue;
mod requests;
mod running;
mod schema;
mod takeover;

use std::path::Path;
use std::str::FromStr;
use std::time::Duration;

use async_trait::async_trait;
use sqlx::sqlite::{
    SqliteConnectOptions, SqliteConnection, SqliteJournalMode, SqlitePool, SqlitePoolOptions,
    SqliteSynchronous,
};
use sqlx::{Connection, Sqlite};
use uuid::Uuid;

use super::reading::Reading;
use super::{
    ClaimTerms, Claims, DeadLetterBox, DeadLettersDue, Finish, Finished, GivenUp, Missing,
    Patience, Queue, Reach, Refusal, Refused, Release, Requests, Schema, SchemaError, Standing,
    StoreError, UnknownJob, Waiting,
};
use crate::job::{Claim, ClaimRequest, DeadLetter, DueJob, Fence, JobKey, Pick, Renewal, Taken};
use crate::record::{AttemptReport, Cancelling, Note, Retrying};

/// Takes the write lock at once: a transaction that began with a read cannot become a
/// writer after another one's commit.
const BEGIN: &str = "BEGIN IMMEDIATE";

/// SQLite has one writer at a time; the other connections are for readers.
const CONNECTIONS: u32 = 4;

/// How long a writer waits for another before the database counts as busy.
const BUSY_TIMEOUT: Duration = Duration::from_secs(10);

/// [`super::Store`] on SQLite.
#[derive(Debug, Clone)]
pub struct SqliteStore {
    pool: SqlitePool,
}

impl SqliteStore {
    /// Opens the file that the URL names; creates it and its folder if `missing` allows
    /// it.
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
            .after_release(|connection, _| Box::pin(is_out_of_transactions(connection)))
            .connect_with(options)
            .await
            .map_err(StoreError::Unavailable)?;
        Ok(Self { pool })
    }
}

/// SQLite ends a transaction by itself if the disk is full or fails, and then the driver's
/// rollback fails. The driver counts that transaction as open for ever, so such a
/// connection must not be used again.
/// <https://www.sqlite.org/lang_transaction.html#response_to_errors_within_a_transaction>
async fn is_out_of_transactions(connection: &mut SqliteConnection) -> sqlx::Result<bool> {
    // Answers after the rollback of a dropped transaction.
    connection.ping().await?;
    Ok(!connection.is_in_transaction())
}

fn create_folder(folder: &Path) -> Result<(), StoreError> {
    std::fs::create_dir_all(folder).map_err(|error| StoreError::Unavailable(error.into()))
}

impl Reading for SqliteStore {
    type Database = Sqlite;
    type Source = SqlitePool;

    fn source(&self) -> &SqlitePool {
        &self.pool
    }
}

fn milliseconds(duration: Duration) -> i64 {
    i64::try_from(duration.as_millis()).unwrap_or(i64::MAX / 2)
}

#[async_trait]
impl Schema for SqliteStore {
    async fn migrate(&self, _waiting: Waiting) -> Result<usize, SchemaError> {
        schema::migrate(&self.pool).await
    }

    async fn check_schema(&self) -> Result<(), SchemaError> {
        schema::check(&self.pool).await
    }

    fn uses_this_machines_clock(&self) -> bool {
        true
    }

    async fn ping(&self) -> Result<(), StoreError> {
        schema::ping(&self.pool).await
    }
}

#[async_trait]
impl Claims for SqliteStore {
    async fn claim(
        &self,
        requests: &[ClaimRequest],
        terms: &ClaimTerms,
    ) -> Result<Vec<Claim>, StoreError> {
        claims::claim(&self.pool, requests, terms).await
    }

    async fn renew(&self, fences: &[Fence], lease: Duration) -> Result<Vec<Renewal>, StoreError> {
        running::renew(&self.pool, fences, lease).await
    }

    async fn cancelled_runs(&self, worker: &str) -> Result<Vec<Uuid>, StoreError> {
        running::cancelled_runs(&self.pool, worker).await
    }

    async fn save_checkpoint(
        &self,
        fence: &Fence,
        checkpoint: &str,
        acked: bool,
    ) -> Result<bool, StoreError> {
        running::save_checkpoint(&self.pool, fence, checkpoint, acked).await
    }

    async fn finish(&self, finishes: &[Finish]) -> Result<Vec<Finished>, StoreError> {
        endings::finish(&self.pool, finishes).await
    }

    async fn release(&self, release: &Release) -> Result<bool, StoreError> {
        endings::release(&self.pool, release).await
    }

    async fn disown(&self, claims: &[(JobKey, Uuid)]) -> Result<(), StoreError> {
        endings::disown(&self.pool, claims).await
    }

    async fn refuse(&self, refusal: &Refusal) -> Result<Refused, StoreError> {
        endings::refuse(&self.pool, refusal).await
    }
}

#[async_trait]
impl Queue for SqliteStore {
    async fn due(&self, reach: &Reach, limit: u32) -> Result<Vec<DueJob>, StoreError> {
        queue::due(&self.pool, reach, limit).await
    }

    async fn take(&self, picks: &[Pick], terms: &ClaimTerms) -> Result<Vec<Taken>, StoreError> {
        queue::take(&self.pool, picks, terms).await
    }

    async fn look(&self, keys: &[JobKey]) -> Result<Vec<Standing>, StoreError> {
        queue::look(&self.pool, keys).await
    }

    async fn offer(&self, keys: &[JobKey]) -> Result<(), StoreError> {
        queue::offer(&self.pool, keys).await
    }

    async fn know(&self, reach: &Reach) -> Result<(), StoreError> {
        queue::know(&self.pool, reach).await
    }

    async fn unknown(
        &self,
        subscriptions: &[&str],
        patience: Patience,
        limit: u32,
    ) -> Result<Vec<UnknownJob>, StoreError> {
        queue::unknown(&self.pool, subscriptions, patience, limit).await
    }

    async fn give_up_unknown(
        &self,
        unknown: &[GivenUp],
        patience: Patience,
    ) -> Result<Vec<JobKey>, StoreError> {
        queue::give_up_unknown(&self.pool, unknown, patience).await
    }
}

#[async_trait]
impl Requests for SqliteStore {
    async fn cancel(&self, id: Uuid, by: &str) -> Result<Option<Cancelling>, StoreError> {
        requests::cancel(&self.pool, id, by).await
    }

    async fn retry(&self, id: Uuid, by: &str) -> Result<Option<Retrying>, StoreError> {
        requests::retry(&self.pool, id, by).await
    }

    async fn note(&self, worker: &str, notes: &[Note]) -> Result<(), StoreError> {
        ledger::note(&self.pool, worker, notes).await
    }

    async fn record_attempt(
        &self,
        fence: &Fence,
        worker: &str,
        report: &AttemptReport,
    ) -> Result<(), StoreError> {
        ledger::record_attempt(&self.pool, fence, worker, report).await
    }

    async fn purge(&self, retention: Duration, limit: u32) -> Result<u64, StoreError> {
        ledger::purge(&self.pool, retention, limit).await
    }
}

#[async_trait]
impl DeadLetterBox for SqliteStore {
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
}
