//! Retry policies and dead-letter policies.

use super::*;
use crate::resource::{DeadLetterPolicy, RetryPolicy, Subscription};

const DEAD: &str = "projects/p/topics/dead";
const MORGUE: &str = "projects/p/subscriptions/morgue";

/// A subscription that gives up after five attempts.
fn giving_up(settings: Subscription) -> Fixture {
    let mut fixture = Fixture::empty(1 << 30);
    fixture.create_dead_letter_topic();
    fixture.subscribe(SUBSCRIPTION, with_policy(settings));
    fixture
}

fn with_policy(settings: Subscription) -> Subscription {
    Subscription {
        dead_letter: Some(DeadLetterPolicy {
            topic: DEAD.to_owned(),
            max_delivery_attempts: 5,
        }),
        ..settings
    }
}

impl Fixture {
    fn create_dead_letter_topic(&mut self) {
        let topic = resource::Topic {
            name: DEAD.to_owned(),
            ..resource::Topic::default()
        };
        self.engine.create_topic(topic).unwrap();
        let morgue = Subscription {
            name: MORGUE.to_owned(),
            topic: DEAD.to_owned(),
            ..Subscription::default()
        };
        self.engine.create_subscription(morgue).unwrap();
    }

    fn dead(&mut self) -> Vec<Delivery> {
        self.engine.pull(MORGUE, 100, self.now).unwrap()
    }

    /// Delivers and nacks the one message this many times.
    fn fail(&mut self, times: u32) {
        for _ in 0..times {
            let delivery = self.pull().remove(0);
            self.nack(&delivery);
        }
    }
}

#[test]
fn failed_deliveries_are_counted_and_good_ones_are_not() {
    let mut fixture = Fixture::new();
    fixture.publish("a");
    fixture.fail(2);
    let late = fixture.pull().remove(0);
    fixture.pass(10);
    fixture.acknowledge(&late);
    let good = fixture.pull().remove(0);
    fixture.acknowledge(&good);
    assert_eq!(fixture.engine.failed_deliveries(SUBSCRIPTION), Ok(3));
}

#[test]
fn backoff_doubles_from_the_minimum_to_the_maximum() {
    let mut fixture = Fixture::with_retry(2, 9);
    fixture.publish("a");
    for backoff in [2, 4, 8, 9, 9] {
        let delivery = fixture.pull().remove(0);
        fixture.nack(&delivery);
        fixture.pass(backoff - 1);
        assert!(fixture.pull().is_empty(), "before {backoff} s");
        fixture.pass(1);
    }
    assert_eq!(fixture.pull_texts(), ["a"]);
}

#[test]
fn a_passed_ack_deadline_is_followed_by_the_backoff() {
    let mut fixture = Fixture::with_retry(5, 600);
    fixture.publish("a");
    assert_eq!(fixture.pull_texts(), ["a"]);
    fixture.pass(10);
    let end = fixture.now + Duration::from_secs(5);
    assert_eq!(fixture.engine.next_timer(), Some(end));
    fixture.pass(4);
    assert!(fixture.pull().is_empty());
    fixture.pass(1);
    assert_eq!(fixture.pull_texts(), ["a"]);
}

#[test]
fn the_end_of_a_backoff_wakes_a_stream_with_room() {
    let mut fixture = Fixture::with_retry(5, 600);
    let stream = fixture.open(1, 0);
    fixture.publish("a");
    let delivery = fixture.take(stream).remove(0);
    fixture.nack(&delivery);
    assert!(fixture.take(stream).is_empty());
    fixture.engine.drain_wakes();
    fixture.pass(5);
    assert!(fixture.engine.drain_wakes().contains(&Wake::Stream(stream)));
    assert_eq!(texts(&fixture.take(stream)), ["a"]);
}

#[test]
fn the_backoff_is_each_messages_own() {
    let mut fixture = Fixture::with_retry(5, 600);
    fixture.publish("a");
    let delivery = fixture.pull().remove(0);
    fixture.nack(&delivery);
    fixture.publish("b");
    assert_eq!(fixture.pull_texts(), ["b"]);
}

#[test]
fn what_a_stream_was_not_sent_needs_no_backoff() {
    let mut fixture = Fixture::with_retry(5, 600);
    let stream = fixture.open(0, 0);
    fixture.publish("a");
    let now = fixture.now;
    fixture.engine.close_stream(SUBSCRIPTION, stream, now);
    assert_eq!(fixture.pull_texts(), ["a"]);
}

