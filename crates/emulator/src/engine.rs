//! The whole emulator as a state machine: every topic and subscription, without clock or
//! I/O, and with seeded randomness only. Callers pass the time in, and fetch which
//! streams and pulls to wake.

use std::collections::{BTreeMap, BTreeSet, VecDeque};
use std::sync::Arc;
use std::time::{Duration, Instant};

use chrono::{DateTime, SubsecRound, Utc};

use super::backlog::Delivery;
use super::confirmation::Confirmation;
use super::error::BrokerError;
use super::faults::{Dice, Faults, Moment};
use super::feed::Feed;
use super::message::{self, Memory, Message, NewMessage};
use super::name;
use super::resource;
use super::stream_id::StreamId;
use super::streams::StreamOptions;

mod dead_letters;
mod faults;
mod page;
mod resources;
#[cfg(test)]
mod tests;

pub use page::{Page, PageRequest};

/// How many of its latest messages a topic remembers, delivered or not.
const HISTORY_MESSAGES: usize = 10_000;
/// Pub/Sub's publish times have milliseconds.
const PUBLISH_TIME_DIGITS: u16 = 3;
const MAX_ACK_DEADLINE_SECONDS: i32 = 600;

/// A waiter for deliveries that should look again.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Wake {
    Stream(StreamId),
    /// One pull of the named subscription.
    Pull(String),
}

#[derive(Debug)]
struct Topic {
    settings: resource::Topic,
    subscriptions: BTreeSet<String>,
    /// The latest messages, oldest first. Forgotten first when memory runs out.
    history: VecDeque<Arc<Message>>,
}

#[derive(Debug)]
pub struct Engine {
    topics: BTreeMap<String, Topic>,
    feeds: BTreeMap<String, Feed>,
    memory: Memory,
    dice: Dice,
    /// The last number given to a message, a subscription or a stream.
    last_number: u64,
    /// Never later than the earliest ack deadline or end of a wait.
    next_timer: Option<Instant>,
    /// The wall clock at the last publishing, from which the publish times of dead
    /// letters are computed.
    last_publish: Option<(Instant, DateTime<Utc>)>,
    wakes: Vec<Wake>,
}

impl Engine {
    /// Numbers start at the wall clock's microseconds, so that ids stay unique across
    /// restarts.
    pub fn new(max_retained_bytes: usize, faults: Faults, started: DateTime<Utc>) -> Self {
        Self {
            topics: BTreeMap::new(),
            feeds: BTreeMap::new(),
            memory: Memory::new(max_retained_bytes),
            dice: Dice::new(faults),
            last_number: microseconds(started),
            next_timer: None,
            last_publish: None,
            wakes: Vec::new(),
        }
    }

    // Messages in.

    /// Publishes all messages or none, and returns their ids.
    pub fn publish(
        &mut self,
        topic: &str,
        messages: Vec<NewMessage>,
        now: Instant,
        wall: DateTime<Utc>,
    ) -> Result<Vec<String>, BrokerError> {
        message::check_request(&messages)?;
        let subscriptions = self.known_topic(topic)?.subscriptions.len();
        let bytes = messages.iter().map(|new| new.charge(subscriptions)).sum();
        self.make_room(topic, bytes)?;
        self.last_publish = Some((now, wall));
        Ok(self.spread(topic, messages, now, wall))
    }

    /// Gives messages to the topic's subscriptions, even without memory for them, and
    /// returns their ids.
    fn spread(
        &mut self,
        topic: &str,
        messages: Vec<NewMessage>,
        now: Instant,
        wall: DateTime<Utc>,
    ) -> Vec<String> {
        let Some(known) = self.topics.get(topic) else {
            return Vec::new();
        };
        let subscriptions = known.subscriptions.clone();
        self.last_number = self.last_number.max(microseconds(wall));
        let publish_time = wall.trunc_subsecs(PUBLISH_TIME_DIGITS);
        let mut ids = Vec::with_capacity(messages.len());
        for new in messages {
            let reservation = self.memory.reserve(new.charge(subscriptions.len()));
            let message = Arc::new(Message::new(
                new,
                self.next_number(),
                publish_time,
                reservation,
            ));
            ids.push(message.id());
            for name in &subscriptions {
                if let Some(feed) = self.feeds.get_mut(name) {
                    let dice = &mut self.dice;
                    feed.add(Arc::clone(&message), &mut Moment { now, dice });
                }
            }
            self.remember(topic, message);
        }
        for name in &subscriptions {
            self.hand_out(name, now);
        }
        ids
    }

