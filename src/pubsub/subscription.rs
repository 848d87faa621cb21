//! Just-in-time streaming pull: a message is asked for when it can be started.

mod stream;

use std::collections::VecDeque;
use std::sync::Arc;
use std::time::Duration;

use google_cloud_pubsub::client::Subscriber;
use tokio::sync::mpsc;
use tokio::time::{Instant, sleep_until};
use tokio_util::sync::CancellationToken;
use tokio_util::task::TaskTracker;
use tracing::debug;

use super::counters::Counters;
use super::delivery::{Delivery, Origin};
use super::{Connection, PubsubError};
use crate::retry::jittered;
use stream::{Arrival, Queue, Room};

/// The client stops extending the ack deadline silently after its `max_lease`.
/// Nothing here relies on that, so it is out of reach; timeouts are the task's.
const MAX_LEASE: Duration = Duration::from_secs(10 * 365 * 24 * 60 * 60);

/// How long a delivery that found no slot may wait for one before it is handed
/// back, so that an idle worker elsewhere gets it.
const PATIENCE: Duration = Duration::from_secs(1);

/// One subscription, pulled message by message.
///
/// With `prefetch` one long-lived stream brings messages ahead of the slots.
/// Without, each stream asks for one message at a time, so a message that is running
/// keeps its stream from bringing another; there are as many streams as jobs
/// run side by side. A stream listens while none of its messages is unsettled.
///
/// Flow control counts what is unacknowledged: an early ack on an open stream
/// would make the server send the next message to a busy worker. A stream is
/// therefore closed before such an ack, and before a message is handed back
/// that found no slot.
///
/// Google's emulator ignores the limit and sends what it has. That surplus is
/// used if a slot comes free within a second and handed back if none does. It
/// also keeps a stream that is gone as a receiver until it has swallowed a
/// batch, which comes again only after the ack deadline: one more reason to
/// close streams only where it must be.
#[derive(Debug)]
pub struct Subscription {
    connection: Connection,
    /// None: the last one may be dead; the next stream gets a new one.
    client: Option<Subscriber>,
    path: String,
    pulling: Pulling,
    counters: Arc<Counters>,
    arrivals: mpsc::Receiver<Arrival>,
    queue: Queue,
    streams: Vec<Arc<Origin>>,
    /// Deliveries without a slot, earliest first.
    waiting: VecDeque<Waiting>,
    /// Streams that are not done yet, and what is still to be settled.
    settling: TaskTracker,
}

/// How a subscription is pulled.
#[derive(Debug, Clone)]
pub struct Pulling {
    /// What is asked of the broker, and extended while a message is held.
    pub ack_deadline: Duration,
    /// How many jobs may run side by side.
    pub slots: usize,
    /// How many messages may be held beyond those. 0: a stream per job that is
    /// running and one that listens; otherwise one stream for all.
    pub prefetch: usize,
    /// How many messages may be held for long without a slot.
    pub held: usize,
    /// A stream that has room and brings nothing for so long is replaced.
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

    /// How many streams may be open at a time.
    fn streams(&self) -> usize {
        self.slots + self.held + 1
    }
}

#[derive(Debug)]
struct Waiting {
    delivery: Delivery,
    /// When it is handed back.
    deadline: Instant,
    /// What it takes of the bounds on what a broker may send unasked.
    _room: Option<Room>,
}

impl Subscription {
    #[must_use]
    pub fn new(connection: Connection, path: String, pulling: Pulling) -> Self {
        let (queue, arrivals) = Queue::new(pulling.per_stream());
        Self {
            connection,
            client: None,
            path,
            pulling,
            counters: Arc::default(),
            arrivals,
            queue,
            streams: Vec::new(),
            waiting: VecDeque::new(),
            settling: TaskTracker::new(),
        }
    }

    #[must_use]
    pub fn path(&self) -> &str {
        &self.path
    }

    /// What happens on it, in numbers, from now on.
    #[must_use]
    pub fn counters(&self) -> Arc<Counters> {
        Arc::clone(&self.counters)
    }

    /// The next delivery, or None once `stop` is cancelled.
    ///
    /// # Errors
    /// The stream ended, or failed in a way that the client does not retry.
    pub async fn next(
        &mut self,
        stop: &CancellationToken,
    ) -> Result<Option<Delivery>, PubsubError> {
        if let Some(waiting) = self.waiting.pop_front() {
            return Ok(Some(waiting.delivery));
        }
        loop {
            let Some(arrival) = self.arrival(stop).await? else {
                return Ok(None);
            };
            match arrival.delivery {
                Ok(delivery) => return Ok(Some(delivery)),
                Err(PubsubError::Quiet { .. }) => self.replace_the_client(),
                Err(failure) => {
                    self.counters.streams_failed.add_one();
                    self.pass_over_failures();
                    return Err(failure);
                }
            }
        }
    }

