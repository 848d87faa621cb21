//! One message's requested run of a task: its key, its fence, its state.

use std::fmt;
use std::str::FromStr;
use std::sync::Arc;
use std::time::Duration;

use bytes::Bytes;
use chrono::{DateTime, Utc};
use serde::{Deserialize, Serialize};
use tokio::time::Instant;
use uuid::Uuid;

use crate::message::Message;
use crate::report::{Checkpoint, Progress};

/// What the guard deduplicates on: unique per subscription and message, so two
/// subscriptions of one topic each run the message (fan-out).
#[derive(Debug, Clone, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct JobKey {
    pub subscription: Arc<str>,
    pub key: Arc<str>,
}

impl JobKey {
    #[must_use]
    pub fn new(subscription: &str, key: &str) -> Self {
        Self {
            subscription: subscription.into(),
            key: key.into(),
        }
    }

    /// The key of a message that is deduplicated by its message id.
    ///
    /// The publish time is part of it: a broker that restarts its ids (Google's
    /// emulator begins at 1 each time) reuses an id for another message, and
    /// that one has another publish time. A redelivery has the same.
    #[must_use]
    pub fn of_message_id(subscription: &str, message: &Message) -> Self {
        let published = message.publish_time.timestamp_micros();
        Self::new(subscription, &format!("{}@{published}", message.id))
    }
}

impl fmt::Display for JobKey {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}/{}", self.subscription, self.key)
    }
}

/// Carried by every write of a run. A write whose fence is no longer the
/// stored one changes nothing, so a stale worker can do no harm.
#[derive(Debug, Clone, PartialEq, Eq, Hash)]
pub struct Fence {
    pub key: JobKey,
    /// Grows with every claim of the job, never shrinks.
    pub attempt: u32,
    /// Drawn anew for every claim.
    pub token: Uuid,
}

/// A delivery's wish to run: what the store needs to insert the job's row.
#[derive(Debug, Clone)]
pub struct ClaimRequest {
    pub key: JobKey,
    /// The id the job gets if this claim is its first.
    pub job_id: Uuid,
    /// The lease token the run gets if the claim is acquired.
    pub token: Uuid,
    pub task: String,
    pub message: Message,
    /// How long after the lease's end a reaper may take the job over: at once
    /// when the message is acked with the claim, otherwise an ack deadline
    /// later, since Pub/Sub is to bring it back before.
    pub reap_delay: Duration,
    pub can: Can,
    pub limits: Limits,
}

/// What the worker that claims can do with the job.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Can {
    Run,
    /// It knows the task and has no room for it: the job is put on record, to
    /// be run by whoever has room first.
    Record,
    /// It does not know the task.
    RecordUnknown,
}

/// What ends a job without a run, where its worker was lost once too often.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Limits {
    /// The task's.
    pub max_attempts: u32,
    /// The subscription's: where the message of a dead job goes.
    pub dead_letter_topic: Option<Arc<str>>,
}

/// A job taken from the table rather than from a delivery: one that waits for
/// its turn, or an orphan whose worker is gone.
#[derive(Debug, Clone)]
pub struct Reaped {
    pub acquired: Acquired,
    pub task: String,
    pub message_id: String,
    pub ordering_key: String,
    /// The message's data.
    pub payload: Bytes,
}

/// A dead job's message, which is still to be published to `topic`.
#[derive(Debug, Clone)]
pub struct DeadLetter {
    pub job_id: Uuid,
    pub key: JobKey,
    pub topic: String,
    pub message: Message,
    pub reason: Option<String>,
    pub error: Option<String>,
    pub task: Option<String>,
    pub attempts: u32,
}

/// What asking to cancel a job came to.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Cancelling {
    /// It waited, and has ended.
    Cancelled,
    /// A worker runs it, and will be told within seconds.
    Requested,
    AlreadyEnded(FinalState),
}

