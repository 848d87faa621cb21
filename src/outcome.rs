//! How a run ended, and what is written about it.

use std::time::Duration;

use crate::job::FinalState;
use crate::json::Json;
use crate::retry::RetryPolicy;

/// How one attempt ended.
#[derive(Debug, Clone, PartialEq)]
pub enum Outcome {
    Succeeded(Json),
    Failed {
        error: String,
        /// It would fail at every attempt.
        permanent: bool,
    },
    TimedOut,
    Cancelled,
    /// The worker's shutdown stopped it. The attempt does not count.
    Interrupted,
    /// Its lease expired or was taken over. After a takeover its writes change
    /// nothing.
    LeaseLost,
}

/// What happens to the job after an outcome.
#[derive(Debug, Clone, PartialEq)]
pub enum Verdict {
    /// The job ends.
    Finish(Ending),
    /// The job waits in the table, and runs again after this time.
    Retry { error: String, after: Duration },
    /// The claim is released for another worker.
    Release,
    /// The claim is released unless another worker has taken it over. The attempt
    /// counts.
    Abandon,
}

/// The final state of a job, as it is written.
#[derive(Debug, Clone, PartialEq)]
pub struct Ending {
    pub state: FinalState,
    /// Set if the state is dead.
    pub reason: Option<DeadReason>,
    pub error: Option<String>,
    pub result: Option<Json>,
}

/// Why a job is dead: the `trainyard-reason` attribute of its dead letter.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum DeadReason {
    /// The message is not a request.
    Malformed,
    /// The message lacks the subscription's `dedupe_key`.
    NoDedupeKey,
    /// No worker knew the task within `unknown_task_patience`.
    UnknownTask,
    /// The task reported a permanent error.
    Permanent,
    AttemptsExhausted,
    /// Too many workers crashed while running it.
    WorkerLost,
}

impl DeadReason {
    #[must_use]
    pub fn as_str(self) -> &'static str {
        match self {
            Self::Malformed => "malformed",
            Self::NoDedupeKey => "no_dedupe_key",
            Self::UnknownTask => "unknown_task",
            Self::Permanent => "permanent",
            Self::AttemptsExhausted => "attempts_exhausted",
            Self::WorkerLost => "worker_lost",
        }
    }
}

impl Ending {
    #[must_use]
    pub fn dead(reason: DeadReason, error: impl Into<String>) -> Self {
        Self {
            state: FinalState::Dead,
            reason: Some(reason),
            error: Some(error.into()),
            result: None,
        }
    }

    #[must_use]
    pub fn succeeded(result: impl Into<Json>) -> Self {
        Self {
            state: FinalState::Succeeded,
            reason: None,
            error: None,
            result: Some(result.into()),
        }
    }

    /// The same end without what a program or a task has said, for a database that does not
    /// take that.
    #[must_use]
    pub fn without_words(&self) -> Self {
        let error = match self.state {
            FinalState::Succeeded => Some("it succeeded, but the database refused its result"),
            FinalState::Dead => Some("the database refused its error"),
            FinalState::Cancelled => None,
        };
        Self {
            error: error.map(|error| format!("{error}; the worker's log says why")),
            result: None,
            ..self.clone()
        }
    }

    #[must_use]
    pub fn cancelled() -> Self {
        Self {
            state: FinalState::Cancelled,
            reason: None,
            error: None,
            result: None,
        }
    }
}

impl Outcome {
    #[must_use]
    pub fn failed(error: impl Into<String>) -> Self {
        Self::Failed {
            error: error.into(),
            permanent: false,
        }
    }

    #[must_use]
    pub fn name(&self) -> &'static str {
        match self {
            Self::Succeeded(_) => "succeeded",
            Self::Failed { .. } => "failed",
            Self::TimedOut => "timed_out",
            Self::Cancelled => "cancelled",
            Self::Interrupted => "interrupted",
            Self::LeaseLost => "lease_lost",
        }
    }

    /// Maps the outcome to the job's verdict. `attempts` are those that count,
    /// including this one.
    #[must_use]
    pub fn verdict(self, policy: &RetryPolicy, attempts: u32) -> Verdict {
        match self {
            Self::Succeeded(result) => Verdict::Finish(Ending::succeeded(result)),
            Self::Failed {
                error,
                permanent: true,
            } => Verdict::Finish(Ending::dead(DeadReason::Permanent, error)),
            Self::Failed { error, .. } => again_or_dead(error, policy, attempts),
            Self::TimedOut => {
                let error = "ran longer than its task's timeout".to_owned();
                again_or_dead(error, policy, attempts)
            }
            Self::Cancelled => Verdict::Finish(Ending::cancelled()),
            Self::Interrupted => Verdict::Release,
            Self::LeaseLost if attempts >= policy.max_attempts => {
                let error = "its worker lost the lease during its last attempt";
                Verdict::Finish(Ending::dead(DeadReason::WorkerLost, error))
            }
            Self::LeaseLost => Verdict::Abandon,
        }
    }
}

/// Retries the job unless its attempts are used up.
fn again_or_dead(error: String, policy: &RetryPolicy, attempts: u32) -> Verdict {
    if attempts >= policy.max_attempts {
        return Verdict::Finish(Ending::dead(DeadReason::AttemptsExhausted, error));
    }
    Verdict::Retry {
        error,
        after: policy.delay_after(attempts),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn verdict(outcome: Outcome, attempts: u32) -> Verdict {
        outcome.verdict(&RetryPolicy::default(), attempts)
    }

    fn reason(verdict: Verdict) -> Option<DeadReason> {
        match verdict {
            Verdict::Finish(ending) => ending.reason,
            other => panic!("not finished: {other:?}"),
        }
    }

    #[test]
    fn an_unknown_error_is_tried_again_until_the_attempts_are_used_up() {
        for outcome in [Outcome::failed("disk full"), Outcome::TimedOut] {
            assert!(matches!(verdict(outcome.clone(), 1), Verdict::Retry { .. }));
            assert!(matches!(verdict(outcome.clone(), 2), Verdict::Retry { .. }));
            let dead = verdict(outcome, 3);
            assert_eq!(reason(dead), Some(DeadReason::AttemptsExhausted));
        }
    }

    #[test]
    fn a_permanent_error_ends_the_job_at_its_first_attempt() {
        let outcome = Outcome::Failed {
            error: "no such column".to_owned(),
            permanent: true,
        };
        assert_eq!(reason(verdict(outcome, 1)), Some(DeadReason::Permanent));
    }
}
