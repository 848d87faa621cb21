//! The tables: what is written about jobs, and under which conditions.
//!
//! Every method is one whole transaction; none is open while a task runs.
//! Lease times are read off the database's clock only. The answer to a commit
//! can get lost, so every method may be called again and then tells how it
//! stands.
//!
//! - `processed_messages` is the guard and the record: one row per (subscription,
//!   key), inserted at the first claim or refusal with the message's data, and
//!   updated when the job ends. In between only its count of duplicates changes.
//! - `leases` is the queue: one small row per open job, with its lease, its place
//!   in its ordering key, and its counts of attempts, interruptions and crashes.
//!   It has no index on a column that a renewal changes, so renewals stay
//!   heap-only updates on Postgres.
//! - `ledger` is the story of each message, and `attempts` has the last lines and
//!   the progress of each attempt. Both are for people; no state is read from
//!   them. The ledger's entries about claims, duplicates, releases and endings are
//!   written with the change itself; its notes about acks, checkpoints and lost
//!   leases follow, and are lost if the database is away.
//! - The views (`jobs` and others) have the same columns on every database, so
//!   that [`Records`] is written once.
//!
//! A renewal, an ending or a release asks only whether its fence still holds, and
//! not whether the lease has expired: a late renewal makes the lease good again.

mod error;
mod postgres;
mod reading;
mod sqlite;
mod terms;
mod values;

use std::sync::Arc;
use std::time::Duration;

use async_trait::async_trait;
use uuid::Uuid;

use crate::job::{Claim, ClaimRequest, DeadLetter, DueJob, Fence, JobKey, Pick, Renewal, Taken};
use crate::record::{
    AttemptRecord, AttemptReport, Cancelling, Job, JobFilter, Note, Retrying, Story,
};

pub use error::{SchemaError, StoreError, in_time};
pub use postgres::PostgresStore;
pub use sqlite::SqliteStore;
pub use terms::{
    ClaimTerms, DeadLettersDue, Finish, Finished, GivenUp, Reach, Refusal, Refused, Release,
    Released, Standing, TaskTerms,
};

/// The database driver's error.
pub use sqlx::Error as DatabaseError;

/// The tables behind the guard, the same on every database.
pub trait Store: Schema + Claims + Queue + Requests + Records + DeadLetterBox {}

impl<S: Schema + Claims + Queue + Requests + Records + DeadLetterBox> Store for S {}

/// Is told who holds the locks that a migration waits for.
pub type Waiting = fn(&str);

/// The database itself.
#[async_trait]
pub trait Schema: Send + Sync + 'static {
    /// Applies all outstanding migrations and returns how many there were.
    /// Locks are waited for briefly and asked for again; `waiting` is told who
    /// holds them.
    async fn migrate(&self, waiting: Waiting) -> Result<usize, SchemaError>;

    /// Errs unless every migration this version knows has been applied.
    /// Newer ones are fine: old and new workers run side by side.
    async fn check_schema(&self) -> Result<(), SchemaError>;

    /// Errs unless the database answers.
    async fn ping(&self) -> Result<(), StoreError>;
}

/// A run's claim on its job, from the first statement to the last.
#[async_trait]
pub trait Claims: Send + Sync + 'static {
    /// Answers each request in order. A key's first claim inserts its row; a
    /// later one takes over only what nobody holds or whose lease has expired.
    /// Of any number of concurrent claims of one key at most one is acquired,
    /// and none of a job while an earlier one of its ordering key is
    /// unfinished. A job that is held or finished counts a duplicate. A request
    /// may be sent again: its token tells whether it was acquired.
    async fn claim(
        &self,
        requests: &[ClaimRequest],
        terms: &ClaimTerms,
    ) -> Result<Vec<Claim>, StoreError>;

    /// Extends the leases whose fence still holds, from the database's now.
    /// Never waits for a row that another transaction has locked.
    async fn renew(&self, fences: &[Fence], lease: Duration) -> Result<Vec<Renewal>, StoreError>;

    /// The tokens of a worker's runs that are to be cancelled.
    async fn cancelled_runs(&self, worker: &str) -> Result<Vec<Uuid>, StoreError>;

    /// Stores a run's checkpoint if its fence still holds, and returns whether
    /// it did. `acked`: from now on the queue brings the job back.
    async fn save_checkpoint(
        &self,
        fence: &Fence,
        checkpoint: &str,
        acked: bool,
    ) -> Result<bool, StoreError>;

    /// Ends each job whose fence still holds. Never waits for a row that another
    /// transaction has locked.
    async fn finish(&self, finishes: &[Finish]) -> Result<Vec<Finished>, StoreError>;

    /// Gives the claim back if the fence still holds: the job waits in the
    /// queue. Returns whether it did.
    async fn release(&self, release: &Release) -> Result<bool, StoreError>;

    /// Gives back what a claim has acquired that was never answered, by its token.
    /// It costs no attempt.
    async fn disown(&self, claims: &[(JobKey, Uuid)]) -> Result<(), StoreError>;

    /// Records a message that will never run; counts a duplicate instead where
    /// its key is on record already.
    async fn refuse(&self, refusal: &Refusal) -> Result<Refused, StoreError>;
}

