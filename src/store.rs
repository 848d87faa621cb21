//! The database tables: what is recorded about jobs, and under which conditions.
//!
//! Every method is one transaction; none stays open while a task runs. Lease times use
//! the database's clock only. The answer to a commit can get lost, so every method is
//! idempotent: a second call reports how things stand.
//!
//! - `processed_messages` is the guard and the record: one row per (subscription, key),
//!   inserted with the message's data at the first claim or refusal, and updated when the
//!   job ends. In between only its count of duplicates changes.
//! - `leases` is the queue: one small row per open job, with its lease, its place in its
//!   ordering key, and its counts of attempts, interruptions and crashes. A renewal
//!   changes no indexed column, so on Postgres it stays a heap-only update.
//! - `ledger` is the history of each message; `attempts` has the last log lines and the
//!   progress of each attempt. Both are for people; no state is read from them. The
//!   ledger's entries about claims, duplicates, releases and endings are written in the
//!   same transaction as the change; its notes about acks, checkpoints and lost leases
//!   follow later, and are lost if the database is away.
//! - The views (`jobs` and others) have the same columns on every database, so
//!   [`Records`] is written once.
//!
//! A renewal, an ending or a release checks only its fence, not whether the lease has
//! expired: a late renewal makes the lease valid again.

mod error;
mod postgres;
mod reading;
mod sqlite;
mod taker;
mod terms;
mod values;

use std::sync::Arc;
use std::time::Duration;

use async_trait::async_trait;
use uuid::Uuid;

pub use crate::database_url::Pooler;
use crate::job::{Claim, ClaimRequest, DeadLetter, DueJob, Fence, JobKey, Pick, Renewal, Taken};
use crate::record::{
    AttemptRecord, AttemptReport, Cancelling, Job, JobFilter, Note, Retrying, Story, UnknownTask,
};

pub use error::{SchemaError, StoreError, in_time};
pub use postgres::PostgresStore;
pub use sqlite::SqliteStore;
pub use terms::{
    ClaimTerms, DeadLettersDue, Finish, Finished, GivenUp, KNOWN_FOR, Patience, Reach, Refusal,
    Refused, Release, Released, Standing, TaskTerms, UnknownJob,
};

/// The database driver's error.
pub use sqlx::Error as DatabaseError;

/// The tables behind the guard, the same on every database.
pub trait Store: Schema + Claims + Queue + Requests + Records + DeadLetterBox {}

impl<S: Schema + Claims + Queue + Requests + Records + DeadLetterBox> Store for S {}

/// Receives who holds the locks that a migration waits for.
pub type Waiting = fn(&str);

/// The database itself.
#[async_trait]
pub trait Schema: Send + Sync + 'static {
    /// Applies all outstanding migrations and returns how many there were. Waits briefly
    /// for a lock, then tries again; `waiting` receives who holds it.
    async fn migrate(&self, waiting: Waiting) -> Result<usize, SchemaError>;

    /// Fails unless every migration this version knows has been applied. Newer ones are
    /// fine: old and new workers run side by side.
    async fn check_schema(&self) -> Result<(), SchemaError>;

    /// Whether the database's clock is this machine's, which may be set at any time.
    fn uses_this_machines_clock(&self) -> bool;

    /// Fails unless the database answers and accepts writes.
    async fn ping(&self) -> Result<(), StoreError>;
}

/// A run's claim on its job, from the first statement to the last.
#[async_trait]
pub trait Claims: Send + Sync + 'static {
    /// Answers each request in order. A key's first claim inserts its row; a later one
    /// takes over only a job that is free or whose lease has expired. Of any number of
    /// concurrent claims of one key at most one is acquired, and none while an earlier
    /// job of the same ordering key is unfinished. A claim of a held or finished job
    /// counts a duplicate. Idempotent: a repeated request's token shows whether it was
    /// acquired.
    async fn claim(
        &self,
        requests: &[ClaimRequest],
        terms: &ClaimTerms,
    ) -> Result<Vec<Claim>, StoreError>;

    /// Extends the leases whose fence still holds, starting at the database's now. Never
    /// waits for a row that another transaction has locked.
    async fn renew(&self, fences: &[Fence], lease: Duration) -> Result<Vec<Renewal>, StoreError>;

    /// The tokens of a worker's runs that must be cancelled.
    async fn cancelled_runs(&self, worker: &str) -> Result<Vec<Uuid>, StoreError>;

    /// Stores a run's checkpoint if its fence still holds, and returns whether it did.
    /// `acked`: from now on the queue brings the job back, not Pub/Sub.
    async fn save_checkpoint(
        &self,
        fence: &Fence,
        checkpoint: &str,
        acked: bool,
    ) -> Result<bool, StoreError>;

    /// Ends each job whose fence still holds. Does not wait for a job of which another
    /// session has locked a row.
    async fn finish(&self, finishes: &[Finish]) -> Result<Vec<Finished>, StoreError>;

    /// Gives the claim back if the fence still holds, so that the job waits in the queue.
    /// Returns whether it did.
    async fn release(&self, release: &Release) -> Result<bool, StoreError>;

    /// Gives back a claim that was acquired but whose answer was lost, found by its
    /// token. Costs no attempt.
    async fn disown(&self, claims: &[(JobKey, Uuid)]) -> Result<(), StoreError>;

    /// Records a message that will never run. If its key is on record already, counts a
    /// duplicate instead.
    async fn refuse(&self, refusal: &Refusal) -> Result<Refused, StoreError>;
}

