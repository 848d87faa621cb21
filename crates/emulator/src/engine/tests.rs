//! The rules of delivery, with made-up instants.

use super::*;

mod exactly_once;
mod failures;
mod faults;
mod ordering;
mod redelivery;
mod resources;
mod streams;

const TOPIC: &str = "projects/p/topics/requests";
const SUBSCRIPTION: &str = "projects/p/subscriptions/worker";

/// An engine with one topic and subscriptions of it, at a settable time.
struct Fixture {
    engine: Engine,
    now: Instant,
    wall: DateTime<Utc>,
}

impl Fixture {
    fn new() -> Self {
        Self::with(resource::Subscription::default())
    }

    fn ordered() -> Self {
        Self::with(resource::Subscription {
            ordered: true,
            ..resource::Subscription::default()
        })
    }

    fn with(subscription: resource::Subscription) -> Self {
        let mut fixture = Self::empty(1 << 30);
        fixture.subscribe(SUBSCRIPTION, subscription);
        fixture
    }

    fn with_retry(minimum: u64, maximum: u64) -> Self {
        Self::with(resource::Subscription {
            retry: Some(resource::RetryPolicy {
                minimum_backoff: Some(Duration::from_secs(minimum)),
                maximum_backoff: Some(Duration::from_secs(maximum)),
            }),
            ..resource::Subscription::default()
        })
    }

    fn empty(max_retained_bytes: usize) -> Self {
        let wall = Utc::now();
        let mut engine = Engine::new(max_retained_bytes, Faults::default(), wall);
        let topic = resource::Topic {
            name: TOPIC.to_owned(),
            ..resource::Topic::default()
        };
        engine.create_topic(topic).unwrap();
        let now = Instant::now();
        Self { engine, now, wall }
    }

    fn subscribe(&mut self, name: &str, subscription: resource::Subscription) {
        let subscription = resource::Subscription {
            name: name.to_owned(),
            topic: TOPIC.to_owned(),
            ..subscription
        };
        self.engine.create_subscription(subscription).unwrap();
    }

    fn publish(&mut self, text: &str) -> String {
        self.publish_keyed("", text)
    }

    fn publish_keyed(&mut self, key: &str, text: &str) -> String {
        self.try_publish(key, text).unwrap()
    }

    fn try_publish(&mut self, key: &str, text: &str) -> Result<String, BrokerError> {
        let message = NewMessage {
            data: text.to_owned().into(),
            ordering_key: key.to_owned(),
            ..NewMessage::default()
        };
        let ids = self
            .engine
            .publish(TOPIC, vec![message], self.now, self.wall)?;
        Ok(ids.concat())
    }

    fn pull(&mut self) -> Vec<Delivery> {
        self.engine.pull(SUBSCRIPTION, 1000, self.now).unwrap()
    }

    fn pull_texts(&mut self) -> Vec<String> {
        texts(&self.pull())
    }

    fn open(&mut self, max_messages: i64, max_bytes: i64) -> StreamId {
        let options = StreamOptions::new(Duration::from_secs(20), max_messages, max_bytes);
        let id = self.engine.open_stream(SUBSCRIPTION, options).unwrap();
        // It can send from the start.
        assert!(self.take(id).is_empty());
        id
    }

    fn take(&mut self, id: StreamId) -> Vec<Delivery> {
        self.engine.take(SUBSCRIPTION, id, self.now).unwrap()
    }

    fn acknowledge(&mut self, delivery: &Delivery) {
        self.engine
            .acknowledge(SUBSCRIPTION, &[delivery.ack_id.to_string()], self.now)
            .unwrap();
    }

    fn modify(&mut self, delivery: &Delivery, seconds: i32) {
        let ids = [delivery.ack_id.to_string()];
        self.engine
            .modify_ack_deadline(SUBSCRIPTION, &ids, seconds, self.now)
            .unwrap();
    }

    fn nack(&mut self, delivery: &Delivery) {
        self.modify(delivery, 0);
    }

    fn pass(&mut self, seconds: u64) {
        self.now += Duration::from_secs(seconds);
        self.engine.expire(self.now);
    }

    fn backlog(&self) -> usize {
        self.engine.backlog_len(SUBSCRIPTION).unwrap()
    }
}

fn texts(deliveries: &[Delivery]) -> Vec<String> {
    let text = |delivery: &Delivery| String::from_utf8(delivery.message.data.to_vec()).unwrap();
    deliveries.iter().map(text).collect()
}
