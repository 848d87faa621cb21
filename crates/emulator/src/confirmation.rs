//! What became of the ack ids of one request.

use std::collections::BTreeMap;

use super::error::BrokerError;

/// How Pub/Sub names an ack id that is not, or no longer, good.
pub const INVALID: &str = "PERMANENT_FAILURE_INVALID_ACK_ID";

/// How Pub/Sub names an ack that is to be tried again.
pub const TEMPORARY: &str = "TRANSIENT_FAILURE_SERVICE_UNAVAILABLE";

/// Ack ids by what became of them. Clients hear of it on subscriptions with
/// exactly-once delivery only; on others, all count as done.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Confirmation {
    pub done: Vec<String>,
    /// Not ack ids, or superseded, or past their ack deadline.
    pub invalid: Vec<String>,
    /// Not settled, and to be tried again.
    pub temporary: Vec<String>,
}

impl Confirmation {
    /// The answer to a unary call, which succeeds as a whole or tells which
    /// ack ids failed.
    ///
    /// # Errors
    /// `AckIds` if any failed.
    pub fn into_answer(self) -> Result<(), BrokerError> {
        let invalid = self.invalid.into_iter().map(|id| (id, INVALID));
        let temporary = self.temporary.into_iter().map(|id| (id, TEMPORARY));
        let failed: BTreeMap<_, _> = invalid.chain(temporary).collect();
        if failed.is_empty() {
            return Ok(());
        }
        Err(BrokerError::AckIds(failed))
    }
}