#[test]
fn a_message_in_backoff_holds_up_the_later_ones_of_its_key() {
    let mut fixture = Fixture::with(Subscription {
        ordered: true,
        retry: Some(RetryPolicy::default()),
        ..Subscription::default()
    });
    fixture.publish_keyed("k", "k1");
    fixture.publish_keyed("k", "k2");
    let first = fixture.pull().remove(0);
    fixture.nack(&first);
    assert!(fixture.pull().is_empty());
    fixture.pass(10);
    assert_eq!(fixture.pull_texts(), ["k1"]);
}

#[test]
fn a_retry_policy_has_defaults_and_limits() {
    let complete = |minimum: Option<u64>, maximum: Option<u64>| {
        let policy = RetryPolicy {
            minimum_backoff: minimum.map(Duration::from_secs),
            maximum_backoff: maximum.map(Duration::from_secs),
        };
        let subscription = Subscription {
            name: SUBSCRIPTION.to_owned(),
            topic: TOPIC.to_owned(),
            retry: Some(policy),
            ..Subscription::default()
        };
        let retry = subscription.checked().ok()?.retry?;
        let seconds = |backoff: Option<Duration>| backoff.map(|backoff| backoff.as_secs());
        Some((
            seconds(retry.minimum_backoff)?,
            seconds(retry.maximum_backoff)?,
        ))
    };
    assert_eq!(complete(None, None), Some((10, 600)));
    assert_eq!(complete(Some(0), Some(0)), Some((0, 0)));
    assert_eq!(complete(None, Some(3)), Some((3, 3)));
    assert_eq!(complete(Some(11), Some(10)), None);
    assert_eq!(complete(Some(10), Some(601)), None);
}

#[test]
fn a_message_that_failed_too_often_goes_to_the_dead_letter_topic() {
    let mut fixture = giving_up(Subscription::default());
    let id = fixture.publish_keyed("k", "a");
    let published = fixture.wall;
    fixture.fail(4);
    assert!(fixture.dead().is_empty());
    let fifth = fixture.pull().remove(0);
    assert_eq!(fifth.attempt, 5);
    fixture.pass(10);
    assert_eq!(fixture.backlog(), 0);
    let dead = fixture.dead().remove(0);
    assert_eq!(dead.message.data, "a");
    assert_eq!(dead.message.ordering_key, "k");
    assert_ne!(dead.message.id(), id);
    assert!(dead.message.publish_time > fifth.message.publish_time);
    let attribute = |name: &str| {
        let name = format!("CloudPubSubDeadLetterSource{name}");
        dead.message.attributes[&name].as_str()
    };
    assert_eq!(attribute("DeliveryCount"), "5");
    assert_eq!(attribute("Subscription"), "worker");
    assert_eq!(attribute("SubscriptionProject"), "p");
    let format = "%Y-%m-%dT%H:%M:%S%.3f+00:00";
    assert_eq!(
        attribute("TopicPublishTime"),
        published.format(format).to_string()
    );
}

#[test]
fn without_the_dead_letter_topic_a_message_is_redelivered_until_there_is_one() {
    let mut fixture = giving_up(Subscription::default());
    fixture.engine.delete_topic(DEAD).unwrap();
    fixture.engine.delete_subscription(MORGUE).unwrap();
    fixture.publish("a");
    fixture.fail(7);
    assert_eq!(fixture.backlog(), 1);
    fixture.create_dead_letter_topic();
    fixture.fail(1);
    assert_eq!(fixture.backlog(), 0);
    assert_eq!(texts(&fixture.dead()), ["a"]);
    fixture.engine.delete_topic(DEAD).unwrap();
    fixture.publish("b");
    fixture.fail(9);
    assert_eq!(fixture.backlog(), 1);
}

#[test]
fn an_acknowledged_message_is_no_dead_letter() {
    let mut fixture = giving_up(Subscription::default());
    fixture.publish("a");
    fixture.fail(4);
    let fifth = fixture.pull().remove(0);
    fixture.acknowledge(&fifth);
    fixture.pass(600);
    assert_eq!(fixture.backlog(), 0);
    assert!(fixture.dead().is_empty());
}

#[test]
fn a_dead_letter_makes_way_for_the_next_of_its_key() {
    let mut fixture = giving_up(Subscription {
        ordered: true,
        ..Subscription::default()
    });
    fixture.publish_keyed("k", "k1");
    fixture.publish_keyed("k", "k2");
    fixture.fail(5);
    assert_eq!(fixture.pull_texts(), ["k2"]);
}

#[test]
fn a_policy_whose_topic_does_not_exist_is_refused() {
    let mut fixture = Fixture::empty(1 << 30);
    let missing = with_policy(Subscription {
        name: SUBSCRIPTION.to_owned(),
        topic: TOPIC.to_owned(),
        ..Subscription::default()
    });
    let refused = fixture.engine.create_subscription(missing);
    assert_eq!(refused, Err(BrokerError::not_found(DEAD)));
}
