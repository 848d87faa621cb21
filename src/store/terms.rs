//! What the store is asked with, and what it answers.

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

/// What became of a [`Finish`].
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Finished {
    /// This run ended the job, now or by an earlier call.
    Ended,
    /// The job is not this run's any more.
    NotMine,
    /// Another session has locked the job's row: nothing has happened yet.
    Locked,
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
    pub(super) fn columns(&self) -> (i32, Duration, Option<&str>, &'static str) {
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
    /// What ends a job of theirs without a run.
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

    /// Whether an ack of such a job's message waits for a claim only.
    #[must_use]
    pub fn acked_when_claimed(&self, task: &str) -> bool {
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

/// What a held delivery finds when it looks again.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Standing {
    Finished(FinalState),
    /// Some run holds the job for this much longer, unless it renews. `acked`:
    /// the queue brings the job back if that run is lost.
    Held {
        remaining: Duration,
        acked: bool,
    },
    /// It waits in the queue for this much longer, or for a worker with room.
    Waiting {
        remaining: Duration,
    },
    /// The lease of its run has expired: a delivery may claim it now.
    Lost,
    /// It is not on record: a delivery may claim it anew.
    Missing,
}
