//! One subscription at work: its backlog and the streams that it feeds.

use std::sync::Arc;
use std::time::{Duration, Instant};

use super::ack_id::AckId;
use super::backlog::{Backlog, DeadLetter, Delivery, Freed};
use super::confirmation::Confirmation;
use super::error::BrokerError;
use super::faults::Moment;
use super::message::Message;
use super::resource;
use super::stream_id::StreamId;
use super::streams::{StreamOptions, Streams};

/// Roughly the most bytes of one pull response, below what clients accept.
const PULL_BYTES: usize = 10_000_000;

/// The result for an ack id.
enum Fate {
    Done,
    Invalid,
    /// By a fault.
    Dropped,
}

#[derive(Debug)]
pub struct Feed {
    pub settings: resource::Subscription,
    backlog: Backlog,
    streams: Streams,
}

impl Feed {
    /// `creation` is unique to this subscription, even among those of the same name.
    pub fn new(settings: resource::Subscription, creation: u64) -> Self {
        Self {
            backlog: Backlog::new(creation, &settings),
            settings,
            streams: Streams::default(),
        }
    }

    pub fn add(&mut self, message: Arc<Message>, at: &mut Moment<'_>) {
        self.backlog.add(message, at);
    }

    /// Adds a message once more. If it has an ordering key, the later ones of its key
    /// follow it again: "If messages with the same ordering key are redelivered, all
    /// subsequent messages are also redelivered",
    /// <https://cloud.google.com/pubsub/docs/ordering>. With exactly-once delivery there
    /// are no duplicates, so this adds nothing.
    pub fn add_copies(
        &mut self,
        message: &Arc<Message>,
        published: &[Arc<Message>],
        at: &mut Moment<'_>,
    ) {
        if self.settings.exactly_once {
            return;
        }
        self.backlog.add_copy(Arc::clone(message), at);
        if !self.settings.ordered || message.ordering_key.is_empty() {
            return;
        }
        for later in published {
            if later.sequence > message.sequence
                && later.ordering_key == message.ordering_key
                && !self.backlog.awaits_first_delivery(later.sequence)
            {
                self.backlog.add_copy(Arc::clone(later), at);
            }
        }
    }

    pub fn set_dead_letter_topic_exists(&mut self, exists: bool) {
        self.backlog.set_dead_letter_topic_exists(exists);
    }

    pub fn take_dead_letters(&mut self) -> Vec<DeadLetter> {
        self.backlog.take_dead_letters()
    }

    pub fn backlog_len(&self) -> usize {
        self.backlog.len()
    }

    pub fn outstanding(&self) -> usize {
        self.backlog.outstanding()
    }

    pub fn failed_deliveries(&self) -> u64 {
        self.backlog.failed_deliveries()
    }

    pub fn has_ready(&self) -> bool {
        self.backlog.has_ready()
    }

    pub fn next_timer(&self) -> Option<Instant> {
        self.backlog.next_timer()
    }

