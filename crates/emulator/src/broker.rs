//! The engine behind a lock, with the clock and the wake-ups of waiters.

use std::collections::HashMap;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

use chrono::Utc;
use google_cloud_gax::error::rpc::Code;
use tokio::sync::{Notify, watch};
use tokio_util::sync::CancellationToken;

use super::Options;
use super::backlog::Delivery;
use super::confirmation::Confirmation;
use super::engine::{Engine, Page, PageRequest, Wake};
use super::error::BrokerError;
use super::message::NewMessage;
use super::resource;
use super::stream_id::StreamId;
use super::streams::StreamOptions;

mod faults;

/// The most messages that one pull returns:
/// <https://cloud.google.com/pubsub/quotas#resource_limits>.
const MAX_PULL_MESSAGES: usize = 1000;

/// The emulator's topics and subscriptions, for use within the process. Clones are cheap and
/// share everything.
#[derive(Debug, Clone)]
pub struct Broker {
    shared: Arc<Shared>,
    /// One per server, so that the broker can be served again.
    closing: CancellationToken,
}

#[derive(Debug)]
struct Shared {
    state: Mutex<State>,
    /// Signals that the next timer became earlier.
    timer: Notify,
    /// Whether streams send nothing.
    silence: watch::Sender<bool>,
    /// The status with which all streams must end; each stream has one receiver.
    resets: watch::Sender<Code>,
    options: Options,
}

#[derive(Debug)]
struct State {
    engine: Engine,
    /// The instant that the timer loop waits for.
    armed: Option<Instant>,
    streams: HashMap<StreamId, Arc<Notify>>,
    pulls: HashMap<String, Arc<Notify>>,
}

impl Broker {
    pub(super) fn new(options: Options) -> Self {
        let faults = options.faults.clone();
        let silence = watch::Sender::new(faults.silence);
        let state = State {
            engine: Engine::new(options.max_retained_bytes, faults, Utc::now()),
            armed: None,
            streams: HashMap::new(),
            pulls: HashMap::new(),
        };
        Self {
            shared: Arc::new(Shared {
                state: Mutex::new(state),
                timer: Notify::new(),
                silence,
                resets: watch::Sender::new(Code::Ok),
                options,
            }),
            closing: CancellationToken::new(),
        }
    }

    /// The same broker, for its next server.
    pub(super) fn for_another_server(&self) -> Self {
        Self {
            shared: Arc::clone(&self.shared),
            closing: CancellationToken::new(),
        }
    }

    /// Delivers a message a second time, under the same message id and publish time, to every
    /// subscription of its topic, as Pub/Sub does now and then
    /// (<https://cloud.google.com/pubsub/docs/subscription-overview#default_properties>). On
    /// an ordered subscription, the later messages of its key follow it again. A topic
    /// remembers its last 10 000 messages, fewer when memory is short. Subscriptions with
    /// exactly-once delivery get no duplicate.
    ///
    /// # Errors
    /// [`BrokerError::NotFound`] if there is no such topic or the topic does not remember the
    /// message.
    pub fn duplicate(&self, topic: &str, message_id: &str) -> Result<(), BrokerError> {
        self.with(|engine, now| engine.duplicate(topic, message_id, now))
    }

    /// How many messages of a subscription are unacknowledged, including outstanding ones.
    ///
    /// # Errors
    /// [`BrokerError::NotFound`] if there is no such subscription.
    pub fn backlog_len(&self, subscription: &str) -> Result<usize, BrokerError> {
        self.with(|engine, _| engine.backlog_len(subscription))
    }

    /// How many of these are outstanding: delivered, and neither acknowledged nor past their
    /// ack deadline.
    ///
    /// # Errors
    /// [`BrokerError::NotFound`] if there is no such subscription.
    pub fn outstanding(&self, subscription: &str) -> Result<usize, BrokerError> {
        self.with(|engine, _| engine.outstanding(subscription))
    }

    /// How many deliveries of a subscription have failed since it was created: nacked, or not
    /// acknowledged within the ack deadline.
    ///
    /// # Errors
    /// [`BrokerError::NotFound`] if there is no such subscription.
    pub fn failed_deliveries(&self, subscription: &str) -> Result<u64, BrokerError> {
        self.with(|engine, _| engine.failed_deliveries(subscription))
    }