    /// Delivers a published message once more, to every subscription of its topic.
    pub fn duplicate(
        &mut self,
        topic: &str,
        message_id: &str,
        now: Instant,
    ) -> Result<(), BrokerError> {
        let known = self.known_topic(topic)?;
        let place = known
            .history
            .iter()
            .position(|message| message.id() == message_id)
            .ok_or_else(|| BrokerError::not_found(&format!("{topic}, message {message_id}")))?;
        let published: Vec<_> = known.history.range(place..).cloned().collect();
        let Some(message) = published.first() else {
            return Ok(());
        };
        for name in known.subscriptions.clone() {
            self.change_feed(&name, now, |feed, at| {
                feed.add_copies(message, &published, at);
            });
        }
        Ok(())
    }

    // Messages out.

    pub fn pull(
        &mut self,
        subscription: &str,
        max_messages: usize,
        now: Instant,
    ) -> Result<Vec<Delivery>, BrokerError> {
        self.with_feed(subscription, now, |feed, at| feed.pull(max_messages, at))
    }

    pub fn open_stream(
        &mut self,
        subscription: &str,
        options: StreamOptions,
    ) -> Result<StreamId, BrokerError> {
        resource::check_ack_deadline(options.ack_deadline)?;
        self.feed(subscription)?;
        let id = StreamId(self.next_number());
        self.feed(subscription)?.open(id, options);
        Ok(id)
    }

    pub fn close_stream(&mut self, subscription: &str, id: StreamId, now: Instant) {
        // A subscription deleted in the meantime needs nothing.
        let _closed = self.with_feed(subscription, now, |feed, at| feed.close(id, at));
    }

    /// The deliveries for a stream that can send now. If there are none, the stream is
    /// woken when there are.
    pub fn take(
        &mut self,
        subscription: &str,
        id: StreamId,
        now: Instant,
    ) -> Result<Vec<Delivery>, BrokerError> {
        self.with_feed(subscription, now, |feed, at| feed.take(id, at))
    }

    pub fn set_stream_ack_deadline(
        &mut self,
        subscription: &str,
        id: StreamId,
        ack_deadline: Duration,
    ) -> Result<(), BrokerError> {
        resource::check_ack_deadline(ack_deadline)?;
        self.feed(subscription)?
            .set_stream_ack_deadline(id, ack_deadline);
        Ok(())
    }

    /// Acknowledges deliveries. Invalid ack ids are ignored; with exactly-once delivery
    /// they are reported.
    pub fn acknowledge(
        &mut self,
        subscription: &str,
        ack_ids: &[String],
        now: Instant,
    ) -> Result<Confirmation, BrokerError> {
        self.with_feed(subscription, now, |feed, at| feed.acknowledge(ack_ids, at))?
    }

    /// Sets ack deadlines to this many seconds from now; 0 makes the messages ready
    /// again, at once or by the retry policy. Invalid ack ids are ignored; with
    /// exactly-once delivery they are reported.
    pub fn modify_ack_deadline(
        &mut self,
        subscription: &str,
        ack_ids: &[String],
        seconds: i32,
        now: Instant,
    ) -> Result<Confirmation, BrokerError> {
        let ack_deadline = modified_ack_deadline(seconds)?;
        self.with_feed(subscription, now, |feed, at| {
            feed.modify_ack_deadline(ack_ids, ack_deadline, at)
        })?
    }

    // Time.

    /// Ends the ack deadlines and backoffs that are due.
    pub fn expire(&mut self, now: Instant) {
        self.next_timer = None;
        let names: Vec<String> = self.feeds.keys().cloned().collect();
        for name in names {
            self.change_feed(&name, now, |feed, at| feed.expire(at));
        }
    }

    /// When to call [`Self::expire`] next; may be too early, never too late.
    pub fn next_timer(&self) -> Option<Instant> {
        self.next_timer
    }

    /// Whom to wake since the last call.
    pub fn drain_wakes(&mut self) -> Vec<Wake> {
        std::mem::take(&mut self.wakes)
    }

    /// The unacknowledged messages of a subscription, including outstanding ones.
    pub fn backlog_len(&self, subscription: &str) -> Result<usize, BrokerError> {
        Ok(self.look_at(subscription)?.backlog_len())
    }

    /// Those of them that are outstanding.
    pub fn outstanding(&self, subscription: &str) -> Result<usize, BrokerError> {
        Ok(self.look_at(subscription)?.outstanding())
    }

