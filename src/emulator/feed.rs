//! One subscription at work: its backlog and the streams that it feeds.

use std::sync::Arc;
use std::time::{Duration, Instant};

use super::ack_id::AckId;
use super::backlog::{Backlog, DeadLetter, Delivery};
use super::confirmation::Confirmation;
use super::error::BrokerError;
use super::message::Message;
use super::resource;
use super::streams::{StreamId, StreamOptions, Streams};

/// About the most bytes of one pull response, below what clients accept.
const PULL_BYTES: usize = 10_000_000;

#[derive(Debug)]
pub struct Feed {
    pub settings: resource::Subscription,
    backlog: Backlog,
    streams: Streams,
}

impl Feed {
    /// `creation` is unique to this subscription, also among those of the same
    /// name.
    pub fn new(settings: resource::Subscription, creation: u64) -> Self {
        Self {
            backlog: Backlog::new(creation, &settings),
            settings,
            streams: Streams::default(),
        }
    }

    pub fn add(&mut self, message: Arc<Message>, now: Instant) {
        self.backlog.add(message, now);
    }

    /// Adds a message once more. If it has an ordering key, the later ones of
    /// its key follow it again: "If messages with the same ordering key are
    /// redelivered, all subsequent messages are also redelivered",
    /// <https://cloud.google.com/pubsub/docs/ordering>. With exactly-once
    /// delivery there are no duplicates, so nothing is added.
    pub fn add_copies(&mut self, message: &Arc<Message>, published: &[Arc<Message>], now: Instant) {
        if self.settings.exactly_once {
            return;
        }
        self.backlog.add_copy(Arc::clone(message), now);
        if !self.settings.ordered || message.ordering_key.is_empty() {
            return;
        }
        for later in published {
            if later.sequence > message.sequence
                && later.ordering_key == message.ordering_key
                && !self.backlog.awaits_first_delivery(later.sequence)
            {
                self.backlog.add_copy(Arc::clone(later), now);
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

    /// Ends a stream. What it was sent stays outstanding until its ack
    /// deadline, since acks may come by unary calls; what it was not sent is
    /// ready for others.
    pub fn close(&mut self, id: StreamId, now: Instant) {
        for unsent in self.streams.close(id) {
            self.backlog.take_back(unsent.ack_id, now);
        }
    }

    pub fn set_stream_ack_deadline(&mut self, id: StreamId, ack_deadline: Duration) {
        self.streams.set_ack_deadline(id, ack_deadline);
    }

    /// The stream can send: what is there for it?
    pub fn take(&mut self, id: StreamId, now: Instant) -> Vec<Delivery> {
        self.streams.want(id);
        self.dispatch(now);
        self.streams.take(id)
    }

    pub fn pull(&mut self, max_messages: usize, now: Instant) -> Vec<Delivery> {
        let mut pulled = Vec::new();
        let mut bytes = 0;
        while pulled.len() < max_messages && bytes < PULL_BYTES {
            let Some(delivery) = self.backlog.deliver(now, self.settings.ack_deadline, None) else {
                break;
            };
            bytes += delivery.message.size();
            if bytes > PULL_BYTES && !pulled.is_empty() {
                self.backlog.take_back(delivery.ack_id, now);
                break;
            }
            pulled.push(delivery);
        }
        pulled
    }

    /// # Errors
    /// `InvalidArgument` if text is no ack id, unless that can be confirmed.
    pub fn acknowledge(
        &mut self,
        ack_ids: &[String],
        now: Instant,
    ) -> Result<Confirmation, BrokerError> {
        self.settle(ack_ids, |feed, id| {
            let freed = feed.backlog.acknowledge(id, now)?;
            feed.streams.free(freed);
            Some(())
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
        now: Instant,
    ) -> Result<Confirmation, BrokerError> {
        self.settle(ack_ids, |feed, id| {
            if !ack_deadline.is_zero() {
                return feed.backlog.extend(id, now + ack_deadline);
            }
            let freed = feed.backlog.nack(id, now)?;
            feed.streams.free(freed);
            Some(())
        })
    }

    /// Applies an operation, which is `None` where the ack id is no longer
    /// good.
    fn settle(
        &mut self,
        ack_ids: &[String],
        operation: impl Fn(&mut Self, AckId) -> Option<()>,
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
            let done = id.and_then(|id| operation(self, id)).is_some();
            let list = match done || !confirmed {
                true => &mut confirmation.done,
                false => &mut confirmation.invalid,
            };
            list.push(text.clone());
        }
        Ok(confirmation)
    }

    pub fn expire(&mut self, now: Instant) {
        for freed in self.backlog.expire(now) {
            self.streams.free(freed);
        }
    }

    /// Gives ready messages to streams with room, one each in turn. Returns
    /// the streams that got some.
    pub fn dispatch(&mut self, now: Instant) -> Vec<StreamId> {
        let mut fed = Vec::new();
        while self.backlog.has_ready() {
            let Some((id, ack_deadline)) = self.streams.next_with_room() else {
                break;
            };
            let Some(delivery) = self.backlog.deliver(now, ack_deadline, Some(id)) else {
                break;
            };
            if !self.streams.has_outbox(id) {
                fed.push(id);
            }
            self.streams.assign(id, delivery);
        }
        fed
    }
}
