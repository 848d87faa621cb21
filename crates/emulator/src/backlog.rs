//! The unacknowledged messages of one subscription: which may be delivered, which are
//! outstanding and until when, and which wait behind another.
//!
//! Every message is in one of four states. `Ready` may be delivered; `Behind` waits for an
//! earlier message of its ordering key; `Outstanding` was delivered and is neither
//! acknowledged nor past its ack deadline; `Delayed` waits for its backoff, or an added
//! latency, to pass. All ways back to `Ready` lead through [`Backlog::give_back`], all ways
//! out through [`Backlog::settle`].

use std::collections::{BTreeMap, BTreeSet};
use std::sync::Arc;
use std::time::{Duration, Instant};

use self::lines::Lines;
use self::ready::{Place, Ready};
use super::ack_id::{AckId, Position};
use super::faults::Moment;
use super::message::Message;
use super::resource::{self, RetryPolicy};
use super::stream_id::StreamId;

mod copies;
mod delivery;
mod lines;
mod ready;

pub use delivery::{DeadLetter, Delivery, Freed};

#[derive(Debug)]
struct Entry {
    message: Arc<Message>,
    deliveries: u32,
    /// The end of its backoff, if its last delivery failed.
    not_before: Option<Instant>,
    state: State,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum State {
    Ready {
        place: Place,
    },
    Behind,
    Outstanding {
        delivery: u64,
        deadline: Instant,
        stream: Option<StreamId>,
    },
    Delayed {
        until: Instant,
    },
}

#[derive(Debug)]
pub struct Backlog {
    /// Part of the ack ids.
    subscription: u64,
    ordered: bool,
    exactly_once: bool,
    retry: Option<RetryPolicy>,
    /// A message whose delivery of this number fails becomes a dead letter.
    max_attempts: Option<u32>,
    dead_letter_topic_exists: bool,
    entries: BTreeMap<Position, Entry>,
    ready: Ready,
    /// The ack deadlines of outstanding messages, and the ends of delayed ones' waits.
    timers: BTreeSet<(Instant, Position)>,
    lines: Lines,
    dead_letters: Vec<DeadLetter>,
    copies: u64,
    deliveries: u64,
    failed_deliveries: u64,
}

impl Backlog {
    pub fn new(subscription: u64, settings: &resource::Subscription) -> Self {
        let attempts = |policy: &resource::DeadLetterPolicy| {
            u32::try_from(policy.max_delivery_attempts).unwrap_or(u32::MAX)
        };
        Self {
            subscription,
            ordered: settings.ordered,
            exactly_once: settings.exactly_once,
            retry: settings.retry.clone(),
            max_attempts: settings.dead_letter.as_ref().map(attempts),
            // Checked at the creation.
            dead_letter_topic_exists: settings.dead_letter.is_some(),
            entries: BTreeMap::new(),
            ready: Ready::default(),
            timers: BTreeSet::new(),
            lines: Lines::default(),
            dead_letters: Vec::new(),
            copies: 0,
            deliveries: 0,
            failed_deliveries: 0,
        }
    }

    /// While the dead-letter topic does not exist, messages are redelivered beyond the maximum
    /// of attempts: otherwise they would be lost.
    pub fn set_dead_letter_topic_exists(&mut self, exists: bool) {
        self.dead_letter_topic_exists = exists;
    }

    /// The dead letters since the last call, removed from the backlog.
    pub fn take_dead_letters(&mut self) -> Vec<DeadLetter> {
        std::mem::take(&mut self.dead_letters)
    }

    pub fn len(&self) -> usize {
        self.entries.len()
    }

    pub fn outstanding(&self) -> usize {
        let is_out = |entry: &&Entry| matches!(entry.state, State::Outstanding { .. });
        self.entries.values().filter(is_out).count()
    }

    pub fn failed_deliveries(&self) -> u64 {
        self.failed_deliveries
    }

    pub fn has_ready(&self) -> bool {
        !self.ready.is_empty()
    }

    /// The earliest ack deadline or end of a wait.
    pub fn next_timer(&self) -> Option<Instant> {
        self.timers.first().map(|(deadline, _)| *deadline)
    }

    /// Adds a newly published message.
    pub fn add(&mut self, message: Arc<Message>, at: &mut Moment<'_>) {
        self.insert(message, 0, at);
    }

