//! One arrival of a message, with the means to settle it.

use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};

use google_cloud_pubsub::subscriber::handler::Handler;
use tokio_util::sync::CancellationToken;
use tokio_util::task::TaskTracker;

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

/// The stream that a delivery came on.
#[derive(Debug)]
pub(super) struct Origin {
    /// Asks for the stream to be closed.
    pub(super) close: CancellationToken,
    /// Tells that no more messages come on it.
    pub(super) closed: CancellationToken,
    /// Deliveries of it that are not settled.
    unsettled: AtomicUsize,
    /// Has everything that must be over before the subscription is.
    settling: TaskTracker,
}

impl Origin {
    pub(super) fn new(settling: TaskTracker) -> Self {
        Self {
            close: CancellationToken::new(),
            closed: CancellationToken::new(),
            unsettled: AtomicUsize::new(0),
            settling,
        }
    }

    /// Whether the stream can bring a message.
    pub(super) fn listens(&self) -> bool {
        !self.close.is_cancelled() && self.unsettled.load(Ordering::Acquire) == 0
    }
}

impl Delivery {
    pub(super) fn new(message: Message, handler: Handler, origin: Arc<Origin>) -> Self {
        origin.unsettled.fetch_add(1, Ordering::AcqRel);
        Self {
            message,
            attempt: handler.delivery_attempt(),
            receipt: Receipt {
                handler,
                unsettled: Unsettled(origin),
            },
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
    unsettled: Unsettled,
}

/// Counts one delivery as unsettled on its stream, until dropped.
#[derive(Debug)]
struct Unsettled(Arc<Origin>);

impl Drop for Unsettled {
    fn drop(&mut self) {
        self.0.unsettled.fetch_sub(1, Ordering::AcqRel);
    }
}

impl Receipt {
    /// Tells the broker that the message is settled. Best effort: the ack may
    /// get lost and the message come again, which the guard then answers.
    pub fn ack(self) {
        self.handler.ack();
    }

    /// As [`Receipt::ack`] for a message whose job still keeps a slot: no
    /// other message may come in its place.
    pub fn ack_early(self) {
        self.settle_without_a_successor(Handler::ack);
    }

    /// Hands the message back for redelivery, now.
    pub fn nack(self) {
        self.handler.nack();
    }

    /// As [`Receipt::nack`] for a message that this worker has no slot for: it
    /// must not come back here.
    pub fn hand_back(self) {
        self.settle_without_a_successor(Handler::nack);
    }

    fn settle_without_a_successor(self, tell: fn(Handler)) {
        let Self { handler, unsettled } = self;
        unsettled.0.close.cancel();
        let settling = unsettled.0.settling.clone();
        settling.spawn(async move {
            unsettled.0.closed.cancelled().await;
            tell(handler);
        });
    }
}
