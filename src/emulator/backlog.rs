//! The unacknowledged messages of one subscription: which may be delivered,
//! which are outstanding and until when, and who waits behind whom.
//!
//! Every message is in one of three states. `Ready` may be delivered;
//! `Behind` waits for an earlier message of its ordering key; `Outstanding` was
//! delivered and is neither acknowledged nor past its ack deadline. All ways
//! back to `Ready` lead through [`Backlog::give_back`], all ways out through
//! [`Backlog::settle`].

use std::collections::{BTreeMap, BTreeSet, HashMap};
use std::sync::Arc;
use std::time::{Duration, Instant};

use super::ack_id::{AckId, Position};
use super::message::Message;
use super::streams::StreamId;

/// A message handed to a client.
#[derive(Debug, Clone)]
pub struct Delivery {
    pub ack_id: AckId,
    pub message: Arc<Message>,
    /// 1 for the first delivery. Clients see it only under a dead-letter
    /// policy.
    pub attempt: u32,
}

impl Delivery {
    /// The attempt as clients see it: zero, which is absent, unless `counted`.
    pub fn attempt_shown(&self, counted: bool) -> i32 {
        if !counted {
            return 0;
        }
        i32::try_from(self.attempt).unwrap_or(i32::MAX)
    }
}

/// The room that a delivery no longer takes on its stream.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Freed {
    /// `None` if a unary pull delivered the message.
    pub stream: Option<StreamId>,
    pub bytes: usize,
}

#[derive(Debug)]
struct Entry {
    message: Arc<Message>,
    deliveries: u32,
    state: State,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum State {
    Ready,
    Behind,
    Outstanding {
        delivery: u64,
        deadline: Instant,
        stream: Option<StreamId>,
    },
}

/// The unacknowledged messages of one ordering key.
#[derive(Debug, Default)]
struct Key {
    positions: BTreeSet<Position>,
    /// The one that is ready or outstanding; all others are behind it.
    active: Option<Position>,
}

#[derive(Debug)]
pub struct Backlog {
    /// Goes into the ack ids.
    subscription: u64,
    ordered: bool,
    entries: BTreeMap<Position, Entry>,
    ready: BTreeSet<Position>,
    /// The ack deadlines of the outstanding messages.
    timers: BTreeSet<(Instant, Position)>,
    keys: HashMap<String, Key>,
    copies: u64,
    deliveries: u64,
}

impl Backlog {
    pub fn new(subscription: u64, ordered: bool) -> Self {
        Self {
            subscription,
            ordered,
            entries: BTreeMap::new(),
            ready: BTreeSet::new(),
            timers: BTreeSet::new(),
            keys: HashMap::new(),
            copies: 0,
            deliveries: 0,
        }
    }

    pub fn len(&self) -> usize {
        self.entries.len()
    }

    pub fn has_ready(&self) -> bool {
        !self.ready.is_empty()
    }

    /// The earliest ack deadline.
    pub fn next_timer(&self) -> Option<Instant> {
        self.timers.first().map(|(deadline, _)| *deadline)
    }

    /// Adds a newly published message.
    pub fn add(&mut self, message: Arc<Message>) {
        self.insert(message, 0);
    }

    /// Adds a message that was added before, whatever became of it.
    pub fn add_copy(&mut self, message: Arc<Message>) {
        self.copies += 1;
        self.insert(message, self.copies);
    }

    /// Whether the message, or a copy of it, still waits for its first
    /// delivery.
    pub fn awaits_first_delivery(&self, sequence: u64) -> bool {
        let first = Position { sequence, copy: 0 };
        let last = Position {
            sequence,
            copy: u64::MAX,
        };
        self.entries
            .range(first..=last)
            .any(|(_, entry)| entry.deliveries == 0)
    }

    /// Delivers the oldest ready message. It is outstanding for `ack_deadline`.
    pub fn deliver(
        &mut self,
        now: Instant,
        ack_deadline: Duration,
        stream: Option<StreamId>,
    ) -> Option<Delivery> {
        let position = self.ready.pop_first()?;
        let entry = self.entries.get_mut(&position)?;
        self.deliveries += 1;
        let deadline = now + ack_deadline;
        entry.deliveries = entry.deliveries.saturating_add(1);
        entry.state = State::Outstanding {
            delivery: self.deliveries,
            deadline,
            stream,
        };
        self.timers.insert((deadline, position));
        Some(Delivery {
            ack_id: AckId {
                subscription: self.subscription,
                position,
                delivery: self.deliveries,
            },
            message: Arc::clone(&entry.message),
            attempt: entry.deliveries,
        })
    }

