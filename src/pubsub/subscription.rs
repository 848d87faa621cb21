//! Just-in-time streaming pull: a message is asked for when it can be started.

use std::collections::VecDeque;
use std::time::Duration;

use futures::FutureExt;
use google_cloud_pubsub::client::Subscriber;
use google_cloud_pubsub::subscriber::MessageStream;
use tokio::time::{Instant, timeout};
use tokio_util::sync::CancellationToken;
use tokio_util::task::TaskTracker;
use tracing::debug;

use super::{Delivery, PubsubError, to_message};

/// The client stops extending the ack deadline silently after its `max_lease`.
/// Nothing here relies on that, so it is out of reach; timeouts are the task's.
const MAX_LEASE: Duration = Duration::from_secs(10 * 365 * 24 * 60 * 60);

/// A broker that sends more than it was asked for is read until it has been
/// quiet for this long: what is still under way on a closed stream would only
/// come again after its ack deadline.
const QUIET: Duration = Duration::from_millis(100);

/// Bounds of what is kept of such surplus; the rest is handed back at once.
const MAX_SURPLUS_MESSAGES: usize = 256;
const MAX_SURPLUS_BYTES: usize = 32 << 20;

/// How long surplus may wait for a slot before it is handed back, so that an
/// idle worker elsewhere gets it.
const SURPLUS_PATIENCE: Duration = Duration::from_secs(1);

/// One subscription, pulled message by message.
///
/// Each message comes on a stream of its own that asks for one message and is
/// closed once it has come. Flow control counts what is unacknowledged, so on
/// a stream that stays open an early ack would make the server send the next
/// message to a worker that is busy.
///
/// Google's emulator ignores the limit and sends what it has. That surplus is
/// used if a slot comes free within a second and handed back if none does.
#[derive(Debug)]
pub struct Subscription {
    client: Subscriber,
    path: String,
    ack_deadline: Duration,
    surplus: VecDeque<Delivery>,
    surplus_since: Instant,
    /// Closed streams whose deliveries are not all settled yet.
    settling: TaskTracker,
}

impl Subscription {
    #[must_use]
    pub fn new(client: Subscriber, path: String, ack_deadline: Duration) -> Self {
        Self {
            client,
            path,
            ack_deadline,
            surplus: VecDeque::new(),
            surplus_since: Instant::now(),
            settling: TaskTracker::new(),
        }
    }

    #[must_use]
    pub fn path(&self) -> &str {
        &self.path
    }

    /// The next delivery, or None once `stop` is cancelled.
    ///
    /// # Errors
    /// The stream ended with an error that the client does not retry itself.
    pub async fn next(
        &mut self,
        stop: &CancellationToken,
    ) -> Result<Option<Delivery>, PubsubError> {
        if let Some(delivery) = self.surplus.pop_front() {
            return Ok(Some(delivery));
        }
        let mut stream = self
            .client
            .subscribe(&self.path)
            .set_max_outstanding_messages(1)
            .set_max_lease(MAX_LEASE)
            .set_max_lease_extension(self.ack_deadline)
            .build();
        let first = tokio::select! {
            // A message that is there already is read before the stop is seen.
            biased;
            first = stream.next() => first,
            () = stop.cancelled() => None,
        };
        let delivery = match first {
            Some(Ok((message, handler))) => Some(Delivery::new(to_message(message), handler)),
            Some(Err(error)) => {
                let what = format!("subscription {}", self.path);
                return Err(PubsubError::about(&what, &error));
            }
            None if stop.is_cancelled() => None,
            // The server may end a stream without an error.
            None => {
                return Err(PubsubError::Failed {
                    what: format!("subscription {}", self.path),
                    reason: "the stream ended".to_owned(),
                });
            }
        };
        if delivery.is_some() {
            self.take_surplus(&mut stream).await;
        }
        self.close(stream);
        Ok(delivery)
    }

    /// Takes back a delivery that found no free slot.
    pub fn put_back(&mut self, delivery: Delivery) {
        if self.surplus.is_empty() {
            self.surplus_since = Instant::now();
        }
        self.surplus.push_front(delivery);
    }

    /// When the surplus, if there is any, has waited long enough.
    #[must_use]
    pub fn surplus_deadline(&self) -> Option<Instant> {
        (!self.surplus.is_empty()).then(|| self.surplus_since + SURPLUS_PATIENCE)
    }

    /// Hands back, for other workers, what no slot came free for.
    pub fn hand_back_surplus(&mut self) {
        self.surplus.clear();
    }

    /// Waits until the broker has been told about every settled delivery.
    pub async fn flush(self) {
        drop(self.surplus);
        self.settling.close();
        self.settling.wait().await;
    }

    async fn take_surplus(&mut self, stream: &mut MessageStream) {
        let mut bytes = 0;
        let mut next = stream.next().now_or_never().flatten();
        while let Some(Ok((message, handler))) = next {
            bytes += message.data.len();
            self.surplus
                .push_back(Delivery::new(to_message(message), handler));
            if self.surplus.len() > MAX_SURPLUS_MESSAGES || bytes > MAX_SURPLUS_BYTES {
                self.surplus.pop_back();
                break;
            }
            next = timeout(QUIET, stream.next()).await.ok().flatten();
        }
        // What the client has buffered beyond the bounds must pass through
        // here too: closing the stream would keep it from everybody.
        while let Some(Some(Ok((_, handler)))) = stream.next().now_or_never() {
            handler.nack();
        }
        if !self.surplus.is_empty() {
            debug!(subscription = %self.path, surplus = self.surplus.len(), "the broker sent more than it was asked for");
        }
        self.surplus_since = Instant::now();
    }

    /// Ends the stream. The client goes on extending the ack deadlines of
    /// deliveries that are still held, and sends their acks.
    fn close(&self, stream: MessageStream) {
        let shutdown = stream.shutdown_token();
        drop(stream);
        self.settling
            .spawn(async move { shutdown.shutdown().await });
    }
}
