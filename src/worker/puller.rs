//! One loop per subscription: slot first, then pull.

use std::sync::Arc;
use std::time::Duration;

use tokio::sync::watch;
use tokio_util::sync::CancellationToken;
use tokio_util::task::TaskTracker;
use tracing::{error, info, warn};

use super::intake::Intake;
use super::process::Processor;
use super::slots::Slots;
use crate::pubsub::{Delivery, PubsubError, Subscription};
use crate::retry::{Backoff, jittered};

/// Pauses before a broken stream is opened again.
const REOPEN: (Duration, Duration) = (Duration::from_millis(100), Duration::from_secs(10));
/// The same for what only a person can mend: loud and slow.
const REOPEN_UNCONFIGURED: (Duration, Duration) = (Duration::from_secs(5), Duration::from_secs(60));

/// A stream listens on so long although there is no slot for what it may bring.
const REST_AFTER: Duration = Duration::from_millis(200);

pub(super) struct Puller {
    pub(super) subscription: Subscription,
    pub(super) intake: Arc<Intake>,
    pub(super) slots: Slots,
    pub(super) processor: Arc<Processor>,
    pub(super) running: TaskTracker,
    pub(super) draining: CancellationToken,
    pub(super) database_is_up: watch::Receiver<bool>,
}

impl Puller {
    /// Pulls until the worker drains, through every failure; gives the
    /// subscription back so that what is settled late can be flushed.
    pub(super) async fn run(mut self) -> Subscription {
        let mut passing = Backoff::new(REOPEN.0, REOPEN.1);
        let mut unconfigured = Backoff::new(REOPEN_UNCONFIGURED.0, REOPEN_UNCONFIGURED.1);
        while self.wait_for_slot().await {
            let failure = match self.subscription.next(&self.draining).await {
                Ok(Some(delivery)) => {
                    passing.reset();
                    unconfigured.reset();
                    self.begin(delivery);
                    continue;
                }
                Ok(None) => break,
                Err(failure) => failure,
            };
            let delay = match failure.needs_a_person() {
                true => jittered(unconfigured.next_ceiling()),
                false => passing.next_delay(),
            };
            self.pause(&failure, delay).await;
        }
        self.subscription.stop_pulling();
        let figures = self.subscription.counters().figures();
        info!(subscription = self.subscription.path(), ?figures, "pulled");
        self.subscription
    }

    /// Waits for a slot, and for a database to claim from; what arrives
    /// meanwhile is handed back in time. False once the worker drains.
    async fn wait_for_slot(&mut self) -> bool {
        let mut rests = false;
        loop {
            tokio::select! {
                // A stop goes before a free slot.
                biased;
                () = self.draining.cancelled() => return false,
                () = ready(&mut self.database_is_up, &self.slots, &self.intake) => return true,
                () = self.subscription.hand_back_when_late() => {}
                // While jobs follow each other quickly it is not worth it.
                () = tokio::time::sleep(REST_AFTER), if !rests => {
                    rests = true;
                    self.subscription.rest();
                }
            }
        }
    }

    fn begin(&mut self, delivery: Delivery) {
        let Some(slot) = self.slots.try_take(&self.intake.name) else {
            // Another subscription's message was quicker.
            self.subscription.put_back(delivery);
            return;
        };
        let message = &delivery.message;
        let ordering_key = &message.ordering_key;
        let turn =
            (!ordering_key.is_empty()).then(|| self.intake.turns.next(ordering_key, &message.id));
        let processor = Arc::clone(&self.processor);
        let intake = Arc::clone(&self.intake);
        self.running.spawn(async move {
            processor.process(&intake, delivery, slot, turn).await;
        });
    }

    async fn pause(&self, failure: &PubsubError, delay: Duration) {
        let subscription = self.subscription.path();
        let retry_in = humantime::format_duration(Duration::from_millis(
            u64::try_from(delay.as_millis()).unwrap_or(u64::MAX),
        ));
        match failure.needs_a_person() {
            true => error!(subscription, %failure, %retry_in, "pulling needs a person's help"),
            false => warn!(subscription, %failure, %retry_in, "pulling was interrupted"),
        }
        tokio::select! {
            () = self.draining.cancelled() => {}
            () = tokio::time::sleep(delay) => {}
        }
    }
}

async fn ready(database_is_up: &mut watch::Receiver<bool>, slots: &Slots, intake: &Intake) {
    // The guard lives as long as the worker, so waiting cannot fail.
    let _ = database_is_up.wait_for(|up| *up).await;
    intake.held.some_room().await;
    slots.some_free(&intake.name).await;
}
