//! The tables: what is written about jobs, and under which conditions.
//!
//! Every method is one whole transaction; none is open while a task runs.
//! Lease times are read off the database's clock only.

mod postgres;
mod sqlite;

use std::borrow::Cow;
use std::collections::BTreeMap;
use std::sync::Arc;
use std::time::Duration;

use async_trait::async_trait;
use uuid::Uuid;

use crate::job::{
    AttemptRecord, Cancelling, Claim, ClaimRequest, DeadLetter, Fence, FinalState, Job, JobFilter,
    JobKey, JobState, Limits, Note, Reaped, Retrying, Story, Told,
};
use crate::message::Message;
use crate::outcome::{DeadReason, Ending};
use crate::report::{Checkpoint, Progress};

/// The database driver's error.
pub use sqlx::Error as DatabaseError;

pub use postgres::PostgresStore;
pub use sqlite::SqliteStore;

/// Why the tables could not be read or written. The answer to a commit can get
/// lost, so every method may be called again and then tells how it stands.
#[derive(Debug, thiserror::Error)]
pub enum StoreError {
    /// The database cannot be reached or refuses to work now. The message is
    /// kept unacknowledged; the same call may succeed later.
    #[error("the database is not available: {0}")]
    Unavailable(sqlx::Error),
    /// The database does not take the values, and never will. The message is
    /// kept unacknowledged; a job ends without its result.
    #[error("the database refused a statement: {0}")]
    Refused(sqlx::Error),
    /// The database did not answer in time. What was asked may or may not have
    /// happened; asking again tells.
    #[error("the database did not answer within {} ms", .0.as_millis())]
    NoAnswer(Duration),
    /// A row holds what this version cannot read. The message is kept
    /// unacknowledged.
    #[error("a stored row cannot be read: {0}")]
    Unreadable(String),
}

impl StoreError {
    /// Whether the database undid the transaction for another one's sake.
    /// <https://www.postgresql.org/docs/current/mvcc-serialization-failure-handling.html>
    fn was_rolled_back(&self) -> bool {
        let Self::Unavailable(sqlx::Error::Database(error)) = self else {
            return false;
        };
        matches!(error.code().as_deref(), Some("40001" | "40P01"))
    }

    /// Whether the database itself is away, so that the same call may succeed
    /// later.
    #[must_use]
    pub fn is_passing(&self) -> bool {
        matches!(self, Self::Unavailable(_) | Self::NoAnswer(_))
    }
}

/// Why the schema cannot be used. Nothing has been claimed yet.
#[derive(Debug, thiserror::Error)]
pub enum SchemaError {
    #[error(
        "the database has no trainyard tables; run `trainyard migrate`, or start with `--migrate`"
    )]
    Missing,
    #[error(
        "the database's schema is {behind} migration(s) behind this version; run `trainyard migrate`, or start with `--migrate`"
    )]
    Old { behind: usize },
    #[error("a migration failed: {0}")]
    Migration(#[from] sqlx::migrate::MigrateError),
    #[error(transparent)]
    Store(#[from] StoreError),
}

impl From<sqlx::Error> for SchemaError {
    fn from(error: sqlx::Error) -> Self {
        Self::Store(error.into())
    }
}

/// Who claims, and for how long.
#[derive(Debug, Clone)]
pub struct ClaimTerms {
    pub worker: Arc<str>,
    pub lease: Duration,
    /// A job whose lease has ended so often without a word from its worker is
    /// not taken over again but dead: it may be what kills them.
    pub max_crashes: u32,
}

/// A run's last write, where its job ends.
#[derive(Debug, Clone)]
pub struct Finish {
    pub fence: Fence,
    pub ending: Ending,
    /// The run's last checkpoint, if it had any.
    pub checkpoint: Option<Checkpoint>,
    /// Where the message goes if the ending is dead.
    pub dead_letter_topic: Option<Arc<str>>,
}

/// A run's last write, where its job goes on.
#[derive(Debug, Clone)]
pub struct Release {
    pub fence: Fence,
    pub why: Released,
    /// The run's last checkpoint, if it had any.
    pub checkpoint: Option<Checkpoint>,
}

#[derive(Debug, Clone, PartialEq)]
pub enum Released {
    /// Not by its own fault: the attempt does not count.
    Interrupted,
    /// The attempt counts, and the next one comes after a while.
    Failed { error: String, retry_in: Duration },
}

impl Released {
    /// As the tables have it: attempts that do not count, how long the job
    /// waits, its error, and the kind of the ledger's entry.
    fn columns(&self) -> (i32, Duration, Option<&str>, &'static str) {
        match self {
            Self::Interrupted => (1, Duration::ZERO, None, "released"),
            Self::Failed { error, retry_in } => (0, *retry_in, Some(error), "failed"),
        }
    }
}

/// What a worker takes from the table: what it could have pulled itself and
/// has room for, with the limits that go with it.
#[derive(Debug, Clone, Default)]
pub struct Reach {
    /// With the topic for dead letters.
    pub subscriptions: BTreeMap<String, Option<Arc<str>>>,
    pub tasks: BTreeMap<String, TaskTerms>,
}

/// What a worker needs to know to take a task's job from the table.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct TaskTerms {
    pub max_attempts: u32,
    /// A claim is all that an ack of its message waits for: once the job runs,
    /// the table is to bring it back.
    pub acked_when_claimed: bool,
}