    /// Delivers the first ready message, outstanding for `ack_deadline`.
    pub fn deliver(
        &mut self,
        ack_deadline: Duration,
        stream: Option<StreamId>,
        at: &mut Moment<'_>,
    ) -> Option<Delivery> {
        let position = self.ready.pop_first()?;
        let entry = self.entries.get_mut(&position)?;
        self.deliveries += 1;
        let deadline = at.now + ack_deadline;
        entry.deliveries = entry.deliveries.saturating_add(1);
        entry.state = State::Outstanding {
            delivery: self.deliveries,
            deadline,
            stream,
        };
        self.timers.insert((deadline, position));
        let delivery = Delivery {
            ack_id: AckId {
                subscription: self.subscription,
                position,
                delivery: self.deliveries,
            },
            message: Arc::clone(&entry.message),
            attempt: entry.deliveries,
        };
        self.duplicate_by_chance(&delivery, at);
        Some(delivery)
    }

    pub fn is_outstanding(&self, id: AckId) -> bool {
        self.freed_by(id).is_some()
    }

    /// Acknowledges a delivery. `None` if it is not outstanding: already acknowledged, past
    /// its ack deadline, or superseded by a redelivery, whose message it must not settle.
    /// Pub/Sub, too, may ignore such an ack:
    /// <https://cloud.google.com/pubsub/docs/lease-management>.
    pub fn acknowledge(&mut self, id: AckId, at: &mut Moment<'_>) -> Option<Freed> {
        let freed = self.freed_by(id)?;
        self.settle(id.position, at);
        Some(freed)
    }

    /// Makes a delivery's message ready again, at once or after its backoff.
    /// `None` as for [`Self::acknowledge`].
    pub fn nack(&mut self, id: AckId, at: &mut Moment<'_>) -> Option<Freed> {
        let freed = self.freed_by(id)?;
        self.fail(id.position, at);
        Some(freed)
    }

    /// Takes back a delivery that was never sent; it does not count as an attempt.
    pub fn take_back(&mut self, id: AckId, at: &mut Moment<'_>) {
        if self.freed_by(id).is_none() {
            return;
        }
        if let Some(entry) = self.entries.get_mut(&id.position) {
            entry.deliveries = entry.deliveries.saturating_sub(1);
        }
        self.give_back(id.position, at);
    }

    /// Moves the ack deadline of an outstanding delivery. `None` as for
    /// [`Self::acknowledge`].
    pub fn extend(&mut self, id: AckId, until: Instant) -> Option<()> {
        self.freed_by(id)?;
        let entry = self.entries.get_mut(&id.position)?;
        if let State::Outstanding { deadline, .. } = &mut entry.state {
            self.timers.remove(&(*deadline, id.position));
            *deadline = until;
            self.timers.insert((until, id.position));
        }
        Some(())
    }

    /// Ends every delivery past its ack deadline, and every wait that is over.
    pub fn expire(&mut self, at: &mut Moment<'_>) -> Vec<Freed> {
        let mut freed = Vec::new();
        while let Some(&(due, position)) = self.timers.first() {
            if due > at.now {
                break;
            }
            match self.room_of(position) {
                Some(room) => {
                    freed.push(room);
                    self.fail(position, at);
                }
                None => {
                    self.timers.pop_first();
                    self.make_ready(position, at);
                }
            }
        }
        freed
    }

    fn insert(&mut self, message: Arc<Message>, copy: u64, at: &mut Moment<'_>) {
        let position = Position {
            sequence: message.sequence,
            copy,
        };
        let key = self.key_of(&message).map(str::to_owned);
        self.entries.insert(
            position,
            Entry {
                message,
                deliveries: 0,
                not_before: None,
                state: State::Behind,
            },
        );
        let Some(key) = key else {
            self.offer(position, at);
            return;
        };
        self.lines.join(&key, position);
        self.step_back(&key);
        self.advance(&key, at);
    }