/// The unfinished jobs, and who may take them without a delivery.
#[async_trait]
pub trait Queue: Send + Sync + 'static {
    /// The jobs that could be taken now, oldest first: those that wait and may
    /// run, and those whose lease expired `reap_delay` ago. At most `limit` of
    /// each subscription and task. Nothing is locked.
    async fn due(&self, reach: &Reach, limit: u32) -> Result<Vec<DueJob>, StoreError>;

    /// Takes those of the picked jobs that still may be taken, in their order.
    /// Two workers never get the same.
    async fn take(&self, picks: &[Pick], terms: &ClaimTerms) -> Result<Vec<Taken>, StoreError>;

    /// How each job stands, without claiming it or counting a duplicate.
    async fn look(&self, keys: &[JobKey]) -> Result<Vec<Standing>, StoreError>;

    /// The deliveries of these lost jobs have come again, to a worker without
    /// room: any worker may take them over at once.
    async fn offer(&self, keys: &[JobKey]) -> Result<(), StoreError>;

    /// Tells which tasks a worker knows: their jobs do not wait for a worker
    /// that knows them any more.
    async fn know(&self, reach: &Reach) -> Result<(), StoreError>;

    /// Ends those jobs whose task no worker has known for `patience`, and returns
    /// which they are: not one whose task a worker has come to know meanwhile.
    async fn give_up_unknown(
        &self,
        unknown: &[GivenUp],
        patience: Duration,
    ) -> Result<Vec<JobKey>, StoreError>;
}

/// What people ask for, and what is written for people.
#[async_trait]
pub trait Requests: Send + Sync + 'static {
    /// Ends a job that waits as cancelled; asks for it where one runs.
    async fn cancel(&self, id: Uuid, by: &str) -> Result<Option<Cancelling>, StoreError>;

    /// Lets an ended job run again, as a new attempt; lets a waiting one run
    /// now. A dead letter that was not sent yet is not sent any more.
    async fn retry(&self, id: Uuid, by: &str) -> Result<Option<Retrying>, StoreError>;

    /// Adds notes to jobs' ledgers.
    async fn note(&self, worker: &str, notes: &[Note]) -> Result<(), StoreError>;

    /// Stores what an attempt has reported. Nothing depends on it, so any
    /// attempt may; a later report replaces an earlier one.
    async fn record_attempt(
        &self,
        fence: &Fence,
        worker: &str,
        report: &AttemptReport,
    ) -> Result<(), StoreError>;

    /// Deletes at most `limit` jobs that ended more than `retention` ago, with
    /// their ledgers and all, and returns how many. Keeps dead ones whose
    /// message is still to be published. Passes over rows that are being
    /// written, so that no claim waits.
    async fn purge(&self, retention: Duration, limit: u32) -> Result<u64, StoreError>;
}

/// What people read.
#[async_trait]
pub trait Records: Send + Sync + 'static {
    /// Jobs, newest first.
    async fn jobs(&self, filter: &JobFilter) -> Result<Vec<Job>, StoreError>;

    /// One job with its payload.
    async fn job(&self, id: Uuid) -> Result<Option<Job>, StoreError>;

    /// The ids of at most `limit` jobs that end with these lower-case
    /// hexadecimal digits, four or more.
    async fn job_ids_ending_with(&self, end: &str, limit: u32) -> Result<Vec<Uuid>, StoreError>;

    /// Everything on record about a message: the jobs it led to, one per
    /// subscription, and those it was a duplicate of.
    async fn stories(&self, message_id: &str) -> Result<Vec<Story>, StoreError>;

    /// What a job's attempts have reported, in their order. Those that reported
    /// nothing, or were lost, are missing.
    async fn attempts(&self, id: Uuid) -> Result<Vec<AttemptRecord>, StoreError>;
}

/// Dead jobs whose message is still to be published.
#[async_trait]
pub trait DeadLetterBox: Send + Sync + 'static {
    /// Those that are due, earliest first.
    async fn dead_letters(&self, due: &DeadLettersDue) -> Result<Vec<DeadLetter>, StoreError>;

    /// The message of a dead job need not be published any more; `detail` says
    /// why, for the ledger.
    async fn dead_letter_settled(
        &self,
        letter: &DeadLetter,
        worker: &str,
        detail: &str,
    ) -> Result<(), StoreError>;
}

/// Whether a SQLite file that does not exist is made.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Missing {
    Create,
    Fail,
}

/// Opens the store that the URL names.
///
/// # Errors
/// [`StoreError::Unavailable`] when the database cannot be reached.
pub async fn open(
    url: &str,
    max_connections: u32,
    missing: Missing,
) -> Result<Arc<dyn Store>, StoreError> {
    if url.starts_with("sqlite:") {
        return Ok(Arc::new(SqliteStore::open(url, missing).await?));
    }
    Ok(Arc::new(PostgresStore::open(url, max_connections).await?))
}