/// What asking to run a job again came to.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Retrying {
    /// It had ended, and waits for a worker now.
    Queued,
    /// It waited for a later time, and may run at once now.
    Hurried,
    /// A worker runs it.
    Running,
    /// Its message names no task that can be read, or is no longer kept.
    NothingToRun,
}

/// Something that happened to a message, for people.
#[derive(Debug, Clone, PartialEq, Serialize)]
pub struct LedgerEntry {
    pub at: DateTime<Utc>,
    pub worker: String,
    pub kind: String,
    #[serde(skip_serializing_if = "Option::is_none")]
    pub attempt: Option<u32>,
    /// Where it is another message's than the job's first.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub message_id: Option<String>,
    #[serde(skip_serializing_if = "Option::is_none")]
    pub detail: Option<String>,
}

/// What a worker adds to a job's ledger by itself.
#[derive(Debug, Clone)]
pub struct Note {
    pub key: JobKey,
    pub kind: NoteKind,
    pub attempt: Option<u32>,
    pub detail: Option<String>,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum NoteKind {
    Acked,
    Checkpointed,
    LeaseLost,
}

impl NoteKind {
    #[must_use]
    pub fn as_str(self) -> &'static str {
        match self {
            Self::Acked => "acked",
            Self::Checkpointed => "checkpointed",
            Self::LeaseLost => "lease_lost",
        }
    }
}

/// A job with all that is on record about it.
#[derive(Debug, Clone, PartialEq, Serialize)]
pub struct Story {
    pub job: Job,
    pub ledger: Vec<LedgerEntry>,
}

/// The guard's answer to a delivery.
#[derive(Debug, Clone, PartialEq)]
pub enum Claim {
    /// The job is this worker's to run, under this fence, until its lease ends.
    Acquired(Acquired),
    /// The job has ended; the delivery is a duplicate.
    AlreadyFinished(FinalState),
    /// Another run holds the job; by then (this process's clock) its lease
    /// ends unless it is renewed. `acked`: the table, not Pub/Sub, is to bring
    /// it back, so that a delivery of it is not needed any more.
    HeldUntil { until: Instant, acked: bool },
    /// The job is on record and nobody runs it: it may not run before that
    /// time, or not yet by its ordering key, or not here.
    Waiting { until: Instant, acked: bool },
}

#[derive(Debug, Clone, PartialEq)]
pub struct Acquired {
    pub fence: Fence,
    pub job_id: Uuid,
    /// Taken just before the claim was sent: the lease cannot have begun
    /// earlier, so counting from here is safe whatever the clocks say.
    pub claimed_at: Instant,
    /// Attempts that count against the task's maximum, this one included.
    pub counted_attempts: u32,
    /// Where an earlier attempt left off.
    pub checkpoint: Option<Checkpoint>,
    /// Somebody asked to cancel the job while nobody could be told.
    pub cancel_requested: bool,
}

/// How a job can end. A job ends once.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum FinalState {
    Succeeded,
    /// It failed for good, or its message was refused; the reason is on record.
    Dead,
    Cancelled,
}

impl FinalState {
    #[must_use]
    pub fn as_str(self) -> &'static str {
        match self {
            Self::Succeeded => "succeeded",
            Self::Dead => "dead",
            Self::Cancelled => "cancelled",
        }
    }
}

/// A job's state as people see it.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum JobState {
    /// A worker holds its lease.
    Running,
    /// Unfinished, and no worker holds its lease, or the holder let it end.
    Waiting,
    Succeeded,
    Dead,
    Cancelled,
}

impl JobState {
    pub const NAMES: [&str; 5] = ["running", "waiting", "succeeded", "dead", "cancelled"];

    #[must_use]
    pub fn as_str(self) -> &'static str {
        match self {
            Self::Running => "running",
            Self::Waiting => "waiting",
            Self::Succeeded => "succeeded",
            Self::Dead => "dead",
            Self::Cancelled => "cancelled",
        }
    }
}

impl fmt::Display for JobState {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.pad(self.as_str())
    }
}

