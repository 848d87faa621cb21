//! The worker: pulls deliveries into free slots and sees each run to its end.

mod events;
mod hold;
mod lease_keeper;
mod process;
mod puller;
mod purger;
mod reaper;
mod slots;
mod supervise;

use std::sync::Arc;
use std::time::Duration;

use tokio::task::JoinSet;
use tokio::time::{sleep, timeout};
use tokio_util::sync::CancellationToken;
use tokio_util::task::TaskTracker;
use tracing::{error, info, warn};

use crate::config;
use crate::guard::Guard;
use crate::pubsub::Subscription;
use crate::registry::ConfiguredTasks;
use crate::shutdown::Shutdown;
use crate::store::Reach;

pub use events::{Event, EventKind, Events};
use hold::HeldDeliveries;
use lease_keeper::LeaseKeeper;
use process::Processor;
use puller::Puller;
use reaper::Reaper;
use slots::Slots;

/// How long writing outcomes and giving claims back may take after the last
/// run has stopped.
const LAST_WRITES: Duration = Duration::from_secs(5);

/// How long the acks and nacks of settled deliveries may take to be sent.
const FLUSH_TIMEOUT: Duration = Duration::from_secs(5);

/// One worker: slots, subscriptions, and the tasks it knows.
pub struct Worker {
    settings: config::Worker,
    guard: Guard,
    tasks: ConfiguredTasks,
    subscriptions: Vec<Source>,
    retention: Duration,
    events: Events,
}

/// A subscription with what the configuration says about it.
pub struct Source {
    pub name: String,
    pub settings: config::Subscription,
    pub subscription: Subscription,
}

impl Worker {
    #[must_use]
    pub fn new(
        settings: config::Worker,
        guard: Guard,
        tasks: ConfiguredTasks,
        subscriptions: Vec<Source>,
        retention: Duration,
    ) -> Self {
        Self {
            settings,
            guard,
            tasks,
            subscriptions,
            retention,
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
        let guard = self.guard;
        let reach = Reach {
            subscriptions: self.subscriptions.iter().map(|s| s.name.clone()).collect(),
            tasks: self.tasks.names().map(str::to_owned).collect(),
        };
        let processor = Arc::new(Processor {
            guard: guard.clone(),
            tasks: self.tasks,
            keeper: keeper.clone(),
            held: HeldDeliveries::new(running.clone()),
            stop_grace: self.settings.stop_grace,
            shutdown: shutdown.clone(),
            events: self.events,
        });

        // These go on while runs drain: leases are kept to the end.
        let mut background = JoinSet::new();
        background.spawn(keeper.run());
        let looking = guard.clone();
        background.spawn(async move { looking.keep_looking().await });
        background.spawn(purger::purge(
            guard.clone(),
            self.retention,
            shutdown.draining.clone(),
        ));
        let reaper = Reaper {
            guard: guard.clone(),
            reach,
            slots: slots.clone(),
            processor: Arc::clone(&processor),
            running: running.clone(),
            draining: shutdown.draining.clone(),
        };
        let reaping = tokio::spawn(reaper.run());
        let mut pullers = JoinSet::new();
        for source in self.subscriptions {
            let puller = Puller {
                source,
                slots: slots.clone(),
                processor: Arc::clone(&processor),
                running: running.clone(),
                draining: shutdown.draining.clone(),
                database_is_up: guard.database_is_up(),
            };
            pullers.spawn(puller.run());
        }

        let last_words = self.settings.stop_grace + LAST_WRITES;
        let patience = self.settings.shutdown_grace - self.settings.stop_grace;
        let giving_up = shutdown.giving_up.clone();
        let stopping = tokio::spawn(async move { shutdown.stop_after(patience, last_words).await });
        let subscriptions = pullers.join_all().await;
        info!(running = slots.taken(), "pulling has stopped");
        let ending = async {
            // A reaper that was in the middle of a sweep has jobs to hand over.
            if reaping.await.is_err() {
                error!("the reaper has panicked");
            }
            running.close();
            running.wait().await;
        };
        tokio::select! {
            () = ending => {}
            // Only a database that hangs takes so long; leases will end.
            () = a_moment_after(giving_up) => warn!("stopping although something still waits for the database"),
        }
        stopping.abort();
        background.shutdown().await;
        flush(subscriptions).await;
        info!("stopped");
    }
}

/// Leaves what was given up the time to notice.
async fn a_moment_after(giving_up: CancellationToken) {
    giving_up.cancelled().await;
    sleep(Duration::from_secs(1)).await;
}

async fn flush(subscriptions: Vec<Subscription>) {
    let flushing = futures::future::join_all(subscriptions.into_iter().map(Subscription::flush));
    if timeout(FLUSH_TIMEOUT, flushing).await.is_err() {
        warn!("some acknowledgements could not be sent; the guard answers their redeliveries");
    }
}