    pub(super) fn options(&self) -> &Options {
        &self.shared.options
    }

    /// Cancelled when the server shuts down.
    pub(super) fn closing(&self) -> &CancellationToken {
        &self.closing
    }

    pub(super) fn create_topic(&self, topic: resource::Topic) -> Result<(), BrokerError> {
        self.with(|engine, _| engine.create_topic(topic))
    }

    pub(super) fn topic(&self, name: &str) -> Result<resource::Topic, BrokerError> {
        self.with(|engine, _| engine.topic(name))
    }

    pub(super) fn topics(
        &self,
        project: &str,
        page: &PageRequest,
    ) -> Result<Page<resource::Topic>, BrokerError> {
        self.with(|engine, _| engine.topics(project, page))
    }

    pub(super) fn topic_subscriptions(
        &self,
        topic: &str,
        page: &PageRequest,
    ) -> Result<Page<String>, BrokerError> {
        self.with(|engine, _| engine.topic_subscriptions(topic, page))
    }

    pub(super) fn delete_topic(&self, name: &str) -> Result<(), BrokerError> {
        self.with(|engine, _| engine.delete_topic(name))
    }

    pub(super) fn create_subscription(
        &self,
        subscription: resource::Subscription,
    ) -> Result<resource::Subscription, BrokerError> {
        self.with(|engine, _| engine.create_subscription(subscription))
    }

    pub(super) fn subscription(&self, name: &str) -> Result<resource::Subscription, BrokerError> {
        self.with(|engine, _| engine.subscription(name))
    }

    pub(super) fn subscriptions(
        &self,
        project: &str,
        page: &PageRequest,
    ) -> Result<Page<resource::Subscription>, BrokerError> {
        self.with(|engine, _| engine.subscriptions(project, page))
    }

    pub(super) fn delete_subscription(&self, name: &str) -> Result<(), BrokerError> {
        self.with(|engine, _| engine.delete_subscription(name))
    }

    pub(super) fn publish(
        &self,
        topic: &str,
        messages: Vec<NewMessage>,
    ) -> Result<Vec<String>, BrokerError> {
        self.with(|engine, now| engine.publish(topic, messages, now, Utc::now()))
    }

    pub(super) fn acknowledge(
        &self,
        subscription: &str,
        ack_ids: &[String],
    ) -> Result<Confirmation, BrokerError> {
        self.with(|engine, now| engine.acknowledge(subscription, ack_ids, now))
    }

    pub(super) fn modify_ack_deadline(
        &self,
        subscription: &str,
        ack_ids: &[String],
        seconds: i32,
    ) -> Result<Confirmation, BrokerError> {
        self.with(|engine, now| engine.modify_ack_deadline(subscription, ack_ids, seconds, now))
    }

    /// A unary pull as clients request it.
    pub(super) async fn pull_up_to(
        &self,
        subscription: &str,
        max_messages: i32,
        return_immediately: bool,
    ) -> Result<Vec<Delivery>, BrokerError> {
        let max_messages = match usize::try_from(max_messages) {
            Ok(0) | Err(_) => {
                return Err(BrokerError::InvalidArgument(format!(
                    "max_messages is {max_messages}; it must be positive."
                )));
            }
            Ok(asked) => asked.min(MAX_PULL_MESSAGES),
        };
        let patience = if return_immediately {
            Duration::ZERO
        } else {
            self.options().pull_wait
        };
        self.pull(subscription, max_messages, patience).await
    }

    /// Waits up to `patience` for at least one message; then returns empty.
    async fn pull(
        &self,
        subscription: &str,
        max_messages: usize,
        patience: Duration,
    ) -> Result<Vec<Delivery>, BrokerError> {
        let deadline = tokio::time::Instant::now() + patience;
        let ready = self.pull_wakes(subscription);
        loop {
            let pulled = self.with(|engine, now| engine.pull(subscription, max_messages, now))?;
            if !pulled.is_empty() {
                return Ok(pulled);
            }
            tokio::select! {
                () = ready.notified() => {}
                () = tokio::time::sleep_until(deadline) => return Ok(pulled),
                () = self.closing.cancelled() => return Err(BrokerError::shutting_down()),
            }
        }
    }

