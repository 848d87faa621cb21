//! Records about jobs, as people and programs read them.

use std::fmt;
use std::str::FromStr;

use bytes::Bytes;
use chrono::{DateTime, Utc};
use serde::{Deserialize, Serialize};
use uuid::Uuid;

use crate::job::{FinalState, JobKey};
use crate::json::Json;
use crate::report::Progress;

/// The result of asking to cancel a job.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Cancelling {
    /// It was waiting, and has ended.
    Cancelled,
    /// A worker runs it, and hears of the request within seconds.
    Requested,
    AlreadyEnded(FinalState),
}

/// The result of asking to run a job again.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Retrying {
    /// It had ended, and now waits for a worker.
    Queued,
    /// It was waiting for a later time, and may now run at once.
    Hurried,
    /// A worker runs it.
    Running,
    /// Its message names no readable task, or is no longer kept.
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
    /// Set if it is not the job's first message.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub message_id: Option<String>,
    #[serde(skip_serializing_if = "Option::is_none")]
    pub detail: Option<String>,
}

/// A worker's own addition to a job's ledger.
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

/// A task that no live worker knows, with how many of its jobs wait.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct UnknownTask {
    pub subscription: String,
    pub task: String,
    pub jobs: u64,
}

/// A job with everything on record about it.
#[derive(Debug, Clone, PartialEq, Serialize)]
pub struct Story {
    pub job: Job,
    pub ledger: Vec<LedgerEntry>,
}

/// A job's state as people see it.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum JobState {
    /// A worker holds its lease.
    Running,
    /// Unfinished, and no worker holds its lease, or the lease has expired.
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

/// A job as the store returns it.
#[derive(Debug, Clone, PartialEq, Serialize)]
pub struct Job {
    pub id: Uuid,
    pub subscription: String,
    pub key: String,
    pub message_id: String,
    pub publish_time: DateTime<Utc>,
    #[serde(skip_serializing_if = "Option::is_none")]
    pub ordering_key: Option<String>,
    /// None if the message named no readable task.
    pub task: Option<String>,
    pub state: JobState,
    /// Attempts begun, except those that a worker's own shutdown interrupted.
    pub attempts: u32,
    /// Deliveries that the guard did not let through.
    pub duplicates: u32,
    /// The worker that runs it, or ran it last.
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
    /// A waiting job does not run before then.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub waits_until: Option<DateTime<Utc>>,
    /// What a waiting job waits for: its `turn` in its ordering key, a worker that knows
    /// its `task`, its next `attempt`, or `room`.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub waits_for: Option<String>,
    #[serde(skip_serializing_if = "Option::is_none")]
    pub result: Option<Json>,
    /// The message's data; only set when one job is read.
    #[serde(skip)]
    pub payload: Option<Bytes>,
}

/// An attempt's own report so far.
#[derive(Debug, Clone, Default)]
pub struct AttemptReport {
    /// The outcome's name.
    pub outcome: &'static str,
    /// The last lines of its output.
    pub log: Vec<String>,
    /// Its progress reports, thinned if there were many.
    pub series: Vec<Progress>,
}

/// An attempt's report as stored.
#[derive(Debug, Clone, PartialEq, Serialize)]
pub struct AttemptRecord {
    pub attempt: u32,
    pub worker: String,
    pub ended_at: DateTime<Utc>,
    pub outcome: String,
    pub log: Vec<String>,
    pub series: Vec<Progress>,
}

/// Which jobs to list; an unset field matches every job.
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

    #[test]
    fn every_state_reads_back_from_its_name() {
        for name in JobState::NAMES {
            assert_eq!(name.parse::<JobState>().unwrap().as_str(), name);
        }
    }
}
