//! Faults on request.

use super::*;

impl Fixture {
    fn set(&mut self, faults: &str) {
        let faults = faults.parse().unwrap();
        self.engine.set_faults(faults, self.now);
    }

    fn with_faults(mut self, faults: &str) -> Self {
        self.set(faults);
        self
    }

    fn pull_one(&mut self) -> Delivery {
        let mut pulled = self.engine.pull(SUBSCRIPTION, 1, self.now).unwrap();
        pulled.remove(0)
    }
}

fn exactly_once() -> Fixture {
    Fixture::with(resource::Subscription {
        exactly_once: true,
        ..resource::Subscription::default()
    })
}

#[test]
fn a_message_has_one_duplicate_at_a_time() {
    let mut fixture = Fixture::new().with_faults("duplicates=1");
    fixture.publish("a");
    let both = fixture.pull();
    assert_eq!(texts(&both), ["a", "a"]);
    assert_eq!(both[0].message.id(), both[1].message.id());
    fixture.nack(&both[0]);
    let again = fixture.pull();
    assert_eq!(texts(&again), ["a"], "the duplicate is still out");
    fixture.acknowledge(&both[1]);
    fixture.nack(&again[0]);
    assert_eq!(fixture.pull_texts(), ["a", "a"]);
}

#[test]
fn duplicates_go_to_streams_with_room_side_by_side() {
    let mut fixture = Fixture::new().with_faults("duplicates=1");
    let streams = [fixture.open(1, 0), fixture.open(1, 0)];
    fixture.publish("a");
    for stream in streams {
        assert_eq!(texts(&fixture.take(stream)), ["a"]);
    }
}

#[test]
fn a_duplicate_keeps_the_order_of_its_key() {
    let mut fixture = Fixture::ordered().with_faults("duplicates=1");
    fixture.publish_keyed("k", "k1");
    fixture.publish_keyed("k", "k2");
    let mut seen = Vec::new();
    for _ in 0..4 {
        let delivery = fixture.pull().remove(0);
        seen.extend(texts(std::slice::from_ref(&delivery)));
        fixture.acknowledge(&delivery);
    }
    assert_eq!(seen, ["k1", "k1", "k2", "k2"]);
    assert_eq!(fixture.backlog(), 0);
}

#[test]
fn exactly_once_delivery_has_no_duplicates() {
    let mut fixture = exactly_once().with_faults("duplicates=1");
    fixture.publish("a");
    assert_eq!(fixture.pull_texts(), ["a"]);
}

#[test]
fn a_message_whose_ack_was_dropped_comes_again_after_its_ack_deadline() {
    let mut fixture = Fixture::new().with_faults("dropped-acks=1");
    fixture.publish("a");
    let delivery = fixture.pull().remove(0);
    fixture.acknowledge(&delivery);
    assert!(fixture.pull().is_empty());
    fixture.pass(10);
    let again = fixture.pull().remove(0);
    fixture.set("");
    fixture.acknowledge(&again);
    assert_eq!(fixture.backlog(), 0);
}

#[test]
fn with_exactly_once_delivery_a_dropped_ack_may_be_tried_again() {
    let mut fixture = exactly_once().with_faults("dropped-acks=1");
    fixture.publish("a");
    let id = fixture.pull().remove(0).ack_id.to_string();
    let now = fixture.now;
    let ids = [id.clone()];
    let ack = |fixture: &mut Fixture| {
        let confirmed = fixture.engine.acknowledge(SUBSCRIPTION, &ids, now);
        confirmed.unwrap()
    };
    let dropped = ack(&mut fixture);
    assert_eq!(dropped.temporary, ids);
    let Err(BrokerError::AckIds(failed)) = dropped.into_answer() else {
        panic!("a dropped ack is no success")
    };
    assert!(failed[&id].starts_with("TRANSIENT_FAILURE_"));
    fixture.set("");
    assert_eq!(ack(&mut fixture).done, [id]);
}