    /// How many deliveries were nacked or not acknowledged in time, ever.
    pub fn failed_deliveries(&self, subscription: &str) -> Result<u64, BrokerError> {
        Ok(self.look_at(subscription)?.failed_deliveries())
    }

    fn look_at(&self, name: &str) -> Result<&Feed, BrokerError> {
        let feed = self.feeds.get(name);
        feed.ok_or_else(|| BrokerError::not_found(name))
    }

    /// Runs an operation on a subscription, brought up to date first.
    fn with_feed<R>(
        &mut self,
        name: &str,
        now: Instant,
        operation: impl FnOnce(&mut Feed, &mut Moment<'_>) -> R,
    ) -> Result<R, BrokerError> {
        name::check_subscription(name)?;
        // Distributed before the operation, so that each stream that gets deliveries is
        // woken.
        self.change_feed(name, now, Feed::expire);
        let result = self.change_feed(name, now, operation);
        result.ok_or_else(|| BrokerError::not_found(name))
    }

    fn change_feed<R>(
        &mut self,
        name: &str,
        now: Instant,
        change: impl FnOnce(&mut Feed, &mut Moment<'_>) -> R,
    ) -> Option<R> {
        let feed = self.feeds.get_mut(name)?;
        let dice = &mut self.dice;
        let result = change(feed, &mut Moment { now, dice });
        self.settle_down(name, now);
        Some(result)
    }

    /// Called after every change to a feed.
    fn settle_down(&mut self, name: &str, now: Instant) {
        self.forward_dead_letters(name, now);
        self.hand_out(name, now);
    }

    /// Distributes ready messages and notes whom to wake and when.
    fn hand_out(&mut self, name: &str, now: Instant) {
        let Some(feed) = self.feeds.get_mut(name) else {
            return;
        };
        let dice = &mut self.dice;
        let fed = feed.dispatch(&mut Moment { now, dice });
        self.wakes.extend(fed.into_iter().map(Wake::Stream));
        if feed.has_ready() {
            self.wakes.push(Wake::Pull(name.to_owned()));
        }
        self.next_timer = match (self.next_timer, feed.next_timer()) {
            (Some(known), Some(new)) => Some(known.min(new)),
            (known, new) => known.or(new),
        };
    }

    fn known_topic(&self, name: &str) -> Result<&Topic, BrokerError> {
        name::check_topic(name)?;
        let topic = self.topics.get(name);
        topic.ok_or_else(|| BrokerError::not_found(name))
    }

    fn feed(&mut self, name: &str) -> Result<&mut Feed, BrokerError> {
        name::check_subscription(name)?;
        let feed = self.feeds.get_mut(name);
        feed.ok_or_else(|| BrokerError::not_found(name))
    }

    /// Forgets history, oldest first and this topic's first, until this many bytes fit.
    fn make_room(&mut self, topic: &str, bytes: usize) -> Result<(), BrokerError> {
        if let Some(own) = self.topics.get_mut(topic) {
            forget(&mut own.history, &self.memory, bytes);
        }
        for other in self.topics.values_mut() {
            forget(&mut other.history, &self.memory, bytes);
        }
        if self.memory.has_room_for(bytes) {
            return Ok(());
        }
        Err(BrokerError::ResourceExhausted(format!(
            "Messages occupy {} of the emulator's {} bytes; {bytes} more do not fit.",
            self.memory.used(),
            self.memory.limit()
        )))
    }

    fn remember(&mut self, topic: &str, message: Arc<Message>) {
        let Some(topic) = self.topics.get_mut(topic) else {
            return;
        };
        topic.history.push_back(message);
        if topic.history.len() > HISTORY_MESSAGES {
            topic.history.pop_front();
        }
    }

    fn next_number(&mut self) -> u64 {
        self.last_number += 1;
        self.last_number
    }
}

fn forget(history: &mut VecDeque<Arc<Message>>, memory: &Memory, bytes: usize) {
    while !memory.has_room_for(bytes) && history.pop_front().is_some() {}
}

fn microseconds(wall: DateTime<Utc>) -> u64 {
    u64::try_from(wall.timestamp_micros()).unwrap_or_default()
}

fn modified_ack_deadline(seconds: i32) -> Result<Duration, BrokerError> {
    match u64::try_from(seconds) {
        Ok(good) if seconds <= MAX_ACK_DEADLINE_SECONDS => Ok(Duration::from_secs(good)),
        _ => Err(BrokerError::InvalidArgument(format!(
            "The ack deadline is {seconds} seconds; it must be between 0 and \
             {MAX_ACK_DEADLINE_SECONDS}."
        ))),
    }
}
