//! What is on record about jobs, as people and programs read it.

use std::fmt;
use std::str::FromStr;

use bytes::Bytes;
use chrono::{DateTime, Utc};
use serde::{Deserialize, Serialize};
use uuid::Uuid;

use crate::job::{FinalState, JobKey};
use crate::report::Progress;

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
    /// What a waiting job waits for: `turn` in its ordering key, `task` (a
    /// worker that knows it), next `attempt`, `room`.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub waits_for: Option<String>,
    #[serde(skip_serializing_if = "Option::is_none")]
    pub result: Option<serde_json::Value>,
    /// The message's data; only where one job is asked for.
    #[serde(skip)]
    pub payload: Option<Bytes>,
}

/// What an attempt has reported about itself so far.
#[derive(Debug, Clone, Default)]
pub struct AttemptReport {
    /// The outcome's name.
    pub outcome: &'static str,
    /// The last lines of its output.
    pub log: Vec<String>,
    /// Its progress reports, thinned where there were many.
    pub series: Vec<Progress>,
}

/// An attempt's report as it is on record.
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

    #[test]
    fn every_state_reads_back_from_its_name() {
        for name in JobState::NAMES {
            assert_eq!(name.parse::<JobState>().unwrap().as_str(), name);
        }
    }
}