#[test]
fn a_message_becomes_ready_after_its_latency() {
    let mut fixture = Fixture::new().with_faults("latency=3s");
    fixture.publish("a");
    fixture.pass(2);
    assert!(fixture.pull().is_empty());
    fixture.pass(1);
    let delivery = fixture.pull().remove(0);
    fixture.nack(&delivery);
    assert!(fixture.pull().is_empty());
    let due = fixture.now + Duration::from_secs(3);
    fixture.pass(0);
    assert_eq!(fixture.engine.next_timer(), Some(due));
    fixture.pass(3);
    assert_eq!(fixture.pull_texts(), ["a"]);
}

#[test]
fn a_latency_from_a_range_stays_within_it() {
    let mut fixture = Fixture::new().with_faults("latency=2s..4s");
    for number in 0..50 {
        fixture.publish(&number.to_string());
    }
    fixture.now += Duration::from_millis(1999);
    assert!(fixture.pull().is_empty());
    fixture.now += Duration::from_millis(1001);
    let early = fixture.pull().len();
    assert!((1..50).contains(&early), "{early}");
    fixture.pass(1);
    assert_eq!(early + fixture.pull().len(), 50);
}

#[test]
fn a_redelivery_out_of_order_comes_behind_another_message() {
    let mut fixture = Fixture::new().with_faults("out-of-order=1");
    for text in ["a", "b", "c", "d"] {
        fixture.publish(text);
    }
    for _ in 0..20 {
        let first = fixture.pull_one();
        fixture.nack(&first);
        let next = fixture.pull_one();
        assert_ne!(next.message.id(), first.message.id());
        fixture.nack(&next);
    }
    let mut left = fixture.pull_texts();
    left.sort();
    assert_eq!(left, ["a", "b", "c", "d"]);
}

#[test]
fn out_of_order_redelivery_keeps_the_order_of_every_key() {
    let mut fixture = Fixture::ordered().with_faults("out-of-order=1,duplicates=0.3,seed=5");
    for number in 0..5 {
        for key in ["k", "l", "m"] {
            fixture.publish_keyed(key, &format!("{key}{number}"));
        }
    }
    let mut seen = Vec::new();
    for round in 0.. {
        if fixture.backlog() == 0 {
            break;
        }
        let delivery = fixture.pull_one();
        if round % 3 == 0 {
            fixture.nack(&delivery);
            continue;
        }
        seen.extend(texts(std::slice::from_ref(&delivery)));
        fixture.acknowledge(&delivery);
    }
    for key in ["k", "l", "m"] {
        let of_key = seen.iter().filter(|text| text.starts_with(key));
        assert!(of_key.is_sorted(), "{seen:?}");
    }
}

#[test]
fn a_silent_stream_gets_nothing_until_silence_is_lifted() {
    let mut fixture = Fixture::new();
    let stream = fixture.open(1, 0);
    // Given, but not taken yet.
    fixture.publish("a");
    fixture.set("silence");
    assert!(fixture.take(stream).is_empty());
    let pulled = fixture.pull().remove(0);
    assert_eq!(pulled.attempt, 1, "the stream never had it");
    fixture.publish("b");
    fixture.pass(3600);
    assert!(fixture.take(stream).is_empty());
    fixture.engine.drain_wakes();
    fixture.set("");
    assert!(fixture.engine.drain_wakes().contains(&Wake::Stream(stream)));
    assert_eq!(texts(&fixture.take(stream)), ["a"]);
}

#[test]
fn one_seed_gives_one_run() {
    let run = || {
        let mut fixture = Fixture::new();
        fixture.set("duplicates=0.4,dropped-acks=0.4,out-of-order=0.4,latency=1s..9s,seed=11");
        for number in 0..20 {
            fixture.publish(&number.to_string());
        }
        let mut seen = Vec::new();
        for round in 0..60 {
            fixture.pass(1);
            for delivery in fixture.pull() {
                match round % 2 {
                    0 => fixture.nack(&delivery),
                    _ => fixture.acknowledge(&delivery),
                }
                seen.extend(texts(&[delivery]));
            }
        }
        seen
    };
    let first = run();
    assert!(first.len() > 30, "{first:?}");
    assert_eq!(run(), first);
}