/// The unfinished jobs, and who may take them without a delivery.
#[async_trait]
pub trait Queue: Send + Sync + 'static {
    /// The jobs that may be taken now, oldest first: waiting jobs that may run, and jobs
    /// whose lease expired `reap_delay` ago. At most `limit` per subscription and task.
    /// Locks nothing.
    async fn due(&self, reach: &Reach, limit: u32) -> Result<Vec<DueJob>, StoreError>;

    /// Takes those picked jobs that may still be taken, in order. Two workers never get
    /// the same job.
    async fn take(&self, picks: &[Pick], terms: &ClaimTerms) -> Result<Vec<Taken>, StoreError>;

    /// How each job stands, without claiming it or counting a duplicate.
    async fn look(&self, keys: &[JobKey]) -> Result<Vec<Standing>, StoreError>;

    /// Lets any worker take over these lost jobs at once: Pub/Sub has redelivered them,
    /// to a worker without room.
    async fn offer(&self, keys: &[JobKey]) -> Result<(), StoreError>;

    /// Records that a live worker knows these tasks, for [`KNOWN_FOR`] from now. Writes
    /// only what would last for less than half of that.
    async fn know(&self, reach: &Reach) -> Result<(), StoreError>;

    /// Jobs of these subscriptions that wait, or have lost their worker, and whose task no
    /// worker knows, as far as `patience` goes; perhaps too soon to give them up. At most
    /// `limit` per subscription and task, oldest first. Locks nothing.
    async fn unknown(
        &self,
        subscriptions: &[&str],
        patience: Patience,
        limit: u32,
    ) -> Result<Vec<UnknownJob>, StoreError>;

    /// Ends those of the jobs that `patience` has been spent on, and returns them. Skips a
    /// job that runs, or whose task a worker has come to know.
    async fn give_up_unknown(
        &self,
        unknown: &[GivenUp],
        patience: Patience,
    ) -> Result<Vec<JobKey>, StoreError>;
}

/// Requests from people, and records written for people.
#[async_trait]
pub trait Requests: Send + Sync + 'static {
    /// Cancels a waiting job at once; asks the worker of a running one to stop it.
    async fn cancel(&self, id: Uuid, by: &str) -> Result<Option<Cancelling>, StoreError>;

    /// Lets an ended job run again, as a new attempt; lets a waiting one run now. A dead
    /// letter that was not sent yet is dropped.
    async fn retry(&self, id: Uuid, by: &str) -> Result<Option<Retrying>, StoreError>;

    /// Adds notes to jobs' ledgers.
    async fn note(&self, worker: &str, notes: &[Note]) -> Result<(), StoreError>;

    /// Stores an attempt's report. No state depends on it, so no fence is checked; a
    /// later report replaces an earlier one.
    async fn record_attempt(
        &self,
        fence: &Fence,
        worker: &str,
        report: &AttemptReport,
    ) -> Result<(), StoreError>;

    /// Deletes at most `limit` jobs that ended more than `retention` ago, with their
    /// ledgers and attempts, and returns how many. Keeps dead jobs whose message is still
    /// to be published. Skips locked rows, so that no claim waits.
    async fn purge(&self, retention: Duration, limit: u32) -> Result<u64, StoreError>;
}

/// Records that people read.
#[async_trait]
pub trait Records: Send + Sync + 'static {
    /// Jobs, newest first.
    async fn jobs(&self, filter: &JobFilter) -> Result<Vec<Job>, StoreError>;

    /// One job with its payload.
    async fn job(&self, id: Uuid) -> Result<Option<Job>, StoreError>;

    /// The ids of at most `limit` jobs whose id ends with these lower-case hexadecimal
    /// digits, four or more.
    async fn job_ids_ending_with(&self, end: &str, limit: u32) -> Result<Vec<Uuid>, StoreError>;

    /// The tasks of waiting jobs that no live worker knows.
    async fn unknown_tasks(&self) -> Result<Vec<UnknownTask>, StoreError>;

    /// Everything on record about a message: its jobs, one per subscription, and the jobs
    /// it was a duplicate of.
    async fn stories(&self, message_id: &str) -> Result<Vec<Story>, StoreError>;

    /// The reports of a job's attempts, in order. Attempts that reported nothing, or
    /// whose report was lost, are missing.
    async fn attempts(&self, id: Uuid) -> Result<Vec<AttemptRecord>, StoreError>;
}

/// Dead jobs whose message is still to be published.
#[async_trait]
pub trait DeadLetterBox: Send + Sync + 'static {
    /// The dead letters that are due, earliest first.
    async fn dead_letters(&self, due: &DeadLettersDue) -> Result<Vec<DeadLetter>, StoreError>;

    /// Marks the dead job's message as needing no more publishing; `detail` says why, for
    /// the ledger.
    async fn dead_letter_settled(
        &self,
        letter: &DeadLetter,
        worker: &str,
        detail: &str,
    ) -> Result<(), StoreError>;
}

/// Whether to create a SQLite file that does not exist.
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
    pooler: Option<Pooler>,
    missing: Missing,
) -> Result<Arc<dyn Store>, StoreError> {
    if url.starts_with("sqlite:") {
        return Ok(Arc::new(SqliteStore::open(url, missing).await?));
    }
    Ok(Arc::new(
        PostgresStore::open(url, max_connections, pooler).await?,
    ))
}
