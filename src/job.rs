//! One message's requested run of a task: its key, its fence, its state.

use std::fmt;
use std::sync::Arc;
use std::time::Duration;

use bytes::Bytes;
use chrono::{DateTime, Utc};
use serde::{Deserialize, Serialize};
use tokio::time::Instant;
use uuid::Uuid;

use crate::message::Message;
use crate::report::Checkpoint;

/// The guard's deduplication key: unique per subscription and message, so two
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
    /// It includes the publish time: a broker that restarts its ids (Google's emulator
    /// begins at 1 each time) reuses an id for another message, which has another publish
    /// time. A redelivery has the same.
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

/// Every write of a run carries it. A write whose fence is no longer the stored one
/// changes nothing, so a stale worker can do no harm.
#[derive(Debug, Clone, PartialEq, Eq, Hash)]
pub struct Fence {
    pub key: JobKey,
    /// Grows with every claim of the job, never shrinks.
    pub attempt: u32,
    /// Drawn anew for every claim.
    pub token: Uuid,
}

/// A delivery's request to run: what the store needs to insert the job's row.
#[derive(Debug, Clone)]
pub struct ClaimRequest {
    pub key: JobKey,
    /// The id the job gets if this claim is its first.
    pub job_id: Uuid,
    /// The lease token the run gets if the claim is acquired.
    pub token: Uuid,
    pub task: String,
    pub message: Message,
    pub can: Can,
    pub ack: AckTerms,
    pub limits: Limits,
}

/// When the message is acked. It decides who brings the job back if its worker is lost.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct AckTerms {
    /// The message is acked once the claim has committed, so a sweep takes a lost job
    /// over as soon as its lease has expired.
    pub with_claim: bool,
    /// Otherwise Pub/Sub redelivers the message, and a sweep waits this long after the
    /// lease expires before it takes the job over.
    pub deadline: Duration,
}

impl AckTerms {
    /// How long a sweep waits after a lease expires.
    #[must_use]
    pub fn reap_delay(&self, runs: bool) -> Duration {
        match runs && self.with_claim {
            true => Duration::ZERO,
            false => self.deadline,
        }
    }
}

/// What the claiming worker can do with the job.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Can {
    /// Run it, and take it over from a worker whose lease has expired.
    Run,
    /// Run it unless somebody has begun to: the holder of an expired lease may be about
    /// to renew it.
    RunUnlessLost,
    /// Only record it, for whoever has room first: this worker has none.
    Record,
    /// Only record it: this worker does not know the task.
    RecordUnknown,
}

impl Can {
    /// The same without taking a lost job over.
    #[must_use]
    pub fn unless_lost(self) -> Self {
        match self {
            Self::Run => Self::RunUnlessLost,
            other => other,
        }
    }

    #[must_use]
    pub fn run(self) -> bool {
        matches!(self, Self::Run | Self::RunUnlessLost)
    }
}

/// When a job ends without another run because its worker was lost too often, and where
/// its message goes then.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Limits {
    /// The task's maximum.
    pub max_attempts: u32,
    /// The subscription's topic for the messages of dead jobs.
    pub dead_letter_topic: Option<Arc<str>>,
}

/// A job in the queue that could be taken now.
#[derive(Debug, Clone, PartialEq)]
pub struct DueJob {
    pub key: JobKey,
    pub task: String,
    /// How long it could have been running, by the database's clock.
    pub waited: Duration,
    /// Its worker is lost; otherwise it waits.
    pub is_lost: bool,
}

/// A due job that a worker has room for and wants to take.
#[derive(Debug, Clone)]
pub struct Pick {
    pub key: JobKey,
    /// The lease token that the run gets.
    pub token: Uuid,
    /// The message is acked once the job is claimed.
    pub acked_when_claimed: bool,
    pub limits: Limits,
}

/// A job taken from the queue, rather than claimed by a delivery.
#[derive(Debug, Clone)]
pub struct Taken {
    pub acquired: Acquired,
    pub task: String,
    pub message_id: String,
    pub ordering_key: String,
    /// The message's data.
    pub payload: Bytes,
}

/// The result of renewing a lease.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Renewal {
    Renewed,
    /// The fence no longer holds.
    Lost,
    /// Another transaction has locked the row: nothing has changed so far.
    Unknown,
}

/// A dead job's message, still to be published to `topic`.
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
    /// Tells this death of the job from one after a retry.
    pub died_at: DateTime<Utc>,
}

/// The guard's answer to a delivery.
#[derive(Debug, Clone, PartialEq)]
pub enum Claim {
    /// This worker may run the job, under this fence, until its lease ends.
    Acquired(Acquired),
    /// The job has ended; the delivery is a duplicate.
    AlreadyFinished(FinalState),
    /// Another run holds the job. Its lease expires at `until`, by this process's clock,
    /// unless it is renewed. `acked`: the queue, not Pub/Sub, brings the job back, so its
    /// deliveries are not needed any more.
    RunningUntil { until: Instant, acked: bool },
    /// The job is on record and nobody runs it: it may not run before `until`, or its
    /// ordering key or this worker does not allow it yet. `acked` as above.
    Waiting { until: Instant, acked: bool },
}

#[derive(Debug, Clone, PartialEq)]
pub struct Acquired {
    pub fence: Fence,
    pub job_id: Uuid,
    /// Taken just before the claim was sent. The lease cannot have begun earlier, so
    /// counting from here is safe whatever the clocks say.
    pub claimed_at: Instant,
    /// Attempts that count against the task's maximum, including this one.
    pub counted_attempts: u32,
    /// Where an earlier attempt left off.
    pub checkpoint: Option<Checkpoint>,
    /// Somebody asked to cancel the job while no run could be told.
    pub cancel_requested: bool,
}

/// How a job can end. A job ends once.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum FinalState {
    Succeeded,
    /// It failed for good, or its message was refused; the record has the reason.
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

#[cfg(test)]
mod tests {
    use chrono::DateTime;

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
}