impl Reach {
    fn limits(&self, subscription: &str, task: &str) -> Limits {
        Limits {
            max_attempts: self
                .tasks
                .get(task)
                .map_or(u32::MAX, |task| task.max_attempts),
            dead_letter_topic: self.subscriptions.get(subscription).cloned().flatten(),
        }
    }

    fn acked_when_claimed(&self, task: &str) -> bool {
        self.tasks
            .get(task)
            .is_some_and(|task| task.acked_when_claimed)
    }
}

/// A message that is not run at all, and why.
#[derive(Debug, Clone)]
pub struct Refusal {
    pub key: JobKey,
    pub job_id: Uuid,
    /// None when the message named no task that could be read.
    pub task: Option<String>,
    pub message: Message,
    pub reason: DeadReason,
    /// The reason in full, for people.
    pub error: String,
    pub worker: Arc<str>,
    pub dead_letter_topic: Option<Arc<str>>,
}

/// Which dead letters are asked for.
#[derive(Debug, Clone)]
pub struct DeadLettersDue {
    /// Only those of jobs that this worker ran last, or refused.
    pub worker: Option<Arc<str>>,
    /// Only those that have waited for so long.
    pub at_least: Duration,
    /// None to these topics.
    pub not_to: Vec<String>,
    /// For so long nobody else is given them.
    pub time_to_publish: Duration,
    pub limit: u32,
}

/// What is written about a job whose task nobody knew.
#[derive(Debug, Clone)]
pub struct GivenUp {
    pub error: String,
    pub worker: Arc<str>,
    pub dead_letter_topic: Option<Arc<str>>,
}

/// What became of a refusal.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Refused {
    Recorded,
    AlreadyFinished(FinalState),
    /// A worker that knows the message's task has claimed it.
    Claimed,
}

impl Refused {
    fn read(recorded: bool, state: &str) -> Self {
        if recorded {
            return Self::Recorded;
        }
        final_state(state).map_or(Self::Claimed, Self::AlreadyFinished)
    }
}

/// What a held delivery finds when it looks again.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Standing {
    Finished(FinalState),
    /// Some run holds the job for this much longer, unless it renews. `acked`:
    /// the table is to bring it back if that run is lost.
    Held {
        remaining: Duration,
        acked: bool,
    },
    /// It waits in the table for this much longer, or for a worker with room.
    Waiting {
        remaining: Duration,
    },
    /// Its run is lost, or it is not on record: a delivery may claim it now.
    Free,
}

