//! Just-in-time streaming pull: asks for a message when it can be started.

mod stream;

use std::collections::VecDeque;
use std::sync::Arc;
use std::time::Duration;

use tokio::sync::mpsc;
use tokio_util::task::TaskTracker;
use tracing::debug;

use super::PubsubError;
use super::clients::Clients;
use super::counters::Counters;
use super::delivery::{Delivery, Origin};
use crate::retry::jittered;
use stream::{Arrival, Queue};

/// The client silently stops extending the ack deadline after its `max_lease`. Nothing
/// here relies on that, so it is set out of reach; tasks have their own timeouts.
const MAX_LEASE: Duration = Duration::from_secs(10 * 365 * 24 * 60 * 60);

/// How many streams may stay open only for held deliveries. Those do not need a stream,
/// but closing one costs the broker a little.
const MAX_CLOGGED: usize = 8;

/// One subscription, pulled message by message.
///
/// With `prefetch`, one long-lived stream brings messages ahead of the slots. Without,
/// each stream asks for one message at a time: an unsettled message keeps its stream from
/// bringing another, and a stream without one listens. Only [`Subscription::listen`] asks
/// for messages.
///
/// Flow control counts unacknowledged messages: after an early ack on an open stream, the
/// server sends the next message to a busy worker. So the stream is closed before such an
/// ack.
///
/// Google's emulator ignores the limit and sends everything it has. It also keeps a
/// closed stream as a receiver until that has swallowed a batch, which is redelivered
/// only after the ack deadline: another reason to close streams only when necessary.
#[derive(Debug)]
pub struct Subscription {
    clients: Clients,
    path: String,
    pulling: Pulling,
    counters: Arc<Counters>,
    arrivals: mpsc::Receiver<Arrival>,
    /// Deliveries that arrived before a failure was passed over.
    early: VecDeque<Delivery>,
    queue: Queue,
    streams: Vec<Arc<Origin>>,
    /// Streams that are not done yet, and deliveries still to be settled.
    settling: TaskTracker,
}

/// How a subscription is pulled.
#[derive(Debug, Clone)]
pub struct Pulling {
    /// The ack deadline asked of the broker, and extended while a message is held.
    pub ack_deadline: Duration,
    /// How many jobs may run side by side.
    pub slots: usize,
    /// How many messages may be held beyond those. 0: one stream per unsettled message;
    /// otherwise one stream for all.
    pub prefetch: usize,
    /// A stream that has room and brings nothing for this long is replaced.
    pub quiet_limit: Duration,
}

impl Pulling {
    /// How many deliveries of one stream may be unsettled at a time.
    fn per_stream(&self) -> usize {
        match self.prefetch {
            0 => 1,
            prefetch => prefetch + self.slots,
        }
    }

    /// How many streams are usually open at a time.
    #[must_use]
    pub fn streams(&self) -> usize {
        match self.prefetch {
            0 => self.slots + 1 + MAX_CLOGGED,
            _ => 2,
        }
    }
}

impl Subscription {
    #[must_use]
    pub fn new(clients: Clients, path: String, pulling: Pulling) -> Self {
        let (queue, arrivals) = Queue::new(pulling.per_stream());
        Self {
            counters: Arc::new(Counters::new(clients.are_for_an_emulator())),
            clients,
            path,
            pulling,
            arrivals,
            early: VecDeque::new(),
            queue,
            streams: Vec::new(),
            settling: TaskTracker::new(),
        }
    }

    #[must_use]
    pub fn path(&self) -> &str {
        &self.path
    }

    /// The subscription's counters.
    #[must_use]
    pub fn counters(&self) -> Arc<Counters> {
        Arc::clone(&self.counters)
    }

    /// Whether the subscription holds messages ahead of the slots.
    #[must_use]
    pub fn prefetches(&self) -> bool {
        self.pulling.prefetch > 0
    }

