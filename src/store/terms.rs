//! The store's arguments and answers.

use std::collections::BTreeMap;
use std::sync::Arc;
use std::time::Duration;

use uuid::Uuid;

use super::values::final_state;
use crate::job::{Fence, FinalState, JobKey, Limits};
use crate::message::Message;
use crate::outcome::{DeadReason, Ending};
use crate::report::Checkpoint;

/// Who claims, and for how long.
#[derive(Debug, Clone)]
pub struct ClaimTerms {
    pub worker: Arc<str>,
    pub lease: Duration,
    /// A job whose lease has expired this many times without a word from its worker ends
    /// dead instead of being taken over again: it may be what kills the workers.
    pub max_crashes: u32,
}

/// A run's last write when its job ends.
#[derive(Debug, Clone)]
pub struct Finish {
    pub fence: Fence,
    pub ending: Ending,
    /// The run's last checkpoint, if it had any.
    pub checkpoint: Option<Checkpoint>,
    /// Where the message goes if the ending is dead.
    pub dead_letter_topic: Option<Arc<str>>,
}

/// What became of a [`Finish`].
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Finished {
    /// This run ended the job, now or by an earlier call.
    Ended,
    /// The job is not this run's any more.
    NotMine,
    /// Another session has locked the job's row. Nothing has happened yet.
    Locked,
}

/// A run's last write when its job goes on.
#[derive(Debug, Clone)]
pub struct Release {
    pub fence: Fence,
    pub why: Released,
    /// The run's last checkpoint, if it had any.
    pub checkpoint: Option<Checkpoint>,
}

#[derive(Debug, Clone, PartialEq)]
pub enum Released {
    /// Not the run's fault: the attempt does not count.
    Interrupted,
    /// The attempt counts; the next one comes after `retry_in`.
    Failed { error: String, retry_in: Duration },
}

impl Released {
    /// The same without what a program or a task has said, for a database that does not take
    /// that.
    #[must_use]
    pub fn without_words(&self) -> Self {
        match self {
            Self::Interrupted => Self::Interrupted,
            Self::Failed { retry_in, .. } => Self::Failed {
                error: "the database refused its error; the worker's log says why".to_owned(),
                retry_in: *retry_in,
            },
        }
    }

    /// As column values: attempts that do not count, how long the job waits, its error,
    /// and the kind of the ledger's entry.
    pub(super) fn columns(&self) -> (i32, Duration, Option<&str>, &'static str) {
        match self {
            Self::Interrupted => (1, Duration::ZERO, None, "released"),
            Self::Failed { error, retry_in } => (0, *retry_in, Some(error), "failed"),
        }
    }
}

/// What a worker may take from the table: jobs that it could also have pulled and has
/// room for, with their limits.
#[derive(Debug, Clone, Default)]
pub struct Reach {
    /// Each with its dead-letter topic.
    pub subscriptions: BTreeMap<String, Option<Arc<str>>>,
    pub tasks: BTreeMap<String, TaskTerms>,
}

/// What a worker needs to know to take a task's job from the table.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct TaskTerms {
    pub max_attempts: u32,
    /// The message is acked once a claim has committed. From then on the table brings the
    /// job back.
    pub acked_when_claimed: bool,
}

impl Reach {
    /// The limits that end a job without a run.
    #[must_use]
    pub fn limits(&self, subscription: &str, task: &str) -> Limits {
        Limits {
            max_attempts: self
                .tasks
                .get(task)
                .map_or(u32::MAX, |task| task.max_attempts),
            dead_letter_topic: self.subscriptions.get(subscription).cloned().flatten(),
        }
    }

    /// Whether the message of such a job is acked once it is claimed.
    #[must_use]
    pub fn acked_when_claimed(&self, task: &str) -> bool {
        self.tasks
            .get(task)
            .is_some_and(|task| task.acked_when_claimed)
    }
}

/// A message that will never run, and why.
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

/// Which dead letters to return.
#[derive(Debug, Clone)]
pub struct DeadLettersDue {
    /// Only those of jobs that this worker ran last or refused.
    pub worker: Option<Arc<str>>,
    /// Only those that have waited for at least this long.
    pub at_least: Duration,
    /// None for these topics.
    pub not_to: Vec<String>,
    /// No other worker gets them for this long.
    pub time_to_publish: Duration,
    pub limit: u32,
}

/// How long a task counts as known after a live worker has said that it knows it.
pub const KNOWN_FOR: Duration = Duration::from_secs(30);

/// How long a job waits for a worker that knows its task: from when it came into the queue
/// if it has never run, or else from when it could have run.
#[derive(Debug, Clone, Copy)]
pub struct Patience {
    pub lasts: Duration,
    /// Includes tasks that a worker knew once, from when the last one said so. If not, their
    /// jobs wait on.
    pub forgotten: bool,
}

/// A job that may have to be given up.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct UnknownJob {
    pub key: JobKey,
    pub task: String,
}

/// What to record about a job whose task no worker knew.
#[derive(Debug, Clone)]
pub struct GivenUp {
    pub key: JobKey,
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
    pub(super) fn read(recorded: bool, state: &str) -> Self {
        if recorded {
            return Self::Recorded;
        }
        final_state(state).map_or(Self::Claimed, Self::AlreadyFinished)
    }
}

/// How a job stands when the holder of its delivery looks again.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Standing {
    Finished(FinalState),
    /// Some run holds the job for this much longer, unless it renews. `acked`: the queue
    /// brings the job back if that run is lost.
    Running {
        remaining: Duration,
        acked: bool,
    },
    /// The job waits in the queue for this much longer, or for a worker with room.
    Waiting {
        remaining: Duration,
    },
    /// The run's lease has expired: a delivery may claim the job now.
    Lost,
    /// The job is not on record: a delivery may claim it anew.
    Missing,
}