impl FromStr for JobState {
    type Err = String;

    fn from_str(name: &str) -> Result<Self, String> {
        match name {
            "running" => Ok(Self::Running),
            "waiting" => Ok(Self::Waiting),
            "succeeded" => Ok(Self::Succeeded),
            "dead" => Ok(Self::Dead),
            "cancelled" => Ok(Self::Cancelled),
            _ => Err(format!(
                "there is no state `{name}`; the states are {}",
                Self::NAMES.join(", ")
            )),
        }
    }
}

/// A job as the store tells it.
#[derive(Debug, Clone, PartialEq, Serialize)]
pub struct Job {
    pub id: Uuid,
    pub subscription: String,
    pub key: String,
    pub message_id: String,
    pub publish_time: DateTime<Utc>,
    #[serde(skip_serializing_if = "Option::is_none")]
    pub ordering_key: Option<String>,
    /// None when the message named no task that could be read.
    pub task: Option<String>,
    pub state: JobState,
    /// Executions begun, less those that a worker's own shutdown interrupted.
    pub attempts: u32,
    /// Deliveries that the guard did not let through.
    pub duplicates: u32,
    /// The worker that runs it, or that ran it last.
    pub worker: Option<String>,
    pub received_at: DateTime<Utc>,
    /// When its latest attempt began.
    pub started_at: Option<DateTime<Utc>>,
    pub finished_at: Option<DateTime<Utc>>,
    /// Why it is dead, or why its last attempt failed.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub error: Option<String>,
    /// Why it is dead, in one word.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub reason: Option<String>,
    #[serde(skip_serializing_if = "Option::is_none")]
    pub checkpoint: Option<String>,
    /// Before then a waiting job does not run.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub waits_until: Option<DateTime<Utc>>,
    #[serde(skip_serializing_if = "Option::is_none")]
    pub result: Option<serde_json::Value>,
    /// The message's data; only where one job is asked for.
    #[serde(skip)]
    pub payload: Option<Bytes>,
}

/// What an attempt has told about itself by its end.
#[derive(Debug, Clone, Default)]
pub struct Told {
    /// The outcome's name.
    pub outcome: &'static str,
    /// The last lines of its output.
    pub log: Vec<String>,
    /// Its progress reports, thinned where there were many.
    pub series: Vec<Progress>,
}

/// The same as it is on record.
#[derive(Debug, Clone, PartialEq, Serialize)]
pub struct AttemptRecord {
    pub attempt: u32,
    pub worker: String,
    pub ended_at: DateTime<Utc>,
    pub outcome: String,
    pub log: Vec<String>,
    pub series: Vec<Progress>,
}

/// Which jobs to list; an unset field lets every job through.
#[derive(Debug, Clone, Default)]
pub struct JobFilter {
    pub state: Option<JobState>,
    pub task: Option<String>,
    /// At most this many, newest first.
    pub limit: u32,
}

#[cfg(test)]
mod tests {
    use super::*;

    fn message(id: &str, micros: i64) -> Message {
        Message {
            id: id.to_owned(),
            publish_time: DateTime::from_timestamp_micros(micros).unwrap(),
            data: Bytes::new(),
            attributes: Default::default(),
            ordering_key: String::new(),
        }
    }

    #[test]
    fn a_redelivery_has_the_key_of_the_first_delivery() {
        let first = JobKey::of_message_id("s", &message("1", 5));
        assert_eq!(first, JobKey::of_message_id("s", &message("1", 5)));
    }

    #[test]
    fn a_reused_message_id_with_another_publish_time_is_a_new_key() {
        let first = JobKey::of_message_id("s", &message("1", 5));
        assert_ne!(first, JobKey::of_message_id("s", &message("1", 6)));
    }

    #[test]
    fn every_state_reads_back_from_its_name() {
        for name in JobState::NAMES {
            assert_eq!(name.parse::<JobState>().unwrap().as_str(), name);
        }
    }
}
