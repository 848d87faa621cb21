//! Acknowledging, nacking, ack deadlines and duplicates.

use super::*;

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
fn an_unknown_message_cannot_be_duplicated() {
    let mut fixture = Fixture::new();
    let now = fixture.now;
    let refused = fixture.engine.duplicate(TOPIC, "1", now);
    assert!(matches!(refused, Err(BrokerError::NotFound(_))));
}
