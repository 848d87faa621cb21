//! One arrival of a message, with the means to settle it.

use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use google_cloud_pubsub::subscriber::handler::Handler;
use tokio::time::{Instant, sleep};
use tokio_util::sync::CancellationToken;
use tokio_util::task::TaskTracker;
use tracing::warn;

use super::counters::Counters;
use crate::message::Message;

/// The broker learns of a stream's end and of an ack on different paths. If the ack is
/// quicker, the next message goes into a stream that nobody reads, and is redelivered
/// only after its ack deadline.
const AFTER_CLOSING: Duration = Duration::from_millis(100);

/// A broker that ignores limits sends what it has without such a pause.
const BURST: Duration = Duration::from_secs(1);

/// A delivery. Its ack deadline is extended for as long as it exists; dropping it without
/// an ack nacks it at once.
#[derive(Debug)]
pub struct Delivery {
    pub message: Message,
    /// Counted by the broker if the subscription has a dead-letter policy.
    pub attempt: Option<i32>,
    receipt: Receipt,
}

/// The stream that a delivery came on.
#[derive(Debug)]
pub(super) struct Origin {
    /// Requests that the stream be closed.
    pub(super) close: CancellationToken,
    /// Set once no more messages arrive on it.
    pub(super) closed: CancellationToken,
    /// How many of its deliveries may be unsettled at a time.
    capacity: usize,
    /// Deliveries that are not settled yet.
    unsettled: AtomicUsize,
    /// The unsettled ones that are held for long.
    held: AtomicUsize,
    times: Mutex<Times>,
    /// The generation of the client that opened it.
    pub(super) generation: u64,
    pub(super) counters: Arc<Counters>,
    /// Tracks what must finish before the subscription does.
    settling: TaskTracker,
}

/// When something last happened on a stream.
#[derive(Debug)]
struct Times {
    delivered: Option<Instant>,
    /// When room for another delivery appeared.
    got_room: Instant,
}

impl Origin {
    pub(super) fn new(
        capacity: usize,
        generation: u64,
        counters: Arc<Counters>,
        settling: TaskTracker,
    ) -> Self {
        Self {
            close: CancellationToken::new(),
            closed: CancellationToken::new(),
            capacity,
            unsettled: AtomicUsize::new(0),
            held: AtomicUsize::new(0),
            times: Mutex::new(Times {
                delivered: None,
                got_room: Instant::now(),
            }),
            generation,
            counters,
            settling,
        }
    }

    /// Whether the stream is open and can bring a message.
    pub(super) fn listens(&self) -> bool {
        !self.close.is_cancelled() && self.has_room()
    }

    /// Whether the broker may send a message on it.
    pub(super) fn has_room(&self) -> bool {
        self.unsettled.load(Ordering::Acquire) < self.capacity
    }

    /// Since when the broker may send a message on it; None while it has no room.
    pub(super) fn room_since(&self) -> Option<Instant> {
        self.has_room().then(|| self.times().got_room)
    }

    /// Notes a delivery. Returns whether it came right after another one.
    fn delivers(&self) -> bool {
        let before = self.times().delivered.replace(Instant::now());
        before.is_some_and(|before| before.elapsed() < BURST)
    }

    fn times(&self) -> MutexGuard<'_, Times> {
        self.times.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Whether held deliveries take up much of the stream's capacity, so that it is worth
    /// closing. Their ack deadlines are extended without it.
    pub(super) fn is_clogged(&self) -> bool {
        let held = self.held.load(Ordering::Acquire);
        held > 0 && held * 2 >= self.capacity
    }
}

impl Delivery {
    pub(super) fn new(message: Message, handler: Handler, origin: Arc<Origin>) -> Self {
        let unsettled = origin.unsettled.fetch_add(1, Ordering::AcqRel);
        let right_after_another = origin.delivers();
        origin.counters.deliveries.add_one();
        if unsettled >= origin.capacity {
            origin.counters.add_surplus(right_after_another);
        }
        Self {
            message,
            attempt: handler.delivery_attempt(),
            receipt: Receipt {
                handler,
                unsettled: Unsettled {
                    origin,
                    is_held: false,
                },
            },
        }
    }

    /// The message, and the receipt that settles it later.
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
struct Unsettled {
    origin: Arc<Origin>,
    is_held: bool,
}

impl Drop for Unsettled {
    fn drop(&mut self) {
        if !self.origin.has_room() {
            self.origin.times().got_room = Instant::now();
        }
        self.origin.unsettled.fetch_sub(1, Ordering::AcqRel);
        if self.is_held {
            self.origin.held.fetch_sub(1, Ordering::AcqRel);
        }
    }
}

impl Receipt {
    /// Acknowledges the message. Best effort: the ack may get lost and the message be
    /// redelivered; the guard then answers it. An exactly-once subscription reports an
    /// ack that was not confirmed, which is counted; even then the guard's table decides.
    pub fn ack(self) {
        self.settle(tell_ack);
    }

    /// As [`Receipt::ack`], but keeps the broker from sending another message in its
    /// place: its job still runs, or older jobs wait for the room.
    pub fn ack_without_a_successor(self) {
        let origin = &self.unsettled.origin;
        match origin.capacity {
            1 if !origin.counters.ignores_limits() => self.settle_without_a_successor(tell_ack),
            // A stream with a higher capacity brings up to that many in any case.
            _ => self.ack(),
        }
    }

    /// Hands the message back for redelivery at once.
    pub fn nack(self) {
        self.settle(tell_nack);
    }

    /// As [`Receipt::nack`], but closes the stream first, so that the message does not
    /// come back here.
    pub fn hand_back(self) {
        self.settle_without_a_successor(tell_nack);
    }

    /// Marks the message as unsettled for long while others run.
    pub fn mark_held(&mut self) {
        if !self.unsettled.is_held {
            self.unsettled.is_held = true;
            self.unsettled.origin.held.fetch_add(1, Ordering::AcqRel);
        }
    }

    fn settle(self, tell: fn(Handler, &Arc<Origin>)) {
        let Self { handler, unsettled } = self;
        let origin = Arc::clone(&unsettled.origin);
        // First, or the next message could arrive while this one still counts.
        drop(unsettled);
        tell(handler, &origin);
    }

    fn settle_without_a_successor(self, tell: fn(Handler, &Arc<Origin>)) {
        let Self { handler, unsettled } = self;
        unsettled.origin.close.cancel();
        let settling = unsettled.origin.settling.clone();
        settling.spawn(async move {
            unsettled.origin.closed.cancelled().await;
            sleep(AFTER_CLOSING).await;
            tell(handler, &unsettled.origin);
        });
    }
}

fn tell_ack(handler: Handler, origin: &Arc<Origin>) {
    origin.counters.acks.add_one();
    let Handler::ExactlyOnce(handler) = handler else {
        return handler.ack();
    };
    let counters = Arc::clone(&origin.counters);
    origin.settling.spawn(async move {
        if let Err(error) = handler.confirmed_ack().await {
            counters.unconfirmed_acks.add_one();
            warn!(%error, "an ack was not confirmed; if its message comes again, the guard answers");
        }
    });
}

fn tell_nack(handler: Handler, origin: &Arc<Origin>) {
    origin.counters.nacks.add_one();
    handler.nack();
}