    /// The next delivery from any stream. Waits for ever while none is open. Cancel-safe.
    ///
    /// # Errors
    /// A stream ended, or failed in a way that the client does not retry;
    /// [`Subscription::listen`] opens another.
    pub async fn next(&mut self) -> Result<Delivery, PubsubError> {
        if let Some(delivery) = self.early.pop_front() {
            return Ok(delivery);
        }
        let Some(arrival) = self.arrivals.recv().await else {
            return std::future::pending().await;
        };
        match arrival.delivery {
            Ok(delivery) => Ok(delivery),
            Err(failure) => {
                self.count_failure(&failure, arrival.generation);
                self.pass_over_failures();
                Err(failure)
            }
        }
    }

    /// Ensures that a stream listens.
    ///
    /// # Errors
    /// No client can be built.
    pub async fn listen(&mut self) -> Result<(), PubsubError> {
        self.streams.retain(|stream| !stream.closed.is_cancelled());
        self.close_clogged();
        if self.streams.iter().any(|stream| self.listens(stream)) {
            return Ok(());
        }
        self.open().await
    }

    /// Whether the stream counts as listening. If it prefetches, or the broker ignores
    /// limits, any open stream does.
    fn listens(&self, stream: &Origin) -> bool {
        match self.prefetches() || self.counters.ignores_limits() {
            true => !stream.close.is_cancelled(),
            false => stream.listens(),
        }
    }

    /// Closes streams that are full of held deliveries, whose ack deadlines are extended
    /// without them.
    fn close_clogged(&mut self) {
        if self.counters.ignores_limits() {
            return;
        }
        let spared = match self.prefetches() {
            true => 0,
            false => MAX_CLOGGED,
        };
        let clogged = self
            .streams
            .iter()
            .filter(|stream| !stream.close.is_cancelled() && stream.is_clogged());
        for stream in clogged.skip(spared) {
            stream.close.cancel();
        }
    }

    async fn open(&mut self) -> Result<(), PubsubError> {
        let client = self.clients.newest().await?;
        let capacity = self.pulling.per_stream();
        let stream = client
            .subscriber
            .subscribe(&self.path)
            .set_max_outstanding_messages(i64::try_from(capacity).unwrap_or(i64::MAX))
            .set_max_lease(MAX_LEASE)
            .set_max_lease_extension(self.pulling.ack_deadline)
            .build();
        self.counters.streams_opened.add_one();
        let settling = self.settling.clone();
        let origin = Origin::new(capacity, client.generation, self.counters(), settling);
        let quiet_limit = jittered(self.pulling.quiet_limit);
        self.streams.push(
            self.queue
                .read(stream, &self.path, origin, quiet_limit, &self.settling),
        );
        Ok(())
    }

    /// A connection that has died without a sign takes all its streams down, and the next
    /// one too, so its client is replaced.
    fn count_failure(&self, failure: &PubsubError, generation: u64) {
        if !matches!(failure, PubsubError::Quiet { .. }) {
            self.counters.streams_failed.add_one();
            return;
        }
        debug!(
            subscription = self.path,
            "a stream was quiet for too long; it is replaced"
        );
        self.counters.streams_quiet.add_one();
        self.clients.replace(generation);
    }

    /// Counts streams that break together as one failure, not one each.
    fn pass_over_failures(&mut self) {
        while let Ok(arrival) = self.arrivals.try_recv() {
            match arrival.delivery {
                Ok(delivery) => self.early.push_back(delivery),
                Err(failure) => self.count_failure(&failure, arrival.generation),
            }
        }
    }

    /// Asks for nothing more until [`Subscription::listen`]. A message that the broker is
    /// just sending may be lost until its ack deadline, so do not call this when one is
    /// likely to be on its way.
    pub fn rest(&mut self) {
        if self.prefetches() || self.counters.ignores_limits() {
            return;
        }
        for stream in self.streams.iter().filter(|stream| stream.listens()) {
            stream.close.cancel();
        }
    }

    /// Stops pulling, and hands back at once the deliveries that no job was begun for.
    pub fn stop_pulling(&mut self) {
        for stream in &self.streams {
            stream.close.cancel();
        }
        self.arrivals.close();
        self.pass_over_failures();
        for delivery in self.early.drain(..) {
            // A still open stream would bring it back here.
            delivery.into_parts().1.hand_back();
        }
    }

    /// Stops pulling, and waits until the broker has been told about every settled
    /// delivery.
    pub async fn flush(mut self) {
        self.stop_pulling();
        self.settling.close();
        self.settling.wait().await;
    }
}