    fn key_of<'a>(&self, message: &'a Message) -> Option<&'a str> {
        let keyed = self.ordered && !message.ordering_key.is_empty();
        keyed.then_some(message.ordering_key.as_str())
    }

    fn key_at(&self, position: Position) -> Option<String> {
        let entry = self.entries.get(&position)?;
        self.key_of(&entry.message).map(str::to_owned)
    }

    /// Makes a message ready, now or at the end of its backoff.
    fn offer(&mut self, position: Position, at: &mut Moment<'_>) {
        let Some(entry) = self.entries.get_mut(&position) else {
            return;
        };
        let end = entry.not_before.map_or(at.now, |end| end.max(at.now));
        let until = end + at.dice.latency();
        if until <= at.now {
            self.make_ready(position, at);
            return;
        }
        entry.state = State::Delayed { until };
        self.timers.insert((until, position));
    }

    fn make_ready(&mut self, position: Position, at: &mut Moment<'_>) {
        let Some(entry) = self.entries.get_mut(&position) else {
            return;
        };
        let again = entry.deliveries > 0;
        let others = self.ready.len();
        let moved = again.then(|| at.dice.out_of_order(others)).flatten();
        let place = match moved {
            Some(index) => self.ready.insert_behind(index, position),
            None => self.ready.insert(position),
        };
        entry.state = State::Ready { place };
    }

    /// Offers the first message of the key, if none is active.
    fn advance(&mut self, key: &str, at: &mut Moment<'_>) {
        if let Some(first) = self.lines.advance(key) {
            self.offer(first, at);
        }
    }

    /// Puts the active message of the key back in line unless it is outstanding, so that an
    /// earlier one, which came as a copy, may pass it.
    fn step_back(&mut self, key: &str) {
        let Some(active) = self.lines.active(key) else {
            return;
        };
        let Some(entry) = self.entries.get_mut(&active) else {
            return;
        };
        match entry.state {
            State::Ready { place } => self.ready.remove(place, active),
            State::Delayed { until } => {
                self.timers.remove(&(until, active));
            }
            State::Outstanding { .. } | State::Behind => return,
        }
        entry.state = State::Behind;
        self.lines.release(key);
    }

    /// The room that ending this delivery frees; `None` unless it is the outstanding delivery
    /// of its message.
    fn freed_by(&self, id: AckId) -> Option<Freed> {
        if id.subscription != self.subscription {
            return None;
        }
        match self.entries.get(&id.position)?.state {
            State::Outstanding { delivery, .. } if delivery == id.delivery => {
                self.room_of(id.position)
            }
            _ => None,
        }
    }

    fn room_of(&self, position: Position) -> Option<Freed> {
        let entry = self.entries.get(&position)?;
        let State::Outstanding { stream, .. } = entry.state else {
            return None;
        };
        Some(Freed {
            stream,
            bytes: entry.message.size(),
        })
    }

    /// Ends a failed delivery: nacked, or past its ack deadline.
    fn fail(&mut self, position: Position, at: &mut Moment<'_>) {
        let Some(entry) = self.entries.get_mut(&position) else {
            return;
        };
        self.failed_deliveries += 1;
        let too_often = self
            .max_attempts
            .is_some_and(|most| entry.deliveries >= most);
        if too_often && self.dead_letter_topic_exists {
            self.dead_letters.push(DeadLetter {
                message: Arc::clone(&entry.message),
                attempts: entry.deliveries,
            });
            self.settle(position, at);
            return;
        }
        let backoff = self.retry.as_ref();
        let backoff = backoff.map(|policy| policy.backoff(entry.deliveries));
        entry.not_before = backoff.map(|backoff| at.now + backoff);
        self.give_back(position, at);
    }

    /// Ends a message's outstanding delivery and makes it ready, now or at the end of its
    /// backoff.
    fn give_back(&mut self, position: Position, at: &mut Moment<'_>) {
        self.end_delivery(position);
        let Some(key) = self.key_at(position) else {
            self.offer(position, at);
            return;
        };
        self.lines.release(&key);
        self.advance(&key, at);
    }

    /// Removes a message for good.
    fn settle(&mut self, position: Position, at: &mut Moment<'_>) {
        self.end_delivery(position);
        let key = self.key_at(position);
        self.entries.remove(&position);
        let Some(key) = key else { return };
        self.lines.leave(&key, position);
        self.lines.release(&key);
        self.advance(&key, at);
    }

    fn end_delivery(&mut self, position: Position) {
        let Some(entry) = self.entries.get_mut(&position) else {
            return;
        };
        if let State::Outstanding { deadline, .. } = entry.state {
            self.timers.remove(&(deadline, position));
            entry.state = State::Behind;
        }
    }
}
