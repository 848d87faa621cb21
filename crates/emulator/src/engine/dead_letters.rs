//! Dead-letter topics: the targets of messages that were delivered too often.

use std::time::Instant;

use chrono::{DateTime, SecondsFormat, Utc};

use super::Engine;
use crate::backlog::DeadLetter;
use crate::message::NewMessage;

impl Engine {
    /// Publishes a subscription's dead letters to its dead-letter topic.
    pub(super) fn forward_dead_letters(&mut self, subscription: &str, now: Instant) {
        let Some(feed) = self.feeds.get_mut(subscription) else {
            return;
        };
        let dead = feed.take_dead_letters();
        let Some(policy) = feed.settings.dead_letter.as_ref() else {
            return;
        };
        if dead.is_empty() {
            return;
        }
        let topic = policy.topic.clone();
        let letters: Vec<_> = dead
            .iter()
            .map(|letter| forwarded(letter, subscription))
            .collect();
        // The originals are freed as the letters come, and a letter must not be lost for
        // want of memory; so a failure is ignored.
        drop(dead);
        let bytes = letters.iter().map(|letter| letter.charge(1)).sum();
        let _short_of_memory = self.make_room(&topic, bytes);
        let wall = self.wall_at(now);
        self.spread(&topic, letters, now, wall);
    }

    /// Tells the subscriptions with this dead-letter topic whether it exists.
    pub(super) fn note_dead_letter_topic(&mut self, topic: &str, exists: bool) {
        for feed in self.feeds.values_mut() {
            let policy = feed.settings.dead_letter.as_ref();
            if policy.is_some_and(|policy| policy.topic == topic) {
                feed.set_dead_letter_topic_exists(exists);
            }
        }
    }

    /// Nothing can be a dead letter before something was published.
    fn wall_at(&self, now: Instant) -> DateTime<Utc> {
        let start = (now, DateTime::UNIX_EPOCH);
        let (then, wall) = self.last_publish.unwrap_or(start);
        wall + now.saturating_duration_since(then)
    }
}

/// The message as the dead-letter topic gets it:
/// <https://cloud.google.com/pubsub/docs/handling-failures#track_delivery_attempts>.
fn forwarded(letter: &DeadLetter, subscription: &str) -> NewMessage {
    let message = &letter.message;
    let mut parts = subscription.split('/').skip(1).step_by(2);
    let (project, id) = (parts.next(), parts.next());
    let publish_time = message.publish_time;
    let publish_time = publish_time.to_rfc3339_opts(SecondsFormat::Millis, false);
    let added = [
        ("DeliveryCount", letter.attempts.to_string()),
        ("Subscription", id.unwrap_or_default().to_owned()),
        (
            "SubscriptionProject",
            project.unwrap_or_default().to_owned(),
        ),
        ("TopicPublishTime", publish_time),
    ];
    let added = added.map(|(what, value)| (format!("CloudPubSubDeadLetterSource{what}"), value));
    let mut attributes = message.attributes.clone();
    attributes.extend(added);
    NewMessage {
        data: message.data.clone(),
        attributes,
        ordering_key: message.ordering_key.clone(),
    }
}