/// The tables behind the guard, the same on every database.
#[async_trait]
pub trait Store: Send + Sync + 'static {
    /// Applies all outstanding migrations and returns how many there were.
    async fn migrate(&self) -> Result<usize, SchemaError>;

    /// Errs unless every migration this version knows has been applied.
    /// Newer ones are fine: old and new workers run side by side.
    async fn check_schema(&self) -> Result<(), SchemaError>;

    /// Errs unless the database answers.
    async fn ping(&self) -> Result<(), StoreError>;

    /// Answers each request in order. A key's first claim inserts its row; a
    /// later one takes over only what nobody holds or whose lease has ended.
    /// Of any number of concurrent claims of one key at most one is acquired,
    /// and none of a job while an earlier one of its ordering key is
    /// unfinished. What is held or finished counts as a duplicate. A request
    /// whose answer was lost may be sent again: its token tells whether it was
    /// acquired.
    async fn claim(
        &self,
        requests: &[ClaimRequest],
        terms: &ClaimTerms,
    ) -> Result<Vec<Claim>, StoreError>;

    /// How a job stands, without claiming it or counting a duplicate.
    async fn look(&self, key: &JobKey) -> Result<Standing, StoreError>;

    /// Extends the leases whose fence still holds, from the database's now,
    /// and returns for each fence whether it was one of them.
    async fn renew(&self, fences: &[Fence], lease: Duration) -> Result<Vec<bool>, StoreError>;

    /// How many jobs [`Store::reap`] would find now, counted up to `limit`.
    async fn due(&self, reach: &Reach, limit: usize) -> Result<usize, StoreError>;

    /// Tells which tasks a worker knows: their jobs do not wait for a worker
    /// that knows them any more.
    async fn know(&self, reach: &Reach) -> Result<(), StoreError>;

    /// Takes at most `limit` jobs whose turn to run it is, or whose lease ended
    /// `reap_delay` ago, in the order of those times. Two reapers never get
    /// the same.
    async fn reap(
        &self,
        reach: &Reach,
        terms: &ClaimTerms,
        limit: usize,
    ) -> Result<Vec<Reaped>, StoreError>;

    /// Keeps a run's checkpoint if its fence still holds, and returns whether
    /// it did. `acked`: from now on the table is to bring the job back.
    async fn save_checkpoint(
        &self,
        fence: &Fence,
        checkpoint: &str,
        acked: bool,
    ) -> Result<bool, StoreError>;

    /// Keeps what an attempt has told about itself, for people; nothing depends
    /// on it, so any attempt may, once.
    async fn keep_attempt(
        &self,
        fence: &Fence,
        worker: &str,
        told: &Told,
    ) -> Result<(), StoreError>;

    /// What a job's attempts have told, in their order; those that told
    /// nothing, or were lost, are missing.
    async fn attempts(&self, id: Uuid) -> Result<Vec<AttemptRecord>, StoreError>;

    /// The tokens of a worker's runs that are to be cancelled.
    async fn cancelled_runs(&self, worker: &str) -> Result<Vec<Uuid>, StoreError>;

    /// Ends each job whose fence still holds. Returns for each whether this
    /// run ended it, also when an earlier call did and its answer was lost.
    async fn finish(&self, finishes: &[Finish]) -> Result<Vec<bool>, StoreError>;

    /// Gives the claim back if the fence still holds: the job waits in the
    /// table. Returns whether it did.
    async fn release(&self, release: &Release) -> Result<bool, StoreError>;

    /// Records a message that will never run; counts a duplicate instead where
    /// its key is on record already.
    async fn refuse(&self, refusal: &Refusal) -> Result<Refused, StoreError>;

    /// Ends a job for which no worker has known the task for `patience`.
    /// Returns whether it did: not if one has come to know it meanwhile.
    async fn give_up_unknown(
        &self,
        key: &JobKey,
        patience: Duration,
        refusal: &GivenUp,
    ) -> Result<bool, StoreError>;

    /// Dead jobs whose message is still to be published, earliest first.
    async fn dead_letters(&self, due: &DeadLettersDue) -> Result<Vec<DeadLetter>, StoreError>;

    /// The message of a dead job need not be published any more; `detail` says
    /// why, for the ledger.
    async fn dead_letter_settled(
        &self,
        letter: &DeadLetter,
        worker: &str,
        detail: &str,
    ) -> Result<(), StoreError>;

    /// Ends a job that waits as cancelled; asks for it where one runs.
    async fn cancel(&self, id: Uuid, by: &str) -> Result<Option<Cancelling>, StoreError>;

    /// Lets an ended job run again, as a new attempt; lets a waiting one run
    /// now. A dead letter that was not sent yet is not sent any more.
    async fn retry(&self, id: Uuid, by: &str) -> Result<Option<Retrying>, StoreError>;

    /// Adds notes to jobs' ledgers.
    async fn note(&self, worker: &str, notes: &[Note]) -> Result<(), StoreError>;

    /// Deletes at most `limit` jobs that ended more than `retention` ago, with
    /// their ledgers and all, and returns how many. Keeps dead ones whose
    /// message is still to be published. Passes over rows that are being
    /// written, so that no claim waits.
    async fn purge(&self, retention: Duration, limit: u32) -> Result<u64, StoreError>;

    /// All that is on record about a message: the jobs it led to, one per
    /// subscription, and those it was a duplicate of.
    async fn stories(&self, message_id: &str) -> Result<Vec<Story>, StoreError>;

    /// Jobs, newest first.
    async fn jobs(&self, filter: &JobFilter) -> Result<Vec<Job>, StoreError>;

    /// The ids of at most `limit` jobs that end with these lower-case
    /// hexadecimal digits.
    async fn job_ids_ending_with(&self, end: &str, limit: u32) -> Result<Vec<Uuid>, StoreError>;

    /// One job with its payload.
    async fn job(&self, id: Uuid) -> Result<Option<Job>, StoreError>;
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

