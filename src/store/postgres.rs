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
mod sessions;
mod takeover;

use std::str::FromStr;
use std::time::Duration;

use async_trait::async_trait;
use sqlx::Postgres;
use sqlx::postgres::PgConnectOptions;
use tokio::time::sleep;
use uuid::Uuid;

use self::sessions::{ACQUIRE_TIMEOUT, LIMITS, Sessions, pool_of};
use super::reading::Reading;
use super::{
    ClaimTerms, Claims, DeadLetterBox, DeadLettersDue, Finish, Finished, GivenUp, Patience, Queue,
    Reach, Refusal, Refused, Release, Requests, Schema, SchemaError, Standing, StoreError,
    UnknownJob, Waiting,
};
use crate::database_url::{self, Pooler};
use crate::job::{Claim, ClaimRequest, DeadLetter, DueJob, Fence, JobKey, Pick, Renewal, Taken};
use crate::record::{AttemptReport, Cancelling, Note, Retrying};
use crate::retry::Backoff;

/// More than one, since a dead connection keeps its place until it is detected.
const RENEWAL_CONNECTIONS: u32 = 3;

/// Pauses before a rolled-back transaction is tried again.
const ROLLED_BACK: (Duration, Duration) = (Duration::from_millis(5), Duration::from_millis(200));
const ROLLED_BACK_TRIES: u32 = 5;

/// [`super::Store`] on Postgres 14 or newer.
#[derive(Clone)]
pub struct PostgresStore {
    sessions: Sessions,
    /// Renewals have their own connections, so that a flood of claims does not delay
    /// them. They commit asynchronously: if the server crashes and loses one, a lease
    /// only ends early.
    renewals: Sessions,
    url: String,
}

impl PostgresStore {
    /// Connects a pool of at most `max_connections`. Finds out whether there is a pooler
    /// if that is not said.
    ///
    /// # Errors
    /// [`StoreError::Unavailable`] when no connection can be made.
    pub async fn open(
        url: &str,
        max_connections: u32,
        pooler: Option<Pooler>,
    ) -> Result<Self, StoreError> {
        let options = connect_options(url)?.application_name("trainyard");
        let sessions = Sessions::open(&options, max_connections, pooler).await?;
        let settings = [&LIMITS[..], &[("synchronous_commit", "off")]].concat();
        let pooler = sessions.pooler();
        let pool = pool_of(RENEWAL_CONNECTIONS, ACQUIRE_TIMEOUT);
        let renewals = Sessions::with_settings(&options, pool, pooler, &settings);
        Ok(Self {
            sessions,
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

impl Reading for PostgresStore {
    type Database = Postgres;
    type Source = Sessions;

    fn source(&self) -> &Sessions {
        &self.sessions
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
        schema::migrate(&self.sessions, &self.url, waiting).await
    }

    async fn check_schema(&self) -> Result<(), SchemaError> {
        schema::check(&self.sessions).await
    }

    fn uses_this_machines_clock(&self) -> bool {
        false
    }

    async fn ping(&self) -> Result<(), StoreError> {
        schema::ping(&self.sessions).await
    }
}

#[async_trait]
impl Claims for PostgresStore {
    async fn claim(
        &self,
        requests: &[ClaimRequest],
        terms: &ClaimTerms,
    ) -> Result<Vec<Claim>, StoreError> {
        retried(|| claims::claim(&self.sessions, requests, terms)).await
    }

    async fn renew(&self, fences: &[Fence], lease: Duration) -> Result<Vec<Renewal>, StoreError> {
        retried(|| running::renew(&self.renewals, fences, lease)).await
    }

    async fn cancelled_runs(&self, worker: &str) -> Result<Vec<Uuid>, StoreError> {
        running::cancelled_runs(&self.sessions, worker).await
    }

    async fn save_checkpoint(
        &self,
        fence: &Fence,
        checkpoint: &str,
        acked: bool,
    ) -> Result<bool, StoreError> {
        retried(|| running::save_checkpoint(&self.sessions, fence, checkpoint, acked)).await
    }

    async fn finish(&self, finishes: &[Finish]) -> Result<Vec<Finished>, StoreError> {
        retried(|| endings::finish(&self.sessions, finishes)).await
    }

    async fn release(&self, release: &Release) -> Result<bool, StoreError> {
        retried(|| endings::release(&self.sessions, release)).await
    }

    async fn disown(&self, claims: &[(JobKey, Uuid)]) -> Result<(), StoreError> {
        retried(|| endings::disown(&self.sessions, claims)).await
    }

    async fn refuse(&self, refusal: &Refusal) -> Result<Refused, StoreError> {
        retried(|| endings::refuse(&self.sessions, refusal)).await
    }
}

#[async_trait]
impl Queue for PostgresStore {
    async fn due(&self, reach: &Reach, limit: u32) -> Result<Vec<DueJob>, StoreError> {
        queue::due(&self.sessions, reach, limit).await
    }

    async fn take(&self, picks: &[Pick], terms: &ClaimTerms) -> Result<Vec<Taken>, StoreError> {
        retried(|| queue::take(&self.sessions, picks, terms)).await
    }

    async fn look(&self, keys: &[JobKey]) -> Result<Vec<Standing>, StoreError> {
        queue::look(&self.sessions, keys).await
    }

    async fn offer(&self, keys: &[JobKey]) -> Result<(), StoreError> {
        retried(|| queue::offer(&self.sessions, keys)).await
    }

    async fn know(&self, reach: &Reach) -> Result<(), StoreError> {
        retried(|| queue::know(&self.sessions, reach)).await
    }

    async fn unknown(
        &self,
        subscriptions: &[&str],
        patience: Patience,
        limit: u32,
    ) -> Result<Vec<UnknownJob>, StoreError> {
        queue::unknown(&self.sessions, subscriptions, patience, limit).await
    }

    async fn give_up_unknown(
        &self,
        unknown: &[GivenUp],
        patience: Patience,
    ) -> Result<Vec<JobKey>, StoreError> {
        retried(|| queue::give_up_unknown(&self.sessions, unknown, patience)).await
    }
}

#[async_trait]
impl Requests for PostgresStore {
    async fn cancel(&self, id: Uuid, by: &str) -> Result<Option<Cancelling>, StoreError> {
        retried(|| requests::cancel(&self.sessions, id, by)).await
    }

    async fn retry(&self, id: Uuid, by: &str) -> Result<Option<Retrying>, StoreError> {
        retried(|| requests::retry(&self.sessions, id, by)).await
    }

    async fn note(&self, worker: &str, notes: &[Note]) -> Result<(), StoreError> {
        ledger::note(&self.sessions, worker, notes).await
    }

    async fn record_attempt(
        &self,
        fence: &Fence,
        worker: &str,
        report: &AttemptReport,
    ) -> Result<(), StoreError> {
        ledger::record_attempt(&self.sessions, fence, worker, report).await
    }

    async fn purge(&self, retention: Duration, limit: u32) -> Result<u64, StoreError> {
        ledger::purge(&self.sessions, retention, limit).await
    }
}

#[async_trait]
impl DeadLetterBox for PostgresStore {
    async fn dead_letters(&self, due: &DeadLettersDue) -> Result<Vec<DeadLetter>, StoreError> {
        dead_letters::dead_letters(&self.sessions, due).await
    }

    async fn dead_letter_settled(
        &self,
        letter: &DeadLetter,
        worker: &str,
        detail: &str,
    ) -> Result<(), StoreError> {
        retried(|| dead_letters::dead_letter_settled(&self.sessions, letter, worker, detail)).await
    }
}
