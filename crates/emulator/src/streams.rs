//! The open streams of one subscription: how much room each has, and whose turn it is.

use std::collections::{HashMap, VecDeque};
use std::time::Duration;

use super::backlog::{Delivery, Freed};
use super::stream_id::StreamId;

/// The most messages, and roughly the most bytes, of one response.
const BATCH_MESSAGES: usize = 100;
const BATCH_BYTES: usize = 1 << 20;

/// The limits that a stream's client set in its first request.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct StreamOptions {
    pub ack_deadline: Duration,
    /// A stream that has this many messages outstanding gets no more.
    pub max_outstanding_messages: u64,
    /// A stream that has this many bytes outstanding gets no more; so the last message may
    /// exceed it, as in Pub/Sub.
    pub max_outstanding_bytes: u64,
}

impl StreamOptions {
    /// Options from the numbers of a `StreamingPullRequest`, where zero and negative numbers
    /// mean no limit:
    /// <https://cloud.google.com/pubsub/docs/reference/rpc/google.pubsub.v1#streamingpullrequest>.
    pub fn new(ack_deadline: Duration, max_messages: i64, max_bytes: i64) -> Self {
        let limit = |given: i64| match u64::try_from(given) {
            Ok(0) | Err(_) => u64::MAX,
            Ok(limit) => limit,
        };
        Self {
            ack_deadline,
            max_outstanding_messages: limit(max_messages),
            max_outstanding_bytes: limit(max_bytes),
        }
    }
}

#[derive(Debug)]
struct Stream {
    options: StreamOptions,
    outstanding_messages: u64,
    outstanding_bytes: u64,
    /// The transport can send a response now. Only such streams get deliveries, so none ages
    /// in the queue of a client that does not read.
    wants: bool,
    outbox: Vec<Delivery>,
    outbox_bytes: usize,
}

impl Stream {
    fn has_room(&self) -> bool {
        self.wants
            && self.outbox.len() < BATCH_MESSAGES
            && self.outbox_bytes < BATCH_BYTES
            && self.outstanding_messages < self.options.max_outstanding_messages
            && self.outstanding_bytes < self.options.max_outstanding_bytes
    }
}

#[derive(Debug, Default)]
pub struct Streams {
    open: HashMap<StreamId, Stream>,
    /// The stream at the front gets the next message.
    turns: VecDeque<StreamId>,
}

impl Streams {
    pub fn open(&mut self, id: StreamId, options: StreamOptions) {
        self.turns.push_back(id);
        self.open.insert(
            id,
            Stream {
                options,
                outstanding_messages: 0,
                outstanding_bytes: 0,
                wants: false,
                outbox: Vec::new(),
                outbox_bytes: 0,
            },
        );
    }

    /// Removes a stream and returns the deliveries that it did not take.
    pub fn close(&mut self, id: StreamId) -> Vec<Delivery> {
        self.turns.retain(|turn| *turn != id);
        self.open
            .remove(&id)
            .map(|stream| stream.outbox)
            .unwrap_or_default()
    }

    /// Takes back the deliveries that streams were given but did not take.
    pub fn withdraw(&mut self) -> Vec<Delivery> {
        let mut withdrawn = Vec::new();
        for id in &self.turns {
            let Some(stream) = self.open.get_mut(id) else {
                continue;
            };
            for unsent in stream.outbox.drain(..) {
                stream.outstanding_messages -= 1;
                stream.outstanding_bytes -= unsent.message.size() as u64;
                withdrawn.push(unsent);
            }
            stream.outbox_bytes = 0;
        }
        withdrawn
    }

    pub fn ids(&self) -> impl Iterator<Item = StreamId> + '_ {
        self.open.keys().copied()
    }

    pub fn set_ack_deadline(&mut self, id: StreamId, ack_deadline: Duration) {
        if let Some(stream) = self.open.get_mut(&id) {
            stream.options.ack_deadline = ack_deadline;
        }
    }

    /// Marks the stream as able to send now.
    pub fn want(&mut self, id: StreamId) {
        if let Some(stream) = self.open.get_mut(&id) {
            stream.wants = true;
        }
    }

    /// The next stream with room, and the ack deadline for its delivery.
    pub fn next_with_room(&mut self) -> Option<(StreamId, Duration)> {
        let place = self
            .turns
            .iter()
            .position(|id| self.open.get(id).is_some_and(Stream::has_room))?;
        let id = self.turns.remove(place)?;
        self.turns.push_back(id);
        let stream = self.open.get(&id)?;
        Some((id, stream.options.ack_deadline))
    }

    pub fn assign(&mut self, id: StreamId, delivery: Delivery) {
        let Some(stream) = self.open.get_mut(&id) else {
            return;
        };
        let bytes = delivery.message.size();
        stream.outstanding_messages += 1;
        stream.outstanding_bytes += bytes as u64;
        stream.outbox_bytes += bytes;
        stream.outbox.push(delivery);
    }

    pub fn free(&mut self, freed: Freed) {
        let Some(stream) = freed.stream.and_then(|id| self.open.get_mut(&id)) else {
            return;
        };
        stream.outstanding_messages = stream.outstanding_messages.saturating_sub(1);
        stream.outstanding_bytes = stream.outstanding_bytes.saturating_sub(freed.bytes as u64);
    }

    pub fn has_outbox(&self, id: StreamId) -> bool {
        self.open.get(&id).is_some_and(|s| !s.outbox.is_empty())
    }

    /// The deliveries for a stream since it last took. If there are any, the stream must call
    /// [`Self::want`] again for more.
    pub fn take(&mut self, id: StreamId) -> Vec<Delivery> {
        let Some(stream) = self.open.get_mut(&id) else {
            return Vec::new();
        };
        if stream.outbox.is_empty() {
            return Vec::new();
        }
        stream.wants = false;
        stream.outbox_bytes = 0;
        std::mem::take(&mut stream.outbox)
    }
}
