//! The worker: pulls deliveries into free slots and sees each run to its end.

mod dead_letters;
mod events;
mod hold;
mod intake;
mod key_turns;
mod lease_keeper;
mod process;
mod puller;
mod purger;
mod reaper;
mod run;
mod slots;
mod supervise;

use std::collections::BTreeMap;
use std::sync::Arc;
use std::time::Duration;

use tokio::task::JoinSet;
use tokio::time::{sleep, timeout};
use tokio_util::sync::CancellationToken;
use tokio_util::task::TaskTracker;
use tracing::{error, info, warn};

use crate::config::{self, AckTiming};
use crate::devices::Devices;
use crate::guard::Guard;
use crate::pubsub::{Publishers, Subscription};
use crate::registry::ConfiguredTasks;
use crate::shutdown::Shutdown;
use crate::store::{Reach, TaskTerms};

use dead_letters::DeadLetters;
use hold::HeldDeliveries;
use intake::Intake;
use lease_keeper::LeaseKeeper;
use process::Processor;
use puller::Puller;
use reaper::Reaper;
use slots::{Capacity, Slots};

pub use events::{Event, EventKind, Events};
pub use hold::MAX_KEPT;

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
    publishers: Publishers,
    devices: Devices,
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
        publishers: Publishers,
        devices: Devices,
        retention: Duration,
    ) -> Self {
        Self {
            settings,
            guard,
            tasks,
            subscriptions,
            publishers,
            devices,
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
        let slots = self.slots();
        let reach = self.reach();
        let intakes = self.intakes(&running, &shutdown);
        let stop_grace = self.longest_stop_grace();
        let keeper = LeaseKeeper::new(self.guard.clone(), stop_grace);
        let dead_letters = Arc::new(DeadLetters {
            guard: self.guard.clone(),
            publishers: self.publishers,
            wake: Arc::default(),
            draining: shutdown.draining.clone(),
        });
        let processor = Arc::new(Processor {
            guard: self.guard.clone(),
            tasks: self.tasks,
            intakes: intakes.clone(),
            slots: slots.clone(),
            keeper: keeper.clone(),
            stop_grace: self.settings.stop_grace,
            unknown_task_patience: self.settings.unknown_task_patience,
            shutdown: shutdown.clone(),
            events: self.events,
            wake_reaper: Arc::default(),
            wake_dead_letters: Arc::clone(&dead_letters.wake),
        });

        // These go on while runs drain: leases are kept to the end.
        let mut background = JoinSet::new();
        background.spawn(keeper.clone().run());
        background.spawn(keeper.watch_for_cancels());
        let looking = self.guard.clone();
        background.spawn(async move { looking.keep_looking().await });
        let draining = shutdown.draining.clone();
        background.spawn(purger::purge(self.guard.clone(), self.retention, draining));
        let publishing = Arc::clone(&dead_letters);
        background.spawn(async move { publishing.run().await });
        let reaper = Reaper {
            guard: self.guard.clone(),
            reach,
            slots: slots.clone(),
            wake: Arc::clone(&processor.wake_reaper),
            processor: Arc::clone(&processor),
            running: running.clone(),
            draining: shutdown.draining.clone(),
        };
        let reaping = tokio::spawn(reaper.run());
        let mut pullers = JoinSet::new();
        for source in self.subscriptions {
            let puller = Puller {
                intake: Arc::clone(&intakes[&source.name]),
                subscription: source.subscription,
                slots: slots.clone(),
                processor: Arc::clone(&processor),
                running: running.clone(),
                draining: shutdown.draining.clone(),
                database_is_up: self.guard.database_is_up(),
            };
            pullers.spawn(puller.run());
        }

        let last_words = stop_grace + LAST_WRITES;
        let patience = self.settings.shutdown_grace.saturating_sub(stop_grace);
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
        if timeout(FLUSH_TIMEOUT, dead_letters.publish_mine())
            .await
            .is_err()
        {
            warn!("dead letters are left for another worker to publish");
        }
        flush(subscriptions).await;
        info!("stopped");
    }

    fn slots(&self) -> Slots {
        let subscriptions = self.subscriptions.iter();
        let tasks = || self.tasks.iter();
        Slots::new(Capacity {
            slots: self.settings.slots,
            subscriptions: subscriptions
                .filter_map(|source| Some((source.name.clone(), source.settings.concurrency?)))
                .collect(),
            tasks: tasks()
                .filter_map(|task| Some((task.name.clone(), task.settings.concurrency?)))
                .collect(),
            devices: self.devices.clone(),
            needs: tasks()
                .filter(|task| task.settings.gpus > 0)
                .map(|task| (task.name.clone(), task.settings.gpus))
                .collect(),
        })
    }

    /// The longest that any run may take to end once it is asked to.
    fn longest_stop_grace(&self) -> Duration {
        let graces = self
            .tasks
            .iter()
            .filter_map(|task| task.settings.stop_grace);
        graces.fold(self.settings.stop_grace, Duration::max)
    }

    fn reach(&self) -> Reach {
        let subscriptions = self.subscriptions.iter().map(|source| {
            let topic = source.settings.dead_letter_topic.as_deref();
            (source.name.clone(), topic.map(Into::into))
        });
        let tasks = self.tasks.iter();
        Reach {
            subscriptions: subscriptions.collect(),
            tasks: tasks
                .map(|task| {
                    let terms = TaskTerms {
                        max_attempts: task.settings.max_attempts,
                        acked_when_claimed: task.settings.ack == AckTiming::BeforeRun,
                    };
                    (task.name.clone(), terms)
                })
                .collect(),
        }
    }

    fn intakes(&self, running: &TaskTracker, shutdown: &Shutdown) -> BTreeMap<String, Arc<Intake>> {
        self.subscriptions
            .iter()
            .map(|source| {
                let held = HeldDeliveries::new(
                    self.guard.clone(),
                    running.clone(),
                    shutdown.draining.clone(),
                );
                let intake = Intake::new(&source.name, source.settings.clone(), held);
                (source.name.clone(), Arc::new(intake))
            })
            .collect()
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
