//! One arrival of a message, with the means to settle it.

use google_cloud_pubsub::subscriber::handler::Handler;

use crate::message::Message;

/// A delivery. While it exists, its ack deadline is being extended; dropped
/// without an ack, it is handed back at once (nack), whatever made it drop.
#[derive(Debug)]
pub struct Delivery {
    pub message: Message,
    /// Counted by the broker, where the subscription has a dead-letter policy.
    pub attempt: Option<i32>,
    receipt: Receipt,
}

impl Delivery {
    pub(super) fn new(message: Message, handler: Handler) -> Self {
        Self {
            message,
            attempt: handler.delivery_attempt(),
            receipt: Receipt { handler },
        }
    }

    /// The message, and what is needed to settle it later.
    #[must_use]
    pub fn into_parts(self) -> (Message, Receipt) {
        (self.message, self.receipt)
    }
}

/// The right to settle a delivery, once. Dropping it hands the message back.
#[derive(Debug)]
pub struct Receipt {
    handler: Handler,
}

impl Receipt {
    /// Tells the broker that the message is settled. Best effort: the ack may
    /// get lost and the message come again, which the guard then answers.
    pub fn ack(self) {
        self.handler.ack();
    }

    /// Hands the message back for redelivery, now.
    pub fn nack(self) {
        self.handler.nack();
    }
}
