//! Flow control and turns.

use super::*;

#[test]
fn a_stream_at_its_message_limit_gets_nothing_until_an_ack() {
    let mut fixture = Fixture::new();
    let stream = fixture.open(1, 0);
    fixture.publish("a");
    fixture.publish("b");
    let first = fixture.take(stream);
    assert_eq!(texts(&first), ["a"]);
    assert!(fixture.take(stream).is_empty());
    assert_eq!(fixture.engine.outstanding(SUBSCRIPTION), Ok(1));
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
fn a_stream_that_gets_what_expires_as_another_one_takes_is_woken() {
    let mut fixture = Fixture::new();
    fixture.publish("a");
    fixture.publish("b");
    assert_eq!(fixture.pull_texts(), ["a", "b"]);
    let streams = [fixture.open(1, 0), fixture.open(1, 0)];
    fixture.engine.drain_wakes();
    // Before the timer has fired.
    fixture.now += Duration::from_secs(600);
    let taken = fixture.take(streams[1]);
    assert_eq!(texts(&taken), ["b"]);
    let wakes = fixture.engine.drain_wakes();
    assert!(wakes.contains(&Wake::Stream(streams[0])), "{wakes:?}");
    assert_eq!(texts(&fixture.take(streams[0])), ["a"]);
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