    pub(super) fn open_stream(
        &self,
        subscription: &str,
        options: StreamOptions,
    ) -> Result<OpenStream, BrokerError> {
        let id = self.with(|engine, _| engine.open_stream(subscription, options))?;
        let wake = Arc::new(Notify::new());
        self.lock().streams.insert(id, Arc::clone(&wake));
        Ok(OpenStream {
            broker: self.clone(),
            subscription: subscription.to_owned(),
            id,
            wake,
        })
    }

    /// Fires timers until shutdown.
    pub(super) async fn run_timers(&self) {
        loop {
            let next = self.arm();
            let due = async {
                match next {
                    Some(next) => tokio::time::sleep_until(next.into()).await,
                    None => std::future::pending().await,
                }
            };
            tokio::select! {
                () = due => {}
                () = self.shared.timer.notified() => {}
                () = self.closing.cancelled() => return,
            }
        }
    }

    fn arm(&self) -> Option<Instant> {
        self.with(|engine, now| engine.expire(now));
        let mut state = self.lock();
        state.armed = state.engine.next_timer();
        state.armed
    }

    /// Runs one operation and wakes the affected waiters.
    fn with<R>(&self, operation: impl FnOnce(&mut Engine, Instant) -> R) -> R {
        let mut state = self.lock();
        // Tokio's clock, so that tests may pause it.
        let now = tokio::time::Instant::now().into_std();
        let result = operation(&mut state.engine, now);
        for wake in state.engine.drain_wakes() {
            state.wake(&wake);
        }
        if state.must_rearm() {
            self.shared.timer.notify_one();
        }
        result
    }

    fn pull_wakes(&self, subscription: &str) -> Arc<Notify> {
        let mut state = self.lock();
        // Those that nobody waits for any more, so that the map stays small.
        state.pulls.retain(|_, wakes| Arc::strong_count(wakes) > 1);
        let wakes = state.pulls.entry(subscription.to_owned()).or_default();
        Arc::clone(wakes)
    }

    fn lock(&self) -> MutexGuard<'_, State> {
        let state = self.shared.state.lock();
        state.unwrap_or_else(PoisonError::into_inner)
    }
}

impl State {
    fn wake(&self, wake: &Wake) {
        let waiter = match wake {
            Wake::Stream(id) => self.streams.get(id),
            Wake::Pull(subscription) => self.pulls.get(subscription),
        };
        if let Some(waiter) = waiter {
            waiter.notify_one();
        }
    }

    fn must_rearm(&self) -> bool {
        match (self.engine.next_timer(), self.armed) {
            (Some(next), Some(armed)) => next < armed,
            (next, _) => next.is_some(),
        }
    }
}

/// A streaming pull; dropping it closes it.
#[derive(Debug)]
pub(super) struct OpenStream {
    broker: Broker,
    pub subscription: String,
    id: StreamId,
    wake: Arc<Notify>,
}

impl OpenStream {
    /// The next deliveries, at least one. Call it when they can be sent at
    /// once; their ack deadline is running. Cancelling it loses nothing.
    pub async fn next(&self) -> Result<Vec<Delivery>, BrokerError> {
        loop {
            let taken = self
                .broker
                .with(|engine, now| engine.take(&self.subscription, self.id, now))?;
            if !taken.is_empty() {
                return Ok(taken);
            }
            self.wake.notified().await;
        }
    }

    /// Whether the stream is to end, now that it has sent messages, and how.
    pub fn reset_by_chance(&self) -> Option<Code> {
        self.broker.with(|engine, _| engine.reset_by_chance())
    }

    pub fn set_ack_deadline(&self, ack_deadline: Duration) -> Result<(), BrokerError> {
        self.broker.with(|engine, _| {
            engine.set_stream_ack_deadline(&self.subscription, self.id, ack_deadline)
        })
    }
}

impl Drop for OpenStream {
    fn drop(&mut self) {
        self.broker.lock().streams.remove(&self.id);
        self.broker
            .with(|engine, now| engine.close_stream(&self.subscription, self.id, now));
    }
}
