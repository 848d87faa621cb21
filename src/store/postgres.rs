//! The tables on Postgres.

mod attempts;
mod claims;
mod dead_letters;
mod endings;
mod ledger;
mod orphans;
mod reading;
mod requests;
mod running;

use std::str::FromStr;
use std::time::Duration;

use async_trait::async_trait;
use sqlx::PgPool;
use sqlx::migrate::Migrator;
use sqlx::postgres::{PgConnectOptions, PgPoolOptions};
use tokio::time::sleep;
use uuid::Uuid;

use super::{
    ClaimTerms, DeadLettersDue, Finish, GivenUp, Reach, Refusal, Refused, Release, SchemaError,
    Standing, Store, StoreError,
};
use crate::job::{
    AttemptRecord, Cancelling, Claim, ClaimRequest, DeadLetter, Fence, Job, JobFilter, JobKey,
    Note, Reaped, Retrying, Story, Told,
};
use crate::retry::Backoff;

/// How long a caller waits for a connection before the database counts as
/// unavailable.
const ACQUIRE_TIMEOUT: Duration = Duration::from_secs(5);

/// No statement or lock wait may keep a worker for long, and no transaction
/// may stay open behind a worker that is gone.
const LIMITS: [(&str, &str); 3] = [
    ("statement_timeout", "15s"),
    ("lock_timeout", "5s"),
    ("idle_in_transaction_session_timeout", "15s"),
];

const RENEWAL_CONNECTIONS: u32 = 3;

/// Pauses before a rolled-back transaction is tried again.
const ROLLED_BACK: (Duration, Duration) = (Duration::from_millis(5), Duration::from_millis(200));
const ROLLED_BACK_TRIES: u32 = 5;

/// [`Store`] on Postgres 14 or newer.
#[derive(Clone)]
pub struct PostgresStore {
    pool: PgPool,
    /// Renewals have a connection of their own, so that no flood of claims
    /// keeps a lease from being renewed. They do not wait for the disk: a
    /// renewal that a crash of the server undoes only ends a lease early.
    renewals: PgPool,
    url: String,
}

impl PostgresStore {
    /// Connects a pool of at most `max_connections`.
    ///
    /// # Errors
    /// [`StoreError::Unavailable`] when no connection can be made.
    pub async fn open(url: &str, max_connections: u32) -> Result<Self, StoreError> {
        let options = PgConnectOptions::from_str(url)?
            .application_name("trainyard")
            .options(LIMITS);
        let pool = PgPoolOptions::new()
            .max_connections(max_connections)
            .acquire_timeout(ACQUIRE_TIMEOUT)
            .connect_with(options.clone())
            .await?;
        let renewals = PgPoolOptions::new()
            // More than one: a connection that has gone silent stays taken.
            .max_connections(RENEWAL_CONNECTIONS)
            .acquire_timeout(ACQUIRE_TIMEOUT)
            .connect_lazy_with(options.clone().options([("synchronous_commit", "off")]));
        Ok(Self {
            pool,
            renewals,
            url: url.to_owned(),
        })
    }
}

/// Tries a transaction again that Postgres rolled back for another's sake
/// (serialization failure, deadlock): nothing of it has happened.
async fn retried<T, F: Future<Output = Result<T, StoreError>>>(
    transaction: impl Fn() -> F,
) -> Result<T, StoreError> {
    let mut backoff = Backoff::new(ROLLED_BACK.0, ROLLED_BACK.1);
    for _ in 1..ROLLED_BACK_TRIES {
        match transaction().await {
            Err(error) if error.was_rolled_back() => sleep(backoff.next_delay()).await,
            answer => return answer,
        }
    }
    transaction().await
}

/// A write, though of nothing: a database that only reads is no use.
const PING: &str = "UPDATE leases SET attempt = attempt WHERE false";

#[async_trait]
impl Store for PostgresStore {
    async fn migrate(&self) -> Result<usize, SchemaError> {
        let migrator = migrator();
        let outstanding = reading::outstanding_migrations(&self.pool, &migrator).await?;
        // Without the limits of the workers' connections.
        let unlimited = PgPoolOptions::new()
            .max_connections(1)
            .connect(&self.url)
            .await?;
        migrator.run(&unlimited).await?;
        unlimited.close().await;
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
        retried(|| claims::claim(&self.pool, requests, terms)).await
    }

    async fn look(&self, key: &JobKey) -> Result<Standing, StoreError> {
        claims::look(&self.pool, key).await
    }

    async fn renew(&self, fences: &[Fence], lease: Duration) -> Result<Vec<bool>, StoreError> {
        retried(|| running::renew(&self.renewals, fences, lease)).await
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
        retried(|| orphans::reap(&self.pool, reach, terms, limit)).await
    }

    async fn save_checkpoint(
        &self,
        fence: &Fence,
        checkpoint: &str,
        acked: bool,
    ) -> Result<bool, StoreError> {
        retried(|| running::save_checkpoint(&self.pool, fence, checkpoint, acked)).await
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
        retried(|| endings::finish(&self.pool, finishes)).await
    }

    async fn release(&self, release: &Release) -> Result<bool, StoreError> {
        retried(|| endings::release(&self.pool, release)).await
    }

    async fn refuse(&self, refusal: &Refusal) -> Result<Refused, StoreError> {
        retried(|| endings::refuse(&self.pool, refusal)).await
    }

    async fn give_up_unknown(
        &self,
        key: &JobKey,
        patience: Duration,
        refusal: &GivenUp,
    ) -> Result<bool, StoreError> {
        retried(|| endings::give_up_unknown(&self.pool, key, patience, refusal)).await
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
        retried(|| dead_letters::dead_letter_settled(&self.pool, letter, worker, detail)).await
    }

    async fn cancel(&self, id: Uuid, by: &str) -> Result<Option<Cancelling>, StoreError> {
        retried(|| requests::cancel(&self.pool, id, by)).await
    }

    async fn retry(&self, id: Uuid, by: &str) -> Result<Option<Retrying>, StoreError> {
        retried(|| requests::retry(&self.pool, id, by)).await
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
    let mut migrator = sqlx::migrate!("migrations/postgres");
    migrator.set_ignore_missing(true);
    migrator
}