    pub fn stream_ids(&self) -> impl Iterator<Item = StreamId> + '_ {
        self.streams.ids()
    }

    pub fn open(&mut self, id: StreamId, options: StreamOptions) {
        self.streams.open(id, options);
    }

    /// Ends a stream. Messages sent on it stay outstanding until their ack deadline,
    /// since acks may come by unary calls; unsent ones become ready for others.
    pub fn close(&mut self, id: StreamId, at: &mut Moment<'_>) {
        for unsent in self.streams.close(id) {
            self.backlog.take_back(unsent.ack_id, at);
        }
    }

    pub fn set_stream_ack_deadline(&mut self, id: StreamId, ack_deadline: Duration) {
        self.streams.set_ack_deadline(id, ack_deadline);
    }

    /// The deliveries for a stream that can send now.
    pub fn take(&mut self, id: StreamId, at: &mut Moment<'_>) -> Vec<Delivery> {
        self.streams.want(id);
        self.dispatch(at);
        self.streams.take(id)
    }

    pub fn pull(&mut self, max_messages: usize, at: &mut Moment<'_>) -> Vec<Delivery> {
        let mut pulled = Vec::new();
        let mut bytes = 0;
        while pulled.len() < max_messages && bytes < PULL_BYTES {
            let Some(delivery) = self.backlog.deliver(self.settings.ack_deadline, None, at) else {
                break;
            };
            bytes += delivery.message.size();
            if bytes > PULL_BYTES && !pulled.is_empty() {
                self.backlog.take_back(delivery.ack_id, at);
                break;
            }
            pulled.push(delivery);
        }
        pulled
    }

    /// # Errors
    /// `InvalidArgument` if a text is no ack id, unless acks are confirmed.
    pub fn acknowledge(
        &mut self,
        ack_ids: &[String],
        at: &mut Moment<'_>,
    ) -> Result<Confirmation, BrokerError> {
        self.settle(ack_ids, |feed, id| {
            if feed.backlog.is_outstanding(id) && at.dice.drops_ack() {
                return Fate::Dropped;
            }
            let freed = feed.backlog.acknowledge(id, at);
            feed.free(freed)
        })
    }

    /// A duration of zero is a nack.
    ///
    /// # Errors
    /// As for [`Self::acknowledge`].
    pub fn modify_ack_deadline(
        &mut self,
        ack_ids: &[String],
        ack_deadline: Duration,
        at: &mut Moment<'_>,
    ) -> Result<Confirmation, BrokerError> {
        self.settle(ack_ids, |feed, id| {
            if ack_deadline.is_zero() {
                let freed = feed.backlog.nack(id, at);
                return feed.free(freed);
            }
            match feed.backlog.extend(id, at.now + ack_deadline) {
                Some(()) => Fate::Done,
                None => Fate::Invalid,
            }
        })
    }

    /// Applies an operation to each ack id.
    fn settle(
        &mut self,
        ack_ids: &[String],
        mut operation: impl FnMut(&mut Self, AckId) -> Fate,
    ) -> Result<Confirmation, BrokerError> {
        let confirmed = self.settings.exactly_once;
        let parsed: Vec<Option<AckId>> = ack_ids.iter().map(|text| text.parse().ok()).collect();
        if let Some(bad) = parsed
            .iter()
            .position(Option::is_none)
            .filter(|_| !confirmed)
        {
            return Err(BrokerError::InvalidArgument(format!(
                "Not an ack ID of this emulator: (ack_id={}).",
                ack_ids[bad]
            )));
        }
        let mut confirmation = Confirmation::default();
        for (text, id) in ack_ids.iter().zip(parsed) {
            let fate = id.map_or(Fate::Invalid, |id| operation(self, id));
            let list = match fate {
                _ if !confirmed => &mut confirmation.done,
                Fate::Done => &mut confirmation.done,
                Fate::Invalid => &mut confirmation.invalid,
                Fate::Dropped => &mut confirmation.temporary,
            };
            list.push(text.clone());
        }
        Ok(confirmation)
    }

    pub fn expire(&mut self, at: &mut Moment<'_>) {
        for freed in self.backlog.expire(at) {
            self.streams.free(freed);
        }
    }

    /// Takes back the deliveries that streams were given but did not take.
    pub fn withdraw(&mut self, at: &mut Moment<'_>) {
        for unsent in self.streams.withdraw() {
            self.backlog.take_back(unsent.ack_id, at);
        }
    }

    /// Gives ready messages to streams with room, one each in turn. Returns the streams
    /// that got some.
    pub fn dispatch(&mut self, at: &mut Moment<'_>) -> Vec<StreamId> {
        let mut fed = Vec::new();
        if at.dice.is_silent() {
            return fed;
        }
        while self.backlog.has_ready() {
            let Some((id, ack_deadline)) = self.streams.next_with_room() else {
                break;
            };
            let Some(delivery) = self.backlog.deliver(ack_deadline, Some(id), at) else {
                break;
            };
            if !self.streams.has_outbox(id) {
                fed.push(id);
            }
            self.streams.assign(id, delivery);
        }
        fed
    }

    fn free(&mut self, freed: Option<Freed>) -> Fate {
        let Some(freed) = freed else {
            return Fate::Invalid;
        };
        self.streams.free(freed);
        Fate::Done
    }
}
