//! The worker: pulls deliveries into free slots and sees each run to its end.
//!
//! `admission` decides which jobs may begin. A job comes by a delivery (`puller`,
//! `process`) or from the queue (`queue`); from then on `attempt` owns it. `hold` keeps
//! the deliveries of jobs that do not run here.

mod admission;
mod attempt;
mod dead_letters;
mod events;
mod hold;
mod intake;
mod key_turns;
mod lease_keeper;
mod process;
mod puller;
mod purger;
mod queue;
mod supervise;
mod unknown_tasks;

use std::collections::BTreeMap;
use std::panic::AssertUnwindSafe;
use std::sync::{Arc, OnceLock};
use std::time::Duration;

use futures::FutureExt;
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

use admission::{Admission, Capacity, SubscriptionCapacity, TaskCapacity};
use attempt::Context;
use dead_letters::DeadLetters;
use hold::HeldDeliveries;
use intake::Intake;
use lease_keeper::LeaseKeeper;
use process::Processor;
use puller::Puller;
use queue::Sweeper;
use unknown_tasks::UnknownTasks;

pub use events::{Event, EventKind, Events};

/// How long writing outcomes and giving claims back may take after the last run has
/// stopped.
const LAST_WRITES: Duration = Duration::from_secs(5);

/// How long sending the acks and nacks of settled deliveries may take.
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

/// A subscription with its configuration.
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

    /// The worker's events, from now on.
    #[must_use]
    pub fn events(&self) -> Events {
        self.events.clone()
    }

    /// Works until the shutdown, then drains: stops pulling, hands back what has not
    /// started, lets runs finish, asks the rest to stop, gives their claims back, and
    /// sends the outstanding acks and nacks.
    ///
    /// # Errors
    /// One of its loops has panicked, and therefore the worker has drained.
    pub async fn run(self, shutdown: Shutdown) -> Result<(), Panicked> {
        let loops = Loops::new(&shutdown);
        let running = TaskTracker::new();
        let stop_grace = self.longest_stop_grace();
        let patience = self.settings.shutdown_grace.saturating_sub(stop_grace);
        let parts = self.wire(&shutdown, &running, stop_grace);
        let admission = parts.context.admission.clone();
        let guard = parts.context.guard.clone();

        // These go on while runs drain: leases are renewed to the end.
        let mut background = JoinSet::new();
        let keeper = parts.context.keeper.clone();
        background.spawn(loops.supervised("lease keeper", keeper.clone().run()));
        let watching = keeper.watch_for_cancels();
        background.spawn(loops.supervised("watch for cancels", watching));
        let watching = guard.clone();
        let watching = async move { watching.watch_over_the_database().await };
        background.spawn(loops.supervised("watch over the database", watching));
        let watching = guard.clone();
        let watching = async move { watching.watch_over_its_loops().await };
        background.spawn(loops.supervised("guard", watching));
        background.spawn(loops.supervised("watch for unknown tasks", parts.unknown_tasks.run()));
        let requests = Arc::clone(guard.store());
        let purging = purger::purge(requests, parts.retention, shutdown.draining.clone());
        background.spawn(loops.supervised("purger", purging));
        let dead_letters = Arc::clone(&parts.dead_letters);
        let publishing = async move { dead_letters.run().await };
        background.spawn(loops.supervised("publisher of dead letters", publishing));

        let held = parts.context.held.clone();
        let holding = tokio::spawn(loops.supervised("holder of deliveries", held.run()));
        let sweeping = tokio::spawn(loops.supervised("sweeper", parts.sweeper.run()));
        let mut pullers = JoinSet::new();
        for puller in parts.pullers {
            pullers.spawn(loops.supervised("puller", puller.run()));
        }

        let last_words = stop_grace + LAST_WRITES;
        let giving_up = shutdown.giving_up.clone();
        let stopping = tokio::spawn(async move { shutdown.stop_after(patience, last_words).await });
        let subscriptions = pullers.join_all().await.into_iter().flatten().collect();
        info!(running = admission.running(), "pulling has stopped");
        let ending = async {
            // An unfinished sweep still has jobs to hand over.
            let _ = tokio::join!(sweeping, holding);
            running.close();
            running.wait().await;
            guard.give_back_unanswered().await;
        };
        tokio::select! {
            () = ending => {}
            // Only a hanging database takes this long; the leases will expire.
            () = a_moment_after(giving_up) => warn!("stopping although something still waits for the database"),
        }
        stopping.abort();
        background.shutdown().await;
        if timeout(FLUSH_TIMEOUT, parts.dead_letters.publish_mine())
            .await
            .is_err()
        {
            warn!("dead letters are left for another worker to publish");
        }
        flush(subscriptions).await;
        info!("stopped");
        loops.ended()
    }

    /// Creates the loops of the worker, which share its room and its leases.
    fn wire(self, shutdown: &Shutdown, running: &TaskTracker, stop_grace: Duration) -> Parts {
        let admission = Admission::new(self.capacity(), self.devices.clone());
        let store = Arc::clone(self.guard.store());
        let held = HeldDeliveries::new(
            self.guard.clone(),
            store.clone(),
            admission.clone(),
            running.clone(),
            shutdown.draining.clone(),
        );
        let keeper = LeaseKeeper::new(
            store.clone(),
            self.guard.health().clone(),
            self.guard.terms().clone(),
            stop_grace,
        );
        let dead_letters = Arc::new(DeadLetters {
            letters: store.clone(),
            worker: Arc::clone(&self.guard.terms().worker),
            publishers: self.publishers.clone(),
            wake: Arc::default(),
            draining: shutdown.draining.clone(),
        });
        let context = Arc::new(Context {
            guard: self.guard.clone(),
            keeper,
            admission: admission.clone(),
            held,
            stop_grace: self.settings.stop_grace,
            shutdown: shutdown.clone(),
            events: self.events.clone(),
            wake_dead_letters: Arc::clone(&dead_letters.wake),
        });
        let reach = self.reach();
        let processor = Arc::new(Processor {
            context: Arc::clone(&context),
            intakes: self.intakes(),
            tasks: self.tasks,
            unknown_task_patience: self.settings.unknown_task_patience,
            running: running.clone(),
        });
        let unknown_tasks = UnknownTasks {
            queue: store.clone(),
            guard: self.guard.clone(),
            reach: reach.clone(),
            patience: self.settings.unknown_task_patience,
            wake_dead_letters: Arc::clone(&dead_letters.wake),
            draining: shutdown.draining.clone(),
        };
        let sweeper = Sweeper {
            queue: store,
            reach,
            context: Arc::clone(&context),
            processor: Arc::clone(&processor),
            draining: shutdown.draining.clone(),
        };
        let pullers = self.subscriptions.into_iter().map(|source| Puller {
            intake: Arc::clone(&processor.intakes[&source.name]),
            subscription: source.subscription,
            admission: admission.clone(),
            processor: Arc::clone(&processor),
            draining: shutdown.draining.clone(),
            database_is_up: self.guard.health().watch(),
        });
        Parts {
            pullers: pullers.collect(),
            context,
            sweeper,
            unknown_tasks,
            dead_letters,
            retention: self.retention,
        }
    }

    fn capacity(&self) -> Capacity {
        let subscriptions = self.subscriptions.iter().map(|source| {
            let capacity = SubscriptionCapacity {
                concurrency: source.settings.concurrency,
                max_waiting: source.settings.max_waiting,
            };
            (source.name.clone(), capacity)
        });
        let tasks = self.tasks.iter().map(|task| {
            let capacity = TaskCapacity {
                concurrency: task.settings.concurrency,
                gpus: task.settings.gpus,
            };
            (task.name.clone(), capacity)
        });
        Capacity {
            slots: self.settings.slots,
            subscriptions: subscriptions.collect(),
            tasks: tasks.collect(),
            reserve_after: self.settings.reserve_after,
        }
    }

    /// The longest stop grace of any run.
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

    fn intakes(&self) -> BTreeMap<String, Arc<Intake>> {
        self.subscriptions
            .iter()
            .map(|source| {
                let intake = Intake::new(&source.name, source.settings.clone());
                (source.name.clone(), Arc::new(intake))
            })
            .collect()
    }
}

