//! One loop per subscription: asks for a message while one could be begun.

use std::sync::Arc;
use std::time::Duration;

use tokio::sync::watch;
use tokio::time::{Instant, sleep, sleep_until};
use tokio_util::sync::CancellationToken;
use tracing::{debug, error, info, warn};

use super::admission::Admission;
use super::intake::Intake;
use super::process::Processor;
use crate::pubsub::{PubsubError, Subscription};
use crate::retry::{Backoff, jittered};

/// Pauses before a broken stream is opened again.
const REOPEN: (Duration, Duration) = (Duration::from_millis(100), Duration::from_secs(10));
/// The same for failures that only a person can fix.
const REOPEN_UNCONFIGURED: (Duration, Duration) = (Duration::from_secs(5), Duration::from_secs(60));

/// How long a stream goes on listening after room has run out. A message may be on its
/// way; closing the stream would lose it until its ack deadline.
const REST_AFTER: Duration = Duration::from_millis(200);
/// A stream may begin to listen again later, when a held message is settled.
const REST_AGAIN: Duration = Duration::from_secs(1);

pub(super) struct Puller {
    pub(super) subscription: Subscription,
    pub(super) intake: Arc<Intake>,
    pub(super) admission: Admission,
    pub(super) processor: Arc<Processor>,
    pub(super) draining: CancellationToken,
    pub(super) database_is_up: watch::Receiver<bool>,
}

/// Pauses after failures.
struct Pauses {
    passing: Backoff,
    unconfigured: Backoff,
}

impl Puller {
    /// Pulls until the worker drains, through every failure. Returns the subscription, so
    /// that deliveries settled late can be flushed.
    pub(super) async fn run(mut self) -> Subscription {
        let mut changes = self.admission.changes();
        let mut pauses = Pauses {
            passing: Backoff::new(REOPEN.0, REOPEN.1),
            unconfigured: Backoff::new(REOPEN_UNCONFIGURED.0, REOPEN_UNCONFIGURED.1),
        };
        // When to stop listening for want of room.
        let mut rest_at = None;
        while !self.draining.is_cancelled() {
            let asks = self.could_begin_one();
            if asks {
                rest_at = None;
                if let Err(failure) = self.subscription.listen().await {
                    self.pause(&failure, &mut pauses).await;
                    continue;
                }
            } else {
                rest_at.get_or_insert_with(|| Instant::now() + REST_AFTER);
            }
            let takes = asks || self.takes_without_room();
            tokio::select! {
                // Begins what has arrived before checking whether to ask for less; a stop
                // precedes both.
                biased;
                () = self.draining.cancelled() => break,
                next = self.subscription.next(), if takes => match next {
                    Ok(delivery) => {
                        pauses.reset();
                        self.processor.begin(&self.intake, delivery);
                    }
                    Err(PubsubError::Quiet { .. }) => debug!(subscription = self.subscription.path(), "a quiet stream is replaced"),
                    Err(failure) => self.pause(&failure, &mut pauses).await,
                },
                () = changes.next() => {}
                _ = self.database_is_up.changed() => {}
                () = until(rest_at) => {
                    self.subscription.rest();
                    rest_at = Some(Instant::now() + REST_AGAIN);
                }
            }
        }
        self.subscription.stop_pulling();
        let figures = self.subscription.counters().figures();
        info!(subscription = self.subscription.path(), ?figures, "pulled");
        self.subscription
    }

    fn could_begin_one(&mut self) -> bool {
        let is_up = *self.database_is_up.borrow_and_update();
        is_up && self.admission.could_begin(&self.intake.name)
    }

    /// A message that comes unasked, because it was on its way, is recorded for whoever
    /// has room. Prefetched messages stay in the subscription instead.
    fn takes_without_room(&self) -> bool {
        !self.subscription.prefetches() && self.admission.could_hold(&self.intake.name)
    }

    async fn pause(&self, failure: &PubsubError, pauses: &mut Pauses) {
        let subscription = self.subscription.path();
        let needs_a_person = failure.needs_a_person();
        let delay = match needs_a_person {
            true => jittered(pauses.unconfigured.next_ceiling()),
            false => pauses.passing.next_delay(),
        };
        let retry_in = humantime::format_duration(Duration::from_millis(
            u64::try_from(delay.as_millis()).unwrap_or(u64::MAX),
        ));
        match needs_a_person {
            true => error!(subscription, %failure, %retry_in, "pulling needs a person's help"),
            false => warn!(subscription, %failure, %retry_in, "pulling was interrupted"),
        }
        tokio::select! {
            () = self.draining.cancelled() => {}
            () = sleep(delay) => {}
        }
    }
}

async fn until(time: Option<Instant>) {
    match time {
        Some(time) => sleep_until(time).await,
        None => std::future::pending().await,
    }
}

impl Pauses {
    fn reset(&mut self) {
        self.passing.reset();
        self.unconfigured.reset();
    }
}