    async fn arrival(&mut self, stop: &CancellationToken) -> Result<Option<Arrival>, PubsubError> {
        if let Ok(arrival) = self.arrivals.try_recv() {
            return Ok(Some(arrival));
        }
        self.listen().await?;
        tokio::select! {
            // What is there already is taken before the stop is seen.
            biased;
            arrival = self.arrivals.recv() => Ok(arrival),
            () = stop.cancelled() => Ok(None),
        }
    }

    /// A connection that has died without a sign takes all its streams along,
    /// and would take the next one.
    fn replace_the_client(&mut self) {
        debug!(
            subscription = self.path,
            "a stream was quiet for too long; it is replaced"
        );
        self.counters.streams_quiet.add_one();
        self.client = None;
    }

    /// Streams that break together are one failure, not one each.
    fn pass_over_failures(&mut self) {
        while let Ok(arrival) = self.arrivals.try_recv() {
            self.keep(arrival);
        }
    }

    /// Takes back a delivery that found no free slot.
    pub fn put_back(&mut self, delivery: Delivery) {
        // Before those that came after it: they may have its ordering key.
        self.waiting.push_front(Waiting {
            deadline: delivery.arrived_at + PATIENCE,
            delivery,
            _room: None,
        });
    }

    /// Completes when a delivery has waited for a slot for long enough, and
    /// hands back all that have. Never, while none waits.
    pub async fn hand_back_when_late(&mut self) {
        if self.pulling.prefetch > 0 {
            return std::future::pending().await;
        }
        loop {
            while let Ok(arrival) = self.arrivals.try_recv() {
                self.keep(arrival);
            }
            if let Some(first) = self.waiting.front() {
                sleep_until(first.deadline).await;
                break;
            }
            match self.arrivals.recv().await {
                Some(arrival) => self.keep(arrival),
                None => std::future::pending().await,
            }
        }
        let now = Instant::now();
        while self
            .waiting
            .front()
            .is_some_and(|first| first.deadline <= now)
        {
            if let Some(late) = self.waiting.pop_front() {
                late.delivery.into_parts().1.hand_back();
            }
        }
    }

    /// Brings nothing more until the next pull: no slot is free for it.
    pub fn rest(&mut self) {
        if self.pulling.prefetch > 0 {
            return;
        }
        for stream in self.streams.iter().filter(|stream| stream.listens()) {
            stream.close.cancel();
        }
    }

    /// Pulls no more, and hands back at once what no job was begun for.
    pub fn stop_pulling(&mut self) {
        for stream in &self.streams {
            stream.close.cancel();
        }
        self.arrivals.close();
        self.pass_over_failures();
        for unstarted in self.waiting.drain(..) {
            // On a stream that is still open it would come back here.
            unstarted.delivery.into_parts().1.hand_back();
        }
    }

    /// Pulls no more, and waits until the broker has been told about every
    /// settled delivery.
    pub async fn flush(mut self) {
        self.stop_pulling();
        self.settling.close();
        self.settling.wait().await;
    }

    fn keep(&mut self, arrival: Arrival) {
        match arrival.delivery {
            Ok(delivery) => self.waiting.push_back(Waiting {
                deadline: delivery.arrived_at + PATIENCE,
                delivery,
                _room: arrival.room,
            }),
            Err(PubsubError::Quiet { .. }) => self.replace_the_client(),
            // The next pull tells, if it fails again.
            Err(_) => self.counters.streams_failed.add_one(),
        }
    }

    /// Opens a stream unless one listens.
    async fn listen(&mut self) -> Result<(), PubsubError> {
        self.streams.retain(|stream| !stream.closed.is_cancelled());
        if self.pulling.prefetch > 0 {
            for clogged in self.streams.iter().filter(|stream| stream.is_clogged()) {
                clogged.close.cancel();
            }
            if self
                .streams
                .iter()
                .any(|stream| !stream.close.is_cancelled())
            {
                return Ok(());
            }
        }
        if self.streams.iter().any(|stream| stream.listens()) {
            return Ok(());
        }
        let client = match self.client.take() {
            Some(client) => client,
            None => self.connection.subscriber(self.pulling.streams()).await?,
        };
        let capacity = self.pulling.per_stream();
        let stream = client
            .subscribe(&self.path)
            .set_max_outstanding_messages(i64::try_from(capacity).unwrap_or(i64::MAX))
            .set_max_lease(MAX_LEASE)
            .set_max_lease_extension(self.pulling.ack_deadline)
            .build();
        self.client = Some(client);
        self.counters.streams_opened.add_one();
        let origin = Origin::new(capacity, self.counters(), self.settling.clone());
        let quiet_limit = jittered(self.pulling.quiet_limit);
        self.streams.push(
            self.queue
                .read(stream, &self.path, origin, quiet_limit, &self.settling),
        );
        Ok(())
    }
}
