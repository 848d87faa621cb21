//! One stream's life: read without a pause, closed on request.
//!
//! Cancelling a read while the stream is being opened tears the stream down, with
//! everything the broker has sent into it. So each stream has its own reader, and only
//! the reader ends it.

use std::sync::Arc;
use std::time::Duration;

use futures::FutureExt;
use google_cloud_pubsub::model;
use google_cloud_pubsub::subscriber::MessageStream;
use google_cloud_pubsub::subscriber::handler::Handler;
use tokio::sync::{OwnedSemaphorePermit, Semaphore, mpsc};
use tokio::time::{Instant, sleep};
use tokio_util::task::TaskTracker;

use crate::pubsub::delivery::{Delivery, Origin};
use crate::pubsub::{PubsubError, to_message};

/// Bounds of what a broker may have sent unasked. Beyond them its streams are not read:
/// back-pressure holds it back.
const MAX_MESSAGES: usize = 256;
const MAX_KIBIBYTES: usize = 64 << 10;

/// A delivery or a failure that came on a stream.
#[derive(Debug)]
pub(super) struct Arrival {
    pub(super) delivery: Result<Delivery, PubsubError>,
    /// The generation of the client that opened the stream.
    pub(super) generation: u64,
    /// Its share of the bounds until somebody receives it.
    _share: Option<OwnedSemaphorePermit>,
}

/// Where all streams of a subscription put their arrivals.
#[derive(Debug)]
pub(super) struct Queue {
    arrivals: mpsc::Sender<Arrival>,
    room: Arc<Semaphore>,
}

impl Queue {
    pub(super) fn new(per_stream: usize) -> (Self, mpsc::Receiver<Arrival>) {
        let (arrivals, receiver) = mpsc::channel(MAX_MESSAGES.max(per_stream));
        let queue = Self {
            arrivals,
            room: Arc::new(Semaphore::new(MAX_KIBIBYTES)),
        };
        (queue, receiver)
    }

    /// Starts reading a stream, on `settling`.
    pub(super) fn read(
        &self,
        stream: MessageStream,
        path: &str,
        origin: Origin,
        quiet_limit: Duration,
        settling: &TaskTracker,
    ) -> Arc<Origin> {
        let origin = Arc::new(origin);
        let reader = Reader {
            stream,
            what: format!("subscription {path}"),
            arrivals: self.arrivals.clone(),
            room: Arc::clone(&self.room),
            origin: Arc::clone(&origin),
            quiet_limit,
        };
        settling.spawn(reader.run());
        origin
    }
}

struct Reader {
    stream: MessageStream,
    what: String,
    arrivals: mpsc::Sender<Arrival>,
    room: Arc<Semaphore>,
    origin: Arc<Origin>,
    /// A stream on a dead connection looks like one with nothing to bring: the client
    /// reads without a time limit, and does not expose heartbeats.
    quiet_limit: Duration,
}

impl Reader {
    async fn run(mut self) {
        let origin = Arc::clone(&self.origin);
        loop {
            let item = tokio::select! {
                item = self.stream.next() => item.map(Some),
                () = origin.close.cancelled() => break,
                () = quiet(&origin, self.quiet_limit) => Some(None),
            };
            let what = || self.what.clone();
            let delivery = match item {
                Some(Some(Ok((message, handler)))) => Ok(self.delivery(message, handler)),
                Some(Some(Err(error))) => Err(PubsubError::about(&self.what, &error)),
                Some(None) => Err(PubsubError::Quiet {
                    what: what(),
                    quiet_for: self.quiet_limit,
                }),
                // The server may end a stream without an error.
                None => Err(PubsubError::Failed {
                    what: what(),
                    reason: "the stream ended".to_owned(),
                }),
            };
            let ended = delivery.is_err();
            if ended {
                // Before the puller hears of it: a stream that still seems to listen
                // would keep it from opening another.
                origin.close.cancel();
            }
            if self.leave(delivery).await.is_none() || ended {
                break;
            }
        }
        self.close().await;
    }

    /// Waits for room. None once the stream is to be closed; the delivery is then handed
    /// back.
    async fn leave(&self, delivery: Result<Delivery, PubsubError>) -> Option<()> {
        let leaving = async {
            let arrival = Arrival {
                _share: self.share_for(&delivery).await,
                generation: self.origin.generation,
                delivery,
            };
            self.arrivals.send(arrival).await.ok()
        };
        tokio::select! {
            // A delivery that there is room for is not handed back.
            biased;
            left = leaving => left,
            () = self.origin.close.cancelled() => None,
        }
    }

    async fn share_for(
        &self,
        delivery: &Result<Delivery, PubsubError>,
    ) -> Option<OwnedSemaphorePermit> {
        let bytes = delivery.as_ref().ok()?.message.data.len();
        let kibibytes = u32::try_from((bytes >> 10).min(MAX_KIBIBYTES)).ok()?;
        Arc::clone(&self.room)
            .acquire_many_owned(kibibytes)
            .await
            .ok()
    }

    fn delivery(&self, message: model::Message, handler: Handler) -> Delivery {
        Delivery::new(to_message(message), handler, Arc::clone(&self.origin))
    }

    async fn close(mut self) {
        // Deliveries that the client has buffered must pass through here: closing the
        // stream would withhold them from everybody until their ack deadline.
        while let Some(Some(Ok((message, handler)))) = self.stream.next().now_or_never() {
            let delivery = Ok(self.delivery(message, handler));
            // Without room it is dropped, and thus handed back.
            let _ = self.leave(delivery).now_or_never();
        }
        let shutdown = self.stream.shutdown_token();
        drop(self.stream);
        self.origin.closed.cancel();
        drop(self.arrivals);
        // Completes when every delivery of the stream is settled and the broker told.
        shutdown.shutdown().await;
    }
}

/// Completes once the stream has had room for this long and has brought nothing.
async fn quiet(origin: &Origin, limit: Duration) {
    let began = Instant::now();
    loop {
        let quiet_for = match origin.room_since() {
            None => Duration::ZERO,
            Some(since) => since.max(began).elapsed(),
        };
        if quiet_for >= limit {
            return;
        }
        sleep(limit - quiet_for).await;
    }
}
