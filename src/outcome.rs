//! How a run ended, what is written about it, and what the broker is told.

use serde_json::Value;

use crate::job::FinalState;

/// How one attempt ended.
#[derive(Debug, Clone, PartialEq)]
pub enum Outcome {
    Succeeded(Value),
    Failed {
        error: String,
        /// It would fail again: malformed, or the task says so.
        permanent: bool,
    },
    TimedOut,
    Cancelled,
    /// The worker's own shutdown stopped it; costs no attempt.
    Interrupted,
    /// Its lease ended or was taken over; nothing may be written about it.
    LeaseLost,
}

/// What the broker is told about a delivery.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Disposition {
    Ack,
    Nack,
    /// Keep it, unsettled, and look again later.
    Hold,
}

/// What an outcome makes of its job.
#[derive(Debug, Clone, PartialEq)]
pub enum Verdict {
    /// The job ends.
    Finish(Ending),
    /// The claim is given back for another worker.
    Release,
    /// Another worker's word counts; this one writes nothing.
    Abandon,
}

/// The last thing written about a job.
#[derive(Debug, Clone, PartialEq)]
pub struct Ending {
    pub state: FinalState,
    pub error: Option<String>,
    pub result: Option<Value>,
}

impl Ending {
    #[must_use]
    pub fn dead(error: impl Into<String>) -> Self {
        Self {
            state: FinalState::Dead,
            error: Some(error.into()),
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

    /// The whole mapping from how a run ended to what becomes of its job.
    #[must_use]
    pub fn verdict(self) -> Verdict {
        match self {
            Self::Succeeded(result) => Verdict::Finish(Ending {
                state: FinalState::Succeeded,
                error: None,
                result: Some(result),
            }),
            Self::Failed { error, .. } => Verdict::Finish(Ending::dead(error)),
            Self::TimedOut => Verdict::Finish(Ending::dead("ran longer than its task's timeout")),
            Self::Cancelled => Verdict::Finish(Ending {
                state: FinalState::Cancelled,
                error: None,
                result: None,
            }),
            Self::Interrupted => Verdict::Release,
            Self::LeaseLost => Verdict::Abandon,
        }
    }
}