    /// Acknowledges a delivery. `None` if it is not outstanding: acknowledged
    /// before, past its ack deadline, or superseded by a redelivery, whose
    /// message it must not settle. Pub/Sub, too, may ignore such an ack:
    /// <https://cloud.google.com/pubsub/docs/lease-management>.
    pub fn acknowledge(&mut self, id: AckId) -> Option<Freed> {
        let freed = self.freed_by(id)?;
        self.settle(id.position);
        Some(freed)
    }

    /// Makes a delivery's message ready again at once. `None` as for
    /// [`Self::acknowledge`].
    pub fn nack(&mut self, id: AckId) -> Option<Freed> {
        let freed = self.freed_by(id)?;
        self.give_back(id.position);
        Some(freed)
    }

    /// Takes back a delivery that was never sent, so that it does not count as
    /// an attempt.
    pub fn take_back(&mut self, id: AckId) {
        if self.freed_by(id).is_none() {
            return;
        }
        self.give_back(id.position);
        if let Some(entry) = self.entries.get_mut(&id.position) {
            entry.deliveries = entry.deliveries.saturating_sub(1);
        }
    }

    /// Moves the ack deadline of an outstanding delivery; ignores any other.
    pub fn extend(&mut self, id: AckId, until: Instant) {
        if self.freed_by(id).is_none() {
            return;
        }
        let Some(entry) = self.entries.get_mut(&id.position) else {
            return;
        };
        if let State::Outstanding { deadline, .. } = &mut entry.state {
            self.timers.remove(&(*deadline, id.position));
            *deadline = until;
            self.timers.insert((until, id.position));
        }
    }

    /// Makes every message ready whose ack deadline has come.
    pub fn expire(&mut self, now: Instant) -> Vec<Freed> {
        let mut freed = Vec::new();
        while let Some(&(deadline, position)) = self.timers.first() {
            if deadline > now {
                break;
            }
            freed.extend(self.room_of(position));
            self.give_back(position);
        }
        freed
    }

    fn insert(&mut self, message: Arc<Message>, copy: u64) {
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
                state: State::Behind,
            },
        );
        let Some(key) = key else {
            self.make_ready(position);
            return;
        };
        self.keys
            .entry(key.clone())
            .or_default()
            .positions
            .insert(position);
        self.step_back(&key);
        self.advance(&key);
    }

    fn key_of<'a>(&self, message: &'a Message) -> Option<&'a str> {
        let keyed = self.ordered && !message.ordering_key.is_empty();
        keyed.then_some(message.ordering_key.as_str())
    }

    fn key_at(&self, position: Position) -> Option<String> {
        let entry = self.entries.get(&position)?;
        self.key_of(&entry.message).map(str::to_owned)
    }

    fn make_ready(&mut self, position: Position) {
        if let Some(entry) = self.entries.get_mut(&position) {
            entry.state = State::Ready;
            self.ready.insert(position);
        }
    }

    /// Lets the first message of the key be the active one, if none is.
    fn advance(&mut self, name: &str) {
        let Some(key) = self.keys.get_mut(name) else {
            return;
        };
        if key.active.is_some() {
            return;
        }
        key.active = key.positions.first().copied();
        match key.active {
            Some(first) => self.make_ready(first),
            None => drop(self.keys.remove(name)),
        }
    }

    /// Puts a ready message of the key back in line, so that an earlier one,
    /// which came as a copy, may pass it.
    fn step_back(&mut self, name: &str) {
        let Some(key) = self.keys.get_mut(name) else {
            return;
        };
        let Some(active) = key.active.filter(|active| self.ready.remove(active)) else {
            return;
        };
        key.active = None;
        if let Some(entry) = self.entries.get_mut(&active) {
            entry.state = State::Behind;
        }
    }

    /// The room that ending this delivery gives back; `None` unless it is the
    /// outstanding delivery of its message.
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

    /// Ends the outstanding delivery of a message and makes it ready.
    fn give_back(&mut self, position: Position) {
        self.end_delivery(position);
        let Some(key) = self.key_at(position) else {
            self.make_ready(position);
            return;
        };
        self.release_key(&key);
        self.advance(&key);
    }

    /// Removes a message for good.
    fn settle(&mut self, position: Position) {
        self.end_delivery(position);
        let key = self.key_at(position);
        self.entries.remove(&position);
        let Some(key) = key else { return };
        if let Some(line) = self.keys.get_mut(&key) {
            line.positions.remove(&position);
        }
        self.release_key(&key);
        self.advance(&key);
    }

    fn release_key(&mut self, name: &str) {
        if let Some(key) = self.keys.get_mut(name) {
            key.active = None;
        }
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
