//! The worker: pulls deliveries into free slots and sees each run to its end.

mod events;
mod hold;
mod lease_keeper;
mod process;
mod puller;
mod slots;
mod supervise;

use std::sync::Arc;
use std::time::Duration;

use tokio::task::JoinSet;
use tokio::time::timeout;
use tokio_util::task::TaskTracker;
use tracing::{info, warn};

use crate::config;
use crate::guard::Guard;
use crate::pubsub::Subscription;
use crate::registry::ConfiguredTasks;
use crate::shutdown::Shutdown;

pub use events::{Event, EventKind, Events};
use hold::HeldDeliveries;
use lease_keeper::LeaseKeeper;
use process::Processor;
use slots::Slots;

/// How long the acks and nacks of settled deliveries may take to be sent.
const FLUSH_TIMEOUT: Duration = Duration::from_secs(5);

/// One worker: slots, subscriptions, and the tasks it knows.
pub struct Worker {
    settings: config::Worker,
    guard: Guard,
    tasks: ConfiguredTasks,
    subscriptions: Vec<(String, Subscription)>,
    events: Events,
}

impl Worker {
    #[must_use]
    pub fn new(
        settings: config::Worker,
        guard: Guard,
        tasks: ConfiguredTasks,
        subscriptions: Vec<(String, Subscription)>,
    ) -> Self {
        Self {
            settings,
            guard,
            tasks,
            subscriptions,
            events: Events::default(),
        }
    }

    /// What happens in this worker, from now on.
    #[must_use]
    pub fn events(&self) -> Events {
        self.events.clone()
    }

    /// Works until the shutdown, then drains: pulls no more, hands back what
    /// has not started, lets runs finish, asks the rest to stop, gives their
    /// claims back, and sends what is left to tell the broker.
    pub async fn run(self, shutdown: Shutdown) {
        let running = TaskTracker::new();
        let slots = Slots::new(self.settings.slots);
        let keeper = LeaseKeeper::new(self.guard.clone(), self.settings.stop_grace);
        let processor = Arc::new(Processor {
            guard: self.guard,
            tasks: self.tasks,
            keeper: keeper.clone(),
            held: HeldDeliveries::new(running.clone()),
            stop_grace: self.settings.stop_grace,
            shutdown: shutdown.clone(),
            events: self.events,
        });

        let keeping = tokio::spawn(keeper.run());
        let mut pullers = JoinSet::new();
        for (name, subscription) in self.subscriptions {
            let puller = puller::Puller {
                name: name.into(),
                subscription,
                slots: slots.clone(),
                processor: Arc::clone(&processor),
                running: running.clone(),
                draining: shutdown.draining.clone(),
            };
            pullers.spawn(puller.run());
        }

        let patience = self.settings.shutdown_grace - self.settings.stop_grace;
        let stopping = tokio::spawn(async move { shutdown.stop_after(patience).await });
        let subscriptions = pullers.join_all().await;
        info!(running = slots.taken(), "pulling has stopped");
        running.close();
        running.wait().await;
        stopping.abort();
        keeping.abort();
        flush(subscriptions).await;
        info!("stopped");
    }
}

async fn flush(subscriptions: Vec<Subscription>) {
    let flushing = futures::future::join_all(subscriptions.into_iter().map(Subscription::flush));
    if timeout(FLUSH_TIMEOUT, flushing).await.is_err() {
        warn!("some acknowledgements could not be sent; the guard answers their redeliveries");
    }
}