impl From<sqlx::Error> for StoreError {
    /// What is not known to be about the values themselves counts as passing:
    /// a full disk, a failover to a read-only standby, a schema in the middle
    /// of a change. The same call may succeed later, and giving up would lose.
    fn from(error: sqlx::Error) -> Self {
        match &error {
            sqlx::Error::Database(refusal) if is_about_values(refusal.code().as_deref()) => {
                Self::Refused(error)
            }
            sqlx::Error::Encode(_) => Self::Refused(error),
            sqlx::Error::ColumnDecode { .. }
            | sqlx::Error::ColumnNotFound(_)
            | sqlx::Error::Decode(_) => Self::Unreadable(error.to_string()),
            _ => Self::Unavailable(error),
        }
    }
}

/// Postgres's classes of errors about what was to be written: data exceptions
/// (22), constraints (23), program limits (54); SQLite's too big (18) and
/// constraint (19).
/// <https://www.postgresql.org/docs/current/errcodes-appendix.html>
fn is_about_values(code: Option<&str>) -> bool {
    let Some(code) = code else {
        return false;
    };
    match code.len() {
        5 => ["22", "23", "54"]
            .iter()
            .any(|class| code.starts_with(class)),
        // The low byte is the primary code of SQLite's extended ones.
        _ => code
            .parse::<u32>()
            .is_ok_and(|code| matches!(code & 0xff, 18 | 19)),
    }
}

/// The ledger keeps so many duplicates of one job; the count goes on.
const MAX_DUPLICATES_IN_LEDGER: u32 = 50;

/// Why a job is parked.
fn too_many_crashes(max_crashes: u32) -> String {
    format!(
        "its worker was lost {max_crashes} times while running it; it is parked so that it takes no more workers down"
    )
}

fn final_state(state: &str) -> Option<FinalState> {
    match state {
        "succeeded" => Some(FinalState::Succeeded),
        "dead" => Some(FinalState::Dead),
        "cancelled" => Some(FinalState::Cancelled),
        _ => None,
    }
}

/// A job's state as people see it, from the stored one and whether a worker
/// holds the lease.
fn job_state(state: &str, held: bool) -> JobState {
    match final_state(state) {
        Some(FinalState::Succeeded) => JobState::Succeeded,
        Some(FinalState::Dead) => JobState::Dead,
        Some(FinalState::Cancelled) => JobState::Cancelled,
        None if held => JobState::Running,
        None => JobState::Waiting,
    }
}

/// The other way round, to filter by: the stored state, and whether held.
fn stored_state(state: JobState) -> (Option<&'static str>, Option<bool>) {
    match state {
        JobState::Running => (Some("open"), Some(true)),
        JobState::Waiting => (Some("open"), Some(false)),
        ended => (Some(ended.as_str()), None),
    }
}

/// Text as every database can store it: Postgres has no NUL in text.
fn storable(text: &str) -> Cow<'_, str> {
    if text.contains('\0') {
        return Cow::Owned(text.replace('\0', "\u{FFFD}"));
    }
    Cow::Borrowed(text)
}

/// JSON as text, in which a NUL is an escape and so can be stored.
fn json_text(value: &impl serde::Serialize) -> Result<String, StoreError> {
    serde_json::to_string(value).map_err(|error| StoreError::Unreadable(error.to_string()))
}

/// A series as JSON, which has no number for what is not finite: without that.
fn series_text(series: &[Progress]) -> Result<String, StoreError> {
    let mut series = series.to_vec();
    for report in &mut series {
        report.metrics.retain(|_, figure| figure.is_finite());
    }
    json_text(&series)
}

fn from_json<T: serde::de::DeserializeOwned>(text: &str) -> Result<T, StoreError> {
    serde_json::from_str(text).map_err(|error| StoreError::Unreadable(error.to_string()))
}
