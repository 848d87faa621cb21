//! The rules of delivery, with made-up instants.

use super::*;

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

    fn empty(max_retained_bytes: usize) -> Self {
        let wall = Utc::now();
        let mut engine = Engine::new(max_retained_bytes, wall);
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

#[test]
fn an_acknowledged_message_is_gone() {
    let mut fixture = Fixture::new();
    fixture.publish("a");
    let [delivery] = &fixture.pull()[..] else {
        panic!("one delivery expected")
    };
    fixture.acknowledge(delivery);
    fixture.pass(3600);
    assert!(fixture.pull().is_empty());
    assert_eq!(fixture.backlog(), 0);
}

#[test]
fn a_nacked_message_is_redelivered_at_once() {
    let mut fixture = Fixture::new();
    let id = fixture.publish("a");
    let first = fixture.pull().remove(0);
    fixture.nack(&first);
    let second = fixture.pull().remove(0);
    assert_eq!(second.message.id(), id);
    assert_eq!(second.message.publish_time, first.message.publish_time);
    assert_ne!(second.ack_id, first.ack_id);
    assert_eq!((first.attempt, second.attempt), (1, 2));
}

#[test]
fn a_message_is_redelivered_at_its_ack_deadline_and_not_before() {
    let mut fixture = Fixture::new();
    fixture.publish("a");
    assert_eq!(fixture.pull().len(), 1);
    fixture.pass(9);
    assert!(fixture.pull().is_empty());
    fixture.pass(1);
    assert_eq!(fixture.pull_texts(), ["a"]);
}

#[test]
fn an_extended_ack_deadline_holds() {
    let mut fixture = Fixture::new();
    fixture.publish("a");
    let delivery = fixture.pull().remove(0);
    fixture.pass(9);
    fixture.modify(&delivery, 30);
    fixture.pass(29);
    assert!(fixture.pull().is_empty());
    fixture.pass(1);
    assert_eq!(fixture.pull().len(), 1);
}

#[test]
fn the_next_timer_is_the_earliest_ack_deadline() {
    let mut fixture = Fixture::new();
    assert_eq!(fixture.engine.next_timer(), None);
    fixture.publish("a");
    let delivery = fixture.pull().remove(0);
    let deadline = fixture.now + Duration::from_secs(10);
    assert_eq!(fixture.engine.next_timer(), Some(deadline));
    fixture.acknowledge(&delivery);
    fixture.pass(10);
    assert_eq!(fixture.engine.next_timer(), None);
}

#[test]
fn a_stale_ack_does_not_settle_the_newer_delivery() {
    let mut fixture = Fixture::new();
    fixture.publish("a");
    let stale = fixture.pull().remove(0);
    fixture.pass(10);
    let newer = fixture.pull().remove(0);
    fixture.acknowledge(&stale);
    fixture.nack(&stale);
    fixture.modify(&stale, 600);
    assert!(fixture.pull().is_empty(), "the newer delivery holds it");
    fixture.pass(10);
    assert_eq!(fixture.pull_texts(), ["a"]);
    fixture.acknowledge(&newer);
    assert_eq!(fixture.backlog(), 1);
}

#[test]
fn a_recreated_subscription_ignores_the_ack_ids_of_its_predecessor() {
    let mut fixture = Fixture::new();
    fixture.publish("a");
    let old = fixture.pull().remove(0);
    fixture.engine.delete_subscription(SUBSCRIPTION).unwrap();
    fixture.subscribe(SUBSCRIPTION, resource::Subscription::default());
    fixture.publish("b");
    fixture.pull();
    fixture.acknowledge(&old);
    assert_eq!(fixture.backlog(), 1);
}

#[test]
fn text_that_is_no_ack_id_is_an_invalid_argument() {
    let mut fixture = Fixture::new();
    let now = fixture.now;
    let ack = fixture
        .engine
        .acknowledge(SUBSCRIPTION, &["nonsense".to_owned()], now);
    assert!(matches!(ack, Err(BrokerError::InvalidArgument(_))));
    for seconds in [-1, 601] {
        let modify = fixture
            .engine
            .modify_ack_deadline(SUBSCRIPTION, &[], seconds, now);
        assert!(matches!(modify, Err(BrokerError::InvalidArgument(_))));
    }
}

#[test]
fn every_subscription_gets_every_message() {
    let other = "projects/p/subscriptions/other";
    let mut fixture = Fixture::new();
    fixture.subscribe(other, resource::Subscription::default());
    fixture.publish("a");
    let delivery = fixture.pull().remove(0);
    fixture.acknowledge(&delivery);
    let now = fixture.now;
    assert_eq!(
        texts(&fixture.engine.pull(other, 10, now).unwrap()),
        ["a"],
        "its backlog is its own"
    );
}

#[test]
fn a_message_published_before_the_subscription_is_not_delivered() {
    let mut fixture = Fixture::empty(1 << 30);
    fixture.publish("a");
    fixture.subscribe(SUBSCRIPTION, resource::Subscription::default());
    assert!(fixture.pull().is_empty());
}

#[test]
fn a_stream_at_its_message_limit_gets_nothing_until_an_ack() {
    let mut fixture = Fixture::new();
    let stream = fixture.open(1, 0);
    fixture.publish("a");
    fixture.publish("b");
    let first = fixture.take(stream);
    assert_eq!(texts(&first), ["a"]);
    assert!(fixture.take(stream).is_empty());
    fixture.acknowledge(&first[0]);
    assert_eq!(texts(&fixture.take(stream)), ["b"]);
}

#[test]
fn a_nack_and_an_expired_ack_deadline_free_room_on_the_stream() {
    let mut fixture = Fixture::new();
    let stream = fixture.open(1, 0);
    fixture.publish("a");
    let first = fixture.take(stream).remove(0);
    fixture.nack(&first);
    assert_eq!(texts(&fixture.take(stream)), ["a"]);
    fixture.pass(19);
    assert!(fixture.take(stream).is_empty());
    fixture.pass(1);
    assert_eq!(texts(&fixture.take(stream)), ["a"]);
}

#[test]
fn a_stream_at_its_byte_limit_gets_nothing_until_an_ack() {
    let mut fixture = Fixture::new();
    let stream = fixture.open(0, 4);
    for text in ["aaa", "bbb", "ccc"] {
        fixture.publish(text);
    }
    let taken = fixture.take(stream);
    assert_eq!(texts(&taken), ["aaa", "bbb"], "the last may exceed it");
    fixture.acknowledge(&taken[0]);
    assert_eq!(texts(&fixture.take(stream)), ["ccc"]);
}

#[test]
fn a_message_that_one_stream_has_no_room_for_goes_to_another() {
    let mut fixture = Fixture::new();
    let full = fixture.open(1, 0);
    fixture.publish("a");
    assert_eq!(texts(&fixture.take(full)), ["a"]);
    let idle = fixture.open(1, 0);
    fixture.engine.drain_wakes();
    fixture.publish("b");
    assert_eq!(fixture.engine.drain_wakes(), [Wake::Stream(idle)]);
    assert_eq!(texts(&fixture.take(idle)), ["b"]);
    assert!(fixture.take(full).is_empty());
}

#[test]
fn messages_go_to_the_open_streams_in_turn() {
    let mut fixture = Fixture::new();
    let streams = [fixture.open(0, 0), fixture.open(0, 0), fixture.open(0, 0)];
    for number in 0..9 {
        fixture.publish(&number.to_string());
    }
    let taken = streams.map(|id| texts(&fixture.take(id)));
    let expected = [["0", "3", "6"], ["1", "4", "7"], ["2", "5", "8"]];
    assert_eq!(
        taken.map(|texts| texts.join(" ")),
        expected.map(|e| e.join(" "))
    );
}

#[test]
fn a_closed_stream_gives_back_what_it_was_not_sent() {
    let mut fixture = Fixture::new();
    let stream = fixture.open(0, 0);
    fixture.publish("a");
    let now = fixture.now;
    fixture.engine.close_stream(SUBSCRIPTION, stream, now);
    let delivery = fixture.pull().remove(0);
    assert_eq!(delivery.attempt, 1, "it was never delivered");
}

#[test]
fn what_a_closed_stream_was_sent_stays_outstanding_and_can_be_acknowledged() {
    let mut fixture = Fixture::new();
    let stream = fixture.open(0, 0);
    fixture.publish("a");
    fixture.publish("b");
    let taken = fixture.take(stream);
    let now = fixture.now;
    fixture.engine.close_stream(SUBSCRIPTION, stream, now);
    fixture.acknowledge(&taken[0]);
    assert!(fixture.pull().is_empty());
    fixture.pass(20);
    assert_eq!(fixture.pull_texts(), ["b"]);
}

#[test]
fn a_stream_of_a_deleted_subscription_is_told() {
    let mut fixture = Fixture::new();
    let stream = fixture.open(0, 0);
    fixture.engine.drain_wakes();
    fixture.engine.delete_subscription(SUBSCRIPTION).unwrap();
    assert!(fixture.engine.drain_wakes().contains(&Wake::Stream(stream)));
    let now = fixture.now;
    let taken = fixture.engine.take(SUBSCRIPTION, stream, now);
    assert!(matches!(taken, Err(BrokerError::NotFound(_))));
}

#[test]
fn the_next_message_of_a_key_comes_after_the_ack_of_the_one_before() {
    let mut fixture = Fixture::ordered();
    for (key, text) in [("k", "k1"), ("k", "k2"), ("l", "l1"), ("", "free")] {
        fixture.publish_keyed(key, text);
    }
    let first = fixture.pull();
    assert_eq!(texts(&first), ["k1", "l1", "free"]);
    assert!(fixture.pull().is_empty());
    fixture.acknowledge(&first[0]);
    assert_eq!(fixture.pull_texts(), ["k2"]);
}

#[test]
fn a_redelivered_message_holds_up_the_later_ones_of_its_key() {
    let mut fixture = Fixture::ordered();
    fixture.publish_keyed("k", "k1");
    fixture.publish_keyed("k", "k2");
    let first = fixture.pull().remove(0);
    fixture.nack(&first);
    assert_eq!(fixture.pull_texts(), ["k1"]);
    fixture.pass(10);
    let again = fixture.pull();
    assert_eq!(texts(&again), ["k1"]);
    fixture.acknowledge(&again[0]);
    assert_eq!(fixture.pull_texts(), ["k2"]);
}

#[test]
fn a_duplicate_has_the_same_id_and_publish_time() {
    let mut fixture = Fixture::new();
    let id = fixture.publish("a");
    let first = fixture.pull().remove(0);
    fixture.acknowledge(&first);
    let now = fixture.now + Duration::from_secs(1);
    fixture.engine.duplicate(TOPIC, &id, now).unwrap();
    let second = fixture.pull().remove(0);
    assert_eq!(second.message.id(), id);
    assert_eq!(second.message.publish_time, first.message.publish_time);
    assert!(fixture.pull().is_empty(), "once");
}

#[test]
fn a_duplicate_may_be_out_beside_the_original() {
    let mut fixture = Fixture::new();
    let id = fixture.publish("a");
    let now = fixture.now;
    fixture.engine.duplicate(TOPIC, &id, now).unwrap();
    let both = fixture.pull();
    assert_eq!(texts(&both), ["a", "a"]);
    fixture.acknowledge(&both[0]);
    assert_eq!(fixture.backlog(), 1);
}

#[test]
fn a_duplicate_with_a_key_brings_the_later_ones_of_its_key_again() {
    let mut fixture = Fixture::ordered();
    let id = fixture.publish_keyed("k", "k1");
    fixture.publish_keyed("other", "o1");
    for text in ["k2", "k3"] {
        fixture.publish_keyed("k", text);
    }
    let mut seen = Vec::new();
    for round in 0..6 {
        if round == 2 {
            let now = fixture.now;
            fixture.engine.duplicate(TOPIC, &id, now).unwrap();
        }
        for delivery in fixture.pull() {
            seen.extend(texts(std::slice::from_ref(&delivery)));
            fixture.acknowledge(&delivery);
        }
    }
    assert_eq!(seen, ["k1", "o1", "k2", "k1", "k2", "k3"]);
}

#[test]
fn an_unknown_message_cannot_be_duplicated() {
    let mut fixture = Fixture::new();
    let now = fixture.now;
    let refused = fixture.engine.duplicate(TOPIC, "1", now);
    assert!(matches!(refused, Err(BrokerError::NotFound(_))));
}

#[test]
fn publishing_is_refused_when_the_backlog_fills_the_memory() {
    let mut fixture = Fixture::empty(10_000);
    fixture.subscribe(SUBSCRIPTION, resource::Subscription::default());
    let text = "x".repeat(4000);
    fixture.publish(&text);
    fixture.publish(&text);
    let refused = fixture.try_publish("", &text);
    assert!(matches!(refused, Err(BrokerError::ResourceExhausted(_))));
    let delivery = fixture.pull().remove(0);
    fixture.acknowledge(&delivery);
    drop(delivery);
    fixture.publish(&text);
}

#[test]
fn message_ids_grow_and_do_not_repeat_after_a_restart() {
    let number = |id: String| id.parse::<u64>().unwrap();
    let mut before = Fixture::new();
    let first = number(before.publish("a"));
    let second = number(before.publish("b"));
    assert!(second > first);
    let mut after = Fixture::new();
    after.wall = before.wall + Duration::from_secs(1);
    assert!(number(after.publish("c")) > second);
}

#[test]
fn names_are_taken_once_and_must_exist() {
    let mut fixture = Fixture::new();
    let topic = fixture.engine.topic(TOPIC).unwrap();
    let again = fixture.engine.create_topic(topic);
    assert!(matches!(again, Err(BrokerError::AlreadyExists(_))));
    let subscription = fixture.engine.subscription(SUBSCRIPTION).unwrap();
    let again = fixture.engine.create_subscription(subscription.clone());
    assert!(matches!(again, Err(BrokerError::AlreadyExists(_))));
    let orphan = resource::Subscription {
        name: "projects/p/subscriptions/orphan".to_owned(),
        topic: "projects/p/topics/none".to_owned(),
        ..subscription
    };
    let refused = fixture.engine.create_subscription(orphan);
    assert!(matches!(refused, Err(BrokerError::NotFound(_))));
}

#[test]
fn a_subscription_outlives_its_topic() {
    let mut fixture = Fixture::new();
    fixture.publish("a");
    fixture.engine.delete_topic(TOPIC).unwrap();
    let shown = fixture.engine.subscription(SUBSCRIPTION).unwrap();
    assert_eq!(shown.topic, DELETED_TOPIC);
    assert_eq!(fixture.pull_texts(), ["a"]);
    let topic = resource::Topic {
        name: TOPIC.to_owned(),
        ..resource::Topic::default()
    };
    fixture.engine.create_topic(topic).unwrap();
    fixture.publish("b");
    assert!(fixture.pull().is_empty(), "the new topic is another");
}

#[test]
fn a_list_comes_in_pages() {
    let mut fixture = Fixture::empty(1 << 30);
    for number in 0..5 {
        let name = format!("projects/p/subscriptions/sub{number}");
        fixture.subscribe(&name, resource::Subscription::default());
    }
    let mut request = PageRequest {
        size: 2,
        ..PageRequest::default()
    };
    let mut pages = Vec::new();
    loop {
        let page = fixture
            .engine
            .subscriptions("projects/p", &request)
            .unwrap();
        pages.push(page.items.len());
        if page.next_token.is_empty() {
            break;
        }
        request.token = page.next_token;
    }
    assert_eq!(pages, [2, 2, 1]);
    let all = PageRequest::default();
    let other = fixture.engine.subscriptions("projects/q", &all).unwrap();
    assert!(other.items.is_empty());
    let named = fixture.engine.topic_subscriptions(TOPIC, &all).unwrap();
    assert_eq!(named.items.len(), 5);
}
