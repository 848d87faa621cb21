//! The tables on Postgres.

mod claims;
mod columns;
mod dead_letters;
mod endings;
mod ledger;
mod ordering;
mod queue;
mod requests;
mod running;
mod schema;
mod takeover;

use std::str::FromStr;
use std::time::Duration;

use async_trait::async_trait;
use sqlx::postgres::{PgConnectOptions, PgPoolOptions};
use sqlx::{Connection, PgConnection, PgPool, Postgres};
use tokio::time::{sleep, timeout};
use uuid::Uuid;

use super::reading::Pooled;
use super::{
    ClaimTerms, Claims, DeadLetterBox, DeadLettersDue, Finish, Finished, GivenUp, Queue, Reach,
    Refusal, Refused, Release, Requests, Schema, SchemaError, Standing, StoreError, Waiting,
};
use crate::database_url;
use crate::job::{Claim, ClaimRequest, DeadLetter, DueJob, Fence, JobKey, Pick, Renewal, Taken};
use crate::record::{AttemptReport, Cancelling, Note, Retrying};
use crate::retry::Backoff;

/// How long a caller waits for a connection before the database counts as
/// unavailable.
const ACQUIRE_TIMEOUT: Duration = Duration::from_secs(5);

/// A released connection must answer a ping within this time, or it is closed. A failover
/// may leave no other sign, and a dead connection would occupy its place in the pool
/// until TCP gives up.
const SILENCE: Duration = Duration::from_secs(5);

/// No statement or lock wait may block a worker for long, and no transaction may stay
/// open after its worker is gone. The server ends the session of a vanished machine
/// within half a minute.
const LIMITS: [(&str, &str); 7] = [
    // Compiling a plan takes longer than these statements.
    ("jit", "off"),
    ("statement_timeout", "15s"),
    ("lock_timeout", "5s"),
    ("idle_in_transaction_session_timeout", "15s"),
    ("tcp_keepalives_idle", "15"),
    ("tcp_keepalives_interval", "5"),
    ("tcp_keepalives_count", "3"),
];

/// More than one, since a dead connection keeps its place until it is detected.
const RENEWAL_CONNECTIONS: u32 = 3;

/// Pauses before a rolled-back transaction is tried again.
const ROLLED_BACK: (Duration, Duration) = (Duration::from_millis(5), Duration::from_millis(200));
const ROLLED_BACK_TRIES: u32 = 5;

/// [`super::Store`] on Postgres 14 or newer.
#[derive(Clone)]
pub struct PostgresStore {
    pool: PgPool,
    /// Renewals have their own connections, so that a flood of claims does not delay
    /// them. They commit asynchronously: if the server crashes and loses one, a lease
    /// only ends early.
    renewals: PgPool,
    url: String,
}

impl PostgresStore {
    /// Connects a pool of at most `max_connections`.
    ///
    /// # Errors
    /// [`StoreError::Unavailable`] when no connection can be made.
    pub async fn open(url: &str, max_connections: u32) -> Result<Self, StoreError> {
        let plain = connect_options(url)?;
        let options = plain.application_name("trainyard").options(LIMITS);
        let pool = pool_of(max_connections).connect_with(options.clone()).await;
        let pool = match pool {
            Err(sqlx::Error::PoolTimedOut) => return Err(why_unreachable(&options).await),
            connected => connected?,
        };
        let renewals = pool_of(RENEWAL_CONNECTIONS)
            .connect_lazy_with(options.clone().options([("synchronous_commit", "off")]));
        Ok(Self {
            pool,
            renewals,
            url: url.to_owned(),
        })
    }
}

fn connect_options(url: &str) -> Result<PgConnectOptions, StoreError> {
    let options = PgConnectOptions::from_str(&database_url::for_driver(url))?;
    // The driver would look up the brackets of an IPv6 address.
    let address = options.get_host().strip_prefix('[');
    let address = address.and_then(|address| address.strip_suffix(']'));
    let address = address.map(str::to_owned);
    Ok(match address {
        Some(address) => options.host(&address),
        None => options,
    })
}

/// The pool tries again while the server refuses connections, and in the end does not tell.
async fn why_unreachable(options: &PgConnectOptions) -> StoreError {
    let connecting = PgConnection::connect_with(options);
    match timeout(ACQUIRE_TIMEOUT, connecting).await {
        Ok(Err(error)) => error.into(),
        Ok(Ok(_)) | Err(_) => sqlx::Error::PoolTimedOut.into(),
    }
}

