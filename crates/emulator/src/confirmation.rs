//! The results for the ack ids of one request.

use std::collections::BTreeMap;

use super::error::{BrokerError, TEMPORARY};

/// Pub/Sub's name for an ack id that is not, or no longer, valid.
pub const INVALID: &str = "PERMANENT_FAILURE_INVALID_ACK_ID";

/// Ack ids by result. Clients see it only on subscriptions with exactly-once delivery; on
/// others, all count as done.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Confirmation {
    pub done: Vec<String>,
    /// Not ack ids, or superseded, or past their ack deadline.
    pub invalid: Vec<String>,
    /// Not settled; should be retried.
    pub temporary: Vec<String>,
}

impl Confirmation {
    /// The answer to a unary call, which succeeds as a whole or lists the failed ack ids.
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
