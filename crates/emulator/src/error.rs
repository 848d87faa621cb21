//! The broker's answers to requests that it refuses.

use std::collections::BTreeMap;

/// Pub/Sub's name for an ack that should be retried.
pub const TEMPORARY: &str = "TRANSIENT_FAILURE_SERVICE_UNAVAILABLE";

/// A refusal. Each variant but the last is the gRPC status of the same name; the text is
/// what the client sees.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum BrokerError {
    /// The named topic, subscription or message does not exist.
    #[error("{0}")]
    NotFound(String),
    /// A topic or subscription of that name exists already.
    #[error("{0}")]
    AlreadyExists(String),
    /// The request breaks a rule of Pub/Sub; repeating it will not help.
    #[error("{0}")]
    InvalidArgument(String),
    /// The memory for messages is used up; acknowledging messages frees it.
    #[error("{0}")]
    ResourceExhausted(String),
    /// Real Pub/Sub has this feature, the emulator does not.
    #[error("{0}")]
    Unimplemented(String),
    /// The emulator is shutting down.
    #[error("{0}")]
    Unavailable(String),
    /// Some ack ids of a subscription with exactly-once delivery could not be settled;
    /// the others were. Each comes with Pub/Sub's name for the reason:
    /// <https://cloud.google.com/pubsub/docs/exactly-once-delivery>.
    #[error("{} of the request's ack IDs could not be settled.", .0.len())]
    AckIds(BTreeMap<String, &'static str>),
}

/// Values of `google.rpc.ErrorInfo` for failed ack ids.
pub(super) const ACK_IDS_REASON: &str = "EXACTLY_ONCE_ACKID_FAILURE";
pub(super) const DOMAIN: &str = "pubsub.googleapis.com";

impl BrokerError {
    /// Whether all failed ack ids may be retried.
    pub(super) fn is_temporary(failed: &BTreeMap<String, &'static str>) -> bool {
        failed.values().all(|why| *why == TEMPORARY)
    }

    pub(super) fn not_found(resource: &str) -> Self {
        Self::NotFound(format!("Resource not found (resource={resource})."))
    }

    pub(super) fn already_exists(resource: &str) -> Self {
        Self::AlreadyExists(format!(
            "Resource already exists in the project (resource={resource})."
        ))
    }

    pub(super) fn unimplemented(what: &str) -> Self {
        Self::Unimplemented(format!("The emulator does not implement {what}."))
    }

    pub(super) fn shutting_down() -> Self {
        Self::Unavailable("The emulator is shutting down.".to_owned())
    }
}