fn pool_of(connections: u32) -> PgPoolOptions {
    PgPoolOptions::new()
        .max_connections(connections)
        .acquire_timeout(ACQUIRE_TIMEOUT)
        .after_release(|connection, _| {
            Box::pin(async move {
                let answer = timeout(SILENCE, connection.ping()).await;
                answer.unwrap_or(Err(sqlx::Error::PoolTimedOut))?;
                Ok(true)
            })
        })
}

impl Pooled for PostgresStore {
    type Database = Postgres;

    fn pool(&self) -> &PgPool {
        &self.pool
    }
}

/// Retries a transaction that Postgres rolled back because of another one (serialization
/// failure, deadlock). Nothing of it has happened.
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

#[async_trait]
impl Schema for PostgresStore {
    async fn migrate(&self, waiting: Waiting) -> Result<usize, SchemaError> {
        schema::migrate(&self.pool, &self.url, waiting).await
    }

    async fn check_schema(&self) -> Result<(), SchemaError> {
        schema::check(&self.pool).await
    }

    fn uses_this_machines_clock(&self) -> bool {
        false
    }

    async fn ping(&self) -> Result<(), StoreError> {
        schema::ping(&self.pool).await
    }
}

#[async_trait]
impl Claims for PostgresStore {
    async fn claim(
        &self,
        requests: &[ClaimRequest],
        terms: &ClaimTerms,
    ) -> Result<Vec<Claim>, StoreError> {
        retried(|| claims::claim(&self.pool, requests, terms)).await
    }

    async fn renew(&self, fences: &[Fence], lease: Duration) -> Result<Vec<Renewal>, StoreError> {
        retried(|| running::renew(&self.renewals, fences, lease)).await
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
        retried(|| running::save_checkpoint(&self.pool, fence, checkpoint, acked)).await
    }

    async fn finish(&self, finishes: &[Finish]) -> Result<Vec<Finished>, StoreError> {
        retried(|| endings::finish(&self.pool, finishes)).await
    }

    async fn release(&self, release: &Release) -> Result<bool, StoreError> {
        retried(|| endings::release(&self.pool, release)).await
    }

    async fn disown(&self, claims: &[(JobKey, Uuid)]) -> Result<(), StoreError> {
        retried(|| endings::disown(&self.pool, claims)).await
    }

    async fn refuse(&self, refusal: &Refusal) -> Result<Refused, StoreError> {
        retried(|| endings::refuse(&self.pool, refusal)).await
    }
}

#[async_trait]
impl Queue for PostgresStore {
    async fn due(&self, reach: &Reach, limit: u32) -> Result<Vec<DueJob>, StoreError> {
        queue::due(&self.pool, reach, limit).await
    }

    async fn take(&self, picks: &[Pick], terms: &ClaimTerms) -> Result<Vec<Taken>, StoreError> {
        retried(|| queue::take(&self.pool, picks, terms)).await
    }

    async fn look(&self, keys: &[JobKey]) -> Result<Vec<Standing>, StoreError> {
        queue::look(&self.pool, keys).await
    }

    async fn offer(&self, keys: &[JobKey]) -> Result<(), StoreError> {
        retried(|| queue::offer(&self.pool, keys)).await
    }

    async fn know(&self, reach: &Reach) -> Result<(), StoreError> {
        queue::know(&self.pool, reach).await
    }

    async fn give_up_unknown(
        &self,
        unknown: &[GivenUp],
        patience: Duration,
    ) -> Result<Vec<JobKey>, StoreError> {
        retried(|| queue::give_up_unknown(&self.pool, unknown, patience)).await
    }
}

#[async_trait]
impl Requests for PostgresStore {
    async fn cancel(&self, id: Uuid, by: &str) -> Result<Option<Cancelling>, StoreError> {
        retried(|| requests::cancel(&self.pool, id, by)).await
    }

    async fn retry(&self, id: Uuid, by: &str) -> Result<Option<Retrying>, StoreError> {
        retried(|| requests::retry(&self.pool, id, by)).await
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
impl DeadLetterBox for PostgresStore {
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
}