/// The loops of a worker and their shared state.
struct Parts {
    context: Arc<Context>,
    sweeper: Sweeper,
    unknown_tasks: UnknownTasks,
    pullers: Vec<Puller>,
    dead_letters: Arc<DeadLetters>,
    retention: Duration,
}

/// A worker's loop has panicked.
#[derive(Debug, thiserror::Error)]
#[error("the worker has stopped because its {0} panicked; the log says where")]
pub struct Panicked(&'static str);

/// Watches over the worker's loops.
struct Loops {
    shutdown: Shutdown,
    /// The first that has panicked.
    panicked: Arc<OnceLock<&'static str>>,
}

impl Loops {
    fn new(shutdown: &Shutdown) -> Self {
        Self {
            shutdown: shutdown.clone(),
            panicked: Arc::default(),
        }
    }

    /// Runs a loop. If it panics, the worker would look alive without doing its work, so it
    /// drains, and the process manager starts another.
    fn supervised<T, F: Future<Output = T>>(
        &self,
        name: &'static str,
        work: F,
    ) -> impl Future<Output = Option<T>> + use<T, F> {
        let (shutdown, panicked) = (self.shutdown.clone(), Arc::clone(&self.panicked));
        async move {
            let done = AssertUnwindSafe(work).catch_unwind().await;
            if done.is_err() {
                error!("the {name} has panicked: the worker stops");
                let _ = panicked.set(name);
                shutdown.drain();
            }
            done.ok()
        }
    }

    fn ended(&self) -> Result<(), Panicked> {
        match self.panicked.get() {
            None => Ok(()),
            Some(name) => Err(Panicked(name)),
        }
    }
}

/// Leaves cancelled calls a moment to notice.
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

#[cfg(test)]
mod tests {
    use super::*;

    #[tokio::test]
    async fn a_loop_that_panics_drains_the_worker_and_is_an_error() {
        let shutdown = Shutdown::default();
        let loops = Loops::new(&shutdown);
        let done = loops.supervised("purger", async { 7 }).await;
        assert_eq!((done, shutdown.draining.is_cancelled()), (Some(7), false));
        assert!(loops.ended().is_ok());

        let work = async {
            if done.is_some() {
                panic!("for the test");
            }
        };
        assert_eq!(loops.supervised("sweeper", work).await, None);
        assert!(shutdown.draining.is_cancelled());
        let panicked = loops.ended().unwrap_err();
        assert!(panicked.to_string().contains("sweeper"), "{panicked}");
    }
}
