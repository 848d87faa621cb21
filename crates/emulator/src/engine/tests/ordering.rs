//! Ordering keys.

use super::*;

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
